//! What becomes of requests that wait when the instances go away that they wait for.

use std::time::{Duration, Instant};

use strowger::routing::{Grant, PoolSpec};
use strowger_contract::{
    Attempt, BackendId, CloseCause, Link, Outcome, Pin, Query, Refusal, Router, Ticket, Verdict,
};

use super::support::{POOL, World, backends, pin, plain};

/// Instances with one slot each.
fn slotted(count: usize) -> PoolSpec {
    let mut backends = backends(count);
    backends.iter_mut().for_each(|backend| backend.capacity = Some(1));
    plain(backends)
}

impl World {
    fn request(&mut self, number: u64, pin: Option<Pin>, in_session: bool) -> Verdict {
        self.request_but(number, pin, in_session, &[])
    }

    fn request_but(
        &mut self,
        number: u64,
        pin: Option<Pin>,
        in_session: bool,
        exclude: &[BackendId],
    ) -> Verdict {
        let attempt = if exclude.is_empty() { Attempt::First } else { Attempt::Retry };
        let fresh = self.query(number, Duration::from_secs(5));
        self.route(&Query { pin, in_session, exclude, attempt, ..fresh })
    }

    /// One that must wait.
    fn waits(&mut self, number: u64, pin: Option<Pin>, in_session: bool) -> Ticket {
        match self.request(number, pin, in_session) {
            Verdict::Wait(ticket) => ticket,
            other => panic!("{number} did not wait: {other:?}"),
        }
    }

    /// Takes all the slots there are.
    fn fill(&mut self, count: u64) -> Vec<BackendId> {
        let taken = (0..count).map(|number| match self.request(1_000 + number, None, false) {
            Verdict::Go(route) => route.backend,
            other => panic!("no slot: {other:?}"),
        });
        taken.collect()
    }

    fn heard(&mut self) -> Vec<Grant> {
        let mut grants = Vec::new();
        let now: Instant = self.now();
        self.router.refresh();
        self.router.grants(now, &mut grants);
        grants
    }

    /// Whoever came to the queue left it in one way or is in it.
    fn adds_up(&self) {
        let (_, figures) = self.view().qos.classes.pop().expect("somebody waited");
        let left = figures.granted + figures.withdrawn + figures.displaced + figures.refused_late;
        assert_eq!(figures.queued, left + u64::from(figures.waiting));
    }
}

#[test]
fn the_only_link_dies_and_who_waits_hears_it_at_once() {
    let mut world = World::new(&PoolSpec { needs_link: true, ..slotted(1) });
    world.tick();
    let (only, now) = (world.id(pin(0)), world.now());
    world.router.link(now, only, 0, Link::Up { identity: b"b0", capabilities: &[] });
    world.fill(1);
    let (any, own) = (world.waits(1, None, false), world.waits(2, Some(pin(0)), true));
    assert_eq!(world.heard(), []);
    world.router.link(now, only, 0, Link::Down(CloseCause::Reset));
    let heard = world.heard();
    assert!(heard.contains(&Grant::Refuse(any, Refusal::NoBackend)), "{heard:?}");
    assert!(heard.contains(&Grant::Refuse(own, Refusal::NoBackend)), "{heard:?}");
    world.adds_up();
    let refused = world.tick();
    let told = format!("{refused:?}");
    assert!(told.contains("dequeue") && told.contains("nobody is left"), "{told}");
}

#[test]
fn nobody_is_well_any_more() {
    let mut world = World::new(&slotted(2));
    let ids = [world.id(pin(0)), world.id(pin(1))];
    world.fill(2);
    let ticket = world.waits(1, None, false);
    world.core.probe_result(world.now(), ids[0], false, "timeout");
    assert_eq!(world.heard(), [], "the other may still take it");
    world.core.probe_result(world.now(), ids[1], false, "timeout");
    assert_eq!(world.heard(), [Grant::Refuse(ticket, Refusal::NoBackend)]);
    world.adds_up();
}

#[test]
fn a_fail_over_whose_last_hope_dies_does_not_wait_for_who_failed_it() {
    let mut world = World::new(&slotted(2));
    let ids = [world.id(pin(0)), world.id(pin(1))];
    world.fill(2);
    let verdict = world.request_but(1, None, false, &ids[..1]);
    let Verdict::Wait(ticket) = verdict else { panic!("{verdict:?}") };
    world.core.probe_result(world.now(), ids[1], false, "timeout");
    assert_eq!(world.heard(), [Grant::Refuse(ticket, Refusal::NoBackend)]);
}

