//! sipp's calls through the edge.

mod caller;
mod chaos;
mod hung;
mod impairment;
mod import;
mod names;
mod neighbours;
mod outbound;
mod overload;
pub(crate) mod phone;
mod scenarios;
pub(crate) mod secure;
mod torture;
mod trace;
mod websocket;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::harness::{Edge, Process, alone, free_port, has};

/// A sipp UAS.
fn uas(folder: &Path, port: u16, transport: &str, scenario: Option<&Path>) -> Process {
    let mut command = Command::new("sipp");
    match scenario {
        Some(file) => command.arg("-sf").arg(file),
        None => command.args(["-sn", "uas"]),
    };
    command.args(["-i", "127.0.0.1", "-p", &port.to_string(), "-t", transport, "-nostdin"]);
    command.args(["-trace_msg", "-message_file"]).arg(folder.join(format!("uas-{port}.msg")));
    let process =
        Process::spawn(command.current_dir(folder), &folder.join(format!("uas-{port}.log")));
    std::thread::sleep(Duration::from_millis(600));
    process
}

/// What sipp's UAC said at its end.
struct Calls {
    code: Option<i32>,
    log: String,
}

impl Calls {
    /// The last value of a line of sipp's statistics.
    fn count(&self, line: &str) -> u64 {
        let found = self.log.lines().rev().find(|text| text.trim_start().starts_with(line));
        let number = found.and_then(|text| text.rsplit('|').next()?.trim().parse().ok());
        number.unwrap_or_else(|| panic!("no `{line}` in\n{}", self.log))
    }

    fn all_good(&self, calls: u64) {
        assert_eq!(self.code, Some(0), "{}", self.log);
        assert_eq!(
            (self.count("Successful call"), self.count("Failed call")),
            (calls, 0),
            "{}",
            self.log
        );
    }
}

struct Uac {
    process: Process,
    log: PathBuf,
}

fn uac(
    folder: &Path,
    edge: u16,
    transport: &str,
    calls: u32,
    rate: u32,
    scenario: Option<&Path>,
) -> Uac {
    let port = free_port();
    let log = folder.join(format!("uac-{port}.log"));
    let mut command = Command::new("sipp");
    match scenario {
        Some(file) => command.arg("-sf").arg(file),
        None => command.args(["-sn", "uac"]),
    };
    command.arg(format!("127.0.0.1:{edge}")).args([
        "-i",
        "127.0.0.1",
        "-p",
        &port.to_string(),
        "-t",
        transport,
    ]);
    command.args(["-m", &calls.to_string(), "-r", &rate.to_string(), "-nostdin"]);
    command.args(["-trace_err", "-error_file"]).arg(folder.join(format!("uac-{port}.err")));
    Uac { process: Process::spawn(command.current_dir(folder), &log), log }
}

impl Uac {
    fn done(mut self) -> Calls {
        let code = self.process.wait(Duration::from_secs(180));
        Calls {
            code,
            log: String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned(),
        }
    }
}

fn config(port: u16, backends: &[(&str, &str, u16)], more: &str) -> String {
    let list: Vec<String> = backends
        .iter()
        .map(|(id, transport, port)| {
            format!("      - {{ id: {id}, address: {transport}://127.0.0.1:{port} }}\n")
        })
        .collect();
    format!(
        "version: 1\nnode: {{ name: test, workers: 2{more} }}\nadmin: {{ listen: ADMIN }}\nlisteners:\n  - name: sip\n    protocol: sip\n    bind: [udp://127.0.0.1:{port}, tcp://127.0.0.1:{port}]\n    pool: ims\n    options: {{ failover_timeout: 600ms }}\npools:\n  ims:\n    backends:\n{}",
        list.concat()
    )
}

/// The Call-IDs of the requests that a UAS got.
fn call_ids(folder: &Path, port: u16) -> std::collections::HashSet<String> {
    let log = fs::read(folder.join(format!("uas-{port}.msg"))).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    log.split("received")
        .skip(1)
        .filter_map(|part| part.lines().find_map(|line| line.strip_prefix("Call-ID: ")))
        .map(|id| id.trim().to_owned())
        .collect()
}

