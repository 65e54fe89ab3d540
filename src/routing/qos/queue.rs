//! The queue of a pool. Its lock is taken only when all slots are taken, or somebody waits already;
//! while there are slots, a request costs one compare-and-swap on its backend.
//!
//! Nothing is lost between those two worlds: who finds no slot announces itself in `waiting`
//! *before* it looks once more, and who gives a slot back looks at `waiting` *after* it did (both
//! sequentially consistent), so at least one of them sees the other.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use strowger_contract::{ClassId, Refusal, Route};

use super::super::snapshot::Backend;
use super::desk::Settled;
use super::figures::{ClassFigures, QosFigures};
use super::lanes::{Lanes, Place, TIERS, Waiter};
use super::load::Load;
use super::retry::RetryBudget;
use super::service::ServiceTimes;
use super::sessions::Sessions;

/// Requests that wait in a FIFO pool, at most.
const FIFO_MAX: usize = 65_536;

/// Refusals that are logged one by one between two ticks of 100 ms; all are counted.
const LOGGED_PER_TICK: u32 = 5;

/// No tier is thought to leave less than this part of the slots to those after it: even in full
/// overload a slot is free now and then.
const LEFT_MIN: f64 = 0.005;

/// When higher tiers take more than this, what really leaves a lower one's queue is looked at: a
/// percent of error in what they take is then most of what is left.
const SUSTAINED: f64 = 0.85;

/// What one pool's queue knows.
#[derive(Debug, Default)]
pub(in crate::routing) struct PoolQos {
    /// Those that wait, and those that are about to.
    waiting: AtomicU32,
    inner: Mutex<Inner>,
    /// From sending to the answer.
    pub(in crate::routing) answers: ServiceTimes,
    /// From taking a slot to giving it back.
    pub(in crate::routing) holds: ServiceTimes,
    pub(in crate::routing) load: Load,
    sessions: Sessions,
    pub(in crate::routing) retry: RetryBudget,
    pub(in crate::routing) retries_denied: AtomicU64,
    slots: AtomicU32,
    log_left: AtomicU32,
    /// Bounds that have been hit once, by bit: the first time is an event.
    bitten: AtomicU32,
    /// Ticks that still look for those who wait in vain.
    looks: AtomicU32,
}

#[derive(Debug, Default)]
pub(in crate::routing) struct Inner {
    pub(in crate::routing) lanes: Lanes,
    figures: Vec<ClassFigures>,
    inversions: u64,
}

/// A request that finds no slot.
#[derive(Debug)]
pub(in crate::routing) struct Entry {
    pub(in crate::routing) waiter: Waiter,
    /// The most of its class that may wait.
    pub(in crate::routing) queue_max: u32,
    /// The least percentage of grants of its class.
    pub(in crate::routing) share: u8,
    /// The slots of the backend that it must go to.
    pub(in crate::routing) own_slots: u32,
}

/// How the pool wants its queue.
#[derive(Clone, Copy, Debug)]
pub(in crate::routing) struct Wanted<'a> {
    pub(in crate::routing) fifo: bool,
    pub(in crate::routing) shares: &'a [u8],
}

/// Why a request may not wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::routing) enum No {
    /// The wait would be too long.
    Predicted,
    /// Too many of its class wait.
    Full,
}

/// What became of one that waited.
#[derive(Debug)]
pub(in crate::routing) struct Settlement {
    pub(in crate::routing) waiter: Waiter,
    pub(in crate::routing) settled: Settled,
}

impl PoolQos {
    /// Whether anybody waits: then a newcomer must not pass.
    pub(in crate::routing) fn is_busy(&self) -> bool {
        self.waiting.load(SeqCst) > 0
    }

    pub(in crate::routing) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces one that is about to wait. Under the lock.
    pub(in crate::routing) fn announce(&self) {
        self.waiting.fetch_add(1, SeqCst);
    }

