//! Requests: checked (RFC 3261 16.3), matched to what is under way (17.2.3), taken in.

use std::time::{Duration, Instant};

use strowger_contract::{
    AttemptOutcome, ClassId, ClassRule, Endpoint, Message, Note, OnMiss, Outbox, Refusal,
    RequestOutcome, Router, WorkerId,
};

use crate::branch::Branch;
use crate::calls::DialogKey;
use crate::chains::Link;
use crate::classify::classify;
use crate::engine::SipEngine;
use crate::incoming::{Incoming, loop_hash, record_key, refused_as_is, session_key, trimmed};
use crate::method::Method;
use crate::options::{Fork, Matched};
use crate::overload::Told;
use crate::respond::{Answer, is_our_tag, respond};
use crate::scan::{Name, Scan, ScanError};
use crate::target::{Hop, Target, heeds_priority, target};
use crate::transaction::{Best, LEGS_MAX, Naming, State, Transaction};
use crate::uri::tag;
use crate::via::Via;
use crate::write::all_values;

/// RFC 5393 5.3.3.1: what an absent Max-Breadth means.
const BREADTH_DEFAULT: u32 = 60;

impl SipEngine {
    /// A request, well-formed or not.
    pub(crate) fn on_request(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        scan: &Scan,
        error: Option<ScanError>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        if let Some(why) = self.kept_out(now, message, scan, router) {
            return out.drop_message(why);
        }
        let Some(incoming) = Incoming::read(message, scan, router) else {
            return out.drop_message("unanswerable");
        };
        if let Some(answer) = refused_as_is(&incoming, error) {
            if incoming.method == Method::Ack {
                return out.drop_message("malformed");
            }
            out.note(Note::Count("sip_bad_requests"));
            out.note(answer_note(incoming.method, answer.code));
            return reply(&incoming, &answer, None, out);
        }
        let body = trimmed(&incoming);
        let incoming =
            Incoming { message: Message { bytes: body, ..incoming.message }, ..incoming };
        match incoming.method {
            Method::Ack => self.on_ack(now, &incoming, router, out),
            Method::Cancel => self.on_cancel(now, &incoming, router, out),
            _ => self.on_new_or_known(now, &incoming, router, out),
        }
    }

