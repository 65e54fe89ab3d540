//! An instance's output: one JSON object a line, into a ring for `strowger agent logs`, into files, to
//! syslog. Never holds the program up: what a sink cannot take in time is dropped and counted.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::launch::{Launch, Places};
use super::manifest::bytes;
use crate::observe::rfc3339;

/// A line, at most; a longer one becomes several.
const LINE_BYTES_MAX: u64 = 16 << 10;

/// Lines that wait for one sink, at most.
const QUEUE_LINES: usize = 4_096;

/// Lines that `logs` gives back, at most.
pub(crate) const TAIL_MAX: usize = 10_000;

/// How each record begins.
const TIME: &str = "{\"time\":\"";

/// The threads of one instance's output.
pub(crate) struct Pumps {
    readers: Vec<JoinHandle<()>>,
    sinks: Vec<Sink>,
}

#[derive(Clone)]
struct Inlet {
    queue: SyncSender<Arc<str>>,
    dropped: Arc<AtomicU64>,
}

struct Sink {
    inlet: Inlet,
    thread: JoinHandle<()>,
}

/// Starts to take output.
pub(crate) fn pump(
    places: &Places,
    launch: &Launch,
    out: Option<impl Read + Send + 'static>,
    err: Option<impl Read + Send + 'static>,
) -> Pumps {
    let mut sinks = Vec::new();
    let ring = bytes(&launch.logs.ring).unwrap_or(4 << 20);
    sinks.extend(sink(Files::new(places.file("log"), ring / 2, 1), launch));
    if let Some(folder) = &launch.logs.files {
        let folder = folder.join(&launch.app);
        // If it cannot be made, opening the file says so.
        let _later = fs::create_dir_all(&folder);
        let size = bytes(&launch.logs.file_bytes).unwrap_or(16 << 20);
        let path = folder.join(format!("{}.log", launch.id));
        sinks.extend(sink(Files::new(path, size, launch.logs.keep), launch));
    }
    if let Some(server) = launch.logs.syslog {
        let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        if let Ok(socket) = UdpSocket::bind(any)
            && socket.connect(server).is_ok()
        {
            sinks.extend(sink(
                Syslog { socket, app: launch.app.clone(), id: launch.id.clone() },
                launch,
            ));
        }
    }
    let mut readers = Vec::new();
    let inlets: Vec<Inlet> = sinks.iter().map(|sink| sink.inlet.clone()).collect();
    readers.extend(out.and_then(|out| reader(out, "stdout", launch, inlets.clone())));
    readers.extend(err.and_then(|err| reader(err, "stderr", launch, inlets)));
    Pumps { readers, sinks }
}

