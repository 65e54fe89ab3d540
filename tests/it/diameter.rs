//! Diameter peers on both sides of the edge.

use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use strowger_contract::{Framer, Framing};
use strowger_diameter::DiameterFramer;
use strowger_diameter::avp::{Avps, FLAG_REQUEST, FLAG_RETRANSMITTED, Header, Summary, code};
use strowger_diameter::build::Builder;

use crate::harness::{Edge, Process, alone, free_port, has, wait_for_tcp};

pub(crate) const GX: u32 = 16_777_238;
const CER: u32 = 257;
const CCR: u32 = 272;
const DWR: u32 = 280;
const DPR: u32 = 282;

fn config(port: u16, servers: &[(&str, u16)], options: &str) -> String {
    let list: Vec<String> = servers
        .iter()
        .map(|(id, port)| format!("      - {{ id: {id}, address: tcp://127.0.0.1:{port}, origin_host: {id}.example.net }}\n"))
        .collect();
    format!(
        "version: 1\nnode: {{ workers: 2, realm: example.net }}\nadmin: {{ listen: ADMIN }}\nclasses:\n  setup: {{ deadline: 5s }}\n  in-session: {{ deadline: 5s, retry: 2 }}\nlisteners:\n  - name: dra\n    protocol: diameter\n    bind: [tcp://127.0.0.1:{port}]\n    options: {{ origin_host: edge.example.net{options} }}\n    routes: [ {{ match: {{ application: [gx] }}, pool: pcrf }} ]\npools:\n  pcrf:\n    backends:\n{}",
        list.concat()
    )
}

/// A connection that yields whole messages.
pub(crate) struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    framer: DiameterFramer,
}

impl Connection {
    pub(crate) fn new(stream: TcpStream) -> Self {
        stream.set_nodelay(true).expect("an option");
        Self { stream, buffer: Vec::new(), framer: DiameterFramer }
    }

    pub(crate) fn open(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("somebody listens");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("an option");
        Self::new(stream)
    }

    /// The same connection once more: one writes, the other reads.
    pub(crate) fn try_clone(&self) -> Self {
        Self::new(self.stream.try_clone().expect("a handle"))
    }

    /// The next message that is not a watchdog request; those are answered. `None` at the end.
    pub(crate) fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            let message = self.next_of_any()?;
            let header = Header::read(&message).expect("framed");
            if header.command != DWR || !header.is_request() {
                return Some(message);
            }
            let mut answer = Vec::new();
            Builder::new(&mut answer, 0, DWR, 0, header.hop_by_hop, header.end_to_end)
                .number(code::RESULT_CODE, 2_001)
                .text(code::ORIGIN_HOST, "client.example.net")
                .text(code::ORIGIN_REALM, "example.net")
                .finish();
            if !self.send(&answer) {
                return None;
            }
        }
    }

    /// The next message, whatever it is; `None` at the end.
    pub(crate) fn next_of_any(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Framing::Message(length) = self.framer.frame(&self.buffer).expect("Diameter") {
                return Some(self.buffer.drain(..length.get()).collect());
            }
            let mut part = [0; 65_536];
            match self.stream.read(&mut part) {
                Ok(0) | Err(_) => return None,
                Ok(count) => self.buffer.extend_from_slice(&part[..count]),
            }
        }
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }
}

pub(crate) fn capabilities(flags: u8, host: &str, header: Option<&Header>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let (hop, end) = header.map_or((1, 1), |header| (header.hop_by_hop, header.end_to_end));
    let mut builder = Builder::new(&mut bytes, flags, CER, 0, hop, end);
    if header.is_some() {
        builder = builder.number(code::RESULT_CODE, 2_001);
    }
    builder
        .text(code::ORIGIN_HOST, host)
        .text(code::ORIGIN_REALM, "example.net")
        .address(code::HOST_IP_ADDRESS, "127.0.0.1".parse().expect("an address"))
        .number(code::VENDOR_ID, 0)
        .text(code::PRODUCT_NAME, "test")
        .application(GX)
        .finish();
    bytes
}

