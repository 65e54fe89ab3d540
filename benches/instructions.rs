//! How many instructions a message costs: callgrind's count, which no neighbour on the machine
//! changes. `cargo bench --bench instructions` counts, compares with `benches/instructions.txt`, and
//! fails where one is more than [`TOLERANCE`] above it (`-- --tolerance PERCENT`: that much); `-- --save`
//! writes that file anew.
//!
//! Each piece of work is run twice under valgrind, once longer than the other. The difference, over
//! the difference in repetitions, is the cost of one, without that of setting up.
#![allow(missing_docs)]

mod rig;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rig::{DiameterRig, SipRig, core, invite, key};
use strowger_contract::{Attempt, ClassId, Query, Router, WorkerId};
use strowger_sip::Mode;
use strowger_sip::scan::Scan;

/// Above so much more than the stored count, it is a regression. Hash seeds and where a table's
/// lines fall move a count by less than half of this.
const TOLERANCE: f64 = 0.03;

/// The repetitions of the shorter run (which also fills tables and grows buffers), and of the longer
/// one beyond it.
const WARM: u64 = 2_000;
const COUNTED: u64 = 4_000;

/// The stored counts, beside this file so that a regression shows in the diff.
const STORED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/instructions.txt");

/// A piece of work: its name in the file, what one repetition is, and the work.
type Piece = (&'static str, &'static str, fn(u64));

const PIECES: &[Piece] = &[
    ("sip-scan", "a 1.3 kB INVITE scanned", sip_scan),
    ("sip-invite-stateless", "an INVITE scanned, routed, rewritten", sip_invite_stateless),
    ("sip-call-stateless", "a call's six messages (and the bench's making of them)", sip_stateless),
    ("sip-call-stateful", "the same with transactions and timers", sip_stateful),
    ("sip-invite-refused", "an INVITE refused for want of slots", sip_refused),
    ("diameter-refused", "a 500 B request refused for want of slots", diameter_refused),
    ("diameter-transaction", "a 500 B request and its answer", diameter),
    ("route-10", "a decision for a new session among 10 backends", |count| route(10, count)),
    ("route-1000", "the same among 1,000", |count| route(1_000, count)),
    ("route-10000", "the same among 10,000", |count| route(10_000, count)),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|one| one != "--bench").collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--run", name, count] => run(name, count),
        ["--save"] => compare(true, TOLERANCE),
        [] => compare(false, TOLERANCE),
        ["--tolerance", percent] if percent.parse::<u8>().is_ok() => {
            compare(false, percent.parse().unwrap_or(0.0) / 100.0)
        }
        _ => {
            eprintln!("expected nothing, --save, or --tolerance PERCENT");
            ExitCode::FAILURE
        }
    }
}

/// Under valgrind: the work, so many times.
fn run(name: &str, count: &str) -> ExitCode {
    let piece = PIECES.iter().find(|(known, ..)| *known == name).expect("a piece of work");
    (piece.2)(count.parse().expect("a number"));
    ExitCode::SUCCESS
}

fn compare(save: bool, tolerance: f64) -> ExitCode {
    if !Command::new("valgrind")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|it| it.success())
    {
        eprintln!("valgrind is not installed (apt-get install valgrind): nothing is counted");
        return ExitCode::FAILURE;
    }
    let compiler = compiler();
    let text = std::fs::read_to_string(STORED).unwrap_or_default();
    let stored = read(&text);
    let same_compiler = text.lines().any(|line| line == format!("# {compiler}"));
    let mut file = format!(
        "# Instructions, by callgrind: cargo bench --bench instructions -- --save\n# {compiler}\n"
    );
    let mut regressed = Vec::new();
    println!("{:<22} {:>9} {:>9} {:>7}", "", "now", "stored", "");
    for (name, what, _) in PIECES {
        let now = count(name);
        let _infallible = writeln!(file, "{name} {now}");
        let (before, change) = match stored.get(*name) {
            Some(&before) => (before.to_string(), now as f64 / before as f64 - 1.0),
            None => ("-".to_owned(), 0.0),
        };
        println!("{name:<22} {now:>9} {before:>9} {:>+6.1} %  {what}", change * 100.0);
        if change > tolerance {
            regressed.push(*name);
        }
    }
    if save {
        std::fs::write(STORED, file).expect("benches/instructions.txt is written");
        return ExitCode::SUCCESS;
    }
    if regressed.is_empty() {
        return ExitCode::SUCCESS;
    }
    eprintln!("more instructions than benches/instructions.txt says: {}", regressed.join(", "));
    if !same_compiler {
        eprintln!("that file is of another compiler (here: {compiler}): told, not held against it");
        return ExitCode::SUCCESS;
    }
    eprintln!(
        "if that is meant: cargo bench --bench instructions -- --save, and say why in the commit"
    );
    ExitCode::FAILURE
}

