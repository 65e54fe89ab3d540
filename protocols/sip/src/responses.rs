//! Responses: matched to the transaction that our branch names (RFC 3261 16.7), or, when nothing is
//! known of it any more, sent back the way that the Via headers say.

use std::time::Instant;

use strowger_contract::{
    ClassId, CloseCause, Endpoint, Message, Note, Outbox, Outcome, Query, RequestOutcome, Router,
    Transport, Verdict, stable_hash,
};

use crate::branch::Branch;
use crate::engine::SipEngine;
use crate::requests::NextHop;
use crate::respond::{Answer, follow_up, respond};
use crate::scan::{Name, Scan};
use crate::target::target;
use crate::transaction::{Cancel, State};
use crate::via::Via;
use crate::write::backward;

/// A response came in.
pub(crate) fn on_response(
    engine: &mut SipEngine,
    now: Instant,
    message: &Message<'_>,
    scan: &Scan,
    code: u16,
    router: &mut dyn Router,
    out: &mut Outbox,
) {
    let bytes = message.bytes;
    let via = scan.value(bytes, Name::Via).and_then(Via::first);
    let branch = via.and_then(|(via, _)| via.branch()).and_then(Branch::read);
    let Some((branch, token)) = branch else {
        return out.drop_message("response_not_ours");
    };
    let for_cancel = is_for_cancel(scan, bytes);
    let call_id = stable_hash(scan.value(bytes, Name::CallId).unwrap_or_default());
    if !branch.stateless {
        if branch.worker != engine.settings.worker && branch.worker.0 < engine.settings.workers {
            return out.hand_over(branch.worker, message);
        }
        if for_cancel {
            return engine.on_cancel_answered(&branch);
        }
        let attempt =
            engine.transactions.current(branch.slot, branch.generation).map(|known| known.attempt);
        if let Some(attempt) = attempt {
            if attempt != branch.attempt {
                // An instance that was given up speaks at last.
                let genuine = branch.verify(token, call_id, router);
                match genuine {
                    Some(branch) => engine.on_late(now, message, scan, code, &branch, router, out),
                    None => out.drop_message("response_forged"),
                }
                return;
            }
            return engine.on_answer(now, branch.slot, message, scan, code, router, out);
        }
    }
    // RFC 6026 forbids to pass on strays; ours carries our signature, so it was asked for, and the
    // call of a client that has waited through the edge's restart is not lost.
    if branch.verify(token, call_id, router).is_none() {
        return out.drop_message("response_forged");
    }
    pass_back(engine, message, scan, out);
}

/// RFC 3261 16.11, 18.2.2: back by the next Via.
fn pass_back(engine: &SipEngine, message: &Message<'_>, scan: &Scan, out: &mut Outbox) {
    let bytes = message.bytes;
    let first = scan.value(bytes, Name::Via).and_then(Via::first);
    let second = match first {
        Some((_, Some(rest))) => Via::first(rest),
        _ => scan.all(Name::Via).nth(1).and_then(|header| Via::first(header.value.of(bytes))),
    };
    let Some((via, _)) = second else { return out.drop_message("response_without_next_via") };
    let transport = if via.is_stream() { Transport::Tcp } else { Transport::Udp };
    let to =
        via.response_address().and_then(|address| engine.settings.endpoint(transport, address));
    let Some(to) = to else { return out.drop_message("response_to_host_name") };
    out.note(Note::Count("sip_responses_stateless"));
    out.send(to, ClassId::CONTROL, |buffer| backward(bytes, scan, false, buffer));
}

impl SipEngine {
    /// An answer to what is under way.
    #[allow(clippy::too_many_arguments, reason = "what every handler gets")]
    fn on_answer(
        &mut self,
        now: Instant,
        slot: u32,
        message: &Message<'_>,
        scan: &Scan,
        code: u16,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        match code {
            100..200 => self.on_provisional(now, slot, message, scan, code, out),
            200..300 => self.on_success(now, slot, message, scan, router, out),
            _ => self.on_failure(now, slot, message, scan, code, router, out),
        }
        self.schedule(now, slot);
    }

