//! What a manifest changes. Pure.

use super::manifest::EdgeAddress;
use super::supervisor::{Machine, Release};

/// What becomes of an application.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// It is new.
    Created,
    /// All is as it was.
    Nothing,
    /// What can change while it runs: counts, limits, weights, health, how it is drained.
    Settings,
    /// Processes must be others: a rollout.
    NewRelease,
}

impl Change {
    /// A stable word.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Nothing => "unchanged",
            Self::Settings => "settings",
            Self::NewRelease => "new-release",
        }
    }

    /// What it means.
    pub(crate) fn detail(self) -> &'static str {
        match self {
            Self::Created => "its instances are started",
            Self::Nothing => "nothing is done",
            Self::Settings => "in force at once; nothing is started anew",
            Self::NewRelease => "comes in by its rollout",
        }
    }
}

/// Compares what a manifest says with what there is.
pub(crate) fn change(known: Option<&Machine>, wanted: &Release, edges: &[EdgeAddress]) -> Change {
    let Some(machine) = known.filter(|machine| !machine.releases.is_empty()) else {
        return Change::Created;
    };
    let current = machine.releases.iter().find(|it| it.number == machine.current);
    match current {
        Some(current) if current.digest == wanted.digest => {
            let scaled = wanted.app.autoscale.is_some();
            let same_count = scaled || machine.count == wanted.app.instances;
            let same = current.app == wanted.app && machine.edges == edges && same_count;
            if same && !machine.removed { Change::Nothing } else { Change::Settings }
        }
        _ => Change::NewRelease,
    }
}
