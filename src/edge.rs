//! One running edge: the control side's tasks, and the workers they direct.
//!
//! The control side (configuration, probes, admin HTTP, the core's ticks) runs on the caller's
//! runtime and never on a worker's thread; the two meet in the core's snapshot.

// Long because: the start of an edge and its reloads share all of its parts.

mod admin;
mod upgrade;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use strowger_contract::{ClassId, Keyer, Level, TokenKeys};
use thiserror::Error;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::control::admin::{self as admin_api, AdminBackend, PutError};
use crate::control::config::{self, ConfigErrors, Loaded, Source};
use crate::control::providers::Providers;
use crate::control::registry::Registry;
use crate::control::resolve::Names;
use crate::control::{pressure, probes, service, watch};
use crate::observe::{BrownoutMetrics, DnsMetrics, Event, Events, Metrics, Sinks};
use crate::protocols::Protocols;
use crate::routing::{Core, CoreEvent, CoreSettings};
use crate::runtime::{BindFailure, Fleet, Prepared};

pub use upgrade::Upgrade;
use upgrade::{Door, Predecessor, admin_listener};

/// How often the core's own time goes on: expiries, the ends of drains and ejections.
const TICK: Duration = Duration::from_millis(100);

/// Where a configuration comes from.
#[derive(Clone, Debug)]
pub enum ConfigSource {
    /// Files and directories, which are watched.
    Paths(Vec<PathBuf>),
    /// A text, for demos and tests.
    Text(String),
}

