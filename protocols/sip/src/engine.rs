//! The proxy of one worker: what comes in goes to requests, responses or timers.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use strowger_contract::{
    ClassRule, Closing, Context, Endpoint, Engine, LookupId, Message, Note, Outbox, PeerChange,
    Place, PoolId, Refusal, Route, Router, Ticket, TokenKeys, Transport, Unresolved, Wheel,
    WorkerId, stable_hash,
};

use crate::branch::Branch;
use crate::calls::Calls;
use crate::guard::Guard;
use crate::hide::{call_id_word, goes_back_inside, keep_call_id, unmask};
use crate::local::Local;
use crate::lookup::Held;
use crate::options::{Matched, Mode, SipMatch, SipOptions, Sips};
use crate::overload::Overload;
use crate::pace::Pace;
use crate::place::Large;
use crate::scan::{Name, Scan, ScanError, Start};
use crate::target::{Hop, Target};
use crate::transaction::Transactions;
use crate::via::Via;
use crate::{Sip, responses};

/// What the configuration says.
pub(crate) struct Settings {
    pub(crate) options: SipOptions,
    pub(crate) local: Local,
    pub(crate) routes: Vec<(SipMatch, PoolId)>,
    pub(crate) pool: Option<PoolId>,
    pub(crate) classify: Vec<ClassRule<SipMatch>>,
    pub(crate) worker: WorkerId,
    pub(crate) workers: u8,
    /// Names this start of the process, so that no connection of an earlier one is taken for one of
    /// ours.
    pub(crate) epoch: u32,
    /// Grows with each start.
    pub(crate) started: u32,
    /// Whether anything was ever hidden from clients, and from instances: the words of dialogs that were set
    /// up then are read to their end, whatever the options say now.
    pub(crate) hid: [bool; 2],
}

impl Settings {
    fn new(context: &Context<'_, Sip>) -> Self {
        Self {
            options: context.options.clone(),
            local: Local::new(context.scope, context.options),
            routes: context.scope.routes.clone(),
            pool: context.scope.pool,
            classify: context.scope.classify.clone(),
            worker: context.worker,
            workers: context.workers,
            epoch: stable_hash(context.scope.node.as_bytes()) as u32 ^ context.started,
            started: context.started,
            hid: [false, true].map(|to_instance| {
                let hiding = context.options.topology_hiding.as_ref();
                hiding.is_some_and(|hiding| hiding.hides(to_instance))
            }),
        }
    }

    /// The pool that a request falls to: of the first route that matches, else the listener's.
    pub(crate) fn pool_for(&self, request: &Matched<'_>) -> Option<PoolId> {
        let matching = self.routes.iter().find(|(route, _)| route.matches(request));
        matching.map(|(_, pool)| *pool).or(self.pool)
    }

    /// Whether the listener's messages may go to a pool.
    pub(crate) fn has_pool(&self, pool: PoolId) -> bool {
        self.pool == Some(pool) || self.routes.iter().any(|(_, known)| *known == pool)
    }

    pub(crate) fn is_stateless(&self) -> bool {
        self.options.mode == Mode::Stateless
    }

    /// Whether a request must not go over a transport because its Request-URI is `sips:` (RFC 3261
    /// 26.2.2). A unix socket leaves no machine.
    pub(crate) fn bars(
        &self,
        request: &[u8],
        scan: &Scan,
        target: &Target<'_>,
        transport: Transport,
    ) -> bool {
        let secure = matches!(transport, Transport::Tls | Transport::Wss | Transport::Unix);
        let Start::Request { uri, .. } = scan.start else { return false };
        let uri = target.uri.unwrap_or_else(|| uri.of(request));
        !secure
            && self.options.sips == Sips::Tls
            && uri.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"sips:"))
    }

    /// 64 x T1: Timers B, F, H, J, L, M.
    pub(crate) fn timeout(&self) -> Duration {
        self.options.t1.0 * 64
    }

    /// The endpoint at an address, by the socket that reaches it.
    pub(crate) fn endpoint(&self, transport: Transport, address: SocketAddr) -> Option<Endpoint> {
        if transport == Transport::Udp {
            let socket = self.local.datagram_socket(address.is_ipv6())?;
            return Some(Endpoint::Datagram { socket, remote: address });
        }
        Some(Endpoint::Remote { transport, address })
    }
}

