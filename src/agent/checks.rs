//! Health checks: exec, tcp, http, sip-options, diameter.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use strowger_contract::{Protocol, Transport};
use strowger_diameter::avp::{Header, Summary, code};
use strowger_diameter::build::Builder;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::http::{Ask, Target, ask};
use super::manifest::{App, Check, PortTransport};
use crate::control::probes;

const CAPABILITIES_EXCHANGE: u32 = 257;
const WATCHDOG: u32 = 280;
const DISCONNECT: u32 = 282;
const SUCCESS: u32 = 2_001;
/// The application that every relay has (RFC 6733 2.4).
const RELAY: u32 = 0xffff_ffff;
/// A Diameter answer, at most.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// What a check needs to know of its instance.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    pub(crate) host: IpAddr,
    pub(crate) ports: BTreeMap<String, (PortTransport, Option<u16>, PathBuf)>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) folder: PathBuf,
    /// Who asks, to Diameter peers.
    pub(crate) origin: String,
}

impl Subject {
    fn at(&self, port: &str) -> Result<(PortTransport, SocketAddr, PathBuf), String> {
        let (transport, number, path) = self.ports.get(port).ok_or("no such port")?;
        let address = SocketAddr::new(self.host, number.unwrap_or(0));
        Ok((*transport, address, path.clone()))
    }
}

/// The subject of an instance's checks.
pub(crate) fn subject(
    app: &App,
    places: &super::launch::Places,
    instance: &super::supervisor::Instance,
    env: BTreeMap<String, String>,
    folder: PathBuf,
) -> Subject {
    let ports = app.ports.iter().map(|(name, spec)| {
        let number = instance.ports.get(name).copied();
        (name.clone(), (spec.transport, number, places.socket(name)))
    });
    let origin = format!("{}.agent.invalid", instance.id);
    Subject { host: app.host, ports: ports.collect(), env, folder, origin }
}

/// Checks once.
///
/// # Errors
/// What is wrong, in a few words.
pub(crate) async fn check(check: &Check, subject: &Subject, nonce: u64) -> Result<(), String> {
    let one = one(check, subject, nonce);
    tokio::time::timeout(check.timeout.0, one)
        .await
        .unwrap_or_else(|_| Err("no answer in time".to_owned()))
}

async fn one(check: &Check, subject: &Subject, nonce: u64) -> Result<(), String> {
    if let Some(exec) = &check.exec {
        run(exec, subject).await
    } else if let Some(port) = &check.tcp {
        match subject.at(port)? {
            (PortTransport::Unix, _, path) => {
                UnixStream::connect(path).await.map(drop).map_err(|error| error.to_string())
            }
            (_, address, _) => {
                TcpStream::connect(address).await.map(drop).map_err(|error| error.to_string())
            }
        }
    } else if let Some(http) = &check.http {
        let (_, address, _) = subject.at(&http.port)?;
        let target = Target { authority: address.to_string(), tls: false };
        let path = &http.path;
        let question =
            Ask { method: "GET", path, token: None, generation: None, body: String::new() };
        let (status, _) = ask(&target, None, &question, check.timeout.0).await?;
        if (200..300).contains(&status) { Ok(()) } else { Err(format!("answered {status}")) }
    } else if let Some(port) = &check.sip_options {
        let (transport, address, _) = subject.at(port)?;
        let transport =
            if transport == PortTransport::Udp { Transport::Udp } else { Transport::Tcp };
        let mut probe = strowger_sip::Sip::probe("sip-options").ok_or("no such probe")?;
        probes::ask(Some(&mut *probe), address, transport, nonce).await.map_err(str::to_owned)
    } else if let Some(port) = &check.diameter {
        let (_, address, _) = subject.at(port)?;
        diameter(address, &subject.origin, nonce).await
    } else {
        Err("no check".to_owned())
    }
}

/// Runs a program; it must end with 0.
///
/// # Errors
/// How it ended otherwise.
pub(crate) async fn run(exec: &[String], subject: &Subject) -> Result<(), String> {
    let fill = |word: &String| super::expand::expand(word, &|name| subject.env.get(name).cloned());
    let words: Result<Vec<String>, String> = exec.iter().map(fill).collect();
    let words = words?;
    let status = tokio::process::Command::new(&words[0])
        .args(&words[1..])
        .env_clear()
        .envs(&subject.env)
        .current_dir(&subject.folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .status()
        .await
        .map_err(|error| format!("{}: {error}", words[0]))?;
    if status.success() { Ok(()) } else { Err(format!("{}: {status}", words[0])) }
}

/// CER, DWR, DPR: a peer that answers the first two is alive (RFC 6733 5.3, 5.5).
async fn diameter(address: SocketAddr, origin: &str, nonce: u64) -> Result<(), String> {
    let mut stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
    let local = stream.local_addr().map_err(|error| error.to_string())?;
    let mut request = Vec::new();
    for command in [CAPABILITIES_EXCHANGE, WATCHDOG] {
        request.clear();
        let hop = nonce as u32 ^ command;
        let builder = Builder::new(&mut request, 0x80, command, 0, hop, hop)
            .text(code::ORIGIN_HOST, origin)
            .text(code::ORIGIN_REALM, "agent.invalid");
        if command == CAPABILITIES_EXCHANGE {
            builder
                .address(code::HOST_IP_ADDRESS, local.ip())
                .number(code::VENDOR_ID, 0)
                .text(code::PRODUCT_NAME, "strowger-agent")
                .application(RELAY)
                .finish();
        } else {
            builder.finish();
        }
        stream.write_all(&request).await.map_err(|error| error.to_string())?;
        let answer = read_answer(&mut stream, command).await?;
        match Summary::of(&answer).result_code {
            Some(SUCCESS) => {}
            Some(other) => return Err(format!("answered {other}")),
            None => return Err("answered without a Result-Code".to_owned()),
        }
    }
    request.clear();
    Builder::new(&mut request, 0x80, DISCONNECT, 0, 1, 1)
        .text(code::ORIGIN_HOST, origin)
        .text(code::ORIGIN_REALM, "agent.invalid")
        .number(code::DISCONNECT_CAUSE, 0)
        .finish();
    // It is polite; the connection ends either way.
    let _polite = stream.write_all(&request).await;
    let _waited = tokio::time::timeout(Duration::from_millis(50), stream.read_u8()).await;
    Ok(())
}

async fn read_answer(stream: &mut TcpStream, command: u32) -> Result<Vec<u8>, String> {
    let lost = |error: std::io::Error| format!("connection lost: {error}");
    loop {
        let mut message = vec![0; 4];
        stream.read_exact(&mut message).await.map_err(lost)?;
        let length = u32::from_be_bytes([0, message[1], message[2], message[3]]) as usize;
        if !(20..=ANSWER_BYTES_MAX).contains(&length) {
            return Err("no Diameter".to_owned());
        }
        message.resize(length, 0);
        stream.read_exact(&mut message[4..]).await.map_err(lost)?;
        let header = Header::read(&message);
        // A request of the peer may come between.
        if header.is_some_and(|it| it.command == command && !it.is_request()) {
            return Ok(message);
        }
    }
}
