//! What the queue and the retry budget count: each request once, and as what it is.

use std::time::Duration;

use strowger::routing::{Grant, SnapshotSpec};
use strowger_contract::{
    Attempt, BackendId, Class, ClassId, Outcome, Pin, Query, Refusal, Router, Verdict,
};

use super::support::{TTL, World, backend, backends, pin, plain};

fn ask(
    world: &mut World,
    number: u64,
    attempt: Attempt,
    exclude: &[BackendId],
    to: (Option<Pin>, bool),
) -> Verdict {
    let fresh = world.query(number, Duration::from_secs(1));
    world.route(&Query { pin: to.0, in_session: to.1, exclude, attempt, ..fresh })
}

fn is_denied(verdict: Verdict) -> bool {
    matches!(verdict, Verdict::Refuse(Refusal::Overloaded { .. }))
}

/// A budget of 100 at the start, and one for ten first tries: whoever is passed over for a first try
/// is no retry, however many are.
#[test]
fn only_what_was_sent_before_is_paid_from_the_retry_budget() {
    let mut world = World::new(&plain(backends(3)));
    let passed = [world.id(pin(0))];
    for number in 0..1_000 {
        for attempt in [Attempt::First, Attempt::Anew] {
            let verdict = ask(&mut world, number, attempt, &passed, (None, false));
            let Verdict::Go(route) = verdict else { panic!("{number}: {verdict:?}") };
            assert_ne!(route.backend, passed[0]);
        }
    }
    let mut sent = 0;
    while !is_denied(ask(&mut world, sent, Attempt::Retry, &passed, (None, false))) {
        sent += 1;
    }
    assert_eq!(sent, 200, "100 at first, and a tenth of 1,000; what is asked anew earns nothing");
    // Sessions are no exception: by a token, and by nothing.
    for to in [(Some(pin(1)), true), (None, true)] {
        assert!(is_denied(ask(&mut world, 1, Attempt::Retry, &passed, to)), "{to:?}");
    }
    assert!(!is_denied(ask(&mut world, 1, Attempt::First, &[], (Some(pin(1)), true))));
    assert_eq!(world.view().qos.retries_denied, 3);
}

/// One waits for its own instance, and the lane is full with it: those who find a slot elsewhere go on,
/// and nobody is counted as refused who was not.
#[test]
fn whoever_goes_on_is_not_counted_as_refused() {
    let small = |number| strowger::routing::BackendSpec { capacity: Some(2), ..backend(number) };
    let pool = plain(vec![small(0), small(1)]);
    let mut world = World::new(&pool);
    let mut classes = Class::built_in();
    classes.iter_mut().for_each(|class| class.queue_max = 1);
    world
        .core
        .apply(world.now(), SnapshotSpec { pools: vec![pool], classes, ..SnapshotSpec::default() });
    world.router.refresh();
    world.tick();
    let mine = (Some(pin(0)), true);
    for number in 0..2 {
        assert!(matches!(ask(&mut world, number, Attempt::First, &[], mine), Verdict::Go(_)));
    }
    let Verdict::Wait(waits) = ask(&mut world, 2, Attempt::First, &[], mine) else {
        panic!("its instance is full")
    };
    for number in 3..5 {
        let verdict = ask(&mut world, number, Attempt::First, &[], (None, false));
        let Verdict::Go(route) = verdict else { panic!("{verdict:?}") };
        assert_eq!(route.pin, pin(1));
    }
    let (now, id) = (world.now(), world.id(pin(0)));
    world.router.outcome(now, id, Outcome::Answered { latency: Duration::from_millis(5) });
    let mut grants = Vec::new();
    world.router.grants(now, &mut grants);
    assert!(matches!(grants[..], [Grant::Go(ticket, _)] if ticket == waits), "{grants:?}");
    let view = world.view();
    let (_, setup) = view.qos.classes.first().expect("setup waited");
    assert_eq!((setup.refused_full, setup.refused_predicted, setup.refused_late), (0, 0, 0));
    assert_eq!(setup.queued, setup.granted + setup.withdrawn + u64::from(setup.waiting));
}

/// One call: answered soon after it was let in, it holds its slot from then on.
fn calls(world: &mut World, number: u64) -> bool {
    let Verdict::Go(route) = ask(world, number, Attempt::First, &[], (None, false)) else {
        return false;
    };
    let (now, key) = (world.now(), world.key(number));
    let latency = Duration::from_millis(50);
    world.router.hold(now, key, route.backend, ClassId::SETUP, TTL);
    world.router.outcome(now, route.backend, Outcome::Answered { latency });
    true
}

/// All slots are held by calls: who would have to wait for longer than it has hears so at once, and not
/// after its time; who need not is let in.
#[test]
fn slots_that_calls_hold_are_waited_for_as_long_as_calls_last() {
    let pool = plain(vec![strowger::routing::BackendSpec { capacity: Some(10), ..backend(0) }]);
    let mut world = World::new(&pool);
    let spec =
        SnapshotSpec { pools: vec![pool], classes: Class::built_in(), ..SnapshotSpec::default() };
    world.core.apply(world.now(), spec);
    world.router.refresh();
    world.tick();
    let mut next = 0..u64::MAX;
    // Calls end twice in a second, and others take their place: a wait is half a second in the mean.
    for _ in 0..10 {
        assert!(calls(&mut world, next.next().expect("a number")));
    }
    let mut oldest = 0;
    for tick in 0..300 {
        if tick % 5 == 0 {
            let (now, key) = (world.now(), world.key(oldest));
            world.router.forget(now, key);
            oldest += 1;
            assert!(calls(&mut world, next.next().expect("a number")), "a slot is free");
        }
        world.tick();
    }
    let number = next.next().expect("a number");
    let Verdict::Wait(ticket) = ask(&mut world, number, Attempt::First, &[], (None, false)) else {
        panic!("one ends in half a second, and it has one")
    };
    let now = world.now();
    world.router.withdraw(now, ticket);
    // They last now, and none ends.
    world.pass(60_000);
    let number = next.next().expect("a number");
    let verdict = ask(&mut world, number, Attempt::First, &[], (None, false));
    assert!(is_denied(verdict), "{verdict:?}");
    // What is within a call takes a slot of its own, and is let in.
    let within = ask(&mut world, number, Attempt::First, &[], (Some(pin(0)), true));
    assert!(matches!(within, Verdict::Go(_)), "{within:?}");
}
