//! What is under way: one entry serves both sides of a request (RFC 3261 17, 16.2), and has a leg for
//! each place that the request was sent to.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use slab::Slab;
use strowger_contract::{
    BackendId, CallRecord, ClassId, Endpoint, Pin, PoolId, SessionKey, Ticket, Transport,
};

use crate::branch::BRANCH_BYTES;
use crate::calls::DialogKey;
use crate::chains::{CLIENT, Chains, Link, Node};
use crate::method::Method;

/// How many legs one request may have in all: forks, fail-overs, redirections. With it, a request
/// that comes in once goes out at most so many times, each repeated by RFC 3261's timers only.
pub(crate) const LEGS_MAX: usize = 12;

/// Buffers that are kept for reuse, and the largest that is: 4,096 x 2 kB at rest.
const BUFFERS_KEPT: usize = 4_096;
const BUFFER_KEPT_BYTES: usize = 16 << 10;

/// Leg lists that are kept for reuse.
const LISTS_KEPT: usize = 1_024;

/// Where a transaction stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
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

/// Where a leg stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) enum LegState {
    /// Nothing was heard.
    Calling,
    /// It gave a sign of life.
    Proceeding,
    /// It gave a final answer, was lost, or its time ran out.
    Ended,
}

/// Whether a leg is to be cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) enum Cancel {
    No,
    /// It is, but it has not yet said anything, so it cannot be told (9.1).
    Wanted,
    Sent,
}

/// The request at one place.
#[derive(serde::Serialize, serde::Deserialize)]
pub(crate) struct Leg {
    #[serde(skip)]
    pub(crate) link: Link,
    pub(crate) backend: Option<BackendId>,
    pub(crate) pin: Option<Pin>,
    pub(crate) to: Endpoint,
    /// It goes to a client over its flow, and nowhere else.
    pub(crate) is_flow: bool,
    pub(crate) address: SocketAddr,
    #[serde(with = "strowger_contract::handover::moment")]
    pub(crate) sent_at: Instant,
    /// The router awaits an outcome.
    pub(crate) owed: bool,
    pub(crate) state: LegState,
    /// Given up: another took its place. A 2xx still counts, a refusal no more.
    pub(crate) abandoned: bool,
    /// It gave a final answer.
    pub(crate) answered: bool,
    /// It gave a provisional answer over 100: somebody may hear it ring.
    pub(crate) rang: bool,
    /// It went over a stream only for its size (RFC 3261 18.1.1).
    pub(crate) upgraded: bool,
    pub(crate) cancel: Cancel,
    /// The request as it was sent.
    pub(crate) sent: Vec<u8>,
    /// Timers A, E, and E of our CANCEL.
    #[serde(with = "strowger_contract::handover::moment_or_none")]
    pub(crate) repeat_at: Option<Instant>,
    pub(crate) repeat_after: Duration,
    /// We were late ourselves to look for its sign of life, and looked again.
    pub(crate) excused: bool,
    /// It must have given a sign of life by then.
    #[serde(with = "strowger_contract::handover::moment_or_none")]
    pub(crate) failover_at: Option<Instant>,
    /// Timers B, F, C.
    #[serde(with = "strowger_contract::handover::moment_or_none")]
    pub(crate) expires_at: Option<Instant>,
}

impl Leg {
    /// The branch that the request went out with: of the first Via, which is ours.
    pub(crate) fn branch(&self) -> Option<&[u8]> {
        const OURS: &[u8] = b"Via: SIP/2.0/";
        // Behind the request line, unless a rule put something there.
        let first = memchr::memchr(b'\n', &self.sent)? + 1;
        let at = if self.sent[first..].starts_with(OURS) {
            first
        } else {
            memchr::memmem::find(&self.sent, b"\nVia: SIP/2.0/")? + 1
        };
        let line = &self.sent[at..];
        let parameters = &line[memchr::memchr(b';', line)? + 1..];
        parameters.strip_prefix(b"branch=")?.get(..BRANCH_BYTES)
    }

    /// Whether an answer is to what was sent here (RFC 3261 17.1.3): the whole branch with its signature,
    /// not only the numbers in it, which whoever saw one can guess.
    pub(crate) fn is_answered_by(&self, branch: &[u8]) -> bool {
        self.branch() == Some(branch)
    }

    /// Whether its answer is still waited for.
    pub(crate) fn is_pending(&self) -> bool {
        self.state != LegState::Ended && !self.abandoned
    }

