//! `recvmmsg(2)` and `sendmmsg(2)` with memory that is laid out once.
//!
//! The headers point into vectors of the same struct. A vector's heap block stays where it is while
//! the struct moves, and no vector is grown after `new`, so the pointers are set anew before each
//! call only where their target changes.

// The rest of the project denies it; this folder is where it is allowed.
#![allow(unsafe_code)]

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

/// The largest datagram that UDP can carry, rounded up.
const DATAGRAM_BYTES_MAX: usize = 65_536;

/// Datagrams received together.
pub(crate) struct RecvBatch {
    buffer: Vec<u8>,
    names: Vec<libc::sockaddr_storage>,
    vectors: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
}

impl RecvBatch {
    /// Room for `count` datagrams of any size. Pages that no datagram touches cost nothing.
    pub(crate) fn new(count: usize) -> Self {
        // SAFETY: sockaddr_storage, iovec and mmsghdr are plain C structs of integers and raw
        // pointers, for which all zero bytes are a value.
        let (name, vector, header) = unsafe { (zeroed(), zeroed(), zeroed()) };
        Self {
            buffer: vec![0; count * DATAGRAM_BYTES_MAX],
            names: vec![name; count],
            vectors: vec![vector; count],
            headers: vec![header; count],
        }
    }

    /// Receives up to the batch's size without waiting; how many came.
    ///
    /// # Errors
    /// `WouldBlock` when there is none; else what the socket says.
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        for index in 0..self.headers.len() {
            let start = index * DATAGRAM_BYTES_MAX;
            self.vectors[index] = libc::iovec {
                iov_base: self.buffer[start..start + DATAGRAM_BYTES_MAX].as_mut_ptr().cast(),
                iov_len: DATAGRAM_BYTES_MAX,
            };
            let header = &mut self.headers[index].msg_hdr;
            header.msg_name = (&raw mut self.names[index]).cast();
            header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_iov = &raw mut self.vectors[index];
            header.msg_iovlen = 1;
            header.msg_control = std::ptr::null_mut();
            header.msg_controllen = 0;
            header.msg_flags = 0;
        }
        // SAFETY: recvmmsg(2): "The msgvec argument is a pointer to an array of mmsghdr
        // structures. The size of this array is specified in vlen." It is `headers`, of that length;
        // each header's name and vector were just pointed at memory of ours that outlives the call
        // and is borrowed by nobody else (`&mut self`). "timeout … NULL" blocks never with
        // MSG_DONTWAIT.
        let received = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                self.headers.len() as libc::c_uint,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        usize::try_from(received).map_err(|_| io::Error::last_os_error())
    }

    /// Datagram number `index` of the last receive: its sender and bytes; `None` if the sender's
    /// address is of no known family or the datagram was cut short.
    pub(crate) fn datagram(&self, index: usize) -> Option<(SocketAddr, &[u8])> {
        let header = &self.headers[index];
        if header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0 {
            return None;
        }
        let start = index * DATAGRAM_BYTES_MAX;
        let length = (header.msg_len as usize).min(DATAGRAM_BYTES_MAX);
        Some((from_storage(&self.names[index])?, &self.buffer[start..start + length]))
    }
}

// SAFETY: the raw pointers inside point only into vectors that the struct itself owns, and are
// written anew before each use; nothing is shared with another thread.
unsafe impl Send for RecvBatch {}

/// Datagrams sent together. The bytes stay with the caller.
pub(crate) struct SendBatch {
    names: Vec<libc::sockaddr_storage>,
    vectors: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
}

impl SendBatch {
    /// For up to `count` datagrams at a time.
    pub(crate) fn new(count: usize) -> Self {
        // SAFETY: as in `RecvBatch::new`.
        let (name, vector, header) = unsafe { (zeroed(), zeroed(), zeroed()) };
        Self {
            names: vec![name; count],
            vectors: vec![vector; count],
            headers: vec![header; count],
        }
    }

