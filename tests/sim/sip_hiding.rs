//! Topology hiding: whole calls, begun on either side, and the words that things are hidden in.

use proptest::prelude::*;
use serde_json::{Value, json};
use strowger_contract::{Endpoint, TokenKeys, Transport};
use strowger_sip::hide::{Mask, mask_request, mask_response, unmask, unmask_anywhere};
use strowger_sip::scan::Scan;

use crate::sip_bench::{Bench, CLIENT, answer, backend, header, remote, request, starts};

/// What nobody outside may read: the instance, and a proxy behind it.
const INSIDE: [&str; 3] = ["10.0.0.1", "10.77.0.9", "secret"];

fn options(mode: &str, from: &str) -> Value {
    json!({"mode": mode, "topology_hiding": {"from": from}})
}

fn is_hidden(text: &str) {
    for word in INSIDE {
        assert!(!text.contains(word), "{word} is seen in {text}");
    }
}

fn uri_of(header: &str) -> &str {
    header.split(['<', '>']).nth(1).unwrap_or(header)
}

fn list<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
    text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).collect()
}

/// A client calls; the instance's answer has its own and an inner proxy's addresses.
#[test]
fn a_client_sees_nothing_behind_the_edge_and_its_dialog_works_both_ways() {
    for mode in ["stateful", "stateless"] {
        let mut bench = Bench::new(options(mode, "clients"), "", vec![backend(1, None)]);
        let sent = bench.client(&request("INVITE", "c1", ""));
        let invite = sent.last().expect("it went on").clone();
        assert_eq!(header(&invite.1, "Call-ID"), "c1");
        let inner = "Record-Route: <sip:10.77.0.9:5080;lr;x=secret>";
        let more = "Contact: \"Bob\" <sip:bob@10.0.0.1:5070;secret=1>;q=0.5\r\n";
        let said = answer(&invite.1, "200 OK", more).replacen(
            "Record-Route:",
            &format!("{inner}\r\nRecord-Route:"),
            1,
        );
        let answered = bench.gets(remote(invite.0), &said);
        let ok = answered[0].1.clone();
        is_hidden(&ok);
        assert_eq!(header(&ok, "Call-ID"), "c1", "its own");
        assert!(header(&ok, "Contact").starts_with("\"Bob\" <sip:swth-u"), "{ok}");
        assert!(header(&ok, "Contact").ends_with(">;q=0.5"), "{ok}");
        let routes = list(&ok, "Record-Route");
        assert_eq!(routes.len(), 2, "{ok}");
        assert!(routes[0].ends_with(";lr>"), "a loose router stays one: {ok}");
        let route: String = routes.iter().rev().map(|it| format!("Route: {it}\r\n")).collect();
        for method in ["ACK", "BYE"] {
            let within = request(method, "c1", &route)
                .replace("To: <sip:bob@example.net>", "To: <sip:bob@example.net>;tag=callee")
                .replace(
                    "sip:bob@example.net SIP",
                    &format!("{} SIP", uri_of(header(&ok, "Contact"))),
                );
            let sent = bench.client(&within);
            assert_eq!(starts(&sent), [method], "{mode}");
            let text = &sent[0].1;
            assert!(
                text.starts_with(&format!("{method} sip:bob@10.0.0.1:5070;secret=1 SIP/2.0\r\n")),
                "{text}"
            );
            assert_eq!(header(text, "Route"), "<sip:10.77.0.9:5080;lr;x=secret>");
            if method == "BYE" {
                let done = bench.answers(&sent[0], "200 OK", "");
                assert_eq!(starts(&done), ["200"]);
                is_hidden(&done[0].1);
            }
        }
        bench.rests();
    }
}

