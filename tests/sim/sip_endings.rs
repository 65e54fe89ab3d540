//! SIP, step by step: how calls end, and what becomes of answers that come late or to nobody.

use std::time::Duration;

use serde_json::json;
use strowger_contract::{CloseCause, Endpoint, Note, Transport};

use crate::sip_bench::{Bench, CLIENT, backend, header, request, starts, three};

#[test]
fn a_call_whose_bye_is_lost_ends_with_its_session_timer() {
    let mut bench = Bench::new(json!({"cdr": true}), "", vec![backend(1, None)]);
    let sent = bench.client(&request("INVITE", "c1", ""));
    let answered = bench.answers(&sent[1], "200 OK", "Session-Expires: 90;refresher=uac\r\n");
    assert_eq!(bench.held(), 1);
    assert_eq!(starts(&bench.client(&within("ACK", "c1", &answered[0].1, "callee"))), ["ACK"]);
    bench.passes(Duration::from_secs(121));
    bench.core.tick(bench.start + bench.at);
    assert_eq!(bench.held(), 1);
    bench.passes(Duration::from_secs(3));
    // A tick sweeps a part of the table.
    for _ in 0..20 {
        bench.core.tick(bench.start + bench.at);
    }
    assert_eq!(bench.held(), 0);
    let ended = bench.notes.iter().any(|note| {
        matches!(note, Note::Call(record) if record.end.is_some_and(|end| end.cause == "session_expired"))
    });
    assert!(ended);
    bench.rests();
}

/// A request of the caller's in the dialog with that answerer's tag.
fn within(method: &str, call: &str, answer: &str, tag: &str) -> String {
    let route = header(answer, "Record-Route");
    request(method, call, &format!("Route: {route}\r\n"))
        .replace("To: <sip:bob@example.net>", &format!("To: <sip:bob@example.net>;tag={tag}"))
        .replace("sip:bob@example.net SIP", "sip:bob@10.0.0.1 SIP")
}

fn causes(bench: &Bench) -> Vec<&'static str> {
    let ends = bench.notes.iter().filter_map(|note| match note {
        Note::Call(record) => record.end.map(|end| end.cause),
        _ => None,
    });
    ends.collect()
}

/// RFC 3261 13.3.1.4: the instance ends it with a BYE, or died before it could.
#[test]
fn a_call_whose_answer_nobody_acknowledges_is_over_after_64_t1() {
    let mut bench = Bench::new(json!({"cdr": true}), "", vec![backend(1, None)]);
    let sent = bench.client(&request("INVITE", "c1", ""));
    bench.answers(&sent[1], "200 OK", "");
    bench.passes(Duration::from_secs(31));
    assert_eq!((bench.held(), causes(&bench)), (1, vec![]));
    bench.passes(Duration::from_secs(2));
    assert_eq!((bench.held(), causes(&bench)), (0, vec!["never_acknowledged"]));
    bench.rests();
}

/// A hung instance answers as well when it wakes: its dialog's BYE ends that one and no other.
#[test]
fn the_bye_of_a_second_answer_gives_nothing_back_of_the_first_ones() {
    let mut bench = Bench::new(json!({"cdr": true}), "", three());
    let sent = bench.client(&request("INVITE", "c1", ""));
    let again = bench.passes(Duration::from_secs(3));
    let second = again.iter().find(|(to, text)| text.starts_with("INVITE") && *to != sent[1].0);
    let second = second.expect("another instance is tried").clone();
    let won = bench.answers(&second, "200 OK", "");
    assert_eq!(starts(&bench.client(&within("ACK", "c1", &won[0].1, "callee"))), ["ACK"]);
    let mut late = sent[1].clone();
    late.1 = late.1.replace("To: <sip:bob@example.net>", "To: <sip:bob@example.net>;tag=late");
    let other = bench.answers(&late, "200 OK", "");
    assert_eq!(starts(&other), ["200"]);
    let end = |bench: &mut Bench, answer: &str, tag: &str| {
        let bye = within("BYE", "c1", answer, tag).replace("-BYE;", &format!("-BYE{tag};"));
        let sent = bench.client(&bye);
        assert_eq!(starts(&bench.answers(&sent[0], "200 OK", "")), ["200"]);
    };
    end(&mut bench, &other[0].1, "late");
    assert_eq!((bench.held(), causes(&bench)), (1, vec!["bye"]), "it has a record of its own");
    end(&mut bench, &won[0].1, "callee");
    assert_eq!((bench.held(), causes(&bench)), (0, vec!["bye", "bye"]));
    bench.rests();
}

