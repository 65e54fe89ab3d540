//! The admin server over TLS: handshakes beside the accept loop, and who the client proved to be.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use strowger_contract::{Certificate, Level};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::guarded::Guarded;
use crate::observe::{Event, Events};
use crate::tls::Server;

/// Handshakes at a time: a client that begins one and says no more must not keep others out.
const HANDSHAKES_MAX: usize = 128;

/// How long to wait when no connection can be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The other side of a request.
#[derive(Clone, Debug, Default)]
pub(super) struct Peer {
    /// What its certificate says, if it showed one; an authority of ours vouches for it.
    pub(super) certificate: Option<Arc<Certificate>>,
}

impl Connected<IncomingStream<'_, Guarded<TlsListener>>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Guarded<TlsListener>>) -> Self {
        let (_, session) = stream.io().get_ref().get_ref();
        let shown = session.peer_certificates().and_then(<[_]>::first);
        let certificate = shown.map(|der| Arc::new(crate::tls::certificate(der)));
        Self { certificate }
    }
}

/// Connections whose handshake is done.
pub(super) struct TlsListener {
    done: mpsc::Receiver<(TlsStream<TcpStream>, SocketAddr)>,
    local: SocketAddr,
}

impl TlsListener {
    /// Accepts in a task of its own, which ends with this.
    ///
    /// # Errors
    /// The socket has no address.
    pub(super) fn new(
        listener: TcpListener,
        server: Arc<Server>,
        handshake: Duration,
        events: Arc<Events>,
    ) -> io::Result<Self> {
        let local = listener.local_addr()?;
        let (sender, done) = mpsc::channel(HANDSHAKES_MAX);
        tokio::spawn(async move {
            tokio::select! {
                () = sender.closed() => {}
                () = accept(&listener, &server, handshake, &events, &sender) => {}
            }
        });
        Ok(Self { done, local })
    }
}

async fn accept(
    listener: &TcpListener,
    server: &Server,
    handshake: Duration,
    events: &Arc<Events>,
    sender: &mpsc::Sender<(TlsStream<TcpStream>, SocketAddr)>,
) {
    let places = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let Ok((stream, remote)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let acceptor = TlsAcceptor::from(server.config());
        let (sender, events) = (sender.clone(), Arc::clone(events));
        tokio::spawn(async move {
            let _place = place;
            let why = match tokio::time::timeout(handshake, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    // The server ends.
                    let _ended = sender.send((stream, remote)).await;
                    return;
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => "it took too long".to_owned(),
            };
            let detail = format!("{remote}: {why}");
            events.emit(Event::node(Level::Info, "admin_handshake_failed", detail));
        });
    }
}

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.done.recv().await {
            Some(accepted) => accepted,
            // The accept loop ends with this only.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(self.local)
    }
}
