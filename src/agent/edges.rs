//! The agent at the edges: registers, renews, drains, unregisters.
//!
//! It runs on a thread of its own, so that nothing else that the agent does can starve a lease. Each
//! (edge, pool, instance) has a task; it is told how the instance is to stand and makes it so, again and
//! again: an edge that was down, or forgot, learns it within a heartbeat of its return.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::{Notify, watch};

use super::http::{Ask, ask};
use super::manifest::EdgeAddress;
use super::supervisor::{Acked, View};
use crate::control::registry::{BeatReply, LeaseState, Registration};
use crate::routing::TlsClientSpec;
use crate::tls::{Client, Store};

/// How long an edge may take for an answer.
const ANSWER_TIME: Duration = Duration::from_secs(2);

/// How soon an edge that did not answer is asked again, at first and at most: within a heartbeat of the
/// default lease.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));

/// While sessions are waited out, the edge is asked so often.
const DRAIN_EVERY: Duration = Duration::from_millis(300);

/// How often files of certificates are looked at.
const FILES_EVERY: Duration = Duration::from_secs(5);

/// What an instance is at an edge's pool.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    pub(crate) app: String,
    pub(crate) id: String,
    pub(crate) edge: String,
    pub(crate) pool: String,
}

/// How long an edge is tried to be told that an instance is registered there no more.
const LEAVES_WITHIN: Duration = Duration::from_secs(60);

/// How it is to stand there.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stand {
    pub(crate) edge: EdgeAddress,
    pub(crate) generation: u64,
    /// `None`: gone.
    pub(crate) registration: Option<Registration>,
    /// How long its sessions may still take.
    pub(crate) drain_s: u64,
}

impl Stand {
    /// Whether an edge must be told at once.
    fn differs(&self, other: &Self) -> bool {
        (&self.edge, self.generation, &self.registration)
            != (&other.edge, other.generation, &other.registration)
    }
}

/// What an edge said.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    pub(crate) place: Place,
    pub(crate) view: View,
}

/// What edges said that the agent has not heard yet: of each place the newest. A loop that is busy with
/// something else (a release that is copied, a slow disk) finds no more than that, and nobody waits for it.
#[derive(Default)]
pub(crate) struct Reports {
    newest: Mutex<HashMap<Place, View>>,
    come: Notify,
}

impl Reports {
    fn tell(&self, place: &Place, view: &View) {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        newest.insert(place.clone(), view.clone());
        self.come.notify_one();
    }

    /// Waits for one or more.
    pub(crate) async fn next(&self) -> Vec<Report> {
        loop {
            let newest = {
                let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
                std::mem::take(&mut *newest)
            };
            if !newest.is_empty() {
                let reports = newest.into_iter();
                return reports.map(|(place, view)| Report { place, view }).collect();
            }
            self.come.notified().await;
        }
    }
}

/// All that is to stand somewhere.
pub(crate) type Wanted = HashMap<Place, Stand>;

/// The thread's handle.
pub(crate) struct Edges {
    wanted: watch::Sender<Arc<Wanted>>,
}

