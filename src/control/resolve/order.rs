//! What was found, and the order in which its places are tried (RFC 2782).

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use strowger_contract::{PLACES_MAX, Place, Transport};

/// All places that a name leads to.
#[derive(Clone, Debug)]
pub(super) struct Found {
    /// By transport, the preferred first.
    pub(super) groups: Vec<Group>,
    pub(super) until: Instant,
}

/// Those that one service has.
#[derive(Clone, Debug)]
pub(super) struct Group {
    pub(super) transport: Transport,
    /// The lowest priority first.
    pub(super) targets: Vec<Target>,
}

/// A host of it.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) priority: u16,
    pub(super) weight: u16,
    pub(super) port: u16,
    pub(super) addresses: Vec<IpAddr>,
}

impl Found {
    /// The order for one seed: by priority, drawn by weight among equals; a host's addresses begin
    /// at a drawn one. The same seed gives the same order.
    pub(super) fn places(&self, seed: u64) -> Arc<[Place]> {
        let mut random = Draw(seed);
        let mut places = Vec::new();
        for group in &self.groups {
            for priority in group.targets.chunk_by(|one, two| one.priority == two.priority) {
                let mut left: Vec<&Target> = priority.iter().collect();
                // RFC 2782: those without weight first, so that they have a small chance.
                left.sort_by_key(|target| target.weight > 0);
                while !left.is_empty() {
                    let target = left.remove(random.pick(&left));
                    let first = random.below(target.addresses.len() as u64) as usize;
                    let (before, after) = target.addresses.split_at(first);
                    places.extend(after.iter().chain(before).map(|address| Place {
                        transport: group.transport,
                        address: (*address, target.port).into(),
                    }));
                }
            }
        }
        let mut seen = std::collections::HashSet::new();
        places.retain(|place| seen.insert(*place));
        places.truncate(PLACES_MAX);
        places.into()
    }
}

/// SplitMix64.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ bits >> 31
    }

    /// 0 to `end` - 1; 0 if `end` is 0.
    fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }

    /// One of them, by weight.
    fn pick(&mut self, targets: &[&Target]) -> usize {
        let sum: u64 = targets.iter().map(|target| u64::from(target.weight)).sum();
        if sum == 0 {
            return self.below(targets.len() as u64) as usize;
        }
        let mut drawn = self.below(sum + 1);
        for (index, target) in targets.iter().enumerate() {
            let weight = u64::from(target.weight);
            if drawn <= weight {
                return index;
            }
            drawn -= weight;
        }
        targets.len() - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(priority: u16, weight: u16, last: u8) -> Target {
        let addresses = vec![IpAddr::from([192, 0, 2, last])];
        Target { priority, weight, port: 5060, addresses }
    }

    fn found(targets: Vec<Target>) -> Found {
        let groups = vec![Group { transport: Transport::Udp, targets }];
        Found { groups, until: Instant::now() }
    }

    #[test]
    fn weights_share_and_priorities_order() {
        let found = found(vec![target(1, 75, 1), target(1, 25, 2), target(2, 100, 3)]);
        let mut first = [0; 3];
        for seed in 0..10_000 {
            let places = found.places(seed);
            assert_eq!(places.len(), 3);
            assert_eq!(places[2].address.to_string(), "192.0.2.3:5060", "the lower priority last");
            let IpAddr::V4(ip) = places[0].address.ip() else { panic!("IPv4 only") };
            first[usize::from(ip.octets()[3]) - 1] += 1;
        }
        assert!((7_200..7_800).contains(&first[0]), "{first:?}");
        assert_eq!(found.places(7), found.places(7), "the same seed, the same order");
    }

    #[test]
    fn no_weight_is_a_small_chance_and_all_without_are_equal() {
        let small = found(vec![target(1, 0, 1), target(1, 1_000, 2)]);
        let drawn = (0..10_000)
            .filter(|seed| small.places(*seed)[0].address.ip() == IpAddr::from([192, 0, 2, 1]))
            .count();
        assert!(drawn < 100, "{drawn}");
        let equal = found(vec![target(1, 0, 1), target(1, 0, 2)]);
        let drawn = (0..10_000)
            .filter(|seed| equal.places(*seed)[0].address.ip() == IpAddr::from([192, 0, 2, 1]))
            .count();
        assert!((4_700..5_300).contains(&drawn), "{drawn}");
    }

    #[test]
    fn hundreds_of_records_are_bounded() {
        let targets = (0..200).map(|last| target(1, 1, last as u8)).collect();
        assert_eq!(found(targets).places(1).len(), PLACES_MAX);
    }
}
