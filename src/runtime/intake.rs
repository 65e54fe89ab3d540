//! From an accepted socket to a stream that the engine may hear of: TLS, and what is known of the
//! other side. All of it is bounded in time and bytes, and nothing of it holds others up.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;

use strowger_contract::{Certificate, CloseCause, Credentials, PeerFacts, Protocol, Transport};
use tokio::net::TcpStream;

use super::host::Host;
use super::shared::NodeEvent;
use super::socket::{Stream, TlsStream};
use crate::tls::{Failure, failure};

/// A stream, ready for the engine.
pub(crate) struct TakenIn {
    pub(crate) stream: Stream,
    pub(crate) remote: SocketAddr,
    pub(crate) local: SocketAddr,
    pub(crate) facts: PeerFacts,
    /// Read already, and not yet given to anybody.
    pub(crate) early: Vec<u8>,
}

/// Takes a TCP connection in; `None` if it came to nothing, which was counted and told.
pub(crate) async fn take_in<P: Protocol>(
    host: &Rc<Host<P>>,
    socket: TcpStream,
    remote: SocketAddr,
    transport: Transport,
) -> Option<TakenIn> {
    let local = socket.local_addr().ok()?;
    let mut facts = PeerFacts::NONE;
    let stream = match transport {
        Transport::Tls | Transport::Wss => {
            let stream = serve_tls(host, socket, remote, &[]).await?;
            {
                let session = stream.session();
                facts.certificate = verified(&session);
                facts.alpn = session.alpn_protocol().map(<[u8]>::to_vec);
                if let rustls::Connection::Server(server) = &*session {
                    facts.server_name = server.server_name().map(str::to_ascii_lowercase);
                }
            }
            Stream::Tls(Box::new(stream))
        }
        _ => Stream::Tcp(socket),
    };
    Some(TakenIn { stream, remote, local, facts, early: Vec::new() })
}

/// What the peer's certificate says, whose chain the handshake has verified.
fn verified(session: &rustls::Connection) -> Option<Certificate> {
    session.peer_certificates()?.first().map(|der| crate::tls::certificate(der))
}

async fn serve_tls<P: Protocol>(
    host: &Rc<Host<P>>,
    socket: TcpStream,
    remote: SocketAddr,
    early: &[u8],
) -> Option<TlsStream> {
    let spec = host.state().spec.tls.clone()?;
    let side = "client";
    let session = host
        .shared
        .tls
        .server(&spec)
        .map_err(|error| Failure::of("configuration", error))
        .and_then(|server| {
            rustls::ServerConnection::new(server.config())
                .map_err(|error| Failure::of("configuration", error.to_string()))
        });
    let session = match session {
        Ok(session) => session.into(),
        Err(why) => return handshake_failed(host, side, &remote.to_string(), &why),
    };
    match within(spec.handshake, TlsStream::handshake(socket, session, early)).await {
        Ok(stream) => {
            host.shared.metrics.tls_handshake(&host.shared.name, side, &stream.session());
            Some(stream)
        }
        Err(error) => handshake_failed(host, side, &remote.to_string(), &failure(&error)),
    }
}

/// TLS to a backend; the pool says how, and whom it must be.
///
/// # Errors
/// Told and counted; the cause is for the engine.
pub(crate) async fn connect_tls<P: Protocol>(
    host: &Rc<Host<P>>,
    socket: TcpStream,
    backend: strowger_contract::BackendId,
    address: SocketAddr,
    timeout: std::time::Duration,
) -> Result<(TlsStream, PeerFacts), CloseCause> {
    let side = "backend";
    let (spec, identity) = {
        let state = host.state();
        let snapshot = state.router.snapshot();
        (snapshot.backend_tls(backend), snapshot.backend_identity(backend))
    };
    let name = host.shared.backend_name(backend);
    let session = spec
        .ok_or_else(|| Failure::of("configuration", "its pool has no `tls`"))
        .and_then(|spec| {
            host.shared.tls.client(&spec).map_err(|error| Failure::of("configuration", error))
        })
        .and_then(|client| {
            let server = client.server_name(identity.as_deref(), address.ip());
            rustls::ClientConnection::new(client.config(), server)
                .map_err(|error| Failure::of("configuration", error.to_string()))
        });
    let outcome = match session {
        Ok(session) => within(timeout, TlsStream::handshake(socket, session.into(), &[]))
            .await
            .map_err(|error| failure(&error)),
        Err(why) => Err(why),
    };
    match outcome {
        Ok(stream) => {
            host.shared.metrics.tls_handshake(&host.shared.name, side, &stream.session());
            let facts = PeerFacts {
                certificate: verified(&stream.session()),
                alpn: stream.session().alpn_protocol().map(<[u8]>::to_vec),
                ..PeerFacts::NONE
            };
            Ok((stream, facts))
        }
        Err(why) => {
            let _none: Option<()> = handshake_failed(host, side, &name, &why);
            Err(if why.word == "timeout" {
                CloseCause::ConnectTimeout
            } else {
                CloseCause::Refused
            })
        }
    }
}

async fn within<T>(
    limit: std::time::Duration,
    task: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    match tokio::time::timeout(limit, task).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the handshake took too long")),
    }
}

fn handshake_failed<P: Protocol, T>(
    host: &Rc<Host<P>>,
    side: &'static str,
    peer: &str,
    why: &Failure,
) -> Option<T> {
    host.shared.metrics.tls_failure(&host.shared.name, side, why.word);
    host.shared.event(NodeEvent::TlsFailed { peer: peer.to_owned(), side, why: why.clone() });
    None
}

/// Who is behind a unix socket.
pub(crate) fn credentials(stream: &tokio::net::UnixStream) -> Option<Credentials> {
    let told = stream.peer_cred().ok()?;
    Some(Credentials { uid: told.uid(), gid: told.gid(), pid: told.pid() })
}

/// Takes a connection over a unix socket in.
pub(crate) fn take_in_unix(
    stream: tokio::net::UnixStream,
    number: u64,
    local: SocketAddr,
) -> TakenIn {
    let facts = PeerFacts { credentials: credentials(&stream), ..PeerFacts::NONE };
    let (stream, remote) = (Stream::Unix(stream), strowger_contract::unix::client(number));
    TakenIn { stream, remote, local, facts, early: Vec::new() }
}
