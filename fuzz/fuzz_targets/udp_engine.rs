#![no_main]
//! Raw UDP: clients that speak, backends that answer, are silent or gone, and time that passes. No
//! flow is left over and no slot is lost.
use std::collections::HashSet;
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use strowger_contract::{CloseCause, Command, Endpoint, Engine, PeerChange};
use strowger_fuzz::rig::Rig;
use strowger_udp::Udp;

const FLOWS: usize = 6;

const YAML: &str = "version: 1
listeners:
  - name: names
    protocol: udp
    bind: [udp://192.0.2.1:53]
    pool: names
    options: { flows: 6, idle_timeout: 2s, responses: RESPONSES }
    routes: [{ match: { first_bytes: [\"x\"] }, pool: other }]
pools:
  names: { backends: [{ id: a, address: udp://192.0.2.11:53 }, { id: b, address: udp://192.0.2.12:53 }] }
  other: { backends: [{ id: c, address: udp://192.0.2.13:53 }] }
";

#[derive(Arbitrary, Debug)]
enum Operation {
    Client { client: u8, bytes: Vec<u8> },
    Answer { flow: u8, bytes: Vec<u8> },
    Unreachable { flow: u8, here: bool },
    ClientGone(u8),
    Pass(u16),
}

fn client(number: u8) -> Endpoint {
    let remote = ([198, 51, 100, number % 16], 40_000).into();
    Endpoint::Datagram { socket: 0, remote }
}

/// What the runtime has open for the engine.
fn carry_out(rig: &Rig<Udp>, open: &mut HashSet<u32>) {
    for command in rig.out.commands() {
        match command {
            Command::OpenOutward(number, _) => {
                open.insert(*number);
            }
            Command::Close(Endpoint::Outward(number), _) => {
                open.remove(number);
            }
            Command::Send(frame) => {
                if let Endpoint::Outward(number) = frame.to {
                    assert!(open.contains(&number), "sent through a socket that is not open");
                }
            }
            _ => {}
        }
    }
}

fuzz_target!(|input: (bool, Vec<Operation>)| {
    let (counted, operations) = input;
    let yaml = YAML.replace("RESPONSES", if counted { "1" } else { "0" });
    let mut rig = Rig::<Udp>::new(&yaml, 1);
    let mut open = HashSet::new();
    for operation in operations.into_iter().take(64) {
        match operation {
            Operation::Client { client: number, bytes } => rig.message(client(number), &bytes),
            Operation::Answer { flow, bytes } => {
                rig.message(Endpoint::Outward(u32::from(flow % 8)), &bytes);
            }
            Operation::Unreachable { flow, here } => {
                let cause = if here { CloseCause::Local } else { CloseCause::Refused };
                rig.peer(Endpoint::Outward(u32::from(flow % 8)), PeerChange::Closed(cause));
            }
            Operation::ClientGone(number) => {
                rig.peer(client(number), PeerChange::Closed(CloseCause::Refused));
            }
            Operation::Pass(ms) => {
                let mut all = Vec::new();
                rig.pass(Duration::from_millis(ms.into()), |out| {
                    all.extend(out.commands().iter().filter_map(|command| match command {
                        Command::Close(Endpoint::Outward(number), _) => Some(*number),
                        _ => None,
                    }));
                });
                all.iter().for_each(|number| {
                    open.remove(number);
                });
                continue;
            }
        }
        carry_out(&rig, &mut open);
        assert!(rig.engine.in_progress() <= FLOWS, "more flows than there may be");
        assert!(open.len() <= rig.engine.in_progress(), "a socket without a flow");
    }
    rig.pass(Duration::from_secs(60), |_| ());
    assert_eq!(rig.engine.in_progress(), 0, "a flow without end");
    for pool in rig.core.pools_view(rig.now) {
        assert!(pool.backends.iter().all(|backend| backend.in_flight == 0), "{pool:?}");
    }
});
