//! How cost grows: with backends, sessions, the size of a message; and how long the next snapshot takes
//! while a worker decides. `cargo bench --bench scaling -- [--out FOLDER]` prints tables and writes
//! JSON and SVG. The figures are times of one processor without sockets: of the fastest and of the
//! median batch, since a neighbour on the machine only ever adds.
#![allow(missing_docs)]

mod rig;

use std::fmt::Write as _;
use std::hint::black_box;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rig::{DiameterRig, SipRig, core_with_room, key, spec};
use serde_json::json;
use strowger::routing::{Core, CoreRouter};
use strowger_contract::{Attempt, ClassId, PoolId, Query, Router, WorkerId};
use strowger_sip::Mode;

const BATCHES: usize = 60;
const PER_BATCH: u32 = 1_000;

/// Sessions of the small case, and of the large one.
const FEW: u64 = 1_000;
const MANY: u64 = 10_000_000;

/// One point of a series: where it is, and nanoseconds of the fastest and of the median batch.
type Point = (u64, f64, f64);

/// A line of a plot.
struct Series {
    name: String,
    points: Vec<Point>,
}

fn main() -> ExitCode {
    let mut out = PathBuf::from("target/scaling");
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--out" => out = arguments.next().map(PathBuf::from).unwrap_or_default(),
            "--bench" => {}
            other => {
                eprintln!("{other}: expected --out FOLDER");
                return ExitCode::FAILURE;
            }
        }
    }
    std::fs::create_dir_all(&out).expect("a folder for the results");
    let backends = ["hash", "least-loaded"].map(by_backends);
    show(
        &out,
        "backends",
        "A decision for a new session, by backends in the pool",
        "backends",
        &backends,
    );
    let sessions = [by_sessions()];
    show(
        &out,
        "sessions",
        "A look-up of a live session, by sessions in the table",
        "sessions",
        &sessions,
    );
    let sizes = [invite_by_size(), diameter_by_size()];
    show(&out, "message-size", "A request relayed, by its bytes", "bytes", &sizes);
    let snapshots = [snapshots()];
    show(&out, "snapshot", "The next snapshot, by backends", "backends", &snapshots);
    both_ends();
    swap_beside_a_worker();
    println!("results and plots: {}", out.display());
    ExitCode::SUCCESS
}

/// Nanoseconds of one, in the fastest and in the median of [`BATCHES`].
fn measure(mut work: impl FnMut()) -> (f64, f64) {
    let mut times: Vec<f64> = (0..BATCHES)
        .map(|_| {
            let start = Instant::now();
            for _ in 0..PER_BATCH {
                work();
            }
            start.elapsed().as_nanos() as f64 / f64::from(PER_BATCH)
        })
        .collect();
    times.sort_by(f64::total_cmp);
    (times[0], times[BATCHES / 2])
}

fn query(
    router: &CoreRouter,
    pool: PoolId,
    number: u64,
    now: Instant,
    live: bool,
) -> Query<'static> {
    Query {
        pool,
        session: key(router, number),
        pin: None,
        in_session: live,
        awaits: false,
        class: ClassId::SETUP,
        deadline: now + Duration::from_secs(1),
        capability: 0,
        exclude: &[],
        attempt: Attempt::First,
    }
}

fn by_backends(balance: &str) -> Series {
    let points = [1, 10, 100, 1_000, 10_000].map(|backends| {
        let now = Instant::now();
        let more = format!("    balance: {balance}\n");
        let (core, pool) = core_with_room(now, backends, &more, 1 << 20);
        let (fastest, median) = decide(&core, pool, now);
        (backends as u64, fastest, median)
    });
    Series { name: balance.to_owned(), points: points.to_vec() }
}

/// Decisions for sessions that nobody knows yet.
fn decide(core: &Arc<Core>, pool: PoolId, now: Instant) -> (f64, f64) {
    let mut router = core.router(WorkerId(0));
    let mut number = u64::MAX / 2;
    measure(|| {
        number += 1;
        let query = query(&router, pool, number, now, false);
        let _decision = black_box(router.route(now, &query));
    })
}

/// A core whose pool knows so many sessions.
fn known(backends: usize, sessions: u64) -> (Arc<Core>, PoolId, Instant) {
    let now = Instant::now();
    // A fifth left free, as an operator would size it; the table rounds up to a power of two.
    let (core, pool) = core_with_room(now, backends, "", (sessions * 5 / 4).max(1 << 12) as usize);
    let mut router = core.router(WorkerId(0));
    let ids: Vec<_> =
        core.snapshot().pool(pool).expect("the pool").backends().map(|it| it.id).collect();
    for number in 0..sessions {
        let session = key(&router, number);
        let backend = ids[number as usize % ids.len()];
        router.learn(now, session, backend, ClassId::SETUP, Duration::from_secs(86_400));
    }
    (core, pool, now)
}

