//! Who is let in, and how much of whom is taken: access lists, scanners, floods, rates.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use strowger_contract::{ClassId, Endpoint, Message, Note, Outbox, Router};

use crate::access::any;
use crate::engine::SipEngine;
use crate::incoming::Incoming;
use crate::limit::{Bucket, Buckets, Rate, retry_after};
use crate::options::{Refuse, SipOptions};
use crate::respond::Answer;
use crate::scan::{Name, Scan};
use crate::uri::name_addr;

/// Looks through all transactions for a lost peer that is no instance, at most.
const LOOKS: Rate = Rate { per_second: 200, burst: 50 };

/// What the guard remembers.
#[derive(Debug, Default)]
pub(crate) struct Guard {
    sources: Buckets,
    /// What sources have of emergencies.
    emergencies: Buckets,
    floods: Buckets,
    callers: Buckets,
    methods: Vec<(String, Bucket)>,
    looks: Option<Bucket>,
}

/// Spaces of keyed hashes.
const SOURCE: u8 = 0x60;
const CALLER: u8 = 0x61;

impl Guard {
    /// Whether a lost peer is worth a look: a connection always is, whose own requests are looked at only,
    /// and so is an instance; for other addresses, that could send errors in bulk, all transactions
    /// are looked through.
    pub(crate) fn may_look(&mut self, now: Instant, peer: Endpoint, router: &dyn Router) -> bool {
        let Endpoint::Datagram { remote, .. } = peer else { return true };
        if router.backend_at(remote).is_some() {
            return true;
        }
        self.looks.get_or_insert_with(|| Bucket::full(0, LOOKS, now)).take(LOOKS, now)
    }
}

fn is_peer(options: &SipOptions, ip: IpAddr) -> bool {
    any(&options.peers, ip)
}

fn source_key(ip: IpAddr, router: &dyn Router) -> u64 {
    match ip.to_canonical() {
        IpAddr::V4(ip) => router.keyer().keyed(SOURCE, &ip.octets()),
        // A subscriber has a /64.
        IpAddr::V6(ip) => router.keyer().keyed(SOURCE, &ip.octets()[..8]),
    }
}

impl SipEngine {
    /// Why a request goes no further and gets no answer, if it does not.
    pub(crate) fn kept_out(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        scan: &Scan,
        router: &dyn Router,
    ) -> Option<&'static str> {
        let ip = message.remote.ip();
        if is_instance(message.from, message.remote, router) {
            return None;
        }
        if let Some(why) = self.flooded(now, message, router) {
            return Some(why);
        }
        let options = &self.settings.options;
        if options.access.refuse == Refuse::Drop && !let_in(options, ip) {
            return Some("access_denied");
        }
        let agent = scan.value(message.bytes, Name::UserAgent);
        let scans = agent.is_some_and(|agent| {
            options.scanners.iter().any(|word| contains(agent, word.as_bytes()))
        });
        scans.then_some("scanner")
    }

    /// Whether its sender sends too much of anything.
    pub(crate) fn flooded(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        router: &dyn Router,
    ) -> Option<&'static str> {
        let (options, ip) = (&self.settings.options, message.remote.ip());
        let rate = options.limits.flood?;
        let over =
            !is_peer(options, ip) && !self.guard.floods.take(source_key(ip, router), rate, now);
        over.then_some("flood")
    }

    /// The answer to a request that is over a limit, or from outside of the access list.
    pub(crate) fn over_a_limit(
        &mut self,
        now: Instant,
        incoming: &Incoming<'_>,
        class: ClassId,
        in_dialog: bool,
        router: &dyn Router,
        out: &mut Outbox,
    ) -> Option<Answer<'static>> {
        let message = &incoming.message;
        let (options, ip) = (&self.settings.options, message.remote.ip());
        if is_instance(message.from, message.remote, router) {
            return None;
        }
        if options.access.refuse == Refuse::Answer && !let_in(options, ip) {
            out.note(Note::Count("sip_access_denied"));
            return Some(Answer::new(403, "Forbidden"));
        }
        if in_dialog {
            return None;
        }
        // Emergencies have a bucket of their own; what is more than that is counted as the rest is.
        let mut spares = |rate| {
            is_peer(options, ip) || self.guard.emergencies.take(source_key(ip, router), rate, now)
        };
        if class == ClassId::EMERGENCY && options.limits.per_source.is_none_or(&mut spares) {
            return None;
        }
        let over = |rate: Rate, reason| {
            Some(Answer { retry_after: Some(retry_after(rate)), ..Answer::new(503, reason) })
        };
        let limits = &options.limits;
        if let Some(rate) = limits.per_source
            && !is_peer(options, ip)
            && !self.guard.sources.take(source_key(ip, router), rate, now)
        {
            out.note(Note::Count("sip_over_source_limit"));
            return over(rate, "Too Many Requests From This Address");
        }
        if let Some(rate) = limits.per_caller
            && let Some((uri, _)) =
                incoming.scan.value(message.bytes, Name::From).and_then(name_addr)
            && !self.guard.callers.take(router.keyer().keyed(CALLER, uri), rate, now)
        {
            out.note(Note::Count("sip_over_caller_limit"));
            return over(rate, "Too Many Requests From This Caller");
        }
        if let Some((method, rate)) =
            limits.per_method.iter().find(|(method, _)| method.as_bytes() == incoming.name)
        {
            let known = &mut self.guard.methods;
            let index = known.iter().position(|(name, _)| name == method);
            let index = index.unwrap_or_else(|| {
                known.push((method.clone(), Bucket::full(0, *rate, now)));
                known.len() - 1
            });
            if !known[index].1.take(*rate, now) {
                out.note(Note::Count("sip_over_method_limit"));
                return over(*rate, "Too Many Requests Of This Method");
            }
        }
        None
    }
}

fn let_in(options: &SipOptions, ip: IpAddr) -> bool {
    let access = &options.access;
    (access.allow.is_empty() || any(&access.allow, ip)) && !any(&access.deny, ip)
}

/// Whether a message comes from one of the pools' instances.
fn is_instance(from: Endpoint, remote: SocketAddr, router: &dyn Router) -> bool {
    matches!(from, Endpoint::Backend(_)) || router.backend_at(remote).is_some()
}

fn contains(text: &[u8], word: &[u8]) -> bool {
    text.len() >= word.len() && text.windows(word.len()).any(|part| part.eq_ignore_ascii_case(word))
}
