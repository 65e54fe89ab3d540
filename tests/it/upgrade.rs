//! Live upgrade: everything that runs goes to a new process, and nobody notices.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use socket2::{Domain, SockAddr, Socket, Type};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{Process, alone, free_port, http};

/// An edge that is upgraded again and again.
pub(crate) struct Line {
    pub(crate) folder: TempDir,
    admin: u16,
    /// The oldest first.
    pub(crate) processes: Vec<Process>,
}

pub(crate) const LONG: Duration = Duration::from_secs(60);

impl Line {
    pub(crate) fn start(yaml: &str) -> Self {
        let folder = TempDir::new().expect("a folder");
        let admin = free_port();
        let yaml = yaml.replace("ADMIN", &format!("127.0.0.1:{admin}"));
        std::fs::write(folder.path().join("edge.yaml"), yaml).expect("written");
        let mut line = Self { folder, admin, processes: Vec::new() };
        line.processes.push(line.spawn(&[]));
        line.until("ready", |line| line.get("/readyz").is_some_and(|(code, _)| code == 200));
        line
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("upgrade.sock")
    }

    pub(crate) fn log(&self, number: usize) -> String {
        let log = self.folder.path().join(format!("edge-{number}.log"));
        std::fs::read_to_string(log).unwrap_or_default()
    }

    fn spawn(&self, more: &[&str]) -> Process {
        let mut command = Command::new(env!("CARGO_BIN_EXE_strowger"));
        command.args(["run", "--log", "info", "--drain", "1s", "--config"]);
        command.arg(self.folder.path().join("edge.yaml"));
        command.arg("--upgrade").arg(self.socket()).args(more);
        let log = format!("edge-{}.log", self.processes.len());
        Process::spawn(&mut command, &self.folder.path().join(log))
    }

    pub(crate) fn get(&self, path: &str) -> Option<(u16, String)> {
        http(([127, 0, 0, 1], self.admin).into(), "GET", path, "").ok()
    }

    pub(crate) fn until(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let end = Instant::now() + LONG;
        while !holds(self) {
            let logs: Vec<_> = (0..=self.processes.len()).map(|number| self.log(number)).collect();
            assert!(Instant::now() < end, "waited in vain for {what}; logs:\n{}", logs.join("\n"));
            thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn metric(&self, series: &str) -> f64 {
        let (_, text) = self.get("/metrics").unwrap_or_default();
        let lines = text.lines().filter(|line| line.starts_with(series));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// Starts a new process and waits until it has taken over.
    pub(crate) fn upgrade(&mut self) {
        let number = self.processes.len();
        let new = self.spawn(&["--upgrade-drain", "60s"]);
        self.processes.push(new);
        self.until("the new process", |line| {
            line.log(number).contains("upgrade_taken_over") && line.log(number).contains("ready;")
        });
    }

    /// The process before the newest ends by itself.
    pub(crate) fn old_one_ends(&mut self) {
        let count = self.processes.len();
        assert_eq!(self.processes[count - 2].wait(LONG), Some(0), "{}", self.log(count - 2));
    }
}

/// A stream of numbers that both sides can compute.
struct Numbers(u64);

impl Numbers {
    fn fill(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            *byte = (self.0 >> 56) as u8;
        }
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// Echoes whatever comes, for as long as the test runs.
pub(crate) fn echo(port: u16) {
    let listener = TcpListener::bind(("127.0.0.1", port)).expect("a free port");
    listener.set_nonblocking(true).expect("a socket option");
    thread::spawn(move || {
        runtime().block_on(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("in a runtime");
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut reader, mut writer) = stream.split();
                    let _ended = tokio::io::copy(&mut reader, &mut writer).await;
                    let _ended = writer.shutdown().await;
                });
            }
        });
    });
}

