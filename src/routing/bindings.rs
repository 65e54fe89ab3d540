//! Subscriber bindings: which instance has a subscriber, by each of its names.
//!
//! Two tables of fixed size, no rehash and no timer per entry. *Names* are 24 bytes each: a keyed
//! hash, the holder (an instance and its restart), when it expires, and either how many sessions
//! share it or which session has it alone. *Sessions* are 56 bytes each and tell which names end
//! with them. Buckets of eight slots, two buckets a key, 64 locks each.
//!
//! The first shared name of a session is its *anchor*: taking it is one step under one lock, so of
//! two sessions of one subscriber that begin at once on two workers one finds the other's instance
//! (3GPP calls it one PCRF per IP-CAN session's subscriber; Oracle's DSR early binding).

mod saved;

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::memory::{Advise, filled};
use strowger_contract::{BINDING_KEYS_MAX, BindingKey};

/// Locks of each table. Far more than workers, so that two seldom meet.
const SHARDS: usize = 64;

/// Slots in a bucket.
const BUCKET: usize = 8;

/// Slots for names per session: the usual four (IMSI, MSISDN, IPv4, IPv6).
const NAMES_PER_SESSION: usize = 4;

/// Sessions looked at under one lock while sweeping.
const SWEEP_SLOTS: usize = 1_024;

/// Bytes that one session of four names takes in the two tables.
pub const BYTES_PER_BINDING: usize = size_of::<Session>() + NAMES_PER_SESSION * size_of::<Name>();

#[derive(Clone, Copy, Debug, Default, serde::Serialize, serde::Deserialize)]
struct Name {
    /// 0: empty.
    key: u64,
    /// Of an exclusive name: the session. Of a shared one: how many sessions.
    owner: u64,
    holder: u32,
    expiry: u32,
}

#[derive(Clone, Copy, Debug, Default, serde::Serialize, serde::Deserialize)]
struct Session {
    /// 0: empty.
    key: u64,
    names: [u64; BINDING_KEYS_MAX],
    holder: u32,
    expiry: u32,
}

const _: () = assert!(size_of::<Name>() == 24 && size_of::<Session>() == 56);

trait Slot: Copy + Default {
    fn key(&self) -> u64;
    fn expiry(&self) -> u32;
}

impl Slot for Name {
    fn key(&self) -> u64 {
        self.key
    }

    fn expiry(&self) -> u32 {
        self.expiry
    }
}

impl Slot for Session {
    fn key(&self) -> u64 {
        self.key
    }

    fn expiry(&self) -> u32 {
        self.expiry
    }
}

/// Slots in shards; a key may be in two buckets of its shard.
#[derive(Debug)]
struct Slots<S> {
    shards: Vec<Mutex<Vec<S>>>,
    buckets_per_shard: usize,
}

impl<S: Slot> Slots<S> {
    fn new(slots: usize, advise: Advise) -> Self {
        let slots = slots.max(SHARDS * BUCKET).next_power_of_two();
        let per_shard = slots / SHARDS;
        let shards = (0..SHARDS).map(|_| Mutex::new(filled(per_shard, advise))).collect();
        Self { shards, buckets_per_shard: per_shard / BUCKET }
    }

    fn shard(&self, key: u64) -> MutexGuard<'_, Vec<S>> {
        self.lock((key >> 58) as usize)
    }

    fn lock(&self, index: usize) -> MutexGuard<'_, Vec<S>> {
        self.shards[index % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn places(&self, key: u64) -> impl Iterator<Item = usize> + use<S> {
        let mask = self.buckets_per_shard - 1;
        // The lowest bit of a name tells its kind; it is not random.
        let first = (key >> 1) as usize & mask;
        let mut second = (key >> 29) as usize & mask;
        if second == first {
            second = first ^ (mask & 1);
        }
        let second = (second != first).then_some(second);
        std::iter::once(first)
            .chain(second)
            .flat_map(|bucket| bucket * BUCKET..(bucket + 1) * BUCKET)
    }

    fn find(&self, shard: &[S], key: u64) -> Option<usize> {
        self.places(key).find(|&at| shard[at].key() == key)
    }

    /// Where a new key goes: an empty or expired slot, else the one that expires first.
    fn room(&self, shard: &[S], key: u64, now: u32) -> usize {
        let free = self.places(key).find(|&at| shard[at].key() == 0 || shard[at].expiry() <= now);
        let oldest = || self.places(key).min_by_key(|&at| shard[at].expiry());
        // A key has at least one bucket of places.
        free.or_else(oldest).unwrap_or(0)
    }
}

