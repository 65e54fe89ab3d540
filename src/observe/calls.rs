//! Calls: the list of live ones, and a record of each that ended, as JSON lines.
//!
//! Workers put records into a bounded queue; what finds it full is lost and counted. A thread of
//! its own keeps the list and writes the file, so a slow disk costs records and never a call.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prometheus::{IntCounterVec, IntGauge};
use serde_json::{Value, json};
use strowger_contract::{CallPhase, CallRecord};

/// Records that wait for the thread, at most: some seconds of a busy node.
const QUEUE_MAX: usize = 65_536;

/// Live calls that are listed, at most; more are counted only. Each takes about half a KiB.
const LIVE_MAX: usize = 500_000;

/// How often the thread looks at the time when nothing comes, and how long a written record may
/// wait in memory.
const IDLE_TURN: Duration = Duration::from_millis(200);

/// How soon a file that could not be opened is tried again.
const OPEN_AGAIN: Duration = Duration::from_secs(5);

/// Where records go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CdrSettings {
    /// The file.
    pub file: PathBuf,
    /// It is put aside when it has grown beyond so many bytes.
    pub max_bytes: u64,
    /// So many are kept aside: `file.1` is the newest.
    pub keep: u32,
}

/// A record, and the names of what it tells.
#[derive(Clone, Debug)]
pub struct Told {
    /// The record.
    pub record: Box<CallRecord>,
    /// The listener.
    pub listener: Box<str>,
    /// Pool and instance, if it came so far.
    pub instance: Option<(Box<str>, Box<str>)>,
}

/// All calls of the node.
pub struct Calls {
    sender: SyncSender<Told>,
    lost: AtomicU64,
    outcomes: IntCounterVec,
    gauge: IntGauge,
    live: Mutex<HashMap<(Box<str>, u64), Told>>,
    settings: Mutex<Option<CdrSettings>>,
    changed: AtomicBool,
    origin: (Instant, SystemTime),
}

impl Calls {
    /// Starts the thread. `outcomes` counts records, `gauge` shows the live ones.
    #[must_use]
    pub fn start(outcomes: IntCounterVec, gauge: IntGauge) -> Arc<Self> {
        let (sender, receiver) = sync_channel(QUEUE_MAX);
        let calls = Arc::new(Self {
            sender,
            lost: AtomicU64::new(0),
            outcomes,
            gauge,
            live: Mutex::default(),
            settings: Mutex::default(),
            changed: AtomicBool::new(false),
            origin: (Instant::now(), SystemTime::now()),
        });
        let weak = Arc::downgrade(&calls);
        let work = move || {
            let mut sink = None;
            while let Some(calls) = weak.upgrade() {
                if calls.turn(&receiver, &mut sink) {
                    return;
                }
            }
        };
        // Without the thread the queue fills, and what is lost is counted.
        let _thread = std::thread::Builder::new().name("calls".to_owned()).spawn(work);
        calls
    }

