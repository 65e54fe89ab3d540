//! Calls: which slot of its instance each one takes, and its record.
//!
//! The slot is the routing core's: a held session, begun by the 2xx, refreshed by re-INVITE and
//! UPDATE, ended by BYE, and by time if no BYE ever comes (RFC 4028's interval, or the pool's
//! `session.ttl`). It is shared by all workers and outlives reloads and engines, so nothing here
//! counts up and down by itself. A call whose 2xx nobody acknowledged within 64 x T1 is none (RFC 3261
//! 13.3.1.4): its instance ends it with a BYE, or died before it could. The record, which only listeners with `cdr: true` keep, lives on
//! the worker that saw the call begin; our Record-Route names it, and the dialog's requests come
//! there.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use slab::Slab;
use strowger_contract::{
    BackendId, CallEnd, CallPhase, CallRecord, CallSide, Note, Outbox, PoolId, Router, SessionKey,
    WorkerId, stable_hash,
};

use crate::answers::At;
use crate::engine::SipEngine;
use crate::incoming::{Incoming, seconds, session_key};
use crate::method::Method;
use crate::scan::{Name, Scan};
use crate::target::Target;
use crate::transaction::{KeyMap, State};
use crate::uri::{name_addr, tag};

/// Marks the wheel's keys that are calls'.
pub(crate) const CALL_KEY: u64 = 1 << 63;

/// Records of answered calls per worker, at most: some 1 kB each.
const RECORDS_MAX: usize = 500_000;

/// What a peer may be late with its refresh (RFC 4028 10: a third of the interval, at least 32 s).
const REFRESH_GRACE: Duration = Duration::from_secs(32);

/// What tells dialogs of one Call-ID apart: both tags, and which side of the edge began it. A call to a
/// registered user passes twice, by the registrar, with the same tags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct DialogKey(u64);

impl DialogKey {
    /// Of a request or answer of the dialog, whichever side sent it.
    pub(crate) fn of(message: &[u8], scan: &Scan, begun_by_backend: bool) -> Self {
        let hash =
            |name| stable_hash(scan.value(message, name).and_then(tag).unwrap_or_default()) & !1;
        Self(hash(Name::From).wrapping_add(hash(Name::To)) | u64::from(begun_by_backend))
    }

    fn begun_by_backend(self) -> bool {
        self.0 & 1 != 0
    }

    /// The key of the call's record.
    fn record(self, session: SessionKey) -> u64 {
        session.keyed ^ self.0
    }

    /// What the table remembers the call by until it is acknowledged.
    pub(crate) fn unacknowledged(self, session: SessionKey) -> SessionKey {
        SessionKey { keyed: session.keyed.rotate_left(32) ^ self.0, ..session }
    }
}

/// Answers of one INVITE behind its first final one that are followed as calls of their own.
const FURTHER_MAX: usize = crate::transaction::LEGS_MAX;

