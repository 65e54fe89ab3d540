//! Micro benches: what one step of the data's way costs. `cargo bench --bench micro`.
#![allow(missing_docs)]

mod rig;

use std::time::{Duration, Instant};

use divan::{Bencher, black_box, counter::ItemsCount};
use rig::{DiameterRig, SipRig, core, invite, key};
use strowger::routing::BindingTable;
use strowger_contract::{Attempt, BindingKey, ClassId, Keyer, Query, Router, WorkerId};
use strowger_sip::Mode;
use strowger_sip::scan::Scan;

fn main() {
    divan::main();
}

/// Where things are in a 1.3 kB INVITE.
#[divan::bench(sample_size = 1_000)]
fn sip_scan(bencher: Bencher<'_, '_>) {
    let message = invite();
    let mut scan = Scan::default();
    bencher.counter(ItemsCount::new(1u32)).bench_local(|| scan.scan(black_box(&message)).is_ok());
}

/// INVITE scanned, routed, rewritten; by the stateless proxy, which keeps nothing.
#[divan::bench(sample_size = 1_000)]
fn sip_invite_stateless(bencher: Bencher<'_, '_>) {
    let mut rig = SipRig::new(Instant::now(), Mode::Stateless, 4);
    bencher.counter(ItemsCount::new(1u32)).bench_local(|| rig.invite());
}

/// An INVITE refused for want of slots: scanned, asked for, answered with 503.
#[divan::bench(sample_size = 1_000)]
fn sip_invite_refused(bencher: Bencher<'_, '_>) {
    let mut rig = SipRig::overloaded(Instant::now());
    let told = rig.invite_refused();
    let told = String::from_utf8_lossy(&told);
    assert!(told.contains("SIP/2.0 503"), "{told}");
    bencher.counter(ItemsCount::new(1u32)).bench_local(|| rig.invite());
}

/// A whole call (INVITE, 180, 200, ACK, BYE, 200) by the stateful proxy, with its timers.
#[divan::bench(sample_size = 1_000)]
fn sip_call_stateful(bencher: Bencher<'_, '_>) {
    let mut rig = SipRig::new(Instant::now(), Mode::Stateful, 4);
    let mut ok = Vec::new();
    bencher.counter(ItemsCount::new(6u32)).bench_local(|| {
        rig.call(&mut ok);
        rig.pass(Duration::from_millis(5));
    });
}

/// A 500 B request there and its answer back.
#[divan::bench(sample_size = 1_000)]
fn diameter_relay_there_and_back(bencher: Bencher<'_, '_>) {
    let mut rig = DiameterRig::new(Instant::now(), 4);
    bencher.counter(ItemsCount::new(2u32)).bench_local(|| {
        rig.request();
        rig.answer();
        rig.pass(Duration::from_micros(900));
    });
}

/// A 500 B request refused for want of slots: read, asked for, answered with 3004.
#[divan::bench(sample_size = 1_000)]
fn diameter_refused(bencher: Bencher<'_, '_>) {
    let mut rig = DiameterRig::overloaded(Instant::now());
    rig.request();
    assert_eq!(rig.told(), Some(3_004));
    bencher.counter(ItemsCount::new(1u32)).bench_local(|| rig.request());
}

/// One decision for a new session.
#[divan::bench(sample_size = 1_000, args = [10, 1_000, 10_000])]
fn route(bencher: Bencher<'_, '_>, backends: usize) {
    let now = Instant::now();
    let (core, pool) = core(now, backends, "udp://127.0.0.", "    balance: hash\n");
    let mut router = core.router(WorkerId(0));
    let mut number = 0;
    bencher.counter(ItemsCount::new(1u32)).bench_local(|| {
        number += 1;
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
        router.route(now, &query)
    });
}

/// A look-up among a million sessions.
#[divan::bench(sample_size = 1_000)]
fn session_lookup_among_a_million(bencher: Bencher<'_, '_>) {
    let now = Instant::now();
    let (core, pool) = core(now, 10, "udp://127.0.0.", "");
    let mut router = core.router(WorkerId(0));
    let backend = core.snapshot().pool(pool).expect("the pool").backends().next().expect("one").id;
    let sessions = 900_000;
    for number in 0..sessions {
        let session = key(&router, number);
        router.learn(now, session, backend, ClassId::SETUP, Duration::from_secs(3_600));
    }
    let mut number = 0u64;
    bencher.counter(ItemsCount::new(1u32)).bench_local(|| {
        number = (number + 7_919) % sessions;
        let session = key(&router, number);
        router.lookup(now, session)
    });
}

/// The next snapshot of 10,000 backends, from a wanted state.
#[divan::bench(sample_count = 10)]
fn snapshot_of_10_000_backends(bencher: Bencher<'_, '_>) {
    bencher.bench_local(|| core(Instant::now(), 10_000, "udp://127.0.0.", ""));
}

fn subscriber(number: u64) -> [BindingKey; 4] {
    let keyer = Keyer::new([7; 16]);
    std::array::from_fn(|kind| {
        BindingKey::new(&keyer, kind as u8, &number.to_le_bytes(), kind >= 2)
    })
}

/// A look-up among 200,000 subscribers with four names each (152 bytes a session in all, see
/// `BYTES_PER_BINDING`).
#[divan::bench(sample_size = 1_000)]
fn binding_lookup(bencher: Bencher<'_, '_>) {
    const SUBSCRIBERS: u64 = 200_000;
    let table = BindingTable::new(1 << 18, strowger::runtime::prefer_large_pages);
    for number in 0..SUBSCRIBERS {
        table.bind(number + 1, &subscriber(number), 1, (0, 100), false, |_| true);
    }
    let names: Vec<BindingKey> =
        (0..4_096).map(|at| subscriber(at * 48)[at as usize % 4]).collect();
    let mut at = 0;
    bencher.counter(ItemsCount::new(1u32)).bench_local(|| {
        at += 1;
        table.get(names[at % names.len()], 1)
    });
}

/// A session of four names that begins and ends, among 200,000 others.
#[divan::bench(sample_size = 1_000)]
fn binding_begins_and_ends(bencher: Bencher<'_, '_>) {
    let table = BindingTable::new(1 << 18, strowger::runtime::prefer_large_pages);
    for number in 0..200_000 {
        table.bind(number + 1, &subscriber(number), 1, (0, 100), false, |_| true);
    }
    let names = subscriber(1_000_000);
    bencher.counter(ItemsCount::new(1u32)).bench_local(|| {
        table.bind(0x9e37_79b9_7f4a_7c15, &names, 1, (0, 100), false, |_| true);
        table.unbind(0x9e37_79b9_7f4a_7c15)
    });
}
