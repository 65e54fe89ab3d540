//! Where copies of messages and records of calls go: bounded queues, each with a thread of its own.

use std::fmt;
use std::sync::Arc;

use super::calls::Calls;
use super::metrics::Metrics;
use super::tap::Tap;
use super::traces::{TraceProtocol, Traces};

/// What workers give to, and the control side looks into.
#[derive(Clone)]
pub struct Sinks {
    /// Copies of messages.
    pub tap: Arc<Tap>,
    /// Traces and the export to Homer.
    pub traces: Arc<Traces>,
    /// Live calls and their records.
    pub calls: Arc<Calls>,
}

impl Sinks {
    /// Starts the threads.
    #[must_use]
    pub fn start(metrics: &Metrics, protocols: Vec<TraceProtocol>) -> Self {
        let (taken, lost, exported, records, live) = metrics.sinks();
        let tap = Tap::new(taken, lost);
        let traces = Traces::start(&tap, protocols, exported);
        Self { tap, traces, calls: Calls::start(records, live) }
    }

    /// Bounds of theirs that ever bit.
    pub fn bounds_hit(&self) -> impl Iterator<Item = &'static str> {
        let bounds = [
            (
                self.tap.has_lost(),
                "copies of messages that wait (QUEUE_MESSAGES_MAX, QUEUE_BYTES_MAX)",
            ),
            (self.calls.has_lost(), "records of calls that wait (QUEUE_MAX)"),
        ];
        bounds.into_iter().filter_map(|(bit, bound)| bit.then_some(bound))
    }
}

impl fmt::Debug for Sinks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sinks")
    }
}
