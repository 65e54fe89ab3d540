//! Clients that hang up while their requests wait in the router's queue.

use std::time::Instant;

use strowger_contract::{Endpoint, Note, Outbox, RequestOutcome, Router};

use crate::engine::SipEngine;
use crate::method::Method;

impl SipEngine {
    /// A client's connection is gone: what it asked for and nobody has yet, nobody gets. What was sent
    /// already is answered by its Via (RFC 3261 18.2.2). A BYE goes on: its call is to end.
    pub(crate) fn hung_up(
        &mut self,
        now: Instant,
        peer: Endpoint,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        for slot in self.transactions.asked_by(peer) {
            let Some(transaction) = self.transactions.get(slot) else { continue };
            let is_bye = transaction.method == Method::Bye;
            let Some(ticket) = transaction.ticket.filter(|_| !is_bye) else { continue };
            self.transactions.waited(ticket);
            router.withdraw(now, ticket);
            let Some(transaction) = self.transactions.get(slot) else { continue };
            if transaction.is_pending() {
                // It waited for one more place; the others may still answer.
                continue;
            }
            out.note(Note::Count("hung_up_waiting"));
            transaction.cancelled = true;
            let was_sent = !transaction.legs.is_empty();
            self.note_attempt(now, slot, 487, true, out);
            self.note_end(now, slot, Some(RequestOutcome::Failed), out);
            if was_sent {
                // Late answers are still told from strays.
                self.complete(now, slot);
                self.schedule(now, slot);
            } else {
                self.transactions.remove(slot);
            }
        }
    }
}
