#![no_main]
//! Any bytes as a SIP message: spans lie within it, whatever they are.
use libfuzzer_sys::fuzz_target;
use strowger_sip::scan::{Name, Scan};

fuzz_target!(|bytes: &[u8]| {
    let mut scan = Scan::default();
    let first = scan.scan(bytes).is_ok();
    for name in [Name::Via, Name::From, Name::To, Name::CallId, Name::CSeq, Name::Route] {
        if let Some(value) = scan.value(bytes, name) {
            assert!(value.len() <= bytes.len());
        }
        assert!(scan.all(name).count() <= bytes.len());
    }
    // A scanner is used for one message after the other: nothing of the last one stays.
    assert_eq!(scan.scan(bytes).is_ok(), first);
});
