//! Requests that wait for a slot: where they go then is decided anew.

use std::time::Duration;

use strowger_contract::handover::{Clock, by_clock};
use strowger_contract::{
    BackendId, CloseCause, Command, Endpoint, Engine, FlowId, PeerChange, Router, Transport,
    WorkerId,
};
use strowger_diameter::Diameter;
use strowger_diameter::avp::{FLAG_REQUEST, FLAG_RETRANSMITTED, Header, Summary, code};
use strowger_diameter::build::{Builder, append};
use strowger_diameter::frame::MESSAGE_BYTES_MAX;

use crate::rig::Rig;

const GX: u32 = 16_777_238;

struct Bench {
    yaml: String,
    rig: Rig<Diameter>,
    client: Endpoint,
    /// What went to backends: backend, Session-Id, header.
    sent: Vec<(BackendId, String, Header)>,
    /// What came back: Session-Id, Result-Code.
    answers: Vec<(String, u32)>,
}

impl Bench {
    fn new(options: &str, capacity: u32) -> Self {
        let yaml = format!(
            "version: 1\nclasses: {{ setup: {{ deadline: 5s }} }}\nlisteners:\n  - {{ name: d, protocol: diameter, bind: [tcp://127.0.0.1:3868], pool: p, options: {{ origin_host: edge.example.net, origin_realm: example.net{options} }} }}\npools:\n  p:\n    balance: round-robin\n    bind_keys: [imsi]\n    backends:\n      - {{ id: a, address: tcp://127.0.0.1:3871, capacity: {capacity} }}\n      - {{ id: b, address: tcp://127.0.0.1:3872, capacity: {capacity} }}\n"
        );
        let client = Endpoint::Client(FlowId::new(WorkerId(0), 1, 1));
        let mut bench = Self::bare(yaml);
        for id in ["a", "b"] {
            let backend = Endpoint::Backend(bench.backend(id));
            bench.connect(backend, 0, id);
        }
        bench.connect(client, FLAG_REQUEST, "client");
        bench
    }

    fn bare(yaml: String) -> Self {
        let client = Endpoint::Client(FlowId::new(WorkerId(0), 1, 1));
        let rig = Rig::<Diameter>::new(&yaml, 2);
        Self { yaml, rig, client, sent: Vec::new(), answers: Vec::new() }
    }

    fn backend(&self, id: &str) -> BackendId {
        self.rig.backend("p", id).expect("it is in the pool")
    }

    fn connect(&mut self, peer: Endpoint, flags: u8, host: &str) {
        let remote = ([127, 0, 0, 1], 4_000).into();
        let change = PeerChange::Opened { remote, local: remote, transport: Transport::Tcp };
        self.rig.peer(peer, change);
        self.settle();
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
        self.settle();
    }

    fn settle(&mut self) {
        for command in self.rig.out.commands() {
            let Command::Send(frame) = command else { continue };
            let bytes = self.rig.out.bytes(&frame.bytes);
            let (header, summary) = (Header::read(bytes).expect("a header"), Summary::of(bytes));
            let session = String::from_utf8_lossy(summary.session_id.unwrap_or_default());
            match frame.to {
                Endpoint::Backend(backend) if header.application != 0 => {
                    self.sent.push((backend, session.into_owned(), header));
                }
                Endpoint::Client(_) if header.application != 0 => {
                    self.answers.push((session.into_owned(), summary.result_code.unwrap_or(0)));
                }
                _ => {}
            }
        }
        self.rig.out.clear();
    }

    /// A CCR-I of a subscriber.
    fn begin(&mut self, session: &str, imsi: &str, number: u32) {
        let bytes = request(session, imsi, (number, number));
        self.rig.message(self.client, &bytes);
        self.settle();
    }

    /// The backend answers its request of a session.
    fn answer(&mut self, session: &str, result: u32) {
        let (_, _, header) = self.sent_of(session);
        self.answer_as(session, result, header.end_to_end);
    }

    /// What was sent of a session last.
    fn sent_of(&self, session: &str) -> (BackendId, String, Header) {
        self.sent.iter().rfind(|(_, of, _)| of == session).expect("it was sent").clone()
    }

