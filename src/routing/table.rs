//! The session table: where sessions live that carry no token, and how many each backend holds.
//!
//! 16 bytes a slot and nothing else: a keyed 64-bit fingerprint (the key itself is not kept), the
//! backend, when it expires, and the class. Buckets of eight slots, two buckets a key, a fixed
//! number of them: no rehash, no timer, no tree. An entry is only ever evicted by one of its own
//! class, so a flood of registrations cannot push out calls.

mod saved;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::holders::{Holder, Holders};
use super::memory::{Advise, filled};
use strowger_contract::{BackendId, ClassId};

/// Locks. Far more than workers, so that two seldom meet.
const SHARDS: usize = 64;

/// Slots in a bucket: two cache lines.
const BUCKET: usize = 8;

/// Slots looked at under one lock while sweeping: some microseconds.
const SWEEP_SLOTS: usize = 4_096;

/// Expiry is kept in 24 bits of seconds and compared modulo that, so nothing lives longer than
/// half of it (97 days).
const TIME_MASK: u32 = 0x00ff_ffff;
const TTL_MAX: u32 = TIME_MASK / 2 - 1;

/// Classes that are counted apart; further ones share the last place.
pub(super) const CLASSES_COUNTED: usize = 16;

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    /// 0: empty.
    fingerprint: u64,
    /// The backend as it was ([`Holder`]), and [`HELD`].
    backend: u32,
    /// Expiry in the upper 24 bits, class in the lower 8.
    expiry_class: u32,
}

const _: () = assert!(size_of::<Slot>() == 16);

/// The session takes one of its backend's slots. Backend numbers are far below this bit.
const HELD: u32 = 1 << 31;

/// It is only remembered where the source's next flow is to go: it is no session, and is not counted
/// as one of its backend.
const REMEMBERED: u32 = 1 << 30;

impl Slot {
    fn expiry(self) -> u32 {
        self.expiry_class >> 8
    }

    fn class(self) -> u8 {
        self.expiry_class as u8
    }

    fn holder(self) -> Holder {
        Holder::from_bits(self.backend & !(HELD | REMEMBERED))
    }

    fn backend(self) -> BackendId {
        self.holder().backend()
    }

    fn is_held(self) -> bool {
        self.backend & HELD != 0
    }

    fn is_remembered(self) -> bool {
        self.backend & REMEMBERED != 0
    }

    fn is_expired(self, now: u32) -> bool {
        // Modulo 2^24: it is past if it is less than half the circle behind.
        now.wrapping_sub(self.expiry()) & TIME_MASK <= TIME_MASK / 2
    }
}

/// What became of a session that was to be noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Learned {
    /// It is new.
    Created,
    /// It was there.
    Refreshed,
    /// It was on another backend.
    Moved,
    /// It is new and pushed out the one of its class that would have expired first.
    Evicted,
    /// There is no room that its class may take.
    Refused,
}

/// The table.
#[derive(Debug)]
pub struct SessionTable {
    shards: Vec<Mutex<Shard>>,
    buckets_per_shard: usize,
    counts: SessionCounts,
    holders: Holders,
    held: SessionCounts,
    /// Slots that were held, since the start, modulo 2^32.
    released: SessionCounts,
    swept: AtomicU64,
    classes: [AtomicU64; CLASSES_COUNTED],
    created: AtomicU64,
    ended: AtomicU64,
    expired: AtomicU64,
    evicted: AtomicU64,
    refused: AtomicU64,
}

#[derive(Debug)]
struct Shard {
    slots: Vec<Slot>,
}

impl SessionTable {
    /// Room for at least `sessions` slots, at 16 bytes each; rounded up to a power of two.
    #[must_use]
    pub fn new(sessions: usize, advise: Advise) -> Self {
        let slots = sessions.max(SHARDS * BUCKET).next_power_of_two();
        let per_shard = slots / SHARDS;
        Self {
            shards: (0..SHARDS)
                .map(|_| Mutex::new(Shard { slots: filled(per_shard, advise) }))
                .collect(),
            buckets_per_shard: per_shard / BUCKET,
            counts: SessionCounts::default(),
            holders: Holders::default(),
            held: SessionCounts::default(),
            released: SessionCounts::default(),
            swept: AtomicU64::new(0),
            classes: Default::default(),
            created: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            expired: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }
    }

