//! The agent itself: one loop that owns all state. What happens comes in as messages; what the pure
//! machine says is done.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::api::{self, Request};
use super::checks::{self, Subject};
use super::edges::{Edges, Place, Report, Stand, Wanted};
use super::http::Target;
use super::keeper::{Process, Running};
use super::launch::{self, Places, private_folder};
use super::limits::{Cgroups, Limits};
use super::manifest::{Check, Port, PortTransport};
use super::ports::{Ports, QUARANTINE_MS};
use super::supervisor::{Action, CheckKind, Event, Machine, Millis, Phase};
use super::{keeper, limits, placement, registration, release, store, watcher};

/// How often time is looked at.
const TICK: Duration = Duration::from_millis(100);

/// How often secrets' files are looked at.
const SECRETS_EVERY: Duration = Duration::from_secs(1);

/// Messages that wait for the loop, at most.
const QUEUE: usize = 1_024;

/// What the agent runs with.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// Where the agent keeps what it must not forget: instances, releases, output.
    #[arg(
        long,
        default_value = "/var/lib/strowger-agent",
        env = "STROWGER_AGENT_STATE",
        value_name = "DIR"
    )]
    pub state: PathBuf,
    /// The agent's own API: a unix socket.
    #[arg(long, env = "STROWGER_AGENT_SOCKET", value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// The ports that instances get: outside of the kernel's own range
    /// (net.ipv4.ip_local_port_range).
    #[arg(long, default_value = "20000-29999", value_name = "LOW-HIGH", value_parser = port_range)]
    pub ports: (u16, u16),
    /// How long a port rests before another process gets it.
    #[arg(long, default_value = "60s", value_name = "TIME", value_parser = strowger_contract::duration::parse)]
    pub port_quarantine: Duration,
    /// End the instances with the agent (SIGTERM, then SIGKILL), without waiting for their sessions.
    #[arg(long)]
    pub stop_instances: bool,
    /// The name that edges are told this host has.
    #[arg(long, value_name = "NAME")]
    pub host_name: Option<String>,
}

fn port_range(text: &str) -> Result<(u16, u16), String> {
    let parts = text.split_once('-').map(|(low, high)| (low.parse::<u16>(), high.parse::<u16>()));
    match parts {
        Some((Ok(low), Ok(high))) if low > 0 && low <= high => Ok((low, high)),
        _ => Err("write LOW-HIGH, such as 20000-29999".to_owned()),
    }
}

impl Options {
    /// Where the API's socket is.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| self.state.join("agent.sock"))
    }

    /// With all else as it is by default.
    #[must_use]
    pub fn with_state(state: PathBuf) -> Self {
        Self {
            state,
            socket: None,
            ports: (20_000, 29_999),
            port_quarantine: Duration::from_millis(QUARANTINE_MS),
            stop_instances: false,
            host_name: None,
        }
    }
}

/// Milliseconds since the host's start.
pub(crate) fn clock() -> Millis {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let (seconds, nanos) = (now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs());
    seconds * 1_000 + nanos / 1_000_000
}

/// Something for the loop.
pub(crate) enum Input {
    /// It happened to an instance of a generation.
    Happened(String, String, u64, Event),
    /// The keeper runs the process.
    Runs(String, String, u64, Running),
}

/// A process that is known.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) generation: u64,
    pub(super) main: Process,
    pub(super) limits: Limits,
}

/// The agent.
pub(crate) struct Agent {
    pub(super) folder: PathBuf,
    pub(super) apps: BTreeMap<String, Machine>,
    pub(super) ports: Ports,
    pub(super) cgroups: Cgroups,
    pub(super) known: HashMap<String, Known>,
    pub(super) host: String,
    pub(super) told: api::Told,
    edges: Edges,
    inputs: mpsc::Sender<Input>,
    /// What is looked at, how, and by whom.
    checks: HashMap<(String, u64, CheckKind), (Check, JoinHandle<()>)>,
    sockets: HashMap<(String, String), OwnedFd>,
    saved: Vec<u8>,
    /// Nobody else has the folder.
    _lock: File,
}

