//! How many instances, by load. Out quickly, in slowly, and never by killing: what is too many is
//! drained, the one with the fewest sessions first.

use serde::{Deserialize, Serialize};

use super::machine::millis;
use super::model::{Action, Machine, Millis, Phase};

/// Requests that a share of misses needs to mean anything.
const SAMPLES_MIN: u64 = 50;

/// How full the rest may be, in percent of the target, for one to go: the gap keeps noise from
/// starting and stopping in turn.
const IN_PERCENT: u64 = 80;

/// What autoscaling remembers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Scale {
    /// When one was last started.
    pub(crate) out_at: Option<Millis>,
    /// Since when there has been one too many.
    pub(crate) low_since: Option<Millis>,
}

impl Machine {
    /// Changes the count if load says so. Not while a release comes in.
    pub(super) fn autoscale(&mut self, now: Millis, actions: &mut Vec<Action>) {
        let Some(plan) = self.app().autoscale.clone() else { return };
        if self.rollout.is_some() || self.removed {
            return;
        }
        let before = self.count;
        self.count = self.count.clamp(plan.min, plan.max);
        let living = self.instances.values().filter(|it| !it.retire);
        let (mut sessions, mut up) = (0, 0);
        for instance in living {
            sessions += instance.sessions();
            up += u32::from(instance.ready && matches!(instance.phase, Phase::Running { .. }));
        }
        let figures = self.figures(now, self.current);
        let misses = figures.samples >= SAMPLES_MIN && figures.miss_percent > plan.miss_percent;
        let target = plan.sessions_per_instance;
        let needed = u32::try_from(sessions.div_ceil(target)).unwrap_or(u32::MAX);
        let cool =
            self.scale.out_at.is_none_or(|at| now.saturating_sub(at) >= millis(plan.out_cooldown));
        // Those that were started must work before more are: a slow start is no lack of instances.
        if (needed > self.count || misses) && cool && up >= self.count && self.count < plan.max {
            self.count = needed.max(self.count + 1).min(plan.max);
            self.scale.out_at = Some(now);
        }
        let fits = |count: u32| {
            let room = u128::from(count) * u128::from(target) * u128::from(IN_PERCENT) / 100;
            u128::from(sessions) <= room
        };
        if self.count > plan.min && !misses && fits(self.count - 1) {
            let since = *self.scale.low_since.get_or_insert(now);
            if now.saturating_sub(since) >= millis(plan.in_cooldown) {
                self.count -= 1;
                self.scale.low_since = Some(now);
            }
        } else {
            self.scale.low_since = None;
        }
        if self.count != before {
            let detail = format!(
                "{before} to {}: {sessions} sessions, {:.2} % missed",
                self.count, figures.miss_percent
            );
            actions.push(Action::Tell(String::new(), "scaled", detail));
        }
    }
}