/// Decisions for live sessions, in no order.
fn follow(core: &Arc<Core>, pool: PoolId, sessions: u64, now: Instant) -> (f64, f64) {
    let mut router = core.router(WorkerId(0));
    let mut number = 0;
    measure(|| {
        number = (number + 7_368_787) % sessions;
        let query = query(&router, pool, number, now, true);
        let _decision = black_box(router.route(now, &query));
    })
}

fn by_sessions() -> Series {
    let points = [FEW, 10_000, 100_000, 1_000_000, MANY].map(|sessions| {
        let before = memory();
        let (core, pool, now) = known(10, sessions);
        let bytes = memory().saturating_sub(before) as f64 / sessions as f64;
        let (fastest, median) = follow(&core, pool, sessions, now);
        // Smaller tables find memory that the process has already.
        if sessions == MANY {
            println!("{sessions:>10} sessions: {bytes:.1} bytes of memory each, all included");
        }
        (sessions, fastest, median)
    });
    Series { name: "among 10 backends".to_owned(), points: points.to_vec() }
}

/// Resident bytes of this process.
fn memory() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages: u64 = text.split(' ').nth(1).and_then(|it| it.parse().ok()).expect("a number");
    pages * 4_096
}

fn invite_by_size() -> Series {
    let points = [0, 700, 2_700, 6_700, 14_700, 30_700].map(|padding| {
        let mut rig = SipRig::new(Instant::now(), Mode::Stateless, 4);
        rig.pad(padding);
        let size = rig.invite();
        let (fastest, median) = measure(|| {
            black_box(rig.invite());
        });
        (size as u64, fastest, median)
    });
    Series { name: "SIP: INVITE, stateless".to_owned(), points: points.to_vec() }
}

fn diameter_by_size() -> Series {
    let points = [0, 700, 3_500, 7_500, 15_500, 31_500].map(|padding| {
        let mut rig = DiameterRig::new(Instant::now(), 4);
        rig.pad(padding);
        let size = rig.request();
        rig.answer();
        let (fastest, median) = measure(|| {
            rig.request();
            rig.answer();
            rig.pass(Duration::from_micros(900));
        });
        (size as u64, fastest, median)
    });
    Series { name: "Diameter: request and its answer".to_owned(), points: points.to_vec() }
}

/// From the wanted state (parsed already) to the next snapshot in force.
fn snapshots() -> Series {
    let points = [10, 100, 1_000, 10_000].map(|backends| {
        let now = Instant::now();
        let (core, _) = core_with_room(now, backends, "", 1 << 12);
        let specs: Vec<_> = (0..21).map(|turn| spec(&core, backends, turn)).collect();
        let mut times: Vec<f64> = specs
            .into_iter()
            .map(|spec| {
                let start = Instant::now();
                black_box(core.apply(now, spec));
                start.elapsed().as_nanos() as f64
            })
            .collect();
        times.sort_by(f64::total_cmp);
        (backends as u64, times[0], times[times.len() / 2])
    });
    Series { name: "every backend's weight changes".to_owned(), points: points.to_vec() }
}

/// Few backends and sessions beside many of both.
fn both_ends() {
    println!("\nboth ends                              new session           live session");
    for (backends, sessions) in [(10, FEW), (10_000, MANY)] {
        let (core, pool, now) = known(backends, sessions);
        let (live, fresh) = (follow(&core, pool, sessions, now), decide(&core, pool, now));
        println!(
            "{backends:>6} backends, {sessions:>9} sessions: {:>6.0} ns ({:>6.0})   {:>6.0} ns ({:>6.0})",
            fresh.0, fresh.1, live.0, live.1
        );
    }
}

/// A worker decides without a pause while snapshots of 10,000 backends are made on another core.
fn swap_beside_a_worker() {
    const BACKENDS: usize = 10_000;
    let now = Instant::now();
    let (core, pool) = core_with_room(now, BACKENDS, "", 1 << 16);
    let specs: Vec<_> = (0..20).map(|turn| spec(&core, BACKENDS, turn)).collect();
    let (quiet, _) = longest_step(&core, pool, || std::thread::sleep(Duration::from_secs(1)));
    let (beside, seen) = longest_step(&core, pool, || {
        for spec in specs {
            black_box(core.apply(now, spec));
            std::thread::sleep(Duration::from_millis(30));
        }
    });
    println!(
        "\na worker's longest step: {:.0} us alone, {:.0} us beside 20 snapshots of {BACKENDS} backends (it took up {seen})",
        quiet.as_secs_f64() * 1e6,
        beside.as_secs_f64() * 1e6
    );
}

