//! Mutated messages of each application through the real engine and core: nothing panics, nothing is
//! kept for ever, what goes out is well-formed, and only what ends a connection ends it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use strowger::control::config::{self, Source};
use strowger::protocols::Protocols;
use strowger::routing::{Core, CoreRouter, CoreSettings};
use strowger_contract::duration::Span;
use strowger_contract::{
    BackendId, Command, Context, Endpoint, Engine, FlowId, Framer, Framing, Keyer, LocalSocket,
    Message, Note, Outbox, PeerChange, Protocol, Scope, TokenKeys, Transport, WorkerId,
};
use strowger_diameter::avp::{FLAG_REQUEST, Header, code};
use strowger_diameter::build::{Builder, append};
use strowger_diameter::{Diameter, DiameterEngine, DiameterFramer, DiameterMatch, DiameterOptions};

use crate::world::Dice;

/// Messages per application; `STROWGER_MUTATIONS` for more.
const EACH: u64 = 100_000;

/// Requests under way that the engine may have.
const PENDING_MAX: u32 = 500;

/// Name, application, command.
const APPLICATIONS: [(&str, u32, u32); 10] = [
    ("gx", 16_777_238, 272),
    ("rx", 16_777_236, 265),
    ("gy", 4, 272),
    ("sy", 16_777_302, 8_388_635),
    ("s6a", 16_777_251, 316),
    ("cx", 16_777_216, 300),
    ("sh", 16_777_217, 306),
    ("swx", 16_777_265, 301),
    ("s6b", 16_777_272, 265),
    ("s13", 16_777_252, 324),
];

struct Bench {
    engine: DiameterEngine,
    router: CoreRouter,
    out: Outbox,
    now: Instant,
    flow: FlowId,
    backend: BackendId,
    /// Hop-by-Hop and End-to-End identifiers of requests at the server.
    asked: Vec<(u32, u32)>,
    closed: bool,
    sent: u64,
    /// Requests that are answered with others that are under way.
    joined: u64,
    forwarded: u64,
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

impl Bench {
    fn new(now: Instant) -> Self {
        let core = Core::new(
            CoreSettings {
                token_keys: TokenKeys::new(vec![[7; 16]]),
                keyer: Keyer::new([3; 16]),
                seed: 1,
                sessions_max: 1 << 12,
                bindings_max: 1 << 10,
                workers: 1,
                advise: strowger::routing::no_advice,
            },
            now,
        );
        let yaml = "version: 1\nlisteners:\n  - { name: d, protocol: diameter, bind: [tcp://127.0.0.1:3868], pool: pool, options: { origin_host: edge.example.net, origin_realm: example.net } }\npools:\n  pool:\n    bind_keys: [imsi-apn, imsi, msisdn, framed-ip, framed-ipv6-prefix]\n    backends: [ { id: a, address: tcp://127.0.0.1:3869 } ]\n";
        let source = Source { name: "sim".into(), text: yaml.into() };
        let protocols = Protocols::standard();
        let loaded = config::load(&[source], &protocols.configurers(), core.pool_names())
            .unwrap_or_else(|errors| panic!("{errors}"));
        let _plan = core.apply(now, loaded.spec);
        let pool = core.pool_names().id("pool");
        let (backend, _) = core.snapshot().linkable(pool).next().expect("a backend");
        let scope = Scope::<DiameterMatch> {
            listener: "d".into(),
            node: "edge".into(),
            realm: "example.net".into(),
            sockets: vec![LocalSocket {
                transport: Transport::Tcp,
                address: address("127.0.0.1:3868"),
                advertise: None,
                mode: None,
            }],
            routes: vec![(
                DiameterMatch { imsi: vec!["99*".into()], ..DiameterMatch::default() },
                pool,
            )],
            pool: Some(pool),
            classify: Vec::new(),
        };
        let mut options = DiameterOptions {
            origin_host: "edge.example.net".into(),
            max_pending: PENDING_MAX,
            duplicates: Span::secs(10),
            answer_timeout: Span::secs(2),
            ..DiameterOptions::default()
        };
        options.overload.doic = true;
        options.overload.load = true;
        let engine = Diameter::engine(&Context {
            worker: WorkerId(0),
            workers: 1,
            seed: 5,
            started: 1,
            scope: &scope,
            options: &options,
        });
        let mut bench = Self {
            engine,
            router: core.router(WorkerId(0)),
            out: Outbox::new(),
            now,
            flow: FlowId::new(WorkerId(0), 1, 1),
            backend,
            asked: Vec::new(),
            closed: true,
            sent: 0,
            joined: 0,
            forwarded: 0,
        };
        bench.connect(Endpoint::Backend(backend), false);
        bench.connect(Endpoint::Client(bench.flow), true);
        bench
    }

