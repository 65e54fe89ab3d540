//! Networks as configurations write them.

use std::net::IpAddr;

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
