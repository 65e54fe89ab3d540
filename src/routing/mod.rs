//! The routing core: pure, no socket, clock or runtime.
//!
//! | module | what it does |
//! |---|---|
//! | `spec` | what is wanted, as plain values |
//! | `snapshot` | one immutable picture of it |
//! | `live` | what is known of a backend from moment to moment |
//! | `core` | all that workers share; from a wanted state to the next snapshot |
//! | `changes` | what is wanted, known and leaving |
//! | `router` | the decision |
//! | `choice` | which instance of a pool takes a new session |
//! | `slots` | a slot, a wait, or a refusal |
//! | `anew` | who waits for an instance that went away |
//! | `balance` | the published formulas |
//! | `bounds` | the first time that one of the node's bounds bites |
//! | `brownout` | what the node gives up when it is short of itself |
//! | `qos` | who waits, who is let in, what a backend may have |
//! | `table` | sessions without a token |
//! | `bindings` | subscribers, by each of their names |
//! | `holders` | how many sessions each backend has, and how often it lost them |
//! | `report` | what an instance's owner is told: misses and response time of the last minute |
//! | `flows` | names of clients' flows |
//! | `peers` | subscribers, rates and favour, as engines use them; the operators' table of peers |
//! | `handover` | all of it, for another process |
//! | `events`, `view` | what operators see |

mod anew;
mod balance;
mod bindings;
mod bounds;
mod brownout;
mod changes;
mod choice;
mod core;
mod events;
mod flows;
mod handover;
mod holders;
mod live;
mod memory;
mod names;
mod peers;
mod qos;
mod report;
mod router;
mod slots;
mod snapshot;
mod spec;
mod table;
mod view;

pub use balance::{MAGLEV_FROM, Maglev, is_in_share, rendezvous_score};
pub use bindings::{BYTES_PER_BINDING, BindingTable, BindingTotals};
pub use brownout::{BrownoutSpec, BrownoutView, Pressure, Step};
pub use core::{Core, CoreSettings, NotFound};
pub use events::{CoreEvent, Happening, Plan};
pub use handover::CoreSeed;
pub use live::{BackendLive, CAPABILITIES_MAX};
pub use memory::{Advise, no_advice};
pub use names::PoolNames;
pub use peers::PeerView;
pub use qos::{ClassFigures, Histogram, QosFigures, Waker};
pub use report::RecentView;
pub use router::CoreRouter;
pub use slots::Grant;
pub use snapshot::{Backend, Pool, Snapshot};
pub use spec::{
    AcceptProxy, BackendSpec, Balance, ClientAuth, HealthSpec, InstanceState, ListenerLimits,
    ListenerSpec, NodeSpec, Policy, PoolSpec, QosSpec, SendProxy, Setup, SnapshotSpec,
    TlsCertificate, TlsClientSpec, TlsServerSpec, TlsVersion, Verify, WebSocketSpec,
};
pub use table::{Learned, SessionTable, TableTotals};
pub use view::{PoolBackendView, PoolView, SessionView, SessionsView};
