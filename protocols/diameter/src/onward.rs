//! Requests on their way to a backend (RFC 6733 6.1): where to, and whether now.

use std::time::Instant;

use strowger_contract::{
    Attempt, BackendId, ClassId, Closing, Endpoint, Note, OnMiss, Outbox, Outcome, Pin, PoolId,
    Query, Rate, Refusal, RequestOutcome, Route, RouteReason, Router, SessionKey, Ticket, Verdict,
};

use crate::SPACE;
use crate::answer::result;
use crate::avp::{FLAG_RETRANSMITTED, Header, Summary};
use crate::classify;
use crate::engine::DiameterEngine;
use crate::mediation::Applied;
use crate::overload::{About, realm_hash, tell_features};
use crate::pending::{Pending, TRIES_MAX};
use crate::relay::{Asked, note, words};
use crate::rewrite;
use crate::subscriber::{Keys, Subscriber};

/// Backends that are passed over for one request because they are full, at most, besides those that
/// were tried.
const PASSED_MAX: usize = 8;

/// What those hear that no backend may be sent now.
const BUSY: Refusal = Refusal::Overloaded { retry_after: std::time::Duration::from_secs(1) };

/// What the router said, after all that a peer's limits say.
pub(crate) enum Choice {
    Go(BackendId),
    Wait(Ticket),
    No(Refusal),
}

/// Where a request must or should go, before the router is asked.
#[derive(Clone, Copy, Default)]
pub(crate) struct Aim {
    pub(crate) pin: Option<Pin>,
    /// Nobody else will do.
    only: bool,
}

impl DiameterEngine {
    pub(crate) fn towards_backend(
        &mut self,
        now: Instant,
        asked: &Asked<'_>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let (message, header, summary, mut class) =
            (asked.message, asked.header, &asked.summary, asked.class);
        let in_session = classify::in_session(header, summary);
        let text = summary.session_id.or(summary.origin_host).unwrap_or_default();
        let session = router.keyer().session(SPACE, text);
        let inherits = summary.session_id.is_some() && in_session;
        let of_session = if inherits { router.session_class(now, session) } else { None };
        if let Some(of_session) = of_session {
            class = classify::inherited(class, of_session, router);
        }
        let asked = &Asked { class, message, header, summary: asked.summary, sender: asked.sender };
        let summary = &asked.summary;
        if !self.may_enter(now, asked, router) {
            out.note(Note::Count("diameter_ingress_limit"));
            let what = (result::TOO_BUSY, "this peer sends more than it may");
            return self.refuse_early(now, message, class, what, None, out);
        }
        if header.flags & FLAG_RETRANSMITTED != 0 && self.came_before(now, asked, out) {
            return;
        }
        let Some((pool, rules)) = self.settings.pool_for(header, summary, message.bytes) else {
            let what = self.settings.no_route(header, summary);
            return self.refuse_early(now, message, class, what, None, out);
        };
        let rules = rules.cloned();
        let remembered =
            summary.session_id.is_some() && !self.settings.is_stateless(header, summary);
        let is_bound = !router.bind_keys(pool).is_empty();
        let binds = is_bound
            && classify::begins_session(header, summary)
            && self.settings.creators.contains(&header.application);
        let follows = is_bound
            && !in_session
            && !binds
            && self.settings.followers.contains(&header.application);
        let keys = if binds || follows {
            Subscriber::of(message.bytes).keys(pool, router)
        } else {
            Keys::default()
        };
        let mut aim = self.named(pool, summary, in_session, router);
        if aim.pin.is_none() {
            aim = self.redirected(now, asked, router);
        }
        if aim.pin.is_none() && (binds || follows && router.lookup(now, session).is_none()) {
            match self.bound(now, &keys, binds, router) {
                Some(bound) => aim = bound,
                None if follows && self.settings.options.bindings.missing != 0 => {
                    out.note(Note::Count("diameter_binding_not_found"));
                    let code = self.settings.options.bindings.missing;
                    let what = (code, "no server has this subscriber");
                    return self.refuse_early(now, message, class, what, None, out);
                }
                None if follows => out.note(Note::Count("diameter_binding_not_found")),
                None => {}
            }
        }
        let Some((deadline, expires)) = self.times(now, asked, router) else {
            out.note(Note::Refused(class, Refusal::TooLate));
            let what = words(Refusal::TooLate);
            match router.class(class).on_refusal(Refusal::TooLate) {
                OnMiss::Answer => self.refuse(message, what.0, what.1, None, out),
                how => forget(message.from, how, out),
            }
            let outcome = RequestOutcome::Rejected;
            return note(
                now,
                message.arrived,
                class,
                outcome,
                None,
                std::time::Duration::ZERO,
                out,
            );
        };
        let pending = Pending {
            origin: message.from,
            sender: asked.sender,
            hop_by_hop: header.hop_by_hop,
            end_to_end: header.end_to_end,
            to: message.from,
            backend: None,
            pool: Some(pool),
            rules,
            session: remembered.then_some(session),
            place: session,
            ends_session: classify::ends_session(header, summary),
            in_session,
            fixed: aim.only,
            binds: binds && !keys.is_empty(),
            follows,
            resent: false,
            lanes_lost: 0,
            redirects: 0,
            application: header.application,
            command: header.command,
            class,
            arrived: message.arrived,
            deadline,
            expires,
            sent: now,
            tried: [BackendId(0); TRIES_MAX],
            tries: 0,
            hedge_at: None,
            twin: None,
            lost: false,
            request: self.pending.buffer(message.bytes),
        };
        let strict = in_session && (aim.only || aim.pin.is_none());
        let mut choice = self.choose(now, &pending, aim.pin, strict || aim.only, router);
        if let (Choice::No(Refusal::NoBackend), true, true, false) =
            (&choice, aim.pin.is_some(), in_session, aim.only)
        {
            choice = self.choose(now, &pending, None, true, router);
        }
        self.follow(now, pending, choice, router, out);
    }

