//! Slots: a request takes one of its backend's, or waits for one, or is refused.

use std::sync::Arc;
use std::time::{Duration, Instant};

use strowger_contract::{
    Attempt, BackendId, ClassId, Query, Refusal, Route, RouteReason, Ticket, Verdict,
};

use super::anew::Kept;
use super::core::Core;
use super::events::Happening;
use super::qos::{EXCLUDED_MAX, Entry, Place, Settled, Settlement, Waiter, Wanted};
use super::router::CoreRouter;
use super::snapshot::{Backend, Pool, PoolLive};
use super::spec::Policy;

/// When to come back after all slots were taken, at least; spread over as much again, so that not
/// all come back at once.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(1);

/// In a FIFO pool nobody is refused for being late, but nobody's client waits longer than this
/// either (RFC 3261: 64 x T1).
const FIFO_PATIENCE: Duration = Duration::from_secs(32);

/// Bounds whose first hit is an event.
const BOUND_LANE: u32 = 0;
const BOUND_RETRY: u32 = 1;

/// What became of a request that waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// It has a slot.
    Go(Ticket, Route),
    /// It may not go.
    Refuse(Ticket, Refusal),
}

/// A request of this router's that waits.
pub(super) struct Waiting {
    pub(super) kept: Kept,
    pool: Arc<PoolLive>,
    place: Place,
    fifo: bool,
}

impl CoreRouter {
    /// Who calls [`CoreRouter::grants`] when another worker has news for this one.
    pub fn set_waker(&self, waker: super::Waker) {
        self.desk.set_waker(waker);
    }