/// One connection: sends numbers without pause, now and then many more than buffers hold, and
/// checks that all come back in order. How many bytes.
async fn exchange(port: u16, number: u64, go_on: Arc<AtomicBool>, open: Arc<AtomicU64>) -> u64 {
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.expect("accepted");
    open.fetch_add(1, Ordering::Relaxed);
    let (mut reader, mut writer) = stream.split();
    let send = async {
        let (mut numbers, mut sent) = (Numbers(number), 0);
        let mut bytes = vec![0; 64 << 10];
        while go_on.load(Ordering::Relaxed) {
            let length =
                if number.is_multiple_of(50) { bytes.len() } else { 1 + (sent as usize % 700) };
            numbers.fill(&mut bytes[..length]);
            writer.write_all(&bytes[..length]).await.expect("open");
            sent += length as u64;
            if !number.is_multiple_of(50) {
                let pause = if number.is_multiple_of(5) { 20 } else { 300 };
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
        }
        writer.shutdown().await.expect("open");
        sent
    };
    let receive = async {
        let (mut numbers, mut received) = (Numbers(number), 0);
        let (mut bytes, mut wanted) = (vec![0; 32 << 10], vec![0; 32 << 10]);
        loop {
            let count = reader.read(&mut bytes).await.expect("open");
            if count == 0 {
                return received;
            }
            numbers.fill(&mut wanted[..count]);
            assert!(bytes[..count] == wanted[..count], "connection {number} after {received}");
            received += count as u64;
        }
    };
    let (sent, received) = tokio::join!(send, receive);
    assert_eq!(sent, received, "connection {number}");
    sent
}

pub(crate) const HEAD: &str = "version: 1\nnode: { workers: 2, name: edge, realm: example.net }\nadmin: { listen: \"ADMIN\" }\n";

fn tcp_yaml(port: u16, backend: u16) -> String {
    // Few flows are parked and woken all the time; for many that would be all that the machine does.
    let park = if connections() > 1_000 { "5s" } else { "100ms" };
    format!(
        "{HEAD}listeners:\n  - {{ name: db, protocol: tcp, bind: [\"tcp://127.0.0.1:{port}\"], pool: db, options: {{ relay: splice, park_after: {park} }} }}\npools:\n  db: {{ backends: [ {{ id: a, address: \"tcp://127.0.0.1:{backend}\" }} ] }}\n"
    )
}

/// How many connections: `STROWGER_UPGRADE_CONNECTIONS=5000` for the whole (with `ulimit -n 40000`).
fn connections() -> u64 {
    let told = std::env::var("STROWGER_UPGRADE_CONNECTIONS").ok();
    told.and_then(|text| text.parse().ok()).unwrap_or(300)
}

#[test]
fn raw_flows_go_over_with_every_byte() {
    let _alone = alone();
    let [port, backend, dia, da] = [(); 4].map(|()| free_port());
    echo(backend);
    let more = format!(
        "listeners:\n  - {{ name: dia, protocol: diameter, bind: [\"tcp://127.0.0.1:{dia}\"], pool: pcrf, options: {{ origin_host: edge.example.net }} }}\n"
    );
    let pools = format!(
        "pools:\n  pcrf: {{ backends: [ {{ id: a, address: \"tcp://127.0.0.1:{da}\" }} ] }}\n"
    );
    let yaml = tcp_yaml(port, backend).replace("listeners:\n", &more).replace("pools:\n", &pools);
    let mut line = Line::start(&yaml);
    let count = connections();
    let (go_on, open) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU64::new(0)));
    let clients = {
        let (go_on, open) = (Arc::clone(&go_on), Arc::clone(&open));
        thread::spawn(move || {
            runtime().block_on(async move {
                let tasks: Vec<_> = (0..count)
                    .map(|number| {
                        let (go_on, open) = (Arc::clone(&go_on), Arc::clone(&open));
                        tokio::spawn(exchange(port, number, go_on, open))
                    })
                    .collect();
                let mut total = 0;
                for task in tasks {
                    total += task.await.expect("a connection failed");
                }
                total
            })
        })
    };
    line.until("all connections", |_| open.load(Ordering::Relaxed) == count);
    // A hundred Diameter peers besides, for as long as the upgrades take.
    let folder = line.folder.path().to_owned();
    let lasting = if count > 1_000 { 30 } else { 8 };
    let requests = format!(
        "diameter --target tcp://127.0.0.1:{dia} --answer tcp://127.0.0.1:{da} --connections 100 --rate 60 --for {lasting}s --settle 6s --service 200ms --mix s6a=1"
    );
    let requests = load(&folder, "dia.json", &words(&requests));
    line.until("the peers", |line| {
        line.json_connections("dia") == 100 && line.in_progress("dia") > 0
    });
    for _ in 0..3 {
        line.until("all connections in the edge", |line| {
            line.json_connections("db") == count || clients.is_finished()
        });
        line.upgrade();
        // Nothing is left for the old one to do.
        line.old_one_ends();
        thread::sleep(Duration::from_millis(300));
    }
    assert_eq!(line.json_connections("db"), count, "{}", line.log(3));
    let pause = line.metric("strowger_upgrade_pause_seconds");
    assert_eq!(line.json_connections("dia"), 100, "{}", line.log(3));
    let told = report(&folder, "dia.json", requests);
    let failed = told["failed"].as_object().cloned().unwrap_or_default();
    assert!(failed.is_empty() && told["begun"].as_u64() > Some(100), "{told}\n{}", line.log(3));
    assert!(told["counts"].get("connections_closed").is_none(), "{told}");
    go_on.store(false, Ordering::Relaxed);
    let total = clients.join().expect("every connection had its bytes");
    println!(
        "{count} connections with {total} bytes and 100 Diameter peers with {} requests, three upgrades; the last took {pause} s",
        told["begun"]
    );
    line.until("the last connection's end", |line| line.json_connections("db") == 0);
}

