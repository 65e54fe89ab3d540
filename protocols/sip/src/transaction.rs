//! What is under way: one entry serves both sides of a request (RFC 3261 17, 16.2).

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use slab::Slab;
use strowger_contract::{BackendId, ClassId, Endpoint, PoolId, SessionKey, Transport};

/// How many instances one request may be tried at.
pub(crate) const TRIES_MAX: usize = 4;

/// Buffers that are kept for reuse, and the largest that is: 2,048 x 2 kB at rest.
const BUFFERS_KEPT: usize = 2_048;
const BUFFER_KEPT_BYTES: usize = 16 << 10;

/// Where a transaction stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// No final answer yet.
    Open,
    /// INVITE: a 2xx was passed on (RFC 6026); further ones pass as well.
    Accepted,
    /// A final answer was passed on, or made here; it is repeated when asked for.
    Completed,
    /// INVITE: the client acknowledged the final answer.
    Confirmed,
}

/// Whether the client has cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cancel {
    No,
    /// It has, but the instance has not yet said anything, so it cannot be told (9.1).
    Wanted,
    Sent,
}

/// The request at one instance.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leg {
    pub(crate) backend: Option<BackendId>,
    pub(crate) to: Endpoint,
    pub(crate) sent_at: Instant,
    /// The router awaits an outcome.
    pub(crate) owed: bool,
    /// It gave a sign of life.
    pub(crate) provisional: bool,
}

/// A transaction.
pub(crate) struct Transaction {
    pub(crate) generation: u32,
    pub(crate) key: u64,
    pub(crate) invite: bool,
    pub(crate) bye: bool,
    pub(crate) state: State,
    pub(crate) cancel: Cancel,
    /// Where answers go, and whether repeating them is the transport's business.
    pub(crate) client: Endpoint,
    pub(crate) client_reliable: bool,
    pub(crate) transport: Transport,
    pub(crate) source: SocketAddr,
    pub(crate) local: SocketAddr,
    pub(crate) class: ClassId,
    pub(crate) arrived: Instant,
    pub(crate) deadline: Instant,
    pub(crate) session: SessionKey,
    pub(crate) call_id: u64,
    pub(crate) pool: Option<PoolId>,
    pub(crate) creates_dialog: bool,
    pub(crate) attempt: u8,
    pub(crate) tried: [BackendId; TRIES_MAX],
    pub(crate) tries: u8,
    pub(crate) leg: Option<Leg>,
    /// From arrival to the first sign of life passed on.
    pub(crate) first_answer: Option<Duration>,
    pub(crate) noted: bool,
    /// The request as it came, as it was last sent on, and the last answer.
    pub(crate) request: Vec<u8>,
    pub(crate) sent: Vec<u8>,
    pub(crate) reply: Vec<u8>,
    /// Timers A, E (towards the instance) or G (towards the client).
    pub(crate) repeat_at: Option<Instant>,
    pub(crate) repeat_after: Duration,
    /// The instance must have given a sign of life by then.
    pub(crate) failover_at: Option<Instant>,
    /// Timers B, F, C.
    pub(crate) expires_at: Option<Instant>,
    /// Timers D, H, I, J, K, L, M: the end.
    pub(crate) ends_at: Option<Instant>,
    /// When the wheel will look at it.
    pub(crate) wakes_at: Option<Instant>,
}

impl Transaction {
    /// When something is next due.
    pub(crate) fn next_wake(&self) -> Option<Instant> {
        [self.repeat_at, self.failover_at, self.expires_at, self.ends_at]
            .into_iter()
            .flatten()
            .min()
    }

    /// Whether our CANCEL is out and the instance has not yet ended the INVITE.
    pub(crate) fn is_cancelling(&self) -> bool {
        self.invite
            && self.cancel == Cancel::Sent
            && matches!(self.state, State::Open | State::Accepted)
    }

    /// Notes another try.
    pub(crate) fn note_try(&mut self, backend: BackendId) {
        if let Some(place) = self.tried.get_mut(usize::from(self.tries)) {
            *place = backend;
            self.tries += 1;
        }
    }
}

/// Keys are hashes with a secret key already.
#[derive(Default)]
pub(crate) struct Plain(u64);

impl Hasher for Plain {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = number;
    }
}

/// All transactions of one engine.
#[derive(Default)]
pub(crate) struct Transactions {
    slab: Slab<Transaction>,
    keys: HashMap<u64, u32, BuildHasherDefault<Plain>>,
    buffers: Vec<Vec<u8>>,
    generation: u32,
}

impl Transactions {
    pub(crate) fn len(&self) -> usize {
        self.slab.len()
    }

    /// A buffer with a copy of `bytes`.
    pub(crate) fn buffer(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut buffer = self.buffers.pop().unwrap_or_default();
        buffer.extend_from_slice(bytes);
        buffer
    }

    fn give_back(&mut self, mut buffer: Vec<u8>) {
        if buffer.capacity() > 0
            && buffer.capacity() <= BUFFER_KEPT_BYTES
            && self.buffers.len() < BUFFERS_KEPT
        {
            buffer.clear();
            self.buffers.push(buffer);
        }
    }

    /// A number for a new transaction.
    pub(crate) fn next_generation(&mut self) -> u32 {
        self.generation = self.generation.wrapping_add(1);
        self.generation
    }

    /// Seeds the numbers, so that a restarted engine does not take its predecessor's.
    pub(crate) fn seed(&mut self, seed: u64) {
        self.generation = (seed >> 16) as u32;
    }

    pub(crate) fn insert(&mut self, transaction: Transaction) -> u32 {
        let key = transaction.key;
        let slot = self.slab.insert(transaction) as u32;
        self.keys.insert(key, slot);
        slot
    }

    pub(crate) fn by_key(&self, key: u64) -> Option<u32> {
        self.keys.get(&key).copied()
    }

    pub(crate) fn get(&mut self, slot: u32) -> Option<&mut Transaction> {
        self.slab.get_mut(slot as usize)
    }

    /// The transaction of that slot and generation.
    pub(crate) fn current(&mut self, slot: u32, generation: u32) -> Option<&mut Transaction> {
        self.get(slot).filter(|transaction| transaction.generation == generation)
    }

    /// Takes a transaction out; its buffers are reused.
    pub(crate) fn remove(&mut self, slot: u32) {
        let Some(transaction) = self.slab.try_remove(slot as usize) else { return };
        if self.keys.get(&transaction.key) == Some(&slot) {
            self.keys.remove(&transaction.key);
        }
        for buffer in [transaction.request, transaction.sent, transaction.reply] {
            self.give_back(buffer);
        }
    }

    /// The slots whose open request is at `peer`.
    pub(crate) fn waiting_on(&self, peer: Endpoint) -> Vec<u32> {
        let waits = |transaction: &Transaction| {
            transaction.state == State::Open && transaction.leg.is_some_and(|leg| leg.to == peer)
        };
        self.slab
            .iter()
            .filter(|(_, transaction)| waits(transaction))
            .map(|(slot, _)| slot as u32)
            .collect()
    }
}