/// Runs the agent until `stop`. The instances run on.
///
/// # Errors
/// Another agent has the folder, or it cannot be read, or the socket cannot be made.
pub async fn run(options: Options, stop: CancellationToken) -> Result<()> {
    private_folder(&options.state)
        .with_context(|| format!("{} cannot be made", options.state.display()))?;
    let folder = options.state.canonicalize()?;
    let lock = own(&folder)?;
    let kept = store::read(&folder).map_err(anyhow::Error::msg)?;
    let boot = store::boot_id();
    let same_boot = kept.as_ref().is_some_and(|state| state.boot == boot);
    let (low, high) = options.ports;
    let quarantine = u64::try_from(options.port_quarantine.as_millis()).unwrap_or(u64::MAX);
    let (mut apps, mut ports) = match kept {
        Some(state) => (state.apps, state.ports),
        None => (BTreeMap::new(), Ports::new(low, high, quarantine)),
    };
    ports.limits(low, high, quarantine);
    if !same_boot {
        ports.new_life();
        apps.values_mut().for_each(|machine| machine.new_life(clock()));
    }
    let (edges, reports) = Edges::start(clock)?;
    let (inputs, mut happened) = mpsc::channel(QUEUE);
    let (requests, mut asked) = mpsc::channel(64);
    let socket = options.socket();
    let server = api::serve(&socket, requests, stop.clone())
        .with_context(|| format!("{} cannot be made", socket.display()))?;
    let name = strowger_contract::stable_hash(folder.display().to_string().as_bytes());
    let mut agent = Agent {
        cgroups: Cgroups::new(&format!("{name:016x}")),
        folder,
        apps,
        ports,
        known: HashMap::new(),
        host: options.host_name.unwrap_or_else(host_name),
        told: api::Told::default(),
        edges,
        inputs,
        checks: HashMap::new(),
        sockets: HashMap::new(),
        saved: Vec::new(),
        _lock: lock,
    };
    agent.adopt(same_boot);
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut secrets = tokio::time::interval(SECRETS_EVERY);
    tracing::info!(state = %agent.folder.display(), socket = %socket.display(), "agent_ready");
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(input) = happened.recv() => agent.take(input),
            news = reports.next() => news.into_iter().for_each(|one| agent.report(one)),
            Some(request) = asked.recv() => agent.answer(request).await,
            _ = secrets.tick() => agent.look_at_secrets(),
            _ = ticks.tick() => agent.step_all(),
        }
    }
    if options.stop_instances {
        agent.stop_all().await;
    }
    agent.save();
    server.abort();
    let _gone = std::fs::remove_file(&socket);
    Ok(())
}

/// Makes sure that one agent has the folder.
fn own(folder: &Path) -> Result<File> {
    let file = File::options().create(true).append(true).open(folder.join("agent.lock"))?;
    if rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
        bail!("another agent has {}", folder.display());
    }
    Ok(file)
}

fn host_name() -> String {
    let name = rustix::system::uname();
    name.nodename().to_string_lossy().into_owned()
}

