//! The agent's promises to programs and operators: the twelve factors, health, limits, releases, logs.

use std::fs;
use std::net::{TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::agent_support::{Agent, edge, state_at};
use crate::harness::{Edge, free_port, free_range, has};

fn ports() -> String {
    free_range(60)
}

/// A script that a manifest's program can be.
fn script(folder: &Path, name: &str, text: &str) {
    fs::create_dir_all(folder).expect("a folder");
    let path = folder.join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}")).expect("written");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("set");
}

fn lines(agent: &Agent, of: &str) -> Vec<Value> {
    let text = agent.run(&["logs", of, "--tail", "1000"]);
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn has_line(agent: &Agent, of: &str, wanted: &str) -> bool {
    lines(agent, of)
        .iter()
        .any(|line| line["message"].as_str().is_some_and(|it| it.contains(wanted)))
}

/// Environment, ports, secrets, bindings, output, one-off programs; a secret that changes.
#[test]
fn the_factors_of_a_process() {
    let agent = Agent::start(&["--ports", &ports()]);
    let folder = agent.folder.path().to_owned();
    let build = folder.join("build");
    script(
        &build,
        "app",
        "trap 'echo reloaded $(cat $CREDENTIALS_DIRECTORY/psk)' HUP\necho id=$INSTANCE_ID index=$INSTANCE_INDEX generation=$INSTANCE_GENERATION\necho ports=$PORT_A/$PORT_B level=$LEVEL db=$DB_HOST:$DB_PORT\necho secret=$(cat $CREDENTIALS_DIRECTORY/psk) password=$(cat $SERVICE_BINDING_ROOT/db/password)\necho none=$HIDDEN\necho \"{\\\"level\\\":\\\"warn\\\"}\" >&2\necho state >> $STATE_DIR/kept\nwhile :; do sleep 0.1; done\n",
    );
    fs::write(folder.join("psk"), "one").expect("written");
    fs::write(folder.join("pass"), "word").expect("written");
    let manifest = "version: 1
services:
  db: { type: postgresql, values: { host: 10.0.0.9, port: 5432 }, files: { password: pass } }
apps:
  app:
    exec: [./app]
    release: { dir: build, git: abc123 }
    instances: 2
    ports: { a: { protocol: sip, transport: udp }, b: { protocol: http } }
    env: { LEVEL: info }
    secrets: { psk: psk }
    bind: [db]
    drain: { kill_after: 1s }
";
    agent.apply(manifest);
    agent.until("two", |agent| agent.ready("app") == 2);
    agent.until("output", |agent| has_line(agent, "app-1", "none="));
    let said = |wanted: &str| {
        assert!(has_line(&agent, "app-1", wanted), "{wanted}: {:?}", lines(&agent, "app-1"))
    };
    said("id=app-1 index=1 generation=1");
    said("level=info db=10.0.0.9:5432");
    said("secret=one password=word");
    let mut all: Vec<u64> = agent
        .instances("app")
        .iter()
        .flat_map(|it| ["a", "b"].map(|name| it["ports"][name].as_u64().expect("a port")))
        .collect();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 4, "each has ports of its own");
    let records = lines(&agent, "app");
    assert!(records.iter().any(|it| it["fields"]["level"] == "warn" && it["stream"] == "stderr"));
    assert!(
        records
            .iter()
            .all(|it| it["app"] == "app" && it["generation"] == 1 && it["time"].is_string()),
        "{records:?}\n{}",
        agent.log()
    );
    // XII: a one-off has the same environment and gives its exit code back.
    let (code, out, _) =
        agent.run_code(&["run", "app", "--", "sh", "-c", "echo $LEVEL $DB_HOST; exit 7"]);
    assert_eq!((code, out.as_str()), (Some(7), "info 10.0.0.9\n"));
    assert_eq!(agent.instances("app").len(), 2, "it is no instance");
    fs::write(folder.join("psk"), "two").expect("written");
    agent.until("a reload", |agent| has_line(agent, "app-0", "reloaded two"));
    // IV: another service behind the name is another release.
    let told = agent.apply(&manifest.replace("10.0.0.9", "10.0.0.10"));
    assert!(told.contains("new-release"), "{told}");
    agent.until("the new service", |agent| {
        agent.app("app")["rollout"].is_null() && agent.app("app")["release"] == 2
    });
    agent.until("two", |agent| agent.instances("app").len() == 2 && agent.ready("app") == 2);
    assert!(agent.status()["apps"][0]["releases"][0]["git"] == "abc123");
    // Who is gone leaves no secret behind.
    let copies = |agent: &Agent| {
        let output = Command::new("find")
            .arg(agent.state())
            .args(["(", "-name", "psk", "-o", "-name", "password", ")"])
            .output()
            .expect("find runs");
        String::from_utf8_lossy(&output.stdout).lines().count()
    };
    assert!(copies(&agent) >= 4);
    agent.run(&["remove", "app"]);
    agent.until("no secret to be left", |agent| copies(agent) == 0);
}

