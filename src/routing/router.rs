//! The decision: where does this message go?

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use strowger_contract::{
    BackendId, BackendView, BindingKey, Class, ClassId, Endpoint, FlowId, Keyer, Link, NumberMap,
    Outcome, PeerReport, Pin, PoolId, PoolLoad, Query, Rate, Refusal, RouteReason, Router,
    SessionKey, Ticket, Token, TokenKeys, Verdict, WorkerId,
};

use super::balance::{Dice, rendezvous_score};
use super::choice::{Asked, Misses};
use super::core::Core;
use super::qos::{Desk, Settled};
use super::slots::Waiting;
use super::snapshot::{Backend, Pool, Snapshot};
use super::spec::{InstanceState, Policy};
use super::table::Learned;

/// The core, as one worker uses it.
pub struct CoreRouter {
    pub(super) core: Arc<Core>,
    pub(super) snapshot: Arc<Snapshot>,
    tokens: Arc<TokenKeys>,
    pub(super) dice: Dice,
    /// What this worker has in flight: given back if its engine dies.
    pub(super) ledger: NumberMap<BackendId, u32>,
    pub(super) turns: NumberMap<BackendId, i64>,
    /// Where others tell what became of requests that wait.
    pub(super) desk: Arc<Desk>,
    pub(super) waiting: NumberMap<u64, Waiting>,
    pub(super) news: Vec<(u64, Settled)>,
    /// When the first of `waiting` must be looked at, in microseconds of the core's clock.
    pub(super) soonest: Option<u64>,
    pub(super) tickets: u64,
    /// The ticket of the waiting request that is being placed anew.
    pub(super) anew: Option<u64>,
}

impl CoreRouter {
    pub(super) fn new(core: Arc<Core>, worker: WorkerId) -> Self {
        let (snapshot, tokens) = (core.snapshot(), core.tokens());
        let dice = Dice::new(core.seed() ^ u64::from(worker.0) << 32);
        Self {
            core,
            snapshot,
            tokens,
            dice,
            ledger: NumberMap::default(),
            turns: NumberMap::default(),
            desk: Arc::default(),
            waiting: NumberMap::default(),
            news: Vec::new(),
            soonest: None,
            tickets: 0,
            anew: None,
        }
    }

    /// Looks for a newer snapshot, once per batch; whether there was one.
    pub fn refresh(&mut self) -> bool {
        self.core.refresh(&mut self.snapshot, &mut self.tokens)
    }

    /// The snapshot that decisions are made by.
    #[must_use]
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// A token named the instance: it and nobody else has the session.
    fn pinned(&mut self, now: Instant, pin: Pin, query: &Query<'_>) -> Option<Verdict> {
        let Some(backend) =
            self.snapshot.pins.get(&pin).filter(|backend| backend.keeps_sessions()).cloned()
        else {
            return query.in_session.then_some(Verdict::Refuse(Refusal::SessionLost));
        };
        let reachable = backend.is_linked() && !query.exclude.contains(&backend.id);
        if reachable {
            return Some(self.go_to(now, &backend, RouteReason::Pinned, query));
        }
        query.in_session.then_some(Verdict::Refuse(Refusal::NoBackend))
    }

    /// The table names the instance; if that cannot answer, another may take the session over.
    fn tabled(&mut self, at: Instant, now: u64, query: &Query<'_>) -> Option<Verdict> {
        let (backend, remembered) = self.core.remembered_entry(query.session, now)?;
        let backend = self.snapshot.backend(backend)?;
        // What is only remembered is no session: it goes on nowhere that takes no new ones.
        if remembered && (!backend.is_open() || self.core.is_draining()) {
            return None;
        }
        // Of pools that share their sessions the same instance is meant, by its address in this one.
        let backend = if backend.pool == query.pool {
            backend
        } else {
            let share = |pool| self.snapshot.pool(pool)?.spec.session_share.as_deref();
            let common = share(backend.pool).filter(|name| share(query.pool) == Some(name));
            common?;
            let id = &backend.spec.id;
            self.snapshot.pool(query.pool)?.backends().find(|other| other.spec.id == *id)?
        };
        let usable = backend.keeps_sessions()
            && backend.is_linked()
            && backend.is_well(now)
            && !query.exclude.contains(&backend.id);
        if !usable {
            return None;
        }
        let backend = Arc::clone(backend);
        Some(self.go_to(at, &backend, RouteReason::Table, query))
    }