/// A reload that hides nothing any more leaves the dialogs whole that were set up before it.
#[test]
fn a_dialog_outlives_the_option_that_hid_it() {
    let mut bench = Bench::new(options("stateful", "clients"), "", vec![backend(1, None)]);
    let sent = bench.client(&request("INVITE", "c1", ""));
    let contact = "Contact: <sip:bob@10.0.0.1:5070>\r\n";
    let ok = bench.answers(sent.last().expect("it went on"), "200 OK", contact)[0].1.clone();
    is_hidden(&ok);
    bench.reload(json!({"mode": "stateful"}));
    let routes: String =
        list(&ok, "Record-Route").iter().map(|it| format!("Route: {it}\r\n")).collect();
    let bye = request("BYE", "c1", &routes)
        .replace("To: <sip:bob@example.net>", "To: <sip:bob@example.net>;tag=callee")
        .replace("sip:bob@example.net SIP", &format!("{} SIP", uri_of(header(&ok, "Contact"))));
    let sent = bench.client(&bye);
    assert!(sent[0].1.starts_with("BYE sip:bob@10.0.0.1:5070 SIP/2.0\r\n"), "{}", sent[0].1);
}

/// An instance that leaves our Record-Route out of its answers is hidden none the less.
#[test]
fn an_answer_without_record_route_tells_nothing() {
    for mode in ["stateful", "stateless"] {
        let mut bench = Bench::new(options(mode, "clients"), "", vec![backend(1, None)]);
        let sent = bench.client(&request("INVITE", "c1", ""));
        let invite = sent.last().expect("it went on").clone();
        for line in ["180 Ringing", "200 OK"] {
            let said = answer(&invite.1, line, "Contact: <sip:bob@10.0.0.1:5070;secret=1>\r\n");
            let bare: String = said
                .split_inclusive("\r\n")
                .filter(|line| !line.starts_with("Record-Route"))
                .collect();
            let answered = bench.gets(remote(invite.0), &bare);
            assert_eq!(answered.len(), 1, "{mode}");
            is_hidden(&answered[0].1);
        }
    }
}

/// The instance calls a client: its Via, Contact, Record-Route and Call-ID are its own business.
#[test]
fn an_instances_call_is_hidden_with_its_call_id_and_every_answer_finds_back() {
    for mode in ["stateful", "stateless"] {
        let mut bench = Bench::new(options(mode, "clients"), "", vec![backend(1, None)]);
        let from = "10.0.0.1:5060".parse().expect("an address");
        let invite = request("INVITE", "id@secret.example", "")
            .replace("sip:bob@example.net SIP", &format!("sip:carol@{CLIENT} SIP"))
            .replace(&format!("UDP {CLIENT};"), "UDP 10.0.0.1:5060;")
            .replace(&format!("alice@{CLIENT}"), "alice@10.0.0.1:5060")
            .replace(
                "Max-Forwards",
                "Via: SIP/2.0/TCP 10.77.0.9:5080;branch=z9hG4bKsecret;received=10.77.0.9, SIP/2.0/UDP secret\r\nRecord-Route: <sip:10.77.0.9;lr>\r\nMax-Forwards",
            );
        let sent = bench.gets(from, &invite);
        let got = sent.last().expect("it went on").clone();
        assert_eq!(remote(got.0).to_string(), CLIENT);
        is_hidden(&got.1);
        let id = header(&got.1, "Call-ID").to_owned();
        assert!(id.starts_with("swth-c"), "{id}");
        // Each of the client's answers comes back whole.
        for line in ["180 Ringing", "200 OK"] {
            let back = bench.answers(&got, line, &format!("Contact: <sip:carol@{CLIENT}>\r\n"));
            assert_eq!(remote(back[0].0), from);
            let text = &back[0].1;
            assert_eq!(header(text, "Call-ID"), "id@secret.example");
            assert!(!text.contains("swth-"), "{text}");
            assert_eq!(
                list(text, "Via")[1],
                "SIP/2.0/TCP 10.77.0.9:5080;branch=z9hG4bKsecret;received=10.77.0.9, SIP/2.0/UDP secret"
            );
            assert_eq!(list(text, "Record-Route")[1..], ["<sip:10.77.0.9;lr>"]);
        }
        // The client's own request in that dialog, by what it was told.
        let routes: String =
            list(&got.1, "Record-Route").iter().map(|it| format!("Route: {it}\r\n")).collect();
        let bye = format!(
            "BYE {} SIP/2.0\r\nVia: SIP/2.0/UDP {CLIENT};branch=z9hG4bKbye;rport\r\nMax-Forwards: 70\r\n{routes}From: <sip:bob@example.net>;tag=callee\r\nTo: <sip:alice@example.net>;tag=a\r\nCall-ID: {id}\r\nCSeq: 1 BYE\r\nContent-Length: 0\r\n\r\n",
            uri_of(header(&got.1, "Contact"))
        );
        let sent = bench.client(&bye);
        assert_eq!(starts(&sent), ["BYE"], "{mode} {sent:?}");
        let text = sent[0].1.clone();
        assert_eq!(header(&text, "Call-ID"), "id@secret.example");
        assert!(text.starts_with("BYE sip:alice@10.0.0.1:5060 SIP/2.0\r\n"), "{text}");
        assert_eq!(header(&text, "Route"), "<sip:10.77.0.9;lr>");
        // And its answer has the Call-ID that the client knows, and its Via as it was.
        let done = bench.answers(&sent[0], "200 OK", "");
        assert_eq!(header(&done[0].1, "Call-ID"), id);
        assert_eq!(
            header(&done[0].1, "Via"),
            format!("SIP/2.0/UDP {CLIENT};branch=z9hG4bKbye;rport=5070;received=198.51.100.7")
        );
        bench.rests();
    }
}

