//! Requests and answers on their way (RFC 6733 6.1, 6.2), and what happens when the way breaks (5.5.4).

use std::time::{Duration, Instant};

use strowger_contract::{
    BackendId, ClassId, Closing, Endpoint, Message, Note, Outbox, Outcome, Query, Refusal,
    RequestOutcome, Router, SessionKey, Verdict,
};

use crate::SPACE;
use crate::answer::{error, result};
use crate::avp::{
    Avps, BadLength, FLAG_ERROR, FLAG_PROXIABLE, HEADER_BYTES, Header, Summary, code,
};
use crate::engine::DiameterEngine;
use crate::peer::{CAPABILITIES_EXCHANGE, State};
use crate::pending::{Pending, Pendings, TRIES_MAX};
use crate::rewrite;

const SESSION_TERMINATION: u32 = 275;
const CREDIT_CONTROL: u32 = 272;

/// CC-Request-Type (RFC 8506 8.3).
const INITIAL_REQUEST: u32 = 1;
const TERMINATION_REQUEST: u32 = 3;
const EVENT_REQUEST: u32 = 4;

impl DiameterEngine {
    pub(crate) fn dispatch(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let bytes = message.bytes;
        let Some(header) = Header::read(bytes) else { return out.drop_message("too_short") };
        self.heard(now, message.from, router);
        let introduced = self.peer(message.from).map(|peer| peer.state != State::Introducing);
        if introduced == Some(false) && header.command != CAPABILITIES_EXCHANGE {
            // RFC 6733 5.6: nothing comes before the capabilities.
            out.drop_message("before_capabilities");
            return out.close(message.from, Closing::Flushed);
        }
        if self.on_upkeep(now, message.from, bytes, &header, router, out) {
            return;
        }
        if header.is_request() {
            self.on_request(now, message, &header, router, out);
        } else {
            self.on_answer(now, message, &header, router, out);
        }
    }

    fn refuse(
        &self,
        message: &Message<'_>,
        code_of_result: u32,
        text: &str,
        failed: Option<BadLength>,
        out: &mut Outbox,
    ) {
        let identity = self.settings.identity();
        out.send(message.from, ClassId::CONTROL, |bytes| {
            error(message.bytes, identity, code_of_result, text, failed, bytes)
        });
    }

    /// Refuses before the router was asked.
    fn refuse_early(
        &self,
        now: Instant,
        message: &Message<'_>,
        class: ClassId,
        what: (u32, &str),
        failed: Option<BadLength>,
        out: &mut Outbox,
    ) {
        self.refuse(message, what.0, what.1, failed, out);
        note(now, message.arrived, class, RequestOutcome::Rejected, None, Duration::ZERO, out);
    }

    fn on_request(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        header: &Header,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let summary = Summary::of(message.bytes);
        let class = classify(header, &summary);
        let mut no =
            |what: (u32, &str), failed| self.refuse_early(now, message, class, what, failed, out);
        if header.flags & FLAG_ERROR != 0 {
            return no((result::INVALID_HDR_BITS, "E must not be set in a request"), None);
        }
        if let Some(bad) = summary.broken {
            let what = if bad.code == 0 && message.bytes.len() == HEADER_BYTES {
                (result::INVALID_MESSAGE_LENGTH, "the message has no AVPs")
            } else {
                (result::INVALID_AVP_LENGTH, "an AVP has an impossible length")
            };
            return no(what, Some(bad));
        }
        if header.flags & FLAG_PROXIABLE == 0 {
            return no(
                (result::APPLICATION_UNSUPPORTED, "P is not set, and this node only relays"),
                None,
            );
        }
        if summary.route_recorded && self.has_looped(message.bytes) {
            return no((result::LOOP_DETECTED, "this node is in the Route-Record"), None);
        }
        if let Endpoint::Backend(_) = message.from {
            return self.towards_client(now, message, header, &summary, class, router, out);
        }
        self.towards_backend(now, message, header, &summary, class, router, out);
    }

