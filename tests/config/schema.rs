//! The published schema: it is what the types say, takes what the edge takes, and sees mistakes.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::{entries, root, strowger, text};

fn schema() -> Value {
    let output = strowger(root(), &["schema", "edge"]);
    assert!(output.status.success());
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// What an editor would say.
fn mistakes(schema: &jsonschema::Validator, file: &Path) -> Option<Vec<String>> {
    let value: Value = yaml_serde::from_str(&fs::read_to_string(file).ok()?).ok()?;
    let told = schema
        .iter_errors(&value)
        .map(|error| format!("{}: at `{}`: {error}", file.display(), error.instance_path()));
    Some(told.collect())
}

/// After a wanted change: `cargo run -- schema edge > config/schema.json`.
#[test]
fn the_committed_schema_is_the_one_that_the_types_give() {
    let committed = fs::read_to_string(root().join("config/schema.json")).expect("the schema");
    let committed: Value = serde_json::from_str(&committed).expect("JSON");
    assert!(
        committed == schema(),
        "config/schema.json is old: cargo run -- schema edge > config/schema.json"
    );
}

/// After a wanted change: `cargo run -- schema agent > config/agent.schema.json`.
#[test]
fn the_agents_committed_schema_is_the_one_that_the_types_give_and_its_example_is_good() {
    let committed =
        fs::read_to_string(root().join("config/agent.schema.json")).expect("the schema");
    let committed: Value = serde_json::from_str(&committed).expect("JSON");
    let told = strowger(root(), &["schema", "agent"]);
    let told: Value = serde_json::from_slice(&told.stdout).expect("JSON");
    assert!(
        committed == told,
        "config/agent.schema.json is old: cargo run -- schema agent > config/agent.schema.json"
    );
    let schema = jsonschema::validator_for(&told).expect("a schema");
    for example in ["config/agent.yaml", "src/demo/workloads.yaml"] {
        assert_eq!(mistakes(&schema, &root().join(example)), Some(Vec::new()));
    }
    let output = strowger(root(), &["agent", "check", "config/agent.yaml"]);
    assert!(output.status.success(), "{}", text(&output.stdout));
}

#[test]
fn examples_are_good_for_the_edge_and_for_the_schema() {
    let schema = jsonschema::validator_for(&schema()).expect("a schema");
    let examples: Vec<_> = entries(&root().join("config"))
        .into_iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "yaml"))
        .collect();
    assert!(examples.len() >= 2);
    for example in examples {
        let name = example.display().to_string();
        let head = fs::read_to_string(&example).expect("a file");
        // Each says in its head how it is checked; others belong to other programs.
        if !head.contains("strowger check config/") {
            continue;
        }
        let output = strowger(root(), &["check", &name]);
        assert!(output.status.success(), "{name}: {}", text(&output.stdout));
        assert_eq!(mistakes(&schema, &example), Some(Vec::new()));
    }
}

/// Mistakes that a schema must see, at least; it cannot see names that are nowhere or addresses in use
/// twice.
const SEEN_MIN: usize = 30;

#[test]
fn bad_configurations_that_a_schema_can_see_are_seen() {
    let schema = jsonschema::validator_for(&schema()).expect("a schema");
    let (mut seen, mut unseen) = (Vec::new(), Vec::new());
    for case in entries(&root().join("tests/config/bad")) {
        let name = case.file_name().expect("a name").to_string_lossy().into_owned();
        match mistakes(&schema, &case) {
            Some(told) if told.is_empty() => unseen.push(name),
            Some(_) => seen.push(name),
            // No YAML at all, or a directory.
            None => {}
        }
    }
    assert!(seen.len() >= SEEN_MIN, "{} seen, unseen: {unseen:?}", seen.len());
    // Wrong types, unknown keys and numbers out of range are a schema's daily bread.
    for kind in ["class_tier_range", "route_match_type", "route_match_unknown_key"] {
        assert!(seen.contains(&format!("{kind}.yaml")), "{kind} is not seen");
    }
}
