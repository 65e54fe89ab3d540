//! What the core is told: plain values, already checked, from a configuration or a registration.
//!
//! A [`SnapshotSpec`] is the whole wanted state. [`super::Core::apply`] turns it into the next
//! snapshot and takes over what lives on by identity.

use std::any::Any;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use strowger_contract::{Class, LocalSocket, PoolId, Transport};

/// The whole wanted state.
#[derive(Clone, Debug, Default)]
pub struct SnapshotSpec {
    /// The node.
    pub node: NodeSpec,
    /// All classes: the built-in ones first, in the order of their ids.
    pub classes: Vec<Class>,
    /// The pools. A pool's id is its name's, by [`super::PoolNames`].
    pub pools: Vec<PoolSpec>,
    /// The listeners.
    pub listeners: Vec<Arc<ListenerSpec>>,
}

/// The node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeSpec {
    /// Its name.
    pub name: String,
    /// Its realm, or empty.
    pub realm: String,
}

/// How a backend is chosen for a new session, within the first priority group that has a usable
/// backend (lower numbers first, in every mode).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Balance {
    /// Weighted rendezvous hashing of the session key; a Maglev table from 256 backends on.
    #[default]
    Hash,
    /// Power of two choices by (in-flight + 1) x latency / weight.
    LeastLoaded,
    /// At random in proportion to weight.
    WeightedRandom,
    /// In turn, smoothly weighted.
    RoundRobin,
    /// RFC 2782: groups by priority, at random by weight inside.
    Priority,
}

/// A pool.
#[derive(Clone, Debug)]
pub struct PoolSpec {
    /// Its name.
    pub name: String,
    /// How a backend is chosen.
    pub balance: Balance,
    /// Hash only: a backend takes at most this percentage (over 100) of the mean load; the next in
    /// hash order takes the rest. `None`: unbounded.
    pub bounded_load: Option<u16>,
    /// `session.key`; empty for the protocol's default.
    pub session_key: String,
    /// Pools of the same word know each other's sessions by address: who is on an instance in one is
    /// led to the instance of the same id in the others.
    pub session_share: Option<String>,
    /// How long a session is remembered without traffic.
    pub session_ttl: Duration,
    /// Active and passive health.
    pub health: HealthSpec,
    /// How long a backend that joins (not at process start) ramps up to its weight. Zero: at once.
    pub slow_start: Duration,
    /// How long a drain lasts at most.
    pub drain_deadline: Duration,
    /// A pool change that is undone within this time changes nothing.
    pub debounce: Duration,
    /// Under this percentage of usable backends, load is spread over all that are not drained
    /// (panic rule). Zero: never.
    pub panic_percent: u8,
    /// Whether a backend takes messages only when its link is up ([`strowger_contract::Links::Single`]).
    pub needs_link: bool,
    /// How many links are kept to each backend where links are kept, 1 to
    /// [`strowger_contract::LANES_MAX`].
    pub connections: u8,
    /// The names that subscribers are bound by, in the order that they are looked up.
    pub bind_keys: Vec<String>,
    /// The same as places in [`strowger_contract::Protocol::BIND_KEYS`] of the pool's protocol.
    pub bind_places: Vec<u8>,
    /// What happens when all slots are taken.
    pub qos: QosSpec,
    /// Whether backends are told of clients by the PROXY protocol (raw flows only).
    pub send_proxy: SendProxy,
    /// How backends behind `tls://` are spoken to.
    pub tls: Option<Arc<TlsClientSpec>>,
    /// The backends.
    pub backends: Vec<BackendSpec>,
}

impl PoolSpec {
    /// All of it but for its backends, of which there may be thousands.
    pub(super) fn without_backends(&self) -> Self {
        Self {
            name: self.name.clone(),
            balance: self.balance,
            bounded_load: self.bounded_load,
            session_key: self.session_key.clone(),
            session_ttl: self.session_ttl,
            session_share: self.session_share.clone(),
            health: self.health.clone(),
            slow_start: self.slow_start,
            drain_deadline: self.drain_deadline,
            debounce: self.debounce,
            panic_percent: self.panic_percent,
            needs_link: self.needs_link,
            connections: self.connections,
            bind_keys: self.bind_keys.clone(),
            bind_places: self.bind_places.clone(),
            qos: self.qos,
            send_proxy: self.send_proxy,
            tls: self.tls.clone(),
            backends: Vec::new(),
        }
    }
}

