//! The core: what all workers share, and what turns a wanted state into the next snapshot.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use strowger_contract::{
    BackendId, Class, ClassId, Keyer, Outcome, Pin, SessionKey, TokenKeys, WorkerId,
};

use super::bindings::BindingTable;
use super::brownout::Brownout;
use super::changes::{Changes, Moves, Named};
use super::events::{CoreEvent, Happening, Plan};
use super::flows::FlowNames;
use super::live::{BackendLive, LiveChange};
use super::memory::Advise;
use super::names::PoolNames;
use super::peers::Peers;
use super::router::CoreRouter;
use super::snapshot::{Backend, Pool, Snapshot};
use super::spec::SnapshotSpec;
use super::table::{Learned, SessionTable};

/// Events that wait for [`Core::tick`], at most; more are counted and dropped.
const EVENTS_MAX: usize = 10_000;

/// Parts of a table that one tick sweeps at most: it shall not hold its lock's others up.
const SWEEP_CHUNKS: usize = 64;

/// Ticks in which a table is swept once, unless it is too large: what expired is ended within two
/// seconds or so, and looking at slots costs next to nothing.
const SWEEP_TICKS: usize = 20;

/// The parts that one tick sweeps of a table that has so many.
pub(super) fn sweep_share(chunks: usize) -> usize {
    chunks.div_ceil(SWEEP_TICKS).clamp(1, SWEEP_CHUNKS)
}

/// What a core is made with.
#[derive(Clone, Debug)]
pub struct CoreSettings {
    /// Sign and check tokens.
    pub token_keys: TokenKeys,
    /// Makes session keys.
    pub keyer: Keyer,
    /// Feeds choices by chance.
    pub seed: u64,
    /// Room in the session table, in sessions; 16 bytes each.
    pub sessions_max: usize,
    /// Sessions that bind subscribers, at most; [`super::BYTES_PER_BINDING`] each, taken when the
    /// first pool has `bind_keys`.
    pub bindings_max: usize,
    /// How many workers there are.
    pub workers: u8,
    /// Told of the tables' memory before it is touched.
    pub advise: Advise,
}

/// What all workers share.
#[derive(Debug)]
pub struct Core {
    pub(super) start: Instant,
    pub(super) settings: CoreSettings,
    pub(super) names: PoolNames,
    snapshot: ArcSwap<Snapshot>,
    tokens: ArcSwap<TokenKeys>,
    pub(super) table: SessionTable,
    bindings: OnceLock<BindingTable>,
    peers: Peers,
    brownout: Brownout,
    pub(super) flows: FlowNames,
    draining: AtomicBool,
    changes: Mutex<Changes>,
    events: Mutex<Vec<CoreEvent>>,
    pub(super) events_lost: AtomicU32,
    /// Bounds of the node that have bitten, by bit.
    pub(super) bitten: AtomicU32,
    lives: ArcSwap<HashMap<BackendId, Arc<BackendLive>>>,
}

/// The named backend does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no such pool or instance")]
pub struct NotFound;

impl Core {
    /// An empty core. `now` is the zero of its clock.
    #[must_use]
    pub fn new(settings: CoreSettings, now: Instant) -> Arc<Self> {
        // A clock that starts above zero keeps "never" and "at the start" apart.
        Self::starting(settings, now.checked_sub(Duration::from_millis(1)).unwrap_or(now))
    }

    /// An empty core whose clock has its zero at `start`.
    pub(super) fn starting(settings: CoreSettings, start: Instant) -> Arc<Self> {
        let snapshot = Snapshot { classes: Class::built_in(), ..Snapshot::default() };
        Arc::new(Self {
            start,
            names: PoolNames::default(),
            snapshot: ArcSwap::from_pointee(snapshot),
            tokens: ArcSwap::from_pointee(settings.token_keys.clone()),
            table: SessionTable::new(settings.sessions_max, settings.advise),
            bindings: OnceLock::new(),
            peers: Peers::default(),
            brownout: Brownout::default(),
            flows: FlowNames::default(),
            draining: AtomicBool::new(false),
            changes: Mutex::default(),
            events: Mutex::default(),
            events_lost: AtomicU32::new(0),
            bitten: AtomicU32::new(0),
            lives: ArcSwap::default(),
            settings,
        })
    }

