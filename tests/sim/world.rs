//! What both simulations share: dice, a queue of events, the instances, and the changes of the pool.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use strowger::routing::{
    BackendSpec, Balance, Core, CoreSettings, HealthSpec, InstanceState, PoolSpec, SnapshotSpec,
};
use strowger_contract::{BackendId, Keyer, Note, PoolId, RequestOutcome, TokenKeys, Transport};

pub(crate) const POOL: &str = "pool";

/// Microseconds.
pub(crate) const MS: u64 = 1_000;
pub(crate) const SECOND: u64 = 1_000_000;

/// SplitMix64.
#[derive(Clone)]
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.roll()) * u128::from(bound)) >> 64) as u64
    }

    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low)
    }

    pub(crate) fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

pub(crate) fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ bits >> 31
}

/// Dice whose rolls depend on what they are for, and not on what was rolled before.
pub(crate) fn dice_for(seed: u64, what: &[u8], count: u64) -> Dice {
    let hash = what.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    Dice(mix(seed ^ mix(hash)) ^ mix(count.wrapping_add(77)))
}

pub(crate) struct Queue<E> {
    events: BTreeMap<(u64, u64), E>,
    serial: u64,
}

impl<E> Queue<E> {
    pub(crate) fn new() -> Self {
        Self { events: BTreeMap::new(), serial: 0 }
    }

    pub(crate) fn push(&mut self, at: u64, event: E) {
        self.serial += 1;
        self.events.insert((at, self.serial), event);
    }

    pub(crate) fn next_at(&self) -> Option<u64> {
        self.events.keys().next().map(|key| key.0)
    }

    pub(crate) fn pop(&mut self) -> Option<(u64, E)> {
        self.events.pop_first().map(|((at, _), event)| (at, event))
    }
}

/// A place where an instance runs.
#[derive(Clone, Debug)]
pub(crate) struct Site {
    pub(crate) id: String,
    pub(crate) generation: u64,
    pub(crate) address: SocketAddr,
    pub(crate) transport: Transport,
    pub(crate) alive: bool,
    /// Counts starts: what an earlier one knew is lost.
    pub(crate) life: u64,
    pub(crate) weight: u32,
    pub(crate) wanted: bool,
    pub(crate) drained: bool,
}

impl Site {
    /// What it calls itself, as a Diameter node.
    pub(crate) fn name(&self) -> String {
        format!("{}-{}.example.net", self.id, self.generation)
    }
}

/// A change of the pool or of an instance, to come.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change {
    /// The next one is thought of.
    Any,
    Die(usize),
    Start(usize),
    Probe(usize, bool),
    Want(usize, bool),
    Undrain(usize),
}

pub(crate) struct World {
    pub(crate) seed: u64,
    pub(crate) dice: Dice,
    pub(crate) start: Instant,
    pub(crate) us: u64,
    pub(crate) core: Arc<Core>,
    pub(crate) pool: PoolId,
    pub(crate) sites: Vec<Site>,
    spec: PoolSpec,
    transports: &'static [Transport],
    probed: bool,
    /// By outcome, then by what was noted.
    pub(crate) ended: BTreeMap<RequestOutcome, u64>,
    pub(crate) trace: bool,
}

/// A pool without checks, ejections or ramps.
pub(crate) fn pool_spec(
    name: &str,
    balance: Balance,
    key: &str,
    backends: Vec<BackendSpec>,
) -> PoolSpec {
    PoolSpec {
        name: name.into(),
        balance,
        bounded_load: None,
        session_key: key.into(),
        session_share: None,
        session_ttl: Duration::from_secs(7_200),
        health: HealthSpec {
            probe: None,
            interval: Duration::from_secs(1),
            timeout: Duration::from_secs(1),
            rise: 1,
            fall: 1,
            outlier_faults: 0,
            outlier_ejection: Duration::from_secs(5),
            outlier_max_percent: 50,
        },
        slow_start: Duration::ZERO,
        drain_deadline: Duration::from_secs(600),
        debounce: Duration::from_secs(2),
        panic_percent: 0,
        needs_link: false,
        connections: 1,
        send_proxy: strowger::routing::SendProxy::Off,
        tls: None,
        qos: strowger::routing::QosSpec::default(),
        bind_keys: Vec::new(),
        bind_places: Vec::new(),
        backends,
    }
}

