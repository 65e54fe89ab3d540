//! Cloud Foundry's routing API, as far as TCP routes go: create, delete, list, events, router groups.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use serde::Deserialize;
use serde_json::json;
use tokio::sync::broadcast::error::RecvError;
use tokio_stream::wrappers::ReceiverStream;

use super::api::{App, Caller, Shared};
use super::leases::not_kept;
use crate::control::providers::{TCP_ROUTES, TcpRoute, TcpRoutes};
use crate::control::registry::{Refused, RegistryError};

/// Routes of one request, at most.
const ROUTES_MAX: usize = 10_000;

/// Events that wait for one slow reader.
const WAITING: usize = 64;

pub(super) fn router() -> Router<Arc<Shared>> {
    Router::new()
        .route("/routing/v1/tcp_routes", get(list))
        .route("/routing/v1/tcp_routes/create", post(create))
        .route("/routing/v1/tcp_routes/delete", post(delete))
        .route("/routing/v1/tcp_routes/events", get(events))
        .route("/routing/v1/router_groups", get(groups))
}

/// An error in routing-api's own form.
fn wrong(status: StatusCode, name: &str, message: &str) -> Response {
    (status, Json(json!({ "name": name, "message": message }))).into_response()
}

fn absent() -> Response {
    let message = "the routing API is not offered; configure `providers: { tcp_routes: {} }`";
    wrong(StatusCode::NOT_FOUND, "ResourceNotFoundError", message)
}

/// The routes and the group, if the API is offered.
fn offered(shared: &Shared) -> Option<(Arc<TcpRoutes>, String)> {
    shared.backend.tcp_routes()
}

/// As routing-api reads it: whatever the content type says.
fn routes_in(body: &[u8]) -> Result<Vec<TcpRoute>, Box<Response>> {
    serde_json::from_slice(body).map_err(|error| {
        Box::new(wrong(StatusCode::BAD_REQUEST, "ProcessRequestError", &error.to_string()))
    })
}

/// The pool of each route, or what is wrong with one.
fn pools(
    shared: &Shared,
    caller: &Caller,
    group: &str,
    routes: &[TcpRoute],
    needs_ttl: bool,
) -> Result<Vec<String>, Box<Response>> {
    let invalid =
        |why: String| Box::new(wrong(StatusCode::BAD_REQUEST, "TcpRouteMappingInvalidError", &why));
    if routes.len() > ROUTES_MAX {
        return Err(invalid(format!("at most {ROUTES_MAX} routes a request")));
    }
    let mut pools = Vec::new();
    for (index, route) in routes.iter().enumerate() {
        let at = |why: String| invalid(format!("[{index}].{why}"));
        route.check(group, needs_ttl).map_err(at)?;
        let pool = shared.backend.pool_at_tcp_port(route.port).ok_or_else(|| {
            at(format!("port: no tcp listener with one pool is bound to {}", route.port))
        })?;
        if !caller.may_register(&pool) {
            let message = format!("no right to register in {pool}");
            return Err(Box::new(wrong(StatusCode::FORBIDDEN, "UnauthorizedError", &message)));
        }
        pools.push(pool);
    }
    Ok(pools)
}

async fn create(State(shared): App, Extension(caller): Extension<Caller>, body: Bytes) -> Response {
    let Some((kept, group)) = offered(&shared) else { return absent() };
    let routes = match routes_in(&body) {
        Ok(routes) => routes,
        Err(response) => return *response,
    };
    let pools = match pools(&shared, &caller, &group, &routes, true) {
        Ok(pools) => pools,
        Err(response) => return *response,
    };
    let registry = shared.backend.registry();
    for (route, pool) in routes.into_iter().zip(pools) {
        if !kept.is_news(&route) {
            shared.backend.metrics().registration(TCP_ROUTES, "out_of_order");
            continue;
        }
        let Some(registration) = route.registration() else { continue };
        let may = |pool: &str| caller.may_register(pool);
        match registry.put_as(&pool, &route.id(), registration, TCP_ROUTES, false, &may) {
            Ok(_) => kept.keep(Instant::now(), route),
            Err(RegistryError::Refused(refused @ Refused::AddressInUse { .. })) => {
                let message = refused.to_string();
                return wrong(StatusCode::CONFLICT, "RouteConflictError", &message);
            }
            Err(error) => {
                let message = format!("{pool}/{}: {error}", route.id());
                return wrong(StatusCode::BAD_REQUEST, "TcpRouteMappingInvalidError", &message);
            }
        }
    }
    if let Err(error) = registry.written().await {
        return not_kept(&shared, TCP_ROUTES, &error);
    }
    StatusCode::CREATED.into_response()
}

async fn delete(State(shared): App, Extension(caller): Extension<Caller>, body: Bytes) -> Response {
    let Some((kept, group)) = offered(&shared) else { return absent() };
    let routes = match routes_in(&body) {
        Ok(routes) => routes,
        Err(response) => return *response,
    };
    let pools = match pools(&shared, &caller, &group, &routes, false) {
        Ok(pools) => pools,
        Err(response) => return *response,
    };
    let registry = shared.backend.registry();
    for (route, pool) in routes.iter().zip(pools) {
        let known = match kept.remove(route) {
            Some(known) => known,
            None if kept.knows(route) => {
                shared.backend.metrics().registration(TCP_ROUTES, "late_farewell");
                continue;
            }
            // A lease that outlived a restart.
            None => route.clone(),
        };
        let holder = known.address().and_then(|at| registry.holder(TCP_ROUTES, &pool, &at));
        if holder.as_deref() == Some(&known.id()) {
            // Nobody else deletes what came by this API.
            let _gone = registry.delete(&pool, &known.id(), None);
        }
    }
    if let Err(error) = registry.written().await {
        return not_kept(&shared, TCP_ROUTES, &error);
    }
    StatusCode::NO_CONTENT.into_response()
}

#[derive(Deserialize)]
struct ListQuery {
    isolation_segment: Option<String>,
}

async fn list(State(shared): App, Query(query): Query<ListQuery>) -> Response {
    let Some((kept, _)) = offered(&shared) else { return absent() };
    Json(kept.list(query.isolation_segment.as_deref())).into_response()
}

async fn groups(State(shared): App) -> Response {
    let Some((_, group)) = offered(&shared) else { return absent() };
    let ports: Vec<String> = shared.backend.tcp_ports().iter().map(ToString::to_string).collect();
    Json(json!([{
        "guid": group, "name": group, "type": "tcp", "reservable_ports": ports.join(",")
    }]))
    .into_response()
}

async fn events(State(shared): App) -> Response {
    let Some((kept, _)) = offered(&shared) else { return absent() };
    let mut heard = kept.subscribe();
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<sse::Event, Infallible>>(WAITING);
    tokio::spawn(async move {
        let mut number = 0_u64;
        loop {
            let event = tokio::select! {
                () = sender.closed() => return,
                event = heard.recv() => event,
            };
            let event = match event {
                Ok(event) => event,
                // Who is too slow for what happens must list again: the stream ends.
                Err(RecvError::Lagged(_) | RecvError::Closed) => return,
            };
            let data = serde_json::to_string(&event.route).unwrap_or_default();
            let told = sse::Event::default().id(number.to_string()).event(event.kind).data(data);
            number += 1;
            if sender.send(Ok(told)).await.is_err() {
                return;
            }
        }
    });
    Sse::new(ReceiverStream::new(receiver)).keep_alive(KeepAlive::default()).into_response()
}
