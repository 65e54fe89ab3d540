//! SIP, step by step: calls, slots, fail-over, forks, rules.

use std::time::Duration;

use serde_json::json;
use strowger_contract::{
    AttemptOutcome, CallPhase, ClassId, CloseCause, Endpoint, Note, Transport,
};

use crate::sip_bench::{Bench, CLIENT, answer, backend, header, remote, request, starts, three};

#[test]
fn a_call_holds_a_slot_from_its_2xx_to_its_bye_and_is_recorded() {
    let mut bench = Bench::new(json!({"cdr": true}), "", vec![backend(1, Some(1))]);
    let sent = bench.client(&request("INVITE", "c1", ""));
    assert_eq!(starts(&sent), ["100", "INVITE"]);
    let invite = sent[1].clone();
    assert_eq!(starts(&bench.answers(&invite, "180 Ringing", "")), ["180"]);
    assert_eq!(bench.held(), 0);
    let answered = bench.answers(&invite, "200 OK", "Contact: <sip:bob@10.0.0.1>\r\n");
    assert_eq!(starts(&answered), ["200"]);
    assert_eq!(bench.held(), 1);
    assert_eq!(starts(&bench.answers(&invite, "200 OK", "")), ["200"], "13.3.1.4: repeated");
    assert_eq!(bench.held(), 1, "and counted once");
    // The one slot is taken: the next waits, is silent to repetitions, and may be withdrawn.
    assert_eq!(starts(&bench.client(&request("INVITE", "c2", ""))), ["100"]);
    assert_eq!(starts(&bench.client(&request("INVITE", "c2", ""))), ["100"]);
    let cancel = request("INVITE", "c2", "").replacen("INVITE", "CANCEL", 1);
    let ended = bench.client(&cancel.replacen("1 INVITE", "1 CANCEL", 1));
    assert_eq!(starts(&ended), ["200", "487"]);
    // One that waits too long is told so in time.
    assert_eq!(starts(&bench.client(&request("INVITE", "c3", ""))), ["100"]);
    let late = bench.passes(Duration::from_millis(510));
    let told = late.iter().find(|(_, text)| text.starts_with("SIP/2.0 503"));
    assert!(told.is_some_and(|(_, text)| text.contains("Retry-After")), "{late:?}");
    // And one goes as soon as the call is over.
    assert_eq!(starts(&bench.client(&request("INVITE", "c4", ""))), ["100"]);
    let route = header(&answered[0].1, "Record-Route").to_owned();
    let bye = request("BYE", "c1", &format!("Route: {route}\r\n"))
        .replace("To: <sip:bob@example.net>", "To: <sip:bob@example.net>;tag=callee")
        .replace("BYE sip:bob@example.net", "BYE sip:bob@10.0.0.1");
    let sent = bench.client(&bye);
    assert_eq!(starts(&sent), ["BYE"], "{sent:?}");
    let ended = bench.answers(&sent[0], "200 OK", "");
    assert_eq!(starts(&ended), ["200", "INVITE"]);
    bench.answers(&ended[1], "486 Busy", "");
    assert_eq!(bench.held(), 0);
    let phases: Vec<_> = bench
        .notes
        .iter()
        .filter_map(|note| match note {
            Note::Call(record) if &*record.call_id == b"c1" => {
                Some((record.phase, record.end.map(|end| end.cause)))
            }
            _ => None,
        })
        .collect();
    assert_eq!(
        phases,
        [(CallPhase::Began, None), (CallPhase::Answered, None), (CallPhase::Ended, Some("bye"))]
    );
    bench.rests();
}

/// The slot of the INVITE becomes the call's: whoever waits does not get it in between.
#[test]
fn a_call_that_is_answered_keeps_its_slot_from_those_who_wait() {
    let mut bench = Bench::new(json!({}), "", vec![backend(1, Some(1))]);
    let sent = bench.client(&request("INVITE", "c1", ""));
    assert_eq!(starts(&sent), ["100", "INVITE"]);
    assert_eq!(starts(&bench.client(&request("INVITE", "c2", ""))), ["100"], "it waits");
    let answered = bench.answers(&sent[1].clone(), "200 OK", "Contact: <sip:bob@10.0.0.1>\r\n");
    assert_eq!(starts(&answered), ["200"], "{answered:?}");
    assert_eq!(bench.held(), 1);
}

