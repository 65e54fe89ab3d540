//! Hedged requests and refusals that are not said, from the configuration to the wire.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use strowger_diameter::avp::{FLAG_RETRANSMITTED, Header, code};
use strowger_diameter::build::Builder;

use crate::diameter::{client, up};
use crate::diameter_agent::{Peer, config as diameter_config, exchange, good, result};
use crate::harness::{Edge, free_port};

const HALF_A_MINUTE: Duration = Duration::from_secs(30);

fn text(method: &str, me: std::net::SocketAddr, number: usize) -> String {
    format!(
        "{method} sip:b@example.net SIP/2.0\r\nVia: SIP/2.0/UDP {me};branch=z9hG4bK{method}{number}\r\nMax-Forwards: 70\r\nFrom: <sip:a@example.net>;tag=f\r\nTo: <sip:b@example.net>\r\nCall-ID: h{number}\r\nCSeq: 1 {method}\r\nContent-Length: 0\r\n\r\n"
    )
}

/// Two instances; whichever is asked first of a request says nothing.
#[test]
fn sip_a_second_instance_answers_for_the_first() {
    let servers = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").expect("a free port"));
    let [one, two] = servers.each_ref().map(|socket| socket.local_addr().expect("an address"));
    let asked = Arc::new(AtomicUsize::new(0));
    for server in servers {
        let asked = Arc::clone(&asked);
        thread::spawn(move || {
            let mut bytes = [0; 8_192];
            while let Ok((count, from)) = server.recv_from(&mut bytes) {
                if asked.fetch_add(1, Ordering::Relaxed) > 0 {
                    let answer = crate::qos::ok(&String::from_utf8_lossy(&bytes[..count]));
                    let _gone = server.send_to(answer.as_bytes(), from);
                }
            }
        });
    }
    let port = free_port();
    // Without the hedge the client would wait for `failover_min` at least.
    let edge = Edge::start(&format!(
        "version: 1\nnode: {{ workers: 2 }}\nadmin: {{ listen: ADMIN }}\nlisteners:\n  - name: sip\n    protocol: sip\n    bind: [udp://127.0.0.1:{port}]\n    pool: ims\n    options: {{ t1: 10s, t2: 10s, failover_min: 10s, failover_timeout: 10s, hedge: {{ methods: [OPTIONS], after: 50ms }} }}\npools:\n  ims:\n    backends:\n      - {{ id: a, address: udp://{one} }}\n      - {{ id: b, address: udp://{two} }}\n"
    ));
    let client = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    client.connect(("127.0.0.1", port)).expect("an address");
    client.set_read_timeout(Some(HALF_A_MINUTE)).expect("an option");
    let me = client.local_addr().expect("an address");
    client.send(text("OPTIONS", me, 1).as_bytes()).expect("sent");
    let mut bytes = [0; 8_192];
    let count = client.recv(&mut bytes).expect("an answer");
    assert!(bytes[..count].starts_with(b"SIP/2.0 200"));
    let named = |name: &str| format!("=\"{name}\"");
    edge.until("it is counted", |edge| {
        edge.metric("strowger_retries_total", &[&named("hedged")]) == 1.0
    });
    let outcomes = |outcome: &str| edge.metric("strowger_requests_total", &[&named(outcome)]);
    assert_eq!(outcomes("met") + outcomes("late"), 1.0, "one outcome");
}

#[test]
fn diameter_a_second_server_answers_for_the_first() {
    let (port, servers) = (free_port(), [free_port(), free_port()]);
    let asked = Arc::new(AtomicUsize::new(0));
    let peers =
        [(servers[0], "a.example.net"), (servers[1], "b.example.net")].map(|(port, name)| {
            let asked = Arc::clone(&asked);
            Peer::start(port, name, move |peer, header, message| {
                let first = asked.fetch_add(1, Ordering::Relaxed) == 0;
                if first { None } else { good(peer, header, message) }
            })
        });
    let options = ", stateless: [gx], hedge: { commands: [318], after: 50ms }";
    let edge =
        Edge::start(&diameter_config(port, &[("a", servers[0]), ("b", servers[1])], options, ""));
    up(&edge, &["a", "b"]);
    let mut connection = client(port, "client.example.net");
    let mut bytes = Vec::new();
    Builder::request(&mut bytes, 318, 16_777_238, 7, 7)
        .text(code::SESSION_ID, "hedged;1")
        .text(code::ORIGIN_HOST, "client.example.net")
        .text(code::ORIGIN_REALM, "example.net")
        .text(code::DESTINATION_REALM, "example.net")
        .finish();
    let answers = exchange(&mut connection, &[bytes]);
    assert_eq!(answers.values().map(|answer| result(answer)).collect::<Vec<_>>(), [2_001]);
    let seen: Vec<Vec<u8>> = peers.iter().flat_map(Peer::requests).collect();
    let flags: Vec<u8> = seen
        .iter()
        .filter_map(|request| Header::read(request))
        .filter(|header| header.command == 318)
        .map(|header| header.flags & FLAG_RETRANSMITTED)
        .collect();
    assert_eq!(flags.len(), 2, "both were asked");
    assert_eq!(flags.iter().filter(|flag| **flag != 0).count(), 1, "the copy bears T");
    edge.until("it is counted", |edge| {
        edge.metric("strowger_retries_total", &["=\"hedged\""]) == 1.0
    });
}

/// A class that is refused in silence, and one that is answered.
#[test]
fn sip_a_refusal_that_is_not_said() {
    let server = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    let instance = server.local_addr().expect("an address");
    let port = free_port();
    let edge = Edge::start(&format!(
        "version: 1\nadmin: {{ listen: ADMIN }}\nclasses:\n  bulk: {{ queue_max: 0, on_miss: drop }}\n  mobility: {{ queue_max: 0 }}\nlisteners:\n  - {{ name: sip, protocol: sip, bind: [udp://127.0.0.1:{port}], pool: ims }}\npools:\n  ims:\n    backends: [{{ id: a, address: udp://{instance}, capacity: 1 }}]\n"
    ));
    let client = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    client.connect(("127.0.0.1", port)).expect("an address");
    client.set_read_timeout(Some(HALF_A_MINUTE)).expect("an option");
    let me = client.local_addr().expect("an address");
    // The first takes the slot and is never answered.
    client.send(text("OPTIONS", me, 1).as_bytes()).expect("sent");
    edge.until("it has the slot", |edge| {
        edge.metric("strowger_backend_in_flight", &["backend=\"a\""]) == 1.0
    });
    client.send(text("OPTIONS", me, 2).as_bytes()).expect("sent");
    let rejected = ["class=\"bulk\"", "outcome=\"rejected\""];
    edge.until("it is refused", |edge| edge.metric("strowger_requests_total", &rejected) == 1.0);
    client.send(text("REGISTER", me, 3).as_bytes()).expect("sent");
    let mut bytes = [0; 8_192];
    let count = client.recv(&mut bytes).expect("an answer");
    let first = String::from_utf8_lossy(&bytes[..count]).into_owned();
    assert!(first.starts_with("SIP/2.0 503") && first.contains("REGISTER"), "{first}");
}
