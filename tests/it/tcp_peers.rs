//! Raw TCP and TLS between programs that others wrote: nginx and HAProxy as consumers and producers of
//! PROXY headers, wrk, iperf3, ssh, and what OpenSSL says of our handshakes.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::harness::{Edge, Process, alone, free_port, has, wait_for_tcp};
use crate::sip::secure::certificates;

const HEAD: &str = "version: 1\nnode: { workers: 2 }\nadmin: { listen: ADMIN }\nlisteners:\n";

/// A listener of one pool of one backend, with the rest of both in `more`.
fn listener(name: &str, bind: &str, more: &str) -> String {
    format!(
        "  - {{ name: {name}, protocol: tcp, bind: [{bind}], pool: {name}, options: {{ connect_timeout: 20s }}{more} }}\n"
    )
}

fn pool(name: &str, port: u16, more: &str) -> String {
    format!("  {name}: {{ backends: [{{ id: a, address: tcp://127.0.0.1:{port} }}]{more} }}\n")
}

/// nginx with one file; `modules` names those that are not built in.
fn nginx(folder: &Path, text: &str) -> Process {
    let file = folder.join("nginx.conf");
    let pid = folder.join("nginx.pid");
    let module = "/usr/lib/nginx/modules/ngx_stream_module.so";
    let load =
        if text.contains("stream {") { format!("load_module {module};") } else { String::new() };
    fs::write(&file, format!("{load}\ndaemon off;\nmaster_process off;\npid {};\nerror_log {};\nevents {{ worker_connections 2000; }}\n{text}", pid.display(), folder.join("error.log").display())).expect("written");
    let mut command = Command::new("nginx");
    command.arg("-c").arg(&file).arg("-p").arg(folder).arg("-e").arg(folder.join("start.log"));
    Process::spawn(&mut command, &folder.join("nginx.out"))
}

/// Temporary paths of nginx's http part, and no access log.
fn http(folder: &Path, servers: &str) -> String {
    let kinds = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
    let paths: String = kinds
        .iter()
        .map(|kind| format!("{kind}_temp_path {};\n", folder.join(kind).display()))
        .collect();
    format!("http {{\naccess_log off;\n{paths}{servers}\n}}\n")
}

fn haproxy(folder: &Path, text: &str) -> Process {
    let file = folder.join("haproxy.cfg");
    fs::write(&file, format!("global\n  maxconn 200\ndefaults\n  timeout connect 20s\n  timeout client 60s\n  timeout server 60s\n{text}")).expect("written");
    let mut command = Command::new("haproxy");
    command.arg("-db").arg("-f").arg(&file);
    Process::spawn(&mut command, &folder.join("haproxy.out"))
}

/// Asks for `/` with a connection of its own: our address, and the body.
fn get(port: u16) -> (String, String) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("the edge accepts");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("an option");
    let local = stream.local_addr().expect("bound");
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.trim().to_owned());
    (format!("{} {}", local.ip(), local.port()), body.unwrap_or(answer))
}

