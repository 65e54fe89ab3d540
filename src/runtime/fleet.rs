//! All workers, and the listeners on them.
//!
//! A new configuration comes in two steps: [`Fleet::prepare`] binds what is new, and nothing
//! changes if it fails; [`Fleet::commit`], after the snapshot was swapped, starts the new listeners,
//! gives the kept ones their options, and closes the old.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use strowger_contract::{LocalSocket, Transport, WorkerId};

use super::bind::bind;
use super::handover::{Gate, HandOver, Legacy, SavedFlow, SavedListener};
use super::launch::{BoundSocket, Launch};
use super::mailbox::Mailbox;
use super::resolve::Resolver;
use super::shared::Shared;
use super::worker::{Start, Worker};
use crate::observe::{Events, Metrics, Sinks};
use crate::routing::{Core, ListenerSpec};

/// All workers.
pub struct Fleet {
    workers: Vec<Worker>,
    pause_us: Arc<AtomicU32>,
    listeners: HashMap<String, Listener>,
    launchers: HashMap<&'static str, Arc<dyn Launch>>,
    core: Arc<Core>,
    metrics: Arc<Metrics>,
    events: Arc<Events>,
    sinks: Sinks,
    tls: Arc<crate::tls::Store>,
    resolver: Arc<dyn Resolver>,
    seed: u64,
    started: u32,
    serial: u64,
    /// Sockets that another process had bound, until the first commit.
    inherited: Vec<Inherited>,
    /// Another process has the listeners: their files are its own.
    released: bool,
}

struct Inherited {
    transport: Transport,
    address: SocketAddr,
    sockets: Vec<Arc<BoundSocket>>,
}

/// What another process had of each listener and worker.
pub(crate) type Legacies = HashMap<(String, u8), Legacy>;

struct Listener {
    serial: u64,
    spec: Arc<ListenerSpec>,
    sockets: Sockets,
    shared: Arc<Shared>,
}

/// For each address of a listener, one socket per worker.
type Sockets = Vec<Vec<Arc<BoundSocket>>>;

/// New listeners, bound and waiting for [`Fleet::commit`].
pub struct Prepared {
    wanted: Vec<Arc<ListenerSpec>>,
    bound: HashMap<String, Sockets>,
    /// Those that could not be bound, and why.
    pub failed: Vec<BindFailure>,
}

/// A listener that could not be bound.
#[derive(Debug)]
pub struct BindFailure {
    /// Its name.
    pub listener: String,
    /// What it was to be bound to.
    pub socket: LocalSocket,
    /// Why not.
    pub error: io::Error,
}

/// A listener as it runs.
#[derive(Clone, Debug)]
pub struct ListenerView {
    /// Its name.
    pub name: String,
    /// Its protocol.
    pub protocol: &'static str,
    /// What it is really bound to.
    pub bound: Vec<(Transport, SocketAddr)>,
    /// Clients' connections.
    pub connections: u32,
    /// Transactions, pending requests and flows.
    pub in_progress: usize,
}

