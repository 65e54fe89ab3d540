//! A listener on one worker: its engine, and everything that the engine's wishes touch.
//!
//! All of it lives on the worker's thread. Tasks (sockets, connections, timer, mailbox) come here
//! with what happened; the engine is called, and its outbox is carried out before the call returns.
//! Nothing here waits: what must wait is done by a task of its own.

use std::cell::{Cell, RefCell, RefMut};
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use strowger_contract::{
    BackendId, CloseCause, Closing, Command, Context, Endpoint, Engine, FlowId, Frame, FrameError,
    Message, Outbox, PeerChange, Protocol, Router, Transport, WorkerId,
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::datagram::DatagramPort;
use super::link::LinkTable;
use super::mailbox::{Letters, Mail};
use super::shared::{NodeEvent, Shared};
use super::stream::{Connection, serve};
use crate::observe::{Direction, ListenerMetrics, TapPort};
use crate::routing::{CoreRouter, Grant, ListenerSpec, Setup};

/// What a stream is read into before it is cut: one per listener and worker.
const SCRATCH_BYTES: usize = 64 << 10;

/// Rounds of "the engine wants something, which tells the engine something" in one settling. An
/// engine that answers every closed link by a send to a closed link would go round for ever.
const SETTLE_ROUNDS_MAX: usize = 100_000;

/// How many times [`crate::routing::ListenerLimits::queued_bytes`] may wait for one peer before it
/// is cut off.
const CUT_OFF_FACTOR: usize = 4;

/// A listener on one worker.
pub(crate) struct Host<P: Protocol> {
    pub(crate) worker: WorkerId,
    pub(crate) shared: Arc<Shared>,
    pub(crate) ports: Vec<Option<Rc<DatagramPort>>>,
    pub(crate) scratch: RefCell<Vec<u8>>,
    pub(crate) stop: CancellationToken,
    cell: RefCell<State<P>>,
    timer: Notify,
    /// Told by any worker when a waiting request of this one's was settled.
    granted: Arc<Notify>,
    armed: Cell<Option<Instant>>,
    queued_bytes_max: Cell<usize>,
}

/// What the engine and its wishes touch.
pub(crate) struct State<P: Protocol> {
    pub(crate) engine: P::Engine,
    pub(crate) router: CoreRouter,
    pub(crate) metrics: ListenerMetrics,
    tap: TapPort,
    pub(crate) links: LinkTable,
    pub(crate) spec: Arc<ListenerSpec>,
    setup: Arc<Setup<P>>,
    out: Outbox,
    flows: Flows,
    /// Streams by the other side's address, for [`Endpoint::Remote`].
    remotes: HashMap<(Transport, SocketAddr), Rc<Connection>>,
    dialing: HashMap<(Transport, SocketAddr), Vec<u8>>,
    /// What the engine is yet to hear.
    news: VecDeque<(Endpoint, PeerChange)>,
    dirty: Vec<Rc<Connection>>,
    dials: Vec<Dial>,
    grants: Vec<Grant>,
    restarts: u64,
}

/// A connection that a task is to open.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Dial {
    /// To a backend.
    Backend(BackendId),
    /// To somebody else.
    Remote(Transport, SocketAddr),
}

/// The flows of one worker, by slot.
#[derive(Default)]
struct Flows {
    slots: Vec<(u32, Option<Rc<Connection>>)>,
    free: Vec<u32>,
}

impl Flows {
    fn reserve(&mut self, worker: WorkerId) -> FlowId {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push((0, None));
            (self.slots.len() - 1) as u32
        });
        let entry = &mut self.slots[slot as usize];
        entry.0 = entry.0.wrapping_add(1);
        FlowId::new(worker, entry.0, slot)
    }

    fn set(&mut self, flow: FlowId, connection: Rc<Connection>) {
        self.slots[flow.slot() as usize].1 = Some(connection);
    }

    fn get(&self, flow: FlowId) -> Option<&Rc<Connection>> {
        let (generation, connection) = self.slots.get(flow.slot() as usize)?;
        (generation & 0x00ff_ffff == flow.generation()).then_some(connection.as_ref()).flatten()
    }

    fn remove(&mut self, flow: FlowId) -> bool {
        if self.get(flow).is_none() {
            return false;
        }
        self.slots[flow.slot() as usize].1 = None;
        self.free.push(flow.slot());
        true
    }

    fn all(&self) -> impl Iterator<Item = &Rc<Connection>> {
        self.slots.iter().filter_map(|(_, connection)| connection.as_ref())
    }
}

