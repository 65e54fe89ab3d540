//! What a raw TCP flow is known by: SNI without ending TLS, PROXY headers, unix users, and limits.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use crate::harness::{Edge, free_port};

/// Answers with `name`, then echoes.
fn answer(mut stream: impl Read + Write, name: &str) {
    if stream.write_all(name.as_bytes()).is_err() {
        return;
    }
    let mut buffer = vec![0; 65_536];
    while let Ok(count) = stream.read(&mut buffer) {
        if count == 0 || stream.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
}

fn echo(port: u16, name: &'static str) {
    let listener = TcpListener::bind(("127.0.0.1", port)).expect("a free port");
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || answer(stream, name));
        }
    });
}

fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("the edge accepts");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("an option");
    stream
}

fn read(stream: &mut impl Read, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).expect("an answer");
    bytes
}

fn hello(name: &str) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let name = ServerName::try_from(name.to_owned()).expect("a name");
    let mut session = ClientConnection::new(Arc::new(config), name).expect("a session");
    let mut bytes = Vec::new();
    session.write_tls(&mut bytes).expect("a ClientHello");
    bytes
}

const HEAD: &str = "version: 1\nnode: { workers: 2 }\nadmin: { listen: ADMIN }\n";

#[test]
fn sni_and_first_bytes_choose_the_pool_and_are_not_lost() {
    let (port, one, two, three) = (free_port(), free_port(), free_port(), free_port());
    for (port, name) in [(one, "1"), (two, "2"), (three, "3")] {
        echo(port, name);
    }
    let edge = Edge::start(&format!(
        "{HEAD}listeners:\n  - name: front\n    protocol: tcp\n    bind: [tcp://127.0.0.1:{port}]\n    pool: rest\n    options: {{ peek_timeout: 500ms }}\n    routes:\n      - {{ match: {{ sni: [\"*.example.net\"] }}, pool: named }}\n      - {{ match: {{ first_bytes: [\"HELLO \"] }}, pool: greeted }}\npools:\n  named: {{ backends: [{{ id: a, address: tcp://127.0.0.1:{one} }}] }}\n  greeted: {{ backends: [{{ id: a, address: tcp://127.0.0.1:{two} }}] }}\n  rest: {{ backends: [{{ id: a, address: tcp://127.0.0.1:{three} }}] }}\n"
    ));
    let ask = |parts: &[&[u8]]| {
        let mut stream = connect(port);
        for part in parts {
            stream.write_all(part).expect("written");
            thread::sleep(Duration::from_millis(10));
        }
        let whole = parts.concat();
        let name = read(&mut stream, 1);
        assert_eq!(read(&mut stream, whole.len()), whole, "first bytes were lost");
        char::from(name[0])
    };
    let named = hello("a.example.net");
    assert_eq!(ask(&[&named]), '1');
    let (front, back) = named.split_at(100);
    assert_eq!(ask(&[&front[..3], &front[3..], back]), '1', "a ClientHello in pieces");
    assert_eq!(ask(&[&hello("a.b.example.net")]), '3', "a wildcard is one label");
    assert_eq!(ask(&[b"HEL", b"LO world"]), '2');
    assert_eq!(ask(&[b"something else"]), '3');
    // One who says nothing is served after the time, as protocols need where the server begins.
    assert_eq!(read(&mut connect(port), 1), b"3");
    drop(edge);
}

