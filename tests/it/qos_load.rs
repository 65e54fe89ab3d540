//! Overload on real sockets: backends of fixed concurrency behind the binary, five classes at twice
//! what the backends can do, by deadlines and in FIFO. Sums and orders are asserted, never times: how
//! fast the machine is changes how much is met, not who goes first.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use strowger_diameter::avp::{Header, code};
use strowger_diameter::build::Builder;

use crate::diameter::{client, up};
use crate::diameter_agent::{Peer, good};
use crate::harness::{Edge, alone, free_port};

/// What one request takes of a backend's slot.
pub(crate) const SERVICE: Duration = Duration::from_millis(20);

/// Slots of the backend.
pub(crate) const SLOTS: usize = 4;

/// How long requests come.
const LASTING: Duration = Duration::from_secs(3);

/// The classes by their share of a hundred requests; the shares of DESIGN section 5, but for more
/// emergencies, so that in so short a time there are some.
pub(crate) const MIX: [(&str, usize); 5] =
    [("emergency", 4), ("in-session", 41), ("setup", 30), ("mobility", 15), ("bulk", 10)];

const OUTCOMES: [&str; 5] = ["met", "late", "rejected", "expired", "failed"];

/// What became of the requests of each class, as the edge counts it.
pub(crate) type Told = BTreeMap<&'static str, BTreeMap<&'static str, f64>>;

/// What was sent.
pub(crate) struct Arrivals {
    of_class: BTreeMap<&'static str, f64>,
    /// Whether this side kept its pace: if it did not, there was less of an overload.
    in_time: bool,
}

/// Budgets that a slow machine does not eat up by itself, in the order of the defaults.
pub(crate) const CLASSES: &str = "classes:\n  emergency: { deadline: 400ms }\n  in-session: { deadline: 500ms }\n  setup: { deadline: 500ms }\n  mobility: { deadline: 700ms }\n  bulk: { deadline: 1s }\n";

/// The class of the request of that number: well mixed, and the same in every run.
fn class_of(number: usize) -> &'static str {
    let mut place = number * 37 % 100;
    for (class, share) in MIX {
        if place < share {
            return class;
        }
        place -= share;
    }
    unreachable!("the shares are a hundred")
}

/// How long one request takes of a slot; [`SERVICE`] in the mean.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Fixed,
    Exponential,
    /// Nine in ten take two fifths of the mean, one takes 6.4 times it.
    Bimodal,
}

/// What comes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// In parts of what the backend can do.
    pub(crate) load: f64,
    pub(crate) lasting: Duration,
    pub(crate) kind: Kind,
    /// Another load between these two moments.
    pub(crate) spike: Option<(Duration, Duration, f64)>,
}

/// Twice what the backend can do.
const TWICE: Plan = Plan { load: 2.0, lasting: LASTING, kind: Kind::Fixed, spike: None };

