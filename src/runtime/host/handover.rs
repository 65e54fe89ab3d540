//! A listener on one worker goes to another process, or comes from one.

use std::cell::RefMut;
use std::io;
use std::net::TcpStream as StdTcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use strowger_contract::handover::by_clock;
use strowger_contract::{Endpoint, Engine, FlowId, Links, PeerFacts, Protocol, Transport};
use tokio::net::{TcpStream, UnixStream};

use super::{Begun, Dial, Host, Next, State};
use crate::runtime::datagram::DatagramPort;
use crate::runtime::handover::{
    Giver, Legacy, SavedCut, SavedFlow, SavedLetter, SavedStage, clock,
};
use crate::runtime::intake::TakenIn;
use crate::runtime::link::LinkId;
use crate::runtime::mailbox::{Letters, Mail};
use crate::runtime::socket::Stream;
use crate::runtime::splice::{Relay, bridge};
use crate::runtime::stream::{Connection, Fate};
use crate::runtime::websocket::WebSocket;

/// A connection that came from another process, and what its task is to do with it.
pub(crate) enum Inherited<P: Protocol> {
    /// Nobody has heard of it yet.
    Fresh(Box<TakenIn>),
    /// It goes on.
    Begun(Begun<P>),
    /// It is a link to a backend.
    Link(LinkId, Rc<Connection>),
}

/// The other ends of connections whose TLS stays here, until it is known whether they go.
pub(crate) type Bridges = Vec<(Rc<Connection>, UnixStream)>;

impl<P: Protocol> Host<P> {
    /// Writes out all that this listener has on this worker. Nothing changes by it; `None` if the
    /// protocol knows no hand-over.
    pub(crate) fn save(&self, giver: &Giver) -> io::Result<Option<Bridges>> {
        // What is queued after this is the new process's to write.
        self.write_dirty(&mut self.cell.borrow_mut());
        let state = self.cell.borrow();
        let Some(saved) = by_clock(clock(), || state.engine.save()) else { return Ok(None) };
        let unix_clients = self.shared.unix_clients.load(Ordering::Relaxed);
        giver.engine(unix_clients, state.flows.generations(), saved)?;
        let mut bridges = Bridges::new();
        for connection in state.flows.all().chain(state.links.connections()) {
            if P::LINKS == Links::None {
                save_raw(connection, giver)?;
            } else if !connection.has_left() {
                save_cut(connection, giver, &mut bridges)?;
            }
        }
        self.save_parked(giver)?;
        for (number, remote, port) in state.outwards.all() {
            giver.outward(number, remote, port.fd())?;
        }
        for ((backend, lane), waiting) in state.links.waiting() {
            giver.dial(Endpoint::link(backend, lane), waiting)?;
        }
        for ((transport, address), waiting) in &state.dialing {
            let (transport, address) = (*transport, *address);
            giver.dial(Endpoint::Remote { transport, address }, waiting)?;
        }
        let mut letters = Letters::default();
        let mailbox = &self.shared.mailboxes[usize::from(self.worker.0)];
        mailbox.look(&mut letters);
        for mail in &letters.mail {
            if let Some(letter) = saved_letter(mail, &letters.bytes) {
                giver.letter(letter)?;
            }
        }
        Ok(Some(bridges))
    }

    /// The other process has what [`Host::save`] wrote: no more is accepted, received or timed here,
    /// and all that went is let go of.
    pub(crate) fn leave(&self, giver: &Giver, bridges: Bridges) {
        *self.late.borrow_mut() = Some(giver.clone());
        self.left.cancel();
        let mut state = self.state();
        // A raw engine goes on with the flows that stay: those over TLS.
        state.muted = P::LINKS != Links::None;
        self.shared.in_progress[usize::from(self.worker.0)].store(0, Ordering::Relaxed);
        state.outwards.clear();
        self.forget_parked();
        for (connection, stream) in bridges {
            connection.leave_to(Fate::Bridge(stream));
        }
        for connection in state.flows.all().chain(state.links.connections()) {
            let plain = connection.stream.plain_fd().is_some();
            let goes = if P::LINKS == Links::None { goes_raw(connection) } else { plain };
            if goes && !connection.has_left() {
                connection.leave_to(Fate::Gone);
            }
        }
    }

