//! Runs the real queue under a virtual clock, prints a table, and draws the plots of `docs/qos.md`:
//! `cargo run --release --example overload -- docs` (a debug build does as well, in a minute).
#![allow(missing_docs)]

use std::fmt::Write as _;
use std::time::Duration;

use strowger::routing::Policy;

#[path = "../tests/routing/overload.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod overload;

use overload::{Crowd, End, MIX, Report, Service, run};

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 60.0;
const BOTTOM: f64 = 46.0;
const TOP: f64 = 44.0;
const RIGHT: f64 = 200.0;

struct Line {
    name: String,
    colour: &'static str,
    dashed: bool,
    points: Vec<(f64, f64)>,
}

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

fn plot(title: &str, (label, (from, to), step): (&str, (f64, f64), f64), lines: &[Line]) -> String {
    let x = |value: f64| LEFT + (value - from) / (to - from) * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| HEIGHT - BOTTOM - value.min(1.05) / 1.05 * (HEIGHT - BOTTOM - TOP);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"{LEFT}\" y=\"24\" font-size=\"14\">{title}</text>\n"
    );
    let mut add = |text: String| {
        // Writing to a string cannot fail.
        let _ok = writeln!(svg, "{text}");
    };
    for tenth in 0..=5 {
        let value = f64::from(tenth) / 5.0;
        let at = y(value);
        add(format!(
            "<line x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{value:.1}</text>",
            WIDTH - RIGHT,
            LEFT - 8.0,
            at + 4.0
        ));
    }
    let mut value = from;
    while value <= to + 1e-9 {
        add(format!(
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{value}</text>",
            x(value),
            HEIGHT - BOTTOM + 18.0
        ));
        value += step;
    }
    add(format!(
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 8.0
    ));
    for (index, line) in lines.iter().enumerate() {
        let points: Vec<String> = line
            .points
            .iter()
            .map(|&(at, value)| format!("{:.1},{:.1}", x(at), y(value)))
            .collect();
        let dash = if line.dashed { " stroke-dasharray=\"6 4\"" } else { "" };
        let style = format!("fill=\"none\" stroke=\"{}\" stroke-width=\"2\"{dash}", line.colour);
        add(format!("<polyline points=\"{}\" {style}/>", points.join(" ")));
        let (left, at) = (WIDTH - RIGHT + 14.0, TOP + 18.0 * index as f64);
        add(format!(
            "<line x1=\"{left}\" y1=\"{at}\" x2=\"{}\" y2=\"{at}\" {style}/><text x=\"{}\" y=\"{}\">{}</text>",
            left + 26.0,
            left + 32.0,
            at + 4.0,
            line.name
        ));
    }
    svg.push_str("</svg>\n");
    svg
}
