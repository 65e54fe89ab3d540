//! An edge and its peers as processes, on free ports, ended by their own ids.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// Tests that load the machine run one at a time: there are few cores, and calls have timers.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

pub(crate) fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a program is there. In CI it must be.
pub(crate) fn has(program: &str) -> bool {
    let found = Command::new("sh")
        .args(["-c", &format!("command -v {program}")])
        .stdout(Stdio::null())
        .status();
    let found = found.is_ok_and(|status| status.success());
    assert!(found || std::env::var_os("CI").is_none(), "{program} must be installed in CI");
    if !found {
        println!("skipped: {program} is not installed");
    }
    found
}

/// A port that is free for UDP and TCP, and that no other test of this run has got.
///
/// It lies below the range that the kernel takes ports of outgoing connections from
/// (`net.ipv4.ip_local_port_range`, 32768 and up): one from there could be gone again by the time
/// that the test's peer binds it.
pub(crate) fn free_port() -> u16 {
    next_port(&mut ports())
}

/// So many neighbouring ports, as a range; none of them is given to anybody else.
pub(crate) fn free_range(count: u16) -> String {
    let mut ports = ports();
    let (mut low, mut last) = (next_port(&mut ports), None);
    while last.unwrap_or(low) - low < count - 1 {
        let next = next_port(&mut ports);
        if next != last.unwrap_or(low) + 1 {
            low = next;
        }
        last = Some(next);
    }
    format!("{low}-{}", low + count - 1)
}

/// Where the search for the next one goes on.
fn ports() -> MutexGuard<'static, u32> {
    static NEXT: LazyLock<Mutex<u32>> =
        // Two runs at once start at different places.
        LazyLock::new(|| Mutex::new(std::process::id().wrapping_mul(0x9e37_79b9) >> 8));
    NEXT.lock().unwrap_or_else(PoisonError::into_inner)
}

fn next_port(next: &mut u32) -> u16 {
    const LOW: u16 = 10_000;
    const COUNT: u32 = 22_000;
    for _ in 0..COUNT {
        *next = next.wrapping_add(1);
        let port = LOW + u16::try_from(*next % COUNT).expect("below the count");
        let is_free = TcpListener::bind(("127.0.0.1", port)).is_ok()
            && UdpSocket::bind(("127.0.0.1", port)).is_ok();
        if is_free {
            return port;
        }
    }
    panic!("no free port");
}

