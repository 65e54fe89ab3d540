//! An adaptive limit: how many requests a backend can have in flight before they only wait there.
//!
//! The gradient of response times (Netflix's Gradient2) on live traffic: what was usual over a long
//! time, divided by what is now. It never probes by starving the backend, and it cannot pin itself
//! low: it falls only when responses slow down *while the limit is used*, the usual time follows a
//! change that lasts, a limit that is not used is left alone, and there is a floor.

use std::time::Duration;

/// Where it begins, and the least and most that it may be.
pub(in crate::routing) const INITIAL: u32 = 256;
pub(in crate::routing) const FLOOR: u32 = 4;
const CEILING: u32 = 100_000;

/// Samples that one look needs; with fewer the window goes on. Bimodal services need as many for
/// their mean to mean something.
const SAMPLES_MIN: u64 = 50;

/// Response times may be so much over the usual before the limit falls: services vary.
const TOLERANCE: f64 = 1.5;

/// The usual time moves by this part at each look: some 60 looks (6 s) to take a change in. While
/// the limit is used, what is seen may be of our own making, and it takes five times as long.
const USUAL_WEIGHT: f64 = 1.0 / 60.0;
const USUAL_WEIGHT_USED: f64 = 1.0 / 300.0;

/// The limit moves by this part of what it should.
const SMOOTHING: f64 = 0.3;

/// The limit of one backend.
#[derive(Clone, Debug)]
pub(in crate::routing) struct AdaptiveLimit {
    limit: f64,
    usual_us: f64,
    samples: u64,
    sum_us: u64,
    most_in_flight: u32,
}

impl Default for AdaptiveLimit {
    fn default() -> Self {
        Self { limit: f64::from(INITIAL), usual_us: 0.0, samples: 0, sum_us: 0, most_in_flight: 0 }
    }
}

impl AdaptiveLimit {
    /// Takes in what happened since the last look: answers, the sum of their times, the most that
    /// was in flight. The limit now.
    pub(in crate::routing) fn review(
        &mut self,
        samples: u64,
        sum: Duration,
        most_in_flight: u32,
    ) -> u32 {
        self.samples += samples;
        self.sum_us += u64::try_from(sum.as_micros()).unwrap_or(u64::MAX);
        self.most_in_flight = self.most_in_flight.max(most_in_flight);
        if self.samples >= SAMPLES_MIN {
            self.look();
        }
        self.limit as u32
    }

    fn look(&mut self) {
        let now = self.sum_us as f64 / self.samples as f64;
        let used = f64::from(self.most_in_flight) >= self.limit / 2.0;
        (self.samples, self.sum_us, self.most_in_flight) = (0, 0, 0);
        if self.usual_us == 0.0 {
            self.usual_us = now;
        }
        let weight = if used { USUAL_WEIGHT_USED } else { USUAL_WEIGHT };
        self.usual_us += (now - self.usual_us) * weight;
        if self.usual_us > now * 2.0 {
            // A burst or a slow start is over: what it left in the usual goes faster.
            self.usual_us *= 0.95;
        }
        if !used {
            return;
        }
        let gradient = (TOLERANCE * self.usual_us / now.max(1.0)).clamp(0.5, 1.0);
        let wanted = self.limit * gradient + self.limit.sqrt();
        self.limit += (wanted - self.limit) * SMOOTHING;
        self.limit = self.limit.clamp(f64::from(FLOOR), f64::from(CEILING));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A backend with `slots` places of `service`: what is over them waits there.
    fn response(in_flight: u32, slots: u32, service_us: f64) -> f64 {
        service_us * (f64::from(in_flight) / f64::from(slots)).max(1.0)
    }

    fn run(
        limit: &mut AdaptiveLimit,
        looks: u32,
        demand: u32,
        service: impl Fn(u32) -> f64,
        slots: u32,
    ) -> u32 {
        let mut now = limit.review(0, Duration::ZERO, 0);
        for look in 0..looks {
            let in_flight = now.min(demand);
            let time = response(in_flight, slots, service(look));
            let samples = 100u64;
            let sum = Duration::from_micros((time * samples as f64) as u64);
            now = limit.review(samples, sum, in_flight);
        }
        now
    }

    #[test]
    fn what_only_waits_at_the_backend_is_taken_back() {
        let mut limit = AdaptiveLimit::default();
        // The usual is learned while there is little to do.
        run(&mut limit, 100, 10, |_| 5_000.0, 32);
        let after = run(&mut limit, 100, 10_000, |_| 5_000.0, 32);
        assert!((16..=128).contains(&after), "{after} for 32 slots");
    }

    #[test]
    fn a_slower_normal_becomes_normal() {
        let mut limit = AdaptiveLimit::default();
        run(&mut limit, 100, 10, |_| 5_000.0, 10_000);
        // Three times slower for good (a new release, a further disk): no overload, no pinning.
        let after = run(&mut limit, 600, 300, |_| 15_000.0, 10_000);
        assert!(after >= 256, "{after}");
        // And the drift of the least time, which pins Envoy's: ever slower, half a percent a second.
        let mut limit = AdaptiveLimit::default();
        let drifting = |look: u32| 5_000.0 * 1.0005f64.powi(look as i32);
        let after = run(&mut limit, 1_000, 300, drifting, 10_000);
        assert!(after >= 256, "{after}");
    }

    #[test]
    fn little_traffic_teaches_nothing() {
        let mut limit = AdaptiveLimit::default();
        for look in 0..10_000u32 {
            // One slow answer now and then, never more than two in flight.
            let slow = if look % 7 == 0 { 900 } else { 5 };
            let now = limit.review(1, Duration::from_millis(slow), 2);
            assert_eq!(now, INITIAL);
        }
    }

    #[test]
    fn two_kinds_of_requests_are_no_overload() {
        let mut limit = AdaptiveLimit::default();
        let mut state = 1u64;
        let mut now = INITIAL;
        for _ in 0..2_000 {
            let (mut sum, samples) = (0u64, 60u64);
            for _ in 0..samples {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                // One in ten takes 30 times as long.
                sum += if (state >> 33).is_multiple_of(10) { 60_000 } else { 2_000 };
            }
            now = limit.review(samples, Duration::from_micros(sum), now);
        }
        assert!(now >= INITIAL, "{now}");
    }

    #[test]
    fn it_never_falls_under_its_floor_and_comes_back() {
        let mut limit = AdaptiveLimit::default();
        run(&mut limit, 50, 10, |_| 5_000.0, 8);
        let low = run(&mut limit, 300, 10_000, |look| 5_000.0 * (1.0 + f64::from(look)), 8);
        assert!(low >= FLOOR);
        let back = run(&mut limit, 600, 10_000, |_| 5_000.0, 500);
        assert!(back >= 200, "{back} of 500 after it recovered");
    }
}
