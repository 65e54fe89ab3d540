//! The relay of one worker: what comes in goes to peers' upkeep or on its way.

use std::borrow::Cow;
use std::rc::Rc;
use std::time::{Duration, Instant};

use strowger_contract::{
    BackendId, ClassRule, Context, Endpoint, Engine, FlowId, Message, NumberMap, Opened, Outbox,
    Outcome, PeerChange, PoolId, Refusal, Route, Router, Ticket, Wheel, WorkerId,
};

use crate::Diameter;
use crate::answer::{Identity, result};
use crate::avp::{Header, Summary};
use crate::dictionary::Dictionary;
use crate::duplicates::Duplicates;
use crate::hedge::{Hedge, Hedging};
use crate::matching::{DiameterMatch, Matcher, Name};
use crate::mediation::{Changes, Mediation};
use crate::naming;
use crate::options::{AnswerTimeout, Application, DiameterOptions, Reroute};
use crate::overload::Reports;
use crate::peer::Peer;
use crate::pending::{Pending, Pendings};
use crate::redirect::Redirects;

/// How often peers are looked after, at most.
const UPKEEP_MIN: Duration = Duration::from_millis(20);
const UPKEEP_MAX: Duration = Duration::from_secs(1);

/// What the configuration says.
pub(crate) struct Settings {
    pub(crate) options: DiameterOptions,
    pub(crate) listener: String,
    pub(crate) realm: String,
    pub(crate) routes: Vec<Road>,
    pub(crate) classify: Vec<ClassRule<Matcher>>,
    pub(crate) pool: Option<PoolId>,
    pub(crate) pools: Vec<PoolId>,
    pub(crate) worker: WorkerId,
    pub(crate) workers: u8,
    pub(crate) started: u32,
    pub(crate) peers: Vec<Name>,
    pub(crate) dictionary: Cow<'static, Dictionary>,
    pub(crate) applications: Vec<u32>,
    pub(crate) stateless: Vec<u32>,
    pub(crate) creators: Vec<u32>,
    pub(crate) followers: Vec<u32>,
    pub(crate) answer_timeouts: Vec<Timeout>,
    pub(crate) hedging: Option<Hedging>,
    pub(crate) reroutes: Vec<(Option<u32>, u32)>,
}

/// A route, ready for messages.
pub(crate) struct Road {
    matcher: Matcher,
    pool: PoolId,
    /// What is done to messages that take it; `None`: nothing.
    rules: Option<Rc<Mediation>>,
}

/// One of `answer_timeouts`.
pub(crate) struct Timeout {
    pub(crate) applications: Vec<u32>,
    pub(crate) commands: Vec<u32>,
    pub(crate) priority: Option<u8>,
    pub(crate) timeout: Duration,
}

impl Settings {
    fn new(context: &Context<'_, Diameter>) -> Self {
        let (options, scope) = (context.options.clone(), context.scope);
        // What is wrong was found when the configuration was loaded.
        let mut known = Vec::new();
        let definitions = options.mediation.dictionary(&mut known);
        let dictionary = &*definitions;
        let numbers = |list: &[Application]| naming::applications(dictionary, list);
        let road = |(route, pool): &(DiameterMatch, PoolId)| {
            let rules = Mediation::new(&route.rules, dictionary, "", &mut Vec::new());
            Road {
                matcher: Matcher::new(route, dictionary),
                pool: *pool,
                rules: (!rules.is_empty()).then(|| Rc::new(rules)),
            }
        };
        let routes: Vec<Road> = scope.routes.iter().map(road).collect();
        let mut pools: Vec<PoolId> =
            routes.iter().map(|road| road.pool).chain(scope.pool).collect();
        pools.sort();
        pools.dedup();
        let timeout = |entry: &AnswerTimeout| Timeout {
            applications: numbers(&entry.application),
            commands: entry
                .command
                .iter()
                .filter_map(|command| naming::commands(dictionary, command).ok())
                .flatten()
                .collect(),
            priority: entry.priority,
            timeout: entry.timeout.0,
        };
        let hedging = |hedge: &Hedge| Hedging {
            commands: hedge
                .commands
                .iter()
                .filter_map(|command| naming::commands(dictionary, command).ok())
                .flatten()
                .collect(),
            after: hedge.after.0,
        };
        let reroute = |entry: &Reroute| match entry {
            Reroute::Code(code) => (None, *code),
            Reroute::Of { application, code } => {
                (naming::application(dictionary, application).ok(), *code)
            }
        };
        let rule = |rule: &ClassRule<DiameterMatch>| ClassRule {
            matching: Matcher::new(&rule.matching, dictionary),
            class: rule.class,
            even_carried: rule.even_carried,
        };
        Self {
            classify: scope.classify.iter().map(rule).collect(),
            listener: scope.listener.clone(),
            realm: if options.origin_realm.is_empty() {
                scope.realm.clone()
            } else {
                options.origin_realm.clone()
            },
            peers: options.peers.iter().map(|peer| Name::new(peer)).collect(),
            applications: numbers(&options.applications),
            stateless: numbers(&options.stateless),
            creators: numbers(&options.bindings.create),
            followers: numbers(&options.bindings.follow),
            answer_timeouts: options.answer_timeouts.iter().map(timeout).collect(),
            hedging: options.hedge.as_ref().map(hedging),
            reroutes: options.reroute_on.iter().map(reroute).collect(),
            options,
            dictionary: definitions,
            routes,
            pool: scope.pool,
            pools,
            worker: context.worker,
            workers: context.workers,
            started: context.started,
        }
    }

