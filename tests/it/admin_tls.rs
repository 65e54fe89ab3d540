//! The admin API over TLS: client certificates with rights per pool, tokens beside them.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use tempfile::TempDir;

use crate::agent_support::Agent;
use crate::harness::{Process, free_port, free_range};

type Tls = StreamOwned<ClientConnection, TcpStream>;

/// Writes the authority, the edge's certificate, and one each for two clients.
fn certificates(folder: &Path) {
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = rcgen::KeyPair::generate().expect("a key");
    let issuer = rcgen::CertifiedIssuer::self_signed(params, key).expect("an authority");
    let write = |file: &str, text: &str| std::fs::write(folder.join(file), text).expect("written");
    write("ca.pem", &issuer.pem());
    for name in ["edge", "agent-h1", "stranger"] {
        let names = vec![format!("{name}.example.net")];
        let params = rcgen::CertificateParams::new(names).expect("parameters");
        let key = rcgen::KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &issuer).expect("a certificate");
        write(&format!("{name}.pem"), &certificate.pem());
        write(&format!("{name}.key"), &key.serialize_pem());
    }
}

fn dial(folder: &Path, admin: SocketAddr, client: Option<&str>) -> std::io::Result<Tls> {
    let mut roots = RootCertStore::empty();
    let authority = CertificateDer::from_pem_file(folder.join("ca.pem")).expect("a certificate");
    roots.add(authority).expect("an authority");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots);
    let config = match client {
        Some(name) => {
            let file = |end: &str| folder.join(format!("{name}.{end}"));
            let chain = vec![CertificateDer::from_pem_file(file("pem")).expect("a certificate")];
            let key = PrivateKeyDer::from_pem_file(file("key")).expect("a key");
            config.with_client_auth_cert(chain, key).expect("a certificate and its key")
        }
        None => config.with_no_client_auth(),
    };
    let socket = TcpStream::connect(admin)?;
    socket.set_read_timeout(Some(Duration::from_secs(30))).expect("an option");
    let name = ServerName::try_from("edge.example.net").expect("a name");
    let session = ClientConnection::new(Arc::new(config), name).expect("a session");
    Ok(StreamOwned::new(session, socket))
}

/// The status and the rest of an answer.
fn ask(stream: &mut Tls, method: &str, path: &str, token: &str, body: &str) -> (u16, String) {
    let bearer =
        if token.is_empty() { String::new() } else { format!("Authorization: Bearer {token}\r\n") };
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: edge\r\n{bearer}Connection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).expect("sent");
    let mut answer = Vec::new();
    // The other side may close without a word of TLS.
    let _closed = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let code = answer.get(9..12).and_then(|code| code.parse().ok()).unwrap_or(0);
    (code, answer)
}

fn start(folder: &TempDir, client: &str) -> (Process, SocketAddr) {
    certificates(folder.path());
    let path = |file: &str| folder.path().join(file).display().to_string();
    let permissions = "tokens:\n  - { name: h1, certificate: agent-h1.example.net, pools: [ims], rights: [read, register] }\n  - { name: eyes, token: 0123456789abcdef, rights: [read] }\n  - { name: more, token: fedcba9876543210, pools: [other], rights: [register] }\n";
    std::fs::write(path("permissions.yaml"), permissions).expect("written");
    let admin = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let yaml = format!(
        "version: 1\nnode: {{ workers: 1 }}\nadmin:\n  listen: {admin}\n  permissions_file: {}\n  tls: {{ certificates: [{{ certificate: {}, key: {} }}], client: {client}, client_ca: {} }}\n\
         listeners:\n  - {{ name: a, protocol: sip, bind: [udp://127.0.0.1:{}], pool: ims }}\n  - {{ name: b, protocol: sip, bind: [udp://127.0.0.1:{}], pool: other }}\n\
         pools:\n  ims: {{}}\n  other: {{}}\n",
        path("permissions.yaml"),
        path("edge.pem"),
        path("edge.key"),
        path("ca.pem"),
        free_port(),
        free_port(),
    );
    std::fs::write(path("edge.yaml"), yaml).expect("written");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_strowger"));
    command.args(["run", "--drain", "0s", "--config", &path("edge.yaml")]);
    let process = Process::spawn(&mut command, &folder.path().join("edge.log"));
    for _ in 0..1_000 {
        let ready = dial(folder.path(), admin, Some("agent-h1"))
            .is_ok_and(|mut stream| ask(&mut stream, "GET", "/readyz", "", "").0 == 200);
        if ready {
            return (process, admin);
        }
        std::thread::sleep(Duration::from_millis(30));
    }
    let log = std::fs::read_to_string(folder.path().join("edge.log")).unwrap_or_default();
    panic!("the edge is not ready:\n{log}");
}

