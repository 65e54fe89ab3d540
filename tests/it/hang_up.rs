//! Clients that hang up while their requests wait for a slot: the wait ends, is counted, and no backend
//! hears of them.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crate::diameter::{ccr, client, up};
use crate::diameter_agent::{Peer, config as diameter_config, exchange, good, result};
use crate::harness::{Edge, free_port};
use crate::sip::phone::{Client, Server, answer, status};

const LONG: Duration = Duration::from_secs(60);

/// Waits until it is let go on.
fn hold(gate: &AtomicBool) {
    while !gate.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(10));
    }
}

/// A server that greets each connection and keeps what all of them said.
fn greet(port: u16) -> Arc<Mutex<Vec<Vec<u8>>>> {
    let listener = TcpListener::bind(("127.0.0.1", port)).expect("a free port");
    let said: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
    let shared = Arc::clone(&said);
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let number = {
                let mut all = shared.lock().expect("not poisoned");
                all.push(Vec::new());
                all.len() - 1
            };
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let _gone = stream.write_all(b"a");
                let mut buffer = [0; 64];
                while let Ok(count @ 1..) = stream.read(&mut buffer) {
                    let mut all = shared.lock().expect("not poisoned");
                    all[number].extend_from_slice(&buffer[..count]);
                }
            });
        }
    });
    said
}

fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("the edge accepts");
    stream.set_read_timeout(Some(LONG)).expect("an option");
    stream
}

fn greeted(stream: &mut TcpStream) -> bool {
    let mut byte = [0];
    stream.read(&mut byte).is_ok_and(|count| count == 1)
}

/// So many waiters of the class were withdrawn, and none of them waits any more.
fn withdrawn(edge: &Edge, class: &str, count: f64, still: f64) {
    let class = format!("class=\"{class}\"");
    let failed = [class.as_str(), "outcome=\"failed\""];
    edge.until("they are withdrawn", |edge| {
        edge.metric("strowger_queue_withdrawn_total", &[&class]) == count
            && edge.metric("strowger_queue_depth", &[&class]) == still
            && edge.metric("strowger_requests_total", &failed) == count
    });
}

#[test]
fn raw_flows_that_hang_up_while_they_wait_reach_no_backend() {
    let (port, backend) = (free_port(), free_port());
    let said = greet(backend);
    let edge = Edge::start(&format!(
        "version: 1\nnode: {{ workers: 2 }}\nadmin: {{ listen: ADMIN }}\nclasses:\n  setup: {{ deadline: 30s }}\nlisteners:\n  - {{ name: db, protocol: tcp, bind: [tcp://127.0.0.1:{port}], pool: db }}\npools:\n  db:\n    backends: [{{ id: a, address: tcp://127.0.0.1:{backend}, capacity: 1 }}]\n"
    ));
    let mut one = connect(port);
    assert!(greeted(&mut one));
    // A reset, an end, an end behind bytes, and a half that ends: of all of them nobody waits.
    let (reset, ended, mut spoke, mut half) =
        (connect(port), connect(port), connect(port), connect(port));
    spoke.write_all(b"dead").expect("sent");
    half.write_all(b"half").expect("sent");
    let depth = ["class=\"setup\""];
    edge.until("four wait", |edge| edge.metric("strowger_queue_depth", &depth) == 4.0);
    let mut patient = connect(port);
    patient.write_all(b"live").expect("sent");
    edge.until("five wait", |edge| edge.metric("strowger_queue_depth", &depth) == 5.0);
    socket2::SockRef::from(&reset).set_linger(Some(Duration::ZERO)).expect("an option");
    drop(reset);
    drop(ended);
    drop(spoke);
    half.shutdown(Shutdown::Write).expect("shut down");
    withdrawn(&edge, "setup", 4.0, 1.0);
    assert!(!greeted(&mut half), "it is reset");
    assert_eq!(edge.instance("db", "a")["in_flight"], 1);
    drop(one);
    assert!(greeted(&mut patient), "whoever waits on is next");
    edge.until("its bytes arrive", |_| {
        said.lock().expect("not poisoned").last().is_some_and(|last| last == b"live")
    });
    assert_eq!(*said.lock().expect("not poisoned"), [b"".to_vec(), b"live".to_vec()]);
    withdrawn(&edge, "setup", 4.0, 0.0);
}

