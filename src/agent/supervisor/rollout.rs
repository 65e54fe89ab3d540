//! How a release comes in, and how it goes back.
//!
//! A rollout only says how many of which release are wanted and how they show themselves at the edges;
//! starting, draining and stopping are the same as ever. Old instances drain beside it: a call of an hour
//! does not hold a rollout up.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::machine::millis;
use super::model::{Acked, Action, Instance, Machine, Millis, Phase};
use crate::agent::manifest::{Gate, RolloutPlan, Strategy};
use crate::control::registry::LeaseState;

/// Ends of rollouts that are remembered.
const HISTORY_MAX: usize = 50;

/// A share of misses that counts as the baseline's at least: nothing is a multiple of zero.
const BASELINE_FLOOR_PERCENT: f64 = 0.1;

/// A rollout under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Rollout {
    /// The release that ran before.
    pub(crate) from: u64,
    /// The one that comes in.
    pub(crate) to: u64,
    /// How.
    pub(crate) strategy: Strategy,
    /// Where it is.
    pub(crate) stage: Stage,
    /// Of `canary`: which step; of `rolling`: how many new ones are wanted.
    pub(crate) step: u32,
    /// Since when it is there.
    pub(crate) since: Millis,
    /// It waits for `promote`.
    pub(crate) paused: bool,
    /// Why, if it paused by itself.
    pub(crate) reason: String,
}

/// Where a rollout is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Stage {
    /// New instances become ready.
    Growing,
    /// They are watched.
    Watching,
    /// The new release takes over.
    Finishing,
}

/// How a rollout ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ended {
    /// The release that ran before.
    pub(crate) from: u64,
    /// The one that was to come in.
    pub(crate) to: u64,
    /// `done`, `rolled-back`, `aborted`.
    pub(crate) outcome: String,
    /// Why.
    pub(crate) reason: String,
}

/// What edges say of a release's requests in the last minute.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Figures {
    /// Percent that missed their deadline.
    pub(crate) miss_percent: f64,
    /// Of how many.
    pub(crate) samples: u64,
}

/// How long an edge's figures count, in milliseconds.
const FIGURES_HOLD: Millis = 60_000;

impl Machine {
    /// Brings a release in.
    pub(crate) fn roll(&mut self, now: Millis, to: u64, actions: &mut Vec<Action>) {
        if self.current == to {
            return;
        }
        let mut from = self.current;
        if let Some(under_way) = self.rollout.take() {
            self.note_end(&under_way, "aborted", "another release came");
            // What was coming in has proven nothing: the release of before carries on until the new one can.
            if under_way.stage != Stage::Finishing {
                from = under_way.from;
            }
        }
        self.current = to;
        if from == to {
            let detail = format!("release {to}: another one was coming in");
            actions.push(Action::Tell(String::new(), "rolled_back", detail));
            return;
        }
        // Nothing of the old one runs: there is nothing to be careful with.
        if !self.instances.values().any(|it| it.release != to && !it.retire) {
            return;
        }
        let strategy = self.app().rollout.strategy;
        let step = if strategy == Strategy::Rolling { self.app().rollout.max_in_flight } else { 0 };
        self.rollout = Some(Rollout {
            from,
            to,
            strategy,
            stage: Stage::Growing,
            step,
            since: now,
            paused: false,
            reason: String::new(),
        });
        let detail = format!("release {from} to {to}");
        actions.push(Action::Tell(String::new(), "rollout_started", detail));
    }

    fn note_end(&mut self, rollout: &Rollout, outcome: &str, reason: &str) {
        if self.history.len() >= HISTORY_MAX {
            self.history.remove(0);
        }
        self.history.push(Ended {
            from: rollout.from,
            to: rollout.to,
            outcome: outcome.to_owned(),
            reason: reason.to_owned(),
        });
    }

    /// Back to the release of before.
    pub(crate) fn back(&mut self, outcome: &str, reason: &str, actions: &mut Vec<Action>) -> bool {
        let Some(rollout) = self.rollout.take() else { return false };
        self.note_end(&rollout, outcome, reason);
        self.current = rollout.from;
        let detail = format!("release {} to {}: {reason}", rollout.to, rollout.from);
        actions.push(Action::Tell(String::new(), "rolled_back", detail));
        true
    }

    /// On with it, whatever the gates say.
    pub(crate) fn promote(&mut self, now: Millis) -> bool {
        let Some(rollout) = &mut self.rollout else { return false };
        (rollout.paused, rollout.stage, rollout.since) = (false, Stage::Finishing, now);
        rollout.reason.clear();
        true
    }

    /// It stays where it is.
    pub(crate) fn pause(&mut self) -> bool {
        let Some(rollout) = &mut self.rollout else { return false };
        rollout.paused = true;
        "by an operator".clone_into(&mut rollout.reason);
        true
    }

