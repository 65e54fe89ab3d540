//! Names of clients' flows, so that any worker can find the one that a backend asks for.

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, MutexGuard, PoisonError};

use strowger_contract::FlowId;

const SHARDS: usize = 64;

/// Names in one shard, at most: a million in all, some 32 MiB.
const NAMES_PER_SHARD: usize = 16_384;

/// The directory. Asked once per backend's own request, not per message.
#[derive(Debug)]
pub(super) struct FlowNames {
    shards: Vec<Mutex<HashMap<u64, FlowId>>>,
    full: AtomicBool,
}

impl Default for FlowNames {
    fn default() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            full: AtomicBool::new(false),
        }
    }
}

impl FlowNames {
    fn shard(&self, name: u64) -> MutexGuard<'_, HashMap<u64, FlowId>> {
        self.shards[(name >> 58) as usize % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a flow a name; a later flow of the same name takes it. `false` when there is no room.
    pub(super) fn insert(&self, name: u64, flow: FlowId) -> bool {
        let mut shard = self.shard(name);
        if shard.len() >= NAMES_PER_SHARD && !shard.contains_key(&name) {
            self.full.store(true, Relaxed);
            return false;
        }
        shard.insert(name, flow);
        true
    }

    /// Whether some name found no room.
    pub(super) fn was_full(&self) -> bool {
        self.full.load(Relaxed)
    }

    /// The flow of a name.
    pub(super) fn get(&self, name: u64) -> Option<FlowId> {
        self.shard(name).get(&name).copied()
    }

    /// All of them.
    pub(super) fn all(&self) -> Vec<(u64, FlowId)> {
        let names = |shard: &Mutex<HashMap<u64, FlowId>>| {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            shard.iter().map(|(&name, &flow)| (name, flow)).collect::<Vec<_>>()
        };
        self.shards.iter().flat_map(names).collect()
    }

    /// Takes the name back, if `flow` still has it.
    pub(super) fn remove(&self, name: u64, flow: FlowId) {
        let mut shard = self.shard(name);
        if shard.get(&name) == Some(&flow) {
            shard.remove(&name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_holder_gives_a_name_back() {
        let names = FlowNames::default();
        let (old, new) = (FlowId::from_bits(1), FlowId::from_bits(2));
        names.insert(7, old);
        names.insert(7, new);
        names.remove(7, old);
        assert_eq!(names.get(7), Some(new));
        names.remove(7, new);
        assert_eq!(names.get(7), None);
    }
}