fn settings(seed: u64) -> CoreSettings {
    CoreSettings {
        token_keys: TokenKeys::new(vec![[3; 16]]),
        keyer: Keyer::new([4; 16]),
        seed,
        sessions_max: 1 << 12,
        bindings_max: 1 << 12,
        workers: 2,
        advise: strowger::routing::no_advice,
    }
}

impl World {
    pub(crate) fn new(seed: u64, transports: &'static [Transport], needs_link: bool) -> Self {
        let mut dice = Dice(mix(seed));
        let start = Instant::now();
        let core = Core::new(settings(seed), start);
        let balances =
            [Balance::Hash, Balance::LeastLoaded, Balance::WeightedRandom, Balance::RoundRobin];
        let spec = PoolSpec {
            balance: balances[dice.below(4) as usize],
            bounded_load: dice.percent(20).then_some(150),
            health: HealthSpec {
                probe: (!needs_link).then(|| "probe".into()),
                interval: Duration::from_secs(1),
                timeout: Duration::from_secs(1),
                rise: 1,
                fall: 1,
                outlier_faults: [0, 3, 5][dice.below(3) as usize],
                outlier_ejection: Duration::from_secs(5),
                outlier_max_percent: 50,
            },
            slow_start: Duration::from_secs(dice.below(2) * 5),
            panic_percent: [0, 50][dice.below(2) as usize],
            needs_link,
            // Without a draw: seeds mean what they meant.
            connections: if needs_link { 1 + (seed % 5 / 2) as u8 } else { 1 },
            ..pool_spec(POOL, Balance::Hash, "", Vec::new())
        };
        let pool = core.pool_names().id(POOL);
        let mut world = Self {
            seed,
            dice,
            start,
            us: 0,
            core,
            pool,
            sites: Vec::new(),
            spec,
            transports,
            probed: !needs_link,
            ended: BTreeMap::new(),
            trace: std::env::var_os("STROWGER_SEED").is_some(),
        };
        for _ in 0..world.dice.between(2, 5) {
            world.build_site();
        }
        world.apply();
        world
    }

    pub(crate) fn now(&self) -> Instant {
        self.start + Duration::from_micros(self.us)
    }

