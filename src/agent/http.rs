//! A small HTTP client: one request, one answer, with a limit in time and size.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// An answer's size, at most.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// Where an edge's admin API is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// `127.0.0.1:9080`.
    pub(crate) authority: String,
}

impl Target {
    /// Reads `http://host:port`.
    ///
    /// # Errors
    /// What was expected.
    pub(crate) fn parse(url: &str) -> Result<Self, String> {
        let wrong = || format!("`{url}` is no edge; write http://127.0.0.1:9080");
        if url.starts_with("https://") {
            return Err("https:// is not supported in this version; the API off loopback wants a token, and a tunnel for secrecy".to_owned());
        }
        let rest = url.strip_prefix("http://").ok_or_else(wrong)?.trim_end_matches('/');
        let (host, port) = rest.rsplit_once(':').ok_or_else(wrong)?;
        let good =
            !host.is_empty() && !rest.contains('/') && port.parse::<u16>().is_ok_and(|it| it > 0);
        if good { Ok(Self { authority: rest.to_owned() }) } else { Err(wrong()) }
    }

    /// Whether the edge is on this host, by its address.
    pub(crate) fn is_local(&self) -> bool {
        let host = self.authority.rsplit_once(':').map_or("", |(host, _)| host);
        host == "localhost"
            || self.authority.parse::<SocketAddr>().is_ok_and(|it| it.ip().is_loopback())
    }
}

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

/// Asks; the status and the body.
///
/// # Errors
/// Nobody answers, or not in time, or not HTTP.
pub(crate) async fn ask(
    target: &Target,
    ask: &Ask<'_>,
    limit: Duration,
) -> Result<(u16, Bytes), String> {
    let all = async {
        let stream = TcpStream::connect(&*target.authority).await.map_err(|it| it.to_string())?;
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
