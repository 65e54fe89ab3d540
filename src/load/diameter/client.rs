//! Clients: the next transaction at each intended time, of a session that waits for its next one or
//! of a new session. Requests are encoded once and patched.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use slab::Slab;
use strowger_contract::{Wheel, stable_hash};
use strowger_diameter::avp::{Avps, FLAG_REQUEST, Header, code};
use strowger_diameter::build::{Builder, append};

use super::{DiameterOptions, GX, GY, Mix, S6A};
use crate::load::net::{Net, Place};
use crate::load::report::Report;

const CAPABILITIES_EXCHANGE: u32 = 257;
const CREDIT_CONTROL: u32 = 272;
const DEVICE_WATCHDOG: u32 = 280;
const DISCONNECT_PEER: u32 = 282;
const UPDATE_LOCATION: u32 = 316;
const AUTHENTICATION_INFORMATION: u32 = 318;
const CC_REQUEST_NUMBER: u32 = 415;
const AUTH_SESSION_STATE: u32 = 277;
const NO_STATE_MAINTAINED: u32 = 1;
const SUBSCRIPTION_ID: u32 = 443;
const SUBSCRIPTION_ID_TYPE: u32 = 450;
const SUBSCRIPTION_ID_DATA: u32 = 444;
const END_USER_IMSI: u32 = 1;
const SERVICE_CONTEXT_ID: u32 = 461;
/// Experimental use, never sent by anybody else.
const PADDING: u32 = 9_999_999;

/// Sessions at a time, at most: what 20 bits of the Hop-by-Hop identifier can name.
const SESSIONS_MAX: usize = 1 << 20;

/// Where a template's changing parts are.
#[derive(Debug)]
struct Template {
    bytes: Vec<u8>,
    session: usize,
    imsi: Option<usize>,
    kind: Option<usize>,
    number: Option<usize>,
}

#[derive(Debug)]
struct Session {
    generation: u32,
    application: u32,
    step: u32,
    connection: usize,
    intended: Instant,
    /// A hash of the first answer's Origin-Host.
    server: Option<u64>,
    host: Vec<u8>,
}

/// All clients.
pub(crate) struct Clients {
    options: DiameterOptions,
    templates: Vec<(u32, Template, Template)>,
    connections: Vec<usize>,
    sessions: Slab<Session>,
    waiting: VecDeque<usize>,
    under_way: usize,
    timers: Wheel,
    turn: u32,
    generation: u32,
    seed: u32,
    run: u32,
    due: Vec<u64>,
}

impl Clients {
    pub(crate) fn new(now: Instant, options: &DiameterOptions) -> Self {
        let run = options.common.seed();
        let mut templates = Vec::new();
        for (application, _) in &options.mix.0 {
            let (first, later) = match *application {
                S6A => (AUTHENTICATION_INFORMATION, UPDATE_LOCATION),
                _ => (CREDIT_CONTROL, CREDIT_CONTROL),
            };
            templates.push((
                *application,
                template(options, run, *application, first),
                template(options, run, *application, later),
            ));
        }
        Self {
            options: options.clone(),
            templates,
            connections: Vec::new(),
            sessions: Slab::new(),
            waiting: VecDeque::new(),
            under_way: 0,
            timers: Wheel::new(now),
            turn: 0,
            generation: 0,
            seed: run | 1,
            run,
            due: Vec::new(),
        }
    }

    pub(crate) fn ready(&self) -> usize {
        self.connections.len()
    }

    pub(crate) fn under_way(&self) -> usize {
        self.under_way
    }

    pub(crate) fn next(&self) -> Option<Instant> {
        self.timers.next()
    }

    pub(crate) fn on_open(&self, net: &mut Net, stream: usize, number: usize) {
        let options = &self.options;
        net.send(Place::Stream(stream), |out| {
            let mut builder = Builder::new(out, FLAG_REQUEST, CAPABILITIES_EXCHANGE, 0, 1, 1)
                .text(code::ORIGIN_HOST, &format!("{}-{number}.{}", options.name, options.realm))
                .text(code::ORIGIN_REALM, options.client_realm())
                .address(code::HOST_IP_ADDRESS, std::net::Ipv4Addr::LOCALHOST.into())
                .number(code::VENDOR_ID, 10_415)
                .text(code::PRODUCT_NAME, "strowger load")
                .number(code::SUPPORTED_VENDOR_ID, 10_415);
            for application in [GX, GY, S6A] {
                builder = builder.application(application);
            }
            builder.finish();
        });
    }

    pub(crate) fn on_closed(&mut self, stream: usize) {
        self.connections.retain(|&open| open != stream);
    }

    /// Sends the next transaction.
    pub(crate) fn begin(
        &mut self,
        net: &mut Net,
        now: Instant,
        intended: Instant,
        report: &mut Report,
    ) {
        report.begin(intended, now);
        if self.connections.is_empty() {
            return report.fail("no connection");
        }
        let slot = match self.waiting.pop_front() {
            Some(slot) => slot,
            None if self.sessions.len() >= SESSIONS_MAX => return report.fail("too many sessions"),
            None => self.new_session(intended),
        };
        let place = self.turn as usize % self.connections.len();
        self.turn = self.turn.wrapping_add(1);
        let session = &mut self.sessions[slot];
        session.intended = intended;
        session.connection = self.connections[place];
        self.under_way += 1;
        self.timers.insert(now + self.options.timeout, timer_key(slot, session));
        self.write(net, slot);
    }

