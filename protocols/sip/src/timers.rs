//! Time in transactions: repetition, fail-over, expiry, the end (RFC 3261 17, table 4).

use std::time::Instant;

use strowger_contract::{ClassId, Note, Outbox, RequestOutcome, Router};

use crate::engine::SipEngine;
use crate::respond::Answer;
use crate::responses::Verdicts;
use crate::transaction::{Cancel, State};

impl SipEngine {
    /// The wheel looks at a transaction.
    pub(crate) fn on_wake(
        &mut self,
        now: Instant,
        slot: u32,
        generation: u32,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(transaction) = self.transactions.current(slot, generation) else { return };
        if transaction.wakes_at.is_some_and(|wakes| wakes > now) {
            return;
        }
        transaction.wakes_at = None;
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if due(transaction.ends_at) {
            self.settle_leg(now, slot, Verdicts::Abandoned, router);
            self.note_end(now, slot, None, out);
            return self.transactions.remove(slot);
        }
        if due(transaction.expires_at) {
            self.on_expired(now, slot, router, out);
        } else if due(transaction.failover_at) {
            self.on_silence(now, slot, router, out);
        } else if due(transaction.repeat_at) {
            self.repeat(now, slot, router, out);
        }
        self.schedule(now, slot);
    }

    /// Timers A and E towards the instance, G towards the client.
    fn repeat(&mut self, now: Instant, slot: u32, router: &dyn Router, out: &mut Outbox) {
        let t2 = self.settings.options.t2.0;
        let Some(transaction) = self.transactions.get(slot) else { return };
        let open = transaction.state == State::Open;
        // Timer A has no ceiling (17.1.1.2), E and G stop at T2.
        let doubled = transaction.repeat_after * 2;
        transaction.repeat_after =
            if open && transaction.invite { doubled } else { doubled.min(t2) };
        transaction.repeat_at = Some(now + transaction.repeat_after);
        let gone = |backend| router.backend(backend).is_none();
        if (open || transaction.is_cancelling())
            && transaction.leg.and_then(|leg| leg.backend).is_some_and(gone)
        {
            // Another instance may be at its address by now.
            transaction.repeat_at = None;
            return;
        }
        if transaction.is_cancelling() {
            // 17.1.2: a CANCEL is repeated as any request but INVITE.
            transaction.repeat_after = transaction.repeat_after.min(t2);
            transaction.repeat_at = Some(now + transaction.repeat_after);
            return self.write_cancel(slot, out);
        }
        let (to, bytes) = if open {
            let Some(leg) = transaction.leg else { return };
            out.note(Note::Count("sip_requests_repeated"));
            (leg.to, &transaction.sent)
        } else {
            out.note(Note::Count("sip_answers_repeated"));
            (transaction.client, &transaction.reply)
        };
        out.send(to, ClassId::CONTROL, |buffer| buffer.extend_from_slice(bytes));
    }

    /// The instance gave no sign of life.
    fn on_silence(&mut self, now: Instant, slot: u32, router: &mut dyn Router, out: &mut Outbox) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        transaction.failover_at = None;
        self.settle_leg(now, slot, Verdicts::TimedOut, router);
        // Without another it is reminded on until Timer B or F.
        if self.fail_over(now, slot, "silent", router, out) {
            out.note(Note::Count("sip_failovers"));
        }
    }

    /// Timers B, F and C.
    fn on_expired(&mut self, now: Instant, slot: u32, router: &mut dyn Router, out: &mut Outbox) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        transaction.expires_at = None;
        let (invite, cancel) = (transaction.invite, transaction.cancel);
        let ringing = transaction.leg.is_some_and(|leg| leg.provisional);
        if invite && ringing && cancel == Cancel::No {
            // 16.8: Timer C ends a call that rings too long.
            transaction.cancel = Cancel::Wanted;
            return self.send_cancel(now, slot, out);
        }
        self.settle_leg(now, slot, Verdicts::TimedOut, router);
        if invite {
            let answer = if cancel == Cancel::No {
                Answer::new(408, "Request Timeout")
            } else {
                Answer::new(487, "Request Terminated")
            };
            return self.end_with(now, slot, &answer, RequestOutcome::Expired, out);
        }
        // RFC 4320 4.2: nobody waits for a 408 to anything but an INVITE any more.
        self.note_end(now, slot, Some(RequestOutcome::Expired), out);
        if let Some(transaction) = self.transactions.get(slot) {
            if transaction.bye {
                router.forget(now, transaction.session);
            }
            transaction.repeat_at = None;
            transaction.ends_at = Some(now);
        }
    }
}
