//! Time in transactions: repetition, fail-over, expiry, the end (RFC 3261 17, table 4).

use std::time::{Duration, Instant};

use strowger_contract::{ClassId, Note, Outbox, Router, Unresolved};

use crate::answers::At;
use crate::engine::SipEngine;
use crate::transaction::{Cancel, LegState, State};

/// A timer that fires so much too late tells of a stall of this machine.
const LATE: Duration = Duration::from_millis(50);

fn due(at: Option<Instant>, now: Instant) -> bool {
    at.is_some_and(|at| at <= now)
}

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
        if due(transaction.ends_at, now) {
            let ticket = transaction.ticket;
            if let Some(ticket) = ticket {
                router.withdraw(now, ticket);
            }
            self.settle_all(now, slot, router);
            self.never_acknowledged(now, slot, router, out);
            self.note_attempt(now, slot, 408, true, out);
            self.note_end(now, slot, None, out);
            return self.transactions.remove(slot);
        }
        if due(transaction.named.until, now) {
            // The resolver always answers; should it ever not, this does.
            self.unresolved(now, slot, Unresolved::NoAnswer, router, out);
        }
        if self.transactions.current(slot, generation).is_some_and(|it| due(it.hedge_at, now)) {
            self.hedge(now, slot, router, out);
        }
        let legs = self.transactions.current(slot, generation).map_or(0, |it| it.legs.len());
        for attempt in 1..=legs as u8 {
            self.wake_leg(now, (slot, attempt), router, out);
        }
        if let Some(transaction) = self.transactions.current(slot, generation)
            && due(transaction.repeat_at, now)
        {
            self.repeat_answer(now, slot, out);
        }
        self.schedule(now, slot);
    }

    fn wake_leg(&mut self, now: Instant, at: At, router: &mut dyn Router, out: &mut Outbox) {
        let Some(leg) = self.transactions.get(at.0).and_then(|known| known.leg(at.1)) else {
            return;
        };
        if due(leg.expires_at, now) {
            self.on_expired(now, at, router, out);
        } else if leg.failover_at.is_some_and(|at| now > at + LATE) && !leg.excused {
            // It is us who were silent: what it said may lie unread in our own sockets.
            leg.excused = true;
            leg.failover_at = Some(now + LATE);
            out.note(Note::Count("sip_own_stalls"));
        } else if due(leg.failover_at, now) {
            self.on_silence(now, at, router, out);
        } else if due(leg.repeat_at, now) {
            self.repeat_request(now, at, router, out);
        }
    }

    /// Timers A and E towards the instance, for the request or for our CANCEL.
    fn repeat_request(&mut self, now: Instant, at: At, router: &dyn Router, out: &mut Outbox) {
        let t2 = self.settings.options.t2.0;
        let Some(transaction) = self.transactions.get(at.0) else { return };
        let (invite, open) = (transaction.is_invite(), transaction.state == State::Open);
        let Some(leg) = transaction.leg(at.1) else { return };
        let cancelling = leg.cancel == Cancel::Sent;
        if leg.backend.is_some_and(|backend| router.backend(backend).is_none())
            || !cancelling && (!open || leg.state == LegState::Ended)
        {
            // Another instance may be at its address by now; or nothing is to be said any more.
            leg.repeat_at = None;
            return;
        }
        // Timer A has no ceiling (17.1.1.2), E stops at T2.
        let doubled = leg.repeat_after * 2;
        leg.repeat_after = if invite && !cancelling { doubled } else { doubled.min(t2) };
        leg.repeat_at = Some(now + leg.repeat_after);
        if cancelling {
            return self.follow("CANCEL", at, None, out);
        }
        out.note(Note::Count("sip_requests_repeated"));
        let (to, bytes) = (leg.to, &leg.sent);
        out.send(to, ClassId::CONTROL, |buffer| buffer.extend_from_slice(bytes));
    }

    /// Timer G towards the client.
    fn repeat_answer(&mut self, now: Instant, slot: u32, out: &mut Outbox) {
        let t2 = self.settings.options.t2.0;
        let Some(transaction) = self.transactions.get(slot) else { return };
        transaction.repeat_after = (transaction.repeat_after * 2).min(t2);
        transaction.repeat_at = Some(now + transaction.repeat_after);
        out.note(Note::Count("sip_answers_repeated"));
        let (client, bytes) = (transaction.client, &transaction.reply);
        out.send(client, ClassId::CONTROL, |buffer| buffer.extend_from_slice(bytes));
    }
}