    /// Takes a record, unless the queue is full.
    pub fn put(&self, told: Told) {
        if self.sender.try_send(told).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
            self.outcomes.with_label_values(&["lost"]).inc();
        }
    }

    /// Writes records elsewhere, or nowhere.
    pub fn set(&self, settings: Option<CdrSettings>) {
        let mut held = self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        if *held != settings {
            *held = settings;
            self.changed.store(true, Ordering::Release);
        }
    }

    /// Opens the file anew: somebody else may have moved it away.
    pub fn reopen(&self) {
        self.changed.store(true, Ordering::Release);
    }

    fn live(&self) -> MutexGuard<'_, HashMap<(Box<str>, u64), Told>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One turn of the thread; whether the node has ended.
    fn turn(&self, receiver: &Receiver<Told>, sink: &mut Option<Sink>) -> bool {
        if self.changed.swap(false, Ordering::Acquire) {
            if let Some(old) = sink {
                old.flush(&self.outcomes);
            }
            let settings = self.settings.lock().unwrap_or_else(PoisonError::into_inner).clone();
            *sink = settings.map(Sink::new);
        }
        match receiver.recv_timeout(IDLE_TURN) {
            Ok(told) => {
                self.take(told, sink);
                for told in receiver.try_iter().take(1_000) {
                    self.take(told, sink);
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                if let Some(sink) = sink {
                    sink.flush(&self.outcomes);
                }
            }
            Err(RecvTimeoutError::Disconnected) => return true,
        }
        if let Some(sink) = sink
            && sink.flushed.elapsed() >= IDLE_TURN
        {
            sink.flush(&self.outcomes);
        }
        false
    }

    fn take(&self, told: Told, sink: &mut Option<Sink>) {
        let key = (told.listener.clone(), told.record.id);
        let mut live = self.live();
        if told.record.phase == CallPhase::Ended {
            live.remove(&key);
            self.gauge.set(live.len() as i64);
            drop(live);
            if let Some(sink) = sink {
                let line = self.view(&told);
                sink.write(&line, &self.outcomes);
            }
        } else if live.len() < LIVE_MAX || live.contains_key(&key) {
            live.insert(key, told);
            self.gauge.set(live.len() as i64);
        } else {
            self.outcomes.with_label_values(&["unlisted"]).inc();
        }
    }

    /// Whether a record was ever lost because too many waited.
    #[must_use]
    pub fn has_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed) > 0
    }

    /// Live calls of a pool and an instance, the longest first, at most `limit`; and how many in all.
    #[must_use]
    pub fn list(&self, pool: Option<&str>, instance: Option<&str>, limit: usize) -> Value {
        let live = self.live();
        let fits = |told: &&Told| {
            let at = told.instance.as_ref();
            let is =
                |wanted: Option<&str>, found: Option<&str>| wanted.is_none() || wanted == found;
            is(pool, at.map(|(pool, _)| &**pool))
                && is(instance, at.map(|(_, instance)| &**instance))
        };
        let mut found: Vec<&Told> = live.values().filter(fits).collect();
        let total = found.len();
        found.sort_by_key(|told| told.record.began);
        let calls: Vec<Value> = found.into_iter().take(limit).map(|told| self.view(told)).collect();
        json!({ "live": total, "calls": calls, "lost": self.lost.load(Ordering::Relaxed) })
    }

    /// A record as JSON; times of the calendar with microseconds, in UTC.
    fn view(&self, told: &Told) -> Value {
        let record = &told.record;
        let (clock, calendar) = self.origin;
        let since_1970 = calendar.duration_since(UNIX_EPOCH).unwrap_or_default();
        let began = since_1970 + record.began.saturating_duration_since(clock);
        let at = |after: Option<Duration>| after.map(|after| rfc3339(began + after));
        let seconds = |time: Option<Duration>| time.map(|time| time.as_micros() as f64 / 1e6);
        let talked = record
            .ended
            .zip(record.answered)
            .map(|(ended, answered)| ended.saturating_sub(answered));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let phase = match record.phase {
            CallPhase::Began => "ringing",
            CallPhase::Answered => "answered",
            CallPhase::Ended => "ended",
        };
        json!({
            "call_id": text(&record.call_id),
            "listener": &*told.listener,
            "caller": text(&record.caller),
            "callee": text(&record.callee),
            "request_uri": text(&record.request_uri),
            "source": record.source.to_string(),
            "pool": told.instance.as_ref().map(|(pool, _)| &**pool),
            "instance": told.instance.as_ref().map(|(_, instance)| &**instance),
            "begun_by_backend": record.begun_by_backend,
            "tries": record.tries,
            "phase": phase,
            "start": rfc3339(began),
            "answer": at(record.answered),
            "end": at(record.ended),
            "post_dial_delay_s": seconds(record.first_provisional),
            "answer_delay_s": seconds(record.answered),
            "duration_s": seconds(record.ended),
            "talk_s": seconds(talked),
            "code": record.end.map(|end| end.code),
            "cause": record.end.map(|end| end.cause),
            "ended_by": record.end.map(|end| end.by.word()),
        })
    }
}

