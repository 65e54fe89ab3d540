//! TLS on both sides: certificates by SNI, mutual TLS, identities, reload, failures by their kind.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::harness::{Edge, free_port, has};

type Tls = StreamOwned<ClientConnection, TcpStream>;

/// An authority that writes certificates into a folder.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new(folder: &Path, name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("an authority");
        fs::write(folder.join(format!("{name}.pem")), issuer.pem()).expect("written");
        Self { issuer }
    }

    /// Writes `file.pem` and `file.key`.
    pub(crate) fn issue(&self, folder: &Path, file: &str, names: &[&str]) {
        let mut params = CertificateParams::new(Vec::<String>::new()).expect("parameters");
        params.distinguished_name.push(DnType::CommonName, file);
        for name in names {
            let name = match name.parse() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) if name.contains(':') => {
                    SanType::URI((*name).try_into().expect("an ASCII URI"))
                }
                Err(_) => SanType::DnsName((*name).try_into().expect("a name")),
            };
            params.subject_alt_names.push(name);
        }
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        // Renamed into place, as tools for certificates do.
        for (end, text) in [("key", key.serialize_pem()), ("pem", certificate.pem())] {
            let new = folder.join("new");
            fs::write(&new, text).expect("written");
            fs::rename(new, folder.join(format!("{file}.{end}"))).expect("renamed");
        }
    }
}

fn client_config(folder: &Path, ca: &str, own: Option<&str>) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    let file = folder.join(format!("{ca}.pem"));
    for certificate in CertificateDer::pem_file_iter(file).expect("a file") {
        roots.add(certificate.expect("a certificate")).expect("an authority");
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots);
    Arc::new(match own {
        None => builder.with_no_client_auth(),
        Some(own) => {
            let chain = CertificateDer::pem_file_iter(folder.join(format!("{own}.pem")));
            let chain = chain.expect("a file").map(|one| one.expect("a certificate")).collect();
            let key = PrivateKeyDer::from_pem_file(folder.join(format!("{own}.key")));
            builder.with_client_auth_cert(chain, key.expect("a key")).expect("they fit")
        }
    })
}

fn dial(port: u16, name: &str, config: &Arc<ClientConfig>) -> Tls {
    let socket = TcpStream::connect(("127.0.0.1", port)).expect("the edge accepts");
    socket.set_read_timeout(Some(Duration::from_secs(10))).expect("an option");
    let name = ServerName::try_from(name.to_owned()).expect("a name");
    StreamOwned::new(ClientConnection::new(Arc::clone(config), name).expect("a session"), socket)
}

/// Says something and hears its echo.
fn talk(stream: &mut Tls, text: &str) -> std::io::Result<()> {
    stream.write_all(text.as_bytes())?;
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer)?;
    assert_eq!(answer, text.as_bytes());
    Ok(())
}

/// The DNS names of the certificate that the server showed.
fn shown(stream: &Tls) -> Vec<String> {
    let certificates = stream.conn.peer_certificates().expect("certificates");
    strowger::tls::certificate(&certificates[0]).dns
}

fn echo(port: u16) {
    let listener = TcpListener::bind(("127.0.0.1", port)).expect("a free port");
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            thread::spawn(move || {
                let mut buffer = vec![0; 65_536];
                while let Ok(count) = stream.read(&mut buffer) {
                    if count == 0 || stream.write_all(&buffer[..count]).is_err() {
                        return;
                    }
                }
            });
        }
    });
}

fn config(bind: &str, tls: &str, pool: &str) -> String {
    format!(
        "version: 1\nnode: {{ workers: 2 }}\nadmin: {{ listen: ADMIN }}\nlisteners:\n  - name: front\n    protocol: tcp\n    bind: [{bind}]\n    pool: back\n{tls}pools:\n  back:\n    session: {{ key: source }}\n{pool}"
    )
}

