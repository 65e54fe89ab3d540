//! Clients that register through the edge and are reached over their flows (RFC 3327, 5626).

use std::io::{Read, Write};
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use super::phone::{Client, Server, answer, headers, status};
use super::secure::{Secure, certificates};
use crate::harness::{Edge, free_port};

const LONG: Duration = Duration::from_secs(30);

fn register(via: &str, call: &str) -> String {
    format!(
        "REGISTER sip:example.net SIP/2.0\r\nVia: SIP/2.0/{via} 192.0.2.77:5060;rport;branch=z9hG4bK{call}\r\nMax-Forwards: 70\r\nFrom: <sip:bob@example.net>;tag=t{call}\r\nTo: <sip:bob@example.net>\r\nCall-ID: {call}\r\nCSeq: 1 REGISTER\r\nSupported: path, outbound\r\nContact: <sip:bob@192.0.2.77:5060>;reg-id=1;+sip.instance=\"<urn:uuid:{call}>\"\r\nContent-Length: 0\r\n\r\n"
    )
}

/// What the registrar sends for its user, by the Path that it was told.
fn invite(from: &Client, path: &str, call: &str) -> String {
    format!(
        "INVITE sip:bob@192.0.2.77:5060 SIP/2.0\r\nVia: SIP/2.0/UDP {};rport;branch=z9hG4bK{call}\r\nRoute: {path}\r\nMax-Forwards: 70\r\nFrom: <sip:carol@example.net>;tag=c\r\nTo: <sip:bob@example.net>\r\nCall-ID: {call}\r\nCSeq: 1 INVITE\r\nContact: <sip:carol@127.0.0.1>\r\nContent-Length: 0\r\n\r\n",
        from.local()
    )
}

/// The Path of the REGISTER with that Call-ID, once the registrar has it.
fn path_of(registrar: &Server, call: &str) -> String {
    let seen = registrar.seen_text();
    let got = seen.iter().find(|text| headers(text, "Call-ID", "i") == [call]);
    headers(got.expect("the registrar got it"), "Path", "")[0].to_owned()
}

fn registrar() -> Server {
    Server::new("127.0.0.1:0", |request: &str| {
        let path: String =
            headers(request, "Path", "").iter().map(|path| format!("Path: {path}\r\n")).collect();
        let more = format!("{path}Service-Route: <sip:orig@127.0.0.1;lr>\r\n");
        vec![answer(request, 200, &more)]
    })
}

fn edge(folder: &std::path::Path, tls: u16, plain: u16, registrar: SocketAddr) -> Edge {
    certificates(folder);
    let path = |file: &str| folder.join(file).display().to_string();
    Edge::start(&format!(
        "version: 1\nnode: {{ name: test, workers: 2 }}\nadmin: {{ listen: ADMIN }}\nlisteners:\n  - name: sip\n    protocol: sip\n    bind: [udp://127.0.0.1:{plain}, tcp://127.0.0.1:{plain}, tls://127.0.0.1:{tls}]\n    pool: registrars\n    tls: {{ certificates: [{{ certificate: {}, key: {} }}] }}\npools:\n  registrars: {{ backends: [{{ id: r, address: udp://{registrar} }}] }}\n",
        path("edge.pem"),
        path("edge.key")
    ))
}

/// Several of each, so that connections and the registrar's datagrams are spread over both workers.
#[test]
fn registered_clients_are_reached_over_udp_tcp_and_tls_and_430_tells_of_dead_flows() {
    let folder = tempfile::tempdir().expect("a folder");
    let (tls, plain) = (free_port(), free_port());
    let registrar = registrar();
    let edge = edge(folder.path(), tls, plain, registrar.address);
    let at: SocketAddr = ([127, 0, 0, 1], plain).into();
    for number in 0..4 {
        for (transport, mut client) in [("UDP", Client::udp(at)), ("TCP", Client::tcp(at))] {
            let call = format!("{transport}-{number}");
            client.send(register(transport, &call).as_bytes());
            let said = client.final_answer(LONG).expect("an answer");
            assert_eq!(
                (status(&said), headers(&said, "Service-Route", "").len()),
                (200, 1),
                "{said}"
            );
            let path = path_of(&registrar, &call);
            assert!(path.contains(";ob;lr>"), "{path}");
            // From a socket of its own: the kernel gives it to either worker.
            let mut core = Client::udp(at);
            core.send(invite(&core, &path, &format!("i{call}")).as_bytes());
            let got = client.receive(LONG).expect("the client is reached");
            assert!(got.starts_with("INVITE sip:bob@192.0.2.77:5060 "), "{got}");
            assert!(headers(&got, "Route", "").is_empty(), "{got}");
            client.send(answer(&got, 486, "").as_bytes());
            let said = core.final_answer(LONG).expect("an answer");
            assert_eq!(status(&said), 486, "{said}");
            drop(client);
            gone(&mut core, &path, &call);
        }
        let call = format!("TLS-{number}");
        let mut client = Secure::dial(tls, &folder.path().join("ca.pem"));
        client.send(&register("TLS", &call));
        assert_eq!(status(&client.final_answer()), 200);
        let path = path_of(&registrar, &call);
        let mut core = Client::udp(at);
        core.send(invite(&core, &path, &format!("i{call}")).as_bytes());
        let got = client.receive();
        assert!(got.starts_with("INVITE sip:bob@192.0.2.77:5060 "), "{got}");
        client.send(&answer(&got, 486, ""));
        assert_eq!(status(&core.final_answer(LONG).expect("an answer")), 486);
        drop(client);
        gone(&mut core, &path, &call);
    }
    let failed = edge.metric("strowger_protocol_total", &["sip_flows_failed"]);
    assert!(failed >= 12.0, "{failed}");
    drop(edge);
}

