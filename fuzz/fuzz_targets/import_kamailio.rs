#![no_main]
//! Any text as a dispatcher list, with any algorithm: it is refused line by line, or what comes out
//! is a good configuration.
use libfuzzer_sys::fuzz_target;
use strowger::control::config::{self, Source};
use strowger::import::{KamailioOptions, kamailio_dispatcher};
use strowger::protocols::Protocols;
use strowger::routing::PoolNames;

fuzz_target!(|input: (u8, &str)| {
    let (algorithm, list) = input;
    let options = KamailioOptions { algorithm: u32::from(algorithm), ..KamailioOptions::default() };
    match kamailio_dispatcher(list, &options) {
        Ok(text) => {
            let source = Source { name: "imported.yaml".to_owned(), text };
            let protocols = Protocols::standard();
            let loaded = config::load(
                std::slice::from_ref(&source),
                &protocols.configurers(),
                &PoolNames::default(),
            );
            assert!(loaded.is_ok(), "{}\n{}", loaded.unwrap_err(), source.text);
        }
        Err(errors) => {
            assert!(!errors.is_empty() && errors.iter().all(|error| !error.is_empty()));
        }
    }
});
