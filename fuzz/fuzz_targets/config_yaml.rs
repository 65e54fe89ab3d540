#![no_main]
//! Any text as a configuration: it is taken, or refused with a place.
use libfuzzer_sys::fuzz_target;
use strowger::control::config::{self, Source};
use strowger::protocols::Protocols;
use strowger::routing::PoolNames;

fuzz_target!(|text: &str| {
    let source = Source { name: "fuzz.yaml".to_owned(), text: text.to_owned() };
    let protocols = Protocols::standard();
    match config::load(&[source], &protocols.configurers(), &PoolNames::default()) {
        Ok(loaded) => {
            let _text = config::explain(&loaded);
        }
        Err(errors) => {
            assert!(!errors.0.is_empty(), "refused for no reason");
            assert!(errors.0.iter().all(|error| !error.message.is_empty()));
        }
    }
});
