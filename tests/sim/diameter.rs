//! Diameter: clients with charging sessions and single requests, servers behind links, two workers.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use strowger::routing::CoreRouter;
use strowger_contract::duration::Span;
use strowger_contract::handover::{Clock, by_clock};
use strowger_contract::{
    BackendId, CloseCause, Command, Context, Endpoint, Engine, FlowId, Link as Word, LocalSocket,
    Message, Outbox, PeerChange, Protocol, Router, Scope, Transport, WorkerId,
};
use strowger_diameter::avp::{FLAG_ERROR, FLAG_PROXIABLE, FLAG_REQUEST, Header, Summary, code};
use strowger_diameter::build::Builder;
use strowger_diameter::{Diameter, DiameterEngine, DiameterMatch, DiameterOptions};

use crate::world::{Change, MS, Queue, SECOND, World, dice_for};

const EDGE: &str = "10.9.9.9:3868";
const WORKERS: usize = 2;
const CLIENTS: usize = 4;
const TRAFFIC: u64 = 60 * SECOND;
const CAPABILITIES: u32 = 257;
const WATCHDOG: u32 = 280;
const DISCONNECT: u32 = 282;
const CREDIT_CONTROL: u32 = 272;
const UPDATE_LOCATION: u32 = 316;

enum Event {
    ToEdge {
        worker: usize,
        from: Endpoint,
        remote: SocketAddr,
        bytes: Vec<u8>,
        life: Option<(usize, u64)>,
    },
    ToSite {
        backend: BackendId,
        site: usize,
        life: u64,
        bytes: Vec<u8>,
    },
    ToClient {
        client: usize,
        bytes: Vec<u8>,
    },
    Answer {
        backend: BackendId,
        site: usize,
        life: u64,
        bytes: Vec<u8>,
    },
    Opened(BackendId),
    Closed {
        backend: BackendId,
        cause: CloseCause,
        only: Option<usize>,
    },
    Cut(BackendId),
    Next {
        session: u64,
    },
    Change(Change),
    Tick,
}

struct Worker {
    engine: DiameterEngine,
    router: CoreRouter,
}

struct Link {
    site: usize,
    life: u64,
    count: u64,
    there: u64,
    back: u64,
    retired: bool,
}

/// A client's session: so many requests, one after the other.
struct Session {
    client: usize,
    asked: u32,
    requests: u32,
    /// The instance that the edge last sent it to, and the request.
    owner: Option<(String, u64, u32)>,
}

struct Sim {
    world: World,
    /// Makes the engine of a worker, in so many a process.
    fresh: Box<dyn Fn(usize, u64) -> DiameterEngine>,
    upgrades: u64,
    queue: Queue<Event>,
    workers: Vec<Worker>,
    out: Outbox,
    links: BTreeMap<BackendId, Link>,
    paused: HashMap<BackendId, u64>,
    sessions: Vec<Session>,
    /// By client and Hop-by-Hop identifier: the session.
    waiting: HashMap<(usize, u32), u64>,
    answered: HashSet<(usize, u32)>,
    requests: u64,
    to_client: [u64; CLIENTS],
}

type Handed = (Endpoint, Transport, SocketAddr, SocketAddr, Instant, Vec<u8>);

fn edge() -> SocketAddr {
    EDGE.parse().expect("an address")
}

fn owner(backend: BackendId) -> usize {
    backend.0 as usize % WORKERS
}

fn flow(client: usize) -> FlowId {
    FlowId::new(WorkerId((client % WORKERS) as u8), 1, client as u32)
}

fn client_at(client: usize) -> SocketAddr {
    SocketAddr::from(([198, 51, 100, client as u8], 40_000))
}

