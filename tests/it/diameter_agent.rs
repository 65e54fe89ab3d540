//! The routing agent through the binary: subscribers, failures, redirects, and who may connect.

use std::collections::{HashMap, HashSet};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use strowger_diameter::avp::{
    Avps, FLAG_ERROR, FLAG_PROXIABLE, FLAG_REQUEST, FLAG_RETRANSMITTED, Header, Summary, code,
};
use strowger_diameter::build::{Builder, append};

use crate::diameter::{Connection, GX, capabilities, ccr, client, error_message, text, up};
use crate::harness::{Edge, alone, free_port};

const RX: u32 = 16_777_236;
const AAR: u32 = 265;
const CCR: u32 = 272;
const CER: u32 = 257;
const DWR: u32 = 280;
pub(crate) const DPR: u32 = 282;
const FRAMED_IP: u32 = 8;

pub(crate) fn config(port: u16, servers: &[(&str, u16)], options: &str, pool: &str) -> String {
    let list: Vec<String> = servers
        .iter()
        .map(|(id, port)| {
            format!(
                "      - {{ id: {id}, address: tcp://127.0.0.1:{port}, origin_host: {id}.example.net }}\n"
            )
        })
        .collect();
    format!(
        "version: 1\nnode: {{ workers: 2, realm: example.net }}\nadmin: {{ listen: ADMIN }}\nclasses:\n  setup: {{ deadline: 5s }}\n  in-session: {{ deadline: 5s, retry: 2 }}\nlisteners:\n  - name: dra\n    protocol: diameter\n    bind: [tcp://127.0.0.1:{port}]\n    options: {{ origin_host: edge.example.net, watchdog: 500ms{options} }}\n    pool: pcrf\npools:\n  pcrf:\n{pool}    backends:\n{}",
        list.concat()
    )
}

/// What a server says to a request; `None`: nothing.
type Answer = dyn Fn(&Peer, &Header, &[u8]) -> Option<Vec<u8>> + Send + Sync;

/// A server whose answers are a test's.
#[derive(Clone)]
pub(crate) struct Peer {
    host: &'static str,
    state_id: Arc<AtomicU32>,
    pub(crate) mute: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<Vec<u8>>>>,
    /// Addresses of its sessions.
    addresses: Arc<Mutex<HashSet<Vec<u8>>>>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    answer: Arc<Answer>,
}

impl Peer {
    pub(crate) fn start(
        port: u16,
        host: &'static str,
        answer: impl Fn(&Self, &Header, &[u8]) -> Option<Vec<u8>> + Send + Sync + 'static,
    ) -> Self {
        let peer = Self {
            host,
            state_id: Arc::new(AtomicU32::new(100)),
            mute: Arc::default(),
            seen: Arc::default(),
            addresses: Arc::default(),
            streams: Arc::default(),
            answer: Arc::new(answer),
        };
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("a free port");
        let shared = peer.clone();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let handle = stream.try_clone().expect("a handle");
                shared.streams.lock().expect("not poisoned").push(handle);
                let peer = shared.clone();
                thread::spawn(move || peer.serve(Connection::new(stream)));
            }
        });
        peer
    }

    fn serve(&self, mut connection: Connection) {
        while let Some(message) = connection.next_of_any() {
            let header = Header::read(&message).expect("framed");
            if !header.is_request() {
                continue;
            }
            let answer = match header.command {
                CER => Some(self.introduce(&header)),
                DWR | DPR => Some(self.plain(&header, &message, 2_001)),
                _ => {
                    self.seen.lock().expect("not poisoned").push(message.clone());
                    if self.mute.load(Ordering::Relaxed) {
                        None
                    } else {
                        (self.answer)(self, &header, &message)
                    }
                }
            };
            if answer.is_some_and(|answer| !connection.send(&answer)) || header.command == DPR {
                return;
            }
        }
    }

    /// A CEA of a server that does everything.
    fn introduce(&self, header: &Header) -> Vec<u8> {
        let mut bytes = Vec::new();
        Builder::new(&mut bytes, 0, CER, 0, header.hop_by_hop, header.end_to_end)
            .number(code::RESULT_CODE, 2_001)
            .text(code::ORIGIN_HOST, self.host)
            .text(code::ORIGIN_REALM, "example.net")
            .number(code::VENDOR_ID, 0)
            .text(code::PRODUCT_NAME, "test")
            .number(code::ORIGIN_STATE_ID, self.state_id.load(Ordering::Relaxed))
            .application(u32::MAX)
            .finish();
        bytes
    }

    /// An answer with nothing but a result.
    pub(crate) fn plain(&self, header: &Header, message: &[u8], result: u32) -> Vec<u8> {
        self.answer(header, message, result, &[])
    }

    pub(crate) fn answer(
        &self,
        header: &Header,
        message: &[u8],
        result: u32,
        more: &[u8],
    ) -> Vec<u8> {
        let error = if (3_000..4_000).contains(&result) { FLAG_ERROR } else { 0 };
        let (hop, end) = (header.hop_by_hop, header.end_to_end);
        let flags = header.flags & FLAG_PROXIABLE | error;
        let mut bytes = Vec::new();
        let mut builder =
            Builder::new(&mut bytes, flags, header.command, header.application, hop, end);
        if let Some(session) = Summary::of(message).session_id {
            builder = builder.bytes(code::SESSION_ID, session);
        }
        builder
            .number(code::RESULT_CODE, result)
            .text(code::ORIGIN_HOST, self.host)
            .text(code::ORIGIN_REALM, "example.net")
            .raw(more)
            .finish();
        bytes
    }

    /// It dies, and is another process when it comes back: new state, no sessions.
    fn restart(&self) {
        self.state_id.fetch_add(1, Ordering::Relaxed);
        self.addresses.lock().expect("not poisoned").clear();
        self.cut();
    }

    /// All its connections are lost at once.
    pub(crate) fn cut(&self) {
        for stream in self.streams.lock().expect("not poisoned").drain(..) {
            let _gone = stream.shutdown(Shutdown::Both);
        }
    }

    pub(crate) fn requests(&self) -> Vec<Vec<u8>> {
        self.seen.lock().expect("not poisoned").clone()
    }
}

