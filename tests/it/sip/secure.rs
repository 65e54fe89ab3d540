//! SIP over TLS: the callee's requests go back over the caller's connection, whichever worker has it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::phone::{Client, Server, answer, cut, headers, status};
use crate::harness::{Edge, free_port};

/// A client that keeps its connection.
pub(crate) struct Secure {
    stream: StreamOwned<ClientConnection, TcpStream>,
    held: Vec<u8>,
}

impl Secure {
    pub(crate) fn dial(port: u16, authority: &Path) -> Self {
        let mut roots = RootCertStore::empty();
        let certificate = CertificateDer::from_pem_file(authority).expect("a certificate");
        roots.add(certificate).expect("an authority");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let socket = TcpStream::connect(("127.0.0.1", port)).expect("the edge accepts");
        socket.set_read_timeout(Some(Duration::from_secs(20))).expect("an option");
        let name = ServerName::try_from("edge.example.net").expect("a name");
        let session = ClientConnection::new(Arc::new(config), name).expect("a session");
        Self { stream: StreamOwned::new(session, socket), held: Vec::new() }
    }

    pub(crate) fn send(&mut self, text: &str) {
        self.send_bytes(text.as_bytes());
    }

    /// Sends what need not be text.
    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("sent");
        self.stream.flush().expect("sent");
    }

    /// The next bytes, so many.
    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut buffer = vec![0; count];
        self.stream.read_exact(&mut buffer).expect("bytes come in time");
        buffer
    }

    pub(crate) fn receive(&mut self) -> String {
        loop {
            if let Some(message) = cut(&mut self.held) {
                return message;
            }
            let mut buffer = [0; 16_384];
            let length = self.stream.read(&mut buffer).expect("a message comes in time");
            assert!(length > 0, "the edge closed the connection");
            self.held.extend_from_slice(&buffer[..length]);
        }
    }

    pub(crate) fn final_answer(&mut self) -> String {
        loop {
            let message = self.receive();
            if status(&message) >= 200 {
                return message;
            }
        }
    }
}

/// Writes `ca.pem`, `edge.pem` and `edge.key`.
pub(crate) fn certificates(folder: &Path) {
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    // Names that differ: OpenSSL takes a certificate whose subject is its issuer for self-signed.
    params.distinguished_name.push(rcgen::DnType::CommonName, "authority");
    let key = rcgen::KeyPair::generate().expect("a key");
    let issuer = rcgen::CertifiedIssuer::self_signed(params, key).expect("an authority");
    let mut params =
        rcgen::CertificateParams::new(vec!["edge.example.net".to_owned()]).expect("parameters");
    params.distinguished_name.push(rcgen::DnType::CommonName, "edge");
    let key = rcgen::KeyPair::generate().expect("a key");
    let certificate = params.signed_by(&key, &issuer).expect("a certificate");
    let write = |file: &str, text: &str| std::fs::write(folder.join(file), text).expect("written");
    write("ca.pem", &issuer.pem());
    write("edge.pem", &certificate.pem());
    write("edge.key", &key.serialize_pem());
}

fn edge(folder: &Path, tls: u16, plain: u16, instance: u16, options: &str) -> Edge {
    certificates(folder);
    let path = |file: &str| folder.join(file).display().to_string();
    Edge::start(&format!(
        "version: 1\nnode: {{ name: test, workers: 2 }}\nadmin: {{ listen: ADMIN }}\nlisteners:\n  - name: sip\n    protocol: sip\n    bind: [udp://127.0.0.1:{plain}, tcp://127.0.0.1:{plain}, tls://127.0.0.1:{tls}]\n    pool: ims\n    tls: {{ certificates: [{{ certificate: {}, key: {} }}] }}\n    options: {{ {options} }}\npools:\n  ims:\n    backends: [{{ id: a, address: udp://127.0.0.1:{instance} }}]\n",
        path("edge.pem"),
        path("edge.key")
    ))
}

fn invite(uri: &str, call: &str, contact: &str) -> String {
    format!(
        "INVITE {uri} SIP/2.0\r\nVia: SIP/2.0/TLS alice.invalid;branch=z9hG4bK{call}\r\nMax-Forwards: 70\r\nFrom: <sip:alice@example.net>;tag=t{call}\r\nTo: <{uri}>\r\nCall-ID: {call}\r\nCSeq: 1 INVITE\r\nContact: <{contact}>\r\nContent-Length: 0\r\n\r\n"
    )
}

