//! Several connections to one server, and a server that connects itself (RFC 6733 5.6.4).

use std::collections::HashSet;
use std::fs;
use std::net::TcpListener;
use std::thread;
use std::time::{Duration, Instant};

use strowger_diameter::avp::{FLAG_REQUEST, FLAG_RETRANSMITTED, Header, Summary};
use tempfile::TempDir;

use super::freediameter::{self, Kit};
use super::stacks::{compile_otp, erl, is_content, python, verdict};
use super::{Tap, config, dissects, key, one_answer_each, relayed, text};
use super::{header, until_up};
use crate::diameter::{Connection, capabilities, ccr, client, up};
use crate::diameter_agent::{self, Peer, good};
use crate::harness::{Edge, alone, free_port, has, wait_for_tcp};

const CONNECTIONS: usize = 3;

/// The connections that the edge has to a backend, by their numbers.
fn connections(edge: &Edge, id: &str) -> Vec<u64> {
    let peers = edge.json("/api/v1/peers");
    let ours = peers["peers"].as_array().expect("a list").iter();
    let open = ours.filter(|peer| peer["instance"] == id && peer["state"] == "open");
    open.filter_map(|peer| peer["connection"].as_u64()).collect()
}

/// Erlang's server over three connections, all of which carry requests. One is cut with requests
/// pending: they come over the others, with T, to the same server, and everybody is answered.
#[test]
fn erlang_over_several_connections_of_which_one_is_lost() {
    if !has("erl") || !has("erlc") {
        return;
    }
    let _alone = alone();
    let folder = TempDir::new().expect("a folder");
    compile_otp(folder.path());
    let server = free_port();
    let call = format!("otp_peer:server({server}, \"a.example.net\").");
    let erlang = erl(folder.path(), "a", &call);
    wait_for_tcp(server);
    let (tap, port) = (Tap::to(server), free_port());
    // A worker takes its own connections first: with one of them, all are used, wherever clients come.
    let yaml = config(port, &[("a", tap.port)], "")
        .replace("workers: 2", "workers: 1")
        .replace("    backends:", &format!("    connections: {CONNECTIONS}\n    backends:"));
    let edge = Edge::start(&yaml);
    edge.until("three connections", |edge| connections(edge, "a") == [1, 2, 3]);
    let front = [0, 1].map(|_| Tap::to(port));
    let mut clients = [0, 1].map(|index| {
        let (name, port) = (format!("otp-{index}"), front[index].port);
        let call = format!("otp_peer:client({port}, 250, \"{name}.example.net\", 10).");
        erl(folder.path(), &name, &call)
    });
    let carried = || tap.by_connection(true).iter().map(|one| relayed(one).len()).collect();
    let until = |what: &str, holds: &dyn Fn(&[usize]) -> bool| {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let carried: Vec<usize> = carried();
            if holds(&carried) {
                return carried;
            }
            assert!(Instant::now() < end, "{what}: {carried:?}");
            thread::sleep(Duration::from_millis(5));
        }
    };
    until("work on all connections", &|carried| carried.iter().all(|&count| count > 20));
    erlang.signal("STOP");
    // What is under way now is not answered: of ten requests each over each of two clients some are
    // on each connection.
    let before: Vec<usize> = carried();
    let total = |carried: &[usize]| carried.iter().sum::<usize>();
    let answered = |tap: &Tap| tap.back().len();
    let quiet = {
        let mut last = (before, answered(&tap));
        loop {
            thread::sleep(Duration::from_millis(200));
            let now = (carried(), answered(&tap));
            if now == last {
                break now;
            }
            last = now;
        }
    };
    let pending = |place: usize| {
        let requests: HashSet<_> =
            relayed(&tap.by_connection(true)[place]).iter().map(|one| key(one)).collect();
        let back = tap.by_connection(false);
        let answers: HashSet<u32> =
            back.iter().flatten().map(|answer| header(answer).end_to_end).collect();
        requests.into_iter().filter(|(_, end)| !answers.contains(end)).collect::<HashSet<_>>()
    };
    let victim = (0..CONNECTIONS).max_by_key(|&place| pending(place).len()).expect("three");
    let lost = pending(victim);
    assert!(!lost.is_empty(), "nothing is pending: {quiet:?}");
    tap.cut(victim);
    until("the lost ones again", &|carried| total(carried) >= total(&quiet.0) + lost.len());
    erlang.signal("CONT");
    for (index, client) in clients.iter_mut().enumerate() {
        let code = client.wait(Duration::from_secs(120));
        let log = fs::read_to_string(folder.path().join(format!("otp-{index}.log")));
        let log = log.unwrap_or_default();
        assert_eq!(code, Some(0), "{log}");
        assert!(log.contains("2500 answered"), "{log}");
    }
    let again: HashSet<_> = relayed(&tap.forth())
        .iter()
        .filter(|request| request[4] & FLAG_RETRANSMITTED != 0)
        .map(|request| key(request))
        .collect();
    assert_eq!(again, lost, "T on those that were lost, and on no other");
    let retries = |reason: &str| edge.metric("strowger_retries_total", &[reason]);
    assert_eq!(retries("connection_lost"), lost.len() as f64);
    assert_eq!(retries("link_lost"), 0.0);
    edge.until("the third connection", |edge| connections(edge, "a") == [1, 2, 3]);
    front.iter().for_each(one_answer_each);
    // Fewer are wanted: those that are too many are closed with a goodbye, and work goes on.
    let (status, told) = edge.put_config(&yaml.replace("connections: 3", "connections: 1"));
    assert_eq!(status, 200, "{told}");
    edge.until("one connection", |edge| connections(edge, "a") == [1]);
    dissects(&tap.forth());
}

