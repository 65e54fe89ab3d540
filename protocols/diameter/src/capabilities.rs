//! Who peers are, and what they can do (RFC 6733 5.3): CER and CEA, and the election of one of two
//! connections that both sides opened (5.6.4).

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Instant;

use strowger_contract::{
    BackendId, ClassId, Closing, Endpoint, FlowId, LANE_ACCEPTED, Lanes, Level, Note, Outbox,
    Router,
};

use crate::SPACE;
use crate::answer::result;
use crate::avp::{AVP_MANDATORY, Avps, FLAG_REQUEST, Header, VENDOR_3GPP, code};
use crate::build::{Builder, append};
use crate::engine::DiameterEngine;
use crate::peer::{CAPABILITIES_EXCHANGE, State, is_served, link_name};

/// The application that stands for all.
const RELAY: u32 = 0xffff_ffff;

/// What becomes of a connection whose CER is right.
enum Elected {
    /// It is a client's.
    Client,
    /// It serves as the link to the backend that opened it.
    Link(BackendId),
    /// It comes from a backend that was drained.
    Unwanted,
    /// Another connection to the same node goes on instead.
    Lost(&'static str),
}

/// RFC 6733 4.3.1: a host's name. Whatever else is in it would end up in names, logs and labels.
fn is_identity(host: &[u8]) -> bool {
    const MAX: usize = 255;
    let is_good = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._".contains(byte);
    !host.is_empty() && host.len() <= MAX && host.iter().all(is_good)
}

impl DiameterEngine {
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

