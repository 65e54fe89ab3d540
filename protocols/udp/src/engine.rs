//! Which backend a flow has.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use strowger_contract::handover::{Broken, moment, read, write};
use strowger_contract::network::source_name;
use strowger_contract::{
    Attempt, BackendId, ClassId, ClassRule, CloseCause, Closing, Context, Endpoint, Engine,
    Message, Note, NumberMap, Outbox, Outcome, PeerChange, PoolId, Query, Refusal, RequestOutcome,
    Route, Router, SessionKey, Ticket, Verdict,
};

use crate::flows::{Client, Flow, Flows};
use crate::options::UdpMatch;
use crate::{SPACE, Udp};

/// How many backends one flow is tried at.
const TRIES_MAX: usize = 4;

/// What a new flow is promised where its class has no deadline.
const SETUP_FALLBACK: Duration = Duration::from_secs(1);

/// Datagrams of a flow that nobody has answered which are kept, at most.
const KEPT_DATAGRAMS_MAX: usize = 8;

/// Bytes that are kept for all flows of a worker together.
const KEPT_BYTES_MAX: usize = 8 << 20;

/// How long they are kept once they are sent: ICMP comes within a round trip.
const KEPT_FOR: Duration = Duration::from_secs(1);

/// A route, its networks read once.
type ReadyRoute = (ReadyMatch, PoolId);

/// A match, its networks read once.
type ReadyMatch = (UdpMatch, Vec<(IpAddr, u8)>);

/// Why a flow ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// In order: by silence, by its last answer, by eviction.
    Over,
    /// The backend's host said that nobody is there.
    Lost,
    /// By somebody else's fault.
    Abandoned,
}

/// The engine of one worker.
#[derive(Debug)]
pub struct UdpEngine {
    idle: Duration,
    flows_max: usize,
    responses: u32,
    prefixes: (u8, u8),
    routes: Vec<ReadyRoute>,
    classify: Vec<ClassRule<ReadyMatch>>,
    pool: Option<PoolId>,
    flows: Flows,
    waiting: NumberMap<Ticket, u32>,
    kept_bytes: usize,
    /// When what flows keep is given up, by number and birth.
    kept: VecDeque<(Instant, u32, u64)>,
    /// Flows that waited for a slot in another process, by number and birth: from that time on they ask
    /// anew, when all workers have said what they hold.
    unplaced: Vec<(Instant, u32, u64)>,
}

impl UdpEngine {
    pub(crate) fn new(context: &Context<'_, Udp>) -> Self {
        let (options, scope) = (context.options, context.scope);
        let share = options.flows / u32::from(context.workers.max(1));
        let ready = |matching: &UdpMatch| (matching.clone(), matching.networks());
        let rule = |rule: &ClassRule<UdpMatch>| ClassRule {
            matching: ready(&rule.matching),
            class: rule.class,
            even_carried: rule.even_carried,
        };
        Self {
            idle: options.idle_timeout.0,
            flows_max: share.max(1) as usize,
            responses: options.responses,
            prefixes: (options.source_prefix_v4, options.source_prefix_v6),
            routes: scope.routes.iter().map(|(route, pool)| (ready(route), *pool)).collect(),
            classify: scope.classify.iter().map(rule).collect(),
            pool: scope.pool,
            flows: Flows::default(),
            waiting: NumberMap::default(),
            kept_bytes: 0,
            kept: VecDeque::new(),
            unplaced: Vec::new(),
        }
    }

    pub(crate) fn reconfigure(&mut self, context: &Context<'_, Udp>) {
        let flows = std::mem::take(&mut self.flows);
        let waiting = std::mem::take(&mut self.waiting);
        let kept = std::mem::take(&mut self.kept);
        let kept_bytes = self.kept_bytes;
        let unplaced = std::mem::take(&mut self.unplaced);
        *self = Self { flows, waiting, kept, kept_bytes, unplaced, ..Self::new(context) };
    }

    fn pool_for(&self, source: IpAddr, datagram: &[u8]) -> Option<PoolId> {
        self.routes
            .iter()
            .find(|((route, networks), _)| route.is_match(networks, source, datagram))
            .map(|(_, pool)| *pool)
            .or(self.pool)
    }

