//! From a protocol's type to running listeners: the tasks around a [`Host`].

use std::any::Any;
use std::cell::RefCell;
use std::io;
use std::marker::PhantomData;
use std::net::{SocketAddr, TcpListener as StdTcpListener, UdpSocket as StdUdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use strowger_contract::{Endpoint, Links, Protocol, Transport, WorkerId};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::datagram::{BATCH, DatagramPort, Sent};
use super::handover::{Giver, Legacy, SavedFlow};
use super::host::{Begun, Bridges, Host, Inherited};
use super::link::{LinkId, keep_links, serve_link};
use super::mailbox::Letters;
use super::shared::{NodeEvent, Shared};
use super::sys::RecvBatch;
use crate::observe::ListenerMetrics;
use crate::routing::{ListenerSpec, Setup};

/// Batches that one socket may receive before the others have their turn.
const BATCHES_PER_TURN: usize = 4;

/// How long to wait when no connection can be accepted: descriptors or memory ran out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How often a saturated engine is asked again.
const SATURATED_PAUSE: Duration = Duration::from_millis(5);

/// Where a listener starts.
pub(crate) struct Place {
    pub(crate) worker: WorkerId,
    pub(crate) spec: Arc<ListenerSpec>,
    /// This worker's own sockets, in the order of the spec's.
    pub(crate) sockets: Vec<BoundSocket>,
    pub(crate) shared: Arc<Shared>,
    /// Told when a task that the listener cannot do without panics.
    pub(crate) broken: Rc<Notify>,
    /// What another process had of it on this worker.
    pub(crate) legacy: Option<Legacy>,
}

/// A socket that is bound and does not block.
#[derive(Debug)]
pub(crate) enum BoundSocket {
    Datagram(StdUdpSocket),
    Stream(StdTcpListener, Transport),
    /// With the address that stands for its path.
    Unix(StdUnixListener, SocketAddr),
}

impl BoundSocket {
    /// What it is really bound to.
    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Datagram(socket) => socket.local_addr(),
            Self::Stream(socket, _) => socket.local_addr(),
            Self::Unix(_, address) => Ok(*address),
        }
    }

    /// What runs over it.
    pub(crate) fn transport(&self) -> Transport {
        match self {
            Self::Datagram(_) => Transport::Udp,
            Self::Stream(_, transport) => *transport,
            Self::Unix(..) => Transport::Unix,
        }
    }

    /// Its descriptor.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Datagram(socket) => socket.as_fd(),
            Self::Stream(socket, _) => socket.as_fd(),
            Self::Unix(socket, _) => socket.as_fd(),
        }
    }

    /// One that another process had bound.
    pub(crate) fn of(fd: OwnedFd, transport: Transport, address: SocketAddr) -> Self {
        match transport {
            Transport::Udp => Self::Datagram(fd.into()),
            Transport::Unix => Self::Unix(fd.into(), address),
            _ => Self::Stream(fd.into(), transport),
        }
    }

    /// Another handle of the same socket.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Datagram(socket) => Self::Datagram(socket.try_clone()?),
            Self::Stream(socket, transport) => Self::Stream(socket.try_clone()?, *transport),
            Self::Unix(socket, address) => Self::Unix(socket.try_clone()?, *address),
        })
    }
}

/// Starts a protocol's listeners; one for each protocol.
pub trait Launch: Send + Sync {
    /// The protocol's name.
    fn name(&self) -> &'static str;

    /// Starts a listener on the current worker.
    #[doc(hidden)]
    fn start(&self, place: LaunchPlace) -> io::Result<Rc<dyn RunningListener>>;
}

/// The opaque form of a place, so that [`Launch`] can be public.
#[doc(hidden)]
pub struct LaunchPlace(pub(crate) Place);

/// Where a listener is handed over to, in an opaque form.
#[doc(hidden)]
pub struct To(pub(crate) Giver);

/// A connection that another process sent after, in an opaque form.
#[doc(hidden)]
pub struct Late(pub(crate) SavedFlow, pub(crate) Vec<OwnedFd>);

/// A listener that runs on a worker.
#[doc(hidden)]
pub trait RunningListener {
    /// New options and routes.
    fn reconfigure(&self, spec: &Arc<ListenerSpec>);
    /// The node is leaving.
    fn drain(&self);
    /// Close everything.
    fn stop(&self);
    /// Writes all out for another process.
    fn save(&self, giver: &To) -> io::Result<()>;
    /// The other process has it, or (`false`) it goes on here.
    fn settle(&self, giver: &To, left: bool);
    /// A connection that another process sent after.
    fn enter(&self, late: Late);
}

