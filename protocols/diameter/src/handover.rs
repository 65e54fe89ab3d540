//! What goes to another process: peers as they stand, requests under way, and what servers told of
//! their load. Answers that were kept for resent requests, rates and the peers' clocks begin anew.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use strowger_contract::handover::{Broken, read, write};
use strowger_contract::{BackendId, Endpoint, FlowId, Link, NumberMap, Outbox, Router};

use crate::avp::Summary;
use crate::engine::DiameterEngine;
use crate::onward::{keys_of, unbind_refused};
use crate::overload::Reports;
use crate::peer::{Peer, State};
use crate::pending::{Pending, TRIES_MAX};

/// Borrowed where it is written, owned where it is read; the same bytes.
#[derive(Serialize)]
struct Saved<'a> {
    clients: &'a NumberMap<FlowId, Peer>,
    backends: &'a NumberMap<(BackendId, u8), Peer>,
    pending: Vec<(u32, &'a Pending)>,
    generations: Vec<u8>,
    waiting: Vec<&'a Pending>,
    reports: &'a Reports,
    end_to_end: u32,
}

#[derive(Deserialize)]
struct Restored {
    clients: NumberMap<FlowId, Peer>,
    backends: NumberMap<(BackendId, u8), Peer>,
    pending: Vec<(u32, Pending)>,
    generations: Vec<u8>,
    waiting: Vec<Pending>,
    reports: Reports,
    end_to_end: u32,
}

impl Restored {
    fn is_sound(&self) -> bool {
        let sound = |pending: &Pending| usize::from(pending.tries) <= TRIES_MAX;
        self.pending.iter().all(|(_, pending)| sound(pending)) && self.waiting.iter().all(sound)
    }
}

impl DiameterEngine {
    pub(crate) fn saved(&self) -> Vec<u8> {
        write(&Saved {
            clients: &self.clients,
            backends: &self.backends,
            pending: self.pending.all(),
            generations: self.pending.generations(),
            waiting: self.all_waiting().collect(),
            reports: &self.reports,
            end_to_end: self.end_to_end,
        })
    }

    pub(crate) fn take_over(
        &mut self,
        now: Instant,
        saved: &[u8],
        router: &mut dyn Router,
        out: &mut Outbox,
    ) -> Result<(), Broken> {
        let mut saved: Restored = read(saved)?;
        if !saved.is_sound() {
            return Err(Broken);
        }
        for (_, pending) in saved.pending.iter_mut().filter(|(_, pending)| pending.pool.is_some()) {
            pending.rules = self.settings.rules_for(&pending.request);
        }
        let expiries: Vec<(u32, Instant, Option<BackendId>)> = saved
            .pending
            .iter()
            .map(|(identifier, pending)| (*identifier, pending.expires, pending.backend))
            .collect();
        let hedges =
            saved.pending.iter().filter_map(|(it, pending)| Some((*it, pending.hedge_at?)));
        for (identifier, at) in hedges.collect::<Vec<_>>() {
            self.schedule(now, at, identifier);
        }
        self.pending.take_over(saved.pending, &saved.generations)?;
        for (identifier, expires, backend) in expiries {
            self.schedule(now, expires, identifier);
            if let Some(backend) = backend {
                router.resume(now, backend);
                self.note_under_way(identifier);
            }
        }
        (self.clients, self.backends) = (saved.clients, saved.backends);
        self.reports = saved.reports;
        self.end_to_end = saved.end_to_end;
        self.introduce_peers(now, router, out);
        // Not yet: the links that they go over may be another worker's, which has told of none so far.
        self.unplaced = saved.waiting;
        self.unplaced.sort_by_key(|pending| pending.arrived);
        self.arm_upkeep(now);
        Ok(())
    }

    /// Tells the core and operators of the peers.
    fn introduce_peers(&mut self, now: Instant, router: &mut dyn Router, out: &mut Outbox) {
        let clients = self.clients.keys().map(|&flow| Endpoint::Client(flow));
        let links = self.backends.keys().map(|&(backend, lane)| Endpoint::link(backend, lane));
        for endpoint in clients.chain(links).collect::<Vec<_>>() {
            if let (Some(link), Some(State::Introducing | State::Reopening(_))) =
                (self.link_of(endpoint), self.peer(endpoint).map(|peer| peer.state))
            {
                self.set_link(now, link, Link::Introducing, router);
            }
            if let (Endpoint::Client(_), Some(_)) = (endpoint, self.link_of(endpoint)) {
                out.proven(endpoint);
            }
            match self.peer(endpoint).map(|peer| peer.state) {
                Some(State::Open) => self.open(now, endpoint, router),
                Some(_) => self.report(endpoint, router),
                None => {}
            }
        }
    }

    /// Requests that wait, also those that did in another process.
    fn all_waiting(&self) -> impl Iterator<Item = &Pending> {
        self.waiting.values().map(|pending| &**pending).chain(&self.unplaced)
    }

    /// Places the requests that waited in the other process's queue, now that all workers are there.
    /// Each goes on as what it was: its tries, its T and its end are not forgotten.
    pub(crate) fn place_waiting(
        &mut self,
        now: Instant,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        for mut pending in std::mem::take(&mut self.unplaced) {
            if self.peer(pending.origin).is_none() {
                unbind_refused(now, &pending, router);
                continue;
            }
            pending.rules = self.settings.rules_for(&pending.request);
            self.place(now, pending, router, out);
        }
    }

    /// Places a request anew that has waited in another process's queue.
    fn place(&mut self, now: Instant, pending: Pending, router: &mut dyn Router, out: &mut Outbox) {
        let Some(pool) = pending.pool else { return };
        let summary = Summary::of(&pending.request);
        let mut aim = self.named(pool, &summary, pending.in_session, router);
        let led = pending.binds || pending.follows;
        if aim.pin.is_none() && led && router.lookup(now, pending.place).is_none() {
            let keys = keys_of(&pending, router);
            aim = self.bound(now, &keys, pending.binds, router).unwrap_or_default();
        }
        let strict = pending.fixed || pending.in_session && aim.pin.is_none();
        let choice = self.choose(now, &pending, aim.pin, strict, router);
        self.follow(now, pending, choice, router, out);
    }
}
