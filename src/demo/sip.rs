//! Sample SIP: instances that answer every call, and a client that makes calls and hangs up.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::time::{Instant, interval, sleep, timeout};

use super::Counts;

/// RFC 3261's T1, and how long a request may take in all.
const T1: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(16);

/// Answers requests until it is dropped; an INVITE so late as `stall` says, with a line on standard
/// output.
pub(super) async fn serve(port: u16, name: &str, stall: Duration) {
    let Ok(socket) = UdpSocket::bind(("127.0.0.1", port)).await else { return };
    let socket = Arc::new(socket);
    let mut buffer = vec![0; 65_536];
    let mut late = tokio::task::JoinSet::new();
    loop {
        while late.try_join_next().is_some() {}
        // A refused answer of before shows up here; there is nothing to do about it.
        let Ok((length, from)) = socket.recv_from(&mut buffer).await else { continue };
        let Ok(request) = std::str::from_utf8(&buffer[..length]) else { continue };
        let answers = answers(request, name, port);
        let method = request.split(' ').next().unwrap_or_default();
        if ["INVITE", "BYE"].contains(&method) {
            println!("{method} {}", value(request, "Call-ID"));
        }
        if method == "INVITE" && !stall.is_zero() {
            let socket = Arc::clone(&socket);
            late.spawn(async move {
                sleep(stall).await;
                send(&socket, &answers, from).await;
            });
        } else {
            send(&socket, &answers, from).await;
        }
    }
}

async fn send(socket: &UdpSocket, answers: &[String], to: SocketAddr) {
    for answer in answers {
        if socket.send_to(answer.as_bytes(), to).await.is_err() {
            break;
        }
    }
}

/// The values of a header, in order.
fn values<'a>(message: &'a str, name: &str) -> impl Iterator<Item = &'a str> {
    message.split("\r\n").take_while(|line| !line.is_empty()).filter_map(move |line| {
        let (found, value) = line.split_once(':')?;
        found.trim().eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

fn value<'a>(message: &'a str, name: &str) -> &'a str {
    values(message, name).next().unwrap_or_default()
}

fn answers(request: &str, name: &str, port: u16) -> Vec<String> {
    let method = request.split(' ').next().unwrap_or_default();
    let answer = |code: &str| {
        let mut lines = vec![format!("SIP/2.0 {code}")];
        for header in ["Via", "Record-Route"] {
            lines.extend(values(request, header).map(|value| format!("{header}: {value}")));
        }
        let to = value(request, "To");
        let tag = if to.contains(";tag=") { String::new() } else { format!(";tag={name}") };
        lines.push(format!("From: {}", value(request, "From")));
        lines.push(format!("To: {to}{tag}"));
        lines.push(format!("Call-ID: {}", value(request, "Call-ID")));
        lines.push(format!("CSeq: {}", value(request, "CSeq")));
        lines.push(format!("Contact: <sip:{name}@127.0.0.1:{port}>"));
        lines.push(format!("Server: {name}"));
        lines.push("Content-Length: 0\r\n\r\n".to_owned());
        lines.join("\r\n")
    };
    match method {
        "SIP/2.0" | "ACK" => Vec::new(),
        "INVITE" => vec![answer("180 Ringing"), answer("200 OK")],
        _ => vec![answer("200 OK")],
    }
}

/// Makes calls at a rate until it is dropped.
pub(super) async fn traffic(edge: SocketAddr, rate: u32, counts: Arc<Counts>) {
    let mut pace = interval(Duration::from_secs(1) / rate);
    let mut calls = tokio::task::JoinSet::new();
    // The edge starts a moment after us.
    sleep(Duration::from_millis(800)).await;
    for number in 0u64.. {
        pace.tick().await;
        while calls.try_join_next().is_some() {}
        calls.spawn(call(number, edge, Arc::clone(&counts)));
    }
}

