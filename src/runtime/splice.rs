//! Raw flows: joined to a backend, then bytes pass untouched.
//!
//! One task moves both directions. It reads into the worker's scratch buffer and writes at once; a
//! buffer of the flow's own exists only while the other side takes less than was read, and then
//! nothing more is read from that side. So an idle flow holds no buffer, and a slow receiver slows
//! its own sender and nobody else.

use std::cell::RefCell;
use std::io;
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use strowger_contract::outbox::SpliceLimits;
use strowger_contract::{
    BackendId, CloseCause, Closing, Endpoint, FlowId, PeerChange, PeerFacts, Protocol,
};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::{Sleep, sleep_until};

use super::handover::{Joined, SavedRelay, SavedWay};
use super::host::Host;
use super::intake::keep_watch;
use super::link::open;
use super::socket::Stream;
use super::stream::Connection;
use crate::routing::SendProxy;

/// Reads from one side before the other has its turn.
const READS_PER_TURN: usize = 4;

/// Waits for the engine's wish and joins the flow; `Err` if it ended before.
pub(crate) async fn join<P: Protocol>(
    host: &Rc<Host<P>>,
    flow: FlowId,
    connection: &Rc<Connection>,
    facts: &PeerFacts,
    early: Vec<u8>,
) -> Result<Rc<RefCell<Relay<P>>>, CloseCause> {
    connection.more(|more| more.fresh = Some(Box::new((facts.clone(), early.clone()))));
    loop {
        if connection.has_left() {
            return Err(CloseCause::Local);
        }
        if let Some((backend, limits)) = connection.take_splice() {
            match dial(host, connection, backend, limits, facts).await {
                Err(cause) => {
                    host.tell(Endpoint::Client(flow), PeerChange::JoinFailed(backend, cause));
                    continue;
                }
                Ok(stream) => {
                    host.tell(Endpoint::Client(flow), PeerChange::Joined(backend));
                    return Ok(Relay::new(host, connection, (backend, stream), limits, early));
                }
            }
        }
        if connection.is_closing() {
            return Err(connection.finish());
        }
        tokio::select! {
            () = connection.kicked() => {}
            () = host.stopped() => connection.close(Closing::Reset, CloseCause::Shutdown),
        }
    }
}

async fn dial<P: Protocol>(
    host: &Rc<Host<P>>,
    connection: &Rc<Connection>,
    backend: BackendId,
    limits: SpliceLimits,
    facts: &PeerFacts,
) -> Result<Stream, CloseCause> {
    let mut connecting = Box::pin(open(host, backend, limits.connect));
    let stream = loop {
        tokio::select! {
            opened = &mut connecting => break opened?.stream,
            // The engine may give the flow up meanwhile. The wish to join kicks as well.
            () = connection.kicked() => if connection.is_closing() || connection.has_left() {
                return Err(CloseCause::Local);
            }
        }
    };
    stream.set_nodelay();
    let (send_proxy, listener) = {
        let state = host.state();
        (state.router.snapshot().backend_send_proxy(backend), state.spec.limits.clone())
    };
    if !matches!(stream, Stream::Unix(_)) {
        keep_watch(&stream.reference(), &listener);
    }
    if send_proxy != SendProxy::Off {
        let header = super::proxy::write(send_proxy, connection.remote, connection.local, facts);
        // A fresh socket's buffer has room for a header.
        if !stream.try_write(&header).is_ok_and(|count| count == header.len()) {
            return Err(CloseCause::Reset);
        }
    }
    Ok(stream)
}

/// One direction.
#[derive(Default)]
struct Direction {
    /// Read and not yet taken by the other side.
    rest: Vec<u8>,
    written: usize,
    /// The reading side has ended.
    ended: bool,
    /// The end was passed on.
    shut: bool,
}

impl Direction {
    fn is_blocked(&self) -> bool {
        self.written < self.rest.len()
    }
}

/// What a side is waited for: `from` it, and `to` it.
fn interest(from: &Direction, to: &Direction, stream: &Stream) -> Option<Interest> {
    let reads = !from.ended && !from.is_blocked();
    let writes = to.is_blocked() || stream.has_unsent();
    match (reads, writes) {
        (true, true) => Some(Interest::READABLE | Interest::WRITABLE),
        (true, false) => Some(Interest::READABLE),
        (false, true) => Some(Interest::WRITABLE),
        (false, false) => None,
    }
}

