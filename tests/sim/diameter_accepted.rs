//! Connections that servers open and that serve as their links: how they end, and when one that was
//! given up is trusted again.

use std::time::Duration;

use strowger_contract::{
    CloseCause, Command, Endpoint, FlowId, Outbox, PeerChange, Router, Transport, WorkerId,
};
use strowger_diameter::Diameter;
use strowger_diameter::avp::{Avps, FLAG_REQUEST, Header, code};
use strowger_diameter::build::Builder;

use crate::rig::Rig;

const CAPABILITIES: u32 = 257;
const WATCHDOG: u32 = 280;
const DISCONNECT: u32 = 282;

struct Bench {
    rig: Rig<Diameter>,
    /// What went out, and what was closed.
    sent: Vec<(Endpoint, Header, Vec<u8>)>,
    closed: Vec<Endpoint>,
}

fn yaml(backends: &str, pool: &str) -> String {
    format!(
        "version: 1\nlisteners:\n  - {{ name: d, protocol: diameter, bind: [tcp://127.0.0.1:3868], pool: p, options: {{ origin_host: edge.example.net, origin_realm: example.net, watchdog: 1s }} }}\npools:\n  p:\n{pool}    backends:\n{backends}"
    )
}

const A: &str = "      - { id: a, address: tcp://127.0.0.1:3871, origin_host: a.example.net }\n";
const B: &str = "      - { id: b, address: tcp://127.0.0.2:3871, origin_host: b.example.net }\n";

impl Bench {
    fn new() -> Self {
        let rig = Rig::<Diameter>::new(&yaml(&format!("{A}{B}"), ""), 1);
        Self { rig, sent: Vec::new(), closed: Vec::new() }
    }

    /// The server opens a connection and introduces itself; its Result-Code.
    fn connect(&mut self, slot: u32) -> (Endpoint, u32) {
        let flow = Endpoint::Client(FlowId::new(WorkerId(0), 1, slot));
        let remote = ([127, 0, 0, 1], 4_000).into();
        let change = PeerChange::Opened { remote, local: remote, transport: Transport::Tcp };
        self.rig.peer(flow, change);
        let mut bytes = Vec::new();
        Builder::new(&mut bytes, FLAG_REQUEST, CAPABILITIES, 0, 1, 1)
            .text(code::ORIGIN_HOST, "a.example.net")
            .text(code::ORIGIN_REALM, "example.net")
            .application(u32::MAX)
            .finish();
        self.rig.message(flow, &bytes);
        self.settle();
        (flow, self.result(CAPABILITIES))
    }

    fn settle(&mut self) {
        take(&self.rig.out, &mut self.sent, &mut self.closed);
        self.rig.out.clear();
    }

    fn pass(&mut self, milliseconds: u64) {
        let Self { rig, sent, closed } = self;
        rig.pass(Duration::from_millis(milliseconds), |out| take(out, sent, closed));
    }

    fn last(&self, command: u32) -> Option<&(Endpoint, Header, Vec<u8>)> {
        self.sent.iter().rfind(|(_, header, _)| header.command == command)
    }

    fn result(&self, command: u32) -> u32 {
        let (_, _, bytes) = self.last(command).expect("it was sent");
        let mut avps = Avps::of(bytes).flatten();
        avps.find_map(|avp| avp.is(code::RESULT_CODE).then(|| avp.number())).flatten().unwrap_or(0)
    }

    /// The server answers the last of those that it was sent.
    fn answer(&mut self, command: u32) {
        let (to, header, _) = self.last(command).expect("it was sent").clone();
        assert!(header.is_request());
        let mut bytes = Vec::new();
        Builder::new(&mut bytes, 0, command, 0, header.hop_by_hop, header.end_to_end)
            .number(code::RESULT_CODE, 2_001)
            .text(code::ORIGIN_HOST, "a.example.net")
            .text(code::ORIGIN_REALM, "example.net")
            .finish();
        self.rig.message(to, &bytes);
        self.settle();
    }

    fn count(&self, command: u32) -> usize {
        self.sent.iter().filter(|(_, header, _)| header.command == command).count()
    }

    fn is_up(&self) -> bool {
        let backend = self.rig.backend("p", "a").expect("it is there");
        self.rig.router.backend(backend).is_some_and(|view| view.is_linked)
    }

    fn ends(&mut self, flow: Endpoint) {
        self.rig.peer(flow, PeerChange::Closed(CloseCause::Local));
        self.settle();
    }
}

