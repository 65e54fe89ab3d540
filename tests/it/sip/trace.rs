//! Traces, the export to Homer, and the list of calls, as tshark reads them.

use std::fs;
use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;

use super::phone::{Client, Server, headers};
use crate::harness::{Edge, download, free_port, has, http};

const LIMIT: Duration = Duration::from_secs(15);

fn config(port: u16, server: &Server, more: &str) -> String {
    format!(
        "version: 1\nnode: {{ name: test, workers: 2 }}\nadmin: {{ listen: ADMIN }}\n{more}listeners:\n  - name: sip\n    protocol: sip\n    bind: [udp://127.0.0.1:{port}, tcp://127.0.0.1:{port}]\n    pool: ims\npools:\n  ims:\n    backends: [ {{ id: a, address: udp://{} }} ]\n",
        server.address
    )
}

/// What tshark makes of a capture: one line of tab-separated fields per message.
fn tshark(file: &std::path::Path, fields: &[&str]) -> Vec<String> {
    let mut command = Command::new("tshark");
    command.args(["-n", "-r"]).arg(file).args(["-T", "fields"]);
    for field in fields {
        command.args(["-e", field]);
    }
    let output = command.output().expect("tshark runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}

#[test]
fn a_trace_holds_one_users_messages_and_tshark_reads_it() {
    if !has("tshark") {
        return;
    }
    let (port, server) = (free_port(), Server::polite());
    let edge = Edge::start(&config(port, &server, ""));
    let at = ([127, 0, 0, 1], port).into();
    let (code, body) =
        edge.post("/api/v1/traces", r#"{"protocol":"sip","key":"from-user:alice","for_s":60}"#);
    assert_eq!(code, 201, "{body}");
    for mut client in [Client::udp(at), Client::tcp(at)] {
        for (user, call) in [("alice", "wanted"), ("bob", "other")] {
            let call = format!("{call}-{}", client.via());
            let message = client.request("MESSAGE", "sip:x@example.net", user, &call);
            client.send(message.as_bytes());
            client.final_answer(LIMIT).expect("answered");
        }
    }
    edge.until("eight messages", |edge| {
        edge.json("/api/v1/traces/1")["ladder"].as_array().map(Vec::len) == Some(8)
    });
    let ladder = edge.json("/api/v1/traces/1")["ladder"].clone();
    assert_eq!(ladder[0]["what"], "MESSAGE sip:x@example.net");
    assert_eq!((&ladder[0]["direction"], &ladder[1]["direction"]), (&"in".into(), &"out".into()));
    assert_eq!(ladder[3]["what"], "200 Said (1 MESSAGE)");
    assert_eq!(ladder[1]["to"], server.address.to_string());
    assert!(server.seen_text().iter().all(|message| message.starts_with("MESSAGE ")));
    let file = edge.folder.path().join("trace.pcap");
    download(&edge, "/api/v1/traces/1.pcap", &file);
    let lines = tshark(
        &file,
        &[
            "sip.Call-ID",
            "sip.Method",
            "sip.Status-Code",
            "_ws.malformed",
            "ip.checksum.status",
            "tcp.analysis.flags",
        ],
    );
    let one = |call: &str| {
        [
            format!("{call}\tMESSAGE\t\t\t\t"),
            format!("{call}\tMESSAGE\t\t\t\t"),
            format!("{call}\t\t200\t\t\t"),
            format!("{call}\t\t200\t\t\t"),
        ]
    };
    let plain: Vec<String> = lines
        .iter()
        .map(|line| {
            line.split('\t')
                .enumerate()
                .map(|(at, field)| if at == 4 { "" } else { field })
                .collect::<Vec<_>>()
                .join("\t")
        })
        .collect();
    assert_eq!(plain, [one("wanted-UDP"), one("wanted-TCP")].concat());
    // From where one stopped reading on, as the page does.
    let rest = edge.json("/api/v1/traces/1?after=6")["ladder"].clone();
    assert_eq!((rest.as_array().map(Vec::len), &rest[0]["number"]), (Some(2), &6.into()));
    assert_eq!(edge.get("/api/v1/traces/7").expect("an answer").0, 404);
    let (code, page) = edge.get("/calls").expect("an answer");
    assert!(code == 200 && page.contains("api/v1/") && page.contains("Ladder"), "{page}");
    // Ended by hand: nothing more comes in, what there is stays.
    assert_eq!(http(edge.admin, "DELETE", "/api/v1/traces/1", "").expect("an answer").0, 204);
    let mut client = Client::udp(at);
    let message = client.request("MESSAGE", "sip:x@example.net", "alice", "late");
    client.send(message.as_bytes());
    client.final_answer(LIMIT).expect("answered");
    let list = edge.json("/api/v1/traces");
    assert_eq!((&list[0]["running"], &list[0]["messages"]), (&false.into(), &8.into()));
}

#[test]
fn what_cannot_be_traced_is_said() {
    let (port, server) = (free_port(), Server::polite());
    let edge = Edge::start(&config(port, &server, ""));
    for (body, word) in [
        (r#"{"protocol":"tcp","key":"x"}"#, "cannot be traced"),
        (r#"{"protocol":"sip","key":""}"#, "needs a value"),
        (r#"{"protocol":"sip","key":"x","for_s":0}"#, "for_s"),
        (r#"{"protocol":"sip"}"#, "missing field `key`"),
    ] {
        let (code, answer) = edge.post("/api/v1/traces", body);
        assert!(code == 400 && answer.contains(word), "{body}: {code} {answer}");
    }
    assert_eq!(edge.get("/api/v1/traces/7").expect("an answer").0, 404);
    assert_eq!(edge.get("/api/v1/traces/7.pcap").expect("an answer").0, 404);
    for number in 0..16 {
        let key = format!(r#"{{"protocol":"sip","key":"{number}"}}"#);
        assert_eq!(edge.post("/api/v1/traces", &key).0, 201);
    }
    let (code, answer) = edge.post("/api/v1/traces", r#"{"protocol":"sip","key":"x"}"#);
    assert!(code == 503 && answer.contains("16 traces run"), "{answer}");
}

/// `strowger trace` follows a call and writes the file.
#[test]
fn the_command_line_follows_a_call() {
    if !has("tshark") {
        return;
    }
    let (port, server) = (free_port(), Server::polite());
    let edge = Edge::start(&config(port, &server, ""));
    let file = edge.folder.path().join("call.pcap");
    let child = Command::new(env!("CARGO_BIN_EXE_strowger"))
        .args(["trace", "--admin", &edge.admin.to_string(), "--for", "4s", "--write"])
        .arg(&file)
        .arg("call-id:7@x")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("the binary");
    edge.until("the trace", |edge| edge.json("/api/v1/traces")[0]["running"] == true);
    let mut client = Client::udp(([127, 0, 0, 1], port).into());
    let message = client.request("OPTIONS", "sip:x@example.net", "alice", "7@x");
    client.send(message.as_bytes());
    client.final_answer(LIMIT).expect("answered");
    let output = child.wait_with_output().expect("ended");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(text.lines().count(), 4, "{text}");
    assert!(text.contains("200 Said (1 OPTIONS)"), "{text}");
    assert_eq!(tshark(&file, &["sip.Call-ID"]), ["7@x"; 4]);
}

/// A HEP3 datagram by the specification: the chunks by their kind.
fn hep_chunks(datagram: &[u8]) -> std::collections::HashMap<u16, Vec<u8>> {
    let number = |at: usize| u16::from_be_bytes([datagram[at], datagram[at + 1]]);
    assert_eq!(&datagram[..4], b"HEP3");
    assert_eq!(usize::from(number(4)), datagram.len(), "the length of the whole");
    let (mut at, mut chunks) = (6, std::collections::HashMap::new());
    while at < datagram.len() {
        let (vendor, kind, length) = (number(at), number(at + 2), usize::from(number(at + 4)));
        assert_eq!(vendor, 0, "chunks of the specification itself");
        let known = chunks.insert(kind, datagram[at + 6..at + length].to_vec());
        assert!(known.is_none(), "chunk {kind} twice");
        at += length;
    }
    chunks
}

/// Homer's view of a call; and while the collector's name does not resolve, no call waits.
#[test]
fn homer_gets_copies_and_a_collector_that_does_not_resolve_costs_nothing() {
    let (port, server) = (free_port(), Server::polite());
    let collector = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    collector.set_read_timeout(Some(LIMIT)).expect("an option");
    let to = collector.local_addr().expect("bound");
    let hep = |to: &str| format!("hep: {{ collector: \"{to}\", capture_id: 77 }}\n");
    let edge = Edge::start(&config(port, &server, &hep("no-such-host.invalid:9060")));
    let mut client = Client::udp(([127, 0, 0, 1], port).into());
    let local = client.local();
    let mut call = |name: &str| {
        let message = client.request("MESSAGE", "sip:x@example.net", "alice", name);
        client.send(message.as_bytes());
        client.final_answer(LIMIT).expect("answered");
    };
    call("unseen");
    edge.until("four failures", |edge| {
        edge.metric("strowger_hep_messages_total", &["failed"]) >= 4.0
    });
    assert_eq!(edge.put_config(&config(port, &server, &hep(&to.to_string()))).0, 200);
    // The address is found by a thread of its own: until then there are no copies.
    collector.set_read_timeout(Some(Duration::from_millis(300))).expect("an option");
    let mut buffer = vec![0; 65_536];
    let first = (0..60).find(|number| {
        call(&format!("seen-{number}"));
        collector.peek(&mut buffer).is_ok()
    });
    let first = first.expect("copies arrive");
    collector.set_read_timeout(Some(LIMIT)).expect("an option");
    let mut got = Vec::new();
    while got.len() < 4 {
        let length = collector.recv(&mut buffer).expect("a copy");
        let chunks = hep_chunks(&buffer[..length]);
        let conversation = String::from_utf8_lossy(&chunks[&17]).into_owned();
        if conversation == format!("seen-{first}") {
            got.push(chunks);
        }
    }
    let starts = [
        "MESSAGE sip:x@example.net SIP/2.0",
        "MESSAGE sip:x@example.net SIP/2.0",
        "SIP/2.0 200 Said",
        "SIP/2.0 200 Said",
    ];
    for (chunks, start) in got.iter().zip(starts) {
        assert!(chunks[&15].starts_with(start.as_bytes()));
        let fixed = [
            (1, vec![2]),
            (2, vec![17]),
            (3, vec![127, 0, 0, 1]),
            (11, vec![1]),
            (12, vec![0, 0, 0, 77]),
        ];
        for (kind, value) in fixed {
            assert_eq!(chunks[&kind], value, "chunk {kind}");
        }
    }
    assert_eq!(
        (&got[0][&7], &got[0][&8]),
        (&local.port().to_be_bytes().to_vec(), &port.to_be_bytes().to_vec())
    );
    assert_eq!(got[1][&8], server.address.port().to_be_bytes());
}

/// A call is listed while it lives; its record is written when it ends, and SIGHUP opens the file anew.
#[test]
fn a_call_is_listed_and_then_written_to_a_file() {
    let (port, server) = (free_port(), Server::polite());
    let folder = tempfile::TempDir::new().expect("a folder");
    let file = folder.path().join("cdr.jsonl");
    let sink = format!("cdr: {{ file: {} }}\n", file.display());
    let yaml = config(port, &server, &sink)
        .replace("    pool: ims\n", "    pool: ims\n    options: { cdr: true }\n");
    let edge = Edge::start(&yaml);
    let call = |name: &str| {
        let mut client = Client::udp(([127, 0, 0, 1], port).into());
        let invite = client.request("INVITE", "sip:bob@example.net", "alice", name);
        client.send(invite.as_bytes());
        let told = client.final_answer(LIMIT).expect("answered");
        let one = |header: &str| headers(&told, header, "")[0].to_owned();
        let (to, route) = (one("To"), one("Record-Route"));
        let in_dialog = |method: &str, number: u32| {
            let request = client.request(method, "sip:phone@127.0.0.1", "alice", name);
            request
                .replace("To: <sip:phone@127.0.0.1>", &format!("Route: {route}\r\nTo: {to}"))
                .replace("CSeq: 1", &format!("CSeq: {number}"))
        };
        let (ack, bye) = (in_dialog("ACK", 1), in_dialog("BYE", 2));
        client.send(ack.as_bytes());
        (client, bye)
    };
    let (mut client, bye) = call("cdr-1");
    edge.until("a live call", |edge| {
        let calls = edge.json("/api/v1/calls?pool=ims&instance=a");
        calls["live"] == 1 && calls["calls"][0]["phase"] == "answered"
    });
    assert_eq!(edge.json("/api/v1/calls?instance=other")["live"], 0);
    client.send(bye.as_bytes());
    assert!(client.final_answer(LIMIT).is_some_and(|told| told.starts_with("SIP/2.0 200")));
    let written = |name: &str| {
        let text = fs::read_to_string(&file).unwrap_or_default();
        text.lines().find(|line| line.contains(name)).map(str::to_owned)
    };
    edge.until("the record", |_| written("cdr-1").is_some());
    let record: serde_json::Value =
        serde_json::from_str(&written("cdr-1").expect("there")).expect("a line of JSON");
    for (field, value) in [
        ("caller", "sip:alice@example.net"),
        ("callee", "sip:bob@example.net"),
        ("instance", "a"),
        ("cause", "bye"),
        ("ended_by", "caller"),
    ] {
        assert_eq!(record[field], value, "{record}");
    }
    assert!(record["talk_s"].as_f64().is_some_and(|talked| talked >= 0.0), "{record}");
    assert_eq!(edge.json("/api/v1/calls")["live"], 0);
    fs::rename(&file, folder.path().join("moved")).expect("moved");
    edge.process.hang_up();
    edge.until("the new file", |_| file.exists());
    let (mut client, bye) = call("cdr-2");
    client.send(bye.as_bytes());
    edge.until("the second record", |_| written("cdr-2").is_some());
    assert_eq!(edge.metric("strowger_call_records_total", &["written"]), 2.0);
}
