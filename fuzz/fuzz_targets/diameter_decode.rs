#![no_main]
//! Any file that `strowger decode` may be given: messages, hex text, pcap and pcapng.
use libfuzzer_sys::fuzz_target;
use strowger::decode::messages;
use strowger_diameter::decode::decode;
use strowger_diameter::dictionary::Dictionary;

/// Starts of captures: pcap in both byte orders and with nanoseconds, pcapng.
const MAGIC: [&[u8]; 4] = [
    &[0xd4, 0xc3, 0xb2, 0xa1],
    &[0xa1, 0xb2, 0xc3, 0xd4],
    &[0x4d, 0x3c, 0xb2, 0xa1],
    &[0x0a, 0x0d, 0x0d, 0x0a],
];

fn look(file: &[u8]) {
    for found in messages(file) {
        if let Some(decoded) = decode(Dictionary::built_in(), &found.bytes) {
            assert!(!decoded.text().is_empty());
        }
    }
    let _any = decode(Dictionary::built_in(), file);
}

fuzz_target!(|bytes: &[u8]| {
    look(bytes);
    if let Some((choice, rest)) = bytes.split_first()
        && let Some(magic) = MAGIC.get(usize::from(*choice))
    {
        look(&[magic, rest].concat());
    }
});
