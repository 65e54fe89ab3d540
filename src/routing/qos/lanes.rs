//! Who waits, and who is next. Plain data: no lock, no clock, no backend.
//!
//! A *line* is what one backend serves alone (requests that must go to it) or all of a pool's
//! backends that have a capability serve together. In each line there is a FIFO lane per class:
//! inside a class the budget is the same for all, so arrival order is the order of deadlines. A
//! message that carries a shorter deadline than its class gives goes to a bounded ordered set per tier.
//! Second tries and those that may wait longer than their class do so in a lane of their own beside it,
//! as if their time were the class's: they hold up nobody whom another backend would take.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use strowger_contract::{BackendId, ClassId, PoolId, RouteReason};

use super::desk::Desk;

/// Tiers there are.
pub(in crate::routing) const TIERS: usize = 4;

/// Messages of one tier and line that jump their class's order, at most: an attacker who sends ever
/// shorter deadlines must not have everything sorted. Further ones queue as their class does.
const URGENT_MAX: usize = 4_096;

/// Waiting requests of one lane or set that are looked past because this backend has already failed
/// them. They are retries, of which there are at most a tenth, and stand in lanes of their own.
const LOOK_PAST: usize = 128;

/// Backends that one waiting request may have been tried at.
pub(in crate::routing) const EXCLUDED_MAX: usize = 4;

/// A request that waits.
#[derive(Clone, Debug)]
pub(in crate::routing) struct Waiter {
    pub(in crate::routing) desk: Arc<Desk>,
    pub(in crate::routing) ticket: u64,
    pub(in crate::routing) pool: PoolId,
    pub(in crate::routing) class: ClassId,
    /// The lane that it waits in.
    pub(in crate::routing) lane: u8,
    pub(in crate::routing) tier: u8,
    /// What it is ordered by within its tier: the deadline, but no later than its class gives; or (FIFO) the
    /// arrival.
    pub(in crate::routing) order: u64,
    /// Microseconds of the core's clock, as the rest.
    pub(in crate::routing) deadline: u64,
    pub(in crate::routing) since: u64,
    /// How long it was thought to wait.
    pub(in crate::routing) predicted: u64,
    /// The backend that it must go to, if it must.
    pub(in crate::routing) backend: Option<BackendId>,
    pub(in crate::routing) capability: u32,
    pub(in crate::routing) exclude: [BackendId; EXCLUDED_MAX],
    pub(in crate::routing) excluded: u8,
    pub(in crate::routing) reason: RouteReason,
    /// A second try, or one that may wait longer than its class: it stands in the lane beside its own.
    pub(in crate::routing) aside: bool,
    /// It stands in a set by its order; set by [`Lanes::push`].
    pub(in crate::routing) urgent: bool,
}

impl Waiter {
    /// The place of its lane in a line.
    fn lane_index(&self) -> usize {
        usize::from(self.lane) * 2 + usize::from(self.aside)
    }

    pub(in crate::routing) fn excludes(&self, backend: BackendId) -> bool {
        self.exclude[..usize::from(self.excluded)].contains(&backend)
    }
}

/// Names one waiting request, until it is taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::routing) struct Place {
    slot: u32,
    generation: u32,
}

#[derive(Debug, Default)]
struct Lane {
    tier: u8,
    /// Ordered; those that were withdrawn are still in it until they come to its head.
    queue: VecDeque<(u64, Place)>,
    live: u32,
}

#[derive(Debug, Default)]
struct Line {
    lanes: Vec<Lane>,
    /// Lanes with somebody in them, by bit.
    busy: u128,
    urgent: [BTreeSet<(u64, Place)>; TIERS],
}

/// Who is next, and how it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    tier: u8,
    order: u64,
    place: Place,
}