/// A client that has been let in.
pub(crate) fn client(port: u16, host: &str) -> Connection {
    let mut connection = Connection::open(port);
    assert!(connection.send(&capabilities(FLAG_REQUEST, host, None)));
    let cea = connection.next().expect("a CEA");
    assert_eq!(Summary::of(&cea).result_code, Some(2_001));
    connection
}

pub(crate) fn ccr(
    session: &str,
    kind: u32,
    host: &str,
    destination: Option<&str>,
    identifier: u32,
) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut builder = Builder::request(&mut bytes, CCR, GX, identifier, identifier)
        .text(code::SESSION_ID, session)
        .text(code::ORIGIN_HOST, host)
        .text(code::ORIGIN_REALM, "example.net")
        .text(code::DESTINATION_REALM, "example.net")
        .number(code::AUTH_APPLICATION_ID, GX)
        .number(code::CC_REQUEST_TYPE, kind)
        .number(415, 0);
    if let Some(destination) = destination {
        builder = builder.text(code::DESTINATION_HOST, destination);
    }
    builder.finish();
    bytes
}

/// A server that notes what it gets, and may hold its answers back.
#[derive(Clone, Default)]
pub(crate) struct Server {
    seen: Arc<Mutex<Vec<Vec<u8>>>>,
    mute: Arc<AtomicBool>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    dead: Arc<AtomicBool>,
    frozen: Arc<AtomicBool>,
}

impl Server {
    pub(crate) fn start(port: u16, host: &'static str) -> Self {
        let server = Self::default();
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("a free port");
        let shared = server.clone();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if shared.dead.load(Ordering::Relaxed) {
                    return;
                }
                shared
                    .streams
                    .lock()
                    .expect("not poisoned")
                    .push(stream.try_clone().expect("a handle"));
                let server = shared.clone();
                thread::spawn(move || server.serve(Connection::new(stream), host));
            }
        });
        server
    }

    fn serve(&self, mut connection: Connection, host: &str) {
        while let Some(message) = connection.next_of_any() {
            while self.frozen.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(20));
            }
            let header = Header::read(&message).expect("framed");
            let mut answer = Vec::new();
            match header.command {
                CER if header.is_request() => answer = capabilities(0, host, Some(&header)),
                _ if !header.is_request() => continue,
                command => {
                    if command == CCR {
                        self.seen.lock().expect("not poisoned").push(message.clone());
                        if self.mute.load(Ordering::Relaxed) {
                            continue;
                        }
                    }
                    let session = Summary::of(&message).session_id.unwrap_or_default().to_vec();
                    let mut builder = Builder::new(
                        &mut answer,
                        header.flags & 0x40,
                        command,
                        header.application,
                        header.hop_by_hop,
                        header.end_to_end,
                    );
                    if !session.is_empty() {
                        builder = builder.bytes(code::SESSION_ID, &session);
                    }
                    builder
                        .number(code::RESULT_CODE, 2_001)
                        .text(code::ORIGIN_HOST, host)
                        .text(code::ORIGIN_REALM, "example.net")
                        .finish();
                }
            }
            if !connection.send(&answer) || header.command == DPR {
                return;
            }
        }
    }

    pub(crate) fn kill(&self) {
        self.dead.store(true, Ordering::Relaxed);
        for stream in self.streams.lock().expect("not poisoned").drain(..) {
            let _gone = stream.shutdown(Shutdown::Both);
        }
    }

    pub(crate) fn requests(&self) -> Vec<Vec<u8>> {
        self.seen.lock().expect("not poisoned").clone()
    }
}

pub(crate) fn up(edge: &Edge, ids: &[&str]) {
    edge.until("the servers to be up", |edge| {
        ids.iter().all(|id| edge.instance("pcrf", id)["health"] == "up")
    });
}

