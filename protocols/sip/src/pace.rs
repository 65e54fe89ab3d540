//! How long an instance may be silent, which ones are silent, and how many tries that may cost.
//!
//! An instance that hangs does not refuse: it only says nothing. What it usually takes to give a
//! sign of life tells when that is odd; from the first odd silence on it gets nothing new but one
//! try at a time, in growing intervals, until it speaks.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use strowger_contract::{BackendId, PoolId};

/// Backends that are followed, at most; past it all is forgotten.
const BACKENDS_MAX: usize = 65_536;

/// Answers before an estimate is used.
const SAMPLES_MIN: u8 = 8;

/// The first pause of a silent instance, and the longest.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
const DOUBLINGS_MAX: u8 = 5;

/// Instances that are left out of one choice, at most.
pub(crate) const EXCLUDED_MAX: usize = 32;

/// Jacobson and Karels' estimate of a time.
#[derive(Clone, Copy, Debug, Default)]
struct Estimate {
    mean_us: u32,
    deviation_us: u32,
    samples: u8,
}

impl Estimate {
    fn note(&mut self, took: Duration) {
        let took = u32::try_from(took.as_micros()).unwrap_or(u32::MAX / 16).min(u32::MAX / 16);
        if self.samples == 0 {
            (self.mean_us, self.deviation_us) = (took, took / 2);
        } else {
            let off = took.abs_diff(self.mean_us);
            self.deviation_us = self.deviation_us - self.deviation_us / 4 + off / 4;
            self.mean_us = self.mean_us - self.mean_us / 8 + took / 8;
        }
        self.samples = self.samples.saturating_add(1);
    }

    fn patience(&self) -> Option<Duration> {
        let micros = u64::from(self.mean_us) + 4 * u64::from(self.deviation_us);
        (self.samples >= SAMPLES_MIN).then(|| Duration::from_micros(micros))
    }
}

#[derive(Debug, Default)]
struct Known {
    invite: Estimate,
    other: Estimate,
    /// It gets nothing new until then.
    until: Option<Instant>,
    /// It asked for that itself.
    by_word: bool,
    silences: u8,
    pool: Option<PoolId>,
}

/// What one engine knows of its instances' pace.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    backends: HashMap<BackendId, Known>,
    /// Those with a pause.
    resting: Vec<BackendId>,
    /// Tenths of a retry: each first try adds one, each retry takes ten.
    budget: u32,
    started: bool,
}

/// Retries at rest, and the most that are saved up. DESIGN section 5: 10 % of first tries.
const RETRIES_FIRST: u32 = 100;
const RETRIES_MAX: u32 = 1_000;

impl Pace {
    fn known(&mut self, backend: BackendId) -> &mut Known {
        if self.backends.len() >= BACKENDS_MAX && !self.backends.contains_key(&backend) {
            self.backends.clear();
            self.resting.clear();
        }
        self.backends.entry(backend).or_default()
    }

    /// How long to wait for its first sign of life.
    pub(crate) fn patience(
        &self,
        backend: BackendId,
        invite: bool,
        least: Duration,
        most: Duration,
    ) -> Duration {
        let known = self.backends.get(&backend);
        let estimate =
            known.and_then(
                |known| {
                    if invite { known.invite.patience() } else { known.other.patience() }
                },
            );
        estimate.map_or(most, |estimate| estimate.clamp(least, most))
    }

    /// It gave a sign of life to a request sent `took` ago.
    pub(crate) fn heard(&mut self, backend: BackendId, invite: bool, took: Option<Duration>) {
        let known = self.known(backend);
        let resting = known.until.is_some();
        if let Some(took) = took {
            if invite { known.invite.note(took) } else { known.other.note(took) }
        }
        (known.until, known.silences, known.by_word) = (None, 0, false);
        if resting {
            self.resting.retain(|other| *other != backend);
        }
    }

    /// It said nothing in time, or cannot be reached.
    pub(crate) fn silent(&mut self, now: Instant, backend: BackendId) {
        let known = self.known(backend);
        // All that wait for it find out at once; that is one silence.
        if known.until.is_some_and(|until| until > now) {
            return;
        }
        let pause = PAUSE_FIRST * (1 << known.silences);
        known.silences = (known.silences + 1).min(DOUBLINGS_MAX);
        self.pause(now, backend, pause);
    }

    /// It asked to get nothing new for so long.
    pub(crate) fn rest(&mut self, now: Instant, backend: BackendId, pause: Duration) {
        self.known(backend).by_word = true;
        self.pause(now, backend, pause);
    }

    fn pause(&mut self, now: Instant, backend: BackendId, pause: Duration) {
        let known = self.known(backend);
        known.until = known.until.max(Some(now + pause));
        if !self.resting.contains(&backend) {
            self.resting.push(backend);
        }
    }

    /// Those of a pool that get nothing now. One whose pause is over is let through once, and then
    /// pauses again unless it speaks.
    ///
    /// Silence alone leaves out at most half of those that are known of the pool, the longest silent
    /// ones first: when the machine itself stalls, all seem silent, and whoever is asked last must not
    /// get everything.
    pub(crate) fn resting(&mut self, now: Instant, pool: PoolId, out: &mut Excluded) {
        if self.resting.is_empty() {
            return;
        }
        let backends = &mut self.backends;
        self.resting
            .retain(|backend| backends.get(backend).is_some_and(|known| known.until.is_some()));
        let known = backends.values().filter(|one| one.pool == Some(pool)).count();
        let mut silent = Excluded::new(&[]);
        for backend in &self.resting {
            let Some(state) = backends.get(backend) else { continue };
            if state.pool.is_some_and(|other| other != pool)
                || state.until.is_none_or(|until| until <= now)
            {
                continue;
            }
            if state.by_word {
                out.push(*backend);
            } else {
                silent.push(*backend);
            }
        }
        let silences = |backend: &BackendId| backends.get(backend).map_or(0, |one| one.silences);
        silent.list[..silent.len].sort_by_key(|backend| std::cmp::Reverse(silences(backend)));
        for backend in silent.list().iter().take((known / 2).max(1)) {
            out.push(*backend);
        }
    }

