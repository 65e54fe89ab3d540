//! Requests that wait for what cannot come any more: their instance, or all that could take them, went
//! away. They are taken out of the queue at once and placed anew by the router that they are of: to
//! another instance, into another line, or nowhere, with the right word.

use std::time::Instant;

use strowger_contract::{
    Attempt, BackendId, ClassId, NumberMap, Pin, PoolId, Query, RouteReason, Router, SessionKey,
    Ticket, Verdict,
};

use super::core::Core;
use super::qos::Waiter;
use super::router::CoreRouter;
use super::slots::{Grant, Waiting};
use super::snapshot::{Pool, PoolLive};

/// What a waiting request asked, to ask it again.
pub(super) struct Kept {
    pub(super) pool: PoolId,
    session: SessionKey,
    pin: Option<Pin>,
    in_session: bool,
    class: ClassId,
    deadline: Instant,
    capability: u32,
    exclude: Box<[BackendId]>,
    since: Instant,
}

impl Kept {
    pub(super) fn of(now: Instant, query: &Query<'_>) -> Self {
        Self {
            pool: query.pool,
            session: query.session,
            pin: query.pin,
            in_session: query.in_session,
            class: query.class,
            deadline: query.deadline,
            capability: query.capability,
            exclude: query.exclude.into(),
            since: now,
        }
    }

    fn query(&self) -> Query<'_> {
        Query {
            pool: self.pool,
            session: self.session,
            pin: self.pin,
            in_session: self.in_session,
            awaits: true,
            class: self.class,
            deadline: self.deadline,
            capability: self.capability,
            exclude: &self.exclude,
            attempt: Attempt::Anew,
        }
    }
}

impl CoreRouter {
    /// Places requests anew that waited in vain, the earliest deadline first.
    pub(super) fn place_anew(
        &mut self,
        now: Instant,
        mut displaced: Vec<(u64, Waiting)>,
        grants: &mut Vec<Grant>,
    ) {
        displaced.sort_by_key(|(ticket, waiting)| (waiting.kept.deadline, *ticket));
        for (ticket, waiting) in displaced {
            // It stays the same request under the same ticket: let in and charged once.
            self.anew = Some(ticket);
            let verdict = self.route(now, &waiting.kept.query());
            self.anew = None;
            match verdict {
                Verdict::Go(route) => grants.push(Grant::Go(Ticket(ticket), route)),
                Verdict::Wait(_) => {}
                Verdict::Refuse(refusal) => {
                    self.log_displaced(now, &waiting.kept);
                    grants.push(Grant::Refuse(Ticket(ticket), refusal));
                }
            }
        }
    }

    fn log_displaced(&self, now: Instant, kept: &Kept) {
        let Some(pool) = self.snapshot.pool(kept.pool) else { return };
        let micros = |from: Instant, to: Instant| {
            u64::try_from(to.saturating_duration_since(from).as_micros()).unwrap_or(u64::MAX)
        };
        let (waited, budget) = (micros(kept.since, now), micros(kept.since, kept.deadline));
        let why = "nobody is left who could take it";
        self.core.log_refusal(&self.snapshot, pool, kept.class, "dequeue", why, waited, budget);
    }
}

impl Core {
    /// Somebody of the pool went away, or can do less: those who wait for nobody are placed anew. What is
    /// about to wait by what it saw before is found by one of the next ticks.
    pub(super) fn displace(&self, now: Instant, pool: PoolId) {
        let snapshot = self.snapshot();
        if let Some(pool) = snapshot.pool(pool) {
            pool.live.qos.look_again();
            self.displace_from(now, pool);
        }
    }

    /// The same for all pools, after others are wanted.
    pub(super) fn displace_all(&self, now: Instant, removed: &[std::sync::Arc<PoolLive>]) {
        for pool in self.snapshot().pools() {
            self.displace(now, pool.id);
        }
        for pool in removed {
            pool.qos.displace(|_| false);
        }
    }

    /// What a tick does for a pool of which somebody went away lately.
    pub(super) fn displace_late(&self, now: Instant, pool: &Pool) {
        if pool.live.qos.is_to_look() {
            self.displace_from(now, pool);
        }
    }

    fn displace_from(&self, now: Instant, pool: &Pool) {
        if !pool.live.qos.is_busy() {
            return;
        }
        let clock = self.clock(now);
        let reachable = || pool.backends().filter(|backend| backend.is_linked());
        let keeping: NumberMap<BackendId, bool> = reachable()
            .filter(|backend| backend.keeps_sessions())
            .map(|backend| (backend.id, backend.is_well(clock)))
            .collect();
        let open: Vec<_> = reachable().filter(|backend| backend.is_open()).collect();
        let nobody_well = !open.iter().any(|backend| backend.is_well(clock));
        let panic = pool.is_panicking() || pool.spec.panic_percent > 0 && nobody_well;
        let takes = |waiter: &Waiter| {
            open.iter().any(|backend| {
                (panic || backend.is_well(clock))
                    && backend.live.can(waiter.capability)
                    && !waiter.excludes(backend.id)
            })
        };
        pool.live.qos.displace(|waiter| match waiter.backend {
            Some(backend) => keeping
                .get(&backend)
                .is_some_and(|well| *well || waiter.reason != RouteReason::Table),
            None => takes(waiter),
        });
    }
}
