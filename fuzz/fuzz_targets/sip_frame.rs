#![no_main]
//! A stream in pieces.
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (Vec<u8>, &[u8])| {
    strowger_fuzz::cut::<strowger_sip::SipFramer>(input.1, &input.0);
});