/// Both versions, to both consumers, straight and from both producers.
#[test]
fn nginx_and_haproxy_take_and_give_proxy_headers() {
    if !has("nginx") || !has("haproxy") || !Path::new("/usr/lib/nginx/modules").exists() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let ports: Vec<u16> = (0..12).map(|_| free_port()).collect();
    let [to_nginx, to_haproxy, from_nginx, from_haproxy_1, from_haproxy_2] = ports[..5] else {
        unreachable!()
    };
    // The edge's listeners, by version and consumer, and the one that takes headers and passes them on.
    let [n1, n2, h1, h2, relay, _, _] = ports[5..] else { unreachable!() };
    let _nginx = nginx(
        folder.path(),
        &format!(
            "{}stream {{ server {{ listen 127.0.0.1:{from_nginx}; proxy_pass 127.0.0.1:{relay}; proxy_protocol on; }} }}\n",
            http(
                folder.path(),
                &format!(
                    "server {{ listen 127.0.0.1:{to_nginx} proxy_protocol; location / {{ return 200 \"$proxy_protocol_addr $proxy_protocol_port\"; }} }}"
                )
            )
        ),
    );
    let _haproxy = haproxy(
        folder.path(),
        &format!(
            "frontend take\n  mode http\n  bind 127.0.0.1:{to_haproxy} accept-proxy\n  http-request return status 200 content-type text/plain lf-string \"%ci %cp\"\nlisten one\n  mode tcp\n  bind 127.0.0.1:{from_haproxy_1}\n  server edge 127.0.0.1:{relay} send-proxy\nlisten two\n  mode tcp\n  bind 127.0.0.1:{from_haproxy_2}\n  server edge 127.0.0.1:{relay} send-proxy-v2 proxy-v2-options unique-id\n  unique-id-format %rt\n"
        ),
    );
    for port in [to_nginx, to_haproxy, from_nginx, from_haproxy_1, from_haproxy_2] {
        wait_for_tcp(port);
    }
    let tcp = |port: u16| format!("tcp://127.0.0.1:{port}");
    let trust = ", accept_proxy: { trusted: [127.0.0.0/8] }";
    let edge = Edge::start(&format!(
        "{HEAD}{}{}{}{}{}pools:\n{}{}{}{}{}",
        listener("n1", &tcp(n1), ""),
        listener("n2", &tcp(n2), ""),
        listener("h1", &tcp(h1), ""),
        listener("h2", &tcp(h2), ""),
        listener("relay", &tcp(relay), trust),
        pool("n1", to_nginx, ", send_proxy: v1"),
        pool("n2", to_nginx, ", send_proxy: v2"),
        pool("h1", to_haproxy, ", send_proxy: v1"),
        pool("h2", to_haproxy, ", send_proxy: v2"),
        pool("relay", to_nginx, ", send_proxy: v2"),
    ));
    for (port, what) in [
        (n1, "nginx takes v1"),
        (n2, "nginx takes v2"),
        (h1, "HAProxy takes v1"),
        (h2, "HAProxy takes v2"),
        (from_nginx, "nginx gives v1"),
        (from_haproxy_1, "HAProxy gives v1"),
        (from_haproxy_2, "HAProxy gives v2 with a TLV"),
    ] {
        let (us, told) = get(port);
        assert_eq!(told, us, "{what}; the edge's log:\n{}", edge.log());
    }
}

/// Many connections at once, plain and TLS, IPv4 and IPv6: every answer is right.
#[test]
fn wrk_finds_no_error_before_nginx() {
    if !has("nginx") || !has("wrk") {
        return;
    }
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    certificates(folder.path());
    let (backend, plain, secure) = (free_port(), free_port(), free_port());
    let _nginx = nginx(
        folder.path(),
        &http(
            folder.path(),
            &format!(
                "server {{ listen 127.0.0.1:{backend}; location / {{ return 200 \"hello\"; }} }}"
            ),
        ),
    );
    wait_for_tcp(backend);
    let path = |file: &str| folder.path().join(file).display().to_string();
    let tls = format!(
        ", tls: {{ certificates: [{{ certificate: {}, key: {} }}], handshake: 30s }}",
        path("edge.pem"),
        path("edge.key")
    );
    let bind = format!(
        "tcp://127.0.0.1:{plain}, \"tcp://[::1]:{plain}\", tls://127.0.0.1:{secure}, \"tls://[::1]:{secure}\""
    );
    let edge = Edge::start(&format!(
        "{HEAD}{}pools:\n{}",
        listener("web", &bind, &tls),
        pool("web", backend, "")
    ));
    for url in [
        format!("http://127.0.0.1:{plain}/"),
        format!("http://[::1]:{plain}/"),
        format!("https://127.0.0.1:{secure}/"),
        format!("https://[::1]:{secure}/"),
    ] {
        let out = Command::new("wrk")
            .args(["-t", "1", "-c", "20", "-d", "2s", "--timeout", "30s", &url])
            .output()
            .expect("wrk runs");
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(text.contains("requests in") && !text.contains(" 0 requests in"), "{url}: {text}");
        assert!(!text.contains("Socket errors") && !text.contains("Non-2xx"), "{url}: {text}");
    }
    edge.until("all flows to end", |edge| edge.instance("web", "a")["in_flight"] == 0);
    let handshakes = edge.metric("strowger_tls_handshakes_total", &["listener=\"web\""]);
    assert!(handshakes >= 40.0, "{handshakes}");
}

