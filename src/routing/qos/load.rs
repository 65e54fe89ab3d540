//! How much of a pool's time the higher tiers take, over windows about as long as a budget.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use super::lanes::TIERS;

/// Windows, in milliseconds: a request with a budget looks at the one that is nearest to it. A
/// shorter look would refuse what has seconds to wait because of a burst of milliseconds.
const WINDOWS_MS: [u64; 4] = [200, 500, 2_000, 5_000];

/// Arrivals of each tier, and their rates.
#[derive(Debug, Default)]
pub(in crate::routing) struct Load {
    arrived: [AtomicU64; TIERS],
    seen: [AtomicU64; TIERS],
    last_ms: AtomicU64,
    /// Per second and thousandth, by window and tier.
    rates: [[AtomicU32; TIERS]; WINDOWS_MS.len()],
    granted: [AtomicU64; TIERS],
    granted_seen: [AtomicU64; TIERS],
    /// What left each tier's queue while it was never empty, as `rates`.
    drains: [[AtomicU32; TIERS]; WINDOWS_MS.len()],
    /// For how many milliseconds it has not been empty.
    busy_ms: [AtomicU64; TIERS],
}

impl Load {
    /// A request that was let in.
    pub(in crate::routing) fn admitted(&self, tier: u8) {
        self.arrived[usize::from(tier).min(TIERS - 1)].fetch_add(1, Relaxed);
    }

    /// One that waited goes on.
    pub(in crate::routing) fn granted(&self, tier: u8) {
        self.granted[usize::from(tier).min(TIERS - 1)].fetch_add(1, Relaxed);
    }

    /// Looks at what came since the last time, and how many of each tier wait now. By one caller.
    pub(in crate::routing) fn review(&self, now_ms: u64, waiting: [u32; TIERS]) {
        let last = self.last_ms.swap(now_ms, Relaxed);
        let passed = now_ms.saturating_sub(last);
        if passed == 0 {
            return;
        }
        for tier in 0..TIERS {
            let arrived = self.arrived[tier].load(Relaxed);
            let new = arrived - self.seen[tier].swap(arrived, Relaxed);
            if last == 0 {
                continue;
            }
            follow(&self.rates, tier, new, passed);
            let granted = self.granted[tier].load(Relaxed);
            let left = granted - self.granted_seen[tier].swap(granted, Relaxed);
            if waiting[tier] == 0 {
                self.busy_ms[tier].store(0, Relaxed);
                continue;
            }
            let busy = self.busy_ms[tier].fetch_add(passed, Relaxed);
            if busy == 0 {
                // It begins with what is now, not with what was an hour ago.
                for drains in &self.drains {
                    drains[tier].store((left * 1_000_000 / passed) as u32, Relaxed);
                }
            }
            follow(&self.drains, tier, left, passed);
        }
    }

    /// The part of `slots` that tiers below `tier` keep busy, if one request takes `mean_us`.
    pub(in crate::routing) fn above(
        &self,
        tier: u8,
        budget_us: u64,
        mean_us: u64,
        slots: u32,
    ) -> f64 {
        if tier == 0 || slots == 0 {
            return 0.0;
        }
        // The least of the windows up to its own: when a burst is over, the short one says so first,
        // and what is still to come within a long budget is not judged by a burst alone.
        let of_window = |rates: &[AtomicU32; TIERS]| -> u32 {
            rates.iter().take(usize::from(tier)).map(|rate| rate.load(Relaxed)).sum()
        };
        let windows = &self.rates[..=nearest(budget_us)];
        let rate = windows.iter().map(of_window).min().unwrap_or(0);
        f64::from(rate) / 1_000.0 * mean_us as f64 / 1_000_000.0 / f64::from(slots)
    }

    /// How many of a tier leave its queue in a second, once it has been busy for long enough to
    /// tell.
    pub(in crate::routing) fn drain(&self, tier: u8, budget_us: u64) -> Option<f64> {
        let (window, tier) = (nearest(budget_us), usize::from(tier).min(TIERS - 1));
        let long = self.busy_ms[tier].load(Relaxed) >= WINDOWS_MS[window] / 4;
        // The best of the windows up to its own: when a burst is over, the short one says so first.
        // (The shortest says nothing of a tier that a few leave in a second.)
        let windows = &self.drains[window.min(1)..=window];
        let best = windows.iter().map(|drains| drains[tier].load(Relaxed)).max();
        long.then(|| f64::from(best.unwrap_or(0)) / 1_000.0)
    }
}

fn nearest(budget_us: u64) -> usize {
    let windows = WINDOWS_MS.iter().enumerate();
    windows
        .min_by_key(|(_, window)| (**window * 1_000).abs_diff(budget_us))
        .map_or(0, |(index, _)| index)
}

fn follow(rates: &[[AtomicU32; TIERS]], tier: usize, new: u64, passed: u64) {
    let rate = (new * 1_000_000 / passed) as f64;
    for (window, rates) in WINDOWS_MS.iter().zip(rates) {
        let before = f64::from(rates[tier].load(Relaxed));
        // What begins is not averaged with the nothing before it.
        let fades = 1.0 - (-(passed as f64) / *window as f64).exp();
        let weight = if before == 0.0 { 1.0 } else { fades };
        rates[tier].store((before + (rate - before) * weight) as u32, Relaxed);
    }
}
