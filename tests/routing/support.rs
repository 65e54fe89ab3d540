//! A core with one pool and a clock of its own.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use strowger::routing::{
    BackendSpec, Balance, Core, CoreEvent, CoreRouter, CoreSettings, HealthSpec, InstanceState,
    Plan, PoolSpec, PoolView, QosSpec, SnapshotSpec,
};
use strowger_contract::{
    Attempt, BackendId, ClassId, Keyer, Pin, PoolId, Query, Route, Router, SessionKey, TokenKeys,
    Transport, Verdict, WorkerId,
};

pub(crate) const POOL: &str = "calls";
pub(crate) const TTL: Duration = Duration::from_secs(7_200);

pub(crate) struct World {
    pub(crate) core: Arc<Core>,
    pub(crate) router: CoreRouter,
    pub(crate) pool: PoolId,
    start: Instant,
    pub(crate) ms: u64,
}

/// A pool without slow start, debounce, panic and outlier detection.
pub(crate) fn plain(backends: Vec<BackendSpec>) -> PoolSpec {
    PoolSpec {
        name: POOL.into(),
        balance: Balance::Hash,
        bounded_load: None,
        session_key: String::new(),
        session_share: None,
        session_ttl: TTL,
        health: HealthSpec {
            probe: Some("sip-options".into()),
            interval: Duration::from_secs(1),
            timeout: Duration::from_secs(1),
            rise: 1,
            fall: 1,
            outlier_faults: 0,
            outlier_ejection: Duration::from_secs(10),
            outlier_max_percent: 100,
        },
        slow_start: Duration::ZERO,
        drain_deadline: Duration::from_secs(600),
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

pub(crate) fn address(number: usize) -> SocketAddr {
    SocketAddr::from(([10, 0, (number >> 8) as u8, number as u8], 5060))
}

/// Backend `b<number>` at an address of its own.
pub(crate) fn backend(number: usize) -> BackendSpec {
    BackendSpec {
        id: format!("b{number}"),
        generation: 0,
        transport: Transport::Udp,
        address: address(number),
        weight: 100,
        priority: 0,
        capacity: None,
        identity: None,
        state: InstanceState::Ready,
    }
}

pub(crate) fn backends(count: usize) -> Vec<BackendSpec> {
    (0..count).map(backend).collect()
}

pub(crate) fn without(pool: &PoolSpec, id: &str) -> PoolSpec {
    let mut pool = pool.clone();
    pool.backends.retain(|backend| backend.id != id);
    pool
}

pub(crate) fn pin(number: usize) -> Pin {
    Pin::of(POOL, &format!("b{number}"), 0)
}

impl World {
    pub(crate) fn new(pool: &PoolSpec) -> Self {
        let start = Instant::now();
        let core = Core::new(
            CoreSettings {
                token_keys: TokenKeys::new(vec![[1; 16]]),
                keyer: Keyer::new([2; 16]),
                seed: 7,
                sessions_max: 1 << 14,
                bindings_max: 1 << 12,
                workers: 1,
                advise: strowger::routing::no_advice,
            },
            start,
        );
        let (router, id) = (core.router(WorkerId(0)), core.pool_names().id(POOL));
        let mut world = Self { core, router, pool: id, start, ms: 0 };
        world.apply(pool);
        world
    }

    pub(crate) fn now(&self) -> Instant {
        self.start + Duration::from_millis(self.ms)
    }

    pub(crate) fn apply(&mut self, pool: &PoolSpec) -> Plan {
        self.apply_all(vec![pool.clone()])
    }

    pub(crate) fn apply_all(&mut self, pools: Vec<PoolSpec>) -> Plan {
        let plan = self.core.apply(self.now(), SnapshotSpec { pools, ..SnapshotSpec::default() });
        self.router.refresh();
        plan
    }

    /// Time goes on by a tick of 100 ms.
    pub(crate) fn tick(&mut self) -> Vec<CoreEvent> {
        self.ms += 100;
        let events = self.core.tick(self.now());
        self.router.refresh();
        events
    }

    pub(crate) fn pass(&mut self, ms: u64) -> Vec<CoreEvent> {
        (0..ms / 100).flat_map(|_| self.tick()).collect()
    }

    pub(crate) fn key(&self, number: u64) -> SessionKey {
        self.router.keyer().session(1, &number.to_le_bytes())
    }

    pub(crate) fn ask(
        &mut self,
        number: u64,
        pin: Option<Pin>,
        in_session: bool,
        awaits: bool,
    ) -> Verdict {
        self.route(&Query { pin, in_session, awaits, ..self.query(number, Duration::ZERO) })
    }

    /// A question for a new session of that number, with so much time left, to be changed as a test wants.
    pub(crate) fn query(&self, number: u64, budget: Duration) -> Query<'static> {
        Query {
            pool: self.pool,
            session: self.key(number),
            pin: None,
            in_session: false,
            awaits: true,
            class: ClassId::SETUP,
            deadline: self.now() + budget,
            capability: 0,
            exclude: &[],
            attempt: Attempt::First,
        }
    }

    pub(crate) fn route(&mut self, query: &Query<'_>) -> Verdict {
        self.router.route(self.now(), query)
    }

    /// Where a new session of that number would go now.
    pub(crate) fn place(&mut self, number: u64) -> Option<Route> {
        match self.ask(number, None, false, false) {
            Verdict::Go(route) => Some(route),
            _ => None,
        }
    }

    /// Places sessions `0..count`: the pin of each.
    pub(crate) fn places(&mut self, count: u64) -> Vec<Option<Pin>> {
        (0..count).map(|number| self.place(number).map(|route| route.pin)).collect()
    }

    pub(crate) fn learn(&mut self, number: u64, backend: BackendId) {
        let (now, key) = (self.now(), self.key(number));
        self.router.learn(now, key, backend, ClassId::SETUP, TTL);
    }

    pub(crate) fn view(&self) -> PoolView {
        let pools = self.core.pools_view(self.now());
        pools.into_iter().find(|pool| pool.name == POOL).expect("the pool")
    }

    pub(crate) fn id(&self, pin: Pin) -> BackendId {
        self.router.resolve(pin).expect("a backend")
    }
}

/// How many of the placed went to `pin`.
pub(crate) fn share(places: &[Option<Pin>], pin: Pin) -> f64 {
    places.iter().filter(|&&place| place == Some(pin)).count() as f64 / places.len() as f64
}
