//! Slots that sessions hold beyond their first answer (calls): how many come back in a second. The
//! service times say nothing of them: a call is answered in a second and lasts for minutes.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

use super::load::approach;

/// Over so many milliseconds the ends of sessions are averaged: when many end at once, the shorter
/// one says so first.
const ENDS_MS: [u64; 2] = [2_000, 15_000];

/// Over so many milliseconds it is learned how many of the requests that take a slot keep it.
const KEPT_MS: u64 = 15_000;

/// What is known of a pool's sessions. Rates are per second and thousandth.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    held: AtomicU32,
    /// Whether one ended since the start: before, nothing is known of how long they last.
    ended: AtomicBool,
    last_ms: AtomicU64,
    admitted_seen: AtomicU64,
    ends: [AtomicU32; ENDS_MS.len()],
    begins: AtomicU32,
    admitted: AtomicU32,
}

impl Sessions {
    /// Once per tick, by one caller: how many slots are held now, how many were given back since the last
    /// time, and how many requests outside of sessions were let in since the start.
    pub(super) fn review(&self, now_ms: u64, held: u32, ended: u32, admitted: u64) {
        let last = self.last_ms.swap(now_ms, Relaxed);
        let before = self.held.swap(held, Relaxed);
        let new = admitted - self.admitted_seen.swap(admitted, Relaxed);
        let passed = now_ms.saturating_sub(last);
        if last == 0 || passed == 0 {
            return;
        }
        if ended > 0 {
            self.ended.store(true, Relaxed);
        }
        let begun = (i64::from(held) - i64::from(before) + i64::from(ended)).max(0) as u64;
        for (place, window) in self.ends.iter().zip(ENDS_MS) {
            approach(place, u64::from(ended), passed, window);
        }
        approach(&self.begins, begun, passed, KEPT_MS);
        approach(&self.admitted, new, passed, KEPT_MS);
    }

    /// How long `count` slots take to become free, in microseconds, if one after the other they would take
    /// `sum_us` of one that turns over; `None`: as if there were no sessions.
    pub(super) fn wait(&self, count: f64, sum_us: f64, slots: u32) -> Option<f64> {
        let held = self.held.load(Relaxed);
        if held == 0 || !self.ended.load(Relaxed) || sum_us <= 0.0 {
            return None;
        }
        let rate = |place: &AtomicU32| f64::from(place.load(Relaxed)) / 1_000.0;
        let (begins, admitted) = (rate(&self.begins), rate(&self.admitted));
        let kept = if admitted > 0.0 { (begins / admitted).min(1.0) } else { 0.0 };
        let turning = f64::from(slots.saturating_sub(held)) * (1.0 - kept);
        let ends = self.ends.iter().map(rate).fold(0.0, f64::max);
        let per_second = turning * count / (sum_us / 1e6) + ends;
        // A day stands for never.
        Some((count / per_second.max(1e-9) * 1e6).min(86_400e6))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten slots, calls of three seconds and what is answered in half a second, three minutes long.
    fn world(held: u32, ended_a_tick: u32, begun_a_tick: u64) -> Sessions {
        let sessions = Sessions::default();
        let mut admitted = 0;
        for tick in 1..1_200 {
            admitted += begun_a_tick;
            sessions.review(tick * 100, held, ended_a_tick, admitted);
        }
        sessions
    }

    #[test]
    fn the_wait_is_for_calls_to_end() {
        // All ten are held, and one ends each second in the mean: 2 want one.
        let sessions = Sessions::default();
        for tick in 1..1_200 {
            let ended = u32::from(tick % 10 == 0);
            sessions.review(tick * 100, 10, ended, tick / 10);
        }
        let wait = sessions.wait(2.0, 1_000_000.0, 10).expect("sessions are known");
        assert!((1_500_000.0..2_500_000.0).contains(&wait), "{wait}");
        // The ends stop: after a minute nobody hopes for one.
        for tick in 1_200..1_800 {
            sessions.review(tick * 100, 10, 0, 120);
        }
        let wait = sessions.wait(1.0, 500_000.0, 10).expect("known");
        assert!(wait > 30e6, "{wait}");
    }

    #[test]
    fn slots_that_turn_over_count_in_so_far_as_they_do() {
        // Half of ten are held, all that are let in become calls: the other half does not come back soon.
        let calls = world(5, 1, 1);
        let wait = calls.wait(1.0, 500_000.0, 10).expect("known");
        assert!((90_000.0..120_000.0).contains(&wait), "ten calls end in a second: {wait}");
        // Of a hundred let in one becomes a call: nine in ten of the rest turn over as ever.
        let mixed = world(5, 1, 100);
        let wait = mixed.wait(1.0, 500_000.0, 10).expect("known");
        assert!((45_000.0..100_000.0).contains(&wait), "{wait}");
    }

    #[test]
    fn nothing_is_said_before_a_session_ended() {
        assert_eq!(world(0, 0, 5).wait(1.0, 500_000.0, 10), None, "none is held");
        assert_eq!(world(7, 0, 5).wait(1.0, 500_000.0, 10), None, "none ended");
    }
}