    fn on_provisional(
        &mut self,
        now: Instant,
        slot: u32,
        message: &Message<'_>,
        scan: &Scan,
        code: u16,
        out: &mut Outbox,
    ) {
        let (t2, timer_c) = (self.settings.options.t2.0, self.settings.options.timer_c.0);
        let Some(transaction) = self.transactions.get(slot) else { return };
        if let Some(leg) = &mut transaction.leg {
            leg.provisional = true;
        }
        if transaction.state == State::Accepted && transaction.cancel == Cancel::Wanted {
            // Another instance won, and this one can be told only now.
            return self.send_cancel(now, slot, out);
        }
        if transaction.state != State::Open {
            return;
        }
        transaction.failover_at = None;
        if transaction.invite {
            // Once it is cancelled, ringing on wins it no more time.
            if transaction.cancel != Cancel::Sent {
                transaction.repeat_at = None;
                transaction.expires_at = Some(now + timer_c);
            }
        } else if transaction.repeat_at.is_some() {
            // 17.1.2.2: once it is known to be alive, it is reminded every T2.
            transaction.repeat_after = t2;
        }
        let waited = now.saturating_duration_since(transaction.arrived);
        transaction.first_answer.get_or_insert(waited);
        if code > 100 {
            self.relay(slot, message, scan, false, out);
        }
        if self
            .transactions
            .get(slot)
            .is_some_and(|transaction| transaction.cancel == Cancel::Wanted)
        {
            self.send_cancel(now, slot, out);
        }
    }

    fn on_success(
        &mut self,
        now: Instant,
        slot: u32,
        message: &Message<'_>,
        scan: &Scan,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let timeout = self.settings.timeout();
        let Some(transaction) = self.transactions.get(slot) else { return };
        match transaction.state {
            State::Accepted => return self.relay(slot, message, scan, false, out),
            State::Completed | State::Confirmed if transaction.invite => {
                // RFC 3261 16.7 step 5: a 2xx is always passed on, also behind another answer.
                return self.relay(slot, message, scan, false, out);
            }
            State::Completed | State::Confirmed => return out.drop_message("answer_repeated"),
            State::Open => {}
        }
        self.settle_leg(now, slot, Verdicts::Answered, router);
        let Some(transaction) = self.transactions.get(slot) else { return };
        let backend = transaction.leg.and_then(|leg| leg.backend);
        if transaction.creates_dialog
            && let (Some(backend), Some(pool)) = (backend, transaction.pool)
        {
            let ttl = router.session_ttl(pool);
            router.hold(now, transaction.session, backend, transaction.class, ttl);
        }
        if transaction.bye {
            router.forget(now, transaction.session);
        }
        let Some(transaction) = self.transactions.get(slot) else { return };
        transaction.state = if transaction.invite { State::Accepted } else { State::Completed };
        transaction.repeat_at = None;
        transaction.failover_at = None;
        transaction.expires_at = None;
        // Timers L (INVITE) and J.
        let wait = if transaction.invite || !transaction.client_reliable {
            timeout
        } else {
            self.settings.options.t4.0
        };
        if let Some(transaction) = self.transactions.get(slot) {
            transaction.ends_at = Some(now + wait);
        }
        self.relay(slot, message, scan, false, out);
        self.note_end(now, slot, None, out);
    }