    /// How many of which release are wanted now. The rollout goes on by what there is.
    pub(super) fn targets(&mut self, now: Millis, actions: &mut Vec<Action>) -> BTreeMap<u64, u32> {
        let total = self.count;
        if let Some(mut rollout) = self.rollout.clone() {
            let plan = self.app().rollout.clone();
            if let Some(reason) = self.breach(now, &rollout, &plan)
                && plan.auto_rollback
            {
                self.back("rolled-back", &reason, actions);
            } else {
                if self.advance(now, &mut rollout, &plan, actions) {
                    self.note_end(&rollout, "done", "");
                    self.rollout = None;
                    let detail = format!("release {} runs", rollout.to);
                    actions.push(Action::Tell(String::new(), "rollout_done", detail));
                } else {
                    self.rollout = Some(rollout);
                }
            }
        }
        let Some(rollout) = &self.rollout else {
            return BTreeMap::from([(self.current, total)]);
        };
        let plan = &self.app().rollout;
        let ready = self.settled(now, rollout, plan);
        let (to, from) = match (rollout.strategy, rollout.stage) {
            (Strategy::BlueGreen, Stage::Growing | Stage::Watching) => (total, total),
            (Strategy::Canary, Stage::Growing | Stage::Watching) => {
                (canaries(total, plan, rollout.step), total)
            }
            (Strategy::Rolling, Stage::Growing) => {
                (rollout.step.min(total), total.saturating_sub(ready))
            }
            _ => (total, total.saturating_sub(ready)),
        };
        BTreeMap::from([(rollout.to, to), (rollout.from, from)])
    }

    /// Takes the next step if it is time; whether the rollout is over.
    fn advance(
        &self,
        now: Millis,
        rollout: &mut Rollout,
        plan: &RolloutPlan,
        actions: &mut Vec<Action>,
    ) -> bool {
        let total = self.count;
        let ready = self.settled(now, rollout, plan);
        let mut enter = |rollout: &mut Rollout, stage| {
            (rollout.stage, rollout.since) = (stage, now);
            let detail = format!("{stage:?}, step {}", rollout.step).to_lowercase();
            actions.push(Action::Tell(String::new(), "rollout_step", detail));
        };
        let held = now.saturating_sub(rollout.since);
        match (rollout.strategy, rollout.stage) {
            _ if rollout.paused => false,
            (Strategy::Rolling, Stage::Growing) => {
                if ready >= total {
                    return true;
                }
                if ready >= rollout.step.min(total) {
                    rollout.step = rollout.step.saturating_add(plan.max_in_flight).min(total);
                    enter(rollout, Stage::Growing);
                }
                false
            }
            (Strategy::BlueGreen, Stage::Growing) => {
                if ready >= total {
                    enter(rollout, Stage::Watching);
                }
                false
            }
            (Strategy::Canary, Stage::Growing) => {
                if ready >= canaries(total, plan, rollout.step) {
                    enter(rollout, Stage::Watching);
                }
                false
            }
            (strategy, Stage::Watching) => {
                let enough =
                    self.figures(now, rollout.to).samples >= plan.gate.min_samples || total == 0;
                if held >= millis(plan.hold) && enough {
                    let last = rollout.step as usize + 1 >= plan.steps.len();
                    if strategy == Strategy::Canary && !last {
                        rollout.step += 1;
                        enter(rollout, Stage::Growing);
                    } else {
                        enter(rollout, Stage::Finishing);
                    }
                } else if held >= millis(plan.progress_deadline).max(millis(plan.hold)) {
                    rollout.paused = true;
                    "too few requests to judge by: promote or abort it"
                        .clone_into(&mut rollout.reason);
                    let why = rollout.reason.clone();
                    actions.push(Action::Tell(String::new(), "rollout_paused", why));
                }
                false
            }
            (_, Stage::Finishing) => ready >= total,
        }
    }

    /// Instances of the new release that have been ready long enough, and that each edge that answers
    /// has acknowledged.
    fn settled(&self, now: Millis, rollout: &Rollout, plan: &RolloutPlan) -> u32 {
        let hidden = rollout.strategy == Strategy::BlueGreen && rollout.stage == Stage::Growing;
        let counts = |it: &&Instance| {
            it.release == rollout.to
                && !it.retire
                && it.ready
                && matches!(it.phase, Phase::Running { .. })
                && now.saturating_sub(it.ready_since) >= millis(plan.min_healthy_time)
                && (hidden || self.is_known(it))
        };
        u32::try_from(self.instances.values().filter(counts).count()).unwrap_or(u32::MAX)
    }

    /// Whether the edges have it: at least one, and each that answers.
    fn is_known(&self, instance: &Instance) -> bool {
        let places = self.places(self.app_of(instance));
        let mut known = places.is_empty();
        for place in places {
            let view = instance.views.get(&place);
            match view.filter(|view| view.generation == instance.generation) {
                Some(view) if matches!(view.acked, Acked::State(LeaseState::Ready)) => known = true,
                Some(view) if view.error.is_some() => {}
                _ => return false,
            }
        }
        known
    }

