//! What becomes of calls: for CDR sinks, dialog lists and the figures that telephony is run by.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::{BackendId, PoolId};

/// The longest name (URI, Call-ID, tag) that a record keeps, in bytes; longer ones are cut. Names in
/// the field are under 100.
pub const CALL_NAME_MAX: usize = 256;

/// How far a call has come.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub enum CallPhase {
    /// It was asked for.
    Began,
    /// It was answered: both sides talk.
    Answered,
    /// It is over, answered or not. The last that is heard of it.
    Ended,
}

/// Who or what did something.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub enum CallSide {
    /// The side that began the call.
    Caller,
    /// The side that was called.
    Callee,
    /// The edge itself.
    Edge,
}

impl CallSide {
    /// Stable word for records and logs.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Caller => "caller",
            Self::Callee => "callee",
            Self::Edge => "edge",
        }
    }
}

/// Why a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CallEnd {
    /// Who ended it.
    pub by: CallSide,
    /// With what: the final answer's code; 200 after a BYE; 408 when its time ran out; 487 when it
    /// was cancelled.
    pub code: u16,
    /// In a stable word: `bye`, `refused`, `cancelled`, `timeout`, `session_expired`, `lost`,
    /// `overload`.
    #[serde(with = "crate::handover::word")]
    pub cause: crate::handover::Word,
}

/// One call as it stands. Built only where the listener's options ask for records, since it
/// allocates.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CallRecord {
    /// Names the call among all of this process's life: the same in each of its phases.
    pub id: u64,
    /// How far it has come.
    pub phase: CallPhase,
    /// `Call-ID`, at most [`CALL_NAME_MAX`] bytes, as all names here; any bytes may be in them.
    pub call_id: Box<[u8]>,
    /// The URI in `From`.
    pub caller: Box<[u8]>,
    /// The URI in `To`.
    pub callee: Box<[u8]>,
    /// The `Request-URI`.
    pub request_uri: Box<[u8]>,
    /// Where the first INVITE came from.
    pub source: SocketAddr,
    /// The pool, if it came so far.
    pub pool: Option<PoolId>,
    /// The instance that has it, or was tried last.
    pub backend: Option<BackendId>,
    /// Whether an instance began it.
    pub begun_by_backend: bool,
    /// How many instances were tried.
    pub tries: u8,
    /// When the first INVITE arrived.
    #[serde(with = "crate::handover::moment")]
    pub began: Instant,
    /// From there to the first provisional answer over 100: the post-dial delay.
    pub first_provisional: Option<Duration>,
    /// From there to the 2xx.
    pub answered: Option<Duration>,
    /// From there to the end.
    pub ended: Option<Duration>,
    /// Why it ended.
    pub end: Option<CallEnd>,
}

/// How an attempt to set up a call came out, for the answer-seizure ratio.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AttemptOutcome {
    /// A 2xx.
    Answered,
    /// The called party refused or was busy, or did not pick up (480, 486, 600, 603, …).
    Unanswered,
    /// The calling side gave up.
    Cancelled,
    /// The network's fault: 5xx, timeouts, lost connections.
    Failed,
    /// The edge refused it.
    Rejected,
}

impl AttemptOutcome {
    /// Stable word for metrics.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Unanswered => "unanswered",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
            Self::Rejected => "rejected",
        }
    }
}
