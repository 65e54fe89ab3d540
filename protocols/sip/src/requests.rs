//! Requests: checked (RFC 3261 16.3), matched to what is under way (17.2.3), sent on (16.6).

use std::time::Instant;

use strowger_contract::{
    BackendId, ClassId, Endpoint, Message, Note, Outbox, Outcome, Pin, Query, Refusal,
    RequestOutcome, Route, Router, SessionKey, Transport, Verdict, stable_hash,
};

use crate::SPACE;
use crate::branch::Branch;
use crate::classify::classify;
use crate::engine::SipEngine;
use crate::respond::{Answer, is_our_tag, respond};
use crate::scan::{Name, Scan, ScanError, Start};
use crate::target::{Hop, MARK_BACKEND, Target, dialog_binding, target};
use crate::transaction::{Cancel, Leg, State, TRIES_MAX, Transaction};
use crate::uri::{Uri, tag};
use crate::via::Via;
use crate::write::{Forward, max_forwards};

/// A request and what was found in it.
pub(crate) struct Incoming<'a> {
    pub(crate) message: Message<'a>,
    pub(crate) scan: &'a Scan,
    pub(crate) method: &'a [u8],
    pub(crate) uri: &'a [u8],
    pub(crate) via: Via<'a>,
    /// Names the transaction, by the branch and the sender (17.2.3).
    pub(crate) key: u64,
    pub(crate) call_id: u64,
}

impl<'a> Incoming<'a> {
    /// `bytes` without what follows the body (18.3).
    fn read(message: &Message<'a>, scan: &'a Scan, router: &dyn Router) -> Option<Self> {
        let Start::Request { method, uri } = scan.start else { return None };
        let (method, uri) = (method.of(message.bytes), uri.of(message.bytes));
        let (via, _) = Via::first(scan.value(message.bytes, Name::Via)?)?;
        let call_id = scan.value(message.bytes, Name::CallId).filter(|value| !value.is_empty())?;
        let key = transaction_key(&via, scan, message.bytes, call_id, method, router);
        Some(Self { message: *message, scan, method, uri, via, key, call_id: stable_hash(call_id) })
    }
}

