//! SIP, step by step: overload control (RFC 7339, 7415), `sips:`, and silence.

use std::time::Duration;

use serde_json::json;
use strowger_contract::{Endpoint, Note, Transport};

use crate::sip_bench::{Bench, answer, backend, header, remote, request, starts, three};

fn counted(bench: &Bench, word: &str) -> usize {
    bench.notes.iter().filter(|note| matches!(note, Note::Count(known) if *known == word)).count()
}

fn asking(method: &str, call: &str, algorithms: &str) -> String {
    request(method, call, "").replace(";rport", &format!(";rport;oc;oc-algo=\"{algorithms}\""))
}

/// The value of a parameter of the first Via.
fn told<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let mut parts = header(text, "Via").split(';').filter_map(|part| part.split_once('='));
    parts.find(|(found, _)| *found == name).map(|(_, value)| value)
}

/// One slot, and five times as many calls as it can take: neighbours that ask hear of it in all answers,
/// and of its end.
#[test]
fn neighbours_that_ask_are_told_of_a_pools_load() {
    let mut bench = Bench::new(json!({}), "", vec![backend(1, Some(1))]);
    let sent = bench.client(&asking("INVITE", "c0", "loss"));
    let (trying, invite) = (sent[0].1.clone(), sent[1].clone());
    assert_eq!((told(&trying, "oc"), told(&trying, "oc-algo")), (Some("0"), Some("\"loss\"")));
    assert_eq!(told(&trying, "oc-validity"), Some("500"));
    assert!(!header(&invite.1, "Via").contains(";oc"), "we ask for nothing unless told to");
    assert!(invite.1.contains(";oc;oc-algo"), "the neighbour's own Via passes");
    let (mut highest, mut last) = (0, (0, 0));
    for round in 0..40 {
        for number in 0..5 {
            let sent = bench.client(&asking("INVITE", &format!("c{round}-{number}"), "loss"));
            let told = sent.iter().filter_map(|(_, text)| told(text, "oc-seq")).next_back();
            let (whole, part) = told.expect("each is told").split_once('.').expect("a sequence");
            let now = (whole.parse::<u64>().expect("seconds"), part.parse::<u64>().expect("parts"));
            assert!(now >= last, "{now:?} after {last:?}");
            last = now;
        }
        bench.core.tick(bench.start + bench.at);
        for (_, text) in bench.passes(Duration::from_millis(250)) {
            let percent = told(&text, "oc").and_then(|text| text.parse::<u32>().ok());
            highest = highest.max(percent.unwrap_or(0));
        }
    }
    assert!((30..=95).contains(&highest), "{highest}");
    // A relayed answer tells as well, of the neighbour's Via alone; who does not ask hears nothing.
    let busy = bench.answers(&invite, "486 Busy", "");
    let busy = busy.iter().find(|(_, text)| text.starts_with("SIP/2.0 486")).expect("relayed");
    assert!(told(&busy.1, "oc").is_some_and(|oc| oc != "0"), "{}", busy.1);
    let sent = bench.client(&request("OPTIONS", "quiet", ""));
    let quiet = sent.iter().find(|(_, text)| text.starts_with("OPTIONS")).cloned();
    if let Some(options) = quiet {
        let said = bench.answers(&options, "200 OK", "");
        assert_eq!(told(&said[0].1, "oc"), None);
    }
    bench.rests();
    for _ in 0..90 {
        bench.passes(Duration::from_millis(600));
        bench.core.tick(bench.start + bench.at);
        let sent = bench.client(&asking("OPTIONS", &format!("end{:?}", bench.at), "loss"));
        bench.answers(&sent[0], "200 OK", "");
    }
    let mut last = |call: &str, algorithm: &str| {
        let sent = bench.client(&asking("OPTIONS", call, algorithm));
        bench.answers(&sent[0], "200 OK", "")[0].1.clone()
    };
    assert_eq!(told(&last("last", "loss"), "oc"), Some("0"), "it is over");
    let rate = last("rate", "rate");
    assert_eq!(told(&rate, "oc-algo"), Some("\"rate\""));
    assert_eq!(told(&rate, "oc-validity"), Some("0"), "no limit");
    bench.rests();
}

