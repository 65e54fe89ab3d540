#![no_main]
//! Topology hiding: whatever message is hidden reads back as it was, and whatever words come in break nothing.
use libfuzzer_sys::fuzz_target;
use strowger_contract::{TokenKeys, Transport};
use strowger_sip::hide::{Mask, mask_request, mask_response, unmask, unmask_anywhere};
use strowger_sip::scan::{Scan, Start};

fuzz_target!(|bytes: &[u8]| {
    let keys = TokenKeys::new(vec![[9; 16]]);
    let (mut scan, mut plain, mut hidden) = (Scan::default(), Vec::new(), Vec::new());
    if scan.scan(bytes).is_err() {
        return;
    }
    // What comes in may have words of ours in odd places.
    let _read = unmask(bytes, &scan, &keys, &mut plain);
    let before = unmask_anywhere(bytes, &scan, &keys, &mut plain);
    if before != Default::default() {
        return;
    }
    let transport = [Transport::Udp, Transport::Tcp, Transport::Tls][bytes.len() % 3];
    let mask = Mask { keys: &keys, host: b"192.0.2.9:5060", transport, call_id: true };
    let changed = match scan.start {
        Start::Request { .. } => mask_request(bytes, &scan, bytes.len() % 2 == 0, &mask, &mut hidden),
        Start::Response { .. } => {
            // The Call-ID that a Via keeps is the receiver's: it is not what was hidden here.
            if memchr(bytes, b";swth") {
                return;
            }
            mask_response(bytes, &scan, Some(&mask), true, |uri| uri.host.len() % 2 == 0, &mut hidden)
        }
    };
    if changed {
        scan.scan(&hidden).expect("what was a message still is one");
        let done = unmask_anywhere(&hidden, &scan, &keys, &mut plain);
        assert_eq!((String::from_utf8_lossy(&plain), done.unreadable), (String::from_utf8_lossy(bytes), 0));
    }
});

fn memchr(text: &[u8], word: &[u8]) -> bool {
    text.windows(word.len()).any(|part| part == word)
}