    /// A request was placed there: if its pause was over, that was its one try.
    pub(crate) fn placed(
        &mut self,
        now: Instant,
        backend: BackendId,
        pool: Option<PoolId>,
        patience: Duration,
    ) {
        let known = self.known(backend);
        if known.pool != pool {
            known.pool = pool;
        }
        if self.resting.is_empty() || !self.resting.contains(&backend) {
            return;
        }
        if let Some(known) = self.backends.get_mut(&backend)
            && known.until.is_some_and(|until| until <= now)
        {
            known.until = Some(now + patience);
        }
    }

    /// A first try is made.
    pub(crate) fn first_try(&mut self) {
        if !self.started {
            (self.started, self.budget) = (true, RETRIES_FIRST * 10);
        }
        self.budget = (self.budget + 1).min(RETRIES_MAX * 10);
    }

    /// Whether another try is within the budget; takes it.
    pub(crate) fn take_retry(&mut self) -> bool {
        let has = self.budget >= 10;
        if has {
            self.budget -= 10;
        }
        has
    }
}

/// A short list of backends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Excluded {
    list: [BackendId; EXCLUDED_MAX],
    len: usize,
}

impl Excluded {
    pub(crate) fn new(tried: &[BackendId]) -> Self {
        let mut excluded = Self { list: [BackendId(0); EXCLUDED_MAX], len: 0 };
        for backend in tried {
            excluded.push(*backend);
        }
        excluded
    }

    /// Adds one; whether there was room.
    pub(crate) fn push(&mut self, backend: BackendId) -> bool {
        let place = self.list.get_mut(self.len);
        let fits = place.is_some();
        if let Some(place) = place {
            *place = backend;
            self.len += 1;
        }
        fits
    }

    pub(crate) fn list(&self) -> &[BackendId] {
        &self.list[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: BackendId = BackendId(1);

    const POOL: PoolId = PoolId(1);

    fn resting(pace: &mut Pace, now: Instant) -> bool {
        let mut out = Excluded::new(&[]);
        pace.resting(now, POOL, &mut out);
        out.list().contains(&A)
    }

    #[test]
    fn patience_follows_what_is_usual() {
        let mut pace = Pace::default();
        let (least, most) = (Duration::from_millis(50), Duration::from_secs(2));
        assert_eq!(pace.patience(A, true, least, most), most, "nothing is known");
        for _ in 0..50 {
            pace.heard(A, true, Some(Duration::from_millis(100)));
        }
        let usual = pace.patience(A, true, least, most);
        assert!(
            usual > Duration::from_millis(99) && usual < Duration::from_millis(130),
            "{usual:?}"
        );
        assert_eq!(pace.patience(A, false, least, most), most, "INVITE says nothing of others");
        for _ in 0..100 {
            pace.heard(A, true, Some(Duration::from_millis(1)));
        }
        assert_eq!(pace.patience(A, true, least, most), least);
    }

    #[test]
    fn a_silent_one_is_tried_once_in_growing_intervals_until_it_speaks() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        assert!(!resting(&mut pace, at(0)));
        pace.silent(at(0), A);
        pace.silent(at(1), A);
        assert!(resting(&mut pace, at(999)) && !resting(&mut pace, at(1_000)), "one silence");
        pace.placed(at(1_000), A, Some(POOL), Duration::from_millis(200));
        assert!(resting(&mut pace, at(1_100)), "one try at a time");
        pace.silent(at(1_200), A);
        assert!(resting(&mut pace, at(3_199)) && !resting(&mut pace, at(3_200)), "twice as long");
        pace.heard(A, true, None);
        assert!(!resting(&mut pace, at(1_300)));
    }

    /// A machine that stalls makes everybody seem silent.
    #[test]
    fn silence_leaves_out_half_of_a_pool_at_most_and_a_word_all_that_say_it() {
        let (mut pace, now) = (Pace::default(), Instant::now());
        let all: Vec<BackendId> = (1..=4).map(BackendId).collect();
        for backend in &all {
            pace.placed(now, *backend, Some(POOL), Duration::from_millis(200));
            pace.heard(*backend, true, Some(Duration::from_millis(5)));
        }
        let left_out = |pace: &mut Pace| {
            let mut out = Excluded::new(&[]);
            pace.resting(now, POOL, &mut out);
            out.list().to_vec()
        };
        pace.silent(now - Duration::from_secs(3), all[3]);
        for backend in &all {
            pace.silent(now, *backend);
        }
        let out = left_out(&mut pace);
        assert_eq!((out.len(), out[0]), (2, all[3]), "the one that was silent before is first");
        pace.heard(all[3], false, None);
        assert!(!left_out(&mut pace).contains(&all[3]), "a sign of life is enough");
        for backend in &all {
            pace.heard(*backend, true, None);
            pace.rest(now, *backend, Duration::from_secs(5));
        }
        assert_eq!(left_out(&mut pace).len(), 4);
    }

    #[test]
    fn retries_are_a_tenth_of_tries() {
        let mut pace = Pace::default();
        pace.first_try();
        let saved = (0..10_000).filter(|_| pace.take_retry()).count();
        assert_eq!(saved, RETRIES_FIRST as usize);
        for _ in 0..1_000 {
            pace.first_try();
        }
        assert_eq!((0..10_000).filter(|_| pace.take_retry()).count(), 100);
    }
}