pub(crate) fn text(bytes: Option<&[u8]>) -> String {
    String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned()
}

/// 10,000 transactions over four connections to three servers; one dies with requests pending. Each
/// request gets exactly one answer, what is sent again bears T, and sessions stay where they were.
#[test]
fn ten_thousand_transactions_and_a_death() {
    const CLIENTS: usize = 4;
    const EACH: u32 = 2_500;
    let _alone = alone();
    let port = free_port();
    let ports = [free_port(), free_port(), free_port()];
    let hosts = ["a.example.net", "b.example.net", "c.example.net"];
    let servers: Vec<Server> =
        ports.iter().zip(hosts).map(|(&port, host)| Server::start(port, host)).collect();
    let edge = Edge::start(&config(port, &[("a", ports[0]), ("b", ports[1]), ("c", ports[2])], ""));
    up(&edge, &["a", "b", "c"]);
    let workers: Vec<_> = (0..CLIENTS)
        .map(|number| {
            thread::spawn(move || {
                let host = format!("client-{number}.example.net");
                let mut connection = client(port, &host);
                let mut owners: HashMap<String, HashSet<String>> = HashMap::new();
                let (mut sent, mut answered) = (0, HashSet::new());
                while answered.len() < EACH as usize {
                    // Twenty under way at a time; each session has five requests.
                    while sent < EACH && sent < answered.len() as u32 + 20 {
                        let (session, step) = (sent / 5, sent % 5);
                        let kind = match step {
                            0 => 1,
                            4 => 3,
                            _ => 2,
                        };
                        let session = format!("{host};{session}");
                        assert!(connection.send(&ccr(&session, kind, &host, None, sent + 1)));
                        sent += 1;
                    }
                    let answer = connection.next().expect("an answer");
                    let header = Header::read(&answer).expect("framed");
                    if header.is_request() {
                        continue;
                    }
                    assert!(
                        answered.insert(header.hop_by_hop),
                        "request {} was answered twice",
                        header.hop_by_hop
                    );
                    assert_eq!(header.hop_by_hop, header.end_to_end);
                    let summary = Summary::of(&answer);
                    assert_eq!(
                        summary.result_code,
                        Some(2_001),
                        "{}: {}",
                        text(summary.session_id),
                        error_message(&answer)
                    );
                    owners
                        .entry(text(summary.session_id))
                        .or_default()
                        .insert(text(summary.origin_host));
                }
                owners
            })
        })
        .collect();
    // It stops answering in the midst of its work, gets some more requests, and dies.
    let wait_for = |count: usize| {
        while servers[0].requests().len() < count {
            thread::sleep(Duration::from_millis(1));
        }
    };
    wait_for(200);
    servers[0].mute.store(true, Ordering::Relaxed);
    wait_for(servers[0].requests().len() + 5);
    servers[0].kill();
    let mut sessions = 0;
    for worker in workers {
        for (session, owners) in worker.join().expect("the client got all its answers") {
            sessions += 1;
            let survivors = owners.iter().filter(|owner| *owner != "a.example.net").count();
            assert!(survivors <= 1, "{session} was at {owners:?}");
        }
    }
    assert_eq!(sessions, 2_000);
    let (first, rest): (Vec<_>, Vec<_>) =
        (servers[0].requests(), servers[1..].iter().flat_map(Server::requests).collect());
    let known: HashSet<(String, u32)> = first.iter().map(|message| key(message)).collect();
    let again: Vec<&Vec<u8>> =
        rest.iter().filter(|message| known.contains(&key(message))).collect();
    assert!(!again.is_empty(), "nothing was pending at the server that died; {}", edge.log());
    for message in &rest {
        let resent = known.contains(&key(message));
        let flag = message[4] & FLAG_RETRANSMITTED != 0;
        assert!(flag || !resent, "a request that the dead server had got was sent again without T");
    }
    let records = Avps::of(&rest[0]).flatten().filter(|avp| avp.is(code::ROUTE_RECORD)).count();
    assert_eq!(records, 1);
    edge.until("nothing in flight", |edge| {
        (0..3).all(|index| edge.instance("pcrf", ["a", "b", "c"][index])["in_flight"] == 0)
    });
    dissects(&rest);
}

