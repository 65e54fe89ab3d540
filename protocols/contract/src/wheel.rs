//! Timers without a clock: a hierarchical timing wheel of 1 ms ticks.
//!
//! There is no cancel. A key that fires and is not wanted any more is ignored by its owner, who
//! keeps a generation in it; an owner whose deadline moved away puts it in again when it fires. So
//! each live thing needs one entry, insertion is O(1), and nothing is searched.

use std::time::{Duration, Instant};

const LEVELS: usize = 5;
const SLOT_BITS: u32 = 6;
const SLOTS: usize = 1 << SLOT_BITS;

/// No entry.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Entry {
    tick: u64,
    key: u64,
    /// The next one in the same slot, or in the list of free ones.
    next: u32,
}

/// The entries of a slot, in the order that they came.
#[derive(Clone, Copy, Debug)]
struct List {
    first: u32,
    last: u32,
}

const EMPTY: List = List { first: NONE, last: NONE };

/// The wheel. Its entries lie in one block that grows to the most timers that there ever were at a
/// time, and never again: no slot has memory of its own.
#[derive(Debug)]
pub struct Wheel {
    start: Instant,
    /// All ticks before this one have fired.
    tick: u64,
    len: usize,
    occupied: [u64; LEVELS],
    slots: [List; LEVELS * SLOTS],
    entries: Vec<Entry>,
    free: u32,
}

impl Wheel {
    /// How far ahead a timer is kept exactly; one further away fires early, at this distance, and
    /// is put in again by the wheel itself.
    pub const HORIZON: Duration = Duration::from_millis(1 << (SLOT_BITS * LEVELS as u32));

    /// `start` is any time not after the first use.
    #[must_use]
    pub fn new(start: Instant) -> Self {
        Self {
            start,
            tick: 0,
            len: 0,
            occupied: [0; LEVELS],
            slots: [EMPTY; LEVELS * SLOTS],
            entries: Vec::new(),
            free: NONE,
        }
    }

    /// How many timers are in it, stale ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fires `key` at `at`, never before, and up to a tick later. A time already past fires at the
    /// next [`Wheel::advance`].
    pub fn insert(&mut self, at: Instant, key: u64) {
        let after = at.saturating_duration_since(self.start);
        // Rounded up: a timer must not fire early.
        let tick = u64::try_from(after.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX);
        self.len += 1;
        let entry = Entry { tick: tick.max(self.tick), key, next: NONE };
        let index = self.free;
        let index = if let Some(free) = self.entries.get_mut(index as usize) {
            self.free = free.next;
            *free = entry;
            index
        } else {
            self.entries.push(entry);
            (self.entries.len() - 1) as u32
        };
        self.place(index);
    }

    /// Fires all that is due at `now`, in the order of ticks. `fire` gets each key once.
    pub fn advance(&mut self, now: Instant, mut fire: impl FnMut(u64)) {
        let until = now.saturating_duration_since(self.start).as_millis() as u64;
        while self.tick <= until {
            if self.len == 0 {
                self.tick = until + 1;
                return;
            }
            let Some(next) = self.next_tick().filter(|&next| next <= until) else {
                self.tick = until + 1;
                self.cascade();
                return;
            };
            self.tick = next;
            self.cascade();
            self.fire_current(&mut fire);
            self.tick += 1;
            self.cascade();
        }
    }

    /// When [`Wheel::advance`] should next be called: never later than the first timer.
    #[must_use]
    pub fn next(&self) -> Option<Instant> {
        let tick = self.next_tick()?;
        Some(self.start + Duration::from_millis(tick))
    }

    fn fire_current(&mut self, fire: &mut impl FnMut(u64)) {
        let slot = (self.tick as usize) & (SLOTS - 1);
        if self.occupied[0] & 1 << slot == 0 {
            return;
        }
        self.occupied[0] &= !(1 << slot);
        // Taken out so that the closure sees no half-fired wheel.
        let mut index = std::mem::replace(&mut self.slots[slot], EMPTY).first;
        while let Some(entry) = self.entries.get(index as usize).copied() {
            if entry.tick <= self.tick {
                self.len -= 1;
                self.entries[index as usize].next = self.free;
                self.free = index;
                fire(entry.key);
            } else {
                self.place(index);
            }
            index = entry.next;
        }
    }

