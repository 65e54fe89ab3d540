//! The real engines with the real core and no sockets: what a message costs from its bytes to the
//! bytes that go out. Shared by the micro benches, the instruction counts and the allocation count.
#![allow(dead_code, missing_docs, reason = "each user takes what it needs")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use strowger::control::config::{self, Source};
use strowger::protocols::Protocols;
use strowger::routing::{Core, CoreRouter, CoreSettings, SnapshotSpec};
use strowger_contract::{
    BackendId, Command, Context, Endpoint, Engine, FlowId, Keyer, LocalSocket, Message, Outbox,
    PeerChange, PoolId, Protocol, Router, Scope, TokenKeys, Transport, WorkerId,
};
use strowger_diameter::avp::{FLAG_REQUEST, Header, code};
use strowger_diameter::build::Builder;
use strowger_diameter::{Diameter, DiameterEngine, DiameterMatch, DiameterOptions};
use strowger_sip::{Mode, Sip, SipEngine, SipMatch, SipOptions};

pub(crate) const EDGE: &str = "127.0.0.1:5060";
const CLIENT: &str = "127.0.0.1:7000";

/// A core with one pool of so many backends.
pub(crate) fn core(
    now: Instant,
    backends: usize,
    address: &str,
    more: &str,
) -> (Arc<Core>, PoolId) {
    let core = bare_core(now, 1 << 20);
    let text = pool_of(backends, address, more);
    let _plan = core.apply(now, read(&core, text));
    let pool = core.pool_names().id("pool");
    (core, pool)
}

/// The same over UDP, with room for so many sessions.
pub(crate) fn core_with_room(
    now: Instant,
    backends: usize,
    more: &str,
    sessions_max: usize,
) -> (Arc<Core>, PoolId) {
    let core = bare_core(now, sessions_max);
    let _plan = core.apply(now, read(&core, pool_of(backends, "udp://127.0.0.", more)));
    let pool = core.pool_names().id("pool");
    (core, pool)
}

/// A wanted state for such a core; each `turn` gives all backends another weight.
pub(crate) fn spec(core: &Core, backends: usize, turn: usize) -> SnapshotSpec {
    let weight = format!("weight: {}, address", turn % 9 + 2);
    read(core, pool_of(backends, "udp://127.0.0.", "").replace("address", &weight))
}

fn read(core: &Core, text: String) -> SnapshotSpec {
    let protocols = Protocols::standard();
    let source = Source { name: "bench".into(), text };
    let loaded = config::load(&[source], &protocols.configurers(), core.pool_names())
        .unwrap_or_else(|errors| panic!("{errors}"));
    loaded.spec
}

fn pool_of(backends: usize, address: &str, more: &str) -> String {
    let list: String = (0..backends)
        .map(|index| {
            let port = 10_000 + index % 50_000;
            format!("      - {{ id: b{index}, address: {address}{}:{port} }}\n", index / 50_000 + 1)
        })
        .collect();
    format!("version: 1\npools:\n  pool:\n    slow_start: 0s\n{more}    backends:\n{list}")
}

fn bare_core(now: Instant, sessions_max: usize) -> Arc<Core> {
    Core::new(
        CoreSettings {
            token_keys: TokenKeys::new(vec![[7; 16]]),
            keyer: Keyer::new([3; 16]),
            seed: 1,
            sessions_max,
            bindings_max: 1 << 16,
            workers: 1,
            advise: strowger::runtime::prefer_large_pages,
        },
        now,
    )
}

fn context_scope<M>(pool: PoolId, transport: Transport) -> Scope<M> {
    Scope {
        listener: "bench".into(),
        node: "edge".into(),
        realm: "example.net".into(),
        sockets: vec![LocalSocket {
            transport,
            address: EDGE.parse().expect("an address"),
            advertise: None,
            mode: None,
        }],
        routes: Vec::new(),
        pool: Some(pool),
        classify: Vec::new(),
    }
}

/// SIP over UDP: INVITE, 180, 200, ACK, BYE, 200 of one call after the other.
pub(crate) struct SipRig {
    engine: SipEngine,
    core: Arc<Core>,
    router: CoreRouter,
    pub(crate) out: Outbox,
    now: Instant,
    call: u32,
    bytes: Vec<u8>,
    answer: Vec<u8>,
    invite: Vec<u8>,
    id_at: Vec<usize>,
    messages: u64,
}

