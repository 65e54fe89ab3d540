//! Each kind of message that the edge emits, provoked and read by tshark.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use strowger_contract::{Framer, Framing};
use strowger_diameter::DiameterFramer;
use strowger_diameter::avp::{FLAG_REQUEST, Summary, code};
use strowger_diameter::build::{Builder, append};

use super::{CER, DPR, DWR, Tap, config, dissects, header, until_up};
use crate::harness::{Edge, alone, free_port};

const CCR: u32 = 272;
const CREDIT_CONTROL: u32 = 4;

pub(super) fn read(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<Vec<u8>> {
    loop {
        if let Framing::Message(length) = DiameterFramer.frame(buffer).expect("Diameter") {
            return Some(buffer.drain(..length.get()).collect());
        }
        let mut part = [0; 8_192];
        match stream.read(&mut part) {
            Ok(0) | Err(_) => return None,
            Ok(count) => buffer.extend_from_slice(&part[..count]),
        }
    }
}

pub(super) fn answer_to(request: &[u8], host: &str) -> Vec<u8> {
    let asked = header(request);
    let mut answer = Vec::new();
    let flags = asked.flags & 0x40;
    let (hop, end) = (asked.hop_by_hop, asked.end_to_end);
    let mut builder = Builder::new(&mut answer, flags, asked.command, asked.application, hop, end);
    if let Some(session) = Summary::of(request).session_id {
        builder = builder.bytes(code::SESSION_ID, session);
    }
    builder = builder
        .number(code::RESULT_CODE, 2_001)
        .text(code::ORIGIN_HOST, host)
        .text(code::ORIGIN_REALM, "example.net");
    if asked.command == CER {
        builder = told(builder, CREDIT_CONTROL);
    }
    builder.finish();
    answer
}

fn told(builder: Builder<'_>, application: u32) -> Builder<'_> {
    builder
        .address(code::HOST_IP_ADDRESS, "127.0.0.1".parse().expect("an address"))
        .number(code::VENDOR_ID, 0)
        .avp(code::PRODUCT_NAME, 0, b"test")
        .application(application)
}

/// A server that answers all but credit control while it is mute.
pub(super) fn server(port: u16, host: &'static str) -> Arc<AtomicBool> {
    let mute = Arc::new(AtomicBool::new(false));
    let quiet = Arc::clone(&mute);
    let listener = TcpListener::bind(("127.0.0.1", port)).expect("a free port");
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let (quiet, mut buffer) = (Arc::clone(&quiet), Vec::new());
            thread::spawn(move || {
                while let Some(message) = read(&mut stream, &mut buffer) {
                    let asked = header(&message);
                    let silent = quiet.load(Ordering::Relaxed) && asked.command == CCR;
                    if asked.is_request() && !silent {
                        let _gone = stream.write_all(&answer_to(&message, host));
                    }
                }
            });
        }
    });
    mute
}

pub(super) struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    pub(super) fn connect(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("somebody listens");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("an option");
        Self { stream, buffer: Vec::new() }
    }

    pub(super) fn send(&mut self, message: &[u8]) {
        self.stream.write_all(message).expect("sent");
    }

    /// The next message that is not a watchdog request; those are answered.
    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            let message = read(&mut self.stream, &mut self.buffer)?;
            if header(&message).command != DWR || !header(&message).is_request() {
                return Some(message);
            }
            self.send(&answer_to(&message, "client.example.net"));
        }
    }

    /// Introduces itself; the Result-Code that it is told.
    pub(super) fn introduce(&mut self, host: &str, application: u32) -> Option<u32> {
        let mut cer = Vec::new();
        let builder = Builder::new(&mut cer, FLAG_REQUEST, CER, 0, 1, 1)
            .text(code::ORIGIN_HOST, host)
            .text(code::ORIGIN_REALM, "example.net");
        told(builder, application).finish();
        self.send(&cer);
        Summary::of(&self.next()?).result_code
    }

    pub(super) fn ask(&mut self, message: &[u8]) -> Option<u32> {
        self.send(message);
        Summary::of(&self.next().expect("an answer")).result_code
    }
}

