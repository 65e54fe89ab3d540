//! Raw flows: joined to a backend, then bytes pass untouched.
//!
//! One task moves both directions. It reads into the worker's scratch buffer and writes at once; a
//! buffer of the flow's own exists only while the other side takes less than was read, and then
//! nothing more is read from that side. So an idle flow holds no buffer, and a slow receiver slows
//! its own sender and nobody else.

use std::cell::RefCell;
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
use super::host::{Host, SWEEP_EVERY};
use super::intake::keep_watch;
use super::link::open;
use super::socket::Stream;
use super::stream::Connection;
use super::way::{Broken, Direction, interest, pass};
use crate::routing::SendProxy;

/// A flow that would be over within so long keeps its own timer.
const PARKED_AT_LEAST: Duration = SWEEP_EVERY.saturating_mul(4);

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
        if connection.is_closing() {
            // Also with a wish to join: whoever hung up as its turn came is not sent to a backend.
            return Err(connection.finish());
        }
        if let Some((backend, limits)) = connection.take_splice() {
            match dial(host, connection, backend, limits, facts).await {
                Err(_) if connection.is_closing() => continue,
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
        tokio::select! {
            // First: it may be that it hung up and that its turn came.
            biased;
            () = connection.stream.hung_up() => {
                connection.close(Closing::Reset, CloseCause::End);
            }
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
            },
            () = connection.stream.was_reset() => {
                connection.close(Closing::Reset, CloseCause::Reset);
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

/// A joined flow. While it is idle this is all that it holds, and so there are no futures in it that
/// a poll can do without, and one timer for all its limits.
pub(crate) struct Relay<P: Protocol> {
    host: Rc<Host<P>>,
    client: Rc<Connection>,
    backend: Stream,
    backend_id: BackendId,
    idle: Duration,
    half_closed: Duration,
    park: Duration,
    by_pipe: bool,
    /// The backend takes no more; and what it said last was passed on.
    up_is_dead: bool,
    had_its_say: bool,
    up: Direction,
    down: Direction,
    last_moved: Instant,
    /// When this process, or this task, began with it.
    taken_up: Instant,
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
            park: limits.park,
            by_pipe: limits.by_pipe,
            up_is_dead: false,
            had_its_say: false,
            up: Direction::holding(early),
            down: Direction::default(),
            last_moved: now,
            taken_up: now,
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
        Self::entered(Self {
            host: Rc::clone(host),
            client: Rc::clone(client),
            backend,
            backend_id: saved.backend,
            idle: saved.idle,
            half_closed: saved.half_closed,
            park: saved.park,
            by_pipe: saved.by_pipe,
            up_is_dead: false,
            had_its_say: false,
            up: Direction::restored(saved.up),
            down: Direction::restored(saved.down),
            last_moved: saved.last_moved,
            taken_up: Instant::now(),
            ends: saved.ends,
            timer: None,
        })
    }

    /// One that was idle and is no more.
    pub(crate) fn woken(
        host: &Rc<Host<P>>,
        client: &Rc<Connection>,
        backend: Stream,
        quiet: Quiet,
    ) -> Rc<RefCell<Self>> {
        Self::restored(host, client, backend, quiet.saved())
    }

    /// Of an idle flow: its streams, and what is to be remembered. `None` if somebody else has a handle
    /// of it.
    pub(crate) fn take_apart(relay: Rc<RefCell<Self>>) -> Option<(Rc<Connection>, Stream, Quiet)> {
        let relay = Rc::into_inner(relay)?.into_inner();
        let quiet = Quiet {
            backend: relay.backend_id,
            unix: matches!(relay.backend, Stream::Unix(_)),
            by_pipe: relay.by_pipe,
            idle: relay.idle,
            half_closed: relay.half_closed,
            park: relay.park,
            last_moved: relay.last_moved,
            ends: relay.ends,
        };
        Some((relay.client, relay.backend, quiet))
    }

    /// Relays until the flow ends, or is idle.
    pub(crate) async fn run(this: &Rc<RefCell<Self>>) -> Ran {
        // It may have stopped meanwhile.
        this.borrow().client.kick();
        // What the client sent before is the first to go.
        {
            let mut relay = this.borrow_mut();
            if relay.up.is_blocked() && relay.turn().is_err() {
                return Ran::Ended(relay.reset(CloseCause::Reset));
            }
        }
        std::future::poll_fn(|context| this.borrow_mut().poll(context)).await
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Ran> {
        let ended = |cause| Poll::Ready(Ran::Ended(cause));
        loop {
            if self.up.shut && self.down.shut {
                return ended(CloseCause::End);
            }
            let mut woken = self.client.poll_kicked(context).is_ready();
            if woken && self.client.has_left() {
                return ended(CloseCause::Local);
            }
            if woken && self.client.is_closing() {
                self.reset_backend();
                return ended(self.client.finish());
            }
            // A listener that stops kicks all its connections.
            if woken && self.host.stop.is_cancelled() {
                return ended(self.reset(CloseCause::Shutdown));
            }
            let sides =
                [(&self.client.stream, self.interest(true)), (&self.backend, self.interest(false))];
            for (stream, interest) in sides {
                let Some(interest) = interest else { continue };
                match stream.poll_ready(context, interest) {
                    Poll::Ready(Ok(())) => woken = true,
                    Poll::Ready(Err(_)) => return ended(self.reset(CloseCause::Reset)),
                    Poll::Pending => {}
                }
            }
            if !woken {
                return self.poll_time(context);
            }
            match self.turn() {
                Err(_) => return ended(self.reset(CloseCause::Reset)),
                Ok(false) => {}
                Ok(true) => {
                    // There is more. Other flows have their turn first.
                    context.waker().wake_by_ref();
                    return Poll::Pending;
                }
            }
        }
    }

    /// Ready when one of the flow's limits is over; until then the timer is armed.
    fn poll_time(&mut self, context: &mut Context<'_>) -> Poll<Ran> {
        loop {
            let silent = self.silence().map(|silence| self.last_moved + silence);
            let end = [silent, self.ends].into_iter().flatten().min();
            let parks = self.parks().filter(|parks| {
                end.is_none_or(|end| end.saturating_duration_since(*parks) >= PARKED_AT_LEAST)
            });
            let Some(deadline) = parks.or(end) else {
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
                return Poll::Ready(match parks {
                    Some(_) => Ran::Idle,
                    None => Ran::Ended(self.reset(CloseCause::Idle)),
                });
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

    /// When it is to be parked, if nothing passes until then.
    fn parks(&self) -> Option<Instant> {
        let plain = |stream: &Stream| stream.plain_fd().is_some();
        let clear = |way: &Direction| !way.ended && !way.is_blocked();
        let can = !self.park.is_zero()
            && clear(&self.up)
            && clear(&self.down)
            && plain(&self.client.stream)
            && plain(&self.backend);
        // Whoever was woken must have the time to see why.
        can.then(|| self.last_moved.max(self.taken_up) + self.park)
    }

    fn silence(&self) -> Option<Duration> {
        let half = self.up.ended || self.down.ended;
        let limit = if half && !self.half_closed.is_zero() { self.half_closed } else { self.idle };
        (!limit.is_zero()).then(|| self.host.shared.core.idle(limit))
    }

    /// Moves what there is, within bounds; whether there is more.
    fn turn(&mut self) -> Result<bool, Broken> {
        let ends_before = (self.up.ended, self.down.ended);
        let mut scratch = self.host.scratch.borrow_mut();
        let mut pipes = self.by_pipe.then(|| self.host.pipes.borrow_mut());
        let mut pipes = pipes.as_deref_mut();
        self.client.stream.flush().map_err(|_| Broken::Reader)?;
        if !self.up_is_dead {
            self.backend.flush().map_err(|_| Broken::Reader)?;
        }
        let (client, backend) = (&self.client.stream, &self.backend);
        let up = pass(client, backend, &mut self.up, &mut scratch, pipes.as_deref_mut());
        let (up, more_up) = match up {
            Ok(moved) => moved,
            Err(Broken::Reader) => return Err(Broken::Reader),
            Err(Broken::Writer) => {
                // The backend takes no more. What it said before that is the client's: its own end, or an
                // error of its reading side, comes behind it.
                self.up_is_dead = true;
                self.up = Direction::over();
                (0, false)
            }
        };
        let (down, more_down) = pass(backend, client, &mut self.down, &mut scratch, pipes)?;
        drop(scratch);
        self.had_its_say |= self.up_is_dead && down > 0;
        if up + down > 0 {
            self.last_moved = Instant::now();
            let state = self.host.state();
            state.metrics.received(0, up);
            state.metrics.sent(0, down);
        } else if ends_before != (self.up.ended, self.down.ended) {
            // An end is something that happened, too: the half-closed time starts with it. A wake that
            // brings nothing (a TLS record without text) is not.
            self.last_moved = Instant::now();
        }
        Ok(more_up || more_down)
    }

    /// Ends both sides at once.
    fn reset(&self, cause: CloseCause) -> CloseCause {
        self.reset_backend();
        // A reset would take from the client what it has not read yet.
        let in_order = self.had_its_say && cause == CloseCause::Reset;
        let how = if in_order { Closing::Flushed } else { Closing::Reset };
        self.client.close(how, cause);
        self.client.finish()
    }

    fn reset_backend(&self) {
        self.backend.reset_on_close();
    }
}

/// How a relay's task ended.
pub(crate) enum Ran {
    Ended(CloseCause),
    /// Nothing has passed for a while: its memory can go.
    Idle,
}

/// What is remembered of a flow that is idle.
pub(crate) struct Quiet {
    backend: BackendId,
    /// The backend's descriptor is a unix socket's.
    pub(crate) unix: bool,
    by_pipe: bool,
    idle: Duration,
    half_closed: Duration,
    pub(crate) park: Duration,
    last_moved: Instant,
    ends: Option<Instant>,
}

impl Quiet {
    /// Whether one of its limits is over; `idle` says what the node makes of a silence.
    pub(crate) fn is_over(&self, now: Instant, idle: impl Fn(Duration) -> Duration) -> bool {
        !self.idle.is_zero() && now >= self.last_moved + idle(self.idle)
            || self.ends.is_some_and(|end| now >= end)
    }

    /// The flow, for another process or for a task of this one.
    pub(crate) fn saved(&self) -> SavedRelay {
        let way = || SavedWay { rest: Vec::new(), ended: false, shut: false };
        SavedRelay {
            backend: self.backend,
            idle: self.idle,
            half_closed: self.half_closed,
            park: self.park,
            by_pipe: self.by_pipe,
            up: way(),
            down: way(),
            last_moved: self.last_moved,
            ends: self.ends,
            unix: self.unix,
        }
    }
}

impl<P: Protocol> Joined for RefCell<Relay<P>> {
    fn save(&self, each: &mut dyn FnMut(SavedRelay, [BorrowedFd<'_>; 2])) {
        let mut relay = self.borrow_mut();
        let (Ok(up), Ok(down)) = (relay.up.saved(), relay.down.saved()) else {
            // Bytes are lost: nobody shall go on with the rest.
            relay.reset(CloseCause::Reset);
            return;
        };
        let (Some(client), Some(backend)) =
            (relay.client.stream.plain_fd(), relay.backend.plain_fd())
        else {
            return;
        };
        let saved = SavedRelay {
            backend: relay.backend_id,
            idle: relay.idle,
            half_closed: relay.half_closed,
            park: relay.park,
            by_pipe: relay.by_pipe,
            up,
            down,
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
                .map_err(|_| Broken::Writer)
                .and_then(|()| pass(near, &far, &mut up, &mut scratch, None))
                .and_then(|(_, more_up)| {
                    let (_, more_down) = pass(&far, near, &mut down, &mut scratch, None)?;
                    Ok(more_up || more_down)
                });
            match passed {
                Err(_) => {
                    near.reset_on_close();
                    return Poll::Ready(());
                }
                Ok(false) => {}
                Ok(true) => {
                    context.waker().wake_by_ref();
                    return Poll::Pending;
                }
            }
        }
    });
    tokio::select! {
        () = run => {}
        () = host.stopped() => {}
    }
    near.say_goodbye();
}