/// The client is gone: soon the registrar hears so.
fn gone(core: &mut Client, path: &str, call: &str) {
    for number in 0..200 {
        // ACKs are left out: the answers' repetitions are told apart by their Call-ID.
        let call = format!("g{call}-{number}");
        core.send(invite(core, path, &call).as_bytes());
        loop {
            let said = core.final_answer(LONG).expect("an answer");
            if headers(&said, "Call-ID", "i") != [call.as_str()] {
                continue;
            }
            if status(&said) == 430 {
                return;
            }
            break;
        }
    }
    panic!("no 430 for {call}");
}

/// RFC 3261 18.2.2: who closed its connection is answered over a new one, to the port of its Via.
#[test]
fn an_answer_finds_a_client_that_closed_its_connection() {
    let (edge_port, own) =
        (free_port(), std::net::TcpListener::bind("127.0.0.1:0").expect("a port"));
    let slow = Server::new("127.0.0.1:0", |request: &str| {
        std::thread::sleep(Duration::from_millis(1_500));
        vec![answer(request, 200, "")]
    });
    let edge = Edge::start(&format!(
        "version: 1\nnode: {{ name: test, workers: 2 }}\nadmin: {{ listen: ADMIN }}\nlisteners:\n  - name: sip\n    protocol: sip\n    bind: [udp://127.0.0.1:{edge_port}, tcp://127.0.0.1:{edge_port}]\n    pool: p\n    options: {{ failover_timeout: 10s }}\npools:\n  p: {{ backends: [{{ id: a, address: udp://{} }}] }}\n",
        slow.address
    ));
    let mut client = Client::tcp(([127, 0, 0, 1], edge_port).into());
    let (there, local) = (own.local_addr().expect("bound"), client.local());
    let request = client.request("MESSAGE", "sip:bob@example.net", "alice", "closed");
    client.send(request.replacen(&format!("TCP {local}"), &format!("TCP {there}"), 1).as_bytes());
    // It is under way when the client closes.
    edge.until("the request to be under way", |edge| edge.instance("p", "a")["in_flight"] == 1);
    drop(client);
    own.set_nonblocking(true).expect("an option");
    let end = std::time::Instant::now() + LONG;
    let mut stream = loop {
        match own.accept() {
            Ok((stream, _)) => break stream,
            Err(_) => assert!(std::time::Instant::now() < end, "nobody dials\n{}", edge.log()),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    stream.set_nonblocking(false).expect("an option");
    stream.set_read_timeout(Some(LONG)).expect("an option");
    let (mut said, mut buffer) = (Vec::new(), [0; 2_048]);
    while !said.windows(4).any(|end| end == b"\r\n\r\n") {
        let length = stream.read(&mut buffer).expect("an answer");
        assert!(length > 0, "it is closed again");
        said.extend_from_slice(&buffer[..length]);
    }
    assert!(said.starts_with(b"SIP/2.0 200"), "{}", String::from_utf8_lossy(&said));
}

/// RFC 5626 3.5.1 and 3.5.2: a double CRLF on a stream is answered by one, STUN by an address.
#[test]
fn keep_alives_are_answered_on_both_kinds_of_flows() {
    let folder = tempfile::tempdir().expect("a folder");
    let (tls, plain) = (free_port(), free_port());
    let registrar = registrar();
    let edge = edge(folder.path(), tls, plain, registrar.address);
    let at: SocketAddr = ([127, 0, 0, 1], plain).into();
    let mut stream = std::net::TcpStream::connect(at).expect("the edge listens");
    stream.set_read_timeout(Some(LONG)).expect("an option");
    stream.write_all(b"\r\n\r\n").expect("sent");
    let mut pong = [0; 2];
    stream.read_exact(&mut pong).expect("a pong");
    assert_eq!(&pong, b"\r\n");
    let mut secure = Secure::dial(tls, &folder.path().join("ca.pem"));
    secure.send("\r\n\r\n");
    assert_eq!(secure.bytes(2), b"\r\n");
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
    socket.set_read_timeout(Some(LONG)).expect("an option");
    let mut request = vec![0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42];
    request.extend_from_slice(b"twelve bytes");
    socket.send_to(&request, at).expect("sent");
    let mut said = [0; 100];
    let length = socket.recv(&mut said).expect("an answer");
    let port = socket.local_addr().expect("bound").port() ^ 0x2112;
    assert_eq!((length, &said[..4], &said[8..20]), (32, &[1, 1, 0, 12][..], &b"twelve bytes"[..]));
    assert_eq!(said[26..28], port.to_be_bytes());
    drop(edge);
}
