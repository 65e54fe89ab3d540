//! The only unsafe code of the project: system calls that no safe wrapper offers without
//! allocating. Each block says which sentence of the man page it keeps to.

mod handover;
mod icmp;
mod memory;
mod mmsg;
#[cfg(feature = "sctp")]
mod sctp;
mod watched;

pub(crate) use handover::{default_signals, place_for_exec};
pub(crate) use icmp::{SendError, keep_errors, next_error};
pub use memory::prefer_large_pages;
pub(crate) use memory::return_memory;
pub(crate) use mmsg::{RecvBatch, SendBatch};
#[cfg(feature = "sctp")]
pub(crate) use sctp::set_up as set_up_sctp;
pub(crate) use watched::{watched, watched_epoll};