impl Edges {
    /// Starts the thread. It ends with its handle.
    pub(crate) fn start(clock: fn() -> u64) -> std::io::Result<(Self, Arc<Reports>)> {
        let (wanted, mut changes) = watch::channel(Arc::new(Wanted::new()));
        let reports = Arc::new(Reports::default());
        let told = Arc::clone(&reports);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name("edges".to_owned()).spawn(move || {
            runtime.block_on(async move {
                let mut tasks: HashMap<Place, watch::Sender<Stand>> = HashMap::new();
                let mut leaving: Vec<(Instant, Place, watch::Sender<Stand>)> = Vec::new();
                let tls = Arc::new(Store::default());
                let mut files = tokio::time::interval(FILES_EVERY);
                loop {
                    tokio::select! {
                        changed = changes.changed() => if changed.is_err() {
                            break;
                        },
                        _ = files.tick() => {
                            look_at_files(&tls);
                            leaving.retain(|(since, ..)| since.elapsed() < LEAVES_WITHIN);
                            continue;
                        }
                    }
                    let wanted = Arc::clone(&changes.borrow_and_update());
                    // What the manifest names no more is to leave, not only to be forgotten here.
                    let gone: Vec<Place> =
                        tasks.keys().filter(|place| !wanted.contains_key(place)).cloned().collect();
                    for place in gone {
                        if let Some(task) = tasks.remove(&place) {
                            task.send_modify(|stand| stand.registration = None);
                            leaving.push((Instant::now(), place, task));
                        }
                    }
                    for (place, stand) in wanted.iter() {
                        if let Some(at) = leaving.iter().position(|(_, left, _)| left == place) {
                            let (_, place, task) = leaving.swap_remove(at);
                            tasks.insert(place, task);
                        }
                        if let Some(task) = tasks.get(place) {
                            task.send_if_modified(|known| {
                                let differs = known.differs(stand);
                                known.clone_from(stand);
                                differs
                            });
                            continue;
                        }
                        let (sender, changes) = watch::channel(stand.clone());
                        let task = Task {
                            place: place.clone(),
                            changes,
                            reports: Arc::clone(&told),
                            clock,
                            tls: Arc::clone(&tls),
                            trusted: None,
                            told: None,
                            drained: None,
                            view: View::default(),
                        };
                        tokio::spawn(task.run());
                        tasks.insert(place.clone(), sender);
                    }
                }
            });
        })?;
        Ok((Self { wanted }, reports))
    }

    /// Says how all is to stand.
    pub(crate) fn want(&self, wanted: Wanted) {
        self.wanted.send_if_modified(|known| {
            let differs = **known != wanted;
            *known = Arc::new(wanted);
            differs
        });
    }
}

/// One instance at one edge's pool.
struct Task {
    place: Place,
    changes: watch::Receiver<Stand>,
    reports: Arc<Reports>,
    clock: fn() -> u64,
    tls: Arc<Store>,
    /// What TLS rests on, as long as the edge's address stays.
    trusted: Option<(Arc<TlsClientSpec>, Arc<Client>)>,
    /// What was last registered.
    told: Option<Registration>,
    /// The generation whose drain was ordered.
    drained: Option<u64>,
    view: View,
}

