//! Where names lead, as the workers ask it.

use std::sync::Arc;

use strowger_contract::{Lookup, Place, Unresolved};

/// What became of a question: at least one place, in the order to try them.
pub type Answer = Result<Arc<[Place]>, Unresolved>;

/// Takes an answer; called once, on any thread.
pub type Reply = Box<dyn FnOnce(Answer) + Send>;

/// Finds where names lead. It is asked on workers' threads: neither call may wait.
pub trait Resolver: Send + Sync {
    /// The answer, if it is known already.
    fn known(&self, host: &[u8], lookup: &Lookup) -> Option<Answer>;

    /// Finds it; `reply` is called sooner or later, also if nobody knows.
    fn ask(&self, host: &[u8], lookup: &Lookup, reply: Reply);
}
