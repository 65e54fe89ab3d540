//! Metrics, scraped by Prometheus. Handles are resolved once, per listener and worker; a message
//! costs additions to atomics that its own worker owns.
//!
//! Labels are bounded by what is configured and by words in the source: never a Call-ID, a
//! Session-Id or a subscriber.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};
use strowger_contract::{
    AttemptOutcome, BackendId, ClassId, CloseCause, Note, RequestOutcome, WorkerId,
};

use super::bounds::Bites;
use crate::routing::{PoolView, SessionsView};

/// Seconds: from what a relay takes to what a SIP transaction may.
const SECONDS: [f64; 18] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
    10.0, 32.0, 180.0,
];

/// Distinct words that one listener may count under, on one worker: engines use some dozens.
const WORDS_MAX: usize = 256;

/// Names for labels.
pub trait NameView {
    /// A class's name.
    fn class(&self, class: ClassId) -> &str;
    /// A backend's pool and instance id.
    fn backend(&self, backend: BackendId) -> Option<(&str, &str)>;
}

type PoolsSource = Box<dyn Fn() -> (Vec<PoolView>, SessionsView) + Send + Sync>;

/// All metrics of the node.
pub struct Metrics {
    registry: Registry,
    families: Families,
    pools: Mutex<Option<PoolsSource>>,
    /// Reloads that succeeded and failed.
    upgrades: IntCounterVec,
    upgrade_pause: Gauge,
    reloads: IntCounterVec,
    epoch: IntGauge,
    reload_success: IntGauge,
    reload_time: Gauge,
    lag: HistogramVec,
    /// The worst since it was last asked for, in microseconds.
    worst_lag: Arc<AtomicU64>,
    bites: Arc<Bites>,
    pauses: IntCounterVec,
    panics: IntCounterVec,
    events: IntCounterVec,
    registrations: IntCounterVec,
    lapsed: IntCounterVec,
    leases: IntGaugeVec,
    providers: IntGaugeVec,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

struct Families {
    messages: IntCounterVec,
    bytes: IntCounterVec,
    requests: IntCounterVec,
    seconds: HistogramVec,
    backend_seconds: HistogramVec,
    refusals: IntCounterVec,
    drops: IntCounterVec,
    retries: IntCounterVec,
    counts: IntCounterVec,
    answers: IntCounterVec,
    attempts: IntCounterVec,
    post_dial: HistogramVec,
    connections: IntGaugeVec,
    opened: IntCounterVec,
    closed: IntCounterVec,
    rejected: IntCounterVec,
    handed_over: IntCounterVec,
    send_failures: IntCounterVec,
    engine_panics: IntCounterVec,
    handshakes: IntCounterVec,
    handshake_failures: IntCounterVec,
}

pub(super) fn counter(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> IntCounterVec {
    let family = IntCounterVec::new(Opts::new(name, help), labels);
    register(registry, family)
}

pub(super) fn gauge(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    let family = IntGaugeVec::new(Opts::new(name, help), labels);
    register(registry, family)
}

pub(super) fn histogram(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> HistogramVec {
    let family =
        HistogramVec::new(HistogramOpts::new(name, help).buckets(SECONDS.to_vec()), labels);
    register(registry, family)
}

/// Names and labels are constants of this file; a wrong one fails the first test that runs.
pub(super) fn register<C: prometheus::core::Collector + Clone + 'static>(
    registry: &Registry,
    family: prometheus::Result<C>,
) -> C {
    let family = family.expect("a metric's name and labels are well-formed");
    registry.register(Box::new(family.clone())).expect("a metric's name is used once");
    family
}

impl Metrics {
    /// A fresh set.
    #[must_use]
    pub fn new() -> Arc<Self> {
        let registry = Registry::new();
        let at = &["listener", "protocol"];
        let families = Families {
            messages: counter(
                &registry,
                "strowger_messages_total",
                "Messages received and sent",
                &["listener", "protocol", "direction"],
            ),
            bytes: counter(
                &registry,
                "strowger_bytes_total",
                "Bytes received and sent",
                &["listener", "protocol", "direction"],
            ),
            requests: counter(
                &registry,
                "strowger_requests_total",
                "Requests by how they ended for their sender",
                &["listener", "class", "outcome"],
            ),
            seconds: histogram(
                &registry,
                "strowger_request_seconds",
                "From a request's arrival to its answer's relay",
                &["listener", "class"],
            ),
            backend_seconds: histogram(
                &registry,
                "strowger_backend_seconds",
                "The backend's share of a request's time",
                &["pool"],
            ),
            refusals: counter(
                &registry,
                "strowger_refusals_total",
                "Requests that the router refused",
                &["listener", "class", "reason"],
            ),
            drops: counter(
                &registry,
                "strowger_drops_total",
                "Messages dropped",
                &["listener", "reason"],
            ),
            retries: counter(
                &registry,
                "strowger_retries_total",
                "Requests sent again to another backend",
                &["listener", "reason"],
            ),
            counts: counter(
                &registry,
                "strowger_protocol_total",
                "What a protocol counts besides",
                &["listener", "what"],
            ),
            answers: counter(
                &registry,
                "strowger_answers_total",
                "First provisional and final answers to requests, by method and class of code",
                &["listener", "method", "code", "pool", "backend"],
            ),
            attempts: counter(
                &registry,
                "strowger_call_attempts_total",
                "Attempts to set up a call, by how they came out (answer-seizure ratio)",
                &["listener", "pool", "backend", "outcome"],
            ),
            post_dial: histogram(
                &registry,
                "strowger_post_dial_delay_seconds",
                "From a call's request to the first thing that the caller hears of it",
                &["listener", "pool"],
            ),
            connections: gauge(&registry, "strowger_connections", "Clients' connections now", at),
            opened: counter(
                &registry,
                "strowger_connections_opened_total",
                "Clients' connections accepted",
                at,
            ),
            closed: counter(
                &registry,
                "strowger_connections_closed_total",
                "Clients' connections ended",
                &["listener", "reason"],
            ),
            rejected: counter(
                &registry,
                "strowger_connections_rejected_total",
                "Clients' connections over the listener's limit",
                at,
            ),
            handed_over: counter(
                &registry,
                "strowger_handed_over_total",
                "Messages given to another worker",
                &["listener", "outcome"],
            ),
            send_failures: counter(
                &registry,
                "strowger_send_failures_total",
                "Messages that could not be sent",
                &["listener", "reason"],
            ),
            handshakes: counter(
                &registry,
                "strowger_tls_handshakes_total",
                "TLS handshakes that succeeded, by side, version, and whether a session was resumed",
                &["listener", "side", "version", "resumed"],
            ),
            handshake_failures: counter(
                &registry,
                "strowger_tls_handshake_failures_total",
                "TLS handshakes that failed, and why",
                &["listener", "side", "reason"],
            ),
            engine_panics: counter(
                &registry,
                "strowger_engine_panics_total",
                "Engines that panicked and were restarted",
                at,
            ),
        };
        let metrics = Self {
            families,
            pools: Mutex::default(),
            upgrades: counter(
                &registry,
                "strowger_upgrades_total",
                "Live upgrades by their end: handed_over (to another process), taken_over (from one), failed",
                &["outcome"],
            ),
            upgrade_pause: register(
                &registry,
                Gauge::new(
                    "strowger_upgrade_pause_seconds",
                    "How long nothing was served at the last live upgrade",
                ),
            ),
            reloads: counter(
                &registry,
                "strowger_config_reloads_total",
                "Configurations loaded",
                &["outcome"],
            ),
            epoch: register(&registry, IntGauge::new("strowger_epoch", "The snapshot's number")),
            reload_success: register(
                &registry,
                IntGauge::new(
                    "strowger_config_last_reload_successful",
                    "1 if the last one was good",
                ),
            ),
            reload_time: register(
                &registry,
                Gauge::new(
                    "strowger_config_last_reload_success_seconds",
                    "When the last good one was, since 1970",
                ),
            ),
            worst_lag: Arc::default(),
            bites: Arc::default(),
            lag: histogram(
                &registry,
                "strowger_worker_lag_seconds",
                "How late a worker comes to its timers",
                &["worker"],
            ),
            panics: counter(
                &registry,
                "strowger_worker_panics_total",
                "Workers that panicked and were restarted",
                &["worker"],
            ),
            pauses: counter(
                &registry,
                "strowger_worker_pauses_total",
                "Pauses in which messages gather (node.rx_usecs)",
                &["worker"],
            ),
            registrations: counter(
                &registry,
                "strowger_registrations_total",
                "Registrations of instances, by who brought them and what became of them",
                &["provider", "outcome"],
            ),
            lapsed: counter(
                &registry,
                "strowger_leases_lapsed_total",
                "Leases that were not renewed in time",
                &["pool"],
            ),
            leases: gauge(
                &registry,
                "strowger_leases",
                "Leased instances now; `held`: most ran out at once, and the last state stays",
                &["pool", "state"],
            ),
            providers: gauge(
                &registry,
                "strowger_provider_up",
                "1 while a provider of instances hears its source",
                &["provider"],
            ),
            events: counter(
                &registry,
                "strowger_events_total",
                "Events, by kind",
                &["listener", "kind"],
            ),
            registry,
        };
        let build =
            gauge(&metrics.registry, "strowger_build_info", "1, with the version", &["version"]);
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Arc::new(metrics)
    }

    /// Where further families are entered.
    pub(super) fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Where pools and sessions come from when somebody scrapes.
    pub fn set_pools_source(
        &self,
        source: impl Fn() -> (Vec<PoolView>, SessionsView) + Send + Sync + 'static,
    ) {
        *self.pools.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(source));
    }

    /// The handles of a listener on a worker.
    #[must_use]
    pub fn listener(
        &self,
        name: &str,
        protocol: &'static str,
        _worker: WorkerId,
    ) -> ListenerMetrics {
        let families = &self.families;
        let at = &[name, protocol];
        let both = |family: &IntCounterVec, direction: &str| {
            family.with_label_values(&[name, protocol, direction])
        };
        ListenerMetrics {
            name: name.to_owned(),
            bites: Arc::clone(&self.bites),
            received: both(&families.messages, "in"),
            received_bytes: both(&families.bytes, "in"),
            sent: both(&families.messages, "out"),
            sent_bytes: both(&families.bytes, "out"),
            connections: families.connections.with_label_values(at),
            opened: families.opened.with_label_values(at),
            rejected: families.rejected.with_label_values(at),
            engine_panics: families.engine_panics.with_label_values(at),
            handed_over: families.handed_over.with_label_values(&[name, "taken"]),
            hand_over_dropped: families.handed_over.with_label_values(&[name, "dropped"]),
            requests: families.requests.clone(),
            seconds: families.seconds.clone(),
            backend_seconds: families.backend_seconds.clone(),
            refusals: families.refusals.clone(),
            drops: Words::new(&families.drops, &self.bites),
            retries: Words::new(&families.retries, &self.bites),
            counts: Words::new(&families.counts, &self.bites),
            answers: families.answers.clone(),
            attempts: families.attempts.clone(),
            post_dial: families.post_dial.clone(),
            answer_handles: HashMap::new(),
            attempt_handles: HashMap::new(),
            post_dial_handles: HashMap::new(),
            closed: Words::new(&families.closed, &self.bites),
            send_failures: Words::new(&families.send_failures, &self.bites),
            classes: HashMap::new(),
            pools: HashMap::new(),
        }
    }

    /// A bound of the node's own bit.
    pub fn bite(&self, bound: &'static str) {
        self.bites.bite("", bound);
    }

    /// Bounds that bit for the first time since this was last asked: (listener, bound).
    #[must_use]
    pub fn take_bites(&self) -> Vec<(String, &'static str)> {
        self.bites.take()
    }

    /// The latest that any worker came to what it wanted to do since this was last asked.
    #[must_use]
    pub fn take_worst_lag(&self) -> Duration {
        Duration::from_micros(self.worst_lag.swap(0, Ordering::Relaxed))
    }

    /// The handles of a worker.
    #[must_use]
    pub fn worker(&self, worker: WorkerId) -> WorkerMetrics {
        let label = worker.0.to_string();
        WorkerMetrics {
            lag: self.lag.with_label_values(&[&label]),
            worst_lag: Arc::clone(&self.worst_lag),
            panics: self.panics.with_label_values(&[&label]),
            pauses: self.pauses.with_label_values(&[&label]),
        }
    }

    /// The figures of [`super::Sinks`]: copies taken and lost, exports by outcome, records by
    /// outcome, live calls. Once per process.
    pub(super) fn sinks(&self) -> (IntCounter, IntCounter, IntCounterVec, IntCounterVec, IntGauge) {
        let copies = counter(
            &self.registry,
            "strowger_tap_messages_total",
            "Copies of messages for traces and exports",
            &["outcome"],
        );
        let exported = counter(
            &self.registry,
            "strowger_hep_messages_total",
            "Messages for the HEP collector",
            &["outcome"],
        );
        let records = counter(
            &self.registry,
            "strowger_call_records_total",
            "Records of calls that ended, by what became of the record",
            &["outcome"],
        );
        let live = IntGauge::new("strowger_calls", "Live calls that are listed");
        let (taken, lost) =
            (copies.with_label_values(&["taken"]), copies.with_label_values(&["lost"]));
        (taken, lost, exported, records, register(&self.registry, live))
    }

    /// Counts an event.
    pub fn event(&self, listener: &str, kind: &str) {
        self.events.with_label_values(&[listener, kind]).inc();
    }

    /// Somebody registered an instance, or tried to.
    pub fn registration(&self, provider: &str, outcome: &str) {
        self.registrations.with_label_values(&[provider, outcome]).inc();
    }

    /// A lease ran out.
    pub fn lease_lapsed(&self, pool: &str) {
        self.lapsed.with_label_values(&[pool]).inc();
    }

    /// How many leases there are, by pool and state.
    pub fn leases(&self, counts: &[(String, &'static str, i64)]) {
        self.leases.reset();
        for (pool, state, count) in counts {
            self.leases.with_label_values(&[pool.as_str(), state]).set(*count);
        }
    }

    /// A provider hears its source, or not.
    pub fn provider(&self, name: &str, up: bool) {
        self.providers.with_label_values(&[name]).set(i64::from(up));
    }

    /// A provider is no more.
    pub fn provider_gone(&self, name: &str) {
        // It may never have said anything.
        let _absent = self.providers.remove_label_values(&[name]);
    }

    /// A live upgrade came to an end; how long nothing was served, if it went well.
    pub fn upgraded(&self, outcome: &str, pause: Option<Duration>) {
        self.upgrades.with_label_values(&[outcome]).inc();
        if let Some(pause) = pause {
            self.upgrade_pause.set(pause.as_secs_f64());
        }
    }

    /// A configuration was loaded, or could not be.
    pub fn reloaded(&self, epoch: Option<u64>, at: Duration) {
        let outcome = if epoch.is_some() { "success" } else { "failure" };
        self.reloads.with_label_values(&[outcome]).inc();
        self.reload_success.set(i64::from(epoch.is_some()));
        if let Some(epoch) = epoch {
            self.epoch.set(epoch as i64);
            self.reload_time.set(at.as_secs_f64());
        }
    }

    /// Requests so far by class and outcome, over all listeners.
    #[must_use]
    pub fn requests(&self) -> Vec<(String, String, u64)> {
        use prometheus::core::Collector;
        let mut sums: HashMap<(String, String), u64> = HashMap::new();
        for family in self.families.requests.collect() {
            for metric in family.get_metric() {
                let label = |name: &str| {
                    let found = metric.get_label().iter().find(|pair| pair.name() == name);
                    found.map(|pair| pair.value().to_owned()).unwrap_or_default()
                };
                *sums.entry((label("class"), label("outcome"))).or_default() +=
                    metric.get_counter().get_value() as u64;
            }
        }
        let mut list: Vec<_> =
            sums.into_iter().map(|((class, outcome), count)| (class, outcome, count)).collect();
        list.sort();
        list
    }

    /// A TLS handshake succeeded on `side` (`client` or `backend`).
    pub fn tls_handshake(&self, listener: &str, side: &str, session: &rustls::Connection) {
        let version = match session.protocol_version() {
            Some(rustls::ProtocolVersion::TLSv1_3) => "1.3",
            _ => "1.2",
        };
        let resumed = session.handshake_kind() == Some(rustls::HandshakeKind::Resumed);
        let labels = [listener, side, version, if resumed { "yes" } else { "no" }];
        self.families.handshakes.with_label_values(&labels).inc();
    }

    /// A TLS handshake failed; `reason` is one of [`crate::tls::Failure`]'s words.
    pub fn tls_failure(&self, listener: &str, side: &str, reason: &str) {
        self.families.handshake_failures.with_label_values(&[listener, side, reason]).inc();
    }

    /// All of it in Prometheus's text format.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = Vec::new();
        // Writing to a vector cannot fail.
        let _ok = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        let source = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((pools, sessions)) = source.as_ref().map(|source| source()) {
            let registry = pools_registry(&pools, &sessions);
            let _ok = TextEncoder::new().encode(&registry.gather(), &mut text);
        }
        String::from_utf8(text).unwrap_or_default()
    }
}

/// Pools as they are now: built anew, so that what is gone leaves no series behind.
fn pools_registry(pools: &[PoolView], sessions: &SessionsView) -> Registry {
    let registry = Registry::new();
    let labels = &["pool", "backend"];
    let up = gauge(&registry, "strowger_backend_up", "1 if it takes messages", labels);
    let state = gauge(
        &registry,
        "strowger_backend_state",
        "1 for the state it is in",
        &["pool", "backend", "state"],
    );
    let in_flight =
        gauge(&registry, "strowger_backend_in_flight", "Requests or flows under way", labels);
    let live = gauge(&registry, "strowger_backend_sessions", "Sessions that it holds", labels);
    let held = gauge(&registry, "strowger_backend_calls", "Calls that take a slot of it", labels);
    let weight = gauge(
        &registry,
        "strowger_backend_effective_weight",
        "Its weight, while it starts slowly",
        labels,
    );
    let requests =
        counter(&registry, "strowger_backend_requests_total", "Requests sent to it", labels);
    let outcomes = counter(
        &registry,
        "strowger_backend_outcomes_total",
        "How they ended",
        &["pool", "backend", "outcome"],
    );
    let panic =
        gauge(&registry, "strowger_pool_panic", "1 while load is spread over all", &["pool"]);
    super::qos::register(&registry, pools);
    for pool in pools {
        panic.with_label_values(&[&pool.name]).set(i64::from(pool.panic));
        for backend in &pool.backends {
            let at = &[pool.name.as_str(), backend.id.as_str()];
            up.with_label_values(at).set(i64::from(matches!(backend.health, "up" | "unknown")));
            state.with_label_values(&[&pool.name, &backend.id, backend.state]).set(1);
            in_flight.with_label_values(at).set(i64::from(backend.in_flight));
            live.with_label_values(at).set(backend.sessions as i64);
            held.with_label_values(at).set(backend.held as i64);
            weight.with_label_values(at).set(i64::from(backend.effective_weight));
            requests.with_label_values(at).inc_by(backend.requests);
            for (outcome, count) in [
                ("answered", backend.answered),
                ("refused", backend.refused),
                ("timed_out", backend.timed_out),
                ("lost", backend.lost),
            ] {
                outcomes.with_label_values(&[&pool.name, &backend.id, outcome]).inc_by(count);
            }
        }
    }
    let table = gauge(&registry, "strowger_sessions", "Sessions in the table", &["class"]);
    for (class, count) in &sessions.classes {
        table.with_label_values(&[class]).set(*count as i64);
    }
    let totals = counter(
        &registry,
        "strowger_sessions_total",
        "Sessions, by what became of them",
        &["what"],
    );
    for (what, count) in [
        ("created", sessions.created),
        ("ended", sessions.ended),
        ("expired", sessions.expired),
        ("evicted", sessions.evicted),
        ("refused", sessions.refused),
    ] {
        totals.with_label_values(&[what]).inc_by(count);
    }
    registry
}

/// Answers' codes as their label writes them, by the first digit.
const CODES: [&str; 7] = ["other", "1xx", "2xx", "3xx", "4xx", "5xx", "6xx"];

/// Resolved handles that one listener and worker keep of a kind; backends come and go, and the
/// family keeps the series anyway.
const HANDLES_MAX: usize = 65_536;

fn bound<K, V>(handles: &mut HashMap<K, V>) {
    if handles.len() >= HANDLES_MAX {
        handles.clear();
    }
}

fn place(backend: Option<BackendId>, names: &dyn NameView) -> (&str, &str) {
    backend.and_then(|backend| names.backend(backend)).unwrap_or(("", ""))
}

/// Counters by words of the source, resolved when first used.
struct Words {
    family: IntCounterVec,
    bites: Arc<Bites>,
    known: Vec<(&'static str, IntCounter)>,
}

impl Words {
    fn new(family: &IntCounterVec, bites: &Arc<Bites>) -> Self {
        Self { family: family.clone(), bites: Arc::clone(bites), known: Vec::new() }
    }

    fn count(&mut self, listener: &str, word: &'static str) {
        // The same word is mostly the same text in the binary: the pointer tells.
        let known = self.known.iter().find(|(name, _)| std::ptr::eq(*name, word) || *name == word);
        if let Some((_, counter)) = known {
            return counter.inc();
        }
        self.bites.counted(listener, word);
        let word = if self.known.len() < WORDS_MAX { word } else { "other" };
        let counter = self.family.with_label_values(&[listener, word]);
        counter.inc();
        if self.known.len() < WORDS_MAX {
            self.known.push((word, counter));
        }
    }
}

/// What one class needs, resolved when first used.
struct ClassHandles {
    name: String,
    outcomes: HashMap<RequestOutcome, IntCounter>,
    seconds: Histogram,
}

/// The handles of one listener on one worker.
pub struct ListenerMetrics {
    name: String,
    bites: Arc<Bites>,
    received: IntCounter,
    received_bytes: IntCounter,
    sent: IntCounter,
    sent_bytes: IntCounter,
    connections: IntGauge,
    opened: IntCounter,
    rejected: IntCounter,
    engine_panics: IntCounter,
    handed_over: IntCounter,
    hand_over_dropped: IntCounter,
    requests: IntCounterVec,
    seconds: HistogramVec,
    backend_seconds: HistogramVec,
    refusals: IntCounterVec,
    drops: Words,
    retries: Words,
    counts: Words,
    answers: IntCounterVec,
    attempts: IntCounterVec,
    post_dial: HistogramVec,
    answer_handles: HashMap<(&'static str, u8, Option<BackendId>), IntCounter>,
    attempt_handles: HashMap<(AttemptOutcome, Option<BackendId>), IntCounter>,
    post_dial_handles: HashMap<Option<BackendId>, Histogram>,
    closed: Words,
    send_failures: Words,
    classes: HashMap<ClassId, ClassHandles>,
    pools: HashMap<BackendId, Histogram>,
}

impl ListenerMetrics {
    /// Messages and bytes came in.
    pub fn received(&self, messages: u64, bytes: u64) {
        self.received.inc_by(messages);
        self.received_bytes.inc_by(bytes);
    }

    /// Messages and bytes went out.
    pub fn sent(&self, messages: u64, bytes: u64) {
        self.sent.inc_by(messages);
        self.sent_bytes.inc_by(bytes);
    }

    /// Counts what an engine noted.
    pub fn note(&mut self, note: &Note, names: &dyn NameView) {
        match note {
            Note::Request { class, outcome, backend, total, at_backend } => {
                self.request(*class, *outcome, *total, names);
                if let Some(backend) = backend.filter(|_| !at_backend.is_zero()) {
                    self.at_backend(backend, *at_backend, names);
                }
            }
            Note::Refused(class, refusal) => {
                let labels = [self.name.as_str(), names.class(*class), refusal.word()];
                self.refusals.with_label_values(&labels).inc();
            }
            Note::Drop(why) => self.drops.count(&self.name, why),
            Note::Retry(why) => self.retries.count(&self.name, why),
            Note::Count(what) => self.counts.count(&self.name, what),
            Note::Answer { method, class, backend } => {
                self.answer(method, *class, *backend, names);
            }
            Note::Attempt { outcome, backend, post_dial } => {
                self.attempt(*outcome, *backend, *post_dial, names);
            }
            // Counted where it is logged; records go to their sinks.
            Note::Event { .. } | Note::Call(_) => {}
        }
    }

    fn answer(
        &mut self,
        method: &'static str,
        class: u8,
        backend: Option<BackendId>,
        names: &dyn NameView,
    ) {
        bound(&mut self.answer_handles);
        let (family, listener) = (&self.answers, self.name.as_str());
        let resolve = || {
            let (pool, name) = place(backend, names);
            let code = CODES.get(usize::from(class)).copied().unwrap_or("other");
            family.with_label_values(&[listener, method, code, pool, name])
        };
        self.answer_handles.entry((method, class, backend)).or_insert_with(resolve).inc();
    }

    fn attempt(
        &mut self,
        outcome: AttemptOutcome,
        backend: Option<BackendId>,
        post_dial: Option<Duration>,
        names: &dyn NameView,
    ) {
        bound(&mut self.attempt_handles);
        bound(&mut self.post_dial_handles);
        let (family, listener) = (&self.attempts, self.name.as_str());
        let resolve = || {
            let (pool, name) = place(backend, names);
            family.with_label_values(&[listener, pool, name, outcome.word()])
        };
        self.attempt_handles.entry((outcome, backend)).or_insert_with(resolve).inc();
        let Some(delay) = post_dial else { return };
        let family = &self.post_dial;
        let resolve = || family.with_label_values(&[listener, place(backend, names).0]);
        self.post_dial_handles.entry(backend).or_insert_with(resolve).observe(delay.as_secs_f64());
    }

    fn request(
        &mut self,
        class: ClassId,
        outcome: RequestOutcome,
        total: Duration,
        names: &dyn NameView,
    ) {
        let name = names.class(class);
        let (requests, seconds, listener) = (&self.requests, &self.seconds, self.name.as_str());
        let fresh = || ClassHandles {
            name: name.to_owned(),
            outcomes: HashMap::new(),
            seconds: seconds.with_label_values(&[listener, name]),
        };
        let handles = self.classes.entry(class).or_insert_with(fresh);
        if handles.name != name {
            // A reload gave the number to another class.
            *handles = fresh();
        }
        let resolve = || requests.with_label_values(&[listener, name, outcome.word()]);
        handles.outcomes.entry(outcome).or_insert_with(resolve).inc();
        handles.seconds.observe(total.as_secs_f64());
    }

    fn at_backend(&mut self, backend: BackendId, time: Duration, names: &dyn NameView) {
        const POOLS_MAX: usize = 65_536;
        if let Some(histogram) = self.pools.get(&backend) {
            return histogram.observe(time.as_secs_f64());
        }
        let Some((pool, _)) = names.backend(backend) else { return };
        let histogram = self.backend_seconds.with_label_values(&[pool]);
        histogram.observe(time.as_secs_f64());
        if self.pools.len() >= POOLS_MAX {
            self.pools.clear();
        }
        self.pools.insert(backend, histogram);
    }

    /// A client connected.
    pub fn connection_opened(&self) {
        self.opened.inc();
        self.connections.inc();
    }

    /// A client's connection ended.
    pub fn connection_closed(&mut self, cause: CloseCause) {
        self.connections.dec();
        self.closed.count(&self.name, cause.word());
    }

    /// A client's connection was over the limit.
    pub fn connection_rejected(&self) {
        self.rejected.inc();
        self.bites.bite(&self.name, "limits.connections");
    }

    /// Items went to other workers.
    pub fn handed_over(&self, count: u64) {
        self.handed_over.inc_by(count);
    }

    /// Items for other workers found their mailbox full.
    pub fn hand_over_dropped(&self, count: u64) {
        self.hand_over_dropped.inc_by(count);
        self.bites.bite(&self.name, "a worker's mailbox (MAILBOX_BYTES_MAX, MAILBOX_ITEMS_MAX)");
    }

    /// A message could not be sent.
    pub fn send_failed(&mut self, why: &'static str) {
        self.send_failures.count(&self.name, why);
    }

    /// A datagram was cut short.
    pub fn truncated(&mut self) {
        self.drops.count(&self.name, "truncated");
    }

    /// A peer's queue was full.
    pub fn queue_overflow(&mut self) {
        self.send_failures.count(&self.name, "queue_full");
    }

    /// The engine panicked.
    pub fn engine_panicked(&self) {
        self.engine_panics.inc();
    }
}

/// The handles of a worker.
#[derive(Clone)]
pub struct WorkerMetrics {
    lag: Histogram,
    worst_lag: Arc<AtomicU64>,
    panics: IntCounter,
    pauses: IntCounter,
}

impl WorkerMetrics {
    /// The worker came so late to its timer.
    pub fn loop_lag(&self, lag: Duration) {
        self.lag.observe(lag.as_secs_f64());
        let us = u64::try_from(lag.as_micros()).unwrap_or(u64::MAX);
        self.worst_lag.fetch_max(us, Ordering::Relaxed);
    }

    /// The worker lets messages gather.
    pub fn paused(&self) {
        self.pauses.inc();
    }

    /// The worker panicked.
    pub fn panicked(&self) {
        self.panics.inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Names;

    impl NameView for Names {
        fn class(&self, _: ClassId) -> &str {
            "setup"
        }

        fn backend(&self, _: BackendId) -> Option<(&str, &str)> {
            Some(("ims", "a"))
        }
    }

    #[test]
    fn what_is_noted_is_scraped() {
        let metrics = Metrics::new();
        let mut listener = metrics.listener("edge", "sip", WorkerId(0));
        listener.received(2, 100);
        listener.note(&Note::Drop("malformed"), &Names);
        let note = Note::Request {
            class: ClassId::SETUP,
            outcome: RequestOutcome::Met,
            backend: Some(BackendId(1)),
            total: Duration::from_millis(3),
            at_backend: Duration::from_millis(2),
        };
        listener.note(&note, &Names);
        let text = metrics.render();
        for line in [
            "strowger_messages_total{direction=\"in\",listener=\"edge\",protocol=\"sip\"} 2",
            "strowger_drops_total{listener=\"edge\",reason=\"malformed\"} 1",
            "strowger_requests_total{class=\"setup\",listener=\"edge\",outcome=\"met\"} 1",
            "strowger_backend_seconds_count{pool=\"ims\"} 1",
            "strowger_request_seconds_bucket{class=\"setup\",listener=\"edge\",le=\"0.005\"} 1",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        assert_eq!(metrics.requests(), [("setup".to_owned(), "met".to_owned(), 1)]);
    }
}
