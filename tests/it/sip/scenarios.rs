//! Our sipp scenarios, each through the real binary and over each transport.
//!
//! `scenarios/NAME.uac.xml` calls `sip:…@NAME.test`, which a route sends to a pool whose only instance
//! plays `NAME.uas.xml`. One edge per transport serves them all; pairs of sipp run side by side.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use crate::harness::{Edge, Process, alone, free_port, has};

/// How many pairs run at a time: sipp sleeps most of its time.
const AT_A_TIME: usize = 8;

/// Calls of each pair.
const CALLS: u32 = 2;

/// A pair that hangs ends here; the machine may be slow.
const LIMIT: Duration = Duration::from_secs(60);

/// Scenarios that need a caller on IPv6.
const IPV6: &str = "ipv6_to_ipv4";

/// Scenarios that need a callee on IPv6.
const TO_IPV6: &str = "ipv4_to_ipv6";

/// Where a scenario's callee listens.
fn callee(name: &str) -> &'static str {
    if name == TO_IPV6 { "[::1]" } else { "127.0.0.1" }
}

/// What has no `.uas.xml` of its own and no domain: the default pool answers.
const DEFAULT: &str = "default";

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/sip/scenarios")
}

/// All scenarios, in order.
fn names() -> Vec<String> {
    let entries = fs::read_dir(folder()).expect("the scenarios");
    let mut names: Vec<String> = entries
        .filter_map(|entry| {
            let name = entry.expect("an entry").file_name().into_string().expect("a name");
            name.strip_suffix(".uac.xml").map(str::to_owned)
        })
        .collect();
    names.sort();
    names
}

struct Table {
    transport: &'static str,
    /// As sipp calls it.
    mode: &'static str,
    port: u16,
    ports: HashMap<String, u16>,
    /// Debian's sipp speaks no TLS: HAProxy (OpenSSL) does it for both of its sides.
    tls: Option<Wrapper>,
    /// The listener's options.
    options: &'static str,
}

/// Ports of HAProxy's, and the folder of the certificates.
struct Wrapper {
    /// Where callers find it, by the address family; it speaks TLS to the edge.
    callers: [u16; 2],
    /// Where the edge finds it, by scenario; it takes TLS off before sipp.
    servers: HashMap<String, u16>,
    folder: tempfile::TempDir,
}

impl Wrapper {
    fn new() -> Self {
        let folder = tempfile::TempDir::new().expect("a folder");
        super::secure::certificates(folder.path());
        let servers = names().into_iter().chain([DEFAULT.to_owned()]);
        Self {
            callers: [free_port(), free_port()],
            servers: servers.map(|name| (name, free_port())).collect(),
            folder,
        }
    }

    fn path(&self, file: &str) -> String {
        self.folder.path().join(file).display().to_string()
    }

    /// Starts HAProxy between the edge's port and sipp's.
    fn start(&self, edge: u16, sipp: &HashMap<String, u16>) -> Process {
        let read = |file: &str| fs::read_to_string(self.folder.path().join(file)).expect("a file");
        let both = read("edge.pem") + &read("edge.key");
        fs::write(self.folder.path().join("both.pem"), both).expect("written");
        let mut text = "global\n  maxconn 1000\ndefaults\n  mode tcp\n  timeout connect 10s\n  timeout client 5m\n  timeout server 5m\n".to_owned();
        for (host, port) in [("127.0.0.1", self.callers[0]), ("::1", self.callers[1])] {
            let ca = self.path("ca.pem");
            text.push_str(&format!(
                "listen caller{port}\n  bind {host}:{port}\n  server edge {host}:{edge} ssl verify required ca-file {ca} sni str(edge.example.net) verifyhost edge.example.net\n"
            ));
        }
        for (name, port) in &self.servers {
            let (to, pem, host) = (sipp[name], self.path("both.pem"), callee(name));
            text.push_str(&format!(
                "listen {name}\n  bind {host}:{port} ssl crt {pem}\n  server sipp {host}:{to}\n"
            ));
        }
        let file = self.folder.path().join("haproxy.cfg");
        fs::write(&file, text).expect("written");
        let mut command = Command::new("haproxy");
        command.args(["-db", "-f"]).arg(&file);
        let process = Process::spawn(&mut command, &self.folder.path().join("haproxy.log"));
        crate::harness::wait_for_tcp(self.callers[0]);
        process
    }
}