/// freeDiameter connects to the edge, which cannot connect to it: its connection is the link. It dies
/// with requests pending, and they go to the other server.
#[test]
fn freediameter_connects_itself_and_serves() {
    if !freediameter::is_here() || !has("python3") {
        return;
    }
    let _alone = alone();
    let folder = TempDir::new().expect("a folder");
    let kit = Kit::new(folder.path());
    let (port, nobody) = (free_port(), free_port());
    let mut b = kit.start("b", true, &[]);
    let tap = Tap::to(b.port);
    let yaml = config(port, &[("a", nobody), ("b", tap.port)], ", watchdog: 2s");
    let edge = Edge::start(&yaml);
    let inward = Tap::to(port);
    let mut a = kit.start("a", true, &[("edge", inward.port)]);
    until_up(&edge, &["a", "b"]);
    let peers = edge.json("/api/v1/peers");
    let mut peers = peers["peers"].as_array().expect("a list").iter();
    let both = peers.find(|peer| peer["role"] == "both").expect("a peer that is both");
    assert_eq!(both["instance"], "a", "{both}");
    assert_eq!(edge.metric("strowger_protocol_total", &["diameter_links_accepted"]), 1.0);
    let front = [0, 1].map(|_| Tap::to(port));
    let mut clients = [("client-0", "credit", 0), ("client-1", "acct", 1)].map(
        |(name, kind, index): (_, _, usize)| {
            (name, python(folder.path(), front[index].port, name, kind, 300))
        },
    );
    // Requests come to it over the connection that it opened.
    let at_a = || relayed(&inward.back());
    let wait_for = |count: usize| {
        let end = Instant::now() + Duration::from_secs(60);
        while at_a().len() < count {
            assert!(Instant::now() < end, "{} requests: {}", at_a().len(), edge.log());
            thread::sleep(Duration::from_millis(5));
        }
    };
    wait_for(100);
    a.process.signal("STOP");
    wait_for(at_a().len() + 5);
    a.process.kill();
    for (name, client) in &mut clients {
        is_content(&verdict(folder.path(), client, name), 1_500, "a.example.net");
    }
    front.iter().for_each(one_answer_each);
    let lost: HashSet<_> = at_a().iter().map(|request| key(request)).collect();
    let resent = relayed(&tap.forth());
    let resent: Vec<_> = resent.iter().filter(|request| lost.contains(&key(request))).collect();
    assert!(!resent.is_empty(), "nothing was pending");
    assert!(resent.iter().all(|request| request[4] & FLAG_RETRANSMITTED != 0));
    edge.until("it to be gone", |edge| edge.instance("servers", "a")["health"] == "link_down");
    // It comes back and serves again.
    drop(a);
    let _a = kit.start("a", true, &[("edge", inward.port)]);
    until_up(&edge, &["a", "b"]);
    dissects(&inward.back().into_iter().chain(tap.forth()).collect::<Vec<_>>());
    assert_eq!(b.process.terminate(), Some(0), "{}", b.log());
}

