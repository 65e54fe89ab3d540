//! How much of a pool's time the higher tiers take, over windows about as long as a budget.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use strowger_contract::PoolLoad;

use super::lanes::TIERS;

/// Windows, in milliseconds: a request looks at those up to one longer than its budget. A shorter
/// look would refuse what has seconds to wait because of a burst of milliseconds; and a burst as long
/// as the budget is followed by what there was before it as often as not.
const WINDOWS_MS: [u64; 5] = [200, 500, 2_000, 5_000, 15_000];

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
    refusals: Refusals,
}

/// What is refused for want of slots or time, beside what is not, over [`TOLD_OVER_MS`].
#[derive(Debug, Default)]
struct Refusals {
    at_door: AtomicU64,
    after_wait: AtomicU64,
    /// All three as they were seen last: at the door, after a wait, let in.
    seen: [AtomicU64; 3],
    /// Per second and thousandth.
    refused: AtomicU32,
    taken: AtomicU32,
}

/// What neighbours are told is of about so many milliseconds: shorter looks would have them swing,
/// longer ones tell of what is over.
const TOLD_OVER_MS: u64 = 1_000;

impl Refusals {
    fn review(&self, admitted: u64, passed_ms: u64, first: bool) {
        let totals = [self.at_door.load(Relaxed), self.after_wait.load(Relaxed), admitted];
        let new: [u64; 3] = std::array::from_fn(|index| {
            totals[index] - self.seen[index].swap(totals[index], Relaxed)
        });
        if first {
            return;
        }
        approach(&self.refused, new[0] + new[1], passed_ms, TOLD_OVER_MS);
        approach(&self.taken, new[2].saturating_sub(new[1]), passed_ms, TOLD_OVER_MS);
    }

    fn told(&self) -> PoolLoad {
        let (refused, taken) = (self.refused.load(Relaxed), self.taken.load(Relaxed));
        let all = (u64::from(refused) + u64::from(taken)).max(1);
        PoolLoad {
            refused_permille: (u64::from(refused) * 1_000 / all) as u32,
            admitted_per_second: taken / 1_000,
        }
    }
}

impl Load {
    /// A request that was let in.
    pub(in crate::routing) fn admitted(&self, tier: u8) {
        self.arrived[usize::from(tier).min(TIERS - 1)].fetch_add(1, Relaxed);
    }

    /// How many of the tiers behind the first were let in since the start.
    pub(in crate::routing) fn admitted_behind_first(&self) -> u64 {
        self.arrived[1..].iter().map(|count| count.load(Relaxed)).sum()
    }

    /// A request that was refused: at the door, or after it had been let in.
    pub(in crate::routing) fn refused(&self, after_wait: bool) {
        let refusals = &self.refusals;
        let place = if after_wait { &refusals.after_wait } else { &refusals.at_door };
        place.fetch_add(1, Relaxed);
    }

    /// What neighbours may be told.
    pub(in crate::routing) fn told(&self) -> PoolLoad {
        self.refusals.told()
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
        let admitted = self.arrived.iter().map(|count| count.load(Relaxed)).sum();
        self.refusals.review(admitted, passed, last == 0);
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
        // The least of the windows: when a burst is over, the short one says so first, and what is
        // still to come within a long budget is not judged by a burst alone.
        let of_window = |rates: &[AtomicU32; TIERS]| -> u32 {
            rates.iter().take(usize::from(tier)).map(|rate| rate.load(Relaxed)).sum()
        };
        let windows = &self.rates[..=longest(budget_us)];
        let rate = windows.iter().map(of_window).min().unwrap_or(0);
        f64::from(rate) / 1_000.0 * mean_us as f64 / 1_000_000.0 / f64::from(slots)
    }

    /// How many of a tier leave its queue in a second, once it has been busy for long enough to
    /// tell.
    pub(in crate::routing) fn drain(&self, tier: u8, budget_us: u64) -> Option<f64> {
        let (window, tier) = (longest(budget_us), usize::from(tier).min(TIERS - 1));
        let long = self.busy_ms[tier].load(Relaxed) >= WINDOWS_MS[window - 1] / 4;
        // The best of the windows: when a burst is over, the short one says so first. (The shortest
        // says nothing of a tier that a few leave in a second.)
        let windows = &self.drains[(window - 1).min(1)..=window];
        let best = windows.iter().map(|drains| drains[tier].load(Relaxed)).max();
        long.then(|| f64::from(best.unwrap_or(0)) / 1_000.0)
    }
}

/// The last window to look at: the one after that which is nearest to the budget, so never the first.
fn longest(budget_us: u64) -> usize {
    let windows = WINDOWS_MS[..WINDOWS_MS.len() - 1].iter().enumerate();
    windows
        .min_by_key(|(_, window)| (**window * 1_000).abs_diff(budget_us))
        .map_or(1, |(index, _)| index + 1)
}

fn follow(rates: &[[AtomicU32; TIERS]], tier: usize, new: u64, passed: u64) {
    for (window, rates) in WINDOWS_MS.iter().zip(rates) {
        let place = &rates[tier];
        if place.load(Relaxed) == 0 {
            // What begins is not averaged with the nothing before it.
            place.store((new * 1_000_000 / passed) as u32, Relaxed);
        } else {
            approach(place, new, passed, *window);
        }
    }
}

/// Lets a rate, per second and thousandth, follow what was new in the time that passed, over a window.
pub(super) fn approach(place: &AtomicU32, new: u64, passed_ms: u64, window_ms: u64) {
    let (before, rate) = (f64::from(place.load(Relaxed)), (new * 1_000_000 / passed_ms) as f64);
    let fades = 1.0 - (-(passed_ms as f64) / window_ms as f64).exp();
    place.store((before + (rate - before) * fades) as u32, Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_told_what_is_refused_over_a_second() {
        let load = Load::default();
        let mut now = 1_000;
        let mut run = |ticks: u64, admitted: u64, refused: u64, late: u64| {
            for _ in 0..ticks {
                (0..admitted).for_each(|_| load.admitted(1));
                (0..refused).for_each(|_| load.refused(false));
                (0..late).for_each(|_| load.refused(true));
                now += 100;
                load.review(now, [0; TIERS]);
            }
            load.told()
        };
        assert_eq!(run(1, 5, 5, 0), PoolLoad::default(), "one look tells nothing");
        let calm = run(100, 100, 0, 0);
        assert_eq!((calm.refused_permille, calm.admitted_per_second), (0, 999));
        // 100 let in of whom 20 are late after all, 120 refused at the door: 140 of 220.
        let hard = run(100, 100, 120, 20);
        assert!((632..=637).contains(&hard.refused_permille), "{hard:?}");
        assert!((798..=801).contains(&hard.admitted_per_second), "{hard:?}");
        let half_a_second_later = run(5, 100, 0, 0);
        assert!((350..=550).contains(&half_a_second_later.refused_permille), "no swing");
        assert_eq!(run(150, 100, 0, 0).refused_permille, 0, "and it is over");
    }
}