/// RFC 3261 17.2.3. An ACK and a CANCEL have their INVITE's key. Without the magic cookie (RFC 2543)
/// the request's own fields make it.
fn transaction_key(
    via: &Via<'_>,
    scan: &Scan,
    bytes: &[u8],
    call_id: &[u8],
    method: &[u8],
    router: &dyn Router,
) -> u64 {
    let keyer = router.keyer();
    let invite = matches!(method, b"INVITE" | b"ACK" | b"CANCEL");
    let kind = u8::from(invite) | 0x40;
    let branch = via.branch().filter(|branch| {
        branch.get(..7).is_some_and(|cookie| cookie.eq_ignore_ascii_case(b"z9hG4bK"))
    });
    let mut key = keyer.keyed(kind, branch.unwrap_or(call_id))
        ^ keyer.keyed(kind, via.sent_by).rotate_left(13);
    if branch.is_none() {
        let from = scan.value(bytes, Name::From).and_then(tag).unwrap_or_default();
        let number = scan.value(bytes, Name::CSeq).unwrap_or_default();
        let digits = number.iter().take_while(|byte| byte.is_ascii_digit()).count();
        key ^= keyer.keyed(kind, from).rotate_left(29)
            ^ keyer.keyed(kind, &number[..digits]).rotate_left(43);
    }
    if invite { key } else { key ^ keyer.keyed(kind, method).rotate_left(53) }
}

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
        let Some(incoming) = Incoming::read(message, scan, router) else {
            return out.drop_message("unanswerable");
        };
        if let Some(answer) = refused_as_is(&incoming, error) {
            if incoming.method == b"ACK" {
                return out.drop_message("malformed");
            }
            out.note(Note::Count("sip_bad_requests"));
            return reply(&incoming, &answer, out);
        }
        let body = trimmed(&incoming);
        let incoming =
            Incoming { message: Message { bytes: body, ..incoming.message }, ..incoming };
        match incoming.method {
            b"ACK" => self.on_ack(now, &incoming, router, out),
            b"CANCEL" => self.on_cancel(now, &incoming, router, out),
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
        if let Some(slot) = self.transactions.by_key(incoming.key)
            && let Some(transaction) = self.transactions.get(slot)
        {
            // 17.2: a retransmission gets the last answer again.
            out.note(Note::Count("sip_retransmissions_absorbed"));
            transaction.client = reply_endpoint(incoming.message.from, &incoming.via);
            if !transaction.reply.is_empty() && transaction.state != State::Accepted {
                let (client, reply) = (transaction.client, &transaction.reply);
                out.send(client, ClassId::CONTROL, |bytes| bytes.extend_from_slice(reply));
            }
            return;
        }
        let scan = incoming.scan;
        let target = target(
            &self.settings,
            &incoming.message,
            scan,
            incoming.method,
            incoming.uri,
            incoming.call_id,
            router,
        );
        let in_dialog = scan.value(incoming.message.bytes, Name::To).and_then(tag).is_some();
        let class =
            classify(incoming.message.bytes, scan, incoming.method, incoming.uri, in_dialog);
        if self.settings.is_stateless() {
            return self.forward_stateless(now, incoming, &target, class, router, out);
        }
        if self.transactions.len() >= self.settings.options.max_transactions as usize {
            out.note(Note::Count("sip_transactions_limit"));
            let answer = Answer {
                retry_after: Some(std::time::Duration::from_secs(1)),
                ..Answer::new(503, "Too Many Transactions")
            };
            note_refused(now, incoming, class, out);
            return reply(incoming, &answer, out);
        }
        self.begin(now, incoming, &target, class, router, out);
    }

    /// A new transaction.
    fn begin(
        &mut self,
        now: Instant,
        incoming: &Incoming<'_>,
        target: &Target<'_>,
        class: ClassId,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let message = &incoming.message;
        let deadline = router
            .class(class)
            .deadline
            .map_or_else(|| now + self.settings.timeout(), |promised| message.arrived + promised);
        let pool = if let Hop::Backend { pool, .. } = target.hop { Some(pool) } else { None };
        let session = session_key(incoming, pool, router);
        let route = self.first_hop(now, target, session, class, deadline, router);
        if let Err((answer, refusal)) = &route {
            if let Some(refusal) = refusal {
                out.note(Note::Refused(class, *refusal));
            }
            // A refusal is remembered, so that a retransmission does not get another answer, as long
            // as that takes no room from what can be served.
            if self.transactions.len() >= self.settings.options.max_transactions as usize / 2 {
                note_refused(now, incoming, class, out);
                return reply(incoming, answer, out);
            }
        }
        let invite = incoming.method == b"INVITE";
        let generation = self.transactions.next_generation();
        let request = self.transactions.buffer(message.bytes);
        let (sent, reply_buffer) = (self.transactions.buffer(b""), self.transactions.buffer(b""));
        let transaction = Transaction {
            generation,
            key: incoming.key,
            invite,
            bye: incoming.method == b"BYE",
            state: State::Open,
            cancel: Cancel::No,
            client: reply_endpoint(message.from, &incoming.via),
            client_reliable: message.transport.is_stream(),
            transport: message.transport,
            source: message.remote,
            local: message.local,
            class,
            arrived: message.arrived,
            deadline,
            session: router.keyer().session(
                SPACE,
                incoming.scan.value(message.bytes, Name::CallId).unwrap_or_default(),
            ),
            call_id: incoming.call_id,
            pool,
            creates_dialog: invite
                && incoming.scan.value(message.bytes, Name::To).and_then(tag).is_none(),
            attempt: 0,
            tried: [BackendId(0); TRIES_MAX],
            tries: 0,
            leg: None,
            first_answer: None,
            noted: false,
            request,
            sent,
            reply: reply_buffer,
            repeat_at: None,
            repeat_after: self.settings.options.t1.0,
            failover_at: None,
            expires_at: Some(now + self.settings.timeout()),
            ends_at: None,
            wakes_at: None,
        };
        let slot = self.transactions.insert(transaction);
        let hop = match route {
            Ok(hop) => hop,
            Err((answer, _)) => {
                let rejected = RequestOutcome::Rejected;
                return self.finish(now, slot, incoming.scan, &answer, rejected, out);
            }
        };
        if invite {
            self.answer_client(slot, incoming.scan, &Answer::new(100, "Trying"), out);
        }
        self.send_leg(now, slot, incoming.scan, target, hop, router, out);
        self.schedule(now, slot);
    }

    fn first_hop(
        &self,
        now: Instant,
        target: &Target<'_>,
        session: SessionKey,
        class: ClassId,
        deadline: Instant,
        router: &mut dyn Router,
    ) -> Result<NextHop, (Answer<'static>, Option<Refusal>)> {
        match target.hop {
            Hop::Backend { pool, pin, in_session } => {
                let query = Query {
                    pool,
                    session,
                    pin,
                    in_session,
                    awaits: true,
                    class,
                    deadline,
                    capability: 0,
                    exclude: &[],
                };
                match router.route(now, &query) {
                    Verdict::Go(route) => Ok(NextHop::of(&route)),
                    Verdict::Refuse(refusal) => Err((answer_for(refusal), Some(refusal))),
                    Verdict::Wait(ticket) => {
                        router.withdraw(now, ticket);
                        Err((answer_for(Refusal::NoBackend), Some(Refusal::NoBackend)))
                    }
                }
            }
            Hop::Address { transport, address, pin } => {
                Ok(NextHop { backend: None, pin, transport, address })
            }
            Hop::Nowhere(code, reason) => Err((Answer::new(code, reason), None)),
        }
    }

    /// Writes the request for the next hop and sends it.
    pub(crate) fn send_leg(
        &mut self,
        now: Instant,
        slot: u32,
        scan: &Scan,
        target: &Target<'_>,
        hop: NextHop,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let (worker, options) = (self.settings.worker, &self.settings.options);
        let Some(to) = hop.endpoint(&self.settings) else {
            if let Some(backend) = hop.backend {
                router.outcome(now, backend, Outcome::Abandoned);
            }
            return self.finish(
                now,
                slot,
                scan,
                &Answer::new(500, "No Socket Reaches The Next Hop"),
                RequestOutcome::Failed,
                out,
            );
        };
        let Some(transaction) = self.transactions.get(slot) else { return };
        transaction.attempt = transaction.attempt.wrapping_add(1);
        if let Some(backend) = hop.backend {
            transaction.note_try(backend);
        }
        let branch = Branch {
            worker,
            slot,
            generation: transaction.generation,
            attempt: transaction.attempt,
            stateless: false,
            pin: hop.pin.filter(|_| hop.backend.is_some()),
        };
        let mut sent = std::mem::take(&mut transaction.sent);
        sent.clear();
        let origin = Origin {
            source: transaction.source,
            transport: transaction.transport,
            local: transaction.local,
        };
        let request = std::mem::take(&mut transaction.request);
        forward(
            &self.settings,
            &request,
            scan,
            target,
            &hop,
            branch,
            &origin,
            transaction.call_id,
            router,
            &mut sent,
        );
        transaction.request = request;
        transaction.sent = sent;
        let reliable = hop.transport.is_stream();
        transaction.leg = Some(Leg {
            backend: hop.backend,
            to,
            sent_at: now,
            owed: hop.backend.is_some(),
            provisional: false,
        });
        transaction.repeat_after = options.t1.0;
        transaction.repeat_at = (!reliable).then(|| now + options.t1.0);
        transaction.failover_at = hop.backend.map(|_| now + options.failover_timeout.0);
        out.send(to, transaction.class, |bytes| bytes.extend_from_slice(&transaction.sent));
    }

    /// RFC 3261 16.11: sent on without remembering anything.
    fn forward_stateless(
        &mut self,
        now: Instant,
        incoming: &Incoming<'_>,
        target: &Target<'_>,
        class: ClassId,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let message = &incoming.message;
        let one_way = incoming.method == b"ACK";
        let hop = match target.hop {
            Hop::Backend { pool, pin, in_session } => {
                let session = session_key(incoming, Some(pool), router);
                let deadline = router
                    .class(class)
                    .deadline
                    .map_or(now, |promised| message.arrived + promised)
                    .max(now);
                let in_session = in_session || matches!(incoming.method, b"ACK" | b"CANCEL");
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
                };
                match router.route(now, &query) {
                    Verdict::Go(route) => NextHop::of(&route),
                    Verdict::Wait(_) => return out.drop_message("no_answer_awaited"),
                    Verdict::Refuse(_) if one_way => {
                        return out.drop_message("ack_without_backend");
                    }
                    Verdict::Refuse(refusal) => {
                        out.note(Note::Refused(class, refusal));
                        note_refused(now, incoming, class, out);
                        return reply(incoming, &answer_for(refusal), out);
                    }
                }
            }
            Hop::Address { transport, address, pin } => {
                NextHop { backend: None, pin, transport, address }
            }
            Hop::Nowhere(..) if one_way => return out.drop_message("ack_to_nowhere"),
            Hop::Nowhere(code, reason) => {
                note_refused(now, incoming, class, out);
                return reply(incoming, &Answer::new(code, reason), out);
            }
        };
        let Some(to) = hop.endpoint(&self.settings) else { return out.drop_message("no_socket") };
        // The same for each retransmission, and for an INVITE's CANCEL and ACK (16.11).
        let (slot, generation) = ((incoming.key >> 32) as u32, incoming.key as u32);
        let branch = Branch {
            worker: self.settings.worker,
            slot,
            generation,
            attempt: 0,
            stateless: true,
            pin: hop.pin.filter(|_| hop.backend.is_some()),
        };
        let origin =
            Origin { source: message.remote, transport: message.transport, local: message.local };
        let mut sent = std::mem::take(&mut self.scratch);
        sent.clear();
        forward(
            &self.settings,
            message.bytes,
            incoming.scan,
            target,
            &hop,
            branch,
            &origin,
            incoming.call_id,
            router,
            &mut sent,
        );
        out.send(to, class, |bytes| bytes.extend_from_slice(&sent));
        self.scratch = sent;
        if !one_way && self.settings.is_stateless() {
            out.note(Note::Request {
                class,
                outcome: RequestOutcome::Met,
                backend: hop.backend,
                total: now.saturating_duration_since(message.arrived),
                at_backend: std::time::Duration::ZERO,
            });
        }
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
            && transaction.invite
        {
            match transaction.state {
                State::Completed | State::Confirmed => {
                    transaction.state = State::Confirmed;
                    transaction.repeat_at = None;
                    // Timer I. Over UDP the instance may repeat its answer for longer (Timer D), and
                    // that is to be acknowledged, not passed on.
                    let repeats = transaction
                        .leg
                        .is_some_and(|leg| matches!(leg.to, Endpoint::Datagram { .. }));
                    if !repeats {
                        let reliable = transaction.client_reliable;
                        let wait = if reliable { std::time::Duration::ZERO } else { t4 };
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
        let target = target(
            &self.settings,
            &incoming.message,
            incoming.scan,
            incoming.method,
            incoming.uri,
            incoming.call_id,
            router,
        );
        self.forward_stateless(now, incoming, &target, ClassId::CONTROL, router, out);
    }

    /// RFC 3261 16.10.
    fn on_cancel(
        &mut self,
        now: Instant,
        incoming: &Incoming<'_>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let known = self.transactions.by_key(incoming.key);
        let Some(slot) = known.filter(|_| !self.settings.is_stateless()) else {
            let target = target(
                &self.settings,
                &incoming.message,
                incoming.scan,
                incoming.method,
                incoming.uri,
                incoming.call_id,
                router,
            );
            if self.settings.is_stateless() {
                return self.forward_stateless(
                    now,
                    incoming,
                    &target,
                    ClassId::CONTROL,
                    router,
                    out,
                );
            }
            return reply(incoming, &Answer::new(481, "Call/Transaction Does Not Exist"), out);
        };
        reply(incoming, &Answer::new(200, "OK"), out);
        let Some(transaction) = self.transactions.get(slot) else { return };
        if transaction.state != State::Open || transaction.cancel != Cancel::No {
            return;
        }
        transaction.cancel = Cancel::Wanted;
        if transaction.leg.is_some_and(|leg| leg.provisional) {
            self.send_cancel(now, slot, out);
        }
    }
}

/// Where a leg goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NextHop {
    pub(crate) backend: Option<BackendId>,
    pub(crate) pin: Option<Pin>,
    pub(crate) transport: Transport,
    pub(crate) address: std::net::SocketAddr,
}

impl NextHop {
    pub(crate) fn of(route: &Route) -> Self {
        Self {
            backend: Some(route.backend),
            pin: Some(route.pin),
            transport: route.transport,
            address: route.address,
        }
    }

    fn endpoint(&self, settings: &crate::engine::Settings) -> Option<Endpoint> {
        match self.backend {
            Some(backend) if self.transport.is_stream() => Some(Endpoint::Backend(backend)),
            _ => settings.endpoint(self.transport, self.address),
        }
    }
}

/// Where a request came from.
pub(crate) struct Origin {
    pub(crate) source: std::net::SocketAddr,
    pub(crate) transport: Transport,
    pub(crate) local: std::net::SocketAddr,
}

#[allow(
    clippy::too_many_arguments,
    reason = "one call of one writer; a struct would name each twice"
)]
fn forward(
    settings: &crate::engine::Settings,
    request: &[u8],
    scan: &Scan,
    target: &Target<'_>,
    hop: &NextHop,
    branch: Branch,
    origin: &Origin,
    call_id: u64,
    router: &dyn Router,
    out: &mut Vec<u8>,
) {
    let local = &settings.local;
    let facing = local.facing(hop.transport, hop.address.is_ipv6());
    let receiving = local.receiving(origin.transport, origin.local);
    let Start::Request { method, .. } = scan.start else { return };
    let wanted = settings.options.record_route
        && matches!(
            method.of(request),
            b"INVITE" | b"SUBSCRIBE" | b"REFER" | b"UPDATE" | b"NOTIFY"
        );
    let from_tag = scan.value(request, Name::From).and_then(tag).unwrap_or_default();
    let to_tag = scan.value(request, Name::To).and_then(tag);
    let token = hop.pin.filter(|_| wanted).map(|pin| {
        // In a dialog the side that began it may be the one that now answers.
        let from_backend = hop.backend.is_none();
        let by_initiator = to_tag.is_none() || from_backend == target.begun_by_backend;
        let initiator = if by_initiator { from_tag } else { to_tag.unwrap_or_default() };
        let mark = if target.begun_by_backend { MARK_BACKEND } else { 0 };
        router.seal(pin, mark, dialog_binding(call_id, initiator))
    });
    let side = |socket: u16| (local.transport(socket), local.text(socket));
    let other = (receiving != facing).then(|| side(receiving));
    Forward {
        message: request,
        scan,
        uri: target.uri,
        transport: hop.transport,
        sent_by: local.text(facing),
        branch,
        call_id,
        record_route: token,
        sides: [Some(side(facing)), other],
        source: origin.source,
        pop_routes: target.pop_routes,
        drop_last_route: target.drop_last_route,
        add_route: target.add_route,
    }
    .write(router, out);
}

