//! From an accepted socket to a stream that the engine may hear of: TLS, and what is known of the
//! other side. All of it is bounded in time and bytes, and nothing of it holds others up.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;

use socket2::{SockRef, TcpKeepalive};
use strowger_contract::{
    Certificate, CloseCause, Credentials, Peek, PeerFacts, Protocol, Proxied, Transport,
};
use tokio::net::TcpStream;

use super::hello::{HelloReader, Look};
use super::host::Host;
use super::shared::NodeEvent;
use super::socket::{Stream, TlsStream};
use super::websocket::WebSocket;
use crate::routing::ListenerLimits;
use crate::tls::{Failure, failure};

/// What is looked at before a route is chosen, at most: a ClientHello with many extensions.
const PEEK_BYTES_MAX: usize = 16 << 10;

/// A stream, ready for the engine.
pub(crate) struct TakenIn {
    pub(crate) stream: Stream,
    pub(crate) remote: SocketAddr,
    pub(crate) local: SocketAddr,
    pub(crate) facts: PeerFacts,
    /// Read already, and not yet given to anybody.
    pub(crate) early: Vec<u8>,
    /// Where messages come in frames.
    pub(crate) websocket: Option<Box<WebSocket>>,
}

/// Takes a TCP connection in; `None` if it came to nothing, which was counted and told.
pub(crate) async fn take_in<P: Protocol>(
    host: &Rc<Host<P>>,
    socket: TcpStream,
    via: SocketAddr,
    transport: Transport,
) -> Option<TakenIn> {
    let (mut remote, mut local) = (via, socket.local_addr().ok()?);
    let mut facts = PeerFacts::NONE;
    let mut early = Vec::new();
    let (proxy, limits, intake) = {
        let state = host.state();
        (state.spec.proxy.clone(), state.spec.limits.clone(), state.intake())
    };
    keep_watch(&SockRef::from(&socket), &limits);
    if let Some(proxy) = proxy.filter(|proxy| proxy.trusts(via.ip())) {
        let read = read_proxy_header(&socket, &mut early);
        let header = match tokio::time::timeout(proxy.timeout, read).await {
            Ok(Ok(header)) => header,
            Ok(Err(why)) => return not_proxied(host, via, "proxy_header_wrong", why),
            Err(_) => return not_proxied(host, via, "proxy_header_late", "none came in time"),
        };
        if let Some((client, called)) = header.addresses {
            (remote, local) = (client, called);
        }
        facts.proxied = Some(Proxied { via, tlvs: header.tlvs });
        early.drain(..header.length);
    }
    if matches!(transport, Transport::Tls | Transport::Wss) {
        let stream = serve_tls(host, socket, remote, &early).await?;
        {
            let session = stream.session();
            facts.certificate = verified(&session);
            facts.alpn = session.alpn_protocol().map(<[u8]>::to_vec);
            if let rustls::Connection::Server(server) = &*session {
                facts.server_name = server.server_name().map(str::to_ascii_lowercase);
            }
        }
        let stream = Stream::Tls(Box::new(stream));
        let mut early = Vec::new();
        let websocket = frames(host, &stream, transport, &mut early).await?;
        return Some(TakenIn { stream, remote, local, facts, early, websocket });
    }
    if let Some(look) = intake.peek {
        // Late or not: what is known by then decides.
        let _late =
            tokio::time::timeout(look.timeout, peek(&socket, look, &mut early, &mut facts)).await;
        facts.first_bytes.clone_from(&early);
        facts.first_bytes.truncate(PEEK_BYTES_MAX);
    }
    let stream = Stream::Tcp(socket);
    let websocket = frames(host, &stream, transport, &mut early).await?;
    Some(TakenIn { stream, remote, local, facts, early, websocket })
}

/// Does WebSocket's handshake, where the transport has one; `None` if it came to nothing.
async fn frames<P: Protocol>(
    host: &Rc<Host<P>>,
    stream: &Stream,
    transport: Transport,
    early: &mut Vec<u8>,
) -> Option<Option<Box<WebSocket>>> {
    if !matches!(transport, Transport::Ws | Transport::Wss) {
        return Some(None);
    }
    match Box::pin(super::websocket::accept(host, stream, early)).await {
        Ok(websocket) => {
            host.count("ws_opened");
            Some(Some(Box::new(websocket)))
        }
        Err(word) => {
            host.count(word);
            None
        }
    }
}

fn not_proxied<P: Protocol>(
    host: &Rc<Host<P>>,
    via: SocketAddr,
    word: &'static str,
    why: &'static str,
) -> Option<TakenIn> {
    host.count(word);
    host.shared.event(NodeEvent::NotProxied { via, why });
    None
}

/// Reads until a PROXY header is whole; what came behind it stays in `early`.
async fn read_proxy_header(
    socket: &TcpStream,
    early: &mut Vec<u8>,
) -> Result<super::proxy::Header, &'static str> {
    loop {
        if let Some(header) = super::proxy::parse(early)? {
            return Ok(header);
        }
        if !read_more(socket, early, super::proxy::HEADER_BYTES_MAX).await {
            return Err("the connection ended within the header");
        }
    }
}

/// Reads what a route may want to know, until it is known.
async fn peek(socket: &TcpStream, look: Peek, early: &mut Vec<u8>, facts: &mut PeerFacts) {
    let mut reader = HelloReader::default();
    let mut hello = look.client_hello;
    loop {
        if hello {
            match reader.look(early) {
                Look::Hello { server_name, alpn } => {
                    facts.server_name = server_name;
                    facts.alpn = alpn;
                    return;
                }
                Look::Other => hello = false,
                Look::More => {}
            }
        }
        if !hello && early.len() >= look.bytes
            || early.len() >= PEEK_BYTES_MAX
            || !read_more(socket, early, PEEK_BYTES_MAX).await
        {
            return;
        }
    }
}

/// Reads on; whether there was more.
async fn read_more(socket: &TcpStream, early: &mut Vec<u8>, limit: usize) -> bool {
    loop {
        if socket.readable().await.is_err() {
            return false;
        }
        let mut room = [0; 2_048];
        let room = &mut room[..limit.saturating_sub(early.len()).clamp(1, 2_048)];
        match socket.try_read(room) {
            Ok(0) => return false,
            Ok(count) => {
                early.extend_from_slice(&room[..count]);
                return true;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return false,
        }
    }
}

/// Has TCP notice that the other side is gone.
pub(crate) fn keep_watch(socket: &SockRef<'_>, limits: &ListenerLimits) {
    // Failures only mean that the kernel's own times hold.
    if !limits.keep_alive.is_zero() {
        let third = (limits.keep_alive / 3).max(std::time::Duration::from_secs(1));
        let every = TcpKeepalive::new().with_time(limits.keep_alive).with_interval(third);
        let _default = socket.set_tcp_keepalive(&every);
    }
    if !limits.user_timeout.is_zero() {
        let _default = socket.set_tcp_user_timeout(Some(limits.user_timeout));
    }
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
    TakenIn { stream, remote, local, facts, early: Vec::new(), websocket: None }
}
