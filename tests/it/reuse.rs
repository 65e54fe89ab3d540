//! An address that another instance takes within the lease of the one before: raw TCP and Diameter. (SIP:
//! `registry::sip_of_a_dead_instance_never_reaches_who_took_its_port`, and with agents in
//! `agent_sessions`.) Beside each, an edge that knows the address alone, as others do: there, the dead
//! one's messages do reach the newcomer.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::json;
use strowger_diameter::avp::Summary;

use crate::agent_support::edge;
use crate::diameter::{Server, ccr, client};
use crate::harness::{Edge, free_port, http};

/// An edge with leases, and a second listener and pool for the newcomer's application.
fn leased(port: u16, other: u16, protocol: &str, options: &str) -> Edge {
    let listener = |name: &str, port: u16, pool: &str| {
        format!(
            "  - {{ name: {name}, protocol: {protocol}, bind: [tcp://127.0.0.1:{port}], pool: {pool}{options} }}\n"
        )
    };
    Edge::start(&format!(
        "version: 1\nnode: {{ workers: 1 }}\nadmin: {{ listen: ADMIN }}\nlisteners:\n{}{}pools:\n  web: {{ debounce: 0, slow_start: 0, session: {{ ttl: 10m }} }}\n  other: {{ debounce: 0, slow_start: 0 }}\n",
        listener("web", port, "web"),
        listener("other", other, "other"),
    ))
}

fn put(edge: &Edge, pool: &str, id: &str, protocol: &str, port: u16) {
    let body = json!({
        "generation": 1, "lease_ttl_ms": 60_000, "state": "ready",
        "endpoints": [{ "protocol": protocol, "address": format!("tcp://127.0.0.1:{port}") }],
        "identity": { "diameter_origin_host": format!("{id}.example.net") },
    });
    let path = format!("/api/v1/pools/{pool}/instances/{id}?supersede=true");
    let answer = http(edge.admin, "PUT", &path, &body.to_string()).expect("an answer");
    assert_eq!(answer.0, 201, "{}", answer.1);
}

/// What was said to whoever is at a port now.
fn newcomer(port: u16) -> Arc<Mutex<Vec<u8>>> {
    let said = Arc::new(Mutex::new(Vec::new()));
    let listener = bound(port);
    let shared = Arc::clone(&said);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let said = Arc::clone(&shared);
            std::thread::spawn(move || {
                let mut buffer = [0; 4_096];
                while let Ok(length @ 1..) = stream.read(&mut buffer) {
                    said.lock().expect("not poisoned").extend_from_slice(&buffer[..length]);
                    let _gone = stream.write_all(b"y\n");
                }
            });
        }
    });
    said
}