/// A call that its caller gives up before the ACK is one that ended.
#[test]
fn a_call_that_a_bye_ends_before_its_ack_was_not_left_unacknowledged() {
    let mut bench = Bench::new(json!({"cdr": true}), "", vec![backend(1, None)]);
    let sent = bench.client(&request("INVITE", "c1", ""));
    let answered = bench.answers(&sent[1], "200 OK", "");
    let sent = bench.client(&within("BYE", "c1", &answered[0].1, "callee"));
    assert_eq!(starts(&bench.answers(&sent[0], "200 OK", "")), ["200"]);
    bench.passes(Duration::from_secs(40));
    assert_eq!((bench.held(), causes(&bench)), (0, vec!["bye"]));
    assert!(!counted(&bench, "sip_calls_never_acknowledged"), "{:?}", bench.notes);
    bench.rests();
}

fn counted(bench: &Bench, what: &str) -> bool {
    bench.notes.iter().any(|note| matches!(note, Note::Count(counted) if *counted == what))
}

/// An instance wakes and answers what the client was told had failed: if the client takes the call, it is
/// one, with a slot and a record; if not, it is over when its ACK is.
#[test]
fn a_2xx_behind_our_own_answer_is_a_call() {
    for taken in [true, false] {
        let mut bench = Bench::new(json!({"cdr": true}), "", vec![backend(1, None)]);
        let sent = bench.client(&request("INVITE", "c1", ""));
        let told = bench.passes(Duration::from_millis(32_500));
        let refusals = told.iter().filter(|(_, text)| text.starts_with("SIP/2.0 408"));
        assert!(refusals.count() > 0, "{told:?}");
        assert_eq!((bench.held(), causes(&bench)), (0, vec!["timeout"]));
        let late = bench.answers(&sent[1], "200 OK", "");
        assert_eq!((starts(&late), bench.held()), (vec!["200".to_owned()], 1));
        assert_eq!(starts(&bench.answers(&sent[1], "200 OK", "")), ["200"], "13.3.1.4: repeated");
        let told = bench.passes(Duration::from_secs(5));
        assert!(!told.is_empty() && told.iter().all(|(_, text)| text.starts_with("SIP/2.0 408")));
        if !taken {
            bench.passes(Duration::from_secs(28));
            assert_eq!((bench.held(), causes(&bench)), (0, vec!["timeout", "never_acknowledged"]));
            bench.rests();
            continue;
        }
        assert_eq!(starts(&bench.client(&within("ACK", "c1", &late[0].1, "callee"))), ["ACK"]);
        bench.passes(Duration::from_secs(40));
        assert_eq!((bench.held(), causes(&bench)), (1, vec!["timeout"]));
        let sent = bench.client(&within("BYE", "c1", &late[0].1, "callee"));
        assert_eq!(starts(&bench.answers(&sent[0], "200 OK", "")), ["200"]);
        assert_eq!((bench.held(), causes(&bench)), (0, vec!["timeout", "bye"]));
        bench.rests();
    }
}

/// RFC 3261 18.2.2: the client's connection is gone before its answer.
#[test]
fn an_answer_over_a_lost_connection_goes_to_the_clients_own_port() {
    for transport in [Transport::Tcp, Transport::Tls] {
        let mut bench = Bench::new(json!({}), "", vec![backend(1, None)]);
        let peer =
            Endpoint::Client(strowger_contract::FlowId::new(strowger_contract::WorkerId(0), 1, 1));
        let text =
            request("INVITE", "c1", "").replace(&format!("UDP {CLIENT}"), "TCP 203.0.113.9:5999");
        let from = "198.51.100.7:40000".parse().expect("an address");
        let sent = bench.gets_over(peer, transport, from, &text);
        bench.closed(peer, CloseCause::End);
        let back = bench.answers(&sent[1], "486 Busy", "");
        let to =
            back.iter().find(|(_, text)| text.starts_with("SIP/2.0 486")).expect("an answer").0;
        let new = Endpoint::Remote {
            transport: Transport::Tcp,
            // Its Via's host is not believed.
            address: "198.51.100.7:5999".parse().expect("an address"),
        };
        assert_eq!(to, if transport == Transport::Tcp { new } else { peer });
        bench.rests();
    }
}

