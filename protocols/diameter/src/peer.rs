//! The peer machine (RFC 6733 5) and its watchdog (RFC 3539 3.4), towards clients and backends. A
//! connection that a backend opened itself may serve as its link: it is a client's to the runtime, and
//! both to the machine.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use strowger_contract::{
    BackendId, Certificate, ClassId, Closing, Endpoint, LANE_ACCEPTED, Lanes, Link, Note, Outbox,
    PeerReport, Router,
};

use crate::SPACE;
use crate::answer::result;
use crate::avp::{Avps, FLAG_ERROR, Header, code};
use crate::build::Builder;
use crate::engine::DiameterEngine;
use crate::overload::Buckets;
use crate::watchdog::Skew;

/// Command codes of the base protocol.
pub(crate) const CAPABILITIES_EXCHANGE: u32 = 257;
pub(crate) const DEVICE_WATCHDOG: u32 = 280;
pub(crate) const DISCONNECT_PEER: u32 = 282;

/// Disconnect-Cause (RFC 6733 5.4.3).
pub(crate) const REBOOTING: u32 = 0;
pub(crate) const BUSY: u32 = 1;
pub(crate) const DO_NOT_WANT_TO_TALK_TO_YOU: u32 = 2;

/// How long a peer has for its CER or CEA.
pub(crate) const CAPABILITIES_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a peer has for its DPA.
pub(crate) const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Where a peer stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) enum State {
    /// Its CER or CEA is awaited.
    Introducing,
    Open,
    /// A watchdog was not answered, or answers are owed; nothing new is sent to it.
    Suspect,
    /// Back after it was given up: so many watchdogs must be answered first (RFC 3539 3.4.1).
    Reopening(u8),
    /// DPR was sent or received.
    Leaving,
}

/// The other end of a connection.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct Peer {
    pub(crate) state: State,
    /// Its Origin-Host.
    pub(crate) host: Rc<[u8]>,
    pub(crate) realm: Rc<[u8]>,
    pub(crate) capabilities: Vec<u32>,
    /// The backend whose link the connection is, though that backend opened it.
    pub(crate) serves: Option<BackendId>,
    /// What it showed where the connection is over TLS: its Origin-Host must be in there.
    certificate: Option<Certificate>,
    remote: SocketAddr,
    pub(crate) local: SocketAddr,
    #[serde(with = "strowger_contract::handover::moment")]
    pub(crate) since: Instant,
    #[serde(with = "strowger_contract::handover::moment")]
    pub(crate) heard: Instant,
    /// The last answer to a request that was relayed.
    #[serde(with = "strowger_contract::handover::moment")]
    pub(crate) answered: Instant,
    /// Since when it owes answers.
    #[serde(with = "strowger_contract::handover::moment_or_none")]
    pub(crate) owes: Option<Instant>,
    /// It owed answers for too long: a watchdog's answer alone does not bring it back before then.
    #[serde(with = "strowger_contract::handover::moment_or_none")]
    pub(crate) stalled_until: Option<Instant>,
    pub(crate) state_id: Option<u32>,
    #[serde(skip)]
    pub(crate) buckets: Buckets,
    #[serde(skip)]
    pub(crate) skew: Skew,
    /// A DWR of ours that is not answered.
    #[serde(with = "strowger_contract::handover::moment_or_none")]
    pub(crate) asked: Option<Instant>,
    pub(crate) watchdog: Duration,
}

impl Peer {
    /// Whether it may be a backend that is to be at `address`: its certificate says so ([`Peer::may_be`]), or
    /// it comes from that host.
    pub(crate) fn may_serve_at(&self, address: SocketAddr) -> bool {
        self.certificate.is_some() || self.remote.ip().to_canonical() == address.ip().to_canonical()
    }

    /// Whether its certificate, if it showed one, stands for the Origin-Host that it tells (RFC 6733
    /// 13.1: peers authorise each other by what was authenticated).
    pub(crate) fn may_be(&self, host: &[u8]) -> bool {
        let Some(certificate) = &self.certificate else { return true };
        std::str::from_utf8(host).is_ok_and(|host| certificate.is_for_diameter(host))
    }
}

