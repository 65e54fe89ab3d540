//! Cloud Foundry's registration messages (`router.register`, `router.unregister`), turned into what
//! the registry takes. Pure.
//!
//! The fields are gorouter's (routing-release, mbus/subscriber.go). Ours are the protocols `sip`,
//! `diameter`, `tcp` and `udp`, and some tags. A field that is not known is left alone; a protocol that
//! is not known is refused, not guessed.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::control::registry::{
    Identity, InstanceEndpoint, LEASE_MIN_MS, LeaseState, Locality, Registration, check_id,
};

/// URIs of one message that are looked at, at most.
const URIS_MAX: usize = 64;

/// Which isolation segments' instances are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Isolation {
    /// Those of every segment, and those of none.
    #[default]
    All,
    /// Those of the named segments, and those of none.
    SharedAndSegments,
    /// Those of the named segments.
    Segments,
}

/// What decides how messages are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// URI (or `*.rest`) and pool, the first that fits; a URI that is a pool's name needs none.
    pub pools: Vec<(String, String)>,
    /// Which segments.
    pub isolation: Isolation,
    /// Their names.
    pub segments: Vec<String>,
    /// How long an instance is believed without being heard of (`droplet_stale_threshold`).
    pub stale_threshold: Duration,
}

/// A message's body.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RouteMessage {
    /// Its address.
    pub host: String,
    /// Its port, plain.
    pub port: u16,
    /// Its port for TLS; wins over the other. 0: none.
    pub tls_port: u16,
    /// `sip`, `diameter`, `tcp`, `udp`; Cloud Foundry's own `http1`, `http2` and none are byte streams to us.
    pub protocol: Option<String>,
    /// What it serves.
    pub uris: Vec<String>,
    /// The app.
    pub app: String,
    /// The instance.
    pub private_instance_id: String,
    /// Its zone.
    pub availability_zone: Option<String>,
    /// Its segment.
    pub isolation_segment: Option<String>,
    /// The name in its certificate.
    pub server_cert_domain_san: Option<String>,
    /// Can only shorten the router's own.
    pub stale_threshold_in_seconds: i64,
    /// Free names and values.
    pub tags: Option<BTreeMap<String, String>>,
    /// Where requests are to go first.
    pub route_service_url: Option<String>,
    /// When it was last changed.
    pub endpoint_updated_at_ns: i64,
}

/// What becomes of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// An instance is there.
    Put {
        /// The pool.
        pool: String,
        /// The instance.
        id: String,
        /// The rest; the generation is the feed's.
        registration: Registration,
    },
    /// Nobody is at an address any more.
    Remove {
        /// The pool.
        pool: String,
        /// `tcp://10.0.0.5:4567`.
        address: String,
        /// The instance that left, if it was said.
        id: Option<String>,
    },
}

