//! Who tells of instances, besides the configuration and the lease API: all of them feed the one
//! registry, by the same actions, and each keeps its last state while it does not hear its source.
//!
//! | module | what it does |
//! |---|---|
//! | `message` | Cloud Foundry's registration messages, read; pure |
//! | `dns` | pools whose instances DNS names |
//! | `nats` | where they come from |
//! | `tcp_routes` | Cloud Foundry's TCP routes; the admin server has their paths |
//! | `feed` | what was heard, brought into the registry |
//! | this | starts and ends providers as the configuration says |

mod dns;
mod feed;
mod message;
mod nats;
#[cfg(test)]
mod same;
mod tcp_routes;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::runtime::Handle;
use tokio::task::JoinHandle;

pub use dns::DnsPoolSettings;
pub use feed::Feed;
pub use message::{Action, Isolation, Mapping, Rejected, RouteMessage, parse};
pub use nats::CloudFoundrySettings;
pub use tcp_routes::{TCP_ROUTES, TcpRoute, TcpRoutes, TcpRoutesSettings};

use crate::control::registry::{Registry, SWEEP_EVERY};
use crate::control::resolve::DnsSettings;
use crate::observe::{Events, Metrics};

/// Which providers there are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProviderSettings {
    /// Cloud Foundry over NATS.
    pub cloud_foundry: Option<CloudFoundrySettings>,
    /// Cloud Foundry's routing API.
    pub tcp_routes: Option<TcpRoutesSettings>,
    /// Pools that DNS feeds.
    pub dns: Vec<DnsPoolSettings>,
    /// The name servers for those.
    pub resolver: DnsSettings,
}

/// The providers that run.
pub struct Providers {
    registry: Arc<Registry>,
    metrics: Arc<Metrics>,
    events: Arc<Events>,
    handle: Handle,
    running: Mutex<Running>,
}

#[derive(Default)]
struct Running {
    settings: ProviderSettings,
    cloud_foundry: Option<Task>,
    dns: HashMap<String, Task>,
    tcp_routes: Option<(Arc<TcpRoutes>, Task)>,
}

/// A provider's task; it ends with its handle.
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Providers {
    /// None runs yet. To be called on the control side's runtime.
    #[must_use]
    pub fn new(registry: Arc<Registry>, metrics: Arc<Metrics>, events: Arc<Events>) -> Self {
        let (handle, running) = (Handle::current(), Mutex::default());
        Self { registry, metrics, events, handle, running }
    }

    /// A feed for a source.
    #[must_use]
    pub fn feed(&self, source: &str) -> Feed {
        let (metrics, events) = (Arc::clone(&self.metrics), Arc::clone(&self.events));
        Feed::new(source, Arc::clone(&self.registry), metrics, events)
    }

    /// Starts, ends and restarts what a new configuration changed. Leases of a provider that is no
    /// more lapse as others do.
    pub fn configure(&self, settings: &ProviderSettings) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if running.settings.cloud_foundry != settings.cloud_foundry {
            running.cloud_foundry = None;
            match &settings.cloud_foundry {
                Some(settings) => {
                    let task = nats::run(settings.clone(), self.feed(nats::NAME));
                    running.cloud_foundry = Some(Task(self.handle.spawn(task)));
                }
                None => self.registry.forget_provider(nats::NAME),
            }
        }
        self.configure_dns(&mut running, settings);
        self.configure_tcp_routes(&mut running, settings);
        running.settings = settings.clone();
    }

    fn configure_dns(&self, running: &mut Running, settings: &ProviderSettings) {
        let before = std::mem::take(&mut running.settings.dns);
        let same_servers = running.settings.resolver == settings.resolver;
        for old in &before {
            if !settings.dns.contains(old) || !same_servers {
                running.dns.remove(&old.pool);
            }
            if !settings.dns.iter().any(|new| new.pool == old.pool) {
                // The operator's word: what it named is no more.
                let source = dns::source(&old.pool);
                for (pool, id, _) in self.registry.of_source(&source) {
                    // Only this source deletes what it brought in.
                    let _gone = self.registry.delete(&pool, &id, None);
                }
                self.registry.forget_provider(&source);
            }
        }
        for new in &settings.dns {
            if !running.dns.contains_key(&new.pool) {
                let feed = self.feed(&dns::source(&new.pool));
                let task = dns::run(new.clone(), settings.resolver.clone(), feed);
                running.dns.insert(new.pool.clone(), Task(self.handle.spawn(task)));
            }
        }
    }

    fn configure_tcp_routes(&self, running: &mut Running, settings: &ProviderSettings) {
        if settings.tcp_routes.is_none() && running.tcp_routes.take().is_some() {
            self.registry.forget_provider(TCP_ROUTES);
        }
        if settings.tcp_routes.is_some() && running.tcp_routes.is_none() {
            let routes = Arc::<TcpRoutes>::default();
            let swept = Arc::clone(&routes);
            let task = self.handle.spawn(async move {
                let mut ticks = tokio::time::interval(SWEEP_EVERY);
                loop {
                    ticks.tick().await;
                    swept.sweep(Instant::now());
                }
            });
            running.tcp_routes = Some((routes, Task(task)));
            self.registry.provider(TCP_ROUTES, Ok(()));
        }
    }

    /// The routes and the router group of the routing API, if it is offered.
    #[must_use]
    pub fn tcp_routes(&self) -> Option<(Arc<TcpRoutes>, String)> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let group = running.settings.tcp_routes.as_ref()?.router_group.clone();
        running.tcp_routes.as_ref().map(|(routes, _)| (Arc::clone(routes), group))
    }
}
