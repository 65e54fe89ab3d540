//! `strowger agent …`: what the command line says to a running agent.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::api::{Command, Refusal, RolloutOrder};
use super::daemon::{self, Options};
use super::launch::Launch;
use super::{keeper, limits, logs, watcher};

/// How often `logs --follow` looks.
const FOLLOW_EVERY: Duration = Duration::from_millis(300);

/// How to reach the agent.
#[derive(clap::Args, Clone, Debug)]
pub struct Reach {
    /// The agent's socket.
    #[arg(
        long,
        default_value = "/var/lib/strowger-agent/agent.sock",
        env = "STROWGER_AGENT_SOCKET",
        value_name = "PATH"
    )]
    pub socket: PathBuf,
}

/// What to do with the agent.
#[derive(clap::Subcommand)]
pub enum AgentCommand {
    /// Run the agent: it starts, watches and registers what manifests say.
    Serve {
        /// What it runs with.
        #[command(flatten)]
        options: Options,
        /// Manifests to apply at the start.
        #[arg(value_name = "MANIFEST")]
        manifests: Vec<PathBuf>,
        /// What to log: error, warn, info, debug.
        #[arg(long, default_value = "info", env = "STROWGER_LOG", value_name = "FILTER")]
        log: String,
        /// How lines look.
        #[arg(long, default_value = "auto", value_name = "FORMAT")]
        log_format: crate::observe::Format,
    },
    /// Check a manifest: every error with its place.
    Check {
        /// The manifest.
        manifest: PathBuf,
    },
    /// Make what a manifest says so. What is so already is left alone.
    Apply {
        /// How to reach it.
        #[command(flatten)]
        reach: Reach,
        /// The manifest.
        manifest: PathBuf,
        /// Only say what would be done.
        #[arg(long)]
        dry_run: bool,
    },
    /// Show applications, instances, releases, rollouts.
    Status {
        /// How to reach it.
        #[command(flatten)]
        reach: Reach,
        /// How to print.
        #[arg(short, long, default_value = "table", value_name = "FORMAT")]
        output: crate::cli::Output,
    },
    /// Print the newest output of an application or instance, one JSON object a line.
    Logs {
        /// How to reach it.
        #[command(flatten)]
        reach: Reach,
        /// APP or APP-INDEX.
        of: String,
        /// Lines.
        #[arg(long, default_value_t = 100, value_name = "LINES")]
        tail: usize,
        /// Go on as more comes.
        #[arg(short, long)]
        follow: bool,
    },
    /// Run so many instances. Those too many are drained, the one with the fewest sessions first.
    Scale {
        /// How to reach it.
        #[command(flatten)]
        reach: Reach,
        /// The application.
        app: String,
        /// How many.
        count: u32,
    },
    /// Go back to the release before, or to a numbered one.
    Rollback {
        /// How to reach it.
        #[command(flatten)]
        reach: Reach,
        /// The application.
        app: String,
        /// A release's number.
        #[arg(long, value_name = "NUMBER")]
        release: Option<u64>,
    },
    /// Drain an instance and replace it.
    Drain {
        /// How to reach it.
        #[command(flatten)]
        reach: Reach,
        /// APP-INDEX.
        instance: String,
        /// Give its sessions up.
        #[arg(long)]
        now: bool,
    },
    /// Pause, promote or abort a release that is coming in.
    Rollout {
        /// How to reach it.
        #[command(flatten)]
        reach: Reach,
        /// What.
        what: RolloutOrder,
        /// The application.
        app: String,
    },
    /// Stop an application: its instances are drained.
    Remove {
        /// How to reach it.
        #[command(flatten)]
        reach: Reach,
        /// The application.
        app: String,
    },
    /// Run a one-off program with an application's environment, release and limits.
    Run {
        /// How to reach it.
        #[command(flatten)]
        reach: Reach,
        /// The application.
        app: String,
        /// The program and its arguments.
        #[arg(last = true, required = true, value_name = "PROGRAM")]
        program: Vec<String>,
    },
    /// The parent of one instance's process. For the agent's own use.
    #[command(hide = true)]
    Keep {
        /// The instance's folder.
        #[arg(long)]
        dir: PathBuf,
        /// Of which process.
        #[arg(long)]
        generation: u64,
    },
    /// The last step before an instance's program. For the agent's own use.
    #[command(hide = true)]
    Enter {
        /// The instance's folder.
        #[arg(long)]
        dir: PathBuf,
        /// Of which process.
        #[arg(long)]
        generation: u64,
    },
}

