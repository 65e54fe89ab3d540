//! Live calls and traces.

use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::api::{App, problem};
use crate::observe::{TRACE_LONGEST, TRACES_MAX, TraceError};

/// Calls in one answer if not said otherwise, and at most.
const CALLS: usize = 100;
const CALLS_MAX: usize = 10_000;

/// How long a trace runs if not said otherwise.
const TRACE_FOR: u64 = 60;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CallQuery {
    pool: Option<String>,
    instance: Option<String>,
    limit: Option<usize>,
}

/// Live calls, the longest first.
pub(super) async fn calls(State(shared): App, Query(query): Query<CallQuery>) -> Json<Value> {
    let limit = query.limit.unwrap_or(CALLS).min(CALLS_MAX);
    let calls = &shared.backend.sinks().calls;
    Json(calls.list(query.pool.as_deref(), query.instance.as_deref(), limit))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Start {
    protocol: String,
    key: String,
    #[serde(default = "trace_for")]
    for_s: u64,
}

fn trace_for() -> u64 {
    TRACE_FOR
}

/// Starts a trace.
pub(super) async fn start(State(shared): App, body: Bytes) -> Response {
    let wanted: Start = match serde_json::from_slice(&body) {
        Ok(wanted) => wanted,
        Err(error) => {
            return problem(
                StatusCode::BAD_REQUEST,
                "The body must be {\"protocol\": \"sip\", \"key\": \"call-id:…\", \"for_s\": 60}",
                json!({ "detail": error.to_string() }),
            );
        }
    };
    if wanted.for_s == 0 || wanted.for_s > TRACE_LONGEST.as_secs() {
        let title = format!("`for_s` must be from 1 to {}", TRACE_LONGEST.as_secs());
        return problem(StatusCode::BAD_REQUEST, &title, json!({}));
    }
    let (protocol, tracer) = match shared.backend.tracer(&wanted.protocol, &wanted.key) {
        Ok(traced) => traced,
        Err(detail) => {
            let title = "There is nothing to trace by that key";
            return problem(StatusCode::BAD_REQUEST, title, json!({ "detail": detail }));
        }
    };
    let traces = &shared.backend.sinks().traces;
    match traces.add(protocol, &wanted.key, tracer, Duration::from_secs(wanted.for_s)) {
        Ok(id) => {
            let place = format!("/api/v1/traces/{id}");
            let body = json!({ "id": id, "pcap": format!("{place}.pcap") });
            (StatusCode::CREATED, [(header::LOCATION, place)], Json(body)).into_response()
        }
        Err(TraceError::TooMany) => {
            let title = format!("{TRACES_MAX} traces run already; end one, or wait");
            problem(StatusCode::SERVICE_UNAVAILABLE, &title, json!({}))
        }
    }
}

/// All traces.
pub(super) async fn traces(State(shared): App) -> Json<Value> {
    Json(Value::Array(shared.backend.sinks().traces.list()))
}

#[derive(Deserialize)]
pub(super) struct Ladder {
    after: Option<usize>,
}

/// One trace as JSON, or, by its name with `.pcap`, as a capture file.
pub(super) async fn trace(
    State(shared): App,
    Path(name): Path<String>,
    Query(query): Query<Ladder>,
) -> Response {
    let traces = &shared.backend.sinks().traces;
    let number = name.strip_suffix(".pcap");
    let Ok(id) = number.unwrap_or(&name).parse() else { return no_trace(&name) };
    if number.is_some() {
        let Some(bytes) = traces.pcap(id) else { return no_trace(&name) };
        let attachment = format!("attachment; filename=\"strowger-{id}.pcap\"");
        let headers = [
            (header::CONTENT_TYPE, "application/vnd.tcpdump.pcap".to_owned()),
            (header::CONTENT_DISPOSITION, attachment),
        ];
        return (headers, bytes).into_response();
    }
    match traces.ladder(id, query.after.unwrap_or(0)) {
        Some(ladder) => Json(ladder).into_response(),
        None => no_trace(&name),
    }
}

/// Ends a trace; what it has is kept for a while.
pub(super) async fn end(State(shared): App, Path(name): Path<String>) -> Response {
    match name.parse().map(|id| shared.backend.sinks().traces.end(id)) {
        Ok(true) => StatusCode::NO_CONTENT.into_response(),
        _ => no_trace(&name),
    }
}

fn no_trace(name: &str) -> Response {
    problem(StatusCode::NOT_FOUND, "There is no such trace", json!({ "trace": name }))
}
