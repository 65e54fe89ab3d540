//! Which places a name leads to (RFC 3263): NAPTR, then SRV, then addresses.
//!
//! A name server that says nothing about one step does not end the walk: zones without NAPTR often
//! sit behind servers that answer such questions with an error, and the call is to go through.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use hickory_resolver::proto::rr::{Name, RData, RecordType};
use strowger_contract::{Lookup, NameScheme, PLACES_MAX, Transport, Unresolved};

use super::ask::{Dns, Miss, Records};
use super::order::{Found, Group, Target};

/// Transports that one name may lead to, at most.
const GROUPS_MAX: usize = 4;

/// What was found although somebody did not answer is asked again this soon.
const PARTIAL: Duration = Duration::from_secs(30);

/// Services of NAPTR records (RFC 3263 8).
const SERVICES: [(&str, Transport); 3] =
    [("SIP+D2U", Transport::Udp), ("SIP+D2T", Transport::Tcp), ("SIPS+D2T", Transport::Tls)];

/// What is sent over, by preference, where the other side has none (RFC 3263 4.1).
const PREFERRED: [Transport; 3] = [Transport::Udp, Transport::Tcp, Transport::Tls];

/// A name as DNS has it: absolute, so that no search list is tried.
pub(super) fn name_of(host: &[u8]) -> Result<Name, Unresolved> {
    if host.is_empty() || host.len() > strowger_contract::HOST_NAME_MAX + 1 {
        return Err(Unresolved::Malformed);
    }
    let text = std::str::from_utf8(host).map_err(|_| Unresolved::Malformed)?;
    let mut name = Name::from_ascii(text).map_err(|_| Unresolved::Malformed)?;
    if name.is_root() {
        return Err(Unresolved::Malformed);
    }
    name.set_fqdn(true);
    Ok(name)
}

/// Walks.
pub(super) async fn find<D: Dns>(dns: &D, host: &Name, lookup: &Lookup) -> Result<Found, Miss> {
    let mut walk = Walk { dns, lookup, until: None, silent: None };
    let groups = walk.groups(host).await;
    let now = Instant::now();
    if !groups.is_empty() {
        let until = walk.until.unwrap_or(now);
        let until = if walk.silent.is_some() { until.min(now + PARTIAL) } else { until };
        return Ok(Found { groups, until });
    }
    Err(walk.silent.unwrap_or_else(|| Miss::Absent { until: walk.until.unwrap_or(now) }))
}

struct Walk<'a, D> {
    dns: &'a D,
    lookup: &'a Lookup,
    /// Until when all that was heard holds.
    until: Option<Instant>,
    silent: Option<Miss>,
}