/// `2026-01-02T03:04:05.678901Z`.
pub(crate) fn rfc3339(since_1970: Duration) -> String {
    let (seconds, micros) = (since_1970.as_secs(), since_1970.subsec_micros());
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    // Days to a date of the Gregorian calendar, in eras of 400 years that begin on 1 March.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3_600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

/// The file.
struct Sink {
    settings: CdrSettings,
    file: Option<BufWriter<File>>,
    bytes: u64,
    /// Records in the buffer.
    pending: u64,
    flushed: Instant,
    failed: Option<Instant>,
}

impl Sink {
    fn new(settings: CdrSettings) -> Self {
        let mut sink = Self {
            settings,
            file: None,
            bytes: 0,
            pending: 0,
            flushed: Instant::now(),
            failed: None,
        };
        sink.open();
        sink
    }

    fn open(&mut self) {
        let opened = OpenOptions::new().create(true).append(true).open(&self.settings.file);
        match opened.and_then(|file| file.metadata().map(|about| (file, about.len()))) {
            Ok((file, bytes)) => {
                (self.file, self.bytes, self.failed) = (Some(BufWriter::new(file)), bytes, None);
            }
            Err(error) => self.fail("opened", &error),
        }
    }

    fn fail(&mut self, what: &str, error: &io::Error) {
        if self.failed.is_none() {
            tracing::warn!(target: "strowger", kind = "cdr_file", "{} cannot be {what}: {error}; records are lost until it can", self.settings.file.display());
        }
        (self.file, self.failed) = (None, Some(Instant::now()));
    }

    fn write(&mut self, record: &Value, outcomes: &IntCounterVec) {
        if self.file.is_none() && self.failed.is_some_and(|since| since.elapsed() >= OPEN_AGAIN) {
            self.open();
        }
        let line = format!("{record}\n");
        if self.bytes > 0 && self.bytes + line.len() as u64 > self.settings.max_bytes {
            self.flush(outcomes);
            if let Err(error) = self.rotate() {
                self.fail("put aside", &error);
            }
        }
        let Some(file) = &mut self.file else {
            return outcomes.with_label_values(&["lost"]).inc();
        };
        match file.write_all(line.as_bytes()) {
            Ok(()) => {
                self.bytes += line.len() as u64;
                self.pending += 1;
            }
            Err(error) => {
                outcomes.with_label_values(&["lost"]).inc_by(self.pending + 1);
                self.pending = 0;
                self.fail("written", &error);
            }
        }
    }

    fn flush(&mut self, outcomes: &IntCounterVec) {
        self.flushed = Instant::now();
        let pending = std::mem::take(&mut self.pending);
        if pending == 0 {
            return;
        }
        match self.file.as_mut().map_or(Ok(()), Write::flush) {
            Ok(()) => outcomes.with_label_values(&["written"]).inc_by(pending),
            Err(error) => {
                outcomes.with_label_values(&["lost"]).inc_by(pending);
                self.fail("written", &error);
            }
        }
    }

    /// `file` becomes `file.1`, that `file.2`, and so on; the last one goes.
    fn rotate(&mut self) -> io::Result<()> {
        self.file = None;
        let aside = |number: u32| {
            let mut name = self.settings.file.clone().into_os_string();
            name.push(format!(".{number}"));
            PathBuf::from(name)
        };
        if self.settings.keep == 0 {
            remove(&self.settings.file)?;
        } else {
            for number in (1..self.settings.keep).rev() {
                rename(&aside(number), &aside(number + 1))?;
            }
            rename(&self.settings.file, &aside(1))?;
        }
        self.open();
        Ok(())
    }
}

fn rename(from: &Path, to: &Path) -> io::Result<()> {
    match std::fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn remove(file: &Path) -> io::Result<()> {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::Opts;
    use strowger_contract::{CallEnd, CallSide};

    fn record(id: u64, phase: CallPhase) -> Told {
        let ended = phase == CallPhase::Ended;
        Told {
            record: Box::new(CallRecord {
                id,
                phase,
                call_id: format!("{id}@x").into_bytes().into(),
                caller: (*b"sip:a@x").into(),
                callee: (*b"sip:\xff@x").into(),
                request_uri: (*b"sip:b@x").into(),
                source: SocketAddr::from(([127, 0, 0, 1], 5060)),
                pool: None,
                backend: None,
                begun_by_backend: false,
                tries: 1,
                began: Instant::now(),
                first_provisional: Some(Duration::from_millis(5)),
                answered: Some(Duration::from_millis(10)),
                ended: ended.then_some(Duration::from_millis(30)),
                end: ended.then_some(CallEnd { by: CallSide::Caller, code: 200, cause: "bye" }),
            }),
            listener: "edge".into(),
            instance: Some(("ims".into(), "a".into())),
        }
    }

    use std::net::SocketAddr;

    fn calls() -> Arc<Calls> {
        let outcomes = IntCounterVec::new(Opts::new("x", "x"), &["outcome"]).expect("a name");
        Calls::start(outcomes, IntGauge::new("y", "y").expect("a name"))
    }

    fn until(what: &str, holds: impl Fn() -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !holds() {
            assert!(Instant::now() < end, "waited in vain for {what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn a_date_is_a_date() {
        assert_eq!(rfc3339(Duration::ZERO), "1970-01-01T00:00:00.000000Z");
        assert_eq!(rfc3339(Duration::from_secs(951_782_400)), "2000-02-29T00:00:00.000000Z");
        assert_eq!(
            rfc3339(Duration::from_micros(1_767_323_045_678_901)),
            "2026-01-02T03:04:05.678901Z"
        );
    }

    #[test]
    fn a_call_is_listed_until_it_ends_and_then_written() {
        let folder = tempfile::TempDir::new().expect("a folder");
        let file = folder.path().join("cdr.jsonl");
        let calls = calls();
        calls.set(Some(CdrSettings { file: file.clone(), max_bytes: 1 << 20, keep: 3 }));
        calls.put(record(1, CallPhase::Began));
        calls.put(record(1, CallPhase::Answered));
        calls.put(record(2, CallPhase::Began));
        until("two calls", || calls.list(None, None, 10)["live"] == 2);
        assert_eq!(calls.list(Some("ims"), Some("b"), 10)["live"], 0);
        assert_eq!(
            calls.list(Some("ims"), Some("a"), 1)["calls"].as_array().map(Vec::len),
            Some(1)
        );
        calls.put(record(1, CallPhase::Ended));
        until("the record", || {
            std::fs::read_to_string(&file).is_ok_and(|text| text.ends_with('\n'))
        });
        let text = std::fs::read_to_string(&file).expect("written");
        let line: Value = serde_json::from_str(text.trim()).expect("one line of JSON");
        assert_eq!(
            (&line["call_id"], &line["cause"], &line["code"]),
            (&json!("1@x"), &json!("bye"), &json!(200))
        );
        assert_eq!((&line["talk_s"], &line["instance"]), (&json!(0.02), &json!("a")));
        assert_eq!(calls.list(None, None, 10)["live"], 1);
        // Somebody moves the file away.
        std::fs::rename(&file, folder.path().join("moved")).expect("moved");
        calls.reopen();
        until("the new file", || file.exists());
        calls.put(record(2, CallPhase::Ended));
        until("the second record", || {
            std::fs::read_to_string(&file).is_ok_and(|text| text.contains("2@x"))
        });
    }

    #[test]
    fn files_are_put_aside_and_the_oldest_go() {
        let folder = tempfile::TempDir::new().expect("a folder");
        let file = folder.path().join("cdr.jsonl");
        let outcomes = IntCounterVec::new(Opts::new("x", "x"), &["outcome"]).expect("a name");
        let mut sink = Sink::new(CdrSettings { file: file.clone(), max_bytes: 100, keep: 2 });
        for number in 0..10 {
            sink.write(&json!({ "number": number, "filler": "x".repeat(60) }), &outcomes);
        }
        sink.flush(&outcomes);
        let read =
            |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap_or_default();
        assert!(read("cdr.jsonl").contains("\"number\":9"));
        assert!(read("cdr.jsonl.1").contains("\"number\":8"));
        assert!(read("cdr.jsonl.2").contains("\"number\":7"));
        assert!(!folder.path().join("cdr.jsonl.3").exists());
        assert_eq!(outcomes.with_label_values(&["written"]).get(), 10);
    }

    #[test]
    fn a_file_that_cannot_be_opened_costs_records_and_says_so() {
        let outcomes = IntCounterVec::new(Opts::new("x", "x"), &["outcome"]).expect("a name");
        let mut sink =
            Sink::new(CdrSettings { file: "/nonexistent/cdr".into(), max_bytes: 100, keep: 2 });
        sink.write(&json!({}), &outcomes);
        assert_eq!(outcomes.with_label_values(&["lost"]).get(), 1);
    }
}
