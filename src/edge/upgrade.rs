//! Live upgrade from the edge's side: who hands over to whom, and what if it goes wrong.
//!
//! `strowger run --upgrade SOCKET` listens at SOCKET. A process that is started with the same option
//! finds the one that listens there, makes itself ready (configuration, core, sockets), and asks for
//! all that runs. Up to its `Commit` the old process has lost nothing and goes on if anything is
//! wrong or late; after the old one's `Released` it touches nothing any more.

use std::io;
use std::net::{SocketAddr, TcpListener as StdTcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};
use strowger_contract::Level;
use tokio::sync::Notify;

use super::{Inner, StartError};
use crate::control::config::Loaded;
use crate::observe::Event;
use crate::runtime::handover::{
    Channel, Gate, HandOver, SavedListener, ToNew, ToOld, Verdict, Welcome, check_hello, give,
    hello, take,
};
use crate::runtime::{Fleet, Legacies, Prepared};

/// How long the workers may stand still. SIP's first repetitions come after half a second, its
/// transactions last 32; a Diameter watchdog waits 6 s at the least.
const FREEZE_MAX: Duration = Duration::from_secs(5);

/// How long the first words may take.
const GREETING_MAX: Duration = Duration::from_secs(5);

/// Processes that may wait to be heard. One upgrade is served at a time.
const BACKLOG: i32 = 4;

/// How a process is upgraded.
#[derive(Clone, Debug)]
pub struct Upgrade {
    /// Where the old process listens, and then the new one.
    pub socket: PathBuf,
    /// How long the old process waits for the new one to be ready.
    pub patience: Duration,
}

/// The old process, as the new one sees it, before anything has moved.
pub(super) struct Predecessor {
    channel: Arc<Channel>,
    pub(super) welcome: Welcome,
    fds: Vec<OwnedFd>,
    pub(super) pid: i32,
}

impl Predecessor {
    /// Finds the process that listens at the socket; `None` if nobody does.
    pub(super) fn meet(upgrade: &Upgrade) -> Result<Option<Self>, StartError> {
        let failed = |why: String| StartError::Upgrade(format!("{}: {why}", shown(upgrade)));
        let channel = match Channel::connect(&upgrade.socket) {
            Ok(channel) => channel,
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => return Ok(None),
                _ => return Err(failed(error.to_string())),
            },
        };
        let welcomed = (|| {
            channel.set_patience(GREETING_MAX)?;
            check_peer(&channel)?;
            channel.send(&hello(), &[])?;
            let (bytes, _) = channel.receive()?;
            check_hello(&bytes).map_err(io::Error::other)?;
            channel.set_patience(FREEZE_MAX)?;
            take::<ToNew>(&channel)
        })();
        let pid = channel.peer().map_or(0, |(_, pid)| pid);
        match welcomed.map_err(|error| failed(error.to_string()))? {
            (ToNew::Welcome(welcome), fds) => {
                let (channel, welcome) = (Arc::new(channel), *welcome);
                Ok(Some(Self { channel, welcome, fds, pid }))
            }
            (ToNew::Abort(why), _) => Err(failed(why)),
            _ => Err(failed("the old process says something else than expected".into())),
        }
    }

    /// Its sockets go to the fleet; the admin listener's is given back.
    pub(super) fn give_sockets(
        &mut self,
        fleet: &mut Fleet,
    ) -> Result<Option<OwnedFd>, StartError> {
        let mut fds = std::mem::take(&mut self.fds);
        let admin = self.welcome.admin.and_then(|_| fds.pop());
        if fleet.adopt(&self.welcome.listeners, fds) {
            return Ok(admin);
        }
        Err(self.failed("its sockets are not what it says".into()))
    }

    /// Tells the old process that it must go on.
    pub(super) fn failed(&self, why: String) -> StartError {
        // It goes on anyhow.
        let _told = give(&self.channel, &ToOld::Failed(why.clone()), &[]);
        StartError::Upgrade(why)
    }
}

fn shown(upgrade: &Upgrade) -> String {
    upgrade.socket.display().to_string()
}

/// The other side must be of the same user, or root's.
fn check_peer(channel: &Channel) -> io::Result<()> {
    let (uid, pid) = channel.peer()?;
    let own = rustix::process::geteuid().as_raw();
    if uid == own || uid == 0 || own == 0 {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!("process {pid} is of user {uid}, this one of {own}"),
    ))
}

/// What was taken over, for the log.
#[derive(Default)]
struct Taken {
    items: u64,
    connections: u64,
}

