//! Health checks of raw UDP backends.

use std::net::SocketAddr;

use strowger_contract::{Probe, ProbeReply, Transport};

pub(crate) fn probe(name: &str) -> Option<Box<dyn Probe>> {
    match name {
        "udp-port" => Some(Box::new(Port)),
        "dns" => Some(Box::<Dns>::default()),
        _ => None,
    }
}

/// An empty datagram: a closed port or a host that cannot be reached is told by ICMP, and silence is
/// good. All that can be asked of a syslog server.
struct Port;

impl Probe for Port {
    fn request(&mut self, _: SocketAddr, _: SocketAddr, _: Transport, _: u64, _: &mut Vec<u8>) {}

    fn reply(&mut self, _: SocketAddr, _: &[u8]) -> ProbeReply {
        ProbeReply::Healthy
    }

    fn is_silence_good(&self) -> bool {
        true
    }
}

/// A query for the root's name servers, without recursion. Any answer is a living server's, but for
/// SERVFAIL.
#[derive(Default)]
struct Dns {
    id: [u8; 2],
}

/// RFC 1035 4.1.1: QR, in the third byte.
const RESPONSE: u8 = 0x80;

/// RFC 1035 4.1.1: RCODE 2, server failure.
const SERVER_FAILURE: u8 = 2;

impl Probe for Dns {
    fn request(
        &mut self,
        _: SocketAddr,
        _: SocketAddr,
        _: Transport,
        nonce: u64,
        out: &mut Vec<u8>,
    ) {
        self.id = ((nonce >> 24) as u16).to_be_bytes();
        out.extend_from_slice(&self.id);
        // Flags 0; one question; no other section; the root; type NS, class IN.
        out.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1]);
    }

    fn reply(&mut self, _: SocketAddr, bytes: &[u8]) -> ProbeReply {
        match bytes {
            [a, b, flags, code, ..] if [*a, *b] == self.id && flags & RESPONSE != 0 => {
                if code & 0x0f == SERVER_FAILURE {
                    ProbeReply::Unhealthy("SERVFAIL")
                } else {
                    ProbeReply::Healthy
                }
            }
            _ => ProbeReply::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dns_answers_are_told_from_others() {
        let mut probe = probe("dns").expect("known");
        let at = SocketAddr::from(([127, 0, 0, 1], 53));
        let mut query = Vec::new();
        probe.request(at, at, Transport::Udp, 0x1234_5678_9abc_def0, &mut query);
        assert_eq!(query.len(), 17);
        assert_eq!(probe.reply(at, &query), ProbeReply::Other, "an echo is no answer");
        let mut answer = query.clone();
        answer[2] |= RESPONSE;
        assert_eq!(probe.reply(at, &answer), ProbeReply::Healthy);
        answer[3] = 5;
        assert_eq!(probe.reply(at, &answer), ProbeReply::Healthy, "REFUSED is said by the living");
        answer[3] = SERVER_FAILURE;
        assert_eq!(probe.reply(at, &answer), ProbeReply::Unhealthy("SERVFAIL"));
        answer[0] ^= 1;
        assert_eq!(probe.reply(at, &answer), ProbeReply::Other);
        assert_eq!(probe.reply(at, &[]), ProbeReply::Other);
    }
}
