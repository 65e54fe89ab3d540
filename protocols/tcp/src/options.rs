//! A raw TCP listener's options and its routes' matches.

use std::net::IpAddr;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use strowger_contract::duration::Span;
use strowger_contract::network::{is_in, network};
use strowger_contract::{Certificate, OptionsError, PeerFacts, Scope};

/// To park a flow and to wake it costs some ten system calls each: less than so long apart they would
/// be most of what the listener does.
const PARK_AFTER_MIN: Span = Span::millis(100);

/// A raw TCP listener's options.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TcpOptions {
    /// How long the connection to a backend may take before the next is tried.
    pub connect_timeout: Span,
    /// How long both directions may be silent; 0: for ever.
    pub idle_timeout: Span,
    /// How long one direction may be silent after the other has ended; 0: as idle_timeout.
    pub half_closed_timeout: Span,
    /// How long a flow may last; 0: for ever.
    pub session_timeout: Span,
    /// How long first bytes are waited for, where a route or the session key asks for SNI, ALPN or
    /// first bytes; what came by then decides.
    pub peek_timeout: Span,
    /// With the session keys source-ip and source-ip-port: clients whose first so many bits are the
    /// same are one, in IPv4.
    pub source_prefix_v4: u8,
    /// The same in IPv6.
    pub source_prefix_v6: u8,
    /// When all slots are taken: take no further connections for so long, instead of a reset; 0:
    /// reset at once.
    pub backpressure: Span,
    /// A joined plain flow that was silent both ways for so long keeps only its two descriptors and
    /// a few numbers, until either side speaks; at least 100ms; 0: never.
    pub park_after: Span,
    /// How bytes pass: `copy` (read and write) or `splice` (what comes in bulk goes through a pipe,
    /// splice(2); TLS is always copied).
    pub relay: Relay,
}

/// How bytes pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Relay {
    /// read(2) and write(2).
    #[default]
    Copy,
    /// splice(2) for what comes in bulk.
    Splice,
}

impl Default for TcpOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Span::secs(2),
            idle_timeout: Span::secs(3_600),
            half_closed_timeout: Span::secs(300),
            session_timeout: Span(Duration::ZERO),
            peek_timeout: Span::secs(1),
            source_prefix_v4: 32,
            source_prefix_v6: 128,
            backpressure: Span(Duration::ZERO),
            park_after: Span::secs(5),
            relay: Relay::Copy,
        }
    }
}

/// What a route matches.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TcpMatch {
    /// The client is in one of these networks, as `10.0.0.0/8` or one address.
    pub source: Vec<String>,
    /// The client asks for one of these names by SNI; `*.example.net` stands for one label more.
    /// TLS need not end here.
    pub sni: Vec<String>,
    /// The first application protocol that the client offers in its ClientHello (or, where TLS ends
    /// here, the agreed one).
    pub alpn: Vec<String>,
    /// The first bytes are one of these texts.
    pub first_bytes: Vec<String>,
    /// The client's verified certificate has one of these DNS names, URIs or common names.
    pub certificate: Vec<String>,
    /// The client of a unix socket is one of these users, by number.
    pub uid: Vec<u32>,
}

impl TcpMatch {
    /// The networks, read once.
    pub(crate) fn networks(&self) -> Vec<(IpAddr, u8)> {
        self.source.iter().filter_map(|text| network(text)).collect()
    }
}

/// Whether a name is meant by one of some patterns.
pub(crate) fn is_named(patterns: &[String], name: &str) -> bool {
    patterns.iter().any(|pattern| match pattern.strip_prefix('*') {
        Some(end) => {
            let split = name.len().checked_sub(end.len()).filter(|&at| name.is_char_boundary(at));
            split.is_some_and(|at| {
                let (label, rest) = name.split_at(at);
                rest.eq_ignore_ascii_case(end) && !label.is_empty() && !label.contains('.')
            })
        }
        None => pattern.eq_ignore_ascii_case(name),
    })
}

impl TcpMatch {
    /// Whether a client is meant.
    pub(crate) fn is_match(
        &self,
        networks: &[(IpAddr, u8)],
        source: IpAddr,
        facts: &PeerFacts,
    ) -> bool {
        let alpn = || facts.alpn.as_deref().unwrap_or_default();
        let certificate = |certificate: &Certificate| {
            let names = certificate.dns.iter().chain(&certificate.uris);
            names.chain(&certificate.common_name).any(|name| is_named(&self.certificate, name))
        };
        (networks.is_empty() || networks.iter().any(|&network| is_in(source, network)))
            && (self.sni.is_empty()
                || facts.server_name.as_deref().is_some_and(|name| is_named(&self.sni, name)))
            && (self.alpn.is_empty() || self.alpn.iter().any(|name| name.as_bytes() == alpn()))
            && (self.first_bytes.is_empty()
                || self
                    .first_bytes
                    .iter()
                    .any(|text| facts.first_bytes.starts_with(text.as_bytes())))
            && (self.certificate.is_empty() || facts.certificate.as_ref().is_some_and(certificate))
            && (self.uid.is_empty()
                || facts.credentials.is_some_and(|told| self.uid.contains(&told.uid)))
    }

    /// Whether it can only be told by what the client sends first.
    pub(crate) fn looks_at_bytes(&self) -> bool {
        !self.sni.is_empty() || !self.alpn.is_empty() || !self.first_bytes.is_empty()
    }
}

pub(crate) fn check(scope: &Scope<TcpMatch>, options: &TcpOptions) -> Vec<OptionsError> {
    let mut errors = Vec::new();
    if options.connect_timeout.0.is_zero() {
        let message = "must be over 0: a backend that does not answer would be waited for for ever"
            .to_owned();
        errors.push(OptionsError { path: "connect_timeout".to_owned(), message });
    }
    let park_after = options.park_after;
    if !park_after.0.is_zero() && park_after < PARK_AFTER_MIN {
        let message =
            "must be 0 (never) or at least 100ms: flows would be parked between two words"
                .to_owned();
        errors.push(OptionsError { path: "park_after".to_owned(), message });
    }
    let prefixes = [
        ("source_prefix_v4", options.source_prefix_v4, 32),
        ("source_prefix_v6", options.source_prefix_v6, 128),
    ];
    for (path, _, most) in prefixes.into_iter().filter(|(_, bits, most)| bits > most) {
        let message = format!("must be from 0 to {most}");
        errors.push(OptionsError { path: path.to_owned(), message });
    }
    for (index, (route, _)) in scope.routes.iter().enumerate() {
        for (place, text) in
            route.source.iter().enumerate().filter(|(_, text)| network(text).is_none())
        {
            let path = format!("routes[{index}].match.source[{place}]");
            errors.push(OptionsError {
                path,
                message: format!("`{text}` is no network; write 10.0.0.0/8 or an address"),
            });
        }
    }
    errors
}
