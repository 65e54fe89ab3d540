//! Where a new session goes, by the published formulas and by weight.

use proptest::prelude::*;
use strowger::routing::{Balance, MAGLEV_FROM, Maglev, rendezvous_score};
use strowger_contract::{Pin, Router};

use crate::support::{World, backends, pin, plain, share, without};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Each mode shares new sessions out by weight.
    #[test]
    fn shares_follow_weights(weights in prop::collection::vec(1u32..10, 2..6)) {
        let total: u32 = weights.iter().sum();
        for balance in [Balance::Hash, Balance::WeightedRandom, Balance::RoundRobin, Balance::Priority] {
            let mut pool = plain(backends(weights.len()));
            pool.balance = balance;
            for (spec, &weight) in pool.backends.iter_mut().zip(&weights) {
                spec.weight = weight;
            }
            let mut world = World::new(&pool);
            let places = world.places(6_000);
            for (number, &weight) in weights.iter().enumerate() {
                let (got, expected) = (share(&places, pin(number)), f64::from(weight) / f64::from(total));
                prop_assert!((got - expected).abs() < 0.035, "{:?}: {} for {}", balance, got, expected);
            }
        }
    }

    /// The busier and the slower get less.
    #[test]
    fn the_least_loaded_of_two_gets_it(busy in 1u64..50) {
        let mut pool = plain(backends(2));
        pool.balance = Balance::LeastLoaded;
        let mut world = World::new(&pool);
        for number in 0..busy {
            let flown = world.ask(number, Some(pin(0)), true, true);
            prop_assert!(matches!(flown, strowger_contract::Verdict::Go(_)));
        }
        prop_assert!(world.places(100).iter().all(|place| *place == Some(pin(1))));
    }
}

/// What the formulas say, of pools just under and at the size where the table takes over.
#[test]
fn small_pools_go_by_rendezvous_and_large_ones_by_maglev() {
    for count in [MAGLEV_FROM - 1, MAGLEV_FROM] {
        let mut pool = plain(backends(count));
        for (number, spec) in pool.backends.iter_mut().enumerate() {
            spec.weight = 50 + number as u32 % 3;
        }
        let mut world = World::new(&pool);
        let table = Maglev::new(
            &pool
                .backends
                .iter()
                .enumerate()
                .map(|(number, spec)| (pin(number), spec.weight))
                .collect::<Vec<_>>(),
        );
        for number in 0..300u64 {
            let key = world.router.keyer().session(1, &number.to_le_bytes()).stable;
            let score = |number: usize| {
                rendezvous_score(key, pin(number), f64::from(pool.backends[number].weight))
            };
            let expected: Pin = if count < MAGLEV_FROM {
                pin((0..count)
                    .max_by(|&one, &two| score(one).total_cmp(&score(two)))
                    .expect("some"))
            } else {
                pin(table.pick(key, 0).expect("some"))
            };
            assert_eq!(world.place(number).map(|route| route.pin), Some(expected), "of {count}");
        }
    }
}

#[test]
fn a_large_pool_moves_little_more_than_the_share_of_the_removed() {
    let pool = plain(backends(320));
    let mut world = World::new(&pool);
    let before = world.places(8_000);
    world.apply(&without(&pool, "b7"));
    world.tick();
    let after = world.places(8_000);
    assert!(!after.contains(&Some(pin(7))) && !after.contains(&None));
    let moved = before
        .iter()
        .zip(&after)
        .filter(|(before, after)| before != after && **before != Some(pin(7)))
        .count();
    assert!(moved < 8_000 / 50, "{moved} of 8,000 moved though their backend stayed");
}

#[test]
fn a_bounded_load_is_kept_and_refuses_nobody() {
    let mut pool = plain(backends(4));
    pool.bounded_load = Some(125);
    let mut world = World::new(&pool);
    for _ in 0..400 {
        // One session key that everybody has.
        assert!(matches!(world.ask(1, None, false, true), strowger_contract::Verdict::Go(_)));
    }
    for view in world.view().backends {
        assert!(view.in_flight <= 126, "{} of 400 in 4", view.in_flight);
    }
}