/// What the callee sends in a dialog, made from the INVITE that it got.
pub(super) fn bye_of_the_callee(invite: &str, from: &Client) -> String {
    let one = |name, compact| headers(invite, name, compact)[0].to_owned();
    let contact = one("Contact", "m");
    let uri = contact.trim_start_matches('<').trim_end_matches('>');
    let routes: String = headers(invite, "Record-Route", "")
        .iter()
        .map(|route| format!("Route: {route}\r\n"))
        .collect();
    format!(
        "BYE {uri} SIP/2.0\r\nVia: SIP/2.0/UDP {};rport;branch=z9hG4bKbye{}\r\nMax-Forwards: 70\r\n{routes}From: {};tag=phone\r\nTo: {}\r\nCall-ID: {}\r\nCSeq: 7 BYE\r\nContent-Length: 0\r\n\r\n",
        from.local(),
        one("Call-ID", "i"),
        one("To", "t"),
        one("From", "f"),
        one("Call-ID", "i"),
    )
}

/// Eight callers, so that their connections and the callee's datagrams are spread over both workers.
#[test]
fn a_callees_bye_reaches_the_caller_over_its_own_tls_connection() {
    let folder = tempfile::tempdir().expect("a folder");
    let (tls, plain) = (free_port(), free_port());
    let phone = Server::polite();
    let edge = edge(folder.path(), tls, plain, phone.address.port(), "cdr: true, sips: any");
    let at = ([127, 0, 0, 1], plain).into();
    for number in 0..8 {
        // A host that nobody resolves, as browsers and clients behind NAT have; and sips:.
        let (scheme, contact) = if number % 2 == 0 {
            ("sip", "sip:alice@alice.invalid;transport=tls")
        } else {
            ("sips", "sips:alice@192.0.2.77:5061")
        };
        let call = format!("secure-{number}");
        let mut caller = Secure::dial(tls, &folder.path().join("ca.pem"));
        caller.send(&invite(&format!("{scheme}:bob@example.net"), &call, contact));
        let answer_200 = caller.final_answer();
        assert_eq!(status(&answer_200), 200, "{answer_200}");
        let seen = phone.seen_text();
        let got = seen
            .iter()
            .find(|text| text.starts_with("INVITE ") && text.contains(&call))
            .expect("the callee got it");
        let routes = headers(got, "Record-Route", "");
        assert_eq!(routes.len(), 2, "{got}");
        let secure = if scheme == "sips" { "<sips:" } else { ";transport=tls" };
        assert!(routes[1].contains(secure), "{got}");
        assert!(!routes[0].contains(secure), "{got}");
        // From a socket of its own: the kernel gives it to either worker.
        let mut callee = Client::udp(at);
        callee.send(bye_of_the_callee(got, &callee).as_bytes());
        let bye = caller.receive();
        assert!(bye.starts_with("BYE "), "{bye}");
        let via = headers(&bye, "Via", "v")[0];
        assert!(via.starts_with(&format!("SIP/2.0/TLS 127.0.0.1:{tls}")), "{bye}");
        assert!(headers(&bye, "Route", "").is_empty(), "{bye}");
        caller.send(&answer(&bye, 200, ""));
        let done = callee.final_answer(Duration::from_secs(20)).expect("an answer");
        assert_eq!(status(&done), 200, "{done}");
        // A token that vouches for another connection vouches for none.
        let forged = bye_of_the_callee(got, &callee).replace(";sf=s", ";sf=t");
        callee.send(forged.replace("z9hG4bKbye", "z9hG4bKforged").as_bytes());
        let refused = callee.final_answer(Duration::from_secs(20)).expect("an answer");
        assert_ne!(status(&refused), 408, "{refused}");
    }
    drop(edge);
}