/// The proxy of one worker.
pub struct SipEngine {
    pub(crate) settings: Settings,
    pub(crate) transactions: Transactions,
    pub(crate) wheel: Option<Wheel>,
    pub(crate) scan: Scan,
    /// For a second message that is looked at beside the first.
    pub(crate) other_scan: Scan,
    pub(crate) scratch: Vec<u8>,
    pub(crate) edit_scan: Scan,
    pub(crate) edited: Vec<u8>,
    /// The message that is looked at had hidden words, and they were read.
    revealed: bool,
    /// A message as it was before it was hidden, and where things are in it.
    unmasked: Vec<u8>,
    unmasked_scan: Scan,
    pub(crate) pace: Pace,
    pub(crate) large: Large,
    pub(crate) calls: Calls,
    pub(crate) guard: Guard,
    pub(crate) overload: Overload,
    pub(crate) held: Held,
    due: Vec<u64>,
}

impl SipEngine {
    pub(crate) fn new(context: &Context<'_, Sip>) -> Self {
        let mut transactions = Transactions::default();
        transactions.seed(context.seed);
        Self {
            settings: Settings::new(context),
            transactions,
            wheel: None,
            scan: Scan::default(),
            other_scan: Scan::default(),
            scratch: Vec::new(),
            edit_scan: Scan::default(),
            edited: Vec::new(),
            revealed: false,
            unmasked: Vec::new(),
            unmasked_scan: Scan::default(),
            pace: Pace::default(),
            large: Large::default(),
            calls: Calls::new(context.worker, context.seed),
            guard: Guard::default(),
            overload: Overload::default(),
            held: Held::default(),
            due: Vec::new(),
        }
    }

    pub(crate) fn reconfigure(&mut self, context: &Context<'_, Sip>) {
        let (epoch, before) = (self.settings.epoch, self.settings.hid);
        let new = Settings::new(context);
        let hid = [before[0] | new.hid[0], before[1] | new.hid[1]];
        self.settings = Settings { epoch, hid, ..new };
    }

    /// Lets the wheel look at a transaction when something is next due for it.
    pub(crate) fn schedule(&mut self, now: Instant, slot: u32) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        let Some(next) = transaction.next_wake() else { return };
        // One that wakes earlier looks again by itself.
        if transaction.wakes_at.is_some_and(|wakes| wakes <= next) {
            return;
        }
        transaction.wakes_at = Some(next);
        let key = u64::from(slot) << 32 | u64::from(transaction.generation);
        self.wheel_insert(now, next, key);
    }

    pub(crate) fn wheel_insert(&mut self, now: Instant, at: Instant, key: u64) {
        self.wheel.get_or_insert_with(|| Wheel::new(now)).insert(at, key);
    }
}

impl SipEngine {
    fn on_scanned(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        scan: &Scan,
        result: Result<(), ScanError>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        match (result, scan.start) {
            (Ok(()), Start::Response { code }) => {
                responses::on_response(self, now, message, scan, code, router, out)
            }
            (result, Start::Request { .. }) if scan.headers_at > 0 => {
                self.on_request(now, message, scan, result.err(), router, out);
            }
            _ => out.drop_message("malformed"),
        }
    }

    /// Reads what was hidden: whether the message is now the one in `plain`, scanned.
    fn reveal(
        &mut self,
        message: &[u8],
        scan: &mut Scan,
        keys: &TokenKeys,
        plain: &mut Vec<u8>,
        out: &mut Outbox,
    ) -> bool {
        // The answer to what crossed no border says nothing that its sender may have read here.
        if matches!(scan.start, Start::Response { .. }) && !self.crossed(message, scan) {
            return false;
        }
        let done = unmask(message, scan, keys, plain);
        if done.unreadable > 0 {
            out.note(Note::Count("sip_hidden_unreadable"));
        }
        if done.read == 0 {
            return false;
        }
        let word = call_id_word(message, scan);
        let known = &mut self.unmasked_scan;
        if known.scan(plain).is_err() {
            return false;
        }
        // Only if it was read: it stands there no more.
        if let Some(word) = word.filter(|_| call_id_word(plain, known).is_none()) {
            keep_call_id(plain, known, word);
            if known.scan(plain).is_err() {
                return false;
            }
        }
        std::mem::swap(scan, known);
        self.revealed = true;
        true
    }