/// The longest that a worker took for one decision, with taking up a snapshot, while `other` ran; and
/// how many snapshots it took up.
fn longest_step(core: &Arc<Core>, pool: PoolId, other: impl FnOnce()) -> (Duration, u32) {
    let ends = Arc::new(AtomicBool::new(false));
    let (core, until) = (Arc::clone(core), Arc::clone(&ends));
    let worker = std::thread::spawn(move || {
        let mut router = core.router(WorkerId(0));
        let (mut longest, mut seen, mut number) = (Duration::ZERO, 0, 0);
        let now = Instant::now();
        while !until.load(Ordering::Relaxed) {
            let start = Instant::now();
            seen += u32::from(router.refresh());
            number += 1;
            let query = query(&router, pool, number, now, false);
            let _decision = black_box(router.route(now, &query));
            longest = longest.max(start.elapsed());
        }
        (longest, seen)
    });
    other();
    ends.store(true, Ordering::Relaxed);
    worker.join().expect("the worker ends")
}

fn show(out: &std::path::Path, name: &str, title: &str, axis: &str, series: &[Series]) {
    println!("\n{title}");
    for Series { name, points } in series {
        for (at, fastest, median) in points {
            println!(
                "  {name:<34} {at:>10} {axis:<9} {fastest:>12.0} ns fastest {median:>12.0} ns median"
            );
        }
    }
    let lines: Vec<_> = series
        .iter()
        .map(|Series { name, points }| json!({ "name": name, "points": points }))
        .collect();
    let all =
        json!({ "title": title, "axis": axis, "unit": "ns: fastest, median", "series": lines });
    std::fs::write(out.join(format!("{name}.json")), format!("{all:#}\n")).expect("written");
    std::fs::write(out.join(format!("scaling-{name}.svg")), plot(title, axis, series))
        .expect("written");
}

/// Medians over a logarithmic axis.
fn plot(title: &str, axis: &str, series: &[Series]) -> String {
    const WIDTH: f64 = 760.0;
    const HEIGHT: f64 = 340.0;
    const LEFT: f64 = 80.0;
    const RIGHT: f64 = 30.0;
    const TOP: f64 = 50.0;
    const BOTTOM: f64 = 60.0;
    const COLOURS: [&str; 3] = ["#2f6fab", "#c05a2b", "#4a8c4a"];
    let points = || series.iter().flat_map(|one| &one.points);
    let most = points().map(|(_, _, median)| *median).fold(1.0, f64::max) * 1.1;
    let log = |at: u64| (at.max(1) as f64).log10();
    let (first, last) = points().fold((f64::MAX, f64::MIN), |(low, high), (at, ..)| {
        (low.min(log(*at)), high.max(log(*at)))
    });
    let x = |at: u64| LEFT + (log(at) - first) / (last - first).max(1e-9) * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| HEIGHT - BOTTOM - value / most * (HEIGHT - TOP - BOTTOM);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"12\" y=\"22\" font-size=\"14\" font-weight=\"bold\">{title}</text>\n\
         <text x=\"12\" y=\"40\" fill=\"#555555\">microseconds, median; across: {axis}, logarithmic</text>\n"
    );
    // Writing to a string cannot fail.
    for part in 0..=4 {
        let value = most * f64::from(part) / 4.0;
        let at = y(value);
        let _infallible = writeln!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#dddddd\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{:.2}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0,
            value / 1_000.0
        );
    }
    for (place, Series { name, points }) in series.iter().enumerate() {
        let colour = COLOURS[place % COLOURS.len()];
        let line: Vec<String> = points
            .iter()
            .map(|(at, _, median)| format!("{:.1},{:.1}", x(*at), y(*median)))
            .collect();
        let _infallible = writeln!(
            svg,
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" points=\"{}\"/><text x=\"{}\" y=\"{}\" fill=\"{colour}\">{name}</text>",
            line.join(" "),
            LEFT + 10.0,
            TOP + 14.0 * (place as f64 + 1.0)
        );
        for (at, _, median) in points {
            let _infallible = writeln!(
                svg,
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{at}</text>",
                x(*at),
                y(*median),
                x(*at),
                HEIGHT - BOTTOM + 16.0 + 14.0 * place as f64
            );
        }
    }
    svg.push_str("</svg>\n");
    svg
}
