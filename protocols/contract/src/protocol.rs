//! The pluggable unit: a protocol's name, options, factory and probes.

use std::net::SocketAddr;
use std::time::Duration;

use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::{ClassId, Engine, Framer, Intake, PoolId, Tracer, Transport, WorkerId};

/// How streams to backends are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Links {
    /// The protocol has none: datagrams only, or flows that are spliced one to one.
    None,
    /// Each worker opens its own when it first sends, and keeps it.
    PerWorker,
    /// One per backend and listener, opened at start and reopened for ever (with back-off); one
    /// worker owns it, the others send through it.
    Single,
}

/// A socket that a listener is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalSocket {
    /// What runs over it.
    pub transport: Transport,
    /// The bound address.
    pub address: SocketAddr,
    /// What is told to others instead of the address, `host` or `host:port`, if configured.
    pub advertise: Option<String>,
    /// A unix socket's permissions; `None`: what the process's umask leaves.
    pub mode: Option<u32>,
}

/// What a listener is and where its messages may go.
#[derive(Clone, Debug)]
pub struct Scope<M> {
    /// The listener's name.
    pub listener: String,
    /// The node's name.
    pub node: String,
    /// The node's realm, or empty.
    pub realm: String,
    /// What it is bound to. [`crate::Endpoint::Datagram`] counts in this list.
    pub sockets: Vec<LocalSocket>,
    /// The first match wins.
    pub routes: Vec<(M, PoolId)>,
    /// Where a message goes that no route matches.
    pub pool: Option<PoolId>,
    /// Which class a request falls into; the first match wins, and what none matches is judged by
    /// the protocol.
    pub classify: Vec<ClassRule<M>>,
}

/// One rule of a listener's `classify`.
#[derive(Clone, Debug)]
pub struct ClassRule<M> {
    /// What it is for.
    pub matching: M,
    /// The class of what matches.
    pub class: ClassId,
    /// Whether it also judges requests that say of themselves that they are emergencies.
    pub even_carried: bool,
}

impl<M> ClassRule<M> {
    /// The class by the first rule whose match `holds`; with `carried`, only by those that also judge
    /// emergencies.
    pub fn first(rules: &[Self], carried: bool, holds: impl Fn(&M) -> bool) -> Option<ClassId> {
        let mut rules = rules.iter().filter(|rule| rule.even_carried || !carried);
        rules.find(|rule| holds(&rule.matching)).map(|rule| rule.class)
    }
}

/// What an engine is made from.
#[derive(Debug)]
pub struct Context<'a, P: Protocol> {
    /// Which worker it will run on.
    pub worker: WorkerId,
    /// How many there are.
    pub workers: u8,
    /// Feeds all that must look random (branches, tags, identifiers).
    pub seed: u64,
    /// A number that grows with each start of the process (seconds since 1970 will do): Diameter's
    /// Origin-State-Id.
    pub started: u32,
    /// The listener.
    pub scope: &'a Scope<P::Match>,
    /// Its options.
    pub options: &'a P::Options,
}

/// An option that makes no sense, found after its type was right.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{path}: {message}")]
pub struct OptionsError {
    /// Which one, relative to `options` or to the route's `match` (`routes[0].match.realm`).
    pub path: String,
    /// What is wrong, and what was expected.
    pub message: String,
}

/// An active health check in a protocol's own words. Pure: the control side moves its bytes.
pub trait Probe: Send {
    /// Writes the next request. `from` is the address that it leaves from, `to` the backend's;
    /// `nonce` differs in each.
    fn request(
        &mut self,
        from: SocketAddr,
        to: SocketAddr,
        transport: Transport,
        nonce: u64,
        out: &mut Vec<u8>,
    );

    /// Judges what came back for the last request. `from` is the address it came from.
    fn reply(&mut self, from: SocketAddr, bytes: &[u8]) -> ProbeReply;

    /// Whether no answer in time is a good one, so that only the network can speak against the
    /// backend (ICMP).
    fn is_silence_good(&self) -> bool {
        false
    }
}

/// What a reply to a probe means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeReply {
    /// The backend is well.
    Healthy,
    /// The backend answered that it is not, for a reason that a log can show.
    Unhealthy(&'static str),
    /// Not an answer to this probe; wait on.
    Other,
    /// A stream's answer is not yet whole; wait on.
    Incomplete,
}

