//! Raw UDP through the binary, to servers that others wrote and to our own.

use std::net::UdpSocket;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::harness::{Edge, Process, free_port, has};

const HEAD: &str = "version: 1\nnode: { workers: 2 }\nadmin: { listen: ADMIN }\n";

/// Answers each datagram with `name` and the datagram; how many came.
fn answerer(port: u16, name: &'static str) -> Arc<AtomicUsize> {
    let socket = UdpSocket::bind(("127.0.0.1", port)).expect("a free port");
    let count = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&count);
    thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            seen.fetch_add(1, Ordering::SeqCst);
            // Silence is asked for by a name of its own.
            if !buffer.starts_with(b"quiet") {
                let answer = [name.as_bytes(), &buffer[..length]].concat();
                let _gone = socket.send_to(&answer, from);
            }
        }
    });
    count
}

fn client(port: u16) -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("loopback");
    socket.connect(("127.0.0.1", port)).expect("loopback");
    socket.set_read_timeout(Some(Duration::from_secs(30))).expect("an option");
    socket
}

fn ask(socket: &UdpSocket, what: &[u8]) -> Vec<u8> {
    socket.send(what).expect("sent");
    let mut buffer = vec![0; 65_536];
    let length = socket.recv(&mut buffer).expect("an answer");
    buffer.truncate(length);
    buffer
}

fn yaml(port: u16, options: &str, pool: &str) -> String {
    format!(
        "{HEAD}listeners:\n  - name: front\n    protocol: udp\n    bind: [udp://127.0.0.1:{port}]\n    pool: back\n    options: {{ {options} }}\npools:\n  back:\n{pool}"
    )
}

fn counted(edge: &Edge, what: &str) -> f64 {
    edge.metric("strowger_protocol_total", &[&format!("\"{what}\"")])
}

/// Two name servers behind one address, asked by dig over IPv4 and IPv6; one is killed.
#[test]
fn name_servers_answer_through_the_edge_and_one_may_die() {
    if !has("dnsmasq") || !has("dig") {
        return;
    }
    let (port, ports) = (free_port(), [free_port(), free_port()]);
    let folder = tempfile::tempdir().expect("a folder");
    let mut servers: Vec<Process> = (0..2)
        .map(|index| {
            let mut command = Command::new("dnsmasq");
            command
                .args([
                    "--keep-in-foreground",
                    "--no-resolv",
                    "--no-hosts",
                    "--conf-file=/dev/null",
                ])
                .args(["--no-daemon", "--bind-interfaces", "--listen-address=127.0.0.1"])
                .arg(format!("--pid-file={}", folder.path().join(format!("{index}.pid")).display()))
                .arg(format!("--port={}", ports[index]))
                .arg(format!("--address=/who.test/192.0.2.{index}"));
            Process::spawn(&mut command, &folder.path().join(format!("{index}.log")))
        })
        .collect();
    let pool = format!(
        "    session: {{ key: source }}\n    health: {{ probe: dns, interval: 1s, timeout: 1s }}\n    backends: [{{ id: a, address: udp://127.0.0.1:{} }}, {{ id: b, address: udp://127.0.0.1:{} }}]\n",
        ports[0], ports[1]
    );
    let bind = format!("bind: [udp://127.0.0.1:{port}, \"udp://[::1]:{port}\"]");
    let text = yaml(port, "responses: 1, idle_timeout: 5s", &pool)
        .replace(&format!("bind: [udp://127.0.0.1:{port}]"), &bind);
    let edge = Edge::start(&text);
    edge.until("both to be up", |edge| {
        ["a", "b"].iter().all(|id| edge.instance("back", id)["health"] == "up")
    });
    let dig = |server: &str| {
        let out = Command::new("dig")
            .args(["+short", "+tries=1", "+time=20", "-p", &port.to_string(), server, "who.test"])
            .output()
            .expect("dig runs");
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    };
    let mut seen = [0; 2];
    for index in 0..24 {
        let answer = dig(if index % 2 == 0 { "@127.0.0.1" } else { "@::1" });
        match answer.as_str() {
            "192.0.2.0" => seen[0] += 1,
            "192.0.2.1" => seen[1] += 1,
            other => panic!("dig was told `{other}`; the edge's log:\n{}", edge.log()),
        }
    }
    assert!(seen[0] > 0 && seen[1] > 0, "one server has it all: {seen:?}");
    edge.until("flows to end with their answers", |edge| {
        ["a", "b"].iter().all(|id| edge.instance("back", id)["in_flight"] == 0)
    });
    servers[0].kill();
    for _ in 0..12 {
        assert_eq!(dig("@127.0.0.1"), "192.0.2.1", "the edge's log:\n{}", edge.log());
    }
    edge.until("the probe to say so", |edge| edge.instance("back", "a")["health"] == "down");
}