/// What has been bound.
#[derive(Debug)]
pub struct BindingTable {
    names: Slots<Name>,
    sessions: Slots<Session>,
    swept: AtomicU64,
    live: AtomicU64,
    created: AtomicU64,
    ended: AtomicU64,
    expired: AtomicU64,
    evicted: AtomicU64,
    raced: AtomicU64,
}

/// The totals of a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct BindingTotals {
    /// Sessions that bind now.
    pub live: u64,
    /// Ever bound.
    pub created: u64,
    /// Ended by the protocol.
    pub ended: u64,
    /// Ended by time.
    pub expired: u64,
    /// Pushed out for want of room.
    pub evicted: u64,
    /// Sessions that were led to the instance of a faster one of the same subscriber.
    pub raced: u64,
}

impl BindingTable {
    /// Room for at least `sessions`, at [`BYTES_PER_BINDING`] each; rounded up to a power of two.
    #[must_use]
    pub fn new(sessions: usize, advise: Advise) -> Self {
        Self {
            names: Slots::new(sessions * NAMES_PER_SESSION, advise),
            sessions: Slots::new(sessions, advise),
            swept: AtomicU64::new(0),
            live: AtomicU64::new(0),
            created: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            expired: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
            raced: AtomicU64::new(0),
        }
    }

    /// The holder of a name at second `now`.
    pub fn get(&self, name: BindingKey, now: u32) -> Option<u32> {
        let key = name.to_bits();
        let shard = self.names.shard(key);
        let slot = shard[self.names.find(&shard, key)?];
        (slot.expiry > now).then_some(slot.holder)
    }

    /// Binds a session's names to `holder` until `expiry`; who holds the subscriber now. `is_good`
    /// tells whether an older holder is still one to follow.
    pub fn bind(
        &self,
        session: u64,
        names: &[BindingKey],
        holder: u32,
        (now, expiry): (u32, u32),
        force: bool,
        is_good: impl Fn(u32) -> bool,
    ) -> u32 {
        let session = session.max(1);
        if let Some(old) = self.take_session(session) {
            self.release(session, &old);
        }
        let names = &names[..names.len().min(BINDING_KEYS_MAX)];
        let anchor = names.iter().copied().find(|name| !name.is_exclusive());
        if let Some(anchor) = anchor {
            let bound = self.share(anchor, holder, (now, expiry), force, &is_good);
            if bound != holder {
                self.raced.fetch_add(1, Relaxed);
                return bound;
            }
        }
        for &name in names.iter().filter(|&&name| Some(name) != anchor) {
            if name.is_exclusive() {
                self.own(name, session, holder, (now, expiry));
            } else {
                self.share(name, holder, (now, expiry), true, &is_good);
            }
        }
        let mut slot = Session { key: session, holder, expiry, ..Session::default() };
        for (place, name) in slot.names.iter_mut().zip(names) {
            *place = name.to_bits();
        }
        self.put_session(slot, now);
        holder
    }

    /// One more session shares a name; who holds it.
    fn share(
        &self,
        name: BindingKey,
        holder: u32,
        (now, expiry): (u32, u32),
        force: bool,
        is_good: &impl Fn(u32) -> bool,
    ) -> u32 {
        let key = name.to_bits();
        let mut shard = self.names.shard(key);
        if let Some(at) = self.names.find(&shard, key) {
            let slot = &mut shard[at];
            if slot.expiry > now {
                if slot.holder != holder && !force && is_good(slot.holder) {
                    return slot.holder;
                }
                slot.owner += 1;
            } else {
                slot.owner = 1;
            }
            (slot.holder, slot.expiry) = (holder, expiry);
            return holder;
        }
        let at = self.names.room(&shard, key, now);
        self.note_eviction(shard[at].expiry, shard[at].key, now);
        shard[at] = Name { key, owner: 1, holder, expiry };
        holder
    }

