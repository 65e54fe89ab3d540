//! A request as it goes to its next hop.

use strowger_contract::{Endpoint, Router, Transport};

use crate::access::any;
use crate::branch::Branch;
use crate::engine::SipEngine;
use crate::flow::{ClientFlow, Path, knows_path};
use crate::method::Method;
use crate::options::PathMode;
use crate::place::NextHop;
use crate::rules::{Facts, edit};
use crate::scan::{Name, Scan};
use crate::target::{MARK_BACKEND, MARK_EMERGENCY, Target, dialog_binding};
use crate::uri::tag;
use crate::write::Forward;

/// Where a request came from.
pub(crate) struct Origin {
    pub(crate) client: Endpoint,
    pub(crate) source: std::net::SocketAddr,
    pub(crate) transport: Transport,
    pub(crate) local: std::net::SocketAddr,
    pub(crate) method: Method,
    pub(crate) from_backend: bool,
}

impl Origin {
    /// What it came over; `client` is where answers go, which may be another port (RFC 3581).
    fn from(&self) -> Endpoint {
        match self.client {
            Endpoint::Datagram { socket, .. } => Endpoint::Datagram { socket, remote: self.source },
            other => other,
        }
    }
}

#[allow(
    clippy::too_many_arguments,
    reason = "one call of one writer; a struct would name each twice"
)]
pub(crate) fn forward(
    settings: &crate::engine::Settings,
    request: &[u8],
    scan: &Scan,
    target: &Target<'_>,
    hop: &NextHop,
    branch: Branch,
    origin: &Origin,
    call_id: u64,
    breadth: Option<u32>,
    router: &dyn Router,
    out: &mut Vec<u8>,
) {
    let local = &settings.local;
    let facing = local.facing(hop.transport, hop.address.is_ipv6());
    let receiving = local.receiving(origin.transport, origin.local);
    let wanted = settings.options.record_route && origin.method.is_record_routed();
    let from_tag = scan.value(request, Name::From).and_then(tag).unwrap_or_default();
    let to_tag = scan.value(request, Name::To).and_then(tag);
    let flow = match hop.flow {
        None if wanted && hop.backend.is_some() => ClientFlow::of_dialog(
            origin.from(),
            origin.transport,
            origin.source,
            request,
            scan,
            settings.epoch,
        ),
        known => known,
    };
    let token = hop.pin.filter(|_| wanted).map(|pin| {
        // In a dialog the side that began it may be the one that now answers.
        let from_backend = hop.backend.is_none();
        let by_initiator = to_tag.is_none() || from_backend == target.begun_by_backend;
        let initiator = if by_initiator { from_tag } else { to_tag.unwrap_or_default() };
        let mark = if target.begun_by_backend { MARK_BACKEND } else { 0 }
            | if target.emergency { MARK_EMERGENCY } else { 0 };
        let binding = dialog_binding(call_id ^ ClientFlow::binding(flow), initiator);
        router.seal(pin, mark, binding)
    });
    let path = (origin.method == Method::Register && hop.backend.is_some())
        .then(|| path(settings, request, scan, origin, router))
        .flatten();
    let side = |socket: u16| (local.transport(socket), local.text(socket));
    let other = (receiving != facing).then(|| side(receiving));
    Forward {
        message: request,
        scan,
        uri: target.uri,
        transport: hop.transport,
        sent_by: local.text(facing),
        branch,
        call_id,
        record_route: token,
        path,
        flow,
        sides: [Some(side(facing)), other],
        asks_load: settings.options.overload_control.client && hop.backend.is_some(),
        source: origin.source,
        pop_routes: target.pop_routes,
        drop_last_route: target.drop_last_route,
        add_route: target.add_route,
        breadth,
        worker: (settings.options.cdr
            || matches!(origin.method, Method::Invite | Method::Subscribe | Method::Refer))
        .then_some(settings.worker),
    }
    .write(router, out);
}

/// Our Path for a REGISTER of a client, if there is to be one.
fn path(
    settings: &crate::engine::Settings,
    request: &[u8],
    scan: &Scan,
    origin: &Origin,
    router: &dyn Router,
) -> Option<Path> {
    let wanted = match settings.options.path {
        PathMode::Never => false,
        PathMode::Supported => knows_path(request, scan),
        PathMode::Always => true,
    };
    (wanted && !origin.from_backend).then(|| {
        let (source, epoch) = (origin.source, settings.epoch);
        Path::of(origin.from(), origin.transport, source, request, scan, epoch, router)
    })
}

impl SipEngine {
    /// What the operator's rules and trust make of a message that is about to go out.
    pub(crate) fn edit(
        &mut self,
        sent: &mut Vec<u8>,
        origin: &Origin,
        to_instance: bool,
        _router: &dyn Router,
    ) {
        let options = &self.settings.options;
        let trusts = |ip| options.trusted.as_ref().is_none_or(|trusted| any(trusted, ip));
        // RFC 3325 5: from outside of the trust domain nobody asserts anything.
        let drop_asserted = !origin.from_backend && !trusts(origin.source.ip());
        if options.header_rules.is_empty() && !drop_asserted {
            return;
        }
        let facts = Facts {
            method: origin.method.word().as_bytes(),
            source: origin.source,
            transport: origin.transport.scheme(),
            to_instance,
        };
        let (mut scan, mut edited) =
            (std::mem::take(&mut self.edit_scan), std::mem::take(&mut self.edited));
        if scan.scan(sent).is_ok()
            && edit(&options.header_rules, drop_asserted, &facts, sent, &scan, &mut edited)
        {
            std::mem::swap(sent, &mut edited);
        }
        (self.edit_scan, self.edited) = (scan, edited);
    }
}
