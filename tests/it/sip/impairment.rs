//! A bad network on both sides of the edge: what RFC 3261's timers promise holds, and the edge sends
//! no more than it must.
//!
//! The bound, stated: in a good network each message in makes one out, and an INVITE its 100 besides.
//! For what gets lost, a transaction of the edge's repeats its request at most 7 (INVITE) or 11
//! times in 64 x T1 (17.1.1.2, 17.1.2.2), and a refusal at most 11 times until its ACK (17.2.1).

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::{SocketAddr, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::caller::Callers;
use super::phone::{Client, Server, status};
use crate::harness::{Edge, Process, alone, free_port, until_bound};

/// How bad it is: shares of all datagrams, in thousandths.
#[derive(Clone, Copy, Debug, Default)]
struct Impairment {
    loss: u64,
    duplication: u64,
    /// Held back by `delay` more, so that later ones overtake.
    reordering: u64,
    /// Each is late by up to so much.
    delay: Duration,
}

/// Messages at the edge, as the relays see them.
#[derive(Debug, Default)]
struct Counts {
    into_edge: AtomicU64,
    out_of_edge: AtomicU64,
}

/// A relay of datagrams between whoever speaks to it first and a target.
struct Relay {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Relay {
    /// `edge_is_target`: it stands before the edge; else behind it.
    fn new(
        target: SocketAddr,
        edge_is_target: bool,
        impairment: Impairment,
        seed: u64,
        counts: &Arc<Counts>,
    ) -> Self {
        let outer = UdpSocket::bind("127.0.0.1:0").expect("a free port");
        let inner = UdpSocket::bind("127.0.0.1:0").expect("a free port");
        inner.connect(target).expect("loopback");
        let address = outer.local_addr().expect("bound");
        let stop = Arc::new(AtomicBool::new(false));
        let speaker = Arc::new(std::sync::Mutex::new(None::<SocketAddr>));
        let way = |inwards: bool| {
            let (outer, inner) = (outer.try_clone().expect("a socket"), inner.try_clone());
            let (inner, stop) = (inner.expect("a socket"), Arc::clone(&stop));
            let (speaker, counts) = (Arc::clone(&speaker), Arc::clone(counts));
            let mut random = Random(seed ^ u64::from(inwards) << 40 | 1);
            std::thread::spawn(move || {
                let mut held: BinaryHeap<Reverse<(Instant, u64, Vec<u8>)>> = BinaryHeap::new();
                let (mut buffer, mut serial) = (vec![0; 65_536], 0);
                let from = if inwards { &outer } else { &inner };
                while !stop.load(Ordering::Relaxed) {
                    let now = Instant::now();
                    while held.peek().is_some_and(|Reverse((at, ..))| *at <= now) {
                        let Some(Reverse((.., bytes))) = held.pop() else { break };
                        if inwards == edge_is_target {
                            counts.into_edge.fetch_add(1, Ordering::Relaxed);
                        }
                        // Whoever is gone gets nothing.
                        let _gone = if inwards {
                            inner.send(&bytes)
                        } else {
                            let to = *speaker.lock().expect("no panic");
                            to.map_or(Ok(0), |to| outer.send_to(&bytes, to))
                        };
                    }
                    let pause =
                        held.peek().map_or(Duration::from_millis(20), |Reverse((at, ..))| {
                            at.saturating_duration_since(now)
                        });
                    let pause = pause.clamp(Duration::from_millis(1), Duration::from_millis(20));
                    from.set_read_timeout(Some(pause)).expect("an option");
                    let Ok((length, sender)) = from.recv_from(&mut buffer) else { continue };
                    if inwards {
                        *speaker.lock().expect("no panic") = Some(sender);
                    }
                    if inwards != edge_is_target {
                        counts.out_of_edge.fetch_add(1, Ordering::Relaxed);
                    }
                    let copies = match random.below(1_000) {
                        share if share < impairment.loss => 0,
                        share if share < impairment.loss + impairment.duplication => 2,
                        _ => 1,
                    };
                    for _ in 0..copies {
                        let mut late = impairment.delay.mul_f64(random.below(1_000) as f64 / 1e3);
                        if random.below(1_000) < impairment.reordering {
                            late += impairment.delay;
                        }
                        serial += 1;
                        held.push(Reverse((
                            Instant::now() + late,
                            serial,
                            buffer[..length].to_vec(),
                        )));
                    }
                }
            })
        };
        let threads = vec![way(true), way(false)];
        Self { address, stop, threads }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ended = thread.join();
        }
    }
}

/// xorshift: the same fates in each run, as far as the order of arrival is the same.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }
}

fn config(port: u16, backends: &[SocketAddr], options: &str) -> String {
    let backends: Vec<String> = backends
        .iter()
        .enumerate()
        .map(|(number, address)| {
            format!("{{ id: i{number}, address: udp://{address}, capacity: 1000 }}")
        })
        .collect();
    format!(
        "version: 1\nnode: {{ name: test, workers: 2 }}\nadmin: {{ listen: ADMIN }}\nclasses:\n  setup: {{ deadline: 30s }}\n  in-session: {{ deadline: 30s }}\nlisteners:\n  - name: sip\n    protocol: sip\n    bind: [udp://127.0.0.1:{port}]\n    pool: ims\n    options: {{ {options} }}\npools:\n  ims:\n    outlier: {{ faults: 1000 }}\n    backends: [{}]\n",
        backends.join(", ")
    )
}

