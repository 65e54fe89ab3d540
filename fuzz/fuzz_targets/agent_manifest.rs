#![no_main]
//! Any text as a manifest of the agent: it is taken, or refused with reasons.
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use strowger::control::config::Source;

fuzz_target!(|text: &str| {
    let source = Source { name: "fuzz.yaml".to_owned(), text: text.to_owned() };
    match strowger::agent::read(&source, Path::new("/etc/strowger")) {
        Ok(manifest) => {
            assert_eq!(manifest.version, 1);
            let absolute = |path: &Path| path.is_absolute();
            for app in manifest.apps.values() {
                assert!(app.release.as_ref().is_none_or(|release| absolute(&release.dir)));
                assert!(app.secrets.values().all(|path| absolute(path)));
            }
        }
        Err(errors) => {
            assert!(!errors.0.is_empty(), "refused for no reason");
            assert!(errors.0.iter().all(|error| !error.message.is_empty()));
        }
    }
});
