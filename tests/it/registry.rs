//! Leased instances through the real binary.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{Edge, free_port, http};

fn config(sip: u16, more: &str) -> String {
    format!(
        "version: 1\nnode: {{ workers: 1 }}\nadmin: {{ listen: ADMIN }}\n{more}\nlisteners:\n  - {{ name: sip, protocol: sip, bind: [udp://127.0.0.1:{sip}], pool: ims }}\npools:\n  ims: {{ debounce: 0 }}\n"
    )
}

fn body(generation: u64, port: u16) -> String {
    json!({
        "generation": generation, "lease_ttl_ms": 2_000, "state": "ready",
        "endpoints": [{ "protocol": "sip", "address": format!("udp://127.0.0.1:{port}") }],
        "release": "sha256:00", "locality": { "host": "h1", "zone": "a", "cpus": "1" },
    })
    .to_string()
}

fn call(edge: &Edge, method: &str, path: &str, body: &str) -> (u16, Value) {
    let (code, body) = http(edge.admin, method, path, body).expect("the admin server answers");
    (code, serde_json::from_str(&body).unwrap_or(Value::Null))
}

fn put(edge: &Edge, id: &str, generation: u64, port: u16) -> (u16, Value) {
    call(edge, "PUT", &format!("/api/v1/pools/ims/instances/{id}"), &body(generation, port))
}

/// Registers, renews, drains, leaves; and what is refused, with the reason.
#[test]
fn the_lease_api() {
    let edge = Edge::start(&config(free_port(), ""));
    let (one, two) = (free_port(), free_port());
    let (code, answer) = put(&edge, "a", 7, one);
    assert_eq!(code, 201, "{answer}");
    assert_eq!((answer["ttl_ms"].as_u64(), answer["next_ms"].as_u64()), (Some(2_000), Some(666)));
    assert_eq!(put(&edge, "a", 7, one).0, 200);
    let (code, answer) = put(&edge, "a", 6, one);
    assert_eq!((code, answer["generation"].as_u64()), (412, Some(7)), "{answer}");
    let (code, answer) = put(&edge, "b", 1, one);
    assert_eq!((code, answer["holder"]["instance"].as_str()), (409, Some("a")), "{answer}");
    assert_eq!(put(&edge, "b", 1, two).0, 201);
    // The same name on another host is another instance.
    let elsewhere = body(8, two).replace("h1", "h2");
    let (code, answer) = call(&edge, "PUT", "/api/v1/pools/ims/instances/a", &elsewhere);
    assert_eq!((code, answer["host"].as_str()), (409, Some("h1")), "{answer}");
    // What no listener of the pool could be sent to is told at once.
    let unfit = body(1, free_port()).replace("\"sip\"", "\"diameter\"").replace("udp:", "tcp:");
    let (code, answer) = call(&edge, "PUT", "/api/v1/pools/ims/instances/d", &unfit);
    assert!((400..500).contains(&code) && answer.to_string().contains("sip"), "{code} {answer}");
    let lease = "/api/v1/pools/ims/instances/a/lease";
    let (code, answer) = call(&edge, "PATCH", lease, "{\"load\":37,\"state\":\"ready\"}");
    assert_eq!((code, answer["sessions"].as_u64()), (200, Some(0)), "{answer}");
    for field in ["ttl_ms", "next_ms", "router_id", "epoch", "deadline_miss_ppm", "p99_ms"] {
        assert!(!answer[field].is_null(), "{field}: {answer}");
    }
    assert_eq!(edge.instance("ims", "a")["load"], 37);
    let (code, answer) = call(&edge, "PATCH", "/api/v1/pools/ims/instances/x/lease", "");
    assert_eq!(code, 404, "{answer}");
    let (code, answer) = call(&edge, "PUT", "/api/v1/pools/none/instances/a", &body(1, two));
    assert_eq!((code, answer["pools"][0].as_str()), (404, Some("ims")), "{answer}");
    for (wrong, word) in [
        ("{}", "generation"),
        ("{\"generation\":1,\"endpoints\":[]}", "endpoints"),
        ("{\"generation\":1,\"weight\":70000,\"endpoints\":[]}", "weight"),
        (
            "{\"generation\":1,\"endpoints\":[{\"protocol\":\"sip\",\"address\":\"x\"}]}",
            "transport",
        ),
        ("{\"generation\":1,\"wieght\":1,\"endpoints\":[]}", "wieght"),
    ] {
        let (code, answer) = call(&edge, "PUT", "/api/v1/pools/ims/instances/w", wrong);
        assert_eq!(code, 400, "{wrong}");
        assert!(answer["detail"].as_str().is_some_and(|text| text.contains(word)), "{answer}");
    }
    let drain = "/api/v1/pools/ims/instances/b/drain";
    assert_eq!(call(&edge, "POST", drain, "{\"deadline_s\":3600}").0, 202);
    assert_eq!(put(&edge, "b", 1, two).0, 200);
    assert!(
        ["draining", "gone"]
            .contains(&edge.instance("ims", "b")["state"].as_str().unwrap_or_default())
    );
    assert_eq!(call(&edge, "DELETE", "/api/v1/pools/ims/instances/b", "").0, 204);
    edge.until("b to leave", |edge| edge.instance("ims", "b").is_null());
    let (_, metrics) = edge.get("/metrics").expect("metrics");
    assert!(metrics.contains("strowger_registrations_total{outcome=\"stale\",provider=\"api\"} 1"));
}

