//! Answers to what is under way (RFC 3261 16.7, 16.10, RFC 6026): which goes to the client, which ends a
//! leg, and what is tried next.

use std::time::{Duration, Instant};

use strowger_contract::{ClassId, Message, Note, Outbox, RequestOutcome, Router};

use crate::engine::SipEngine;
use crate::finish::Verdicts;
use crate::incoming::seconds;
use crate::method::Method;
use crate::respond::{Answer, follow_up};
use crate::scan::{Name, Scan};
use crate::transaction::{Cancel, LegState, Naming, State};
use crate::uri::{name_addr, parameter};
use crate::write::{all_values, end_of_headers};

/// A leg of a transaction: the slot and the try's number.
pub(crate) type At = (u32, u8);

/// Contacts of 3xx answers that one request follows, at most.
const REDIRECTIONS_MAX: u8 = 5;

/// How long the instance that asked for credentials is remembered: it alone may know its nonce.
const CHALLENGE_TIME: Duration = Duration::from_secs(60);

/// Why a final answer that comes after another is dropped.
fn repeated(late: bool, hedged: bool) -> &'static str {
    match (late, hedged) {
        (true, true) => "hedge_lost",
        (true, false) => "answer_late",
        (false, _) => "answer_repeated",
    }
}

impl SipEngine {
    /// An answer to what is under way.
    #[allow(clippy::too_many_arguments, reason = "what every handler gets")]
    pub(crate) fn on_answer(
        &mut self,
        now: Instant,
        at: At,
        message: &Message<'_>,
        scan: &Scan,
        code: u16,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        self.note_pace(now, at, scan, message.bytes, code);
        match code {
            100..200 => self.on_provisional(now, at, message, scan, code, router, out),
            200..300 => self.on_success(now, at, message, scan, code, router, out),
            _ => self.on_failure(now, at, message, scan, code, router, out),
        }
        self.schedule(now, at.0);
    }

    /// What the answer says of its instance's pace.
    fn note_pace(&mut self, now: Instant, at: At, scan: &Scan, bytes: &[u8], code: u16) {
        let Some(transaction) = self.transactions.get(at.0) else { return };
        let invite = transaction.is_invite();
        let Some(leg) = transaction.leg(at.1) else { return };
        let Some(backend) = leg.backend else { return };
        let first = leg.state == LegState::Calling && !leg.abandoned;
        let took = first.then(|| now.saturating_duration_since(leg.sent_at));
        if code != 503 {
            return self.pace.heard(backend, invite, took);
        }
        let wanted = scan.value(bytes, Name::RetryAfter).and_then(seconds);
        // An instance that asks for an hour, or all that ask for five minutes, shall not take the
        // service down: the rest is bounded, and void when nobody else is left.
        let rest = wanted.map(|wanted| wanted.min(self.settings.options.retry_after_max.0));
        if let Some(rest) = rest.filter(|rest| !rest.is_zero()) {
            self.pace.rest(now, backend, rest);
        }
    }

    #[allow(clippy::too_many_arguments, reason = "what every handler gets")]
    fn on_provisional(
        &mut self,
        now: Instant,
        at: At,
        message: &Message<'_>,
        scan: &Scan,
        code: u16,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let (t2, timer_c) = (self.settings.options.t2.0, self.settings.options.timer_c.0);
        let Some(transaction) = self.transactions.get(at.0) else { return };
        let (invite, state, method) =
            (transaction.is_invite(), transaction.state, transaction.method);
        let (waited, first) =
            (now.saturating_duration_since(transaction.arrived), transaction.ringing.is_none());
        let Some(leg) = transaction.leg(at.1) else { return };
        if leg.answered {
            return out.drop_message("answer_repeated");
        }
        leg.failover_at = None;
        leg.rang |= code > 100;
        if leg.state == LegState::Calling {
            leg.state = LegState::Proceeding;
        }
        if leg.abandoned || leg.state == LegState::Ended || leg.cancel == Cancel::Wanted {
            // It was given up or is to be cancelled, and can be told only now (9.1).
            if invite && leg.cancel != Cancel::Sent {
                self.send_cancel(now, at, out);
            }
            if !self.transactions.get(at.0).is_some_and(|known| known.cancelled) {
                return;
            }
        }
        if state != State::Open {
            return;
        }
        let backend = {
            let Some(leg) = self.transactions.get(at.0).and_then(|known| known.leg(at.1)) else {
                return;
            };
            if invite {
                // Once it is cancelled, ringing on wins it no more time.
                if leg.cancel != Cancel::Sent {
                    leg.repeat_at = None;
                    leg.expires_at = Some(now + timer_c);
                }
            } else if leg.repeat_at.is_some() {
                // 17.1.2.2: once it is known to be alive, it is reminded every T2.
                leg.repeat_after = t2;
            }
            leg.backend
        };
        let Some(transaction) = self.transactions.get(at.0) else { return };
        transaction.first_answer.get_or_insert(waited);
        if code > 100 {
            transaction.ringing.get_or_insert(waited);
            if first {
                out.note(Note::Answer { method: method.word(), class: 1, backend });
            }
            self.relay(at.0, message.bytes, scan, router, out);
        }
    }

