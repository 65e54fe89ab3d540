//! TLS before CER (RFC 6733 13.1) with stacks that are not ours on both sides, each with a certificate
//! for its own identity; and Diameter over IPv6.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use strowger_diameter::avp::{FLAG_REQUEST, Summary};
use tempfile::TempDir;

use super::freediameter::{self, Kit};
use super::stacks::{compile_otp, erl, is_content, python, verdict};
use super::{HEAD, until_up};
use crate::diameter::{Connection, capabilities, ccr};
use crate::harness::{Edge, alone, free_port, has, wait_for_tcp};
use crate::tls::Authority;

/// The options of Erlang's ssl for a peer that shows its certificate and wants the other's.
fn ssl(name: &str, more: &str) -> String {
    format!(
        "{{ssl_options, true}}, {{certfile, \"{name}.pem\"}}, {{keyfile, \"{name}.key\"}}, {{cacertfile, \"ca.pem\"}}, {{verify, verify_peer}}{more}"
    )
}

fn openssl_knows(folder: &Path, name: &str) {
    let file = format!("{name}.pem");
    let output = Command::new("openssl")
        .args(["verify", "-CAfile", "ca.pem", &file])
        .current_dir(folder)
        .output()
        .expect("openssl runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn tls_with_real_peers_on_both_sides() {
    if !freediameter::is_here() || !has("python3") || !has("erl") || !has("erlc") {
        return;
    }
    let _alone = alone();
    let folder = TempDir::new().expect("a folder");
    let path = folder.path();
    let authority = Authority::new(path, "ca");
    for name in ["a", "b", "edge", "front", "otp-client"] {
        authority.issue(path, name, &[&format!("{name}.example.net")]);
        openssl_knows(path, name);
    }
    compile_otp(path);
    let kit = Kit::new(path);
    let first = kit.start_over_tls("a", true, &[]);
    let second = free_port();
    let server = format!(
        "otp_peer:server({second}, \"b.example.net\", [{}]).",
        ssl("b", ", {fail_if_no_peer_cert, true}")
    );
    let _second = erl(path, "b", &server);
    wait_for_tcp(second);
    let port = free_port();
    let file = |name: &str| path.join(name).display().to_string();
    let yaml = format!(
        "{HEAD}listeners:
  - name: dra
    protocol: diameter
    bind: [tls://127.0.0.1:{port}]
    tls: {{ certificates: [ {{ certificate: {cert}, key: {key} }} ], client_ca: {ca} }}
    options: {{ origin_host: edge.example.net, answer_timeout: 20s, applications: [acct] }}
    pool: servers
pools:
  servers:
    balance: round-robin
    tls: {{ ca: {ca}, certificate: {cert}, key: {key} }}
    backends:
      - {{ id: a, address: tls://127.0.0.1:{first}, origin_host: a.example.net }}
      - {{ id: b, address: tls://127.0.0.1:{second}, origin_host: b.example.net }}
",
        cert = file("edge.pem"),
        key = file("edge.key"),
        ca = file("ca.pem"),
        first = first.port,
    );
    let edge = Edge::start(&yaml);
    edge.until("the servers to be up", |edge| {
        let up = |id| edge.instance("servers", id)["health"] == "up";
        up("a") && up("b") || {
            assert!(!first.log().contains("ERROR  Fatal"), "{}", first.log());
            false
        }
    });
    until_up(&edge, &["a", "b"]);
    // freeDiameter as a relay in front of the edge; behind it a client in clear.
    let front = kit.start_over_tls("front", false, &[("edge", port)]);
    edge.until("freeDiameter to be let in", |edge| {
        let peers = edge.json("/api/v1/peers");
        let mut peers = peers["peers"].as_array().expect("a list").iter();
        peers.any(|peer| peer["identity"] == "front.example.net" && peer["state"] == "open")
    });
    let mut client = python(path, front.clear, "client", "acct", 100);
    let mut other = erl(
        path,
        "otp-client",
        &format!(
            "otp_peer:client({port}, 100, \"otp-client.example.net\", 5, [{}]).",
            ssl("otp-client", ", {server_name_indication, \"edge.example.net\"}")
        ),
    );
    is_content(&verdict(path, &mut client, "client"), 500, "");
    let code = other.wait(Duration::from_secs(120));
    let log = fs::read_to_string(path.join("otp-client.log")).unwrap_or_default();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("500 answered"), "{log}");
    for id in ["a", "b"] {
        let requests = edge.instance("servers", id)["requests"].as_u64();
        assert!(requests.is_some_and(|count| count > 100), "{id}: {requests:?}");
    }
    for side in ["client", "backend"] {
        let side = format!("side=\"{side}\"");
        assert!(edge.metric("strowger_tls_handshakes_total", &[&side]) >= 2.0, "{side}");
    }
}

/// Client, edge and server over IPv6.
#[test]
fn over_ipv6() {
    let server = free_port();
    let Ok(listener) = TcpListener::bind(("::1", server)) else {
        return println!("skipped: no IPv6 on the loopback");
    };
    let _alone = alone();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || {
                let mut connection = Connection::new(stream);
                while let Some(message) = connection.next_of_any() {
                    let header = super::header(&message);
                    if header.is_request() {
                        let answer = if header.command == super::CER {
                            capabilities(0, "a.example.net", Some(&header))
                        } else {
                            super::emitted::answer_to(&message, "a.example.net")
                        };
                        connection.send(&answer);
                    }
                }
            });
        }
    });
    let port = free_port();
    let yaml = super::config(port, &[("a", server)], "")
        .replace(&format!("tcp://127.0.0.1:{port}"), &format!("\"tcp://[::1]:{port}\""))
        .replace(&format!("tcp://127.0.0.1:{server}"), &format!("\"tcp://[::1]:{server}\""))
        .replace("[acct, gy]", "[gx]");
    let edge = Edge::start(&yaml);
    until_up(&edge, &["a"]);
    let mut connection =
        Connection::new(TcpStream::connect(format!("[::1]:{port}")).expect("the edge listens"));
    let host = "client.example.net";
    assert!(connection.send(&capabilities(FLAG_REQUEST, host, None)));
    let cea = connection.next().expect("a CEA");
    assert_eq!(Summary::of(&cea).result_code, Some(2_001));
    // Host-IP-Address is the address that the peer sees: family 2, ::1.
    let address = strowger_diameter::avp::Avps::of(&cea).flatten().find(|avp| avp.code == 257);
    let address = address.expect("a Host-IP-Address").data;
    assert!(address.len() == 18 && address.starts_with(&[0, 2]) && address.ends_with(&[1]));
    assert!(connection.send(&ccr("s;1", 1, host, None, 1)));
    assert_eq!(Summary::of(&connection.next().expect("an answer")).result_code, Some(2_001));
    let peers = edge.json("/api/v1/peers").to_string();
    assert!(peers.contains(&format!("[::1]:{server}")), "{peers}");
}
