//! Goodbyes (RFC 6733 5.4), and what is left to do when a connection is gone.

use std::time::{Duration, Instant};

use strowger_contract::{
    ClassId, CloseCause, Closing, Endpoint, FlowId, LANE_ACCEPTED, Link, Note, Outbox,
    RequestOutcome, Router, Ticket,
};

use crate::SPACE;
use crate::answer::result;
use crate::avp::{Avps, FLAG_REQUEST, Header, code};
use crate::build::Builder;
use crate::engine::DiameterEngine;
use crate::onward::unbind_refused;
use crate::peer::{BUSY, DISCONNECT_PEER, DO_NOT_WANT_TO_TALK_TO_YOU, REBOOTING, State, link_name};
use crate::relay::note;

/// How many times Tw a backend is left alone that said it is busy, or wants no connection.
const BUSY_PAUSE: u32 = 2;
const UNWANTED_PAUSE: u32 = 20;

impl DiameterEngine {
    /// A DPR.
    pub(crate) fn on_dpr(
        &mut self,
        now: Instant,
        from: Endpoint,
        bytes: &[u8],
        header: &Header,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let mut avps = Avps::of(bytes).map_while(Result::ok);
        let cause = avps.find(|avp| avp.is(code::DISCONNECT_CAUSE)).and_then(|avp| avp.number());
        let watchdog = self.settings.options.watchdog.0;
        if from.as_link().is_some() {
            // RFC 6733 5.4.3 only forbids to come back at once; how long is ours to say.
            match cause {
                Some(BUSY) => out.hold_off(from, watchdog * BUSY_PAUSE),
                Some(DO_NOT_WANT_TO_TALK_TO_YOU) => out.hold_off(from, watchdog * UNWANTED_PAUSE),
                _ => {}
            }
        }
        self.answer_peer(from, header, result::SUCCESS, None, None, out);
        if let Some(peer) = self.peer(from) {
            peer.state = State::Leaving;
            peer.since = now;
        }
        match self.link_of(from) {
            // It closes when it has our DPA, and its answers under way may still come before that.
            Some(link) => self.set_link(now, link, Link::Suspect, router),
            None if self.is_idle(from, router) => out.close(from, Closing::Flushed),
            // The same; it is closed if it does not.
            None => {}
        }
        self.report(from, router);
    }

    pub(crate) fn disconnect(&mut self, now: Instant, to: Endpoint, cause: u32, out: &mut Outbox) {
        let end_to_end = self.next_end_to_end();
        if let Some(peer) = self.peer(to) {
            peer.state = State::Leaving;
            peer.since = now;
        }
        let identity = self.settings.identity();
        out.send(to, ClassId::CONTROL, |bytes| {
            Builder::new(bytes, FLAG_REQUEST, DISCONNECT_PEER, 0, end_to_end, end_to_end)
                .text(code::ORIGIN_HOST, identity.host)
                .text(code::ORIGIN_REALM, identity.realm)
                .number(code::DISCONNECT_CAUSE, cause)
                .finish();
        });
    }

    /// The link is wanted no longer.
    pub(crate) fn retire(
        &mut self,
        now: Instant,
        endpoint: Endpoint,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(link) = self.link_of(endpoint) else { return };
        self.set_link(now, link, Link::Suspect, router);
        // Not "do not want to talk to you": a drain may be taken back, and peers hold that against us.
        self.disconnect(now, endpoint, REBOOTING, out);
        self.report(endpoint, router);
    }

    pub(crate) fn on_client_gone(
        &mut self,
        now: Instant,
        flow: FlowId,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let gone = Endpoint::Client(flow);
        router.report_peer(&self.settings.listener, gone, None);
        let given_up: Vec<Ticket> = self
            .waiting
            .iter()
            .filter_map(|(&ticket, pending)| (pending.origin == gone).then_some(ticket))
            .collect();
        for ticket in given_up {
            router.withdraw(now, ticket);
            let Some(pending) = self.waiting.remove(&ticket) else { continue };
            // Its other copy, if it has one, is told of its end.
            if !self.is_covered(&pending) {
                unbind_refused(now, &pending, router);
                out.note(Note::Count("hung_up_waiting"));
                let (arrived, class) = (pending.arrived, pending.class);
                let outcome = RequestOutcome::Failed;
                note(now, arrived, class, outcome, None, Duration::ZERO, out);
            }
            self.pending.recycle(pending.request);
        }
        if flow.worker() != self.settings.worker {
            // It served as a backend's link.
            return self.fail_over_from(now, gone, false, router, out);
        }
        if let Some(peer) = self.clients.remove(&flow) {
            if let Some(backend) = peer.serves {
                let name = router.keyer().session(SPACE + 1, &link_name(backend));
                router.unname_flow(name, flow);
                let down = Link::Down(CloseCause::End);
                self.set_link(now, (backend, LANE_ACCEPTED), down, router);
                self.fail_over_from(now, gone, false, router, out);
            }
            self.name(flow, &peer.host, false, router);
            // Another connection of the same peer takes its requests from now on.
            let mut others = self.clients.iter();
            let other = others.find(|(_, other)| other.host.eq_ignore_ascii_case(&peer.host));
            if let Some(other) = other.map(|(&flow, _)| flow) {
                self.name(other, &peer.host, true, router);
            }
        }
    }

    pub(crate) fn on_link_gone(
        &mut self,
        now: Instant,
        endpoint: Endpoint,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(link) = endpoint.as_link() else { return };
        if self.backends.remove(&link).is_some() {
            router.report_peer(&self.settings.listener, endpoint, None);
            // The core was told by the runtime, or is told of a link that never was one.
            self.set_link(now, link, Link::Down(CloseCause::End), router);
        }
        self.fail_over_from(now, endpoint, false, router, out);
    }
}