/// Does it.
///
/// # Errors
/// The agent does not answer, or says no.
pub fn run(command: AgentCommand) -> Result<ExitCode> {
    match command {
        AgentCommand::Serve { options, manifests, log, log_format } => {
            crate::observe::init_logging(log_format, &log);
            serve(options, manifests)?;
        }
        AgentCommand::Check { manifest } => return check(&manifest),
        AgentCommand::Apply { reach, manifest, dry_run } => {
            apply(&reach.socket, &manifest, dry_run)?
        }
        AgentCommand::Status { reach, output } => status(&reach.socket, output)?,
        AgentCommand::Logs { reach, of, tail, follow } => {
            show_logs(&reach.socket, &of, tail, follow)?
        }
        AgentCommand::Scale { reach, app, count } => {
            let answer = give(&reach.socket, &Command::Scale { app, count })?;
            println!(
                "{}: {} to {}",
                answer["app"].as_str().unwrap_or_default(),
                answer["before"],
                answer["count"]
            );
        }
        AgentCommand::Rollback { reach, app, release } => {
            let answer = give(&reach.socket, &Command::Rollback { app, release })?;
            println!(
                "{}: release {} comes in",
                answer["app"].as_str().unwrap_or_default(),
                answer["release"]
            );
        }
        AgentCommand::Drain { reach, instance, now } => {
            let answer = give(&reach.socket, &Command::Drain { instance, now })?;
            println!(
                "{} takes no new sessions; it holds {}",
                answer["instance"].as_str().unwrap_or_default(),
                answer["sessions"]
            );
        }
        AgentCommand::Rollout { reach, what, app } => {
            give(&reach.socket, &Command::Rollout { app, what })?;
        }
        AgentCommand::Remove { reach, app } => {
            let answer = give(&reach.socket, &Command::Remove { app })?;
            println!("{} instances are drained", answer["instances"]);
        }
        AgentCommand::Run { reach, app, program } => return one_off(&reach.socket, app, &program),
        AgentCommand::Keep { dir, generation } => return Ok(watcher::keep(dir, generation)),
        AgentCommand::Enter { dir, generation } => return Ok(keeper::enter(dir, generation)),
    }
    Ok(ExitCode::SUCCESS)
}

fn serve(options: Options, manifests: Vec<PathBuf>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let socket = options.socket();
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let signals = stop.clone();
        let mut terminate =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        let mut interrupt =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            signals.cancel();
        });
        if !manifests.is_empty() {
            // The commands' side blocks, so it has a thread of its own.
            std::thread::spawn(move || apply_all(&socket, &manifests));
        }
        crate::control::service::ready("supervising");
        daemon::run(options, stop).await
    })
}

/// Applies manifests to the agent of this process, once it listens.
fn apply_all(socket: &Path, manifests: &[PathBuf]) {
    const TRIES: u32 = 500;
    for manifest in manifests {
        let mut tries = 0;
        while UnixStream::connect(socket).is_err() && tries < TRIES {
            tries += 1;
            std::thread::sleep(Duration::from_millis(20));
        }
        if let Err(error) = apply(socket, manifest, false) {
            tracing::error!(manifest = %manifest.display(), "manifest_refused: {error:#}");
        }
    }
}

