//! The lease API: instances register, renew, drain and leave.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde::Deserialize;
use serde_json::json;

use super::api::{App, Caller, Shared, no_instance, problem};
use crate::control::registry::{Heartbeat, Put, Refused, Registration, RegistryError};

/// Who brings instances in over the API.
pub(crate) const SOURCE: &str = "api";

#[derive(Deserialize)]
pub(super) struct PutQuery {
    /// The registrar knows that the address is this instance's now.
    supersede: Option<bool>,
}

/// `If-Match: "7"`, as a generation.
fn generation(headers: &HeaderMap) -> Result<Option<u64>, Box<Response>> {
    let Some(value) = headers.get(header::IF_MATCH) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default().trim_matches('"');
    if text == "*" {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| {
        let title = "If-Match must be a generation, such as \"7\"";
        Box::new(problem(StatusCode::BAD_REQUEST, title, json!({})))
    })
}

fn bad(detail: &str) -> Response {
    let title = "The body is not what it must be";
    problem(StatusCode::BAD_REQUEST, title, json!({ "detail": detail }))
}

pub(super) async fn put(
    State(shared): App,
    Path((pool, id)): Path<(String, String)>,
    Query(query): Query<PutQuery>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let registration: Registration = match serde_json::from_slice(&body) {
        Ok(registration) => registration,
        Err(error) => return bad(&error.to_string()),
    };
    match generation(&headers) {
        Err(response) => return *response,
        Ok(Some(wanted)) if wanted != registration.generation => {
            return bad("If-Match and generation differ");
        }
        Ok(_) => {}
    }
    let registry = shared.backend.registry();
    let vouched = query.supersede.unwrap_or(false);
    let told = registration.generation;
    match registry
        .put_as(&pool, &id, registration, SOURCE, vouched, &|pool| caller.may_register(pool))
    {
        Ok(put) => {
            if let Err(error) = registry.written().await {
                return not_kept(&shared, SOURCE, &error);
            }
            let status = if put == Put::Created { StatusCode::CREATED } else { StatusCode::OK };
            let ttl_ms = registry.view(&pool, &id).map_or(0, |it| it.registration.lease_ttl_ms);
            let body = json!({
                "ttl_ms": ttl_ms,
                "next_ms": ttl_ms / crate::control::registry::HEARTBEATS,
                "router_id": registry.router_id(),
                "epoch": registry.epoch(),
            });
            (status, [(header::ETAG, format!("\"{told}\""))], Json(body)).into_response()
        }
        Err(error) => refused(&shared, &pool, &id, &error),
    }
}

/// It is in force, but a restart would forget it: who asked asks again, which changes nothing else.
pub(super) fn not_kept(shared: &Arc<Shared>, source: &str, error: &str) -> Response {
    shared.backend.metrics().registration(source, "not_kept");
    let title = "The state file cannot be written";
    let detail = format!("{error}; it is in force, but a restart of the edge would forget it");
    let response = problem(StatusCode::SERVICE_UNAVAILABLE, title, json!({ "detail": detail }));
    ([(header::RETRY_AFTER, "1")], response).into_response()
}

fn refused(shared: &Arc<Shared>, pool: &str, id: &str, error: &RegistryError) -> Response {
    match error {
        RegistryError::NoPool => {
            let pools: Vec<String> = shared
                .backend
                .core()
                .pools_view(Instant::now())
                .into_iter()
                .map(|pool| pool.name)
                .collect();
            let extra = json!({ "pool": pool, "pools": pools });
            problem(StatusCode::NOT_FOUND, "No configuration names such a pool", extra)
        }
        RegistryError::Bad(detail) => bad(detail),
        RegistryError::Configured(what) => problem(
            StatusCode::CONFLICT,
            "It stands in the configuration",
            json!({ "detail": format!("{what} stands in the edge's configuration") }),
        ),
        RegistryError::Refused(Refused::AddressInUse { address, holder, retry_ms }) => {
            let extra = json!({
                "address": address, "holder": { "pool": holder.0, "instance": holder.1 },
                "retry_ms": retry_ms,
            });
            let seconds = retry_ms.div_ceil(1_000).to_string();
            let response = problem(StatusCode::CONFLICT, "The address is in use", extra);
            ([(header::RETRY_AFTER, seconds)], response).into_response()
        }
        RegistryError::Refused(Refused::Stale { known }) => problem(
            StatusCode::PRECONDITION_FAILED,
            "The generation is stale",
            json!({ "generation": known }),
        ),
        RegistryError::Refused(Refused::Unknown) => no_instance(pool, id),
        RegistryError::Refused(Refused::OtherSource(source)) => problem(
            StatusCode::CONFLICT,
            "Another source holds the instance",
            json!({ "source": source }),
        ),
        RegistryError::Refused(Refused::OtherHost(host)) => problem(
            StatusCode::CONFLICT,
            "An instance of that id is alive on another host",
            json!({ "host": host, "detail": "ids are unique in a pool: name the apps of two hosts differently" }),
        ),
        RegistryError::Refused(Refused::Full) => {
            problem(StatusCode::CONFLICT, "The pool is full", json!({ "pool": pool }))
        }
    }
}

pub(super) async fn renew(
    State(shared): App,
    Path((pool, id)): Path<(String, String)>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let beat: Heartbeat = if body.is_empty() {
        Heartbeat::default()
    } else {
        match serde_json::from_slice(&body) {
            Ok(beat) => beat,
            Err(error) => return bad(&error.to_string()),
        }
    };
    let generation = match generation(&headers) {
        Ok(generation) => generation,
        Err(response) => return *response,
    };
    match shared.backend.registry().renew(&pool, &id, generation, &beat) {
        Ok(reply) => Json(reply).into_response(),
        Err(error) => refused(&shared, &pool, &id, &RegistryError::Refused(error)),
    }
}

pub(super) async fn delete(
    State(shared): App,
    Path((pool, id)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response {
    let generation = match generation(&headers) {
        Ok(generation) => generation,
        Err(response) => return *response,
    };
    let registry = shared.backend.registry();
    match registry.delete(&pool, &id, generation) {
        Ok(()) => {
            if let Err(error) = registry.written().await {
                return not_kept(&shared, SOURCE, &error);
            }
            StatusCode::NO_CONTENT.into_response()
        }
        Err(error) => refused(&shared, &pool, &id, &RegistryError::Refused(error)),
    }
}

pub(super) async fn get(State(shared): App, Path((pool, id)): Path<(String, String)>) -> Response {
    let now = Instant::now();
    let pools = shared.backend.core().pools_view(now);
    let found = pools
        .into_iter()
        .find(|view| view.name == pool)
        .and_then(|view| view.backends.into_iter().find(|backend| backend.id == id));
    let lease = shared.backend.registry().view(&pool, &id);
    if found.is_none() && lease.is_none() {
        return no_instance(&pool, &id);
    }
    Json(json!({ "instance": found, "lease": lease })).into_response()
}

/// How long a drain may last at most: longer than any call or credit session lives.
const DEADLINE_MAX: Duration = Duration::from_secs(90 * 86_400);

/// A drain's deadline within its bound.
pub(super) fn deadline(seconds: u64) -> Duration {
    Duration::from_secs(seconds).min(DEADLINE_MAX)
}
