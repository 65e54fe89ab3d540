//! Live upgrade of each kind of connection: TLS, unix sockets, WebSocket in the middle of a frame, UDP
//! flows; and by a service manager's signal.

use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::Command;
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use crate::harness::{Process, alone, free_port, http};
use crate::sip::phone::{Server, status};
use crate::sip::secure::{Secure, certificates};
use crate::upgrade::{HEAD, LONG, Line, echo};

fn exchange(stream: &mut (impl Read + Write), text: &[u8], what: &str) {
    stream.write_all(text).unwrap_or_else(|error| panic!("{what}: {error}"));
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(answer, text, "{what}");
}

/// A raw flow over TLS stays whole in the old process, which does nothing else and ends with it; new
/// ones go to the new process.
#[test]
fn raw_flows_over_tls_stay_until_they_end() {
    let _alone = alone();
    let folder = TempDir::new().expect("a folder");
    certificates(folder.path());
    let (port, backend) = (free_port(), free_port());
    echo(backend);
    let path = |file: &str| folder.path().join(file).display().to_string();
    let mut line = Line::start(&format!(
        "{HEAD}listeners:\n  - name: db\n    protocol: tcp\n    bind: [\"tls://127.0.0.1:{port}\"]\n    pool: db\n    tls: {{ certificates: [{{ certificate: {}, key: {} }}] }}\npools:\n  db: {{ backends: [{{ id: a, address: \"tcp://127.0.0.1:{backend}\" }}] }}\n",
        path("edge.pem"),
        path("edge.key")
    ));
    let ca = folder.path().join("ca.pem");
    let mut old = Secure::dial(port, &ca);
    old.send("before");
    assert_eq!(old.bytes(6), b"before");
    line.upgrade();
    let mut new = Secure::dial(port, &ca);
    for _ in 0..20 {
        for stream in [&mut old, &mut new] {
            stream.send("and after");
            assert_eq!(stream.bytes(9), b"and after");
        }
    }
    assert_eq!(line.json_connections("db"), 1, "the new process has the new one alone");
    assert!(line.processes[0].is_alive(), "{}", line.log(0));
    drop(old);
    line.old_one_ends();
    new.send("still there");
    assert_eq!(new.bytes(11), b"still there");
}