impl<D: Dns> Walk<'_, D> {
    async fn groups(&mut self, host: &Name) -> Vec<Group> {
        let Lookup { scheme, transport, port, .. } = *self.lookup;
        let secure = scheme == NameScheme::Sips;
        let chosen = transport.or_else(|| port.map(|_| self.default_transport()));
        if let Some(port) = port {
            let transport = chosen.unwrap_or(Transport::Udp);
            return self.addresses(host, transport, port).await;
        }
        if let Some(transport) = transport {
            let groups = match service_name(host, transport) {
                Some(service) => self.service(&service, transport).await,
                None => Vec::new(),
            };
            return self.or_addresses(groups, host, transport).await;
        }
        let mut groups = Vec::new();
        for (service, transport) in self.naptr(host, secure).await {
            groups.extend(self.service(&service, transport).await);
        }
        if groups.is_empty() {
            for transport in PREFERRED {
                let fits = self.lookup.transports.has(transport)
                    && (!secure || transport == Transport::Tls);
                if let Some(service) = service_name(host, transport).filter(|_| fits) {
                    groups.extend(self.service(&service, transport).await);
                }
            }
        }
        let transport = self.default_transport();
        self.or_addresses(groups, host, transport).await
    }

    /// RFC 3263 4.1: UDP for `sip:`, TLS over TCP for `sips:`; what the listener has, if it lacks
    /// that.
    fn default_transport(&self) -> Transport {
        if self.lookup.scheme == NameScheme::Sips {
            return Transport::Tls;
        }
        let has = |transport: &Transport| self.lookup.transports.has(*transport);
        PREFERRED.into_iter().find(has).unwrap_or(Transport::Udp)
    }

    async fn or_addresses(
        &mut self,
        groups: Vec<Group>,
        host: &Name,
        transport: Transport,
    ) -> Vec<Group> {
        if groups.is_empty() {
            return self.addresses(host, transport, default_port(transport)).await;
        }
        groups
    }

    /// The services that can be used, in order.
    async fn naptr(&mut self, host: &Name, secure: bool) -> Vec<(Name, Transport)> {
        let Some(records) = self.ask(host, RecordType::NAPTR).await else { return Vec::new() };
        let mut usable: Vec<(u16, u16, Name, Transport)> = records
            .data
            .into_iter()
            .filter_map(|record| {
                let RData::NAPTR(record) = record else { return None };
                let service = std::str::from_utf8(&record.services).ok()?;
                let (_, transport) =
                    SERVICES.iter().find(|(name, _)| name.eq_ignore_ascii_case(service))?;
                let terminal = record.flags.eq_ignore_ascii_case(b"s") && record.regexp.is_empty();
                let fits = self.lookup.transports.has(*transport)
                    && (!secure || *transport == Transport::Tls);
                (terminal && fits && !record.replacement.is_root()).then_some((
                    record.order,
                    record.preference,
                    record.replacement,
                    *transport,
                ))
            })
            .collect();
        usable.sort_by_key(|(order, preference, ..)| (*order, *preference));
        usable.truncate(GROUPS_MAX);
        usable.into_iter().map(|(.., name, transport)| (name, transport)).collect()
    }

    /// SRV records and their targets' addresses; nothing if there are none.
    async fn service(&mut self, service: &Name, transport: Transport) -> Vec<Group> {
        let Some(records) = self.ask(service, RecordType::SRV).await else { return Vec::new() };
        let mut hosts: Vec<_> = records
            .data
            .into_iter()
            .filter_map(|record| match record {
                // RFC 2782: a target of "." says that there is no such service.
                RData::SRV(record) if !record.target.is_root() && record.port > 0 => Some(record),
                _ => None,
            })
            .collect();
        // Some domains have hundreds. Those that would be tried first are looked at.
        hosts.sort_by_key(|record| (record.priority, u16::MAX - record.weight));
        hosts.truncate(PLACES_MAX);
        let found = {
            let walk = &*self;
            let each = hosts.iter().map(|record| walk.hosts(&record.target));
            futures_util::future::join_all(each).await
        };
        let mut targets = Vec::new();
        for (record, heard) in hosts.into_iter().zip(found) {
            let addresses = self.take(heard);
            if !addresses.is_empty() {
                let (priority, weight, port) = (record.priority, record.weight, record.port);
                targets.push(Target { priority, weight, port, addresses });
            }
        }
        if targets.is_empty() { Vec::new() } else { vec![Group { transport, targets }] }
    }

    async fn addresses(&mut self, host: &Name, transport: Transport, port: u16) -> Vec<Group> {
        let heard = self.hosts(host).await;
        let addresses = self.take(heard);
        if addresses.is_empty() {
            return Vec::new();
        }
        vec![Group { transport, targets: vec![Target { priority: 0, weight: 0, port, addresses }] }]
    }

    /// What is heard of a host's addresses.
    async fn hosts(&self, host: &Name) -> [Option<Result<Records, Miss>>; 2] {
        let ask = |wanted: bool, kind| async move {
            if wanted { Some(self.dns.records(host, kind).await) } else { None }
        };
        let (four, six) = futures_util::future::join(
            ask(self.lookup.ipv4, RecordType::A),
            ask(self.lookup.ipv6, RecordType::AAAA),
        )
        .await;
        [four, six]
    }

    fn take(&mut self, heard: [Option<Result<Records, Miss>>; 2]) -> Vec<IpAddr> {
        let mut addresses = Vec::new();
        for result in heard.into_iter().flatten() {
            for record in self.note(result).map(|records| records.data).unwrap_or_default() {
                match record {
                    RData::A(address) => addresses.push(IpAddr::V4(address.0)),
                    RData::AAAA(address) => addresses.push(IpAddr::V6(address.0)),
                    _ => {}
                }
            }
        }
        // A name must not make us talk to everybody, or to nobody.
        addresses.retain(|address| !address.is_unspecified() && !address.is_multicast());
        addresses.truncate(PLACES_MAX);
        addresses
    }

    async fn ask(&mut self, name: &Name, kind: RecordType) -> Option<Records> {
        let result = self.dns.records(name, kind).await;
        self.note(result)
    }

    fn note(&mut self, result: Result<Records, Miss>) -> Option<Records> {
        let until = match &result {
            Ok(records) => records.until,
            Err(miss) => miss.until(),
        };
        self.until = Some(self.until.map_or(until, |known| known.min(until)));
        match result {
            Ok(records) => Some(records),
            Err(miss @ Miss::Silent { .. }) => {
                self.silent = Some(miss);
                None
            }
            Err(Miss::Absent { .. }) => None,
        }
    }
}

fn service_name(host: &Name, transport: Transport) -> Option<Name> {
    let prefix = match transport {
        Transport::Udp => "_sip._udp",
        Transport::Tcp => "_sip._tcp",
        Transport::Tls => "_sips._tcp",
        Transport::Ws | Transport::Wss | Transport::Unix | Transport::Sctp => return None,
    };
    let mut name = Name::from_ascii(prefix).ok()?.append_domain(host).ok()?;
    name.set_fqdn(true);
    Some(name)
}

/// RFC 3261 19.1.2, RFC 7118 5.
fn default_port(transport: Transport) -> u16 {
    match transport {
        Transport::Tls => 5061,
        Transport::Ws => 80,
        Transport::Wss => 443,
        Transport::Udp | Transport::Tcp | Transport::Unix | Transport::Sctp => 5060,
    }
}

#[cfg(test)]
#[path = "rfc3263_tests.rs"]
mod tests;
