//! Second tries in the queue: they hold nobody up, and have their turn.

use std::time::Duration;

use strowger::routing::Grant;
use strowger_contract::{Attempt, BackendId, ClassId, Outcome, Query, Router, Ticket, Verdict};

use super::support::{World, backends, pin, plain};

impl World {
    fn wants(&mut self, number: u64, budget: Duration, exclude: &[BackendId]) -> Verdict {
        self.wants_as(ClassId::SETUP, number, budget, exclude)
    }

    fn wants_as(
        &mut self,
        class: ClassId,
        number: u64,
        budget: Duration,
        exclude: &[BackendId],
    ) -> Verdict {
        let attempt = if exclude.is_empty() { Attempt::First } else { Attempt::Retry };
        self.route(&Query { class, exclude, attempt, ..self.query(number, budget) })
    }

    fn queues(&mut self, number: u64, budget: Duration, exclude: &[BackendId]) -> Ticket {
        match self.wants(number, budget, exclude) {
            Verdict::Wait(ticket) => ticket,
            other => panic!("{number} did not wait: {other:?}"),
        }
    }

    /// The backend answers; who gets its slot.
    fn frees(&mut self, backend: BackendId) -> Option<Ticket> {
        let latency = Duration::from_millis(1);
        self.router.outcome(self.now(), backend, Outcome::Answered { latency });
        let mut grants = Vec::new();
        self.router.grants(self.now(), &mut grants);
        match grants[..] {
            [] => None,
            [Grant::Go(ticket, route)] if route.backend == backend => Some(ticket),
            ref other => panic!("{other:?}"),
        }
    }
}

const SETUP: Duration = Duration::from_millis(500);
const LONG: Duration = Duration::from_secs(32);

#[test]
fn who_failed_at_a_backend_holds_up_nobody_there() {
    let mut two = backends(2);
    two.iter_mut().for_each(|backend| backend.capacity = Some(1));
    let mut world = World::new(&plain(two));
    let ids = [world.id(pin(0)), world.id(pin(1))];
    for number in 0..2 {
        assert!(matches!(world.wants(1_000 + number, SETUP, &[]), Verdict::Go(_)));
    }
    // Fail-overs of the first: with all the time there is, and one with less than its class gives.
    let long = world.queues(0, LONG, &ids[..1]);
    world.ms += 1;
    let normal = world.queues(1, SETUP, &[]);
    let hasty = world.queues(2, Duration::from_millis(100), &ids[..1]);
    let other = world.queues(3, Duration::from_millis(150), &[]);
    world.ms += 1;
    let last = world.queues(4, SETUP, &[]);
    assert_eq!(world.frees(ids[0]), Some(other), "not idle behind the hasty one");
    assert_eq!(world.frees(ids[0]), Some(normal));
    assert_eq!(world.frees(ids[1]), Some(hasty));
    // The second try came first, and its turn is not in 32 s.
    assert_eq!(world.frees(ids[1]), Some(long));
    assert_eq!(world.frees(ids[0]), Some(last));
}

#[test]
fn a_second_try_makes_no_urgent_ones_of_all_that_come_later() {
    let mut one = backends(2);
    one[0].capacity = Some(1);
    one[1].capacity = Some(1);
    let mut world = World::new(&plain(one));
    let ids = [world.id(pin(0)), world.id(pin(1))];
    for number in 0..2 {
        assert!(matches!(world.wants(10_000 + number, SETUP, &[]), Verdict::Go(_)));
    }
    // Two classes of one tier: more than the tier's set of carried deadlines holds.
    let mut waiting = 0;
    for (class, ms, count) in [(ClassId::EMERGENCY, 100, 990), (ClassId::IN_SESSION, 200, 3_990)] {
        let again = world.wants_as(class, 0, LONG, &ids[..1]);
        assert!(matches!(again, Verdict::Wait(_)), "{again:?}");
        for number in 1..count {
            let verdict = world.wants_as(class, number, Duration::from_millis(ms), &[]);
            waiting += u32::from(matches!(verdict, Verdict::Wait(_)));
        }
    }
    assert!(waiting > 4_096, "{waiting} wait");
    assert_eq!(world.view().qos.urgent_full, 0);
}