/// Between 0 and 1, the same for the same number.
fn unit(number: usize) -> f64 {
    let mut bits = (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    (((bits ^ bits >> 31) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

impl Kind {
    /// The service time of the request that the backend serves as that number.
    pub(crate) fn time(self, number: usize) -> Duration {
        let dice = unit(number + 1_000_000);
        SERVICE.mul_f64(match self {
            Self::Fixed => 1.0,
            Self::Exponential => -dice.ln(),
            Self::Bimodal if dice < 0.1 => 6.4,
            Self::Bimodal => 0.4,
        })
    }
}

/// Calls `send` at intended times, Poisson, whether or not answers come; how often of each class.
pub(crate) fn open_loop(plan: Plan, mut send: impl FnMut(usize, &'static str)) -> Arrivals {
    let rate = SLOTS as f64 / SERVICE.as_secs_f64();
    let (began, mut arrivals) = (Instant::now(), BTreeMap::new());
    let (mut at, mut number) = (Duration::ZERO, 0);
    while at < plan.lasting {
        thread::sleep((began + at).saturating_duration_since(Instant::now()));
        send(number, class_of(number));
        *arrivals.entry(class_of(number)).or_insert(0.0) += 1.0;
        let load = match plan.spike {
            Some((from, until, load)) if (from..until).contains(&at) => load,
            _ => plan.load,
        };
        at += Duration::from_secs_f64(-unit(number).ln() / rate / load);
        number += 1;
    }
    Arrivals { of_class: arrivals, in_time: began.elapsed() < plan.lasting * 5 / 4 }
}

/// Waits until each request has its outcome; what they are.
fn outcomes(edge: &Edge, Arrivals { of_class: arrivals, .. }: &Arrivals) -> Told {
    let count = |class: &str, outcome: &str| {
        let labels = [format!("class=\"{class}\""), format!("outcome=\"{outcome}\"")];
        edge.metric("strowger_requests_total", &[&labels[0], &labels[1]]) + 0.0
    };
    let all = |class: &str| OUTCOMES.iter().map(|outcome| count(class, outcome)).sum::<f64>();
    edge.until("each request to have its outcome", |_| {
        arrivals.iter().all(|(class, arrived)| all(class) >= *arrived)
    });
    let told = |(class, arrived): (&&'static str, &f64)| {
        let by_outcome: BTreeMap<_, _> =
            OUTCOMES.iter().map(|outcome| (*outcome, count(class, outcome))).collect();
        assert_eq!(by_outcome.values().sum::<f64>(), *arrived, "{class}: {by_outcome:?}");
        (*class, by_outcome)
    };
    arrivals.iter().map(told).collect()
}

pub(crate) fn share_met(told: &Told, class: &str) -> f64 {
    let outcomes = &told[class];
    outcomes["met"] / outcomes.values().sum::<f64>().max(1.0)
}

fn met(told: &Told) -> f64 {
    told.values().map(|outcomes| outcomes["met"]).sum()
}

/// Who goes first, and that it is worth it.
fn judge(name: &str, edge: &Edge, ours: &Told, fifo: &Told, in_time: bool) {
    for (policy, told) in [("deadline", ours), ("fifo", fifo)] {
        let shares: Vec<String> =
            MIX.iter().map(|(class, _)| format!("{class} {:.3}", share_met(told, class))).collect();
        println!("{name} {policy}: {} met {}", shares.join(", "), met(told));
    }
    let tier_0 = share_met(ours, "emergency").min(share_met(ours, "in-session"));
    let tier_3 = share_met(ours, "bulk");
    assert!(tier_0 >= tier_3, "{name}: tier 0 goes before tier 3: {ours:?}");
    assert!(tier_0 >= share_met(ours, "mobility"), "{name}: and before tier 2: {ours:?}");
    let theirs = share_met(fifo, "in-session");
    assert!(tier_0 >= theirs, "{name}: FIFO keeps no promise: {tier_0} {theirs}");
    let refused = ours["bulk"]["rejected"] + ours["mobility"]["rejected"];
    assert!(!in_time || refused > 0.0, "{name}: {ours:?}");
    assert_eq!(edge.metric("strowger_queue_depth", &[]), 0.0, "{name}: nobody is left waiting");
}

pub(crate) fn qos(policy: &str) -> String {
    format!("    qos: {{ policy: {policy} }}\n")
}

#[test]
fn tcp_connections_by_class_at_twice_the_capacity() {
    let _alone = alone();
    let (_, fifo, _) = tcp("fifo", TWICE);
    let (edge, ours, in_time) = tcp("deadline", TWICE);
    judge("tcp", &edge, &ours, &fifo, in_time);
}

/// A server that takes a connection for its service time, and says when it begins.
pub(crate) fn server_of_connections(kind: Kind) -> u16 {
    let port = free_port();
    let listener = TcpListener::bind(("127.0.0.1", port)).expect("a free port");
    thread::spawn(move || {
        for (number, stream) in listener.incoming().flatten().enumerate() {
            thread::spawn(move || {
                let mut stream = stream;
                let _gone = stream.write_all(b"k");
                thread::sleep(kind.time(number));
            });
        }
    });
    port
}

/// A listener of each class.
pub(crate) fn edge_of_connections(
    policy: &str,
    backend: u16,
) -> (Edge, BTreeMap<&'static str, u16>) {
    let ports: BTreeMap<&str, u16> = MIX.iter().map(|(class, _)| (*class, free_port())).collect();
    let listeners: String = ports
        .iter()
        .map(|(class, port)| format!("  - {{ name: {class}, protocol: tcp, bind: [tcp://127.0.0.1:{port}], pool: db, classify: [{{ class: {class} }}] }}\n"))
        .collect();
    let edge = Edge::start(&format!(
        "version: 1\nnode: {{ workers: 2 }}\nadmin: {{ listen: ADMIN }}\n{CLASSES}listeners:\n{listeners}pools:\n  db:\n{}    backends: [{{ id: a, address: tcp://127.0.0.1:{backend}, capacity: {SLOTS} }}]\n",
        qos(policy)
    ));
    (edge, ports)
}

/// A connection as its client saw it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub(crate) class: &'static str,
    /// From the run's begin.
    pub(crate) born: Duration,
    /// How long the server's first byte took to come, if it came.
    pub(crate) served: Option<Duration>,
    /// How long it lasted.
    pub(crate) ended: Duration,
}

/// Connects by the plan, and waits until each connection has ended by itself, served and closed, or
/// reset. It is let go at once: a proxy gives a slot back when both sides have ended.
pub(crate) fn connects(plan: Plan, ports: &BTreeMap<&'static str, u16>) -> (Arrivals, Vec<Seen>) {
    let (give, take) = mpsc::channel::<(TcpStream, Seen, Instant)>();
    let reader = thread::spawn(move || {
        let (mut open, mut more) = (Vec::<(TcpStream, Seen, Instant)>::new(), true);
        let mut ended = Vec::new();
        while more || !open.is_empty() {
            loop {
                match take.try_recv() {
                    Ok(one) => open.push(one),
                    Err(mpsc::TryRecvError::Empty) => break,
                    Err(mpsc::TryRecvError::Disconnected) => {
                        more = false;
                        break;
                    }
                }
            }
            open.retain_mut(|(stream, seen, began)| {
                let goes_on = loop {
                    match stream.read(&mut [0; 8]) {
                        Ok(0) => break false,
                        Ok(_) => {
                            seen.served.get_or_insert_with(|| began.elapsed());
                        }
                        Err(error) => break error.kind() == ErrorKind::WouldBlock,
                    }
                };
                if !goes_on {
                    seen.ended = began.elapsed();
                    ended.push(*seen);
                }
                goes_on
            });
            thread::sleep(Duration::from_millis(1));
        }
        ended
    });
    let start = Instant::now();
    let arrivals = open_loop(plan, |_, class| {
        let began = Instant::now();
        let stream = TcpStream::connect(("127.0.0.1", ports[class])).expect("it accepts");
        stream.set_nonblocking(true).expect("an option");
        let seen = Seen { class, born: began - start, served: None, ended: Duration::ZERO };
        give.send((stream, seen, began)).expect("the reader lives");
    });
    drop(give);
    (arrivals, reader.join().expect("all ended"))
}

/// Connections by a policy.
pub(crate) fn tcp(policy: &str, plan: Plan) -> (Edge, Told, bool) {
    let (edge, ports) = edge_of_connections(policy, server_of_connections(plan.kind));
    let (arrivals, _) = connects(plan, &ports);
    let told = outcomes(&edge, &arrivals);
    (edge, told, arrivals.in_time)
}

#[test]
fn sip_requests_by_class_at_twice_the_capacity() {
    let _alone = alone();
    let (_, fifo, _) = sip("fifo", TWICE);
    let (edge, ours, in_time) = sip("deadline", TWICE);
    judge("sip", &edge, &ours, &fifo, in_time);
}

/// MESSAGE requests over UDP by a policy.
pub(crate) fn sip(policy: &str, plan: Plan) -> (Edge, Told, bool) {
    let server = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    let instance = server.local_addr().expect("an address");
    let served = Arc::new(AtomicUsize::new(0));
    for _ in 0..SLOTS {
        let served = Arc::clone(&served);
        let server = server.try_clone().expect("a socket");
        thread::spawn(move || {
            let mut bytes = [0; 8_192];
            while let Ok((count, from)) = server.recv_from(&mut bytes) {
                thread::sleep(plan.kind.time(served.fetch_add(1, Ordering::Relaxed)));
                let answer = crate::qos::ok(&String::from_utf8_lossy(&bytes[..count]));
                let _gone = server.send_to(answer.as_bytes(), from);
            }
        });
    }
    let rules: String = MIX
        .iter()
        .map(|(class, _)| {
            format!("      - {{ match: {{ header: {{ X-Class: {class} }} }}, class: {class} }}\n")
        })
        .collect();
    let port = free_port();
    let edge = Edge::start(&format!(
        "version: 1\nnode: {{ workers: 2 }}\nadmin: {{ listen: ADMIN }}\n{CLASSES}listeners:\n  - name: sip\n    protocol: sip\n    bind: [udp://127.0.0.1:{port}]\n    pool: ims\n    classify:\n{rules}pools:\n  ims:\n{}    backends: [{{ id: a, address: udp://{instance}, capacity: {SLOTS} }}]\n",
        qos(policy)
    ));
    let client = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    client.connect(("127.0.0.1", port)).expect("an address");
    let me = client.local_addr().expect("an address");
    let arrivals = open_loop(plan, |number, class| {
        let text = format!(
            "MESSAGE sip:b@example.net SIP/2.0\r\nVia: SIP/2.0/UDP {me};branch=z9hG4bK{policy}{number}\r\nMax-Forwards: 70\r\nFrom: <sip:a@example.net>;tag=f\r\nTo: <sip:b@example.net>\r\nCall-ID: {policy}{number}\r\nCSeq: 1 MESSAGE\r\nX-Class: {class}\r\nContent-Length: 0\r\n\r\n"
        );
        client.send(text.as_bytes()).expect("sent");
    });
    let told = outcomes(&edge, &arrivals);
    (edge, told, arrivals.in_time)
}

#[test]
fn diameter_requests_by_class_at_twice_the_capacity() {
    let _alone = alone();
    let (_, fifo, _) = diameter("fifo", TWICE);
    let (edge, ours, in_time) = diameter("deadline", TWICE);
    judge("diameter", &edge, &ours, &fifo, in_time);
}

/// Credit control by a policy.
pub(crate) fn diameter(policy: &str, plan: Plan) -> (Edge, Told, bool) {
    let rules: String = MIX
        .iter()
        .map(|(class, _)| {
            format!("      - {{ match: {{ avp: [{{ path: \"8\", is: [{class}] }}] }}, class: {class} }}\n")
        })
        .collect();
    let (port, ports) = (free_port(), [(); SLOTS].map(|()| free_port()));
    // Each answers one after the other.
    let names = ["a.example.net", "b.example.net", "c.example.net", "d.example.net"];
    let served = Arc::new(AtomicUsize::new(0));
    let servers: Vec<Peer> = ports
        .iter()
        .zip(names)
        .map(|(port, name)| {
            let served = Arc::clone(&served);
            Peer::start(*port, name, move |peer, header, message| {
                thread::sleep(plan.kind.time(served.fetch_add(1, Ordering::Relaxed)));
                good(peer, header, message)
            })
        })
        .collect();
    let list: String = ports
        .iter()
        .zip(["a", "b", "c", "d"])
        .map(|(port, id)| format!("      - {{ id: {id}, address: tcp://127.0.0.1:{port}, origin_host: {id}.example.net, capacity: 1 }}\n"))
        .collect();
    let edge = Edge::start(&format!(
        "version: 1\nnode: {{ workers: 2, realm: example.net }}\nadmin: {{ listen: ADMIN }}\n{CLASSES}listeners:\n  - name: dra\n    protocol: diameter\n    bind: [tcp://127.0.0.1:{port}]\n    options: {{ origin_host: edge.example.net, watchdog: 30s }}\n    pool: pcrf\n    classify:\n{rules}pools:\n  pcrf:\n{}    backends:\n{list}",
        qos(policy)
    ));
    up(&edge, &["a", "b", "c", "d"]);
    let host = "client.example.net";
    let mut connection = client(port, host);
    let mut answers = connection.try_clone();
    let (seen, done) = (Arc::new(Mutex::new(0)), Arc::new(AtomicBool::new(false)));
    let counted = Arc::clone(&seen);
    let ended = Arc::clone(&done);
    thread::spawn(move || {
        while !ended.load(Ordering::Relaxed)
            && let Some(answer) = answers.next()
        {
            let is_answer = Header::read(&answer).is_some_and(|header| !header.is_request());
            *counted.lock().expect("nobody panicked") += u32::from(is_answer);
        }
    });
    let arrivals = open_loop(plan, |number, class| {
        let number = number as u32 + 1;
        let mut bytes = Vec::new();
        Builder::request(&mut bytes, 272, 16_777_238, number, number)
            .text(code::SESSION_ID, &format!("{policy};{number}"))
            .text(code::ORIGIN_HOST, host)
            .text(code::ORIGIN_REALM, "example.net")
            .text(code::DESTINATION_REALM, "example.net")
            .number(code::AUTH_APPLICATION_ID, 16_777_238)
            .number(code::CC_REQUEST_TYPE, 4)
            .number(415, 0)
            .text(8, class)
            .finish();
        assert!(connection.send(&bytes));
    });
    let told = outcomes(&edge, &arrivals);
    let all: f64 = arrivals.of_class.values().sum();
    edge.until("each request to have its answer", |_| {
        f64::from(*seen.lock().expect("nobody panicked")) >= all
    });
    done.store(true, Ordering::Relaxed);
    drop(servers);
    (edge, told, arrivals.in_time)
}
