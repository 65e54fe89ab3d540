//! Hedging: a request that its server is slow with goes to a second one as well, and the first answer
//! wins.
//!
//! Only commands that the configuration names (it thereby says that doing them twice does no harm), only
//! requests that begin and belong to no session, once, before the promised time is over, within the pool's
//! retry budget, and only if the second server has a slot at once. The copy bears T (RFC 6733 3): its server
//! must know that another may have done the same. What loses keeps its slot until its server answers, since
//! the server works on it; its answer is dropped and counted.

use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use strowger_contract::duration::Span;
use strowger_contract::{Note, Outbox, Outcome, Router};

use crate::engine::DiameterEngine;
use crate::mediation::rules::Value;
use crate::onward::Choice;
use crate::pending::Pending;

/// Which requests are sent twice, and when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Hedge {
    /// Commands, by name or code, that do no harm when two servers do them. Never 272.
    pub commands: Vec<Value>,
    /// A server that has not answered for so long is not waited for alone: 1 ms to 10 s.
    pub after: Span,
}

/// The same, ready for use.
pub(crate) struct Hedging {
    pub(crate) commands: Vec<u32>,
    pub(crate) after: Duration,
}

impl Hedging {
    /// When a request that is sent for the first time is hedged, if it ever is.
    fn at(&self, now: Instant, pending: &Pending) -> Option<Instant> {
        let harmless = pending.pool.is_some()
            && pending.tries == 1
            && pending.twin.is_none()
            && pending.session.is_none()
            && !(pending.in_session || pending.fixed || pending.binds || pending.follows)
            && self.commands.contains(&pending.command);
        let at = now + self.after;
        (harmless && at < pending.deadline).then_some(at)
    }
}

impl DiameterEngine {
    /// Notes when a request that was just sent is hedged, and which copy goes with which.
    pub(crate) fn note_copies(&mut self, now: Instant, identifier: u32) {
        if self.settings.hedging.is_none() {
            return;
        }
        let Some(twin) = self.pending.get(identifier).map(|pending| pending.twin) else { return };
        if let Some(twin) = twin.and_then(|twin| self.pending.get(twin)) {
            twin.twin = Some(identifier);
        }
        let Some(pending) = self.pending.get(identifier) else { return };
        let at = self.settings.hedging.as_ref().and_then(|hedging| hedging.at(now, pending));
        pending.hedge_at = at;
        if let Some(at) = at {
            self.schedule(now, at, identifier);
        }
    }

    /// The server is slow: another one is asked as well.
    pub(crate) fn hedge(
        &mut self,
        now: Instant,
        identifier: u32,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(pending) = self.pending.get(identifier) else { return };
        if pending.hedge_at.is_none_or(|at| at > now) {
            return;
        }
        pending.hedge_at = None;
        if pending.lost || pending.twin.is_some() || pending.deadline <= now {
            return;
        }
        let copy = pending.copy(identifier);
        if !self.may_try_again(now, &copy, router) {
            return;
        }
        match self.choose(now, &copy, None, false, router) {
            Choice::Go(backend) => {
                out.note(Note::Count("diameter_hedges"));
                out.note(Note::Retry("hedged"));
                self.go(now, copy, backend, router, out);
            }
            // What is slow is not helped by what waits.
            Choice::Wait(ticket) => router.withdraw(now, ticket),
            Choice::No(_) => {}
        }
    }

    /// Whether nobody waits for what becomes of this request: the race is lost, or the other copy goes on
    /// alone. It was taken out of what is under way.
    pub(crate) fn is_covered(&mut self, pending: &Pending) -> bool {
        if pending.lost {
            return true;
        }
        let twin = pending.twin.and_then(|twin| self.pending.get(twin));
        let alive = twin.filter(|twin| !twin.lost);
        alive.map(|twin| twin.twin = None).is_some()
    }

    /// An answer that comes second: the server's slot is free, and nobody hears of it.
    pub(crate) fn on_lost_race(
        &mut self,
        now: Instant,
        identifier: u32,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(pending) = self.pending.remove(identifier) else { return };
        if let Some(backend) = pending.backend {
            let latency = now.saturating_duration_since(pending.sent);
            router.outcome(now, backend, Outcome::Answered { latency });
        }
        out.drop_message("hedge_lost");
        self.pending.recycle(pending.request);
    }

    /// The request is answered: whatever its other copy comes to is nobody's any more.
    pub(crate) fn wins(&mut self, pending: &Pending) {
        if let Some(twin) = pending.twin.and_then(|twin| self.pending.get(twin)) {
            (twin.lost, twin.twin, twin.hedge_at) = (true, None, None);
        }
    }
}