    pub(crate) fn is_datagram(&self) -> bool {
        matches!(self.to, Endpoint::Datagram { .. })
    }

    fn next_wake(&self) -> Option<Instant> {
        [self.repeat_at, self.failover_at, self.expires_at].into_iter().flatten().min()
    }

    /// No timer any more.
    pub(crate) fn rest(&mut self) {
        (self.repeat_at, self.failover_at, self.expires_at) = (None, None, None);
    }
}

/// The best final answer so far (RFC 3261 16.7 step 6), as it will go to the client.
#[derive(Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct Best {
    pub(crate) code: u16,
    pub(crate) backend: Option<BackendId>,
    /// Empty: the answer is one of our own.
    pub(crate) bytes: Vec<u8>,
    #[serde(with = "strowger_contract::handover::word")]
    pub(crate) reason: strowger_contract::handover::Word,
}

/// A next hop that is a name. Rare, so its parts may be allocated.
#[derive(Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct Naming {
    /// It is looked up, and this is the end of the wait.
    #[serde(with = "strowger_contract::handover::moment_or_none")]
    pub(crate) until: Option<Instant>,
    /// The URI that named it, if a 3xx did.
    pub(crate) uri: Option<Box<[u8]>>,
    /// Places not yet tried, the next one last.
    pub(crate) places: Vec<(Transport, SocketAddr)>,
}

/// A transaction.
#[derive(serde::Serialize, serde::Deserialize)]
pub(crate) struct Transaction {
    pub(crate) generation: u32,
    pub(crate) key: u64,
    pub(crate) method: Method,
    pub(crate) state: State,
    /// The client has cancelled.
    pub(crate) cancelled: bool,
    #[serde(skip)]
    pub(crate) link: Link,
    /// What it came over first: by that it is decided where it goes, each time.
    pub(crate) from: Endpoint,
    /// Where answers go, and whether repeating them is the transport's business.
    pub(crate) client: Endpoint,
    pub(crate) client_reliable: bool,
    pub(crate) transport: Transport,
    pub(crate) source: SocketAddr,
    pub(crate) local: SocketAddr,
    pub(crate) from_backend: bool,
    pub(crate) class: ClassId,
    #[serde(with = "strowger_contract::handover::moment")]
    pub(crate) arrived: Instant,
    #[serde(with = "strowger_contract::handover::moment")]
    pub(crate) deadline: Instant,
    /// What the table knows its session by, and what it is placed by.
    pub(crate) session: SessionKey,
    pub(crate) call_id: u64,
    /// Tells its dialog from others of the same Call-ID.
    pub(crate) dialog: DialogKey,
    /// The dialog that took the session's slot at an instance.
    pub(crate) holder: Option<DialogKey>,
    /// Dialogs of 2xx answers behind the first final one; rare, so it may allocate.
    pub(crate) further: Vec<DialogKey>,
    pub(crate) pool: Option<PoolId>,
    /// An initial INVITE, that makes a dialog of its session.
    pub(crate) creates_dialog: bool,
    pub(crate) legs: Vec<Leg>,
    pub(crate) tried: [BackendId; LEGS_MAX],
    pub(crate) tries: u8,
    /// Fail-overs so far.
    pub(crate) retries: u8,
    /// Instances that may yet be tried in turn because the answers were no good (serial forking).
    pub(crate) forks_left: u8,
    /// RFC 5393: what is left of Max-Breadth.
    pub(crate) breadth: u32,
    /// Where 3xx answers say to ask next; rare, so it may allocate.
    pub(crate) contacts: Vec<Box<[u8]>>,
    pub(crate) redirected: u8,
    pub(crate) best: Best,
    /// What a name of its next hop leads to.
    pub(crate) named: Naming,
    /// It waits in the router's queue.
    pub(crate) ticket: Option<Ticket>,
    /// From arrival to the first sign of life passed on.
    pub(crate) first_answer: Option<Duration>,
    /// From arrival to the first provisional answer over 100.
    pub(crate) ringing: Option<Duration>,
    /// The backend that answered.
    pub(crate) answered_by: Option<BackendId>,
    pub(crate) noted: bool,
    /// When a second instance is asked as well, and whether one was.
    #[serde(with = "strowger_contract::handover::moment_or_none")]
    pub(crate) hedge_at: Option<Instant>,
    pub(crate) hedged: bool,
    pub(crate) record: Option<Box<CallRecord>>,
    /// The request as it came, and the last answer.
    pub(crate) request: Vec<u8>,
    pub(crate) reply: Vec<u8>,
    /// Timer G (towards the client).
    #[serde(with = "strowger_contract::handover::moment_or_none")]
    pub(crate) repeat_at: Option<Instant>,
    pub(crate) repeat_after: Duration,
    /// Timers D, H, I, J, K, L, M: the end.
    #[serde(with = "strowger_contract::handover::moment_or_none")]
    pub(crate) ends_at: Option<Instant>,
    /// When the wheel will look at it.
    #[serde(with = "strowger_contract::handover::moment_or_none")]
    pub(crate) wakes_at: Option<Instant>,
}