pub(crate) fn data(message: &[u8], wanted: u32) -> Option<Vec<u8>> {
    let mut avps = Avps::of(message).map_while(Result::ok);
    avps.find(|avp| avp.is(wanted)).map(|avp| avp.data.to_vec())
}

pub(crate) fn good(peer: &Peer, header: &Header, message: &[u8]) -> Option<Vec<u8>> {
    Some(peer.plain(header, message, 2_001))
}

/// A policy server: Gx sessions bind addresses; Rx of an address that it does not have fails.
fn policy(peer: &Peer, header: &Header, message: &[u8]) -> Option<Vec<u8>> {
    let address = data(message, FRAMED_IP);
    let mut held = peer.addresses.lock().expect("not poisoned");
    let result = match (header.application, address) {
        (GX, Some(address)) if Summary::of(message).cc_request_type == Some(1) => {
            held.insert(address);
            2_001
        }
        (GX, Some(address)) => {
            held.remove(&address);
            2_001
        }
        (RX, Some(address)) if held.contains(&address) => 2_001,
        (RX, _) => 5_999,
        _ => 2_001,
    };
    drop(held);
    Some(peer.plain(header, message, result))
}

fn subscription(imsi: &str) -> Vec<u8> {
    let (mut group, mut avp) = (Vec::new(), Vec::new());
    append(&mut group, 450, 0x40, &1u32.to_be_bytes());
    append(&mut group, 444, 0x40, imsi.as_bytes());
    append(&mut avp, 443, 0x40, &group);
    avp
}

pub(crate) fn gx(
    host: &str,
    session: &str,
    kind: u32,
    imsi: &str,
    ip: u32,
    number: u32,
) -> Vec<u8> {
    let mut bytes = Vec::new();
    Builder::request(&mut bytes, CCR, GX, number, number)
        .text(code::SESSION_ID, session)
        .text(code::ORIGIN_HOST, host)
        .text(code::ORIGIN_REALM, "example.net")
        .text(code::DESTINATION_REALM, "example.net")
        .number(code::CC_REQUEST_TYPE, kind)
        .raw(&subscription(imsi))
        .bytes(FRAMED_IP, &ip.to_be_bytes())
        .finish();
    bytes
}

fn rx(host: &str, session: &str, ip: u32, number: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    Builder::request(&mut bytes, AAR, RX, number, number)
        .text(code::SESSION_ID, session)
        .text(code::ORIGIN_HOST, host)
        .text(code::ORIGIN_REALM, "example.net")
        .text(code::DESTINATION_REALM, "example.net")
        .bytes(FRAMED_IP, &ip.to_be_bytes())
        .finish();
    bytes
}

