//! Runs the real queue under a virtual clock, prints a table, and draws the plots of `docs/qos.md`:
//! `cargo run --release --example overload -- docs` (a debug build does as well, in a minute).
#![allow(missing_docs)]

use std::time::Duration;

use strowger::routing::Policy;

#[path = "../tests/routing/overload.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod overload;

#[path = "../tests/support/plot.rs"]
mod plot;

use overload::{Crowd, End, MIX, Report, Service, run};
use plot::{Line, plot};

fn main() -> std::io::Result<()> {
    let folder = std::env::args().nth(1);
    let mut lines = Vec::new();
    println!(
        "{:<12} {:<9} {:>4}  goodput  met: emergency in-session setup mobility bulk",
        "service", "policy", "load"
    );
    for (service, colour) in [
        (Service::Fixed, "#1f77b4"),
        (Service::Exponential, "#2ca02c"),
        (Service::Bimodal, "#9467bd"),
    ] {
        for (policy, word) in [(Policy::Deadline, "deadline"), (Policy::Fifo, "fifo")] {
            let mut points = Vec::new();
            for load in [0.5, 0.65, 0.8, 0.9, 0.95, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0] {
                let report = run(Crowd::new(policy, service, load, 1));
                print_line(service, word, load, &report);
                points.push((load, report.goodput()));
            }
            let name = format!("{word}, {}", format!("{service:?}").to_lowercase());
            lines.push(Line { name, colour, dashed: policy == Policy::Fifo, points });
        }
    }
    let mut spikes = Vec::new();
    for (policy, retransmits, name, colour) in [
        (Policy::Deadline, false, "deadline", "#1f77b4"),
        (Policy::Deadline, true, "deadline, resending", "#2ca02c"),
        (Policy::Fifo, false, "fifo", "#ff7f0e"),
        (Policy::Fifo, true, "fifo, resending", "#d62728"),
    ] {
        let report = run(Crowd {
            spike: Some((Duration::from_secs(4), Duration::from_secs(6), 2.5)),
            retransmits,
            lasting: Duration::from_secs(20),
            ..Crowd::new(policy, Service::Fixed, 0.7, 1)
        });
        let bins = 8..80u32;
        let points = bins.map(|bin| (f64::from(bin) / 4.0, met_in(&report, bin))).collect();
        spikes.push(Line { name: name.into(), colour, dashed: policy == Policy::Fifo, points });
    }
    let Some(folder) = folder else { return Ok(()) };
    let loads = plot(
        "Goodput (answers in time / capacity) by offered load",
        ("offered load / capacity", (0.5, 2.0), 0.25),
        &lines,
    );
    std::fs::write(format!("{folder}/qos-load.svg"), loads)?;
    let spike = plot(
        "Answered in time, around a spike of 2.5 x for 2 s (seconds 4 to 6) over a load of 0.7",
        ("arrival, seconds", (2.0, 20.0), 2.0),
        &spikes,
    );
    std::fs::write(format!("{folder}/qos-spike.svg"), spike)
}

fn print_line(service: Service, policy: &str, load: f64, report: &Report) {
    let met: Vec<String> =
        MIX.iter().map(|(class, _)| format!("{:.3}", report.met(Some(*class)))).collect();
    println!(
        "{:<12} {policy:<9} {load:>4}  {:.3}    {}",
        format!("{service:?}"),
        report.goodput(),
        met.join(" ")
    );
}

/// The part of the calls born in a quarter of a second that was answered in time.
fn met_in(report: &Report, quarter: u32) -> f64 {
    let from = u64::from(quarter) * 250_000;
    let born = || report.calls.iter().filter(|call| (from..from + 250_000).contains(&call.born));
    let met = born().filter(|call| matches!(call.end, Some((End::Met, _)))).count();
    met as f64 / born().count().max(1) as f64
}