    /// Where a session lives, at second `now`.
    pub fn get(&self, key: u64, now: u32) -> Option<(BackendId, ClassId)> {
        let slot = self.live(key, now)?;
        Some((slot.backend(), ClassId(slot.class())))
    }

    fn live(&self, key: u64, now: u32) -> Option<Slot> {
        let fingerprint = key.max(1);
        let shard = self.shard(fingerprint);
        let slot = self
            .places(fingerprint)
            .map(|at| shard.slots[at])
            .find(|slot| slot.fingerprint == fingerprint)?;
        let live = !slot.is_expired(now) && self.holders.is_current(slot.holder());
        live.then_some(slot)
    }

    /// As [`SessionTable::get`], with whether it is only remembered.
    pub(super) fn entry(&self, key: u64, now: u32) -> Option<(BackendId, bool)> {
        let slot = self.live(key, now)?;
        Some((slot.backend(), slot.is_remembered()))
    }

    /// Whether a session lived on a backend that lost its sessions since.
    pub fn is_lost(&self, key: u64, now: u32) -> bool {
        let fingerprint = key.max(1);
        let shard = self.shard(fingerprint);
        let mut places = self.places(fingerprint).map(|at| shard.slots[at]);
        let slot = places.find(|slot| slot.fingerprint == fingerprint);
        slot.is_some_and(|slot| !slot.is_expired(now) && !self.holders.is_current(slot.holder()))
    }

    /// Which backends there are, and how often each has lost its sessions.
    pub(super) fn holders(&self) -> &Holders {
        &self.holders
    }

    /// Notes that a session lives on `backend` for `ttl` seconds from `now`.
    pub fn insert(
        &self,
        key: u64,
        backend: BackendId,
        class: ClassId,
        now: u32,
        ttl: u32,
    ) -> Learned {
        self.enter_for(key, self.holders.current(backend).to_bits(), class, now, ttl)
    }

    /// Notes that the next flow of a source is to go to `backend`. What is a session there already
    /// stays one.
    pub fn remember(
        &self,
        key: u64,
        backend: BackendId,
        class: ClassId,
        now: u32,
        ttl: u32,
    ) -> Learned {
        self.enter_for(key, self.holders.current(backend).to_bits() | REMEMBERED, class, now, ttl)
    }

    /// As [`SessionTable::insert`], for a session that takes a slot of the backend.
    pub fn hold(
        &self,
        key: u64,
        backend: BackendId,
        class: ClassId,
        now: u32,
        ttl: u32,
    ) -> Learned {
        self.enter_for(key, self.holders.current(backend).to_bits() | HELD, class, now, ttl)
    }

    fn enter_for(&self, key: u64, backend: u32, class: ClassId, now: u32, ttl: u32) -> Learned {
        let fingerprint = key.max(1);
        let expiry = now.wrapping_add(ttl.clamp(1, TTL_MAX)) & TIME_MASK;
        let new = Slot { fingerprint, backend, expiry_class: expiry << 8 | u32::from(class.0) };
        let mut shard = self.shard(fingerprint);
        let found = self.places(fingerprint).find(|&at| shard.slots[at].fingerprint == fingerprint);
        if let Some(at) = found {
            return self.replace(&mut shard.slots[at], new, now);
        }
        let free = self.places(fingerprint).find(|&at| {
            let slot = shard.slots[at];
            slot.fingerprint == 0 || slot.is_expired(now)
        });
        if let Some(at) = free {
            let old = std::mem::replace(&mut shard.slots[at], new);
            if old.fingerprint != 0 {
                self.expired.fetch_add(1, Relaxed);
                self.leave(old);
            }
            self.enter(new);
            return Learned::Created;
        }
        let same_class = self.places(fingerprint).filter(|&at| shard.slots[at].class() == class.0);
        let oldest =
            same_class.min_by_key(|&at| shard.slots[at].expiry().wrapping_sub(now) & TIME_MASK);
        let Some(at) = oldest else {
            self.refused.fetch_add(1, Relaxed);
            return Learned::Refused;
        };
        let old = std::mem::replace(&mut shard.slots[at], new);
        self.evicted.fetch_add(1, Relaxed);
        self.leave(old);
        self.enter(new);
        Learned::Evicted
    }

