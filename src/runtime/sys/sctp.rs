//! Options of SCTP sockets (sctp(7), RFC 6458), which socket2 does not know.

#![allow(unsafe_code)]

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Small messages do not wait for acknowledgements, and all bear this payload protocol identifier.
///
/// # Errors
/// What setsockopt(2) says.
pub(crate) fn set_up(socket: BorrowedFd<'_>, payload: u32) -> io::Result<()> {
    let on: libc::c_int = 1;
    set(socket, libc::SCTP_NODELAY, &on)?;
    // SAFETY: sctp_sndinfo is a plain C struct of integers, for which all zero bytes are a value.
    let mut info: libc::sctp_sndinfo = unsafe { zeroed() };
    // RFC 6458 5.3.4: it is passed on as it stands, so the byte order is the sender's to choose.
    info.snd_ppid = payload.to_be();
    set(socket, libc::SCTP_DEFAULT_SNDINFO, &info)
}

fn set<T: Copy>(socket: BorrowedFd<'_>, name: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: setsockopt(2): "The arguments optval and optlen are used to access option values"; the
    // value is a plain C value of ours that outlives the call, and the length is its own.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_SCTP,
            name,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
