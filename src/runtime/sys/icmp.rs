//! What ICMP says of datagrams that were sent: the socket's error queue (ip(7), IP_RECVERR).

#![allow(unsafe_code)]

use std::io;
use std::mem::{size_of, zeroed};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::mmsg::from_storage;

/// Room for one control message of sock_extended_err and the offender's address, aligned as cmsg(3)
/// asks.
const CONTROL_WORDS: usize = 64;

/// An error that came back for a datagram to `remote`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SendError {
    /// Where the datagram was to go.
    pub(crate) remote: SocketAddr,
    /// `ECONNREFUSED`, `EHOSTUNREACH`, ...
    pub(crate) errno: i32,
}

/// Has errors kept in the socket's error queue.
///
/// # Errors
/// What setsockopt(2) says.
pub(crate) fn keep_errors(socket: BorrowedFd<'_>, ipv6: bool) -> io::Result<()> {
    let (level, name) = if ipv6 {
        (libc::IPPROTO_IPV6, libc::IPV6_RECVERR)
    } else {
        (libc::IPPROTO_IP, libc::IP_RECVERR)
    };
    let on: libc::c_int = 1;
    // SAFETY: setsockopt(2): "The arguments optval and optlen are used to access option values"; ip(7):
    // IP_RECVERR is "a boolean" as an int. `on` is an int of ours that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes one error out of the queue; `None` if it was none of the network's, or of no known family.
///
/// # Errors
/// `WouldBlock` when the queue is empty.
pub(crate) fn next_error(socket: BorrowedFd<'_>) -> io::Result<Option<SendError>> {
    let mut control = [0_u64; CONTROL_WORDS];
    // SAFETY: sockaddr_storage and msghdr are plain C structs for which all zero bytes are a value.
    let (mut name, mut header): (libc::sockaddr_storage, libc::msghdr) =
        unsafe { (zeroed(), zeroed()) };
    header.msg_name = (&raw mut name).cast();
    header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of::<[u64; CONTROL_WORDS]>();
    // SAFETY: recvmsg(2): MSG_ERRQUEUE "specifies that queued errors should be received from the
    // socket error queue ... msg_name ... the original destination address of the datagram that
    // caused the error is supplied via msg_name". Name and control point at memory of ours with the
    // lengths given; there is no vector (`msg_iovlen` 0): the payload is cut off.
    let received = unsafe {
        libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT)
    };
    if received < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut found = None;
    // SAFETY: cmsg(3): CMSG_FIRSTHDR "returns a pointer to the first cmsghdr in the ancillary data
    // buffer associated with the passed msghdr"; the kernel has just filled header and buffer.
    let mut message = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    while !message.is_null() {
        // SAFETY: not null, so it points at a header inside of `control` (cmsg(3)).
        let about = unsafe { &*message };
        let is_error = (about.cmsg_level == libc::IPPROTO_IP
            && about.cmsg_type == libc::IP_RECVERR)
            || (about.cmsg_level == libc::IPPROTO_IPV6 && about.cmsg_type == libc::IPV6_RECVERR);
        if is_error {
            // SAFETY: ip(7): with IP_RECVERR the "ancillary message ... contains a
            // sock_extended_err"; CMSG_DATA may be unaligned for it (cmsg(3)), hence the copy.
            let error = unsafe {
                libc::CMSG_DATA(message).cast::<libc::sock_extended_err>().read_unaligned()
            };
            let of_network = matches!(
                error.ee_origin,
                libc::SO_EE_ORIGIN_ICMP | libc::SO_EE_ORIGIN_ICMP6 | libc::SO_EE_ORIGIN_LOCAL
            );
            let remote = from_storage(&name).filter(|_| of_network);
            found = remote.map(|remote| SendError { remote, errno: error.ee_errno as i32 });
        }
        // SAFETY: cmsg(3): CMSG_NXTHDR "returns the next valid cmsghdr after the passed cmsghdr.
        // It returns NULL when there isn't enough space left in the buffer."
        message = unsafe { libc::CMSG_NXTHDR(&raw const header, message) };
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    #[test]
    fn a_port_where_nobody_listens_is_told() {
        for any in ["127.0.0.1:0", "[::1]:0"] {
            let gone = UdpSocket::bind(any).unwrap().local_addr().unwrap();
            let socket = UdpSocket::bind(any).unwrap();
            keep_errors(socket.as_fd(), gone.is_ipv6()).unwrap();
            let none = next_error(socket.as_fd()).unwrap_err();
            assert_eq!(none.kind(), io::ErrorKind::WouldBlock);
            socket.send_to(b"hello", gone).unwrap();
            let mut told = next_error(socket.as_fd());
            for _ in 0..100 {
                if told.is_ok() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
                told = next_error(socket.as_fd());
            }
            let told = told.unwrap().unwrap();
            assert_eq!(told, SendError { remote: gone, errno: libc::ECONNREFUSED });
        }
    }
}
