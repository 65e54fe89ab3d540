//! A SIP listener's options and its routes' matches.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use strowger_contract::duration::Span;
use strowger_contract::{OptionsError, Scope};

use crate::uri::{Uri, parse_ip};

/// Whether transactions are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// RFC 3261 16: retransmissions absorbed, fail-over, timers.
    #[default]
    Stateful,
    /// RFC 3261 16.11: each message by itself.
    Stateless,
}

/// A SIP listener's options.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SipOptions {
    /// `stateful` (default) or `stateless`.
    pub mode: Mode,
    /// Stay on the path of dialogs, so that each request of one reaches the instance that has it.
    pub record_route: bool,
    /// Further host names, or host:port, that mean this edge.
    pub aliases: Vec<String>,
    /// RFC 3261 17: the round-trip estimate; retransmissions and Timers B, F, H follow from it.
    pub t1: Span,
    /// RFC 3261 17: the longest interval between retransmissions.
    pub t2: Span,
    /// RFC 3261 17: how long a message may stay in the network.
    pub t4: Span,
    /// RFC 3261 16.6 step 11: how long an INVITE may ring; over three minutes.
    pub timer_c: Span,
    /// An instance that gives no sign of life for so long loses the request to the next.
    pub failover_timeout: Span,
    /// Transactions at a time, per worker; more are refused with 503.
    pub max_transactions: u32,
}

impl Default for SipOptions {
    fn default() -> Self {
        Self {
            mode: Mode::Stateful,
            record_route: true,
            aliases: Vec::new(),
            t1: Span::millis(500),
            t2: Span::secs(4),
            t4: Span::secs(5),
            timer_c: Span::secs(185),
            failover_timeout: Span::secs(2),
            max_transactions: 200_000,
        }
    }
}

/// What a route matches. All that is given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SipMatch {
    /// One of these methods.
    pub method: Vec<String>,
    /// One of these hosts in the Request-URI.
    pub domain: Vec<String>,
    /// The Request-URI's user begins with one of these.
    pub user_prefix: Vec<String>,
    /// It came over one of these: `udp`, `tcp`.
    pub transport: Vec<String>,
}

impl SipMatch {
    /// Whether a request matches.
    #[must_use]
    pub fn matches(&self, method: &[u8], uri: Option<&Uri<'_>>, transport: &str) -> bool {
        let one_of = |list: &[String], holds: &dyn Fn(&str) -> bool| {
            list.is_empty() || list.iter().any(|text| holds(text))
        };
        one_of(&self.method, &|text| text.as_bytes() == method)
            && one_of(&self.domain, &|text| {
                uri.is_some_and(|uri| uri.host.eq_ignore_ascii_case(text.as_bytes()))
            })
            && one_of(&self.user_prefix, &|text| {
                uri.and_then(|uri| uri.user).is_some_and(|user| user.starts_with(text.as_bytes()))
            })
            && one_of(&self.transport, &|text| text == transport)
    }
}

/// Finds what types cannot.
pub(crate) fn check(scope: &Scope<SipMatch>, options: &SipOptions) -> Vec<OptionsError> {
    let mut errors = Vec::new();
    let mut wrong =
        |path: &str, message: String| errors.push(OptionsError { path: path.to_owned(), message });
    if options.t1.0.is_zero() || options.t1 > Span::secs(10) {
        wrong("t1", "must be over 0 and at most 10s (RFC 3261 says 500ms)".into());
    }
    if options.t2 < options.t1 {
        wrong("t2", "must be at least t1".into());
    }
    if options.timer_c <= Span::secs(180) {
        wrong("timer_c", "must be over 180s (RFC 3261 16.6 step 11)".into());
    }
    if options.failover_timeout < options.t1 || options.failover_timeout.0 > options.t1.0 * 64 {
        wrong("failover_timeout", "must be between t1 and 64 x t1".into());
    }
    if options.max_transactions == 0 {
        wrong("max_transactions", "must be at least 1".into());
    }
    for (index, (route, _)) in scope.routes.iter().enumerate() {
        for (place, transport) in route.transport.iter().enumerate() {
            if !["udp", "tcp"].contains(&transport.as_str()) {
                let path = format!("routes[{index}].match.transport[{place}]");
                wrong(
                    &path,
                    format!("`{transport}` is no transport of this listener; write udp or tcp"),
                );
            }
        }
    }
    for (index, alias) in options.aliases.iter().enumerate() {
        if crate::uri::split_host_port(alias.as_bytes()).is_none() {
            wrong(
                &format!("aliases[{index}]"),
                format!("`{alias}` is neither a host nor host:port"),
            );
        }
    }
    for socket in &scope.sockets {
        let wildcard = socket.address.ip().is_unspecified() && socket.advertise.is_none();
        if wildcard {
            wrong(
                "",
                format!(
                    "{} is bound to every address: say with `advertise` which one peers should answer to",
                    socket.address
                ),
            );
        }
        if let Some(advertise) = &socket.advertise
            && crate::uri::split_host_port(advertise.as_bytes()).is_none()
            && parse_ip(advertise.as_bytes()).is_none()
        {
            wrong("", format!("advertise `{advertise}` is neither a host nor host:port"));
        }
    }
    errors
}
