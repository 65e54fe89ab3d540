//! Answers on their way back (RFC 6733 6.2), and what happens when none comes (5.5.4).

use std::time::{Duration, Instant};

use strowger_contract::{
    BackendId, ClassId, Endpoint, LANE_ACCEPTED, Lanes, Message, Note, Outbox, Outcome,
    RequestOutcome, Router,
};

use crate::answer::{error, result};
use crate::avp::{FLAG_ERROR, Header, Summary};
use crate::classify;
use crate::duplicates;
use crate::engine::DiameterEngine;
use crate::mediation::Applied;
use crate::onward::{header_of, unbind_refused};
use crate::overload::{self, About, realm_hash};
use crate::pending::{Pending, Pendings};
use crate::redirect::{self, Indication, Kept};
use crate::relay::note;
use crate::rewrite;
use crate::subscriber::Subscriber;

/// DIAMETER_REDIRECT_INDICATION (RFC 6733 7.1.3).
const REDIRECT_INDICATION: u32 = 3_006;

/// The share of new sessions that a backend keeps for a while after it said that it is too busy.
const BUSY_PERMILLE: u32 = 500;

impl DiameterEngine {
    pub(crate) fn on_answer(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        header: &Header,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let identifier = header.hop_by_hop;
        let worker = Pendings::worker_of(identifier);
        if worker != self.settings.worker && worker.0 < self.settings.workers {
            return out.hand_over(worker, message);
        }
        // RFC 6733 3: the End-to-End identifier comes back too. The other one may be of a request that
        // went over the same connection long ago.
        let is_its =
            |it: &&mut Pending| it.to == message.from && it.end_to_end == header.end_to_end;
        let Some(pending) = self.pending.get(identifier).filter(is_its) else {
            return out.drop_message("answer_unmatched");
        };
        if pending.lost {
            return self.on_lost_race(now, identifier, router, out);
        }
        let (backend, application) = (pending.backend, pending.application);
        let summary = Summary::of(message.bytes);
        if let Some(backend) = backend {
            if summary.tells_load {
                self.heed(now, message.bytes, &summary, backend, identifier, router, out);
            }
            if let Some(code) = summary.result() {
                if code == result::TOO_BUSY && self.is_own(backend, &summary, router) {
                    // From the adjacent peer itself; what a node behind it says is not its state.
                    let lasting = self.settings.options.overload.busy.0;
                    router.favour(now, backend, BUSY_PERMILLE, lasting);
                }
                if code == REDIRECT_INDICATION && header.flags & FLAG_ERROR != 0 {
                    return self.on_redirect(now, message, identifier, router, out);
                }
                if self.settings.reroutes(application, code) {
                    return self.on_refusal(now, message, identifier, code, router, out);
                }
            }
        }
        let Some(pending) = self.pending.remove(identifier) else { return };
        if let Some(backend) = backend {
            let latency = now.saturating_duration_since(pending.sent);
            router.outcome(now, backend, Outcome::Answered { latency });
        }
        self.learn_from(now, &pending, &summary, router, out);
        self.deliver(now, pending, message.bytes, None, out);
    }

    /// Whether the adjacent peer itself answered.
    fn is_own(&self, backend: BackendId, summary: &Summary<'_>, router: &dyn Router) -> bool {
        let host = summary.origin_host.unwrap_or_default();
        let pool = router.backend(backend).map(|view| view.pool);
        pool.is_some_and(|pool| router.named(pool, host) == Some(backend))
    }

    /// What an answer says of the session and its subscriber.
    fn learn_from(
        &mut self,
        now: Instant,
        pending: &Pending,
        summary: &Summary<'_>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(code) = summary.result() else { return };
        let success = (2_000..3_000).contains(&code);
        let unknown = self.settings.options.bindings.unbind_on.contains(&code);
        if pending.follows
            && unknown
            && let Some(pool) = pending.pool
        {
            // The server does not know the address: whoever had it is gone (a suspect binding).
            let keys = Subscriber::of(&pending.request).keys(pool, router);
            for key in keys.iter().filter(|key| key.is_exclusive()) {
                out.note(Note::Count("diameter_binding_suspect"));
                router.forget_bound(now, key);
            }
        }
        let Some(session) = pending.session else { return };
        let over = pending.ends_session && success
            || pending.in_session && unknown
            || pending.binds && !success;
        if over {
            router.forget(now, session);
            if router.unbind(now, session) && !success {
                out.note(Note::Count("diameter_binding_dropped"));
            }
        }
    }

