//! Every way to change a configuration's files, through the real binary.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::{Edge, Process, alone, free_port};

fn yaml(port: u16, instances: &[u16], more: &str) -> String {
    let list: String = instances
        .iter()
        .map(|port| format!("      - {{ id: i{port}, address: \"udp://127.0.0.1:{port}\" }}\n"))
        .collect();
    format!(
        "version: 1\nnode: {{ workers: 2 }}\nadmin: {{ listen: ADMIN }}\n{more}\
         classes:\n  setup: {{ deadline: 10s }}\n  in-session: {{ deadline: 10s }}\n\
         listeners:\n  - {{ name: sip, protocol: sip, bind: [\"udp://127.0.0.1:{port}\"], pool: ims }}\n\
         pools:\n  ims:\n    debounce: 0\n    slow_start: 0s\n    backends:\n{list}"
    )
}

fn count(edge: &Edge, pool: &str) -> usize {
    let Ok((200, body)) = edge.get(&format!("/api/v1/pools/{pool}")) else { return 0 };
    let pool: Value = serde_json::from_str(&body).expect("JSON");
    pool["backends"].as_array().map_or(0, Vec::len)
}

/// A file that is written in two pieces is broken in between: the old configuration stays, and the
/// whole one is taken when it is whole.
#[test]
fn a_file_written_in_two_pieces() {
    let (port, a, b) = (free_port(), free_port(), free_port());
    let edge = Edge::start(&yaml(port, &[a], ""));
    let text = yaml(port, &[a, b], "").replace("ADMIN", &edge.admin.to_string());
    let middle = text.find("pools:").expect("pools") - 20;
    fs::write(edge.config_file(), &text[..middle]).expect("written");
    edge.until("the half is refused", |edge| {
        edge.metric("strowger_config_last_reload_successful", &[]) == 0.0
    });
    assert_eq!(count(&edge, "ims"), 1);
    fs::write(edge.config_file(), &text).expect("written");
    edge.until("the whole", |edge| count(edge, "ims") == 2);
    assert_eq!(edge.metric("strowger_config_last_reload_successful", &[]), 1.0);
}

/// Kubernetes mounts a config map as links through `..data`, and swaps that link.
#[test]
fn a_swapped_data_link() {
    let folder = tempfile::TempDir::new().expect("a folder");
    let (port, a, b, admin) = (free_port(), free_port(), free_port(), free_port());
    let version = |name: &str, instances: &[u16]| {
        let path = folder.path().join(name);
        fs::create_dir(&path).expect("made");
        let text = yaml(port, instances, "").replace("ADMIN", &format!("127.0.0.1:{admin}"));
        fs::write(path.join("edge.yaml"), text).expect("written");
    };
    version("..2026_1", &[a]);
    symlink("..2026_1", folder.path().join("..data")).expect("linked");
    symlink("..data/edge.yaml", folder.path().join("edge.yaml")).expect("linked");
    let log = tempfile::TempDir::new().expect("a folder");
    let mut command = Command::new(env!("CARGO_BIN_EXE_strowger"));
    command.args(["run", "--drain", "1s", "--config"]).arg(folder.path());
    let edge = Edge {
        process: Process::spawn(&mut command, &log.path().join("edge.log")),
        folder: log,
        admin: ([127, 0, 0, 1], admin).into(),
    };
    edge.until("ready", |edge| edge.get("/readyz").is_ok_and(|(code, _)| code == 200));
    assert_eq!(count(&edge, "ims"), 1);
    version("..2026_2", &[a, b]);
    symlink("..2026_2", folder.path().join("..data_tmp")).expect("linked");
    fs::rename(folder.path().join("..data_tmp"), folder.path().join("..data")).expect("swapped");
    fs::remove_dir_all(folder.path().join("..2026_1")).expect("removed");
    edge.until("the new one", |edge| count(edge, "ims") == 2);
}

/// A folder that a reload says to watch is watched from then on, also when it is made only later; and
/// what `check` judges is what `run` would take.
#[test]
fn a_folder_that_is_watched_later() {
    let folder = tempfile::TempDir::new().expect("a folder");
    let pools = folder.path().join("pools.d");
    let (port, a, b) = (free_port(), free_port(), free_port());
    let edge = Edge::start(&yaml(port, &[a], ""));
    edge.write_config(&yaml(port, &[a], &format!("watch: [ \"{}\" ]\n", pools.display())));
    edge.until("the reload", |edge| edge.log().contains("file changed; epoch"));
    fs::create_dir(&pools).expect("made");
    // Somebody tells it to look: from here on it watches.
    edge.process.hang_up();
    edge.until("the signal", |edge| edge.log().contains("SIGHUP; epoch"));
    let text = format!(
        "pools: {{ more: {{ backends: [ {{ id: m, address: \"udp://127.0.0.1:{b}\" }} ] }} }}\n"
    );
    fs::write(pools.join("more.yaml"), &text).expect("written");
    edge.until("the new pool", |edge| count(edge, "more") == 1);
    let check = || {
        Command::new(env!("CARGO_BIN_EXE_strowger"))
            .arg("check")
            .arg(edge.config_file())
            .output()
            .expect("it runs")
    };
    assert!(check().status.success());
    fs::write(pools.join("more.yaml"), text.replace("backends", "bakends")).expect("written");
    let output = check();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success() && told.contains("did you mean `backends`?"), "{told}");
}

