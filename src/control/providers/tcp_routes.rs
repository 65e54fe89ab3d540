//! Cloud Foundry's TCP routes (routing-api): `POST /routing/v1/tcp_routes/create`, as its clients send
//! them, with their modification tags, their time to live and their events.
//!
//! The port of a route is the one that a raw TCP listener of ours is bound to; its pool gets the
//! backend. As there, an address is one instance's until its time is over: another instance on it is
//! refused until then.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

use crate::control::registry::{
    Identity, InstanceEndpoint, LeaseState, Locality, Registration, check_id,
};

/// The provider's name.
pub const TCP_ROUTES: &str = "tcp_routes";

/// A route's time to live in seconds, at most (routing-api's `max_ttl`).
const TTL_MAX: u64 = 120;

/// Routes, at most.
const ROUTES_MAX: usize = 20_000;

/// Events that wait for one slow reader.
const EVENTS_WAITING: usize = 1_024;

/// How the routing API is offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpRoutesSettings {
    /// The only router group.
    pub router_group: String,
}

/// Tells two versions of a route apart.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModificationTag {
    /// Whose count it is.
    pub guid: String,
    /// The count.
    pub index: u32,
}

impl ModificationTag {
    /// Whether this is news to who knows `known`.
    fn succeeds(&self, known: &Self) -> bool {
        self.guid != known.guid || self.index > known.index
    }

    /// Whether a deletion with this tag is meant for what is known.
    fn deletes(&self, known: &Self) -> bool {
        self.guid.is_empty() || self.guid != known.guid || self.index >= known.index
    }
}

/// A route.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TcpRoute {
    /// The group of routers that it is for.
    pub router_group_guid: String,
    /// Our port.
    pub port: u16,
    /// The backend.
    pub backend_ip: String,
    /// Its plain port.
    pub backend_port: u16,
    /// Its port for TLS; null: its client does not know of TLS; 0: none.
    pub backend_tls_port: Option<u16>,
    /// The instance.
    pub instance_id: String,
    /// Seconds.
    pub ttl: u64,
    /// Which version it is.
    pub modification_tag: ModificationTag,
    /// Its segment.
    pub isolation_segment: Option<String>,
    /// The name that its client asks for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend_sni_hostname: Option<String>,
}

type Key = (String, u16, String, u16, Option<String>);

impl TcpRoute {
    fn key(&self) -> Key {
        let (group, ip) = (self.router_group_guid.clone(), self.backend_ip.clone());
        (group, self.port, ip, self.backend_port, self.backend_sni_hostname.clone())
    }

    /// What is wrong with it.
    ///
    /// # Errors
    /// The first thing, in words.
    pub fn check(&self, group: &str, needs_ttl: bool) -> Result<(), String> {
        if self.router_group_guid != group {
            return Err(format!(
                "router_group_guid: `{}` is not `{group}`",
                self.router_group_guid
            ));
        }
        if self.port == 0 {
            return Err("port: is missing".to_owned());
        }
        if self.backend_ip.parse::<IpAddr>().is_err() {
            return Err(format!("backend_ip: `{}` is no IP address", self.backend_ip));
        }
        if self.backend_port == 0 && self.backend_tls_port.unwrap_or(0) == 0 {
            return Err("backend_port: is missing".to_owned());
        }
        if needs_ttl && !(1..=TTL_MAX).contains(&self.ttl) {
            return Err(format!("ttl: must be 1 to {TTL_MAX}"));
        }
        check_id(&self.id()).map_err(|why| format!("instance_id: {why}"))
    }

    fn place(&self) -> (bool, u16) {
        let tls = self.backend_tls_port.unwrap_or(0);
        if tls > 0 { (true, tls) } else { (false, self.backend_port) }
    }

    /// The instance's name here.
    #[must_use]
    pub fn id(&self) -> String {
        let name = if self.instance_id.is_empty() { &self.backend_ip } else { &self.instance_id };
        format!("{name}:{}", self.place().1)
    }

    /// `tcp://10.0.0.5:4567`; of a route that was checked.
    #[must_use]
    pub fn address(&self) -> Option<String> {
        let (secure, port) = self.place();
        let address = SocketAddr::new(self.backend_ip.parse().ok()?, port);
        Some(format!("{}://{address}", if secure { "tls" } else { "tcp" }))
    }

    /// What the registry takes.
    #[must_use]
    pub fn registration(&self) -> Option<Registration> {
        Some(Registration {
            generation: 1,
            lease_ttl_ms: self.ttl * 1_000,
            state: LeaseState::Ready,
            endpoints: vec![InstanceEndpoint {
                protocol: "tcp".to_owned(),
                address: self.address()?,
            }],
            weight: 100,
            priority: 1,
            capacity: None,
            locality: Locality::default(),
            release: String::new(),
            identity: Identity::default(),
        })
    }
}

/// Something that happened to a route.
#[derive(Clone, Debug)]
pub struct RouteEvent {
    /// `Upsert` or `Delete`; a route whose time is over is deleted.
    pub kind: &'static str,
    /// The route.
    pub route: TcpRoute,
}

struct Kept {
    route: TcpRoute,
    until: Instant,
}

/// All routes that were created and whose time is not over.
pub struct TcpRoutes {
    routes: Mutex<BTreeMap<Key, Kept>>,
    events: broadcast::Sender<RouteEvent>,
}

impl Default for TcpRoutes {
    fn default() -> Self {
        Self { routes: Mutex::default(), events: broadcast::Sender::new(EVENTS_WAITING) }
    }
}

