//! A listener on one worker: its engine, and everything that the engine's wishes touch.
//!
//! All of it lives on the worker's thread. Tasks (sockets, connections, timer, mailbox) come here
//! with what happened; the engine is called, and its outbox is carried out before the call returns.
//! Nothing here waits: what must wait is done by a task of its own.

mod batch;
mod flows;
mod handover;
mod outward;
mod parking;
mod writing;

use std::cell::{Cell, RefCell, RefMut};
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use strowger_contract::{
    CloseCause, Closing, Context, Endpoint, Engine, FlowId, FrameError, Framer, Framing, Intake,
    LookupId, Note, Opened, Outbox, PeerChange, Protocol, Transport, WorkerId,
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::runtime::datagram::DatagramPort;
use crate::runtime::handover::Giver;
use crate::runtime::intake::TakenIn;
use crate::runtime::launch::Taken;
use crate::runtime::link::{LinkId, LinkTable};
use crate::runtime::mailbox::Letters;
use crate::runtime::resolve::Answer;
use crate::runtime::shared::{NodeEvent, Shared, SourcePlace};
use crate::runtime::socket::Stream;
use crate::runtime::splice::{Ran, Relay};
use crate::runtime::stream::{Connection, serve};
use crate::runtime::sys::SendError;
use crate::runtime::way::Pipes;
pub(crate) use batch::Batch;
use flows::Flows;
pub(crate) use handover::{Bridges, Inherited};
use outward::Outwards;
use parking::Lot;
pub(crate) use parking::SWEEP_EVERY;

use crate::observe::{ListenerMetrics, TapPort};
use crate::routing::{CoreRouter, Grant, ListenerSpec, Setup};

/// What a stream is read into before it is cut: one per listener and worker.
const SCRATCH_BYTES: usize = 64 << 10;

/// How many times [`crate::routing::ListenerLimits::queued_bytes`] may wait for one peer before it
/// is cut off.
const CUT_OFF_FACTOR: usize = 4;

/// When a new engine is called whose predecessor panicked when it was asked for its time.
const AFTER_A_PANIC: std::time::Duration = std::time::Duration::from_millis(100);

/// A listener on one worker.
pub(crate) struct Host<P: Protocol> {
    pub(crate) worker: WorkerId,
    pub(crate) shared: Arc<Shared>,
    pub(crate) ports: Vec<Option<Rc<DatagramPort>>>,
    pub(crate) scratch: RefCell<Vec<u8>>,
    pub(crate) stop: CancellationToken,
    /// Another process has the listener: nothing more is accepted, received or timed here.
    pub(crate) left: CancellationToken,
    /// Where connections go that were still on their way in then.
    late: RefCell<Option<Giver>>,
    broken: Rc<Notify>,
    cell: RefCell<State<P>>,
    /// Raw flows that are idle.
    lot: RefCell<Lot>,
    pub(crate) pipes: RefCell<Pipes>,
    timer: Notify,
    /// Streams have something to write.
    written: Notify,
    /// Told by any worker when a waiting request of this one's was settled.
    granted: Arc<Notify>,
    armed: Cell<Option<Instant>>,
    queued_bytes_max: Cell<usize>,
}

/// Held by a connection's task: a panic there, outside of the engine, would only end the task and
/// leave its connection to nobody. The worker is told and starts again as a whole.
pub(crate) struct Alarm(Rc<Notify>);

impl Drop for Alarm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.notify_one();
        }
    }
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
    /// Datagram sockets of the engine's own.
    outwards: Outwards,
    /// What the engine is yet to hear.
    news: VecDeque<(Endpoint, PeerChange)>,
    answers: VecDeque<(LookupId, Answer)>,
    /// Streams that have something to write, and whether [`Host::write_later`] was told.
    dirty: Vec<Rc<Connection>>,
    write_is_due: bool,
    dials: Vec<Dial>,
    /// Idle flows that the engine wants closed.
    unparked: Vec<(u32, Closing)>,
    grants: Vec<Grant>,
    restarts: u64,
    /// Another process has the engine's state: this one is not called any more.
    muted: bool,
}

/// A client's connection that was entered.
pub(crate) struct Begun<P: Protocol> {
    flow: FlowId,
    connection: Rc<Connection>,
    next: Next<P>,
    /// Among the connections from its address; given back at its end.
    source: SourcePlace,
}

enum Next<P: Protocol> {
    /// It is joined; its bytes pass.
    Relay(Rc<RefCell<Relay<P>>>),
    /// It is cut into messages; what was read already.
    Cut(Vec<u8>),
}

/// A connection that a task is to open.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Dial {
    /// A link to a backend.
    Link(LinkId),
    /// To somebody else.
    Remote(Transport, SocketAddr),
}

