//! What peers go through: watchdogs, goodbyes and their causes, drains, late answers, and servers that
//! hang beside others that do not.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use strowger_diameter::avp::{FLAG_RETRANSMITTED, Summary};
use tempfile::TempDir;

use super::stacks::{compile_otp, erl};
use super::{DPR, DWR, Tap, config, dissects, header, one_answer_each, relayed, text, until_up};
use crate::diameter::{Connection, ccr, client, up};
use crate::diameter_agent::{self, Peer, exchange, good, result};
use crate::harness::{Edge, Process, alone, free_port, has, wait_for_tcp};

const CLIENT: &str = "client.example.net";

fn otp_server(folder: &Path, name: &str, port: u16) -> Process {
    let call = format!("otp_peer:server({port}, \"{name}.example.net\").");
    let server = erl(folder, name, &call);
    wait_for_tcp(port);
    server
}

/// Erlang's server stands still until it is given up. When it goes on, it answers three watchdogs
/// before it gets a request (RFC 3539 3.4.1).
#[test]
fn who_was_given_up_answers_three_watchdogs_first() {
    if !has("erl") || !has("erlc") {
        return;
    }
    let _alone = alone();
    let folder = TempDir::new().expect("a folder");
    compile_otp(folder.path());
    let (server, port) = (free_port(), free_port());
    let erlang = otp_server(folder.path(), "a", server);
    let tap = Tap::to(server);
    let edge = Edge::start(&config(port, &[("a", tap.port)], ", watchdog: 500ms"));
    until_up(&edge, &["a"]);
    erlang.signal("STOP");
    edge.until("it to be suspected", |edge| edge.instance("servers", "a")["health"] == "link_down");
    edge.until("it to be given up", |_| tap.by_connection(true).len() > 1);
    erlang.signal("CONT");
    until_up(&edge, &["a"]);
    let front = Tap::to(port);
    let call = format!("otp_peer:client({}, 50, \"otp.example.net\", 2).", front.port);
    let mut asks = erl(folder.path(), "otp", &call);
    assert_eq!(asks.wait(Duration::from_secs(60)), Some(0));
    let (forth, back) = (tap.by_connection(true), tap.by_connection(false));
    let used = forth.iter().position(|one| !relayed(one).is_empty()).expect("a used connection");
    assert!(used > 0, "the first one is the one that was given up");
    let first = forth[used].iter().position(|one| !relayed(std::slice::from_ref(one)).is_empty());
    let asked = forth[used][..first.expect("a request")].iter();
    let asked = asked.filter(|one| header(one).command == DWR && header(one).is_request()).count();
    let told =
        back[used].iter().filter(|one| header(one).command == DWR && !header(one).is_request());
    assert!(asked >= 3 && told.count() >= 3, "{asked} watchdogs");
    one_answer_each(&front);
    dissects(&tap.forth());
}

/// Erlang's server leaves and is there again at once. How long it is left alone is the cause's to say.
#[test]
fn goodbyes_are_heeded_by_their_cause() {
    if !has("erl") || !has("erlc") {
        return;
    }
    let _alone = alone();
    let folder = TempDir::new().expect("a folder");
    compile_otp(folder.path());
    // Tw is 500 ms: twice that after BUSY, twenty times that after DO_NOT_WANT_TO_TALK_TO_YOU, a
    // quarter shorter or longer. A slow machine makes it longer.
    let causes = [("rebooting", 0, 0), ("busy", 1, 700), ("goaway", 2, 7_000)];
    for (cause, number, least) in causes {
        let (server, port) = (free_port(), free_port());
        let call = format!("otp_peer:leaving({server}, \"a.example.net\", {cause}).");
        let _erlang = erl(folder.path(), cause, &call);
        wait_for_tcp(server);
        let tap = Tap::to(server);
        let edge = Edge::start(&config(port, &[("a", tap.port)], ", watchdog: 500ms"));
        let goodbyes = |messages: Vec<Vec<u8>>| {
            let of = |message: &&Vec<u8>| header(message).command == DPR;
            messages.iter().filter(of).cloned().collect::<Vec<_>>()
        };
        edge.until("its goodbye", |_| !goodbyes(tap.back()).is_empty());
        let left = Instant::now();
        let before = tap.by_connection(true).len();
        edge.until("our answer", |_| !goodbyes(tap.forth()).is_empty());
        edge.until("another connection", |_| tap.by_connection(true).len() > before);
        let pause = left.elapsed();
        assert!(pause >= Duration::from_millis(least), "{cause}: {pause:?}");
        until_up(&edge, &["a"]);
        let dpr = &goodbyes(tap.back())[0];
        let told = diameter_agent::data(dpr, 273).expect("a cause");
        assert_eq!(told, u32::to_be_bytes(number), "{cause}");
    }
}

