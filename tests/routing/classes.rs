//! Classes keep their numbers, which sessions and queues bear, whatever else is configured.

use std::time::{Duration, Instant};

use strowger::control::config::{Source, load};
use strowger::routing::{Core, CoreSettings, SnapshotSpec};
use strowger_contract::{Class, ClassId, Keyer, Router, TokenKeys, WorkerId};

fn settings() -> CoreSettings {
    CoreSettings {
        token_keys: TokenKeys::new(vec![[1; 16]]),
        keyer: Keyer::new([2; 16]),
        seed: 7,
        sessions_max: 1 << 10,
        bindings_max: 16,
        workers: 1,
        advise: strowger::routing::no_advice,
    }
}

/// What a configuration with these classes, of so many milliseconds, says.
fn read(core: &Core, classes: &[(&str, u64)]) -> Vec<Class> {
    let lines: Vec<String> = classes
        .iter()
        .map(|(name, ms)| format!("  {name}: {{ tier: 0, deadline: {ms}ms }}\n"))
        .collect();
    let text = format!("version: 1\nclasses:\n{}", lines.concat());
    let source = Source { name: "test".to_owned(), text };
    let loaded = load(&[source], &[], core.pool_names());
    loaded.unwrap_or_else(|errors| panic!("{errors}")).spec.classes
}

fn apply(core: &Core, now: Instant, classes: &[(&str, u64)]) {
    let classes = read(core, classes);
    let _plan = core.apply(now, SnapshotSpec { classes, ..SnapshotSpec::default() });
}

fn number(core: &Core, name: &str) -> Option<ClassId> {
    let classes = &core.snapshot().classes;
    let index = classes.iter().position(|class| *class.name == *name)?;
    Some(ClassId(index as u8))
}

#[test]
fn a_class_keeps_its_number_over_reloads_and_upgrades() {
    let now = Instant::now();
    let core = Core::new(settings(), now);
    apply(&core, now, &[("silver", 100), ("gold", 200)]);
    let (silver, gold) = (number(&core, "silver"), number(&core, "gold"));
    assert!(silver.is_some() && gold.is_some() && silver != gold);
    // A session of gold, before another class comes before it and one that was before it goes.
    let mut router = core.router(WorkerId(0));
    let key = router.keyer().session(1, b"a call");
    let backend = strowger_contract::BackendId(1);
    router.learn(now, key, backend, gold.expect("it has one"), Duration::from_secs(100));
    apply(&core, now, &[("bronze", 300), ("gold", 200)]);
    router.refresh();
    assert_eq!(number(&core, "gold"), gold);
    assert!(![silver, gold].contains(&number(&core, "bronze")));
    let class = router.session_class(now, key).expect("it is there");
    assert_eq!(router.class(class).deadline, Some(Duration::from_millis(200)));
    // What still bears the one that is gone is treated as bulk, and bears its name.
    let former = router.class(silver.expect("it had one"));
    assert_eq!((&*former.name, former.tier, former.share_min), ("silver", 3, 0));
    // It comes back as what it was; another process, which reads them in another order, agrees.
    apply(&core, now, &[("silver", 100), ("bronze", 300), ("gold", 200)]);
    assert_eq!((number(&core, "silver"), number(&core, "gold")), (silver, gold));
    let successor = Core::planted(settings(), &core.seed_of()).expect("a core");
    apply(&successor, now, &[("gold", 200), ("copper", 50), ("bronze", 300)]);
    assert_eq!(number(&successor, "gold"), gold);
    assert_eq!(number(&successor, "bronze"), number(&core, "bronze"));
    assert_eq!(number(&core, "copper"), None);
}

#[test]
fn names_without_end_use_up_nothing() {
    let now = Instant::now();
    let core = Core::new(settings(), now);
    apply(&core, now, &[("gold", 200)]);
    let gold = number(&core, "gold").expect("it has one");
    for round in 0..200 {
        let name = format!("class-{round}");
        // Read and never applied, as a check of a configuration is.
        assert!(read(&core, &[("tried", 1)]).iter().any(|class| &*class.name == "tried"));
        apply(&core, now, &[(&name, 100), ("gold", 200)]);
        assert_eq!(number(&core, "gold"), Some(gold), "{name}");
        assert!(number(&core, &name).is_some_and(|number| number != gold));
    }
    assert!(core.snapshot().classes.len() <= 64);
}

#[test]
fn there_may_still_be_as_many_as_there_is_room_for() {
    let core = Core::new(settings(), Instant::now());
    let names: Vec<String> = (0..58).map(|index| format!("c{index}")).collect();
    let classes: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 100)).collect();
    assert_eq!(read(&core, &classes).len(), 64);
}