impl Task {
    async fn run(mut self) {
        let mut pause = RETRY.0;
        loop {
            let stand = self.changes.borrow_and_update().clone();
            let next = match self.tell(&stand).await {
                Ok(next) => {
                    pause = RETRY.0;
                    self.view.error = None;
                    self.view.heard = (self.clock)();
                    next
                }
                Err(error) => {
                    self.view.error = Some(error);
                    let next = pause;
                    pause = (pause * 2).min(RETRY.1);
                    Some(next)
                }
            };
            self.view.generation = stand.generation;
            self.reports.tell(&self.place, &self.view);
            let pause = async {
                match next {
                    Some(next) => tokio::time::sleep(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = self.changes.changed() => if changed.is_err() {
                    return;
                },
                () = pause => {}
            }
        }
    }

    /// Makes it so; when to look again.
    async fn tell(&mut self, stand: &Stand) -> Result<Option<Duration>, String> {
        if self.view.generation != stand.generation {
            self.view = View { error: self.view.error.take(), ..View::default() };
            self.told = None;
        }
        let Some(registration) = &stand.registration else {
            return self.leave(stand).await;
        };
        let fresh = self.told.as_ref().is_none_or(|told| !same_but_state(told, registration));
        if fresh {
            self.register(stand, registration).await?;
        }
        // It may have forgotten us; but not at once.
        let again = |status, text: &[u8]| {
            if fresh { Err(words(status, text)) } else { Ok(Some(Duration::ZERO)) }
        };
        let draining = registration.state == LeaseState::Draining;
        if draining && self.drained != Some(stand.generation) {
            let body = json!({ "deadline_s": stand.drain_s.max(1) });
            let (status, text) = self.ask(stand, "POST", "/drain", None, Some(body)).await?;
            match status {
                200..300 => self.drained = Some(stand.generation),
                404 => {
                    self.told = None;
                    return again(status, &text);
                }
                _ => return Err(words(status, &text)),
            }
        }
        let body = json!({ "state": registration.state });
        let (status, text) =
            self.ask(stand, "PATCH", "/lease", Some(stand.generation), Some(body)).await?;
        match status {
            200..300 => {}
            // It forgot us, or another generation is there: once more from the start.
            404 | 412 => {
                self.told = None;
                self.drained = None;
                self.view.acked = Acked::Nothing;
                return if status == 404 {
                    again(status, &text)
                } else {
                    Err(words(status, &text))
                };
            }
            _ => return Err(words(status, &text)),
        }
        let reply: BeatReply = serde_json::from_slice(&text)
            .map_err(|error| format!("a heartbeat's answer: {error}"))?;
        self.view.acked = Acked::State(registration.state);
        self.view.sessions = reply.sessions;
        self.view.miss_ppm = reply.deadline_miss_ppm;
        self.view.samples = reply.samples;
        self.view.p99_ms = reply.p99_ms;
        let next = Duration::from_millis(reply.next_ms.max(50));
        Ok(Some(if draining { next.min(DRAIN_EVERY) } else { next }))
    }

    async fn register(&mut self, stand: &Stand, registration: &Registration) -> Result<(), String> {
        let body = serde_json::to_value(registration).map_err(|error| error.to_string())?;
        // We started the process there: the address is its.
        let generation = Some(stand.generation);
        let (status, text) =
            self.ask(stand, "PUT", "?supersede=true", generation, Some(body)).await?;
        if !(200..300).contains(&status) {
            return Err(words(status, &text));
        }
        self.told = Some(registration.clone());
        if registration.state != LeaseState::Draining {
            self.drained = None;
        }
        Ok(())
    }

    async fn leave(&mut self, stand: &Stand) -> Result<Option<Duration>, String> {
        if self.view.acked == Acked::Gone {
            return Ok(None);
        }
        let generation = (stand.generation > 0).then_some(stand.generation);
        let (status, text) = self.ask(stand, "DELETE", "", generation, None).await?;
        match status {
            // 412: a later generation is there, so this one is gone.
            200..300 | 404 | 412 => {
                self.view = View { acked: Acked::Gone, ..View::default() };
                self.told = None;
                self.drained = None;
                Ok(None)
            }
            _ => Err(words(status, &text)),
        }
    }

    /// What TLS rests on: files that cannot be read yet are tried again with the next request.
    fn trust(&mut self, spec: Option<TlsClientSpec>) -> Result<(), String> {
        let Some(spec) = spec else {
            self.trusted = None;
            return Ok(());
        };
        if self.trusted.as_ref().is_none_or(|(known, _)| **known != spec) {
            let spec = Arc::new(spec);
            let client = self.tls.client(&spec)?;
            self.trusted = Some((spec, client));
        }
        Ok(())
    }

    async fn ask(
        &mut self,
        stand: &Stand,
        method: &'static str,
        what: &str,
        generation: Option<u64>,
        body: Option<Value>,
    ) -> Result<(u16, bytes::Bytes), String> {
        let (target, spec) = stand.edge.reach()?;
        self.trust(spec)?;
        let tls = self.trusted.as_ref().map(|(spec, client)| (&**spec, &**client));
        let token = match &stand.edge.token_file {
            Some(file) => Some(
                std::fs::read_to_string(file)
                    .map_err(|error| format!("{}: {error}", file.display()))?,
            ),
            None => None,
        };
        let path = format!("/api/v1/pools/{}/instances/{}{what}", self.place.pool, self.place.id);
        let question = Ask {
            method,
            path: &path,
            token: token.as_deref().map(str::trim),
            generation,
            body: body.map(|body| body.to_string()).unwrap_or_default(),
        };
        ask(&target, tls, &question, ANSWER_TIME).await
    }
}

/// Certificates that were replaced are used from the next request on.
fn look_at_files(tls: &Store) {
    for (files, outcome) in tls.refresh() {
        match outcome {
            Ok(()) => tracing::info!(files, "certificates_reloaded"),
            Err(error) => tracing::warn!(files, error, "certificates_not_reloaded"),
        }
    }
}

/// What differs only in its state is told by a heartbeat.
fn same_but_state(one: &Registration, two: &Registration) -> bool {
    let mut one = one.clone();
    one.state = two.state;
    one == *two
}

fn words(status: u16, text: &[u8]) -> String {
    let value: Value = serde_json::from_slice(text).unwrap_or(Value::Null);
    let part = |name: &str| value[name].as_str().unwrap_or_default().to_owned();
    format!("{status} {} {}", part("title"), part("detail")).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::routing::{patch, put};

    use super::*;
    use crate::agent::daemon::clock;

    /// Heartbeats until the agent's loop would have stood in the way.
    const BEATS: usize = 2_500;
    const PLACES: usize = 50;

    /// The agent's loop takes nothing at all, and leases are renewed all the same; then it hears of each
    /// place once.
    #[test]
    fn a_busy_agent_starves_no_lease() {
        static BEATEN: AtomicUsize = AtomicUsize::new(0);
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).enable_all().build().expect("a runtime");
        let beat = || async {
            let count = BEATEN.fetch_add(1, Ordering::Relaxed);
            axum::Json(json!({
                "ttl_ms": 9_000, "next_ms": 50, "router_id": "r", "epoch": 1, "sessions": count,
                "deadline_miss_ppm": 0, "samples": 0, "p99_ms": 0.0,
            }))
        };
        let app = axum::Router::new()
            .route("/api/v1/pools/{pool}/instances/{id}", put(|| async { "{}" }))
            .route("/api/v1/pools/{pool}/instances/{id}/lease", patch(beat));
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"));
        let listener = listener.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        runtime.spawn(async move { axum::serve(listener, app).await });
        let (edges, reports) = Edges::start(clock).expect("a thread");
        let edge: EdgeAddress = serde_json::from_value(json!({ "url": url })).expect("an edge");
        let registration = json!({
            "generation": 1, "lease_ttl_ms": 9_000, "state": "ready",
            "endpoints": [{ "protocol": "sip", "address": "udp://127.0.0.1:9" }],
        });
        let registration: Registration =
            serde_json::from_value(registration).expect("a registration");
        let stand = Stand { edge, generation: 1, registration: Some(registration), drain_s: 1 };
        let place = |number: usize| Place {
            app: "a".to_owned(),
            id: format!("a-{number}"),
            edge: url.clone(),
            pool: "p".to_owned(),
        };
        edges.want((0..PLACES).map(|number| (place(number), stand.clone())).collect());
        let end = Instant::now() + Duration::from_secs(120);
        while BEATEN.load(Ordering::Relaxed) < BEATS {
            assert!(Instant::now() < end, "{} heartbeats", BEATEN.load(Ordering::Relaxed));
            std::thread::sleep(Duration::from_millis(20));
        }
        let heard = runtime.block_on(reports.next());
        let mut ids: Vec<_> = heard.iter().map(|report| &report.place.id).collect();
        ids.sort();
        ids.dedup();
        assert_eq!((heard.len(), ids.len()), (PLACES, PLACES));
        let newest = heard.iter().map(|report| report.view.sessions).max();
        assert!(newest.is_some_and(|newest| newest as usize + 2 * PLACES > BEATS), "{newest:?}");
    }
}
