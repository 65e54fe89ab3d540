//! Messages are taken together: where more of them are expected within moments, a worker pauses
//! before it looks again, as network cards moderate their interrupts (`rx-usecs` of ethtool).
//!
//! A worker that sleeps after each message pays for a wake-up, a look at the kernel and two system
//! calls per message, and wakes the other side as often: more than for all of its own work. The pause
//! comes after the work and never before it, so that what comes alone is not delayed; and only where
//! messages come so fast that one and more are expected in one pause. Raw TCP is not counted: nobody
//! knows what its bytes are.

use std::cell::{Cell, OnceCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::observe::WorkerMetrics;

/// The time over which arrivals are counted.
const WINDOW: Duration = Duration::from_millis(10);

/// The kernel may come later than asked by its timer slack; its 50 us are too much for pauses like these.
const TIMER_SLACK_NS: u64 = 1_000;

/// The pace of a worker's messages: datagrams, and what is cut from the streams of SIP and Diameter.
#[derive(Debug)]
struct Pace {
    begun: Cell<Instant>,
    /// Messages since then.
    count: Cell<u32>,
    /// Messages in the window before this one; 0 when it was longer ago.
    last: Cell<u32>,
    /// Whether messages came since the last pause.
    is_due: Cell<bool>,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self {
            begun: Cell::new(now),
            count: Cell::new(0),
            last: Cell::new(0),
            is_due: Cell::new(false),
        }
    }

    /// So many messages came.
    fn came(&self, now: Instant, count: usize) {
        let passed = now.saturating_duration_since(self.begun.get());
        if passed >= WINDOW {
            // A window that nothing closed in time was a quiet one.
            self.last.set(if passed < 2 * WINDOW { self.count.get() } else { 0 });
            self.count.set(0);
            self.begun.set(now);
        }
        self.count.set(self.count.get().saturating_add(count as u32));
        self.is_due.set(true);
    }

    /// Whether to pause so long, now that nothing is left to do.
    fn pauses(&self, pause: Duration) -> bool {
        let expected = u128::from(self.last.get()) * pause.as_micros();
        self.is_due.replace(false) && expected >= WINDOW.as_micros()
    }
}

struct Here {
    pace: Pace,
    /// `node.rx_usecs`, as it is now.
    pause_us: Arc<AtomicU32>,
    metrics: WorkerMetrics,
}

thread_local! {
    static HERE: OnceCell<Here> = const { OnceCell::new() };
}

/// This thread is a worker, and pauses for as long as `pause_us` says; 0: never.
pub(super) fn start(pause_us: &Arc<AtomicU32>, metrics: &WorkerMetrics) {
    // Where the kernel refuses it, pauses are some 50 us longer.
    let _longer =
        rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(TIMER_SLACK_NS));
    HERE.with(|here| {
        here.get_or_init(|| Here {
            pace: Pace::new(Instant::now()),
            pause_us: Arc::clone(pause_us),
            metrics: metrics.clone(),
        });
    });
}

/// So many messages came to this worker.
pub(super) fn came(now: Instant, count: usize) {
    HERE.with(|here| {
        if let Some(here) = here.get() {
            here.pace.came(now, count);
        }
    });
}

/// Called when this worker has nothing left to do, before it waits for what comes next.
pub(super) fn pause() {
    HERE.with(|here| {
        let Some(here) = here.get() else { return };
        let pause = Duration::from_micros(here.pause_us.load(Ordering::Relaxed).into());
        if here.pace.pauses(pause) {
            here.metrics.paused();
            std::thread::sleep(pause);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAUSE: Duration = Duration::from_micros(200);

    /// How many of the messages that come `apart` for `total` are followed by a pause.
    fn pauses(apart: Duration, total: Duration, pause: Duration) -> (u32, u32) {
        let mut now = Instant::now();
        let end = now + total;
        let pace = Pace::new(now);
        let (mut came, mut paused) = (0, 0);
        while now < end {
            pace.came(now, 1);
            came += 1;
            paused += u32::from(pace.pauses(pause));
            now += apart;
        }
        (came, paused)
    }

    #[test]
    fn a_quick_pace_pauses_and_a_slow_one_does_not() {
        let second = Duration::from_secs(1);
        let (came, paused) = pauses(Duration::from_micros(190), second, PAUSE);
        // All but those of the first window, about which nothing is known.
        assert!(paused > came - came / 50, "{paused} of {came}");
        assert_eq!(pauses(Duration::from_micros(220), second, PAUSE).1, 0);
        assert_eq!(pauses(Duration::from_millis(50), second, PAUSE).1, 0);
        assert_eq!(pauses(Duration::from_micros(10), second, Duration::ZERO).1, 0);
    }

    #[test]
    fn nothing_pauses_twice_nor_for_what_came_long_ago() {
        let start = Instant::now();
        let pace = Pace::new(start);
        for micros in (0..20_000).step_by(50) {
            pace.came(start + Duration::from_micros(micros), 1);
        }
        assert!(pace.pauses(PAUSE));
        assert!(!pace.pauses(PAUSE), "nothing came since");
        pace.came(start + Duration::from_secs(5), 1);
        assert!(!pace.pauses(PAUSE), "it comes alone");
    }
}
