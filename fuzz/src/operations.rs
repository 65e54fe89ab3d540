//! Operations on an engine: messages true, bent and invented, peers that come and go, time that passes,
//! configurations that change. Cheap checks after each, and at the end that nothing is left.

use std::time::Duration;

use arbitrary::Arbitrary;
use strowger_contract::{
    CloseCause, Command, Endpoint, Engine, FlowId, PeerChange, Protocol, Transport, WorkerId,
};

use crate::rig::Rig;
use crate::traffic;

/// Operations of one run, at most: more find nothing that fewer do not.
pub const OPERATIONS_MAX: usize = 48;

#[derive(Arbitrary, Debug)]
pub enum Operation {
    /// Any bytes from anybody.
    Raw(u8, Vec<u8>),
    /// A true message of some kind, with one byte changed if `bend` says so.
    True {
        from: u8,
        kind: u8,
        number: u8,
        bend: Option<(u16, u8)>,
    },
    /// An instance answers what it was sent (the so many-th last), perhaps bent.
    Answer {
        which: u8,
        code: u8,
        bend: Option<(u16, u8)>,
    },
    /// Whom the edge sent something to sends it back, or somebody else sends it.
    Echo {
        which: u8,
        from: Option<u8>,
    },
    Peer {
        peer: u8,
        change: u8,
    },
    Pass {
        ms: u16,
    },
    Instances(u8),
    Drain,
}

pub fn endpoint<P: Protocol>(rig: &Rig<P>, pool: &str, number: u8) -> Endpoint {
    let ids = ["a", "b", "c"];
    match number % 8 {
        0..3 => Endpoint::Client(FlowId::new(WorkerId(0), 1, u32::from(number % 8))),
        3 => Endpoint::Datagram { socket: 0, remote: traffic::client() },
        4 => Endpoint::Datagram { socket: 0, remote: ([192, 0, 2, 11], 5_060).into() },
        other => rig
            .backend(pool, ids[usize::from(other - 5)])
            .map_or(Endpoint::Client(FlowId::new(WorkerId(0), 2, 9)), Endpoint::Backend),
    }
}

fn bent(mut bytes: Vec<u8>, bend: Option<(u16, u8)>) -> Vec<u8> {
    if let Some((at, by)) = bend
        && !bytes.is_empty()
    {
        let at = usize::from(at) % bytes.len();
        bytes[at] = by;
    }
    bytes
}

fn change(number: u8) -> PeerChange {
    let causes =
        [CloseCause::End, CloseCause::Reset, CloseCause::Refused, CloseCause::ConnectTimeout];
    match number % 4 {
        0 | 1 => PeerChange::Opened {
            remote: traffic::client(),
            local: ([192, 0, 2, 1], 3_868).into(),
            transport: Transport::Tcp,
        },
        2 => PeerChange::Closed(causes[usize::from(number >> 2) % 4]),
        _ => PeerChange::Retired,
    }
}

/// The protocol's own part of a run.
pub trait Speech {
    type Protocol: Protocol;
    const YAML: &'static str;
    const POOL: &'static str;

    /// A true request.
    fn request(kind: u8, number: u8) -> Vec<u8>;
    /// What an instance answers to what it was sent.
    fn answer(request: &[u8], code: u8) -> Option<Vec<u8>>;
    /// How a joined flow goes on, for protocols that splice.
    fn spliced(_: &mut Rig<Self::Protocol>) {}
}

pub fn run<S: Speech>(operations: &[Operation]) {
    let mut rig = Rig::<S::Protocol>::new(S::YAML, 1);
    let mut sent: Vec<(Endpoint, Vec<u8>)> = Vec::new();
    for operation in operations.iter().take(OPERATIONS_MAX) {
        match operation {
            Operation::Raw(from, bytes) => {
                let from = endpoint(&rig, S::POOL, *from);
                rig.message(from, bytes);
            }
            Operation::True { from, kind, number, bend } => {
                let from = endpoint(&rig, S::POOL, *from);
                rig.message(from, &bent(S::request(*kind, *number), *bend));
            }
            Operation::Answer { which, code, bend } => {
                let Some((to, bytes)) = last(&sent, *which) else { continue };
                if let Some(answer) = S::answer(&bytes, *code) {
                    rig.message(to, &bent(answer, *bend));
                }
            }
            Operation::Echo { which, from } => {
                let Some((to, bytes)) = last(&sent, *which) else { continue };
                let from = from.map_or(to, |from| endpoint(&rig, S::POOL, from));
                rig.message(from, &bytes);
            }
            Operation::Peer { peer, change: number } => {
                let peer = endpoint(&rig, S::POOL, *peer);
                rig.peer(peer, change(*number));
                S::spliced(&mut rig);
            }
            Operation::Pass { ms } => {
                let time = Duration::from_millis(u64::from(*ms));
                rig.pass(time, |out| sent.extend(traffic::sent(out)));
                rig.out.clear();
            }
            Operation::Instances(count) => {
                let yaml: String = S::YAML
                    .lines()
                    .filter(|line| match count % 3 {
                        0 => true,
                        1 => !line.contains("id: a"),
                        _ => !line.contains("id: b"),
                    })
                    .map(|line| format!("{line}\n"))
                    .collect();
                rig.apply(&yaml);
                rig.out.clear();
            }
            Operation::Drain => {
                rig.out.clear();
                let now = rig.now;
                rig.engine.on_drain(now, &mut rig.router, &mut rig.out);
            }
        }
        check(&rig);
        sent.extend(traffic::sent(&rig.out));
        let old = sent.len().saturating_sub(64);
        sent.drain(..old);
    }
    end::<S>(rig);
}

fn last(sent: &[(Endpoint, Vec<u8>)], which: u8) -> Option<(Endpoint, Vec<u8>)> {
    sent.len().checked_sub(1 + usize::from(which % 16)).map(|at| sent[at].clone())
}

fn check<P: Protocol>(rig: &Rig<P>) {
    for command in rig.out.commands() {
        match command {
            Command::Send(frame) => assert!(!rig.out.bytes(&frame.bytes).is_empty()),
            Command::HandOver { to, .. } => assert_eq!(to.0, 0, "there is one worker only"),
            Command::Close(..) | Command::Splice(..) => {}
            Command::HoldOff(..) | Command::Proven(_) | Command::Resolve { .. } | Command::OpenOutward(..) => {}
        }
    }
}

/// All peers are gone and all timers have run: nothing may be left under way.
fn end<S: Speech>(mut rig: Rig<S::Protocol>) {
    for number in 0..8 {
        let peer = endpoint(&rig, S::POOL, number);
        rig.peer(peer, PeerChange::Closed(CloseCause::End));
    }
    rig.pass(Duration::from_secs(1_000), |_| ());
    assert_eq!(rig.engine.in_progress(), 0, "something never ends");
    for pool in rig.core.pools_view(rig.now) {
        for backend in pool.backends {
            assert_eq!(backend.in_flight, 0, "{backend:?}");
        }
    }
}