/// A control connection and four of data, both ways; iperf3 itself looks at what arrived.
#[test]
fn iperf3_moves_its_bytes_both_ways() {
    if !has("iperf3") {
        return;
    }
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let (port, backend) = (free_port(), free_port());
    let mut server = Command::new("iperf3");
    server.args(["-s", "-B", "127.0.0.1", "-p", &backend.to_string()]);
    let _server = Process::spawn(&mut server, &folder.path().join("iperf.log"));
    wait_for_tcp(backend);
    let edge = Edge::start(&format!(
        "{HEAD}{}pools:\n{}",
        listener("bulk", &format!("tcp://127.0.0.1:{port}"), ""),
        pool("bulk", backend, "")
    ));
    for way in ["--format=m", "--reverse"] {
        let run = || {
            Command::new("iperf3")
                .args([
                    "-c",
                    "127.0.0.1",
                    "-p",
                    &port.to_string(),
                    "-P",
                    "4",
                    "-n",
                    "50M",
                    "-J",
                    way,
                ])
                .output()
                .expect("iperf3 runs")
        };
        // The server takes one test at a time, and says so while it ends the last.
        let end = Instant::now() + Duration::from_secs(60);
        let mut out = run();
        while !out.status.success() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(200));
            out = run();
        }
        let told: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
        // Its server counts no more once the client's end is told over the control connection, whatever
        // is still in the buffers of four data connections; the bytes themselves are checked elsewhere
        // (ssh, and the checksummed streams of the upgrade).
        let received = told["end"]["sum_received"]["bytes"].as_f64().unwrap_or(0.0);
        assert!(received >= 1e6 && told["error"].is_null(), "{told}");
    }
    edge.until("all flows to end", |edge| edge.instance("bulk", "a")["in_flight"] == 0);
}