impl Table {
    fn new(transport: &'static str, mode: &'static str) -> Self {
        let mut ports: HashMap<String, u16> =
            names().into_iter().map(|name| (name, free_port())).collect();
        ports.insert(DEFAULT.to_owned(), free_port());
        let tls = (transport == "tls").then(Wrapper::new);
        Self { transport, mode, port: free_port(), ports, tls, options: "{}" }
    }

    /// Where the edge finds what plays a scenario's callee.
    fn server_port(&self, name: &str) -> u16 {
        self.tls.as_ref().map_or(&self.ports, |wrapper| &wrapper.servers)[name]
    }

    fn config(&self) -> String {
        let (transport, port) = (self.transport, self.port);
        let (mut routes, mut pools) = (String::new(), String::new());
        let trust = self.tls.as_ref().map_or_else(String::new, |wrapper| {
            format!("tls: {{ ca: {}, name: edge.example.net }}, ", wrapper.path("ca.pem"))
        });
        let own = self.tls.as_ref().map_or_else(String::new, |wrapper| {
            let (pem, key) = (wrapper.path("edge.pem"), wrapper.path("edge.key"));
            format!("    tls: {{ certificates: [{{ certificate: {pem}, key: {key} }}] }}\n")
        });
        for name in self.ports.keys() {
            // The edge itself: a loop. Nobody there: no instance.
            let server = if name == "loop" { port } else { self.server_port(name) };
            let backends = if name == "no_instance" {
                "[]".to_owned()
            } else {
                format!("[ {{ id: a, address: \"{transport}://{}:{server}\" }} ]", callee(name))
            };
            pools.push_str(&format!("  {name}: {{ {trust}backends: {backends} }}\n"));
            if name != DEFAULT {
                let domain = name.replace('_', "-");
                routes.push_str(&format!(
                    "      - {{ match: {{ domain: [{domain}.test] }}, pool: {name} }}\n"
                ));
            }
        }
        format!(
            "version: 1\nnode: {{ name: test, workers: 2 }}\nadmin: {{ listen: ADMIN }}\nlisteners:\n  - name: sip\n    protocol: sip\n    bind: [{transport}://127.0.0.1:{port}, \"{transport}://[::1]:{port}\"]\n    pool: {DEFAULT}\n    options: {}\n{own}    routes:\n{routes}pools:\n{pools}",
            self.options
        )
    }

    fn sipp(&self, work: &Path, name: &str, side: &str) -> Command {
        let mut command = Command::new("sipp");
        let mut scenario = folder().join(format!("{name}.{side}.xml"));
        if self.tls.is_some() {
            // sipp believes that it speaks TCP; what it says must be true on the other side.
            let text = fs::read(&scenario).expect("a scenario");
            // Not all of them are UTF-8, on purpose.
            let text: String = text.into_iter().map(char::from).collect();
            let text = text.replace("[transport]", "TLS");
            let text: Vec<u8> = text.chars().map(|letter| letter as u8).collect();
            scenario = work.join(format!("{name}.{side}.xml"));
            fs::write(&scenario, text).expect("written");
        }
        command.current_dir(work).arg("-sf").arg(scenario);
        command.args(["-t", self.mode, "-nostdin", "-m", &CALLS.to_string()]);
        command.args(["-s", "service", "-trace_err", "-error_file"]);
        command.arg(work.join(format!("{name}.{side}.err")));
        command.args(["-trace_msg", "-message_file"]).arg(work.join(format!("{name}.{side}.msg")));
        command
    }

    fn server(&self, work: &Path, name: &str, calls: u32) -> Process {
        let port = self.ports[name];
        let mut command = self.sipp(work, name, "uas");
        command.args(["-i", callee(name), "-p", &port.to_string(), "-m", &calls.to_string()]);
        Process::spawn(&mut command, &work.join(format!("{name}.uas.log")))
    }

