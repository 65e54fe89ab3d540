//! What is known of an application and its instances. All of it is kept over the agent's own end,
//! but what edges report: they report it anew.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::agent::manifest::{App, EdgeAddress, Service};
use crate::control::registry::LeaseState;

/// Milliseconds of a clock that goes on while the agent does not run (CLOCK_BOOTTIME).
pub(crate) type Millis = u64;

/// A release: what runs, never changed after it was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Release {
    /// Counts up.
    pub(crate) number: u64,
    /// Of its directory, program, environment and bindings.
    pub(crate) digest: String,
    /// Of its directory alone; empty without one.
    pub(crate) content: String,
    /// Where the directory's copy is.
    pub(crate) dir: Option<PathBuf>,
    /// What the manifest said.
    pub(crate) app: App,
    /// The services that it is bound to.
    pub(crate) services: BTreeMap<String, Service>,
    /// Seconds since 1970.
    pub(crate) made: u64,
}

/// How an instance stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Phase {
    /// No process; started when the time has come.
    Waiting {
        /// When.
        until: Millis,
    },
    /// A process that has not yet passed its start-up check.
    Starting {
        /// Since when.
        since: Millis,
    },
    /// A process that works.
    Running {
        /// Since when.
        since: Millis,
    },
    /// It gets no new sessions; those that it has may end.
    Draining {
        /// Since when.
        since: Millis,
        /// Until when at most.
        deadline: Millis,
    },
    /// Its hook runs.
    PreStop {
        /// Since when.
        since: Millis,
    },
    /// SIGTERM was sent.
    Stopping {
        /// Since when.
        since: Millis,
    },
    /// SIGKILL was sent.
    Killing {
        /// Since when.
        since: Millis,
    },
    /// Its process is gone for good; edges are told.
    Leaving {
        /// Since when.
        since: Millis,
    },
    /// It ended too often; 0: nothing is tried before somebody says so.
    CrashLoop {
        /// When it is tried again.
        until: Millis,
    },
}

impl Phase {
    /// A word for people.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Waiting { .. } => "waiting",
            Self::Starting { .. } => "starting",
            Self::Running { .. } => "running",
            Self::Draining { .. } => "draining",
            Self::PreStop { .. } => "pre-stop",
            Self::Stopping { .. } => "stopping",
            Self::Killing { .. } => "killing",
            Self::Leaving { .. } => "leaving",
            Self::CrashLoop { .. } => "crash-loop",
        }
    }

    /// Whether there is a process.
    pub(crate) fn has_process(self) -> bool {
        !matches!(self, Self::Waiting { .. } | Self::Leaving { .. } | Self::CrashLoop { .. })
    }
}

/// What an edge last said of an instance in one pool.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct View {
    /// Of which generation.
    pub(crate) generation: u64,
    /// What the edge acknowledged.
    pub(crate) acked: Acked,
    /// Its sessions there.
    pub(crate) sessions: u64,
    /// Of a million requests of the last minute, so many missed their deadline.
    pub(crate) miss_ppm: u64,
    /// Requests of the last minute.
    pub(crate) samples: u64,
    /// The 99th percentile of its own time.
    pub(crate) p99_ms: f64,
    /// When the edge was last heard of.
    pub(crate) heard: Millis,
    /// What is wrong, if it was not heard of.
    pub(crate) error: Option<String>,
}

/// What an edge acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Acked {
    /// Nothing yet.
    #[default]
    Nothing,
    /// This state.
    State(LeaseState),
    /// That it left.
    Gone,
}

/// An instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Instance {
    /// `APP-INDEX`.
    pub(crate) id: String,
    /// Its place among the living.
    pub(crate) index: u32,
    /// Grows with each process.
    pub(crate) generation: u64,
    /// Which release it runs.
    pub(crate) release: u64,
    /// Its ports by name.
    pub(crate) ports: BTreeMap<String, u16>,
    /// How it stands.
    pub(crate) phase: Phase,
    /// It is not started again.
    pub(crate) retire: bool,
    /// Whether it may get sessions, by its readiness check.
    pub(crate) ready: bool,
    /// Whether it ever was ready in this life.
    pub(crate) was_ready: bool,
    /// Since when it is ready.
    pub(crate) ready_since: Millis,
    /// When the instance was first wanted.
    pub(crate) made: Millis,
    /// When processes of it failed, newest last.
    pub(crate) failures: Vec<Millis>,
    /// What last happened.
    pub(crate) detail: String,
    /// Results of checks in a row: (kind, ok, how many).
    #[serde(skip)]
    pub(crate) rows: BTreeMap<CheckKind, (bool, u32)>,
    /// What edges say, by (edge, pool).
    #[serde(skip)]
    pub(crate) views: BTreeMap<(String, String), View>,
}