#[test]
fn certificates_go_by_sni_and_change_without_a_dropped_connection() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = folder.path().to_path_buf();
    let authority = Authority::new(&at, "ca");
    authority.issue(&at, "one", &["one.example.net"]);
    authority.issue(&at, "two", &["two.example.net", "*.wild.example.net"]);
    let (port, backend) = (free_port(), free_port());
    echo(backend);
    let path = |file: &str| at.join(file).display().to_string();
    let tls = format!(
        "    tls:\n      alpn: [sip, other]\n      certificates:\n        - {{ certificate: {}, key: {} }}\n        - {{ certificate: {}, key: {} }}\n",
        path("one.pem"),
        path("one.key"),
        path("two.pem"),
        path("two.key")
    );
    let pool = format!("    backends: [{{ id: a, address: tcp://127.0.0.1:{backend} }}]\n");
    let edge = Edge::start(&config(&format!("tls://127.0.0.1:{port}"), &tls, &pool));
    let plain = client_config(&at, "ca", None);
    let mut one = dial(port, "one.example.net", &plain);
    talk(&mut one, "hello").expect("an echo");
    assert_eq!(shown(&one), ["one.example.net"]);
    for name in ["two.example.net", "a.wild.example.net"] {
        let mut two = dial(port, name, &plain);
        talk(&mut two, "hello").expect("an echo");
        assert_eq!(shown(&two)[0], "two.example.net");
    }
    // A megabyte each way keeps its order through many records.
    let block: String = (0..100_000).map(|index| format!("{index:010}")).collect();
    let mut bulk = dial(port, "one.example.net", &plain);
    let mut got = Vec::new();
    for part in block.as_bytes().chunks(30_000) {
        bulk.write_all(part).expect("written");
        let mut answer = vec![0; part.len()];
        bulk.read_exact(&mut answer).expect("read");
        got.extend_from_slice(&answer);
    }
    assert!(got == block.as_bytes(), "bytes were lost or changed");
    // A second visit resumes the first one's session.
    talk(&mut dial(port, "one.example.net", &plain), "again").expect("an echo");
    edge.until("a resumed session", |edge| {
        edge.metric("strowger_tls_handshakes_total", &["side=\"client\"", "resumed=\"yes\""]) > 0.0
    });
    // New files: new connections see them, the old ones live on.
    authority.issue(&at, "one", &["one.example.net", "new.example.net"]);
    edge.until("the new certificate", |_| {
        let fresh = client_config(&at, "ca", None);
        let mut stream = dial(port, "one.example.net", &fresh);
        talk(&mut stream, "x").is_ok() && shown(&stream).len() == 2
    });
    talk(&mut one, "still there").expect("an echo");
    // A file that is wrong changes nothing.
    fs::write(at.join("one.pem"), "nonsense").expect("written");
    edge.until("the rejection", |edge| edge.log().contains("certificates_rejected"));
    let fresh = client_config(&at, "ca", None);
    talk(&mut dial(port, "new.example.net", &fresh), "x").expect("an echo");
    talk(&mut one, "still there").expect("an echo");
}