/// Why an edge did not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// The configuration is wrong.
    #[error("{0}")]
    Config(#[from] ConfigErrors),
    /// No listener could be bound.
    #[error("no listener could be bound:\n{0}")]
    Bind(String),
    /// The admin server could not be bound.
    #[error("the admin server cannot listen on {address}: {error}")]
    Admin {
        /// Where.
        address: SocketAddr,
        /// Why not.
        error: io::Error,
    },
    /// The old process could not be taken over from; it goes on.
    #[error("upgrade: {0}")]
    Upgrade(String),
    /// Threads, randomness: what the system did not give.
    #[error("{0}")]
    System(#[from] io::Error),
}

/// A running edge.
pub struct Edge {
    inner: Arc<Inner>,
    admin_address: SocketAddr,
    door: Option<Door>,
    stop: CancellationToken,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

struct Inner {
    core: Arc<Core>,
    metrics: Arc<Metrics>,
    events: Arc<Events>,
    sinks: Sinks,
    names: Arc<Names>,
    providers: Providers,
    registry: Arc<Registry>,
    /// Held while configuration and leases are made one.
    merging: Mutex<()>,
    protocols: Protocols,
    fleet: Mutex<Fleet>,
    active: Mutex<Active>,
    source: ConfigSource,
    /// What the files said when they were last looked at. A configuration that was put over the API
    /// stays until they say something else.
    seen: Mutex<Vec<Source>>,
    ready: AtomicBool,
    failed: Mutex<Vec<String>>,
    epoch: AtomicU64,
    /// The epoch that the configuration came with; leases count on without it.
    config_epoch: AtomicU64,
    workers: u8,
    started: Instant,
    /// Where the admin API is, and its socket, for a process that takes over.
    admin_socket: OnceLock<(SocketAddr, std::net::TcpListener)>,
}

/// The configuration that is in force.
struct Active {
    sources: Vec<Source>,
    loaded: Loaded,
}

impl Edge {
    /// Loads the configuration, binds, and starts.
    ///
    /// # Errors
    /// See [`StartError`]. A single listener that cannot be bound is no error: it is reported, and
    /// the others run.
    pub async fn start(source: ConfigSource, protocols: Protocols) -> Result<Self, StartError> {
        Self::start_upgrading(source, protocols, None).await
    }

    /// As [`Edge::start`]; takes over what a process has that listens at the upgrade's socket, and
    /// listens there for the next one.
    ///
    /// # Errors
    /// See [`StartError`]. After [`StartError::Upgrade`] the old process goes on, and this one must
    /// exit at once: its workers may hold descriptors of the old one's.
    pub async fn start_upgrading(
        source: ConfigSource,
        mut protocols: Protocols,
        upgrade: Option<Upgrade>,
    ) -> Result<Self, StartError> {
        let metrics = Metrics::new();
        let events = Events::new(Arc::clone(&metrics));
        let launchers = protocols.take_launchers();
        let traced =
            protocols.configurers().iter().map(|protocol| protocol.trace_protocol()).collect();
        let sinks = Sinks::start(&metrics, traced);
        let now = Instant::now();
        // Pool numbers must be the core's own, and the core needs settings from the configuration:
        // it is read once for those, and once for good.
        let scratch = crate::routing::PoolNames::default();
        let first = load(&source, None, &protocols, &scratch)?;
        let mut random = [0; 56];
        fill_random(&mut random)?;
        let settings = core_settings(&first, &random);
        let seed = settings.seed;
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let names = Names::start(DnsMetrics::new(&metrics), Arc::clone(&events))?;
        let mut predecessor = match &upgrade {
            Some(upgrade) => Predecessor::meet(upgrade)?,
            None => None,
        };
        let (workers, started, core) = match &predecessor {
            Some(old) => {
                let (seed, workers) = (&old.welcome.core, settings.workers);
                if seed.workers != workers {
                    let detail = format!(
                        "{} workers, as before; {workers} only after a restart",
                        seed.workers
                    );
                    events.emit(Event::node(Level::Warn, "upgrade_keeps_workers", detail));
                }
                let core = Core::planted(settings, seed)
                    .ok_or_else(|| old.failed("it has no token keys".into()))?;
                (seed.workers, old.welcome.started, core)
            }
            None => (settings.workers, since_1970.as_secs() as u32, Core::new(settings, now)),
        };
        let mut fleet = Fleet::new(
            workers,
            launchers,
            Arc::clone(&core),
            Arc::clone(&metrics),
            Arc::clone(&events),
            sinks.clone(),
            Arc::clone(&names) as _,
            seed,
            started,
        )?;
        let theirs = match &mut predecessor {
            Some(old) => {
                let address = old.welcome.admin;
                old.give_sockets(&mut fleet)?.and_then(|fd| Some((address?, fd)))
            }
            None => None,
        };
        let registry = Registry::new(
            Arc::clone(&core),
            Arc::clone(&events),
            Arc::clone(&metrics),
            first.spec.node.name.clone(),
            first.registry.state_file.as_ref().map(PathBuf::from),
            first.registry.lease,
        );
        let providers =
            Providers::new(Arc::clone(&registry), Arc::clone(&metrics), Arc::clone(&events));
        let inner = Arc::new(Inner {
            registry: Arc::clone(&registry),
            merging: Mutex::default(),
            core: Arc::clone(&core),
            metrics: Arc::clone(&metrics),
            events,
            sinks,
            names,
            providers,
            protocols,
            fleet: Mutex::new(fleet),
            active: Mutex::new(Active { sources: Vec::new(), loaded: Loaded::default() }),
            source,
            seen: Mutex::default(),
            ready: AtomicBool::new(false),
            failed: Mutex::default(),
            epoch: AtomicU64::new(0),
            config_epoch: AtomicU64::new(0),
            workers,
            started: now,
            admin_socket: OnceLock::new(),
        });
        let weak = Arc::downgrade(&inner);
        registry.on_change(move || {
            if let Some(inner) = weak.upgrade() {
                inner.apply_leases();
            }
        });
        let view = Arc::clone(&core);
        metrics.set_pools_source(move || (view.pools_view(Instant::now()), view.sessions_view()));
        let loaded = load(&inner.source, None, &inner.protocols, core.pool_names())?;
        let admin = loaded.admin.clone();
        let wanted = loaded.spec.listeners.len();
        inner.seen().clone_from(&loaded.sources);
        if let Some(old) = &predecessor {
            registry.take_over(&old.welcome.registry).map_err(|why| old.failed(why))?;
        }
        let admin_error = |error| StartError::Admin { address: admin.listen, error };
        let listener = match admin_listener(admin.listen, theirs) {
            Ok(listener) => listener,
            Err(error) => {
                if let Some(old) = &predecessor {
                    return Err(old.failed(admin_error(error).to_string()));
                }
                inner.fleet().end();
                return Err(admin_error(error));
            }
        };
        let tls = admin.tls.as_ref().map(|spec| {
            let server = inner.fleet().tls().server(spec);
            server.map(|server| (server, spec.handshake))
        });
        let tls = match tls.transpose() {
            Ok(tls) => tls,
            Err(why) => {
                if let Some(old) = &predecessor {
                    return Err(old.failed(why));
                }
                inner.fleet().end();
                return Err(StartError::System(io::Error::other(why)));
            }
        };
        let failures = match &predecessor {
            Some(old) => inner.succeed(loaded, old)?,
            None => inner.apply(loaded),
        };
        if wanted > 0 && failures.len() == wanted {
            inner.fleet().end();
            return Err(StartError::Bind(failures.join("\n")));
        }
        // Told once: this is the start.
        let _first = inner.admin_socket.set((admin.listen, listener.try_clone()?));
        let listener = TcpListener::from_std(listener)?;
        let admin_address = listener.local_addr()?;
        let stop = CancellationToken::new();
        let door = match upgrade.map(|upgrade| Door::open(&inner, &upgrade)).transpose() {
            Ok(door) => door,
            // Everything is here already, and must not be lost for the next upgrade's sake.
            Err(error) if predecessor.is_some() => {
                let detail = error.to_string();
                inner.events.emit(Event::node(Level::Warn, "upgrade_socket_failed", detail));
                None
            }
            Err(error) => return Err(error),
        };
        let mut edge = Self { inner, admin_address, door, stop, tasks: Vec::new() };
        edge.spawn_tasks(listener, admin.token, tls, seed);
        edge.inner.ready.store(true, Ordering::Relaxed);
        Ok(edge)
    }

    fn spawn_tasks(
        &mut self,
        listener: TcpListener,
        token: Option<String>,
        tls: Option<(Arc<crate::tls::Server>, Duration)>,
        seed: u64,
    ) {
        let backend: Arc<dyn AdminBackend> = Arc::clone(&self.inner) as _;
        self.spawn(admin_api::serve(listener, backend, token, tls, self.stop.clone()));
        self.spawn(tick(Arc::clone(&self.inner)));
        self.spawn(follow_certificates(Arc::clone(&self.inner)));
        self.spawn(Arc::clone(&self.inner.registry).run());
        let makers = Arc::clone(&self.inner);
        let make: probes::ProbeMaker = Arc::new(move |name| {
            makers.protocols.configurers().iter().find_map(|protocol| protocol.probe(name))
        });
        self.spawn(probes::run(Arc::clone(&self.inner.core), make, seed));
        if let ConfigSource::Paths(_) = self.inner.source {
            self.spawn(follow_files(Arc::clone(&self.inner)));
        }
    }

    fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.push(tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = task => {}
            }
        }));
    }

    /// Where the admin server listens.
    #[must_use]
    pub fn admin_address(&self) -> SocketAddr {
        self.admin_address
    }

    /// The core, for tests and the demo.
    #[must_use]
    pub fn core(&self) -> &Arc<Core> {
        &self.inner.core
    }

    /// The metrics, for tests and the demo.
    #[must_use]
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.inner.metrics
    }

    /// The events, for the demo.
    #[must_use]
    pub fn events(&self) -> &Arc<Events> {
        &self.inner.events
    }

    /// Reads the configuration again and swaps it in if it is good; whether it was.
    pub fn reload(&self) -> bool {
        self.inner.reload("asked for")
    }

    /// Takes another configuration.
    ///
    /// # Errors
    /// It is wrong; the old one stays.
    pub fn put(&self, text: &str) -> Result<u64, Vec<String>> {
        self.inner.put_config(text, None).map_err(|error| match error {
            PutError::Invalid(errors) => errors,
            PutError::Stale(epoch) => vec![format!("the epoch is {epoch}")],
        })
    }

    /// Leaves: not ready, no new sessions, until nothing is under way or `deadline` has passed, or
    /// `hurry` is cancelled.
    pub async fn drain(&self, deadline: Duration, hurry: &CancellationToken) {
        self.inner.ready.store(false, Ordering::Relaxed);
        self.inner.core.set_draining(true);
        self.inner.fleet().drain();
        let detail = format!(
            "no new sessions; waiting up to {} s for what is under way",
            deadline.as_secs()
        );
        self.inner.events.emit(Event::node(Level::Info, "node_draining", detail));
        let end = Instant::now() + deadline;
        while Instant::now() < end && !hurry.is_cancelled() {
            let sessions = self.inner.core.sessions_view().live;
            if self.inner.fleet().in_progress() == 0 && sessions == 0 {
                break;
            }
            tokio::time::sleep(TICK).await;
        }
    }

    /// Waits until another process has taken over everything; its number. For ever without an
    /// upgrade's socket.
    pub async fn left(&self) -> i32 {
        match &self.door {
            Some(door) => door.left().await,
            None => std::future::pending().await,
        }
    }

    /// After [`Edge::left`]: the control side ends, and connections that could not be moved (those
    /// over TLS) go on until they end, `deadline` has passed, or `hurry` is cancelled.
    pub async fn stay_for_the_rest(&mut self, deadline: Duration, hurry: &CancellationToken) {
        self.inner.ready.store(false, Ordering::Relaxed);
        self.stop.cancel();
        for task in self.tasks.drain(..) {
            let _ended = task.await;
        }
        let end = Instant::now() + deadline;
        while Instant::now() < end && !hurry.is_cancelled() {
            let left = self.inner.fleet().connections();
            if left == 0 {
                break;
            }
            tokio::time::sleep(TICK).await;
        }
    }

    /// Ends everything.
    pub async fn stop(mut self) {
        self.stop.cancel();
        if let Some(door) = &self.door {
            door.close();
        }
        for task in self.tasks.drain(..) {
            // A task that panicked has already been logged by the panic itself.
            let _ended = task.await;
        }
        self.inner.fleet().end();
    }
}