impl Pumps {
    /// Waits for the last lines, but not for ever: a grandchild may hold the pipe.
    pub(crate) fn finish(self, wait: Duration) {
        let end = Instant::now() + wait;
        let still = |thread: &JoinHandle<()>| !thread.is_finished() && Instant::now() < end;
        while self.readers.iter().any(still) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let Self { readers, sinks } = self;
        drop(readers);
        let threads: Vec<JoinHandle<()>> = sinks.into_iter().map(|sink| sink.thread).collect();
        while threads.iter().any(still) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Reads lines and gives each to all sinks.
fn reader(
    from: impl Read + Send + 'static,
    stream: &'static str,
    launch: &Launch,
    inlets: Vec<Inlet>,
) -> Option<JoinHandle<()>> {
    let (app, id, generation) = (launch.app.clone(), launch.id.clone(), launch.generation);
    let name = format!("log-{stream}");
    let body = move || {
        let mut from = BufReader::with_capacity(64 << 10, from);
        let mut line = Vec::new();
        loop {
            line.clear();
            match from.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            while line.last().is_some_and(|last| matches!(last, b'\n' | b'\r')) {
                line.pop();
            }
            let record = record(&app, &id, generation, stream, &line);
            inlets.iter().for_each(|inlet| inlet.give(&record));
        }
    };
    std::thread::Builder::new().name(name).spawn(body).ok()
}

/// One line, as JSON. A line that is a JSON object itself stands in `fields`.
fn record(app: &str, id: &str, generation: u64, stream: &str, line: &[u8]) -> Arc<str> {
    let mut value = json!({
        "app": app, "instance": id, "generation": generation, "stream": stream,
    });
    match serde_json::from_slice::<Value>(line) {
        Ok(Value::Object(fields)) => value["fields"] = Value::Object(fields),
        _ => value["message"] = String::from_utf8_lossy(line).into(),
    }
    timed(&value)
}

/// A record with its time in front, where [`time_of`] finds it whatever a program says itself.
fn timed(value: &Value) -> Arc<str> {
    let text = value.to_string();
    format!("{TIME}{}\",{}\n", timestamp(), &text[1..]).into()
}

/// The time in RFC 3339, to the microsecond.
fn timestamp() -> String {
    rfc3339(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

impl Inlet {
    fn give(&self, record: &Arc<str>) {
        // A sink whose thread is gone takes nothing either.
        if self.queue.try_send(Arc::clone(record)).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Something that takes lines.
trait Outlet: Send + 'static {
    /// Whether it has the line.
    fn write(&mut self, record: &str) -> bool;
}

fn sink(mut outlet: impl Outlet, launch: &Launch) -> Option<Sink> {
    let (queue, lines): (_, Receiver<Arc<str>>) = sync_channel(QUEUE_LINES);
    let dropped = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&dropped);
    let (app, id, generation) = (launch.app.clone(), launch.id.clone(), launch.generation);
    let body = move || {
        let told = |lost: u64| {
            let message =
                format!("{lost} lines were dropped: the sink is too slow, or takes nothing");
            timed(&json!({
                "app": app, "instance": id, "generation": generation, "stream": "agent",
                "message": message, "dropped": lost,
            }))
        };
        let mut lost = 0;
        for line in lines {
            lost += count.swap(0, Ordering::Relaxed);
            // Told where they are missing, as soon as anything is taken again.
            if lost > 0 && outlet.write(&told(lost)) {
                lost = 0;
            }
            if !outlet.write(&line) {
                lost += 1;
            }
        }
        // The program has ended, and nothing comes that this could go before.
        lost += count.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let _nobody_is_left_to_tell = outlet.write(&told(lost));
        }
    };
    let thread = std::thread::Builder::new().name("log-sink".to_owned()).spawn(body).ok()?;
    Some(Sink { inlet: Inlet { queue, dropped }, thread })
}

/// A file that is rotated: `x`, `x.1` (the newest of the old), `x.2`.
struct Files {
    path: PathBuf,
    size: u64,
    keep: u32,
    file: Option<File>,
    written: u64,
}

impl Files {
    fn new(path: PathBuf, size: u64, keep: u32) -> Self {
        Self { path, size, keep, file: None, written: 0 }
    }

    fn open(&mut self) -> Option<&mut File> {
        if self.file.is_none() {
            let file = OpenOptions::new().create(true).append(true).open(&self.path).ok()?;
            self.written = file.metadata().map_or(0, |data| data.len());
            self.file = Some(file);
        }
        self.file.as_mut()
    }

    fn rotate(&mut self) {
        self.file = None;
        let numbered = |number: u32| {
            let mut name = self.path.clone().into_os_string();
            name.push(format!(".{number}"));
            PathBuf::from(name)
        };
        for number in (1..self.keep).rev() {
            // The older ones may not be there yet.
            let _none = fs::rename(numbered(number), numbered(number + 1));
        }
        let _moved = if self.keep == 0 {
            fs::remove_file(&self.path)
        } else {
            fs::rename(&self.path, numbered(1))
        };
    }
}

impl Outlet for Files {
    fn write(&mut self, record: &str) -> bool {
        let Some(file) = self.open() else { return false };
        if file.write_all(record.as_bytes()).is_err() {
            self.file = None;
            return false;
        }
        self.written += record.len() as u64;
        if self.written >= self.size {
            self.rotate();
        }
        true
    }
}

/// RFC 5424 over UDP (RFC 5426).
struct Syslog {
    socket: UdpSocket,
    app: String,
    id: String,
}

impl Outlet for Syslog {
    fn write(&mut self, record: &str) -> bool {
        // Facility daemon, severity informational: programs have no common word for worse.
        const PRIORITY: u32 = 3 * 8 + 6;
        let text = format!(
            "<{PRIORITY}>1 {} - {} {} - - {}",
            timestamp(),
            self.app,
            self.id,
            record.trim_end()
        );
        // What is lost on the way nobody knows: that is syslog over UDP. What the kernel refuses, or the
        // server's host (ICMP, told with the next one), is known.
        self.socket.send(text.as_bytes()).is_ok()
    }
}

/// The newest lines of an instance's ring, oldest first; only those after `since`, if given.
pub(crate) fn tail(places: &Places, count: usize, since: Option<&str>) -> Vec<String> {
    let mut lines = Vec::new();
    for name in ["log.1", "log"] {
        let text = fs::read(places.file(name)).unwrap_or_default();
        lines.extend(String::from_utf8_lossy(&text).lines().map(str::to_owned));
    }
    if let Some(since) = since {
        lines.retain(|line| time_of(line) > since);
    }
    let first = lines.len().saturating_sub(count.min(TAIL_MAX));
    lines.split_off(first)
}

/// A line's time; the empty text if it has none.
pub(crate) fn time_of(line: &str) -> &str {
    let rest = line.strip_prefix(TIME).unwrap_or_default();
    rest.split('"').next().unwrap_or_default()
}

/// How large an instance's ring is now.
pub(crate) fn ring_bytes(root: &Path) -> u64 {
    let size = |name: &str| fs::metadata(root.join(name)).map_or(0, |data| data.len());
    size("log") + size("log.1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_json_and_has_its_time() {
        let plain = record("a", "a-0", 3, "stdout", b"hello \xff");
        let value: Value = serde_json::from_str(&plain).expect("JSON");
        assert_eq!(
            (value["instance"].as_str(), value["stream"].as_str()),
            (Some("a-0"), Some("stdout"))
        );
        assert_eq!(time_of(&plain), value["time"].as_str().expect("a time"));
        let own = record("a", "a-0", 3, "stdout", b"{\"level\":\"warn\"}");
        let value: Value = serde_json::from_str(&own).expect("JSON");
        assert_eq!(value["fields"]["level"], "warn");
        // A program's own time is not the record's.
        let own = record("a", "a-0", 3, "stdout", b"{\"time\":\"1999-01-01\"}");
        let value: Value = serde_json::from_str(&own).expect("JSON");
        assert_eq!(value["fields"]["time"], "1999-01-01");
        assert_eq!(time_of(&own), value["time"].as_str().expect("a time"));
    }

    /// A disk that is full for a while: what is missing is told where it is missing, and at the end.
    #[test]
    fn lines_that_a_sink_does_not_take_are_told() {
        struct Full(std::sync::mpsc::Sender<String>, usize);
        impl Outlet for Full {
            fn write(&mut self, record: &str) -> bool {
                let value: Value = serde_json::from_str(record).expect("JSON");
                let number = value["message"].as_str().and_then(|it| it.parse::<usize>().ok());
                self.1 = number.unwrap_or(self.1);
                let takes = !(3..6).contains(&self.1) && (self.1 < 8 || number.is_none());
                if takes {
                    // The test may have ended.
                    let _gone = self.0.send(value["dropped"].to_string());
                }
                takes
            }
        }
        let launch: Launch = serde_json::from_value(json!({
            "app": "a", "id": "a-0", "generation": 1, "exec": [], "folder": "", "env": {},
            "listen": [], "limits": super::super::limits::Limits::default(), "logs": {},
        }))
        .expect("a launch");
        let (taken, lines) = std::sync::mpsc::channel();
        let Sink { inlet, thread } = sink(Full(taken, 0), &launch).expect("a thread");
        for number in 0..10 {
            inlet.give(&record("a", "a-0", 1, "stdout", number.to_string().as_bytes()));
        }
        drop(inlet);
        thread.join().expect("it ends");
        let told: Vec<String> = lines.iter().collect();
        // 0, 1, 2, 6, that three are missing, 7; and of 8 and 9 that they are.
        let dropped: Vec<u64> = told.iter().filter_map(|it| it.parse().ok()).collect();
        assert_eq!(dropped.iter().sum::<u64>(), 5, "{told:?}");
        assert_eq!(told.len() - dropped.len(), 5, "{told:?}");
    }

    #[test]
    fn files_rotate_and_stay_few() {
        let folder = tempfile::TempDir::new().expect("a folder");
        let mut files = Files::new(folder.path().join("x"), 100, 2);
        for number in 0..100 {
            files.write(&format!("{{\"time\":\"{number:04}\"}}\n"));
        }
        let count = fs::read_dir(folder.path()).expect("a folder").count();
        assert!((2..=3).contains(&count), "{count}");
    }
}
