//! SIP over WebSocket (RFC 7118): a client of another's making calls a UDP instance, and is called
//! back over its own connection; what hostile clients do.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::phone::{Client, Server, headers, status};
use super::secure::{bye_of_the_callee, certificates};
use crate::harness::{Edge, Process, free_port};

/// A phone in a browser's place, with python3-websockets. It says what it sees; its INVITE goes in
/// fragments, and it answers one BYE.
const PHONE: &str = r#"
import asyncio, ssl, sys, websockets
uri, call, authority = sys.argv[1], sys.argv[2], sys.argv[3]
def header(text, name):
    return [line.split(':', 1)[1].strip() for line in text.split('\r\n')
            if line.lower().startswith(name.lower() + ':')]
async def main():
    context = None
    if uri.startswith('wss:'):
        context = ssl.create_default_context(cafile=authority)
    for wrong, options in (('403', dict(subprotocols=['sip'], origin='https://evil.example')),
                           ('400', dict(subprotocols=['chat'], origin='https://phone.example'))):
        try:
            await websockets.connect(uri, ssl=context, server_hostname=context and 'edge.example.net', **options)
            print('accepted', wrong, flush=True)
        except websockets.exceptions.InvalidStatusCode as error:
            assert str(error.status_code) == wrong, error
    async with websockets.connect(uri, ssl=context, subprotocols=['sip'], origin='https://phone.example',
                                  ping_interval=None, server_hostname=context and 'edge.example.net') as socket:
        assert socket.subprotocol == 'sip'
        await asyncio.wait_for(await socket.ping(), 30)
        await socket.send('\r\n\r\n')
        assert await asyncio.wait_for(socket.recv(), 30) == '\r\n', 'keep-alive'
        via = 'WSS' if context else 'WS'
        invite = ('INVITE sip:bob@example.net SIP/2.0\r\nVia: SIP/2.0/%s df7jal23ls0d.invalid;branch=z9hG4bK%s\r\n'
                  'Max-Forwards: 70\r\nFrom: <sip:alice@example.net>;tag=t\r\nTo: <sip:bob@example.net>\r\n'
                  'Call-ID: %s\r\nCSeq: 1 INVITE\r\nContact: <sip:alice@df7jal23ls0d.invalid;transport=ws>\r\n'
                  'Content-Length: 0\r\n\r\n') % (via, call, call)
        await socket.send([invite[:30], invite[30:200], invite[200:]])
        while True:
            answer = await asyncio.wait_for(socket.recv(), 30)
            assert isinstance(answer, str), 'text is sent as text'
            if answer.startswith('SIP/2.0 200'):
                break
            assert answer.startswith('SIP/2.0 1'), answer
        assert len(header(answer, 'Via')) == 1 and header(answer, 'Via')[0].startswith('SIP/2.0/' + via), answer
        routes = header(answer, 'Record-Route')
        print('routes', ' '.join(routes), flush=True)
        contact = header(answer, 'Contact')[0].strip('<>')
        await socket.send('ACK %s SIP/2.0\r\nVia: SIP/2.0/%s df7jal23ls0d.invalid;branch=z9hG4bKack%s\r\nMax-Forwards: 70\r\n%sFrom: <sip:alice@example.net>;tag=t\r\nTo: %s\r\nCall-ID: %s\r\nCSeq: 1 ACK\r\nContent-Length: 0\r\n\r\n' % (
            contact, via, call, ''.join('Route: %s\r\n' % route for route in reversed(routes)), header(answer, 'To')[0], call))
        print('called', flush=True)
        bye = await asyncio.wait_for(socket.recv(), 60)
        assert bye.startswith('BYE sip:alice@df7jal23ls0d.invalid;transport=ws SIP/2.0'), bye
        copied = ''.join('%s: %s\r\n' % (name, value) for name in ('Via', 'From', 'To', 'Call-ID', 'CSeq') for value in header(bye, name))
        await socket.send(('SIP/2.0 200 OK\r\n' + copied + 'Content-Length: 0\r\n\r\n').encode())
    print('done', flush=True)
asyncio.run(main())
"#;

