//! Binding: one socket per worker and address, all of them before anything is swapped.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use socket2::{Domain, Protocol, Socket, Type};
use strowger_contract::{LocalSocket, Transport};

use super::launch::BoundSocket;

/// What the kernel may hold of a datagram socket's bursts, each way. Half a second of 20,000
/// messages a second at 400 bytes; the kernel caps it at `net.core.rmem_max`.
const DATAGRAM_BUFFER_BYTES: usize = 4 << 20;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1_024;

/// Binds `socket` once for each worker.
///
/// # Errors
/// The address is in use by another process, is not ours, or needs rights that we lack.
pub(crate) fn bind(socket: &LocalSocket, workers: usize) -> io::Result<Vec<BoundSocket>> {
    if socket.transport == Transport::Unix {
        return bind_unix(socket, workers);
    }
    probe(socket)?;
    let mut wanted = socket.clone();
    let mut bound = Vec::with_capacity(workers);
    for _ in 0..workers {
        let next = bind_one(&wanted, true)?;
        // Port 0 is any free one; the other workers need the same.
        wanted.address = next.local_addr()?;
        bound.push(next);
    }
    Ok(bound)
}

/// With SO_REUSEPORT a second process of the same user would silently share the port and take half
/// of the traffic. A first try without it finds out.
fn probe(socket: &LocalSocket) -> io::Result<()> {
    bind_one(socket, false).map(drop)
}

fn bind_one(local: &LocalSocket, reuse_port: bool) -> io::Result<BoundSocket> {
    match local.transport {
        Transport::Udp => bind_datagram(local.address, reuse_port).map(BoundSocket::Datagram),
        Transport::Tcp | Transport::Tls | Transport::Ws | Transport::Wss => {
            let listener = bind_stream(local.address, reuse_port)?;
            Ok(BoundSocket::Stream(listener, local.transport))
        }
        #[cfg(feature = "sctp")]
        Transport::Sctp => {
            let listener = super::sctp::listen(local.address, reuse_port, BACKLOG)?;
            Ok(BoundSocket::Stream(listener, local.transport))
        }
        other => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!(
                "{}:// is not supported in this version; udp://, tcp:// and tls:// are",
                other.scheme()
            ),
        )),
    }
}

/// One socket that all workers accept from: unix sockets have no SO_REUSEPORT.
fn bind_unix(local: &LocalSocket, workers: usize) -> io::Result<Vec<BoundSocket>> {
    let path = strowger_contract::unix::path(local.address)
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "an unknown path"))?;
    let listener = match UnixListener::bind(&*path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            forsaken(Path::new(&*path))?;
            UnixListener::bind(&*path)
        }
        result => result,
    }?;
    listener.set_nonblocking(true)?;
    if let Some(mode) = local.mode {
        std::fs::set_permissions(&*path, std::fs::Permissions::from_mode(mode))?;
    }
    (0..workers)
        .map(|_| listener.try_clone().map(|socket| BoundSocket::Unix(socket, local.address)))
        .collect()
}

/// Removes a socket file that nobody listens at: a process that was killed leaves it behind. What
/// is no socket, or what somebody listens at, stays.
fn forsaken(path: &Path) -> io::Result<()> {
    if !std::fs::metadata(path)?.file_type().is_socket() {
        let message = format!("`{}` exists and is no socket", path.display());
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, message));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)
        }
        _ => Err(io::ErrorKind::AddrInUse.into()),
    }
}

fn new_socket(
    address: SocketAddr,
    kind: Type,
    protocol: Protocol,
    reuse_port: bool,
) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    socket.set_nonblocking(true)?;
    if address.is_ipv6() {
        // An IPv6 wildcard must not take the IPv4 port of another listener.
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_port(reuse_port)?;
    Ok(socket)
}

fn bind_datagram(address: SocketAddr, reuse_port: bool) -> io::Result<std::net::UdpSocket> {
    let socket = new_socket(address, Type::DGRAM, Protocol::UDP, reuse_port)?;
    socket.set_recv_buffer_size(DATAGRAM_BUFFER_BYTES)?;
    socket.set_send_buffer_size(DATAGRAM_BUFFER_BYTES)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn bind_stream(address: SocketAddr, reuse_port: bool) -> io::Result<std::net::TcpListener> {
    let socket = new_socket(address, Type::STREAM, Protocol::TCP, reuse_port)?;
    // Connections of an earlier process may still be in TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local(transport: Transport, address: SocketAddr) -> LocalSocket {
        LocalSocket { transport, address, advertise: None, mode: None }
    }

    #[test]
    fn an_address_that_another_has_is_refused_even_if_it_would_share() {
        for transport in [Transport::Udp, Transport::Tcp] {
            for any in ["127.0.0.1:0", "[::1]:0"] {
                let first =
                    bind(&local(transport, any.parse().expect("an address")), 1).expect("free");
                let taken = first[0].local_addr().expect("bound");
                let error = bind(&local(transport, taken), 2).expect_err("in use");
                assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
                drop(first);
                assert_eq!(bind(&local(transport, taken), 3).expect("free again").len(), 3);
            }
        }
    }
}
