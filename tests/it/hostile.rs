//! Clients that are slow, too many, or play tricks: each is bounded and counted, and others do not
//! notice.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::harness::{Edge, Process, alone, free_port, has, http};
use crate::sip::secure::{Secure, certificates};
use crate::upgrade::echo;

const LONG: Duration = Duration::from_secs(60);
const HEAD: &str = "version: 1\nnode: { workers: 2 }\nadmin: { listen: ADMIN }\n";

fn dial(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("the edge accepts");
    stream.set_read_timeout(Some(LONG)).expect("an option");
    stream
}

/// Reads to the end; a reset is one as well.
fn end(mut stream: impl Read) -> Vec<u8> {
    let mut rest = Vec::new();
    let _reset = stream.read_to_end(&mut rest);
    rest
}

fn exchange(stream: &mut (impl Read + Write), text: &[u8]) {
    stream.write_all(text).expect("sent");
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer).expect("an answer");
    assert_eq!(answer, text);
}

fn counted(edge: &Edge, what: &str) -> f64 {
    edge.metric("strowger_protocol_total", &[&format!("\"{what}\"")])
}

fn connections(edge: &Edge, listener: &str) -> u64 {
    let listeners = edge.json("/api/v1/listeners");
    let found = listeners.as_array().into_iter().flatten().find(|one| one["name"] == listener);
    found.and_then(|one| one["connections"].as_u64()).expect("a listener")
}

/// Seconds of processor time that a process has used.
fn cpu(process: &Process) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.id())).expect("it runs");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("a name").split_whitespace().collect();
    // utime and stime, the 14th and 15th of all (proc(5)).
    let ticks: f64 = fields[11..13].iter().filter_map(|text| text.parse::<f64>().ok()).sum();
    ticks / 100.0
}

fn secure_yaml(folder: &Path, tls: u16, proxied: u16, backend: u16) -> String {
    let path = |file: &str| folder.join(file).display().to_string();
    format!(
        "{HEAD}listeners:\n  - name: safe\n    protocol: tcp\n    bind: [\"tls://127.0.0.1:{tls}\"]\n    pool: db\n    tls: {{ certificates: [{{ certificate: {}, key: {} }}], handshake: 2s }}\n  - name: behind\n    protocol: tcp\n    bind: [\"tcp://127.0.0.1:{proxied}\"]\n    pool: db\n    accept_proxy: {{ trusted: [127.0.0.0/8], timeout: 2s }}\n    options: {{ peek_timeout: 2s }}\n    routes: [{{ match: {{ sni: [x.example.net] }}, pool: db }}]\npools:\n  db: {{ backends: [{{ id: a, address: \"tcp://127.0.0.1:{backend}\" }}] }}\n",
        path("edge.pem"),
        path("edge.key")
    )
}

/// A ClientHello as OpenSSL or anybody would send it.
fn client_hello() -> Vec<u8> {
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let name = rustls::pki_types::ServerName::try_from("edge.example.net").expect("a name");
    let config = std::sync::Arc::new(config);
    let mut session = rustls::ClientConnection::new(config, name).expect("a session");
    let mut bytes = Vec::new();
    session.write_tls(&mut bytes).expect("a ClientHello");
    bytes
}