/// A lease that is not renewed: with one of three, it is suspended and then gone.
#[test]
fn who_is_not_heard_of_is_suspended_then_gone() {
    let edge = Edge::start(&config(free_port(), ""));
    for id in ["a", "b", "c"] {
        assert_eq!(put(&edge, id, 1, free_port()).0, 201);
    }
    let renew = |edge: &Edge| {
        for id in ["a", "b"] {
            let path = format!("/api/v1/pools/ims/instances/{id}/lease");
            assert_eq!(call(edge, "PATCH", &path, "").0, 200, "{}", edge.log());
        }
    };
    edge.until("suspension", |edge| {
        renew(edge);
        edge.instance("ims", "c")["state"] == "suspended"
    });
    edge.until("the end", |edge| {
        renew(edge);
        edge.instance("ims", "c").is_null()
    });
    assert_eq!(edge.instance("ims", "a")["state"], "ready");
    assert_eq!(edge.metric("strowger_leases_lapsed_total", &["pool=\"ims\""]), 1.0);
}

/// Everybody falls silent: the last state stays. A reload and a crash of the edge forget nobody.
#[test]
fn a_lost_control_plane_a_reload_and_a_crash_forget_nobody() {
    let folder = tempfile::TempDir::new().expect("a folder");
    let state = folder.path().join("leases.json");
    let sip = free_port();
    let yaml = config(sip, &format!("registry: {{ state_file: {} }}", state.display()));
    let mut edge = Edge::start(&yaml);
    for id in ["a", "b", "c"] {
        assert_eq!(put(&edge, id, 1, free_port()).0, 201);
    }
    let epoch = call(&edge, "PATCH", "/api/v1/pools/ims/instances/a/lease", "").1["epoch"].clone();
    edge.until("the guard", |edge| edge.log().contains("leases_held"));
    let is_ready =
        |edge: &Edge| ["a", "b", "c"].iter().all(|id| edge.instance("ims", id)["state"] == "ready");
    std::thread::sleep(Duration::from_secs(7));
    assert!(is_ready(&edge), "longer than lease and grace: {}", edge.log());
    assert_eq!(edge.put_config(&yaml.replace("debounce: 0", "slow_start: 1s")).0, 200);
    assert!(is_ready(&edge), "after a reload");
    edge.process.kill();
    let edge = Edge::start(&yaml);
    assert!(is_ready(&edge), "after a crash: {}", edge.log());
    let reply = call(&edge, "PATCH", "/api/v1/pools/ims/instances/a/lease", "").1;
    assert_eq!(reply["epoch"], epoch, "it lost nothing");
}