impl TcpRoutes {
    fn routes(&self) -> MutexGuard<'_, BTreeMap<Key, Kept>> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a route is news, or the renewal of what is known; what came out of order is neither.
    #[must_use]
    pub fn is_news(&self, route: &TcpRoute) -> bool {
        let routes = self.routes();
        let tag = &route.modification_tag;
        match routes.get(&route.key()) {
            Some(known) => {
                tag.guid.is_empty()
                    || *tag == known.route.modification_tag
                    || tag.succeeds(&known.route.modification_tag)
            }
            None => routes.len() < ROUTES_MAX,
        }
    }

    /// Keeps a route that the registry took. One without a tag gets the next one of its own.
    pub fn keep(&self, now: Instant, mut route: TcpRoute) {
        let mut routes = self.routes();
        let before = routes.get(&route.key()).map(|known| known.route.modification_tag.clone());
        if route.modification_tag.guid.is_empty() {
            route.modification_tag = match before {
                Some(tag) => ModificationTag { index: tag.index.wrapping_add(1), ..tag },
                None => {
                    ModificationTag { guid: format!("{}-{}", route.id(), route.port), index: 0 }
                }
            };
        }
        let until = now + Duration::from_secs(route.ttl);
        routes.insert(route.key(), Kept { route: route.clone(), until });
        drop(routes);
        // Nobody may be listening.
        let _heard = self.events.send(RouteEvent { kind: "Upsert", route });
    }

    /// Whether it is known, in whatever version.
    #[must_use]
    pub fn knows(&self, route: &TcpRoute) -> bool {
        self.routes().contains_key(&route.key())
    }

    /// Takes a route away, unless it is a later one than is meant; what was known.
    pub fn remove(&self, route: &TcpRoute) -> Option<TcpRoute> {
        let mut routes = self.routes();
        let known = routes.get(&route.key())?;
        if !route.modification_tag.deletes(&known.route.modification_tag) {
            return None;
        }
        let known = routes.remove(&route.key())?.route;
        drop(routes);
        let _heard = self.events.send(RouteEvent { kind: "Delete", route: known.clone() });
        Some(known)
    }

    /// Routes whose time is over go; the registry's leases lapse by themselves.
    pub fn sweep(&self, now: Instant) {
        let mut over = Vec::new();
        self.routes().retain(|_, kept| {
            let keep = kept.until > now;
            if !keep {
                over.push(kept.route.clone());
            }
            keep
        });
        for route in over {
            let _heard = self.events.send(RouteEvent { kind: "Delete", route });
        }
    }

    /// All routes, of one segment if one is named.
    #[must_use]
    pub fn list(&self, segment: Option<&str>) -> Vec<TcpRoute> {
        let routes = self.routes();
        let fits = |route: &&TcpRoute| {
            segment.is_none_or(|wanted| route.isolation_segment.as_deref().unwrap_or("") == wanted)
        };
        routes.values().map(|kept| &kept.route).filter(fits).cloned().collect()
    }

    /// What happens from now on.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<RouteEvent> {
        self.events.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(tag: Option<(&str, u32)>) -> TcpRoute {
        let tag = tag.map(|(guid, index)| ModificationTag { guid: guid.to_owned(), index });
        TcpRoute {
            router_group_guid: "g".to_owned(),
            port: 5200,
            backend_ip: "10.1.1.12".to_owned(),
            backend_port: 60_000,
            instance_id: "guid".to_owned(),
            ttl: 120,
            modification_tag: tag.unwrap_or_default(),
            ..TcpRoute::default()
        }
    }

    /// routing-api's rule: another guid, or a greater index; a deletion also with the same.
    #[test]
    fn what_comes_out_of_order_changes_nothing() {
        let routes = TcpRoutes::default();
        let now = Instant::now();
        routes.keep(now, route(Some(("a", 3))));
        assert!(routes.is_news(&route(Some(("a", 3)))), "a renewal");
        assert!(routes.is_news(&route(Some(("a", 4)))) && routes.is_news(&route(Some(("b", 0)))));
        assert!(!routes.is_news(&route(Some(("a", 2)))));
        assert!(routes.remove(&route(Some(("a", 2)))).is_none());
        assert_eq!(routes.list(None).len(), 1);
        assert!(routes.remove(&route(Some(("a", 3)))).is_some());
        assert!(routes.list(None).is_empty());
    }

    #[test]
    fn time_over_is_a_deletion() {
        let routes = TcpRoutes::default();
        let mut heard = routes.subscribe();
        let now = Instant::now();
        routes.keep(now, route(None));
        routes.keep(now, route(None));
        assert_eq!(routes.list(None)[0].modification_tag.index, 1, "counted for who counts not");
        routes.sweep(now + Duration::from_secs(119));
        assert_eq!(routes.list(None).len(), 1);
        routes.sweep(now + Duration::from_secs(120));
        assert!(routes.list(None).is_empty());
        let mut kinds = Vec::new();
        while let Ok(event) = heard.try_recv() {
            kinds.push(event.kind);
        }
        assert_eq!(kinds, ["Upsert", "Upsert", "Delete"]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(route(None).check("g", true), Ok(()));
        for (change, word) in [
            ((|it| it.router_group_guid.clear()) as fn(&mut TcpRoute), "router_group_guid"),
            (|it| it.port = 0, "port"),
            (|it| it.backend_ip = "name".to_owned(), "backend_ip"),
            (|it| it.backend_port = 0, "backend_port"),
            (|it| it.ttl = 0, "ttl"),
            (|it| it.ttl = 121, "ttl"),
            (|it| it.instance_id = "a b".to_owned(), "instance_id"),
        ] {
            let mut wrong = route(None);
            change(&mut wrong);
            let why = wrong.check("g", true).expect_err("it is wrong");
            assert!(why.starts_with(word), "{why}");
        }
        let secure = TcpRoute { backend_tls_port: Some(60_001), ..route(None) };
        assert_eq!(secure.address().as_deref(), Some("tls://10.1.1.12:60001"));
    }
}