#[test]
fn sip_requests_whose_connection_closes_while_they_wait_reach_no_instance() {
    let port = free_port();
    let gate = Arc::new(AtomicBool::new(false));
    let opens = Arc::clone(&gate);
    let server = Server::new("127.0.0.1:0", move |request: &str| {
        hold(&opens);
        vec![answer(request, 200, "")]
    });
    let edge = Edge::start(&format!(
        "version: 1\nnode: {{ workers: 2 }}\nadmin: {{ listen: ADMIN }}\nclasses:\n  setup: {{ deadline: 30s }}\n  bulk: {{ deadline: 30s }}\nlisteners:\n  - {{ name: sip, protocol: sip, bind: [udp://127.0.0.1:{port}, tcp://127.0.0.1:{port}], pool: ims, options: {{ failover_timeout: 25s }} }}\npools:\n  ims:\n    backends: [{{ id: a, address: udp://{}, capacity: 1 }}]\n",
        server.address
    ));
    let at = ([127, 0, 0, 1], port).into();
    let send = |mut client: Client, call: &str| {
        let request = client.request("INVITE", "sip:bob@example.net", "alice", call);
        client.send(request.as_bytes());
        client
    };
    let mut first = send(Client::tcp(at), "first");
    edge.until("the first has the slot", |edge| edge.instance("ims", "a")["in_flight"] == 1);
    let dead = [send(Client::tcp(at), "dead-1"), send(Client::tcp(at), "dead-2")];
    let depth = ["class=\"setup\""];
    edge.until("two wait", |edge| edge.metric("strowger_queue_depth", &depth) == 2.0);
    drop(dead);
    withdrawn(&edge, "setup", 2.0, 0.0);
    gate.store(true, Ordering::Relaxed);
    let said = first.final_answer(LONG).expect("an answer");
    assert_eq!(status(&said), 200);
    // They were nobody's to send, and no call came of them.
    assert!(!server.seen_text().iter().any(|text| text.contains("dead-")));
    let cancelled = ["outcome=\"cancelled\""];
    assert_eq!(edge.metric("strowger_call_attempts_total", &cancelled), 2.0);
}

#[test]
fn diameter_requests_whose_client_is_gone_end_with_an_outcome() {
    let (port, backend) = (free_port(), free_port());
    let gate = Arc::new(AtomicBool::new(false));
    let opens = Arc::clone(&gate);
    let server = Peer::start(backend, "a.example.net", move |peer, header, message| {
        hold(&opens);
        good(peer, header, message)
    });
    let yaml = diameter_config(port, &[("a", backend)], ", answer_timeout: 60s", "")
        .replace("setup: { deadline: 5s", "setup: { deadline: 30s")
        .replace("watchdog: 500ms", "watchdog: 60s")
        .replace(".example.net }", ".example.net, capacity: 1 }");
    let edge = Edge::start(&yaml);
    up(&edge, &["a"]);
    let mut first = client(port, "first.example.net");
    let asks = thread::spawn(move || {
        let request = ccr("first", 1, "first.example.net", None, 1);
        exchange(&mut first, &[request]).remove(&1).map(|answer| result(&answer))
    });
    edge.until("the first has the slot", |edge| edge.instance("pcrf", "a")["in_flight"] == 1);
    let mut dead = client(port, "dead.example.net");
    assert!(dead.send(&ccr("dead", 1, "dead.example.net", None, 1)));
    let depth = ["class=\"setup\""];
    edge.until("one waits", |edge| edge.metric("strowger_queue_depth", &depth) == 1.0);
    drop(dead);
    withdrawn(&edge, "setup", 1.0, 0.0);
    gate.store(true, Ordering::Relaxed);
    assert_eq!(asks.join().expect("it ends"), Some(2_001));
    assert_eq!(server.requests().len(), 1, "only the first one's");
}