impl Line {
    pub(crate) fn json_connections(&self, listener: &str) -> u64 {
        let (_, body) = self.get("/api/v1/listeners").unwrap_or_default();
        let listeners: Vec<Value> = serde_json::from_str(&body).unwrap_or_default();
        let found = listeners.iter().find(|known| known["name"] == listener);
        found.and_then(|known| known["connections"].as_u64()).unwrap_or(u64::MAX)
    }
}

fn load(folder: &Path, name: &str, arguments: &[String]) -> Process {
    let mut command = Command::new(env!("CARGO_BIN_EXE_strowger"));
    command.arg("load").args(arguments).arg("--json");
    Process::spawn(&mut command, &folder.join(name))
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn report(folder: &Path, name: &str, mut process: Process) -> Value {
    let code = process.wait(Duration::from_secs(120));
    let text = std::fs::read_to_string(folder.join(name)).expect("it wrote");
    let json = text.find('{').map(|start| &text[start..]).unwrap_or_default();
    let end = json.rfind('}').map_or(0, |end| end + 1);
    serde_json::from_str(&json[..end]).unwrap_or_else(|_| panic!("{name}: {code:?}: {text}"))
}

/// Calls that are set up, ringing, and established, over UDP and TCP, towards UDP and TCP; and a
/// hundred Diameter peers with requests under way.
#[test]
fn calls_and_diameter_requests_go_on() {
    let _alone = alone();
    let [sip, ua, ub, dia, da, db] = [(); 6].map(|()| free_port());
    let mut line = Line::start(&format!(
        "{HEAD}listeners:\n  - {{ name: sip, protocol: sip, bind: [\"udp://127.0.0.1:{sip}\", \"tcp://127.0.0.1:{sip}\"], pool: ims }}\n  - {{ name: dia, protocol: diameter, bind: [\"tcp://127.0.0.1:{dia}\"], pool: pcrf, options: {{ origin_host: edge.example.net }} }}\npools:\n  ims: {{ backends: [ {{ id: a, address: \"udp://127.0.0.1:{ua}\" }}, {{ id: b, address: \"tcp://127.0.0.1:{ub}\" }} ] }}\n  pcrf: {{ backends: [ {{ id: a, address: \"tcp://127.0.0.1:{da}\" }}, {{ id: b, address: \"tcp://127.0.0.1:{db}\" }} ] }}\n"
    ));
    let folder = line.folder.path().to_owned();
    let udp = format!(
        "sip --target udp://127.0.0.1:{sip} --answer udp://127.0.0.1:{ua} --answer tcp://127.0.0.1:{ub} --rate 40 --for 14s --ring 400ms --hold 2s --settle 1s"
    );
    let udp = load(&folder, "udp.json", &words(&udp));
    let tcp = format!(
        "sip --target tcp://127.0.0.1:{sip} --rate 20 --for 12s --ring 400ms --hold 2s --settle 3s"
    );
    let tcp = load(&folder, "tcp.json", &words(&tcp));
    // The edge finds the servers within its pause between dials.
    let requests = format!(
        "diameter --target tcp://127.0.0.1:{dia} --answer tcp://127.0.0.1:{da} --answer tcp://127.0.0.1:{db} --connections 100 --rate 60 --for 8s --settle 6s --service 300ms --mix s6a=1"
    );
    let requests = load(&folder, "dia.json", &words(&requests));
    line.until("traffic", |line| {
        line.metric("strowger_requests_total{") > 50.0
            && line.json_connections("dia") == 100
            && line.in_progress("sip") > 3
            && line.in_progress("dia") > 3
    });
    for _ in 0..2 {
        line.upgrade();
        line.old_one_ends();
        // What the new process knows is what the old one knew.
        assert_eq!(line.json_connections("dia"), 100);
        thread::sleep(Duration::from_millis(500));
    }
    for (name, process) in [("udp.json", udp), ("tcp.json", tcp), ("dia.json", requests)] {
        let report = report(&folder, name, process);
        assert!(report["begun"].as_u64() > Some(100), "{name}: {report}");
        // S6a requests name no server, and two of one subscriber may go to two: that is no failure.
        let failed = report["failed"].as_object().cloned().unwrap_or_default();
        let failed: Vec<_> =
            failed.into_iter().filter(|(why, _)| why != "moved to another server").collect();
        assert!(failed.is_empty(), "{name}: {report}\n{}", line.log(2));
        assert!(report["counts"].get("connections_closed").is_none(), "{name}: {report}");
    }
    let newest = line.processes.len() - 1;
    assert!(!line.log(newest).contains("panicked"), "{}", line.log(newest));
}

impl Line {
    fn in_progress(&self, listener: &str) -> u64 {
        let (_, body) = self.get("/api/v1/listeners").unwrap_or_default();
        let listeners: Vec<Value> = serde_json::from_str(&body).unwrap_or_default();
        let found = listeners.iter().find(|known| known["name"] == listener);
        found.and_then(|known| known["in_progress"].as_u64()).unwrap_or(0)
    }
}

/// A made-up new process, by the format's first words.
struct Fake(Socket);

impl Fake {
    fn connect(line: &Line) -> Self {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).expect("a socket");
        let address = SockAddr::unix(line.socket()).expect("a path");
        socket.connect(&address).expect("the edge listens");
        socket.set_read_timeout(Some(LONG)).expect("an option");
        Self(socket)
    }

    fn say(&self, item: &[u8]) {
        let packet = [&[0], item].concat();
        self.0.send(&packet).expect("sent");
    }

    /// The next packet; descriptors in it are closed by the kernel.
    fn hear(&self) -> Vec<u8> {
        let mut packet = vec![0; 64 << 10];
        let count = (&self.0).read(&mut packet).expect("the edge says something");
        packet.truncate(count);
        packet
    }

    fn hello(&self, format: u32) {
        self.say(&[&b"strowger"[..], &format.to_le_bytes(), b"0.0.1-test"].concat());
    }

    /// As far as `Ready` for the listener `db`; then workers stand still.
    fn ready(&self) {
        self.hello(strowger_contract::handover::FORMAT);
        self.hear();
        self.hear();
        self.say(&[0, 1, 2, b'd', b'b']);
    }
}

