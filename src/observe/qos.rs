//! The pools' queues, as metrics: built anew at each scrape out of what the queues count.

use prometheus::core::{Collector, Desc};
use prometheus::proto::{Bucket, Histogram as Proto, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{Opts, Registry};

use super::metrics::{counter, gauge};
use crate::routing::{Histogram, PoolView};

/// Enters the queues of `pools`.
pub(super) fn register(registry: &Registry, pools: &[PoolView]) {
    let labels = &["pool", "class"];
    let depth = gauge(registry, "strowger_queue_depth", "Requests that wait for a slot", labels);
    let queued =
        counter(registry, "strowger_queued_total", "Requests that had to wait for a slot", labels);
    let granted = counter(
        registry,
        "strowger_queue_granted_total",
        "Requests that waited and went on",
        labels,
    );
    let withdrawn = counter(
        registry,
        "strowger_queue_withdrawn_total",
        "Requests whose client went away while they waited",
        labels,
    );
    let displaced = counter(
        registry,
        "strowger_queue_displaced_total",
        "Requests placed anew because who they waited for went away",
        labels,
    );
    let refused = counter(
        registry,
        "strowger_queue_refused_total",
        "Requests refused for want of slots, by stage and reason",
        &["pool", "class", "stage", "reason"],
    );
    let inversions = counter(
        registry,
        "strowger_priority_inversions_total",
        "Grants to a lower tier while a higher one waited, for the sake of a minimum share",
        &["pool"],
    );
    let denied = counter(
        registry,
        "strowger_retries_denied_total",
        "Retries that the retry budget allowed no more",
        &["pool"],
    );
    let urgent = counter(
        registry,
        "strowger_queue_urgent_full_total",
        "Carried deadlines that found their set full and queued as their class does",
        &["pool"],
    );
    let slots =
        gauge(registry, "strowger_pool_slots", "Slots; 0 if some backend has no limit", &["pool"]);
    let limit = gauge(
        registry,
        "strowger_backend_limit",
        "Slots: the least of capacity, the agent's word and the adaptive limit",
        &["pool", "backend"],
    );
    let mut waits =
        Histograms::new("strowger_queue_wait_seconds", "How long granted requests waited");
    let mut slack = Histograms::new(
        "strowger_queue_slack_seconds",
        "What was left of the budget when a waiting request went on",
    );
    let mut error = Histograms::new(
        "strowger_queue_prediction_error_seconds",
        "The wait that was predicted less the wait that it was",
    );
    for pool in pools {
        let (name, qos) = (pool.name.as_str(), &pool.qos);
        inversions.with_label_values(&[name]).inc_by(qos.inversions);
        denied.with_label_values(&[name]).inc_by(qos.retries_denied);
        urgent.with_label_values(&[name]).inc_by(qos.urgent_full);
        slots.with_label_values(&[name]).set(i64::from(qos.slots));
        for backend in &pool.backends {
            if let Some(slots) = backend.limit {
                limit.with_label_values(&[name, &backend.id]).set(i64::from(slots));
            }
        }
        for (class, figures) in &qos.classes {
            let at = &[name, class.as_str()];
            depth.with_label_values(at).set(i64::from(figures.waiting));
            queued.with_label_values(at).inc_by(figures.queued);
            granted.with_label_values(at).inc_by(figures.granted);
            withdrawn.with_label_values(at).inc_by(figures.withdrawn);
            displaced.with_label_values(at).inc_by(figures.displaced);
            for (stage, reason, count) in [
                ("enqueue", "predicted", figures.refused_predicted),
                ("enqueue", "lane_full", figures.refused_full),
                ("dequeue", "too_late", figures.refused_late),
            ] {
                refused.with_label_values(&[name, class, stage, reason]).inc_by(count);
            }
            waits.add(name, class, &figures.wait);
            slack.add(name, class, &figures.slack);
            error.add(name, class, &figures.error);
        }
    }
    for histograms in [waits, slack, error] {
        // Names are constants of this file, each used once.
        let _used_once = registry.register(Box::new(histograms));
    }
}

/// Histograms that were counted elsewhere.
struct Histograms {
    desc: Option<Desc>,
    family: MetricFamily,
}

impl Histograms {
    fn new(name: &str, help: &str) -> Self {
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(MetricType::HISTOGRAM);
        let labels = vec!["pool".to_owned(), "class".to_owned()];
        let options = Opts::new(name, help);
        let desc = Desc::new(options.name, options.help, labels, Default::default()).ok();
        Self { desc, family }
    }

    fn add(&mut self, pool: &str, class: &str, histogram: &Histogram) {
        let label = |name: &str, value: &str| {
            let mut pair = LabelPair::default();
            pair.set_name(name.to_owned());
            pair.set_value(value.to_owned());
            pair
        };
        let mut proto = Proto::default();
        proto.set_sample_sum(histogram.sum);
        proto.set_sample_count(histogram.counts.iter().sum());
        let buckets = histogram.cumulative().filter(|(bound, _)| bound.is_finite());
        let buckets = buckets.map(|(bound, count)| {
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(bound);
            bucket.set_cumulative_count(count);
            bucket
        });
        proto.set_bucket(buckets.collect());
        let mut metric = Metric::default();
        // Labels stand in the order of their names.
        metric.set_label(vec![label("class", class), label("pool", pool)]);
        metric.set_histogram(proto);
        self.family.mut_metric().push(metric);
    }
}

impl Collector for Histograms {
    fn desc(&self) -> Vec<&Desc> {
        self.desc.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        if self.family.get_metric().is_empty() { Vec::new() } else { vec![self.family.clone()] }
    }
}
