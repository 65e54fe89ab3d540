//! Who waits, who is let in, and how much a backend may have: DESIGN, section 5.
//!
//! | module | what it does |
//! |---|---|
//! | `lanes` | the queue as plain data |
//! | `queue` | the queue of a pool: admission, grants, expiry, figures |
//! | `desk` | where a worker's router hears of its grants |
//! | `service` | quantiles of service times |
//! | `load` | what higher tiers take |
//! | `limit` | the adaptive limit of a backend |
//! | `retry` | the retry budget of a pool |
//! | `sessions` | slots that sessions hold, and how they come back |

mod desk;
mod figures;
mod lanes;
mod limit;
mod load;
mod queue;
mod retry;
mod service;
mod sessions;

pub use desk::Waker;
pub(super) use desk::{Desk, Settled};
pub use figures::{ClassFigures, Histogram, QosFigures};
pub(super) use lanes::{EXCLUDED_MAX, Place, Waiter};
pub(super) use limit::AdaptiveLimit;
pub(super) use queue::{Entry, Inner, No, PoolQos, Settlement, Wanted};
