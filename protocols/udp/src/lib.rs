//! Raw UDP: the datagrams of one client are a flow, and each flow has one backend. For protocols
//! without media whose words the edge need not know: DNS, RADIUS, syslog.
//!
//! The engine decides and keeps the table of flows; the runtime moves the bytes, by a connected
//! socket for each flow, so that a backend's answer finds its client and ICMP names its flow.
#![forbid(unsafe_code)]

mod engine;
mod flows;
pub mod options;
mod probe;

use strowger_contract::{Context, DatagramFramer, Links, OptionsError, Probe, Protocol, Scope};
use strowger_contract::{Transport, network};

pub use engine::UdpEngine;
pub use options::{UdpMatch, UdpOptions};

/// The space of source addresses among session keys.
pub const SPACE: u8 = network::SOURCE_SPACE;

/// The protocol.
#[derive(Debug)]
pub struct Udp;

impl Protocol for Udp {
    const NAME: &'static str = "udp";
    const TRANSPORTS: &'static [Transport] = &[Transport::Udp];
    const LINKS: Links = Links::None;
    const PROBES: &'static [&'static str] = &["udp-port", "dns"];
    const SESSION_KEYS: &'static [&'static str] = &["source-ip", "source", "source-ip-port"];

    type Options = UdpOptions;
    type Match = UdpMatch;
    type Framer = DatagramFramer;
    type Engine = UdpEngine;

    fn check(scope: &Scope<UdpMatch>, options: &UdpOptions) -> Vec<OptionsError> {
        options::check(scope, options)
    }

    fn engine(context: &Context<'_, Self>) -> UdpEngine {
        UdpEngine::new(context)
    }

    fn reconfigure(engine: &mut UdpEngine, context: &Context<'_, Self>) {
        engine.reconfigure(context);
    }

    fn probe(name: &str) -> Option<Box<dyn Probe>> {
        probe::probe(name)
    }
}