    fn new_session(&mut self, intended: Instant) -> usize {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 17;
        self.seed ^= self.seed << 5;
        let application = pick(&self.options.mix, self.seed);
        self.generation = self.generation.wrapping_add(1);
        self.sessions.insert(Session {
            generation: self.generation,
            application,
            step: 0,
            connection: 0,
            intended,
            server: None,
            host: Vec::new(),
        })
    }

    fn write(&self, net: &mut Net, slot: usize) {
        let session = &self.sessions[slot];
        let found = self.templates.iter().find(|(known, ..)| *known == session.application);
        let Some((_, first, later)) = found else { return };
        let template = if session.step == 0 { first } else { later };
        let last = session.step == self.options.updates + 1;
        let kind: u32 = match session.step {
            0 => 1,
            _ if last => 3,
            _ => 2,
        };
        let follow = self.options.follow_host && !session.host.is_empty();
        net.send(Place::Stream(session.connection), |out| {
            let start = out.len();
            out.extend_from_slice(&template.bytes);
            let patch = |out: &mut Vec<u8>, at: usize, bytes: &[u8]| {
                out[start + at..start + at + bytes.len()].copy_from_slice(bytes);
            };
            let identifier = (slot as u32) << 12 | session.generation & 0xfff;
            patch(out, 12, &identifier.to_be_bytes());
            let end_to_end = self.run.rotate_left(16) ^ identifier ^ session.step << 28;
            patch(out, 16, &end_to_end.to_be_bytes());
            patch(out, template.session, &digits(slot as u32));
            patch(out, template.session + 9, &digits(session.generation));
            if let Some(at) = template.imsi {
                patch(out, at, &decimal(session.generation));
            }
            if let Some(at) = template.kind {
                patch(out, at, &kind.to_be_bytes());
            }
            if let Some(at) = template.number {
                patch(out, at, &session.step.to_be_bytes());
            }
            if follow {
                append(out, code::DESTINATION_HOST, 0x40, &session.host);
                let length = ((out.len() - start) as u32).to_be_bytes();
                patch(out, 1, &length[1..]);
            }
        });
    }

    pub(crate) fn on_message(
        &mut self,
        net: &mut Net,
        now: Instant,
        stream: usize,
        number: usize,
        bytes: &[u8],
        report: &mut Report,
    ) {
        let Some(header) = Header::read(bytes) else { return };
        if header.is_request() {
            return self.on_request(net, stream, number, &header);
        }
        if header.command == CAPABILITIES_EXCHANGE {
            if result_of(bytes) == Some(2_001) {
                self.connections.push(stream);
            } else {
                report.fail("capabilities refused");
            }
            return;
        }
        let slot = (header.hop_by_hop >> 12) as usize;
        let known = self.sessions.get(slot);
        let expected = known.is_some_and(|session| {
            session.generation & 0xfff == header.hop_by_hop & 0xfff && session.connection == stream
        });
        if !expected {
            return report.count("late_answers");
        }
        self.on_answer(now, slot, bytes, report);
    }

    /// The edge's own requests: watchdogs, and its farewell.
    fn on_request(&self, net: &mut Net, stream: usize, number: usize, header: &Header) {
        let options = &self.options;
        if !matches!(header.command, DEVICE_WATCHDOG | DISCONNECT_PEER) {
            return;
        }
        net.send(Place::Stream(stream), |out| {
            Builder::new(out, 0, header.command, 0, header.hop_by_hop, header.end_to_end)
                .number(code::RESULT_CODE, 2_001)
                .text(code::ORIGIN_HOST, &format!("{}-{number}.{}", options.name, options.realm))
                .text(code::ORIGIN_REALM, options.client_realm())
                .finish();
        });
    }

    fn on_answer(&mut self, now: Instant, slot: usize, bytes: &[u8], report: &mut Report) {
        let session = &mut self.sessions[slot];
        self.under_way -= 1;
        let result = result_of(bytes);
        let host = avp(bytes, code::ORIGIN_HOST).unwrap_or_default();
        let server = stable_hash(host);
        let moved = session.server.is_some_and(|first| first != server);
        if result != Some(2_001) {
            report.fail(&format!("answer {}", result.unwrap_or(0)));
        } else if moved {
            report.fail("moved to another server");
        } else {
            report.good += 1;
            let what = match session.application {
                GX => "gx",
                GY => "gy",
                _ => "s6a",
            };
            report.latency(what, now.saturating_duration_since(session.intended));
            if session.server.is_none() {
                session.server = Some(server);
                session.host.extend_from_slice(host);
                if let Some(number) = number_of(host) {
                    *report.instances.entry(number).or_default() += 1;
                }
            }
            let steps = if session.application == S6A { 1 } else { self.options.updates + 1 };
            if session.step < steps {
                session.step += 1;
                // The next step is another transaction, and the timer of this one is void.
                self.waiting.push_back(slot);
                return;
            }
        }
        self.sessions.remove(slot);
    }

