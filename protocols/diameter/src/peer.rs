//! The peer machine (RFC 6733 5) and its watchdog (RFC 3539 3.4), towards clients and backends.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use strowger_contract::{
    BackendId, ClassId, Closing, Endpoint, FlowId, Level, Link, Note, Outbox, Router,
};

use crate::SPACE;
use crate::answer::result;
use crate::avp::{Avps, FLAG_ERROR, FLAG_REQUEST, Header, code};
use crate::build::Builder;
use crate::engine::DiameterEngine;

/// Command codes of the base protocol.
pub(crate) const CAPABILITIES_EXCHANGE: u32 = 257;
pub(crate) const DEVICE_WATCHDOG: u32 = 280;
pub(crate) const DISCONNECT_PEER: u32 = 282;

/// Disconnect-Cause (RFC 6733 5.4.3).
const REBOOTING: u32 = 0;
const DO_NOT_WANT_TO_TALK_TO_YOU: u32 = 2;

const RELAY: u32 = 0xffff_ffff;
const VENDOR_3GPP: u32 = 10_415;

/// How long a peer has for its CER or CEA.
const CAPABILITIES_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a peer has for its DPA.
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Where a peer stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Its CER or CEA is awaited.
    Introducing,
    Open,
    /// A watchdog was not answered; nothing new is sent to it.
    Suspect,
    /// DPR was sent or received.
    Leaving,
}

/// The other end of a connection.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) state: State,
    /// Its Origin-Host.
    pub(crate) host: Rc<[u8]>,
    capabilities: Vec<u32>,
    local: SocketAddr,
    since: Instant,
    heard: Instant,
    /// A DWR of ours that is not answered.
    asked: Option<Instant>,
    watchdog: Duration,
}

impl DiameterEngine {
    pub(crate) fn on_opened(
        &mut self,
        now: Instant,
        endpoint: Endpoint,
        _remote: SocketAddr,
        local: SocketAddr,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let peer = Peer {
            state: State::Introducing,
            host: Rc::from(&b""[..]),
            capabilities: Vec::new(),
            local,
            since: now,
            heard: now,
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
        self.dice =
            self.dice.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let share = (self.dice >> 40) as f64 / f64::from(1 << 24);
        self.settings.options.watchdog.0.mul_f64(0.93 + 0.14 * share)
    }

    pub(crate) fn next_end_to_end(&mut self) -> u32 {
        self.end_to_end = self.end_to_end.wrapping_add(1);
        self.end_to_end
    }

    /// Our applications: those configured, those that the pools' backends told, and relay.
    fn applications(&self, router: &dyn Router) -> Vec<u32> {
        let options = &self.settings.options;
        let mut list: Vec<u32> =
            options.applications.iter().filter_map(crate::options::Application::number).collect();
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
            (DEVICE_WATCHDOG, true) => self.answer_peer(from, header, result::SUCCESS, None, out),
            (DEVICE_WATCHDOG, false) => {}
            (DISCONNECT_PEER, true) => self.on_dpr(now, from, header, router, out),
            (DISCONNECT_PEER, false) => out.close(from, Closing::Flushed),
            _ => return false,
        }
        true
    }

    /// Notes that a peer is alive (RFC 3539: any message is as good as a DWA).
    pub(crate) fn heard(&mut self, now: Instant, from: Endpoint, router: &mut dyn Router) {
        let Some(peer) = self.peer(from) else { return };
        peer.heard = now;
        peer.asked = None;
        if peer.state == State::Suspect
            && let Endpoint::Backend(backend) = from
        {
            peer.state = State::Open;
            let (host, capabilities) = (Rc::clone(&peer.host), peer.capabilities.clone());
            router.link(now, backend, Link::Up { identity: &host, capabilities: &capabilities });
        }
    }

    fn answer_peer(
        &self,
        to: Endpoint,
        header: &Header,
        code_of_result: u32,
        text: Option<&str>,
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
            return self.answer_peer(from, header, 5_012, Some("we opened this connection"), out);
        };
        let told = Told::read(bytes);
        let refuse = |engine: &Self, code_of_result: u32, text: &str, out: &mut Outbox| {
            engine.answer_peer(from, header, code_of_result, Some(text), out);
            out.note(Note::Count("diameter_peers_refused"));
            out.event(Level::Warn, "diameter_peer_refused", || {
                format!("{}: {text}", String::from_utf8_lossy(told.host))
            });
            out.close(from, Closing::Flushed);
        };
        if told.host.is_empty() || told.realm.is_empty() {
            return refuse(
                self,
                result::MISSING_AVP,
                "Origin-Host or Origin-Realm is missing",
                out,
            );
        }
        let peers = &self.settings.options.peers;
        if !peers.is_empty()
            && !peers.iter().any(|peer| told.host.eq_ignore_ascii_case(peer.as_bytes()))
        {
            return refuse(self, result::UNKNOWN_PEER, "this peer is not among those allowed", out);
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
        let local = peer.local;
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
        if told.result != Some(result::SUCCESS) || told.host.is_empty() || stranger.is_some() {
            out.event(Level::Warn, "diameter_backend_refused", || match stranger {
                Some(expected) => format!(
                    "calls itself {}, and not {expected}",
                    String::from_utf8_lossy(told.host)
                ),
                None => format!("answered our CER with {}", told.result.unwrap_or(0)),
            });
            return out.close(from, Closing::Flushed);
        }
        peer.state = State::Open;
        peer.host = Rc::from(told.host);
        peer.capabilities = told.applications;
        let (host, capabilities) = (Rc::clone(&peer.host), peer.capabilities.clone());
        router.link(now, backend, Link::Up { identity: &host, capabilities: &capabilities });
    }

