#![no_main]
//! Operations on the relay and its peer machine.
use libfuzzer_sys::fuzz_target;
use strowger_fuzz::operations::{Operation, Speech, run};
use strowger_fuzz::traffic;

struct Diameter;

impl Speech for Diameter {
    type Protocol = strowger_diameter::Diameter;
    const YAML: &'static str = traffic::DIAMETER;
    const POOL: &'static str = "pcrf";

    fn request(kind: u8, number: u8) -> Vec<u8> {
        match kind % 5 {
            0 | 1 => traffic::capabilities("client.example.net"),
            kind => traffic::diameter_request(
                u32::from(number) + 7,
                u64::from(number % 3),
                u32::from(kind - 1),
            ),
        }
    }

    fn answer(request: &[u8], code: u8) -> Option<Vec<u8>> {
        let host = if code & 1 == 0 { "a.example.net" } else { "b.example.net" };
        traffic::diameter_answer(request, host)
    }
}

fuzz_target!(|operations: Vec<Operation>| run::<Diameter>(&operations));