/// Answers of the edge's own have the Call-ID that the client sent, too.
#[test]
fn an_answer_of_the_edges_own_has_the_call_id_that_was_asked_with() {
    let mut bench = Bench::new(options("stateful", "clients"), "", vec![backend(1, None)]);
    let mut id = b"swth-c".to_vec();
    TokenKeys::new(vec![[3; 16]]).cloak(b'c', b"id@secret", &mut id);
    let id = String::from_utf8(id).expect("letters");
    let cancel = request("CANCEL", &id, "");
    let said = bench.client(&cancel);
    assert_eq!(starts(&said), ["481"]);
    assert_eq!(header(&said[0].1, "Call-ID"), id);
    assert!(!said[0].1.contains("swth="), "{}", said[0].1);
    // And a Call-ID that only looks like one of ours is nobody's but the client's.
    let said = bench.client(&request("CANCEL", "swth-cAAAAAAAAAAAAAAA", ""));
    assert_eq!(header(&said[0].1, "Call-ID"), "swth-cAAAAAAAAAAAAAAA");
}

/// The other way: a carrier's instances do not learn who calls.
#[test]
fn instances_see_nothing_of_clients_if_told_so() {
    for mode in ["stateful", "stateless"] {
        let mut bench = Bench::new(options(mode, "instances"), "", vec![backend(1, None)]);
        let invite = request("INVITE", "id@198.51.100.7", "");
        let sent = bench.client(&invite);
        let got = sent.last().expect("it went on").clone();
        let without_own: String =
            got.1.lines().filter(|line| !line.starts_with("Record-Route")).collect();
        assert!(!without_own.contains("198.51.100.7"), "{without_own}");
        let back = bench.answers(&got, "200 OK", "Contact: <sip:bob@10.0.0.1>\r\n");
        let ok = &back.last().expect("it comes back").1;
        assert_eq!(header(ok, "Call-ID"), "id@198.51.100.7");
        assert_eq!(header(ok, "Contact"), "<sip:bob@10.0.0.1>", "clients see instances");
        assert_eq!(list(ok, "Via").len(), 1);
        bench.passes(std::time::Duration::from_secs(40));
    }
}

/// RFC 3891: a Call-ID in a Refer-To or Replaces is read as well, and escaped where it stands in a URI.
#[test]
fn call_ids_in_other_headers_are_read_where_they_come_back() {
    let keys = TokenKeys::new(vec![[3; 16]]);
    let mut word = b"swth-c".to_vec();
    keys.cloak(b'c', b"id@10.0.0.1", &mut word);
    let word = String::from_utf8(word).expect("letters");
    let text = request(
        "REFER",
        "c1",
        &format!(
            "Replaces: {word};to-tag=1;from-tag=2\r\nRefer-To: <sip:a@b?Replaces={word}%3Bto-tag%3D1>\r\n"
        ),
    );
    let (mut scan, mut out) = (Scan::default(), Vec::new());
    scan.scan(text.as_bytes()).expect("well-formed");
    assert_eq!(unmask(text.as_bytes(), &scan, &keys, &mut out).read, 2);
    let out = String::from_utf8(out).expect("text");
    assert_eq!(header(&out, "Replaces"), "id@10.0.0.1;to-tag=1;from-tag=2");
    assert_eq!(header(&out, "Refer-To"), "<sip:a@b?Replaces=id%4010.0.0.1%3Bto-tag%3D1>");
}

