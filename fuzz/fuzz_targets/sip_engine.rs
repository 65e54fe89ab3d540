#![no_main]
//! Operations on the proxy.
use libfuzzer_sys::fuzz_target;
use strowger_fuzz::operations::{Operation, Speech, run};
use strowger_fuzz::traffic;

struct Sip;

impl Speech for Sip {
    type Protocol = strowger_sip::Sip;
    const YAML: &'static str = traffic::SIP;
    const POOL: &'static str = "ims";

    fn request(kind: u8, number: u8) -> Vec<u8> {
        let (uri, plain, tagged) =
            ("sip:bob@example.net", "<sip:bob@example.net>", "<sip:bob@example.net>;tag=uas1");
        let number = u64::from(number % 4);
        let (method, branch, to) = match kind % 8 {
            0 | 1 => ("INVITE", "i", plain),
            2 => ("CANCEL", "i", plain),
            3 => ("ACK", "i", tagged),
            4 => ("ACK", "a", tagged),
            5 => ("BYE", "b", tagged),
            6 => ("MESSAGE", "m", plain),
            _ => ("REGISTER", "r", plain),
        };
        traffic::sip_request(method, number, branch, uri, to, "")
    }

    fn answer(request: &[u8], code: u8) -> Option<Vec<u8>> {
        let codes = [100, 180, 183, 200, 200, 302, 401, 408, 486, 487, 500, 503, 600, 99, 700];
        traffic::sip_answer(request, codes[usize::from(code) % codes.len()])
    }
}

fuzz_target!(|operations: Vec<Operation>| run::<Sip>(&operations));
