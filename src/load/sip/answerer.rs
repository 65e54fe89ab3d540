//! The instances behind the edge: they ring, answer, repeat their answers until acknowledged, and
//! refuse what is not theirs.

use std::time::{Duration, Instant};

use hashbrown::HashMap;
use slab::Slab;
use strowger_contract::{Wheel, stable_hash};
use strowger_sip::scan::{Name, Scan};

use super::message::{Identity, answer, method_of, tagged_instance};
use crate::load::net::{Net, Place};
use crate::load::report::Report;

const T1: Duration = Duration::from_millis(500);

/// Answers are repeated so long (64 x T1, RFC 3261 13.3.1.4).
const REPEATS: u32 = 7;

/// All instances of this process.
pub(crate) struct Answerers {
    /// The number that the first one goes by on the wire.
    first: usize,
    identities: Vec<Identity>,
    rings: bool,
    answer_after: Duration,
    calls: Slab<Answered>,
    by_call_id: HashMap<u64, usize>,
    timers: Wheel,
    /// What every instance got that was another's.
    pub(crate) misrouted: u64,
    serial: u32,
}

struct Answered {
    key: u64,
    instance: usize,
    to: Place,
    request: Vec<u8>,
    reply: Vec<u8>,
    repeats: u32,
    serial: u32,
}

impl Answerers {
    pub(crate) fn new(
        now: Instant,
        (first, identities): (usize, Vec<Identity>),
        rings: bool,
        answer_after: Duration,
    ) -> Self {
        Self {
            first,
            identities,
            rings,
            answer_after,
            calls: Slab::new(),
            by_call_id: HashMap::new(),
            timers: Wheel::new(now),
            misrouted: 0,
            serial: 0,
        }
    }

    pub(crate) fn next(&self) -> Option<Instant> {
        self.timers.next()
    }

    pub(crate) fn on_request(
        &mut self,
        net: &mut Net,
        now: Instant,
        from: Place,
        instance: usize,
        (bytes, scan): (&[u8], &Scan),
        report: &mut Report,
    ) {
        let method = method_of(bytes);
        let me = &self.identities[instance];
        let instance = self.first + instance;
        let to = scan.value(bytes, Name::To).unwrap_or_default();
        if tagged_instance(to).is_some_and(|owner| owner != instance) {
            self.misrouted += 1;
            if method != b"ACK" {
                net.send(from, |out| answer(out, me, instance, (481, "Not Mine"), bytes, scan));
            }
            return;
        }
        let key = stable_hash(scan.value(bytes, Name::CallId).unwrap_or_default());
        match method {
            b"INVITE" => {
                if let Some(known) =
                    self.by_call_id.get(&key).and_then(|slot| self.calls.get(*slot))
                {
                    report.count("repeated_requests_at_instances");
                    if !known.reply.is_empty() {
                        net.send(from, |out| out.extend_from_slice(&known.reply));
                    }
                    return;
                }
                if self.rings {
                    net.send(from, |out| answer(out, me, instance, (180, "Ringing"), bytes, scan));
                }
                self.serial = self.serial.wrapping_add(1);
                let mut call = Answered {
                    key,
                    instance,
                    to: from,
                    request: Vec::new(),
                    reply: Vec::new(),
                    repeats: 0,
                    serial: self.serial,
                };
                let pause = if self.answer_after.is_zero() {
                    answer(&mut call.reply, me, instance, (200, "OK"), bytes, scan);
                    net.send(from, |out| out.extend_from_slice(&call.reply));
                    T1
                } else {
                    call.request.extend_from_slice(bytes);
                    self.answer_after
                };
                let serial = call.serial;
                let slot = self.calls.insert(call);
                self.by_call_id.insert(key, slot);
                self.timers.insert(now + pause, timer_key(slot, serial));
            }
            b"ACK" => {
                self.forget(key);
            }
            b"CANCEL" => {
                net.send(from, |out| answer(out, me, instance, (200, "OK"), bytes, scan));
            }
            _ => net.send(from, |out| answer(out, me, instance, (200, "OK"), bytes, scan)),
        }
    }

    pub(crate) fn on_time(&mut self, net: &mut Net, now: Instant, report: &mut Report) {
        let mut due = Vec::new();
        self.timers.advance(now, |key| due.push(key));
        for timer in due {
            let slot = (timer >> 32) as usize;
            let Some(call) = self.calls.get_mut(slot) else { continue };
            if timer_key(slot, call.serial) != timer {
                continue;
            }
            if call.reply.is_empty() {
                let mut scan = Scan::default();
                if scan.scan(&call.request).is_ok() {
                    let me = &self.identities[call.instance - self.first];
                    let reply = &mut call.reply;
                    answer(reply, me, call.instance, (200, "OK"), &call.request, &scan);
                }
            } else {
                call.repeats += 1;
                report.count("repeated_answers");
                if call.repeats > REPEATS {
                    report.count("answers_never_acknowledged");
                    let key = call.key;
                    self.forget(key);
                    continue;
                }
            }
            net.send(call.to, |out| out.extend_from_slice(&call.reply));
            let pause = (T1 * 2u32.pow(call.repeats)).min(Duration::from_secs(4));
            self.timers.insert(now + pause, timer);
        }
    }

    fn forget(&mut self, key: u64) {
        if let Some(slot) = self.by_call_id.remove(&key) {
            self.calls.try_remove(slot);
        }
    }
}

fn timer_key(slot: usize, serial: u32) -> u64 {
    (slot as u64) << 32 | u64::from(serial)
}
