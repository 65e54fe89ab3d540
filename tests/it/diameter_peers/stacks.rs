//! The same work with each stack: transactions from four client connections to three servers, one of
//! which dies with requests pending.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use strowger_diameter::avp::Summary;
use tempfile::TempDir;

use super::freediameter::{self, Kit};
use super::{ACR, CER, DPR, DWR, Tap, config, dissects, header, one_answer_each, relayed};
use super::{resends_bear_t, text, until_up};
use crate::harness::{Edge, Process, alone, free_port, has, wait_for_tcp};

const IDS: [&str; 3] = ["a", "b", "c"];

/// A client in Python, started.
pub(super) fn python(folder: &Path, port: u16, name: &str, kind: &str, sessions: u32) -> Process {
    let script = folder.join("diameter_client.py");
    fs::write(&script, include_str!("../peers/diameter_client.py")).expect("written");
    let mut command = Command::new("python3");
    command.arg(script).args([&port.to_string(), &format!("{name}.example.net"), kind]);
    command.args([&sessions.to_string(), "20"]);
    Process::spawn(&mut command, &folder.join(format!("{name}.log")))
}

/// What a client in Python says at its end.
pub(super) fn verdict(folder: &Path, client: &mut Process, name: &str) -> Value {
    let code = client.wait(Duration::from_secs(120));
    let said = fs::read_to_string(folder.join(format!("{name}.log"))).unwrap_or_default();
    assert_eq!(code, Some(0), "{name}: {said}");
    serde_json::from_str(said.trim()).expect("JSON")
}

/// All answered by 2001, nothing twice, and each session at one server, or at a second one if the
/// first was the one that died.
pub(super) fn is_content(told: &Value, transactions: u32, dead: &str) {
    assert_eq!(told["answered"], transactions, "{told}");
    assert_eq!(told["strangers"], 0, "{told}");
    assert_eq!(told["results"]["2001"], transactions, "{told}");
    for owners in told["owners"].as_array().expect("a list") {
        let living = owners.as_array().expect("a list").iter().filter(|owner| *owner != dead);
        assert!(living.count() <= 1, "a session was at {owners}");
    }
}

/// Erlang's peer, compiled.
pub(super) fn compile_otp(folder: &Path) {
    fs::write(folder.join("otp_peer.erl"), include_str!("../peers/otp_peer.erl")).expect("written");
    let compiled =
        Command::new("erlc").arg("otp_peer.erl").current_dir(folder).output().expect("it runs");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stdout));
}

pub(super) fn erl(folder: &Path, name: &str, call: &str) -> Process {
    let mut command = Command::new("erl");
    command.args(["-noshell", "-noinput", "-eval", call]).current_dir(folder);
    Process::spawn(&mut command, &folder.join(format!("{name}.log")))
}

/// Stops a server when it is at work, waits until requests are pending at it, and kills it.
fn kill_with_requests_pending(server: &mut Process, tap: &Tap, after: usize) {
    let wait_for = |count: usize| {
        let end = Instant::now() + Duration::from_secs(60);
        while relayed(&tap.forth()).len() < count {
            assert!(Instant::now() < end, "the server does not get {count} requests");
            thread::sleep(Duration::from_millis(5));
        }
    };
    wait_for(after);
    server.signal("STOP");
    wait_for(relayed(&tap.forth()).len() + 5);
    server.kill();
}

fn settled(edge: &Edge) {
    edge.until("nothing in flight", |edge| {
        IDS.iter().all(|id| edge.instance("servers", id)["in_flight"] == 0)
    });
}

/// freeDiameter as the servers, four connections of a client in Python.
#[test]
fn freediameter_serves_and_one_dies() {
    if !freediameter::is_here() || !has("python3") {
        return;
    }
    let _alone = alone();
    let folder = TempDir::new().expect("a folder");
    let kit = Kit::new(folder.path());
    let mut servers = IDS.map(|id| kit.start(id, true, &[]));
    let taps = [0, 1, 2].map(|index| Tap::to(servers[index].port));
    let port = free_port();
    let at: Vec<_> = IDS.iter().zip(&taps).map(|(id, tap)| (*id, tap.port)).collect();
    let edge = Edge::start(&config(port, &at, ", watchdog: 1s"));
    until_up(&edge, &IDS);
    let front = [0, 1, 2, 3].map(|_| Tap::to(port));
    let names = ["client-0", "client-1", "client-2", "client-3"];
    let mut clients = [0, 1, 2, 3].map(|index| {
        // Both applications, each over two connections.
        let kind = if index % 2 == 0 { "credit" } else { "acct" };
        python(folder.path(), front[index].port, names[index], kind, 500)
    });
    kill_with_requests_pending(&mut servers[0].process, &taps[0], 200);
    for (client, name) in clients.iter_mut().zip(names) {
        is_content(&verdict(folder.path(), client, name), 2_500, "a.example.net");
    }
    resends_bear_t(&taps[0], &[&taps[1], &taps[2]]);
    settled(&edge);
    // A quiet time: freeDiameter is asked whether it is there, and says so.
    edge.until("watchdogs", |_| {
        let watchdogs = |messages: &[Vec<u8>]| {
            messages.iter().filter(|message| header(message).command == DWR).count()
        };
        watchdogs(&taps[1].forth()) >= 2 && watchdogs(&taps[1].back()) >= 2
    });
    until_up(&edge, &["b", "c"]);
    let mut emitted: Vec<Vec<u8>> = Vec::new();
    for tap in &front {
        one_answer_each(tap);
        emitted.extend(tap.back());
    }
    for tap in &taps {
        emitted.extend(tap.forth());
    }
    dissects(&emitted);
}

