//! One immutable picture of pools, backends, classes and listeners.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use strowger_contract::{BackendId, Class, ClassId, NumberMap, Pin, PoolId, stable_hash};

use super::balance::{MAGLEV_FROM, Maglev};
use super::live::{BackendLive, identity_hash};
use super::qos::PoolQos;
use super::spec::{
    BackendSpec, InstanceState, ListenerSpec, NodeSpec, PoolSpec, SendProxy, TlsClientSpec,
};

/// One immutable picture. Workers look at it; what changes from moment to moment is in each
/// backend's [`BackendLive`].
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Counts up with each one.
    pub epoch: u64,
    /// The node.
    pub node: NodeSpec,
    /// By [`ClassId`].
    pub classes: Vec<Class>,
    /// The listeners that are wanted.
    pub listeners: Vec<Arc<ListenerSpec>>,
    /// By [`PoolId`].
    pub(super) pools: Vec<Option<Arc<Pool>>>,
    pub(super) pins: NumberMap<Pin, Arc<Backend>>,
    pub(super) backends: NumberMap<BackendId, Arc<Backend>>,
    pub(super) addresses: HashMap<SocketAddr, BackendId>,
    /// Their IP addresses.
    pub(super) ips: HashSet<IpAddr>,
    /// Backends whose address another instance took, and that address.
    pub(super) superseded: NumberMap<BackendId, SocketAddr>,
}

/// A pool in a snapshot.
#[derive(Debug)]
pub struct Pool {
    /// Its number.
    pub id: PoolId,
    /// What was wanted of it.
    pub spec: PoolSpec,
    /// Its backends, also those that are leaving.
    pub(super) backends: Vec<Arc<Backend>>,
    /// Backends' places by priority, lowest number first.
    pub(super) groups: Vec<Group>,
    pub(super) identities: HashMap<u64, usize>,
    pub(super) live: Arc<PoolLive>,
    /// The least percentage of grants of each class.
    pub(super) shares: Vec<u8>,
}

/// Backends of one priority.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) members: Vec<usize>,
    pub(super) maglev: Option<Maglev>,
}

/// What is known of a pool from moment to moment.
#[derive(Debug, Default)]
pub(super) struct PoolLive {
    pub(super) panic: AtomicBool,
    pub(super) qos: PoolQos,
}

/// A backend in a snapshot.
#[derive(Debug)]
pub struct Backend {
    /// Its number.
    pub id: BackendId,
    /// Its stable name.
    pub pin: Pin,
    /// Its pool.
    pub pool: PoolId,
    /// Its pool's name.
    pub pool_name: Arc<str>,
    /// What was wanted of it.
    pub spec: Arc<BackendSpec>,
    /// Its pool's backends need a link.
    pub(super) needs_link: bool,
    /// How many links its pool wants to it.
    pub(super) connections: u8,
    /// It is no longer wanted and only waits out the debounce.
    pub(super) leaving: bool,
    pub(super) live: Arc<BackendLive>,
}

impl Backend {
    /// The state it is in, of its owner's word and of what the edge was told.
    #[must_use]
    pub fn state(&self) -> InstanceState {
        if self.live.is_gone() || self.spec.state == InstanceState::Gone {
            InstanceState::Gone
        } else if self.leaving || self.live.is_draining() {
            InstanceState::Draining
        } else {
            self.spec.state
        }
    }

    /// Whether a session that it has may go on.
    pub(super) fn keeps_sessions(&self) -> bool {
        !matches!(self.state(), InstanceState::Gone | InstanceState::Starting)
    }

    /// Whether a message can reach it.
    pub(super) fn is_linked(&self) -> bool {
        self.live.link_allows(self.needs_link)
    }

    /// Whether it is well, by checks and traffic.
    pub(super) fn is_well(&self, now: u64) -> bool {
        !self.live.is_down() && !self.live.is_ejected(now)
    }

    /// Whether it may take new sessions by its owner's word.
    pub(super) fn is_open(&self) -> bool {
        self.spec.weight > 0 && matches!(self.state(), InstanceState::Ready | InstanceState::Canary)
    }

