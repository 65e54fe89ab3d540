#![no_main]
//! Any text as a duration: what is read is written so that it is read again.
use libfuzzer_sys::fuzz_target;
use strowger_contract::duration;

fuzz_target!(|text: &str| {
    if let Ok(value) = duration::parse(text) {
        assert_eq!(duration::parse(&duration::format(value)), Ok(value));
    }
});