    /// Overload and load reports.
    #[allow(clippy::too_many_arguments, reason = "what every handler gets")]
    fn heed(
        &mut self,
        now: Instant,
        bytes: &[u8],
        summary: &Summary<'_>,
        backend: BackendId,
        identifier: u32,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(pending) = self.pending.get(identifier) else { return };
        let (application, pool) = (pending.application, pending.pool);
        if self.settings.options.overload.doic {
            for report in overload::reports(bytes) {
                let about = match (report.of_realm, pool) {
                    (true, Some(pool)) => {
                        let realm = realm_hash(summary.origin_realm.unwrap_or_default());
                        About::Realm(realm, pool, application)
                    }
                    _ => About::Host(backend, application),
                };
                if self.reports.note(now, &report, about) {
                    out.note(Note::Count("diameter_overload_reports"));
                } else if self.reports.is_full() {
                    out.note(Note::Count("diameter_reports_full"));
                }
            }
        }
        if self.settings.options.overload.load {
            overload::heed_load(now, bytes, backend, router);
        }
    }

    /// An error that another backend may not have. T is not set for it, since an answer was received
    /// (RFC 6733 3); one that was lost before keeps it.
    fn on_refusal(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        identifier: u32,
        code: u32,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(mut pending) = self.pending.remove(identifier) else { return };
        if let Some(backend) = pending.backend.take() {
            router.outcome(now, backend, Outcome::Refused);
        }
        let why = match code {
            result::TOO_BUSY => "answered_busy",
            result::UNABLE_TO_DELIVER => "answered_undeliverable",
            _ => "answered_error",
        };
        if self.is_covered(&pending) {
            out.drop_message("hedge_refused");
            return self.pending.recycle(pending.request);
        }
        if let Err(pending) = self.go_elsewhere(now, pending, (None, why), router, out) {
            self.learn_from(now, &pending, &Summary::of(message.bytes), router, out);
            self.deliver(now, *pending, message.bytes, Some(RequestOutcome::Failed), out);
        }
    }

    /// RFC 6733 6.1.8: the request goes to one of the hosts that the answer names, if that is a
    /// backend of ours; else the client may see to it.
    fn on_redirect(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        identifier: u32,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(mut pending) = self.pending.remove(identifier) else { return };
        if let Some(backend) = pending.backend.take() {
            let latency = now.saturating_duration_since(pending.sent);
            router.outcome(now, backend, Outcome::Answered { latency });
        }
        let pools = &self.settings.pools;
        let named = redirect::hosts(message.bytes).find_map(|host| {
            let found = pools.iter().find_map(|&pool| router.named(pool, host))?;
            router.backend(found).filter(|view| view.is_linked).map(|view| (found, view.pin))
        });
        let (Some((backend, pin)), true) =
            (named, pending.redirects < self.settings.options.redirects)
        else {
            self.learn_from(now, &pending, &Summary::of(message.bytes), router, out);
            return self.deliver(now, pending, message.bytes, Some(RequestOutcome::Failed), out);
        };
        pending.redirects += 1;
        // What a redirect agent sends on was not processed: it costs no try.
        pending.tries = pending.tries.saturating_sub(1);
        if let Some(header) = header_of(&pending) {
            let summary = Summary::of(&pending.request);
            let user = Subscriber::of(&pending.request).imsi.unwrap_or_default();
            let indication = Indication::read(message.bytes);
            match self.redirects.keep(now, indication, (&header, &summary, user), backend) {
                Kept::Yes => out.note(Note::Count("diameter_redirects_kept")),
                Kept::Full => out.note(Note::Count("diameter_redirects_full")),
                Kept::No => {}
            }
        }
        if let Err(pending) =
            self.go_elsewhere(now, pending, (Some(pin), "redirected"), router, out)
        {
            self.learn_from(now, &pending, &Summary::of(message.bytes), router, out);
            self.deliver(now, *pending, message.bytes, Some(RequestOutcome::Failed), out);
        }
    }

    /// The answer goes back.
    fn deliver(
        &mut self,
        now: Instant,
        pending: Pending,
        answer: &[u8],
        outcome: Option<RequestOutcome>,
        out: &mut Outbox,
    ) {
        self.wins(&pending);
        let timely =
            if now <= pending.deadline { RequestOutcome::Met } else { RequestOutcome::Late };
        let last = usize::from(pending.tries).checked_sub(1);
        let backend = last.and_then(|last| pending.tried.get(last).copied());
        let at_backend = now.saturating_duration_since(pending.sent);
        let outcome = outcome.unwrap_or(timely);
        note(now, pending.arrived, pending.class, outcome, backend, at_backend, out);
        let summary = Summary::of(answer);
        if backend.is_some()
            && let Some(code) = summary.result()
        {
            let method = classify::word(pending.application, pending.command);
            out.note(Note::Answer { method, class: (code / 1_000).min(9) as u8, backend });
        }
        let strip = self.settings.options.overload.load && summary.tells_load;
        let client = match pending.origin {
            Endpoint::Client(_) => self.identity_of(pending.origin),
            _ => None,
        };
        let (changes, rules) = (&mut self.changes, pending.rules.as_deref());
        let mut applied = Applied::default();
        out.send(pending.origin, ClassId::CONTROL, |bytes| {
            let start = bytes.len();
            rewrite::answer(answer, pending.hop_by_hop, bytes);
            if strip {
                overload::strip_peer_load(bytes, start);
            }
            applied = match client {
                Some(client) => changes.for_client(bytes, start, &client, rules),
                None => changes.for_backend(bytes, start, None),
            };
        });
        applied.note(out);
        self.keep_answer(now, &pending, answer);
        if self.duplicates.was_cut_short() {
            out.note(Note::Count("diameter_duplicates_full"));
        }
        self.pending.recycle(pending.request);
    }

