//! The real routing core and the real engines among simulated clients, instances and networks, with
//! a clock of their own and no socket. A shadow of what everybody was told checks that
//!
//! - a session stays with its instance as long as that lives;
//! - no request is answered twice with a final answer;
//! - nothing that was admitted is lost: each request ends, and is counted once;
//! - counts add up: nothing is in flight in the end.
//!
//! `STROWGER_SEED=n` replays one seed, `STROWGER_SEEDS=n` runs as many (default 200).

mod classes;
mod diameter;
mod diameter_accepted;
mod diameter_mutations;
mod diameter_waits;
mod hedge;
#[allow(dead_code, unreachable_pub, reason = "other tests use more of it")]
#[path = "../support/rig.rs"]
mod rig;
mod sip;
mod sip_bench;
mod sip_cases;
mod sip_endings;
mod sip_hiding;
mod sip_impaired;
mod sip_outbound;
mod sip_overload;
mod world;

use std::panic::catch_unwind;

fn run(name: &str, simulate: fn(u64)) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    if let Some(seed) = number("STROWGER_SEED") {
        return simulate(seed);
    }
    let seeds = 1..=number("STROWGER_SEEDS").unwrap_or(200);
    let failed: Vec<u64> = seeds.filter(|&seed| catch_unwind(|| simulate(seed)).is_err()).collect();
    assert!(
        failed.is_empty(),
        "seeds {failed:?} failed; to replay one: STROWGER_SEED={} cargo test --test sim {name}",
        failed[0]
    );
}

#[test]
fn sip_calls_and_messages() {
    run("sip_calls_and_messages", sip::simulate);
}

#[test]
fn diameter_sessions() {
    run("diameter_sessions", diameter::simulate);
}
