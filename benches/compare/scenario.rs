//! The work, and what came of it for each proxy.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::peer::{Kind, LOAD_CORE, Peer, Ports, Strowger};
use super::plot;

/// The same work for several proxies.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    title: &'static str,
    /// What one thing begun is called.
    unit: &'static str,
    protocol: Protocol,
    /// Further arguments of `strowger load`.
    load: &'static [&'static str],
    /// Things a second in the rounds of equal work; 0 where there is no rate.
    equal_rate: u32,
    /// Where the search for the capacity begins; 0 for none.
    capacity_from: u32,
    peers: &'static [Kind],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Sip,
    SipTcp,
    Diameter,
    Tcp,
}

const STATEFUL: Kind = Kind::Strowger(Strowger::STATEFUL);
const STATELESS: Kind = Kind::Strowger(Strowger { mode: "stateless", ..Strowger::STATEFUL });
const TWO_WORKERS: Kind = Kind::Strowger(Strowger { workers: 2, ..Strowger::STATEFUL });
/// Pauses as long as what freeDiameter takes.
const GATHERED_LONG: Kind = Kind::Strowger(Strowger { rx_usecs: 1_000, ..Strowger::STATEFUL });
const UNGATHERED: Kind = Kind::Strowger(Strowger { rx_usecs: 0, ..Strowger::STATEFUL });
const LISTENERS: Kind = Kind::Strowger(Strowger { idle_listeners: 100, ..Strowger::STATEFUL });
const OVER_TCP: Kind = Kind::Strowger(Strowger { sip_over_tcp: true, ..Strowger::STATEFUL });
const RELOADING: Kind = Kind::Strowger(Strowger { reloads: true, ..Strowger::STATEFUL });
const FLOOR_UDP: Kind = Kind::Floor { scheme: "udp" };
const FLOOR_TCP: Kind = Kind::Floor { scheme: "tcp" };
const SPLICE: Kind = Kind::Strowger(Strowger { splice: true, ..Strowger::STATEFUL });
const TCP_PEERS: &[Kind] = &[STATEFUL, SPLICE, Kind::Haproxy, Kind::Nginx, FLOOR_TCP];

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "sip-stateful",
        title: "SIP over UDP, transaction-stateful, Record-Route: INVITE, 180, 200, ACK, BYE, 200",
        unit: "call",
        protocol: Protocol::Sip,
        load: &["--timeout", "4s"],
        equal_rate: 3_000,
        capacity_from: 1_500,
        peers: &[
            STATEFUL,
            Kind::Kamailio { mode: "stateful", children: 1 },
            Kind::Kamailio { mode: "stateful", children: 2 },
            FLOOR_UDP,
        ],
    },
    Scenario {
        name: "sip-half",
        title: "The same at half the rate: fewer datagrams come together",
        unit: "call",
        protocol: Protocol::Sip,
        load: &["--timeout", "4s"],
        equal_rate: 1_500,
        capacity_from: 0,
        peers: &[STATEFUL, UNGATHERED, Kind::Kamailio { mode: "stateful", children: 1 }, FLOOR_UDP],
    },
    Scenario {
        name: "sip-tcp",
        title: "SIP over TCP from clients, over UDP to instances, stateful, Record-Route: a call",
        unit: "call",
        protocol: Protocol::SipTcp,
        load: &["--timeout", "4s", "--connections", "8"],
        equal_rate: 1_500,
        capacity_from: 0,
        peers: &[OVER_TCP, Kind::Kamailio { mode: "stateful", children: 1 }],
    },
    Scenario {
        name: "sip-itself",
        title: "SIP over UDP, stateful: what workers, listeners and reloads (twice a second) cost",
        unit: "call",
        protocol: Protocol::Sip,
        load: &["--timeout", "4s"],
        equal_rate: 2_000,
        capacity_from: 0,
        peers: &[STATEFUL, TWO_WORKERS, LISTENERS, RELOADING],
    },
    Scenario {
        name: "sip-stateless",
        title: "SIP over UDP, stateless, Record-Route: INVITE, 180, 200, ACK, BYE, 200",
        unit: "call",
        protocol: Protocol::Sip,
        load: &["--timeout", "4s"],
        equal_rate: 3_000,
        capacity_from: 3_000,
        peers: &[STATELESS, Kind::Kamailio { mode: "stateless", children: 1 }, FLOOR_UDP],
    },
    Scenario {
        name: "diameter",
        title: "Diameter relay: Gx, Gy and S6a, 500 B requests, 8 client and 4 server connections",
        unit: "transaction",
        protocol: Protocol::Diameter,
        load: DIAMETER,
        equal_rate: 4_000,
        capacity_from: 8_000,
        peers: &[STATEFUL, GATHERED_LONG, Kind::FreeDiameter],
    },
    Scenario {
        name: "diameter-more",
        title: "The same at three times the rate, near what freeDiameter can do",
        unit: "transaction",
        protocol: Protocol::Diameter,
        load: DIAMETER,
        equal_rate: 12_000,
        capacity_from: 0,
        peers: &[STATEFUL, GATHERED_LONG, Kind::FreeDiameter],
    },
    Scenario {
        name: "tcp-requests",
        title: "TCP: 200 B requests, 1 kB answers, on 64 open connections",
        unit: "request",
        protocol: Protocol::Tcp,
        load: &["--kind", "requests", "--connections", "64"],
        equal_rate: 10_000,
        capacity_from: 20_000,
        peers: TCP_PEERS,
    },
    Scenario {
        name: "tcp-connects",
        title: "TCP: a new connection for each request",
        unit: "connection",
        protocol: Protocol::Tcp,
        load: &["--kind", "connects"],
        equal_rate: 3_000,
        capacity_from: 4_000,
        peers: TCP_PEERS,
    },
    Scenario {
        name: "tcp-streams",
        title: "TCP: as many bytes as pass, on 8 connections",
        unit: "GB",
        protocol: Protocol::Tcp,
        load: &["--kind", "streams", "--connections", "8"],
        equal_rate: 0,
        capacity_from: 0,
        peers: TCP_PEERS,
    },
    Scenario {
        name: "tcp-idle",
        title: "TCP: 9,000 idle connections",
        unit: "connection",
        protocol: Protocol::Tcp,
        load: &["--kind", "idle", "--connections", "9000"],
        equal_rate: 0,
        capacity_from: 0,
        peers: TCP_PEERS,
    },
];