    fn has_looped(&self, bytes: &[u8]) -> bool {
        let records =
            Avps::of(bytes).map_while(Result::ok).filter(|avp| avp.is(code::ROUTE_RECORD));
        records.into_iter().any(|record| self.settings.is_us(record.data))
    }

    #[allow(clippy::too_many_arguments, reason = "what every handler gets")]
    fn towards_backend(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        header: &Header,
        summary: &Summary<'_>,
        class: ClassId,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let (host, realm) = (
            summary.destination_host.unwrap_or_default(),
            summary.destination_realm.unwrap_or_default(),
        );
        let Some(pool) = self.settings.pool_for(header.application, header.command, realm, host)
        else {
            return self.refuse_early(
                now,
                message,
                class,
                (result::APPLICATION_UNSUPPORTED, "no route for this application"),
                None,
                out,
            );
        };
        let named = if host.is_empty() || self.settings.is_us(host) {
            None
        } else {
            router.named(pool, host)
        };
        let pin = named.and_then(|backend| router.backend(backend)).map(|view| view.pin);
        let text = summary.session_id.or(summary.origin_host).unwrap_or_default();
        let session = router.keyer().session(SPACE, text);
        let in_session = in_session(header, summary);
        let fixed = pin.is_some() && !self.settings.options.session_failover;
        let promised =
            router.class(class).deadline.unwrap_or(self.settings.options.answer_timeout.0);
        let pending = Pending {
            origin: message.from,
            hop_by_hop: header.hop_by_hop,
            to: message.from,
            backend: None,
            pool: Some(pool),
            session: summary.session_id.map(|_| session),
            ends_session: ends_session(header, summary),
            in_session,
            fixed,
            application: header.application,
            class,
            arrived: message.arrived,
            deadline: message.arrived + promised,
            expires: now + self.settings.options.answer_timeout.0,
            sent: now,
            tried: [BackendId(0); TRIES_MAX],
            tries: 0,
            request: self.pending.buffer(message.bytes),
        };
        let mut verdict =
            ask(now, &pending, session, pin, in_session && (fixed || pin.is_none()), router);
        if pin.is_some() && in_session && !fixed && verdict == Err(Refusal::NoBackend) {
            verdict = ask(now, &pending, session, None, true, router);
        }
        match verdict {
            Ok(backend) => self.launch(now, pending, backend, false, router, out),
            Err(refusal) => {
                self.pending.recycle(pending.request);
                out.note(Note::Refused(class, refusal));
                self.refuse_early(now, message, class, words(refusal), None, out);
            }
        }
    }

    /// Sends a request to a backend that the router chose.
    fn launch(
        &mut self,
        now: Instant,
        mut pending: Pending,
        backend: BackendId,
        resent: bool,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        if let Some(place) = pending.tried.get_mut(usize::from(pending.tries)) {
            *place = backend;
        }
        pending.tries += 1;
        pending.backend = Some(backend);
        pending.to = Endpoint::Backend(backend);
        pending.sent = now;
        if let (Some(session), Some(pool)) = (pending.session, pending.pool) {
            // Before the answer: the session's next request may come before it.
            let ttl = router.session_ttl(pool);
            router.learn(now, session, backend, pending.class, ttl);
        }
        let (origin, class, expires, to) =
            (pending.origin, pending.class, pending.expires, pending.to);
        let from = self.identity_of(origin).unwrap_or_default();
        let limit = self.settings.options.max_pending;
        match self.pending.insert(pending, limit) {
            Err(pending) => {
                router.outcome(now, backend, Outcome::Abandoned);
                out.note(Note::Count("diameter_pending_limit"));
                self.give_up(
                    now,
                    *pending,
                    (result::TOO_BUSY, "too many requests are under way"),
                    RequestOutcome::Rejected,
                    out,
                );
            }
            Ok(identifier) => {
                let Some(pending) = self.pending.get(identifier) else { return };
                let mut fits = true;
                out.send(to, class, |bytes| {
                    fits = rewrite::request(&pending.request, identifier, resent, &from, bytes)
                });
                if fits {
                    return self.schedule(now, expires, identifier);
                }
                if let Some(pending) = self.pending.remove(identifier) {
                    router.outcome(now, backend, Outcome::Abandoned);
                    self.give_up(
                        now,
                        pending,
                        (result::INVALID_MESSAGE_LENGTH, "too long with our Route-Record"),
                        RequestOutcome::Rejected,
                        out,
                    );
                }
            }
        }
    }

