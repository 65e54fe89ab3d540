//! The command line, nothing else.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{CommandFactory, Parser, Subcommand};
use strowger::cli;
use strowger::control::{config, service};
use strowger::edge::{ConfigSource, Edge, Upgrade};
use strowger::observe::{Format, init_logging};
use strowger::protocols::Protocols;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// A load balancer and session router for SIP, Diameter and raw TCP.
#[derive(Parser)]
#[command(name = "strowger", version, about, propagate_version = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run an edge with your configuration.
    Run {
        /// A YAML file, or a directory whose *.yaml are read in order. May be given several times.
        #[arg(short, long, required = true, value_name = "PATH")]
        config: Vec<PathBuf>,
        #[command(flatten)]
        log: Log,
        /// After SIGTERM: how long to wait for what is under way.
        #[arg(long, default_value = "30s", value_name = "TIME", value_parser = duration)]
        drain: Duration,
        /// Take over all that runs from the process that listens at this socket, if one does, and
        /// listen there for the next one. See docs/upgrade.md; SIGUSR2 starts the next one.
        #[arg(long, value_name = "SOCKET")]
        upgrade: Option<PathBuf>,
        /// How long a process that takes over may need to get ready.
        #[arg(long, default_value = "60s", value_name = "TIME", value_parser = duration)]
        upgrade_timeout: Duration,
        /// After a hand-over: how long TLS connections, which cannot be moved, may stay here.
        #[arg(long, default_value = "1h", value_name = "TIME", value_parser = duration)]
        upgrade_drain: Duration,
    },
    /// Run an edge on loopback with sample SIP, Diameter and TCP workloads and traffic through it.
    Demo {
        #[command(flatten)]
        options: strowger::demo::Options,
        /// What to log besides: error, warn, info, debug.
        #[arg(long, default_value = "error", value_name = "FILTER")]
        log: String,
    },
    /// A sample workload of the demo: answers on 127.0.0.1.
    #[command(hide = true)]
    Sample(strowger::demo::Sample),
    /// Check configurations: every error with its place; exit 0 if there is none, else 1.
    Check {
        /// Files or directories, read together as one configuration.
        #[arg(required = true, value_name = "PATH")]
        paths: Vec<PathBuf>,
    },
    /// Print what a configuration means: each value, and the line it comes from or `default`.
    Explain {
        /// Files or directories, read together as one configuration.
        #[arg(required = true, value_name = "PATH")]
        paths: Vec<PathBuf>,
    },
    /// Deploy workloads on this host and register them with the edges.
    Agent {
        #[command(subcommand)]
        command: strowger::agent::AgentCommand,
    },
    /// Print the JSON schema of the configuration, for editors.
    Schema {
        /// Of what.
        #[arg(value_parser = ["edge", "agent"])]
        of: String,
    },
    /// Print Diameter and SIP messages readably: of a file of them, of hex text, of a pcap or pcapng.
    Decode {
        /// The file; - for standard input.
        #[arg(default_value = "-", value_name = "FILE")]
        file: PathBuf,
        /// A file with definitions besides the built-in ones (docs/diameter-rules.md).
        #[arg(long, value_name = "FILE")]
        dictionary: Option<PathBuf>,
        /// How to print.
        #[arg(short, long, default_value = "table", value_name = "FORMAT")]
        output: cli::Output,
    },
    /// Show a running edge: its pools and instances.
    Status {
        #[command(flatten)]
        admin: cli::Admin,
    },
    /// Show how many sessions each instance holds, or where one lives.
    Sessions {
        #[command(flatten)]
        admin: cli::Admin,
        /// A Call-ID, Session-Id, … to look for.
        #[arg(long)]
        key: Option<String>,
    },
    /// Show live calls (of listeners that note them: `cdr: true`).
    Calls {
        #[command(flatten)]
        admin: cli::Admin,
        /// Only those of this pool.
        #[arg(long)]
        pool: Option<String>,
        /// Only those of this instance.
        #[arg(long)]
        instance: Option<String>,
    },
    /// Follow a call or a subscriber: each message as it passes, and a pcap at the end.
    Trace {
        #[command(flatten)]
        admin: cli::Admin,
        #[command(flatten)]
        trace: cli::TraceOptions,
    },
    /// Let an instance's sessions end and give it no new ones.
    Drain {
        #[command(flatten)]
        admin: cli::Admin,
        /// POOL/INSTANCE.
        instance: String,
        /// How long at most; the pool's own deadline if not given.
        #[arg(long, value_parser = duration, value_name = "TIME")]
        deadline: Option<Duration>,
    },
    /// Give a drained instance new sessions again.
    Undrain {
        #[command(flatten)]
        admin: cli::Admin,
        /// POOL/INSTANCE.
        instance: String,
    },
    /// Load an edge, or anything else: clients and servers in one open loop, with a report.
    Load {
        #[command(subcommand)]
        load: strowger::load::Load,
    },
    /// Turn another system's configuration into one of ours.
    Import {
        #[command(subcommand)]
        from: Import,
    },
    /// Print a completion script for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page.
    Man,
}

