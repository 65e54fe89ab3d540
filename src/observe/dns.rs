//! Figures of names that are looked up.

use std::time::Duration;

use prometheus::{Histogram, IntCounterVec, IntGauge};

use super::metrics::{self, Metrics};

/// Handles of the resolver.
#[derive(Clone)]
pub struct DnsMetrics {
    lookups: IntCounterVec,
    seconds: Histogram,
    names: IntGauge,
}

impl DnsMetrics {
    /// Once per process.
    #[must_use]
    pub fn new(metrics: &Metrics) -> Self {
        let registry = metrics.registry();
        Self {
            lookups: metrics::counter(
                registry,
                "strowger_dns_lookups_total",
                "Names asked for, by what became of it; `known`: from the cache; `stale`: no name server answered and the last answer serves",
                &["outcome"],
            ),
            seconds: metrics::histogram(
                registry,
                "strowger_dns_lookup_seconds",
                "How long names took that were not known",
                &[],
            )
            .with_label_values::<&str>(&[]),
            names: metrics::gauge(registry, "strowger_dns_names", "Names that are remembered", &[])
                .with_label_values::<&str>(&[]),
        }
    }

    /// One more.
    pub fn count(&self, outcome: &str) {
        self.lookups.with_label_values(&[outcome]).inc();
    }

    /// One that was not known took so long.
    pub fn seconds(&self, taken: Duration) {
        self.seconds.observe(taken.as_secs_f64());
    }

    /// So many are remembered.
    pub fn cached(&self, names: usize) {
        self.names.set(names as i64);
    }
}
