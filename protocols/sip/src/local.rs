//! Who we are: the addresses and names that mean this edge.

use std::net::SocketAddr;

use strowger_contract::{Scope, Transport};

use crate::options::{SipMatch, SipOptions};
use crate::uri::split_host_port;

/// The listener's own places.
#[derive(Debug, Default)]
pub(crate) struct Local {
    sockets: Vec<Place>,
    aliases: Vec<(Vec<u8>, Option<u16>)>,
}

#[derive(Debug)]
struct Place {
    transport: Transport,
    address: SocketAddr,
    /// `host:port` as peers are told it.
    text: Vec<u8>,
    host: Vec<u8>,
    port: u16,
}

impl Local {
    pub(crate) fn new(scope: &Scope<SipMatch>, options: &SipOptions) -> Self {
        let place = |socket: &strowger_contract::LocalSocket| {
            let own = socket.address.to_string();
            let told = socket.advertise.as_deref().unwrap_or(&own);
            let (host, port) = split_host_port(told.as_bytes()).unwrap_or((told.as_bytes(), None));
            let port = port.unwrap_or_else(|| socket.address.port());
            let bracket = host.contains(&b':');
            let mut text = Vec::new();
            text.extend_from_slice(if bracket { b"[" } else { b"" });
            text.extend_from_slice(host);
            text.extend_from_slice(if bracket { b"]:" } else { b":" });
            crate::branch::decimal(u64::from(port), &mut text);
            Place {
                transport: socket.transport,
                address: socket.address,
                host: host.to_vec(),
                text,
                port,
            }
        };
        let alias = |alias: &String| {
            let (host, port) = split_host_port(alias.as_bytes())?;
            Some((host.to_vec(), port))
        };
        Self {
            sockets: scope.sockets.iter().map(place).collect(),
            aliases: options.aliases.iter().filter_map(alias).collect(),
        }
    }

    /// Whether `host:port` is this edge.
    pub(crate) fn is_ours(&self, host: &[u8], port: Option<u16>) -> bool {
        let at = port.unwrap_or(5060);
        let ip = crate::uri::parse_ip(host);
        self.sockets.iter().any(|place| {
            let named = place.host.eq_ignore_ascii_case(host) && place.port == at;
            named || place.address.port() == at && ip == Some(place.address.ip())
        }) || self.aliases.iter().any(|(alias, only)| {
            alias.eq_ignore_ascii_case(host) && only.is_none_or(|only| only == at)
        })
    }

    /// The datagram socket that reaches addresses of a family.
    pub(crate) fn datagram_socket(&self, ipv6: bool) -> Option<u16> {
        self.find(Transport::Udp, ipv6)
    }

    /// Whether something of that kind is bound.
    pub(crate) fn has(&self, transport: Transport) -> bool {
        self.sockets.iter().any(|place| place.transport == transport)
    }

    /// Whether something is bound to addresses of a family.
    pub(crate) fn has_family(&self, ipv6: bool) -> bool {
        self.sockets.iter().any(|place| place.address.is_ipv6() == ipv6)
    }

    /// Whether a place is one of ours.
    pub(crate) fn is_here(&self, transport: Transport, address: SocketAddr) -> bool {
        self.sockets.iter().any(|place| place.transport == transport && place.address == address)
    }

    /// The socket that names us to peers reached by `transport`: a listening one of that kind and
    /// family, else any.
    pub(crate) fn facing(&self, transport: Transport, ipv6: bool) -> u16 {
        let same_kind = || {
            self.sockets.iter().position(|place| place.transport == transport).map(|at| at as u16)
        };
        self.find(transport, ipv6).or_else(same_kind).unwrap_or(0)
    }

    /// The socket that a message came to.
    pub(crate) fn receiving(&self, transport: Transport, local: SocketAddr) -> u16 {
        let exact = self
            .sockets
            .iter()
            .position(|place| place.transport == transport && place.address == local);
        exact.map_or_else(|| self.facing(transport, local.is_ipv6()), |at| at as u16)
    }

    fn find(&self, transport: Transport, ipv6: bool) -> Option<u16> {
        let fits = |place: &Place| place.transport == transport && place.address.is_ipv6() == ipv6;
        self.sockets.iter().position(fits).map(|at| at as u16)
    }

    /// `host:port` of a socket, as peers are told it.
    pub(crate) fn text(&self, socket: u16) -> &[u8] {
        self.sockets.get(usize::from(socket)).map_or(b"invalid.invalid", |place| &place.text)
    }

    /// What runs over a socket.
    pub(crate) fn transport(&self, socket: u16) -> Transport {
        self.sockets.get(usize::from(socket)).map_or(Transport::Udp, |place| place.transport)
    }
}

/// A transport as Via writes it.
pub(crate) fn via_word(transport: Transport) -> &'static [u8] {
    match transport {
        Transport::Udp => b"UDP",
        Transport::Tcp | Transport::Unix => b"TCP",
        Transport::Tls => b"TLS",
        Transport::Ws => b"WS",
        Transport::Wss => b"WSS",
        Transport::Sctp => b"SCTP",
    }
}