    pub(crate) fn introduce(
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

    pub(crate) fn on_cer(
        &mut self,
        now: Instant,
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
        if !is_identity(told.host) {
            let what = (result::INVALID_AVP_VALUE, "Origin-Host is no DiameterIdentity");
            let mut avps = Avps::of(bytes).map_while(Result::ok);
            let failed = avps.find(|avp| avp.code == code::ORIGIN_HOST).map(|avp| avp.whole);
            return refuse_for(self, what, failed, out);
        }
        if let Some((what, failed)) = self.unfit(bytes) {
            return refuse_for(self, what, Some(failed), out);
        }
        let open = self.clients.get(&flow).filter(|peer| peer.state != State::Introducing);
        let again = open.is_some();
        if open.is_some_and(|peer| !peer.host.eq_ignore_ascii_case(told.host)) {
            let text = "this connection is another peer's";
            return refuse(self, result::UNABLE_TO_COMPLY, text, out);
        }
        if !self.clients.get(&flow).is_none_or(|peer| peer.may_be(told.host)) {
            let text = "the certificate is not for this Origin-Host";
            return refuse(self, result::UNKNOWN_PEER, text, out);
        }
        let serves = match self.elect(flow, told.host, router) {
            // Who tells its capabilities again is what it was.
            _ if again => self.clients.get(&flow).and_then(|peer| peer.serves),
            Elected::Client => None,
            Elected::Link(backend) => Some(backend),
            Elected::Unwanted => {
                let text = "this node sends nothing to this server for now";
                return refuse(self, result::TOO_BUSY, text, out);
            }
            Elected::Lost(why) => {
                out.note(Note::Count("diameter_elections_lost"));
                return refuse(self, result::ELECTION_LOST, why, out);
            }
        };
        let peers = &self.settings.peers;
        if serves.is_none()
            && !peers.is_empty()
            && !peers.iter().any(|peer| peer.matches(told.host))
        {
            return refuse(self, result::UNKNOWN_PEER, "this peer is not among those allowed", out);
        }
        let identity = String::from_utf8_lossy(told.host);
        let connections = router.peers_named(&self.settings.listener, &identity);
        if serves.is_none()
            && !again
            && connections >= self.settings.options.peer_connections as usize
        {
            let text = "this peer has as many connections as it may";
            return refuse(self, result::ELECTION_LOST, text, out);
        }
        let open: usize = self.settings.pools.iter().map(|&pool| router.linked(pool)).sum();
        if serves.is_none() && open < self.settings.options.wait_for_backends as usize {
            return refuse(self, result::TOO_BUSY, "too few servers are open yet", out);
        }
        let ours = self.applications(router);
        let common = ours.contains(&RELAY)
            || told.applications.iter().any(|theirs| *theirs == RELAY || ours.contains(theirs));
        if !common {
            return refuse(self, result::NO_COMMON_APPLICATION, "no application in common", out);
        }
        let Some(peer) = self.clients.get_mut(&flow) else { return };
        if !again {
            peer.state = State::Open;
        }
        peer.serves = serves;
        peer.host = Rc::from(told.host);
        peer.realm = Rc::from(told.realm);
        peer.state_id = told.state_id;
        peer.capabilities.clone_from(&told.applications);
        let local = peer.local;
        if !again {
            self.name(flow, told.host, true, router);
        }
        self.report(from, router);
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
        if let Some(backend) = serves.filter(|_| !again) {
            self.serve_as_link(now, flow, backend, bytes, router, out);
        }
        out.event(Level::Info, "diameter_client_open", || {
            String::from_utf8_lossy(told.host).into_owned()
        });
    }

    /// RFC 6733 5.6.4: of two connections that we and a backend opened to each other one stays. The
    /// one that is open stays (5.6: R-Reject); of two that are being introduced, the one that was
    /// opened by the node whose name is the lesser one, octet by octet. A backend that is to have
    /// several connections opens its own beside them, and there it is a client.
    fn elect(&self, flow: FlowId, host: &[u8], router: &dyn Router) -> Elected {
        let mut pools = self.settings.pools.iter();
        let backend = pools.find_map(|&pool| router.named(pool, host));
        let view = backend.and_then(|backend| router.backend(backend));
        let (Some(backend), Some(view), true) = (backend, view, self.settings.options.election)
        else {
            return Elected::Client;
        };
        // A name alone gets nobody a backend's traffic.
        let from_there =
            self.clients.get(&flow).is_some_and(|peer| peer.may_serve_at(view.address));
        if view.connections > 1 || !from_there {
            return Elected::Client;
        }
        let serves = |lanes: u32, lane: u8| lanes & Lanes::bit(lane) != 0;
        let itself = self.clients.get(&flow).is_some_and(|peer| peer.serves == Some(backend));
        if itself {
            return Elected::Link(backend);
        }
        if !view.is_wanted {
            return Elected::Unwanted;
        }
        if serves(view.lanes.up | view.lanes.introducing, LANE_ACCEPTED) {
            return Elected::Lost("this peer has connected already");
        }
        if serves(view.lanes.up, 0) {
            return Elected::Lost("this node has connected to this peer already");
        }
        let ours = self.settings.options.origin_host.as_bytes();
        if serves(view.lanes.introducing, 0) && !wins(ours, host) {
            return Elected::Lost("this node's own connection to this peer goes on");
        }
        Elected::Link(backend)
    }

    /// A connection that a backend opened is its link from now on, instead of one of ours.
    fn serve_as_link(
        &mut self,
        now: Instant,
        flow: FlowId,
        backend: BackendId,
        cer: &[u8],
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let from = Endpoint::Client(flow);
        let name = router.keyer().session(SPACE + 1, &link_name(backend));
        router.name_flow(name, flow);
        out.note(Note::Count("diameter_links_accepted"));
        out.close(Endpoint::Backend(backend), Closing::Reset);
        self.note_state(now, from, cer, true, router, out);
        self.introduced(now, from, router, out);
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
    pub(crate) fn name(&mut self, flow: FlowId, host: &[u8], here: bool, router: &mut dyn Router) {
        self.lower.clear();
        self.lower.extend(host.iter().map(u8::to_ascii_lowercase));
        let name = router.keyer().session(SPACE + 1, &self.lower);
        if here { router.name_flow(name, flow) } else { router.unname_flow(name, flow) }
    }

    pub(crate) fn on_cea(
        &mut self,
        now: Instant,
        from: Endpoint,
        bytes: &[u8],
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(link) = from.as_link() else { return };
        let backend = link.0;
        let told = Told::read(bytes);
        let expected = router.backend(backend).and_then(|view| view.identity.map(str::to_owned));
        let stranger =
            expected.filter(|expected| !told.host.eq_ignore_ascii_case(expected.as_bytes()));
        let Some(peer) =
            self.backends.get_mut(&link).filter(|peer| peer.state == State::Introducing)
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
        if is_served(backend, router) {
            // It has connected itself meanwhile.
            return out.close(from, Closing::Reset);
        }
        peer.host = Rc::from(told.host);
        peer.realm = Rc::from(told.realm);
        peer.capabilities = told.applications;
        self.note_state(now, from, bytes, true, router, out);
        self.introduced(now, from, router, out);
    }
}

/// Whether we win against a node (RFC 6733 5.6.4): our name is the greater one as octets. Who wins
/// closes the connection that it opened itself.
fn wins(ours: &[u8], theirs: &[u8]) -> bool {
    ours > theirs
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
