//! A connection: its bounded write queue, and the task that reads, cuts and writes.

use std::cell::{Cell, OnceCell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use strowger_contract::outbox::SpliceLimits;
use strowger_contract::{
    BackendId, CloseCause, Closing, Endpoint, FrameError, Framer, Framing, PeerFacts, Protocol,
    Transport,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::handover::Joined;
use super::host::Host;
use super::socket::Stream;
use super::splice::bridge;
use super::websocket::{self, Ended, WebSocket, encode, goodbye};

/// How long a connection that is to close once its queue is written may take for it.
const LINGER: Duration = Duration::from_secs(5);

/// Messages that one read may yield before the others have their turn: a peer that sends in bulk
/// must not hold the worker.
const MESSAGES_PER_TURN: usize = 256;

/// A queue's memory above this goes back when it is empty: an idle connection holds nothing.
const QUEUE_KEPT: usize = 0;

/// One connection, shared between its task and the host's flush.
pub(crate) struct Connection {
    pub(crate) stream: Stream,
    pub(crate) endpoint: Endpoint,
    pub(crate) remote: SocketAddr,
    pub(crate) local: SocketAddr,
    pub(crate) transport: Transport,
    queue: RefCell<Queue>,
    closing: Cell<Option<(Closing, CloseCause)>>,
    /// In a box: it is empty all but once.
    splice: Cell<Option<Box<(BackendId, SpliceLimits)>>>,
    /// What was read and is not yet a whole message. Without memory most of the time.
    pub(crate) partial: RefCell<Vec<u8>>,
    /// When the message that is awaited began: the connection's start, or its first byte.
    pub(crate) began: Cell<Option<Instant>>,
    pub(crate) last_read: Cell<Instant>,
    /// What else it is, for who hands it over; most of the time there is nothing.
    pub(crate) more: RefCell<Option<Box<More>>>,
    /// Already in the flush's list of connections to write.
    pub(crate) dirty: Cell<bool>,
    /// The core was told that this link is congested.
    pub(crate) congested: Cell<bool>,
    /// A link's engine has found the other side to be what it should be.
    pub(crate) proven: Cell<bool>,
    /// Other workers were given messages of it: they must hear of its end.
    pub(crate) handed_over: Cell<bool>,
    /// Its messages come and go in frames.
    pub(crate) websocket: OnceCell<Box<WebSocket>>,
    kick: Kick,
}

/// The parts of a connection that a hand-over needs.
#[derive(Default)]
pub(crate) struct More {
    /// It waits to be joined: what is known of it, and what it sent before.
    pub(crate) fresh: Option<Box<(PeerFacts, Vec<u8>)>>,
    /// It is joined.
    pub(crate) relay: Option<Weak<dyn Joined>>,
    /// Another process has it, or gets it by the other end of this pair.
    pub(crate) fate: Option<Fate>,
}

/// What becomes of a connection that was handed over.
pub(crate) enum Fate {
    /// The other process has its descriptor: it is let go of without a word.
    Gone,
    /// It runs over TLS: this process goes on to seal and open for the other one.
    Bridge(UnixStream),
}

/// Wakes the one task that a connection has. A `tokio::sync::Notify` would cost each idle
/// connection a waiter's memory, and an atomic where one thread does all.
#[derive(Default)]
struct Kick {
    kicked: Cell<bool>,
    waker: Cell<Option<Waker>>,
}

impl Kick {
    fn kick(&self) {
        self.kicked.set(true);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn poll(&self, context: &std::task::Context<'_>) -> Poll<()> {
        if self.kicked.replace(false) {
            return Poll::Ready(());
        }
        let known = self.waker.take().filter(|known| known.will_wake(context.waker()));
        self.waker.set(Some(known.unwrap_or_else(|| context.waker().clone())));
        Poll::Pending
    }
}

#[derive(Default)]
struct Queue {
    bytes: Vec<u8>,
    written: usize,
}

impl Queue {
    fn len(&self) -> usize {
        self.bytes.len() - self.written
    }
}

/// What a write brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Bytes that the kernel took.
    pub(crate) written: usize,
    /// Bytes that still wait.
    pub(crate) queued: usize,
}

impl Connection {
    /// Wraps an open stream.
    pub(crate) fn new(
        stream: Stream,
        endpoint: Endpoint,
        remote: SocketAddr,
        local: SocketAddr,
        transport: Transport,
    ) -> Rc<Self> {
        stream.set_nodelay();
        let now = Instant::now();
        Rc::new(Self {
            stream,
            endpoint,
            remote,
            local,
            transport,
            queue: RefCell::default(),
            closing: Cell::new(None),
            splice: Cell::new(None),
            partial: RefCell::default(),
            began: Cell::new(Some(now)),
            last_read: Cell::new(now),
            more: RefCell::default(),
            dirty: Cell::new(false),
            congested: Cell::new(false),
            proven: Cell::new(false),
            handed_over: Cell::new(false),
            websocket: OnceCell::new(),
            kick: Kick::default(),
        })
    }

    /// Queues a message; it goes out with the next [`Connection::write`]. A peer that lets more than
    /// `limit` bytes wait is cut off.
    pub(crate) fn push(&self, message: &[u8], limit: usize) -> bool {
        if self.websocket.get().is_none() {
            return self.push_bytes(message, limit);
        }
        let mut framed = Vec::with_capacity(message.len() + 14);
        encode(message, &mut framed);
        self.push_bytes(&framed, limit)
    }

    /// Queues bytes as they are.
    fn push_bytes(&self, bytes: &[u8], limit: usize) -> bool {
        if self.closing.get().is_some() || self.has_left() {
            return false;
        }
        let mut queue = self.queue.borrow_mut();
        if queue.len() + bytes.len() > limit {
            drop(queue);
            self.close(Closing::Reset, CloseCause::Overflow);
            return false;
        }
        queue.bytes.extend_from_slice(bytes);
        true
    }

    /// What waits, and how it is to be closed, for another process.
    pub(crate) fn waiting(&self) -> (Vec<u8>, Option<(Closing, CloseCause)>) {
        let queue = self.queue.borrow();
        (queue.bytes[queue.written..].to_vec(), self.closing.get())
    }

    /// As it waited in another process.
    pub(crate) fn restore(&self, waiting: Vec<u8>, closing: Option<(Closing, CloseCause)>) {
        self.queue.borrow_mut().bytes = waiting;
        self.closing.set(closing);
    }

    /// What else it is.
    pub(crate) fn more(&self, change: impl FnOnce(&mut More)) {
        change(self.more.borrow_mut().get_or_insert_default());
    }

    /// Lets another process have it.
    pub(crate) fn leave_to(&self, fate: Fate) {
        self.more(|more| more.fate = Some(fate));
        self.kick.kick();
    }

    /// Whether another process has it.
    pub(crate) fn has_left(&self) -> bool {
        self.more.borrow().as_ref().is_some_and(|more| more.fate.is_some())
    }

    /// What becomes of it, once.
    pub(crate) fn take_fate(&self) -> Option<Fate> {
        self.more.borrow_mut().as_mut()?.fate.take()
    }

    /// How many bytes wait.
    pub(crate) fn queued(&self) -> usize {
        self.queue.borrow().len() + usize::from(self.stream.has_unsent())
    }

    /// Writes what the kernel takes now. `cut` says how long the first message is; it is asked where
    /// each write must be one message.
    pub(crate) fn write(&self, cut: fn(&[u8]) -> usize) -> Progress {
        self.dirty.set(false);
        if self.has_left() {
            return Progress { written: 0, queued: 0 };
        }
        let mut queue = self.queue.borrow_mut();
        let mut total = 0;
        while queue.len() > 0 {
            let mut bytes = &queue.bytes[queue.written..];
            if self.transport == Transport::Sctp {
                bytes = &bytes[..cut(bytes)];
            }
            match self.stream.try_write(bytes) {
                Ok(0) => break,
                Ok(count) => {
                    queue.written += count;
                    total += count;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    queue.bytes.clear();
                    queue.written = 0;
                    self.close(Closing::Reset, CloseCause::Reset);
                    break;
                }
            }
        }
        if total == 0 && queue.len() == 0 && self.stream.flush().is_err() {
            self.close(Closing::Reset, CloseCause::Reset);
        }
        if queue.len() == 0 {
            queue.bytes.clear();
            queue.written = 0;
            if self.closing.get().is_some() {
                self.kick.kick();
            }
        } else {
            // The kernel's buffer is full: the task waits for room. What went is cut off the front
            // once it is the larger part, so that each byte is moved once on average.
            if queue.written > queue.len() {
                let written = std::mem::take(&mut queue.written);
                queue.bytes.drain(..written);
            }
            self.kick.kick();
        }
        Progress { written: total, queued: queue.len() }
    }

    /// Gives an idle connection's memory back.
    fn release_memory(&self) {
        let mut queue = self.queue.borrow_mut();
        if queue.len() == 0 && queue.bytes.capacity() > QUEUE_KEPT {
            queue.bytes = Vec::new();
        }
    }

    /// Asks the task to close; the first cause stays.
    pub(crate) fn close(&self, how: Closing, cause: CloseCause) {
        let cause = self.closing.get().map_or(cause, |(_, first)| first);
        self.closing.set(Some((how, cause)));
        self.kick.kick();
    }

    /// Whether it is being closed.
    pub(crate) fn is_closing(&self) -> bool {
        self.closing.get().is_some()
    }

    /// Asks the task to join the flow to a backend.
    pub(crate) fn splice_to(&self, backend: BackendId, limits: SpliceLimits) {
        self.splice.set(Some(Box::new((backend, limits))));
        self.kick.kick();
    }

    /// The wish of [`Connection::splice_to`], once.
    pub(crate) fn take_splice(&self) -> Option<(BackendId, SpliceLimits)> {
        self.splice.take().map(|wish| *wish)
    }

    /// Has the task look again.
    pub(crate) fn kick(&self) {
        self.kick.kick();
    }

    /// Waits until somebody changed something here.
    pub(crate) async fn kicked(&self) {
        std::future::poll_fn(|context| self.poll_kicked(context)).await;
    }

    /// [`Connection::kicked`] for a task that polls: ready once for each time that something changed.
    pub(crate) fn poll_kicked(&self, context: &std::task::Context<'_>) -> Poll<()> {
        self.kick.poll(context)
    }

    /// Ends the connection as asked; what the cause is.
    pub(crate) fn finish(&self) -> CloseCause {
        let (how, cause) = self.closing.get().unwrap_or((Closing::Flushed, CloseCause::Local));
        if how == Closing::Reset {
            self.stream.reset_on_close();
        } else {
            if self.websocket.get().is_some() {
                // It is a courtesy.
                let _gone = self.stream.try_write(&goodbye());
            }
            self.stream.say_goodbye();
        }
        cause
    }
}

/// Reads, cuts and writes until the connection ends; why it ended.
pub(crate) async fn serve<P: Protocol>(
    host: &Rc<Host<P>>,
    connection: &Rc<Connection>,
    idle: Duration,
    early: Vec<u8>,
) -> CloseCause {
    let mut reader = Reader::<P> { framer: P::Framer::default() };
    if !early.is_empty() {
        reader.read(host, connection, &early);
    }
    let mut closing_since = None;
    let mut pinged = None;
    loop {
        if connection.has_left() {
            match connection.take_fate() {
                Some(Fate::Bridge(stream)) => {
                    // A client's is counted by its task; a link's is not.
                    let link = u32::from(connection.endpoint.as_link().is_some());
                    host.shared.connections.fetch_add(link, Ordering::Relaxed);
                    bridge(host, &connection.stream, stream).await;
                    host.shared.connections.fetch_sub(link, Ordering::Relaxed);
                }
                Some(Fate::Gone) | None => {}
            }
            return CloseCause::Local;
        }
        if let Some((how, _)) = connection.closing.get() {
            let since = *closing_since.get_or_insert_with(Instant::now);
            if how == Closing::Reset || connection.queued() == 0 || since.elapsed() > LINGER {
                return connection.finish();
            }
        }
        let queued = connection.queued();
        let reading = closing_since.is_none() && queued <= host.queued_bytes_max();
        let interest = match (reading, queued > 0) {
            (true, true) => Interest::READABLE | Interest::WRITABLE,
            (false, true) => Interest::WRITABLE,
            // Without a wish there is still the hang-up to hear of.
            (_, false) => Interest::READABLE,
        };
        let watch = reading || queued > 0;
        let idle = host.shared.core.idle(idle);
        let deadline = match closing_since {
            Some(since) => Some(since + LINGER),
            None => {
                let ends = deadline::<P>(connection, idle);
                ping_due(host, connection, pinged).into_iter().chain(ends).min()
            }
        };
        tokio::select! {
            () = connection.kicked() => {}
            () = host.stopped(), if closing_since.is_none() => connection.close(Closing::Flushed, CloseCause::Shutdown),
            () = sleep_until(deadline), if deadline.is_some() => {
                if closing_since.is_some() {
                    continue;
                }
                if let Some(cause) = timed_out::<P>(connection, idle) {
                    connection.close(Closing::Reset, cause);
                } else if ping_due(host, connection, pinged).is_some_and(|due| due <= Instant::now()) {
                    ping(host, connection, &mut pinged);
                }
            }
            ready = connection.stream.ready(interest), if watch => {
                let Ok(ready) = ready else {
                    connection.close(Closing::Reset, CloseCause::Reset);
                    continue;
                };
                if connection.has_left() {
                    // What is there to read is the other process's.
                    continue;
                }
                if ready.is_writable() && connection.queued() > 0 {
                    host.write(connection);
                }
                if ready.is_readable() && reading && !connection.is_closing() {
                    reader.turn(host, connection);
                    if connection.queued() == 0 {
                        connection.release_memory();
                    }
                }
            }
        }
    }
}

/// When a WebSocket client is to be asked whether it is there, or is not if it was asked by then.
fn ping_due<P: Protocol>(
    host: &Rc<Host<P>>,
    connection: &Connection,
    pinged: Option<Instant>,
) -> Option<Instant> {
    connection.websocket.get()?;
    let every = host.state().spec.websocket.ping;
    let last = connection.last_read.get();
    let rounds = if pinged == Some(last) { 2 } else { 1 };
    (!every.is_zero()).then(|| last + every * rounds)
}

/// Asks a client whether it is there; one that was asked already is not.
fn ping<P: Protocol>(
    host: &Rc<Host<P>>,
    connection: &Rc<Connection>,
    pinged: &mut Option<Instant>,
) {
    let last = connection.last_read.get();
    if pinged.replace(last) == Some(last) {
        host.count("ws_silent");
        return connection.close(Closing::Reset, CloseCause::Idle);
    }
    let _cut_off = connection.push_bytes(&websocket::ping(), 2 * host.queued_bytes_max());
    host.write(connection);
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

/// The reading side of one connection.
struct Reader<P: Protocol> {
    framer: P::Framer,
}

fn deadline<P: Protocol>(connection: &Connection, idle: Duration) -> Option<Instant> {
    let message = connection.began.get().map(|began| began + P::MESSAGE_TIMEOUT);
    let idle = (!idle.is_zero()).then(|| connection.last_read.get() + idle);
    match (message, idle) {
        (Some(message), Some(idle)) => Some(message.min(idle)),
        (message, idle) => message.or(idle),
    }
}

fn timed_out<P: Protocol>(connection: &Connection, idle: Duration) -> Option<CloseCause> {
    let deadline = deadline::<P>(connection, idle);
    deadline.filter(|&deadline| deadline <= Instant::now()).map(|_| CloseCause::Idle)
}

impl<P: Protocol> Reader<P> {
    /// Reads once and gives the engine what is whole.
    fn turn(&mut self, host: &Rc<Host<P>>, connection: &Rc<Connection>) {
        let mut scratch = host.scratch.borrow_mut();
        let count = match connection.stream.try_read(&mut scratch) {
            Ok(0) => return connection.close(Closing::Flushed, CloseCause::End),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(_) => return connection.close(Closing::Reset, CloseCause::Reset),
        };
        let bytes = &scratch[..count];
        self.read(host, connection, bytes);
    }

    /// Takes what was read.
    fn read(&mut self, host: &Rc<Host<P>>, connection: &Rc<Connection>, bytes: &[u8]) {
        let now = Instant::now();
        connection.last_read.set(now);
        if let Some(websocket) = connection.websocket.get() {
            return self.read_frames(host, connection, websocket, bytes, now);
        }
        let mut whole = connection.partial.take();
        let result = if whole.is_empty() {
            let result = self.cut(host, connection, bytes, now);
            if let Ok(used) = result {
                whole.extend_from_slice(&bytes[used..]);
            }
            result
        } else {
            whole.extend_from_slice(bytes);
            let result = self.cut(host, connection, &whole, now);
            if let Ok(used) = result {
                if used == whole.len() {
                    // Given back: an idle connection holds nothing.
                    whole = Vec::new();
                } else {
                    whole.drain(..used);
                }
            }
            result
        };
        let rests = !whole.is_empty();
        connection.partial.replace(whole);
        match result {
            Ok(0) => connection.began.set(connection.began.get().or(Some(now))),
            Ok(_) => connection.began.set(rests.then_some(now)),
            Err(error) => host.lost_framing(connection, &error),
        }
    }

    /// Takes what was read of a WebSocket: each of its messages is one of the protocol's, or a
    /// keep-alive.
    fn read_frames(
        &mut self,
        host: &Rc<Host<P>>,
        connection: &Rc<Connection>,
        websocket: &WebSocket,
        bytes: &[u8],
        now: Instant,
    ) {
        let mut messages = Vec::new();
        let result = websocket.receive(bytes, &mut messages);
        // Pongs are no messages that one waits for the rest of.
        let began = connection.began.get().filter(|_| messages.is_empty()).or(Some(now));
        connection.began.set(began.filter(|_| websocket.has_begun()));
        let output = websocket.take_output();
        if !output.is_empty() {
            let _cut_off = connection.push_bytes(&output, 2 * host.queued_bytes_max());
        }
        host.batch(now, |batch| {
            for (turn, message) in messages.iter().enumerate() {
                let mut rest = &message[..];
                while !rest.is_empty() && !connection.is_closing() {
                    match P::Framer::default().frame(rest) {
                        Ok(Framing::Skip(length)) => rest = &rest[length.get().min(rest.len())..],
                        Ok(Framing::Pong(length, answer)) => {
                            rest = &rest[length.get().min(rest.len())..];
                            batch.answer(connection, answer);
                        }
                        // Its end is the frame's; whether it is whole, the engine says.
                        _ => {
                            batch.message(connection, rest);
                            break;
                        }
                    }
                }
                if turn % MESSAGES_PER_TURN == MESSAGES_PER_TURN - 1 {
                    batch.settle();
                }
            }
            if let Err(Ended::Broken(word)) = result {
                batch.count(word);
            }
        });
        host.write(connection);
        match result {
            Ok(()) => {}
            Err(Ended::Closed) => connection.close(Closing::Flushed, CloseCause::End),
            Err(Ended::Broken(_)) => connection.close(Closing::Flushed, CloseCause::Framing),
        }
    }

    /// Gives the engine all whole messages at the front of `bytes`; how many bytes that were.
    fn cut(
        &mut self,
        host: &Rc<Host<P>>,
        connection: &Rc<Connection>,
        bytes: &[u8],
        now: Instant,
    ) -> Result<usize, FrameError> {
        let mut used = 0;
        let mut turn = 0;
        let result = host.batch(now, |batch| {
            while used < bytes.len() && !connection.is_closing() {
                let rest = &bytes[used..];
                match self.framer.frame(rest)? {
                    Framing::Message(length) => {
                        let length = length.get().min(rest.len());
                        batch.message(connection, &rest[..length]);
                        used += length;
                    }
                    Framing::Skip(length) => used += length.get().min(rest.len()),
                    Framing::Pong(length, answer) => {
                        used += length.get().min(rest.len());
                        batch.answer(connection, answer);
                    }
                    Framing::Need(_) => break,
                }
                turn += 1;
                if turn % MESSAGES_PER_TURN == 0 {
                    batch.settle();
                }
            }
            Ok(())
        });
        super::gather::came(now, turn);
        result.map(|()| used)
    }
}
