//! Where a request goes (RFC 3261 16.4 to 16.6): our own Route values and their token, the next
//! Route, the Request-URI, or a pool.

use std::net::SocketAddr;

use strowger_contract::{Endpoint, Message, Pin, PoolId, Router, Transport, WorkerId, stable_hash};

use crate::access::any;
use crate::classify::is_emergency;
use crate::engine::Settings;
use crate::flow::{ClientFlow, reads_path_token};
use crate::lookup::Named;
use crate::options::Matched;
use crate::scan::{Name, Scan};
use crate::uri::{Uri, tag};
use crate::write::{all_values, route_uri};

/// Where a request goes, and what that does to its Route and Request-URI.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target<'a> {
    pub(crate) hop: Hop,
    /// The next hop's name, for [`Hop::Name`].
    pub(crate) name: Option<Named<'a>>,
    /// Route values of ours to take off.
    pub(crate) pop_routes: usize,
    /// A new Request-URI.
    pub(crate) uri: Option<&'a [u8]>,
    pub(crate) drop_last_route: bool,
    pub(crate) add_route: Option<&'a [u8]>,
    /// For the Record-Route token: whether the dialog was begun by a backend.
    pub(crate) begun_by_backend: bool,
    /// Whether it is an emergency: by what it says itself, its dialog's token, or its listener's
    /// rules.
    pub(crate) emergency: bool,
    /// Whether a token of ours vouches for its dialog.
    pub(crate) vouched: bool,
    /// Whether its dialog's token says that it was begun as one.
    pub(crate) kept_emergency: bool,
    /// Whether this request comes from an instance, or from its side of a dialog.
    pub(crate) from_backend: bool,
    /// The worker that keeps the call's record, as our Record-Route said.
    pub(crate) keeper: Option<WorkerId>,
}

/// The next hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hop {
    /// A backend of the pool; `pin` if a token names it.
    Backend { pool: PoolId, pin: Option<Pin>, in_session: bool },
    /// An address: the client's side of a dialog, or what a backend wants reached. `pin` is the
    /// instance whose dialog it is.
    Address { transport: Transport, address: SocketAddr, pin: Option<Pin> },
    /// The connection of the client's side of a dialog, as our Record-Route named it; `address` is
    /// what its Contact says.
    Flow { client: ClientFlow, address: SocketAddr, pin: Option<Pin> },
    /// A host whose address name servers know; `pin` as for an address.
    Name { pin: Option<Pin> },
    /// There is none.
    Nowhere(u16, &'static str),
}

/// What binds a token to a dialog: its Call-ID and the tag of the side that began it.
pub(crate) fn dialog_binding(call_id: u64, initiator_tag: &[u8]) -> u64 {
    call_id ^ stable_hash(initiator_tag).rotate_left(17)
}

/// The mark of a token whose dialog was begun by a backend.
pub(crate) const MARK_BACKEND: u8 = 1;

/// The mark of a token whose dialog was begun as an emergency: it stays one to its end, though
/// requests within carry neither the URN nor a Resource-Priority.
pub(crate) const MARK_EMERGENCY: u8 = 2;

/// What our own Route value says.
#[derive(Clone, Copy, Default)]
struct Told<'a> {
    token: Option<&'a [u8]>,
    flow: Option<ClientFlow>,
    /// RFC 5626 5.1: it stood in a Path of ours.
    outbound: bool,
}

impl<'a> Told<'a> {
    fn of(route: &Uri<'a>) -> Self {
        Self {
            token: route.user,
            flow: ClientFlow::read(route),
            outbound: route.parameter(b"ob").is_some(),
        }
    }
}

struct Side {
    pin: Pin,
    to_backend: bool,
    begun_by_backend: bool,
    emergency: bool,
}

