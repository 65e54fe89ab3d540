//! Kamailio behind and before the edge, a real telephone, and scanners at the door.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::caller::Callers;
use super::chaos::Instance;
use super::phone::{Client, Server, answer, headers, status};
use crate::harness::{Edge, Process, alone, free_port, has, until_bound};

const LIMIT: Duration = Duration::from_secs(20);

/// Kamailio: its children end only when it is asked to end, so it is, even if a test fails.
struct Kamailio(Process);

impl Drop for Kamailio {
    fn drop(&mut self) {
        self.0.terminate();
    }
}

/// Starts Kamailio with one of our configurations.
fn kamailio(folder: &Path, name: &str, port: u16, edge: u16) -> Kamailio {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/it/peers/{name}.cfg"));
    let text = fs::read_to_string(file).expect("a configuration");
    let text = text.replace("PORT", &port.to_string());
    let text = text.replace("EDGE", &format!("127.0.0.1:{edge}"));
    let run = folder.join(format!("kamailio-{port}"));
    fs::create_dir(&run).expect("a folder");
    let file = run.join("kamailio.cfg");
    fs::write(&file, text).expect("written");
    let mut command = Command::new("kamailio");
    command.args(["-DD", "-E", "-m", "32", "-M", "4", "-f"]).arg(&file);
    command.arg("-Y").arg(&run).arg("-P").arg(run.join("pid"));
    let log_file = folder.join(format!("kamailio-{port}.log"));
    let process = Kamailio(Process::spawn(&mut command, &log_file));
    until_bound(port, || format!("Kamailio does not start: {}", log(folder, port)));
    process
}

fn log(folder: &Path, port: u16) -> String {
    fs::read_to_string(folder.join(format!("kamailio-{port}.log"))).unwrap_or_default()
}

fn config(edge: u16, instance: u16, options: &str) -> String {
    format!(
        "version: 1\nnode: {{ name: test, workers: 2 }}\nadmin: {{ listen: ADMIN }}\nlisteners:\n  - name: sip\n    protocol: sip\n    bind: [udp://127.0.0.1:{edge}, tcp://127.0.0.1:{edge}]\n    pool: core\n    options: {{ {options} }}\npools:\n  core:\n    backends: [ {{ id: k, address: udp://127.0.0.1:{instance} }} ]\n"
    )
}

