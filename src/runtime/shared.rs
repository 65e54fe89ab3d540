//! What the workers of one listener share.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use strowger_contract::{
    BackendId, ClassId, CloseCause, Endpoint, Level, Links, Note, PeerChange, WorkerId,
};

use super::mailbox::{Mail, Mailbox};
use super::resolve::Resolver;
use crate::observe::{Event, Events, Metrics, NameView, Sinks, Told};
use crate::routing::{Core, CoreRouter, Snapshot};

/// What the workers of one listener share.
pub(crate) struct Shared {
    pub(crate) name: String,
    pub(crate) workers: u8,
    pub(crate) seed: u64,
    pub(crate) started: u32,
    pub(crate) core: Arc<Core>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) events: Arc<Events>,
    pub(crate) sinks: Sinks,
    pub(crate) tls: Arc<crate::tls::Store>,
    pub(crate) resolver: Arc<dyn Resolver>,
    pub(crate) mailboxes: Vec<Mailbox>,
    /// Clients' connections, over all workers.
    pub(crate) connections: AtomicU32,
    /// What each worker's engine has under way.
    pub(crate) in_progress: Vec<AtomicUsize>,
    /// Clients' connections by address, where there is a limit for them.
    pub(crate) sources: Mutex<HashMap<IpAddr, u32>>,
    pub(crate) jitter: AtomicU64,
    /// Numbers clients of unix sockets, which have no address.
    pub(crate) unix_clients: AtomicU64,
}

/// What happens in the runtime itself.
#[derive(Clone, Debug)]
pub(crate) enum NodeEvent {
    Framing {
        remote: SocketAddr,
        detail: String,
    },
    EnginePanicked {
        worker: WorkerId,
    },
    EngineSpins {
        worker: WorkerId,
    },
    LinkUp {
        backend: String,
    },
    LinkDown {
        backend: String,
        was_open: bool,
        cause: CloseCause,
    },
    AcceptFailed {
        error: String,
    },
    #[cfg(feature = "sctp")]
    NoSctp {
        error: String,
    },
    NotProxied {
        via: SocketAddr,
        why: &'static str,
    },
    TlsFailed {
        peer: String,
        side: &'static str,
        why: crate::tls::Failure,
    },
}

impl Shared {
    /// The worker that holds a link to a backend. Several links to one are on several workers.
    pub(crate) fn owner(
        &self,
        links: Links,
        (backend, lane): (BackendId, u8),
        asking: WorkerId,
    ) -> WorkerId {
        let place = backend.0.wrapping_add(u32::from(lane));
        match links {
            Links::Single => WorkerId((place % u32::from(self.workers.max(1))) as u8),
            Links::PerWorker | Links::None => asking,
        }
    }

    /// Tells every other worker's engine of a change.
    pub(crate) fn tell_others(&self, but: WorkerId, peer: Endpoint, change: PeerChange) {
        for (index, mailbox) in self.mailboxes.iter().enumerate() {
            if index != usize::from(but.0) {
                // A worker whose mailbox is full hears it when it next sends there.
                let _full = mailbox.put(&[], |_| Mail::Peer(peer, change));
            }
        }
    }

    /// A place among the connections from one address, if there is one; always, without a limit.
    pub(crate) fn source_place(
        self: &Arc<Self>,
        source: IpAddr,
        limit: u32,
    ) -> Option<SourcePlace> {
        if limit > 0 {
            let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
            let count = sources.entry(source).or_insert(0);
            if *count >= limit {
                return None;
            }
            *count += 1;
        }
        Some(SourcePlace { shared: (limit > 0).then(|| Arc::clone(self)), source })
    }

    /// For a connection that is there whatever the limit is.
    pub(crate) fn no_place(&self, source: IpAddr) -> SourcePlace {
        SourcePlace { shared: None, source }
    }

    /// A name for logs.
    pub(crate) fn backend_name(&self, backend: BackendId) -> String {
        let snapshot = self.core.snapshot();
        snapshot
            .backend_names(backend)
            .map_or_else(|| format!("backend {}", backend.0), |(pool, id)| format!("{pool}/{id}"))
    }