fn core_settings(loaded: &Loaded, random: &[u8; 56]) -> CoreSettings {
    let part = |start: usize| {
        let mut key = [0; 16];
        key.copy_from_slice(&random[start..start + 16]);
        key
    };
    let mut keys = loaded.node.token_keys.clone();
    if keys.is_empty() {
        keys.push(part(0));
    }
    let cores = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(strowger_contract::ids::WORKERS_MAX);
    let mut seed = [0; 8];
    seed.copy_from_slice(&random[32..40]);
    CoreSettings {
        token_keys: TokenKeys::new(keys),
        keyer: Keyer::new(part(16)),
        seed: u64::from_le_bytes(seed),
        sessions_max: loaded.node.sessions_max,
        bindings_max: loaded.node.bindings_max,
        workers: loaded.node.workers.unwrap_or(cores as u8),
        advise: crate::runtime::prefer_large_pages,
    }
}

fn fill_random(bytes: &mut [u8]) -> io::Result<()> {
    use std::io::Read;
    std::fs::File::open("/dev/urandom")?.read_exact(bytes)
}

/// Loads from `source`, or from `text` in its stead.
fn load(
    source: &ConfigSource,
    text: Option<&str>,
    protocols: &Protocols,
    names: &crate::routing::PoolNames,
) -> Result<Loaded, ConfigErrors> {
    let sources = match (text, source) {
        (Some(text), _) => vec![Source { name: "request".to_owned(), text: text.to_owned() }],
        (None, ConfigSource::Text(text)) => {
            vec![Source { name: "built-in".to_owned(), text: text.clone() }]
        }
        (None, ConfigSource::Paths(paths)) => config::read_sources(paths)?,
    };
    config::load_watching(sources, &protocols.configurers(), names)
}

