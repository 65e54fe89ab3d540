//! Addresses as configurations write them: `udp://127.0.0.1:5060`.

use std::net::{IpAddr, SocketAddr};

use strowger_contract::Transport;

use super::read::unknown;

const SCHEMES: [(&str, Transport); 7] = [
    ("udp", Transport::Udp),
    ("tcp", Transport::Tcp),
    ("tls", Transport::Tls),
    ("ws", Transport::Ws),
    ("wss", Transport::Wss),
    ("unix", Transport::Unix),
    ("sctp", Transport::Sctp),
];

/// Reads one, or says what is wrong and what was expected.
pub fn endpoint(text: &str) -> Result<(Transport, SocketAddr), String> {
    let Some((scheme, rest)) = text.split_once("://") else {
        return Err(format!("`{text}` has no transport; write udp://{text} or tcp://{text}"));
    };
    let Some((_, transport)) = SCHEMES.iter().find(|(name, _)| *name == scheme) else {
        return Err(unknown("transport", scheme, SCHEMES.iter().map(|(name, _)| *name)));
    };
    if *transport == Transport::Unix {
        return Ok((Transport::Unix, strowger_contract::unix::name(rest)?));
    }
    if *transport == Transport::Sctp && !cfg!(feature = "sctp") {
        let message = "this program was built without SCTP: `cargo build --features sctp` has it";
        return Err(message.to_owned());
    }
    let address: SocketAddr = rest.parse().map_err(|_| no_address(rest))?;
    if address.port() == 0 {
        return Err(format!("`{text}` needs a port other than 0: others must know where to send"));
    }
    Ok((*transport, address))
}

fn no_address(rest: &str) -> String {
    let (host, port) = rest.rsplit_once(':').unwrap_or((rest, ""));
    if rest.parse::<IpAddr>().is_ok() || port.is_empty() {
        format!("`{rest}` has no port; write 127.0.0.1:5060 or [::1]:5060")
    } else if host.parse::<IpAddr>().is_ok() && port.parse::<u16>().is_err() {
        format!("`{port}` is no port; ports are 1 to 65535")
    } else if host.contains(|letter: char| letter.is_ascii_alphabetic()) && !host.contains(':') {
        format!("`{host}` is a name; this version needs an address, such as 127.0.0.1:5060")
    } else {
        format!("`{rest}` is no address; write 127.0.0.1:5060 or [::1]:5060")
    }
}

/// Whether one socket could not be bound because of the other.
pub(super) fn overlap(one: SocketAddr, two: SocketAddr) -> bool {
    let same = one.ip() == two.ip() || one.ip().is_unspecified() || two.ip().is_unspecified();
    one.port() == two.port() && one.is_ipv4() == two.is_ipv4() && same
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wildcard_overlaps_its_family() {
        let is = |one: &str, two: &str| {
            let (one, two) = (one.parse().expect("an address"), two.parse().expect("an address"));
            overlap(one, two) && overlap(two, one)
        };
        assert!(is("0.0.0.0:1", "127.0.0.1:1") && is("[::]:1", "[::1]:1"));
        assert!(!is("0.0.0.0:1", "127.0.0.1:2") && !is("0.0.0.0:1", "[::1]:1"));
        assert!(!is("127.0.0.1:1", "127.0.0.2:1"));
    }
}