#[derive(Subcommand)]
enum Import {
    /// A `dispatcher.list` of Kamailio's dispatcher module.
    Kamailio {
        /// The list.
        file: PathBuf,
        /// The algorithm that ds_select_dst() is called with (0-15, 64).
        #[arg(long, default_value_t = 0, value_name = "NUMBER")]
        algorithm: u32,
        /// Another algorithm for one set; may be given several times.
        #[arg(long = "set", value_name = "SET=NUMBER", allow_hyphen_values = true, value_parser = set_algorithm)]
        sets: Vec<(i64, u32)>,
        /// What the listener binds.
        #[arg(long, value_name = "ADDRESS")]
        listen: Option<std::net::SocketAddr>,
        /// Look host names up now and write their addresses.
        #[arg(long)]
        resolve: bool,
    },
}

fn set_algorithm(text: &str) -> Result<(i64, u32), String> {
    let parts = text.split_once('=').map(|(set, number)| (set.parse(), number.parse()));
    match parts {
        Some((Ok(set), Ok(number))) => Ok((set, number)),
        _ => Err("write SET=NUMBER, such as 2=9".to_owned()),
    }
}

#[derive(clap::Args)]
struct Log {
    /// What to log: error, warn, info, debug, or a filter as RUST_LOG takes it.
    #[arg(long, default_value = "info", env = "STROWGER_LOG", value_name = "FILTER")]
    log: String,
    /// How lines look.
    #[arg(long, default_value = "auto", value_name = "FORMAT")]
    log_format: Format,
}

fn duration(text: &str) -> Result<Duration, String> {
    strowger_contract::duration::parse(text)
}

fn main() -> ExitCode {
    match Arguments::parse().command.run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("strowger: {error:#}");
            ExitCode::FAILURE
        }
    }
}