impl Transaction {
    /// When something is next due.
    pub(crate) fn next_wake(&self) -> Option<Instant> {
        let own = [self.repeat_at, self.ends_at, self.named.until, self.hedge_at]
            .into_iter()
            .flatten()
            .min();
        self.legs.iter().filter_map(Leg::next_wake).chain(own).min()
    }

    pub(crate) fn is_invite(&self) -> bool {
        self.method == Method::Invite
    }

    /// Whether some leg's answer is still waited for.
    pub(crate) fn is_pending(&self) -> bool {
        self.named.until.is_some() || self.legs.iter().any(Leg::is_pending)
    }

    /// Notes another try.
    pub(crate) fn note_try(&mut self, backend: BackendId) {
        if let Some(place) = self.tried.get_mut(usize::from(self.tries)) {
            *place = backend;
            self.tries += 1;
        }
    }

    /// The leg that has the branch's try number.
    pub(crate) fn leg(&mut self, attempt: u8) -> Option<&mut Leg> {
        self.legs.get_mut(usize::from(attempt).checked_sub(1)?)
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

/// A map by keyed hashes.
pub(crate) type KeyMap<V> = HashMap<u64, V, BuildHasherDefault<Plain>>;

/// All transactions of one engine.
#[derive(Default)]
pub(crate) struct Transactions {
    slab: Slab<Transaction>,
    keys: KeyMap<u32>,
    tickets: KeyMap<(u32, u32)>,
    buffers: Vec<Vec<u8>>,
    lists: Vec<Vec<Leg>>,
    /// What waits for which connection.
    chains: Chains,
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

    /// An empty list of legs.
    pub(crate) fn list(&mut self) -> Vec<Leg> {
        self.lists.pop().unwrap_or_else(|| Vec::with_capacity(1))
    }

    pub(crate) fn give_back(&mut self, mut buffer: Vec<u8>) {
        if buffer.capacity() > 0
            && buffer.capacity() <= BUFFER_KEPT_BYTES
            && self.buffers.len() < BUFFERS_KEPT
        {
            buffer.clear();
            self.buffers.push(buffer);
        }
    }

    /// All of them with their slots, for another process.
    pub(crate) fn all(&self) -> Vec<(u32, &Transaction)> {
        self.slab.iter().map(|(slot, transaction)| (slot as u32, transaction)).collect()
    }

    /// Takes those of another process over, each in its own slot: branches name them.
    pub(crate) fn take_over(&mut self, all: Vec<(u32, Transaction)>) {
        self.keys = all.iter().map(|(slot, transaction)| (transaction.key, *slot)).collect();
        let nodes: Vec<(Endpoint, Node)> = all
            .iter()
            .flat_map(|(slot, it)| {
                let legs = it.legs.iter().zip(1..).map(|(leg, number)| (leg.to, (*slot, number)));
                legs.chain([(it.client, (*slot, CLIENT))])
            })
            .collect();
        self.slab = all.into_iter().map(|(slot, it)| (slot as usize, it)).collect();
        for (peer, node) in nodes {
            self.chains.add(&mut self.slab, peer, node);
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
        let (key, client) = (transaction.key, transaction.client);
        let slot = self.slab.insert(transaction) as u32;
        self.chains.add(&mut self.slab, client, (slot, CLIENT));
        self.keys.insert(key, slot);
        slot
    }

    pub(crate) fn by_key(&self, key: u64) -> Option<u32> {
        self.keys.get(&key).copied()
    }

    /// Notes that a transaction waits.
    pub(crate) fn wait(&mut self, slot: u32, ticket: Ticket, longest: Instant) {
        let Some(transaction) = self.get(slot) else { return };
        transaction.ticket = Some(ticket);
        // The router lets go of every ticket; should it ever not, this does.
        transaction.ends_at = Some(longest);
        let generation = transaction.generation;
        self.tickets.insert(ticket.0, (slot, generation));
    }

    /// The transaction that waited with that ticket; it waits no more.
    pub(crate) fn waited(&mut self, ticket: Ticket) -> Option<u32> {
        let (slot, generation) = self.tickets.remove(&ticket.0)?;
        let transaction = self.current(slot, generation)?;
        (transaction.ticket, transaction.ends_at) = (None, None);
        Some(slot)
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
        let Some(transaction) = self.get(slot) else { return };
        let (client, legs) = (transaction.client, transaction.legs.len() as u8);
        self.chains.take(&mut self.slab, client, (slot, CLIENT));
        for number in 1..=legs {
            let leg = self.get(slot).and_then(|known| known.leg(number));
            let Some(to) = leg.map(|leg| leg.to) else { break };
            self.chains.take(&mut self.slab, to, (slot, number));
        }
        let Some(mut transaction) = self.slab.try_remove(slot as usize) else { return };
        if self.keys.get(&transaction.key) == Some(&slot) {
            self.keys.remove(&transaction.key);
        }
        if let Some(ticket) = transaction.ticket {
            self.tickets.remove(&ticket.0);
        }
        for buffer in [transaction.request, transaction.reply, transaction.best.bytes] {
            self.give_back(buffer);
        }
        for leg in transaction.legs.drain(..) {
            self.give_back(leg.sent);
        }
        if self.lists.len() < LISTS_KEPT {
            self.lists.push(transaction.legs);
        }
    }

    /// One more leg, which was sent.
    pub(crate) fn push_leg(&mut self, slot: u32, leg: Leg) {
        let Some(transaction) = self.get(slot) else { return };
        let to = leg.to;
        transaction.legs.push(leg);
        let number = transaction.legs.len() as u8;
        self.chains.add(&mut self.slab, to, (slot, number));
    }

    /// A transaction's request was repeated from there: there it is answered.
    pub(crate) fn answer_at(&mut self, slot: u32, client: Endpoint) {
        let Some(transaction) = self.slab.get_mut(slot as usize) else { return };
        if transaction.client == client {
            return;
        }
        let old = std::mem::replace(&mut transaction.client, client);
        self.chains.take(&mut self.slab, old, (slot, CLIENT));
        self.chains.add(&mut self.slab, client, (slot, CLIENT));
    }

    /// The transactions whose client is at the other end of a connection.
    pub(crate) fn asked_by(&mut self, peer: Endpoint) -> Vec<u32> {
        let nodes = self.chains.waiting(&mut self.slab, peer).unwrap_or_default();
        let mut slots: Vec<u32> =
            nodes.iter().filter(|(_, side)| *side == CLIENT).map(|(slot, _)| *slot).collect();
        slots.retain(|slot| self.get(*slot).is_some_and(|known| known.client == peer));
        slots
    }

    /// The answers that are yet to come over a connection go where `elsewhere` says, if it says so.
    pub(crate) fn answer_elsewhere(
        &mut self,
        peer: Endpoint,
        elsewhere: impl Fn(&Transaction) -> Option<Endpoint>,
    ) -> usize {
        let mut moved = 0;
        for (slot, side) in self.chains.waiting(&mut self.slab, peer).unwrap_or_default() {
            let Some(transaction) = self.slab.get(slot as usize).filter(|_| side == CLIENT) else {
                continue;
            };
            // Over a connection nothing is said twice: who has his answer is owed none.
            let is_owed = transaction.client == peer
                && matches!(transaction.state, State::Open | State::Accepted);
            if let Some(to) = is_owed.then(|| elsewhere(transaction)).flatten() {
                self.answer_at(slot, to);
                moved += 1;
            }
        }
        moved
    }

    /// The legs, by slot and try number, that await an answer from `peer`. Of a connection it looks at what
    /// waits for it, of an address or an instance at everything.
    pub(crate) fn waiting_on(&mut self, peer: Endpoint) -> Vec<(u32, u8)> {
        let waits = |leg: &Leg| leg.to == peer && leg.state != LegState::Ended;
        if let Some(mut nodes) = self.chains.waiting(&mut self.slab, peer) {
            nodes.retain(|(slot, number)| {
                let leg = self.get(*slot).and_then(|known| known.leg(*number));
                leg.is_some_and(|leg| waits(leg))
            });
            return nodes;
        }
        let mut found = Vec::new();
        for (slot, transaction) in &self.slab {
            for (leg, number) in transaction.legs.iter().zip(1..) {
                if waits(leg) {
                    found.push((slot as u32, number));
                }
            }
        }
        found
    }
}
