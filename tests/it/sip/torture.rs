//! Torture messages through the real listener, over UDP and TCP, with the verdict that the RFC gives;
//! and messages of our own for each rule, which stand here.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use super::phone::{Client, Server, answer, headers, status};
use crate::harness::{Edge, free_port};

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Became {
    /// It reached the instance.
    Relayed,
    /// The edge answered it with that code.
    Answered(u16),
    /// Neither; a stream may have been closed.
    Dropped,
}

/// How long nothing must happen before a message that wants no answer counts as dropped.
const QUIET: Duration = Duration::from_millis(60);

/// The same for one that may be answered.
const PATIENCE: Duration = Duration::from_millis(1_500);

struct Rig {
    edge: Edge,
    server: Server,
    port: u16,
    number: u32,
}

impl Rig {
    fn new() -> Self {
        let port = free_port();
        let server = Server::new("127.0.0.1:0", |request: &str| {
            let silent = request.starts_with("ACK ") || request.starts_with("SIP/2.0");
            // 200 would leave each INVITE open; 486 ends it.
            if silent { vec![] } else { vec![answer(request, 486, "X-Instance: yes\r\n")] }
        });
        let edge = Edge::start(&format!(
            "version: 1\nnode: {{ name: test, workers: 2 }}\nadmin: {{ listen: ADMIN }}\nlisteners:\n  - name: sip\n    protocol: sip\n    bind: [udp://127.0.0.1:{port}, tcp://127.0.0.1:{port}]\n    pool: ims\npools:\n  ims: {{ backends: [ {{ id: a, address: udp://{} }} ] }}\n",
            server.address
        ));
        Self { edge, server, port, number: 0 }
    }

    fn address(&self) -> std::net::SocketAddr {
        ([127, 0, 0, 1], self.port).into()
    }

    /// Sends a message as a proxy before us would: with a Via of its own on top, so that the answer
    /// finds back. The rest is as it was.
    fn udp(&mut self, bytes: &[u8]) -> Became {
        let mut client = Client::udp(self.address());
        self.number += 1;
        let line =
            bytes.windows(2).position(|pair| pair == b"\r\n").map_or(bytes.len(), |at| at + 2);
        let via = format!(
            "Via: SIP/2.0/UDP {};rport;branch=z9hG4bKtorture{}\r\n",
            client.local(),
            self.number
        );
        let message = [&bytes[..line], via.as_bytes(), &bytes[line..]].concat();
        self.play(&mut client, &message)
    }

    fn tcp(&mut self, bytes: &[u8]) -> Became {
        let mut client = Client::tcp(self.address());
        self.play(&mut client, bytes)
    }

    fn play(&mut self, client: &mut Client, message: &[u8]) -> Became {
        // ACKs are the edge's own: of the 486 before.
        let seen = |server: &Server| {
            server.seen().iter().filter(|message| !message.starts_with(b"ACK ")).count()
        };
        let before = seen(&self.server);
        client.send(message);
        let mute = [&b"ACK "[..], b"SIP/2.0 "].iter().any(|start| message.starts_with(start));
        let answer = client.final_answer(if mute { QUIET } else { PATIENCE });
        let relayed = seen(&self.server) > before;
        match answer {
            Some(text) if text.contains("X-Instance: yes") => Became::Relayed,
            Some(text) => Became::Answered(status(&text)),
            None if relayed => Became::Relayed,
            None => Became::Dropped,
        }
    }

    /// The edge still does its work.
    fn is_well(&mut self, after: &str) {
        let mut client = Client::udp(self.address());
        self.number += 1;
        let message =
            client.request("OPTIONS", "sip:x@example.net", "well", &format!("well{}", self.number));
        client.send(message.as_bytes());
        let told = client.final_answer(Duration::from_secs(15));
        assert!(told.is_some_and(|told| status(&told) == 486), "after {after}");
        assert_eq!(self.edge.metric("strowger_engine_panics_total", &[]), 0.0, "after {after}");
    }
}