#[test]
fn failed_handshakes_are_told_by_their_kind_and_harm_nobody() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = folder.path().to_path_buf();
    let authority = Authority::new(&at, "ca");
    let stranger = Authority::new(&at, "stranger");
    authority.issue(&at, "server", &["edge.example.net"]);
    authority.issue(&at, "friend", &["friend.example.net"]);
    stranger.issue(&at, "enemy", &["friend.example.net"]);
    let (port, backend) = (free_port(), free_port());
    echo(backend);
    let path = |file: &str| at.join(file).display().to_string();
    let tls = format!(
        "    tls: {{ certificates: [{{ certificate: {}, key: {} }}], client_ca: {}, handshake: 1s }}\n",
        path("server.pem"),
        path("server.key"),
        path("ca.pem")
    );
    let pool = format!("    backends: [{{ id: a, address: tcp://127.0.0.1:{backend} }}]\n");
    let edge = Edge::start(&config(&format!("tls://127.0.0.1:{port}"), &tls, &pool));
    let friend = client_config(&at, "ca", Some("friend"));
    let mut kept = dial(port, "edge.example.net", &friend);
    talk(&mut kept, "hello").expect("a client with a certificate is let in");
    for (own, reason) in [(None, "no_certificate"), (Some("enemy"), "unknown_authority")] {
        let config = client_config(&at, "ca", own);
        let result = talk(&mut dial(port, "edge.example.net", &config), "hello");
        assert!(result.is_err(), "{own:?} was let in");
        counted(&edge, reason);
    }
    let distrusting = client_config(&at, "stranger", Some("friend"));
    assert!(talk(&mut dial(port, "edge.example.net", &distrusting), "hello").is_err());
    counted(&edge, "peer_unknown_authority");
    let mut plain = TcpStream::connect(("127.0.0.1", port)).expect("it accepts");
    plain.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("written");
    counted(&edge, "not_tls");
    // One that says nothing, one that sends byte by byte and never comes to the end.
    let silent = TcpStream::connect(("127.0.0.1", port)).expect("it accepts");
    counted(&edge, "timeout");
    let mut slow = TcpStream::connect(("127.0.0.1", port)).expect("it accepts");
    slow.write_all(&[22, 3, 1, 2, 0, 1]).expect("written");
    slow.shutdown(std::net::Shutdown::Write).expect("ended");
    counted(&edge, "closed");
    drop(silent);
    talk(&mut kept, "still there").expect("an echo");
    if has("openssl") {
        let old = Command::new("openssl")
            .args(["s_client", "-connect", &format!("127.0.0.1:{port}"), "-tls1_1"])
            .args(["-cipher", "ALL:@SECLEVEL=0"])
            .stdin(Stdio::null())
            .output()
            .expect("it runs");
        assert!(!old.status.success(), "TLS 1.1 was spoken");
        counted(&edge, "version");
        for version in ["-tls1_2", "-tls1_3"] {
            let output = Command::new("openssl")
                .args(["s_client", "-connect", &format!("127.0.0.1:{port}"), version, "-CAfile"])
                .arg(at.join("ca.pem"))
                .args(["-verify_return_error", "-servername", "edge.example.net", "-cert"])
                .arg(at.join("friend.pem"))
                .arg("-key")
                .arg(at.join("friend.key"))
                .stdin(Stdio::null())
                .output()
                .expect("it runs");
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(text.contains("Verify return code: 0 (ok)"), "{version}: {text}");
        }
    }
}

fn counted(edge: &Edge, reason: &str) {
    let label = format!("reason=\"{reason}\"");
    edge.until(reason, |edge| {
        edge.metric("strowger_tls_handshake_failures_total", &[&label]) > 0.0
    });
}

/// An edge before an edge: TLS to the backend, which wants a certificate and must be who it should.
#[test]
fn backends_are_who_they_must_be() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = folder.path().to_path_buf();
    let authority = Authority::new(&at, "ca");
    authority.issue(&at, "backend", &["backend.example.net", "sip:example.org"]);
    authority.issue(&at, "edge", &["edge.example.net"]);
    let (front, back, backend) = (free_port(), free_port(), free_port());
    echo(backend);
    let path = |file: &str| at.join(file).display().to_string();
    let tls = format!(
        "    tls: {{ certificates: [{{ certificate: {}, key: {} }}], client_ca: {}, client: required }}\n",
        path("backend.pem"),
        path("backend.key"),
        path("ca.pem")
    );
    let pool = format!("    backends: [{{ id: a, address: tcp://127.0.0.1:{backend} }}]\n");
    let _far = Edge::start(&config(&format!("tls://127.0.0.1:{back}"), &tls, &pool));
    let near = |name: &str| {
        let pool = format!(
            "    tls: {{ ca: {}, name: {name}, certificate: {}, key: {} }}\n    backends: [{{ id: far, address: tls://127.0.0.1:{back} }}]\n",
            path("ca.pem"),
            path("edge.pem"),
            path("edge.key")
        );
        config(&format!("tcp://127.0.0.1:{front}"), "", &pool)
    };
    let edge = Edge::start(&near("backend.example.net"));
    let ask = || -> std::io::Result<()> {
        let mut stream = TcpStream::connect(("127.0.0.1", front))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(b"hello")?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        assert_eq!(answer, b"hello", "through TLS and back, half-closed");
        Ok(())
    };
    ask().expect("an echo through both edges");
    // By the URI of its SIP domain (RFC 5922), too.
    assert_eq!(edge.put_config(&near("example.org")).0, 200);
    ask().expect("an echo");
    assert_eq!(edge.put_config(&near("other.example.net")).0, 200);
    assert!(ask().is_err(), "somebody else was believed");
    edge.until("the count", |edge| {
        let labels = ["side=\"backend\"", "reason=\"wrong_name\""];
        edge.metric("strowger_tls_handshake_failures_total", &labels) > 0.0
    });
}