/// The next message with that command, of either kind.
fn next_of(connection: &mut Connection, command: u32) -> Option<Vec<u8>> {
    loop {
        let message = connection.next()?;
        if header(&message).command == command {
            return Some(message);
        }
    }
}

/// A server that dies with all its connections costs each request one try, however many connections it had:
/// those that waited there are answered by the other server.
#[test]
fn connections_that_are_lost_together_use_up_no_tries() {
    const REQUESTS: u32 = 60;
    let _alone = alone();
    let (port, one, two) = (free_port(), free_port(), free_port());
    let mute = Peer::start(one, "a.example.net", |_, _, _| None);
    let _good = Peer::start(two, "b.example.net", good);
    let pool = "    connections: 4\n";
    let yaml = diameter_agent::config(port, &[("a", one), ("b", two)], "", pool)
        .replace("watchdog: 500ms", "watchdog: 60s");
    let edge = Edge::start(&yaml);
    up(&edge, &["a", "b"]);
    edge.until("all eight connections", |edge| {
        ["a", "b"].iter().all(|id| connections(edge, id).len() == 4)
    });
    let mut asks = client(port, "client.example.net");
    for number in 1..=REQUESTS {
        let session = format!("s;{number}");
        assert!(asks.send(&ccr(&session, 1, "client.example.net", None, number)));
    }
    edge.until("half of them to hang", |_| mute.requests().len() >= 10);
    let waiting = mute.requests().len();
    mute.cut();
    let good = (0..REQUESTS)
        .filter(|_| {
            let answer = next_of(&mut asks, 272).expect("an answer");
            Summary::of(&answer).result_code == Some(2_001)
        })
        .count();
    assert_eq!(good, REQUESTS as usize, "{waiting} waited at the server that died");
}

/// Who takes a server's name gets none of its traffic unless it comes from the server's address; and a
/// connection that is one peer's does not become another's.
#[test]
fn a_name_alone_gets_nobody_a_servers_traffic() {
    let _alone = alone();
    let (port, one, two) = (free_port(), free_port(), free_port());
    let yaml = diameter_agent::config(port, &[("a", one), ("b", two)], "", "")
        .replace("watchdog: 500ms", "watchdog: 60s")
        .replace(&format!("127.0.0.1:{two}"), &format!("127.0.0.2:{two}"));
    let edge = Edge::start(&yaml);
    let introduced = |host: &str| {
        let mut connection = Connection::open(port);
        assert!(connection.send(&capabilities(FLAG_REQUEST, host, None)));
        let cea = connection.next().expect("a CEA");
        (Summary::of(&cea).result_code, connection)
    };
    let (result, mut stranger) = introduced("b.example.net");
    assert_eq!(result, Some(2_001), "a client, as any");
    assert_ne!(edge.instance("pcrf", "b")["health"], "up", "it is no server");
    let (result, _) = introduced("\0\0\0\0\u{1}");
    assert_eq!(result, Some(5_004));
    // One from the right address is the server's link, until it says that it is somebody else.
    let (result, mut link) = introduced("a.example.net");
    assert_eq!(result, Some(2_001));
    edge.until("it to be up", |edge| edge.instance("pcrf", "a")["health"] == "up");
    for connection in [&mut link, &mut stranger] {
        assert!(connection.send(&capabilities(FLAG_REQUEST, "c.example.net", None)));
        let cea = connection.next().expect("a CEA");
        assert_eq!(Summary::of(&cea).result_code, Some(5_012));
        assert!(connection.next_of_any().is_none(), "it is closed");
    }
    let server = Peer::start(one, "a.example.net", good);
    edge.until("the server itself to be up", |edge| edge.instance("pcrf", "a")["health"] == "up");
    let mut asks = client(port, "client.example.net");
    let asked = ccr("s;1", 1, "client.example.net", Some("a.example.net"), 7);
    assert!(asks.send(&asked));
    assert_eq!(Summary::of(&next_of(&mut asks, 272).expect("an answer")).result_code, Some(2_001));
    assert_eq!(server.requests().len(), 1);
}