/// A client registers at Kamailio through the edge; a call to that user goes edge, Kamailio, edge,
/// client, and its ACK and BYE the same way, in both directions.
#[test]
fn a_call_to_a_user_whom_kamailio_registered() {
    if !has("kamailio") {
        return;
    }
    let _alone = alone();
    let (port, registrar) = (free_port(), free_port());
    let edge = Edge::start(&config(port, registrar, "cdr: true"));
    let _kamailio = kamailio(edge.folder.path(), "kamailio-registrar", registrar, port);
    let at = ([127, 0, 0, 1], port).into();
    // The callee registers from the very socket that it is called at.
    let mut callee = Client::udp(at);
    let register = callee.request("REGISTER", "sip:example.net", "bob", "reg");
    let register = register.replace("To: <sip:example.net>", "To: <sip:bob@example.net>");
    let register = register.replace("Contact:", "Supported: path\r\nExpires: 60\r\nContact:");
    // Nobody is reached there: what comes to the user has followed the Path.
    let register = register.replace(
        &format!("Contact: <sip:bob@{}>", callee.local()),
        "Contact: <sip:bob@192.0.2.77:5060>",
    );
    callee.send(register.as_bytes());
    let registered = callee.final_answer(LIMIT).expect("answered");
    assert_eq!(status(&registered), 200, "{registered}\n{}", log(edge.folder.path(), registrar));
    assert!(headers(&registered, "Contact", "m")[0].contains("bob@"), "{registered}");
    let mut caller = Client::udp(at);
    let invite = caller.request("INVITE", "sip:bob@example.net", "alice", "to-bob");
    caller.send(invite.as_bytes());
    let got = callee.receive(LIMIT).expect("an INVITE comes to the user");
    assert!(got.starts_with("INVITE sip:bob@192.0.2.77:5060 "), "{got}");
    // Caller, edge, Kamailio, edge: each wrote a Via.
    assert_eq!(headers(&got, "Via", "v").len(), 4, "{got}");
    let contact = format!("Contact: <sip:bob@{}>\r\n", callee.local());
    callee.send(answer(&got, 180, &contact).as_bytes());
    callee.send(answer(&got, 200, &contact).as_bytes());
    let ok = caller.final_answer(LIMIT).expect("answered");
    assert_eq!(status(&ok), 200, "{ok}");
    let routes: String = headers(&ok, "Record-Route", "")
        .into_iter()
        .flat_map(|value| value.split(',').map(str::trim))
        .rev()
        .map(|route| format!("Route: {route}\r\n"))
        .collect();
    let in_dialog = |method: &str, number: u32| {
        let to = headers(&ok, "To", "t")[0];
        format!(
            "{method} sip:bob@{} SIP/2.0\r\nVia: SIP/2.0/UDP {};rport;branch=z9hG4bKto-bob{method}\r\nMax-Forwards: 70\r\n{routes}From: <sip:alice@example.net>;tag=tto-bob\r\nTo: {to}\r\nCall-ID: to-bob\r\nCSeq: {number} {method}\r\nContent-Length: 0\r\n\r\n",
            callee.local(),
            caller.local(),
        )
    };
    let (ack, bye) = (in_dialog("ACK", 1), in_dialog("BYE", 2));
    caller.send(ack.as_bytes());
    let until = Instant::now() + LIMIT;
    let next = |callee: &mut Client, method: &str| loop {
        let left = until.saturating_duration_since(Instant::now());
        let message = callee.receive(left).unwrap_or_else(|| panic!("no {method} came"));
        if message.starts_with(method) {
            return message;
        }
    };
    next(&mut callee, "ACK ");
    caller.send(bye.as_bytes());
    let got = next(&mut callee, "BYE ");
    assert!(headers(&got, "Route", "").is_empty(), "{got}");
    callee.send(answer(&got, 200, "").as_bytes());
    let done = caller.receive_answer_to("BYE", LIMIT).expect("answered");
    assert_eq!(status(&done), 200, "{done}");
    edge.until("no call held", |edge| edge.instance("core", "k")["held"] == 0);
    // It passed twice: to the registrar, and from there to the user. Each leg's record ended.
    edge.until("no live call", |edge| edge.json("/api/v1/calls")["live"] == 0);
    assert_eq!(edge.metric("strowger_engine_panics_total", &[]), 0.0);
}

/// Callers, Kamailio, edge, Kamailio, instance: two proxies of another make, the edge between them.
#[test]
fn calls_between_two_kamailios_with_the_edge_between_them() {
    if !has("kamailio") {
        return;
    }
    let _alone = alone();
    let [port, before, behind, server] = [(); 4].map(|()| free_port());
    let edge = Edge::start(&config(port, behind, "cdr: true"));
    let folder = edge.folder.path();
    let _first = kamailio(folder, "kamailio-neighbour", before, port);
    let _second = kamailio(folder, "kamailio-neighbour", behind, server);
    let mut instance = Instance::new(server);
    instance.start(&edge, 0);
    let mut callers = Callers::new(([127, 0, 0, 1], before).into(), "between");
    let start = Instant::now();
    for call in 0..200 {
        callers.run_until(start + Duration::from_millis(15) * call);
        callers.begin(Instant::now(), Duration::from_millis(200));
    }
    while callers.open() > 0 {
        assert!(start.elapsed() < Duration::from_secs(90), "{} calls never end", callers.open());
        callers.run_until(Instant::now() + Duration::from_millis(50));
    }
    for (number, record) in callers.records().iter().enumerate() {
        let informed = !number.is_multiple_of(4) || record.code("INFO") == 200;
        assert!(
            (record.code("INVITE"), record.code("BYE")) == (200, 200) && informed,
            "{record:?}\n{}\n{}",
            log(folder, before),
            log(folder, behind)
        );
    }
    // Each call's ACK and BYE passed the edge by its token, too.
    edge.until("the BYEs to be counted", |edge| {
        edge.metric("strowger_requests_total", &["in-session", "met"]) >= 200.0
    });
    edge.until("no live call", |edge| edge.json("/api/v1/calls")["live"] == 0);
    edge.until("no call held", |edge| edge.instance("core", "k")["held"] == 0);
}

