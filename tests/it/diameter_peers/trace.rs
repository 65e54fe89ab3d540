//! A subscriber's messages in a trace, as tshark reads them.

use std::process::Command;

use strowger_diameter::avp::code;

use super::emitted::{Client, ccr, server};
use super::{config, until_up};
use crate::harness::{Edge, alone, download, free_port, has};

const SUBSCRIBER: &str = "001010000000001";

/// User-Name names the subscriber where there is no Subscription-Id.
fn ask(client: &mut Client, session: &str, imsi: Option<&str>) {
    let named: Vec<(u32, &str)> = imsi.map(|imsi| (code::USER_NAME, imsi)).into_iter().collect();
    assert_eq!(client.ask(&ccr(session, 4, &named)), Some(2_001));
}

#[test]
fn a_subscribers_messages_are_traced_and_tshark_reads_them() {
    if !has("tshark") {
        return;
    }
    let _alone = alone();
    let (port, one) = (free_port(), free_port());
    let _mute = server(one, "a.example.net");
    let edge = Edge::start(&config(port, &[("a", one)], ""));
    until_up(&edge, &["a"]);
    let (mut first, mut second) = (Client::connect(port), Client::connect(port));
    assert_eq!(first.introduce("client.example.net", 4), Some(2_001));
    assert_eq!(second.introduce("other.example.net", 4), Some(2_001));
    for (key, answer) in [("imsi:12x", 400), ("msisdn:", 400), ("msisdn:+4930", 201)] {
        let body = format!(r#"{{"protocol":"diameter","key":"{key}"}}"#);
        assert_eq!(edge.post("/api/v1/traces", &body).0, answer, "{key}");
    }
    let wanted = [
        format!("imsi:{SUBSCRIBER}"),
        "client.example.net;1;1".to_owned(),
        "origin-host:CLIENT.example.net".to_owned(),
    ];
    let ids: Vec<u64> = wanted
        .iter()
        .map(|key| {
            let body = format!(r#"{{"protocol":"diameter","key":"{key}","for_s":60}}"#);
            let (code, answer) = edge.post("/api/v1/traces", &body);
            assert_eq!(code, 201, "{answer}");
            let list = edge.json("/api/v1/traces");
            list.as_array().and_then(|list| list.last()?["id"].as_u64()).expect("its number")
        })
        .collect();
    // The identifiers of both clients' requests are the same. Later requests of a session do not
    // name the subscriber.
    ask(&mut first, "client.example.net;1;1", Some(SUBSCRIBER));
    ask(&mut second, "other.example.net;1;9", Some("001010000000002"));
    ask(&mut first, "client.example.net;1;1", None);
    ask(&mut second, "other.example.net;1;9", None);
    // Each request and each answer, in and out. The client's name is in all requests of this test.
    for (id, count) in ids.iter().zip([8, 8, 16]) {
        let path = format!("/api/v1/traces/{id}");
        edge.until("all messages", |edge| edge.json(&path)["messages"].as_u64() == Some(count));
    }
    let ladder = edge.json(&format!("/api/v1/traces/{}", ids[0]))["ladder"].clone();
    assert_eq!(ladder[0]["what"], "CCR gy client.example.net;1;1");
    assert_eq!(ladder[3]["what"], "CCA gy 2001");
    assert_eq!((&ladder[0]["direction"], &ladder[1]["direction"]), (&"in".into(), &"out".into()));
    assert_eq!(ladder[1]["to"], format!("127.0.0.1:{one}"));
    let file = edge.folder.path().join("trace.pcap");
    download(&edge, &format!("/api/v1/traces/{}.pcap", ids[0]), &file);
    let fields =
        ["diameter.cmd.code", "diameter.flags.request", "diameter.Session-Id", "_ws.malformed"];
    let mut tshark = Command::new("tshark");
    tshark.args(["-n", "-T", "fields", "-r"]).arg(&file);
    for ports in [port, one] {
        tshark.args(["-d", &format!("tcp.port=={ports},diameter")]);
    }
    tshark.args(fields.iter().flat_map(|field| ["-e", field]));
    let output = tshark.output().expect("it runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = |request: &str| format!("272\t{request}\tclient.example.net;1;1\t");
    let yes = lines.lines().next().and_then(|line| line.split('\t').nth(1)).unwrap_or_default();
    let no = if yes == "1" { "0" } else { "False" };
    let one = [line(yes), line(yes), line(no), line(no)];
    assert_eq!(lines.lines().collect::<Vec<_>>(), [one.clone(), one].concat());
}