/// All that wait for one pool.
#[derive(Debug, Default)]
pub(in crate::routing) struct Lanes {
    slots: Vec<(u32, Option<Waiter>)>,
    free: Vec<u32>,
    common: Vec<(u32, Line)>,
    pinned: HashMap<BackendId, Line>,
    len: usize,
    classes: Vec<u32>,
    tiers: [u32; TIERS],
    /// Credits of classes with a minimum share.
    credits: Vec<u32>,
    /// Those whose deadline is not what they are ordered by, by it.
    later: BTreeSet<(u64, Place)>,
    /// Sets that were full.
    pub(in crate::routing) urgent_full: u64,
}

impl Lanes {
    pub(in crate::routing) fn len(&self) -> usize {
        self.len
    }

    pub(in crate::routing) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many of each tier wait.
    pub(in crate::routing) fn of_tiers(&self) -> [u32; TIERS] {
        self.tiers
    }

    /// How many of a class wait.
    pub(in crate::routing) fn of_class(&self, class: ClassId) -> u32 {
        self.classes.get(usize::from(class.0)).copied().unwrap_or(0)
    }

    pub(in crate::routing) fn push(&mut self, waiter: Waiter) -> Place {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push((0, None));
            (self.slots.len() - 1) as u32
        });
        let entry = &mut self.slots[slot as usize];
        entry.0 = entry.0.wrapping_add(1);
        let place = Place { slot, generation: entry.0 };
        let class = usize::from(waiter.class.0);
        if self.classes.len() <= class {
            self.classes.resize(class + 1, 0);
        }
        self.classes[class] += 1;
        let tier = usize::from(waiter.tier).min(TIERS - 1);
        self.tiers[tier] += 1;
        self.len += 1;
        let line = match waiter.backend {
            Some(backend) => self.pinned.entry(backend).or_default(),
            None => {
                let known = self.common.iter().position(|(known, _)| *known == waiter.capability);
                let index = known.unwrap_or_else(|| {
                    self.common.push((waiter.capability, Line::default()));
                    self.common.len() - 1
                });
                &mut self.common[index].1
            }
        };
        let (urgent, fitted) = line.push(waiter.lane_index(), waiter.tier, waiter.order, place);
        self.urgent_full += u64::from(!fitted);
        if waiter.aside {
            self.later.insert((waiter.deadline, place));
        }
        self.slots[slot as usize].1 = Some(Waiter { urgent, ..waiter });
        place
    }

    /// Takes one out, if it still waits. Its place in the line is cleared when it comes up.
    pub(in crate::routing) fn remove(&mut self, place: Place) -> Option<Waiter> {
        let entry = self.slots.get_mut(place.slot as usize)?;
        if entry.0 != place.generation {
            return None;
        }
        let waiter = entry.1.take()?;
        self.free.push(place.slot);
        self.classes[usize::from(waiter.class.0)] -= 1;
        self.tiers[usize::from(waiter.tier).min(TIERS - 1)] -= 1;
        self.len -= 1;
        if waiter.aside {
            self.later.remove(&(waiter.deadline, place));
        }
        let line = match waiter.backend {
            Some(backend) => self.pinned.get_mut(&backend),
            None => self
                .common
                .iter_mut()
                .find(|(known, _)| *known == waiter.capability)
                .map(|(_, line)| line),
        };
        let index = waiter.lane_index();
        if let Some(line) = line
            && let Some(lane) = line.lanes.get_mut(index)
        {
            lane.live -= u32::from(!waiter.urgent);
            if waiter.urgent {
                let tier = usize::from(waiter.tier).min(TIERS - 1);
                line.urgent[tier].remove(&(waiter.order, place));
            }
            let slots = &self.slots;
            line.clean(index, |place| is_live(slots, place));
        }
        if self.len == 0 {
            self.reset();
        }
        Some(waiter)
    }

    /// Takes out all for whom `stays` does not hold.
    pub(in crate::routing) fn take_unless(
        &mut self,
        mut stays: impl FnMut(&Waiter) -> bool,
    ) -> Vec<Waiter> {
        let leave = self.slots.iter().enumerate().filter_map(|(slot, (generation, waiter))| {
            let leaves = waiter.as_ref().is_some_and(|waiter| !stays(waiter));
            leaves.then_some(Place { slot: slot as u32, generation: *generation })
        });
        let places: Vec<Place> = leave.collect();
        places.into_iter().filter_map(|place| self.remove(place)).collect()
    }

    /// Nobody waits: what withdrawn ones left is cleared, and lines of backends that may be gone.
    fn reset(&mut self) {
        const LINES_KEPT: usize = 256;
        for line in self.common.iter_mut().map(|(_, line)| line).chain(self.pinned.values_mut()) {
            line.busy = 0;
            line.urgent.iter_mut().for_each(BTreeSet::clear);
            for lane in &mut line.lanes {
                lane.queue.clear();
                lane.live = 0;
            }
        }
        self.later.clear();
        if self.pinned.len() > LINES_KEPT {
            self.pinned.clear();
        }
        if self.common.len() > LINES_KEPT {
            self.common.clear();
        }
    }

    /// Who is next at `backend`; it is taken out. `open`: it may take requests that any backend may
    /// take. `shares`: the least percentage of grants for each class.
    pub(in crate::routing) fn next(
        &mut self,
        backend: BackendId,
        open: bool,
        can: impl Fn(u32) -> bool,
        shares: &[u8],
    ) -> Option<(Waiter, bool)> {
        if self.is_empty() {
            return None;
        }
        let slots = &self.slots;
        let mut best: Option<Candidate> = None;
        // Classes that a minimum share is kept for, and their best.
        let mut owed: Option<Candidate> = None;
        let credits = &self.credits;
        let mut look = |line: &mut Line| {
            line.candidates(backend, slots, |lane, candidate| {
                if best.is_none_or(|best| candidate < best) {
                    best = Some(candidate);
                }
                let is_owed = credits.get(lane).is_some_and(|credit| *credit >= 100);
                if is_owed && owed.is_none_or(|owed| candidate < owed) {
                    owed = Some(candidate);
                }
            });
        };
        if let Some(line) = self.pinned.get_mut(&backend) {
            look(line);
        }
        if open {
            self.common
                .iter_mut()
                .filter(|(capability, _)| can(*capability))
                .for_each(|(_, line)| look(line));
        }
        let best = best?;
        let first_is_emergency = self.slots[best.place.slot as usize]
            .1
            .as_ref()
            .is_some_and(|waiter| waiter.class == ClassId::EMERGENCY);
        let owed = owed.filter(|owed| !first_is_emergency && *owed != best);
        let inverted = owed.is_some_and(|owed| owed.tier > best.tier);
        let chosen = owed.unwrap_or(best);
        let waiter = self.remove(chosen.place)?;
        self.pay(&waiter, shares);
        Some((waiter, inverted))
    }

    /// Each grant earns every waiting class its minimum share; a hundred buy a turn.
    fn pay(&mut self, granted: &Waiter, shares: &[u8]) {
        const CREDIT_MAX: u32 = 400;
        if shares.iter().all(|&share| share == 0) {
            return;
        }
        self.credits.resize(shares.len(), 0);
        for (class, &share) in shares.iter().enumerate() {
            let waits = self.classes.get(class).is_some_and(|&waiting| waiting > 0);
            let mine = usize::from(granted.class.0) == class;
            let credit = &mut self.credits[class];
            if waits || mine {
                *credit = (*credit + u32::from(share)).min(CREDIT_MAX);
            } else {
                *credit = 0;
            }
            if mine {
                *credit = credit.saturating_sub(100);
            }
        }
    }

    /// Takes out one whose time is up: it is among the heads, or waits aside.
    pub(in crate::routing) fn expired(&mut self, latest: u64) -> Option<Waiter> {
        if let Some(&(deadline, place)) = self.later.first()
            && deadline < latest
        {
            return self.remove(place);
        }
        let slots = &self.slots;
        let late = |place: Place| {
            slots[place.slot as usize].1.as_ref().is_some_and(|waiter| waiter.deadline < latest)
        };
        let lines = self.common.iter_mut().map(|(_, line)| line).chain(self.pinned.values_mut());
        let mut found = None;
        for line in lines {
            line.heads(slots, |place| {
                if found.is_none() && late(place) {
                    found = Some(place);
                }
            });
            if found.is_some() {
                break;
            }
        }
        self.remove(found?)
    }

    /// The earliest deadline of all heads.
    pub(in crate::routing) fn soonest(&mut self) -> Option<u64> {
        let mut soonest = self.later.first().map(|(deadline, _)| *deadline);
        let slots = &self.slots;
        for line in self.common.iter_mut().map(|(_, line)| line).chain(self.pinned.values_mut()) {
            line.heads(slots, |place| {
                let deadline = slots[place.slot as usize].1.as_ref().map(|waiter| waiter.deadline);
                soonest = soonest.into_iter().chain(deadline).min();
            });
        }
        soonest
    }

    /// How many would go before a request of that tier and order: (of those that any backend takes,
    /// of those that only `backend` takes). Other backends' own lines are left out of the second,
    /// and stand in the first when no backend is given.
    pub(in crate::routing) fn ahead(
        &self,
        tier: u8,
        order: u64,
        backend: Option<BackendId>,
    ) -> (u32, u32) {
        let common = self.common.iter().map(|(_, line)| line.ahead(tier, order)).sum();
        match backend {
            Some(backend) => {
                let own = self.pinned.get(&backend).map_or(0, |line| line.ahead(tier, order));
                (common, own)
            }
            None => {
                (common + self.pinned.values().map(|line| line.ahead(tier, order)).sum::<u32>(), 0)
            }
        }
    }
}