pub(crate) fn simulate(seed: u64) {
    let world = World::new(seed, &[Transport::Tcp], true);
    let scope = Scope::<DiameterMatch> {
        listener: "sim".into(),
        node: "edge".into(),
        realm: "example.net".into(),
        sockets: vec![LocalSocket {
            transport: Transport::Tcp,
            address: edge(),
            advertise: None,
            mode: None,
        }],
        routes: Vec::new(),
        pool: Some(world.pool),
        classify: Vec::new(),
    };
    let options = DiameterOptions {
        origin_host: "edge.example.net".into(),
        watchdog: Span(Duration::from_secs(4)),
        ..DiameterOptions::default()
    };
    let fresh = Box::new(move |worker: usize, life: u64| {
        Diameter::engine(&Context {
            worker: WorkerId(worker as u8),
            workers: WORKERS as u8,
            seed: (seed << 8 | worker as u64) ^ life << 40,
            started: 1,
            scope: &scope,
            options: &options,
        })
    });
    let workers = (0..WORKERS)
        .map(|worker| Worker {
            engine: fresh(worker, 0),
            router: world.core.router(WorkerId(worker as u8)),
        })
        .collect();
    let mut sim = Sim {
        world,
        fresh,
        upgrades: 0,
        queue: Queue::new(),
        workers,
        out: Outbox::new(),
        links: BTreeMap::new(),
        paused: HashMap::new(),
        sessions: Vec::new(),
        waiting: HashMap::new(),
        answered: HashSet::new(),
        requests: 0,
        to_client: [0; CLIENTS],
    };
    for client in 0..CLIENTS {
        sim.connect(client);
    }
    for session in 0..sim.world.dice.between(40, 150) {
        let requests = if sim.world.dice.percent(60) { sim.world.dice.between(2, 8) } else { 1 };
        let client = sim.world.dice.below(CLIENTS as u64) as usize;
        sim.sessions.push(Session { client, asked: 0, requests: requests as u32, owner: None });
        let at = SECOND + sim.world.dice.below(TRAFFIC);
        sim.queue.push(at, Event::Next { session });
    }
    sim.queue.push(SECOND, Event::Change(Change::Any));
    sim.queue.push(100 * MS, Event::Tick);
    sim.run();
    sim.check();
}

impl Sim {
    fn run(&mut self) {
        let (end, mut spins) = (220 * SECOND, 0);
        loop {
            let due = self.workers.iter().enumerate().filter_map(|(worker, one)| {
                let at = one.engine.next_timeout()?;
                Some((self.world.us_of(at).max(self.world.us), worker))
            });
            let (due, event) = (due.min(), self.queue.next_at().expect("it ticks"));
            if due.is_some_and(|(at, _)| at <= event) {
                let (at, worker) = due.expect("it is due");
                spins = if at == self.world.us { spins + 1 } else { 0 };
                assert!(spins < 1_000, "the engine wants to be called for ever");
                self.world.us = at;
                self.call(worker, &mut |engine, now, router, out| {
                    engine.on_timeout(now, router, out)
                });
                continue;
            }
            if event > end {
                return;
            }
            let (at, event) = self.queue.pop().expect("it is there");
            self.world.us = at;
            self.happen(event);
        }
    }

    /// Now and then another process takes over: all engines are new, with the old ones' state.
    fn maybe_upgrade(&mut self) {
        let mut dice = dice_for(self.world.seed, b"upgrade", self.world.us);
        if !dice.percent(1) {
            return;
        }
        self.upgrades += 1;
        self.world.say(|| "upgrade".to_owned());
        let now = self.world.now();
        let old_clock = Clock { instant: now, nanos: 7_000_000_000 };
        let saved: Vec<_> = self
            .workers
            .iter()
            .map(|worker| by_clock(old_clock, || worker.engine.save()).expect("it knows how"))
            .collect();
        for (index, saved) in saved.iter().enumerate() {
            let worker = &mut self.workers[index];
            worker.router.abandon_all(now);
            worker.engine = (self.fresh)(index, self.upgrades);
            self.call(index, &mut |engine, now, router, out| {
                let clock = Clock { instant: now, nanos: 7_000_000_000 };
                by_clock(clock, || engine.restore(now, saved, router, out)).expect("it was saved");
            });
        }
    }

