//! SIP: scan, rewrite, and a transaction-stateful proxy (RFC 3261, 3581, 5658, 6026).
//!
//! | module | what it does |
//! |---|---|
//! | [`scan`], [`uri`], [`via`] | where things are in a message |
//! | [`frame`] | cuts streams |
//! | [`branch`] | our signed Via branch |
//! | `incoming` | a request, checked and named |
//! | `guard`, `limit`, `access` | who is let in, and how much is taken of whom |
//! | `target`, `flow` | where a request goes: Route, token, pool; a client's flow |
//! | `place`, `send`, `write`, `rules` | choosing the next hop; the request as it goes there |
//! | `pace` | how long an instance may be silent, and what retries may cost |
//! | [`hide`] | topology hiding |
//! | `overload` | RFC 7339: what neighbours are told and what is held back |
//! | `transaction` | what is under way: one request, its legs |
//! | `engine`, `requests`, `responses`, `answers`, `failures`, `finish`, `timers` | the proxy |
//! | `stateless` | sending on without remembering |
//! | `calls` | slots and records of calls |
//! | `stun` | keep-alives of flows |
//! | `respond` | answers of our own |
//! | `probe` | OPTIONS as a health check |
//! | `trace` | which messages belong to a traced call |
#![forbid(unsafe_code)]

pub mod access;
mod answers;
pub mod branch;
mod calls;
mod chains;
mod classify;
#[doc(hidden)]
pub mod doors;
mod engine;
mod failures;
mod finish;
mod flow;
pub mod frame;
mod guard;
mod handover;
mod hangup;
mod hedge;
pub mod hide;
mod incoming;
pub mod limit;
mod local;
mod lookup;
mod method;
pub mod options;
pub mod overload;
mod pace;
mod place;
mod probe;
mod requests;
mod respond;
mod responses;
pub mod rules;
pub mod scan;
mod send;
mod stateless;
mod stun;
mod target;
mod timers;
mod trace;
mod transaction;
pub mod uri;
pub mod via;
mod write;

use strowger_contract::{Context, Links, OptionsError, Probe, Protocol, Scope, Tracer, Transport};

pub use engine::SipEngine;
pub use frame::SipFramer;
pub use options::{Mode, SipMatch, SipOptions};

/// The space of Call-IDs among session keys.
pub const SPACE: u8 = 1;

/// The protocol.
#[derive(Debug)]
pub struct Sip;

impl Protocol for Sip {
    const NAME: &'static str = "sip";
    const TRANSPORTS: &'static [Transport] =
        &[Transport::Udp, Transport::Tcp, Transport::Tls, Transport::Ws, Transport::Wss];
    /// RFC 7118 4.1.
    const WEBSOCKET_PROTOCOL: &'static str = "sip";
    const LINKS: Links = Links::PerWorker;
    const PROBES: &'static [&'static str] = &["sip-options"];
    const SESSION_SPACES: &'static [u8] = &[SPACE, SPACE + 1];
    const SESSION_KEYS: &'static [&'static str] = &[
        "call-id",
        "from",
        "to",
        "ruri-user",
        "request-user",
        "auth-user",
        "source",
        "header:",
        "uri-param:",
    ];

    type Options = SipOptions;
    type Match = SipMatch;
    type Framer = SipFramer;
    type Engine = SipEngine;

    fn check(scope: &Scope<SipMatch>, options: &SipOptions) -> Vec<OptionsError> {
        options::check(scope, options)
    }

    fn engine(context: &Context<'_, Self>) -> SipEngine {
        SipEngine::new(context)
    }

    fn reconfigure(engine: &mut SipEngine, context: &Context<'_, Self>) {
        engine.reconfigure(context);
    }

    const TRACE_KEYS: &'static [&'static str] = trace::KEYS;

    fn tracer(kind: &str, value: &str) -> Result<Box<dyn Tracer>, String> {
        trace::tracer(kind, value)
    }

    fn conversation(message: &[u8]) -> Option<&[u8]> {
        trace::conversation(message)
    }

    fn describe(message: &[u8]) -> String {
        trace::describe(message)
    }

    fn probe(name: &str) -> Option<Box<dyn Probe>> {
        (name == "sip-options").then(|| Box::<probe::OptionsProbe>::default() as Box<dyn Probe>)
    }
}
