//! The agent and live sessions: none is cut by a roll-out, a scale-in, a lost edge or a lost agent.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::agent_support::{Agent, edge, state_at};
use crate::harness::{Edge, Process, alone, free_port, free_range, has};

/// Whether the runs are as long as the project promises: `STROWGER_FULL=1 cargo test --test it
/// agent_sessions`. Else calls are shorter, and losses as long as two leases.
fn full() -> bool {
    std::env::var_os("STROWGER_FULL").is_some()
}

/// How long an edge, or the agent, is away.
fn away() -> Duration {
    Duration::from_secs(if full() { 120 } else { 8 })
}

/// An edge and an agent that has `count` ready instances of a manifest; the edge's SIP port.
fn deployed(count: u32, more: &str) -> (Edge, Agent, String, u16) {
    let sip = free_port();
    let edge = Edge::start(&edge(sip, free_port(), free_port()));
    let agent = Agent::start(&["--ports", &ports()]);
    let manifest = ims(&[&edge], count, more);
    agent.apply(&manifest);
    for index in 0..count {
        let id = format!("ims-{index}");
        edge.until(&id, |edge| state_at(edge, "ims", &id) == "ready");
    }
    (edge, agent, manifest, sip)
}

/// Waits until instances hold so many calls.
fn until_sessions(agent: &Agent, count: u64) {
    agent.until("live calls", |agent| {
        agent.instances("ims").iter().filter_map(|it| it["sessions"].as_u64()).sum::<u64>() >= count
    });
}

fn ports() -> String {
    free_range(100)
}

