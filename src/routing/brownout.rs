//! The brown-out ladder: what the node gives up, step by step, when it is short of itself (its
//! loops' time, memory, descriptors), so that what it keeps it keeps well.
//!
//! | step | what it does |
//! |---|---|
//! | 1 | idle connections are closed sooner: the idle timeouts are halved, and halved again by each further step |
//! | 2 | tier 3 (bulk) is refused |
//! | 3 | tier 2 (mobility) is refused |
//! | 4 | a part of tier 1 (set-up) is refused, as large as the pressure asks for |
//! | 5 | all of tier 1 is refused, and no connection is accepted |
//!
//! Sessions that exist, emergencies and the protocols' own upkeep go on at every step.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use strowger_contract::ClassId;

use super::core::Core;

/// Where each step begins, in parts of what [`BrownoutSpec`] calls full.
const STEPS: [f64; 5] = [0.70, 0.80, 0.88, 0.94, 1.0];

/// A step is left when the pressure is so far under where it begins.
const MARGIN: f64 = 0.05;

/// Loop lag is averaged over so long: one long turn is no shortage.
const LAG_OVER_MS: f64 = 2_000.0;

/// How fast the refused part of set-up follows: thousandths a second, for each hundredth over where
/// step 4 begins. It is there within a second or two, and does not swing.
const RATIO_GAIN: f64 = 80.0;

/// No idle timeout is shrunk under this: what is in use must be able to breathe.
const IDLE_MIN: Duration = Duration::from_secs(10);

/// Classes that refusals are counted of; as many as a configuration may have.
const CLASSES_MAX: usize = 64;

/// What counts as full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BrownoutSpec {
    /// Whether there is a ladder at all.
    pub enabled: bool,
    /// So late do the workers come to what they want to do, averaged over 2 s.
    pub loop_lag: Duration,
    /// Percent of the memory that the node may use.
    pub memory: u8,
    /// Percent of the descriptors that the process may have.
    pub descriptors: u8,
    /// For so long must the pressure be lower before a step is left.
    pub hysteresis: Duration,
}

impl Default for BrownoutSpec {
    fn default() -> Self {
        Self {
            enabled: true,
            // T1 of RFC 3261: later, and each request over UDP comes twice.
            loop_lag: Duration::from_millis(500),
            memory: 90,
            descriptors: 95,
            hysteresis: Duration::from_secs(5),
        }
    }
}

/// What the node has of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pressure {
    /// The latest that a worker came to what it wanted to do since the last look.
    pub loop_lag: Duration,
    /// Used memory, in thousandths of what there may be.
    pub memory_permille: u32,
    /// Open descriptors, likewise.
    pub descriptors_permille: u32,
}

/// From one step to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Where it was: 0 (nothing is given up) to 5.
    pub from: u8,
    /// Where it is.
    pub to: u8,
    /// What it is short of most: `loop_lag`, `memory` or `descriptors`.
    pub resource: &'static str,
    /// That, in percent of what counts as full.
    pub percent: u32,
}

