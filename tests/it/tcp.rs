//! Raw TCP: half-close, fail-over, affinity, real clients.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::harness::{Edge, Process, alone, free_port, has, wait_for_tcp};

fn config(port: u16, backends: &[(&str, u16)], session: &str) -> String {
    let list: Vec<String> = backends
        .iter()
        .map(|(id, port)| format!("      - {{ id: {id}, address: tcp://127.0.0.1:{port} }}\n"))
        .collect();
    format!(
        "version: 1\nnode: {{ workers: 2 }}\nadmin: {{ listen: ADMIN }}\nlisteners:\n  - {{ name: db, protocol: tcp, bind: [tcp://127.0.0.1:{port}], pool: db, options: {{ connect_timeout: 500ms }} }}\npools:\n  db:\n    session: {{ key: {session} }}\n    backends:\n{}",
        list.concat()
    )
}

/// Answers each connection with `name`, then echoes until the end, then says how much it was.
fn echo(port: u16, name: &'static str) {
    let listener = TcpListener::bind(("127.0.0.1", port)).expect("a free port");
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            thread::spawn(move || {
                let _gone = stream.write_all(name.as_bytes());
                let (mut buffer, mut total) = (vec![0; 65_536], 0);
                while let Ok(count) = stream.read(&mut buffer) {
                    if count == 0 {
                        break;
                    }
                    total += count;
                    if stream.write_all(&buffer[..count]).is_err() {
                        return;
                    }
                }
                let _gone = stream.write_all(format!("|{total}").as_bytes());
            });
        }
    });
}

fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("the edge accepts");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("an option");
    stream
}

#[test]
fn a_half_closing_client_gets_everything() {
    let (port, one) = (free_port(), free_port());
    echo(one, "a");
    let edge = Edge::start(&config(port, &[("a", one)], "source"));
    let mut stream = connect(port);
    let sent: Vec<u8> = (0..3_000_000u32).map(|index| (index % 251) as u8).collect();
    let copy = sent.clone();
    let mut writer = stream.try_clone().expect("a handle");
    let writing = thread::spawn(move || {
        writer.write_all(&copy).expect("written");
        writer.shutdown(Shutdown::Write).expect("half closed");
    });
    let mut got = Vec::new();
    stream.read_to_end(&mut got).expect("read");
    writing.join().expect("written");
    assert_eq!(got.len(), 1 + sent.len() + 8);
    assert_eq!(&got[1..=sent.len()], &sent[..], "bytes were lost or changed");
    assert!(got.ends_with(b"|3000000"));
    edge.until("the flow to end", |edge| edge.instance("db", "a")["in_flight"] == 0);
}

/// A server that answers before it has read all, and closes: the client hears the answer, though the server
/// takes no more of what it sends.
#[test]
fn an_early_answer_reaches_a_client_that_still_sends() {
    const ANSWER: &[u8] = b"that is too much";
    let (port, one) = (free_port(), free_port());
    let listener = TcpListener::bind(("127.0.0.1", one)).expect("a free port");
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            let mut some = [0; 1_000];
            let _read = stream.read(&mut some);
            let _gone = stream.write_all(ANSWER);
            // What is not read makes a reset of it.
        }
    });
    let _edge = Edge::start(&config(port, &[("a", one)], "source"));
    for _ in 0..20 {
        let mut stream = connect(port);
        let mut writer = stream.try_clone().expect("a handle");
        let writing = thread::spawn(move || {
            let _refused = writer.write_all(&vec![7; 4_000_000]);
        });
        let mut got = vec![0; ANSWER.len()];
        stream.read_exact(&mut got).expect("the answer");
        assert_eq!(got, ANSWER);
        drop(stream);
        writing.join().expect("it ends");
    }
}