impl Inner {
    /// Makes everything ready, takes over what the old process has, and starts the workers; what
    /// could not be bound.
    ///
    /// # Errors
    /// The old process goes on; this one must end at once.
    pub(super) fn succeed(
        self: &Arc<Self>,
        loaded: Loaded,
        predecessor: &Predecessor,
    ) -> Result<Vec<String>, StartError> {
        let mut prepared = None;
        let failures = self.apply_by(loaded, |_, ready| prepared = Some(ready));
        let Some(prepared) = prepared else { return Ok(failures) };
        let began = Instant::now();
        match self.take_over(prepared, predecessor, failures.len()) {
            Ok(taken) => {
                let pause = began.elapsed();
                self.metrics.upgraded("taken_over", Some(pause));
                let detail = format!(
                    "from process {}: {} connections and all else in {} ms",
                    predecessor.pid,
                    taken.connections,
                    pause.as_millis()
                );
                self.events.emit(Event::node(Level::Info, "upgrade_taken_over", detail));
                Ok(failures)
            }
            Err(why) => Err(predecessor.failed(why)),
        }
    }

    fn take_over(
        self: &Arc<Self>,
        prepared: Prepared,
        predecessor: &Predecessor,
        failures: usize,
    ) -> Result<Taken, String> {
        if failures > 0 {
            return Err("a listener could not be bound; see the log".into());
        }
        let channel = &predecessor.channel;
        let text = |error: io::Error| error.to_string();
        let listeners = Fleet::heirs(&prepared, &predecessor.welcome.listeners);
        give(channel, &ToOld::Ready { listeners }, &[]).map_err(text)?;
        let (legacies, taken) = self.receive_state(channel)?;
        let gate = Arc::new(Gate::default());
        let workers = {
            let mut fleet = self.fleet();
            fleet.inherit(prepared, legacies, &gate);
            fleet.count()
        };
        gate.wait_for(workers, FREEZE_MAX)?;
        give(channel, &ToOld::Commit, &[]).map_err(text)?;
        match take::<ToNew>(channel) {
            Ok((ToNew::Abort(why), _)) => return Err(why),
            // If it died instead of answering, it touches nothing either.
            Ok(_) | Err(_) => gate.open(),
        }
        self.take_what_comes_after(channel);
        Ok(taken)
    }

    fn receive_state(&self, channel: &Channel) -> Result<(Legacies, Taken), String> {
        let (mut legacies, mut taken) = (Legacies::default(), Taken::default());
        let broken = |error: strowger_contract::handover::Broken| error.to_string();
        loop {
            let (item, fds) = take::<ToNew>(channel).map_err(|error| error.to_string())?;
            match item {
                ToNew::Core(part) => {
                    self.core.take_over(Instant::now(), &part).map_err(broken)?;
                    continue;
                }
                ToNew::Registry(leases) => {
                    self.registry.take_over(&leases)?;
                    continue;
                }
                ToNew::Engine { listener, worker, unix_clients, generations, saved } => {
                    let legacy = legacies.entry((listener, worker)).or_default();
                    legacy.engine = Some(saved);
                    (legacy.unix_clients, legacy.generations) = (unix_clients, generations);
                }
                ToNew::Flow { listener, worker, flow } => {
                    taken.connections += 1;
                    legacies.entry((listener, worker)).or_default().flows.push((*flow, fds));
                }
                ToNew::Outward { listener, worker, number, remote } => {
                    let fd = fds.into_iter().next().ok_or("a datagram socket did not come")?;
                    let legacy = legacies.entry((listener, worker)).or_default();
                    legacy.outwards.push((number, remote, fd));
                }
                ToNew::Letter { listener, worker, letter } => {
                    legacies.entry((listener, worker)).or_default().letters.push(letter);
                }
                ToNew::Dial { listener, worker, to, waiting } => {
                    legacies.entry((listener, worker)).or_default().dials.push((to, waiting));
                }
                ToNew::End { sent } if sent == taken.items => return Ok((legacies, taken)),
                ToNew::Abort(why) => return Err(why),
                ToNew::End { .. } | ToNew::Welcome(_) | ToNew::Released => {
                    return Err("what was handed over is not whole".into());
                }
            }
            taken.items += 1;
        }
    }