/// Bad manifests are refused as a whole, with places; what runs is left alone.
#[test]
fn a_bad_manifest_changes_nothing() {
    let agent = Agent::start(&["--ports", &ports()]);
    let good = "version: 1\napps:\n  a: { exec: [sleep, \"1000\"] }\n";
    agent.apply(good);
    agent.until("one", |agent| agent.ready("a") == 1);
    let before = agent.pids("a");
    let refused = |yaml: &str, wanted: &[&str]| {
        let error = agent.try_apply(yaml).expect_err("refused");
        for word in wanted {
            assert!(error.contains(word), "{word}: {error}");
        }
    };
    refused(
        "version: 1\napps:\n  a:\n    exec: [sleep]\n    instanses: 2\n    ports: { x: { protocol: sip, transport: smtp } }\n    health: { ready: { tcp: y } }\n",
        &[
            ":5:5: apps.a.instanses: unknown key `instanses`: did you mean `instances`?",
            ":6:12: apps.a.ports",
        ],
    );
    refused(
        "version: 1\napps:\n  a: { exec: [no-such-program] }\n",
        &["no-such-program", "is not there"],
    );
    refused("version: 1\napps:\n  a: { exec: [sleep], bind: [db] }\n", &["unknown service `db`"]);
    refused("version: 2\n", &["version 1"]);
    let unset = agent.try_apply("version: 1\napps:\n  a: { exec: [sleep, \"1000\"], env: { X: \"${STROWGER_NOT_SET}\" } }\n");
    assert!(unset.is_err_and(
        |error| error.contains(":3:") && error.contains("`STROWGER_NOT_SET` is not set")
    ));
    assert_eq!(agent.pids("a"), before);
}