impl Command {
    fn run(self) -> Result<ExitCode> {
        match self {
            Self::Run { config, log, drain, upgrade, upgrade_timeout, upgrade_drain } => {
                init_logging(log.log_format, &log.log);
                let upgrade = upgrade.map(|socket| Upgrade { socket, patience: upgrade_timeout });
                // A process that could not take over ends by the way of every error: its workers are
                // not waited for, since what they hold is still the old one's.
                runtime()?.block_on(run(config, drain, upgrade, upgrade_drain))?;
            }
            Self::Demo { options, log } => {
                init_logging(Format::Text, &log);
                runtime()?.block_on(strowger::demo::run(options))?;
            }
            Self::Sample(sample) => runtime()?.block_on(strowger::demo::sample(&sample))?,
            Self::Check { paths } => return Ok(check(&paths)),
            Self::Explain { paths } => match load(&paths) {
                Ok(loaded) => print!("{}", config::explain(&loaded)),
                Err(errors) => bail!("{errors}"),
            },
            Self::Agent { command } => return strowger::agent::run(command),
            Self::Schema { of } if of == "agent" => {
                println!("{}", serde_json::to_string_pretty(&strowger::agent::schema())?);
            }
            Self::Schema { of: _ } => println!("{}", schema()?),
            Self::Decode { file, dictionary, output } => {
                strowger::decode::run(&file, dictionary.as_deref(), output)?;
            }
            Self::Status { admin } => cli::status(&admin)?,
            Self::Sessions { admin, key } => cli::sessions(&admin, key.as_deref())?,
            Self::Calls { admin, pool, instance } => {
                cli::calls(&admin, pool.as_deref(), instance.as_deref())?;
            }
            Self::Trace { admin, trace } => cli::trace(&admin, &trace)?,
            Self::Drain { admin, instance, deadline } => cli::drain(&admin, &instance, deadline)?,
            Self::Undrain { admin, instance } => cli::undrain(&admin, &instance)?,
            Self::Load { load } => strowger::load::run(&load)?,
            Self::Import { from } => return from.run(),
            Self::Completions { shell } => {
                clap_complete::generate(
                    shell,
                    &mut Arguments::command(),
                    "strowger",
                    &mut std::io::stdout(),
                );
            }
            Self::Man => {
                clap_mangen::Man::new(Arguments::command()).render(&mut std::io::stdout())?
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Import {
    fn run(self) -> Result<ExitCode> {
        let Self::Kamailio { file, algorithm, sets, listen, resolve } = self;
        let text = std::fs::read_to_string(&file)
            .with_context(|| format!("{} cannot be read", file.display()))?;
        let options = strowger::import::KamailioOptions {
            algorithms: sets.into_iter().collect(),
            algorithm,
            resolve,
            listen,
        };
        match strowger::import::kamailio_dispatcher(&text, &options) {
            Ok(yaml) => {
                print!("{yaml}");
                Ok(ExitCode::SUCCESS)
            }
            Err(errors) => {
                for error in errors {
                    eprintln!("{}: {error}", file.display());
                }
                Ok(ExitCode::FAILURE)
            }
        }
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the control thread cannot start")
}

async fn run(
    paths: Vec<PathBuf>,
    drain: Duration,
    upgrade: Option<Upgrade>,
    upgrade_drain: Duration,
) -> Result<()> {
    take_descriptors();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let next = upgrade.is_some().then(|| signal(SignalKind::user_defined2())).transpose()?;
    let source = ConfigSource::Paths(paths);
    let mut edge = Edge::start_upgrading(source, Protocols::standard(), upgrade).await?;
    tracing::info!("ready; status page at http://{}/", edge.admin_address());
    service::ready("serving");
    let watchdog = tokio::spawn(service::keep_watchdog());
    let starter = tokio::spawn(start_next(next));
    let left = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        pid = edge.left() => Some(pid),
    };
    starter.abort();
    if let Some(pid) = left {
        service::main_process(pid);
        watchdog.abort();
        let hurry = CancellationToken::new();
        tokio::select! {
            () = edge.stay_for_the_rest(upgrade_drain, &hurry) => {}
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        edge.stop().await;
        tracing::info!("ended; process {pid} serves");
        return Ok(());
    }
    service::stopping("no new sessions; waiting for those that exist");
    // The first signal drains, a second one ends it now.
    let hurry = CancellationToken::new();
    tokio::select! {
        () = edge.drain(drain, &hurry) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    edge.stop().await;
    watchdog.abort();
    tracing::info!("ended");
    Ok(())
}

/// Takes as many descriptors as the hard limit allows: the usual soft limit, 1,024, is there for programs
/// that call select(2), and is some 500 raw flows.
fn take_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    {
        tracing::warn!("the limit of open files stays at {current:?}: {error}");
    }
}

/// SIGUSR2 starts the program anew as this process's child, from whatever its file is by now and with
/// the same arguments: under a service manager the new process must come out of the service itself.
async fn start_next(signals: Option<tokio::signal::unix::Signal>) {
    let Some(mut signals) = signals else { return };
    while signals.recv().await.is_some() {
        let mut arguments = std::env::args_os();
        let Some(program) = arguments.next() else { return };
        match std::process::Command::new(&program).args(arguments).spawn() {
            Ok(mut child) => {
                tracing::info!("started process {} to take over", child.id());
                // It is waited for, so that one that fails leaves no zombie.
                std::thread::spawn(move || child.wait());
            }
            Err(error) => {
                tracing::warn!("{} cannot be started: {error}", program.display());
            }
        }
    }
}

fn load(paths: &[PathBuf]) -> Result<config::Loaded, config::ConfigErrors> {
    let protocols = Protocols::standard();
    let sources = config::read_sources(paths)?;
    let names = strowger::routing::PoolNames::default();
    config::load_watching(sources, &protocols.configurers(), &names)
}

fn check(paths: &[PathBuf]) -> ExitCode {
    match load(paths) {
        Ok(loaded) => {
            for warning in &loaded.warnings {
                println!("warning: {warning}");
            }
            println!(
                "good: {} listeners, {} pools",
                loaded.spec.listeners.len(),
                loaded.spec.pools.len()
            );
            ExitCode::SUCCESS
        }
        Err(errors) => {
            for error in &errors.0 {
                println!("{}", cli::with_snippet(error));
            }
            println!("{} {}", errors.0.len(), if errors.0.len() == 1 { "error" } else { "errors" });
            ExitCode::FAILURE
        }
    }
}

fn schema() -> Result<String> {
    let protocols = Protocols::standard();
    Ok(serde_json::to_string_pretty(&config::edge_schema(&protocols.configurers()))?)
}
