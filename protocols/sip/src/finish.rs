//! What goes to the client: answers passed on or made here, kept for repetition, counted once.

use std::time::{Duration, Instant};

use strowger_contract::{
    AttemptOutcome, ClassId, Closing, Endpoint, Note, OnMiss, Outbox, Outcome, RequestOutcome,
    Router,
};

use crate::engine::SipEngine;
use crate::method::Method;
use crate::requests::answer_note;
use crate::respond::{Answer, respond};
use crate::responses::attempt_of;
use crate::scan::Scan;
use crate::send::Origin;
use crate::transaction::State;
use crate::write::backward;

/// How a leg ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdicts {
    Answered,
    Refused,
    TimedOut,
    Lost,
    Abandoned,
}

impl SipEngine {
    /// A response as the client gets it, in `into`.
    pub(crate) fn rendered(
        &mut self,
        slot: u32,
        message: &[u8],
        scan: &Scan,
        as_500: bool,
        into: &mut Vec<u8>,
        router: &dyn Router,
    ) {
        into.clear();
        backward(message, scan, as_500, self.overload.telling.as_ref(), into);
        let Some(transaction) = self.transactions.get(slot) else { return };
        let side = (transaction.transport, transaction.local);
        let socket = (side.0, self.settings.local.receiving(side.0, side.1));
        let spare = (&mut self.edit_scan, &mut self.edited);
        let unrecorded = attempt_of(message, scan)
            .and_then(|attempt| transaction.leg(attempt))
            .is_some_and(|leg| leg.pin.is_none());
        let (sides, keys) = ((transaction.from_backend, unrecorded), router.token_keys());
        self.settings.hide_response(into, sides, socket, keys, spare);
        if self.settings.options.header_rules.is_empty() {
            return;
        }
        let origin = Origin {
            client: transaction.client,
            source: transaction.source,
            transport: transaction.transport,
            local: transaction.local,
            method: transaction.method,
            // What asserts identities here is an instance.
            from_backend: true,
        };
        self.edit(into, &origin, sides.0, router);
    }

