//! SIP: calls and messages over UDP, instances on UDP and TCP, two workers.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::time::Instant;

use strowger::routing::CoreRouter;
use strowger_contract::handover::{Clock, by_clock};
use strowger_contract::{
    BackendId, CloseCause, Command, Context, Endpoint, Engine, LocalSocket, LookupId, Message,
    Outbox, PeerChange, Place, Protocol, RequestOutcome, Scope, Transport, Unresolved, WorkerId,
};
use strowger_sip::hide::{HideFrom, TopologyHiding};
use strowger_sip::{Sip, SipEngine, SipMatch, SipOptions};

use crate::world::{Change, MS, Queue, SECOND, World, dice_for};

mod parties;

const EDGE: &str = "10.9.9.9:5060";
const WORKERS: usize = 2;
const TRAFFIC: u64 = 60 * SECOND;

enum Event {
    ToEdge {
        worker: usize,
        from: Endpoint,
        remote: SocketAddr,
        bytes: Vec<u8>,
        life: Option<(usize, u64)>,
    },
    ToSite {
        site: usize,
        via: Endpoint,
        worker: usize,
        bytes: Vec<u8>,
        life: Option<u64>,
    },
    ToClient {
        bytes: Vec<u8>,
    },
    Closed {
        worker: usize,
        backend: BackendId,
        cause: CloseCause,
    },
    Resolved {
        worker: usize,
        process: u64,
        id: LookupId,
        found: Result<Vec<Place>, Unresolved>,
    },
    Begin(u64),
    /// The client says it again, if it still waits.
    Again {
        branch: String,
        wait: u64,
    },
    Bye(String),
    Cancel(u64),
    /// What a server does next with a request.
    Serve {
        site: usize,
        life: u64,
        branch: String,
        step: Step,
    },
    Change(Change),
    Tick,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Ring,
    Answer(u16),
    Repeat(u64),
}

struct Worker {
    engine: SipEngine,
    router: CoreRouter,
}

/// A request of a client.
struct Asked {
    method: &'static str,
    bytes: Vec<u8>,
    client: SocketAddr,
    since: u64,
    heard: bool,
    /// The edge has it.
    admitted: bool,
    /// Distinct final answers that the edge sent.
    finals: BTreeSet<(u16, String)>,
}

/// A request at an instance.
struct Served {
    bytes: Vec<u8>,
    method: String,
    back: (usize, Endpoint),
    code: u16,
    acknowledged: bool,
    /// It is deaf, or the like.
    ignored: bool,
}

struct Dialog {
    call: u64,
    contact: String,
    to: String,
    routes: Vec<String>,
    closing: bool,
}

struct Link {
    site: usize,
    life: u64,
    last: u64,
}

struct Sim {
    world: World,
    /// Makes the engine of a worker, in so many a process.
    fresh: Box<dyn Fn(usize, u64) -> SipEngine>,
    upgrades: u64,
    /// Clients see no instance's address.
    hides: bool,
    queue: Queue<Event>,
    workers: Vec<Worker>,
    out: Outbox,
    asked: HashMap<String, Asked>,
    dialogs: BTreeMap<String, Dialog>,
    /// By instance number, its life, and branch.
    served: HashMap<(usize, u64, String), Served>,
    alive_dialogs: HashSet<(usize, u64, String)>,
    links: HashMap<(usize, BackendId), Link>,
    sent: HashMap<SocketAddr, u64>,
    forks: u64,
}

fn socket(transport: Transport) -> LocalSocket {
    LocalSocket {
        transport,
        address: EDGE.parse().expect("an address"),
        advertise: None,
        mode: None,
    }
}

