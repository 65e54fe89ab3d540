//! What the agent does when it is asked to.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::api::{Command, Refusal, RolloutOrder};
use super::daemon::{Agent, clock};
use super::launch::Places;
use super::manifest::{self, App, Manifest, Service};
use super::plan::{Change, change};
use super::supervisor::{Machine, Millis, Phase, Release, Scale};
use super::{launch, logs, release};
use crate::control::config::Source;

/// Releases that an application remembers.
const RELEASES_MAX: usize = 100;

type Answer = Result<Value, Refusal>;

fn unknown_app(app: &str) -> Refusal {
    Refusal::new(404, format!("there is no application `{app}`"))
}

impl Agent {
    pub(super) fn command(&mut self, command: Command) -> Answer {
        match command {
            Command::Apply { text, name, folder, dry_run } => {
                self.apply(Source { name, text }, &folder, dry_run)
            }
            Command::Status => Ok(self.status()),
            Command::Metrics => Ok(Value::String(self.metrics())),
            Command::Scale { app, count } => self.scale(&app, count),
            Command::Rollback { app, release } => self.rollback(&app, release),
            Command::Drain { instance, now } => self.drain(&instance, now),
            Command::Rollout { app, what } => self.rollout(&app, what),
            Command::Remove { app } => self.remove(&app),
            Command::Prepare { app } => self.one_off(&app),
            Command::Logs { of, tail, since } => self.logs(&of, tail, &since),
        }
    }

    fn apply(&mut self, source: Source, folder: &Path, dry_run: bool) -> Answer {
        let manifest = super::read::read(&source, folder).map_err(|errors| Refusal {
            status: 422,
            errors: errors.0.iter().map(ToString::to_string).collect(),
        })?;
        // All of it is looked at before anything is done.
        let mut wanted = Vec::new();
        let mut errors = Vec::new();
        for (name, app) in &manifest.apps {
            match self.make_release(name, app, &manifest) {
                Ok(release) => wanted.push((name.clone(), release)),
                Err(error) => errors.push(format!("{}: apps.{name}: {error}", source.name)),
            }
        }
        if !errors.is_empty() {
            return Err(Refusal { status: 422, errors });
        }
        let mut steps = Vec::new();
        for (name, release) in wanted {
            let change = change(self.apps.get(&name), &release, &manifest.edges);
            steps.push(json!({ "app": name, "change": change.word(), "detail": change.detail() }));
            if !dry_run {
                self.bring_in(&name, release, &manifest, change);
            }
        }
        Ok(json!({ "dry_run": dry_run, "apps": steps }))
    }

