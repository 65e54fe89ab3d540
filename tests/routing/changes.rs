//! What a change of the pool does to sessions.

use std::collections::HashMap;
use std::time::Duration;

use proptest::prelude::*;
use strowger::routing::Happening;
use strowger_contract::{Outcome, Pin, Refusal, RouteReason, Router, TokenKeys, Verdict};

use crate::support::{World, address, backend, backends, pin, plain, share, without};

const BACKENDS: usize = 5;
const DEBOUNCE: u64 = 2_000;

#[derive(Clone, Debug)]
enum Op {
    Add(usize),
    Remove(usize),
    Weight(usize, u32),
    Drain(usize, u64),
    Undrain(usize),
    Probe(usize, bool),
    New,
    Message(usize),
    End(usize),
    Pass(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let one = 0..BACKENDS;
    prop_oneof![
        one.clone().prop_map(Op::Add),
        one.clone().prop_map(Op::Remove),
        (one.clone(), prop_oneof![Just(0u32), 1u32..200])
            .prop_map(|(one, weight)| Op::Weight(one, weight)),
        (one.clone(), 0u64..5_000).prop_map(|(one, deadline)| Op::Drain(one, deadline)),
        one.clone().prop_map(Op::Undrain),
        (one, any::<bool>()).prop_map(|(one, well)| Op::Probe(one, well)),
        Just(Op::New),
        Just(Op::New),
        any::<usize>().prop_map(Op::Message),
        any::<usize>().prop_map(Op::Message),
        any::<usize>().prop_map(Op::End),
        (1u64..30).prop_map(|ticks| Op::Pass(ticks * 100)),
    ]
}

/// What is said of a backend, in the plainest way.
#[derive(Clone, Debug, Default)]
struct Shadow {
    wanted: bool,
    left: Option<u64>,
    weight: u32,
    drain_until: Option<u64>,
    drained: bool,
    down: bool,
}

impl Shadow {
    fn is_there(&self) -> bool {
        (self.wanted || self.left.is_some()) && !self.drained
    }

