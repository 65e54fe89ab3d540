//! Which class a request falls into, from the configuration's text to what the engine does.

use std::net::SocketAddr;

use strowger_contract::{ClassId, Command, Endpoint};
use strowger_sip::Sip;

use crate::rig::Rig;

const CONFIG: &str = r#"
version: 1
node: { name: edge }
classes:
  gold: { tier: 0, deadline: 150ms }
  night: { tier: 3, deadline: 30s }
listeners:
  - name: sip
    protocol: sip
    bind: [udp://192.0.2.1:5060]
    pool: ims
    classify:
      - { match: { source: [203.0.113.0/24] }, class: bulk, even_carried: true }
      - { match: { uri_prefix: ["tel:112", "urn:service:counseling"] }, class: emergency }
      - { match: { header: { X-Tariff: gold }, in_dialog: false }, class: gold }
      - { match: { method: [INFO], in_dialog: true }, class: bulk }
      - { match: { method: [OPTIONS, SHAKE] }, class: mobility }
      - { match: { domain: [night.example.net], user_prefix: ["+800"] }, class: night }
pools:
  ims:
    backends: [{ id: a, address: "udp://10.0.0.1:5060" }]
"#;

fn udp(address: &str) -> Endpoint {
    Endpoint::Datagram { socket: 0, remote: address.parse().expect("an address") }
}

/// What it sends on to the instance: its class and its text.
fn sent_on(rig: &Rig<Sip>) -> Option<(ClassId, String)> {
    let instance: SocketAddr = ([10, 0, 0, 1], 5_060).into();
    rig.out.commands().iter().find_map(|command| match command {
        Command::Send(frame) if frame.to == Endpoint::Datagram { socket: 0, remote: instance } => {
            Some((frame.class, String::from_utf8_lossy(rig.out.bytes(&frame.bytes)).into_owned()))
        }
        _ => None,
    })
}

fn request(method: &str, uri: &str, to_tag: &str, more: &str, number: usize) -> String {
    format!(
        "{method} {uri} SIP/2.0\r\nVia: SIP/2.0/UDP 198.51.100.7:5070;branch=z9hG4bK{method}{number}\r\nMax-Forwards: 70\r\nFrom: <sip:a@example.net>;tag=f\r\nTo: <sip:b@example.net>{to_tag}\r\nCall-ID: c{number}\r\nCSeq: 1 {method}\r\nContact: <sip:a@198.51.100.7:5070>\r\n{more}Content-Length: 0\r\n\r\n"
    )
}

#[test]
fn rules_decide_by_method_uri_header_source_and_dialog_and_else_the_protocol() {
    let mut rig = Rig::<Sip>::new(CONFIG, 1);
    let gold = ClassId(6);
    let night = ClassId(7);
    let (near, far) = ("198.51.100.7:5070", "203.0.113.9:5070");
    let rph = "Resource-Priority: esnet.0\r\n";
    let tag = ";tag=t";
    for (number, (from, method, uri, to_tag, more, wanted)) in [
        (near, "INVITE", "sip:b@example.net", "", "", ClassId::SETUP),
        // A tag that anybody can write is no dialog: no token and no session speaks for it.
        (near, "INVITE", "sip:b@example.net", tag, "", ClassId::SETUP),
        (near, "INVITE", "tel:112;phone-context=x", "", "", ClassId::EMERGENCY),
        (near, "INVITE", "URN:service:counseling.mental", "", "", ClassId::EMERGENCY),
        (near, "INVITE", "sip:b@example.net", "", "X-Tariff: gold\r\n", gold),
        // Only what begins a dialog is gold by that rule.
        (near, "UPDATE", "sip:b@example.net", tag, "X-Tariff: gold\r\n", ClassId::IN_SESSION),
        (near, "INFO", "sip:b@example.net", tag, "", ClassId::BULK),
        (near, "INFO", "sip:b@example.net", "", "", ClassId::IN_SESSION),
        (near, "OPTIONS", "sip:b@example.net", "", "", ClassId::MOBILITY),
        (near, "SHAKE", "sip:b@example.net", "", "", ClassId::MOBILITY),
        (near, "INVITE", "sip:+80012@Night.example.net", "", "", night),
        (near, "INVITE", "sip:+70012@night.example.net", "", "", ClassId::SETUP),
        // What says of itself that it is an emergency is judged by rules that say so only.
        (near, "OPTIONS", "sip:b@example.net", "", rph, ClassId::EMERGENCY),
        (near, "INVITE", "urn:service:sos", "", "X-Tariff: gold\r\n", ClassId::EMERGENCY),
        (far, "INVITE", "urn:service:sos.fire", "", "", ClassId::BULK),
        (far, "REGISTER", "sip:example.net", "", rph, ClassId::BULK),
        (near, "REGISTER", "sip:example.net", "", "", ClassId::MOBILITY),
        // Never queued nor shed, whatever rules say.
        (far, "ACK", "sip:b@example.net", tag, "", ClassId::CONTROL),
    ]
    .into_iter()
    .enumerate()
    {
        rig.message(udp(from), request(method, uri, to_tag, more, number).as_bytes());
        let (class, _) = sent_on(&rig).unwrap_or_else(|| panic!("{method} {uri} went nowhere"));
        assert_eq!(class, wanted, "{method} {uri} {to_tag} {more}from {from}");
    }
}

#[test]
fn a_dialog_that_a_rule_made_an_emergency_stays_one_and_one_that_it_did_not_does_not_become_one() {
    let mut rig = Rig::<Sip>::new(CONFIG, 1);
    for (number, (from, uri, wanted)) in [
        ("198.51.100.7:5070", "tel:112", ClassId::EMERGENCY),
        ("203.0.113.9:5070", "urn:service:sos", ClassId::BULK),
    ]
    .into_iter()
    .enumerate()
    {
        rig.message(udp(from), request("INVITE", uri, "", "", 100 + number).as_bytes());
        let (class, text) = sent_on(&rig).expect("it goes on");
        assert_eq!(class, wanted);
        let record = text.lines().find(|line| line.starts_with("Record-Route:")).expect("one");
        let route = record.replace("Record-Route:", "Route:") + "\r\n";
        let bye = request("BYE", "sip:b@10.0.0.1:5060", ";tag=t", &route, 100 + number);
        rig.message(udp(from), bye.as_bytes());
        let (class, _) = sent_on(&rig).expect("the BYE goes on");
        assert_eq!(class, wanted, "BYE of {uri}");
    }
}

/// Where `in-session` is not the first tier, a dialog that a rule let begin in an earlier one stays there.
#[test]
fn a_dialog_keeps_the_tier_that_it_began_in() {
    let config = CONFIG
        .replace("classes:\n", "classes:\n  in-session: { tier: 2 }\n")
        .replace("gold: { tier: 0,", "gold: { tier: 1,");
    let mut rig = Rig::<Sip>::new(&config, 1);
    let from = udp("198.51.100.7:5070");
    let uri = "sip:b@example.net";
    for (number, (more, wanted)) in
        [("X-Tariff: gold\r\n", ClassId(6)), ("", ClassId::SETUP)].into_iter().enumerate()
    {
        rig.message(from, request("INVITE", uri, "", more, 200 + number).as_bytes());
        let (class, invite) = sent_on(&rig).expect("it goes on");
        assert_eq!(class, wanted);
        let answer = crate::sip_bench::answer(&invite, "200 OK", "");
        let answer = answer.replace(";tag=callee", ";tag=t");
        rig.message(udp("10.0.0.1:5060"), answer.as_bytes());
        let record = invite.lines().find(|line| line.starts_with("Record-Route:")).expect("one");
        let route = record.replace("Record-Route:", "Route:") + "\r\n";
        for method in ["UPDATE", "BYE"] {
            let later = request(method, "sip:b@10.0.0.1:5060", ";tag=t", &route, 200 + number);
            rig.message(from, later.as_bytes());
            let (class, _) = sent_on(&rig).expect("it goes on");
            assert_eq!(class, wanted, "{method}");
        }
        // A rule's word goes before it.
        let info = request("INFO", "sip:b@10.0.0.1:5060", ";tag=t", &route, 200 + number);
        rig.message(from, info.as_bytes());
        assert_eq!(sent_on(&rig).expect("it goes on").0, ClassId::BULK);
    }
}