    /// How many slots it has: the least of what is configured, what the agent says, and what its
    /// response times tell. `None`: no limit.
    pub(super) fn limit(&self) -> Option<u32> {
        self.spec.capacity.into_iter().chain(self.live.limit()).min()
    }

    /// The slots that it has for new sessions: fewer than all while it starts slowly.
    pub(super) fn limit_for_new(&self) -> Option<u32> {
        self.limit().map(|limit| self.live.windowed(limit))
    }

    /// Whether all its slots are taken, by requests in flight.
    pub(super) fn is_full(&self) -> bool {
        self.live.is_congested() || self.limit().is_some_and(|it| self.live.in_flight() >= it)
    }

    /// Whether it has none for a new session, with the `held` sessions that have some.
    pub(super) fn is_full_for_new(&self, held: u32) -> bool {
        let taken = || self.live.in_flight().saturating_add(held);
        self.live.is_congested() || self.limit_for_new().is_some_and(|limit| taken() >= limit)
    }

    /// Takes a slot for a new session; `false` if there is none.
    pub(super) fn take_slot_for_new(&self, held: u32) -> bool {
        !self.live.is_congested() && self.live.try_begin(self.limit_for_new(), held)
    }

    /// Takes one of its slots; `false` if there is none.
    pub(super) fn take_slot(&self) -> bool {
        !self.live.is_congested() && self.live.try_begin(self.limit(), 0)
    }

    /// Whether it may take what any backend of its pool may take.
    pub(super) fn takes_new(&self, now: u64) -> bool {
        self.is_open() && self.is_linked() && self.is_well(now)
    }
}

impl Pool {
    pub(super) fn new(
        id: PoolId,
        spec: PoolSpec,
        backends: Vec<Arc<Backend>>,
        live: Arc<PoolLive>,
        classes: &[Class],
    ) -> Self {
        let mut priorities: Vec<u16> =
            backends.iter().map(|backend| backend.spec.priority).collect();
        priorities.sort_unstable();
        priorities.dedup();
        let groups =
            priorities.into_iter().map(|priority| Group::new(priority, &backends)).collect();
        let named = |(index, backend): (usize, &Arc<Backend>)| {
            let identity = backend.spec.identity.as_ref()?;
            Some((identity_hash(identity.as_bytes()), index))
        };
        let identities = backends.iter().enumerate().filter_map(named).collect();
        let shares = classes.iter().map(|class| class.share_min).collect();
        Self { id, spec, backends, groups, identities, live, shares }
    }

    /// The backends.
    pub fn backends(&self) -> impl Iterator<Item = &Arc<Backend>> {
        self.backends.iter()
    }

    /// Among which pools a client's address names one session
    /// ([`strowger_contract::Router::session_scope`]).
    #[must_use]
    pub fn scope(&self) -> u64 {
        let share = self.spec.session_share.as_deref();
        // No pool has a number that high.
        share.map_or_else(|| u64::from(self.id.0), |name| stable_hash(name.as_bytes()) | 1 << 63)
    }

    /// Whether too few are well and load is spread over all.
    #[must_use]
    pub fn is_panicking(&self) -> bool {
        self.live.panic.load(Ordering::Relaxed)
    }

    /// The backend of that identity, configured or learned.
    pub(super) fn named(&self, identity: &[u8]) -> Option<&Arc<Backend>> {
        let hash = identity_hash(identity);
        if let Some(&index) = self.identities.get(&hash) {
            return self.backends.get(index);
        }
        self.backends
            .iter()
            .find(|backend| backend.spec.identity.is_none() && backend.live.is_called(hash))
    }

    /// Counts the slots of those that take new sessions; 0 if one of them has no limit.
    pub(super) fn review_slots(&self, now: u64) {
        let usable = || self.backends.iter().filter(|backend| backend.takes_new(now));
        let slots = usable()
            .map(|backend| backend.limit_for_new())
            .try_fold(0u32, |sum, limit| limit.map(|limit| sum.saturating_add(limit)));
        self.live.qos.set_slots(slots.unwrap_or(0));
    }