    /// Plays one scenario; what went wrong.
    fn play(&self, work: &Path, name: &str) -> Result<(), String> {
        let has_server = folder().join(format!("{name}.uas.xml")).exists();
        let mut server = has_server.then(|| self.server(work, name, CALLS));
        std::thread::sleep(Duration::from_millis(400));
        let host = if name == IPV6 { "[::1]" } else { "127.0.0.1" };
        let mut command = self.sipp(work, name, "uac");
        command.args(["-i", host, "-p", &free_port().to_string(), "-r", "10"]);
        let port = self
            .tls
            .as_ref()
            .map_or(self.port, |wrapper| wrapper.callers[usize::from(name == IPV6)]);
        command.arg(format!("{host}:{port}"));
        let mut client = Process::spawn(&mut command, &work.join(format!("{name}.uac.log")));
        let ended =
            [client.wait(LIMIT), server.as_mut().map_or(Some(0), |server| server.wait(LIMIT))];
        if ended == [Some(0), Some(0)] {
            return Ok(());
        }
        let mut told =
            format!("{name} over {}: caller and callee ended {ended:?}\n", self.transport);
        for file in ["uac.err", "uas.err", "uac.msg"] {
            let text = fs::read(work.join(format!("{name}.{file}"))).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let shown: String = text.chars().take(3_000).collect();
            told.push_str(&format!("--- {file}\n{shown}\n"));
        }
        Err(told)
    }
}

/// Scenarios that are known to fail, and why. It must become empty.
const KNOWN: &[(&str, &str)] = &[];

/// What only makes sense where messages are repeated.
const DATAGRAMS_ONLY: [&str; 2] = ["retransmitted_requests", "lost_ack"];

fn run(transport: &'static str, mode: &'static str) {
    play_all(&Table::new(transport, mode), &|_, _| true);
}

/// Plays all scenarios and looks at what each caller got.
fn play_all(table: &Table, is_right: &(dyn Fn(&str, &str) -> bool + Sync)) {
    if !has("sipp") {
        return;
    }
    let _alone = alone();
    let transport = table.transport;
    let edge = Edge::start(&table.config());
    let _wrapper = table.tls.as_ref().map(|wrapper| wrapper.start(table.port, &table.ports));
    let work = tempfile::TempDir::new().expect("a folder");
    // It serves several scenarios, and is ended when they have.
    let _defaults = table.server(work.path(), DEFAULT, 10_000);
    let all = names();
    assert!(all.len() >= 40, "{} scenarios", all.len());
    let only = std::env::var("STROWGER_SCENARIO").ok();
    let mut left: Vec<String> = all.into_iter().rev().collect();
    left.retain(|name| transport == "udp" || !DATAGRAMS_ONLY.contains(&name.as_str()));
    left.retain(|name| only.as_ref().is_none_or(|only| name == only));
    let (left, failures) = (Mutex::new(left), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| {
                loop {
                    let next = left.lock().expect("no panic").pop();
                    let Some(name) = next else { return };
                    if let Err(told) = table.play(work.path(), &name)
                        && !KNOWN.iter().any(|(known, _)| *known == name)
                    {
                        failures.lock().expect("no panic").push(told);
                    }
                    let seen = fs::read(work.path().join(format!("{name}.uac.msg")));
                    let seen = String::from_utf8_lossy(&seen.unwrap_or_default()).into_owned();
                    if !is_right(&name, &seen) {
                        failures.lock().expect("no panic").push(format!("{name} saw\n{seen}"));
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("no panic");
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
    assert_eq!(edge.metric("strowger_engine_panics_total", &[]), 0.0);
}

#[test]
fn scenarios_over_udp() {
    run("udp", "u1");
}

/// Every scenario goes as well when neither side sees the other, and callers see no callee.
#[test]
fn scenarios_with_hidden_topology() {
    let options = "{ topology_hiding: { from: both } }";
    let table = Table { options, ..Table::new("udp", "u1") };
    play_all(&table, &|name, seen| {
        let ports = [DEFAULT, name].map(|name| format!("{}:{}", callee(name), table.ports[name]));
        // A registrar's Contacts are its clients' own.
        name.starts_with("register") || !ports.iter().any(|port| seen.contains(port))
    });
}

#[test]
fn scenarios_over_tcp() {
    run("tcp", "t1");
}

#[test]
fn scenarios_over_tls() {
    if has("haproxy") {
        run("tls", "t1");
    }
}
