#![no_main]
//! Any bytes as a message and as AVPs, at any depth that is looked at.
use libfuzzer_sys::fuzz_target;
use strowger_diameter::avp::{Avps, Header, Summary};

fuzz_target!(|bytes: &[u8]| {
    let _all = (Header::read(bytes), Summary::of(bytes));
    let mut total = 0;
    for avp in Avps::of(bytes).flatten() {
        total += avp.whole.len();
        let inner: usize = Avps::within(avp.data).flatten().map(|avp| avp.whole.len()).sum();
        assert!(inner <= avp.data.len());
    }
    assert!(total <= bytes.len());
});
