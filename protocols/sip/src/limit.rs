//! Rates: token buckets, in a table that does not grow.

use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Buckets in a table: a power of two. Two keys that share a place share its rate only if they come
/// in turns; with a keyed hash nobody can choose to.
const BUCKETS: usize = 1 << 14;

/// Places that a key may take.
const WAYS: usize = 4;

/// A rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// So many a second are sustained.
    pub per_second: u32,
    /// So many may come at once.
    pub burst: u32,
}

impl Rate {
    pub(crate) fn check(&self) -> Option<String> {
        if self.per_second == 0 || self.per_second > 10_000_000 {
            return Some("per_second must be 1 to 10000000".into());
        }
        (self.burst == 0 || self.burst > 10_000_000)
            .then(|| "burst must be 1 to 10000000".to_owned())
    }
}

/// One bucket.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bucket {
    key: u64,
    /// Thousandths of a token.
    tokens: u64,
    at: Instant,
}

impl Bucket {
    pub(crate) fn full(key: u64, rate: Rate, now: Instant) -> Self {
        Self { key, tokens: u64::from(rate.burst) * 1_000, at: now }
    }

    /// Takes a token, if there is one.
    pub(crate) fn take(&mut self, rate: Rate, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.at).as_micros();
        let passed = u64::try_from(passed).unwrap_or(u64::MAX);
        let gained = passed.saturating_mul(u64::from(rate.per_second)) / 1_000;
        if gained > 0 {
            // What is less than a thousandth of a token is not lost: the clock stays behind.
            self.at = now;
            self.tokens = self.tokens.saturating_add(gained).min(u64::from(rate.burst) * 1_000);
        }
        let has = self.tokens >= 1_000;
        if has {
            self.tokens -= 1_000;
        }
        has
    }
}

/// Buckets by key.
#[derive(Debug, Default)]
pub(crate) struct Buckets {
    places: Vec<Option<Bucket>>,
}

impl Buckets {
    /// Whether one more of `key` is within the rate. A key that finds no place takes the one that
    /// was quiet for longest: that one starts anew with a full bucket, which errs on its side.
    pub(crate) fn take(&mut self, key: u64, rate: Rate, now: Instant) -> bool {
        if self.places.is_empty() {
            self.places.resize(BUCKETS, None);
        }
        let first = key as usize & (BUCKETS - 1) & !(WAYS - 1);
        let ways = &mut self.places[first..first + WAYS];
        if let Some(bucket) = ways.iter_mut().flatten().find(|bucket| bucket.key == key) {
            return bucket.take(rate, now);
        }
        let oldest = ways.iter_mut().min_by_key(|place| place.map(|bucket| bucket.at));
        let mut bucket = Bucket::full(key, rate, now);
        let taken = bucket.take(rate, now);
        if let Some(place) = oldest {
            *place = Some(bucket);
        }
        taken
    }
}

/// When to come back after a rate was exceeded.
pub(crate) fn retry_after(rate: Rate) -> Duration {
    Duration::from_secs(u64::from((rate.burst / rate.per_second).clamp(1, 30)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_the_rate() {
        let (mut buckets, start) = (Buckets::default(), Instant::now());
        let rate = Rate { per_second: 10, burst: 5 };
        let within = |buckets: &mut Buckets, ms: u64| {
            (0..100).filter(|_| buckets.take(7, rate, start + Duration::from_millis(ms))).count()
        };
        assert_eq!(within(&mut buckets, 0), 5);
        assert_eq!(within(&mut buckets, 99), 0);
        assert_eq!(within(&mut buckets, 200), 2);
        assert_eq!(within(&mut buckets, 60_000), 5, "no more than the burst");
        let many = (0..1_000u64).filter(|us| {
            buckets.take(
                7,
                rate,
                start + Duration::from_millis(60_000) + Duration::from_micros(us * 1_000),
            )
        });
        assert_eq!(many.count(), 9, "small steps lose nothing");
        assert!(buckets.take(8, rate, start), "another is not held to it");
    }

    #[test]
    fn a_flood_of_keys_takes_no_more_room() {
        let (mut buckets, now) = (Buckets::default(), Instant::now());
        let rate = Rate { per_second: 1, burst: 1 };
        for key in 0..1_000_000u64 {
            buckets.take(key.wrapping_mul(0x9e37_79b9_7f4a_7c15), rate, now);
        }
        assert_eq!(buckets.places.len(), BUCKETS);
    }
}