/// A protocol: the pluggable unit.
pub trait Protocol: Send + Sync + 'static {
    /// As configurations write it.
    const NAME: &'static str;
    /// What its listeners may be bound to.
    const TRANSPORTS: &'static [Transport];
    /// How streams to backends are held.
    const LINKS: Links;
    /// The names of its active health checks (`sip-options`).
    const PROBES: &'static [&'static str];

    /// What a pool's `session.key` may be for it; the first is the default. One that ends in a
    /// colon takes a name behind it (`header:X-Tenant`).
    const SESSION_KEYS: &'static [&'static str];

    /// The spaces of its session names ([`crate::Keyer::session`]), so that operators can ask where a
    /// session lives by its name. Numbers below 128 are the standard protocols'.
    const SESSION_SPACES: &'static [u8] = &[];

    /// What a pool's `bind_keys` may name; empty if the protocol knows no subscribers.
    const BIND_KEYS: &'static [&'static str] = &[];

    /// The listener's `options`.
    type Options: DeserializeOwned
        + Serialize
        + JsonSchema
        + Default
        + Clone
        + PartialEq
        + Send
        + Sync
        + std::fmt::Debug;
    /// A route's `match`.
    type Match: DeserializeOwned
        + Serialize
        + JsonSchema
        + Clone
        + PartialEq
        + Send
        + Sync
        + std::fmt::Debug;
    /// Cuts its streams.
    type Framer: Framer + Default;
    /// Runs it.
    type Engine: Engine;

    /// Finds what types cannot: all of it, not the first only.
    fn check(scope: &Scope<Self::Match>, options: &Self::Options) -> Vec<OptionsError>;

    /// Makes an engine.
    fn engine(context: &Context<'_, Self>) -> Self::Engine
    where
        Self: Sized;

    /// Gives a running engine new options and routes; what is under way goes on.
    fn reconfigure(engine: &mut Self::Engine, context: &Context<'_, Self>)
    where
        Self: Sized;

    /// Makes the health check of that name, one of [`Protocol::PROBES`].
    fn probe(name: &str) -> Option<Box<dyn Probe>>;

    /// What clients over WebSocket must offer as `Sec-WebSocket-Protocol` (RFC 6455 4.2.2); of use
    /// where [`Protocol::TRANSPORTS`] names ws or wss.
    const WEBSOCKET_PROTOCOL: &'static str = "";

    /// What is done with a connection before the engine hears of it.
    fn intake(scope: &Scope<Self::Match>, options: &Self::Options) -> Intake {
        let _ = (scope, options);
        Intake::default()
    }

    /// How long a stream may take for its first whole message, and for the rest of a message that
    /// has begun; slow senders are cut off after it.
    const MESSAGE_TIMEOUT: Duration = Duration::from_secs(32);

    /// What a trace may follow (`call-id`, `from-user`); the first is meant where a key names no
    /// kind. Empty: the protocol's messages cannot be traced.
    const TRACE_KEYS: &'static [&'static str] = &[];

    /// Keys of a route that are the protocol's own, besides `match` and `pool`. They are read as
    /// fields of [`Protocol::Match`], and are no keys of `match` itself.
    const ROUTE_KEYS: &'static [&'static str] = &[];

    /// Options that name a file, and the option that the file's text goes in front of; paths with
    /// dots. A protocol reads no files itself.
    const FILE_OPTIONS: &'static [(&'static str, &'static str)] = &[];

    /// Makes what finds the messages of a trace. `kind` is one of [`Protocol::TRACE_KEYS`].
    ///
    /// # Errors
    /// The value cannot be one of that kind; why.
    fn tracer(kind: &str, value: &str) -> Result<Box<dyn Tracer>, String> {
        let _unused = (kind, value);
        Err(format!("{} cannot be traced", Self::NAME))
    }

    /// What a message has in common with the others of its conversation (SIP: the Call-ID), for
    /// sampling and exports. Off the workers' threads.
    fn conversation(message: &[u8]) -> Option<&[u8]> {
        let _unused = message;
        None
    }

    /// A message in a few words for people (`INVITE sip:bob@example.net`, `180 Ringing`). Off the
    /// workers' threads; only printable characters.
    fn describe(message: &[u8]) -> String {
        format!("{} bytes", message.len())
    }
}