/// An INVITE of about 1.3 kB, as handsets send them.
pub(crate) fn invite() -> Vec<u8> {
    let body = "v=0\r\no=- 1815849 0 IN IP4 192.0.2.10\r\ns=-\r\nc=IN IP4 192.0.2.10\r\nt=0 0\r\n\
        m=audio 49170 RTP/AVP 97 98 0 8 101\r\na=rtpmap:97 AMR-WB/16000\r\na=fmtp:97 mode-set=0,1,2\r\n\
        a=rtpmap:98 AMR/8000\r\na=fmtp:98 mode-set=0,2,5,7\r\na=rtpmap:0 PCMU/8000\r\n\
        a=rtpmap:8 PCMA/8000\r\na=rtpmap:101 telephone-event/8000\r\na=ptime:20\r\na=sendrecv\r\n";
    format!(
        "INVITE sip:+15550100@ims.example.net;user=phone SIP/2.0\r\n\
         Via: SIP/2.0/UDP {CLIENT};branch=z9hG4bKcall00000000;rport\r\n\
         Max-Forwards: 70\r\n\
         From: \"Alice\" <sip:+15550199@ims.example.net>;tag=from00000000\r\n\
         To: <sip:+15550100@ims.example.net;user=phone>\r\n\
         Call-ID: call00000000@192.0.2.10\r\n\
         CSeq: 1 INVITE\r\n\
         Contact: <sip:+15550199@{CLIENT};ob>;+g.3gpp.icsi-ref=\"urn%3Aurn-7%3A3gpp-service.ims.icsi.mmtel\"\r\n\
         Allow: INVITE, ACK, CANCEL, BYE, PRACK, UPDATE, REFER, NOTIFY, INFO, OPTIONS, MESSAGE\r\n\
         Supported: 100rel, timer, replaces, path, gruu, precondition\r\n\
         Session-Expires: 1800;refresher=uac\r\n\
         Min-SE: 90\r\n\
         P-Preferred-Identity: <sip:+15550199@ims.example.net>\r\n\
         P-Access-Network-Info: 3GPP-E-UTRAN-FDD;utran-cell-id-3gpp=2620112345678\r\n\
         P-Early-Media: supported\r\n\
         Accept-Contact: *;+g.3gpp.icsi-ref=\"urn%3Aurn-7%3A3gpp-service.ims.icsi.mmtel\"\r\n\
         User-Agent: Handset/12.3 (model 9)\r\n\
         Content-Type: application/sdp\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

fn places(bytes: &[u8], marker: &[u8]) -> Vec<usize> {
    bytes
        .windows(marker.len())
        .enumerate()
        .filter(|(_, part)| *part == marker)
        .map(|(at, _)| at)
        .collect()
}

impl SipRig {
    pub(crate) fn new(now: Instant, mode: Mode, backends: usize) -> Self {
        Self::with(now, SipOptions { mode, ..SipOptions::default() }, backends)
    }

    fn with(now: Instant, options: SipOptions, backends: usize) -> Self {
        let (core, pool) = core(now, backends, "udp://127.0.0.", "    balance: hash\n");
        let scope = context_scope::<SipMatch>(pool, Transport::Udp);
        let engine = Sip::engine(&Context {
            worker: WorkerId(0),
            workers: 1,
            seed: 1,
            started: 1,
            scope: &scope,
            options: &options,
        });
        let invite = invite();
        let id_at = places(&invite, b"00000000");
        Self {
            engine,
            router: core.router(WorkerId(0)),
            core,
            out: Outbox::new(),
            now,
            call: 0,
            bytes: Vec::with_capacity(4_096),
            answer: Vec::with_capacity(4_096),
            invite,
            id_at,
            messages: 0,
        }
    }

    fn give(&mut self, remote: SocketAddr) {
        let message = Message {
            from: Endpoint::Datagram { socket: 0, remote },
            transport: Transport::Udp,
            remote,
            local: EDGE.parse().expect("an address"),
            arrived: self.now,
            bytes: &self.bytes,
        };
        self.messages += 1;
        self.engine.on_message(self.now, message, &mut self.router, &mut self.out);
    }

    /// One whose only backend has one slot, which is taken, and whose queue for calls is full: the
    /// next INVITE is refused.
    #[allow(dead_code, reason = "the micro benches use it, the allocation count does not")]
    pub(crate) fn overloaded(now: Instant) -> Self {
        let options = SipOptions { max_transactions: 10_000, ..SipOptions::default() };
        let mut rig = Self::with(now, options, 1);
        let snapshot = Arc::clone(rig.router.snapshot());
        let backends: Vec<BackendId> =
            snapshot.pools().flat_map(|pool| pool.backends().map(|one| one.id)).collect();
        for backend in backends {
            rig.core.set_reported_slots(backend, Some(1));
        }
        // One takes the slot, 4,000 wait (`queue_max` of setup), and refusals fill the room that is
        // kept to remember them in.
        for _ in 0..6_000 {
            rig.invite();
        }
        rig
    }

    /// Makes the INVITE longer, by a header.
    pub(crate) fn pad(&mut self, bytes: usize) {
        let header = format!("X-Padding: {}\r\n", "x".repeat(bytes));
        let at = places(&self.invite, b"Content-Type")[0];
        self.invite.splice(at..at, header.into_bytes());
        self.id_at = places(&self.invite, b"00000000");
    }

    fn next_invite(&mut self) {
        self.call += 1;
        self.bytes.clear();
        self.bytes.extend_from_slice(&self.invite);
        let digits = std::array::from_fn::<u8, 8, _>(|place| {
            b"0123456789abcdef"[(self.call >> (4 * (7 - place)) & 15) as usize]
        });
        for &at in &self.id_at {
            self.bytes[at..at + 8].copy_from_slice(&digits);
        }
    }

    /// Sends an INVITE; what came back.
    #[allow(dead_code, reason = "the micro benches use it, the allocation count does not")]
    pub(crate) fn invite_refused(&mut self) -> Vec<u8> {
        self.invite();
        self.out.arena().to_vec()
    }

    /// Relays an INVITE; how many bytes went to a backend.
    pub(crate) fn invite(&mut self) -> usize {
        self.next_invite();
        self.out.clear();
        self.give(CLIENT.parse().expect("an address"));
        self.out.arena().len()
    }

    /// What went out last to somebody else than the client.
    fn sent_on(&mut self) -> SocketAddr {
        let client: SocketAddr = CLIENT.parse().expect("an address");
        for command in self.out.commands() {
            if let Command::Send(frame) = command
                && let Endpoint::Datagram { remote, .. } = frame.to
                && remote != client
            {
                self.answer.clear();
                self.answer.extend_from_slice(self.out.bytes(&frame.bytes));
                return remote;
            }
        }
        panic!("nothing went on");
    }

    /// Makes an answer to what went on last.
    fn answer_with(&mut self, status: &[u8]) {
        self.bytes.clear();
        self.bytes.extend_from_slice(status);
        for line in self.answer.split_inclusive(|&byte| byte == b'\n') {
            let wanted: [&[u8]; 6] =
                [b"Via:", b"From:", b"To:", b"Call-ID:", b"CSeq:", b"Record-Route:"];
            if wanted.iter().any(|name| line.starts_with(name)) {
                if line.starts_with(b"To:") && !line.windows(5).any(|part| part == b";tag=") {
                    self.bytes.extend_from_slice(line.trim_ascii_end());
                    self.bytes.extend_from_slice(b";tag=callee\r\n");
                } else {
                    self.bytes.extend_from_slice(line);
                }
            }
            if line == b"\r\n" {
                break;
            }
        }
        self.bytes
            .extend_from_slice(b"Contact: <sip:b@127.0.0.1:10000>\r\nContent-Length: 0\r\n\r\n");
    }

    fn in_dialog(&mut self, method: &str, number: u8, ok: &[u8]) {
        // What the client got: its own Via, and the edge's Record-Route to follow.
        let line = |name: &[u8]| {
            ok.split_inclusive(|&byte| byte == b'\n').find(|line| line.starts_with(name))
        };
        self.bytes.clear();
        self.bytes.extend_from_slice(method.as_bytes());
        self.bytes.extend_from_slice(b" sip:b@127.0.0.1:10000 SIP/2.0\r\n");
        self.bytes.extend_from_slice(b"Via: SIP/2.0/UDP 127.0.0.1:7000;branch=z9hG4bK");
        self.bytes.push(number);
        let branch = line(b"Call-ID:").unwrap_or_default();
        self.bytes.extend_from_slice(&branch[9..21]);
        self.bytes.extend_from_slice(b";rport\r\nMax-Forwards: 70\r\n");
        if let Some(record) = line(b"Record-Route:") {
            self.bytes.extend_from_slice(&record[b"Record-".len()..]);
        }
        for name in [b"From:".as_slice(), b"To:", b"Call-ID:"] {
            self.bytes.extend_from_slice(line(name).unwrap_or_default());
        }
        self.bytes.extend_from_slice(b"CSeq: ");
        self.bytes.push(number);
        self.bytes.push(b' ');
        self.bytes.extend_from_slice(method.as_bytes());
        self.bytes.extend_from_slice(b"\r\nContent-Length: 0\r\n\r\n");
    }

    /// A whole call; how many messages the engine was given.
    pub(crate) fn call(&mut self, ok: &mut Vec<u8>) -> u64 {
        let before = self.messages;
        let client: SocketAddr = CLIENT.parse().expect("an address");
        self.invite();
        let backend = self.sent_on();
        for status in [b"SIP/2.0 180 Ringing\r\n".as_slice(), b"SIP/2.0 200 OK\r\n"] {
            self.answer_with(status);
            self.out.clear();
            self.give(backend);
        }
        ok.clear();
        ok.extend_from_slice(self.out.arena());
        self.in_dialog("ACK", b'1', ok);
        self.out.clear();
        self.give(client);
        self.in_dialog("BYE", b'2', ok);
        self.out.clear();
        self.give(client);
        let backend = self.sent_on();
        self.answer_with(b"SIP/2.0 200 OK\r\n");
        self.out.clear();
        self.give(backend);
        assert!(!self.out.arena().is_empty(), "the BYE's answer went back");
        self.messages - before
    }

    /// Time goes on, and the engine with it.
    pub(crate) fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(next) = self.engine.next_timeout().filter(|next| *next <= end) {
            self.now = self.now.max(next);
            self.out.clear();
            self.engine.on_timeout(self.now, &mut self.router, &mut self.out);
        }
        self.now = end;
        self.router.refresh();
    }

    pub(crate) fn in_progress(&self) -> usize {
        self.engine.in_progress()
    }
}

/// Diameter: one client, its requests to backends whose links are up, and their answers.
pub(crate) struct DiameterRig {
    engine: DiameterEngine,
    router: CoreRouter,
    core: Arc<Core>,
    pub(crate) out: Outbox,
    now: Instant,
    client: Endpoint,
    number: u32,
    request: Vec<u8>,
    session_at: usize,
    answer: Vec<u8>,
}

const GX: u32 = 16_777_238;

fn capabilities(flags: u8, host: &str, header: Option<&Header>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let (hop, end) = header.map_or((1, 1), |header| (header.hop_by_hop, header.end_to_end));
    let mut builder = Builder::new(&mut bytes, flags, 257, 0, hop, end);
    if header.is_some() {
        builder = builder.number(code::RESULT_CODE, 2_001);
    }
    builder
        .text(code::ORIGIN_HOST, host)
        .text(code::ORIGIN_REALM, "example.net")
        .address(code::HOST_IP_ADDRESS, "127.0.0.1".parse().expect("an address"))
        .number(code::VENDOR_ID, 0)
        .text(code::PRODUCT_NAME, "bench")
        .application(GX)
        .finish();
    bytes
}

impl DiameterRig {
    pub(crate) fn new(now: Instant, backends: usize) -> Self {
        let (core, pool) = core(now, backends, "tcp://127.0.0.", "");
        let scope = context_scope::<DiameterMatch>(pool, Transport::Tcp);
        let options = DiameterOptions {
            origin_host: "edge.example.net".into(),
            ..DiameterOptions::default()
        };
        let engine = Diameter::engine(&Context {
            worker: WorkerId(0),
            workers: 1,
            seed: 1,
            started: 1,
            scope: &scope,
            options: &options,
        });
        let client = Endpoint::Client(FlowId::new(WorkerId(0), 1, 0));
        let mut rig = Self {
            engine,
            router: core.router(WorkerId(0)),
            core: Arc::clone(&core),
            out: Outbox::new(),
            now,
            client,
            number: 0,
            request: Vec::new(),
            session_at: 0,
            answer: Vec::new(),
        };
        rig.router.refresh();
        let snapshot = core.snapshot();
        for backend in snapshot.pools().flat_map(|pool| pool.backends()) {
            rig.introduce(backend.id);
        }
        rig.tell(
            client,
            PeerChange::Opened {
                remote: CLIENT.parse().expect("an address"),
                local: EDGE.parse().expect("an address"),
                transport: Transport::Tcp,
            },
        );
        let cer = capabilities(FLAG_REQUEST, "client.example.net", None);
        rig.give(client, &cer);
        rig.make_request(0);
        rig
    }

    /// One whose only backend has one slot, which is taken, and whose queue is full: the next request
    /// is refused.
    pub(crate) fn overloaded(now: Instant) -> Self {
        let mut rig = Self::new(now, 1);
        let snapshot = Arc::clone(rig.router.snapshot());
        for backend in snapshot.pools().flat_map(|pool| pool.backends()) {
            rig.core.set_reported_slots(backend.id, Some(1));
        }
        // One takes the slot, 4,000 wait (`queue_max` of in-session).
        for _ in 0..4_100 {
            rig.request();
        }
        rig
    }

    /// The Result-Code of the answer in the outbox.
    pub(crate) fn told(&self) -> Option<u32> {
        strowger_diameter::avp::Summary::of(self.out.arena()).result_code
    }

    fn introduce(&mut self, backend: BackendId) {
        let peer = Endpoint::Backend(backend);
        self.tell(
            peer,
            PeerChange::Opened {
                remote: "127.0.0.1:10000".parse().expect("an address"),
                local: EDGE.parse().expect("an address"),
                transport: Transport::Tcp,
            },
        );
        let cer = self.out.arena().to_vec();
        let header = Header::read(&cer).expect("a CER");
        let cea = capabilities(0, &format!("b{}.example.net", backend.0), Some(&header));
        self.give(peer, &cea);
    }

    fn tell(&mut self, peer: Endpoint, change: PeerChange) {
        self.out.clear();
        self.engine.on_peer(self.now, peer, change, &mut self.router, &mut self.out);
    }

    fn give(&mut self, from: Endpoint, bytes: &[u8]) {
        self.out.clear();
        let message = Message {
            from,
            transport: Transport::Tcp,
            remote: CLIENT.parse().expect("an address"),
            local: EDGE.parse().expect("an address"),
            arrived: self.now,
            bytes,
        };
        self.engine.on_message(self.now, message, &mut self.router, &mut self.out);
    }

    /// Makes the request longer, by an AVP.
    pub(crate) fn pad(&mut self, bytes: usize) {
        self.make_request(bytes);
    }

    fn make_request(&mut self, padding: usize) {
        self.request.clear();
        Builder::request(&mut self.request, 272, GX, 0, 0)
            .text(code::SESSION_ID, "client.example.net;1;00000000")
            .text(code::ORIGIN_HOST, "client.example.net")
            .text(code::ORIGIN_REALM, "example.net")
            .text(code::DESTINATION_REALM, "example.net")
            .number(code::AUTH_APPLICATION_ID, GX)
            .number(code::CC_REQUEST_TYPE, 2)
            .number(415, 1)
            .avp(9_999_999, 0, &vec![0; 284 + padding])
            .finish();
        self.session_at = places(&self.request, b"00000000")[0];
    }

    /// A request of session `number`, to a backend; its bytes stand in the outbox.
    pub(crate) fn request(&mut self) -> usize {
        self.number = self.number.wrapping_add(1);
        let mut request = std::mem::take(&mut self.request);
        request[12..16].copy_from_slice(&self.number.to_be_bytes());
        // A few thousand sessions in turn.
        let digits = std::array::from_fn::<u8, 8, _>(|place| {
            b"0123456789abcdef"[((self.number % 4_096) >> (4 * (7 - place)) & 15) as usize]
        });
        request[self.session_at..self.session_at + 8].copy_from_slice(&digits);
        self.give(self.client, &request);
        self.request = request;
        self.out.arena().len()
    }

    /// The backend's answer to the last request, back to the client.
    pub(crate) fn answer(&mut self) -> usize {
        let Some(Command::Send(frame)) = self.out.commands().first() else {
            panic!("nothing went on");
        };
        let (to, range) = (frame.to, frame.bytes.clone());
        assert!(matches!(to, Endpoint::Backend(_)), "the request went to a backend");
        let header = Header::read(self.out.bytes(&range)).expect("a request");
        let mut answer = std::mem::take(&mut self.answer);
        if answer.is_empty() {
            Builder::new(&mut answer, 0x40, 272, GX, 0, 0)
                .text(code::SESSION_ID, "client.example.net;1;00000000")
                .number(code::RESULT_CODE, 2_001)
                .text(code::ORIGIN_HOST, "b0.example.net")
                .text(code::ORIGIN_REALM, "example.net")
                .number(code::AUTH_APPLICATION_ID, GX)
                .number(code::CC_REQUEST_TYPE, 2)
                .number(415, 1)
                .finish();
        }
        answer[12..16].copy_from_slice(&header.hop_by_hop.to_be_bytes());
        answer[16..20].copy_from_slice(&header.end_to_end.to_be_bytes());
        self.give(to, &answer);
        self.answer = answer;
        self.out.arena().len()
    }

    /// Time goes on, and the engine with it.
    pub(crate) fn pass(&mut self, time: Duration) {
        self.now += time;
        self.router.refresh();
        self.out.clear();
        if self.engine.next_timeout().is_some_and(|next| next <= self.now) {
            self.engine.on_timeout(self.now, &mut self.router, &mut self.out);
        }
    }
}

/// A session key by number.
pub(crate) fn key(router: &CoreRouter, number: u64) -> strowger_contract::SessionKey {
    router.keyer().session(1, &number.to_le_bytes())
}
