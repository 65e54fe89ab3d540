//! Via (RFC 3261 20.42): the first value of a header, taken apart.

use std::net::IpAddr;

use crate::uri::{parameter, split_host_port};

/// One Via value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Via<'a> {
    /// The whole value, without space at its ends.
    pub whole: &'a [u8],
    /// `UDP`, `TCP`, …
    pub transport: &'a [u8],
    /// `host` or `host:port` as written.
    pub sent_by: &'a [u8],
    /// The host of it; an IPv6 reference without its brackets.
    pub host: &'a [u8],
    /// The port of it.
    pub port: Option<u16>,
    /// All that follows, from the first `;`.
    pub parameters: &'a [u8],
}

impl<'a> Via<'a> {
    /// Takes the first of a header's values apart; it, and what follows its comma, if anything does.
    #[must_use]
    pub fn first(value: &'a [u8]) -> Option<(Self, Option<&'a [u8]>)> {
        let end = end_of_value(value);
        let rest = value.get(end + 1..).map(<[u8]>::trim_ascii_start);
        let whole = value[..end].trim_ascii();
        Self::parse(whole).map(|via| (via, rest))
    }

    fn parse(whole: &'a [u8]) -> Option<Self> {
        let name = memchr::memchr(b'/', whole)?;
        if !whole[..name].trim_ascii().eq_ignore_ascii_case(b"SIP") {
            return None;
        }
        let version = name + 1 + memchr::memchr(b'/', &whole[name + 1..])?;
        if whole[name + 1..version].trim_ascii() != b"2.0" {
            return None;
        }
        let after = whole[version + 1..].trim_ascii_start();
        let transport_end = after.iter().position(u8::is_ascii_whitespace)?;
        let transport = &after[..transport_end];
        let rest = after[transport_end..].trim_ascii_start();
        let semicolon = memchr::memchr(b';', rest).unwrap_or(rest.len());
        let sent_by = rest[..semicolon].trim_ascii();
        let (host, port) = split_host_port(sent_by)?;
        Some(Self { whole, transport, sent_by, host, port, parameters: &rest[semicolon..] })
    }

    /// The `branch` parameter.
    #[must_use]
    pub fn branch(&self) -> Option<&'a [u8]> {
        parameter(self.parameters, b"branch").flatten()
    }

    /// Whether the sender asks for `rport` (RFC 3581), filled or not.
    #[must_use]
    pub fn wants_rport(&self) -> bool {
        parameter(self.parameters, b"rport").is_some()
    }

    /// Where a response goes by RFC 3261 18.2.2 and RFC 3581 4: `received` or the host, `rport` or
    /// the port. `None` if the host is a name.
    #[must_use]
    pub fn response_address(&self) -> Option<std::net::SocketAddr> {
        let received = parameter(self.parameters, b"received").flatten().map(|received| {
            received
                .strip_prefix(b"[")
                .and_then(|inner| inner.strip_suffix(b"]"))
                .unwrap_or(received)
        });
        let ip: IpAddr = std::str::from_utf8(received.unwrap_or(self.host)).ok()?.parse().ok()?;
        let rport = parameter(self.parameters, b"rport").flatten();
        let rport = rport.and_then(|port| std::str::from_utf8(port).ok()?.parse().ok());
        Some((ip, rport.or(self.port).unwrap_or(5060)).into())
    }

    /// Whether `received` says where its sender is, whatever its host says.
    #[must_use]
    pub fn is_received_by_address(&self) -> bool {
        parameter(self.parameters, b"received").is_some()
    }

    /// Whether it runs over a stream.
    #[must_use]
    pub fn is_stream(&self) -> bool {
        !self.transport.eq_ignore_ascii_case(b"UDP")
    }
}

/// Where the first of several comma-separated values ends; quoted strings and `<…>` hide commas.
#[must_use]
pub fn end_of_value(value: &[u8]) -> usize {
    // What comes before a quote or a bracket hides nothing; most Via values have neither.
    match memchr::memchr3(b',', b'"', b'<', value) {
        None => value.len(),
        Some(at) if value[at] == b',' => at,
        Some(at) => at + end_of_bracketed_value(&value[at..]),
    }
}

fn end_of_bracketed_value(value: &[u8]) -> usize {
    let (mut quoted, mut angle, mut escaped) = (false, false, false);
    for (index, &byte) in value.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' if !angle => quoted = !quoted,
            b'<' if !quoted => angle = true,
            b'>' if !quoted => angle = false,
            b',' if !quoted && !angle => return index,
            _ => {}
        }
    }
    value.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_odd_spacing_and_several_values_apart() {
        let (via, rest) = Via::first(
            b"SIP  /  2.0\r\n /UDP [2001:db8::9]:5061 ; branch=z9hG4bK1;rport , SIP/2.0/TCP x",
        )
        .expect("a Via");
        assert_eq!(
            (via.transport, via.host, via.port),
            (&b"UDP"[..], &b"2001:db8::9"[..], Some(5061))
        );
        assert_eq!(via.branch(), Some(&b"z9hG4bK1"[..]));
        assert!(via.wants_rport());
        assert_eq!(rest, Some(&b"SIP/2.0/TCP x"[..]));
        let (second, none) = Via::first(rest.expect("another")).expect("a Via");
        assert_eq!((second.sent_by, second.branch(), none), (&b"x"[..], None, None));
    }

    #[test]
    fn a_response_goes_where_the_rfc_says() {
        let address = |text: &'static str| {
            Via::first(text.as_bytes())
                .and_then(|(via, _)| via.response_address())
                .map(|address| address.to_string())
        };
        assert_eq!(address("SIP/2.0/UDP 1.2.3.4"), Some("1.2.3.4:5060".into()));
        assert_eq!(address("SIP/2.0/UDP name:7000;received=5.6.7.8"), Some("5.6.7.8:7000".into()));
        assert_eq!(
            address("SIP/2.0/UDP name:7000;received=5.6.7.8;rport=9"),
            Some("5.6.7.8:9".into())
        );
        assert_eq!(
            address("SIP/2.0/UDP name:7000;received=[2001:db8::1];rport"),
            Some("[2001:db8::1]:7000".into())
        );
        assert_eq!(address("SIP/2.0/UDP name"), None);
    }

    #[test]
    fn what_is_no_via_is_refused() {
        for text in [
            "",
            "SIP/2.0",
            "SIP/2.0/UDP",
            "HTTP/2.0/UDP a",
            "SIP/3.0/UDP a",
            "SIP/2.0/UDP a:99999",
            "SIP/2.0/UDP ;branch=x",
        ] {
            assert!(Via::first(text.as_bytes()).is_none(), "{text}");
        }
    }
}
