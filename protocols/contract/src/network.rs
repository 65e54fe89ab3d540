//! Networks as configurations write them.

use std::net::{IpAddr, SocketAddr};

/// The space of source addresses among session keys ([`crate::Keyer::session`]): one for all
/// protocols, so that the flows of one client are one session whatever they run over.
pub const SOURCE_SPACE: u8 = 3;

/// A source's name among session keys: its address, perhaps with a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceName {
    bytes: [u8; 18],
    length: usize,
}

impl SourceName {
    /// The bytes that name it.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// The name of who came from `remote` to `local`, by the pool's `session.key`: `source` is the
/// address with its port, `source-ip-port` the address with *our* port, all else the address alone.
/// But for `source`, addresses count by their first so many bits (IPv4, IPv6).
#[must_use]
pub fn source_name(
    key: &str,
    remote: SocketAddr,
    local: SocketAddr,
    prefixes: (u8, u8),
) -> SourceName {
    let mut bytes = [0; 18];
    let whole = key == "source";
    let address = if whole { remote.ip() } else { masked(remote.ip(), prefixes) };
    let mut length = match address {
        IpAddr::V4(address) => {
            bytes[..4].copy_from_slice(&address.octets());
            4
        }
        IpAddr::V6(address) => {
            bytes[..16].copy_from_slice(&address.octets());
            16
        }
    };
    if whole || key == "source-ip-port" {
        let port = if whole { remote.port() } else { local.port() };
        bytes[length..length + 2].copy_from_slice(&port.to_be_bytes());
        length += 2;
    }
    SourceName { bytes, length }
}

/// An address without the bits behind its prefix.
#[must_use]
pub fn masked(address: IpAddr, (v4, v6): (u8, u8)) -> IpAddr {
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(v4.min(32))).unwrap_or(0);
            IpAddr::from((u32::from(address) & mask).to_be_bytes())
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(v6.min(128))).unwrap_or(0);
            IpAddr::from((u128::from(address) & mask).to_be_bytes())
        }
    }
}

/// Reads `address/length` or an address.
#[must_use]
pub fn network(text: &str) -> Option<(IpAddr, u8)> {
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
#[must_use]
pub fn is_in(address: IpAddr, (network, length): (IpAddr, u8)) -> bool {
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
