//! What engines of peer protocols (Diameter) use of the core besides routing: subscribers' bindings,
//! lost sessions, and the table of peers that operators look at.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use strowger_contract::{
    BackendId, BindingKey, Endpoint, LANE_ACCEPTED, Lanes, Link, PeerReport, SessionKey,
};

use super::core::{Core, seconds, sweep_share, whole_seconds};
use super::events::Happening;
use super::holders::Holder;
use super::live::LiveChange;
use super::snapshot::Snapshot;

/// Peers in the operators' table, at most. Further ones work and are not shown.
const PEERS_MAX: usize = 65_536;

/// The operators' table of peers. Touched when a peer's state changes, never by a message.
#[derive(Debug, Default)]
pub(super) struct Peers {
    table: Mutex<BTreeMap<(String, Endpoint), PeerReport>>,
    full: AtomicBool,
}

impl Peers {
    /// Clients' connections of that identity, in any letter case.
    pub(super) fn named(&self, listener: &str, identity: &str) -> usize {
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |((of, peer), report): &(&(String, Endpoint), &PeerReport)| {
            of == listener
                && matches!(peer, Endpoint::Client(_))
                && report.identity.eq_ignore_ascii_case(identity)
        };
        table.iter().filter(same).count()
    }

    pub(super) fn report(&self, listener: &str, peer: Endpoint, report: Option<PeerReport>) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (listener.to_owned(), peer);
        match report {
            None => {
                table.remove(&key);
            }
            Some(report) if table.len() < PEERS_MAX || table.contains_key(&key) => {
                table.insert(key, report);
            }
            Some(_) => self.full.store(true, Ordering::Relaxed),
        }
    }

    /// Whether a peer was ever left out for want of room.
    pub(super) fn was_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }
}

/// A peer as the API shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PeerView {
    /// The listener that it talks to.
    pub listener: String,
    /// `client`, `backend`, or `both`: a backend that has connected itself (RFC 6733 5.6.4).
    pub role: &'static str,
    /// Which of the connections to a backend it is, from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connection: Option<u8>,
    /// A backend's pool.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// A backend's instance id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    /// What it calls itself.
    pub identity: String,
    /// Its realm.
    pub realm: String,
    /// Its address.
    pub address: String,
    /// A word for its state.
    pub state: &'static str,
    /// What it can do.
    pub applications: Vec<u32>,
    /// Its Origin-State-Id, if it told one.
    pub origin_state_id: Option<u32>,
    /// A backend's requests under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_flight: Option<u32>,
}

impl Core {
    /// All peers that engines told of.
    #[must_use]
    pub fn peers_view(&self) -> Vec<PeerView> {
        let snapshot = self.snapshot();
        let table = self.peers().table.lock().unwrap_or_else(PoisonError::into_inner);
        let view = |((listener, endpoint), report): (&(String, Endpoint), &PeerReport)| {
            let backend = match endpoint {
                // A connection that the backend opened itself serves as its link.
                Endpoint::Client(_) => report.serves,
                link => link.as_link().map(|(backend, _)| backend),
            };
            let backend = backend.and_then(|backend| snapshot.backend(backend));
            PeerView {
                listener: listener.clone(),
                role: match endpoint {
                    Endpoint::Client(_) if report.serves.is_some() => "both",
                    Endpoint::Client(_) => "client",
                    _ => "backend",
                },
                connection: endpoint.as_link().map(|(_, lane)| lane + 1),
                pool: backend.map(|backend| backend.pool_name.to_string()),
                instance: backend.map(|backend| backend.spec.id.clone()),
                identity: report.identity.clone(),
                realm: report.realm.clone(),
                address: report.address.clone(),
                state: report.state,
                applications: report.capabilities.clone(),
                origin_state_id: report.state_id,
                in_flight: backend.map(|backend| backend.live.in_flight()),
            }
        };
        table.iter().map(view).collect()
    }

    /// Whether a connection that the backend opened itself serves as its link, or is to once it has
    /// proven itself.
    #[must_use]
    pub fn is_served(&self, backend: BackendId) -> bool {
        let accepted = Lanes::bit(LANE_ACCEPTED);
        self.live(backend).is_some_and(|live| {
            let lanes = live.lanes();
            (lanes.up | lanes.introducing) & accepted != 0
        })
    }

    /// No link to the backend is opened for so long, by nobody.
    pub fn hold_off(&self, now: Instant, backend: BackendId, lasting: Duration) {
        if let Some(live) = self.live(backend) {
            let lasting = u64::try_from(lasting.as_millis()).unwrap_or(u64::MAX);
            live.hold_off(self.clock(now).saturating_add(lasting));
        }
    }

    /// For how long no link to the backend is to be opened yet.
    #[must_use]
    pub fn held_off(&self, now: Instant, backend: BackendId) -> Duration {
        let until = self.live(backend).map_or(0, |live| live.held_off_until());
        Duration::from_millis(until.saturating_sub(self.clock(now)))
    }