impl<P: Protocol> State<P> {
    /// What is done with a connection before the engine hears of it.
    pub(crate) fn intake(&self) -> Intake {
        P::intake(&self.setup.scope, &self.setup.options)
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
        broken: Rc<Notify>,
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
            outwards: Outwards::default(),
            news: VecDeque::new(),
            answers: VecDeque::new(),
            dirty: Vec::new(),
            write_is_due: false,
            dials: Vec::new(),
            unparked: Vec::new(),
            grants: Vec::new(),
            restarts: 0,
            muted: false,
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
            left: CancellationToken::new(),
            late: RefCell::default(),
            broken,
            cell: RefCell::new(state),
            lot: RefCell::default(),
            pipes: RefCell::default(),
            timer: Notify::new(),
            written: Notify::new(),
            granted,
            armed: Cell::new(None),
            queued_bytes_max: Cell::new(spec.limits.queued_bytes),
        })
    }

    /// For a task that nobody waits for.
    pub(crate) fn alarm(&self) -> Alarm {
        Alarm(Rc::clone(&self.broken))
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
        let again = now + AFTER_A_PANIC;
        let next = batch.ask(Some(again), P::Engine::next_timeout);
        let in_progress = batch.ask(0, P::Engine::in_progress);
        self.rearm(&state, next);
        let dials = std::mem::take(&mut state.dials);
        let unparked = std::mem::take(&mut state.unparked);
        self.shared.in_progress[usize::from(self.worker.0)]
            .store(if state.muted { 0 } else { in_progress }, Ordering::Relaxed);
        drop(state);
        for dial in dials {
            crate::runtime::link::dial(self, dial);
        }
        for (place, how) in unparked {
            if let Some(connection) = self.unpark(place) {
                connection.close(how, CloseCause::Local);
            }
        }
        result
    }

    /// Tells the engine of a change, and the worker's other parts of its wishes.
    pub(crate) fn tell(self: &Rc<Self>, peer: Endpoint, change: PeerChange) {
        self.batch(Instant::now(), |batch| batch.tell(peer, change));
    }

    /// Tells the engines of what ICMP said of datagrams that they sent: at once, where a transaction's
    /// timer would take seconds. Of the workers' sockets on one port the kernel picks one by the
    /// addresses, not the one that has sent; an engine's own sockets are its own.
    pub(crate) fn unreachable(
        self: &Rc<Self>,
        errors: &mut Vec<SendError>,
        peer: impl Fn(SocketAddr) -> Endpoint,
    ) {
        let cause = |errno| match errno {
            libc::ECONNREFUSED => Some(("icmp_refused", CloseCause::Refused)),
            libc::EHOSTUNREACH | libc::ENETUNREACH | libc::EHOSTDOWN | libc::EACCES => {
                Some(("icmp_unreachable", CloseCause::Unreachable))
            }
            // EMSGSIZE: the kernel has learned the path's size; the sender repeats.
            _ => None,
        };
        // One datagram that is refused ten times over is told once.
        errors.sort_by_key(|error| (error.remote, error.errno));
        errors.dedup();
        self.batch(Instant::now(), |batch| {
            for SendError { remote, errno } in errors.drain(..) {
                let Some((word, cause)) = cause(errno) else { continue };
                batch.count(word);
                let change = PeerChange::Closed(cause);
                match peer(remote) {
                    own @ Endpoint::Outward(_) => batch.tell(own, change),
                    any => batch.tell_all(any, change),
                }
            }
        });
    }

    /// Counts something that has a name.
    pub(crate) fn count(&self, word: &'static str) {
        let mut state = self.cell.borrow_mut();
        let names = self.shared.names(&state.router);
        state.metrics.note(&Note::Count(word), &names);
    }

    /// Tells the engine of a connection that opened.
    pub(crate) fn opened(self: &Rc<Self>, peer: Endpoint, opened: Opened<'_>) {
        self.batch(Instant::now(), |batch| batch.opened(peer, opened));
    }

    /// Enters a client's connection, and joins it to a backend where its bytes pass untouched; `None`
    /// if it has ended by then.
    pub(crate) async fn begin(
        self: &Rc<Self>,
        taken: TakenIn,
        transport: Transport,
    ) -> Option<Begun<P>> {
        let taken = if self.has_left() { self.send_after(taken, transport).await? } else { taken };
        let TakenIn { stream, remote, local, facts, early, websocket } = taken;
        let limit = self.state().spec.limits.per_source;
        let Some(place) = self.shared.source_place(remote.ip(), limit) else {
            self.count("over_per_source");
            stream.reset_on_close();
            return None;
        };
        let (flow, connection) = self.adopt(stream, remote, local, transport);
        if let Some(websocket) = websocket {
            // It is new: there is none.
            let _none = connection.websocket.set(websocket);
        }
        let opened = Opened { remote, local, transport, facts: &facts };
        self.opened(Endpoint::Client(flow), opened);
        let next = if P::LINKS == strowger_contract::Links::None {
            match crate::runtime::splice::join(self, flow, &connection, &facts, early).await {
                Ok(relay) => Next::Relay(relay),
                Err(cause) => {
                    self.release(flow, &connection, cause);
                    return None;
                }
            }
        } else {
            Next::Cut(early)
        };
        Some(Begun { flow, connection, next, source: place })
    }

    /// Serves a connection that has begun until it ends. What is awaited here is what an idle
    /// connection holds.
    pub(crate) async fn serve(self: Rc<Self>, begun: Box<Begun<P>>, place: Taken) {
        let Begun { flow, connection, next, source } = *begun;
        let cause = match next {
            Next::Relay(relay) => match Relay::run(&relay).await {
                Ran::Ended(cause) => cause,
                Ran::Idle => {
                    // What a connection has while it is served goes before it is parked.
                    drop(connection);
                    return self.park(flow, relay, source, place);
                }
            },
            Next::Cut(early) => {
                let idle = self.state().spec.limits.idle;
                Box::pin(serve(&self, &connection, idle, early)).await
            }
        };
        self.release(flow, &connection, cause);
    }

    /// Enters a stream into the flows.
    pub(crate) fn adopt(
        &self,
        stream: Stream,
        remote: SocketAddr,
        local: SocketAddr,
        transport: Transport,
    ) -> (FlowId, Rc<Connection>) {
        let mut state = self.cell.borrow_mut();
        let flow = state.flows.reserve(self.worker);
        let connection = Connection::new(stream, Endpoint::Client(flow), remote, local, transport);
        state.flows.set(flow, Rc::clone(&connection));
        if P::LINKS != strowger_contract::Links::None {
            // Nothing is ever sent to where a raw flow comes from, but through the flow.
            state.remotes.insert((transport, remote), Rc::clone(&connection));
        }
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
            let key = (connection.transport, connection.remote);
            if state.remotes.get(&key).is_some_and(|known| Rc::ptr_eq(known, connection)) {
                state.remotes.remove(&key);
            }
        }
        self.ended(flow, cause);
        if connection.proven.get() || connection.handed_over.get() {
            // It served as a backend's link: what other workers sent there is lost. Or they have
            // requests of it, which may wait.
            let (peer, change) = (Endpoint::Client(flow), PeerChange::Closed(cause));
            self.shared.tell_others(self.worker, peer, change);
        }
    }

    /// A flow is no more: its number is free, and the engine hears of it.
    fn ended(self: &Rc<Self>, flow: FlowId, cause: CloseCause) {
        {
            let mut state = self.cell.borrow_mut();
            state.flows.remove(flow);
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

    /// Whether the engine takes no more connections.
    pub(crate) fn is_saturated(self: &Rc<Self>) -> bool {
        let mut state = self.cell.borrow_mut();
        Batch { host: self, state: &mut state, now: Instant::now() }
            .ask(false, P::Engine::is_saturated)
    }

    fn rearm(&self, state: &State<P>, engine: Option<Instant>) {
        if state.muted {
            return;
        }
        let wanted = [engine, state.router.next_timeout()];
        let Some(next) = wanted.into_iter().flatten().min() else { return };
        // A timer that is armed too early costs one wake; only a later one must be moved.
        if self.armed.get().is_none_or(|armed| next < armed) {
            self.armed.set(Some(next));
            self.timer.notify_one();
        }
    }

    /// Has all connections look at their idle timeouts anew when a step of the brown-out ladder
    /// shrinks them. Never ends.
    pub(crate) async fn follow_brownout(self: Rc<Self>) {
        const EVERY: std::time::Duration = std::time::Duration::from_millis(500);
        let mut step = 0;
        loop {
            tokio::time::sleep(EVERY).await;
            let now = self.shared.core.brownout_step();
            if now > step {
                self.kick_all();
            }
            step = now;
        }
    }

    /// Has all connections look again whether they are to go on.
    pub(crate) fn kick_all(&self) {
        for connection in self.cell.borrow().flows.all() {
            connection.kick();
        }
    }

    /// Closes everything; the listener or the worker's engine goes away.
    fn close_all(state: &mut State<P>, cause: CloseCause) {
        state.outwards.clear();
        for connection in state.flows.all() {
            connection.close(Closing::Flushed, cause);
        }
        for connection in state.links.connections() {
            connection.close(Closing::Flushed, cause);
        }
    }
}

/// How long the first message is of what waits to be written.
fn first_message<P: Protocol>(bytes: &[u8]) -> usize {
    match P::Framer::default().frame(bytes) {
        Ok(Framing::Message(length)) => length.get().min(bytes.len()),
        _ => bytes.len(),
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
