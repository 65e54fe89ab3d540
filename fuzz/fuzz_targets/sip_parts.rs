#![no_main]
//! Small parsers of SIP: flow tokens (`sf`), STUN on the SIP port, `oc` in Via, WebSocket frames.
use std::net::{IpAddr, SocketAddr};
use std::sync::LazyLock;
use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use strowger::runtime::websocket_messages;
use strowger_sip::doors;

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

fuzz_target!(|input: (u8, &[u8])| {
    let (kind, bytes) = input;
    let ip = if kind & 0x40 == 0 { IpAddr::from([192, 0, 2, 1]) } else { IpAddr::from([kind; 16]) };
    match kind % 5 {
        0 => doors::flow(bytes),
        1 => doors::flow(&[b"sip:x@192.0.2.1:5060;sf=", bytes].concat()),
        2 => doors::stun(bytes, SocketAddr::new(ip, u16::from(kind) << 8 | 7)),
        3 => doors::oc(bytes, *START),
        _ => {
            // However the stream is cut, the messages are the same.
            let whole = websocket_messages(&mut std::iter::once(bytes));
            let cut = websocket_messages(&mut bytes.chunks(usize::from(kind / 5) + 1));
            assert_eq!(whole, cut);
        }
    }
});