    #[allow(clippy::too_many_arguments, reason = "what every handler gets")]
    fn on_failure(
        &mut self,
        now: Instant,
        slot: u32,
        message: &Message<'_>,
        scan: &Scan,
        code: u16,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        if transaction.invite {
            // 17.1.1.2: each one is acknowledged, also repetitions.
            self.acknowledge(slot, message.bytes, scan, out);
        }
        let Some(transaction) = self.transactions.get(slot) else { return };
        if transaction.state != State::Open {
            if transaction.state == State::Accepted {
                // The one that lost is through.
                transaction.repeat_at = None;
            }
            return out.drop_message("answer_repeated");
        }
        let unavailable = code == 503;
        let provisional = transaction.leg.is_some_and(|leg| leg.provisional);
        let verdict = if unavailable { Verdicts::Refused } else { Verdicts::Answered };
        self.settle_leg(now, slot, verdict, router);
        if unavailable && !provisional && self.fail_over(now, slot, "answered_503", router, out) {
            return;
        }
        let Some(transaction) = self.transactions.get(slot) else { return };
        if transaction.bye && matches!(code, 408 | 481) {
            router.forget(now, transaction.session);
        }
        let from_backend = transaction.leg.is_some_and(|leg| leg.backend.is_some());
        self.complete(now, slot);
        self.relay(slot, message, scan, unavailable && from_backend, out);
        let outcome = unavailable.then_some(RequestOutcome::Failed);
        self.note_end(now, slot, outcome, out);
    }

    /// A response to a try that was given up. An instance that rings is cancelled, a refusal is
    /// acknowledged, and a 2xx still reaches the client: the first one wins, and what is tried now
    /// is cancelled (16.7 steps 5 and 10).
    #[allow(clippy::too_many_arguments, reason = "what every handler gets")]
    fn on_late(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        scan: &Scan,
        code: u16,
        branch: &Branch,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(transaction) = self.transactions.get(branch.slot) else { return };
        if !transaction.invite {
            return out.drop_message("answer_late");
        }
        match code {
            100..200 => self.follow_late("CANCEL", branch.slot, message, scan, out),
            200..300 => self.on_late_success(now, message, scan, branch, router, out),
            _ => {
                self.follow_late("ACK", branch.slot, message, scan, out);
                out.drop_message("answer_late");
            }
        }
    }

    fn on_late_success(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        scan: &Scan,
        branch: &Branch,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let (slot, timeout) = (branch.slot, self.settings.timeout());
        out.note(Note::Count("sip_late_success"));
        let Some(transaction) = self.transactions.get(slot) else { return };
        if transaction.state != State::Open {
            let client = transaction.client;
            return out.send(client, ClassId::CONTROL, |bytes| {
                backward(message.bytes, scan, false, bytes)
            });
        }
        self.settle_leg(now, slot, Verdicts::Abandoned, router);
        let Some(transaction) = self.transactions.get(slot) else { return };
        let backend = branch.pin.and_then(|pin| router.resolve(pin));
        if transaction.creates_dialog
            && let (Some(backend), Some(pool)) = (backend, transaction.pool)
        {
            let ttl = router.session_ttl(pool);
            router.hold(now, transaction.session, backend, transaction.class, ttl);
        }
        transaction.state = State::Accepted;
        transaction.repeat_at = None;
        transaction.failover_at = None;
        transaction.expires_at = None;
        transaction.ends_at = Some(now + timeout);
        if transaction.cancel == Cancel::No {
            transaction.cancel = Cancel::Wanted;
        }
        let tell = transaction.cancel == Cancel::Wanted
            && transaction.leg.is_some_and(|leg| leg.provisional);
        self.relay(slot, message, scan, false, out);
        self.note_end(now, slot, None, out);
        if tell {
            self.send_cancel(now, slot, out);
        }
        self.schedule(now, slot);
    }

    /// The CANCEL or ACK of a try that was given up: by the Via of its response, to where that came
    /// from.
    fn follow_late(
        &mut self,
        method: &str,
        slot: u32,
        message: &Message<'_>,
        scan: &Scan,
        out: &mut Outbox,
    ) {
        let mut sent_scan = std::mem::take(&mut self.other_scan);
        if let Some(transaction) = self.transactions.get(slot)
            && let Some((via, _)) = scan.value(message.bytes, Name::Via).and_then(Via::first)
            && sent_scan.scan(&transaction.sent).is_ok()
        {
            let to = if method == "ACK" {
                scan.value(message.bytes, Name::To)
            } else {
                sent_scan.value(&transaction.sent, Name::To)
            };
            let to = to.unwrap_or_default();
            out.send(message.from, ClassId::CONTROL, |bytes| {
                follow_up(method, &transaction.sent, &sent_scan, to, Some(via.whole), bytes)
            });
        }
        self.other_scan = sent_scan;
    }