/// Not all who were refused come back in the same second.
#[test]
fn retry_after_is_spread() {
    let mut bench = Bench::new(json!({}), "", vec![backend(1, Some(1))]);
    let mut heard = std::collections::BTreeMap::<String, u32>::new();
    for number in 0..60 {
        for (_, text) in bench.client(&request("INVITE", &format!("c{number}"), "")) {
            if text.starts_with("SIP/2.0 503") {
                *heard.entry(header(&text, "Retry-After").to_owned()).or_default() += 1;
            }
        }
        for (_, text) in bench.passes(Duration::from_millis(20)) {
            if text.starts_with("SIP/2.0 503") {
                *heard.entry(header(&text, "Retry-After").to_owned()).or_default() += 1;
            }
        }
    }
    let waits: Vec<&str> = heard.keys().map(String::as_str).collect();
    assert_eq!(waits, ["1", "2"], "{heard:?}");
    assert!(heard.values().all(|count| *count > 5), "{heard:?}");
}

/// DESIGN 5: an emergency session stays one to its end, whichever side speaks, whatever it carries.
#[test]
fn an_emergency_call_stays_one_by_its_token() {
    for mode in ["stateful", "stateless"] {
        let urgent = "Resource-Priority: esnet.0\r\n";
        for (more, wanted) in [(urgent, ClassId::EMERGENCY), ("", ClassId::IN_SESSION)] {
            let mut bench = Bench::new(json!({"mode": mode}), "", vec![backend(1, None)]);
            let sent = bench.client(&request("INVITE", "c1", more));
            let invite = sent.last().expect("it went on").clone();
            let answered = bench.answers(&invite, "200 OK", "Contact: <sip:bob@10.0.0.1>\r\n");
            let route = header(&answered[0].1, "Record-Route").to_owned();
            let within = |method: &str| {
                request(method, "c1", &format!("Route: {route}\r\n"))
                    .replace("To: <sip:bob@example.net>", "To: <sip:bob@example.net>;tag=callee")
                    .replace("sip:bob@example.net SIP", "sip:bob@10.0.0.1 SIP")
            };
            // Its own words say nothing of an emergency any more.
            let sent = bench.client(&within("INFO"));
            assert_eq!((starts(&sent), bench.class), (vec!["INFO".to_owned()], wanted), "{mode}");
            let sent = bench.client(&within("UPDATE"));
            assert_eq!((starts(&sent), bench.class), (vec!["UPDATE".to_owned()], wanted), "{mode}");
            // And the refreshed Record-Route carries it on.
            if let Some(again) = sent.first().filter(|(_, text)| text.contains("Record-Route")) {
                let route = header(&again.1, "Record-Route").to_owned();
                let info = within("INFO").replace("-INFO;", "-INFO2;");
                let info = info.lines().map(|line| match line.strip_prefix("Route: ") {
                    Some(_) => format!("Route: {route}\r\n"),
                    None => format!("{line}\r\n"),
                });
                bench.client(&info.collect::<String>());
                assert_eq!(bench.class, wanted, "{mode}");
            }
            // The callee hangs up.
            let bye = within("BYE")
                .replace(
                    "From: <sip:alice@example.net>;tag=a",
                    "From: <sip:bob@example.net>;tag=callee",
                )
                .replace(
                    "To: <sip:bob@example.net>;tag=callee",
                    "To: <sip:alice@example.net>;tag=a",
                )
                .replace("sip:bob@10.0.0.1 SIP", &format!("sip:alice@{CLIENT} SIP"));
            let sent = bench.gets(remote(invite.0), &bye);
            assert_eq!((starts(&sent), bench.class), (vec!["BYE".to_owned()], wanted), "{mode}");
        }
    }
}

