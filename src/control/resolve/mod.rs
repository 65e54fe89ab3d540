//! Where names lead: RFC 3263 behind a bounded cache, on a thread of its own.
//!
//! | module | what it does |
//! |---|---|
//! | `ask` | one record type of one name, by hickory-resolver |
//! | `rfc3263` | which records are asked for, in which order |
//! | `discover` | all instances under a name, for pools |
//! | `order` | the order in which what was found is tried |
//! | this | the cache, the questions under way, and the bounds of both |
//!
//! A worker asks [`Resolver::known`], which looks into the cache, and else [`Resolver::ask`], which
//! enters the question and returns. Questions for the same name wait for one answer. A name server
//! that never answers costs those who asked for its names, and only so long.

mod ask;
mod discover;
mod order;
mod rfc3263;

use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use hashbrown::{Equivalent, HashMap};
use strowger_contract::{Level, Lookup, Unresolved};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use crate::observe::{DnsMetrics, Event, Events};
use crate::runtime::{Answer, Reply, Resolver};
use ask::{Miss, Servers};
pub use discover::{Discovered, Discovery};
use order::Found;

/// Questions that wait or are asked, at most; then newcomers hear that it is busy.
const QUESTIONS_MAX: usize = 4_096;

/// Who waits for one answer, at most.
const WAITERS_MAX: usize = 1_024;

/// What is found holds at least so long: a TTL of 0 must not make every message a question.
const TTL_MIN: Duration = Duration::from_secs(1);

/// What was found last is used again for so long while no name server answers (RFC 8767 5).
const STALE_STEP: Duration = Duration::from_secs(30);

/// How names are looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsSettings {
    /// Name servers; none: those of `/etc/resolv.conf`.
    pub servers: Vec<SocketAddr>,
    /// How long one server has for one question.
    pub query_timeout: Duration,
    /// How long a name may take in all: NAPTR, SRV, addresses, repeats.
    pub timeout: Duration,
    /// Names that are remembered.
    pub cache: usize,
    /// Names that are looked up at a time.
    pub concurrent: usize,
    /// What is found is believed so long at most.
    pub ttl_max: Duration,
    /// How long after its time the last answer serves while no name server answers. Zero: not.
    pub stale: Duration,
}

impl Default for DnsSettings {
    fn default() -> Self {
        Self {
            servers: Vec::new(),
            query_timeout: Duration::from_secs(1),
            timeout: Duration::from_secs(5),
            cache: 4_096,
            concurrent: 256,
            ttl_max: Duration::from_secs(3_600),
            stale: Duration::from_secs(3_600),
        }
    }
}

/// A question, whoever asks it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    host: Box<[u8]>,
    /// With the seed 0.
    lookup: Lookup,
}

/// The same, borrowed.
#[derive(Hash)]
struct KeyRef<'a> {
    host: &'a [u8],
    lookup: Lookup,
}

impl Equivalent<Key> for KeyRef<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        self.host == &*key.host && self.lookup == key.lookup
    }
}

struct Cached {
    result: Result<Arc<Found>, Unresolved>,
    until: Instant,
    /// What was found last, and until when that serves if nobody answers.
    last: Option<(Arc<Found>, Instant)>,
}

struct Waiter {
    seed: u64,
    reply: Reply,
}

#[derive(Default)]
struct State {
    cache: HashMap<Key, Cached>,
    waiting: std::collections::HashMap<Key, Vec<Waiter>>,
    /// Whether name servers answered when last asked.
    silent: bool,
}

/// Finds where names lead.
pub struct Names {
    state: Mutex<State>,
    settings: ArcSwap<DnsSettings>,
    servers: ArcSwap<Result<Servers, String>>,
    questions: mpsc::Sender<(Key, Instant)>,
    metrics: DnsMetrics,
    events: Arc<Events>,
    stop: CancellationToken,
}

