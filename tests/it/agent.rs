//! The agent through the real binary: what a manifest says runs, is registered, and stays.

use std::process::Command;
use std::time::Duration;

use crate::agent_support::{Agent, edge, processes, state_at};
use crate::harness::{Edge, free_port, free_range, has, http};

/// Ports for a test's agent that no other test's has.
fn ports() -> String {
    free_range(60)
}

fn web(edge: &Edge, count: u32, more: &str) -> String {
    format!(
        "version: 1
edges: [http://{}]
apps:
  web:
    exec: [python3, -u, -m, http.server, \"${{PORT}}\", --bind, \"${{HOST}}\"]
    instances: {count}
    ports: {{ web: {{ protocol: tcp }} }}
    health:
      ready: {{ tcp: web, every: 500ms }}
    register: {{ web: {{ lease: 3s }} }}
    restart: {{ backoff: 100ms }}
    drain: {{ deadline: 20s, kill_after: 3s }}
{more}",
        edge.admin
    )
}

/// A plain program is deployed by a manifest alone: started, registered, reached through the edge. The
/// same manifest again does nothing. The agent's own death harms nobody, and it starts nothing twice.
#[test]
fn a_plain_program_lives_by_its_manifest_and_survives_the_agent() {
    if !has("python3") {
        return;
    }
    let tcp = free_port();
    let edge = Edge::start(&edge(free_port(), free_port(), tcp));
    let mut agent = Agent::start(&["--ports", &ports()]);
    let manifest = web(&edge, 2, "");
    assert!(agent.apply(&manifest).contains("web: created"));
    for id in ["web-0", "web-1"] {
        edge.until(id, |edge| state_at(edge, "web", id) == "ready");
    }
    let through = || http(([127, 0, 0, 1], tcp).into(), "GET", "/", "").map(|(code, _)| code).ok();
    edge.until("an answer through the edge", |_| through() == Some(200));
    let before = agent.pids("web");
    assert_eq!(before.len(), 2, "{}", agent.status());

    assert!(agent.apply(&manifest).contains("web: unchanged"));
    assert_eq!(agent.pids("web"), before, "an apply that changes nothing starts nothing");

    agent.process.kill();
    assert_eq!(through(), Some(200), "the workloads run on");
    agent.again();
    agent.until("the processes of before", |agent| agent.pids("web") == before);
    assert_eq!(agent.ready("web"), 2);
    let state = agent.state().display().to_string();
    assert_eq!(
        processes(&format!("agent keep --generation 1 --dir {state}")).len(),
        2,
        "one keeper each"
    );

    // An instance dies: it is started again, on another port, as another generation.
    let old = agent.instance("web-0");
    Command::new("kill").args(["-9", &old["pid"].to_string()]).status().expect("kill runs");
    agent.until("a restart", |agent| {
        let now = agent.instance("web-0");
        now["generation"] == 2 && now["ready"] == true
    });
    assert_ne!(agent.instance("web-0")["ports"], old["ports"], "its port rests");
    edge.until("generation 2", |edge| edge.instance("web", "web-0")["generation"] == 2);

    agent.run(&["remove", "web"]);
    agent.until("the end", |agent| agent.app("web").is_null());
    edge.until("nobody", |edge| edge.instance("web", "web-1").is_null());
    assert_eq!(processes(&format!("--dir {state}")).len(), 0);
    assert!(agent.process.wait(Duration::ZERO).is_none(), "the agent runs on");
}

/// An edge that a manifest names no more is told so: its leases do not run out, they end.
#[test]
fn an_edge_that_is_left_out_is_told() {
    if !has("python3") {
        return;
    }
    let (one, two) = (
        Edge::start(&edge(free_port(), free_port(), free_port())),
        Edge::start(&edge(free_port(), free_port(), free_port())),
    );
    let agent = Agent::start(&["--ports", &ports()]);
    let alone = web(&one, 1, "").replace("lease: 3s", "lease: 60s");
    let first = format!("http://{}", one.admin);
    let both = alone.replace(&first, &format!("{first}, http://{}", two.admin));
    agent.apply(&both);
    for edge in [&one, &two] {
        edge.until("registered", |edge| state_at(edge, "web", "web-0") == "ready");
    }
    let before = agent.pids("web");
    agent.apply(&alone);
    two.until("gone", |edge| state_at(edge, "web", "web-0").is_empty());
    assert_eq!(state_at(&one, "web", "web-0"), "ready");
    assert_eq!(agent.pids("web"), before, "the process is the same");
}
