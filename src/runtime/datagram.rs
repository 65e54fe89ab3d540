//! A listener's datagram socket on one worker: batches in, batches out, and a bounded backlog for
//! when the kernel's buffer is full.

use std::cell::RefCell;
use std::io;
use std::net::{SocketAddr, UdpSocket as StdUdpSocket};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use socket2::{Domain, Protocol, Socket, Type};
use strowger_contract::Outbox;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::io::{Interest, Ready};

use super::sys::{RecvBatch, SendBatch, SendError, keep_errors, next_error, watched};

/// Datagrams per system call. 32 spread the call's cost thin (measured elsewhere: the gain beyond
/// is under 3 %) and keep the time between two looks at the clock short.
pub(crate) const BATCH: usize = 32;

/// The same for a socket that has one flow: 208 bytes of memory each.
const OUTWARD_BATCH: usize = 2;

/// Bytes that wait for the kernel's send buffer, at most. UDP may lose; holding more would only
/// add delay.
const BACKLOG_BYTES_MAX: usize = 4 << 20;

/// Errors that are taken from the queue together, at most: a flood of ICMP must not hold the worker.
const ERRORS_PER_TURN: usize = 64;

/// The socket.
pub(crate) struct DatagramPort {
    /// Watched for reading only. Were it watched for writing too, the kernel would wake the worker
    /// once for every datagram that it sent: each one that the receiver takes makes room.
    socket: AsyncFd<StdUdpSocket>,
    pub(crate) local: SocketAddr,
    /// Place in [`strowger_contract::Scope::sockets`].
    pub(crate) index: u16,
    send: RefCell<Outgoing>,
}

struct Outgoing {
    batch: SendBatch,
    /// What the engine wants sent, as ranges of the outbox's arena.
    wanted: Vec<(SocketAddr, Range<usize>)>,
    backlog: Vec<u8>,
    waiting: Vec<(SocketAddr, Range<usize>)>,
}

/// What became of a flush.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sent {
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
    /// Refused by the kernel for their own sake (too long, no route).
    pub(crate) failed: u64,
    /// Dropped: the backlog is full.
    pub(crate) overflowed: u64,
}

impl DatagramPort {
    /// Wraps a bound, non-blocking socket.
    pub(crate) fn new(socket: StdUdpSocket, index: u16) -> io::Result<Self> {
        Self::with_batch(socket, index, BATCH)
    }

    /// A socket towards one address, for one flow. It sends few at a time, so that thousands
    /// of them cost little.
    pub(crate) fn outward(to: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(to), Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_nonblocking(true)?;
        if super::descriptors::is_one_of_the_last(socket.as_fd()) {
            return Err(rustix::io::Errno::MFILE.into());
        }
        socket.connect(&to.into())?;
        Self::with_batch(socket.into(), 0, OUTWARD_BATCH)
    }

    /// One of another process, by [`DatagramPort::outward`].
    pub(crate) fn inherited(fd: OwnedFd) -> io::Result<Self> {
        Self::with_batch(fd.into(), 0, OUTWARD_BATCH)
    }

