//! What clients and servers do.

use strowger_contract::{Endpoint, Engine, PeerChange, Transport};
use strowger_diameter::avp::{FLAG_ERROR, FLAG_PROXIABLE, FLAG_REQUEST, Header, Summary, code};
use strowger_diameter::build::Builder;

use super::{
    CAPABILITIES, CREDIT_CONTROL, DISCONNECT, Event, Sim, UPDATE_LOCATION, WATCHDOG, WORKERS,
    client_at, edge, flow, owner, place_of,
};
use crate::world::{MS, SECOND, dice_for};

impl Sim {
    pub(super) fn connect(&mut self, client: usize) {
        let (endpoint, remote) = (Endpoint::Client(flow(client)), client_at(client));
        self.call(client % WORKERS, &mut |engine, now, router, out| {
            let change = PeerChange::Opened { remote, local: edge(), transport: Transport::Tcp };
            engine.on_peer(now, endpoint, change, router, out);
        });
        let mut bytes = Vec::new();
        Builder::new(&mut bytes, FLAG_REQUEST, CAPABILITIES, 0, 1, 1)
            .text(code::ORIGIN_HOST, &format!("client{client}.example.net"))
            .text(code::ORIGIN_REALM, "example.net")
            .number(code::AUTH_APPLICATION_ID, u32::MAX)
            .finish();
        self.client_sends(client, bytes);
    }

    fn client_sends(&mut self, client: usize, bytes: Vec<u8>) {
        let event = Event::ToEdge {
            worker: client % WORKERS,
            from: Endpoint::Client(flow(client)),
            remote: client_at(client),
            bytes,
            life: None,
        };
        self.queue.push(self.world.us + MS, event);
    }

    pub(super) fn ask(&mut self, number: u64) {
        let session = &mut self.sessions[number as usize];
        session.asked += 1;
        self.requests += 1;
        let (identifier, client) = (self.requests as u32 + 1_000, session.client);
        let kind = match session.asked {
            1 => 1,
            last if last == session.requests => 3,
            _ => 2,
        };
        let (command, application) =
            if session.requests == 1 { (UPDATE_LOCATION, 16_777_251) } else { (CREDIT_CONTROL, 4) };
        let mut bytes = Vec::new();
        Builder::request(&mut bytes, command, application, identifier, identifier)
            .text(code::SESSION_ID, &format!("client{client}.example.net;1;{number}"))
            .text(code::ORIGIN_HOST, &format!("client{client}.example.net"))
            .text(code::ORIGIN_REALM, "example.net")
            .text(code::DESTINATION_REALM, "example.net")
            .number(code::CC_REQUEST_TYPE, kind)
            .finish();
        self.waiting.insert((client, identifier), number);
        self.client_sends(client, bytes);
    }

    pub(super) fn at_client(&mut self, client: usize, bytes: &[u8]) {
        let header = Header::read(bytes).expect("a message");
        if header.application == 0 {
            if header.is_request() {
                assert_eq!(header.command, WATCHDOG);
                let mut answer = Vec::new();
                Builder::new(&mut answer, 0, WATCHDOG, 0, header.hop_by_hop, header.end_to_end)
                    .number(code::RESULT_CODE, 2_001)
                    .finish();
                self.client_sends(client, answer);
            }
            return;
        }
        assert_eq!(header.hop_by_hop, header.end_to_end, "the asker's identifiers come back");
        let number = self.waiting.remove(&(client, header.hop_by_hop)).expect("it was asked");
        let session = &self.sessions[number as usize];
        if session.asked < session.requests {
            let wait = self.world.dice.between(50 * MS, 6 * SECOND);
            self.queue.push(self.world.us + wait, Event::Next { session: number });
        }
    }

    /// RFC 6733 5.6.4 at the server: what comes of the edge's CER while it has connected itself.
    fn elects(&self, over: Endpoint, site: usize) -> u32 {
        let own = self.links.iter().find(|(other, link)| {
            matches!(other, Endpoint::Client(_)) && **other != over && link.site == site
        });
        match own {
            Some((_, link)) if link.serves => 4_003,
            // The edge has not answered its CER yet.
            Some(_) if self.world.sites[site].name().as_str() <= "edge.example.net" => 4_003,
            _ => 2_001,
        }
    }

    pub(super) fn at_site(&mut self, over: Endpoint, site: usize, life: u64, bytes: &[u8]) {
        let header = Header::read(bytes).expect("a message");
        if !header.is_request() {
            if header.command == CAPABILITIES && Summary::of(bytes).result() != Some(2_001) {
                // It was refused.
                self.queue.push(self.world.us, Event::Cut(over));
            }
            return;
        }
        let known = &self.world.sites[site];
        let mut dice =
            dice_for(self.world.seed, &header.end_to_end.to_le_bytes(), site as u64 + life);
        let base = header.application == 0;
        let (wait, result) = match dice.below(100) {
            _ if header.command == CAPABILITIES && self.world.connections() == 1 => {
                (0, self.elects(over, site))
            }
            _ if base => (0, 2_001),
            0..4 => return,
            4..10 => (dice.below(20 * MS), 3_004),
            10..14 => (dice.between(9 * SECOND, 14 * SECOND), 2_001),
            14..18 => (dice.below(SECOND), 5_012),
            _ => (dice.below(300 * MS), 2_001),
        };
        let flags =
            if base { 0 } else { FLAG_PROXIABLE } | if result == 3_004 { FLAG_ERROR } else { 0 };
        let mut answer = Vec::new();
        let mut builder = Builder::new(
            &mut answer,
            flags,
            header.command,
            header.application,
            header.hop_by_hop,
            header.end_to_end,
        );
        if let Some(session) = Summary::of(bytes).session_id {
            builder = builder.bytes(code::SESSION_ID, session);
        }
        builder
            .number(code::RESULT_CODE, result)
            .text(code::ORIGIN_HOST, &known.name())
            .text(code::ORIGIN_REALM, "example.net")
            .number(code::AUTH_APPLICATION_ID, u32::MAX)
            .finish();
        self.queue.push(self.world.us + wait, Event::Answer { over, site, life, bytes: answer });
        if header.command == DISCONNECT {
            self.queue.push(self.world.us + 20 * MS, Event::Cut(over));
        }
    }

    pub(super) fn site_sends(&mut self, over: Endpoint, site: usize, life: u64, bytes: Vec<u8>) {
        let known = &self.world.sites[site];
        let (now, remote) = (self.world.us, known.address);
        if !known.alive || known.life != life {
            return;
        }
        let Some(link) = self.links.get_mut(&over).filter(|link| link.life == life) else {
            return;
        };
        link.count += 1;
        let mut place = place_of(over);
        place.reverse();
        let flight = dice_for(self.world.seed, &place, link.count).between(MS, 15 * MS);
        link.back = link.back.max(now + flight);
        let event = Event::ToEdge {
            worker: owner(over),
            from: over,
            remote,
            bytes,
            life: Some((site, life)),
        };
        self.queue.push(link.back, event);
    }
}
