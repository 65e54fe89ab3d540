//! What the edge tells an instance's owner: deadline misses and response time of the last minute.
//! Three windows of atomics that take turns; nothing is allocated, no lock is taken.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// A window's length, and how many there are: the report looks 40 to 60 seconds back.
const WINDOW_MS: u64 = 20_000;
const WINDOWS: usize = 3;

/// Four buckets per doubling, from a microsecond to over a minute.
const BUCKETS: usize = 108;

/// The last minute of one backend.
#[derive(Debug)]
pub(super) struct Recent {
    windows: [Window; WINDOWS],
}

impl Default for Recent {
    fn default() -> Self {
        Self { windows: std::array::from_fn(|_| Window::default()) }
    }
}

#[derive(Debug)]
struct Window {
    /// Which stretch of time it holds, counted from 1; 0: none yet.
    number: AtomicU64,
    requests: AtomicU32,
    missed: AtomicU32,
    times: [AtomicU32; BUCKETS],
}

impl Default for Window {
    fn default() -> Self {
        Self {
            number: AtomicU64::new(0),
            requests: AtomicU32::new(0),
            missed: AtomicU32::new(0),
            times: std::array::from_fn(|_| AtomicU32::new(0)),
        }
    }
}

/// Figures of the last minute.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RecentView {
    /// Requests that ended.
    pub requests: u64,
    /// Of those, so many missed their deadline.
    pub missed: u64,
    /// The 99th percentile of the backend's own time, in milliseconds.
    pub p99_ms: f64,
}

impl RecentView {
    /// Missed deadlines in a million requests.
    #[must_use]
    pub fn miss_ppm(&self) -> u64 {
        (self.missed * 1_000_000).checked_div(self.requests).unwrap_or(0)
    }
}

impl Recent {
    /// A request ended.
    pub(super) fn note(&self, now_ms: u64, missed: bool, took: Duration) {
        let number = now_ms / WINDOW_MS + 1;
        let window = &self.windows[(number % WINDOWS as u64) as usize];
        if window.number.swap(number, Relaxed) != number {
            // Two workers that meet here lose a sample at most.
            window.clear();
        }
        window.requests.fetch_add(1, Relaxed);
        if missed {
            window.missed.fetch_add(1, Relaxed);
        }
        if !took.is_zero() {
            window.times[bucket(took)].fetch_add(1, Relaxed);
        }
    }

    /// The figures at `now_ms`.
    pub(super) fn view(&self, now_ms: u64) -> RecentView {
        let number = now_ms / WINDOW_MS + 1;
        let (mut view, mut times) = (RecentView::default(), [0u64; BUCKETS]);
        for window in &self.windows {
            let age = number.saturating_sub(window.number.load(Relaxed));
            if window.number.load(Relaxed) == 0 || age >= WINDOWS as u64 {
                continue;
            }
            view.requests += u64::from(window.requests.load(Relaxed));
            view.missed += u64::from(window.missed.load(Relaxed));
            for (sum, count) in times.iter_mut().zip(&window.times) {
                *sum += u64::from(count.load(Relaxed));
            }
        }
        let timed: u64 = times.iter().sum();
        let mut left = timed - timed / 100;
        for (index, count) in times.iter().enumerate().filter(|_| timed > 0) {
            left = left.saturating_sub(*count);
            if left == 0 {
                view.p99_ms = ((index + 1) as f64 / 4.0).exp2() / 1_000.0;
                break;
            }
        }
        view
    }
}

impl Window {
    fn clear(&self) {
        self.requests.store(0, Relaxed);
        self.missed.store(0, Relaxed);
        for count in &self.times {
            count.store(0, Relaxed);
        }
    }
}

fn bucket(took: Duration) -> usize {
    let us = took.as_micros().max(1) as f64;
    ((us.log2() * 4.0) as usize).min(BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_minute_and_no_more() {
        let recent = Recent::default();
        for index in 0..1_000 {
            let took = Duration::from_millis(if index % 50 == 0 { 100 } else { 2 });
            recent.note(1_000, index % 100 == 0, took);
        }
        let view = recent.view(30_000);
        assert_eq!((view.requests, view.missed, view.miss_ppm()), (1_000, 10, 10_000));
        assert!((80.0..130.0).contains(&view.p99_ms), "{}", view.p99_ms);
        assert_eq!(recent.view(61_000), RecentView::default());
        recent.note(61_000, false, Duration::from_millis(2));
        let view = recent.view(61_000);
        assert!(view.requests == 1 && (1.5..3.0).contains(&view.p99_ms), "{}", view.p99_ms);
    }
}