    /// Takes the announcement, or the wait, back. Under the lock.
    pub(in crate::routing) fn renounce(&self) {
        self.waiting.fetch_sub(1, SeqCst);
    }

    pub(in crate::routing) fn set_slots(&self, slots: u32) {
        self.slots.store(slots, Relaxed);
    }

    /// Whether one more line may be logged before the next tick.
    pub(in crate::routing) fn may_log(&self) -> bool {
        self.log_left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok()
    }

    /// The same, without taking the line.
    pub(in crate::routing) fn has_log_left(&self) -> bool {
        self.log_left.load(Relaxed) > 0
    }

    /// How long it would wait, for one that does not get that far.
    pub(in crate::routing) fn foretell(&self, entry: &Entry) -> u64 {
        self.predict(&self.lock(), entry)
    }

    /// Whether a bound bites for the first time. `bound`: below 32.
    pub(in crate::routing) fn bites_first(&self, bound: u32) -> bool {
        self.bitten.load(Relaxed) & 1 << bound == 0
            && self.bitten.fetch_or(1 << bound, Relaxed) & 1 << bound == 0
    }

    /// Whether the set of carried deadlines was full for the first time since the start.
    pub(in crate::routing) fn urgent_bites_first(&self) -> bool {
        const BOUND_URGENT: u32 = 2;
        self.is_busy() && self.lock().lanes.urgent_full > 0 && self.bites_first(BOUND_URGENT)
    }

    /// Once per tick of the core. `held`: the slots that sessions hold, `ended`: how many were given back
    /// since the last tick.
    pub(in crate::routing) fn review(&self, now_ms: u64, held: u32, ended: u32) {
        self.sessions.review(now_ms, held, ended, self.load.admitted_behind_first());
        self.answers.review();
        self.holds.review();
        let waiting = if self.is_busy() { self.lock().lanes.of_tiers() } else { [0; TIERS] };
        self.load.review(now_ms, waiting);
        self.log_left.store(LOGGED_PER_TICK, Relaxed);
    }

    /// How long it would wait, in microseconds.
    fn predict(&self, inner: &Inner, entry: &Entry) -> u64 {
        let Waiter { tier, order, deadline, since, backend, .. } = entry.waiter;
        // 0: not all backends have a limit, and who waits does so for its own.
        let slots = match self.slots.load(Relaxed) {
            0 => entry.own_slots.max(1),
            slots => slots,
        };
        let (common, own) = inner.lanes.ahead(tier, order, backend);
        // No caution is added below: a wrong no breaks a promise for certain, a wrong yes seldom.
        let turns = match backend {
            None => {
                let count = f64::from(common + 1);
                let sum = self.holds.sum_of(count);
                let by_sessions = self.sessions.wait(count, sum, slots);
                by_sessions.unwrap_or_else(|| sum / f64::from(slots))
            }
            Some(_) => {
                // Its backend's share of what all may take, and what only it may take.
                let own_slots = f64::from(entry.own_slots.max(1));
                let share = f64::from(common) * (own_slots / f64::from(slots)).min(1.0);
                self.holds.sum_of(share + f64::from(own + 1)) / own_slots
            }
        };
        let budget = deadline.saturating_sub(since);
        let above = self.load.above(tier, budget, self.holds.mean(), slots);
        let mut wait = turns / (1.0 - above).max(LEFT_MIN);
        if above > SUSTAINED
            && let Some(drain) = self.load.drain(tier, budget)
        {
            // What was seen to leave says more than what is thought to come before.
            let turns = f64::from(common + own) * 1_000_000.0;
            wait = wait.max(turns / drain.max(0.01));
        }
        if entry.share > 0 {
            let kept = self.holds.p90() as f64 / f64::from(slots) * 100.0 / f64::from(entry.share);
            let waiting = inner.lanes.of_class(entry.waiter.class);
            wait = wait.min(f64::from(waiting + 1) * kept);
        }
        wait as u64
    }