/// What cannot be written down is not answered as if it were; it is in force, and written down as soon as
/// that can be.
#[test]
fn a_state_file_that_cannot_be_written_is_told_to_who_registers() {
    let folder = tempfile::TempDir::new().expect("a folder");
    let place = folder.path().join("state");
    std::fs::create_dir(&place).expect("made");
    let file = place.join("leases.json");
    let yaml = config(free_port(), &format!("registry: {{ state_file: {} }}", file.display()));
    let mut edge = Edge::start(&yaml);
    let of = |id: &str| format!("/api/v1/pools/ims/instances/{id}");
    let register = |edge: &Edge, id: &str, port: u16| {
        call(edge, "PUT", &of(id), &body(1, port).replace("2000", "600000"))
    };
    let (one, two) = (free_port(), free_port());
    assert_eq!(register(&edge, "a", one).0, 201);
    std::fs::remove_dir_all(&place).expect("it was there");
    for _ in 0..3 {
        let (code, answer) = register(&edge, "b", two);
        let detail = answer["detail"].as_str().unwrap_or_default();
        assert!(code == 503 && detail.contains("No such file"), "{code} {answer}");
    }
    assert_eq!(call(&edge, "DELETE", &of("a"), "").0, 503);
    assert_eq!(edge.instance("ims", "b")["state"], "ready", "it is in force");
    let beat = call(&edge, "PATCH", &format!("{}/lease", of("b")), "");
    assert_eq!(beat.0, 200, "{}", beat.1);
    let counted = ["provider=\"api\"", "outcome=\"not_kept\""];
    assert_eq!(edge.metric("strowger_registrations_total", &counted), 4.0);
    std::fs::create_dir(&place).expect("made");
    edge.until("the file", |_| file.exists());
    edge.until("it to be told", |edge| edge.log().contains("registry_state_written_again"));
    assert_eq!(register(&edge, "b", two).0, 200);
    assert_eq!(edge.log().matches("registry_state_not_written").count(), 1, "{}", edge.log());
    edge.process.kill();
    let edge = Edge::start(&yaml);
    assert_eq!(edge.instance("ims", "b")["state"], "ready", "{}", edge.log());
    assert!(edge.instance("ims", "a").is_null());
}

/// A drain goes on over a crash of the edge: it does not end for want of sessions that the edge has not
/// heard of again, but when it was to end.
#[test]
fn a_drain_ends_when_it_was_to_end_whatever_happens_between() {
    let folder = tempfile::TempDir::new().expect("a folder");
    let state = folder.path().join("leases.json");
    let yaml = config(free_port(), &format!("registry: {{ state_file: {} }}", state.display()));
    let mut edge = Edge::start(&yaml);
    // Nobody is there to be probed: only order and time count. `b` is not drained.
    let register = |edge: &Edge, id: &str| {
        let path = format!("/api/v1/pools/ims/instances/{id}");
        let text = body(1, free_port()).replace("2000", "600000");
        assert_eq!(call(edge, "PUT", &path, &text).0, 201);
    };
    register(&edge, "a");
    register(&edge, "b");
    edge.process.kill();
    let text = std::fs::read_to_string(&state).expect("written");
    let mut leases: Value = serde_json::from_str(&text).expect("JSON");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("now");
    let until = now.as_millis() as u64 + 12_000;
    let of_a = leases["instances"].as_array_mut().expect("a list").iter_mut();
    for lease in of_a.filter(|lease| lease[1] == "a") {
        lease[2]["draining"] = true.into();
        lease[2]["drain_until"] = until.into();
    }
    std::fs::write(&state, leases.to_string()).expect("written");
    let edge = Edge::start(&yaml);
    assert_eq!(edge.instance("ims", "a")["state"], "draining", "{}", edge.log());
    edge.until("the deadline", |edge| {
        let gone = ["gone", "down"].iter().any(|word| edge.instance("ims", "a")["state"] == *word);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("now");
        assert!(!gone || now.as_millis() as u64 >= until, "not before its time");
        gone || edge.log().contains("drain_ended")
    });
    assert_eq!(edge.instance("ims", "b")["state"], "ready");
}