    fn on_new_or_known(
        &mut self,
        now: Instant,
        incoming: &Incoming<'_>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        if let Some(slot) = self.transactions.by_key(incoming.key) {
            // 17.2: a retransmission gets the last answer again.
            out.note(Note::Count("sip_retransmissions_absorbed"));
            let client = reply_endpoint(incoming.message.from, &incoming.via);
            self.transactions.answer_at(slot, client);
            let Some(transaction) = self.transactions.get(slot) else { return };
            if !transaction.reply.is_empty() && transaction.state != State::Accepted {
                let (client, reply) = (transaction.client, &transaction.reply);
                out.send(client, ClassId::CONTROL, |bytes| bytes.extend_from_slice(reply));
            }
            return;
        }
        self.note_neighbour(now, &incoming.via, incoming.message.remote.ip());
        self.be_telling(now, None, router);
        let scan = incoming.scan;
        let target = self.target_of(incoming, router);
        // Anybody can write a tag into To: a dialog is what our token or our table knows of.
        let in_dialog = scan.value(incoming.message.bytes, Name::To).and_then(tag).is_some()
            && (target.vouched || target.from_backend || has_session(now, incoming, router));
        let class = self.class_of(incoming, in_dialog, router);
        if self.is_looped(incoming, router) {
            out.note(Note::Count("sip_loops"));
            return self.refuse(now, incoming, class, &Answer::new(482, "Loop Detected"), out);
        }
        if let Some(answer) = self.over_a_limit(now, incoming, class, in_dialog, router, out) {
            return self.refuse(now, incoming, class, &answer, out);
        }
        // A dialog that was begun as an emergency is one to its end, whatever rules say.
        let class = if target.kept_emergency { ClassId::EMERGENCY } else { class };
        let class = self.kept_class(now, incoming, class, &target, router);
        let target = Target { emergency: class == ClassId::EMERGENCY, ..target };
        if let Hop::Backend { pool, .. } = target.hop {
            self.be_telling(now, Some(pool), router);
        }
        if self.would_tell(&target, router) {
            out.note(Note::Count("sip_hidden_kept"));
            return self.refuse(now, incoming, class, &Answer::new(403, "Forbidden"), out);
        }
        if self.settings.is_stateless() {
            return self.forward_stateless(now, incoming, &target, class, router, out);
        }
        if let Some(keeper) = self.kept_elsewhere(&target, incoming.method) {
            return out.hand_over(keeper, &incoming.message);
        }
        if self.transactions.len() >= self.settings.options.max_transactions as usize {
            out.note(Note::Count("sip_transactions_limit"));
            let answer =
                Answer { retry_after: Some(SOON), ..Answer::new(503, "Too Many Transactions") };
            return self.refuse(now, incoming, class, &answer, out);
        }
        self.begin(now, incoming, &target, class, in_dialog, router, out);
    }

    /// By the first rule of the configuration that matches, else by what it is.
    pub(crate) fn class_of(
        &self,
        incoming: &Incoming<'_>,
        in_dialog: bool,
        router: &dyn Router,
    ) -> ClassId {
        let (message, scan) = (&incoming.message, incoming.scan);
        let heeds = heeds_priority(&self.settings, message, router);
        let class = classify(message.bytes, scan, incoming.name, incoming.uri, in_dialog, heeds);
        let rules = &self.settings.classify;
        if rules.is_empty() || class == ClassId::CONTROL {
            return class;
        }
        let request = Matched {
            message: message.bytes,
            scan,
            method: incoming.name,
            uri: incoming.uri,
            transport: message.transport.scheme(),
            source: message.remote.ip(),
        };
        let carried = class == ClassId::EMERGENCY;
        ClassRule::first(rules, carried, |rule| rule.matches(&request)).unwrap_or(class)
    }

    /// A dialog's request falls into no later tier than its dialog began in, unless a rule says so. (By
    /// default nothing is before `in-session`, and nothing is looked up.)
    fn kept_class(
        &self,
        now: Instant,
        incoming: &Incoming<'_>,
        class: ClassId,
        target: &Target<'_>,
        router: &mut dyn Router,
    ) -> ClassId {
        let tier = router.class(class).tier;
        if class != ClassId::IN_SESSION || tier == 0 {
            return class;
        }
        let pool = if let Hop::Backend { pool, .. } = target.hop { Some(pool) } else { None };
        let session = session_key(&incoming.message, incoming.scan, incoming.uri, pool, router);
        let of_session = router.session_class(now, session);
        of_session.filter(|&of| router.class(of).tier < tier).unwrap_or(class)
    }

    pub(crate) fn target_of<'a>(
        &self,
        incoming: &'a Incoming<'_>,
        router: &dyn Router,
    ) -> Target<'a> {
        target(
            &self.settings,
            &incoming.message,
            incoming.scan,
            incoming.name,
            incoming.uri,
            incoming.call_id,
            router,
        )
    }

    /// RFC 3261 16.3 step 4, RFC 5393 4: it was here before, and nothing that it is routed by has
    /// changed since.
    fn is_looped(&self, incoming: &Incoming<'_>, router: &dyn Router) -> bool {
        let (bytes, scan) = (incoming.message.bytes, incoming.scan);
        let ours = all_values(bytes, scan, Name::Via).filter_map(|value| {
            let (via, _) = Via::first(value)?;
            let (branch, token) = Branch::read(via.branch()?)?;
            let here = self.settings.local.is_ours(via.host, via.port);
            here.then(|| branch.verify(token, incoming.call_id, router)).flatten()
        });
        let mut hash = None;
        ours.into_iter().any(|branch| {
            let now =
                *hash.get_or_insert_with(|| loop_hash(bytes, scan, incoming.uri, incoming.call_id));
            branch.loop_hash == now
        })
    }

    /// Says no without remembering.
    pub(crate) fn refuse(
        &self,
        now: Instant,
        incoming: &Incoming<'_>,
        class: ClassId,
        answer: &Answer<'_>,
        out: &mut Outbox,
    ) {
        note_refused(now, incoming, class, answer.code, out);
        reply(incoming, answer, self.overload.telling.as_ref(), out);
    }

    /// A new transaction.
    #[allow(clippy::too_many_arguments, reason = "what every handler gets")]
    fn begin(
        &mut self,
        now: Instant,
        incoming: &Incoming<'_>,
        target: &Target<'_>,
        class: ClassId,
        in_dialog: bool,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let message = &incoming.message;
        let deadline = router
            .class(class)
            .deadline
            .map_or_else(|| now + self.settings.timeout(), |promised| message.arrived + promised);
        let pool = if let Hop::Backend { pool, .. } = target.hop { Some(pool) } else { None };
        let invite = incoming.method == Method::Invite;
        let breadth = incoming
            .scan
            .value(message.bytes, Name::MaxBreadth)
            .and_then(crate::write::max_forwards)
            .map_or(BREADTH_DEFAULT, |breadth| u32::try_from(breadth).unwrap_or(u32::MAX));
        let begins = !in_dialog && pool.is_some() && !matches!(incoming.method, Method::Register);
        let forks = match self.settings.options.fork {
            Fork::Serial if begins => self.settings.options.fork_targets - 1,
            _ => 0,
        };
        let wants_record = invite && !in_dialog && self.settings.options.cdr;
        let generation = self.transactions.next_generation();
        let transaction = Transaction {
            generation,
            key: incoming.key,
            method: incoming.method,
            state: State::Open,
            cancelled: false,
            link: Link::default(),
            from: message.from,
            client: reply_endpoint(message.from, &incoming.via),
            client_reliable: message.transport.is_stream(),
            transport: message.transport,
            source: message.remote,
            local: message.local,
            from_backend: target.from_backend,
            class,
            arrived: message.arrived,
            deadline,
            session: session_key(message, incoming.scan, incoming.uri, pool, router),
            call_id: incoming.call_id,
            dialog: DialogKey::of(message.bytes, incoming.scan, target.begun_by_backend),
            holder: None,
            further: Vec::new(),
            pool,
            creates_dialog: invite && !in_dialog,
            legs: self.transactions.list(),
            tried: [strowger_contract::BackendId(0); LEGS_MAX],
            tries: 0,
            retries: 0,
            forks_left: forks,
            breadth,
            contacts: Vec::new(),
            redirected: 0,
            best: Best { bytes: self.transactions.buffer(b""), ..Best::default() },
            named: Naming::default(),
            ticket: None,
            first_answer: None,
            ringing: None,
            answered_by: None,
            noted: false,
            hedge_at: None,
            hedged: false,
            record: wants_record.then(|| self.calls.record(incoming, target, pool)),
            request: self.transactions.buffer(message.bytes),
            reply: self.transactions.buffer(b""),
            repeat_at: None,
            repeat_after: self.settings.options.t1.0,
            ends_at: None,
            wakes_at: None,
        };
        if let Some(record) = &transaction.record {
            out.note(Note::Call(record.clone()));
        }
        let slot = self.transactions.insert(transaction);
        self.pace.first_try();
        let width = match self.settings.options.fork {
            Fork::Parallel if begins => u32::from(self.settings.options.fork_targets),
            _ => 1,
        };
        if breadth == 0 {
            let answer = Answer::new(440, "Max-Breadth Exceeded");
            return self.finish(now, slot, incoming.scan, &answer, RequestOutcome::Rejected, out);
        }
        let request = &message.bytes;
        let first = self.place_and_send(now, slot, request, incoming.scan, target, router, out);
        if let Err((answer, refusal)) = first {
            if let Some(refusal) = refusal {
                out.note(Note::Refused(class, refusal));
            }
            let rejected = RequestOutcome::Rejected;
            // A refusal is remembered, so that a retransmission does not get another answer, as long
            // as that takes no room from what can be served.
            let full =
                self.transactions.len() >= self.settings.options.max_transactions as usize / 2;
            let on_miss =
                refusal.map_or(OnMiss::Answer, |refusal| router.class(class).on_refusal(refusal));
            match on_miss {
                OnMiss::Answer => self.finish(now, slot, incoming.scan, &answer, rejected, out),
                silently => self.forget_refused(now, slot, answer.code, silently, out),
            }
            if full {
                self.transactions.remove(slot);
            }
            return;
        }
        if invite {
            self.answer_client(slot, incoming.scan, &Answer::new(100, "Trying"), out);
        }
        for _ in 1..width.min(breadth) {
            // Whoever else there is; that there are fewer is no failure.
            if self.place_and_send(now, slot, request, incoming.scan, target, router, out).is_err()
            {
                break;
            }
        }
        self.schedule(now, slot);
    }

    /// The key by which a registered user's instance is remembered: REGISTER's To, others'
    /// Request-URI.
    pub(crate) fn record_of(
        &self,
        method: Method,
        message: &[u8],
        scan: &Scan,
        uri: &[u8],
        router: &dyn Router,
    ) -> Option<strowger_contract::SessionKey> {
        if !self.settings.options.aor_affinity {
            return None;
        }
        let uri = match method {
            Method::Register => {
                scan.value(message, Name::To).and_then(crate::uri::name_addr).map(|(uri, _)| uri)?
            }
            _ => uri,
        };
        record_key(uri, router)
    }

    /// An ACK ends here when the answer that it acknowledges was passed on or made here as a
    /// non-2xx; else it goes the way of its dialog (16.6, 17.2.1).
    fn on_ack(
        &mut self,
        now: Instant,
        incoming: &Incoming<'_>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let t4 = self.settings.options.t4.0;
        if let Some(slot) = self.transactions.by_key(incoming.key)
            && let Some(transaction) = self.transactions.get(slot)
            && transaction.is_invite()
        {
            match transaction.state {
                State::Completed | State::Confirmed => {
                    transaction.state = State::Confirmed;
                    transaction.repeat_at = None;
                    // Timer I. Over UDP an instance may repeat its answer for longer (Timer D), and
                    // that is to be acknowledged, not passed on.
                    if !transaction.legs.iter().any(crate::transaction::Leg::is_datagram)
                        && transaction.further.is_empty()
                    {
                        let reliable = transaction.client_reliable;
                        let wait = if reliable { Duration::ZERO } else { t4 };
                        transaction.ends_at = Some(now + wait);
                    }
                    return self.schedule(now, slot);
                }
                State::Open => return out.drop_message("ack_before_answer"),
                State::Accepted => {}
            }
        }
        let to = incoming.scan.value(incoming.message.bytes, Name::To).unwrap_or_default();
        if is_our_tag(to, incoming.key) {
            return out.note(Note::Count("sip_acks_absorbed"));
        }
        let target = self.target_of(incoming, router);
        // Before it is handed over: the other worker gets it as it was read here.
        if self.would_tell(&target, router) {
            return out.drop_message("ack_would_tell");
        }
        if let Some(keeper) = self.kept_elsewhere(&target, incoming.method) {
            // Of a re-INVITE that went there, too.
            return out.hand_over(keeper, &incoming.message);
        }
        self.call_acknowledged(now, incoming, target.begun_by_backend, router);
        self.forward_stateless(now, incoming, &target, ClassId::CONTROL, router, out);
    }

    /// The worker that keeps the record of a request's call, if it is another one. What makes and what brings
    /// news of a subscription goes to one worker, the one that the dialog's first request names, so that a
    /// NOTIFY does not overtake the answer to its SUBSCRIBE, or to its REFER within a call.
    fn kept_elsewhere(&self, target: &Target<'_>, method: Method) -> Option<WorkerId> {
        let known =
            |keeper: &WorkerId| *keeper != self.settings.worker && keeper.0 < self.settings.workers;
        let subscribes = matches!(method, Method::Subscribe | Method::Refer | Method::Notify);
        let keeps = (self.settings.options.cdr || subscribes) && !self.settings.is_stateless();
        target.keeper.filter(known).filter(|_| keeps)
    }

    /// The worker that may have the INVITE of a CANCEL that came over a connection: 9.1 names a
    /// transaction by branch and sent-by, not by connection. Each worker is asked once, in a ring that
    /// ends where the connection is.
    fn next_to_ask(&self, incoming: &Incoming<'_>) -> Option<WorkerId> {
        let Endpoint::Client(flow) = incoming.message.from else { return None };
        let next = WorkerId((self.settings.worker.0 + 1) % self.settings.workers.max(1));
        (next != flow.worker()).then_some(next)
    }

    /// RFC 3261 16.10.
    fn on_cancel(
        &mut self,
        now: Instant,
        incoming: &Incoming<'_>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        if self.settings.is_stateless() {
            let target = self.target_of(incoming, router);
            if self.would_tell(&target, router) {
                return out.drop_message("cancel_would_tell");
            }
            return self.forward_stateless(now, incoming, &target, ClassId::CONTROL, router, out);
        }
        let Some(slot) = self.transactions.by_key(incoming.key) else {
            let keeper = self.kept_elsewhere(&self.target_of(incoming, router), Method::Cancel);
            let asked = match incoming.message.from {
                Endpoint::Client(_) => self.next_to_ask(incoming),
                _ => keeper,
            };
            if let Some(next) = asked {
                return out.hand_over(next, &incoming.message);
            }
            let answer = Answer::new(481, "Call/Transaction Does Not Exist");
            return reply(incoming, &answer, None, out);
        };
        reply(incoming, &Answer::new(200, "OK"), None, out);
        let Some(transaction) = self.transactions.get(slot) else { return };
        if transaction.state != State::Open || transaction.cancelled {
            return;
        }
        transaction.cancelled = true;
        transaction.contacts.clear();
        transaction.named = Naming::default();
        transaction.forks_left = 0;
        if let Some(ticket) = transaction.ticket {
            self.transactions.waited(ticket);
            router.withdraw(now, ticket);
        }
        self.cancel_legs(now, slot, None, out);
        if self.transactions.get(slot).is_some_and(|transaction| !transaction.is_pending()) {
            // Nobody has the INVITE yet: it waited.
            let answer = Answer::new(487, "Request Terminated");
            self.end_with(now, slot, &answer, RequestOutcome::Rejected, out);
        }
        self.schedule(now, slot);
    }
}

