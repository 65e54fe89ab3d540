//! The routing core: pure, no socket, clock or runtime.
//!
//! | module | what it does |
//! |---|---|
//! | `spec` | what is wanted, as plain values |
//! | `snapshot` | one immutable picture of it |
//! | `live` | what is known of a backend from moment to moment |
//! | `core` | all that workers share; from a wanted state to the next snapshot |
//! | `router` | the decision |
//! | `balance` | the published formulas |
//! | `table` | sessions without a token |
//! | `flows` | names of clients' flows |
//! | `events`, `view` | what operators see |

mod balance;
mod core;
mod events;
mod flows;
mod live;
mod names;
mod router;
mod snapshot;
mod spec;
mod table;
mod view;

pub use balance::{MAGLEV_FROM, Maglev, is_in_share, rendezvous_score};
pub use core::{Core, CoreSettings, NotFound};
pub use events::{CoreEvent, Happening, Plan};
pub use live::{BackendLive, CAPABILITIES_MAX};
pub use names::PoolNames;
pub use router::CoreRouter;
pub use snapshot::{Backend, Pool, Snapshot};
pub use spec::{
    BackendSpec, Balance, HealthSpec, InstanceState, ListenerLimits, ListenerSpec, NodeSpec,
    PoolSpec, Setup, SnapshotSpec,
};
pub use table::{Learned, SessionTable, TableTotals};
pub use view::{PoolBackendView, PoolView, SessionView, SessionsView};