/// YAML and leases make one pool; where both have an id or an address, YAML wins.
#[test]
fn yaml_and_leases_are_one_pool() {
    let (fixed, leased) = (free_port(), free_port());
    let base = config(free_port(), "");
    let yaml = base.replace(
        "{ debounce: 0 }",
        &format!("{{ debounce: 0, backends: [{{ id: y, address: udp://127.0.0.1:{fixed} }}] }}"),
    );
    let edge = Edge::start(&yaml);
    assert_eq!(put(&edge, "y", 1, leased).0, 409);
    assert_eq!(put(&edge, "l", 1, fixed).0, 409);
    assert_eq!(put(&edge, "l", 1, leased).0, 201);
    let ids = |edge: &Edge| {
        let pool = edge.json("/api/v1/pools/ims");
        let mut ids: Vec<String> = pool["backends"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|it| format!("{}@{}", it["id"].as_str().unwrap_or(""), it["generation"]))
            .collect();
        ids.sort();
        ids
    };
    assert_eq!(ids(&edge), ["l@1", "y@0"]);
    let taken = yaml.replace("id: y", "id: l");
    assert_eq!(edge.put_config(&taken).0, 200);
    edge.until("YAML to win", |edge| ids(edge) == ["l@0"]);
    assert!(edge.log().contains("lease_shadowed"));
}

/// Tokens with rights on pools.
#[test]
fn a_token_may_what_its_line_says() {
    let folder = tempfile::TempDir::new().expect("a folder");
    let file = folder.path().join("tokens.yaml");
    let tokens = "tokens:\n  - { name: agent, token: aaaaaaaaaaaaaaaa, pools: [ims], rights: [register] }\n  - { name: eyes, token: bbbbbbbbbbbbbbbb, rights: [read] }\n  - { name: hands, token: cccccccccccccccc, pools: [ims], rights: [drain] }\n";
    std::fs::write(&file, tokens).expect("written");
    let yaml = config(free_port(), "")
        .replace("listen: ADMIN", &format!("listen: ADMIN, permissions_file: {}", file.display()));
    let edge = Edge::start(&yaml);
    let ask = |token: &str, method: &str, path: &str, body: &str| {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(edge.admin).expect("connects");
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer.split(' ').nth(1).and_then(|code| code.parse::<u16>().ok()).unwrap_or(0)
    };
    let (agent, eyes) = ("aaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbb");
    let instance = "/api/v1/pools/ims/instances/a";
    assert_eq!(ask(agent, "PUT", instance, &body(1, free_port())), 201);
    assert_eq!(ask(agent, "PUT", "/api/v1/pools/other/instances/a", &body(1, 1)), 403);
    assert_eq!(ask(agent, "POST", &format!("{instance}/drain"), ""), 403);
    assert_eq!(ask(agent, "GET", "/api/v1/pools", ""), 403);
    let hands = "cccccccccccccccc";
    let named_so = "/api/v1/pools/ims/instances/drain";
    assert_eq!(ask(hands, "PUT", named_so, &body(1, free_port())), 403, "that is no drain");
    assert_eq!(ask(hands, "PUT", &format!("{instance}-undrain"), &body(1, free_port())), 403);
    assert!((200..300).contains(&ask(hands, "POST", &format!("{instance}/drain"), "")));
    assert_eq!(ask(eyes, "GET", "/api/v1/pools", ""), 200);
    assert_eq!(ask(eyes, "PUT", "/api/v1/config", "version: 1"), 403);
    assert_eq!(ask("wrong", "GET", "/api/v1/pools", ""), 401);
    assert_eq!(ask("", "GET", "/healthz", ""), 200);
}

/// A SIP user agent server that counts what it gets, by Call-ID.
struct Answerer {
    socket: UdpSocket,
}