/// sshd speaks first, and its MACs find a wrong byte: three megabytes there and back.
#[test]
fn ssh_runs_through_it() {
    if !has("sshd") || !has("ssh") || !has("ssh-keygen") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = |file: &str| folder.path().join(file).display().to_string();
    for key in ["host", "user"] {
        let made = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-f", &path(key)])
            .status();
        assert!(made.expect("ssh-keygen runs").success());
    }
    fs::copy(path("user.pub"), path("authorized")).expect("copied");
    let (port, backend) = (free_port(), free_port());
    let root = Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout == b"0\n");
    if root {
        // Where sshd shuts its unprivileged part in; its unit file makes it, otherwise.
        fs::create_dir_all("/run/sshd").expect("made");
    }
    fs::write(path("sshd_config"), format!(
        "Port {backend}\nListenAddress 127.0.0.1\nHostKey {}\nPidFile {}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n",
        path("host"), path("pid"), path("authorized")
    )).expect("written");
    let mut server = Command::new("/usr/sbin/sshd");
    server.args(["-D", "-e", "-f", &path("sshd_config")]);
    let _server = Process::spawn(&mut server, &folder.path().join("sshd.log"));
    wait_for_tcp(backend);
    let _edge = Edge::start(&format!(
        "{HEAD}{}pools:\n{}",
        listener("ssh", &format!("tcp://127.0.0.1:{port}"), ""),
        pool("ssh", backend, "")
    ));
    let payload: Vec<u8> =
        (0..3_000_000_u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut client = Command::new("ssh")
        .args(["-F", "/dev/null", "-i", &path("user"), "-p", &port.to_string()])
        .args([
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "BatchMode=yes",
        ])
        .args(["-o", "ConnectTimeout=30", "127.0.0.1", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("ssh runs");
    let mut input = client.stdin.take().expect("piped");
    let sent = payload.clone();
    let writer = std::thread::spawn(move || input.write_all(&sent));
    let out = client.wait_with_output().expect("it ends");
    assert!(writer.join().is_ok_and(|written| written.is_ok()));
    let log = fs::read_to_string(path("sshd.log")).unwrap_or_default();
    assert!(out.status.success(), "{}\n{log}", String::from_utf8_lossy(&out.stderr));
    assert!(out.stdout == payload, "{} bytes came back", out.stdout.len());
}

/// What OpenSSL is offered and refused.
#[test]
fn openssl_finds_what_is_promised_and_nothing_else() {
    if !has("openssl") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    certificates(folder.path());
    let path = |file: &str| folder.path().join(file).display().to_string();
    let (port, backend) = (free_port(), free_port());
    let listening = std::net::TcpListener::bind(("127.0.0.1", backend)).expect("a free port");
    std::thread::spawn(move || {
        for stream in listening.incoming().flatten() {
            std::thread::spawn(move || {
                let mut stream = stream;
                let mut buffer = [0; 4_096];
                while let Ok(count) = stream.read(&mut buffer) {
                    if count == 0 || stream.write_all(&buffer[..count]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    fs::write(path("staple.der"), b"an OCSP answer, stapled as it is").expect("written");
    let tls = format!(
        ", tls: {{ certificates: [{{ certificate: {}, key: {}, ocsp: {} }}], handshake: 30s, alpn: [postgresql, http/1.1] }}",
        path("edge.pem"),
        path("edge.key"),
        path("staple.der")
    );
    let edge = Edge::start(&format!(
        "{HEAD}{}pools:\n{}",
        listener("safe", &format!("tls://127.0.0.1:{port}"), &tls),
        pool("safe", backend, "")
    ));
    let ask = |arguments: &[&str], input: &str| {
        let mut client = Command::new("openssl")
            .args([
                "s_client",
                "-connect",
                &format!("127.0.0.1:{port}"),
                "-CAfile",
                &path("ca.pem"),
            ])
            .args(["-servername", "edge.example.net"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("openssl runs");
        // It may have ended by then.
        let _refused = client.stdin.take().expect("piped").write_all(input.as_bytes());
        let out = client.wait_with_output().expect("it ends");
        format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
    };
    for (version, shown) in [("-tls1_2", "TLSv1.2"), ("-tls1_3", "TLSv1.3")] {
        let text = ask(&[version, "-alpn", "http/1.1"], "Q\n");
        assert!(text.contains(shown) && text.contains("Verify return code: 0 (ok)"), "{text}");
        assert!(text.contains("ALPN protocol: http/1.1"), "{text}");
        assert!(text.contains("Compression: NONE") || !text.contains("Compression:"), "{text}");
    }
    for refused in [
        &["-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0"][..],
        &["-tls1", "-cipher", "DEFAULT@SECLEVEL=0"],
        &["-tls1_2", "-cipher", "AES128-GCM-SHA256:AES256-SHA"],
        &["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA:ECDHE-ECDSA-AES256-SHA384"],
        &["-alpn", "h2"],
    ] {
        let text = ask(refused, "Q\n");
        assert!(
            !text.contains("Verify return code: 0 (ok)") || text.contains("alert"),
            "{refused:?}: {text}"
        );
    }
    // A client that asks for a new handshake within the old one (CVE-2011-1473) gets none.
    let text = ask(&["-tls1_2"], "R\nhello\n");
    assert!(
        !text.contains("hello")
            || text.to_lowercase().contains("no renegotiation")
            || text.contains("error"),
        "{text}"
    );
    let text = ask(&["-tls1_2", "-status"], "Q\n");
    assert!(text.contains("OCSP response"), "{text}");
    assert!(!text.contains("OCSP response: no response sent"), "{text}");
    for version in ["-tls1_2", "-tls1_3"] {
        let session = path(&format!("session{version}"));
        // TLS 1.3 sends its tickets after the handshake: the session is kept when data came back.
        let mut first = Command::new("openssl")
            .args([
                "s_client",
                "-connect",
                &format!("127.0.0.1:{port}"),
                version,
                "-servername",
                "edge.example.net",
                "-sess_out",
                &session,
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("openssl runs");
        let mut input = first.stdin.take().expect("piped");
        input.write_all(b"hello\n").expect("it reads");
        let end = Instant::now() + Duration::from_secs(30);
        while !fs::metadata(&session).is_ok_and(|file| file.len() > 0) {
            assert!(Instant::now() < end, "no session was kept");
            std::thread::sleep(Duration::from_millis(20));
        }
        input.write_all(b"Q\n").expect("it reads");
        drop(input);
        let _ended = first.wait_with_output();
        let text = ask(&[version, "-sess_in", &session], "Q\n");
        assert!(text.contains("Reused, "), "{version}: {text}");
    }
    let resumed = edge.metric("strowger_tls_handshakes_total", &["resumed=\"yes\""]);
    assert!(resumed >= 2.0, "{resumed}");
    edge.until("refusals to be counted", |edge| {
        edge.metric("strowger_tls_handshake_failures_total", &["listener=\"safe\""]) >= 4.0
    });
}