impl<P: Protocol> Host<P> {
    /// Makes the engine and everything around it; tasks are started by `launch`.
    pub(crate) fn new(
        worker: WorkerId,
        shared: Arc<Shared>,
        spec: Arc<ListenerSpec>,
        setup: Arc<Setup<P>>,
        ports: Vec<Option<Rc<DatagramPort>>>,
        stop: CancellationToken,
    ) -> Rc<Self> {
        let engine = P::engine(&context(worker, &shared, &setup, 0));
        let state = State {
            engine,
            router: shared.core.router(worker),
            metrics: shared.metrics.listener(&shared.name, P::NAME, worker),
            tap: TapPort::new(&shared.sinks.tap, P::NAME, &shared.name),
            links: LinkTable::default(),
            setup,
            out: Outbox::new(),
            flows: Flows::default(),
            remotes: HashMap::new(),
            dialing: HashMap::new(),
            news: VecDeque::new(),
            dirty: Vec::new(),
            dials: Vec::new(),
            grants: Vec::new(),
            restarts: 0,
            spec: Arc::clone(&spec),
        };
        let granted = Arc::new(Notify::new());
        let told = Arc::clone(&granted);
        state.router.set_waker(Arc::new(move || told.notify_one()));
        Rc::new(Self {
            worker,
            shared,
            ports,
            scratch: RefCell::new(vec![0; SCRATCH_BYTES]),
            stop,
            cell: RefCell::new(state),
            timer: Notify::new(),
            granted,
            armed: Cell::new(None),
            queued_bytes_max: Cell::new(spec.limits.queued_bytes),
        })
    }

    /// Above so many waiting bytes a peer is read from no more.
    pub(crate) fn queued_bytes_max(&self) -> usize {
        self.queued_bytes_max.get()
    }

