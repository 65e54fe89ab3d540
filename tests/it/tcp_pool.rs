//! Pools that change and configurations that are loaded again and again, under load.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::harness::{Edge, alone, free_port};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// Instances: each says who it is (one letter), then echoes.
fn instances(ports: &[u16]) {
    let listeners: Vec<std::net::TcpListener> = ports
        .iter()
        .map(|port| {
            let listener = std::net::TcpListener::bind(("127.0.0.1", *port)).expect("free");
            listener.set_nonblocking(true).expect("an option");
            listener
        })
        .collect();
    thread::spawn(move || {
        runtime().block_on(async move {
            let tasks: Vec<_> = listeners
                .into_iter()
                .zip(b'a'..)
                .map(|(listener, name)| {
                    tokio::spawn(async move {
                        let listener = TcpListener::from_std(listener).expect("in a runtime");
                        while let Ok((mut stream, _)) = listener.accept().await {
                            tokio::spawn(async move {
                                let _gone = stream.write_all(&[name]).await;
                                let (mut reader, mut writer) = stream.split();
                                let _gone = tokio::io::copy(&mut reader, &mut writer).await;
                            });
                        }
                    })
                })
                .collect();
            for task in tasks {
                let _ended = task.await;
            }
        });
    });
}

fn yaml(port: u16, ports: &[u16], more: &str) -> String {
    let list: String = ports
        .iter()
        .zip('a'..)
        .map(|(port, id)| format!("      - {{ id: {id}, address: \"tcp://127.0.0.1:{port}\" }}\n"))
        .collect();
    format!(
        "version: 1\nnode: {{ workers: 2 }}\nadmin: {{ listen: ADMIN }}\nlisteners:\n  - {{ name: db, protocol: tcp, bind: [\"tcp://127.0.0.1:{port}\"], pool: db }}\npools:\n  db:\n    balance: round-robin\n    session: {{ key: source }}\n    slow_start: 0s\n    debounce: 0s\n{more}    backends:\n{list}"
    )
}

/// A connection and the instance that it is on.
async fn dial(port: u16) -> (TcpStream, u8) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("it is accepted");
    let name = stream.read_u8().await.expect("an instance");
    (stream, name)
}

async fn exchange(stream: &mut TcpStream, text: &[u8]) {
    stream.write_all(text).await.expect("open");
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer).await.expect("open");
    assert_eq!(answer, text);
}