/// Erlang on both sides. One of two servers is drained under load: nobody loses an answer, it gets a
/// DPR (REBOOTING) and nothing after it; then a reload takes the other one in its stead.
#[test]
fn drains_and_reloads_under_load_lose_nothing() {
    if !has("erl") || !has("erlc") {
        return;
    }
    let _alone = alone();
    let folder = TempDir::new().expect("a folder");
    compile_otp(folder.path());
    let ports = ["a", "b", "c"].map(|_| free_port());
    let _servers = [0, 1, 2].map(|at| otp_server(folder.path(), ["a", "b", "c"][at], ports[at]));
    let taps = ports.map(Tap::to);
    let port = free_port();
    let of = |ids: &[(&str, usize)]| {
        let list: Vec<_> = ids.iter().map(|(id, at)| (*id, taps[*at].port)).collect();
        config(port, &list, ", watchdog: 5s")
    };
    let edge = Edge::start(&of(&[("a", 0), ("b", 1)]));
    until_up(&edge, &["a", "b"]);
    let front = [0, 1].map(|_| Tap::to(port));
    let mut clients = [0, 1].map(|index| {
        let (name, port) = (format!("otp-{index}"), front[index].port);
        let call = format!("otp_peer:client({port}, 1500, \"{name}.example.net\", 10).");
        erl(folder.path(), &name, &call)
    });
    let until_work = |tap: &Tap, more: usize| {
        let wanted = relayed(&tap.forth()).len() + more;
        edge.until("work", |_| relayed(&tap.forth()).len() >= wanted);
    };
    until_work(&taps[0], 200);
    let drain = "/api/v1/pools/servers/instances/a/drain";
    let (status, told) = edge.post(drain, "{\"deadline_s\":1}");
    assert_eq!(status, 202, "{told}");
    let leaves = |tap: &Tap| {
        let forth = tap.forth();
        forth.iter().any(|message| header(message).command == DPR)
    };
    edge.until("its goodbye", |_| leaves(&taps[0]));
    let (status, told) = edge.put_config(&of(&[("b", 1), ("c", 2)]));
    assert_eq!(status, 200, "{told}");
    until_up(&edge, &["b", "c"]);
    for (index, client) in clients.iter_mut().enumerate() {
        let code = client.wait(Duration::from_secs(180));
        let log = fs::read_to_string(folder.path().join(format!("otp-{index}.log")));
        let log = log.unwrap_or_default();
        assert_eq!(code, Some(0), "{log}{}", edge.log());
        assert!(log.contains("15000 answered"), "{log}");
    }
    let forth = taps[0].forth();
    let goodbye = forth.iter().position(|message| header(message).command == DPR);
    let goodbye = goodbye.expect("it was seen");
    assert_eq!(diameter_agent::data(&forth[goodbye], 273), Some(vec![0; 4]), "REBOOTING");
    assert!(relayed(&forth[goodbye..]).is_empty(), "requests after the goodbye");
    front.iter().for_each(one_answer_each);
}