fn registration(port: u16) -> String {
    format!(
        "{{\"generation\":1,\"lease_ttl_ms\":60000,\"endpoints\":[{{\"protocol\":\"sip\",\"address\":\"udp://127.0.0.1:{port}\"}}]}}"
    )
}

/// A certificate has the rights of its name, on its pools; a token has its own; neither has none.
#[test]
fn certificates_and_tokens_have_their_rights() {
    let folder = TempDir::new().expect("a folder");
    let (_edge, admin) = start(&folder, "optional");
    let ask = |client: Option<&str>, method: &str, path: &str, token: &str, body: &str| {
        let mut stream = dial(folder.path(), admin, client).expect("it is accepted");
        ask(&mut stream, method, path, token, body)
    };
    let agent = Some("agent-h1");
    let put = "/api/v1/pools/ims/instances/a";
    let port = free_port();
    assert_eq!(ask(agent, "PUT", put, "", &registration(port)).0, 201);
    let (code, answer) =
        ask(agent, "PUT", "/api/v1/pools/other/instances/a", "", &registration(port));
    assert_eq!(code, 403, "{answer}");
    assert!(answer.contains("\"token\":\"h1\""), "{answer}");
    assert_eq!(ask(agent, "PUT", "/api/v1/config", "", "version: 1").0, 403);
    // A token adds to what the certificate may.
    let (other, more) = ("/api/v1/pools/other/instances/b", "fedcba9876543210");
    assert_eq!(ask(agent, "PUT", other, more, &registration(free_port())).0, 201);
    assert_eq!(ask(agent, "PUT", put, more, &registration(port)).0, 200);
    assert_eq!(ask(agent, "PUT", "/api/v1/config", more, "version: 1").0, 403);
    for (client, token, code) in [
        (None, "", 401),
        (Some("stranger"), "", 401),
        (None, "0123456789abcdef", 200),
        (Some("stranger"), "0123456789abcdef", 200),
        (None, "0123456789abcdeg", 401),
    ] {
        let (got, answer) = ask(client, "GET", "/api/v1/pools", token, "");
        assert_eq!(got, code, "{client:?} {token}: {answer}");
    }
    assert_eq!(ask(None, "GET", "/healthz", "", "").0, 200, "open to probes");
    // Events come through it as they happen.
    let mut events = dial(folder.path(), admin, agent).expect("it is accepted");
    events.write_all(b"GET /api/v1/events HTTP/1.1\r\nHost: edge\r\n\r\n").expect("sent");
    let mut heard = String::new();
    let mut buffer = [0; 4_096];
    let mut number = 0;
    while !heard.contains("instance_registered") {
        number += 1;
        let path = format!("/api/v1/pools/ims/instances/event-{number}");
        assert_eq!(ask(agent, "PUT", &path, "", &registration(free_port())).0, 201);
        let length = events.read(&mut buffer).expect("an event in time");
        heard.push_str(&String::from_utf8_lossy(&buffer[..length]));
    }
    // Plain text is no way in.
    let mut plain = TcpStream::connect(admin).expect("it is accepted");
    plain.write_all(b"GET /healthz HTTP/1.1\r\n\r\n").expect("sent");
    let mut answer = Vec::new();
    let _closed = plain.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
}

/// With `required` nobody comes in without a certificate.
#[test]
fn mutual_tls_keeps_out_who_has_no_certificate() {
    let folder = TempDir::new().expect("a folder");
    let (_edge, admin) = start(&folder, "required");
    let mut stream = dial(folder.path(), admin, None).expect("it is accepted");
    let request = b"GET /healthz HTTP/1.1\r\nHost: edge\r\nConnection: close\r\n\r\n";
    let mut answer = Vec::new();
    let failed = stream.write_all(request).is_err() || stream.read_to_end(&mut answer).is_err();
    assert!(failed && answer.is_empty(), "{answer:?}");
}

