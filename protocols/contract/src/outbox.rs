//! What an engine wants done: bytes to send, connections to close, flows to splice, things to count.
//!
//! One arena holds all bytes; it is cleared, not freed, after each flush, so in steady state nothing
//! is allocated.

use std::ops::Range;
use std::time::{Duration, Instant};

use crate::{
    AttemptOutcome, BackendId, CallRecord, ClassId, Endpoint, FlowId, Lookup, LookupId, Message,
    Refusal, WorkerId,
};

/// Bytes for one endpoint.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Where they go.
    pub to: Endpoint,
    /// What is promised to them.
    pub class: ClassId,
    /// Where they lie in the arena.
    pub bytes: Range<usize>,
}

/// How a connection is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Closing {
    /// After all that is queued for it has been written.
    Flushed,
    /// At once, with a reset.
    Reset,
}

/// What is wanted, in order.
#[derive(Clone, Debug)]
pub enum Command {
    /// Send bytes.
    Send(Frame),
    /// Give a message to the same listener's engine on another worker, as it arrived.
    HandOver {
        /// The worker that knows what to do with it.
        to: WorkerId,
        /// Where it came from.
        from: Endpoint,
        /// How it came.
        transport: crate::Transport,
        /// The sender's address.
        remote: std::net::SocketAddr,
        /// Our address.
        local: std::net::SocketAddr,
        /// When its first byte was read.
        arrived: Instant,
        /// Where it lies in the arena.
        bytes: Range<usize>,
    },
    /// Close a connection.
    Close(Endpoint, Closing),
    /// After its link's end, leave a backend alone for so long.
    HoldOff(Endpoint, Duration),
    /// A backend's link works: the pauses before it is dialed again start anew.
    Proven(Endpoint),
    /// Join a client's flow to a fresh connection to a backend and pass bytes untouched.
    /// [`crate::PeerChange::Joined`] or [`crate::PeerChange::JoinFailed`] follows, and in the end
    /// one [`crate::PeerChange::Closed`] for the flow.
    Splice(FlowId, BackendId, SpliceLimits),
    /// Find where a name leads; [`crate::Engine::on_resolved`] follows.
    Resolve {
        /// The engine's own number.
        id: LookupId,
        /// What is asked.
        lookup: Lookup,
        /// Where the name lies in the arena.
        host: Range<usize>,
    },
    /// Open a datagram socket towards an address, as [`Endpoint::Outward`] of this number. If there is
    /// no socket to be had, [`crate::PeerChange::Closed`] with [`crate::CloseCause::Local`] follows. It
    /// stays until it is closed ([`Command::Close`]); what ICMP says is told as
    /// [`crate::PeerChange::Closed`] and closes nothing.
    OpenOutward(u32, std::net::SocketAddr),
}

/// The times that a spliced flow keeps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SpliceLimits {
    /// How long the connection to the backend may take.
    pub connect: Duration,
    /// How long both directions may be silent. Zero: for ever.
    pub idle: Duration,
    /// How long one direction may go on after the other has ended. Zero: as `idle`.
    pub half_closed: Duration,
    /// How long the whole flow may last. Zero: for ever.
    pub session: Duration,
    /// A flow that was silent both ways for so long gives its memory back. Zero: never.
    pub park: Duration,
    /// What comes in bulk goes through a pipe, without a copy in this process (splice(2)).
    pub by_pipe: bool,
}

/// How a request ended, as its sender saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RequestOutcome {
    /// Answered within its deadline.
    Met,
    /// Answered after its deadline.
    Late,
    /// Refused at the door.
    Rejected,
    /// Its deadline or the protocol's timer passed without an answer.
    Expired,
    /// Ended by a failure.
    Failed,
}

impl RequestOutcome {
    /// Stable word for metrics and logs.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Met => "met",
            Self::Late => "late",
            Self::Rejected => "rejected",
            Self::Expired => "expired",
            Self::Failed => "failed",
        }
    }
}

/// How much an event matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// For those who look.
    Debug,
    /// Worth a line.
    Info,
    /// Somebody should know.
    Warn,
}