    fn replace(&self, slot: &mut Slot, mut new: Slot, now: u32) -> Learned {
        if slot.backend() == new.backend() && !slot.is_expired(now) {
            // What is held stays so until it ends.
            new.backend |= slot.backend & HELD;
            if !slot.is_remembered() {
                new.backend &= !REMEMBERED;
            }
        }
        let old = std::mem::replace(slot, new);
        if old.is_expired(now) {
            self.expired.fetch_add(1, Relaxed);
            self.leave(old);
            self.enter(new);
            return Learned::Created;
        }
        if old.class() != new.class() {
            self.class_count(old.class()).fetch_sub(1, Relaxed);
            self.class_count(new.class()).fetch_add(1, Relaxed);
        }
        if old.is_held() {
            self.held.remove(old.backend());
            if !new.is_held() || new.backend() != old.backend() {
                self.released.add(old.backend());
            }
        }
        if new.is_held() {
            self.held.add(new.backend());
        }
        let is_same = old.backend() == new.backend();
        if is_same && old.is_remembered() == new.is_remembered() {
            return Learned::Refreshed;
        }
        self.uncount(old);
        self.count(new);
        if is_same { Learned::Refreshed } else { Learned::Moved }
    }

    /// Ends a session; whether it was there.
    pub fn remove(&self, key: u64, now: u32) -> bool {
        let fingerprint = key.max(1);
        let mut shard = self.shard(fingerprint);
        let found = self.places(fingerprint).find(|&at| shard.slots[at].fingerprint == fingerprint);
        let Some(at) = found else { return false };
        let old = std::mem::take(&mut shard.slots[at]);
        let expired = old.is_expired(now);
        if expired { &self.expired } else { &self.ended }.fetch_add(1, Relaxed);
        self.leave(old);
        !expired
    }

    /// The parts in which it is swept.
    pub fn chunks(&self) -> usize {
        (self.buckets_per_shard * BUCKET).div_ceil(SWEEP_SLOTS) * SHARDS
    }

    /// Clears what has expired in the next part of the table, `chunks` times 4,096 slots.
    pub fn sweep(&self, now: u32, chunks: usize) {
        let per_shard = self.buckets_per_shard * BUCKET;
        let chunks_per_shard = self.chunks() / SHARDS;
        for _ in 0..chunks.min(self.chunks()) {
            let turn = self.swept.fetch_add(1, Relaxed) as usize;
            let shard = turn / chunks_per_shard % SHARDS;
            let start = turn % chunks_per_shard * SWEEP_SLOTS;
            let mut shard = self.lock(shard);
            for slot in shard.slots[start..(start + SWEEP_SLOTS).min(per_shard)].iter_mut() {
                if slot.fingerprint != 0
                    && (slot.is_expired(now) || !self.holders.is_current(slot.holder()))
                {
                    self.expired.fetch_add(1, Relaxed);
                    self.leave(std::mem::take(slot));
                }
            }
        }
    }

    /// How many sessions a backend holds.
    pub fn sessions_of(&self, backend: BackendId) -> u64 {
        self.counts.get(backend)
    }

    /// How many sessions hold a slot of a backend.
    pub fn held_by(&self, backend: BackendId) -> u64 {
        self.held.get(backend)
    }

    /// How many of a backend's slots sessions have given back since the start, modulo 2^32.
    pub fn released_by(&self, backend: BackendId) -> u32 {
        self.released.get(backend) as u32
    }

    /// How many slots there are.
    pub fn capacity(&self) -> usize {
        self.buckets_per_shard * BUCKET * SHARDS
    }

    /// The totals since the start.
    pub fn totals(&self) -> TableTotals {
        let classes = std::array::from_fn(|index| self.classes[index].load(Relaxed));
        TableTotals {
            live: classes.iter().sum(),
            classes,
            created: self.created.load(Relaxed),
            ended: self.ended.load(Relaxed),
            expired: self.expired.load(Relaxed),
            evicted: self.evicted.load(Relaxed),
            refused: self.refused.load(Relaxed),
        }
    }

    fn enter(&self, slot: Slot) {
        self.created.fetch_add(1, Relaxed);
        self.class_count(slot.class()).fetch_add(1, Relaxed);
        self.count(slot);
        if slot.is_held() {
            self.held.add(slot.backend());
        }
    }

    fn leave(&self, slot: Slot) {
        self.class_count(slot.class()).fetch_sub(1, Relaxed);
        self.uncount(slot);
        if slot.is_held() {
            self.held.remove(slot.backend());
            self.released.add(slot.backend());
        }
    }

