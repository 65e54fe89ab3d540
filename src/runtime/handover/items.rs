//! What travels between the two processes. A change of any of it, or of what engines save, changes
//! [`strowger_contract::handover::FORMAT`].

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use strowger_contract::handover::{FORMAT, moment, moment_or_none};
use strowger_contract::{
    BackendId, CloseCause, Closing, Endpoint, FlowId, PeerChange, PeerFacts, Transport,
};

use crate::routing::CoreSeed;

/// What the first word of either side begins with, in all formats there will ever be.
const MAGIC: &[u8; 8] = b"strowger";

/// The first word of either side: who it is. The only part that processes of different formats
/// understand of each other.
pub(crate) fn hello() -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&FORMAT.to_le_bytes());
    bytes.extend_from_slice(env!("CARGO_PKG_VERSION").as_bytes());
    bytes
}

/// Reads the other side's first word: whether both speak the same format; else why not.
pub(crate) fn check_hello(bytes: &[u8]) -> Result<(), String> {
    let wrong = || "what listens there is no strowger".to_owned();
    let rest = bytes.strip_prefix(MAGIC).ok_or_else(wrong)?;
    let (format, version) = rest.split_first_chunk().ok_or_else(wrong)?;
    let (format, version) = (u32::from_le_bytes(*format), String::from_utf8_lossy(version));
    if format == FORMAT {
        return Ok(());
    }
    Err(format!(
        "its version {} hands over in format {format}, ours ({}) in format {FORMAT}: restart instead",
        version.chars().filter(|letter| !letter.is_control()).take(64).collect::<String>(),
        env!("CARGO_PKG_VERSION"),
    ))
}

/// From the new process.
#[derive(Serialize, Deserialize)]
pub(crate) enum ToOld {
    /// It is ready for these listeners.
    Ready { listeners: Vec<String> },
    /// It has everything, and serves from now on.
    Commit,
    /// It gives up, and why.
    Failed(String),
}

/// From the old process.
#[derive(Serialize, Deserialize)]
pub(crate) enum ToNew {
    /// Who it is; its listeners' sockets come as descriptors, in order.
    Welcome(Box<Welcome>),
    /// A part of the core's state.
    Core(Vec<u8>),
    /// Leased instances.
    Registry(Vec<u8>),
    /// An engine's state.
    Engine {
        listener: String,
        worker: u8,
        unix_clients: u64,
        /// How often each flow's number was used.
        generations: Vec<u32>,
        saved: Vec<u8>,
    },
    /// A client's connection.
    Flow { listener: String, worker: u8, flow: Box<SavedFlow> },
    /// A datagram socket of the engine's own, by the engine's number for it.
    Outward { listener: String, worker: u8, number: u32, remote: SocketAddr },
    /// Something that waited in a worker's mailbox.
    Letter { listener: String, worker: u8, letter: SavedLetter },
    /// A connection that was being opened, and what waits for it.
    Dial { listener: String, worker: u8, to: Endpoint, waiting: Vec<u8> },
    /// That was all.
    End { sent: u64 },
    /// The old process touches none of it any more.
    Released,
    /// The old process goes on, and why.
    Abort(String),
}

/// What the new process needs before it can be ready.
#[derive(Serialize, Deserialize)]
pub(crate) struct Welcome {
    pub(crate) core: CoreSeed,
    /// Diameter's Origin-State-Id: it stays, since nothing is lost.
    pub(crate) started: u32,
    pub(crate) listeners: Vec<SavedListener>,
    /// Whether the last descriptor is the admin listener's, and where that is bound.
    pub(crate) admin: Option<SocketAddr>,
    pub(crate) registry: Vec<u8>,
}

/// A listener and its sockets. Each has one descriptor per worker.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedListener {
    pub(crate) name: String,
    pub(crate) sockets: Vec<(Transport, SocketAddr)>,
}

/// A connection: a client's, a link to a backend, or one that was dialed to somebody.
#[derive(Serialize, Deserialize)]
pub(crate) struct SavedFlow {
    pub(crate) remote: SocketAddr,
    pub(crate) local: SocketAddr,
    pub(crate) transport: Transport,
    /// The descriptor is a unix socket's.
    pub(crate) unix: bool,
    pub(crate) stage: SavedStage,
}

/// How far it has come.
#[derive(Serialize, Deserialize)]
pub(crate) enum SavedStage {
    /// Nobody has heard of it yet. Where its messages come in frames, the handshake is done.
    Fresh { facts: PeerFacts, early: Vec<u8>, in_frames: bool },
    /// It is cut into messages.
    Cut(SavedCut),
    /// It is joined to a backend, whose descriptor is the second.
    Joined { flow: FlowId, relay: SavedRelay },
}

/// A stream of messages.
#[derive(Serialize, Deserialize)]
pub(crate) struct SavedCut {
    /// A client's flow, or a backend's link.
    pub(crate) endpoint: Endpoint,
    /// Read, and not yet a whole message.
    pub(crate) partial: Vec<u8>,
    /// Its messages come in frames: read, and not yet a whole message of them.
    pub(crate) unfinished_frames: Option<Vec<u8>>,
    /// Written, and not yet taken by the kernel.
    pub(crate) waiting: Vec<u8>,
    pub(crate) closing: Option<(Closing, CloseCause)>,
    #[serde(with = "moment_or_none")]
    pub(crate) began: Option<Instant>,
    #[serde(with = "moment")]
    pub(crate) last_read: Instant,
}

/// A joined flow.
#[derive(Serialize, Deserialize)]
pub(crate) struct SavedRelay {
    pub(crate) backend: BackendId,
    pub(crate) idle: Duration,
    pub(crate) half_closed: Duration,
    pub(crate) park: Duration,
    pub(crate) by_pipe: bool,
    pub(crate) up: SavedWay,
    pub(crate) down: SavedWay,
    #[serde(with = "moment")]
    pub(crate) last_moved: Instant,
    #[serde(with = "moment_or_none")]
    pub(crate) ends: Option<Instant>,
    /// The backend's descriptor is a unix socket's.
    pub(crate) unix: bool,
}

/// One direction of it.
#[derive(Serialize, Deserialize)]
pub(crate) struct SavedWay {
    /// Read and not yet taken by the other side.
    pub(crate) rest: Vec<u8>,
    pub(crate) ended: bool,
    pub(crate) shut: bool,
}

/// What waited in a mailbox.
#[derive(Serialize, Deserialize)]
pub(crate) enum SavedLetter {
    Message {
        from: Endpoint,
        transport: Transport,
        remote: SocketAddr,
        local: SocketAddr,
        #[serde(with = "moment")]
        arrived: Instant,
        bytes: Vec<u8>,
    },
    Send {
        to: Endpoint,
        sender: u8,
        bytes: Vec<u8>,
    },
    Peer(Endpoint, PeerChange),
    Close(Endpoint, Closing),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_formats_are_told_apart() {
        assert_eq!(check_hello(&hello()), Ok(()));
        let mut other = hello();
        other[8] ^= 0x55;
        assert!(check_hello(&other).is_err_and(|why| why.contains("restart instead")));
        for bytes in [&b""[..], b"HTTP/1.1 400", b"strowger", b"strowger\x01"] {
            assert!(check_hello(bytes).is_err_and(|why| why.contains("no strowger")));
        }
    }
}