    /// Whether a response is to a request that was hidden on its way from the one side to the other.
    fn crossed(&mut self, message: &[u8], scan: &Scan) -> bool {
        let via = scan.value(message, Name::Via).and_then(Via::first);
        let text = via.and_then(|(via, _)| via.branch()).unwrap_or_default();
        let Some((branch, _)) = Branch::read(text) else { return false };
        let hid = self.settings.hid;
        if !branch.stateless && branch.worker != self.settings.worker {
            // The worker that has it looks again.
            return false;
        }
        match self.transactions.current(branch.slot, branch.generation) {
            Some(known) if !branch.stateless => {
                let from_backend = known.from_backend;
                known.leg(branch.attempt).is_some_and(|leg| {
                    let to_instance = leg.backend.is_some();
                    leg.is_answered_by(text)
                        && to_instance != from_backend
                        && hid[usize::from(to_instance)]
                })
            }
            _ => goes_back_inside(message, scan),
        }
    }

    /// Whether a request had words of ours read and would go to the side that shall not see them: only
    /// who wants to know what they say sends such.
    pub(crate) fn would_tell(&self, target: &Target<'_>, router: &dyn Router) -> bool {
        let to_instance = match target.hop {
            Hop::Backend { .. } => true,
            Hop::Address { address, .. } => router.backend_at(address).is_some(),
            Hop::Flow { .. } | Hop::Name { .. } => false,
            Hop::Nowhere(..) => return false,
        };
        self.revealed
            && to_instance == target.from_backend
            && self.settings.hid[usize::from(to_instance)]
    }
}

impl Engine for SipEngine {
    fn on_message(
        &mut self,
        now: Instant,
        message: Message<'_>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        if crate::stun::is_no_sip(message.bytes) {
            return self.keep_alive(now, &message, router, out);
        }
        let mut scan = std::mem::take(&mut self.scan);
        let result = scan.scan(message.bytes);
        let mut plain = std::mem::take(&mut self.unmasked);
        self.revealed = false;
        let hides = self.settings.hid != [false; 2] && result.is_ok();
        if hides && self.reveal(message.bytes, &mut scan, router.token_keys(), &mut plain, out) {
            let message = Message { bytes: &plain, ..message };
            self.on_scanned(now, &message, &scan, Ok(()), router, out);
        } else {
            self.on_scanned(now, &message, &scan, result, router, out);
        }
        (self.scan, self.unmasked) = (scan, plain);
    }

    fn on_granted(
        &mut self,
        now: Instant,
        ticket: Ticket,
        route: Route,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        self.granted(now, ticket, route, router, out);
    }

    fn on_refused(
        &mut self,
        now: Instant,
        ticket: Ticket,
        refusal: Refusal,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        self.denied(now, ticket, refusal, router, out);
    }

    fn on_peer(
        &mut self,
        now: Instant,
        peer: Endpoint,
        change: PeerChange,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        match change {
            PeerChange::Closed(cause) => {
                self.hung_up(now, peer, router, out);
                self.answer_by_via(peer, out);
                if !self.guard.may_look(now, peer, router) {
                    return out.note(Note::Count("sip_looks_left_out"));
                }
                for (slot, attempt) in self.transactions.waiting_on(peer) {
                    self.on_lost(now, slot, attempt, cause, router, out);
                }
            }
            PeerChange::Retired => out.close(peer, Closing::Flushed),
            PeerChange::Opened { .. } | PeerChange::Joined(_) | PeerChange::JoinFailed(..) => {}
        }
    }

    fn on_resolved(
        &mut self,
        now: Instant,
        lookup: LookupId,
        found: Result<&[Place], Unresolved>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        self.resolved(now, lookup, found, router, out);
    }

    fn on_timeout(&mut self, now: Instant, router: &mut dyn Router, out: &mut Outbox) {
        let mut due = std::mem::take(&mut self.due);
        if let Some(wheel) = &mut self.wheel {
            wheel.advance(now, |key| due.push(key));
        }
        for key in due.drain(..) {
            if key & crate::calls::CALL_KEY != 0 {
                self.on_call_due(now, key, out);
                continue;
            }
            self.on_wake(now, (key >> 32) as u32, key as u32, router, out);
        }
        self.due = due;
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.wheel.as_ref().and_then(Wheel::next)
    }

    fn on_drain(&mut self, _: Instant, _: &mut dyn Router, _: &mut Outbox) {
        // SIP has no word for leaving; the router refuses what is new.
    }

    fn in_progress(&self) -> usize {
        self.transactions.len()
    }

    fn save(&self) -> Option<Vec<u8>> {
        Some(self.saved())
    }

    fn restore(
        &mut self,
        now: Instant,
        saved: &[u8],
        router: &mut dyn Router,
        out: &mut Outbox,
    ) -> Result<(), strowger_contract::handover::Broken> {
        self.take_over(now, saved, router, out)
    }
}
