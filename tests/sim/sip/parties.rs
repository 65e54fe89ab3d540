//! What clients and instances do.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use strowger_contract::Endpoint;

use super::{
    Asked, Dialog, Event, Served, Sim, Step, WORKERS, angled, call_number, call_of, client_of,
    code_of, line, lines, parameter, top_branch,
};
use crate::world::{Dice, MS, SECOND, dice_for};

impl Sim {
    pub(super) fn client_sends(&mut self, client: SocketAddr, bytes: Vec<u8>) {
        let worker = usize::from(client.port() ^ call_number(client)) % WORKERS;
        if let Some(at) = self.flight(client) {
            let from = Endpoint::Datagram { socket: 0, remote: client };
            self.queue.push(at, Event::ToEdge { worker, from, remote: client, bytes, life: None });
        }
    }

    fn ask(&mut self, method: &'static str, branch: String, client: SocketAddr, bytes: Vec<u8>) {
        let asked = Asked {
            method,
            bytes: bytes.clone(),
            client,
            since: self.world.us,
            heard: false,
            admitted: false,
            finals: BTreeSet::new(),
        };
        self.asked.insert(branch.clone(), asked);
        self.client_sends(client, bytes);
        self.queue.push(self.world.us + SECOND / 2, Event::Again { branch, wait: SECOND / 2 });
    }

    pub(super) fn begin(&mut self, call: u64) {
        let method = if self.world.dice.percent(70) { "INVITE" } else { "MESSAGE" };
        let (client, branch) =
            (client_of(call), format!("z9hG4bK-{call}-{}", method.to_lowercase()));
        let text = format!(
            "{method} sip:bob@example.net SIP/2.0\r\nVia: SIP/2.0/UDP {client};branch={branch};rport\r\n\
             Max-Forwards: 70\r\nFrom: <sip:alice@example.net>;tag=f{call}\r\nTo: <sip:bob@example.net>\r\n\
             Call-ID: call-{call}\r\nCSeq: 1 {method}\r\nContact: <sip:alice@{client}>\r\nContent-Length: 0\r\n\r\n"
        );
        self.ask(method, branch, client, text.into_bytes());
        if method == "INVITE" && self.world.dice.percent(40) {
            let at = self.world.us + self.world.dice.between(100 * MS, 25 * SECOND);
            self.queue.push(at, Event::Cancel(call));
        }
    }

    pub(super) fn bye(&mut self, key: &str) {
        let Some(dialog) = self.dialogs.get(key) else { return };
        let (call, client) = (dialog.call, client_of(dialog.call));
        let branch = format!("z9hG4bK-{call}-bye-{}", parameter(&dialog.to, "tag"));
        let text = Self::in_dialog(dialog, "BYE", &branch, 2);
        self.ask("BYE", branch, client, text);
    }

    fn in_dialog(dialog: &Dialog, method: &str, branch: &str, number: u32) -> Vec<u8> {
        let (call, client) = (dialog.call, client_of(dialog.call));
        let routes: String =
            dialog.routes.iter().map(|route| format!("Route: {route}\r\n")).collect();
        format!(
            "{method} {} SIP/2.0\r\nVia: SIP/2.0/UDP {client};branch={branch};rport\r\n{routes}\
             Max-Forwards: 70\r\nFrom: <sip:alice@example.net>;tag=f{call}\r\nTo: {}\r\n\
             Call-ID: call-{call}\r\nCSeq: {number} {method}\r\nContent-Length: 0\r\n\r\n",
            dialog.contact, dialog.to
        )
        .into_bytes()
    }

    pub(super) fn at_client(&mut self, text: &str) {
        let (code, branch) = (code_of(text), top_branch(text));
        if line(text, "CSeq").ends_with("CANCEL") {
            return;
        }
        let asked = self.asked.get_mut(&branch).expect("it was asked");
        asked.heard = asked.heard || asked.method == "INVITE" || code >= 200;
        let (invite, client) = (asked.method == "INVITE", asked.client);
        if !invite || code < 200 {
            return;
        }
        if code >= 300 {
            let request = std::str::from_utf8(&asked.bytes).expect("text");
            let ack = request
                .replacen("INVITE", "ACK", 1)
                .replacen("1 INVITE", "1 ACK", 1)
                .replacen("To: <sip:bob@example.net>", &format!("To: {}", line(text, "To")), 1);
            return self.client_sends(client, ack.into_bytes());
        }
        let (contact, call) = (angled(line(text, "Contact")).to_owned(), call_of(text));
        let key = format!("{call} {}", parameter(line(text, "To"), "tag"));
        let first = !self.dialogs.values().any(|dialog| dialog.call == call);
        let dialog = self.dialogs.entry(key.clone()).or_insert_with(|| {
            let mut routes: Vec<String> = lines(text, "Record-Route")
                .flat_map(|value| value.split(','))
                .map(|route| route.trim().to_owned())
                .collect();
            routes.reverse();
            Dialog { call, contact, to: line(text, "To").to_owned(), routes, closing: false }
        });
        if dialog.routes.is_empty() {
            // It was redirected to who is no instance, and is no business of the edge's any more.
            return self.alone(call);
        }
        let ack = Self::in_dialog(dialog, "ACK", &format!("z9hG4bK-{call}-ack"), 1);
        let begins = !std::mem::replace(&mut dialog.closing, true);
        self.client_sends(client, ack);
        if begins {
            // A second dialog is closed at once.
            let wait = if first { self.world.dice.between(SECOND, 25 * SECOND) } else { 10 * MS };
            self.queue.push(self.world.us + wait, Event::Bye(key));
        }
    }

