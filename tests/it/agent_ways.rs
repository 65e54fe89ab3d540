//! Ways of the agent through the binary: blue-green, autoscaling, the end of a drain, checks, places and
//! the same host's unix sockets.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use socket2::{Domain, Socket, Type};

use crate::agent_support::{Agent, edge, state_at};
use crate::harness::{Edge, free_port, free_range, has};

/// Answers each line with who it is; notes a SIGTERM in its folder.
const PROGRAM: &str = "import os, signal, socketserver, sys
def end(*_):
    open(os.environ['STATE_DIR'] + '/order', 'a').write('term\\n')
    os._exit(0)
signal.signal(signal.SIGTERM, end)
class Lines(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write((os.environ['INSTANCE_ID'] + ' ' + os.environ['COLOUR'] + '\\n').encode())
class Tcp(socketserver.ThreadingTCPServer):
    daemon_threads = True
class Unix(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
if 'SOCKET_FAST' in os.environ:
    server = Unix(os.environ['SOCKET_FAST'], Lines)
else:
    server = Tcp(('127.0.0.1', int(os.environ['PORT'])), Lines)
server.serve_forever()
";

/// An edge, its TCP port, and an agent with the program in its folder `build`.
fn start() -> (Edge, u16, Agent) {
    let tcp = free_port();
    let edge = Edge::start(&edge(free_port(), free_port(), tcp));
    let agent = Agent::start(&["--ports", &free_range(60)]);
    let build = agent.folder.path().join("build");
    fs::create_dir_all(&build).expect("made");
    fs::write(build.join("app.py"), PROGRAM).expect("written");
    (edge, tcp, agent)
}

fn manifest(edges: &[String], count: u32, more: &str) -> String {
    format!(
        "version: 1
edges: [{}]
apps:
  web:
    exec: [python3, app.py]
    release: {{ dir: build }}
    instances: {count}
    ports: {{ tcp: {{ protocol: tcp }} }}
    env: {{ COLOUR: blue }}
    health: {{ ready: {{ tcp: tcp, every: 300ms, timeout: 5s }} }}
    register: {{ web: {{ lease: 6s }} }}
{more}",
        edges.join(", ")
    )
}

fn url(edge: &Edge) -> String {
    format!("http://{}", edge.admin)
}

/// A connection through the edge, and who is at its end: (instance, colour).
struct Line(TcpStream);

impl Line {
    fn open(port: u16) -> Option<Self> {
        Self::open_from(1, port)
    }

    /// From another address: the sessions of raw TCP are kept by it.
    fn open_from(last: u8, port: u16) -> Option<Self> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).ok()?;
        socket.bind(&SocketAddr::from(([127, 0, 0, last], 0)).into()).ok()?;
        socket.connect(&SocketAddr::from(([127, 0, 0, 1], port)).into()).ok()?;
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(Duration::from_secs(30))).ok()?;
        Some(Self(stream))
    }

    fn ask(&mut self) -> Option<(String, String)> {
        self.0.write_all(b"who\n").ok()?;
        let (mut text, mut byte) = (String::new(), [0]);
        while !text.ends_with('\n') {
            (self.0.read(&mut byte).ok()? == 1).then_some(())?;
            text.push(char::from(byte[0]));
        }
        let (id, colour) = text.trim().split_once(' ')?;
        Some((id.to_owned(), colour.to_owned()))
    }
}

fn colour(port: u16) -> String {
    Line::open(port).and_then(|mut line| line.ask()).map(|(_, colour)| colour).unwrap_or_default()
}

