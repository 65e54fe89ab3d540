//! Packets of pcap and pcapng files, down to what TCP, UDP and SCTP carry.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// What a packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Carried<'a> {
    /// Bytes of a stream from this sequence number on; `fresh` at its SYN.
    Tcp { sequence: u32, fresh: bool, bytes: &'a [u8] },
    /// A datagram, an SCTP user message, or a bare message.
    Whole(&'a [u8]),
}

/// A packet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packet<'a> {
    pub(super) time: (u64, u32),
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    pub(super) carried: Carried<'a>,
}

/// The packets of a capture; `None` if the bytes are none.
pub(super) fn packets(file: &[u8]) -> Option<Vec<Packet<'_>>> {
    match file.get(..4)? {
        [0xd4, 0xc3, 0xb2, 0xa1] => Some(classic(file, false, 1_000)),
        [0xa1, 0xb2, 0xc3, 0xd4] => Some(classic(file, true, 1_000)),
        [0x4d, 0x3c, 0xb2, 0xa1] => Some(classic(file, false, 1)),
        [0xa1, 0xb2, 0x3c, 0x4d] => Some(classic(file, true, 1)),
        [0x0a, 0x0d, 0x0d, 0x0a] => Some(next_generation(file)),
        _ => None,
    }
}

fn word(bytes: &[u8], at: usize, big: bool) -> Option<u32> {
    let four: [u8; 4] = bytes.get(at..at.checked_add(4)?)?.try_into().ok()?;
    Some(if big { u32::from_be_bytes(four) } else { u32::from_le_bytes(four) })
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn classic(file: &[u8], big: bool, unit: u32) -> Vec<Packet<'_>> {
    let mut packets = Vec::new();
    let Some(link) = word(file, 20, big) else { return packets };
    let mut rest = file.get(24..).unwrap_or_default();
    while let (Some(seconds), Some(part), Some(length)) =
        (word(rest, 0, big), word(rest, 4, big), word(rest, 8, big))
    {
        let Some(end) = (length as usize).checked_add(16) else { break };
        let Some(frame) = rest.get(16..end) else { break };
        let time = (u64::from(seconds), part.saturating_mul(unit));
        link_layer(link & 0xffff, frame, time, &mut packets);
        rest = &rest[end..];
    }
    packets
}

fn next_generation(file: &[u8]) -> Vec<Packet<'_>> {
    const SECTION: u32 = 0x0a0d_0d0a;
    let (mut packets, mut rest, mut big) = (Vec::new(), file, false);
    // Of each interface, its link type and the units of its times in a second.
    let mut interfaces: Vec<(u32, u64)> = Vec::new();
    while rest.len() >= 12 {
        if word(rest, 0, true) == Some(SECTION) {
            big = word(rest, 8, true) == Some(0x1a2b_3c4d);
            interfaces.clear();
        }
        let (Some(kind), Some(length)) = (word(rest, 0, big), word(rest, 4, big)) else { break };
        let length = length as usize;
        let Some(block) = rest.get(..length).filter(|block| block.len() >= 12) else { break };
        match kind {
            1 => {
                let link = word(block, 8, big).unwrap_or(0);
                // 16 bits of link type, then 16 that are reserved.
                let link = if big { link >> 16 } else { link & 0xffff };
                interfaces.push((link, units(block, big)));
            }
            6 => enhanced(block, big, &interfaces, &mut packets),
            3 => {
                let link = interfaces.first().map_or(1, |(link, _)| *link);
                link_layer(
                    link,
                    &block[12..length.saturating_sub(4).max(12)],
                    (0, 0),
                    &mut packets,
                );
            }
            _ => {}
        }
        rest = &rest[length..];
    }
    packets
}

/// Option if_tsresol of an interface; microseconds if it has none.
fn units(block: &[u8], big: bool) -> u64 {
    let short = |at: usize| -> Option<usize> {
        let two: [u8; 2] = block.get(at..at + 2)?.try_into().ok()?;
        Some(usize::from(if big { u16::from_be_bytes(two) } else { u16::from_le_bytes(two) }))
    };
    let mut at = 16;
    while let (Some(code @ 1..), Some(length)) = (short(at), short(at + 2)) {
        if let (9, Some(&resolution)) = (code, block.get(at + 4)) {
            let exponent = u32::from(resolution & 0x7f);
            let base: u64 = if resolution & 0x80 != 0 { 2 } else { 10 };
            return base.checked_pow(exponent).unwrap_or(1_000_000);
        }
        at += 4 + length.next_multiple_of(4);
    }
    1_000_000
}

