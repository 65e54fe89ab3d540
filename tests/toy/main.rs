//! Codecs are pluggable: a protocol that exists only here, in a running edge, without a change to
//! the routing core or the runtime. What it shows besides: an engine that panics is restarted and
//! counted, and nobody else notices.
#![allow(missing_docs)]

mod line;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use line::Line;
use strowger::control::config::{self, Source};
use strowger::edge::{ConfigSource, Edge};
use strowger::protocols::Protocols;
use strowger::routing::PoolNames;

/// An instance: it says its name and what it was told.
struct Instance {
    address: SocketAddr,
    mute: Arc<AtomicBool>,
    asked: Arc<AtomicUsize>,
}

impl Instance {
    fn start(name: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound");
        let (mute, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let shared = (Arc::clone(&mute), Arc::clone(&asked));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (mute, asked) = (Arc::clone(&shared.0), Arc::clone(&shared.1));
                std::thread::spawn(move || serve(&stream, name, &mute, &asked));
            }
        });
        Self { address, mute, asked }
    }
}

fn serve(stream: &TcpStream, name: &str, mute: &AtomicBool, asked: &AtomicUsize) {
    let mut out = stream.try_clone().expect("a handle");
    for line in BufReader::new(stream).lines().map_while(Result::ok) {
        let answer = match line.splitn(3, ' ').collect::<Vec<_>>()[..] {
            ["0", "ping", _] => "0 pong\n".to_owned(),
            [number, word, text] => {
                asked.fetch_add(1, Ordering::Relaxed);
                format!("{number} {name} heard {word} say {text}\n")
            }
            _ => continue,
        };
        if mute.load(Ordering::Relaxed) {
            continue;
        }
        if out.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

struct Client(BufReader<TcpStream>);

impl Client {
    fn connect(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("the edge listens");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("an option");
        Self(BufReader::new(stream))
    }

    fn ask(&mut self, line: &str) -> String {
        self.try_ask(line).unwrap_or_default()
    }

    /// `None` when the connection breaks.
    fn try_ask(&mut self, line: &str) -> Option<String> {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes()).ok()?;
        let mut answer = String::new();
        self.0.read_line(&mut answer).ok()?;
        Some(answer.trim_end().to_owned())
    }
}

/// A port below the range of outgoing connections.
fn free_port() -> u16 {
    let start = 23_000 + std::process::id() % 4_000;
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    loop {
        let port = (start as usize + NEXT.fetch_add(1, Ordering::Relaxed)) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

fn yaml(listeners: &[(u16, &str)], instances: &[&Instance], more: &str) -> String {
    let mut text = String::from(
        "version: 1\nnode: { workers: 2 }\nadmin: { listen: \"127.0.0.1:0\" }\n\
         classes:\n  setup: { deadline: 10s, retry: 3 }\nlisteners:\n",
    );
    for (index, (port, options)) in listeners.iter().enumerate() {
        text.push_str(&format!(
            "  - {{ name: lines-{index}, protocol: line, bind: [\"tcp://127.0.0.1:{port}\"], pool: echo, options: {{ {options} }} }}\n"
        ));
    }
    text.push_str(&format!("pools:\n  echo:\n    slow_start: 0s\n{more}    backends:\n"));
    for (index, instance) in instances.iter().enumerate() {
        text.push_str(&format!(
            "      - {{ id: i{index}, address: \"tcp://{}\" }}\n",
            instance.address
        ));
    }
    text
}

/// Runs `work` against an edge with the toy protocol, on a thread of its own.
fn with_edge(yaml: &str, work: impl FnOnce(&Edge) + Send) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let protocols = Protocols::standard().with::<Line>();
    let edge = runtime
        .block_on(Edge::start(ConfigSource::Text(yaml.to_owned()), protocols))
        .unwrap_or_else(|error| panic!("{error}"));
    std::thread::scope(|scope| {
        let (done, mut ended) = tokio::sync::oneshot::channel::<()>();
        let edge = &edge;
        let worker = scope.spawn(move || {
            // Dropped also when the work panics.
            let _done = done;
            work(edge);
        });
        // The control side runs here meanwhile.
        let _end = runtime.block_on(&mut ended);
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    runtime.block_on(edge.stop());
}

fn get(edge: &Edge, path: &str) -> String {
    let mut stream = TcpStream::connect(edge.admin_address()).expect("the admin server");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("asked");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

fn metric(edge: &Edge, name: &str) -> f64 {
    let text = get(edge, "/metrics");
    let found = text.lines().filter(|line| line.starts_with(name));
    found.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_session_stays_on_its_instance_and_fails_over_when_it_is_silent() {
    let (one, two) = (Instance::start("one"), Instance::start("two"));
    let port = free_port();
    with_edge(&yaml(&[(port, "")], &[&one, &two], ""), |edge| {
        let mut client = Client::connect(port);
        let first: Vec<String> =
            (0..40).map(|index| client.ask(&format!("s{index} hello"))).collect();
        for (index, answer) in first.iter().enumerate() {
            assert!(answer.ends_with(&format!("heard s{index} say hello")), "{answer}");
        }
        // Both have some, and another connection's lines go where the sessions are.
        let of = |name: &str| first.iter().filter(|answer| answer.contains(name)).count();
        assert!(of(" one ") > 0 && of(" two ") > 0, "{first:?}");
        let mut other = Client::connect(port);
        for (index, answer) in first.iter().enumerate() {
            assert_eq!(other.ask(&format!("s{index} hello")), *answer);
        }
        // Where a session lives is told for this protocol as for any other.
        let home = if first[7].contains(" one ") { "i0" } else { "i1" };
        let told = get(edge, "/api/v1/sessions?key=s7");
        assert!(told.contains(&format!("\"{home}\"")), "{told}");
        // One falls silent: its sessions' lines are answered by the other all the same.
        one.mute.store(true, Ordering::Relaxed);
        for index in 0..40 {
            let answer = client.ask(&format!("s{index} again"));
            assert_eq!(answer, format!("s{index} two heard s{index} say again"));
        }
        assert!(metric(edge, "strowger_retries_total") > 0.0);
        assert!(one.asked.load(Ordering::Relaxed) > 0);
    });
}

#[test]
fn probes_find_who_is_ill_and_nobody_left_is_said_in_its_words() {
    let (one, two) = (Instance::start("one"), Instance::start("two"));
    let port = free_port();
    let health = "    health: { probe: line-ping, interval: 100ms, timeout: 80ms, rise: 1, fall: 2 }\n    panic_percent: 0\n";
    with_edge(&yaml(&[(port, "timeout: 5s")], &[&one, &two], health), |edge| {
        let mut client = Client::connect(port);
        until("both are well", || client.ask("s hello").starts_with("s "));
        one.mute.store(true, Ordering::Relaxed);
        let down = |edge: &Edge| {
            let view = edge.core().pools_view(Instant::now());
            let backends = view.iter().flat_map(|pool| &pool.backends);
            backends.filter(|backend| backend.health == "down").count()
        };
        until("one is found ill", || down(edge) == 1);
        for index in 0..20 {
            let answer = client.ask(&format!("n{index} hello"));
            assert!(answer.contains(" two heard "), "{answer}");
        }
        two.mute.store(true, Ordering::Relaxed);
        until("both are found ill", || down(edge) == 2);
        assert_eq!(client.ask("late hello"), "! no_backend");
        assert_eq!(client.ask("nonsense"), "! expected SESSION TEXT");
    });
}

#[test]
fn an_engine_that_panics_is_restarted_and_counted_and_the_others_go_on() {
    let one = Instance::start("one");
    let (port, calm) = (free_port(), free_port());
    let listeners = [(port, "panic_on: die"), (calm, "")];
    with_edge(&yaml(&listeners, &[&one], ""), |edge| {
        let mut bystander = Client::connect(calm);
        assert_eq!(bystander.ask("b hello"), "b one heard b say hello");
        for round in 1..=3 {
            let mut client = Client::connect(port);
            // The links of an engine go with it; a line that meets the old one's end is refused.
            until("it serves", || client.ask("s hello") == "s one heard s say hello");
            // Its connection is lost with the engine: no answer, an end.
            assert_eq!(client.ask("s die"), "");
            until("the panic is counted", || {
                metric(edge, "strowger_engine_panics_total") >= f64::from(round)
            });
        }
        // The other listener kept its connection, and the first one serves again.
        assert_eq!(bystander.ask("b still here"), "b one heard b say still here");
        let mut client = Client::connect(port);
        until("it serves again", || client.ask("s hello") == "s one heard s say hello");
        // Nothing that the dead engines had under way still counts at the instance.
        let view = edge.core().pools_view(Instant::now());
        assert_eq!(view[0].backends[0].in_flight, 0);
    });
}

#[test]
fn an_engine_that_panics_when_it_is_asked_something_costs_no_worker() {
    let one = Instance::start("one");
    let port = free_port();
    with_edge(&yaml(&[(port, "panic_on: die asked")], &[&one], ""), |edge| {
        for round in 1..=2 {
            let mut client = Client::connect(port);
            until("it serves", || client.ask("s hello") == "s one heard s say hello");
            assert_eq!(client.ask("s die asked"), "");
            until("the panic is counted", || {
                metric(edge, "strowger_engine_panics_total") >= f64::from(round)
            });
        }
        let mut client = Client::connect(port);
        until("it serves again", || client.ask("s hello") == "s one heard s say hello");
        assert_eq!(metric(edge, "strowger_worker_panics_total"), 0.0);
    });
}

#[test]
fn a_worker_that_dies_is_started_again_with_all_its_listeners() {
    let one = Instance::start("one");
    let (port, other) = (free_port(), free_port());
    with_edge(&yaml(&[(port, ""), (other, "")], &[&one], ""), |edge| {
        for round in 1..=2 {
            let mut killer = Client::connect(port);
            assert_eq!(killer.ask(std::str::from_utf8(line::WORKER_KILLER).expect("text")), "");
            until("the death is counted", || {
                metric(edge, "strowger_worker_panics_total") >= f64::from(round)
            });
            // Whichever worker the kernel gives a connection to: both serve.
            for index in 0..16 {
                for port in [port, other] {
                    let ask = || Client::connect(port).try_ask(&format!("s{index} hello"));
                    until("every worker serves", || {
                        ask().is_some_and(|answer| answer.ends_with("say hello"))
                    });
                }
            }
        }
        let view = edge.core().pools_view(Instant::now());
        assert_eq!(view[0].backends[0].in_flight, 0);
    });
}

#[test]
fn its_mistakes_are_told_like_everybody_elses() {
    let protocols = Protocols::standard().with::<Line>();
    let (listen, instance) = (free_port(), free_port());
    let text = format!(
        "version: 1\nlisteners:\n  - name: l\n    protocol: line\n    bind: [\"tcp://127.0.0.1:{listen}\"]\n    \
         options: {{ timeout: 0s }}\n    routes: [ {{ match: {{ prefix: \"a b\" }}, pool: p }} ]\n\
         pools:\n  p: {{ backends: [ {{ id: a, address: \"tcp://127.0.0.1:{instance}\" }} ] }}\n"
    );
    let source = Source { name: "edge.yaml".into(), text };
    let errors = config::load(&[source], &protocols.configurers(), &PoolNames::default())
        .expect_err("two mistakes")
        .to_string();
    assert!(
        errors.contains("edge.yaml:6:") && errors.contains("must be longer than 0s"),
        "{errors}"
    );
    assert!(errors.contains("edge.yaml:7:") && errors.contains("a word has no spaces"), "{errors}");
}
