//! Flows (RFC 5626): the connection, or the address behind a NAT, that a client is reached by, as our
//! Record-Route and Path name it.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};

use strowger_contract::{Endpoint, FlowId, Pin, Router, Token, Transport, stable_hash};

use crate::branch::hex;
use crate::scan::{Name, Scan};
use crate::uri::{Uri, name_addr, parameter};
use crate::via::Via;
use crate::write::{all_values, route_uri};

/// The mark of a token that stands in a Path.
const MARK_PATH: u8 = 4;

/// Keeps tokens of Paths apart from those of dialogs, which are bound to a Call-ID.
const PATH_BINDING: u64 = 0x7061_7468_2d66_6c6f;

/// A client's flow: what its requests came over, for those that cannot be reached otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ClientFlow {
    /// A client's connection, or the address that its datagrams came from.
    pub(crate) endpoint: Endpoint,
    pub(crate) transport: Transport,
    /// The start of the process that numbered the connection; 0 for an address, which outlives it.
    epoch: u32,
}

impl ClientFlow {
    fn new(from: Endpoint, transport: Transport, epoch: u32) -> Option<Self> {
        match from {
            Endpoint::Client(_) => Some(Self { endpoint: from, transport, epoch }),
            Endpoint::Datagram { .. } => Some(Self { endpoint: from, transport, epoch: 0 }),
            Endpoint::Backend(_)
            | Endpoint::Lane(..)
            | Endpoint::Remote { .. }
            | Endpoint::Outward(_) => None,
        }
    }

    /// What a dialog's requests go back over, if the client is not to be reached otherwise: a TLS or
    /// WebSocket client has no address to dial, a TCP client whose Contact names the connection itself
    /// listens nowhere, and one whose Contact has `ob` asks for it (RFC 5626 4.3, 5.3).
    pub(crate) fn of_dialog(
        from: Endpoint,
        transport: Transport,
        source: SocketAddr,
        request: &[u8],
        scan: &Scan,
        epoch: u32,
    ) -> Option<Self> {
        let contact = scan.value(request, Name::Contact).and_then(route_uri).and_then(Uri::parse);
        let asks = contact.is_some_and(|uri| uri.parameter(b"ob").is_some())
            && is_first_hop(request, scan);
        let only_way = match transport {
            Transport::Udp => asks,
            Transport::Tcp => {
                asks || contact.and_then(|uri| uri.address()).is_some_and(|at| at == source)
            }
            _ => true,
        };
        if only_way { Self::new(from, transport, epoch) } else { None }
    }

    /// What requests for a client that registers go back over: its connection, or the source of its
    /// datagrams, unless it listens elsewhere on purpose (no `rport`, and a Contact at its own
    /// address).
    fn of_registration(
        from: Endpoint,
        transport: Transport,
        source: SocketAddr,
        request: &[u8],
        scan: &Scan,
        epoch: u32,
    ) -> Option<Self> {
        let via = scan.value(request, Name::Via).and_then(Via::first);
        let asks_back = via.is_some_and(|(via, _)| via.wants_rport());
        let contact = scan.value(request, Name::Contact).and_then(route_uri).and_then(Uri::parse);
        let elsewhere = transport == Transport::Udp
            && !asks_back
            && !has_reg_id(request, scan)
            && contact.and_then(|uri| uri.address()).is_some_and(|at| at.ip() == source.ip());
        if elsewhere { None } else { Self::new(from, transport, epoch) }
    }

