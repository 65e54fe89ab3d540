//! The control side: configuration, registry, health probes, admin HTTP. It runs on its own thread and never
//! on a worker's.

pub mod admin;
pub mod config;
pub mod pressure;
pub mod probes;
pub mod providers;
pub mod reach;
pub mod registry;
pub mod resolve;
pub mod service;
pub mod watch;