const DIAMETER: &[&str] = &[
    "--mix",
    "gx=60,gy=20,s6a=20",
    "--connections",
    "8",
    "--follow-host",
    "--client-realm",
    "clients.example.net",
    "--settle",
    "8s",
    "--timeout",
    "4s",
];

/// What is told of latencies, at equal work and at shares of the capacity.
const QUANTILES: [&str; 4] = ["p50", "p90", "p99", "p999"];

/// How it is run.
pub(crate) struct Run {
    pub(crate) rounds: u32,
    pub(crate) seconds: u32,
    pub(crate) out: PathBuf,
}

/// One run of the load through one proxy.
struct Sample {
    report: Value,
    cpu_seconds: f64,
    memory_kib: u64,
}

impl Sample {
    fn units(&self, scenario: &Scenario) -> f64 {
        if scenario.name == "tcp-streams" {
            return self.report["counts"]["streamed_bytes"].as_f64().unwrap_or(0.0) / 1e9;
        }
        self.report["good"].as_f64().unwrap_or(0.0)
    }

    fn cpu_us_per_unit(&self, scenario: &Scenario) -> f64 {
        self.cpu_seconds * 1e6 / self.units(scenario).max(1e-9)
    }

    /// The longest of the p99 of whatever was measured.
    fn latency_us(&self, quantile: &str) -> f64 {
        let each = self.report["latency_us"].as_object().into_iter().flatten();
        each.filter_map(|(_, latency)| latency[quantile].as_f64()).fold(0.0, f64::max)
    }

    /// All answered, in time, and the generator was not what held it up.
    fn is_good(&self) -> bool {
        let (begun, good) = (
            self.report["begun"].as_f64().unwrap_or(0.0),
            self.report["good"].as_f64().unwrap_or(0.0),
        );
        begun > 0.0 && good >= begun * 0.999 && self.latency_us("p99") < 50_000.0
    }

    fn generator_was_full(&self) -> bool {
        self.report["generator"]["cpu_share"].as_f64().unwrap_or(0.0) > 0.95
    }
}

impl Run {
    pub(crate) fn scenario(&self, scenario: &Scenario) {
        println!("\n{}: {}", scenario.name, scenario.title);
        let mut samples: Vec<Vec<Sample>> = scenario.peers.iter().map(|_| Vec::new()).collect();
        for round in 0..self.rounds {
            for (place, kind) in scenario.peers.iter().enumerate() {
                let sample = self.sample(scenario, *kind, scenario.equal_rate);
                println!(
                    "  round {} {:<22} {:>9.2} us of CPU a {}, p99 {:.3} ms{}",
                    round + 1,
                    kind.name(),
                    sample.cpu_us_per_unit(scenario),
                    scenario.unit,
                    sample.latency_us("p99") / 1_000.0,
                    if sample.report["failed"].as_object().is_some_and(|map| !map.is_empty()) {
                        format!(", FAILED {}", sample.report["failed"])
                    } else {
                        String::new()
                    }
                );
                samples[place].push(sample);
            }
        }
        let results: Vec<Value> = scenario
            .peers
            .iter()
            .zip(&samples)
            .map(|(kind, own)| self.result(scenario, *kind, own, &samples[0]))
            .collect();
        print_table(scenario, &results);
        print_shares(scenario, &results);
        let file = self.out.join(format!("{}.json", scenario.name));
        let all = json!({
            "scenario": scenario.name,
            "title": scenario.title,
            "unit": scenario.unit,
            "rounds": self.rounds,
            "seconds": self.seconds,
            "equal_rate": scenario.equal_rate,
            "results": results,
        });
        std::fs::write(file, format!("{all:#}\n")).expect("written");
        let svg = plot::panels(scenario.title, scenario.unit, &results);
        std::fs::write(self.out.join(format!("{}.svg", scenario.name)), svg).expect("written");
    }