fn edge(folder: &Path, ws: u16, wss: u16, plain: u16, instance: u16) -> Edge {
    certificates(folder);
    let path = |file: &str| folder.join(file).display().to_string();
    Edge::start(&format!(
        "version: 1\nnode: {{ name: test, workers: 2 }}\nadmin: {{ listen: ADMIN }}\nlisteners:\n  - name: sip\n    protocol: sip\n    bind: [udp://127.0.0.1:{plain}, ws://127.0.0.1:{ws}, wss://127.0.0.1:{wss}]\n    pool: ims\n    tls: {{ certificates: [{{ certificate: {}, key: {} }}] }}\n    websocket: {{ origins: [https://phone.example], message_bytes: 4096, handshake: 1s }}\npools:\n  ims:\n    backends: [{{ id: a, address: udp://127.0.0.1:{instance} }}]\n",
        path("edge.pem"),
        path("edge.key")
    ))
}

fn counted(edge: &Edge, what: &str) -> f64 {
    edge.metric("strowger_protocol_total", &[&format!("\"{what}\"")])
}

#[test]
fn a_websocket_client_calls_and_is_called_back() {
    // Debian's own: another one in the path does not know Debian's packages.
    let python = "/usr/bin/python3";
    let knows = Command::new(python).args(["-c", "import websockets"]).status();
    if !knows.is_ok_and(|status| status.success()) {
        assert!(std::env::var_os("CI").is_none(), "python3-websockets must be installed in CI");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (ws, wss, plain) = (free_port(), free_port(), free_port());
    let instance = Server::polite();
    let edge = edge(folder.path(), ws, wss, plain, instance.address.port());
    std::fs::write(folder.path().join("phone.py"), PHONE).expect("written");
    for (number, uri) in
        [format!("ws://127.0.0.1:{ws}/"), format!("wss://127.0.0.1:{wss}/")].iter().enumerate()
    {
        let call = format!("browser-{number}");
        let log = folder.path().join(format!("{number}.log"));
        let mut command = Command::new(python);
        command
            .arg(folder.path().join("phone.py"))
            .args([uri, &call])
            .arg(folder.path().join("ca.pem"));
        let mut phone = Process::spawn(&mut command, &log);
        let said = || std::fs::read_to_string(&log).unwrap_or_default();
        edge.until("the call", |_| said().contains("called") || said().contains("Error"));
        let seen = |method: &str| {
            let seen = instance.seen_text();
            seen.into_iter().find(|text| text.starts_with(method) && text.contains(&call))
        };
        edge.until("the ACK", |_| seen("ACK").is_some());
        let invite = seen("INVITE").expect("it was answered");
        let routes = headers(&invite, "Record-Route", "").concat();
        let scheme = uri.split(':').next().unwrap_or_default();
        assert!(routes.contains(&format!(";transport={scheme}")), "{routes}\n{}", said());
        let mut callee = Client::udp(([127, 0, 0, 1], plain).into());
        callee.send(bye_of_the_callee(&invite, &callee).as_bytes());
        let answer = callee.final_answer(Duration::from_secs(30)).expect("an answer");
        assert_eq!(status(&answer), 200, "{answer}\n{}", said());
        assert_eq!(phone.wait(Duration::from_secs(30)), Some(0), "{}", said());
    }
    assert_eq!(counted(&edge, "ws_opened"), 2.0);
    assert_eq!(counted(&edge, "ws_origin_refused"), 2.0);
    assert_eq!(counted(&edge, "ws_subprotocol_missing"), 2.0);
}

/// What is slow, too long or wrong ends, is counted, and costs nobody else anything.
#[test]
fn hostile_websocket_clients_are_cut_off() {
    let folder = tempfile::tempdir().expect("a folder");
    let (ws, wss, plain) = (free_port(), free_port(), free_port());
    let instance = Server::polite();
    let edge = edge(folder.path(), ws, wss, plain, instance.address.port());
    let dial = || {
        let stream = TcpStream::connect(("127.0.0.1", ws)).expect("the edge accepts");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("an option");
        stream
    };
    let end = |mut stream: TcpStream| {
        let mut rest = Vec::new();
        // A reset is an end as well.
        let _end = stream.read_to_end(&mut rest);
        String::from_utf8_lossy(&rest).into_owned()
    };
    let request = "GET / HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\nOrigin: https://phone.example\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: chat, sip\r\n\r\n";
    // Byte by byte is no crime, as long as it is in time.
    let mut slow = dial();
    for byte in request.as_bytes() {
        slow.write_all(&[*byte]).expect("sent");
    }
    let mut head = vec![0; 12];
    slow.read_exact(&mut head).expect("an answer");
    assert_eq!(head, b"HTTP/1.1 101");
    let silent = dial();
    assert_eq!(end(silent), "");
    edge.until("the silent one", |edge| counted(edge, "ws_handshake_late") == 1.0);
    for (bytes, word) in [
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "ws_handshake_wrong"),
        (
            format!("GET / HTTP/1.1\r\nCookie: {}\r\n", "x".repeat(17 << 10)),
            "ws_handshake_too_long",
        ),
        ("\u{16}\u{3}\u{1}".repeat(10) + "\r\n\r\n", "ws_handshake_wrong"),
    ] {
        let before = counted(&edge, word);
        let mut stream = dial();
        stream.write_all(bytes.as_bytes()).expect("sent");
        end(stream);
        edge.until(word, |edge| counted(edge, word) == before + 1.0);
    }
    let long = [&[0x82, 0x80 | 126, 0x20, 0x00, 0, 0, 0, 0][..], &[0; 0x2000]].concat();
    for (bytes, word) in [
        (long, "ws_message_too_long"),
        (vec![0x82, 2, 1, 2], "ws_frame_wrong"),
        (vec![0x81, 0x81, 0, 0, 0, 0, 0xff], "ws_not_utf8"),
    ] {
        let before = counted(&edge, word);
        let mut stream = dial();
        stream.write_all(request.as_bytes()).expect("sent");
        stream.write_all(&bytes).expect("sent");
        assert!(end(stream).starts_with("HTTP/1.1 101"));
        edge.until(word, |edge| counted(edge, word) == before + 1.0);
    }
    let mut other = Client::udp(([127, 0, 0, 1], plain).into());
    other.send(b"OPTIONS sip:x@example.net SIP/2.0\r\nVia: SIP/2.0/UDP 127.0.0.1;rport;branch=z9hG4bKo\r\nMax-Forwards: 70\r\nFrom: <sip:a@example.net>;tag=1\r\nTo: <sip:x@example.net>\r\nCall-ID: other\r\nCSeq: 1 OPTIONS\r\nContent-Length: 0\r\n\r\n");
    let answer = other.final_answer(Duration::from_secs(30)).expect("an answer");
    assert_eq!(status(&answer), 200);
}