    fn connect(&mut self, peer: Endpoint, client: bool) {
        let change = PeerChange::Opened {
            remote: address("127.0.0.1:4000"),
            local: address("127.0.0.1:3868"),
            transport: Transport::Tcp,
        };
        self.engine.on_peer(self.now, peer, change, &mut self.router, &mut self.out);
        self.settle();
        let mut bytes = Vec::new();
        let flags = if client { FLAG_REQUEST } else { 0 };
        let mut builder = Builder::new(&mut bytes, flags, 257, 0, 1, 1);
        if !client {
            builder = builder.number(code::RESULT_CODE, 2_001);
        }
        builder
            .text(code::ORIGIN_HOST, if client { "gw.example.net" } else { "a.example.net" })
            .text(code::ORIGIN_REALM, "example.net")
            .application(u32::MAX)
            .finish();
        self.feed(peer, &bytes);
        if client {
            self.closed = false;
        }
    }

    fn feed(&mut self, from: Endpoint, bytes: &[u8]) {
        let message = Message {
            from,
            transport: Transport::Tcp,
            remote: address("127.0.0.1:4000"),
            local: address("127.0.0.1:3868"),
            arrived: self.now,
            bytes,
        };
        self.engine.on_message(self.now, message, &mut self.router, &mut self.out);
        self.settle();
    }

    fn settle(&mut self) {
        for command in self.out.commands() {
            match command {
                Command::Send(frame) => {
                    let bytes = self.out.bytes(&frame.bytes);
                    let framed = DiameterFramer.frame(bytes).expect("what goes out is a message");
                    assert!(
                        matches!(framed, Framing::Message(length) if length.get() == bytes.len())
                    );
                    let header = Header::read(bytes).expect("a header");
                    if header.is_request() && header.application != 0 {
                        self.asked.push((header.hop_by_hop, header.end_to_end));
                        self.forwarded += 1;
                    }
                    self.sent += 1;
                }
                Command::Close(Endpoint::Client(_), _) => self.closed = true,
                Command::Close(..)
                | Command::HoldOff(..)
                | Command::Proven(_)
                | Command::OpenOutward(..) => {}
                other => panic!("{other:?}"),
            }
        }
        let joins = |note: &&Note| matches!(note, Note::Count("diameter_duplicates_joined"));
        self.joined += self.out.notes().iter().filter(joins).count() as u64;
        self.out.clear();
        let kept = self.asked.len().saturating_sub(PENDING_MAX as usize * 2);
        self.asked.drain(..kept);
    }

    fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        while let Some(next) = self.engine.next_timeout().filter(|next| *next <= until) {
            self.now = self.now.max(next);
            self.engine.on_timeout(self.now, &mut self.router, &mut self.out);
            self.settle();
        }
        self.now = until;
    }
}

fn group(code: u32, inner: &[(u32, &[u8])]) -> Vec<u8> {
    let (mut data, mut avp) = (Vec::new(), Vec::new());
    for (code, bytes) in inner {
        append(&mut data, *code, 0x40, bytes);
    }
    append(&mut avp, code, 0x40, &data);
    avp
}

/// A message with all that the relay looks at.
fn whole(
    request: bool,
    application: u32,
    command: u32,
    (hop, end): (u32, u32),
    number: u64,
) -> Vec<u8> {
    let mut bytes = Vec::new();
    let flags = if request { 0xc0 } else { 0x40 };
    let imsi = format!("00101{:010}", number % 500);
    let mut builder = Builder::new(&mut bytes, flags, command, application, hop, end)
        .text(code::SESSION_ID, &format!("s;{}", number % 2_000))
        .text(code::ORIGIN_HOST, if request { "gw.example.net" } else { "a.example.net" })
        .text(code::ORIGIN_REALM, "example.net");
    if request {
        builder = builder
            .text(code::DESTINATION_REALM, "example.net")
            .number(code::CC_REQUEST_TYPE, (number % 4) as u32 + 1)
            .raw(&group(443, &[(450, &[0, 0, 0, 1]), (444, imsi.as_bytes())]))
            .bytes(8, &[10, 0, (number >> 8) as u8, number as u8])
            .bytes(97, &[0, 64, 0x20, 1, 0xd, 0xb8, 0, number as u8])
            .text(30, "internet")
            .bytes(284, &[0; 8]);
        if number.is_multiple_of(3) {
            builder = builder.text(code::DESTINATION_HOST, "a.example.net");
        }
    } else {
        let olr: &[(u32, &[u8])] = &[
            (624, &number.to_be_bytes()),
            (626, &[0, 0, 0, (number % 2) as u8]),
            (627, &[0, 0, 0, (number % 20) as u8]),
            (625, &[0, 0, 0, 1]),
        ];
        let load: &[(u32, &[u8])] =
            &[(651, &[0, 0, 0, (number % 2) as u8]), (652, &[0, 0, 0, 0, 0, 0, 0x40, 0])];
        let result = [2_001, 2_001, 3_004, 3_006, 5_002, 5_012][(number % 6) as usize];
        builder = builder
            .number(code::RESULT_CODE, result)
            .raw(&group(623, olr))
            .raw(&group(650, load))
            .text(292, "aaa://a.example.net");
    }
    builder.finish();
    bytes
}