    /// Whether another process has this listener.
    pub(crate) fn has_left(&self) -> bool {
        self.left.is_cancelled()
    }

    /// A connection that was still on its way in when another process took the listener over: it is
    /// sent after. Gives it back if it is to stay here.
    pub(crate) async fn send_after(
        self: &Rc<Self>,
        taken: TakenIn,
        transport: Transport,
    ) -> Option<TakenIn> {
        let Some(giver) = self.late.borrow().clone() else { return Some(taken) };
        let TakenIn { stream, remote, local, facts, early, websocket } = taken;
        let unix = !matches!(stream, Stream::Tcp(_));
        let in_frames = websocket.is_some();
        let stage = SavedStage::Fresh { facts: facts.clone(), early: early.clone(), in_frames };
        let flow = SavedFlow { remote, local, transport, unix, stage };
        if let Some(fd) = stream.plain_fd() {
            if giver.flow(flow, &[fd]).is_err() {
                // Nobody is there to take it: its own side hears of it.
                stream.reset_on_close();
            }
            return None;
        }
        if P::LINKS == Links::None {
            return Some(TakenIn { stream, remote, local, facts, early, websocket: None });
        }
        if let Ok((near, far)) = pair()
            && giver.flow(flow, &[far.as_fd()]).is_ok()
        {
            drop(far);
            bridge(self, &stream, near).await;
        }
        None
    }

    /// Takes over what another process had, without a word to anybody: the engine's wishes wait for
    /// the next batch, and the connections' tasks are the caller's to start.
    ///
    /// # Errors
    /// It cannot be read, or descriptors are missing.
    pub(crate) fn inherit(self: &Rc<Self>, legacy: Legacy) -> Result<Vec<Inherited<P>>, String> {
        let Legacy { engine, unix_clients, generations, flows, outwards, letters, dials } = legacy;
        self.state().flows.number(&generations);
        self.shared.unix_clients.fetch_max(unix_clients, Ordering::Relaxed);
        let mut inherited = Vec::with_capacity(flows.len());
        for (flow, fds) in flows {
            let one = self.enter(flow, fds).map_err(|error| format!("a connection: {error}"))?;
            inherited.push(one);
        }
        self.state().flows.settle();
        for (number, remote, fd) in outwards {
            let port = DatagramPort::inherited(fd).map_err(|error| format!("a flow: {error}"))?;
            self.enter_outward(&mut self.cell.borrow_mut(), number, Rc::new(port), remote);
        }
        if let Some(saved) = engine {
            let now = Instant::now();
            let mut state = self.cell.borrow_mut();
            let State { engine, router, out, .. } = &mut *state;
            router.refresh();
            by_clock(clock(), || engine.restore(now, &saved, router, out))
                .map_err(|error| format!("the engine of {}: {error}", self.shared.name))?;
        }
        let mut state = self.cell.borrow_mut();
        for (to, waiting) in dials {
            match to {
                Endpoint::Backend(_) | Endpoint::Lane(..) => {
                    if let Some(link) = to.as_link()
                        && state.links.await_link(link, &waiting)
                    {
                        state.dials.push(Dial::Link(link));
                    }
                }
                Endpoint::Remote { transport, address } => {
                    state.dialing.insert((transport, address), waiting);
                    state.dials.push(Dial::Remote(transport, address));
                }
                _ => {}
            }
        }
        for letter in letters {
            let mailbox = &self.shared.mailboxes[usize::from(self.worker.0)];
            // It was in a mailbox of the same size.
            let _full = restore_letter(mailbox, letter);
        }
        Ok(inherited)
    }

