//! SCTP (RFC 9260) behind the seam of streams: one-to-one style sockets (RFC 6458 4), which the kernel
//! reads, writes and watches as it does TCP's. Each write is one user message, and so has to be one
//! message of the protocol: [`crate::runtime::stream::Connection::write`] sees to that. One stream
//! of the association is used; what the other side sends on others is read as it comes.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream as StdTcpStream};
use std::os::fd::AsFd;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpStream;

use super::sys::set_up_sctp;

/// Diameter in clear (RFC 6733 11.4).
const PAYLOAD_DIAMETER: u32 = 46;

fn socket(address: SocketAddr) -> io::Result<Socket> {
    let protocol = Protocol::from(libc::IPPROTO_SCTP);
    let socket =
        Socket::new(Domain::for_address(address), Type::STREAM, Some(protocol)).map_err(explain)?;
    socket.set_nonblocking(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    set_up_sctp(socket.as_fd(), PAYLOAD_DIAMETER)?;
    Ok(socket)
}

/// Whether the error is that this kernel has no SCTP.
pub(crate) fn is_missing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported
}

fn explain(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EPROTONOSUPPORT | libc::ESOCKTNOSUPPORT) => io::Error::new(
            io::ErrorKind::Unsupported,
            "this kernel has no SCTP: load its module (modprobe sctp), or use tcp://",
        ),
        _ => error,
    }
}

/// A listening socket. What it accepts inherits its options.
///
/// # Errors
/// The kernel has no SCTP; the address is in use, or not ours.
pub(crate) fn listen(
    address: SocketAddr,
    reuse_port: bool,
    backlog: i32,
) -> io::Result<TcpListener> {
    let socket = socket(address)?;
    socket.set_reuse_port(reuse_port)?;
    socket.bind(&address.into())?;
    socket.listen(backlog)?;
    Ok(socket.into())
}

/// An association to a backend.
///
/// # Errors
/// The kernel has no SCTP; nobody is there.
pub(crate) async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = socket(address)?;
    match socket.connect(&address.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
        _ => {}
    }
    let stream = TcpStream::from_std(StdTcpStream::from(socket))?;
    stream.writable().await?;
    match stream.take_error()? {
        Some(error) => Err(error),
        None => Ok(stream),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where the kernel has SCTP: a message each way. Where it has none: the error says so, and what to
    /// do.
    #[tokio::test]
    async fn an_association_or_a_clear_word() {
        let any: SocketAddr = "127.0.0.1:0".parse().expect("an address");
        let listener = match listen(any, false, 8) {
            Ok(listener) => listener,
            Err(error) if is_missing(&error) => {
                assert!(error.to_string().contains("modprobe sctp"), "{error}");
                let error = connect("127.0.0.1:3868".parse().expect("an address")).await;
                assert!(error.is_err_and(|error| is_missing(&error)));
                println!("skipped: this kernel has no SCTP");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        let address = listener.local_addr().expect("bound");
        let listener = tokio::net::TcpListener::from_std(listener).expect("watched");
        let (near, far) = tokio::join!(connect(address), listener.accept());
        let (near, far) = (near.expect("connected"), far.expect("accepted").0);
        for (from, to) in [(&near, &far), (&far, &near)] {
            from.writable().await.expect("it is open");
            assert_eq!(from.try_write(b"message").expect("written"), 7);
            let mut buffer = [0; 64];
            to.readable().await.expect("it is open");
            assert_eq!(to.try_read(&mut buffer).expect("read"), 7);
        }
    }
}