#[test]
fn parallel_forks_ring_together_and_the_first_2xx_wins() {
    let mut bench = Bench::new(json!({"fork": "parallel", "fork_targets": 3}), "", three());
    let sent = bench.client(&request("INVITE", "c1", "Max-Breadth: 9\r\n"));
    assert_eq!(starts(&sent), ["100", "INVITE", "INVITE", "INVITE"]);
    assert!(sent[1..].iter().all(|(_, text)| header(text, "Max-Breadth") == "3"), "{sent:?}");
    let to: std::collections::HashSet<_> = sent[1..].iter().map(|(to, _)| remote(*to)).collect();
    assert_eq!(to.len(), 3);
    for leg in &sent[1..3] {
        assert_eq!(starts(&bench.answers(leg, "180 Ringing", "")), ["180"]);
    }
    let won = bench.answers(&sent[1], "200 OK", "");
    let mut kinds = starts(&won);
    kinds.sort();
    assert_eq!(kinds, ["200", "CANCEL"], "the one that rings is cancelled at once");
    assert_eq!(
        starts(&bench.answers(&sent[3], "180 Ringing", "")),
        ["CANCEL"],
        "and the other when it does"
    );
    assert_eq!(starts(&bench.answers(&sent[2], "487 Gone", "")), ["ACK"]);
    assert_eq!(starts(&bench.answers(&sent[3], "487 Gone", "")), ["ACK"]);
    bench.rests();
}

#[test]
fn of_forks_that_refuse_the_best_answer_goes_back_with_all_challenges() {
    for (codes, expected) in [
        (["404 No", "503 Busy", "486 Busy"], "404"),
        (["503 No", "500 No", "408 No"], "408"),
        (["486 Busy", "401 Who", "407 Who"], "401"),
        (["302 Moved", "404 No", "500 No"], "302"),
    ] {
        let options = json!({"fork": "parallel", "fork_targets": 3, "failover_codes": []});
        let mut bench = Bench::new(options, "", three());
        let sent = bench.client(&request("INVITE", "c1", ""));
        let mut last = Vec::new();
        for (leg, code) in sent[1..].iter().zip(codes) {
            let challenge = format!("WWW-Authenticate: Digest realm=\"{code}\"\r\n");
            last = bench.answers(leg, code, &challenge);
        }
        assert_eq!(starts(&last), ["ACK", expected], "{codes:?}");
        if expected == "401" {
            assert_eq!(last[1].1.matches("WWW-Authenticate").count(), 2, "{}", last[1].1);
        }
        bench.rests();
    }
}

/// All challenges go out as each would alone: by the operator's rules, and before the empty line.
#[test]
fn challenges_of_several_forks_pass_the_header_rules() {
    let rule = json!({"on": "response", "towards": "clients", "remove": ["Proxy-Authenticate"]});
    for (rules, wanted) in [(json!([]), 2), (json!([rule]), 0)] {
        let options = json!({"fork": "parallel", "fork_targets": 2, "header_rules": rules});
        let mut bench = Bench::new(options, "", three());
        let sent = bench.client(&request("INVITE", "c1", ""));
        let mut last = Vec::new();
        for (leg, realm) in sent[1..].iter().zip(["a", "b"]) {
            let challenge = format!("Proxy-Authenticate: Digest realm=\"{realm}\"\r\n");
            // Who ends lines by a LF alone is heard as well.
            let text = answer(&leg.1, "407 Who", &challenge).replace("\r\n", "\n");
            last = bench.gets(remote(leg.0), &text);
        }
        assert_eq!(starts(&last), ["ACK", "407"]);
        let (head, body) = last[1].1.split_once("\n\n").expect("an empty line");
        assert_eq!((head.matches("Proxy-Authenticate").count(), body), (wanted, ""), "{head}");
        bench.rests();
    }
}

#[test]
fn a_6xx_ends_the_others_and_serial_forks_go_on_until_one_answers() {
    let mut bench = Bench::new(json!({"fork": "parallel", "fork_targets": 2}), "", three());
    let sent = bench.client(&request("INVITE", "c1", ""));
    bench.answers(&sent[1], "180 Ringing", "");
    let after = bench.answers(&sent[2], "603 Decline", "");
    assert_eq!(starts(&after), ["ACK", "CANCEL"]);
    assert_eq!(starts(&bench.answers(&sent[1], "487 Gone", "")), ["ACK", "603"]);
    bench.rests();

    let mut bench = Bench::new(json!({"fork": "serial", "fork_targets": 3}), "", three());
    let sent = bench.client(&request("INVITE", "c2", ""));
    let second = bench.answers(&sent[1], "486 Busy", "");
    assert_eq!(starts(&second), ["ACK", "INVITE"]);
    let third = bench.answers(&second[1], "404 No", "");
    assert_eq!(starts(&third), ["ACK", "INVITE"]);
    assert_eq!(starts(&bench.answers(&third[1], "200 OK", "")), ["200"]);
    bench.rests();
}