/// Sample SIP instances; `more` is further keys of the application.
fn ims(edges: &[&Edge], count: u32, more: &str) -> String {
    let edges: Vec<String> = edges.iter().map(|edge| format!("http://{}", edge.admin)).collect();
    format!(
        "version: 1
edges: [{}]
apps:
  ims:
    exec: [{}, sample, sip, --port, \"${{PORT}}\", --name, \"${{INSTANCE_ID}}\", --stall, \"${{STALL}}\"]
    instances: {count}
    ports: {{ sip: {{ protocol: sip, transport: udp }} }}
    health: {{ ready: {{ sip_options: sip, every: 1s, timeout: 3s }} }}
    register: {{ ims: {{ lease: 6s }} }}
    drain: {{ deadline: 5m, kill_after: 3s }}
{more}",
        edges.join(", "),
        env!("CARGO_BIN_EXE_strowger")
    )
}

/// A call that follows Record-Route and lasts as long as `pause` says.
fn call(pause: &str) -> String {
    let request = |name: &str, number: u32| {
        let first = name == "INVITE";
        let uri = if first { "sip:service@[remote_ip]:[remote_port]" } else { "[next_url]" };
        let tag = if first { "" } else { "[peer_tag_param]" };
        let routes = if first { "" } else { "[routes]\n" };
        format!(
            "{name} {uri} SIP/2.0\nVia: SIP/2.0/[transport] [local_ip]:[local_port];branch=[branch]\nFrom: sipp <sip:sipp@[local_ip]:[local_port]>;tag=[pid]t[call_number]\nTo: sut <sip:service@[remote_ip]:[remote_port]>{tag}\n{routes}Call-ID: [call_id]\nCSeq: {number} {name}\nContact: sip:sipp@[local_ip]:[local_port]\nMax-Forwards: 70\nContent-Length: 0\n\n"
        )
    };
    format!(
        "<?xml version=\"1.0\" encoding=\"ISO-8859-1\" ?>\n<scenario name=\"call\">\n<send retrans=\"500\"><![CDATA[\n{}]]></send>\n<recv response=\"100\" optional=\"true\"/>\n<recv response=\"180\" optional=\"true\"/>\n<recv response=\"200\" rrs=\"true\"/>\n<send><![CDATA[\n{}]]></send>\n{pause}\n<send retrans=\"500\"><![CDATA[\n{}]]></send>\n<recv response=\"200\"/>\n</scenario>\n",
        request("INVITE", 1),
        request("ACK", 1),
        request("BYE", 2)
    )
}

struct Calls {
    process: Process,
    log: PathBuf,
}

fn calls(folder: &Path, sip: u16, count: u32, rate: u32, pause: &str) -> Calls {
    let port = free_port();
    let scenario = folder.join(format!("call-{port}.xml"));
    fs::write(&scenario, call(pause)).expect("written");
    let log = folder.join(format!("uac-{port}.log"));
    let mut command = Command::new("sipp");
    command.arg("-sf").arg(&scenario).arg(format!("127.0.0.1:{sip}"));
    command.args(["-i", "127.0.0.1", "-p", &port.to_string(), "-nostdin"]);
    command.args(["-m", &count.to_string(), "-r", &rate.to_string(), "-l", "5000"]);
    command.args(["-trace_err", "-error_file"]).arg(folder.join(format!("uac-{port}.err")));
    Calls { process: Process::spawn(command.current_dir(folder), &log), log }
}

impl Calls {
    /// (successful, failed), once all are over.
    fn done(mut self) -> (u64, u64, String) {
        let code = self.process.wait(Duration::from_secs(600));
        let log = String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned();
        let count = |line: &str| {
            let found = log.lines().rev().find(|text| text.trim_start().starts_with(line));
            found.and_then(|text| text.rsplit('|').next()?.trim().parse().ok()).unwrap_or(0)
        };
        let told = format!("sipp ended with {code:?}\n{log}");
        (count("Successful call"), count("Failed call"), told)
    }
}

/// Three instances under live calls: a new release comes in one by one, then two instances go. Each old
/// process waits for its last BYE; no call fails.
#[test]
fn a_rolling_update_and_a_scale_in_break_no_call() {
    if !has("sipp") {
        return;
    }
    let _alone = alone();
    let (_edge, agent, manifest, sip) = deployed(
        3,
        "    env: { STALL: 0s, COLOUR: blue }\n    rollout: { min_healthy_time: 1s, gate: { min_samples: 1000000 } }\n",
    );
    let old = agent.pids("ims");
    let longest = if full() { 60_000 } else { 20_000 };
    let pause = format!("<pause distribution=\"uniform\" min=\"5000\" max=\"{longest}\"/>");
    let live = calls(agent.folder.path(), sip, 500, 80, &pause);
    until_sessions(&agent, 250);
    let told = agent.apply(&manifest.replace("COLOUR: blue", "COLOUR: green"));
    assert!(told.contains("new-release"), "{told}");
    agent.until("the rollout", |agent| agent.app("ims")["rollout"].is_null());
    let (good, failed, log) = live.done();
    assert_eq!((good, failed), (500, 0), "{log}\n{}", agent.log());
    assert_eq!(agent.app("ims")["release"], 2);
    agent.until("the old ones to be gone", |agent| agent.instances("ims").len() == 3);
    assert!(agent.pids("ims").iter().all(|pid| !old.contains(pid)));
    assert!(agent.log().contains("no sessions are left"), "stopped by sessions, not by a deadline");

    let live = calls(agent.folder.path(), sip, 200, 60, "<pause milliseconds=\"8000\"/>");
    until_sessions(&agent, 190);
    agent.run(&["scale", "ims", "1"]);
    agent.until("two drains", |agent| {
        agent.instances("ims").iter().filter(|it| it["phase"] == "draining").count() == 2
    });
    let (good, failed, log) = live.done();
    assert_eq!((good, failed), (200, 0), "{log}\n{}", agent.log());
    agent.until("one to be left", |agent| agent.instances("ims").len() == 1);
}

/// A release that answers too late gets its share of new sessions, and is taken back by what the edge
/// reports; nobody has to look.
#[test]
fn a_canary_that_stalls_is_rolled_back_by_itself() {
    if !has("sipp") {
        return;
    }
    let _alone = alone();
    let rollout = "    rollout: { strategy: canary, steps: [20, 50], min_healthy_time: 1s, hold: 60s, gate: { min_samples: 20, max_miss_percent: 20, max_vs_baseline: 0 } }\n";
    let (_edge, agent, manifest, sip) =
        deployed(3, &format!("    env: {{ STALL: 0s }}\n{rollout}"));
    let live = calls(agent.folder.path(), sip, 1_500, 40, "<pause milliseconds=\"200\"/>");
    agent.apply(&manifest.replace("STALL: 0s", "STALL: 900ms"));
    agent.until("the rollback", |agent| agent.app("ims")["history"][0]["outcome"] == "rolled-back");
    let app = agent.app("ims");
    assert!(
        app["history"][0]["reason"].as_str().is_some_and(|it| it.contains("missed their deadline")),
        "{app}"
    );
    assert_eq!(app["release"], 1);
    let (good, failed, log) = live.done();
    assert!(good + failed == 1_500 && failed < 300, "{log}");
    agent.until("the canary to be gone", |agent| agent.instances("ims").len() == 3);
    // At most its share, with room for chance: 20 % of 1,500.
    let output = fs::read_to_string(agent.state().join("instances/ims-3/log")).unwrap_or_default();
    let ids =
        output.split("\"message\":\"INVITE ").skip(1).filter_map(|rest| rest.split('"').next());
    let touched = ids.collect::<std::collections::BTreeSet<_>>().len();
    assert!((1..=400).contains(&touched), "{touched} calls reached the canary");
}

/// One of two edges, and the agent, are lost in turn. Calls at the other edge go on; who comes back
/// knows all instances again by the next heartbeat.
#[test]
fn a_lost_edge_and_a_lost_agent_harm_no_call() {
    if !has("sipp") {
        return;
    }
    let _alone = alone();
    let (sip, other) = (free_port(), free_port());
    let one = Edge::start(&edge(sip, free_port(), free_port()));
    let yaml = edge(other, free_port(), free_port());
    let mut two = Edge::start(&yaml);
    let admin = two.admin;
    let mut agent = Agent::start(&["--ports", &ports()]);
    agent.apply(&ims(&[&one, &two], 2, "    env: { STALL: 0s }\n"));
    for edge in [&one, &two] {
        for id in ["ims-0", "ims-1"] {
            edge.until(id, |edge| state_at(edge, "ims", id) == "ready");
        }
    }
    let pids = agent.pids("ims");
    let seconds = u32::try_from(away().as_secs()).expect("small");
    // Calls are made and live all the time.
    let count = (2 * seconds + 6) * 25;
    let live = calls(agent.folder.path(), sip, count, 25, "<pause milliseconds=\"4000\"/>");
    two.process.kill();
    agent.until("the loss to be seen", |agent| {
        agent.instance("ims-0")["edges"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|it| !it["error"].is_null())
    });
    std::thread::sleep(away());
    let mut command = Command::new(env!("CARGO_BIN_EXE_strowger"));
    command.args(["run", "--drain", "1s", "--config"]).arg(two.config_file());
    let log = two.folder.path().join("edge-2.log");
    two.process = Process::spawn(&mut command, &log);
    assert_eq!(two.admin, admin, "it comes back where it was");
    for id in ["ims-0", "ims-1"] {
        two.until(id, |edge| {
            edge.get("/readyz").is_ok_and(|(code, _)| code == 200)
                && state_at(edge, "ims", id) == "ready"
        });
    }
    agent.process.kill();
    std::thread::sleep(away());
    for id in ["ims-0", "ims-1"] {
        assert_eq!(state_at(&one, "ims", id), "ready", "longer than a lease: {}", one.log());
    }
    agent.again();
    agent.until("the processes of before", |agent| agent.pids("ims") == pids);
    let (good, failed, log) = live.done();
    assert_eq!((good, failed), (count.into(), 0), "{log}\n{}", agent.log());
}

/// sipp's own UAS, which knows nothing of us, is deployed by a manifest alone.
#[test]
fn a_sipp_uas_is_deployed_by_a_manifest_alone() {
    if !has("sipp") {
        return;
    }
    let _alone = alone();
    let sip = free_port();
    let edge = Edge::start(&edge(sip, free_port(), free_port()));
    let agent = Agent::start(&["--ports", &ports()]);
    agent.apply(&format!(
        "version: 1
edges: [http://{}]
apps:
  uas:
    exec: [sipp, -sn, uas, -i, \"${{HOST}}\", -p, \"${{PORT}}\", -nostdin]
    instances: 2
    ports: {{ sip: {{ protocol: sip, transport: udp }} }}
    health: {{ startup: {{ exec: [sh, -c, \"grep -qi :$(printf %04X $PORT) /proc/net/udp\"], timeout: 5s }} }}
    register: {{ ims: {{ lease: 6s }} }}
",
        edge.admin
    ));
    for id in ["uas-0", "uas-1"] {
        edge.until(id, |edge| state_at(edge, "ims", id) == "ready");
    }
    let (good, failed, log) =
        calls(agent.folder.path(), sip, 100, 50, "<pause milliseconds=\"100\"/>").done();
    assert_eq!((good, failed), (100, 0), "{log}");
}

/// Instance X dies together with its agent, so nobody unregisters it; another agent starts another
/// program on its port, inside the lease. None of X's calls reach the newcomer. Beside it, the same with
/// an edge that knows the address alone, as others do: there, all do.
#[test]
fn who_takes_a_dead_instances_port_gets_none_of_its_messages() {
    if !has("sipp") {
        return;
    }
    const CALLS: u64 = 10;
    let _alone = alone();
    let (sip, by_address, port) = (free_port(), free_port(), free_port());
    let leased = Edge::start(&edge(sip, free_port(), free_port()));
    let _fixed = Edge::start(&edge(by_address, free_port(), free_port()).replace(
        "ims: { debounce: 0, slow_start: 0 }",
        &format!("ims: {{ backends: [{{ id: x, address: udp://127.0.0.1:{port} }}] }}"),
    ));
    let manifest = |name: &str| {
        ims(&[&leased], 1, "    env: { STALL: 0s }\n")
            .replace("  ims:\n    exec", &format!("  {name}:\n    exec"))
            .replace("transport: udp", &format!("transport: udp, fixed: {port}"))
            .replace("lease: 6s", "lease: 30s")
    };
    let mut one = Agent::start(&["--ports", &ports()]);
    one.apply(&manifest("x"));
    leased.until("x", |edge| state_at(edge, "ims", "x-0") == "ready");
    let folder = one.folder.path().to_owned();
    let count = u32::try_from(CALLS).expect("small");
    let pinned = calls(&folder, sip, count, 50, "<pause milliseconds=\"12000\"/>");
    let unpinned = calls(&folder, by_address, count, 50, "<pause milliseconds=\"12000\"/>");
    one.until("calls", |agent| {
        let log = fs::read_to_string(agent.state().join("instances/x-0/log")).unwrap_or_default();
        log.matches("\"message\":\"INVITE").count() as u64 >= 2 * CALLS
    });
    let pid = one.pids("x")[0];
    one.process.kill();
    Command::new("kill").args(["-9", &pid.to_string()]).status().expect("kill runs");
    let two = Agent::start(&["--ports", &ports()]);
    two.apply(&manifest("y"));
    leased.until("the newcomer", |edge| state_at(edge, "ims", "y-0") == "ready");
    assert!(leased.log().contains("instance_superseded"), "{}", leased.log());
    let (good, failed, log) = pinned.done();
    assert_eq!((good, failed), (0, CALLS), "X's calls are told that they are over: {log}");
    let (good, _, log) = unpinned.done();
    assert_eq!(good, CALLS, "by address alone, the newcomer answers for X: {log}");
    let got = fs::read_to_string(two.state().join("instances/y-0/log")).unwrap_or_default();
    assert_eq!(got.matches("\"message\":\"BYE").count() as u64, CALLS, "{got}");
    assert!(leased.metric("strowger_requests_total", &["in-session"]) > 0.0);
}