/// A row of the index: path, kind, verdict.
type Row = (String, String, String);

/// The index, where there is one.
fn index() -> Option<(PathBuf, Vec<Row>)> {
    let folder = std::env::var_os("STROWGER_TESTDATA").map(PathBuf::from)?;
    let Ok(text) = fs::read_to_string(folder.join("sip/index.tsv")) else {
        println!("skipped: no sip/index.tsv in STROWGER_TESTDATA");
        return None;
    };
    let mut lines = text.lines();
    let names: HashMap<&str, usize> =
        lines.next()?.split('\t').enumerate().map(|(at, name)| (name, at)).collect();
    let rows = lines.map(|line| {
        let fields: Vec<&str> = line.split('\t').collect();
        let field = |name: &str| fields.get(names[name]).unwrap_or(&"").to_string();
        (field("path"), field("kind"), field("expected"))
    });
    Some((folder, rows.collect()))
}

/// Valid ones that a proxy must nevertheless answer itself, by the RFC's own words, or that carry a
/// route to a host that is not ours.
fn is_answer_of_a_proxy(path: &str, code: u16) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    match name {
        // RFC 4475 3.3.11: Max-Forwards is 0.
        "zeromf.dat" => code == 483,
        // RFC 4475 3.3.5: an extension in Proxy-Require that nobody has.
        "bext01.dat" => code == 420,
        // RFC 4475 3.3.2, 3.3.3: a scheme that a proxy may refuse.
        "unkscm.dat" | "novelsc.dat" => code == 416,
        // What a proxy cannot do is reach the host in the Route or, in a dialog, in the Request-URI.
        _ => matches!(code, 404 | 408 | 480 | 481 | 500 | 502 | 503 | 504),
    }
}

