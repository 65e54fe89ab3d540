//! SIP: calls and messages over UDP, instances on UDP and TCP, two workers.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::time::Instant;

use strowger::routing::CoreRouter;
use strowger_contract::handover::{Clock, by_clock};
use strowger_contract::{
    BackendId, CloseCause, Command, Context, Endpoint, Engine, LocalSocket, Message, Outbox,
    PeerChange, Protocol, RequestOutcome, Scope, Transport, WorkerId,
};
use strowger_sip::{Sip, SipEngine, SipMatch, SipOptions};

use crate::world::{Change, Dice, MS, Queue, SECOND, World, dice_for};

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
    let options = SipOptions::default();
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
                Command::Close(..)
                | Command::HoldOff(..)
                | Command::Proven(_)
                | Command::Resolve { .. }
                | Command::OpenOutward(..)
                | Command::Splice(..) => {
                    panic!("{command:?}")
                }
            }
        }
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

    fn client_sends(&mut self, client: SocketAddr, bytes: Vec<u8>) {
        let worker = usize::from(client.port() ^ call_number(client)) % WORKERS;
        if let Some(at) = self.flight(client) {
            let from = Endpoint::Datagram { socket: 0, remote: client };
            self.queue.push(at, Event::ToEdge { worker, from, remote: client, bytes, life: None });
        }
    }

    fn ask(&mut self, method: &'static str, branch: String, client: SocketAddr, bytes: Vec<u8>) {
        let asked = Asked {
            method,
            bytes: bytes.clone(),
            client,
            since: self.world.us,
            heard: false,
            admitted: false,
            finals: BTreeSet::new(),
        };
        self.asked.insert(branch.clone(), asked);
        self.client_sends(client, bytes);
        self.queue.push(self.world.us + SECOND / 2, Event::Again { branch, wait: SECOND / 2 });
    }

    fn begin(&mut self, call: u64) {
        let method = if self.world.dice.percent(70) { "INVITE" } else { "MESSAGE" };
        let (client, branch) =
            (client_of(call), format!("z9hG4bK-{call}-{}", method.to_lowercase()));
        let text = format!(
            "{method} sip:bob@example.net SIP/2.0\r\nVia: SIP/2.0/UDP {client};branch={branch};rport\r\n\
             Max-Forwards: 70\r\nFrom: <sip:alice@example.net>;tag=f{call}\r\nTo: <sip:bob@example.net>\r\n\
             Call-ID: call-{call}\r\nCSeq: 1 {method}\r\nContact: <sip:alice@{client}>\r\nContent-Length: 0\r\n\r\n"
        );
        self.ask(method, branch, client, text.into_bytes());
        if method == "INVITE" && self.world.dice.percent(40) {
            let at = self.world.us + self.world.dice.between(100 * MS, 25 * SECOND);
            self.queue.push(at, Event::Cancel(call));
        }
    }

    fn bye(&mut self, key: &str) {
        let Some(dialog) = self.dialogs.get(key) else { return };
        let (call, client) = (dialog.call, client_of(dialog.call));
        let branch = format!("z9hG4bK-{call}-bye-{}", parameter(&dialog.to, "tag"));
        let text = Self::in_dialog(dialog, "BYE", &branch, 2);
        self.ask("BYE", branch, client, text);
    }

    fn in_dialog(dialog: &Dialog, method: &str, branch: &str, number: u32) -> Vec<u8> {
        let (call, client) = (dialog.call, client_of(dialog.call));
        let routes: String =
            dialog.routes.iter().map(|route| format!("Route: {route}\r\n")).collect();
        format!(
            "{method} {} SIP/2.0\r\nVia: SIP/2.0/UDP {client};branch={branch};rport\r\n{routes}\
             Max-Forwards: 70\r\nFrom: <sip:alice@example.net>;tag=f{call}\r\nTo: {}\r\n\
             Call-ID: call-{call}\r\nCSeq: {number} {method}\r\nContent-Length: 0\r\n\r\n",
            dialog.contact, dialog.to
        )
        .into_bytes()
    }

    fn at_client(&mut self, text: &str) {
        let (code, branch) = (code_of(text), top_branch(text));
        if line(text, "CSeq").ends_with("CANCEL") {
            return;
        }
        let asked = self.asked.get_mut(&branch).expect("it was asked");
        asked.heard = asked.heard || asked.method == "INVITE" || code >= 200;
        let (invite, client) = (asked.method == "INVITE", asked.client);
        if !invite || code < 200 {
            return;
        }
        if code >= 300 {
            let request = std::str::from_utf8(&asked.bytes).expect("text");
            let ack = request
                .replacen("INVITE", "ACK", 1)
                .replacen("1 INVITE", "1 ACK", 1)
                .replacen("To: <sip:bob@example.net>", &format!("To: {}", line(text, "To")), 1);
            return self.client_sends(client, ack.into_bytes());
        }
        let (contact, call) = (angled(line(text, "Contact")).to_owned(), call_of(text));
        let key = format!("{call} {}", parameter(line(text, "To"), "tag"));
        let first = !self.dialogs.values().any(|dialog| dialog.call == call);
        let dialog = self.dialogs.entry(key.clone()).or_insert_with(|| {
            let mut routes: Vec<String> = lines(text, "Record-Route")
                .flat_map(|value| value.split(','))
                .map(|route| route.trim().to_owned())
                .collect();
            routes.reverse();
            Dialog { call, contact, to: line(text, "To").to_owned(), routes, closing: false }
        });
        let ack = Self::in_dialog(dialog, "ACK", &format!("z9hG4bK-{call}-ack"), 1);
        let begins = !std::mem::replace(&mut dialog.closing, true);
        self.client_sends(client, ack);
        if begins {
            // A second dialog is closed at once.
            let wait = if first { self.world.dice.between(SECOND, 25 * SECOND) } else { 10 * MS };
            self.queue.push(self.world.us + wait, Event::Bye(key));
        }
    }

    fn at_site(&mut self, site: usize, via: Endpoint, worker: usize, bytes: &[u8]) {
        let text = std::str::from_utf8(bytes).expect("text");
        let (method, branch, life) = (
            text.split(' ').next().unwrap_or_default(),
            top_branch(text),
            self.world.sites[site].life,
        );
        let key = (site, life, branch.clone());
        let call = line(text, "Call-ID").to_owned();
        let back = (worker, via);
        match method {
            "ACK" => {
                for ((at, age, _), served) in &mut self.served {
                    let same = served.method == "INVITE" && *at == site && *age == life;
                    let ours = std::str::from_utf8(&served.bytes)
                        .is_ok_and(|text| line(text, "Call-ID") == call);
                    if same
                        && ours
                        && (served.code < 300
                            || top_branch(std::str::from_utf8(&served.bytes).unwrap_or_default())
                                == branch)
                    {
                        served.acknowledged = true;
                    }
                }
                return;
            }
            "CANCEL" => {
                let found = self.served.get(&key).map(|served| served.code);
                let known = found.is_some();
                self.respond(site, back, text, if known { 200 } else { 481 }, "");
                if found == Some(0) || found == Some(180) {
                    self.serve(site, life, branch, Step::Answer(487));
                }
                return;
            }
            _ => {}
        }
        if let Some(served) = self.served.get(&key) {
            let (code, ignored) = (served.code, served.ignored);
            if code > 0 && !ignored {
                self.respond_again(&key);
            }
            return;
        }
        let mut dice = dice_for(self.world.seed, branch.as_bytes(), site as u64);
        let served = Served {
            bytes: bytes.to_vec(),
            method: method.to_owned(),
            back,
            code: 0,
            acknowledged: false,
            ignored: false,
        };
        self.served.insert(key.clone(), served);
        let steps: Vec<(u64, Step)> = match method {
            "INVITE" => invite_plan(&mut dice),
            "BYE" => {
                let known = self.alive_dialogs.remove(&(site, life, call));
                let code = if known { 200 } else { 481 };
                if dice.percent(3) {
                    Vec::new()
                } else {
                    vec![(dice.below(100 * MS), Step::Answer(code))]
                }
            }
            _ => match dice.below(100) {
                0..4 => Vec::new(),
                4..9 => vec![(0, Step::Answer(503))],
                9..14 => vec![(dice.between(2 * SECOND, 5 * SECOND), Step::Answer(200))],
                _ => vec![(dice.below(200 * MS), Step::Answer(200))],
            },
        };
        if steps.is_empty()
            && let Some(served) = self.served.get_mut(&key)
        {
            served.ignored = true;
        }
        for (wait, step) in steps {
            self.queue.push(
                self.world.us + wait,
                Event::Serve { site, life, branch: branch.clone(), step },
            );
        }
    }

    fn serve(&mut self, site: usize, life: u64, branch: String, step: Step) {
        if !self.world.sites[site].alive || self.world.sites[site].life != life {
            return;
        }
        let key = (site, life, branch.clone());
        let Some(served) = self.served.get_mut(&key) else { return };
        match step {
            Step::Ring if served.code == 0 => served.code = 180,
            Step::Answer(code) if served.code < 200 => {
                served.code = code;
                if served.method == "INVITE" {
                    if code < 300 {
                        let call =
                            line(std::str::from_utf8(&served.bytes).expect("text"), "Call-ID")
                                .to_owned();
                        self.alive_dialogs.insert((site, life, call));
                    }
                    // 17.2.1: a refusal is repeated over UDP only, a 2xx over anything (13.3.1.4).
                    if code < 300 || matches!(served.back.1, Endpoint::Datagram { .. }) {
                        let (wait, step) = (SECOND / 2, Step::Repeat(SECOND / 2));
                        let event = Event::Serve { site, life, branch, step };
                        self.queue.push(self.world.us + wait, event);
                    }
                }
            }
            Step::Repeat(wait) if !served.acknowledged => {
                if wait > 20 * SECOND {
                    let text = String::from_utf8_lossy(&served.bytes).into_owned();
                    assert!(
                        served.code < 300,
                        "a refusal was never acknowledged: {} to {text}",
                        served.code
                    );
                    return;
                }
                let next = wait * 2;
                self.queue.push(
                    self.world.us + next.min(4 * SECOND),
                    Event::Serve { site, life, branch, step: Step::Repeat(next) },
                );
            }
            _ => return,
        }
        self.respond_again(&key);
    }

    fn respond_again(&mut self, key: &(usize, u64, String)) {
        let served = &self.served[key];
        let (bytes, back, code) = (served.bytes.clone(), served.back, served.code);
        let tag =
            format!(";tag=s{}-{}-{:x}", key.0, key.1, dice_for(1, key.2.as_bytes(), 0).roll());
        self.respond(key.0, back, std::str::from_utf8(&bytes).expect("text"), code, &tag);
    }

    fn respond(
        &mut self,
        site: usize,
        back: (usize, Endpoint),
        request: &str,
        code: u16,
        tag: &str,
    ) {
        let known = self.world.sites[site].clone();
        let mut text = format!("SIP/2.0 {code} Whatever\r\n");
        for name in ["Via", "Record-Route"] {
            for value in lines(request, name) {
                text += &format!("{name}: {value}\r\n");
            }
        }
        let to = line(request, "To");
        let tag = if to.contains("tag=") { "" } else { tag };
        text += &format!(
            "From: {}\r\nTo: {to}{tag}\r\nCall-ID: {}\r\nCSeq: {}\r\nContact: <sip:at-{}-{}-{}@{}>\r\nContent-Length: 0\r\n\r\n",
            line(request, "From"),
            line(request, "Call-ID"),
            line(request, "CSeq"),
            known.id,
            known.generation,
            known.life,
            known.address,
        );
        let bytes = text.into_bytes();
        match back.1 {
            Endpoint::Backend(backend) => {
                let now = self.world.us;
                let Some(link) = self.links.get_mut(&(back.0, backend)) else { return };
                link.last = link
                    .last
                    .max(now + dice_for(self.world.seed, b"back", now).between(MS, 20 * MS));
                let event = Event::ToEdge {
                    worker: back.0,
                    from: back.1,
                    remote: known.address,
                    bytes,
                    life: Some((site, link.life)),
                };
                self.queue.push(link.last, event);
            }
            _ => {
                let worker = site % WORKERS;
                if let Some(at) = self.flight(known.address) {
                    let from = Endpoint::Datagram { socket: 0, remote: known.address };
                    self.queue.push(
                        at,
                        Event::ToEdge { worker, from, remote: known.address, bytes, life: None },
                    );
                }
            }
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

/// How an instance treats an INVITE.
fn invite_plan(dice: &mut Dice) -> Vec<(u64, Step)> {
    let ring = dice.between(10 * MS, 600 * MS);
    let pick_up = ring + dice.between(200 * MS, 8 * SECOND);
    match dice.below(100) {
        // Deaf.
        0..6 => Vec::new(),
        6..16 => vec![(dice.below(50 * MS), Step::Answer(503))],
        16..22 => vec![(ring, Step::Ring), (pick_up, Step::Answer(486))],
        22..26 => vec![(ring, Step::Ring), (pick_up, Step::Answer(503))],
        // It comes to itself only after it was given up.
        26..32 => {
            let late = dice.between(2 * SECOND, 5 * SECOND);
            vec![(late, Step::Ring), (late + pick_up, Step::Answer(200))]
        }
        32..36 => vec![(dice.between(2 * SECOND, 6 * SECOND), Step::Answer(200))],
        36..40 => vec![(dice.between(2 * SECOND, 6 * SECOND), Step::Answer(486))],
        // Rings for ever.
        40..44 => vec![(ring, Step::Ring)],
        44..60 => vec![(pick_up / 4, Step::Answer(200))],
        _ => vec![(ring, Step::Ring), (pick_up, Step::Answer(200))],
    }
}