    /// What is done to messages; the options were checked when they were loaded.
    fn changes(&self) -> Changes {
        Changes::new(&self.options.mediation, &self.realm, &self.dictionary, &mut Vec::new())
    }

    pub(crate) fn identity(&self) -> Identity<'_> {
        Identity { host: &self.options.origin_host, realm: &self.realm }
    }

    /// The pool of the first route that matches, and its rules; else the listener's pool.
    pub(crate) fn pool_for(
        &self,
        header: &Header,
        summary: &Summary<'_>,
        bytes: &[u8],
    ) -> Option<(PoolId, Option<&Rc<Mediation>>)> {
        let mut routes = self.routes.iter();
        let found = routes.find(|road| road.matcher.matches(header, summary, bytes));
        found
            .map(|road| (road.pool, road.rules.as_ref()))
            .or_else(|| self.pool.map(|pool| (pool, None)))
    }

    /// Why no route takes a request (RFC 6733 7.1.3).
    pub(crate) fn no_route(&self, header: &Header, summary: &Summary<'_>) -> (u32, &'static str) {
        let mut routes = self.routes.iter();
        if routes.any(|road| road.matcher.is_for_other_realm(header, summary)) {
            return (result::REALM_NOT_SERVED, "no route for this realm");
        }
        (result::APPLICATION_UNSUPPORTED, "no route for this application")
    }

    /// What the route of a request does to messages.
    pub(crate) fn rules_for(&self, request: &[u8]) -> Option<Rc<Mediation>> {
        let header = Header::read(request)?;
        self.pool_for(&header, &Summary::of(request), request)?.1.cloned()
    }

    pub(crate) fn is_us(&self, host: &[u8]) -> bool {
        host.eq_ignore_ascii_case(self.options.origin_host.as_bytes())
    }
}

/// The relay of one worker.
pub struct DiameterEngine {
    pub(crate) settings: Settings,
    pub(crate) clients: NumberMap<FlowId, Peer>,
    /// Links to backends that are here, by `Endpoint::link`.
    pub(crate) backends: NumberMap<(BackendId, u8), Peer>,
    /// Those of them that are open, a bit each.
    pub(crate) lanes_here: NumberMap<BackendId, u32>,
    /// Counts requests over links of which there are several.
    pub(crate) turn: u32,
    pub(crate) pending: Pendings,
    pub(crate) wheel: Option<Wheel>,
    pub(crate) next_upkeep: Option<Instant>,
    /// The last End-to-End identifier of our own requests.
    pub(crate) end_to_end: u32,
    pub(crate) draining: bool,
    pub(crate) lower: Vec<u8>,
    pub(crate) changes: Changes,
    /// Requests that the router lets wait.
    pub(crate) waiting: NumberMap<Ticket, Box<Pending>>,
    /// Those of another process, until the first call after it was taken over.
    pub(crate) unplaced: Vec<Pending>,
    pub(crate) reports: Reports,
    pub(crate) redirects: Redirects,
    pub(crate) duplicates: Duplicates,
    due: Vec<u64>,
    /// Spreads watchdogs.
    pub(crate) dice: u64,
}

impl DiameterEngine {
    pub(crate) fn new(context: &Context<'_, Diameter>) -> Self {
        let settings = Settings::new(context);
        Self {
            changes: settings.changes(),
            settings,
            clients: NumberMap::default(),
            backends: NumberMap::default(),
            lanes_here: NumberMap::default(),
            turn: 0,
            pending: Pendings::new(context.worker),
            wheel: None,
            next_upkeep: None,
            // RFC 6733 3: the high bits from the time, so that they do not repeat after a restart.
            end_to_end: context.started << 20 | (context.seed as u32 & 0x000f_ffff),
            draining: false,
            lower: Vec::new(),
            waiting: NumberMap::default(),
            unplaced: Vec::new(),
            reports: Reports::default(),
            redirects: Redirects::default(),
            duplicates: Duplicates::default(),
            due: Vec::new(),
            dice: context.seed | 1,
        }
    }

