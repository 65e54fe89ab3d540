//! SIP, step by step: Path and Outbound (RFC 3327, 5626), and keep-alives.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::json;
use strowger_contract::{CloseCause, Endpoint, FlowId, Note, Transport, WorkerId};

use crate::sip_bench::{Bench, answer, backend, header, remote, starts};

/// Where a client behind a NAT seems to be.
const NATTED: &str = "203.0.113.9:40123";

fn register(call: &str, via: &str, more: &str) -> String {
    format!(
        "REGISTER sip:example.net SIP/2.0\r\n{via}Max-Forwards: 70\r\nFrom: <sip:bob@example.net>;tag=r\r\n\
         To: <sip:bob@example.net>\r\nCall-ID: {call}\r\nCSeq: 1 REGISTER\r\n{more}Content-Length: 0\r\n\r\n"
    )
}

fn via(transport: &str, branch: &str) -> String {
    format!("Via: SIP/2.0/{transport} 192.168.0.7:5060;branch=z9hG4bK{branch};rport\r\n")
}

const OUTBOUND: &str = "Supported: path, outbound\r\n\
    Contact: <sip:bob@192.168.0.7:5060>;reg-id=1;+sip.instance=\"<urn:uuid:0>\"\r\n";

/// The registrar's INVITE for the user.
fn invite(route: &str, call: &str) -> String {
    format!(
        "INVITE sip:bob@192.168.0.7:5060 SIP/2.0\r\nVia: SIP/2.0/UDP 10.0.0.1:5060;branch=z9hG4bK{call}\r\n\
         Route: {route}\r\nMax-Forwards: 69\r\nFrom: <sip:carol@example.net>;tag=c\r\nTo: <sip:bob@example.net>\r\n\
         Call-ID: {call}\r\nCSeq: 1 INVITE\r\nContact: <sip:carol@10.0.0.1>\r\nContent-Length: 0\r\n\r\n"
    )
}

fn natted() -> SocketAddr {
    NATTED.parse().expect("an address")
}

fn registrar() -> SocketAddr {
    SocketAddr::from(([10, 0, 0, 1], 5060))
}

fn counted(bench: &Bench, word: &str) -> usize {
    bench.notes.iter().filter(|note| matches!(note, Note::Count(known) if *known == word)).count()
}

fn path_of(sent: &[(Endpoint, String)]) -> String {
    let (_, text) = sent.iter().find(|(_, text)| text.starts_with("REGISTER")).expect("it went on");
    header(text, "Path").to_owned()
}

fn in_dialog(request: &str, to: &str, number: u32) -> String {
    let branch = format!("branch=z9hG4bKlater{number}");
    let start = request.find("branch=z9hG4bK").expect("a branch");
    let end = start + request[start..].find("\r\n").expect("an end");
    let text = format!("{}{branch}{}", &request[..start], &request[end..]);
    text.replace("To: <sip:bob@example.net>", to).replace("INVITE", "BYE")
}

/// Behind a NAT, over UDP: the flow is where the datagrams came from, in both modes, and also for the
/// dialog that it begins.
#[test]
fn what_is_for_a_registered_client_comes_back_over_its_flow() {
    for mode in ["stateful", "stateless"] {
        let mut bench = Bench::new(json!({"mode": mode}), "", vec![backend(1, None)]);
        let sent = bench.gets(natted(), &register("r1", &via("UDP", "r1"), OUTBOUND));
        let path = path_of(&sent);
        assert!(path.contains(";sf=u0000cb0071099cbb;ob;lr>"), "{path}");
        // The registrar's answer passes with its Service-Route (RFC 3608).
        let more = format!("Path: {path}\r\nService-Route: <sip:orig@10.0.0.1;lr>\r\n");
        let said = bench.answers(&sent[sent.len() - 1], "200 OK", &more);
        assert_eq!(header(&said[0].1, "Service-Route"), "<sip:orig@10.0.0.1;lr>");
        let asked = invite(&path, "i1");
        let sent = bench.gets(registrar(), &asked);
        let got = sent.last().expect("it went on").clone();
        assert_eq!(remote(got.0), natted(), "{mode}: not where its Contact says");
        assert!(got.1.starts_with("INVITE sip:bob@192.168.0.7:5060 SIP/2.0"), "{}", got.1);
        assert_eq!(header(&got.1, "Route"), "", "ours was taken off");
        let record = header(&got.1, "Record-Route").to_owned();
        assert!(record.contains(";sf=u0000cb0071099cbb;lr>"), "{record}");
        let ok = answer(&got.1, "200 OK", "Contact: <sip:bob@192.168.0.7:5060>\r\n");
        assert_eq!(starts(&bench.gets(natted(), &ok)), ["200"]);
        // The dialog's requests find it as well, and nobody else's token does.
        let bye =
            in_dialog(&asked, "To: <sip:bob@example.net>;tag=callee", 1).replace(&path, &record);
        let sent = bench.gets(registrar(), &bye);
        let went = sent.last().expect("it went on").clone();
        assert_eq!((remote(went.0), starts(&sent)[0].as_str()), (natted(), "BYE"), "{sent:?}");
        bench.gets(natted(), &answer(&went.1, "200 OK", ""));
        bench.rests();
    }
}