/// What a request is refused for before anything else is looked at (16.3).
fn refused_as_is<'a>(incoming: &Incoming<'a>, error: Option<ScanError>) -> Option<Answer<'a>> {
    let (bytes, scan) = (incoming.message.bytes, incoming.scan);
    match error {
        Some(ScanError::Version) => return Some(Answer::new(505, "Version Not Supported")),
        Some(ScanError::StartLine) => return Some(Answer::new(400, "Malformed Request Line")),
        Some(ScanError::TooManyHeaders) => return Some(Answer::new(400, "Too Many Header Fields")),
        Some(_) => return Some(Answer::new(400, "Malformed Header Field")),
        None => {}
    }
    let missing =
        [(Name::From, "Missing From"), (Name::To, "Missing To"), (Name::CSeq, "Missing CSeq")];
    if let Some((_, reason)) =
        missing.iter().find(|(name, _)| scan.value(bytes, *name).is_none_or(<[u8]>::is_empty))
    {
        return Some(Answer::new(400, reason));
    }
    for (name, reason) in [
        (Name::CallId, "More Than One Call-ID"),
        (Name::CSeq, "More Than One CSeq"),
        (Name::From, "More Than One From"),
        (Name::To, "More Than One To"),
        (Name::MaxForwards, "More Than One Max-Forwards"),
    ] {
        if scan.all(name).count() > 1 {
            return Some(Answer::new(400, reason));
        }
    }
    let cseq = scan.value(bytes, Name::CSeq).unwrap_or_default();
    if !is_cseq(cseq, incoming.method) {
        return Some(Answer::new(400, "Malformed CSeq"));
    }
    if incoming.uri.iter().any(|byte| byte.is_ascii_control() || b"<>\"".contains(byte)) {
        return Some(Answer::new(400, "Malformed Request-URI"));
    }
    let scheme = memchr::memchr(b':', incoming.uri).map(|colon| &incoming.uri[..colon]);
    match scheme {
        None => return Some(Answer::new(400, "Malformed Request-URI")),
        Some(scheme)
            if scheme.eq_ignore_ascii_case(b"sip") || scheme.eq_ignore_ascii_case(b"sips") =>
        {
            if Uri::parse(incoming.uri).is_none() {
                return Some(Answer::new(400, "Malformed Request-URI"));
            }
        }
        // tel:, urn: and what is yet to come are the pool's business.
        Some(_) => {}
    }
    if let Some(length) = scan.value(bytes, Name::ContentLength)
        && content_length(length).is_none_or(|length| length > bytes.len() - scan.body_at)
    {
        return Some(Answer::new(400, "Content-Length Does Not Fit"));
    }
    match scan.value(bytes, Name::MaxForwards).map(max_forwards) {
        Some(None) => return Some(Answer::new(400, "Malformed Max-Forwards")),
        Some(Some(0)) => return Some(Answer::new(483, "Too Many Hops")),
        Some(Some(_)) | None => {}
    }
    let required = scan.value(bytes, Name::ProxyRequire).filter(|value| !value.is_empty());
    required
        .filter(|_| !matches!(incoming.method, b"ACK" | b"CANCEL"))
        .map(|required| Answer { unsupported: Some(required), ..Answer::new(420, "Bad Extension") })
}