/// The launcher of a protocol.
#[must_use]
pub fn launcher<P: Protocol>() -> Box<dyn Launch> {
    Box::new(Launcher::<P>(PhantomData))
}

struct Launcher<P>(PhantomData<fn() -> P>);

impl<P: Protocol> Launch for Launcher<P> {
    fn name(&self) -> &'static str {
        P::NAME
    }

    fn start(&self, place: LaunchPlace) -> io::Result<Rc<dyn RunningListener>> {
        start::<P>(place.0)
    }
}

struct Running<P: Protocol> {
    host: Rc<Host<P>>,
    /// Between [`RunningListener::save`] and [`RunningListener::settle`]; `None`: the protocol knows
    /// no hand-over.
    bridges: RefCell<Option<Bridges>>,
}

impl<P: Protocol> RunningListener for Running<P> {
    fn reconfigure(&self, spec: &Arc<ListenerSpec>) {
        if let Some(setup) = setup_of::<P>(&spec.setup) {
            self.host.reconfigure(spec, setup);
        }
    }

    fn drain(&self) {
        self.host.drain();
    }

    fn stop(&self) {
        self.host.stop.cancel();
        self.host.unpark_all();
        self.host.kick_all();
    }

    fn save(&self, giver: &To) -> io::Result<()> {
        self.bridges.replace(self.host.save(&giver.0)?);
        Ok(())
    }

    fn settle(&self, giver: &To, left: bool) {
        match self.bridges.take() {
            _ if !left => {}
            Some(bridges) => self.host.leave(&giver.0, bridges),
            None => self.stop(),
        }
    }

    fn enter(&self, Late(flow, fds): Late) {
        let transport = flow.transport;
        // What cannot be entered is closed: its own side hears of it.
        if let Ok(one) = self.host.enter(flow, fds) {
            let _link = go_on(&self.host, one, transport);
        }
    }
}

fn setup_of<P: Protocol>(setup: &Arc<dyn Any + Send + Sync>) -> Option<Arc<Setup<P>>> {
    Arc::clone(setup).downcast::<Setup<P>>().ok()
}

fn start<P: Protocol>(place: Place) -> io::Result<Rc<dyn RunningListener>> {
    let Some(setup) = setup_of::<P>(&place.spec.setup) else {
        return Err(io::Error::other(format!(
            "listener {} was set up for another protocol",
            place.spec.name
        )));
    };
    let mut ports = Vec::new();
    let mut streams = Vec::new();
    let mut unix = Vec::new();
    for (index, socket) in place.sockets.into_iter().enumerate() {
        match socket {
            BoundSocket::Datagram(socket) => {
                ports.push(Some(Rc::new(DatagramPort::new(socket, index as u16)?)))
            }
            BoundSocket::Stream(socket, transport) => {
                ports.push(None);
                streams.push((TcpListener::from_std(socket)?, transport));
            }
            BoundSocket::Unix(socket, address) => {
                ports.push(None);
                unix.push((UnixListener::from_std(socket)?, address));
            }
        }
    }
    let stop = CancellationToken::new();
    let broken = place.broken;
    let (worker, told) = (place.worker, Rc::clone(&broken));
    let host = Host::<P>::new(worker, place.shared, place.spec, setup, ports, stop, told);
    let inherits = place.legacy.is_some();
    let mut links = Vec::new();
    if let Some(legacy) = place.legacy {
        let transports: Vec<Transport> =
            legacy.flows.iter().map(|(flow, _)| flow.transport).collect();
        let inherited = host.inherit(legacy).map_err(io::Error::other)?;
        for (one, transport) in inherited.into_iter().zip(transports) {
            links.extend(go_on(&host, one, transport));
        }
    }
    for port in host.ports.iter().flatten() {
        guard(&broken, spawn(&host, receive(Rc::clone(&host), Rc::clone(port))));
    }
    for (listener, transport) in streams {
        guard(&broken, spawn(&host, accept(Rc::clone(&host), listener, transport)));
    }
    for (listener, address) in unix {
        guard(&broken, spawn(&host, accept_unix(Rc::clone(&host), listener, address)));
    }
    guard(&broken, spawn_lasting(&host, Rc::clone(&host).keep_time()));
    guard(&broken, spawn(&host, read_mail(Rc::clone(&host))));
    guard(&broken, spawn_lasting(&host, Rc::clone(&host).take_grants()));
    guard(&broken, spawn_lasting(&host, Rc::clone(&host).write_later()));
    guard(&broken, spawn_lasting(&host, Rc::clone(&host).follow_brownout()));
    if P::LINKS == Links::Single {
        guard(&broken, spawn(&host, keep_links(Rc::clone(&host), links)));
    }
    if inherits {
        // The old process may yet go on: what the engine wants waits until tasks run.
        let host = Rc::clone(&host);
        tokio::task::spawn_local(async move { host.batch(Instant::now(), |_| ()) });
    } else {
        // The engine may want a timer before anything happens.
        host.batch(Instant::now(), |_| ());
    }
    Ok(Rc::new(Running { host, bridges: RefCell::default() }))
}