/// Decides.
pub(crate) fn target<'a>(
    settings: &Settings,
    message: &Message<'a>,
    scan: &'a Scan,
    method: &[u8],
    uri: &'a [u8],
    call_id: u64,
    router: &dyn Router,
) -> Target<'a> {
    let bytes = message.bytes;
    let parsed = Uri::parse(uri);
    let mut target = Target {
        hop: Hop::Nowhere(500, ""),
        name: None,
        pop_routes: 0,
        uri: None,
        drop_last_route: false,
        add_route: None,
        begun_by_backend: false,
        emergency: is_emergency(bytes, scan, uri, heeds_priority(settings, message, router)),
        vouched: false,
        kept_emergency: false,
        from_backend: false,
        keeper: None,
    };
    let mut told = Told::default();
    // 16.4: a strict router before us put our Record-Route into the Request-URI.
    let ours = |uri: &Uri<'_>| settings.local.is_ours(uri.host, Some(uri.port_or_default()));
    let mut request_uri = uri;
    if parsed.is_some_and(|uri| ours(&uri) && uri.user.is_some_and(is_token_like))
        && let Some(last) = all_values(bytes, scan, Name::Route).last().and_then(route_uri)
    {
        told = parsed.as_ref().map(Told::of).unwrap_or_default();
        request_uri = last;
        target.uri = Some(last);
        target.drop_last_route = true;
    }
    let routes = all_values(bytes, scan, Name::Route).count() - usize::from(target.drop_last_route);
    let mut next = None;
    for value in all_values(bytes, scan, Name::Route).take(routes) {
        let uri = route_uri(value);
        let parsed = uri.and_then(Uri::parse);
        if let Some(route) = parsed.filter(ours) {
            if told.token.is_none() {
                told = Told::of(&route);
            }
            target.keeper = target.keeper.or_else(|| keeper(&route));
            target.pop_routes += 1;
        } else {
            next = uri;
            break;
        }
    }
    if let Some(outcome) = outbound(settings, message, &told, router) {
        towards_flow(&mut target, next, request_uri, outcome, source_backend(message, router));
        return target;
    }
    let mut side =
        told.token.and_then(|token| side(bytes, scan, token, told.flow, call_id, router));
    if let Some(side) = &mut side
        && !side.to_backend
        && !is_inside(settings, message, router)
    {
        // A client that swaps the tags of its own dialog would be taken for the instance, whose requests
        // go wherever they say. It gets the instance, which knows no such dialog.
        side.to_backend = true;
    }
    target.vouched = side.is_some();
    target.kept_emergency = side.as_ref().is_some_and(|side| side.emergency);
    target.emergency |= target.kept_emergency;
    let source = source_backend(message, router);
    target.begun_by_backend = match &side {
        Some(side) => side.begun_by_backend,
        None => source.is_some(),
    };
    let in_dialog = scan.value(bytes, Name::To).and_then(tag).is_some();
    let chosen = settings.pool_for(&Matched {
        message: bytes,
        scan,
        method,
        uri: request_uri,
        transport: message.transport.scheme(),
        source: message.remote.ip(),
    });
    if let Some(side) = &side
        && side.to_backend
    {
        let pool = router
            .resolve(side.pin)
            .and_then(|backend| router.backend(backend))
            .map(|view| view.pool);
        let pool = pool.or(chosen).unwrap_or(PoolId(u32::MAX));
        target.hop = Hop::Backend { pool, pin: Some(side.pin), in_session: true };
        return target;
    }
    let from_backend = side.is_some() || source.is_some();
    target.from_backend = from_backend;
    if !from_backend {
        // RFC 3608: a Service-Route names the instance that serves the user.
        let served = next
            .and_then(Uri::parse)
            .and_then(|uri| uri.address())
            .and_then(|address| router.backend_at(address))
            .and_then(|backend| router.backend(backend))
            .filter(|view| settings.has_pool(view.pool));
        if let Some(view) = served {
            let (pool, pin) = (view.pool, Some(view.pin));
            target.hop = Hop::Backend { pool, pin, in_session: in_dialog };
            return target;
        }
        target.hop = match chosen {
            Some(pool) => Hop::Backend { pool, pin: None, in_session: in_dialog },
            None => Hop::Nowhere(404, "No Route For This Request"),
        };
        return target;
    }
    // What the token did not vouch for is nobody's connection; nor is one of an earlier start.
    let flow = told.flow.filter(|flow| side.is_some() && flow.is_current(settings.epoch));
    let pin = side.map(|side| side.pin).or(source);
    towards_address(settings, &mut target, next, request_uri, pin, flow, chosen);
    target
}

/// RFC 5626 5.3: what a Path value of ours says of the flow to follow, if the request carries one and
/// does not come from that very client.
fn outbound(
    settings: &Settings,
    message: &Message<'_>,
    told: &Told<'_>,
    router: &dyn Router,
) -> Option<Result<ClientFlow, Hop>> {
    let (token, flow) = (told.token?, told.flow?);
    if flow.endpoint == message.from {
        // 5.3.2: the client's own request, on its way out.
        return None;
    }
    if !reads_path_token(token, flow, router) {
        // A token that an earlier start or somebody else signed leads to nobody: the registrar shall
        // try the user's other flows. Tokens of Record-Route are looked at elsewhere.
        return told.outbound.then_some(Err(Hop::Nowhere(430, "Flow Failed")));
    }
    let current = flow.is_current(settings.epoch);
    Some(if current { Ok(flow) } else { Err(Hop::Nowhere(430, "Flow Failed")) })
}

/// A request for a registered client goes over the flow that it registered by.
fn towards_flow<'a>(
    target: &mut Target<'a>,
    next: Option<&'a [u8]>,
    request_uri: &'a [u8],
    flow: Result<ClientFlow, Hop>,
    source: Option<Pin>,
) {
    target.from_backend = source.is_some();
    target.begun_by_backend = source.is_some();
    route_strictly(target, next, request_uri);
    target.hop = match flow {
        Err(dead) => dead,
        Ok(client) => {
            let said = Uri::parse(next.unwrap_or(request_uri)).and_then(|uri| uri.address());
            Hop::Flow { client, address: client.address(said), pin: source }
        }
    };
}

