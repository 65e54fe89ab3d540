//! The core as operators see it: for the API, the status page and metrics.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use serde::Serialize;
use strowger_contract::{BackendId, SessionKey};

use super::core::Core;
use super::qos::QosFigures;
use super::snapshot::Snapshot;
use super::snapshot::{Backend, Pool};
use super::spec::{Balance, Policy};

/// A pool.
#[derive(Clone, Debug, Serialize)]
pub struct PoolView {
    /// Its name.
    pub name: String,
    /// How backends are chosen.
    pub balance: &'static str,
    /// Whether too few are well and load is spread over all.
    pub panic: bool,
    /// Its queue.
    pub qos: QosFigures,
    /// Its backends.
    pub backends: Vec<PoolBackendView>,
}

/// A backend of a pool.
#[derive(Clone, Debug, Serialize)]
pub struct PoolBackendView {
    /// The instance id.
    pub id: String,
    /// Its generation.
    pub generation: u64,
    /// Transport and address.
    pub address: String,
    /// The state its owner gave it.
    pub state: &'static str,
    /// Its health: `up`, `unknown`, `down`, `ejected`, `link_down`, `congested`.
    pub health: &'static str,
    /// Its share.
    pub weight: u32,
    /// Its share while it starts slowly.
    pub effective_weight: u32,
    /// Lower is preferred.
    pub priority: u16,
    /// Its slots.
    pub capacity: Option<u32>,
    /// Its slots now: of those, of what its agent says, and of what its response times tell.
    pub limit: Option<u32>,
    /// Requests or flows under way.
    pub in_flight: u32,
    /// Sessions in the table.
    pub sessions: u64,
    /// Those of them that take a slot: calls under way.
    pub held: u64,
    /// Requests sent to it.
    pub requests: u64,
    /// Good answers.
    pub answered: u64,
    /// Answers that say it cannot.
    pub refused: u64,
    /// Answers that did not come.
    pub timed_out: u64,
    /// Lost with a connection.
    pub lost: u64,
    /// The latency estimate.
    pub latency_ms: f64,
    /// What it calls itself.
    pub identity: String,
    /// Its link: `up`, `down`, `suspect`, `unknown`.
    pub link: &'static str,
    /// Its load by its owner's word, in percent.
    pub load: Option<u32>,
    /// Seconds that its drain may still take.
    pub drain_remaining_s: Option<u64>,
}

/// The session table.
#[derive(Clone, Debug, Serialize)]
pub struct SessionsView {
    /// Sessions now.
    pub live: u64,
    /// Ever noted.
    pub created: u64,
    /// Ended by the protocol.
    pub ended: u64,
    /// Ended by time.
    pub expired: u64,
    /// Pushed out by one of their class.
    pub evicted: u64,
    /// Not noted for want of room.
    pub refused: u64,
    /// Slots.
    pub capacity: usize,
    /// By class.
    pub classes: Vec<(String, u64)>,
}

/// Where one session lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SessionView {
    /// The pool.
    pub pool: String,
    /// The instance.
    pub instance: String,
}

impl Core {
    /// All pools.
    #[must_use]
    pub fn pools_view(&self, now: Instant) -> Vec<PoolView> {
        let clock = self.clock(now);
        let snapshot = self.snapshot();
        let mut pools: Vec<PoolView> =
            snapshot.pools().map(|pool| self.pool_view(&snapshot, pool, clock)).collect();
        pools.sort_by(|one, two| one.name.cmp(&two.name));
        pools
    }

    fn pool_view(&self, snapshot: &Snapshot, pool: &Pool, now: u64) -> PoolView {
        PoolView {
            name: pool.spec.name.clone(),
            balance: balance_word(pool.spec.balance),
            panic: pool.is_panicking(),
            qos: pool
                .live
                .qos
                .figures(pool.spec.qos.policy == Policy::Fifo, |class| snapshot.class_name(class)),
            backends: pool
                .backends()
                .map(|backend| self.backend_view(pool, backend, now))
                .collect(),
        }
    }