    /// A lower bound of the first tick at which anything is due or must be moved down.
    fn next_tick(&self) -> Option<u64> {
        let mut best = None;
        for level in 0..LEVELS {
            if self.occupied[level] == 0 {
                continue;
            }
            let shift = SLOT_BITS * level as u32;
            let base = self.tick >> shift;
            let here = (base as usize) & (SLOTS - 1);
            let rotated = self.occupied[level].rotate_right(here as u32);
            let ahead = u64::from(rotated.trailing_zeros());
            let tick = ((base + ahead) << shift).max(self.tick);
            best = Some(best.map_or(tick, |best: u64| best.min(tick)));
        }
        best
    }

    /// Moves entries of coarser slots that have come near into finer ones.
    fn cascade(&mut self) {
        for level in (1..LEVELS).rev() {
            let shift = SLOT_BITS * level as u32;
            let slot = (self.tick >> shift) as usize & (SLOTS - 1);
            if self.occupied[level] & 1 << slot == 0 {
                continue;
            }
            self.occupied[level] &= !(1 << slot);
            let at = level * SLOTS + slot;
            let mut index = std::mem::replace(&mut self.slots[at], EMPTY).first;
            while let Some(entry) = self.entries.get(index as usize).copied() {
                self.place(index);
                index = entry.next;
            }
        }
    }

    /// Appends an entry to the slot where it belongs now.
    fn place(&mut self, index: u32) {
        let horizon = Self::HORIZON.as_millis() as u64 - 1;
        let entry = &mut self.entries[index as usize];
        entry.next = NONE;
        let tick = entry.tick.clamp(self.tick, self.tick + horizon);
        let level = Self::level(self.tick, tick);
        let slot = (tick >> (SLOT_BITS * level as u32)) as usize & (SLOTS - 1);
        self.occupied[level] |= 1 << slot;
        let list = &mut self.slots[level * SLOTS + slot];
        match std::mem::replace(&mut list.last, index) {
            NONE => list.first = index,
            last => self.entries[last as usize].next = index,
        }
    }

    /// The coarsest level whose current slot does not already contain `tick`.
    fn level(now: u64, tick: u64) -> usize {
        let differs = now ^ tick;
        if differs == 0 {
            return 0;
        }
        let level = (63 - differs.leading_zeros()) / SLOT_BITS;
        (level as usize).min(LEVELS - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        /// Against a sorted map: every timer fires once, never early, at most a tick late.
        #[test]
        fn fires_as_a_sorted_map_would(
            steps in prop::collection::vec((0u64..5_000_000, 0u64..3_000_000, any::<bool>()), 1..120)
        ) {
            let start = Instant::now();
            let (mut wheel, mut model) = (Wheel::new(start), BTreeMap::<u64, u64>::new());
            let (mut now_us, mut key) = (0u64, 0u64);
            for (delay, step, far) in steps {
                key += 1;
                let due = now_us + if far { delay * 1000 } else { delay };
                wheel.insert(start + Duration::from_micros(due), key);
                model.insert(key, due);
                prop_assert!(wheel.next().is_some());
                now_us += if far { step * 100 } else { step };
                let mut fired = Vec::new();
                wheel.advance(start + Duration::from_micros(now_us), |key| fired.push(key));
                for key in fired {
                    let due = model.remove(&key).expect("fired once and known");
                    prop_assert!(due <= now_us, "fired {} us early", due - now_us);
                }
                for due in model.values() {
                    prop_assert!(due + 1_000 > now_us, "{} us late", now_us - due);
                }
                prop_assert_eq!(wheel.len(), model.len());
                if let Some(first) = model.values().min() {
                    let next = wheel.next().expect("not empty");
                    prop_assert!(next <= start + Duration::from_micros(first + 1_000));
                }
            }
        }
    }

    #[test]
    fn beyond_the_horizon_is_kept() {
        let start = Instant::now();
        let mut wheel = Wheel::new(start);
        let at = start + Wheel::HORIZON * 3;
        wheel.insert(at, 7);
        let (mut now, mut fired, mut wakes) = (start, Vec::new(), 0);
        while let Some(next) = wheel.next() {
            now = now.max(next);
            wheel.advance(now, |key| fired.push(key));
            wakes += 1;
            assert!(wakes < 1_000, "the wheel must not spin");
        }
        assert_eq!(fired, [7]);
        assert!(now >= at && now <= at + Duration::from_millis(2));
    }
}
