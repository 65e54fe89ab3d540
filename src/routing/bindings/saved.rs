//! Subscriber bindings as bytes, for another process. The tables' sizes may differ.

use std::sync::atomic::Ordering::Relaxed;

use serde::{Deserialize, Serialize};
use strowger_contract::handover;

use super::{BindingTable, Name, SHARDS, Session, Slot};

/// One slot of either table.
#[derive(Serialize, Deserialize)]
enum Row {
    Name(Name),
    Session(Session),
}

impl BindingTable {
    /// Gives all live bindings out, some `bytes_max` bytes at a time.
    ///
    /// # Errors
    /// That of `give`, at which it stops.
    pub(in crate::routing) fn save<E>(
        &self,
        now: u32,
        bytes_max: usize,
        give: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        /// A row takes at most so many bytes.
        const ROW: usize = 80;
        let mut rows = Vec::new();
        for index in 0..SHARDS {
            let names: Vec<Name> = self.names.lock(index).clone();
            let sessions: Vec<Session> = self.sessions.lock(index).clone();
            let live = |key: u64, expiry: u32| key != 0 && expiry > now;
            let names = names.into_iter().filter(|slot| live(slot.key(), slot.expiry()));
            let sessions = sessions.into_iter().filter(|slot| live(slot.key(), slot.expiry()));
            for row in names.map(Row::Name).chain(sessions.map(Row::Session)) {
                rows.push(row);
                if rows.len() >= bytes_max / ROW {
                    give(&handover::write(&rows))?;
                    rows.clear();
                }
            }
        }
        if rows.is_empty() { Ok(()) } else { give(&handover::write(&rows)) }
    }

    /// Takes in what [`BindingTable::save`] gave; `None` if it is something else.
    pub(in crate::routing) fn take_over(&self, now: u32, bytes: &[u8]) -> Option<()> {
        for row in handover::read::<Vec<Row>>(bytes).ok()? {
            match row {
                Row::Name(name) if name.key != 0 => {
                    let mut shard = self.names.shard(name.key);
                    let at = self.names.room(&shard, name.key, now);
                    shard[at] = name;
                }
                Row::Session(session) if session.key != 0 => {
                    let mut shard = self.sessions.shard(session.key);
                    let at = self.sessions.room(&shard, session.key, now);
                    if shard[at].key == 0 {
                        self.live.fetch_add(1, Relaxed);
                        self.created.fetch_add(1, Relaxed);
                    }
                    shard[at] = session;
                }
                _ => {}
            }
        }
        Some(())
    }
}
