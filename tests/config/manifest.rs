//! Each kind of mistake in an agent's manifest, and the exact text that a user sees.

use super::{entries, root, strowger, text};

/// Kinds of mistakes that there must be at least.
const KINDS_MIN: usize = 20;

#[test]
fn every_mistake_in_a_manifest_is_told_with_its_place() {
    let directory = root().join("tests/config/bad_manifest");
    let cases = entries(&directory);
    assert!(cases.len() >= KINDS_MIN, "{} kinds", cases.len());
    for case in cases {
        let name = case.file_name().expect("a name").to_string_lossy().into_owned();
        let output = strowger(&directory, &["agent", "check", &name]);
        let told = text(&output.stdout);
        let refused = output.status.code() == Some(1) && output.stderr.is_empty();
        assert!(refused && !told.contains("good:"), "{name}: {told}{}", text(&output.stderr));
        let case = format!("manifest_{}", name.trim_end_matches(".yaml"));
        insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
            insta::assert_snapshot!(case, told);
        });
    }
}
