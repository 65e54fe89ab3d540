//! The state machine of leases against a shadow that keeps only what must hold.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::model::{GRACE_LEASES, Model, Put, Refused, What};
use super::types::{Heartbeat, InstanceEndpoint, LeaseState, Registration};

const TTL: u64 = 15_000;
const SWEEP: u64 = 500;

fn registration(generation: u64, port: u16) -> Registration {
    Registration {
        generation,
        lease_ttl_ms: TTL,
        state: LeaseState::Ready,
        endpoints: vec![InstanceEndpoint {
            protocol: "sip".to_owned(),
            address: format!("udp://127.0.0.1:{port}"),
        }],
        weight: 100,
        priority: 1,
        capacity: None,
        locality: super::Locality::default(),
        release: String::new(),
        identity: super::Identity::default(),
    }
}

#[derive(Clone, Debug)]
enum Step {
    Put { id: u8, generation: u64, port: u16, vouched: bool },
    Renew { id: u8 },
    Delete { id: u8 },
    Drain { id: u8 },
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u8..6, 0u64..4, 0u16..6, any::<bool>())
            .prop_map(|(id, generation, port, vouched)| Step::Put { id, generation, port, vouched }),
        6 => (0u8..6).prop_map(|id| Step::Renew { id }),
        1 => (0u8..6).prop_map(|id| Step::Delete { id }),
        1 => (0u8..6).prop_map(|id| Step::Drain { id }),
        5 => (1u64..12_000).prop_map(Step::Wait),
    ]
}

/// What the shadow knows of an instance: its generation, its port, when it was last heard of.
type Shadow = BTreeMap<String, (u64, u16, u64)>;

fn check(model: &Model, shadow: &Shadow, now: u64) {
    let mut ports = BTreeMap::new();
    for (_, id, lease) in model.leases() {
        let (generation, port, heard) = shadow.get(id).expect("nobody appears from nowhere");
        assert_eq!(lease.registration.generation, *generation);
        if let Some(other) = ports.insert(*port, id) {
            panic!("{id} and {other} share an address");
        }
        if now < heard + TTL {
            assert!(!lease.is_lapsed(), "{id} was heard of {} ms ago", now - heard);
        }
    }
    for (id, (_, _, heard)) in shadow {
        let known = model.get("ims", id);
        assert!(known.is_some() || now >= heard + TTL * (1 + GRACE_LEASES), "{id} is lost");
    }
}

