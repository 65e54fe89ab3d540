//! The only unsafe code of the project: system calls that no safe wrapper offers without
//! allocating. Each block says which sentence of the man page it keeps to.

mod mmsg;

pub(crate) use mmsg::{RecvBatch, SendBatch};