    fn call(
        &mut self,
        worker: usize,
        work: &mut dyn FnMut(&mut DiameterEngine, Instant, &mut CoreRouter, &mut Outbox),
    ) {
        let now = self.world.now();
        let mut out = std::mem::take(&mut self.out);
        let one = &mut self.workers[worker];
        one.router.refresh();
        work(&mut one.engine, now, &mut one.router, &mut out);
        let mut handed = VecDeque::new();
        self.world.count(out.notes());
        for command in out.commands() {
            match command {
                Command::Send(frame) => self.edge_sends(worker, frame.to, out.bytes(&frame.bytes)),
                Command::HandOver { to, from, transport, remote, local, arrived, bytes } => {
                    let bytes = out.bytes(bytes).to_vec();
                    let message: Handed = (*from, *transport, *remote, *local, *arrived, bytes);
                    handed.push_back((usize::from(to.0), message));
                }
                Command::Close(Endpoint::Backend(backend), _) => {
                    self.queue.push(self.world.us + MS, Event::Cut(*backend));
                }
                Command::HoldOff(Endpoint::Backend(backend), lasting) => {
                    let until = self.world.us + lasting.as_micros() as u64;
                    self.paused.insert(*backend, until);
                }
                Command::Proven(Endpoint::Backend(_)) => {}
                other => panic!("{other:?}"),
            }
        }
        out.clear();
        self.out = out;
        while let Some((worker, (from, transport, remote, local, arrived, bytes))) =
            handed.pop_front()
        {
            let message = Message { from, transport, remote, local, arrived, bytes: &bytes };
            self.call(worker, &mut |engine, now, router, out| {
                engine.on_message(now, message, router, out);
            });
        }
    }

    fn edge_sends(&mut self, worker: usize, to: Endpoint, bytes: &[u8]) {
        let header = Header::read(bytes).expect("a message");
        self.world.say(|| format!("  edge.{worker} > {to:?}: {header:?}"));
        match to {
            Endpoint::Client(flow) => {
                let client = flow.slot() as usize;
                if header.application != 0 && !header.is_request() {
                    let key = (client, header.hop_by_hop);
                    assert!(self.answered.insert(key), "answered twice: {key:?}");
                    assert!(self.waiting.contains_key(&key), "nobody asked for {key:?}");
                }
                self.to_client[client] = self.to_client[client].max(self.world.us) + MS;
                let event = Event::ToClient { client, bytes: bytes.to_vec() };
                self.queue.push(self.to_client[client], event);
            }
            Endpoint::Backend(backend) => {
                if header.application != 0 && header.is_request() {
                    self.check_session(worker, backend, bytes, &header);
                }
                let seed = self.world.seed;
                let now = self.world.us;
                let Some(link) = self.links.get_mut(&backend) else {
                    let event = Event::Closed {
                        backend,
                        cause: CloseCause::Unreachable,
                        only: Some(worker),
                    };
                    return self.queue.push(now + 1, event);
                };
                link.count += 1;
                let flight =
                    dice_for(seed, &backend.0.to_le_bytes(), link.count).between(MS, 15 * MS);
                link.there = link.there.max(now + flight);
                let (site, life) = (link.site, link.life);
                self.queue
                    .push(link.there, Event::ToSite { backend, site, life, bytes: bytes.to_vec() });
            }
            other => panic!("sent to {other:?}"),
        }
    }