    /// For handing it over.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.descriptor()
    }

    fn with_batch(socket: StdUdpSocket, index: u16, count: usize) -> io::Result<Self> {
        let local = socket.local_addr()?;
        // Without it a backend that is gone would only be found out by its silence.
        keep_errors(socket.as_fd(), local.is_ipv6())?;
        Ok(Self {
            socket: watched(socket, Interest::READABLE | Interest::ERROR)?,
            local,
            index,
            send: RefCell::new(Outgoing {
                batch: SendBatch::new(count),
                wanted: Vec::new(),
                backlog: Vec::new(),
                waiting: Vec::new(),
            }),
        })
    }

    /// Waits for datagrams or for errors of sent ones, and receives a batch of either: how many
    /// datagrams came; errors are appended to `errors`.
    pub(crate) async fn receive(
        &self,
        batch: &mut RecvBatch,
        errors: &mut Vec<SendError>,
    ) -> io::Result<usize> {
        let mut ready = self.ready(errors).await?;
        let result = batch.receive(self.descriptor());
        let is_drained = match &result {
            Ok(count) => *count < BATCH,
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        };
        if is_drained {
            // What comes from now on is a new event: to ask once more would be a call for nothing.
            ready.clear_ready_matching(Ready::READABLE);
        }
        match result {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            result => result,
        }
    }

    /// Waits for anything, and takes the errors of sent datagrams; what is readable is the caller's.
    async fn ready(
        &self,
        errors: &mut Vec<SendError>,
    ) -> io::Result<AsyncFdReadyGuard<'_, StdUdpSocket>> {
        let mut ready = self.socket.ready(Interest::READABLE | Interest::ERROR).await?;
        if ready.ready().is_error() && self.take_errors(errors) {
            ready.clear_ready_matching(Ready::ERROR);
        }
        Ok(ready)
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.get_ref().as_fd()
    }

    /// Whether there are no more of them.
    fn take_errors(&self, errors: &mut Vec<SendError>) -> bool {
        for _ in 0..ERRORS_PER_TURN {
            match next_error(self.descriptor()) {
                Ok(error) => errors.extend(error),
                Err(_) => return true,
            }
        }
        false
    }

    /// Waits for datagrams or for errors of sent ones; errors are appended to `errors`. Who calls it
    /// must receive until nothing is left: what is there already wakes nobody again.
    pub(crate) async fn wait(&self, errors: &mut Vec<SendError>) -> io::Result<()> {
        self.ready(errors).await?.clear_ready_matching(Ready::READABLE);
        Ok(())
    }

    /// Receives a batch without waiting.
    pub(crate) fn try_receive(&self, batch: &mut RecvBatch) -> io::Result<usize> {
        batch.receive(self.descriptor())
    }

    /// Notes that a range of the arena is to go to `remote` with the next [`DatagramPort::flush`];
    /// whether it is the first.
    pub(crate) fn want(&self, remote: SocketAddr, bytes: Range<usize>) -> bool {
        let wanted = &mut self.send.borrow_mut().wanted;
        wanted.push((remote, bytes));
        wanted.len() == 1
    }

    /// Sends all that is wanted, in order behind what waits already. What the kernel does not take
    /// now waits in the backlog, whose [`DatagramPort::drain`] somebody must then run.
    pub(crate) fn flush(&self, outbox: &Outbox) -> Sent {
        let mut guard = self.send.borrow_mut();
        let outgoing = &mut *guard;
        let mut sent = Sent::default();
        if outgoing.wanted.is_empty() {
            return sent;
        }
        let whole = outbox.arena();
        let mut done = 0;
        if outgoing.waiting.is_empty() {
            done = self.send_some(&mut outgoing.batch, &outgoing.wanted, whole, &mut sent);
        }
        for (remote, range) in &outgoing.wanted[done..] {
            let bytes = &whole[range.clone()];
            if outgoing.backlog.len() + bytes.len() > BACKLOG_BYTES_MAX {
                sent.overflowed += 1;
                continue;
            }
            let start = outgoing.backlog.len();
            outgoing.backlog.extend_from_slice(bytes);
            outgoing.waiting.push((*remote, start..outgoing.backlog.len()));
        }
        outgoing.wanted.clear();
        sent
    }

    /// Whether something waits for the kernel.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.send.borrow().waiting.is_empty()
    }

    /// Gives the kernel what waits, as it takes it, until nothing waits.
    pub(crate) async fn drain(&self, progress: impl Fn(Sent)) {
        // A descriptor of its own, since the other is watched for reading only.
        let writer = self.socket.get_ref().try_clone();
        let Ok(writer) = writer.and_then(|it| watched(it, Interest::WRITABLE)) else {
            return self.forget_backlog(progress);
        };
        while self.is_waiting() {
            let Ok(mut ready) = writer.writable().await else { return };
            // Cleared first: the kernel says anew when it has room again.
            ready.clear_ready();
            let mut sent = Sent::default();
            {
                let mut guard = self.send.borrow_mut();
                let outgoing = &mut *guard;
                let (batch, waiting) = (&mut outgoing.batch, &outgoing.waiting);
                let done = self.send_some(batch, waiting, &outgoing.backlog, &mut sent);
                outgoing.waiting.drain(..done);
                if outgoing.waiting.is_empty() {
                    outgoing.backlog = Vec::new();
                }
            }
            progress(sent);
        }
    }

    /// Without a descriptor to wait by, what waits is lost, and counted as that.
    fn forget_backlog(&self, progress: impl Fn(Sent)) {
        let mut outgoing = self.send.borrow_mut();
        let overflowed = outgoing.waiting.len() as u64;
        outgoing.waiting.clear();
        outgoing.backlog = Vec::new();
        drop(outgoing);
        progress(Sent { overflowed, ..Sent::default() });
    }

    /// Sends until the kernel takes no more; how many of `list` are dealt with.
    fn send_some(
        &self,
        batch: &mut SendBatch,
        list: &[(SocketAddr, Range<usize>)],
        whole: &[u8],
        sent: &mut Sent,
    ) -> usize {
        let mut done = 0;
        let mut again = false;
        while done < list.len() {
            let rest = &list[done..];
            let mut items = rest.iter().map(|(remote, range)| (*remote, &whole[range.clone()]));
            match batch.send(self.descriptor(), &mut items) {
                Ok(count) => {
                    sent.messages += count as u64;
                    sent.bytes +=
                        rest[..count].iter().map(|(_, range)| range.len() as u64).sum::<u64>();
                    done += count;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // What ICMP said of an earlier datagram is told at the next call as well, whomever
                // that is to: it is tried once more.
                Err(error) if !again && is_of_the_past(&error) => {
                    again = true;
                    continue;
                }
                // The kernel names the first one; the others are not to blame.
                Err(_) => {
                    sent.failed += 1;
                    done += 1;
                }
            }
            again = false;
        }
        done
    }
}

