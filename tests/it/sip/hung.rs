//! One of four instances hangs: what it costs, and for how long.

use std::time::{Duration, Instant};

use super::caller::{Callers, Record};
use super::chaos::{Instance, config, quantile};
use crate::harness::{Edge, alone, free_port};

/// Calls a second.
const RATE: u32 = 150;

/// How long all are well, one hangs, and all are well again.
const PHASES: [Duration; 3] =
    [Duration::from_secs(4), Duration::from_secs(6), Duration::from_secs(3)];

/// What the requirement gives the edge to notice.
const NOTICED: Duration = Duration::from_millis(500);

/// Set-up times are published and not judged (the machine may be slow); what is judged: no call is
/// lost, and once the edge knows, none is placed at the one that hangs.
#[test]
fn a_hung_instance_of_four_delays_only_the_first_calls() {
    let _alone = alone();
    let port = free_port();
    let ports: Vec<u16> = (0..4).map(|_| free_port()).collect();
    let edge = Edge::start(&config(port, &ports, 100));
    let mut instances: Vec<Instance> = ports.iter().map(|&port| Instance::new(port)).collect();
    for (number, instance) in instances.iter_mut().enumerate() {
        instance.start(&edge, number);
    }
    edge.until("all instances to be well", |edge| {
        (0..4).all(|number| edge.instance("ims", &format!("i{number}"))["health"] == "up")
    });
    let mut callers = Callers::new(([127, 0, 0, 1], port).into(), "hung");
    let start = Instant::now();
    let at = |phase: usize| start + PHASES[..phase].iter().sum::<Duration>();
    let (mut stopped, mut known, mut continued) = (None, None, None);
    let requests = || edge.instance("ims", "i2")["requests"].as_u64().expect("a count");
    let mut call = 0;
    loop {
        let due = start + Duration::from_secs(1) * call / RATE;
        if due >= at(3) {
            break;
        }
        callers.run_until(due);
        callers.begin(Instant::now(), Duration::from_millis(200));
        call += 1;
        let now = Instant::now();
        if stopped.is_none() && now >= at(1) {
            instances[2].signal("STOP");
            stopped = Some(now);
        }
        // Asked for a few times a second only: it costs the caller time.
        if let Some(since) = stopped
            && known.is_none()
            && call % 40 == 0
            && edge.instance("ims", "i2")["health"] != "up"
            // What was under way when it was found out is through.
            && now - since > Duration::from_secs(2)
        {
            known = Some((now, requests()));
        }
        if continued.is_none() && now >= at(2) {
            let (_, before) = known.expect("the edge has noticed within four seconds");
            let after = requests();
            // Trials of the silent one, probes of it, repeats of BYEs that wait for it.
            let got = after.saturating_sub(before);
            assert!(got <= 12, "{got} requests were placed at the hung instance");
            instances[2].signal("CONT");
            continued = Some(now);
        }
    }
    let limit = Instant::now() + Duration::from_secs(90);
    while callers.open() > 0 {
        assert!(Instant::now() < limit, "{} calls never end", callers.open());
        callers.run_until(Instant::now() + Duration::from_millis(50));
    }
    let (stopped, continued) = (stopped.expect("hung"), continued.expect("again"));
    let records = callers.records();
    let lost = records.iter().filter(|record| record.code("BYE") != 200).count();
    assert_eq!(lost, 0, "calls were lost");
    let within = |from: Instant, to: Instant| -> Vec<Duration> {
        let fits = |record: &&Record| record.begun.is_some_and(|begun| begun >= from && begun < to);
        records.iter().filter(fits).filter_map(|record| record.setup).collect()
    };
    for (what, from, to) in [
        ("all well", start, stopped),
        ("the first half second", stopped, stopped + NOTICED),
        ("from half a second on", stopped + NOTICED, continued),
        ("well again", continued, Instant::now()),
    ] {
        let setup = within(from, to);
        println!(
            "{what:<24}{:>6} calls, set-up p50 {:>9.3} ms, p99 {:>9.3} ms, longest {:>9.3} ms",
            setup.len(),
            quantile(&setup, 0.5).as_secs_f64() * 1e3,
            quantile(&setup, 0.99).as_secs_f64() * 1e3,
            quantile(&setup, 1.0).as_secs_f64() * 1e3,
        );
    }
    let later = records.iter().filter(|record| {
        record.begun.is_some_and(|begun| begun > stopped + Duration::from_secs(2))
            && record.answered.is_some_and(|answered| answered < continued)
    });
    let there = later.filter(|record| record.instance.starts_with("i2@")).count();
    assert_eq!(there, 0, "nobody is answered by who hangs");
}