/// A silent client is asked whether it is there; one that answers stays, without a message, and one
/// that does not is gone.
#[test]
fn silent_websocket_clients_are_asked() {
    let folder = tempfile::tempdir().expect("a folder");
    let ws = free_port();
    let edge = Edge::start_in(
        folder,
        &format!(
            "version: 1\nnode: {{ workers: 1 }}\nadmin: {{ listen: ADMIN }}\nlisteners:\n  - name: sip\n    protocol: sip\n    bind: [\"ws://127.0.0.1:{ws}\", \"udp://127.0.0.1:{}\"]\n    pool: ims\n    websocket: {{ ping: 1s }}\npools:\n  ims: {{ backends: [{{ id: a, address: \"udp://127.0.0.1:{}\" }}] }}\n",
            free_port(),
            free_port()
        ),
    );
    let mut stream = TcpStream::connect(("127.0.0.1", ws)).expect("the edge accepts");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("an option");
    let request = "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: sip\r\n\r\n";
    stream.write_all(request.as_bytes()).expect("sent");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("an answer");
        head.push(byte[0]);
    }
    for _ in 0..3 {
        let mut ping = [0; 2];
        stream.read_exact(&mut ping).expect("it asks");
        assert_eq!(ping, [0x89, 0]);
        stream.write_all(&[0x8a, 0x80, 1, 2, 3, 4]).expect("open");
    }
    assert_eq!(counted(&edge, "ws_silent"), 0.0);
    let mut rest = Vec::new();
    // A reset is an end as well.
    let _end = stream.read_to_end(&mut rest);
    assert_eq!(rest, [0x89, 0], "asked once more, and then no longer there");
    edge.until("it to be counted", |edge| counted(edge, "ws_silent") == 1.0);
}
