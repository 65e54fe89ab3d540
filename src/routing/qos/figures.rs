//! What a pool's queue counts, by class.

use serde::Serialize;

/// Upper bounds of the histograms' buckets, in seconds.
pub(super) const BOUNDS: [f64; 16] = [
    -0.1, 0.0, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
];

/// A histogram of seconds; negative ones have buckets too.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Histogram {
    /// By the bounds of [`Histogram::cumulative`]; the last is of all that is longer.
    pub counts: [u64; BOUNDS.len() + 1],
    /// The sum of all.
    pub sum: f64,
}

impl Histogram {
    pub(super) fn note(&mut self, seconds: f64) {
        let bucket = BOUNDS.iter().position(|&bound| seconds <= bound).unwrap_or(BOUNDS.len());
        self.counts[bucket] += 1;
        self.sum += seconds;
    }

    /// Bounds and how many are at or under each.
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> {
        let bounds = BOUNDS.iter().copied().chain([f64::INFINITY]);
        bounds.zip(self.counts.iter().scan(0, |sum, count| {
            *sum += count;
            Some(*sum)
        }))
    }
}

/// What became of one class's requests at one pool's queue.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ClassFigures {
    /// They wait now.
    pub waiting: u32,
    /// They had to wait.
    pub queued: u64,
    /// They waited and went on.
    pub granted: u64,
    /// They were withdrawn: the client cancelled, hung up or disconnected.
    pub withdrawn: u64,
    /// They were taken out and placed anew: who they waited for went away.
    pub displaced: u64,
    /// Refused when they came: the wait would have been too long.
    pub refused_predicted: u64,
    /// Refused when they came: the class's lane was full.
    pub refused_full: u64,
    /// Refused after a wait: no answer could have come in time any more.
    pub refused_late: u64,
    /// How long those that went on waited.
    pub wait: Histogram,
    /// What was left of their budget then.
    pub slack: Histogram,
    /// The wait that was predicted, less the wait that it was.
    pub error: Histogram,
}

/// A pool's queue.
#[derive(Clone, Debug, Default, Serialize)]
pub struct QosFigures {
    /// `deadline` or `fifo`.
    pub policy: &'static str,
    /// Slots of all usable backends; 0 if some backend has no limit.
    pub slots: u32,
    /// Half of the answers take at most this, in milliseconds.
    pub service_p50_ms: f64,
    /// Nine in ten take at most this.
    pub service_p90_ms: f64,
    /// Grants to a lower tier while a higher one waited, for the sake of a minimum share.
    pub inversions: u64,
    /// Shorter deadlines that found their set full and queued as their class does.
    pub urgent_full: u64,
    /// Retries that the budget allowed no more.
    pub retries_denied: u64,
    /// By class, as far as any had to do with the queue.
    pub classes: Vec<(String, ClassFigures)>,
}