    /// Makes a connection out of what another process had of it.
    pub(crate) fn enter(
        self: &Rc<Self>,
        flow: SavedFlow,
        fds: Vec<OwnedFd>,
    ) -> io::Result<Inherited<P>> {
        let SavedFlow { remote, local, transport, unix, stage } = flow;
        let mut fds = fds.into_iter();
        let stream = stream_of(fds.next(), unix)?;
        match stage {
            SavedStage::Fresh { facts, early, in_frames } => {
                let websocket = in_frames.then(|| self.frames_of(&[]));
                let taken = TakenIn { stream, remote, local, facts, early, websocket };
                Ok(Inherited::Fresh(Box::new(taken)))
            }
            SavedStage::Cut(cut) => {
                let connection = Connection::new(stream, cut.endpoint, remote, local, transport);
                let SavedCut {
                    endpoint,
                    partial,
                    unfinished_frames,
                    waiting,
                    closing,
                    began,
                    last_read,
                } = cut;
                if let Some(unfinished) = unfinished_frames {
                    // It is new: there is none.
                    let _none = connection.websocket.set(self.frames_of(&unfinished));
                }
                connection.restore(waiting, closing);
                connection.partial.replace(partial);
                connection.began.set(began);
                connection.last_read.set(last_read);
                // Whether it was is not handed over; one message too many at its end harms nobody.
                connection.handed_over.set(true);
                match endpoint {
                    Endpoint::Client(flow) => {
                        self.begun(flow, connection, Next::Cut(Vec::new())).map(Inherited::Begun)
                    }
                    Endpoint::Backend(backend) => self.enter_link((backend, 0), connection),
                    Endpoint::Lane(backend, lane) => self.enter_link((backend, lane), connection),
                    _ => Err(io::ErrorKind::InvalidData.into()),
                }
            }
            SavedStage::Joined { flow, relay } => {
                let endpoint = Endpoint::Client(flow);
                let connection = Connection::new(stream, endpoint, remote, local, transport);
                let backend = stream_of(fds.next(), relay.unix)?;
                let relay = Relay::restored(self, &connection, backend, relay);
                self.begun(flow, connection, Next::Relay(relay)).map(Inherited::Begun)
            }
        }
    }

    /// The frames of a connection that another process had.
    fn frames_of(&self, unfinished: &[u8]) -> Box<WebSocket> {
        Box::new(WebSocket::resumed(&self.state().spec.websocket, unfinished))
    }

    fn enter_link(&self, link: LinkId, connection: Rc<Connection>) -> io::Result<Inherited<P>> {
        // It was used already.
        connection.proven.set(true);
        self.state().links.inherit(link, Rc::clone(&connection));
        Ok(Inherited::Link(link, connection))
    }

    fn begun(
        &self,
        flow: FlowId,
        connection: Rc<Connection>,
        next: Next<P>,
    ) -> io::Result<Begun<P>> {
        let limit = self.state().spec.limits.per_source;
        // It is there already, whatever the limit is now.
        let limit = if limit == 0 { 0 } else { u32::MAX };
        let place = self.shared.source_place(connection.remote.ip(), limit);
        let place = place.unwrap_or_else(|| self.shared.no_place(connection.remote.ip()));
        let mut state: RefMut<'_, State<P>> = self.state();
        if !state.flows.put(flow, Rc::clone(&connection)) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "its number makes no sense"));
        }
        let key = (connection.transport, connection.remote);
        if P::LINKS != Links::None {
            state.remotes.insert(key, Rc::clone(&connection));
        }
        state.metrics.connection_opened();
        Ok(Begun { flow, connection, next, source: place })
    }
}

fn pair() -> io::Result<(UnixStream, StdUnixStream)> {
    let (near, far) = StdUnixStream::pair()?;
    near.set_nonblocking(true)?;
    far.set_nonblocking(true)?;
    Ok((UnixStream::from_std(near)?, far))
}

fn stream_of(fd: Option<OwnedFd>, unix: bool) -> io::Result<Stream> {
    let fd = fd.ok_or(io::ErrorKind::InvalidData)?;
    Ok(if unix {
        Stream::Unix(UnixStream::from_std(StdUnixStream::from(fd))?)
    } else {
        Stream::Tcp(TcpStream::from_std(StdTcpStream::from(fd))?)
    })
}

