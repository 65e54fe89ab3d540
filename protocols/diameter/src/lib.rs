//! Diameter: views over messages, the peer machine, and a relay (RFC 6733, 3539).
//!
//! | module | what it does |
//! |---|---|
//! | [`avp`] | header and AVPs, every length checked |
//! | [`frame`] | cuts streams |
//! | [`mediation`] | rules that change AVPs, and pseudonyms of hosts |
//! | [`build`] | messages of our own |
//! | [`dictionary`] | names of applications, commands and AVPs, from files |
//! | [`decode`] | messages in words |
//! | `naming` | what names in configurations mean |
//! | `peer` | where clients and backends stand, and which link is taken |
//! | `capabilities` | CER and CEA; elections |
//! | `goodbye` | DPR, and connections that are gone |
//! | `watchdog` | who is alive, who owes answers, goodbyes |
//! | `pending` | requests under way, by Hop-by-Hop identifier |
//! | `relay` | what comes in: checks, and whose it is |
//! | `onward` | requests on their way to a backend |
//! | `clientward` | backends' own requests to clients |
//! | `backward` | answers, and what happens when none comes |
//! | `classify`, `matching`, `subscriber` | what a request is, and who it is about |
//! | `overload`, `redirect`, `duplicates` | what servers tell besides |
//! | `answer` | errors in Diameter's words |
//! | `trace` | which messages belong to a trace |
#![forbid(unsafe_code)]

mod answer;
pub mod avp;
mod backward;
pub mod build;
mod capabilities;
mod classify;
mod clientward;
pub mod decode;
pub mod dictionary;
mod duplicates;
mod engine;
pub mod frame;
mod goodbye;
mod handover;
mod hedge;
mod matching;
pub mod mediation;
mod naming;
mod onward;
pub mod options;
mod overload;
mod peer;
mod pending;
mod redirect;
mod relay;
pub mod rewrite;
mod subscriber;
mod trace;
mod watchdog;

use strowger_contract::{Context, Links, OptionsError, Probe, Protocol, Scope, Tracer, Transport};

pub use engine::DiameterEngine;
pub use frame::DiameterFramer;
pub use options::{Application, DiameterMatch, DiameterOptions};

/// The space of Session-Ids among session keys; client identities are in the one after it.
pub const SPACE: u8 = 5;

/// The protocol.
#[derive(Debug)]
pub struct Diameter;

impl Protocol for Diameter {
    const NAME: &'static str = "diameter";
    const TRANSPORTS: &'static [Transport] = &[Transport::Tcp, Transport::Tls, Transport::Sctp];
    const LINKS: Links = Links::Single;
    /// The link's own watchdog is the health check.
    const PROBES: &'static [&'static str] = &[];
    const BIND_KEYS: &'static [&'static str] =
        &["imsi", "imsi-apn", "msisdn", "framed-ip", "framed-ipv6-prefix"];
    const SESSION_SPACES: &'static [u8] = &[SPACE];
    const SESSION_KEYS: &'static [&'static str] = &["session-id"];
    const TRACE_KEYS: &'static [&'static str] = trace::KEYS;
    const ROUTE_KEYS: &'static [&'static str] = &["rules"];
    const FILE_OPTIONS: &'static [(&'static str, &'static str)] =
        &[("mediation.dictionary_file", "mediation.dictionary")];

    type Options = DiameterOptions;
    type Match = DiameterMatch;
    type Framer = DiameterFramer;
    type Engine = DiameterEngine;

    fn check(scope: &Scope<DiameterMatch>, options: &DiameterOptions) -> Vec<OptionsError> {
        options::check(scope, options)
    }

    fn engine(context: &Context<'_, Self>) -> DiameterEngine {
        DiameterEngine::new(context)
    }

    fn reconfigure(engine: &mut DiameterEngine, context: &Context<'_, Self>) {
        engine.reconfigure(context);
    }

    fn probe(_: &str) -> Option<Box<dyn Probe>> {
        None
    }

    fn tracer(kind: &str, value: &str) -> Result<Box<dyn Tracer>, String> {
        trace::tracer(kind, value)
    }

    fn conversation(message: &[u8]) -> Option<&[u8]> {
        trace::conversation(message)
    }

    fn describe(message: &[u8]) -> String {
        trace::describe(message)
    }
}
