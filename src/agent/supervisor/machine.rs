//! An instance's life.

use strowger_contract::duration::Span;

use super::model::{Acked, Action, CheckKind, Event, Instance, Machine, Millis, Phase, Want};
use crate::agent::manifest::App;
use crate::agent::ports::Ports;
use crate::control::registry::{GRACE_LEASES, LeaseState};

/// How long a start-up may take where no check says so: the process only has to appear.
const START_MS: Millis = 30_000;

/// How long edges that do not answer are told that an instance left: its lease is over by then.
const LEAVE_MS: Millis = 60_000;

/// How often SIGKILL is sent again.
const KILL_EVERY_MS: Millis = 1_000;

/// Failures that are remembered of one instance.
const FAILURES_MAX: usize = 64;

pub(super) fn millis(span: Span) -> Millis {
    Millis::try_from(span.0.as_millis()).unwrap_or(Millis::MAX)
}

impl Machine {
    /// Something happened to an instance; nothing if it was of another life of it.
    pub(crate) fn on(
        &mut self,
        now: Millis,
        id: &str,
        generation: u64,
        event: Event,
        ports: &mut Ports,
    ) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.instances.get(id).is_some_and(|it| it.generation == generation) {
            self.happened(now, id, event, ports, &mut actions);
        }
        actions.extend(self.step(now, ports));
        actions
    }

    /// Time goes on.
    pub(crate) fn step(&mut self, now: Millis, ports: &mut Ports) -> Vec<Action> {
        let mut actions = Vec::new();
        self.forget_places();
        self.autoscale(now, &mut actions);
        let wanted = self.targets(now, &mut actions);
        self.reconcile(now, &wanted, &mut actions);
        let ids: Vec<String> = self.instances.keys().cloned().collect();
        for id in ids {
            self.tick(now, &id, ports, &mut actions);
        }
        actions
    }

    /// What edges and pools said that the manifest names no more counts no more.
    fn forget_places(&mut self) {
        let places: Vec<(String, Vec<(String, String)>)> = self
            .instances
            .values()
            .filter(|it| !it.views.is_empty())
            .map(|it| (it.id.clone(), self.places(self.app_of(it))))
            .collect();
        for (id, places) in places {
            if let Some(instance) = self.instances.get_mut(&id) {
                instance.views.retain(|place, _| places.contains(place));
            }
        }
    }

    /// What the manifest says of an instance's release; the current one for one that is forgotten.
    pub(crate) fn app_of(&self, instance: &Instance) -> &App {
        let own = self.releases.iter().find(|release| release.number == instance.release);
        &own.unwrap_or_else(|| self.newest()).app
    }

    fn newest(&self) -> &super::Release {
        let current = self.releases.iter().find(|release| release.number == self.current);
        current.unwrap_or_else(|| &self.releases[self.releases.len() - 1])
    }

    /// What the manifest says now: of what may change while a release runs.
    pub(crate) fn app(&self) -> &App {
        &self.newest().app
    }

    fn happened(
        &mut self,
        now: Millis,
        id: &str,
        event: Event,
        ports: &mut Ports,
        actions: &mut Vec<Action>,
    ) {
        let Some(instance) = self.instances.get(id) else { return };
        let app = self.app_of(instance).clone();
        let Some(instance) = self.instances.get_mut(id) else { return };
        match event {
            Event::Started => {
                if matches!(instance.phase, Phase::Starting { .. }) && app.health.startup.is_none()
                {
                    run(now, instance, &app);
                }
            }
            Event::StartFailed(why) => {
                actions.push(Action::Tell(id.to_owned(), "start_failed", why.clone()));
                self.ended(now, id, &app, why, ports, actions);
            }
            Event::Exited(how) => {
                actions.push(Action::Tell(id.to_owned(), "instance_ended", how.clone()));
                self.ended(now, id, &app, how, ports, actions);
            }
            Event::Checked(kind, ok, detail) => {
                self.checked(now, id, &app, (kind, ok), detail, actions);
            }
            Event::HookDone => {
                if matches!(instance.phase, Phase::PreStop { .. }) {
                    terminate(now, instance, actions);
                }
            }
            Event::Seen { edge, pool, view } => {
                instance.views.insert((edge, pool), view);
            }
        }
    }

    fn checked(
        &mut self,
        now: Millis,
        id: &str,
        app: &App,
        (kind, ok): (CheckKind, bool),
        detail: String,
        actions: &mut Vec<Action>,
    ) {
        let Some(instance) = self.instances.get_mut(id) else { return };
        let check = match kind {
            CheckKind::Startup => &app.health.startup,
            CheckKind::Ready => &app.health.ready,
            CheckKind::Live => &app.health.live,
        };
        let Some(check) = check else { return };
        let row = instance.rows.entry(kind).or_insert((ok, 0));
        *row = if row.0 == ok { (ok, row.1.saturating_add(1)) } else { (ok, 1) };
        let enough = row.1 >= if ok { check.rise } else { check.fall };
        match kind {
            CheckKind::Startup => {
                // Whoever looks why it does not come up finds the reason in `status`.
                instance.detail.clone_from(&detail);
                if ok && enough && matches!(instance.phase, Phase::Starting { .. }) {
                    run(now, instance, app);
                }
            }
            CheckKind::Ready => {
                if !instance.ready {
                    instance.detail.clone_from(&detail);
                }
                if enough && ok != instance.ready && matches!(instance.phase, Phase::Running { .. })
                {
                    instance.ready = ok;
                    instance.was_ready |= ok;
                    instance.ready_since = now;
                    let word = if ok { "instance_ready" } else { "instance_not_ready" };
                    instance.detail.clone_from(&detail);
                    actions.push(Action::Tell(id.to_owned(), word, detail));
                }
            }
            CheckKind::Live => {
                if enough && !ok && matches!(instance.phase, Phase::Running { .. }) {
                    instance.detail = format!("not alive: {detail}");
                    let told = instance.detail.clone();
                    actions.push(Action::Tell(id.to_owned(), "instance_not_alive", told));
                    terminate(now, instance, actions);
                }
            }
        }
    }

    /// Its process is gone.
    fn ended(
        &mut self,
        now: Millis,
        id: &str,
        app: &App,
        how: String,
        ports: &mut Ports,
        actions: &mut Vec<Action>,
    ) {
        let seed = self.dice();
        let Some(instance) = self.instances.get_mut(id) else { return };
        for (name, port) in &instance.ports {
            let spec = app.ports.get(name);
            let stays = !instance.retire && spec.is_some_and(|spec| spec.listen);
            if !stays && spec.is_none_or(|spec| spec.fixed.is_none()) {
                ports.give_back(now, *port);
            }
        }
        let restart = &app.restart;
        let listened = |name: &str| app.ports.get(name).is_some_and(|spec| spec.listen);
        if instance.retire {
            instance.ports.clear();
        } else {
            instance.ports.retain(|name, _| listened(name));
        }
        instance.rows.clear();
        (instance.ready, instance.was_ready) = (false, false);
        instance.detail = how;
        if instance.retire {
            instance.phase = Phase::Leaving { since: now };
            return;
        }
        let window = millis(restart.crash_window);
        instance.failures.retain(|at| now.saturating_sub(*at) < window);
        instance.failures.push(now);
        if instance.failures.len() > FAILURES_MAX {
            instance.failures.remove(0);
        }
        let failures = u32::try_from(instance.failures.len()).unwrap_or(u32::MAX);
        if failures >= restart.crash_loop {
            let retry = millis(restart.crash_retry);
            let until = if retry == 0 { 0 } else { now.saturating_add(retry) };
            instance.phase = Phase::CrashLoop { until };
            let detail = format!("ended {failures} times: {}", instance.detail);
            actions.push(Action::Tell(id.to_owned(), "crash_loop", detail));
            return;
        }
        let doubled = millis(restart.backoff).saturating_mul(1 << (failures - 1).min(20));
        let pause = doubled.min(millis(restart.backoff_max));
        instance.phase = Phase::Waiting {
            until: now.saturating_add(jitter(pause, restart.jitter_percent, seed)),
        };
    }

    fn dice(&mut self) -> u64 {
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.seed ^ self.seed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed ^ mixed >> 27
    }

    /// An instance's timers.
    fn tick(&mut self, now: Millis, id: &str, ports: &mut Ports, actions: &mut Vec<Action>) {
        let Some(instance) = self.instances.get(id) else { return };
        let app = self.app_of(instance).clone();
        let drain = self.app().drain.clone();
        let over = |since: Millis, span: Span| now.saturating_sub(since) >= millis(span);
        match instance.phase {
            Phase::Waiting { until } if instance.retire || now >= until => {
                if instance.retire {
                    self.leave(now, id);
                } else {
                    self.start(now, id, &app, ports, actions);
                }
            }
            Phase::CrashLoop { until } if instance.retire || (until > 0 && now >= until) => {
                if instance.retire {
                    self.leave(now, id);
                } else if let Some(instance) = self.instances.get_mut(id) {
                    instance.failures.clear();
                    self.start(now, id, &app, ports, actions);
                }
            }
            Phase::Starting { since } => {
                let limit =
                    app.health.startup.as_ref().map_or(START_MS, |check| millis(check.within));
                if now.saturating_sub(since) >= limit {
                    self.stop(now, id, "did not start in time", actions);
                }
            }
            Phase::Draining { deadline, .. } => {
                let drained = self.is_drained(now, id);
                if drained || now >= deadline {
                    let why = if drained { "no sessions are left" } else { "its deadline is over" };
                    actions.push(Action::Tell(id.to_owned(), "drained", why.to_owned()));
                    let Some(instance) = self.instances.get_mut(id) else { return };
                    if drain.pre_stop.is_some() {
                        instance.phase = Phase::PreStop { since: now };
                        actions.push(Action::Hook(id.to_owned()));
                    } else {
                        terminate(now, instance, actions);
                    }
                }
            }
            Phase::PreStop { since } if over(since, drain.pre_stop_timeout) => {
                self.stop(now, id, "its hook took too long", actions);
            }
            Phase::Stopping { since } if over(since, drain.kill_after) => {
                if let Some(instance) = self.instances.get_mut(id) {
                    instance.phase = Phase::Killing { since: now };
                }
                actions.push(Action::Kill(id.to_owned()));
            }
            Phase::Killing { since } if now.saturating_sub(since) >= KILL_EVERY_MS => {
                if let Some(instance) = self.instances.get_mut(id) {
                    instance.phase = Phase::Killing { since: now };
                }
                actions.push(Action::Kill(id.to_owned()));
            }
            Phase::Leaving { since } => {
                let gone = self.places(&app).into_iter().all(|place| {
                    let view = instance.views.get(&place);
                    view.is_some_and(|it| {
                        it.generation == instance.generation && it.acked == Acked::Gone
                    })
                });
                let leases = app.register.values().map(|it| millis(it.lease));
                let longest = leases.max().unwrap_or(0).saturating_mul(GRACE_LEASES + 2);
                if gone || now.saturating_sub(since) >= longest.max(LEAVE_MS) {
                    self.instances.remove(id);
                }
            }
            _ => {}
        }
    }

    fn stop(&mut self, now: Millis, id: &str, why: &str, actions: &mut Vec<Action>) {
        if let Some(instance) = self.instances.get_mut(id) {
            instance.detail = why.to_owned();
            actions.push(Action::Tell(id.to_owned(), "instance_stopped", why.to_owned()));
            terminate(now, instance, actions);
        }
    }

    fn leave(&mut self, now: Millis, id: &str) {
        if let Some(instance) = self.instances.get_mut(id) {
            instance.phase = Phase::Leaving { since: now };
        }
    }

    fn start(
        &mut self,
        now: Millis,
        id: &str,
        app: &App,
        ports: &mut Ports,
        actions: &mut Vec<Action>,
    ) {
        let Some(instance) = self.instances.get_mut(id) else { return };
        for (name, spec) in &app.ports {
            if spec.transport == crate::agent::manifest::PortTransport::Unix
                || instance.ports.contains_key(name)
            {
                continue;
            }
            let Some(port) = spec.fixed.or_else(|| ports.take(now)) else {
                instance.detail = "no port is free that has rested long enough".to_owned();
                instance.phase = Phase::Waiting { until: now + 1_000 };
                return;
            };
            instance.ports.insert(name.clone(), port);
        }
        let generation = self.generations.entry(instance.index).or_insert(0);
        *generation += 1;
        instance.generation = *generation;
        instance.phase = Phase::Starting { since: now };
        instance.views.clear();
        instance.rows.clear();
        actions.push(Action::Start(id.to_owned()));
    }

    /// Where an instance is registered: each (edge, pool).
    pub(crate) fn places(&self, app: &App) -> Vec<(String, String)> {
        let edges = self.edges.iter();
        edges
            .flat_map(|edge| app.register.keys().map(|pool| (edge.url.clone(), pool.clone())))
            .collect()
    }

    /// Whether each edge has acknowledged that it gets nothing new, and says that it has no session.
    /// An edge that does not answer is waited for, unless the manifest says how long at most.
    fn is_drained(&self, now: Millis, id: &str) -> bool {
        let Some(instance) = self.instances.get(id) else { return true };
        let lost = millis(self.app().drain.lost_edge);
        let Phase::Draining { since, .. } = instance.phase else { return true };
        self.places(self.app_of(instance)).into_iter().all(|place| {
            let view = instance.views.get(&place);
            let own = view.filter(|view| view.generation == instance.generation);
            let heard = own.map_or(since, |view| view.heard.max(since));
            let empty = own.is_some_and(|view| {
                view.acked == Acked::State(LeaseState::Draining) && view.sessions == 0
                    || view.acked == Acked::Gone
            });
            empty || (lost > 0 && now.saturating_sub(heard) >= lost)
        })
    }

    /// How each instance is to stand at the edges.
    pub(crate) fn wants(&self, now: Millis) -> Vec<Want> {
        let of = |instance: &Instance| {
            let state = match instance.phase {
                Phase::Running { .. } if !instance.was_ready => None,
                Phase::Running { .. } => self.shown(instance),
                Phase::Draining { .. }
                | Phase::PreStop { .. }
                | Phase::Stopping { .. }
                | Phase::Killing { .. } => Some(LeaseState::Draining),
                _ => None,
            };
            let drain_s = match instance.phase {
                Phase::Draining { deadline, .. } => deadline.saturating_sub(now) / 1_000 + 1,
                _ => 0,
            };
            Want {
                id: instance.id.clone(),
                generation: instance.generation,
                // What was never registered needs no drain there.
                state: state.filter(|_| instance.was_ready),
                weight_milli: self.weight_milli(instance),
                drain_s,
            }
        };
        self.instances.values().map(of).collect()
    }
}

/// It has started.
fn run(now: Millis, instance: &mut Instance, app: &App) {
    instance.phase = Phase::Running { since: now };
    instance.detail.clear();
    if app.health.ready.is_none() {
        (instance.ready, instance.was_ready) = (true, true);
        instance.ready_since = now;
    }
}

pub(super) fn terminate(now: Millis, instance: &mut Instance, actions: &mut Vec<Action>) {
    instance.phase = Phase::Stopping { since: now };
    actions.push(Action::Terminate(instance.id.clone()));
}

/// A pause, longer or shorter by up to `percent`.
fn jitter(pause: Millis, percent: u32, dice: u64) -> Millis {
    let spread = pause.saturating_mul(u64::from(percent)) / 100;
    if spread == 0 {
        return pause;
    }
    pause - spread + dice % (2 * spread + 1)
}