/// What happens when all slots are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QosSpec {
    /// In which order requests wait.
    pub policy: Policy,
    /// Whether response times limit a backend too. Off: they do not.
    pub adaptive: bool,
}

/// In which order requests wait for a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// By tier, then by deadline; what cannot be answered in time is refused at once.
    #[default]
    Deadline,
    /// As they came, all of them: what others do, to compare with.
    Fifo,
}

/// Active and passive health checks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthSpec {
    /// The probe's name; `None`: no active checks.
    pub probe: Option<String>,
    /// From probe to probe.
    pub interval: Duration,
    /// How long an answer may take.
    pub timeout: Duration,
    /// So many good answers in a row bring a backend up.
    pub rise: u32,
    /// So many failures in a row take it down.
    pub fall: u32,
    /// So many faults of its own in a row, on live traffic, eject it. Zero: never.
    pub outlier_faults: u32,
    /// How long the first ejection lasts; each further one doubles, up to 10 times.
    pub outlier_ejection: Duration,
    /// At most this percentage of the pool is ejected at a time (at least one may be).
    pub outlier_max_percent: u8,
}

/// The state an instance is in, by its owner's word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum InstanceState {
    /// Not yet ready: gets nothing.
    Starting,
    /// Takes new sessions.
    #[default]
    Ready,
    /// Takes a share of new sessions.
    Canary,
    /// Lost its lease or its readiness: keeps its sessions, gets no new ones.
    Suspended,
    /// Leaving: keeps its sessions until they end or the deadline passes, gets no new ones.
    Draining,
    /// Left: its sessions are dead.
    Gone,
}

impl InstanceState {
    /// Stable word for the API, metrics and logs.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Canary => "canary",
            Self::Suspended => "suspended",
            Self::Draining => "draining",
            Self::Gone => "gone",
        }
    }
}

/// A backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendSpec {
    /// The instance id.
    pub id: String,
    /// Grows when the instance is another one under the same id. 0 for static backends.
    pub generation: u64,
    /// How it is reached.
    pub transport: Transport,
    /// Where it is reached.
    pub address: SocketAddr,
    /// Its share, 0 to 65535; 0 takes no new sessions.
    pub weight: u32,
    /// Lower is preferred.
    pub priority: u16,
    /// How many requests (or spliced flows) may be in flight; `None`: no limit.
    pub capacity: Option<u32>,
    /// What it must call itself (Diameter Origin-Host).
    pub identity: Option<String>,
    /// The state its owner gives it.
    pub state: InstanceState,
}

/// A listener. Its protocol's own part is opaque here.
#[derive(Clone)]
pub struct ListenerSpec {
    /// Its name.
    pub name: String,
    /// Its protocol's name.
    pub protocol: &'static str,
    /// What it is bound to.
    pub sockets: Vec<LocalSocket>,
    /// The pools its messages may go to.
    pub pools: Vec<PoolId>,
    /// Who tells of clients by the PROXY protocol.
    pub proxy: Option<AcceptProxy>,
    /// How clients of `tls://` and `wss://` are spoken to.
    pub tls: Option<Arc<TlsServerSpec>>,
    /// How clients of `ws://` and `wss://` are spoken to.
    pub websocket: Arc<WebSocketSpec>,
    /// Bounds.
    pub limits: ListenerLimits,
    /// The protocol's typed setup (`Setup<P>` in `runtime`), opaque to the core.
    pub setup: Arc<dyn Any + Send + Sync>,
    /// Differs when anything but the sockets differs.
    pub fingerprint: u64,
}

impl std::fmt::Debug for ListenerSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ListenerSpec")
            .field("name", &self.name)
            .field("protocol", &self.protocol)
            .field("sockets", &self.sockets)
            .finish_non_exhaustive()
    }
}

/// Whether and how backends are told of clients (the PROXY protocol).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SendProxy {
    /// Not.
    #[default]
    Off,
    /// By a line of text.
    V1,
    /// In binary, with all TLVs that are known.
    V2,
}

/// How WebSocket clients are spoken to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebSocketSpec {
    /// Who may bring them (RFC 6454, as `https://phone.example.net`); empty: anybody, and also who
    /// names no origin.
    pub origins: Vec<String>,
    /// A message's size, at most, over all its fragments.
    pub message_bytes: usize,
    /// How long the handshake's request, and then its answer, may take.
    pub handshake: Duration,
    /// A client that was silent for so long is asked whether it is there; silent for as long again, it
    /// is gone. Zero: never.
    pub ping: Duration,
}