    /// A client's datagram.
    fn client_sends(
        &mut self,
        now: Instant,
        client: Client,
        message: Message<'_>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        if let Some(number) = self.flows.of(&client) {
            return self.goes_on(now, number, message.bytes, router, out);
        }
        let source = message.remote.ip();
        let class = ClassRule::first(&self.classify, false, |(rule, networks)| {
            rule.is_match(networks, source, message.bytes)
        });
        let class = class.unwrap_or(ClassId::SETUP);
        let Some(pool) = self.pool_for(source, message.bytes) else {
            out.note(Note::Refused(class, Refusal::NoBackend));
            return note(now, now, class, RequestOutcome::Rejected, out);
        };
        while self.flows.len() >= self.flows_max {
            let Some(weakest) = self.flows.weakest() else { break };
            out.note(Note::Count("flow_evicted"));
            self.end(now, weakest, End::Over, router, out);
        }
        let key = router.session_key_name(pool);
        let name = source_name(key, message.remote, message.local, self.prefixes);
        let session = router.keyer().session_in(SPACE, router.session_scope(pool), name.as_bytes());
        let number = self.flows.insert(now, client, session, pool, class);
        out.note(Note::Count("flow_opened"));
        self.keep(now, number, message.bytes, out);
        self.place(now, number, router, out);
    }

    /// Another datagram of a flow.
    fn goes_on(
        &mut self,
        now: Instant,
        number: u32,
        bytes: &[u8],
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        self.flows.touch(now, number);
        let responses = self.responses;
        let Some(flow) = self.flows.get(number) else { return };
        let Some(backend) = flow.backend else {
            // It waits for a slot.
            return self.keep(now, number, bytes, out);
        };
        let is_new = flow.answered.is_none();
        if !router.keeps(now, backend) && self.moves(now, number, backend, bytes, router, out) {
            return;
        }
        if let Some(flow) = self.flows.get(number) {
            flow.owed = flow.owed.saturating_add(responses);
        }
        if is_new {
            self.keep(now, number, bytes, out);
        }
        let to = Endpoint::Outward(number);
        out.send(to, ClassId::IN_SESSION, |buffer| buffer.extend_from_slice(bytes));
    }

    /// The backend is gone or ill, and a client that speaks on would speak to nobody: the flow goes
    /// to another, if there is one. Whether it did (or waits for it), with the datagram.
    fn moves(
        &mut self,
        now: Instant,
        number: u32,
        from: BackendId,
        bytes: &[u8],
        router: &mut dyn Router,
        out: &mut Outbox,
    ) -> bool {
        let Some(flow) = self.flows.get(number) else { return false };
        let exclude = [from];
        let query = query(flow, now + budget(router, flow.class), &exclude);
        let verdict = router.route(now, &query);
        let Verdict::Go(route) = verdict else {
            if let Verdict::Wait(ticket) = verdict {
                router.withdraw(now, ticket);
            }
            return false;
        };
        out.note(Note::Count("flow_moved"));
        router.outcome(now, from, Outcome::Abandoned);
        out.close(Endpoint::Outward(number), Closing::Flushed);
        flow.tried = vec![from];
        flow.owed = 0;
        // As a new one: if nobody is there either, the datagram can go to a third.
        self.flows.moved(number);
        self.keep(now, number, bytes, out);
        self.go(now, number, route, router, out);
        true
    }

    /// Keeps a datagram, if there is room.
    fn keep(&mut self, now: Instant, number: u32, bytes: &[u8], out: &mut Outbox) {
        let Some(flow) = self.flows.get(number) else { return };
        let fits =
            flow.kept.len() < KEPT_DATAGRAMS_MAX && self.kept_bytes + bytes.len() <= KEPT_BYTES_MAX;
        if fits {
            if flow.kept.is_empty() {
                self.kept.push_back((now + KEPT_FOR, number, flow.birth));
            }
            self.kept_bytes += bytes.len();
            flow.kept.push(bytes.into());
        } else if flow.backend.is_none() {
            out.drop_message("waiting_flow_full");
        }
    }

    /// Gives up what a flow keeps.
    fn forget_kept(&mut self, number: u32) {
        let Some(flow) = self.flows.get(number) else { return };
        let kept = std::mem::take(&mut flow.kept);
        self.kept_bytes -= kept.iter().map(|bytes| bytes.len()).sum::<usize>();
    }

    /// Asks for a backend.
    fn place(&mut self, now: Instant, number: u32, router: &mut dyn Router, out: &mut Outbox) {
        let Some(flow) = self.flows.get(number) else { return };
        let class = router.class(flow.class);
        let tries = flow.tried.len();
        if tries > usize::from(class.retry) || tries >= TRIES_MAX {
            return self.refused(now, number, Refusal::NoBackend, router, out);
        }
        let deadline = now + budget(router, flow.class);
        match router.route(now, &query(flow, deadline, &flow.tried)) {
            Verdict::Go(route) => self.go(now, number, route, router, out),
            Verdict::Refuse(refusal) => self.refused(now, number, refusal, router, out),
            Verdict::Wait(ticket) => {
                flow.ticket = Some(ticket);
                self.waiting.insert(ticket, number);
            }
        }
    }

    /// The flow whose request was settled; it has no ticket any more.
    fn no_longer_waits(&mut self, ticket: Ticket) -> Option<u32> {
        let number = self.waiting.remove(&ticket)?;
        if let Some(flow) = self.flows.get(number) {
            flow.ticket = None;
        }
        Some(number)
    }

    fn refused(
        &mut self,
        now: Instant,
        number: u32,
        refusal: Refusal,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(flow) = self.flows.get(number) else { return };
        let (arrived, class, tried) = (flow.arrived, flow.class, !flow.tried.is_empty());
        out.note(Note::Refused(class, refusal));
        let outcome = if tried { RequestOutcome::Failed } else { RequestOutcome::Rejected };
        note(now, arrived, class, outcome, out);
        self.end(now, number, End::Abandoned, router, out);
    }

    /// Opens the flow towards its backend, and sends what it keeps.
    fn go(
        &mut self,
        now: Instant,
        number: u32,
        route: Route,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let responses = self.responses;
        let Some(flow) = self.flows.get(number) else {
            return router.outcome(now, route.backend, Outcome::Abandoned);
        };
        flow.tried.push(route.backend);
        (flow.backend, flow.began) = (Some(route.backend), now);
        let (pool, session, class) = (flow.pool, flow.session, flow.class);
        out.open_outward(number, route.address);
        let to = Endpoint::Outward(number);
        for bytes in &flow.kept {
            flow.owed = flow.owed.saturating_add(responses);
            out.send(to, ClassId::IN_SESSION, |buffer| buffer.extend_from_slice(bytes));
        }
        self.kept.push_back((now + KEPT_FOR, number, flow.birth));
        let ttl = router.session_ttl(pool);
        router.remember(now, session, route.backend, class, ttl);
    }

    /// A backend's datagram.
    fn backend_sends(
        &mut self,
        now: Instant,
        number: u32,
        bytes: &[u8],
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let responses = self.responses;
        let Some(flow) = self.flows.get(number) else { return };
        let (socket, remote) = flow.client;
        let to = Endpoint::Datagram { socket, remote };
        out.send(to, ClassId::IN_SESSION, |buffer| buffer.extend_from_slice(bytes));
        flow.owed = flow.owed.saturating_sub(1);
        let is_over = responses > 0 && flow.owed == 0;
        if flow.answered.is_some() {
            self.flows.touch(now, number);
        } else {
            self.first_answer(now, number, router, out);
        }
        if is_over {
            self.end(now, number, End::Over, router, out);
        }
    }

    fn first_answer(
        &mut self,
        now: Instant,
        number: u32,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        self.forget_kept(number);
        let Some(flow) = self.flows.get(number) else { return };
        flow.tried = Vec::new();
        let took = now.saturating_duration_since(flow.began);
        // What the backend takes for its answer is its own; the edge's promise is to find one.
        let wait = flow.began.saturating_duration_since(flow.arrived);
        let met = wait <= router.class(flow.class).deadline.unwrap_or(Duration::MAX);
        let outcome = if met { RequestOutcome::Met } else { RequestOutcome::Late };
        out.note(Note::Request {
            class: flow.class,
            outcome,
            backend: flow.backend,
            total: wait + took,
            at_backend: took,
        });
        self.flows.answered(now, number, took);
    }

    /// What ICMP, or the kernel at once, said of a flow's backend.
    fn unreachable(
        &mut self,
        now: Instant,
        number: u32,
        cause: CloseCause,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(flow) = self.flows.get(number) else { return };
        if cause == CloseCause::Local {
            out.note(Note::Count("flow_without_socket"));
            let (arrived, class) = (flow.arrived, flow.class);
            note(now, arrived, class, RequestOutcome::Failed, out);
            return self.end(now, number, End::Abandoned, router, out);
        }
        if flow.answered.is_some() || flow.kept.is_empty() {
            out.note(Note::Count("flow_lost"));
            return self.end(now, number, End::Lost, router, out);
        }
        let Some(backend) = flow.backend.take() else { return };
        flow.owed = 0;
        router.outcome(now, backend, Outcome::Lost);
        out.note(Note::Retry(cause.word()));
        out.close(Endpoint::Outward(number), Closing::Flushed);
        self.place(now, number, router, out);
    }

    fn end(
        &mut self,
        now: Instant,
        number: u32,
        end: End,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        self.forget_kept(number);
        let Some(flow) = self.flows.remove(number) else { return };
        if let Some(ticket) = flow.ticket {
            self.waiting.remove(&ticket);
            router.withdraw(now, ticket);
        }
        let Some(backend) = flow.backend else { return };
        out.close(Endpoint::Outward(number), Closing::Flushed);
        let held = now.saturating_duration_since(flow.began);
        let outcome = match (end, flow.answered) {
            (End::Lost, _) => Outcome::Lost,
            (End::Over, Some(latency)) => Outcome::Ended { latency, held },
            // Whoever sends what deserves no answer must not speak against a backend.
            _ => Outcome::Abandoned,
        };
        if end == End::Over && flow.answered.is_none() {
            out.note(Note::Count("flow_unanswered"));
        }
        router.outcome(now, backend, outcome);
    }
}