/// Certificates, keys, authorities and OCSP answers that changed. They are few and small, and a
/// look tells a rename, a symlink's swap and an in-place write alike.
async fn follow_certificates(inner: Arc<Inner>) {
    const EVERY: Duration = Duration::from_secs(1);
    let mut ticks = tokio::time::interval(EVERY);
    loop {
        ticks.tick().await;
        inner.refresh_certificates();
    }
}

async fn tick(inner: Arc<Inner>) {
    let mut ticks = tokio::time::interval(TICK);
    let mut gauge = pressure::Gauge::default();
    let mut figures = BrownoutMetrics::new(&inner.metrics);
    loop {
        ticks.tick().await;
        inner.press(&mut gauge, &mut figures);
        for bound in inner.sinks.bounds_hit() {
            inner.metrics.bite(bound);
        }
        for (listener, bound) in inner.metrics.take_bites() {
            let detail = format!("`{bound}` bites for the first time; it is counted from now on");
            inner.events.emit(Event::engine(Level::Warn, &listener, "bound_hit", detail));
        }
        for event in inner.core.tick(Instant::now()) {
            inner.events.emit(told(&event));
        }
        inner.epoch.store(inner.core.snapshot().epoch, Ordering::Relaxed);
    }
}

fn told(event: &CoreEvent) -> Event {
    let level = if event.is_bad() { Level::Warn } else { Level::Info };
    let detail = serde_json::to_value(&event.what).unwrap_or(Value::Null);
    let detail = match detail {
        Value::Object(mut fields) => {
            fields.remove("kind");
            let parts: Vec<String> =
                fields.iter().map(|(name, value)| format!("{name} {value}")).collect();
            parts.join(", ")
        }
        _ => String::new(),
    };
    Event::pool(level, event.word(), &event.pool, event.instance.as_deref().unwrap_or(""), detail)
}

