//! Keep-alives that share the port with SIP: STUN binding requests of clients behind NAT (RFC 5626
//! 3.5.2, 8), and the line ends that many send instead.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use strowger_contract::{ClassId, Message, Note, Outbox, Router};

use crate::engine::SipEngine;

const HEADER_BYTES: usize = 20;
const BINDING_REQUEST: [u8; 2] = [0, 1];
const BINDING_SUCCESS: [u8; 2] = [1, 1];
const XOR_MAPPED_ADDRESS: [u8; 2] = [0, 0x20];
const COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];

/// Whether it cannot be SIP: RFC 5389 begins with two zero bits and SIP with a letter; and nothing but line
/// ends is no message.
pub(crate) fn is_no_sip(bytes: &[u8]) -> bool {
    match bytes.first() {
        Some(0..4) => true,
        Some(b'\r' | b'\n' | b' ' | b'\t') => bytes.iter().all(|byte| is_space(*byte)),
        _ => false,
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b'\r' | b'\n' | b' ' | b'\t' | 0)
}

/// The answer to a STUN binding request (RFC 5389 7.3.1, 15.2): where it came from. `None`: it is none.
pub(crate) fn answer(request: &[u8], source: SocketAddr, out: &mut Vec<u8>) -> Option<()> {
    let header = request.get(..HEADER_BYTES)?;
    let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if header[..2] != BINDING_REQUEST
        || header[4..8] != COOKIE
        || length % 4 != 0
        || request.len() != HEADER_BYTES + length
    {
        return None;
    }
    let (family, octets, size) = match source.ip().to_canonical() {
        IpAddr::V4(ip) => {
            let mut octets = [0; 16];
            octets[..4].copy_from_slice(&ip.octets());
            (1, octets, 4)
        }
        IpAddr::V6(ip) => (2, ip.octets(), 16),
    };
    out.extend_from_slice(&BINDING_SUCCESS);
    out.extend_from_slice(&[0, 8 + size as u8]);
    out.extend_from_slice(&header[4..]);
    out.extend_from_slice(&XOR_MAPPED_ADDRESS);
    out.extend_from_slice(&[0, 4 + size as u8, 0, family]);
    let port = source.port().to_be_bytes();
    out.extend_from_slice(&[port[0] ^ COOKIE[0], port[1] ^ COOKIE[1]]);
    // Cookie and transaction identifier are 16 bytes, as long as the longest address.
    let xored = octets.iter().zip(&header[4..]).map(|(octet, mask)| octet ^ mask);
    out.extend(xored.take(size));
    Some(())
}

impl SipEngine {
    /// What is no SIP: a binding request is answered, line ends keep a NAT's mapping by having come.
    pub(crate) fn keep_alive(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        router: &dyn Router,
        out: &mut Outbox,
    ) {
        let bytes = message.bytes;
        if bytes.iter().all(|byte| is_space(*byte)) {
            return out.note(Note::Count("sip_keep_alives"));
        }
        if let Some(why) = self.flooded(now, message, router) {
            return out.drop_message(why);
        }
        let mut known = false;
        out.send(message.from, ClassId::CONTROL, |buffer| {
            known = answer(bytes, message.remote, buffer).is_some();
        });
        if known {
            out.note(Note::Count("sip_stun_answers"));
        } else {
            out.drop_message("malformed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 5769 2.2 and 2.3 have these addresses and this transaction identifier.
    #[test]
    fn an_address_is_told_as_the_rfcs_vectors_have_it() {
        let mut request = vec![0, 1, 0, 0];
        request.extend_from_slice(&COOKIE);
        request.extend_from_slice(&[
            0xb7, 0xe7, 0xa7, 0x01, 0xbc, 0x34, 0xd6, 0x86, 0xfa, 0x87, 0xdf, 0xae,
        ]);
        let mut said = Vec::new();
        let v4 = "192.0.2.1:32853".parse().expect("an address");
        assert_eq!(answer(&request, v4, &mut said), Some(()));
        assert_eq!(said[..4], [1, 1, 0, 12]);
        assert_eq!(said[20..], [0, 0x20, 0, 8, 0, 1, 0xa1, 0x47, 0xe1, 0x12, 0xa6, 0x43]);
        said.clear();
        let v6 = "[2001:db8:1234:5678:11:2233:4455:6677]:32853".parse().expect("an address");
        assert_eq!(answer(&request, v6, &mut said), Some(()));
        assert_eq!(
            said[20..],
            [
                0, 0x20, 0, 0x14, 0, 2, 0xa1, 0x47, 0x01, 0x13, 0xa9, 0xfa, 0xa5, 0xd3, 0xf1, 0x79,
                0xbc, 0x25, 0xf4, 0xb5, 0xbe, 0xd2, 0xb9, 0xd9
            ]
        );
        for end in 0..request.len() {
            assert_eq!(answer(&request[..end], v4, &mut Vec::new()), None);
        }
        request[0] = 1;
        assert_eq!(answer(&request, v4, &mut Vec::new()), None, "an answer gets no answer");
    }
}
