//! Sockets of the load generator: one thread, one epoll, batches of datagrams, whole messages of
//! streams. Times are the caller's; nothing sleeps past what it asks for.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use slab::Slab;
use strowger_contract::{Framer, Framing};

use crate::runtime::sys::{RecvBatch, SendBatch};

/// Datagrams per system call.
const BATCH: usize = 64;

/// What one datagram socket may hold for the kernel before it drops, in bytes. The generator must
/// not be what loses datagrams: the kernel is asked for as much, too.
const SOCKET_BUFFER_BYTES: usize = 8 << 20;

/// What one read takes from a stream.
const READ_BYTES: usize = 256 << 10;

const KIND_DATAGRAM: u64 = 0;
const KIND_LISTENER: u64 = 1;
const KIND_STREAM: u64 = 2;

/// The other end of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Datagram socket so-and-so, and who is behind it.
    Datagram(usize, SocketAddr),
    /// A stream.
    Stream(usize),
}

/// Which role a socket was opened for; the caller's own number.
pub(crate) type Role = usize;

/// What happens on the sockets.
pub(crate) trait Handler {
    /// A stream was opened (by us) or accepted.
    fn opened(&mut self, net: &mut Net, now: Instant, stream: usize, role: Role);
    /// A whole message came.
    fn message(&mut self, net: &mut Net, now: Instant, from: Place, role: Role, bytes: &[u8]);
    /// A stream ended; a connect that failed ends it too.
    fn closed(&mut self, net: &mut Net, now: Instant, stream: usize, role: Role);
}

struct Datagrams {
    socket: UdpSocket,
    role: Role,
    wanted: Vec<(SocketAddr, std::ops::Range<usize>)>,
}

struct Listener {
    socket: TcpListener,
    role: Role,
}

struct Stream {
    socket: TcpStream,
    role: Role,
    inbox: Vec<u8>,
    framer: Box<dyn Framer>,
    outbox: Vec<u8>,
    written: usize,
    connecting: bool,
    waits_for_room: bool,
    dirty: bool,
}

/// All sockets.
pub(crate) struct Net {
    epoll: OwnedFd,
    events: Vec<epoll::Event>,
    datagrams: Vec<Datagrams>,
    listeners: Vec<Listener>,
    streams: Slab<Stream>,
    dirty: Vec<usize>,
    ended: Vec<usize>,
    batch: Option<RecvBatch>,
    send: SendBatch,
    arena: Vec<u8>,
    scratch: Vec<u8>,
    framers: fn() -> Box<dyn Framer>,
    /// Datagrams that the kernel refused: the generator's own loss.
    pub(crate) unsent: u64,
}