#[derive(serde::Serialize, serde::Deserialize)]
pub(crate) struct Open {
    record: Box<CallRecord>,
    key: u64,
    generation: u32,
    #[serde(with = "strowger_contract::handover::moment")]
    until: Instant,
    /// The record that the same dialog had before, when it passed here already.
    earlier: Option<u32>,
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

impl Calls {
    /// Takes a record out; the one that its dialog had before stands in its place.
    fn take(&mut self, slot: u32) -> Option<Open> {
        let taken = self.open.try_remove(slot as usize)?;
        if self.keys.get(&taken.key) == Some(&slot) {
            let earlier = taken.earlier.filter(|earlier| {
                self.open.get(*earlier as usize).is_some_and(|open| open.key == taken.key)
            });
            match earlier {
                Some(earlier) => self.keys.insert(taken.key, earlier),
                None => self.keys.remove(&taken.key),
            };
        }
        Some(taken)
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
        // Of one dialog's records the newest stands first.
        let mut order: Vec<_> =
            all.iter().map(|(slot, open)| (open.generation, open.key, *slot)).collect();
        order.sort_unstable();
        self.keys = order.into_iter().map(|(_, key, slot)| (key, slot)).collect();
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
        let dialog = DialogKey::of(message, scan, transaction.dialog.begun_by_backend());
        transaction.dialog = dialog;
        if !transaction.creates_dialog {
            // A refresh, from whichever side: what is known lives on; what ended stays so.
            if let Some(backend) = router.lookup(now, session)
                && let Some(pool) = router.backend(backend).map(|view| view.pool)
            {
                let ttl = self.session_time(message, scan, pool, router);
                router.learn(now, session, backend, class, ttl);
                self.refresh(now, dialog.record(session), ttl);
            }
            return;
        }
        let owner = transaction.answered_by.or_else(|| {
            // A call that an instance began is its own.
            let pin = transaction.legs.iter().rev().find_map(|leg| leg.pin)?;
            router.resolve(pin)
        });
        let pool = pool.or_else(|| router.backend(owner?).map(|view| view.pool));
        let (Some(backend), Some(pool)) = (owner, pool) else { return };
        let record = transaction.record.take();
        let recorded = self.settings.options.record_route;
        transaction.holder = recorded.then_some(dialog);
        let ttl = self.session_time(message, scan, pool, router);
        if recorded {
            router.hold(now, session, backend, class, ttl);
        } else {
            // Its BYE does not come this way: it would hold its slot until its time is out.
            router.learn(now, session, backend, class, ttl);
        }
        self.follow_call(now, slot, (dialog, backend, pool), ttl, record, router, out);
    }

    /// RFC 3261 13.2.2.4: a 2xx to an INVITE behind its first final answer, which may have been one of our
    /// own. That of another dialog is another call: it has a record, and a slot if nobody has the session's.
    pub(crate) fn call_answered_again(
        &mut self,
        now: Instant,
        at: At,
        message: &[u8],
        scan: &Scan,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let (timeout, recorded) = (self.settings.timeout(), self.settings.options.record_route);
        let Some(transaction) = self.transactions.get(at.0) else { return };
        let dialog = DialogKey::of(message, scan, transaction.dialog.begun_by_backend());
        if !recorded
            || !transaction.creates_dialog
            || dialog == transaction.dialog
            || transaction.further.contains(&dialog)
        {
            return;
        }
        let (session, class) = (transaction.session, transaction.class);
        let Some(leg) = transaction.leg(at.1) else { return };
        let owner = leg.backend.or_else(|| router.resolve(leg.pin?));
        let Some((backend, pool)) =
            owner.and_then(|owner| Some((owner, router.backend(owner)?.pool)))
        else {
            return;
        };
        if transaction.further.len() >= FURTHER_MAX {
            return out.note(Note::Count("sip_calls_not_followed"));
        }
        transaction.further.push(dialog);
        // So long its ACK may take.
        transaction.ends_at = transaction.ends_at.max(Some(now + timeout));
        let known = router.lookup(now, session);
        let ttl = self.session_time(message, scan, pool, router);
        if known.is_none_or(|known| known == backend) {
            router.hold(now, session, backend, class, ttl);
            if let Some(transaction) = self.transactions.get(at.0)
                && (known.is_none() || transaction.holder.is_none())
            {
                transaction.holder = Some(dialog);
            }
        }
        out.note(Note::Count("sip_calls_answered_again"));
        let record = self.with_request(at.0, |engine, request, scan| {
            let (message, target) = engine.come_again(at.0, request, scan, router)?;
            let incoming = Incoming::read(&message, scan, router)?;
            engine.settings.options.cdr.then(|| engine.calls.record(&incoming, &target, Some(pool)))
        });
        let call = (dialog, backend, pool);
        self.follow_call(now, at.0, call, ttl, record.flatten(), router, out);
    }