    /// The session has a name alone from now on.
    fn own(&self, name: BindingKey, session: u64, holder: u32, (now, expiry): (u32, u32)) {
        let key = name.to_bits();
        let mut shard = self.names.shard(key);
        let at = self.names.find(&shard, key).unwrap_or_else(|| {
            let at = self.names.room(&shard, key, now);
            self.note_eviction(shard[at].expiry, shard[at].key, now);
            at
        });
        shard[at] = Name { key, owner: session, holder, expiry };
    }

    fn note_eviction(&self, expiry: u32, key: u64, now: u32) {
        if key != 0 && expiry > now {
            self.evicted.fetch_add(1, Relaxed);
        }
    }

    fn put_session(&self, slot: Session, now: u32) {
        let old = {
            let mut shard = self.sessions.shard(slot.key);
            let at = self.sessions.room(&shard, slot.key, now);
            std::mem::replace(&mut shard[at], slot)
        };
        self.created.fetch_add(1, Relaxed);
        self.live.fetch_add(1, Relaxed);
        if old.key != 0 {
            let counter = if old.expiry > now { &self.evicted } else { &self.expired };
            counter.fetch_add(1, Relaxed);
            self.live.fetch_sub(1, Relaxed);
            self.release(old.key, &old);
        }
    }

    fn take_session(&self, session: u64) -> Option<Session> {
        let mut shard = self.sessions.shard(session);
        let at = self.sessions.find(&shard, session)?;
        let old = std::mem::take(&mut shard[at]);
        self.live.fetch_sub(1, Relaxed);
        self.ended.fetch_add(1, Relaxed);
        Some(old)
    }

    /// Lets go of a session's names.
    fn release(&self, session: u64, old: &Session) {
        for name in old.names.iter().filter_map(|&bits| BindingKey::from_bits(bits)) {
            let key = name.to_bits();
            let mut shard = self.names.shard(key);
            let Some(at) = self.names.find(&shard, key) else { continue };
            let slot = &mut shard[at];
            let gone = if name.is_exclusive() {
                slot.owner == session
            } else {
                slot.owner = slot.owner.saturating_sub(1);
                slot.owner == 0
            };
            if gone {
                *slot = Name::default();
            }
        }
    }

    /// The session goes on until `expiry`.
    pub fn keep(&self, session: u64, expiry: u32) {
        let session = session.max(1);
        let names = {
            let mut shard = self.sessions.shard(session);
            let Some(at) = self.sessions.find(&shard, session) else { return };
            shard[at].expiry = expiry;
            shard[at].names
        };
        for name in names.into_iter().filter_map(BindingKey::from_bits) {
            let key = name.to_bits();
            let mut shard = self.names.shard(key);
            if let Some(at) = self.names.find(&shard, key)
                && (!name.is_exclusive() || shard[at].owner == session)
            {
                shard[at].expiry = expiry.max(shard[at].expiry);
            }
        }
    }

    /// The session ended; whether it was there.
    pub fn unbind(&self, session: u64) -> bool {
        let session = session.max(1);
        match self.take_session(session) {
            Some(old) => {
                self.release(session, &old);
                true
            }
            None => false,
        }
    }

    /// Forgets one name, whoever holds it.
    pub fn forget(&self, name: BindingKey) {
        let key = name.to_bits();
        let mut shard = self.names.shard(key);
        if let Some(at) = self.names.find(&shard, key) {
            shard[at] = Name::default();
        }
    }

    /// The parts in which it is swept.
    pub fn chunks(&self) -> usize {
        (self.sessions.buckets_per_shard * BUCKET).div_ceil(SWEEP_SLOTS) * SHARDS
    }