impl Agent {
    /// Finds the processes of before.
    fn adopt(&mut self, same_boot: bool) {
        self.reserve_ports();
        let mut lost = Vec::new();
        for (app, machine) in &self.apps {
            for instance in machine.instances.values().filter(|it| it.phase.has_process()) {
                let (app, id) = (app.clone(), instance.id.clone());
                if same_boot {
                    let resources = machine.app().resources.clone();
                    let limits = self.cgroups.apply(&id, &resources, &[]);
                    let watched = watcher::Watched { app, id, generation: instance.generation };
                    watcher::adopt(&self.folder, watched, limits, self.inputs.clone());
                } else {
                    lost.push((app, id, instance.generation));
                }
            }
        }
        for (app, id, generation) in lost {
            let event = Event::Exited("the host was started anew".to_owned());
            self.happened(&app, &id, generation, event);
        }
        self.after_all();
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Happened(app, id, generation, event) => {
                if matches!(event, Event::Exited(_) | Event::StartFailed(_)) {
                    self.forget(&id, generation);
                }
                self.happened(&app, &id, generation, event);
            }
            Input::Runs(app, id, generation, running) => {
                let limits = keeper::read::<launch::Launch>(
                    &Places::new(&self.folder, &id).file("launch.json"),
                );
                let known = Known {
                    generation,
                    main: running.main,
                    limits: limits.map(|it| it.limits).unwrap_or_default(),
                };
                tracing::info!(
                    app,
                    instance = id,
                    generation,
                    pid = running.main.pid,
                    "instance_runs"
                );
                self.known.insert(id.clone(), known);
                self.happened(&app, &id, generation, Event::Started);
                self.catch_up(&app, &id);
            }
        }
    }

    /// Ends all instances, whatever they do.
    async fn stop_all(&self) {
        const WAIT: Duration = Duration::from_secs(3);
        const LOOK_EVERY: Duration = Duration::from_millis(20);
        let end = tokio::time::Instant::now() + WAIT;
        self.known.values().for_each(|known| known.main.signal_group(Signal::TERM));
        while self.known.values().any(|it| it.main.is_alive()) && tokio::time::Instant::now() < end
        {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        self.known.keys().for_each(|id| self.kill(id));
        // Their keepers still write into the folder.
        let end = tokio::time::Instant::now() + WAIT;
        let busy = |id: &String| {
            keeper::lock(&Places::new(&self.folder, id)).is_ok_and(|lock| lock.is_none())
        };
        while self.known.keys().any(busy) && tokio::time::Instant::now() < end {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// A process that was found again may have been told to stop before.
    fn catch_up(&mut self, app: &str, id: &str) {
        let phase = self.apps.get(app).and_then(|it| it.instances.get(id)).map(|it| it.phase);
        match phase {
            Some(Phase::Stopping { .. }) => self.signal(id, Signal::TERM),
            Some(Phase::Killing { .. }) => self.kill(id),
            _ => {}
        }
    }

    fn forget(&mut self, id: &str, generation: u64) {
        if self.known.get(id).is_some_and(|known| known.generation == generation) {
            self.known.remove(id);
            self.cgroups.remove(id);
            launch::forget_credentials(&Places::new(&self.folder, id));
        }
    }

    fn report(&mut self, Report { place, view }: Report) {
        let Place { app, id, edge, pool } = place;
        let generation = view.generation;
        self.happened(&app, &id, generation, Event::Seen { edge, pool, view });
    }

    fn happened(&mut self, app: &str, id: &str, generation: u64, event: Event) {
        let Some(machine) = self.apps.get_mut(app) else { return };
        let actions = machine.on(clock(), id, generation, event, &mut self.ports);
        self.settle(app, actions);
    }

    /// What a manifest names itself is given to nobody else.
    fn reserve_ports(&mut self) {
        self.ports.reserve(self.apps.values().flat_map(Machine::fixed_ports).collect());
    }

    pub(super) fn step_all(&mut self) {
        self.reserve_ports();
        let names: Vec<String> = self.apps.keys().cloned().collect();
        for app in names {
            let Some(machine) = self.apps.get_mut(&app) else { continue };
            let actions = machine.step(clock(), &mut self.ports);
            self.settle(&app, actions);
        }
        let empty = |machine: &Machine| machine.removed && machine.instances.is_empty();
        for app in self.apps.iter().filter(|(_, machine)| empty(machine)).map(|(app, _)| app) {
            // What one-off programs were given.
            launch::forget_credentials(&Places::new(&self.folder, &format!("{app}-run")));
        }
        let before = self.apps.len();
        self.apps.retain(|_, machine| !empty(machine));
        if self.apps.len() != before {
            self.save();
        }
    }

    /// Writes down what changed before anything is done about it.
    pub(super) fn settle(&mut self, app: &str, actions: Vec<Action>) {
        if !actions.is_empty() {
            self.save();
        }
        for action in actions {
            self.act(app, action);
        }
        self.want_at_edges();
        self.keep_checks(app);
    }

    fn after_all(&mut self) {
        self.save();
        self.want_at_edges();
        let names: Vec<String> = self.apps.keys().cloned().collect();
        names.iter().for_each(|app| self.keep_checks(app));
    }

    pub(super) fn save(&mut self) {
        let state = store::State {
            version: 1,
            boot: store::boot_id(),
            apps: self.apps.clone(),
            ports: self.ports.clone(),
        };
        let Ok(text) = serde_json::to_vec(&state) else { return };
        if text == self.saved {
            return;
        }
        match store::write(&self.folder, &text) {
            Ok(()) => self.saved = text,
            Err(error) => {
                self.told.count("state_not_written");
                tracing::warn!(%error, "state_not_written: a crash now would forget what changed");
            }
        }
    }

    fn act(&mut self, app: &str, action: Action) {
        match action {
            Action::Start(id) => self.start(app, &id),
            Action::Terminate(id) => self.signal(&id, Signal::TERM),
            Action::Kill(id) => self.kill(&id),
            Action::Hook(id) => self.hook(app, &id),
            Action::Tell(id, kind, detail) => {
                self.told.count(kind);
                tracing::info!(app, instance = id, detail, "{kind}");
                self.told.event(app, &id, kind, &detail);
            }
        }
    }

    fn signal(&self, id: &str, signal: Signal) {
        if let Some(known) = self.known.get(id) {
            known.main.signal_group(signal);
        }
    }

    fn kill(&self, id: &str) {
        if let Some(known) = self.known.get(id) {
            known.main.signal_group(Signal::KILL);
            limits::kill_group(&known.limits);
        }
    }

    fn start(&mut self, app: &str, id: &str) {
        let Some(generation) =
            self.apps.get(app).and_then(|it| it.instances.get(id)).map(|it| it.generation)
        else {
            return;
        };
        if let Err(why) = self.try_start(app, id, generation) {
            let event = Event::StartFailed(why);
            let input = Input::Happened(app.to_owned(), id.to_owned(), generation, event);
            let inputs = self.inputs.clone();
            tokio::spawn(async move {
                // It fails only when the agent ends.
                let _ending = inputs.send(input).await;
            });
        }
    }

    fn try_start(&mut self, app: &str, id: &str, generation: u64) -> Result<(), String> {
        let pinned = placement::cpus(&self.apps, app, id, &limits::own_cpus());
        let machine = self.apps.get(app).ok_or("it is gone")?;
        let instance = machine.instances.get(id).ok_or("it is gone")?;
        let own = machine.releases.iter().find(|it| it.number == instance.release);
        let own = own.ok_or("its release is gone")?.clone();
        if let Some(dir) = &own.dir {
            release::verify(dir, &own.content)?;
        }
        let limits = self.cgroups.apply(id, &machine.app().resources, &pinned);
        let orders = launch::prepare(&self.folder, app, instance, &own, limits)?;
        let instance = instance.clone();
        let places = Places::new(&self.folder, id);
        for (name, port) in &own.app.ports {
            if port.transport == PortTransport::Unix && !port.listen {
                // What a crashed process left would keep the next one from binding.
                let _none = std::fs::remove_file(places.socket(name));
            }
        }
        let mut sockets = Vec::new();
        for name in &orders.listen {
            let key = (id.to_owned(), name.clone());
            if !self.sockets.contains_key(&key) {
                let port = own.app.ports.get(name).ok_or("no such port")?;
                let made = listen(port, own.app.host, instance.ports.get(name), &places, name);
                let made = made.map_err(|error| format!("port {name}: {error}"))?;
                self.sockets.insert(key.clone(), made);
            }
            let socket = self.sockets.get(&key).ok_or("no such socket")?;
            sockets.push(socket.try_clone().map_err(|error| error.to_string())?);
        }
        for (name, port) in &instance.ports {
            let spec = own.app.ports.get(name);
            if spec.is_some_and(|spec| !spec.listen) && !is_free(own.app.host, *port) {
                return Err(format!("port {name}: {port} is taken by somebody else"));
            }
        }
        let watched = watcher::Watched { app: app.to_owned(), id: id.to_owned(), generation };
        watcher::start(&places, &orders, sockets, watched, self.inputs.clone())
    }

    fn hook(&self, app: &str, id: &str) {
        let Some(machine) = self.apps.get(app) else { return };
        let Some(instance) = machine.instances.get(id) else { return };
        let Some(exec) = machine.app().drain.pre_stop.clone() else { return };
        let Some(subject) = self.subject(app, id) else { return };
        let limit = machine.app().drain.pre_stop_timeout.0;
        let (inputs, generation) = (self.inputs.clone(), instance.generation);
        let (app, id) = (app.to_owned(), id.to_owned());
        tokio::spawn(async move {
            let ended = tokio::time::timeout(limit, checks::run(&exec, &subject)).await;
            if let Ok(Err(error)) = ended {
                tracing::warn!(app, instance = id, error, "hook_failed");
            }
            let _ending = inputs.send(Input::Happened(app, id, generation, Event::HookDone)).await;
        });
    }

    pub(super) fn subject(&self, app: &str, id: &str) -> Option<Subject> {
        let machine = self.apps.get(app)?;
        let instance = machine.instances.get(id)?;
        let own = machine.releases.iter().find(|it| it.number == instance.release)?;
        let places = Places::new(&self.folder, id);
        let env = launch::environment(&places, app, instance, own);
        let folder = own.dir.clone().unwrap_or_else(|| places.data());
        Some(checks::subject(&own.app, &places, instance, env, folder))
    }

    /// Runs the checks that each instance's phase asks for, and no others.
    fn keep_checks(&mut self, app: &str) {
        let Some(machine) = self.apps.get(app) else { return };
        let mut wanted = HashMap::new();
        for instance in machine.instances.values() {
            let health = &machine.app_of(instance).health;
            let kinds: &[(CheckKind, &Option<_>)] = match instance.phase {
                Phase::Starting { .. } => &[(CheckKind::Startup, &health.startup)],
                Phase::Running { .. } => {
                    &[(CheckKind::Ready, &health.ready), (CheckKind::Live, &health.live)]
                }
                _ => &[],
            };
            for (kind, check) in kinds {
                if let Some(check) =
                    check.as_ref().filter(|_| self.known.contains_key(&instance.id))
                {
                    let key = (instance.id.clone(), instance.generation, *kind);
                    wanted.insert(key, check.clone());
                }
            }
        }
        let of_app = |id: &str| machine.instances.contains_key(id);
        let others = |id: &str, apps: &BTreeMap<String, Machine>| {
            apps.values().any(|it| it.name != app && it.instances.contains_key(id))
        };
        let apps = &self.apps;
        self.checks.retain(|key, (known, task)| {
            // A check that a manifest changed begins anew.
            let keep = wanted.get(key) == Some(known) || (!of_app(&key.0) && others(&key.0, apps));
            if !keep {
                task.abort();
            }
            keep
        });
        for (key, check) in wanted {
            if self.checks.contains_key(&key) {
                continue;
            }
            let Some(subject) = self.subject(app, &key.0) else { continue };
            let (inputs, app) = (self.inputs.clone(), app.to_owned());
            let (id, generation, kind) = key.clone();
            let known = check.clone();
            let task = tokio::spawn(async move {
                let mut nonce = clock() ^ generation << 40;
                loop {
                    nonce = nonce.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let found = checks::check(&check, &subject, nonce).await;
                    let (ok, detail) = (found.is_ok(), found.err().unwrap_or_default());
                    let event = Event::Checked(kind, ok, detail);
                    let input = Input::Happened(app.clone(), id.clone(), generation, event);
                    if inputs.send(input).await.is_err() {
                        return;
                    }
                    // A start is looked for closely: it decides how soon an instance serves.
                    let closely = Duration::from_millis(250);
                    let starting = kind == CheckKind::Startup || (kind == CheckKind::Ready && !ok);
                    let pause = if starting { check.every.0.min(closely) } else { check.every.0 };
                    tokio::time::sleep(pause).await;
                }
            });
            self.checks.insert(key, (known, task));
        }
    }

    /// Tells the edges' thread how all is to stand.
    fn want_at_edges(&mut self) {
        let now = clock();
        let mut wanted = Wanted::new();
        for (app, machine) in &self.apps {
            for want in machine.wants(now) {
                let Some(instance) = machine.instances.get(&want.id) else { continue };
                let own = machine.releases.iter().find(|it| it.number == instance.release);
                let Some(own) = own else { continue };
                if want.generation == 0 {
                    continue;
                }
                let cpus = placement::cpus(&self.apps, app, &want.id, &[]);
                for edge in &machine.edges {
                    let local = Target::parse(&edge.url).is_ok_and(|target| target.is_local());
                    for pool in own.app.register.keys() {
                        let live = machine.app();
                        let registration = want.state.and_then(|state| {
                            registration::registration(
                                &self.folder,
                                app,
                                instance,
                                own,
                                (live, pool),
                                local,
                                (state, want.weight_milli),
                                &self.host,
                                &cpus,
                            )
                        });
                        let place = Place {
                            app: app.clone(),
                            id: want.id.clone(),
                            edge: edge.url.clone(),
                            pool: pool.clone(),
                        };
                        let stand = Stand {
                            edge: edge.clone(),
                            generation: want.generation,
                            registration,
                            drain_s: want.drain_s,
                        };
                        wanted.insert(place, stand);
                    }
                }
            }
        }
        self.edges.want(wanted);
        // Sockets of those that are gone.
        let apps = &self.apps;
        self.sockets.retain(|(id, _), _| apps.values().any(|it| it.instances.contains_key(id)));
    }

    /// Secrets that changed are copied anew, and processes told.
    fn look_at_secrets(&mut self) {
        for (app, machine) in &self.apps {
            for instance in machine.instances.values() {
                let Some(known) = self.known.get(&instance.id) else { continue };
                let own = machine.releases.iter().find(|it| it.number == instance.release);
                let Some(own) = own else { continue };
                if own.app.secrets.is_empty() && own.services.values().all(|it| it.files.is_empty())
                {
                    continue;
                }
                let places = Places::new(&self.folder, &instance.id);
                match launch::credentials(&places, &own.app, &own.services) {
                    Ok(true) => {
                        tracing::info!(app, instance = instance.id, "secrets_changed");
                        if own.app.on_secret_change == super::manifest::OnSecretChange::Reload {
                            known.main.signal(Signal::HUP);
                        }
                    }
                    Ok(false) => {}
                    Err(error) => {
                        tracing::warn!(app, instance = instance.id, error, "secrets_unreadable")
                    }
                }
            }
        }
    }

    async fn answer(&mut self, request: Request) {
        let answer = self.command(request.what);
        // Who asked may be gone.
        let _gone = request.answer.send(answer);
    }
}

/// Whether a port can be bound by a process that starts now, for UDP and TCP.
fn is_free(host: std::net::IpAddr, port: u16) -> bool {
    TcpListener::bind((host, port)).is_ok() && UdpSocket::bind((host, port)).is_ok()
}

/// Opens the socket that a process gets.
fn listen(
    port: &Port,
    host: std::net::IpAddr,
    number: Option<&u16>,
    places: &Places,
    name: &str,
) -> std::io::Result<OwnedFd> {
    let address = (host, number.copied().unwrap_or(0));
    Ok(match port.transport {
        PortTransport::Udp => UdpSocket::bind(address)?.into(),
        PortTransport::Unix => {
            let path = places.socket(name);
            // Of an agent of before.
            let _none = std::fs::remove_file(&path);
            std::os::unix::net::UnixListener::bind(path)?.into()
        }
        _ => TcpListener::bind(address)?.into(),
    })
}
