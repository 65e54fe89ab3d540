//! Each kind of mistake, and the exact text that a user sees.

use super::{entries, root, strowger, text};

/// Kinds of mistakes that there must be at least.
const KINDS_MIN: usize = 40;

#[test]
fn every_mistake_is_told_with_its_place() {
    let directory = root().join("tests/config/bad");
    let cases = entries(&directory);
    assert!(cases.len() >= KINDS_MIN, "{} kinds", cases.len());
    let mut wrong = Vec::new();
    for case in cases {
        let name = case.file_name().expect("a name").to_string_lossy().into_owned();
        let output = strowger(&directory, &["check", &name]);
        let told = text(&output.stdout);
        if output.status.code() != Some(1) || !output.stderr.is_empty() || told.contains("good:") {
            wrong.push(format!("{name}: {} {}", output.status, text(&output.stderr)));
        }
        let case = name.trim_end_matches(".yaml").to_owned();
        insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
            insta::assert_snapshot!(case, told);
        });
    }
    assert!(wrong.is_empty(), "must be refused with exit code 1:\n{}", wrong.join("\n"));
}

/// What cannot stand in a repository, since it would be too large.
#[test]
fn bounds_are_told() {
    let directory = tempfile::tempdir().expect("a directory");
    let told = |name: &str, text_of: String| {
        std::fs::write(directory.path().join(name), text_of).expect("written");
        let output = strowger(directory.path(), &["check", name]);
        assert_eq!(output.status.code(), Some(1), "{name}");
        text(&output.stdout)
    };
    let long = told("long.yaml", format!("# {}\n", "x".repeat(9 << 20)));
    assert!(long.contains("is 9437187 bytes long; at most 8388608 are read"), "{long}");
    let backends: String = (0..20_001)
        .map(|index| {
            format!(
                "    - {{ id: b{index}, address: tcp://10.{}.{}.1:1 }}\n",
                index / 250,
                index % 250
            )
        })
        .collect();
    let many = told("many.yaml", format!("pools:\n  a:\n    backends:\n{backends}"));
    assert!(many.contains("20001 backends; at most 20000 are possible"), "{many}");
    let bytes = directory.path().join("bytes.yaml");
    std::fs::write(&bytes, b"node: { name: \xff }\n").expect("written");
    let output = strowger(directory.path(), &["check", "bytes.yaml", "absent.yaml"]);
    let told = text(&output.stdout);
    assert!(
        told.contains("bytes.yaml: cannot be read: stream did not contain valid UTF-8"),
        "{told}"
    );
    assert!(told.contains("absent.yaml: cannot be read: No such file or directory"), "{told}");
}