#[test]
fn unix_sockets_go_over_with_their_file_and_flows() {
    let _alone = alone();
    let folder = TempDir::new().expect("a folder");
    let (front, back) = (folder.path().join("front.sock"), folder.path().join("back.sock"));
    let listener = UnixListener::bind(&back).expect("bound");
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut buffer = [0; 4_096];
                while let Ok(count) = stream.read(&mut buffer) {
                    if count == 0 || stream.write_all(&buffer[..count]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    let mut line = Line::start(&format!(
        "{HEAD}listeners:\n  - {{ name: db, protocol: tcp, bind: [\"unix://{}\"], pool: db }}\npools:\n  db: {{ backends: [{{ id: a, address: \"unix://{}\" }}] }}\n",
        front.display(),
        back.display()
    ));
    let dial = || {
        let stream = UnixStream::connect(&front).expect("the edge listens");
        stream.set_read_timeout(Some(LONG)).expect("an option");
        stream
    };
    let mut streams = vec![dial()];
    for round in 0..3 {
        for stream in &mut streams {
            exchange(stream, b"over and over", &format!("round {round}"));
        }
        line.upgrade();
        line.old_one_ends();
        streams.push(dial());
    }
    for stream in &mut streams {
        exchange(stream, b"at the end", "the end");
    }
    assert_eq!(line.json_connections("db"), 4);
}

/// A client's frame: masked (RFC 6455 5.3).
fn frame(head: u8, payload: &[u8]) -> Vec<u8> {
    let mask = [9, 2, 5, 8];
    let mut bytes = vec![head, 0x80 | 126];
    bytes.extend_from_slice(&(payload.len() as u16).to_be_bytes());
    bytes.extend_from_slice(&mask);
    bytes.extend(payload.iter().enumerate().map(|(at, byte)| byte ^ mask[at % 4]));
    bytes
}

fn options(call: &str) -> Vec<u8> {
    format!("OPTIONS sip:x@example.net SIP/2.0\r\nVia: SIP/2.0/WS x.invalid;branch=z9hG4bK{call}\r\nMax-Forwards: 70\r\nFrom: <sip:a@example.net>;tag=1\r\nTo: <sip:x@example.net>\r\nCall-ID: {call}\r\nCSeq: 1 OPTIONS\r\nContent-Length: 0\r\n\r\n").into_bytes()
}

/// What a WebSocket client does, whatever its stream is.
trait Socket {
    fn say(&mut self, bytes: &[u8]);
    fn hear(&mut self, count: usize) -> Vec<u8>;

    fn shake_hands(&mut self) {
        self.say(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: sip\r\n\r\n");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.extend(self.hear(1));
        }
        assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
    }

    /// The next frame, head and payload.
    fn next(&mut self) -> (u8, Vec<u8>) {
        let head = self.hear(2);
        let length = match head[1] {
            126 => u16::from_be_bytes(self.hear(2).try_into().expect("two")).into(),
            short => usize::from(short),
        };
        (head[0], self.hear(length))
    }

    fn answered(&mut self, call: &str) {
        let (head, payload) = self.next();
        let text = String::from_utf8_lossy(&payload).into_owned();
        assert_eq!((head, status(&text)), (0x81, 200), "{text}");
        assert!(text.contains(call), "{text}");
    }
}

impl Socket for TcpStream {
    fn say(&mut self, bytes: &[u8]) {
        self.write_all(bytes).expect("sent");
    }

    fn hear(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.read_exact(&mut bytes).expect("an answer");
        bytes
    }
}

impl Socket for Secure {
    fn say(&mut self, bytes: &[u8]) {
        self.send_bytes(bytes);
    }

    fn hear(&mut self, count: usize) -> Vec<u8> {
        self.bytes(count)
    }
}

/// `ws://` goes to the new process, also in the middle of a frame and of a message; `wss://` is served
/// by the new one, and sealed by the old one.
#[test]
fn websocket_connections_go_over_in_the_middle_of_a_frame() {
    let _alone = alone();
    let folder = TempDir::new().expect("a folder");
    certificates(folder.path());
    let (ws, wss) = (free_port(), free_port());
    let instance = Server::polite();
    let path = |file: &str| folder.path().join(file).display().to_string();
    let mut line = Line::start(&format!(
        "{HEAD}listeners:\n  - name: sip\n    protocol: sip\n    bind: [\"ws://127.0.0.1:{ws}\", \"wss://127.0.0.1:{wss}\", \"udp://127.0.0.1:{}\"]\n    pool: ims\n    tls: {{ certificates: [{{ certificate: {}, key: {} }}] }}\npools:\n  ims: {{ backends: [{{ id: a, address: \"udp://{}\" }}] }}\n",
        free_port(),
        path("edge.pem"),
        path("edge.key"),
        instance.address
    ));
    let plain = TcpStream::connect(("127.0.0.1", ws)).expect("the edge accepts");
    plain.set_read_timeout(Some(LONG)).expect("an option");
    let secure = Secure::dial(wss, &folder.path().join("ca.pem"));
    let mut sockets: [Box<dyn Socket>; 2] = [Box::new(plain), Box::new(secure)];
    for (number, socket) in sockets.iter_mut().enumerate() {
        socket.shake_hands();
        let call = format!("before-{number}");
        socket.say(&frame(0x81, &options(&call)));
        socket.answered(&call);
        // Half a message in one whole frame, and half of the next frame; an answered ping between.
        let message = options(&format!("across-{number}"));
        let (first, rest) = message.split_at(100);
        socket.say(&frame(0x01, first));
        socket.say(&frame(0x89, b"ping"));
        assert_eq!(socket.next(), (0x8a, b"ping".to_vec()));
        socket.say(&frame(0x80, rest)[..50]);
    }
    // The pong came, so what was before it was read; what came after may be in the kernel's hands.
    thread::sleep(Duration::from_millis(300));
    line.upgrade();
    for (number, socket) in sockets.iter_mut().enumerate() {
        let message = options(&format!("across-{number}"));
        socket.say(&frame(0x80, &message[100..])[50..]);
        socket.answered(&format!("across-{number}"));
        socket.say(&frame(0x89, b"still there"));
        assert_eq!(socket.next(), (0x8a, b"still there".to_vec()));
        let call = format!("after-{number}");
        socket.say(&frame(0x81, &options(&call)));
        socket.answered(&call);
    }
    assert_eq!(line.json_connections("sip"), 2);
    let [plain, secure] = sockets;
    drop(secure);
    line.old_one_ends();
    line.until("the end of one", |line| line.json_connections("sip") == 1);
    drop(plain);
}

/// A flow of a `udp` listener keeps its backend and the socket that goes there, so that what is under
/// way comes back.
#[test]
fn udp_flows_keep_their_backend_and_socket() {
    let _alone = alone();
    let port = free_port();
    let backends: Vec<UdpSocket> = (0..2)
        .map(|_| {
            let socket = UdpSocket::bind("127.0.0.1:0").expect("loopback");
            socket.set_read_timeout(Some(LONG)).expect("an option");
            socket
        })
        .collect();
    let address = |index: usize| backends[index].local_addr().expect("bound");
    let mut line = Line::start(&format!(
        "{HEAD}listeners:\n  - {{ name: media, protocol: udp, bind: [\"udp://127.0.0.1:{port}\"], pool: back }}\npools:\n  back: {{ session: {{ key: source }}, backends: [{{ id: a, address: \"udp://{}\" }}, {{ id: b, address: \"udp://{}\" }}] }}\n",
        address(0),
        address(1)
    ));
    // Each says where it is seen, by whoever it was.
    let ask = |client: &UdpSocket, delayed: bool| {
        client.send(if delayed { b"later" } else { b"hello" }).expect("sent");
    };
    for (index, backend) in backends.iter().enumerate() {
        let backend = backend.try_clone().expect("a handle");
        thread::spawn(move || {
            let mut buffer = [0; 100];
            let mut held = Vec::new();
            while let Ok((length, from)) = backend.recv_from(&mut buffer) {
                if &buffer[..length] == b"later" {
                    held.push(from);
                    continue;
                }
                for to in held.drain(..).chain([from]) {
                    let _sent = backend.send_to(format!("{index} {to}").as_bytes(), to);
                }
            }
        });
    }
    let clients: Vec<UdpSocket> = (0..20)
        .map(|_| {
            let client = UdpSocket::bind("127.0.0.1:0").expect("loopback");
            client.connect(("127.0.0.1", port)).expect("loopback");
            client.set_read_timeout(Some(LONG)).expect("an option");
            client
        })
        .collect();
    let hear = |client: &UdpSocket| {
        let mut buffer = [0; 100];
        let length = client.recv(&mut buffer).expect("an answer");
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    let before: Vec<String> = clients
        .iter()
        .map(|client| {
            ask(client, false);
            hear(client)
        })
        .collect();
    assert!(["0 ", "1 "].iter().all(|who| before.iter().any(|told| told.starts_with(who))));
    for round in 0..2 {
        // The answer to this one comes back through the new process.
        ask(&clients[0], true);
        line.upgrade();
        line.old_one_ends();
        for (client, told) in clients.iter().zip(&before) {
            ask(client, false);
            assert_eq!(&hear(client), told, "round {round}: another backend or another socket");
        }
        assert_eq!(&hear(&clients[0]), &before[0], "round {round}: the answer under way");
    }
    assert_eq!(line.metric("strowger_protocol_total{listener=\"media\",what=\"flow_opened\""), 0.0);
}

/// A flow of a `udp` listener that waits for a slot keeps its place and what its client has sent.
#[test]
fn udp_flows_that_wait_lose_no_datagram() {
    let _alone = alone();
    let port = free_port();
    let backend = UdpSocket::bind("127.0.0.1:0").expect("loopback");
    backend.set_read_timeout(Some(LONG)).expect("an option");
    let mut line = Line::start(&format!(
        "{HEAD}classes:\n  setup: {{ queue_max: 9, deadline: 30s }}\nlisteners:\n  - {{ name: names, protocol: udp, bind: [\"udp://127.0.0.1:{port}\"], pool: back, options: {{ responses: 1 }} }}\npools:\n  back: {{ backends: [{{ id: a, address: \"udp://{}\", capacity: 1 }}] }}\n",
        backend.local_addr().expect("bound"),
    ));
    let client = || {
        let client = UdpSocket::bind("127.0.0.1:0").expect("loopback");
        client.connect(("127.0.0.1", port)).expect("loopback");
        client.set_read_timeout(Some(LONG)).expect("an option");
        client
    };
    let hear = || {
        let mut buffer = [0; 100];
        let (length, from) = backend.recv_from(&mut buffer).expect("a datagram");
        (String::from_utf8_lossy(&buffer[..length]).into_owned(), from)
    };
    let (first, second) = (client(), client());
    first.send(b"first").expect("sent");
    let (told, to) = hear();
    assert_eq!(told, "first");
    second.send(b"second").expect("sent");
    let opened = "strowger_protocol_total{listener=\"names\",what=\"flow_opened\"";
    line.until("both flows", |line| line.metric(opened) == 2.0);
    line.upgrade();
    line.old_one_ends();
    // The answer ends the first flow: its slot is the second one's.
    backend.send_to(b"answer", to).expect("sent");
    assert_eq!(first.recv(&mut [0; 9]).expect("an answer"), 6);
    let (told, to) = hear();
    assert_eq!(told, "second");
    backend.send_to(b"answer", to).expect("sent");
    assert_eq!(second.recv(&mut [0; 9]).expect("an answer"), 6);
    assert_eq!(line.metric(opened), 0.0, "it began anew");
}

/// Ends a process that is not this one's child.
struct Stranger(String);

impl Drop for Stranger {
    fn drop(&mut self) {
        let _gone = Command::new("kill").args(["-KILL", &self.0]).status();
    }
}

/// What systemd would see: SIGUSR2 at the main process, and another main process that is ready.
#[test]
fn a_service_manager_upgrades_by_a_signal() {
    let _alone = alone();
    let folder = TempDir::new().expect("a folder");
    let notify = folder.path().join("notify");
    let manager = UnixDatagram::bind(&notify).expect("bound");
    manager.set_read_timeout(Some(LONG)).expect("an option");
    let (admin, port, backend) = (free_port(), free_port(), free_port());
    echo(backend);
    let file = folder.path().join("edge.yaml");
    std::fs::write(
        &file,
        format!(
            "version: 1\nadmin: {{ listen: \"127.0.0.1:{admin}\" }}\nlisteners:\n  - {{ name: db, protocol: tcp, bind: [\"tcp://127.0.0.1:{port}\"], pool: db }}\npools:\n  db: {{ backends: [{{ id: a, address: \"tcp://127.0.0.1:{backend}\" }}] }}\n"
        ),
    )
    .expect("written");
    let mut command = Command::new(env!("CARGO_BIN_EXE_strowger"));
    command.args(["run", "--log", "info", "--drain", "1s", "--config"]).arg(&file);
    command.arg("--upgrade").arg(folder.path().join("upgrade.sock")).env("NOTIFY_SOCKET", &notify);
    let log = folder.path().join("edge.log");
    let mut old = Process::spawn(&mut command, &log);
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    // Who said it, by the kernel's word, is not asked here: one of them is the other's child.
    let hear_of = |what: &str| loop {
        let mut text = [0; 1_024];
        let length = manager.recv(&mut text).unwrap_or_else(|error| panic!("{error}: {}", said()));
        let text = String::from_utf8_lossy(&text[..length]).into_owned();
        if let Some(line) = text.lines().find(|line| line.starts_with(what)) {
            return line.to_owned();
        }
    };
    hear_of("READY=1");
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("accepted");
    stream.set_read_timeout(Some(LONG)).expect("an option");
    exchange(&mut stream, b"before", "before");
    old.signal("USR2");
    // The two processes speak in any order.
    let told = hear_of("MAINPID=");
    let pid = told.trim_start_matches("MAINPID=").to_owned();
    let _ends = Stranger(pid.clone());
    assert_ne!(pid, old.id().to_string());
    assert_eq!(old.wait(LONG), Some(0), "{}", said());
    exchange(&mut stream, b"and after", "after");
    let (code, _) = http(([127, 0, 0, 1], admin).into(), "GET", "/readyz", "").expect("it serves");
    assert_eq!(code, 200);
    Command::new("kill").args(["-TERM", &pid]).status().expect("kill runs");
    drop(stream);
    hear_of("STOPPING=1");
}