    /// When [`CoreRouter::grants`] is to be called at the latest, if anything waits.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Instant> {
        let soonest = self.soonest.filter(|_| !self.waiting.is_empty())?;
        Some(self.core.instant(soonest))
    }

    /// What became of waiting requests since the last call. Nothing is locked if nothing did.
    pub fn grants(&mut self, now: Instant, grants: &mut Vec<Grant>) {
        self.desk.take(&mut self.news);
        if !self.waiting.is_empty() && self.soonest.is_some_and(|at| at <= self.core.clock_us(now))
        {
            self.expire(now);
        }
        let mut displaced = Vec::new();
        // What is given back here may come round to this router again.
        while let Some((ticket, settled)) = self.news.pop() {
            let waiting = self.waiting.remove(&ticket);
            let known = waiting.is_some();
            match settled {
                Settled::Granted(route) if known => {
                    *self.ledger.entry(route.backend).or_insert(0) += 1;
                    grants.push(Grant::Go(Ticket(ticket), route));
                }
                Settled::Granted(route) => self.give_back(now, route.backend),
                Settled::Refused(refusal) if known => {
                    grants.push(Grant::Refuse(Ticket(ticket), refusal));
                }
                Settled::Refused(_) => {}
                Settled::Displaced => {
                    displaced.extend(waiting.map(|waiting| (ticket, waiting)));
                }
            }
        }
        if !displaced.is_empty() {
            self.place_anew(now, displaced, grants);
            // Placing some may have settled others.
            if !self.news.is_empty() {
                self.grants(now, grants);
            }
        }
    }

    fn give_back(&mut self, now: Instant, backend: BackendId) {
        if let Some(live) = self.core.live(backend) {
            live.give_back();
        }
        self.freed(now, backend);
    }

    fn expire(&mut self, now: Instant) {
        let mut pools: Vec<(Arc<PoolLive>, bool)> = Vec::new();
        for waiting in self.waiting.values() {
            if !pools.iter().any(|(pool, _)| Arc::ptr_eq(pool, &waiting.pool)) {
                pools.push((Arc::clone(&waiting.pool), waiting.fifo));
            }
        }
        let (clock, mut settled) = (self.core.clock_us(now), Vec::new());
        self.soonest = None;
        for (pool, fifo) in pools {
            let next = pool.qos.expire(fifo, clock, &mut settled).map(|next| next + 1);
            self.soonest = self.soonest.into_iter().chain(next).min();
        }
        self.deliver(clock, settled);
    }

    fn deliver(&mut self, clock: u64, settled: Vec<Settlement>) {
        for settlement in settled {
            if Arc::ptr_eq(&settlement.waiter.desk, &self.desk) {
                self.core.log_settled(clock, &self.snapshot, &settlement);
                self.news.push((settlement.waiter.ticket, settlement.settled));
            } else {
                self.core.hand_out(clock, &self.snapshot, settlement);
            }
        }
    }

    /// A slot of the backend was given back: whoever is next gets it.
    pub(super) fn freed(&mut self, now: Instant, backend: BackendId) {
        let Some(backend) = self.snapshot.backend(backend) else { return };
        let Some(pool) = self.snapshot.pool(backend.pool) else { return };
        if !pool.live.qos.is_busy() {
            return;
        }
        let mut settled = Vec::new();
        let mut inner = pool.live.qos.lock();
        self.core.serve(&mut inner, pool, backend, now, &mut settled);
        drop(inner);
        let clock = self.core.clock_us(now);
        self.deliver(clock, settled);
    }

    /// A request that nobody awaits an answer of, or that is never queued nor shed, goes at once.
    fn is_free(&self, query: &Query<'_>) -> bool {
        !query.awaits
            || query.class == ClassId::CONTROL
            || self.snapshot.class(query.class).is_some_and(|class| class.deadline.is_none())
    }

    /// To this backend: at once if it has a slot and nobody waits, else by the queue.
    pub(super) fn go(
        &mut self,
        now: Instant,
        pool: &Arc<Pool>,
        backend: &Arc<Backend>,
        reason: RouteReason,
        query: &Query<'_>,
    ) -> Verdict {
        if self.is_free(query) {
            return self.leave(backend, reason, query.awaits);
        }
        // A congested link is no reason to hold back what can go nowhere else.
        if !pool.live.qos.is_busy() && backend.live.try_begin(backend.limit(), 0) {
            return self.leave_on_slot(pool, backend, reason, query);
        }
        self.wait(now, pool, query, Some((backend, reason)))
    }

    /// Without a look at slots.
    pub(super) fn leave(
        &mut self,
        backend: &Backend,
        reason: RouteReason,
        awaits: bool,
    ) -> Verdict {
        if awaits {
            backend.live.begin();
            *self.ledger.entry(backend.id).or_insert(0) += 1;
        }
        Verdict::Go(route_to(backend, reason))
    }

    fn leave_on_slot(
        &mut self,
        pool: &Pool,
        backend: &Backend,
        reason: RouteReason,
        query: &Query<'_>,
    ) -> Verdict {
        backend.live.count_request();
        *self.ledger.entry(backend.id).or_insert(0) += 1;
        self.admitted(pool, query);
        Verdict::Go(route_to(backend, reason))
    }

    fn admitted(&self, pool: &Pool, query: &Query<'_>) {
        if query.attempt == Attempt::Anew {
            return;
        }
        let tier = self.snapshot.class(query.class).map_or(3, |class| class.tier);
        pool.live.qos.load.admitted(tier);
        if query.attempt == Attempt::First {
            pool.live.qos.retry.first();
        }
    }

    /// To the backend that balancing chose, or to whichever has a slot first.
    pub(super) fn go_to_any(
        &mut self,
        now: Instant,
        pool: &Arc<Pool>,
        found: Option<(Arc<Backend>, RouteReason)>,
        query: &Query<'_>,
    ) -> Verdict {
        if let Some((backend, reason)) = &found {
            if self.is_free(query) {
                return self.leave(backend, *reason, query.awaits);
            }
            let held = self.core.held_by(backend.id);
            if !pool.live.qos.is_busy() && backend.take_slot_for_new(held) {
                return self.leave_on_slot(pool, backend, *reason, query);
            }
        }
        self.wait(now, pool, query, None)
    }

    /// Whether a further try is in the pool's retry budget.
    pub(super) fn may_retry(&self, query: &Query<'_>) -> bool {
        if query.attempt != Attempt::Retry || !query.awaits {
            return true;
        }
        let Some(pool) = self.snapshot.pool(query.pool) else { return true };
        let qos = &pool.live.qos;
        if qos.retry.take() {
            return true;
        }
        qos.retries_denied.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if qos.bites_first(BOUND_RETRY) {
            self.core.tell_pool(pool, Happening::BoundHit { bound: "retry budget" });
        }
        false
    }

    pub(super) fn overloaded(&mut self) -> Refusal {
        let spread = self.dice.below(RETRY_AFTER.as_millis() as u64);
        Refusal::Overloaded { retry_after: RETRY_AFTER + Duration::from_millis(spread) }
    }

    fn wait(
        &mut self,
        now: Instant,
        pool: &Arc<Pool>,
        query: &Query<'_>,
        to: Option<(&Arc<Backend>, RouteReason)>,
    ) -> Verdict {
        let qos = &pool.live.qos;
        let fifo = pool.spec.qos.policy == Policy::Fifo;
        let wanted = Wanted { fifo, shares: if fifo { &[] } else { &pool.shares } };
        let clock = self.core.clock_us(now);
        let mut entry = self.entry(clock, fifo, query, to);
        let mut inner = qos.lock();
        qos.announce();
        let free = match to {
            Some((backend, _)) => (!backend.is_full()).then(|| Arc::clone(backend)),
            None => self.choose_free(pool, now, query),
        };
        if let Some(backend) = &free {
            let held = if to.is_some() { 0 } else { self.core.held_by(backend.id) };
            let takes = || match to {
                Some(_) => backend.take_slot(),
                None => backend.take_slot_for_new(held),
            };
            if inner.lanes.is_empty() && takes() {
                qos.renounce();
                drop(inner);
                return self.leave_on_slot(pool, backend, entry.waiter.reason, query);
            }
        }
        let admission = qos.admit(&inner, wanted, &entry);
        // With a free slot it may be its turn at once, whatever the prediction says.
        if free.is_none()
            && let Err((no, predicted)) = admission
        {
            qos.renounce();
            inner.count_no(query.class, no);
            drop(inner);
            return self.refuse_entry(pool, query, &entry, no, predicted);
        }
        entry.waiter.predicted = admission.unwrap_or_else(|(_, predicted)| predicted);
        let (ticket, deadline) = (entry.waiter.ticket, entry.waiter.deadline);
        let place = qos.enqueue(&mut inner, entry.waiter.clone());
        let mut settled = Vec::new();
        if let Some(backend) = &free {
            self.core.serve(&mut inner, pool, backend, now, &mut settled);
        }
        let mine = settled.iter().position(|settlement| {
            settlement.waiter.ticket == ticket && Arc::ptr_eq(&settlement.waiter.desk, &self.desk)
        });
        let mine = mine.map(|index| settled.swap_remove(index).settled);
        let refused = match (&mine, admission) {
            (None, Err((no, predicted))) => {
                qos.turn_away(&mut inner, place);
                inner.count_no(query.class, no);
                Some((no, predicted))
            }
            _ => None,
        };
        drop(inner);
        self.deliver(clock, settled);
        if let Some((no, predicted)) = refused {
            return self.refuse_entry(pool, query, &entry, no, predicted);
        }
        match mine {
            Some(Settled::Granted(route)) => {
                *self.ledger.entry(route.backend).or_insert(0) += 1;
                self.admitted(pool, query);
                Verdict::Go(route)
            }
            Some(Settled::Refused(refusal)) => {
                self.core.log_late_after(&self.snapshot, clock, &entry.waiter);
                Verdict::Refuse(refusal)
            }
            // Only what waited before is displaced.
            Some(Settled::Displaced) => Verdict::Refuse(Refusal::NoBackend),
            None => {
                self.admitted(pool, query);
                let live = Arc::clone(&pool.live);
                let kept = Kept::of(now, query);
                self.waiting.insert(ticket, Waiting { kept, pool: live, place, fifo });
                let service = if fifo { 0 } else { qos.answers.p50() };
                let at = deadline.saturating_sub(service) + 1;
                self.soonest = Some(self.soonest.map_or(at, |soonest| soonest.min(at)));
                Verdict::Wait(Ticket(ticket))
            }
        }
    }

    fn entry(
        &mut self,
        clock: u64,
        fifo: bool,
        query: &Query<'_>,
        to: Option<(&Arc<Backend>, RouteReason)>,
    ) -> Entry {
        let ticket = self.anew.unwrap_or(self.tickets + 1);
        self.tickets = self.tickets.max(ticket);
        let class = self.snapshot.class(query.class);
        let deadline = if fifo {
            clock + FIFO_PATIENCE.as_micros() as u64
        } else {
            self.core.clock_us(query.deadline)
        };
        // A second try may have more time than its class gives; it is its turn as if it had not.
        let turn = class.and_then(|class| class.deadline).map_or(deadline, |budget| {
            deadline.min(clock.saturating_add(budget.as_micros() as u64))
        });
        let mut exclude = [BackendId(0); EXCLUDED_MAX];
        let excluded = query.exclude.len().min(EXCLUDED_MAX);
        exclude[..excluded].copy_from_slice(&query.exclude[..excluded]);
        Entry {
            waiter: Waiter {
                desk: Arc::clone(&self.desk),
                ticket,
                pool: query.pool,
                class: query.class,
                lane: if fifo { 0 } else { query.class.0 },
                tier: if fifo { 0 } else { class.map_or(3, |class| class.tier) },
                order: if fifo { clock } else { turn },
                deadline,
                since: clock,
                predicted: 0,
                backend: to.map(|(backend, _)| backend.id),
                capability: query.capability,
                exclude,
                excluded: excluded as u8,
                reason: to.map_or(RouteReason::Balanced, |(_, reason)| reason),
                aside: excluded > 0 || !fifo && turn < deadline,
                urgent: false,
            },
            queue_max: class.map_or(0, |class| class.queue_max),
            share: class.map_or(0, |class| class.share_min),
            own_slots: to.and_then(|(backend, _)| backend.limit()).unwrap_or(1),
        }
    }

    fn refuse_entry(
        &mut self,
        pool: &Pool,
        query: &Query<'_>,
        entry: &Entry,
        no: super::qos::No,
        predicted: u64,
    ) -> Verdict {
        let why = match no {
            super::qos::No::Predicted => "the wait would be too long",
            super::qos::No::Full => {
                if pool.live.qos.bites_first(BOUND_LANE) {
                    let fifo = pool.spec.qos.policy == Policy::Fifo;
                    let bound =
                        if fifo { "requests that wait in FIFO (FIFO_MAX)" } else { "queue_max" };
                    self.core.tell_pool(pool, Happening::BoundHit { bound });
                }
                "too many of its class wait"
            }
        };
        pool.live.qos.load.refused(false);
        let budget = entry.waiter.deadline.saturating_sub(entry.waiter.since);
        self.core.log_refusal(&self.snapshot, pool, query.class, "enqueue", why, predicted, budget);
        Verdict::Refuse(self.overloaded())
    }

    /// Whether the brown-out ladder gives the request up; it is then counted and logged.
    pub(super) fn is_given_up(&mut self, now: Instant, query: &Query<'_>) -> bool {
        let class = self.snapshot.class(query.class);
        let is_kept = query.in_session
            || query.class == ClassId::CONTROL
            || class.is_some_and(|class| class.deadline.is_none());
        let (tier, roll) = (class.map_or(3, |class| class.tier), self.dice.roll());
        if is_kept || !self.core.brownout().refuses(tier, roll) {
            return false;
        }
        self.core.brownout().count(query.class);
        self.log_unasked(now, query, "brownout", "the node is short of itself");
        true
    }

    /// The request's time was over when it came.
    pub(super) fn log_late(&mut self, now: Instant, query: &Query<'_>) {
        self.log_unasked(now, query, "arrival", "its time was over when it came");
    }

    /// A refusal that the queue was not asked about: with the wait that it would have predicted, and all
    /// that the class is promised.
    fn log_unasked(
        &mut self,
        now: Instant,
        query: &Query<'_>,
        stage: &'static str,
        why: &'static str,
    ) {
        let Some(pool) = self.snapshot.pool(query.pool).cloned() else { return };
        if !pool.live.qos.has_log_left() {
            return;
        }
        let fifo = pool.spec.qos.policy == Policy::Fifo;
        let wait = if fifo || !pool.live.qos.is_busy() {
            0
        } else {
            let entry = self.entry(self.core.clock_us(now), fifo, query, None);
            pool.live.qos.foretell(&entry)
        };
        let class = self.snapshot.class(query.class);
        let budget = class.and_then(|class| class.deadline).unwrap_or_default();
        let budget = budget.as_micros() as u64;
        self.core.log_refusal(&self.snapshot, &pool, query.class, stage, why, wait, budget);
    }

    /// Nothing more is heard of the ticket.
    pub(super) fn withdraw_ticket(&mut self, ticket: Ticket) {
        if let Some(waiting) = self.waiting.remove(&ticket.0) {
            // If it was granted meanwhile, `grants` finds nobody for it and gives the slot back.
            let _waited = waiting.pool.qos.withdraw(waiting.place);
        }
    }

    /// A request is in flight that another process sent, and counted.
    pub(super) fn take_place(&mut self, backend: BackendId) {
        if let Some(live) = self.core.live(backend) {
            live.resume();
            *self.ledger.entry(backend).or_insert(0) += 1;
        }
    }

    /// The engine died: nothing that it had under way will end, nothing that waits is wanted.
    pub fn abandon_all(&mut self, now: Instant) {
        for (_, waiting) in self.waiting.drain() {
            let _waited = waiting.pool.qos.withdraw(waiting.place);
        }
        for (backend, count) in std::mem::take(&mut self.ledger) {
            if let Some(live) = self.core.live(backend) {
                live.end(count);
            }
            self.freed(now, backend);
        }
        let mut nobody = Vec::new();
        self.grants(now, &mut nobody);
        debug_assert!(nobody.is_empty());
    }
}