pub(super) fn ccr(session: &str, application: u32, extra: &[(u32, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut builder = Builder::request(&mut bytes, CCR, application, 9, 10)
        .text(code::SESSION_ID, session)
        .text(code::ORIGIN_HOST, "client.example.net")
        .text(code::ORIGIN_REALM, "example.net")
        .text(code::DESTINATION_REALM, "example.net")
        .number(code::AUTH_APPLICATION_ID, application)
        .text(461, "test@example.net")
        .number(code::CC_REQUEST_TYPE, 1)
        .number(415, 0);
    for (code, text) in extra {
        builder = builder.text(*code, text);
    }
    builder.finish();
    bytes
}

/// Sets the message's length to what it is.
pub(super) fn measured(mut message: Vec<u8>) -> Vec<u8> {
    let length = (message.len() as u32).to_be_bytes();
    message[1..4].copy_from_slice(&length[1..]);
    message
}

#[test]
fn all_that_the_edge_says_dissects() {
    let _alone = alone();
    let (port, one) = (free_port(), free_port());
    let mute = server(one, "a.example.net");
    let back = Tap::to(one);
    let edge = Edge::start(
        &config(
            port,
            &[("a", back.port)],
            ", watchdog: 500ms, max_pending: 1, applications: [gy], advertise_relay: false, peers: [client.example.net]",
        )
        .replace("answer_timeout: 20s", "answer_timeout: 3s"),
    );
    until_up(&edge, &["a"]);
    let front = Tap::to(port);
    assert_eq!(
        Client::connect(front.port).introduce("stranger.example.net", CREDIT_CONTROL),
        Some(3_010)
    );
    assert_eq!(Client::connect(front.port).introduce("client.example.net", 6), Some(5_010));
    let mut client = Client::connect(front.port);
    assert_eq!(client.introduce("client.example.net", CREDIT_CONTROL), Some(2_001));
    let good = ccr("client.example.net;1;1", CREDIT_CONTROL, &[]);
    assert_eq!(client.ask(&good), Some(2_001));
    let proxied = {
        let mut message = good.clone();
        let mut group = Vec::new();
        append(&mut group, 280, 0x40, b"proxy.example.net");
        append(&mut group, 33, 0x40, b"state");
        append(&mut message, code::PROXY_INFO, 0x40, &group);
        measured(message)
    };
    let looped = |message: &[u8]| {
        let mut message = message.to_vec();
        append(&mut message, code::ROUTE_RECORD, 0x40, b"EDGE.example.net");
        measured(message)
    };
    assert_eq!(client.ask(&looped(&proxied)), Some(3_005));
    assert_eq!(client.ask(&ccr("client.example.net;1;2", 6, &[])), Some(3_007));
    let mut flags = good.clone();
    flags[4] |= 0x20;
    assert_eq!(client.ask(&flags), Some(3_008));
    let mut short = good.clone();
    short[27] = 3;
    assert_eq!(client.ask(&short), Some(5_014));
    // Only one request may be under way; the first one ends by its time.
    mute.store(true, Ordering::Relaxed);
    client.send(&good);
    assert_eq!(client.ask(&ccr("client.example.net;1;3", CREDIT_CONTROL, &[])), Some(3_004));
    assert_eq!(Summary::of(&client.next().expect("an answer")).result_code, Some(3_002));
    // Watchdogs and a goodbye.
    let asked = |messages: &[Vec<u8>]| {
        messages
            .iter()
            .any(|message| header(message).command == DWR && header(message).is_request())
    };
    let mut watchdog = Vec::new();
    Builder::new(&mut watchdog, FLAG_REQUEST, DWR, 0, 5, 5)
        .text(code::ORIGIN_HOST, "client.example.net")
        .text(code::ORIGIN_REALM, "example.net")
        .finish();
    assert_eq!(client.ask(&watchdog), Some(2_001));
    edge.until("a watchdog to the server", |_| asked(&back.forth()));
    let mut goodbye = Vec::new();
    Builder::new(&mut goodbye, FLAG_REQUEST, DPR, 0, 6, 6)
        .text(code::ORIGIN_HOST, "client.example.net")
        .text(code::ORIGIN_REALM, "example.net")
        .number(code::DISCONNECT_CAUSE, 0)
        .finish();
    assert_eq!(client.ask(&goodbye), Some(2_001));
    let mut edge = edge;
    let mut other = Client::connect(front.port);
    assert_eq!(other.introduce("client.example.net", CREDIT_CONTROL), Some(2_001));
    // The edge says goodbye as well when it ends.
    assert_eq!(edge.process.terminate(), Some(0));
    let emitted: Vec<Vec<u8>> = front.back().into_iter().chain(back.forth()).collect();
    let kinds: BTreeSet<(u32, bool, Option<u32>)> = emitted
        .iter()
        .map(|message| {
            let header = header(message);
            (header.command, header.is_request(), Summary::of(message).result_code)
        })
        .collect();
    for (command, request, results) in [
        (CER, true, &[][..]),
        (CER, false, &[2_001, 3_010, 5_010]),
        (DWR, true, &[]),
        (DWR, false, &[2_001]),
        (DPR, true, &[]),
        (DPR, false, &[2_001]),
        (CCR, true, &[]),
        (CCR, false, &[2_001, 3_002, 3_004, 3_005, 3_007, 3_008, 5_014]),
    ] {
        if request {
            assert!(kinds.contains(&(command, true, None)), "no request {command}: {kinds:?}");
        }
        for result in results {
            let kind = (command, false, Some(*result));
            assert!(kinds.contains(&kind), "no {kind:?}: {kinds:?}");
        }
    }
    dissects(&emitted);
}