    fn answer_as(&mut self, session: &str, result: u32, end: u32) {
        let (backend, _, header) = self.sent_of(session);
        let (mut bytes, hop) = (Vec::new(), header.hop_by_hop);
        Builder::new(&mut bytes, 0x40, header.command, header.application, hop, end)
            .text(code::SESSION_ID, session)
            .number(code::RESULT_CODE, result)
            .text(code::ORIGIN_HOST, "x.example.net")
            .text(code::ORIGIN_REALM, "example.net")
            .finish();
        self.rig.message(Endpoint::Backend(backend), &bytes);
        self.settle();
    }

    /// The runtime gives those their slots that wait.
    fn grant(&mut self) {
        loop {
            let mut grants = Vec::new();
            self.rig.router.grants(self.rig.now, &mut grants);
            if grants.is_empty() {
                return;
            }
            for grant in grants {
                let Rig { engine, router, out, now, .. } = &mut self.rig;
                match grant {
                    strowger::routing::Grant::Go(ticket, route) => {
                        engine.on_granted(*now, ticket, route, router, out);
                    }
                    strowger::routing::Grant::Refuse(ticket, refusal) => {
                        engine.on_refused(*now, ticket, refusal, router, out);
                    }
                }
                self.settle();
            }
        }
    }

    fn owner(&self, session: &str) -> Option<BackendId> {
        let found = self.sent.iter().rfind(|(_, of, _)| of == session);
        found.map(|(backend, ..)| *backend)
    }

    fn in_flight(&self, id: &str) -> u32 {
        let backend = self.rig.router.backend(self.backend(id)).expect("it is there");
        backend.in_flight
    }
}

fn request(session: &str, imsi: &str, (hop, end): (u32, u32)) -> Vec<u8> {
    let (mut bytes, mut group) = (Vec::new(), Vec::new());
    append(&mut group, 450, 0x40, &1u32.to_be_bytes());
    append(&mut group, 444, 0x40, imsi.as_bytes());
    Builder::request(&mut bytes, 272, GX, hop, end)
        .text(code::SESSION_ID, session)
        .text(code::ORIGIN_HOST, "client.example.net")
        .text(code::ORIGIN_REALM, "example.net")
        .text(code::DESTINATION_REALM, "example.net")
        .number(code::CC_REQUEST_TYPE, 1)
        .bytes(443, &group)
        .finish();
    bytes
}

/// Two sessions of one subscriber wait; two slots become free at once, at different servers. The
/// second one follows the first.
#[test]
fn sessions_of_one_subscriber_that_waited_go_to_one_server() {
    let mut bench = Bench::new("", 1);
    bench.begin("one", "001", 1);
    bench.begin("two", "002", 2);
    let (one, two) = (bench.owner("one"), bench.owner("two"));
    assert!(one.is_some() && two.is_some() && one != two, "{one:?} {two:?}");
    bench.begin("first", "003", 3);
    bench.begin("second", "003", 4);
    assert_eq!(bench.rig.engine.in_progress(), 4);
    assert_eq!((bench.owner("first"), bench.owner("second")), (None, None), "they wait");
    bench.answer("one", 2_001);
    bench.answer("two", 2_001);
    bench.grant();
    let gone: Vec<&str> =
        ["first", "second"].into_iter().filter(|session| bench.owner(session).is_some()).collect();
    let [one] = gone[..] else { panic!("{gone:?} went: the other's server has no slot") };
    let first = bench.owner(one).expect("it has gone");
    let other = if one == "first" { "second" } else { "first" };
    bench.answer(one, 2_001);
    bench.grant();
    assert_eq!(bench.owner(other), Some(first));
    bench.answer(other, 2_001);
    // What comes later follows both.
    for (number, session) in [(5, "third"), (6, "fourth")] {
        bench.begin(session, "003", number);
        assert_eq!(bench.owner(session), Some(first));
        bench.answer(session, 2_001);
    }
    assert_eq!(bench.answers.len(), 6);
    assert_eq!((bench.in_flight("a"), bench.in_flight("b")), (0, 0));
    assert_eq!(bench.rig.engine.in_progress(), 0);
}

/// A session that was refused after its wait binds nobody.
#[test]
fn one_that_waited_in_vain_leaves_no_binding() {
    let mut bench = Bench::new("", 1);
    bench.begin("one", "001", 1);
    bench.begin("two", "002", 2);
    bench.begin("late", "003", 3);
    bench.rig.pass(Duration::from_secs(6), |_| {});
    bench.grant();
    assert_eq!(bench.owner("late"), None);
    assert!(bench.answers.iter().any(|(session, result)| session == "late" && *result == 3_004));
    assert_eq!(bench.rig.core.bindings_view().map(|totals| totals.live), Some(2));
}