/// What an error says in its Error-Message.
pub(crate) fn error_message(answer: &[u8]) -> String {
    let mut avps = Avps::of(answer).map_while(Result::ok);
    text(avps.find(|avp| avp.is(code::ERROR_MESSAGE)).map(|avp| avp.data))
}

fn key(message: &[u8]) -> (String, u32) {
    let summary = Summary::of(message);
    (text(summary.origin_host), Header::read(message).expect("framed").end_to_end)
}

/// tshark finds nothing malformed in messages that the edge sent.
fn dissects(messages: &[Vec<u8>]) {
    let lines = dissect(messages);
    let odd = lines.iter().find(|line| *line != "272");
    assert!(odd.is_none(), "{odd:?}");
}

/// What tshark says of messages: each one's command code, and whether it is malformed. Nothing where
/// tshark is not installed.
pub(crate) fn dissect(messages: &[Vec<u8>]) -> Vec<String> {
    if !has("tshark") {
        return Vec::new();
    }
    let folder = tempfile::TempDir::new().expect("a folder");
    let file = folder.path().join("sent.pcap");
    let mut pcap = Vec::new();
    // Link type 162 (user 15): the packets are bare Diameter.
    for number in [0xa1b2_c3d4u32, 0x0004_0002, 0, 0, 262_144, 162] {
        pcap.extend_from_slice(&number.to_le_bytes());
    }
    for message in messages.iter().take(2_000) {
        for number in [0, 0, message.len() as u32, message.len() as u32] {
            pcap.extend_from_slice(&number.to_le_bytes());
        }
        pcap.extend_from_slice(message);
    }
    std::fs::write(&file, pcap).expect("written");
    let dissector = "uat:user_dlts:\"User 15 (DLT=162)\",\"diameter\",\"0\",\"\",\"0\",\"\"";
    let output = Command::new("tshark")
        .arg("-r")
        .arg(&file)
        .args(["-o", dissector, "-T", "fields", "-e", "diameter.cmd.code", "-e", "_ws.malformed"])
        .output()
        .expect("it runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(
        text.lines().count(),
        messages.len().min(2_000),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text.lines().map(|line| line.trim().to_owned()).collect()
}

#[test]
fn errors_are_answered_and_the_connection_stays() {
    let (port, backend) = (free_port(), free_port());
    let _server = Server::start(backend, "a.example.net");
    let edge = Edge::start(&config(port, &[("a", backend)], ""));
    up(&edge, &["a"]);
    let mut connection = client(port, "client.example.net");
    let mut expect = |what: &str, message: &[u8], result: u32| {
        assert!(connection.send(message));
        let answer =
            connection.next().unwrap_or_else(|| panic!("{what}: the connection was closed"));
        let header = Header::read(&answer).expect("framed");
        assert_eq!(
            Summary::of(&answer).result_code,
            Some(result),
            "{what}: {}; {}\n{}",
            error_message(&answer),
            edge.instance("pcrf", "a"),
            edge.log()
        );
        assert_eq!(header.flags & 0x20 != 0, (3_000..4_000).contains(&result), "{what}: E");
        assert_eq!(header.hop_by_hop, 77, "{what}");
    };
    let good = ccr("s;1", 1, "client.example.net", None, 77);
    expect("a good one", &good, 2_001);
    let mut looped = good.clone();
    strowger_diameter::build::append(&mut looped, code::ROUTE_RECORD, 0x40, b"EDGE.example.net");
    let length = (looped.len() as u32).to_be_bytes();
    looped[1..4].copy_from_slice(&length[1..]);
    expect("a loop", &looped, 3_005);
    let mut flags = good.clone();
    flags[4] |= 0x20;
    expect("R and E", &flags, 3_008);
    let mut private = good.clone();
    private[4] &= !0x40;
    expect("no P", &private, 3_007);
    let mut other = good.clone();
    other[8..12].copy_from_slice(&16_777_251u32.to_be_bytes());
    expect("no route for S6a", &other, 3_007);
    let mut broken = good.clone();
    broken[27] = 3;
    expect("an AVP that is too short", &broken, 5_014);
    expect("still there", &good, 2_001);
    let (_, metrics) = edge.get("/metrics").expect("an answer");
    assert!(metrics.contains("strowger_requests_total"), "{metrics}");
    // Lost framing is the one thing that costs the connection.
    assert!(connection.send(&[2; 24]));
    assert!(connection.next().is_none());
}

/// A frozen server is found out by its watchdog, and its requests go elsewhere.
#[test]
fn a_frozen_server_is_suspected() {
    let _alone = alone();
    let (port, one, two) = (free_port(), free_port(), free_port());
    let (first, second) =
        (Server::start(one, "a.example.net"), Server::start(two, "b.example.net"));
    let edge = Edge::start(&config(
        port,
        &[("a", one), ("b", two)],
        ", watchdog: 200ms, answer_timeout: 4s",
    ));
    up(&edge, &["a", "b"]);
    let mut connection = client(port, "client.example.net");
    // Whoever has the session freezes: it answers nothing, not even DWR.
    assert!(connection.send(&ccr("s;freeze", 1, "client.example.net", None, 1)));
    let owner = text(Summary::of(&connection.next().expect("an answer")).origin_host);
    let (owner, id) = if owner == "a.example.net" { (&first, "a") } else { (&second, "b") };
    owner.frozen.store(true, Ordering::Relaxed);
    let began = Instant::now();
    assert!(connection.send(&ccr("s;freeze", 2, "client.example.net", None, 2)));
    let answer = connection.next().expect("an answer");
    assert_eq!(Summary::of(&answer).result_code, Some(2_001));
    assert!(began.elapsed() < Duration::from_secs(3));
    assert!(edge.metric("strowger_retries_total", &["link_lost"]) > 0.0);
    assert_ne!(edge.instance("pcrf", id)["health"], "up");
    owner.frozen.store(false, Ordering::Relaxed);
    up(&edge, &[id]);
}

/// Erlang's diameter on both sides: capabilities, watchdog, accounting requests and their answers.
#[test]
fn erlangs_diameter_on_both_sides() {
    if !has("erl") || !has("erlc") {
        return;
    }
    let _alone = alone();
    let folder = tempfile::TempDir::new().expect("a folder");
    std::fs::write(folder.path().join("otp_peer.erl"), include_str!("peers/otp_peer.erl"))
        .expect("written");
    let compiled = Command::new("erlc")
        .arg("otp_peer.erl")
        .current_dir(folder.path())
        .output()
        .expect("it runs");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stdout));
    let (port, backend) = (free_port(), free_port());
    let erl = |name: &str, call: String| {
        let mut command = Command::new("erl");
        command.args(["-noshell", "-noinput", "-eval", &call]).current_dir(folder.path());
        Process::spawn(&mut command, &folder.path().join(name))
    };
    let _server = erl("server.log", format!("otp_peer:server({backend})."));
    wait_for_tcp(backend);
    let yaml = config(port, &[("a", backend)], ", applications: [acct], watchdog: 6s")
        .replace("application: [gx]", "application: [acct]");
    let edge = Edge::start(&yaml.replace(", origin_host: a.example.net }", " }"));
    up(&edge, &["a"]);
    let mut client = erl("client.log", format!("otp_peer:client({port}, 2000)."));
    let code = client.wait(Duration::from_secs(60));
    let log = std::fs::read_to_string(folder.path().join("client.log")).unwrap_or_default();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("2000 answered"), "{log}");
    assert_eq!(edge.metric("strowger_requests_total", &["met"]), 2_000.0);
}