/// Erlang's diameter on both sides: three servers, four clients with ten requests under way each.
#[test]
fn erlangs_servers_and_one_dies() {
    if !has("erl") || !has("erlc") {
        return;
    }
    let _alone = alone();
    let folder = TempDir::new().expect("a folder");
    compile_otp(folder.path());
    let ports = IDS.map(|_| free_port());
    let mut servers = [0, 1, 2].map(|index| {
        let call = format!("otp_peer:server({}, \"{}.example.net\").", ports[index], IDS[index]);
        erl(folder.path(), IDS[index], &call)
    });
    ports.iter().for_each(|port| wait_for_tcp(*port));
    let taps = ports.map(Tap::to);
    let port = free_port();
    let at: Vec<_> = IDS.iter().zip(&taps).map(|(id, tap)| (*id, tap.port)).collect();
    let edge = Edge::start(&config(port, &at, ", watchdog: 1s"));
    until_up(&edge, &IDS);
    let front = [0, 1, 2, 3].map(|_| Tap::to(port));
    let mut clients = [0, 1, 2, 3].map(|index| {
        let port = front[index].port;
        let name = format!("otp-{index}");
        erl(
            folder.path(),
            &name,
            &format!("otp_peer:client({port}, 250, \"{name}.example.net\", 10)."),
        )
    });
    kill_with_requests_pending(&mut servers[0], &taps[0], 100);
    for (index, client) in clients.iter_mut().enumerate() {
        let code = client.wait(Duration::from_secs(120));
        let log =
            fs::read_to_string(folder.path().join(format!("otp-{index}.log"))).unwrap_or_default();
        assert_eq!(code, Some(0), "{log}");
        assert!(log.contains("2500 answered"), "{log}");
    }
    resends_bear_t(&taps[0], &[&taps[1], &taps[2]]);
    settled(&edge);
    front.iter().for_each(one_answer_each);
    let emitted: Vec<_> =
        front.iter().flat_map(Tap::back).chain(taps.iter().flat_map(Tap::forth)).collect();
    dissects(&emitted);
}

/// freeDiameter as a relay in front of the edge and behind it; Erlang's server answers at the end.
#[test]
fn freediameter_relays_on_both_sides() {
    if !freediameter::is_here() || !has("python3") || !has("erl") || !has("erlc") {
        return;
    }
    let _alone = alone();
    let folder = TempDir::new().expect("a folder");
    compile_otp(folder.path());
    let kit = Kit::new(folder.path());
    let last = free_port();
    let _server =
        erl(folder.path(), "server", &format!("otp_peer:server({last}, \"otp.example.net\")."));
    wait_for_tcp(last);
    let behind = kit.start("behind", false, &[("otp", last)]);
    let far = Tap::to(behind.port);
    let port = free_port();
    let edge = Edge::start(&config(port, &[("behind", far.port)], ", applications: [acct]"));
    until_up(&edge, &["behind"]);
    let near = Tap::to(port);
    let front = kit.start("front", false, &[("edge", near.port)]);
    edge.until("freeDiameter to be let in", |_| {
        near.back().iter().any(|message| {
            header(message).command == CER && Summary::of(message).result_code == Some(2_001)
        })
    });
    let mut client = python(folder.path(), front.port, "client", "acct", 200);
    let told = verdict(folder.path(), &mut client, "client");
    let logs = || format!("{}\n{}\n{}", front.log(), behind.log(), edge.log());
    assert_eq!(told["results"]["2001"], 1_000, "{told} {}", logs());
    is_content(&told, 1_000, "");
    // Who is on the way stands in the requests that come out: the client, and freeDiameter.
    let forth = far.forth();
    let request = forth.iter().find(|message| header(message).command == ACR).expect("a request");
    let records: Vec<String> = strowger_diameter::avp::Avps::of(request)
        .flatten()
        .filter(|avp| avp.is(strowger_diameter::avp::code::ROUTE_RECORD))
        .map(|avp| text(Some(avp.data)))
        .collect();
    assert_eq!(records, ["client.example.net", "front.example.net"]);
    let mut front = front;
    assert_eq!(front.process.terminate(), Some(0), "{}", front.log());
    edge.until("its goodbye", |_| near.back().iter().any(|message| header(message).command == DPR));
    one_answer_each(&near);
    dissects(&near.back().into_iter().chain(forth).collect::<Vec<_>>());
}