/// A server that was granted but may not be sent more by its rate is passed over.
#[test]
fn a_grant_over_the_rate_goes_elsewhere() {
    let mut bench = Bench::new(", egress: { max: 10 }", 1);
    bench.begin("one", "001", 1);
    bench.begin("two", "002", 2);
    bench.begin("three", "003", 3);
    assert_eq!(bench.owner("three"), None);
    let owner = bench.owner("one").expect("sent");
    // Another worker takes the freed server's place in its bucket.
    bench.rig.pass(Duration::from_millis(150), |_| {});
    let rate = strowger_contract::Rate { per_second: 10, burst: 1 };
    assert!(bench.rig.router.pace(bench.rig.now, owner, 0, rate));
    bench.answer("one", 2_001);
    bench.grant();
    assert_eq!(bench.owner("three"), None, "it may not be sent more, and the other is full");
    let other = bench.owner("two").expect("sent");
    bench.answer("two", 2_001);
    bench.grant();
    assert_eq!(bench.owner("three"), Some(other));
    bench.answer("three", 2_001);
    assert_eq!(bench.answers.len(), 3);
    assert_eq!((bench.in_flight("a"), bench.in_flight("b")), (0, 0));
}

/// RFC 6733 3: an answer bears both identifiers of its request.
#[test]
fn an_answer_to_something_else_is_not_taken() {
    let mut bench = Bench::new("", 10);
    bench.begin("one", "001", 7);
    bench.answer_as("one", 2_001, 8);
    assert_eq!(bench.answers, []);
    assert_eq!(bench.rig.engine.in_progress(), 1);
    bench.answer("one", 2_001);
    assert_eq!(bench.answers, [("one".to_owned(), 2_001)]);
}

/// A request that was lost waits for another server while another process takes over. It goes on there
/// as what it was, though the links are another worker's, and that one is restored after its own.
#[test]
fn what_waits_goes_on_in_another_process() {
    let mut bench = Bench::new("", 1);
    bench.begin("one", "001", 1);
    bench.begin("two", "002", 2);
    let [one, two] = ["one", "two"].map(|session| bench.owner(session).expect("sent"));
    bench.rig.peer(Endpoint::Backend(one), PeerChange::Closed(CloseCause::Reset));
    bench.settle();
    bench.begin("three", "003", 3);
    assert_eq!(bench.sent.len(), 2, "both wait for the other's slot");
    assert_eq!(bench.rig.engine.in_progress(), 3);
    let clock = Clock { instant: bench.rig.now, nanos: 1 };
    let saved = by_clock(clock, || bench.rig.engine.save()).expect("it knows how");

    let mut next = Bench::bare(bench.yaml.clone());
    next.rig.now = bench.rig.now;
    next.sent = bench.sent.clone();
    let mut links = next.rig.other_worker(&bench.yaml, 1, 2);
    let Rig { engine, router, out, now, .. } = &mut next.rig;
    by_clock(clock, || engine.restore(*now, &saved, router, out)).expect("it was saved");
    // The link is the other worker's, as far as the core knows.
    router.link(*now, two, 0, strowger_contract::Link::Down(CloseCause::End));
    next.settle();
    assert_eq!(next.answers, [], "nobody is refused before all are there");
    assert_eq!(next.rig.engine.in_progress(), 3);
    let up = strowger_contract::Link::Up { identity: b"b.example.net", capabilities: &[u32::MAX] };
    links.router.link(next.rig.now, two, 0, up);
    next.rig.router.refresh();
    next.rig.pass(Duration::ZERO, |_| {});
    assert_eq!(next.rig.engine.in_progress(), 3);
    next.answer("two", 2_001);
    for _ in 0..2 {
        next.grant();
        let (backend, session, header) = next.sent.last().expect("it is granted").clone();
        assert_eq!(backend, two);
        let resent = header.flags & FLAG_RETRANSMITTED != 0;
        assert_eq!(resent, session == "one", "it keeps its T, and only it");
        next.answer(&session, 2_001);
    }
    assert_eq!(next.answers.len(), 3);
    assert!(next.answers.iter().all(|(_, result)| *result == 2_001), "{:?}", next.answers);
}