/// RFC 5626 5.3.2: what a client sends with its own flow in Route is its own request, also when it is sent
/// to a second instance, and also if it wants its answers at another port.
#[test]
fn a_clients_own_request_with_its_path_fails_over_like_any_other() {
    let mut bench = Bench::new(json!({}), "", (1..=2).map(|it| backend(it, None)).collect());
    let path = path_of(&bench.gets(natted(), &register("r1", &via("UDP", "r1"), OUTBOUND)));
    let asked = invite(&path, "i1").replace("10.0.0.1:5060;branch", "192.168.0.7:6000;branch");
    let sent = bench.gets(natted(), &asked);
    let first = sent.last().expect("it went on").clone();
    let next = bench.answers(&first, "503 No", "");
    assert_eq!(starts(&next), ["ACK", "INVITE"]);
    let second = next[1].clone();
    let hosts = [remote(first.0).ip().to_string(), remote(second.0).ip().to_string()];
    assert!(hosts[0] != hosts[1] && hosts.iter().all(|it| it.starts_with("10.0.0.")), "{hosts:?}");
    bench.answers(&second, "486 Busy", "");
    bench.rests();
}

/// RFC 5626 5.1: only the first hop has a flow and says `ob`; RFC 3327: only who knows it is asked for
/// it, unless all are.
#[test]
fn a_path_is_put_in_as_the_option_says() {
    let two = format!("{}Via: SIP/2.0/UDP 192.168.0.1;branch=z9hG4bKu\r\n", via("UDP", "q"));
    let plain = "Contact: <sip:bob@192.168.0.7:5060>\r\n";
    for (option, via, more, wanted) in [
        ("supported", via("UDP", "a"), OUTBOUND, Some(";ob;lr>")),
        ("supported", via("UDP", "b"), plain, None),
        ("supported", via("UDP", "c"), "k: path\r\n", Some(";ob;lr>")),
        ("always", via("UDP", "d"), plain, Some(";ob;lr>")),
        ("always", two, plain, Some("<sip:10.9.9.9:5060;lr>")),
        ("never", via("UDP", "e"), OUTBOUND, None),
    ] {
        let mut bench = Bench::new(json!({"path": option}), "", vec![backend(1, None)]);
        let path = path_of(&bench.gets(natted(), &register("r", &via, more)));
        assert!(
            path.ends_with(wanted.unwrap_or("")) && path.is_empty() == wanted.is_none(),
            "{path}"
        );
    }
    // One that listens elsewhere on purpose is told apart: no rport, and a Contact of its own.
    let mut bench = Bench::new(json!({"path": "always"}), "", vec![backend(1, None)]);
    let via = "Via: SIP/2.0/UDP 203.0.113.9:5060;branch=z9hG4bKf\r\n";
    let own = "Contact: <sip:bob@203.0.113.9:5060>\r\n";
    assert_eq!(path_of(&bench.gets(natted(), &register("r", via, own))), "<sip:10.9.9.9:5060;lr>");
}

fn over_tcp(bench: &mut Bench, flow: FlowId, call: &str) -> String {
    let text = register(call, &via("TCP", call), OUTBOUND);
    let sent = bench.gets_over(Endpoint::Client(flow), Transport::Tcp, natted(), &text);
    let path = path_of(&sent);
    bench.answers(&sent[sent.len() - 1], "200 OK", "");
    path
}

