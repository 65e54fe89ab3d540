//! A datagram socket that the runtime watches for some events and not for others.

// The rest of the project denies it; this folder is where it is allowed.
#![allow(unsafe_code)]

use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has the current runtime watch a non-blocking socket for `interest` alone.
///
/// # Errors
/// What `epoll_ctl` says.
pub(crate) fn watched(socket: UdpSocket, interest: Interest) -> io::Result<AsyncFd<UdpSocket>> {
    watch(socket, interest)
}

/// Has the current runtime watch an epoll instance, for whether something in it is ready.
///
/// # Errors
/// What `epoll_ctl` says.
pub(crate) fn watched_epoll(epoll: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    watch(epoll, Interest::READABLE)
}

/// `T` owns its descriptor, and nothing but dropping it closes that.
fn watch<T: AsRawFd>(socket: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: epoll(7): "A file descriptor is removed from an interest list only after all the file
    // descriptors referring to the underlying open file description have been closed", so it must
    // stay open and the same while it is watched. A `UdpSocket` and an `OwnedFd` own their
    // descriptor, which is open until they are dropped and never another; it is moved into the `AsyncFd`, which takes it off the
    // list before that, and nobody here asks it for a mutable reference.
    unsafe { AsyncFd::register_with_interest(socket, interest) }.map_err(io::Error::from)
}
