//! Choosing one of several backends.
//!
//! # Published formulas
//! Nodes of one cluster, and the same node after a restart, must place a session alike, so these may
//! not change:
//! - rendezvous: the backend with the greatest `-weight / ln(u)`, where
//!   `u = (xxh3_64(key as 8 little-endian bytes, seed = pin) + 0.5) / 2^64`;
//! - Maglev: a table of 65,537 entries; backend number *i* fills in the order
//!   `offset + n * skip (mod 65,537)`, `offset = pin_hash % 65,537`,
//!   `skip = (pin_hash >> 32) % 65,536 + 1`, `pin_hash = xxh3_64(pin as 8 little-endian bytes)`,
//!   taking turns in proportion to weight.

use strowger_contract::Pin;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// From so many backends of one priority on, a Maglev table replaces rendezvous: the choice is then
/// O(1), for a little more movement when the pool changes.
pub const MAGLEV_FROM: usize = 256;

/// The table's size: a prime well over a hundred times the backends that it is meant for.
const MAGLEV_SIZE: usize = 65_537;

const MAGLEV_NONE: u32 = u32::MAX;

/// The score of a backend for a key: the greatest wins. Zero for weight 0.
#[must_use]
pub fn rendezvous_score(key: u64, pin: Pin, weight: f64) -> f64 {
    Candidate::new(key, pin, weight).score()
}

/// A backend in a comparison of scores.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    unit: f64,
    weight: f64,
}

impl Candidate {
    pub(super) fn new(key: u64, pin: Pin, weight: f64) -> Self {
        let hash = xxh3_64_with_seed(&key.to_le_bytes(), pin.0);
        Self { unit: (hash as f64 + 0.5) / 18_446_744_073_709_551_616.0, weight }
    }

    fn score(self) -> f64 {
        // `unit` can round to 1, whose logarithm is 0: the best score there is.
        -self.weight / self.unit.ln().min(-f64::MIN_POSITIVE)
    }

    /// Whether its score is greater. Among equal weights the hash alone decides, and the logarithm, which
    /// is most of the cost, need not be taken.
    pub(super) fn beats(self, other: Self) -> bool {
        if self.weight == other.weight && self.weight > 0.0 {
            self.unit > other.unit
        } else {
            self.score() > other.score()
        }
    }
}

/// A pseudo-random share of keys, in thousandths, that differs from backend to backend: for canaries
/// and slow starts where a hash decides.
#[must_use]
pub fn is_in_share(key: u64, pin: Pin, thousandths: u32) -> bool {
    thousandths >= 1_000
        || xxh3_64_with_seed(&key.to_be_bytes(), !pin.0) % 1_000 < u64::from(thousandths)
}

/// A Maglev table.
#[derive(Clone, Debug)]
pub struct Maglev {
    table: Vec<u32>,
}

impl Maglev {
    /// Builds the table over `(pin, weight)`; those of weight 0 get no entry.
    #[must_use]
    pub fn new(backends: &[(Pin, u32)]) -> Self {
        let heaviest = backends.iter().map(|&(_, weight)| weight).max().unwrap_or(0);
        let mut table = vec![MAGLEV_NONE; MAGLEV_SIZE];
        if heaviest == 0 {
            return Self { table };
        }
        let mut walks: Vec<Walk> =
            backends.iter().map(|&(pin, weight)| Walk::new(pin, weight)).collect();
        let mut filled = 0;
        loop {
            for (index, walk) in walks.iter_mut().enumerate() {
                // The heaviest has a turn in each round, the others in proportion.
                walk.credit += u64::from(walk.weight);
                if walk.credit < u64::from(heaviest) {
                    continue;
                }
                walk.credit -= u64::from(heaviest);
                let place = walk.next_free(&table);
                table[place] = index as u32;
                filled += 1;
                if filled == MAGLEV_SIZE {
                    return Self { table };
                }
            }
        }
    }

    /// The backend's index for a key. `attempt` counts up when the one before was of no use.
    #[must_use]
    pub fn pick(&self, key: u64, attempt: u32) -> Option<usize> {
        let hash = if attempt == 0 {
            key
        } else {
            xxh3_64_with_seed(&key.to_le_bytes(), u64::from(attempt))
        };
        let index = self.table[(hash % MAGLEV_SIZE as u64) as usize];
        (index != MAGLEV_NONE).then_some(index as usize)
    }
}

struct Walk {
    place: usize,
    skip: usize,
    weight: u32,
    credit: u64,
}

impl Walk {
    fn new(pin: Pin, weight: u32) -> Self {
        let hash = xxh3_64(&pin.0.to_le_bytes());
        let place = (hash % MAGLEV_SIZE as u64) as usize;
        let skip = ((hash >> 32) % (MAGLEV_SIZE as u64 - 1)) as usize + 1;
        Self { place, skip, weight, credit: 0 }
    }

