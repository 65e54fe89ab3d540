//! Links to Diameter servers through the binary: when they are dialed, and what waits for them.

use std::collections::HashMap;
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use strowger_diameter::avp::{Header, Summary, code};
use strowger_diameter::build::Builder;

use crate::diameter::{Connection, client, error_message, text, up};
use crate::diameter_agent::{Peer, config, exchange, good, gx, result};
use crate::harness::{Edge, alone, free_port};

/// A server whose port is open and who closes each connection, at once or after a refusal of the
/// CER, is dialed more and more rarely.
#[test]
fn who_accepts_and_closes_is_not_dialed_for_ever() {
    let _alone = alone();
    let (port, closing, refusing) = (free_port(), free_port(), free_port());
    let dialed: [Arc<Mutex<Vec<Instant>>>; 2] = [Arc::default(), Arc::default()];
    for (port, dialed) in [closing, refusing].into_iter().zip(&dialed) {
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("a free port");
        let (dialed, refuses) = (Arc::clone(dialed), port == refusing);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                dialed.lock().expect("not poisoned").push(Instant::now());
                if refuses {
                    let mut connection = Connection::new(stream);
                    let Some(cer) = connection.next_of_any() else { continue };
                    let header = Header::read(&cer).expect("framed");
                    let (hop, end) = (header.hop_by_hop, header.end_to_end);
                    let mut cea = Vec::new();
                    Builder::new(&mut cea, 0, header.command, 0, hop, end)
                        .number(code::RESULT_CODE, 3_010)
                        .text(code::ORIGIN_HOST, "b.example.net")
                        .text(code::ORIGIN_REALM, "example.net")
                        .finish();
                    connection.send(&cea);
                }
            }
        });
    }
    let edge = Edge::start(&config(port, &[("a", closing), ("b", refusing)], "", ""));
    // Pauses of 100, 200, 400 ms …, a quarter shorter or longer: a slow machine only makes them
    // longer.
    let far_apart = |dialed: &Mutex<Vec<Instant>>| {
        let dialed = dialed.lock().expect("not poisoned");
        let pauses = dialed.windows(2).map(|two| two[1].duration_since(two[0]));
        pauses.clone().count() < 20 && pauses.into_iter().any(|pause| pause.as_millis() > 1_100)
    };
    edge.until("the pauses to grow", |_| dialed.iter().all(|dialed| far_apart(dialed)));
    for dialed in &dialed {
        let dialed = dialed.lock().expect("not poisoned");
        let count = dialed.len();
        assert!(count < 20, "{count} connections");
    }
    assert_eq!(edge.instance("pcrf", "a")["health"], "link_down");
    assert!(edge.metric("strowger_protocol_total", &["diameter_backends_refused"]) > 1.0);
}

/// Servers with one slot each: requests wait for it. Two sessions of one subscriber that waited end
/// at one server, and everybody is answered.
#[test]
fn what_waited_is_bound_as_if_it_had_not() {
    const SUBSCRIBERS: u32 = 40;
    let _alone = alone();
    let (port, one, two) = (free_port(), free_port(), free_port());
    let slow = |peer: &Peer, header: &Header, message: &[u8]| {
        thread::sleep(Duration::from_millis(10));
        good(peer, header, message)
    };
    let servers =
        [Peer::start(one, "a.example.net", slow), Peer::start(two, "b.example.net", slow)];
    let yaml = config(
        port,
        &[("a", one), ("b", two)],
        ", answer_timeout: 60s",
        "    balance: round-robin\n    bind_keys: [imsi, framed-ip]\n",
    )
    .replace("deadline: 5s", "deadline: 30s")
    .replace("watchdog: 500ms", "watchdog: 60s")
    .replace(".example.net }", ".example.net, capacity: 1 }");
    let edge = Edge::start(&yaml);
    up(&edge, &["a", "b"]);
    let hosts = ["pgw1.example.net", "pgw2.example.net"];
    let threads: Vec<_> = hosts
        .into_iter()
        .map(|host| {
            let mut connection = client(port, host);
            let requests: Vec<Vec<u8>> = (0..SUBSCRIBERS)
                .map(|number| {
                    let imsi = format!("00101{number:010}");
                    gx(host, &format!("{host};{number}"), 1, &imsi, number, number)
                })
                .collect();
            thread::spawn(move || exchange(&mut connection, &requests))
        })
        .collect();
    let answers: Vec<HashMap<u32, Vec<u8>>> =
        threads.into_iter().map(|one| one.join().expect("it ends")).collect();
    for number in 0..SUBSCRIBERS {
        let (first, second) = (&answers[0][&number], &answers[1][&number]);
        assert_eq!(result(first), 2_001, "{number}: {}", error_message(first));
        assert_eq!(result(second), 2_001, "{number}: {}", error_message(second));
        let host = |answer: &[u8]| text(Summary::of(answer).origin_host);
        assert_eq!(host(first), host(second), "subscriber {number}");
    }
    let waited = edge.metric("strowger_queue_wait_seconds_count", &[]);
    assert!(waited > f64::from(SUBSCRIBERS), "{waited} waited");
    assert!(servers.iter().all(|server| server.requests().len() > 10));
}

/// A server with one slot, which it keeps: the others wait. When the server dies, they hear at once that
/// nobody is there, and not after their whole time that it was too short.
#[test]
fn who_waits_for_a_server_hears_of_its_end() {
    let _alone = alone();
    let (port, one) = (free_port(), free_port());
    let server = Peer::start(one, "a.example.net", good);
    server.mute.store(true, std::sync::atomic::Ordering::Relaxed);
    let yaml = config(port, &[("a", one)], ", answer_timeout: 60s", "")
        .replace("deadline: 5s", "deadline: 30s")
        .replace("watchdog: 500ms", "watchdog: 60s")
        .replace(".example.net }", ".example.net, capacity: 1 }");
    let edge = Edge::start(&yaml);
    up(&edge, &["a"]);
    let mut connection = client(port, "pgw1.example.net");
    for number in 0..4u32 {
        let imsi = format!("00101{number:010}");
        let session = format!("pgw1.example.net;{number}");
        assert!(connection.send(&gx("pgw1.example.net", &session, 1, &imsi, number, number)));
    }
    edge.until("three to wait", |edge| edge.metric("strowger_queue_depth", &[]) == 3.0);
    let died = Instant::now();
    server.cut();
    let mut results = Vec::new();
    while results.len() < 4 {
        let answer = connection.next().expect("an answer");
        if !Header::read(&answer).expect("framed").is_request() {
            results.push((result(&answer), error_message(&answer)));
        }
    }
    assert!(results.iter().all(|(result, _)| *result == 3_002), "{results:?}");
    // A third of their time is far more than any machine takes, and far less than they had.
    assert!(died.elapsed() < Duration::from_secs(10), "after {:?}", died.elapsed());
    assert_eq!(edge.metric("strowger_queue_displaced_total", &[]), 3.0);
    assert_eq!(edge.metric("strowger_queue_depth", &[]), 0.0);
}