    /// A backend's own request goes to the client that it names.
    #[allow(clippy::too_many_arguments, reason = "what every handler gets")]
    fn towards_client(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        header: &Header,
        summary: &Summary<'_>,
        class: ClassId,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let host = summary.destination_host.unwrap_or_default();
        self.lower.clear();
        self.lower.extend(host.iter().map(u8::to_ascii_lowercase));
        let flow = router.named_flow(router.keyer().session(SPACE + 1, &self.lower));
        let Some(flow) = flow.filter(|_| !host.is_empty()) else {
            return self.refuse_early(
                now,
                message,
                class,
                (result::UNABLE_TO_DELIVER, "no client of that Destination-Host is connected"),
                None,
                out,
            );
        };
        let pending = Pending {
            origin: message.from,
            hop_by_hop: header.hop_by_hop,
            to: Endpoint::Client(flow),
            backend: None,
            pool: None,
            session: None,
            ends_session: false,
            in_session: true,
            fixed: true,
            application: header.application,
            class,
            arrived: message.arrived,
            deadline: message.arrived
                + router.class(class).deadline.unwrap_or(self.settings.options.answer_timeout.0),
            expires: now + self.settings.options.answer_timeout.0,
            sent: now,
            tried: [BackendId(0); TRIES_MAX],
            tries: 0,
            request: self.pending.buffer(message.bytes),
        };
        let (expires, limit) = (pending.expires, self.settings.options.max_pending);
        let from = self.identity_of(message.from).unwrap_or_default();
        match self.pending.insert(pending, limit) {
            Err(pending) => self.give_up(
                now,
                *pending,
                (result::TOO_BUSY, "too many requests are under way"),
                RequestOutcome::Rejected,
                out,
            ),
            Ok(identifier) => {
                out.send(Endpoint::Client(flow), class, |bytes| {
                    rewrite::request(message.bytes, identifier, false, &from, bytes);
                });
                self.schedule(now, expires, identifier);
            }
        }
    }

    fn on_answer(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        header: &Header,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let worker = Pendings::worker_of(header.hop_by_hop);
        if worker != self.settings.worker && worker.0 < self.settings.workers {
            return out.hand_over(worker, message);
        }
        let expected =
            self.pending.get(header.hop_by_hop).is_some_and(|pending| pending.to == message.from);
        if !expected {
            return out.drop_message("answer_unmatched");
        }
        let summary = Summary::of(message.bytes);
        if let Some(pending) = self.pending.get(header.hop_by_hop)
            && header.flags & FLAG_ERROR != 0
            && pending.backend.is_some()
            && summary
                .result_code
                .is_some_and(|code| self.settings.options.reroute_on.contains(&code))
        {
            return self.on_refusal(now, message, header.hop_by_hop, router, out);
        }
        let Some(pending) = self.pending.remove(header.hop_by_hop) else { return };
        if let Some(backend) = pending.backend {
            let latency = now.saturating_duration_since(pending.sent);
            router.outcome(now, backend, Outcome::Answered { latency });
        }
        let success = summary.result_code.is_some_and(|code| (2_000..3_000).contains(&code));
        if pending.ends_session
            && success
            && let Some(session) = pending.session
        {
            router.forget(now, session);
        }
        self.deliver(now, pending, message.bytes, None, out);
    }