/// Readiness takes an instance out of the pool and never restarts it; liveness restarts it and takes
/// nothing out of a pool before that.
#[test]
fn ready_and_live_are_two_things() {
    if !has("python3") {
        return;
    }
    let edge = Edge::start(&edge(free_port(), free_port(), free_port()));
    let agent = Agent::start(&["--ports", &ports()]);
    let folder = agent.folder.path().display().to_string();
    agent.apply(&format!(
        "version: 1
edges: [http://{}]
apps:
  web:
    exec: [python3, -m, http.server, \"${{PORT}}\", --bind, \"${{HOST}}\"]
    ports: {{ web: {{ protocol: tcp }} }}
    health:
      ready: {{ exec: [test, \"!\", -e, {folder}/not-ready], every: 200ms, fall: 1 }}
      live: {{ exec: [test, \"!\", -e, {folder}/dead], every: 200ms, fall: 3 }}
    register: {{ web: {{ lease: 3s }} }}
    restart: {{ backoff: 100ms }}
    drain: {{ kill_after: 2s }}
",
        edge.admin
    ));
    edge.until("web", |edge| state_at(edge, "web", "web-0") == "ready");
    let before = agent.pids("web");
    fs::write(format!("{folder}/not-ready"), "").expect("written");
    edge.until("no new sessions", |edge| state_at(edge, "web", "web-0") == "suspended");
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(agent.pids("web"), before, "it was not started again");
    fs::remove_file(format!("{folder}/not-ready")).expect("removed");
    edge.until("new sessions", |edge| state_at(edge, "web", "web-0") == "ready");
    fs::write(format!("{folder}/dead"), "").expect("written");
    agent.until("a restart", |agent| {
        // It is dead as long as the file is there.
        let restarted = agent.instance("web-0")["generation"].as_u64() > Some(1);
        if restarted {
            let _gone = fs::remove_file(format!("{folder}/dead"));
        }
        restarted
    });
    edge.until("it to be back", |edge| state_at(edge, "web", "web-0") == "ready");
    assert!(agent.log().contains("instance_not_alive"));
}

/// A program that ends at once is started less and less often, then not at all; `apply` tries it again.
#[test]
fn a_crash_loop_is_told_and_ends() {
    let agent = Agent::start(&["--ports", &ports()]);
    let yaml = "version: 1\napps:\n  bad: { exec: [sh, -c, exit 3], restart: { backoff: 50ms, crash_loop: 4, crash_retry: 0s } }\n";
    agent.apply(yaml);
    agent.until("the loop to be seen", |agent| agent.instance("bad-0")["phase"] == "crash-loop");
    let instance = agent.instance("bad-0");
    assert_eq!((&instance["generation"], &instance["detail"]), (&4.into(), &"ended with 3".into()));
    agent.apply(yaml);
    agent.until("another try", |agent| agent.instance("bad-0")["generation"].as_u64() > Some(4));
}

/// Releases: what was released runs, whatever becomes of its source; back by number; and a release that
/// somebody changed is not started.
#[test]
fn releases_are_immutable_and_can_be_gone_back_to() {
    let agent = Agent::start(&["--ports", &ports()]);
    let build = agent.folder.path().join("build");
    let manifest = "version: 1\napps:\n  app: { exec: [./app], release: { dir: build }, drain: { kill_after: 1s }, restart: { backoff: 100ms, crash_loop: 3, crash_retry: 0s }, rollout: { min_healthy_time: 200ms } }\n";
    script(&build, "app", "echo one\nexec sleep 1000\n");
    agent.apply(manifest);
    agent.until("one", |agent| has_line(agent, "app", "one"));
    script(&build, "app", "echo two\nexec sleep 1000\n");
    agent.apply(manifest);
    agent.until("two", |agent| {
        has_line(agent, "app", "two") && agent.app("app")["rollout"].is_null()
    });
    assert_eq!(agent.app("app")["history"][0]["outcome"], "done");
    script(&build, "app", "exit 1\n");
    agent.apply(manifest);
    agent.until("a rollback by itself", |agent| {
        agent.app("app")["history"][1]["outcome"] == "rolled-back"
            && agent.app("app")["release"] == 2
    });
    agent.run(&["rollback", "app", "--release", "1"]);
    agent.until("release 1", |agent| {
        let all = agent.instances("app");
        all.len() == 1 && all[0]["release"] == 1 && all[0]["ready"] == true
    });
    let dir = agent.app("app")["releases"][0]["dir"].as_str().expect("a folder").to_owned();
    let file = Path::new(&dir).join("app");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("set");
    fs::write(&file, "#!/bin/sh\necho changed\nexec sleep 1000\n").expect("written");
    let pid = agent.pids("app")[0].to_string();
    Command::new("kill").args(["-9", &pid]).status().expect("kill runs");
    agent.until("the refusal", |agent| {
        agent.app("app")["instances"][0]["detail"]
            .as_str()
            .is_some_and(|it| it.contains("was changed"))
    });
}

/// A program that writes faster than anybody reads is not held up; what is lost is counted.
#[test]
fn output_never_blocks_the_program() {
    if !has("python3") {
        return;
    }
    let agent = Agent::start(&["--ports", &ports()]);
    let folder = agent.folder.path();
    let sink = folder.join("sink");
    fs::create_dir_all(sink.join("loud")).expect("made");
    // A sink that nobody reads: a pipe that blocks whoever opens it.
    let pipe = sink.join("loud/loud-0.log");
    assert!(Command::new("mkfifo").arg(&pipe).status().is_ok_and(|it| it.success()));
    let syslog = UdpSocket::bind(("127.0.0.1", free_port())).expect("a socket");
    syslog.set_read_timeout(Some(Duration::from_secs(30))).expect("set");
    let program = "import sys\nfor i in range(200000): sys.stdout.write('x' * 100 + '\\n')\nsys.stdout.flush()\nopen('done', 'w').close()\nimport time\ntime.sleep(1000)\n";
    script(
        &folder.join("build"),
        "loud",
        &format!(
            "cd $STATE_DIR; exec python3 -c \"{}\"\n",
            program
                .replace('\n', ";")
                .replace(";sys", "\nsys")
                .replace("for", "\nfor")
                .replace(";open", "\nopen")
                .replace("import sys;\n", "import sys\n")
        ),
    );
    fs::write(folder.join("build/loud.py"), program).expect("written");
    script(&folder.join("build"), "loud", "cd $STATE_DIR; exec python3 $OLDPWD/loud.py\n");
    agent.apply(&format!(
        "version: 1\napps:\n  loud: {{ exec: [./loud], release: {{ dir: build }}, logs: {{ ring: 64Ki, files: {}, syslog: {} }} }}\n",
        sink.display(),
        syslog.local_addr().expect("bound")
    ));
    let done = agent.state().join("instances/loud-0/data/done");
    agent.until("20 MB to be written", |_| done.exists());
    agent.until("output", |agent| has_line(agent, "loud", "xxx"));
    let ring = agent.instance("loud-0")["log_bytes"].as_u64().expect("a size");
    assert!(ring <= 80 << 10, "{ring}");
    let mut buffer = [0; 2_048];
    let length = syslog.recv(&mut buffer).expect("syslog");
    let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
    assert!(text.starts_with("<30>1 20") && text.contains(" loud loud-0 - - {"), "{text}");
}

/// The agent opens the socket: connections wait, and are not refused, while the program is away.
#[test]
fn a_listening_socket_outlives_the_program() {
    if !has("python3") {
        return;
    }
    let agent = Agent::start(&["--ports", &ports()]);
    let program = "import os, socket\nassert os.environ['LISTEN_PID'] == str(os.getpid()) and os.environ['LISTEN_FDS'] == '1'\ns = socket.socket(fileno=3)\nprint('serving', flush=True)\nwhile True:\n    c, _ = s.accept()\n    c.sendall(os.environ['INSTANCE_GENERATION'].encode())\n    c.close()\n";
    let build = agent.folder.path().join("build");
    fs::create_dir_all(&build).expect("made");
    fs::write(build.join("app.py"), program).expect("written");
    agent.apply("version: 1\napps:\n  app: { exec: [python3, app.py], release: { dir: build }, ports: { tcp: { protocol: tcp, listen: true } }, restart: { backoff: 1s, jitter_percent: 0 } }\n");
    agent.until("output", |agent| has_line(agent, "app", "serving"));
    let port = agent.instance("app-0")["ports"]["tcp"].as_u64().expect("a port") as u16;
    let ask = || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("never refused");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("set");
        let mut text = String::new();
        std::io::Read::read_to_string(&mut stream, &mut text).expect("an answer");
        text
    };
    assert_eq!(ask(), "1", "{}", agent.log());
    let pid = agent.pids("app")[0].to_string();
    Command::new("kill").args(["-9", &pid]).status().expect("kill runs");
    agent.until("its end", |agent| {
        agent.pids("app").first().is_none_or(|other| other.to_string() != pid)
    });
    assert_eq!(ask(), "2", "who came meanwhile is served by the next one");
}

/// Limits and places: CPUs are pinned; cgroups hold what they can, changed while it runs; what cannot be
/// had is told.
#[test]
fn limits_hold_and_what_cannot_be_had_is_told() {
    let agent = Agent::start(&["--ports", &ports()]);
    let yaml = "version: 1\napps:\n  a: { exec: [sleep, \"1000\"], resources: { cpus: \"0\", files: 77, cpu: 0.5, memory: 64Mi, pids: 20 } }\n  b: { exec: [sleep, \"1000\"], placement: { colocate_with: [a] } }\n";
    agent.apply(yaml);
    agent.until("both", |agent| agent.ready("a") == 1 && agent.ready("b") == 1);
    let proc = |app: &str, file: &str| {
        fs::read_to_string(format!("/proc/{}/{file}", agent.pids(app)[0])).expect("proc")
    };
    // It is the agent's helper first, and then the program.
    agent.until("the programs", |_| {
        proc("a", "cmdline").starts_with("sleep") && proc("b", "cmdline").starts_with("sleep")
    });
    assert!(proc("a", "status").contains("Cpus_allowed_list:\t0\n"));
    assert!(proc("b", "status").contains("Cpus_allowed_list:\t0\n"), "beside the other");
    assert!(
        proc("a", "limits")
            .lines()
            .any(|it| it.starts_with("Max open files") && it.contains(" 77 "))
    );
    let missing = agent.instance("a-0")["limits_missing"].clone();
    let is_missing = |what: &str| {
        missing
            .as_array()
            .into_iter()
            .flatten()
            .any(|it| it.as_str().is_some_and(|it| it.starts_with(what)))
    };
    let groups = proc("a", "cgroup");
    for what in ["cpu", "memory", "pids"] {
        let inside = groups.lines().any(|line| {
            let controllers = line.split(':').nth(1).unwrap_or_default();
            (controllers.split(',').any(|it| it == what) || controllers.is_empty())
                && line.contains("strowger-")
        });
        assert!(inside || is_missing(what), "{what}: neither held nor told: {groups} {missing}");
    }
    let before = agent.pids("a");
    assert!(agent.apply(&yaml.replace("cpu: 0.5", "cpu: 0.25")).contains("a: settings"));
    assert_eq!(agent.pids("a"), before, "a limit changes what runs");
    if !is_missing("cpu") {
        let line = groups.lines().find(|line| {
            line.split(':').nth(1).is_some_and(|it| it.split(',').any(|it| it == "cpu"))
        });
        if let Some(path) = line.and_then(|line| line.split(':').nth(2)) {
            let quota = fs::read_to_string(format!("/sys/fs/cgroup/cpu{path}/cpu.cfs_quota_us"))
                .expect("a quota");
            assert_eq!(quota.trim(), "25000");
        }
    }
}
