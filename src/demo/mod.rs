//! `strowger demo`: an edge on loopback, sample SIP, Diameter and TCP workloads, and modest traffic
//! through it, so that a newcomer sees everything at work before configuring anything.
//!
//! The workloads are processes of their own, deployed and registered by an agent, as anybody's would be.
//! Agent and traffic run on threads of their own: they must not slow the edge's control side down.

mod diameter;
mod sip;
mod tcp;

use std::fmt;
use std::io::{IsTerminal, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::agent;
use crate::edge::{ConfigSource, Edge};
use crate::protocols::Protocols;

/// When the first instances are killed, and how often that happens; the agent starts them again.
const DEATH_AFTER: Duration = Duration::from_secs(10);
const DEATH_EVERY: Duration = Duration::from_secs(30);

/// Who is killed.
const VICTIMS: [&str; 2] = ["ims-1", "pcrf-1"];

/// Instances that the agent starts, and how long that may take.
const INSTANCES: usize = 7;
const START_LIMIT: Duration = Duration::from_secs(60);

/// A sample workload.
#[derive(clap::Args, Clone, Debug)]
pub struct Sample {
    /// What it speaks.
    kind: SampleKind,
    /// The port on 127.0.0.1.
    #[arg(long)]
    port: u16,
    /// What it calls itself.
    #[arg(long, default_value = "sample")]
    name: String,
    /// How late it answers an INVITE.
    #[arg(long, default_value = "0", value_parser = strowger_contract::duration::parse)]
    stall: Duration,
}

/// What a sample speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum SampleKind {
    /// Answers every call.
    Sip,
    /// Grants everything.
    Diameter,
    /// Echoes.
    Tcp,
}

/// Runs a sample workload until it is told to end.
///
/// # Errors
/// Its port is taken.
pub async fn sample(sample: &Sample) -> Result<()> {
    let Sample { kind, port, name, stall } = sample;
    let serve = async {
        match kind {
            SampleKind::Sip => sip::serve(*port, name, *stall).await,
            SampleKind::Diameter => diameter::serve(*port, name).await,
            SampleKind::Tcp => tcp::serve(*port).await,
        }
    };
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        () = serve => anyhow::bail!("port {port} cannot be bound"),
        _ = terminate.recv() => Ok(()),
    }
}

/// What the demo does.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// End after so long; until Ctrl-C if not given.
    #[arg(long = "for", value_name = "TIME", value_parser = strowger_contract::duration::parse)]
    lasting: Option<Duration>,
    /// SIP calls a second.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=200))]
    calls: u32,
    /// Let no instance die.
    #[arg(long)]
    no_deaths: bool,
}

/// What the clients saw.
#[derive(Debug, Default)]
struct Counts {
    calls: Tally,
    /// Calls whose instance died under them.
    calls_lost: AtomicU64,
    diameter: Tally,
    connections: Tally,
    /// Dialogs that were answered by two instances: there must be none.
    moved: AtomicU64,
}

/// Good ones and bad ones.
#[derive(Debug, Default)]
struct Tally {
    good: AtomicU64,
    failed: AtomicU64,
}

impl Tally {
    fn note(&self, good: bool) {
        let which = if good { &self.good } else { &self.failed };
        which.fetch_add(1, Ordering::Relaxed);
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (good, failed) =
            (self.good.load(Ordering::Relaxed), self.failed.load(Ordering::Relaxed));
        write!(out, "{good} good {failed} failed")
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (lost, moved) =
            (self.calls_lost.load(Ordering::Relaxed), self.moved.load(Ordering::Relaxed));
        write!(
            out,
            "SIP calls {} ({lost} died with their instance, {moved} moved) | Diameter {} | TCP {}",
            self.calls, self.diameter, self.connections
        )
    }
}

/// Ports of everything, all on loopback.
#[derive(Clone, Copy, Debug)]
struct Ports {
    admin: u16,
    sip: u16,
    diameter: u16,
    tcp: u16,
}