fn run(steps: Vec<Step>) {
    let (mut model, mut shadow, mut now) = (Model::default(), Shadow::new(), 1);
    for step in steps {
        match step {
            Step::Put { id, generation, port, vouched } => {
                let id = format!("i{id}");
                let wanted = registration(generation, port);
                let before = shadow.get(&id).copied();
                match model.put(now, "ims", &id, wanted, "api", vouched) {
                    Ok(put) => {
                        let same = before.is_some_and(|(known, ..)| known == generation);
                        assert_eq!(put == Put::Updated, same);
                        shadow.retain(|other, (_, has, _)| *other == id || *has != port);
                        shadow.insert(id, (generation, port, now));
                    }
                    Err(Refused::Stale { known }) => {
                        assert!(known > generation);
                        assert_eq!(before.map(|it| it.0), Some(known));
                    }
                    Err(Refused::AddressInUse { holder, .. }) => {
                        assert!(!vouched);
                        let (_, has, heard) = shadow[&holder.1];
                        assert!(has == port && now < heard + TTL / 3);
                    }
                    Err(other) => panic!("{other:?}"),
                }
            }
            Step::Renew { id } => {
                let id = format!("i{id}");
                let known = shadow.contains_key(&id);
                let beat = Heartbeat::default();
                assert_eq!(model.renew(now, "ims", &id, None, &beat).is_ok(), known);
                if let Some(it) = shadow.get_mut(&id) {
                    it.2 = now;
                }
            }
            Step::Delete { id } => {
                let id = format!("i{id}");
                let known = shadow.remove(&id).is_some();
                assert_eq!(model.delete("ims", &id, None).is_ok(), known);
            }
            Step::Drain { id } => {
                let id = format!("i{id}");
                assert_eq!(model.drain("ims", &id, true, None).is_ok(), shadow.contains_key(&id));
            }
            Step::Wait(length) => {
                let end = now + length;
                while now < end {
                    now += SWEEP;
                    model.sweep(now, &|_, _| false);
                    for change in model.take_changes() {
                        if change.what == What::Gone {
                            shadow.remove(&change.id);
                        }
                    }
                }
            }
        }
        model.take_changes();
        check(&model, &shadow, now);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn the_model_does_what_its_shadow_says(steps in prop::collection::vec(step(), 1..80)) {
        run(steps);
    }
}

fn with(ids: &[&str]) -> Model {
    let mut model = Model::default();
    for (index, id) in ids.iter().enumerate() {
        model.put(1, "ims", id, registration(1, index as u16), "api", false).expect("free");
    }
    model
}

fn sweep_to(model: &mut Model, from: u64, to: u64, ill: &[&str]) {
    let mut now = from;
    while now <= to {
        model.sweep(now, &|_, id| ill.contains(&id));
        now += SWEEP;
    }
}

/// Every unregister message is lost: the dead one is suspended after its lease, and gone after the
/// grace; the others stay.
#[test]
fn who_falls_silent_is_suspended_then_gone() {
    let mut model = with(&["a", "b", "c"]);
    let beat = Heartbeat::default();
    for now in (5_000..=60_000).step_by(5_000) {
        for id in ["a", "b"] {
            model.renew(now, "ims", id, Some(1), &beat).expect("known");
        }
        sweep_to(&mut model, now, now + 4_500, &[]);
        let state = model.get("ims", "c").map(super::Lease::state);
        let wanted = match now + 4_500 {
            ..15_001 => Some(LeaseState::Ready),
            15_001..45_501 => Some(LeaseState::Suspended),
            _ => None,
        };
        assert_eq!(state, wanted, "at {now}");
    }
}

/// All fall silent at once: that is not their fault. What is ill by the edge's own eyes lapses all
/// the same, and the first sign of life gives the rest a fresh term.
#[test]
fn most_at_once_are_held() {
    let mut model = with(&["a", "b", "c", "d"]);
    // The first lapses alone, the others within the window: it is held after all.
    for id in ["b", "c", "d"] {
        model.renew(4_000, "ims", id, None, &Heartbeat::default()).expect("known");
    }
    sweep_to(&mut model, 5_000, 16_000, &[]);
    assert_eq!(model.get("ims", "a").expect("there").state(), LeaseState::Suspended);
    sweep_to(&mut model, 16_500, 130_000, &[]);
    for id in ["a", "b", "c", "d"] {
        let lease = model.get("ims", id).expect("held for two minutes");
        assert!(lease.is_held() && lease.state() == LeaseState::Ready, "{id}: {lease:?}");
    }
    sweep_to(&mut model, 130_500, 131_000, &["d"]);
    assert!(model.get("ims", "d").expect("there").is_lapsed());
    model.renew(131_000, "ims", "a", None, &Heartbeat::default()).expect("known");
    sweep_to(&mut model, 131_500, 145_000, &["d"]);
    assert!(!model.get("ims", "b").expect("there").is_held(), "it has a fresh term");
    assert!(model.get("ims", "b").is_some_and(|lease| !lease.is_lapsed()));
    let told: Vec<What> = model.take_changes().into_iter().map(|change| change.what).collect();
    assert!(told.contains(&What::Held) && told.contains(&What::Released), "{told:?}");
}

/// A drain outlives heartbeats and registrations that say "ready", and ends with the generation.
#[test]
fn a_drain_is_an_order() {
    let mut model = with(&["a"]);
    model.drain("ims", "a", true, None).expect("known");
    let ready = Heartbeat { state: Some(LeaseState::Ready), load: Some(3) };
    model.renew(2, "ims", "a", None, &ready).expect("known");
    model.put(3, "ims", "a", registration(1, 0), "api", false).expect("its own");
    assert_eq!(model.get("ims", "a").expect("there").state(), LeaseState::Draining);
    model.put(4, "ims", "a", registration(2, 0), "api", false).expect("its own");
    assert_eq!(model.get("ims", "a").expect("there").state(), LeaseState::Ready);
    let late = model.delete("ims", "a", Some(1));
    assert_eq!(late, Err(Refused::Stale { known: 2 }), "a late farewell of the earlier one");
}
