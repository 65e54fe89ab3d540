#![no_main]
//! What another process hands over: items of the channel, parts of the core, engines' state; true,
//! bent and invented. An engine that takes it must go on as any other.
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use strowger_contract::handover::{Clock, by_clock};
use strowger_contract::{Endpoint, Engine, FlowId, PeerChange, Protocol, Transport, WorkerId};
use strowger_diameter::Diameter;
use strowger_fuzz::rig::Rig;
use strowger_fuzz::traffic;
use strowger_sip::Sip;
use strowger_tcp::Tcp;
use strowger_udp::Udp;

const TCP: &str = "version: 1
listeners:
  - { name: db, protocol: tcp, bind: [tcp://192.0.2.1:5432], pool: db }
pools:
  db: { backends: [{ id: a, address: tcp://192.0.2.11:5432 }, { id: b, address: tcp://192.0.2.12:5432 }] }
";

const UDP: &str = "version: 1
listeners:
  - { name: names, protocol: udp, bind: [udp://192.0.2.1:53], pool: names, options: { flows: 100 } }
pools:
  names: { backends: [{ id: a, address: udp://192.0.2.11:53 }, { id: b, address: udp://192.0.2.12:53 }] }
";

#[derive(Arbitrary, Debug)]
enum Run {
    Item(Vec<u8>),
    Core(Vec<u8>),
    Engine {
        which: u8,
        bytes: Vec<u8>,
    },
    /// What an engine itself wrote, with some bytes changed and perhaps cut short.
    Bent {
        which: u8,
        traffic: u8,
        changes: Vec<(u16, u8)>,
        cut: Option<u16>,
    },
}

fn open(number: u32) -> (Endpoint, PeerChange) {
    let change = PeerChange::Opened {
        remote: traffic::client(),
        local: ([192, 0, 2, 1], 5_060).into(),
        transport: Transport::Tcp,
    };
    (Endpoint::Client(FlowId::new(WorkerId(0), 1, number)), change)
}

/// Takes the state over, and lives on for a while.
fn take<P: Protocol>(yaml: &str, bytes: &[u8]) {
    let mut rig = Rig::<P>::new(yaml, 1);
    let clock = Clock { instant: rig.now, nanos: 1_000_000_000_000 };
    let (now, router, out) = (rig.now, &mut rig.router, &mut rig.out);
    let taken = by_clock(clock, || rig.engine.restore(now, bytes, router, out));
    if taken.is_err() {
        return;
    }
    let again = by_clock(clock, || rig.engine.save()).expect("it was restored");
    let _any = again.len();
    let (peer, change) = open(70);
    rig.peer(peer, change);
    rig.message(peer, &traffic::diameter_request(1, 1, 1));
    rig.message(
        Endpoint::Datagram { socket: 0, remote: traffic::client() },
        &traffic::sip_request("INVITE", 1, "i", "sip:bob@example.net", "<sip:bob@example.net>", ""),
    );
    for _ in 0..4 {
        rig.pass(Duration::from_secs(20), |_| ());
    }
}

/// An engine with something under way, as it writes itself out.
fn saved<P: Protocol>(yaml: &str, pool: &str, kind: u8) -> Vec<u8> {
    let mut rig = Rig::<P>::new(yaml, 1);
    let clock = Clock { instant: rig.now, nanos: 1_000_000_000_000 };
    for number in 0..u32::from(kind % 4) {
        let (peer, change) = open(number);
        rig.peer(peer, change);
        if let Some(backend) = rig.backend(pool, "a") {
            rig.peer(peer, PeerChange::Joined(backend));
        }
        rig.message(peer, &traffic::capabilities("client.example.net"));
        rig.message(peer, &traffic::diameter_request(number, 7, u32::from(kind)));
        let call = u64::from(number);
        rig.message(
            Endpoint::Datagram { socket: 0, remote: traffic::client() },
            &traffic::sip_request(
                "INVITE",
                call,
                "i",
                "sip:b@example.net",
                "<sip:b@example.net>",
                "",
            ),
        );
    }
    by_clock(clock, || rig.engine.save()).expect("it can be handed over")
}

fuzz_target!(|run: Run| {
    let (which, bytes) = match run {
        Run::Item(bytes) => {
            let _any = strowger::runtime::is_item(&bytes);
            return;
        }
        Run::Core(bytes) => {
            let rig = Rig::<Tcp>::new(TCP, 1);
            let _any = rig.core.take_over(rig.now, &bytes);
            return;
        }
        Run::Engine { which, bytes } => (which, bytes),
        Run::Bent { which, traffic: kind, changes, cut } => {
            let mut bytes = match which % 4 {
                0 => saved::<Tcp>(TCP, "db", kind),
                1 => saved::<Udp>(UDP, "names", kind),
                2 => saved::<Sip>(traffic::SIP, "ims", kind),
                _ => saved::<Diameter>(traffic::DIAMETER, "pcrf", kind),
            };
            let length = bytes.len().max(1);
            for (at, by) in changes {
                if let Some(byte) = bytes.get_mut(usize::from(at) % length) {
                    *byte = by;
                }
            }
            bytes.truncate(cut.map_or(length, |cut| usize::from(cut) % (length + 1)));
            (which, bytes)
        }
    };
    match which % 4 {
        0 => take::<Tcp>(TCP, &bytes),
        1 => take::<Udp>(UDP, &bytes),
        2 => take::<Sip>(traffic::SIP, &bytes),
        _ => take::<Diameter>(traffic::DIAMETER, &bytes),
    }
});