/// `strowger …` at an edge over TLS: its code, what it prints, what it complains of.
fn command(folder: &Path, admin: SocketAddr, more: &[&str]) -> (bool, String, String) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_strowger"));
    command.args(more).args(["--admin", &format!("https://{admin}")]);
    let output = command.current_dir(folder).output().expect("the program starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}

/// Commands over TLS: with a certificate, with a token, without either, with the wrong authority.
#[test]
fn commands_speak_tls() {
    const TRUST: [&str; 4] = ["--tls-ca", "ca.pem", "--tls-name", "edge.example.net"];
    let folder = TempDir::new().expect("a folder");
    let (_edge, admin) = start(&folder, "optional");
    std::fs::write(folder.path().join("token"), "0123456789abcdef\n").expect("written");
    let run = |more: &[&str]| command(folder.path(), admin, &[&["sessions"], more].concat());
    let as_h1 = ["--tls-certificate", "agent-h1.pem", "--tls-key", "agent-h1.key"];
    let (good, out, err) = run(&[&TRUST[..], &as_h1[..]].concat());
    assert!(good && out.contains("pool"), "{out}{err}");
    let (good, out, err) = run(&[&TRUST[..], &["--token-file", "token"]].concat());
    assert!(good, "{out}{err}");
    let (good, _, err) = run(&TRUST);
    assert!(!good && err.contains("401"), "{err}");
    // The certificate names another than the address.
    let (good, _, err) = run(&TRUST[..2]);
    assert!(!good && err.contains("certificate"), "{err}");
    let other = TempDir::new().expect("a folder");
    certificates(other.path());
    let wrong = other.path().join("ca.pem").display().to_string();
    let (good, _, err) = run(&["--tls-ca", &wrong, "--tls-name", "edge.example.net"]);
    assert!(!good && err.contains("certificate"), "{err}");
    let (good, _, err) = run(&[]);
    assert!(!good && err.contains("(ca)"), "{err}");
}

/// An agent registers over mutual TLS; with certificates of an authority that the edge does not know it
/// does not, and says why, until they are replaced under it.
#[test]
fn an_agent_registers_over_mutual_tls_and_takes_new_certificates() {
    let folder = TempDir::new().expect("a folder");
    let (_edge, admin) = start(&folder, "required");
    let own = TempDir::new().expect("a folder");
    certificates(own.path());
    let take = |file: &str| {
        std::fs::copy(folder.path().join(file), own.path().join(file)).expect("copied");
    };
    take("ca.pem");
    let agent = Agent::start(&["--ports", &free_range(20)]);
    let path = |file: &str| own.path().join(file).display().to_string();
    agent.apply(&format!(
        "version: 1
edges:
  - {{ url: \"https://{admin}\", name: edge.example.net, ca: {}, certificate: {}, key: {} }}
apps:
  app:
    exec: [sleep, \"1000\"]
    ports: {{ sip: {{ protocol: sip, transport: udp }} }}
    register: {{ ims: {{ lease: 6s }} }}
",
        path("ca.pem"),
        path("agent-h1.pem"),
        path("agent-h1.key")
    ));
    let error = |agent: &Agent| agent.instance("app-0")["edges"][0]["error"].clone();
    agent.until("a refusal", |agent| error(agent).is_string());
    assert_ne!(agent.instance("app-0")["edges"][0]["acked"], "state(ready)");
    take("agent-h1.pem");
    take("agent-h1.key");
    agent.until("the registration", |agent| {
        agent.instance("app-0")["edges"][0]["acked"] == "state(ready)" && error(agent).is_null()
    });
    let mut stream = dial(folder.path(), admin, Some("agent-h1")).expect("it is accepted");
    let (code, pools) = ask(&mut stream, "GET", "/api/v1/pools/ims", "", "");
    assert!(code == 200 && pools.contains("\"app-0\""), "{pools}");
}