    #[allow(clippy::too_many_arguments, reason = "what every handler gets")]
    fn on_success(
        &mut self,
        now: Instant,
        at: At,
        message: &Message<'_>,
        scan: &Scan,
        code: u16,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let timeout = self.settings.timeout();
        let slot = at.0;
        let Some(transaction) = self.transactions.get(slot) else { return };
        let (state, invite, method, hedged) =
            (transaction.state, transaction.is_invite(), transaction.method, transaction.hedged);
        let Some(leg) = transaction.leg(at.1) else { return };
        let late = leg.abandoned;
        let backend = leg.backend;
        (leg.state, leg.answered) = (LegState::Ended, true);
        leg.rest();
        if late && invite {
            out.note(Note::Count("sip_late_success"));
        }
        if state == State::Open {
            // Before its slot is given back: the call's is free as well for whoever waits.
            self.bye_ended(now, slot, (code, false), router, out);
        } else {
            if invite {
                self.call_answered_again(now, at, message.bytes, scan, router, out);
            }
            self.settle_leg(now, slot, at.1, Verdicts::Answered, router);
            if !invite {
                return out.drop_message(repeated(late, hedged));
            }
            // RFC 3261 16.7 step 5: a 2xx is always passed on, also behind another answer.
            return self.relay_beside(slot, message.bytes, scan, router, out);
        }
        self.is_race_on(at, false);
        self.cancel_legs(now, slot, Some(at.1), out);
        let Some(transaction) = self.transactions.get(slot) else { return };
        transaction.answered_by = backend;
        transaction.state = if invite { State::Accepted } else { State::Completed };
        transaction.contacts.clear();
        transaction.named = Naming::default();
        // Timers L (INVITE) and J.
        let wait = if invite || !transaction.client_reliable {
            timeout
        } else {
            self.settings.options.t4.0
        };
        let ticket = transaction.ticket;
        if let Some(ticket) = ticket {
            self.transactions.waited(ticket);
            router.withdraw(now, ticket);
        }
        if let Some(transaction) = self.transactions.get(slot) {
            transaction.ends_at = Some(now + wait);
        }
        out.note(Note::Answer { method: method.word(), class: 2, backend });
        self.call_answered(now, slot, message.bytes, scan, router, out);
        // Not before the call has taken its slot: whoever waits would get it in between.
        self.settle_leg(now, slot, at.1, Verdicts::Answered, router);
        self.settle_others(now, slot, router);
        self.bind(now, slot, message.bytes, scan, router);
        self.relay(slot, message.bytes, scan, router, out);
        self.note_attempt(now, slot, code, false, out);
        self.note_end(now, slot, None, out);
    }

