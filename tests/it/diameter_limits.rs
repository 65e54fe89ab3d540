//! The routing agent through the binary: what peers may do, leaving, and byte transparency.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use strowger_diameter::avp::{Avps, FLAG_PROXIABLE, Header, Summary, code};
use strowger_diameter::build::Builder;

use crate::diameter::{ccr, client, dissect, error_message, text, up};
use crate::diameter_agent::{DPR, Peer, config, data, exchange, good, result};
use crate::harness::{Edge, alone, free_port};

/// The edge leaves under load: what is under way is answered, then peers hear DPR (REBOOTING), and
/// nothing comes after it.
#[test]
fn leaving_says_goodbye() {
    let _alone = alone();
    let (port, one) = (free_port(), free_port());
    let server = Peer::start(one, "a.example.net", |peer, header, message| {
        thread::sleep(Duration::from_millis(300));
        good(peer, header, message)
    });
    let mut edge = Edge::start(&config(port, &[("a", one)], "", ""));
    up(&edge, &["a"]);
    let host = "client.example.net";
    let mut connection = client(port, host);
    assert!(connection.send(&ccr("s;1", 1, host, None, 1)));
    let asked = Instant::now();
    while server.requests().is_empty() {
        assert!(asked.elapsed() < Duration::from_secs(10));
        thread::sleep(Duration::from_millis(5));
    }
    let ended = thread::spawn(move || edge.process.terminate());
    let answer = connection.next().expect("an answer");
    assert_eq!(result(&answer), 2_001, "{}", error_message(&answer));
    let goodbye = connection.next().expect("a DPR");
    assert_eq!(Header::read(&goodbye).expect("framed").command, DPR);
    assert_eq!(data(&goodbye, code::DISCONNECT_CAUSE), Some(vec![0; 4]));
    let header = Header::read(&goodbye).expect("framed");
    let mut dpa = Vec::new();
    Builder::new(&mut dpa, 0, DPR, 0, header.hop_by_hop, header.end_to_end)
        .number(code::RESULT_CODE, 2_001)
        .text(code::ORIGIN_HOST, host)
        .text(code::ORIGIN_REALM, "example.net")
        .finish();
    assert!(connection.send(&dpa));
    assert!(connection.next().is_none(), "nothing comes after it");
    assert_eq!(ended.join().expect("it ends"), Some(0));
}

/// What one peer may send, and what one server may owe.
#[test]
fn limits_of_peers() {
    let _alone = alone();
    let (port, one, two) = (free_port(), free_port(), free_port());
    let slow = Peer::start(one, "a.example.net", good);
    let _fast = Peer::start(two, "b.example.net", good);
    let options = ", peer_pending: 5, ingress: { max: 100, reserved: 50 }, answer_timeout: 60s";
    let yaml = config(port, &[("a", one), ("b", two)], options, "    balance: priority\n")
        .replace("a.example.net }", "a.example.net, priority: 1 }")
        .replace("b.example.net }", "b.example.net, priority: 2 }");
    let edge = Edge::start(&yaml);
    up(&edge, &["a", "b"]);
    slow.mute.store(true, Ordering::Relaxed);
    let host = "client.example.net";
    let mut connection = client(port, host);
    // Nine at once, under the rate: five wait at the first, the others find the second.
    for number in 1..=9 {
        assert!(connection.send(&ccr(&format!("s;{number}"), 1, host, None, number)));
    }
    for _ in 0..4 {
        let answer = connection.next().expect("an answer");
        assert_eq!(text(Summary::of(&answer).origin_host), "b.example.net");
    }
    assert_eq!(slow.requests().len(), 5, "its bulkhead");
    // Far over the rate: the first ones pass, most are refused at once.
    let mut flood = client(port, "flood.example.net");
    for number in 1..=500 {
        assert!(flood.send(&ccr(&format!("f;{number}"), 1, "flood.example.net", None, number)));
    }
    let mut refused = 0;
    for _ in 0..500 {
        refused += u32::from(result(&flood.next().expect("an answer")) == 3_004);
    }
    assert!(refused > 100, "{refused}");
    let counted = edge.metric("strowger_protocol_total", &["diameter_ingress_limit"]);
    // The bulkhead of the second server may refuse some more.
    assert!(counted > 100.0 && counted <= f64::from(refused), "{counted} of {refused}");
    // The other client does not notice.
    let other = exchange(&mut connection, &[ccr("s;10", 1, host, None, 10)]);
    assert_eq!(result(&other[&10]), 2_001);
}