/// The ladder as operators see it.
#[derive(Clone, Debug, Serialize)]
pub struct BrownoutView {
    /// 0 (nothing is given up) to 5.
    pub step: u8,
    /// Each resource's use in parts of what counts as full; 1 is step 5.
    pub pressure: [(&'static str, f64); 3],
    /// The part of set-up that is refused, in thousandths.
    pub setup_refused_permille: u32,
    /// Steps taken up and down.
    pub steps: [(&'static str, u64); 2],
    /// Requests refused, by class.
    #[serde(skip)]
    pub refused: Vec<u64>,
}

/// The ladder itself: plain data and arithmetic.
#[derive(Clone, Debug, Default)]
struct Ladder {
    step: u8,
    lag_ms: f64,
    /// Since when the pressure has been low enough to go down.
    calm_since: Option<u64>,
    seen_at: Option<u64>,
    /// Thousandths of set-up that are refused at step 4.
    ratio: f64,
    pressure: [(&'static str, f64); 3],
    steps: [u64; 2],
}

impl Ladder {
    fn review(&mut self, spec: &BrownoutSpec, now_ms: u64, seen: Pressure) -> Option<Step> {
        let passed = self.seen_at.map_or(0, |then| now_ms.saturating_sub(then)) as f64;
        self.seen_at = Some(now_ms);
        let fades = 1.0 - (-passed / LAG_OVER_MS).exp();
        self.lag_ms += (seen.loop_lag.as_secs_f64() * 1_000.0 - self.lag_ms) * fades;
        let full_lag = spec.loop_lag.as_secs_f64() * 1_000.0;
        let part = |permille: u32, percent: u8| f64::from(permille) / 10.0 / f64::from(percent);
        self.pressure = [
            ("loop_lag", self.lag_ms / full_lag.max(1.0)),
            ("memory", part(seen.memory_permille, spec.memory.max(1))),
            ("descriptors", part(seen.descriptors_permille, spec.descriptors.max(1))),
        ];
        let (resource, most) = self.most();
        let most = if spec.enabled { most } else { 0.0 };
        let from = self.step;
        let up = STEPS.get(usize::from(from)).is_some_and(|begins| most >= *begins);
        let here = usize::from(from).checked_sub(1).map_or(f64::INFINITY, |at| STEPS[at]);
        if up {
            self.calm_since = None;
            self.step += 1;
        } else if from > 0 && most < here - MARGIN {
            let since = *self.calm_since.get_or_insert(now_ms);
            if now_ms.saturating_sub(since) >= spec.hysteresis.as_millis() as u64 {
                // The next one down is waited for as long again.
                self.calm_since = Some(now_ms);
                self.step -= 1;
            }
        } else {
            self.calm_since = None;
        }
        self.follow_ratio(most, passed);
        if self.step == from {
            return None;
        }
        self.steps[usize::from(self.step < from)] += 1;
        let percent = (most * 100.0).min(f64::from(u32::MAX)) as u32;
        Some(Step { from, to: self.step, resource, percent })
    }

    fn most(&self) -> (&'static str, f64) {
        let mut most = self.pressure[0];
        for other in &self.pressure[1..] {
            if other.1 > most.1 {
                most = *other;
            }
        }
        most
    }

    /// The refused part of set-up: what makes the pressure go back under where step 4 begins.
    fn follow_ratio(&mut self, most: f64, passed_ms: f64) {
        self.ratio = match self.step {
            0..=3 => 0.0,
            4 => {
                let error = (most - (STEPS[3] - MARGIN / 2.0)) * 100.0;
                (self.ratio + error * RATIO_GAIN * passed_ms / 1_000.0).clamp(100.0, 950.0)
            }
            _ => 1_000.0,
        };
    }
}

/// The ladder, as all workers see it: an atomic or two.
#[derive(Debug)]
pub(super) struct Brownout {
    step: AtomicU8,
    ratio: AtomicU32,
    refused: Vec<AtomicU64>,
    inner: Mutex<(BrownoutSpec, Ladder)>,
}

impl Default for Brownout {
    fn default() -> Self {
        Self {
            step: AtomicU8::new(0),
            ratio: AtomicU32::new(0),
            refused: (0..CLASSES_MAX).map(|_| AtomicU64::new(0)).collect(),
            inner: Mutex::default(),
        }
    }
}

impl Brownout {
    fn inner(&self) -> MutexGuard<'_, (BrownoutSpec, Ladder)> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set(&self, spec: BrownoutSpec) {
        self.inner().0 = spec;
    }

    pub(super) fn review(&self, now_ms: u64, seen: Pressure) -> Option<Step> {
        let (spec, ladder) = &mut *self.inner();
        let step = ladder.review(spec, now_ms, seen);
        self.step.store(ladder.step, Relaxed);
        self.ratio.store(ladder.ratio as u32, Relaxed);
        step
    }

    /// The step that the node is on.
    pub(super) fn step(&self) -> u8 {
        self.step.load(Relaxed)
    }

    /// Whether a new request of that tier is refused; `roll` is a random number.
    pub(super) fn refuses(&self, tier: u8, roll: u64) -> bool {
        match tier {
            0 => false,
            1 => roll % 1_000 < u64::from(self.ratio.load(Relaxed)),
            2 => self.step() >= 3,
            _ => self.step() >= 2,
        }
    }

    pub(super) fn count(&self, class: ClassId) {
        if let Some(count) = self.refused.get(usize::from(class.0)) {
            count.fetch_add(1, Relaxed);
        }
    }

    /// An idle timeout as it is now; zero, no timeout, stays so.
    pub(super) fn idle(&self, timeout: Duration) -> Duration {
        match self.step() {
            0 => timeout,
            step => (timeout / (1 << step)).max(timeout.min(IDLE_MIN)),
        }
    }

    pub(super) fn view(&self) -> BrownoutView {
        let (_, ladder) = &*self.inner();
        BrownoutView {
            step: ladder.step,
            pressure: ladder.pressure,
            setup_refused_permille: ladder.ratio as u32,
            steps: [("up", ladder.steps[0]), ("down", ladder.steps[1])],
            refused: self.refused.iter().map(|count| count.load(Relaxed)).collect(),
        }
    }
}

impl Core {
    /// What the ladder goes by from now on.
    pub fn set_brownout(&self, spec: BrownoutSpec) {
        self.brownout().set(spec);
    }

    /// What the node has of itself now; whether that takes it a step up or down. Call it every
    /// 100 ms or so.
    pub fn press(&self, now: Instant, seen: Pressure) -> Option<Step> {
        self.brownout().review(self.clock(now), seen)
    }

    /// Whether the node is on the last step: nobody new is let in.
    #[must_use]
    pub fn stops_accepting(&self) -> bool {
        usize::from(self.brownout().step()) >= STEPS.len()
    }

    /// The step that the ladder is on, 0 to 5.
    #[must_use]
    pub fn brownout_step(&self) -> u8 {
        self.brownout().step()
    }

    /// An idle timeout as the ladder leaves it.
    #[must_use]
    pub fn idle(&self, timeout: Duration) -> Duration {
        self.brownout().idle(timeout)
    }

    /// The ladder, for operators.
    #[must_use]
    pub fn brownout_view(&self) -> BrownoutView {
        self.brownout().view()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptors(permille: u32) -> Pressure {
        Pressure { descriptors_permille: permille, ..Pressure::default() }
    }

    fn spec() -> BrownoutSpec {
        BrownoutSpec { descriptors: 100, ..BrownoutSpec::default() }
    }

    #[test]
    fn it_climbs_a_step_at_a_look_and_comes_down_slowly() {
        let (mut ladder, spec, mut now) = (Ladder::default(), spec(), 0);
        let mut look = |ladder: &mut Ladder, permille| {
            now += 100;
            ladder.review(&spec, now, descriptors(permille))
        };
        assert_eq!(look(&mut ladder, 690), None);
        let step = look(&mut ladder, 1_000).expect("up");
        let wanted = Step { from: 0, to: 1, resource: "descriptors", percent: 100 };
        assert_eq!(step, wanted);
        for to in 2..=5 {
            assert_eq!(look(&mut ladder, 1_000).map(|step| step.to), Some(to));
        }
        assert_eq!(look(&mut ladder, 1_000), None, "there is no step 6");
        // Just under where it begins is not under it.
        for _ in 0..200 {
            assert_eq!(look(&mut ladder, 960), None);
        }
        let mut looks = Vec::new();
        for index in 0..400 {
            looks.extend(look(&mut ladder, 100).map(|step| (index, step.to)));
        }
        assert_eq!(looks, [(50, 4), (100, 3), (150, 2), (200, 1), (250, 0)]);
    }

    #[test]
    fn what_swings_around_a_step_does_not_make_it_swing() {
        let (mut ladder, spec) = (Ladder::default(), spec());
        let steps = (0..1_000_u64).filter_map(|look| {
            let permille = if look % 2 == 0 { 810 } else { 700 };
            ladder.review(&spec, look * 100, descriptors(permille))
        });
        assert_eq!(steps.count(), 2, "up to 2, and there it stays");
    }

    #[test]
    fn lag_is_averaged_and_one_long_turn_is_no_shortage() {
        let (mut ladder, spec) = (Ladder::default(), spec());
        let lag = |ms| Pressure { loop_lag: Duration::from_millis(ms), ..Pressure::default() };
        for look in 0..100 {
            let one = if look == 50 { 5_000 } else { 1 };
            assert_eq!(ladder.review(&spec, look * 100, lag(one)), None, "look {look}");
        }
        let mut top = 0;
        for look in 100..200 {
            let step = ladder.review(&spec, look * 100, lag(600));
            top = step.map_or(top, |step| step.to);
        }
        assert_eq!(top, 5);
    }

    #[test]
    fn each_step_gives_up_what_it_says() {
        let brownout = Brownout::default();
        brownout.set(spec());
        let hour = Duration::from_secs(3_600);
        let mut now = 0;
        let mut to = |brownout: &Brownout, permille: u32| {
            for _ in 0..30 {
                now += 100;
                let _step = brownout.review(now, descriptors(permille));
            }
        };
        // (pressure, step, of a thousand refused by tier, an idle hour)
        for (permille, step, refused, idle) in [
            (500, 0, [0, 0, 0, 0], 3_600),
            (720, 1, [0, 0, 0, 0], 1_800),
            (820, 2, [0, 0, 0, 1_000], 900),
            (900, 3, [0, 0, 1_000, 1_000], 450),
            (1_000, 5, [0, 1_000, 1_000, 1_000], 112),
        ] {
            to(&brownout, permille);
            assert_eq!(brownout.step(), step);
            for (tier, wanted) in refused.into_iter().enumerate() {
                let count = (0..1_000).filter(|roll| brownout.refuses(tier as u8, *roll)).count();
                assert_eq!(count, wanted, "tier {tier} on step {step}");
            }
            assert_eq!(brownout.idle(hour).as_secs(), idle, "step {step}");
        }
        assert_eq!(brownout.idle(Duration::ZERO), Duration::ZERO);
        assert_eq!(brownout.idle(Duration::from_secs(4)), Duration::from_secs(4));
        brownout.set(BrownoutSpec { enabled: false, ..spec() });
        for look in 0..1_000 {
            let _step = brownout.review(100_000 + look * 100, descriptors(1_000));
        }
        assert_eq!(brownout.step(), 0, "switched off");
    }

    /// Set-up is refused by as much as it takes: the model's pressure is what set-up makes of it.
    #[test]
    fn the_refused_part_of_set_up_finds_what_the_pressure_asks_for() {
        let (mut ladder, spec, mut pressure) = (Ladder::default(), spec(), 0.97_f64);
        let mut refused = 0.0;
        for look in 0..1_200_u64 {
            let permille = (pressure * 1_000.0) as u32;
            let _step = ladder.review(&spec, look * 100, descriptors(permille));
            // All of set-up would push it to 1.3 in the long run, none of it to 0.6.
            let wanted = 1.3 - 0.7 * ladder.ratio / 1_000.0;
            pressure += (wanted - pressure) * 0.05;
            if look >= 600 {
                refused += ladder.ratio / 600_000.0;
            }
        }
        assert!((0.85..1.0).contains(&pressure), "{pressure}");
        assert!((0.35..0.75).contains(&refused), "{refused}");
    }
}