impl Ports {
    fn find() -> Result<Self> {
        let mut taken = Vec::new();
        let mut next = |wanted: u16| -> Result<u16> {
            let port = free_port(wanted, &taken).context("no free port on 127.0.0.1")?;
            taken.push(port);
            Ok(port)
        };
        Ok(Self {
            admin: next(9_080)?,
            sip: next(5_060)?,
            diameter: next(3_868)?,
            tcp: next(7_007)?,
        })
    }

    fn config(&self) -> String {
        include_str!("edge.yaml")
            .replace("ADMIN", &self.admin.to_string())
            .replace("SIP", &self.sip.to_string())
            .replace("DIAMETER", &self.diameter.to_string())
            .replace("TCP", &self.tcp.to_string())
    }
}

/// The port itself if nobody has it, else any.
fn free_port(wanted: u16, taken: &[u16]) -> Option<u16> {
    let is_free = |port: u16| {
        TcpListener::bind(("127.0.0.1", port)).is_ok()
            && UdpSocket::bind(("127.0.0.1", port)).is_ok()
    };
    if is_free(wanted) {
        return Some(wanted);
    }
    let any = || Some(UdpSocket::bind(("127.0.0.1", 0)).ok()?.local_addr().ok()?.port());
    (0..100).filter_map(|_| any()).find(|port| is_free(*port) && !taken.contains(port))
}

/// The folder with the demo's configuration; removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("strowger-demo-{}", std::process::id()));
        std::fs::create_dir_all(&path)
            .with_context(|| format!("{} cannot be made", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("{} could not be removed: {error}", self.0.display());
        }
    }
}

/// Runs the demo until Ctrl-C, SIGTERM or its time's end.
///
/// # Errors
/// No free ports, no place for the configuration file, or the edge does not start.
pub async fn run(options: Options) -> Result<()> {
    let ports = Ports::find()?;
    let folder = Folder::new()?;
    let file = folder.0.join("edge.yaml");
    std::fs::write(&file, ports.config())
        .with_context(|| format!("{} cannot be written", file.display()))?;
    let counts = Arc::new(Counts::default());
    let stop = CancellationToken::new();
    let edge = Edge::start(ConfigSource::Paths(vec![file.clone()]), Protocols::standard()).await?;
    let manifest = folder.0.join("agent.yaml");
    std::fs::write(&manifest, workloads(ports.admin)?)
        .with_context(|| format!("{} cannot be written", manifest.display()))?;
    let agent = start_agent(&folder.0, stop.clone())?;
    let socket = folder.0.join("agent/agent.sock");
    deploy(&socket, &manifest).await?;
    let traffic = start_traffic(ports, &options, Arc::clone(&counts), stop.clone())?;
    println!(
        "An edge with three SIP, two Diameter and two TCP instances behind it, all on loopback."
    );
    println!("  status page    http://{}/", edge.admin_address());
    println!("  configuration  {} (edit it: changes apply at once)", file.display());
    println!("  workloads      strowger agent status --socket {}", socket.display());
    println!(
        "  SIP udp and tcp 127.0.0.1:{}, Diameter tcp 127.0.0.1:{}, TCP 127.0.0.1:{}",
        ports.sip, ports.diameter, ports.tcp
    );
    println!("  Ctrl-C ends all of it.\n");
    watch_it(&edge, &options, &socket, &counts).await?;
    stop.cancel();
    edge.stop().await;
    for thread in [traffic, agent] {
        if thread.join().is_err() {
            eprintln!("a thread of the demo panicked");
        }
    }
    println!("{counts}");
    Ok(())
}

