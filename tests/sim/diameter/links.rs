//! Links: those that the edge keeps, and those that servers open.

use std::collections::BTreeMap;

use strowger_contract::{
    BackendId, CloseCause, Endpoint, Engine, FlowId, Link as Word, PeerChange, Router, WorkerId,
};
use strowger_diameter::avp::{FLAG_REQUEST, code};
use strowger_diameter::build::Builder;

use super::{CAPABILITIES, CLIENTS, Event, Link, Sim, TRAFFIC, WORKERS, owner};
use crate::world::{MS, SECOND};

impl Sim {
    pub(super) fn cut_dead(&mut self) {
        let sites = &self.world.sites;
        let dead = |link: &Link| !sites[link.site].alive || sites[link.site].life != link.life;
        let dead: Vec<Endpoint> =
            self.links.iter().filter(|(_, link)| dead(link)).map(|(over, _)| *over).collect();
        for over in dead {
            self.cut(over, CloseCause::Reset);
        }
    }

    pub(super) fn cut(&mut self, over: Endpoint, cause: CloseCause) {
        let Some(link) = self.links.remove(&over) else { return };
        let mut only = None;
        if let Some((backend, lane)) = over.as_link() {
            self.paused.insert(over, self.world.us + SECOND / 2);
            let now = self.world.now();
            self.workers[owner(over)].router.link(now, backend, lane, Word::Down(cause));
        } else if !link.serves {
            // The runtime tells others only of what they may have used.
            only = Some(owner(over));
        }
        self.happen(Event::Closed { over, cause, only });
    }

    /// What the runtime does: the links to each that is wanted, a goodbye to each that is not.
    pub(super) fn keep_links(&mut self) {
        let snapshot = self.world.core.snapshot();
        let wanted: Vec<(BackendId, u8)> = snapshot.linkable(self.world.pool).collect();
        for &(backend, lane) in &wanted {
            let over = Endpoint::link(backend, lane);
            let paused = self.paused.get(&over).is_some_and(|&until| until > self.world.us);
            if self.links.contains_key(&over) || paused || self.world.core.is_served(backend) {
                continue;
            }
            let spec = &snapshot.backend(backend).expect("it is wanted").spec;
            let at = self.world.site_at(spec.address).expect("a site");
            let site = &self.world.sites[at];
            if site.alive && site.generation == spec.generation {
                self.open(over, backend, at);
            }
        }
        let mut unwanted = Vec::new();
        for (over, link) in &mut self.links {
            let wanted = over.as_link().is_none_or(|link| wanted.contains(&link));
            if !wanted && !std::mem::replace(&mut link.retired, true) {
                unwanted.push(*over);
            }
        }
        for over in unwanted {
            self.queue.push(self.world.us + 5 * SECOND, Event::Cut(over));
            self.call(owner(over), &mut |engine, now, router, out| {
                engine.on_peer(now, over, PeerChange::Retired, router, out);
            });
        }
    }

    fn open(&mut self, over: Endpoint, backend: BackendId, site: usize) {
        let (now, life) = (self.world.us, self.world.sites[site].life);
        let link = Link {
            backend,
            site,
            life,
            count: life << 32,
            there: now,
            back: now,
            retired: false,
            serves: false,
        };
        self.links.insert(over, link);
        self.queue.push(now, Event::Opened(over));
    }

    /// A server opens a connection, whatever else there is between it and the edge.
    pub(super) fn dial(&mut self, site: Option<usize>) {
        if self.world.us > TRAFFIC + 30 * SECOND {
            return;
        }
        let at = site.unwrap_or_else(|| {
            let next = self.world.us + self.world.dice.between(SECOND, 8 * SECOND);
            self.queue.push(next, Event::Dial(None));
            self.world.dice.below(self.world.sites.len() as u64) as usize
        });
        let Some(backend) = self.world.backend_of(at).filter(|_| self.world.sites[at].alive) else {
            return;
        };
        if self
            .links
            .iter()
            .any(|(over, link)| matches!(over, Endpoint::Client(_)) && link.site == at)
        {
            return;
        }
        self.dialed += 1;
        let slot = CLIENTS as u32 + self.dialed;
        let worker = WorkerId((self.dialed as usize % WORKERS) as u8);
        let over = Endpoint::Client(FlowId::new(worker, 1, slot));
        self.open(over, backend, at);
        let (site, life) = (&self.world.sites[at], self.world.sites[at].life);
        let mut bytes = Vec::new();
        Builder::new(&mut bytes, FLAG_REQUEST, CAPABILITIES, 0, 1, 1)
            .text(code::ORIGIN_HOST, &site.name())
            .text(code::ORIGIN_REALM, "example.net")
            .number(code::AUTH_APPLICATION_ID, u32::MAX)
            .finish();
        let event = Event::Answer { over, site: at, life, bytes };
        self.queue.push(self.world.us + MS, event);
    }

    /// What servers and the edge must agree on: never two connections for long where one is wanted.
    pub(super) fn check_links(&mut self) {
        if self.world.connections() > 1 {
            return;
        }
        let mut open: BTreeMap<BackendId, u32> = BTreeMap::new();
        for link in self.links.values().filter(|link| !link.retired) {
            *open.entry(link.backend).or_default() += 1;
        }
        for backend in open.keys() {
            let lanes = self.workers[0].router.backend(*backend).map(|view| view.lanes);
            let up = lanes.map_or(0, |lanes| lanes.up.count_ones());
            assert!(up <= 1, "{backend:?} has {lanes:?}");
        }
    }
}
