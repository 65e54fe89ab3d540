//! What a newcomer runs first.

use std::process::Command;
use std::time::Duration;

use crate::harness::{Process, alone};

/// The demo routes all three protocols, survives its own deaths, and ends in order.
#[test]
fn the_demo_runs_and_nothing_fails() {
    let _alone = alone();
    let folder = tempfile::TempDir::new().expect("a folder");
    let log = folder.path().join("demo.log");
    let mut command = Command::new(env!("CARGO_BIN_EXE_strowger"));
    command.args(["demo", "--for", "22s"]).env("TMPDIR", folder.path());
    let mut demo = Process::spawn(&mut command, &log);
    let code = demo.wait(Duration::from_secs(120));
    let text = std::fs::read_to_string(&log).unwrap_or_default();
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("http://127.0.0.1:"), "{text}");
    assert!(text.contains("instance_left ims ims-1"), "{text}");
    assert!(text.contains("instance_registered ims ims-1 generation 2"), "{text}");
    let last = text.lines().last().unwrap_or_default();
    let tallies: Vec<(u64, u64)> = last
        .split('|')
        .map(|part| {
            let numbers: Vec<u64> = part.split(' ').filter_map(|word| word.parse().ok()).collect();
            (numbers[0], numbers[1])
        })
        .collect();
    let [sip, diameter, tcp] = tallies[..] else { panic!("{last}") };
    assert!(sip.0 > 200 && sip.1 == 0, "{text}");
    assert!(diameter.0 > 400 && diameter.1 == 0, "{text}");
    assert!(tcp.0 > 80 && tcp.1 == 0, "{text}");
    assert!(last.contains(" 0 moved"), "{text}");
    let left = std::fs::read_dir(folder.path()).into_iter().flatten().count();
    assert_eq!(left, 1, "the demo leaves its folder behind");
}
