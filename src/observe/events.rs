//! Events: one log line, one counter, one place in the ring, one message to whoever listens.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use strowger_contract::Level;
use tokio::sync::broadcast;

use super::metrics::Metrics;

/// Events that a late subscriber still gets.
const RING: usize = 1_000;

/// Lines of one kind in a second; the rest is counted and summed up in one line.
const LINES_PER_SECOND: u32 = 20;

/// Events that a slow subscriber may lag behind before it loses some.
const SUBSCRIBER_LAG: usize = 1_024;

/// Something that happened.
#[derive(Clone, Debug, Serialize)]
pub struct Event {
    /// Counts up.
    pub id: u64,
    /// Milliseconds since 1970.
    pub time_ms: u64,
    /// `debug`, `info` or `warn`.
    pub level: &'static str,
    /// Its name, `snake_case`.
    pub kind: String,
    /// The listener, if it is one's.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub listener: String,
    /// The pool, if it is one's.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub pool: String,
    /// The instance, if it is one's.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub instance: String,
    /// What happened.
    pub detail: String,
}

impl Event {
    /// An event of an engine or of the runtime.
    #[must_use]
    pub fn engine(level: Level, listener: &str, kind: &str, detail: String) -> Self {
        Self {
            id: 0,
            time_ms: 0,
            level: word(level),
            kind: kind.to_owned(),
            listener: listener.to_owned(),
            pool: String::new(),
            instance: String::new(),
            detail,
        }
    }

    /// An event of the node.
    #[must_use]
    pub fn node(level: Level, kind: &str, detail: String) -> Self {
        Self::engine(level, "", kind, detail)
    }

    /// An event of a pool or a backend.
    #[must_use]
    pub fn pool(level: Level, kind: &str, pool: &str, instance: &str, detail: String) -> Self {
        Self {
            pool: pool.to_owned(),
            instance: instance.to_owned(),
            ..Self::engine(level, "", kind, detail)
        }
    }
}

fn word(level: Level) -> &'static str {
    match level {
        Level::Debug => "debug",
        Level::Info => "info",
        Level::Warn => "warn",
    }
}

/// Takes events in.
#[derive(Debug)]
pub struct Events {
    metrics: Arc<Metrics>,
    inner: Mutex<Inner>,
    sender: broadcast::Sender<Arc<Event>>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    ring: VecDeque<Arc<Event>>,
    rates: HashMap<String, Rate>,
}

#[derive(Debug)]
struct Rate {
    since: Instant,
    lines: u32,
    hidden: u32,
}

/// What was, and what is to come.
#[derive(Debug)]
pub struct Subscription {
    /// Events after the one asked for, as far as they are kept.
    pub past: Vec<Arc<Event>>,
    /// Events from now on.
    pub future: broadcast::Receiver<Arc<Event>>,
}

impl Events {
    /// `metrics` counts them.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Arc<Self> {
        let (sender, _) = broadcast::channel(SUBSCRIBER_LAG);
        Arc::new(Self { metrics, inner: Mutex::default(), sender })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts, logs, keeps and passes on an event.
    pub fn emit(&self, mut event: Event) {
        self.metrics.event(&event.listener, &event.kind);
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        event.time_ms = time.as_millis() as u64;
        let mut inner = self.inner();
        inner.next += 1;
        event.id = inner.next;
        let hidden = inner.rate(&event.kind, Instant::now());
        let event = Arc::new(event);
        if inner.ring.len() == RING {
            inner.ring.pop_front();
        }
        inner.ring.push_back(Arc::clone(&event));
        drop(inner);
        if let Some(hidden) = hidden {
            write_line(&event, hidden);
        }
        // Nobody need listen.
        let _nobody = self.sender.send(event);
    }

    /// The events after number `after`.
    #[must_use]
    pub fn subscribe(&self, after: u64) -> Subscription {
        let inner = self.inner();
        let past = inner.ring.iter().filter(|event| event.id > after).cloned().collect();
        Subscription { past, future: self.sender.subscribe() }
    }

    /// The newest events, newest first.
    #[must_use]
    pub fn latest(&self, count: usize) -> Vec<Arc<Event>> {
        self.inner().ring.iter().rev().take(count).cloned().collect()
    }
}

impl Inner {
    /// Whether an event of this kind gets a line now, and how many before it did not.
    fn rate(&mut self, kind: &str, now: Instant) -> Option<u32> {
        const KINDS_MAX: usize = 1_000;
        if !self.rates.contains_key(kind) {
            if self.rates.len() >= KINDS_MAX {
                return None;
            }
            self.rates.insert(kind.to_owned(), Rate { since: now, lines: 0, hidden: 0 });
        }
        let rate = self.rates.get_mut(kind)?;
        if now.saturating_duration_since(rate.since) >= Duration::from_secs(1) {
            (rate.since, rate.lines) = (now, 0);
        }
        rate.lines += 1;
        if rate.lines > LINES_PER_SECOND {
            rate.hidden += 1;
            return None;
        }
        Some(std::mem::take(&mut rate.hidden))
    }
}

fn write_line(event: &Event, hidden: u32) {
    let Event { kind, listener, pool, instance, detail, level, .. } = event;
    macro_rules! line {
        ($level:ident) => {
            tracing::$level!(target: "strowger", kind, listener, pool, instance, hidden, "{detail}")
        };
    }
    match *level {
        "warn" => line!(warn),
        "info" => line!(info),
        _ => line!(debug),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_are_summed_up_and_the_ring_is_bounded() {
        let mut inner = Inner::default();
        let now = Instant::now();
        let lines = (0..100).filter(|_| inner.rate("x", now).is_some()).count();
        assert_eq!(lines, LINES_PER_SECOND as usize);
        assert_eq!(inner.rate("x", now + Duration::from_secs(1)), Some(100 - LINES_PER_SECOND));
        let events = Events::new(Metrics::new());
        for index in 0..RING + 10 {
            events.emit(Event::node(Level::Debug, "x", index.to_string()));
        }
        let subscription = events.subscribe(RING as u64);
        assert_eq!(subscription.past.len(), 10);
        assert_eq!(events.subscribe(0).past.len(), RING);
    }
}