/// Handshakes, PROXY headers and first bytes that come byte by byte: in time they are good, late ones
/// end, and many of them at once keep nobody else from being served.
#[test]
fn those_who_send_byte_by_byte_have_a_bounded_time() {
    let folder = tempfile::tempdir().expect("a folder");
    certificates(folder.path());
    let (tls, proxied, backend) = (free_port(), free_port(), free_port());
    echo(backend);
    let edge = Edge::start(&secure_yaml(folder.path(), tls, proxied, backend));
    let header =
        b"PROXY TCP4 192.0.2.7 192.0.2.8 5000 5001\r\nand data that is longer than a header";
    // In time.
    let mut stream = dial(proxied);
    stream.set_nodelay(true).expect("an option");
    for byte in header {
        stream.write_all(&[*byte]).expect("sent");
    }
    let data = &header[header.iter().position(|byte| *byte == b'\n').expect("a line") + 1..];
    let mut answer = vec![0; data.len()];
    stream.read_exact(&mut answer).expect("its echo");
    assert_eq!(answer, data);
    // Late: 40 of each kind, a byte in 100 ms.
    let hello = client_hello();
    let slow = |port: u16, bytes: &[u8]| {
        let bytes = bytes.to_vec();
        (0..40)
            .map(|_| {
                let (mut stream, bytes) = (dial(port), bytes.clone());
                thread::spawn(move || {
                    for byte in bytes {
                        if stream.write_all(&[byte]).is_err() {
                            break;
                        }
                        thread::sleep(Duration::from_millis(100));
                    }
                    end(stream)
                })
            })
            .collect::<Vec<_>>()
    };
    let (one, two) = (slow(tls, &hello), slow(proxied, header));
    let mut safe = Secure::dial(tls, &folder.path().join("ca.pem"));
    for _ in 0..50 {
        safe.send("others are served");
        assert_eq!(safe.bytes(17), b"others are served");
    }
    for thread in one.into_iter().chain(two) {
        assert!(!thread.join().expect("it ends").windows(3).any(|part| part == b"and"));
    }
    edge.until("all to be counted", |edge| {
        let late = edge
            .metric("strowger_tls_handshake_failures_total", &["\"safe\"", "reason=\"timeout\""]);
        late == 40.0 && counted(edge, "proxy_header_late") == 40.0
    });
    drop((safe, stream));
    edge.until("places to be given back", |edge| {
        connections(edge, "safe") == 0 && connections(edge, "behind") == 0
    });
}