    /// Does with a request what was chosen for it.
    pub(crate) fn follow(
        &mut self,
        now: Instant,
        pending: Pending,
        choice: Choice,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        match choice {
            Choice::Go(backend) if pending.binds => {
                self.bind_and_go(now, pending, backend, router, out);
            }
            Choice::Go(backend) => self.go(now, pending, backend, router, out),
            Choice::Wait(ticket) => {
                self.waiting.insert(ticket, Box::new(pending));
            }
            Choice::No(refusal) => self.refuse_pending(now, pending, refusal, router, out),
        }
    }

    /// A request that waited may go to a backend: if that one may be sent more by now, else to
    /// another. While it waited, a session of its subscriber may have been bound elsewhere.
    pub(crate) fn granted(
        &mut self,
        now: Instant,
        pending: Pending,
        route: Route,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        if self.may_leave(now, &pending, route.backend, router) {
            return self.follow(now, pending, Choice::Go(route.backend), router, out);
        }
        router.outcome(now, route.backend, Outcome::Abandoned);
        let bound = pending.in_session || pending.fixed || route.reason != RouteReason::Balanced;
        let choice = if bound {
            Choice::No(BUSY)
        } else {
            self.choose_but(now, &pending, (None, Some(route.backend)), false, router)
        };
        self.follow(now, pending, choice, router, out);
    }

    /// What one connection may send in a second. Emergencies always may.
    fn may_enter(&mut self, now: Instant, asked: &Asked<'_>, router: &dyn Router) -> bool {
        let Some(rates) = self.settings.options.ingress else { return true };
        if asked.class == ClassId::EMERGENCY {
            return true;
        }
        let urgent = router.class(asked.class).tier <= 1;
        let Some(peer) = self.peer(asked.message.from) else { return true };
        (urgent || peer.buckets.take(now, 1, rates.max - rates.reserved))
            && peer.buckets.take(now, 0, rates.max)
    }

