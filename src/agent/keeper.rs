//! The keeper: a small process between the agent and each instance. It is the instance's parent, takes
//! its output, and notes how it ended, so that the agent may end, crash or be replaced meanwhile.
//!
//! It holds a lock on the instance's folder for as long as it lives: nobody starts a second one.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions};
use serde::{Deserialize, Serialize};

use super::launch::{Launch, Places, private_file};
use super::{limits, logs, pass};

/// The keeper's exit code when another one keeps the instance.
pub(crate) const BUSY: u8 = 75;

/// How long output is waited for after the process ended.
const OUTPUT_WAIT: Duration = Duration::from_secs(2);

/// Who runs, in `running.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Running {
    pub(crate) generation: u64,
    pub(crate) keeper: Process,
    pub(crate) main: Process,
}

/// A process, told from later ones of the same id by when it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    /// In clock ticks since the host's start (proc_pid_stat(5), field 22).
    pub(crate) started: u64,
}

/// How it ended, in `ended.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ended {
    pub(crate) generation: u64,
    pub(crate) how: String,
}

impl Process {
    /// A process that runs now.
    pub(crate) fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in parentheses, may hold anything.
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        let state = fields.next()?;
        let started = fields.nth(18)?.parse().ok()?;
        (state != "Z" && state != "X").then_some(Self { pid, started })
    }

    /// Whether it still runs.
    pub(crate) fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Sends a signal to it and to its group, if it is still the same.
    pub(crate) fn signal_group(self, signal: Signal) {
        if let Some(pid) = Pid::from_raw(self.pid).filter(|_| self.is_alive()) {
            let _ended = rustix::process::kill_process_group(pid, signal);
        }
    }

    /// Sends a signal to it alone.
    pub(crate) fn signal(self, signal: Signal) {
        if let Some(pid) = Pid::from_raw(self.pid).filter(|_| self.is_alive()) {
            let _ended = rustix::process::kill_process(pid, signal);
        }
    }
}

/// Takes the instance's lock; `None` if somebody has it.
pub(crate) fn lock(places: &Places) -> io::Result<Option<File>> {
    let file = File::options().create(true).append(true).open(places.file("lock"))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Reads one of the small files.
pub(crate) fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Keeps one process until its end.
pub(crate) fn keep(root: PathBuf, generation: u64) -> ExitCode {
    let places = Places { root };
    // A terminal's signals are for the agent.
    let _leader = rustix::process::setsid();
    let _old = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
    let sockets = pass::receive(rustix::stdio::stdin());
    match lock(&places) {
        Ok(Some(_held)) => match kept(&places, generation, sockets) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                note_end(&places, generation, format!("could not be started: {error}"));
                ExitCode::FAILURE
            }
        },
        Ok(None) => ExitCode::from(BUSY),
        Err(error) => {
            eprintln!("{}: {error}", places.root.display());
            ExitCode::FAILURE
        }
    }
}

fn kept(
    places: &Places,
    generation: u64,
    sockets: Vec<std::os::fd::OwnedFd>,
) -> Result<(), String> {
    let launch: Launch = read(&places.file("launch.json")).ok_or_else(|| "no orders".to_owned())?;
    if launch.generation != generation {
        return Err("the orders are of another generation".to_owned());
    }
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(|it| it.to_string())?;
    let mut command = Command::new("/proc/self/exe");
    command
        .args(["agent", "enter", "--generation", &generation.to_string(), "--dir"])
        .arg(&places.root)
        .env_clear()
        .envs(&launch.env)
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    pass::send(&ours, &sockets).map_err(|error| format!("sockets: {error}"))?;
    drop(ours);
    let main = i32::try_from(child.id()).ok().and_then(Process::of);
    let keeper = i32::try_from(std::process::id()).ok().and_then(Process::of);
    if let (Some(main), Some(keeper)) = (main, keeper) {
        let running = Running { generation, keeper, main };
        let text = serde_json::to_vec(&running).map_err(|error| error.to_string())?;
        private_file(&places.file("running.json"), &text).map_err(|error| error.to_string())?;
    }
    let pumps = logs::pump(places, &launch, child.stdout.take(), child.stderr.take());
    let how = wait_for(child.id());
    // Nothing that it left behind lives on.
    if let Some(main) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _none = rustix::process::kill_process_group(main, Signal::KILL);
    }
    limits::kill_group(&launch.limits);
    pumps.finish(OUTPUT_WAIT);
    note_end(places, generation, how);
    Ok(())
}

fn note_end(places: &Places, generation: u64, how: String) {
    let text = serde_json::to_vec(&Ended { generation, how }).unwrap_or_default();
    if let Err(error) = private_file(&places.file("ended.json"), &text) {
        eprintln!("{}: {error}", places.root.display());
    }
}

/// Waits for a child's end, and takes those that it left to us.
fn wait_for(main: u32) -> String {
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if u32::try_from(pid.as_raw_nonzero().get()) == Ok(main) => {
                return match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => format!("ended with {code}"),
                    (None, Some(signal)) => format!("killed by signal {signal}"),
                    _ => "ended".to_owned(),
                };
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return format!("lost: {error}"),
        }
    }
}

/// The last step before the program: limits, then exec. Only returns if that fails.
pub(crate) fn enter(root: PathBuf, generation: u64) -> ExitCode {
    let sockets = pass::receive(rustix::stdio::stdin());
    let places = Places { root };
    let launch = read::<Launch>(&places.file("launch.json"));
    let Some(launch) = launch.filter(|launch| launch.generation == generation) else {
        eprintln!("strowger: no orders for generation {generation}");
        return ExitCode::from(126);
    };
    if let Err(error) = limits::enter(&launch.limits) {
        eprintln!("strowger: {error}");
        return ExitCode::from(126);
    }
    let mut command = Command::new(&launch.exec[0]);
    command.args(&launch.exec[1..]).current_dir(&launch.folder).stdin(Stdio::null());
    if !sockets.is_empty() {
        command.env("LISTEN_PID", std::process::id().to_string());
        command.env("LISTEN_FDS", sockets.len().to_string());
        command.env("LISTEN_FDNAMES", launch.listen.join(":"));
        if let Err(error) = crate::runtime::sys::place_for_exec(&sockets) {
            eprintln!("strowger: sockets cannot be handed over: {error}");
            return ExitCode::from(126);
        }
    }
    crate::runtime::sys::default_signals();
    let error = command.exec();
    eprintln!("strowger: {}: {error}", launch.exec[0]);
    // Their numbers may be others' by now; the process ends here.
    std::mem::forget(sockets);
    ExitCode::from(127)
}
