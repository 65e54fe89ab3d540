//! Strowger: a telco-grade multi-protocol load balancer and session router.
//!
//! # The data's way
//! The same sentence for every protocol:
//!
//! ```text
//! recvmmsg / read -> frame -> engine INSPECTS spans -> Query -> router ROUTES
//!                 -> engine REWRITES into the outbox -> sendmmsg / writev
//! ```
//!
//! The routing core never sees SIP. A codec never sees a socket. The runtime never sees a header.
//!
//! # Where things are
//! | module | what it does |
//! |---|---|
//! | [`routing`] | pure: pools, affinity, balancing, health, snapshot, plan |
//! | [`runtime`] | workers, UDP, TCP, links to backends, hand-over; `runtime::sys` has the only unsafe code |
//! | [`tls`] | certificates and keys, from files to rustls |
//! | [`control`] | configuration, watcher, probes, registry, admin HTTP |
//! | [`agent`] | deploys workloads, keeps them alive, registers them |
//! | [`observe`] | metrics, events, logs |
//! | [`protocols`] | the one list of protocols |
//! | [`edge`] | puts them together: one running edge |
//! | [`load`] | the load generator: both sides of an edge, open loop |
//! | [`decode`] | messages and captures in words |
//! | [`import`] | other systems' configurations, turned into ours |
//! | [`demo`] | sample workloads and traffic on loopback |

pub mod agent;
pub mod cli;
pub mod control;
pub mod decode;
pub mod demo;
pub mod edge;
pub mod import;
pub mod load;
pub mod observe;
pub mod protocols;
pub mod routing;
pub mod runtime;
pub mod tls;