impl DiameterEngine {
    pub(crate) fn begin(
        &mut self,
        now: Instant,
        endpoint: Endpoint,
        (remote, local): (SocketAddr, SocketAddr),
        certificate: Option<Certificate>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let peer = Peer {
            state: State::Introducing,
            host: Rc::from(&b""[..]),
            realm: Rc::from(&b""[..]),
            capabilities: Vec::new(),
            serves: None,
            certificate,
            remote,
            local,
            since: now,
            heard: now,
            answered: now,
            owes: None,
            stalled_until: None,
            state_id: None,
            buckets: Buckets::default(),
            skew: Skew::default(),
            asked: None,
            watchdog: self.jittered_watchdog(),
        };
        self.arm_upkeep(now);
        match endpoint {
            Endpoint::Client(flow) => {
                self.clients.insert(flow, peer);
            }
            endpoint => {
                let Some(link) = endpoint.as_link() else { return };
                if is_served(link.0, router) {
                    // The backend was faster, and its own connection serves.
                    return out.close(endpoint, Closing::Reset);
                }
                self.backends.insert(link, peer);
                self.set_link(now, link, Link::Introducing, router);
                self.report(endpoint, router);
                self.introduce(endpoint, local, router, out);
            }
        }
    }

    /// Whose link it is, and which of them.
    pub(crate) fn link_of(&self, endpoint: Endpoint) -> Option<(BackendId, u8)> {
        match endpoint {
            Endpoint::Client(flow) => {
                self.clients.get(&flow)?.serves.map(|backend| (backend, LANE_ACCEPTED))
            }
            endpoint => endpoint.as_link(),
        }
    }

    /// Tells the core of a link that is here.
    pub(crate) fn set_link(
        &mut self,
        now: Instant,
        (backend, lane): (BackendId, u8),
        link: Link<'_>,
        router: &mut dyn Router,
    ) {
        let open = matches!(link, Link::Up { .. });
        let here = self.lanes_here.entry(backend).or_default();
        *here = if open { *here | Lanes::bit(lane) } else { *here & !Lanes::bit(lane) };
        if *here == 0 {
            self.lanes_here.remove(&backend);
        }
        router.link(now, backend, lane, link);
    }

    /// The connection that the next request to a backend takes: in turn, of those that are here if
    /// there are any, since what goes to another worker's costs more. `lost` are not taken.
    pub(crate) fn lane_to(
        &mut self,
        backend: BackendId,
        lost: u32,
        router: &dyn Router,
    ) -> Option<Endpoint> {
        let up = router.backend(backend).map_or(0, |view| view.lanes.up) & !lost;
        if up & Lanes::bit(LANE_ACCEPTED) != 0 {
            let flow = router.named_flow(router.keyer().session(SPACE + 1, &link_name(backend)));
            return flow.map(Endpoint::Client);
        }
        if up & !1 == 0 {
            return (up != 0).then_some(Endpoint::Backend(backend));
        }
        let here = up & self.lanes_here.get(&backend).copied().unwrap_or(0);
        let mut among = if here != 0 { here } else { up };
        self.turn = self.turn.wrapping_add(1);
        for _ in 0..self.turn % among.count_ones() {
            among &= among - 1;
        }
        Some(Endpoint::link(backend, among.trailing_zeros() as u8))
    }

    /// RFC 3539 3.4.1: Tw with a jitter, so that watchdogs do not come in bursts.
    fn jittered_watchdog(&mut self) -> Duration {
        // Two seconds of thirty either way; of a shorter Tw the same part.
        let share = self.roll() as f64 / f64::from(1u32 << 31);
        self.settings.options.watchdog.0.mul_f64(0.93 + 0.14 * share)
    }

    pub(crate) fn next_end_to_end(&mut self) -> u32 {
        self.end_to_end = self.end_to_end.wrapping_add(1);
        self.end_to_end
    }

