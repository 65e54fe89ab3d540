//! Requests under way, by the Hop-by-Hop identifier that we gave them.
//!
//! The identifier is 6 bits of worker, 8 of generation, 18 of slot: the answer says by itself which
//! worker waits for it, and one that comes late finds another generation.

use std::rc::Rc;
use std::time::Instant;

use strowger_contract::handover::Broken;
use strowger_contract::{BackendId, ClassId, Endpoint, PoolId, SessionKey, WorkerId};

use crate::mediation::Mediation;

/// Slots of one worker.
pub(crate) const SLOTS_MAX: u32 = 1 << 18;

/// How many backends one request may be tried at.
pub(crate) const TRIES_MAX: usize = 4;

/// Buffers that are kept for reuse, and the largest that is.
const BUFFERS_KEPT: usize = 4_096;
const BUFFER_KEPT_BYTES: usize = 8 << 10;

/// Freed slots that rest before the oldest is used again: late answers find nothing.
const SLOTS_RESTING: usize = 1_024;

/// A request under way.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct Pending {
    /// Who asked, and its own identifier.
    pub(crate) origin: Endpoint,
    /// The backend that asked, if one has: it does not get its request back.
    pub(crate) sender: Option<BackendId>,
    pub(crate) hop_by_hop: u32,
    pub(crate) end_to_end: u32,
    /// Who was asked.
    pub(crate) to: Endpoint,
    /// The backend that the router awaits an outcome of.
    pub(crate) backend: Option<BackendId>,
    pub(crate) pool: Option<PoolId>,
    /// What its route does to messages, also if the configuration changes meanwhile.
    #[serde(skip)]
    pub(crate) rules: Option<Rc<Mediation>>,
    /// The session, if it is to be remembered.
    pub(crate) session: Option<SessionKey>,
    /// What it is placed by.
    pub(crate) place: SessionKey,
    pub(crate) ends_session: bool,
    pub(crate) in_session: bool,
    /// The client named its server: nobody else will do.
    pub(crate) fixed: bool,
    /// Its session binds its subscriber.
    pub(crate) binds: bool,
    /// It was led by its subscriber's binding.
    pub(crate) follows: bool,
    /// An earlier copy may have been processed: T goes with it (RFC 6733 3).
    pub(crate) resent: bool,
    /// Connections to its backend that it was lost with, a bit each.
    pub(crate) lanes_lost: u32,
    /// How often it was redirected.
    pub(crate) redirects: u8,
    pub(crate) application: u32,
    pub(crate) command: u32,
    pub(crate) class: ClassId,
    #[serde(with = "strowger_contract::handover::moment")]
    pub(crate) arrived: Instant,
    #[serde(with = "strowger_contract::handover::moment")]
    pub(crate) deadline: Instant,
    #[serde(with = "strowger_contract::handover::moment")]
    pub(crate) expires: Instant,
    #[serde(with = "strowger_contract::handover::moment")]
    pub(crate) sent: Instant,
    pub(crate) tried: [BackendId; TRIES_MAX],
    pub(crate) tries: u8,
    /// When another server is asked as well.
    #[serde(with = "strowger_contract::handover::moment_or_none")]
    pub(crate) hedge_at: Option<Instant>,
    /// The other copy of it that is under way.
    pub(crate) twin: Option<u32>,
    /// The other copy was answered: nobody waits for this one.
    pub(crate) lost: bool,
    /// The request as it came, for another try.
    pub(crate) request: Vec<u8>,
}

/// All requests under way on one worker.
#[derive(Debug)]
pub(crate) struct Pendings {
    worker: WorkerId,
    slots: Vec<(u8, Option<Pending>)>,
    free: std::collections::VecDeque<u32>,
    buffers: Vec<Vec<u8>>,
    len: usize,
}

impl Pending {
    /// A second copy of what is under way as `twin`.
    pub(crate) fn copy(&self, twin: u32) -> Self {
        Self {
            rules: self.rules.clone(),
            backend: None,
            resent: true,
            lanes_lost: 0,
            twin: Some(twin),
            hedge_at: None,
            request: self.request.clone(),
            ..*self
        }
    }
}

