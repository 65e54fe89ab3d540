//! Responses: matched to the leg that our branch names (RFC 3261 16.7), or, when nothing is known of it
//! any more, sent back the way that the Via headers say.

use std::net::SocketAddr;
use std::time::Instant;

use strowger_contract::{ClassId, Endpoint, Message, Note, Outbox, Router, Transport, stable_hash};

use crate::branch::Branch;
use crate::engine::SipEngine;
use crate::method::Method;
use crate::scan::{Name, Scan};
use crate::transaction::Cancel;
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
    let text = via.and_then(|(via, _)| via.branch()).unwrap_or_default();
    let Some((branch, token)) = Branch::read(text) else {
        return out.drop_message("response_not_ours");
    };
    let for_cancel = is_for_cancel(scan, bytes);
    let telling = match engine.transactions.current(branch.slot, branch.generation) {
        Some(known) if !branch.stateless => known.pool,
        _ => None,
    };
    engine.be_telling(now, telling, router);
    if !branch.stateless {
        if branch.worker != engine.settings.worker && branch.worker.0 < engine.settings.workers {
            return out.hand_over(branch.worker, message);
        }
        let asked = Method::of(cseq_method(scan, bytes));
        let known = engine.transactions.current(branch.slot, branch.generation);
        if let Some(known) = known
            && let method = known.method
            && let Some(leg) = known.leg(branch.attempt)
        {
            if !leg.is_answered_by(text) || asked != method && !for_cancel {
                return out.drop_message("response_forged");
            }
            let backend = leg.backend;
            if for_cancel {
                // Our CANCEL was heard: it need not be repeated.
                if leg.cancel == Cancel::Sent {
                    leg.repeat_at = None;
                }
                return;
            }
            if let Some(backend) = backend {
                engine.hear_load(now, backend, via.as_ref().map(|(via, _)| via), out);
            }
            return engine.on_answer(
                now,
                (branch.slot, branch.attempt),
                message,
                scan,
                code,
                router,
                out,
            );
        }
        if for_cancel {
            return;
        }
    }
    // RFC 6026 forbids to pass on strays; ours carries our signature, so it was asked for, and the
    // call of a client that has waited through the edge's restart is not lost.
    let call_id = stable_hash(scan.value(bytes, Name::CallId).unwrap_or_default());
    let Some(branch) = branch.verify(token, call_id, router) else {
        return out.drop_message("response_forged");
    };
    if let Some(backend) = branch.pin.and_then(|pin| router.resolve(pin)) {
        engine.hear_load(now, backend, via.as_ref().map(|(via, _)| via), out);
    }
    pass_back(engine, now, message, scan, router, out);
}

/// RFC 3261 16.11, 18.2.2: back by the next Via.
fn pass_back(
    engine: &mut SipEngine,
    now: Instant,
    message: &Message<'_>,
    scan: &Scan,
    router: &dyn Router,
    out: &mut Outbox,
) {
    let bytes = message.bytes;
    let first = scan.value(bytes, Name::Via).and_then(Via::first);
    let second = match first {
        Some((_, Some(rest))) => Via::first(rest),
        _ => scan.all(Name::Via).nth(1).and_then(|header| Via::first(header.value.of(bytes))),
    };
    let Some((via, _)) = second else { return out.drop_message("response_without_next_via") };
    let transport = via_transport(&via);
    let Some(address) = via.response_address() else {
        return engine.hold_response(now, message, &via, transport, out);
    };
    let Some(to) = engine.settings.endpoint(transport, address) else {
        return out.drop_message("response_without_socket");
    };
    out.note(Note::Count("sip_responses_stateless"));
    engine.send_back(to, (transport, address), message, scan, router, out);
}

impl SipEngine {
    /// RFC 3261 18.2.2: the connection that requests came over is gone; their answers go over a new
    /// one, to the port of their Via at the address that they came from. Not so over TLS and WebSockets,
    /// whose clients listen nowhere.
    pub(crate) fn answer_by_via(&mut self, peer: Endpoint, out: &mut Outbox) {
        let moved = self.transactions.answer_elsewhere(peer, |transaction| {
            let mut scan = Scan::default();
            if transaction.transport != Transport::Tcp || scan.scan(&transaction.request).is_err() {
                return None;
            }
            let (via, _) = Via::first(scan.value(&transaction.request, Name::Via)?)?;
            let address = SocketAddr::new(transaction.source.ip(), via.port.unwrap_or(5060));
            Some(Endpoint::Remote { transport: Transport::Tcp, address })
        });
        if moved > 0 {
            out.note(Note::Count("sip_answers_over_new_connections"));
        }
    }

    /// Sends a response on that no transaction is known of.
    pub(crate) fn send_back(
        &mut self,
        to: Endpoint,
        (transport, address): (Transport, SocketAddr),
        message: &Message<'_>,
        scan: &Scan,
        router: &dyn Router,
        out: &mut Outbox,
    ) {
        // What the branch says was verified; of what went to no instance nothing was recorded.
        let unrecorded = branch_of(message.bytes, scan).is_none_or(|(branch, token)| {
            let call_id = stable_hash(scan.value(message.bytes, Name::CallId).unwrap_or_default());
            branch.verify(token, call_id, router).is_none_or(|branch| branch.pin.is_none())
        });
        let mut sent = std::mem::take(&mut self.scratch);
        sent.clear();
        backward(message.bytes, scan, false, self.overload.telling.as_ref(), &mut sent);
        let facing = self.settings.local.facing(transport, address.is_ipv6());
        let to_instance = router.backend_at(address).is_some();
        let spare = (&mut self.edit_scan, &mut self.edited);
        let keys = router.token_keys();
        let sides = (to_instance, unrecorded && !to_instance);
        self.settings.hide_response(&mut sent, sides, (transport, facing), keys, spare);
        out.send(to, ClassId::CONTROL, |buffer| buffer.extend_from_slice(&sent));
        self.scratch = sent;
    }
}

/// What our branch in the top Via says, and its token.
fn branch_of<'a>(message: &'a [u8], scan: &Scan) -> Option<(Branch, &'a [u8])> {
    let (via, _) = scan.value(message, Name::Via).and_then(Via::first)?;
    Branch::read(via.branch()?)
}

/// Which try of its transaction a response is to.
pub(crate) fn attempt_of(message: &[u8], scan: &Scan) -> Option<u8> {
    branch_of(message, scan).map(|(branch, _)| branch.attempt)
}

fn via_transport(via: &Via<'_>) -> Transport {
    let is = |name: &[u8]| via.transport.eq_ignore_ascii_case(name);
    match () {
        () if is(b"UDP") => Transport::Udp,
        () if is(b"TLS") => Transport::Tls,
        () if is(b"WS") => Transport::Ws,
        () if is(b"WSS") => Transport::Wss,
        () => Transport::Tcp,
    }
}

/// The method of its CSeq: the word behind the last space.
pub(crate) fn cseq_method<'a>(scan: &Scan, bytes: &'a [u8]) -> &'a [u8] {
    let cseq = scan.value(bytes, Name::CSeq).unwrap_or_default().trim_ascii();
    cseq.rsplit(|byte| byte.is_ascii_whitespace()).next().unwrap_or_default()
}

/// Responses to our own CANCEL carry the INVITE's branch; they end here.
fn is_for_cancel(scan: &Scan, bytes: &[u8]) -> bool {
    cseq_method(scan, bytes) == b"CANCEL"
}