    /// A REGISTER that an instance took: its user's requests go there, for as long as it said.
    fn bind(
        &mut self,
        now: Instant,
        slot: u32,
        message: &[u8],
        scan: &Scan,
        router: &mut dyn Router,
    ) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        let (Method::Register, Some(backend)) = (transaction.method, transaction.answered_by)
        else {
            return;
        };
        let class = transaction.class;
        let Some(record) = self.record_of(Method::Register, message, scan, b"", router) else {
            return;
        };
        let whole = scan.value(message, Name::Expires).and_then(seconds);
        let longest = all_values(message, scan, Name::Contact)
            .map(|contact| {
                let own = name_addr(contact)
                    .and_then(|(_, parameters)| parameter(parameters, b"expires").flatten())
                    .and_then(seconds);
                own.or(whole).unwrap_or(Duration::from_secs(3_600))
            })
            .max();
        match longest.filter(|longest| !longest.is_zero()) {
            Some(longest) => router.learn(now, record, backend, class, longest),
            None => router.forget(now, record),
        }
    }

    #[allow(clippy::too_many_arguments, reason = "what every handler gets")]
    fn on_failure(
        &mut self,
        now: Instant,
        at: At,
        message: &Message<'_>,
        scan: &Scan,
        code: u16,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let slot = at.0;
        let Some(transaction) = self.transactions.get(slot) else { return };
        if transaction.is_invite() {
            // 17.1.1.2: each one is acknowledged, also repetitions.
            self.acknowledge(at, message.bytes, scan, out);
        }
        let Some(transaction) = self.transactions.get(slot) else { return };
        let (state, hedged) = (transaction.state, transaction.hedged);
        let Some(leg) = transaction.leg(at.1) else { return };
        let (was_done, late, rang) = (leg.state == LegState::Ended, leg.abandoned, leg.rang);
        let backend = leg.backend;
        (leg.state, leg.answered) = (LegState::Ended, true);
        leg.rest();
        let refuses = backend.is_some() && self.settings.options.failover_codes.contains(&code);
        let verdict = if code == 503 || refuses { Verdicts::Refused } else { Verdicts::Answered };
        if !was_done && state == State::Open {
            self.bye_ended(now, slot, (code, false), router, out);
        }
        self.settle_leg(now, slot, at.1, verdict, router);
        if was_done || state != State::Open {
            return out.drop_message(repeated(late && !was_done, hedged));
        }
        if late {
            out.drop_message("answer_late");
            // What took its place may have come to nothing as well.
            return;
        }
        let refuses = refuses
            || code == 503
                && self.transactions.get(slot).is_some_and(|known| !known.named.places.is_empty());
        if self.is_race_on(at, refuses) {
            return out.drop_message("hedge_refused");
        }
        let why = if code == 503 { "answered_503" } else { "answered_code" };
        if refuses && !rang && self.fail_over(now, slot, why, router, out) {
            if let Some(leg) = self.transactions.get(slot).and_then(|known| known.leg(at.1)) {
                leg.abandoned = true;
            }
            return;
        }
        if (300..400).contains(&code) {
            self.take_contacts(slot, message.bytes, scan);
        }
        if code >= 600 {
            // 16.7 step 5: nobody else shall ring.
            self.cancel_legs(now, slot, Some(at.1), out);
            if let Some(transaction) = self.transactions.get(slot) {
                transaction.contacts.clear();
                transaction.named.places.clear();
                transaction.forks_left = 0;
            }
        }
        self.consider(slot, code, backend, message.bytes, scan, router);
        self.conclude(now, slot, router, out);
    }

    /// Keeps the answer if it is the best so far (16.7 step 6).
    fn consider(
        &mut self,
        slot: u32,
        code: u16,
        backend: Option<strowger_contract::BackendId>,
        message: &[u8],
        scan: &Scan,
        router: &dyn Router,
    ) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        let challenges = matches!(code, 401 | 407);
        if challenges && matches!(transaction.best.code, 401 | 407) {
            return self.join_challenges(slot, message, scan, router);
        }
        if !is_better(code, transaction.best.code) {
            return;
        }
        let mut bytes = std::mem::take(&mut transaction.best.bytes);
        let as_500 = code == 503 && backend.is_some() && !self.settings.options.forward_503;
        self.rendered(slot, message, scan, as_500, &mut bytes, router);
        if let Some(transaction) = self.transactions.get(slot) {
            transaction.best.bytes = bytes;
            (transaction.best.code, transaction.best.backend) = (code, backend);
        }
    }

    /// 16.7 step 7: the client must be able to answer all challenges, each as it would have gone out alone.
    fn join_challenges(&mut self, slot: u32, message: &[u8], scan: &Scan, router: &dyn Router) {
        let mut other = std::mem::take(&mut self.scratch);
        self.rendered(slot, message, scan, false, &mut other, router);
        let mut scans = (std::mem::take(&mut self.edit_scan), std::mem::take(&mut self.other_scan));
        if let Some(transaction) = self.transactions.get(slot) {
            let best = &mut transaction.best.bytes;
            if scans.0.scan(best).is_ok() && scans.1.scan(&other).is_ok() {
                add_challenges(best, &scans.0, &other, &scans.1);
            }
        }
        (self.edit_scan, self.other_scan) = scans;
        self.scratch = other;
    }

    /// A final answer of our own making counts as one of a leg's.
    pub(crate) fn consider_ours(&mut self, slot: u32, code: u16, reason: &'static str) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        if is_better(code, transaction.best.code) {
            transaction.best.bytes.clear();
            (transaction.best.code, transaction.best.reason) = (code, reason);
            transaction.best.backend = None;
        }
    }

    /// A leg has ended: if none is left, another is tried, or the best answer goes to the client.
    pub(crate) fn conclude(
        &mut self,
        now: Instant,
        slot: u32,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        if transaction.state != State::Open
            || transaction.is_pending()
            || transaction.ticket.is_some()
        {
            return;
        }
        if self.next_contact(now, slot, router, out) || self.next_fork(now, slot, router, out) {
            return;
        }
        self.settle_others(now, slot, router);
        let Some(transaction) = self.transactions.get(slot) else { return };
        let (code, backend) = (transaction.best.code, transaction.best.backend);
        let (method, pool) = (transaction.method, transaction.pool);
        transaction.answered_by = backend;
        if transaction.best.bytes.is_empty() {
            self.bye_ended(now, slot, (code, true), router, out);
        }
        let Some(transaction) = self.transactions.get(slot) else { return };
        if transaction.best.bytes.is_empty() {
            if code == 408 && !transaction.is_invite() {
                // RFC 4320 4.2: nobody waits for a 408 to anything but an INVITE any more.
                transaction.ends_at = Some(now);
                return self.note_end(now, slot, Some(RequestOutcome::Expired), out);
            }
            let answer = match (transaction.cancelled, code) {
                (true, 408) => Answer::new(487, "Request Terminated"),
                _ => Answer::new(code, transaction.best.reason),
            };
            let outcome =
                if code == 408 { RequestOutcome::Expired } else { RequestOutcome::Failed };
            return self.end_with(now, slot, &answer, outcome, out);
        }
        if let (401 | 407, Some(backend), Some(_)) = (code, backend, pool) {
            let (session, class) = (transaction.session, transaction.class);
            if router.lookup(now, session).is_none() {
                router.learn(now, session, backend, class, CHALLENGE_TIME);
            }
        }
        self.complete(now, slot);
        let Some(transaction) = self.transactions.get(slot) else { return };
        std::mem::swap(&mut transaction.reply, &mut transaction.best.bytes);
        out.send(transaction.client, ClassId::CONTROL, |bytes| {
            bytes.extend_from_slice(&transaction.reply)
        });
        out.note(Note::Answer { method: method.word(), class: (code / 100) as u8, backend });
        self.note_attempt(now, slot, code, false, out);
        let outcome = (code == 503).then_some(RequestOutcome::Failed);
        self.note_end(now, slot, outcome, out);
    }

    /// RFC 3261 16.5: the addresses of a 3xx, best last.
    fn take_contacts(&mut self, slot: u32, message: &[u8], scan: &Scan) {
        if !self.settings.options.recurse {
            return;
        }
        let Some(transaction) = self.transactions.get(slot) else { return };
        if transaction.cancelled {
            return;
        }
        let mut found: Vec<(u32, &[u8])> = all_values(message, scan, Name::Contact)
            .filter_map(name_addr)
            .map(|(uri, parameters)| (quality(parameters), uri))
            .collect();
        // Stable, so that of equals the first stands last when it is turned around.
        found.reverse();
        found.sort_by_key(|(quality, _)| *quality);
        let room = usize::from(REDIRECTIONS_MAX - transaction.redirected.min(REDIRECTIONS_MAX));
        let from = found.len().saturating_sub(room);
        for (_, uri) in &found[from..] {
            transaction.redirected += 1;
            transaction.contacts.push((*uri).into());
        }
    }

    /// Cancels all legs but one: those that rang at once, the others as soon as they do.
    pub(crate) fn cancel_legs(
        &mut self,
        now: Instant,
        slot: u32,
        but: Option<u8>,
        out: &mut Outbox,
    ) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        if !transaction.is_invite() {
            return;
        }
        for attempt in 1..=transaction.legs.len() as u8 {
            let Some(leg) = self.transactions.get(slot).and_then(|known| known.leg(attempt)) else {
                return;
            };
            if Some(attempt) == but || leg.state == LegState::Ended || leg.cancel != Cancel::No {
                continue;
            }
            leg.cancel = Cancel::Wanted;
            leg.failover_at = None;
            if leg.state == LegState::Proceeding {
                self.send_cancel(now, (slot, attempt), out);
            }
        }
    }

    /// RFC 3261 17.1.1.3: the ACK of a non-2xx answer is ours.
    fn acknowledge(&mut self, at: At, response: &[u8], scan: &Scan, out: &mut Outbox) {
        let to = scan.value(response, Name::To);
        self.follow("ACK", at, to, out);
    }

    /// RFC 3261 9.1: our own CANCEL, for a leg that rings.
    pub(crate) fn send_cancel(&mut self, now: Instant, at: At, out: &mut Outbox) {
        let (t1, timeout) = (self.settings.options.t1.0, self.settings.timeout());
        let Some(leg) = self.transactions.get(at.0).and_then(|known| known.leg(at.1)) else {
            return;
        };
        leg.cancel = Cancel::Sent;
        if leg.state != LegState::Ended {
            // 9.1: one that never answers the INVITE after this is given up.
            leg.expires_at = Some(now + timeout);
        }
        leg.repeat_after = t1;
        leg.repeat_at = leg.is_datagram().then(|| now + t1);
        self.follow("CANCEL", at, None, out);
        self.schedule(now, at.0);
    }

    /// Sends what belongs to a leg's request: our ACK or CANCEL.
    pub(crate) fn follow(&mut self, method: &str, at: At, to: Option<&[u8]>, out: &mut Outbox) {
        let mut scan = std::mem::take(&mut self.edit_scan);
        if let Some(leg) = self.transactions.get(at.0).and_then(|known| known.leg(at.1))
            && scan.scan(&leg.sent).is_ok()
        {
            let to = to.or_else(|| scan.value(&leg.sent, Name::To)).unwrap_or_default();
            out.send(leg.to, ClassId::CONTROL, |bytes| {
                follow_up(method, &leg.sent, &scan, to, None, bytes)
            });
        }
        self.edit_scan = scan;
    }
}