    /// Whether a request may wait: its predicted wait, in microseconds.
    pub(in crate::routing) fn admit(
        &self,
        inner: &Inner,
        wanted: Wanted<'_>,
        entry: &Entry,
    ) -> Result<u64, (No, u64)> {
        let class = entry.waiter.class;
        if wanted.fifo {
            if inner.lanes.len() >= FIFO_MAX {
                return Err((No::Full, 0));
            }
            return Ok(0);
        }
        if inner.lanes.of_class(class) >= entry.queue_max {
            return Err((No::Full, 0));
        }
        let wait = self.predict(inner, entry);
        let left = entry.waiter.deadline.saturating_sub(entry.waiter.since);
        // Where nine in ten do not fit into the budget, better half of it than nobody at all.
        let service = self.answers.p90().min(self.answers.p50().max(left / 2));
        if wait + service > left {
            return Err((No::Predicted, wait));
        }
        Ok(wait)
    }

    /// Lets it wait.
    pub(in crate::routing) fn enqueue(&self, inner: &mut Inner, waiter: Waiter) -> Place {
        inner.figures(waiter.class).queued += 1;
        inner.lanes.push(waiter)
    }

    /// Takes one out that was let in for a free slot only, and did not get it. Under the lock.
    pub(in crate::routing) fn turn_away(&self, inner: &mut Inner, place: Place) {
        if let Some(waiter) = inner.lanes.remove(place) {
            inner.figures(waiter.class).queued -= 1;
            self.renounce();
        }
    }

    /// Takes one out that does not want to wait any more; whether it still did.
    pub(in crate::routing) fn withdraw(&self, place: Place) -> bool {
        let mut inner = self.lock();
        let Some(waiter) = inner.lanes.remove(place) else { return false };
        inner.figures(waiter.class).withdrawn += 1;
        self.renounce();
        true
    }

    /// Takes out those for whom `stays` does not hold, and tells their routers.
    pub(in crate::routing) fn displace(&self, stays: impl FnMut(&Waiter) -> bool) {
        let mut inner = self.lock();
        for waiter in inner.lanes.take_unless(stays) {
            inner.figures(waiter.class).displaced += 1;
            self.renounce();
            waiter.desk.put(waiter.ticket, Settled::Displaced);
        }
    }

    /// The next ticks are to look for those who wait in vain: some may be about to wait by what they saw
    /// before.
    pub(in crate::routing) fn look_again(&self) {
        const TICKS: u32 = 3;
        self.looks.store(TICKS, Relaxed);
    }

    /// Whether this tick is to.
    pub(in crate::routing) fn is_to_look(&self) -> bool {
        self.looks.fetch_update(Relaxed, Relaxed, |looks| looks.checked_sub(1)).is_ok()
    }

    /// Gives the backend's free slots to those who are next for them. `open`: whether it takes new
    /// sessions at all; `held`: sessions that hold a slot of it.
    pub(in crate::routing) fn dispatch(
        &self,
        inner: &mut Inner,
        wanted: Wanted<'_>,
        now_us: u64,
        (backend, open, held): (&Backend, bool, u32),
        settled: &mut Vec<Settlement>,
    ) {
        while !inner.lanes.is_empty() && backend.take_slot() {
            let limit = backend.limit_for_new().unwrap_or(u32::MAX);
            let open = open && backend.live.in_flight().saturating_add(held) <= limit;
            let can = |capability| backend.live.can(capability);
            let next = loop {
                let Some((waiter, inverted)) =
                    inner.lanes.next(backend.id, open, can, wanted.shares)
                else {
                    break None;
                };
                self.renounce();
                let needs = if wanted.fifo { 0 } else { self.needs(inner, &waiter) };
                if waiter.deadline >= now_us + needs {
                    inner.inversions += u64::from(inverted);
                    break Some(waiter);
                }
                inner.too_late(&waiter);
                settled.push(Settlement { waiter, settled: Settled::Refused(Refusal::TooLate) });
            };
            let Some(waiter) = next else {
                backend.live.give_back();
                return;
            };
            inner.granted(&waiter, now_us);
            self.load.granted(waiter.tier);
            backend.live.count_request();
            let route = Route {
                backend: backend.id,
                pin: backend.pin,
                transport: backend.spec.transport,
                address: backend.spec.address,
                reason: waiter.reason,
            };
            settled.push(Settlement { waiter, settled: Settled::Granted(route) });
        }
    }

