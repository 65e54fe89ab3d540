//! What is held against a backend's links: for how long it is to be left alone, and which of them were
//! given up.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use super::BackendLive;

/// Part of a backend's live state.
#[derive(Debug, Default)]
pub(super) struct Grudges {
    /// Milliseconds of the core's clock.
    pub(super) held_off_until: AtomicU64,
    /// A bit for each lane.
    pub(super) given_up: AtomicU32,
}

impl BackendLive {
    /// No link to it is opened before then, in milliseconds of the core's clock.
    pub(in crate::routing) fn hold_off(&self, until: u64) {
        self.grudges.held_off_until.store(until, Relaxed);
    }

    /// Until when no link to it is opened.
    pub(in crate::routing) fn held_off_until(&self) -> u64 {
        self.grudges.held_off_until.load(Relaxed)
    }

    /// Notes that its links, a bit each, were given up, or have proven themselves since.
    pub(in crate::routing) fn give_up(&self, lanes: u32, given_up: bool) {
        let place = &self.grudges.given_up;
        if given_up {
            place.fetch_or(lanes, Relaxed);
        } else {
            place.fetch_and(!lanes, Relaxed);
        }
    }

    /// Those that were given up.
    pub(in crate::routing) fn given_up(&self) -> u32 {
        self.grudges.given_up.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_process_bears_the_same_grudges() {
        let (old, new) = (BackendLive::new(0), BackendLive::new(0));
        old.hold_off(5_000);
        old.give_up(0b101, true);
        old.give_up(0b100, false);
        new.take_over(&old.saved());
        assert_eq!((new.held_off_until(), new.given_up()), (5_000, 1));
        new.give_up(u32::MAX, false);
        assert_eq!(new.given_up(), 0);
    }
}
