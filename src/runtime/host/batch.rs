//! Engine calls whose wishes are carried out together.

use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use strowger_contract::{
    BackendId, CloseCause, Closing, Command, Endpoint, Engine, Frame, Lookup, LookupId, Message,
    Note, Opened, Outbox, PeerChange, Protocol, Router, Transport, WorkerId,
};

use super::{CUT_OFF_FACTOR, Dial, Host, State, context};
use crate::observe::Direction;
use crate::routing::Grant;
use crate::runtime::datagram::DatagramPort;
use crate::runtime::link::LinkId;
use crate::runtime::mailbox::Mail;
use crate::runtime::resolve::Answer;
use crate::runtime::shared::NodeEvent;
use crate::runtime::stream::Connection;

/// Rounds of "the engine wants something, which tells the engine something" in one settling. An
/// engine that answers every closed link by a send to a closed link would go round for ever.
const SETTLE_ROUNDS_MAX: usize = 100_000;

/// Bytes for one stream that do not wait for the others.
const WRITTEN_AT_ONCE: usize = 64 * 1_024;

/// Engine calls whose wishes are carried out together.
pub(crate) struct Batch<'a, P: Protocol> {
    pub(super) host: &'a Rc<Host<P>>,
    pub(super) state: &'a mut State<P>,
    pub(super) now: Instant,
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

    /// A datagram that came to a socket of the engine's own.
    pub(crate) fn outward(
        &mut self,
        number: u32,
        port: &DatagramPort,
        remote: SocketAddr,
        bytes: &[u8],
    ) {
        let message = Message {
            from: Endpoint::Outward(number),
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

    /// Something that has a name happened.
    pub(crate) fn count(&mut self, word: &'static str) {
        let names = self.host.shared.names(&self.state.router);
        self.state.metrics.note(&Note::Count(word), &names);
    }

    /// A datagram that was cut short or came from nowhere.
    pub(crate) fn truncated(&mut self) {
        self.state.metrics.truncated();
    }

    /// A keep-alive's answer.
    pub(crate) fn answer(&mut self, connection: &Rc<Connection>, bytes: &[u8]) {
        self.push(connection, bytes);
    }

    /// A connection opened.
    pub(crate) fn opened(&mut self, peer: Endpoint, opened: Opened<'_>) {
        self.guard(|state, now, out| {
            state.engine.on_opened(now, peer, opened, &mut state.router, out)
        });
    }

    /// A change of a peer.
    pub(crate) fn tell(&mut self, peer: Endpoint, change: PeerChange) {
        self.guard(|state, now, out| {
            state.engine.on_peer(now, peer, change, &mut state.router, out)
        });
    }

    pub(super) fn mail(&mut self, mail: &Mail, arena: &[u8]) {
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
            Mail::Resolved(id, answer) => self.resolved(*id, answer),
        }
    }

    /// A name was found, or not.
    fn resolved(&mut self, id: LookupId, answer: &Answer) {
        let found = answer.as_deref().map_err(|why| *why);
        self.guard(|state, now, out| {
            state.engine.on_resolved(now, id, found, &mut state.router, out)
        });
    }

    /// What is known already is told within this batch; the rest comes by the mailbox, since whoever
    /// asks name servers runs on another thread.
    fn resolve(&mut self, id: LookupId, lookup: &Lookup, host: &[u8]) {
        let resolver = &self.host.shared.resolver;
        if let Some(answer) = resolver.known(host, lookup) {
            return self.state.answers.push_back((id, answer));
        }
        let (shared, worker) = (Arc::clone(&self.host.shared), self.host.worker);
        let reply = move |answer| {
            if let Some(mailbox) = shared.mailboxes.get(usize::from(worker.0)) {
                // Who waits for a lost answer waits for a bounded time.
                let _full = mailbox.put(&[], |_| Mail::Resolved(id, answer));
            }
        };
        resolver.ask(host, lookup, Box::new(reply));
    }

    /// Calls the engine so that its panic costs the engine and not the worker.
    pub(super) fn guard(&mut self, call: impl FnOnce(&mut State<P>, Instant, &mut Outbox)) {
        if self.state.muted {
            return;
        }
        let mut out = std::mem::take(&mut self.state.out);
        let result = catch_unwind(AssertUnwindSafe(|| call(self.state, self.now, &mut out)));
        self.state.out = out;
        if result.is_err() {
            self.replace_engine();
        }
    }

    /// Asks the engine something, so that its panic costs the engine and not the worker.
    pub(crate) fn ask<R>(&mut self, instead: R, question: impl FnOnce(&P::Engine) -> R) -> R {
        match catch_unwind(AssertUnwindSafe(|| question(&self.state.engine))) {
            Ok(answer) => answer,
            Err(_) => {
                self.replace_engine();
                instead
            }
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
            if let Some((id, answer)) = self.state.answers.pop_front() {
                self.resolved(id, &answer);
                continue;
            }
            let Some((peer, change)) = self.state.news.pop_front() else {
                if self.take_grants() {
                    continue;
                }
                return self.write_streams_later();
            };
            self.tell(peer, change);
        }
        self.state.news.clear();
        self.state.answers.clear();
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
            self.host.shared.report(self.now, note);
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
                if let Endpoint::Client(flow) = from
                    && flow.worker() == self.host.worker
                    && let Some(connection) = self.state.flows.get(flow)
                {
                    connection.handed_over.set(true);
                }
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
            Command::HoldOff(peer, lasting) => {
                if let Some((backend, _)) = peer.as_link() {
                    self.host.shared.core.hold_off(self.now, backend, *lasting);
                }
            }
            Command::Proven(peer) => {
                let connection = match peer {
                    Endpoint::Client(flow) => self.state.flows.get(*flow).cloned(),
                    peer => peer.as_link().and_then(|link| self.state.links.open(link)),
                };
                if let Some(connection) = connection {
                    connection.proven.set(true);
                }
            }
            Command::Resolve { id, lookup, host } => self.resolve(*id, lookup, out.bytes(host)),
            Command::OpenOutward(number, to) => self.open_outward(*number, *to),
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
                        let _flushed_with_all = port.want(remote, frame.bytes.clone());
                    }
                    None => self.state.metrics.send_failed("no_socket"),
                }
            }
            Endpoint::Outward(number) => self.send_outward(number, frame, out),
            Endpoint::Client(flow) if flow.worker() != self.host.worker => {
                self.send_afar(flow.worker(), frame, out)
            }
            to => {
                let here = self.host.worker;
                match to.as_link().map(|link| self.host.shared.owner(P::LINKS, link, here)) {
                    Some(owner) if owner != here => self.send_afar(owner, frame, out),
                    _ => self.deliver(to, out.bytes(&frame.bytes), here),
                }
            }
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
                None => {
                    self.state.metrics.send_failed("flow_gone");
                    self.tell_sender(sender, to, CloseCause::End);
                }
            },
            Endpoint::Backend(backend) => self.deliver_to_link((backend, 0), bytes, sender),
            Endpoint::Lane(backend, lane) => self.deliver_to_link((backend, lane), bytes, sender),
            Endpoint::Remote { transport, address } => {
                self.deliver_to_remote(transport, address, bytes)
            }
            Endpoint::Datagram { .. } | Endpoint::Outward(_) => {
                self.state.metrics.send_failed("not_a_stream");
            }
        }
    }

    fn deliver_to_link(&mut self, link: LinkId, bytes: &[u8], sender: WorkerId) {
        use crate::runtime::link::Offer;
        let (backend, lane) = link;
        let limit = CUT_OFF_FACTOR * self.host.queued_bytes_max.get();
        match self.state.links.offer(link, bytes, limit, P::LINKS, self.now) {
            Offer::Open(connection) => self.push(&connection, bytes),
            Offer::Waits => self.see_waiting(backend, bytes),
            Offer::Dial => {
                self.see_waiting(backend, bytes);
                self.state.dials.push(Dial::Link(link));
            }
            Offer::Down(cause) => {
                self.state.metrics.send_failed("link_down");
                self.tell_sender(sender, Endpoint::link(backend, lane), cause);
            }
        }
    }

    /// Tells every worker's engine of a change of a peer that no worker owns.
    pub(super) fn tell_all(&mut self, peer: Endpoint, change: PeerChange) {
        self.tell(peer, change);
        for worker in 0..self.host.shared.mailboxes.len() {
            let worker = WorkerId(worker as u8);
            if worker != self.host.worker {
                self.post(worker, &[], |_| Mail::Peer(peer, change));
            }
        }
    }

    /// Tells whoever sent something that it went nowhere.
    fn tell_sender(&mut self, sender: WorkerId, peer: Endpoint, cause: CloseCause) {
        let change = PeerChange::Closed(cause);
        if sender == self.host.worker {
            self.state.news.push_back((peer, change));
        } else {
            self.post(sender, &[], |_| Mail::Peer(peer, change));
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
        if connection.queued() > WRITTEN_AT_ONCE {
            return self.host.write_in(self.state, connection);
        }
        if !connection.dirty.replace(true) {
            self.state.dirty.push(Rc::clone(connection));
        }
    }

    fn close(&mut self, peer: Endpoint, how: Closing) {
        let connection = match peer {
            Endpoint::Client(flow) if flow.worker() != self.host.worker => {
                return self.post(flow.worker(), &[], |_| Mail::Close(peer, how));
            }
            Endpoint::Client(flow) => {
                if let Some(place) = self.state.flows.parked(flow) {
                    return self.state.unparked.push((place, how));
                }
                self.state.flows.get(flow).cloned()
            }
            Endpoint::Backend(_) | Endpoint::Lane(..) => {
                let Some(link) = peer.as_link() else { return };
                let owner = self.host.shared.owner(P::LINKS, link, self.host.worker);
                if owner != self.host.worker {
                    return self.post(owner, &[], |_| Mail::Close(peer, how));
                }
                self.state.links.open(link)
            }
            Endpoint::Remote { transport, address } => {
                self.state.remotes.get(&(transport, address)).cloned()
            }
            Endpoint::Datagram { .. } => None,
            Endpoint::Outward(number) => return self.state.outwards.close(number),
        };
        if let Some(connection) = connection {
            if how == Closing::Reset && connection.dirty.get() {
                self.host.write_in(self.state, &connection);
            }
            connection.close(how, CloseCause::Local);
        }
    }

    /// One batch per datagram socket, whatever the engine wanted of it. Streams have their turn when all
    /// that is ready was read: see [`Host::write_later`].
    fn flush(&mut self, out: &Outbox) {
        for port in self.host.ports.iter().flatten() {
            self.flush_port(port, out);
        }
        while let Some(port) = self.state.outwards.next_dirty() {
            self.flush_port(&port, out);
        }
    }

    fn flush_port(&mut self, port: &Rc<DatagramPort>, out: &Outbox) {
        let waited = port.is_waiting();
        let sent = port.flush(out);
        crate::runtime::launch::count_sent(&mut self.state.metrics, sent);
        if !waited && port.is_waiting() {
            crate::runtime::launch::drain_port(self.host, port);
        }
    }

    fn write_streams_later(&mut self) {
        if self.state.dirty.is_empty() || self.state.write_is_due {
            return;
        }
        if self.host.stop.is_cancelled() {
            // Nobody comes later.
            return self.host.write_dirty(self.state);
        }
        self.state.write_is_due = true;
        self.host.written.notify_one();
    }
}
