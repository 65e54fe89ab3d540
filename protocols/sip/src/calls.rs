//! Calls: which slot of its instance each one takes, and its record.
//!
//! The slot is the routing core's: a held session, begun by the 2xx, refreshed by re-INVITE and
//! UPDATE, ended by BYE, and by time if no BYE ever comes (RFC 4028's interval, or the pool's
//! `session.ttl`). It is shared by all workers and outlives reloads and engines, so nothing here
//! counts up and down by itself. The record, which only listeners with `cdr: true` keep, lives on
//! the worker that saw the call begin; our Record-Route names it, and the dialog's requests come
//! there.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use slab::Slab;
use strowger_contract::{
    CallEnd, CallPhase, CallRecord, CallSide, Note, Outbox, PoolId, Router, WorkerId,
};

use crate::engine::SipEngine;
use crate::incoming::{Incoming, seconds};
use crate::method::Method;
use crate::scan::{Name, Scan};
use crate::target::Target;
use crate::transaction::KeyMap;
use crate::uri::name_addr;

/// Marks the wheel's keys that are calls'.
pub(crate) const CALL_KEY: u64 = 1 << 63;

/// Records of answered calls per worker, at most: some 1 kB each.
const RECORDS_MAX: usize = 500_000;

/// What a peer may be late with its refresh (RFC 4028 10: a third of the interval, at least 32 s).
const REFRESH_GRACE: Duration = Duration::from_secs(32);

#[derive(serde::Serialize, serde::Deserialize)]
pub(crate) struct Open {
    record: Box<CallRecord>,
    key: u64,
    generation: u32,
    #[serde(with = "strowger_contract::handover::moment")]
    until: Instant,
}

/// The answered calls of one engine that have records.
pub(crate) struct Calls {
    next: u64,
    generation: u32,
    open: Slab<Open>,
    keys: KeyMap<u32>,
}

impl Calls {
    pub(crate) fn new(worker: WorkerId, seed: u64) -> Self {
        let next = u64::from(worker.0) << 56 | seed >> 48 << 40;
        Self { next, generation: 0, open: Slab::new(), keys: KeyMap::default() }
    }

    /// A record of a call that begins.
    pub(crate) fn record(
        &mut self,
        incoming: &Incoming<'_>,
        target: &Target<'_>,
        pool: Option<PoolId>,
    ) -> Box<CallRecord> {
        self.next += 1;
        let (bytes, scan) = (incoming.message.bytes, incoming.scan);
        let address =
            |name| scan.value(bytes, name).and_then(name_addr).map_or(&b""[..], |(uri, _)| uri);
        let source: SocketAddr = incoming.message.remote;
        Box::new(CallRecord {
            id: self.next,
            phase: CallPhase::Began,
            call_id: kept(scan.value(bytes, Name::CallId).unwrap_or_default()),
            caller: kept(address(Name::From)),
            callee: kept(address(Name::To)),
            request_uri: kept(incoming.uri),
            source,
            pool,
            backend: None,
            begun_by_backend: target.begun_by_backend,
            tries: 0,
            began: incoming.message.arrived,
            first_provisional: None,
            answered: None,
            ended: None,
            end: None,
        })
    }
}

/// What goes to another process.
impl Calls {
    pub(crate) fn all(&self) -> (u64, Vec<(u32, &Open)>) {
        (self.next, self.open.iter().map(|(slot, open)| (slot as u32, open)).collect())
    }

    pub(crate) fn take_over(&mut self, next: u64, all: Vec<(u32, Open)>) -> Vec<(Instant, u64)> {
        self.next = next;
        self.generation = all.iter().map(|(_, open)| open.generation).max().unwrap_or(0);
        self.keys = all.iter().map(|(slot, open)| (open.key, *slot)).collect();
        let due = all.iter().map(|(slot, open)| (open.until, open.wheel_key(*slot))).collect();
        self.open = all.into_iter().map(|(slot, open)| (slot as usize, open)).collect();
        due
    }
}

fn kept(name: &[u8]) -> Box<[u8]> {
    name[..name.len().min(strowger_contract::call::CALL_NAME_MAX)].into()
}

impl SipEngine {
    /// How long a session lives after an answer: as its session timer says, else as the pool does.
    pub(crate) fn session_time(
        &self,
        message: &[u8],
        scan: &Scan,
        pool: PoolId,
        router: &dyn Router,
    ) -> Duration {
        let whole = router.session_ttl(pool);
        let timer = scan.value(message, Name::SessionExpires).and_then(seconds);
        timer.map_or(whole, |timer| (timer + REFRESH_GRACE.max(timer / 3)).min(whole))
    }

