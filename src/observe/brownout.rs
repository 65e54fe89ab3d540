//! Figures of the brown-out ladder.

use prometheus::{GaugeVec, IntCounterVec, IntGauge, Opts};

use super::metrics::{self, Metrics};
use crate::routing::{BrownoutView, Step};

/// Handles of the ladder.
pub struct BrownoutMetrics {
    step: IntGauge,
    pressure: GaugeVec,
    steps: IntCounterVec,
    refused: IntCounterVec,
    counted: Vec<u64>,
}

impl BrownoutMetrics {
    /// Once per process.
    #[must_use]
    pub fn new(metrics: &Metrics) -> Self {
        let registry = metrics.registry();
        let pressure = Opts::new(
            "strowger_brownout_pressure",
            "How much of a resource is used, in parts of what counts as full; 1 is the last step",
        );
        Self {
            step: metrics::gauge(
                registry,
                "strowger_brownout_step",
                "What the node gives up: 0 nothing, 1 idle connections, 2 bulk, 3 mobility, 4 a part of set-up, 5 all that is new",
                &[],
            )
            .with_label_values::<&str>(&[]),
            pressure: metrics::register(registry, GaugeVec::new(pressure, &["resource"])),
            steps: metrics::counter(
                registry,
                "strowger_brownout_steps_total",
                "Steps taken on the brown-out ladder",
                &["direction"],
            ),
            refused: metrics::counter(
                registry,
                "strowger_brownout_refused_total",
                "Requests refused because the node is short of itself",
                &["class"],
            ),
            counted: Vec::new(),
        }
    }

    /// The ladder as it is; `name` is of a class, by its number.
    pub fn show(&mut self, view: &BrownoutView, name: impl Fn(usize) -> String) {
        self.step.set(i64::from(view.step));
        for (resource, pressure) in view.pressure {
            self.pressure.with_label_values(&[resource]).set(pressure);
        }
        self.counted.resize(view.refused.len(), 0);
        for (class, (count, counted)) in view.refused.iter().zip(&mut self.counted).enumerate() {
            if count > counted {
                self.refused.with_label_values(&[&name(class)]).inc_by(count - *counted);
                *counted = *count;
            }
        }
    }

    /// A step was taken.
    pub fn stepped(&self, step: Step) {
        let direction = if step.to > step.from { "up" } else { "down" };
        self.steps.with_label_values(&[direction]).inc();
    }
}