    /// Where the client is, when its URI says so or its flow is an address.
    pub(crate) fn address(self, said: Option<SocketAddr>) -> SocketAddr {
        match self.endpoint {
            Endpoint::Datagram { remote, .. } => remote,
            _ => said.unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0))),
        }
    }

    /// Whether the connection was numbered by this process; an address always counts.
    pub(crate) fn is_current(self, epoch: u32) -> bool {
        match self.endpoint {
            Endpoint::Client(_) => self.epoch == epoch,
            _ => true,
        }
    }

    /// As the parameter `sf` has it: a letter for the transport, then for a connection its number (16
    /// hex digits) and its process's (8), for an address the socket (4), the IP address (8 or 32) and the
    /// port (4).
    pub(crate) fn write(self, out: &mut Vec<u8>) {
        out.push(match self.transport {
            Transport::Tls => b's',
            Transport::Ws => b'w',
            Transport::Wss => b'x',
            Transport::Udp => b'u',
            // SIP over SCTP is not spoken.
            Transport::Tcp | Transport::Unix | Transport::Sctp => b't',
        });
        match self.endpoint {
            Endpoint::Datagram { socket, remote } => {
                hex(u32::from(socket), 4, out);
                let mut octets = |bytes: &[u8]| {
                    for byte in bytes {
                        hex(u32::from(*byte), 2, out);
                    }
                };
                match remote.ip() {
                    IpAddr::V4(ip) => octets(&ip.octets()),
                    IpAddr::V6(ip) => octets(&ip.octets()),
                }
                hex(u32::from(remote.port()), 4, out);
            }
            Endpoint::Client(flow) => {
                let bits = flow.to_bits();
                hex((bits >> 32) as u32, 8, out);
                hex(bits as u32, 8, out);
                hex(self.epoch, 8, out);
            }
            Endpoint::Backend(_)
            | Endpoint::Lane(..)
            | Endpoint::Remote { .. }
            | Endpoint::Outward(_) => {}
        }
    }

    /// Reads the parameter `sf` of a Route value of ours.
    pub(crate) fn read(route: &Uri<'_>) -> Option<Self> {
        let (kind, digits) = route.parameter(b"sf").flatten()?.split_first()?;
        let number = |from: usize, to: usize| {
            let text = std::str::from_utf8(digits.get(from..to)?).ok()?;
            let plain = text.bytes().all(|byte| byte.is_ascii_hexdigit());
            plain.then(|| u128::from_str_radix(text, 16).ok()).flatten()
        };
        let transport = match kind {
            b's' => Transport::Tls,
            b'w' => Transport::Ws,
            b'x' => Transport::Wss,
            b't' => Transport::Tcp,
            b'u' => Transport::Udp,
            _ => return None,
        };
        if transport != Transport::Udp {
            let flow = FlowId::from_bits(number(0, 16)? as u64);
            let epoch = number(16, 24).filter(|_| digits.len() == 24)? as u32;
            return Some(Self { endpoint: Endpoint::Client(flow), transport, epoch });
        }
        let socket = number(0, 4)? as u16;
        let (ip, end) = match digits.len() {
            16 => (IpAddr::from((number(4, 12)? as u32).to_be_bytes()), 12),
            40 => (IpAddr::from(number(4, 36)?.to_be_bytes()), 36),
            _ => return None,
        };
        let remote = SocketAddr::new(ip, number(end, end + 4)? as u16);
        Some(Self { endpoint: Endpoint::Datagram { socket, remote }, transport, epoch: 0 })
    }

    /// What binds a token to it, so that nobody can put another's flow in its place.
    pub(crate) fn binding(flow: Option<Self>) -> u64 {
        let Some(flow) = flow else { return 0 };
        let number = match flow.endpoint {
            Endpoint::Datagram { socket, remote } => {
                let ip = match remote.ip() {
                    IpAddr::V4(ip) => stable_hash(&ip.octets()),
                    IpAddr::V6(ip) => stable_hash(&ip.octets()),
                };
                ip ^ u64::from(socket) << 16 ^ u64::from(remote.port())
            }
            Endpoint::Client(client) => {
                stable_hash(&client.to_bits().to_be_bytes()) ^ u64::from(flow.epoch)
            }
            Endpoint::Backend(_)
            | Endpoint::Lane(..)
            | Endpoint::Remote { .. }
            | Endpoint::Outward(_) => 0,
        };
        stable_hash(&number.to_be_bytes()).rotate_left(flow.transport as u32)
    }
}

/// Our Path value (RFC 3327 5.1, RFC 5626 5.1).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Path {
    token: Token,
    flow: Option<ClientFlow>,
}

impl Path {
    /// For a REGISTER that goes to an instance. Only the first hop knows the client's flow, and only
    /// it may say `ob`.
    pub(crate) fn of(
        from: Endpoint,
        transport: Transport,
        source: SocketAddr,
        request: &[u8],
        scan: &Scan,
        epoch: u32,
        router: &dyn Router,
    ) -> Self {
        let flow = if is_first_hop(request, scan) {
            ClientFlow::of_registration(from, transport, source, request, scan, epoch)
        } else {
            None
        };
        Self { token: router.seal(Pin(0), MARK_PATH, path_binding(flow)), flow }
    }