    /// What must be left of a budget for a slot to be given to it. While others wait, a lower tier's
    /// request with so little left that a long service would be in vain makes room for one with more:
    /// as many are served, and fewer in vain.
    fn needs(&self, inner: &Inner, waiter: &Waiter) -> u64 {
        let half = self.answers.p50();
        if waiter.tier == 0 || inner.lanes.is_empty() {
            return half;
        }
        let budget = waiter.deadline.saturating_sub(waiter.since);
        half.max(self.answers.p95().min(budget / 2))
    }

    /// Refuses those whose time is up; when the next one's is, in microseconds.
    pub(in crate::routing) fn expire(
        &self,
        fifo: bool,
        now_us: u64,
        settled: &mut Vec<Settlement>,
    ) -> Option<u64> {
        if !self.is_busy() {
            return None;
        }
        let mut inner = self.lock();
        let service = if fifo { 0 } else { self.answers.p50() };
        while let Some(waiter) = inner.lanes.expired(now_us + service) {
            self.renounce();
            inner.too_late(&waiter);
            settled.push(Settlement { waiter, settled: Settled::Refused(Refusal::TooLate) });
        }
        inner.lanes.soonest().map(|deadline| deadline.saturating_sub(service))
    }

    /// Its figures. `names`: of the classes.
    pub(in crate::routing) fn figures<'a>(
        &self,
        fifo: bool,
        names: impl Fn(ClassId) -> &'a str,
    ) -> QosFigures {
        let inner = self.lock();
        let ms = |us: u64| us as f64 / 1_000.0;
        QosFigures {
            policy: if fifo { "fifo" } else { "deadline" },
            slots: self.slots.load(Relaxed),
            service_p50_ms: ms(self.answers.p50()),
            service_p90_ms: ms(self.answers.p90()),
            inversions: inner.inversions,
            urgent_full: inner.lanes.urgent_full,
            retries_denied: self.retries_denied.load(Relaxed),
            classes: inner
                .figures
                .iter()
                .enumerate()
                .filter(|(_, figures)| {
                    figures.queued + figures.refused_full + figures.refused_predicted > 0
                })
                .map(|(class, figures)| {
                    let class = ClassId(class as u8);
                    let waiting = inner.lanes.of_class(class);
                    (names(class).to_owned(), ClassFigures { waiting, ..figures.clone() })
                })
                .collect(),
        }
    }
}

impl Inner {
    fn figures(&mut self, class: ClassId) -> &mut ClassFigures {
        let class = usize::from(class.0);
        if self.figures.len() <= class {
            self.figures.resize_with(class + 1, ClassFigures::default);
        }
        &mut self.figures[class]
    }

    /// Counts one that is not let in.
    pub(in crate::routing) fn count_no(&mut self, class: ClassId, no: No) {
        let figures = self.figures(class);
        match no {
            No::Full => figures.refused_full += 1,
            No::Predicted => figures.refused_predicted += 1,
        }
    }

    fn too_late(&mut self, waiter: &Waiter) {
        self.figures(waiter.class).refused_late += 1;
    }

    fn granted(&mut self, waiter: &Waiter, now_us: u64) {
        let seconds = |us: u64| Duration::from_micros(us).as_secs_f64();
        let waited = seconds(now_us.saturating_sub(waiter.since));
        let slack = seconds(waiter.deadline) - seconds(now_us);
        let predicted = seconds(waiter.predicted);
        let figures = self.figures(waiter.class);
        figures.granted += 1;
        figures.wait.note(waited);
        figures.slack.note(slack);
        figures.error.note(predicted - waited);
    }
}