    fn count(&self, slot: Slot) {
        if !slot.is_remembered() {
            self.counts.add(slot.backend());
        }
    }

    fn uncount(&self, slot: Slot) {
        if !slot.is_remembered() {
            self.counts.remove(slot.backend());
        }
    }

    fn class_count(&self, class: u8) -> &AtomicU64 {
        &self.classes[usize::from(class).min(CLASSES_COUNTED - 1)]
    }

    fn shard(&self, fingerprint: u64) -> MutexGuard<'_, Shard> {
        self.lock((fingerprint >> 58) as usize)
    }

    fn lock(&self, index: usize) -> MutexGuard<'_, Shard> {
        self.shards[index % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The slots that a fingerprint may be in: two buckets of its shard.
    fn places(&self, fingerprint: u64) -> impl Iterator<Item = usize> + use<> {
        let mask = self.buckets_per_shard - 1;
        let first = fingerprint as usize & mask;
        let mut second = (fingerprint >> 29) as usize & mask;
        if second == first {
            second = first ^ (mask & 1);
        }
        let second = (second != first).then_some(second);
        std::iter::once(first)
            .chain(second)
            .flat_map(|bucket| bucket * BUCKET..(bucket + 1) * BUCKET)
    }
}

/// The totals of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableTotals {
    /// Sessions now.
    pub live: u64,
    /// Sessions now, by class.
    pub classes: [u64; CLASSES_COUNTED],
    /// Ever noted.
    pub created: u64,
    /// Ended by the protocol.
    pub ended: u64,
    /// Ended by time.
    pub expired: u64,
    /// Pushed out by one of their class.
    pub evicted: u64,
    /// Not noted for want of room.
    pub refused: u64,
}

/// Sessions by backend: an array over all backend numbers ever given, in blocks, without a lock.
#[derive(Debug)]
struct SessionCounts {
    blocks: Vec<OnceLock<Box<[AtomicU32]>>>,
}

const BLOCK: usize = 1_024;

/// Backend numbers that are counted: 16 million registrations in a process's life.
const BLOCKS: usize = 16_384;

impl Default for SessionCounts {
    fn default() -> Self {
        Self { blocks: (0..BLOCKS).map(|_| OnceLock::new()).collect() }
    }
}

impl SessionCounts {
    fn at(&self, backend: BackendId) -> Option<&AtomicU32> {
        let block = self.blocks.get(backend.0 as usize / BLOCK)?;
        let block = block.get_or_init(|| (0..BLOCK).map(|_| AtomicU32::new(0)).collect());
        block.get(backend.0 as usize % BLOCK)
    }

    fn add(&self, backend: BackendId) {
        if let Some(count) = self.at(backend) {
            count.fetch_add(1, Relaxed);
        }
    }

    fn remove(&self, backend: BackendId) {
        if let Some(count) = self.at(backend) {
            count.fetch_sub(1, Relaxed);
        }
    }