/// Holds connections that speak now and then until told to stop; any fault is a panic.
fn held(streams: Vec<TcpStream>, go_on: &Arc<AtomicBool>) -> Vec<tokio::task::JoinHandle<usize>> {
    let speak = |(number, mut stream): (usize, TcpStream)| {
        let go_on = Arc::clone(go_on);
        tokio::spawn(async move {
            let mut count = 0;
            while go_on.load(Ordering::Relaxed) {
                exchange(&mut stream, format!("{number}: word {count}").as_bytes()).await;
                count += 1;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            count
        })
    };
    streams.into_iter().enumerate().map(speak).collect()
}

/// So many new connections: all within 5 % of an equal share, or two.
async fn evenly(port: u16, count: usize, among: usize) -> Vec<(TcpStream, u8)> {
    let mut streams = Vec::new();
    for _ in 0..count {
        streams.push(dial(port).await);
    }
    let share = count / among;
    for name in (b'a'..).take(among) {
        let has = streams.iter().filter(|(_, on)| *on == name).count();
        // Each of two workers has its own turn, and begins anew if a snapshot comes in between: two are
        // nobody's fault.
        let away = has.abs_diff(share);
        let may = (share * 5 / 100).max(2);
        assert!(away <= may, "{}: {has} of {count}, {share} wanted", char::from(name));
    }
    assert!(streams.iter().all(|(_, on)| usize::from(on - b'a') < among), "a gone one got some");
    streams
}

/// 10 instances, 11, and 10 again, under load: no live connection moves or breaks, and new ones are
/// shared equally.
#[test]
fn a_pool_grows_and_shrinks_and_no_live_connection_moves() {
    let _alone = alone();
    let port = free_port();
    let ports: Vec<u16> = (0..11).map(|_| free_port()).collect();
    instances(&ports);
    let edge = Edge::start(&yaml(port, &ports[..10], ""));
    runtime().block_on(async {
        let go_on = Arc::new(AtomicBool::new(true));
        let first: Vec<TcpStream> =
            evenly(port, 200, 10).await.into_iter().map(|(stream, _)| stream).collect();
        let first = held(first, &go_on);
        let edge = Arc::new(edge);
        let put = |text: String| {
            let edge = Arc::clone(&edge);
            tokio::task::spawn_blocking(move || edge.put_config(&text))
        };
        let (code, body) = put(yaml(port, &ports, "")).await.expect("it answers");
        assert_eq!(code, 200, "{body}");
        // Workers look at a new snapshot with their next batch.
        let wider = evenly(port, 440, 11).await;
        let (code, body) = {
            let edge = Arc::clone(&edge);
            let drain =
                move || edge.post("/api/v1/pools/db/instances/k/drain", "{\"deadline_s\":3600}");
            tokio::task::spawn_blocking(drain).await.expect("it answers")
        };
        assert_eq!(code, 202, "{body}");
        let narrower = evenly(port, 200, 10).await;
        let mut on_the_leaving: Vec<TcpStream> = Vec::new();
        let mut others: Vec<TcpStream> = Vec::new();
        for (stream, on) in wider.into_iter().chain(narrower) {
            if on == b'k' { on_the_leaving.push(stream) } else { others.push(stream) }
        }
        assert!(on_the_leaving.len() >= 38);
        for stream in &mut on_the_leaving {
            exchange(stream, b"in session while it drains").await;
        }
        let others = held(others, &go_on);
        drop(on_the_leaving);
        let (code, body) = put(yaml(port, &ports[..10], "")).await.expect("it answers");
        assert_eq!(code, 200, "{body}");
        let last = evenly(port, 200, 10).await;
        drop(last);
        tokio::time::sleep(Duration::from_millis(500)).await;
        go_on.store(false, Ordering::Relaxed);
        for task in first.into_iter().chain(others) {
            assert!(task.await.expect("a live connection broke") > 0);
        }
    });
}

fn resident(edge: &Edge) -> u64 {
    let status = format!("/proc/{}/status", edge.process.id());
    let text = std::fs::read_to_string(status).expect("it runs");
    let line = text.lines().find(|line| line.starts_with("VmRSS:")).expect("it has memory");
    line.split_whitespace().nth(1).and_then(|text| text.parse().ok()).expect("kB")
}

/// Ten reloads a second (for `STROWGER_RELOAD_SECONDS`, 6 if it is not told): every new connection is
/// served, those that are there go on, and memory stays.
#[test]
fn reloads_without_end_refuse_nobody_and_keep_memory_flat() {
    let _alone = alone();
    let told = std::env::var("STROWGER_RELOAD_SECONDS").ok().and_then(|text| text.parse().ok());
    let rounds = 10 * told.unwrap_or(6_u64).max(3);
    let port = free_port();
    let ports: Vec<u16> = (0..4).map(|_| free_port()).collect();
    instances(&ports);
    let edge = Edge::start(&yaml(port, &ports[..3], ""));
    let go_on = Arc::new(AtomicBool::new(true));
    let served = Arc::new(AtomicUsize::new(0));
    let load = {
        let (go_on, served) = (Arc::clone(&go_on), Arc::clone(&served));
        thread::spawn(move || {
            runtime().block_on(async {
                let mut streams = Vec::new();
                for _ in 0..50 {
                    streams.push(dial(port).await.0);
                }
                let held = held(streams, &go_on);
                let comers: Vec<_> = (0..4)
                    .map(|_| {
                        let (go_on, served) = (Arc::clone(&go_on), Arc::clone(&served));
                        tokio::spawn(async move {
                            while go_on.load(Ordering::Relaxed) {
                                let (mut stream, _) = dial(port).await;
                                exchange(&mut stream, b"a short visit").await;
                                served.fetch_add(1, Ordering::Relaxed);
                                tokio::time::sleep(Duration::from_millis(5)).await;
                            }
                            0
                        })
                    })
                    .collect();
                for task in held.into_iter().chain(comers) {
                    task.await.expect("a connection was refused or broke");
                }
            });
        })
    };
    let (mut early, mut late) = (0, 0);
    for round in 0..rounds {
        let begun = Instant::now();
        // Something is different each time: options, weights, and each fourth time a drained instance.
        let more = format!("    drain: {{ deadline: {}s }}\n", 60 + round % 7);
        let (code, body) = edge.put_config(&yaml(port, &ports[..3], &more));
        assert_eq!(code, 200, "round {round}: {body}");
        assert!(!load.is_finished(), "round {round}");
        if round == rounds / 3 {
            early = resident(&edge);
        }
        late = resident(&edge);
        thread::sleep(Duration::from_millis(100).saturating_sub(begun.elapsed()));
    }
    go_on.store(false, Ordering::Relaxed);
    load.join().expect("everybody was served");
    let (served, growth) = (served.load(Ordering::Relaxed), late.saturating_sub(early));
    println!("{rounds} reloads, {served} new connections, {early} kB to {late} kB");
    assert!(served > 100, "{served}");
    let reloads = edge.metric("strowger_config_reloads_total", &["outcome=\"applied\""]);
    assert!(reloads == 0.0 || reloads >= rounds as f64, "{reloads} of {rounds}");
    assert!(growth < 4_096, "{growth} kB more after {rounds} reloads");
}