    /// The state, for what needs no engine call.
    pub(crate) fn state(&self) -> RefMut<'_, State<P>> {
        self.cell.borrow_mut()
    }

    /// Ends when the listener is to stop.
    pub(crate) async fn stopped(&self) {
        self.stop.cancelled().await;
    }

    /// Opens a batch: the engine is called any number of times, then its wishes are carried out.
    pub(crate) fn batch<R>(
        self: &Rc<Self>,
        now: Instant,
        work: impl FnOnce(&mut Batch<'_, P>) -> R,
    ) -> R {
        let mut state = self.cell.borrow_mut();
        state.router.refresh();
        let mut batch = Batch { host: self, state: &mut state, now };
        let result = work(&mut batch);
        batch.settle();
        self.rearm(&state);
        let dials = std::mem::take(&mut state.dials);
        self.shared.in_progress[usize::from(self.worker.0)]
            .store(state.engine.in_progress(), Ordering::Relaxed);
        drop(state);
        for dial in dials {
            super::link::dial(self, dial);
        }
        result
    }

    /// Tells the engine of a change, and the worker's other parts of its wishes.
    pub(crate) fn tell(self: &Rc<Self>, peer: Endpoint, change: PeerChange) {
        self.batch(Instant::now(), |batch| batch.tell(peer, change));
    }

    /// Writes a connection's queue outside of a batch.
    pub(crate) fn write(&self, connection: &Rc<Connection>) {
        let mut state = self.cell.borrow_mut();
        self.write_in(&mut state, connection);
    }

    fn write_in(&self, state: &mut State<P>, connection: &Rc<Connection>) {
        let progress = connection.write();
        if progress.written > 0 {
            state.metrics.sent(0, progress.written as u64);
        }
        if let Endpoint::Backend(backend) = connection.endpoint {
            let limit = self.queued_bytes_max.get();
            let congested = connection.congested.get();
            if !congested && progress.queued > limit || congested && progress.queued < limit / 2 {
                connection.congested.set(!congested);
                self.shared.core.set_congested(backend, !congested);
            }
        }
    }

    /// Takes an accepted connection in and serves it until it ends.
    pub(crate) async fn accept(
        self: Rc<Self>,
        stream: tokio::net::TcpStream,
        remote: SocketAddr,
        transport: Transport,
    ) {
        let Ok(local) = stream.local_addr() else { return };
        let (flow, connection) = self.adopt(stream, remote, local, transport);
        self.tell(Endpoint::Client(flow), PeerChange::Opened { remote, local, transport });
        let cause = if P::LINKS == strowger_contract::Links::None {
            super::splice::serve(&self, flow, &connection).await
        } else {
            let idle = self.state().spec.limits.idle;
            serve(&self, &connection, idle).await
        };
        self.release(flow, &connection, cause);
    }

    /// Enters a stream into the flows.
    pub(crate) fn adopt(
        &self,
        stream: tokio::net::TcpStream,
        remote: SocketAddr,
        local: SocketAddr,
        transport: Transport,
    ) -> (FlowId, Rc<Connection>) {
        let mut state = self.cell.borrow_mut();
        let flow = state.flows.reserve(self.worker);
        let connection = Connection::new(stream, Endpoint::Client(flow), remote, local, transport);
        state.flows.set(flow, Rc::clone(&connection));
        state.remotes.insert((transport, remote), Rc::clone(&connection));
        state.metrics.connection_opened();
        (flow, connection)
    }

    /// Takes a flow out and tells the engine.
    pub(crate) fn release(
        self: &Rc<Self>,
        flow: FlowId,
        connection: &Rc<Connection>,
        cause: CloseCause,
    ) {
        {
            let mut state = self.cell.borrow_mut();
            state.flows.remove(flow);
            let key = (connection.transport, connection.remote);
            if state.remotes.get(&key).is_some_and(|known| Rc::ptr_eq(known, connection)) {
                state.remotes.remove(&key);
            }
            state.metrics.connection_closed(cause);
        }
        self.tell(Endpoint::Client(flow), PeerChange::Closed(cause));
    }

    /// A dialed remote is open: what waited for it goes out.
    pub(crate) fn dialed(&self, connection: &Rc<Connection>) {
        let mut state = self.cell.borrow_mut();
        if let Some(waiting) = state.dialing.remove(&(connection.transport, connection.remote)) {
            connection.push(&waiting, CUT_OFF_FACTOR * self.queued_bytes_max.get());
            self.write_in(&mut state, connection);
        }
    }

    /// A remote could not be dialed.
    pub(crate) fn not_dialed(
        self: &Rc<Self>,
        transport: Transport,
        address: SocketAddr,
        cause: CloseCause,
    ) {
        self.cell.borrow_mut().dialing.remove(&(transport, address));
        self.tell(Endpoint::Remote { transport, address }, PeerChange::Closed(cause));
    }

    /// A stream can no longer be cut.
    pub(crate) fn lost_framing(&self, connection: &Rc<Connection>, error: &FrameError) {
        connection.close(Closing::Flushed, CloseCause::Framing);
        self.shared
            .event(NodeEvent::Framing { remote: connection.remote, detail: error.to_string() });
    }

    /// Works through what other workers sent.
    pub(crate) fn letters(self: &Rc<Self>, letters: &Letters) {
        self.batch(Instant::now(), |batch| {
            for mail in &letters.mail {
                batch.mail(mail, &letters.bytes);
            }
        });
    }

    /// New options and routes; what is under way goes on.
    pub(crate) fn reconfigure(self: &Rc<Self>, spec: &Arc<ListenerSpec>, setup: Arc<Setup<P>>) {
        self.queued_bytes_max.set(spec.limits.queued_bytes);
        self.batch(Instant::now(), |batch| {
            batch.state.spec = Arc::clone(spec);
            batch.state.setup = setup;
            let setup = Arc::clone(&batch.state.setup);
            let context =
                context(batch.host.worker, &batch.host.shared, &setup, batch.state.restarts);
            batch.guard(|state, _, _| P::reconfigure(&mut state.engine, &context));
        });
    }

    /// The node is leaving.
    pub(crate) fn drain(self: &Rc<Self>) {
        self.batch(Instant::now(), |batch| {
            batch.guard(|state, now, out| state.engine.on_drain(now, &mut state.router, out));
        });
    }

    /// Calls the engine whenever it wants to be called. Never ends.
    pub(crate) async fn keep_time(self: Rc<Self>) {
        loop {
            match self.armed.get() {
                None => self.timer.notified().await,
                Some(at) => {
                    tokio::select! {
                        () = self.timer.notified() => continue,
                        () = tokio::time::sleep_until(at.into()) => {}
                    }
                    self.armed.set(None);
                    self.batch(Instant::now(), |batch| {
                        batch.guard(|state, now, out| {
                            state.engine.on_timeout(now, &mut state.router, out)
                        });
                    });
                }
            }
        }
    }

    /// Passes on what became of waiting requests when another worker settled them. Never ends.
    pub(crate) async fn take_grants(self: Rc<Self>) {
        loop {
            self.granted.notified().await;
            self.batch(Instant::now(), |_| ());
        }
    }

    fn rearm(&self, state: &State<P>) {
        let wanted = [state.engine.next_timeout(), state.router.next_timeout()];
        let Some(next) = wanted.into_iter().flatten().min() else { return };
        // A timer that is armed too early costs one wake; only a later one must be moved.
        if self.armed.get().is_none_or(|armed| next < armed) {
            self.armed.set(Some(next));
            self.timer.notify_one();
        }
    }

    /// Closes everything; the listener or the worker's engine goes away.
    fn close_all(state: &State<P>, cause: CloseCause) {
        for connection in state.flows.all() {
            connection.close(Closing::Flushed, cause);
        }
        for connection in state.links.connections() {
            connection.close(Closing::Flushed, cause);
        }
    }
}

