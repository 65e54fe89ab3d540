//! One SIP engine with the real core, step by step: what it sends for what it gets.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use strowger::routing::{
    BackendSpec, Balance, Core, CoreRouter, CoreSettings, Grant, InstanceState, SnapshotSpec,
};
use strowger_contract::{
    ClassId, CloseCause, Command, Context, Endpoint, Engine, Keyer, LocalSocket, Message, Note,
    Outbox, PeerChange, Protocol, Scope, TokenKeys, Transport, WorkerId,
};
use strowger_sip::{Sip, SipEngine, SipMatch, SipOptions};

const EDGE: &str = "10.9.9.9:5060";
pub(crate) const CLIENT: &str = "198.51.100.7:5070";

pub(crate) struct Bench {
    pub(crate) core: Arc<Core>,
    router: CoreRouter,
    pub(crate) engine: SipEngine,
    scope: Scope<SipMatch>,
    started: u32,
    /// How many workers there are from the next reload on; this is the first.
    pub(crate) workers: u8,
    out: Outbox,
    pub(crate) start: Instant,
    pub(crate) at: Duration,
    /// What was sent, and noted, since it was last looked at.
    sent: Vec<(Endpoint, String)>,
    /// The class of what was sent last.
    pub(crate) class: ClassId,
    pub(crate) notes: Vec<Note>,
    /// What was handed over, to whom.
    pub(crate) handed: Vec<(WorkerId, String)>,
}

pub(crate) fn backend(number: u8, capacity: Option<u32>) -> BackendSpec {
    BackendSpec {
        id: format!("i{number}"),
        generation: 0,
        transport: Transport::Udp,
        address: SocketAddr::from(([10, 0, 0, number], 5060)),
        weight: 100,
        priority: 0,
        capacity,
        identity: None,
        state: InstanceState::Ready,
    }
}

impl Bench {
    pub(crate) fn new(options: Value, key: &str, backends: Vec<BackendSpec>) -> Self {
        Self::started(1, options, key, backends)
    }

    /// The process's start of that number.
    pub(crate) fn started(
        started: u32,
        options: Value,
        key: &str,
        backends: Vec<BackendSpec>,
    ) -> Self {
        let start = Instant::now();
        let core = Core::new(
            CoreSettings {
                token_keys: TokenKeys::new(vec![[3; 16]]),
                keyer: Keyer::new([4; 16]),
                seed: 1,
                sessions_max: 1 << 12,
                bindings_max: 0,
                workers: 1,
                advise: strowger::routing::no_advice,
            },
            start,
        );
        let pool = crate::world::pool_spec("pool", Balance::Hash, key, backends);
        core.apply(start, SnapshotSpec { pools: vec![pool], ..SnapshotSpec::default() });
        let socket = |transport| LocalSocket {
            transport,
            address: EDGE.parse().expect("an address"),
            advertise: None,
            mode: None,
        };
        let scope = Scope::<SipMatch> {
            listener: "bench".into(),
            node: "edge".into(),
            realm: String::new(),
            sockets: vec![socket(Transport::Udp), socket(Transport::Tcp)],
            routes: Vec::new(),
            pool: Some(core.pool_names().id("pool")),
            classify: Vec::new(),
        };
        let options: SipOptions = serde_json::from_value(options).expect("options");
        assert_eq!(Sip::check(&scope, &options), [], "the options are good");
        let engine = Sip::engine(&Context {
            worker: WorkerId(0),
            workers: 1,
            seed: 7,
            started,
            scope: &scope,
            options: &options,
        });
        let mut router = core.router(WorkerId(0));
        router.refresh();
        Self {
            core,
            router,
            engine,
            scope,
            started,
            workers: 1,
            out: Outbox::new(),
            start,
            at: Duration::ZERO,
            sent: Vec::new(),
            class: ClassId::CONTROL,
            notes: Vec::new(),
            handed: Vec::new(),
        }
    }

    /// A reload gives the listener other options.
    pub(crate) fn reload(&mut self, options: Value) {
        let options: SipOptions = serde_json::from_value(options).expect("options");
        let context = Context {
            worker: WorkerId(0),
            workers: self.workers,
            seed: 7,
            started: self.started,
            scope: &self.scope,
            options: &options,
        };
        Sip::reconfigure(&mut self.engine, &context);
    }

    /// What the engine wants, and what became of requests that wait.
    fn collect(&mut self) {
        let (mut grants, now) = (Vec::new(), self.start + self.at);
        loop {
            self.take();
            self.router.grants(now, &mut grants);
            if grants.is_empty() {
                return;
            }
            for grant in grants.drain(..) {
                let (engine, router, out) = (&mut self.engine, &mut self.router, &mut self.out);
                match grant {
                    Grant::Go(ticket, route) => engine.on_granted(now, ticket, route, router, out),
                    Grant::Refuse(ticket, why) => engine.on_refused(now, ticket, why, router, out),
                }
            }
        }
    }

    fn take(&mut self) {
        for command in self.out.commands() {
            if let Command::Send(frame) = command {
                let text = String::from_utf8_lossy(self.out.bytes(&frame.bytes)).into_owned();
                self.sent.push((frame.to, text));
                self.class = frame.class;
            } else if let Command::HandOver { to, bytes, .. } = command {
                let text = String::from_utf8_lossy(self.out.bytes(bytes)).into_owned();
                self.handed.push((*to, text));
            }
        }
        self.notes.extend(self.out.notes().iter().cloned());
        self.out.clear();
    }

