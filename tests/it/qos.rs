//! Slots, queues and refusals through the real binary.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::Duration;

use strowger_diameter::avp::code;
use strowger_diameter::build::Builder;

use crate::diameter::{client, up};
use crate::diameter_agent::{Peer, config as diameter_config, exchange, good, result};
use crate::harness::{Edge, free_port, has};

/// Greets each connection and keeps it until its client goes.
fn greet(port: u16) {
    let listener = TcpListener::bind(("127.0.0.1", port)).expect("a free port");
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            thread::spawn(move || {
                let _gone = stream.write_all(b"a");
                while stream.read(&mut [0; 64]).is_ok_and(|count| count > 0) {}
            });
        }
    });
}

fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("the edge accepts");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("an option");
    stream
}

/// What comes first: a byte, or the end.
fn first(stream: &mut TcpStream) -> Option<u8> {
    let mut byte = [0];
    stream.read(&mut byte).ok().filter(|&count| count == 1).map(|_| byte[0])
}

fn config(port: u16, backend: u16, policy: &str) -> String {
    format!(
        "version: 1\nnode: {{ workers: 2 }}\nadmin: {{ listen: ADMIN }}\nclasses:\n  setup: {{ queue_max: 2, deadline: 30s }}\nlisteners:\n  - {{ name: db, protocol: tcp, bind: [tcp://127.0.0.1:{port}], pool: db, options: {{ connect_timeout: 20s }} }}\npools:\n  db:\n    qos: {{ policy: {policy} }}\n    backends:\n      - {{ id: a, address: tcp://127.0.0.1:{backend}, capacity: 1 }}\n"
    )
}

