//! Leased instances: who is there by his own word, kept over reloads and restarts.
//!
//! | module | what it does |
//! |---|---|
//! | `types` | what travels over the API |
//! | `model` | the state machine, pure |
//! | `handover` | the same for another process |
//! | `file` | the state file: write, fsync, rename |
//! | this | the two in one running edge: events, metrics, the union with YAML backends |

pub(crate) mod file;
mod handover;
mod model;
#[cfg(test)]
mod properties;
mod types;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use strowger_contract::Level;
use tokio::sync::watch;

pub use model::{Change, GRACE_LEASES, HEARTBEATS, Lease, Model, Put, Refused, What};
pub use types::{
    BeatReply, Heartbeat, Identity, InstanceEndpoint, LEASE_MAX_MS, LEASE_MIN_MS, LeaseState,
    Locality, Registration, check_id,
};

use crate::observe::{Event, Events, Metrics};
use crate::routing::{BackendSpec, Core, PoolNames, SnapshotSpec};

/// How often leases are looked at (gorouter's 30 s are far beyond a SIP transaction's 32 s).
pub const SWEEP_EVERY: Duration = Duration::from_millis(500);

/// Milliseconds since 1970: what is the same after a restart.
fn since_1970() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// Makes the union of configuration and leases the wanted state.
type Refresh = Box<dyn Fn() + Send + Sync>;

/// The registry of one edge.
pub struct Registry {
    start: Instant,
    router_id: String,
    epoch: AtomicU64,
    lease: Mutex<Duration>,
    core: Arc<Core>,
    events: Arc<Events>,
    metrics: Arc<Metrics>,
    inner: Mutex<Inner>,
    refresh: OnceLock<Refresh>,
    wanted: watch::Sender<u64>,
    written: watch::Sender<Written>,
    file: Option<PathBuf>,
}

/// How far the state file is.
#[derive(Clone, Debug, Default)]
struct Written {
    /// The last change that was tried to be written.
    tried: u64,
    /// The last one that is on the disk.
    kept: u64,
    /// Why those in between are not.
    error: String,
}

#[derive(Default)]
struct Inner {
    model: Model,
    /// What the listeners of each pool speak.
    protocols: HashMap<String, Vec<&'static str>>,
    /// What stands in YAML: (pool, id), and addresses.
    fixed_ids: HashSet<(String, String)>,
    fixed_addresses: HashMap<String, (String, String)>,
    pools: HashSet<String>,
    /// Leases that YAML has the same id or address of: told once.
    shadowed: HashSet<(String, String)>,
    providers: HashMap<String, ProviderState>,
    /// Drains of before a restart: (pool, id), and when they end, in milliseconds since 1970.
    resumed: HashMap<(String, String), u64>,
}

/// How a provider does.
#[derive(Clone, Debug, Serialize)]
pub struct ProviderState {
    /// Whether it hears its source.
    pub ok: bool,
    /// What is wrong.
    pub detail: String,
}

/// Why a registration or renewal was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// No configuration names such a pool.
    #[error("no configuration names the pool")]
    NoPool,
    /// A field is wrong.
    #[error("{0}")]
    Bad(String),
    /// The id or the address stands in the configuration.
    #[error("{0} stands in the configuration")]
    Configured(String),
    /// By the state machine.
    #[error("{0}")]
    Refused(Refused),
}

impl From<Refused> for RegistryError {
    fn from(refused: Refused) -> Self {
        Self::Refused(refused)
    }
}

/// A lease as the API shows it.
#[derive(Clone, Debug, Serialize)]
pub struct LeaseView {
    /// Who brought it in.
    pub source: String,
    /// Milliseconds until it lapses.
    pub expires_in_ms: u64,
    /// `live`, `held`, `lapsed`.
    pub standing: &'static str,
    /// What was registered.
    pub registration: Registration,
}

