//! Raw flows that are idle: of each there are its two descriptors and a few numbers, side by side in
//! one table, and one epoll instance watches them all. A task, a timer, and the runtime's own record of
//! each socket would be several times as much, and most flows of a big listener are idle.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use slab::Slab;
use strowger_contract::{CloseCause, Endpoint, FlowId, Protocol, Transport};
use tokio::io::unix::AsyncFd;

use super::{Begun, Host, Next};
use crate::runtime::handover::{Giver, SavedFlow, SavedRelay, SavedStage};
use crate::runtime::launch::{Taken, resume, spawn};
use crate::runtime::shared::SourcePlace;
use crate::runtime::socket::Stream;
use crate::runtime::splice::{Quiet, Relay};
use crate::runtime::stream::Connection;
use crate::runtime::sys::{return_memory, watched_epoll};

/// How often idle flows are looked at for their timeouts. [`Relay`] parks none that ends sooner than
/// a few of these.
pub(crate) const SWEEP_EVERY: Duration = Duration::from_millis(500);

/// Flows that one look at the kernel wakes, at most.
const WAKES_PER_TURN: usize = 64;

/// Flows that are looked at together for their timeouts: under a millisecond.
const LOOKED_AT_MAX: usize = 1 << 16;

/// The allocator is asked to give pages back once so many flows were parked since, ...
const RETURN_AFTER: usize = 1_000;

/// ... or so many and no more came lately, ...
const RETURN_AFTER_QUIET: usize = 64;

/// ... and so much time has passed: it holds the worker for some milliseconds.
const RETURN_EVERY: Duration = Duration::from_secs(5);

/// Whether the process's allocator may be asked now: it is one for all listeners and workers.
fn claims_return(now: Instant) -> bool {
    static LAST: Mutex<Option<Instant>> = Mutex::new(None);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    let is_due = last.is_none_or(|last| now.saturating_duration_since(last) >= RETURN_EVERY);
    if is_due {
        *last = Some(now);
    }
    is_due
}

/// One idle flow.
struct Parked {
    flow: FlowId,
    client: OwnedFd,
    backend: OwnedFd,
    remote: SocketAddr,
    local: SocketAddr,
    transport: Transport,
    quiet: Quiet,
    source: SourcePlace,
    place: Taken,
}

/// All idle flows of one listener on one worker.
#[derive(Default)]
pub(super) struct Lot {
    parked: Slab<Parked>,
    /// Made with the first one.
    watch: Option<Rc<AsyncFd<OwnedFd>>>,
    /// Where the search for those whose time is over goes on.
    looked_at: usize,
    since_return: usize,
    /// The same, at the last look.
    was_since_return: usize,
}

impl Lot {
    /// Enters a flow; where it is, and whether it could be watched.
    fn enter(&mut self, parked: Parked) -> (u32, bool) {
        let key = self.parked.insert(parked);
        let watched = self.watch.as_ref().is_some_and(|watch| {
            let (flags, data) =
                (EventFlags::IN | EventFlags::RDHUP, EventData::new_u64(key as u64));
            let Parked { client, backend, .. } = &self.parked[key];
            [client, backend]
                .iter()
                .all(|side| epoll::add(watch.get_ref(), side, data, flags).is_ok())
        });
        self.since_return += 1;
        (key as u32, watched)
    }

    /// Those whose time is over, of a part of all: one look must not hold the worker.
    fn over(&mut self, now: Instant, idle: impl Fn(Duration) -> Duration) -> Vec<u32> {
        let end = self.parked.capacity();
        let from = if self.looked_at < end { self.looked_at } else { 0 };
        let to = end.min(from + LOOKED_AT_MAX);
        self.looked_at = to;
        let late = |key: &usize| {
            self.parked.get(*key).is_some_and(|parked| parked.quiet.is_over(now, &idle))
        };
        (from..to).filter(late).map(|key| key as u32).collect()
    }

    /// Whether it is time to have the allocator give pages back.
    fn is_to_return(&mut self, now: Instant) -> bool {
        let since = self.since_return;
        let is_quiet = std::mem::replace(&mut self.was_since_return, since) == since;
        let is_worth = since >= RETURN_AFTER || is_quiet && since >= RETURN_AFTER_QUIET;
        let is_due = is_worth && claims_return(now);
        if is_due {
            self.since_return = 0;
        }
        is_due
    }