impl Net {
    /// No sockets yet. `framers` cuts the streams' bytes.
    pub(crate) fn new(framers: fn() -> Box<dyn Framer>) -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            events: Vec::with_capacity(1_024),
            datagrams: Vec::new(),
            listeners: Vec::new(),
            streams: Slab::new(),
            dirty: Vec::new(),
            ended: Vec::new(),
            batch: Some(RecvBatch::new(BATCH)),
            send: SendBatch::new(BATCH),
            arena: Vec::new(),
            scratch: vec![0; READ_BYTES],
            framers,
            unsent: 0,
        })
    }

    fn watch(&self, fd: impl AsFd, kind: u64, index: usize) -> io::Result<()> {
        let data = epoll::EventData::new_u64(kind << 56 | index as u64);
        Ok(epoll::add(&self.epoll, fd, data, epoll::EventFlags::IN)?)
    }

    /// Opens a datagram socket; its number and address.
    pub(crate) fn bind_datagrams(
        &mut self,
        at: SocketAddr,
        role: Role,
    ) -> io::Result<(usize, SocketAddr)> {
        let socket = UdpSocket::bind(at)?;
        let options = socket2::SockRef::from(&socket);
        options.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
        options.set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
        socket.set_nonblocking(true)?;
        let local = socket.local_addr()?;
        let index = self.datagrams.len();
        self.watch(&socket, KIND_DATAGRAM, index)?;
        self.datagrams.push(Datagrams { socket, role, wanted: Vec::new() });
        Ok((index, local))
    }

    /// Accepts streams at an address; the address bound.
    pub(crate) fn listen(&mut self, at: SocketAddr, role: Role) -> io::Result<SocketAddr> {
        let socket = TcpListener::bind(at)?;
        socket.set_nonblocking(true)?;
        let local = socket.local_addr()?;
        self.watch(&socket, KIND_LISTENER, self.listeners.len())?;
        self.listeners.push(Listener { socket, role });
        Ok(local)
    }

    /// Opens a stream without waiting for it; [`Handler::opened`] or [`Handler::closed`] follows.
    pub(crate) fn connect(&mut self, to: SocketAddr, role: Role) -> io::Result<usize> {
        let socket = socket2::Socket::new(
            socket2::Domain::for_address(to),
            socket2::Type::STREAM,
            Some(socket2::Protocol::TCP),
        )?;
        socket.set_nonblocking(true)?;
        match socket.connect(&to.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            Err(error) => return Err(error),
        }
        let index = self.enter(socket.into(), role, true);
        let data = epoll::EventData::new_u64(KIND_STREAM << 56 | index as u64);
        epoll::add(&self.epoll, &self.streams[index].socket, data, epoll::EventFlags::OUT)?;
        Ok(index)
    }

    fn enter(&mut self, socket: TcpStream, role: Role, connecting: bool) -> usize {
        // Small messages must not wait for acknowledgements; a failure only costs time.
        let _delayed = socket.set_nodelay(true);
        self.streams.insert(Stream {
            socket,
            role,
            inbox: Vec::new(),
            framer: (self.framers)(),
            outbox: Vec::new(),
            written: 0,
            connecting,
            waits_for_room: false,
            dirty: false,
        })
    }

    /// Queues a message; it goes out at the end of the turn.
    pub(crate) fn send(&mut self, to: Place, write: impl FnOnce(&mut Vec<u8>)) {
        match to {
            Place::Datagram(socket, remote) => {
                let start = self.arena.len();
                write(&mut self.arena);
                self.datagrams[socket].wanted.push((remote, start..self.arena.len()));
            }
            Place::Stream(index) => {
                let Some(stream) = self.streams.get_mut(index) else { return };
                write(&mut stream.outbox);
                if !stream.dirty {
                    stream.dirty = true;
                    self.dirty.push(index);
                }
            }
        }
    }

    /// Bytes that wait in a stream.
    pub(crate) fn queued(&self, index: usize) -> usize {
        self.streams.get(index).map_or(0, |stream| stream.outbox.len() - stream.written)
    }

    /// Ends a stream; [`Handler::closed`] is not called for it.
    pub(crate) fn close(&mut self, index: usize) {
        self.flush_stream(index);
        self.streams.try_remove(index);
    }

    /// Lets whatever happens happen for so long.
    pub(crate) fn idle(&mut self, lasting: Duration, handler: &mut dyn Handler) -> io::Result<()> {
        let end = Instant::now() + lasting;
        while Instant::now() < end {
            self.turn(end, handler)?;
        }
        Ok(())
    }

    /// Sends what is wanted, waits for something to happen until `until`, and tells `handler`.
    pub(crate) fn turn(&mut self, until: Instant, handler: &mut dyn Handler) -> io::Result<()> {
        self.flush();
        let wait = until.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: wait.subsec_nanos().into(),
        };
        let mut events = std::mem::take(&mut self.events);
        events.clear();
        let waited =
            epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&timeout));
        match waited {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let now = Instant::now();
        for event in &events {
            let data = event.data.u64();
            let index = (data & 0x00ff_ffff_ffff_ffff) as usize;
            match data >> 56 {
                KIND_DATAGRAM => self.receive(index, handler),
                KIND_LISTENER => self.accept(now, index, handler),
                _ => self.stream_ready(now, index, event.flags, handler),
            }
        }
        self.events = events;
        while let Some(index) = self.ended.pop() {
            if let Some(stream) = self.streams.try_remove(index) {
                handler.closed(self, now, index, stream.role);
            }
        }
        Ok(())
    }

    fn receive(&mut self, index: usize, handler: &mut dyn Handler) {
        let Some(mut batch) = self.batch.take() else { return };
        // A few batches in a row; then the others, and the timers, have their turn.
        for _ in 0..8 {
            let socket = &self.datagrams[index];
            let role = socket.role;
            let Ok(count) = batch.receive(socket.socket.as_fd()) else { break };
            let now = Instant::now();
            for place in 0..count {
                if let Some((remote, bytes)) = batch.datagram(place) {
                    handler.message(self, now, Place::Datagram(index, remote), role, bytes);
                }
            }
            self.flush();
            if count < BATCH {
                break;
            }
        }
        self.batch = Some(batch);
    }

    fn accept(&mut self, now: Instant, index: usize, handler: &mut dyn Handler) {
        let role = self.listeners[index].role;
        while let Ok((socket, _)) = self.listeners[index].socket.accept() {
            if socket.set_nonblocking(true).is_err() {
                continue;
            }
            let stream = self.enter(socket, role, false);
            if self.watch(&self.streams[stream].socket, KIND_STREAM, stream).is_err() {
                self.streams.remove(stream);
                continue;
            }
            handler.opened(self, now, stream, role);
        }
    }

    fn stream_ready(
        &mut self,
        now: Instant,
        index: usize,
        flags: epoll::EventFlags,
        handler: &mut dyn Handler,
    ) {
        let Some(stream) = self.streams.get_mut(index) else { return };
        let role = stream.role;
        if stream.connecting {
            stream.connecting = false;
            if !matches!(stream.socket.take_error(), Ok(None)) {
                return self.ended.push(index);
            }
            self.arm(index, false);
            handler.opened(self, now, index, role);
            return self.flush_stream(index);
        }
        if flags.contains(epoll::EventFlags::OUT) {
            self.flush_stream(index);
        }
        if flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP | epoll::EventFlags::ERR)
        {
            self.read(now, index, role, handler);
        }
    }

    fn read(&mut self, now: Instant, index: usize, role: Role, handler: &mut dyn Handler) {
        let Some(stream) = self.streams.get_mut(index) else { return };
        let mut inbox = std::mem::take(&mut stream.inbox);
        let mut open = true;
        match stream.socket.read(&mut self.scratch) {
            Ok(0) => open = false,
            Ok(count) => inbox.extend_from_slice(&self.scratch[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => open = false,
        }
        let mut done = 0;
        while let Some(stream) = self.streams.get_mut(index) {
            match stream.framer.frame(&inbox[done..]) {
                Ok(Framing::Message(length)) => {
                    let message = &inbox[done..done + length.get()];
                    done += length.get();
                    handler.message(self, now, Place::Stream(index), role, message);
                }
                Ok(Framing::Skip(length) | Framing::Pong(length, _)) => done += length.get(),
                Ok(_) => break,
                Err(_) => {
                    open = false;
                    break;
                }
            }
        }
        let Some(stream) = self.streams.get_mut(index) else { return };
        inbox.drain(..done);
        if inbox.is_empty() {
            // An idle connection holds nothing, and there may be many.
            inbox.shrink_to(0);
        }
        stream.inbox = inbox;
        if !open {
            self.ended.push(index);
        }
    }

    fn arm(&self, index: usize, waits_for_room: bool) {
        let Some(stream) = self.streams.get(index) else { return };
        let data = epoll::EventData::new_u64(KIND_STREAM << 56 | index as u64);
        let mut flags = epoll::EventFlags::IN;
        flags.set(epoll::EventFlags::OUT, waits_for_room);
        // The descriptor is ours and open; the kernel has no other reason to refuse.
        let _known = epoll::modify(&self.epoll, &stream.socket, data, flags);
    }

    /// Gives the kernel all that is wanted.
    pub(crate) fn flush(&mut self) {
        for place in 0..self.datagrams.len() {
            self.flush_datagrams(place);
        }
        self.arena.clear();
        while let Some(index) = self.dirty.pop() {
            self.flush_stream(index);
        }
    }

    fn flush_datagrams(&mut self, place: usize) {
        let Datagrams { socket, wanted, .. } = &mut self.datagrams[place];
        let (arena, mut done) = (&self.arena, 0);
        while done < wanted.len() {
            let mut rest =
                wanted[done..].iter().map(|(remote, range)| (*remote, &arena[range.clone()]));
            match self.send.send(socket.as_fd(), &mut rest) {
                Ok(count) => done += count.max(1),
                Err(_) => {
                    self.unsent += 1;
                    done += 1;
                }
            }
        }
        wanted.clear();
    }

    fn flush_stream(&mut self, index: usize) {
        let Some(stream) = self.streams.get_mut(index) else { return };
        stream.dirty = false;
        if stream.connecting {
            return;
        }
        let mut failed = false;
        while stream.written < stream.outbox.len() {
            match stream.socket.write(&stream.outbox[stream.written..]) {
                Ok(count) => stream.written += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    failed = true;
                    break;
                }
            }
        }
        let waits = stream.written < stream.outbox.len();
        if !waits {
            stream.outbox.clear();
            stream.written = 0;
        }
        if failed {
            return self.ended.push(index);
        }
        if waits != stream.waits_for_room {
            stream.waits_for_room = waits;
            self.arm(index, waits);
        }
    }
}

/// When the next thing of an even stream of things is due: open loop, so that a slow answer delays
/// nothing that comes after it.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    start: Instant,
    interval: Duration,
    count: u64,
    limit: u64,
}

impl Pace {
    /// `rate` a second from `start` on, for `lasting`.
    pub(crate) fn new(start: Instant, rate: f64, lasting: Duration) -> Self {
        let interval = Duration::from_secs_f64(1.0 / rate.max(0.001));
        Self { start, interval, count: 0, limit: (rate * lasting.as_secs_f64()) as u64 }
    }

    /// When the next one is due; `None` at the end.
    pub(crate) fn next(&self) -> Option<Instant> {
        (self.count < self.limit).then(|| self.start + self.offset())
    }

    fn offset(&self) -> Duration {
        // Not `interval * count`: its rounding would add up.
        Duration::from_nanos((self.interval.as_secs_f64() * 1e9 * self.count as f64) as u64)
    }

    /// The intended time of one that is due.
    pub(crate) fn take(&mut self, now: Instant) -> Option<Instant> {
        let at = self.next().filter(|at| *at <= now)?;
        self.count += 1;
        Some(at)
    }
}
