//! The routing core: pure, no socket, clock or runtime.

mod spec;

pub use spec::{
    BackendSpec, Balance, HealthSpec, InstanceState, ListenerLimits, ListenerSpec, NodeSpec,
    PoolSpec, Setup, SnapshotSpec,
};