fn read(text: &str) -> BTreeMap<String, u64> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, count)| Some((name.to_owned(), count.parse().ok()?)))
        .collect()
}

fn compiler() -> String {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = Command::new(rustc).arg("--version").output().map(|output| output.stdout);
    String::from_utf8_lossy(&version.unwrap_or_default()).trim().to_owned()
}

/// Instructions of one repetition.
fn count(name: &str) -> u64 {
    let (short, long) = (collected(name, WARM), collected(name, WARM + COUNTED));
    long.saturating_sub(short) / COUNTED
}

fn collected(name: &str, count: u64) -> u64 {
    let own = std::env::current_exe().expect("the bench's own path");
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(own)
        .args(["--run", name, &count.to_string()])
        .output()
        .expect("valgrind runs");
    let told = String::from_utf8_lossy(&output.stderr);
    let collected = told.lines().find_map(|line| line.split_once("Collected :"));
    collected
        .and_then(|(_, number)| number.trim().parse().ok())
        .unwrap_or_else(|| panic!("callgrind counted nothing for {name}: {told}"))
}

fn sip_scan(count: u64) {
    let message = invite();
    let mut scan = Scan::default();
    for _ in 0..count {
        std::hint::black_box(scan.scan(std::hint::black_box(&message)).is_ok());
    }
}

fn sip_invite_stateless(count: u64) {
    let mut rig = SipRig::new(Instant::now(), Mode::Stateless, 4);
    for _ in 0..count {
        rig.invite();
    }
}

fn sip_stateless(count: u64) {
    sip_calls(Mode::Stateless, count);
}

fn sip_stateful(count: u64) {
    sip_calls(Mode::Stateful, count);
}

fn sip_calls(mode: Mode, count: u64) {
    let mut rig = SipRig::new(Instant::now(), mode, 4);
    let mut ok = Vec::new();
    for _ in 0..count {
        rig.call(&mut ok);
        rig.pass(Duration::from_millis(5));
    }
}

fn sip_refused(count: u64) {
    let mut rig = SipRig::overloaded(Instant::now());
    for _ in 0..count {
        rig.invite();
    }
    assert!(String::from_utf8_lossy(rig.out.arena()).contains("SIP/2.0 503"));
}

fn diameter_refused(count: u64) {
    let mut rig = DiameterRig::overloaded(Instant::now());
    for _ in 0..count {
        rig.request();
    }
    assert_eq!(rig.told(), Some(3_004));
}

fn diameter(count: u64) {
    let mut rig = DiameterRig::new(Instant::now(), 4);
    for _ in 0..count {
        rig.request();
        rig.answer();
        rig.pass(Duration::from_micros(900));
    }
}

fn route(backends: usize, count: u64) {
    let now = Instant::now();
    let (core, pool) = core(now, backends, "udp://127.0.0.", "    balance: hash\n");
    let mut router = core.router(WorkerId(0));
    for number in 0..count {
        let query = Query {
            pool,
            session: key(&router, number),
            pin: None,
            in_session: false,
            awaits: false,
            class: ClassId::SETUP,
            deadline: now + Duration::from_secs(1),
            capability: 0,
            exclude: &[],
            attempt: Attempt::First,
        };
        let _decision = std::hint::black_box(router.route(now, &query));
    }
}