    fn take(&mut self, key: u32) -> Option<Parked> {
        let parked = self.parked.try_remove(key as usize)?;
        if let Some(watch) = &self.watch {
            // They stay open, and must not wake anybody here.
            let _watched = epoll::delete(watch.get_ref(), &parked.client);
            let _watched = epoll::delete(watch.get_ref(), &parked.backend);
        }
        Some(parked)
    }
}

fn watch() -> std::io::Result<AsyncFd<OwnedFd>> {
    watched_epoll(epoll::create(CreateFlags::CLOEXEC)?)
}

/// Makes the close of a side a reset.
fn reset_on_close(side: &OwnedFd) {
    // A failure means that the other side was first.
    let _gone = socket2::SockRef::from(side).set_linger(Some(Duration::ZERO));
}

/// Streams of a flow's two descriptors again. If that cannot be, both are reset: who sees an end where
/// there was none takes half an answer for a whole one.
fn streams(
    client: OwnedFd,
    backend: OwnedFd,
    unix: (bool, bool),
) -> std::io::Result<(Stream, Stream)> {
    // A stream that is refused is closed at once, so this comes before.
    reset_on_close(&client);
    reset_on_close(&backend);
    let streams = (Stream::of_plain(client, unix.0)?, Stream::of_plain(backend, unix.1)?);
    for side in [streams.0.plain_fd(), streams.1.plain_fd()].into_iter().flatten() {
        let _gone = socket2::SockRef::from(&side).set_linger(None);
    }
    Ok(streams)
}

impl<P: Protocol> Host<P> {
    /// Parks a flow whose task has ended because nothing passed.
    pub(super) fn park(
        self: &Rc<Self>,
        flow: FlowId,
        relay: Rc<std::cell::RefCell<Relay<P>>>,
        source: SourcePlace,
        place: Taken,
    ) {
        // Its task had the last handle of each; who else has one is the table of flows.
        let Some((connection, backend, quiet)) = Relay::take_apart(relay) else {
            return self.ended(flow, CloseCause::Local);
        };
        // The table's handle of the connection goes.
        self.state().flows.park(flow, u32::MAX);
        let (remote, local, transport) =
            (connection.remote, connection.local, connection.transport);
        let client = Rc::try_unwrap(connection).ok().and_then(|one| one.stream.into_plain());
        let (Some(client), Some(backend)) = (client, backend.into_plain()) else {
            return self.ended(flow, CloseCause::Local);
        };
        let parked =
            Parked { flow, client, backend, remote, local, transport, quiet, source, place };
        let is_first = self.lot.borrow().watch.is_none();
        if is_first && let Ok(watch) = watch() {
            let watch = Rc::new(watch);
            self.lot.borrow_mut().watch = Some(Rc::clone(&watch));
            let _lasts = spawn(self, Rc::clone(self).tend(watch));
            let _lasts = spawn(self, Rc::clone(self).sweep());
        }
        let (key, watched) = self.lot.borrow_mut().enter(parked);
        self.state().flows.park(flow, key);
        if watched {
            return self.count("flow_parked");
        }
        // The kernel watches no more descriptors: the flow keeps its memory.
        let parked = self.lot.borrow_mut().take(key);
        if let Some(mut parked) = parked {
            parked.quiet.park = Duration::ZERO;
            let _goes_on = self.revive(parked);
        }
    }

    /// Goes on with a flow that was parked.
    pub(super) fn unpark(self: &Rc<Self>, key: u32) -> Option<Rc<Connection>> {
        let parked = self.lot.borrow_mut().take(key)?;
        self.revive(parked)
    }

    /// All of them: what comes next is for their tasks to see.
    pub(crate) fn unpark_all(self: &Rc<Self>) {
        let keys: Vec<u32> = self.lot.borrow().parked.iter().map(|(key, _)| key as u32).collect();
        for key in keys {
            let _kicked_with_all = self.unpark(key);
        }
    }

