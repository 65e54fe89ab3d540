//! The table's sessions as bytes, 16 each, for another process. The tables' sizes may differ.

use strowger_contract::ClassId;

use super::{SHARDS, SessionTable, Slot, TIME_MASK};

const RECORD: usize = size_of::<Slot>();

impl SessionTable {
    /// Gives all live sessions out, at most `bytes_max` bytes at a time.
    ///
    /// # Errors
    /// That of `give`, at which it stops.
    pub(in crate::routing) fn save<E>(
        &self,
        now: u32,
        bytes_max: usize,
        give: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut bytes = Vec::with_capacity(bytes_max);
        for index in 0..SHARDS {
            let shard = self.lock(index);
            for slot in shard.slots.iter().filter(|slot| slot.fingerprint != 0) {
                if slot.is_expired(now) {
                    continue;
                }
                bytes.extend_from_slice(&slot.fingerprint.to_le_bytes());
                bytes.extend_from_slice(&slot.backend.to_le_bytes());
                bytes.extend_from_slice(&slot.expiry_class.to_le_bytes());
                if bytes.len() + RECORD > bytes_max {
                    give(&bytes)?;
                    bytes.clear();
                }
            }
        }
        if bytes.is_empty() { Ok(()) } else { give(&bytes) }
    }

    /// Takes in what [`SessionTable::save`] gave; `None` if it is something else.
    pub(in crate::routing) fn take_over(&self, now: u32, bytes: &[u8]) -> Option<()> {
        let (records, []) = bytes.as_chunks::<RECORD>() else { return None };
        for record in records {
            let (fingerprint, rest) = record.split_first_chunk()?;
            let (backend, rest) = rest.split_first_chunk()?;
            let (fingerprint, backend) =
                (u64::from_le_bytes(*fingerprint), u32::from_le_bytes(*backend));
            let expiry_class = u32::from_le_bytes(*rest.first_chunk()?);
            let slot = Slot { fingerprint, backend, expiry_class };
            if fingerprint == 0 || slot.is_expired(now) {
                continue;
            }
            let ttl = slot.expiry().wrapping_sub(now) & TIME_MASK;
            self.enter_for(fingerprint, backend, ClassId(slot.class()), now, ttl);
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::no_advice;
    use strowger_contract::BackendId;

    #[test]
    fn what_is_saved_is_there_in_a_table_of_another_size() {
        let (old, new) =
            (SessionTable::new(1 << 12, no_advice), SessionTable::new(1 << 14, no_advice));
        let spread = |key: u64| (key + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for key in 0..1_000 {
            let (backend, class) = (BackendId(key as u32 % 7), ClassId(key as u8 % 6));
            if key % 2 == 0 {
                old.hold(spread(key), backend, class, 100, 50 + key as u32);
            } else {
                old.insert(spread(key), backend, class, 100, 50 + key as u32);
            }
        }
        let mut calls = 0;
        old.save::<()>(200, 1_000, &mut |bytes| {
            calls += 1;
            new.take_over(200, bytes).ok_or(())
        })
        .expect("it is its own");
        assert!(calls > 10);
        for key in 0..1_000 {
            for now in [200, 300, 1_000, 1_200] {
                assert_eq!(old.get(spread(key), now), new.get(spread(key), now), "{key} at {now}");
            }
        }
        for backend in (0..7).map(BackendId) {
            old.sweep(200, usize::MAX);
            assert_eq!(old.sessions_of(backend), new.sessions_of(backend));
            assert_eq!(old.held_by(backend), new.held_by(backend));
        }
        assert!(new.take_over(200, &[1; 17]).is_none());
    }
}
