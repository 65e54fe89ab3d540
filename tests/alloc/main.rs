//! No heap allocation per relayed message in steady state, through the real engines and the real
//! core. Counts are exact, so this is a test and not a bench.
#![allow(missing_docs)]

#[path = "../../benches/rig.rs"]
mod rig;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::{Duration, Instant};

use rig::{DiameterRig, SipRig};
use strowger_sip::Mode;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

/// Counts this thread's allocations.
struct Counting;

#[allow(unsafe_code, reason = "the trait's methods are unsafe; each only counts and passes on")]
// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    // SAFETY: as the trait's contract, which is passed on.
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps `GlobalAlloc::alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    // SAFETY: as the trait's contract, which is passed on.
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps `GlobalAlloc::dealloc`'s contract.
        unsafe { System.dealloc(pointer, layout) }
    }

    // SAFETY: as the trait's contract, which is passed on.
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        COUNT.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps `GlobalAlloc::realloc`'s contract.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations(work: impl FnOnce()) -> u64 {
    let before = COUNT.with(Cell::get);
    work();
    COUNT.with(Cell::get) - before
}

#[test]
fn the_count_counts() {
    assert!(allocations(|| drop(std::hint::black_box(Vec::<u8>::with_capacity(64)))) > 0);
}

/// Calls for so long of the engine's time that every slot of the timer wheel has had its fill
/// (262 s at its third level); then more of the same.
fn calls(mode: Mode) -> (u64, u64) {
    let mut sip = SipRig::new(Instant::now(), mode, 4);
    let mut ok = Vec::with_capacity(8_192);
    let mut round = |sip: &mut SipRig| {
        let mut messages = 0;
        for _ in 0..1_000 {
            messages += sip.call(&mut ok);
            sip.pass(Duration::from_millis(20));
        }
        messages
    };
    for _ in 0..20 {
        round(&mut sip);
    }
    let mut messages = 0;
    let count = allocations(|| {
        for _ in 0..10 {
            messages += round(&mut sip);
        }
    });
    (count, messages)
}

#[test]
fn a_stateful_sip_call_allocates_nothing() {
    let (count, messages) = calls(Mode::Stateful);
    assert_eq!(count, 0, "{count} allocations for {messages} messages");
}

#[test]
fn a_stateless_sip_call_allocates_nothing() {
    let (count, messages) = calls(Mode::Stateless);
    assert_eq!(count, 0, "{count} allocations for {messages} messages");
}

#[test]
fn a_relayed_diameter_transaction_allocates_nothing() {
    let mut diameter = DiameterRig::new(Instant::now(), 4);
    let mut round = || {
        let mut count = 0;
        for _ in 0..1_000 {
            count += allocations(|| {
                diameter.request();
                diameter.answer();
            });
            // The peers' upkeep, a few times a second whatever the traffic, is not counted.
            diameter.pass(Duration::from_millis(10));
        }
        count
    };
    for _ in 0..30 {
        round();
    }
    let count: u64 = (0..10).map(|_| round()).sum();
    assert_eq!(count, 0, "{count} allocations for 20,000 messages");
}
