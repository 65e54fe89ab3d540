//! What a process does that is about to become another program: sockets at the numbers that
//! sd_listen_fds(3) wants, signals as a program expects them.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// The first number of a handed-over socket (sd_listen_fds(3), SD_LISTEN_FDS_START).
const FIRST: i32 = 3;

/// Puts sockets at the numbers from 3 on, where they outlive an exec. Whatever was open there is closed:
/// call it in a process of one thread that only calls exec(3) afterwards.
///
/// # Errors
/// What fcntl(2) or dup2(2) says.
pub(crate) fn place_for_exec(sockets: &[OwnedFd]) -> io::Result<()> {
    let end = FIRST + i32::try_from(sockets.len()).map_err(io::Error::other)?;
    // Out of the way first: a socket may stand where another one must go.
    let aside: Result<Vec<OwnedFd>, _> =
        sockets.iter().map(|socket| rustix::io::fcntl_dupfd_cloexec(socket, end)).collect();
    for (number, socket) in (FIRST..).zip(aside?) {
        // SAFETY: dup2(2): "If the file descriptor newfd was previously open, it is closed before being
        // reused; the close is performed silently". Both are plain numbers and no memory is shared; by
        // this function's contract nobody uses what stood at `number` any more. "The two file descriptors
        // do not share file descriptor flags (the close-on-exec flag)": the new one outlives an exec.
        let result = unsafe { libc::dup2(socket.as_raw_fd(), number) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Gives the signals that a program may count on their default again: one that was ignored stays so over
/// an exec, and a shell that was started so cannot even trap it. `nohup` and a shell's `&` leave such.
/// Call it in a process that only calls exec(3) afterwards.
pub(crate) fn default_signals() {
    for signal in [
        libc::SIGHUP,
        libc::SIGINT,
        libc::SIGQUIT,
        libc::SIGTERM,
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGCHLD,
        libc::SIGPIPE,
    ] {
        // SAFETY: signal(2): "If the disposition is set to SIG_DFL, then the default action associated
        // with the signal occurs." No handler and no memory of ours is involved, and every signal of the
        // list may be set; by this function's contract nothing in the process counts on another one.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}
