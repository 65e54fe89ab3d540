//! The per-worker state machine of a protocol.

use std::time::Instant;

use crate::{
    Endpoint, LookupId, Message, Opened, Outbox, PeerChange, Place, Refusal, Route, Router, Ticket,
    Unresolved,
};

/// One per worker and listener. It owns no socket and reads no clock; every call may append to
/// `out`, which the runtime flushes in one batch.
///
/// Calls come one at a time. `now` never runs backwards. After any call the runtime asks
/// [`Engine::next_timeout`].
pub trait Engine {
    /// A message arrived: from a client, a backend, or another worker that handed it over.
    fn on_message(
        &mut self,
        now: Instant,
        message: Message<'_>,
        router: &mut dyn Router,
        out: &mut Outbox,
    );

    /// A request that waited may go.
    fn on_granted(
        &mut self,
        now: Instant,
        ticket: Ticket,
        route: Route,
        router: &mut dyn Router,
        out: &mut Outbox,
    );

    /// A request that waited may not go.
    fn on_refused(
        &mut self,
        now: Instant,
        ticket: Ticket,
        refusal: Refusal,
        router: &mut dyn Router,
        out: &mut Outbox,
    );

    /// A connection changed.
    fn on_peer(
        &mut self,
        now: Instant,
        peer: Endpoint,
        change: PeerChange,
        router: &mut dyn Router,
        out: &mut Outbox,
    );

    /// A connection opened, with what is known of the other side (its certificate, its credentials,
    /// what a proxy told). The runtime calls this for each [`PeerChange::Opened`]; engines that care
    /// for none of it leave it as it is.
    fn on_opened(
        &mut self,
        now: Instant,
        peer: Endpoint,
        opened: Opened<'_>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Opened { remote, local, transport, .. } = opened;
        self.on_peer(now, peer, PeerChange::Opened { remote, local, transport }, router, out);
    }

    /// What became of an [`Outbox::resolve`]: at least one place in the order to try them, or why
    /// there is none. Engines that ask nothing leave it as it is.
    fn on_resolved(
        &mut self,
        now: Instant,
        lookup: LookupId,
        found: Result<&[Place], Unresolved>,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let _unasked = (now, lookup, found, router, out);
    }

    /// Time has come to [`Engine::next_timeout`], or passed it.
    fn on_timeout(&mut self, now: Instant, router: &mut dyn Router, out: &mut Outbox);

    /// When the engine next wants to be called, if nothing happens before.
    fn next_timeout(&self) -> Option<Instant>;

    /// The node is leaving: say so to peers where the protocol has words for it. New sessions are
    /// refused by the router from now on.
    fn on_drain(&mut self, now: Instant, router: &mut dyn Router, out: &mut Outbox);

    /// How much is under way: transactions, pending requests, spliced flows. A drain waits for 0.
    fn in_progress(&self) -> usize;

    /// All that is under way, for a process that takes over ([`crate::handover::write`]). `None`: the
    /// protocol knows no hand-over, and its connections stay with the old process. Called inside of
    /// [`crate::handover::by_clock`]; nothing changes by it.
    fn save(&self) -> Option<Vec<u8>> {
        None
    }

    /// Takes over what another process's engine of the same worker [`Engine::save`]d, before anything
    /// else happens. Numbers of flows, backends, pools and workers mean the same in both; requests that
    /// are in flight at backends must be [`Router::resume`]d, links that are up be told again.
    ///
    /// # Errors
    /// It cannot be read; the engine is as new.
    fn restore(
        &mut self,
        now: Instant,
        saved: &[u8],
        router: &mut dyn Router,
        out: &mut Outbox,
    ) -> Result<(), crate::handover::Broken> {
        let _unused = (now, saved, router, out);
        Err(crate::handover::Broken)
    }

    /// Whether the listener should take no further connections on this worker for now (raw TCP's
    /// `backpressure`); asked before each accept.
    fn is_saturated(&self) -> bool {
        false
    }
}
