//! A protocol of lines, as small as one can be: `docs/writing-a-codec.md` walks through this file.
//!
//! ```text
//! client -> edge      SESSION TEXT        a request; SESSION is any word
//! edge -> instance    NUMBER SESSION TEXT the same, with a number that is the edge's own
//! instance -> edge    NUMBER TEXT         its answer
//! edge -> client      SESSION TEXT        the answer; `! REASON` where there is none
//! ```

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use strowger_contract::duration::Span;
use strowger_contract::{
    Attempt, BackendId, ClassId, Context, Endpoint, Engine, FrameError, Framer, Framing, Links,
    Message, Note, OptionsError, Outbox, Outcome, PeerChange, PoolId, Probe, ProbeReply, Protocol,
    Query, Refusal, RequestOutcome, Route, Router, Scope, SessionKey, Ticket, Transport, Verdict,
};

/// The longest line: a bound for what a peer can make us hold.
const LINE_BYTES_MAX: usize = 4_096;

/// Requests that one worker has under way, at most.
const PENDING_MAX: usize = 10_000;

/// A framer that reads this panics: outside of any engine, so that the whole worker has to be
/// restarted. No protocol of use would do that.
pub(crate) const WORKER_KILLER: &[u8] = b"kill the worker";

/// Keeps our session names apart from other protocols'.
const SPACE: u8 = 200;

/// The protocol: names, options, factory. Everything cold is here.
pub(crate) struct Line;

/// A listener's `options`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct LineOptions {
    /// How long an instance may take before another one is asked.
    timeout: Span,
    /// An engine that reads this text panics: it shows what the runtime does then.
    panic_on: Option<String>,
}

impl Default for LineOptions {
    fn default() -> Self {
        Self { timeout: Span(Duration::from_millis(300)), panic_on: None }
    }
}

/// A route's `match`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct LineMatch {
    /// What the session's word begins with.
    prefix: String,
}

impl Protocol for Line {
    const NAME: &'static str = "line";
    const TRANSPORTS: &'static [Transport] = &[Transport::Tcp];
    const LINKS: Links = Links::PerWorker;
    const PROBES: &'static [&'static str] = &["line-ping"];
    const SESSION_KEYS: &'static [&'static str] = &["word"];
    const SESSION_SPACES: &'static [u8] = &[SPACE];

    type Options = LineOptions;
    type Match = LineMatch;
    type Framer = LineFramer;
    type Engine = LineEngine;

    fn check(scope: &Scope<LineMatch>, options: &LineOptions) -> Vec<OptionsError> {
        let mut errors = Vec::new();
        if options.timeout.0.is_zero() {
            let (path, message) = ("timeout".into(), "must be longer than 0s".into());
            errors.push(OptionsError { path, message });
        }
        for (index, (route, _)) in scope.routes.iter().enumerate() {
            if route.prefix.contains(' ') {
                let path = format!("routes[{index}].match.prefix");
                errors.push(OptionsError { path, message: "a word has no spaces".into() });
            }
        }
        errors
    }

    fn engine(context: &Context<'_, Self>) -> LineEngine {
        LineEngine {
            settings: Settings::new(context),
            pending: HashMap::new(),
            waiting: HashMap::new(),
            number: 0,
            timeouts: VecDeque::new(),
            doomed: false,
        }
    }

    fn reconfigure(engine: &mut LineEngine, context: &Context<'_, Self>) {
        engine.settings = Settings::new(context);
    }

    fn probe(name: &str) -> Option<Box<dyn Probe>> {
        (name == "line-ping").then(|| Box::new(Ping) as Box<dyn Probe>)
    }
}

/// Cuts a stream into lines.
#[derive(Debug, Default)]
pub(crate) struct LineFramer;

impl Framer for LineFramer {
    fn frame(&mut self, buffer: &[u8]) -> Result<Framing, FrameError> {
        assert!(!buffer.starts_with(WORKER_KILLER), "asked for");
        let end = buffer.iter().position(|&byte| byte == b'\n').map(|at| at + 1);
        match end.and_then(NonZeroUsize::new) {
            Some(length) if length.get() <= LINE_BYTES_MAX => Ok(Framing::Message(length)),
            None if buffer.len() < LINE_BYTES_MAX => {
                let more = NonZeroUsize::new(buffer.len() + 1).unwrap_or(NonZeroUsize::MIN);
                Ok(Framing::Need(more))
            }
            _ => Err(FrameError::TooLarge { size: buffer.len(), limit: LINE_BYTES_MAX }),
        }
    }
}

/// The active health check: `0 ping ping`, answered by `0 pong`.
struct Ping;

impl Probe for Ping {
    fn request(
        &mut self,
        _from: SocketAddr,
        _to: SocketAddr,
        _transport: Transport,
        _nonce: u64,
        out: &mut Vec<u8>,
    ) {
        out.extend_from_slice(b"0 ping ping\n");
    }

