//! Diameter: clients with charging sessions and single requests, servers behind one or more links,
//! two workers. Some servers open connections themselves, which are then their links (RFC 6733 5.6.4).

mod links;
mod parties;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use strowger::routing::CoreRouter;
use strowger_contract::duration::Span;
use strowger_contract::handover::{Clock, by_clock};
use strowger_contract::{
    BackendId, CloseCause, Command, Context, Endpoint, Engine, FlowId, LocalSocket, Message,
    Outbox, PeerChange, Protocol, Scope, Transport, WorkerId,
};
use strowger_diameter::avp::{Header, Summary};
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
        over: Endpoint,
        site: usize,
        life: u64,
        bytes: Vec<u8>,
    },
    ToClient {
        client: usize,
        bytes: Vec<u8>,
    },
    Answer {
        over: Endpoint,
        site: usize,
        life: u64,
        bytes: Vec<u8>,
    },
    Opened(Endpoint),
    Closed {
        over: Endpoint,
        cause: CloseCause,
        only: Option<usize>,
    },
    Cut(Endpoint),
    /// This server, or any, opens a connection itself.
    Dial(Option<usize>),
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
    backend: BackendId,
    site: usize,
    life: u64,
    count: u64,
    there: u64,
    back: u64,
    retired: bool,
    /// The edge lets it serve as the server's link.
    serves: bool,
}

/// Tells links apart for dice.
fn place_of(over: Endpoint) -> [u8; 8] {
    let (backend, lane) = over.as_link().unwrap_or((BackendId(0), 0));
    let flow = if let Endpoint::Client(flow) = over { flow.to_bits() } else { 0 };
    (flow << 8 ^ u64::from(backend.0) ^ u64::from(lane) << 32).to_le_bytes()
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
    /// By the endpoint that the edge knows them by: its own, and those that servers opened.
    links: BTreeMap<Endpoint, Link>,
    paused: HashMap<Endpoint, u64>,
    /// Connections that servers opened, so far.
    dialed: u32,
    served: u64,
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

fn owner(over: Endpoint) -> usize {
    match (over, over.as_link()) {
        (Endpoint::Client(flow), _) => usize::from(flow.worker().0),
        (_, Some((backend, lane))) => (backend.0 as usize + usize::from(lane)) % WORKERS,
        _ => panic!("{over:?} is no link"),
    }
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
        hedge: (seed % 3 == 1).then(|| {
            let hedge = serde_json::json!({"commands": [265, 316, 318, 8388635], "after": "150ms"});
            serde_json::from_value(hedge).expect("an option")
        }),
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
        dialed: 0,
        served: 0,
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
    sim.queue.push(2 * SECOND, Event::Dial(None));
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

    /// Now and then another process takes over: all engines and the core are new, with the old ones'
    /// state.
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
        self.world.renew_core();
        // What has left the configuration is not there in the new process, not even to drain.
        let sites = &self.world.sites;
        let stays = |(id, generation, _): &(String, u64, u32)| {
            let mut sites = sites.iter();
            sites.any(|site| site.wanted && site.id == *id && site.generation == *generation)
        };
        for session in &mut self.sessions {
            session.owner = session.owner.take().filter(stays);
        }
        for (index, saved) in saved.iter().enumerate() {
            let worker = &mut self.workers[index];
            worker.router = self.world.core.router(WorkerId(index as u8));
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
                Command::Close(over, _) => {
                    self.queue.push(self.world.us + MS, Event::Cut(*over));
                }
                Command::HoldOff(over, lasting) => {
                    let until = self.world.us + lasting.as_micros() as u64;
                    self.paused.insert(*over, until);
                }
                Command::Proven(over) => {
                    if let (Endpoint::Client(_), Some(link)) = (over, self.links.get_mut(over)) {
                        self.served += u64::from(!std::mem::replace(&mut link.serves, true));
                    }
                }
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
            Endpoint::Client(flow) if (flow.slot() as usize) < CLIENTS => {
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
            over => {
                let (seed, now) = (self.world.seed, self.world.us);
                let backend = self.links.get(&over).map(|link| link.backend);
                let backend = backend.or_else(|| over.as_link().map(|(backend, _)| backend));
                if header.application != 0
                    && header.is_request()
                    && let Some(backend) = backend
                {
                    self.check_session(worker, backend, bytes, &header);
                }
                let Some(link) = self.links.get_mut(&over) else {
                    let cause = CloseCause::Unreachable;
                    let event = Event::Closed { over, cause, only: Some(worker) };
                    return self.queue.push(now + 1, event);
                };
                link.count += 1;
                let flight = dice_for(seed, &place_of(over), link.count).between(MS, 15 * MS);
                link.there = link.there.max(now + flight);
                let (site, life) = (link.site, link.life);
                let event = Event::ToSite { over, site, life, bytes: bytes.to_vec() };
                self.queue.push(link.there, event);
            }
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
        self.world.say(|| format!("    session {number} goes to {backend:?}"));
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
                if let Some((_, life)) = life
                    && self.links.get(&from).is_none_or(|link| link.life != life)
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
            Event::ToSite { over, site, life, bytes } => {
                let known = &self.world.sites[site];
                if known.alive && known.life == life {
                    self.at_site(over, site, life, &bytes);
                }
            }
            Event::Answer { over, site, life, bytes } => self.site_sends(over, site, life, bytes),
            Event::ToClient { client, bytes } => self.at_client(client, &bytes),
            Event::Opened(over) => {
                let Some(link) = self.links.get(&over) else { return };
                let remote = self.world.sites[link.site].address;
                self.world.say(|| format!("  link {over:?} open to {remote}"));
                let change =
                    PeerChange::Opened { remote, local: edge(), transport: Transport::Tcp };
                self.call(owner(over), &mut |engine, now, router, out| {
                    engine.on_peer(now, over, change, router, out);
                });
            }
            Event::Closed { over, cause, only } => {
                self.world.say(|| format!("  link {over:?} closed: {cause:?} {only:?}"));
                // First where it was.
                let first = owner(over);
                for worker in (0..WORKERS).map(|worker| (first + worker) % WORKERS) {
                    if only.is_some_and(|only| only != worker) {
                        continue;
                    }
                    self.call(worker, &mut |engine, now, router, out| {
                        engine.on_peer(now, over, PeerChange::Closed(cause), router, out);
                    });
                }
            }
            Event::Cut(over) => self.cut(over, CloseCause::Local),
            Event::Dial(site) => self.dial(site),
            Event::Next { session } => self.ask(session),
            Event::Change(change) => {
                if matches!(change, Change::Any) && self.world.us > TRAFFIC + 30 * SECOND {
                    return;
                }
                let (later, dead) = self.world.change(change);
                if let Change::Start(site) = change {
                    // About when the edge tries again.
                    let mut dice = dice_for(self.world.seed, b"dials", self.world.us);
                    let at = self.world.us + dice.between(1, 100) * 10 * MS;
                    self.queue.push(at, Event::Dial(Some(site)));
                }
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
                self.check_links();
                self.maybe_upgrade();
                self.queue.push(self.world.us + 100 * MS, Event::Tick);
            }
        }
    }

    fn check(&mut self) {
        self.world.say(|| format!("{} connections of servers served", self.served));
        assert!(self.waiting.is_empty(), "never answered: {:?}", self.waiting);
        self.world.check_sums();
        for worker in &self.workers {
            assert_eq!(worker.engine.in_progress(), 0);
        }
        let noted: u64 = self.world.ended.values().sum();
        assert_eq!(noted, self.requests, "each request is counted once: {:?}", self.world.ended);
    }
}
