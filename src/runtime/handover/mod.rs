//! Live upgrade: everything that runs goes to another process over a unix socket.
//!
//! The old process stops all its workers at once; a worker that stands still between two tasks has
//! nothing in flight, so its state is what its structures say. Each writes it out and then waits
//! for the word: the new process has it all (then this one lets go of it without closing anything),
//! or it does not (then this one goes on as if nothing had been). The new process's workers take
//! the state in, and wait for the old one's word that it touches nothing any more.
//!
//! TLS cannot move: its keys are in this process's memory. Engines move all the same; the old
//! process seals and opens for connections that it has ([`super::splice::bridge`]), until they end.
//! Raw flows over TLS stay whole.
//!
//! | module | what it does |
//! |---|---|
//! | `channel` | items and descriptors over a socket |
//! | `items` | what travels |
//! | this | who waits for whom |

mod channel;
mod items;

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use strowger_contract::Endpoint;
use strowger_contract::handover::{self, Clock, by_clock};

pub(crate) use channel::Channel;
pub(crate) use items::{
    SavedCut, SavedFlow, SavedLetter, SavedListener, SavedRelay, SavedStage, SavedWay, ToNew,
    ToOld, Welcome, check_hello, hello,
};

/// A flow that is joined, whatever its protocol.
pub(crate) trait Joined {
    /// Gives its state and its two descriptors; nothing if one side is not plain.
    fn save(&self, each: &mut dyn FnMut(SavedRelay, [BorrowedFd<'_>; 2]));
}

/// This moment, by the machine's clock as well.
pub(crate) fn clock() -> Clock {
    let (instant, machine) = (Instant::now(), clock_gettime(ClockId::Monotonic));
    Clock { instant, nanos: machine.tv_sec * 1_000_000_000 + machine.tv_nsec }
}

/// Sends an item of either side.
pub(crate) fn give(
    channel: &Channel,
    item: &impl serde::Serialize,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    channel.send(&by_clock(clock(), || handover::write(item)), fds)
}

/// Receives an item of either side.
pub(crate) fn take<T: serde::de::DeserializeOwned>(
    channel: &Channel,
) -> io::Result<(T, Vec<OwnedFd>)> {
    let (bytes, fds) = channel.receive()?;
    let item = by_clock(clock(), || handover::read(&bytes));
    let item = item.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok((item, fds))
}

/// Reads an item of a hand-over, whichever side it is of; for fuzzing. Whether it was one.
#[must_use]
pub fn is_item(bytes: &[u8]) -> bool {
    let _greeting = check_hello(bytes);
    by_clock(clock(), || {
        handover::read::<ToNew>(bytes).is_ok() | handover::read::<ToOld>(bytes).is_ok()
    })
}

/// What the old process's workers do with what was handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The new process has it.
    Release,
    /// It goes on here.
    Resume,
}

/// A hand-over, as the old process's workers see it.
pub(crate) struct HandOver {
    channel: Arc<Channel>,
    taken: HashSet<String>,
    workers: usize,
    stage: Mutex<Stage>,
    changed: Condvar,
    sent: AtomicU64,
    /// Whoever waits goes on by himself then.
    ends: Instant,
}

#[derive(Default)]
struct Stage {
    frozen: usize,
    saved: usize,
    failed: Option<String>,
    verdict: Option<Verdict>,
}

impl HandOver {
    /// Of `taken` listeners, to the other end of the channel; over after `patience`.
    pub(crate) fn new(
        channel: Arc<Channel>,
        taken: HashSet<String>,
        workers: usize,
        patience: Duration,
    ) -> Arc<Self> {
        Arc::new(Self {
            channel,
            taken,
            workers,
            stage: Mutex::default(),
            changed: Condvar::new(),
            sent: AtomicU64::new(0),
            ends: Instant::now() + patience,
        })
    }

    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done`, or until time is up: then it goes on here.
    fn wait(&self, mut done: impl FnMut(&Stage) -> bool) -> MutexGuard<'_, Stage> {
        let mut stage = self.stage();
        while !done(&stage) && stage.verdict.is_none() {
            let left = self.ends.saturating_duration_since(Instant::now());
            if left.is_zero() {
                stage.verdict = Some(Verdict::Resume);
                self.changed.notify_all();
                break;
            }
            let waited = self.changed.wait_timeout(stage, left);
            stage = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        stage
    }

    /// Whether a listener is handed over.
    pub(crate) fn takes(&self, listener: &str) -> bool {
        self.taken.contains(listener)
    }

    /// A worker stands still; whether all do.
    pub(crate) fn freeze(&self) -> bool {
        self.stage().frozen += 1;
        self.changed.notify_all();
        let stage = self.wait(|stage| stage.frozen >= self.workers);
        stage.frozen >= self.workers && stage.verdict.is_none()
    }

    /// A worker has written out what it has, or could not.
    pub(crate) fn saved(&self, result: io::Result<()>) {
        let mut stage = self.stage();
        stage.saved += 1;
        if let Err(error) = result {
            stage.failed.get_or_insert_with(|| error.to_string());
        }
        self.changed.notify_all();
    }

    /// Waits for the word.
    pub(crate) fn verdict(&self) -> Verdict {
        self.wait(|_| false).verdict.unwrap_or(Verdict::Resume)
    }

    /// Waits until all workers have written out what they have.
    pub(crate) fn all_saved(&self) -> Result<u64, String> {
        let stage = self.wait(|stage| stage.saved >= self.workers || stage.failed.is_some());
        match &stage.failed {
            Some(why) => Err(why.clone()),
            None if stage.saved >= self.workers => Ok(self.sent.load(Ordering::Relaxed)),
            None => Err("the workers did not come to a stop in time".into()),
        }
    }

    /// When the workers go on by themselves.
    pub(crate) fn ends(&self) -> Instant {
        self.ends
    }

    /// Gives the word; what it is, if another was given before.
    pub(crate) fn decide(&self, verdict: Verdict) -> Verdict {
        let verdict = *self.stage().verdict.get_or_insert(verdict);
        self.changed.notify_all();
        verdict
    }
}

/// Where a listener of a worker writes what it has.
#[derive(Clone)]
pub(crate) struct Giver {
    pub(crate) handover: Arc<HandOver>,
    pub(crate) listener: Arc<str>,
    pub(crate) worker: u8,
}

impl Giver {
    /// The engine.
    pub(crate) fn engine(
        &self,
        unix_clients: u64,
        generations: Vec<u32>,
        saved: Vec<u8>,
    ) -> io::Result<()> {
        let (listener, worker) = (self.listener.to_string(), self.worker);
        self.give(&ToNew::Engine { listener, worker, unix_clients, generations, saved }, &[])
    }

    /// A connection.
    pub(crate) fn flow(&self, flow: SavedFlow, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let (listener, worker) = (self.listener.to_string(), self.worker);
        self.give(&ToNew::Flow { listener, worker, flow: Box::new(flow) }, fds)
    }

    /// A datagram socket of the engine's own.
    pub(crate) fn outward(
        &self,
        number: u32,
        remote: SocketAddr,
        fd: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let (listener, worker) = (self.listener.to_string(), self.worker);
        self.give(&ToNew::Outward { listener, worker, number, remote }, &[fd])
    }

    /// Something out of a mailbox.
    pub(crate) fn letter(&self, letter: SavedLetter) -> io::Result<()> {
        let (listener, worker) = (self.listener.to_string(), self.worker);
        self.give(&ToNew::Letter { listener, worker, letter }, &[])
    }

    /// A connection that was being opened.
    pub(crate) fn dial(&self, to: Endpoint, waiting: &[u8]) -> io::Result<()> {
        let (listener, worker) = (self.listener.to_string(), self.worker);
        self.give(&ToNew::Dial { listener, worker, to, waiting: waiting.to_vec() }, &[])
    }

    fn give(&self, item: &ToNew, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.handover.sent.fetch_add(1, Ordering::Relaxed);
        give(&self.handover.channel, item, fds)
    }
}

/// What a listener of a worker gets from the old process.
#[derive(Default)]
pub(crate) struct Legacy {
    pub(crate) engine: Option<Vec<u8>>,
    pub(crate) unix_clients: u64,
    pub(crate) generations: Vec<u32>,
    pub(crate) flows: Vec<(SavedFlow, Vec<OwnedFd>)>,
    /// Datagram sockets of the engine's own, by its numbers, and whom they speak to.
    pub(crate) outwards: Vec<(u32, SocketAddr, OwnedFd)>,
    pub(crate) letters: Vec<SavedLetter>,
    pub(crate) dials: Vec<(Endpoint, Vec<u8>)>,
}

/// Where the new process's workers wait, with everything in place, for the old one's word.
#[derive(Default)]
pub(crate) struct Gate {
    stage: Mutex<GateStage>,
    changed: Condvar,
}

#[derive(Default)]
struct GateStage {
    arrived: usize,
    failed: Option<String>,
    open: bool,
}

impl Gate {
    fn stage(&self) -> MutexGuard<'_, GateStage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker is there; it goes on when the gate opens.
    pub(crate) fn pass(&self, result: Result<(), String>) {
        let mut stage = self.stage();
        stage.arrived += 1;
        if let Err(why) = result {
            stage.failed.get_or_insert(why);
        }
        self.changed.notify_all();
        while !stage.open {
            stage = self.changed.wait(stage).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until so many workers are there.
    pub(crate) fn wait_for(&self, workers: usize, patience: Duration) -> Result<(), String> {
        let ends = Instant::now() + patience;
        let mut stage = self.stage();
        loop {
            if let Some(why) = &stage.failed {
                return Err(why.clone());
            }
            if stage.arrived >= workers {
                return Ok(());
            }
            let left = ends.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err("the workers did not take the state over in time".into());
            }
            let waited = self.changed.wait_timeout(stage, left);
            stage = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lets them go.
    pub(crate) fn open(&self) {
        self.stage().open = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use socket2::{Domain, Socket, Type};

    fn handover(workers: usize, patience: Duration) -> Arc<HandOver> {
        let (one, _) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).expect("a pair");
        HandOver::new(Arc::new(Channel::over(one)), HashSet::new(), workers, patience)
    }

    #[test]
    fn workers_go_on_by_themselves_and_then_nobody_can_release_them() {
        let handover = handover(2, Duration::from_millis(20));
        assert!(!handover.freeze(), "the other one does not come");
        assert_eq!(handover.verdict(), Verdict::Resume);
        assert_eq!(handover.decide(Verdict::Release), Verdict::Resume);
        assert!(handover.all_saved().is_err());
    }

    #[test]
    fn all_hear_the_same_word() {
        let handover = handover(3, Duration::from_secs(60));
        let workers: Vec<_> = (0..3)
            .map(|_| {
                let handover = Arc::clone(&handover);
                std::thread::spawn(move || {
                    assert!(handover.freeze());
                    handover.saved(Ok(()));
                    handover.verdict()
                })
            })
            .collect();
        assert_eq!(handover.all_saved(), Ok(0));
        assert_eq!(handover.decide(Verdict::Release), Verdict::Release);
        for worker in workers {
            assert_eq!(worker.join().expect("no panic"), Verdict::Release);
        }
    }
}