/// Accepts everybody, as RFC 2865 3 has the answer signed.
const RADIUS: &str = r"
import hashlib, socket, struct, sys
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(('127.0.0.1', int(sys.argv[1])))
while True:
    request, client = server.recvfrom(65535)
    if len(request) < 20:
        continue
    told = sys.argv[2].encode()
    attributes = bytes([18, 2 + len(told)]) + told
    head = struct.pack('!BBH', 2, request[1], 20 + len(attributes))
    signed = hashlib.md5(head + request[4:20] + attributes + b'secret').digest()
    server.sendto(head + signed + attributes, client)
";

/// A RADIUS client's requests stay on one server, also while that drains; it is silent for no one.
#[test]
fn a_radius_client_stays_on_its_server() {
    if !has("radclient") || !has("python3") {
        return;
    }
    let (port, ports) = (free_port(), [free_port(), free_port()]);
    let folder = tempfile::tempdir().expect("a folder");
    let script = folder.path().join("radius.py");
    std::fs::write(&script, RADIUS).expect("written");
    let serve = |index: usize| {
        let mut command = Command::new("python3");
        command.arg(&script).arg(ports[index].to_string()).arg(format!("server-{index}"));
        Process::spawn(&mut command, &folder.path().join(format!("{index}.log")))
    };
    let mut servers = [serve(0), serve(1)];
    let pool = format!(
        "    health: {{ probe: udp-port, interval: 200ms, timeout: 100ms }}\n    backends: [{{ id: a, address: udp://127.0.0.1:{} }}, {{ id: b, address: udp://127.0.0.1:{} }}]\n",
        ports[0], ports[1]
    );
    let edge = Edge::start(&yaml(port, "responses: 1", &pool));
    edge.until("both to be up", |edge| {
        ["a", "b"].iter().all(|id| edge.instance("back", id)["health"] == "up")
    });
    let whom = |edge: &Edge| {
        let request = folder.path().join("request");
        std::fs::write(&request, "User-Name=bob,User-Password=x\n").expect("written");
        let server = format!("127.0.0.1:{port}");
        let out = Command::new("radclient")
            .args(["-x", "-t", "20", "-r", "2", "-f"])
            .arg(&request)
            .args([&server, "auth", "secret"])
            .output()
            .expect("radclient runs");
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(text.contains("Access-Accept"), "{text}\nthe edge's log:\n{}", edge.log());
        usize::from(!text.contains("server-0"))
    };
    let first = whom(&edge);
    for _ in 0..4 {
        assert_eq!(whom(&edge), first, "one source, one server");
    }
    servers[first].kill();
    assert_ne!(whom(&edge), first, "the first is gone");
    edge.until("the probe to say so", |edge| {
        edge.instance("back", ["a", "b"][first])["health"] == "down"
    });
}

#[test]
fn a_closed_port_costs_a_new_flow_nothing() {
    let (port, dead, alive) = (free_port(), free_port(), free_port());
    answerer(alive, "b");
    let pool = format!(
        "    session: {{ key: source }}\n    backends: [{{ id: a, address: udp://127.0.0.1:{dead} }}, {{ id: b, address: udp://127.0.0.1:{alive} }}]\n"
    );
    let edge = Edge::start(&yaml(port, "idle_timeout: 30s", &pool));
    // Each is sent once: what the dead one was sent must come to the other by the edge's own doing.
    for index in 0..40_u32 {
        let socket = client(port);
        let payload = index.to_be_bytes();
        assert_eq!(ask(&socket, &payload), [b"b".as_slice(), &payload].concat());
    }
    assert!(edge.metric("strowger_retries_total", &["refused"]) > 0.0, "nobody met the dead one");
    let large = vec![7; 60_000];
    assert_eq!(ask(&client(port), &large).len(), 60_001, "a datagram of any size passes whole");
}