impl Answerer {
    fn bind(port: u16) -> Self {
        let socket = UdpSocket::bind(("127.0.0.1", port)).expect("a free port");
        socket.set_read_timeout(Some(Duration::from_millis(1_500))).expect("set");
        Self { socket }
    }

    /// The next message, if one comes.
    fn receive(&self) -> Option<(String, SocketAddr)> {
        let mut buffer = [0; 65_536];
        let (length, from) = self.socket.recv_from(&mut buffer).ok()?;
        Some((String::from_utf8_lossy(&buffer[..length]).into_owned(), from))
    }
}

fn header<'a>(message: &'a str, name: &str) -> Vec<&'a str> {
    let lines = message.split("\r\n").take_while(|line| !line.is_empty());
    let of_name = lines.filter_map(|line| line.split_once(": "));
    of_name.filter(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value).collect()
}

fn answer(request: &str, code: &str, port: u16) -> String {
    let mut lines = vec![format!("SIP/2.0 {code}")];
    for name in ["Via", "Record-Route"] {
        lines.extend(header(request, name).iter().map(|value| format!("{name}: {value}")));
    }
    let to = header(request, "To")[0];
    let tag = if to.contains("tag=") { "" } else { ";tag=x" };
    lines.push(format!("From: {}", header(request, "From")[0]));
    lines.push(format!("To: {to}{tag}"));
    lines.push(format!("Call-ID: {}", header(request, "Call-ID")[0]));
    lines.push(format!("CSeq: {}", header(request, "CSeq")[0]));
    lines.push(format!("Contact: <sip:x@127.0.0.1:{port}>"));
    lines.push("Content-Length: 0\r\n\r\n".to_owned());
    lines.join("\r\n")
}

/// Instance X dies, and inside its lease another one is started on its port. Nothing of X's dialog
/// may reach the newcomer. A client that goes by the address alone, as others do, does reach it.
#[test]
fn sip_of_a_dead_instance_never_reaches_who_took_its_port() {
    let (sip, port) = (free_port(), free_port());
    let edge = Edge::start(&config(sip, ""));
    let x = Answerer::bind(port);
    assert_eq!(put(&edge, "x", 1, port).0, 201);
    let client = Answerer::bind(free_port());
    let local = client.socket.local_addr().expect("bound");
    let send = |method: &str, uri: &str, to: &str, routes: &[&str], sequence: u32| {
        let routes: String = routes.iter().map(|route| format!("Route: {route}\r\n")).collect();
        let text = format!(
            "{method} {uri} SIP/2.0\r\nVia: SIP/2.0/UDP {local};branch=z9hG4bK{method}{sequence};rport\r\n{routes}Max-Forwards: 70\r\nFrom: <sip:c@example.net>;tag=c\r\nTo: {to}\r\nCall-ID: reuse@test\r\nCSeq: {sequence} {method}\r\nContact: <sip:c@{local}>\r\nContent-Length: 0\r\n\r\n"
        );
        client.socket.send_to(text.as_bytes(), ("127.0.0.1", sip)).expect("sent");
        text
    };
    send("INVITE", "sip:s@example.net", "<sip:s@example.net>", &[], 1);
    let (invite, from) = x.receive().expect("X gets the call");
    x.socket.send_to(answer(&invite, "200 OK", port).as_bytes(), from).expect("sent");
    let mut accepted = String::new();
    while !accepted.starts_with("SIP/2.0 200") {
        accepted = client.receive().expect("the call is answered").0;
    }
    let mut routes = header(&accepted, "Record-Route");
    routes.reverse();
    let to = header(&accepted, "To")[0];
    let contact = header(&accepted, "Contact")[0].trim_matches(['<', '>']);
    send("ACK", contact, to, &routes, 1);
    x.receive().expect("X gets the ACK");
    assert_eq!(edge.instance("ims", "x")["sessions"], 1);
    // X dies; Y is on its port before the lease is over, and says so.
    drop(x);
    let y = Answerer::bind(port);
    let path = "/api/v1/pools/ims/instances/y?supersede=true";
    let (code, told) = call(&edge, "PUT", path, &body(1, port));
    assert_eq!(code, 201, "{told}");
    let bye = send("BYE", contact, to, &routes, 2);
    let (refusal, _) = client.receive().expect("the protocol's own words");
    assert!(refusal.starts_with("SIP/2.0 4") || refusal.starts_with("SIP/2.0 5"), "{refusal}");
    for _ in 0..3 {
        client.socket.send_to(bye.as_bytes(), ("127.0.0.1", sip)).expect("sent");
    }
    if let Some((stray, _)) = y.receive() {
        panic!("it reached the newcomer:\n{stray}");
    }
    assert!(edge.log().contains("instance_superseded"));
    // The contrast: by address alone, it is the newcomer's.
    client.socket.send_to(bye.as_bytes(), ("127.0.0.1", port)).expect("sent");
    assert!(y.receive().is_some_and(|(stray, _)| stray.contains("reuse@test")));
    // New calls are the newcomer's.
    send("OPTIONS", "sip:s@example.net", "<sip:s@example.net>", &[], 3);
    assert!(y.receive().is_some_and(|(new, _)| new.starts_with("OPTIONS")));
}