/// A flow, for another process.
#[derive(serde::Serialize, serde::Deserialize)]
struct SavedFlow {
    number: u32,
    client: Client,
    session: SessionKey,
    pool: PoolId,
    class: ClassId,
    #[serde(with = "moment")]
    arrived: Instant,
    #[serde(with = "moment")]
    began: Instant,
    #[serde(with = "moment")]
    last: Instant,
    backend: Option<BackendId>,
    tried: Vec<BackendId>,
    answered: Option<Duration>,
    owed: u32,
    kept: Vec<Box<[u8]>>,
}

impl SavedFlow {
    fn of((number, flow, last): (u32, &Flow, Instant)) -> Self {
        let Flow { client, session, pool, class, arrived, began, backend, answered, owed, .. } =
            *flow;
        Self {
            number,
            client,
            session,
            pool,
            class,
            arrived,
            began,
            last,
            backend,
            tried: flow.tried.clone(),
            answered,
            owed,
            kept: flow.kept.clone(),
        }
    }

    fn flow(self) -> (u32, Flow, Instant) {
        let mut flow = Flow::new(self.arrived, self.client, self.session, self.pool, self.class);
        (flow.began, flow.backend, flow.tried) = (self.began, self.backend, self.tried);
        (flow.answered, flow.owed, flow.kept) = (self.answered, self.owed, self.kept);
        (self.number, flow, self.last)
    }
}

