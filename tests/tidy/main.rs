//! Reads the source for what compilers and clippy do not forbid: impure cores, dependencies that point
//! the wrong way, unsafe code in the wrong place, leftovers, ports and paths of one machine.
//!
//! Each rule is a function from a file's name and text to complaints, and has a test that it can fail.
#![allow(missing_docs)]

mod rules;

use std::fs;
use std::path::{Path, PathBuf};

use rules::Complaint;

/// Directories that hold nothing of ours.
const SKIPPED: [&str; 6] = ["target", ".git", "artifacts", "coverage", "corpus", "snapshots"];

/// A file's largest size that is read; larger ones are data.
const BYTES_MAX: u64 = 2 << 20;

/// All text files of the repository, by their path from its root.
fn files() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut folders, mut found) = (vec![root.to_owned()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a directory").flatten() {
            let path: PathBuf = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() && !SKIPPED.contains(&name.as_str()) {
                folders.push(path);
            } else if kind.is_file()
                && name != "Cargo.lock"
                && name != ".git"
                && entry.metadata().is_ok_and(|data| data.len() <= BYTES_MAX)
                && let Ok(text) = fs::read_to_string(&path)
            {
                let name = path.strip_prefix(root).expect("below the root").display().to_string();
                found.push((name, text));
            }
        }
    }
    found.sort();
    assert!(found.len() > 100, "only {} files were found", found.len());
    found
}

fn check(rule: fn(&str, &str) -> Vec<Complaint>) {
    let mut told = Vec::new();
    for (name, text) in files() {
        for Complaint { line, what } in rule(&name, &text) {
            told.push(format!("{name}:{line}: {what}"));
        }
    }
    assert!(told.is_empty(), "{}", told.join("\n"));
}

#[test]
fn cores_are_pure() {
    check(rules::purity);
}

#[test]
fn modules_depend_one_way() {
    check(rules::modules);
}

#[test]
fn crates_depend_one_way() {
    check(rules::crates);
}

#[test]
fn unsafe_code_is_in_its_place() {
    check(rules::unsafe_code);
}

#[test]
fn nothing_is_left_over() {
    check(rules::leftovers);
}

#[test]
fn files_are_short() {
    check(rules::length);
}

#[test]
fn the_list_of_long_files_is_still_needed() {
    let files = files();
    for (long, why) in rules::LONG {
        assert!(!why.is_empty());
        let text = files.iter().find(|(name, _)| name == long).map(|(_, text)| text.as_str());
        assert!(
            text.is_some_and(rules::is_long),
            "{long} is not too long any more: take it off the list in tests/tidy/rules.rs"
        );
    }
}

#[test]
fn tests_take_free_ports() {
    check(rules::ports);
}

#[test]
fn no_path_of_one_machine() {
    check(rules::machine_paths);
}

/// `module::test` in docs/sip-acceptance.md is a test, and each sipp scenario stands there.
#[test]
fn what_is_said_to_show_something_is_there() {
    let files = files();
    let text = |name: &str| {
        let found = files.iter().find(|(known, _)| known == name);
        found.map_or("", |(_, text)| text.as_str())
    };
    let list = text("docs/sip-acceptance.md");
    let mut named = 0;
    for name in list.split('`').filter(|word| word.contains("::") && !word.contains(' ')) {
        let (module, test) = name.rsplit_once("::").expect("it has one");
        if test.starts_with(|letter: char| letter.is_uppercase()) {
            continue;
        }
        named += 1;
        let is_there = files.iter().any(|(file, text)| {
            let stem = file.rsplit('/').next().and_then(|last| last.strip_suffix(".rs"));
            let folder = file.rsplit('/').nth(1);
            (stem == Some(module) || folder == Some(module))
                && text.contains(&format!("fn {test}("))
        });
        assert!(is_there, "docs/sip-acceptance.md names {name}, and there is none");
    }
    assert!(named > 60, "only {named} tests are named");
    for (file, _) in &files {
        if let Some(name) = file
            .strip_prefix("tests/it/sip/scenarios/")
            .and_then(|name| name.strip_suffix(".uac.xml"))
        {
            let wanted = format!("| `{name}` |");
            assert!(list.contains(&wanted), "docs/sip-acceptance.md does not name {name}");
        }
    }
}
