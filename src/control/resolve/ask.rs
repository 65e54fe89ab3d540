//! Name servers: one record type of one name at a time, through hickory-resolver (its cache, its
//! choice of servers, its repeats).

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{
    ConnectionConfig, NameServerConfig, ResolverConfig, ResolverOpts, ServerOrderingStrategy,
};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::rr::{Name, RData, RecordType};

use super::DnsSettings;

/// What there is not is remembered so long where the zone does not say it.
const NEGATIVE_DEFAULT: Duration = Duration::from_secs(5);

/// And at most so long (RFC 2308 5 has hours in mind; a call cannot wait for that).
pub(super) const NEGATIVE_MAX: Duration = Duration::from_secs(60);

/// How long a silent server is not asked again for the same.
pub(super) const SILENCE: Duration = Duration::from_secs(2);

/// Records of one type under one name.
#[derive(Clone, Debug)]
pub(super) struct Records {
    pub(super) data: Vec<RData>,
    pub(super) until: Instant,
}

/// None were found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Miss {
    /// There are none.
    Absent { until: Instant },
    /// Nobody said whether there are any.
    Silent { until: Instant },
}

impl Miss {
    pub(super) fn until(self) -> Instant {
        match self {
            Self::Absent { until } | Self::Silent { until } => until,
        }
    }
}

/// Who is asked.
pub(super) trait Dns: Sync {
    /// The records of one type.
    fn records(
        &self,
        name: &Name,
        kind: RecordType,
    ) -> impl Future<Output = Result<Records, Miss>> + Send;
}

/// Name servers as configured.
pub(super) struct Servers(TokioResolver);

impl Servers {
    /// # Errors
    /// The system's configuration cannot be read.
    pub(super) fn new(settings: &DnsSettings) -> Result<Self, String> {
        let provider = TokioRuntimeProvider::default();
        let builder = if settings.servers.is_empty() {
            TokioResolver::builder(provider)
                .map_err(|error| format!("/etc/resolv.conf: {error}"))?
        } else {
            let servers = settings.servers.iter().copied().map(server).collect();
            let config = ResolverConfig::from_parts(None, Vec::new(), servers);
            TokioResolver::builder_with_config(config, provider)
        };
        let mut builder = builder;
        let options: &mut ResolverOpts = builder.options_mut();
        options.timeout = settings.query_timeout;
        options.attempts = ATTEMPTS;
        options.cache_size = settings.cache as u64;
        options.negative_max_ttl = Some(NEGATIVE_MAX);
        options.positive_max_ttl = Some(settings.ttl_max);
        options.max_active_requests = settings.concurrent.max(32) * 4;
        options.num_concurrent_reqs = 1;
        options.server_ordering_strategy = ServerOrderingStrategy::QueryStatistics;
        builder.build().map(Self).map_err(|error| error.to_string())
    }
}

/// How often a server is asked again.
const ATTEMPTS: usize = 2;

fn server(address: SocketAddr) -> NameServerConfig {
    let at = |mut connection: ConnectionConfig| {
        connection.port = address.port();
        connection
    };
    let connections = vec![at(ConnectionConfig::udp()), at(ConnectionConfig::tcp())];
    NameServerConfig::new(address.ip(), true, connections)
}

impl Dns for Servers {
    async fn records(&self, name: &Name, kind: RecordType) -> Result<Records, Miss> {
        match self.0.lookup(name.clone(), kind).await {
            Ok(found) => {
                let until = found.valid_until();
                let of_kind = found.answers().iter().filter(|record| record.record_type() == kind);
                let data: Vec<RData> = of_kind.map(|record| record.data.clone()).collect();
                if data.is_empty() {
                    return Err(Miss::Absent { until: Instant::now() + NEGATIVE_DEFAULT });
                }
                Ok(Records { data, until })
            }
            Err(NetError::Dns(DnsError::NoRecordsFound(none))) => {
                let lasting = none
                    .negative_ttl
                    .map_or(NEGATIVE_DEFAULT, |ttl| Duration::from_secs(u64::from(ttl)));
                let lasting = lasting.clamp(Duration::from_secs(1), NEGATIVE_MAX);
                Err(Miss::Absent { until: Instant::now() + lasting })
            }
            Err(_) => Err(Miss::Silent { until: Instant::now() + SILENCE }),
        }
    }
}
