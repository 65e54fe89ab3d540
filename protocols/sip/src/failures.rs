//! Legs that say nothing: silent for too long, expired (Timers B, F, C), or lost with their connection.

use std::time::Instant;

use strowger_contract::{CloseCause, Note, Outbox, Router, Transport};

use crate::answers::At;
use crate::engine::SipEngine;
use crate::finish::Verdicts;
use crate::place::NextHop;
use crate::transaction::{Cancel, LegState, State};

impl SipEngine {
    /// The instance gave no sign of life.
    pub(crate) fn on_silence(
        &mut self,
        now: Instant,
        at: At,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(leg) = self.transactions.get(at.0).and_then(|known| known.leg(at.1)) else {
            return;
        };
        leg.failover_at = None;
        if let Some(backend) = leg.backend {
            self.pace.silent(now, backend);
        }
        self.settle_leg(now, at.0, at.1, Verdicts::TimedOut, router);
        // Without another it is reminded on until Timer B or F.
        if self.fail_over(now, at.0, "silent", router, out) {
            out.note(Note::Count("sip_failovers"));
            if let Some(leg) = self.transactions.get(at.0).and_then(|known| known.leg(at.1)) {
                leg.abandoned = true;
                leg.rest();
            }
        }
    }

    /// Timers B, F and C.
    pub(crate) fn on_expired(
        &mut self,
        now: Instant,
        at: At,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(transaction) = self.transactions.get(at.0) else { return };
        let invite = transaction.is_invite();
        let Some(leg) = transaction.leg(at.1) else { return };
        leg.expires_at = None;
        if invite && leg.state == LegState::Proceeding && leg.cancel == Cancel::No {
            // 16.8: Timer C ends a call that rings too long.
            leg.cancel = Cancel::Wanted;
            return self.send_cancel(now, at, out);
        }
        leg.state = LegState::Ended;
        leg.rest();
        self.settle_leg(now, at.0, at.1, Verdicts::TimedOut, router);
        self.consider_ours(at.0, 408, "Request Timeout");
        self.conclude(now, at.0, router, out);
    }

    /// The connection that a leg went over is gone, or its address is unreachable.
    pub(crate) fn on_lost(
        &mut self,
        now: Instant,
        slot: u32,
        attempt: u8,
        _cause: CloseCause,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        let open = transaction.state == State::Open;
        let Some(leg) = transaction.leg(attempt) else { return };
        let (rang, upgraded, late) = (leg.rang, leg.upgraded, leg.abandoned);
        let is_flow = leg.is_flow;
        let hop = NextHop {
            backend: leg.backend,
            pin: leg.pin,
            transport: Transport::Udp,
            flow: None,
            address: leg.address,
        };
        leg.state = LegState::Ended;
        leg.rest();
        if upgraded && !rang && open {
            // RFC 3261 18.1.1: it takes no TCP; as a datagram after all.
            leg.owed = false;
            leg.abandoned = true;
            self.large.refused(now, hop.address);
            if self.send_as_datagram(now, slot, hop, router, out) {
                return self.schedule(now, slot);
            }
        }
        if let Some(backend) = hop.backend {
            self.pace.silent(now, backend);
        }
        self.settle_leg(now, slot, attempt, Verdicts::Lost, router);
        if !open || late {
            return self.schedule(now, slot);
        }
        if !rang && self.fail_over(now, slot, "connection_lost", router, out) {
            if let Some(leg) = self.transactions.get(slot).and_then(|known| known.leg(attempt)) {
                leg.abandoned = true;
            }
        } else {
            if is_flow {
                // RFC 5626 5.3: the registrar forgets the flow and tries the user's others.
                out.note(Note::Count("sip_flows_failed"));
                self.consider_ours(slot, 430, "Flow Failed");
            } else {
                self.consider_ours(slot, 500, "Connection To The Instance Lost");
            }
            self.conclude(now, slot, router, out);
        }
        self.schedule(now, slot);
    }

    fn send_as_datagram(
        &mut self,
        now: Instant,
        slot: u32,
        hop: NextHop,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) -> bool {
        let sent = self.with_request(slot, |engine, request, scan| {
            let wanted = engine.target_again(slot, request, scan, router)?;
            engine.send_leg(now, slot, request, scan, &wanted, hop, true, router, out).ok()
        });
        sent.flatten().is_some()
    }
}