    pub(crate) fn gets(&mut self, from: SocketAddr, text: &str) -> Vec<(Endpoint, String)> {
        let endpoint = Endpoint::Datagram { socket: 0, remote: from };
        self.gets_over(endpoint, Transport::Udp, from, text)
    }

    pub(crate) fn gets_over(
        &mut self,
        endpoint: Endpoint,
        transport: Transport,
        from: SocketAddr,
        text: &str,
    ) -> Vec<(Endpoint, String)> {
        let message = Message {
            from: endpoint,
            transport,
            remote: from,
            local: EDGE.parse().expect("an address"),
            arrived: self.start + self.at,
            bytes: text.as_bytes(),
        };
        let now = self.start + self.at;
        self.engine.on_message(now, message, &mut self.router, &mut self.out);
        self.collect();
        // The 100 goes out behind the request; for the reader it stands first.
        self.sent.sort_by_key(|(_, text)| !text.starts_with("SIP/2.0 100"));
        std::mem::take(&mut self.sent)
    }

    pub(crate) fn client(&mut self, text: &str) -> Vec<(Endpoint, String)> {
        self.gets(CLIENT.parse().expect("an address"), text)
    }

    /// The instance that got `request` answers it.
    pub(crate) fn answers(
        &mut self,
        request: &(Endpoint, String),
        line: &str,
        more: &str,
    ) -> Vec<(Endpoint, String)> {
        let answer = answer(&request.1, line, more);
        self.gets(remote(request.0), &answer)
    }

    /// The wheel is looked at now, however late that is.
    pub(crate) fn wakes(&mut self) -> Vec<(Endpoint, String)> {
        let now = self.start + self.at;
        self.engine.on_timeout(now, &mut self.router, &mut self.out);
        self.collect();
        std::mem::take(&mut self.sent)
    }

    pub(crate) fn passes(&mut self, time: Duration) -> Vec<(Endpoint, String)> {
        let until = self.at + time;
        while let Some(next) =
            self.engine.next_timeout().into_iter().chain(self.router.next_timeout()).min()
        {
            let next = next.saturating_duration_since(self.start);
            if next > until {
                break;
            }
            self.at = self.at.max(next);
            let now = self.start + self.at;
            self.engine.on_timeout(now, &mut self.router, &mut self.out);
            self.collect();
        }
        self.at = until;
        std::mem::take(&mut self.sent)
    }

    pub(crate) fn closed(&mut self, peer: Endpoint, cause: CloseCause) -> Vec<(Endpoint, String)> {
        let now = self.start + self.at;
        self.engine.on_peer(now, peer, PeerChange::Closed(cause), &mut self.router, &mut self.out);
        self.collect();
        std::mem::take(&mut self.sent)
    }

    pub(crate) fn held(&self) -> u64 {
        self.view(|backend| backend.held)
    }

    fn view(&self, what: impl Fn(&strowger::routing::PoolBackendView) -> u64) -> u64 {
        let pools = self.core.pools_view(self.start + self.at);
        pools[0].backends.iter().map(what).sum()
    }

    /// Nothing is left over.
    pub(crate) fn rests(&mut self) {
        self.passes(Duration::from_secs(300));
        assert_eq!(self.engine.in_progress(), 0);
        assert_eq!(self.view(|backend| u64::from(backend.in_flight)), 0);
    }
}

pub(crate) fn remote(to: Endpoint) -> SocketAddr {
    match to {
        Endpoint::Datagram { remote, .. } => remote,
        Endpoint::Remote { address, .. } => address,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn header<'a>(text: &'a str, name: &str) -> &'a str {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).unwrap_or_default()
}

pub(crate) fn answer(request: &str, line: &str, more: &str) -> String {
    let mut text = format!("SIP/2.0 {line}\r\n");
    for name in ["Via", "Record-Route", "From", "Call-ID", "CSeq"] {
        for kept in request.lines().filter(|kept| kept.starts_with(&format!("{name}: "))) {
            text += &format!("{kept}\r\n");
        }
    }
    let tag = if header(request, "To").contains("tag=") { "" } else { ";tag=callee" };
    format!("{text}To: {}{tag}\r\n{more}Content-Length: 0\r\n\r\n", header(request, "To"))
}

pub(crate) fn request(method: &str, call: &str, more: &str) -> String {
    format!(
        "{method} sip:bob@example.net SIP/2.0\r\nVia: SIP/2.0/UDP {CLIENT};branch=z9hG4bK-{call}-{method};rport\r\n\
         Max-Forwards: 70\r\nFrom: <sip:alice@example.net>;tag=a\r\nTo: <sip:bob@example.net>\r\n\
         Call-ID: {call}\r\nCSeq: 1 {method}\r\nContact: <sip:alice@{CLIENT}>\r\n{more}Content-Length: 0\r\n\r\n"
    )
}

pub(crate) fn starts(sent: &[(Endpoint, String)]) -> Vec<String> {
    let line = |(_, text): &(Endpoint, String)| {
        let first = text.lines().next().unwrap_or_default();
        first
            .split(' ')
            .take(if first.starts_with("SIP") { 2 } else { 1 })
            .last()
            .unwrap_or("")
            .to_owned()
    };
    sent.iter().map(line).collect()
}

pub(crate) fn three() -> Vec<BackendSpec> {
    (1..=3).map(|number| backend(number, None)).collect()
}