fn content_length(digits: &[u8]) -> Option<usize> {
    let good = !digits.is_empty() && digits.len() <= 9 && digits.iter().all(u8::is_ascii_digit);
    good.then(|| digits.iter().fold(0, |length, digit| length * 10 + usize::from(digit - b'0')))
}

/// `number method`, the number below 2^31 (8.1.1.5).
fn is_cseq(value: &[u8], method: &[u8]) -> bool {
    let digits = value.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let number = value[..digits].iter().try_fold(0u64, |number, digit| {
        number
            .checked_mul(10)?
            .checked_add(u64::from(digit - b'0'))
            .filter(|&number| number < 1 << 31)
    });
    let rest = &value[digits..];
    digits > 0
        && number.is_some()
        && rest.first().is_some_and(u8::is_ascii_whitespace)
        && rest.trim_ascii() == method
}

/// RFC 3261 18.3: bytes of a datagram beyond the body are no part of the message.
fn trimmed<'a>(incoming: &Incoming<'a>) -> &'a [u8] {
    let bytes = incoming.message.bytes;
    let length = incoming.scan.value(bytes, Name::ContentLength).and_then(content_length);
    length.and_then(|length| bytes.get(..incoming.scan.body_at + length)).unwrap_or(bytes)
}

/// What the pool's session key says of the request.
pub(crate) fn session_key(
    incoming: &Incoming<'_>,
    pool: Option<strowger_contract::PoolId>,
    router: &dyn Router,
) -> SessionKey {
    let (bytes, scan) = (incoming.message.bytes, incoming.scan);
    let address =
        |name| scan.value(bytes, name).and_then(crate::uri::name_addr).map(|(uri, _)| uri);
    let by_pool = pool.map_or("", |pool| router.session_key_name(pool));
    let text = match by_pool {
        "from" => address(Name::From),
        "to" => address(Name::To),
        "request-user" => Uri::parse(incoming.uri).and_then(|uri| uri.user).or(Some(incoming.uri)),
        _ => None,
    };
    match text {
        Some(text) => router.keyer().session(SPACE + 1, text),
        None => router.keyer().session(SPACE, scan.value(bytes, Name::CallId).unwrap_or_default()),
    }
}