    pub(crate) fn on_time(&mut self, now: Instant, report: &mut Report) {
        let mut due = std::mem::take(&mut self.due);
        self.timers.advance(now, |key| due.push(key));
        for key in due.drain(..) {
            let slot = (key >> 32) as usize;
            let waits = |session: &Session| {
                timer_key(slot, session) == key && !self.waiting.contains(&slot)
            };
            if self.sessions.get(slot).is_some_and(waits) {
                self.under_way -= 1;
                self.sessions.remove(slot);
                report.fail("no answer");
            }
        }
        self.due = due;
    }
}

fn timer_key(slot: usize, session: &Session) -> u64 {
    (slot as u64) << 32 | u64::from(session.generation << 4 | session.step & 15)
}

fn pick(mix: &Mix, roll: u32) -> u32 {
    let total: u32 = mix.0.iter().map(|(_, share)| share).sum();
    let mut left = roll % total.max(1);
    for (application, share) in &mix.0 {
        if left < *share {
            return *application;
        }
        left -= share;
    }
    GX
}

fn avp(bytes: &[u8], wanted: u32) -> Option<&[u8]> {
    Avps::of(bytes).map_while(Result::ok).find(|avp| avp.is(wanted)).map(|avp| avp.data)
}

fn result_of(bytes: &[u8]) -> Option<u32> {
    avp(bytes, code::RESULT_CODE)?.try_into().ok().map(u32::from_be_bytes)
}

/// `server-3.example.net` is number 3.
fn number_of(host: &[u8]) -> Option<usize> {
    let name = host.split(|&byte| byte == b'.').next()?;
    let digits = &name[name.iter().rposition(|&byte| byte == b'-')? + 1..];
    std::str::from_utf8(digits).ok()?.parse().ok()
}

fn digits(number: u32) -> [u8; 8] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    std::array::from_fn(|place| DIGITS[(number >> (4 * (7 - place)) & 15) as usize])
}

fn decimal(mut number: u32) -> [u8; 10] {
    let mut text = [b'0'; 10];
    for place in text.iter_mut().rev() {
        *place = b'0' + (number % 10) as u8;
        number /= 10;
    }
    text
}

fn template(options: &DiameterOptions, run: u32, application: u32, command: u32) -> Template {
    let mut bytes = Vec::new();
    let session = format!("load;{run:08x};00000000;00000000");
    let imsi = "001010000000000";
    let mut builder = Builder::request(&mut bytes, command, application, 0, 0)
        .text(code::SESSION_ID, &session)
        .text(code::ORIGIN_HOST, &format!("{}-0.{}", options.name, options.realm))
        .text(code::ORIGIN_REALM, options.client_realm())
        .text(code::DESTINATION_REALM, &options.realm);
    if command == CREDIT_CONTROL {
        let mut subscriber = Vec::new();
        append(&mut subscriber, SUBSCRIPTION_ID_TYPE, 0x40, &END_USER_IMSI.to_be_bytes());
        append(&mut subscriber, SUBSCRIPTION_ID_DATA, 0x40, imsi.as_bytes());
        builder = builder
            .number(code::AUTH_APPLICATION_ID, application)
            .number(code::CC_REQUEST_TYPE, 0)
            .number(CC_REQUEST_NUMBER, 0)
            .bytes(SUBSCRIPTION_ID, &subscriber);
        if application == GY {
            builder = builder.text(SERVICE_CONTEXT_ID, "32251@3gpp.org");
        }
    } else {
        builder =
            builder.number(AUTH_SESSION_STATE, NO_STATE_MAINTAINED).text(code::USER_NAME, imsi);
    }
    builder.finish();
    let missing = options.bytes.saturating_sub(bytes.len() + 8);
    if missing > 0 {
        append(&mut bytes, PADDING, 0, &vec![0; missing]);
        let length = (bytes.len() as u32).to_be_bytes();
        bytes[1..4].copy_from_slice(&length[1..]);
    }
    let at = |wanted: u32| {
        let found = Avps::of(&bytes).map_while(Result::ok).find(|avp| avp.is(wanted))?;
        Some(found.data.as_ptr() as usize - bytes.as_ptr() as usize)
    };
    let session = at(code::SESSION_ID).unwrap_or(0) + "load;00000000;".len();
    let imsi = bytes.windows(imsi.len()).position(|part| part == imsi.as_bytes());
    let (kind, number) = (at(code::CC_REQUEST_TYPE), at(CC_REQUEST_NUMBER));
    Template { session, imsi: imsi.map(|at| at + 5), kind, number, bytes }
}

/// The longest that a step's timer may outlive its session's use of the slot.
const _: () = assert!(Wheel::HORIZON.as_secs() >= Duration::from_secs(60).as_secs());