impl Instance {
    /// Its sessions at all edges.
    pub(crate) fn sessions(&self) -> u64 {
        let own = self.views.values().filter(|view| view.generation == self.generation);
        own.map(|view| view.sessions).sum()
    }
}

/// Which check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum CheckKind {
    /// Whether it has started.
    Startup,
    /// Whether it may get sessions.
    Ready,
    /// Whether it lives.
    Live,
}

/// Something that happened to an instance of a generation.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Event {
    /// Its process runs.
    Started,
    /// It could not be started.
    StartFailed(String),
    /// Its process is gone.
    Exited(String),
    /// A check's result.
    Checked(CheckKind, bool, String),
    /// The hook ended.
    HookDone,
    /// An edge said something.
    Seen {
        /// The edge.
        edge: String,
        /// The pool.
        pool: String,
        /// What.
        view: View,
    },
}

/// Something to do to an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Start its process.
    Start(String),
    /// SIGTERM.
    Terminate(String),
    /// SIGKILL to all that belongs to it.
    Kill(String),
    /// Run its hook.
    Hook(String),
    /// Tell of something: (instance or empty, kind, detail).
    Tell(String, &'static str, String),
}

/// How an instance is to stand at the edges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Want {
    /// The instance.
    pub(crate) id: String,
    /// Its generation.
    pub(crate) generation: u64,
    /// `None`: it is to be gone.
    pub(crate) state: Option<LeaseState>,
    /// Its weight as percent of what the manifest says, in thousandths.
    pub(crate) weight_milli: u64,
    /// Its drain's remaining time.
    pub(crate) drain_s: u64,
}

/// An application.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    /// Its name.
    pub(crate) name: String,
    /// Its edges.
    pub(crate) edges: Vec<EdgeAddress>,
    /// Its releases, oldest first.
    pub(crate) releases: Vec<Release>,
    /// The one that is to run.
    pub(crate) current: u64,
    /// How many are to run.
    pub(crate) count: u32,
    /// The instances by id.
    pub(crate) instances: BTreeMap<String, Instance>,
    /// The highest generation that each place had.
    pub(crate) generations: BTreeMap<u32, u64>,
    /// What comes in.
    pub(crate) rollout: Option<super::rollout::Rollout>,
    /// How earlier ones ended, oldest first.
    pub(crate) history: Vec<super::rollout::Ended>,
    /// Autoscaling.
    pub(crate) scale: super::scale::Scale,
    /// It is to go as a whole.
    pub(crate) removed: bool,
    /// For jitter.
    pub(crate) seed: u64,
}

impl Machine {
    /// The host was started anew, and its clock with it: moments of before say nothing any more. What waits
    /// may begin, and what failed then is not held against the host of now.
    pub(crate) fn new_life(&mut self, now: Millis) {
        for instance in self.instances.values_mut() {
            instance.phase = match instance.phase {
                Phase::Waiting { .. } => Phase::Waiting { until: now },
                Phase::CrashLoop { until: 0 } => Phase::CrashLoop { until: 0 },
                Phase::CrashLoop { .. } => Phase::CrashLoop { until: now },
                Phase::Starting { .. } => Phase::Starting { since: now },
                Phase::Running { .. } => Phase::Running { since: now },
                Phase::Draining { .. } => Phase::Draining { since: now, deadline: now },
                Phase::PreStop { .. } => Phase::PreStop { since: now },
                Phase::Stopping { .. } => Phase::Stopping { since: now },
                Phase::Killing { .. } => Phase::Killing { since: now },
                Phase::Leaving { .. } => Phase::Leaving { since: now },
            };
            (instance.made, instance.ready_since) = (now, now);
            instance.failures.clear();
        }
        if let Some(rollout) = &mut self.rollout {
            rollout.since = now;
        }
        self.scale = super::scale::Scale::default();
    }

    /// The ports that its releases name themselves.
    pub(crate) fn fixed_ports(&self) -> impl Iterator<Item = u16> {
        self.releases.iter().flat_map(|it| it.app.ports.values()).filter_map(|port| port.fixed)
    }
}
