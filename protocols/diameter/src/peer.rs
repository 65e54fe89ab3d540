//! The peer machine (RFC 6733 5) and its watchdog (RFC 3539 3.4), towards clients and backends.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use strowger_contract::{
    BackendId, Certificate, ClassId, Closing, Endpoint, FlowId, Level, Link, Note, Outbox,
    PeerReport, Router, Ticket,
};

use crate::SPACE;
use crate::answer::result;
use crate::avp::{AVP_MANDATORY, Avps, FLAG_ERROR, FLAG_REQUEST, Header, VENDOR_3GPP, code};
use crate::build::{Builder, append};
use crate::engine::DiameterEngine;
use crate::onward::unbind_refused;
use crate::overload::Buckets;
use crate::watchdog::Skew;

/// Command codes of the base protocol.
pub(crate) const CAPABILITIES_EXCHANGE: u32 = 257;
pub(crate) const DEVICE_WATCHDOG: u32 = 280;
pub(crate) const DISCONNECT_PEER: u32 = 282;

/// Disconnect-Cause (RFC 6733 5.4.3).
pub(crate) const REBOOTING: u32 = 0;
const BUSY: u32 = 1;
const DO_NOT_WANT_TO_TALK_TO_YOU: u32 = 2;

const RELAY: u32 = 0xffff_ffff;

