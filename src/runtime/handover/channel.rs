//! The socket between the old process and the new one: items of any length, with descriptors, over
//! SOCK_SEQPACKET (unix(7)).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use socket2::{Domain, SockAddr, Socket, Type};

/// Bytes of one packet: well under the least send buffer (net.core.wmem_default is 208 KiB).
const PACKET_BYTES: usize = 48 << 10;

/// Descriptors of one packet; the kernel takes 253 (SCM_MAX_FD).
const PACKET_FDS: usize = 64;

/// Bytes and descriptors of one item, at most: an engine with a million transactions is larger than
/// any, and a peer's full queue far smaller.
const ITEM_BYTES_MAX: usize = 1 << 30;
const ITEM_FDS_MAX: usize = 1 << 16;

/// The first byte of a packet.
const LAST: u8 = 0;
const MORE: u8 = 1;

/// One end.
pub(crate) struct Channel {
    socket: Socket,
    /// Items of several threads do not mix.
    sending: Mutex<()>,
}

impl Channel {
    /// Goes to a process that listens at `path`.
    pub(crate) fn connect(path: &Path) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
        socket.connect(&SockAddr::unix(path)?)?;
        Ok(Self::over(socket))
    }

    /// One that was accepted.
    pub(crate) fn over(socket: Socket) -> Self {
        Self { socket, sending: Mutex::default() }
    }

    /// How long a send or a receive may take from now on.
    pub(crate) fn set_patience(&self, patience: Duration) -> io::Result<()> {
        self.socket.set_read_timeout(Some(patience))?;
        self.socket.set_write_timeout(Some(patience))
    }

    /// User and process at the other end (SO_PEERCRED).
    pub(crate) fn peer(&self) -> io::Result<(u32, i32)> {
        let peer = rustix::net::sockopt::socket_peercred(&self.socket)?;
        Ok((peer.uid.as_raw(), peer.pid.as_raw_nonzero().get()))
    }

    /// Ends it for both sides, whatever else holds it.
    pub(crate) fn end(&self) {
        let _gone = self.socket.shutdown(std::net::Shutdown::Both);
    }

    /// Sends an item.
    pub(crate) fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let _mine = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut bytes, mut fds) = (bytes, fds);
        loop {
            let (part, rest) = bytes.split_at(bytes.len().min(PACKET_BYTES));
            let (some, others) = fds.split_at(fds.len().min(PACKET_FDS));
            let last = rest.is_empty() && others.is_empty();
            self.send_packet(if last { LAST } else { MORE }, part, some)?;
            if last {
                return Ok(());
            }
            (bytes, fds) = (rest, others);
        }
    }

    fn send_packet(&self, kind: u8, part: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PACKET_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let kind = [kind];
        let parts = [IoSlice::new(&kind), IoSlice::new(part)];
        let sent = retry(|| {
            rustix::net::sendmsg(&self.socket, &parts, &mut control, SendFlags::NOSIGNAL)
        })?;
        if sent == part.len() + 1 { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Receives an item; `UnexpectedEof` when the other end is gone.
    pub(crate) fn receive(&self) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
        let (mut bytes, mut fds) = (Vec::new(), Vec::new());
        let mut packet = vec![0; PACKET_BYTES + 1];
        loop {
            let length = self.receive_packet(&mut packet, &mut fds)?;
            let Some((kind, part)) = packet[..length].split_first() else {
                return Err(io::ErrorKind::UnexpectedEof.into());
            };
            bytes.extend_from_slice(part);
            if bytes.len() > ITEM_BYTES_MAX || fds.len() > ITEM_FDS_MAX || *kind > MORE {
                return Err(io::ErrorKind::InvalidData.into());
            }
            if *kind == LAST {
                return Ok((bytes, fds));
            }
        }
    }

    fn receive_packet(&self, packet: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PACKET_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(packet)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let message =
            retry(|| rustix::net::recvmsg(&self.socket, &mut parts, &mut control, flags))?;
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                fds.extend(rights);
            }
        }
        // recvmsg(2): some control data was discarded. The limit of open files does that.
        if message.flags.intersects(ReturnFlags::CTRUNC | ReturnFlags::TRUNC) {
            let message = "descriptors were lost on the way: is the limit of open files too low?";
            return Err(io::Error::other(message));
        }
        Ok(message.bytes)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            result => return result.map_err(io::Error::from),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    #[test]
    fn long_items_and_many_descriptors_arrive_whole() {
        let (one, two) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).expect("a pair");
        let (one, two) = (Channel::over(one), Channel::over(two));
        one.set_patience(Duration::from_secs(30)).expect("a socket option");
        two.set_patience(Duration::from_secs(30)).expect("a socket option");
        let pairs: Vec<_> = (0..150).map(|_| UnixStream::pair().expect("a pair")).collect();
        let long: Vec<u8> = (0..1_000_000u32).map(|number| (number / 7) as u8).collect();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let fds: Vec<_> = pairs.iter().map(|(near, _)| near.as_fd()).collect();
                one.send(&long, &fds).expect("it is read");
                one.send(b"", &[]).expect("it is read");
                one.send(b"short", &fds[..1]).expect("it is read");
            });
            let (bytes, fds) = two.receive().expect("sent");
            assert!(bytes == long && fds.len() == 150);
            for (index, fd) in fds.into_iter().enumerate() {
                UnixStream::from(fd).write_all(&[index as u8]).expect("open");
            }
            assert!(two.receive().is_ok_and(|(bytes, fds)| bytes.is_empty() && fds.is_empty()));
            assert!(two.receive().is_ok_and(|(bytes, fds)| bytes == b"short" && fds.len() == 1));
        });
        for (index, (_, mut far)) in pairs.into_iter().enumerate() {
            let mut byte = [0];
            far.read_exact(&mut byte).expect("written");
            assert_eq!(byte, [index as u8]);
        }
        drop(one);
        assert!(two.receive().is_err_and(|error| error.kind() == io::ErrorKind::UnexpectedEof));
    }
}
