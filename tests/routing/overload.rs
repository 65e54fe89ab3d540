//! The real queue under a virtual clock: workers, backends of fixed concurrency, an open-loop crowd
//! of clients. Everything but the clock and the crowd is the code that runs in production.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use strowger::routing::{
    BackendSpec, Balance, Core, CoreRouter, CoreSettings, Grant, HealthSpec, InstanceState, Policy,
    PoolSpec, QosSpec, SnapshotSpec,
};
use strowger_contract::{
    Attempt, BackendId, Class, ClassId, Keyer, Outcome, Pin, PoolId, Query, Router, Ticket,
    TokenKeys, Transport, Verdict, WorkerId,
};

const POOL: &str = "crowd";
pub(crate) const SLOTS: u32 = 8;
const WORKERS: u8 = 2;
pub(crate) const SERVICE_US: u64 = 5_000;

/// The five classes that wait, and their shares of the arrivals in percent.
pub(crate) const MIX: [(ClassId, u64); 5] = [
    (ClassId::EMERGENCY, 1),
    (ClassId::IN_SESSION, 44),
    (ClassId::SETUP, 30),
    (ClassId::MOBILITY, 15),
    (ClassId::BULK, 10),
];

/// How long a request takes at a backend; 5 ms in the mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Service {
    Fixed,
    Exponential,
    /// Nine in ten take 2 ms, one takes 32 ms.
    Bimodal,
}

/// What comes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Crowd {
    pub(crate) service: Service,
    /// In parts of what the backends can do.
    pub(crate) load: f64,
    /// From, to, and the load between them.
    pub(crate) spike: Option<(Duration, Duration, f64)>,
    /// Clients send again what is not answered: T1 = 500 ms, doubling, seven times in all.
    pub(crate) retransmits: bool,
    pub(crate) policy: Policy,
    pub(crate) lasting: Duration,
    /// What arrives before is not counted: quantiles and windows fill.
    pub(crate) warm_up: Duration,
    pub(crate) seed: u64,
    /// The slots are spread over so many backends; in-session requests each have one of them.
    pub(crate) backends: u32,
    /// So many percent of the clients hang up while they wait, after 50 ms in the mean.
    pub(crate) hang_up: u64,
}

impl Crowd {
    pub(crate) fn new(policy: Policy, service: Service, load: f64, seed: u64) -> Self {
        Self {
            service,
            load,
            spike: None,
            retransmits: false,
            policy,
            lasting: Duration::from_secs(10),
            warm_up: Duration::from_secs(2),
            seed,
            backends: 1,
            hang_up: 0,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Met,
    Late,
    Refused,
    Withdrawn,
}

/// One call of a client: sent once, or again and again.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) class: ClassId,
    pub(crate) born: u64,
    pub(crate) end: Option<(End, u64)>,
}

/// One request, as the edge sees it.
#[derive(Debug)]
struct Request {
    call: usize,
    class: ClassId,
    worker: usize,
    deadline: u64,
    arrived: u64,
    granted: Option<u64>,
    backend: Option<BackendId>,
    outcomes: u32,
    pinned: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrive,
    Resend(usize, u32),
    Done(usize),
    /// The worker, and its ticket.
    HangUp(usize, u64),
    Timer(usize),
    Tick,
}

/// What came out.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) calls: Vec<Call>,
    pub(crate) from: u64,
    pub(crate) until: u64,
    pub(crate) waits: Vec<(ClassId, u64)>,
    pub(crate) refusals: Vec<u64>,
    /// Requests served whose answer came too late, of all served.
    pub(crate) wasted: u64,
    pub(crate) served: u64,
    pub(crate) inversions: u64,
    /// Clients that hung up while they waited, and those of them that had a slot without knowing it.
    pub(crate) withdrawn: u64,
    pub(crate) unheard: u64,
}

struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ bits >> 31
    }

    fn unit(&mut self) -> f64 {
        ((self.roll() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    fn exponential(&mut self, mean: f64) -> u64 {
        (-self.unit().ln() * mean) as u64
    }
}

struct World {
    crowd: Crowd,
    start: Instant,
    now: u64,
    core: Arc<Core>,
    pool: PoolId,
    routers: Vec<CoreRouter>,
    woken: Vec<Arc<AtomicBool>>,
    timers: Vec<Option<u64>>,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    sequence: u64,
    dice: Dice,
    classes: Vec<Class>,
    pins: Vec<Pin>,
    ids: HashMap<BackendId, usize>,
    /// What each backend really has under way.
    busy: Vec<u32>,
    requests: Vec<Request>,
    tickets: HashMap<(usize, u64), usize>,
    report: Report,
    /// When a tier was last granted a slot, by tier and backend.
    last_grant: Vec<[u64; 4]>,
}

/// Runs a crowd to its end.
pub(crate) fn run(crowd: Crowd) -> Report {
    let mut world = World::new(crowd);
    world.live();
    world.report
}

impl World {
    fn new(crowd: Crowd) -> Self {
        let start = Instant::now();
        let settings = CoreSettings {
            token_keys: TokenKeys::new(vec![[1; 16]]),
            keyer: Keyer::new([2; 16]),
            seed: crowd.seed,
            sessions_max: 1 << 10,
            bindings_max: 16,
            workers: WORKERS,
            advise: strowger::routing::no_advice,
        };
        let core = Core::new(settings, start);
        let backends =
            (0..crowd.backends).map(|number| backend(number, SLOTS / crowd.backends)).collect();
        let pool =
            PoolSpec { qos: QosSpec { policy: crowd.policy, adaptive: false }, ..pool(backends) };
        core.apply(start, SnapshotSpec { pools: vec![pool], ..SnapshotSpec::default() });
        let pins: Vec<Pin> =
            (0..crowd.backends).map(|index| Pin::of(POOL, &format!("b{index}"), 0)).collect();
        let mut routers: Vec<CoreRouter> =
            (0..WORKERS).map(|worker| core.router(WorkerId(worker))).collect();
        routers.iter_mut().for_each(|router| {
            router.refresh();
        });
        let woken: Vec<Arc<AtomicBool>> = (0..WORKERS).map(|_| Arc::default()).collect();
        for (router, woken) in routers.iter().zip(&woken) {
            let woken = Arc::clone(woken);
            router.set_waker(Arc::new(move || woken.store(true, Ordering::Relaxed)));
        }
        let ids = pins
            .iter()
            .enumerate()
            .map(|(index, pin)| (routers[0].resolve(*pin).expect("a backend"), index))
            .collect();
        Self {
            start,
            now: 0,
            pool: core.pool_names().id(POOL),
            core,
            routers,
            woken,
            timers: vec![None; usize::from(WORKERS)],
            events: BinaryHeap::new(),
            sequence: 0,
            dice: Dice(crowd.seed),
            classes: Class::built_in(),
            pins,
            ids,
            busy: vec![0; crowd.backends as usize],
            requests: Vec::new(),
            tickets: HashMap::new(),
            report: Report {
                from: crowd.warm_up.as_micros() as u64,
                until: crowd.lasting.as_micros() as u64,
                ..Report::default()
            },
            last_grant: vec![[0; 4]; crowd.backends as usize],
            crowd,
        }
    }

    fn instant(&self, us: u64) -> Instant {
        self.start + Duration::from_micros(us)
    }

    fn at(&mut self, when: u64, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse((when, self.sequence, event)));
    }

    fn live(&mut self) {
        self.at(1, Event::Tick);
        self.at(2, Event::Arrive);
        while let Some(Reverse((now, _, event))) = self.events.pop() {
            self.now = now;
            let until = self.crowd.lasting.as_micros() as u64;
            match event {
                Event::Arrive if now < until => self.arrive(),
                Event::Arrive => {}
                Event::Resend(call, attempt) => self.resend(call, attempt),
                Event::Done(request) => self.done(request),
                Event::HangUp(worker, ticket) => self.hang_up(worker, ticket),
                Event::Timer(worker) => self.timers[worker] = None,
                Event::Tick => {
                    self.core.tick(self.instant(now));
                    let open = self.requests.iter().rev().take(200_000).any(|r| r.outcomes == 0);
                    if now < until || open {
                        self.at(now + 100_000, Event::Tick);
                    }
                }
            }
            self.settle();
        }
        self.check_sums();
    }

    fn rate(&self) -> f64 {
        let load = match self.crowd.spike {
            Some((from, to, load))
                if (from.as_micros()..to.as_micros()).contains(&u128::from(self.now)) =>
            {
                load
            }
            _ => self.crowd.load,
        };
        load * f64::from(SLOTS) / SERVICE_US as f64
    }

    fn arrive(&mut self) {
        let mean = 1.0 / self.rate();
        let next = self.now + self.dice.exponential(mean);
        self.at(next, Event::Arrive);
        let mut draw = self.dice.roll() % 100;
        let class = MIX.iter().find(|(_, share)| {
            let found = draw < *share;
            draw = draw.saturating_sub(*share);
            found
        });
        let class = class.expect("a hundred percent").0;
        let call = self.report.calls.len();
        self.report.calls.push(Call { class, born: self.now, end: None });
        self.request(call);
        if self.crowd.retransmits {
            self.at(self.now + 500_000, Event::Resend(call, 1));
        }
    }

    fn resend(&mut self, call: usize, attempt: u32) {
        if self.report.calls[call].end.is_some() || attempt > 6 {
            return;
        }
        self.request(call);
        self.at(self.now + (500_000 << attempt).min(4_000_000), Event::Resend(call, attempt + 1));
    }

    fn tier(&self, class: ClassId) -> u8 {
        self.classes[usize::from(class.0)].tier
    }

    fn request(&mut self, call: usize) {
        let class = self.report.calls[call].class;
        let worker = (self.dice.roll() % u64::from(WORKERS)) as usize;
        let budget = self.classes[usize::from(class.0)].deadline.expect("it has one");
        let deadline = self.now + budget.as_micros() as u64;
        let in_session = class == ClassId::IN_SESSION;
        let pin = in_session
            .then(|| self.pins[(self.dice.roll() % u64::from(self.crowd.backends)) as usize]);
        let number = self.requests.len();
        self.requests.push(Request {
            call,
            class,
            worker,
            deadline,
            arrived: self.now,
            granted: None,
            backend: None,
            outcomes: 0,
            pinned: in_session,
        });
        let query = Query {
            pool: self.pool,
            session: self.routers[0].keyer().session(0, &number.to_le_bytes()),
            pin,
            in_session,
            awaits: true,
            class,
            deadline: self.instant(deadline),
            capability: 0,
            exclude: &[],
            attempt: Attempt::First,
        };
        let now = self.instant(self.now);
        match self.routers[worker].route(now, &query) {
            Verdict::Go(route) => self.granted(number, route.backend),
            Verdict::Wait(ticket) => {
                self.no_slot_is_free(number);
                self.tickets.insert((worker, ticket.0), number);
                if self.crowd.hang_up > 0 && self.dice.roll() % 100 < self.crowd.hang_up {
                    let after = self.dice.exponential(50_000.0);
                    self.at(self.now + after, Event::HangUp(worker, ticket.0));
                }
            }
            Verdict::Refuse(_) => self.refused(number),
        }
    }

    /// The client does not want it any more, if it still waits.
    fn hang_up(&mut self, worker: usize, ticket: u64) {
        let Some(number) = self.tickets.remove(&(worker, ticket)) else { return };
        let now = self.instant(self.now);
        self.routers[worker].withdraw(now, Ticket(ticket));
        self.requests[number].outcomes += 1;
        self.report.withdrawn += 1;
        self.end(self.requests[number].call, End::Withdrawn);
    }

    /// One in four times that a slot is given back, the client that has waited longest hangs up before any
    /// worker has heard who got the slot. If it was this one, the slot must go on to the next.
    fn hang_up_unheard(&mut self) {
        if self.crowd.hang_up == 0 || !self.dice.roll().is_multiple_of(4) {
            return;
        }
        let longest = self.tickets.iter().min_by_key(|(_, number)| **number).map(|(key, _)| *key);
        if let Some((worker, ticket)) = longest {
            self.hang_up(worker, ticket);
        }
    }

    /// Nothing waits while there is a slot for it.
    fn no_slot_is_free(&self, number: usize) {
        let request = &self.requests[number];
        if !request.pinned {
            // Grants that their worker has not yet heard of have taken a slot already.
            let full = || {
                let view = self.core.pools_view(self.instant(self.now)).remove(0);
                view.backends.iter().all(|backend| backend.in_flight >= SLOTS / self.crowd.backends)
            };
            let all = self.busy.iter().all(|&busy| busy >= SLOTS / self.crowd.backends) || full();
            assert!(all, "seed {}: a request waits beside a free slot", self.crowd.seed);
        }
    }

    fn granted(&mut self, number: usize, backend: BackendId) {
        let index = self.ids[&backend];
        self.busy[index] += 1;
        assert!(
            self.busy[index] <= SLOTS / self.crowd.backends,
            "seed {}: oversold",
            self.crowd.seed
        );
        let (class, arrived) = (self.requests[number].class, self.requests[number].arrived);
        let tier = usize::from(self.tier(class));
        self.last_grant[index][tier] = self.now;
        self.requests[number].granted = Some(self.now);
        self.requests[number].backend = Some(backend);
        if (self.report.from..self.report.until).contains(&arrived) {
            self.report.waits.push((class, self.now - arrived));
        }
        // Of the request alone: the same whatever the policy.
        let mut dice = Dice(self.crowd.seed ^ (number as u64) << 20);
        let took = match self.crowd.service {
            Service::Fixed => SERVICE_US,
            Service::Exponential => dice.exponential(SERVICE_US as f64).max(1),
            Service::Bimodal => [2_000, 32_000][usize::from(dice.roll().is_multiple_of(10))],
        };
        self.at(self.now + took, Event::Done(number));
    }

    fn done(&mut self, number: usize) {
        let request = &mut self.requests[number];
        request.outcomes += 1;
        let (worker, backend) = (request.worker, request.backend.expect("it was granted"));
        let latency = Duration::from_micros(self.now - request.granted.expect("it was granted"));
        let (late, waited) = (self.now > request.deadline, request.granted > Some(request.arrived));
        let (class, since, call) = (request.class, request.arrived, request.call);
        let index = self.ids[&backend];
        self.busy[index] -= 1;
        let now = self.instant(self.now);
        self.routers[worker].outcome(now, backend, Outcome::Answered { latency });
        self.hang_up_unheard();
        let first = self.end(call, if late { End::Late } else { End::Met });
        if since >= self.report.from {
            self.report.served += 1;
            self.report.wasted += u64::from(late || !first);
        }
        if late && waited {
            self.no_lower_tier_went_before(
                class,
                since,
                request_granted(&self.requests[number]),
                index,
            );
        }
    }

    /// The call's first answer counts; whether this is it.
    fn end(&mut self, call: usize, end: End) -> bool {
        let call = &mut self.report.calls[call];
        if call.end.is_some() {
            return false;
        }
        let budget = self.classes[usize::from(call.class.0)].deadline.expect("it has one");
        let late = self.now - call.born > budget.as_micros() as u64;
        call.end = Some((if end == End::Met && late { End::Late } else { end }, self.now));
        true
    }

    fn refused(&mut self, number: usize) {
        self.requests[number].outcomes += 1;
        let Request { arrived, call, .. } = self.requests[number];
        if arrived >= self.report.from {
            self.report.refusals.push(self.now - arrived);
        }
        self.end(call, End::Refused);
    }

    fn no_lower_tier_went_before(&self, class: ClassId, since: u64, until: u64, backend: usize) {
        if self.crowd.policy == Policy::Fifo || self.tier(class) != 0 {
            return;
        }
        let lower = self.last_grant[backend][1..].iter().copied().max().unwrap_or(0);
        assert!(
            !(since + 1..until).contains(&lower),
            "seed {}: a lower tier went at {lower} while tier 0 waited from {since} to {until}",
            self.crowd.seed
        );
    }

    /// Tells workers what others settled, until there is nothing more to tell.
    fn settle(&mut self) {
        let mut grants = Vec::new();
        loop {
            let mut any = false;
            for worker in 0..usize::from(WORKERS) {
                let now = self.instant(self.now);
                self.woken[worker].store(false, Ordering::Relaxed);
                self.routers[worker].grants(now, &mut grants);
                any |= !grants.is_empty();
                for grant in std::mem::take(&mut grants) {
                    match grant {
                        Grant::Go(ticket, route) => {
                            let number =
                                self.tickets.remove(&(worker, ticket.0)).expect("it waits");
                            self.granted(number, route.backend);
                        }
                        Grant::Refuse(ticket, _) => {
                            let number =
                                self.tickets.remove(&(worker, ticket.0)).expect("it waits");
                            let (class, since) =
                                (self.requests[number].class, self.requests[number].arrived);
                            if !self.requests[number].pinned {
                                for backend in 0..self.busy.len() {
                                    self.no_lower_tier_went_before(class, since, self.now, backend);
                                }
                            }
                            self.refused(number);
                        }
                    }
                }
            }
            if !any && !self.woken.iter().any(|woken| woken.load(Ordering::Relaxed)) {
                break;
            }
        }
        for worker in 0..usize::from(WORKERS) {
            let Some(next) = self.routers[worker].next_timeout() else { continue };
            let next = next.saturating_duration_since(self.start).as_micros() as u64;
            let next = next.max(self.now + 1);
            if self.timers[worker].is_none_or(|known| next < known) {
                self.timers[worker] = Some(next);
                self.at(next, Event::Timer(worker));
            }
        }
    }

    /// Each request has exactly one outcome, and nothing is left.
    fn check_sums(&mut self) {
        let odd = self.requests.iter().position(|request| request.outcomes != 1);
        assert_eq!(odd, None, "seed {}: exactly one outcome each", self.crowd.seed);
        assert!(self.busy.iter().all(|&busy| busy == 0) && self.tickets.is_empty());
        let view = self.core.pools_view(self.instant(self.now)).remove(0);
        assert!(view.backends.iter().all(|backend| backend.in_flight == 0));
        assert!(view.qos.classes.iter().all(|(_, class)| class.waiting == 0));
        self.report.inversions = view.qos.inversions;
        let withdrawn: u64 = view.qos.classes.iter().map(|(_, class)| class.withdrawn).sum();
        // What the queue did not count as withdrawn had been granted a slot already.
        self.report.unheard = self.report.withdrawn.checked_sub(withdrawn).expect("all hung up");
        for (name, class) in &view.qos.classes {
            let ended = class.granted + class.withdrawn + class.refused_late;
            assert_eq!(class.queued, ended, "{name}: all that waited went somewhere");
        }
    }
}

fn request_granted(request: &Request) -> u64 {
    request.granted.unwrap_or(0)
}

impl Report {
    fn counted(&self) -> impl Iterator<Item = &Call> {
        self.calls.iter().filter(|call| (self.from..self.until).contains(&call.born))
    }

    /// The part of a class (or of all) that was answered in time.
    pub(crate) fn met(&self, class: Option<ClassId>) -> f64 {
        let of_it = || self.counted().filter(|call| class.is_none_or(|class| call.class == class));
        let met = of_it().filter(|call| matches!(call.end, Some((End::Met, _)))).count();
        met as f64 / of_it().count().max(1) as f64
    }

    /// Answers in time, in parts of what the backends can do.
    pub(crate) fn goodput(&self) -> f64 {
        let window = self.from..self.until;
        let in_time = |call: &&Call| {
            call.end.is_some_and(|(end, at)| end == End::Met && window.contains(&at))
        };
        let met = self.calls.iter().filter(in_time).count();
        let seconds = (self.until - self.from) as f64 / 1e6;
        met as f64 / seconds / (f64::from(SLOTS) * 1e6 / SERVICE_US as f64)
    }

    /// The part of the calls born in a window that was answered in time.
    pub(crate) fn met_between(&self, from: Duration, to: Duration) -> f64 {
        let window = from.as_micros()..to.as_micros();
        let of_it = || self.calls.iter().filter(|call| window.contains(&u128::from(call.born)));
        let met = of_it().filter(|call| matches!(call.end, Some((End::Met, _)))).count();
        met as f64 / of_it().count().max(1) as f64
    }

    pub(crate) fn wasted(&self) -> f64 {
        self.wasted as f64 / self.served.max(1) as f64
    }

    /// A quantile of the waits of those that went on, in milliseconds.
    pub(crate) fn wait(&self, quantile: f64, tier_0: bool) -> f64 {
        let tier_0_only =
            |class: ClassId| class == ClassId::EMERGENCY || class == ClassId::IN_SESSION;
        let mut waits: Vec<u64> = self
            .waits
            .iter()
            .filter(|(class, _)| !tier_0 || tier_0_only(*class))
            .map(|(_, wait)| *wait)
            .collect();
        quantile_of(&mut waits, quantile)
    }

    pub(crate) fn mean_wait(&self) -> f64 {
        let sum: u64 = self.waits.iter().map(|(_, wait)| wait).sum();
        sum as f64 / self.waits.len().max(1) as f64 / 1_000.0
    }

    /// The median time to a refusal, in milliseconds.
    pub(crate) fn median_refusal(&self) -> f64 {
        quantile_of(&mut self.refusals.clone(), 0.5)
    }
}

fn quantile_of(values: &mut [u64], quantile: f64) -> f64 {
    values.sort_unstable();
    let place = (values.len() as f64 * quantile) as usize;
    values.get(place.min(values.len().saturating_sub(1))).map_or(0.0, |us| *us as f64 / 1_000.0)
}

fn backend(number: u32, slots: u32) -> BackendSpec {
    BackendSpec {
        id: format!("b{number}"),
        generation: 0,
        transport: Transport::Udp,
        address: std::net::SocketAddr::from(([10, 0, 0, number as u8 + 1], 5060)),
        weight: 100,
        priority: 0,
        capacity: Some(slots),
        identity: None,
        state: InstanceState::Ready,
    }
}

fn pool(backends: Vec<BackendSpec>) -> PoolSpec {
    PoolSpec {
        name: POOL.into(),
        balance: Balance::LeastLoaded,
        bounded_load: None,
        session_key: String::new(),
        session_share: None,
        session_ttl: Duration::from_secs(60),
        health: HealthSpec {
            probe: None,
            interval: Duration::from_secs(1),
            timeout: Duration::from_secs(1),
            rise: 1,
            fall: 1,
            outlier_faults: 0,
            outlier_ejection: Duration::from_secs(10),
            outlier_max_percent: 50,
        },
        slow_start: Duration::ZERO,
        drain_deadline: Duration::from_secs(60),
        debounce: Duration::ZERO,
        panic_percent: 0,
        needs_link: false,
        connections: 1,
        send_proxy: strowger::routing::SendProxy::Off,
        tls: None,
        bind_keys: Vec::new(),
        bind_places: Vec::new(),
        qos: QosSpec::default(),
        backends,
    }
}