fn budget(router: &dyn Router, class: ClassId) -> Duration {
    router.class(class).deadline.unwrap_or(SETUP_FALLBACK)
}

fn query<'a>(flow: &Flow, deadline: Instant, exclude: &'a [BackendId]) -> Query<'a> {
    Query {
        pool: flow.pool,
        session: flow.session,
        pin: None,
        in_session: false,
        awaits: true,
        class: flow.class,
        deadline,
        capability: 0,
        exclude,
        attempt: if exclude.is_empty() { Attempt::First } else { Attempt::Retry },
    }
}

fn note(now: Instant, arrived: Instant, class: ClassId, outcome: RequestOutcome, out: &mut Outbox) {
    let total = now.saturating_duration_since(arrived);
    out.note(Note::Request { class, outcome, backend: None, total, at_backend: Duration::ZERO });
}

impl Engine for UdpEngine {
    fn on_message(
        &mut self,
        now: Instant,
        message: Message<'_>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        match message.from {
            Endpoint::Datagram { socket, remote } => {
                self.client_sends(now, (socket, remote), message, router, out);
            }
            Endpoint::Outward(number) => {
                self.backend_sends(now, number, message.bytes, router, out);
            }
            _ => out.drop_message("not_a_datagram"),
        }
    }

    fn on_granted(
        &mut self,
        now: Instant,
        ticket: Ticket,
        route: Route,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(number) = self.no_longer_waits(ticket) else {
            return router.outcome(now, route.backend, Outcome::Abandoned);
        };
        self.go(now, number, route, router, out);
    }

    fn on_refused(
        &mut self,
        now: Instant,
        ticket: Ticket,
        refusal: Refusal,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(number) = self.no_longer_waits(ticket) else { return };
        self.refused(now, number, refusal, router, out);
    }

    fn on_peer(
        &mut self,
        now: Instant,
        peer: Endpoint,
        change: PeerChange,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let PeerChange::Closed(cause) = change else { return };
        match peer {
            Endpoint::Outward(number) => self.unreachable(now, number, cause, router, out),
            // The client's port is closed: nobody waits for more.
            Endpoint::Datagram { socket, remote } => {
                if let Some(number) = self.flows.of(&(socket, remote)) {
                    out.note(Note::Count("client_gone"));
                    self.end(now, number, End::Over, router, out);
                }
            }
            _ => {}
        }
    }

    fn on_timeout(&mut self, now: Instant, router: &mut dyn Router, out: &mut Outbox) {
        for (_, number, birth) in std::mem::take(&mut self.unplaced) {
            if self.flows.get(number).is_some_and(|flow| flow.birth == birth) {
                self.place(now, number, router, out);
            }
        }
        while let Some(&(at, number, birth)) = self.kept.front()
            && at <= now
        {
            self.kept.pop_front();
            let known = self.flows.get(number).filter(|flow| flow.birth == birth);
            // One that waits still has to send it.
            if known.is_some_and(|flow| flow.backend.is_some() && flow.began + KEPT_FOR <= now) {
                self.forget_kept(number);
            }
        }
        while let Some(number) = self.flows.expired(now, self.idle) {
            self.end(now, number, End::Over, router, out);
        }
    }

    fn next_timeout(&self) -> Option<Instant> {
        let unplaced = self.unplaced.first().map(|(at, ..)| *at);
        let kept = self.kept.front().map(|(at, ..)| *at);
        unplaced.into_iter().chain(kept).chain(self.flows.next_expiry(self.idle)).min()
    }

    fn on_drain(&mut self, _: Instant, _: &mut dyn Router, _: &mut Outbox) {}

    fn in_progress(&self) -> usize {
        self.flows.len()
    }

    /// All flows, with what they keep. Tickets mean nothing elsewhere: who waits asks anew there.
    fn save(&self) -> Option<Vec<u8>> {
        let all = self.flows.by_silence().into_iter();
        Some(write(&all.map(SavedFlow::of).collect::<Vec<_>>()))
    }

    fn restore(
        &mut self,
        now: Instant,
        saved: &[u8],
        router: &mut dyn Router,
        out: &mut Outbox,
    ) -> Result<(), Broken> {
        let saved: Vec<SavedFlow> = read(saved)?;
        let limit = self.flows_max;
        let (kept, over): (Vec<_>, Vec<_>) =
            saved.into_iter().partition(|flow| (flow.number as usize) < limit);
        for flow in over {
            // The configuration has become smaller.
            out.note(Note::Count("flow_evicted"));
            out.close(Endpoint::Outward(flow.number), Closing::Flushed);
        }
        let taken = self.flows.restore(kept.into_iter().map(SavedFlow::flow).collect());
        for backend in taken {
            router.resume(now, backend);
        }
        for (number, flow, _) in self.flows.by_silence() {
            if flow.backend.is_none() {
                self.unplaced.push((now, number, flow.birth));
            }
            if !flow.kept.is_empty() {
                self.kept.push_back((now + KEPT_FOR, number, flow.birth));
                self.kept_bytes += flow.kept.iter().map(|bytes| bytes.len()).sum::<usize>();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use strowger_contract::handover::{Clock, by_clock};

    use super::*;

    #[test]
    fn another_process_can_still_try_a_third_backend() {
        let (now, key) = (Instant::now(), SessionKey { stable: 1, keyed: 2 });
        let mut flows = Flows::default();
        let client = (0, std::net::SocketAddr::from(([192, 0, 2, 1], 1)));
        let number = flows.insert(now, client, key, PoolId(0), ClassId::SETUP);
        let flow = flows.get(number).expect("it was entered");
        flow.tried = vec![BackendId(3), BackendId(4)];
        flow.backend = Some(BackendId(4));
        flow.kept = vec![Box::from(*b"one"), Box::from(*b"two")];
        let bytes = by_clock(Clock { instant: now, nanos: 0 }, || {
            write(&flows.by_silence().into_iter().map(SavedFlow::of).collect::<Vec<_>>())
        });
        let saved = by_clock(Clock { instant: now, nanos: 0 }, || read::<Vec<SavedFlow>>(&bytes));
        let (_, flow, _) = saved.expect("written just now").remove(0).flow();
        assert_eq!(
            (flow.backend, flow.tried),
            (Some(BackendId(4)), vec![BackendId(3), BackendId(4)])
        );
        assert_eq!(flow.kept, [Box::from(*b"one"), Box::from(*b"two") as Box<[u8]>]);
    }
}