    fn is_open(&self) -> bool {
        self.wanted && !self.drained && self.drain_until.is_none() && self.weight > 0
    }
}

#[derive(Default)]
struct Model {
    backends: Vec<Shadow>,
    sessions: HashMap<u64, usize>,
}

impl Model {
    fn tick(&mut self, now: u64) {
        for (number, shadow) in self.backends.iter_mut().enumerate() {
            let held = self.sessions.values().filter(|&&at| at == number).count();
            let present = shadow.wanted || shadow.left.is_some();
            if let Some(until) = shadow.drain_until
                && present
                && (held == 0 || now >= until)
            {
                shadow.drained = true;
            }
            if shadow.left.is_some_and(|left| now >= left + DEBOUNCE) {
                *shadow = Shadow { down: shadow.down, ..Shadow::default() };
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    /// The whole of it against the shadow: who has a session keeps it, whatever is added, weighted,
    /// removed for a moment or drained, until it is gone; and nobody gets a new one that may not.
    #[test]
    fn sessions_stay_and_new_ones_go_where_they_may(ops in prop::collection::vec(op(), 1..120)) {
        let mut pool = plain(backends(3));
        pool.debounce = Duration::from_millis(DEBOUNCE);
        let mut world = World::new(&pool);
        let mut model = Model { backends: vec![Shadow::default(); BACKENDS], ..Model::default() };
        for shadow in &mut model.backends[..3] {
            (shadow.wanted, shadow.weight) = (true, 100);
        }
        let mut next = 0;
        for op in ops {
            match op {
                Op::Add(number) if !model.backends[number].wanted => {
                    pool.backends.push(backend(number));
                    let shadow = &mut model.backends[number];
                    (shadow.wanted, shadow.left, shadow.weight) = (true, None, 100);
                    world.apply(&pool);
                }
                Op::Remove(number) if model.backends[number].wanted => {
                    pool = without(&pool, &format!("b{number}"));
                    let shadow = &mut model.backends[number];
                    (shadow.wanted, shadow.left) = (false, Some(world.ms));
                    world.apply(&pool);
                }
                Op::Weight(number, weight) if model.backends[number].wanted => {
                    let id = format!("b{number}");
                    for spec in pool.backends.iter_mut().filter(|spec| spec.id == id) {
                        spec.weight = weight;
                    }
                    model.backends[number].weight = weight;
                    world.apply(&pool);
                }
                Op::Drain(number, deadline) => {
                    let deadline_at = world.ms + deadline;
                    let answer = world.core.drain(world.now(), "calls", &format!("b{number}"), Some(Duration::from_millis(deadline)));
                    prop_assert_eq!(answer.is_ok(), model.backends[number].wanted);
                    if let Ok(held) = answer {
                        let expected = model.sessions.values().filter(|&&at| at == number).count();
                        prop_assert_eq!(held, expected as u64);
                        model.backends[number].drain_until = Some(deadline_at);
                    }
                }
                Op::Undrain(number) => {
                    let told = world.core.undrain(world.now(), "calls", &format!("b{number}"));
                    let shadow = &mut model.backends[number];
                    prop_assert_eq!(told.is_ok(), shadow.wanted);
                    if shadow.wanted {
                        (shadow.drain_until, shadow.drained) = (None, false);
                    }
                }
                Op::Probe(number, well) => {
                    if let Some(id) = world.router.resolve(pin(number)) {
                        world.core.probe_result(world.now(), id, well, "test");
                        model.backends[number].down = !well;
                    }
                }
                Op::New => {
                    next += 1;
                    let usable: Vec<usize> = (0..BACKENDS)
                        .filter(|&number| model.backends[number].is_open() && !model.backends[number].down)
                        .collect();
                    match world.place(next) {
                        Some(route) => {
                            let at = (0..BACKENDS).find(|&number| pin(number) == route.pin).expect("one of ours");
                            prop_assert!(usable.contains(&at), "{} got a new session: {:?}", at, model.backends[at]);
                            world.learn(next, route.backend);
                            model.sessions.insert(next, at);
                        }
                        None => prop_assert!(usable.is_empty(), "{:?} got none", usable),
                    }
                }
                Op::Message(which) if !model.sessions.is_empty() => {
                    let mut numbers: Vec<u64> = model.sessions.keys().copied().collect();
                    numbers.sort_unstable();
                    let number = numbers[which % numbers.len()];
                    let at = model.sessions[&number];
                    let shadow = &model.backends[at];
                    match world.ask(number, Some(pin(at)), true, false) {
                        Verdict::Go(route) => {
                            prop_assert_eq!(route.pin, pin(at));
                            prop_assert!(shadow.is_there(), "a dead session went on: {:?}", shadow);
                        }
                        Verdict::Refuse(Refusal::SessionLost) => prop_assert!(!shadow.is_there(), "a live session was cut: {:?}", shadow),
                        other => prop_assert!(false, "{:?}", other),
                    }
                    if shadow.is_there() && !shadow.down {
                        // The table alone knows it as well.
                        match world.ask(number, None, true, false) {
                            Verdict::Go(route) => prop_assert_eq!((route.pin, route.reason), (pin(at), RouteReason::Table)),
                            other => prop_assert!(false, "{:?}", other),
                        }
                    }
                }
                Op::End(which) if !model.sessions.is_empty() => {
                    let mut numbers: Vec<u64> = model.sessions.keys().copied().collect();
                    numbers.sort_unstable();
                    let number = numbers[which % numbers.len()];
                    model.sessions.remove(&number);
                    let (now, key) = (world.now(), world.key(number));
                    world.router.forget(now, key);
                }
                Op::Pass(ms) => {
                    for _ in 0..ms / 100 {
                        world.tick();
                        model.tick(world.ms);
                    }
                }
                _ => {}
            }
            for (number, shadow) in model.backends.iter().enumerate().filter(|(_, shadow)| shadow.wanted) {
                let held = model.sessions.values().filter(|&&at| at == number).count() as u64;
                let view = world.view().backends.into_iter().find(|view| view.id == format!("b{number}")).expect("it is wanted");
                prop_assert_eq!(view.sessions, held, "{:?}", shadow);
                prop_assert_eq!(view.in_flight, 0);
            }
        }
    }

    /// A flap shorter than the debounce changes nothing: not the numbers, not the sessions, not the
    /// placing, and there is no slow start after it.
    #[test]
    fn a_short_flap_changes_nothing(count in 2usize..8, which in 0usize..8, ms in 0u64..19) {
        let which = which % count;
        let mut pool = plain(backends(count));
        pool.debounce = Duration::from_millis(DEBOUNCE);
        pool.slow_start = Duration::from_secs(60);
        let mut world = World::new(&pool);
        let (before, id) = (world.places(300), world.id(pin(which)));
        let awaited = world.ask(999, Some(pin(which)), true, true);
        let flown = matches!(awaited, Verdict::Go(_));
        prop_assert!(flown);
        world.apply(&without(&pool, &format!("b{which}")));
        prop_assert!(!world.places(300).contains(&Some(pin(which))), "it takes nothing new meanwhile");
        world.pass(ms * 100);
        world.apply(&pool);
        world.tick();
        prop_assert_eq!(world.id(pin(which)), id);
        prop_assert_eq!(world.view().backends[which].in_flight, 1);
        prop_assert_eq!(world.places(300), before);
        let now = world.now();
        world.router.outcome(now, id, Outcome::Abandoned);
        prop_assert_eq!(world.view().backends[which].in_flight, 0);
    }

    /// An address that another instance has now never gets a message of the old one's sessions.
    #[test]
    fn a_newcomer_at_an_old_address_gets_no_old_session(count in 1usize..6, which in 0usize..6, debounce in 0u64..3_000, later in 0u64..40, renamed: bool) {
        let which = which % count;
        let mut pool = plain(backends(count));
        pool.debounce = Duration::from_millis(debounce);
        let mut world = World::new(&pool);
        let held: Vec<(u64, Pin)> = (0..200)
            .filter_map(|number| {
                let route = world.place(number)?;
                world.learn(number, route.backend);
                Some((number, route.pin))
            })
            .collect();
        let mut newcomer = backend(which);
        if renamed { newcomer.id = "newcomer".into() } else { newcomer.generation = 7 }
        let mut changed = without(&pool, &format!("b{which}"));
        changed.backends.push(newcomer.clone());
        let fresh = Pin::of("calls", &newcomer.id, newcomer.generation);
        for _ in 0..=later {
            world.apply(&changed);
            for &(number, owner) in &held {
                let by_token = world.ask(number, Some(owner), true, false);
                let by_table = world.ask(number, None, true, false);
                if owner == pin(which) {
                    prop_assert_eq!(by_token, Verdict::Refuse(Refusal::SessionLost));
                    let reached = matches!(by_table, Verdict::Go(route) if route.pin == fresh);
                    prop_assert!(!reached, "by the table");
                } else {
                    for verdict in [by_token, by_table] {
                        let kept = matches!(verdict, Verdict::Go(route) if route.pin == owner);
                        prop_assert!(kept, "{:?}", verdict);
                    }
                }
            }
            world.pass(500);
        }
        prop_assert!((200..2_000).any(|number| world.place(number).is_some_and(|route| route.pin == fresh)), "new sessions it gets");
        // The old one is back: it is as it was.
        world.apply(&pool);
        for &(number, owner) in &held {
            let back = matches!(world.ask(number, Some(owner), true, false), Verdict::Go(route) if route.pin == owner);
            prop_assert!(back);
        }
    }

    /// Removal of one backend moves its sessions' places only; its return moves them back.
    #[test]
    fn only_the_share_of_the_removed_moves(count in 2usize..24, which in 0usize..24, weights in prop::collection::vec(1u32..500, 24)) {
        let which = which % count;
        let mut pool = plain(backends(count));
        for (spec, weight) in pool.backends.iter_mut().zip(weights) {
            spec.weight = weight;
        }
        let mut world = World::new(&pool);
        let before = world.places(500);
        world.apply(&without(&pool, &format!("b{which}")));
        world.tick();
        let after = world.places(500);
        for (before, after) in before.iter().zip(&after) {
            prop_assert!(after.is_some() && *after != Some(pin(which)));
            prop_assert!(before == after || *before == Some(pin(which)));
        }
        world.apply(&pool);
        prop_assert_eq!(world.places(500), before);
    }
}

#[test]
fn adding_moves_no_live_session_and_takes_a_share_of_new_ones() {
    let mut world = World::new(&plain(backends(3)));
    let before = world.places(2_000);
    for number in 0..1_000 {
        let route = world.place(number).expect("a backend");
        world.learn(number, route.backend);
    }
    world.apply(&plain(backends(4)));
    for number in 0..1_000 {
        let owner = before[number as usize];
        for (pin, in_session) in [(owner, true), (None, true), (None, false)] {
            let Verdict::Go(route) = world.ask(number, pin, in_session, false) else {
                panic!("session {number} was refused");
            };
            assert_eq!(Some(route.pin), owner);
        }
    }
    let news: Vec<_> =
        (10_000..14_000).map(|number| world.place(number).map(|route| route.pin)).collect();
    let taken = share(&news, pin(3));
    assert!((0.22..0.28).contains(&taken), "{taken} of new sessions for a quarter");
}

#[test]
fn a_new_weight_is_for_new_sessions() {
    let mut pool = plain(backends(2));
    let mut world = World::new(&pool);
    let before = world.places(500);
    for number in 0..500 {
        let route = world.place(number).expect("a backend");
        world.learn(number, route.backend);
    }
    pool.backends[0].weight = 300;
    world.apply(&pool);
    assert_eq!(world.places(500), before, "sessions that are known stay");
    let news: Vec<_> =
        (1_000..9_000).map(|number| world.place(number).map(|route| route.pin)).collect();
    assert!((0.73..0.77).contains(&share(&news, pin(0))), "{}", share(&news, pin(0)));
    pool.backends[0].weight = 0;
    world.apply(&pool);
    assert_eq!(world.places(500), before, "weight 0 cuts nobody");
    assert!(
        (1_000..2_000).all(|number| world.place(number).is_some_and(|route| route.pin == pin(1)))
    );
}

#[test]
fn a_drain_ends_with_its_last_session_or_at_its_deadline() {
    for by_deadline in [false, true] {
        let mut world = World::new(&plain(backends(2)));
        let id = world.id(pin(0));
        world.learn(1, id);
        let awaited = world.ask(1, Some(pin(0)), true, true);
        assert!(matches!(awaited, Verdict::Go(_)));
        let held = world.core.drain(world.now(), "calls", "b0", Some(Duration::from_secs(5)));
        assert_eq!(held, Ok(1));
        let events = world.pass(4_000);
        assert!(!events.iter().any(|event| matches!(event.what, Happening::DrainEnded { .. })));
        assert!(matches!(world.ask(1, Some(pin(0)), true, false), Verdict::Go(_)));
        assert!(
            (10..500).all(|number| world.place(number).is_some_and(|route| route.pin == pin(1)))
        );
        let (now, key) = (world.now(), world.key(1));
        if by_deadline {
            let events = world.pass(1_000);
            assert!(
                events.iter().any(|event| event.what == Happening::DrainEnded { sessions_left: 1 })
            );
        } else {
            world.router.forget(now, key);
            assert!(
                !world
                    .tick()
                    .iter()
                    .any(|event| matches!(event.what, Happening::DrainEnded { .. })),
                "a request is under way"
            );
            world.router.outcome(now, id, Outcome::Abandoned);
            let events = world.tick();
            assert!(
                events.iter().any(|event| event.what == Happening::DrainEnded { sessions_left: 0 })
            );
        }
        assert_eq!(world.ask(1, Some(pin(0)), true, false), Verdict::Refuse(Refusal::SessionLost));
    }
}

#[test]
fn down_gets_no_new_session_and_keeps_its_own() {
    let mut world = World::new(&plain(backends(3)));
    let id = world.id(pin(0));
    world.core.probe_result(world.now(), id, false, "test");
    assert!((0..500).all(|number| world.place(number).is_some_and(|route| route.pin != pin(0))));
    assert!(
        matches!(world.ask(1, Some(pin(0)), true, false), Verdict::Go(route) if route.pin == pin(0))
    );
    world.core.probe_result(world.now(), id, true, "test");
    assert!((0..500).any(|number| world.place(number).is_some_and(|route| route.pin == pin(0))));
}

#[test]
fn an_instance_of_two_pools_that_leaves_one_is_not_superseded() {
    let mut pool = plain(backends(2));
    pool.debounce = Duration::from_secs(2);
    let mut other = pool.clone();
    other.name = "registrations".into();
    let mut world = World::new(&pool);
    world.apply_all(vec![pool.clone(), other.clone()]);
    world.apply_all(vec![without(&pool, "b0"), other]);
    assert!(
        matches!(world.ask(1, Some(pin(0)), true, false), Verdict::Go(route) if route.address == address(0))
    );
    world.pass(2_100);
    assert_eq!(world.ask(1, Some(pin(0)), true, false), Verdict::Refuse(Refusal::SessionLost));
}

#[test]
fn slow_start_is_for_those_that_join_later() {
    let mut pool = plain(backends(2));
    pool.slow_start = Duration::from_secs(60);
    pool.debounce = Duration::from_millis(500);
    let mut world = World::new(&pool);
    assert!((0.45..0.55).contains(&share(&world.places(4_000), pin(0))), "not at the start");
    pool.backends.push(backend(2));
    world.apply(&pool);
    let mut last = 0.0;
    for _ in 0..3 {
        let now = share(&world.places(4_000), pin(2));
        assert!(now >= last, "{now} after {last}");
        last = now;
        assert!(last < 0.3);
        world.pass(20_000);
    }
    assert!((0.30..0.37).contains(&share(&world.places(4_000), pin(2))), "ramped up");
    assert!(last > 0.1, "two thirds of the ramp: {last}");
    // One that was away for longer than the debounce starts slowly again.
    world.apply(&without(&pool, "b2"));
    world.pass(1_000);
    world.apply(&pool);
    assert!(share(&world.places(4_000), pin(2)) < 0.03);
}

#[test]
fn rotated_token_keys_are_seen_without_a_change_of_pools() {
    let mut world = World::new(&plain(backends(1)));
    let old = world.router.seal(pin(0), 1, 9);
    world.core.set_token_keys(TokenKeys::new(vec![[3; 16], [1; 16]]));
    world.router.refresh();
    assert_eq!(world.router.unseal(&old, 9), Some((pin(0), 1)));
    assert_ne!(world.router.seal(pin(0), 1, 9), old);
}
