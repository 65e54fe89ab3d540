//! Mediation: AVPs of messages that pass are set, added, removed and copied by rules.
//!
//! A rule is checked against the dictionary and turned into bytes when it is loaded. At work it
//! edits the message where it lies in the outbox: lengths of enclosing groups and of the message
//! are patched, and whatever no rule names stays byte for byte.
//!
//! | module | what it does |
//! |---|---|
//! | [`edit`] | finds, changes, appends and takes out AVPs by path |
//! | [`rules`] | what the configuration says, and what it means |
//! | [`hiding`] | pseudonyms of hosts |
//! | `changes` | both, as the relay calls them |

mod changes;
pub mod edit;
pub mod hiding;
pub mod rules;

pub(crate) use changes::Changes;
pub use changes::MediationOptions;
pub use hiding::{Hide, Hiding};
pub use rules::{Applied, Mediation, Rule};
