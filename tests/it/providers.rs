//! Providers of instances through the real binary: Cloud Foundry's messages over a real nats-server.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{Edge, Process, free_port, has};
use crate::nameserver::NameServer;
use crate::sip::phone::{Client, Server, status};
use crate::tls::Authority;

/// A nats-server that can be stopped and started at its port.
struct Nats {
    port: u16,
    folder: TempDir,
    process: Option<Process>,
}

impl Nats {
    fn start() -> Self {
        let folder = TempDir::new().expect("a folder");
        let mut nats = Self { port: free_port(), folder, process: None };
        nats.again();
        nats
    }

    /// One that speaks TLS to those who ask for it, and tells of its connections at `monitor`.
    fn secure(authority: &Authority, monitor: u16) -> Self {
        let folder = TempDir::new().expect("a folder");
        authority.issue(folder.path(), "nats", &["127.0.0.1"]);
        let mut nats = Self { port: free_port(), folder, process: None };
        let path = |file: &str| nats.folder.path().join(file).display().to_string();
        let text = format!(
            "http: \"127.0.0.1:{monitor}\"\ntls {{ cert_file: \"{}\", key_file: \"{}\" }}\nallow_non_tls: true\n",
            path("nats.pem"),
            path("nats.key")
        );
        std::fs::write(nats.folder.path().join("nats.conf"), text).expect("written");
        nats.again();
        nats
    }

    fn again(&mut self) {
        let mut command = Command::new("nats-server");
        command.args(["-a", "127.0.0.1", "-p", &self.port.to_string(), "--user", "cf"]);
        command.args(["--pass", "a-secret-word"]);
        let file = self.folder.path().join("nats.conf");
        if file.exists() {
            command.arg("-c").arg(file);
        }
        self.process = Some(Process::spawn(&mut command, &self.folder.path().join("nats.log")));
        for _ in 0..600 {
            if TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("nats-server does not listen");
    }

    fn stop(&mut self) {
        self.process = None;
    }

    fn client(&self) -> Bus {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).expect("nats-server listens");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("an option");
        let reader = BufReader::new(stream.try_clone().expect("a handle"));
        let mut bus = Bus { stream, reader };
        bus.say("CONNECT {\"verbose\":false,\"user\":\"cf\",\"pass\":\"a-secret-word\"}\r\n");
        bus
    }
}

/// A client of it that speaks the protocol by hand.
struct Bus {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
}

impl Bus {
    fn say(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).expect("sent");
    }

    fn publish(&mut self, subject: &str, body: &Value) {
        let body = body.to_string();
        self.say(&format!("PUB {subject} {}\r\n{body}\r\n", body.len()));
    }

    /// The body of the next message.
    fn next(&mut self) -> Value {
        loop {
            let mut line = String::new();
            assert!(self.reader.read_line(&mut line).expect("a line comes") > 0, "it closed");
            if line.starts_with("PING") {
                self.say("PONG\r\n");
            }
            if line.starts_with("MSG ") {
                let mut body = String::new();
                self.reader.read_line(&mut body).expect("a body");
                return serde_json::from_str(&body).expect("JSON");
            }
        }
    }
}

fn config(sip: u16, nats: u16, folder: &TempDir, more: &str) -> String {
    let file = folder.path().join("password");
    std::fs::write(&file, "a-secret-word\n").expect("written");
    let nobody = free_port();
    format!(
        "version: 1\nnode: {{ name: edge-1, workers: 1 }}\nadmin: {{ listen: ADMIN }}\n\
         providers:\n  cloud_foundry:\n    servers: [\"nats://127.0.0.1:{nats}\", \"nats://127.0.0.1:{nobody}\"]\n    \
         user: cf\n    password_file: {}\n    pools: {{ ims.apps.example: ims }}\n    {more}\n\
         listeners:\n  - {{ name: sip, protocol: sip, bind: [udp://127.0.0.1:{sip}], pool: ims }}\n\
         pools:\n  ims: {{ debounce: 0 }}\n",
        file.display()
    )
}