    /// An error that another backend may not have: RFC 6733 6.2 leaves it to the agent. T is not
    /// set, since an answer was received (3).
    fn on_refusal(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        identifier: u32,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(mut pending) = self.pending.remove(identifier) else { return };
        if let Some(backend) = pending.backend.take() {
            router.outcome(now, backend, Outcome::Refused);
        }
        match self.next_backend(now, &pending, router) {
            Ok(backend) => {
                out.note(Note::Retry("answered_busy"));
                self.launch(now, pending, backend, false, router, out);
            }
            Err(_) => self.deliver(now, pending, message.bytes, Some(RequestOutcome::Failed), out),
        }
    }

    fn next_backend(
        &self,
        now: Instant,
        pending: &Pending,
        router: &mut dyn Router,
    ) -> Result<BackendId, Refusal> {
        let tries = usize::from(pending.tries);
        if pending.fixed
            || tries > usize::from(router.class(pending.class).retry)
            || tries >= TRIES_MAX
        {
            return Err(Refusal::NoBackend);
        }
        let session = pending.session.unwrap_or_else(|| router.keyer().session(SPACE, b""));
        ask(now, pending, session, None, pending.in_session, router)
    }

    /// The answer goes back.
    fn deliver(
        &mut self,
        now: Instant,
        pending: Pending,
        answer: &[u8],
        outcome: Option<RequestOutcome>,
        out: &mut Outbox,
    ) {
        let timely =
            if now <= pending.deadline { RequestOutcome::Met } else { RequestOutcome::Late };
        let backend = pending.tried.first().copied().filter(|_| pending.tries > 0);
        let at_backend = now.saturating_duration_since(pending.sent);
        note(
            now,
            pending.arrived,
            pending.class,
            outcome.unwrap_or(timely),
            backend,
            at_backend,
            out,
        );
        out.send(pending.origin, ClassId::CONTROL, |bytes| {
            rewrite::answer(answer, pending.hop_by_hop, bytes)
        });
        self.pending.recycle(pending.request);
    }

    /// There will be no answer but ours.
    fn give_up(
        &mut self,
        now: Instant,
        pending: Pending,
        what: (u32, &str),
        outcome: RequestOutcome,
        out: &mut Outbox,
    ) {
        let identity = self.settings.identity();
        out.send(pending.origin, ClassId::CONTROL, |bytes| {
            error(&pending.request, identity, what.0, what.1, None, bytes)
        });
        note(now, pending.arrived, pending.class, outcome, None, Duration::ZERO, out);
        self.pending.recycle(pending.request);
    }

    /// RFC 6733 5.5.4: what waits for a peer that is gone goes to another, with T.
    pub(crate) fn fail_over_from(
        &mut self,
        now: Instant,
        peer: Endpoint,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        for identifier in self.pending.find(|pending| pending.to == peer) {
            let Some(mut pending) = self.pending.remove(identifier) else { continue };
            if let Some(backend) = pending.backend.take() {
                router.outcome(now, backend, Outcome::Lost);
            }
            match self.next_backend(now, &pending, router) {
                Ok(backend) => {
                    out.note(Note::Retry("link_lost"));
                    self.launch(now, pending, backend, true, router, out);
                }
                Err(_) => self.give_up(
                    now,
                    pending,
                    (result::UNABLE_TO_DELIVER, "the server was lost, and there is no other"),
                    RequestOutcome::Failed,
                    out,
                ),
            }
        }
    }

    /// No answer came in time.
    pub(crate) fn on_expired(
        &mut self,
        now: Instant,
        identifier: u32,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        if self.pending.get(identifier).is_none_or(|pending| pending.expires > now) {
            return;
        }
        let Some(pending) = self.pending.remove(identifier) else { return };
        if let Some(backend) = pending.backend {
            router.outcome(now, backend, Outcome::TimedOut);
        }
        self.give_up(
            now,
            pending,
            (result::UNABLE_TO_DELIVER, "no answer came in time"),
            RequestOutcome::Expired,
            out,
        );
    }
}