/// Sends requests, so many under way at a time; the answers by End-to-End identifier.
pub(crate) fn exchange(connection: &mut Connection, requests: &[Vec<u8>]) -> HashMap<u32, Vec<u8>> {
    const UNDER_WAY: usize = 50;
    let (mut sent, mut answers) = (0, HashMap::new());
    while answers.len() < requests.len() {
        while sent < requests.len() && sent < answers.len() + UNDER_WAY {
            assert!(connection.send(&requests[sent]));
            sent += 1;
        }
        let answer = connection.next().expect("an answer");
        let header = Header::read(&answer).expect("framed");
        if !header.is_request() {
            assert!(answers.insert(header.end_to_end, answer).is_none(), "answered twice");
        }
    }
    answers
}

pub(crate) fn result(answer: &[u8]) -> u32 {
    Summary::of(answer).result_code.unwrap_or(0)
}

/// 10,000 subscribers on three policy servers; their applications know them by address only. Servers
/// restart: no Rx request reaches one that does not have the session.
#[test]
fn rx_follows_gx_by_address_alone() {
    const SUBSCRIBERS: u32 = 10_000;
    let _alone = alone();
    let port = free_port();
    let ports = [free_port(), free_port(), free_port()];
    let hosts = ["a.example.net", "b.example.net", "c.example.net"];
    let servers: Vec<Peer> =
        ports.iter().zip(hosts).map(|(&port, host)| Peer::start(port, host, policy)).collect();
    let list = [("a", ports[0]), ("b", ports[1]), ("c", ports[2])];
    let yaml = config(
        port,
        &list,
        ", bindings: { missing: 3002 }",
        "    balance: round-robin\n    bind_keys: [imsi, framed-ip]\n",
    );
    // One connection is silent while the other is used.
    let edge = Edge::start(&yaml.replace("watchdog: 500ms", "watchdog: 60s"));
    up(&edge, &["a", "b", "c"]);
    let (gateway, af) = ("pgw.example.net", "pcscf.example.net");
    let (mut gx_link, mut rx_link) = (client(port, gateway), client(port, af));
    let imsi = |number: u32| format!("00101{number:010}");
    let requests: Vec<Vec<u8>> = (0..SUBSCRIBERS)
        .map(|number| gx(gateway, &format!("gx;{number}"), 1, &imsi(number), number, number))
        .collect();
    let begun = exchange(&mut gx_link, &requests);
    let owner: Vec<String> =
        (0..SUBSCRIBERS).map(|number| text(Summary::of(&begun[&number]).origin_host)).collect();
    for host in hosts {
        let count = owner.iter().filter(|owner| *owner == host).count();
        assert!(count > 3_000, "{host} has {count}");
    }
    let ask = |link: &mut Connection, round: u32| {
        let requests: Vec<Vec<u8>> = (0..SUBSCRIBERS)
            .map(|number| {
                let identifier = (round << 20) + number;
                rx(af, &format!("rx;{round};{number}"), number, identifier)
            })
            .collect();
        exchange(link, &requests)
    };
    for (identifier, answer) in ask(&mut rx_link, 1) {
        let number = (identifier & 0xfffff) as usize;
        assert_eq!(result(&answer), 2_001, "{}", error_message(&answer));
        assert_eq!(text(Summary::of(&answer).origin_host), owner[number]);
    }
    // One restarts: its subscribers have no server any more, the others' have theirs.
    servers[1].restart();
    edge.until("the restart to be seen", |edge| {
        edge.metric("strowger_protocol_total", &["diameter_peer_restarted"]) > 0.0
    });
    up(&edge, &["a", "b", "c"]);
    for (identifier, answer) in ask(&mut rx_link, 2) {
        let number = (identifier & 0xfffff) as usize;
        let wanted = if owner[number] == hosts[1] { 3_002 } else { 2_001 };
        assert_eq!(result(&answer), wanted, "{number}: {}", error_message(&answer));
    }
    // They come back, by new sessions; and a hundred addresses are given to others.
    let again: Vec<Vec<u8>> = (0..SUBSCRIBERS)
        .filter(|&number| owner[number as usize] == hosts[1])
        .map(|number| gx(gateway, &format!("gx;{number};2"), 1, &imsi(number), number, number))
        .collect();
    exchange(&mut gx_link, &again);
    let ended: Vec<Vec<u8>> = (0..100)
        .map(|number| {
            gx(gateway, &format!("gx;{number};3"), 1, &imsi(900_000 + number), number, number)
        })
        .collect();
    exchange(&mut gx_link, &ended);
    for (identifier, answer) in ask(&mut rx_link, 3) {
        assert_eq!(result(&answer), 2_001, "{identifier}: {}", error_message(&answer));
    }
    // The same subscriber on two connections at once: one server.
    let mut second = client(port, "pgw2.example.net");
    let pair = |host: &str, side: u32| -> Vec<Vec<u8>> {
        (0..500)
            .map(|number| {
                let session = format!("{host};{number}");
                gx(host, &session, 1, &imsi(500_000 + number), 500_000 + number * 2 + side, number)
            })
            .collect()
    };
    let (one, two) = (pair(gateway, 0), pair("pgw2.example.net", 1));
    let other = thread::spawn(move || exchange(&mut second, &two));
    let (one, two) = (exchange(&mut gx_link, &one), other.join().expect("it ends"));
    for number in 0..500 {
        let host =
            |answers: &HashMap<u32, Vec<u8>>| text(Summary::of(&answers[&number]).origin_host);
        assert_eq!(host(&one), host(&two), "{number}");
    }
    // The end of a session ends its binding.
    let end = gx(gateway, "gx;7777", 3, &imsi(7_777), 7_777, 1);
    let last = if owner[7_777] == hosts[1] { "gx;7777;2" } else { "gx;7777" };
    let end = if last == "gx;7777" { end } else { gx(gateway, last, 3, &imsi(7_777), 7_777, 1) };
    exchange(&mut gx_link, &[end]);
    let after = exchange(&mut rx_link, &[rx(af, "rx;after", 7_777, 1)]);
    assert_eq!(result(&after[&1]), 3_002);
    let bindings = &edge.json("/api/v1/peers")["bindings"];
    assert!(bindings["live"].as_u64().is_some_and(|live| live > 10_000), "{bindings}");
}

