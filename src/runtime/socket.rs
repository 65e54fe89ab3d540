//! One stream, whatever it runs over. Plain TCP goes straight to the kernel; TLS goes through
//! rustls, which does no input or output of its own.

use std::cell::RefCell;
use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{Interest, Ready};
use tokio::net::{TcpStream, UnixStream};

/// What TLS may hold of bytes that the kernel has not taken: a few records.
const TLS_UNSENT_MAX: usize = 64 << 10;

/// Reads of the kernel's bytes in one read of plain text. A peer that sends records without text
/// (empty ones, tickets, key updates) must not hold the worker.
const TLS_READS_PER_TURN: usize = 16;

/// A stream.
pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<TlsStream>),
}

impl Stream {
    /// Reads what is there; 0 at the end.
    pub(crate) fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.try_read(buffer),
            Self::Unix(stream) => stream.try_read(buffer),
            Self::Tls(stream) => stream.try_read(buffer),
        }
    }

    /// Writes what is taken now.
    pub(crate) fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.try_write(bytes),
            Self::Unix(stream) => stream.try_write(bytes),
            Self::Tls(stream) => stream.try_write(bytes),
        }
    }

    /// Waits until it can be read or written, as asked.
    pub(crate) async fn ready(&self, interest: Interest) -> io::Result<Ready> {
        match self {
            Self::Tcp(stream) => stream.ready(interest).await,
            Self::Unix(stream) => stream.ready(interest).await,
            Self::Tls(stream) => stream.ready(interest).await,
        }
    }

    /// Waits until the other side is gone or says nothing more, whatever it sent before that: nothing
    /// is read.
    pub(crate) async fn hung_up(&self) {
        // PRIORITY is the one interest that is ready by the end of reading and not by bytes.
        self.watch(Interest::PRIORITY | Interest::ERROR).await;
    }

    /// Waits until the other side has reset the connection.
    pub(crate) async fn was_reset(&self) {
        self.watch(Interest::ERROR).await;
    }

    /// [`Stream::ready`] of the socket itself. A failure is an end as well.
    async fn watch(&self, interest: Interest) {
        let _ready = match self {
            Self::Tcp(stream) => stream.ready(interest).await,
            Self::Unix(stream) => stream.ready(interest).await,
            Self::Tls(stream) => stream.socket.ready(interest).await,
        };
    }

    /// [`Stream::ready`] for a task that polls. It keeps no waiter's memory in the task; one task
    /// may wait for each of reading and writing.
    pub(crate) fn poll_ready(
        &self,
        context: &mut Context<'_>,
        interest: Interest,
    ) -> Poll<io::Result<()>> {
        let tls = match self {
            Self::Tls(stream) => Some(stream),
            Self::Tcp(_) | Self::Unix(_) => None,
        };
        let (reads, mut writes) = (interest.is_readable(), interest.is_writable());
        if let Some(stream) = tls {
            let (unsent, text) = stream.look();
            if reads && text {
                return Poll::Ready(Ok(()));
            }
            writes |= unsent;
        }
        if reads {
            let ready = match self {
                Self::Tcp(stream) => stream.poll_read_ready(context),
                Self::Unix(stream) => stream.poll_read_ready(context),
                Self::Tls(stream) => stream.socket.poll_read_ready(context),
            };
            if ready.is_ready() {
                return ready;
            }
        }
        if writes {
            return match self {
                Self::Tcp(stream) => stream.poll_write_ready(context),
                Self::Unix(stream) => stream.poll_write_ready(context),
                Self::Tls(stream) => stream.socket.poll_write_ready(context),
            };
        }
        Poll::Pending
    }

    /// Whether written bytes still wait here for the kernel.
    pub(crate) fn has_unsent(&self) -> bool {
        match self {
            Self::Tcp(_) | Self::Unix(_) => false,
            Self::Tls(stream) => stream.session.borrow().wants_write(),
        }
    }

    /// Gives the kernel what waits here.
    pub(crate) fn flush(&self) -> io::Result<()> {
        match self {
            Self::Tcp(_) | Self::Unix(_) => Ok(()),
            Self::Tls(stream) => flush(&mut stream.session.borrow_mut(), &stream.socket),
        }
    }

    /// Says that nothing more will be written. What still waits here must have gone before.
    pub(crate) fn shutdown_write(&self) -> io::Result<()> {
        if let Self::Tls(stream) = self {
            let mut session = stream.session.borrow_mut();
            session.send_close_notify();
            flush(&mut session, &stream.socket)?;
        }
        match self.reference().shutdown(Shutdown::Write) {
            // The other side has gone already; there is nobody left to tell.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            result => result,
        }
    }

    /// Says goodbye where the transport has a word for it; the socket is closed afterwards.
    pub(crate) fn say_goodbye(&self) {
        if let Self::Tls(stream) = self {
            let mut session = stream.session.borrow_mut();
            session.send_close_notify();
            // It is a courtesy.
            let _gone = flush(&mut session, &stream.socket);
        }
    }

    /// Makes the socket's close a reset.
    pub(crate) fn reset_on_close(&self) {
        // A failure means that the other side was first.
        let _gone = self.reference().set_linger(Some(Duration::ZERO));
    }

    /// The descriptor, where nothing of the stream is kept in this process.
    pub(crate) fn plain_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Tcp(stream) => Some(stream.as_fd()),
            Self::Unix(stream) => Some(stream.as_fd()),
            Self::Tls(_) => None,
        }
    }

    /// The descriptor itself, no longer watched, where nothing of the stream is kept in this process.
    pub(crate) fn into_plain(self) -> Option<OwnedFd> {
        match self {
            Self::Tcp(stream) => stream.into_std().ok().map(OwnedFd::from),
            Self::Unix(stream) => stream.into_std().ok().map(OwnedFd::from),
            Self::Tls(_) => None,
        }
    }

    /// The reverse of [`Stream::into_plain`].
    pub(crate) fn of_plain(fd: OwnedFd, unix: bool) -> io::Result<Self> {
        Ok(if unix {
            Self::Unix(UnixStream::from_std(fd.into())?)
        } else {
            Self::Tcp(TcpStream::from_std(fd.into())?)
        })
    }

    /// Runs a system call on the plain socket; `None` for TLS.
    pub(crate) fn try_io<R>(
        &self,
        interest: Interest,
        call: impl FnOnce(BorrowedFd<'_>) -> io::Result<R>,
    ) -> Option<io::Result<R>> {
        match self {
            Self::Tcp(stream) => Some(stream.try_io(interest, || call(stream.as_fd()))),
            Self::Unix(stream) => Some(stream.try_io(interest, || call(stream.as_fd()))),
            Self::Tls(_) => None,
        }
    }

    /// The socket, for its options.
    pub(crate) fn reference(&self) -> SockRef<'_> {
        match self {
            Self::Tcp(stream) => SockRef::from(stream),
            Self::Unix(stream) => SockRef::from(stream),
            Self::Tls(stream) => SockRef::from(&stream.socket),
        }
    }

    /// Small messages must not wait for acknowledgements.
    pub(crate) fn set_nodelay(&self) {
        if !matches!(self, Self::Unix(_)) {
            // A failure only costs time.
            let _delayed = self.reference().set_tcp_nodelay(true);
        }
    }
}