    /// Our CANCEL was heard: it need not be repeated.
    fn on_cancel_answered(&mut self, branch: &Branch) {
        if let Some(transaction) = self.transactions.current(branch.slot, branch.generation)
            && transaction.attempt == branch.attempt
            && transaction.is_cancelling()
        {
            transaction.repeat_at = None;
        }
    }

    /// Sends a response on to the client and keeps it for repetition.
    fn relay(
        &mut self,
        slot: u32,
        message: &Message<'_>,
        scan: &Scan,
        as_500: bool,
        out: &mut Outbox,
    ) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        transaction.reply.clear();
        backward(message.bytes, scan, as_500, &mut transaction.reply);
        out.send(transaction.client, ClassId::CONTROL, |bytes| {
            bytes.extend_from_slice(&transaction.reply)
        });
    }

    /// Answers the client ourselves and keeps the answer for repetition.
    pub(crate) fn answer_client(
        &mut self,
        slot: u32,
        scan: &Scan,
        answer: &Answer<'_>,
        out: &mut Outbox,
    ) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        transaction.reply.clear();
        respond(
            &transaction.request,
            scan,
            transaction.source,
            transaction.key,
            answer,
            &mut transaction.reply,
        );
        out.send(transaction.client, ClassId::CONTROL, |bytes| {
            bytes.extend_from_slice(&transaction.reply)
        });
    }

    /// Ends the request with an answer of our own.
    pub(crate) fn finish(
        &mut self,
        now: Instant,
        slot: u32,
        scan: &Scan,
        answer: &Answer<'_>,
        outcome: RequestOutcome,
        out: &mut Outbox,
    ) {
        self.complete(now, slot);
        self.answer_client(slot, scan, answer, out);
        self.note_end(now, slot, Some(outcome), out);
        self.schedule(now, slot);
    }

    /// A non-2xx final answer goes out: Timers G, H, J.
    pub(crate) fn complete(&mut self, now: Instant, slot: u32) {
        let (t1, timeout) = (self.settings.options.t1.0, self.settings.timeout());
        let Some(transaction) = self.transactions.get(slot) else { return };
        transaction.state = State::Completed;
        transaction.failover_at = None;
        transaction.expires_at = None;
        transaction.repeat_after = t1;
        let repeats = transaction.invite && !transaction.client_reliable;
        transaction.repeat_at = repeats.then(|| now + t1);
        let wait = if transaction.invite || !transaction.client_reliable {
            timeout
        } else {
            self.settings.options.t4.0
        };
        if let Some(transaction) = self.transactions.get(slot) {
            transaction.ends_at = Some(now + wait);
        }
    }

    /// Tells the router how the leg ended, once.
    pub(crate) fn settle_leg(
        &mut self,
        now: Instant,
        slot: u32,
        verdict: Verdicts,
        router: &mut dyn Router,
    ) {
        let Some(leg) = self.transactions.get(slot).and_then(|known| known.leg.as_mut()) else {
            return;
        };
        let Some(backend) = leg.backend.filter(|_| std::mem::take(&mut leg.owed)) else { return };
        let latency = now.saturating_duration_since(leg.sent_at);
        let outcome = match verdict {
            Verdicts::Answered => Outcome::Answered { latency },
            Verdicts::Refused => Outcome::Refused,
            Verdicts::TimedOut => Outcome::TimedOut,
            Verdicts::Lost => Outcome::Lost,
            Verdicts::Abandoned => Outcome::Abandoned,
        };
        router.outcome(now, backend, outcome);
    }

    /// Counts the request's end, once.
    pub(crate) fn note_end(
        &mut self,
        now: Instant,
        slot: u32,
        outcome: Option<RequestOutcome>,
        out: &mut Outbox,
    ) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        if std::mem::replace(&mut transaction.noted, true) {
            return;
        }
        let total = now.saturating_duration_since(transaction.arrived);
        // The promise to an INVITE is the first sign of life, not the end of the ringing.
        let promised = transaction.deadline.saturating_duration_since(transaction.arrived);
        let waited =
            if transaction.invite { transaction.first_answer.unwrap_or(total) } else { total };
        let timely = if waited <= promised { RequestOutcome::Met } else { RequestOutcome::Late };
        let leg = transaction.leg;
        out.note(Note::Request {
            class: transaction.class,
            outcome: outcome.unwrap_or(timely),
            backend: leg.and_then(|leg| leg.backend),
            total: waited,
            at_backend: leg
                .map(|leg| now.saturating_duration_since(leg.sent_at))
                .unwrap_or_default()
                .min(waited),
        });
    }

    /// Tries the next instance, if there is one and the class allows; the leg's outcome is told.
    pub(crate) fn fail_over(
        &mut self,
        now: Instant,
        slot: u32,
        why: &'static str,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) -> bool {
        let timeout = self.settings.timeout();
        let Some(transaction) = self.transactions.get(slot) else { return false };
        let Some(pool) = transaction.pool.filter(|_| transaction.cancel == Cancel::No) else {
            return false;
        };
        let tries = usize::from(transaction.tries);
        if tries > usize::from(router.class(transaction.class).retry)
            || tries >= crate::transaction::TRIES_MAX
        {
            return false;
        }
        let mut scan = std::mem::take(&mut self.other_scan);
        let request = std::mem::take(&mut transaction.request);
        let outcome =
            self.fail_over_with(now, slot, &request, &mut scan, pool, timeout, router, out);
        if let Some(transaction) = self.transactions.get(slot) {
            transaction.request = request;
        }
        let done = outcome.is_some();
        if let Some((target, hop)) = outcome {
            out.note(Note::Retry(why));
            self.send_leg(now, slot, &scan, &target, hop, router, out);
        }
        self.other_scan = scan;
        done
    }

    #[allow(clippy::too_many_arguments, reason = "the pieces of one step")]
    fn fail_over_with(
        &mut self,
        now: Instant,
        slot: u32,
        request: &[u8],
        scan: &mut Scan,
        pool: strowger_contract::PoolId,
        timeout: std::time::Duration,
        router: &mut dyn Router,
        _out: &mut Outbox,
    ) -> Option<(crate::target::Target<'static>, NextHop)> {
        scan.scan(request).ok()?;
        let transaction = self.transactions.get(slot)?;
        let message = Message {
            from: transaction.client,
            transport: transaction.transport,
            remote: transaction.source,
            local: transaction.local,
            arrived: transaction.arrived,
            bytes: request,
        };
        let (class, session, call_id) =
            (transaction.class, transaction.session, transaction.call_id);
        let (tried, tries) = (transaction.tried, usize::from(transaction.tries));
        let crate::scan::Start::Request { method, uri } = scan.start else { return None };
        let wanted = target(
            &self.settings,
            &message,
            scan,
            method.of(request),
            uri.of(request),
            call_id,
            router,
        );
        let crate::target::Hop::Backend { pin, in_session, .. } = wanted.hop else { return None };
        if pin.is_some() {
            // Nobody else has the dialog.
            return None;
        }
        let query = Query {
            pool,
            session,
            pin: None,
            in_session,
            awaits: true,
            class,
            deadline: now + timeout,
            capability: 0,
            exclude: &tried[..tries],
        };
        let Verdict::Go(route) = router.route(now, &query) else { return None };
        // What the target borrows from the request it does not need: no token, so nothing moved but
        // our own Route values.
        let fixed = crate::target::Target {
            hop: wanted.hop,
            pop_routes: wanted.pop_routes,
            uri: None,
            drop_last_route: false,
            add_route: None,
            begun_by_backend: wanted.begun_by_backend,
        };
        Some((fixed, NextHop::of(&route)))
    }

    /// The connection that the request went over is gone.
    pub(crate) fn on_lost(
        &mut self,
        now: Instant,
        slot: u32,
        _cause: CloseCause,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        let provisional = transaction.leg.is_some_and(|leg| leg.provisional);
        self.settle_leg(now, slot, Verdicts::Lost, router);
        if provisional || !self.fail_over(now, slot, "connection_lost", router, out) {
            self.end_with(
                now,
                slot,
                &Answer::new(500, "Connection To The Instance Lost"),
                RequestOutcome::Failed,
                out,
            );
        }
        self.schedule(now, slot);
    }

    /// Ends the request with an answer of our own, from what is kept of it.
    pub(crate) fn end_with(
        &mut self,
        now: Instant,
        slot: u32,
        answer: &Answer<'_>,
        outcome: RequestOutcome,
        out: &mut Outbox,
    ) {
        let mut scan = std::mem::take(&mut self.other_scan);
        let known = self
            .transactions
            .get(slot)
            .is_some_and(|transaction| scan.scan(&transaction.request).is_ok());
        if known {
            self.finish(now, slot, &scan, answer, outcome, out);
        }
        self.other_scan = scan;
    }

    /// RFC 3261 17.1.1.3: the ACK of a non-2xx answer is ours.
    fn acknowledge(&mut self, slot: u32, response: &[u8], scan: &Scan, out: &mut Outbox) {
        let mut sent_scan = std::mem::take(&mut self.other_scan);
        if let Some(transaction) = self.transactions.get(slot)
            && let Some(leg) = transaction.leg
            && sent_scan.scan(&transaction.sent).is_ok()
        {
            let to = scan.value(response, Name::To).unwrap_or_default();
            out.send(leg.to, ClassId::CONTROL, |bytes| {
                follow_up("ACK", &transaction.sent, &sent_scan, to, None, bytes)
            });
        }
        self.other_scan = sent_scan;
    }

    /// RFC 3261 9.1: our own CANCEL, for the leg that rings.
    pub(crate) fn send_cancel(&mut self, now: Instant, slot: u32, out: &mut Outbox) {
        let (t1, timeout) = (self.settings.options.t1.0, self.settings.timeout());
        let Some(transaction) = self.transactions.get(slot) else { return };
        let Some(leg) = transaction.leg else { return };
        transaction.cancel = Cancel::Sent;
        if transaction.state == State::Open {
            // 9.1: an instance that never answers the INVITE after this is given up.
            transaction.expires_at = Some(now + timeout);
        }
        transaction.repeat_after = t1;
        transaction.repeat_at = matches!(leg.to, Endpoint::Datagram { .. }).then(|| now + t1);
        self.write_cancel(slot, out);
        self.schedule(now, slot);
    }

    pub(crate) fn write_cancel(&mut self, slot: u32, out: &mut Outbox) {
        let mut sent_scan = std::mem::take(&mut self.other_scan);
        if let Some(transaction) = self.transactions.get(slot)
            && let Some(leg) = transaction.leg
            && sent_scan.scan(&transaction.sent).is_ok()
        {
            let to = sent_scan.value(&transaction.sent, Name::To).unwrap_or_default();
            out.send(leg.to, ClassId::CONTROL, |bytes| {
                follow_up("CANCEL", &transaction.sent, &sent_scan, to, None, bytes)
            });
        }
        self.other_scan = sent_scan;
    }
}

/// How a leg ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdicts {
    Answered,
    Refused,
    TimedOut,
    Lost,
    Abandoned,
}

/// Responses to our own CANCEL carry the INVITE's branch; they end here.
fn is_for_cancel(scan: &Scan, bytes: &[u8]) -> bool {
    scan.value(bytes, Name::CSeq).is_some_and(|cseq| cseq.ends_with(b"CANCEL"))
}