/// Records that are too long, of no kind, empty without end, or in the wrong place.
#[test]
fn record_tricks_end_the_connection_that_plays_them() {
    let folder = tempfile::tempdir().expect("a folder");
    certificates(folder.path());
    let (tls, proxied, backend) = (free_port(), free_port(), free_port());
    echo(backend);
    let edge = Edge::start(&secure_yaml(folder.path(), tls, proxied, backend));
    let failures =
        |edge: &Edge| edge.metric("strowger_tls_handshake_failures_total", &["\"safe\""]);
    let empty = |kind: u8| [kind, 3, 3, 0, 0].repeat(20_000);
    let mut fragmented = Vec::new();
    for byte in &client_hello()[5..] {
        fragmented.extend_from_slice(&[22, 3, 1, 0, 1, *byte]);
    }
    let tricks: Vec<(&str, Vec<u8>)> = vec![
        ("a record over 2^14 + 2048", [&[22, 3, 1, 0xff, 0xff][..], &[1; 70_000]].concat()),
        ("an unknown kind", vec![99, 3, 3, 0, 4, 0, 0, 0, 0]),
        ("data before the handshake", vec![23, 3, 3, 0, 4, 0, 0, 0, 0]),
        (
            "a handshake message of 16 MB",
            [&[22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff][..], &[0; 0x4000]].concat(),
        ),
        ("empty records without end", empty(22)),
        ("changes of cipher without end", [20, 3, 3, 0, 1, 1].repeat(20_000)),
        ("alerts without end", [21, 3, 3, 0, 2, 1, 0].repeat(20_000)),
        ("plain text", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
    ];
    let mut good = Secure::dial(tls, &folder.path().join("ca.pem"));
    for (what, bytes) in tricks {
        let before = failures(&edge);
        let mut stream = dial(tls);
        // It may be cut off before all is written.
        let _cut = stream.write_all(&bytes);
        let answer = end(stream);
        assert!(answer.len() < 100, "{what}: {} bytes in answer", answer.len());
        edge.until(what, |edge| failures(edge) == before + 1.0);
        good.send("others are served");
        assert_eq!(good.bytes(17), b"others are served", "{what}");
    }
    // A ClientHello in records of one byte each is odd and allowed (RFC 8446 5.1), or refused; either way
    // it ends within its time.
    let mut stream = dial(tls);
    let _cut = stream.write_all(&fragmented);
    let mut first = [0; 1];
    let _any = stream.read(&mut first);
    drop(stream);
    edge.until("places to be given back", |edge| connections(edge, "safe") == 1);
    assert!(!edge.log().contains("panicked"), "{}", edge.log());
}

/// What OpenSSL's own client is told that asks for a handshake within the connection (TLS 1.2), and for
/// new keys again and again (TLS 1.3).
#[test]
fn renegotiation_is_refused_and_key_updates_are_harmless() {
    if !has("openssl") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    certificates(folder.path());
    let (tls, proxied, backend) = (free_port(), free_port(), free_port());
    echo(backend);
    let edge = Edge::start(&secure_yaml(folder.path(), tls, proxied, backend));
    let client = |version: &str, log: &str| {
        let out = std::fs::File::create(folder.path().join(log)).expect("a file");
        Command::new("openssl")
            .args(["s_client", "-connect", &format!("127.0.0.1:{tls}"), version])
            .args(["-servername", "edge.example.net"])
            .stdin(Stdio::piped())
            .stdout(out.try_clone().expect("a handle"))
            .stderr(out)
            .spawn()
            .expect("openssl runs")
    };
    let says = |log: &str, what: &str| {
        edge.until(what, |_| {
            std::fs::read(folder.path().join(log))
                .is_ok_and(|text| String::from_utf8_lossy(&text).contains(what))
        });
    };
    let mut child = client("-tls1_2", "renegotiation");
    let mut input = child.stdin.take().expect("piped");
    input.write_all(b"hello there\n").expect("it reads");
    // Its echo: the handshake is over, and the connection works.
    says("renegotiation", "hello there");
    input.write_all(b"R\n").expect("it reads");
    says("renegotiation", "RENEGOTIATING");
    says("renegotiation", "no renegotiation");
    drop(input);
    let _ended = child.wait();
    let mut child = client("-tls1_3", "keys");
    let mut input = child.stdin.take().expect("piped");
    input.write_all(b"hello there\n").expect("it reads");
    says("keys", "hello there");
    // It takes what it reads at once for one word.
    for _ in 0..20 {
        input.write_all(b"K\n").expect("it reads");
        thread::sleep(Duration::from_millis(30));
    }
    says("keys", "KEYUPDATE");
    edge.until("the echo", |_| {
        input.write_all(b"and after all that\n").expect("it reads");
        std::fs::read_to_string(folder.path().join("keys"))
            .is_ok_and(|text| text.contains("and after all that"))
    });
    drop(input);
    let _ended = child.wait();
}

/// More connections than there may be: the first are served, the others are told at once, and when some
/// end there is room.
#[test]
fn a_flood_of_connections_is_bounded_and_counted() {
    let _alone = alone();
    let (port, other, backend) = (free_port(), free_port(), free_port());
    echo(backend);
    let edge = Edge::start(&format!(
        "{HEAD}listeners:\n  - {{ name: full, protocol: tcp, bind: [\"tcp://127.0.0.1:{port}\"], pool: db, limits: {{ connections: 40 }} }}\n  - {{ name: other, protocol: tcp, bind: [\"tcp://127.0.0.1:{other}\"], pool: db }}\npools:\n  db: {{ backends: [{{ id: a, address: \"tcp://127.0.0.1:{backend}\" }}] }}\n"
    ));
    let mut served: Vec<TcpStream> = (0..40)
        .map(|_| {
            let mut stream = dial(port);
            exchange(&mut stream, b"first");
            stream
        })
        .collect();
    for _ in 0..400 {
        let mut late = dial(port);
        let _cut = late.write_all(b"too many");
        assert!(end(late).is_empty(), "it was served");
    }
    edge.until("all to be counted", |edge| {
        edge.metric("strowger_connections_rejected_total", &["\"full\""]) == 400.0
    });
    for stream in &mut served {
        exchange(stream, b"still there");
    }
    exchange(&mut dial(other), b"not my listener");
    served.truncate(20);
    edge.until("places to be given back", |edge| connections(edge, "full") == 20);
    exchange(&mut dial(port), b"there is room");
}

/// Fewer descriptors than connections: the loop that accepts does not spin, those who are there and the
/// admin API are served, and when some end there is room.
#[test]
fn a_lack_of_descriptors_is_survived() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let (port, backend, admin) = (free_port(), free_port(), free_port());
    echo(backend);
    let file = folder.path().join("edge.yaml");
    std::fs::write(
        &file,
        format!(
            "version: 1\nnode: {{ workers: 2 }}\nadmin: {{ listen: \"127.0.0.1:{admin}\" }}\nlisteners:\n  - {{ name: db, protocol: tcp, bind: [\"tcp://127.0.0.1:{port}\"], pool: db }}\npools:\n  db: {{ backends: [{{ id: a, address: \"tcp://127.0.0.1:{backend}\" }}] }}\n"
        ),
    )
    .expect("written");
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 200; exec \"$0\" run --drain 1s --log info --config \"$1\""]);
    command.arg(env!("CARGO_BIN_EXE_strowger")).arg(&file);
    let process = Process::spawn(&mut command, &folder.path().join("edge.log"));
    let get = |path: &str| http(([127, 0, 0, 1], admin).into(), "GET", path, "");
    let until = |what: &str, holds: &mut dyn FnMut() -> bool| {
        let end = Instant::now() + LONG;
        while !holds() {
            let log = std::fs::read_to_string(folder.path().join("edge.log")).unwrap_or_default();
            assert!(Instant::now() < end, "waited in vain for {what}: {log}");
            thread::sleep(Duration::from_millis(30));
        }
    };
    until("ready", &mut || get("/readyz").is_ok_and(|(code, _)| code == 200));
    let sum = |series: &str, label: &str| {
        let (_, text) = get("/metrics").expect("the admin API answers");
        let lines = text.lines().filter(|line| line.starts_with(series) && line.contains(label));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>()
    };
    let (mut served, mut refused) = (Vec::new(), 0);
    for _ in 0..300 {
        let mut stream = dial(port);
        let mut answer = [0; 5];
        let works = stream.write_all(b"hello").and_then(|()| stream.read_exact(&mut answer));
        match works {
            Ok(()) => served.push(stream),
            Err(_) => refused += 1,
        }
    }
    assert!(served.len() >= 30 && refused >= 150, "{} served, {refused} refused", served.len());
    assert!(sum("strowger_protocol_total", "\"descriptors_short\"") >= f64::from(refused));
    // It is no fault of the backend's.
    let blamed = sum("strowger_retries_total", "unreachable");
    assert!(blamed == 0.0, "{blamed} times the backend was taken to be unreachable");
    // While it lasts: the processor is idle.
    let before = cpu(&process);
    thread::sleep(Duration::from_secs(2));
    let used = cpu(&process) - before;
    assert!(used < 1.0, "{used} s of processor time in 2 s: it spins");
    for stream in &mut served {
        exchange(stream, b"still there");
    }
    assert_eq!(get("/healthz").expect("it answers").0, 200);
    served.truncate(10);
    until("room", &mut || {
        let mut stream = dial(port);
        let mut answer = [0; 5];
        stream.write_all(b"hello").and_then(|()| stream.read_exact(&mut answer)).is_ok()
    });
}

