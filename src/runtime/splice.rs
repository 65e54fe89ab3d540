//! Raw flows: joined to a backend, then bytes pass untouched.
//!
//! One task moves both directions. It reads into the worker's scratch buffer and writes at once; a
//! buffer of the flow's own exists only while the other side takes less than was read, and then
//! nothing more is read from that side. So an idle flow holds no buffer, and a slow receiver slows
//! its own sender and nobody else.

use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use strowger_contract::outbox::SpliceLimits;
use strowger_contract::{
    BackendId, CloseCause, Closing, Endpoint, FlowId, PeerChange, PeerFacts, Protocol,
};
use tokio::io::Interest;

use super::host::Host;
use super::intake::keep_watch;
use super::link::open;
use super::socket::Stream;
use super::stream::Connection;
use crate::routing::SendProxy;

/// Reads from one side before the other has its turn.
const READS_PER_TURN: usize = 4;

/// Serves a flow from its opening on: waits for the engine's wish, joins, relays.
pub(crate) async fn serve<P: Protocol>(
    host: &Rc<Host<P>>,
    flow: FlowId,
    connection: &Rc<Connection>,
    facts: PeerFacts,
    early: Vec<u8>,
) -> CloseCause {
    loop {
        if let Some((backend, limits)) = connection.take_splice() {
            match join(host, connection, backend, limits, &facts).await {
                Err(cause) => {
                    host.tell(Endpoint::Client(flow), PeerChange::JoinFailed(backend, cause));
                    continue;
                }
                Ok(stream) => {
                    host.tell(Endpoint::Client(flow), PeerChange::Joined(backend));
                    drop(facts);
                    return Relay::new(host, connection, stream, limits, early).run().await;
                }
            }
        }
        if connection.is_closing() {
            return connection.finish();
        }
        tokio::select! {
            () = connection.kicked() => {}
            () = host.stopped() => connection.close(Closing::Reset, CloseCause::Shutdown),
        }
    }
}

async fn join<P: Protocol>(
    host: &Rc<Host<P>>,
    connection: &Rc<Connection>,
    backend: BackendId,
    limits: SpliceLimits,
    facts: &PeerFacts,
) -> Result<Stream, CloseCause> {
    // In a box of its own: a handshake's memory must not stay with the idle flow.
    let mut connecting = Box::pin(open(host, backend, limits.connect));
    let stream = loop {
        tokio::select! {
            opened = &mut connecting => break opened?.stream,
            // The engine may give the flow up meanwhile. The wish to join kicks as well.
            () = connection.kicked() => if connection.is_closing() {
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

struct Relay<'a, P: Protocol> {
    host: &'a Rc<Host<P>>,
    client: &'a Rc<Connection>,
    backend: Stream,
    limits: SpliceLimits,
    up: Direction,
    down: Direction,
    last_moved: Instant,
    began: Instant,
}

impl<'a, P: Protocol> Relay<'a, P> {
    fn new(
        host: &'a Rc<Host<P>>,
        client: &'a Rc<Connection>,
        backend: Stream,
        limits: SpliceLimits,
        early: Vec<u8>,
    ) -> Self {
        let up = Direction { rest: early, ..Direction::default() };
        let down = Direction::default();
        let now = Instant::now();
        Self { host, client, backend, limits, up, down, last_moved: now, began: now }
    }

    async fn run(mut self) -> CloseCause {
        // What the client sent before is the first to go.
        if self.up.is_blocked() && self.turn().is_err() {
            return self.reset(CloseCause::Reset);
        }
        loop {
            if self.up.shut && self.down.shut {
                return CloseCause::End;
            }
            let (client, backend) = (self.interest(true), self.interest(false));
            let silence = self.silence();
            let moved = tokio::select! {
                ready = self.client.stream.ready(client.unwrap_or(Interest::READABLE)), if client.is_some() => ready.map(|_| ()),
                ready = self.backend.ready(backend.unwrap_or(Interest::READABLE)), if backend.is_some() => ready.map(|_| ()),
                () = sleep(silence.map(|silence| self.last_moved + silence)) => {
                    if silence.is_some_and(|silence| self.last_moved.elapsed() >= silence) {
                        return self.reset(CloseCause::Idle);
                    }
                    Ok(())
                }
                () = sleep(self.ends()) => {
                    if self.ends().is_some_and(|end| end <= Instant::now()) {
                        return self.reset(CloseCause::Idle);
                    }
                    Ok(())
                }
                () = self.client.kicked() => {
                    if self.client.is_closing() {
                        self.reset_backend();
                        return self.client.finish();
                    }
                    Ok(())
                }
                () = self.host.stopped() => return self.reset(CloseCause::Shutdown),
            };
            if moved.and_then(|()| self.turn()).is_err() {
                return self.reset(CloseCause::Reset);
            }
        }
    }

    /// What a side is waited for. A direction that is blocked waits for its writer only.
    fn interest(&self, client: bool) -> Option<Interest> {
        let (from, to) = if client { (&self.up, &self.down) } else { (&self.down, &self.up) };
        let reads = !from.ended && !from.is_blocked();
        let stream = if client { &self.client.stream } else { &self.backend };
        let writes = to.is_blocked() || stream.has_unsent();
        match (reads, writes) {
            (true, true) => Some(Interest::READABLE | Interest::WRITABLE),
            (true, false) => Some(Interest::READABLE),
            (false, true) => Some(Interest::WRITABLE),
            (false, false) => None,
        }
    }

    /// When the flow ends at the latest.
    fn ends(&self) -> Option<Instant> {
        (!self.limits.session.is_zero()).then(|| self.began + self.limits.session)
    }

    fn silence(&self) -> Option<Duration> {
        let half = self.up.ended || self.down.ended;
        let limit = if half && !self.limits.half_closed.is_zero() {
            self.limits.half_closed
        } else {
            self.limits.idle
        };
        (!limit.is_zero()).then_some(limit)
    }

    fn turn(&mut self) -> io::Result<()> {
        let mut scratch = self.host.scratch.borrow_mut();
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

async fn sleep(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until.into()).await,
        None => std::future::pending().await,
    }
}
