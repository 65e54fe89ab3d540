//! SIP over a bad network: loss, duplication, reordering and delay between client, edge and instances.
//! Each end repeats as RFC 3261 17 says; the edge must not make more of it than is bounded.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;
use strowger_contract::{Endpoint, Engine as _};

use crate::sip_bench::{Bench, CLIENT, answer, header, remote, request, three};
use crate::world::{Dice, dice_for};

/// What one message that comes in makes go out at once, at most: a request its 100 and its copy (and, when
/// it fails over, one more), a response its copy, an ACK and a CANCEL of another leg.
const AT_ONCE_MAX: usize = 4;

/// What timers send for one leg and for one client, at most: Timer A or E within 64 x T1, CANCELs
/// likewise, Timer G likewise (RFC 3261 17: 11 of a non-INVITE, 10 of an answer).
const REPEATS_MAX: usize = 11;

/// An INVITE's class is tried again twice.
const LEGS: usize = 3;

/// How bad it is, in percent and milliseconds.
#[derive(Clone, Copy, Debug)]
struct Network {
    loss: u64,
    twice: u64,
    delay_ms: u64,
}

enum Event {
    ToEdge(SocketAddr, String),
    ToClient(String),
    ToInstance(SocketAddr, String),
    /// The client repeats its request if it has heard nothing.
    Again(usize, u64),
}

struct World {
    bench: Bench,
    network: Network,
    dice: Dice,
    queue: BTreeMap<(u64, u64), Event>,
    number: u64,
    requests: Vec<(String, bool)>,
    finals: HashMap<String, Vec<u16>>,
    came: usize,
    went: usize,
}

impl World {
    fn after(&mut self, ms: u64, event: Event) {
        self.number += 1;
        self.queue.insert((self.bench.at.as_millis() as u64 + ms, self.number), event);
    }

    /// Over the network: never, once or twice, in any order.
    fn fly(&mut self, event: impl Fn() -> Event) {
        let copies = if self.dice.percent(self.network.twice) { 2 } else { 1 };
        for _ in 0..copies {
            if !self.dice.percent(self.network.loss) {
                let delay = self.dice.between(1, self.network.delay_ms + 2);
                self.after(delay, event());
            }
        }
    }

    fn sends(&mut self, sent: Vec<(Endpoint, String)>) {
        let client: SocketAddr = CLIENT.parse().expect("an address");
        self.went += sent.len();
        for (to, text) in sent {
            let to = remote(to);
            if to == client {
                self.fly(|| Event::ToClient(text.clone()));
            } else {
                self.fly(|| Event::ToInstance(to, text.clone()));
            }
        }
    }

    fn happen(&mut self, event: Event) {
        let client: SocketAddr = CLIENT.parse().expect("an address");
        match event {
            Event::ToEdge(from, text) => {
                self.came += 1;
                let sent = self.bench.gets(from, &text);
                assert!(sent.len() <= AT_ONCE_MAX, "{} at once for {text}", sent.len());
                self.sends(sent);
            }
            Event::ToInstance(at, text) => {
                let line = match text.split(' ').next().unwrap_or_default() {
                    "INVITE" if header(&text, "Call-ID").ends_with('1') => "486 Busy Here",
                    "INVITE" | "MESSAGE" => "200 OK",
                    _ => return,
                };
                if line.starts_with("200") && text.starts_with("INVITE") {
                    let ringing = answer(&text, "180 Ringing", "");
                    self.fly(|| Event::ToEdge(at, ringing.clone()));
                }
                let said = answer(&text, line, "Contact: <sip:bob@10.0.0.1>\r\n");
                self.fly(|| Event::ToEdge(at, said.clone()));
            }
            Event::ToClient(text) => {
                let code = text.get(8..11).and_then(|code| code.parse().ok()).unwrap_or(0);
                let call = header(&text, "Call-ID").to_owned();
                let known = call[1..].parse::<usize>().expect("one of ours");
                self.requests[known].1 = true;
                if code >= 200 {
                    let codes = self.finals.entry(call).or_default();
                    if !codes.contains(&code) {
                        codes.push(code);
                    }
                }
                if code >= 300 && self.requests[known].0.starts_with("INVITE") {
                    let to = format!("To: {}", header(&text, "To"));
                    let ack = self.requests[known]
                        .0
                        .replace("To: <sip:bob@example.net>", &to)
                        .replace("INVITE sip", "ACK sip")
                        .replace("1 INVITE", "1 ACK");
                    self.fly(|| Event::ToEdge(client, ack.clone()));
                }
            }
            Event::Again(known, wait) => {
                let (text, heard) = self.requests[known].clone();
                if !heard && wait < 32_000 {
                    self.fly(|| Event::ToEdge(client, text.clone()));
                    self.after(wait, Event::Again(known, wait * 2));
                }
            }
        }
    }

    fn run(&mut self) {
        loop {
            let start = self.bench.start;
            let timer = self.bench.engine.next_timeout();
            let timer = timer.map(|at| at.saturating_duration_since(start).as_millis() as u64 + 1);
            let event = self.queue.keys().next().map(|(at, _)| *at);
            let Some(next) = timer.into_iter().chain(event).min() else { return };
            self.bench.at = self.bench.at.max(Duration::from_millis(next));
            if timer.is_some_and(|at| at <= next) {
                let sent = self.bench.wakes();
                self.sends(sent);
            } else if let Some((_, event)) = self.queue.pop_first() {
                self.happen(event);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_bad_network_is_not_made_worse(
        seed: u64, loss in 0u64..60, twice in 0u64..60, delay_ms in 0u64..3_000, calls in 1usize..12,
    ) {
        let bench = Bench::new(json!({}), "", three());
        let mut world = World {
            bench,
            network: Network { loss, twice, delay_ms },
            dice: dice_for(seed, b"network", 0),
            queue: BTreeMap::new(),
            number: 0,
            requests: Vec::new(),
            finals: HashMap::new(),
            came: 0,
            went: 0,
        };
        for call in 0..calls {
            let method = if call % 3 == 2 { "MESSAGE" } else { "INVITE" };
            world.requests.push((request(method, &format!("c{call}"), ""), false));
            world.after(call as u64 * 100, Event::Again(call, 500));
        }
        world.run();
        // Of each request that came: what it made at once, and what timers sent for its legs and answers.
        let timers = calls * (LEGS * 2 * REPEATS_MAX + REPEATS_MAX);
        let bound = world.came * AT_ONCE_MAX + timers;
        prop_assert!(world.went <= bound, "{} out for {} in", world.went, world.came);
        for (call, codes) in &world.finals {
            let best = codes.iter().filter(|code| **code >= 300).count();
            prop_assert!(best <= 1, "{call} was refused by more than one code: {codes:?}");
        }
        prop_assert_eq!(world.bench.engine.in_progress(), 0);
        world.bench.rests();
    }
}