/// Plays calls through relays that are that bad; messages into and out of the edge.
fn play(calls: u32, impairment: Impairment, seed: u64) -> (u64, u64) {
    let _alone = alone();
    let (port, ports) = (free_port(), [free_port(), free_port()]);
    let counts = Arc::<Counts>::default();
    let backs = ports.map(|server| {
        let target = SocketAddr::from(([127, 0, 0, 1], server));
        Relay::new(target, false, impairment, seed ^ u64::from(server) << 8, &counts)
    });
    let edge =
        Edge::start(&config(port, &backs.each_ref().map(|relay| relay.address), "cdr: true"));
    let front = Relay::new(([127, 0, 0, 1], port).into(), true, impairment, seed, &counts);
    let mut command = Command::new(env!("CARGO_BIN_EXE_strowger"));
    command.args(["load", "sip", "--for", "1h"]);
    for server in ports {
        command.args(["--answer", &format!("udp://127.0.0.1:{server}")]);
    }
    let _servers = Process::spawn(&mut command, &edge.folder.path().join("instances.log"));
    until_bound(ports[1], || "the instances do not start".to_owned());
    let mut callers = Callers::new(front.address, "impaired");
    let start = Instant::now();
    for call in 0..calls {
        callers.run_until(start + Duration::from_millis(20) * call);
        callers.begin(Instant::now(), Duration::from_millis(500));
    }
    let limit = Instant::now() + Duration::from_secs(120);
    while callers.open() > 0 || !callers.unanswered_extra().is_empty() {
        assert!(Instant::now() < limit, "{} calls never end", callers.open());
        callers.run_until(Instant::now() + Duration::from_millis(50));
    }
    edge.until("no call held", |edge| edge.metric("strowger_backend_calls", &[]) == 0.0);
    edge.until("nothing in flight", |edge| edge.metric("strowger_backend_in_flight", &[]) == 0.0);
    assert_eq!(edge.metric("strowger_engine_panics_total", &[]), 0.0);
    for (number, record) in callers.records().iter().enumerate() {
        let informed = !number.is_multiple_of(4) || record.code("INFO") == 200;
        assert!(
            (record.code("INVITE"), record.code("BYE")) == (200, 200) && informed,
            "call {number}, seed {seed:#x}: {record:?}"
        );
        assert!(record.strangers.is_empty(), "call {number} moved: {record:?}");
    }
    (counts.into_edge.load(Ordering::Relaxed), counts.out_of_edge.load(Ordering::Relaxed))
}

#[test]
fn a_good_network_has_one_message_out_for_one_in_and_a_100() {
    let calls = 100;
    let (into, out) = play(calls, Impairment::default(), 7);
    // INVITE, 180, 200, ACK, BYE, 200; and an INFO and its 200 in each fourth call.
    let least = u64::from(calls) * 6 + u64::from(calls) / 4 * 2;
    assert!(into >= least, "{into} of {least}");
    // On a slow machine something may have been repeated, by a caller or by the edge.
    println!("good network: {into} messages in, {out} out");
    assert!(out <= into + u64::from(calls) + into / 20, "{out} out for {into} in");
}

#[test]
fn calls_survive_a_bad_network_and_are_not_amplified() {
    let impairment = Impairment {
        loss: 100,
        duplication: 50,
        reordering: 100,
        delay: Duration::from_millis(40),
    };
    let (into, out) = play(300, impairment, 0x5eed_0001);
    let ratio = out as f64 / into as f64;
    println!(
        "10 % lost, 5 % doubled, 10 % overtaken: {into} messages in, {out} out, {ratio:.2} out per in"
    );
    // 7/6 without losses; what is lost beyond the edge is repeated by it, a message at a time.
    assert!(ratio < 2.0, "{out} messages out for {into} in");
}

/// The worst case: an INVITE to which nobody says anything, then a refusal that nobody acknowledges.
#[test]
fn one_invite_to_nobody_makes_no_more_messages_than_the_timers_allow() {
    let _alone = alone();
    let (port, silent) = (free_port(), Server::new("127.0.0.1:0", |_| Vec::new()));
    // T1 of 50 ms: 64 x T1 are 3.2 s.
    let options = "t1: 50ms, t2: 400ms, failover_timeout: 3s, failover_min: 3s";
    let edge = Edge::start(&config(port, &[silent.address], options));
    let mut client = Client::udp(([127, 0, 0, 1], port).into());
    let invite = client.request("INVITE", "sip:nobody@example.net", "alice", "silence");
    client.send(invite.as_bytes());
    let mut heard = Vec::new();
    // The refusal is repeated for 64 x T1, and then it is quiet.
    while let Some(message) = client.receive(Duration::from_secs(8)) {
        heard.push(status(&message));
    }
    let refusals = heard.iter().filter(|code| **code >= 300).count();
    assert!((1..=12).contains(&refusals), "{heard:?}");
    assert!(heard.iter().filter(|code| **code == 100).count() <= 1, "{heard:?}");
    let sent = silent.seen_text();
    let invites = sent.iter().filter(|text| text.starts_with("INVITE ")).count();
    assert!((2..=7).contains(&invites), "{invites} INVITEs were sent");
    assert!(sent.iter().all(|text| text.starts_with("INVITE ")), "{sent:?}");
    println!("one INVITE to nobody: {invites} out to the instance, {} to the client", heard.len());
    drop(edge);
}