/// Starts the task of a connection that came from another process; the backend, if it is a link
/// that is kept.
fn go_on<P: Protocol>(
    host: &Rc<Host<P>>,
    one: Inherited<P>,
    transport: Transport,
) -> Option<LinkId> {
    match one {
        Inherited::Fresh(taken) => {
            // It was let in there.
            let owner = Rc::clone(host);
            serve(host, forced_place(host), async move { owner.begin(*taken, transport).await });
        }
        Inherited::Begun(begun) => serve(host, forced_place(host), async move { Some(begun) }),
        Inherited::Link(link, _) if P::LINKS == Links::Single => return Some(link),
        Inherited::Link(link, connection) => {
            let host = Rc::clone(host);
            tokio::task::spawn_local(async move {
                let _alarm = host.alarm();
                let _pause = serve_link(&host, link, &connection, 0).await;
            });
        }
    }
    None
}

/// Runs a task of the listener until the listener stops, or another process has it.
pub(crate) fn spawn<P: Protocol>(
    host: &Rc<Host<P>>,
    task: impl Future<Output = ()> + 'static,
) -> JoinHandle<()> {
    let (stop, left) = (host.stop.clone(), host.left.clone());
    tokio::task::spawn_local(async move {
        tokio::select! {
            biased;
            () = left.cancelled() => {}
            () = stop.cancelled() => {}
            () = task => {}
        }
    })
}

/// As [`spawn`], also after another process has the listener: raw flows over TLS stay.
fn spawn_lasting<P: Protocol>(
    host: &Rc<Host<P>>,
    task: impl Future<Output = ()> + 'static,
) -> JoinHandle<()> {
    let stop = host.stop.clone();
    tokio::task::spawn_local(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = task => {}
        }
    })
}

/// A task's panic would only end the task, and leave a socket that nobody reads. The worker is told
/// and starts again as a whole.
fn guard(broken: &Rc<Notify>, task: JoinHandle<()>) {
    let broken = Rc::clone(broken);
    tokio::task::spawn_local(async move {
        if task.await.is_err_and(|error| error.is_panic()) {
            broken.notify_one();
        }
    });
}

async fn receive<P: Protocol>(host: Rc<Host<P>>, port: Rc<DatagramPort>) {
    let mut batch = RecvBatch::new(BATCH);
    let mut errors = Vec::new();
    loop {
        let received = port.receive(&mut batch, &mut errors).await;
        if !errors.is_empty() {
            let socket = port.index;
            host.unreachable(&mut errors, |remote| Endpoint::Datagram { socket, remote });
        }
        let Ok(mut count) = received else {
            // An error of one datagram's past (ICMP); the next receive is a new one.
            continue;
        };
        if count == 0 {
            continue;
        }
        // Going to sleep gives the others their turn as well; to yield first would cost a look at
        // the kernel for each wake.
        let mut is_drained = false;
        for _ in 0..BATCHES_PER_TURN {
            let now = Instant::now();
            super::gather::came(now, count);
            host.batch(now, |engine| {
                for index in 0..count {
                    if let Some((remote, bytes)) = batch.datagram(index) {
                        engine.datagram(&port, remote, bytes);
                    } else {
                        engine.truncated();
                    }
                }
            });
            if count < BATCH {
                is_drained = true;
                break;
            }
            match port.try_receive(&mut batch) {
                Ok(more) => count = more,
                Err(_) => {
                    is_drained = true;
                    break;
                }
            }
        }
        if !is_drained {
            tokio::task::yield_now().await;
        }
    }
}

/// Counts what a port sent.
pub(crate) fn count_sent(metrics: &mut ListenerMetrics, sent: Sent) {
    if sent.messages > 0 {
        metrics.sent(sent.messages, sent.bytes);
    }
    for _ in 0..sent.failed {
        metrics.send_failed("kernel");
    }
    for _ in 0..sent.overflowed {
        metrics.queue_overflow();
    }
}

/// Sends a port's backlog as the kernel takes it.
pub(crate) fn drain_port<P: Protocol>(host: &Rc<Host<P>>, port: &Rc<DatagramPort>) {
    let (owner, port) = (Rc::clone(host), Rc::clone(port));
    let _detached = spawn(host, async move {
        port.drain(|sent| count_sent(&mut owner.state().metrics, sent)).await;
    });
}