pub(crate) fn simulate(seed: u64) {
    let world = World::new(seed, &[Transport::Udp, Transport::Udp, Transport::Tcp], false);
    let scope = Scope::<SipMatch> {
        listener: "sim".into(),
        node: "edge".into(),
        realm: String::new(),
        sockets: vec![socket(Transport::Udp), socket(Transport::Tcp)],
        routes: Vec::new(),
        pool: Some(world.pool),
        classify: Vec::new(),
    };
    let options = SipOptions {
        recurse: seed % 2 == 1,
        hedge: (seed % 4 == 2).then(|| {
            let hedge = serde_json::json!({"methods": ["MESSAGE", "OPTIONS"], "after": "120ms"});
            serde_json::from_value(hedge).expect("an option")
        }),
        topology_hiding: seed.is_multiple_of(3).then(|| TopologyHiding {
            from: if seed.is_multiple_of(2) { HideFrom::Both } else { HideFrom::Clients },
            ..TopologyHiding::default()
        }),
        ..SipOptions::default()
    };
    let hides = options.topology_hiding.is_some();
    let fresh = Box::new(move |worker: usize, life: u64| {
        Sip::engine(&Context {
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
        hides,
        queue: Queue::new(),
        workers,
        out: Outbox::new(),
        asked: HashMap::new(),
        dialogs: BTreeMap::new(),
        served: HashMap::new(),
        alive_dialogs: HashSet::new(),
        links: HashMap::new(),
        sent: HashMap::new(),
        forks: 0,
    };
    let calls = sim.world.dice.between(30, 120);
    for call in 0..calls {
        let at = sim.world.dice.below(TRAFFIC);
        sim.queue.push(at, Event::Begin(call));
    }
    sim.queue.push(SECOND, Event::Change(Change::Any));
    sim.queue.push(100 * MS, Event::Tick);
    sim.run();
    sim.check();
}

fn line<'a>(text: &'a str, name: &str) -> &'a str {
    lines(text, name).next().unwrap_or_default()
}

fn lines<'a>(text: &'a str, name: &str) -> impl Iterator<Item = &'a str> {
    text.split("\r\n").filter_map(move |line| {
        let (found, value) = line.split_once(':')?;
        found.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

fn parameter<'a>(value: &'a str, name: &str) -> &'a str {
    let mut parts = value.split(';').filter_map(|part| part.split_once('='));
    parts.find(|(found, _)| found.trim() == name).map_or("", |(_, value)| value)
}

fn top_branch(text: &str) -> String {
    let via = line(text, "Via");
    parameter(via.split(',').next().unwrap_or_default(), "branch").to_owned()
}

fn code_of(text: &str) -> u16 {
    text.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0)
}

fn angled(value: &str) -> &str {
    value.split_once('<').and_then(|(_, rest)| rest.split_once('>')).map_or(value, |(uri, _)| uri)
}

fn call_of(text: &str) -> u64 {
    line(text, "Call-ID").strip_prefix("call-").and_then(|call| call.parse().ok()).unwrap_or(0)
}

/// The call that a client's address was made for, or its lower half.
fn call_number(client: SocketAddr) -> u16 {
    match client {
        SocketAddr::V4(client) => u16::from(client.ip().octets()[3]),
        SocketAddr::V6(_) => 0,
    }
}

fn client_of(call: u64) -> SocketAddr {
    SocketAddr::from(([198, 51, (call >> 8) as u8, call as u8], 5070))
}

