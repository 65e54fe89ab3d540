//! Which backend a flow is joined to.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use strowger_contract::handover::{Broken, read, write};
use strowger_contract::network::source_name;
use strowger_contract::outbox::SpliceLimits;
use strowger_contract::{
    Attempt, BackendId, ClassId, ClassRule, CloseCause, Closing, Context, Endpoint, Engine, FlowId,
    Message, Note, NumberMap, Opened, Outbox, Outcome, PeerChange, PeerFacts, PoolId, Query,
    Refusal, RequestOutcome, Route, Router, SessionKey, Ticket, Verdict,
};

use crate::options::{Relay, TcpMatch};
use crate::{SPACE, Tcp};

/// How many backends one flow is tried at.
const TRIES_MAX: usize = 4;

/// How often flows that wait because of `backpressure` ask again.
const PARKED_EVERY: Duration = Duration::from_millis(10);

/// One flow.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Flow {
    #[serde(with = "strowger_contract::handover::moment")]
    arrived: Instant,
    session: SessionKey,
    pool: PoolId,
    class: ClassId,
    tried: Vec<BackendId>,
    /// The backend that it is, or is being, joined to; the router awaits its outcome.
    backend: Option<BackendId>,
    #[serde(with = "strowger_contract::handover::moment")]
    began: Instant,
    /// It waits for a slot.
    ticket: Option<Ticket>,
    joined: Option<Duration>,
}

/// A match, its networks read once.
type ReadyMatch = (TcpMatch, Vec<(IpAddr, u8)>);

/// A route, its networks read once.
type ReadyRoute = (TcpMatch, Vec<(IpAddr, u8)>, PoolId);

/// The engine of one worker.
#[derive(Debug)]
pub struct TcpEngine {
    limits: SpliceLimits,
    routes: Vec<ReadyRoute>,
    classify: Vec<ClassRule<ReadyMatch>>,
    prefixes: (u8, u8),
    backpressure: Duration,
    pool: Option<PoolId>,
    flows: NumberMap<FlowId, Flow>,
    waiting: NumberMap<Ticket, FlowId>,
    /// Flows that wait because of `backpressure`, the oldest first; while there are any, the
    /// listener takes no more.
    parked: VecDeque<FlowId>,
    retry_at: Option<Instant>,
}

impl TcpEngine {
    pub(crate) fn new(context: &Context<'_, Tcp>) -> Self {
        let options = context.options;
        let limits = SpliceLimits {
            connect: options.connect_timeout.0,
            idle: options.idle_timeout.0,
            half_closed: options.half_closed_timeout.0,
            session: options.session_timeout.0,
            park: options.park_after.0,
            by_pipe: options.relay == Relay::Splice,
        };
        let routes = context.scope.routes.iter();
        let routes = routes.map(|(route, pool)| (route.clone(), route.networks(), *pool)).collect();
        let rule = |rule: &ClassRule<TcpMatch>| ClassRule {
            matching: (rule.matching.clone(), rule.matching.networks()),
            class: rule.class,
            even_carried: rule.even_carried,
        };
        Self {
            classify: context.scope.classify.iter().map(rule).collect(),
            prefixes: (options.source_prefix_v4, options.source_prefix_v6),
            backpressure: options.backpressure.0,
            parked: VecDeque::new(),
            retry_at: None,
            limits,
            routes,
            pool: context.scope.pool,
            flows: NumberMap::default(),
            waiting: NumberMap::default(),
        }
    }

    pub(crate) fn reconfigure(&mut self, context: &Context<'_, Tcp>) {
        let (flows, waiting) = (std::mem::take(&mut self.flows), std::mem::take(&mut self.waiting));
        let (parked, retry_at) = (std::mem::take(&mut self.parked), self.retry_at);
        *self = Self { flows, waiting, parked, retry_at, ..Self::new(context) };
    }

    fn pool_for(&self, source: IpAddr, facts: &PeerFacts) -> Option<PoolId> {
        self.routes
            .iter()
            .find(|(route, networks, _)| route.is_match(networks, source, facts))
            .map(|(.., pool)| *pool)
            .or(self.pool)
    }

