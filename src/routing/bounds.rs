//! The node's own bounds: the first time that one bites it is an event with its name.

use std::sync::atomic::Ordering::Relaxed;

use super::core::Core;
use super::events::{CoreEvent, Happening};

impl Core {
    /// Once per tick.
    pub(super) fn tell_node_bounds(&self) {
        let sessions = self.table().totals();
        let pushed_out = self.bindings().map_or(0, |table| table.totals().evicted);
        let bounds = [
            (sessions.evicted > 0, "node.sessions_max (an older session of the class went)"),
            (sessions.refused > 0, "node.sessions_max (no room for a session)"),
            (pushed_out > 0, "node.bindings_max"),
            (self.events_lost.load(Relaxed) > 0, "events between two ticks (EVENTS_MAX)"),
            (self.peers().was_full(), "peers in the operators' table (PEERS_MAX)"),
            (self.flows().was_full(), "names of flows (NAMES_PER_SHARD)"),
        ];
        for (index, (_, bound)) in bounds.iter().enumerate().filter(|(_, (bites, _))| *bites) {
            let bit = 1 << index;
            if self.bitten.fetch_or(bit, Relaxed) & bit == 0 {
                self.tell(CoreEvent::of("", None, Happening::BoundHit { bound }));
            }
        }
    }
}