/// Answers without remembering: a retransmission gets the same answer again.
pub(crate) fn reply(
    incoming: &Incoming<'_>,
    answer: &Answer<'_>,
    told: Option<&Told>,
    out: &mut Outbox,
) {
    let message = &incoming.message;
    let to = reply_endpoint(message.from, &incoming.via);
    out.send(to, ClassId::CONTROL, |bytes| {
        respond(message.bytes, incoming.scan, message.remote, incoming.key, answer, told, bytes);
    });
}

/// RFC 3261 18.2.2 and RFC 3581 4: over UDP to the source's address, and to its port only if it asked.
pub(crate) fn reply_endpoint(from: Endpoint, via: &Via<'_>) -> Endpoint {
    match from {
        Endpoint::Datagram { socket, mut remote } => {
            if !via.wants_rport() {
                remote.set_port(via.port.unwrap_or(5060));
            }
            Endpoint::Datagram { socket, remote }
        }
        other => other,
    }
}

/// An answer of our own, for the figures.
pub(crate) fn answer_note(method: Method, code: u16) -> Note {
    Note::Answer { method: method.word(), class: (code / 100) as u8, backend: None }
}

pub(crate) fn note_refused(
    now: Instant,
    incoming: &Incoming<'_>,
    class: ClassId,
    code: u16,
    out: &mut Outbox,
) {
    out.note(answer_note(incoming.method, code));
    if incoming.method == Method::Invite
        && incoming.scan.value(incoming.message.bytes, Name::To).and_then(tag).is_none()
    {
        let outcome = AttemptOutcome::Rejected;
        out.note(Note::Attempt { outcome, backend: None, post_dial: None });
    }
    out.note(Note::Request {
        class,
        outcome: RequestOutcome::Rejected,
        backend: None,
        total: now.saturating_duration_since(incoming.message.arrived),
        at_backend: Duration::ZERO,
    });
}

