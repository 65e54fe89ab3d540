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
    /// Beyond it nobody was given one yet.
    next: u32,
    /// Those that manifests name, of all apps: never given to who names none.
    #[serde(skip)]
    reserved: BTreeSet<u16>,
}

impl Ports {
    /// Ports from `low` to `high`, which should lie outside of the kernel's range for outgoing
    /// connections.
    pub(crate) fn new(low: u16, high: u16, quarantine: Millis) -> Self {
        Self {
            low,
            high,
            quarantine,
            used: BTreeSet::new(),
            resting: BTreeMap::new(),
            next: u32::from(low),
            reserved: BTreeSet::new(),
        }
    }

    /// Other limits from now on; what is used and rests stays.
    pub(crate) fn limits(&mut self, low: u16, high: u16, quarantine: Millis) {
        if (low, high) != (self.low, self.high) {
            // From the start: what is used or rests is passed over anyway.
            self.next = u32::from(low);
        }
        (self.low, self.high, self.quarantine) = (low, high, quarantine);
    }

    /// What is given to nobody from now on. Who has one of them keeps it.
    pub(crate) fn reserve(&mut self, reserved: BTreeSet<u16>) {
        self.reserved = reserved;
    }

    /// A port that nobody has and that has rested; `None` if there is none.
    pub(crate) fn take(&mut self, now: Millis) -> Option<u16> {
        let found = self.never_used().or_else(|| self.rested(now))?;
        self.resting.remove(&found);
        self.used.insert(found);
        Some(found)
    }

    fn never_used(&mut self) -> Option<u16> {
        while self.next <= u32::from(self.high) {
            let port = u16::try_from(self.next).ok()?;
            self.next += 1;
            if self.is_free(port) && !self.resting.contains_key(&port) {
                return Some(port);
            }
            if self.reserved.contains(&port) {
                // One day its manifest may be gone: then it comes as one that has rested.
                self.resting.entry(port).or_insert(0);
            }
        }
        None
    }

    fn is_free(&self, port: u16) -> bool {
        (self.low..=self.high).contains(&port)
            && !self.used.contains(&port)
            && !self.reserved.contains(&port)
    }

    fn rested(&self, now: Millis) -> Option<u16> {
        let over = self.resting.iter().filter(|(port, since)| {
            self.is_free(**port) && now.saturating_sub(**since) >= self.quarantine
        });
        over.min_by_key(|(_, since)| **since).map(|(port, _)| *port)
    }

    /// A port is used no more, and begins to rest: also one outside of the limits of now, which may
    /// come back.
    pub(crate) fn give_back(&mut self, now: Millis, port: u16) {
        self.used.remove(&port);
        self.resting.insert(port, now);
    }

    /// Time went back (the host was started anew): what rests does so at least since then.
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
    fn other_limits_lose_no_port_and_no_rest() {
        let mut ports = Ports::new(100, 101, 1_000);
        assert_eq!((ports.take(0), ports.take(0), ports.take(0)), (Some(100), Some(101), None));
        ports.limits(98, 101, 1_000);
        assert_eq!((ports.take(0), ports.take(0), ports.take(0)), (Some(98), Some(99), None));
        ports.limits(100, 101, 1_000);
        ports.give_back(10, 98);
        ports.limits(98, 99, 1_000);
        assert_eq!(ports.take(1_009), None, "it was given back beyond the limits, and rests");
        assert_eq!(ports.take(1_010), Some(98));
        let mut last = Ports::new(u16::MAX, u16::MAX, 1_000);
        assert_eq!((last.take(0), last.take(0)), (Some(u16::MAX), None));
    }

    #[test]
    fn a_port_that_a_manifest_names_is_given_to_nobody() {
        let mut ports = Ports::new(100, 102, 1_000);
        ports.reserve(BTreeSet::from([101]));
        assert_eq!((ports.take(0), ports.take(0), ports.take(0)), (Some(100), Some(102), None));
        ports.give_back(0, 102);
        ports.reserve(BTreeSet::from([101, 102]));
        assert_eq!(ports.take(5_000), None);
        ports.reserve(BTreeSet::new());
        let both = [ports.take(5_000), ports.take(5_000)];
        assert!(both.contains(&Some(101)) && both.contains(&Some(102)), "{both:?}");
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