    fn keep_answer(&mut self, now: Instant, pending: &Pending, answer: &[u8]) {
        let lasting = self.settings.options.duplicates.0;
        if !lasting.is_zero() {
            let host = Summary::of(&pending.request).origin_host.unwrap_or_default();
            let key = duplicates::key(host, pending.end_to_end);
            self.duplicates.keep(now, key, answer, lasting);
        }
    }

    /// An answer of our own to a request that was taken in.
    pub(crate) fn answer_with(&self, pending: &Pending, what: (u32, &str), out: &mut Outbox) {
        let identity = self.settings.identity();
        out.send(pending.origin, ClassId::CONTROL, |bytes| {
            error(&pending.request, identity, what.0, what.1, None, bytes)
        });
    }

    /// There will be no answer but ours.
    pub(crate) fn give_up(
        &mut self,
        now: Instant,
        pending: Pending,
        what: (u32, &str),
        outcome: RequestOutcome,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        if self.is_covered(&pending) {
            return self.pending.recycle(pending.request);
        }
        self.answer_with(&pending, what, out);
        unbind_refused(now, &pending, router);
        note(now, pending.arrived, pending.class, outcome, None, Duration::ZERO, out);
        self.pending.recycle(pending.request);
    }

    /// RFC 6733 5.5.4: what waits for a connection that is gone goes over another one, with T: to the
    /// same backend if it has more of them, else to another. With `silent` the connection is there and
    /// nothing comes over it: its siblings are used only if the backend has answered since.
    pub(crate) fn fail_over_from(
        &mut self,
        now: Instant,
        peer: Endpoint,
        silent: bool,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let lost = Lanes::bit(lane_of(peer));
        for identifier in self.pending.find(|pending| pending.to == peer) {
            let Some(mut pending) = self.pending.remove(identifier) else { continue };
            pending.resent = true;
            if pending.lost {
                if let Some(backend) = pending.backend {
                    router.outcome(now, backend, Outcome::Lost);
                }
                self.pending.recycle(pending.request);
                continue;
            }
            // Each connection once: those of one backend are not further tries at others.
            pending.lanes_lost |= lost;
            if let Some(backend) = pending.backend
                && pending.expires > now
                && (!silent || answered_since(backend, pending.sent, router))
                && let Some(to) = self.lane_to(backend, pending.lanes_lost, router)
            {
                // It keeps its place at the backend.
                out.note(Note::Retry("connection_lost"));
                pending.tries = pending.tries.saturating_sub(1);
                self.go_over(now, pending, (backend, to), router, out);
                continue;
            }
            if let Some(backend) = pending.backend.take() {
                router.outcome(now, backend, Outcome::Lost);
            }
            if let Err(pending) = self.go_elsewhere(now, pending, (None, "link_lost"), router, out)
            {
                let what =
                    (result::UNABLE_TO_DELIVER, "the server was lost, and there is no other");
                self.give_up(now, *pending, what, RequestOutcome::Failed, router, out);
            }
        }
    }

    /// Requests over links that another worker found dead.
    pub(crate) fn fail_over_from_dead(
        &mut self,
        now: Instant,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let mut at: Vec<(BackendId, Endpoint)> = Vec::new();
        self.pending.each(|pending| {
            if let Some(backend) = pending.backend
                && !at.contains(&(backend, pending.to))
            {
                at.push((backend, pending.to));
            }
        });
        for (backend, to) in at {
            let lanes = router.backend(backend).map(|view| view.lanes);
            if lanes.is_some_and(|lanes| lanes.down & Lanes::bit(lane_of(to)) != 0) {
                self.fail_over_from(now, to, false, router, out);
            }
        }
    }

    /// No answer came in time.
    pub(crate) fn on_expired(
        &mut self,
        now: Instant,
        identifier: u32,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        if self.pending.get(identifier).is_none_or(|pending| pending.expires > now) {
            return;
        }
        let Some(pending) = self.pending.remove(identifier) else { return };
        if let Some(backend) = pending.backend {
            router.outcome(now, backend, Outcome::TimedOut);
        }
        let what = (result::UNABLE_TO_DELIVER, "no answer came in time");
        self.give_up(now, pending, what, RequestOutcome::Expired, router, out);
    }
}

/// Whether a backend has answered anything on any connection since.
fn answered_since(backend: BackendId, since: Instant, router: &dyn Router) -> bool {
    router.backend(backend).and_then(|view| view.answered).is_some_and(|answered| answered > since)
}

/// Which of a backend's links a request went over.
fn lane_of(to: Endpoint) -> u8 {
    to.as_link().map_or(LANE_ACCEPTED, |(_, lane)| lane)
}