/// Prints what happens until the end.
async fn watch_it(edge: &Edge, options: &Options, agent: &Path, counts: &Counts) -> Result<()> {
    let (mut interrupt, mut terminate) =
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut events = edge.events().subscribe(u64::MAX).future;
    let began = Instant::now();
    let mut second = tokio::time::interval(Duration::from_secs(1));
    let screen = std::io::stdout().is_terminal();
    let mut out = std::io::stdout();
    let wipe = if screen { "\r\x1b[K" } else { "" };
    let mut deaths = 0;
    loop {
        tokio::select! {
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
            event = events.recv() => {
                if let Ok(event) = event
                    && matches!(event.kind.as_str(), "backend_down" | "backend_up" | "backend_added" | "backend_removed" | "backend_ejected" | "backend_returned" | "config_reloaded" | "config_rejected" | "drain_started" | "drain_ended" | "instance_registered" | "instance_left" | "instance_replaced" | "lease_lapsed")
                {
                    writeln!(out, "{wipe}  {} {} {} {}", event.kind, event.pool, event.instance, event.detail)?;
                }
            }
            _ = second.tick() => {
                let elapsed = began.elapsed();
                if options.lasting.is_some_and(|lasting| elapsed >= lasting) {
                    break;
                }
                if !options.no_deaths && deaths_until(elapsed) > deaths {
                    deaths += 1;
                    writeln!(out, "{wipe}> {} are killed; the agent starts them again", VICTIMS.join(" and "))?;
                    let socket = agent.to_owned();
                    tokio::task::spawn_blocking(move || agent::kill_instances(&socket, &VICTIMS)).await??;
                }
                let end = if screen { "" } else { "\n" };
                write!(out, "{wipe}{:>4} s  {counts}{end}", elapsed.as_secs())?;
                out.flush()?;
            }
        }
    }
    writeln!(out, "{wipe}ending")?;
    Ok(())
}

/// How often instances should have been killed by now.
fn deaths_until(elapsed: Duration) -> u64 {
    let since = elapsed.checked_sub(DEATH_AFTER);
    since.map_or(0, |since| since.as_secs() / DEATH_EVERY.as_secs() + 1)
}

/// The manifest of the sample workloads.
fn workloads(admin: u16) -> Result<String> {
    let program = std::env::current_exe().context("the program's own path is unknown")?;
    Ok(include_str!("workloads.yaml")
        .replace("ADMIN", &admin.to_string())
        .replace("STROWGER", &program.display().to_string()))
}

fn start_agent(folder: &Path, stop: CancellationToken) -> Result<std::thread::JoinHandle<()>> {
    let mut options = agent::Options::with_state(folder.join("agent"));
    options.stop_instances = true;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let body = move || {
        if let Err(error) = runtime.block_on(agent::serve(options, stop)) {
            eprintln!("the agent ended: {error:#}");
        }
    };
    Ok(std::thread::Builder::new().name("agent".to_owned()).spawn(body)?)
}

/// Applies the manifest and waits until all instances serve.
async fn deploy(socket: &Path, manifest: &Path) -> Result<()> {
    let (socket, manifest) = (socket.to_owned(), manifest.to_owned());
    let deployed = move || agent::deploy(&socket, &manifest, INSTANCES, START_LIMIT);
    tokio::task::spawn_blocking(deployed).await?
}

fn start_traffic(
    ports: Ports,
    options: &Options,
    counts: Arc<Counts>,
    stop: CancellationToken,
) -> Result<std::thread::JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let calls = options.calls;
    let thread = std::thread::Builder::new().name("traffic".to_owned()).spawn(move || {
        runtime.block_on(async move {
            let mut tasks = JoinSet::new();
            let address = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
            tasks.spawn(sip::traffic(address(ports.sip), calls, Arc::clone(&counts)));
            tasks.spawn(diameter::traffic(address(ports.diameter), Arc::clone(&counts)));
            tasks.spawn(tcp::traffic(address(ports.tcp), counts));
            stop.cancelled().await;
        });
    })?;
    Ok(thread)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_are_killed_now_and_then() {
        let at = |seconds| deaths_until(Duration::from_secs(seconds));
        assert_eq!((at(0), at(9), at(10), at(39), at(40), at(71)), (0, 0, 1, 1, 2, 3));
    }

    #[test]
    fn the_configuration_has_all_its_ports() {
        let ports = Ports::find().expect("ports");
        let text = ports.config();
        for placeholder in ["ADMIN", "SIP", "DIAMETER", "TCP"] {
            assert!(!text.contains(placeholder), "{placeholder}:\n{text}");
        }
    }
}