    /// A session that exists but that nothing names: by hash among all that may have it, so that
    /// every node and every restart guesses alike.
    fn orphaned(&mut self, at: Instant, pool: &Arc<Pool>, query: &Query<'_>) -> Verdict {
        let now = self.core.clock(at);
        // Whoever took the address of the one that has the session gets nothing of it.
        let taken = self
            .core
            .table_entry(query.session, now)
            .and_then(|backend| self.snapshot.superseded.get(&backend).copied());
        let candidates = pool.backends.iter().filter(|backend| {
            backend.keeps_sessions()
                && backend.is_linked()
                && !query.exclude.contains(&backend.id)
                && Some(backend.spec.address) != taken
        });
        let score = |backend: &&Arc<Backend>| {
            let weight = f64::from(backend.spec.weight.max(1));
            rendezvous_score(query.session.stable, backend.pin, weight)
        };
        let best = candidates.max_by(|one, two| score(one).total_cmp(&score(two)));
        match best {
            // It restarted and knows the session no more; nobody else ever did.
            _ if self.core.is_lost(query.session, now) => Verdict::Refuse(Refusal::SessionLost),
            Some(backend) => {
                let backend = Arc::clone(backend);
                self.go(at, pool, &backend, RouteReason::Balanced, query)
            }
            None if taken.is_some() => Verdict::Refuse(Refusal::SessionLost),
            None => Verdict::Refuse(Refusal::NoBackend),
        }
    }

    fn balanced(&mut self, at: Instant, pool: &Arc<Pool>, query: &Query<'_>) -> Verdict {
        let mut misses = Misses::default();
        match self.find(pool, at, query, &mut misses) {
            Some(found) => self.go_to_any(at, pool, Some(found), query),
            None if misses.full && query.awaits => self.go_to_any(at, pool, None, query),
            None if misses.full => Verdict::Refuse(self.overloaded()),
            None if misses.incapable => Verdict::Refuse(Refusal::NoCapability),
            None => Verdict::Refuse(Refusal::NoBackend),
        }
    }

    fn find(
        &mut self,
        pool: &Pool,
        at: Instant,
        query: &Query<'_>,
        misses: &mut Misses,
    ) -> Option<(Arc<Backend>, RouteReason)> {
        let core = Arc::clone(&self.core);
        let now = core.clock(at);
        let mut asked = Asked { now, query, core: &core, panic: pool.is_panicking() };
        let mut found = self.choose(pool, &asked, misses);
        if found.is_none() && !misses.full && pool.spec.panic_percent > 0 && !asked.panic {
            // Nobody is well, and the next review has not yet said so.
            asked.panic = true;
            found = self.choose(pool, &asked, misses);
        }
        let backend = Arc::clone(&pool.backends[found?]);
        let ill = asked.panic && !backend.is_well(now);
        let reason = if ill { RouteReason::Panic } else { RouteReason::Balanced };
        Some((backend, reason))
    }

    /// A backend with a free slot for the request, if there is one.
    pub(super) fn choose_free(
        &mut self,
        pool: &Pool,
        at: Instant,
        query: &Query<'_>,
    ) -> Option<Arc<Backend>> {
        self.find(pool, at, query, &mut Misses::default()).map(|(backend, _)| backend)
    }

    fn go_to(
        &mut self,
        at: Instant,
        backend: &Arc<Backend>,
        reason: RouteReason,
        query: &Query<'_>,
    ) -> Verdict {
        match self.snapshot.pool(backend.pool).cloned() {
            Some(pool) => self.go(at, &pool, backend, reason, query),
            None => self.leave(backend, reason, query.awaits),
        }
    }
}

impl Router for CoreRouter {
    fn route(&mut self, now: Instant, query: &Query<'_>) -> Verdict {
        let clock = self.core.clock(now);
        if now > query.deadline && query.class != ClassId::CONTROL {
            let pool = self.snapshot.pool(query.pool);
            if pool.is_none_or(|pool| pool.spec.qos.policy == Policy::Deadline) {
                self.log_late(now, query);
                return Verdict::Refuse(Refusal::TooLate);
            }
        }
        if self.core.brownout_step() > 1 && self.is_given_up(now, query) {
            return Verdict::Refuse(self.overloaded());
        }
        if !self.may_retry(query) {
            return Verdict::Refuse(self.overloaded());
        }
        if let Some(verdict) = query.pin.and_then(|pin| self.pinned(now, pin, query)) {
            return verdict;
        }
        if let Some(verdict) = self.tabled(now, clock, query) {
            return verdict;
        }
        let Some(pool) = self.snapshot.pool(query.pool).cloned() else {
            return Verdict::Refuse(Refusal::NoBackend);
        };
        if query.in_session {
            return self.orphaned(now, &pool, query);
        }
        if self.core.is_draining() {
            return Verdict::Refuse(Refusal::ShuttingDown);
        }
        self.balanced(now, &pool, query)
    }