/// Who may register in one pool only takes no address from another pool's instance, however old;
/// and a registration does not make a configuration's epoch stale.
#[test]
fn rights_end_at_the_pool_and_leases_do_not_count_as_configuration() {
    let folder = tempfile::TempDir::new().expect("a folder");
    let tokens = folder.path().join("tokens.yaml");
    let text = "tokens:\n  - { name: ims, token: token-of-the-ims-pool, pools: [ims], rights: [read, register] }\n  - { name: all, token: token-of-all-the-pools, pools: [\"*\"], rights: [read, register, config] }\n";
    std::fs::write(&tokens, text).expect("written");
    let config = format!(
        "version: 1\nnode: {{ workers: 1 }}\nadmin: {{ listen: ADMIN, permissions_file: {} }}\nlisteners:\n  - {{ name: sip, protocol: sip, bind: [udp://127.0.0.1:{}], pool: ims }}\npools:\n  ims: {{}}\n  other: {{}}\n",
        tokens.display(),
        free_port()
    );
    let edge = Edge::start(&config);
    let asks = |token: &str, method: &str, path: &str, more: &str, body: &str| {
        let mut stream = std::net::TcpStream::connect(edge.admin).expect("it listens");
        use std::io::{Read, Write};
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: edge\r\nAuthorization: Bearer {token}\r\n{more}Connection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let code: u16 = answer[9..12].parse().expect("a status");
        (code, answer)
    };
    let (ims, all) = ("token-of-the-ims-pool", "token-of-all-the-pools");
    let port = free_port();
    let (_, answer) = asks(all, "GET", "/api/v1/config", "", "");
    let etag = answer.lines().find_map(|line| line.strip_prefix("etag: ")).expect("an ETag");
    let put = |token, path: &str| asks(token, "PUT", path, "", &body(1, port));
    assert_eq!(put(all, "/api/v1/pools/other/instances/theirs").0, 201);
    let (code, answer) = put(ims, "/api/v1/pools/ims/instances/mine?supersede=true");
    assert_eq!(code, 409, "{answer}");
    assert!(answer.contains("\"pool\":\"other\""), "{answer}");
    let (code, answer) = put(all, "/api/v1/pools/ims/instances/mine?supersede=true");
    assert_eq!(code, 201, "{answer}");
    let text = config.replace("ADMIN", &edge.admin.to_string());
    let (code, answer) =
        asks(all, "PUT", "/api/v1/config", &format!("If-Match: {etag}\r\n"), &text);
    assert_eq!(code, 200, "registrations came in between: {answer}");
    let (code, _) = asks(all, "PUT", "/api/v1/config", &format!("If-Match: {etag}\r\n"), &text);
    assert_eq!(code, 412, "that was a configuration");
}