/// A server that takes everything and answers nothing, though its watchdog is well: it is out within
/// the configured time, and the others' sessions do not notice.
#[test]
fn a_server_that_owes_answers_is_out_of_rotation() {
    let _alone = alone();
    let (port, one, two) = (free_port(), free_port(), free_port());
    let (first, second) =
        (Peer::start(one, "a.example.net", good), Peer::start(two, "b.example.net", good));
    let edge = Edge::start(&config(
        port,
        &[("a", one), ("b", two)],
        ", stalled: 300ms, answer_timeout: 4s",
        "    balance: round-robin\n",
    ));
    up(&edge, &["a", "b"]);
    let host = "client.example.net";
    let mut connection = client(port, host);
    first.mute.store(true, Ordering::Relaxed);
    let began = Instant::now();
    let requests: Vec<Vec<u8>> =
        (0..200).map(|number| ccr(&format!("s;{number}"), 1, host, None, number)).collect();
    let answers = exchange(&mut connection, &requests);
    for answer in answers.values() {
        assert_eq!(result(answer), 2_001, "{}", error_message(answer));
        assert_eq!(text(Summary::of(answer).origin_host), "b.example.net");
    }
    // The answer timer is 4 s: it was not that which moved them.
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    let events = edge.metric("strowger_events_total", &["diameter_stalled"]);
    assert!(events > 0.0, "{}", edge.log());
    let muted = first.requests().len();
    assert!(muted > 0 && muted < 120, "it got {muted}");
    let again = second.requests();
    let flagged = again.iter().filter(|message| message[4] & FLAG_RETRANSMITTED != 0).count();
    assert_eq!(flagged, muted, "what it had got was sent again with T, and nothing else was");
    first.mute.store(false, Ordering::Relaxed);
    up(&edge, &["a"]);
}