/// baresip's configuration: no sound, no picture, an account at the edge.
fn telephone(folder: &Path, port: u16, user: &str, own: u16, transport: &str) -> Process {
    let home = folder.join(format!("baresip-{user}"));
    fs::create_dir(&home).expect("a folder");
    let modules = ["account", "g711", "aubridge", "menu", "contact", "debug_cmd", "stdio"];
    let lines: String = modules
        .iter()
        .map(|name| match *name {
            "account" | "menu" | "contact" | "debug_cmd" => format!("module_app {name}.so\n"),
            "stdio" => String::new(),
            _ => format!("module {name}.so\n"),
        })
        .collect();
    fs::write(
        home.join("config"),
        format!(
            "poll_method epoll\nsip_listen 127.0.0.1:{own}\nsip_trans_def {transport}\naudio_player aubridge,nil\naudio_source aubridge,nil\naudio_alert aubridge,nil\nnet_interface 127.0.0.1\nmodule_path /usr/lib/baresip/modules\n{lines}"
        ),
    )
    .expect("written");
    fs::write(
        home.join("accounts"),
        format!(
            "<sip:{user}@example.net;transport={transport}>;auth_pass=none;outbound=\"sip:127.0.0.1:{port};transport={transport}\";regint=60;answermode=auto;audio_codecs=PCMU\n"
        ),
    )
    .expect("written");
    fs::write(home.join("contacts"), "").expect("written");
    let mut command = Command::new("baresip");
    command.arg("-f").arg(&home).args(["-4", "-s", "-v", "-t", "120"]);
    if user == "alice" {
        command.args(["-e", "/dial sip:bob@example.net"]);
    }
    Process::spawn(&mut command, &folder.join(format!("baresip-{user}.log")))
}

/// Two baresips register at Kamailio through the edge, over UDP and over TCP, and one calls the
/// other, which answers by itself.
#[test]
fn baresip_registers_and_calls() {
    phones_call(["udp", "tcp"]);
}

/// Both over TLS: the call comes to the callee over the connection that it registered by.
#[test]
fn baresip_registers_and_calls_over_tls() {
    phones_call(["tls", "tls"]);
}