fn take(out: &Outbox, sent: &mut Vec<(Endpoint, Header, Vec<u8>)>, closed: &mut Vec<Endpoint>) {
    for command in out.commands() {
        match command {
            Command::Send(frame) => {
                let bytes = out.bytes(&frame.bytes).to_vec();
                sent.push((frame.to, Header::read(&bytes).expect("a header"), bytes));
            }
            Command::Close(peer @ Endpoint::Client(_), _) => closed.push(*peer),
            _ => {}
        }
    }
}

/// A DPR (REBOOTING), then nothing more; it is closed after the answer.
fn retires(bench: &mut Bench, flow: Endpoint) {
    bench.pass(500);
    let (to, header, bytes) = bench.last(DISCONNECT).expect("a goodbye").clone();
    assert!(to == flow && header.is_request());
    let cause = Avps::of(&bytes).flatten().find(|avp| avp.is(code::DISCONNECT_CAUSE));
    assert_eq!(cause.and_then(|avp| avp.number()), Some(0));
    assert_eq!(bench.count(DISCONNECT), 1);
    assert_eq!(bench.closed, []);
    bench.answer(DISCONNECT);
    assert_eq!(bench.closed, [flow]);
    bench.ends(flow);
}

#[test]
fn one_whose_server_was_removed_hears_a_goodbye() {
    let mut bench = Bench::new();
    let (flow, result) = bench.connect(1);
    assert_eq!((result, bench.is_up()), (2_001, true));
    bench.rig.apply(&yaml(B, ""));
    // It may come back at once (`debounce`), and has no session to wait for.
    for _ in 0..6 {
        bench.pass(500);
    }
    retires(&mut bench, flow);
}

#[test]
fn one_whose_server_was_drained_hears_a_goodbye_and_is_not_let_in_again() {
    let mut bench = Bench::new();
    let (flow, _) = bench.connect(1);
    let now = bench.rig.now;
    bench.rig.core.drain(now, "p", "a", Some(Duration::ZERO)).expect("it is there");
    bench.pass(1_500);
    retires(&mut bench, flow);
    let (flow, result) = bench.connect(2);
    assert_eq!((result, bench.is_up()), (3_004, false));
    assert_eq!(bench.closed.last(), Some(&flow));
    bench.rig.core.undrain(bench.rig.now, "p", "a").expect("it is there");
    bench.ends(flow);
    bench.pass(100);
    let (_, result) = bench.connect(3);
    assert_eq!((result, bench.is_up()), (2_001, true));
}

/// Where several connections are wanted, the edge opens them all itself.
#[test]
fn one_where_several_are_wanted_hears_a_goodbye() {
    let mut bench = Bench::new();
    let (flow, _) = bench.connect(1);
    bench.rig.apply(&yaml(&format!("{A}{B}"), "    connections: 2\n"));
    retires(&mut bench, flow);
}

/// RFC 3539 3.4.1: one that was given up takes requests again after three answered watchdogs, over
/// whichever connection, and on any worker.
#[test]
fn one_that_was_given_up_answers_three_watchdogs_first() {
    let mut bench = Bench::new();
    let (flow, _) = bench.connect(1);
    assert!(bench.is_up());
    bench.pass(6_000);
    assert!(!bench.is_up());
    assert_eq!(bench.closed.first(), Some(&flow), "it answers no watchdog");
    bench.ends(flow);
    let asked = bench.count(WATCHDOG);
    let (flow, result) = bench.connect(2);
    assert_eq!((result, bench.is_up()), (2_001, false));
    // The CEA comes first.
    let order: Vec<u32> =
        bench.sent.iter().rev().take(2).map(|(_, header, _)| header.command).collect();
    assert_eq!(order, [WATCHDOG, CAPABILITIES]);
    let backend = bench.rig.backend("p", "a").expect("it is there");
    assert!(bench.rig.core.is_served(backend), "the edge does not dial meanwhile");
    for answered in 1..=3 {
        assert_eq!(bench.count(WATCHDOG), asked + answered);
        assert!(!bench.is_up(), "{answered}");
        bench.answer(WATCHDOG);
        if answered < 3 {
            bench.pass(1_300);
        }
    }
    assert!(bench.is_up());
    // That was all: the next connection is good at once.
    bench.ends(flow);
    assert!(!bench.is_up());
    let (_, result) = bench.connect(3);
    assert_eq!((result, bench.is_up()), (2_001, true));
}