#[test]
fn the_table_is_bounded_and_a_flood_pushes_out_itself() {
    let (port, backend) = (free_port(), free_port());
    let seen = answerer(backend, "a");
    let pool = format!("    backends: [{{ id: a, address: udp://127.0.0.1:{backend} }}]\n");
    let text = yaml(port, "flows: 8, idle_timeout: 60s", &pool).replace("workers: 2", "workers: 1");
    let edge = Edge::start(&text);
    let friend = client(port);
    assert_eq!(ask(&friend, b"one"), b"aone");
    let flood: Vec<UdpSocket> = (0..50)
        .map(|_| {
            let socket = client(port);
            socket.send(b"quiet").expect("sent");
            socket
        })
        .collect();
    let end = Instant::now() + Duration::from_secs(30);
    while seen.load(Ordering::SeqCst) < 51 {
        assert!(Instant::now() < end, "only {seen:?} came");
        thread::sleep(Duration::from_millis(20));
    }
    // 51 flows in a table of 8, and the one that was answered is not among those that went.
    edge.until("evictions", |edge| counted(edge, "flow_evicted") >= 43.0);
    assert_eq!(edge.instance("back", "a")["in_flight"], 8);
    let opened = counted(&edge, "flow_opened");
    assert_eq!(ask(&friend, b"two"), b"atwo");
    assert_eq!(counted(&edge, "flow_opened"), opened, "the friend's flow was pushed out");
    drop(flood);
}

/// Flows stay on an instance that drains, new ones go elsewhere, and the drain ends when the last is
/// silent. A flow whose server has died finds another when its client speaks on.
#[test]
fn a_drain_waits_for_flows_and_no_longer() {
    let (port, ports) = (free_port(), [free_port(), free_port()]);
    answerer(ports[0], "a");
    answerer(ports[1], "b");
    let pool = format!(
        "    session: {{ key: source, ttl: 1h }}\n    backends: [{{ id: a, address: udp://127.0.0.1:{} }}, {{ id: b, address: udp://127.0.0.1:{} }}]\n",
        ports[0], ports[1]
    );
    let edge = Edge::start(&yaml(port, "idle_timeout: 3s", &pool));
    let clients: Vec<UdpSocket> = (0..16).map(|_| client(port)).collect();
    let on_a: Vec<&UdpSocket> =
        clients.iter().filter(|socket| ask(socket, b"x") == b"ax").collect();
    assert!(!on_a.is_empty() && on_a.len() < 16);
    let (code, _) = edge.post("/api/v1/pools/back/instances/a/drain", "{\"deadline_s\":3600}");
    assert_eq!(code, 202);
    for socket in &on_a {
        assert_eq!(ask(socket, b"y"), b"ay", "a flow was moved by a drain");
    }
    for _ in 0..16 {
        assert_eq!(ask(&client(port), b"z"), b"bz", "a new flow went to the draining one");
    }
    // What is remembered for an hour is no session: silence ends the drain.
    edge.until("the drain to end", |edge| edge.log().contains("drain_ended"));
    assert_eq!(ask(on_a[0], b"w"), b"bw", "the instance is gone");
}