impl Sim {
    fn run(&mut self) {
        let end = 420 * SECOND;
        let mut spins = 0;
        loop {
            let timer = |worker: &Worker| worker.engine.next_timeout();
            let timers: Vec<Option<Instant>> = self.workers.iter().map(timer).collect();
            let due = timers
                .iter()
                .enumerate()
                .filter_map(|(worker, at)| {
                    Some((self.world.us_of((*at)?).max(self.world.us), worker))
                })
                .min();
            let event = self.queue.next_at();
            match (due, event) {
                (Some((at, worker)), event) if event.is_none_or(|event| at <= event) => {
                    spins = if at == self.world.us { spins + 1 } else { 0 };
                    assert!(spins < 1_000, "the engine wants to be called for ever");
                    self.world.us = at;
                    self.call(worker, &mut |engine, now, router, out| {
                        engine.on_timeout(now, router, out)
                    });
                }
                (_, Some(_)) => {
                    let (at, event) = self.queue.pop().expect("it is there");
                    if at > end {
                        return;
                    }
                    self.world.us = at;
                    self.happen(event);
                }
                _ => return,
            }
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
        work: &mut dyn FnMut(&mut SipEngine, Instant, &mut CoreRouter, &mut Outbox),
    ) {
        let now = self.world.now();
        let mut out = std::mem::take(&mut self.out);
        let one = &mut self.workers[worker];
        one.router.refresh();
        work(&mut one.engine, now, &mut one.router, &mut out);
        let mut handed = VecDeque::new();
        self.carry_out(worker, &out, &mut handed);
        out.clear();
        self.out = out;
        while let Some((worker, message)) = handed.pop_front() {
            let (from, transport, remote, local, arrived, bytes): Handed = message;
            let message = Message { from, transport, remote, local, arrived, bytes: &bytes };
            self.call(worker, &mut |engine, now, router, out| {
                engine.on_message(now, message, router, out)
            });
        }
    }

    fn carry_out(&mut self, worker: usize, out: &Outbox, handed: &mut VecDeque<(usize, Handed)>) {
        self.world.count(out.notes());
        for command in out.commands() {
            match command {
                Command::Send(frame) => self.edge_sends(worker, frame.to, out.bytes(&frame.bytes)),
                Command::HandOver { to, from, transport, remote, local, arrived, bytes } => {
                    let bytes = out.bytes(bytes).to_vec();
                    handed.push_back((
                        usize::from(to.0),
                        (*from, *transport, *remote, *local, *arrived, bytes),
                    ));
                }
                Command::Resolve { id, .. } => self.look_up(worker, *id),
                Command::Close(..)
                | Command::HoldOff(..)
                | Command::Proven(_)
                | Command::OpenOutward(..)
                | Command::Splice(..) => {
                    panic!("{command:?}")
                }
            }
        }
    }

    /// A name server answers late, wrongly or not at all, and now and then with an instance.
    fn look_up(&mut self, worker: usize, id: LookupId) {
        let mut dice = dice_for(self.world.seed, b"name", self.world.us ^ id.0);
        let found = match dice.below(10) {
            0 => Err(Unresolved::NoSuchName),
            1 => Err(Unresolved::NoAnswer),
            _ => {
                let count = dice.between(1, 3);
                let sites = &self.world.sites;
                let mut pick = || sites[dice.below(sites.len() as u64) as usize].address;
                let place = |address| Place { transport: Transport::Udp, address };
                Ok((0..count).map(|_| place(pick())).collect())
            }
        };
        let at = self.world.us + dice.below(3 * SECOND);
        self.queue.push(at, Event::Resolved { worker, process: self.upgrades, id, found });
    }

    /// A datagram's luck: when it comes, if it does.
    fn flight(&mut self, address: SocketAddr) -> Option<u64> {
        let count = self.sent.entry(address).or_insert(0);
        *count += 1;
        let mut dice = dice_for(self.world.seed, address.to_string().as_bytes(), *count);
        (!dice.percent(2)).then(|| self.world.us + dice.between(MS, 40 * MS))
    }

    fn edge_sends(&mut self, worker: usize, to: Endpoint, bytes: &[u8]) {
        let text = std::str::from_utf8(bytes).expect("text");
        let start = text.split("\r\n").next().unwrap_or_default();
        self.world.say(|| {
            format!(
                "  edge.{worker} > {to:?}: {start} [{} {}]",
                line(text, "Call-ID"),
                top_branch(text)
            )
        });
        match to {
            Endpoint::Datagram { remote, .. } if remote.ip().to_string().starts_with("198.51.") => {
                assert_eq!(remote, client_of(call_of(text)), "{start}");
                let seen = |site: &crate::world::Site| text.contains(&site.address.to_string());
                // Who was redirected to who is no instance talks to him alone.
                let alone =
                    (101..300).contains(&code_of(text)) && line(text, "Record-Route").is_empty();
                assert!(
                    !self.hides || alone || !self.world.sites.iter().any(seen),
                    "not hidden: {text}"
                );
                self.told(text);
                if let Some(at) = self.flight(remote) {
                    self.queue.push(at, Event::ToClient { bytes: bytes.to_vec() });
                }
            }
            Endpoint::Datagram { remote, .. } => {
                let site = self.world.site_at(remote).expect("nobody was ever there");
                let known = &self.world.sites[site];
                self.check_dialog(text, &known.id.clone(), known.generation);
                if let Some(at) = self.flight(remote) {
                    let via = Endpoint::Datagram { socket: 0, remote };
                    self.queue.push(
                        at,
                        Event::ToSite { site, via, worker, bytes: bytes.to_vec(), life: None },
                    );
                }
            }
            Endpoint::Backend(backend) => self.over_link(worker, backend, bytes, text),
            other => panic!("sent to {other:?}: {text}"),
        }
    }

    fn over_link(&mut self, worker: usize, backend: BackendId, bytes: &[u8], text: &str) {
        let snapshot = self.workers[worker].router.snapshot().clone();
        let spec = snapshot.backend(backend).map(|backend| backend.spec.clone());
        if let Some(spec) = &spec {
            self.check_dialog(text, &spec.id, spec.generation);
        }
        let now = self.world.us;
        if !self.links.contains_key(&(worker, backend)) {
            let Some(spec) = spec else {
                return self.closed(worker, backend, CloseCause::Unreachable);
            };
            let at = self.world.site_at(spec.address).expect("a site");
            let site = &self.world.sites[at];
            if !site.alive || site.generation != spec.generation {
                return self.closed(worker, backend, CloseCause::Refused);
            }
            let link = Link { site: at, life: site.life, last: now };
            self.links.insert((worker, backend), link);
        }
        let link = self.links.get_mut(&(worker, backend)).expect("it is open");
        let at = link.site;
        link.last =
            link.last.max(now + dice_for(self.world.seed, b"link", now).between(MS, 20 * MS));
        let event = Event::ToSite {
            site: at,
            via: Endpoint::Backend(backend),
            worker,
            bytes: bytes.to_vec(),
            life: Some(link.life),
        };
        self.queue.push(link.last, event);
    }

    fn closed(&mut self, worker: usize, backend: BackendId, cause: CloseCause) {
        self.queue.push(self.world.us + MS, Event::Closed { worker, backend, cause });
    }

    /// A message of a dialog goes to the instance that has it, or to nobody.
    fn check_dialog(&self, text: &str, id: &str, generation: u64) {
        let to = line(text, "To");
        let uri = text.split(' ').nth(1).unwrap_or_default();
        let Some((user, _)) = uri.strip_prefix("sip:").and_then(|uri| uri.split_once('@')) else {
            return;
        };
        let mut parts = user.split('-');
        if let (Some("at"), Some(owner), Some(age)) = (parts.next(), parts.next(), parts.next()) {
            assert!(to.contains("tag="), "a contact outside of a dialog");
            assert_eq!(
                (owner, age),
                (id, generation.to_string().as_str()),
                "a dialog's request went astray: {text}"
            );
        }
    }

    /// The edge answered a client.
    fn told(&mut self, text: &str) {
        assert!(text.starts_with("SIP/2.0 "), "{text}");
        let (code, branch) = (code_of(text), top_branch(text));
        if line(text, "CSeq").ends_with("CANCEL") {
            return;
        }
        let asked = self.asked.get_mut(&branch).expect("it was asked");
        if code < 200 {
            assert!(asked.finals.is_empty() || asked.method == "INVITE", "{text}");
            return;
        }
        let told = (code, parameter(line(text, "To"), "tag").to_owned());
        if asked.finals.contains(&told) {
            return;
        }
        if !asked.finals.is_empty() {
            // RFC 3261 16.7 step 5: a 2xx to an INVITE always goes back.
            assert!(asked.method == "INVITE" && code < 300, "{:?} and then {text}", asked.finals);
            self.forks += 1;
        }
        asked.finals.insert(told);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::ToEdge { worker, from, remote, bytes, life } => {
                if let (Some((site, life)), Endpoint::Backend(backend)) = (life, from) {
                    let site = &self.world.sites[site];
                    let open =
                        self.links.get(&(worker, backend)).is_some_and(|link| link.life == life);
                    if !open || !site.alive || site.life != life {
                        return;
                    }
                }
                let text = std::str::from_utf8(&bytes).expect("text");
                let start = text.split("\r\n").next().unwrap_or_default().to_owned();
                self.world.say(|| {
                    format!("  edge.{worker} < {from:?}: {start} [{}]", line(text, "Call-ID"))
                });
                if !start.starts_with("SIP/2.0")
                    && !start.starts_with("ACK")
                    && !start.starts_with("CANCEL")
                    && let Some(asked) = self.asked.get_mut(&top_branch(text))
                {
                    asked.admitted = true;
                }
                let transport = if matches!(from, Endpoint::Backend(_)) {
                    Transport::Tcp
                } else {
                    Transport::Udp
                };
                let message = Message {
                    from,
                    transport,
                    remote,
                    local: EDGE.parse().expect("an address"),
                    arrived: self.world.now(),
                    bytes: &bytes,
                };
                self.call(worker, &mut |engine, now, router, out| {
                    engine.on_message(now, message, router, out)
                });
            }
            Event::ToSite { site, via, worker, bytes, life } => {
                let known = &self.world.sites[site];
                if known.alive && life.is_none_or(|life| life == known.life) {
                    self.at_site(site, via, worker, &bytes);
                }
            }
            Event::ToClient { bytes } => self.at_client(std::str::from_utf8(&bytes).expect("text")),
            Event::Closed { worker, backend, cause } => {
                self.world.say(|| format!("  edge.{worker} link to {backend:?} closed: {cause:?}"));
                self.call(worker, &mut |engine, now, router, out| {
                    engine.on_peer(
                        now,
                        Endpoint::Backend(backend),
                        PeerChange::Closed(cause),
                        router,
                        out,
                    );
                });
            }
            Event::Resolved { worker, process, id, found } => {
                // Who took over did not ask.
                if process == self.upgrades {
                    let found = found.as_deref().map_err(|why| *why);
                    self.call(worker, &mut |engine, now, router, out| {
                        engine.on_resolved(now, id, found, router, out)
                    });
                }
            }
            Event::Begin(call) => self.begin(call),
            Event::Again { branch, wait } => {
                let Some(asked) = self.asked.get(&branch) else { return };
                // 64 x T1 in all.
                if asked.heard || self.world.us - asked.since > 31_600 * MS {
                    return;
                }
                let (bytes, client) = (asked.bytes.clone(), asked.client);
                let invite = asked.method == "INVITE";
                self.client_sends(client, bytes);
                let wait = if invite { wait * 2 } else { (wait * 2).min(4 * SECOND) };
                self.queue.push(self.world.us + wait, Event::Again { branch, wait });
            }
            Event::Bye(key) => self.bye(&key),
            Event::Cancel(call) => {
                let branch = format!("z9hG4bK-{call}-invite");
                let asked = &self.asked[&branch];
                if asked.finals.is_empty() {
                    let text = std::str::from_utf8(&asked.bytes).expect("text");
                    let text =
                        text.replacen("INVITE", "CANCEL", 1).replacen("1 INVITE", "1 CANCEL", 1);
                    self.client_sends(client_of(call), text.into_bytes());
                }
            }
            Event::Serve { site, life, branch, step } => self.serve(site, life, branch, step),
            Event::Change(change) => {
                if matches!(change, Change::Any) && self.world.us > TRAFFIC + 20 * SECOND {
                    return;
                }
                let (later, dead) = self.world.change(change);
                for (wait, change) in later {
                    self.queue.push(self.world.us + wait, Event::Change(change));
                }
                if dead.is_some() {
                    self.cut_links();
                }
            }
            Event::Tick => {
                for event in self.world.core.tick(self.world.now()) {
                    self.world.say(|| format!("    {event:?}"));
                }
                self.maybe_upgrade();
                self.queue.push(self.world.us + 100 * MS, Event::Tick);
            }
        }
    }