fn basic_calls(transport: &str, scheme: &str) {
    if !has("sipp") {
        return;
    }
    let _alone = alone();
    let (port, one, two) = (free_port(), free_port(), free_port());
    let edge = Edge::start(&config(port, &[("a", scheme, one), ("b", scheme, two)], ""));
    let folder = edge.folder.path();
    let _uas = [uas(folder, one, transport, None), uas(folder, two, transport, None)];
    uac(folder, port, transport, 2_000, 200, None).done().all_good(2_000);
    assert_eq!(
        edge.metric("strowger_protocol_total", &["sip_requests_repeated"]),
        0.0,
        "the proxy retransmitted"
    );
    let (at_one, at_two) = (call_ids(folder, one), call_ids(folder, two));
    assert_eq!(at_one.len() + at_two.len(), 2_000);
    assert!(at_one.is_disjoint(&at_two), "a dialog's requests reached two instances");
    assert!(at_one.len() > 800 && at_two.len() > 800, "{} and {}", at_one.len(), at_two.len());
    edge.until("all transactions to end", |edge| edge.metric("strowger_sessions", &[]) == 0.0);
    assert_eq!(edge.instance("ims", "a")["in_flight"], 0);
}

#[test]
fn two_thousand_calls_over_udp() {
    basic_calls("u1", "udp");
}

#[test]
fn two_thousand_calls_over_tcp() {
    basic_calls("t1", "tcp");
}