    /// Ends sessions of the next part of the table whose time is over, or whose holder is no good.
    pub fn sweep(&self, now: u32, chunks: usize, is_good: impl Fn(u32) -> bool) {
        let per_shard = self.sessions.buckets_per_shard * BUCKET;
        let chunks_per_shard = self.chunks() / SHARDS;
        for _ in 0..chunks.min(self.chunks()) {
            let turn = self.swept.fetch_add(1, Relaxed) as usize;
            let start = turn % chunks_per_shard * SWEEP_SLOTS;
            let mut over: Vec<Session> = Vec::new();
            {
                let mut shard = self.sessions.lock(turn / chunks_per_shard);
                for slot in &mut shard[start..(start + SWEEP_SLOTS).min(per_shard)] {
                    if slot.key != 0 && (slot.expiry <= now || !is_good(slot.holder)) {
                        over.push(std::mem::take(slot));
                    }
                }
            }
            self.expired.fetch_add(over.len() as u64, Relaxed);
            self.live.fetch_sub(over.len() as u64, Relaxed);
            for old in over {
                self.release(old.key, &old);
            }
        }
    }

    /// The totals since the start.
    pub fn totals(&self) -> BindingTotals {
        BindingTotals {
            live: self.live.load(Relaxed),
            created: self.created.load(Relaxed),
            ended: self.ended.load(Relaxed),
            expired: self.expired.load(Relaxed),
            evicted: self.evicted.load(Relaxed),
            raced: self.raced.load(Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::no_advice;
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;
    use strowger_contract::Keyer;

    fn name(number: u64, exclusive: bool) -> BindingKey {
        BindingKey::new(&Keyer::new([7; 16]), 1, &number.to_le_bytes(), exclusive)
    }

    fn session(number: u64) -> u64 {
        Keyer::new([7; 16]).keyed(0, &number.to_le_bytes())
    }

    #[test]
    fn names_live_as_long_as_one_of_their_sessions() {
        let table = BindingTable::new(1_024, no_advice);
        let (imsi, one, two) = (name(1, false), name(2, true), name(3, true));
        let good = |_: u32| true;
        assert_eq!(table.bind(session(1), &[imsi, one], 10, (0, 100), false, good), 10);
        // A second session of the subscriber is led to the first one's instance, then binds there.
        assert_eq!(table.bind(session(2), &[imsi, two], 11, (0, 100), false, good), 10);
        assert_eq!(table.get(two, 1), None);
        assert_eq!(table.bind(session(2), &[imsi, two], 10, (0, 100), false, good), 10);
        assert!(table.unbind(session(1)));
        assert_eq!((table.get(imsi, 1), table.get(one, 1)), (Some(10), None));
        assert_eq!(table.get(two, 1), Some(10));
        assert!(table.unbind(session(2)) && !table.unbind(session(2)));
        assert_eq!((table.get(imsi, 1), table.get(two, 1)), (None, None));
        assert_eq!(table.totals().live, 0);
    }

    #[test]
    fn an_address_belongs_to_whoever_got_it_last() {
        let table = BindingTable::new(1_024, no_advice);
        let (first, second, address) = (name(1, false), name(2, false), name(3, true));
        table.bind(session(1), &[first, address], 10, (0, 100), false, |_| true);
        table.bind(session(2), &[second, address], 11, (0, 100), false, |_| true);
        assert_eq!(table.get(address, 1), Some(11));
        // The end of the old one's session does not take it away.
        table.unbind(session(1));
        assert_eq!(table.get(address, 1), Some(11));
        table.unbind(session(2));
        assert_eq!(table.get(address, 1), None);
    }

    #[test]
    fn a_holder_that_is_no_good_is_not_followed() {
        let table = BindingTable::new(1_024, no_advice);
        let imsi = name(1, false);
        table.bind(session(1), &[imsi], 10, (0, 100), false, |_| true);
        assert_eq!(table.bind(session(2), &[imsi], 11, (0, 100), false, |it| it != 10), 11);
        assert_eq!(table.get(imsi, 1), Some(11));
        // Fail-over forces.
        assert_eq!(table.bind(session(2), &[imsi], 12, (0, 100), true, |_| true), 12);
        assert_eq!(table.get(imsi, 1), Some(12));
    }

    #[test]
    fn time_ends_what_nobody_ended() {
        let table = BindingTable::new(1_024, no_advice);
        let (imsi, address) = (name(1, false), name(2, true));
        table.bind(session(1), &[imsi, address], 10, (0, 100), false, |_| true);
        table.keep(session(1), 200);
        assert_eq!((table.get(imsi, 150), table.get(address, 150)), (Some(10), Some(10)));
        assert_eq!((table.get(imsi, 200), table.get(address, 200)), (None, None));
        table.sweep(200, usize::MAX, |_| true);
        let totals = table.totals();
        assert_eq!((totals.live, totals.expired), (0, 1));
    }

    #[test]
    fn memory_is_bounded_and_the_newest_stay() {
        let table = BindingTable::new(512, no_advice);
        for number in 0..20_000 {
            let names = [name(number, false), name(number + 1_000_000, true)];
            let expiry = 100 + number as u32;
            table.bind(session(number), &names, 1, (0, expiry), false, |_| true);
        }
        let totals = table.totals();
        assert!(totals.evicted > 0 && totals.live <= 512, "{totals:?}");
        assert_eq!(table.get(name(19_999, false), 1), Some(1));
    }

    #[test]
    fn of_two_workers_at_once_one_wins() {
        let table = BindingTable::new(1 << 14, no_advice);
        let bound: Vec<Vec<u32>> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..2u32)
                .map(|worker| {
                    let table = &table;
                    scope.spawn(move || {
                        (0..5_000u64)
                            .map(|number| {
                                let session = session(number * 2 + u64::from(worker));
                                let names = [name(number, false)];
                                table.bind(session, &names, worker, (0, 100), false, |_| true)
                            })
                            .collect()
                    })
                })
                .collect();
            workers.into_iter().map(|worker| worker.join().expect("it ends")).collect()
        });
        assert_eq!(bound[0], bound[1]);
    }

