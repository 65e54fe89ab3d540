//! What a run saw: counts, latencies from the intended time, and how much of a core the generator
//! itself took, so that it is known not to be the bottleneck.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde_json::{Map, Value, json};

/// A send so much later than intended says that the generator is the bottleneck.
const LAG_WORTH_A_WARNING: Duration = Duration::from_millis(2);

/// More of a core than this, likewise.
const CPU_WORTH_A_WARNING: f64 = 0.9;

/// Latencies in microseconds, 1 us to 5 minutes, three digits.
#[derive(Clone, Debug)]
pub(crate) struct Latencies(Histogram<u64>);

impl Default for Latencies {
    fn default() -> Self {
        // The bounds are constants that the crate accepts.
        Self(Histogram::new_with_bounds(1, 300_000_000, 3).unwrap_or_else(|_| unreachable!()))
    }
}

impl Latencies {
    pub(crate) fn note(&mut self, latency: Duration) {
        self.0.saturating_record(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX).max(1));
    }

    fn json(&self) -> Value {
        let histogram = &self.0;
        let mut object = Map::new();
        for (name, quantile) in
            [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999), ("max", 1.0)]
        {
            object.insert(name.into(), histogram.value_at_quantile(quantile).into());
        }
        object.insert("mean".into(), json!(histogram.mean().round()));
        object.insert("count".into(), histogram.len().into());
        Value::Object(object)
    }
}

/// What a run saw.
#[derive(Debug)]
pub(crate) struct Report {
    protocol: &'static str,
    started: Instant,
    cpu_at_start: Duration,
    /// Things begun.
    pub(crate) begun: u64,
    /// Things that ended well.
    pub(crate) good: u64,
    /// Things that did not, by reason.
    pub(crate) failed: BTreeMap<String, u64>,
    /// Other counts worth knowing.
    pub(crate) counts: BTreeMap<&'static str, u64>,
    /// By name.
    pub(crate) latencies: BTreeMap<&'static str, Latencies>,
    /// How many sessions each instance took.
    pub(crate) instances: BTreeMap<usize, u64>,
    /// How late things were begun.
    pub(crate) lag: Latencies,
}

impl Report {
    pub(crate) fn new(protocol: &'static str, started: Instant) -> Self {
        Self {
            protocol,
            started,
            cpu_at_start: own_cpu(),
            begun: 0,
            good: 0,
            failed: BTreeMap::new(),
            counts: BTreeMap::new(),
            latencies: BTreeMap::new(),
            instances: BTreeMap::new(),
            lag: Latencies::default(),
        }
    }

    /// The preparations are over; time and CPU count from here.
    pub(crate) fn restart(&mut self, now: Instant) {
        self.started = now;
        self.cpu_at_start = own_cpu();
    }

    pub(crate) fn begin(&mut self, intended: Instant, now: Instant) {
        self.begun += 1;
        self.lag.note(now.saturating_duration_since(intended));
    }

    pub(crate) fn fail(&mut self, reason: &str) {
        match self.failed.get_mut(reason) {
            Some(count) => *count += 1,
            None => {
                self.failed.insert(reason.to_owned(), 1);
            }
        }
    }

    pub(crate) fn count(&mut self, name: &'static str) {
        *self.counts.entry(name).or_default() += 1;
    }

    pub(crate) fn latency(&mut self, name: &'static str, latency: Duration) {
        self.latencies.entry(name).or_default().note(latency);
    }

    /// How many failed, or were answered by an instance that is not theirs.
    pub(crate) fn bad(&self) -> u64 {
        self.failed.values().sum::<u64>()
    }

    /// The whole as JSON.
    pub(crate) fn json(&self, now: Instant) -> Value {
        let lasted = now.saturating_duration_since(self.started).as_secs_f64().max(1e-9);
        let cpu = own_cpu().saturating_sub(self.cpu_at_start).as_secs_f64();
        let latencies: Map<String, Value> = self
            .latencies
            .iter()
            .map(|(name, latencies)| ((*name).to_owned(), latencies.json()))
            .collect();
        json!({
            "protocol": self.protocol,
            "seconds": lasted,
            "begun": self.begun,
            "good": self.good,
            "good_per_second": self.good as f64 / lasted,
            "failed": self.failed,
            "counts": self.counts,
            "latency_us": latencies,
            "instances": self.instances,
            "generator": {
                "cpu_seconds": cpu,
                "cpu_share": cpu / lasted,
                "lag_us": self.lag.json(),
            },
        })
    }

    /// The whole for people.
    pub(crate) fn text(&self, now: Instant) -> String {
        use std::fmt::Write;
        let json = self.json(now);
        let mut text = format!(
            "{}: {} begun, {} good ({:.0}/s), {} failed in {:.1} s\n",
            self.protocol,
            self.begun,
            self.good,
            json["good_per_second"].as_f64().unwrap_or(0.0),
            self.bad(),
            json["seconds"].as_f64().unwrap_or(0.0),
        );
        for (reason, count) in &self.failed {
            let _infallible = writeln!(text, "  failed: {count:>8}  {reason}");
        }
        for (name, count) in &self.counts {
            let _infallible = writeln!(text, "  {name}: {count}");
        }
        if !self.instances.is_empty() {
            let shares: Vec<String> =
                self.instances.iter().map(|(index, count)| format!("{index}: {count}")).collect();
            let _infallible = writeln!(text, "  sessions by instance: {}", shares.join(", "));
        }
        let mut rows = vec![("latency", "p50", "p90", "p99", "p99.9", "max").into()];
        for (name, latencies) in &self.latencies {
            rows.push(Row::of(name, &latencies.json()));
        }
        rows.push(Row::of("(generator's lag)", &json["generator"]["lag_us"]));
        for row in rows {
            let _infallible = writeln!(text, "{row}");
        }
        let (share, lag) = (
            json["generator"]["cpu_share"].as_f64().unwrap_or(0.0),
            json["generator"]["lag_us"]["p99"].as_u64().unwrap_or(0),
        );
        let _infallible = writeln!(text, "  the generator took {:.0} % of a core", share * 100.0);
        if share > CPU_WORTH_A_WARNING || u128::from(lag) > LAG_WORTH_A_WARNING.as_micros() {
            text.push_str("  warning: the generator itself is near its limit; lower the rate\n");
        }
        text
    }
}

struct Row(String, [String; 5]);

impl Row {
    fn of(name: &str, latencies: &Value) -> Self {
        let milliseconds =
            |key: &str| format!("{:.3} ms", latencies[key].as_u64().unwrap_or(0) as f64 / 1_000.0);
        Self(name.to_owned(), ["p50", "p90", "p99", "p999", "max"].map(milliseconds))
    }
}

impl From<(&str, &str, &str, &str, &str, &str)> for Row {
    fn from(heads: (&str, &str, &str, &str, &str, &str)) -> Self {
        Self(heads.0.into(), [heads.1, heads.2, heads.3, heads.4, heads.5].map(String::from))
    }
}

impl std::fmt::Display for Row {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "  {:<18}", self.0)?;
        self.1.iter().try_for_each(|cell| write!(out, "{cell:>14}"))
    }
}

/// CPU time of this process so far.
pub(crate) fn own_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}