/// A CANCEL names its INVITE by branch and sent-by, over whatever connection it comes (9.1).
#[test]
fn a_cancel_over_another_connection_finds_its_invite() {
    let port = free_port();
    let phone = Server::new("127.0.0.1:0", |request: &str| match request {
        _ if request.starts_with("INVITE ") => vec![answer(request, 180, "")],
        _ if request.starts_with("CANCEL ") => {
            let invite = request.replace("CANCEL", "INVITE");
            vec![answer(request, 200, ""), answer(&invite, 487, "")]
        }
        _ => vec![],
    });
    let edge = Edge::start(&format!(
        "version: 1\nnode: {{ name: test, workers: 2 }}\nadmin: {{ listen: ADMIN }}\nlisteners:\n  - {{ name: sip, protocol: sip, bind: [udp://127.0.0.1:{port}, tcp://127.0.0.1:{port}], pool: ims }}\npools:\n  ims: {{ backends: [{{ id: a, address: udp://{} }}] }}\n",
        phone.address
    ));
    let at = ([127, 0, 0, 1], port).into();
    for number in 0..8 {
        let mut caller = Client::tcp(at);
        let invite =
            caller.request("INVITE", "sip:bob@example.net", "alice", &format!("c{number}"));
        caller.send(invite.as_bytes());
        while status(&caller.receive(Duration::from_secs(20)).expect("a 180")) != 180 {}
        let mut second = Client::tcp(at);
        // The branch has the method's name in it; that of the INVITE stays.
        let cancel =
            invite.replace("INVITE sip", "CANCEL sip").replace("CSeq: 1 INVITE", "CSeq: 1 CANCEL");
        second.send(cancel.as_bytes());
        let said = second.final_answer(Duration::from_secs(20)).expect("an answer");
        assert_eq!(status(&said), 200, "{said}");
        let end = caller.final_answer(Duration::from_secs(20)).expect("an answer");
        assert_eq!(status(&end), 487, "{end}");
        // One that fits nothing is asked for at each worker, once.
        second.send(cancel.replace("z9hG4bK", "z9hG4bKnone").as_bytes());
        let none = second.final_answer(Duration::from_secs(20)).expect("an answer");
        assert_eq!(status(&none), 481, "{none}");
    }
    drop(edge);
}

/// With records of calls, a re-INVITE goes to the worker that keeps its call's record; so must the ACK
/// of its refusal, from whatever socket. One that is missed goes on to the
/// instance, on a branch that it has not seen.
#[test]
fn the_ack_of_a_refused_re_invite_finds_the_worker_that_has_it() {
    let port = free_port();
    let phone = Server::new("127.0.0.1:0", |request: &str| match request {
        _ if request.starts_with("INVITE ") && headers(request, "To", "t")[0].contains("tag=") => {
            vec![answer(request, 491, "")]
        }
        _ if request.starts_with("INVITE ") => {
            vec![answer(request, 200, "Contact: <sip:phone@127.0.0.1>\r\n")]
        }
        _ if request.starts_with("OPTIONS ") => vec![answer(request, 200, "")],
        _ => vec![],
    });
    let edge = Edge::start(&format!(
        "version: 1\nnode: {{ name: test, workers: 2 }}\nadmin: {{ listen: ADMIN }}\nlisteners:\n  - {{ name: sip, protocol: sip, bind: [udp://127.0.0.1:{port}], pool: ims, options: {{ cdr: true }} }}\npools:\n  ims: {{ backends: [{{ id: a, address: udp://{} }}] }}\n",
        phone.address
    ));
    let at = ([127, 0, 0, 1], port).into();
    let mut caller = Client::udp(at);
    let invite = caller.request("INVITE", "sip:bob@example.net", "alice", "kept");
    caller.send(invite.as_bytes());
    let said = caller.final_answer(Duration::from_secs(20)).expect("an answer");
    assert_eq!(status(&said), 200, "{said}");
    let routes: String = headers(&said, "Record-Route", "")
        .iter()
        .map(|route| format!("Route: {route}\r\n"))
        .collect();
    let to = headers(&said, "To", "t")[0];
    for number in 0..6 {
        let mut again = Client::udp(at);
        let text = again
            .request("INVITE", "sip:phone@127.0.0.1", "alice", "kept")
            .replace("z9hG4bKkept", &format!("z9hG4bKkept{number}"))
            .replace("To: <sip:phone@127.0.0.1>", &format!("To: {to}"))
            .replace("CSeq: 1", &format!("{routes}CSeq: {}", number + 2));
        again.send(text.as_bytes());
        let refused = again.final_answer(Duration::from_secs(20)).expect("an answer");
        assert_eq!(status(&refused), 491, "{refused}");
        again.send(text.replace("INVITE sip", "ACK sip").replace(" INVITE", " ACK").as_bytes());
        // What comes after it on the same way tells that it was worked on.
        let after = text.replace("INVITE", "OPTIONS").replace("z9hG4bK", "z9hG4bKafter");
        again.send(after.as_bytes());
        let answered = again.receive_answer_to("OPTIONS", Duration::from_secs(20));
        assert_eq!(answered.as_deref().map(status), Some(200), "{answered:?}");
    }
    let seen = phone.seen_text();
    let of = |method: &str| -> std::collections::HashSet<String> {
        let asked = seen.iter().filter(|text| text.starts_with(method));
        asked.map(|text| headers(text, "Via", "v")[0].to_owned()).collect()
    };
    let (acks, invites) = (of("ACK "), of("INVITE "));
    assert!(acks.len() == 6 && acks.is_subset(&invites), "{acks:?} of {invites:?}");
    drop(edge);
}