fn phones_call([bobs, alices]: [&str; 2]) {
    if !has("kamailio") || !has("baresip") {
        return;
    }
    let _alone = alone();
    let (port, secure, registrar) = (free_port(), free_port(), free_port());
    let own = tempfile::TempDir::new().expect("a folder");
    super::secure::certificates(own.path());
    let path = |file: &str| own.path().join(file).display().to_string();
    let tls = format!(
        "tls://127.0.0.1:{secure}]\n    tls: {{ certificates: [{{ certificate: {}, key: {} }}] }}\n    pool",
        path("edge.pem"),
        path("edge.key")
    );
    let yaml = config(port, registrar, "cdr: true, path: always");
    let edge = Edge::start(&yaml.replacen("]\n    pool", &format!(", {tls}"), 1));
    let folder = edge.folder.path();
    let _kamailio = kamailio(folder, "kamailio-registrar", registrar, port);
    let at = |transport: &str| if transport == "tls" { secure } else { port };
    let text = |user: &str| {
        let bytes = fs::read(folder.join(format!("baresip-{user}.log"))).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let mut bob = telephone(folder, at(bobs), "bob", free_port(), bobs);
    let registered = |times: f64| {
        let end = Instant::now() + Duration::from_secs(30);
        let labels = ["method=\"REGISTER\"", "code=\"2xx\""];
        while edge.metric("strowger_answers_total", &labels) < times {
            assert!(Instant::now() < end, "no registration:\n{}", text("bob"));
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    registered(1.0);
    let mut alice = telephone(folder, at(alices), "alice", free_port(), alices);
    let end_at = Instant::now() + Duration::from_secs(40);
    // Both legs pass the edge: the caller's and, from Kamailio, the callee's.
    loop {
        let calls = edge.json("/api/v1/calls");
        let answered = calls["calls"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|call| call["phase"] == "answered")
            .count();
        if answered >= 1 {
            break;
        }
        assert!(
            Instant::now() < end_at,
            "no call was answered: {calls:#}\n{}\n{}",
            text("alice"),
            text("bob")
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    // The caller ends: its BYE passes.
    alice.terminate();
    edge.until("the BYE's answer", |edge| {
        edge.metric("strowger_answers_total", &["method=\"BYE\"", "code=\"2xx\""]) >= 1.0
    });
    edge.until("no call held", |edge| edge.instance("core", "k")["held"] == 0);
    bob.terminate();
}

fn finished(command: &mut Command) -> std::process::Output {
    command.stdin(Stdio::null()).output().expect("it runs")
}

/// sipsak's OPTIONS is answered; its flood loses nothing of what the edge is for.
#[test]
fn sipsak_asks_and_floods() {
    if !has("sipsak") {
        return;
    }
    let _alone = alone();
    let (port, server) = (free_port(), Server::polite());
    let edge = Edge::start(&config(
        port,
        server.address.port(),
        "limits: { flood: { per_second: 200, burst: 200 } }",
    ));
    let uri = format!("sip:service@127.0.0.1:{port}");
    let output = finished(Command::new("sipsak").args(["-vv", "-s", &uri]));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.contains("200 Said"), "{text}");
    assert!(server.seen_text().iter().any(|message| message.starts_with("OPTIONS ")));
    let output = finished(Command::new("sipsak").args(["-F", "-e", "3000", "-s", &uri]));
    assert!(output.status.code().is_some(), "{}", String::from_utf8_lossy(&output.stderr));
    edge.until("the flood to be noticed", |edge| {
        edge.metric("strowger_drops_total", &["reason=\"flood\""]) > 0.0
    });
    let seen = server.seen_text().iter().filter(|text| text.starts_with("OPTIONS ")).count();
    assert!(seen < 3_000, "all of the flood came through");
    // Another source is served as before.
    let other = Client::udp(([127, 0, 0, 1], port).into());
    assert_eq!(edge.metric("strowger_engine_panics_total", &[]), 0.0);
    edge.until("the listener to serve again", |_| {
        let request = other.request("OPTIONS", "sip:x@example.net", "z", "after");
        other_answers(&request, port)
    });
}

/// Whether a request from a socket of its own is answered 200.
fn other_answers(request: &str, port: u16) -> bool {
    let mut client = Client::udp(([127, 0, 0, 1], port).into());
    let local = client.local().to_string();
    let line = format!("Via: SIP/2.0/UDP {local};rport;branch=z9hG4bK{}", local.replace(':', "x"));
    let rest: Vec<&str> = request.split("\r\n").collect();
    let text = [&rest[..1], &[line.as_str()], &rest[2..]].concat().join("\r\n");
    client.send(text.as_bytes());
    client.final_answer(Duration::from_secs(2)).is_some_and(|text| status(&text) == 200)
}

/// SIPVicious finds nobody: its requests are dropped and counted, whatever it asks.
#[test]
fn sipvicious_hears_nothing() {
    if !has("svmap") {
        return;
    }
    let _alone = alone();
    let (port, server) = (free_port(), Server::polite());
    let edge = Edge::start(&config(port, server.address.port(), ""));
    let home = tempfile::tempdir().expect("a folder");
    let scanners: [(&str, Vec<String>); 2] = [
        ("svmap", vec!["-p".into(), port.to_string(), "127.0.0.1".into()]),
        (
            "svwar",
            vec!["-e".into(), "100-110".into(), "-p".into(), port.to_string(), "127.0.0.1".into()],
        ),
    ];
    let dropped = |edge: &Edge| edge.metric("strowger_drops_total", &["reason=\"scanner\""]);
    let mut before = 0.0;
    for (program, arguments) in scanners {
        let mut command = Command::new("timeout");
        command.args(["60", program]).args(arguments).env("HOME", home.path());
        let output = finished(command.current_dir(home.path()));
        let text = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        edge.until(program, |edge| dropped(edge) > before);
        before = dropped(&edge);
        // Neither a device nor an extension was found.
        assert!(!text.contains("127.0.0.1:") && !text.contains("reqauth"), "{program}: {text}");
    }
    assert!(server.seen_text().is_empty(), "a scanner reached an instance");
    assert!(other_answers(
        &Client::udp(([127, 0, 0, 1], port).into()).request(
            "OPTIONS",
            "sip:x@example.net",
            "z",
            "after"
        ),
        port
    ));
}