    pub(crate) fn reconfigure(&mut self, context: &Context<'_, Diameter>) {
        self.settings = Settings::new(context);
        self.changes = self.settings.changes();
    }

    /// The peer at the other end, if it has one's machine here.
    pub(crate) fn peer(&mut self, endpoint: Endpoint) -> Option<&mut Peer> {
        match endpoint {
            Endpoint::Client(flow) => self.clients.get_mut(&flow),
            endpoint => self.backends.get_mut(&endpoint.as_link()?),
        }
    }

    /// What the peer calls itself; requests bear it onward.
    pub(crate) fn identity_of(&mut self, endpoint: Endpoint) -> Option<Rc<[u8]>> {
        self.peer(endpoint).map(|peer| Rc::clone(&peer.host))
    }

    pub(crate) fn schedule(&mut self, now: Instant, at: Instant, identifier: u32) {
        self.wheel.get_or_insert_with(|| Wheel::new(now)).insert(at, u64::from(identifier));
    }

    pub(crate) fn arm_upkeep(&mut self, now: Instant) {
        let options = &self.settings.options;
        let stalled = options.stalled.0;
        let shortest = if stalled.is_zero() {
            options.watchdog.0 / 8
        } else {
            (stalled / 4).min(options.watchdog.0 / 8)
        };
        let step = shortest.clamp(UPKEEP_MIN, UPKEEP_MAX);
        self.next_upkeep.get_or_insert(now + step);
    }
}

impl Engine for DiameterEngine {
    fn on_message(
        &mut self,
        now: Instant,
        message: Message<'_>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        self.dispatch(now, &message, router, out);
    }

    fn on_granted(
        &mut self,
        now: Instant,
        ticket: Ticket,
        route: Route,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        match self.waiting.remove(&ticket) {
            Some(pending) => self.granted(now, *pending, route, router, out),
            None => router.outcome(now, route.backend, Outcome::Abandoned),
        }
    }

    fn on_refused(
        &mut self,
        now: Instant,
        ticket: Ticket,
        refusal: Refusal,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        if let Some(pending) = self.waiting.remove(&ticket) {
            self.refuse_pending(now, *pending, refusal, router, out);
        }
    }

    fn on_opened(
        &mut self,
        now: Instant,
        peer: Endpoint,
        opened: Opened<'_>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let certificate = opened.facts.certificate.clone();
        self.begin(now, peer, (opened.remote, opened.local), certificate, router, out);
    }

    fn on_peer(
        &mut self,
        now: Instant,
        peer: Endpoint,
        change: PeerChange,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        match (peer, change) {
            (_, PeerChange::Opened { remote, local, .. }) => {
                self.begin(now, peer, (remote, local), None, router, out)
            }
            (Endpoint::Client(flow), PeerChange::Closed(_)) => {
                self.on_client_gone(now, flow, router, out)
            }
            (link, PeerChange::Closed(_)) => self.on_link_gone(now, link, router, out),
            (link, PeerChange::Retired) => self.retire(now, link, router, out),
            _ => {}
        }
    }

    fn on_timeout(&mut self, now: Instant, router: &mut dyn Router, out: &mut Outbox) {
        self.place_waiting(now, router, out);
        let mut due = std::mem::take(&mut self.due);
        if let Some(wheel) = &mut self.wheel {
            wheel.advance(now, |key| due.push(key));
        }
        for key in due.drain(..) {
            self.hedge(now, key as u32, router, out);
            self.on_expired(now, key as u32, router, out);
        }
        self.due = due;
        if self.next_upkeep.is_some_and(|at| at <= now) {
            self.next_upkeep = None;
            self.look_after_peers(now, router, out);
            self.fail_over_from_dead(now, router, out);
            if !self.clients.is_empty() || !self.backends.is_empty() {
                self.arm_upkeep(now);
            }
        }
    }

    fn next_timeout(&self) -> Option<Instant> {
        if let Some(pending) = self.unplaced.first() {
            return Some(pending.arrived);
        }
        let wheel = self.wheel.as_ref().and_then(Wheel::next);
        [wheel, self.next_upkeep].into_iter().flatten().min()
    }

    fn on_drain(&mut self, now: Instant, _: &mut dyn Router, _: &mut Outbox) {
        self.draining = true;
        self.arm_upkeep(now);
    }

    fn in_progress(&self) -> usize {
        self.pending.len() + self.waiting.len() + self.unplaced.len()
    }

    fn save(&self) -> Option<Vec<u8>> {
        Some(self.saved())
    }

    fn restore(
        &mut self,
        now: Instant,
        saved: &[u8],
        router: &mut dyn Router,
        out: &mut Outbox,
    ) -> Result<(), strowger_contract::handover::Broken> {
        self.take_over(now, saved, router, out)
    }
}