/// All new instances come at once and take over at once; the old ones keep what they have, and take over
/// again without a start when it is aborted. A paused one waits for `promote`.
#[test]
fn blue_green_switches_at_once_and_goes_back_without_a_start() {
    if !has("python3") {
        return;
    }
    let (edge, tcp, agent) = start();
    let plan = "    rollout: { strategy: blue-green, hold: 5m, min_healthy_time: 300ms, gate: { min_samples: 1 } }\n    drain: { deadline: 5m, kill_after: 2s }\n";
    let blue = manifest(&[url(&edge)], 2, plan);
    agent.apply(&blue);
    for id in ["web-0", "web-1"] {
        edge.until(id, |edge| state_at(edge, "web", id) == "ready");
    }
    let before = agent.pids("web");
    let mut old = Line::open(tcp).expect("a connection");
    assert_eq!(old.ask().map(|it| it.1).as_deref(), Some("blue"));
    let watching = |agent: &Agent| agent.app("web")["rollout"]["stage"] == "watching";
    agent.apply(&blue.replace("COLOUR: blue", "COLOUR: green"));
    agent.until("the switch", watching);
    edge.until("green only", |_| (0..6).all(|_| colour(tcp) == "green"));
    assert_eq!(old.ask().map(|it| it.1).as_deref(), Some("blue"), "it keeps its session");
    agent.run(&["rollout", "abort", "web"]);
    edge.until("blue only", |_| (0..6).all(|_| colour(tcp) == "blue"));
    agent.until("the green ones to go", |agent| agent.instances("web").len() == 2);
    assert_eq!(agent.pids("web"), before, "nothing was started for it");
    assert_eq!(agent.app("web")["history"][0]["outcome"], "aborted");

    agent.apply(&blue.replace("COLOUR: blue", "COLOUR: red"));
    agent.until("the switch", watching);
    agent.run(&["rollout", "pause", "web"]);
    assert_eq!(agent.app("web")["rollout"]["paused"], true);
    agent.run(&["rollout", "promote", "web"]);
    agent.until("the end", |agent| agent.app("web")["rollout"].is_null());
    assert_eq!(agent.app("web")["history"][1]["outcome"], "done");
    edge.until("red only", |_| (0..6).all(|_| colour(tcp) == "red"));
    assert_eq!(old.ask().map(|it| it.1).as_deref(), Some("blue"), "it drains as long as it lasts");
    drop(old);
    agent.until("the blue ones to go", |agent| agent.instances("web").len() == 2);
    let (code, _, error) = agent.run_code(&["rollout", "promote", "web"]);
    assert!(code != Some(0) && error.contains("no release"), "{error}");
}

/// More sessions start instances; fewer end those that have the fewest, by a drain: whoever holds a
/// session goes on.
#[test]
fn autoscaling_follows_sessions_and_ends_the_idlest() {
    if !has("python3") {
        return;
    }
    let (edge, tcp, agent) = start();
    agent.apply(&manifest(
        &[url(&edge)],
        1,
        "    autoscale: { min: 1, max: 3, sessions_per_instance: 4, out_cooldown: 1s, in_cooldown: 2s }\n    drain: { deadline: 5m, kill_after: 2s }\n",
    ));
    edge.until("web-0", |edge| state_at(edge, "web", "web-0") == "ready");
    let mut lines = Vec::new();
    let mut client = 10;
    let mut more = |count: usize| {
        for _ in 0..count {
            client += 1;
            let mut line = Line::open_from(client, tcp).expect("a connection");
            let (id, _) = line.ask().expect("an answer");
            lines.push((id, line));
        }
    };
    more(6);
    agent.until("another one", |agent| agent.ready("web") >= 2);
    edge.until("web-1", |edge| state_at(edge, "web", "web-1") == "ready");
    more(6);
    agent.until("all three", |agent| agent.ready("web") == 3);
    agent.run(&["scale", "web", "3"]);
    let (_, _, error) = agent.run_code(&["scale", "web", "4"]);
    assert!(error.contains("from 1 to 3"), "{error}");
    // Two stay with one that is neither the first nor the last that came.
    let mut stayed = 0;
    lines.retain(|(id, _)| {
        let stays = id == "web-1" && stayed < 2;
        stayed += usize::from(stays);
        stays
    });
    assert_eq!(stayed, 2, "the second one got its share");
    agent.until("one to be left", |agent| agent.instances("web").len() == 1);
    assert_eq!(agent.instances("web")[0]["id"], "web-1", "the one with sessions");
    for (id, line) in &mut lines {
        assert_eq!(line.ask().map(|it| it.0).as_ref(), Some(&*id), "no session was cut");
    }
    assert!(agent.log().contains("scaled"));
}

