//! Duplicates, rates towards servers, and servers' Load, through the binary.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use strowger_diameter::avp::{FLAG_RETRANSMITTED, Header, Summary, code};
use strowger_diameter::build::append;

use crate::diameter::{ccr, client, text, up};
use crate::diameter_agent::{Peer, config, data, exchange, good, result};
use crate::diameter_follow::urgent;
use crate::harness::{Edge, alone, free_port};

const HOST: &str = "client.example.net";

/// RFC 6733 5.5.4: a request that comes again with T gets the answer that was given; one that is under
/// way is joined, and its answer goes to the newer connection. The server hears of either once.
#[test]
fn duplicates_are_answered_and_not_repeated() {
    let _alone = alone();
    let (port, one) = (free_port(), free_port());
    let (held, count) = (Arc::new(Mutex::new(())), Arc::new(AtomicU32::new(0)));
    let (gate, counter) = (Arc::clone(&held), Arc::clone(&count));
    let server = Peer::start(one, "a.example.net", move |peer, header, message| {
        drop(gate.lock());
        let number = counter.fetch_add(1, Ordering::Relaxed);
        // Each answer is another one.
        let mut more = Vec::new();
        append(&mut more, code::ERROR_MESSAGE, 0, &number.to_be_bytes());
        Some(peer.answer(header, message, 2_001, &more))
    });
    let yaml = config(port, &[("a", one)], ", duplicates: 4m, answer_timeout: 60s", "");
    // Each worker keeps the answers that went through it; the client's connections may be at two.
    let yaml = yaml.replace("workers: 2", "workers: 1");
    let edge = Edge::start(&yaml.replace("watchdog: 500ms", "watchdog: 60s"));
    up(&edge, &["a"]);
    let mut first = client(port, HOST);
    let request = ccr("s;1", 1, HOST, None, 41);
    let mut again = request.clone();
    again[4] |= FLAG_RETRANSMITTED;
    let answer = exchange(&mut first, &[request]).remove(&41).expect("an answer");
    // Over another connection of the same client, under another Hop-by-Hop identifier.
    let mut second = client(port, HOST);
    again[12..16].copy_from_slice(&77u32.to_be_bytes());
    let same = exchange(&mut second, &[again]).remove(&41).expect("an answer");
    assert_eq!(Header::read(&same).expect("framed").hop_by_hop, 77);
    assert_eq!(data(&same, code::ERROR_MESSAGE), data(&answer, code::ERROR_MESSAGE));
    assert_eq!(server.requests().len(), 1, "the server was asked once");
    let answered = |edge: &Edge, what: &str| edge.metric("strowger_protocol_total", &[what]);
    assert_eq!(answered(&edge, "diameter_duplicates_answered"), 1.0);
    // The next one comes again while it is under way.
    let hold = held.lock().expect("not poisoned");
    let request = ccr("s;2", 1, HOST, None, 42);
    assert!(first.send(&request));
    edge.until("it to be there", |_| server.requests().len() == 2);
    let mut again = request;
    again[4] |= FLAG_RETRANSMITTED;
    assert!(second.send(&again));
    edge.until("it to be joined", |edge| answered(edge, "diameter_duplicates_joined") == 1.0);
    drop(hold);
    let answer = second.next().expect("an answer");
    assert_eq!(Header::read(&answer).expect("framed").end_to_end, 42);
    assert_eq!(server.requests().len(), 2, "the server was asked once");
    // The older connection gets nothing but what it asks next.
    let last = exchange(&mut first, &[ccr("s;3", 1, HOST, None, 43)]);
    assert_eq!(last.len(), 1);
}

/// `egress`: what is not urgent has what is not reserved; emergencies always pass.
#[test]
fn rates_towards_servers_are_kept() {
    let _alone = alone();
    let (port, one) = (free_port(), free_port());
    let server = Peer::start(one, "a.example.net", good);
    let yaml = config(port, &[("a", one)], ", egress: { max: 50, reserved: 40 }", "");
    let edge = Edge::start(&yaml.replace("watchdog: 500ms", "watchdog: 60s"));
    up(&edge, &["a"]);
    let mut connection = client(port, HOST);
    // Priority 15 is bulk: ten in a second, and so one at once. A slow machine lets a few more pass.
    let mut at_once = |kind: &str, priority: u32, from: u32, count: u32| {
        let each = (from..from + count)
            .map(|number| urgent(&format!("{kind};{number}"), number, priority));
        let answers = exchange(&mut connection, &each.collect::<Vec<_>>());
        answers.values().filter(|answer| result(answer) == 2_001).count()
    };
    let passed = at_once("bulk", 15, 0, 40);
    assert!((1..30).contains(&passed), "{passed} of 40 bulk requests passed");
    assert_eq!(at_once("emergency", 0, 1_000, 40), 40, "emergencies pass");
    assert_eq!(server.requests().len(), passed + 40);
}

/// `overload.load` (RFC 8583): a server that tells of a high load gets fewer new sessions; what it told
/// us alone does not reach the client.
#[test]
fn load_moves_new_sessions() {
    const LOAD_PEER: u32 = 1;
    const SESSIONS: u32 = 1_000;
    let _alone = alone();
    let (port, one, two) = (free_port(), free_port(), free_port());
    let full = Peer::start(one, "a.example.net", |peer, header, message| {
        let (mut group, mut load) = (Vec::new(), Vec::new());
        append(&mut group, code::LOAD_TYPE, 0, &LOAD_PEER.to_be_bytes());
        append(&mut group, code::LOAD_VALUE, 0, &58_981u64.to_be_bytes());
        append(&mut group, code::SOURCE_ID, 0, b"a.example.net");
        append(&mut load, code::LOAD, 0, &group);
        Some(peer.answer(header, message, 2_001, &load))
    });
    let _idle = Peer::start(two, "b.example.net", good);
    let pool = "    balance: weighted-random\n";
    let yaml = config(port, &[("a", one), ("b", two)], ", overload: { load: true }", pool);
    let edge = Edge::start(&yaml.replace("watchdog: 500ms", "watchdog: 60s"));
    up(&edge, &["a", "b"]);
    let mut connection = client(port, HOST);
    let told = ccr("first", 1, HOST, Some("a.example.net"), 1);
    let answer = exchange(&mut connection, &[told]).remove(&1).expect("an answer");
    assert_eq!(text(Summary::of(&answer).origin_host), "a.example.net");
    assert_eq!(data(&answer, code::LOAD), None, "it was for the edge alone");
    let before = full.requests().len();
    let sessions: Vec<Vec<u8>> = (10..10 + SESSIONS)
        .map(|number| ccr(&format!("s;{number}"), 1, HOST, None, number))
        .collect();
    let answers = exchange(&mut connection, &sessions);
    assert!(answers.values().all(|answer| result(answer) == 2_001));
    let share = full.requests().len() - before;
    // A tenth against a whole: 91 of them, give or take nine. Half without the report.
    assert!((30..200).contains(&share), "{share} of {SESSIONS}");
}
