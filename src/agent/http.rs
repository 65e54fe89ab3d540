//! A small HTTP client: one request, one answer, with a limit in time and size.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

pub(crate) use crate::control::reach::Target;
use crate::control::reach::server_name;
use crate::routing::TlsClientSpec;
use crate::tls::Client;

/// An answer's size, at most.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// A request of an API.
#[derive(Clone, Debug)]
pub(crate) struct Ask<'a> {
    pub(crate) method: &'static str,
    pub(crate) path: &'a str,
    pub(crate) token: Option<&'a str>,
    /// `If-Match`, a generation.
    pub(crate) generation: Option<u64>,
    pub(crate) body: String,
}

/// Asks; the status and the body. `tls`: whom to believe and who we are.
///
/// # Errors
/// Nobody answers, or not in time, or not HTTP, or it is not who it must be.
pub(crate) async fn ask(
    target: &Target,
    tls: Option<(&TlsClientSpec, &Client)>,
    ask: &Ask<'_>,
    limit: Duration,
) -> Result<(u16, Bytes), String> {
    let all = async {
        let stream = TcpStream::connect(&*target.authority).await.map_err(|it| it.to_string())?;
        let Some((spec, client)) = tls else {
            return exchange(TokioIo::new(stream), &target.authority, ask).await;
        };
        let connector = TlsConnector::from(client.config());
        let stream = connector.connect(server_name(spec)?, stream).await;
        let stream = stream.map_err(|error| format!("TLS: {error}"))?;
        exchange(TokioIo::new(stream), &target.authority, ask).await
    };
    tokio::time::timeout(limit, all).await.unwrap_or_else(|_| Err("no answer in time".to_owned()))
}

async fn exchange<S>(stream: S, host: &str, ask: &Ask<'_>) -> Result<(u16, Bytes), String>
where
    S: hyper::rt::Read + hyper::rt::Write + Unpin,
{
    let said = |error: hyper::Error| error.to_string();
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(stream).await.map_err(said)?;
    let mut request = Request::builder().method(ask.method).uri(ask.path).header("host", host);
    if let Some(token) = ask.token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    if let Some(generation) = ask.generation {
        request = request.header("if-match", format!("\"{generation}\""));
    }
    let body = Full::new(Bytes::from(ask.body.clone()));
    let request = request.body(body).map_err(|error| error.to_string())?;
    let answer = async {
        let answer = sender.send_request(request).await.map_err(said)?;
        let status = answer.status().as_u16();
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
        Ok((status, body.map_err(|error| error.to_string())?.to_bytes()))
    };
    tokio::pin!(answer);
    tokio::pin!(connection);
    tokio::select! {
        answer = &mut answer => answer,
        // It drives the exchange; when it ends first, the answer may still be there to be read.
        _ended = &mut connection => answer.await,
    }
}