/// `node.rx_usecs`: many datagrams are taken together, few are not made to wait, and a reload turns it off.
#[test]
fn where_many_datagrams_come_they_are_let_gather() {
    let (port, server) = (free_port(), free_port());
    let _count = answerer(server, "a");
    let pool = format!("    backends: [{{ id: a, address: udp://127.0.0.1:{server} }}]\n");
    let text = yaml(port, "idle_timeout: 60s", &pool);
    let edge = Edge::start(&text);
    let pauses = |edge: &Edge| edge.metric("strowger_worker_pauses_total", &[]);
    let socket = client(port);
    for _ in 0..20 {
        assert_eq!(ask(&socket, b"one"), b"aone");
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(pauses(&edge), 0.0, "what comes alone is not waited for");
    // 10,000 a second and more, in small bursts, so that the workers sleep in between.
    let burst = |edge: &Edge| {
        for index in 0..2_000 {
            socket.send(b"quiet").expect("sent");
            if index % 5 == 0 {
                thread::sleep(Duration::from_micros(200));
            }
        }
        pauses(edge)
    };
    edge.until("datagrams to be let gather", |edge| burst(edge) > 0.0);
    assert_eq!(edge.put_config(&text.replace("workers: 2", "workers: 2, rx_usecs: 0")).0, 200);
    let before = burst(&edge);
    assert_eq!(burst(&edge), before, "turned off");
    assert_eq!(ask(&socket, b"one"), b"aone");
}

/// One client's TCP and UDP reach one instance, where their pools share a table: whichever comes first
/// decides, though both pools choose at random. Pools that share nothing do not disturb each other.
#[test]
fn a_clients_tcp_and_udp_are_on_one_instance_if_their_pools_share() {
    use std::io::{Read, Write};
    let (tcp, udp, other) = (free_port(), free_port(), free_port());
    let ports: Vec<u16> = (0..6).map(|_| free_port()).collect();
    let names = ["a", "b", "c", "d", "e", "f"];
    for (port, name) in ports.iter().zip(names) {
        answerer(*port, name);
        let listener = std::net::TcpListener::bind(("127.0.0.1", *port)).expect("a free port");
        thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let _gone = stream.write_all(name.as_bytes());
            }
        });
    }
    let pool = |scheme: &str, share: &str| {
        let list = ports.iter().zip(names);
        let list =
            list.map(|(port, id)| format!("{{ id: {id}, address: {scheme}://127.0.0.1:{port} }}"));
        format!(
            "{{ balance: weighted-random, session: {{ key: source-ip{share} }}, backends: [{}] }}",
            list.collect::<Vec<_>>().join(", ")
        )
    };
    let edge = Edge::start(&format!(
        "{HEAD}listeners:\n  - {{ name: one, protocol: tcp, bind: [\"tcp://127.0.0.1:{tcp}\"], pool: streams }}\n  - {{ name: two, protocol: udp, bind: [\"udp://127.0.0.1:{udp}\"], pool: datagrams }}\n  - {{ name: three, protocol: udp, bind: [\"udp://127.0.0.1:{other}\"], pool: alone }}\npools:\n  streams: {}\n  datagrams: {}\n  alone: {}\n",
        pool("tcp", ", share: clients"),
        pool("udp", ", share: clients"),
        pool("udp", "")
    ));
    let from = |number: u8| std::net::Ipv4Addr::new(127, 0, 7, number);
    let by_tcp = |number: u8| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)
            .expect("a socket");
        socket.bind(&std::net::SocketAddr::from((from(number), 0)).into()).expect("loopback");
        let edge = std::net::SocketAddr::from(([127, 0, 0, 1], tcp));
        socket.connect(&edge.into()).expect("the edge accepts");
        let mut stream = std::net::TcpStream::from(socket);
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("an option");
        let mut name = [0];
        stream.read_exact(&mut name).expect("an instance");
        name[0]
    };
    let by_udp = |number: u8, port: u16| {
        let socket = UdpSocket::bind((from(number), 0)).expect("loopback");
        socket.connect(("127.0.0.1", port)).expect("loopback");
        socket.set_read_timeout(Some(Duration::from_secs(30))).expect("an option");
        ask(&socket, b"?")[0]
    };
    let mut apart = 0;
    for number in 1..=30 {
        let alone = by_udp(number, other);
        let (first, second) = if number % 2 == 0 {
            (by_tcp(number), by_udp(number, udp))
        } else {
            (by_udp(number, udp), by_tcp(number))
        };
        assert_eq!(first, second, "client {number}: {}", edge.log());
        assert_eq!(by_tcp(number), first, "client {number} again");
        assert_eq!(
            by_udp(number, other),
            alone,
            "client {number}: another pool's table is its own"
        );
        apart += usize::from(alone != first);
    }
    let place = edge.json("/api/v1/sessions?pool=alone&key=127.0.7.1");
    assert_eq!(place["instance"], char::from(by_udp(1, other)).to_string(), "{place}");
    assert!(apart > 10, "{apart}: pools that share nothing choose by themselves");
}