/// An instance that asks for less by `oc` gets less of what is new; others take it, or nobody.
#[test]
fn an_instance_that_asks_for_less_gets_less() {
    for (instances, refused) in [(1u8, 40), (2, 0)] {
        let option = json!({"overload_control": {"client": true}});
        let all = (1..=instances).map(|number| backend(number, None)).collect();
        let mut bench = Bench::new(option, "", all);
        let first = bench.client(&request("OPTIONS", "first", ""));
        assert!(header(&first[0].1, "Via").contains(";oc;oc-algo=\"loss\""), "{}", first[0].1);
        // Both are asked; the first one is loaded.
        let loaded = std::net::SocketAddr::from(([10, 0, 0, 1], 5060));
        let told = |bench: &mut Bench, sent: &(Endpoint, String)| {
            let say = ";oc=40;oc-algo=\"loss\";oc-validity=30000;oc-seq=9.1";
            let said = answer(&sent.1, "200 OK", "").replace(";oc;oc-algo=\"loss\"", say);
            let said = if remote(sent.0) == loaded { said } else { answer(&sent.1, "200 OK", "") };
            bench.gets(remote(sent.0), &said)
        };
        let said = told(&mut bench, &first[0]);
        assert!(!said[0].1.contains("oc="), "it is between the two of us: {}", said[0].1);
        for number in 0..20 {
            let sent = bench.client(&request("OPTIONS", &format!("w{number}"), ""));
            if sent[0].1.starts_with("OPTIONS") {
                told(&mut bench, &sent[0]);
            }
        }
        let mut not = 0;
        for number in 0..100 {
            let sent = bench.client(&request("OPTIONS", &format!("o{number}"), ""));
            if sent[0].1.starts_with("SIP/2.0 503") {
                not += 1;
            } else {
                told(&mut bench, &sent[0]);
            }
        }
        assert_eq!(not, refused, "{instances} instances");
        assert!(counted(&bench, "sip_oc_left_out") > 10);
        for number in 0..50 {
            let urgent = request("INVITE", &format!("e{number}"), "Resource-Priority: esnet.0\r\n");
            let sent = bench.client(&urgent);
            assert_eq!(starts(&sent), ["100", "INVITE"], "emergencies always go");
            bench.answers(&sent[1], "486 Busy", "");
        }
        bench.rests();
    }
}

/// What is left out without a memory is so by the request itself: a repetition hears the same.
#[test]
fn a_stateless_listener_leaves_out_the_same_requests_each_time() {
    let option = json!({"mode": "stateless", "overload_control": {"client": true}});
    let mut bench = Bench::new(option, "", vec![backend(1, None)]);
    let sent = bench.client(&request("OPTIONS", "first", ""));
    let say = ";oc=40;oc-algo=\"loss\";oc-validity=30000;oc-seq=9.1";
    let said = answer(&sent[0].1, "200 OK", "").replace(";oc;oc-algo=\"loss\"", say);
    bench.gets(remote(sent[0].0), &said);
    let mut refused = 0;
    for number in 0..400 {
        let text = request("OPTIONS", &format!("o{number}"), "");
        let (once, again) = (bench.client(&text), bench.client(&text));
        assert_eq!(starts(&once), starts(&again));
        refused += u32::from(once[0].1.starts_with("SIP/2.0 503"));
    }
    assert!((120..200).contains(&refused), "{refused} of 400");
    let urgent = request("INVITE", "e", "Resource-Priority: esnet.0\r\n");
    assert_eq!(starts(&bench.client(&urgent)), ["INVITE"]);
}

/// RFC 3261 26.2.2, RFC 5630 5.3.
#[test]
fn a_sips_request_goes_over_tls_or_nowhere() {
    for mode in ["stateful", "stateless"] {
        let sips =
            |method: &str, call: &str| request(method, call, "").replacen("sip:bob", "sips:bob", 1);
        let mut plain = Bench::new(json!({"mode": mode}), "", three());
        let said = plain.client(&sips("INVITE", "s1"));
        let (_, refused) = said.last().expect("an answer");
        assert!(refused.starts_with("SIP/2.0 480 "), "{mode}: {refused}");
        assert!(header(refused, "Warning").starts_with("380 "), "{refused}");
        assert_eq!(said.iter().filter(|(_, text)| text.starts_with("INVITE")).count(), 0);
        assert_eq!(plain.client(&sips("ACK", "s2")), [], "an ACK gets no answer");
        plain.rests();
        let mut told = Bench::new(json!({"mode": mode, "sips": "any"}), "", three());
        let sent = told.client(&sips("OPTIONS", "s3"));
        assert!(sent[0].1.starts_with("OPTIONS sips:bob"), "{mode}");
        told.answers(&sent[0], "200 OK", "");
        told.rests();
    }
    // Of several instances only those that are reached by TLS have it.
    let mut mixed = three();
    mixed[1].transport = Transport::Tls;
    let mut bench = Bench::new(json!({}), "", mixed);
    for number in 0..20 {
        let call = format!("m{number}");
        let sent = bench.client(&request("INVITE", &call, "").replacen("sip:bob", "sips:bob", 1));
        assert_eq!(starts(&sent), ["100", "INVITE"]);
        assert!(matches!(sent[1].0, Endpoint::Backend(_)), "{:?}", sent[1].0);
        assert!(header(&sent[1].1, "Via").starts_with("SIP/2.0/TLS"), "{}", sent[1].1);
    }
    bench.rests();
}

/// A timer that is looked at much too late says that we were silent, not the instance.
#[test]
fn a_stall_of_our_own_moves_no_calls() {
    let mut bench = Bench::new(json!({}), "", three());
    let sent = bench.client(&request("INVITE", "c1", ""));
    let invite = sent[1].clone();
    bench.at += Duration::from_secs(3);
    assert!(bench.wakes().iter().all(|(to, _)| *to == invite.0), "no other instance is asked yet");
    assert_eq!(counted(&bench, "sip_own_stalls"), 1);
    assert_eq!(starts(&bench.answers(&invite, "180 Ringing", "")), ["180"]);
    let later = bench.passes(Duration::from_secs(1));
    assert!(later.iter().all(|(to, _)| *to == invite.0), "{later:?}");
    bench.answers(&invite, "486 Busy", "");
    bench.rests();
}
