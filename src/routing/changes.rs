//! What is wanted, what is known, and what is leaving: the control side's part of the core.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hashbrown::Equivalent;
use strowger_contract::{BackendId, NumberMap};

use super::live::BackendLive;
use super::snapshot::{PoolLive, Snapshot};
use super::spec::{BackendSpec, SnapshotSpec};

/// Identities of backends that are gone and still remembered, so that one that comes back finds
/// its counters and sessions.
const REMEMBERED_MAX: usize = 100_000;

/// What is behind the snapshots; touched by the control side only.
#[derive(Debug, Default)]
pub(super) struct Changes {
    pub(super) epoch: u64,
    pub(super) wanted: SnapshotSpec,
    pub(super) known: hashbrown::HashMap<Identity, Known>,
    pub(super) pool_lives: HashMap<String, Arc<PoolLive>>,
    pub(super) next_backend: u32,
    /// Numbers that another process gave, and that must mean the same here.
    pub(super) planted: HashMap<Identity, BackendId>,
    pub(super) applied_before: bool,
    /// Snapshots that are no longer in force and that workers may still hold. They are taken apart
    /// here, at some milliseconds for thousands of backends, and not by the worker that lets go last.
    pub(super) retired: Vec<Arc<Snapshot>>,
    /// Counts calls of [`Changes::note_wanted`].
    noted: u64,
}

/// Pool, instance id, generation.
pub(super) type Identity = (String, String, u64);

/// One, to look it up by.
#[derive(Hash)]
pub(super) struct Named<'a>(pub(super) &'a str, pub(super) &'a str, pub(super) u64);

impl Equivalent<Identity> for Named<'_> {
    fn equivalent(&self, (pool, id, generation): &Identity) -> bool {
        self.0 == pool && self.1 == id && self.2 == *generation
    }
}

/// Who came and who left: pool and instance id.
#[derive(Debug, Default)]
pub(super) struct Moves {
    pub(super) joined: Vec<(String, String)>,
    pub(super) left: Vec<(String, String)>,
}

#[derive(Debug)]
pub(super) struct Known {
    pub(super) id: BackendId,
    pub(super) live: Arc<BackendLive>,
    /// The last thing that was wanted of it, and since when nothing is any more.
    pub(super) spec: Arc<BackendSpec>,
    pub(super) left: Option<u64>,
    /// When it was last wanted, by [`Changes::noted`].
    noted: u64,
}

impl Changes {
    /// Takes in what is wanted: new identities get a number, old ones that came back are restored.
    pub(super) fn note_wanted(&mut self, now: u64) -> Moves {
        let joined = if self.applied_before { now } else { 0 };
        let mut moves = Moves::default();
        self.noted += 1;
        let Self { wanted, known, planted, next_backend, noted, .. } = self;
        for pool in &wanted.pools {
            for backend in &pool.backends {
                let name = Named(&pool.name, &backend.id, backend.generation);
                let Some(known) = known.get_mut(&name) else {
                    let identity = (pool.name.clone(), backend.id.clone(), backend.generation);
                    let id = planted.get(&identity).copied().unwrap_or_else(|| {
                        *next_backend += 1;
                        BackendId(*next_backend)
                    });
                    moves.joined.push((pool.name.clone(), backend.id.clone()));
                    let newcomer = Known {
                        id,
                        live: Arc::new(BackendLive::new(joined)),
                        spec: Arc::new(backend.clone()),
                        left: None,
                        noted: *noted,
                    };
                    known.insert(identity, newcomer);
                    continue;
                };
                known.noted = *noted;
                if *known.spec != *backend {
                    known.spec = Arc::new(backend.clone());
                }
                let left = known.left.take();
                if left.is_some() {
                    known.live.set_superseded(false);
                    moves.joined.push((pool.name.clone(), backend.id.clone()));
                }
                if left == Some(FORGOTTEN) {
                    // Its debounce was over: it joins as a new one does.
                    known.live.rejoin(joined);
                }
            }
        }
        for ((pool, id, _), known) in known {
            if known.left.is_none() && known.noted != *noted {
                known.left = Some(now);
                moves.left.push((pool.clone(), id.clone()));
            }
        }
        self.supersede();
        moves
    }

    /// An address that another instance now has: the old one's sessions are dead, and none of them
    /// may reach the newcomer.
    fn supersede(&self) {
        if self.known.values().all(|known| known.left.is_none()) {
            return;
        }
        let mut holders: HashMap<_, Vec<(&str, u64)>> = HashMap::new();
        for ((_, id, generation), known) in
            self.known.iter().filter(|(_, known)| known.left.is_none())
        {
            let place = (known.spec.transport, known.spec.address);
            holders.entry(place).or_default().push((id, *generation));
        }
        for ((_, id, generation), known) in
            self.known.iter().filter(|(_, known)| known.left.is_some())
        {
            // The same instance in another pool is no other instance.
            let others = holders.get(&(known.spec.transport, known.spec.address));
            if others.is_some_and(|others| others.iter().any(|&it| it != (id, *generation))) {
                known.live.set_superseded(true);
            }
        }
    }

    pub(super) fn superseded(&self) -> NumberMap<BackendId, SocketAddr> {
        let lost = self.known.values().filter(|known| known.live.is_superseded());
        lost.map(|known| (known.id, known.spec.address)).collect()
    }

    /// Those that are no longer wanted and not yet forgotten, by pool.
    pub(super) fn leaving_by_pool(&self) -> HashMap<String, Vec<Arc<BackendSpec>>> {
        let mut leaving: HashMap<String, Vec<Arc<BackendSpec>>> = HashMap::new();
        let debounce: HashMap<&str, Duration> =
            self.wanted.pools.iter().map(|pool| (pool.name.as_str(), pool.debounce)).collect();
        for ((pool, ..), known) in &self.known {
            let waits = known.left.is_some_and(|left| left != FORGOTTEN) && !known.live.is_gone();
            if waits && debounce.get(pool.as_str()).is_some_and(|debounce| !debounce.is_zero()) {
                leaving.entry(pool.clone()).or_default().push(Arc::clone(&known.spec));
            }
        }
        for backends in leaving.values_mut() {
            backends.sort_by(|one, two| one.id.cmp(&two.id));
        }
        leaving
    }

    /// Forgets those whose debounce is over; whether there were any.
    pub(super) fn forget_left(&mut self, now: u64) -> bool {
        let debounce: HashMap<&str, u64> = self
            .wanted
            .pools
            .iter()
            .map(|pool| (pool.name.as_str(), pool.debounce.as_millis() as u64))
            .collect();
        let mut any = false;
        for ((pool, ..), known) in &mut self.known {
            let wait = debounce.get(pool.as_str()).copied().unwrap_or(0);
            if known.left.is_some_and(|left| left != FORGOTTEN && now >= left.saturating_add(wait))
            {
                known.left = Some(FORGOTTEN);
                known.live.undrain();
                any = true;
            }
        }
        if self.known.len() > REMEMBERED_MAX {
            self.known.retain(|_, known| known.left.is_none());
        }
        any
    }
}

/// Left, waited out, and no longer in the snapshot.
const FORGOTTEN: u64 = u64::MAX;