/// RFC 3261 16.7 step 6: 6xx before all; else the lower class; of 4xx those that the client can mend.
fn is_better(code: u16, than: u16) -> bool {
    let rank = |code: u16| match code {
        0 => u16::MAX,
        600.. => 0,
        401 | 407 | 415 | 420 | 484 => 40,
        400..500 => 41,
        503 => 59,
        _ => code / 100 * 10,
    };
    rank(code) < rank(than)
}

/// Adds an answer's challenges to another's.
fn add_challenges(best: &mut Vec<u8>, scan: &Scan, other: &[u8], other_scan: &Scan) {
    let tail = best.split_off(end_of_headers(best, scan));
    for header in &other_scan.headers {
        if matches!(header.name, Name::WwwAuthenticate | Name::ProxyAuthenticate) {
            best.extend_from_slice(header.line.of(other));
        }
    }
    best.extend_from_slice(&tail);
}

/// `q` in thousandths; 1 if it is not there (RFC 3261 20.10).
fn quality(parameters: &[u8]) -> u32 {
    let text = parameter(parameters, b"q").flatten();
    let number = text.and_then(|text| std::str::from_utf8(text).ok()?.trim().parse::<f32>().ok());
    number.map_or(1_000, |number| (number.clamp(0.0, 1.0) * 1_000.0) as u32)
}