/// A drain asks each edge; one that is lost is waited for as long as the manifest says. Then the hook,
/// then SIGTERM.
#[test]
fn a_drain_waits_for_a_lost_edge_and_runs_its_hook_first() {
    if !has("python3") {
        return;
    }
    let (edge, _, agent) = start();
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let drain = "    drain: { deadline: 5m, kill_after: 5s, pre_stop: [sh, -c, \"echo hook >> $STATE_DIR/order\"] }\n";
    let yaml = manifest(&[url(&edge), nobody], 1, drain);
    agent.apply(&yaml);
    edge.until("web-0", |edge| state_at(edge, "web", "web-0") == "ready");
    let order = agent.state().join("instances/web-0/data/order");
    agent.run(&["drain", "web-0"]);
    // With no session left it is gone at once here, or still draining.
    edge.until("no new sessions", |edge| state_at(edge, "web", "web-0") != "ready");
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(agent.instance("web-0")["phase"], "draining", "the other edge may hold sessions");
    assert!(!order.exists());
    let told = agent.apply(&yaml.replace("deadline: 5m", "deadline: 5m, lost_edge: 1s"));
    assert!(told.contains("settings"), "{told}");
    agent.until("its end", |_| fs::read_to_string(&order).is_ok_and(|it| it == "hook\nterm\n"));
}

