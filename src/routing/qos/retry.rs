//! The retry budget of a pool: retries are at most a tenth of first tries, so that a pool in trouble
//! is not given the rest by those who mean well.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// What one first try earns and one retry costs.
const EARNS: u32 = 1;
const COSTS: u32 = 10;

/// What may be saved up, so that a single lost backend's requests can be tried again after a quiet
/// time: a thousand retries.
const SAVED_MAX: u32 = 1_000 * COSTS;

/// What there is at the start: a pool that has seen nothing yet may fail over too.
const INITIAL: u32 = 100 * COSTS;

/// The budget.
#[derive(Debug)]
pub(in crate::routing) struct RetryBudget {
    saved: AtomicU32,
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self { saved: AtomicU32::new(INITIAL) }
    }
}

impl RetryBudget {
    /// A first try.
    pub(in crate::routing) fn first(&self) {
        let saved = self.saved.load(Relaxed);
        // A full budget, the usual case, is read and not written.
        if saved < SAVED_MAX {
            self.saved.fetch_add(EARNS, Relaxed);
        }
    }

    /// Whether one more try may be made; it is then paid for.
    pub(in crate::routing) fn take(&self) -> bool {
        self.saved.fetch_update(Relaxed, Relaxed, |saved| saved.checked_sub(COSTS)).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_are_a_tenth_of_first_tries() {
        let budget = RetryBudget::default();
        while budget.take() {}
        let mut retries = 0;
        for _ in 0..10_000 {
            budget.first();
            retries += u32::from(budget.take());
        }
        assert_eq!(retries, 1_000);
        for _ in 0..1_000_000 {
            budget.first();
        }
        let saved = std::iter::from_fn(|| budget.take().then_some(())).count();
        assert!(saved <= 1_001, "{saved}");
    }
}