fn route_to(backend: &Backend, reason: RouteReason) -> Route {
    Route {
        backend: backend.id,
        pin: backend.pin,
        transport: backend.spec.transport,
        address: backend.spec.address,
        reason,
    }
}

impl Core {
    /// Gives the backend's free slots to those who wait.
    fn serve(
        &self,
        inner: &mut super::qos::Inner,
        pool: &Pool,
        backend: &Backend,
        now: Instant,
        settled: &mut Vec<Settlement>,
    ) {
        if !backend.keeps_sessions() || !backend.is_linked() {
            return;
        }
        let fifo = pool.spec.qos.policy == Policy::Fifo;
        let wanted = Wanted { fifo, shares: if fifo { &[] } else { &pool.shares } };
        let clock = self.clock(now);
        let open = backend.takes_new(clock) || backend.is_open() && pool.is_panicking();
        let who = (backend, open, self.held_by(backend.id));
        pool.live.qos.dispatch(inner, wanted, self.clock_us(now), who, settled);
    }

    /// Gives all free slots of the pool to those who wait: after something changed that is no
    /// request's end (a backend came up, a limit grew).
    pub(super) fn serve_pool(&self, now: Instant, pool: &Pool) {
        if !pool.live.qos.is_busy() {
            return;
        }
        let snapshot = self.snapshot();
        let mut settled = Vec::new();
        let mut inner = pool.live.qos.lock();
        for backend in pool.backends() {
            self.serve(&mut inner, pool, backend, now, &mut settled);
        }
        drop(inner);
        let clock = self.clock_us(now);
        for settlement in settled {
            self.hand_out(clock, &snapshot, settlement);
        }
    }

