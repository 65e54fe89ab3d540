#![no_main]
//! Any bytes as a Via value: reading it value by value comes to an end.
use libfuzzer_sys::fuzz_target;
use strowger_sip::via::{Via, end_of_value};

fuzz_target!(|bytes: &[u8]| {
    assert!(end_of_value(bytes) <= bytes.len());
    let mut rest = Some(bytes);
    let mut steps = 0;
    while let Some((via, after)) = rest.and_then(Via::first) {
        let _all = (via.branch(), via.wants_rport(), via.response_address(), via.is_stream());
        rest = after;
        steps += 1;
        assert!(steps <= bytes.len(), "it does not come to an end");
    }
});