    /// A message of the base protocol between peers; `true` if it was one.
    pub(crate) fn on_upkeep(
        &mut self,
        now: Instant,
        from: Endpoint,
        bytes: &[u8],
        header: &Header,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) -> bool {
        if header.application != 0 {
            return false;
        }
        match (header.command, header.is_request()) {
            (CAPABILITIES_EXCHANGE, true) => self.on_cer(now, from, bytes, header, router, out),
            (CAPABILITIES_EXCHANGE, false) => self.on_cea(now, from, bytes, router, out),
            (DEVICE_WATCHDOG, true) => {
                self.note_state(now, from, bytes, false, router, out);
                self.answer_peer(from, header, result::SUCCESS, None, None, out);
            }
            (DEVICE_WATCHDOG, false) => self.on_dwa(now, from, bytes, router, out),
            (DISCONNECT_PEER, true) => self.on_dpr(now, from, bytes, header, router, out),
            (DISCONNECT_PEER, false) => out.close(from, Closing::Flushed),
            _ => return false,
        }
        true
    }

    /// Notes that a peer is alive (RFC 3539: any message is as good as a DWA).
    pub(crate) fn heard(
        &mut self,
        now: Instant,
        from: Endpoint,
        header: &Header,
        router: &mut dyn Router,
    ) {
        let Some(peer) = self.peer(from) else { return };
        peer.heard = now;
        peer.asked = None;
        if header.application != 0 && !header.is_request() {
            peer.answered = now;
            peer.stalled_until = None;
        }
        if peer.state == State::Suspect && peer.stalled_until.is_none() {
            self.open(now, from, router);
        }
    }

    /// The peer takes requests from now on.
    pub(crate) fn open(&mut self, now: Instant, endpoint: Endpoint, router: &mut dyn Router) {
        let Some(peer) = self.peer(endpoint) else { return };
        peer.state = State::Open;
        (peer.owes, peer.stalled_until) = (None, None);
        let (host, capabilities) = (Rc::clone(&peer.host), peer.capabilities.clone());
        if let Some(link) = self.link_of(endpoint) {
            let up = Link::Up { identity: &host, capabilities: &capabilities };
            self.set_link(now, link, up, router);
        }
        self.report(endpoint, router);
    }

    /// The peer has introduced itself over its link: it is open, or if it was given up before, it must
    /// prove itself first (RFC 3539 3.4.1: REOPEN).
    pub(crate) fn introduced(
        &mut self,
        now: Instant,
        from: Endpoint,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        /// The third DWA brings it back.
        const WATCHDOGS_TO_REOPEN: u8 = 3;
        let Some(link) = self.link_of(from) else { return };
        let lanes = router.backend(link.0).map(|view| view.lanes);
        let given_up =
            lanes.is_some_and(|lanes| lanes.given_up & grudge_of(link.0, link.1, router) != 0);
        if !given_up {
            out.proven(from);
            return self.open(now, from, router);
        }
        if let Some(peer) = self.peer(from) {
            peer.state = State::Reopening(WATCHDOGS_TO_REOPEN);
        }
        self.set_link(now, link, Link::Introducing, router);
        self.report(from, router);
        self.ask(now, from, out);
    }

    /// Tells operators of the peer as it is now.
    pub(crate) fn report(&mut self, endpoint: Endpoint, router: &mut dyn Router) {
        let Some(peer) = self.peer(endpoint) else { return };
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let report = PeerReport {
            identity: text(&peer.host),
            realm: text(&peer.realm),
            address: peer.remote.to_string(),
            state: match peer.state {
                State::Introducing => "introducing",
                State::Open => "open",
                State::Suspect => "suspect",
                State::Reopening(_) => "reopening",
                State::Leaving => "leaving",
            },
            capabilities: peer.capabilities.clone(),
            state_id: peer.state_id,
            serves: peer.serves,
        };
        router.report_peer(&self.settings.listener, endpoint, Some(report));
    }

