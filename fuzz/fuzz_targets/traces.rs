#![no_main]
//! Any messages to the matchers of traces, which remember what they saw.
use libfuzzer_sys::fuzz_target;
use strowger_contract::Protocol;
use strowger_diameter::Diameter;
use strowger_sip::Sip;

fn follow<P: Protocol>(messages: &[Vec<u8>]) {
    for kind in P::TRACE_KEYS {
        for value in ["1", "alice"] {
            let Ok(mut tracer) = P::tracer(kind, value) else { continue };
            for message in messages {
                tracer.wants(message);
            }
        }
    }
    for message in messages {
        let _conversation = P::conversation(message);
        assert!(!P::describe(message).chars().any(char::is_control));
    }
}

fuzz_target!(|messages: Vec<Vec<u8>>| {
    follow::<Diameter>(&messages);
    follow::<Sip>(&messages);
});