/// Messages that never end: SIP and Diameter give up a connection whose message does not come whole,
/// or is too long, and others go on.
#[test]
fn messages_without_end_are_given_up() {
    let (sip, diameter) = (free_port(), free_port());
    let udp = free_port();
    let edge = Edge::start(&format!(
        "{HEAD}listeners:\n  - {{ name: sip, protocol: sip, bind: [\"tcp://127.0.0.1:{sip}\", \"udp://127.0.0.1:{udp}\"], pool: ims }}\n  - {{ name: dia, protocol: diameter, bind: [\"tcp://127.0.0.1:{diameter}\"], pool: pcrf, options: {{ origin_host: edge.example.net, origin_realm: example.net }} }}\npools:\n  ims: {{ backends: [{{ id: a, address: \"udp://127.0.0.1:{}\" }}] }}\n  pcrf: {{ backends: [{{ id: a, address: \"tcp://127.0.0.1:{}\" }}] }}\n",
        free_port(),
        free_port()
    ));
    let mut endless = dial(sip);
    let mut sent = 0_usize;
    let _first = endless.write_all(b"INVITE sip:a@b SIP/2.0\r\n");
    while sent < 64 << 20
        && endless.write_all(&b"X-Filling: without end, and again\r\n".repeat(100)).is_ok()
    {
        sent += 3_500;
    }
    assert!(sent < 8 << 20, "{sent} bytes of one header were taken");
    let mut long = dial(diameter);
    let mut sent = 0_usize;
    let _first = long.write_all(&[1, 0xff, 0xff, 0xff, 0x80, 0, 1, 1]);
    while sent < 64 << 20 && long.write_all(&[0; 65_536]).is_ok() {
        sent += 65_536;
    }
    assert!(sent < 24 << 20, "{sent} bytes of one message were taken");
    assert!(TcpListener::bind(("127.0.0.1", sip)).is_err(), "it listens");
    edge.until("places to be given back", |edge| {
        connections(edge, "sip") == 0 && connections(edge, "dia") == 0
    });
}
