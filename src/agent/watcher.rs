//! Starts keepers, finds those of before, and waits for their ends.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::sync::mpsc;

use super::daemon::Input;
use super::keeper::{self, BUSY, Ended, Running};
use super::launch::{Launch, Places, private_file};
use super::limits::{self, Limits};
use super::pass;
use super::supervisor::Event;

/// How often a starting keeper's file is looked for, and for how long.
const LOOK_EVERY: Duration = Duration::from_millis(10);
const LOOK_FOR: Duration = Duration::from_secs(10);

/// Whom a watch is for.
#[derive(Clone, Debug)]
pub(super) struct Watched {
    pub(super) app: String,
    pub(super) id: String,
    pub(super) generation: u64,
}

impl Watched {
    async fn tell(&self, inputs: &mpsc::Sender<Input>, event: Event) {
        let input = Input::Happened(self.app.clone(), self.id.clone(), self.generation, event);
        // It fails only when the agent ends.
        let _ending = inputs.send(input).await;
    }
}

/// Starts a keeper, and watches it.
pub(super) fn start(
    places: &Places,
    orders: &Launch,
    sockets: Vec<OwnedFd>,
    watched: Watched,
    inputs: mpsc::Sender<Input>,
) -> Result<(), String> {
    let said = |error: std::io::Error| error.to_string();
    let text = serde_json::to_vec(orders).map_err(|error| error.to_string())?;
    private_file(&places.file("launch.json"), &text).map_err(said)?;
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(said)?;
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(places.file("keeper.log"))
        .map_err(said)?;
    let child = tokio::process::Command::new("/proc/self/exe")
        .args(["agent", "keep", "--generation", &watched.generation.to_string(), "--dir"])
        .arg(&places.root)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .map_err(|error| format!("the keeper: {error}"))?;
    pass::send(&ours, &sockets).map_err(said)?;
    let places = places.clone();
    tokio::spawn(async move { watch_child(child, &places, &watched, &inputs).await });
    Ok(())
}

async fn watch_child(
    mut child: tokio::process::Child,
    places: &Places,
    watched: &Watched,
    inputs: &mpsc::Sender<Input>,
) {
    let appeared = async {
        loop {
            if let Some(running) = running(places, watched.generation) {
                let Watched { app, id, generation } = watched.clone();
                let _ending = inputs.send(Input::Runs(app, id, generation, running)).await;
                return;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    let ended = {
        tokio::pin!(appeared);
        let mut seen = false;
        loop {
            tokio::select! {
                ended = child.wait() => break ended,
                () = &mut appeared, if !seen => seen = true,
            }
        }
    };
    if ended.is_ok_and(|status| status.code() == Some(i32::from(BUSY))) {
        // A process of an earlier life that nobody knew of: it must not live beside the next one.
        stop_stranger(places).await;
        let why = "an earlier process was still there; it was stopped".to_owned();
        watched.tell(inputs, Event::StartFailed(why)).await;
        return;
    }
    let how = ended_file(places, watched.generation);
    if how.is_none()
        && let Some(running) = running(places, watched.generation)
    {
        // The keeper was killed, the process was not: without one, nobody takes its output.
        running.main.signal_group(Signal::KILL);
    }
    let how = how.unwrap_or_else(|| "its keeper was lost".to_owned());
    watched.tell(inputs, Event::Exited(how)).await;
}

async fn stop_stranger(places: &Places) {
    let Some(stranger) = keeper::read::<Running>(&places.file("running.json")) else { return };
    stranger.main.signal_group(Signal::TERM);
    tokio::time::sleep(Duration::from_secs(1)).await;
    stranger.main.signal_group(Signal::KILL);
}

fn running(places: &Places, generation: u64) -> Option<Running> {
    keeper::read::<Running>(&places.file("running.json")).filter(|it| it.generation == generation)
}

fn ended_file(places: &Places, generation: u64) -> Option<String> {
    let ended = keeper::read::<Ended>(&places.file("ended.json"))?;
    (ended.generation == generation).then_some(ended.how)
}

/// Finds a process that an earlier agent started, and watches it.
pub(super) fn adopt(state: &Path, watched: Watched, limits: Limits, inputs: mpsc::Sender<Input>) {
    let places = Places::new(state, &watched.id);
    tokio::spawn(async move {
        let found = find(&places, watched.generation).await;
        let Some(running) = found.filter(|it| it.keeper.is_alive()) else {
            if let Some(orphan) = running(&places, watched.generation) {
                orphan.main.signal_group(Signal::KILL);
                limits::kill_group(&limits);
            }
            let how = ended_file(&places, watched.generation);
            let how = how.unwrap_or_else(|| "it was not there any more".to_owned());
            watched.tell(&inputs, Event::Exited(how)).await;
            return;
        };
        let Watched { app, id, generation } = watched.clone();
        let _ending = inputs.send(Input::Runs(app, id, generation, running.clone())).await;
        wait_for(&running).await;
        let how = ended_file(&places, watched.generation);
        if how.is_none() {
            running.main.signal_group(Signal::KILL);
        }
        let how = how.unwrap_or_else(|| "its keeper was lost".to_owned());
        watched.tell(&inputs, Event::Exited(how)).await;
    });
}

/// A keeper that has the lock but has not yet said whom it keeps is waited for.
async fn find(places: &Places, generation: u64) -> Option<Running> {
    let end = tokio::time::Instant::now() + LOOK_FOR;
    loop {
        if let Some(found) = running(places, generation) {
            return Some(found);
        }
        let is_held = keeper::lock(places).is_ok_and(|lock| lock.is_none());
        if !is_held || tokio::time::Instant::now() >= end {
            return running(places, generation);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Waits for the end of a process that is not our child.
async fn wait_for(running: &Running) {
    let opened = Pid::from_raw(running.keeper.pid)
        .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK).ok());
    // It may have become another process's id before it was opened.
    let Some(file) = opened.filter(|_| running.keeper.is_alive()) else { return };
    let (ended, told) = tokio::sync::oneshot::channel();
    let keeper = running.keeper;
    // A thread, not a blocking task: those would hold the agent's own end up.
    let body = move || {
        let mut files = [rustix::event::PollFd::new(&file, rustix::event::PollFlags::IN)];
        // Readable means ended (pidfd_open(2)); a signal may come between.
        while keeper.is_alive() && rustix::event::poll(&mut files, None).is_err() {}
        // Nobody waits when the agent has ended.
        let _gone = ended.send(());
    };
    if std::thread::Builder::new().name("watch".to_owned()).spawn(body).is_ok() {
        let _ended = told.await;
    }
    while keeper.is_alive() {
        tokio::time::sleep(LOOK_EVERY * 10).await;
    }
}

/// The folder of an instance, from the command line of its keeper.
pub(crate) fn keep(dir: PathBuf, generation: u64) -> std::process::ExitCode {
    keeper::keep(dir, generation)
}
