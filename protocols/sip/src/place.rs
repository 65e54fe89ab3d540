//! Where a request goes next, and sending it there (RFC 3261 16.5, 16.6): the first place, further
//! forks, fail-over, redirection, and a place in the router's queue.

use std::net::SocketAddr;
use std::time::Instant;

use strowger_contract::{
    Attempt, BackendId, Endpoint, Message, Note, OnMiss, Outbox, Outcome, Pin, Query, Refusal,
    RequestOutcome, Route, Router, SessionKey, Ticket, Transport, Verdict,
};

use crate::branch::Branch;
use crate::chains::Link;
use crate::engine::{Settings, SipEngine};
use crate::flow::ClientFlow;
use crate::lookup::by_contact;
use crate::pace::Excluded;
use crate::requests::SOON;
use crate::respond::Answer;
use crate::scan::{Scan, Start};
use crate::send::{Origin, forward};
use crate::target::{Hop, Target, target};
use crate::transaction::{Cancel, LEGS_MAX, Leg, LegState};

/// Where a leg goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NextHop {
    pub(crate) backend: Option<BackendId>,
    pub(crate) pin: Option<Pin>,
    pub(crate) transport: Transport,
    pub(crate) address: SocketAddr,
    /// The connection that it goes back over.
    pub(crate) flow: Option<ClientFlow>,
}

impl NextHop {
    pub(crate) fn of(route: &Route) -> Self {
        Self {
            backend: Some(route.backend),
            pin: Some(route.pin),
            transport: route.transport,
            address: route.address,
            flow: None,
        }
    }

    /// What no pool is asked for: an address, or a client's connection.
    pub(crate) fn direct(hop: Hop) -> Option<Self> {
        match hop {
            Hop::Address { transport, address, pin } => {
                Some(Self { backend: None, pin, transport, address, flow: None })
            }
            Hop::Flow { client, address, pin } => Some(Self {
                backend: None,
                pin,
                transport: client.transport,
                address,
                flow: Some(client),
            }),
            Hop::Backend { .. } | Hop::Name { .. } | Hop::Nowhere(..) => None,
        }
    }

    pub(crate) fn endpoint(&self, settings: &Settings) -> Option<Endpoint> {
        if let Some(client) = self.flow {
            return Some(client.endpoint);
        }
        match self.backend {
            Some(backend) if self.transport.is_stream() => Some(Endpoint::Backend(backend)),
            _ => settings.endpoint(self.transport, self.address),
        }
    }
}

/// RFC 5630 5.3: what a `sips:` request is told that nobody may have.
pub(crate) fn not_secure() -> NoPlace {
    let warning = Some((380, "SIPS Not Allowed"));
    (Answer { warning, ..Answer::new(480, "Temporarily Unavailable") }, None)
}