/// Who may connect, and when.
#[test]
fn strangers_are_refused() {
    let _alone = alone();
    let (port, one) = (free_port(), free_port());
    let options = ", peers: [\"*.example.net\"], peer_connections: 2, wait_for_backends: 1, advertise_relay: false, applications: [gx]";
    let edge = Edge::start(&config(port, &[("a", one)], options, ""));
    let refused = |host: &str| {
        let mut connection = Connection::open(port);
        assert!(connection.send(&capabilities(FLAG_REQUEST, host, None)));
        let cea = connection.next().expect("a CEA");
        let result = result(&cea);
        if result == 2_001 { (result, Some(connection)) } else { (result, None) }
    };
    assert_eq!(refused("client.example.net").0, 3_004, "no server is open yet");
    let _server = Peer::start(one, "a.example.net", good);
    up(&edge, &["a"]);
    assert_eq!(refused("client.other.net").0, 3_010);
    assert_eq!(refused("example.net").0, 3_010);
    let (first, second) = (refused("CLIENT.example.net"), refused("client.example.net"));
    assert_eq!((first.0, second.0), (2_001, 2_001));
    assert_eq!(refused("client.example.net").0, 4_003, "it has two");
    let peers = edge.json("/api/v1/peers")["peers"].clone();
    let clients = peers.as_array().into_iter().flatten().filter(|peer| peer["role"] == "client");
    assert_eq!(clients.count(), 2, "{peers}");
    // Only Rx in common with nobody.
    let mut connection = Connection::open(port);
    let mut cer = Vec::new();
    Builder::new(&mut cer, FLAG_REQUEST, CER, 0, 1, 1)
        .text(code::ORIGIN_HOST, "af.example.net")
        .text(code::ORIGIN_REALM, "example.net")
        .application(RX)
        .finish();
    assert!(connection.send(&cer));
    assert_eq!(result(&connection.next().expect("a CEA")), 5_010);
    drop(first);
    edge.until("the place to be free", |_| refused("client.example.net").0 == 2_001);
}

/// Redirect indications are followed and kept; an answer of a listed code goes to another server,
/// without T; anything else goes back as it came.
#[test]
fn redirects_and_reroutes() {
    let _alone = alone();
    let (port, one, two) = (free_port(), free_port(), free_port());
    let redirecting = Peer::start(one, "a.example.net", |peer, header, message| {
        let session = text(Summary::of(message).session_id);
        let mut more = Vec::new();
        append(&mut more, code::REDIRECT_HOST, 0x40, b"aaa://b.example.net:3868;transport=tcp");
        append(&mut more, code::REDIRECT_HOST_USAGE, 0x40, &3u32.to_be_bytes());
        append(&mut more, code::REDIRECT_MAX_CACHE_TIME, 0x40, &60u32.to_be_bytes());
        Some(match session.as_str() {
            "busy" => peer.plain(header, message, 3_004),
            "special" => peer.plain(header, message, 5_999),
            "other" => peer.plain(header, message, 5_998),
            _ => peer.answer(header, message, 3_006, &more),
        })
    });
    let second = Peer::start(two, "b.example.net", good);
    let options = ", reroute_on: [3004, { application: gx, code: 5999 }]";
    let yaml = config(port, &[("a", one), ("b", two)], options, "    balance: priority\n")
        .replace("a.example.net }", "a.example.net, priority: 1 }")
        .replace("b.example.net }", "b.example.net, priority: 2 }");
    let edge = Edge::start(&yaml);
    up(&edge, &["a", "b"]);
    let host = "client.example.net";
    let mut connection = client(port, host);
    let mut ask = |session: &str, number: u32| {
        let answers = exchange(&mut connection, &[ccr(session, 1, host, None, number)]);
        (result(&answers[&number]), text(Summary::of(&answers[&number]).origin_host))
    };
    let at = |host: &str, result: u32| (result, host.to_owned());
    assert_eq!(ask("busy", 1), at("b.example.net", 2_001));
    assert_eq!(ask("special", 2), at("b.example.net", 2_001));
    assert_eq!(ask("other", 3), at("a.example.net", 5_998));
    assert_eq!(ask("redirected", 4), at("b.example.net", 2_001));
    assert_eq!(ask("kept", 5), at("b.example.net", 2_001));
    assert_eq!(redirecting.requests().len(), 4, "the fifth went by what was kept");
    for message in second.requests() {
        assert_eq!(message[4] & FLAG_RETRANSMITTED, 0, "an answer had been received");
    }
    assert_eq!(edge.metric("strowger_retries_total", &["redirected"]), 1.0);
    assert_eq!(edge.metric("strowger_retries_total", &["answered_busy"]), 1.0);
}