/// Nobody gets a word read by having it echoed: not in what answers repeat, and not by a request that goes
/// round to himself.
#[test]
fn words_are_not_read_for_who_carries_them() {
    let keys = TokenKeys::new(vec![[3; 16]]);
    let cloaked = |kind: u8, text: &str| {
        let mut word = format!("swth-{}", char::from(kind)).into_bytes();
        keys.cloak(kind, text.as_bytes(), &mut word);
        String::from_utf8(word).expect("letters")
    };
    let (uri, via) =
        (cloaked(b'u', "sip:bob@10.0.0.1:5070"), cloaked(b'v', "SIP/2.0/UDP 10.77.0.9"));
    let mut bench = Bench::new(options("stateful", "clients"), "", vec![backend(1, None)]);
    let more = format!(
        "Via: SIP/2.0/UDP 10.9.9.9:5060;branch=z9hG4bK{via}\r\nRecord-Route: <sip:{uri}@10.9.9.9:5060;lr>\r\nRoute: <sip:{uri}@10.9.9.9:5060;lr>\r\n"
    );
    let text = request("INVITE", "c1", &more)
        .replace("<sip:bob@example.net>", &format!("<sip:{uri}@10.9.9.9:5060>"))
        .replace("sip:bob@example.net SIP", &format!("sip:{uri}@10.9.9.9:5060 SIP"));
    let sent = bench.client(&text);
    for (to, text) in &sent {
        if remote(*to).to_string() == CLIENT {
            is_hidden(text);
        }
    }
    let invite = sent.last().expect("it went on").clone();
    assert!(invite.1.starts_with("INVITE sip:bob@10.0.0.1:5070 SIP/2.0\r\n"), "{}", invite.1);
    for line in ["180 Ringing", "486 Busy"] {
        let back = bench.answers(&invite, line, "");
        for (to, text) in back {
            if remote(to).to_string() == CLIENT {
                is_hidden(&text);
            }
        }
    }
    bench.rests();
    // He has registered, and knows the Path of his own flow.
    let register = request("REGISTER", "r", "Supported: path\r\n");
    let sent = bench.client(&register);
    let path = header(&sent[0].1, "Path").to_owned();
    bench.answers(&sent[0], "200 OK", "");
    let other = "198.51.100.9:5070".parse().expect("an address");
    let round = request("INVITE", "c2", &format!("Route: {path}\r\n"))
        .replace("sip:bob@example.net SIP", &format!("sip:{uri}@10.9.9.9:5060 SIP"));
    assert_eq!(starts(&bench.gets(other, &round)), ["403"]);
    // Without such a word it goes over the flow; and its answers are not read for the other one.
    let sent = bench.gets(other, &request("INVITE", "c3", &format!("Route: {path}\r\n")));
    let got =
        sent.iter().find(|(_, text)| text.starts_with("INVITE")).expect("over the flow").clone();
    let more = format!("Contact: <sip:{uri}@10.9.9.9:5060>\r\n");
    let back = bench.answers(&got, "302 Moved", &more);
    for (_, text) in back {
        is_hidden(&text);
    }
    bench.rests();
}

