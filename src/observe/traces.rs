//! Traces on demand: what the tap's thread keeps, bounded in number, time and bytes.

use std::collections::VecDeque;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prometheus::IntCounterVec;
use serde_json::{Value, json};
use strowger_contract::Tracer;

use super::hep::{HepExport, HepSettings};
use super::pcap::{Packet, pcap};
use super::tap::{Capture, Direction, Tap};

/// Traces that run at a time: each looks at every message of its protocol.
pub const RUNNING_MAX: usize = 16;

/// Traces that are kept, ended ones included.
const KEPT_MAX: usize = 64;

/// Messages of one trace, at most.
const MESSAGES_MAX: usize = 20_000;

/// Bytes of one trace, at most; those of all kept ones stay under [`KEPT_MAX`] times that.
const BYTES_MAX: usize = 4 << 20;

/// How long an ended trace is kept.
const KEPT_FOR: Duration = Duration::from_secs(3_600);

/// The longest that a trace may run.
pub const LONGEST: Duration = Duration::from_secs(3_600);

/// How often the thread looks at the time when nothing comes.
const IDLE_TURN: Duration = Duration::from_millis(200);

/// What the cold side knows of a protocol.
pub struct TraceProtocol {
    /// Its name.
    pub name: &'static str,
    /// [`strowger_contract::Protocol::conversation`].
    pub conversation: fn(&[u8]) -> Option<&[u8]>,
    /// [`strowger_contract::Protocol::describe`].
    pub describe: fn(&[u8]) -> String,
}

struct Trace {
    id: u64,
    protocol: &'static str,
    bit: u32,
    key: String,
    started: SystemTime,
    until: Instant,
    /// `None` once it has ended.
    tracer: Option<Box<dyn Tracer>>,
    messages: Vec<Capture>,
    bytes: usize,
    /// Messages that no longer fitted.
    missed: u64,
}

struct Table {
    next: u64,
    traces: VecDeque<Trace>,
    export: Option<HepExport>,
}

/// All traces of the node, and the exporter.
pub struct Traces {
    tap: Arc<Tap>,
    protocols: Vec<TraceProtocol>,
    table: Mutex<Table>,
    /// Turns a time of the clock into one of the calendar.
    origin: (Instant, SystemTime),
    exported: IntCounterVec,
}

/// Why a trace was not started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TraceError {
    /// [`RUNNING_MAX`] run already.
    TooMany,
}

impl Traces {
    /// Starts the tap's thread. `exported` counts by outcome.
    #[must_use]
    pub fn start(
        tap: &Arc<Tap>,
        protocols: Vec<TraceProtocol>,
        exported: IntCounterVec,
    ) -> Arc<Self> {
        let table = Table { next: 1, traces: VecDeque::new(), export: None };
        let traces = Arc::new(Self {
            tap: Arc::clone(tap),
            protocols,
            table: Mutex::new(table),
            origin: (Instant::now(), SystemTime::now()),
            exported,
        });
        let weak = Arc::downgrade(&traces);
        if let Some(receiver) = tap.take_receiver() {
            let tap = Arc::clone(tap);
            let work = move || {
                loop {
                    let capture = match receiver.recv_timeout(IDLE_TURN) {
                        Ok(capture) => Some(capture),
                        Err(RecvTimeoutError::Timeout) => None,
                        Err(RecvTimeoutError::Disconnected) => return,
                    };
                    let Some(traces) = Weak::upgrade(&weak) else { return };
                    if let Some(capture) = capture {
                        tap.took(capture.bytes.len());
                        traces.take(capture);
                    } else {
                        traces.expire(Instant::now());
                    }
                }
            };
            // Without the thread nothing is traced, and the queue counts what it loses.
            let _thread = std::thread::Builder::new().name("tap".to_owned()).spawn(work);
        }
        traces
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, capture: Capture) {
        let mut table = self.table();
        let protocol =
            self.protocols.iter().find(|known| self.tap.bit(known.name) == capture.protocol);
        if let Some(export) = &mut table.export
            && let Some(protocol) = protocol.filter(|known| known.name == "sip")
        {
            let conversation = (protocol.conversation)(&capture.bytes);
            if export.samples(conversation) {
                let sent = export.send(&self.packet(&capture), conversation);
                let word = if sent { "sent" } else { "failed" };
                self.exported.with_label_values(&[word]).inc();
            }
        }
        let mut ended = false;
        for trace in &mut table.traces {
            let Some(tracer) = &mut trace.tracer else { continue };
            if capture.at >= trace.until {
                (trace.tracer, ended) = (None, true);
                continue;
            }
            if trace.bit != capture.protocol || !tracer.wants(&capture.bytes) {
                continue;
            }
            let full = trace.messages.len() >= MESSAGES_MAX
                || trace.bytes + capture.bytes.len() > BYTES_MAX;
            if full {
                trace.missed += 1;
                continue;
            }
            trace.bytes += capture.bytes.len();
            trace.messages.push(capture.clone());
        }
        if ended {
            self.want(&table);
        }
    }