/// A registration as Diego's route emitter sends it, with our protocol.
fn register(id: &str, port: u16) -> Value {
    json!({
        "host": "127.0.0.1", "port": port, "protocol": "sip", "uris": ["ims.apps.example"],
        "app": "app-guid", "private_instance_id": id, "private_instance_index": "0",
        "availability_zone": "z1", "isolation_segment": "", "tags": { "component": "route-emitter" },
        "stale_threshold_in_seconds": 0, "endpoint_updated_at_ns": 1_700_000_000_000_000_000_i64,
    })
}

fn up(edge: &Edge) -> bool {
    edge.metric("strowger_provider_up", &["cloud_foundry"]) == 1.0
}

fn is_there(edge: &Edge, id: &str) -> bool {
    edge.instance("ims", id)["state"] == "ready"
}

/// Greet, start, register, take-over of an address, late and right farewells.
#[test]
fn cloud_foundrys_messages_over_a_real_server() {
    if !has("nats-server") {
        return;
    }
    let nats = Nats::start();
    let mut bus = nats.client();
    bus.say("SUB router.start 1\r\n");
    let folder = TempDir::new().expect("a folder");
    let sip = free_port();
    let edge = Edge::start(&config(sip, nats.port, &folder, ""));
    let start = bus.next();
    assert_eq!(start["minimumRegisterIntervalInSeconds"], 20, "{start}");
    assert_eq!(start["pruneThresholdInSeconds"], 120, "{start}");
    assert_eq!(start["hosts"][0], "127.0.0.1", "{start}");
    edge.until("connected", up);
    let mut asker = nats.client();
    asker.say("SUB _INBOX.a 2\r\nPUB router.greet _INBOX.a 0\r\n\r\n");
    assert_eq!(asker.next()["id"], start["id"], "a greeting is answered");
    let phone = Server::polite();
    let port = phone.address.port();
    let one = format!("one:{port}");
    bus.publish("router.register", &register("one", port));
    edge.until("registered", |edge| is_there(edge, &one));
    let mut caller = Client::udp(([127, 0, 0, 1], sip).into());
    let request = caller.request("OPTIONS", "sip:bob@example.net", "alice", "cf");
    caller.send(request.as_bytes());
    let answer = caller.final_answer(Duration::from_secs(30)).expect("an answer");
    assert_eq!(status(&answer), 200, "{answer}");
    // What is not ours, or no message at all, is refused in figures and nothing else.
    for body in [json!([]), json!({ "host": "127.0.0.1", "port": 1, "uris": ["other.example"] })] {
        bus.publish("router.register", &body);
    }
    edge.until("refused", |edge| {
        edge.metric("strowger_registrations_total", &["cloud_foundry", "malformed"]) == 1.0
            && edge.metric("strowger_registrations_total", &["cloud_foundry", "unmapped"]) == 1.0
    });
    // Another instance has the address now: the first one's late farewell is not its own.
    bus.publish("router.register", &register("two", port));
    let two = format!("two:{port}");
    edge.until("superseded", |edge| is_there(edge, &two) && !is_there(edge, &one));
    bus.publish("router.unregister", &register("one", port));
    edge.until("late", |edge| {
        edge.metric("strowger_registrations_total", &["late_farewell"]) == 1.0
    });
    assert!(is_there(&edge, &two));
    // What was overtaken on its way changes nothing: neither the farewell of a time before, nor the
    // one before at the same address (ABA), nor the instance itself once it has left.
    let at = |id: &str, changed: i64| {
        let mut message = register(id, port);
        message["endpoint_updated_at_ns"] = changed.into();
        message
    };
    const NOW: i64 = 1_800_000_000_000_000_000;
    bus.publish("router.register", &at("two", NOW));
    bus.publish("router.unregister", &at("two", NOW - 1));
    bus.publish("router.register", &at("one", NOW - 1));
    let overtaken = |edge: &Edge| edge.metric("strowger_registrations_total", &["out_of_order"]);
    edge.until("overtaken", |edge| overtaken(edge) == 2.0);
    assert!(is_there(&edge, &two) && !is_there(&edge, &one));
    // Somebody else's farewell is none of its own, however new it says it is.
    bus.publish("router.unregister", &at("one", NOW + 1_000));
    edge.until("late", |edge| {
        edge.metric("strowger_registrations_total", &["late_farewell"]) == 2.0
    });
    bus.publish("router.unregister", &at("two", NOW + 1));
    edge.until("left", |edge| !is_there(edge, &two));
    bus.publish("router.register", &at("two", NOW));
    edge.until("overtaken", |edge| overtaken(edge) == 3.0);
    assert!(!is_there(&edge, &two));
}