    /// Connections that were on their way into the old process come after, on a thread of its own
    /// that ends with the old process.
    fn take_what_comes_after(self: &Arc<Self>, channel: &Arc<Channel>) {
        let (inner, channel) = (Arc::downgrade(self), Arc::clone(channel));
        let spawned = std::thread::Builder::new().name("upgrade-late".into()).spawn(move || {
            let _forever = channel.set_patience(Duration::from_secs(3_600));
            while let Ok((item, fds)) = take::<ToNew>(&channel) {
                let Some(inner) = inner.upgrade() else { return };
                if let ToNew::Flow { listener, worker, flow } = item {
                    inner.fleet().enter(&listener, worker, flow, fds);
                }
            }
        });
        if let Err(error) = spawned {
            let detail = format!("connections on their way are lost: {error}");
            self.events.emit(Event::node(Level::Warn, "upgrade_thread_failed", detail));
        }
    }

    /// Hands over to the process at the other end; why not, if not.
    fn hand_over(&self, channel: &Arc<Channel>, patience: Duration) -> Result<(), String> {
        let text = |error: io::Error| error.to_string();
        channel.set_patience(GREETING_MAX).map_err(text)?;
        check_peer(channel).map_err(text)?;
        let (bytes, _) = channel.receive().map_err(text)?;
        // Also to one of another format: it must hear why. One that is gone already needs no word.
        let greeted = channel.send(&hello(), &[]);
        check_hello(&bytes)?;
        greeted.map_err(text)?;
        if self.core.is_draining() {
            return Err("this process is leaving".into());
        }
        let offered = self.welcome(channel).map_err(text)?;
        channel.set_patience(patience).map_err(text)?;
        let listeners = match take::<ToOld>(channel) {
            Ok((ToOld::Ready { listeners }, _)) => listeners,
            Ok((ToOld::Failed(why), _)) => return Err(why),
            Ok((ToOld::Commit, _)) => return Err("it says something else than expected".into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(format!("it was not ready within {} s", patience.as_secs()));
            }
            Err(error) => return Err(format!("it went away before it was ready: {error}")),
        };
        // From here on no configuration is taken and no lease merged.
        let mut fleet = self.fleet();
        let _merging = self.merging.lock().unwrap_or_else(PoisonError::into_inner);
        if fleet.sockets().0 != offered {
            return Err("the listeners were changed meanwhile; try again".into());
        }
        channel.set_patience(FREEZE_MAX).map_err(text)?;
        let taken = listeners.into_iter().collect();
        let handover = HandOver::new(Arc::clone(channel), taken, fleet.count(), FREEZE_MAX);
        fleet.hand_over(&handover);
        let result = self.send_state(channel, &handover);
        if result.is_ok() && handover.decide(Verdict::Release) == Verdict::Release {
            fleet.release(&handover);
            // If it does not hear it, it finds this process gone, or silent and harmless.
            let _told = give(channel, &ToNew::Released, &[]);
            return Ok(());
        }
        handover.decide(Verdict::Resume);
        result.and_then(|()| Err("it took too long".into()))
    }

    /// Tells the new process what it needs to get ready; the listeners as they are.
    fn welcome(&self, channel: &Channel) -> io::Result<Vec<SavedListener>> {
        let fleet = self.fleet();
        let (listeners, mut fds) = fleet.sockets();
        let admin = self.admin_socket.get();
        fds.extend(admin.map(|(_, socket)| socket.as_fd()));
        let welcome = Welcome {
            core: self.core.seed_of(),
            started: fleet.started(),
            listeners,
            admin: admin.map(|(address, _)| *address),
            registry: self.registry.saved(),
        };
        let fds: Vec<BorrowedFd<'_>> = fds;
        give(channel, &ToNew::Welcome(Box::new(welcome)), &fds)?;
        Ok(fleet.sockets().0)
    }

    fn send_state(&self, channel: &Channel, handover: &HandOver) -> Result<(), String> {
        let sent = handover.all_saved()?;
        let text = |error: io::Error| error.to_string();
        give(channel, &ToNew::Registry(self.registry.saved()), &[]).map_err(text)?;
        self.core
            .save(Instant::now(), &mut |part| give(channel, &ToNew::Core(part.to_vec()), &[]))
            .map_err(text)?;
        give(channel, &ToNew::End { sent }, &[]).map_err(text)?;
        let left = handover.ends().saturating_duration_since(Instant::now());
        channel.set_patience(left.max(Duration::from_millis(1))).map_err(text)?;
        match take::<ToOld>(channel) {
            Ok((ToOld::Commit, _)) => Ok(()),
            Ok((ToOld::Failed(why), _)) => Err(why),
            Ok((ToOld::Ready { .. }, _)) => Err("it says something else than expected".into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Err(format!("it did not take over within {} s", FREEZE_MAX.as_secs()))
            }
            Err(error) => Err(format!("it went away: {error}")),
        }
    }
}