    fn opened(
        &mut self,
        now: Instant,
        id: FlowId,
        opened: Opened<'_>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(pool) = self.pool_for(opened.remote.ip(), opened.facts) else {
            return refuse(now, id, now, ClassId::SETUP, Refusal::NoBackend, out);
        };
        let source = opened.remote.ip();
        let by_rule = ClassRule::first(&self.classify, false, |(rule, networks)| {
            rule.is_match(networks, source, opened.facts)
        });
        let session = session_key(pool, opened, self.prefixes, router);
        let flow = Flow {
            arrived: now,
            session,
            pool,
            class: by_rule.unwrap_or(ClassId::SETUP),
            tried: Vec::new(),
            backend: None,
            began: now,
            ticket: None,
            joined: None,
        };
        self.flows.insert(id, flow);
        self.join(now, id, router, out);
    }

    /// Asks for a backend and joins the flow to it.
    fn join(&mut self, now: Instant, id: FlowId, router: &mut dyn Router, out: &mut Outbox) {
        self.ask(now, id, false, router, out);
    }

    /// The same. `parked`: it was refused before, and waits for as long as `backpressure` says; its
    /// class's own deadline is over then, or was found too short.
    fn ask(
        &mut self,
        now: Instant,
        id: FlowId,
        parked: bool,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let class = router.class(flow.class);
        let tries = flow.tried.len();
        // A backend that does not answer takes its whole connect timeout: the budget must leave
        // room for the next one, or there would be no next one.
        let patience = if tries == 0 { Duration::ZERO } else { self.limits.connect * 2 };
        let patience = if parked { patience.max(self.backpressure) } else { patience };
        let budget = class.deadline.unwrap_or(self.limits.connect).max(patience);
        let refusal = if tries > usize::from(class.retry) || tries >= TRIES_MAX {
            Refusal::NoBackend
        } else {
            let query = Query {
                pool: flow.pool,
                session: flow.session,
                pin: None,
                in_session: false,
                awaits: true,
                class: flow.class,
                deadline: flow.arrived + budget,
                capability: 0,
                exclude: &flow.tried,
                attempt: if tries == 0 { Attempt::First } else { Attempt::Retry },
            };
            match router.route(now, &query) {
                Verdict::Go(route) => {
                    return self.go(now, id, route, out);
                }
                Verdict::Refuse(refusal) => refusal,
                Verdict::Wait(ticket) => {
                    flow.ticket = Some(ticket);
                    self.waiting.insert(ticket, id);
                    return;
                }
            }
        };
        self.refused(now, id, refusal, out);
    }

    /// The router says no: the client is reset, or it waits and so do those behind it.
    fn refused(&mut self, now: Instant, id: FlowId, refusal: Refusal, out: &mut Outbox) {
        let Some(flow) = self.flows.get(&id) else { return };
        let (arrived, class) = (flow.arrived, flow.class);
        let full = matches!(refusal, Refusal::Overloaded { .. } | Refusal::TooLate);
        if full && now < arrived + self.backpressure {
            if !self.parked.contains(&id) {
                out.note(Note::Count("backpressure"));
                // By age: one that waited in the queue in between has its place again.
                let behind = |other: &FlowId| {
                    self.flows.get(other).is_some_and(|other| other.arrived > arrived)
                };
                let place = self.parked.iter().position(behind).unwrap_or(self.parked.len());
                self.parked.insert(place, id);
            }
            self.retry_at = Some(now + PARKED_EVERY);
            return;
        }
        self.flows.remove(&id);
        refuse(now, id, arrived, class, refusal, out);
    }

    /// Joins the flow to the backend that was found.
    fn go(&mut self, now: Instant, id: FlowId, route: Route, out: &mut Outbox) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        flow.tried.push(route.backend);
        flow.backend = Some(route.backend);
        flow.began = now;
        out.splice(id, route.backend, self.limits);
    }

    fn joined(
        &mut self,
        now: Instant,
        id: FlowId,
        backend: BackendId,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let took = now.saturating_duration_since(flow.began);
        flow.joined = Some(took);
        // Idle flows hold nothing that they need no more.
        flow.tried = Vec::new();
        let ttl = router.session_ttl(flow.pool);
        router.remember(now, flow.session, backend, flow.class, ttl);
        let total = now.saturating_duration_since(flow.arrived);
        let promised = router.class(flow.class).deadline.unwrap_or(Duration::MAX);
        let outcome = if total <= promised { RequestOutcome::Met } else { RequestOutcome::Late };
        out.note(Note::Request {
            class: flow.class,
            outcome,
            backend: Some(backend),
            total,
            at_backend: took,
        });
    }

    fn join_failed(
        &mut self,
        now: Instant,
        id: FlowId,
        backend: BackendId,
        cause: CloseCause,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        flow.backend = None;
        router.outcome(now, backend, outcome_of(cause));
        if cause == CloseCause::Local || cause == CloseCause::Shutdown {
            self.flows.remove(&id);
            return;
        }
        if cause == CloseCause::Exhausted {
            // Another backend would need the same descriptor.
            let (arrived, class) = (flow.arrived, flow.class);
            self.flows.remove(&id);
            out.note(Note::Count("no_local_resource"));
            note(now, arrived, class, RequestOutcome::Failed, out);
            return out.close(Endpoint::Client(id), Closing::Reset);
        }
        out.note(Note::Retry(cause.word()));
        self.join(now, id, router, out);
    }

    fn closed(&mut self, now: Instant, id: FlowId, router: &mut dyn Router, out: &mut Outbox) {
        let Some(flow) = self.flows.remove(&id) else { return };
        if let Some(ticket) = flow.ticket {
            self.waiting.remove(&ticket);
            router.withdraw(now, ticket);
        }
        if let Some(backend) = flow.backend {
            let held = now.saturating_duration_since(flow.began);
            let outcome =
                flow.joined.map_or(Outcome::Abandoned, |latency| Outcome::Ended { latency, held });
            router.outcome(now, backend, outcome);
        }
        let parked = self.parked.len();
        self.parked.retain(|parked| *parked != id);
        if flow.ticket.is_some() || self.parked.len() < parked {
            out.note(Note::Count("hung_up_waiting"));
        }
        if flow.joined.is_none() {
            note(now, flow.arrived, flow.class, RequestOutcome::Failed, out);
        }
    }
}

