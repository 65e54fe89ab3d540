//! Next hops that are names (RFC 3263): requests are held while name servers are asked, and the
//! places that come out are tried in turn (4.3). A response whose Via names a host is held as well (5).

use std::time::{Duration, Instant};

use slab::Slab;
use strowger_contract::{
    ClassId, Endpoint, Lookup, LookupId, Message, NameScheme, Note, Outbox, Pin, Place, PoolId,
    Router, Transport, Transports, Unresolved,
};

use crate::engine::{Settings, SipEngine};
use crate::incoming::{Incoming, trimmed};
use crate::method::Method;
use crate::options::Matched;
use crate::place::{NextHop, NoPlace};
use crate::respond::Answer;
use crate::scan::{Name, Scan, Start};
use crate::target::{Hop, Target};
use crate::transaction::State;
use crate::uri::{Uri, tag};
use crate::via::Via;

/// How long a name may take, at most: the resolver has its own, shorter time; this is for an answer
/// that was lost.
const LOOKUP_MAX: Duration = Duration::from_secs(70);

/// Messages without a transaction that wait for a name, on one worker, at most, and their bytes.
const HELD_MAX: usize = 1_024;
const HELD_BYTES_MAX: usize = 4 << 20;

/// Marks the lookups of messages without a transaction.
const HELD: u64 = 1 << 63;

/// A host to be looked up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Named<'a> {
    host: &'a [u8],
    secure: bool,
    transport: Option<Transport>,
    port: Option<u16>,
    /// A 3xx named it: the URI is the target's new one.
    pub(crate) by_contact: bool,
}

impl<'a> Named<'a> {
    pub(crate) fn of(uri: &Uri<'a>) -> Self {
        Self {
            host: uri.parameter(b"maddr").flatten().unwrap_or(uri.host),
            secure: uri.secure,
            transport: uri.wanted_transport(),
            port: uri.port,
            by_contact: false,
        }
    }
}

/// The target of a request that a 3xx sent elsewhere.
pub(crate) fn by_contact<'a>(known: Target<'a>, contact: Option<&'a [u8]>) -> Target<'a> {
    let Some(uri) = contact.and_then(Uri::parse) else { return known };
    let name = Named { by_contact: true, ..Named::of(&uri) };
    Target { hop: Hop::Name { pin: None }, name: Some(name), uri: contact, ..known }
}

/// What is said when a name leads nowhere. RFC 3261 21.5.5 has 504 for name servers that do not
/// answer; 478 is what Kamailio and OpenSIPS say of a name that is none.
fn words(why: Unresolved) -> (u16, &'static str) {
    match why {
        Unresolved::NoSuchName | Unresolved::Malformed => (478, "Next Hop Does Not Resolve"),
        Unresolved::NoAnswer => (504, "Name Server Did Not Answer"),
        Unresolved::Busy => (503, "Too Many Names Are Looked Up"),
    }
}

impl Settings {
    fn lookup(&self, scheme: NameScheme, seed: u64) -> Lookup {
        let all = [Transport::Udp, Transport::Tcp, Transport::Tls];
        Lookup {
            scheme,
            transport: None,
            port: None,
            transports: all
                .into_iter()
                .filter(|kind| self.local.has(*kind))
                .collect::<Transports>(),
            ipv4: self.local.has_family(false),
            ipv6: self.local.has_family(true),
            seed,
        }
    }

    fn lookup_of(&self, name: &Named<'_>, seed: u64) -> Lookup {
        let scheme = if name.secure { NameScheme::Sips } else { NameScheme::Sip };
        Lookup { transport: name.transport, port: name.port, ..self.lookup(scheme, seed) }
    }

    fn pool_of(&self, message: &Message<'_>, scan: &Scan) -> Option<PoolId> {
        let Start::Request { method, uri } = scan.start else { return None };
        self.pool_for(&Matched {
            message: message.bytes,
            scan,
            method: method.of(message.bytes),
            uri: uri.of(message.bytes),
            transport: message.transport.scheme(),
            source: message.remote.ip(),
        })
    }
}