    /// `ours` are the samples of the first proxy: ratios are to that of the same round.
    fn result(
        &self,
        scenario: &Scenario,
        kind: Kind,
        samples: &[Sample],
        ours: &[Sample],
    ) -> Value {
        let spread = |of: &dyn Fn(&Sample) -> f64| spread(samples.iter().map(of).collect());
        let cost = |sample: &Sample| sample.cpu_us_per_unit(scenario);
        let pairs = samples.iter().zip(ours).map(|(it, ours)| cost(it) / cost(ours).max(1e-9));
        let (capacity, latencies) = if scenario.capacity_from > 0 {
            let capacity = self.capacity(scenario, kind);
            let at = |percent: u32| {
                let rate = capacity.0 * percent / 100;
                let sample = self.sample(scenario, kind, rate);
                let cpu_us = sample.cpu_us_per_unit(scenario);
                let mut told = json!({ "percent": percent, "rate": rate, "cpu_us": cpu_us });
                let mut tell = |name: &str, sample: &Sample| {
                    told[name] = QUANTILES.map(|quantile| sample.latency_us(quantile)).into();
                };
                tell("quantiles_us", &sample);
                if scenario.protocol == Protocol::Diameter {
                    // What the clients and servers themselves take.
                    tell("without_proxy_us", &self.sample(scenario, Kind::Direct, rate));
                }
                told["p50"] = sample.latency_us("p50").into();
                told["p99"] = sample.latency_us("p99").into();
                told
            };
            (
                json!({ "rate": capacity.0, "generator_full": capacity.1 }),
                [25, 50, 80].map(at).to_vec(),
            )
        } else {
            (Value::Null, Vec::new())
        };
        json!({
            "proxy": kind.name(),
            "cpu_us": spread(&cost),
            "cpu_ratio_to_first": self::spread(pairs.collect()),
            "p50_us": spread(&|sample| sample.latency_us("p50")),
            "quantiles_us": QUANTILES.map(|quantile| spread(&|sample| sample.latency_us(quantile))),
            "p99_us": spread(&|sample| sample.latency_us("p99")),
            "units": spread(&|sample| sample.units(scenario)),
            "memory_kib": spread(&|sample| sample.memory_kib as f64),
            "failed": samples.iter().map(|sample| sample.report["failed"].clone()).collect::<Vec<_>>(),
            "capacity": capacity,
            "latency_at_share_of_capacity": latencies,
        })
    }

    /// The highest rate at which 99.9 % are answered with a p99 below 50 ms, to within a tenth; and
    /// whether the generator was the limit.
    fn capacity(&self, scenario: &Scenario, kind: Kind) -> (u32, bool) {
        let (mut good, mut bad) = (0, None);
        let mut rate = scenario.capacity_from;
        let mut full = false;
        for _ in 0..10 {
            let sample = self.sample(scenario, kind, rate);
            if sample.is_good() {
                good = rate;
                full = sample.generator_was_full();
                if full {
                    break;
                }
            } else {
                bad = Some(rate);
                full = sample.generator_was_full();
            }
            rate = match bad {
                None => rate * 3 / 2,
                Some(bad) if bad - good > good / 10 => u32::midpoint(good, bad),
                Some(_) => break,
            };
            if rate < 100 {
                break;
            }
        }
        (good, full)
    }