#[test]
fn redirections_are_followed_best_first_and_only_when_wanted() {
    let moved = "Contact: <sip:c@192.0.2.1>;q=0.5, <sip:d@192.0.2.2>\r\n";
    let mut bench = Bench::new(json!({}), "", three());
    let sent = bench.client(&request("INVITE", "c1", ""));
    assert_eq!(starts(&bench.answers(&sent[1], "302 Moved", moved)), ["ACK", "302"]);
    let mut bench = Bench::new(json!({"recurse": true}), "", three());
    let sent = bench.client(&request("INVITE", "c1", ""));
    let first = bench.answers(&sent[1], "302 Moved", moved);
    assert!(first[1].1.starts_with("INVITE sip:d@192.0.2.2 SIP/2.0"), "{first:?}");
    let second = bench.answers(&first[1], "486 Busy", "");
    assert!(second[1].1.starts_with("INVITE sip:c@192.0.2.1 SIP/2.0"), "{second:?}");
    assert_eq!(starts(&bench.answers(&second[1], "200 OK", "")), ["200"]);
    bench.rests();
}

#[test]
fn an_instance_that_asks_for_five_minutes_rests_briefly_and_never_are_all_out() {
    let mut bench = Bench::new(json!({"retry_after_max": "5s"}), "", three());
    let mut sent = bench.client(&request("INVITE", "c1", ""));
    sent.remove(0);
    for _ in 0..3 {
        let next = bench.answers(&sent[0], "503 No", "Retry-After: 300\r\n");
        assert_eq!(starts(&next)[0], "ACK");
        sent = next[1..].to_vec();
    }
    assert_eq!(starts(&sent), ["500"], "a 503 of an instance is not the client's (16.7 step 6)");
    // All three asked for a rest, and still somebody is asked.
    let again = bench.client(&request("INVITE", "c2", ""));
    assert_eq!(starts(&again), ["100", "INVITE"]);
    bench.rests();
}

#[test]
fn a_hung_instance_costs_one_call_and_then_gets_one_at_a_time() {
    let mut bench = Bench::new(json!({}), "", three());
    // It is known how long they take: a millisecond.
    for call in 0..60 {
        let sent = bench.client(&request("INVITE", &format!("w{call}"), ""));
        bench.at += Duration::from_millis(1);
        bench.answers(&sent[1], "486 Busy", "");
    }
    bench.passes(Duration::from_secs(40));
    let first = bench.client(&request("INVITE", "h0", ""));
    let hung = remote(first[1].0);
    let after = bench.passes(Duration::from_millis(250));
    let moved: Vec<_> = after
        .iter()
        .filter(|(to, text)| text.starts_with("INVITE") && remote(*to) != hung)
        .collect();
    assert_eq!(moved.len(), 1, "within a quarter of a second another has it: {after:?}");
    let mut at_hung = 0;
    for call in 0..100 {
        let sent = bench.client(&request("INVITE", &format!("h{call}x"), ""));
        at_hung += u32::from(remote(sent[1].0) == hung);
    }
    assert_eq!(at_hung, 0);
    bench.rests();
}

#[test]
fn an_unreachable_address_fails_over_at_once() {
    let mut bench = Bench::new(json!({}), "", three());
    let sent = bench.client(&request("INVITE", "c1", ""));
    let next = bench.closed(sent[1].0, CloseCause::Refused);
    assert_eq!(starts(&next), ["INVITE"]);
    assert_ne!(remote(next[0].0), remote(sent[1].0));
    assert_eq!(starts(&bench.answers(&next[0], "200 OK", "")), ["200"]);
    bench.rests();
}

#[test]
fn large_requests_go_over_tcp_and_as_datagrams_where_that_is_refused() {
    let mut bench = Bench::new(json!({}), "", three());
    let big = format!("X-Big: {}\r\n", "x".repeat(1_400));
    let sent = bench.client(&request("INVITE", "c1", &big));
    let Endpoint::Remote { transport: Transport::Tcp, address } = sent[1].0 else {
        panic!("{:?}", sent[1].0)
    };
    assert!(sent[1].1.contains("Via: SIP/2.0/TCP 10.9.9.9:5060"), "{}", sent[1].1);
    let again = bench.closed(sent[1].0, CloseCause::Refused);
    assert_eq!(again[0].0, Endpoint::Datagram { socket: 0, remote: address });
    assert!(again[0].1.contains("Via: SIP/2.0/UDP 10.9.9.9:5060"));
    assert_eq!(starts(&bench.answers(&again[0], "200 OK", "")), ["200"]);
    let next = bench.client(&request("INVITE", "c1b", &big).replace("Call-ID: c1b", "Call-ID: c1"));
    assert_eq!(next[1].0, again[0].0, "for a while nothing else is tried");
    bench.rests();
}