    /// What speaks against the new release.
    fn breach(&self, now: Millis, rollout: &Rollout, plan: &RolloutPlan) -> Option<String> {
        for instance in self.instances.values().filter(|it| it.release == rollout.to && !it.retire)
        {
            if matches!(instance.phase, Phase::CrashLoop { .. }) {
                return Some(format!("{} ended again and again: {}", instance.id, instance.detail));
            }
            if !instance.ready && now.saturating_sub(instance.made) >= millis(plan.healthy_deadline)
            {
                return Some(format!("{} is not ready in time: {}", instance.id, instance.detail));
            }
        }
        if rollout.stage == Stage::Finishing {
            return None;
        }
        judge(&plan.gate, self.figures(now, rollout.to), self.figures(now, rollout.from))
    }

    /// What edges say of a release.
    pub(crate) fn figures(&self, now: Millis, release: u64) -> Figures {
        let (mut samples, mut missed) = (0, 0.0);
        for instance in self.instances.values().filter(|it| it.release == release) {
            // They are of the last minute before they were told: of an edge that is not heard of they say
            // nothing of now.
            let views = instance.views.values().filter(|it| {
                it.generation == instance.generation && now.saturating_sub(it.heard) <= FIGURES_HOLD
            });
            for view in views {
                samples += view.samples;
                missed += view.samples as f64 * view.miss_ppm as f64 / 1e6;
            }
        }
        let miss_percent = if samples == 0 { 0.0 } else { missed * 100.0 / samples as f64 };
        Figures { miss_percent, samples }
    }

    /// How an instance that could work shows itself.
    pub(super) fn shown(&self, instance: &Instance) -> Option<LeaseState> {
        let plain = if instance.ready { LeaseState::Ready } else { LeaseState::Suspended };
        let Some(rollout) = &self.rollout else { return Some(plain) };
        match (rollout.strategy, rollout.stage) {
            // All green ones become ready before the first is shown.
            (Strategy::BlueGreen, Stage::Growing) if instance.release == rollout.to => None,
            // The blue ones keep their sessions and stay, to go back at once.
            (Strategy::BlueGreen, Stage::Watching) if instance.release == rollout.from => {
                Some(LeaseState::Suspended)
            }
            _ => Some(plain),
        }
    }

    /// An instance's weight, in thousandths of what the manifest says. Canaries together get their
    /// percent of the sessions: instances are chosen by a hash of the session's key, weighted, so that
    /// a session's key decides, at every edge alike.
    pub(super) fn weight_milli(&self, instance: &Instance) -> u64 {
        let Some(rollout) = &self.rollout else { return 1_000 };
        let plan = &self.app().rollout;
        let is_share = rollout.strategy == Strategy::Canary && rollout.stage != Stage::Finishing;
        if !is_share || instance.release != rollout.to {
            return 1_000;
        }
        let percent = u64::from(percent_of(plan, rollout.step));
        if percent >= 100 {
            return 1_000;
        }
        let of = |release: u64| {
            let own = self.instances.values().filter(|it| it.release == release && !it.retire);
            own.filter(|it| it.was_ready).count() as u64
        };
        let (new, old) = (of(rollout.to).max(1), of(rollout.from));
        (1_000 * old * percent / ((100 - percent) * new)).max(1)
    }
}

fn percent_of(plan: &RolloutPlan, step: u32) -> u32 {
    plan.steps.get(step as usize).or_else(|| plan.steps.last()).copied().unwrap_or(100)
}

/// How many instances carry a step's share.
fn canaries(total: u32, plan: &RolloutPlan, step: u32) -> u32 {
    (total * percent_of(plan, step)).div_ceil(100).clamp(1, total.max(1))
}

/// What figures say against a release, if there are enough of them.
pub(super) fn judge(gate: &Gate, new: Figures, old: Figures) -> Option<String> {
    if new.samples < gate.min_samples.max(1) {
        return None;
    }
    if new.miss_percent > gate.max_miss_percent {
        return Some(format!(
            "{:.2} % of {} requests missed their deadline; {} % may",
            new.miss_percent, new.samples, gate.max_miss_percent
        ));
    }
    let compared = gate.max_vs_baseline > 0.0 && old.samples >= gate.min_samples.max(1);
    let bound = old.miss_percent.max(BASELINE_FLOOR_PERCENT) * gate.max_vs_baseline;
    (compared && new.miss_percent > bound).then(|| {
        format!(
            "{:.2} % of {} requests missed their deadline; of the old release's {:.2} %",
            new.miss_percent, new.samples, old.miss_percent
        )
    })
}