    /// Appends the header, for the place `host_port` of ours.
    pub(crate) fn write(&self, transport: Transport, host_port: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(b"Path: <sip:");
        if self.flow.is_some() {
            out.extend_from_slice(&self.token);
            out.push(b'@');
        }
        out.extend_from_slice(host_port);
        if transport != Transport::Udp {
            // Writing to a vector cannot fail.
            let _ok = write!(out, ";transport={}", transport.scheme());
        }
        if let Some(flow) = self.flow {
            out.extend_from_slice(b";sf=");
            flow.write(out);
            out.extend_from_slice(b";ob");
        }
        out.extend_from_slice(b";lr>\r\n");
    }
}

fn path_binding(flow: Option<ClientFlow>) -> u64 {
    PATH_BINDING ^ ClientFlow::binding(flow)
}

/// Whether a token stood in a Path of ours for this flow.
pub(crate) fn reads_path_token(token: &[u8], flow: ClientFlow, router: &dyn Router) -> bool {
    let read = router.unseal(token, path_binding(Some(flow)));
    read.is_some_and(|(_, mark)| mark == MARK_PATH)
}

/// Whether a REGISTER's client can do with a Path: it knows RFC 3327, or RFC 5626, which builds on it.
pub(crate) fn knows_path(request: &[u8], scan: &Scan) -> bool {
    let known =
        |tag: &[u8]| tag.eq_ignore_ascii_case(b"path") || tag.eq_ignore_ascii_case(b"outbound");
    all_values(request, scan, Name::Supported).any(known) || has_reg_id(request, scan)
}

fn has_reg_id(request: &[u8], scan: &Scan) -> bool {
    all_values(request, scan, Name::Contact)
        .filter_map(name_addr)
        .any(|(_, parameters)| parameter(parameters, b"reg-id").is_some())
}

/// RFC 5626 5.1: nobody but its sender has touched it.
fn is_first_hop(request: &[u8], scan: &Scan) -> bool {
    all_values(request, scan, Name::Via).nth(1).is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use strowger_contract::WorkerId;

    fn read_back(flow: ClientFlow) -> Option<ClientFlow> {
        let mut text = b"sip:x@10.0.0.1:5060;sf=".to_vec();
        flow.write(&mut text);
        text.extend_from_slice(b";ob;lr");
        Uri::parse(&text).and_then(|uri| ClientFlow::read(&uri))
    }

    proptest! {
        #[test]
        fn a_flow_reads_back(
            socket: u16, v6: bool, ip: u128, port: u16, bits: u64, epoch: u32, kind in 0usize..4,
        ) {
            let ip = if v6 { IpAddr::from(ip.to_be_bytes()) } else { IpAddr::from((ip as u32).to_be_bytes()) };
            let endpoint = Endpoint::Datagram { socket, remote: SocketAddr::new(ip, port) };
            let address = ClientFlow { endpoint, transport: Transport::Udp, epoch: 0 };
            prop_assert_eq!(read_back(address), Some(address));
            let transport = [Transport::Tcp, Transport::Tls, Transport::Ws, Transport::Wss][kind];
            let endpoint = Endpoint::Client(FlowId::from_bits(bits));
            let connection = ClientFlow { endpoint, transport, epoch };
            prop_assert_eq!(read_back(connection), Some(connection));
            prop_assert_ne!(ClientFlow::binding(Some(address)), ClientFlow::binding(Some(connection)));
        }

        #[test]
        fn odd_text_is_no_flow(text in "[tsxwu]?[0-9a-fg+]{0,41}") {
            let uri = format!("sip:x@a;sf={text}");
            let parsed = Uri::parse(uri.as_bytes()).expect("a URI");
            if let Some(flow) = ClientFlow::read(&parsed) {
                prop_assert_eq!(read_back(flow), Some(flow));
            }
        }
    }

    #[test]
    fn a_connection_is_this_processs_and_an_address_anybodys() {
        let flow = FlowId::new(WorkerId(1), 2, 3);
        let connection =
            ClientFlow { endpoint: Endpoint::Client(flow), transport: Transport::Tcp, epoch: 7 };
        assert!(connection.is_current(7) && !connection.is_current(8));
        let remote = SocketAddr::from(([192, 0, 2, 1], 5060));
        let endpoint = Endpoint::Datagram { socket: 0, remote };
        let address = ClientFlow { endpoint, transport: Transport::Udp, epoch: 0 };
        assert!(address.is_current(7) && address.is_current(8));
    }
}