#[test]
fn calls_of_one_key_stay_together_also_when_they_fail_over() {
    for (key, more) in [
        ("from", ""),
        ("ruri-user", ""),
        ("source", ""),
        ("header:X-Tenant", "X-Tenant: t1\r\n"),
        ("auth-user", "Proxy-Authorization: Digest username=\"u1\", realm=\"x\"\r\n"),
    ] {
        let mut bench =
            Bench::new(json!({}), key, (1..=8).map(|number| backend(number, None)).collect());
        let (mut first, mut second) =
            (std::collections::HashSet::new(), std::collections::HashSet::new());
        for call in 0..12 {
            let sent = bench.client(&request("MESSAGE", &format!("k{call}"), more));
            first.insert(remote(sent[0].0));
            let next = bench.answers(&sent[0], "503 No", "");
            second.insert(remote(next[0].0));
            bench.answers(&next[0], "200 OK", "");
        }
        assert_eq!((first.len(), second.len()), (1, 1), "{key}");
    }
}

#[test]
fn a_registered_user_is_called_where_the_registration_is() {
    let options = json!({"aor_affinity": true});
    let mut bench = Bench::new(options, "", (1..=8).map(|number| backend(number, None)).collect());
    let register = request("REGISTER", "r1", "Expires: 600\r\n");
    let sent = bench.client(&register);
    let home = remote(sent[0].0);
    bench.answers(&sent[0], "200 OK", "Contact: <sip:bob@192.0.2.9>;expires=300\r\n");
    for call in 0..10 {
        let sent = bench.client(&request("MESSAGE", &format!("m{call}"), ""));
        assert_eq!(remote(sent[0].0), home);
        bench.answers(&sent[0], "200 OK", "");
    }
    bench.passes(Duration::from_secs(301));
    let homes: std::collections::HashSet<_> = (0..10)
        .map(|call| remote(bench.client(&request("MESSAGE", &format!("n{call}"), ""))[0].0))
        .collect();
    assert!(homes.len() > 1, "it is forgotten with the binding");
    bench.rests();
}

#[test]
fn a_loop_is_told_from_a_spiral() {
    let mut bench = Bench::new(json!({}), "", three());
    let sent = bench.client(&request("MESSAGE", "c1", ""));
    // The instance sends it back as it came, but for its own Via.
    let looped =
        sent[0].1.replacen("Via:", "Via: SIP/2.0/UDP 10.0.0.1:5060;branch=z9hG4bK-x1\r\nVia:", 1);
    let answered = bench.gets(remote(sent[0].0), &looped);
    assert_eq!(starts(&answered), ["482"]);
    let spiral = looped
        .replacen("MESSAGE sip:bob@example.net", "MESSAGE sip:carol@10.9.9.9", 1)
        .replace("x1", "x2");
    let passed = bench.gets(remote(sent[0].0), &spiral);
    assert_eq!(starts(&passed), ["MESSAGE"], "{passed:?}");
}