    /// Whether panic must begin or end; the new state if it changes.
    pub(super) fn review_panic(&self, now: u64) -> Option<bool> {
        let open = || self.backends.iter().filter(|backend| backend.is_open());
        let (all, well) = (open().count(), open().filter(|backend| backend.is_well(now)).count());
        let panic =
            all > 0 && well < all && well * 100 < all * usize::from(self.spec.panic_percent);
        (self.live.panic.swap(panic, Ordering::Relaxed) != panic).then_some(panic)
    }
}

impl Group {
    fn new(priority: u16, backends: &[Arc<Backend>]) -> Self {
        let of_it = |(index, backend): (usize, &Arc<Backend>)| {
            (backend.spec.priority == priority).then_some(index)
        };
        let members: Vec<usize> = backends.iter().enumerate().filter_map(of_it).collect();
        let maglev = (members.len() >= MAGLEV_FROM).then(|| {
            let weights: Vec<(Pin, u32)> = members
                .iter()
                .map(|&index| {
                    let backend = &backends[index];
                    (backend.pin, if backend.leaving { 0 } else { backend.spec.weight })
                })
                .collect();
            Maglev::new(&weights)
        });
        Self { members, maglev }
    }
}

impl Snapshot {
    /// A pool by its number.
    #[must_use]
    pub fn pool(&self, pool: PoolId) -> Option<&Arc<Pool>> {
        self.pools.get(pool.0 as usize)?.as_ref()
    }

    /// All pools.
    pub fn pools(&self) -> impl Iterator<Item = &Arc<Pool>> {
        self.pools.iter().flatten()
    }

    /// A backend by its number.
    #[must_use]
    pub fn backend(&self, backend: BackendId) -> Option<&Arc<Backend>> {
        self.backends.get(&backend)
    }

    /// How a backend behind `tls://` is spoken to, as its pool says.
    #[must_use]
    pub fn backend_tls(&self, backend: BackendId) -> Option<Arc<TlsClientSpec>> {
        let backend = self.backend(backend)?;
        self.pool(backend.pool)?.spec.tls.clone()
    }

    /// Whether a backend is told of clients by the PROXY protocol.
    #[must_use]
    pub fn backend_send_proxy(&self, backend: BackendId) -> SendProxy {
        let pool = self.backend(backend).and_then(|backend| self.pool(backend.pool));
        pool.map_or(SendProxy::Off, |pool| pool.spec.send_proxy)
    }

    /// What a backend must call itself, if the configuration says so.
    #[must_use]
    pub fn backend_identity(&self, backend: BackendId) -> Option<String> {
        self.backend(backend)?.spec.identity.clone()
    }

    /// A backend's pool and instance id.
    #[must_use]
    pub fn backend_names(&self, backend: BackendId) -> Option<(&str, &str)> {
        self.backend(backend).map(|backend| (&*backend.pool_name, backend.spec.id.as_str()))
    }

    /// A class's name; those that no longer exist count as bulk.
    #[must_use]
    pub fn class_name(&self, class: ClassId) -> &str {
        self.class(class).map_or("bulk", |class| &class.name)
    }

    /// A class.
    #[must_use]
    pub fn class(&self, class: ClassId) -> Option<&Class> {
        self.classes.get(usize::from(class.0))
    }

    /// The backends of a pool that a link should be kept to.
    pub fn linkable(&self, pool: PoolId) -> impl Iterator<Item = (BackendId, u8)> + '_ {
        let backends = self.pool(pool).map(|pool| pool.backends.as_slice()).unwrap_or_default();
        let wanted = |backend: &&Arc<Backend>| {
            backend.state() != InstanceState::Gone && backend.spec.transport.is_stream()
        };
        let lanes = |backend: &Arc<Backend>| {
            let id = backend.id;
            (0..backend.connections).map(move |lane| (id, lane))
        };
        backends.iter().filter(wanted).flat_map(lanes)
    }
}