/// SIGHUP and changed files.
async fn follow_files(inner: Arc<Inner>) {
    let ConfigSource::Paths(paths) = &inner.source else { return };
    let wanted = |inner: &Inner| {
        let mut wanted = paths.clone();
        wanted.extend(inner.active().loaded.watch.clone());
        // A folder that is made later is another thing to watch than one that is not there.
        let there: Vec<bool> = wanted.iter().map(|path| path.exists()).collect();
        (wanted, there)
    };
    let mut watched = wanted(&inner);
    let mut changes = watch::Watch::new(&watched.0);
    let mut anew = false;
    let Ok(mut hangups) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup())
    else {
        return;
    };
    loop {
        let now = wanted(&inner);
        if now != watched {
            changes = watch::Watch::new(&now.0);
            watched = now;
            // What came between the reload and the new watch made no event.
            anew = true;
        }
        let asked = tokio::select! {
            () = changes.changed(), if !anew => false,
            () = std::future::ready(()), if anew => false,
            _ = hangups.recv() => true,
        };
        anew = false;
        if asked || inner.differs() {
            service::reloading();
            let taken = inner.reload(if asked { "SIGHUP" } else { "file changed" });
            service::ready(if taken {
                "serving"
            } else {
                "serving by the old configuration; the new one is wrong (see the log)"
            });
        }
    }
}

impl Inner {
    fn fleet(&self) -> MutexGuard<'_, Fleet> {
        self.fleet.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn seen(&self) -> MutexGuard<'_, Vec<Source>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn active(&self) -> MutexGuard<'_, Active> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the files say something else than what was last looked at.
    fn differs(&self) -> bool {
        let ConfigSource::Paths(paths) = &self.source else { return false };
        let mut paths = paths.clone();
        paths.extend(config::existing(&self.active().loaded.watch));
        match config::read_sources(&paths) {
            Ok(sources) => sources != *self.seen(),
            Err(_) => true,
        }
    }

    /// What the node has of itself, and what it gives up or takes back because of it.
    fn press(&self, gauge: &mut pressure::Gauge, figures: &mut BrownoutMetrics) {
        let now = Instant::now();
        let seen = gauge.read(now, self.metrics.take_worst_lag());
        if let Some(step) = self.core.press(now, seen) {
            figures.stepped(step);
            let level = if step.to > step.from { Level::Warn } else { Level::Info };
            let detail = format!(
                "from step {} to {} of 5; {} is at {} % of what counts as full",
                step.from, step.to, step.resource, step.percent
            );
            self.events.emit(Event::node(level, "brownout_step", detail));
        }
        let snapshot = self.core.snapshot();
        figures.show(&self.core.brownout_view(), |class| {
            snapshot.class_name(ClassId(class as u8)).to_owned()
        });
    }

    fn refresh_certificates(&self) {
        let store = Arc::clone(self.fleet().tls());
        for (files, result) in store.refresh() {
            let (level, name, detail) = match result {
                Ok(()) => (Level::Info, "certificates_reloaded", files),
                Err(why) => {
                    (Level::Warn, "certificates_rejected", format!("the old ones stay: {why}"))
                }
            };
            self.events.emit(Event::node(level, name, detail));
        }
    }