#[test]
fn scanners_floods_and_the_unlisted_hear_nothing_and_peers_are_spared() {
    let options = json!({
        "access": {"deny": ["203.0.113.0/24"]},
        "peers": ["192.0.2.0/24"],
        "limits": {
            "per_source": {"per_second": 1, "burst": 2},
            "per_method": {"SUBSCRIBE": {"per_second": 1, "burst": 1}}
        }
    });
    let mut bench = Bench::new(options, "", three());
    assert_eq!(bench.client(&request("OPTIONS", "s1", "User-Agent: Friendly-Scanner\r\n")), []);
    assert_eq!(
        bench.gets("203.0.113.5:5060".parse().expect("an address"), &request("OPTIONS", "s2", "")),
        []
    );
    let from = |bench: &mut Bench, ip: &str, call: String| {
        starts(&bench.gets(ip.parse().expect("an address"), &request("MESSAGE", &call, "")))
    };
    let many: Vec<_> = (0..4).map(|call| from(&mut bench, CLIENT, format!("l{call}"))).collect();
    assert_eq!(many, [["MESSAGE"], ["MESSAGE"], ["503"], ["503"]]);
    for call in 0..20 {
        assert_eq!(from(&mut bench, "192.0.2.1:5060", format!("p{call}")), ["MESSAGE"]);
    }
    let sos = request("MESSAGE", "e1", "").replacen("sip:bob@example.net", "urn:service:sos", 1);
    assert_eq!(starts(&bench.client(&sos)), ["MESSAGE"], "emergencies are never limited");
    let subscribe = |bench: &mut Bench, call: &str| {
        let from = "192.0.2.1:5060".parse().expect("an address");
        starts(&bench.gets(from, &request("SUBSCRIBE", call, "")))
    };
    assert_eq!(subscribe(&mut bench, "u1"), ["SUBSCRIBE"]);
    assert_eq!(subscribe(&mut bench, "u2"), ["503"]);
}

#[test]
fn rules_and_trust_change_what_they_say_and_nothing_else() {
    let options = json!({
        "trusted": ["192.0.2.0/24"],
        "header_rules": [{"towards": "instances", "set": {"X-Edge": "${source_ip}"}}]
    });
    let mut bench = Bench::new(options, "", three());
    let identity = "P-Asserted-Identity: <sip:boss@example.net>\r\nIdentity: eyJhbGci\r\n";
    let sent = bench.client(&request("INVITE", "c1", identity));
    assert!(!sent[1].1.contains("P-Asserted"), "{}", sent[1].1);
    assert!(
        sent[1].1.contains("Identity: eyJhbGci\r\n")
            && sent[1].1.contains("X-Edge: 198.51.100.7\r\n")
    );
    let peer = "192.0.2.1:5060".parse().expect("an address");
    let sent = bench.gets(peer, &request("INVITE", "c2", identity));
    assert!(sent[1].1.contains("P-Asserted-Identity: <sip:boss@example.net>\r\n"));
}

#[test]
fn attempts_are_counted_by_how_they_came_out() {
    let mut bench = Bench::new(json!({}), "", three());
    for (call, line) in [("a1", "200 OK"), ("a2", "486 Busy"), ("a3", "500 No")] {
        let sent = bench.client(&request("INVITE", call, ""));
        bench.answers(&sent[1], line, "");
    }
    let sent = bench.client(&request("INVITE", "a4", ""));
    bench.answers(&sent[1], "180 Ringing", "");
    let cancel = request("INVITE", "a4", "")
        .replacen("INVITE", "CANCEL", 1)
        .replacen("1 INVITE", "1 CANCEL", 1);
    let cancelled = bench.client(&cancel);
    assert_eq!(starts(&cancelled), ["200", "CANCEL"]);
    bench.answers(&sent[1], "487 Gone", "");
    let outcomes: Vec<_> = bench
        .notes
        .iter()
        .filter_map(|note| match note {
            Note::Attempt { outcome, post_dial, .. } => Some((*outcome, post_dial.is_some())),
            _ => None,
        })
        .collect();
    assert_eq!(
        outcomes,
        [
            (AttemptOutcome::Answered, true),
            (AttemptOutcome::Unanswered, false),
            (AttemptOutcome::Failed, false),
            (AttemptOutcome::Cancelled, true)
        ]
    );
    bench.rests();
}

/// RFC 3261 17.1.3: an answer is one to a request if it has its whole branch and its method. The numbers in
/// a branch can be guessed from any other; its signature cannot.
#[test]
fn answers_with_a_guessed_branch_or_another_method_are_nobodys() {
    let mut bench = Bench::new(json!({}), "", vec![backend(1, None)]);
    let sent = bench.client(&request("INVITE", "c1", ""));
    let invite = sent.last().expect("it went on").clone();
    let stranger: std::net::SocketAddr = "192.0.2.66:4444".parse().expect("an address");
    let good = answer(&invite.1, "200 OK", "");
    let branch = header(&invite.1, "Via").split("branch=").nth(1).expect("a branch").to_owned();
    let mut guessed = branch.clone().into_bytes();
    let last = guessed.last_mut().expect("a byte");
    *last = if *last == b'A' { b'B' } else { b'A' };
    let guessed = String::from_utf8(guessed).expect("text");
    for forged in [good.replace(&branch, &guessed), good.replace("INVITE\r\n", "UPDATE\r\n")] {
        assert!(bench.gets(stranger, &forged).is_empty(), "it passed: {forged}");
    }
    let dropped = bench.notes.iter().filter(|note| format!("{note:?}").contains("response_forged"));
    assert_eq!(dropped.count(), 2, "{:?}", bench.notes);
    let answered = bench.gets(stranger, &good);
    assert_eq!(starts(&answered), ["200"], "the whole branch is what counts");
}