/// RFC 3261 16.6 step 6: what a next hop that routes strictly needs.
fn route_strictly<'a>(target: &mut Target<'a>, next: Option<&'a [u8]>, request_uri: &'a [u8]) {
    if let Some(hop) = next
        && Uri::parse(hop).is_some_and(|uri| !uri.is_loose())
    {
        target.add_route = Some(request_uri);
        target.uri = Some(hop);
        target.pop_routes += 1;
    }
}

/// A backend's own request, or one of the answering side of a dialog: it goes where it says.
fn towards_address<'a>(
    settings: &Settings,
    target: &mut Target<'a>,
    next: Option<&'a [u8]>,
    request_uri: &'a [u8],
    pin: Option<Pin>,
    flow: Option<ClientFlow>,
    pool: Option<PoolId>,
) {
    let hop = next.unwrap_or(request_uri);
    let Some(uri) = Uri::parse(hop) else {
        target.hop = Hop::Nowhere(416, "Unsupported URI Scheme");
        return;
    };
    route_strictly(target, next, request_uri);
    if let Some(client) = flow {
        // The neighbour that this dialog came from is at the other end of its connection, whatever
        // its Contact says.
        let address = client.address(uri.address());
        target.hop = Hop::Flow { client, address, pin };
        return;
    }
    let transport = uri.transport();
    target.hop = match uri.address() {
        _ if settings.local.is_ours(uri.host, Some(uri.port_or_default())) => match pool {
            Some(pool) => Hop::Backend { pool, pin: None, in_session: false },
            None => Hop::Nowhere(404, "No Route For This Request"),
        },
        Some(address) if matches!(transport, Transport::Udp | Transport::Tcp | Transport::Tls) => {
            Hop::Address { transport, address, pin }
        }
        None if matches!(transport, Transport::Udp | Transport::Tcp | Transport::Tls) => {
            target.name = Some(Named::of(&uri));
            Hop::Name { pin }
        }
        Some(_) | None => Hop::Nowhere(500, "Transport Of The Next Hop Not Supported"),
    };
}

/// The worker that our Record-Route names.
fn keeper(route: &Uri<'_>) -> Option<WorkerId> {
    let text = route.parameter(b"sw").flatten()?;
    u8::from_str_radix(std::str::from_utf8(text).ok()?, 16).ok().map(WorkerId)
}

fn is_token_like(user: &[u8]) -> bool {
    user.len() == strowger_contract::token::TOKEN_BYTES
}

/// Which side of its dialog a request comes from: the token is bound to the tag of the side that
/// began it, and that tag is in From or in To.
fn side(
    message: &[u8],
    scan: &Scan,
    token: &[u8],
    flow: Option<ClientFlow>,
    call_id: u64,
    router: &dyn Router,
) -> Option<Side> {
    let call_id = call_id ^ ClientFlow::binding(flow);
    let tag_of = |name| scan.value(message, name).and_then(tag);
    let from = tag_of(Name::From).unwrap_or_default();
    let (pin, mark, by_initiator) = match router.unseal(token, dialog_binding(call_id, from)) {
        Some((pin, mark)) => (pin, mark, true),
        None => {
            let (pin, mark) = router.unseal(token, dialog_binding(call_id, tag_of(Name::To)?))?;
            (pin, mark, false)
        }
    };
    let begun_by_backend = mark & MARK_BACKEND != 0;
    Some(Side {
        pin,
        to_backend: by_initiator != begun_by_backend,
        begun_by_backend,
        emergency: mark & MARK_EMERGENCY != 0,
    })
}

/// RFC 4412 4.7: whether what a message says of its own priority is believed: of peers and instances, and,
/// unless `trusted` says who is, of everybody.
pub(crate) fn heeds_priority(
    settings: &Settings,
    message: &Message<'_>,
    router: &dyn Router,
) -> bool {
    let (options, ip) = (&settings.options, message.remote.ip());
    options.trusted.as_ref().is_none_or(|trusted| any(trusted, ip))
        || any(&options.peers, ip)
        || matches!(message.from, Endpoint::Backend(_))
        || router.is_backend_ip(ip)
}

/// Whether a message may be one of the instances' side: by the IP address of one of them, or of what
/// `trusted` lists.
fn is_inside(settings: &Settings, message: &Message<'_>, router: &dyn Router) -> bool {
    let ip = message.remote.ip();
    matches!(message.from, Endpoint::Backend(_))
        || router.is_backend_ip(ip)
        || settings.options.trusted.as_ref().is_some_and(|trusted| any(trusted, ip))
}

/// The backend that a message comes from, if it comes from one.
fn source_backend(message: &Message<'_>, router: &dyn Router) -> Option<Pin> {
    let backend = match message.from {
        Endpoint::Backend(backend) => backend,
        _ => router.backend_at(message.remote)?,
    };
    router.backend(backend).map(|view| view.pin)
}