#[test]
fn a_connection_waits_for_a_slot_and_too_many_are_refused_at_once() {
    let (port, backend) = (free_port(), free_port());
    greet(backend);
    let edge = Edge::start(&config(port, backend, "deadline"));
    let mut one = connect(port);
    assert_eq!(first(&mut one), Some(b'a'));
    let mut waiting = [connect(port), connect(port)];
    let at = ["pool=\"db\"", "class=\"setup\""];
    edge.until("two wait", |edge| edge.metric("strowger_queue_depth", &at) == 2.0);
    // The lane has room for two: the next hears no at once, and the bound tells its name.
    assert_eq!(first(&mut connect(port)), None);
    let full = ["pool=\"db\"", "reason=\"lane_full\""];
    assert_eq!(edge.metric("strowger_queue_refused_total", &full), 1.0);
    edge.until("the log has it", |edge| {
        let log = edge.log();
        log.contains("bound_hit") && log.contains("queue_max") && log.contains("request_refused")
    });
    // A slot that is given back, on whichever worker, goes to the next.
    one.shutdown(Shutdown::Both).expect("shut down");
    drop(one);
    waiting[0].set_nonblocking(true).expect("an option");
    waiting[1].set_nonblocking(true).expect("an option");
    let mut served = None;
    for _ in 0..3_000 {
        served = waiting.iter_mut().position(|stream| first(stream) == Some(b'a'));
        if served.is_some() {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    let served = served.expect("one of them is served");
    waiting[served].shutdown(Shutdown::Both).expect("shut down");
    let other = &mut waiting[1 - served];
    other.set_nonblocking(false).expect("an option");
    assert_eq!(first(other), Some(b'a'));
    edge.until("none waits", |edge| edge.metric("strowger_queue_depth", &at) == 0.0);
    assert_eq!(edge.metric("strowger_queue_granted_total", &at), 2.0);
    let view = edge.json("/api/v1/pools/db");
    assert_eq!(view["qos"]["policy"], "deadline");
}

/// `backpressure` is longer than what the class promises: who waits by it is served when a slot is
/// free, and nobody is let in behind it.
#[test]
fn backpressure_outlasts_the_deadline_of_the_class() {
    let (port, backend) = (free_port(), free_port());
    greet(backend);
    let text = config(port, backend, "deadline")
        .replace("workers: 2", "workers: 1")
        .replace("deadline: 30s", "deadline: 200ms")
        .replace("connect_timeout: 20s", "connect_timeout: 20s, backpressure: 60s");
    let edge = Edge::start(&text);
    let mut one = connect(port);
    assert_eq!(first(&mut one), Some(b'a'));
    let mut waits = connect(port);
    edge.until("it is kept", |edge| {
        edge.metric("strowger_protocol_total", &["backpressure"]) >= 1.0
    });
    // Longer than the deadline that it had.
    thread::sleep(Duration::from_millis(400));
    one.shutdown(Shutdown::Both).expect("shut down");
    drop(one);
    assert_eq!(first(&mut waits), Some(b'a'), "it gets the slot");
}

#[test]
fn a_fifo_pool_lets_all_of_them_wait() {
    let (port, backend) = (free_port(), free_port());
    greet(backend);
    let edge = Edge::start(&config(port, backend, "fifo"));
    let mut streams: Vec<TcpStream> = (0..8).map(|_| connect(port)).collect();
    let at = ["pool=\"db\"", "class=\"setup\""];
    edge.until("seven wait", |edge| edge.metric("strowger_queue_depth", &at) == 7.0);
    for stream in &streams {
        stream.set_nonblocking(true).expect("an option");
    }
    let mut served = 0;
    for _ in 0..6_000 {
        if let Some(next) = streams.iter_mut().position(|stream| first(stream) == Some(b'a')) {
            streams.swap_remove(next);
            served += 1;
        } else {
            thread::sleep(Duration::from_millis(5));
        }
        if streams.is_empty() {
            break;
        }
    }
    assert_eq!(served, 8);
}

#[test]
fn the_rules_for_prometheus_say_what_they_should() {
    if !has("promtool") {
        return;
    }
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/config/prometheus");
    let output = Command::new("promtool")
        .args(["test", "rules", "rules_test.yml"])
        .current_dir(folder)
        .output()
        .expect("promtool runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // Each metric that the rules ask for is one of ours.
    let rules = std::fs::read_to_string(format!("{folder}/rules.yml")).expect("rules");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/observe");
    let read = |name: &str| std::fs::read_to_string(format!("{source}/{name}")).expect("a source");
    let known = read("metrics.rs") + &read("qos.rs") + &read("brownout.rs");
    let names = rules.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    for name in names.filter(|name| name.starts_with("strowger_")) {
        let family = name.trim_end_matches("_bucket");
        assert!(known.contains(&format!("\"{family}\"")), "{name} is no metric of ours");
    }
}

/// DRMP, rules by AVP and application, a carried deadline, and what a session keeps: by the binary's
/// own figures.
#[test]
fn diameter_requests_fall_into_the_classes_that_rules_avps_and_sessions_give_them() {
    let (port, server) = (free_port(), free_port());
    let _server = Peer::start(server, "a.example.net", good);
    let classify = "    classify:\n      - { match: { application: [gx], avp: [{ path: '416', is: ['1'] }, { path: '8', is: ['gold'] }] }, class: gold }\n      - { match: { command: [258, 272], avp: [{ path: '416', is: ['4'] }] }, class: bulk }\n    pool: pcrf\npools:\n";
    let yaml = diameter_config(port, &[("a", server)], "", "")
        .replace("classes:\n", "classes:\n  gold: { tier: 0, deadline: 4s }\n  emergency: { deadline: 5s }\n  bulk: { deadline: 5s }\n")
        .replace("in-session: { deadline: 5s", "in-session: { tier: 1, deadline: 5s")
        .replace("    pool: pcrf\npools:\n", classify);
    let edge = Edge::start(&yaml);
    up(&edge, &["a"]);
    let host = "client.example.net";
    let mut connection = client(port, host);
    let mut number = 0;
    let mut send = |session: &str, kind: u32, avps: &[(u32, &[u8])]| {
        number += 1;
        let mut bytes = Vec::new();
        let mut builder = Builder::request(&mut bytes, 272, 16_777_238, number, number)
            .text(code::SESSION_ID, session)
            .text(code::ORIGIN_HOST, host)
            .text(code::ORIGIN_REALM, "example.net")
            .text(code::DESTINATION_REALM, "example.net")
            .number(code::AUTH_APPLICATION_ID, 16_777_238)
            .number(code::CC_REQUEST_TYPE, kind)
            .number(415, 0);
        for (code, data) in avps.iter().filter(|(code, _)| *code < 1_000) {
            builder = builder.bytes(*code, data);
        }
        builder.finish();
        // Those of 3GPP.
        for (code, data) in avps.iter().filter(|(code, _)| *code > 1_000) {
            bytes.extend_from_slice(&code.to_be_bytes());
            bytes.push(0x80);
            bytes.extend_from_slice(&(12 + data.len() as u32).to_be_bytes()[1..]);
            bytes.extend_from_slice(&10_415_u32.to_be_bytes());
            bytes.extend_from_slice(data);
        }
        let length = (bytes.len() as u32).to_be_bytes();
        bytes[1..4].copy_from_slice(&length[1..]);
        exchange(&mut connection, &[bytes]).remove(&number).expect("an answer")
    };
    let urgent: &[(u32, &[u8])] = &[(code::DRMP, &[0, 0, 0, 1])];
    let lazy: &[(u32, &[u8])] = &[(code::DRMP, &[0, 0, 0, 14])];
    let mut wanted = std::collections::BTreeMap::new();
    for (session, kind, avps, class) in [
        ("plain", 1, &[][..], "setup"),
        ("plain", 2, &[], "in-session"),
        ("plain", 4, &[], "bulk"),
        // A session keeps its tier, though the further requests say nothing.
        ("sos", 1, urgent, "emergency"),
        ("sos", 2, &[], "emergency"),
        ("sos", 3, &[], "emergency"),
        ("gold", 1, &[(8, b"gold".as_slice())], "gold"),
        ("gold", 2, &[], "gold"),
        ("gold", 3, &[], "gold"),
        // What is an emergency of itself is judged by rules that say so only.
        ("event", 4, urgent, "emergency"),
        ("lazy", 1, lazy, "bulk"),
    ] {
        assert_eq!(result(&send(session, kind, avps)), 2_001, "{session} {kind}");
        *wanted.entry(class).or_insert(0.0) += 1.0;
    }
    for (class, count) in wanted {
        let label = format!("class=\"{class}\"");
        let at = [label.as_str(), "outcome=\"met\""];
        assert_eq!(edge.metric("strowger_requests_total", &at), count, "{class}");
    }
    // Origination-Time-Stamp and Maximum-Wait-Time: the first tells how the clocks stand, the second
    // was under way for longer than it may wait.
    let stamped = |ms: u64| -> Vec<u8> { (3_900_000_000_000 + ms).to_be_bytes().to_vec() };
    let (base, late) = (stamped(60_000), stamped(0));
    let wait = 5_000_u32.to_be_bytes();
    let carried = |stamp: &[u8]| [(1_536, stamp.to_vec()), (1_537, wait.to_vec())];
    let mut ask = |stamp: &[u8]| {
        let avps = carried(stamp);
        let avps: Vec<(u32, &[u8])> =
            avps.iter().map(|(code, data)| (*code, data.as_slice())).collect();
        result(&send("stamped", 4, &avps))
    };
    assert_eq!(ask(&base), 2_001);
    assert_eq!(ask(&late), 3_004, "its time was over when it came");
}

/// The node's own descriptors run out, step by step: first bulk is refused, then mobility, then what
/// is new at all, while sessions and emergencies go on; and all of it is taken back.
#[test]
fn short_of_descriptors_the_node_gives_up_step_by_step_and_takes_it_back() {
    if !has("prlimit") {
        return;
    }
    let (port, sip, backend) = (free_port(), free_port(), free_port());
    greet(backend);
    let server = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    let instance = server.local_addr().expect("an address");
    thread::spawn(move || answer_all(&server));
    let yaml = format!(
        "version: 1\nnode: {{ workers: 2 }}\nadmin: {{ listen: ADMIN }}\nbrownout: {{ descriptors: 50, memory: 100, loop_lag: 10s, hysteresis: 200ms }}\nlisteners:\n  - {{ name: db, protocol: tcp, bind: [tcp://127.0.0.1:{port}], pool: db }}\n  - {{ name: sip, protocol: sip, bind: [udp://127.0.0.1:{sip}], pool: ims }}\npools:\n  db:\n    backends: [{{ id: a, address: tcp://127.0.0.1:{backend} }}]\n  ims:\n    backends: [{{ id: a, address: udp://{instance} }}]\n"
    );
    let edge = Edge::start(&yaml);
    let open = || {
        let folder = format!("/proc/{}/fd", edge.process.id());
        std::fs::read_dir(folder).expect("the process lives").count()
    };
    // Half of it is what counts as full: twice what is open now, and room for 100 flows.
    let full = open() + 200;
    let limit = format!("--nofile={0}:{0}", 2 * full);
    let pid = edge.process.id().to_string();
    let status = Command::new("prlimit").args(["--pid", &pid, &limit]).status();
    assert!(status.expect("prlimit runs").success());
    let client = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    client.set_read_timeout(Some(Duration::from_secs(10))).expect("an option");
    client.connect(("127.0.0.1", sip)).expect("an address");
    let mut number = 0;
    let mut ask = |method: &str, uri: &str, tag: &str| {
        number += 1;
        let me = client.local_addr().expect("an address");
        let text = format!(
            "{method} {uri} SIP/2.0\r\nVia: SIP/2.0/UDP {me};branch=z9hG4bK{number}\r\nMax-Forwards: 70\r\nFrom: <sip:a@example.net>;tag=f\r\nTo: <sip:b@example.net>{tag}\r\nCall-ID: c{number}\r\nCSeq: 1 {method}\r\nContact: <sip:a@{me}>\r\nContent-Length: 0\r\n\r\n"
        );
        client.send(text.as_bytes()).expect("sent");
        loop {
            let mut bytes = [0; 4_096];
            let count = client.recv(&mut bytes).expect("an answer");
            let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
            let code = text.split(' ').nth(1).and_then(|code| code.parse::<u16>().ok());
            if text.contains(&format!("Call-ID: c{number}\r\n")) && code != Some(100) {
                return code.expect("a code");
            }
        }
    };
    let uri = "sip:b@example.net";
    assert_eq!(ask("OPTIONS", uri, ""), 200);
    let step = |edge: &Edge| edge.metric("strowger_brownout_step", &[]) as u32;
    let mut flows: Vec<TcpStream> = Vec::new();
    // (step, what then hears no, and what does not)
    let stages: [(u32, &[&str], &[&str]); 3] = [
        (2, &["OPTIONS"], &["REGISTER", "INVITE"]),
        (3, &["OPTIONS", "REGISTER"], &["INVITE"]),
        (5, &["OPTIONS", "REGISTER", "INVITE"], &[]),
    ];
    for (wanted, refused, taken) in stages {
        // Steps begin at 0.8, 0.88 and 1.0 of what counts as full.
        let part = [0.0, 0.72, 0.83, 0.9, 0.0, 1.01][wanted as usize];
        while (open() as f64) < part * full as f64 {
            let mut flow = connect(port);
            flow.set_read_timeout(Some(Duration::from_secs(5))).expect("an option");
            let greeted = first(&mut flow);
            flows.push(flow);
            if greeted.is_none() {
                assert_eq!(wanted, 5, "{} flows", flows.len());
                break;
            }
        }
        edge.until("the step", |edge| step(edge) == wanted);
        for method in refused {
            assert!([500, 503].contains(&ask(method, uri, "")), "{method} on step {wanted}");
        }
        for method in taken {
            assert_eq!(ask(method, uri, ""), 200, "{method} on step {wanted}");
        }
        assert_eq!(ask("INFO", uri, ";tag=t"), 200, "a session, on step {wanted}");
        assert_eq!(ask("INVITE", "urn:service:sos", ""), 200, "on step {wanted}");
    }
    // Nobody is let in: the kernel holds it, or, where a worker was already accepting, it is reset.
    let mut late = connect(port);
    late.set_read_timeout(Some(Duration::from_millis(500))).expect("an option");
    assert_eq!(first(&mut late), None);
    assert!(edge.log().contains("brownout_step") && edge.log().contains("descriptors"));
    edge.until("the refusals to be counted", |edge| {
        edge.metric("strowger_brownout_refused_total", &["class=\"bulk\""]) >= 3.0
    });
    flows.clear();
    edge.until("all is taken back", |edge| step(edge) == 0);
    assert_eq!(first(&mut connect(port)), Some(b'a'), "who comes now is let in");
    assert_eq!(ask("OPTIONS", uri, ""), 200);
    let up = edge.metric("strowger_brownout_steps_total", &["direction=\"up\""]);
    assert_eq!(up, edge.metric("strowger_brownout_steps_total", &["direction=\"down\""]));
}

/// Says 200 to every request.
fn answer_all(server: &UdpSocket) {
    let mut bytes = [0; 8_192];
    while let Ok((count, from)) = server.recv_from(&mut bytes) {
        let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
        if !text.starts_with("SIP/2.0") && !text.starts_with("ACK ") {
            let _gone = server.send_to(ok(&text).as_bytes(), from);
        }
    }
}

/// The 200 to a SIP request.
pub(crate) fn ok(request: &str) -> String {
    let mut answer = "SIP/2.0 200 OK\r\n".to_owned();
    for line in request.lines().take_while(|line| !line.is_empty()) {
        let kept = ["Via:", "From:", "Call-ID:", "CSeq:", "Record-Route:"];
        if kept.iter().any(|name| line.starts_with(name)) {
            answer += &format!("{line}\r\n");
        } else if line.starts_with("To:") {
            let tag = if line.contains("tag=") { "" } else { ";tag=t" };
            answer += &format!("{line}{tag}\r\n");
        }
    }
    answer + "Contact: <sip:b@192.0.2.9>\r\nContent-Length: 0\r\n\r\n"
}