/// How long a peer has for its CER or CEA.
pub(crate) const CAPABILITIES_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a peer has for its DPA.
pub(crate) const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// How many times Tw a backend is left alone that said it is busy, or wants no connection.
const BUSY_PAUSE: u32 = 2;
const UNWANTED_PAUSE: u32 = 20;

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
    capabilities: Vec<u32>,
    /// What it showed where the connection is over TLS: its Origin-Host must be in there.
    certificate: Option<Certificate>,
    remote: SocketAddr,
    local: SocketAddr,
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
    state_id: Option<u32>,
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
    /// The other side's address, and ours.
    pub(crate) fn addresses(&self) -> (SocketAddr, SocketAddr) {
        (self.remote, self.local)
    }

    /// Whether its certificate, if it showed one, stands for the Origin-Host that it tells (RFC 6733
    /// 13.1: peers authorise each other by what was authenticated).
    fn may_be(&self, host: &[u8]) -> bool {
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
            Endpoint::Backend(backend) => {
                self.backends.insert(backend, peer);
                self.introduce(endpoint, local, router, out);
            }
            _ => {}
        }
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

    /// Our applications: those configured, those that the pools' backends told, and relay.
    fn applications(&self, router: &dyn Router) -> Vec<u32> {
        let options = &self.settings.options;
        let mut list = self.settings.applications.clone();
        for pool in &self.settings.pools {
            router.capabilities(*pool, &mut |application| list.push(application));
        }
        list.retain(|&application| application != RELAY);
        list.sort_unstable();
        list.dedup();
        if options.advertise_relay || list.is_empty() {
            list.push(RELAY);
        }
        list
    }

    fn introduce(
        &mut self,
        to: Endpoint,
        local: SocketAddr,
        router: &dyn Router,
        out: &mut Outbox,
    ) {
        let end_to_end = self.next_end_to_end();
        let applications = self.applications(router);
        out.send(to, ClassId::CONTROL, |bytes| {
            let builder =
                Builder::new(bytes, FLAG_REQUEST, CAPABILITIES_EXCHANGE, 0, end_to_end, end_to_end);
            self.describe(builder, local, &applications).finish();
        });
    }

    /// What CER and CEA say of us (RFC 6733 5.3.1).
    fn describe<'b>(
        &self,
        builder: Builder<'b>,
        local: SocketAddr,
        applications: &[u32],
    ) -> Builder<'b> {
        let identity = self.settings.identity();
        let mut builder = builder
            .text(code::ORIGIN_HOST, identity.host)
            .text(code::ORIGIN_REALM, identity.realm)
            .address(code::HOST_IP_ADDRESS, local.ip())
            .number(code::VENDOR_ID, 0)
            .avp(code::PRODUCT_NAME, 0, self.settings.options.product_name.as_bytes())
            .number(code::ORIGIN_STATE_ID, self.settings.started)
            .number(code::SUPPORTED_VENDOR_ID, VENDOR_3GPP);
        for &application in applications {
            builder = builder.application(application);
        }
        builder.avp(code::FIRMWARE_REVISION, 0, &1u32.to_be_bytes())
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
            (CAPABILITIES_EXCHANGE, true) => self.on_cer(from, bytes, header, router, out),
            (CAPABILITIES_EXCHANGE, false) => self.on_cea(now, from, bytes, router, out),
            (DEVICE_WATCHDOG, true) => {
                self.note_state(now, from, bytes, router, out);
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
        if let Endpoint::Backend(backend) = endpoint {
            let (host, capabilities) = (Rc::clone(&peer.host), peer.capabilities.clone());
            router.link(now, backend, Link::Up { identity: &host, capabilities: &capabilities });
        }
        self.report(endpoint, router);
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
        self.note_state(now, from, bytes, router, out);
        let Some(peer) = self.peer(from) else { return };
        match peer.state {
            State::Reopening(left) if left <= 1 => {
                out.proven(from);
                self.open(now, from, router);
            }
            State::Reopening(left) => peer.state = State::Reopening(left - 1),
            _ => {}
        }
    }

    /// RFC 6733 8.16: an Origin-State-Id that grew tells that the sessions before it are lost. It is
    /// kept over connections; one that shrank is taken as a clock that was set back.
    fn note_state(
        &mut self,
        now: Instant,
        from: Endpoint,
        bytes: &[u8],
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
        let Endpoint::Backend(backend) = from else { return };
        if self.states.insert(backend, told).is_some_and(|known| told > known) {
            router.restarted(now, backend);
            out.note(Note::Count("diameter_peer_restarted"));
        }
    }

    fn answer_peer(
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

    fn on_cer(
        &mut self,
        from: Endpoint,
        bytes: &[u8],
        header: &Header,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Endpoint::Client(flow) = from else {
            // A backend that introduces itself on our connection mistakes its role.
            let (what, text) = (result::UNABLE_TO_COMPLY, "we opened this connection");
            return self.answer_peer(from, header, what, Some(text), None, out);
        };
        let told = Told::read(bytes);
        let refuse_for = |engine: &Self,
                          (code_of_result, text): (u32, &str),
                          failed: Option<&[u8]>,
                          out: &mut Outbox| {
            engine.answer_peer(from, header, code_of_result, Some(text), failed, out);
            out.note(Note::Count("diameter_peers_refused"));
            out.event(Level::Warn, "diameter_peer_refused", || {
                format!("{}: {text}", String::from_utf8_lossy(told.host))
            });
            out.close(from, Closing::Flushed);
        };
        let refuse = |engine: &Self, code_of_result: u32, text: &str, out: &mut Outbox| {
            refuse_for(engine, (code_of_result, text), None, out);
        };
        if told.host.is_empty() || told.realm.is_empty() {
            let missing = if told.host.is_empty() { code::ORIGIN_HOST } else { code::ORIGIN_REALM };
            // RFC 6733 7.5: an example of the AVP, its data zeroes.
            let mut failed = Vec::new();
            append(&mut failed, missing, AVP_MANDATORY, &[0]);
            let what = (result::MISSING_AVP, "Origin-Host or Origin-Realm is missing");
            return refuse_for(self, what, Some(&failed), out);
        }
        if let Some((what, failed)) = self.unfit(bytes) {
            return refuse_for(self, what, Some(failed), out);
        }
        if !self.clients.get(&flow).is_none_or(|peer| peer.may_be(told.host)) {
            let text = "the certificate is not for this Origin-Host";
            return refuse(self, result::UNKNOWN_PEER, text, out);
        }
        let peers = &self.settings.peers;
        if !peers.is_empty() && !peers.iter().any(|peer| peer.matches(told.host)) {
            return refuse(self, result::UNKNOWN_PEER, "this peer is not among those allowed", out);
        }
        let identity = String::from_utf8_lossy(told.host);
        let connections = router.peers_named(&self.settings.listener, &identity);
        let again = self.clients.get(&flow).is_some_and(|peer| peer.state == State::Open);
        if !again && connections >= self.settings.options.peer_connections as usize {
            let text = "this peer has as many connections as it may";
            return refuse(self, result::ELECTION_LOST, text, out);
        }
        let open: usize = self.settings.pools.iter().map(|&pool| router.linked(pool)).sum();
        if open < self.settings.options.wait_for_backends as usize {
            return refuse(self, result::TOO_BUSY, "too few servers are open yet", out);
        }
        let ours = self.applications(router);
        let common = ours.contains(&RELAY)
            || told.applications.iter().any(|theirs| *theirs == RELAY || ours.contains(theirs));
        if !common {
            return refuse(self, result::NO_COMMON_APPLICATION, "no application in common", out);
        }
        let Some(peer) = self.clients.get_mut(&flow) else { return };
        peer.state = State::Open;
        peer.host = Rc::from(told.host);
        peer.realm = Rc::from(told.realm);
        peer.state_id = told.state_id;
        peer.capabilities.clone_from(&told.applications);
        let local = peer.local;
        self.report(from, router);
        self.name(flow, told.host, true, router);
        out.send(from, ClassId::CONTROL, |bytes| {
            let builder = Builder::new(
                bytes,
                0,
                CAPABILITIES_EXCHANGE,
                0,
                header.hop_by_hop,
                header.end_to_end,
            )
            .number(code::RESULT_CODE, result::SUCCESS);
            self.describe(builder, local, &ours).finish();
        });
        out.event(Level::Info, "diameter_client_open", || {
            String::from_utf8_lossy(told.host).into_owned()
        });
    }

    /// The first AVP of a CER that must not be passed over: only what is for this node itself is
    /// looked at so, never what is relayed (RFC 6733 4.1).
    fn unfit<'m>(&self, cer: &'m [u8]) -> Option<((u32, &'static str), &'m [u8])> {
        const RESERVED: u8 = 0x1f;
        Avps::of(cer).map_while(Result::ok).find_map(|avp| {
            if avp.flags & RESERVED != 0 {
                let what = (result::INVALID_AVP_BITS, "reserved bits of an AVP are set");
                return Some((what, avp.whole));
            }
            let known = self.settings.dictionary.avp(avp.vendor, avp.code).is_some();
            let what = (result::AVP_UNSUPPORTED, "an AVP with M is not in the dictionary");
            (avp.flags & AVP_MANDATORY != 0 && !known).then_some((what, avp.whole))
        })
    }

    /// Lets other workers find a client by its identity, or no longer.
    fn name(&mut self, flow: FlowId, host: &[u8], here: bool, router: &mut dyn Router) {
        self.lower.clear();
        self.lower.extend(host.iter().map(u8::to_ascii_lowercase));
        let name = router.keyer().session(SPACE + 1, &self.lower);
        if here { router.name_flow(name, flow) } else { router.unname_flow(name, flow) }
    }

    fn on_cea(
        &mut self,
        now: Instant,
        from: Endpoint,
        bytes: &[u8],
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Endpoint::Backend(backend) = from else { return };
        let told = Told::read(bytes);
        let expected = router.backend(backend).and_then(|view| view.identity.map(str::to_owned));
        let stranger =
            expected.filter(|expected| !told.host.eq_ignore_ascii_case(expected.as_bytes()));
        let Some(peer) =
            self.backends.get_mut(&backend).filter(|peer| peer.state == State::Introducing)
        else {
            return;
        };
        let certified = peer.may_be(told.host);
        if told.result != Some(result::SUCCESS)
            || told.host.is_empty()
            || stranger.is_some()
            || !certified
        {
            out.note(Note::Count("diameter_backends_refused"));
            out.event(Level::Warn, "diameter_backend_refused", || match stranger {
                Some(expected) => format!(
                    "calls itself {}, and not {expected}",
                    String::from_utf8_lossy(told.host)
                ),
                None if !certified => format!(
                    "calls itself {}, and its certificate is not for that",
                    String::from_utf8_lossy(told.host)
                ),
                None => format!("answered our CER with {}", told.result.unwrap_or(0)),
            });
            return out.close(from, Closing::Flushed);
        }
        /// RFC 3539 3.4.1: the third DWA brings it back.
        const WATCHDOGS_TO_REOPEN: u8 = 3;
        peer.host = Rc::from(told.host);
        peer.realm = Rc::from(told.realm);
        peer.capabilities = told.applications;
        self.note_state(now, from, bytes, router, out);
        if self.given_up.remove(&backend) {
            if let Some(peer) = self.peer(from) {
                peer.state = State::Reopening(WATCHDOGS_TO_REOPEN);
            }
            self.report(from, router);
            return self.ask(now, from, out);
        }
        out.proven(from);
        self.open(now, from, router);
    }

    fn on_dpr(
        &mut self,
        now: Instant,
        from: Endpoint,
        bytes: &[u8],
        header: &Header,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let mut avps = Avps::of(bytes).map_while(Result::ok);
        let cause = avps.find(|avp| avp.is(code::DISCONNECT_CAUSE)).and_then(|avp| avp.number());
        let (watchdog, backend) = (self.settings.options.watchdog.0, from);
        if let Endpoint::Backend(_) = backend {
            // RFC 6733 5.4.3 only forbids to come back at once; how long is ours to say.
            match cause {
                Some(BUSY) => out.hold_off(backend, watchdog * BUSY_PAUSE),
                Some(DO_NOT_WANT_TO_TALK_TO_YOU) => {
                    out.hold_off(backend, watchdog * UNWANTED_PAUSE);
                }
                _ => {}
            }
        }
        self.answer_peer(from, header, result::SUCCESS, None, None, out);
        if let Some(peer) = self.peer(from) {
            peer.state = State::Leaving;
            peer.since = now;
        }
        match from {
            // It closes when it has our DPA, and its answers under way may still come before that.
            Endpoint::Backend(backend) => router.link(now, backend, Link::Suspect),
            from => out.close(from, Closing::Flushed),
        }
        self.report(from, router);
    }

    pub(crate) fn disconnect(&mut self, now: Instant, to: Endpoint, cause: u32, out: &mut Outbox) {
        let end_to_end = self.next_end_to_end();
        if let Some(peer) = self.peer(to) {
            peer.state = State::Leaving;
            peer.since = now;
        }
        let identity = self.settings.identity();
        out.send(to, ClassId::CONTROL, |bytes| {
            Builder::new(bytes, FLAG_REQUEST, DISCONNECT_PEER, 0, end_to_end, end_to_end)
                .text(code::ORIGIN_HOST, identity.host)
                .text(code::ORIGIN_REALM, identity.realm)
                .number(code::DISCONNECT_CAUSE, cause)
                .finish();
        });
    }

    pub(crate) fn on_retired(
        &mut self,
        now: Instant,
        backend: BackendId,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        router.link(now, backend, Link::Suspect);
        // Not "do not want to talk to you": a drain may be taken back, and peers hold that against us.
        self.disconnect(now, Endpoint::Backend(backend), REBOOTING, out);
    }

    pub(crate) fn on_client_gone(&mut self, now: Instant, flow: FlowId, router: &mut dyn Router) {
        let gone = Endpoint::Client(flow);
        router.report_peer(&self.settings.listener, gone, None);
        let given_up: Vec<Ticket> = self
            .waiting
            .iter()
            .filter_map(|(&ticket, pending)| (pending.origin == gone).then_some(ticket))
            .collect();
        for ticket in given_up {
            router.withdraw(now, ticket);
            if let Some(pending) = self.waiting.remove(&ticket) {
                unbind_refused(now, &pending, router);
                self.pending.recycle(pending.request);
            }
        }
        if let Some(peer) = self.clients.remove(&flow) {
            self.name(flow, &peer.host, false, router);
            // Another connection of the same peer takes its requests from now on.
            let mut others = self.clients.iter();
            let other = others.find(|(_, other)| other.host.eq_ignore_ascii_case(&peer.host));
            if let Some(other) = other.map(|(&flow, _)| flow) {
                self.name(other, &peer.host, true, router);
            }
        }
    }

    pub(crate) fn on_backend_gone(
        &mut self,
        now: Instant,
        backend: BackendId,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        if self.backends.remove(&backend).is_some() {
            let peer = Endpoint::Backend(backend);
            router.report_peer(&self.settings.listener, peer, None);
        }
        self.fail_over_from(now, Endpoint::Backend(backend), router, out);
    }
}

