//! Small SIP ends in this process, for what sipp cannot say.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The values of a header (long or compact name), as they stand.
pub(crate) fn headers<'a>(message: &'a str, name: &str, compact: &str) -> Vec<&'a str> {
    let head = message.split("\r\n\r\n").next().unwrap_or_default();
    let lines = head.split("\r\n").skip(1).filter_map(|line| line.split_once(':'));
    let fits = |found: &str| {
        let found = found.trim();
        found.eq_ignore_ascii_case(name)
            || !compact.is_empty() && found.eq_ignore_ascii_case(compact)
    };
    lines.filter(|(found, _)| fits(found)).map(|(_, value)| value.trim()).collect()
}

/// The status of a response, or 0.
pub(crate) fn status(message: &str) -> u16 {
    let code = message.strip_prefix("SIP/2.0 ").and_then(|rest| rest.get(..3));
    code.and_then(|code| code.parse().ok()).unwrap_or(0)
}

/// An answer with what an answer copies.
pub(crate) fn answer(request: &str, code: u16, more: &str) -> String {
    let mut text = format!("SIP/2.0 {code} Said\r\n");
    for (name, compact) in
        [("Via", "v"), ("Record-Route", ""), ("From", "f"), ("Call-ID", "i"), ("CSeq", "")]
    {
        for value in headers(request, name, compact) {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
    }
    for to in headers(request, "To", "t") {
        let tag = if to.contains("tag=") || code == 100 { "" } else { ";tag=phone" };
        text.push_str(&format!("To: {to}{tag}\r\n"));
    }
    text.push_str(&format!("{more}Content-Length: 0\r\n\r\n"));
    text
}

type Answerer = dyn Fn(&str) -> Vec<String> + Send + Sync;

/// A UDP user agent server in a thread. It keeps what it got.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<Vec<u8>>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Says 200 to all requests but ACK.
    pub(crate) fn polite() -> Self {
        Self::new("127.0.0.1:0", |request: &str| {
            let silent = request.starts_with("ACK ") || request.starts_with("SIP/2.0");
            if silent {
                vec![]
            } else {
                vec![answer(request, 200, "Contact: <sip:phone@127.0.0.1>\r\n")]
            }
        })
    }

    pub(crate) fn new(
        bind: &str,
        answers: impl Fn(&str) -> Vec<String> + Send + Sync + 'static,
    ) -> Self {
        let socket = UdpSocket::bind(bind).expect("a free port");
        Self::over(socket, Box::new(answers))
    }

    fn over(socket: UdpSocket, answers: Box<Answerer>) -> Self {
        let address = socket.local_addr().expect("bound");
        socket.set_read_timeout(Some(Duration::from_millis(50))).expect("an option");
        let (seen, stop) =
            (Arc::<Mutex<Vec<Vec<u8>>>>::default(), Arc::new(AtomicBool::new(false)));
        let (kept, ends) = (Arc::clone(&seen), Arc::clone(&stop));
        let work = move || {
            let mut buffer = vec![0; 65_536];
            while !ends.load(Ordering::Relaxed) {
                let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
                let bytes = &buffer[..length];
                kept.lock().unwrap_or_else(PoisonError::into_inner).push(bytes.to_vec());
                for answer in answers(&String::from_utf8_lossy(bytes)) {
                    // The other end may be gone at the end of a test.
                    let _gone = socket.send_to(answer.as_bytes(), from);
                }
            }
        };
        Self { address, seen, stop, thread: Some(std::thread::spawn(work)) }
    }

    pub(crate) fn seen(&self) -> Vec<Vec<u8>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn seen_text(&self) -> Vec<String> {
        self.seen().iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}

/// A client over UDP or TCP.
pub(crate) enum Client {
    Udp(UdpSocket),
    Tcp(TcpStream, Vec<u8>),
}

impl Client {
    pub(crate) fn udp(edge: SocketAddr) -> Self {
        let any = if edge.is_ipv6() { "[::1]:0" } else { "127.0.0.1:0" };
        let socket = UdpSocket::bind(any).expect("a free port");
        socket.connect(edge).expect("loopback");
        Self::Udp(socket)
    }

    pub(crate) fn tcp(edge: SocketAddr) -> Self {
        Self::Tcp(TcpStream::connect(edge).expect("the edge listens"), Vec::new())
    }

    pub(crate) fn local(&self) -> SocketAddr {
        match self {
            Self::Udp(socket) => socket.local_addr(),
            Self::Tcp(stream, _) => stream.local_addr(),
        }
        .expect("bound")
    }

    pub(crate) fn via(&self) -> &'static str {
        if matches!(self, Self::Udp(_)) { "UDP" } else { "TCP" }
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        match self {
            Self::Udp(socket) => drop(socket.send(bytes).expect("sent")),
            Self::Tcp(stream, _) => stream.write_all(bytes).expect("sent"),
        }
    }

    /// The next message, if one comes in time.
    pub(crate) fn receive(&mut self, limit: Duration) -> Option<String> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let mut buffer = vec![0; 65_536];
            match self {
                Self::Udp(socket) => {
                    socket.set_read_timeout(Some(left)).expect("an option");
                    if let Ok(length) = socket.recv(&mut buffer) {
                        return Some(String::from_utf8_lossy(&buffer[..length]).into_owned());
                    }
                }
                Self::Tcp(stream, held) => {
                    if let Some(message) = cut(held) {
                        return Some(message);
                    }
                    stream.set_read_timeout(Some(left)).expect("an option");
                    match stream.read(&mut buffer) {
                        Ok(0) => return None,
                        Ok(length) => held.extend_from_slice(&buffer[..length]),
                        Err(_) => {}
                    }
                }
            }
        }
    }

    /// The first final answer.
    pub(crate) fn final_answer(&mut self, limit: Duration) -> Option<String> {
        let end = Instant::now() + limit;
        loop {
            let message = self.receive(end.saturating_duration_since(Instant::now()))?;
            if status(&message) >= 200 {
                return Some(message);
            }
        }
    }

    /// The first final answer to a request of this method.
    pub(crate) fn receive_answer_to(&mut self, method: &str, limit: Duration) -> Option<String> {
        let end = Instant::now() + limit;
        loop {
            let message = self.final_answer(end.saturating_duration_since(Instant::now()))?;
            if headers(&message, "CSeq", "").iter().any(|number| number.ends_with(method)) {
                return Some(message);
            }
        }
    }

    /// A plain request of a new transaction, with a Call-ID of its own.
    pub(crate) fn request(&self, method: &str, uri: &str, from: &str, call: &str) -> String {
        let (local, via) = (self.local(), self.via());
        format!(
            "{method} {uri} SIP/2.0\r\nVia: SIP/2.0/{via} {local};rport;branch=z9hG4bK{call}{method}\r\nMax-Forwards: 70\r\nFrom: <sip:{from}@example.net>;tag=t{call}\r\nTo: <{uri}>\r\nCall-ID: {call}\r\nCSeq: 1 {method}\r\nContact: <sip:{from}@{local}>\r\nContent-Length: 0\r\n\r\n"
        )
    }
}

/// The first whole message of a stream.
pub(crate) fn cut(held: &mut Vec<u8>) -> Option<String> {
    while held.starts_with(b"\r\n") {
        held.drain(..2);
    }
    let head = held.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let text = String::from_utf8_lossy(&held[..head]).into_owned();
    let length =
        headers(&text, "Content-Length", "l").first().and_then(|value| value.parse::<usize>().ok());
    let total = head + length.unwrap_or(0);
    (held.len() >= total).then(|| {
        let message: Vec<u8> = held.drain(..total).collect();
        String::from_utf8_lossy(&message).into_owned()
    })
}