/// Something to count, and perhaps to log. Words are static, so that labels stay bounded.
#[derive(Clone, Debug)]
pub enum Note {
    /// A request ended: one per request that the engine accepted, exactly.
    Request {
        /// Its class.
        class: ClassId,
        /// How it ended.
        outcome: RequestOutcome,
        /// The backend that answered or failed, if it came so far.
        backend: Option<BackendId>,
        /// From arrival to the answer's relay.
        total: Duration,
        /// The backend's share of that; zero if unknown.
        at_backend: Duration,
    },
    /// A request was refused by the router.
    Refused(ClassId, Refusal),
    /// A message was dropped.
    Drop(&'static str),
    /// A request was sent again to another backend.
    Retry(&'static str),
    /// Something else that has a name: counted under it.
    Count(&'static str),
    /// A final answer, or the first provisional one, went to a requester.
    Answer {
        /// The request's method, or `other`.
        method: &'static str,
        /// The answer's first digit, 1 to 6.
        class: u8,
        /// Who gave it; `None`: the edge itself, or a side that is no backend.
        backend: Option<BackendId>,
    },
    /// An attempt to set up a call ended, in an answer or without.
    Attempt {
        /// How.
        outcome: AttemptOutcome,
        /// The instance that it ended at.
        backend: Option<BackendId>,
        /// From the request's arrival to the first provisional answer that the caller hears of, or
        /// to the 2xx, if either came.
        post_dial: Option<Duration>,
    },
    /// A call went a step further. Only where the listener's options ask for records.
    Call(Box<CallRecord>),
    /// Something worth a log line; rate-limited by the runtime, counted under its name.
    Event {
        /// How much it matters.
        level: Level,
        /// Its name, `snake_case`.
        name: &'static str,
        /// What happened, with the values that help.
        detail: String,
    },
}

/// What an engine wants done.
#[derive(Debug, Default)]
pub struct Outbox {
    arena: Vec<u8>,
    commands: Vec<Command>,
    notes: Vec<Note>,
}

impl Outbox {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sends what `write` appends. `write` must only append: what stands in the buffer before
    /// belongs to others. Appending nothing sends nothing.
    pub fn send(&mut self, to: Endpoint, class: ClassId, write: impl FnOnce(&mut Vec<u8>)) {
        let start = self.arena.len();
        write(&mut self.arena);
        if self.arena.len() > start {
            let bytes = start..self.arena.len();
            self.commands.push(Command::Send(Frame { to, class, bytes }));
        }
    }

    /// Sends a copy of the bytes that another command of this batch already placed.
    pub fn send_again(&mut self, to: Endpoint, class: ClassId, bytes: Range<usize>) {
        debug_assert!(bytes.end <= self.arena.len());
        self.commands.push(Command::Send(Frame { to, class, bytes }));
    }

    /// Gives `message` to the same listener's engine on another worker.
    pub fn hand_over(&mut self, to: WorkerId, message: &Message<'_>) {
        let start = self.arena.len();
        self.arena.extend_from_slice(message.bytes);
        self.commands.push(Command::HandOver {
            to,
            from: message.from,
            transport: message.transport,
            remote: message.remote,
            local: message.local,
            arrived: message.arrived,
            bytes: start..self.arena.len(),
        });
    }

    /// Closes a connection.
    pub fn close(&mut self, peer: Endpoint, how: Closing) {
        self.commands.push(Command::Close(peer, how));
    }

    /// After its link's end, leaves a backend alone for so long.
    pub fn hold_off(&mut self, backend: Endpoint, lasting: Duration) {
        self.commands.push(Command::HoldOff(backend, lasting));
    }

    /// A backend's link works, as its own protocol sees it: the next pause before it is dialed again
    /// is a short one. Until this was said, each end of the link makes the pauses longer.
    pub fn proven(&mut self, backend: Endpoint) {
        self.commands.push(Command::Proven(backend));
    }

    /// Joins a client's flow to a backend.
    pub fn splice(&mut self, flow: FlowId, backend: BackendId, limits: SpliceLimits) {
        self.commands.push(Command::Splice(flow, backend, limits));
    }

    /// Asks where a name leads.
    pub fn resolve(&mut self, id: LookupId, lookup: Lookup, host: &[u8]) {
        let start = self.arena.len();
        self.arena.extend_from_slice(host);
        self.commands.push(Command::Resolve { id, lookup, host: start..self.arena.len() });
    }

    /// Opens a datagram socket of the engine's own towards `to`.
    pub fn open_outward(&mut self, number: u32, to: std::net::SocketAddr) {
        self.commands.push(Command::OpenOutward(number, to));
    }

    /// Counts a dropped message.
    pub fn drop_message(&mut self, why: &'static str) {
        self.notes.push(Note::Drop(why));
    }

    /// Counts or logs something.
    pub fn note(&mut self, note: Note) {
        self.notes.push(note);
    }

    /// Logs something; the text is made only when the level is at all of interest.
    pub fn event(&mut self, level: Level, name: &'static str, detail: impl FnOnce() -> String) {
        self.notes.push(Note::Event { level, name, detail: detail() });
    }

    /// What is wanted, in order.
    #[must_use]
    pub fn commands(&self) -> &[Command] {
        &self.commands
    }

    /// What is to be counted.
    #[must_use]
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    /// All bytes; commands mean ranges of it.
    #[must_use]
    pub fn arena(&self) -> &[u8] {
        &self.arena
    }

    /// The bytes that a command means.
    #[must_use]
    pub fn bytes(&self, range: &Range<usize>) -> &[u8] {
        &self.arena[range.clone()]
    }

    /// Whether nothing is wanted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.commands.is_empty() && self.notes.is_empty()
    }

    /// Forgets everything and keeps the memory, up to a bound so that one large burst does not
    /// hold memory for ever.
    pub fn clear(&mut self) {
        const ARENA_KEPT: usize = 4 << 20;
        self.arena.clear();
        self.arena.shrink_to(ARENA_KEPT);
        self.commands.clear();
        self.notes.clear();
    }
}