/// Many connections that are closed at once cost nobody his answer, also when one of a connection's
/// requests was over before.
#[test]
fn no_answer_is_lost_when_many_connections_are() {
    let mut bench = Bench::new(json!({}), "", vec![backend(1, None)]);
    let from = |number: u32| format!("198.51.100.7:{}", 40_000 + number).parse().expect("one");
    let peer = |number: u32| {
        Endpoint::Client(strowger_contract::FlowId::new(strowger_contract::WorkerId(0), number, 1))
    };
    let ask = |bench: &mut Bench, number: u32, call: &str| {
        let text = request("INVITE", call, "").replace(&format!("UDP {CLIENT}"), "TCP a.example");
        bench.gets_over(peer(number), Transport::Tcp, from(number), &text)[1].clone()
    };
    let mut open = Vec::new();
    for number in 0..200 {
        open.push(ask(&mut bench, number, &format!("a{number}")));
        let done = ask(&mut bench, number, &format!("b{number}"));
        bench.answers(&done, "486 Busy", "");
        open.push(ask(&mut bench, number, &format!("c{number}")));
    }
    for number in 0..200 {
        bench.closed(peer(number), CloseCause::End);
    }
    for invite in &open {
        let back = bench.answers(invite, "486 Busy", "");
        let (to, _) = back.iter().find(|(_, text)| text.starts_with("SIP/2.0 486")).expect("it");
        let address = "198.51.100.7:5060".parse().expect("an address");
        assert_eq!(*to, Endpoint::Remote { transport: Transport::Tcp, address });
    }
    // Instances that cannot be reached over it are looked for as they were.
    assert!(!counted(&bench, "sip_looks_left_out"));
    bench.rests();
}

/// A NOTIFY comes to the worker that passes the SUBSCRIBE's answer on, behind it.
#[test]
fn a_subscriptions_record_route_names_its_worker() {
    let mut bench = Bench::new(json!({}), "", vec![backend(1, None)]);
    for (method, named) in [("SUBSCRIBE", true), ("REFER", true), ("INVITE", true)] {
        let sent = bench.client(&request(method, method, ""));
        let out = sent.iter().find(|(_, text)| text.starts_with(method)).expect("it went on");
        assert_eq!(header(&out.1, "Record-Route").contains(";sw=00"), named, "{method}");
    }
}

/// The answer to a REFER and the NOTIFY behind it pass one worker, the one that had the INVITE.
#[test]
fn a_refer_within_a_call_goes_where_its_notify_goes() {
    let mut bench = Bench::new(json!({}), "", vec![backend(1, None)]);
    bench.workers = 2;
    bench.reload(json!({}));
    let sent = bench.client(&request("INVITE", "c1", ""));
    let answered = bench.answers(&sent[1], "200 OK", "Contact: <sip:bob@10.0.0.1>\r\n");
    let mine = answered[0].1.clone();
    let others = mine.replace(";sw=00", ";sw=01");
    assert_ne!(mine, others);
    let instance = || "10.0.0.1:5060".parse().expect("an address");
    let back = |text: String| {
        let text = text.replace("From: <sip:alice@example.net>;tag=a", "From: <sip:b>;tag=callee");
        let text = text.replace("To: <sip:bob@example.net>;tag=callee", "To: <sip:a>;tag=a");
        text.replace("sip:bob@10.0.0.1 SIP", &format!("sip:alice@{CLIENT} SIP"))
    };
    for (method, goes) in [("REFER", true), ("SUBSCRIBE", true), ("NOTIFY", true), ("INFO", false)]
    {
        let here = bench.client(&within(method, "c1", &mine, "callee"));
        assert_eq!((starts(&here), bench.handed.len()), (vec![method.to_owned()], 0));
        for from_instance in [false, true] {
            let text = within(method, "c1", &others, "callee").replace("z9hG4bK-", "z9hG4bK-o");
            let sent = if from_instance {
                bench.gets(instance(), &back(text.replace("z9hG4bK-", "z9hG4bK-i")))
            } else {
                bench.client(&text)
            };
            let handed = std::mem::take(&mut bench.handed);
            assert_eq!((sent.len(), handed.len()), if goes { (0, 1) } else { (1, 0) }, "{method}");
            assert!(handed.iter().all(|(to, _)| to.0 == 1), "{handed:?}");
        }
    }
}