impl SipEngine {
    /// Asks where the next hop is. The transaction waits.
    pub(crate) fn look_up(
        &mut self,
        now: Instant,
        slot: u32,
        wanted: &Target<'_>,
        out: &mut Outbox,
    ) -> Result<(), NoPlace> {
        let Some((name, transaction)) = wanted.name.zip(self.transactions.get(slot)) else {
            return Err((Answer::new(500, "No Next Hop"), None));
        };
        transaction.named.until = Some(now + LOOKUP_MAX);
        transaction.named.uri = wanted.uri.filter(|_| name.by_contact).map(Into::into);
        let id = u64::from(slot) << 32 | u64::from(transaction.generation);
        let lookup = self.settings.lookup_of(&name, transaction.call_id);
        out.note(Note::Count("sip_names_looked_up"));
        out.resolve(LookupId(id), lookup, name.host);
        Ok(())
    }

    /// What name servers say.
    pub(crate) fn resolved(
        &mut self,
        now: Instant,
        lookup: LookupId,
        found: Result<&[Place], Unresolved>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        if lookup.0 & HELD != 0 {
            return self.held_resolved(now, lookup, found, router, out);
        }
        let (slot, generation) = ((lookup.0 >> 32) as u32, lookup.0 as u32);
        let Some(transaction) = self.transactions.current(slot, generation) else { return };
        if transaction.named.until.take().is_none() || transaction.state != State::Open {
            // It was cancelled, or has ended.
            return;
        }
        match found {
            Ok(places) => {
                let places = places.iter().rev().map(|place| (place.transport, place.address));
                transaction.named.places = places.collect();
                if !self.next_place(now, slot, router, out) {
                    self.unresolved(now, slot, Unresolved::NoSuchName, router, out);
                }
            }
            Err(why) => self.unresolved(now, slot, why, router, out),
        }
        self.schedule(now, slot);
    }

    /// The name leads nowhere.
    pub(crate) fn unresolved(
        &mut self,
        now: Instant,
        slot: u32,
        why: Unresolved,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        transaction.named = crate::transaction::Naming::default();
        out.note(Note::Count(counted(why)));
        let (code, reason) = words(why);
        self.consider_ours(slot, code, reason);
        self.conclude(now, slot, router, out);
    }

    /// The URI that a 3xx named and whose places are being tried.
    pub(crate) fn named_uri(&mut self, slot: u32) -> Option<Box<[u8]>> {
        self.transactions.get(slot).and_then(|transaction| transaction.named.uri.clone())
    }

    /// Sends the request to the next of the places that its name leads to; whether there was one.
    pub(crate) fn next_place(
        &mut self,
        now: Instant,
        slot: u32,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) -> bool {
        let contact = self.named_uri(slot);
        loop {
            let Some(transaction) = self.transactions.get(slot) else { return false };
            let Some((transport, address)) = transaction.named.places.pop() else { return false };
            let (from, source, local) = (transaction.client, transaction.source, transaction.local);
            let (came_by, arrived) = (transaction.transport, transaction.arrived);
            let sent = self.with_request(slot, |engine, request, scan| {
                let known = engine.target_again(slot, request, scan, router)?;
                let known_pool =
                    if let Hop::Backend { pool, .. } = known.hop { Some(pool) } else { None };
                let wanted = by_contact(known, contact.as_deref());
                let pin = if let Hop::Name { pin } = wanted.hop { pin } else { None };
                if engine.settings.local.is_here(transport, address) {
                    // The name is ours: it is the pool's business.
                    let message = Message {
                        from,
                        transport: came_by,
                        remote: source,
                        local,
                        arrived,
                        bytes: request,
                    };
                    let pool = engine.settings.pool_of(&message, scan)?;
                    let hop = Hop::Backend { pool, pin: None, in_session: false };
                    let wanted = Target { hop, ..wanted };
                    return engine
                        .place_and_send(now, slot, request, scan, &wanted, router, out)
                        .ok();
                }
                if let Some(hop) = instance_at(known_pool, address, router) {
                    let wanted = Target { hop, ..wanted };
                    return engine
                        .place_and_send(now, slot, request, scan, &wanted, router, out)
                        .ok();
                }
                let hop = NextHop { backend: None, pin, transport, address, flow: None };
                engine.send_leg(now, slot, request, scan, &wanted, hop, false, router, out).ok()
            });
            if sent.flatten().is_some() {
                return true;
            }
        }
    }