    /// When the promise ends and when the answer is no longer waited for; `None`: it is over already.
    /// Origination-Time-Stamp and Maximum-Wait-Time (TS 29.213 and 29.061: both in milliseconds)
    /// count against the clock of their sender: the smallest difference to ours that was seen of a
    /// peer stands for no delay, so that clocks need not agree.
    fn times(
        &mut self,
        now: Instant,
        asked: &Asked<'_>,
        router: &dyn Router,
    ) -> Option<(Instant, Instant)> {
        let arrived = asked.message.arrived;
        let timeout = self.settings.answer_timeout(asked.header, &asked.summary);
        let promised = router.class(asked.class).deadline.unwrap_or(timeout);
        let (mut deadline, mut expires) = (arrived + promised, now + timeout);
        if let (Some(stamp), Some(wait)) =
            (asked.summary.origination_stamp, asked.summary.maximum_wait)
        {
            let age = self.peer(asked.message.from)?.skew.age(arrived, stamp);
            let left = std::time::Duration::from_millis(wait.into()).checked_sub(age)?;
            deadline = deadline.min(arrived + left);
            expires = expires.min(arrived + left);
        }
        (deadline > now && expires > now).then_some((deadline, expires))
    }

    /// The backend that the Destination-Host names, in the route's pool or any of the listener's, or
    /// one that stands in for it.
    pub(crate) fn named(
        &self,
        pool: PoolId,
        summary: &Summary<'_>,
        in_session: bool,
        router: &dyn Router,
    ) -> Aim {
        let Some(host) = summary.destination_host.filter(|host| !self.settings.is_us(host)) else {
            return Aim::default();
        };
        let find = |host: &[u8]| {
            let others = self.settings.pools.iter().copied().filter(|&other| other != pool);
            std::iter::once(pool).chain(others).find_map(|pool| router.named(pool, host))
        };
        let only = in_session && !self.settings.options.session_failover;
        let aim = |backend: BackendId| {
            let pin = router.backend(backend).map(|view| view.pin);
            Aim { pin, only: only && pin.is_some() }
        };
        let is_up =
            |backend: &BackendId| router.backend(*backend).is_some_and(|view| view.is_linked);
        let named = find(host);
        if let Some(backend) = named.filter(is_up) {
            return aim(backend);
        }
        let mut stands_in = self.settings.options.alternates.iter();
        let hosts = stands_in.find(|(name, _)| host.eq_ignore_ascii_case(name.as_bytes()));
        let mut hosts = hosts.into_iter().flat_map(|(_, hosts)| hosts);
        let other = hosts.find_map(|host| find(host.as_bytes()).filter(is_up));
        other.or(named).map_or_else(Aim::default, aim)
    }

    /// What a redirect agent said before of requests like this.
    fn redirected(&self, now: Instant, asked: &Asked<'_>, router: &dyn Router) -> Aim {
        if self.redirects.is_empty() {
            return Aim::default();
        }
        let user = Subscriber::of(asked.message.bytes).imsi.unwrap_or_default();
        let found = self.redirects.find(now, asked.header, &asked.summary, user);
        let view = found.and_then(|backend| router.backend(backend));
        Aim { pin: view.filter(|view| view.is_linked).map(|view| view.pin), only: false }
    }

    /// The backend that has the subscriber, by the first of its names that is bound. A session that
    /// creates a binding follows names that are its own subscriber's only: an address may have been
    /// somebody else's until now.
    pub(crate) fn bound(
        &self,
        now: Instant,
        keys: &Keys,
        creates: bool,
        router: &mut dyn Router,
    ) -> Option<Aim> {
        let mut names = keys.iter().filter(|key| !(creates && key.is_exclusive()));
        let backend = names.find_map(|key| router.bound(now, key))?;
        let pin = router.backend(backend)?.pin;
        // Somebody else knows nothing of the subscriber: better no answer than a wrong one.
        Some(Aim { pin: Some(pin), only: !creates })
    }