    pub(crate) fn us_of(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.start).as_nanos().div_ceil(1_000) as u64
    }

    pub(crate) fn say(&self, text: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>12.6} {}", self.us as f64 / 1e6, text());
        }
    }

    pub(crate) fn count(&mut self, notes: &[Note]) {
        for note in notes {
            if let Note::Request { outcome, .. } = note {
                *self.ended.entry(*outcome).or_insert(0) += 1;
            }
            self.say(|| format!("    note {note:?}"));
        }
    }

    fn build_site(&mut self) {
        let number = self.sites.len();
        self.sites.push(Site {
            id: format!("i{number}"),
            generation: 0,
            address: SocketAddr::from(([10, 0, 0, number as u8 + 1], 5060)),
            transport: self.transports[self.dice.below(self.transports.len() as u64) as usize],
            alive: true,
            life: 1,
            weight: 100,
            wanted: true,
            drained: false,
        });
    }

    pub(crate) fn apply(&mut self) {
        let wanted = self.sites.iter().filter(|site| site.wanted).map(|site| BackendSpec {
            id: site.id.clone(),
            generation: site.generation,
            transport: site.transport,
            address: site.address,
            weight: site.weight,
            priority: 0,
            capacity: None,
            identity: (self.spec.needs_link && self.seed.is_multiple_of(3)).then(|| site.name()),
            state: InstanceState::Ready,
        });
        self.spec.backends = wanted.collect();
        let spec = SnapshotSpec { pools: vec![self.spec.clone()], ..SnapshotSpec::default() };
        self.core.apply(self.now(), spec);
    }

    /// The core goes to another process: a new one has all that the old one hands over, and no more.
    pub(crate) fn renew_core(&mut self) {
        let (now, old) = (self.now(), Arc::clone(&self.core));
        let core = Core::planted(settings(self.seed), &old.seed_of()).expect("a core's seed");
        self.core = core;
        self.apply();
        let mut give = |part: &[u8]| self.core.take_over(now, part);
        old.save(now, &mut give).expect("what one gives the other takes");
    }

    /// How many links are wanted to each instance.
    pub(crate) fn connections(&self) -> u8 {
        self.spec.connections
    }

    pub(crate) fn site_at(&self, address: SocketAddr) -> Option<usize> {
        self.sites.iter().position(|site| site.address == address)
    }

    /// The number that the core has for a site's instance now.
    pub(crate) fn backend_of(&self, site: usize) -> Option<BackendId> {
        let (snapshot, site) = (self.core.snapshot(), &self.sites[site]);
        let pool = snapshot.pool(self.pool)?;
        pool.backends()
            .find(|backend| {
                backend.spec.id == site.id && backend.spec.generation == site.generation
            })
            .map(|backend| backend.id)
    }

    /// Makes a change; what is to come of it, and the site that died by it.
    pub(crate) fn change(&mut self, change: Change) -> (Vec<(u64, Change)>, Option<usize>) {
        let (mut later, mut dead) = (Vec::new(), None);
        self.say(|| format!("CHANGE {change:?}"));
        match change {
            Change::Any => {
                let at = self.dice.below(self.sites.len() as u64) as usize;
                later.push((self.dice.between(SECOND / 2, 6 * SECOND), Change::Any));
                match self.dice.below(8) {
                    0 | 1 if self.sites[at].alive => {
                        later.push((0, Change::Die(at)));
                        later.push((self.dice.between(SECOND / 2, 15 * SECOND), Change::Start(at)));
                    }
                    2 if self.sites[at].wanted && self.wanted() > 1 => {
                        let back = self.dice.between(SECOND / 5, 8 * SECOND);
                        later.push((0, Change::Want(at, false)));
                        later.push((back, Change::Want(at, true)));
                    }
                    3 if self.sites[at].wanted && self.sites[at].alive => {
                        // Another instance takes the address.
                        dead = Some(at);
                        let site = &mut self.sites[at];
                        site.life += 1;
                        site.generation += 1;
                        site.drained = false;
                        self.say(|| format!("    {:?} took over", self.sites[at]));
                        self.apply();
                    }
                    4 if self.sites[at].wanted => {
                        let deadline = Duration::from_secs(self.dice.below(40));
                        let id = self.sites[at].id.clone();
                        if self.core.drain(self.now(), POOL, &id, Some(deadline)).is_ok() {
                            self.sites[at].drained = true;
                            later.push((
                                self.dice.between(SECOND, 20 * SECOND),
                                Change::Undrain(at),
                            ));
                            self.say(|| format!("    drain {id} in {deadline:?}"));
                        }
                    }
                    5 => {
                        self.sites[at].weight = self.dice.between(1, 300) as u32;
                        self.apply();
                    }
                    6 if self.sites.len() < 8 => {
                        self.build_site();
                        self.apply();
                    }
                    _ => {}
                }
            }
            Change::Die(at) => {
                self.sites[at].alive = false;
                dead = Some(at);
                if self.probed {
                    later.push((self.dice.between(SECOND, 3 * SECOND), Change::Probe(at, false)));
                }
            }
            Change::Start(at) => {
                self.sites[at].alive = true;
                self.sites[at].life += 1;
                if self.probed {
                    later.push((self.dice.between(SECOND, 3 * SECOND), Change::Probe(at, true)));
                }
            }
            Change::Probe(at, well) => {
                if let Some(backend) = self.backend_of(at).filter(|_| self.sites[at].alive == well)
                {
                    self.core.probe_result(self.now(), backend, well, "probe");
                }
            }
            Change::Want(at, wanted) => {
                self.sites[at].wanted = wanted;
                self.apply();
            }
            Change::Undrain(at) => {
                let id = self.sites[at].id.clone();
                self.sites[at].drained = false;
                // It may have been removed meanwhile.
                let _gone = self.core.undrain(self.now(), POOL, &id);
            }
        }
        (later, dead)
    }

    fn wanted(&self) -> usize {
        self.sites.iter().filter(|site| site.wanted).count()
    }

    /// Nothing is left in flight anywhere, and the table's sums are right.
    pub(crate) fn check_sums(&self) {
        for pool in self.core.pools_view(self.now()) {
            for backend in pool.backends {
                assert_eq!(backend.in_flight, 0, "{} in the end: {backend:?}", backend.id);
                let ends = backend.answered + backend.refused + backend.timed_out + backend.lost;
                assert!(ends <= backend.requests, "more ends than requests: {backend:?}");
            }
        }
        let sessions = self.core.sessions_view();
        assert_eq!(
            sessions.created,
            sessions.live + sessions.ended + sessions.expired + sessions.evicted,
            "{sessions:?}"
        );
    }
}
