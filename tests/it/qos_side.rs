//! Side by side on real sockets: Strowger by deadlines, Strowger in FIFO, and for TCP HAProxy with priority
//! classes and a queue timeout, before the same servers, for the same connections.
//!
//! The whole of it, on an idle machine (about a quarter of an hour; tables on stdout, plots into `docs`):
//!
//!     STROWGER_PLOTS=docs cargo test --release --test it qos_side -- --ignored --nocapture --test-threads=1

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use crate::harness::{Process, alone, free_port, has};
use crate::plot::{Line, plot};
use crate::qos_load::{
    Kind, MIX, Plan, SERVICE, SLOTS, Seen, connects, diameter, edge_of_connections,
    server_of_connections, share_met, sip,
};

const LOADS: [f64; 6] = [0.5, 0.8, 0.95, 1.1, 1.5, 2.0];

/// What the edge promises each class, and how HAProxy is told of it: its priority class, and the deadline as
/// its offset within. HAProxy's queue timeout is one for all: that of the class in the middle.
const PROMISES: [(&str, u64, i32); 5] = [
    ("emergency", 400, -200),
    ("in-session", 500, -200),
    ("setup", 500, 0),
    ("mobility", 700, 100),
    ("bulk", 1_000, 200),
];

fn promised(class: &str) -> Duration {
    let found = PROMISES.iter().find(|(name, ..)| *name == class);
    Duration::from_millis(found.expect("a class").1)
}

