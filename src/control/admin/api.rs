//! The paths of the admin server.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::{ConnectInfo, DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, patch, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};
use strowger_contract::Certificate;
use tokio::sync::Semaphore;
use tokio::sync::broadcast::error::RecvError;
use tokio_stream::wrappers::ReceiverStream;

use super::tls::Peer;
use super::{AdminBackend, PutError, leases};
use crate::control::config::{Permission, Right};
use crate::observe::Event;

/// Events that wait for one slow reader.
const EVENTS_WAITING: usize = 64;

const PAGE: &str = include_str!("status.html");

/// Live calls, traces and the ladder of one.
const CALLS: &str = include_str!("calls.html");

pub(super) struct Shared {
    pub(super) backend: Arc<dyn AdminBackend>,
    token: Option<String>,
    places: Semaphore,
    timeout: Duration,
}

pub(super) type App = State<Arc<Shared>>;

pub(super) fn router(
    backend: Arc<dyn AdminBackend>,
    token: Option<String>,
    requests: usize,
    body: usize,
    timeout: Duration,
) -> Router {
    let shared = Arc::new(Shared { backend, token, places: Semaphore::new(requests), timeout });
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .route("/", get(|| async { page(PAGE) }))
        .route("/calls", get(|| async { page(CALLS) }))
        .route("/api/v1/status", get(status))
        .route("/api/v1/config", get(config).put(put_config))
        .route("/api/v1/pools", get(pools))
        .route("/api/v1/pools/{pool}", get(pool))
        .route(
            "/api/v1/pools/{pool}/instances/{id}",
            get(leases::get).put(leases::put).delete(leases::delete),
        )
        .route("/api/v1/pools/{pool}/instances/{id}/lease", patch(leases::renew))
        .route("/api/v1/pools/{pool}/instances/{id}/drain", post(drain))
        .route("/api/v1/pools/{pool}/instances/{id}/undrain", post(undrain))
        .route("/api/v1/sessions", get(sessions))
        .route("/api/v1/listeners", get(listeners))
        .route("/api/v1/peers", get(peers))
        .route("/api/v1/calls", get(super::calls::calls))
        .route("/api/v1/traces", get(super::calls::traces).post(super::calls::start))
        .route("/api/v1/traces/{id}", get(super::calls::trace).delete(super::calls::end))
        .route("/api/v1/events", get(events))
        .merge(super::routing::router())
        .fallback(|| async {
            problem(StatusCode::NOT_FOUND, "There is nothing at this path", json!({}))
        })
        .method_not_allowed_fallback(|| async {
            problem(
                StatusCode::METHOD_NOT_ALLOWED,
                "This path does not take this method",
                json!({}),
            )
        })
        .layer(DefaultBodyLimit::max(body))
        .layer(from_fn_with_state(Arc::clone(&shared), guard))
        .with_state(shared)
}

/// `application/problem+json` (RFC 9457).
pub(super) fn problem(status: StatusCode, title: &str, extra: Value) -> Response {
    let mut body = json!({ "type": "about:blank", "title": title, "status": status.as_u16() });
    if let (Value::Object(body), Value::Object(extra)) = (&mut body, extra) {
        body.extend(extra);
    }
    (status, [(header::CONTENT_TYPE, "application/problem+json")], body.to_string()).into_response()
}

/// The token, the number of requests, the time.
async fn guard(State(shared): App, mut request: Request, next: Next) -> Response {
    let open = matches!(request.uri().path(), "/healthz" | "/readyz");
    if !open {
        match may(&shared, &request) {
            Ok(caller) => drop(request.extensions_mut().insert(caller)),
            Err(response) => return *response,
        }
    }
    let Ok(_place) = shared.places.try_acquire() else {
        return problem(StatusCode::SERVICE_UNAVAILABLE, "Too many requests at a time", json!({}));
    };
    match tokio::time::timeout(shared.timeout, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            problem(StatusCode::REQUEST_TIMEOUT, "The request did not come in in time", json!({}))
        }
    }
}

/// Who asks: all rights, or those of the permissions that the certificate and the token stand for. Goes along
/// with the request.
#[derive(Clone)]
pub(super) struct Caller(Option<Vec<Permission>>);

