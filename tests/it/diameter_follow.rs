//! Who follows whom, what servers say of their load, and what requests say of their urgency.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use strowger_diameter::avp::{AVP_MANDATORY, AVP_VENDOR, Summary, code};
use strowger_diameter::build::{Builder, append};

use crate::diameter::{ccr, client, error_message, text, up};
use crate::diameter_agent::{Peer, config, exchange, good, gx, result};
use crate::harness::{Edge, alone, free_port};

const CCR: u32 = 272;
const GY: u32 = 4;
const SY: u32 = 16_777_302;
const SPENDING_LIMIT: u32 = 8_388_635;
const HOST: &str = "client.example.net";

/// A request of a subscriber, by IMSI alone.
fn about(command: u32, application: u32, session: &str, imsi: &str, number: u32) -> Vec<u8> {
    let (mut bytes, mut group) = (Vec::new(), Vec::new());
    append(&mut group, 450, AVP_MANDATORY, &1u32.to_be_bytes());
    append(&mut group, 444, AVP_MANDATORY, imsi.as_bytes());
    let mut builder = Builder::request(&mut bytes, command, application, number, number)
        .text(code::SESSION_ID, session)
        .text(code::ORIGIN_HOST, HOST)
        .text(code::ORIGIN_REALM, "example.net")
        .text(code::DESTINATION_REALM, "example.net")
        .bytes(443, &group);
    if command == CCR {
        builder = builder.number(code::CC_REQUEST_TYPE, 1);
    }
    builder.finish();
    bytes
}

/// Charging and spending limits of a subscriber go to the policy server that has the Gx session.
#[test]
fn gy_and_sy_follow_gx() {
    const SUBSCRIBERS: u32 = 60;
    let _alone = alone();
    let port = free_port();
    let ports = [free_port(), free_port(), free_port()];
    let names = ["a", "b", "c"];
    let hosts = ["a.example.net", "b.example.net", "c.example.net"];
    let _servers: Vec<Peer> =
        ports.iter().zip(hosts).map(|(&port, host)| Peer::start(port, host, good)).collect();
    let list: Vec<(&str, u16)> = names.into_iter().zip(ports).collect();
    let pool = "    balance: round-robin\n    bind_keys: [imsi, framed-ip]\n";
    let edge = Edge::start(
        &config(port, &list, ", bindings: { missing: 3002 }", pool)
            .replace("watchdog: 500ms", "watchdog: 60s"),
    );
    up(&edge, &names);
    let mut connection = client(port, HOST);
    let imsi = |number: u32| format!("00101{number:010}");
    let begun: Vec<Vec<u8>> = (0..SUBSCRIBERS)
        .map(|number| gx(HOST, &format!("gx;{number}"), 1, &imsi(number), number, number))
        .collect();
    let begun = exchange(&mut connection, &begun);
    for (what, command, application) in [("gy", CCR, GY), ("sy", SPENDING_LIMIT, SY)] {
        let requests: Vec<Vec<u8>> = (0..SUBSCRIBERS)
            .map(|number| {
                let session = format!("{what};{number}");
                about(command, application, &session, &imsi(number), number)
            })
            .collect();
        let answers = exchange(&mut connection, &requests);
        for number in 0..SUBSCRIBERS {
            let (answer, first) = (&answers[&number], &begun[&number]);
            assert_eq!(result(answer), 2_001, "{what} {number}: {}", error_message(answer));
            let owner = |answer: &[u8]| text(Summary::of(answer).origin_host);
            assert_eq!(owner(answer), owner(first), "{what} of subscriber {number}");
        }
        // Of somebody without a Gx session nothing is known.
        let unknown = about(command, application, "nobody", &imsi(900_000), 1);
        assert_eq!(result(&exchange(&mut connection, &[unknown])[&1]), 3_002, "{what}");
    }
    assert_eq!(edge.metric("strowger_protocol_total", &["diameter_binding_not_found"]), 2.0);
}

/// A 3004 of the server's own halves its share for a while; one that it passes on from a node behind
/// it says nothing of it.
#[test]
fn a_busy_server_gets_less() {
    const SESSIONS: u32 = 1_000;
    let _alone = alone();
    for own in [true, false] {
        let (port, one, two) = (free_port(), free_port(), free_port());
        let busy = Arc::new(AtomicBool::new(true));
        let once = Arc::clone(&busy);
        let first = Peer::start(one, "a.example.net", move |peer, header, message| {
            if !once.swap(false, Ordering::Relaxed) {
                return good(peer, header, message);
            }
            let mut answer = peer.plain(header, message, 3_004);
            if !own {
                let host = b"a.example.net";
                let at = answer.windows(host.len()).position(|part| part == host);
                answer[at.expect("its name")] = b'z';
            }
            Some(answer)
        });
        let _second = Peer::start(two, "b.example.net", good);
        let edge = Edge::start(
            &config(
                port,
                &[("a", one), ("b", two)],
                ", overload: { busy: 10m }",
                "    balance: weighted-random\n",
            )
            .replace("watchdog: 500ms", "watchdog: 60s"),
        );
        up(&edge, &["a", "b"]);
        let mut connection = client(port, HOST);
        let mut number = 0;
        while busy.load(Ordering::Relaxed) {
            number += 1;
            let asked = ccr(&format!("first;{number}"), 1, HOST, None, number);
            let answers = exchange(&mut connection, &[asked]);
            assert_eq!(result(&answers[&number]), 2_001, "the other one did it");
            assert!(number < 100, "the first is never chosen");
        }
        let before = first.requests().len();
        let requests: Vec<Vec<u8>> = (0..SESSIONS)
            .map(|number| ccr(&format!("s;{own};{number}"), 1, HOST, None, number))
            .collect();
        exchange(&mut connection, &requests);
        let share = first.requests().len() - before;
        // A third or a half of them, give or take sixteen: five times that lie between.
        assert_eq!(share < 417, own, "own: {own}, it got {share} of {SESSIONS}");
    }
}