    fn sample(&self, scenario: &Scenario, kind: Kind, rate: u32) -> Sample {
        let ports = Ports::find();
        let proxy = Peer::start(kind, ports, scenario.protocol == Protocol::Diameter);
        let single = matches!(kind, Kind::Floor { .. }) || scenario.protocol == Protocol::Tcp;
        let direct = kind == Kind::Direct;
        let (protocol, scheme) = match scenario.protocol {
            Protocol::Sip => ("sip", "udp"),
            Protocol::SipTcp => ("sip", "tcp"),
            Protocol::Diameter => ("diameter", "tcp"),
            Protocol::Tcp => ("tcp", "tcp"),
        };
        let address = |scheme: &str, port: u16| format!("{scheme}://127.0.0.1:{port}");
        let behind = if scenario.protocol == Protocol::SipTcp { "udp" } else { scheme };
        let mut load = Command::new("taskset");
        load.args(["-c", LOAD_CORE, env!("CARGO_BIN_EXE_strowger"), "load", protocol, "--json"])
            .args(["--target", &address(scheme, if direct { ports.a } else { ports.listen })])
            .args(["--answer", &address(behind, ports.a)])
            .args(["--for", &format!("{}s", self.seconds), "--rate", &rate.max(1).to_string()])
            .args(scenario.load);
        if !single && !direct {
            load.args(["--answer", &address(behind, ports.b)]);
        }
        if scenario.protocol == Protocol::Diameter && !direct {
            for port in [ports.c, ports.d] {
                load.args(["--answer", &address(behind, port)]);
            }
        }
        // The servers are the load's own: what a proxy spends on finding them is not counted.
        let load = load.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let before = proxy.cpu();
        let mut child = load.spawn().expect("the load starts");
        let mut memory_kib = 0;
        let mut turn = 0;
        while matches!(child.try_wait(), Ok(None)) {
            memory_kib = memory_kib.max(proxy.memory_kib());
            if matches!(kind, Kind::Strowger(Strowger { reloads: true, .. })) {
                proxy.reload(turn);
                turn += 1;
            }
            std::thread::sleep(std::time::Duration::from_millis(500));
        }
        let cpu_seconds = (proxy.cpu() - before).as_secs_f64();
        let output = child.wait_with_output().expect("the load ends");
        let report = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        Sample { report, cpu_seconds, memory_kib }
    }
}

fn spread(mut values: Vec<f64>) -> Value {
    values.sort_by(f64::total_cmp);
    json!({
        "min": values.first(),
        "median": values.get(values.len() / 2),
        "max": values.last(),
    })
}

fn print_table(scenario: &Scenario, results: &[Value]) {
    println!(
        "  {:<22} {:>12} {:>19} {:>22} {:>10} {:>10} {:>12} {:>10}",
        "proxy",
        format!("us CPU/{}", scenario.unit),
        "min .. max",
        "ratio (min .. max)",
        "p50 ms",
        "p99 ms",
        "capacity /s",
        "MiB"
    );
    for result in results {
        let number = |path: &str| result.pointer(path).and_then(Value::as_f64).unwrap_or(0.0);
        let capacity = match result["capacity"]["rate"].as_u64() {
            Some(rate) if result["capacity"]["generator_full"] == true => format!(">= {rate}"),
            Some(rate) => rate.to_string(),
            None => "-".into(),
        };
        println!(
            "  {:<22} {:>12.2} {:>8.2} .. {:>7.2} {:>8.2} ({:>4.2} .. {:>4.2}) {:>10.3} {:>10.3} {:>12} {:>10.1}",
            result["proxy"].as_str().unwrap_or(""),
            number("/cpu_us/median"),
            number("/cpu_us/min"),
            number("/cpu_us/max"),
            number("/cpu_ratio_to_first/median"),
            number("/cpu_ratio_to_first/min"),
            number("/cpu_ratio_to_first/max"),
            number("/p50_us/median") / 1_000.0,
            number("/p99_us/median") / 1_000.0,
            capacity,
            number("/memory_kib/median") / 1_024.0,
        );
    }
}

/// At shares of each one's capacity: the CPU time, the work per second of CPU, and latencies (Diameter:
/// against those without a proxy).
fn print_shares(scenario: &Scenario, results: &[Value]) {
    let milliseconds = |list: &Value| {
        let each = list.as_array().into_iter().flatten().filter_map(Value::as_f64);
        each.map(|us| format!("{:>8.3}", us / 1_000.0)).collect::<Vec<_>>().join(" ")
    };
    for result in results {
        for at in result["latency_at_share_of_capacity"].as_array().into_iter().flatten() {
            let cpu = at["cpu_us"].as_f64().unwrap_or(0.0);
            let without = match &at["without_proxy_us"] {
                Value::Null => String::new(),
                list => format!("; without a proxy {}", milliseconds(list)),
            };
            println!(
                "  {:<22} at {:>2} % ({:>6}/s) {:>8.2} us CPU/{}, {:>7.0} of them per second of CPU; {} = {} ms{without}",
                result["proxy"].as_str().unwrap_or(""),
                at["percent"],
                at["rate"],
                cpu,
                scenario.unit,
                1e6 / cpu.max(1e-9),
                QUANTILES.join(", "),
                milliseconds(&at["quantiles_us"]),
            );
        }
    }
}
