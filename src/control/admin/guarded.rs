//! Connections to the admin API are bounded, and one that nothing passes over ends: whoever reaches the
//! port shall not hold descriptors of the process for ever.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use strowger_contract::Level;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep};

use crate::observe::{Event, Events};

/// Connections at a time: scrapers, agents, a few people.
const CONNECTIONS_MAX: usize = 1_024;

/// How long nothing may pass. Event streams say something more often, and requests are answered sooner.
const IDLE_MAX: Duration = Duration::from_secs(75);

/// A listener whose connections are bounded.
pub(super) struct Guarded<L> {
    inner: L,
    places: Arc<Semaphore>,
    events: Arc<Events>,
    idle: Duration,
}

impl<L> Guarded<L> {
    pub(super) fn new(inner: L, events: Arc<Events>) -> Self {
        Self::with(inner, events, CONNECTIONS_MAX, IDLE_MAX)
    }

    fn with(inner: L, events: Arc<Events>, most: usize, idle: Duration) -> Self {
        Self { inner, places: Arc::new(Semaphore::new(most)), events, idle }
    }

    async fn place(&mut self) -> Option<OwnedSemaphorePermit> {
        if let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
            return Some(place);
        }
        let detail = "no further one is accepted until one of them ends".to_owned();
        self.events.emit(Event::node(Level::Warn, "admin_connections_full", detail));
        Arc::clone(&self.places).acquire_owned().await.ok()
    }
}

impl<L: Listener> Listener for Guarded<L> {
    type Io = Watched<L::Io>;
    type Addr = L::Addr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let place = self.place().await;
        let (io, address) = self.inner.accept().await;
        let silence = Box::pin(sleep(self.idle));
        (Watched { io, idle: self.idle, silence, _place: place }, address)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.inner.local_addr()
    }
}

/// A connection that ends if nothing passes.
pub(super) struct Watched<T> {
    io: T,
    idle: Duration,
    silence: Pin<Box<Sleep>>,
    _place: Option<OwnedSemaphorePermit>,
}

impl<T> Watched<T> {
    /// What it watches.
    pub(super) fn get_ref(&self) -> &T {
        &self.io
    }

    fn passed(&mut self) {
        self.silence.as_mut().reset(Instant::now() + self.idle);
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Poll::Ready(result) = Pin::new(&mut self.io).poll_read(context, buffer) {
            self.passed();
            return Poll::Ready(result);
        }
        self.silence.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(context, bytes);
        if written.is_ready() {
            self.passed();
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    #[tokio::test]
    async fn the_silent_end_and_make_room() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let idle = Duration::from_millis(200);
        let mut guarded =
            Guarded::with(listener, Events::new(crate::observe::Metrics::new()), 1, idle);
        let _silent = TcpStream::connect(address).await.expect("connects");
        let mut second = TcpStream::connect(address).await.expect("connects");
        let (mut first, _) = guarded.accept().await;
        let mut byte = [0];
        let error = first.read(&mut byte).await.expect_err("nothing comes");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(first);
        let (mut next, _) = guarded.accept().await;
        second.write_all(b"x").await.expect("written");
        assert_eq!(next.read(&mut byte).await.expect("a byte"), 1);
    }
}