/// A server that restarted under its old name: its sessions are lost, and nobody else gets them.
/// Applications without state leave nothing behind that a drain would wait for.
#[test]
fn restarts_and_stateless_applications() {
    let _alone = alone();
    let (port, one, two) = (free_port(), free_port(), free_port());
    let servers =
        [Peer::start(one, "a.example.net", good), Peer::start(two, "b.example.net", good)];
    let edge = Edge::start(&config(port, &[("a", one), ("b", two)], "", ""));
    up(&edge, &["a", "b"]);
    let host = "client.example.net";
    let mut connection = client(port, host);
    let begun = exchange(&mut connection, &[ccr("s;1", 1, host, None, 1)]);
    let owner = text(Summary::of(&begun[&1]).origin_host);
    let (server, id) =
        if owner == "a.example.net" { (&servers[0], "a") } else { (&servers[1], "b") };
    server.restart();
    edge.until("the restart to be seen", |edge| {
        edge.metric("strowger_protocol_total", &["diameter_peer_restarted"]) > 0.0
    });
    up(&edge, &[id]);
    let before: usize = servers.iter().map(|server| server.requests().len()).sum();
    let lost = exchange(&mut connection, &[ccr("s;1", 2, host, None, 2)]);
    assert_eq!(result(&lost[&2]), 3_002, "{}", error_message(&lost[&2]));
    let after: usize = servers.iter().map(|server| server.requests().len()).sum();
    assert_eq!(before, after, "nobody got a message of the lost session");
    // S6a: a session of one request each.
    let locate: Vec<Vec<u8>> = (10..60u32)
        .map(|number| {
            let mut bytes = Vec::new();
            Builder::request(&mut bytes, 316, 16_777_251, number, number)
                .text(code::SESSION_ID, &format!("ulr;{number}"))
                .number(code::AUTH_SESSION_STATE, 1)
                .text(code::ORIGIN_HOST, host)
                .text(code::ORIGIN_REALM, "example.net")
                .text(code::DESTINATION_REALM, "example.net")
                .finish();
            bytes
        })
        .collect();
    let sessions = |edge: &Edge| {
        ["a", "b"]
            .iter()
            .filter_map(|id| edge.instance("pcrf", id)["sessions"].as_u64())
            .sum::<u64>()
    };
    let before = sessions(&edge);
    for answer in exchange(&mut connection, &locate).values() {
        assert_ne!(result(answer), 0);
    }
    assert_eq!(sessions(&edge), before, "nothing is remembered of them");
}

/// Overload reports (RFC 7683): what must not go to a server goes to another as long as the report
/// holds; the features are told in requests.
#[test]
fn overload_reports_are_honoured() {
    let _alone = alone();
    let (port, one, two) = (free_port(), free_port(), free_port());
    let first = Peer::start(one, "a.example.net", |peer, header, message| {
        let (mut group, mut avp) = (Vec::new(), Vec::new());
        append(&mut group, code::OC_SEQUENCE_NUMBER, 0, &7u64.to_be_bytes());
        append(&mut group, code::OC_REPORT_TYPE, 0, &0u32.to_be_bytes());
        append(&mut group, code::OC_REDUCTION_PERCENTAGE, 0, &100u32.to_be_bytes());
        append(&mut group, code::OC_VALIDITY_DURATION, 0, &3u32.to_be_bytes());
        append(&mut avp, code::OC_OLR, 0, &group);
        Some(peer.answer(header, message, 2_001, &avp))
    });
    let _second = Peer::start(two, "b.example.net", good);
    let options = ", overload: { doic: true }";
    let yaml = config(port, &[("a", one), ("b", two)], options, "    balance: priority\n")
        .replace("a.example.net }", "a.example.net, priority: 1 }")
        .replace("b.example.net }", "b.example.net, priority: 2 }");
    let edge = Edge::start(&yaml);
    up(&edge, &["a", "b"]);
    let host = "client.example.net";
    let mut connection = client(port, host);
    let mut number = 0;
    let mut ask = || {
        number += 1;
        let asked = ccr(&format!("s;{number}"), 1, host, None, number);
        text(Summary::of(&exchange(&mut connection, &[asked])[&number]).origin_host)
    };
    assert_eq!(ask(), "a.example.net");
    let reported = Instant::now();
    for _ in 0..50 {
        let owner = ask();
        // On a slow machine the report may be over before the fifty are.
        assert!(owner == "b.example.net" || reported.elapsed() > Duration::from_secs(2));
    }
    let first_request = first.requests()[0].clone();
    assert!(Summary::of(&first_request).tells_features);
    let end = Instant::now() + Duration::from_secs(20);
    while ask() != "a.example.net" {
        assert!(Instant::now() < end, "the report never ends");
        thread::sleep(Duration::from_millis(100));
    }
    assert!(reported.elapsed() >= Duration::from_millis(2_900));
}
