//! The real binary against real peers.
//!
//! A test whose peer is not installed says so and does nothing, unless `CI` is set: then it fails.
#![allow(missing_docs)]

mod admin_tls;
mod agent;
mod agent_rules;
mod agent_sessions;
mod agent_support;
mod agent_ways;
mod decode;
mod demo;
mod diameter;
mod diameter_agent;
mod diameter_follow;
mod diameter_limits;
mod diameter_links;
mod diameter_overload;
mod diameter_peers;
mod hang_up;
mod harness;
mod hostile;
mod load;
mod nameserver;
#[path = "../support/plot.rs"]
mod plot;
mod providers;
mod qos;
mod qos_hedge;
mod qos_load;
mod qos_side;
mod registry;
mod reload;
mod reuse;
mod service;
mod sip;
mod tcp;
mod tcp_idle;
mod tcp_intake;
mod tcp_peers;
mod tcp_pool;
mod tls;
mod udp;
mod upgrade;
mod upgrade_kinds;
mod watch;