impl Caller {
    /// Whether it may register instances of a pool.
    pub(super) fn may_register(&self, pool: &str) -> bool {
        let allows = |one: &Permission| one.allows(Right::Register, Some(pool));
        self.0.as_ref().is_none_or(|known| known.iter().any(allows))
    }
}

/// Whether the certificate or the token that is shown allows the request.
fn may(shared: &Shared, request: &Request) -> Result<Caller, Box<Response>> {
    let permissions = shared.backend.permissions();
    if shared.token.is_none() && permissions.is_empty() {
        return Ok(Caller(None));
    }
    let peer = request.extensions().get::<ConnectInfo<Peer>>();
    let certificate = peer.and_then(|ConnectInfo(peer)| peer.certificate.clone());
    let shown = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let shown = shown.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default().trim();
    if shared.token.as_deref().is_some_and(|token| is_same(token, shown)) {
        return Ok(Caller(None));
    }
    let (right, pool) = what_is_asked(request.method(), request.uri().path());
    let known = permissions_of(&permissions, certificate.as_deref(), shown);
    if known.is_empty() {
        let title = "A token is needed: Authorization: Bearer TOKEN";
        let response = problem(StatusCode::UNAUTHORIZED, title, json!({}));
        return Err(Box::new(([(header::WWW_AUTHENTICATE, "Bearer")], response).into_response()));
    }
    if known.iter().any(|one| one.allows(right, pool.as_deref())) {
        return Ok(Caller(Some(known)));
    }
    let names = known.iter().map(|one| one.name.as_str()).collect::<Vec<_>>().join(", ");
    let extra =
        json!({ "token": names, "right": format!("{right:?}").to_lowercase(), "pool": pool });
    Err(Box::new(problem(StatusCode::FORBIDDEN, "The token does not allow that", extra)))
}

/// All that a certificate and a token stand for: a host may have a certificate of its own and be given a
/// token besides, and each adds rights.
fn permissions_of(
    all: &[Permission],
    certificate: Option<&Certificate>,
    token: &str,
) -> Vec<Permission> {
    let is_meant = |one: &&Permission| {
        certificate.is_some_and(|shown| one.is_of(shown))
            || !one.token.is_empty() && is_same(&one.token, token)
    };
    all.iter().filter(is_meant).cloned().collect()
}

/// The right that a request needs, and on which pool.
fn what_is_asked(method: &Method, path: &str) -> (Right, Option<String>) {
    let of_pool = path.strip_prefix("/api/v1/pools/").and_then(|rest| rest.split('/').next());
    let pool = of_pool.map(unescaped);
    if matches!(*method, Method::GET | Method::HEAD) {
        return (Right::Read, None);
    }
    match pool {
        // Its pools stand in the body; they are looked at there.
        None if path.starts_with("/routing/v1/") => (Right::Register, None),
        Some(pool) if is_drain(path) => (Right::Drain, Some(pool)),
        Some(pool) => (Right::Register, Some(pool)),
        None => (Right::Config, None),
    }
}

/// Whether a path of a pool is that of a drain or its end: the last of exactly so many parts, not what an
/// instance's id may end in.
fn is_drain(path: &str) -> bool {
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    matches!(parts[..], ["api", "v1", "pools", _, "instances", _, "drain" | "undrain"])
}

