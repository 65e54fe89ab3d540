//! URIs and addresses (RFC 3261 19.1, 20.10): taken apart as far as a proxy needs.

use std::net::{IpAddr, SocketAddr};

use memchr::{memchr, memchr2, memrchr};
use strowger_contract::Transport;

/// A `sip:` or `sips:` URI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uri<'a> {
    /// `sips:`.
    pub secure: bool,
    /// Before the `@`, with a password if there is one.
    pub user: Option<&'a [u8]>,
    /// The host; an IPv6 reference without its brackets.
    pub host: &'a [u8],
    /// The port.
    pub port: Option<u16>,
    /// From the first `;`, without headers.
    pub parameters: &'a [u8],
}

impl<'a> Uri<'a> {
    /// Takes a URI apart; `None` for other schemes and for what is no URI.
    #[must_use]
    pub fn parse(text: &'a [u8]) -> Option<Self> {
        let colon = memchr(b':', text)?;
        let (scheme, rest) = (&text[..colon], &text[colon + 1..]);
        let secure = scheme.eq_ignore_ascii_case(b"sips");
        if !secure && !scheme.eq_ignore_ascii_case(b"sip") {
            return None;
        }
        // A `;` or `?` may stand in the user part, a `@` in no later part.
        let at = memrchr(b'@', rest);
        let (user, rest) = at.map_or((None, rest), |at| (Some(&rest[..at]), &rest[at + 1..]));
        let headers = memchr(b'?', rest).unwrap_or(rest.len());
        let rest = &rest[..headers];
        let semicolon = memchr(b';', rest).unwrap_or(rest.len());
        let (host, port) = split_host_port(&rest[..semicolon])?;
        Some(Self { secure, user, host, port, parameters: &rest[semicolon..] })
    }

    /// The value of a parameter; `Some(None)` if it stands there without one.
    #[must_use]
    pub fn parameter(&self, name: &[u8]) -> Option<Option<&'a [u8]>> {
        parameter(self.parameters, name)
    }

    /// Whether its host routes loosely.
    #[must_use]
    pub fn is_loose(&self) -> bool {
        self.parameter(b"lr").is_some()
    }

    /// What it says that it is to be reached by: `transport`, and `sips`.
    #[must_use]
    pub fn wanted_transport(&self) -> Option<Transport> {
        let said = self.secure || self.parameter(b"transport").flatten().is_some();
        said.then(|| self.transport())
    }

    /// What it is to be reached by: `transport`, else UDP.
    #[must_use]
    pub fn transport(&self) -> Transport {
        match self.parameter(b"transport").flatten() {
            _ if self.secure => Transport::Tls,
            Some(name) if name.eq_ignore_ascii_case(b"tcp") => Transport::Tcp,
            Some(name) if name.eq_ignore_ascii_case(b"tls") => Transport::Tls,
            Some(name) if name.eq_ignore_ascii_case(b"ws") => Transport::Ws,
            Some(name) if name.eq_ignore_ascii_case(b"wss") => Transport::Wss,
            _ => Transport::Udp,
        }
    }

    /// Where it is, if its host (or `maddr`) is an address and not a name.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        let host = self.parameter(b"maddr").flatten().unwrap_or(self.host);
        Some((parse_ip(host)?, self.port_or_default()).into())
    }

    /// Its port, else that of its transport (RFC 3261 19.1.2).
    #[must_use]
    pub fn port_or_default(&self) -> u16 {
        let default = if self.transport() == Transport::Tls { 5061 } else { 5060 };
        self.port.unwrap_or(default)
    }
}

/// An IP address as text, with or without brackets.
#[must_use]
pub fn parse_ip(host: &[u8]) -> Option<IpAddr> {
    let host = host.strip_prefix(b"[").and_then(|inner| inner.strip_suffix(b"]")).unwrap_or(host);
    std::str::from_utf8(host).ok()?.parse().ok()
}

/// What a host name or address may consist of.
const HOST_BYTES: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = matches!(
            byte as u8,
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'-' | b'_' | b':' | b'%'
        );
        byte += 1;
    }
    table
};