/// RFC 5626 5.3: a flow that is gone is told as such, at once; a token that somebody made up, or that
/// an earlier process signed, leads to nobody.
#[test]
fn a_dead_flow_gives_430() {
    let flow = FlowId::new(WorkerId(0), 5, 9);
    let mut bench = Bench::new(json!({}), "", vec![backend(1, None)]);
    let path = over_tcp(&mut bench, flow, "r1");
    assert!(path.contains(";sf=t") && path.ends_with(";ob;lr>"), "{path}");
    let sent = bench.gets(registrar(), &invite(&path, "i1"));
    assert_eq!(
        (starts(&sent), sent[1].0),
        (vec!["100".into(), "INVITE".into()], Endpoint::Client(flow))
    );
    // The runtime says that there is no such connection (any more).
    let told = bench.closed(Endpoint::Client(flow), CloseCause::End);
    assert_eq!(starts(&told), ["430"], "{told:?}");
    assert_eq!(remote(told[0].0), registrar());
    assert_eq!(counted(&bench, "sip_flows_failed"), 1);
    assert_eq!(bench.closed(Endpoint::Client(flow), CloseCause::End), [], "nothing waits any more");
    // Another's flow in place of its own.
    let forged = path.replacen(";sf=t0", ";sf=t1", 1);
    assert_ne!(forged, path);
    assert_eq!(starts(&bench.gets(registrar(), &invite(&forged, "i2"))), ["430"]);
    bench.rests();
    // The next process numbers its connections anew; its token keys may be the same.
    let mut later = Bench::started(2, json!({}), "", vec![backend(1, None)]);
    assert_eq!(starts(&later.gets(registrar(), &invite(&path, "i3"))), ["430"]);
    // An address outlives it.
    let sent = bench.gets(natted(), &register("r4", &via("UDP", "r4"), OUTBOUND));
    let path = path_of(&sent);
    let sent = later.gets(registrar(), &invite(&path, "i4"));
    assert_eq!((starts(&sent)[1].as_str(), remote(sent[1].0)), ("INVITE", natted()));
    // And is dead when the client's host says so.
    let peer = Endpoint::Datagram { socket: 0, remote: natted() };
    assert_eq!(starts(&later.closed(peer, CloseCause::Refused)), ["430"]);
    later.rests();
}

/// The client's own request with its Path preloaded is on its way out (RFC 5626 5.3.2).
#[test]
fn a_clients_own_request_over_its_flow_goes_to_the_pool() {
    let flow = FlowId::new(WorkerId(0), 5, 9);
    let mut bench = Bench::new(json!({}), "", vec![backend(1, None)]);
    let path = over_tcp(&mut bench, flow, "r1");
    let text = invite(&path, "o1").replace("UDP 10.0.0.1:5060", "TCP 192.168.0.7");
    let sent = bench.gets_over(Endpoint::Client(flow), Transport::Tcp, natted(), &text);
    assert_eq!(remote(sent[1].0), registrar(), "{sent:?}");
    bench.answers(&sent[1], "486 Busy", "");
    bench.rests();
}

/// RFC 5626 4.3: `ob` in a Contact asks for its dialog's requests over the flow, over UDP as well.
#[test]
fn a_contact_with_ob_gets_its_dialogs_requests_over_its_flow() {
    let mut bench = Bench::new(json!({}), "", vec![backend(1, None)]);
    let text = format!(
        "INVITE sip:carol@example.net SIP/2.0\r\n{}Max-Forwards: 70\r\nFrom: <sip:bob@example.net>;tag=b\r\n\
         To: <sip:carol@example.net>\r\nCall-ID: ob\r\nCSeq: 1 INVITE\r\n\
         Contact: <sip:bob@192.168.0.7:5060;ob>\r\nContent-Length: 0\r\n\r\n",
        via("UDP", "ob")
    );
    let sent = bench.gets(natted(), &text);
    let record = header(&sent[1].1, "Record-Route").to_owned();
    assert!(record.contains(";sf=u"), "{record}");
    bench.answers(&sent[1], "200 OK", "Contact: <sip:carol@10.0.0.1>\r\n");
    let bye = format!(
        "BYE sip:bob@192.168.0.7:5060;ob SIP/2.0\r\nVia: SIP/2.0/UDP 10.0.0.1:5060;branch=z9hG4bKbye\r\nRoute: {record}\r\n\
         Max-Forwards: 70\r\nFrom: <sip:carol@example.net>;tag=callee\r\nTo: <sip:bob@example.net>;tag=b\r\n\
         Call-ID: ob\r\nCSeq: 1 BYE\r\nContent-Length: 0\r\n\r\n"
    );
    let sent = bench.gets(registrar(), &bye);
    assert_eq!((remote(sent[0].0), starts(&sent)[0].as_str()), (natted(), "BYE"), "{sent:?}");
    bench.gets(natted(), &answer(&sent[0].1, "200 OK", ""));
    bench.rests();
}

/// RFC 5626 3.5.2, 8: STUN on the SIP port; line ends are nobody's message.
#[test]
fn keep_alives_of_datagrams_are_answered_or_taken() {
    let mut bench = Bench::new(json!({}), "", vec![backend(1, None)]);
    let stun = "\0\u{1}\0\0!\u{12}";
    assert_eq!(bench.gets(natted(), "\r\n\r\n"), []);
    assert_eq!(bench.gets(natted(), "\r\n"), []);
    assert_eq!(counted(&bench, "sip_keep_alives"), 2);
    assert_eq!(bench.gets(natted(), stun), [], "cut short");
    bench.passes(Duration::from_secs(1));
    assert_eq!(counted(&bench, "sip_stun_answers"), 0);
}