    fn hand_out(&self, clock: u64, snapshot: &super::Snapshot, settlement: Settlement) {
        self.log_settled(clock, snapshot, &settlement);
        settlement.waiter.desk.put(settlement.waiter.ticket, settlement.settled);
    }

    fn log_settled(&self, clock: u64, snapshot: &super::Snapshot, settlement: &Settlement) {
        if matches!(settlement.settled, Settled::Refused(_)) {
            self.log_late_after(snapshot, clock, &settlement.waiter);
        }
    }

    /// One that had been let in is refused after all.
    fn log_late_after(&self, snapshot: &super::Snapshot, clock: u64, waiter: &Waiter) {
        let Some(pool) = snapshot.pool(waiter.pool) else { return };
        pool.live.qos.load.refused(true);
        let (waited, budget) =
            (clock.saturating_sub(waiter.since), waiter.deadline.saturating_sub(waiter.since));
        let why = "no answer could come in time any more";
        self.log_refusal(snapshot, pool, waiter.class, "dequeue", why, waited, budget);
    }

    #[allow(clippy::too_many_arguments, reason = "what one line of the log says")]
    pub(super) fn log_refusal(
        &self,
        snapshot: &super::Snapshot,
        pool: &Pool,
        class: ClassId,
        stage: &'static str,
        why: &'static str,
        wait_us: u64,
        budget_us: u64,
    ) {
        if !pool.live.qos.may_log() {
            return;
        }
        let class = snapshot.class_name(class).to_owned();
        let (wait_ms, budget_ms) = (wait_us / 1_000, budget_us / 1_000);
        self.tell_pool(pool, Happening::RequestRefused { class, stage, why, wait_ms, budget_ms });
    }
}
