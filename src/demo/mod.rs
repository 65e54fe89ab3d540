//! `strowger demo`: an edge on loopback, sample SIP, Diameter and TCP workloads, and modest traffic
//! through it, so that a newcomer sees everything at work before configuring anything.
//!
//! The samples run on a thread of their own: they must not slow the edge's control side down.

mod diameter;
mod sip;
mod tcp;

use std::fmt;
use std::future::Future;
use std::io::{IsTerminal, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::edge::{ConfigSource, Edge};
use crate::protocols::Protocols;

/// When the first instances die, how long they stay dead, and how often that happens.
const DEATH_AFTER: Duration = Duration::from_secs(10);
const DEATH_LASTS: Duration = Duration::from_secs(5);
const DEATH_EVERY: Duration = Duration::from_secs(30);

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
    ims: [u16; 3],
    pcrf: [u16; 2],
    db: [u16; 2],
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
            ims: [next(5_071)?, next(5_072)?, next(5_073)?],
            pcrf: [next(3_871)?, next(3_872)?],
            db: [next(7_071)?, next(7_072)?],
        })
    }

    fn config(&self) -> String {
        include_str!("edge.yaml")
            .replace("ADMIN", &self.admin.to_string())
            .replace("SIP", &self.sip.to_string())
            .replace("DIAMETER", &self.diameter.to_string())
            .replace("TCP", &self.tcp.to_string())
            .replace("IMS_A", &self.ims[0].to_string())
            .replace("IMS_B", &self.ims[1].to_string())
            .replace("IMS_C", &self.ims[2].to_string())
            .replace("PCRF_A", &self.pcrf[0].to_string())
            .replace("PCRF_B", &self.pcrf[1].to_string())
            .replace("DB_A", &self.db[0].to_string())
            .replace("DB_B", &self.db[1].to_string())
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
    let (alive, is_alive) = watch::channel(true);
    let counts = Arc::new(Counts::default());
    let stop = CancellationToken::new();
    let samples = start_samples(ports, &options, is_alive, Arc::clone(&counts), stop.clone())?;
    let edge = Edge::start(ConfigSource::Paths(vec![file.clone()]), Protocols::standard()).await?;
    println!(
        "An edge with three SIP, two Diameter and two TCP instances behind it, all on loopback."
    );
    println!("  status page    http://{}/", edge.admin_address());
    println!("  configuration  {} (edit it: changes apply at once)", file.display());
    println!(
        "  SIP udp and tcp 127.0.0.1:{}, Diameter tcp 127.0.0.1:{}, TCP 127.0.0.1:{}",
        ports.sip, ports.diameter, ports.tcp
    );
    println!("  Ctrl-C ends all of it.\n");
    watch_it(&edge, &options, &alive, &counts).await?;
    stop.cancel();
    edge.stop().await;
    if samples.join().is_err() {
        eprintln!("the samples' thread panicked");
    }
    println!("{counts}");
    Ok(())
}

/// Prints what happens until the end.
async fn watch_it(
    edge: &Edge,
    options: &Options,
    alive: &watch::Sender<bool>,
    counts: &Counts,
) -> Result<()> {
    let (mut interrupt, mut terminate) =
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut events = edge.events().subscribe(u64::MAX).future;
    let began = Instant::now();
    let mut second = tokio::time::interval(Duration::from_secs(1));
    let screen = std::io::stdout().is_terminal();
    let mut out = std::io::stdout();
    let wipe = if screen { "\r\x1b[K" } else { "" };
    loop {
        tokio::select! {
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
            event = events.recv() => {
                if let Ok(event) = event
                    && matches!(event.kind.as_str(), "backend_down" | "backend_up" | "backend_added" | "backend_removed" | "backend_ejected" | "backend_returned" | "config_reloaded" | "config_rejected" | "drain_started" | "drain_ended")
                {
                    writeln!(out, "{wipe}  {} {} {} {}", event.kind, event.pool, event.instance, event.detail)?;
                }
            }
            _ = second.tick() => {
                let elapsed = began.elapsed();
                if options.lasting.is_some_and(|lasting| elapsed >= lasting) {
                    break;
                }
                let wanted = options.no_deaths || !is_death_time(elapsed);
                if *alive.borrow() != wanted {
                    let what = if wanted { "are started again" } else { "are killed" };
                    writeln!(out, "{wipe}> ims-b and pcrf-b {what}")?;
                    alive.send_replace(wanted);
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

fn is_death_time(elapsed: Duration) -> bool {
    let within = Duration::from_secs(elapsed.as_secs() % DEATH_EVERY.as_secs());
    within >= DEATH_AFTER && within < DEATH_AFTER + DEATH_LASTS
}

fn start_samples(
    ports: Ports,
    options: &Options,
    is_alive: watch::Receiver<bool>,
    counts: Arc<Counts>,
    stop: CancellationToken,
) -> Result<std::thread::JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let calls = options.calls;
    let thread = std::thread::Builder::new().name("samples".to_owned()).spawn(move || {
        runtime.block_on(async move {
            let mut tasks = JoinSet::new();
            let (_always, always) = watch::channel(true);
            for (index, name) in ["ims-a", "ims-b", "ims-c"].into_iter().enumerate() {
                let alive = if index == 1 { is_alive.clone() } else { always.clone() };
                tasks.spawn(while_alive(alive, move || sip::serve(ports.ims[index], name)));
            }
            for (index, name) in ["pcrf-a", "pcrf-b"].into_iter().enumerate() {
                let alive = if index == 1 { is_alive.clone() } else { always.clone() };
                tasks.spawn(while_alive(alive, move || diameter::serve(ports.pcrf[index], name)));
            }
            for port in ports.db {
                tasks.spawn(while_alive(always.clone(), move || tcp::serve(port)));
            }
            let address = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
            tasks.spawn(sip::traffic(address(ports.sip), calls, Arc::clone(&counts)));
            tasks.spawn(diameter::traffic(address(ports.diameter), Arc::clone(&counts)));
            tasks.spawn(tcp::traffic(address(ports.tcp), counts));
            stop.cancelled().await;
        });
    })?;
    Ok(thread)
}

/// Runs an instance while it is to be alive, again and again.
async fn while_alive<F>(mut alive: watch::Receiver<bool>, serve: impl Fn() -> F)
where
    F: Future<Output = ()>,
{
    loop {
        if alive.wait_for(|alive| *alive).await.is_err() {
            return;
        }
        tokio::select! {
            () = serve() => tokio::time::sleep(Duration::from_millis(100)).await,
            ended = async { alive.wait_for(|alive| !*alive).await.is_err() } => if ended {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_die_for_a_while_and_return() {
        let at = |seconds| is_death_time(Duration::from_secs(seconds));
        assert!(!at(0) && !at(9) && at(10) && at(14) && !at(15) && !at(39) && at(40));
    }

    #[test]
    fn the_configuration_has_all_its_ports() {
        let ports = Ports::find().expect("ports");
        let text = ports.config();
        for placeholder in ["ADMIN", "SIP", "DIAMETER", "TCP", "IMS_", "PCRF_", "DB_"] {
            assert!(!text.contains(placeholder), "{placeholder}:\n{text}");
        }
    }
}