    proptest! {
        /// Against a model of sessions and their names.
        #[test]
        fn agrees_with_a_model(ops in prop::collection::vec((0u64..12, 0u64..6, 0u64..6, 0u32..3, 0u8..4), 1..200)) {
            let table = BindingTable::new(1 << 12, no_advice);
            let mut sessions: HashMap<u64, (u64, u64)> = HashMap::new();
            let mut imsis: HashMap<u64, u32> = HashMap::new();
            let mut addresses: HashMap<u64, (u64, u32)> = HashMap::new();
            for (number, imsi, address, holder, op) in ops {
                let mut end = |number: u64, imsis: &mut HashMap<u64, u32>, addresses: &mut HashMap<u64, (u64, u32)>| {
                    let Some((imsi, address)) = sessions.remove(&number) else { return };
                    if !sessions.values().any(|(other, _)| *other == imsi) {
                        imsis.remove(&imsi);
                    }
                    if addresses.get(&address).is_some_and(|(owner, _)| *owner == number) {
                        addresses.remove(&address);
                    }
                };
                if op == 0 {
                    end(number, &mut imsis, &mut addresses);
                    table.unbind(session(number));
                } else {
                    end(number, &mut imsis, &mut addresses);
                    let wanted = imsis.get(&imsi).copied().unwrap_or(holder);
                    let names = [name(imsi, false), name(100 + address, true)];
                    let bound = table.bind(session(number), &names, holder, (0, 100), false, |_| true);
                    prop_assert_eq!(bound, wanted);
                    if bound == holder {
                        sessions.insert(number, (imsi, address));
                        imsis.insert(imsi, holder);
                        addresses.insert(address, (number, holder));
                    }
                }
                for imsi in 0..6 {
                    prop_assert_eq!(table.get(name(imsi, false), 1), imsis.get(&imsi).copied());
                }
                for address in 0..6 {
                    prop_assert_eq!(table.get(name(100 + address, true), 1), addresses.get(&address).map(|it| it.1));
                }
            }
            prop_assert_eq!(table.totals().live, sessions.len() as u64);
        }
    }
}