/// The name that an instance registered with must be in the certificate of whoever is at its address.
#[test]
fn a_leased_backend_is_who_its_registration_names() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = folder.path().to_path_buf();
    let authority = Authority::new(&at, "ca");
    authority.issue(&at, "backend", &["instance-guid-1"]);
    let (front, back, backend) = (free_port(), free_port(), free_port());
    echo(backend);
    let path = |file: &str| at.join(file).display().to_string();
    let tls = format!(
        "    tls: {{ certificates: [{{ certificate: {}, key: {} }}] }}\n",
        path("backend.pem"),
        path("backend.key")
    );
    let pool = format!("    backends: [{{ id: a, address: tcp://127.0.0.1:{backend} }}]\n");
    let _far = Edge::start(&config(&format!("tls://127.0.0.1:{back}"), &tls, &pool));
    let pool =
        format!("    tls: {{ ca: {} }}\n    debounce: 0\n    slow_start: 0\n", path("ca.pem"));
    let edge = Edge::start(&config(&format!("tcp://127.0.0.1:{front}"), "", &pool));
    let register = |generation: u32, name: &str| {
        let body = format!(
            "{{\"generation\":{generation},\"lease_ttl_ms\":600000,\"endpoints\":[{{\"protocol\":\"tcp\",\"address\":\"tls://127.0.0.1:{back}\"}}],\"identity\":{{\"tls_san\":\"{name}\"}}}}"
        );
        let path = "/api/v1/pools/back/instances/far";
        let (code, told) = crate::harness::http(edge.admin, "PUT", path, &body).expect("an answer");
        assert!((200..300).contains(&code), "{told}");
    };
    let ask = || -> std::io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect(("127.0.0.1", front))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(b"hello")?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(answer)
    };
    register(1, "instance-guid-1");
    edge.until("its echo", |_| ask().is_ok_and(|answer| answer == b"hello"));
    // The same address, and somebody else is expected there.
    register(2, "instance-guid-2");
    edge.until("the refusal", |edge| {
        let known = edge.instance("back", "far")["generation"] == 2;
        assert!(!known || !ask().is_ok_and(|answer| answer == b"hello"), "a stranger was believed");
        let labels = ["side=\"backend\"", "reason=\"wrong_name\""];
        edge.metric("strowger_tls_handshake_failures_total", &labels) > 0.0
    });
}

