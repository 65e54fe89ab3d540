//! Sample Diameter: PCRFs that grant everything, and a gateway with Gx sessions of four requests.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use strowger_diameter::avp::{FLAG_REQUEST, Header, Summary, code};
use strowger_diameter::build::Builder;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{interval, sleep};

use super::Counts;

const GX: u32 = 16_777_238;
const CAPABILITIES_EXCHANGE: u32 = 257;
const CREDIT_CONTROL: u32 = 272;
const DISCONNECT_PEER: u32 = 282;
const SUCCESS: u32 = 2_001;
const REALM: &str = "example.net";

/// What a sample takes at most: its peers are this process's own.
const MESSAGE_MAX: usize = 64 << 10;

/// The time between two requests, and how many make a session.
const PACE: Duration = Duration::from_millis(20);
const SESSION_REQUESTS: u32 = 4;

/// Answers requests until it is dropped.
pub(super) async fn serve(port: u16, name: &str) {
    let Ok(listener) = TcpListener::bind(("127.0.0.1", port)).await else { return };
    let mut connections = JoinSet::new();
    let host = format!("{name}.{REALM}");
    while let Ok((stream, _)) = listener.accept().await {
        while connections.try_join_next().is_some() {}
        connections.spawn(serve_one(stream, host.clone()));
    }
}

async fn serve_one(stream: TcpStream, host: String) {
    let (mut reader, mut writer) = stream.into_split();
    while let Ok(message) = read(&mut reader).await {
        let Some(header) = Header::read(&message).filter(Header::is_request) else { continue };
        let answer = answer(&header, &message, &host);
        if writer.write_all(&answer).await.is_err() || header.command == DISCONNECT_PEER {
            return;
        }
    }
}

fn answer(header: &Header, request: &[u8], host: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let (hop, end) = (header.hop_by_hop, header.end_to_end);
    let flags = header.flags & 0x40;
    let mut builder = Builder::new(&mut bytes, flags, header.command, header.application, hop, end);
    if let Some(session) = Summary::of(request).session_id {
        builder = builder.bytes(code::SESSION_ID, session);
    }
    let builder = builder.number(code::RESULT_CODE, SUCCESS);
    introduce(builder, host, header.command).finish();
    bytes
}

/// Who we are, and for a capabilities exchange what we can.
fn introduce<'b>(builder: Builder<'b>, host: &str, command: u32) -> Builder<'b> {
    let builder = builder.text(code::ORIGIN_HOST, host).text(code::ORIGIN_REALM, REALM);
    if command != CAPABILITIES_EXCHANGE {
        return builder;
    }
    builder
        .address(code::HOST_IP_ADDRESS, std::net::Ipv4Addr::LOCALHOST.into())
        .number(code::VENDOR_ID, 0)
        .text(code::PRODUCT_NAME, "strowger-demo")
        .application(GX)
}

async fn read(reader: &mut OwnedReadHalf) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    reader.read_exact(&mut bytes).await?;
    let length = u32::from_be_bytes([0, bytes[1], bytes[2], bytes[3]]) as usize;
    if !(20..=MESSAGE_MAX).contains(&length) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    bytes.resize(length, 0);
    reader.read_exact(&mut bytes[4..]).await?;
    Ok(bytes)
}

/// Sends requests until it is dropped; connects again when the connection ends.
pub(super) async fn traffic(edge: SocketAddr, counts: Arc<Counts>) {
    let mut number = 0;
    loop {
        sleep(Duration::from_millis(800)).await;
        if let Ok(stream) = TcpStream::connect(edge).await {
            // Its end is seen in the counts, and the next round connects again.
            let _ended = client(stream, &mut number, &counts).await;
        }
    }
}

async fn client(stream: TcpStream, number: &mut u32, counts: &Counts) -> io::Result<()> {
    const HOST: &str = "gateway.example.net";
    let (mut reader, mut writer) = stream.into_split();
    let mut cer = Vec::new();
    let builder = Builder::new(&mut cer, FLAG_REQUEST, CAPABILITIES_EXCHANGE, 0, 1, 1);
    introduce(builder, HOST, CAPABILITIES_EXCHANGE).finish();
    writer.write_all(&cer).await?;
    let cea = read(&mut reader).await?;
    if Summary::of(&cea).result_code != Some(SUCCESS) {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    let (sender, mut received) = mpsc::channel(64);
    let mut reading = JoinSet::new();
    reading.spawn(async move {
        while let Ok(message) = read(&mut reader).await {
            if sender.send(message).await.is_err() {
                return;
            }
        }
    });
    let mut pace = interval(PACE);
    let mut waiting: HashMap<u32, ()> = HashMap::new();
    loop {
        tokio::select! {
            _ = pace.tick() => {
                *number += 1;
                waiting.insert(*number, ());
                writer.write_all(&request(*number, HOST)).await?;
            }
            message = received.recv() => match message {
                None => {
                    waiting.drain().for_each(|_| counts.diameter.note(false));
                    return Ok(());
                }
                Some(message) => take(&message, HOST, &mut waiting, &mut writer, counts).await?,
            }
        }
    }
}

async fn take(
    message: &[u8],
    host: &str,
    waiting: &mut HashMap<u32, ()>,
    writer: &mut OwnedWriteHalf,
    counts: &Counts,
) -> io::Result<()> {
    let Some(header) = Header::read(message) else { return Ok(()) };
    if header.is_request() {
        // A watchdog, or a goodbye.
        return writer.write_all(&answer(&header, message, host)).await;
    }
    if waiting.remove(&header.hop_by_hop).is_some() {
        counts.diameter.note(Summary::of(message).result_code == Some(SUCCESS));
    }
    Ok(())
}

fn request(number: u32, host: &str) -> Vec<u8> {
    let (session, step) = (number / SESSION_REQUESTS, number % SESSION_REQUESTS);
    // Initial, update, termination (RFC 8506 8.3).
    let kind = match step {
        0 => 1,
        last if last == SESSION_REQUESTS - 1 => 3,
        _ => 2,
    };
    let mut bytes = Vec::new();
    Builder::request(&mut bytes, CREDIT_CONTROL, GX, number, number)
        .text(code::SESSION_ID, &format!("{host};{};{session}", std::process::id()))
        .text(code::ORIGIN_HOST, host)
        .text(code::ORIGIN_REALM, REALM)
        .text(code::DESTINATION_REALM, REALM)
        .number(code::AUTH_APPLICATION_ID, GX)
        .number(code::CC_REQUEST_TYPE, kind)
        .number(415, step)
        .finish();
    bytes
}