fn outcome_of(cause: CloseCause) -> Outcome {
    match cause {
        CloseCause::ConnectTimeout => Outcome::TimedOut,
        cause if cause.is_far_fault() => Outcome::Lost,
        _ => Outcome::Abandoned,
    }
}

fn refuse(
    now: Instant,
    id: FlowId,
    arrived: Instant,
    class: ClassId,
    refusal: Refusal,
    out: &mut Outbox,
) {
    out.note(Note::Refused(class, refusal));
    note(now, arrived, class, RequestOutcome::Rejected, out);
    out.close(Endpoint::Client(id), Closing::Reset);
}

fn note(now: Instant, arrived: Instant, class: ClassId, outcome: RequestOutcome, out: &mut Outbox) {
    let total = now.saturating_duration_since(arrived);
    out.note(Note::Request { class, outcome, backend: None, total, at_backend: Duration::ZERO });
}

fn session_key(
    pool: PoolId,
    opened: Opened<'_>,
    prefixes: (u8, u8),
    router: &dyn Router,
) -> SessionKey {
    let (key, scope) = (router.session_key_name(pool), router.session_scope(pool));
    // Who asks for no name is known by its address.
    if let Some(name) = opened.facts.server_name.as_deref().filter(|_| key == "sni") {
        return router.keyer().session_in(SPACE, scope, name.as_bytes());
    }
    let name = source_name(key, opened.remote, opened.local, prefixes);
    router.keyer().session_in(SPACE, scope, name.as_bytes())
}

impl Engine for TcpEngine {
    fn on_message(&mut self, _: Instant, _: Message<'_>, _: &mut dyn Router, out: &mut Outbox) {
        out.drop_message("not_spliced");
    }

    fn on_granted(
        &mut self,
        now: Instant,
        ticket: Ticket,
        route: Route,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let known = self.waiting.remove(&ticket).filter(|id| self.flows.contains_key(id));
        let Some(id) = known else {
            return router.outcome(now, route.backend, Outcome::Abandoned);
        };
        if let Some(flow) = self.flows.get_mut(&id) {
            flow.ticket = None;
        }
        self.go(now, id, route, out);
    }

    fn on_refused(
        &mut self,
        now: Instant,
        ticket: Ticket,
        refusal: Refusal,
        _: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(id) = self.waiting.remove(&ticket) else { return };
        if let Some(flow) = self.flows.get_mut(&id) {
            flow.ticket = None;
        }
        self.refused(now, id, refusal, out);
    }

    fn on_opened(
        &mut self,
        now: Instant,
        peer: Endpoint,
        opened: Opened<'_>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        if let Endpoint::Client(id) = peer {
            self.opened(now, id, opened, router, out);
        }
    }

    fn is_saturated(&self) -> bool {
        !self.parked.is_empty()
    }

    fn on_peer(
        &mut self,
        now: Instant,
        peer: Endpoint,
        change: PeerChange,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Endpoint::Client(id) = peer else { return };
        match change {
            PeerChange::Opened { remote, local, transport } => {
                let facts = &PeerFacts::NONE;
                self.opened(now, id, Opened { remote, local, transport, facts }, router, out);
            }
            PeerChange::Joined(backend) => self.joined(now, id, backend, router, out),
            PeerChange::JoinFailed(backend, cause) => {
                self.join_failed(now, id, backend, cause, router, out)
            }
            PeerChange::Closed(_) => self.closed(now, id, router, out),
            PeerChange::Retired => {}
        }
    }

    fn on_timeout(&mut self, now: Instant, router: &mut dyn Router, out: &mut Outbox) {
        if self.retry_at.is_none_or(|at| now < at) {
            return;
        }
        self.retry_at = None;
        // Those behind one that may not go on yet are not asked for.
        while self.retry_at.is_none()
            && let Some(id) = self.parked.pop_front()
        {
            self.ask(now, id, true, router, out);
        }
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.retry_at
    }

    fn on_drain(&mut self, _: Instant, _: &mut dyn Router, _: &mut Outbox) {}

    fn in_progress(&self) -> usize {
        self.flows.len()
    }

    /// Flows that are joined. Those that are not begin anew there: nothing was passed yet.
    fn save(&self) -> Option<Vec<u8>> {
        let joined = self.flows.iter().filter(|(_, flow)| flow.joined.is_some());
        Some(write(&joined.collect::<Vec<_>>()))
    }

    fn restore(
        &mut self,
        now: Instant,
        saved: &[u8],
        router: &mut dyn Router,
        _: &mut Outbox,
    ) -> Result<(), Broken> {
        for (id, flow) in read::<Vec<(FlowId, Flow)>>(saved)? {
            if let Some(backend) = flow.backend {
                router.resume(now, backend);
            }
            self.flows.insert(id, flow);
        }
        Ok(())
    }
}