fn enhanced<'a>(
    block: &'a [u8],
    big: bool,
    interfaces: &[(u32, u64)],
    packets: &mut Vec<Packet<'a>>,
) {
    let field = |at| word(block, at, big);
    let (Some(interface), Some(high), Some(low), Some(length)) =
        (field(8), field(12), field(16), field(20))
    else {
        return;
    };
    let Some((link, units)) = interfaces.get(interface as usize) else { return };
    let Some(frame) = (length as usize).checked_add(28).and_then(|end| block.get(28..end)) else {
        return;
    };
    let stamp = u64::from(high) << 32 | u64::from(low);
    let nanos = u128::from(stamp % units) * 1_000_000_000 / u128::from(*units);
    link_layer(*link, frame, (stamp / units, nanos as u32), packets);
}

fn link_layer<'a>(link: u32, frame: &'a [u8], time: (u64, u32), packets: &mut Vec<Packet<'a>>) {
    let ip = match link {
        // Ethernet, with tags of VLANs.
        1 => {
            let mut at = 12;
            while matches!(half(frame, at), Some(0x8100 | 0x88a8)) {
                at += 4;
            }
            matches!(half(frame, at), Some(0x0800 | 0x86dd)).then(|| frame.get(at + 2..)).flatten()
        }
        // Loopback of the BSDs; raw IP; Linux's "any", old and new.
        0 | 108 => frame.get(4..),
        12 | 14 | 101 | 228 | 229 => Some(frame),
        113 => frame.get(16..),
        276 => frame.get(20..),
        // The user's own: a bare message.
        147..=162 => {
            let nobody = SocketAddr::from(([0, 0, 0, 0], 0));
            packets.push(Packet { time, from: nobody, to: nobody, carried: Carried::Whole(frame) });
            None
        }
        _ => None,
    };
    if let Some((protocol, from, to, rest)) = ip.and_then(network_layer) {
        transport_layer(protocol, (from, to), rest, time, packets);
    }
}

fn network_layer(packet: &[u8]) -> Option<(u8, IpAddr, IpAddr, &[u8])> {
    match packet.first()? >> 4 {
        4 => {
            let header = usize::from(packet[0] & 0x0f) * 4;
            let total = usize::from(half(packet, 2)?);
            // Fragments are not put together.
            if half(packet, 6)? & 0x3fff != 0 {
                return None;
            }
            let address = |at: usize| -> Option<IpAddr> {
                let four: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
                Some(Ipv4Addr::from(four).into())
            };
            // Zero where the kernel's offloading had cut it.
            let end = if total == 0 { packet.len() } else { total.min(packet.len()) };
            Some((*packet.get(9)?, address(12)?, address(16)?, packet.get(header..end)?))
        }
        6 => {
            let address = |at: usize| -> Option<IpAddr> {
                let all: [u8; 16] = packet.get(at..at + 16)?.try_into().ok()?;
                Some(Ipv6Addr::from(all).into())
            };
            let (from, to) = (address(8)?, address(24)?);
            let end = 40 + usize::from(half(packet, 4)?);
            let (mut protocol, mut rest) = (packet[6], packet.get(40..end.min(packet.len()))?);
            // Hop-by-hop and destination options, routing.
            while matches!(protocol, 0 | 43 | 60) {
                let length = (usize::from(*rest.get(1)?) + 1) * 8;
                protocol = rest[0];
                rest = rest.get(length..)?;
            }
            Some((protocol, from, to, rest))
        }
        _ => None,
    }
}

fn transport_layer<'a>(
    protocol: u8,
    (from, to): (IpAddr, IpAddr),
    rest: &'a [u8],
    time: (u64, u32),
    packets: &mut Vec<Packet<'a>>,
) {
    let (Some(source), Some(target)) = (half(rest, 0), half(rest, 2)) else { return };
    let (from, to) = (SocketAddr::new(from, source), SocketAddr::new(to, target));
    let mut push = |carried| packets.push(Packet { time, from, to, carried });
    match protocol {
        6 => {
            let (Some(sequence), Some(&offset), Some(&flags)) =
                (word(rest, 4, true), rest.get(12), rest.get(13))
            else {
                return;
            };
            let Some(bytes) = rest.get(usize::from(offset >> 4) * 4..) else { return };
            let fresh = flags & 0x02 != 0;
            // SYN takes a number of its own.
            push(Carried::Tcp { sequence: sequence.wrapping_add(u32::from(fresh)), fresh, bytes });
        }
        17 => {
            if let Some(bytes) = rest.get(8..) {
                push(Carried::Whole(bytes));
            }
        }
        132 => {
            let mut chunks = rest.get(12..).unwrap_or_default();
            while let (Some(&kind), Some(&flags), Some(length)) =
                (chunks.first(), chunks.get(1), half(chunks, 2))
            {
                let length = usize::from(length);
                let Some(chunk) = chunks.get(..length).filter(|_| length >= 4) else { return };
                // Of DATA, only what is not fragmented (RFC 9260 3.3.1).
                if kind == 0
                    && flags & 3 == 3
                    && let Some(bytes) = chunk.get(16..)
                {
                    push(Carried::Whole(bytes));
                }
                chunks = chunks.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
        _ => {}
    }
}
