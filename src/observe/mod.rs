//! What operators see: metrics, events, logs.

mod bounds;
mod brownout;
mod calls;
mod dns;
mod events;
mod hep;
mod log;
mod metrics;
mod pcap;
mod qos;
mod sinks;
mod tap;
mod traces;

pub use brownout::BrownoutMetrics;
pub(crate) use calls::rfc3339;
pub use calls::{Calls, CdrSettings, Told};
pub use dns::DnsMetrics;
pub use events::{Event, Events, Subscription};
pub use hep::HepSettings;
pub use log::{Format, init_logging};
pub use metrics::{ListenerMetrics, Metrics, NameView, WorkerMetrics};
pub use sinks::Sinks;
pub use tap::{Capture, Direction, Tap, TapPort};
pub use traces::{
    LONGEST as TRACE_LONGEST, RUNNING_MAX as TRACES_MAX, TraceError, TraceProtocol, Traces,
};