    /// Numbers for pool names.
    #[must_use]
    pub fn pool_names(&self) -> &PoolNames {
        &self.names
    }

    /// The newest snapshot.
    #[must_use]
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// Rotates the keys of tokens.
    pub fn set_token_keys(&self, keys: TokenKeys) {
        self.tokens.store(Arc::new(keys));
    }

    /// The router of one worker.
    #[must_use]
    pub fn router(self: &Arc<Self>, worker: WorkerId) -> CoreRouter {
        CoreRouter::new(Arc::clone(self), worker)
    }

    /// Milliseconds of the core's clock; never 0.
    pub(super) fn clock(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.start).as_millis())
            .unwrap_or(u64::MAX)
            .max(1)
    }

    pub(super) fn since_start(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.start)
    }

    /// Microseconds of the core's clock.
    pub(super) fn clock_us(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.start).as_micros()).unwrap_or(u64::MAX)
    }

    /// The reverse.
    pub(super) fn instant(&self, clock_us: u64) -> Instant {
        self.start + Duration::from_micros(clock_us)
    }

    pub(super) fn seed(&self) -> u64 {
        self.settings.seed
    }

    pub(super) fn keyer(&self) -> &Keyer {
        &self.settings.keyer
    }

    pub(super) fn tokens(&self) -> Arc<TokenKeys> {
        self.tokens.load_full()
    }

    pub(super) fn flows(&self) -> &FlowNames {
        &self.flows
    }

    pub(super) fn table(&self) -> &SessionTable {
        &self.table
    }

    pub(super) fn bindings(&self) -> Option<&BindingTable> {
        self.bindings.get()
    }

    pub(super) fn brownout(&self) -> &Brownout {
        &self.brownout
    }

    pub(super) fn peers(&self) -> &Peers {
        &self.peers
    }

    pub(super) fn live(&self, backend: BackendId) -> Option<Arc<BackendLive>> {
        self.lives.load().get(&backend).cloned()
    }

    pub(super) fn refresh(
        &self,
        snapshot: &mut Arc<Snapshot>,
        tokens: &mut Arc<TokenKeys>,
    ) -> bool {
        let keys = self.tokens.load();
        if !Arc::ptr_eq(&keys, tokens) {
            *tokens = Arc::clone(&keys);
        }
        let newest = self.snapshot.load();
        if Arc::ptr_eq(&newest, snapshot) {
            return false;
        }
        *snapshot = Arc::clone(&newest);
        true
    }

    /// The node is leaving, or no longer: no new sessions.
    pub fn set_draining(&self, draining: bool) {
        self.draining.store(draining, Ordering::Relaxed);
    }

    /// Whether the node is leaving.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    pub(super) fn changes(&self) -> MutexGuard<'_, Changes> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn tell(&self, event: CoreEvent) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() < EVENTS_MAX {
            events.push(event);
        } else {
            self.events_lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn tell_pool(&self, pool: &Pool, happening: Happening) {
        self.tell(CoreEvent::of(&pool.spec.name, None, happening));
    }

    pub(super) fn tell_of(&self, backend: &Backend, happening: Happening) {
        self.tell(CoreEvent::of(&backend.pool_name, Some(&backend.spec.id), happening));
    }

    /// Makes the wanted state the next snapshot, in one swap. What lives on keeps its live state by
    /// identity; what is no longer wanted takes no new sessions from now on and is dropped once its
    /// pool's debounce is over.
    pub fn apply(&self, now: Instant, wanted: SnapshotSpec) -> Plan {
        let clock = self.clock(now);
        if wanted.pools.iter().any(|pool| !pool.bind_places.is_empty()) {
            self.bindings.get_or_init(|| {
                BindingTable::new(self.settings.bindings_max, self.settings.advise)
            });
        }
        let mut changes = self.changes();
        let pools_before: HashSet<String> =
            changes.wanted.pools.iter().map(|pool| pool.name.clone()).collect();
        changes.wanted = wanted;
        self.names.keep_classes(&changes.wanted.classes);
        let Moves { joined, left } = changes.note_wanted(clock);
        let collisions = self.rebuild(&mut changes, clock);
        changes.applied_before = true;
        let pools_after: HashSet<String> =
            changes.wanted.pools.iter().map(|pool| pool.name.clone()).collect();
        let plan = Plan {
            epoch: changes.epoch,
            backends_added: sorted(joined),
            backends_removed: sorted(left),
            pools_added: pools_after.difference(&pools_before).cloned().collect(),
            pools_removed: pools_before.difference(&pools_after).cloned().collect(),
            pin_collisions: collisions,
        };
        let gone = plan.pools_removed.iter().filter_map(|pool| changes.pool_lives.get(pool));
        let gone: Vec<_> = gone.cloned().collect();
        drop(changes);
        self.displace_all(now, &gone);
        for (pool, id) in &plan.backends_added {
            self.tell(CoreEvent::of(pool, Some(id), Happening::BackendAdded));
        }
        for (pool, id) in &plan.backends_removed {
            self.tell(CoreEvent::of(pool, Some(id), Happening::BackendRemoved));
        }
        plan
    }

    /// Builds the snapshot of what is wanted and swaps it in; instances whose pins collide.
    fn rebuild(&self, changes: &mut Changes, now: u64) -> Vec<(String, String)> {
        changes.epoch += 1;
        let mut snapshot = Snapshot {
            epoch: changes.epoch,
            node: changes.wanted.node.clone(),
            classes: self.names.with_former(&changes.wanted.classes),
            listeners: changes.wanted.listeners.clone(),
            superseded: changes.superseded(),
            ..Snapshot::default()
        };
        let mut collisions = Vec::new();
        let leaving = changes.leaving_by_pool();
        for spec in &changes.wanted.pools {
            let leaving = leaving.get(&spec.name).into_iter().flatten();
            let leaving = leaving.map(|backend| (&**backend, true));
            let specs = spec.backends.iter().map(|backend| (backend, false)).chain(leaving);
            let id = self.names.id(&spec.name);
            let name: Arc<str> = self.names.name(id).unwrap_or_else(|| spec.name.as_str().into());
            let mut backends = Vec::with_capacity(spec.backends.len());
            for (backend, leaving) in specs {
                let name_of = Named(&spec.name, &backend.id, backend.generation);
                let Some(known) = changes.known.get(&name_of) else { continue };
                if spec.health.probe.is_none() {
                    known.live.forget_health();
                }
                let backend = Arc::new(Backend {
                    id: known.id,
                    pin: Pin::of(&spec.name, &backend.id, backend.generation),
                    pool: id,
                    pool_name: Arc::clone(&name),
                    needs_link: spec.needs_link,
                    connections: spec.connections,
                    leaving,
                    live: Arc::clone(&known.live),
                    spec: Arc::clone(&known.spec),
                });
                if let Some(other) = snapshot.pins.insert(backend.pin, Arc::clone(&backend)) {
                    collisions.push((other.pool_name.to_string(), other.spec.id.clone()));
                }
                snapshot.addresses.insert(backend.spec.address, backend.id);
                snapshot.ips.insert(backend.spec.address.ip());
                snapshot.backends.insert(backend.id, Arc::clone(&backend));
                backends.push(backend);
            }
            let live = changes.pool_lives.entry(spec.name.clone()).or_default();
            let slim = spec.without_backends();
            let pool = Pool::new(id, slim, backends, Arc::clone(live), &snapshot.classes);
            pool.review_panic(now);
            pool.review_slots(now);
            let place = id.0 as usize;
            if snapshot.pools.len() <= place {
                snapshot.pools.resize(place + 1, None);
            }
            snapshot.pools[place] = Some(Arc::new(pool));
        }
        self.lives.store(Arc::new(
            changes.known.values().map(|known| (known.id, Arc::clone(&known.live))).collect(),
        ));
        changes.retired.push(self.snapshot.swap(Arc::new(snapshot)));
        collisions
    }

    /// Time goes on: expired sessions, ended drains and ejections, waited-out removals. Call it every
    /// 100 ms or so. What happened since the last time.
    pub fn tick(&self, now: Instant) -> Vec<CoreEvent> {
        let clock = self.clock(now);
        self.table.sweep(seconds(clock), sweep_share(self.table.chunks()));
        self.sweep_bindings(seconds(clock));
        let snapshot = self.snapshot.load_full();
        for pool in snapshot.pools() {
            for backend in pool.backends() {
                self.review(now, backend);
            }
            for backend in pool.backends() {
                backend.live.review_limit(pool.spec.qos.adaptive);
                backend.live.review_window(clock, pool.spec.slow_start);
            }
            pool.review_slots(clock);
            let (held, ended) = self.review_held(pool);
            pool.live.qos.review(clock, held, ended);
            self.serve_pool(now, pool);
            self.displace_late(now, pool);
            if pool.live.qos.urgent_bites_first() {
                let bound = "carried deadlines of a tier (URGENT_MAX)";
                self.tell_pool(pool, Happening::BoundHit { bound });
            }
            if let Some(on) = pool.review_panic(clock) {
                self.tell(CoreEvent::of(
                    &snapshot_name(pool, self),
                    None,
                    Happening::PoolPanic { on },
                ));
            }
        }
        self.tell_node_bounds();
        let mut changes = self.changes();
        let forgotten = changes.forget_left(clock);
        if forgotten {
            self.rebuild(&mut changes, clock);
        }
        // Nobody can get hold anew of one that is no longer in force.
        changes.retired.retain(|snapshot| Arc::strong_count(snapshot) > 1);
        drop(changes);
        if forgotten {
            self.displace_all(now, &[]);
        }
        std::mem::take(&mut *self.events.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn review(&self, at: Instant, backend: &Backend) {
        let now = self.clock(at);
        if backend.live.end_ejection(now) {
            self.tell_of(backend, Happening::BackendReturned);
        }
        if backend.live.is_draining() && !backend.live.is_gone() {
            let sessions = self.table.sessions_of(backend.id);
            let idle = sessions == 0 && backend.live.in_flight() == 0;
            if idle || now >= backend.live.drain_until() {
                backend.live.set_gone();
                self.tell_of(backend, Happening::DrainEnded { sessions_left: sessions });
                self.displace(at, backend.pool);
            }
        }
    }

    /// An active check's result.
    pub fn probe_result(
        &self,
        now: Instant,
        backend: BackendId,
        healthy: bool,
        detail: &'static str,
    ) {
        let snapshot = self.snapshot.load();
        let Some(backend) = snapshot.backend(backend) else { return };
        let Some(pool) = snapshot.pool(backend.pool) else { return };
        let health = &pool.spec.health;
        match backend.live.probed(healthy, health.rise, health.fall) {
            Some(LiveChange::Up) => {
                backend.live.rejoin(self.clock(now));
                self.tell_of(backend, Happening::BackendUp);
                self.serve_pool(now, pool);
            }
            Some(LiveChange::Down) => {
                self.tell_of(backend, Happening::BackendDown { detail });
                self.displace(now, backend.pool);
            }
            None => {}
        }
    }

    /// Starts a drain: no new sessions; over when none is left, or after `deadline` (the pool's if
    /// `None`). How many sessions it holds now.
    ///
    /// # Errors
    /// There is no such pool or instance.
    pub fn drain(
        &self,
        now: Instant,
        pool: &str,
        id: &str,
        deadline: Option<Duration>,
    ) -> Result<u64, NotFound> {
        let clock = self.clock(now);
        let snapshot = self.snapshot.load();
        let (pool, backend) = find(&snapshot, pool, id)?;
        let deadline = deadline.unwrap_or(pool.spec.drain_deadline);
        let length = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
        backend.live.drain(clock, clock.saturating_add(length));
        let sessions = self.table.sessions_of(backend.id);
        self.tell_of(backend, Happening::DrainStarted { sessions });
        self.displace(now, backend.pool);
        Ok(sessions)
    }

    /// Ends a drain: the instance takes new sessions again.
    ///
    /// # Errors
    /// There is no such pool or instance.
    pub fn undrain(&self, now: Instant, pool: &str, id: &str) -> Result<(), NotFound> {
        let snapshot = self.snapshot.load();
        let (pool, backend) = find(&snapshot, pool, id)?;
        backend.live.undrain();
        backend.live.rejoin(self.clock(now));
        self.serve_pool(now, pool);
        self.tell_of(backend, Happening::DrainCancelled);
        Ok(())
    }

    /// A request ended at a backend: feeds what its owner is told.
    pub fn note_request(
        &self,
        now: Instant,
        backend: BackendId,
        outcome: strowger_contract::RequestOutcome,
        took: Duration,
    ) {
        use strowger_contract::RequestOutcome::{Expired, Failed, Late, Met};
        if let Some(live) = self.live(backend)
            && matches!(outcome, Met | Late | Expired | Failed)
        {
            live.recent.note(self.clock(now), outcome != Met, took);
        }
    }

    /// The edge's view of an instance for its owner: sessions with what is under way, and the last
    /// minute.
    ///
    /// # Errors
    /// There is no such pool or instance.
    pub fn report(
        &self,
        now: Instant,
        pool: &str,
        id: &str,
    ) -> Result<(u64, super::RecentView), NotFound> {
        let snapshot = self.snapshot.load();
        let (_, backend) = find(&snapshot, pool, id)?;
        let sessions = self.table.sessions_of(backend.id);
        let under_way = u64::from(backend.live.in_flight());
        Ok((sessions.max(under_way), backend.live.recent.view(self.clock(now))))
    }

    /// Takes in what an instance's owner says of its load, in percent; from 100 on it limits its slots.
    pub fn set_load(&self, pool: &str, id: &str, load: Option<u32>) {
        if let Ok((_, backend)) = find(&self.snapshot.load(), pool, id) {
            let taken = backend.live.in_flight().saturating_add(self.held_by(backend.id));
            backend.live.set_load(load, taken);
        }
    }

    /// Whether the edge's own checks, its link or its traffic speak against an instance.
    #[must_use]
    pub fn is_ill(&self, now: Instant, pool: &str, id: &str) -> bool {
        let clock = self.clock(now);
        find(&self.snapshot.load(), pool, id)
            .is_ok_and(|(_, backend)| !backend.is_well(clock) || !backend.is_linked())
    }

    /// A backend's link has more queued than it should, or no longer.
    pub fn set_congested(&self, backend: BackendId, congested: bool) {
        if let Some(live) = self.live(backend) {
            live.set_congested(congested);
        }
    }

    /// What an instance says that it can have in flight, by its agent's heartbeat; `None`: nothing.
    pub fn set_reported_slots(&self, backend: BackendId, slots: Option<u32>) {
        if let Some(backend) = self.snapshot.load().backend(backend) {
            backend.live.set_reported(slots.unwrap_or(0));
        }
    }

    pub(super) fn outcome(
        &self,
        now: Instant,
        snapshot: &Snapshot,
        backend: BackendId,
        outcome: Outcome,
    ) {
        let Some(backend) = snapshot.backend(backend) else {
            // It left meanwhile; its live state is kept for its return.
            if let Some(live) = self.live(backend) {
                live.end(1);
            }
            return;
        };
        backend.live.end(1);
        let faults = backend.live.judge(outcome);
        if let Outcome::Answered { .. } | Outcome::Ended { .. } | Outcome::Refused = outcome {
            backend.live.note_answer(self.clock(now));
        }
        let Some(pool) = snapshot.pool(backend.pool) else { return };
        let times = match outcome {
            Outcome::Answered { latency } => Some((latency, latency)),
            Outcome::Ended { latency, held } => Some((latency, held)),
            _ => None,
        };
        if let Some((latency, held)) = times {
            pool.live.qos.answers.note(latency);
            pool.live.qos.holds.note(held);
        }
        let limit = pool.spec.health.outlier_faults;
        if limit > 0 && faults >= limit && outcome.is_backend_fault() {
            self.eject(self.clock(now), pool, backend);
            self.displace(now, backend.pool);
        }
    }

    /// Ejects a backend unless too many of its pool are ejected already.
    fn eject(&self, now: u64, pool: &Pool, backend: &Backend) {
        let ejected = pool.backends().filter(|other| other.live.is_ejected(now)).count();
        let allowed = pool.backends.len() * usize::from(pool.spec.health.outlier_max_percent) / 100;
        if backend.live.is_ejected(now) || ejected >= allowed.max(1) {
            return;
        }
        let until = backend.live.eject(now, pool.spec.health.outlier_ejection);
        self.tell_of(backend, Happening::BackendEjected { for_ms: until - now });
    }

    pub(super) fn table_entry(&self, session: SessionKey, now: u64) -> Option<BackendId> {
        self.table.get(session.keyed, seconds(now)).map(|(backend, _)| backend)
    }

    pub(super) fn table_class(&self, session: SessionKey, now: u64) -> Option<ClassId> {
        self.table.get(session.keyed, seconds(now)).map(|(_, class)| class)
    }

    /// As [`Core::table_entry`], with whether it is only remembered.
    pub(super) fn remembered_entry(
        &self,
        session: SessionKey,
        now: u64,
    ) -> Option<(BackendId, bool)> {
        self.table.entry(session.keyed, seconds(now))
    }

    pub(super) fn remember(
        &self,
        now: Instant,
        session: SessionKey,
        backend: BackendId,
        class: ClassId,
        ttl: Duration,
    ) -> Learned {
        let ttl = whole_seconds(ttl);
        self.table.remember(session.keyed, backend, class, seconds(self.clock(now)), ttl)
    }

    pub(super) fn learn(
        &self,
        now: Instant,
        session: SessionKey,
        backend: BackendId,
        class: ClassId,
        ttl: Duration,
    ) -> Learned {
        let ttl = whole_seconds(ttl);
        self.table.insert(session.keyed, backend, class, seconds(self.clock(now)), ttl)
    }

    pub(super) fn hold(
        &self,
        now: Instant,
        session: SessionKey,
        backend: BackendId,
        class: ClassId,
        ttl: Duration,
    ) -> Learned {
        let ttl = whole_seconds(ttl);
        self.table.hold(session.keyed, backend, class, seconds(self.clock(now)), ttl)
    }

    /// How many slots of a pool are held by sessions, and how many they gave back since the last look.
    fn review_held(&self, pool: &Pool) -> (u32, u32) {
        pool.backends().fold((0, 0), |(held, ended), backend| {
            let released = backend.live.released_since(self.table.released_by(backend.id));
            (held + self.held_by(backend.id), ended + released)
        })
    }

    /// How many sessions hold a slot of the backend.
    pub(super) fn held_by(&self, backend: BackendId) -> u32 {
        u32::try_from(self.table.held_by(backend)).unwrap_or(u32::MAX)
    }

    pub(super) fn forget(&self, now: Instant, session: SessionKey) {
        self.table.remove(session.keyed, seconds(self.clock(now)));
    }
}

/// By name.
fn sorted(mut names: Vec<(String, String)>) -> Vec<(String, String)> {
    names.sort();
    names
}

fn snapshot_name(pool: &Pool, core: &Core) -> String {
    core.pool_names().name(pool.id).map(|name| name.to_string()).unwrap_or_default()
}

fn find<'a>(
    snapshot: &'a Snapshot,
    pool: &str,
    id: &str,
) -> Result<(&'a Arc<Pool>, &'a Arc<Backend>), NotFound> {
    let pool = snapshot.pools().find(|candidate| candidate.spec.name == pool).ok_or(NotFound)?;
    // The newest generation, of those that are wanted.
    let named = pool.backends().filter(|backend| backend.spec.id == id && !backend.leaving);
    let backend = named.max_by_key(|backend| backend.spec.generation).ok_or(NotFound)?;
    Ok((pool, backend))
}

/// A time to live, as the tables keep it; what is longer than they can say is the longest.
pub(super) fn whole_seconds(ttl: Duration) -> u32 {
    u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX)
}

pub(super) fn seconds(clock: u64) -> u32 {
    (clock / 1_000) as u32
}
