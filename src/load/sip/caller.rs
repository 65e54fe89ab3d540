//! The callers: a call, a registration or an OPTIONS per intended time, whatever became of those
//! before.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use slab::Slab;
use strowger_contract::Wheel;
use strowger_sip::scan::{Name, Scan, Start};

use super::message::{CallName, Dialog, Identity, ack_of_refusal, in_dialog, instance_of, request};
use crate::load::net::{Net, Place};
use crate::load::report::Report;

const T1: Duration = Duration::from_millis(500);
const T2: Duration = Duration::from_secs(4);

/// What is begun at each intended time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// INVITE, ACK, a pause, BYE.
    Call,
    /// REGISTER.
    Register,
    /// OPTIONS.
    Options,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The first request has no final answer yet.
    Asked,
    /// Established; the BYE is to come.
    Talking,
    /// The BYE has no answer yet.
    Leaving,
}

#[derive(Debug)]
struct Call {
    generation: u32,
    stage: Stage,
    /// When the request under way was to be sent.
    intended: Instant,
    gives_up: Instant,
    place: Place,
    /// To repeat over UDP; empty when nothing is to be repeated.
    repeat: Vec<u8>,
    interval: Duration,
    dialog: Dialog,
    rang: bool,
}

/// All callers.
pub(crate) struct Callers {
    identity: Identity,
    kind: Kind,
    hold: Duration,
    timeout: Duration,
    target: SocketAddr,
    /// The socket for datagrams.
    socket: usize,
    /// Open streams, used in turn; empty over UDP.
    pub(crate) streams: Vec<usize>,
    turn: usize,
    calls: Slab<Call>,
    generation: u32,
    timers: Wheel,
    /// Buffers of calls that ended.
    spare: Vec<(Vec<u8>, Dialog)>,
    due: Vec<u64>,
}

impl Callers {
    pub(crate) fn new(
        now: Instant,
        identity: Identity,
        (kind, hold, timeout): (Kind, Duration, Duration),
        target: SocketAddr,
        socket: usize,
    ) -> Self {
        Self {
            identity,
            kind,
            hold,
            timeout,
            target,
            socket,
            streams: Vec::new(),
            turn: 0,
            calls: Slab::new(),
            generation: 0,
            timers: Wheel::new(now),
            spare: Vec::new(),
            due: Vec::new(),
        }
    }

    pub(crate) fn under_way(&self) -> usize {
        self.calls.len()
    }

    pub(crate) fn next(&self) -> Option<Instant> {
        self.timers.next()
    }

    fn is_stream(&self) -> bool {
        self.identity.transport != "UDP"
    }

    fn place(&mut self, address: SocketAddr) -> Option<Place> {
        if !self.is_stream() {
            return Some(Place::Datagram(self.socket, address));
        }
        self.turn = self.turn.wrapping_add(1);
        Some(Place::Stream(*self.streams.get(self.turn % self.streams.len().max(1))?))
    }

    fn name(&self, slot: usize, generation: u32) -> CallName {
        CallName { run: self.identity.run, slot: slot as u32, generation }
    }

    /// Begins the next one.
    pub(crate) fn begin(
        &mut self,
        net: &mut Net,
        now: Instant,
        intended: Instant,
        report: &mut Report,
    ) {
        report.begin(intended, now);
        let Some(place) = self.place(self.target) else { return report.fail("no connection") };
        self.generation = self.generation.wrapping_add(1);
        let (mut repeat, dialog) = self.spare.pop().unwrap_or_default();
        let method = match self.kind {
            Kind::Call => "INVITE",
            Kind::Register => "REGISTER",
            Kind::Options => "OPTIONS",
        };
        let name = self.name(self.calls.vacant_key(), self.generation);
        repeat.clear();
        request(&mut repeat, &self.identity, name, method);
        net.send(place, |out| out.extend_from_slice(&repeat));
        let slot = self.calls.insert(Call {
            generation: self.generation,
            stage: Stage::Asked,
            intended,
            gives_up: now + self.timeout,
            place,
            repeat,
            interval: T1,
            dialog,
            rang: false,
        });
        self.arm(now, slot);
    }

    fn arm(&mut self, now: Instant, slot: usize) {
        let stream = self.is_stream();
        let Some(call) = self.calls.get(slot) else { return };
        let at = match call.stage {
            Stage::Talking => call.intended,
            _ if call.repeat.is_empty() || stream => call.gives_up,
            _ => (now + call.interval).min(call.gives_up),
        };
        self.timers.insert(at, timer_key(slot, call));
    }