/// Both sides connect to each other at once. The connection that the node with the lesser name opened
/// stays; requests go over it, and its node's own requests go to others.
#[test]
fn of_two_connections_that_cross_one_stays() {
    let _alone = alone();
    // The edge is edge.example.net: the first loses against it, the second wins.
    for (name, edge_wins) in [("a", true), ("z", false)] {
        let host = format!("{name}.example.net");
        let (port, other) = (free_port(), free_port());
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let server = listener.local_addr().expect("an address").port();
        let b = Peer::start(other, "b.example.net", good);
        let edge = Edge::start(
            &diameter_agent::config(port, &[(name, server), ("b", other)], ", watchdog: 10s", "")
                .replace("watchdog: 500ms, ", ""),
        );
        // Its CER is here, and ours is not answered yet: now we connect too.
        let mut theirs = Connection::new(listener.accept().expect("it connects").0);
        let cer = theirs.next_of_any().expect("a CER");
        let mut ours = Connection::open(port);
        assert!(ours.send(&capabilities(FLAG_REQUEST, &host, None)));
        let cea = ours.next().expect("a CEA");
        let result = Summary::of(&cea).result_code;
        let mut link = if edge_wins {
            assert_eq!(result, Some(2_001), "{}", edge.log());
            assert!(theirs.next_of_any().is_none(), "its own connection is closed");
            ours
        } else {
            assert_eq!(result, Some(4_003));
            assert!(ours.next_of_any().is_none(), "ours is closed");
            let header = Header::read(&cer).expect("framed");
            assert!(theirs.send(&capabilities(0, &host, Some(&header))));
            theirs
        };
        edge.until("it to be up", |edge| {
            [name, "b"].iter().all(|id| edge.instance("pcrf", id)["health"] == "up")
        });
        // A further connection is one too many, whoever opened the first.
        let mut third = Connection::open(port);
        assert!(third.send(&capabilities(FLAG_REQUEST, &host, None)));
        let cea = third.next().expect("a CEA");
        assert_eq!(Summary::of(&cea).result_code, Some(4_003));
        assert!(third.next_of_any().is_none());
        // A client's requests come over the one that stayed.
        let mut asks = client(port, "client.example.net");
        let mut answered = 0;
        for number in 0..20u32 {
            let session = format!("client;{number}");
            let request = ccr(&session, 1, "client.example.net", Some(&host), number + 1);
            assert!(asks.send(&request));
            let request = next_of(&mut link, 272).expect("a request");
            let head = Header::read(&request).expect("framed");
            let mut answer = request.clone();
            answer[4] &= !FLAG_REQUEST;
            assert_eq!(text(Summary::of(&request).session_id), session);
            assert!(link.send(&answer));
            let back = next_of(&mut asks, 272).expect("an answer");
            answered += u32::from(header(&back).end_to_end == head.end_to_end);
        }
        assert_eq!(answered, 20);
        // Its own requests go to the other server, not back to it, whoever they might hash to.
        for number in 0..20u32 {
            let request = ccr(&format!("{name};{number}"), 1, &host, None, 1_000 + number);
            assert!(link.send(&request));
            let answer = next_of(&mut link, 272).expect("an answer");
            assert!(!header(&answer).is_request(), "its own request came back");
            assert_eq!(text(Summary::of(&answer).origin_host), "b.example.net");
        }
        assert_eq!(b.requests().len(), 20);
    }
}
