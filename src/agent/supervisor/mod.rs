//! The life of an application's instances. Pure: events and time in, actions out.
//!
//! | module | what it does |
//! |---|---|
//! | `model` | what is known, and what is kept |
//! | `machine` | an instance's life: start, checks, restart, drain, stop |
//! | `counts` | how many instances of which release: starts and retires |
//! | `rollout` | how a release comes in, and goes back |
//! | `scale` | how many, by load |

mod counts;
mod machine;
mod model;
mod rollout;
mod scale;
#[cfg(test)]
mod tests;

pub(crate) use model::{
    Acked, Action, CheckKind, Event, Instance, Machine, Millis, Phase, Release, View,
};
pub(crate) use scale::Scale;