/// Two edges in a row: the first tells the second, the second its backend, in the other version.
#[test]
fn proxy_headers_carry_the_client_through() {
    let (front, middle, backend) = (free_port(), free_port(), free_port());
    let recorder = TcpListener::bind(("127.0.0.1", backend)).expect("a free port");
    let edge = |port: u16, accept: &str, version: &str, to: u16| {
        Edge::start(&format!(
            "{HEAD}listeners:\n  - name: front\n    protocol: tcp\n    bind: [tcp://127.0.0.1:{port}]\n    pool: back\n{accept}pools:\n  back:\n    send_proxy: {version}\n    backends: [{{ id: a, address: tcp://127.0.0.1:{to} }}]\n"
        ))
    };
    let trusting = "    accept_proxy: { trusted: [127.0.0.0/8], timeout: 500ms }\n";
    let _first = edge(front, "", "v2", middle);
    let second = edge(middle, trusting, "v1", backend);
    let mut client = connect(front);
    let (from, to) = (client.local_addr().expect("bound"), client.peer_addr().expect("connected"));
    client.write_all(b"payload").expect("written");
    let (mut stream, _) = recorder.accept().expect("the second edge comes");
    let line =
        format!("PROXY TCP4 {} {} {} {}\r\npayload", from.ip(), to.ip(), from.port(), to.port());
    assert_eq!(String::from_utf8_lossy(&read(&mut stream, line.len())), line);
    // Whoever is trusted must say something, and something right.
    let mut wrong = connect(middle);
    wrong.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("written");
    assert!(!wrong.read(&mut [0; 10]).is_ok_and(|count| count > 0));
    let _silent = connect(middle);
    second.until("both to be counted", |edge| {
        let (_, text) = edge.get("/metrics").expect("metrics");
        ["proxy_header_wrong", "proxy_header_late"].iter().all(|word| text.contains(word))
    });
}

#[test]
fn unix_sockets_on_both_sides_know_their_user() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    let listener = UnixListener::bind(path("back.sock")).expect("bound");
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || answer(stream, "u"));
        }
    });
    let other = free_port();
    echo(other, "o");
    // A file that a killed process left behind is no obstacle.
    drop(UnixListener::bind(path("front.sock")).expect("bound"));
    let uid = std::process::Command::new("id").arg("-u").output().expect("id runs").stdout;
    let uid: u32 = String::from_utf8_lossy(&uid).trim().parse().expect("a number");
    let edge = Edge::start(&format!(
        "{HEAD}listeners:\n  - name: front\n    protocol: tcp\n    bind: [{{ address: \"unix://{}\", mode: \"0600\" }}]\n    pool: other\n    routes: [{{ match: {{ uid: [{uid}] }}, pool: mine }}]\npools:\n  mine: {{ health: {{ probe: tcp-connect }}, backends: [{{ id: a, address: \"unix://{}\" }}] }}\n  other: {{ backends: [{{ id: a, address: tcp://127.0.0.1:{other} }}] }}\n",
        path("front.sock").display(),
        path("back.sock").display()
    ));
    let mut stream = UnixStream::connect(path("front.sock")).expect("the edge accepts");
    stream.write_all(b"hello").expect("written");
    assert_eq!(read(&mut stream, 6), b"uhello");
    edge.until("the probe", |edge| edge.instance("mine", "a")["health"] == "up");
    use std::os::unix::fs::PermissionsExt as _;
    let mode = std::fs::metadata(path("front.sock")).expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut edge = edge;
    assert_eq!(edge.process.terminate(), Some(0));
    assert!(!path("front.sock").exists(), "the file is gone with the edge");
}

#[test]
fn one_source_has_its_limit_and_a_flow_its_end() {
    let (port, backend) = (free_port(), free_port());
    echo(backend, "a");
    let _edge = Edge::start(&format!(
        "{HEAD}listeners:\n  - name: front\n    protocol: tcp\n    bind: [tcp://127.0.0.1:{port}]\n    pool: back\n    options: {{ session_timeout: 2s }}\n    limits: {{ per_source: 2, keep_alive: 30s, user_timeout: 30s }}\npools:\n  back: {{ session: {{ key: source }}, backends: [{{ id: a, address: tcp://127.0.0.1:{backend} }}] }}\n"
    ));
    let (mut one, mut two) = (connect(port), connect(port));
    assert_eq!((read(&mut one, 1), read(&mut two, 1)), (b"a".to_vec(), b"a".to_vec()));
    let third = connect(port).read(&mut [0; 1]);
    assert!(!third.is_ok_and(|count| count > 0), "a third one was served");
    let end = one.read(&mut [0; 1]);
    assert!(!end.is_ok_and(|count| count > 0), "the session had no end");
    drop((one, two));
    let mut served = false;
    for _ in 0..100 {
        served = connect(port).read(&mut [0; 1]).is_ok_and(|count| count > 0);
        if served {
            break;
        }
        thread::sleep(Duration::from_millis(50));
    }
    assert!(served, "places were not given back");
}
