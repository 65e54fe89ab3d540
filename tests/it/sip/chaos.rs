//! Calls while instances are killed, hung, restarted, added and drained, and the configuration is
//! reloaded: a dialog stays on its instance, an answered call is not lost, and nothing is left over.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::caller::{Callers, Record};
use crate::harness::{Edge, Process, alone, free_port, until_bound};

/// Instances, the one that comes and goes by configuration included.
const INSTANCES: usize = 5;

/// An instance that is a process of its own.
pub(super) struct Instance {
    port: u16,
    process: Option<Process>,
    /// From when to when nobody was there.
    dead: Vec<(Instant, Instant)>,
    stopped: Vec<(Instant, Instant)>,
}

impl Instance {
    pub(super) fn new(port: u16) -> Self {
        Self { port, process: None, dead: Vec::new(), stopped: Vec::new() }
    }

    pub(super) fn start(&mut self, edge: &Edge, number: usize) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_strowger"));
        let address = format!("udp://127.0.0.1:{}", self.port);
        command.args(["load", "sip", "--for", "2h", "--answer", &address]);
        command.args(["--first", &number.to_string()]);
        let log = edge.folder.path().join(format!("instance-{number}.log"));
        self.process = Some(Process::spawn(&mut command, &log));
        let said = || std::fs::read_to_string(&log).unwrap_or_default();
        until_bound(self.port, || format!("instance {number} does not start: {}", said()));
        if let Some(last) = self.dead.last_mut() {
            last.1 = last.1.min(Instant::now());
        }
    }

    fn kill(&mut self) {
        let now = Instant::now();
        // Until it is started again.
        self.dead.push((now, now + Duration::from_secs(86_400)));
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    pub(super) fn signal(&mut self, name: &str) {
        let now = Instant::now();
        match name {
            "STOP" => self.stopped.push((now, now + Duration::from_secs(86_400))),
            _ => {
                if let Some(last) = self.stopped.last_mut() {
                    last.1 = now;
                }
            }
        }
        if let Some(process) = &self.process {
            process.signal(name);
        }
    }

    /// Whether it died while this call had it.
    fn died_in(&self, record: &Record) -> bool {
        let begun = record.begun.expect("begun");
        let ended = record.ended.unwrap_or_else(Instant::now);
        self.dead.iter().any(|&(from, to)| from <= ended && to >= begun)
    }
}

pub(super) fn config(port: u16, ports: &[u16], weights: u32) -> String {
    let backends: Vec<String> = ports
        .iter()
        .enumerate()
        .map(|(number, port)| {
            let weight = if number == 0 { weights } else { 100 };
            format!("      - {{ id: i{number}, address: udp://127.0.0.1:{port}, weight: {weight}, capacity: 20000 }}\n")
        })
        .collect();
    format!(
        "version: 1\nnode: {{ name: test, workers: 2 }}\nadmin: {{ listen: ADMIN }}\nclasses:\n  setup: {{ deadline: 20s }}\n  in-session: {{ deadline: 20s }}\nlisteners:\n  - name: sip\n    protocol: sip\n    bind: [udp://127.0.0.1:{port}]\n    pool: ims\n    options: {{ failover_timeout: 600ms, cdr: true }}\npools:\n  ims:\n    balance: hash\n    health: {{ probe: sip-options, interval: 1s, timeout: 500ms, rise: 1, fall: 2 }}\n    backends:\n{}",
        backends.concat()
    )
}

/// One disturbance after the other; each is undone before the next but one.
struct Chaos {
    edge: Edge,
    port: u16,
    ports: Vec<u16>,
    instances: Vec<Instance>,
    step: usize,
    done: BTreeMap<&'static str, u32>,
}

impl Chaos {
    fn new() -> Self {
        let port = free_port();
        let ports: Vec<u16> = (0..INSTANCES).map(|_| free_port()).collect();
        let edge = Edge::start(&config(port, &ports[..INSTANCES - 1], 100));
        let instances = ports
            .iter()
            .enumerate()
            .map(|(number, &port)| {
                let mut instance = Instance::new(port);
                instance.start(&edge, number);
                instance
            })
            .collect();
        let mut chaos = Self { edge, port, ports, instances, step: 0, done: BTreeMap::new() };
        chaos.until_all_are_up(INSTANCES - 1);
        chaos
    }

