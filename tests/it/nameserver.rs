//! A name server in this process: records that a test may change, and silence on demand.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::str::FromStr as _;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use hickory_resolver::proto::op::{Message, ResponseCode};
use hickory_resolver::proto::rr::rdata::{A, AAAA, NAPTR, SRV};
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};

type Zone = HashMap<(String, RecordType), Vec<RData>>;

#[derive(Default)]
struct Shared {
    zone: Mutex<Zone>,
    mute: AtomicBool,
    stop: AtomicBool,
    ttl: AtomicU32,
    asked: Mutex<Vec<String>>,
}

/// It ends with its handle.
pub(crate) struct NameServer {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl NameServer {
    pub(crate) fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
        let address = socket.local_addr().expect("bound");
        socket.set_read_timeout(Some(Duration::from_millis(50))).expect("an option");
        let shared = Arc::new(Shared { ttl: AtomicU32::new(60), ..Shared::default() });
        let inside = Arc::clone(&shared);
        let serve = move || {
            let mut buffer = [0; 4_096];
            while !inside.stop.load(Ordering::Relaxed) {
                let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
                if let Some(answer) = inside.answer(&buffer[..length]) {
                    let _gone = socket.send_to(&answer, from);
                }
            }
        };
        Self { address, shared, thread: Some(std::thread::spawn(serve)) }
    }

    /// Answers no more, or again.
    pub(crate) fn mute(&self, mute: bool) {
        self.shared.mute.store(mute, Ordering::Relaxed);
    }

    /// How long answers hold from now on, in seconds.
    pub(crate) fn ttl(&self, seconds: u32) {
        self.shared.ttl.store(seconds, Ordering::Relaxed);
    }

    /// What was asked, as `name type`.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.shared.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn add(&self, name: &str, data: RData) {
        let mut zone = self.shared.zone.lock().unwrap_or_else(PoisonError::into_inner);
        zone.entry((name.to_owned(), data.record_type())).or_default().push(data);
    }

    /// Takes a name's records of all types away.
    pub(crate) fn remove(&self, name: &str) {
        let mut zone = self.shared.zone.lock().unwrap_or_else(PoisonError::into_inner);
        zone.retain(|(known, _), _| known != name);
    }

    pub(crate) fn a(&self, name: &str, address: &str) {
        let data = match address.parse().expect("an address") {
            IpAddr::V4(ip) => RData::A(A(ip)),
            IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
        };
        self.add(name, data);
    }

    pub(crate) fn srv(&self, name: &str, priority: u16, weight: u16, port: u16, target: &str) {
        let target = Name::from_str(target).expect("a name");
        self.add(name, RData::SRV(SRV::new(priority, weight, port, target)));
    }

    pub(crate) fn naptr(&self, name: &str, order: u16, service: &str, replacement: &str) {
        let bytes = |text: &str| text.as_bytes().into();
        let replacement = Name::from_str(replacement).expect("a name");
        let record = NAPTR::new(order, 10, bytes("s"), bytes(service), bytes(""), replacement);
        self.add(name, RData::NAPTR(record));
    }
}

impl Shared {
    fn answer(&self, question: &[u8]) -> Option<Vec<u8>> {
        let question = Message::from_vec(question).ok()?;
        let query = question.queries.first()?.clone();
        let name = query.name().to_ascii().to_lowercase();
        let asked = format!("{name} {}", query.query_type());
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).push(asked);
        if self.mute.load(Ordering::Relaxed) {
            return None;
        }
        let mut answer = Message::response(question.metadata.id, question.metadata.op_code);
        answer.metadata.recursion_available = true;
        let zone = self.zone.lock().unwrap_or_else(PoisonError::into_inner);
        let ttl = self.ttl.load(Ordering::Relaxed);
        for data in zone.get(&(name.clone(), query.query_type())).into_iter().flatten() {
            answer.add_answer(Record::from_rdata(query.name().clone(), ttl, data.clone()));
        }
        if !zone.keys().any(|(known, _)| *known == name) {
            answer.metadata.response_code = ResponseCode::NXDomain;
        }
        answer.add_query(query);
        answer.to_vec().ok()
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}