    /// A response that its Via sends to a host (RFC 3263 5).
    pub(crate) fn hold_response(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        via: &Via<'_>,
        transport: Transport,
        out: &mut Outbox,
    ) {
        if via.is_received_by_address() {
            return out.drop_message("response_to_no_address");
        }
        let seed = strowger_contract::stable_hash(via.whole);
        let lookup = Lookup {
            transport: Some(transport),
            port: via.port,
            ..self.settings.lookup(NameScheme::SipResponse, seed)
        };
        self.hold(now, message, lookup, via.host, out);
    }

    /// A request that is sent on without memory, to a name.
    pub(crate) fn hold_request(
        &mut self,
        now: Instant,
        incoming: &Incoming<'_>,
        target: &Target<'_>,
        out: &mut Outbox,
    ) {
        let Some(name) = target.name else { return out.drop_message("no_next_hop") };
        // RFC 3263 4.1: all of a transaction, and its CANCEL and ACK, go the same way.
        let lookup = self.settings.lookup_of(&name, incoming.call_id);
        self.hold(now, &incoming.message, lookup, name.host, out);
    }

    fn hold(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        lookup: Lookup,
        host: &[u8],
        out: &mut Outbox,
    ) {
        match self.held.put(now, message) {
            Some(id) => {
                out.note(Note::Count("sip_names_looked_up"));
                out.resolve(id, lookup, host);
            }
            None => out.drop_message("too_many_wait_for_names"),
        }
    }

    fn held_resolved(
        &mut self,
        now: Instant,
        id: LookupId,
        found: Result<&[Place], Unresolved>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(held) = self.held.take(id) else { return };
        let mut scan = std::mem::take(&mut self.other_scan);
        if scan.scan(&held.bytes).is_ok() {
            let message = held.message();
            let place = found.and_then(|places| {
                let settings = &self.settings;
                let reached =
                    |place: &&Place| settings.endpoint(place.transport, place.address).is_some();
                places.iter().find(reached).copied().ok_or(Unresolved::NoSuchName)
            });
            if let Err(why) = place {
                out.note(Note::Count(counted(why)));
            }
            match scan.start {
                Start::Response { .. } => {
                    self.response_resolved(&message, &scan, place, router, out);
                }
                _ => self.request_resolved(now, &message, &scan, place, router, out),
            }
        }
        self.other_scan = scan;
    }

    fn response_resolved(
        &mut self,
        message: &Message<'_>,
        scan: &Scan,
        place: Result<Place, Unresolved>,
        router: &dyn Router,
        out: &mut Outbox,
    ) {
        let reached = place.ok().map(|place| (place.transport, place.address));
        let to = reached.and_then(|(transport, at)| self.settings.endpoint(transport, at));
        let (Some(to), Some(reached)) = (to, reached) else {
            return out.drop_message("response_to_unknown_host");
        };
        out.note(Note::Count("sip_responses_stateless"));
        // Its pool is not known any more.
        self.overload.telling = None;
        self.send_back(to, reached, message, scan, router, out);
    }

    fn request_resolved(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        scan: &Scan,
        place: Result<Place, Unresolved>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(incoming) = Incoming::read(message, scan, router) else { return };
        let body = trimmed(&incoming);
        let incoming =
            Incoming { message: Message { bytes: body, ..incoming.message }, ..incoming };
        let target = self.target_of(&incoming, router);
        let Hop::Name { pin } = target.hop else {
            // The configuration changed meanwhile.
            return out.drop_message("no_next_hop");
        };
        let one_way = incoming.method == Method::Ack;
        let in_dialog = scan.value(body, Name::To).and_then(tag).is_some();
        let class = match incoming.method {
            Method::Ack | Method::Cancel => ClassId::CONTROL,
            _ if target.kept_emergency => ClassId::EMERGENCY,
            _ => self.class_of(&incoming, in_dialog, router),
        };
        let target = Target { emergency: class == ClassId::EMERGENCY, ..target };
        let place = match place {
            Ok(place) => place,
            Err(_) if one_way => return out.drop_message("ack_to_unknown_host"),
            Err(why) => {
                let (code, reason) = words(why);
                return self.refuse(now, &incoming, class, &Answer::new(code, reason), out);
            }
        };
        if self.settings.local.is_here(place.transport, place.address) {
            let hop = match self.settings.pool_of(&incoming.message, scan) {
                Some(pool) => Hop::Backend { pool, pin: None, in_session: in_dialog },
                None => Hop::Nowhere(404, "No Route For This Request"),
            };
            let target = Target { hop, ..target };
            return self.forward_stateless(now, &incoming, &target, class, router, out);
        }
        let hop = NextHop {
            backend: None,
            pin,
            transport: place.transport,
            address: place.address,
            flow: None,
        };
        self.send_stateless(now, &incoming, &target, class, &hop, router, out);
    }
}