/// New processes that are of another format, wrong, slow, hanging or dying: the old one goes on, with
/// the connections that it has and with new ones.
#[test]
fn a_new_process_that_fails_harms_nothing() {
    let _alone = alone();
    let (port, backend) = (free_port(), free_port());
    echo(backend);
    let line = Line::start(&tcp_yaml(port, backend));
    let mode = std::fs::symlink_metadata(line.socket()).expect("it is there").permissions();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777, 0o600);
    let mut old = TcpStream::connect(("127.0.0.1", port)).expect("accepted");
    old.set_read_timeout(Some(LONG)).expect("an option");
    let mut numbers = Numbers(1);
    let mut works = |what: &str| {
        let mut new = TcpStream::connect(("127.0.0.1", port)).expect("accepted");
        new.set_read_timeout(Some(LONG)).expect("an option");
        for stream in [&mut old, &mut new] {
            let (mut sent, mut received) = ([0; 900], [0; 900]);
            numbers.fill(&mut sent);
            stream.write_all(&sent).unwrap_or_else(|error| panic!("{what}: {error}"));
            stream.read_exact(&mut received).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(sent, received, "{what}");
        }
    };
    works("before");
    let mut failures = 0.0;
    let mut failed = |why: &str| {
        failures += 1.0;
        line.until(why, |line| {
            line.metric("strowger_upgrades_total{outcome=\"failed\"") >= failures
                && line.log(0).contains(why)
        });
    };
    {
        let fake = Fake::connect(&line);
        fake.hello(strowger_contract::handover::FORMAT + 1);
        assert!(fake.hear().starts_with(b"\0strowger"), "it says who it is all the same");
        failed("restart instead");
    }
    works("another format");
    Fake::connect(&line).say(b"GET / HTTP/1.1\r\n\r\n");
    failed("no strowger");
    works("nonsense");
    {
        let fake = Fake::connect(&line);
        fake.hello(strowger_contract::handover::FORMAT);
        fake.hear();
        fake.hear();
    }
    failed("it went away before it was ready");
    works("one that died");
    Fake::connect(&line).ready();
    failed("it went away");
    works("one that died in the middle");
    {
        let fake = Fake::connect(&line);
        fake.ready();
        // It has everything, and then hangs.
        failed("did not take over");
        // What comes too late changes nothing.
        let _refused = fake.0.send(&[0, 1]);
    }
    works("one that hangs");
    // A real one whose configuration is wrong asks for nothing.
    let file = line.folder.path().join("edge.yaml");
    let yaml = std::fs::read_to_string(&file).expect("there");
    std::fs::write(&file, yaml.replace("pools:", "polls:")).expect("written");
    let mut wrong = line.spawn(&[]);
    assert_eq!(wrong.wait(LONG), Some(1));
    // One that cannot bind what is new gives up, and says why.
    let taken = TcpListener::bind("127.0.0.1:0").expect("free");
    let more = format!(
        "listeners:\n  - {{ name: more, protocol: tcp, bind: [\"tcp://{}\"], pool: db }}\n",
        taken.local_addr().expect("bound")
    );
    std::fs::write(&file, yaml.replace("listeners:\n", &more)).expect("written");
    let mut stuck = line.spawn(&[]);
    assert_eq!(stuck.wait(LONG), Some(1), "{}", line.log(1));
    failed("could not be bound");
    works("real ones that fail");
    std::fs::write(&file, yaml).expect("written");
    // And after all that a good one succeeds.
    let mut line = line;
    line.upgrade();
    line.old_one_ends();
    works("a good one");
}