/// Ten reloads a second, a backend added and another drained: no call fails, and no live dialog
/// moves.
#[test]
fn calls_go_on_through_reloads_and_a_drain() {
    if !has("sipp") {
        return;
    }
    let _alone = alone();
    let (port, one, two, three) = (free_port(), free_port(), free_port(), free_port());
    let two_of_them = config(port, &[("a", "udp", one), ("b", "udp", two)], "");
    let all = config(port, &[("a", "udp", one), ("b", "udp", two), ("c", "udp", three)], "");
    let edge = Edge::start(&two_of_them);
    let folder = edge.folder.path();
    let _uas = [one, two, three].map(|port| uas(folder, port, "u1", None));
    let mut scenario = fs::File::create(folder.join("long.xml")).expect("a file");
    std::io::Write::write_all(&mut scenario, call_with_pause(1_500).as_bytes()).expect("written");
    let calls = uac(folder, port, "u1", 1_000, 100, Some(&folder.join("long.xml")));
    for round in 0..100 {
        let answer = edge.put_config(if round < 20 { &two_of_them } else { &all });
        assert_eq!(answer.0, 200, "{}", answer.1);
        if round == 50 {
            assert_eq!(edge.post("/api/v1/pools/ims/instances/a/drain", "").0, 202);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    calls.done().all_good(1_000);
    let seen = [one, two, three].map(|port| call_ids(folder, port));
    assert_eq!(
        seen.iter().map(std::collections::HashSet::len).sum::<usize>(),
        1_000,
        "a dialog moved"
    );
    assert!(!seen[2].is_empty(), "the added instance got calls");
    edge.until("the drain to end", |edge| edge.instance("ims", "a")["state"] == "gone");
}

/// A call of INVITE, ACK, a pause, BYE, that follows Record-Route.
fn call_with_pause(millis: u32) -> String {
    let request = |name: &str, extra: &str, number: u32| {
        format!(
            "{name} {} SIP/2.0\nVia: SIP/2.0/[transport] [local_ip]:[local_port];branch=[branch]\nFrom: sipp <sip:sipp@[local_ip]:[local_port]>;tag=[pid]t[call_number]\nTo: sut <sip:service@[remote_ip]:[remote_port]>{}\n{}Call-ID: [call_id]\nCSeq: {number} {name}\nContact: sip:sipp@[local_ip]:[local_port]\nMax-Forwards: 70\n{extra}Content-Length: 0\n\n",
            if number == 1 && name == "INVITE" {
                "sip:service@[remote_ip]:[remote_port]"
            } else {
                "[next_url]"
            },
            if name == "INVITE" { "" } else { "[peer_tag_param]" },
            if name == "INVITE" { "" } else { "[routes]\n" },
        )
    };
    format!(
        "<?xml version=\"1.0\" encoding=\"ISO-8859-1\" ?>\n<scenario name=\"pause\">\n<send retrans=\"500\"><![CDATA[\n{}]]></send>\n<recv response=\"100\" optional=\"true\"/>\n<recv response=\"180\" optional=\"true\"/>\n<recv response=\"200\" rrs=\"true\"/>\n<send><![CDATA[\n{}]]></send>\n<pause milliseconds=\"{millis}\"/>\n<send retrans=\"500\"><![CDATA[\n{}]]></send>\n<recv response=\"200\"/>\n</scenario>\n",
        request("INVITE", "", 1),
        request("ACK", "", 1),
        request("BYE", "", 2)
    )
}

/// The edge is killed and started again in the middle of calls: the BYEs still find their instance,
/// by the token alone.
#[test]
fn dialogs_survive_a_restart_of_the_edge() {
    restart_in_the_middle("");
}

/// What is hidden from one side is carried by it, not remembered.
#[test]
fn hidden_dialogs_survive_a_restart_of_the_edge() {
    restart_in_the_middle(", topology_hiding: { from: both }");
}

fn restart_in_the_middle(options: &str) {
    if !has("sipp") {
        return;
    }
    let _alone = alone();
    let (port, one, two) = (free_port(), free_port(), free_port());
    let keys = tempfile::NamedTempFile::new().expect("a file");
    fs::write(keys.path(), "00112233445566778899aabbccddeeff\n").expect("written");
    let more = format!(", token_key_file: {}", keys.path().display());
    let yaml = config(port, &[("a", "udp", one), ("b", "udp", two)], &more);
    let yaml =
        yaml.replace("failover_timeout: 600ms", &format!("failover_timeout: 600ms{options}"));
    let mut edge = Edge::start(&yaml);
    let work = tempfile::TempDir::new().expect("a folder");
    let folder = work.path();
    let _uas = [uas(folder, one, "u1", None), uas(folder, two, "u1", None)];
    fs::write(folder.join("long.xml"), call_with_pause(4_000)).expect("written");
    let calls = uac(folder, port, "u1", 100, 100, Some(&folder.join("long.xml")));
    std::thread::sleep(Duration::from_millis(2_500));
    edge.process.kill();
    drop(edge);
    let edge = Edge::start(&yaml);
    calls.done().all_good(100);
    let (at_one, at_two) = (call_ids(folder, one), call_ids(folder, two));
    assert!(at_one.is_disjoint(&at_two), "a BYE reached the other instance");
    assert_eq!(at_one.len() + at_two.len(), 100);
    assert!(
        edge.metric("strowger_requests_total", &["in-session", "met"]) >= 100.0,
        "the BYEs went through the new edge"
    );
}

/// An instance is killed at full rate: the calls that were under way fail over or end, and those
/// set up once its failure is known do not fail.
#[test]
fn a_killed_instance_costs_little() {
    if !has("sipp") {
        return;
    }
    let _alone = alone();
    let (port, one, two) = (free_port(), free_port(), free_port());
    let yaml = config(port, &[("a", "udp", one), ("b", "udp", two)], "");
    let edge = Edge::start(&format!("{yaml}    outlier: {{ faults: 3, ejection: 60s }}\n"));
    let folder = edge.folder.path();
    let mut first = uas(folder, one, "u1", None);
    let _second = uas(folder, two, "u1", None);
    let calls = uac(folder, port, "u1", 1_000, 200, None);
    std::thread::sleep(Duration::from_millis(1_500));
    first.kill();
    let calls = calls.done();
    let failed = calls.count("Failed call");
    // Those between their 200 and their BYE at that moment have nobody to answer the BYE.
    assert!(failed <= 20, "{failed} calls failed:\n{}", calls.log);
    assert_eq!(edge.instance("ims", "a")["health"], "ejected");
    // A closed port is told by ICMP: whoever was asked there is tried elsewhere at once.
    assert!(edge.metric("strowger_retries_total", &[]) > 0.0);
    uac(folder, port, "u1", 300, 200, None).done().all_good(300);
}