impl Drop for Names {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Names {
    /// Starts the thread. It ends when the last handle is dropped.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(metrics: DnsMetrics, events: Arc<Events>) -> std::io::Result<Arc<Self>> {
        let settings = DnsSettings::default();
        let (questions, mut asked) = mpsc::channel(QUESTIONS_MAX);
        let stop = CancellationToken::new();
        let names = Arc::new(Self {
            state: Mutex::default(),
            servers: ArcSwap::from_pointee(Servers::new(&settings)),
            settings: ArcSwap::from_pointee(settings),
            questions,
            metrics,
            events,
            stop: stop.clone(),
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let weak = Arc::downgrade(&names);
        std::thread::Builder::new().name("resolver".to_owned()).spawn(move || {
            runtime.block_on(async {
                let permits = Arc::new(Semaphore::new(0));
                let mut allowed = 0;
                loop {
                    let question = tokio::select! {
                        () = stop.cancelled() => return,
                        question = asked.recv() => question,
                    };
                    let Some((key, since)) = question else { return };
                    let Some(names) = weak.upgrade() else { return };
                    let wanted = names.settings.load().concurrent;
                    if wanted > allowed {
                        permits.add_permits(wanted - allowed);
                    } else {
                        permits.forget_permits(allowed - wanted);
                    }
                    allowed = wanted;
                    drop(names);
                    let permit = tokio::select! {
                        () = stop.cancelled() => return,
                        permit = Arc::clone(&permits).acquire_owned() => permit,
                    };
                    let weak = weak.clone();
                    tokio::spawn(async move {
                        let _permit = permit;
                        if let Some(names) = weak.upgrade() {
                            names.look_up(key, since).await;
                        }
                    });
                }
            });
        })?;
        Ok(names)
    }

    /// Takes other settings; what is known stays known.
    pub fn configure(&self, settings: &DnsSettings) {
        if **self.settings.load() == *settings {
            return;
        }
        let servers = Servers::new(settings);
        if let Err(error) = &servers {
            let detail = format!("names are not looked up: {error}");
            self.events.emit(Event::node(Level::Warn, "dns_unusable", detail));
        }
        self.servers.store(Arc::new(servers));
        self.settings.store(Arc::new(settings.clone()));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Names that are remembered now.
    #[must_use]
    pub fn remembered(&self) -> usize {
        self.state().cache.len()
    }

    async fn look_up(&self, key: Key, since: Instant) {
        let settings = self.settings.load_full();
        let servers = self.servers.load_full();
        let silent = || Miss::Silent { until: Instant::now() + ask::SILENCE };
        let left = settings.timeout.saturating_sub(since.elapsed());
        let result = match (&*servers, rfc3263::name_of(&key.host)) {
            (_, Err(why)) => Err((why, Instant::now() + ask::NEGATIVE_MAX)),
            (Err(_), _) => Err((Unresolved::NoAnswer, Instant::now() + ask::SILENCE)),
            (Ok(servers), Ok(name)) => {
                let walk = rfc3263::find(servers, &name, &key.lookup);
                let found = tokio::time::timeout(left, walk).await;
                found.unwrap_or_else(|_| Err(silent())).map_err(|miss| match miss {
                    Miss::Absent { until } => (Unresolved::NoSuchName, until),
                    Miss::Silent { until } => (Unresolved::NoAnswer, until),
                })
            }
        };
        self.metrics.seconds(since.elapsed());
        self.settle(key, result, &settings);
    }

    /// Remembers what was heard, and tells those who wait.
    fn settle(
        &self,
        key: Key,
        result: Result<Found, (Unresolved, Instant)>,
        settings: &DnsSettings,
    ) {
        let now = Instant::now();
        let mut state = self.state();
        let last = state.cache.get(&key).and_then(|known| known.last.clone());
        let silent = matches!(result, Err((Unresolved::NoAnswer, _)));
        let cached = match result {
            Ok(found) => {
                let until = found.until.clamp(now + TTL_MIN, now + settings.ttl_max);
                let found = Arc::new(found);
                let last = Some((Arc::clone(&found), until + settings.stale));
                Cached { result: Ok(found), until, last }
            }
            Err((Unresolved::NoAnswer, until)) => match last.filter(|(_, serves)| *serves > now) {
                Some((found, serves)) => {
                    self.metrics.count("stale");
                    let until = serves.min(now + STALE_STEP);
                    let last = Some((Arc::clone(&found), serves));
                    Cached { result: Ok(found), until, last }
                }
                None => Cached { result: Err(Unresolved::NoAnswer), until, last: None },
            },
            Err((why, until)) => Cached { result: Err(why), until, last: None },
        };
        let result = cached.result.clone();
        make_room(&mut state.cache, settings.cache, now);
        let waiters = state.waiting.remove(&key).unwrap_or_default();
        state.cache.insert(key, cached);
        let turned = std::mem::replace(&mut state.silent, silent) != silent;
        self.metrics.cached(state.cache.len());
        drop(state);
        self.metrics.count(result.as_ref().map_or_else(|why| why.word(), |_| "found"));
        if turned {
            self.tell_turn(silent);
        }
        for Waiter { seed, reply } in waiters {
            reply(result.as_ref().map(|found| found.places(seed)).map_err(|why| *why));
        }
    }

    fn tell_turn(&self, silent: bool) {
        let event = if silent {
            let detail = "a name server did not answer; names known before keep their last answer";
            Event::node(Level::Warn, "dns_silent", detail.to_owned())
        } else {
            Event::node(Level::Info, "dns_answers", "name servers answer again".to_owned())
        };
        self.events.emit(event);
    }
}

/// Room for one more: what has run out goes, else whatever comes first (the order is random).
fn make_room(cache: &mut HashMap<Key, Cached>, most: usize, now: Instant) {
    if cache.len() < most {
        return;
    }
    cache.retain(|_, known| {
        known.until > now || known.last.as_ref().is_some_and(|(_, serves)| *serves > now)
    });
    while cache.len() >= most.max(1) {
        let Some(any) = cache.keys().next().cloned() else { return };
        cache.remove(&any);
    }
}

/// A name in lower case without a dot at its end, in `buffer`.
fn plain<'a>(host: &[u8], buffer: &'a mut [u8; 256]) -> Option<&'a [u8]> {
    let host = host.strip_suffix(b".").unwrap_or(host);
    let place = buffer.get_mut(..host.len())?;
    place.copy_from_slice(host);
    place.make_ascii_lowercase();
    Some(place)
}

impl Resolver for Names {
    fn known(&self, host: &[u8], lookup: &Lookup) -> Option<Answer> {
        let mut buffer = [0; 256];
        let Some(host) = plain(host, &mut buffer) else { return Some(Err(Unresolved::Malformed)) };
        let key = KeyRef { host, lookup: Lookup { seed: 0, ..*lookup } };
        let state = self.state();
        let cached = state.cache.get(&key).filter(|known| known.until > Instant::now())?;
        self.metrics.count("known");
        Some(match &cached.result {
            Ok(found) => Ok(found.places(lookup.seed)),
            Err(why) => Err(*why),
        })
    }

    fn ask(&self, host: &[u8], lookup: &Lookup, reply: Reply) {
        let mut buffer = [0; 256];
        let Some(host) = plain(host, &mut buffer) else {
            return reply(Err(Unresolved::Malformed));
        };
        let key = Key { host: host.into(), lookup: Lookup { seed: 0, ..*lookup } };
        let waiter = Waiter { seed: lookup.seed, reply };
        let mut state = self.state();
        let full = state.waiting.len() >= QUESTIONS_MAX;
        let refused = match state.waiting.entry(key.clone()) {
            Entry::Occupied(mut entry) if entry.get().len() < WAITERS_MAX => {
                entry.get_mut().push(waiter);
                None
            }
            Entry::Vacant(entry) if !full => match self.questions.try_send((key, Instant::now())) {
                Ok(()) => {
                    entry.insert(vec![waiter]);
                    None
                }
                Err(_) => Some(waiter),
            },
            _ => Some(waiter),
        };
        drop(state);
        if let Some(waiter) = refused {
            self.metrics.count(Unresolved::Busy.word());
            (waiter.reply)(Err(Unresolved::Busy));
        }
    }
}

#[cfg(test)]
mod tests;