    fn until_all_are_up(&mut self, count: usize) {
        self.edge.until("all instances to be well", |edge| {
            (0..count).all(|number| edge.instance("ims", &format!("i{number}"))["health"] == "up")
        });
    }

    fn note(&mut self, what: &'static str) {
        *self.done.entry(what).or_default() += 1;
    }

    fn put(&mut self, count: usize, weight: u32) {
        let (code, body) = self.edge.put_config(&config(self.port, &self.ports[..count], weight));
        assert_eq!(code, 200, "{body}");
        self.note("reloaded");
    }

    fn next(&mut self) {
        let step = self.step;
        self.step += 1;
        match step % 10 {
            0 => {
                self.instances[1].kill();
                self.note("killed");
            }
            1 => self.put(INSTANCES - 1, 50),
            2 => {
                self.instances[1].start(&self.edge, 1);
                self.note("restarted");
            }
            3 => {
                self.instances[2].signal("STOP");
                self.note("hung");
            }
            4 => {
                self.put(INSTANCES, 100);
                // Not there the first time; and then it is still what it was.
                self.edge.post("/api/v1/pools/ims/instances/i4/undrain", "");
            }
            5 => {
                self.instances[2].signal("CONT");
                self.note("added");
            }
            6 => {
                assert_eq!(self.edge.post("/api/v1/pools/ims/instances/i3/drain", "").0, 202);
                self.note("drained");
            }
            7 => {
                assert_eq!(self.edge.post("/api/v1/pools/ims/instances/i4/drain", "").0, 202);
                self.put(INSTANCES, 70);
            }
            8 => {
                let (code, body) = self.edge.post("/api/v1/pools/ims/instances/i3/undrain", "");
                // It may have ended its drain already: then the configuration brings it back.
                assert!(code < 500, "{code} {body}");
                self.put(INSTANCES, 90);
            }
            // The added one goes, once it has been drained: what is removed has no calls any more.
            _ if self.edge.instance("ims", "i4")["state"] == "gone" => {
                self.put(INSTANCES - 1, 100);
                self.note("removed");
            }
            _ => self.put(INSTANCES, 80),
        }
    }

    /// Everybody lives again.
    fn calm(&mut self) {
        for (number, instance) in self.instances.iter_mut().enumerate() {
            instance.signal("CONT");
            if instance.process.is_none() {
                instance.start(&self.edge, number);
            }
        }
    }
}

/// What the calls came to, once checked.
#[derive(Debug, Default)]
struct Sum {
    answered: u32,
    refused: BTreeMap<u16, u32>,
    with_the_killed: u32,
    second_answers: u32,
    per_instance: BTreeMap<String, u32>,
}

fn check(chaos: &Chaos, records: &[Record]) -> Sum {
    let (mut sum, mut wrong) = (Sum::default(), Vec::new());
    for (number, record) in records.iter().enumerate() {
        sum.second_answers += record.second_answers;
        if record.answered.is_none() {
            *sum.refused.entry(record.code("INVITE")).or_default() += 1;
            continue;
        }
        sum.answered += 1;
        *sum.per_instance.entry(record.instance.clone()).or_default() += 1;
        let owner = record.instance.strip_prefix('i').and_then(|rest| rest.split('@').next());
        let owner: usize = owner.and_then(|digit| digit.parse().ok()).expect("an instance");
        assert!(record.instance.ends_with(&format!(":{}", chaos.ports[owner])), "{record:?}");
        if !record.strangers.is_empty() {
            wrong.push(format!("call {number} moved: {record:?}"));
        }
        let informed = !number.is_multiple_of(4) || record.code("INFO") == 200;
        if record.code("BYE") == 200 && informed {
            continue;
        }
        // Only who talked to a killed one may have lost it.
        if chaos.instances[owner].died_in(record) {
            sum.with_the_killed += 1;
        } else {
            wrong.push(format!("call {number} was lost: {record:?}"));
        }
    }
    let shown: Vec<&String> = wrong.iter().take(10).collect();
    assert!(
        wrong.is_empty(),
        "{} of {} calls: {shown:#?}\nlog: {}",
        wrong.len(),
        records.len(),
        chaos
            .edge
            .log()
            .chars()
            .rev()
            .take(3_000)
            .collect::<String>()
            .chars()
            .rev()
            .collect::<String>()
    );
    sum
}