/// A server's own request that has no room for a Route-Record is answered.
#[test]
fn a_servers_request_without_room_is_answered() {
    let mut bench = Bench::new("", 10);
    let server = Endpoint::Backend(bench.backend("a"));
    let ask = |bench: &mut Bench, length: usize| {
        let mut bytes = Vec::new();
        let base = |bytes: &mut Vec<u8>, pad: usize| {
            bytes.clear();
            Builder::request(bytes, 258, GX, 5, 6)
                .text(code::SESSION_ID, "s")
                .text(code::ORIGIN_HOST, "a.example.net")
                .text(code::ORIGIN_REALM, "example.net")
                .text(code::DESTINATION_HOST, "client.example.net")
                .bytes(25, &vec![0; pad])
                .finish();
        };
        base(&mut bytes, 0);
        let room = length - bytes.len();
        base(&mut bytes, room);
        assert_eq!(bytes.len(), length);
        bench.rig.message(server, &bytes);
        let sent = bench.rig.out.commands().iter().find_map(|command| match command {
            Command::Send(frame) => {
                let bytes = bench.rig.out.bytes(&frame.bytes);
                Some((frame.to, Summary::of(bytes).result_code))
            }
            _ => None,
        });
        sent.expect("something goes out")
    };
    assert_eq!(ask(&mut bench, 1_000), (bench.client, None));
    assert_eq!(ask(&mut bench, MESSAGE_BYTES_MAX), (server, Some(5_015)));
    assert_eq!(bench.rig.engine.in_progress(), 1);
}

/// A client that says goodbye still gets what it has asked for.
#[test]
fn a_client_that_leaves_gets_its_answers() {
    let mut bench = Bench::new("", 10);
    bench.begin("one", "001", 1);
    let mut bytes = Vec::new();
    Builder::new(&mut bytes, FLAG_REQUEST, 282, 0, 9, 9)
        .text(code::ORIGIN_HOST, "client.example.net")
        .text(code::ORIGIN_REALM, "example.net")
        .number(code::DISCONNECT_CAUSE, 0)
        .finish();
    let client = bench.client;
    let closes = |bench: &Bench| {
        let close = |command: &Command| matches!(command, Command::Close(to, _) if *to == client);
        bench.rig.out.commands().iter().any(close)
    };
    bench.rig.message(client, &bytes);
    assert!(!closes(&bench) && bench.rig.out.commands().len() == 1, "a DPA, and no more");
    bench.settle();
    bench.answer("one", 2_001);
    assert_eq!(bench.answers, [("one".to_owned(), 2_001)]);
    let mut closed = 0;
    bench.rig.pass(Duration::from_millis(4_500), |out| {
        let close = |command: &&Command| matches!(command, Command::Close(to, _) if *to == client);
        closed += out.commands().iter().filter(close).count();
    });
    assert!(closed > 0, "it does not close by itself");
    // One that waits for nothing is closed at once.
    let mut idle = Bench::new("", 10);
    idle.rig.message(client, &bytes);
    assert!(closes(&idle));
}

/// A request that comes again while it is under way, also in another process than it came to first.
#[test]
fn what_comes_again_joins_what_is_under_way() {
    let mut bench = Bench::new(", duplicates: 1m", 10);
    for number in 1..=3_000 {
        let session = format!("s;{number}");
        bench.begin(&session, "001", number);
        if number != 7 {
            bench.answer(&session, 2_001);
        }
    }
    let clock = Clock { instant: bench.rig.now, nanos: 1 };
    let saved = by_clock(clock, || bench.rig.engine.save()).expect("it knows how");
    let mut next = Bench::bare(bench.yaml.clone());
    next.rig.now = bench.rig.now;
    next.sent = bench.sent.clone();
    let Rig { engine, router, out, now, .. } = &mut next.rig;
    by_clock(clock, || engine.restore(*now, &saved, router, out)).expect("it was saved");
    next.settle();
    for bench in [&mut bench, &mut next] {
        let (sent, answers) = (bench.sent.len(), bench.answers.len());
        let mut again = request("s;7", "001", (4_000, 7));
        again[4] |= FLAG_RETRANSMITTED;
        bench.rig.message(bench.client, &again);
        bench.settle();
        assert_eq!((bench.sent.len(), bench.answers.len()), (sent, answers), "it waits");
        bench.answer("s;7", 2_001);
        assert_eq!(bench.answers.len(), answers + 1);
        // Another one is none of those.
        let mut other = request("other", "001", (4_001, 9_999));
        other[4] |= FLAG_RETRANSMITTED;
        bench.rig.message(bench.client, &other);
        bench.settle();
        assert_eq!(bench.sent.len(), sent + 1);
    }
}