    fn cut_links(&mut self) {
        let dead: Vec<(usize, BackendId)> = self
            .links
            .iter()
            .filter(|(_, link)| {
                let site = &self.world.sites[link.site];
                !site.alive || site.life != link.life
            })
            .map(|(key, _)| *key)
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();
        for (worker, backend) in dead {
            self.links.remove(&(worker, backend));
            self.closed(worker, backend, CloseCause::Reset);
        }
    }

    fn check(&mut self) {
        self.world.check_sums();
        for (number, worker) in self.workers.iter().enumerate() {
            assert_eq!(worker.engine.in_progress(), 0, "transactions of worker {number} never end");
        }
        let admitted: Vec<(&String, &Asked)> =
            self.asked.iter().filter(|(_, asked)| asked.admitted).collect();
        let noted: u64 = self.world.ended.values().sum();
        assert_eq!(noted, admitted.len() as u64, "each request is counted once");
        let mut unanswered = 0;
        for (branch, asked) in &admitted {
            if asked.method == "INVITE" {
                assert!(!asked.finals.is_empty(), "{branch} was never answered");
            } else {
                unanswered += u64::from(asked.finals.is_empty());
            }
        }
        // RFC 4320: who did not get an answer in time to anything but an INVITE gets none from us.
        let expired = self.world.ended.get(&RequestOutcome::Expired).copied().unwrap_or(0);
        assert!(unanswered <= expired, "{unanswered} unanswered, {expired} expired");
    }
}

type Handed = (Endpoint, Transport, SocketAddr, SocketAddr, Instant, Vec<u8>);