fn is_live(slots: &[(u32, Option<Waiter>)], place: Place) -> bool {
    slots
        .get(place.slot as usize)
        .is_some_and(|(generation, waiter)| *generation == place.generation && waiter.is_some())
}

impl Line {
    /// Whether it stands in a set, and whether all is as it should be: the set may be full.
    fn push(&mut self, lane: usize, tier: u8, order: u64, place: Place) -> (bool, bool) {
        if self.lanes.len() <= lane {
            self.lanes.resize_with(lane + 1, Lane::default);
        }
        let last = self.lanes[lane].queue.back().map_or(0, |(order, _)| *order);
        let urgent = order < last;
        let set = &mut self.urgent[usize::from(tier).min(TIERS - 1)];
        if urgent && set.len() < URGENT_MAX {
            set.insert((order, place));
            return (true, true);
        }
        let lane_of_it = &mut self.lanes[lane];
        lane_of_it.tier = tier;
        lane_of_it.live += 1;
        lane_of_it.queue.push_back((order.max(last), place));
        self.busy |= 1 << lane;
        (false, !urgent)
    }

    /// Clears the withdrawn from a lane's head.
    fn clean(&mut self, lane: usize, live: impl Fn(Place) -> bool) {
        let queue = &mut self.lanes[lane].queue;
        while queue.front().is_some_and(|(_, place)| !live(*place)) {
            queue.pop_front();
        }
        if queue.is_empty() {
            self.busy &= !(1 << lane);
        }
    }

