//! The agent's own API: HTTP on a unix socket that only its owner may open.
//!
//! `GET /v1/status`, `GET /metrics`, `GET /healthz`, and `POST /v1/command` with one of [`Command`].

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::observe::rfc3339;

/// Events that are remembered for `status`.
const EVENTS_MAX: usize = 200;

/// Callers that wait to be accepted.
const BACKLOG: i32 = 128;

/// A manifest's size, at most.
const BODY_BYTES_MAX: usize = 8 << 20;

/// An order.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub(crate) enum Command {
    /// Make what a manifest says so.
    Apply {
        /// The manifest.
        text: String,
        /// Its name, for errors.
        name: String,
        /// What its paths are relative to.
        folder: PathBuf,
        /// Only say what would be done.
        dry_run: bool,
    },
    /// What there is.
    Status,
    /// Metrics.
    Metrics,
    /// So many instances.
    Scale {
        /// The application.
        app: String,
        /// How many.
        count: u32,
    },
    /// Back to an earlier release: the one before, or the named one.
    Rollback {
        /// The application.
        app: String,
        /// A release's number.
        release: Option<u64>,
    },
    /// Replace an instance, through its drain.
    Drain {
        /// `APP-INDEX`.
        instance: String,
        /// Do not wait for its sessions.
        now: bool,
    },
    /// What is to become of a rollout.
    Rollout {
        /// The application.
        app: String,
        /// What.
        what: RolloutOrder,
    },
    /// Stop an application, through its instances' drain.
    Remove {
        /// The application.
        app: String,
    },
    /// What a one-off process of an application runs with.
    Prepare {
        /// The application.
        app: String,
    },
    /// The newest output.
    Logs {
        /// An application or an instance.
        of: String,
        /// Lines.
        tail: usize,
        /// Only later ones, by instance.
        since: BTreeMap<String, String>,
    },
}

/// What is to become of a rollout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum RolloutOrder {
    /// It stays where it is.
    Pause,
    /// On with it, whatever the gates say.
    Promote,
    /// Back to the release of before.
    Abort,
}

/// An order and who waits for the answer.
pub(crate) struct Request {
    pub(crate) what: Command,
    pub(crate) answer: oneshot::Sender<Result<Value, Refusal>>,
}

/// Why an order was refused.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Refusal {
    /// The HTTP status.
    #[serde(skip)]
    pub(crate) status: u16,
    /// What is wrong, line by line.
    pub(crate) errors: Vec<String>,
}

impl Refusal {
    pub(crate) fn new(status: u16, error: impl Into<String>) -> Self {
        Self { status, errors: vec![error.into()] }
    }
}

/// What was told: counters and the newest events.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub(crate) counts: BTreeMap<&'static str, u64>,
    pub(crate) events: VecDeque<Value>,
}

impl Told {
    pub(crate) fn count(&mut self, kind: &'static str) {
        *self.counts.entry(kind).or_default() += 1;
    }

    pub(crate) fn event(&mut self, app: &str, id: &str, kind: &str, detail: &str) {
        if self.events.len() >= EVENTS_MAX {
            self.events.pop_front();
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.events.push_back(json!({
            "time": rfc3339(now), "app": app, "instance": id, "event": kind, "detail": detail,
        }));
    }
}

/// Listens where only the owner may connect, from the first moment on: a socket's file gets the mode that the
/// socket has when it is bound, so there is no time at which it is open to others.
fn private_listener(path: &Path) -> std::io::Result<tokio::net::UnixListener> {
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None)?;
    rustix::fs::fchmod(&socket, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)?;
    socket.bind(&socket2::SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    tokio::net::UnixListener::from_std(std::os::fd::OwnedFd::from(socket).into())
}

type Requests = mpsc::Sender<Request>;

/// Serves the API on a unix socket.
pub(super) fn serve(
    socket: &Path,
    requests: Requests,
    stop: CancellationToken,
) -> std::io::Result<tokio::task::JoinHandle<()>> {
    // Of an agent of before: the folder's lock says that there is no other.
    let _none = std::fs::remove_file(socket);
    let listener = private_listener(socket)?;
    let app = axum::Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/v1/status", get(status))
        .route("/metrics", get(metrics))
        .route("/v1/command", post(command))
        .layer(axum::extract::DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(requests);
    Ok(tokio::spawn(async move {
        let ended = async move { stop.cancelled().await };
        // It ends with the agent.
        let _ended = axum::serve(listener, app).with_graceful_shutdown(ended).await;
    }))
}

async fn give(requests: &Requests, what: Command) -> Result<Value, Refusal> {
    let ending = || Refusal::new(503, "the agent is ending");
    let (answer, answered) = oneshot::channel();
    requests.send(Request { what, answer }).await.map_err(|_| ending())?;
    answered.await.map_err(|_| ending())?
}

async fn status(State(requests): State<Requests>) -> Response {
    respond(give(&requests, Command::Status).await)
}

async fn metrics(State(requests): State<Requests>) -> Response {
    match give(&requests, Command::Metrics).await {
        Ok(text) => text.as_str().unwrap_or_default().to_owned().into_response(),
        Err(refusal) => respond(Err(refusal)),
    }
}

async fn command(State(requests): State<Requests>, body: axum::body::Bytes) -> Response {
    match serde_json::from_slice::<Command>(&body) {
        Ok(what) => respond(give(&requests, what).await),
        Err(error) => respond(Err(Refusal::new(400, error.to_string()))),
    }
}

fn respond(answer: Result<Value, Refusal>) -> Response {
    match answer {
        Ok(value) => Json(value).into_response(),
        Err(refusal) => {
            let status = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::BAD_REQUEST);
            (status, Json(refusal)).into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[tokio::test]
    async fn the_socket_is_its_owners_alone() {
        let folder = tempfile::TempDir::new().expect("a folder");
        let path = folder.path().join("agent.sock");
        let listener = private_listener(&path).expect("bound");
        let mode = std::fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let (client, accepted) =
            tokio::join!(tokio::net::UnixStream::connect(&path), listener.accept());
        assert!(client.is_ok() && accepted.is_ok());
    }
}
