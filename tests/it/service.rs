//! What a service manager hears.

use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::Duration;

use crate::harness::{Process, free_port};

#[test]
fn ready_reloading_alive_and_stopping_are_told() {
    let folder = tempfile::TempDir::new().expect("a folder");
    let socket = folder.path().join("notify");
    let manager = UnixDatagram::bind(&socket).expect("bound");
    manager.set_read_timeout(Some(Duration::from_secs(20))).expect("an option");
    let hear = || {
        let mut text = [0; 1_024];
        let length = manager.recv(&mut text).expect("the edge says something");
        String::from_utf8_lossy(&text[..length]).into_owned()
    };
    // Others may come in between: the watchdog's.
    let hear_of = |what: &str| loop {
        let text = hear();
        if text.lines().any(|line| line == what) {
            return text;
        }
    };
    let file = folder.path().join("edge.yaml");
    let (admin, port) = (free_port(), free_port());
    let yaml = format!(
        "version: 1\nadmin: {{ listen: \"127.0.0.1:{admin}\" }}\nlisteners:\n  - {{ name: db, protocol: tcp, bind: [\"tcp://127.0.0.1:{port}\"], pool: db }}\npools:\n  db: {{ backends: [ {{ id: a, address: \"tcp://127.0.0.1:{}\" }} ] }}\n",
        free_port()
    );
    std::fs::write(&file, &yaml).expect("written");
    let mut command = Command::new(env!("CARGO_BIN_EXE_strowger"));
    command.args(["run", "--drain", "1s", "--config"]).arg(&file);
    command.env("NOTIFY_SOCKET", &socket).env("WATCHDOG_USEC", "200000").env_remove("WATCHDOG_PID");
    let mut edge = Process::spawn(&mut command, &folder.path().join("edge.log"));
    hear_of("READY=1");
    hear_of("WATCHDOG=1");
    hear_of("WATCHDOG=1");
    edge.hang_up();
    let reloading = hear_of("RELOADING=1");
    assert!(reloading.contains("MONOTONIC_USEC="), "{reloading}");
    assert!(hear_of("READY=1").contains("STATUS=serving"));
    std::fs::write(&file, yaml.replace("pools:", "polls:")).expect("written");
    hear_of("RELOADING=1");
    assert!(hear_of("READY=1").contains("old configuration"));
    assert_eq!(edge.terminate(), Some(0));
    hear_of("STOPPING=1");
}
