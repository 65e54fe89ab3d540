//! Maps whose keys are numbers that this process gave out itself.
//!
//! Nobody outside chooses such keys, so they need no hash that withstands being chosen, and a look-up
//! costs a multiplication. Whatever a peer writes goes through [`crate::Keyer`] or a keyed map instead.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Odd, and without a pattern in its bits (2^64 by the golden ratio).
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// Mixes numbers by multiplying.
#[derive(Clone, Copy, Debug, Default)]
pub struct NumberHasher(u64);

impl NumberHasher {
    fn take(&mut self, number: u64) {
        self.0 = self.0.rotate_left(5).wrapping_mul(FACTOR) ^ number;
    }
}

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        // The upper half of the product depends on the number's upper bits, the lower half on its lower.
        let product = u128::from(self.0) * u128::from(FACTOR);
        (product >> 64) as u64 ^ product as u64
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.take(byte.into());
        }
    }

    fn write_u8(&mut self, number: u8) {
        self.take(number.into());
    }

    fn write_u16(&mut self, number: u16) {
        self.take(number.into());
    }

    fn write_u32(&mut self, number: u32) {
        self.take(number.into());
    }

    fn write_u64(&mut self, number: u64) {
        self.take(number);
    }

    fn write_usize(&mut self, number: usize) {
        self.take(number as u64);
    }
}

/// A map by numbers of our own: of instances, connections, tickets.
pub type NumberMap<K, V> = HashMap<K, V, BuildHasherDefault<NumberHasher>>;

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::hash::{BuildHasher, BuildHasherDefault, Hash};

    use super::*;

    /// How many of `keys` have a place of their own among 4,096, and a tag among 128.
    fn spread<K: Hash>(keys: impl Iterator<Item = K>) -> (usize, usize) {
        let build = BuildHasherDefault::<NumberHasher>::default();
        let hashes: Vec<u64> = keys.map(|key| build.hash_one(key)).collect();
        let places: HashSet<u64> = hashes.iter().map(|hash| hash & 0xfff).collect();
        let tags: HashSet<u64> = hashes.iter().map(|hash| hash >> 57).collect();
        (places.len(), tags.len())
    }

    #[test]
    fn numbers_in_a_row_or_in_steps_are_spread() {
        for step in [1u64, 2, 8, 1 << 16, 1 << 24, 1 << 32, 1 << 40] {
            let (places, tags) = spread((0..1_000).map(|index| index * step));
            assert!(places > 600, "{places} places of 1,000 in steps of {step}");
            assert!(tags > 60, "{tags} tags in steps of {step}");
        }
        let (places, _) = spread((0..250u32).flat_map(|id| (0..4u8).map(move |lane| (id, lane))));
        assert!(places > 600, "{places}");
    }
}
