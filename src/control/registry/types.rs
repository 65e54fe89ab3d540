//! What travels over the lease API, and what stands in the state file.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use strowger_contract::Transport;

use crate::control::config::parse_endpoint;
use crate::routing::{BackendSpec, InstanceState};

/// A lease's time, at least and at most.
pub const LEASE_MIN_MS: u64 = 1_000;
/// See [`LEASE_MIN_MS`].
pub const LEASE_MAX_MS: u64 = 3_600_000;

/// Endpoints of one instance, at most: one per protocol and transport.
const ENDPOINTS_MAX: usize = 16;

/// Letters of a name, at most.
const NAME_MAX: usize = 128;

/// An instance's state by its own word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LeaseState {
    /// Not yet ready.
    Starting,
    /// Takes new sessions.
    #[default]
    Ready,
    /// Takes a share of new sessions.
    Canary,
    /// Keeps its sessions, gets no new ones.
    Suspended,
    /// Likewise, and will leave.
    Draining,
}

impl From<LeaseState> for InstanceState {
    fn from(state: LeaseState) -> Self {
        match state {
            LeaseState::Starting => Self::Starting,
            LeaseState::Ready => Self::Ready,
            LeaseState::Canary => Self::Canary,
            LeaseState::Suspended => Self::Suspended,
            LeaseState::Draining => Self::Draining,
        }
    }
}

/// Where an instance is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceEndpoint {
    /// `sip`, `diameter`, `tcp`.
    pub protocol: String,
    /// `udp://10.0.0.5:5062`.
    pub address: String,
}

/// Where an instance runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Locality {
    /// The host.
    pub host: String,
    /// The zone.
    pub zone: String,
    /// CPUs, as in a cpuset (`1`, `0-3`).
    pub cpus: String,
}

/// What an instance can prove of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Identity {
    /// What it must call itself in a capabilities exchange.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diameter_origin_host: Option<String>,
    /// The name in its certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_san: Option<String>,
    /// The user that it runs as.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
}

/// The body of a registration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registration {
    /// Grows with each new process under the same id.
    pub generation: u64,
    /// The lease's time in milliseconds; 0 for the edge's default.
    #[serde(default)]
    pub lease_ttl_ms: u64,
    /// Its state.
    #[serde(default)]
    pub state: LeaseState,
    /// Where it is reached.
    pub endpoints: Vec<InstanceEndpoint>,
    /// Its share, 0 to 65535.
    #[serde(default = "default_weight")]
    pub weight: u32,
    /// Lower is preferred.
    #[serde(default = "default_priority")]
    pub priority: u16,
    /// Its slots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<u32>,
    /// Where it runs.
    #[serde(default)]
    pub locality: Locality,
    /// What runs.
    #[serde(default)]
    pub release: String,
    /// What it can prove.
    #[serde(default)]
    pub identity: Identity,
}

fn default_weight() -> u32 {
    100
}

fn default_priority() -> u16 {
    1
}

/// The body of a heartbeat.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Heartbeat {
    /// How loaded it is, in percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load: Option<u32>,
    /// Its state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<LeaseState>,
}

/// The answer to a heartbeat: the edge's view of the instance.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BeatReply {
    /// The lease's time.
    pub ttl_ms: u64,
    /// When to send the next.
    pub next_ms: u64,
    /// The edge.
    pub router_id: String,
    /// Changes when the edge lost what it knew.
    pub epoch: u64,
    /// Sessions, and flows or requests under way.
    pub sessions: u64,
    /// Of a million requests of the last minute, so many missed their deadline.
    pub deadline_miss_ppm: u64,
    /// The 99th percentile of the instance's own time over the last minute.
    pub p99_ms: f64,
    /// Requests of the last minute: what the two above rest on.
    #[serde(default)]
    pub samples: u64,
}

impl Identity {
    /// Whom a pool's backend must be at the TLS handshake, and in Diameter's capabilities exchange too:
    /// there the name is its Origin-Host (RFC 6733 13.1), which a certificate's other name says
    /// nothing of.
    fn name_for(&self, protocols: &[&str]) -> Option<String> {
        let diameter = protocols.contains(&"diameter");
        let san = self.tls_san.clone().filter(|_| !diameter);
        self.diameter_origin_host.clone().filter(|_| diameter || san.is_none()).or(san)
    }
}

impl Registration {
    /// What is wrong with it, naming the field.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&mut self, default_lease_ms: u64) -> Result<(), String> {
        if self.lease_ttl_ms == 0 {
            self.lease_ttl_ms = default_lease_ms;
        }
        if !(LEASE_MIN_MS..=LEASE_MAX_MS).contains(&self.lease_ttl_ms) {
            return Err(format!(
                "lease_ttl_ms: {} is out of range: {LEASE_MIN_MS} to {LEASE_MAX_MS}",
                self.lease_ttl_ms
            ));
        }
        if self.weight > 65_535 {
            return Err(format!("weight: {} is out of range: 0 to 65535", self.weight));
        }
        if self.capacity == Some(0) {
            return Err("capacity: must be at least 1".to_owned());
        }
        if self.endpoints.is_empty() || self.endpoints.len() > ENDPOINTS_MAX {
            return Err(format!("endpoints: must be 1 to {ENDPOINTS_MAX}"));
        }
        for (index, endpoint) in self.endpoints.iter().enumerate() {
            let found = parse_endpoint(&endpoint.address);
            let (_, address) =
                found.map_err(|error| format!("endpoints[{index}].address: {error}"))?;
            if address.ip().is_unspecified() || address.ip().is_multicast() {
                return Err(format!(
                    "endpoints[{index}].address: {} is no address of one instance",
                    address.ip()
                ));
            }
        }
        Ok(())
    }

    /// The endpoint that a pool of these protocols reaches it by: the first that fits.
    #[must_use]
    pub fn endpoint_for(&self, protocols: &[&str]) -> Option<(Transport, SocketAddr)> {
        let fits = |endpoint: &&InstanceEndpoint| {
            protocols.is_empty() || protocols.contains(&endpoint.protocol.as_str())
        };
        let endpoint = self.endpoints.iter().find(fits)?;
        parse_endpoint(&endpoint.address).ok()
    }
}

/// Whether a name may be an instance's.
///
/// # Errors
/// What it must be.
pub fn check_id(id: &str) -> Result<(), String> {
    let fine = |letter: char| letter.is_ascii_alphanumeric() || "-._~:@".contains(letter);
    if id.is_empty() || id.len() > NAME_MAX || !id.chars().all(fine) {
        return Err(format!(
            "`{id}` is no instance id: 1 to {NAME_MAX} letters, digits, `-`, `.`, `_`, `~`, `:`, `@`"
        ));
    }
    Ok(())
}

/// The backend that a lease stands for.
#[must_use]
pub(super) fn backend_of(
    id: &str,
    lease: &super::Lease,
    protocols: &[&str],
) -> Option<BackendSpec> {
    let registration = &lease.registration;
    let (transport, address) = registration.endpoint_for(protocols)?;
    Some(BackendSpec {
        id: id.to_owned(),
        generation: registration.generation,
        transport,
        address,
        weight: registration.weight,
        priority: registration.priority,
        capacity: registration.capacity,
        identity: registration.identity.name_for(protocols),
        state: lease.state().into(),
    })
}