    fn heads(&mut self, slots: &[(u32, Option<Waiter>)], mut each: impl FnMut(Place)) {
        let mut busy = self.busy;
        while busy != 0 {
            let lane = busy.trailing_zeros() as usize;
            busy &= busy - 1;
            self.clean(lane, |place| is_live(slots, place));
            if let Some((_, place)) = self.lanes[lane].queue.front() {
                each(*place);
            }
        }
        for (_, place) in self.urgent.iter().filter_map(BTreeSet::first) {
            each(*place);
        }
    }

    /// Each lane's first that `backend` has not failed, and each set's; with the class's lane.
    fn candidates(
        &mut self,
        backend: BackendId,
        slots: &[(u32, Option<Waiter>)],
        mut each: impl FnMut(usize, Candidate),
    ) {
        let suits = |place: Place| {
            let waiter = slots[place.slot as usize].1.as_ref();
            is_live(slots, place) && waiter.is_some_and(|waiter| !waiter.excludes(backend))
        };
        let mut busy = self.busy;
        while busy != 0 {
            let index = busy.trailing_zeros() as usize;
            busy &= busy - 1;
            self.clean(index, |place| is_live(slots, place));
            let lane = &self.lanes[index];
            let first = lane.queue.iter().take(LOOK_PAST).find(|(_, place)| suits(*place));
            if let Some(&(order, place)) = first {
                each(index / 2, Candidate { tier: lane.tier, order, place });
            }
        }
        for (tier, set) in self.urgent.iter().enumerate() {
            let first = set.iter().take(LOOK_PAST).find(|(_, place)| suits(*place));
            if let Some(&(order, place)) = first {
                let lane = slots[place.slot as usize].1.as_ref().map_or(0, |waiter| waiter.lane);
                each(usize::from(lane), Candidate { tier: tier as u8, order, place });
            }
        }
    }

