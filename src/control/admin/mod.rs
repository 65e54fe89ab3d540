//! The admin HTTP server: health, metrics, the API, the status page.
//!
//! It sees the edge only through [`AdminBackend`].

mod api;
mod calls;
mod guarded;
mod leases;
mod routing;
mod tls;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use serde::Serialize;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use guarded::Guarded;

use crate::control::config::Permission;
use crate::control::providers::TcpRoutes;
use crate::control::registry::Registry;
use crate::observe::{Events, Metrics, Sinks};
use crate::routing::Core;

/// Something that readiness depends on.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What.
    pub name: &'static str,
    /// Whether it is so.
    pub ok: bool,
    /// What is wrong.
    pub detail: String,
}

/// Why a configuration was not taken.
#[derive(Clone, Debug)]
pub enum PutError {
    /// Somebody else changed it; the epoch now.
    Stale(u64),
    /// It is wrong; all errors.
    Invalid(Vec<String>),
}

/// A protocol's name, and what finds a trace's messages.
pub type Traced = (&'static str, Box<dyn strowger_contract::Tracer>);

/// The edge, as the admin server sees it.
pub trait AdminBackend: Send + Sync {
    /// Whether it may get traffic.
    fn readiness(&self) -> Vec<Check>;
    /// The configuration's text and the epoch.
    fn config(&self) -> (String, u64);
    /// Checks a configuration and swaps it in, if the epoch is still `if_match`.
    ///
    /// # Errors
    /// It is wrong, or somebody was faster.
    fn put_config(&self, text: &str, if_match: Option<u64>) -> Result<u64, PutError>;
    /// The core.
    fn core(&self) -> &Arc<Core>;
    /// The metrics.
    fn metrics(&self) -> &Arc<Metrics>;
    /// The events.
    fn events(&self) -> &Arc<Events>;
    /// Traces and calls.
    fn sinks(&self) -> &Sinks;
    /// What finds the messages of a trace.
    ///
    /// # Errors
    /// There is no such protocol or kind of key; what there is.
    fn tracer(&self, protocol: &str, key: &str) -> Result<Traced, String>;
    /// The node and its listeners.
    fn node(&self) -> Value;
    /// The leased instances.
    fn registry(&self) -> &Arc<Registry>;
    /// Cloud Foundry's TCP routes and their router group, if they are offered.
    fn tcp_routes(&self) -> Option<(Arc<TcpRoutes>, String)>;
    /// The only pool of the raw TCP listener at a port.
    fn pool_at_tcp_port(&self, port: u16) -> Option<String>;
    /// The ports of raw TCP listeners.
    fn tcp_ports(&self) -> Vec<u16>;
    /// Tokens with rights.
    fn permissions(&self) -> Vec<Permission>;
    /// The session spaces of all protocols' names: a name may be looked for in each.
    fn session_spaces(&self) -> Vec<u8>;
}

/// Requests at a time: an admin API has few clients, and a slow one must not cost the others.
const REQUESTS_MAX: usize = 256;

/// A request's body, at most: a configuration.
const BODY_BYTES_MAX: usize = 8 << 20;

/// How long a request may take to come in.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Serves until `shutdown`.
pub async fn serve(
    listener: TcpListener,
    backend: Arc<dyn AdminBackend>,
    token: Option<String>,
    tls: Option<(Arc<crate::tls::Server>, Duration)>,
    shutdown: CancellationToken,
) {
    let events = Arc::clone(backend.events());
    let app: Router = api::router(backend, token, REQUESTS_MAX, BODY_BYTES_MAX, REQUEST_TIMEOUT);
    let ended = async move { shutdown.cancelled().await };
    if let Some((server, handshake)) = tls {
        let told = Arc::clone(&events);
        let Ok(listener) = tls::TlsListener::new(listener, server, handshake, told) else {
            return;
        };
        let listener = Guarded::new(listener, events);
        let app = app.into_make_service_with_connect_info::<tls::Peer>();
        let _ended = axum::serve(listener, app).with_graceful_shutdown(ended).await;
        return;
    }
    // It ends only by `shutdown`; open event streams are cut with the process.
    let listener = Guarded::new(listener, events);
    let _ended = axum::serve(listener, app).with_graceful_shutdown(ended).await;
}
