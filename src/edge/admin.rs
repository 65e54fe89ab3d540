//! What the admin API sees of a running edge.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use strowger_contract::Level;
use strowger_contract::trace::split_key;

use super::{Inner, load};
use crate::control::admin::{AdminBackend, Check, PutError, Traced};
use crate::control::config;
use crate::control::providers::TcpRoutes;
use crate::control::registry::Registry;
use crate::observe::{Event, Events, Metrics, Sinks};
use crate::routing::Core;

impl AdminBackend for Inner {
    fn readiness(&self) -> Vec<Check> {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner).join("; ");
        let started = self.ready.load(Ordering::Relaxed);
        let draining = self.core.is_draining();
        vec![
            Check { name: "started", ok: started || draining, detail: String::new() },
            Check { name: "listeners", ok: failed.is_empty(), detail: failed },
            Check {
                name: "not_draining",
                ok: !draining,
                detail: if draining { "the node is leaving".into() } else { String::new() },
            },
        ]
    }

    fn config(&self) -> (String, u64) {
        let active = self.active();
        let texts: Vec<String> = match active.sources.as_slice() {
            [only] => vec![only.text.clone()],
            several => {
                several.iter().map(|source| format!("# {}\n{}", source.name, source.text)).collect()
            }
        };
        (texts.join("\n---\n"), self.config_epoch.load(Ordering::Relaxed))
    }

    fn put_config(&self, text: &str, if_match: Option<u64>) -> Result<u64, PutError> {
        let epoch = self.config_epoch.load(Ordering::Relaxed);
        if if_match.is_some_and(|wanted| wanted != epoch) {
            return Err(PutError::Stale(epoch));
        }
        let loaded = load(&self.source, Some(text), &self.protocols, self.core.pool_names())
            .map_err(|errors| {
                PutError::Invalid(errors.0.iter().map(ToString::to_string).collect())
            })?;
        self.apply(loaded);
        let epoch = self.config_epoch.load(Ordering::Relaxed);
        self.events.emit(Event::node(
            Level::Info,
            "config_reloaded",
            format!("put over the API; epoch {epoch}"),
        ));
        Ok(epoch)
    }

    fn core(&self) -> &Arc<Core> {
        &self.core
    }

    fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    fn events(&self) -> &Arc<Events> {
        &self.events
    }

    fn sinks(&self) -> &Sinks {
        &self.sinks
    }

    fn tracer(&self, protocol: &str, key: &str) -> Result<Traced, String> {
        let configurers = self.protocols.configurers();
        let found = configurers.iter().find(|known| known.name() == protocol);
        let traceable = || {
            let able = configurers.iter().filter(|known| !known.trace_keys().is_empty());
            let names: Vec<&str> = able.map(|known| known.name()).collect();
            format!("`{protocol}` cannot be traced; write {}", names.join(" or "))
        };
        let found = found.ok_or_else(traceable)?;
        let (kind, value) = split_key(key, found.trace_keys()).ok_or_else(traceable)?;
        Ok((found.name(), found.tracer(kind, value)?))
    }

    fn node(&self) -> Value {
        let listeners: Vec<Value> = self
            .fleet()
            .view()
            .into_iter()
            .map(|view| {
                let bound: Vec<String> = view.bound.iter().map(|(transport, address)| format!("{}://{address}", transport.scheme())).collect();
                json!({ "name": view.name, "protocol": view.protocol, "bound": bound, "connections": view.connections, "in_progress": view.in_progress })
            })
            .collect();
        let up = Duration::from_secs(self.started.elapsed().as_secs());
        json!({
            "name": self.core.snapshot().node.name,
            "version": env!("CARGO_PKG_VERSION"),
            "epoch": self.core.snapshot().epoch,
            "workers": self.workers,
            "uptime": strowger_contract::duration::format(up),
            "draining": self.core.is_draining(),
            "brownout": self.core.brownout_view(),
            "listeners": listeners,
        })
    }

    fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    fn tcp_routes(&self) -> Option<(Arc<TcpRoutes>, String)> {
        self.providers.tcp_routes()
    }

    fn pool_at_tcp_port(&self, port: u16) -> Option<String> {
        let active = self.active();
        let spec = &active.loaded.spec;
        let at = spec.listeners.iter().find(|listener| {
            listener.protocol == "tcp"
                && listener.sockets.iter().any(|socket| socket.address.port() == port)
        })?;
        let [only] = at.pools[..] else { return None };
        let names = self.core.pool_names();
        let found = spec.pools.iter().find(|pool| names.id(&pool.name) == only)?;
        Some(found.name.clone())
    }

    fn tcp_ports(&self) -> Vec<u16> {
        let active = self.active();
        let tcp = active.loaded.spec.listeners.iter().filter(|one| one.protocol == "tcp");
        tcp.flat_map(|one| one.sockets.iter().map(|socket| socket.address.port())).collect()
    }

    fn permissions(&self) -> Vec<config::Permission> {
        self.active().loaded.admin.permissions.clone()
    }

    fn session_spaces(&self) -> Vec<u8> {
        let protocols = self.protocols.configurers();
        protocols.iter().flat_map(|protocol| protocol.session_spaces()).copied().collect()
    }
}