impl Fleet {
    #[allow(clippy::too_many_arguments, reason = "made once, by the edge")]
    /// Starts `count` workers without listeners. `started` grows with each start of the process.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn new(
        count: u8,
        launchers: Vec<Box<dyn Launch>>,
        core: Arc<Core>,
        metrics: Arc<Metrics>,
        events: Arc<Events>,
        sinks: Sinks,
        resolver: Arc<dyn Resolver>,
        seed: u64,
        started: u32,
    ) -> io::Result<Self> {
        let pause_us = Arc::default();
        let workers = (0..count)
            .map(|index| Worker::new(WorkerId(index), &metrics, &events, &pause_us))
            .collect::<io::Result<Vec<_>>>()?;
        let launchers =
            launchers.into_iter().map(|launch| (launch.name(), Arc::from(launch))).collect();
        Ok(Self {
            workers,
            pause_us,
            listeners: HashMap::new(),
            launchers,
            core,
            metrics,
            events,
            sinks,
            tls: Arc::default(),
            resolver,
            seed,
            started,
            serial: 0,
            inherited: Vec::new(),
            released: false,
        })
    }

    /// Binds what is new in `wanted`. What cannot be bound is left out and named; a listener of
    /// that name that runs goes on as it is.
    #[must_use]
    pub fn prepare(&self, wanted: &[Arc<ListenerSpec>]) -> Prepared {
        let mut prepared =
            Prepared { wanted: Vec::new(), bound: HashMap::new(), failed: Vec::new() };
        for spec in wanted {
            let running = self.listeners.get(&spec.name);
            if running.is_some_and(|running| {
                running.spec.sockets == spec.sockets && running.spec.protocol == spec.protocol
            }) {
                prepared.wanted.push(Arc::clone(spec));
                continue;
            }
            match self.bind_all(spec) {
                Ok(sockets) => {
                    prepared.bound.insert(spec.name.clone(), sockets);
                    prepared.wanted.push(Arc::clone(spec));
                }
                Err(failure) => {
                    if let Some(running) = running {
                        prepared.wanted.push(Arc::clone(&running.spec));
                    }
                    prepared.failed.push(failure);
                }
            }
        }
        prepared
    }

    fn bind_all(&self, spec: &ListenerSpec) -> Result<Sockets, BindFailure> {
        let bind_one = |socket: &LocalSocket| {
            // An address that a running listener already has is taken over with what waits in it.
            if let Some(sockets) = self.sockets_at(socket) {
                return Ok(sockets);
            }
            let bound = bind(socket, self.workers.len());
            let bound = bound.map(|sockets| sockets.into_iter().map(Arc::new).collect());
            bound.map_err(|error| BindFailure {
                listener: spec.name.clone(),
                socket: socket.clone(),
                error,
            })
        };
        spec.sockets.iter().map(bind_one).collect()
    }

    fn sockets_at(&self, wanted: &LocalSocket) -> Option<Vec<Arc<BoundSocket>>> {
        let same =
            |one: &&Inherited| one.transport == wanted.transport && one.address == wanted.address;
        if let Some(one) = self.inherited.iter().find(same) {
            return Some(one.sockets.clone());
        }
        self.listeners.values().find_map(|listener| {
            let same = |socket: &LocalSocket| {
                socket.transport == wanted.transport && socket.address == wanted.address
            };
            let index = listener
                .spec
                .sockets
                .iter()
                .position(same)
                .filter(|_| wanted.address.port() != 0)?;
            Some(listener.sockets[index].clone())
        })
    }

    /// Takes the sockets of another process: listeners that want their addresses get them.
    pub(crate) fn adopt(&mut self, listeners: &[SavedListener], fds: Vec<OwnedFd>) -> bool {
        let mut fds = fds.into_iter();
        let count = self.workers.len();
        for listener in listeners {
            for &(transport, address) in &listener.sockets {
                let own = fds.by_ref().take(count);
                let sockets: Vec<_> =
                    own.map(|fd| Arc::new(BoundSocket::of(fd, transport, address))).collect();
                if sockets.len() < count {
                    return false;
                }
                self.inherited.push(Inherited { transport, address, sockets });
            }
        }
        fds.next().is_none()
    }

    /// The listeners as they are configured, and their sockets' descriptors in the same order.
    pub(crate) fn sockets(&self) -> (Vec<SavedListener>, Vec<BorrowedFd<'_>>) {
        let (mut saved, mut fds) = (Vec::new(), Vec::new());
        for (name, listener) in &self.listeners {
            let places = listener.spec.sockets.iter();
            let sockets = places.map(|place| (place.transport, place.address)).collect();
            saved.push(SavedListener { name: name.clone(), sockets });
            fds.extend(listener.sockets.iter().flatten().map(|socket| socket.fd()));
        }
        (saved, fds)
    }

    /// Those of `wanted` that another process can hand over with all that runs on them: its sockets
    /// are the same.
    pub(crate) fn heirs(wanted: &Prepared, theirs: &[SavedListener]) -> Vec<String> {
        let same = |spec: &&Arc<ListenerSpec>| {
            let sockets = spec.sockets.iter().map(|socket| (socket.transport, socket.address));
            let sockets: Vec<_> = sockets.collect();
            theirs.iter().any(|listener| listener.name == spec.name && listener.sockets == sockets)
        };
        wanted.wanted.iter().filter(same).map(|spec| spec.name.clone()).collect()
    }

    /// The first commit, with what another process had: all listeners start, and their workers wait
    /// at the gate.
    pub(crate) fn inherit(&mut self, prepared: Prepared, mut legacies: Legacies, gate: &Arc<Gate>) {
        let Prepared { wanted, mut bound, .. } = prepared;
        let mut starts: Vec<Vec<Start>> = self.workers.iter().map(|_| Vec::new()).collect();
        for spec in wanted {
            let Some(sockets) = bound.remove(&spec.name) else { continue };
            for (index, mut start) in self.starts(&spec, sockets).into_iter().enumerate() {
                let legacy = legacies.remove(&(spec.name.clone(), index as u8));
                start.legacy = Mutex::new(Some(legacy.unwrap_or_default()));
                starts[index].push(start);
            }
        }
        self.inherited.clear();
        for (worker, starts) in self.workers.iter().zip(starts) {
            worker.inherit(starts, gate);
        }
    }

    /// A connection that another process sent after.
    pub(crate) fn enter(
        &self,
        listener: &str,
        worker: u8,
        flow: Box<SavedFlow>,
        fds: Vec<OwnedFd>,
    ) {
        if let (Some(listener), Some(worker)) =
            (self.listeners.get(listener), self.workers.get(usize::from(worker)))
        {
            worker.enter(listener.serial, flow, fds);
        }
    }

    /// Has all workers stand still and write out what they have.
    pub(crate) fn hand_over(&self, handover: &Arc<HandOver>) {
        self.workers.iter().for_each(|worker| worker.hand_over(handover));
    }

    /// How many workers there are.
    pub(crate) fn count(&self) -> usize {
        self.workers.len()
    }

    /// Another process has the listeners of that hand-over; all others are closed.
    pub(crate) fn release(&mut self, handover: &HandOver) {
        for (name, listener) in &self.listeners {
            for worker in &self.workers {
                if handover.takes(name) {
                    worker.forget(listener.serial);
                } else {
                    worker.stop(listener.serial);
                }
            }
        }
        // Until their last connection ends, nothing else may bind them; the other process has them.
        for listener in self.listeners.values_mut() {
            listener.sockets.clear();
        }
        self.released = true;
    }

    /// Connections of clients that are here, over all listeners.
    pub(crate) fn connections(&self) -> u64 {
        let count = |listener: &Listener| listener.shared.connections.load(Ordering::Relaxed);
        self.listeners.values().map(|listener| u64::from(count(listener))).sum()
    }

    /// When this process began to count starts ([`Fleet::new`]).
    pub(crate) fn started(&self) -> u32 {
        self.started
    }

    /// For how long workers let messages gather where many come (`node.rx_usecs`); 0: not at all.
    pub fn set_rx_usecs(&self, micros: u32) {
        self.pause_us.store(micros, Ordering::Relaxed);
    }

    /// Starts, reconfigures and closes listeners as prepared.
    pub fn commit(&mut self, prepared: Prepared) {
        let Prepared { wanted, mut bound, .. } = prepared;
        let gone: Vec<String> = self
            .listeners
            .keys()
            .filter(|name| !wanted.iter().any(|spec| spec.name == **name))
            .cloned()
            .collect();
        for spec in wanted {
            match bound.remove(&spec.name) {
                Some(sockets) => {
                    let old = self.listeners.remove(&spec.name);
                    self.start(&spec, sockets);
                    if let Some(old) = old {
                        self.stop(&old);
                    }
                }
                None => self.reconfigure(&spec),
            }
        }
        for name in gone {
            if let Some(old) = self.listeners.remove(&name) {
                self.stop(&old);
            }
        }
    }

    fn start(&mut self, spec: &Arc<ListenerSpec>, sockets: Sockets) {
        let starts = self.starts(spec, sockets);
        for (worker, start) in self.workers.iter().zip(starts) {
            worker.start(start);
        }
    }

    /// Enters a listener: what each worker is to start.
    fn starts(&mut self, spec: &Arc<ListenerSpec>, sockets: Sockets) -> Vec<Start> {
        let Some(launch) = self.launchers.get(spec.protocol).cloned() else { return Vec::new() };
        self.serial += 1;
        let count = self.workers.len();
        let shared = Arc::new(Shared {
            name: spec.name.clone(),
            workers: count as u8,
            seed: self.seed ^ self.serial.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            started: self.started,
            core: Arc::clone(&self.core),
            metrics: Arc::clone(&self.metrics),
            events: Arc::clone(&self.events),
            sinks: self.sinks.clone(),
            tls: Arc::clone(&self.tls),
            resolver: Arc::clone(&self.resolver),
            mailboxes: (0..count).map(|_| Mailbox::default()).collect(),
            connections: AtomicU32::new(0),
            in_progress: (0..count).map(|_| AtomicUsize::new(0)).collect(),
            jitter: AtomicU64::new(self.seed),
            unix_clients: AtomicU64::new(1),
            sources: Mutex::default(),
        });
        let start = |index: usize| Start {
            launch: Arc::clone(&launch),
            spec: Arc::clone(spec),
            sockets: sockets.iter().map(|per_worker| Arc::clone(&per_worker[index])).collect(),
            shared: Arc::clone(&shared),
            serial: self.serial,
            legacy: Mutex::default(),
        };
        let starts = (0..count).map(start).collect();
        let listener = Listener { serial: self.serial, spec: Arc::clone(spec), sockets, shared };
        self.listeners.insert(spec.name.clone(), listener);
        starts
    }

    fn reconfigure(&mut self, spec: &Arc<ListenerSpec>) {
        let Some(listener) = self.listeners.get_mut(&spec.name) else { return };
        if listener.spec.fingerprint == spec.fingerprint {
            return;
        }
        listener.spec = Arc::clone(spec);
        for worker in &self.workers {
            worker.reconfigure(listener.serial, spec);
        }
    }

    fn stop(&self, listener: &Listener) {
        self.remove_files(listener);
        for worker in &self.workers {
            worker.stop(listener.serial);
        }
    }

    /// The certificates and keys in use.
    #[must_use]
    pub fn tls(&self) -> &Arc<crate::tls::Store> {
        &self.tls
    }

    /// The listeners as they run.
    #[must_use]
    pub fn view(&self) -> Vec<ListenerView> {
        let mut views: Vec<ListenerView> = self.listeners.values().map(Listener::view).collect();
        views.sort_by(|one, two| one.name.cmp(&two.name));
        views
    }

    /// Tells all engines that the node is leaving.
    pub fn drain(&self) {
        self.workers.iter().for_each(Worker::drain);
    }

    /// What is under way on all listeners.
    #[must_use]
    pub fn in_progress(&self) -> usize {
        self.listeners.values().map(Listener::in_progress).sum()
    }

    /// Removes the files of a listener's unix sockets that no other listener has taken over.
    fn remove_files(&self, listener: &Listener) {
        for socket in listener.spec.sockets.iter().filter(|one| one.transport == Transport::Unix) {
            let taken_over = self.listeners.values().any(|other| {
                other.serial != listener.serial
                    && other.spec.sockets.iter().any(|other| other.address == socket.address)
            });
            if let Some(path) =
                strowger_contract::unix::path(socket.address).filter(|_| !taken_over)
            {
                // Somebody else may have been faster.
                let _gone = std::fs::remove_file(&*path);
            }
        }
    }

    /// Ends all workers.
    pub fn end(&mut self) {
        if !self.released {
            self.listeners.values().for_each(|listener| self.remove_files(listener));
        }
        self.workers.iter_mut().for_each(Worker::end);
    }
}

impl Listener {
    fn in_progress(&self) -> usize {
        self.shared.in_progress.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    fn view(&self) -> ListenerView {
        let address = |per_worker: &Vec<Arc<BoundSocket>>| {
            let socket = per_worker.first()?;
            Some((socket.transport(), socket.local_addr().ok()?))
        };
        ListenerView {
            name: self.spec.name.clone(),
            protocol: self.spec.protocol,
            bound: self.sockets.iter().filter_map(address).collect(),
            connections: self.shared.connections.load(Ordering::Relaxed),
            in_progress: self.in_progress(),
        }
    }
}
