//! Side by side with what an operator would use instead, on this machine, in one run.
//!
//! `cargo bench --bench compare -- [SCENARIO...] [--rounds N] [--seconds S] [--out FOLDER]`
//!
//! Each proxy runs alone, pinned to the first core; the load (`strowger load`, both its clients and
//! its servers) runs on the second. Rounds go through the proxies in turn, so that a noisy minute
//! does not hit one of them only. CPU is the scheduler's own account of all of a proxy's threads and
//! children. Printed: the table; written: its JSON, and SVG plots.
#![allow(missing_docs)]

mod peer;
mod plot;
mod scenario;

use std::path::PathBuf;
use std::process::ExitCode;

use scenario::{Run, SCENARIOS};

fn main() -> ExitCode {
    let mut run = Run { rounds: 3, seconds: 5, out: PathBuf::from("target/compare") };
    let mut wanted = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|text| text.parse().ok());
        match argument.as_str() {
            "--rounds" => run.rounds = number().unwrap_or(run.rounds),
            "--seconds" => run.seconds = number().unwrap_or(run.seconds),
            "--out" => run.out = arguments.next().map(PathBuf::from).unwrap_or_default(),
            // What cargo adds.
            "--bench" => {}
            name if SCENARIOS.iter().any(|scenario| scenario.name == name) => {
                wanted.push(name.to_owned());
            }
            other => {
                let known: Vec<&str> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
                eprintln!(
                    "{other}: expected one of {}, --rounds, --seconds, --out",
                    known.join(", ")
                );
                return ExitCode::FAILURE;
            }
        }
    }
    if let Err(error) = peer::install() {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    std::fs::create_dir_all(&run.out).expect("a folder for the results");
    for scenario in SCENARIOS {
        if wanted.is_empty() || wanted.iter().any(|name| name == scenario.name) {
            run.scenario(scenario);
        }
    }
    println!("results and plots: {}", run.out.display());
    ExitCode::SUCCESS
}