/// Binds a port that somebody has just left.
fn bound(port: u16) -> TcpListener {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        match TcpListener::bind(("127.0.0.1", port)) {
            Ok(listener) => return listener,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn dial(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("it is accepted");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("an option");
    stream
}

/// Says something; what is answered, or nothing at the end.
fn say(stream: &mut TcpStream, text: &str) -> String {
    let mut buffer = [0; 64];
    if stream.write_all(text.as_bytes()).is_err() {
        return String::new();
    }
    let length = stream.read(&mut buffer).unwrap_or(0);
    String::from_utf8_lossy(&buffer[..length]).into_owned()
}

/// The client of a TCP instance that died comes again, and another application has its port by now.
#[test]
fn a_tcp_client_of_a_dead_instance_never_reaches_who_took_its_port() {
    let (web, other, by_address, port) = (free_port(), free_port(), free_port(), free_port());
    let leases = leased(web, other, "tcp", "");
    let fixed = Edge::start(&edge(free_port(), free_port(), by_address).replace(
        "web: { debounce: 0, slow_start: 0, balance: round-robin }",
        &format!("web: {{ backends: [{{ id: x, address: tcp://127.0.0.1:{port} }}] }}"),
    ));
    let listener = bound(port);
    put(&leases, "web", "x", "tcp", port);
    leases.until("x", |edge| edge.instance("web", "x")["state"] == "ready");
    let mut connections = Vec::new();
    for entry in [web, by_address] {
        let mut stream = dial(entry);
        stream.write_all(b"hello\n").expect("sent");
        let (mut own, _) = listener.accept().expect("X gets it");
        let mut buffer = [0; 6];
        own.read_exact(&mut buffer).expect("X reads it");
        own.write_all(b"x\n").expect("sent");
        let mut buffer = [0; 2];
        stream.read_exact(&mut buffer).expect("an answer");
        connections.push((stream, own));
    }
    // X dies: its connections end, and its port is free.
    drop(listener);
    let clients: Vec<TcpStream> = connections.into_iter().map(|(stream, _)| stream).collect();
    let said = newcomer(port);
    put(&leases, "other", "y", "tcp", port);
    leases.until("y", |edge| edge.instance("other", "y")["state"] == "ready");
    assert!(leases.log().contains("instance_superseded"), "{}", leases.log());
    for mut stream in clients {
        assert_eq!(say(&mut stream, "on the old connection\n"), "", "it is over");
    }
    for _ in 0..5 {
        assert_eq!(say(&mut dial(web), "secret of x\n"), "", "refused, not misdelivered");
    }
    assert_eq!(said.lock().expect("not poisoned").len(), 0, "nothing reached the newcomer");
    assert_eq!(say(&mut dial(other), "for y\n"), "y\n", "it lives, under its own name");
    // The contrast: by address alone, it is the newcomer's.
    fixed.until("the misdelivery", |_| {
        say(&mut dial(by_address), "secret of x\n") == "y\n"
            && String::from_utf8_lossy(&said.lock().expect("not poisoned")).contains("secret of x")
    });
}

/// A Gx session of a PCRF that died goes on, and another application's Diameter server has its port.
#[test]
fn a_diameter_session_of_a_dead_instance_never_reaches_who_took_its_port() {
    const UPDATE: u32 = 2;
    let (web, other, by_address, port) = (free_port(), free_port(), free_port(), free_port());
    let options = ", options: { origin_host: edge.example.net, origin_realm: example.net }";
    let leases = leased(web, other, "diameter", options);
    let fixed = Edge::start(&edge(free_port(), by_address, free_port()).replace(
        "pcrf: { debounce: 0, slow_start: 0 }",
        &format!("pcrf: {{ backends: [{{ id: x, address: tcp://127.0.0.1:{port} }}] }}"),
    ));
    let x = Server::start(port, "x.example.net");
    put(&leases, "web", "x", "diameter", port);
    leases.until("x", |edge| edge.instance("web", "x")["health"] == "up");
    fixed.until("x", |edge| edge.instance("pcrf", "x")["health"] == "up");
    let mut pinned = client(web, "gw.example.net");
    let mut unpinned = client(by_address, "gw.example.net");
    let ask = |connection: &mut crate::diameter::Connection, kind, host: Option<&str>, number| {
        assert!(connection.send(&ccr("gw.example.net;1;1", kind, "gw.example.net", host, number)));
        let answer = connection.next().expect("an answer");
        let summary = Summary::of(&answer);
        let host = String::from_utf8_lossy(summary.origin_host.unwrap_or_default()).into_owned();
        (summary.result_code.unwrap_or(0), host)
    };
    for connection in [&mut pinned, &mut unpinned] {
        let (result, host) = ask(connection, 1, None, 10);
        assert_eq!((result, host.as_str()), (2_001, "x.example.net"));
    }
    x.kill();
    // Its listener ends with the next connection.
    let _last = TcpStream::connect(("127.0.0.1", port));
    drop(bound(port));
    let y = Server::start(port, "y.example.net");
    put(&leases, "other", "y", "diameter", port);
    leases.until("y", |edge| edge.instance("other", "y")["health"] == "up");
    assert!(leases.log().contains("instance_superseded"), "{}", leases.log());
    for (number, host) in [(20, Some("x.example.net")), (21, None), (22, Some("x.example.net"))] {
        let (result, host) = ask(&mut pinned, UPDATE, host, number);
        assert!(result >= 3_000 && host != "y.example.net", "{result} by {host}");
    }
    assert_eq!(y.requests().len(), 0, "nothing reached the newcomer");
    let (result, host) = ask(&mut client(other, "gw2.example.net"), 1, None, 30);
    assert_eq!((result, host.as_str()), (2_001, "y.example.net"), "it lives, under its own name");
    let before = y.requests().len();
    // The contrast: by address alone, it is the newcomer's.
    let mut number = 40;
    let end = Instant::now() + Duration::from_secs(60);
    while y.requests().len() == before {
        assert!(Instant::now() < end, "the edge that knows the address alone found it no more");
        number += 1;
        ask(&mut unpinned, UPDATE, None, number);
        std::thread::sleep(Duration::from_millis(200));
    }
}