pub(crate) fn urgent(session: &str, number: u32, priority: u32) -> Vec<u8> {
    let mut message = ccr(session, 1, HOST, None, number);
    append(&mut message, code::DRMP, 0, &priority.to_be_bytes());
    whole(message)
}

/// Sets the message's length to what it is.
fn whole(mut message: Vec<u8>) -> Vec<u8> {
    let length = (message.len() as u32).to_be_bytes();
    message[1..4].copy_from_slice(&length[1..]);
    message
}

/// DRMP is the class, and chooses the answer timer.
#[test]
fn urgency_is_heeded() {
    let _alone = alone();
    let (port, one) = (free_port(), free_port());
    let server = Peer::start(one, "a.example.net", good);
    let options = ", answer_timeout: 60s, answer_timeouts: [ { command: [CCR], priority: 1, timeout: 300ms } ]";
    let edge = Edge::start(
        &config(port, &[("a", one)], options, "").replace("watchdog: 500ms", "watchdog: 60s"),
    );
    up(&edge, &["a"]);
    let mut connection = client(port, HOST);
    let requests: Vec<Vec<u8>> = (0..16u32)
        .map(|priority| urgent(&format!("s;{priority}"), priority + 1, priority))
        .collect();
    exchange(&mut connection, &requests);
    let of = |class: &str| edge.metric("strowger_requests_total", &[&format!("class=\"{class}\"")]);
    assert_eq!(of("emergency"), 2.0, "0 and 1");
    assert_eq!(of("bulk"), 5.0, "11 to 15");
    assert_eq!(of("setup"), 9.0);
    // Nothing is answered any more: only the urgent one has a timer that ends soon.
    server.mute.store(true, Ordering::Relaxed);
    assert!(connection.send(&urgent("late", 100, 5)));
    assert!(connection.send(&urgent("soon", 101, 0)));
    let answer = connection.next().expect("an answer");
    assert_eq!(text(Summary::of(&answer).session_id), "soon");
    assert_eq!(result(&answer), 3_002);
}

/// What a request carries of its time: too old is refused at once, and no answer is awaited longer
/// than its sender does.
#[test]
fn carried_deadlines_are_kept() {
    let _alone = alone();
    let (port, one) = (free_port(), free_port());
    let server = Peer::start(one, "a.example.net", good);
    let edge = Edge::start(
        &config(port, &[("a", one)], ", answer_timeout: 60s", "")
            .replace("watchdog: 500ms", "watchdog: 60s"),
    );
    up(&edge, &["a"]);
    let mut connection = client(port, HOST);
    let stamped = |session: &str, number: u32, stamp: u64, wait: u32| {
        let mut message = ccr(session, 1, HOST, None, number);
        for (code, data) in [
            (code::ORIGINATION_TIME_STAMP, &stamp.to_be_bytes()[..]),
            (code::MAXIMUM_WAIT_TIME, &wait.to_be_bytes()[..]),
        ] {
            message.extend_from_slice(&code.to_be_bytes());
            message.extend_from_slice(&[AVP_VENDOR, 0, 0, 12 + data.len() as u8]);
            message.extend_from_slice(&10_415u32.to_be_bytes());
            message.extend_from_slice(data);
        }
        whole(message)
    };
    // The clock of the client is its own: its youngest message stands for no delay.
    const NOW: u64 = 1_700_000_000_000;
    let fresh = exchange(&mut connection, &[stamped("fresh", 1, NOW, 30_000)]);
    assert_eq!(result(&fresh[&1]), 2_001);
    let seen = server.requests().len();
    let old = exchange(&mut connection, &[stamped("old", 2, NOW - 60_000, 30_000)]);
    assert_eq!(result(&old[&2]), 3_004, "{}", error_message(&old[&2]));
    assert_eq!(server.requests().len(), seen, "nobody was asked in vain");
    server.mute.store(true, Ordering::Relaxed);
    assert!(connection.send(&ccr("patient", 1, HOST, None, 3)));
    assert!(connection.send(&stamped("impatient", 4, NOW + 3_600_000, 400)));
    let answer = connection.next().expect("an answer");
    assert_eq!(text(Summary::of(&answer).session_id), "impatient");
    assert_eq!(result(&answer), 3_002);
}
