//! Datagram sockets of an engine's own, each towards one address: so that what comes back names its
//! flow, and what ICMP says does too.

use std::cell::Cell;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Instant;

use strowger_contract::{CloseCause, Endpoint, Frame, Outbox, PeerChange, Protocol, Transport};
use tokio::task::AbortHandle;

use super::{Batch, Host, State};
use crate::observe::Direction;
use crate::runtime::datagram::{BATCH, DatagramPort};
use crate::runtime::sys::RecvBatch;

/// Batches that one socket may receive before the others have their turn.
const BATCHES_PER_TURN: usize = 4;

/// One socket.
struct Outward {
    port: Rc<DatagramPort>,
    remote: SocketAddr,
    /// Its task must say nothing more, though it may be under way: the number may be another's.
    closed: Rc<Cell<bool>>,
    task: AbortHandle,
}

impl Drop for Outward {
    fn drop(&mut self) {
        self.closed.set(true);
        self.task.abort();
    }
}

/// The sockets of one engine, by its numbers.
#[derive(Default)]
pub(super) struct Outwards {
    open: HashMap<u32, Outward>,
    /// Those that something is to be sent through with the next flush.
    dirty: Vec<Rc<DatagramPort>>,
    /// What all of them receive into; made with the first.
    received: Option<Rc<std::cell::RefCell<RecvBatch>>>,
}

impl Outwards {
    /// Closes one; what is to be sent through it still goes.
    pub(super) fn close(&mut self, number: u32) {
        self.open.remove(&number);
    }

    /// All, by the engine's numbers, with whom they speak to.
    pub(super) fn all(&self) -> impl Iterator<Item = (u32, SocketAddr, &DatagramPort)> {
        self.open.iter().map(|(number, open)| (*number, open.remote, &*open.port))
    }

    /// Closes all.
    pub(super) fn clear(&mut self) {
        self.open.clear();
        self.dirty.clear();
    }

    /// One that something is to be sent through.
    pub(super) fn next_dirty(&mut self) -> Option<Rc<DatagramPort>> {
        self.dirty.pop()
    }
}

impl<P: Protocol> Batch<'_, P> {
    pub(super) fn open_outward(&mut self, number: u32, to: SocketAddr) {
        let port = match DatagramPort::outward(to) {
            Ok(port) => Rc::new(port),
            Err(error) => {
                let ours = !matches!(
                    error.raw_os_error(),
                    Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES)
                );
                let cause = if ours { CloseCause::Local } else { CloseCause::Unreachable };
                self.count("outward_not_opened");
                let news = (Endpoint::Outward(number), PeerChange::Closed(cause));
                return self.state.news.push_back(news);
            }
        };
        self.host.enter_outward(self.state, number, port, to);
    }

    pub(super) fn send_outward(&mut self, number: u32, frame: &Frame, out: &Outbox) {
        let Some(Outward { port, remote, .. }) = self.state.outwards.open.get(&number) else {
            return self.state.metrics.send_failed("no_socket");
        };
        let (port, remote) = (Rc::clone(port), *remote);
        let bytes = out.bytes(&frame.bytes);
        self.state.tap.see(self.now, Direction::Out, Transport::Udp, port.local, remote, bytes);
        if port.want(remote, frame.bytes.clone()) {
            self.state.outwards.dirty.push(port);
        }
    }
}

impl<P: Protocol> Host<P> {
    /// Receives through a socket of the engine's own from now on.
    pub(super) fn enter_outward(
        self: &Rc<Self>,
        state: &mut State<P>,
        number: u32,
        port: Rc<DatagramPort>,
        remote: SocketAddr,
    ) {
        let outwards = &mut state.outwards;
        let received =
            outwards.received.get_or_insert_with(|| Rc::new(RecvBatch::new(BATCH).into()));
        let closed = Rc::new(Cell::new(false));
        let receiving = receive(
            Rc::clone(self),
            Rc::clone(&port),
            Rc::clone(received),
            number,
            Rc::clone(&closed),
        );
        let (host, stop) = (Rc::clone(self), self.stop.clone());
        let task = tokio::task::spawn_local(async move {
            let _alarm = host.alarm();
            tokio::select! {
                () = stop.cancelled() => {}
                () = receiving => {}
            }
        });
        let task = task.abort_handle();
        outwards.open.insert(number, Outward { port, remote, closed, task });
    }
}

async fn receive<P: Protocol>(
    host: Rc<Host<P>>,
    port: Rc<DatagramPort>,
    received: Rc<std::cell::RefCell<RecvBatch>>,
    number: u32,
    closed: Rc<Cell<bool>>,
) {
    let mut errors = Vec::new();
    while port.wait(&mut errors).await.is_ok() && !closed.get() {
        if !errors.is_empty() {
            host.unreachable(&mut errors, |_| Endpoint::Outward(number));
        }
        while !closed.get() && !turn(&host, &port, &mut received.borrow_mut(), number, &closed) {
            tokio::task::yield_now().await;
        }
    }
}

/// Receives a few batches; whether nothing is left.
fn turn<P: Protocol>(
    host: &Rc<Host<P>>,
    port: &Rc<DatagramPort>,
    batch: &mut RecvBatch,
    number: u32,
    closed: &Cell<bool>,
) -> bool {
    for _ in 0..BATCHES_PER_TURN {
        let count = match port.try_receive(batch) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
            // What ICMP said of an earlier datagram is told once here as well.
            Err(_) => continue,
        };
        host.batch(Instant::now(), |engine| {
            for index in 0..count {
                match batch.datagram(index) {
                    Some((remote, bytes)) => engine.outward(number, port, remote, bytes),
                    None => engine.truncated(),
                }
            }
        });
        if closed.get() || count < BATCH {
            return true;
        }
    }
    false
}
