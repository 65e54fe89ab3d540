//! What the core has to tell: changes of its backends and pools.

use serde::Serialize;

/// What a new wanted state changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// The snapshot's number.
    pub epoch: u64,
    /// (pool, instance).
    pub backends_added: Vec<(String, String)>,
    /// (pool, instance).
    pub backends_removed: Vec<(String, String)>,
    /// Names.
    pub pools_added: Vec<String>,
    /// Names.
    pub pools_removed: Vec<String>,
    /// Instances whose pins are those of others (one in a million for 1,000 backends): their tokens
    /// lead to the other.
    pub pin_collisions: Vec<(String, String)>,
}

/// Something that happened to a pool or a backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CoreEvent {
    /// The pool.
    pub pool: String,
    /// The instance, if it is one.
    pub instance: Option<String>,
    /// What.
    #[serde(flatten)]
    pub what: Happening,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Happening {
    /// Its checks, or its link, are good again.
    BackendUp,
    /// Its checks, or its link, failed.
    BackendDown {
        /// How.
        detail: &'static str,
    },
    /// Its faults on live traffic took it out for a while.
    BackendEjected {
        /// For how long, in milliseconds.
        for_ms: u64,
    },
    /// Its ejection is over.
    BackendReturned,
    /// It started again and lost its sessions.
    BackendRestarted {
        /// How many the edge knew of.
        sessions: u64,
    },
    /// It is new.
    BackendAdded,
    /// It is no longer wanted.
    BackendRemoved,
    /// It takes no new sessions.
    DrainStarted {
        /// What it holds.
        sessions: u64,
    },
    /// It takes new sessions again.
    DrainCancelled,
    /// Its drain is over.
    DrainEnded {
        /// What it still held.
        sessions_left: u64,
    },
    /// A request was refused for want of slots. A few each second are told one by one.
    RequestRefused {
        /// Its class.
        class: String,
        /// `arrival`, `brownout`, `enqueue` or `dequeue`.
        stage: &'static str,
        /// Why.
        why: &'static str,
        /// The wait that was predicted; at `dequeue` the wait that it was. Milliseconds.
        wait_ms: u64,
        /// Its budget, in milliseconds.
        budget_ms: u64,
    },
    /// A bound was hit for the first time.
    BoundHit {
        /// The option or constant.
        bound: &'static str,
    },
    /// Too few of the pool are well, or enough again.
    PoolPanic {
        /// Whether load is spread over all.
        on: bool,
    },
}

impl CoreEvent {
    pub(super) fn of(pool: &str, instance: Option<&str>, what: Happening) -> Self {
        Self { pool: pool.to_owned(), instance: instance.map(str::to_owned), what }
    }

    /// Stable word for logs and metrics.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self.what {
            Happening::BackendUp => "backend_up",
            Happening::BackendDown { .. } => "backend_down",
            Happening::BackendEjected { .. } => "backend_ejected",
            Happening::BackendReturned => "backend_returned",
            Happening::BackendRestarted { .. } => "backend_restarted",
            Happening::BackendAdded => "backend_added",
            Happening::BackendRemoved => "backend_removed",
            Happening::DrainStarted { .. } => "drain_started",
            Happening::DrainCancelled => "drain_cancelled",
            Happening::DrainEnded { .. } => "drain_ended",
            Happening::PoolPanic { .. } => "pool_panic",
            Happening::RequestRefused { .. } => "request_refused",
            Happening::BoundHit { .. } => "bound_hit",
        }
    }

    /// Whether an operator should look.
    #[must_use]
    pub fn is_bad(&self) -> bool {
        matches!(
            self.what,
            Happening::BackendDown { .. }
                | Happening::BackendEjected { .. }
                | Happening::BackendRestarted { .. }
                | Happening::PoolPanic { on: true }
                | Happening::BoundHit { .. }
        )
    }
}
