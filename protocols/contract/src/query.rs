//! What the core is asked, and what it answers. Nothing of a protocol crosses this line.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::{BackendId, ClassId, Pin, PoolId, SessionKey, Ticket, Transport};

/// One question to the router: where does this message go?
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// The pool to choose from.
    pub pool: PoolId,
    /// The session it belongs to.
    pub session: SessionKey,
    /// The instance that a token in the message names, if it carries one.
    pub pin: Option<Pin>,
    /// Whether it belongs to a session that exists. Such a message also goes to a draining backend;
    /// without a pin or a table entry it is placed by hash among all that may hold it.
    pub in_session: bool,
    /// Whether an answer is awaited: a [`Verdict::Go`] then counts as in flight at the backend
    /// until [`crate::Router::outcome`] ends it. `false` for one-way messages (an ACK).
    pub awaits: bool,
    /// What is promised to it.
    pub class: ClassId,
    /// When the promise ends.
    pub deadline: Instant,
    /// What the backend must be able to do, as its link told ([`crate::Link::Up`]); 0: nothing in
    /// particular. For Diameter the application.
    pub capability: u32,
    /// Backends that it must not go to: those that were tried, and those that are passed over.
    pub exclude: &'a [BackendId],
    /// Whether it is asked for the first time.
    pub attempt: Attempt,
}

/// What a question is to the router's accounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// A request that was not asked for before: it arrives, and earns the pool a part of a retry.
    First,
    /// The same try is asked for anew, since where it was to go is passed over: it is in the accounts
    /// already.
    Anew,
    /// It was sent to a backend before: paid from the pool's retry budget.
    Retry,
}

/// The router's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// Send it there.
    Go(Route),
    /// It waits; [`crate::Engine::on_granted`] or [`crate::Engine::on_refused`] follows.
    Wait(Ticket),
    /// Say no, in the protocol's words.
    Refuse(Refusal),
}

/// Where a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The backend.
    pub backend: BackendId,
    /// Its stable name, for tokens.
    pub pin: Pin,
    /// How it is reached.
    pub transport: Transport,
    /// Where it is reached.
    pub address: SocketAddr,
    /// Why it was chosen.
    pub reason: RouteReason,
}

/// Why a backend was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RouteReason {
    /// A token named it.
    Pinned,
    /// The session table named it.
    Table,
    /// The pool's balancing chose it.
    Balanced,
    /// Too few backends are healthy; the load is spread over all (panic rule).
    Panic,
}

/// Why the router says no. Each tells whose fault it is and whether to try elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// No backend of the pool can take it: none configured, none up, all excluded.
    NoBackend,
    /// The pool has backends, but none that can do what was asked ([`Query::capability`]).
    NoCapability,
    /// The session's instance is gone; nobody else has its state.
    SessionLost,
    /// All slots are taken and waiting would not help.
    Overloaded {
        /// When to come back.
        retry_after: Duration,
    },
    /// The deadline passed, or would pass before an answer could come.
    TooLate,
    /// The node is shutting down and takes no new sessions.
    ShuttingDown,
}

impl Refusal {
    /// Stable word for metrics and logs.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::NoBackend => "no_backend",
            Self::NoCapability => "no_capability",
            Self::SessionLost => "session_lost",
            Self::Overloaded { .. } => "overloaded",
            Self::TooLate => "too_late",
            Self::ShuttingDown => "shutting_down",
        }
    }

    /// Whose fault it is.
    #[must_use]
    pub fn fault(self) -> Fault {
        match self {
            Self::NoBackend | Self::NoCapability | Self::SessionLost => Fault::Backend,
            Self::Overloaded { .. } | Self::TooLate | Self::ShuttingDown => Fault::Edge,
        }
    }
}

/// Whose fault a failure is. Only a backend's own faults count against it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// The client's: it cancelled, hung up, or sent nonsense.
    Client,
    /// The backend's.
    Backend,
    /// Ours.
    Edge,
}

/// How a message that was sent to a backend ended. Each [`Verdict::Go`] with [`Query::awaits`] is
/// ended by exactly one of these; none may be reported for any other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It answered, after so long, and the answer does not speak against it.
    Answered {
        /// From sending to the first final answer.
        latency: Duration,
    },
    /// As [`Outcome::Answered`], for what keeps its slot longer than its answer takes (a spliced
    /// flow).
    Ended {
        /// From sending to the first answer; for a flow, how long the connection took.
        latency: Duration,
        /// How long the slot was taken.
        held: Duration,
    },
    /// It answered that it cannot: 503, 3004 and the like. Does it no good in balancing (a fast
    /// refusal must not attract load) and counts as its fault.
    Refused,
    /// It did not answer in time.
    TimedOut,
    /// Its connection failed before an answer.
    Lost,
    /// It ended for a reason that is not the backend's: the client cancelled, or another branch won.
    Abandoned,
}

impl Outcome {
    /// Whether it counts against the backend.
    #[must_use]
    pub fn is_backend_fault(self) -> bool {
        matches!(self, Self::Refused | Self::TimedOut | Self::Lost)
    }
}