    fn ahead(&self, tier: u8, order: u64) -> u32 {
        let mut ahead = 0;
        for lane in self.lanes.iter().filter(|lane| lane.live > 0) {
            if lane.tier < tier {
                ahead += lane.live;
            } else if lane.tier == tier {
                let before = lane.queue.partition_point(|(other, _)| *other <= order);
                // The withdrawn stand in the queue, spread evenly as far as one knows.
                let share = before as u64 * u64::from(lane.live) / lane.queue.len().max(1) as u64;
                ahead += share as u32;
            }
        }
        let sets = self.urgent.iter().take(usize::from(tier) + 1);
        ahead + sets.map(|set| set.len() as u32).sum::<u32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiter(class: u8, tier: u8, order: u64) -> Waiter {
        Waiter {
            desk: Arc::default(),
            ticket: order,
            pool: PoolId(0),
            class: ClassId(class),
            lane: class,
            tier,
            order,
            deadline: order,
            since: 0,
            predicted: 0,
            backend: None,
            capability: 0,
            exclude: [BackendId(0); EXCLUDED_MAX],
            excluded: 0,
            reason: RouteReason::Balanced,
            aside: false,
            urgent: false,
        }
    }

    fn order(lanes: &mut Lanes, shares: &[u8]) -> Vec<(u8, u64)> {
        std::iter::from_fn(|| lanes.next(BackendId(1), true, |_| true, shares))
            .map(|(waiter, _)| (waiter.class.0, waiter.order))
            .collect()
    }

    #[test]
    fn tier_first_then_the_earliest_deadline_among_the_heads() {
        let mut lanes = Lanes::default();
        for (class, tier, at) in
            [(5, 3, 10), (3, 1, 20), (2, 0, 200), (1, 0, 150), (2, 0, 210), (1, 0, 300), (3, 1, 25)]
        {
            lanes.push(waiter(class, tier, at));
        }
        // A carried deadline that is shorter than its class's order.
        lanes.push(waiter(2, 0, 100));
        assert_eq!(lanes.ahead(0, 205, None), (3, 0));
        assert_eq!(
            order(&mut lanes, &[]),
            [(2, 100), (1, 150), (2, 200), (2, 210), (1, 300), (3, 20), (3, 25), (5, 10)]
        );
        assert!(lanes.is_empty() && lanes.soonest().is_none());
    }

    #[test]
    fn the_withdrawn_are_never_next_and_count_for_nothing() {
        let mut lanes = Lanes::default();
        let places: Vec<Place> = (0..100).map(|index| lanes.push(waiter(3, 1, index))).collect();
        for place in places.iter().step_by(2) {
            assert!(lanes.remove(*place).is_some());
            assert!(lanes.remove(*place).is_none(), "once");
        }
        assert_eq!((lanes.len(), lanes.ahead(2, 0, None)), (50, (50, 0)));
        assert_eq!(lanes.of_class(ClassId(3)), 50);
        let served = order(&mut lanes, &[]);
        assert!(served.iter().all(|(_, order)| order % 2 == 1) && served.len() == 50);
    }

    #[test]
    fn a_line_of_its_own_for_each_backend_and_nobody_goes_where_it_failed() {
        let mut lanes = Lanes::default();
        lanes.push(Waiter { backend: Some(BackendId(2)), ..waiter(2, 0, 1) });
        let tried = [BackendId(1), BackendId(0), BackendId(0), BackendId(0)];
        lanes.push(Waiter { exclude: tried, excluded: 1, ..waiter(3, 1, 2) });
        lanes.push(Waiter { capability: 4, ..waiter(3, 1, 3) });
        let mut next = |backend: u32, capability: u32| {
            let can = |wanted: u32| wanted == 0 || wanted == capability;
            lanes.next(BackendId(backend), true, can, &[]).map(|(waiter, _)| waiter.order)
        };
        assert_eq!(next(1, 0), None, "one pinned elsewhere, one excluded, one not able");
        assert_eq!(next(1, 4), Some(3));
        assert_eq!(next(2, 0), Some(1));
        assert_eq!(next(2, 0), Some(2));
    }

    #[test]
    fn a_fail_over_holds_nobody_up() {
        let first_failed = [BackendId(1), BackendId(0), BackendId(0), BackendId(0)];
        let again = |class, order, deadline| Waiter {
            exclude: first_failed,
            excluded: 1,
            aside: true,
            deadline,
            ..waiter(class, 1, order)
        };
        let mut lanes = Lanes::default();
        // Many that the first backend has failed; they may wait for long.
        for index in 0..500 {
            lanes.push(again(3, 100 + index, 32_000_000 + index));
        }
        // One that carries a short deadline and was failed there too, and one behind it.
        lanes.push(waiter(3, 1, 9_000));
        lanes.push(Waiter { aside: false, ..again(3, 50, 50) });
        lanes.push(waiter(3, 1, 60));
        // Those that come later are no urgent ones.
        for index in 0..5_000 {
            lanes.push(waiter(3, 1, 10_000 + index));
        }
        assert_eq!(lanes.urgent_full, 0);
        assert_eq!(lanes.ahead(1, 20_000, None), (5_503, 0));
        let mut next = |backend| {
            let next = lanes.next(BackendId(backend), true, |_| true, &[]);
            next.map(|(waiter, _)| waiter.order)
        };
        assert_eq!(next(1), Some(60), "behind the urgent one that it failed");
        assert_eq!(next(1), Some(9_000));
        assert_eq!(next(1), Some(10_000), "past all that it failed");
        assert_eq!(next(2), Some(50));
        assert_eq!(next(2), Some(100), "in the order of their class");
        assert_eq!(lanes.len(), 499 + 4_999);
    }

    #[test]
    fn who_waits_aside_is_late_by_its_own_deadline() {
        let mut lanes = Lanes::default();
        for (order, deadline) in [(10, 900), (20, 300), (30, 600)] {
            lanes.push(Waiter { aside: true, deadline, ..waiter(3, 1, order) });
        }
        lanes.push(waiter(3, 1, 400));
        let mut expired = |latest| lanes.expired(latest).map(|waiter| waiter.deadline);
        assert_eq!((expired(300), expired(301), expired(301)), (None, Some(300), None));
        assert_eq!((expired(601), expired(601), expired(601)), (Some(600), Some(400), None));
        assert_eq!((lanes.soonest(), lanes.len()), (Some(900), 1));
    }

    #[test]
    fn a_minimum_share_is_kept() {
        let mut lanes = Lanes::default();
        for index in 0..1_000 {
            lanes.push(waiter(2, 0, index));
            lanes.push(waiter(5, 3, index));
        }
        let mut shares = [0; 6];
        shares[5] = 10;
        let served = order(&mut lanes, &shares);
        let bulk = served[..500].iter().filter(|(class, _)| *class == 5).count();
        assert!((45..=55).contains(&bulk), "{bulk} of 500");
    }

    #[test]
    fn a_flood_of_short_deadlines_is_bounded() {
        let mut lanes = Lanes::default();
        for index in 0..10_000 {
            lanes.push(waiter(3, 1, 1_000_000 - index));
        }
        assert_eq!(lanes.urgent_full as usize, 10_000 - 1 - URGENT_MAX);
        assert_eq!(order(&mut lanes, &[]).len(), 10_000);
    }
}