    /// Notes whose the subscriber is, and sends the request there: to another backend than the one
    /// that was chosen if a session of the same subscriber was faster on another worker.
    fn bind_and_go(
        &mut self,
        now: Instant,
        pending: Pending,
        backend: BackendId,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let keys = keys_of(&pending, router);
        // One that was elsewhere before takes its subscriber along: it was lost or refused there.
        let moves = pending.tries > 0;
        let holder = bind(now, &pending, &keys, backend, moves, router);
        if holder == backend {
            return self.go(now, pending, backend, router, out);
        }
        router.outcome(now, backend, Outcome::Abandoned);
        out.note(Note::Count("diameter_binding_raced"));
        let pin = router.backend(holder).map(|view| view.pin);
        match self.choose(now, &pending, pin, false, router) {
            Choice::Go(backend) => {
                bind(now, &pending, &keys, backend, backend != holder, router);
                self.go(now, pending, backend, router, out);
            }
            Choice::Wait(ticket) => {
                self.waiting.insert(ticket, Box::new(pending));
            }
            Choice::No(refusal) => self.refuse_pending(now, pending, refusal, router, out),
        }
    }

    /// Asks the router, passing over backends that may not be sent more now.
    pub(crate) fn choose(
        &mut self,
        now: Instant,
        pending: &Pending,
        pin: Option<Pin>,
        strict: bool,
        router: &mut dyn Router,
    ) -> Choice {
        self.choose_but(now, pending, (pin, None), strict, router)
    }

    /// The same, passing over one more.
    fn choose_but(
        &mut self,
        now: Instant,
        pending: &Pending,
        (pin, but): (Option<Pin>, Option<BackendId>),
        strict: bool,
        router: &mut dyn Router,
    ) -> Choice {
        let tries = usize::from(pending.tries).min(TRIES_MAX);
        let Some(pool) = pending.pool else { return Choice::No(Refusal::NoBackend) };
        let mut passed = [BackendId(0); TRIES_MAX + 2 + PASSED_MAX];
        passed[..tries].copy_from_slice(&pending.tried[..tries]);
        let mut first = tries;
        for one in [but, pending.sender].into_iter().flatten() {
            passed[first] = one;
            first += 1;
        }
        for count in first..=first + PASSED_MAX {
            let query = Query {
                pool,
                session: pending.place,
                pin,
                in_session: strict,
                awaits: true,
                class: pending.class,
                // A second try is worth it as long as the client waits.
                deadline: if tries == 0 { pending.deadline } else { pending.expires },
                capability: pending.application,
                exclude: &passed[..count],
                attempt: match tries {
                    _ if count > first || but.is_some() => Attempt::Anew,
                    0 => Attempt::First,
                    _ => Attempt::Retry,
                },
            };
            match router.route(now, &query) {
                Verdict::Go(route) => {
                    if self.may_leave(now, pending, route.backend, router) {
                        return Choice::Go(route.backend);
                    }
                    router.outcome(now, route.backend, Outcome::Abandoned);
                    let bound = strict || route.reason == RouteReason::Table;
                    let Some(place) = passed.get_mut(count).filter(|_| !bound) else {
                        return Choice::No(BUSY);
                    };
                    *place = route.backend;
                }
                Verdict::Wait(ticket) => return Choice::Wait(ticket),
                Verdict::Refuse(_) if count > first || but.is_some() => return Choice::No(BUSY),
                Verdict::Refuse(refusal) => return Choice::No(refusal),
            }
        }
        Choice::No(BUSY)
    }

    /// Whether a backend may be sent one more now: its bulkhead, its rate, its overload reports.
    fn may_leave(
        &mut self,
        now: Instant,
        pending: &Pending,
        backend: BackendId,
        router: &mut dyn Router,
    ) -> bool {
        let options = &self.settings.options;
        if options.peer_pending > 0
            && router.backend(backend).is_some_and(|view| view.in_flight > options.peer_pending)
        {
            return false;
        }
        if pending.class == ClassId::EMERGENCY {
            return true;
        }
        if !self.reports.is_empty() && self.is_shed(now, pending, backend) {
            return false;
        }
        let Some(rates) = self.settings.options.egress else { return true };
        let rate = |per_second: u32| Rate { per_second, burst: (per_second / 10).max(1) };
        let urgent = router.class(pending.class).tier <= 1;
        let rest = rates.max - rates.reserved;
        (urgent || rest > 0 && router.pace(now, backend, 1, rate(rest)))
            && router.pace(now, backend, 0, rate(rates.max))
    }