impl Pendings {
    pub(crate) fn new(worker: WorkerId) -> Self {
        Self {
            worker,
            slots: Vec::new(),
            free: std::collections::VecDeque::new(),
            buffers: Vec::new(),
            len: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Which worker gave an identifier.
    pub(crate) fn worker_of(identifier: u32) -> WorkerId {
        WorkerId((identifier >> 26) as u8)
    }

    fn identifier(&self, generation: u8, slot: u32) -> u32 {
        u32::from(self.worker.0) << 26 | u32::from(generation) << 18 | slot
    }

    /// A buffer with a copy of `bytes`.
    pub(crate) fn buffer(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut buffer = self.buffers.pop().unwrap_or_default();
        buffer.extend_from_slice(bytes);
        buffer
    }

    /// Takes a request in; its identifier. `None` if `limit` are under way.
    pub(crate) fn insert(&mut self, pending: Pending, limit: u32) -> Result<u32, Box<Pending>> {
        if self.len >= limit.min(SLOTS_MAX) as usize {
            return Err(Box::new(pending));
        }
        // The slot that was freed longest ago: its old answers have had the longest time to come.
        let reuse = self.free.len() > SLOTS_RESTING || self.slots.len() >= SLOTS_MAX as usize;
        let slot = if reuse { self.free.pop_front() } else { None };
        let slot = slot.unwrap_or_else(|| {
            self.slots.push((0, None));
            (self.slots.len() - 1) as u32
        });
        let entry = &mut self.slots[slot as usize];
        entry.0 = entry.0.wrapping_add(1);
        entry.1 = Some(pending);
        self.len += 1;
        let generation = entry.0;
        Ok(self.identifier(generation, slot))
    }

    fn slot(&self, identifier: u32) -> Option<usize> {
        let slot = (identifier & (SLOTS_MAX - 1)) as usize;
        let entry = self.slots.get(slot)?;
        let same = identifier == self.identifier(entry.0, slot as u32) && entry.1.is_some();
        same.then_some(slot)
    }

    pub(crate) fn get(&mut self, identifier: u32) -> Option<&mut Pending> {
        let slot = self.slot(identifier)?;
        self.slots[slot].1.as_mut()
    }

    /// Takes a request out.
    pub(crate) fn remove(&mut self, identifier: u32) -> Option<Pending> {
        let slot = self.slot(identifier)?;
        let pending = self.slots[slot].1.take()?;
        self.free.push_back(slot as u32);
        self.len -= 1;
        Some(pending)
    }

    /// Gives a request's buffer back.
    pub(crate) fn recycle(&mut self, mut buffer: Vec<u8>) {
        if buffer.capacity() <= BUFFER_KEPT_BYTES && self.buffers.len() < BUFFERS_KEPT {
            buffer.clear();
            self.buffers.push(buffer);
        }
    }

    /// All of them with their identifiers, for another process.
    pub(crate) fn all(&self) -> Vec<(u32, &Pending)> {
        let slots = self.slots.iter().zip(0u32..);
        slots
            .filter_map(|((generation, pending), slot)| {
                Some((self.identifier(*generation, slot), pending.as_ref()?))
            })
            .collect()
    }

    /// How often each slot was used, for another process: what comes late finds nothing there either.
    pub(crate) fn generations(&self) -> Vec<u8> {
        self.slots.iter().map(|(generation, _)| *generation).collect()
    }

    /// Takes those of another process over, each under its own identifier, and all `generations`.
    pub(crate) fn take_over(
        &mut self,
        all: Vec<(u32, Pending)>,
        generations: &[u8],
    ) -> Result<(), Broken> {
        if generations.len() > SLOTS_MAX as usize {
            return Err(Broken);
        }
        self.slots = generations.iter().map(|&generation| (generation, None)).collect();
        for (identifier, pending) in all {
            let slot = (identifier & (SLOTS_MAX - 1)) as usize;
            let generation = (identifier >> 18) as u8;
            let mine = identifier == self.identifier(generation, slot as u32);
            let entry = self.slots.get_mut(slot).filter(|entry| mine && entry.0 == generation);
            entry.ok_or(Broken)?.1 = Some(pending);
        }
        self.len = self.slots.iter().filter(|(_, pending)| pending.is_some()).count();
        let free = self.slots.iter().enumerate().filter(|(_, (_, pending))| pending.is_none());
        self.free = free.map(|(slot, _)| slot as u32).collect();
        Ok(())
    }

    /// Looks at each.
    pub(crate) fn each(&self, look: impl FnMut(&Pending)) {
        self.slots.iter().filter_map(|(_, pending)| pending.as_ref()).for_each(look);
    }

    /// The identifiers of those for whom `wanted` holds.
    pub(crate) fn find(&self, wanted: impl Fn(&Pending) -> bool) -> Vec<u32> {
        let each = |(slot, entry): (usize, &(u8, Option<Pending>))| {
            let pending = entry.1.as_ref()?;
            wanted(pending).then(|| self.identifier(entry.0, slot as u32))
        };
        self.slots.iter().enumerate().filter_map(each).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending() -> Pending {
        let now = Instant::now();
        let from = Endpoint::Backend(BackendId(1));
        Pending {
            origin: from,
            sender: None,
            hop_by_hop: 1,
            end_to_end: 1,
            to: from,
            backend: None,
            pool: None,
            rules: None,
            session: None,
            place: strowger_contract::Keyer::new([1; 16]).session(5, b"s"),
            ends_session: false,
            in_session: false,
            fixed: false,
            binds: false,
            follows: false,
            resent: false,
            lanes_lost: 0,
            redirects: 0,
            application: 4,
            command: 272,
            class: ClassId::CONTROL,
            arrived: now,
            deadline: now,
            expires: now,
            sent: now,
            tried: [BackendId(0); TRIES_MAX],
            tries: 0,
            hedge_at: None,
            twin: None,
            lost: false,
            request: Vec::new(),
        }
    }

    #[test]
    fn an_identifier_that_was_used_in_another_process_is_not_given_again() {
        let (mut old, mut new) = (Pendings::new(WorkerId(2)), Pendings::new(WorkerId(2)));
        let mut given = Vec::new();
        for _ in 0..10 {
            given.push(old.insert(pending(), 100).expect("there is room"));
        }
        for identifier in &given[..9] {
            assert!(old.remove(*identifier).is_some());
        }
        let all = vec![(given[9], old.remove(given[9]).expect("it is there"))];
        let mut wrong = Pendings::new(WorkerId(2));
        assert_eq!(wrong.take_over(vec![(given[9], pending())], &[0; 4]), Err(Broken));
        assert_eq!(new.take_over(all, &old.generations()), Ok(()));
        assert_eq!(new.len(), 1);
        assert!(new.get(given[9]).is_some() && new.get(given[0]).is_none());
        let mut again = Vec::new();
        for _ in 0..2_000 {
            let identifier = new.insert(pending(), 10_000).expect("there is room");
            assert!(new.remove(identifier).is_some());
            again.push(identifier);
        }
        assert!(given.iter().all(|identifier| !again.contains(identifier)));
        assert_eq!(
            again.iter().filter(|it| given[0] & (SLOTS_MAX - 1) == **it & (SLOTS_MAX - 1)).count(),
            1
        );
    }
}