/// Splits `host:port`. The host must not be empty, an IPv6 reference stands in brackets, and a port
/// is 1 to 65535.
#[must_use]
pub fn split_host_port(text: &[u8]) -> Option<(&[u8], Option<u16>)> {
    let (host, rest) = if let Some(inner) = text.strip_prefix(b"[") {
        let close = memchr(b']', inner)?;
        (&inner[..close], inner[close + 1..].trim_ascii())
    } else {
        let colon = memchr(b':', text).unwrap_or(text.len());
        (text[..colon].trim_ascii(), text[colon..].trim_ascii())
    };
    if host.is_empty() || !host.iter().all(|&byte| HOST_BYTES[usize::from(byte)]) {
        return None;
    }
    if rest.is_empty() {
        return Some((host, None));
    }
    let digits = rest.strip_prefix(b":")?.trim_ascii();
    if digits.is_empty() || digits.len() > 5 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let port = digits.iter().fold(0u32, |port, digit| port * 10 + u32::from(digit - b'0'));
    u16::try_from(port).ok().filter(|&port| port > 0).map(|port| (host, Some(port)))
}

/// Finds a parameter in `;name=value;name…`: its value, or `Some(None)` if it has none.
#[must_use]
pub fn parameter<'a>(parameters: &'a [u8], name: &[u8]) -> Option<Option<&'a [u8]>> {
    let mut rest = parameters;
    while let Some(start) = memchr(b';', rest) {
        rest = rest[start + 1..].trim_ascii_start();
        let same = rest.get(..name.len()).is_some_and(|key| key.eq_ignore_ascii_case(name));
        let end = end_of_parameter(rest);
        if same {
            // The name is longer, or this is it.
            let after = rest[name.len().min(end)..end].trim_ascii_start();
            match after.first() {
                None => return Some(None),
                Some(b'=') => return Some(Some(after[1..].trim_ascii())),
                Some(_) => {}
            }
        }
        rest = &rest[end..];
    }
    None
}

fn end_of_parameter(text: &[u8]) -> usize {
    // Hardly any is quoted.
    match memchr2(b';', b'"', text) {
        None => text.len(),
        Some(at) if text[at] == b';' => at,
        Some(at) => at + end_of_quoted_parameter(&text[at..]),
    }
}

fn end_of_quoted_parameter(text: &[u8]) -> usize {
    let (mut quoted, mut escaped) = (false, false);
    for (index, &byte) in text.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b';' if !quoted => return index,
            _ => {}
        }
    }
    text.len()
}

/// A name-addr or addr-spec as in From, To, Contact and Route: the URI, and the parameters of the
/// header after it.
#[must_use]
pub fn name_addr(value: &[u8]) -> Option<(&[u8], &[u8])> {
    let (mut quoted, mut escaped) = (false, false);
    for (index, &byte) in value.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'<' if !quoted => {
                let close = index + 1 + memchr(b'>', &value[index + 1..])?;
                return Some((&value[index + 1..close], &value[close + 1..]));
            }
            _ => {}
        }
    }
    // Without brackets all parameters are the header's (20.10).
    let semicolon = memchr(b';', value).unwrap_or(value.len());
    let uri = value[..semicolon].trim_ascii();
    (!quoted && !uri.is_empty()).then(|| (uri, &value[semicolon..]))
}

/// The `tag` of a From or To value.
#[must_use]
pub fn tag(value: &[u8]) -> Option<&[u8]> {
    let (_, parameters) = name_addr(value)?;
    parameter(parameters, b"tag").flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_uris_apart() {
        let uri = Uri::parse(b"sip:user;par=u%40x.net@[2001:db8::1]:5070;lr;transport=tcp?a=b")
            .expect("a URI");
        assert_eq!(uri.user, Some(&b"user;par=u%40x.net"[..]));
        assert_eq!(
            (uri.host, uri.port, uri.is_loose(), uri.transport()),
            (&b"2001:db8::1"[..], Some(5070), true, Transport::Tcp)
        );
        assert_eq!(uri.address(), "[2001:db8::1]:5070".parse().ok());
        assert_eq!(Uri::parse(b"sip:example.com").map(|uri| uri.address()), Some(None));
        for other in [
            &b"tel:+1"[..],
            b"urn:service:sos",
            b"sip:",
            b"sip:a@",
            b"sip:a@b:0",
            b"sip:a@b:65536",
            b"",
            b"sip",
        ] {
            assert!(Uri::parse(other).is_none(), "{other:?}");
        }
    }

    #[test]
    fn finds_tags_in_any_form() {
        for (value, expected) in [
            (&b"<sip:a@b>;tag=1"[..], Some(&b"1"[..])),
            (b"\"A; <tag=3> \\\" B\" <sip:a@b;tag=2> ; x=y ; TAG = 1", Some(b"1")),
            (b"sip:a@b;tag=1", Some(b"1")),
            (b"<sip:a@b;tag=2>", None),
            (b"tel:+1;tag=9", Some(b"9")),
            (b"\"open <sip:a@b>;tag=1", None),
        ] {
            assert_eq!(tag(value), expected, "{}", String::from_utf8_lossy(value));
        }
    }
}