/// Each kind of check says when an instance is ready; and why not.
#[test]
fn http_and_diameter_and_exec_checks() {
    if !has("python3") {
        return;
    }
    let agent = Agent::start(&["--ports", &free_range(60)]);
    let strowger = env!("CARGO_BIN_EXE_strowger");
    let yaml = format!(
        "version: 1
apps:
  web:
    exec: [python3, -m, http.server, \"${{PORT}}\", --bind, \"${{HOST}}\"]
    ports: {{ http: {{ protocol: http }} }}
    health: {{ ready: {{ http: {{ port: http, path: /wrong }}, every: 300ms, timeout: 5s }} }}
  dia:
    exec: [{strowger}, sample, diameter, --port, \"${{PORT}}\", --name, dia]
    ports: {{ dia: {{ protocol: diameter }} }}
    health: {{ ready: {{ diameter: dia, every: 300ms, timeout: 5s }} }}
  sip:
    exec: [{strowger}, sample, sip, --port, \"${{PORT}}\", --name, sip]
    ports: {{ sip: {{ protocol: sip, transport: udp }} }}
    health:
      startup: {{ sip_options: sip, every: 300ms, timeout: 5s }}
      ready: {{ exec: [test, \"${{INSTANCE_ID}}\", \"=\", sip-0], every: 300ms, timeout: 5s }}
"
    );
    agent.apply(&yaml);
    agent.until("Diameter and SIP", |agent| agent.ready("dia") == 1 && agent.ready("sip") == 1);
    agent.until("the reason", |agent| agent.instance("web-0").to_string().contains("answered 404"));
    assert_eq!(agent.ready("web"), 0, "404 is not ready");
    let before = agent.pids("web");
    agent.apply(&yaml.replace("/wrong", "/"));
    agent.until("HTTP", |agent| agent.ready("web") == 1);
    assert_eq!(agent.pids("web"), before, "a check is a setting");
}

fn cpus(pid: u64) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("proc");
    let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:\t"));
    line.unwrap_or_default().to_owned()
}

/// `anti_affinity` keeps instances on CPUs of their own, as far as there are some.
#[test]
fn anti_affinity_keeps_instances_apart() {
    let agent = Agent::start(&["--ports", &free_range(20)]);
    agent.apply("version: 1\napps:\n  a: { exec: [sleep, \"1000\"], instances: 2, placement: { anti_affinity: [a] } }\n  b: { exec: [sleep, \"1000\"], resources: { cpus: \"0\" } }\n  c: { exec: [sleep, \"1000\"], placement: { anti_affinity: [b] } }\n");
    agent.until("all", |agent| {
        agent.ready("a") == 2 && agent.ready("b") == 1 && agent.ready("c") == 1
    });
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    if all < 2 {
        println!("skipped: there is one CPU");
        return;
    }
    agent.until("the programs", |agent| {
        let pids: Vec<u64> = ["a", "b", "c"].iter().flat_map(|app| agent.pids(app)).collect();
        pids.iter().all(|pid| {
            let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.starts_with("sleep")
        })
    });
    let of = |app: &str| agent.pids(app).into_iter().map(cpus).collect::<Vec<_>>();
    let (a, c) = (of("a"), of("c"));
    assert!(a.len() == 2 && a[0] != a[1], "{a:?}");
    assert!(c[0] != "0" && !c[0].starts_with("0-"), "{c:?}");
}

/// A unix socket of an instance on the edge's own host is how the edge reaches it.
#[test]
fn the_same_host_is_reached_over_a_unix_socket() {
    if !has("python3") {
        return;
    }
    let (edge, tcp, agent) = start();
    let yaml = manifest(&[url(&edge)], 1, "").replace(
        "ports: { tcp: { protocol: tcp } }",
        "ports: { fast: { protocol: tcp, transport: unix }, tcp: { protocol: tcp } }",
    );
    agent.apply(&yaml.replace("ready: { tcp: tcp,", "ready: { tcp: fast,"));
    edge.until("web-0", |edge| state_at(edge, "web", "web-0") == "ready");
    let instance: Value = edge.instance("web", "web-0");
    let address = instance["address"].as_str().unwrap_or_default();
    let path = address.strip_prefix("unix://").unwrap_or_default();
    assert!(Path::new(path).starts_with(agent.state()), "{instance}");
    let mut line = Line::open(tcp).expect("a connection");
    assert_eq!(
        line.ask().map(|it| it.0).as_deref(),
        Some("web-0"),
        "nobody listens at its TCP port"
    );
}

/// The agent's own loop stands still over a long order, for longer than a lease; leases, on their thread,
/// are renewed all the same.
#[test]
fn leases_live_while_the_agent_is_busy() {
    if !has("python3") {
        return;
    }
    const LEASE: Duration = Duration::from_secs(3);
    let (edge, _, agent) = start();
    agent.apply(&manifest(&[url(&edge)], 3, "").replace("lease: 6s", "lease: 3s"));
    for id in ["web-0", "web-1", "web-2"] {
        edge.until(id, |edge| state_at(edge, "web", id) == "ready");
    }
    // A release is read whole to see whether it is another; a file of zeros needs no disk.
    let zeros = fs::File::create(agent.folder.path().join("build/zeros")).expect("made");
    let yaml = agent.folder.path().join("manifest.yaml").display().to_string();
    let mut size = 512 << 20;
    loop {
        zeros.set_len(size).expect("set");
        let start = Instant::now();
        agent.try_run(&["apply", &yaml, "--dry-run"]).expect("it is answered");
        if start.elapsed() > LEASE + Duration::from_secs(1) {
            break;
        }
        size *= 2;
        assert!(size < 256 << 30, "the loop was never busy for as long as a lease");
    }
    assert_eq!(
        edge.metric("strowger_leases_lapsed_total", &["pool=\"web\""]),
        0.0,
        "{}",
        edge.log()
    );
    assert!(!edge.log().contains("leases_held"), "{}", edge.log());
}