    /// The loss algorithm (RFC 7683 6.2): so many percent are not sent.
    fn is_shed(&mut self, now: Instant, pending: &Pending, backend: BackendId) -> bool {
        let mut reduction = self.reports.reduction(now, About::Host(backend, pending.application));
        if let Some(pool) = pending.pool {
            let summary = Summary::of(&pending.request);
            let realm = realm_hash(summary.destination_realm.unwrap_or_default());
            let about = About::Realm(realm, pool, pending.application);
            reduction = reduction.max(self.reports.reduction(now, about));
        }
        reduction > 0 && self.roll() % 100 < u64::from(reduction)
    }

    /// A number that looks random.
    pub(crate) fn roll(&mut self) -> u64 {
        self.dice =
            self.dice.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        self.dice >> 33
    }

    /// Sends a request to a backend that the router chose.
    pub(crate) fn go(
        &mut self,
        now: Instant,
        mut pending: Pending,
        backend: BackendId,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        pending.lanes_lost = 0;
        // Without a link it finds out on its way, and goes elsewhere.
        let to = self.lane_to(backend, 0, router).unwrap_or(Endpoint::Backend(backend));
        self.go_over(now, pending, (backend, to), router, out);
    }

    /// Sends a request over one of a backend's links.
    pub(crate) fn go_over(
        &mut self,
        now: Instant,
        mut pending: Pending,
        (backend, to): (BackendId, Endpoint),
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        if let Some(place) = pending.tried.get_mut(usize::from(pending.tries)) {
            *place = backend;
        }
        pending.tries += 1;
        pending.backend = Some(backend);
        pending.to = to;
        pending.sent = now;
        if let (Some(session), Some(pool)) = (pending.session, pending.pool) {
            // Before the answer: the session's next request may come before it.
            let ttl = router.session_ttl(pool);
            router.learn(now, session, backend, pending.class, ttl);
            if pending.in_session {
                router.keep_bound(now, session, ttl);
            }
        }
        let (class, expires) = (pending.class, pending.expires);
        let from = self.identity_of(pending.origin).unwrap_or_default();
        let limit = self.settings.options.max_pending;
        let doic = self.settings.options.overload.doic;
        let identifier = match self.pending.insert(pending, limit) {
            Ok(identifier) => identifier,
            Err(pending) => {
                router.outcome(now, backend, Outcome::Abandoned);
                out.note(Note::Count("diameter_pending_limit"));
                let what = (result::TOO_BUSY, "too many requests are under way");
                return self.give_up(now, *pending, what, RequestOutcome::Rejected, router, out);
            }
        };
        self.note_copies(now, identifier);
        self.note_under_way(identifier);
        let Some(pending) = self.pending.get(identifier) else { return };
        let (mut fits, mut applied) = (true, Applied::default());
        let changes = &mut self.changes;
        out.send(to, class, |bytes| {
            let start = bytes.len();
            fits = rewrite::request(&pending.request, identifier, pending.resent, &from, bytes);
            if fits && doic && !Summary::of(&pending.request).tells_features {
                tell_features(bytes, start);
            }
            if fits {
                applied = changes.for_backend(bytes, start, pending.rules.as_deref());
            }
        });
        applied.note(out);
        if fits {
            return self.schedule(now, expires, identifier);
        }
        if let Some(pending) = self.pending.remove(identifier) {
            router.outcome(now, backend, Outcome::Abandoned);
            let what = (result::INVALID_MESSAGE_LENGTH, "too long with our Route-Record");
            self.give_up(now, pending, what, RequestOutcome::Rejected, router, out);
        }
    }

