//! How long backends take: quantiles of live traffic, without a lock.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Buckets in one doubling: a quantile is at most an eighth too high, and never too low.
const PER_DOUBLING: u32 = 8;

/// From 1 microsecond to 2^32 (71 minutes); what is longer counts as that.
const BUCKETS: usize = 32 * PER_DOUBLING as usize;

/// Samples after which the older half of the weight is forgotten.
const WINDOW: u64 = 4_096;

/// The first samples are looked at as they come, at these counts; later ones by the tick.
const FIRST_LOOKS: u64 = 256;

/// Quantiles of a duration. Zero as long as nothing is known.
#[derive(Debug)]
pub(in crate::routing) struct ServiceTimes {
    counts: Box<[AtomicU32]>,
    total: AtomicU64,
    sum_us: AtomicU64,
    p50_us: AtomicU64,
    p90_us: AtomicU64,
    p95_us: AtomicU64,
    mean_us: AtomicU64,
    deviation_us: AtomicU64,
}

impl Default for ServiceTimes {
    fn default() -> Self {
        Self {
            counts: (0..BUCKETS).map(|_| AtomicU32::new(0)).collect(),
            total: AtomicU64::new(0),
            sum_us: AtomicU64::new(0),
            p50_us: AtomicU64::new(0),
            p90_us: AtomicU64::new(0),
            p95_us: AtomicU64::new(0),
            mean_us: AtomicU64::new(0),
            deviation_us: AtomicU64::new(0),
        }
    }
}

fn bucket(us: u64) -> usize {
    let us = us.clamp(1, (1 << 32) - 1);
    let doubling = 63 - us.leading_zeros();
    let within = ((us << 3) >> doubling) & u64::from(PER_DOUBLING - 1);
    (doubling * PER_DOUBLING) as usize + within as usize
}

/// The upper end of a bucket.
fn upper(bucket: usize) -> u64 {
    let (doubling, within) =
        (bucket as u32 / PER_DOUBLING, bucket as u64 % u64::from(PER_DOUBLING));
    ((u64::from(PER_DOUBLING) + within + 1) << doubling) >> 3
}

impl ServiceTimes {
    pub(in crate::routing) fn note(&self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1);
        self.counts[bucket(us)].fetch_add(1, Relaxed);
        self.sum_us.fetch_add(us.min(1 << 32), Relaxed);
        let total = self.total.fetch_add(1, Relaxed) + 1;
        if total <= FIRST_LOOKS && total.is_power_of_two() {
            self.review();
        }
    }

    /// Finds the quantiles anew; lets old samples fade.
    pub(in crate::routing) fn review(&self) {
        let counts: Vec<u64> =
            self.counts.iter().map(|count| u64::from(count.load(Relaxed))).collect();
        let total: u64 = counts.iter().sum();
        if total == 0 {
            return;
        }
        let quantile = |thousandths: u64| {
            let wanted = (total * thousandths).div_ceil(1_000).max(1);
            let mut seen = 0;
            let found = counts.iter().position(|count| {
                seen += count;
                seen >= wanted
            });
            upper(found.unwrap_or(BUCKETS - 1))
        };
        self.p50_us.store(quantile(500), Relaxed);
        self.p90_us.store(quantile(900), Relaxed);
        self.p95_us.store(quantile(950), Relaxed);
        let known = self.total.load(Relaxed).max(1);
        let mean = self.sum_us.load(Relaxed) as f64 / self.total.load(Relaxed).max(1) as f64;
        let squares = counts
            .iter()
            .enumerate()
            .map(|(bucket, count)| (upper(bucket) as f64 - mean).powi(2) * *count as f64);
        let variance = squares.sum::<f64>() / total as f64;
        self.deviation_us.store(variance.sqrt() as u64, Relaxed);
        self.mean_us.store((self.sum_us.load(Relaxed) / known).max(1), Relaxed);
        if total >= WINDOW {
            // What others add in between is kept: only what was seen is halved.
            for (place, seen) in self.counts.iter().zip(&counts) {
                place.fetch_sub((seen / 2) as u32, Relaxed);
            }
            let half = self.total.load(Relaxed) / 2;
            self.sum_us.fetch_sub(self.mean_us.load(Relaxed) * half, Relaxed);
            self.total.fetch_sub(half, Relaxed);
        }
    }

    pub(in crate::routing) fn p50(&self) -> u64 {
        self.p50_us.load(Relaxed)
    }

    pub(in crate::routing) fn p90(&self) -> u64 {
        self.p90_us.load(Relaxed)
    }

    pub(in crate::routing) fn p95(&self) -> u64 {
        self.p95_us.load(Relaxed)
    }

    /// What so many of them take one after the other, so that nine times in ten it is less, if they
    /// are as those before were.
    pub(in crate::routing) fn sum_of(&self, count: f64) -> f64 {
        let (mean, deviation) = (self.mean() as f64, self.deviation_us.load(Relaxed) as f64);
        (count * self.p90() as f64).min(count * mean + 1.28 * deviation * count.sqrt())
    }

    pub(in crate::routing) fn mean(&self) -> u64 {
        self.mean_us.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_what_they_say() {
        for us in [1, 2, 3, 7, 8, 9, 15, 16, 100, 999, 5_000, 123_456, 1 << 31, u64::MAX] {
            let (us, found) = (us.min((1 << 32) - 1), bucket(us));
            assert!(us <= upper(found), "{us} in {found}, up to {}", upper(found));
            assert!(upper(found) <= us + us / 8 + 1, "{us} in {found}, up to {}", upper(found));
        }
    }

    #[test]
    fn quantiles_follow_and_forget() {
        let times = ServiceTimes::default();
        assert_eq!((times.p50(), times.p90()), (0, 0));
        for index in 0..1_000 {
            times.note(Duration::from_millis(if index % 10 < 8 { 2 } else { 20 }));
        }
        times.review();
        assert!((2_000..2_300).contains(&times.p50()), "{}", times.p50());
        assert!((20_000..22_600).contains(&times.p90()), "{}", times.p90());
        assert!((5_500..5_700).contains(&times.mean()), "{}", times.mean());
        for _ in 0..20 {
            for _ in 0..1_000 {
                times.note(Duration::from_millis(50));
            }
            times.review();
        }
        assert!(times.p50() >= 50_000 && times.mean() > 45_000, "{} {}", times.p50(), times.mean());
    }
}