#[test]
fn no_answered_call_is_lost_whatever_happens_to_the_instances() {
    let _alone = alone();
    let wanted: u32 = std::env::var("STROWGER_CALLS")
        .map_or(2_000, |text| text.parse().expect("STROWGER_CALLS is a number"));
    let rate: u32 = std::env::var("STROWGER_RATE")
        .map_or(100, |text| text.parse().expect("STROWGER_RATE is a number"));
    let mut chaos = Chaos::new();
    let mut callers = Callers::new(([127, 0, 0, 1], chaos.port).into(), "chaos");
    let over = AtomicBool::new(false);
    // The disturbances have a thread of their own, so that the telephones go on listening meanwhile.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut next_step = Instant::now() + Duration::from_millis(500);
            while !over.load(Ordering::Relaxed) {
                if Instant::now() >= next_step {
                    chaos.next();
                    next_step = Instant::now() + Duration::from_millis(1_500);
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        let start = Instant::now();
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        for call in 0..wanted {
            callers.run_until(start + Duration::from_secs(1) * call / rate);
            // xorshift: the holding times are the same in each run.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            callers.begin(Instant::now(), Duration::from_millis(300 + random % 2_500));
        }
        over.store(true, Ordering::Relaxed);
    });
    chaos.calm();
    let limit = Instant::now() + Duration::from_secs(300);
    while callers.open() > 0 {
        assert!(Instant::now() < limit, "{} calls never end", callers.open());
        callers.run_until(Instant::now() + Duration::from_millis(100));
    }
    while !callers.unanswered_extra().is_empty() && Instant::now() < limit {
        callers.run_until(Instant::now() + Duration::from_millis(100));
    }
    assert!(callers.unanswered_extra().is_empty(), "{:?}", callers.unanswered_extra());
    let records = callers.records();
    let sum = check(&chaos, &records);
    let setup: Vec<Duration> = records.iter().filter_map(|record| record.setup).collect();
    println!(
        "{wanted} calls at {rate}/s: {sum:#?}; disturbances: {:?}; set-up p50 {:?}, p99 {:?}, p99.9 {:?}, longest {:?}",
        chaos.done,
        quantile(&setup, 0.5),
        quantile(&setup, 0.99),
        quantile(&setup, 0.999),
        quantile(&setup, 1.0)
    );
    // A call that nobody had answered may fail with its instance; but not many.
    let refused: u32 = sum.refused.values().sum();
    assert!(refused * 100 <= wanted, "{sum:#?}");
    assert!(!sum.refused.contains_key(&0), "an INVITE had no final answer: {sum:#?}");
    assert!(sum.per_instance.len() == INSTANCES, "{sum:#?}");
    let zero = |edge: &Edge, metric: &str| edge.metric(metric, &[]) == 0.0;
    for metric in ["strowger_backend_calls", "strowger_backend_in_flight", "strowger_sessions"] {
        soon(&chaos.edge, metric, |edge| zero(edge, metric));
    }
    soon(&chaos.edge, "no live call", |edge| edge.json("/api/v1/calls")["live"] == 0);
    for number in 0..INSTANCES - 1 {
        let instance = chaos.edge.instance("ims", &format!("i{number}"));
        assert_eq!(
            (&instance["held"], &instance["in_flight"]),
            (&0.into(), &0.into()),
            "{instance}"
        );
    }
    assert_eq!(chaos.edge.metric("strowger_engine_panics_total", &[]), 0.0);
}

/// Waits until something is over: at most as long as a call of which nobody ever heard again is kept
/// (a BYE's Timer F, and 64 x T1 for an answer that nobody acknowledges), and then some.
fn soon(edge: &Edge, what: &str, mut holds: impl FnMut(&Edge) -> bool) {
    let end = Instant::now() + Duration::from_secs(100);
    while !holds(edge) {
        let left = || {
            let pool = edge.json("/api/v1/pools/ims");
            let sessions = edge.json("/api/v1/sessions?pool=ims");
            format!("{pool:#}\n{sessions:#}\n{:#}", edge.json("/api/v1/calls"))
        };
        assert!(Instant::now() < end, "{what} is never true: {}", left());
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The value below which this share of them lies.
pub(super) fn quantile(values: &[Duration], share: f64) -> Duration {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let place = ((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(place).copied().unwrap_or_default()
}
