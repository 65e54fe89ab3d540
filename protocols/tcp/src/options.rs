//! A raw TCP listener's options and its routes' matches.

use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use strowger_contract::duration::Span;
use strowger_contract::{OptionsError, Scope};

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
}

impl Default for TcpOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Span::secs(2),
            idle_timeout: Span::secs(3_600),
            half_closed_timeout: Span::secs(300),
        }
    }
}

/// What a route matches.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TcpMatch {
    /// The client is in one of these networks, as `10.0.0.0/8` or one address.
    pub source: Vec<String>,
}

impl TcpMatch {
    /// The networks, read once.
    pub(crate) fn networks(&self) -> Vec<(IpAddr, u8)> {
        self.source.iter().filter_map(|text| network(text)).collect()
    }
}

/// Reads `address/length` or an address.
fn network(text: &str) -> Option<(IpAddr, u8)> {
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length.parse::<u8>().ok()?)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().ok()?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let length = length.unwrap_or(longest);
    (length <= longest).then_some((address, length))
}

/// Whether an address lies in a network.
pub(crate) fn is_in(address: IpAddr, (network, length): (IpAddr, u8)) -> bool {
    let bits = |address: IpAddr| match address {
        IpAddr::V4(address) => u128::from(u32::from(address)) << 96,
        IpAddr::V6(address) => u128::from(address),
    };
    let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
    address.is_ipv4() == network.is_ipv4()
        && (bits(address) ^ bits(network))
            & (if address.is_ipv4() { v4_mask(length) } else { mask })
            == 0
}

fn v4_mask(length: u8) -> u128 {
    u128::from(u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0)) << 96
}

pub(crate) fn check(scope: &Scope<TcpMatch>, options: &TcpOptions) -> Vec<OptionsError> {
    let mut errors = Vec::new();
    if options.connect_timeout.0.is_zero() {
        let message = "must be over 0: a backend that does not answer would be waited for for ever"
            .to_owned();
        errors.push(OptionsError { path: "connect_timeout".to_owned(), message });
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_match_by_prefix() {
        let is = |address: &str, text: &str| {
            is_in(address.parse().expect("an address"), network(text).expect("a network"))
        };
        assert!(is("10.1.2.3", "10.0.0.0/8") && !is("11.1.2.3", "10.0.0.0/8"));
        assert!(is("11.1.2.3", "0.0.0.0/0") && !is("::1", "0.0.0.0/0"));
        assert!(is("2001:db8::5", "2001:db8::/32") && !is("2001:db9::5", "2001:db8::/32"));
        assert!(is("::1", "::/0") && is("1.2.3.4", "1.2.3.4") && !is("1.2.3.5", "1.2.3.4"));
        for bad in ["10.0.0.0/33", "x", "::/129", "10.0.0.0/", ""] {
            assert!(network(bad).is_none(), "{bad}");
        }
    }
}