/// HAProxy before the server, a frontend for each class.
fn haproxy(backend: u16) -> (Process, tempfile::TempDir, BTreeMap<&'static str, u16>) {
    let folder = tempfile::tempdir().expect("a folder");
    let mut ports = BTreeMap::new();
    let mut text = String::from(
        "global\n  maxconn 4000\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n",
    );
    for (class, deadline, priority) in PROMISES {
        let port = free_port();
        ports.insert(class, port);
        text += &format!(
            "frontend {class}\n  bind 127.0.0.1:{port}\n  tcp-request content set-priority-class int({priority})\n  tcp-request content set-priority-offset int({deadline})\n  default_backend db\n"
        );
    }
    text += &format!(
        "backend db\n  timeout queue 500ms\n  server a 127.0.0.1:{backend} maxconn {SLOTS}\n"
    );
    let file = folder.path().join("haproxy.cfg");
    fs::write(&file, text).expect("written");
    let mut command = Command::new("haproxy");
    command.arg("-db").arg("-f").arg(&file);
    let process = Process::spawn(&mut command, &folder.path().join("haproxy.out"));
    for port in ports.values() {
        let until = std::time::Instant::now() + Duration::from_secs(30);
        while TcpStream::connect(("127.0.0.1", *port)).is_err() {
            assert!(std::time::Instant::now() < until, "HAProxy does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    // Those connections took slots.
    std::thread::sleep(SERVICE * 10);
    (process, folder, ports)
}

/// The share of each class's connections that began to be served in time, and of what the server could do
/// while they came. (What waits at the end is still served: a deeper queue looks better by that, the more so
/// the shorter the run.)
fn shares(seen: &[Seen], plan: Plan) -> (Vec<f64>, f64) {
    let met = |seen: &&Seen| seen.served.is_some_and(|after| after <= promised(seen.class));
    let of_class = MIX.iter().map(|(class, _)| {
        let all = || seen.iter().filter(|seen| seen.class == *class);
        all().filter(met).count() as f64 / all().count().max(1) as f64
    });
    let capacity = SLOTS as f64 * plan.lasting.as_secs_f64() / SERVICE.as_secs_f64();
    (of_class.collect(), seen.iter().filter(met).count() as f64 / capacity)
}

/// The connections of a plan through one of the three.
fn through(who: &str, plan: Plan) -> Vec<Seen> {
    let backend = server_of_connections(plan.kind);
    if who == "haproxy" {
        let (_process, _folder, ports) = haproxy(backend);
        return connects(plan, &ports).1;
    }
    let (_edge, ports) = edge_of_connections(who, backend);
    connects(plan, &ports).1
}

/// The median time, in milliseconds, after which a connection that was never served was told so.
fn median_refusal(seen: &[Seen]) -> f64 {
    let mut times: Vec<Duration> =
        seen.iter().filter(|seen| seen.served.is_none()).map(|seen| seen.ended).collect();
    times.sort_unstable();
    times.get(times.len() / 2).map_or(0.0, |time| time.as_secs_f64() * 1_000.0)
}

fn row(what: &str, shares: &[f64], goodput: f64, refusal: Option<f64>) {
    let shares: Vec<String> = shares.iter().map(|share| format!("{share:.3}")).collect();
    let refusal = refusal.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.0}"));
    println!("| {what} | {} | {goodput:.3} | {refusal} |", shares.join(" | "));
}

fn head() {
    println!("| | emergency | in-session | setup | mobility | bulk | goodput | median no, ms |");
    println!("|---|---|---|---|---|---|---|---|");
}

/// The same connections through all three: each is served or refused, and tier 0 is not worse off by
/// deadlines than in FIFO.
#[test]
fn haproxy_and_fifo_beside() {
    if !has("haproxy") {
        return;
    }
    let _alone = alone();
    let plan = Plan { load: 2.0, lasting: Duration::from_secs(2), kind: Kind::Fixed, spike: None };
    let (mut counts, mut tier_0) = (Vec::new(), Vec::new());
    head();
    for who in ["deadline", "fifo", "haproxy"] {
        let seen = through(who, plan);
        let (shares, goodput) = shares(&seen, plan);
        row(who, &shares, goodput, Some(median_refusal(&seen)));
        assert!(seen.iter().any(|seen| seen.served.is_some()), "{who} serves");
        counts.push(seen.len());
        tier_0.push(shares[1]);
    }
    assert!(counts.iter().all(|count| *count == counts[0]), "the same come: {counts:?}");
    assert!(tier_0[0] >= tier_0[1], "FIFO keeps no promise: {tier_0:?}");
}

/// All loads and service times for all protocols, and a spike. Makes `qos-tcp.svg`, `qos-sip.svg`,
/// `qos-diameter.svg`, and `qos-tcp-spike.svg` in the folder that STROWGER_PLOTS names.
#[test]
#[ignore = "takes a quarter of an hour, and an idle machine"]
fn everything_beside() {
    let _alone = alone();
    let folder = std::env::var("STROWGER_PLOTS").ok();
    let draw = |name: &str, drawn: String| {
        if let Some(folder) = &folder {
            fs::write(format!("{folder}/{name}"), drawn).expect("the plot is written");
        }
    };
    let number = |name: &str, usual: u64| {
        std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
    };
    let lasting = Duration::from_secs(number("STROWGER_SECONDS", 5));
    let has_haproxy = has("haproxy");
    let kinds =
        [(Kind::Fixed, "#1f77b4"), (Kind::Exponential, "#2ca02c"), (Kind::Bimodal, "#9467bd")];
    for protocol in ["tcp", "sip", "diameter"] {
        println!("\n{protocol}");
        head();
        let mut lines = Vec::new();
        for (kind, colour) in kinds {
            for who in ["deadline", "fifo", "haproxy"] {
                if who == "haproxy" && (protocol != "tcp" || !has_haproxy) {
                    continue;
                }
                let mut points = Vec::new();
                for load in LOADS {
                    let plan = Plan { load, lasting, kind, spike: None };
                    let (shares, goodput, refusal) = match protocol {
                        "tcp" => {
                            let seen = through(who, plan);
                            let (shares, goodput) = shares(&seen, plan);
                            (shares, goodput, Some(median_refusal(&seen)))
                        }
                        _ => {
                            let run = if protocol == "sip" { sip } else { diameter };
                            let (_, told, _) = run(who, plan);
                            let of_class =
                                MIX.iter().map(|(class, _)| share_met(&told, class)).collect();
                            let met: f64 = told.values().map(|outcomes| outcomes["met"]).sum();
                            let seconds = plan.lasting.as_secs_f64() / SERVICE.as_secs_f64();
                            (of_class, met / (SLOTS as f64 * seconds), None)
                        }
                    };
                    let what = format!("{who}, {kind:?}, {load} x").to_lowercase();
                    row(&what, &shares, goodput, refusal);
                    points.push((load, goodput));
                }
                let name = format!("{who}, {kind:?}").to_lowercase();
                let colour = if who == "haproxy" { "#ff7f0e" } else { colour };
                lines.push(Line { name, colour, dashed: who != "deadline", points });
            }
        }
        let title = format!("{protocol} on loopback: goodput by offered load");
        let drawn = plot(&title, ("offered load / capacity", (0.5, 2.0), 0.25), &lines);
        draw(&format!("qos-{protocol}.svg"), drawn);
    }
    let mut spikes = Vec::new();
    for (who, colour) in [("deadline", "#1f77b4"), ("fifo", "#d62728"), ("haproxy", "#ff7f0e")] {
        if who == "haproxy" && !has_haproxy {
            continue;
        }
        let (from, until) = (Duration::from_secs(3), Duration::from_secs(5));
        let plan = Plan {
            load: 0.7,
            lasting: Duration::from_secs(12),
            kind: Kind::Fixed,
            spike: Some((from, until, 2.5)),
        };
        let seen = through(who, plan);
        let met_in = |bin: u32| {
            let begin = Duration::from_millis(250) * bin;
            let born = || {
                let within = begin..begin + Duration::from_millis(250);
                seen.iter().filter(move |seen| within.contains(&seen.born))
            };
            let met = |seen: &&Seen| seen.served.is_some_and(|it| it <= promised(seen.class));
            born().filter(met).count() as f64 / born().count().max(1) as f64
        };
        let points = (0..48).map(|bin| (f64::from(bin) / 4.0, met_in(bin))).collect();
        spikes.push(Line { name: who.into(), colour, dashed: who != "deadline", points });
    }
    let title = "tcp on loopback: served in time around a spike of 2.5 x for 2 s (seconds 3 to 5)";
    draw("qos-tcp-spike.svg", plot(title, ("arrival, seconds", (0.0, 12.0), 2.0), &spikes));
}
