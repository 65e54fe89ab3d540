//! Which instance of a pool takes a new session.

use strowger_contract::{ClassId, Query};

use super::balance::{Candidate, is_in_share, rendezvous_score};
use super::core::Core;
use super::router::CoreRouter;
use super::snapshot::{Backend, Group, Pool};
use super::spec::{Balance, InstanceState};

/// Tries on a Maglev table, or of dice, before all members are looked at in turn.
const ATTEMPTS: u32 = 8;

/// A canary's share of new sessions, in thousandths.
const CANARY_SHARE: u32 = 50;

/// What is asked of a backend for one message.
pub(super) struct Asked<'a> {
    pub(super) now: u64,
    pub(super) query: &'a Query<'a>,
    pub(super) core: &'a Core,
    /// Illness is overlooked.
    pub(super) panic: bool,
}

/// Why nobody was found, as far as is known.
#[derive(Default)]
pub(super) struct Misses {
    pub(super) full: bool,
    pub(super) incapable: bool,
}
impl CoreRouter {
    pub(super) fn choose(
        &mut self,
        pool: &Pool,
        asked: &Asked<'_>,
        misses: &mut Misses,
    ) -> Option<usize> {
        pool.groups.iter().find_map(|group| self.choose_in(pool, group, asked, misses))
    }

    fn choose_in(
        &mut self,
        pool: &Pool,
        group: &Group,
        asked: &Asked<'_>,
        misses: &mut Misses,
    ) -> Option<usize> {
        match pool.spec.balance {
            Balance::Hash => Self::by_hash(pool, group, asked, misses),
            Balance::LeastLoaded => self.by_load(pool, group, asked, misses),
            Balance::WeightedRandom | Balance::Priority => {
                self.by_chance(pool, group, asked, misses)
            }
            Balance::RoundRobin => self.in_turn(pool, group, asked, misses),
        }
    }

    fn by_hash(
        pool: &Pool,
        group: &Group,
        asked: &Asked<'_>,
        misses: &mut Misses,
    ) -> Option<usize> {
        let key = asked.query.session.stable;
        let bound = pool.spec.bounded_load.map(|percent| load_bound(pool, group, percent));
        let fits = |backend: &Backend| {
            bound.is_none_or(|bound| {
                f64::from(backend.live.in_flight()) < bound * f64::from(backend.spec.weight)
            })
        };
        if let Some(maglev) = &group.maglev {
            for attempt in 0..ATTEMPTS {
                let index = group.members[maglev.pick(key, attempt)?];
                let backend = &pool.backends[index];
                let ramp = backend.live.ramp(asked.now, pool.spec.slow_start)
                    * backend.live.favoured(asked.now)
                    / 1_000;
                if asked.takes(backend, misses)
                    && fits(backend)
                    && is_in_share(key, backend.pin, ramp)
                {
                    return Some(index);
                }
            }
        }
        let mut best: Option<(usize, Candidate)> = None;
        for &index in &group.members {
            let backend = &pool.backends[index];
            if !asked.takes(backend, misses) || !fits(backend) {
                continue;
            }
            let candidate = Candidate::new(key, backend.pin, weight_of(pool, backend, asked.now));
            if best.is_none_or(|(_, best)| candidate.beats(best)) {
                best = Some((index, candidate));
            }
        }
        let best = best.map(|(index, _)| index);
        // Nobody under the bound: the bound evens load out, it refuses nobody.
        best.or_else(|| bound.and_then(|_| Self::by_hash_unbounded(pool, group, asked, misses)))
    }

    fn by_hash_unbounded(
        pool: &Pool,
        group: &Group,
        asked: &Asked<'_>,
        misses: &mut Misses,
    ) -> Option<usize> {
        let key = asked.query.session.stable;
        let score = |index: usize| {
            let backend = &pool.backends[index];
            rendezvous_score(key, backend.pin, weight_of(pool, backend, asked.now))
        };
        asked.takers(pool, group, misses).max_by(|&one, &two| score(one).total_cmp(&score(two)))
    }