/// Where this process listens for the next one.
pub(super) struct Door {
    socket: Arc<Socket>,
    path: PathBuf,
    /// Told when another process has taken over, with its number.
    pub(super) left: Arc<(Notify, Mutex<Option<i32>>)>,
}

impl Door {
    /// Listens. The file appears whole, with its permissions, in the place of the old process's.
    pub(super) fn open(inner: &Arc<Inner>, upgrade: &Upgrade) -> Result<Self, StartError> {
        let bound = bind(&upgrade.socket);
        let socket = bound.map_err(|error| {
            StartError::Upgrade(format!("cannot listen at {}: {error}", shown(upgrade)))
        })?;
        let socket = Arc::new(socket);
        let left: Arc<(Notify, Mutex<Option<i32>>)> = Arc::default();
        let (weak, told, door) = (Arc::downgrade(inner), Arc::clone(&left), Arc::clone(&socket));
        let patience = upgrade.patience;
        std::thread::Builder::new().name("upgrade".into()).spawn(move || {
            while let Ok((stream, _)) = door.accept() {
                let Some(inner) = weak.upgrade() else { return };
                if let Some(pid) = serve(&inner, Channel::over(stream), patience) {
                    *told.1.lock().unwrap_or_else(PoisonError::into_inner) = Some(pid);
                    told.0.notify_one();
                    return;
                }
            }
        })?;
        Ok(Self { socket, path: upgrade.socket.clone(), left })
    }

    /// Waits until another process has taken over; its number.
    pub(super) async fn left(&self) -> i32 {
        loop {
            if let Some(pid) = *self.left.1.lock().unwrap_or_else(PoisonError::into_inner) {
                return pid;
            }
            self.left.0.notified().await;
        }
    }

    /// Listens no more.
    pub(super) fn close(&self) {
        let taken = self.left.1.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        if !taken {
            let _gone = std::fs::remove_file(&self.path);
        }
        // The thread's accept returns.
        let _gone = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

/// Serves one process that wants to take over; its number if it has.
fn serve(inner: &Inner, channel: Channel, patience: Duration) -> Option<i32> {
    let channel = Arc::new(channel);
    let pid = channel.peer().map_or(0, |(_, pid)| pid);
    let detail = format!("process {pid} asks for everything");
    inner.events.emit(Event::node(Level::Info, "upgrade_begun", detail));
    let began = Instant::now();
    match inner.hand_over(&channel, patience) {
        Ok(()) => {
            inner.metrics.upgraded("handed_over", Some(began.elapsed()));
            let detail = format!("process {pid} has taken over; TLS connections stay to their end");
            inner.events.emit(Event::node(Level::Info, "upgrade_handed_over", detail));
            Some(pid)
        }
        Err(why) => {
            let _told = give(&channel, &ToNew::Abort(why.clone()), &[]);
            channel.end();
            inner.metrics.upgraded("failed", None);
            let detail = format!("process {pid}: {why}; this one goes on");
            inner.events.emit(Event::node(Level::Warn, "upgrade_failed", detail));
            None
        }
    }
}

fn bind(path: &Path) -> io::Result<Socket> {
    if std::fs::symlink_metadata(path).is_ok_and(|known| !known.file_type().is_socket()) {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "it exists and is no socket"));
    }
    let mut new = path.as_os_str().to_owned();
    new.push(format!(".{}", std::process::id()));
    let new = PathBuf::from(new);
    let _stale = std::fs::remove_file(&new);
    let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
    socket.bind(&SockAddr::unix(&new)?)?;
    // Nobody can connect before it listens.
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600))?;
    socket.listen(BACKLOG)?;
    std::fs::rename(&new, path)?;
    Ok(socket)
}

/// The admin listener, another process's if it has the same address.
pub(super) fn admin_listener(
    wanted: SocketAddr,
    theirs: Option<(SocketAddr, OwnedFd)>,
) -> io::Result<StdTcpListener> {
    if let Some((_, fd)) = theirs.filter(|(address, _)| *address == wanted) {
        return Ok(fd.into());
    }
    let socket = Socket::new(Domain::for_address(wanted), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&wanted.into())?;
    socket.listen(1_024)?;
    Ok(socket.into())
}