/// Applies a manifest to an agent that may still be starting, and waits until so many instances are
/// ready and known to their edges.
///
/// # Errors
/// The agent refuses it, or the time is over.
pub fn deploy(socket: &Path, manifest: &Path, count: usize, limit: Duration) -> Result<()> {
    const LOOK_EVERY: Duration = Duration::from_millis(50);
    let end = std::time::Instant::now() + limit;
    while UnixStream::connect(socket).is_err() && std::time::Instant::now() < end {
        std::thread::sleep(LOOK_EVERY);
    }
    let (text, folder) = source(manifest)?;
    let name = manifest.display().to_string();
    give(socket, &Command::Apply { text, name, folder, dry_run: false })?;
    loop {
        let status = give(socket, &Command::Status)?;
        let known = |it: &&Value| {
            let mut edges = it["edges"].as_array().into_iter().flatten().peekable();
            edges.peek().is_some() && edges.all(|edge| edge["acked"] == "state(ready)")
        };
        if instances(&status).filter(known).count() >= count {
            return Ok(());
        }
        if std::time::Instant::now() >= end {
            bail!("the workloads are not ready in time: {status}");
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn instances(status: &Value) -> impl Iterator<Item = &Value> {
    let apps = status["apps"].as_array().into_iter().flatten();
    apps.flat_map(|app| app["instances"].as_array().into_iter().flatten())
}

/// Kills instances' processes, as chance would.
///
/// # Errors
/// The agent does not answer.
pub fn kill_instances(socket: &Path, ids: &[&str]) -> Result<()> {
    let status = give(socket, &Command::Status)?;
    for instance in instances(&status).filter(|it| ids.iter().any(|id| it["id"] == *id)) {
        let pid = instance["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        if let Some(process) = pid.and_then(keeper::Process::of) {
            process.signal_group(rustix::process::Signal::KILL);
        }
    }
    Ok(())
}

fn source(manifest: &Path) -> Result<(String, PathBuf)> {
    let text = std::fs::read_to_string(manifest)
        .with_context(|| format!("{} cannot be read", manifest.display()))?;
    let whole = manifest.canonicalize()?;
    let folder = whole.parent().unwrap_or_else(|| Path::new("/")).to_owned();
    Ok((text, folder))
}

fn check(manifest: &Path) -> Result<ExitCode> {
    let (text, folder) = source(manifest)?;
    let source = crate::control::config::Source { name: manifest.display().to_string(), text };
    match super::read::read(&source, &folder) {
        Ok(read) => {
            println!("good: {} applications", read.apps.len());
            Ok(ExitCode::SUCCESS)
        }
        Err(errors) => {
            for error in &errors.0 {
                println!("{}", crate::cli::with_snippet(error));
            }
            let count = errors.0.len();
            println!("{count} {}", if count == 1 { "error" } else { "errors" });
            Ok(ExitCode::FAILURE)
        }
    }
}

fn apply(socket: &Path, manifest: &Path, dry_run: bool) -> Result<()> {
    let (text, folder) = source(manifest)?;
    let name = manifest.display().to_string();
    let answer = give(socket, &Command::Apply { text, name, folder, dry_run })?;
    for app in answer["apps"].as_array().into_iter().flatten() {
        let part = |name: &str| app[name].as_str().unwrap_or_default();
        println!("{}: {} ({})", part("app"), part("change"), part("detail"));
    }
    Ok(())
}

fn status(socket: &Path, output: crate::cli::Output) -> Result<()> {
    let status = give(socket, &Command::Status)?;
    if output == crate::cli::Output::Json {
        println!("{}", serde_json::to_string_pretty(&status)?);
        return Ok(());
    }
    const FIELDS: [&str; 8] =
        ["id", "phase", "ready", "release", "generation", "sessions", "pid", "detail"];
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let mut rows = vec![FIELDS.map(String::from).to_vec()];
    for app in status["apps"].as_array().into_iter().flatten() {
        for instance in app["instances"].as_array().into_iter().flatten() {
            rows.push(FIELDS.map(|field| text(&instance[field])).to_vec());
        }
    }
    crate::cli::print_table(&rows);
    for app in status["apps"].as_array().into_iter().flatten() {
        let rollout = &app["rollout"];
        if !rollout.is_null() {
            println!(
                "{}: release {} to {}, {}, {}{}",
                text(&app["name"]),
                rollout["from"],
                rollout["to"],
                text(&rollout["strategy"]),
                text(&rollout["stage"]),
                if rollout["paused"] == true { ", paused" } else { "" },
            );
        }
    }
    Ok(())
}

fn show_logs(socket: &Path, of: &str, tail: usize, follow: bool) -> Result<()> {
    let mut since = BTreeMap::new();
    let mut count = tail;
    loop {
        let of = of.to_owned();
        let answer = give(socket, &Command::Logs { of, tail: count, since: since.clone() })?;
        let mut out = std::io::stdout().lock();
        for line in answer["lines"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            writeln!(out, "{line}")?;
            let value: Value = serde_json::from_str(line).unwrap_or(Value::Null);
            if let Some(instance) = value["instance"].as_str() {
                since.insert(instance.to_owned(), logs::time_of(line).to_owned());
            }
        }
        drop(out);
        if !follow {
            return Ok(());
        }
        count = logs::TAIL_MAX;
        std::thread::sleep(FOLLOW_EVERY);
    }
}

/// Becomes the one-off program: its exit code is ours, its terminal too.
fn one_off(socket: &Path, app: String, program: &[String]) -> Result<ExitCode> {
    let answer = give(socket, &Command::Prepare { app })?;
    let launch: Launch = serde_json::from_value(answer)?;
    limits::enter(&launch.limits).map_err(anyhow::Error::msg)?;
    let error = std::process::Command::new(&program[0])
        .args(&program[1..])
        .env_clear()
        .envs(&launch.env)
        .current_dir(&launch.folder)
        .exec();
    bail!("{}: {error}", program[0])
}

/// One order to the agent.
fn give(socket: &Path, command: &Command) -> Result<Value> {
    const TIMEOUT: Duration = Duration::from_secs(60);
    let whom = format!("the agent at {}", socket.display());
    let mut stream = UnixStream::connect(socket).with_context(|| {
        format!("{whom} does not answer (is it running? --socket names another)")
    })?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let body = serde_json::to_string(command)?;
    write!(
        stream,
        "POST /v1/command HTTP/1.1\r\nHost: agent\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let (status, body) = crate::cli::read_answer(&mut stream, &whom)?;
    if status.split(' ').nth(1).is_some_and(|code| code.starts_with('2')) {
        return Ok(serde_json::from_slice(&body)?);
    }
    match serde_json::from_slice::<Refusal>(&body) {
        Ok(refusal) => bail!("{}", refusal.errors.join("\n")),
        Err(_) => bail!("{whom} says {}", status.lines().next().unwrap_or_default()),
    }
}