/// A joined flow. While it is idle this is all that it holds, and so there are no futures in it that
/// a poll can do without, and one timer for all its limits.
pub(crate) struct Relay<P: Protocol> {
    host: Rc<Host<P>>,
    client: Rc<Connection>,
    backend: Stream,
    backend_id: BackendId,
    idle: Duration,
    half_closed: Duration,
    up: Direction,
    down: Direction,
    last_moved: Instant,
    /// When the flow ends at the latest.
    ends: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<P: Protocol> Relay<P> {
    fn new(
        host: &Rc<Host<P>>,
        client: &Rc<Connection>,
        (backend_id, backend): (BackendId, Stream),
        limits: SpliceLimits,
        early: Vec<u8>,
    ) -> Rc<RefCell<Self>> {
        let now = Instant::now();
        Self::entered(Self {
            host: Rc::clone(host),
            client: Rc::clone(client),
            backend,
            backend_id,
            idle: limits.idle,
            half_closed: limits.half_closed,
            up: Direction { rest: early, ..Direction::default() },
            down: Direction::default(),
            last_moved: now,
            ends: (!limits.session.is_zero()).then(|| now + limits.session),
            timer: None,
        })
    }

    /// Notes at the client's connection that it is joined.
    fn entered(relay: Self) -> Rc<RefCell<Self>> {
        let client = Rc::clone(&relay.client);
        let relay = Rc::new(RefCell::new(relay));
        let joined = Rc::downgrade(&relay);
        client.more(|more| {
            more.fresh = None;
            more.relay = Some(joined);
        });
        relay
    }

    /// As it was in another process.
    pub(crate) fn restored(
        host: &Rc<Host<P>>,
        client: &Rc<Connection>,
        backend: Stream,
        saved: SavedRelay,
    ) -> Rc<RefCell<Self>> {
        let way = |saved: SavedWay| Direction {
            rest: saved.rest,
            written: 0,
            ended: saved.ended,
            shut: saved.shut,
        };
        Self::entered(Self {
            host: Rc::clone(host),
            client: Rc::clone(client),
            backend,
            backend_id: saved.backend,
            idle: saved.idle,
            half_closed: saved.half_closed,
            up: way(saved.up),
            down: way(saved.down),
            last_moved: saved.last_moved,
            ends: saved.ends,
            timer: None,
        })
    }

    /// Relays until the flow ends; why it ended.
    pub(crate) async fn run(this: Rc<RefCell<Self>>) -> CloseCause {
        // It may have stopped meanwhile.
        this.borrow().client.kick();
        // What the client sent before is the first to go.
        {
            let mut relay = this.borrow_mut();
            if relay.up.is_blocked() && relay.turn().is_err() {
                return relay.reset(CloseCause::Reset);
            }
        }
        std::future::poll_fn(|context| this.borrow_mut().poll(context)).await
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<CloseCause> {
        loop {
            if self.up.shut && self.down.shut {
                return Poll::Ready(CloseCause::End);
            }
            let mut woken = self.client.poll_kicked(context).is_ready();
            if woken && self.client.has_left() {
                return Poll::Ready(CloseCause::Local);
            }
            if woken && self.client.is_closing() {
                self.reset_backend();
                return Poll::Ready(self.client.finish());
            }
            // A listener that stops kicks all its connections.
            if woken && self.host.stop.is_cancelled() {
                return Poll::Ready(self.reset(CloseCause::Shutdown));
            }
            let sides =
                [(&self.client.stream, self.interest(true)), (&self.backend, self.interest(false))];
            for (stream, interest) in sides {
                let Some(interest) = interest else { continue };
                match stream.poll_ready(context, interest) {
                    Poll::Ready(Ok(())) => woken = true,
                    Poll::Ready(Err(_)) => return Poll::Ready(self.reset(CloseCause::Reset)),
                    Poll::Pending => {}
                }
            }
            if woken && self.turn().is_err() {
                return Poll::Ready(self.reset(CloseCause::Reset));
            }
            if !woken {
                return self.poll_time(context);
            }
        }
    }

    /// Ready when one of the flow's limits is over; until then the timer is armed.
    fn poll_time(&mut self, context: &mut Context<'_>) -> Poll<CloseCause> {
        loop {
            let silent = self.silence().map(|silence| self.last_moved + silence);
            let Some(deadline) = [silent, self.ends].into_iter().flatten().min() else {
                self.timer = None;
                return Poll::Pending;
            };
            let deadline = tokio::time::Instant::from_std(deadline);
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
            // A timer that is armed too early costs one wake; only a later one must be moved.
            if timer.deadline() > deadline {
                timer.as_mut().reset(deadline);
            }
            if timer.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
            if deadline <= tokio::time::Instant::now() {
                return Poll::Ready(self.reset(CloseCause::Idle));
            }
            timer.as_mut().reset(deadline);
        }
    }

    /// What a side is waited for. A direction that is blocked waits for its writer only.
    fn interest(&self, client: bool) -> Option<Interest> {
        if client {
            interest(&self.up, &self.down, &self.client.stream)
        } else {
            interest(&self.down, &self.up, &self.backend)
        }
    }

    fn silence(&self) -> Option<Duration> {
        let half = self.up.ended || self.down.ended;
        let limit = if half && !self.half_closed.is_zero() { self.half_closed } else { self.idle };
        (!limit.is_zero()).then(|| self.host.shared.core.idle(limit))
    }

    fn turn(&mut self) -> io::Result<()> {
        let mut scratch = self.host.scratch.borrow_mut();
        self.client.stream.flush()?;
        self.backend.flush()?;
        let up = pass(&self.client.stream, &self.backend, &mut self.up, &mut scratch)?;
        let down = pass(&self.backend, &self.client.stream, &mut self.down, &mut scratch)?;
        drop(scratch);
        if up + down > 0 {
            self.last_moved = Instant::now();
            let state = self.host.state();
            state.metrics.received(0, up);
            state.metrics.sent(0, down);
        } else if self.up.ended || self.down.ended {
            // An end is something that happened, too: the half-closed time starts with it.
            self.last_moved = self.last_moved.max(Instant::now() - Duration::from_millis(1));
        }
        Ok(())
    }

    /// Ends both sides at once.
    fn reset(&self, cause: CloseCause) -> CloseCause {
        self.reset_backend();
        self.client.close(Closing::Reset, cause);
        self.client.finish()
    }

    fn reset_backend(&self) {
        self.backend.reset_on_close();
    }
}

impl<P: Protocol> Joined for RefCell<Relay<P>> {
    fn save(&self, each: &mut dyn FnMut(SavedRelay, [BorrowedFd<'_>; 2])) {
        let relay = self.borrow();
        let (Some(client), Some(backend)) =
            (relay.client.stream.plain_fd(), relay.backend.plain_fd())
        else {
            return;
        };
        let way = |way: &Direction| SavedWay {
            rest: way.rest[way.written..].to_vec(),
            ended: way.ended,
            shut: way.shut,
        };
        let saved = SavedRelay {
            backend: relay.backend_id,
            idle: relay.idle,
            half_closed: relay.half_closed,
            up: way(&relay.up),
            down: way(&relay.down),
            last_moved: relay.last_moved,
            ends: relay.ends,
            unix: matches!(relay.backend, Stream::Unix(_)),
        };
        each(saved, [client, backend]);
    }
}

/// Passes text between a TLS connection and the process that serves it, until either ends.
pub(crate) async fn bridge<P: Protocol>(host: &Rc<Host<P>>, near: &Stream, far: UnixStream) {
    let far = Stream::Unix(far);
    let (mut up, mut down) = (Direction::default(), Direction::default());
    let run = std::future::poll_fn(|context| {
        loop {
            if up.shut && down.shut {
                return Poll::Ready(());
            }
            let sides = [(near, interest(&up, &down, near)), (&far, interest(&down, &up, &far))];
            let mut woken = false;
            for (stream, interest) in sides {
                let Some(interest) = interest else { continue };
                match stream.poll_ready(context, interest) {
                    Poll::Ready(Ok(())) => woken = true,
                    Poll::Ready(Err(_)) => return Poll::Ready(()),
                    Poll::Pending => {}
                }
            }
            if !woken {
                return Poll::Pending;
            }
            let mut scratch = host.scratch.borrow_mut();
            let passed = near
                .flush()
                .and_then(|()| pass(near, &far, &mut up, &mut scratch))
                .and_then(|_| pass(&far, near, &mut down, &mut scratch));
            if passed.is_err() {
                near.reset_on_close();
                return Poll::Ready(());
            }
        }
    });
    tokio::select! {
        () = run => {}
        () = host.stopped() => {}
    }
    near.say_goodbye();
}

/// Moves bytes one way until one side blocks or its turn is over; how many the writer took.
fn pass(from: &Stream, to: &Stream, way: &mut Direction, scratch: &mut [u8]) -> io::Result<u64> {
    let mut moved = 0;
    for _ in 0..READS_PER_TURN {
        if way.is_blocked() {
            moved +=
                write(to, &way.rest[way.written..]).inspect(|count| way.written += count)? as u64;
            if way.is_blocked() {
                return Ok(moved);
            }
            *way = Direction { rest: Vec::new(), written: 0, ..std::mem::take(way) };
        }
        if way.ended {
            break;
        }
        match from.try_read(scratch) {
            Ok(0) => way.ended = true,
            Ok(count) => {
                let taken = write(to, &scratch[..count])?;
                moved += taken as u64;
                way.rest.extend_from_slice(&scratch[taken..count]);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    if way.ended && !way.is_blocked() && !way.shut {
        to.flush()?;
        if to.has_unsent() {
            return Ok(moved);
        }
        way.shut = true;
        to.shutdown_write()?;
    }
    Ok(moved)
}

/// Writes what the kernel takes; 0 if nothing.
fn write(to: &Stream, bytes: &[u8]) -> io::Result<usize> {
    let mut written = 0;
    while written < bytes.len() {
        match to.try_write(&bytes[written..]) {
            Ok(count) => written += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(written)
}
