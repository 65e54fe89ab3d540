//! Hedged requests, and refusals that are not said (`on_miss`): step by step.

use std::time::Duration;

use serde_json::json;
use strowger_contract::{
    BackendId, Closing, Command, Endpoint, FlowId, Note, PeerChange, RequestOutcome, Router,
    Transport, WorkerId,
};
use strowger_diameter::Diameter;
use strowger_diameter::avp::{FLAG_REQUEST, FLAG_RETRANSMITTED, Header, Summary, code};
use strowger_diameter::build::Builder;
use strowger_sip::Sip;

use crate::rig::Rig;
use crate::sip_bench::{Bench, backend, remote, request, starts, three};

fn counted(notes: &[Note], word: &str) -> usize {
    notes.iter().filter(|note| matches!(note, Note::Count(known) if *known == word)).count()
}

fn dropped(notes: &[Note], word: &str) -> usize {
    notes.iter().filter(|note| matches!(note, Note::Drop(known) if *known == word)).count()
}

fn ended(notes: &[Note]) -> Vec<RequestOutcome> {
    let outcome = |note: &Note| match note {
        Note::Request { outcome, .. } => Some(*outcome),
        _ => None,
    };
    notes.iter().filter_map(outcome).collect()
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

#[test]
fn sip_the_first_answer_of_two_wins_and_the_other_is_dropped_and_counted() {
    let hedge = json!({"hedge": {"methods": ["OPTIONS"], "after": "100ms"}});
    for (slow_first, line) in
        [(false, "200 OK"), (true, "200 OK"), (false, "404 No"), (true, "404 No")]
    {
        let mut bench = Bench::new(hedge.clone(), "", three());
        let first = bench.client(&request("OPTIONS", "o1", ""));
        assert_eq!(bench.passes(ms(90)), [], "not yet");
        let second = bench.passes(ms(30));
        assert_eq!(starts(&second), ["OPTIONS"]);
        assert_ne!(remote(first[0].0), remote(second[0].0), "another instance");
        let (winner, loser) =
            if slow_first { (&second[0], &first[0]) } else { (&first[0], &second[0]) };
        let said = bench.answers(winner, line, "");
        assert_eq!(starts(&said), [&line[..3]]);
        assert_eq!(bench.answers(loser, "200 OK", ""), [], "nobody hears the second");
        assert_eq!(
            (counted(&bench.notes, "sip_hedges"), dropped(&bench.notes, "hedge_lost")),
            (1, 1)
        );
        assert_eq!(ended(&bench.notes), [RequestOutcome::Met], "one outcome");
        bench.rests();
        assert_eq!(ended(&bench.notes).len(), 1);
    }
}

#[test]
fn sip_a_refusal_leaves_the_race_to_the_other() {
    let hedge = json!({"hedge": {"methods": ["OPTIONS"], "after": "100ms"}});
    let mut bench = Bench::new(hedge, "", three());
    let first = bench.client(&request("OPTIONS", "o1", ""));
    let second = bench.passes(ms(120));
    assert_eq!(bench.answers(&first[0], "503 Busy", ""), [], "no third is asked");
    let said = bench.answers(&second[0], "200 OK", "");
    assert_eq!(starts(&said), ["200"]);
    bench.rests();
    assert_eq!(ended(&bench.notes), [RequestOutcome::Met]);
}

#[test]
fn sip_what_is_not_named_what_is_answered_and_what_would_wait_is_not_hedged() {
    let hedge = json!({"hedge": {"methods": ["OPTIONS"], "after": "100ms"}, "failover_min": "2s"});
    let mut bench = Bench::new(hedge.clone(), "", three());
    let invite = bench.client(&request("INVITE", "i1", ""));
    let message = bench.client(&request("MESSAGE", "m1", ""));
    let options = bench.client(&request("OPTIONS", "o1", ""));
    bench.answers(&options[0], "200 OK", "");
    let later = bench.passes(ms(400));
    assert_eq!(starts(&later), Vec::<String>::new(), "{later:?}");
    bench.answers(&invite[1], "486 Busy", "");
    bench.answers(&message[0], "200 OK", "");
    bench.rests();
    // Each has one slot and both are taken.
    let mut bench = Bench::new(hedge, "", vec![backend(1, Some(1)), backend(2, Some(1))]);
    let sent: Vec<_> = ["a", "b"]
        .into_iter()
        .flat_map(|call| bench.client(&request("OPTIONS", call, "")))
        .collect();
    assert_eq!(starts(&bench.passes(ms(300))), Vec::<String>::new(), "no slot, no hedge");
    for request in &sent {
        assert_eq!(starts(&bench.answers(request, "200 OK", "")), ["200"]);
    }
    assert_eq!(counted(&bench.notes, "sip_hedges"), 0);
    bench.rests();
}

/// Nine in ten requests are slow; hedges are a tenth of them at most, besides what was saved up.
#[test]
fn sip_hedges_are_within_the_retry_budget() {
    let hedge = json!({"hedge": {"methods": ["OPTIONS"], "after": "10ms"}});
    let mut bench = Bench::new(hedge, "", three());
    for number in 0..3_000 {
        let first = bench.client(&request("OPTIONS", &format!("o{number}"), ""));
        let second = bench.passes(ms(20));
        for sent in first.iter().chain(&second) {
            bench.answers(sent, "200 OK", "");
        }
    }
    let hedges = counted(&bench.notes, "sip_hedges");
    assert!((100..=3_000 / 10 + 1_000).contains(&hedges), "{hedges}");
    assert!(counted(&bench.notes, "sip_retry_budget_empty") > 0);
    assert_eq!(ended(&bench.notes).len(), 3_000);
    bench.rests();
}

const ON_MISS: &str =
    "version: 1\nclasses: { bulk: { deadline: 1s, queue_max: 0, on_miss: HOW } }\n";

#[test]
fn sip_a_refusal_may_be_silence_or_a_reset() {
    for (how, stream) in
        [("answer", true), ("drop", true), ("drop", false), ("reset", true), ("reset", false)]
    {
        let yaml = format!(
            "{}listeners:\n  - {{ name: sip, protocol: sip, bind: [udp://192.0.2.1:5060, tcp://192.0.2.1:5060], pool: ims }}\npools:\n  ims:\n    backends: [{{ id: a, address: udp://10.0.0.1:5060, capacity: 1 }}]\n",
            ON_MISS.replace("HOW", how)
        );
        let mut rig = Rig::<Sip>::new(&yaml, 1);
        let client = if stream {
            Endpoint::Client(FlowId::new(WorkerId(0), 1, 1))
        } else {
            Endpoint::Datagram { socket: 0, remote: ([198, 51, 100, 7], 5_070).into() }
        };
        rig.message(client, request("OPTIONS", "one", "").as_bytes());
        let mut sees = |again: bool| {
            rig.message(client, request("OPTIONS", "two", "").as_bytes());
            let answered = rig
                .out
                .commands()
                .iter()
                .any(|command| matches!(command, Command::Send(frame) if frame.to == client));
            let reset = rig.out.commands().iter().any(|command| {
                matches!(command, Command::Close(peer, Closing::Reset) if *peer == client)
            });
            let outcomes = ended(rig.out.notes());
            let expected = if again { vec![] } else { vec![RequestOutcome::Rejected] };
            assert_eq!(outcomes, expected, "{how}");
            (answered, reset)
        };
        let expected = (how == "answer", how == "reset" && stream);
        assert_eq!(sees(false), expected, "{how}");
        // A repetition is absorbed, and hears what was heard.
        assert_eq!(sees(true).0, expected.0, "{how}");
    }
}

struct Dra {
    rig: Rig<Diameter>,
    client: Endpoint,
    /// What went to backends.
    sent: Vec<(BackendId, Header)>,
    answers: Vec<u32>,
    notes: Vec<Note>,
}

impl Dra {
    fn new(classes: &str, options: &str, capacity: u32) -> Self {
        let yaml = format!(
            "version: 1\n{classes}listeners:\n  - {{ name: d, protocol: diameter, bind: [tcp://127.0.0.1:3868], pool: p, options: {{ origin_host: edge.example.net, origin_realm: example.net{options} }} }}\npools:\n  p:\n    balance: round-robin\n    backends:\n      - {{ id: a, address: tcp://127.0.0.1:3871, capacity: {capacity} }}\n      - {{ id: b, address: tcp://127.0.0.1:3872, capacity: {capacity} }}\n"
        );
        let client = Endpoint::Client(FlowId::new(WorkerId(0), 1, 1));
        let rig = Rig::<Diameter>::new(&yaml, 1);
        let (sent, answers, notes) = (Vec::new(), Vec::new(), Vec::new());
        let mut dra = Self { rig, client, sent, answers, notes };
        for id in ["a", "b"] {
            let backend = Endpoint::Backend(dra.rig.backend("p", id).expect("it is there"));
            dra.connect(backend, 0, id);
        }
        dra.connect(client, FLAG_REQUEST, "client");
        dra.notes.clear();
        dra
    }

    fn connect(&mut self, peer: Endpoint, flags: u8, host: &str) {
        let remote = ([127, 0, 0, 1], 4_000).into();
        self.rig
            .peer(peer, PeerChange::Opened { remote, local: remote, transport: Transport::Tcp });
        let mut bytes = Vec::new();
        let mut builder = Builder::new(&mut bytes, flags, 257, 0, 1, 1);
        if flags == 0 {
            builder = builder.number(code::RESULT_CODE, 2_001);
        }
        builder
            .text(code::ORIGIN_HOST, &format!("{host}.example.net"))
            .text(code::ORIGIN_REALM, "example.net")
            .application(u32::MAX)
            .finish();
        self.rig.message(peer, &bytes);
        self.rig.out.clear();
    }

    fn settle(&mut self) {
        for command in self.rig.out.commands() {
            let Command::Send(frame) = command else { continue };
            let bytes = self.rig.out.bytes(&frame.bytes);
            let (header, summary) = (Header::read(bytes).expect("a header"), Summary::of(bytes));
            match frame.to {
                Endpoint::Backend(backend) if header.application != 0 => {
                    self.sent.push((backend, header));
                }
                Endpoint::Client(_) if header.application != 0 => {
                    self.answers.push(summary.result_code.unwrap_or(0));
                }
                _ => {}
            }
        }
        self.notes.extend(self.rig.out.notes().iter().cloned());
        self.rig.out.clear();
    }

    /// An AIR (S6a: no session is kept).
    fn asks(&mut self, command: u32, number: u32) {
        let mut bytes = Vec::new();
        Builder::request(&mut bytes, command, 16_777_251, number, number)
            .text(code::SESSION_ID, &format!("s;{number}"))
            .text(code::ORIGIN_HOST, "client.example.net")
            .text(code::ORIGIN_REALM, "example.net")
            .text(code::DESTINATION_REALM, "example.net")
            .finish();
        self.rig.message(self.client, &bytes);
        self.settle();
    }

    fn passes(&mut self, time: Duration) {
        let until = self.rig.now + time;
        while let Some(due) =
            strowger_contract::Engine::next_timeout(&self.rig.engine).filter(|due| *due <= until)
        {
            self.rig.now = self.rig.now.max(due);
            let Rig { engine, router, out, now, .. } = &mut self.rig;
            strowger_contract::Engine::on_timeout(engine, *now, router, out);
            self.settle();
        }
        self.rig.now = until;
    }

    fn answer(&mut self, at: usize, result: u32) {
        let (backend, header) = self.sent[at];
        let flags = if result / 1_000 == 3 { 0x60 } else { 0x40 };
        let mut bytes = Vec::new();
        let (hop, end) = (header.hop_by_hop, header.end_to_end);
        Builder::new(&mut bytes, flags, header.command, header.application, hop, end)
            .number(code::RESULT_CODE, result)
            .text(code::ORIGIN_HOST, "x.example.net")
            .text(code::ORIGIN_REALM, "example.net")
            .finish();
        self.rig.message(Endpoint::Backend(backend), &bytes);
        self.settle();
    }

    fn in_flight(&self) -> u32 {
        let of =
            |id| self.rig.backend("p", id).and_then(|backend| self.rig.router.backend(backend));
        ["a", "b"].into_iter().filter_map(of).map(|view| view.in_flight).sum()
    }

    fn rests(&mut self, requests: usize) {
        self.passes(Duration::from_secs(20));
        assert_eq!(strowger_contract::Engine::in_progress(&self.rig.engine), 0);
        assert_eq!(self.in_flight(), 0);
        assert_eq!(ended(&self.notes).len(), requests, "one outcome each");
    }
}

const HEDGE: &str = ", hedge: { commands: [318], after: 50ms }";

#[test]
fn diameter_the_first_answer_of_two_wins_and_the_other_is_dropped_and_counted() {
    for winner in [0, 1] {
        let mut dra = Dra::new("", HEDGE, 4);
        dra.asks(318, 7);
        dra.passes(ms(40));
        assert_eq!(dra.sent.len(), 1, "not yet");
        dra.passes(ms(20));
        let [(one, first), (two, second)] = &dra.sent[..] else { panic!("{:?}", dra.sent) };
        assert_ne!(one, two);
        assert_eq!(first.flags & FLAG_RETRANSMITTED, 0);
        assert_ne!(second.flags & FLAG_RETRANSMITTED, 0, "its server must know");
        assert_eq!(first.end_to_end, second.end_to_end);
        assert_eq!(dra.in_flight(), 2);
        dra.answer(winner, 2_001);
        assert_eq!(dra.answers, [2_001]);
        assert_eq!(dra.in_flight(), 1, "the other still works on it");
        dra.answer(1 - winner, 2_001);
        assert_eq!(dra.answers, [2_001], "nobody hears the second");
        assert_eq!(
            (counted(&dra.notes, "diameter_hedges"), dropped(&dra.notes, "hedge_lost")),
            (1, 1)
        );
        assert_eq!(ended(&dra.notes), [RequestOutcome::Met]);
        dra.rests(1);
    }
}

#[test]
fn diameter_a_refusal_or_a_lost_link_leaves_the_race_to_the_other() {
    for lost in [false, true] {
        for winner in [0, 1] {
            let mut dra = Dra::new("", HEDGE, 4);
            dra.asks(318, 7);
            dra.passes(ms(60));
            if lost {
                let link = Endpoint::Backend(dra.sent[1 - winner].0);
                dra.rig.peer(link, PeerChange::Closed(strowger_contract::CloseCause::Reset));
                dra.settle();
            } else {
                dra.answer(1 - winner, 3_004);
            }
            assert_eq!((dra.answers.len(), dra.sent.len()), (0, 2), "{lost} {winner}");
            dra.answer(winner, 2_001);
            assert_eq!(dra.answers, [2_001]);
            dra.rests(1);
        }
    }
}

#[test]
fn diameter_nobody_answers_and_the_client_hears_it_once() {
    let mut dra = Dra::new("", HEDGE, 4);
    dra.asks(318, 7);
    dra.passes(Duration::from_secs(15));
    assert_eq!(dra.sent.len(), 2);
    assert_eq!(dra.answers, [3_002]);
    assert_eq!(ended(&dra.notes), [RequestOutcome::Expired]);
    dra.rests(1);
}

#[test]
fn diameter_what_is_not_named_what_is_answered_and_what_would_wait_is_not_hedged() {
    let mut dra = Dra::new("", HEDGE, 1);
    dra.asks(316, 1);
    dra.passes(ms(200));
    assert_eq!(dra.sent.len(), 1, "not named");
    dra.asks(318, 2);
    dra.passes(ms(200));
    assert_eq!(dra.sent.len(), 2, "the other has no slot");
    dra.answer(0, 2_001);
    dra.answer(1, 2_001);
    dra.asks(318, 3);
    dra.answer(2, 2_001);
    dra.passes(ms(200));
    assert_eq!(dra.sent.len(), 3, "answered");
    dra.rests(3);
}

#[test]
fn diameter_a_refusal_may_be_silence_or_a_reset() {
    for how in ["answer", "drop", "reset"] {
        let classes = format!("classes: {{ setup: {{ queue_max: 0, on_miss: {how} }} }}\n");
        let mut dra = Dra::new(&classes, "", 1);
        dra.asks(318, 1);
        dra.asks(318, 2);
        let (mut bytes, number) = (Vec::new(), 3);
        Builder::request(&mut bytes, 318, 16_777_251, number, number)
            .text(code::SESSION_ID, "s;3")
            .text(code::ORIGIN_HOST, "client.example.net")
            .text(code::ORIGIN_REALM, "example.net")
            .text(code::DESTINATION_REALM, "example.net")
            .finish();
        dra.rig.message(dra.client, &bytes);
        let client = dra.client;
        let reset = dra.rig.out.commands().iter().any(
            |command| matches!(command, Command::Close(peer, Closing::Reset) if *peer == client),
        );
        dra.settle();
        let heard: &[u32] = if how == "answer" { &[3_004] } else { &[] };
        assert_eq!((&dra.answers[..], reset), (heard, how == "reset"), "{how}");
        assert_eq!(ended(&dra.notes), [RequestOutcome::Rejected]);
        dra.answer(0, 2_001);
        dra.answer(1, 2_001);
        dra.rests(3);
    }
}