/// A Diameter client is who its certificate says (RFC 6733 13.1), whatever its CER says.
#[test]
fn a_diameter_identity_must_be_in_the_certificate() {
    use strowger_diameter::avp::{FLAG_REQUEST, Summary};
    let folder = tempfile::tempdir().expect("a folder");
    let at = folder.path().to_path_buf();
    let authority = Authority::new(&at, "ca");
    authority.issue(&at, "edge", &["edge.example.net"]);
    authority.issue(&at, "client", &["client.example.net"]);
    let (port, backend) = (free_port(), free_port());
    let path = |file: &str| at.join(file).display().to_string();
    let edge = Edge::start(&format!(
        "version: 1\nnode: {{ workers: 2, realm: example.net }}\nadmin: {{ listen: ADMIN }}\nlisteners:\n  - name: dra\n    protocol: diameter\n    bind: [tls://127.0.0.1:{port}]\n    tls: {{ certificates: [{{ certificate: {}, key: {} }}], client_ca: {} }}\n    options: {{ origin_host: edge.example.net }}\n    pool: pcrf\npools:\n  pcrf:\n    backends: [{{ id: a, address: tcp://127.0.0.1:{backend} }}]\n",
        path("edge.pem"),
        path("edge.key"),
        path("ca.pem")
    ));
    let config = client_config(&at, "ca", Some("client"));
    let introduce = |host: &str| {
        let mut stream = dial(port, "edge.example.net", &config);
        let cer = crate::diameter::capabilities(FLAG_REQUEST, host, None);
        stream.write_all(&cer).expect("written");
        let mut answer = vec![0; 20];
        stream.read_exact(&mut answer).expect("a CEA");
        let length = u32::from_be_bytes([0, answer[1], answer[2], answer[3]]) as usize;
        answer.resize(length, 0);
        stream.read_exact(&mut answer[20..]).expect("all of it");
        Summary::of(&answer).result_code
    };
    assert_eq!(introduce("Client.example.net"), Some(2_001));
    assert_eq!(introduce("other.example.net"), Some(3_010));
    edge.until("the count", |edge| {
        edge.metric("strowger_protocol_total", &["diameter_peers_refused"]) == 1.0
    });
    assert!(edge.log().contains("the certificate is not for this Origin-Host"));
}

/// Records without text do not keep a flow whose other way has ended: the client here sends new keys
/// again and again, and no byte.
#[test]
fn a_half_closed_flow_ends_though_records_come() {
    let folder = tempfile::tempdir().expect("a folder");
    let ca = Authority::new(folder.path(), "ca");
    ca.issue(folder.path(), "front", &["front.example.net"]);
    let (port, backend) = (free_port(), free_port());
    let listener = TcpListener::bind(("127.0.0.1", backend)).expect("a free port");
    let edge = Edge::start(&format!(
        "version: 1\nadmin: {{ listen: ADMIN }}\nlisteners:\n  - name: front\n    protocol: tcp\n    bind: [\"tls://127.0.0.1:{port}\"]\n    pool: back\n    tls: {{ certificates: [{{ certificate: {}, key: {} }}] }}\n    options: {{ half_closed_timeout: 1s }}\npools:\n  back: {{ backends: [{{ id: a, address: \"tcp://127.0.0.1:{backend}\" }}] }}\n",
        folder.path().join("front.pem").display(),
        folder.path().join("front.key").display(),
    ));
    let mut client = dial(port, "front.example.net", &client_config(folder.path(), "ca", None));
    client.write_all(b"hello").expect("sent");
    let (mut server, _) = listener.accept().expect("the edge comes");
    server.read_exact(&mut [0; 5]).expect("what was sent");
    server.shutdown(std::net::Shutdown::Write).expect("open");
    // More than are taken of one who sends nothing else: a flow that lives so long is ended by the last.
    for _ in 0..60 {
        let StreamOwned { conn, sock } = &mut client;
        let sent = conn.refresh_traffic_keys().map_err(std::io::Error::other);
        if sent.and_then(|()| conn.write_tls(sock)).is_err() {
            break;
        }
        thread::sleep(Duration::from_millis(400));
    }
    edge.until("the flow to be over", |edge| edge.json("/api/v1/listeners")[0]["connections"] == 0);
    let idle = edge.metric("strowger_connections_closed_total", &["\"idle\""]);
    assert_eq!(idle, 1.0, "it lived as long as records came");
}