impl Default for WebSocketSpec {
    fn default() -> Self {
        Self {
            origins: Vec::new(),
            message_bytes: 65_536,
            handshake: Duration::from_secs(5),
            ping: Duration::from_secs(30),
        }
    }
}

/// Whose PROXY headers are believed, and must come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcceptProxy {
    /// Networks, as address and prefix length. Connections from elsewhere are clients' own.
    pub trusted: Vec<(IpAddr, u8)>,
    /// How long a header may take.
    pub timeout: Duration,
}

impl AcceptProxy {
    /// Whether an address is trusted.
    #[must_use]
    pub fn trusts(&self, address: IpAddr) -> bool {
        self.trusted.iter().any(|&network| strowger_contract::network::is_in(address, network))
    }
}

/// The oldest version of TLS that is spoken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TlsVersion {
    /// RFC 5246.
    #[default]
    V1_2,
    /// RFC 8446.
    V1_3,
}

/// Whether clients must show a certificate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ClientAuth {
    /// None is asked for.
    #[default]
    Off,
    /// One is asked for; who shows none is let in without.
    Optional,
    /// Nobody is let in without.
    Required,
}

/// What of a backend's certificate is checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Verify {
    /// Its chain, and that it names the backend.
    #[default]
    Name,
    /// Its chain only.
    Authority,
    /// Nothing.
    None,
}

/// A certificate's files, PEM.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TlsCertificate {
    /// The chain, its own certificate first.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// An OCSP answer to staple, DER.
    pub ocsp: Option<PathBuf>,
}

/// How TLS clients are spoken to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TlsServerSpec {
    /// Chosen by SNI; the first for all others.
    pub certificates: Vec<TlsCertificate>,
    /// Whether clients must show a certificate.
    pub client: ClientAuth,
    /// Who vouches for clients.
    pub client_ca: Option<PathBuf>,
    /// What may be agreed on, by preference.
    pub alpn: Vec<String>,
    /// The oldest version.
    pub min_version: TlsVersion,
    /// How long a handshake may take.
    pub handshake: Duration,
}

/// How TLS backends are spoken to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TlsClientSpec {
    /// Who vouches for backends.
    pub ca: Option<PathBuf>,
    /// What their certificates must name; `None`: their `origin_host`, else their address.
    pub name: Option<String>,
    /// What is checked.
    pub verify: Verify,
    /// Our certificate's chain and key, for backends that ask for one.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// What is offered.
    pub alpn: Vec<String>,
    /// The oldest version.
    pub min_version: TlsVersion,
}

/// A listener's bounds. Each hit is counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerLimits {
    /// Client connections at a time, over all workers. One more is accepted and closed at once.
    pub connections: u32,
    /// Bytes that wait to be written to one peer. A client over it is read from no more until it
    /// takes some; a peer over four times of it is cut off.
    pub queued_bytes: usize,
    /// How long a client's connection may be silent. Zero: for ever.
    pub idle: Duration,
    /// How long a connection to a backend may take.
    pub connect: Duration,
    /// Client connections from one address at a time, over all workers. Zero: no limit.
    pub per_source: u32,
    /// After so much silence TCP asks whether the other side is still there (SO_KEEPALIVE). Zero:
    /// never.
    pub keep_alive: Duration,
    /// How long what was sent may stay unacknowledged (TCP_USER_TIMEOUT). Zero: as the kernel has it.
    pub user_timeout: Duration,
}

impl Default for ListenerLimits {
    fn default() -> Self {
        Self {
            connections: 65_536,
            queued_bytes: 256 << 10,
            idle: Duration::ZERO,
            connect: Duration::from_secs(2),
            per_source: 0,
            keep_alive: Duration::ZERO,
            user_timeout: Duration::ZERO,
        }
    }
}

/// What a protocol's listener is made of: the typed part of [`ListenerSpec::setup`].
#[derive(Clone, Debug)]
pub struct Setup<P: strowger_contract::Protocol> {
    /// The listener and where its messages may go.
    pub scope: strowger_contract::Scope<P::Match>,
    /// Its options.
    pub options: P::Options,
}