    /// A dialog was answered: it is waited for its ACK, and its record is kept.
    #[allow(clippy::too_many_arguments, reason = "what every handler gets")]
    fn follow_call(
        &mut self,
        now: Instant,
        slot: u32,
        (dialog, backend, pool): (DialogKey, BackendId, PoolId),
        ttl: Duration,
        record: Option<Box<CallRecord>>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        let (session, class) = (transaction.session, transaction.class);
        let (arrived, tries) = (transaction.arrived, transaction.tries);
        let first = transaction.ringing;
        if self.settings.options.record_route {
            // Further answers make the transaction live longer.
            let wait = self.settings.timeout() * 4;
            router.remember(now, dialog.unacknowledged(session), backend, class, wait);
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
        self.keep_record(now, dialog.record(session), record, ttl);
    }

    fn keep_record(&mut self, now: Instant, key: u64, record: Box<CallRecord>, ttl: Duration) {
        let calls = &mut self.calls;
        calls.generation = calls.generation.wrapping_add(1);
        let slot = calls.open.vacant_key() as u32;
        let earlier = calls.keys.insert(key, slot);
        let open = Open { record, key, generation: calls.generation, until: now + ttl, earlier };
        let wheel_key = open.wheel_key(slot);
        calls.open.insert(open);
        self.wheel_insert(now, now + ttl, wheel_key);
    }

    /// An ACK passes: the call is one.
    pub(crate) fn call_acknowledged(
        &mut self,
        now: Instant,
        incoming: &Incoming<'_>,
        begun_by_backend: bool,
        router: &mut dyn Router,
    ) {
        if self.settings.is_stateless() || !self.settings.options.record_route {
            return;
        }
        let (message, scan) = (&incoming.message, incoming.scan);
        let session = session_key(message, scan, incoming.uri, None, router);
        let dialog = DialogKey::of(message.bytes, scan, begun_by_backend);
        router.forget(now, dialog.unacknowledged(session));
    }

    /// The time of an INVITE's 2xx is over (Timer L): of those that nobody acknowledged there is no call.
    pub(crate) fn never_acknowledged(
        &mut self,
        now: Instant,
        slot: u32,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        if !transaction.creates_dialog {
            return;
        }
        let (session, holder) = (transaction.session, transaction.holder);
        let first = (transaction.state == State::Accepted).then_some(transaction.dialog);
        let further = std::mem::take(&mut transaction.further);
        for dialog in first.into_iter().chain(further) {
            let waiting = dialog.unacknowledged(session);
            if router.lookup(now, waiting).is_none() {
                continue;
            }
            router.forget(now, waiting);
            if holder == Some(dialog) {
                router.forget(now, session);
            }
            out.note(Note::Count("sip_calls_never_acknowledged"));
            let end = CallEnd { by: CallSide::Edge, code: 408, cause: "never_acknowledged" };
            self.close_record(now, dialog.record(session), end, out);
        }
    }

    fn refresh(&mut self, now: Instant, key: u64, ttl: Duration) {
        if let Some(&slot) = self.calls.keys.get(&key)
            && let Some(open) = self.calls.open.get_mut(slot as usize)
        {
            // The wheel looks again when the old time is over.
            open.until = open.until.max(now + ttl);
        }
    }

    /// A BYE ended that dialog.
    pub(crate) fn call_ended(
        &mut self,
        now: Instant,
        (session, dialog): (SessionKey, DialogKey),
        from_backend: bool,
        code: u16,
        out: &mut Outbox,
    ) {
        let by_caller = dialog.begun_by_backend() == from_backend;
        let by = if by_caller { CallSide::Caller } else { CallSide::Callee };
        self.close_record(now, dialog.record(session), CallEnd { by, code, cause: "bye" }, out);
    }

    fn close_record(&mut self, now: Instant, key: u64, end: CallEnd, out: &mut Outbox) {
        let Some(&slot) = self.calls.keys.get(&key) else { return };
        if let Some(open) = self.calls.take(slot) {
            close(now, open.record, end, out);
        }
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
        let Some(open) = self.calls.take(slot as u32) else { return };
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
