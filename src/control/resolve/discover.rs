//! Instances by name: SRV records and their hosts, or one host's addresses.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use futures_util::future::{join, join_all};
use hickory_resolver::proto::rr::{Name, RData, RecordType};

use super::DnsSettings;
use super::ask::{Dns, Miss, Servers};
use super::rfc3263::name_of;

/// Instances under one name, at most.
const FOUND_MAX: usize = 1_000;

/// An instance as DNS has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Discovered {
    /// Where it is.
    pub address: SocketAddr,
    /// Lower is preferred (RFC 2782).
    pub priority: u16,
    /// Its share among equals; 0 where none of them has any.
    pub weight: u16,
}

/// Name servers, for those who want all that a name has.
pub struct Discovery(Servers);

impl Discovery {
    /// # Errors
    /// The system's configuration cannot be read.
    pub fn new(settings: &DnsSettings) -> Result<Self, String> {
        Servers::new(settings).map(Self)
    }

    /// All instances: by SRV if `port` is none, else the addresses of the host. With the moment until
    /// when that holds. What is incomplete, because a server did not answer, is no answer.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub async fn find(
        &self,
        name: &str,
        port: Option<u16>,
    ) -> Result<(Vec<Discovered>, Instant), String> {
        find(&self.0, name, port).await
    }
}

async fn find<D: Dns>(
    dns: &D,
    name: &str,
    port: Option<u16>,
) -> Result<(Vec<Discovered>, Instant), String> {
    let host = name_of(name.as_bytes()).map_err(|_| format!("`{name}` is no name"))?;
    let wrong = |miss: Miss| match miss {
        Miss::Absent { .. } => format!("{name} has no such records"),
        Miss::Silent { .. } => format!("no name server answers for {name}"),
    };
    let mut found = Vec::new();
    let mut until = None::<Instant>;
    let mut hold = |moment: Instant| until = Some(until.map_or(moment, |it| it.min(moment)));
    if let Some(port) = port {
        let (addresses, moment) = addresses(dns, &host).await.map_err(wrong)?;
        hold(moment);
        let each = addresses.into_iter();
        found.extend(each.map(|ip| Discovered {
            address: (ip, port).into(),
            priority: 1,
            weight: 0,
        }));
    } else {
        let records = dns.records(&host, RecordType::SRV).await.map_err(wrong)?;
        hold(records.until);
        let services: Vec<_> = records
            .data
            .into_iter()
            .filter_map(|record| match record {
                RData::SRV(record) if !record.target.is_root() && record.port > 0 => Some(record),
                _ => None,
            })
            .take(FOUND_MAX)
            .collect();
        let hosts = join_all(services.iter().map(|record| addresses(dns, &record.target))).await;
        for (record, host) in services.iter().zip(hosts) {
            match host {
                Ok((addresses, moment)) => {
                    hold(moment);
                    found.extend(addresses.into_iter().map(|ip| Discovered {
                        address: (ip, record.port).into(),
                        priority: record.priority,
                        weight: record.weight,
                    }));
                }
                // A host that is not there is not there; one that nobody tells of may be.
                Err(Miss::Absent { until }) => hold(until),
                Err(silent) => return Err(wrong(silent)),
            }
        }
    }
    found.sort_by_key(|one| (one.address, one.priority));
    found.dedup_by_key(|one| one.address);
    found.truncate(FOUND_MAX);
    if found.is_empty() {
        return Err(format!("{name} leads to no address"));
    }
    Ok((found, until.unwrap_or_else(Instant::now)))
}

/// A host's addresses of both families.
async fn addresses<D: Dns>(dns: &D, host: &Name) -> Result<(Vec<IpAddr>, Instant), Miss> {
    let (four, six) =
        join(dns.records(host, RecordType::A), dns.records(host, RecordType::AAAA)).await;
    let mut found = Vec::new();
    let mut until = None::<Instant>;
    let mut absent = None;
    for result in [four, six] {
        match result {
            Ok(records) => {
                until = Some(until.map_or(records.until, |it| it.min(records.until)));
                found.extend(records.data.into_iter().filter_map(|record| match record {
                    RData::A(address) => Some(IpAddr::V4(address.0)),
                    RData::AAAA(address) => Some(IpAddr::V6(address.0)),
                    _ => None,
                }));
            }
            Err(miss @ Miss::Absent { .. }) => absent = Some(miss),
            Err(silent) => return Err(silent),
        }
    }
    found.retain(|ip| !ip.is_unspecified() && !ip.is_multicast());
    match (until, absent) {
        (Some(until), _) if !found.is_empty() => Ok((found, until)),
        (_, Some(absent)) => Err(absent),
        (until, None) => Err(Miss::Absent { until: until.unwrap_or_else(Instant::now) }),
    }
}