/// Percent-encoding undone, as the path's own reader does.
fn unescaped(text: &str) -> String {
    let (mut out, bytes) = (Vec::new(), text.as_bytes());
    let mut at = 0;
    while at < bytes.len() {
        let hex = bytes.get(at + 1..at + 3).and_then(|pair| std::str::from_utf8(pair).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) if bytes[at] == b'%' => {
                out.push(byte);
                at += 3;
            }
            _ => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn is_same(token: &str, shown: &str) -> bool {
    // All bytes are compared, whatever the first ones say.
    let differs =
        shown.bytes().zip(token.bytes()).fold(0, |differs, (one, two)| differs | (one ^ two));
    shown.len() == token.len() && differs == 0
}

#[derive(Deserialize)]
struct Verbose {
    verbose: Option<String>,
}

async fn ready(State(shared): App, Query(query): Query<Verbose>) -> Response {
    let checks = shared.backend.readiness();
    let ok = checks.iter().all(|check| check.ok);
    let status = if ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    if query.verbose.is_some() {
        let providers: Vec<Value> = shared
            .backend
            .registry()
            .providers()
            .into_iter()
            .map(|(name, state)| json!({ "name": name, "ok": state.ok, "detail": state.detail }))
            .collect();
        let body = json!({ "ready": ok, "checks": checks, "providers": providers });
        return (status, Json(body)).into_response();
    }
    (status, if ok { "ready\n" } else { "not ready\n" }).into_response()
}

async fn peers(State(shared): App) -> Json<Value> {
    Json(
        json!({ "peers": shared.backend.core().peers_view(), "bindings": shared.backend.core().bindings_view() }),
    )
}

async fn metrics(State(shared): App) -> Response {
    let text = shared.backend.metrics().render();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

fn page(text: &'static str) -> Response {
    let policy = "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'";
    (
        [
            (header::CONTENT_TYPE, "text/html; charset=utf-8"),
            (header::CONTENT_SECURITY_POLICY, policy),
        ],
        text,
    )
        .into_response()
}

async fn status(State(shared): App) -> Json<Value> {
    let backend = &shared.backend;
    let requests = backend.metrics().requests();
    let requests: Vec<Value> = requests
        .into_iter()
        .map(
            |(class, outcome, count)| json!({ "class": class, "outcome": outcome, "count": count }),
        )
        .collect();
    Json(json!({
        "node": backend.node(),
        "ready": backend.readiness(),
        "pools": backend.core().pools_view(Instant::now()),
        "sessions": backend.core().sessions_view(),
        "requests": requests,
        "events": backend.events().latest(50),
    }))
}

async fn config(State(shared): App) -> Response {
    let (text, epoch) = shared.backend.config();
    (
        [
            (header::CONTENT_TYPE, "application/yaml".to_owned()),
            (header::ETAG, format!("\"{epoch}\"")),
        ],
        text,
    )
        .into_response()
}

async fn put_config(State(shared): App, headers: HeaderMap, body: Bytes) -> Response {
    let Ok(text) = std::str::from_utf8(&body) else {
        return problem(
            StatusCode::UNPROCESSABLE_ENTITY,
            "The configuration is not UTF-8",
            json!({}),
        );
    };
    let wanted = headers
        .get(header::IF_MATCH)
        .and_then(|value| value.to_str().ok())
        .filter(|value| *value != "*");
    let if_match = match wanted.map(|value| value.trim_matches('"').parse::<u64>()) {
        Some(Err(_)) => {
            return problem(
                StatusCode::BAD_REQUEST,
                "If-Match must be an epoch, as ETag gave it",
                json!({}),
            );
        }
        Some(Ok(epoch)) => Some(epoch),
        None => None,
    };
    match shared.backend.put_config(text, if_match) {
        Ok(epoch) => ([(header::ETAG, format!("\"{epoch}\""))], Json(json!({ "epoch": epoch })))
            .into_response(),
        Err(PutError::Stale(epoch)) => problem(
            StatusCode::PRECONDITION_FAILED,
            "The configuration changed meanwhile",
            json!({ "epoch": epoch }),
        ),
        Err(PutError::Invalid(errors)) => problem(
            StatusCode::UNPROCESSABLE_ENTITY,
            "The configuration is wrong; the old one stays",
            json!({ "errors": errors }),
        ),
    }
}

async fn pools(State(shared): App) -> Json<Value> {
    Json(json!(shared.backend.core().pools_view(Instant::now())))
}

async fn pool(State(shared): App, Path(name): Path<String>) -> Response {
    let pools = shared.backend.core().pools_view(Instant::now());
    match pools.into_iter().find(|pool| pool.name == name) {
        Some(pool) => Json(json!(pool)).into_response(),
        None => problem(StatusCode::NOT_FOUND, "There is no such pool", json!({ "pool": name })),
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Drain {
    deadline_s: Option<u64>,
}

async fn drain(
    State(shared): App,
    Path((pool, id)): Path<(String, String)>,
    body: Bytes,
) -> Response {
    let wanted: Drain = if body.is_empty() {
        Drain::default()
    } else {
        match serde_json::from_slice(&body) {
            Ok(wanted) => wanted,
            Err(error) => {
                let detail = json!({ "detail": error.to_string() });
                return problem(
                    StatusCode::BAD_REQUEST,
                    "The body must be {\"deadline_s\": SECONDS}",
                    detail,
                );
            }
        }
    };
    let deadline = wanted.deadline_s.map(leases::deadline);
    match shared.backend.core().drain(Instant::now(), &pool, &id, deadline) {
        Ok(sessions) => {
            shared.backend.registry().drain(&pool, &id, true, deadline);
            (StatusCode::ACCEPTED, Json(json!({ "sessions": sessions }))).into_response()
        }
        Err(_) => no_instance(&pool, &id),
    }
}

async fn undrain(State(shared): App, Path((pool, id)): Path<(String, String)>) -> Response {
    match shared.backend.core().undrain(Instant::now(), &pool, &id) {
        Ok(()) => {
            shared.backend.registry().drain(&pool, &id, false, None);
            Json(json!({})).into_response()
        }
        Err(_) => no_instance(&pool, &id),
    }
}

pub(super) fn no_instance(pool: &str, id: &str) -> Response {
    problem(
        StatusCode::NOT_FOUND,
        "There is no such pool or instance",
        json!({ "pool": pool, "instance": id }),
    )
}

#[derive(Deserialize)]
struct SessionQuery {
    pool: Option<String>,
    key: Option<String>,
}

async fn sessions(State(shared): App, Query(query): Query<SessionQuery>) -> Response {
    let core = shared.backend.core();
    let now = Instant::now();
    let Some(key) = query.key else {
        let pools: Vec<Value> = core
            .pools_view(now)
            .into_iter()
            .filter(|pool| query.pool.as_ref().is_none_or(|name| *name == pool.name))
            .flat_map(|pool| {
                let name = pool.name;
                pool.backends.into_iter().map(move |backend| json!({ "pool": name, "instance": backend.id, "sessions": backend.sessions }))
            })
            .collect();
        return Json(json!({ "table": core.sessions_view(), "instances": pools })).into_response();
    };
    // Clients are known by their address's bytes.
    let address = key.parse::<std::net::IpAddr>().ok().map(|address| match address {
        std::net::IpAddr::V4(address) => address.octets().to_vec(),
        std::net::IpAddr::V6(address) => address.octets().to_vec(),
    });
    let names: Vec<Vec<u8>> = address.into_iter().chain([key.into_bytes()]).collect();
    let pool = query.pool.as_deref();
    let found = shared.backend.session_spaces().iter().find_map(|&space| {
        names.iter().find_map(|name| core.session_named(now, space, pool, name))
    });
    match found {
        Some(found) => Json(json!(found)).into_response(),
        None => problem(
            StatusCode::NOT_FOUND,
            "The table has no such session (one that a token carries is not in it)",
            json!({}),
        ),
    }
}

async fn listeners(State(shared): App) -> Json<Value> {
    Json(shared.backend.node()["listeners"].clone())
}

async fn events(State(shared): App, headers: HeaderMap) -> Response {
    let last = headers
        .get("last-event-id")
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.parse().ok());
    let mut subscription = shared.backend.events().subscribe(last.unwrap_or(0));
    let (sender, receiver) = tokio::sync::mpsc::channel(EVENTS_WAITING);
    tokio::spawn(async move {
        for event in &subscription.past {
            if sender.send(to_sse(event)).await.is_err() {
                return;
            }
        }
        loop {
            match subscription.future.recv().await {
                Ok(event) if sender.send(to_sse(&event)).await.is_ok() => {}
                // Too slow: the stream ends, so that its client comes back with Last-Event-ID and gets
                // what it missed out of the ring, instead of never knowing of it.
                Ok(_) | Err(RecvError::Lagged(_) | RecvError::Closed) => return,
            }
        }
    });
    Sse::new(ReceiverStream::new(receiver)).keep_alive(KeepAlive::default()).into_response()
}

fn to_sse(event: &Event) -> Result<sse::Event, Infallible> {
    let data = serde_json::to_string(event).unwrap_or_default();
    Ok(sse::Event::default().id(event.id.to_string()).event(event.kind.clone()).data(data))
}