/// Two servers over TLS: each is found when the other is gone.
#[test]
fn the_bus_is_reached_over_tls_and_the_other_server_takes_over() {
    if !has("nats-server") {
        return;
    }
    let monitor = free_port();
    let folder = TempDir::new().expect("a folder");
    let authority = Authority::new(folder.path(), "ca");
    let mut one = Nats::secure(&authority, monitor);
    let mut two = Nats::secure(&authority, free_port());
    let ca = folder.path().join("ca.pem");
    let yaml = config(free_port(), two.port, &folder, &format!("ca: {}", ca.display()));
    let first =
        format!("servers: [\"tls://127.0.0.1:{}\", \"tls://127.0.0.1:{}\"]", one.port, two.port);
    let begin = yaml.find("servers:").expect("servers");
    let end = begin + yaml[begin..].find('\n').expect("a line");
    two.stop();
    let edge = Edge::start(&format!("{}{first}{}", &yaml[..begin], &yaml[end..]));
    edge.until("connected", up);
    let told = crate::harness::http(([127, 0, 0, 1], monitor).into(), "GET", "/connz", "");
    let (_, told) = told.expect("nats-server's monitor answers");
    assert!(told.contains("\"tls_version\""), "{told}");
    let registered = |nats: &Nats, id: &str| {
        let port = free_port();
        let mut bus = nats.client();
        bus.publish("router.register", &register(id, port));
        edge.until(id, |edge| {
            // The edge may be about to subscribe yet.
            bus.publish("router.register", &register(id, port));
            is_there(edge, &format!("{id}:{port}"))
        });
    };
    registered(&one, "one");
    one.stop();
    edge.until("the loss", |edge| !up(edge));
    two.again();
    edge.until("connected to the other", up);
    registered(&two, "two");
    two.stop();
    one.again();
    edge.until("connected to the first", |edge| edge.log().matches("provider_up").count() >= 3);
    registered(&one, "one-again");
}

