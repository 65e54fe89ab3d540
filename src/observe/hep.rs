//! HEP version 3 to a Homer collector: a copy of each sampled message in a UDP datagram.
//!
//! Whole calls are sampled, by a hash of what the messages have in common. The collector's name is
//! looked up by a thread of its own, again and again: neither a worker nor the tap waits for it,
//! and while it does not resolve, nothing is sent.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use strowger_contract::{Transport, stable_hash};

use super::pcap::Packet;

/// How often the collector's name is looked up again.
const RESOLVE_EVERY: Duration = Duration::from_secs(60);

/// How soon after it did not resolve.
const RESOLVE_AGAIN: Duration = Duration::from_secs(5);

/// Payload of one datagram, at most: the chunks around it need room.
const PAYLOAD_MAX: usize = 64_000;

/// What is exported, and where to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HepSettings {
    /// `host:port`.
    pub collector: String,
    /// One call of so many is exported.
    pub sample_one_in: u32,
    /// Homer's capture agent number.
    pub capture_id: u32,
    /// Homer's shared key.
    pub auth_key: Option<String>,
    /// Where it was read from.
    pub auth_key_file: Option<String>,
}

/// Sends to one collector.
pub(super) struct HepExport {
    settings: HepSettings,
    sockets: [Option<UdpSocket>; 2],
    collector: Arc<Mutex<Option<SocketAddr>>>,
    /// The resolver ends when this is dropped.
    _stop: Sender<()>,
    buffer: Vec<u8>,
}

impl HepExport {
    pub(super) fn new(settings: HepSettings) -> Self {
        let collector: Arc<Mutex<Option<SocketAddr>>> = Arc::default();
        let (stop, stopped) = channel::<()>();
        let (name, found) = (settings.collector.clone(), Arc::clone(&collector));
        let resolve = move || loop {
            let address = name.to_socket_addrs().ok().and_then(|mut list| list.next());
            let pause = if address.is_some() { RESOLVE_EVERY } else { RESOLVE_AGAIN };
            let mut place = found.lock().unwrap_or_else(PoisonError::into_inner);
            // A name that no longer resolves keeps its last address.
            *place = address.or(*place);
            drop(place);
            if stopped.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
                return;
            }
        };
        // Without the thread nothing is sent, which the counters show.
        let _thread = std::thread::Builder::new().name("hep-resolver".to_owned()).spawn(resolve);
        let socket = |any: &str| {
            let socket = UdpSocket::bind(any).ok()?;
            socket.set_nonblocking(true).ok()?;
            Some(socket)
        };
        let sockets = [socket("0.0.0.0:0"), socket("[::]:0")];
        Self { settings, sockets, collector, _stop: stop, buffer: Vec::new() }
    }

    pub(super) fn settings(&self) -> &HepSettings {
        &self.settings
    }

    /// Whether the conversation is one of those that are exported.
    pub(super) fn samples(&self, conversation: Option<&[u8]>) -> bool {
        let one_in = u64::from(self.settings.sample_one_in.max(1));
        conversation.map_or(one_in == 1, |name| stable_hash(name).is_multiple_of(one_in))
    }

    /// Sends a message; whether it went out.
    pub(super) fn send(&mut self, packet: &Packet<'_>, conversation: Option<&[u8]>) -> bool {
        let collector = *self.collector.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(collector) = collector else { return false };
        self.buffer.clear();
        encode(&self.settings, packet, conversation, &mut self.buffer);
        let socket = self.sockets[usize::from(collector.is_ipv6())].as_ref();
        socket.is_some_and(|socket| socket.send_to(&self.buffer, collector).is_ok())
    }
}

/// One datagram. Chunks are of vendor 0 (the HEP3 specification's own).
fn encode(
    settings: &HepSettings,
    packet: &Packet<'_>,
    conversation: Option<&[u8]>,
    out: &mut Vec<u8>,
) {
    let start = out.len();
    out.extend_from_slice(b"HEP3\0\0");
    let mut chunk = |kind: u16, value: &[u8]| {
        out.extend_from_slice(&[0, 0]);
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&((value.len() + 6) as u16).to_be_bytes());
        out.extend_from_slice(value);
    };
    match (packet.from.ip(), packet.to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            chunk(1, &[2]);
            chunk(3, &from.octets());
            chunk(4, &to.octets());
        }
        (from, to) => {
            let octets = |ip: IpAddr| match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            chunk(1, &[10]);
            chunk(5, &octets(from));
            chunk(6, &octets(to));
        }
    }
    chunk(2, &[if packet.transport == Transport::Udp { 17 } else { 6 }]);
    chunk(7, &packet.from.port().to_be_bytes());
    chunk(8, &packet.to.port().to_be_bytes());
    chunk(9, &((packet.time_us / 1_000_000) as u32).to_be_bytes());
    chunk(10, &((packet.time_us % 1_000_000) as u32).to_be_bytes());
    // SIP, the only one that is exported.
    chunk(11, &[1]);
    chunk(12, &settings.capture_id.to_be_bytes());
    if let Some(key) = &settings.auth_key {
        chunk(14, key.as_bytes());
    }
    if let Some(conversation) = conversation {
        chunk(17, &conversation[..conversation.len().min(256)]);
    }
    chunk(15, &packet.bytes[..packet.bytes.len().min(PAYLOAD_MAX)]);
    let total = (out.len() - start) as u16;
    out[start + 4..start + 6].copy_from_slice(&total.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(sample_one_in: u32) -> HepSettings {
        HepSettings {
            collector: "127.0.0.1:9060".to_owned(),
            sample_one_in,
            capture_id: 7,
            auth_key: Some("secret".to_owned()),
            auth_key_file: None,
        }
    }

    #[test]
    fn chunks_add_up() {
        for (from, to) in
            [("10.0.0.1:5060", "10.0.0.2:5070"), ("[::1]:1", "[::2]:2"), ("0.0.0.0:0", "[::1]:1")]
        {
            let packet = Packet {
                time_us: 1_500_000,
                transport: Transport::Udp,
                from: from.parse().expect("good"),
                to: to.parse().expect("good"),
                bytes: &[b'x'; 65_000],
            };
            let mut out = Vec::new();
            encode(&settings(1), &packet, Some(b"call"), &mut out);
            assert_eq!(usize::from(u16::from_be_bytes([out[4], out[5]])), out.len());
            let (mut at, mut kinds) = (6, Vec::new());
            while at < out.len() {
                kinds.push(u16::from_be_bytes([out[at + 2], out[at + 3]]));
                at += usize::from(u16::from_be_bytes([out[at + 4], out[at + 5]]));
            }
            assert_eq!(at, out.len());
            assert_eq!(kinds[3..], [2, 7, 8, 9, 10, 11, 12, 14, 17, 15]);
        }
    }

    #[test]
    fn whole_calls_are_sampled() {
        let tenth = HepExport::new(settings(10));
        let calls = (0..20_000).filter(|call| tenth.samples(Some(format!("{call}@x").as_bytes())));
        let count = calls.count();
        assert!((1_800..2_200).contains(&count), "{count}");
        assert!(!tenth.samples(None));
        assert!(HepExport::new(settings(1)).samples(None));
    }
}