/// Captured requests pass unchanged but for what a relay must change, and so do captured answers.
#[test]
fn captures_pass_unchanged() {
    let Some(folder) = std::env::var_os("STROWGER_TESTDATA").map(PathBuf::from) else {
        return println!("skipped: STROWGER_TESTDATA is not set");
    };
    let _alone = alone();
    let (mut requests, mut answers) = (Vec::new(), HashMap::new());
    let files = std::fs::read_dir(folder.join("diameter")).into_iter().flatten().flatten();
    for file in files.flat_map(|folder| std::fs::read_dir(folder.path()).into_iter().flatten()) {
        let path = file.expect("an entry").path();
        if path.extension().is_none_or(|extension| extension != "bin") {
            continue;
        }
        let bytes = std::fs::read(&path).expect("read");
        let Some(header) = Header::read(&bytes).filter(|header| header.application != 0) else {
            continue;
        };
        if header.is_request() && header.flags & FLAG_PROXIABLE != 0 {
            requests.push((path, bytes));
        } else if !header.is_request() {
            answers.entry((header.command, header.application)).or_insert(bytes);
        }
    }
    assert!(requests.len() >= 10, "{} requests", requests.len());
    let (port, one) = (free_port(), free_port());
    let known = answers.clone();
    let server = Peer::start(one, "a.example.net", move |peer, header, message| {
        let Some(answer) = known.get(&(header.command, header.application)) else {
            return Some(peer.plain(header, message, 2_001));
        };
        let mut answer = answer.clone();
        answer[12..16].copy_from_slice(&header.hop_by_hop.to_be_bytes());
        answer[16..20].copy_from_slice(&header.end_to_end.to_be_bytes());
        Some(answer)
    });
    let any = ", applications: [gx]";
    let edge = Edge::start(&config(port, &[("a", one)], any, ""));
    up(&edge, &["a"]);
    let mut connection = client(port, "client.example.net");
    let mut relayed = Vec::new();
    for (path, request) in &requests {
        assert!(connection.send(request));
        let answer = connection.next().expect("an answer");
        let header = Header::read(request).expect("framed");
        let (sent, back) = (server.requests(), Header::read(&answer).expect("framed"));
        assert_eq!((back.hop_by_hop, back.end_to_end), (header.hop_by_hop, header.end_to_end));
        if let Some(wanted) = answers.get(&(header.command, header.application))
            && Summary::of(&answer).result() == Summary::of(wanted).result()
        {
            assert_eq!(answer[20..], wanted[20..], "{}", path.display());
            assert_eq!(answer[..12], wanted[..12], "{}", path.display());
        }
        let Some(got) = sent.get(relayed.len()) else {
            panic!("{}: {}", path.display(), error_message(&answer));
        };
        relayed.push(got.clone());
        assert_eq!(got[0], request[0]);
        assert_eq!(got[4..12], request[4..12], "{}", path.display());
        assert_eq!(got[16..request.len()], request[16..], "{}", path.display());
        let rest: Vec<_> = Avps::within(&got[request.len()..]).flatten().collect();
        assert!(rest.len() == 1 && rest[0].is(code::ROUTE_RECORD), "{}", path.display());
    }
    assert!(!relayed.is_empty());
    // Some captures are malformed in tshark's eyes to begin with.
    let originals: Vec<Vec<u8>> = requests.into_iter().map(|(_, request)| request).collect();
    assert_eq!(dissect(&relayed), dissect(&originals));
}
