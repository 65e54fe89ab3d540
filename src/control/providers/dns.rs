//! DNS: a pool's instances by SRV records or by a host's addresses, looked up again when their time
//! (TTL) is over.
//!
//! What DNS no longer names is suspended (its sessions go on), and gone after `grace`. An empty answer,
//! or none, changes nothing: zones are emptied by mistake more often than pools are.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use strowger_contract::Transport;

use super::feed::Feed;
use super::message::Action;
use crate::control::registry::{
    Identity, InstanceEndpoint, LEASE_MAX_MS, LeaseState, Locality, Registration,
};
use crate::control::resolve::{Discovered, Discovery, DnsSettings};

/// The shortest time between two looks, whatever the TTL says.
const AGAIN_MIN: Duration = Duration::from_secs(1);

/// The longest: a lease is renewed by a look.
const AGAIN_MAX: Duration = Duration::from_secs(600);

/// After a look that failed.
const AGAIN_FAILED: Duration = Duration::from_secs(2);

/// A pool that DNS feeds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsPoolSettings {
    /// The pool.
    pub pool: String,
    /// The name: of SRV records, or of a host if there is a port.
    pub name: String,
    /// The port of all, for a host's addresses.
    pub port: Option<u16>,
    /// How instances are reached.
    pub transport: Transport,
    /// How long one that is no longer named keeps its sessions.
    pub grace: Duration,
    /// The protocols of the listeners that use the pool.
    pub protocols: Vec<String>,
}

/// The provider's name for a pool.
pub(super) fn source(pool: &str) -> String {
    format!("dns:{pool}")
}

/// Serves until it is dropped.
pub(super) async fn run(settings: DnsPoolSettings, dns: DnsSettings, feed: Feed) {
    let discovery = match Discovery::new(&dns) {
        Ok(discovery) => discovery,
        Err(why) => return feed.state(Err(why)),
    };
    feed.state(Err("not looked up yet".to_owned()));
    let mut missing = HashMap::new();
    loop {
        let wait = match discovery.find(&settings.name, settings.port).await {
            Ok((found, until)) => {
                feed.state(Ok(()));
                take(&settings, &feed, &found, &mut missing);
                let left = until.saturating_duration_since(Instant::now());
                let ends = missing
                    .values()
                    .map(|since: &Instant| settings.grace.saturating_sub(since.elapsed()));
                ends.chain([left]).min().unwrap_or(left).clamp(AGAIN_MIN, AGAIN_MAX)
            }
            Err(why) => {
                feed.state(Err(why));
                AGAIN_FAILED
            }
        };
        tokio::time::sleep(wait).await;
    }
}

fn take(
    settings: &DnsPoolSettings,
    feed: &Feed,
    found: &[Discovered],
    missing: &mut HashMap<String, Instant>,
) {
    let known = feed.registry().of_source(feed.source());
    feed.take(Ok(actions(settings, known, found, missing, Instant::now())));
}

/// What a look changes: who is named is there; who is not is suspended, and gone after `grace`.
pub(super) fn actions(
    settings: &DnsPoolSettings,
    known: Vec<(String, String, Registration)>,
    found: &[Discovered],
    missing: &mut HashMap<String, Instant>,
    now: Instant,
) -> Vec<Action> {
    let registrations = registrations(settings, found);
    missing.retain(|id, _| !registrations.contains_key(id));
    let mut actions = Vec::new();
    for (pool, id, known) in known {
        if registrations.contains_key(&id) {
            continue;
        }
        let since = *missing.entry(id.clone()).or_insert(now);
        if now.saturating_duration_since(since) >= settings.grace {
            missing.remove(&id);
            let endpoint = known.endpoints.into_iter().next();
            let address = endpoint.map(|endpoint| endpoint.address).unwrap_or_default();
            actions.push(Action::Remove { pool, address, id: Some(id) });
        } else if known.state != LeaseState::Suspended {
            let registration = Registration { state: LeaseState::Suspended, ..known };
            actions.push(Action::Put { pool, id, registration });
        }
    }
    for (id, registration) in registrations {
        actions.push(Action::Put { pool: settings.pool.clone(), id, registration });
    }
    actions
}

fn registrations(
    settings: &DnsPoolSettings,
    found: &[Discovered],
) -> BTreeMap<String, Registration> {
    let weighted = |priority| found.iter().any(|one| one.priority == priority && one.weight > 0);
    let each = found.iter().map(|one| {
        let mark = if one.address.is_ipv4() { ':' } else { '~' };
        let id = format!("{}{mark}{}", one.address.ip(), one.address.port());
        // RFC 2782: a weight of 0 is a small chance beside others, and no weight at all where none
        // has any.
        let weight = if weighted(one.priority) { u32::from(one.weight.max(1)) } else { 100 };
        let address = format!("{}://{}", settings.transport.scheme(), one.address);
        let endpoint = |protocol: &String| InstanceEndpoint {
            protocol: protocol.clone(),
            address: address.clone(),
        };
        let registration = Registration {
            generation: 1,
            lease_ttl_ms: LEASE_MAX_MS,
            state: LeaseState::Ready,
            endpoints: settings.protocols.iter().map(endpoint).collect(),
            weight,
            priority: one.priority,
            capacity: None,
            locality: Locality::default(),
            release: String::new(),
            identity: Identity::default(),
        };
        (id, registration)
    });
    each.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_srvs_and_no_weight_at_all_is_equal() {
        let settings = DnsPoolSettings {
            pool: "ims".to_owned(),
            name: "_sip._udp.example.net".to_owned(),
            port: None,
            transport: Transport::Udp,
            grace: Duration::from_secs(30),
            protocols: vec!["sip".to_owned()],
        };
        let one = |address: &str, priority, weight| Discovered {
            address: address.parse().expect("an address"),
            priority,
            weight,
        };
        let found = [
            one("192.0.2.1:5060", 1, 0),
            one("192.0.2.2:5060", 1, 60),
            one("192.0.2.3:5060", 2, 0),
            one("[2001:db8::1]:5060", 2, 0),
        ];
        let made = registrations(&settings, &found);
        let shown: Vec<_> =
            made.iter().map(|(id, it)| (id.as_str(), it.priority, it.weight)).collect();
        assert_eq!(
            shown,
            [
                ("192.0.2.1:5060", 1, 1),
                ("192.0.2.2:5060", 1, 60),
                ("192.0.2.3:5060", 2, 100),
                ("2001:db8::1~5060", 2, 100)
            ]
        );
        let mut whole = made["2001:db8::1~5060"].clone();
        assert_eq!(whole.endpoints[0].address, "udp://[2001:db8::1]:5060");
        whole.check(15_000).expect("a good registration");
    }
}