    fn make_release(&self, name: &str, app: &App, manifest: &Manifest) -> Result<Release, String> {
        let bound = app.bind.iter().filter_map(|it| manifest.services.get_key_value(it));
        let services: BTreeMap<String, Service> =
            bound.map(|(name, service)| (name.clone(), service.clone())).collect();
        let (content, dir) = release::take(&self.folder, name, app)?;
        release::preflight(&app.exec[0], dir.as_deref())?;
        for (name, path) in &app.secrets {
            std::fs::metadata(path)
                .map_err(|error| format!("secrets.{name}: {}: {error}", path.display()))?;
        }
        let digest = release::run_digest(app, &services, &content);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Release {
            number: 0,
            digest,
            content,
            dir,
            app: app.clone(),
            services,
            made: now.as_secs(),
        })
    }

    fn bring_in(&mut self, name: &str, mut release: Release, manifest: &Manifest, change: Change) {
        let now = clock();
        let mut actions = Vec::new();
        let seed = strowger_contract::stable_hash(name.as_bytes()) ^ now;
        let machine = self.apps.entry(name.to_owned()).or_insert_with(|| Machine {
            name: name.to_owned(),
            edges: Vec::new(),
            releases: Vec::new(),
            current: 0,
            count: release.app.instances,
            instances: BTreeMap::new(),
            generations: BTreeMap::new(),
            rollout: None,
            history: Vec::new(),
            scale: Scale::default(),
            removed: false,
            seed,
        });
        machine.edges.clone_from(&manifest.edges);
        machine.removed = false;
        let scaled = release.app.autoscale.is_some() && !machine.releases.is_empty();
        if !scaled || machine.count == 0 {
            machine.count = release.app.instances;
        }
        machine.forgive(now);
        if change == Change::NewRelease || change == Change::Created {
            let last = machine.releases.last().map_or(0, |it| it.number);
            release.number = last + 1;
            let number = release.number;
            machine.releases.push(release);
            if machine.current == 0 {
                machine.current = number;
            } else {
                machine.roll(now, number, &mut actions);
            }
            forget_old(machine);
        } else {
            let current = machine.current;
            if let Some(own) = machine.releases.iter_mut().find(|it| it.number == current) {
                own.app = release.app;
            }
            let resources = machine.app().resources.clone();
            for id in machine.instances.keys() {
                // What cannot be had shows in `status`.
                self.cgroups.apply(id, &resources, &[]);
            }
        }
        self.save();
        self.settle(name, actions);
        self.step_all();
    }

    fn machine(&mut self, app: &str) -> Result<&mut Machine, Refusal> {
        self.apps.get_mut(app).ok_or_else(|| unknown_app(app))
    }

    fn scale(&mut self, app: &str, count: u32) -> Answer {
        if count > manifest::INSTANCES_MAX {
            let most = manifest::INSTANCES_MAX;
            return Err(Refusal::new(422, format!("{count} is out of range: 0 to {most}")));
        }
        let machine = self.machine(app)?;
        if let Some(plan) = machine.app().autoscale.as_ref()
            && !(plan.min..=plan.max).contains(&count)
        {
            let (min, max) = (plan.min, plan.max);
            return Err(Refusal::new(422, format!("autoscale keeps it from {min} to {max}")));
        }
        let before = std::mem::replace(&mut machine.count, count);
        self.save();
        self.step_all();
        Ok(json!({ "app": app, "before": before, "count": count }))
    }

    fn rollback(&mut self, app: &str, wanted: Option<u64>) -> Answer {
        let now = clock();
        let machine = self.machine(app)?;
        let mut actions = Vec::new();
        let under_way = machine.rollout.as_ref().map(|it| it.from);
        if let Some(from) = under_way.filter(|from| wanted.is_none_or(|wanted| wanted == *from)) {
            machine.back("aborted", "rolled back by an operator", &mut actions);
            self.settle(app, actions);
            self.step_all();
            return Ok(json!({ "app": app, "release": from }));
        }
        let current = machine.current;
        let before =
            machine.history.iter().rev().find(|it| it.to == current && it.outcome == "done");
        let before = before.map(|it| it.from).or_else(|| {
            let older = machine.releases.iter().rev().map(|it| it.number);
            older.filter(|number| *number < current).max()
        });
        let to =
            wanted.or(before).ok_or_else(|| Refusal::new(409, "there is no earlier release"))?;
        let Some(target) = machine.releases.iter().find(|it| it.number == to) else {
            let known: Vec<String> =
                machine.releases.iter().map(|it| it.number.to_string()).collect();
            let known = known.join(", ");
            return Err(Refusal::new(404, format!("there is no release {to}; known are {known}")));
        };
        if let Some(dir) = target.dir.as_ref().filter(|dir| !dir.exists()) {
            return Err(Refusal::new(409, format!("{} is there no more", dir.display())));
        }
        machine.roll(now, to, &mut actions);
        self.save();
        self.settle(app, actions);
        self.step_all();
        Ok(json!({ "app": app, "release": to }))
    }

    fn drain(&mut self, instance: &str, hurry: bool) -> Answer {
        let app = self.apps.iter().find(|(_, it)| it.instances.contains_key(instance));
        let Some(app) = app.map(|(app, _)| app.clone()) else {
            return Err(Refusal::new(404, format!("there is no instance `{instance}`")));
        };
        let (now, mut actions) = (clock(), Vec::new());
        let machine = self.machine(&app)?;
        machine.retire(now, instance, &mut actions);
        if hurry {
            machine.hurry(now, instance);
        }
        let sessions = machine.instances.get(instance).map_or(0, |it| it.sessions());
        self.save();
        self.settle(&app, actions);
        self.step_all();
        Ok(json!({ "instance": instance, "sessions": sessions }))
    }

    fn rollout(&mut self, app: &str, what: RolloutOrder) -> Answer {
        let (now, mut actions) = (clock(), Vec::new());
        let machine = self.machine(app)?;
        let done = match what {
            RolloutOrder::Pause => machine.pause(),
            RolloutOrder::Promote => machine.promote(now),
            RolloutOrder::Abort => machine.back("aborted", "aborted by an operator", &mut actions),
        };
        if !done {
            return Err(Refusal::new(409, format!("no release of `{app}` is coming in")));
        }
        self.save();
        self.settle(app, actions);
        self.step_all();
        Ok(json!({ "app": app }))
    }

    fn remove(&mut self, app: &str) -> Answer {
        let machine = self.machine(app)?;
        (machine.removed, machine.count, machine.rollout) = (true, 0, None);
        let left = machine.instances.len();
        self.save();
        self.step_all();
        Ok(json!({ "app": app, "instances": left }))
    }

    /// A one-off process (XII): the application's environment, folder and limits; no ports of its own,
    /// and nobody registers it.
    fn one_off(&mut self, app: &str) -> Answer {
        let folder = self.folder.clone();
        let limits = {
            let machine = self.machine(app)?;
            machine.app().resources.clone()
        };
        let id = format!("{app}-run");
        let limits = self.cgroups.apply(&id, &limits, &[]);
        let machine = self.machine(app)?;
        let current = machine.current;
        let own = machine.releases.iter().find(|it| it.number == current);
        let own = own.ok_or_else(|| unknown_app(app))?.clone();
        let instance = super::supervisor::Instance {
            id,
            index: 0,
            generation: 0,
            release: current,
            ports: BTreeMap::new(),
            phase: Phase::Waiting { until: 0 },
            retire: true,
            ready: false,
            was_ready: false,
            ready_since: 0,
            made: 0,
            failures: Vec::new(),
            detail: String::new(),
            rows: BTreeMap::new(),
            views: BTreeMap::new(),
        };
        let mut without = own.clone();
        // Its program is another; what it fills in may speak of ports that a one-off has not.
        without.app.exec = vec!["-".to_owned()];
        let launch = launch::prepare(&folder, app, &instance, &without, limits);
        let launch = launch.map_err(|error| Refusal::new(422, error))?;
        serde_json::to_value(launch).map_err(|error| Refusal::new(500, error.to_string()))
    }

    fn logs(&self, of: &str, tail: usize, since: &BTreeMap<String, String>) -> Answer {
        let mut ids: Vec<&String> = self
            .apps
            .iter()
            .flat_map(|(app, it)| it.instances.keys().filter(move |id| app == of || *id == of))
            .collect();
        ids.sort();
        if ids.is_empty() && !self.apps.contains_key(of) {
            let what = format!("there is no application or instance `{of}`");
            return Err(Refusal::new(404, what));
        }
        let mut lines = Vec::new();
        for id in ids {
            let places = Places::new(&self.folder, id);
            lines.extend(logs::tail(&places, tail, since.get(id).map(String::as_str)));
        }
        lines.sort_by(|one, two| logs::time_of(one).cmp(logs::time_of(two)));
        let first = lines.len().saturating_sub(tail);
        Ok(json!({ "lines": lines.split_off(first) }))
    }

    fn status(&self) -> Value {
        let now = clock();
        let apps: Vec<Value> = self.apps.values().map(|it| self.status_of(now, it)).collect();
        json!({
            "host": self.host, "state": self.folder, "apps": apps,
            "events": self.told.events, "pid": std::process::id(),
        })
    }

    fn status_of(&self, now: Millis, machine: &Machine) -> Value {
        let since = |at: Millis| now.saturating_sub(at);
        let instances: Vec<Value> = machine
            .instances
            .values()
            .map(|it| {
                let known = self.known.get(&it.id);
                let edges: Vec<Value> = it
                    .views
                    .iter()
                    .map(|((edge, pool), view)| {
                        json!({
                            "edge": edge, "pool": pool, "acked": format!("{:?}", view.acked).to_lowercase(),
                            "sessions": view.sessions, "deadline_miss_ppm": view.miss_ppm,
                            "samples": view.samples, "p99_ms": view.p99_ms,
                            "heard_ms_ago": since(view.heard), "error": view.error,
                        })
                    })
                    .collect();
                let cpus = super::placement::cpus(&self.apps, &machine.name, &it.id, &[]);
                json!({
                    "id": it.id, "index": it.index, "generation": it.generation, "release": it.release,
                    "phase": it.phase.word(), "ready": it.ready, "sessions": it.sessions(),
                    "ports": it.ports, "pid": known.map(|known| known.main.pid), "detail": it.detail,
                    "failures": it.failures.len(), "edges": edges, "cpus": cpus,
                    "limits_missing": known.map(|known| known.limits.missing.clone()),
                    "log_bytes": logs::ring_bytes(&Places::new(&self.folder, &it.id).root),
                })
            })
            .collect();
        let releases: Vec<Value> = machine
            .releases
            .iter()
            .map(|it| {
                json!({
                    "number": it.number, "digest": it.digest, "content": it.content, "dir": it.dir,
                    "made": it.made, "git": it.app.release.as_ref().and_then(|it| it.git.as_ref()),
                })
            })
            .collect();
        json!({
            "name": machine.name, "count": machine.count, "release": machine.current,
            "instances": instances, "releases": releases, "rollout": machine.rollout,
            "history": machine.history, "removed": machine.removed,
        })
    }

    /// In Prometheus' text format; labels are applications and words of the source.
    fn metrics(&self) -> String {
        use std::fmt::Write as _;
        let mut text = String::from(
            "# HELP strowger_agent_events_total What happened, by kind.\n# TYPE strowger_agent_events_total counter\n",
        );
        let mut line = |name: &str, labels: &str, value: u64| {
            // Writing to a string cannot fail.
            let _ok = writeln!(text, "{name}{{{labels}}} {value}");
        };
        for (kind, count) in &self.told.counts {
            line("strowger_agent_events_total", &format!("event=\"{kind}\""), *count);
        }
        for (app, machine) in &self.apps {
            line(
                "strowger_agent_instances_wanted",
                &format!("app=\"{app}\""),
                machine.count.into(),
            );
            let mut phases: BTreeMap<&str, u64> = BTreeMap::new();
            let (mut sessions, mut ready) = (0, 0);
            for instance in machine.instances.values() {
                *phases.entry(instance.phase.word()).or_default() += 1;
                sessions += instance.sessions();
                ready += u64::from(instance.ready);
            }
            for (phase, count) in phases {
                let labels = format!("app=\"{app}\",phase=\"{phase}\"");
                line("strowger_agent_instances", &labels, count);
            }
            line("strowger_agent_instances_ready", &format!("app=\"{app}\""), ready);
            line("strowger_agent_sessions", &format!("app=\"{app}\""), sessions);
            let digest = machine.releases.iter().find(|it| it.number == machine.current);
            let digest = digest.map_or("", |it| it.digest.as_str());
            let labels =
                format!("app=\"{app}\",release=\"{}\",digest=\"{digest}\"", machine.current);
            line("strowger_agent_release_info", &labels, 1);
        }
        text
    }
}

/// Old releases are forgotten, and the directories of all but the newest removed.
fn forget_old(machine: &mut Machine) {
    let used = |machine: &Machine, number: u64| {
        number == machine.current
            || machine.instances.values().any(|it| it.release == number)
            || machine.rollout.as_ref().is_some_and(|it| it.from == number)
    };
    while machine.releases.len() > RELEASES_MAX {
        let oldest = machine.releases.iter().position(|it| !used(machine, it.number));
        let Some(oldest) = oldest else { break };
        machine.releases.remove(oldest);
    }
    let count = machine.releases.len().saturating_sub(release::KEEP);
    let kept: Vec<_> = machine.releases[count..].iter().filter_map(|it| it.dir.clone()).collect();
    for old in &machine.releases[..count] {
        let Some(dir) = old.dir.as_ref().filter(|dir| !kept.contains(dir)) else { continue };
        if !used(machine, old.number)
            && dir.exists()
            && let Err(error) = release::remove(dir)
        {
            tracing::warn!(dir = %dir.display(), %error, "release_not_removed");
        }
    }
}
