//! Workers, sockets, connections, links to backends, hand-over between workers.
//!
//! One thread per worker; all that a worker touches per message is its own, but for the snapshot
//! (read), the backends' atomics and the session table's shards. See `docs/decisions.md` for the
//! choices.
//!
//! | module | what it does |
//! |---|---|
//! | `fleet` | all workers; binds, starts and closes listeners |
//! | `worker` | one thread; restarts itself after a panic |
//! | `launch` | from a protocol's type to tasks |
//! | `handover` | live upgrade: all of it goes to another process |
//! | `host` | a listener on a worker: the engine and its wishes |
//! | `intake` | from an accepted socket to a stream: TLS, and who is there |
//! | `proxy`, `hello` | the PROXY protocol; SNI without ending TLS |
//! | `websocket` | messages in WebSocket frames |
//! | `socket` | one stream, whatever it runs over |
//! | `datagram`, `stream`, `splice` | the three ways that bytes come and go |
//! | `way` | one direction of `splice` |
//! | `descriptors` | which of them are kept back |
//! | `link` | streams to backends |
//! | `mailbox`, `shared` | what workers have in common |
//! | `resolve` | where names lead, as workers ask it |
//! | `sys` | the only unsafe code |

mod bind;
mod datagram;
mod descriptors;
mod fleet;
mod gather;
pub(crate) mod handover;
mod hello;
mod host;
mod intake;
mod launch;
mod link;
mod mailbox;
mod proxy;
mod resolve;
#[cfg(feature = "sctp")]
mod sctp;
mod shared;
mod socket;
mod splice;
mod stream;
pub(crate) mod sys;
mod way;
mod websocket;
mod worker;

pub(crate) use fleet::Legacies;
pub use fleet::{BindFailure, Fleet, ListenerView, Prepared};
#[doc(hidden)]
pub use handover::is_item;
pub use launch::{Launch, launcher};
pub use resolve::{Answer, Reply, Resolver};
#[doc(hidden)]
pub use sys::prefer_large_pages;
#[doc(hidden)]
pub use websocket::websocket_messages;