/// Whether a raw flow goes: nothing of it is sealed in this process.
fn goes_raw(connection: &Connection) -> bool {
    let more = connection.more.borrow();
    let Some(more) = &*more else { return false };
    let mut goes = more.fresh.is_some() && connection.stream.plain_fd().is_some();
    if let Some(relay) = more.relay.as_ref().and_then(std::rc::Weak::upgrade) {
        relay.save(&mut |_, _| goes = true);
    }
    goes
}

fn saved_flow(connection: &Connection, stage: SavedStage) -> SavedFlow {
    SavedFlow {
        remote: connection.remote,
        local: connection.local,
        transport: connection.transport,
        unix: !matches!(connection.stream, Stream::Tcp(_)),
        stage,
    }
}

fn save_raw(connection: &Rc<Connection>, giver: &Giver) -> io::Result<()> {
    let Endpoint::Client(flow) = connection.endpoint else { return Ok(()) };
    let more = connection.more.borrow();
    let Some(more) = more.as_ref().filter(|more| more.fate.is_none()) else { return Ok(()) };
    if let Some(relay) = more.relay.as_ref().and_then(std::rc::Weak::upgrade) {
        let mut result = Ok(());
        relay.save(&mut |relay, fds| {
            let stage = SavedStage::Joined { flow, relay };
            result = giver.flow(saved_flow(connection, stage), &fds);
        });
        return result;
    }
    match (&more.fresh, connection.stream.plain_fd()) {
        (Some(fresh), Some(fd)) if !connection.is_closing() => {
            let (facts, early): (PeerFacts, Vec<u8>) = (**fresh).clone();
            let stage = SavedStage::Fresh { facts, early, in_frames: false };
            giver.flow(saved_flow(connection, stage), &[fd])
        }
        _ => Ok(()),
    }
}

fn save_cut(connection: &Rc<Connection>, giver: &Giver, bridges: &mut Bridges) -> io::Result<()> {
    let (waiting, closing) = connection.waiting();
    let stage = SavedStage::Cut(SavedCut {
        endpoint: connection.endpoint,
        partial: connection.partial.borrow().clone(),
        unfinished_frames: connection.websocket.get().map(|frames| frames.unfinished()),
        waiting,
        closing,
        began: connection.began.get(),
        last_read: connection.last_read.get(),
    });
    let flow = saved_flow(connection, stage);
    if let Some(fd) = connection.stream.plain_fd() {
        return giver.flow(flow, &[fd]);
    }
    let (near, far) = pair()?;
    giver.flow(flow, &[far.as_fd()])?;
    bridges.push((Rc::clone(connection), near));
    Ok(())
}

fn saved_letter(mail: &Mail, arena: &[u8]) -> Option<SavedLetter> {
    Some(match mail {
        Mail::Message { from, transport, remote, local, arrived, bytes } => SavedLetter::Message {
            from: *from,
            transport: *transport,
            remote: *remote,
            local: *local,
            arrived: *arrived,
            bytes: arena[bytes.clone()].to_vec(),
        },
        Mail::Send { to, sender, bytes } => {
            SavedLetter::Send { to: *to, sender: sender.0, bytes: arena[bytes.clone()].to_vec() }
        }
        Mail::Peer(peer, change) => SavedLetter::Peer(*peer, *change),
        Mail::Close(peer, how) => SavedLetter::Close(*peer, *how),
        // The engine there asks again.
        Mail::Resolved(..) => return None,
    })
}

fn restore_letter(mailbox: &crate::runtime::mailbox::Mailbox, letter: SavedLetter) -> bool {
    match letter {
        SavedLetter::Message { from, transport, remote, local, arrived, bytes } => mailbox
            .put(&bytes, |bytes| Mail::Message { from, transport, remote, local, arrived, bytes }),
        SavedLetter::Send { to, sender, bytes } => {
            let sender = strowger_contract::WorkerId(sender);
            mailbox.put(&bytes, |bytes| Mail::Send { to, sender, bytes })
        }
        SavedLetter::Peer(peer, change) => mailbox.put(&[], |_| Mail::Peer(peer, change)),
        SavedLetter::Close(peer, how) => mailbox.put(&[], |_| Mail::Close(peer, how)),
    }
}