fn context<'a, P: Protocol>(
    worker: WorkerId,
    shared: &'a Shared,
    setup: &'a Setup<P>,
    restarts: u64,
) -> Context<'a, P> {
    // A restarted engine must not repeat its predecessor's branches and identifiers.
    let seed =
        shared.seed ^ restarts.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(worker.0) << 48;
    Context {
        worker,
        workers: shared.workers,
        seed,
        started: shared.started,
        scope: &setup.scope,
        options: &setup.options,
    }
}

/// Engine calls whose wishes are carried out together.
pub(crate) struct Batch<'a, P: Protocol> {
    host: &'a Rc<Host<P>>,
    state: &'a mut State<P>,
    now: Instant,
}

impl<P: Protocol> Batch<'_, P> {
    /// A message that came over a connection.
    pub(crate) fn message(&mut self, connection: &Connection, bytes: &[u8]) {
        let message = Message {
            from: connection.endpoint,
            transport: connection.transport,
            remote: connection.remote,
            local: connection.local,
            arrived: self.now,
            bytes,
        };
        self.receive(message);
    }

    /// A datagram.
    pub(crate) fn datagram(&mut self, port: &DatagramPort, remote: SocketAddr, bytes: &[u8]) {
        let from = Endpoint::Datagram { socket: port.index, remote };
        let message = Message {
            from,
            transport: Transport::Udp,
            remote,
            local: port.local,
            arrived: self.now,
            bytes,
        };
        self.receive(message);
    }

    fn receive(&mut self, message: Message<'_>) {
        self.state.metrics.received(1, message.bytes.len() as u64);
        let Message { transport, remote, local, bytes, .. } = message;
        self.state.tap.see(self.now, Direction::In, transport, remote, local, bytes);
        self.guard(|state, now, out| state.engine.on_message(now, message, &mut state.router, out));
    }

    /// A datagram that was cut short or came from nowhere.
    pub(crate) fn truncated(&mut self) {
        self.state.metrics.truncated();
    }

    /// A keep-alive's answer.
    pub(crate) fn answer(&mut self, connection: &Rc<Connection>, bytes: &[u8]) {
        self.push(connection, bytes);
    }

    /// A change of a peer.
    pub(crate) fn tell(&mut self, peer: Endpoint, change: PeerChange) {
        self.guard(|state, now, out| {
            state.engine.on_peer(now, peer, change, &mut state.router, out)
        });
    }

    fn mail(&mut self, mail: &Mail, arena: &[u8]) {
        match mail {
            Mail::Message { from, transport, remote, local, arrived, bytes } => {
                let message = Message {
                    from: *from,
                    transport: *transport,
                    remote: *remote,
                    local: *local,
                    arrived: *arrived,
                    bytes: &arena[bytes.clone()],
                };
                self.guard(|state, now, out| {
                    state.engine.on_message(now, message, &mut state.router, out)
                });
            }
            Mail::Send { to, sender, bytes, .. } => {
                self.deliver(*to, &arena[bytes.clone()], *sender)
            }
            Mail::Peer(peer, change) => self.tell(*peer, *change),
            Mail::Close(peer, how) => self.close(*peer, *how),
        }
    }

    /// Calls the engine so that its panic costs the engine and not the worker.
    fn guard(&mut self, call: impl FnOnce(&mut State<P>, Instant, &mut Outbox)) {
        let mut out = std::mem::take(&mut self.state.out);
        let result = catch_unwind(AssertUnwindSafe(|| call(self.state, self.now, &mut out)));
        self.state.out = out;
        if result.is_err() {
            self.replace_engine();
        }
    }

    /// The engine panicked: its state cannot be trusted. A new one takes its place, and everything
    /// that the old one held is closed.
    fn replace_engine(&mut self) {
        let state = &mut *self.state;
        state.restarts += 1;
        state.engine =
            P::engine(&context(self.host.worker, &self.host.shared, &state.setup, state.restarts));
        state.router.abandon_all(self.now);
        state.out.clear();
        state.news.clear();
        state.metrics.engine_panicked();
        Host::close_all(state, CloseCause::Shutdown);
        self.host.shared.event(NodeEvent::EnginePanicked { worker: self.host.worker });
    }

    /// Carries out what the engine wants, and what follows from that, until it wants no more.
    pub(crate) fn settle(&mut self) {
        for _ in 0..SETTLE_ROUNDS_MAX {
            if !self.state.out.is_empty() {
                let mut out = std::mem::take(&mut self.state.out);
                self.carry_out(&out);
                out.clear();
                self.state.out = out;
            }
            let Some((peer, change)) = self.state.news.pop_front() else {
                if self.take_grants() {
                    continue;
                }
                // What another worker sent for a connection of ours came without an engine's wish.
                return self.write_streams();
            };
            self.tell(peer, change);
        }
        self.state.news.clear();
        self.state.out.clear();
        self.host.shared.event(NodeEvent::EngineSpins { worker: self.host.worker });
    }

    /// Tells the engine what became of requests that wait; whether there was anything.
    fn take_grants(&mut self) -> bool {
        let mut grants = std::mem::take(&mut self.state.grants);
        self.state.router.grants(self.now, &mut grants);
        let any = !grants.is_empty();
        for grant in grants.drain(..) {
            self.guard(|state, now, out| match grant {
                Grant::Go(ticket, route) => {
                    state.engine.on_granted(now, ticket, route, &mut state.router, out);
                }
                Grant::Refuse(ticket, refusal) => {
                    state.engine.on_refused(now, ticket, refusal, &mut state.router, out);
                }
            });
        }
        self.state.grants = grants;
        any
    }

    fn carry_out(&mut self, out: &Outbox) {
        let view = self.host.shared.names(&self.state.router);
        for note in out.notes() {
            self.state.metrics.note(note, &view);
            self.host.shared.log(note, &view);
        }
        drop(view);
        for command in out.commands() {
            self.command(command, out);
        }
        self.flush(out);
    }

    fn command(&mut self, command: &Command, out: &Outbox) {
        match command {
            Command::Send(frame) => self.send(frame, out),
            Command::HandOver { to, from, transport, remote, local, arrived, bytes } => {
                let (from, transport, remote, local, arrived) =
                    (*from, *transport, *remote, *local, *arrived);
                self.post(*to, out.bytes(bytes), |bytes| Mail::Message {
                    from,
                    transport,
                    remote,
                    local,
                    arrived,
                    bytes,
                });
            }
            Command::Close(peer, how) => self.close(*peer, *how),
            Command::HoldOff(Endpoint::Backend(backend), lasting) => {
                self.state.links.hold_off(*backend, self.now + *lasting);
            }
            Command::HoldOff(..) => {}
            Command::Splice(flow, backend, limits) => {
                if let Some(connection) = self.state.flows.get(*flow) {
                    connection.splice_to(*backend, *limits);
                }
            }
        }
    }

    fn send(&mut self, frame: &Frame, out: &Outbox) {
        match frame.to {
            Endpoint::Datagram { socket, remote } => {
                match self.host.ports.get(usize::from(socket)).and_then(Option::as_ref) {
                    Some(port) => {
                        self.state.tap.see(
                            self.now,
                            Direction::Out,
                            Transport::Udp,
                            port.local,
                            remote,
                            out.bytes(&frame.bytes),
                        );
                        port.want(remote, frame.bytes.clone());
                    }
                    None => self.state.metrics.send_failed("no_socket"),
                }
            }
            Endpoint::Client(flow) if flow.worker() != self.host.worker => {
                self.send_afar(flow.worker(), frame, out)
            }
            Endpoint::Backend(backend)
                if self.host.shared.owner(P::LINKS, backend, self.host.worker)
                    != self.host.worker =>
            {
                let owner = self.host.shared.owner(P::LINKS, backend, self.host.worker);
                self.send_afar(owner, frame, out);
            }
            to => self.deliver(to, out.bytes(&frame.bytes), self.host.worker),
        }
    }

    fn send_afar(&mut self, to: WorkerId, frame: &Frame, out: &Outbox) {
        let (sender, endpoint) = (self.host.worker, frame.to);
        self.post(to, out.bytes(&frame.bytes), |bytes| Mail::Send { to: endpoint, sender, bytes });
    }

    fn post(
        &mut self,
        to: WorkerId,
        bytes: &[u8],
        mail: impl FnOnce(std::ops::Range<usize>) -> Mail,
    ) {
        let taken = self
            .host
            .shared
            .mailboxes
            .get(usize::from(to.0))
            .is_some_and(|mailbox| mailbox.put(bytes, mail));
        if taken {
            self.state.metrics.handed_over(1);
        } else {
            self.state.metrics.hand_over_dropped(1);
        }
    }

    /// Gives bytes to a stream that this worker owns (or opens).
    fn deliver(&mut self, to: Endpoint, bytes: &[u8], sender: WorkerId) {
        match to {
            Endpoint::Client(flow) => match self.state.flows.get(flow).cloned() {
                Some(connection) => self.push(&connection, bytes),
                None => self.state.metrics.send_failed("flow_gone"),
            },
            Endpoint::Backend(backend) => self.deliver_to_backend(backend, bytes, sender),
            Endpoint::Remote { transport, address } => {
                self.deliver_to_remote(transport, address, bytes)
            }
            Endpoint::Datagram { .. } => self.state.metrics.send_failed("not_a_stream"),
        }
    }

    fn deliver_to_backend(&mut self, backend: BackendId, bytes: &[u8], sender: WorkerId) {
        use super::link::Offer;
        let limit = CUT_OFF_FACTOR * self.host.queued_bytes_max.get();
        match self.state.links.offer(backend, bytes, limit, P::LINKS, self.now) {
            Offer::Open(connection) => self.push(&connection, bytes),
            Offer::Waits => self.see_waiting(backend, bytes),
            Offer::Dial => {
                self.see_waiting(backend, bytes);
                self.state.dials.push(Dial::Backend(backend));
            }
            Offer::Down(cause) => {
                self.state.metrics.send_failed("link_down");
                let news = (Endpoint::Backend(backend), PeerChange::Closed(cause));
                if sender == self.host.worker {
                    self.state.news.push_back(news);
                } else {
                    self.post(sender, &[], |_| Mail::Peer(news.0, news.1));
                }
            }
        }
    }

    /// Shows the tap what waits for a link: our end has no address yet.
    fn see_waiting(&self, backend: BackendId, bytes: &[u8]) {
        if let Some(view) = self.state.router.backend(backend) {
            self.see_dialing(view.transport, view.address, bytes);
        }
    }

    fn see_dialing(&self, transport: Transport, to: SocketAddr, bytes: &[u8]) {
        let any: std::net::IpAddr = match to {
            SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
        };
        let from = SocketAddr::new(any, 0);
        self.state.tap.see(self.now, Direction::Out, transport, from, to, bytes);
    }

    fn deliver_to_remote(&mut self, transport: Transport, address: SocketAddr, bytes: &[u8]) {
        let key = (transport, address);
        if let Some(connection) =
            self.state.remotes.get(&key).filter(|known| !known.is_closing()).cloned()
        {
            return self.push(&connection, bytes);
        }
        self.see_dialing(transport, address, bytes);
        let limit = self.host.queued_bytes_max.get();
        if let Some(waiting) = self.state.dialing.get_mut(&key) {
            if waiting.len() + bytes.len() <= limit {
                waiting.extend_from_slice(bytes);
            } else {
                self.state.metrics.queue_overflow();
            }
            return;
        }
        self.state.dialing.insert(key, bytes.to_vec());
        self.state.dials.push(Dial::Remote(transport, address));
    }

    fn push(&mut self, connection: &Rc<Connection>, bytes: &[u8]) {
        if !connection.push(bytes, CUT_OFF_FACTOR * self.host.queued_bytes_max.get()) {
            self.state.metrics.queue_overflow();
            return;
        }
        let Connection { local, remote, transport, .. } = **connection;
        self.state.tap.see(self.now, Direction::Out, transport, local, remote, bytes);
        self.state.metrics.sent(1, 0);
        if !connection.dirty.replace(true) {
            self.state.dirty.push(Rc::clone(connection));
        }
    }

    fn close(&mut self, peer: Endpoint, how: Closing) {
        let connection = match peer {
            Endpoint::Client(flow) if flow.worker() != self.host.worker => {
                return self.post(flow.worker(), &[], |_| Mail::Close(peer, how));
            }
            Endpoint::Client(flow) => self.state.flows.get(flow).cloned(),
            Endpoint::Backend(backend) => {
                let owner = self.host.shared.owner(P::LINKS, backend, self.host.worker);
                if owner != self.host.worker {
                    return self.post(owner, &[], |_| Mail::Close(peer, how));
                }
                self.state.links.open(backend)
            }
            Endpoint::Remote { transport, address } => {
                self.state.remotes.get(&(transport, address)).cloned()
            }
            Endpoint::Datagram { .. } => None,
        };
        if let Some(connection) = connection {
            connection.close(how, CloseCause::Local);
        }
    }

    /// One write per connection and one batch per socket, whatever the engine wanted of them.
    fn flush(&mut self, out: &Outbox) {
        self.write_streams();
        for port in self.host.ports.iter().flatten() {
            let waited = port.is_waiting();
            let sent = port.flush(out);
            super::launch::count_sent(&mut self.state.metrics, sent);
            if !waited && port.is_waiting() {
                super::launch::drain_port(self.host, port);
            }
        }
    }

    fn write_streams(&mut self) {
        while let Some(connection) = self.state.dirty.pop() {
            self.host.write_in(self.state, &connection);
        }
    }
}