    fn get(&self, backend: BackendId) -> u64 {
        self.at(backend).map_or(0, |count| u64::from(count.load(Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::no_advice;
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn spread(key: u64) -> u64 {
        key.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    proptest! {
        /// Against a map: while nothing must be evicted, both say the same, and each backend's
        /// count is the number of its live entries.
        #[test]
        fn agrees_with_a_map(ops in prop::collection::vec((0u64..200, 0u32..5, 0u8..4, 1u32..50, 0u32..10), 1..400)) {
            let table = SessionTable::new(1 << 14, no_advice);
            let mut model: HashMap<u64, (u32, bool, u32)> = HashMap::new();
            let mut now = 1_000;
            for (key, backend, op, ttl, step) in ops {
                now += step;
                let key = spread(key);
                model.retain(|_, (_, _, until)| *until > now);
                match op {
                    0 | 3 => {
                        let learned = if op == 3 {
                            table.hold(key, BackendId(backend), ClassId(op), now, ttl)
                        } else {
                            table.insert(key, BackendId(backend), ClassId(op), now, ttl)
                        };
                        let before = model.get(&key).copied();
                        let held = op == 3 || before.is_some_and(|(old, held, _)| held && old == backend);
                        let expected = match model.insert(key, (backend, held, now + ttl)) {
                            None => Learned::Created,
                            Some((old, ..)) if old == backend => Learned::Refreshed,
                            Some(_) => Learned::Moved,
                        };
                        prop_assert_eq!(learned, expected);
                    }
                    1 => prop_assert_eq!(table.remove(key, now), model.remove(&key).is_some()),
                    _ => prop_assert_eq!(table.get(key, now).map(|(backend, _)| backend.0), model.get(&key).map(|entry| entry.0)),
                }
                table.sweep(now, 1_000);
                for backend in 0..5 {
                    let expected = model.values().filter(|entry| entry.0 == backend).count() as u64;
                    prop_assert_eq!(table.sessions_of(BackendId(backend)), expected);
                    let held = model.values().filter(|entry| entry.0 == backend && entry.1).count() as u64;
                    prop_assert_eq!(table.held_by(BackendId(backend)), held);
                }
                let totals = table.totals();
                prop_assert_eq!(totals.live, model.len() as u64);
                prop_assert_eq!(totals.created, totals.live + totals.ended + totals.expired + totals.evicted);
            }
        }
    }

    #[test]
    fn a_flood_of_one_class_leaves_the_others() {
        let table = SessionTable::new(1 << 12, no_advice);
        let calls = table.capacity() as u64 / 4;
        for key in 0..calls {
            assert_ne!(
                table.insert(spread(key), BackendId(1), ClassId::SETUP, 10, 3_600),
                Learned::Refused
            );
        }
        let before = table.totals();
        for key in 0..100_000 {
            table.insert(spread(1_000_000 + key), BackendId(2), ClassId::MOBILITY, 10, 3_600);
        }
        let after = table.totals();
        assert_eq!(
            after.classes[usize::from(ClassId::SETUP.0)],
            before.classes[usize::from(ClassId::SETUP.0)]
        );
        assert!(after.evicted > 0 && after.live <= table.capacity() as u64);
        let kept = (0..calls).filter(|&key| table.get(spread(key), 11).is_some()).count() as u64;
        assert_eq!(kept, before.classes[usize::from(ClassId::SETUP.0)]);
    }

    #[test]
    fn what_is_remembered_is_found_and_is_no_session() {
        let table = SessionTable::new(1_024, no_advice);
        let (one, two, class) = (BackendId(1), BackendId(2), ClassId::SETUP);
        table.remember(7, one, class, 0, 60);
        assert_eq!((table.entry(7, 1), table.sessions_of(one)), (Some((one, true)), 0));
        table.insert(7, one, class, 1, 60);
        assert_eq!((table.entry(7, 1), table.sessions_of(one)), (Some((one, false)), 1));
        table.remember(7, one, class, 2, 60);
        assert_eq!((table.entry(7, 2), table.sessions_of(one)), (Some((one, false)), 1));
        table.remember(7, two, class, 2, 60);
        assert_eq!((table.entry(7, 2), table.sessions_of(one)), (Some((two, true)), 0));
        assert_eq!((table.sessions_of(two), table.totals().live), (0, 1));
        assert!(table.remove(7, 3));
        assert_eq!((table.sessions_of(two), table.totals().live), (0, 0));
    }

    #[test]
    fn a_restart_loses_a_backends_sessions_and_no_others() {
        let table = SessionTable::new(1 << 10, no_advice);
        let (one, two) = (BackendId(1), BackendId(2));
        table.insert(77, one, ClassId::SETUP, 10, 100);
        table.insert(78, two, ClassId::SETUP, 10, 100);
        table.holders().restart(one);
        assert_eq!((table.get(77, 11), table.is_lost(77, 11)), (None, true));
        assert!(table.get(78, 11).is_some() && !table.is_lost(78, 11));
        table.sweep(11, usize::MAX);
        assert_eq!((table.sessions_of(one), table.sessions_of(two)), (0, 1));
        table.insert(77, one, ClassId::SETUP, 11, 100);
        assert!(table.get(77, 12).is_some() && !table.is_lost(77, 12));
        assert_eq!(table.sessions_of(one), 1);
    }

    #[test]
    fn time_may_wrap() {
        let table = SessionTable::new(1 << 10, no_advice);
        let late = TIME_MASK - 5;
        table.insert(77, BackendId(1), ClassId::SETUP, late, 10);
        assert!(table.get(77, late + 9).is_some());
        assert!(table.get(77, (late + 9) & TIME_MASK).is_some());
        assert!(table.get(77, (late + 10) & TIME_MASK).is_none());
    }
}