/// One client in one call.
struct Caller {
    socket: UdpSocket,
    local: SocketAddr,
    call_id: String,
    tag: String,
    sequence: u32,
}

async fn call(number: u64, edge: SocketAddr, counts: Arc<Counts>) {
    let Some(mut caller) = Caller::new(number, edge).await else {
        return counts.calls.note(false);
    };
    let to = "<sip:service@example.net>";
    let invite = caller.request("INVITE", "sip:service@example.net", to, &[]);
    let answer = caller.transact("INVITE", &invite).await;
    let Some(answer) = answer.filter(|answer| answer.starts_with("SIP/2.0 200")) else {
        return counts.calls.note(false);
    };
    counts.calls.note(true);
    let mut routes: Vec<&str> = values(&answer, "Record-Route").collect();
    routes.reverse();
    let contact = value(&answer, "Contact").trim_matches(['<', '>']);
    let ack = caller.request("ACK", contact, value(&answer, "To"), &routes);
    if caller.socket.send(ack.as_bytes()).await.is_err() {
        return;
    }
    sleep(Duration::from_millis(500 + number * 37 % 2_000)).await;
    caller.sequence += 1;
    let bye = caller.request("BYE", contact, value(&answer, "To"), &routes);
    match caller.transact("BYE", &bye).await {
        Some(last) if last.starts_with("SIP/2.0 200") => {
            if value(&last, "Server") != value(&answer, "Server") {
                counts.moved.fetch_add(1, Ordering::Relaxed);
            }
        }
        _ => {
            counts.calls_lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Caller {
    async fn new(number: u64, edge: SocketAddr) -> Option<Self> {
        let socket = UdpSocket::bind("127.0.0.1:0").await.ok()?;
        socket.connect(edge).await.ok()?;
        let local = socket.local_addr().ok()?;
        let call_id = format!("{number}-{}@demo.example.net", std::process::id());
        Some(Self { socket, local, call_id, tag: format!("c{number}"), sequence: 1 })
    }

    fn request(&self, method: &str, uri: &str, to: &str, routes: &[&str]) -> String {
        let (local, tag, sequence) = (self.local, &self.tag, self.sequence);
        let branch = format!("z9hG4bK{tag}x{sequence}x{method}");
        let routes: String = routes.iter().map(|route| format!("Route: {route}\r\n")).collect();
        format!(
            "{method} {uri} SIP/2.0\r\nVia: SIP/2.0/UDP {local};branch={branch};rport\r\n{routes}Max-Forwards: 70\r\nFrom: <sip:caller@example.net>;tag={tag}\r\nTo: {to}\r\nCall-ID: {}\r\nCSeq: {sequence} {method}\r\nContact: <sip:caller@{local}>\r\nContent-Length: 0\r\n\r\n",
            self.call_id
        )
    }

    /// Sends a request, repeats it as UDP needs, and waits for its final answer.
    async fn transact(&self, method: &str, request: &str) -> Option<String> {
        let end = Instant::now() + PATIENCE;
        let (mut pause, mut heard) = (T1, false);
        let mut buffer = vec![0; 16_384];
        while Instant::now() < end {
            if !heard {
                // A port that is not yet there refuses; the repetition will find it.
                let _refused = self.socket.send(request.as_bytes()).await;
            }
            let until = Instant::now() + pause;
            while let Ok(received) = timeout(
                until.saturating_duration_since(Instant::now()),
                self.socket.recv(&mut buffer),
            )
            .await
            {
                let Ok(length) = received else {
                    sleep(Duration::from_millis(20)).await;
                    continue;
                };
                let answer = String::from_utf8_lossy(&buffer[..length]).into_owned();
                if !value(&answer, "CSeq").ends_with(method) {
                    continue;
                }
                heard = true;
                if !answer.starts_with("SIP/2.0 1") {
                    return Some(answer);
                }
            }
            pause = (pause * 2).min(T1 * 8);
        }
        None
    }
}