    /// A 2xx to an INVITE or UPDATE, on its first way.
    pub(crate) fn call_answered(
        &mut self,
        now: Instant,
        slot: u32,
        message: &[u8],
        scan: &Scan,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        if !matches!(transaction.method, Method::Invite | Method::Update) {
            return;
        }
        let (session, class) = (transaction.session, transaction.class);
        let pool = transaction.pool;
        if !transaction.creates_dialog {
            // A refresh, from whichever side: what is known lives on; what ended stays so.
            if let Some(backend) = router.lookup(now, session)
                && let Some(pool) = router.backend(backend).map(|view| view.pool)
            {
                let ttl = self.session_time(message, scan, pool, router);
                router.learn(now, session, backend, class, ttl);
                self.refresh(now, session.keyed, ttl);
            }
            return;
        }
        let owner = transaction.answered_by.or_else(|| {
            // A call that an instance began is its own.
            let pin = transaction.legs.iter().rev().find_map(|leg| leg.pin)?;
            router.resolve(pin)
        });
        let pool = pool.or_else(|| router.backend(owner?).map(|view| view.pool));
        let record = transaction.record.take();
        let (arrived, tries) = (transaction.arrived, transaction.tries);
        let first = transaction.ringing;
        let (Some(backend), Some(pool)) = (owner, pool) else {
            return self.put_back(slot, record);
        };
        let ttl = self.session_time(message, scan, pool, router);
        if self.settings.options.record_route {
            router.hold(now, session, backend, class, ttl);
        } else {
            // Its BYE does not come this way: it would hold its slot until its time is out.
            router.learn(now, session, backend, class, ttl);
        }
        let Some(mut record) = record else { return };
        record.phase = CallPhase::Answered;
        (record.pool, record.backend, record.tries) = (Some(pool), Some(backend), tries);
        record.first_provisional = first;
        record.answered = Some(now.saturating_duration_since(arrived));
        out.note(Note::Call(record.clone()));
        if !self.settings.options.record_route || self.calls.open.len() >= RECORDS_MAX {
            out.note(Note::Count("sip_calls_not_followed"));
            return;
        }
        self.keep_record(now, session.keyed, record, ttl);
    }

    fn put_back(&mut self, slot: u32, record: Option<Box<CallRecord>>) {
        if let Some(transaction) = self.transactions.get(slot) {
            transaction.record = record;
        }
    }

    fn keep_record(&mut self, now: Instant, key: u64, record: Box<CallRecord>, ttl: Duration) {
        let calls = &mut self.calls;
        calls.generation = calls.generation.wrapping_add(1);
        let open = Open { record, key, generation: calls.generation, until: now + ttl };
        let wheel_key = open.wheel_key(calls.open.vacant_key() as u32);
        let slot = calls.open.insert(open) as u32;
        calls.keys.insert(key, slot);
        self.wheel_insert(now, now + ttl, wheel_key);
    }

    fn refresh(&mut self, now: Instant, key: u64, ttl: Duration) {
        if let Some(&slot) = self.calls.keys.get(&key)
            && let Some(open) = self.calls.open.get_mut(slot as usize)
        {
            // The wheel looks again when the old time is over.
            open.until = open.until.max(now + ttl);
        }
    }

    /// A BYE ended the call of that session.
    pub(crate) fn call_ended(
        &mut self,
        now: Instant,
        key: u64,
        from_backend: bool,
        code: u16,
        out: &mut Outbox,
    ) {
        let Some(slot) = self.calls.keys.remove(&key) else { return };
        let Some(open) = self.calls.open.try_remove(slot as usize) else { return };
        let by_caller = open.record.begun_by_backend == from_backend;
        let by = if by_caller { CallSide::Caller } else { CallSide::Callee };
        close(now, open.record, CallEnd { by, code, cause: "bye" }, out);
    }

    /// A call's time may be out.
    pub(crate) fn on_call_due(&mut self, now: Instant, key: u64, out: &mut Outbox) {
        let slot = (key & !CALL_KEY) >> 32;
        let Some(open) = self.calls.open.get(slot as usize) else { return };
        if open.generation != key as u32 {
            return;
        }
        if open.until > now {
            let until = open.until;
            return self.wheel_insert(now, until, key);
        }
        let open = self.calls.open.remove(slot as usize);
        if self.calls.keys.get(&open.key) == Some(&(slot as u32)) {
            self.calls.keys.remove(&open.key);
        }
        let end = CallEnd { by: CallSide::Edge, code: 408, cause: "session_expired" };
        close(now, open.record, end, out);
    }

    /// An attempt came to nothing.
    pub(crate) fn call_failed(
        &mut self,
        now: Instant,
        slot: u32,
        code: u16,
        by_edge: bool,
        out: &mut Outbox,
    ) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        let Some(mut record) = transaction.record.take() else { return };
        record.tries = transaction.tries;
        record.backend = transaction.answered_by;
        record.first_provisional = transaction.ringing;
        let by = match (transaction.cancelled, by_edge) {
            (true, _) => CallSide::Caller,
            (_, true) => CallSide::Edge,
            _ => CallSide::Callee,
        };
        let cause = match code {
            _ if transaction.cancelled => "cancelled",
            408 => "timeout",
            503 if by_edge => "overload",
            500 if by_edge => "lost",
            _ => "refused",
        };
        close(now, record, CallEnd { by, code, cause }, out);
    }
}

impl Open {
    fn wheel_key(&self, slot: u32) -> u64 {
        CALL_KEY | u64::from(slot) << 32 | u64::from(self.generation)
    }
}

fn close(now: Instant, mut record: Box<CallRecord>, end: CallEnd, out: &mut Outbox) {
    record.phase = CallPhase::Ended;
    record.ended = Some(now.saturating_duration_since(record.began));
    record.end = Some(end);
    out.note(Note::Call(record));
}
