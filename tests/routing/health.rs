//! Panic rule, outlier detection, capacity, priorities.

use std::collections::HashSet;
use std::time::Duration;

use proptest::prelude::*;
use strowger::routing::{Balance, Grant};
use strowger_contract::{Outcome, Refusal, RouteReason, Router, Verdict};

use crate::support::{POOL, World, backends, pin, plain};

fn any_balance() -> impl Strategy<Value = Balance> {
    prop_oneof![
        Just(Balance::Hash),
        Just(Balance::LeastLoaded),
        Just(Balance::WeightedRandom),
        Just(Balance::RoundRobin),
        Just(Balance::Priority),
    ]
}

#[derive(Clone, Copy, Debug)]
enum End {
    Answered,
    Refused,
    TimedOut,
    Lost,
    Abandoned,
}

fn end() -> impl Strategy<Value = End> {
    prop_oneof![
        2 => Just(End::Answered),
        2 => Just(End::Refused),
        2 => Just(End::TimedOut),
        1 => Just(End::Lost),
        3 => Just(End::Abandoned),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Under the percentage load is spread over all; above it only over the well.
    #[test]
    fn panic_spreads_load_over_all(count in 1usize..9, ill in 0usize..9, percent in 0u8..101, balance in any_balance()) {
        let ill = ill.min(count);
        let mut pool = plain(backends(count));
        (pool.panic_percent, pool.balance) = (percent, balance);
        let mut world = World::new(&pool);
        for number in 0..ill {
            let id = world.id(pin(number));
            world.core.probe_result(world.now(), id, false, "test");
        }
        world.tick();
        let well = count - ill;
        let panic = ill > 0 && well * 100 < count * usize::from(percent);
        prop_assert_eq!(world.view().panic, panic);
        let mut seen = HashSet::new();
        for number in 0..600 {
            match world.ask(number, None, false, false) {
                Verdict::Go(route) => {
                    let at = (0..count).find(|&at| pin(at) == route.pin).expect("ours");
                    seen.insert(at);
                    prop_assert_eq!(route.reason == RouteReason::Panic, at < ill);
                }
                Verdict::Refuse(Refusal::NoBackend) => prop_assert!(well == 0 && percent == 0),
                other => prop_assert!(false, "{:?}", other),
            }
        }
        let expected: HashSet<usize> = if panic { (0..count).collect() } else { (ill..count).collect() };
        prop_assert_eq!(seen, expected);
    }

    /// So many faults of its own in a row eject; an answer between them starts anew; what is not its
    /// fault counts for nothing.
    #[test]
    fn only_its_own_faults_in_a_row_eject(limit in 1u32..6, ends in prop::collection::vec(end(), 1..40)) {
        let mut pool = plain(backends(2));
        pool.health.outlier_faults = limit;
        pool.health.outlier_max_percent = 50;
        let mut world = World::new(&pool);
        let (mut row, mut ejected) = (0, false);
        for end in ends {
            let Verdict::Go(route) = world.ask(1, Some(pin(0)), true, true) else { panic!("pinned") };
            let outcome = match end {
                End::Answered => Outcome::Answered { latency: Duration::from_millis(3) },
                End::Refused => Outcome::Refused,
                End::TimedOut => Outcome::TimedOut,
                End::Lost => Outcome::Lost,
                End::Abandoned => Outcome::Abandoned,
            };
            match end {
                End::Answered => row = 0,
                End::Abandoned => {}
                _ => row += 1,
            }
            ejected |= row >= limit;
            let now = world.now();
            world.router.outcome(now, route.backend, outcome);
            let health = world.view().backends[0].health;
            prop_assert_eq!(health == "ejected", ejected, "{}", health);
            if ejected {
                prop_assert!((0..100).all(|number| world.place(number).is_some_and(|route| route.pin == pin(1))));
                break;
            }
        }
        if ejected {
            world.pass(10_000);
            prop_assert_ne!(world.view().backends[0].health, "ejected");
        }
        prop_assert!(world.view().backends.iter().all(|backend| backend.in_flight == 0));
    }

    /// However bad all are, only so many are out at a time.
    #[test]
    fn ejections_are_bounded(count in 1usize..10, percent in 0u8..101) {
        let mut pool = plain(backends(count));
        pool.health.outlier_faults = 2;
        pool.health.outlier_max_percent = percent;
        let mut world = World::new(&pool);
        for round in 0..4 {
            for number in 0..count {
                let Verdict::Go(route) = world.ask(round, Some(pin(number)), true, true) else { panic!("pinned") };
                let now = world.now();
                world.router.outcome(now, route.backend, Outcome::TimedOut);
            }
        }
        let out = world.view().backends.iter().filter(|backend| backend.health == "ejected").count();
        prop_assert_eq!(out, (count * usize::from(percent) / 100).max(1));
    }

    /// A group is used only when no better one has a usable backend, in every mode.
    #[test]
    fn the_first_group_that_can_is_used(priorities in prop::collection::vec(0u16..4, 1..9), ill in prop::collection::vec(any::<bool>(), 9), drained in prop::collection::vec(any::<bool>(), 9), balance in any_balance()) {
        let mut pool = plain(backends(priorities.len()));
        pool.balance = balance;
        for (spec, &priority) in pool.backends.iter_mut().zip(&priorities) {
            spec.priority = priority;
        }
        let mut world = World::new(&pool);
        for number in 0..priorities.len() {
            let id = world.id(pin(number));
            if ill[number] {
                world.core.probe_result(world.now(), id, false, "test");
            }
            if drained[number] {
                world.core.drain(world.now(), "calls", &format!("b{number}"), None).expect("there");
            }
        }
        let usable = |number: &usize| !ill[*number] && !drained[*number];
        let best = (0..priorities.len()).filter(usable).map(|number| priorities[number]).min();
        for number in 0..60 {
            let at = world.place(number).map(|route| {
                (0..priorities.len()).find(|&at| pin(at) == route.pin).expect("ours")
            });
            prop_assert_eq!(at.map(|at| priorities[at]), best);
            prop_assert!(at.is_none_or(|at| usable(&at)));
        }
    }

    /// Slots are never oversold, and who finds none waits.
    #[test]
    fn capacity_is_kept(capacities in prop::collection::vec(0u32..5, 1..6), balance in any_balance()) {
        let mut pool = plain(backends(capacities.len()));
        pool.balance = balance;
        pool.panic_percent = 50;
        for (spec, &capacity) in pool.backends.iter_mut().zip(&capacities) {
            spec.capacity = Some(capacity);
        }
        let mut world = World::new(&pool);
        let mut flown = Vec::new();
        for number in 0..u64::from(capacities.iter().sum::<u32>()) {
            let verdict = world.ask(number, None, false, true);
            let Verdict::Go(route) = verdict else { panic!("{verdict:?}") };
            flown.push(route.backend);
        }
        let full = world.ask(1_000, None, false, true);
        match full {
            Verdict::Wait(ticket) => world.router.withdraw(world.now(), ticket),
            verdict => prop_assert!(false, "{:?}", verdict),
        }
        for (view, &capacity) in world.view().backends.iter().zip(&capacities) {
            prop_assert_eq!(view.in_flight, capacity);
        }
        for backend in flown {
            let now = world.now();
            world.router.outcome(now, backend, Outcome::Abandoned);
        }
        prop_assert!(world.view().backends.iter().all(|backend| backend.in_flight == 0));
    }
}

#[test]
fn a_lost_engine_gives_back_what_it_had_in_flight() {
    let mut world = World::new(&plain(backends(2)));
    for number in 0..20 {
        assert!(matches!(world.ask(number, None, false, true), Verdict::Go(_)));
    }
    let now = world.now();
    world.router.abandon_all(now);
    assert!(world.view().backends.iter().all(|backend| backend.in_flight == 0));
}

#[test]
fn a_backend_whose_agent_says_full_gets_no_more_until_it_says_otherwise() {
    let mut world = World::new(&plain(backends(1)));
    let ask = |world: &mut World, number| {
        let query = world.query(number, Duration::from_millis(500));
        world.route(&query)
    };
    for number in 0..4 {
        assert!(matches!(ask(&mut world, number), Verdict::Go(_)));
    }
    world.core.set_load(POOL, "b0", Some(100));
    let Verdict::Wait(waiting) = ask(&mut world, 4) else { panic!("it is full") };
    // One ends, and makes room for one.
    let (now, id) = (world.now(), world.router.resolve(pin(0)).expect("b0"));
    let latency = Duration::from_millis(5);
    world.router.outcome(now, id, Outcome::Answered { latency });
    let mut grants = Vec::new();
    world.router.grants(now, &mut grants);
    assert!(matches!(grants[..], [Grant::Go(ticket, _)] if ticket == waiting), "{grants:?}");
    // With room again, who waits goes without an end of anything.
    let Verdict::Wait(waiting) = ask(&mut world, 5) else { panic!("it is full") };
    world.core.set_load(POOL, "b0", Some(50));
    world.core.tick(now);
    grants.clear();
    world.router.grants(now, &mut grants);
    assert!(matches!(grants[..], [Grant::Go(ticket, _)] if ticket == waiting), "{grants:?}");
    assert!(matches!(ask(&mut world, 6), Verdict::Go(_)));
}
