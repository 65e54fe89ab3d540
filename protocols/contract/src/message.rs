//! Where a message came from, where one goes, and what happens to a peer.

use std::net::SocketAddr;
use std::time::Instant;

use crate::{BackendId, FlowId};

/// How bytes travel.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub enum Transport {
    /// Datagrams.
    Udp,
    /// A plain stream.
    Tcp,
    /// A stream inside TLS.
    Tls,
    /// WebSocket over TCP.
    Ws,
    /// WebSocket over TLS.
    Wss,
    /// A stream over a unix socket.
    Unix,
    /// A stream over SCTP, one message of the protocol in each of its own.
    Sctp,
}

impl Transport {
    /// Whether messages must be cut out of a stream.
    #[must_use]
    pub fn is_stream(self) -> bool {
        self != Self::Udp
    }

    /// The scheme as configurations write it.
    #[must_use]
    pub fn scheme(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
            Self::Tls => "tls",
            Self::Ws => "ws",
            Self::Wss => "wss",
            Self::Unix => "unix",
            Self::Sctp => "sctp",
        }
    }
}

/// One end of the edge's conversations.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub enum Endpoint {
    /// Whoever is at `remote`, through datagram socket number `socket` of the listener
    /// (its place in [`crate::Scope::sockets`]). Backends behind UDP are addressed this way too.
    Datagram {
        /// Index into [`crate::Scope::sockets`].
        socket: u16,
        /// The other side's address.
        remote: SocketAddr,
    },
    /// A connection that somebody opened to the listener.
    Client(FlowId),
    /// The stream link to a backend; opened when needed, or kept, as [`crate::Protocol::LINKS`]
    /// says. Any worker may send to it.
    Backend(BackendId),
    /// A further link to a backend whose pool wants several `connections`, numbered from 1; the
    /// first is [`Endpoint::Backend`].
    Lane(BackendId, u8),
    /// A datagram socket of the engine's own, connected to one address by
    /// [`crate::Command::OpenOutward`]: what comes from there comes from this endpoint. The number is
    /// the engine's.
    Outward(u32),
    /// A stream to an address that is no backend: an existing connection with that remote address
    /// is used, else one is opened.
    Remote {
        /// A stream transport.
        transport: Transport,
        /// The other side's address.
        address: SocketAddr,
    },
}

/// Links to one backend, at most: RFC 6733 names no bound, and others stop at 64 per peer.
pub const LANES_MAX: u8 = 16;

/// The lane of a connection that the backend itself opened and that serves as its link (RFC 6733
/// 5.6.4). Its endpoint is a [`Endpoint::Client`].
pub const LANE_ACCEPTED: u8 = 31;

impl Endpoint {
    /// The link number `lane` to a backend.
    #[must_use]
    pub const fn link(backend: BackendId, lane: u8) -> Self {
        if lane == 0 { Self::Backend(backend) } else { Self::Lane(backend, lane) }
    }

    /// Whose link it is, and which of them.
    #[must_use]
    pub const fn as_link(self) -> Option<(BackendId, u8)> {
        match self {
            Self::Backend(backend) => Some((backend, 0)),
            Self::Lane(backend, lane) => Some((backend, lane)),
            _ => None,
        }
    }
}

/// A whole message as it arrived.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// Where an answer to it would go.
    pub from: Endpoint,
    /// How it came.
    pub transport: Transport,
    /// The sender's address.
    pub remote: SocketAddr,
    /// The address it was sent to.
    pub local: SocketAddr,
    /// When its first byte was read. Budgets count from here, also after a hand-over.
    pub arrived: Instant,
    /// The bytes, exactly one message.
    pub bytes: &'a [u8],
}

/// What happened to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum PeerChange {
    /// It is open: a client connected, or a link to a backend was established.
    Opened {
        /// The other side's address.
        remote: SocketAddr,
        /// Our address of it.
        local: SocketAddr,
        /// What it runs over.
        transport: Transport,
    },
    /// It is gone (or never came to be, as the cause says). For a backend's link every worker of
    /// the listener hears this; all that was sent on it and not answered is lost.
    Closed(CloseCause),
    /// A flow was joined to a backend by [`crate::Command::Splice`]; bytes now pass untouched.
    Joined(BackendId),
    /// A flow could not be joined to that backend; the flow is still open and may be joined to
    /// another.
    JoinFailed(BackendId, CloseCause),
    /// The backend was removed from the configuration, or its drain ended; say goodbye and close.
    Retired,
}

/// Why a connection ended.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub enum CloseCause {
    /// The other side closed in order.
    End,
    /// The other side reset it, or the network said it is dead.
    Reset,
    /// It could not be opened: refused.
    Refused,
    /// It could not be opened: no answer in time.
    ConnectTimeout,
    /// It could not be opened: no route, no address.
    Unreachable,
    /// It could not be opened for want of something of ours: a descriptor, memory, a free port. No fault of
    /// the far side's, and no other one would be reached either.
    Exhausted,
    /// Nothing passed for too long.
    Idle,
    /// The stream could no longer be cut into messages.
    Framing,
    /// The other side did not take what was sent to it; the bound on queued bytes was hit.
    Overflow,
    /// We closed it: the engine asked for it.
    Local,
    /// We closed it: shutdown, removal of the listener, or a worker's restart.
    Shutdown,
}

impl CloseCause {
    /// Whether the far side caused it, and so whether it counts against a backend.
    #[must_use]
    pub fn is_far_fault(self) -> bool {
        matches!(
            self,
            Self::Reset | Self::Refused | Self::ConnectTimeout | Self::Unreachable | Self::Overflow
        )
    }

    /// Stable word for metrics and logs.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::End => "end",
            Self::Reset => "reset",
            Self::Refused => "refused",
            Self::ConnectTimeout => "connect_timeout",
            Self::Unreachable => "unreachable",
            Self::Exhausted => "no_local_resource",
            Self::Idle => "idle",
            Self::Framing => "framing",
            Self::Overflow => "overflow",
            Self::Local => "local",
            Self::Shutdown => "shutdown",
        }
    }
}