#[test]
fn a_dead_backend_is_passed_over_and_a_dead_pool_resets() {
    let (port, dead, one) = (free_port(), free_port(), free_port());
    echo(one, "a");
    let edge = Edge::start(&config(port, &[("dead", dead), ("a", one)], "source"));
    for _ in 0..20 {
        let mut byte = [0];
        connect(port).read_exact(&mut byte).expect("an answer");
        assert_eq!(&byte, b"a");
    }
    assert!(edge.metric("strowger_retries_total", &["refused"]) > 0.0);
    let (port, dead) = (free_port(), free_port());
    let _edge = Edge::start(&config(port, &[("dead", dead)], "source"));
    let mut byte = [0];
    let error = connect(port).read_exact(&mut byte).expect_err("nobody is there");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

/// One source address stays on its instance, also when the pool grows.
#[test]
fn a_source_stays_on_its_instance() {
    let (port, one, two, three) = (free_port(), free_port(), free_port(), free_port());
    for (port, name) in [(one, "a"), (two, "b"), (three, "c")] {
        echo(port, name);
    }
    let edge = Edge::start(&config(port, &[("a", one), ("b", two)], "source-ip"));
    let ask = || {
        let mut byte = [0];
        connect(port).read_exact(&mut byte).expect("an answer");
        byte[0]
    };
    let first = ask();
    for _ in 0..20 {
        assert_eq!(ask(), first);
    }
    assert_eq!(
        edge.put_config(&config(port, &[("a", one), ("b", two), ("c", three)], "source-ip")).0,
        200
    );
    for _ in 0..20 {
        assert_eq!(ask(), first, "the growing pool moved a session");
    }
}

/// A receiver that does not read stops its own sender, and nobody else.
#[test]
fn a_slow_receiver_is_alone_with_it() {
    let (port, one) = (free_port(), free_port());
    echo(one, "a");
    let edge = Edge::start(&config(port, &[("a", one)], "source"));
    let mut slow = connect(port);
    slow.set_write_timeout(Some(Duration::from_millis(300))).expect("an option");
    let block = vec![7; 1 << 20];
    let mut sent = 0;
    while slow.write(&block).is_ok_and(|count| count > 0) {
        sent += block.len();
        assert!(sent < 512 << 20, "nothing held the sender back");
    }
    for _ in 0..50 {
        let mut stream = connect(port);
        stream.write_all(b"hello").expect("written");
        let mut answer = [0; 6];
        stream.read_exact(&mut answer).expect("an answer");
        assert_eq!(&answer, b"ahello");
    }
    assert_eq!(edge.instance("db", "a")["health"], "unknown");
}

#[test]
fn redis_benchmark_runs_through_it() {
    if !has("redis-server") || !has("redis-benchmark") {
        return;
    }
    let _alone = alone();
    let (port, backend) = (free_port(), free_port());
    let edge = Edge::start(&config(port, &[("redis", backend)], "source"));
    let mut server = Command::new("redis-server");
    server.args([
        "--port",
        &backend.to_string(),
        "--save",
        "",
        "--appendonly",
        "no",
        "--bind",
        "127.0.0.1",
    ]);
    let _server = Process::spawn(
        server.current_dir(edge.folder.path()),
        &edge.folder.path().join("redis.log"),
    );
    wait_for_tcp(backend);
    let output = Command::new("redis-benchmark")
        .args([
            "-p",
            &port.to_string(),
            "-n",
            "20000",
            "-c",
            "20",
            "-P",
            "4",
            "-q",
            "-t",
            "set,get",
        ])
        .output()
        .expect("it runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.contains("GET:"), "{text}");
    assert!(
        edge.metric("strowger_bytes_total", &["listener=\"db\"", "direction=\"in\""]) > 500_000.0
    );
}

/// PostgreSQL's own client and benchmark through the edge: two databases' worth of state is kept by
/// source address, so that a client's connections all meet one server.
#[test]
fn pgbench_and_psql_run_through_it() {
    let Some(programs) = postgres_programs() else { return };
    let _alone = alone();
    let (port, backend) = (free_port(), free_port());
    let edge = Edge::start(&config(port, &[("pg", backend)], "source-ip"));
    let folder = edge.folder.path().join("pg");
    std::fs::create_dir(&folder).expect("a folder");
    // PostgreSQL refuses to run as root; its package brings a user for it.
    let root = Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout == b"0\n");
    let run = |program: &str| {
        let path = programs.join(program);
        if !root {
            return Command::new(path);
        }
        let mut command = Command::new("runuser");
        command.args(["-u", "postgres", "--"]).arg(path);
        command
    };
    if root {
        let opened = Command::new("chmod").arg("755").arg(edge.folder.path()).status();
        let given = Command::new("chown").arg("postgres").arg(&folder).status();
        assert!(opened.is_ok_and(|status| status.success()));
        assert!(given.is_ok_and(|status| status.success()));
    }
    let made = run("initdb")
        .args(["--auth=trust", "--no-sync", "--username=postgres", "-D"])
        .arg(&folder)
        .current_dir("/")
        .output()
        .expect("it runs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let mut server = run("postgres");
    server.arg("-D").arg(&folder).args(["-p", &backend.to_string(), "-h", "127.0.0.1", "-k", ""]);
    server.args(["-c", "fsync=off"]).current_dir("/");
    let mut server = Process::spawn(&mut server, &edge.folder.path().join("pg.log"));
    // `immediate`: it asks nobody, so that it ends with its client connections open.
    let stop = || {
        run("pg_ctl").args(["stop", "-m", "immediate", "-D"]).arg(&folder).current_dir("/").output()
    };
    wait_for_tcp(backend);
    let client = |program: &str, arguments: &[&str]| {
        let output = Command::new(programs.join(program))
            .args(["-h", "127.0.0.1", "-U", "postgres", "-p", &port.to_string()])
            .args(arguments)
            .output()
            .expect("it runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{program}: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        text
    };
    client("pgbench", &["-i", "-q", "-s", "1", "postgres"]);
    let text = client("pgbench", &["-c", "8", "-j", "2", "-t", "100", "postgres"]);
    assert!(text.contains("number of transactions actually processed: 800/800"), "{text}");
    let count = client("psql", &["-At", "-c", "select count(*) from pgbench_history", "postgres"]);
    assert_eq!(count.trim(), "800");
    assert!(stop().is_ok_and(|output| output.status.success()));
    assert!(server.wait(Duration::from_secs(20)).is_some());
}

/// Where PostgreSQL's programs are: Debian keeps the server's out of the path.
fn postgres_programs() -> Option<std::path::PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let found = versions.map(|entry| entry.path().join("bin")).max();
    let found = found.filter(|path| path.join("pgbench").exists() && path.join("initdb").exists());
    assert!(
        found.is_some() || std::env::var_os("CI").is_none(),
        "postgresql must be installed in CI"
    );
    if found.is_none() {
        println!("skipped: postgresql is not installed");
    }
    found
}