/// Errors that ICMP brings about.
fn is_of_the_past(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ECONNREFUSED | libc::EHOSTUNREACH | libc::ENETUNREACH | libc::EHOSTDOWN)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use strowger_contract::{ClassId, Command, Endpoint};

    fn bound() -> StdUdpSocket {
        let socket = StdUdpSocket::bind("127.0.0.1:0").expect("loopback");
        socket.set_nonblocking(true).expect("a socket option");
        socket
    }

    #[tokio::test]
    async fn one_that_cannot_go_does_not_stop_the_others() {
        let far = bound();
        let to = far.local_addr().expect("bound");
        let port = DatagramPort::new(bound(), 0).expect("in a runtime");
        let mut outbox = Outbox::new();
        for length in [10, 70_000, 20] {
            let endpoint = Endpoint::Datagram { socket: 0, remote: to };
            outbox.send(endpoint, ClassId::CONTROL, |bytes| bytes.resize(bytes.len() + length, 7));
        }
        for command in outbox.commands() {
            if let Command::Send(frame) = command {
                port.want(to, frame.bytes.clone());
            }
        }
        let sent = port.flush(&outbox);
        assert_eq!(sent, Sent { messages: 2, bytes: 30, failed: 1, overflowed: 0 });
        let mut buffer = [0; 100];
        assert_eq!(far.recv(&mut buffer).expect("sent"), 10);
        assert_eq!(far.recv(&mut buffer).expect("sent"), 20);
    }

    #[tokio::test]
    async fn what_waits_for_the_kernel_goes_in_order_when_there_is_room() {
        let far = bound();
        let to = far.local_addr().expect("bound");
        far.set_nonblocking(false).expect("a socket option");
        socket2::SockRef::from(&far).set_recv_buffer_size(8 << 20).expect("a socket option");
        let near = bound();
        socket2::SockRef::from(&near).set_send_buffer_size(4_096).expect("a socket option");
        let port = DatagramPort::new(near, 0).expect("in a runtime");
        // As if the kernel had taken none of them.
        {
            let mut outgoing = port.send.borrow_mut();
            for number in 0..100u8 {
                let start = outgoing.backlog.len();
                outgoing.backlog.resize(start + 1_000, number);
                outgoing.waiting.push((to, start..start + 1_000));
            }
        }
        let sent = RefCell::new(Sent::default());
        port.drain(|some| sent.borrow_mut().messages += some.messages).await;
        assert!(!port.is_waiting());
        assert_eq!(sent.into_inner().messages, 100);
        let mut buffer = [0; 2_000];
        for number in 0..100 {
            assert_eq!(far.recv(&mut buffer).expect("sent"), 1_000);
            assert_eq!(buffer[0], number);
        }
    }

    #[tokio::test]
    async fn a_socket_that_was_emptied_is_heard_again() {
        let (near, far) = (bound(), bound());
        let to = near.local_addr().expect("bound");
        let port = DatagramPort::new(near, 0).expect("in a runtime");
        let (mut batch, mut errors) = (RecvBatch::new(BATCH), Vec::new());
        for count in [1, BATCH, 3, 2 * BATCH + 1, 1] {
            for _ in 0..count {
                far.send_to(b"datagram", to).expect("sent");
            }
            let mut received = 0;
            while received < count {
                received += port.receive(&mut batch, &mut errors).await.expect("received");
            }
            assert_eq!(received, count);
        }
        assert!(errors.is_empty());
    }
}