    /// Names for metrics, from the snapshot that the router looks at.
    pub(crate) fn names(&self, router: &CoreRouter) -> Names {
        Names(Arc::clone(router.snapshot()))
    }

    /// Spreads a pause by a quarter, so that many links do not come back at once.
    pub(crate) fn jitter(&self, pause: Duration) -> Duration {
        let mut bits = self.jitter.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        bits = (bits ^ bits >> 31).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let share = (bits >> 40) as u32 as f64 / f64::from(1 << 24);
        pause.mul_f64(0.75 + share / 2.0)
    }

    /// Logs what an engine has to say, and gives its records to their sink.
    pub(crate) fn log(&self, note: &Note, names: &Names) {
        match note {
            Note::Event { level, name, detail } => {
                self.events.emit(Event::engine(*level, &self.name, name, detail.clone()));
            }
            Note::Call(record) => {
                let instance = record.backend.and_then(|backend| names.backend(backend));
                self.sinks.calls.put(Told {
                    record: record.clone(),
                    listener: self.name.as_str().into(),
                    instance: instance.map(|(pool, id)| (pool.into(), id.into())),
                });
            }
            _ => {}
        }
    }

    /// Takes a request's end into what its backend's owner is told.
    pub(crate) fn report(&self, now: std::time::Instant, note: &Note) {
        if let Note::Request { outcome, backend: Some(backend), at_backend, .. } = note {
            self.core.note_request(now, *backend, *outcome, *at_backend);
        }
    }

    /// Logs what happens in the runtime.
    pub(crate) fn event(&self, event: NodeEvent) {
        let (level, name, detail) = match event {
            NodeEvent::Framing { remote, detail } => {
                (Level::Info, "framing_lost", format!("{remote}: {detail}"))
            }
            NodeEvent::EnginePanicked { worker } => (
                Level::Warn,
                "engine_panicked",
                format!(
                    "the engine on worker {} panicked and was restarted; its connections are closed",
                    worker.0
                ),
            ),
            NodeEvent::EngineSpins { worker } => (
                Level::Warn,
                "engine_spins",
                format!(
                    "the engine on worker {} did not come to rest; what it still wanted was dropped",
                    worker.0
                ),
            ),
            NodeEvent::LinkUp { backend } => (Level::Info, "link_up", backend),
            NodeEvent::LinkDown { backend, was_open, cause } => {
                let what = if was_open { "closed" } else { "could not be opened" };
                (Level::Warn, "link_down", format!("{backend}: {what}: {}", cause.word()))
            }
            NodeEvent::TlsFailed { peer, side, why } => {
                let detail = format!("{side} {peer}: {}: {}", why.word, why.detail);
                // What strangers send is no reason to wake anybody.
                let level = if side == "backend" { Level::Warn } else { Level::Info };
                (level, "tls_handshake_failed", detail)
            }
            NodeEvent::NotProxied { via, why } => {
                (Level::Warn, "proxy_header_refused", format!("{via}: {why}"))
            }
            #[cfg(feature = "sctp")]
            NodeEvent::NoSctp { error } => (Level::Warn, "sctp_missing", error),
            NodeEvent::AcceptFailed { error } => (Level::Warn, "accept_failed", error),
        };
        self.events.emit(Event::engine(level, &self.name, name, detail));
    }
}

/// A place among the connections from one address; given back however the connection ends.
pub(crate) struct SourcePlace {
    shared: Option<Arc<Shared>>,
    source: IpAddr,
}

impl Drop for SourcePlace {
    fn drop(&mut self) {
        let Some(shared) = &self.shared else { return };
        let mut sources = shared.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = sources.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                sources.remove(&self.source);
            }
        }
    }
}

/// Names out of a snapshot.
pub(crate) struct Names(Arc<Snapshot>);

impl NameView for Names {
    fn class(&self, class: ClassId) -> &str {
        self.0.class_name(class)
    }

    fn backend(&self, backend: BackendId) -> Option<(&str, &str)> {
        self.0.backend_names(backend)
    }
}