/// Why a message came to nothing: the word for figures, and the words for the log.
pub type Rejected = (&'static str, String);

/// Reads a body.
///
/// # Errors
/// It is no JSON, or a field is of another type.
pub fn parse(body: &[u8]) -> Result<RouteMessage, Rejected> {
    serde_json::from_slice(body).map_err(|error| ("malformed", error.to_string()))
}

impl RouteMessage {
    /// What a `router.register` says.
    ///
    /// # Errors
    /// It cannot be taken.
    pub fn register(
        &self,
        mapping: &Mapping,
        is_pool: &dyn Fn(&str) -> bool,
    ) -> Result<Vec<Action>, Rejected> {
        if !self.is_of_segment(mapping) {
            return Err(("other_segment", format!("{:?}", self.isolation_segment)));
        }
        if let Some(url) = self.route_service_url.as_ref().filter(|url| !url.is_empty()) {
            return Err(("route_service", format!("{url}: route services are HTTP's")));
        }
        let (protocol, address) = self.place()?;
        let registration = Registration {
            generation: 1,
            lease_ttl_ms: self.lease_ms(mapping),
            state: LeaseState::Ready,
            endpoints: vec![InstanceEndpoint { protocol: protocol.to_owned(), address }],
            weight: self.tag_number("weight", 100, 65_535)?,
            priority: self.tag_number("priority", 1, 65_535)? as u16,
            capacity: Some(self.tag_number("capacity", 0, 100_000_000)?).filter(|it| *it > 0),
            locality: Locality {
                zone: self.availability_zone.clone().unwrap_or_default(),
                ..Locality::default()
            },
            release: self.app.clone(),
            identity: Identity {
                diameter_origin_host: self.tag("origin_host").map(str::to_owned),
                tls_san: self.server_cert_domain_san.clone().filter(|san| !san.is_empty()),
                uid: None,
            },
        };
        let id = self.id()?;
        let put = |pool| Action::Put { pool, id: id.clone(), registration: registration.clone() };
        Ok(self.pools(mapping, is_pool)?.into_iter().map(put).collect())
    }

    /// What a `router.unregister` says.
    ///
    /// # Errors
    /// It cannot be taken.
    pub fn unregister(
        &self,
        mapping: &Mapping,
        is_pool: &dyn Fn(&str) -> bool,
    ) -> Result<Vec<Action>, Rejected> {
        let (_, address) = self.place()?;
        let id = Some(self.id()?).filter(|_| !self.private_instance_id.is_empty());
        let remove = |pool| Action::Remove { pool, address: address.clone(), id: id.clone() };
        Ok(self.pools(mapping, is_pool)?.into_iter().map(remove).collect())
    }

    /// Its name here. One instance may have several ports, and each is a place of its own.
    fn id(&self) -> Result<String, Rejected> {
        let port = if self.tls_port != 0 { self.tls_port } else { self.port };
        let name = if self.private_instance_id.is_empty() {
            &self.host
        } else {
            &self.private_instance_id
        };
        let id = format!("{name}:{port}");
        check_id(&id).map_err(|why| ("malformed", why))?;
        Ok(id)
    }

    fn place(&self) -> Result<(&'static str, String), Rejected> {
        let ip: IpAddr = self
            .host
            .parse()
            .map_err(|_| ("malformed", format!("host `{}` is no IP address", self.host)))?;
        let secure = self.tls_port != 0;
        let port = if secure { self.tls_port } else { self.port };
        if port == 0 {
            return Err(("malformed", "neither port nor tls_port".to_owned()));
        }
        let over_tcp = self.tag("transport").is_some_and(|wanted| wanted == "tcp");
        let (protocol, plain) = match self.protocol.as_deref().unwrap_or_default() {
            "sip" => ("sip", if over_tcp { "tcp" } else { "udp" }),
            "diameter" => ("diameter", "tcp"),
            "udp" => ("udp", "udp"),
            "tcp" | "http1" | "http2" | "" => ("tcp", "tcp"),
            other => return Err(("protocol", format!("protocol `{other}` is not known"))),
        };
        let scheme = if secure { "tls" } else { plain };
        if secure && protocol == "udp" {
            return Err(("protocol", "udp has no tls_port".to_owned()));
        }
        Ok((protocol, format!("{scheme}://{}", SocketAddr::new(ip, port))))
    }

    fn pools(
        &self,
        mapping: &Mapping,
        is_pool: &dyn Fn(&str) -> bool,
    ) -> Result<Vec<String>, Rejected> {
        let mut pools: Vec<String> = Vec::new();
        for uri in self.uris.iter().take(URIS_MAX) {
            let fits = |pattern: &str| match pattern.strip_prefix('*') {
                Some(rest) => uri.ends_with(rest),
                None => pattern.eq_ignore_ascii_case(uri),
            };
            let mapped = mapping.pools.iter().find(|(pattern, _)| fits(pattern));
            let pool =
                mapped.map(|(_, pool)| pool.clone()).or_else(|| is_pool(uri).then(|| uri.clone()));
            pools.extend(pool.filter(|pool| !pools.contains(pool)));
        }
        if pools.is_empty() {
            return Err(("unmapped", format!("no pool for {}", self.uris.join(", "))));
        }
        Ok(pools)
    }

    fn is_of_segment(&self, mapping: &Mapping) -> bool {
        let segment = self.isolation_segment.as_deref().unwrap_or_default();
        let named = mapping.segments.iter().any(|known| known == segment);
        match mapping.isolation {
            Isolation::All => true,
            Isolation::SharedAndSegments => segment.is_empty() || named,
            Isolation::Segments => named,
        }
    }

    /// As gorouter: a message's own threshold only shortens; 0 and more than the router's are none.
    fn lease_ms(&self, mapping: &Mapping) -> u64 {
        let most = mapping.stale_threshold.as_millis() as u64;
        let own = u64::try_from(self.stale_threshold_in_seconds).unwrap_or(0).saturating_mul(1_000);
        let lease = if own == 0 || own > most { most } else { own };
        lease.max(LEASE_MIN_MS)
    }

    fn tag(&self, name: &str) -> Option<&str> {
        self.tags.as_ref()?.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    fn tag_number(&self, name: &str, default: u32, most: u32) -> Result<u32, Rejected> {
        let Some(text) = self.tag(name) else { return Ok(default) };
        let number = text.parse().ok().filter(|number| *number <= most);
        number.ok_or_else(|| ("malformed", format!("tag {name} `{text}` is no number to {most}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping() -> Mapping {
        Mapping {
            pools: vec![("*.apps.example".to_owned(), "web".to_owned())],
            isolation: Isolation::All,
            segments: vec!["seg".to_owned()],
            stale_threshold: Duration::from_secs(120),
        }
    }

    fn register(json: &str) -> Result<Vec<Action>, Rejected> {
        parse(json.as_bytes())?.register(&mapping(), &|pool| pool == "ims")
    }

    /// As routing-release's documentation prints it, with every field.
    const WHOLE: &str = r#"{"host":"10.0.0.5","port":4567,"tls_port":1234,"protocol":"http1","uris":["pool.apps.example","ims"],
        "app":"app-guid","private_instance_id":"inst-guid","private_instance_index":"0","availability_zone":"z1",
        "isolation_segment":"seg","server_cert_domain_san":"inst-guid","stale_threshold_in_seconds":60,
        "tags":{"k":"v"},"endpoint_updated_at_ns":1700000000000000000,
        "options":{"loadbalancing":"hash","hash_header":"X","hash_balance":1.25}}"#;

    #[test]
    fn a_whole_message_becomes_one_instance_per_pool() {
        let actions = register(WHOLE).expect("it is good");
        assert_eq!(actions.len(), 2);
        let Action::Put { pool, id, registration } = &actions[0] else { panic!("a put") };
        assert_eq!((pool.as_str(), id.as_str()), ("web", "inst-guid:1234"));
        assert_eq!(registration.endpoints[0].address, "tls://10.0.0.5:1234", "tls_port wins");
        assert_eq!(registration.lease_ttl_ms, 60_000);
        assert_eq!(registration.identity.tls_san.as_deref(), Some("inst-guid"));
        assert_eq!(registration.locality.zone, "z1");
    }

    #[test]
    fn thresholds_only_shorten() {
        for (own, lease) in [(0, 120_000), (30, 30_000), (500, 120_000), (-4, 120_000)] {
            let text = format!(
                r#"{{"host":"10.0.0.5","port":1,"uris":["ims"],"stale_threshold_in_seconds":{own}}}"#
            );
            let Action::Put { registration, .. } = &register(&text).expect("good")[0] else {
                panic!("a put")
            };
            assert_eq!(registration.lease_ttl_ms, lease, "{own}");
        }
    }

    #[test]
    fn our_protocols_choose_the_transport() {
        for (protocol, more, address) in [
            ("sip", "", "udp://10.0.0.5:7"),
            ("sip", r#","tags":{"transport":"tcp","weight":"7"}"#, "tcp://10.0.0.5:7"),
            ("sip", r#","tls_port":9"#, "tls://10.0.0.5:9"),
            ("diameter", "", "tcp://10.0.0.5:7"),
            ("udp", "", "udp://10.0.0.5:7"),
            ("http2", r#","tags":null"#, "tcp://10.0.0.5:7"),
        ] {
            let text = format!(
                r#"{{"host":"10.0.0.5","port":7,"uris":["ims"],"protocol":"{protocol}"{more}}}"#
            );
            let Action::Put { registration, .. } = &register(&text).expect("good")[0] else {
                panic!("a put")
            };
            assert_eq!(registration.endpoints[0].address, address, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_taken_is_told_apart() {
        for (text, word) in [
            ("", "malformed"),
            ("[]x", "malformed"),
            (r#"{"host":"a.example","port":1,"uris":["ims"]}"#, "malformed"),
            (r#"{"host":"10.0.0.5","uris":["ims"]}"#, "malformed"),
            (r#"{"host":"10.0.0.5","port":99999,"uris":["ims"]}"#, "malformed"),
            (r#"{"host":"10.0.0.5","port":1,"uris":["ims"],"protocol":"quic"}"#, "protocol"),
            (r#"{"host":"10.0.0.5","port":1,"uris":["other"]}"#, "unmapped"),
            (
                r#"{"host":"10.0.0.5","port":1,"uris":["ims"],"tags":{"weight":"many"}}"#,
                "malformed",
            ),
            (
                r#"{"host":"10.0.0.5","port":1,"uris":["ims"],"route_service_url":"http://x"}"#,
                "route_service",
            ),
            (
                r#"{"host":"10.0.0.5","port":1,"uris":["ims"],"private_instance_id":"a b"}"#,
                "malformed",
            ),
        ] {
            assert_eq!(register(text).map_err(|(word, _)| word), Err(word), "{text}");
        }
    }

    #[test]
    fn segments_are_kept_apart() {
        let message = parse(WHOLE.as_bytes()).expect("good");
        let shared = RouteMessage { isolation_segment: None, ..message.clone() };
        let other = RouteMessage { isolation_segment: Some("x".to_owned()), ..message.clone() };
        for (isolation, expected) in [
            (Isolation::All, [true, true, true]),
            (Isolation::SharedAndSegments, [true, true, false]),
            (Isolation::Segments, [true, false, false]),
        ] {
            let mapping = Mapping { isolation, ..mapping() };
            let taken = [&message, &shared, &other]
                .map(|message| message.register(&mapping, &|pool| pool == "ims").is_ok());
            assert_eq!(taken, expected, "{isolation:?}");
        }
    }

    #[test]
    fn an_unregister_names_address_and_instance() {
        let actions = parse(WHOLE.as_bytes())
            .and_then(|message| message.unregister(&mapping(), &|pool| pool == "ims"))
            .expect("good");
        let removed = Action::Remove {
            pool: "ims".to_owned(),
            address: "tls://10.0.0.5:1234".to_owned(),
            id: Some("inst-guid:1234".to_owned()),
        };
        assert!(actions.contains(&removed), "{actions:?}");
    }
}
