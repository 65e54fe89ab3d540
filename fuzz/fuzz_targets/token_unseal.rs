#![no_main]
//! Any text as a token: none is good that was not signed.
use libfuzzer_sys::fuzz_target;
use strowger_contract::{Pin, TokenKeys};

fuzz_target!(|input: (&[u8], u64, u64, u8)| {
    let (text, binding, pin, mark) = input;
    let keys = TokenKeys::new(vec![[7; 16], [8; 16]]);
    assert_eq!(keys.unseal(text, binding), None, "a token was guessed");
    let pin = Pin(pin & ((1 << Pin::BITS) - 1));
    assert_eq!(keys.unseal(&keys.seal(pin, mark, binding), binding), Some((pin, mark & 15)));
});