    /// A session changes its server only when that cannot go on.
    fn check_session(&mut self, worker: usize, backend: BackendId, bytes: &[u8], header: &Header) {
        let snapshot = self.workers[worker].router.snapshot().clone();
        let spec = &snapshot.backend(backend).expect("sent to one that is gone").spec;
        let name = Summary::of(bytes).session_id.expect("a session");
        let number: usize = std::str::from_utf8(name)
            .ok()
            .and_then(|name| name.rsplit(';').next()?.parse().ok())
            .expect("a number");
        let session = &mut self.sessions[number];
        let new = (spec.id.clone(), spec.generation, header.end_to_end);
        if let Some((id, generation, end_to_end)) = session.owner.replace(new)
            && (id.as_str(), generation) != (spec.id.as_str(), spec.generation)
            && end_to_end != header.end_to_end
        {
            let pools = self.world.core.pools_view(self.world.now());
            let mut backends = pools.iter().flat_map(|pool| &pool.backends);
            let old = backends.find(|view| view.id == id && view.generation == generation);
            let usable = old.is_some_and(|view| view.health == "up" && view.state != "gone");
            assert!(!usable, "session {number} left {old:?} for {spec:?}");
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::ToEdge { worker, from, remote, bytes, life } => {
                if let (Some((_, life)), Endpoint::Backend(backend)) = (life, from)
                    && self.links.get(&backend).is_none_or(|link| link.life != life)
                {
                    return;
                }
                let arrived = self.world.now();
                self.world
                    .say(|| format!("  edge.{worker} < {from:?}: {:?}", Header::read(&bytes)));
                let message = Message {
                    from,
                    transport: Transport::Tcp,
                    remote,
                    local: edge(),
                    arrived,
                    bytes: &bytes,
                };
                self.call(worker, &mut |engine, now, router, out| {
                    engine.on_message(now, message, router, out);
                });
            }
            Event::ToSite { backend, site, life, bytes } => {
                let known = &self.world.sites[site];
                if known.alive && known.life == life {
                    self.at_site(backend, site, life, &bytes);
                }
            }
            Event::Answer { backend, site, life, bytes } => {
                self.site_sends(backend, site, life, bytes)
            }
            Event::ToClient { client, bytes } => self.at_client(client, &bytes),
            Event::Opened(backend) => {
                let Some(link) = self.links.get(&backend) else { return };
                let remote = self.world.sites[link.site].address;
                self.world.say(|| format!("  link {backend:?} open to {remote}"));
                let change =
                    PeerChange::Opened { remote, local: edge(), transport: Transport::Tcp };
                self.call(owner(backend), &mut |engine, now, router, out| {
                    engine.on_peer(now, Endpoint::Backend(backend), change, router, out);
                });
            }
            Event::Closed { backend, cause, only } => {
                self.world.say(|| format!("  link {backend:?} closed: {cause:?} {only:?}"));
                for worker in (0..WORKERS).filter(|worker| only.is_none_or(|only| only == *worker))
                {
                    self.call(worker, &mut |engine, now, router, out| {
                        let change = PeerChange::Closed(cause);
                        engine.on_peer(now, Endpoint::Backend(backend), change, router, out);
                    });
                }
            }
            Event::Cut(backend) => self.cut(backend, CloseCause::Local),
            Event::Next { session } => self.ask(session),
            Event::Change(change) => {
                if matches!(change, Change::Any) && self.world.us > TRAFFIC + 30 * SECOND {
                    return;
                }
                let (later, dead) = self.world.change(change);
                for (wait, change) in later {
                    self.queue.push(self.world.us + wait, Event::Change(change));
                }
                // Half of those that die do so without a word.
                let silent = matches!(change, Change::Die(_)) && self.world.dice.percent(50);
                if (dead.is_some() || matches!(change, Change::Start(_))) && !silent {
                    self.cut_dead();
                }
            }
            Event::Tick => {
                for event in self.world.core.tick(self.world.now()) {
                    self.world.say(|| format!("    {event:?}"));
                }
                self.keep_links();
                self.maybe_upgrade();
                self.queue.push(self.world.us + 100 * MS, Event::Tick);
            }
        }
    }

    fn cut_dead(&mut self) {
        let sites = &self.world.sites;
        let dead = |link: &Link| !sites[link.site].alive || sites[link.site].life != link.life;
        let dead: Vec<BackendId> =
            self.links.iter().filter(|(_, link)| dead(link)).map(|(backend, _)| *backend).collect();
        for backend in dead {
            self.cut(backend, CloseCause::Reset);
        }
    }