fn mutate(bytes: &mut Vec<u8>, dice: &mut Dice) {
    for _ in 0..=dice.below(4) {
        if bytes.len() < 24 {
            break;
        }
        let at = dice.below(bytes.len() as u64) as usize;
        match dice.below(7) {
            0 => bytes[at] ^= 1 << dice.below(8),
            1 => bytes[at] = dice.roll() as u8,
            2 => {
                // Lengths and flags are where parsers err.
                let word = (20 + dice.below((bytes.len() - 20) as u64 / 4) as usize * 4)
                    .min(bytes.len() - 4);
                let odd = [0u32, 1, 7, 8, 11, 12, 0x00ff_ffff, 0x80ff_ffff, u32::MAX];
                let value = odd[dice.below(odd.len() as u64) as usize];
                bytes[word..word + 4].copy_from_slice(&value.to_be_bytes());
            }
            3 => bytes.truncate(at.max(20) & !3),
            4 => {
                let end = (at + dice.below(64) as usize).min(bytes.len());
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
            5 => bytes[4] = dice.roll() as u8,
            _ => {
                let end = (at + dice.below(32) as usize).min(bytes.len());
                bytes.drain(at..end);
            }
        }
    }
    let length = bytes.len().max(20) & !3;
    bytes.resize(length, 0);
    bytes[0] = 1;
    bytes[1..4].copy_from_slice(&(length as u32).to_be_bytes()[1..]);
}

fn run(application: u32, command: u32, seed: u64) {
    let each = std::env::var("STROWGER_MUTATIONS").ok().and_then(|text| text.parse().ok());
    let (mut dice, mut bench) = (Dice(seed), Bench::new(Instant::now()));
    let each = each.unwrap_or(EACH);
    for number in 0..each {
        if bench.closed {
            let old = Endpoint::Client(bench.flow);
            let gone = PeerChange::Closed(strowger_contract::CloseCause::Local);
            bench.engine.on_peer(bench.now, old, gone, &mut bench.router, &mut bench.out);
            bench.settle();
            bench.flow = FlowId::new(WorkerId(0), bench.flow.generation() + 1, 1);
            bench.connect(Endpoint::Client(bench.flow), true);
        }
        let request = dice.percent(60) || bench.asked.is_empty();
        let identifiers = if request {
            (number as u32, number as u32)
        } else {
            let at = dice.below(bench.asked.len() as u64) as usize;
            bench.asked.swap_remove(at)
        };
        let mut bytes = whole(request, application, command, identifiers, number);
        if dice.percent(90) {
            mutate(&mut bytes, &mut dice);
        }
        let header = Header::read(&bytes).expect("long enough");
        let upkeep = header.application == 0;
        if request {
            let told = bench.sent + bench.joined;
            bench.feed(Endpoint::Client(bench.flow), &bytes);
            if header.is_request() && !upkeep {
                let now_told = bench.sent + bench.joined;
                assert!(now_told > told, "seed {seed}, message {number}: nobody was told");
            }
            assert!(
                !bench.closed || upkeep,
                "seed {seed}, message {number} cost the connection: {header:?}"
            );
        } else {
            if upkeep {
                // What the peer machine makes of it is its own matter; see the unit tests.
                continue;
            }
            bench.feed(Endpoint::Backend(bench.backend), &bytes);
        }
        assert!(bench.engine.in_progress() <= PENDING_MAX as usize);
        bench.pass(Duration::from_millis(1));
    }
    assert!(bench.forwarded > each / 10, "only {} went on", bench.forwarded);
    bench.pass(Duration::from_secs(120));
    assert_eq!(bench.engine.in_progress(), 0, "seed {seed}: something never ended");
}

#[test]
fn mutated_messages_of_each_application() {
    for (index, (name, application, command)) in APPLICATIONS.into_iter().enumerate() {
        let began = Instant::now();
        run(application, command, index as u64 + 1);
        println!("{name}: {:?}", began.elapsed());
    }
}
