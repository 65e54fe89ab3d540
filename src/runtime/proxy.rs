//! The PROXY protocol: what a trusted proxy in front tells, and what backends are told.

use std::net::SocketAddr;

use proxy_header::{Error, ParseConfig, ProxiedAddress, ProxyHeader, Tlv};
use strowger_contract::{PeerFacts, Proxied};

use crate::routing::SendProxy;

/// A header's length, at most. Version 2 could have 64 KiB; certificates' names and identifiers fit
/// in a fraction of this.
pub(crate) const HEADER_BYTES_MAX: usize = 4_096;

/// TLV types that must not be passed on: the checksum of another header, and padding (PP2_TYPE_CRC32C,
/// PP2_TYPE_NOOP).
const OF_ONE_HEADER: [u8; 2] = [0x03, 0x04];

/// A whole header.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// The client and the address that it called; `None`: the proxy speaks for itself.
    pub(crate) addresses: Option<(SocketAddr, SocketAddr)>,
    pub(crate) tlvs: Vec<(u8, Vec<u8>)>,
    /// Its length.
    pub(crate) length: usize,
}

/// Reads a header at the front of `bytes`; `None` if more bytes are needed.
///
/// # Errors
/// It is none.
pub(crate) fn parse(bytes: &[u8]) -> Result<Option<Header>, &'static str> {
    let (header, length) = match ProxyHeader::parse(bytes, ParseConfig::default()) {
        Ok(parsed) => parsed,
        Err(Error::BufferTooShort) if bytes.len() >= HEADER_BYTES_MAX => {
            return Err("the header is too long");
        }
        // The library asks for more of a line that has all it will ever have.
        Err(Error::BufferTooShort) if is_line_with_its_end(bytes) => {
            return Err("the PROXY line makes no sense");
        }
        Err(Error::BufferTooShort) => return Ok(None),
        Err(_) => return Err("there is no PROXY header, or a wrong one"),
    };
    let mut tlvs = Vec::new();
    for tlv in header.tlvs() {
        let tlv = tlv.map_err(|_| "a TLV is longer than its header")?;
        let mut encoded = Vec::new();
        tlv.encode(&mut encoded);
        // Type and length stand before the value.
        tlvs.push((tlv.kind(), encoded.split_off(encoded.len().min(3))));
    }
    let addresses = header.proxied_address().map(|told| (told.source, told.destination));
    Ok(Some(Header { addresses, tlvs, length }))
}

/// Whether it is version 1's line, and either whole or longer than one may be (107 bytes).
fn is_line_with_its_end(bytes: &[u8]) -> bool {
    const V1_BYTES_MAX: usize = 107;
    let has_end = bytes.windows(2).take(V1_BYTES_MAX).any(|pair| pair == b"\r\n");
    bytes.starts_with(b"PROXY") && (has_end || bytes.len() > V1_BYTES_MAX)
}

/// The header that a backend is sent before anything else.
pub(crate) fn write(
    version: SendProxy,
    remote: SocketAddr,
    local: SocketAddr,
    facts: &PeerFacts,
) -> Vec<u8> {
    let nameless = |address: SocketAddr| strowger_contract::unix::is_unix(address);
    let header = if nameless(remote) || nameless(local) || remote.is_ipv4() != local.is_ipv4() {
        ProxyHeader::with_local()
    } else {
        ProxyHeader::with_address(ProxiedAddress::stream(remote, local))
    };
    let mut out = Vec::new();
    if version == SendProxy::V1 {
        if header.encode_v1(&mut out).is_err() {
            out = b"PROXY UNKNOWN\r\n".to_vec();
        }
        return out;
    }
    let mut whole = header;
    let told: &[(u8, Vec<u8>)] =
        facts.proxied.as_ref().map_or(&[], |proxied: &Proxied| &proxied.tlvs);
    let has = |kind: u8| told.iter().any(|(known, _)| *known == kind);
    for (kind, value) in told.iter().filter(|(kind, _)| !OF_ONE_HEADER.contains(kind)) {
        if let Ok(tlv) = Tlv::decode(*kind, value) {
            whole.append_tlv(tlv);
        }
    }
    // What the proxy in front told stays; what we know ourselves is added.
    if let Some(alpn) = facts.alpn.as_deref().filter(|_| !has(0x01)) {
        whole.append_tlv(Tlv::Alpn(alpn.into()));
    }
    if let Some(name) = facts.server_name.as_deref().filter(|_| !has(0x02)) {
        whole.append_tlv(Tlv::Authority(name.into()));
    }
    if whole.encode_v2(&mut out).is_err() {
        out.clear();
        // A header without anything in it can always be written.
        let _local = ProxyHeader::with_local().encode_v2(&mut out);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn what_is_written_is_read_back_whole_and_in_pieces() {
        let proxied = Proxied {
            via: address("10.0.0.9:1"),
            tlvs: vec![(0x05, b"unique".to_vec()), (0xE0, vec![1, 2, 3]), (0x03, vec![0; 4])],
        };
        let facts = PeerFacts {
            server_name: Some("db.example.net".to_owned()),
            alpn: Some(b"postgresql".to_vec()),
            proxied: Some(proxied),
            ..PeerFacts::NONE
        };
        for (remote, local) in [("10.0.0.1:1000", "10.0.0.2:5432"), ("[2001:db8::1]:1", "[::1]:2")]
        {
            let addresses = Some((address(remote), address(local)));
            for version in [SendProxy::V1, SendProxy::V2] {
                let mut bytes = write(version, address(remote), address(local), &facts);
                let length = bytes.len();
                for end in 0..length {
                    assert_eq!(parse(&bytes[..end]), Ok(None), "{end} of {length}");
                }
                bytes.extend_from_slice(b"and data");
                let header = parse(&bytes).expect("a header").expect("whole");
                assert_eq!((header.addresses, header.length), (addresses, length));
                let kinds: Vec<u8> = header.tlvs.iter().map(|(kind, _)| *kind).collect();
                let wanted: &[u8] =
                    if version == SendProxy::V1 { &[] } else { &[0x05, 0xE0, 0x01, 0x02] };
                assert_eq!(kinds, wanted);
            }
        }
    }

    #[test]
    fn what_is_no_header_is_refused() {
        for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\x16\x03\x01\x02\x00", b"PROXY TCP9 x\r\n"]
        {
            assert!(parse(bytes).is_err(), "{bytes:?}");
        }
        assert!(
            parse(&[&b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff"[..], &[0; 4_100]].concat()).is_err()
        );
        let unix = strowger_contract::unix::client(1);
        let local = write(SendProxy::V2, unix, address("10.0.0.1:1"), &PeerFacts::NONE);
        assert_eq!(parse(&local).expect("good").expect("whole").addresses, None);
    }
}