    fn reload(&self, why: &str) -> bool {
        // What rotates logs moves the file away and says so by SIGHUP.
        self.sinks.calls.reopen();
        self.refresh_certificates();
        if let ConfigSource::Paths(paths) = &self.source {
            let mut paths = paths.clone();
            paths.extend(config::existing(&self.active().loaded.watch));
            if let Ok(sources) = config::read_sources(&paths) {
                *self.seen() = sources;
            }
        }
        match load(&self.source, None, &self.protocols, self.core.pool_names()) {
            Ok(loaded) => {
                self.registry.provider("files", Ok(()));
                self.apply(loaded);
                let detail = format!("{why}; epoch {}", self.core.snapshot().epoch);
                self.events.emit(Event::node(Level::Info, "config_reloaded", detail));
                true
            }
            Err(errors) => {
                let first = errors.0.first().map(ToString::to_string).unwrap_or_default();
                self.registry.provider("files", Err(first));
                self.metrics.reloaded(None, Duration::ZERO);
                let detail = format!("{why}; the old configuration stays: {errors}");
                self.events.emit(Event::node(Level::Warn, "config_rejected", detail));
                false
            }
        }
    }

    /// Binds what is new, swaps the snapshot, starts and closes listeners; what could not be bound.
    fn apply(&self, loaded: Loaded) -> Vec<String> {
        self.apply_by(loaded, Fleet::commit)
    }

    /// [`Inner::apply`], where `commit` starts and closes listeners.
    fn apply_by(
        &self,
        mut loaded: Loaded,
        commit: impl FnOnce(&mut Fleet, Prepared),
    ) -> Vec<String> {
        for warning in &loaded.warnings {
            self.events.emit(Event::node(Level::Warn, "config_warning", warning.clone()));
        }
        let mut fleet = self.fleet();
        let prepared = fleet.prepare(&loaded.spec.listeners);
        let failures: Vec<String> = prepared.failed.iter().map(bind_failure).collect();
        for failure in &failures {
            self.events.emit(Event::node(Level::Warn, "listener_not_bound", failure.clone()));
        }
        if !loaded.node.token_keys.is_empty() {
            self.core.set_token_keys(TokenKeys::new(loaded.node.token_keys.clone()));
        }
        self.registry.set_lease(loaded.registry.lease);
        self.names.configure(&loaded.dns);
        self.core.set_brownout(loaded.brownout);
        fleet.set_rx_usecs(loaded.node.rx_usecs);
        let merging = self.merging.lock().unwrap_or_else(PoisonError::into_inner);
        let mut spec = loaded.spec.clone();
        self.registry.merge(&mut spec, self.core.pool_names());
        let plan = self.core.apply(Instant::now(), spec);
        commit(&mut fleet, prepared);
        drop(fleet);
        for (pool, instance) in &plan.pin_collisions {
            let detail = "its pin is another's: give it another id".to_owned();
            self.events.emit(Event::pool(Level::Warn, "pin_collision", pool, instance, detail));
        }
        self.epoch.store(plan.epoch, Ordering::Relaxed);
        self.config_epoch.store(plan.epoch, Ordering::Relaxed);
        self.sinks.traces.set_export(loaded.hep.clone());
        self.sinks.calls.set(loaded.cdr.clone());
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.metrics.reloaded(Some(plan.epoch), at);
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&failures);
        let mut active = self.active();
        active.sources = std::mem::take(&mut loaded.sources);
        let providers = loaded.providers.clone();
        active.loaded = loaded;
        drop(active);
        drop(merging);
        self.providers.configure(&providers);
        failures
    }

    /// Leases changed: the union of the configuration and them is what is wanted.
    fn apply_leases(&self) {
        let _merging = self.merging.lock().unwrap_or_else(PoisonError::into_inner);
        let mut spec = self.active().loaded.spec.clone();
        self.registry.merge(&mut spec, self.core.pool_names());
        let plan = self.core.apply(Instant::now(), spec);
        self.epoch.store(plan.epoch, Ordering::Relaxed);
    }
}

fn bind_failure(failure: &BindFailure) -> String {
    let BindFailure { listener, socket, error } = failure;
    let place = strowger_contract::unix::shown(socket.transport, socket.address);
    format!("listener {listener}: {place}: {error}")
}
