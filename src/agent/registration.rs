//! What edges are told of an instance.

use std::path::Path;

use super::expand::expand;
use super::launch::{Places, environment};
use super::manifest::{App, PortTransport, Register};
use super::supervisor::{Instance, Release};
use crate::control::registry::{Identity, InstanceEndpoint, LeaseState, Locality, Registration};

/// Protocols that edges balance.
const PROTOCOLS: [&str; 4] = ["sip", "diameter", "tcp", "udp"];

/// The ports that are registered: the named ones, or all that an edge can use. Unix sockets first: an
/// edge takes the first that it can reach.
pub(crate) fn ports(app: &App, register: &Register) -> Vec<String> {
    let fits = |name: &str, protocol: &str| {
        register.ports.iter().any(|port| port == name)
            || register.ports.is_empty() && PROTOCOLS.contains(&protocol)
    };
    let mut found: Vec<(bool, String)> = app
        .ports
        .iter()
        .filter(|(name, port)| fits(name, &port.protocol))
        .map(|(name, port)| (port.transport != PortTransport::Unix, name.clone()))
        .collect();
    found.sort();
    found.into_iter().map(|(_, name)| name).collect()
}

/// The registration of an instance in a pool; `local`: the edge is on this host.
pub(crate) fn registration(
    state: &Path,
    app_name: &str,
    instance: &Instance,
    release: &Release,
    (live, pool): (&App, &str),
    local: bool,
    (lease_state, weight_milli): (LeaseState, u64),
    host: &str,
    cpus: &[usize],
) -> Option<Registration> {
    let register = live.register.get(pool).or_else(|| release.app.register.get(pool))?;
    let places = Places::new(state, &instance.id);
    let mut endpoints = Vec::new();
    for name in ports(&release.app, register) {
        let spec = release.app.ports.get(&name)?;
        let address = match spec.transport {
            PortTransport::Unix if local => format!("unix://{}", places.socket(&name).display()),
            PortTransport::Unix => continue,
            transport => {
                let port = instance.ports.get(&name)?;
                let address = std::net::SocketAddr::new(release.app.host, *port);
                format!("{}://{address}", transport.scheme())
            }
        };
        endpoints.push(InstanceEndpoint { protocol: spec.protocol.clone(), address });
    }
    let env = environment(&places, app_name, instance, release);
    let origin = register.diameter_origin_host.as_ref();
    let origin = origin.and_then(|text| expand(text, &|name| env.get(name).cloned()).ok());
    let weight = u64::from(register.weight) * weight_milli / 1_000;
    let least = u64::from(register.weight > 0);
    let list: Vec<String> = cpus.iter().map(usize::to_string).collect();
    Some(Registration {
        generation: instance.generation,
        lease_ttl_ms: u64::try_from(register.lease.0.as_millis()).unwrap_or(0),
        state: lease_state,
        endpoints,
        weight: u32::try_from(weight.clamp(least, 65_535)).unwrap_or(65_535),
        priority: register.priority,
        capacity: register.capacity,
        locality: Locality {
            host: host.to_owned(),
            zone: register.zone.clone().unwrap_or_default(),
            cpus: list.join(","),
        },
        release: release.digest.clone(),
        identity: Identity { diameter_origin_host: origin, tls_san: None, uid: None },
    })
}