/// Why a request found no place: what is said, and the router's reason if it was the router's.
pub(crate) type NoPlace = (Answer<'static>, Option<Refusal>);

impl SipEngine {
    /// Finds the next place of a request and sends it there, or lets it wait.
    #[allow(clippy::too_many_arguments, reason = "what every handler gets")]
    pub(crate) fn place_and_send(
        &mut self,
        now: Instant,
        slot: u32,
        request: &[u8],
        scan: &Scan,
        wanted: &Target<'_>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) -> Result<(), NoPlace> {
        let hop = match wanted.hop {
            Hop::Backend { .. } => match self.choose(now, slot, request, scan, wanted, router, out)
            {
                Verdict::Go(route) => NextHop::of(&route),
                Verdict::Refuse(Refusal::NoCapability) => {
                    out.note(Note::Count("sip_sips_without_tls"));
                    return Err(not_secure());
                }
                Verdict::Refuse(refusal) => {
                    return Err((self.answer_for(refusal), Some(refusal)));
                }
                Verdict::Wait(ticket) => {
                    let longest = now + self.settings.timeout() * 2;
                    self.transactions.wait(slot, ticket, longest);
                    out.note(Note::Count("sip_requests_queued"));
                    return Ok(());
                }
            },
            Hop::Nowhere(code, reason) => return Err((Answer::new(code, reason), None)),
            Hop::Name { .. } => return self.look_up(now, slot, wanted, out),
            direct => match NextHop::direct(direct) {
                Some(hop) => hop,
                None => return Err((Answer::new(500, "No Next Hop"), None)),
            },
        };
        self.send_leg(now, slot, request, scan, wanted, hop, false, router, out)
    }

    /// Asks the router. Instances that are silent or asked for a rest are left out as long as there
    /// are others.
    #[allow(clippy::too_many_arguments, reason = "what every handler gets")]
    pub(crate) fn choose(
        &mut self,
        now: Instant,
        slot: u32,
        request: &[u8],
        scan: &Scan,
        wanted: &Target<'_>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) -> Verdict {
        let none = Verdict::Refuse(Refusal::NoBackend);
        let Hop::Backend { pool, pin, in_session } = wanted.hop else { return none };
        let Start::Request { uri, .. } = scan.start else { return none };
        let Some(transaction) = self.transactions.get(slot) else { return none };
        let tried = &transaction.tried[..usize::from(transaction.tries)];
        let mut excluded = Excluded::new(tried);
        let first = tried.is_empty();
        let (class, method, session) = (transaction.class, transaction.method, transaction.session);
        // A fail-over has its own time: the promise was to the first try.
        let deadline = if first { transaction.deadline } else { now + self.settings.timeout() };
        let tried_only = excluded;
        if pin.is_none() && !in_session {
            self.pace.resting(now, pool, &mut excluded);
        }
        let affine = (pin.is_none() && !in_session)
            .then(|| self.record_of(method, request, scan, uri.of(request), router))
            .flatten()
            .filter(|record| router.lookup(now, *record).is_some());
        let session = match affine {
            Some(record) => SessionKey { stable: session.stable, keyed: record.keyed },
            None => session,
        };
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
            attempt: if first { Attempt::First } else { Attempt::Retry },
        };
        let anew = Query { attempt: Attempt::Anew, ..query };
        let mut verdict = router.route(now, &Query { exclude: excluded.list(), ..query });
        // Those that asked for less, and those that must not have it, are passed over.
        let mut passed = None;
        while let Verdict::Go(route) = verdict {
            let why = if self.settings.bars(request, scan, wanted, route.transport) {
                Refusal::NoCapability
            } else if self.overload.is_left_out(now, route.backend, class, in_session) {
                Refusal::Overloaded { retry_after: SOON }
            } else {
                break;
            };
            router.outcome(now, route.backend, Outcome::Abandoned);
            if let Refusal::Overloaded { .. } = why {
                out.note(Note::Count("sip_oc_left_out"));
            }
            passed.get_or_insert(why);
            if pin.is_some() || !excluded.push(route.backend) {
                return Verdict::Refuse(why);
            }
            verdict = router.route(now, &Query { exclude: excluded.list(), ..anew });
        }
        if let (Some(why), Verdict::Refuse(_)) = (passed, &verdict) {
            return Verdict::Refuse(why);
        }
        if matches!(verdict, Verdict::Refuse(_)) && excluded.list().len() > tried_only.list().len()
        {
            return router.route(now, &Query { exclude: tried_only.list(), ..query });
        }
        verdict
    }

    /// Writes the request for the next hop and sends it.
    #[allow(clippy::too_many_arguments, reason = "what every handler gets")]
    pub(crate) fn send_leg(
        &mut self,
        now: Instant,
        slot: u32,
        request: &[u8],
        scan: &Scan,
        wanted: &Target<'_>,
        mut hop: NextHop,
        as_datagram: bool,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) -> Result<(), NoPlace> {
        if self.settings.bars(request, scan, wanted, hop.transport) {
            if let Some(backend) = hop.backend {
                router.outcome(now, backend, Outcome::Abandoned);
            }
            out.note(Note::Count("sip_sips_without_tls"));
            return Err(not_secure());
        }
        let full = self.transactions.get(slot).is_none_or(|known| known.legs.len() >= LEGS_MAX);
        let to = hop.endpoint(&self.settings).filter(|_| !full);
        let Some(mut to) = to else {
            if let Some(backend) = hop.backend {
                router.outcome(now, backend, Outcome::Abandoned);
            }
            return Err((Answer::new(500, "No Socket Reaches The Next Hop"), None));
        };
        let mut sent = self.transactions.buffer(b"");
        let (t1, t_whole) = (self.settings.options.t1.0, self.settings.timeout());
        let most = self.settings.options.failover_timeout.0;
        let least = self.settings.options.failover_min.0;
        let Some(transaction) = self.transactions.get(slot) else { return Ok(()) };
        let (call_id, generation) = (transaction.call_id, transaction.generation);
        let pool = transaction.pool;
        let (invite, method) = (transaction.is_invite(), transaction.method);
        if let Some(backend) = hop.backend {
            transaction.note_try(backend);
        }
        let attempt = transaction.legs.len() as u8 + 1;
        let breadth = transaction.breadth;
        let origin = Origin {
            client: transaction.client,
            source: transaction.source,
            transport: transaction.transport,
            local: transaction.local,
            method,
            from_backend: transaction.from_backend,
        };
        let Start::Request { uri, .. } = scan.start else { return Ok(()) };
        let branch = Branch {
            worker: self.settings.worker,
            slot,
            generation,
            attempt,
            loop_hash: crate::incoming::loop_hash(request, scan, uri.of(request), call_id),
            stateless: false,
            pin: hop.pin.filter(|_| hop.backend.is_some()),
        };
        let split = self.settings.options.fork == crate::options::Fork::Parallel
            && !scan
                .all(crate::scan::Name::To)
                .any(|to| crate::uri::tag(to.value.of(request)).is_some());
        let breadth =
            split.then(|| (breadth / u32::from(self.settings.options.fork_targets)).max(1));
        let mut spare = (std::mem::take(&mut self.edit_scan), std::mem::take(&mut self.edited));
        let mut write = |hop: &NextHop, sent: &mut Vec<u8>, router: &dyn Router| {
            sent.clear();
            forward(
                &self.settings,
                request,
                scan,
                wanted,
                hop,
                branch,
                &origin,
                call_id,
                breadth,
                router,
                sent,
            );
            let keys = router.token_keys();
            let spare = (&mut spare.0, &mut spare.1);
            self.settings.hide_request(sent, wanted, hop, method, keys, spare);
        };
        write(&hop, &mut sent, router);
        let mut upgraded = false;
        if hop.transport == Transport::Udp
            && hop.flow.is_none()
            && !as_datagram
            && self.large.wants_stream(now, sent.len(), self.settings.options.udp_max, hop.address)
            && self.settings.local.has(Transport::Tcp)
        {
            hop.transport = Transport::Tcp;
            to = Endpoint::Remote { transport: Transport::Tcp, address: hop.address };
            upgraded = true;
            write(&hop, &mut sent, router);
            out.note(Note::Count("sip_large_over_tcp"));
        }
        (self.edit_scan, self.edited) = spare;
        self.edit(&mut sent, &origin, hop.backend.is_some(), router);
        let pinned = matches!(wanted.hop, Hop::Backend { pin: Some(_), .. });
        let patience = hop.backend.filter(|_| !pinned).map(|backend| {
            let patience = self.pace.patience(backend, invite, least, most);
            self.pace.placed(now, backend, pool, patience);
            patience
        });
        // A place of a name is left for the next one as an instance is (RFC 3263 4.3), as long as
        // there is one.
        let others = self.transactions.get(slot).is_some_and(|it| !it.named.places.is_empty());
        let patience = patience.or_else(|| others.then_some(most));
        let leg = Leg {
            link: Link::default(),
            backend: hop.backend,
            pin: hop.pin,
            to,
            is_flow: hop.flow.is_some(),
            address: hop.address,
            sent_at: now,
            owed: hop.backend.is_some(),
            state: LegState::Calling,
            abandoned: false,
            answered: false,
            rang: false,
            upgraded,
            cancel: Cancel::No,
            sent,
            repeat_at: (!hop.transport.is_stream()).then(|| now + t1),
            repeat_after: t1,
            excused: false,
            failover_at: patience.map(|patience| now + patience),
            expires_at: Some(now + t_whole),
        };
        if let Some(transaction) = self.transactions.get(slot) {
            let class = transaction.class;
            out.send(to, class, |bytes| bytes.extend_from_slice(&leg.sent));
            self.transactions.push_leg(slot, leg);
        }
        self.will_hedge(now, slot, &wanted.hop);
        Ok(())
    }

    /// Tries the next instance, if there is one, the class allows, and the retries are within their
    /// budget.
    pub(crate) fn fail_over(
        &mut self,
        now: Instant,
        slot: u32,
        why: &'static str,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) -> bool {
        let Some(transaction) = self.transactions.get(slot) else { return false };
        if !transaction.cancelled && !transaction.named.places.is_empty() {
            let done = self.next_place(now, slot, router, out);
            if done {
                out.note(Note::Retry(why));
            }
            return done;
        }
        if transaction.cancelled
            || transaction.ticket.is_some()
            || transaction.pool.is_none()
            || transaction.retries >= router.class(transaction.class).retry
        {
            return false;
        }
        if !self.pace.take_retry() {
            out.note(Note::Count("sip_retry_budget_empty"));
            return false;
        }
        let done = self.again(now, slot, router, out);
        if done {
            if let Some(transaction) = self.transactions.get(slot) {
                transaction.retries += 1;
            }
            out.note(Note::Retry(why));
        }
        done
    }

    /// Serial forking: the next instance, because the last one's answer was no good.
    pub(crate) fn next_fork(
        &mut self,
        now: Instant,
        slot: u32,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) -> bool {
        let Some(transaction) = self.transactions.get(slot) else { return false };
        if transaction.forks_left == 0 || transaction.cancelled {
            return false;
        }
        transaction.forks_left -= 1;
        self.again(now, slot, router, out)
    }

    /// Sends the kept request to one more instance of its pool.
    fn again(
        &mut self,
        now: Instant,
        slot: u32,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) -> bool {
        self.with_request(slot, |engine, request, scan| {
            let Some(wanted) = engine.target_again(slot, request, scan, router) else {
                return false;
            };
            // Nobody else has a pinned dialog.
            let open = matches!(wanted.hop, Hop::Backend { pin: None, .. });
            open && engine.place_and_send(now, slot, request, scan, &wanted, router, out).is_ok()
        })
        .unwrap_or(false)
    }

    pub(crate) fn target_again<'a>(
        &mut self,
        slot: u32,
        request: &'a [u8],
        scan: &'a Scan,
        router: &dyn Router,
    ) -> Option<Target<'a>> {
        self.come_again(slot, request, scan, router).map(|(_, target)| target)
    }

    /// A transaction's request as it came, and where it goes.
    pub(crate) fn come_again<'a>(
        &mut self,
        slot: u32,
        request: &'a [u8],
        scan: &'a Scan,
        router: &dyn Router,
    ) -> Option<(Message<'a>, Target<'a>)> {
        let transaction = self.transactions.get(slot)?;
        let message = Message {
            from: transaction.from,
            transport: transaction.transport,
            remote: transaction.source,
            local: transaction.local,
            arrived: transaction.arrived,
            bytes: request,
        };
        let call_id = transaction.call_id;
        let Start::Request { method, uri } = scan.start else { return None };
        let (method, uri) = (method.of(request), uri.of(request));
        let emergency = transaction.class == strowger_contract::ClassId::EMERGENCY;
        let target = target(&self.settings, &message, scan, method, uri, call_id, router);
        Some((message, Target { emergency, ..target }))
    }

    /// Works on a transaction's request as it came.
    pub(crate) fn with_request<R>(
        &mut self,
        slot: u32,
        work: impl FnOnce(&mut Self, &[u8], &Scan) -> R,
    ) -> Option<R> {
        let mut scan = std::mem::take(&mut self.other_scan);
        let request = self.transactions.get(slot).map(|known| std::mem::take(&mut known.request));
        let result = match &request {
            Some(request) if scan.scan(request).is_ok() => Some(work(self, request, &scan)),
            _ => None,
        };
        if let (Some(transaction), Some(request)) = (self.transactions.get(slot), request) {
            transaction.request = request;
        }
        self.other_scan = scan;
        result
    }

    /// RFC 3261 16.5: asks at the next address that a 3xx named.
    pub(crate) fn next_contact(
        &mut self,
        now: Instant,
        slot: u32,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) -> bool {
        loop {
            let Some(transaction) = self.transactions.get(slot) else { return false };
            if transaction.cancelled {
                return false;
            }
            let Some(contact) = transaction.contacts.pop() else { return false };
            let sent = self.with_request(slot, |engine, request, scan| {
                let known = engine.target_again(slot, request, scan, router)?;
                let uri = crate::uri::Uri::parse(&contact)?;
                let Some(address) = uri.address() else {
                    let wanted = by_contact(known, Some(&contact));
                    return engine
                        .place_and_send(now, slot, request, scan, &wanted, router, out)
                        .ok();
                };
                let (transport, backend) = (uri.transport(), router.backend_at(address));
                let pin = backend.and_then(|backend| router.backend(backend)).map(|view| view.pin);
                let hop = match (pin, known.hop) {
                    (Some(_), Hop::Backend { pool, .. }) => {
                        Hop::Backend { pool, pin, in_session: false }
                    }
                    _ => Hop::Address { transport, address, pin: None },
                };
                let wanted = Target { hop, uri: Some(&contact), ..known };
                engine.place_and_send(now, slot, request, scan, &wanted, router, out).ok()
            });
            if sent.flatten().is_some() {
                out.note(Note::Count("sip_redirections_followed"));
                return true;
            }
        }
    }

    /// A request that waited may go.
    pub(crate) fn granted(
        &mut self,
        now: Instant,
        ticket: Ticket,
        route: Route,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(slot) = self.transactions.waited(ticket) else {
            // It was cancelled or ended meanwhile.
            return router.outcome(now, route.backend, Outcome::Abandoned);
        };
        let hop = NextHop::of(&route);
        let sent = self.with_request(slot, |engine, request, scan| {
            let wanted = engine.target_again(slot, request, scan, router)?;
            Some(engine.send_leg(now, slot, request, scan, &wanted, hop, false, router, out))
        });
        match sent.flatten() {
            Some(Ok(())) => {}
            Some(Err((answer, _))) => {
                self.end_with(now, slot, &answer, RequestOutcome::Failed, out);
            }
            None => router.outcome(now, route.backend, Outcome::Abandoned),
        }
        self.schedule(now, slot);
    }

    /// A request that waited may not go.
    pub(crate) fn denied(
        &mut self,
        now: Instant,
        ticket: Ticket,
        refusal: Refusal,
        router: &dyn Router,
        out: &mut Outbox,
    ) {
        let Some(slot) = self.transactions.waited(ticket) else { return };
        let Some(transaction) = self.transactions.get(slot) else { return };
        out.note(Note::Refused(transaction.class, refusal));
        if transaction.is_pending() {
            // It waited for one more place; the others may still answer.
            return;
        }
        let on_miss = router.class(transaction.class).on_refusal(refusal);
        let answer = self.answer_for(refusal);
        if on_miss != OnMiss::Answer {
            return self.forget_refused(now, slot, answer.code, on_miss, out);
        }
        self.end_with(now, slot, &answer, RequestOutcome::Rejected, out);
        self.schedule(now, slot);
    }
}

/// Whom large requests may reach over TCP (RFC 3261 18.1.1).
#[derive(Debug, Default)]
pub(crate) struct Large {
    refused: std::collections::HashMap<SocketAddr, Instant>,
}

/// Addresses that are remembered as taking no TCP, and for how long.
const REFUSED_MAX: usize = 4_096;
const REFUSED_FOR: std::time::Duration = std::time::Duration::from_secs(60);

impl Large {
    /// Whether a datagram of so many bytes should rather go over a stream.
    fn wants_stream(&self, now: Instant, bytes: usize, most: u32, to: SocketAddr) -> bool {
        most > 0 && bytes > most as usize && self.refused.get(&to).is_none_or(|until| *until <= now)
    }

    /// It takes no TCP.
    pub(crate) fn refused(&mut self, now: Instant, address: SocketAddr) {
        if self.refused.len() >= REFUSED_MAX {
            self.refused.clear();
        }
        self.refused.insert(address, now + REFUSED_FOR);
    }
}