/// Waits until somebody has the UDP port of 127.0.0.1 (or of every address), 30 seconds at most;
/// `what` is said otherwise. The kernel is asked: whoever tries to bind the port to find out takes
/// it from the one who is about to.
pub(crate) fn until_bound(port: u16, what: impl Fn() -> String) {
    let loopback = format!(" 0100007F:{port:04X} ");
    let any = format!(" 00000000:{port:04X} ");
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let sockets = fs::read_to_string("/proc/net/udp").expect("Linux has it");
        if sockets.contains(&loopback) || sockets.contains(&any) {
            return;
        }
        assert!(Instant::now() < end, "{}", what());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A process that ends with its handle.
pub(crate) struct Process {
    child: Child,
}

impl Process {
    pub(crate) fn spawn(command: &mut Command, log: &Path) -> Self {
        let out = fs::File::create(log).expect("a log file");
        let err = out.try_clone().expect("a log file");
        let child = command
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .spawn()
            .expect("the program starts");
        Self { child }
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// kill -9.
    pub(crate) fn kill(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }

    pub(crate) fn terminate(&mut self) -> Option<i32> {
        let pid = self.child.id().to_string();
        Command::new("kill").args(["-TERM", &pid]).status().expect("kill runs");
        self.wait(Duration::from_secs(20))
    }

    pub(crate) fn hang_up(&self) {
        self.signal("HUP");
    }

    /// Sends a signal, such as `STOP`.
    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        Command::new("kill").args([&format!("-{name}"), &pid]).status().expect("kill runs");
    }

    /// Whether it has not ended yet.
    pub(crate) fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_none()
    }

    /// Waits for its end; its exit code.
    pub(crate) fn wait(&mut self, limit: Duration) -> Option<i32> {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        None
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A running edge and the folder of its files.
pub(crate) struct Edge {
    pub(crate) process: Process,
    pub(crate) folder: TempDir,
    pub(crate) admin: SocketAddr,
}

impl Edge {
    /// Starts the binary with a configuration; `ADMIN` in it is its admin address.
    pub(crate) fn start(yaml: &str) -> Self {
        let folder = TempDir::new().expect("a folder");
        Self::start_in(folder, yaml)
    }

    pub(crate) fn start_in(folder: TempDir, yaml: &str) -> Self {
        let admin = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let file = folder.path().join("edge.yaml");
        fs::write(&file, yaml.replace("ADMIN", &admin.to_string())).expect("written");
        let mut command = Command::new(env!("CARGO_BIN_EXE_strowger"));
        command.args(["run", "--drain", "1s", "--log", "debug", "--config"]).arg(&file);
        let process = Process::spawn(&mut command, &folder.path().join("edge.log"));
        let edge = Self { process, folder, admin };
        edge.until("ready", |edge| edge.get("/readyz").is_ok_and(|(code, _)| code == 200));
        edge
    }

    pub(crate) fn config_file(&self) -> PathBuf {
        self.folder.path().join("edge.yaml")
    }

    /// Replaces the configuration file, as an editor does.
    pub(crate) fn write_config(&self, yaml: &str) {
        let new = self.folder.path().join("edge.new");
        fs::write(&new, yaml.replace("ADMIN", &self.admin.to_string())).expect("written");
        fs::rename(new, self.config_file()).expect("renamed");
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("edge.log")).unwrap_or_default()
    }

    pub(crate) fn get(&self, path: &str) -> std::io::Result<(u16, String)> {
        http(self.admin, "GET", path, "")
    }

    pub(crate) fn post(&self, path: &str, body: &str) -> (u16, String) {
        http(self.admin, "POST", path, body).expect("the admin server answers")
    }

    pub(crate) fn put_config(&self, yaml: &str) -> (u16, String) {
        let yaml = yaml.replace("ADMIN", &self.admin.to_string());
        http(self.admin, "PUT", "/api/v1/config", &yaml).expect("the admin server answers")
    }

    pub(crate) fn json(&self, path: &str) -> Value {
        let (code, body) = self.get(path).expect("the admin server answers");
        assert_eq!(code, 200, "{path}: {body}");
        serde_json::from_str(&body).expect("JSON")
    }

    /// An instance as the API shows it.
    pub(crate) fn instance(&self, pool: &str, id: &str) -> Value {
        let pool = self.json(&format!("/api/v1/pools/{pool}"));
        let found =
            pool["backends"].as_array().into_iter().flatten().find(|backend| backend["id"] == id);
        found.cloned().unwrap_or(Value::Null)
    }

    /// The sum of a metric's series whose labels contain all of `labels`.
    pub(crate) fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        let (_, text) = self.get("/metrics").expect("the admin server answers");
        let series = text.lines().filter(|line| {
            line.starts_with(&format!("{name}{{")) || line.starts_with(&format!("{name} "))
        });
        let wanted = series.filter(|line| labels.iter().all(|label| line.contains(label)));
        wanted.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// Waits until something holds.
    pub(crate) fn until(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !holds(self) {
            assert!(
                Instant::now() < end,
                "waited in vain for {what}; the edge's log:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(30));
        }
    }
}

/// One HTTP request.
pub(crate) fn http(
    address: SocketAddr,
    method: &str,
    path: &str,
    body: &str,
) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    Ok((code, body.to_owned()))
}

/// Waits until somebody listens.
pub(crate) fn wait_for_tcp(port: u16) {
    let end = Instant::now() + Duration::from_secs(15);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < end, "nobody listens on {port}");
        std::thread::sleep(Duration::from_millis(30));
    }
}

/// Writes what the admin server has at a path to a file: a body that is no text.
pub(crate) fn download(edge: &Edge, path: &str, to: &Path) {
    let mut stream = TcpStream::connect(edge.admin).expect("the admin server");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("sent");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer");
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    let body = answer.windows(4).position(|window| window == b"\r\n\r\n").expect("a body") + 4;
    fs::write(to, &answer[body..]).expect("written");
}
