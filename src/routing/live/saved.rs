//! A backend's live state, for another process. Links are told again by who holds them; estimates of
//! the adaptive limit and the last minute's figures begin anew.

use std::sync::atomic::Ordering::Relaxed;

use serde::{Deserialize, Serialize};

use super::BackendLive;

/// What goes over. Times are milliseconds of the core's clock, which both processes share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::routing) struct SavedLive {
    health: u8,
    rises: u32,
    falls: u32,
    reported: u32,
    latency_us: u64,
    faults: u32,
    ejected_until: u64,
    ejections: u32,
    joined: u64,
    drain_since: u64,
    drain_until: u64,
    gone: bool,
    superseded: bool,
    favour_permille: u32,
    favour_until: u64,
    load: u32,
    by_load: u32,
    start: u32,
    held_off_until: u64,
    given_up: u32,
}

impl BackendLive {
    /// As it stands.
    pub(in crate::routing) fn saved(&self) -> SavedLive {
        SavedLive {
            health: self.health.load(Relaxed),
            rises: self.rises.load(Relaxed),
            falls: self.falls.load(Relaxed),
            reported: self.reported.load(Relaxed),
            latency_us: self.latency_us.load(Relaxed),
            faults: self.faults.load(Relaxed),
            ejected_until: self.ejected_until.load(Relaxed),
            ejections: self.ejections.load(Relaxed),
            joined: self.joined.load(Relaxed),
            drain_since: self.drain_since.load(Relaxed),
            drain_until: self.drain_until.load(Relaxed),
            gone: self.gone.load(Relaxed),
            superseded: self.superseded.load(Relaxed),
            favour_permille: self.favour_permille.load(Relaxed),
            favour_until: self.favour_until.load(Relaxed),
            load: self.load.load(Relaxed),
            by_load: self.by_load.load(Relaxed),
            start: self.start.load(Relaxed),
            held_off_until: self.held_off_until(),
            given_up: self.given_up(),
        }
    }

    /// As it stood elsewhere.
    pub(in crate::routing) fn take_over(&self, saved: &SavedLive) {
        self.health.store(saved.health, Relaxed);
        self.rises.store(saved.rises, Relaxed);
        self.falls.store(saved.falls, Relaxed);
        self.reported.store(saved.reported, Relaxed);
        self.latency_us.store(saved.latency_us, Relaxed);
        self.faults.store(saved.faults, Relaxed);
        self.ejected_until.store(saved.ejected_until, Relaxed);
        self.ejections.store(saved.ejections, Relaxed);
        self.joined.store(saved.joined, Relaxed);
        self.drain_since.store(saved.drain_since, Relaxed);
        self.drain_until.store(saved.drain_until, Relaxed);
        self.gone.store(saved.gone, Relaxed);
        self.superseded.store(saved.superseded, Relaxed);
        self.favour_permille.store(saved.favour_permille, Relaxed);
        self.favour_until.store(saved.favour_until, Relaxed);
        self.load.store(saved.load, Relaxed);
        self.by_load.store(saved.by_load, Relaxed);
        self.start.store(saved.start, Relaxed);
        self.hold_off(saved.held_off_until);
        self.give_up(saved.given_up, true);
    }
}