/// A stream inside TLS, after its handshake.
pub(crate) struct TlsStream {
    socket: TcpStream,
    session: RefCell<rustls::Connection>,
}

impl TlsStream {
    /// Does the handshake; `early` is what was already read of the socket.
    pub(crate) async fn handshake(
        socket: TcpStream,
        mut session: rustls::Connection,
        mut early: &[u8],
    ) -> io::Result<Self> {
        session.set_buffer_limit(Some(TLS_UNSENT_MAX));
        loop {
            flush(&mut session, &socket)?;
            if !session.is_handshaking() && !session.wants_write() && early.is_empty() {
                break;
            }
            if session.wants_write() {
                socket.writable().await?;
                continue;
            }
            let taken = if early.is_empty() {
                session.read_tls(&mut Raw(&socket))
            } else {
                session.read_tls(&mut early)
            };
            match taken {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => process(&mut session, &socket)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    socket.readable().await?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Self { socket, session: RefCell::new(session) })
    }

    /// The session, for what it agreed on.
    pub(crate) fn session(&self) -> std::cell::Ref<'_, rustls::Connection> {
        self.session.borrow()
    }

    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut session = self.session.borrow_mut();
        for _ in 0..TLS_READS_PER_TURN {
            match session.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Many peers close without a word; what they sent is cut by its own protocol.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                result => return result,
            }
            session.read_tls(&mut Raw(&self.socket))?;
            process(&mut session, &self.socket)?;
        }
        // Readiness is still set: the next turn goes on.
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut session = self.session.borrow_mut();
        flush(&mut session, &self.socket)?;
        if session.wants_write() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let taken = session.writer().write(bytes)?;
        flush(&mut session, &self.socket)?;
        Ok(taken)
    }

    /// Whether bytes wait for the kernel, and whether text (or an error) waits for a reader.
    fn look(&self) -> (bool, bool) {
        let mut session = self.session.borrow_mut();
        let text = match process(&mut session, &self.socket) {
            Ok(()) => session.reader().into_first_chunk().is_ok(),
            Err(_) => true,
        };
        (session.wants_write(), text)
    }

    async fn ready(&self, interest: Interest) -> io::Result<Ready> {
        loop {
            let (unsent, text) = self.look();
            if interest.is_readable() && text {
                return Ok(Ready::READABLE);
            }
            let wanted = if unsent { interest | Interest::WRITABLE } else { interest };
            let ready = self.socket.ready(wanted).await?;
            if unsent && ready.is_writable() {
                flush(&mut self.session.borrow_mut(), &self.socket)?;
                if !interest.is_writable() && !ready.is_readable() {
                    continue;
                }
            }
            return Ok(ready);
        }
    }
}

/// The kernel's side, for rustls.
struct Raw<'a>(&'a TcpStream);

impl io::Read for Raw<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(buffer)
    }
}

impl io::Write for Raw<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn write_vectored(&mut self, parts: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write_vectored(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn flush(session: &mut rustls::Connection, socket: &TcpStream) -> io::Result<()> {
    while session.wants_write() {
        match session.write_tls(&mut Raw(socket)) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Takes what was read apart; a wrong record is answered by its alert.
fn process(session: &mut rustls::Connection, socket: &TcpStream) -> io::Result<()> {
    if let Err(error) = session.process_new_packets() {
        let _told = flush(session, socket);
        return Err(io::Error::new(io::ErrorKind::InvalidData, error));
    }
    flush(session, socket)
}