/// Answers without remembering: a retransmission gets the same answer again.
pub(crate) fn reply(incoming: &Incoming<'_>, answer: &Answer<'_>, out: &mut Outbox) {
    let message = &incoming.message;
    let to = reply_endpoint(message.from, &incoming.via);
    out.send(to, ClassId::CONTROL, |bytes| {
        respond(message.bytes, incoming.scan, message.remote, incoming.key, answer, bytes);
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

fn note_refused(now: Instant, incoming: &Incoming<'_>, class: ClassId, out: &mut Outbox) {
    out.note(Note::Request {
        class,
        outcome: RequestOutcome::Rejected,
        backend: None,
        total: now.saturating_duration_since(incoming.message.arrived),
        at_backend: std::time::Duration::ZERO,
    });
}

/// A refusal in SIP's words.
pub(crate) fn answer_for(refusal: Refusal) -> Answer<'static> {
    let second = Some(std::time::Duration::from_secs(1));
    match refusal {
        Refusal::SessionLost => Answer::new(481, "Call/Transaction Does Not Exist"),
        Refusal::Overloaded { retry_after } => {
            Answer { retry_after: Some(retry_after), ..Answer::new(503, "Overloaded") }
        }
        Refusal::TooLate => Answer { retry_after: second, ..Answer::new(503, "Too Late") },
        Refusal::ShuttingDown => {
            Answer { retry_after: second, ..Answer::new(503, "Shutting Down") }
        }
        _ => Answer { retry_after: second, ..Answer::new(503, "No Instance Available") },
    }
}