/// What a CER or CEA tells.
struct Told<'a> {
    host: &'a [u8],
    realm: &'a [u8],
    result: Option<u32>,
    state_id: Option<u32>,
    applications: Vec<u32>,
}

impl<'a> Told<'a> {
    fn read(bytes: &'a [u8]) -> Self {
        /// A CER of a node that does everything names about thirty.
        const APPLICATIONS_MAX: usize = 256;
        let mut told =
            Self { host: b"", realm: b"", result: None, state_id: None, applications: Vec::new() };
        for avp in Avps::of(bytes).map_while(Result::ok).filter(|avp| avp.vendor == 0) {
            match avp.code {
                code::ORIGIN_HOST => told.host = avp.data,
                code::ORIGIN_REALM => told.realm = avp.data,
                code::RESULT_CODE => told.result = avp.number(),
                code::ORIGIN_STATE_ID => told.state_id = avp.number(),
                code::AUTH_APPLICATION_ID | code::ACCT_APPLICATION_ID => {
                    told.applications.extend(avp.number())
                }
                code::VENDOR_SPECIFIC_APPLICATION_ID => {
                    let inner = Avps::within(avp.data).map_while(Result::ok);
                    let ids = inner.filter(|avp| {
                        avp.is(code::AUTH_APPLICATION_ID) || avp.is(code::ACCT_APPLICATION_ID)
                    });
                    told.applications.extend(ids.filter_map(|avp| avp.number()));
                }
                _ => {}
            }
            if told.applications.len() >= APPLICATIONS_MAX {
                break;
            }
        }
        told.applications.sort_unstable();
        told.applications.dedup();
        told
    }
}