/// A server answers after it was given up for a request: the client has the other one's answer by
/// then, and gets no second one.
#[test]
fn late_first_answers_are_dropped() {
    let _alone = alone();
    let (port, one, two) = (free_port(), free_port(), free_port());
    let late = |peer: &Peer, header: &strowger_diameter::avp::Header, message: &[u8]| {
        thread::sleep(Duration::from_millis(2_500));
        good(peer, header, message)
    };
    let (a, b) = (Peer::start(one, "a.example.net", late), Peer::start(two, "b.example.net", good));
    let yaml = diameter_agent::config(port, &[("a", one), ("b", two)], ", stalled: 300ms", "");
    let yaml =
        yaml.replace("watchdog: 500ms", "watchdog: 30s").replace("deadline: 5s", "deadline: 30s");
    let edge = Edge::start(&yaml);
    up(&edge, &["a", "b"]);
    let mut asks = client(port, CLIENT);
    let request = ccr("late;1", 1, CLIENT, Some("a.example.net"), 7);
    assert!(asks.send(&request));
    let answer = asks.next().expect("an answer");
    assert_eq!(text(Summary::of(&answer).origin_host), "b.example.net");
    let again = &b.requests()[0];
    assert!(again[4] & FLAG_RETRANSMITTED != 0 && a.requests().len() == 1);
    edge.until("the late one", |edge| {
        edge.metric("strowger_drops_total", &["answer_unmatched"]) >= 1.0
    });
    // The next thing that the client hears is the answer to its next request.
    assert!(asks.send(&ccr("late;2", 1, CLIENT, Some("b.example.net"), 8)));
    let answer = asks.next().expect("an answer");
    assert_eq!(header(&answer).end_to_end, 8, "a second answer to the first request");
}

/// Latencies of requests to one server, one after the other: the median and the 99th percentile.
fn latencies(connection: &mut Connection, from: u32) -> (Duration, Duration) {
    const COUNT: usize = 1_000;
    let mut each: Vec<Duration> = (0..COUNT as u32)
        .map(|number| {
            let (began, number) = (Instant::now(), from + number);
            let request = ccr(&format!("b;{number}"), 1, CLIENT, Some("b.example.net"), number);
            assert!(connection.send(&request));
            let answer = connection.next().expect("an answer");
            assert_eq!(result(&answer), 2_001);
            began.elapsed()
        })
        .collect();
    each.sort();
    (each[COUNT / 2], each[COUNT * 99 / 100])
}

/// A server that takes requests and answers none, with as many under way as it may have, beside one
/// that answers: the other's requests are all answered while those wait. The figures are printed.
#[test]
fn a_hung_server_holds_nobody_else_up() {
    const HUNG: u32 = 500;
    let _alone = alone();
    let (port, one, two) = (free_port(), free_port(), free_port());
    let _servers = [
        Peer::start(one, "a.example.net", |_, _, _| None),
        Peer::start(two, "b.example.net", good),
    ];
    let options = format!(", peer_pending: {HUNG}, answer_timeout: 120s");
    let yaml = diameter_agent::config(port, &[("a", one), ("b", two)], &options, "")
        .replace("watchdog: 500ms", "watchdog: 60s")
        .replace("deadline: 5s", "deadline: 30s");
    let edge = Edge::start(&yaml);
    up(&edge, &["a", "b"]);
    let mut asks = client(port, CLIENT);
    let without = latencies(&mut asks, 100_000);
    let mut hangs = client(port, "other.example.net");
    for number in 0..HUNG {
        let session = format!("a;{number}");
        assert!(hangs.send(&ccr(&session, 1, "other.example.net", Some("a.example.net"), number)));
    }
    edge.until("all to wait", |edge| edge.instance("pcrf", "a")["in_flight"] == HUNG);
    let beside = latencies(&mut asks, 200_000);
    println!("others' median and p99: {without:?} alone, {beside:?} beside a hung server");
    // More of them, all the time, which its bulkhead refuses.
    let refused = Arc::new(AtomicU32::new(0));
    let (counter, mut more) = (Arc::clone(&refused), client(port, "third.example.net"));
    let flood = thread::spawn(move || {
        let requests: Vec<Vec<u8>> = (0..5_000)
            .map(|number| {
                ccr(&format!("c;{number}"), 1, "third.example.net", Some("a.example.net"), number)
            })
            .collect();
        let busy =
            exchange(&mut more, &requests).values().filter(|one| result(one) == 3_004).count();
        counter.store(busy as u32, Ordering::Relaxed);
    });
    let beside = latencies(&mut asks, 200_000);
    flood.join().expect("it ends");
    println!(
        "others' requests, median and p99: {without:?} alone, {beside:?} beside a hung server"
    );
    assert_eq!(edge.instance("pcrf", "a")["in_flight"], HUNG, "they still wait");
    let busy = refused.load(Ordering::Relaxed);
    println!("{busy} of those were refused at once");
}
