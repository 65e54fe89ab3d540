//! How much of a pool's time the higher tiers take, over windows about as long as a budget.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use super::lanes::TIERS;

/// Windows, in milliseconds: a request with a budget looks at the one that is nearest to it. A
/// shorter look would refuse what has seconds to wait because of a burst of milliseconds.
const WINDOWS_MS: [u64; 3] = [500, 2_000, 5_000];

/// Arrivals of each tier, and their rates.
#[derive(Debug, Default)]
pub(in crate::routing) struct Load {
    arrived: [AtomicU64; TIERS],
    seen: [AtomicU64; TIERS],
    last_ms: AtomicU64,
    /// Per second and thousandth, by window and tier.
    rates: [[AtomicU32; TIERS]; WINDOWS_MS.len()],
}

impl Load {
    /// A request that was let in.
    pub(in crate::routing) fn admitted(&self, tier: u8) {
        self.arrived[usize::from(tier).min(TIERS - 1)].fetch_add(1, Relaxed);
    }

    /// Looks at what came since the last time. By one caller.
    pub(in crate::routing) fn review(&self, now_ms: u64) {
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
            let rate = (new * 1_000_000 / passed) as f64;
            for (window, rates) in WINDOWS_MS.iter().zip(&self.rates) {
                let weight = 1.0 - (-(passed as f64) / *window as f64).exp();
                let before = f64::from(rates[tier].load(Relaxed));
                rates[tier].store((before + (rate - before) * weight) as u32, Relaxed);
            }
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
        let nearest = WINDOWS_MS
            .iter()
            .enumerate()
            .min_by_key(|(_, window)| (**window * 1_000).abs_diff(budget_us))
            .map_or(0, |(index, _)| index);
        let rate: u32 =
            self.rates[nearest].iter().take(usize::from(tier)).map(|rate| rate.load(Relaxed)).sum();
        f64::from(rate) / 1_000.0 * mean_us as f64 / 1_000_000.0 / f64::from(slots)
    }
}