    /// A call goes on without the edge.
    fn alone(&mut self, call: u64) {
        let id = format!("call-{call}");
        let is_its =
            |bytes: &[u8]| std::str::from_utf8(bytes).is_ok_and(|text| line(text, "Call-ID") == id);
        for served in self.served.values_mut().filter(|served| is_its(&served.bytes)) {
            served.acknowledged |= served.code < 300;
        }
        self.alive_dialogs.retain(|(.., call)| *call != id);
    }

    pub(super) fn at_site(&mut self, site: usize, via: Endpoint, worker: usize, bytes: &[u8]) {
        let text = std::str::from_utf8(bytes).expect("text");
        let (method, branch, life) = (
            text.split(' ').next().unwrap_or_default(),
            top_branch(text),
            self.world.sites[site].life,
        );
        let key = (site, life, branch.clone());
        let call = line(text, "Call-ID").to_owned();
        let back = (worker, via);
        match method {
            "ACK" => {
                for ((at, age, _), served) in &mut self.served {
                    let same = served.method == "INVITE" && *at == site && *age == life;
                    let ours = std::str::from_utf8(&served.bytes)
                        .is_ok_and(|text| line(text, "Call-ID") == call);
                    if same
                        && ours
                        && (served.code < 300
                            || top_branch(std::str::from_utf8(&served.bytes).unwrap_or_default())
                                == branch)
                    {
                        served.acknowledged = true;
                    }
                }
                return;
            }
            "CANCEL" => {
                let found = self.served.get(&key).map(|served| served.code);
                let known = found.is_some();
                self.respond(site, back, text, if known { 200 } else { 481 }, "");
                if found == Some(0) || found == Some(180) {
                    self.serve(site, life, branch, Step::Answer(487));
                }
                return;
            }
            _ => {}
        }
        if let Some(served) = self.served.get(&key) {
            let (code, ignored) = (served.code, served.ignored);
            if code > 0 && !ignored {
                self.respond_again(&key);
            }
            return;
        }
        let mut dice = dice_for(self.world.seed, branch.as_bytes(), site as u64);
        let served = Served {
            bytes: bytes.to_vec(),
            method: method.to_owned(),
            back,
            code: 0,
            acknowledged: false,
            ignored: false,
        };
        self.served.insert(key.clone(), served);
        let steps: Vec<(u64, Step)> = match method {
            "INVITE" => invite_plan(&mut dice),
            "BYE" => {
                let known = self.alive_dialogs.remove(&(site, life, call));
                let code = if known { 200 } else { 481 };
                if dice.percent(3) {
                    Vec::new()
                } else {
                    vec![(dice.below(100 * MS), Step::Answer(code))]
                }
            }
            _ => match dice.below(100) {
                0..4 => Vec::new(),
                4..9 => vec![(0, Step::Answer(503))],
                9..14 => vec![(dice.between(2 * SECOND, 5 * SECOND), Step::Answer(200))],
                _ => vec![(dice.below(200 * MS), Step::Answer(200))],
            },
        };
        if steps.is_empty()
            && let Some(served) = self.served.get_mut(&key)
        {
            served.ignored = true;
        }
        for (wait, step) in steps {
            self.queue.push(
                self.world.us + wait,
                Event::Serve { site, life, branch: branch.clone(), step },
            );
        }
    }

