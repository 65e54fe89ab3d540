//! A recorder between the edge and a peer, and tshark's opinion of what it recorded.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use strowger_contract::{Framer, Framing};
use strowger_diameter::DiameterFramer;
use strowger_diameter::avp::Header;

use crate::harness::{free_port, has};

/// What went one way over one connection.
#[derive(Clone, Default)]
struct Stream {
    /// From the side that connected.
    forward: bool,
    bytes: Vec<u8>,
}

/// Passes connections on to a port and keeps what they carry.
#[derive(Clone)]
pub(crate) struct Tap {
    pub(crate) port: u16,
    streams: Arc<Mutex<Vec<Stream>>>,
    /// The near sides of its connections, in their order.
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Tap {
    /// Listens on a port of its own, for connections to `target`.
    pub(crate) fn to(target: u16) -> Self {
        let tap = Self { port: free_port(), streams: Arc::default(), open: Arc::default() };
        let listener = TcpListener::bind(("127.0.0.1", tap.port)).expect("a free port");
        let keeper = tap.clone();
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                // Who finds nobody there is told so by the closed connection.
                let Ok(far) = TcpStream::connect(("127.0.0.1", target)) else { continue };
                let handle = |stream: &TcpStream| stream.try_clone().expect("a handle");
                keeper.open.lock().unwrap_or_else(PoisonError::into_inner).push(handle(&near));
                keeper.clone().copy(handle(&near), handle(&far), true);
                keeper.clone().copy(far, near, false);
            }
        });
        tap
    }

    fn copy(self, mut from: TcpStream, mut to: TcpStream, forward: bool) {
        let _unset = (from.set_nodelay(true), to.set_nodelay(true));
        let place = {
            let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
            streams.push(Stream { forward, bytes: Vec::new() });
            streams.len() - 1
        };
        thread::spawn(move || {
            let mut part = [0; 65_536];
            while let Ok(count @ 1..) = from.read(&mut part) {
                {
                    let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
                    streams[place].bytes.extend_from_slice(&part[..count]);
                }
                if to.write_all(&part[..count]).is_err() {
                    break;
                }
            }
            let _gone = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
        });
    }

    /// The messages of one direction, connection by connection.
    fn messages(&self, forward: bool) -> Vec<Vec<u8>> {
        self.by_connection(forward).concat()
    }

    /// The messages of one direction, of each connection in its order.
    pub(crate) fn by_connection(&self, forward: bool) -> Vec<Vec<Vec<u8>>> {
        let streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let ours = streams.iter().filter(|stream| stream.forward == forward);
        let messages = ours.map(|stream| {
            let (mut messages, mut rest) = (Vec::new(), stream.bytes.as_slice());
            while let Framing::Message(length) =
                DiameterFramer.frame(rest).expect("both sides speak Diameter")
            {
                let (message, others) = rest.split_at(length.get());
                messages.push(message.to_vec());
                rest = others;
            }
            messages
        });
        messages.collect()
    }

    /// Ends a connection, by its place in the order.
    pub(crate) fn cut(&self, place: usize) {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let _gone = open[place].shutdown(Shutdown::Both);
    }

    /// What the side that connected sent.
    pub(crate) fn forth(&self) -> Vec<Vec<u8>> {
        self.messages(true)
    }

    /// What came back.
    pub(crate) fn back(&self) -> Vec<Vec<u8>> {
        self.messages(false)
    }
}

/// tshark reads these messages as Diameter over TCP, and finds nothing to object to.
pub(crate) fn dissects(messages: &[Vec<u8>]) {
    if !has("tshark") {
        return;
    }
    let folder = tempfile::TempDir::new().expect("a folder");
    let file = folder.path().join("emitted.pcap");
    std::fs::write(&file, pcap(messages)).expect("written");
    let tshark = |arguments: &[&str]| {
        let output = Command::new("tshark")
            .arg("-r")
            .arg(&file)
            .args(["-d", "tcp.port==3868,diameter"])
            .args(arguments)
            .output()
            .expect("it runs");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let commands = tshark(&["-T", "fields", "-e", "diameter.cmd.code"]);
    let expected: Vec<String> = messages
        .iter()
        .map(|message| Header::read(message).expect("framed").command.to_string())
        .collect();
    assert_eq!(commands.lines().collect::<Vec<_>>(), expected, "each is one message");
    // Errors (0x800000), and warnings (0x600000) but for what Failed-AVP gives back: there a header
    // stands without the data that it should have (RFC 6733 7.1.5).
    let objections = tshark(&[
        "-Y",
        "_ws.malformed || _ws.expert.severity >= 8388608 || (_ws.expert.severity >= 6291456 && !(diameter.Result-Code == 5014))",
        "-V",
    ]);
    assert!(objections.is_empty(), "{objections}");
}

/// Each message in a TCP segment of its own from port 40000 to 3868.
fn pcap(messages: &[Vec<u8>]) -> Vec<u8> {
    /// Raw IP.
    const LINK_TYPE: u32 = 101;
    const HEADERS: usize = 40;
    /// An IPv4 packet holds no more; the edge's own limit for messages is 64 KiB.
    const SEGMENT: usize = 60_000;
    let mut pcap = Vec::new();
    for number in [0xa1b2_c3d4u32, 0x0004_0002, 0, 0, 262_144, LINK_TYPE] {
        pcap.extend_from_slice(&number.to_le_bytes());
    }
    let mut sequence = 1u32;
    for (second, message) in messages.iter().enumerate() {
        assert!(message.len() <= SEGMENT, "one segment holds no message of {}", message.len());
        let length = HEADERS + message.len();
        for number in [second as u32, 0, length as u32, length as u32] {
            pcap.extend_from_slice(&number.to_le_bytes());
        }
        pcap.extend_from_slice(&[0x45, 0]);
        pcap.extend_from_slice(&(length as u16).to_be_bytes());
        pcap.extend_from_slice(&[0, 0, 0, 0, 64, 6, 0, 0, 127, 0, 0, 1, 127, 0, 0, 1]);
        pcap.extend_from_slice(&40_000u16.to_be_bytes());
        pcap.extend_from_slice(&3_868u16.to_be_bytes());
        pcap.extend_from_slice(&sequence.to_be_bytes());
        // No acknowledgement; PSH; a window; no checksum, nothing urgent.
        pcap.extend_from_slice(&[0, 0, 0, 0, 0x50, 0x08, 0xff, 0xff, 0, 0, 0, 0]);
        pcap.extend_from_slice(message);
        sequence = sequence.wrapping_add(message.len() as u32);
    }
    pcap
}