async fn accept<P: Protocol>(host: Rc<Host<P>>, listener: TcpListener, transport: Transport) {
    loop {
        saturated(&host).await;
        match listener.accept().await {
            Ok((stream, _)) if is_short(&host, stream.as_fd()) => {
                super::socket::Stream::Tcp(stream).reset_on_close();
            }
            Ok((stream, remote)) => take_in(&host, stream, remote, transport),
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                host.shared.event(NodeEvent::AcceptFailed { error: error.to_string() });
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// accept(2) also reports what befell a connection before it was accepted.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}

async fn accept_unix<P: Protocol>(host: Rc<Host<P>>, listener: UnixListener, local: SocketAddr) {
    loop {
        saturated(&host).await;
        match listener.accept().await {
            Ok((stream, _)) if is_short(&host, stream.as_fd()) => {}
            Ok((stream, _)) => {
                let Some(place) = place(&host) else { continue };
                let number = host.shared.unix_clients.fetch_add(1, Ordering::Relaxed);
                let taken = super::intake::take_in_unix(stream, number, local);
                let owner = Rc::clone(&host);
                serve(&host, place, async move { owner.begin(taken, Transport::Unix).await });
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                host.shared.event(NodeEvent::AcceptFailed { error: error.to_string() });
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Waits while the engine or the node wants no further connections; the kernel's queue holds them meanwhile.
async fn saturated<P: Protocol>(host: &Rc<Host<P>>) {
    while host.is_saturated() || host.shared.core.stops_accepting() {
        tokio::time::sleep(SATURATED_PAUSE).await;
    }
}

/// Whether it is one of the last descriptors: those are for what is there already.
fn is_short<P: Protocol>(host: &Rc<Host<P>>, fd: BorrowedFd<'_>) -> bool {
    let short = super::descriptors::is_one_of_the_last(fd);
    if short {
        host.state().metrics.connection_rejected();
        host.count("descriptors_short");
    }
    short
}

/// A place among the listener's connections, if there is one.
fn place<P: Protocol>(host: &Rc<Host<P>>) -> Option<Taken> {
    let limit = host.state().spec.limits.connections;
    if host.shared.connections.fetch_add(1, Ordering::Relaxed) >= limit {
        host.shared.connections.fetch_sub(1, Ordering::Relaxed);
        host.state().metrics.connection_rejected();
        return None;
    }
    Some(Taken(Arc::clone(&host.shared)))
}

/// A place for a connection that is there already.
fn forced_place<P: Protocol>(host: &Rc<Host<P>>) -> Taken {
    host.shared.connections.fetch_add(1, Ordering::Relaxed);
    Taken(Arc::clone(&host.shared))
}

fn take_in<P: Protocol>(
    host: &Rc<Host<P>>,
    stream: TcpStream,
    remote: SocketAddr,
    transport: Transport,
) {
    let Some(place) = place(host) else { return };
    let owner = Rc::clone(host);
    serve(host, place, async move {
        let taken = super::intake::take_in(&owner, stream, remote, transport).await?;
        owner.begin(taken, transport).await
    });
}

/// Goes on with a connection that was parked.
pub(crate) fn resume<P: Protocol>(host: &Rc<Host<P>>, begun: Begun<P>, place: Taken) {
    let host = Rc::clone(host);
    tokio::task::spawn_local(async move {
        let _alarm = host.alarm();
        host.serve(Box::new(begun), place).await;
    });
}

/// Serves a connection in a task of its own. All that comes before it is idle is in a box that goes
/// when it is: a handshake's memory must not stay with the connection.
fn serve<P: Protocol>(
    host: &Rc<Host<P>>,
    place: Taken,
    begin: impl Future<Output = Option<Begun<P>>> + 'static,
) {
    let host = Rc::clone(host);
    let begin = Box::pin(async move { begin.await.map(Box::new) });
    tokio::task::spawn_local(async move {
        let _alarm = host.alarm();
        if let Some(begun) = begin.await {
            host.serve(begun, place).await;
        }
    });
}

/// A place among the listener's connections; given back however the task ends.
pub(crate) struct Taken(Arc<Shared>);

impl Drop for Taken {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn read_mail<P: Protocol>(host: Rc<Host<P>>) {
    let shared = Arc::clone(&host.shared);
    let mailbox = &shared.mailboxes[usize::from(host.worker.0)];
    let mut letters = Letters::default();
    loop {
        mailbox.take(&mut letters).await;
        host.letters(&letters);
        tokio::task::yield_now().await;
    }
}
