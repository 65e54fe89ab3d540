//! Ports for instances. Pure.
//!
//! A port that was given back rests: what its last user's peers still send must not reach somebody
//! else. It is given out again only after the longest of lease and sweep, the 32 s that a SIP
//! transaction lives (64 x T1), and what the kernel remembers of UDP flows; and of those that have
//! rested, the one that rested longest comes first.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::supervisor::Millis;

/// How long a port rests: longer than lease, sweep and grace at their defaults (47 s), a SIP
/// transaction (32 s), and an unanswered UDP flow in conntrack (30 s).
pub(crate) const QUARANTINE_MS: Millis = 60_000;

/// What ports are given out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ports {
    low: u16,
    high: u16,
    quarantine: Millis,
    used: BTreeSet<u16>,
    resting: BTreeMap<u16, Millis>,
    next: u16,
}

impl Ports {
    /// Ports from `low` to `high`, which should lie outside of the kernel's range for outgoing
    /// connections.
    pub(crate) fn new(low: u16, high: u16, quarantine: Millis) -> Self {
        Self { low, high, quarantine, used: BTreeSet::new(), resting: BTreeMap::new(), next: low }
    }

    /// Other limits from now on; what is used and rests stays.
    pub(crate) fn limits(&mut self, low: u16, high: u16, quarantine: Millis) {
        (self.low, self.high, self.quarantine) = (low, high, quarantine);
        self.next = self.next.clamp(low, high);
    }

    /// A port that nobody has and that has rested; `None` if there is none.
    pub(crate) fn take(&mut self, now: Millis) -> Option<u16> {
        let found = self.never_used().or_else(|| self.rested(now))?;
        self.resting.remove(&found);
        self.used.insert(found);
        Some(found)
    }

    fn never_used(&mut self) -> Option<u16> {
        while self.next <= self.high {
            let port = self.next;
            self.next = port.checked_add(1)?;
            if !self.used.contains(&port) && !self.resting.contains_key(&port) {
                return Some(port);
            }
        }
        None
    }

    fn rested(&self, now: Millis) -> Option<u16> {
        let fits = |port: u16| (self.low..=self.high).contains(&port) && !self.used.contains(&port);
        let over = self
            .resting
            .iter()
            .filter(|(port, since)| fits(**port) && now.saturating_sub(**since) >= self.quarantine);
        over.min_by_key(|(_, since)| **since).map(|(port, _)| *port)
    }

    /// A port is used no more, and begins to rest.
    pub(crate) fn give_back(&mut self, now: Millis, port: u16) {
        self.used.remove(&port);
        if (self.low..=self.high).contains(&port) {
            self.resting.insert(port, now);
        }
    }

    /// Time went back (the host was started anew): all that rested has.
    pub(crate) fn new_life(&mut self) {
        self.resting.values_mut().for_each(|since| *since = 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_rests_and_the_one_that_rested_longest_comes_first() {
        let mut ports = Ports::new(100, 102, 1_000);
        let all: Vec<_> = (0..3).filter_map(|_| ports.take(0)).collect();
        assert_eq!((all, ports.take(0)), (vec![100, 101, 102], None));
        ports.give_back(10, 101);
        ports.give_back(20, 100);
        assert_eq!(ports.take(1_009), None, "inside its quarantine");
        assert_eq!((ports.take(1_015), ports.take(1_015)), (Some(101), None));
        assert_eq!(ports.take(1_020), Some(100));
    }

    #[test]
    fn nobody_gets_what_another_has() {
        let mut ports = Ports::new(1, 50, 5);
        let (mut held, mut seed) = (BTreeSet::new(), 7u64);
        for now in 0..10_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            if seed >> 63 == 0 {
                if let Some(port) = ports.take(now) {
                    assert!(held.insert(port), "{port} was given out twice");
                }
            } else if let Some(port) = held.pop_first() {
                ports.give_back(now, port);
            }
        }
    }
}