/// `watch:` names folders that other tools drop pools into.
#[test]
fn files_come_to_a_watched_folder_and_go() {
    let pools = tempfile::TempDir::new().expect("a folder");
    let (port, a, b) = (free_port(), free_port(), free_port());
    let watch = format!("watch: [ \"{}\" ]\n", pools.path().display());
    let edge = Edge::start(&yaml(port, &[a], &watch));
    let file = pools.path().join("more.yaml");
    let text = format!(
        "pools:\n  more:\n    debounce: 0\n    backends: [ {{ id: m, address: \"udp://127.0.0.1:{b}\" }} ]\n"
    );
    // Written elsewhere and moved in, as careful tools do.
    let new = pools.path().join(".more.new");
    fs::write(&new, &text).expect("written");
    fs::rename(new, &file).expect("moved");
    edge.until("the pool of the new file", |edge| count(edge, "more") == 1);
    fs::write(&file, "pools: { more: { backends: 7 } }\n").expect("written");
    edge.until("the complaint", |edge| {
        edge.metric("strowger_config_last_reload_successful", &[]) == 0.0
    });
    assert_eq!(count(&edge, "more"), 1, "a broken file must change nothing");
    fs::remove_file(&file).expect("removed");
    edge.until("the pool is gone", |edge| count(edge, "more") == 0);
    assert_eq!(count(&edge, "ims"), 1);
}

fn resident_kib(edge: &Edge) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", edge.process.id())).expect("status");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
    line.split_whitespace().nth(1).and_then(|text| text.parse().ok()).expect("a number")
}

/// Ten writes and ten reloads a second, under calls: none fails, memory stays, the last one counts.
#[test]
fn ten_changes_a_second_under_calls() {
    let _alone = alone();
    let (port, a, b) = (free_port(), free_port(), free_port());
    let both = [a, b];
    let edge = Edge::start(&yaml(port, &both, ""));
    let mut load = Command::new(env!("CARGO_BIN_EXE_strowger"));
    let address = |port: u16| format!("udp://127.0.0.1:{port}");
    load.args(["load", "sip", "--json", "--rate", "100", "--for", "8s", "--hold", "500ms"]);
    load.args(["--target", &address(port), "--answer", &address(a), "--answer", &address(b)]);
    let output = edge.folder.path().join("load.json");
    let mut load = Process::spawn(&mut load, &output);
    let mut weight = 1;
    let mut change = |edge: &Edge| {
        weight = weight % 100 + 1;
        let text = yaml(port, &both, "").replace(" }\n", &format!(", weight: {weight} }}\n"));
        // Only the instances' lines end so.
        let text = text.replace(&format!("pool: ims, weight: {weight}"), "pool: ims");
        let text = text.replace(&format!("10s, weight: {weight}"), "10s");
        let text = text.replace(&format!("workers: 2, weight: {weight}"), "workers: 2");
        let text = text.replace(&format!("ADMIN, weight: {weight}"), "ADMIN");
        edge.write_config(&text);
        edge.process.hang_up();
        weight
    };
    for _ in 0..10 {
        change(&edge);
        std::thread::sleep(Duration::from_millis(100));
    }
    let before = resident_kib(&edge);
    let end = Instant::now() + Duration::from_secs(6);
    let mut last = 0;
    while Instant::now() < end {
        last = change(&edge);
        std::thread::sleep(Duration::from_millis(100));
    }
    edge.until("the last one", |edge| edge.instance("ims", &format!("i{a}"))["weight"] == last);
    let after = resident_kib(&edge);
    // What sixty old configurations would take stays far below this; the calls' own state is in it.
    assert!(after < before + 30_000, "{before} KiB grew to {after} KiB");
    assert_eq!(edge.metric("strowger_config_last_reload_successful", &[]), 1.0, "{}", edge.log());
    let code = load.wait(Duration::from_secs(60));
    let report = fs::read_to_string(&output).unwrap_or_default();
    assert_eq!(code, Some(0), "{report}");
}