#[test]
fn who_waits_for_an_instance_that_dies_goes_to_one_that_is_free() {
    let mut world = World::new(&slotted(2));
    let ids = [world.id(pin(0)), world.id(pin(1))];
    let now = world.now();
    let filled = world.fill(2);
    // Its session is in the table, at the first.
    world.learn(1, ids[0]);
    let ticket = world.waits(1, None, false);
    let second = world.waits(2, None, false);
    world.core.probe_result(now, ids[0], false, "timeout");
    assert_eq!(world.heard(), [], "both wait for the other now");
    let other = filled.iter().find(|id| **id == ids[1]).expect("it was filled");
    world.router.outcome(now, *other, Outcome::Answered { latency: Duration::from_millis(1) });
    let heard = world.heard();
    let [Grant::Go(first, route)] = heard[..] else { panic!("{heard:?}") };
    assert!([ticket, second].contains(&first) && route.backend == ids[1], "{heard:?}");
    world.router.outcome(now, ids[1], Outcome::Answered { latency: Duration::from_millis(1) });
    let heard = world.heard();
    assert!(matches!(heard[..], [Grant::Go(next, _)] if next != first), "{heard:?}");
    world.adds_up();
}

#[test]
fn a_free_one_is_taken_at_once_and_the_ticket_stays_the_same() {
    let mut world = World::new(&slotted(2));
    let (ids, now) = ([world.id(pin(0)), world.id(pin(1))], world.now());
    let filled = world.fill(2);
    world.learn(1, ids[0]);
    world.learn(2, ids[0]);
    let (ticket, gone) = (world.waits(1, None, false), world.waits(2, None, false));
    let free = filled.iter().find(|id| **id == ids[1]).expect("it was filled");
    world.router.outcome(now, *free, Outcome::Answered { latency: Duration::from_millis(1) });
    assert_eq!(world.heard(), [], "they wait for theirs");
    world.core.probe_result(now, ids[0], false, "timeout");
    let heard = world.heard();
    assert!(matches!(heard[..], [Grant::Go(it, to)] if it == ticket && to.backend == ids[1]));
    // The other waits on, in another line, and can be withdrawn by the ticket that its engine knows.
    world.router.withdraw(now, gone);
    world.router.outcome(now, ids[1], Outcome::Answered { latency: Duration::from_millis(1) });
    assert_eq!(world.heard(), []);
    let backend = world.view().backends.into_iter().find(|backend| backend.id == "b1");
    assert_eq!(backend.map(|backend| backend.in_flight), Some(0));
    world.adds_up();
}

#[test]
fn a_drain_ends_and_its_sessions_hear_that_they_are_lost() {
    let mut world = World::new(&slotted(2));
    world.fill(2);
    let ticket = world.waits(1, Some(pin(0)), true);
    world
        .core
        .drain(world.now(), POOL, "b0", Some(Duration::from_millis(250)))
        .expect("it is there");
    assert_eq!(world.heard(), [], "a draining instance keeps its sessions");
    world.pass(300);
    assert_eq!(world.heard(), [Grant::Refuse(ticket, Refusal::SessionLost)]);
    // The last one drains: new sessions have nobody.
    let ticket = world.waits(2, None, false);
    world.core.drain(world.now(), POOL, "b1", None).expect("it is there");
    assert_eq!(world.heard(), [Grant::Refuse(ticket, Refusal::NoBackend)]);
    world.adds_up();
}

#[test]
fn the_instance_is_removed_or_the_whole_pool() {
    let spec = slotted(1);
    let mut world = World::new(&spec);
    world.fill(1);
    let (any, own) = (world.waits(1, None, false), world.waits(2, Some(pin(0)), true));
    world.apply(&super::support::without(&spec, "b0"));
    let mut heard = world.heard();
    heard.sort_by_key(|grant| match grant {
        Grant::Go(ticket, _) | Grant::Refuse(ticket, _) => ticket.0,
    });
    let expected =
        [Grant::Refuse(any, Refusal::NoBackend), Grant::Refuse(own, Refusal::SessionLost)];
    assert_eq!(heard, expected);

    let mut world = World::new(&spec);
    world.fill(1);
    let ticket = world.waits(1, None, false);
    world.apply_all(Vec::new());
    assert_eq!(world.heard(), [Grant::Refuse(ticket, Refusal::NoBackend)]);
}

#[test]
fn who_begins_to_wait_by_an_old_picture_is_found_by_the_next_tick() {
    let spec = slotted(2);
    let mut world = World::new(&spec);
    world.fill(2);
    // Another worker has applied it; this one has not looked yet.
    let wanted = strowger::routing::SnapshotSpec {
        pools: vec![super::support::without(&spec, "b0")],
        ..Default::default()
    };
    world.core.apply(world.now(), wanted);
    let ticket = world.waits(1, Some(pin(0)), true);
    world.tick();
    assert_eq!(world.heard(), [Grant::Refuse(ticket, Refusal::SessionLost)]);
}
