//! The cache and its bounds, against a name server on loopback.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;

use hickory_resolver::proto::op::{Message, MessageType, ResponseCode};
use hickory_resolver::proto::rr::rdata::A;
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};
use strowger_contract::{NameScheme, Place, Transport, Transports};

use super::*;
use crate::observe::Metrics;

/// Answers each A question below `there.` with one address, others with NXDOMAIN, and nothing while it is mute.
struct Server {
    address: SocketAddr,
    mute: Arc<AtomicBool>,
    asked: Arc<AtomicUsize>,
}

impl Server {
    fn start(ttl: u32) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let address = socket.local_addr().expect("an address");
        let (mute, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (muted, count) = (Arc::clone(&mute), Arc::clone(&asked));
        std::thread::spawn(move || {
            let mut buffer = [0; 2_048];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                count.fetch_add(1, Ordering::Relaxed);
                if muted.load(Ordering::Relaxed) {
                    continue;
                }
                let answer = answer(&buffer[..length], ttl);
                socket.send_to(&answer, from).expect("it is sent");
            }
        });
        Self { address, mute, asked }
    }
}

fn answer(question: &[u8], ttl: u32) -> Vec<u8> {
    let question = Message::from_vec(question).expect("a question");
    let query = question.queries.first().expect("a query").clone();
    let mut answer = Message::response(question.metadata.id, question.metadata.op_code);
    answer.metadata.message_type = MessageType::Response;
    answer.metadata.recursion_available = true;
    let there = Name::from_ascii("there.").expect("a name").zone_of(query.name());
    if there && query.query_type() == RecordType::A {
        let address = RData::A(A::new(192, 0, 2, 1));
        answer.add_answer(Record::from_rdata(query.name().clone(), ttl, address));
    } else if !there {
        answer.metadata.response_code = ResponseCode::NXDomain;
    }
    answer.add_query(query);
    answer.to_vec().expect("an answer")
}

fn names(server: SocketAddr, change: impl FnOnce(&mut DnsSettings)) -> Arc<Names> {
    let metrics = Metrics::new();
    let names = Names::start(DnsMetrics::new(&metrics), Events::new(metrics)).expect("it starts");
    let mut settings = DnsSettings {
        servers: vec![server],
        query_timeout: Duration::from_millis(200),
        timeout: Duration::from_secs(1),
        ..DnsSettings::default()
    };
    change(&mut settings);
    names.configure(&settings);
    names
}

fn question(port: u16) -> Lookup {
    Lookup {
        scheme: NameScheme::Sip,
        transport: None,
        port: Some(port),
        transports: Transports::NONE.with(Transport::Udp),
        ipv4: true,
        ipv6: false,
        seed: 0,
    }
}

fn ask(names: &Names, host: &str) -> Answer {
    let (sender, answers) = mpsc::channel();
    names.ask(host.as_bytes(), &question(5060), Box::new(move |answer| drop(sender.send(answer))));
    answers.recv_timeout(Duration::from_secs(30)).expect("an answer")
}

fn place() -> Place {
    Place { transport: Transport::Udp, address: SocketAddr::from(([192, 0, 2, 1], 5060)) }
}

#[test]
fn an_answer_is_remembered_and_so_is_that_there_is_none() {
    let server = Server::start(60);
    let names = names(server.address, |_| ());
    assert!(names.known(b"a.there", &question(5060)).is_none());
    assert_eq!(ask(&names, "a.there").as_deref(), Ok(&[place()][..]));
    let asked = server.asked.load(Ordering::Relaxed);
    let known = names.known(b"A.There.", &question(5060)).expect("it is known");
    assert_eq!(known.as_deref(), Ok(&[place()][..]));
    assert_eq!(ask(&names, "nowhere"), Err(Unresolved::NoSuchName));
    let known = names.known(b"nowhere", &question(5060));
    assert_eq!(known, Some(Err(Unresolved::NoSuchName)));
    assert_eq!(ask(&names, "a..b"), Err(Unresolved::Malformed));
    assert!(server.asked.load(Ordering::Relaxed) > asked);
    assert_eq!(names.remembered(), 3);
}

/// The thread that asks is free at once, questions for one name wait for one answer, and what is
/// over the bounds hears so.
#[test]
fn a_server_that_never_answers_costs_only_who_asked() {
    let server = Server::start(60);
    server.mute.store(true, Ordering::Relaxed);
    let names = names(server.address, |settings| settings.concurrent = 4);
    let (sender, answers) = mpsc::channel();
    let started = Instant::now();
    for number in 0..3 * QUESTIONS_MAX {
        let sender = sender.clone();
        let host = format!("name-{}.there", number % (2 * QUESTIONS_MAX));
        let reply = Box::new(move |answer| drop(sender.send(answer)));
        names.ask(host.as_bytes(), &question(5060), reply);
    }
    let asking = started.elapsed();
    let mut busy = 0;
    for _ in 0..3 * QUESTIONS_MAX {
        match answers.recv_timeout(Duration::from_secs(60)).expect("each is answered") {
            Err(Unresolved::Busy) => busy += 1,
            answer => assert_eq!(answer, Err(Unresolved::NoAnswer)),
        }
    }
    assert!(busy >= QUESTIONS_MAX / 2, "{busy} were refused; asking took {asking:?}");
    server.mute.store(false, Ordering::Relaxed);
    assert_eq!(ask(&names, "another.there").as_deref(), Ok(&[place()][..]));
}

#[test]
fn the_last_answer_serves_while_nobody_answers() {
    let server = Server::start(1);
    let names = names(server.address, |_| ());
    assert!(ask(&names, "a.there").is_ok());
    server.mute.store(true, Ordering::Relaxed);
    let end = Instant::now() + Duration::from_secs(30);
    while names.known(b"a.there", &question(5060)).is_some() {
        assert!(Instant::now() < end, "a TTL of a second runs out");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(ask(&names, "a.there").as_deref(), Ok(&[place()][..]), "it serves on");
    assert_eq!(ask(&names, "b.there"), Err(Unresolved::NoAnswer), "what was never known does not");
}

#[test]
fn the_cache_is_bounded() {
    let server = Server::start(60);
    let names = names(server.address, |settings| settings.cache = 16);
    for number in 0..40 {
        assert!(ask(&names, &format!("name-{number}.there")).is_ok());
    }
    assert_eq!(names.remembered(), 16);
}