    /// RFC 3539: after a failure three watchdogs must be answered before the peer is used again.
    fn on_dwa(
        &mut self,
        now: Instant,
        from: Endpoint,
        bytes: &[u8],
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        self.note_state(now, from, bytes, false, router, out);
        let Some(peer) = self.peer(from) else { return };
        match peer.state {
            State::Reopening(left) if left <= 1 => {
                if let Some((backend, lane)) = self.link_of(from) {
                    router.give_up(backend, grudge_of(backend, lane, router), false);
                    if lane != LANE_ACCEPTED && is_served(backend, router) {
                        // It has connected itself meanwhile.
                        return out.close(from, Closing::Reset);
                    }
                }
                out.proven(from);
                self.open(now, from, router);
            }
            State::Reopening(left) => peer.state = State::Reopening(left - 1),
            _ => {}
        }
    }

    /// RFC 6733 8.16: an Origin-State-Id that grew tells that the sessions before it are lost. The
    /// core keeps it over connections, for all of them; one that shrank, and that a `fresh` connection
    /// tells, is taken as a clock that was set back.
    pub(crate) fn note_state(
        &mut self,
        now: Instant,
        from: Endpoint,
        bytes: &[u8],
        fresh: bool,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let told = Avps::of(bytes).map_while(Result::ok).find(|avp| avp.is(code::ORIGIN_STATE_ID));
        let Some(told) = told.and_then(|avp| avp.number()).filter(|&told| told != 0) else {
            return;
        };
        if let Some(peer) = self.peer(from) {
            peer.state_id = Some(told);
        }
        let Some((backend, _)) = self.link_of(from) else { return };
        if router.note_start(backend, told, fresh) {
            router.restarted(now, backend);
            out.note(Note::Count("diameter_peer_restarted"));
        }
    }

    pub(crate) fn answer_peer(
        &self,
        to: Endpoint,
        header: &Header,
        code_of_result: u32,
        text: Option<&str>,
        failed: Option<&[u8]>,
        out: &mut Outbox,
    ) {
        let identity = self.settings.identity();
        let flags = if (3_000..4_000).contains(&code_of_result) { FLAG_ERROR } else { 0 };
        out.send(to, ClassId::CONTROL, |bytes| {
            let mut builder =
                Builder::new(bytes, flags, header.command, 0, header.hop_by_hop, header.end_to_end)
                    .number(code::RESULT_CODE, code_of_result)
                    .text(code::ORIGIN_HOST, identity.host)
                    .text(code::ORIGIN_REALM, identity.realm);
            if header.command == DEVICE_WATCHDOG {
                builder = builder.number(code::ORIGIN_STATE_ID, self.settings.started);
            }
            if let Some(text) = text {
                builder = builder.avp(code::ERROR_MESSAGE, 0, text.as_bytes());
            }
            if let Some(failed) = failed {
                builder = builder.bytes(code::FAILED_AVP, failed);
            }
            builder.finish();
        });
    }
}

/// Whether a connection that the backend opened itself serves as its link, or is to once it has proven
/// itself.
pub(crate) fn is_served(backend: BackendId, router: &dyn Router) -> bool {
    let accepted = Lanes::bit(LANE_ACCEPTED);
    let lanes = router.backend(backend).map(|view| view.lanes);
    lanes.is_some_and(|lanes| (lanes.up | lanes.introducing) & accepted != 0)
}

/// What a link must make good: whatever was given up of a backend that has one link, whoever opens it;
/// itself, of several.
fn grudge_of(backend: BackendId, lane: u8, router: &dyn Router) -> u32 {
    let several = router.backend(backend).is_some_and(|view| view.connections > 1);
    if several { Lanes::bit(lane) } else { u32::MAX }
}

/// Among the names of clients' connections: that of the one that serves as a backend's link. No host
/// is called so.
pub(crate) fn link_name(backend: BackendId) -> [u8; 5] {
    let [a, b, c, d] = backend.0.to_be_bytes();
    [0, a, b, c, d]
}
