//! Where a worker's router hears what became of its waiting requests.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use strowger_contract::{Refusal, Route};

/// Called when there is something new: by any worker, so it must only wake the owner.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// What became of a waiting request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::routing) enum Settled {
    Granted(Route),
    Refused(Refusal),
    /// Nobody that it waited for can take it any more; it must be placed anew.
    Displaced,
}

/// One router's desk.
#[derive(Default)]
pub(in crate::routing) struct Desk {
    news: Mutex<Vec<(u64, Settled)>>,
    any: AtomicBool,
    waker: OnceLock<Waker>,
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Desk")
    }
}

impl Desk {
    fn news(&self) -> MutexGuard<'_, Vec<(u64, Settled)>> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(in crate::routing) fn set_waker(&self, waker: Waker) {
        // A router has one owner; a second waker would be the same one's.
        let _kept = self.waker.set(waker);
    }

    pub(in crate::routing) fn put(&self, ticket: u64, settled: Settled) {
        self.news().push((ticket, settled));
        let first = !self.any.swap(true, Ordering::AcqRel);
        if let Some(waker) = self.waker.get().filter(|_| first) {
            waker();
        }
    }

    /// Takes what there is; nothing is locked if there is nothing.
    pub(in crate::routing) fn take(&self, into: &mut Vec<(u64, Settled)>) {
        if self.any.swap(false, Ordering::AcqRel) {
            into.append(&mut self.news());
        }
    }
}