    pub(super) fn serve(&mut self, site: usize, life: u64, branch: String, step: Step) {
        if !self.world.sites[site].alive || self.world.sites[site].life != life {
            return;
        }
        let key = (site, life, branch.clone());
        let Some(served) = self.served.get_mut(&key) else { return };
        match step {
            Step::Ring if served.code == 0 => served.code = 180,
            Step::Answer(code) if served.code < 200 => {
                served.code = code;
                if served.method == "INVITE" {
                    if code < 300 {
                        let call =
                            line(std::str::from_utf8(&served.bytes).expect("text"), "Call-ID")
                                .to_owned();
                        self.alive_dialogs.insert((site, life, call));
                    }
                    // 17.2.1: a refusal is repeated over UDP only, a 2xx over anything (13.3.1.4).
                    if code < 300 || matches!(served.back.1, Endpoint::Datagram { .. }) {
                        let (wait, step) = (SECOND / 2, Step::Repeat(SECOND / 2));
                        let event = Event::Serve { site, life, branch, step };
                        self.queue.push(self.world.us + wait, event);
                    }
                }
            }
            Step::Repeat(wait) if !served.acknowledged => {
                if wait > 20 * SECOND {
                    let text = String::from_utf8_lossy(&served.bytes).into_owned();
                    assert!(
                        served.code < 300,
                        "a refusal was never acknowledged: {} to {text}",
                        served.code
                    );
                    return;
                }
                let next = wait * 2;
                self.queue.push(
                    self.world.us + next.min(4 * SECOND),
                    Event::Serve { site, life, branch, step: Step::Repeat(next) },
                );
            }
            _ => return,
        }
        self.respond_again(&key);
    }

    fn respond_again(&mut self, key: &(usize, u64, String)) {
        let served = &self.served[key];
        let (bytes, back, code) = (served.bytes.clone(), served.back, served.code);
        let tag =
            format!(";tag=s{}-{}-{:x}", key.0, key.1, dice_for(1, key.2.as_bytes(), 0).roll());
        self.respond(key.0, back, std::str::from_utf8(&bytes).expect("text"), code, &tag);
    }

    fn respond(
        &mut self,
        site: usize,
        back: (usize, Endpoint),
        request: &str,
        code: u16,
        tag: &str,
    ) {
        let known = self.world.sites[site].clone();
        let mut text = format!("SIP/2.0 {code} Whatever\r\n");
        for name in ["Via", "Record-Route"] {
            for value in lines(request, name) {
                text += &format!("{name}: {value}\r\n");
            }
        }
        let to = line(request, "To");
        let tag = if to.contains("tag=") { "" } else { tag };
        text += &format!(
            "From: {}\r\nTo: {to}{tag}\r\nCall-ID: {}\r\nCSeq: {}\r\n",
            line(request, "From"),
            line(request, "Call-ID"),
            line(request, "CSeq"),
        );
        text += &match code {
            // Elsewhere, and only name servers know where.
            302 => "Contact: <sip:moved@elsewhere.example>\r\nContent-Length: 0\r\n\r\n".to_owned(),
            _ => format!(
                "Contact: <sip:at-{}-{}-{}@{}>\r\nContent-Length: 0\r\n\r\n",
                known.id, known.generation, known.life, known.address,
            ),
        };
        let bytes = text.into_bytes();
        match back.1 {
            Endpoint::Backend(backend) => {
                let now = self.world.us;
                let Some(link) = self.links.get_mut(&(back.0, backend)) else { return };
                link.last = link
                    .last
                    .max(now + dice_for(self.world.seed, b"back", now).between(MS, 20 * MS));
                let event = Event::ToEdge {
                    worker: back.0,
                    from: back.1,
                    remote: known.address,
                    bytes,
                    life: Some((site, link.life)),
                };
                self.queue.push(link.last, event);
            }
            _ => {
                let worker = site % WORKERS;
                if let Some(at) = self.flight(known.address) {
                    let from = Endpoint::Datagram { socket: 0, remote: known.address };
                    self.queue.push(
                        at,
                        Event::ToEdge { worker, from, remote: known.address, bytes, life: None },
                    );
                }
            }
        }
    }
}

/// How an instance treats an INVITE.
fn invite_plan(dice: &mut Dice) -> Vec<(u64, Step)> {
    let ring = dice.between(10 * MS, 600 * MS);
    let pick_up = ring + dice.between(200 * MS, 8 * SECOND);
    match dice.below(100) {
        // Deaf.
        0..6 => Vec::new(),
        6..16 => vec![(dice.below(50 * MS), Step::Answer(503))],
        16..22 => vec![(ring, Step::Ring), (pick_up, Step::Answer(486))],
        22..24 => vec![(ring, Step::Answer(302))],
        24..26 => vec![(ring, Step::Ring), (pick_up, Step::Answer(503))],
        // It comes to itself only after it was given up.
        26..32 => {
            let late = dice.between(2 * SECOND, 5 * SECOND);
            vec![(late, Step::Ring), (late + pick_up, Step::Answer(200))]
        }
        32..36 => vec![(dice.between(2 * SECOND, 6 * SECOND), Step::Answer(200))],
        36..40 => vec![(dice.between(2 * SECOND, 6 * SECOND), Step::Answer(486))],
        // Rings for ever.
        40..44 => vec![(ring, Step::Ring)],
        44..60 => vec![(pick_up / 4, Step::Answer(200))],
        _ => vec![(ring, Step::Ring), (pick_up, Step::Answer(200))],
    }
}