/// When those may come again who are refused for what passes soon: in one second or two.
pub(crate) const SOON: Duration = Duration::from_millis(1_500);

impl SipEngine {
    /// A refusal in SIP's words.
    pub(crate) fn answer_for(&self, refusal: Refusal) -> Answer<'static> {
        match refusal {
            Refusal::SessionLost => Answer::new(481, "Call/Transaction Does Not Exist"),
            Refusal::Overloaded { retry_after } => {
                Answer { retry_after: Some(retry_after), ..Answer::new(503, "Overloaded") }
            }
            Refusal::TooLate => Answer { retry_after: Some(SOON), ..Answer::new(503, "Too Late") },
            Refusal::ShuttingDown => {
                Answer { retry_after: Some(SOON), ..Answer::new(503, "Shutting Down") }
            }
            _ => {
                let wanted = &self.settings.options.unavailable;
                let wait = wanted.retry_after.0;
                Answer {
                    retry_after: (!wait.is_zero()).then_some(wait),
                    ..Answer::new(wanted.code, "No Instance Available")
                }
            }
        }
    }
}

/// Whether the table knows a session by the Call-ID.
fn has_session(now: Instant, incoming: &Incoming<'_>, router: &mut dyn Router) -> bool {
    let session = session_key(&incoming.message, incoming.scan, incoming.uri, None, router);
    router.session_class(now, session).is_some()
}