    fn backend_view(&self, pool: &Pool, backend: &Backend, now: u64) -> PoolBackendView {
        let live = &backend.live;
        let ramp = live.ramp(now, pool.spec.slow_start);
        let effective = if backend.is_open() {
            u64::from(backend.spec.weight) * u64::from(ramp) / 1_000
        } else {
            0
        };
        let identity = backend.spec.identity.clone().filter(|_| live.identity().is_empty());
        PoolBackendView {
            id: backend.spec.id.clone(),
            generation: backend.spec.generation,
            address: strowger_contract::unix::shown(backend.spec.transport, backend.spec.address),
            state: backend.state().word(),
            health: live.health_word(now, backend.needs_link),
            weight: backend.spec.weight,
            effective_weight: effective as u32,
            priority: backend.spec.priority,
            capacity: backend.spec.capacity,
            limit: backend.limit(),
            in_flight: live.in_flight(),
            sessions: self.table().sessions_of(backend.id),
            held: self.table().held_by(backend.id),
            requests: live.requests.load(Relaxed),
            answered: live.answered.load(Relaxed),
            refused: live.refused.load(Relaxed),
            timed_out: live.timed_out.load(Relaxed),
            lost: live.lost.load(Relaxed),
            latency_ms: live.latency_us() as f64 / 1_000.0,
            identity: identity.unwrap_or_else(|| live.identity()),
            link: live.link_word(),
            load: live.load(),
            drain_remaining_s: live
                .is_draining()
                .then(|| live.drain_until().saturating_sub(now) / 1_000),
        }
    }

    /// The session table.
    #[must_use]
    pub fn sessions_view(&self) -> SessionsView {
        let totals = self.table().totals();
        let snapshot = self.snapshot();
        let named = |(index, class): (usize, &strowger_contract::Class)| {
            (class.name.to_string(), totals.classes.get(index).copied().unwrap_or(0))
        };
        SessionsView {
            live: totals.live,
            created: totals.created,
            ended: totals.ended,
            expired: totals.expired,
            evicted: totals.evicted,
            refused: totals.refused,
            capacity: self.table().capacity(),
            classes: snapshot.classes.iter().enumerate().map(named).collect(),
        }
    }

    /// Where the session of that name lives, if the table knows.
    #[must_use]
    pub fn session_view(&self, now: Instant, session: SessionKey) -> Option<SessionView> {
        let backend = self.table_entry(session, self.clock(now))?;
        self.name_of(backend)
    }

    /// Where the session of that name lives, in one of the protocols' spaces: a name that means the same
    /// everywhere, or (as clients' addresses do) one that each pool has its own of.
    #[must_use]
    pub fn session_named(
        &self,
        now: Instant,
        space: u8,
        pool: Option<&str>,
        name: &[u8],
    ) -> Option<SessionView> {
        let snapshot = self.snapshot();
        let wanted =
            snapshot.pools().filter(|known| pool.is_none_or(|name| *name == known.spec.name));
        let scoped = wanted.map(|pool| self.keyer().session_in(space, pool.scope(), name));
        let keys = [self.keyer().session(space, name)].into_iter().chain(scoped);
        keys.filter_map(|key| self.session_view(now, key))
            .find(|found| pool.is_none_or(|name| *name == found.pool))
    }

    fn name_of(&self, backend: BackendId) -> Option<SessionView> {
        let snapshot = self.snapshot();
        let (pool, instance) = snapshot.backend_names(backend)?;
        Some(SessionView { pool: pool.to_owned(), instance: instance.to_owned() })
    }
}

fn balance_word(balance: Balance) -> &'static str {
    match balance {
        Balance::Hash => "hash",
        Balance::LeastLoaded => "least-loaded",
        Balance::WeightedRandom => "weighted-random",
        Balance::RoundRobin => "round-robin",
        Balance::Priority => "priority",
    }
}