/// The instance that a redirection's name leads to, if it is one of the pool's.
fn instance_at(
    pool: Option<PoolId>,
    address: std::net::SocketAddr,
    router: &dyn Router,
) -> Option<Hop> {
    let pin: Pin = router.backend(router.backend_at(address)?)?.pin;
    Some(Hop::Backend { pool: pool?, pin: Some(pin), in_session: false })
}

fn counted(why: Unresolved) -> &'static str {
    match why {
        Unresolved::NoSuchName => "sip_names_no_such_name",
        Unresolved::NoAnswer => "sip_names_no_answer",
        Unresolved::Busy => "sip_names_busy",
        Unresolved::Malformed => "sip_names_malformed",
    }
}

/// Messages without a transaction that wait for a name.
#[derive(Default)]
pub(crate) struct Held {
    messages: Slab<HeldMessage>,
    bytes: usize,
    number: u32,
}

struct HeldMessage {
    number: u32,
    until: Instant,
    from: Endpoint,
    transport: Transport,
    remote: std::net::SocketAddr,
    local: std::net::SocketAddr,
    arrived: Instant,
    bytes: Vec<u8>,
}

impl HeldMessage {
    fn message(&self) -> Message<'_> {
        Message {
            from: self.from,
            transport: self.transport,
            remote: self.remote,
            local: self.local,
            arrived: self.arrived,
            bytes: &self.bytes,
        }
    }
}

impl Held {
    fn put(&mut self, now: Instant, message: &Message<'_>) -> Option<LookupId> {
        let full = |held: &Self| {
            held.messages.len() >= HELD_MAX || held.bytes + message.bytes.len() > HELD_BYTES_MAX
        };
        if full(self) {
            // Answers that were lost must not hold the room for ever.
            self.messages.retain(|_, held| held.until > now);
            self.bytes = self.messages.iter().map(|(_, held)| held.bytes.len()).sum();
            if full(self) {
                return None;
            }
        }
        self.number = self.number.wrapping_add(1);
        let number = self.number;
        self.bytes += message.bytes.len();
        let slot = self.messages.insert(HeldMessage {
            number,
            until: now + LOOKUP_MAX,
            from: message.from,
            transport: message.transport,
            remote: message.remote,
            local: message.local,
            arrived: message.arrived,
            bytes: message.bytes.to_vec(),
        });
        Some(LookupId(HELD | (slot as u64) << 32 | u64::from(number)))
    }

    fn take(&mut self, id: LookupId) -> Option<HeldMessage> {
        let slot = ((id.0 & !HELD) >> 32) as usize;
        self.messages.get(slot).filter(|held| held.number == id.0 as u32)?;
        let held = self.messages.remove(slot);
        self.bytes -= held.bytes.len();
        Some(held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_without_a_transaction_is_bounded() {
        let now = Instant::now();
        let address = std::net::SocketAddr::from(([192, 0, 2, 1], 5060));
        let bytes = vec![b'x'; 60_000];
        let message = |bytes| Message {
            from: Endpoint::Datagram { socket: 0, remote: address },
            transport: Transport::Udp,
            remote: address,
            local: address,
            arrived: now,
            bytes,
        };
        let mut held = Held::default();
        let mut ids = Vec::new();
        while let Some(id) = held.put(now, &message(&bytes)) {
            ids.push(id);
        }
        assert_eq!(ids.len(), HELD_BYTES_MAX / 60_000);
        assert!(held.take(ids[0]).is_some());
        assert!(held.take(ids[0]).is_none(), "once");
        assert!(held.put(now, &message(&bytes)).is_some(), "there is room again");
        assert!(held.put(now, &message(&bytes)).is_none());
        let later = now + LOOKUP_MAX;
        assert!(held.put(later, &message(&bytes)).is_some(), "what was lost makes room");
        assert_eq!((held.messages.len(), held.bytes), (1, 60_000));
    }
}