/// A method that only ends like another is another.
#[test]
fn the_answer_to_a_method_that_ends_in_cancel_comes_back() {
    let mut bench = Bench::new(json!({}), "", vec![backend(1, None)]);
    let sent = bench.client(&request("XCANCEL", "c1", ""));
    let answered = bench.answers(sent.last().expect("it went on"), "200 OK", "");
    assert_eq!(starts(&answered), ["200"]);
}

/// A client that has a dialog and swaps its tags looks like the other side. It reaches the instance with
/// that, which knows no such dialog, and nobody else.
#[test]
fn a_client_that_swaps_its_tags_is_no_instance() {
    let trusted = json!({"trusted": ["10.0.0.0/8"]});
    let mut bench = Bench::new(trusted, "", vec![backend(1, None)]);
    let sent = bench.client(&request("INVITE", "c1", ""));
    let answered = bench.answers(sent.last().expect("it went on"), "200 OK", "");
    let route = header(&answered[0].1, "Record-Route").to_owned();
    let swapped = |call: &str| {
        request(
            "MESSAGE",
            call,
            &format!("Route: {route}\r\nP-Asserted-Identity: <sip:boss@x>\r\n"),
        )
        .replace("sip:bob@example.net SIP", "sip:victim@203.0.113.9:5060 SIP")
        .replace("From: <sip:alice@example.net>;tag=a", "From: <sip:alice@example.net>;tag=x")
        .replace("To: <sip:bob@example.net>", "To: <sip:bob@example.net>;tag=a")
    };
    let sent = bench.client(&swapped("c1"));
    assert_eq!(starts(&sent), ["MESSAGE"]);
    assert_eq!(remote(sent[0].0).to_string(), "10.0.0.1:5060", "{sent:?}");
    assert!(!sent[0].1.contains("P-Asserted-Identity"), "it asserts: {}", sent[0].1);
    // From another port of the instance it is the instance's.
    let from = "10.0.0.1:40000".parse().expect("an address");
    let again = swapped("c1").replace("-MESSAGE", "-MESSAGE-2");
    let sent = bench.gets(from, &again);
    assert_eq!(remote(sent[0].0).to_string(), "203.0.113.9:5060", "{sent:?}");
}

/// What spares a request from limits is a dialog that the edge knows, not a tag that anybody can write; and
/// a Resource-Priority counts from those whom `trusted` lists.
#[test]
fn a_tag_or_a_header_alone_spares_nobody_from_limits() {
    let options = json!({
        "limits": {"per_source": {"per_second": 1, "burst": 1}},
        "trusted": ["10.0.0.0/8"],
    });
    let made_up = |number: u32, to: &str, more: &str| {
        request("MESSAGE", &format!("m{number}"), more)
            .replace("To: <sip:bob@example.net>", &format!("To: <sip:bob@example.net>{to}"))
    };
    for (to, more) in [(";tag=q", ""), ("", "Resource-Priority: esnet.0\r\n")] {
        let mut bench = Bench::new(options.clone(), "", vec![backend(1, None)]);
        let passed = (0..20)
            .filter(|&number| starts(&bench.client(&made_up(number, to, more))) == ["MESSAGE"])
            .count();
        assert_eq!(passed, 1, "{to}{more}");
    }
    // Who calls for help is heard, a few times.
    let mut bench = Bench::new(options, "", vec![backend(1, None)]);
    let passed = (0..20)
        .filter(|number| {
            let call = request("INVITE", &format!("s{number}"), "")
                .replace("sip:bob@example.net SIP", "urn:service:sos SIP");
            starts(&bench.client(&call)).contains(&"INVITE".to_owned())
        })
        .count();
    assert_eq!(passed, 2, "one as an emergency and one as anybody");
}