    fn next_free(&mut self, table: &[u32]) -> usize {
        loop {
            let place = self.place;
            self.place = (self.place + self.skip) % MAGLEV_SIZE;
            if table[place] == MAGLEV_NONE {
                return place;
            }
        }
    }
}

/// A small generator (SplitMix64) for choices that need no secrecy.
#[derive(Clone, Debug)]
pub(super) struct Dice {
    state: u64,
}

impl Dice {
    /// Seeded by the caller.
    #[must_use]
    pub(super) fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next 64 bits.
    pub(super) fn roll(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.state;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ bits >> 31
    }

    /// Below `bound`, which is not 0.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.roll()) * u128::from(bound)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pins(count: usize) -> Vec<Pin> {
        (0..count).map(|index| Pin::of("pool", &format!("b{index}"), 0)).collect()
    }

    fn best(key: u64, backends: &[(Pin, f64)]) -> Pin {
        let scored =
            backends.iter().map(|&(pin, weight)| (rendezvous_score(key, pin, weight), pin));
        scored.max_by(|one, two| one.0.total_cmp(&two.0)).expect("not empty").1
    }

    fn keys(count: u64) -> impl Iterator<Item = u64> {
        (0..count).map(|key| xxh3_64(&key.to_le_bytes()))
    }

    #[test]
    fn rendezvous_follows_weights() {
        let backends: Vec<_> = pins(4).into_iter().zip([1.0, 2.0, 3.0, 4.0]).collect();
        let total = 100_000;
        let mut counts = std::collections::HashMap::<Pin, u64>::new();
        for key in keys(total) {
            *counts.entry(best(key, &backends)).or_default() += 1;
        }
        for (pin, weight) in &backends {
            let (share, expected) = (counts[pin] as f64 / total as f64, weight / 10.0);
            assert!((share - expected).abs() < 0.01, "{share} for {expected}");
        }
    }

    #[test]
    fn rendezvous_moves_only_what_it_must() {
        let nine: Vec<_> = pins(9).into_iter().map(|pin| (pin, 1.0)).collect();
        let ten: Vec<_> = pins(10).into_iter().map(|pin| (pin, 1.0)).collect();
        let added = ten[9].0;
        let mut moved = 0;
        for key in keys(50_000) {
            let (before, after) = (best(key, &nine), best(key, &ten));
            if before != after {
                assert_eq!(after, added, "a key may move to the new one only");
                moved += 1;
            }
        }
        assert!((4_300..5_700).contains(&moved), "{moved} of 50,000 moved for 1/10");
    }

    #[test]
    fn a_placement_is_published() {
        // Other nodes and releases must agree, so these may never change.
        let backends: Vec<_> = pins(5).into_iter().map(|pin| (pin, 1.0)).collect();
        let order: Vec<usize> = keys(12)
            .map(|key| {
                backends
                    .iter()
                    .position(|&(pin, _)| pin == best(key, &backends))
                    .expect("one of them")
            })
            .collect();
        let table = Maglev::new(&backends.iter().map(|&(pin, _)| (pin, 1)).collect::<Vec<_>>());
        let picks: Vec<usize> = keys(12).filter_map(|key| table.pick(key, 0)).collect();
        assert_eq!((order, picks), (PUBLISHED_ORDER.to_vec(), PUBLISHED_PICKS.to_vec()));
    }

    const PUBLISHED_ORDER: [usize; 12] = [0, 0, 4, 0, 4, 3, 0, 3, 4, 2, 2, 3];
    const PUBLISHED_PICKS: [usize; 12] = [3, 1, 0, 1, 2, 2, 1, 3, 0, 4, 4, 0];

    #[test]
    fn maglev_is_even_weighted_and_steady() {
        let all: Vec<(Pin, u32)> = pins(300)
            .into_iter()
            .enumerate()
            .map(|(index, pin)| (pin, if index < 10 { 200 } else { 100 }))
            .collect();
        let table = Maglev::new(&all);
        let mut counts = vec![0u32; all.len()];
        for place in &table.table {
            counts[*place as usize] += 1;
        }
        let unit = MAGLEV_SIZE as f64 / 310.0;
        for (index, &count) in counts.iter().enumerate() {
            let expected = if index < 10 { 2.0 * unit } else { unit };
            assert!(
                (f64::from(count) - expected).abs() <= expected * 0.02 + 2.0,
                "{count} for {expected}"
            );
        }
        let fewer = Maglev::new(&all[..299]);
        let moved = (0..MAGLEV_SIZE)
            .filter(|&place| table.table[place] != 299 && table.table[place] != fewer.table[place])
            .count();
        assert!(moved < MAGLEV_SIZE / 50, "{moved} moved though their backend stayed");
    }

    #[test]
    fn maglev_of_nothing_picks_nothing() {
        assert_eq!(Maglev::new(&[]).pick(5, 0), None);
        assert_eq!(Maglev::new(&[(Pin(1), 0)]).pick(5, 0), None);
    }
}