#[test]
fn other_peoples_messages_get_the_verdict_of_the_rfcs() {
    let Some((folder, rows)) = index() else { return };
    let mut rig = Rig::new();
    let (mut wrong, mut relayed, mut refused) = (Vec::new(), 0, 0);
    for (path, kind, expected) in &rows {
        let bytes = fs::read(folder.join(path)).expect("as the index says");
        let only_udp = path.contains("rfc-flows");
        for transport in ["udp", "tcp"] {
            if transport == "tcp" && only_udp {
                continue;
            }
            let became = if transport == "udp" { rig.udp(&bytes) } else { rig.tcp(&bytes) };
            let good = match (kind.as_str(), expected.as_str(), became) {
                // A response that belongs to nothing of ours goes no further than to whom its next
                // Via names; here that is nobody.
                ("response", _, became) => became == Became::Dropped,
                (_, "valid", Became::Relayed) => true,
                (_, "valid", Became::Answered(code)) => is_answer_of_a_proxy(path, code),
                // On a stream a message without Content-Length cannot be cut (18.3); one to a host
                // elsewhere, or an ACK, gets no answer.
                (_, "valid", Became::Dropped) => true,
                (_, "invalid", Became::Answered(code)) => (400..500).contains(&code) || code == 505,
                (_, "invalid", Became::Dropped) => true,
                (_, "invalid", Became::Relayed) => is_left_to_the_ends(path),
                _ => true,
            };
            match became {
                Became::Relayed => relayed += 1,
                Became::Answered(_) => refused += 1,
                Became::Dropped => {}
            }
            if !good {
                wrong.push(format!("{path} over {transport}: {expected}, but {became:?}"));
            }
        }
        if path.contains("rfc4475") || path.contains("rfc5118") {
            rig.is_well(path);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("{} messages: {relayed} relayed, {refused} answered by the edge", rows.len());
    assert!(relayed > 60, "{relayed} were relayed");
}

/// Invalid for an end, but in what a proxy does not look at (RFC 4475 says so for each).
fn is_left_to_the_ends(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    // 3.1.2.1: a Contact with superfluous separators; 3.1.2.6: an unbalanced quote in a display name.
    matches!(name, "badinv01.dat" | "quotbal.dat")
}

const HEAD: &str = "Max-Forwards: 70\r\nFrom: <sip:a@example.net>;tag=1\r\nTo: <sip:b@example.net>\r\nCall-ID: CALL\r\nCSeq: 1 OPTIONS\r\n";

/// Each rule: what is sent (without Via; `CALL` is made unique), and what becomes of it.
fn rules() -> Vec<(&'static str, String, Became)> {
    use Became::{Answered, Dropped, Relayed};
    let plain = |more: &str| {
        format!("OPTIONS sip:b@example.net SIP/2.0\r\n{HEAD}{more}Content-Length: 0\r\n\r\n")
    };
    let uri = |uri: &str| plain("").replacen("sip:b@example.net", uri, 1);
    let swap = |from: &str, to: &str| plain("").replacen(from, to, 1);
    vec![
        ("a plain request (16.6)", plain(""), Relayed),
        ("an unknown method (16)", plain("").replace("OPTIONS", "FOO"), Relayed),
        (
            "a method of odd characters (25.1)",
            plain("").replace("OPTIONS", "a-.!%*_+`'~9"),
            Relayed,
        ),
        ("folded headers (7.3.1)", plain("Subject: a\r\n b\r\n\tc\r\nX-Fold:\r\n d\r\n"), Relayed),
        ("white space before the colon (25.1)", swap("CSeq:", "CSeq \t :"), Relayed),
        ("any letter case (7.3.1)", swap("Call-ID:", "cALL-iD:"), Relayed),
        (
            "compact forms (7.3.3)",
            plain("")
                .replace("From:", "f:")
                .replace("To:", "t:")
                .replace("Call-ID:", "i:")
                .replace("Content-Length:", "l:"),
            Relayed,
        ),
        ("bytes that are no UTF-8 (25.1)", plain("Subject: \u{fffd}\r\n"), Relayed),
        ("no Max-Forwards: it gets one (16.6 step 3)", swap("Max-Forwards: 70\r\n", ""), Relayed),
        (
            "Max-Forwards 0 (16.3 step 3)",
            swap("Max-Forwards: 70", "Max-Forwards: 0"),
            Answered(483),
        ),
        (
            "Max-Forwards that is no number",
            swap("Max-Forwards: 70", "Max-Forwards: x"),
            Answered(400),
        ),
        ("Max-Forwards twice", plain("Max-Forwards: 3\r\n"), Answered(400)),
        (
            "Proxy-Require that nobody has (16.3 step 5)",
            plain("Proxy-Require: teleport\r\n"),
            Answered(420),
        ),
        ("another version (21.5.6)", swap("SIP/2.0", "SIP/3.0"), Answered(505)),
        ("no From (8.1.1)", swap("From: <sip:a@example.net>;tag=1\r\n", ""), Answered(400)),
        ("no To (8.1.1)", swap("To: <sip:b@example.net>\r\n", ""), Answered(400)),
        ("no CSeq (8.1.1)", swap("CSeq: 1 OPTIONS\r\n", ""), Answered(400)),
        ("no Call-ID: nobody could match an answer", swap("Call-ID: CALL\r\n", ""), Dropped),
        ("From twice (7.3.1)", plain("From: <sip:x@y>;tag=2\r\n"), Answered(400)),
        ("Call-ID twice (7.3.1)", plain("Call-ID: other\r\n"), Answered(400)),
        (
            "CSeq of another method (8.1.1.5)",
            swap("CSeq: 1 OPTIONS", "CSeq: 1 INVITE"),
            Answered(400),
        ),
        ("CSeq of 2^31 (8.1.1.5)", swap("CSeq: 1 ", "CSeq: 2147483648 "), Answered(400)),
        ("CSeq of 2^31 - 1 (8.1.1.5)", swap("CSeq: 1 ", "CSeq: 2147483647 "), Relayed),
        ("a header line without a colon (7.3)", plain("no colon here\r\n"), Answered(400)),
        ("a tel: URI (19.1.6)", uri("tel:+49301234;phone-context=example.net"), Relayed),
        ("a urn: URI (RFC 5031)", uri("urn:service:sos"), Relayed),
        ("an IPv6 literal (25.1)", uri("sip:b@[2001:db8::1]:5060"), Relayed),
        ("an IPv6 literal that is cut (25.1)", uri("sip:b@[2001:db8::1"), Answered(400)),
        ("a URI of no scheme (25.1)", uri("b@example"), Answered(400)),
        ("a URI in angle brackets (7.1)", uri("<sip:b@example.net>"), Answered(400)),
        (
            "a body of an unknown type",
            swap("Content-Length: 0\r\n\r\n", "Content-Type: x/y\r\nContent-Length: 3\r\n\r\nabc"),
            Relayed,
        ),
    ]
}

#[test]
fn every_rule_has_a_message_of_ours() {
    let mut rig = Rig::new();
    let mut wrong = Vec::new();
    for (number, (rule, message, expected)) in rules().into_iter().enumerate() {
        for transport in ["udp", "tcp"] {
            let message = message.replace("CALL", &format!("rule-{number}-{transport}"));
            let became = if transport == "udp" {
                rig.udp(message.as_bytes())
            } else {
                let (line, rest) = message.split_once("\r\n").expect("lines");
                let via = format!("Via: SIP/2.0/TCP client.invalid;branch=z9hG4bKrule{number}");
                rig.tcp(format!("{line}\r\n{via}\r\n{rest}").as_bytes())
            };
            if became != expected {
                wrong.push(format!("{rule} over {transport}: {expected:?}, but {became:?}"));
            }
        }
    }
    rig.is_well("all");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What a proxy does not own comes out as it came in, byte by byte (16.6).
#[test]
fn what_is_not_ours_stays_as_it_was() {
    let rig = Rig::new();
    let mut client = Client::udp(rig.address());
    let odd = b"X-Odd  : \xff\xfe  a\r\n\tb\r\ns:\r\n  folded\r\nContent-Type:x/y\r\nl : 4\r\n\r\n\x00\xff\r\n";
    let head = client.request("OPTIONS", "sip:b@example.net;x=Y%41?h=1", "a", "bytes");
    let head = head.split("Content-Length").next().expect("a head");
    client.send(&[head.as_bytes(), odd].concat());
    assert!(client.final_answer(Duration::from_secs(15)).is_some());
    let seen = rig.server.seen();
    assert!(seen[0].starts_with(b"OPTIONS sip:b@example.net;x=Y%41?h=1 SIP/2.0\r\n"));
    assert!(seen[0].ends_with(odd), "{}", String::from_utf8_lossy(&seen[0]));
}

/// Several messages in one segment, and one in as many segments as it has bytes.
#[test]
fn segments_are_no_messages() {
    let rig = Rig::new();
    let mut client = Client::tcp(rig.address());
    let message = |call: &str| client.request("OPTIONS", "sip:b@example.net", "a", call);
    let many: String = (0..20).map(|number| message(&format!("many-{number}"))).collect();
    let slow = message("slow");
    client.send(many.as_bytes());
    let mut calls: Vec<String> = Vec::new();
    for _ in 0..20 {
        let told = client.final_answer(Duration::from_secs(15)).expect("answered");
        calls.extend(headers(&told, "Call-ID", "i").iter().map(|call| (*call).to_owned()));
    }
    calls.sort();
    calls.dedup();
    assert_eq!(calls.len(), 20);
    // Ping and pong between messages (RFC 5626 3.5.1).
    client.send(b"\r\n\r\n");
    for byte in slow.as_bytes() {
        client.send(&[*byte]);
    }
    let told = client.final_answer(Duration::from_secs(15)).expect("answered");
    assert_eq!(headers(&told, "Call-ID", "i"), ["slow"]);
}