    /// Sends a request that could not be done where it was to another backend; gives it back if there
    /// is none.
    pub(crate) fn go_elsewhere(
        &mut self,
        now: Instant,
        pending: Pending,
        (pin, why): (Option<Pin>, &'static str),
        router: &mut dyn Router,
        out: &mut Outbox,
    ) -> Result<(), Box<Pending>> {
        if self.is_covered(&pending) {
            self.pending.recycle(pending.request);
            return Ok(());
        }
        if pending.fixed || !self.may_try_again(now, &pending, router) {
            return Err(Box::new(pending));
        }
        // What no other server can answer is not asked of it.
        let strict = pending.in_session && pin.is_none();
        match self.choose(now, &pending, pin, strict, router) {
            Choice::Go(backend) => {
                out.note(Note::Retry(why));
                self.follow(now, pending, Choice::Go(backend), router, out);
            }
            Choice::Wait(ticket) => {
                out.note(Note::Retry(why));
                self.waiting.insert(ticket, Box::new(pending));
            }
            Choice::No(_) => return Err(Box::new(pending)),
        }
        Ok(())
    }

    /// Whether a request that was lost may be sent once more.
    pub(crate) fn may_try_again(
        &self,
        now: Instant,
        pending: &Pending,
        router: &dyn Router,
    ) -> bool {
        let tries = usize::from(pending.tries);
        let few = tries <= usize::from(router.class(pending.class).retry) && tries < TRIES_MAX;
        few && pending.expires > now
    }

    /// The router refuses a request.
    pub(crate) fn refuse_pending(
        &mut self,
        now: Instant,
        pending: Pending,
        refusal: Refusal,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        if self.is_covered(&pending) {
            return self.pending.recycle(pending.request);
        }
        unbind_refused(now, &pending, router);
        out.note(Note::Refused(pending.class, refusal));
        let what = if pending.follows && pending.fixed {
            (result::UNABLE_TO_DELIVER, "the server that has this subscriber cannot be reached")
        } else {
            words(refusal)
        };
        match router.class(pending.class).on_refusal(refusal) {
            OnMiss::Answer => self.answer_with(&pending, what, out),
            how => forget(pending.origin, how, out),
        }
        let (arrived, class) = (pending.arrived, pending.class);
        let outcome = RequestOutcome::Rejected;
        note(now, arrived, class, outcome, None, std::time::Duration::ZERO, out);
        self.pending.recycle(pending.request);
    }
}

/// A refusal that is not said (`on_miss`).
fn forget(client: Endpoint, how: OnMiss, out: &mut Outbox) {
    match (how, client) {
        (OnMiss::Reset, Endpoint::Client(_)) => {
            out.note(Note::Count("refused_by_reset"));
            out.close(client, Closing::Reset);
        }
        _ => out.drop_message("refused_silently"),
    }
}

/// The client was told that a session does not exist, or will never hear of it: it binds nobody.
pub(crate) fn unbind_refused(now: Instant, pending: &Pending, router: &mut dyn Router) {
    if pending.binds
        && let Some(session) = pending.session
    {
        router.unbind(now, session);
        router.forget(now, session);
    }
}

/// The names of a request's subscriber.
pub(crate) fn keys_of(pending: &Pending, router: &dyn Router) -> Keys {
    let pool = pending.pool;
    pool.map_or_else(Keys::default, |pool| Subscriber::of(&pending.request).keys(pool, router))
}

/// Notes whose the subscriber is; who has it.
fn bind(
    now: Instant,
    pending: &Pending,
    keys: &Keys,
    backend: BackendId,
    force: bool,
    router: &mut dyn Router,
) -> BackendId {
    let (Some(session), Some(pool)) = (pending.session, pending.pool) else { return backend };
    let ttl = router.session_ttl(pool);
    let bound = keys.with(|keys| router.bind(now, session, keys, backend, ttl, force));
    bound.unwrap_or(backend)
}

/// Reads what a stored request was.
pub(crate) fn header_of(pending: &Pending) -> Option<Header> {
    Header::read(&pending.request)
}

/// The session that a request is placed by, where it names none.
pub(crate) fn place_of(summary: &Summary<'_>, router: &dyn Router) -> SessionKey {
    router.keyer().session(SPACE, summary.session_id.unwrap_or_default())
}