    fn revive(self: &Rc<Self>, parked: Parked) -> Option<Rc<Connection>> {
        let Parked { flow, client, backend, remote, local, transport, quiet, source, place } =
            parked;
        let unix = (transport == Transport::Unix, quiet.unix);
        let Ok((client, backend)) = streams(client, backend, unix) else {
            // The kernel watches no more descriptors.
            self.count("flow_not_woken");
            self.ended(flow, CloseCause::Local);
            return None;
        };
        let connection = Connection::new(client, Endpoint::Client(flow), remote, local, transport);
        self.state().flows.set(flow, Rc::clone(&connection));
        let next = Next::Relay(Relay::woken(self, &connection, backend, quiet));
        let begun = Begun { flow, connection: Rc::clone(&connection), next, source };
        resume(self, begun, place);
        Some(connection)
    }

    /// Wakes flows as their sides speak. Never ends.
    async fn tend(self: Rc<Self>, watch: Rc<AsyncFd<OwnedFd>>) {
        let mut events: Vec<Event> = Vec::with_capacity(WAKES_PER_TURN);
        let at_once = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        while let Ok(mut ready) = watch.readable().await {
            events.clear();
            let room = rustix::buffer::spare_capacity(&mut events);
            let found = epoll::wait(watch.get_ref(), room, Some(&at_once)).unwrap_or(0);
            if found < WAKES_PER_TURN {
                ready.clear_ready();
            }
            for event in &events {
                // The other side of the same flow may have been first.
                let _goes_on = self.unpark(event.data.u64() as u32);
            }
            if found == WAKES_PER_TURN {
                tokio::task::yield_now().await;
            }
        }
    }

    /// Ends flows whose time is over, and gives memory back. Never ends.
    async fn sweep(self: Rc<Self>) {
        loop {
            tokio::time::sleep(SWEEP_EVERY).await;
            let now = Instant::now();
            let over = self.lot.borrow_mut().over(now, |silence| self.shared.core.idle(silence));
            for key in over {
                let parked = self.lot.borrow_mut().take(key);
                if let Some(parked) = parked {
                    reset_on_close(&parked.client);
                    reset_on_close(&parked.backend);
                    self.ended(parked.flow, CloseCause::Idle);
                }
            }
            if self.lot.borrow_mut().is_to_return(now) {
                return_memory();
            }
        }
    }

    /// Writes idle flows out for another process.
    pub(super) fn save_parked(&self, giver: &Giver) -> std::io::Result<()> {
        for (_, parked) in &self.lot.borrow().parked {
            let Parked { flow, remote, local, transport, ref quiet, .. } = *parked;
            let relay: SavedRelay = quiet.saved();
            let saved = SavedFlow {
                remote,
                local,
                transport,
                unix: transport == Transport::Unix,
                stage: SavedStage::Joined { flow, relay },
            };
            giver.flow(saved, &[parked.client.as_fd(), parked.backend.as_fd()])?;
        }
        Ok(())
    }

    /// Another process has them.
    pub(super) fn forget_parked(&self) {
        // With the epoll instance: the descriptors are open in the other process, and would still wake.
        let parked = std::mem::take(&mut *self.lot.borrow_mut());
        drop(parked);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let far = TcpStream::connect(listener.local_addr().expect("bound")).expect("it listens");
        (listener.accept().expect("it came").0, far)
    }

    fn plain(near: TcpStream) -> OwnedFd {
        near.set_nonblocking(true).expect("an option");
        near.into()
    }

    /// What epoll does not take (here a file) stands for what it has no room for.
    #[tokio::test]
    async fn what_cannot_be_woken_is_reset() {
        let unwatchable = || -> OwnedFd {
            let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK;
            let own = std::env::current_exe().expect("this test's own file");
            rustix::fs::open(own, flags, rustix::fs::Mode::empty()).expect("it is there")
        };
        for is_client in [true, false] {
            let (near, mut far) = pair();
            let (client, backend) = match is_client {
                true => (plain(near), unwatchable()),
                false => (unwatchable(), plain(near)),
            };
            assert!(streams(client, backend, (false, false)).is_err());
            let told = far.read(&mut [0; 1]).expect_err("no end in order");
            assert_eq!(told.kind(), std::io::ErrorKind::ConnectionReset);
        }
    }

    /// Who was woken ends in order as before.
    #[tokio::test]
    async fn what_is_woken_ends_in_order() {
        let ((client, mut one), (backend, mut other)) = (pair(), pair());
        let woken = streams(plain(client), plain(backend), (false, false)).expect("watched");
        drop(woken);
        for far in [&mut one, &mut other] {
            assert_eq!(far.read(&mut [0; 1]).expect("an end"), 0);
        }
    }
}
