//! What operators see: metrics, events, logs.

mod events;
mod log;
mod metrics;

pub use events::{Event, Events, Subscription};
pub use log::{Format, init_logging};
pub use metrics::{ListenerMetrics, Metrics, NameView, WorkerMetrics};