    /// Ends what has run its time and forgets what was kept long enough.
    fn expire(&self, now: Instant) {
        let mut table = self.table();
        for trace in &mut table.traces {
            if trace.until <= now {
                trace.tracer = None;
            }
        }
        table.traces.retain(|trace| now.saturating_duration_since(trace.until) < KEPT_FOR);
        self.want(&table);
    }

    fn want(&self, table: &Table) {
        let running = table.traces.iter().filter(|trace| trace.tracer.is_some());
        let export = if table.export.is_some() { self.tap.bit("sip") } else { 0 };
        self.tap.want(running.fold(export, |bits, trace| bits | trace.bit));
    }

    /// Exports to another collector, or to none.
    pub fn set_export(&self, settings: Option<HepSettings>) {
        let mut table = self.table();
        if table.export.as_ref().map(HepExport::settings) != settings.as_ref() {
            table.export = settings.map(HepExport::new);
        }
        self.want(&table);
    }

    /// Starts a trace; its number.
    ///
    /// # Errors
    /// Too many run.
    pub fn add(
        &self,
        protocol: &'static str,
        key: &str,
        tracer: Box<dyn Tracer>,
        duration: Duration,
    ) -> Result<u64, TraceError> {
        let mut table = self.table();
        if table.traces.iter().filter(|trace| trace.tracer.is_some()).count() >= RUNNING_MAX {
            return Err(TraceError::TooMany);
        }
        if table.traces.len() >= KEPT_MAX {
            let oldest = table.traces.iter().position(|trace| trace.tracer.is_none());
            table.traces.remove(oldest.unwrap_or(0));
        }
        let id = table.next;
        table.next += 1;
        table.traces.push_back(Trace {
            id,
            protocol,
            bit: self.tap.bit(protocol),
            key: key.to_owned(),
            started: SystemTime::now(),
            until: Instant::now() + duration.min(LONGEST),
            tracer: Some(tracer),
            messages: Vec::new(),
            bytes: 0,
            missed: 0,
        });
        self.want(&table);
        Ok(id)
    }

    /// Ends a trace and keeps what it has; whether there was one.
    pub fn end(&self, id: u64) -> bool {
        let mut table = self.table();
        let now = Instant::now();
        let Some(trace) = table.traces.iter_mut().find(|trace| trace.id == id) else {
            return false;
        };
        trace.tracer = None;
        trace.until = trace.until.min(now);
        self.want(&table);
        true
    }

    /// All traces, newest last.
    #[must_use]
    pub fn list(&self) -> Vec<Value> {
        self.table().traces.iter().map(|trace| self.view(trace)).collect()
    }

    fn view(&self, trace: &Trace) -> Value {
        let left = trace.until.saturating_duration_since(Instant::now());
        json!({
            "id": trace.id,
            "protocol": trace.protocol,
            "key": trace.key,
            "started_ms": millis(trace.started),
            "running": trace.tracer.is_some() && !left.is_zero(),
            "left_s": left.as_secs(),
            "messages": trace.messages.len(),
            "bytes": trace.bytes,
            "missed": trace.missed,
        })
    }

    /// One trace with its messages in a line each, from number `after` on.
    #[must_use]
    pub fn ladder(&self, id: u64, after: usize) -> Option<Value> {
        let table = self.table();
        let trace = table.traces.iter().find(|trace| trace.id == id)?;
        let protocol = self.protocols.iter().find(|known| known.name == trace.protocol)?;
        let messages = trace.messages.iter().enumerate().skip(after).take(1_000);
        let ladder: Vec<Value> = messages
            .map(|(number, capture)| {
                json!({
                    "number": number,
                    "time_us": self.micros(capture.at),
                    "listener": &*capture.listener,
                    "direction": if capture.direction == Direction::In { "in" } else { "out" },
                    "transport": capture.transport.scheme(),
                    "from": capture.from.to_string(),
                    "to": capture.to.to_string(),
                    "bytes": capture.bytes.len(),
                    "what": (protocol.describe)(&capture.bytes),
                })
            })
            .collect();
        let mut view = self.view(trace);
        view["ladder"] = Value::Array(ladder);
        Some(view)
    }

    /// One trace as a pcap.
    #[must_use]
    pub fn pcap(&self, id: u64) -> Option<Vec<u8>> {
        let table = self.table();
        let trace = table.traces.iter().find(|trace| trace.id == id)?;
        Some(pcap(trace.messages.iter().map(|capture| self.packet(capture))))
    }

    fn packet<'a>(&self, capture: &'a Capture) -> Packet<'a> {
        let Capture { at, transport, from, to, bytes, .. } = capture;
        let time_us = self.micros(*at);
        Packet { time_us, transport: *transport, from: *from, to: *to, bytes }
    }

    fn micros(&self, at: Instant) -> u64 {
        let (clock, calendar) = self.origin;
        let since_1970 = calendar.duration_since(UNIX_EPOCH).unwrap_or_default();
        (since_1970 + at.saturating_duration_since(clock)).as_micros() as u64
    }
}

fn millis(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}
