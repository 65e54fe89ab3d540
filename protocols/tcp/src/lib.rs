//! Raw TCP: each flow is joined to one backend, and its bytes pass untouched.
//!
//! The engine only decides: which backend a new flow goes to, and which next if that one cannot be
//! reached. The runtime moves the bytes.
#![forbid(unsafe_code)]

mod engine;
pub mod options;

use strowger_contract::{
    Context, DatagramFramer, Intake, Links, OptionsError, Peek, Probe, Protocol, Scope, Transport,
};

pub use engine::TcpEngine;
pub use options::{TcpMatch, TcpOptions};

/// The space of source addresses among session keys.
pub const SPACE: u8 = strowger_contract::network::SOURCE_SPACE;

/// The protocol.
#[derive(Debug)]
pub struct Tcp;

impl Protocol for Tcp {
    const NAME: &'static str = "tcp";
    const TRANSPORTS: &'static [Transport] = &[Transport::Tcp, Transport::Tls, Transport::Unix];
    const LINKS: Links = Links::None;
    /// `tcp-connect` is the control side's own: it has no words to say.
    const PROBES: &'static [&'static str] = &[];
    const SESSION_SPACES: &'static [u8] = &[SPACE];
    const SESSION_KEYS: &'static [&'static str] = &["source-ip", "source", "source-ip-port", "sni"];

    type Options = TcpOptions;
    type Match = TcpMatch;
    type Framer = DatagramFramer;
    type Engine = TcpEngine;

    fn check(scope: &Scope<TcpMatch>, options: &TcpOptions) -> Vec<OptionsError> {
        options::check(scope, options)
    }

    fn engine(context: &Context<'_, Self>) -> TcpEngine {
        TcpEngine::new(context)
    }

    fn reconfigure(engine: &mut TcpEngine, context: &Context<'_, Self>) {
        engine.reconfigure(context);
    }

    fn intake(scope: &Scope<TcpMatch>, options: &TcpOptions) -> Intake {
        let rules = scope.classify.iter().map(|rule| &rule.matching);
        let matches = || scope.routes.iter().map(|(route, _)| route).chain(rules.clone());
        let looks = matches().any(TcpMatch::looks_at_bytes);
        let longest = matches().flat_map(|route| &route.first_bytes);
        let peek = Peek {
            client_hello: true,
            bytes: longest.map(String::len).max().unwrap_or(1),
            timeout: options.peek_timeout.0,
        };
        Intake { peek: looks.then_some(peek) }
    }

    fn probe(_: &str) -> Option<Box<dyn Probe>> {
        None
    }
}