    fn cut(&mut self, backend: BackendId, cause: CloseCause) {
        if self.links.remove(&backend).is_some() {
            self.paused.insert(backend, self.world.us + SECOND / 2);
            let now = self.world.now();
            self.workers[owner(backend)].router.link(now, backend, Word::Down(cause));
            self.happen(Event::Closed { backend, cause, only: None });
        }
    }

    /// What the runtime does: a link to each that is wanted, a goodbye to each that is not.
    fn keep_links(&mut self) {
        let snapshot = self.world.core.snapshot();
        let wanted: Vec<BackendId> = snapshot.linkable(self.world.pool).collect();
        for &backend in &wanted {
            let paused = self.paused.get(&backend).is_some_and(|&until| until > self.world.us);
            if self.links.contains_key(&backend) || paused {
                continue;
            }
            let spec = &snapshot.backend(backend).expect("it is wanted").spec;
            let at = self.world.site_at(spec.address).expect("a site");
            let site = &self.world.sites[at];
            if site.alive && site.generation == spec.generation {
                let now = self.world.us;
                let link = Link {
                    site: at,
                    life: site.life,
                    count: site.life << 32,
                    there: now,
                    back: now,
                    retired: false,
                };
                self.links.insert(backend, link);
                self.queue.push(now, Event::Opened(backend));
            }
        }
        let mut unwanted = Vec::new();
        for (backend, link) in &mut self.links {
            if !wanted.contains(backend) && !std::mem::replace(&mut link.retired, true) {
                unwanted.push(*backend);
            }
        }
        for backend in unwanted {
            self.queue.push(self.world.us + 5 * SECOND, Event::Cut(backend));
            self.call(owner(backend), &mut |engine, now, router, out| {
                engine.on_peer(now, Endpoint::Backend(backend), PeerChange::Retired, router, out);
            });
        }
    }

    fn connect(&mut self, client: usize) {
        let (endpoint, remote) = (Endpoint::Client(flow(client)), client_at(client));
        self.call(client % WORKERS, &mut |engine, now, router, out| {
            let change = PeerChange::Opened { remote, local: edge(), transport: Transport::Tcp };
            engine.on_peer(now, endpoint, change, router, out);
        });
        let mut bytes = Vec::new();
        Builder::new(&mut bytes, FLAG_REQUEST, CAPABILITIES, 0, 1, 1)
            .text(code::ORIGIN_HOST, &format!("client{client}.example.net"))
            .text(code::ORIGIN_REALM, "example.net")
            .number(code::AUTH_APPLICATION_ID, u32::MAX)
            .finish();
        self.client_sends(client, bytes);
    }

    fn client_sends(&mut self, client: usize, bytes: Vec<u8>) {
        let event = Event::ToEdge {
            worker: client % WORKERS,
            from: Endpoint::Client(flow(client)),
            remote: client_at(client),
            bytes,
            life: None,
        };
        self.queue.push(self.world.us + MS, event);
    }

    fn ask(&mut self, number: u64) {
        let session = &mut self.sessions[number as usize];
        session.asked += 1;
        self.requests += 1;
        let (identifier, client) = (self.requests as u32 + 1_000, session.client);
        let kind = match session.asked {
            1 => 1,
            last if last == session.requests => 3,
            _ => 2,
        };
        let (command, application) =
            if session.requests == 1 { (UPDATE_LOCATION, 16_777_251) } else { (CREDIT_CONTROL, 4) };
        let mut bytes = Vec::new();
        Builder::request(&mut bytes, command, application, identifier, identifier)
            .text(code::SESSION_ID, &format!("client{client}.example.net;1;{number}"))
            .text(code::ORIGIN_HOST, &format!("client{client}.example.net"))
            .text(code::ORIGIN_REALM, "example.net")
            .text(code::DESTINATION_REALM, "example.net")
            .number(code::CC_REQUEST_TYPE, kind)
            .finish();
        self.waiting.insert((client, identifier), number);
        self.client_sends(client, bytes);
    }

