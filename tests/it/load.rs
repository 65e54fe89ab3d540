//! `strowger load` through a real edge: everything answered, sessions on their instances, and what
//! goes wrong is told.

use std::process::Command;

use serde_json::Value;

use crate::harness::{Edge, alone, free_port};

fn load(arguments: &[&str]) -> (bool, Value) {
    let output = Command::new(env!("CARGO_BIN_EXE_strowger"))
        .arg("load")
        .args(arguments)
        .arg("--json")
        .output()
        .expect("the program runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let report = serde_json::from_str(&text).unwrap_or_else(|error| {
        panic!("{error}: {text}{}", String::from_utf8_lossy(&output.stderr))
    });
    (output.status.success(), report)
}

fn edge() -> (Edge, [u16; 8]) {
    let ports = [(); 8].map(|()| free_port());
    let [sip, dra, tcp, ims_a, ims_b, pcrf_a, pcrf_b, db] = ports;
    let edge = Edge::start(&format!(
        "version: 1\nnode: {{ workers: 2, realm: example.net }}\nadmin: {{ listen: ADMIN }}\n\
         classes:\n  setup: {{ deadline: 10s }}\n  in-session: {{ deadline: 10s }}\n\
         listeners:\n\
         \x20 - {{ name: sip, protocol: sip, bind: [udp://127.0.0.1:{sip}, tcp://127.0.0.1:{sip}], pool: ims }}\n\
         \x20 - {{ name: dra, protocol: diameter, bind: [tcp://127.0.0.1:{dra}], pool: pcrf, options: {{ origin_host: edge.example.net }} }}\n\
         \x20 - {{ name: db, protocol: tcp, bind: [tcp://127.0.0.1:{tcp}], pool: db }}\n\
         pools:\n\
         \x20 ims: {{ backends: [ {{ id: a, address: udp://127.0.0.1:{ims_a} }}, {{ id: b, address: udp://127.0.0.1:{ims_b} }} ] }}\n\
         \x20 pcrf: {{ backends: [ {{ id: a, address: tcp://127.0.0.1:{pcrf_a} }}, {{ id: b, address: tcp://127.0.0.1:{pcrf_b} }} ] }}\n\
         \x20 db: {{ backends: [ {{ id: a, address: tcp://127.0.0.1:{db} }} ] }}\n"
    ));
    (edge, ports)
}

fn assert_all_good(report: &Value, good: bool) {
    assert!(good && report["good"] == report["begun"], "{report:#}");
    assert!(report["begun"].as_u64() > Some(0), "{report:#}");
}

#[test]
fn calls_registrations_and_options_are_answered_by_their_instances() {
    let _alone = alone();
    let (edge, [sip, _, _, a, b, ..]) = edge();
    let (a, b) = (format!("udp://127.0.0.1:{a}"), format!("udp://127.0.0.1:{b}"));
    for scheme in ["udp", "tcp"] {
        for (kind, hold) in
            [("call", "0s"), ("call", "300ms"), ("register", "0s"), ("options", "0s")]
        {
            let target = format!("{scheme}://127.0.0.1:{sip}");
            let (good, report) = load(&[
                "sip", "--target", &target, "--answer", &a, "--answer", &b, "--kind", kind,
                "--hold", hold, "--rate", "150", "--for", "1s",
            ]);
            assert_all_good(&report, good);
            let instances = report["instances"].as_object().expect("a map");
            assert!(kind != "call" || instances.len() == 2, "{report:#}");
        }
    }
    drop(edge);
}

#[test]
fn diameter_sessions_are_answered_by_their_servers() {
    let _alone = alone();
    let (edge, [_, dra, _, _, _, a, b, _]) = edge();
    let (a, b) = (format!("tcp://127.0.0.1:{a}"), format!("tcp://127.0.0.1:{b}"));
    let target = format!("tcp://127.0.0.1:{dra}");
    // Later requests name their server, or leave it to the edge to know it by the Session-Id.
    for follow in [&["--follow-host"][..], &[]] {
        let common = ["diameter", "--target", &target, "--answer", &a, "--answer", &b];
        // The servers are found at the edge's next attempt.
        let work = ["--mix", "gx=2,gy=1,s6a=1", "--rate", "500", "--for", "2s", "--settle", "6s"];
        let (good, report) = load(&[&common[..], &work, follow].concat());
        assert_all_good(&report, good);
        let instances = report["instances"].as_object().map(serde_json::Map::len);
        assert_eq!(instances, Some(2), "{report:#}");
    }
    drop(edge);
}

#[test]
fn tcp_requests_connections_and_streams_pass() {
    let _alone = alone();
    let (edge, [_, _, tcp, .., db]) = edge();
    let (target, server) = (format!("tcp://127.0.0.1:{tcp}"), format!("tcp://127.0.0.1:{db}"));
    for kind in ["requests", "connects", "idle"] {
        let (good, report) = load(&[
            "tcp", "--target", &target, "--answer", &server, "--kind", kind, "--rate", "200",
            "--for", "1s",
        ]);
        assert_all_good(&report, good);
    }
    let (good, report) = load(&[
        "tcp", "--target", &target, "--answer", &server, "--kind", "streams", "--for", "1s",
    ]);
    assert!(good && report["counts"]["streamed_bytes"].as_u64() > Some(10 << 20), "{report:#}");
    drop(edge);
}

#[test]
fn what_goes_wrong_is_told() {
    let _alone = alone();
    let (edge, [sip, ..]) = edge();
    // Nobody answers: every call fails, and the report says how.
    let target = format!("udp://127.0.0.1:{sip}");
    let (good, report) =
        load(&["sip", "--target", &target, "--rate", "20", "--for", "1s", "--timeout", "1s"]);
    assert!(!good);
    let failed: u64 =
        report["failed"].as_object().expect("a map").values().filter_map(Value::as_u64).sum();
    assert_eq!((report["good"].as_u64(), failed), (Some(0), 20), "{report:#}");
    drop(edge);
}

/// The floor carries the same loads.
#[test]
fn the_bare_forwarders_forward() {
    let _alone = alone();
    let (udp, udp_to, tcp, tcp_to) = (free_port(), free_port(), free_port(), free_port());
    let folder = tempfile::TempDir::new().expect("a folder");
    let mut floors = Vec::new();
    for (scheme, from, to) in [("udp", udp, udp_to), ("tcp", tcp, tcp_to)] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_strowger"));
        let (from, to) =
            (format!("{scheme}://127.0.0.1:{from}"), format!("{scheme}://127.0.0.1:{to}"));
        command.args(["load", "floor", "--for", "60s", "--listen", &from, "--to", &to]);
        floors.push(crate::harness::Process::spawn(&mut command, &folder.path().join(scheme)));
    }
    crate::harness::wait_for_tcp(tcp);
    let (target, answer) = (format!("udp://127.0.0.1:{udp}"), format!("udp://127.0.0.1:{udp_to}"));
    let (good, report) =
        load(&["sip", "--target", &target, "--answer", &answer, "--rate", "200", "--for", "1s"]);
    assert_all_good(&report, good);
    let (target, answer) = (format!("tcp://127.0.0.1:{tcp}"), format!("tcp://127.0.0.1:{tcp_to}"));
    for kind in ["requests", "connects"] {
        let (good, report) = load(&[
            "tcp",
            "--target",
            &target,
            "--answer",
            &answer,
            "--kind",
            kind,
            "--rate",
            "200",
            "--for",
            "1s",
            "--answer-bytes",
            "200000",
        ]);
        assert_all_good(&report, good);
    }
}
