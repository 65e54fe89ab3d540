//! How many instances of which release: what is missing is started, what is too many is retired.

use std::collections::BTreeMap;

use super::machine::{millis, terminate};
use super::model::{Action, Instance, Machine, Millis, Phase};

impl Machine {
    /// Makes the living match what is wanted of each release.
    pub(super) fn reconcile(
        &mut self,
        now: Millis,
        wanted: &BTreeMap<u64, u32>,
        actions: &mut Vec<Action>,
    ) {
        let mut releases: Vec<u64> = wanted.keys().copied().collect();
        releases.extend(self.instances.values().map(|it| it.release));
        releases.sort_unstable();
        releases.dedup();
        for release in releases {
            let wanted = wanted.get(&release).copied().unwrap_or(0);
            let mut living: Vec<(bool, u64, u32, String)> = self
                .instances
                .values()
                .filter(|it| it.release == release && !it.retire)
                .map(|it| (is_up(it), it.sessions(), u32::MAX - it.index, it.id.clone()))
                .collect();
            // Those that do not work go first, then those with the fewest sessions, then the newest.
            living.sort();
            let count = u32::try_from(living.len()).unwrap_or(u32::MAX);
            for (.., id) in living.iter().take(count.saturating_sub(wanted) as usize) {
                self.retire(now, id, actions);
            }
            for _ in count..wanted {
                self.add(now, release, actions);
            }
        }
    }

    fn add(&mut self, now: Millis, release: u64, actions: &mut Vec<Action>) {
        let taken = |index: u32| self.instances.values().any(|it| it.index == index);
        let index = (0..).find(|index| !taken(*index)).unwrap_or(u32::MAX);
        let id = format!("{}-{index}", self.name);
        let instance = Instance {
            id: id.clone(),
            index,
            generation: self.generations.get(&index).copied().unwrap_or(0),
            release,
            ports: BTreeMap::new(),
            phase: Phase::Waiting { until: now },
            retire: false,
            ready: false,
            was_ready: false,
            ready_since: 0,
            made: now,
            failures: Vec::new(),
            detail: String::new(),
            rows: BTreeMap::new(),
            views: BTreeMap::new(),
        };
        actions.push(Action::Tell(id.clone(), "instance_wanted", format!("release {release}")));
        self.instances.insert(id, instance);
    }

    /// An instance is to go: through its drain, if it has anything to lose.
    pub(crate) fn retire(&mut self, now: Millis, id: &str, actions: &mut Vec<Action>) {
        let deadline = now.saturating_add(millis(self.app().drain.deadline));
        let Some(instance) = self.instances.get_mut(id) else { return };
        if instance.retire {
            return;
        }
        instance.retire = true;
        match instance.phase {
            Phase::Running { .. } if instance.was_ready => {
                instance.phase = Phase::Draining { since: now, deadline };
                actions.push(Action::Tell(id.to_owned(), "drain_started", String::new()));
            }
            Phase::Starting { .. } | Phase::Running { .. } => terminate(now, instance, actions),
            _ => {}
        }
    }

    /// An operator ends a drain: what is left is given up.
    pub(crate) fn hurry(&mut self, now: Millis, id: &str) -> bool {
        let Some(instance) = self.instances.get_mut(id) else { return false };
        if let Phase::Draining { since, .. } = instance.phase {
            instance.phase = Phase::Draining { since, deadline: now };
            return true;
        }
        false
    }

    /// An operator wants those tried again that ended too often.
    pub(crate) fn forgive(&mut self, now: Millis) {
        for instance in self.instances.values_mut() {
            if matches!(instance.phase, Phase::CrashLoop { .. }) {
                instance.failures.clear();
                instance.phase = Phase::Waiting { until: now };
            }
        }
    }
}

fn is_up(instance: &Instance) -> bool {
    matches!(instance.phase, Phase::Running { .. }) && instance.ready
}
