//! Sending on without remembering: stateless listeners, and ACK (RFC 3261 16.11).

use std::time::{Duration, Instant};

use strowger_contract::{
    Attempt, ClassId, Note, Outbox, Query, Refusal, RequestOutcome, Router, Verdict,
};

use crate::branch::Branch;
use crate::engine::SipEngine;
use crate::incoming::{Incoming, loop_hash, session_key};
use crate::method::Method;
use crate::place::{NextHop, not_secure};
use crate::requests::SOON;
use crate::respond::Answer;
use crate::send::{Origin, forward};
use crate::target::{Hop, Target};

impl SipEngine {
    /// RFC 3261 16.11: sent on without remembering anything.
    pub(crate) fn forward_stateless(
        &mut self,
        now: Instant,
        incoming: &Incoming<'_>,
        target: &Target<'_>,
        class: ClassId,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let message = &incoming.message;
        let one_way = incoming.method == Method::Ack;
        let hop = match target.hop {
            Hop::Backend { pool, pin, in_session } => {
                let session = session_key(message, incoming.scan, incoming.uri, Some(pool), router);
                let deadline = router
                    .class(class)
                    .deadline
                    .map_or(now, |promised| message.arrived + promised)
                    .max(now);
                let in_session =
                    in_session || matches!(incoming.method, Method::Ack | Method::Cancel);
                let query = Query {
                    pool,
                    session,
                    pin,
                    in_session,
                    awaits: false,
                    class,
                    deadline,
                    capability: 0,
                    exclude: &[],
                    attempt: Attempt::First,
                };
                match router.route(now, &query) {
                    // The same for each retransmission, so it is refused and not sent to another.
                    Verdict::Go(route)
                        if self.overload.leaves_out(
                            now,
                            route.backend,
                            class,
                            in_session,
                            incoming.key,
                        ) =>
                    {
                        out.note(Note::Count("sip_oc_left_out"));
                        let refusal = Refusal::Overloaded { retry_after: SOON };
                        out.note(Note::Refused(class, refusal));
                        return self.refuse(now, incoming, class, &self.answer_for(refusal), out);
                    }
                    Verdict::Go(route) => NextHop::of(&route),
                    Verdict::Wait(ticket) => {
                        router.withdraw(now, ticket);
                        return out.drop_message("no_answer_awaited");
                    }
                    Verdict::Refuse(_) if one_way => {
                        return out.drop_message("ack_without_backend");
                    }
                    Verdict::Refuse(refusal) => {
                        out.note(Note::Refused(class, refusal));
                        return self.refuse(now, incoming, class, &self.answer_for(refusal), out);
                    }
                }
            }
            Hop::Nowhere(..) if one_way => return out.drop_message("ack_to_nowhere"),
            Hop::Nowhere(code, reason) => {
                return self.refuse(now, incoming, class, &Answer::new(code, reason), out);
            }
            Hop::Name { .. } => return self.hold_request(now, incoming, target, out),
            direct => match NextHop::direct(direct) {
                Some(hop) => hop,
                None => return out.drop_message("no_next_hop"),
            },
        };
        self.send_stateless(now, incoming, target, class, &hop, router, out);
    }

    /// Writes and sends it.
    #[allow(clippy::too_many_arguments, reason = "what every handler gets")]
    pub(crate) fn send_stateless(
        &mut self,
        now: Instant,
        incoming: &Incoming<'_>,
        target: &Target<'_>,
        class: ClassId,
        hop: &NextHop,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let message = &incoming.message;
        let one_way = incoming.method == Method::Ack;
        if self.settings.bars(message.bytes, incoming.scan, target, hop.transport) {
            out.note(Note::Count("sip_sips_without_tls"));
            if one_way {
                return out.drop_message("ack_without_tls");
            }
            return self.refuse(now, incoming, class, &not_secure().0, out);
        }
        let Some(to) = hop.endpoint(&self.settings) else { return out.drop_message("no_socket") };
        // The same for each retransmission, and for an INVITE's CANCEL and ACK (16.11).
        let (slot, generation) = ((incoming.key >> 32) as u32, incoming.key as u32);
        let branch = Branch {
            worker: self.settings.worker,
            slot,
            generation,
            attempt: 0,
            loop_hash: loop_hash(message.bytes, incoming.scan, incoming.uri, incoming.call_id),
            stateless: true,
            pin: hop.pin.filter(|_| hop.backend.is_some()),
        };
        let origin = Origin {
            client: message.from,
            source: message.remote,
            transport: message.transport,
            local: message.local,
            method: incoming.method,
            from_backend: target.from_backend,
        };
        let mut sent = std::mem::take(&mut self.scratch);
        sent.clear();
        forward(
            &self.settings,
            message.bytes,
            incoming.scan,
            target,
            hop,
            branch,
            &origin,
            incoming.call_id,
            None,
            router,
            &mut sent,
        );
        let spare = (&mut self.edit_scan, &mut self.edited);
        let keys = router.token_keys();
        self.settings.hide_request(&mut sent, target, hop, incoming.method, keys, spare);
        self.edit(&mut sent, &origin, hop.backend.is_some(), router);
        out.send(to, class, |bytes| bytes.extend_from_slice(&sent));
        self.scratch = sent;
        if !one_way && self.settings.is_stateless() {
            out.note(Note::Request {
                class,
                outcome: RequestOutcome::Met,
                backend: hop.backend,
                total: now.saturating_duration_since(message.arrived),
                at_backend: Duration::ZERO,
            });
        }
    }
}