    fn reply(&mut self, _from: SocketAddr, bytes: &[u8]) -> ProbeReply {
        match bytes {
            b"0 pong\n" => ProbeReply::Healthy,
            _ if bytes.ends_with(b"\n") => {
                ProbeReply::Unhealthy("answered something else to a ping")
            }
            _ => ProbeReply::Incomplete,
        }
    }
}

struct Settings {
    options: LineOptions,
    routes: Vec<(LineMatch, PoolId)>,
    pool: Option<PoolId>,
}

impl Settings {
    fn new(context: &Context<'_, Line>) -> Self {
        Self {
            options: context.options.clone(),
            routes: context.scope.routes.clone(),
            pool: context.scope.pool,
        }
    }

    fn pool_for(&self, word: &str) -> Option<PoolId> {
        let found = self.routes.iter().find(|(route, _)| word.starts_with(&route.prefix));
        found.map(|(_, pool)| *pool).or(self.pool)
    }
}

/// A request that has no answer yet.
struct Pending {
    client: Endpoint,
    word: String,
    text: String,
    pool: PoolId,
    session: SessionKey,
    arrived: Instant,
    deadline: Instant,
    tried: Vec<BackendId>,
    /// Who has it, and since when. None while it waits in the core's queue.
    at: Option<(BackendId, Instant)>,
}

/// The state machine of one worker. No socket, no clock.
pub(crate) struct LineEngine {
    settings: Settings,
    pending: HashMap<u64, Pending>,
    waiting: HashMap<Ticket, u64>,
    number: u64,
    /// When to look at which request again; all wait equally long, so they stand in order.
    timeouts: VecDeque<(Instant, u64)>,
    /// It panics when it is asked for its time.
    doomed: bool,
}

impl LineEngine {
    fn on_request(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let line = String::from_utf8_lossy(message.bytes);
        let Some((word, text)) = line.trim_end().split_once(' ') else {
            return refuse(message.from, "expected SESSION TEXT", out);
        };
        if self.settings.options.panic_on.as_deref() == Some(text) {
            self.doomed = text.ends_with("asked");
            assert!(self.doomed, "asked for");
            return;
        }
        let Some(pool) = self.settings.pool_for(word) else {
            return refuse(message.from, "no route", out);
        };
        if self.pending.len() >= PENDING_MAX {
            out.note(Note::Count("line_pending_limit"));
            return refuse(message.from, "too many requests", out);
        }
        self.number += 1;
        let promised = router.class(ClassId::SETUP).deadline.unwrap_or(Duration::from_secs(1));
        self.pending.insert(
            self.number,
            Pending {
                client: message.from,
                word: word.to_owned(),
                text: text.to_owned(),
                pool,
                session: router.keyer().session(SPACE, word.as_bytes()),
                arrived: message.arrived,
                deadline: message.arrived + promised,
                tried: Vec::new(),
                at: None,
            },
        );
        self.place(now, self.number, router, out);
    }

    /// Asks the core where a request goes: the first time, and after each failure.
    fn place(&mut self, now: Instant, number: u64, router: &mut dyn Router, out: &mut Outbox) {
        let Some(pending) = self.pending.get(&number) else { return };
        let query = Query {
            pool: pending.pool,
            session: pending.session,
            pin: None,
            in_session: false,
            awaits: true,
            class: ClassId::SETUP,
            deadline: pending.deadline,
            capability: 0,
            exclude: &pending.tried,
            attempt: if pending.tried.is_empty() { Attempt::First } else { Attempt::Retry },
        };
        match router.route(now, &query) {
            Verdict::Go(route) => self.go(now, number, route, router, out),
            Verdict::Refuse(refusal) => self.give_up(now, number, refusal, out),
            Verdict::Wait(ticket) => drop(self.waiting.insert(ticket, number)),
        }
    }

    fn go(
        &mut self,
        now: Instant,
        number: u64,
        route: Route,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(pending) = self.pending.get_mut(&number) else { return };
        pending.tried.push(route.backend);
        pending.at = Some((route.backend, now));
        // The session stays where it went; a failure moves it.
        let ttl = router.session_ttl(pending.pool);
        router.learn(now, pending.session, route.backend, ClassId::SETUP, ttl);
        let line = format!("{number} {} {}\n", pending.word, pending.text);
        out.send(Endpoint::Backend(route.backend), ClassId::SETUP, |bytes| {
            bytes.extend_from_slice(line.as_bytes());
        });
        self.timeouts.push_back((now + self.settings.options.timeout.0, number));
    }