    fn withdraw(&mut self, _now: Instant, ticket: Ticket) {
        self.withdraw_ticket(ticket);
    }

    fn outcome(&mut self, now: Instant, backend: BackendId, outcome: Outcome) {
        let Some(count) = self.ledger.get_mut(&backend) else { return };
        *count -= 1;
        if *count == 0 {
            self.ledger.remove(&backend);
        }
        self.core.outcome(now, &self.snapshot, backend, outcome);
        self.freed(now, backend);
    }

    fn resume(&mut self, _: Instant, backend: BackendId) {
        self.take_place(backend);
    }

    fn link(&mut self, now: Instant, backend: BackendId, lane: u8, link: Link<'_>) {
        self.core.link(now, &self.snapshot, backend, (lane, link));
    }

    fn give_up(&mut self, backend: BackendId, lanes: u32, given_up: bool) {
        if let Some(live) = self.core.live(backend) {
            live.give_up(lanes, given_up);
        }
    }

    fn note_start(&mut self, backend: BackendId, number: u32, fresh: bool) -> bool {
        self.core.live(backend).is_some_and(|live| live.note_start(number, fresh))
    }

    fn learn(
        &mut self,
        now: Instant,
        session: SessionKey,
        backend: BackendId,
        class: ClassId,
        ttl: Duration,
    ) {
        let learned = self.core.learn(now, session, backend, class, ttl);
        debug_assert!(matches!(
            learned,
            Learned::Created
                | Learned::Refreshed
                | Learned::Moved
                | Learned::Evicted
                | Learned::Refused
        ));
    }

    fn hold(
        &mut self,
        now: Instant,
        session: SessionKey,
        backend: BackendId,
        class: ClassId,
        ttl: Duration,
    ) {
        let _what_became_of_it = self.core.hold(now, session, backend, class, ttl);
    }

    fn remember(
        &mut self,
        now: Instant,
        session: SessionKey,
        backend: BackendId,
        class: ClassId,
        ttl: Duration,
    ) {
        let _what_became_of_it = self.core.remember(now, session, backend, class, ttl);
    }

    fn keeps(&self, now: Instant, backend: BackendId) -> bool {
        let clock = self.core.clock(now);
        let backend = self.snapshot.backend(backend);
        backend.is_some_and(|backend| backend.keeps_sessions() && backend.is_well(clock))
    }

    fn forget(&mut self, now: Instant, session: SessionKey) {
        self.core.forget(now, session);
    }

    fn lookup(&mut self, now: Instant, session: SessionKey) -> Option<BackendId> {
        let clock = self.core.clock(now);
        self.core.table_entry(session, clock)
    }

    fn session_class(&mut self, now: Instant, session: SessionKey) -> Option<ClassId> {
        self.core.table_class(session, self.core.clock(now))
    }

    fn keyer(&self) -> &Keyer {
        self.core.keyer()
    }

    fn seal(&self, pin: Pin, mark: u8, binding: u64) -> Token {
        self.tokens.seal(pin, mark, binding)
    }

    fn token_keys(&self) -> &TokenKeys {
        &self.tokens
    }

    fn unseal(&self, text: &[u8], binding: u64) -> Option<(Pin, u8)> {
        self.tokens.unseal(text, binding)
    }

    fn resolve(&self, pin: Pin) -> Option<BackendId> {
        self.snapshot.pins.get(&pin).map(|backend| backend.id)
    }