impl Registry {
    /// Takes over what the state file holds. An unreadable file is set aside and told of.
    #[must_use]
    pub fn new(
        core: Arc<Core>,
        events: Arc<Events>,
        metrics: Arc<Metrics>,
        router_id: String,
        file: Option<PathBuf>,
        lease: Duration,
    ) -> Arc<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut epoch = now.as_millis() as u64;
        let mut model = Model::default();
        let mut resumed = HashMap::new();
        if let Some(path) = &file {
            match file::read(path) {
                Ok(Some(state)) => {
                    epoch = state.epoch;
                    let count = state.instances.len();
                    for (pool, id, lease) in &state.instances {
                        if let Some(until) = lease.drain_until.filter(|_| lease.draining) {
                            resumed.insert((pool.clone(), id.clone()), until);
                        }
                    }
                    model.restore(1, state.instances);
                    let detail = format!("{count} instances from {}", path.display());
                    events.emit(Event::node(Level::Info, "registry_restored", detail));
                }
                Ok(None) => {}
                Err(error) => {
                    let aside = path.with_extension("bad");
                    let _kept = std::fs::rename(path, &aside);
                    let detail = format!(
                        "{}: {error}; set aside as {}; instances must register again",
                        path.display(),
                        aside.display()
                    );
                    events.emit(Event::node(Level::Warn, "registry_state_unreadable", detail));
                }
            }
        }
        let inner = Mutex::new(Inner { model, resumed, ..Inner::default() });
        let start = Instant::now();
        let (lease, refresh) = (Mutex::new(lease), OnceLock::new());
        let (wanted, written) = (watch::Sender::new(0), watch::Sender::new(Written::default()));
        Arc::new(Self {
            start,
            router_id,
            epoch: AtomicU64::new(epoch),
            lease,
            core,
            events,
            metrics,
            inner,
            refresh,
            wanted,
            written,
            file,
        })
    }

    /// What to do when leases changed.
    pub fn on_change(&self, refresh: impl Fn() + Send + Sync + 'static) {
        // It is set once, by the edge.
        let _set_before = self.refresh.set(Box::new(refresh));
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        self.start.elapsed().as_millis() as u64 + 1
    }

    /// The default lease's time; a reload may change it.
    pub fn set_lease(&self, lease: Duration) {
        *self.lease.lock().unwrap_or_else(PoisonError::into_inner) = lease;
    }

    /// The default lease's time.
    #[must_use]
    pub fn lease(&self) -> Duration {
        *self.lease.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it calls itself towards registrars.
    #[must_use]
    pub fn router_id(&self) -> &str {
        &self.router_id
    }

    /// Changes when what was known is lost.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Relaxed)
    }

    /// Registers an instance; see [`Model::put`].
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub fn put(
        &self,
        pool: &str,
        id: &str,
        registration: Registration,
        source: &str,
        vouched: bool,
    ) -> Result<Put, RegistryError> {
        self.put_as(pool, id, registration, source, vouched, &|_| true)
    }

    /// The same for somebody who may take addresses from instances of some pools only: who may
    /// not register in the holder's pool may not end its sessions either.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub fn put_as(
        &self,
        pool: &str,
        id: &str,
        mut registration: Registration,
        source: &str,
        vouched: bool,
        may: &dyn Fn(&str) -> bool,
    ) -> Result<Put, RegistryError> {
        let outcome = self.try_put(pool, id, &mut registration, source, vouched, may);
        let word = match &outcome {
            Ok(Put::Created) => "created",
            Ok(Put::Updated) => "updated",
            Err(RegistryError::NoPool) => "no_pool",
            Err(RegistryError::Bad(_)) => "malformed",
            Err(RegistryError::Configured(_)) => "configured",
            Err(RegistryError::Refused(Refused::AddressInUse { .. })) => "address_in_use",
            Err(RegistryError::Refused(Refused::Stale { .. })) => "stale",
            Err(RegistryError::Refused(_)) => "refused",
        };
        self.metrics.registration(source, word);
        self.after();
        outcome
    }

    fn try_put(
        &self,
        pool: &str,
        id: &str,
        registration: &mut Registration,
        source: &str,
        vouched: bool,
        may: &dyn Fn(&str) -> bool,
    ) -> Result<Put, RegistryError> {
        check_id(id).map_err(RegistryError::Bad)?;
        let default = self.lease().as_millis() as u64;
        registration.check(default).map_err(RegistryError::Bad)?;
        let mut inner = self.inner();
        if !inner.pools.contains(pool) {
            return Err(RegistryError::NoPool);
        }
        if let Some(protocols) = inner.protocols.get(pool).filter(|known| !known.is_empty())
            && registration.endpoint_for(protocols).is_none()
        {
            return Err(RegistryError::Bad(format!(
                "endpoints: none is for pool {pool}: expected one of protocol {}",
                protocols.join(" or ")
            )));
        }
        if inner.fixed_ids.contains(&(pool.to_owned(), id.to_owned())) {
            return Err(RegistryError::Configured(format!("the id {id}")));
        }
        for endpoint in &registration.endpoints {
            let holder = inner.fixed_addresses.get(&endpoint.address);
            if let Some((other_pool, other)) = holder.filter(|(_, other)| other != id) {
                let what = format!("the address {} of {other_pool}/{other}", endpoint.address);
                return Err(RegistryError::Configured(what));
            }
        }
        let now = self.now();
        let held = inner.model.holder_elsewhere(pool, id, registration, may);
        if let Some((address, holder)) = held {
            let retry_ms = registration.lease_ttl_ms;
            return Err(Refused::AddressInUse { address, holder, retry_ms }.into());
        }
        // A source vouches for its own addresses only: what another one brought in stays as long
        // as it is alive.
        let vouched = vouched && inner.model.holders_are_of(source, id, registration);
        Ok(inner.model.put(now, pool, id, registration.clone(), source, vouched)?)
    }

    /// A heartbeat, and the edge's view in answer.
    ///
    /// # Errors
    /// The lease is not known, or another generation is.
    pub fn renew(
        &self,
        pool: &str,
        id: &str,
        generation: Option<u64>,
        beat: &Heartbeat,
    ) -> Result<BeatReply, Refused> {
        let now = self.now();
        let ttl_ms = {
            let mut inner = self.inner();
            inner.model.renew(now, pool, id, generation, beat)?;
            inner.model.get(pool, id).map_or(0, |lease| lease.registration.lease_ttl_ms)
        };
        self.after();
        // One that no longer says how loaded it is is not held to what it said before.
        self.core.set_load(pool, id, beat.load);
        let (sessions, recent) = self.core.report(Instant::now(), pool, id).unwrap_or_default();
        Ok(BeatReply {
            ttl_ms,
            next_ms: ttl_ms / HEARTBEATS,
            router_id: self.router_id.clone(),
            epoch: self.epoch(),
            sessions,
            deadline_miss_ppm: recent.miss_ppm(),
            p99_ms: recent.p99_ms,
            samples: recent.requests,
        })
    }

    /// No new sessions for a leased instance, or again; `deadline`: the pool's if it is not given.
    pub fn drain(&self, pool: &str, id: &str, draining: bool, deadline: Option<Duration>) {
        let own = || {
            let snapshot = self.core.snapshot();
            let pool = snapshot.pool(self.core.pool_names().id(pool));
            pool.map_or(Duration::ZERO, |pool| pool.spec.drain_deadline)
        };
        let length = deadline.unwrap_or_else(own);
        let until = u64::try_from(length.as_millis()).unwrap_or(u64::MAX);
        let until = since_1970().saturating_add(until);
        // One that is not leased is drained by the core alone.
        let _not_leased = self.inner().model.drain(pool, id, draining, Some(until));
        self.after();
    }

    /// Drains that were ordered before a restart end when they were to end, and not before: sessions
    /// that the restarted edge has not heard of yet may still be there.
    fn end_resumed_drains(&self) {
        let now = since_1970();
        let over: Vec<(String, String)> = {
            let mut inner = self.inner();
            let over = |until: &u64| *until <= now;
            let ended: Vec<_> = inner
                .resumed
                .iter()
                .filter(|(_, until)| over(until))
                .map(|(it, _)| it.clone())
                .collect();
            inner.resumed.retain(|_, until| !over(until));
            // An `undrain` or a new generation came in between.
            ended
                .into_iter()
                .filter(|(pool, id)| inner.model.get(pool, id).is_some_and(|lease| lease.draining))
                .collect()
        };
        for (pool, id) in over {
            // One whose pool the configuration no longer names is nobody's.
            let _not_there = self.core.drain(Instant::now(), &pool, &id, Some(Duration::ZERO));
        }
    }

    /// An instance left.
    ///
    /// # Errors
    /// The lease is not known, or another generation is.
    pub fn delete(&self, pool: &str, id: &str, generation: Option<u64>) -> Result<(), Refused> {
        let outcome = self.inner().model.delete(pool, id, generation);
        self.after();
        outcome
    }

    /// Who has an address, of those that a source brought in.
    #[must_use]
    pub fn holder(&self, source: &str, pool: &str, address: &str) -> Option<String> {
        let inner = self.inner();
        let mut leases = inner.model.pool(pool).filter(|(_, lease)| lease.source == source);
        let found = leases.find(|(_, lease)| {
            lease.registration.endpoints.iter().any(|endpoint| endpoint.address == address)
        });
        found.map(|(id, _)| id.to_owned())
    }

    /// All leases of a source: (pool, id, registration).
    #[must_use]
    pub fn of_source(&self, source: &str) -> Vec<(String, String, Registration)> {
        let inner = self.inner();
        let of_it = inner.model.leases().filter(|(_, _, lease)| lease.source == source);
        of_it
            .map(|(pool, id, lease)| (pool.to_owned(), id.to_owned(), lease.registration.clone()))
            .collect()
    }

    /// A lease for the API.
    #[must_use]
    pub fn view(&self, pool: &str, id: &str) -> Option<LeaseView> {
        let now = self.now();
        let inner = self.inner();
        let lease = inner.model.get(pool, id)?;
        let expires = lease.renewed.saturating_add(lease.registration.lease_ttl_ms);
        Some(LeaseView {
            source: lease.source.clone(),
            expires_in_ms: expires.saturating_sub(now),
            standing: if lease.is_held() {
                "held"
            } else if lease.is_lapsed() {
                "lapsed"
            } else {
                "live"
            },
            registration: lease.registration.clone(),
        })
    }

    /// Whether a configuration names the pool.
    #[must_use]
    pub fn has_pool(&self, pool: &str) -> bool {
        self.inner().pools.contains(pool)
    }

    /// A provider is no more: what it brought in lapses as other leases do.
    pub fn forget_provider(&self, name: &str) {
        let mut inner = self.inner();
        inner.providers.remove(name);
        inner.model.source_back(self.now(), name);
        drop(inner);
        self.metrics.provider_gone(name);
    }

    /// A provider hears its source, or not. While it does not, what it brought in does not lapse.
    pub fn provider(&self, name: &str, state: Result<(), String>) {
        let (ok, detail) = match state {
            Ok(()) => (true, String::new()),
            Err(detail) => (false, detail),
        };
        self.metrics.provider(name, ok);
        let new = ProviderState { ok, detail: detail.clone() };
        let before = {
            let mut inner = self.inner();
            if ok {
                inner.model.source_back(self.now(), name);
            } else {
                inner.model.source_lost(name);
            }
            inner.providers.insert(name.to_owned(), new)
        };
        if before.as_ref().is_none_or(|before| before.ok != ok) {
            let event = if ok {
                Event::node(Level::Info, "provider_up", name.to_owned())
            } else {
                let detail = format!("{name}: {detail}; what it last said stays");
                Event::node(Level::Warn, "provider_down", detail)
            };
            self.events.emit(event);
        }
    }

    /// Whether all providers hear their sources; what is wrong if not.
    #[must_use]
    pub fn providers(&self) -> Vec<(String, ProviderState)> {
        let mut list: Vec<_> = self.inner().providers.clone().into_iter().collect();
        list.sort_by(|one, two| one.0.cmp(&two.0));
        list
    }

    /// Adds the leased instances to a configuration's wanted state. What stands in YAML wins: it is
    /// the operator's word.
    pub fn merge(&self, spec: &mut SnapshotSpec, names: &PoolNames) {
        let mut inner = self.inner();
        inner.note_configured(spec);
        let mut shadowed = HashSet::new();
        for pool in &mut spec.pools {
            let id = names.id(&pool.name);
            let of_pool = spec.listeners.iter().filter(|listener| listener.pools.contains(&id));
            let protocols: Vec<&'static str> = of_pool.map(|listener| listener.protocol).collect();
            inner.protocols.insert(pool.name.clone(), protocols.clone());
            for (id, lease) in inner.model.pool(&pool.name) {
                let Some(backend) = types::backend_of(id, lease, &protocols) else { continue };
                let clashes = |other: &BackendSpec| {
                    other.id == backend.id
                        || (other.transport, other.address) == (backend.transport, backend.address)
                };
                if pool.backends.iter().any(clashes) {
                    shadowed.insert((pool.name.clone(), id.to_owned()));
                } else {
                    pool.backends.push(backend);
                }
            }
        }
        let fresh: Vec<_> = shadowed.difference(&inner.shadowed).cloned().collect();
        inner.shadowed = shadowed;
        drop(inner);
        for (pool, id) in fresh {
            let detail = "its id or address stands in the configuration, which wins".to_owned();
            self.events.emit(Event::pool(Level::Warn, "lease_shadowed", &pool, &id, detail));
        }
    }

    /// Tells of changes, brings them into force, and has them written down.
    fn after(&self) {
        let changes = {
            let mut inner = self.inner();
            let changes = inner.model.take_changes();
            if changes.is_empty() {
                return;
            }
            // Under the lock: who finds its change taken by somebody else must wait for it all the same.
            self.wanted.send_modify(|number| *number += 1);
            changes
        };
        for change in &changes {
            let bad =
                matches!(change.what, What::Lapsed | What::Gone | What::Superseded | What::Held);
            let level = if bad { Level::Warn } else { Level::Info };
            if change.what == What::Lapsed {
                self.metrics.lease_lapsed(&change.pool);
            }
            let detail = format!("generation {}", change.generation);
            let (pool, id) = (&change.pool, &change.id);
            self.events.emit(Event::pool(level, change.what.word(), pool, id, detail));
        }
        if let Some(refresh) = self.refresh.get() {
            refresh();
        }
    }

    /// Time goes on.
    pub fn sweep(&self) {
        let now = self.now();
        let clock = Instant::now();
        {
            let mut inner = self.inner();
            inner.model.sweep(now, &|pool, id| self.core.is_ill(clock, pool, id));
        }
        self.end_resumed_drains();
        self.after();
    }

    /// How many leases each pool has, by state.
    #[must_use]
    pub fn counts(&self) -> Vec<(String, &'static str, i64)> {
        let mut counts: HashMap<(String, &'static str), i64> = HashMap::new();
        for (pool, _, lease) in self.inner().model.leases() {
            let state = crate::routing::InstanceState::from(lease.state()).word();
            let word = if lease.is_held() { "held" } else { state };
            *counts.entry((pool.to_owned(), word)).or_default() += 1;
        }
        counts.into_iter().map(|((pool, state), count)| (pool, state, count)).collect()
    }

    /// Waits until all that has changed so far is on disk. At once if nothing is kept there.
    ///
    /// # Errors
    /// It cannot be written, and why. It is in force all the same, and tried again with every sweep.
    pub async fn written(&self) -> Result<(), String> {
        if self.file.is_none() {
            return Ok(());
        }
        let wanted = *self.wanted.borrow();
        let mut written = self.written.subscribe();
        match written.wait_for(|written| written.tried >= wanted).await {
            Ok(written) if written.kept < wanted => Err(written.error.clone()),
            // It ends with the edge.
            _ => Ok(()),
        }
    }

    /// Sweeps, and writes the state file when something changed. Never ends.
    pub async fn run(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(SWEEP_EVERY);
        let mut wanted = self.wanted.subscribe();
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    self.sweep();
                    if self.is_behind() {
                        self.write().await;
                    }
                    self.metrics.leases(&self.counts());
                }
                _ = wanted.changed() => self.write().await,
            }
        }
    }

    fn state(&self) -> file::State {
        let inner = self.inner();
        let all = inner.model.leases();
        let instances =
            all.map(|(pool, id, lease)| (pool.to_owned(), id.to_owned(), lease.clone())).collect();
        file::State { version: 1, epoch: self.epoch(), instances }
    }

    /// Whether the last attempt to write failed.
    fn is_behind(&self) -> bool {
        let written = self.written.borrow();
        written.kept < written.tried
    }

    async fn write(&self) {
        let number = *self.wanted.borrow();
        let Some(path) = self.file.clone() else { return };
        let state = self.state();
        let shown = path.display().to_string();
        let done = tokio::task::spawn_blocking(move || file::write(&path, &state)).await;
        let error = match done.map_err(std::io::Error::other).and_then(|done| done) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        };
        let before = self.written.borrow().error.clone();
        if error.is_empty() && !before.is_empty() {
            self.events.emit(Event::node(Level::Info, "registry_state_written_again", shown));
        } else if error != before {
            let detail = format!("{shown}: {error}; a restart would forget what changed");
            self.events.emit(Event::node(Level::Warn, "registry_state_not_written", detail));
        }
        self.written.send_modify(|written| {
            written.tried = number;
            if error.is_empty() {
                written.kept = number;
            }
            written.error = error;
        });
    }
}

impl Inner {
    /// Notes what the configuration itself has.
    fn note_configured(&mut self, spec: &SnapshotSpec) {
        self.protocols.clear();
        self.fixed_ids.clear();
        self.fixed_addresses.clear();
        self.pools = spec.pools.iter().map(|pool| pool.name.clone()).collect();
        for pool in &spec.pools {
            for backend in &pool.backends {
                let holder = (pool.name.clone(), backend.id.clone());
                let address = format!("{}://{}", backend.transport.scheme(), backend.address);
                self.fixed_ids.insert(holder.clone());
                self.fixed_addresses.insert(address, holder);
            }
        }
    }
}