    /// Sends the first so many of `datagrams` as fit and as the socket takes without waiting; how
    /// many went.
    ///
    /// # Errors
    /// What the socket says of the first one; `WouldBlock` when its buffer is full.
    pub(crate) fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        datagrams: &mut dyn Iterator<Item = (SocketAddr, &[u8])>,
    ) -> io::Result<usize> {
        let mut count = 0;
        for (remote, bytes) in datagrams.take(self.headers.len()) {
            let length = to_storage(remote, &mut self.names[count]);
            self.vectors[count] =
                libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
            let header = &mut self.headers[count].msg_hdr;
            header.msg_name = (&raw mut self.names[count]).cast();
            header.msg_namelen = length;
            header.msg_iov = &raw mut self.vectors[count];
            header.msg_iovlen = 1;
            count += 1;
        }
        if count == 0 {
            return Ok(0);
        }
        // SAFETY: sendmmsg(2): "The msgvec argument is a pointer to an array of mmsghdr structures.
        // The size of this array is specified in vlen." `count` headers were just filled; names and
        // vectors are ours; the bytes are borrowed by `datagrams`, whose items live at least as long
        // as the iterator's borrow, which lasts over this call. The kernel only reads them
        // (`msg_iov` is not const in C, hence the cast).
        let sent = unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                count as libc::c_uint,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}

// SAFETY: as for `RecvBatch`; the pointers to the caller's bytes are never used after `send`.
unsafe impl Send for SendBatch {}

pub(super) fn from_storage(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    let pointer: *const libc::sockaddr_storage = storage;
    match libc::c_int::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: sockaddr(3type): "sockaddr_storage … large enough to hold any other
            // sockaddr_* variant", and ip(7): with AF_INET the address is a sockaddr_in.
            let address = unsafe { &*pointer.cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr));
            Some(SocketAddr::V4(SocketAddrV4::new(ip, u16::from_be(address.sin_port))))
        }
        libc::AF_INET6 => {
            // SAFETY: as above, with ipv6(7) and sockaddr_in6.
            let address = unsafe { &*pointer.cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(address.sin6_addr.s6_addr);
            Some(SocketAddr::V6(SocketAddrV6::new(
                ip,
                u16::from_be(address.sin6_port),
                address.sin6_flowinfo,
                address.sin6_scope_id,
            )))
        }
        _ => None,
    }
}

fn to_storage(remote: SocketAddr, storage: &mut libc::sockaddr_storage) -> libc::socklen_t {
    let pointer: *mut libc::sockaddr_storage = storage;
    match remote {
        SocketAddr::V4(remote) => {
            let address = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: remote.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from(*remote.ip()).to_be() },
                sin_zero: [0; 8],
            };
            // SAFETY: sockaddr(3type), as above: storage is large enough and suitably aligned.
            unsafe { pointer.cast::<libc::sockaddr_in>().write(address) };
            size_of::<libc::sockaddr_in>() as libc::socklen_t
        }
        SocketAddr::V6(remote) => {
            let address = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: remote.port().to_be(),
                sin6_flowinfo: remote.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: remote.ip().octets() },
                sin6_scope_id: remote.scope_id(),
            };
            // SAFETY: as above.
            unsafe { pointer.cast::<libc::sockaddr_in6>().write(address) };
            size_of::<libc::sockaddr_in6>() as libc::socklen_t
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    fn round_trip(address: &str) {
        let (one, two) = (UdpSocket::bind(address).unwrap(), UdpSocket::bind(address).unwrap());
        let to = two.local_addr().unwrap();
        let payloads: Vec<Vec<u8>> =
            (0..40u8).map(|index| vec![index; 1 + usize::from(index) * 100]).collect();
        let mut send = SendBatch::new(64);
        let mut items = payloads.iter().map(|payload| (to, payload.as_slice()));
        assert_eq!(send.send(one.as_fd(), &mut items).unwrap(), 40);
        let mut receive = RecvBatch::new(32);
        let mut seen = Vec::new();
        while seen.len() < 40 {
            let count = receive.receive(two.as_fd()).unwrap();
            for index in 0..count {
                let (from, bytes) = receive.datagram(index).unwrap();
                assert_eq!(from, one.local_addr().unwrap());
                seen.push(bytes.to_vec());
            }
        }
        assert_eq!(seen, payloads);
        let none = receive.receive(two.as_fd()).unwrap_err();
        assert_eq!(none.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn batches_over_ipv4_and_ipv6() {
        round_trip("127.0.0.1:0");
        round_trip("[::1]:0");
    }

    #[test]
    fn an_oversized_datagram_is_an_error_of_that_datagram() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let huge = vec![0; 70_000];
        let mut items = std::iter::once((socket.local_addr().unwrap(), huge.as_slice()));
        let error = SendBatch::new(4).send(socket.as_fd(), &mut items).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
    }
}