    /// Sends a response on to the client and keeps it for repetition.
    pub(crate) fn relay(
        &mut self,
        slot: u32,
        message: &[u8],
        scan: &Scan,
        router: &dyn Router,
        out: &mut Outbox,
    ) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        let mut reply = std::mem::take(&mut transaction.reply);
        self.rendered(slot, message, scan, false, &mut reply, router);
        let Some(transaction) = self.transactions.get(slot) else { return };
        transaction.reply = reply;
        out.send(transaction.client, ClassId::CONTROL, |bytes| {
            bytes.extend_from_slice(&transaction.reply)
        });
    }

    /// Sends a 2xx on that comes behind another final answer; that one stays what is repeated.
    pub(crate) fn relay_beside(
        &mut self,
        slot: u32,
        message: &[u8],
        scan: &Scan,
        router: &dyn Router,
        out: &mut Outbox,
    ) {
        let mut sent = std::mem::take(&mut self.scratch);
        self.rendered(slot, message, scan, false, &mut sent, router);
        if let Some(transaction) = self.transactions.get(slot) {
            out.send(transaction.client, ClassId::CONTROL, |bytes| bytes.extend_from_slice(&sent));
        }
        self.scratch = sent;
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
        let request = std::mem::take(&mut transaction.request);
        self.write_answer(slot, &request, scan, answer, out);
        if let Some(transaction) = self.transactions.get(slot) {
            transaction.request = request;
        }
    }

    fn write_answer(
        &mut self,
        slot: u32,
        request: &[u8],
        scan: &Scan,
        answer: &Answer<'_>,
        out: &mut Outbox,
    ) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        let (source, key) = (transaction.source, transaction.key);
        transaction.reply.clear();
        let told = self.overload.telling.as_ref();
        respond(request, scan, source, key, answer, told, &mut transaction.reply);
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
        if let Some(transaction) = self.transactions.get(slot) {
            out.note(answer_note(transaction.method, answer.code));
        }
        self.note_attempt(now, slot, answer.code, true, out);
        self.note_end(now, slot, Some(outcome), out);
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
        self.complete(now, slot);
        self.with_request(slot, |engine, request, scan| {
            engine.write_answer(slot, request, scan, answer, out);
        });
        if let Some(transaction) = self.transactions.get(slot) {
            out.note(answer_note(transaction.method, answer.code));
        }
        self.note_attempt(now, slot, answer.code, true, out);
        self.note_end(now, slot, Some(outcome), out);
        self.schedule(now, slot);
    }

    /// A refusal that is not said (`on_miss`): repetitions of the request are still absorbed.
    pub(crate) fn forget_refused(
        &mut self,
        now: Instant,
        slot: u32,
        code: u16,
        how: OnMiss,
        out: &mut Outbox,
    ) {
        self.complete(now, slot);
        let Some(transaction) = self.transactions.get(slot) else { return };
        // Nothing is repeated, nothing acknowledged; a 100 that went out says nothing any more.
        transaction.repeat_at = None;
        transaction.reply.clear();
        match (how, transaction.client) {
            (OnMiss::Reset, client @ Endpoint::Client(_)) => {
                out.note(Note::Count("refused_by_reset"));
                out.close(client, Closing::Reset);
            }
            _ => out.drop_message("refused_silently"),
        }
        self.note_attempt(now, slot, code, true, out);
        self.note_end(now, slot, Some(RequestOutcome::Rejected), out);
        self.schedule(now, slot);
    }

    /// A non-2xx final answer goes out: Timers G, H, J.
    pub(crate) fn complete(&mut self, now: Instant, slot: u32) {
        let (t1, timeout, t4) =
            (self.settings.options.t1.0, self.settings.timeout(), self.settings.options.t4.0);
        let Some(transaction) = self.transactions.get(slot) else { return };
        transaction.state = State::Completed;
        for leg in &mut transaction.legs {
            (leg.failover_at, leg.expires_at) = (None, None);
            if leg.cancel != crate::transaction::Cancel::Sent {
                leg.repeat_at = None;
            }
        }
        let invite = transaction.is_invite();
        transaction.repeat_after = t1;
        transaction.repeat_at = (invite && !transaction.client_reliable).then(|| now + t1);
        let wait = if invite || !transaction.client_reliable { timeout } else { t4 };
        transaction.ends_at = Some(now + wait);
    }

    /// Tells the router how a leg ended, once.
    pub(crate) fn settle_leg(
        &mut self,
        now: Instant,
        slot: u32,
        attempt: u8,
        verdict: Verdicts,
        router: &mut dyn Router,
    ) {
        let Some(leg) = self.transactions.get(slot).and_then(|known| known.leg(attempt)) else {
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

    /// Tells the router of all legs that it still awaits, but for those whose instances work on: the losing
    /// copy of what was hedged.
    pub(crate) fn settle_others(&mut self, now: Instant, slot: u32, router: &mut dyn Router) {
        if !self.transactions.get(slot).is_some_and(|known| known.hedged) {
            self.settle_all(now, slot, router);
        }
    }

    /// Tells the router of all legs that it still awaits.
    pub(crate) fn settle_all(&mut self, now: Instant, slot: u32, router: &mut dyn Router) {
        let legs = self.transactions.get(slot).map_or(0, |known| known.legs.len() as u8);
        for attempt in 1..=legs {
            self.settle_leg(now, slot, attempt, Verdicts::Abandoned, router);
        }
    }

    /// Counts how an attempt at a call came out, once, and closes its record if it failed.
    pub(crate) fn note_attempt(
        &mut self,
        now: Instant,
        slot: u32,
        code: u16,
        by_edge: bool,
        out: &mut Outbox,
    ) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        if transaction.noted || !transaction.creates_dialog {
            return;
        }
        let outcome = match code {
            200..300 => AttemptOutcome::Answered,
            _ if transaction.cancelled => AttemptOutcome::Cancelled,
            _ if by_edge && transaction.legs.is_empty() => AttemptOutcome::Rejected,
            408 | 500..600 => AttemptOutcome::Failed,
            _ => AttemptOutcome::Unanswered,
        };
        let total = now.saturating_duration_since(transaction.arrived);
        let answered = outcome == AttemptOutcome::Answered;
        let post_dial = transaction.ringing.or_else(|| answered.then_some(total));
        out.note(Note::Attempt { outcome, backend: transaction.answered_by, post_dial });
        if !answered {
            self.call_failed(now, slot, code, by_edge, out);
        }
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
        let invite = transaction.is_invite();
        let waited = if invite { transaction.first_answer.unwrap_or(total) } else { total };
        let timely = if waited <= promised { RequestOutcome::Met } else { RequestOutcome::Late };
        let answered = transaction.answered_by;
        let leg =
            transaction.legs.iter().rev().find(|leg| answered.is_none() || leg.backend == answered);
        out.note(Note::Request {
            class: transaction.class,
            outcome: outcome.unwrap_or(timely),
            backend: answered.or_else(|| leg.and_then(|leg| leg.backend)),
            total: waited,
            at_backend: leg
                .map_or(Duration::ZERO, |leg| now.saturating_duration_since(leg.sent_at))
                .min(waited),
        });
    }

    /// A BYE is through: its call is over, whatever was said to it.
    pub(crate) fn bye_ended(
        &mut self,
        now: Instant,
        slot: u32,
        (code, by_edge): (u16, bool),
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        if transaction.method != Method::Bye {
            return;
        }
        // It was sent and nobody answered, be it for a timer or a connection that broke.
        let unanswered = by_edge && !transaction.legs.is_empty();
        let (session, dialog) = (transaction.session, transaction.dialog);
        let from_backend = transaction.from_backend;
        let owner =
            transaction.legs.iter().rev().find_map(|leg| {
                leg.backend.or_else(|| leg.pin.and_then(|pin| router.resolve(pin)))
            });
        // RFC 3261 12.2.1.2, 15.1.1: 481 and no answer end it as well; 401 and the like do not.
        if unanswered || matches!(code, 200..300 | 408 | 481) {
            // Another instance's answer to the same INVITE is another dialog: ending it gives nothing
            // back of the one that was counted.
            let counted = router.lookup(now, session);
            if owner.is_none() || counted.is_none() || counted == owner {
                router.forget(now, session);
            }
            router.forget(now, dialog.unacknowledged(session));
            self.call_ended(now, (session, dialog), from_backend, code, out);
        }
    }
}
