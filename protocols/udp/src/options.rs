//! A raw UDP listener's options and its routes' matches.

use std::net::IpAddr;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use strowger_contract::duration::Span;
use strowger_contract::network::{is_in, network};
use strowger_contract::{OptionsError, Scope};

/// Flows that one listener may be given, at most: each holds a socket, so a descriptor.
const FLOWS_MAX: u32 = 10_000_000;

/// A raw UDP listener's options.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct UdpOptions {
    /// How long a flow may be silent both ways before it ends.
    pub idle_timeout: Span,
    /// How many flows there may be, over all workers; each has an equal share. A flow holds one
    /// descriptor. When a share is full, the flow goes that was silent longest, those first that no
    /// backend has answered.
    pub flows: u32,
    /// How many datagrams a backend answers each of a client's with; when all have come, the flow
    /// ends at once (1 for DNS and RADIUS). 0: not known, flows end by `idle_timeout`.
    pub responses: u32,
    /// With the session keys source-ip and source-ip-port: clients whose first so many bits are the
    /// same are one, in IPv4.
    pub source_prefix_v4: u8,
    /// The same in IPv6.
    pub source_prefix_v6: u8,
}

impl Default for UdpOptions {
    fn default() -> Self {
        Self {
            idle_timeout: Span::secs(60),
            flows: 65_536,
            responses: 0,
            source_prefix_v4: 32,
            source_prefix_v6: 128,
        }
    }
}

/// What a route matches.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct UdpMatch {
    /// The client is in one of these networks, as `10.0.0.0/8` or one address.
    pub source: Vec<String>,
    /// The flow's first datagram begins with one of these texts.
    pub first_bytes: Vec<String>,
}

impl UdpMatch {
    /// The networks, read once.
    pub(crate) fn networks(&self) -> Vec<(IpAddr, u8)> {
        self.source.iter().filter_map(|text| network(text)).collect()
    }

    /// Whether a flow is meant that begins so.
    pub(crate) fn is_match(
        &self,
        networks: &[(IpAddr, u8)],
        source: IpAddr,
        datagram: &[u8],
    ) -> bool {
        (networks.is_empty() || networks.iter().any(|&network| is_in(source, network)))
            && (self.first_bytes.is_empty()
                || self.first_bytes.iter().any(|text| datagram.starts_with(text.as_bytes())))
    }
}

pub(crate) fn check(scope: &Scope<UdpMatch>, options: &UdpOptions) -> Vec<OptionsError> {
    let mut errors = Vec::new();
    let mut wrong = |path: String, message: String| errors.push(OptionsError { path, message });
    if options.idle_timeout.0 < Duration::from_millis(100) {
        let message = "must be at least 100ms: a datagram has no end of its own";
        wrong("idle_timeout".to_owned(), message.to_owned());
    }
    if options.flows == 0 || options.flows > FLOWS_MAX {
        wrong("flows".to_owned(), format!("must be from 1 to {FLOWS_MAX}"));
    }
    let prefixes = [
        ("source_prefix_v4", options.source_prefix_v4, 32),
        ("source_prefix_v6", options.source_prefix_v6, 128),
    ];
    for (path, _, most) in prefixes.into_iter().filter(|(_, bits, most)| bits > most) {
        wrong(path.to_owned(), format!("must be from 0 to {most}"));
    }
    let routes = scope.routes.iter().map(|(route, _)| ("routes", route)).enumerate();
    let rules = scope.classify.iter().map(|rule| ("classify", &rule.matching)).enumerate();
    for (index, (list, matching)) in routes.chain(rules) {
        let texts = matching.source.iter().enumerate();
        for (place, text) in texts.filter(|(_, text)| network(text).is_none()) {
            let path = format!("{list}[{index}].match.source[{place}]");
            wrong(path, format!("`{text}` is no network; write 10.0.0.0/8 or an address"));
        }
    }
    errors
}