    fn at_client(&mut self, client: usize, bytes: &[u8]) {
        let header = Header::read(bytes).expect("a message");
        if header.application == 0 {
            if header.is_request() {
                assert_eq!(header.command, WATCHDOG);
                let mut answer = Vec::new();
                Builder::new(&mut answer, 0, WATCHDOG, 0, header.hop_by_hop, header.end_to_end)
                    .number(code::RESULT_CODE, 2_001)
                    .finish();
                self.client_sends(client, answer);
            }
            return;
        }
        assert_eq!(header.hop_by_hop, header.end_to_end, "the asker's identifiers come back");
        let number = self.waiting.remove(&(client, header.hop_by_hop)).expect("it was asked");
        let session = &self.sessions[number as usize];
        if session.asked < session.requests {
            let wait = self.world.dice.between(50 * MS, 6 * SECOND);
            self.queue.push(self.world.us + wait, Event::Next { session: number });
        }
    }

    fn at_site(&mut self, backend: BackendId, site: usize, life: u64, bytes: &[u8]) {
        let header = Header::read(bytes).expect("a message");
        if !header.is_request() {
            return;
        }
        let known = &self.world.sites[site];
        let mut dice =
            dice_for(self.world.seed, &header.end_to_end.to_le_bytes(), site as u64 + life);
        let base = header.application == 0;
        let (wait, result) = match dice.below(100) {
            _ if base => (0, 2_001),
            0..4 => return,
            4..10 => (dice.below(20 * MS), 3_004),
            10..14 => (dice.between(9 * SECOND, 14 * SECOND), 2_001),
            14..18 => (dice.below(SECOND), 5_012),
            _ => (dice.below(300 * MS), 2_001),
        };
        let flags =
            if base { 0 } else { FLAG_PROXIABLE } | if result == 3_004 { FLAG_ERROR } else { 0 };
        let mut answer = Vec::new();
        let mut builder = Builder::new(
            &mut answer,
            flags,
            header.command,
            header.application,
            header.hop_by_hop,
            header.end_to_end,
        );
        if let Some(session) = Summary::of(bytes).session_id {
            builder = builder.bytes(code::SESSION_ID, session);
        }
        builder
            .number(code::RESULT_CODE, result)
            .text(code::ORIGIN_HOST, &format!("{}-{}.example.net", known.id, known.generation))
            .text(code::ORIGIN_REALM, "example.net")
            .number(code::AUTH_APPLICATION_ID, u32::MAX)
            .finish();
        self.queue.push(self.world.us + wait, Event::Answer { backend, site, life, bytes: answer });
        if header.command == DISCONNECT {
            self.queue.push(self.world.us + 20 * MS, Event::Cut(backend));
        }
    }

    fn site_sends(&mut self, backend: BackendId, site: usize, life: u64, bytes: Vec<u8>) {
        let known = &self.world.sites[site];
        let (now, remote) = (self.world.us, known.address);
        if !known.alive || known.life != life {
            return;
        }
        let Some(link) = self.links.get_mut(&backend).filter(|link| link.life == life) else {
            return;
        };
        link.count += 1;
        let flight =
            dice_for(self.world.seed, &backend.0.to_be_bytes(), link.count).between(MS, 15 * MS);
        link.back = link.back.max(now + flight);
        let event = Event::ToEdge {
            worker: owner(backend),
            from: Endpoint::Backend(backend),
            remote,
            bytes,
            life: Some((site, life)),
        };
        self.queue.push(link.back, event);
    }

    fn check(&mut self) {
        assert!(self.waiting.is_empty(), "never answered: {:?}", self.waiting);
        self.world.check_sums();
        for worker in &self.workers {
            assert_eq!(worker.engine.in_progress(), 0);
        }
        let noted: u64 = self.world.ended.values().sum();
        assert_eq!(noted, self.requests, "each request is counted once: {:?}", self.world.ended);
    }
}