fn ask(
    now: Instant,
    pending: &Pending,
    session: SessionKey,
    pin: Option<strowger_contract::Pin>,
    in_session: bool,
    router: &mut dyn Router,
) -> Result<BackendId, Refusal> {
    let tries = usize::from(pending.tries).min(TRIES_MAX);
    let Some(pool) = pending.pool else { return Err(Refusal::NoBackend) };
    let query = Query {
        pool,
        session,
        pin,
        in_session,
        awaits: true,
        class: pending.class,
        // A second try is worth it as long as the client waits.
        deadline: if tries == 0 { pending.deadline } else { pending.expires },
        capability: pending.application,
        exclude: &pending.tried[..tries],
    };
    match router.route(now, &query) {
        Verdict::Go(route) => Ok(route.backend),
        Verdict::Refuse(refusal) => Err(refusal),
        Verdict::Wait(ticket) => {
            router.withdraw(now, ticket);
            Err(Refusal::NoBackend)
        }
    }
}

/// A refusal in Diameter's words.
fn words(refusal: Refusal) -> (u32, &'static str) {
    match refusal {
        Refusal::NoCapability => {
            (result::APPLICATION_UNSUPPORTED, "no server supports this application")
        }
        Refusal::Overloaded { .. } => (result::TOO_BUSY, "all servers are busy"),
        Refusal::TooLate => (result::TOO_BUSY, "the deadline has passed"),
        Refusal::ShuttingDown => (result::TOO_BUSY, "this node is leaving"),
        Refusal::SessionLost => (result::UNABLE_TO_DELIVER, "the session's server is gone"),
        _ => (result::UNABLE_TO_DELIVER, "no server is reachable"),
    }
}

/// The class of a request (DESIGN, section 5; DRMP by RFC 7944).
fn classify(header: &Header, summary: &Summary<'_>) -> ClassId {
    if summary.drmp.is_some_and(|priority| priority <= 1) {
        return ClassId::EMERGENCY;
    }
    match header.command {
        // RAR, STR, ASR.
        258 | SESSION_TERMINATION | 274 => ClassId::IN_SESSION,
        CREDIT_CONTROL => match summary.cc_request_type {
            Some(INITIAL_REQUEST | EVENT_REQUEST) | None => ClassId::SETUP,
            Some(_) => ClassId::IN_SESSION,
        },
        // ACR.
        271 => ClassId::BULK,
        // PUR; SAR, MAR of Cx and SWx.
        321 | 301 | 303 => ClassId::MOBILITY,
        // AAR, AIR, ULR, and what is unknown: somebody waits for it.
        _ => ClassId::SETUP,
    }
}

fn in_session(header: &Header, summary: &Summary<'_>) -> bool {
    match header.command {
        258 | SESSION_TERMINATION | 274 => true,
        CREDIT_CONTROL => {
            !matches!(summary.cc_request_type, Some(INITIAL_REQUEST | EVENT_REQUEST) | None)
        }
        _ => false,
    }
}

fn ends_session(header: &Header, summary: &Summary<'_>) -> bool {
    header.command == SESSION_TERMINATION
        || header.command == CREDIT_CONTROL
            && matches!(summary.cc_request_type, Some(TERMINATION_REQUEST | EVENT_REQUEST))
}

fn note(
    now: Instant,
    arrived: Instant,
    class: ClassId,
    outcome: RequestOutcome,
    backend: Option<BackendId>,
    at_backend: Duration,
    out: &mut Outbox,
) {
    let total = now.saturating_duration_since(arrived);
    out.note(Note::Request { class, outcome, backend, total, at_backend });
}