    fn on_dpr(
        &mut self,
        now: Instant,
        from: Endpoint,
        header: &Header,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        self.answer_peer(from, header, result::SUCCESS, None, out);
        if let Some(peer) = self.peer(from) {
            peer.state = State::Leaving;
            peer.since = now;
        }
        match from {
            // It closes when it has our DPA, and its answers under way may still come before that.
            Endpoint::Backend(backend) => router.link(now, backend, Link::Suspect),
            from => out.close(from, Closing::Flushed),
        }
    }

    fn disconnect(&mut self, now: Instant, to: Endpoint, cause: u32, out: &mut Outbox) {
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
        self.disconnect(now, Endpoint::Backend(backend), DO_NOT_WANT_TO_TALK_TO_YOU, out);
    }

    pub(crate) fn on_client_gone(&mut self, flow: FlowId, router: &mut dyn Router) {
        if let Some(peer) = self.clients.remove(&flow) {
            self.name(flow, &peer.host, false, router);
        }
    }

    pub(crate) fn on_backend_gone(
        &mut self,
        now: Instant,
        backend: BackendId,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        self.backends.remove(&backend);
        self.fail_over_from(now, Endpoint::Backend(backend), router, out);
    }

    /// Watchdogs, time-outs, goodbyes.
    pub(crate) fn look_after_peers(
        &mut self,
        now: Instant,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let clients: Vec<Endpoint> =
            self.clients.keys().map(|&flow| Endpoint::Client(flow)).collect();
        let backends: Vec<Endpoint> =
            self.backends.keys().map(|&backend| Endpoint::Backend(backend)).collect();
        for endpoint in clients.into_iter().chain(backends) {
            self.look_after(now, endpoint, router, out);
        }
    }

    fn look_after(
        &mut self,
        now: Instant,
        endpoint: Endpoint,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let leave =
            self.draining && matches!(endpoint, Endpoint::Client(_)) && self.is_idle(endpoint);
        let Some(peer) = self.peer(endpoint) else { return };
        let (age, silent, watchdog) = (
            now.saturating_duration_since(peer.since),
            now.saturating_duration_since(peer.heard),
            peer.watchdog,
        );
        match peer.state {
            State::Introducing if age > CAPABILITIES_TIMEOUT => out.close(endpoint, Closing::Reset),
            State::Leaving if age > DISCONNECT_TIMEOUT => out.close(endpoint, Closing::Flushed),
            State::Introducing | State::Leaving => {}
            State::Open if leave => self.disconnect(now, endpoint, REBOOTING, out),
            State::Open => match peer.asked {
                None if silent >= watchdog => self.ask(now, endpoint, out),
                Some(asked) if now.saturating_duration_since(asked) >= watchdog => {
                    self.suspect(now, endpoint, router, out)
                }
                _ => {}
            },
            State::Suspect if silent >= watchdog * 4 => out.close(endpoint, Closing::Reset),
            State::Suspect => {}
        }
    }

    fn is_idle(&self, client: Endpoint) -> bool {
        self.pending.find(|pending| pending.origin == client).is_empty()
    }

    fn ask(&mut self, now: Instant, endpoint: Endpoint, out: &mut Outbox) {
        let end_to_end = self.next_end_to_end();
        if let Some(peer) = self.peer(endpoint) {
            peer.asked = Some(now);
        }
        let (identity, started) = (self.settings.identity(), self.settings.started);
        out.send(endpoint, ClassId::CONTROL, |bytes| {
            Builder::new(bytes, FLAG_REQUEST, DEVICE_WATCHDOG, 0, end_to_end, end_to_end)
                .text(code::ORIGIN_HOST, identity.host)
                .text(code::ORIGIN_REALM, identity.realm)
                .number(code::ORIGIN_STATE_ID, started)
                .finish();
        });
    }

    /// RFC 3539 3.4.1: what waits for it goes elsewhere.
    fn suspect(
        &mut self,
        now: Instant,
        endpoint: Endpoint,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Endpoint::Backend(backend) = endpoint else {
            return out.close(endpoint, Closing::Reset);
        };
        if let Some(peer) = self.peer(endpoint) {
            peer.state = State::Suspect;
        }
        router.link(now, backend, Link::Suspect);
        out.event(Level::Warn, "diameter_watchdog_unanswered", || {
            router.backend(backend).map(|view| view.name.to_owned()).unwrap_or_default()
        });
        self.fail_over_from(now, endpoint, router, out);
    }
}

/// What a CER or CEA tells.
struct Told<'a> {
    host: &'a [u8],
    realm: &'a [u8],
    result: Option<u32>,
    applications: Vec<u32>,
}

impl<'a> Told<'a> {
    fn read(bytes: &'a [u8]) -> Self {
        /// A CER of a node that does everything names about thirty.
        const APPLICATIONS_MAX: usize = 256;
        let mut told = Self { host: b"", realm: b"", result: None, applications: Vec::new() };
        for avp in Avps::of(bytes).map_while(Result::ok).filter(|avp| avp.vendor == 0) {
            match avp.code {
                code::ORIGIN_HOST => told.host = avp.data,
                code::ORIGIN_REALM => told.realm = avp.data,
                code::RESULT_CODE => told.result = avp.number(),
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
