#![no_main]
//! Flows that come, are joined or not, and go.
use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use strowger_contract::{
    CloseCause, Command, Endpoint, Engine, FlowId, PeerChange, Transport, WorkerId,
};
use strowger_fuzz::rig::Rig;
use strowger_tcp::Tcp;

const YAML: &str = "version: 1
listeners:
  - { name: db, protocol: tcp, bind: [tcp://192.0.2.1:5432], pool: db }
pools:
  db:
    backends:
      - { id: a, address: tcp://192.0.2.11:5432 }
      - { id: b, address: tcp://192.0.2.12:5432 }
";

#[derive(Arbitrary, Debug)]
enum Operation {
    Open(u8),
    Joined(u8),
    JoinFailed(u8),
    Close(u8),
    Pass(u16),
}

fuzz_target!(|operations: Vec<Operation>| {
    let mut rig = Rig::<Tcp>::new(YAML, 1);
    // What the runtime knows of each flow: open, being joined to, joined.
    let mut flows = [(false, None, false); 16];
    for operation in operations.into_iter().take(64) {
        let (number, change) = match operation {
            Operation::Open(number) => {
                let number = number % 16;
                if flows[usize::from(number)].0 {
                    continue;
                }
                flows[usize::from(number)].0 = true;
                (number, PeerChange::Opened {
                    remote: ([198, 51, 100, number], 40_000).into(),
                    local: ([192, 0, 2, 1], 5_432).into(),
                    transport: Transport::Tcp,
                })
            }
            Operation::Joined(number) => match flows[usize::from(number % 16)] {
                (true, Some(backend), false) => {
                    flows[usize::from(number % 16)].2 = true;
                    (number % 16, PeerChange::Joined(backend))
                }
                _ => continue,
            },
            Operation::JoinFailed(number) => match flows[usize::from(number % 16)] {
                (true, Some(backend), false) => {
                    flows[usize::from(number % 16)].1 = None;
                    (number % 16, PeerChange::JoinFailed(backend, CloseCause::Refused))
                }
                _ => continue,
            },
            Operation::Close(number) if flows[usize::from(number % 16)].0 => {
                flows[usize::from(number % 16)] = (false, None, false);
                (number % 16, PeerChange::Closed(CloseCause::End))
            }
            Operation::Close(_) => continue,
            Operation::Pass(ms) => {
                rig.pass(std::time::Duration::from_millis(ms.into()), |_| ());
                continue;
            }
        };
        rig.peer(Endpoint::Client(FlowId::new(WorkerId(0), 1, number.into())), change);
        let mut closed = Vec::new();
        for command in rig.out.commands() {
            match command {
                Command::Splice(flow, backend, _) => {
                    let flow = &mut flows[flow.slot() as usize];
                    assert!(flow.0 && flow.1.is_none(), "joined twice, or not open");
                    flow.1 = Some(*backend);
                }
                Command::Close(Endpoint::Client(flow), _) => closed.push(*flow),
                _ => {}
            }
        }
        for flow in closed {
            flows[flow.slot() as usize] = (false, None, false);
            rig.peer(Endpoint::Client(flow), PeerChange::Closed(CloseCause::Local));
        }
    }
    for (number, _) in flows.iter().enumerate().filter(|(_, flow)| flow.0) {
        let flow = FlowId::new(WorkerId(0), 1, number as u32);
        rig.peer(Endpoint::Client(flow), PeerChange::Closed(CloseCause::End));
    }
    assert_eq!(rig.engine.in_progress(), 0);
    for pool in rig.core.pools_view(rig.now) {
        assert!(pool.backends.iter().all(|backend| backend.in_flight == 0), "{pool:?}");
    }
});
