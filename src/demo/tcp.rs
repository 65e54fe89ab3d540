//! Sample raw TCP: instances that echo, and clients that expect that.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{interval, sleep, timeout};

use super::Counts;

const LINE: &[u8] = b"the quick brown fox jumps over the lazy dog\n";
const PACE: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(5);

/// Echoes until it is dropped.
pub(super) async fn serve(port: u16) {
    let Ok(listener) = TcpListener::bind(("127.0.0.1", port)).await else { return };
    let mut connections = JoinSet::new();
    while let Ok((mut stream, _)) = listener.accept().await {
        while connections.try_join_next().is_some() {}
        connections.spawn(async move {
            let (mut reader, mut writer) = stream.split();
            // An error ends the connection, and the client counts that.
            let _ended = tokio::io::copy(&mut reader, &mut writer).await;
        });
    }
}

/// Opens connections until it is dropped.
pub(super) async fn traffic(edge: SocketAddr, counts: Arc<Counts>) {
    sleep(Duration::from_millis(800)).await;
    let mut pace = interval(PACE);
    let mut running = JoinSet::new();
    loop {
        pace.tick().await;
        while running.try_join_next().is_some() {}
        let counts = Arc::clone(&counts);
        running.spawn(async move {
            let good = timeout(PATIENCE, connection(edge)).await.is_ok_and(|echoed| echoed.is_ok());
            counts.connections.note(good);
        });
    }
}

async fn connection(edge: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect(edge).await?;
    stream.write_all(LINE).await?;
    stream.shutdown().await?;
    let mut back = Vec::new();
    stream.read_to_end(&mut back).await?;
    if back == LINE { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}