    /// What an instance had is asked of another one.
    fn fail_over(
        &mut self,
        now: Instant,
        number: u64,
        how: Outcome,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(pending) = self.pending.get_mut(&number) else { return };
        let Some((backend, _)) = pending.at.take() else { return };
        router.outcome(now, backend, how);
        router.forget(now, pending.session);
        out.note(Note::Retry("unanswered"));
        self.place(now, number, router, out);
    }

    fn give_up(&mut self, now: Instant, number: u64, refusal: Refusal, out: &mut Outbox) {
        let Some(pending) = self.pending.remove(&number) else { return };
        out.note(Note::Refused(ClassId::SETUP, refusal));
        note(now, &pending, RequestOutcome::Rejected, out);
        refuse(pending.client, refusal.word(), out);
    }

    fn on_answer(
        &mut self,
        now: Instant,
        backend: BackendId,
        bytes: &[u8],
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let line = String::from_utf8_lossy(bytes);
        let answer = line.trim_end().split_once(' ');
        let number = answer.and_then(|(number, _)| number.parse::<u64>().ok());
        let known = number.and_then(|number| self.pending.get(&number)?.at);
        let (Some((_, text)), Some(number), Some((asked, since))) = (answer, number, known) else {
            return out.drop_message("answer_unmatched");
        };
        if asked != backend {
            // Another one has it now.
            return out.drop_message("answer_late");
        }
        let Some(pending) = self.pending.remove(&number) else { return };
        let latency = now.saturating_duration_since(since);
        router.outcome(now, backend, Outcome::Answered { latency });
        note(now, &pending, RequestOutcome::Met, out);
        let answer = format!("{} {text}\n", pending.word);
        out.send(pending.client, ClassId::CONTROL, |out| out.extend_from_slice(answer.as_bytes()));
    }
}

fn refuse(client: Endpoint, why: &str, out: &mut Outbox) {
    out.send(client, ClassId::CONTROL, |bytes| {
        bytes.extend_from_slice(b"! ");
        bytes.extend_from_slice(why.as_bytes());
        bytes.push(b'\n');
    });
}

/// One note for each request, exactly.
fn note(now: Instant, pending: &Pending, outcome: RequestOutcome, out: &mut Outbox) {
    let at_backend = pending.at.map_or(Duration::ZERO, |(_, since)| now - since);
    let total = now.saturating_duration_since(pending.arrived);
    let backend = pending.at.map(|(backend, _)| backend);
    out.note(Note::Request { class: ClassId::SETUP, outcome, backend, total, at_backend });
}

impl Engine for LineEngine {
    fn on_message(
        &mut self,
        now: Instant,
        message: Message<'_>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        match message.from {
            Endpoint::Backend(backend) => self.on_answer(now, backend, message.bytes, router, out),
            _ => self.on_request(now, &message, router, out),
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
        match self.waiting.remove(&ticket) {
            Some(number) => self.go(now, number, route, router, out),
            None => router.outcome(now, route.backend, Outcome::Abandoned),
        }
    }

    fn on_refused(
        &mut self,
        now: Instant,
        ticket: Ticket,
        refusal: Refusal,
        _: &mut dyn Router,
        out: &mut Outbox,
    ) {
        if let Some(number) = self.waiting.remove(&ticket) {
            self.give_up(now, number, refusal, out);
        }
    }

    fn on_peer(
        &mut self,
        now: Instant,
        peer: Endpoint,
        change: PeerChange,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let (Endpoint::Backend(lost), PeerChange::Closed(_)) = (peer, change) else { return };
        let had = |pending: &Pending| pending.at.is_some_and(|(backend, _)| backend == lost);
        let mut numbers: Vec<u64> = self
            .pending
            .iter()
            .filter(|(_, pending)| had(pending))
            .map(|(number, _)| *number)
            .collect();
        numbers.sort_unstable();
        for number in numbers {
            self.fail_over(now, number, Outcome::Lost, router, out);
        }
    }

    fn on_timeout(&mut self, now: Instant, router: &mut dyn Router, out: &mut Outbox) {
        while self.timeouts.front().is_some_and(|(at, _)| *at <= now) {
            let Some((_, number)) = self.timeouts.pop_front() else { return };
            let since = self.pending.get(&number).and_then(|pending| pending.at);
            // It may have been answered, or asked again later.
            if since.is_some_and(|(_, since)| since + self.settings.options.timeout.0 <= now) {
                self.fail_over(now, number, Outcome::TimedOut, router, out);
            }
        }
    }

    fn next_timeout(&self) -> Option<Instant> {
        assert!(!self.doomed, "asked for its time");
        self.timeouts.front().map(|(at, _)| *at)
    }

    fn on_drain(&mut self, _: Instant, _: &mut dyn Router, _: &mut Outbox) {}

    fn in_progress(&self) -> usize {
        self.pending.len()
    }
}
