//! Captures as a pcap file that tshark, Wireshark and sngrep open.
//!
//! The edge sees messages, not packets: IP, UDP and TCP headers are made up around them, from the
//! addresses that the messages really had. TCP sequence numbers count each direction's bytes, so
//! that streams are put together; what came over TLS stands there in plain text.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use strowger_contract::Transport;

/// `LINKTYPE_RAW`: packets begin with an IP header.
const LINKTYPE_RAW: u32 = 101;

/// Payload bytes of one packet, at most: what an IPv4 packet can carry behind its headers.
const PAYLOAD_MAX: usize = 65_000;

const SNAPLEN: u32 = 65_535;

/// A message as a pcap shows it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packet<'a> {
    /// Microseconds since 1970.
    pub(super) time_us: u64,
    /// Over what.
    pub(super) transport: Transport,
    /// The sender.
    pub(super) from: SocketAddr,
    /// The receiver.
    pub(super) to: SocketAddr,
    /// The message.
    pub(super) bytes: &'a [u8],
}

/// Writes a whole file.
#[must_use]
pub(super) fn pcap<'a>(packets: impl Iterator<Item = Packet<'a>>) -> Vec<u8> {
    let mut out = Vec::new();
    // Little-endian, microseconds, version 2.4.
    out.extend_from_slice(&0xa1b2_c3d4u32.to_le_bytes());
    out.extend_from_slice(&2u16.to_le_bytes());
    out.extend_from_slice(&4u16.to_le_bytes());
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(&SNAPLEN.to_le_bytes());
    out.extend_from_slice(&LINKTYPE_RAW.to_le_bytes());
    let mut sent: HashMap<(SocketAddr, SocketAddr), u32> = HashMap::new();
    for packet in packets {
        let (from, to) = one_family(packet.from, packet.to);
        if packet.transport.is_stream() {
            for part in packet.bytes.chunks(PAYLOAD_MAX) {
                // The first byte's number is 1, as after a handshake.
                let number = *sent.entry((from, to)).or_insert(1);
                let seen = *sent.entry((to, from)).or_insert(1);
                record(&mut out, packet.time_us, part.len() + 20, from, to, 6, |out| {
                    tcp(out, from, to, number, seen, part);
                });
                if let Some(number) = sent.get_mut(&(from, to)) {
                    *number = number.wrapping_add(part.len() as u32);
                }
            }
        } else {
            let part = &packet.bytes[..packet.bytes.len().min(PAYLOAD_MAX)];
            record(&mut out, packet.time_us, part.len() + 8, from, to, 17, |out| {
                out.extend_from_slice(&from.port().to_be_bytes());
                out.extend_from_slice(&to.port().to_be_bytes());
                out.extend_from_slice(&((part.len() + 8) as u16).to_be_bytes());
                out.extend_from_slice(&[0, 0]);
                out.extend_from_slice(part);
            });
        }
    }
    out
}

/// Both ends in one family: an end that is not known yet has that of the other.
fn one_family(from: SocketAddr, to: SocketAddr) -> (SocketAddr, SocketAddr) {
    let map = |address: SocketAddr| match address.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    };
    if from.is_ipv4() == to.is_ipv4() { (from, to) } else { (map(from), map(to)) }
}

fn record(
    out: &mut Vec<u8>,
    time_us: u64,
    inner: usize,
    from: SocketAddr,
    to: SocketAddr,
    protocol: u8,
    write: impl FnOnce(&mut Vec<u8>),
) {
    let header = if from.is_ipv4() { 20 } else { 40 };
    let length = (header + inner) as u32;
    out.extend_from_slice(&((time_us / 1_000_000) as u32).to_le_bytes());
    out.extend_from_slice(&((time_us % 1_000_000) as u32).to_le_bytes());
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&length.to_le_bytes());
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let start = out.len();
            out.extend_from_slice(&[0x45, 0]);
            out.extend_from_slice(&(length as u16).to_be_bytes());
            // No identification, "do not fragment", 64 hops.
            out.extend_from_slice(&[0, 0, 0x40, 0, 64, protocol, 0, 0]);
            out.extend_from_slice(&from.octets());
            out.extend_from_slice(&to.octets());
            let sum = checksum(&out[start..]);
            out[start + 10..start + 12].copy_from_slice(&sum.to_be_bytes());
        }
        (from, to) => {
            let octets = |ip: IpAddr| match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            out.extend_from_slice(&[0x60, 0, 0, 0]);
            out.extend_from_slice(&(inner as u16).to_be_bytes());
            out.extend_from_slice(&[protocol, 64]);
            out.extend_from_slice(&octets(from));
            out.extend_from_slice(&octets(to));
        }
    }
    write(out);
}

fn tcp(out: &mut Vec<u8>, from: SocketAddr, to: SocketAddr, number: u32, seen: u32, part: &[u8]) {
    out.extend_from_slice(&from.port().to_be_bytes());
    out.extend_from_slice(&to.port().to_be_bytes());
    out.extend_from_slice(&number.to_be_bytes());
    out.extend_from_slice(&seen.to_be_bytes());
    // Five words of header, PSH and ACK, a full window, no checksum, no urgent data.
    out.extend_from_slice(&[0x50, 0x18, 0xff, 0xff, 0, 0, 0, 0]);
    out.extend_from_slice(part);
}

/// RFC 1071.
fn checksum(header: &[u8]) -> u16 {
    let words = header.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let sum = words.sum::<u32>();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_what_the_rfcs_say() {
        let (one, two): (SocketAddr, SocketAddr) =
            ("10.1.2.3:5060".parse().expect("good"), "10.1.2.4:5070".parse().expect("good"));
        let message =
            |from, to, transport| Packet { time_us: 1_000_002, transport, from, to, bytes: b"abc" };
        let list = [
            message(one, two, Transport::Udp),
            message(one, two, Transport::Tcp),
            message(one, two, Transport::Tls),
            message(two, one, Transport::Tcp),
        ];
        let file = pcap(list.into_iter());
        assert_eq!(&file[24..40], &[1, 0, 0, 0, 2, 0, 0, 0, 31, 0, 0, 0, 31, 0, 0, 0]);
        let ip = &file[40..60];
        assert_eq!(checksum(ip), 0, "a header with its checksum sums to zero");
        assert_eq!((ip[9], &ip[12..16]), (17, &[10, 1, 2, 3][..]));
        let second = 40 + 31 + 16 + 20;
        assert_eq!(&file[second + 4..second + 12], &[0, 0, 0, 1, 0, 0, 0, 1]);
        let third = second + 23 + 16 + 20;
        assert_eq!(&file[third + 4..third + 8], &[0, 0, 0, 4]);
        let fourth = third + 23 + 16 + 20;
        assert_eq!(&file[fourth + 4..fourth + 12], &[0, 0, 0, 1, 0, 0, 0, 7]);
    }

    #[test]
    fn large_messages_and_mixed_families_fit() {
        let from: SocketAddr = "0.0.0.0:0".parse().expect("good");
        let to: SocketAddr = "[::1]:5060".parse().expect("good");
        let bytes = vec![b'x'; 65_535];
        for transport in [Transport::Udp, Transport::Tcp] {
            let packet = Packet { time_us: 0, transport, from, to, bytes: &bytes };
            let file = pcap(std::iter::once(packet));
            assert_eq!(file[40] >> 4, 6);
            assert!(file.len() > PAYLOAD_MAX);
        }
    }
}