    fn backend(&self, backend: BackendId) -> Option<BackendView<'_>> {
        let backend = self.snapshot.backend(backend)?;
        Some(BackendView {
            name: &backend.spec.id,
            pool: backend.pool,
            pin: backend.pin,
            transport: backend.spec.transport,
            address: backend.spec.address,
            identity: backend.spec.identity.as_deref(),
            in_flight: backend.live.in_flight(),
            is_linked: backend.is_linked(),
            connections: backend.connections,
            is_wanted: backend.state() != InstanceState::Gone,
            lanes: backend.live.lanes(),
            answered: Some(backend.live.answered_at())
                .filter(|&at| at > 0)
                .map(|at| self.core.instant(at * 1_000)),
        })
    }

    fn named(&self, pool: PoolId, identity: &[u8]) -> Option<BackendId> {
        self.snapshot.pool(pool)?.named(identity).map(|backend| backend.id)
    }

    fn backend_at(&self, address: SocketAddr) -> Option<BackendId> {
        self.snapshot.addresses.get(&address).copied()
    }

    fn is_backend_ip(&self, ip: IpAddr) -> bool {
        self.snapshot.ips.contains(&ip)
    }

    fn capabilities(&self, pool: PoolId, each: &mut dyn FnMut(u32)) {
        let Some(pool) = self.snapshot.pool(pool) else { return };
        for (index, backend) in pool.backends.iter().enumerate() {
            for capability in backend.live.capabilities() {
                let told = |earlier: &Arc<Backend>| {
                    earlier.live.capabilities().any(|known| known == capability)
                };
                if !pool.backends[..index].iter().any(told) {
                    each(capability);
                }
            }
        }
    }

    fn class(&self, class: ClassId) -> &Class {
        let bulk = || &self.snapshot.classes[usize::from(ClassId::BULK.0)];
        self.snapshot.class(class).unwrap_or_else(bulk)
    }

    fn session_ttl(&self, pool: PoolId) -> Duration {
        const FALLBACK: Duration = Duration::from_secs(7_200);
        self.snapshot.pool(pool).map_or(FALLBACK, |pool| pool.spec.session_ttl)
    }

    fn session_key_name(&self, pool: PoolId) -> &str {
        self.snapshot.pool(pool).map_or("", |pool| &pool.spec.session_key)
    }

    fn session_scope(&self, pool: PoolId) -> u64 {
        self.snapshot.pool(pool).map_or_else(|| u64::from(pool.0), |known| known.scope())
    }

    fn name_flow(&mut self, name: SessionKey, flow: FlowId) {
        self.core.flows().insert(name.keyed, flow);
    }

    fn named_flow(&self, name: SessionKey) -> Option<FlowId> {
        self.core.flows().get(name.keyed)
    }

    fn unname_flow(&mut self, name: SessionKey, flow: FlowId) {
        self.core.flows().remove(name.keyed, flow);
    }

    fn bind_keys(&self, pool: PoolId) -> &[u8] {
        self.snapshot.pool(pool).map_or(&[], |pool| &pool.spec.bind_places)
    }

    fn bound(&mut self, now: Instant, name: BindingKey) -> Option<BackendId> {
        self.core.bound(now, name)
    }

    fn bind(
        &mut self,
        now: Instant,
        session: SessionKey,
        names: &[BindingKey],
        backend: BackendId,
        ttl: Duration,
        force: bool,
    ) -> BackendId {
        self.core.bind(now, &self.snapshot, session, names, backend, ttl, force)
    }

    fn keep_bound(&mut self, now: Instant, session: SessionKey, ttl: Duration) {
        self.core.keep_bound(now, session, ttl);
    }

    fn unbind(&mut self, _now: Instant, session: SessionKey) -> bool {
        self.core.unbind(session)
    }

    fn forget_bound(&mut self, _now: Instant, name: BindingKey) {
        self.core.forget_bound(name);
    }

    fn restarted(&mut self, _now: Instant, backend: BackendId) {
        self.core.restarted(&self.snapshot, backend);
    }

    fn favour(&mut self, now: Instant, backend: BackendId, permille: u32, lasting: Duration) {
        if let Some(live) = self.core.live(backend) {
            let lasting = u64::try_from(lasting.as_millis()).unwrap_or(u64::MAX);
            live.favour(permille, self.core.clock(now).saturating_add(lasting));
        }
    }

    fn pace(&mut self, now: Instant, backend: BackendId, bucket: usize, rate: Rate) -> bool {
        let Some(backend) = self.snapshot.backend(backend) else { return true };
        backend.live.pace(self.core.clock_ns(now), bucket, rate)
    }

    fn pool_load(&self, pool: PoolId) -> PoolLoad {
        self.snapshot.pool(pool).map_or_else(PoolLoad::default, |pool| pool.live.qos.load.told())
    }

    fn linked(&self, pool: PoolId) -> usize {
        let backends = self.snapshot.pool(pool).map(|pool| pool.backends.iter());
        backends.into_iter().flatten().filter(|backend| backend.is_linked()).count()
    }

    fn peers_named(&self, listener: &str, identity: &str) -> usize {
        self.core.peers().named(listener, identity)
    }

    fn report_peer(&mut self, listener: &str, peer: Endpoint, report: Option<PeerReport>) {
        self.core.peers().report(listener, peer, report);
    }

    fn is_draining(&self) -> bool {
        self.core.is_draining()
    }
}