    pub(crate) fn on_answer(
        &mut self,
        net: &mut Net,
        now: Instant,
        (bytes, scan): (&[u8], &Scan),
        report: &mut Report,
    ) {
        let Start::Response { code } = scan.start else { return };
        let name = scan.value(bytes, Name::CallId).and_then(CallName::read);
        let Some(name) = name.filter(|name| name.run == self.identity.run) else {
            return report.count("strange_answers");
        };
        let slot = name.slot as usize;
        let invite = scan.value(bytes, Name::CSeq).is_some_and(|text| text.ends_with(b"INVITE"));
        let known = self.calls.get(slot).filter(|call| call.generation == name.generation);
        let Some(stage) = known.map(|call| call.stage) else {
            return report.count("late_answers");
        };
        match (stage, invite) {
            (Stage::Asked, _) if code < 200 => self.on_provisional(now, slot, code, report),
            (Stage::Asked, true) => {
                self.on_invite_answer(net, now, slot, code, (bytes, scan), report)
            }
            (Stage::Asked, false) => {
                let ok = (200..300).contains(&code);
                self.end(now, slot, ok, &format!("{code}"), "request", report);
            }
            // A repeated 2xx: its ACK was lost.
            (_, true) if (200..300).contains(&code) => {
                report.count("repeated_answers_seen");
                self.acknowledge(net, slot);
            }
            (Stage::Leaving, false) if code >= 200 => {
                let answered = scan.value(bytes, Name::Contact).and_then(instance_of);
                let call = &self.calls[slot];
                let moved = answered.is_some() && answered != call.dialog.instance;
                let ok = code < 300 && !moved;
                let why =
                    if moved { "moved to another instance".into() } else { format!("BYE {code}") };
                self.end(now, slot, ok, &why, "bye", report);
            }
            _ => {}
        }
    }

    fn on_provisional(&mut self, now: Instant, slot: usize, code: u16, report: &mut Report) {
        let call = &mut self.calls[slot];
        if self.kind == Kind::Call {
            // RFC 3261 17.1.1.2: no more repeats.
            call.repeat.clear();
        }
        if code > 100 && !call.rang {
            call.rang = true;
            report.latency("ringing", now.saturating_duration_since(call.intended));
        }
    }

    fn on_invite_answer(
        &mut self,
        net: &mut Net,
        now: Instant,
        slot: usize,
        code: u16,
        (bytes, scan): (&[u8], &Scan),
        report: &mut Report,
    ) {
        let call = &mut self.calls[slot];
        if code >= 300 {
            let name =
                CallName { run: self.identity.run, slot: slot as u32, generation: call.generation };
            let to = scan.value(bytes, Name::To).unwrap_or_default();
            let identity = &self.identity;
            net.send(call.place, |out| ack_of_refusal(out, identity, name, to));
            return self.end(now, slot, false, &format!("INVITE {code}"), "setup", report);
        }
        report.latency("setup", now.saturating_duration_since(call.intended));
        call.dialog.read(bytes, scan);
        if let Some(instance) = call.dialog.instance {
            *report.instances.entry(instance).or_default() += 1;
        }
        call.stage = Stage::Talking;
        call.intended = now + self.hold;
        call.repeat.clear();
        if !self.is_stream()
            && let Some(next) = self.calls[slot].dialog.next_hop()
        {
            self.calls[slot].place = Place::Datagram(self.socket, next);
        }
        self.acknowledge(net, slot);
        if self.hold.is_zero() {
            self.leave(net, now, slot);
        } else {
            self.arm(now, slot);
        }
    }

    fn acknowledge(&self, net: &mut Net, slot: usize) {
        let call = &self.calls[slot];
        let name = self.name(slot, call.generation);
        net.send(call.place, |out| {
            in_dialog(out, &self.identity, name, ("ACK", 1), &call.dialog);
        });
    }

    fn leave(&mut self, net: &mut Net, now: Instant, slot: usize) {
        let generation = self.calls[slot].generation;
        let name = self.name(slot, generation);
        let call = &mut self.calls[slot];
        call.stage = Stage::Leaving;
        call.gives_up = now + self.timeout;
        call.interval = T1;
        call.repeat.clear();
        in_dialog(&mut call.repeat, &self.identity, name, ("BYE", 2), &call.dialog);
        net.send(call.place, |out| out.extend_from_slice(&call.repeat));
        self.arm(now, slot);
    }

    fn end(
        &mut self,
        now: Instant,
        slot: usize,
        good: bool,
        why: &str,
        what: &'static str,
        report: &mut Report,
    ) {
        let Some(call) = self.calls.try_remove(slot) else { return };
        if good {
            report.good += 1;
            report.latency(what, now.saturating_duration_since(call.intended));
        } else {
            report.fail(why);
        }
        self.spare.push((call.repeat, call.dialog));
    }

    pub(crate) fn on_time(&mut self, net: &mut Net, now: Instant, report: &mut Report) {
        let mut due = std::mem::take(&mut self.due);
        self.timers.advance(now, |key| due.push(key));
        for key in due.drain(..) {
            let slot = (key >> 32) as usize;
            let Some(call) = self.calls.get_mut(slot) else { continue };
            if timer_key(slot, call) != key {
                continue;
            }
            match call.stage {
                Stage::Talking => self.leave(net, now, slot),
                _ if now >= call.gives_up => {
                    let (why, what) = match call.stage {
                        Stage::Asked => ("no answer", "setup"),
                        _ => ("no answer to BYE", "bye"),
                    };
                    self.end(now, slot, false, why, what, report);
                }
                _ => {
                    if !call.repeat.is_empty() {
                        report.count("repeated_requests");
                        net.send(call.place, |out| out.extend_from_slice(&call.repeat));
                        call.interval *= 2;
                        if call.stage == Stage::Leaving {
                            call.interval = call.interval.min(T2);
                        }
                    }
                    self.arm(now, slot);
                }
            }
        }
        self.due = due;
    }
}

/// Names a call's stage, so that a timer of an earlier one is told apart.
fn timer_key(slot: usize, call: &Call) -> u64 {
    (slot as u64) << 32 | u64::from(call.generation << 2 | call.stage as u32)
}