#[test]
fn registrations_keep_their_contacts_and_hide_the_service_route() {
    let mut bench = Bench::new(options("stateful", "clients"), "", vec![backend(1, None)]);
    let sent = bench.client(&request("REGISTER", "r1", ""));
    let more = format!(
        "Contact: <sip:alice@{CLIENT}>;expires=60\r\nService-Route: <sip:orig@10.0.0.1;lr>\r\n"
    );
    let back = bench.answers(&sent[0], "200 OK", &more);
    is_hidden(&back[0].1);
    assert_eq!(header(&back[0].1, "Contact"), format!("<sip:alice@{CLIENT}>;expires=60"));
    let route = header(&back[0].1, "Service-Route").to_owned();
    let sent = bench.client(&request("INVITE", "c1", &format!("Route: {route}\r\n")));
    let invite = sent.iter().find(|(_, text)| text.starts_with("INVITE")).expect("it went on");
    assert_eq!(header(&invite.1, "Route"), "<sip:orig@10.0.0.1;lr>");
    assert!(matches!(invite.0, Endpoint::Datagram { .. }));
}

fn value(kind: usize, user: &str, host: &str) -> String {
    match kind {
        0 => format!("<sip:{user}@{host}:5070;transport=tcp;lr>"),
        1 => format!("\"A, \\\" B\" <sips:{user}@{host}>;expires=3"),
        2 => format!("sip:{user}@{host};q=0.3"),
        3 => "*".to_owned(),
        4 => "<tel:+49123>".to_owned(),
        5 => format!("<sip:{host};lr>;x, <sip:{user}@[2001:db8::1]?a=b>"),
        _ => format!("\r\n\t<sip:{user}@{host}>\r\n  ;tag=1"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever a message looks like: hidden and read again it is the same, byte by byte.
    #[test]
    fn what_is_hidden_reads_back_byte_by_byte(
        lines in proptest::collection::vec((0usize..6, 0usize..7, "[a-z0-9._%-]{1,9}", "[a-z0-9.-]{1,9}[a-z]"), 0..12),
        call_id in "[!-~]{1,30}", method in 0usize..3, response: bool, transport in 0usize..3, own: bool,
    ) {
        let method = ["INVITE", "MESSAGE", "REGISTER"][method];
        let start = if response { "SIP/2.0 200 OK".to_owned() } else { format!("{method} sip:a@b SIP/2.0") };
        let mut text = format!("{start}\r\nVia: SIP/2.0/UDP 192.0.2.1;branch=z9hG4bKown\r\nCSeq: 1 {method}\r\ni : {call_id}\r\n");
        for (name, kind, user, host) in &lines {
            let value = value(*kind, user, host);
            text += &match name {
                0 => format!("Via: SIP/2.0/TCP {host}:5;branch=z9hG4bK{user};received=10.0.0.1, SIP/2.0/UDP x\r\n"),
                1 => format!("v:  SIP / 2.0 / UDP {host} ;rport\r\n"),
                2 => format!("Record-Route: {value}\r\n"),
                3 => format!("m:{value}\r\n"),
                4 => format!("Service-Route: {value}\r\n"),
                _ => format!("X-Other: {value}\r\n"),
            };
        }
        text += "\r\nswth-cbody";
        let keys = TokenKeys::new(vec![[9; 16], [1; 16]]);
        let transport = [Transport::Udp, Transport::Tcp, Transport::Tls][transport];
        let mask = Mask { keys: &keys, host: b"192.0.2.9:5060", transport, call_id: true };
        let (mut scan, mut hidden, mut back) = (Scan::default(), Vec::new(), Vec::new());
        prop_assume!(scan.scan(text.as_bytes()).is_ok());
        let changed = if response {
            mask_response(text.as_bytes(), &scan, Some(&mask), true, |uri| uri.host.len() % 2 == 0, &mut hidden)
        } else {
            mask_request(text.as_bytes(), &scan, own, &mask, &mut hidden)
        };
        if !changed {
            return Ok(());
        }
        scan.scan(&hidden).expect("a message still");
        let done = unmask_anywhere(&hidden, &scan, &keys, &mut back);
        prop_assert_eq!(String::from_utf8_lossy(&back), text);
        prop_assert_eq!(done.unreadable, 0);
        // And nobody else reads it.
        let strangers = TokenKeys::new(vec![[2; 16]]);
        prop_assert_eq!(unmask_anywhere(&hidden, &scan, &strangers, &mut back).read, 0);
    }
}