/// The bus is gone for longer than any lease: nothing lapses, calls go on, and everybody gets a
/// fresh term when it is back. Then all farewells are lost: who is dead goes by his lease.
#[test]
fn the_bus_may_go_and_farewells_may_be_lost() {
    if !has("nats-server") {
        return;
    }
    let mut nats = Nats::start();
    let folder = TempDir::new().expect("a folder");
    let sip = free_port();
    let short = "stale_threshold: 3s\n    register_interval: 1s";
    let edge = Edge::start(&config(sip, nats.port, &folder, short));
    edge.until("connected", up);
    let (phone, other) = (Server::polite(), Server::polite());
    let ids = [("one", phone.address.port()), ("two", other.address.port())];
    let mut bus = nats.client();
    for (id, port) in ids {
        bus.publish("router.register", &register(id, port));
    }
    let all = |edge: &Edge| ids.iter().all(|(id, port)| is_there(edge, &format!("{id}:{port}")));
    edge.until("registered", all);
    nats.stop();
    edge.until("told", |edge| !up(edge) && edge.log().contains("provider_down"));
    let lapses = |edge: &Edge| edge.metric("strowger_leases_lapsed_total", &[]);
    let mut caller = Client::udp(([127, 0, 0, 1], sip).into());
    // Two minutes with STROWGER_FULL=1; else longer than two leases.
    let away = if std::env::var_os("STROWGER_FULL").is_some() { 120 } else { 7 };
    let end = std::time::Instant::now() + Duration::from_secs(away);
    let mut number = 0;
    while std::time::Instant::now() < end {
        number += 1;
        let call = format!("without-bus-{number}");
        let request = caller.request("OPTIONS", "sip:bob@example.net", "alice", &call);
        caller.send(request.as_bytes());
        let answer = caller.final_answer(Duration::from_secs(30)).expect("an answer");
        assert_eq!(status(&answer), 200, "{answer}");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(all(&edge), "two leases have passed, and nothing lapsed");
    assert_eq!(lapses(&edge), 0.0);
    nats.again();
    let mut bus = nats.client();
    bus.say("SUB router.start 1\r\n");
    edge.until("connected again", up);
    // One of them registers on; the other is dead and his farewell was lost.
    let (alive, dead) = (format!("one:{}", ids[0].1), format!("two:{}", ids[1].1));
    drop(other);
    edge.until("the dead one lapsed", |edge| {
        bus.publish("router.register", &register("one", ids[0].1));
        edge.instance("ims", &dead)["state"] != "ready"
    });
    edge.until("the dead one is gone", |edge| {
        bus.publish("router.register", &register("one", ids[0].1));
        edge.instance("ims", &dead).is_null() || edge.instance("ims", &dead)["state"] == "gone"
    });
    assert!(is_there(&edge, &alive));
}

/// SRV records feed a pool; what they no longer name is suspended and then gone; an emptied zone
/// and a mute name server change nothing.
#[test]
fn dns_feeds_a_pool() {
    let names = NameServer::start();
    names.ttl(1);
    let (one, two) = (Server::polite(), Server::polite());
    let ports = [one.address.port(), two.address.port()];
    names.a("host.ims.test.", "127.0.0.1");
    for port in ports {
        names.srv("_sip._udp.ims.test.", 1, 10, port, "host.ims.test.");
    }
    let sip = free_port();
    let yaml = |pool: &str| {
        format!(
            "version: 1\nnode: {{ workers: 1 }}\nadmin: {{ listen: ADMIN }}\n\
             dns: {{ servers: [\"{}\"], query_timeout: 300ms, timeout: 1s }}\n\
             listeners:\n  - {{ name: sip, protocol: sip, bind: [udp://127.0.0.1:{sip}], pool: ims }}\n\
             pools:\n  ims: {{ debounce: 0{pool} }}\n",
            names.address
        )
    };
    let fed = ", dns: { name: _sip._udp.ims.test, transport: udp, grace: 3s }";
    let edge = Edge::start(&yaml(fed));
    let id = |index: usize| format!("127.0.0.1:{}", ports[index]);
    edge.until("both", |edge| is_there(edge, &id(0)) && is_there(edge, &id(1)));
    let mut caller = Client::udp(([127, 0, 0, 1], sip).into());
    for number in 0..10 {
        let call = format!("dns-{number}");
        let request = caller.request("OPTIONS", "sip:bob@example.net", "alice", &call);
        caller.send(request.as_bytes());
        let answer = caller.final_answer(Duration::from_secs(30)).expect("an answer");
        assert_eq!(status(&answer), 200, "{answer}");
    }
    let down = |edge: &Edge| edge.metric("strowger_provider_up", &["dns:ims"]) == 0.0;
    names.mute(true);
    edge.until("told of silence", down);
    assert!(is_there(&edge, &id(0)) && is_there(&edge, &id(1)));
    names.mute(false);
    edge.until("heard again", |edge| !down(edge));
    names.remove("_sip._udp.ims.test.");
    edge.until("told of an empty zone", down);
    assert!(is_there(&edge, &id(0)) && is_there(&edge, &id(1)), "an empty zone is a mistake");
    names.srv("_sip._udp.ims.test.", 1, 10, ports[0], "host.ims.test.");
    edge.until("suspended", |edge| edge.instance("ims", &id(1))["state"] == "suspended");
    assert!(is_there(&edge, &id(0)));
    edge.until("gone", |edge| edge.instance("ims", &id(1)).is_null());
    assert!(is_there(&edge, &id(0)));
    // The operator takes the provider away: what it named goes with it.
    assert_eq!(edge.put_config(&yaml("")).0, 200);
    edge.until("taken away", |edge| edge.instance("ims", &id(0)).is_null());
}

/// Cloud Foundry's routing API: routes become instances of the listener's pool, with its events, its
/// order of versions, its conflicts, and their end by time.
#[test]
fn tcp_routes_as_cloud_foundrys_clients_send_them() {
    let front = free_port();
    let edge = Edge::start(&format!(
        "version: 1\nnode: {{ workers: 1 }}\nadmin: {{ listen: ADMIN }}\nproviders: {{ tcp_routes: {{ router_group: g }} }}\n\
         listeners:\n  - {{ name: db, protocol: tcp, bind: [tcp://127.0.0.1:{front}], pool: db }}\n\
         pools:\n  db: {{ debounce: 0 }}\n"
    ));
    let app = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = app.local_addr().expect("bound").port();
    std::thread::spawn(move || {
        for stream in app.incoming() {
            let Ok(mut stream) = stream else { return };
            let _gone = stream.write_all(b"hello");
        }
    });
    let route = |instance: &str, ttl: u64, index: u32| {
        json!([{
            "router_group_guid": "g", "port": front, "backend_ip": "127.0.0.1", "backend_port": port,
            "instance_id": instance, "ttl": ttl, "modification_tag": { "guid": "m", "index": index },
            "isolation_segment": "", "backend_tls_port": null, "enable_backend_mtls": false,
        }])
        .to_string()
    };
    let (create, delete) = ("/routing/v1/tcp_routes/create", "/routing/v1/tcp_routes/delete");
    let mut events = TcpStream::connect(edge.admin).expect("it listens");
    events.set_read_timeout(Some(Duration::from_secs(30))).expect("an option");
    events
        .write_all(b"GET /routing/v1/tcp_routes/events HTTP/1.1\r\nHost: edge\r\n\r\n")
        .expect("sent");
    let mut heard = String::new();
    let mut hear = |word: &str| {
        let mut buffer = [0; 4_096];
        while !heard.contains(word) {
            let length = events.read(&mut buffer).expect("an event in time");
            assert!(length > 0, "it closed: {heard}");
            heard.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
    };
    hear("200 OK");
    let (code, body) = edge.post(create, &route("one", 60, 5));
    assert_eq!(code, 201, "{body}");
    hear("event: Upsert");
    let id = |name: &str| format!("{name}:{port}");
    let there = |edge: &Edge, name: &str| edge.instance("db", &id(name))["state"] == "ready";
    edge.until("registered", |edge| there(edge, "one"));
    let mut client = TcpStream::connect(("127.0.0.1", front)).expect("the edge listens");
    client.set_read_timeout(Some(Duration::from_secs(30))).expect("an option");
    let mut word = [0; 5];
    client.read_exact(&mut word).expect("the app speaks");
    assert_eq!(&word, b"hello");
    let listed = edge.json("/routing/v1/tcp_routes");
    assert_eq!((&listed[0]["port"], &listed[0]["ttl"]), (&json!(front), &json!(60)), "{listed}");
    assert_eq!(edge.json("/routing/v1/router_groups")[0]["guid"], "g");
    // Another instance on the address waits for its end; an old deletion is none.
    let (code, body) = edge.post(create, &route("two", 60, 6));
    assert_eq!(code, 409, "{body}");
    assert_eq!(edge.post(delete, &route("one", 60, 4)).0, 204);
    assert!(there(&edge, "one"), "it was for an earlier version");
    for (body, word) in [
        ("[{}]".to_owned(), "router_group_guid"),
        (route("one", 0, 7), "ttl"),
        (route("one", 121, 7), "ttl"),
        ("{".to_owned(), "ProcessRequestError"),
    ] {
        let (code, answer) = edge.post(create, &body);
        assert_eq!(code, 400, "{answer}");
        assert!(answer.contains(word), "{answer}");
    }
    assert_eq!(edge.post(delete, &route("one", 60, 5)).0, 204);
    hear("event: Delete");
    edge.until("left", |edge| edge.instance("db", &id("one")).is_null());
    // One that is created for two seconds and never again is deleted by time.
    assert_eq!(edge.post(create, &route("three", 2, 0)).0, 201);
    edge.until("over", |edge| edge.json("/routing/v1/tcp_routes") == json!([]));
}
