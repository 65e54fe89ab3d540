//! Active health checks, from the control thread. Each backend has a task of its own, so one that
//! does not answer delays no other.

use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use strowger_contract::{BackendId, Probe, ProbeReply, Transport};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::task::JoinHandle;

use crate::routing::{Backend, Core, HealthSpec, InstanceState};

/// How often the tasks are compared with the snapshot.
const RECONCILE_EVERY: Duration = Duration::from_millis(250);

/// An answer's size, at most.
const ANSWER_BYTES_MAX: usize = 65_535;

/// Makes a protocol's probe by its name.
pub type ProbeMaker = Arc<dyn Fn(&str) -> Option<Box<dyn Probe>> + Send + Sync>;

/// What a task was started for; it is started anew when this changes.
type Purpose = (SocketAddr, Transport, HealthSpec);

/// Runs the checks that the newest snapshot asks for. Never ends.
pub async fn run(core: Arc<Core>, make: ProbeMaker, seed: u64) {
    let mut tasks: HashMap<BackendId, (Purpose, JoinHandle<()>)> = HashMap::new();
    loop {
        let snapshot = core.snapshot();
        let mut wanted: HashMap<BackendId, Purpose> = HashMap::new();
        for pool in snapshot.pools() {
            for backend in pool.backends().filter(|_| pool.spec.health.probe.is_some()) {
                if backend.state() != InstanceState::Gone {
                    wanted.insert(backend.id, purpose(backend, &pool.spec.health));
                }
            }
        }
        tasks.retain(|backend, (purpose, task)| {
            let keep = wanted.get(backend) == Some(purpose);
            if !keep {
                task.abort();
            }
            keep
        });
        for (backend, purpose) in wanted {
            tasks.entry(backend).or_insert_with(|| {
                let check = Check {
                    core: Arc::clone(&core),
                    make: Arc::clone(&make),
                    backend,
                    nonce: seed ^ u64::from(backend.0) << 32,
                };
                (purpose.clone(), tokio::spawn(check.run(purpose)))
            });
        }
        tokio::time::sleep(RECONCILE_EVERY).await;
    }
}

fn purpose(backend: &Backend, health: &HealthSpec) -> Purpose {
    (backend.spec.address, backend.spec.transport, health.clone())
}

struct Check {
    core: Arc<Core>,
    make: ProbeMaker,
    backend: BackendId,
    nonce: u64,
}

/// What one check found, with a word for the log.
pub(crate) type Found = Result<(), &'static str>;

impl Check {
    async fn run(mut self, (address, transport, health): Purpose) {
        let mut probe = health.probe.as_deref().and_then(|name| (self.make)(name));
        let silence = probe.as_ref().is_some_and(|probe| probe.is_silence_good());
        // Spread, so that a thousand backends are not asked in the same millisecond.
        let spread = health.interval.mul_f64(self.unit());
        tokio::time::sleep(spread).await;
        let mut ticks = tokio::time::interval(health.interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.nonce = self.nonce.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let ask = ask(probe.as_deref_mut(), address, transport, self.nonce);
            let found = tokio::time::timeout(health.timeout, ask).await;
            let found = found.unwrap_or(if silence { Ok(()) } else { Err("no answer in time") });
            let detail = found.err().unwrap_or("");
            self.core.probe_result(Instant::now(), self.backend, found.is_ok(), detail);
        }
    }

    fn unit(&self) -> f64 {
        let bits = (self.nonce ^ self.nonce >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40;
        bits as f64 / f64::from(1 << 24)
    }
}

/// One check: by the protocol's probe, or whether it takes connections.
pub(crate) async fn ask(
    probe: Option<&mut (dyn Probe + 'static)>,
    address: SocketAddr,
    transport: Transport,
    nonce: u64,
) -> Found {
    match (probe, transport) {
        (None, Transport::Unix) => {
            let path = strowger_contract::unix::path(address).ok_or("unknown path")?;
            let socket = tokio::net::UnixStream::connect(&*path).await;
            socket.map(drop).map_err(|error| connect_word(&error))
        }
        (None, _) => {
            TcpStream::connect(address).await.map(drop).map_err(|error| connect_word(&error))
        }
        (Some(probe), Transport::Udp) => ask_datagram(probe, address, nonce).await,
        (Some(probe), _) => ask_stream(probe, address, transport, nonce).await,
    }
}

/// A socket of its own for each question: an answer that comes late finds nobody, and a connected
/// one hears at once that nobody listens there (ICMP).
async fn ask_datagram(probe: &mut dyn Probe, address: SocketAddr, nonce: u64) -> Found {
    let any = match address {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    };
    let failed = |_| "no socket";
    let socket = UdpSocket::bind(any).await.map_err(failed)?;
    socket.connect(address).await.map_err(|_| "no route")?;
    let local = socket.local_addr().map_err(failed)?;
    let mut request = Vec::new();
    probe.request(local, address, Transport::Udp, nonce, &mut request);
    socket.send(&request).await.map_err(|error| connect_word(&error))?;
    let mut answer = vec![0; ANSWER_BYTES_MAX];
    loop {
        let length = socket.recv(&mut answer).await.map_err(|error| connect_word(&error))?;
        match probe.reply(address, &answer[..length]) {
            ProbeReply::Healthy => return Ok(()),
            ProbeReply::Unhealthy(why) => return Err(why),
            ProbeReply::Other | ProbeReply::Incomplete => {}
        }
    }
}

async fn ask_stream(
    probe: &mut dyn Probe,
    address: SocketAddr,
    transport: Transport,
    nonce: u64,
) -> Found {
    let mut stream = TcpStream::connect(address).await.map_err(|error| connect_word(&error))?;
    let local = stream.local_addr().map_err(|_| "no socket")?;
    let mut request = Vec::new();
    probe.request(local, address, transport, nonce, &mut request);
    stream.write_all(&request).await.map_err(|_| "connection lost")?;
    let mut answer = Vec::new();
    while answer.len() < ANSWER_BYTES_MAX {
        let count = stream.read_buf(&mut answer).await.map_err(|_| "connection lost")?;
        match probe.reply(address, &answer) {
            ProbeReply::Healthy => return Ok(()),
            ProbeReply::Unhealthy(why) => return Err(why),
            ProbeReply::Other => answer.clear(),
            ProbeReply::Incomplete => {}
        }
        if count == 0 {
            return Err("connection ended without an answer");
        }
    }
    Err("answer too large")
}

fn connect_word(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::ConnectionRefused => "refused",
        std::io::ErrorKind::ConnectionReset => "reset",
        _ => "unreachable",
    }
}