    /// Takes news of a backend's link in.
    pub(super) fn link(
        &self,
        now: Instant,
        snapshot: &Snapshot,
        backend: BackendId,
        (lane, link): (u8, Link<'_>),
    ) {
        let Some(backend) = snapshot.backend(backend) else {
            if let Some(live) = self.live(backend) {
                // It left meanwhile; it may come back.
                let _untold = live.link(lane, link);
            }
            return;
        };
        let change = backend.live.link(lane, link);
        // Where links are opened on demand, their coming and going is no event of the backend's.
        match change.filter(|_| backend.needs_link) {
            Some(LiveChange::Up) => {
                if self.changes_applied(now) {
                    backend.live.rejoin(self.clock(now));
                }
                self.tell_of(backend, Happening::BackendUp);
                if let Some(pool) = snapshot.pool(backend.pool) {
                    self.serve_pool(now, pool);
                }
                // It may say that it can do less than before.
                self.displace(now, backend.pool);
            }
            Some(LiveChange::Down) => {
                let detail = match link {
                    Link::Down(cause) => cause.word(),
                    _ => "suspect",
                };
                self.tell_of(backend, Happening::BackendDown { detail });
                self.displace(now, backend.pool);
            }
            None => {}
        }
    }

    /// Whether the process has run for a while: links that open at its start need no slow start.
    fn changes_applied(&self, now: Instant) -> bool {
        const START: u64 = 10_000;
        self.clock(now) > START
    }

    /// Nanoseconds of the core's clock.
    pub(super) fn clock_ns(&self, now: Instant) -> u64 {
        u64::try_from(self.since_start(now).as_nanos()).unwrap_or(u64::MAX)
    }

    pub(super) fn is_lost(&self, session: SessionKey, now: u64) -> bool {
        self.table().is_lost(session.keyed, seconds(now))
    }

    pub(super) fn sweep_bindings(&self, now: u32) {
        let Some(bindings) = self.bindings() else { return };
        let chunks = sweep_share(bindings.chunks());
        let holders = self.table().holders();
        bindings.sweep(now, chunks, |holder| holders.is_current(Holder::from_bits(holder)));
    }

    pub(super) fn bound(&self, now: Instant, name: BindingKey) -> Option<BackendId> {
        let bound = self.bindings()?.get(name, seconds(self.clock(now)))?;
        let holder = Holder::from_bits(bound);
        self.table().holders().is_current(holder).then_some(holder.backend())
    }

    #[allow(clippy::too_many_arguments, reason = "the router's question and its snapshot")]
    pub(super) fn bind(
        &self,
        now: Instant,
        snapshot: &Snapshot,
        session: SessionKey,
        names: &[BindingKey],
        backend: BackendId,
        ttl: Duration,
        force: bool,
    ) -> BackendId {
        let Some(bindings) = self.bindings() else { return backend };
        let holders = self.table().holders();
        let now = seconds(self.clock(now));
        let ttl = whole_seconds(ttl).max(1);
        // One that cannot be reached or lost its sessions holds nobody.
        let is_good = |bound: u32| {
            let holder = Holder::from_bits(bound);
            let backend = snapshot.backend(holder.backend());
            holders.is_current(holder)
                && backend.is_some_and(|backend| backend.keeps_sessions() && backend.is_linked())
        };
        let holder = holders.current(backend).to_bits();
        let times = (now, now.saturating_add(ttl));
        let bound = bindings.bind(session.keyed, names, holder, times, force, is_good);
        Holder::from_bits(bound).backend()
    }

    pub(super) fn keep_bound(&self, now: Instant, session: SessionKey, ttl: Duration) {
        if let Some(bindings) = self.bindings() {
            let ttl = whole_seconds(ttl).max(1);
            bindings.keep(session.keyed, seconds(self.clock(now)).saturating_add(ttl));
        }
    }

    pub(super) fn unbind(&self, session: SessionKey) -> bool {
        self.bindings().is_some_and(|bindings| bindings.unbind(session.keyed))
    }

    pub(super) fn forget_bound(&self, name: BindingKey) {
        if let Some(bindings) = self.bindings() {
            bindings.forget(name);
        }
    }

    /// The backend lost its sessions, in the table and in the bindings.
    pub(super) fn restarted(&self, snapshot: &Snapshot, backend: BackendId) {
        let sessions = self.table().sessions_of(backend);
        self.table().holders().restart(backend);
        if let Some(backend) = snapshot.backend(backend) {
            self.tell_of(backend, Happening::BackendRestarted { sessions });
        }
    }

    /// The totals of the bindings; `None` as long as no pool has `bind_keys`.
    #[must_use]
    pub fn bindings_view(&self) -> Option<super::BindingTotals> {
        self.bindings().map(super::BindingTable::totals)
    }
}