    /// Power of two choices.
    fn by_load(
        &mut self,
        pool: &Pool,
        group: &Group,
        asked: &Asked<'_>,
        misses: &mut Misses,
    ) -> Option<usize> {
        let mut picks: [Option<usize>; 2] = [None; 2];
        for _ in 0..ATTEMPTS {
            let index = group.members[self.dice.below(group.members.len().max(1) as u64) as usize];
            if picks[0] != Some(index) && asked.takes(&pool.backends[index], misses) {
                picks[usize::from(picks[0].is_some())] = Some(index);
                if picks[1].is_some() {
                    break;
                }
            }
        }
        let cost = |index: usize| load_cost(pool, &pool.backends[index], asked.now);
        match picks {
            [Some(one), Some(two)] => Some(if cost(two) < cost(one) { two } else { one }),
            // Few are usable: look at them all.
            _ => asked
                .takers(pool, group, misses)
                .min_by(|&one, &two| cost(one).total_cmp(&cost(two))),
        }
    }

    fn by_chance(
        &mut self,
        pool: &Pool,
        group: &Group,
        asked: &Asked<'_>,
        misses: &mut Misses,
    ) -> Option<usize> {
        // One pass: each takes the lead with its share of the weight so far.
        let (mut chosen, mut total) = (None, 0.0);
        for index in asked.takers(pool, group, misses) {
            let backend = &pool.backends[index];
            let weight = weight_of(pool, backend, asked.now);
            total += weight;
            let unit = (self.dice.roll() >> 11) as f64 / (1u64 << 53) as f64;
            if unit * total < weight {
                chosen = Some(index);
            }
        }
        chosen
    }

    /// Smooth weighted round robin: everybody gains its weight, the richest goes and pays the sum.
    fn in_turn(
        &mut self,
        pool: &Pool,
        group: &Group,
        asked: &Asked<'_>,
        misses: &mut Misses,
    ) -> Option<usize> {
        let (mut best, mut total) = (None::<(usize, i64)>, 0);
        for index in asked.takers(pool, group, misses) {
            let backend = &pool.backends[index];
            let weight = (weight_of(pool, backend, asked.now) * 1_000.0) as i64;
            total += weight;
            let credit = self.turns.entry(backend.id).or_insert(0);
            *credit += weight;
            if best.is_none_or(|(_, most)| *credit > most) {
                best = Some((index, *credit));
            }
        }
        let (index, _) = best?;
        *self.turns.entry(pool.backends[index].id).or_insert(0) -= total;
        Some(index)
    }
}

impl Asked<'_> {
    /// The members of a group that may take this new session.
    fn takers<'a>(
        &'a self,
        pool: &'a Pool,
        group: &'a Group,
        misses: &'a mut Misses,
    ) -> impl Iterator<Item = usize> + 'a {
        let members = group.members.iter().copied();
        members.filter(move |&index| self.takes(&pool.backends[index], misses))
    }

    /// Whether the backend may take this new session.
    fn takes(&self, backend: &Backend, misses: &mut Misses) -> bool {
        if !backend.is_open() || !backend.is_linked() || self.query.exclude.contains(&backend.id) {
            return false;
        }
        if !self.panic && !backend.is_well(self.now) {
            return false;
        }
        if !backend.live.can(self.query.capability) {
            misses.incapable = true;
            return false;
        }
        if self.query.awaits
            && self.query.class != ClassId::CONTROL
            && backend.is_full_for_new(self.core.held_by(backend.id))
        {
            misses.full = true;
            return false;
        }
        backend.spec.state != InstanceState::Canary
            || is_in_share(self.query.session.stable, backend.pin, CANARY_SHARE)
    }
}

fn weight_of(pool: &Pool, backend: &Backend, now: u64) -> f64 {
    f64::from(backend.spec.weight)
        * f64::from(backend.live.ramp(now, pool.spec.slow_start))
        * f64::from(backend.live.favoured(now))
        / 1_000_000.0
}

/// (in-flight + 1) x latency / weight.
fn load_cost(pool: &Pool, backend: &Backend, now: u64) -> f64 {
    // One of unknown latency counts as fast, so that it is tried.
    let latency = backend.live.latency_us().max(1_000) as f64;
    f64::from(backend.live.in_flight().saturating_add(1)) * latency
        / weight_of(pool, backend, now).max(0.001)
}

/// What a unit of weight may have in flight under a bounded load.
fn load_bound(pool: &Pool, group: &Group, percent: u16) -> f64 {
    let (mut load, mut weight) = (1.0, 0.0);
    for &index in &group.members {
        let backend = &pool.backends[index];
        if backend.is_open() {
            load += f64::from(backend.live.in_flight());
            weight += f64::from(backend.spec.weight);
        }
    }
    if weight == 0.0 { 0.0 } else { load / weight * f64::from(percent) / 100.0 }
}
