//! What is known of a backend from moment to moment. It outlives snapshots: the next one takes it
//! over by the backend's identity. All of it is atomics; no message takes a lock here.

mod links;
mod saved;

pub(super) use saved::SavedLive;

use std::sync::Mutex;
use std::sync::atomic::{
    AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst,
};
use std::time::Duration;

use strowger_contract::{Lanes, Link, Outcome, Rate};

use super::qos::AdaptiveLimit;

/// How many capabilities of one backend are remembered. A CER of a 3GPP node names about ten
/// applications.
pub const CAPABILITIES_MAX: usize = 32;

/// The capability that stands for all (Diameter's relay application).
const CAPABILITY_ANY: u32 = 0xffff_ffff;

/// What a refusal or a failure counts as in the latency estimate: a backend that fails fast must
/// not look fast (linkerd records 5 s for the same reason).
const FAULT_LATENCY: Duration = Duration::from_secs(5);

/// At this load by its owner's word (percent) an instance takes no more than it has.
const LOAD_FULL: u32 = 100;

/// Below this load (percent) it takes again what its other limits let it. What lies between keeps
/// what was said, so that a load around the limit does not open and close it with each heartbeat.
const LOAD_FREE: u32 = 90;

/// The latency estimate's weight of the newest value is one in so many.
const LATENCY_SMOOTHING: u64 = 8;

const UNKNOWN: u8 = 0;
const UP: u8 = 1;
const SUSPECT: u8 = 2;
const DOWN: u8 = 3;

/// The live state of one backend. Times are milliseconds of the core's clock; 0 means never.
#[derive(Debug, Default)]
pub struct BackendLive {
    health: AtomicU8,
    rises: AtomicU32,
    falls: AtomicU32,
    link: AtomicU8,
    /// Where each of its links stands: bits as in [`Lanes`].
    lanes_up: AtomicU32,
    lanes_down: AtomicU32,
    lanes_introducing: AtomicU32,
    /// How many of its links are congested.
    congested: AtomicU32,
    /// How many slots its sessions had given back when that was looked at last.
    released: AtomicU32,
    /// When it answered last.
    answered_at: AtomicU64,
    /// The number that grows when it starts anew; 0: none was told.
    start: AtomicU32,
    grudges: links::Grudges,
    in_flight: AtomicU32,
    /// The most since the last look.
    most_in_flight: AtomicU32,
    reported: AtomicU32,
    adaptive: AtomicU32,
    sampled: AtomicU64,
    sampled_us: AtomicU64,
    gradient: Mutex<AdaptiveLimit>,
    latency_us: AtomicU64,
    faults: AtomicU32,
    ejected_until: AtomicU64,
    ejections: AtomicU32,
    joined: AtomicU64,
    /// While it starts slowly, the part of its slots that new sessions may have, in thousandths; 0: all.
    window: AtomicU32,
    drain_since: AtomicU64,
    drain_until: AtomicU64,
    gone: AtomicBool,
    superseded: AtomicBool,
    identity_hash: AtomicU64,
    identity: Mutex<String>,
    capabilities: [AtomicU32; CAPABILITIES_MAX],
    capability_count: AtomicU32,
    favour_permille: AtomicU32,
    favour_until: AtomicU64,
    buckets: [AtomicU64; 2],
    /// What its owner says of its load, in percent plus one; 0: nothing.
    load: AtomicU32,
    /// The slots that follow from its load; 0: no limit.
    by_load: AtomicU32,
    /// The last minute, for its owner.
    pub(super) recent: super::report::Recent,
    /// Requests sent to it.
    pub(super) requests: AtomicU64,
    /// Answers that do not speak against it.
    pub(super) answered: AtomicU64,
    /// Answers that say it cannot.
    pub(super) refused: AtomicU64,
    /// Answers that did not come in time.
    pub(super) timed_out: AtomicU64,
    /// Lost with a connection.
    pub(super) lost: AtomicU64,
}

/// A change that somebody should hear of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LiveChange {
    Up,
    Down,
}

impl BackendLive {
    /// One that joined at `joined`; 0 if it was there from the start and needs no slow start.
    pub(super) fn new(joined: u64) -> Self {
        let live = Self::default();
        live.joined.store(joined, Relaxed);
        live
    }

    /// Counts an active check's result.
    pub(super) fn probed(&self, healthy: bool, rise: u32, fall: u32) -> Option<LiveChange> {
        let health = self.health.load(Relaxed);
        if healthy {
            self.falls.store(0, Relaxed);
            let rises = self.rises.fetch_add(1, Relaxed).saturating_add(1);
            // The first result of a backend's life needs no confirmation: it is unknown until then.
            let enough = rises >= rise || health == UNKNOWN;
            if health != UP && enough {
                self.health.store(UP, Relaxed);
                return (health == DOWN).then_some(LiveChange::Up);
            }
        } else {
            self.rises.store(0, Relaxed);
            let falls = self.falls.fetch_add(1, Relaxed).saturating_add(1);
            if health != DOWN && falls >= fall {
                self.health.store(DOWN, Relaxed);
                return Some(LiveChange::Down);
            }
        }
        None
    }

    /// No active check any more: what the last one said is void.
    pub(super) fn forget_health(&self) {
        self.health.store(UNKNOWN, Relaxed);
    }

    /// Its active checks failed.
    pub(super) fn is_down(&self) -> bool {
        self.health.load(Relaxed) == DOWN
    }

    /// Takes a link's news in; whether the backend came up or went down by it. It is up as long as
    /// one of its links is.
    pub(super) fn link(&self, lane: u8, link: Link<'_>) -> Option<LiveChange> {
        let bit = Lanes::bit(lane);
        let put = |place: &AtomicU32, set: bool| {
            if set { place.fetch_or(bit, SeqCst) } else { place.fetch_and(!bit, SeqCst) }
        };
        put(&self.lanes_introducing, matches!(link, Link::Introducing));
        if let Link::Introducing = link {
            return None;
        }
        put(&self.lanes_down, matches!(link, Link::Down(_)));
        put(&self.lanes_up, matches!(link, Link::Up { .. }));
        if let Link::Up { identity, capabilities } = link {
            self.set_identity(identity);
            self.set_capabilities(capabilities);
        }
        let (state, change) = match link {
            _ if self.lanes_up.load(SeqCst) != 0 => (UP, LiveChange::Up),
            Link::Suspect => (SUSPECT, LiveChange::Down),
            _ => (DOWN, LiveChange::Down),
        };
        let before = self.link.swap(state, Relaxed);
        let was_up = before == UP;
        ((state == UP) != was_up || before == UNKNOWN).then_some(change)
    }

    /// Whether its link lets messages through; `needed` when there must be one.
    pub(super) fn link_allows(&self, needed: bool) -> bool {
        match self.link.load(Relaxed) {
            UP => true,
            UNKNOWN => !needed,
            // Where links are opened on demand, the next message may open it.
            _ => !needed,
        }
    }

    /// Where its links stand.
    pub(super) fn lanes(&self) -> Lanes {
        Lanes {
            up: self.lanes_up.load(SeqCst),
            down: self.lanes_down.load(SeqCst),
            introducing: self.lanes_introducing.load(SeqCst),
            given_up: self.given_up(),
        }
    }

    /// Notes that it answered.
    pub(super) fn note_answer(&self, now: u64) {
        self.answered_at.store(now, Relaxed);
    }

    /// When it answered last; 0: never.
    pub(super) fn answered_at(&self) -> u64 {
        self.answered_at.load(Relaxed)
    }

    /// Notes the number that grows when it starts anew; whether it grew.
    pub(super) fn note_start(&self, number: u32, fresh: bool) -> bool {
        let known = if fresh {
            self.start.swap(number, Relaxed)
        } else {
            self.start.fetch_max(number, Relaxed)
        };
        known != 0 && number > known
    }

    /// A word for the link's state.
    pub(super) fn link_word(&self) -> &'static str {
        match self.link.load(Relaxed) {
            UP => "up",
            SUSPECT => "suspect",
            DOWN => "down",
            _ => "unknown",
        }
    }

    fn set_identity(&self, identity: &[u8]) {
        let hash = if identity.is_empty() { 0 } else { identity_hash(identity) };
        self.identity_hash.store(hash, Relaxed);
        if let Ok(mut name) = self.identity.lock() {
            name.clear();
            name.push_str(&String::from_utf8_lossy(identity));
        }
    }

    /// What it calls itself.
    pub(super) fn identity(&self) -> String {
        self.identity.lock().map(|name| name.clone()).unwrap_or_default()
    }

    /// Whether it calls itself so, by [`identity_hash`].
    pub(super) fn is_called(&self, hash: u64) -> bool {
        self.identity_hash.load(Relaxed) == hash
    }

    fn set_capabilities(&self, capabilities: &[u32]) {
        // Readers that look in between see a mixture of old and new, and the next one all of it.
        let count = capabilities.len().min(CAPABILITIES_MAX);
        for (place, &capability) in self.capabilities.iter().zip(capabilities) {
            place.store(capability, Relaxed);
        }
        self.capability_count.store(count as u32, Relaxed);
    }

    /// What it said it can do.
    pub(super) fn capabilities(&self) -> impl Iterator<Item = u32> {
        let count = self.capability_count.load(Relaxed) as usize;
        self.capabilities.iter().take(count).map(|capability| capability.load(Relaxed))
    }

    /// Whether it can do what is asked; one that said nothing can do anything.
    pub(super) fn can(&self, capability: u32) -> bool {
        capability == 0
            || self.capability_count.load(Relaxed) == 0
            || self.capabilities().any(|known| known == capability || known == CAPABILITY_ANY)
    }

    /// Scales its share of new sessions until then.
    pub(super) fn favour(&self, permille: u32, until: u64) {
        self.favour_permille.store(permille.min(1_000), Relaxed);
        self.favour_until.store(until, Relaxed);
    }

    /// The part of its share that it wants now, in thousandths.
    pub(super) fn favoured(&self, now: u64) -> u32 {
        if self.favour_until.load(Relaxed) <= now {
            return 1_000;
        }
        self.favour_permille.load(Relaxed)
    }

    /// Takes a place in a bucket at nanosecond `now` (the generic cell rate algorithm: one number, the
    /// time at which the bucket will be full again).
    pub(super) fn pace(&self, now: u64, bucket: usize, rate: Rate) -> bool {
        let Some(full_at) = self.buckets.get(bucket) else { return true };
        let each = 1_000_000_000 / u64::from(rate.per_second.max(1));
        let reach = each * u64::from(rate.burst.max(1));
        let next = |full_at: u64| {
            let next = full_at.max(now) + each;
            (next - now <= reach).then_some(next)
        };
        full_at.fetch_update(Relaxed, Relaxed, next).is_ok()
    }

    /// Its owner says how loaded it is, in percent, while `taken` slots are taken. Full, it has as many
    /// slots as are taken now (as it had, if it was full before: what ends makes room); over that, less in
    /// proportion, but never none, since an instance without work cannot show that it has recovered.
    pub(super) fn set_load(&self, load: Option<u32>, taken: u32) {
        self.load.store(load.map_or(0, |load| load.saturating_add(1)), Relaxed);
        match load {
            Some(load) if load >= LOAD_FULL => {
                let known = self.by_load.load(Relaxed);
                let base = if known > 0 { known } else { taken };
                let slots = u64::from(base) * u64::from(LOAD_FULL) / u64::from(load);
                self.by_load.store(u32::try_from(slots).unwrap_or(u32::MAX).max(1), Relaxed);
            }
            Some(LOAD_FREE..) => {}
            _ => self.by_load.store(0, Relaxed),
        }
    }

    /// How loaded it is by its owner's word, in percent.
    #[must_use]
    pub fn load(&self) -> Option<u32> {
        self.load.load(Relaxed).checked_sub(1)
    }

    /// How many slots sessions gave back since the last look. By one caller.
    pub(super) fn released_since(&self, released: u32) -> u32 {
        released.wrapping_sub(self.released.swap(released, Relaxed))
    }

    /// The queue of one of its links is full, or no longer.
    pub(super) fn set_congested(&self, congested: bool) {
        let change = |known: u32| {
            Some(if congested { known.saturating_add(1) } else { known.saturating_sub(1) })
        };
        let _now = self.congested.fetch_update(Relaxed, Relaxed, change);
    }

    pub(super) fn is_congested(&self) -> bool {
        self.congested.load(Relaxed) > 0
    }

    /// A request goes out.
    pub(super) fn begin(&self) {
        self.in_flight.fetch_add(1, SeqCst);
        self.requests.fetch_add(1, Relaxed);
    }

    /// A request is in flight that another process sent.
    pub(super) fn resume(&self) {
        self.in_flight.fetch_add(1, SeqCst);
    }

    /// Takes a slot if fewer than `limit` are taken (`held` of them by sessions).
    pub(super) fn try_begin(&self, limit: Option<u32>, held: u32) -> bool {
        let Some(limit) = limit else {
            self.in_flight.fetch_add(1, SeqCst);
            return true;
        };
        let taken = self.in_flight.fetch_update(SeqCst, Relaxed, |known| {
            (known.saturating_add(held) < limit).then(|| known.saturating_add(1))
        });
        if let Ok(before) = taken
            && before >= self.most_in_flight.load(Relaxed)
        {
            self.most_in_flight.store(before + 1, Relaxed);
        }
        taken.is_ok()
    }

    /// A request goes out on a slot that was taken.
    pub(super) fn count_request(&self) {
        self.requests.fetch_add(1, Relaxed);
    }

    /// A slot was taken for nothing.
    pub(super) fn give_back(&self) {
        self.end(1);
    }

    /// What the agent says that it can have in flight; 0: nothing was said.
    pub(super) fn set_reported(&self, slots: u32) {
        self.reported.store(slots, Relaxed);
    }

    /// The slots that it has by the agent's word (of slots, of load) and by the adaptive limit.
    pub(super) fn limit(&self) -> Option<u32> {
        let known = |limit: &AtomicU32| Some(limit.load(Relaxed)).filter(|&limit| limit > 0);
        let limits = [&self.reported, &self.by_load, &self.adaptive];
        limits.into_iter().filter_map(known).min()
    }

    /// Looks at what it answered since the last time, and sets the adaptive limit, or lifts it.
    pub(super) fn review_limit(&self, adapts: bool) {
        let (samples, sum) = (self.sampled.swap(0, Relaxed), self.sampled_us.swap(0, Relaxed));
        let most = self.most_in_flight.swap(self.in_flight.load(Relaxed), Relaxed);
        if !adapts {
            self.adaptive.store(0, Relaxed);
            return;
        }
        if let Ok(mut gradient) = self.gradient.lock() {
            let limit = gradient.review(samples, Duration::from_micros(sum), most);
            self.adaptive.store(limit, Relaxed);
        }
    }

    /// `count` requests ended.
    pub(super) fn end(&self, count: u32) {
        let _now =
            self.in_flight.fetch_update(SeqCst, Relaxed, |known| Some(known.saturating_sub(count)));
    }

    /// How many requests are under way.
    pub(super) fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// Takes an outcome in; how many faults in a row there are now.
    pub(super) fn judge(&self, outcome: Outcome) -> u32 {
        match outcome {
            Outcome::Answered { latency } | Outcome::Ended { latency, .. } => {
                self.sampled.fetch_add(1, Relaxed);
                self.sampled_us.fetch_add(
                    u64::try_from(latency.as_micros()).unwrap_or(u64::MAX).min(1 << 40),
                    Relaxed,
                );
                self.answered.fetch_add(1, Relaxed);
                self.note_latency(latency);
                self.faults.store(0, Relaxed);
                return 0;
            }
            Outcome::Refused => self.refused.fetch_add(1, Relaxed),
            Outcome::TimedOut => self.timed_out.fetch_add(1, Relaxed),
            Outcome::Lost => self.lost.fetch_add(1, Relaxed),
            Outcome::Abandoned => return self.faults.load(Relaxed),
        };
        self.note_latency(FAULT_LATENCY);
        self.faults.fetch_add(1, Relaxed).saturating_add(1)
    }

    fn note_latency(&self, latency: Duration) {
        let new = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX).max(1);
        let old = self.latency_us.load(Relaxed);
        // A lost update of two workers at once only costs one sample.
        let next =
            if old == 0 { new } else { old - old / LATENCY_SMOOTHING + new / LATENCY_SMOOTHING };
        self.latency_us.store(next.max(1), Relaxed);
    }

    /// The latency estimate in microseconds; 0 if unknown.
    pub(super) fn latency_us(&self) -> u64 {
        self.latency_us.load(Relaxed)
    }

    /// Ejects it; the time until which.
    pub(super) fn eject(&self, now: u64, first: Duration) -> u64 {
        const DOUBLINGS_MAX: u32 = 10;
        let ejections = self.ejections.fetch_add(1, Relaxed).min(DOUBLINGS_MAX);
        let length = (first.as_millis() as u64).saturating_mul(1 << ejections).max(1);
        let until = now.saturating_add(length);
        self.ejected_until.store(until, Relaxed);
        self.faults.store(0, Relaxed);
        until
    }

    /// Whether it is ejected.
    pub(super) fn is_ejected(&self, now: u64) -> bool {
        self.ejected_until.load(Relaxed) > now
    }

    /// Ends an ejection whose time has come; whether one ended.
    pub(super) fn end_ejection(&self, now: u64) -> bool {
        let until = self.ejected_until.load(Relaxed);
        until != 0 && until <= now && {
            self.ejected_until.store(0, Relaxed);
            // It starts slowly again, as one that joins.
            self.joined.store(now, Relaxed);
            true
        }
    }

    /// It came back from being down: it starts slowly.
    pub(super) fn rejoin(&self, now: u64) {
        self.joined.store(now, Relaxed);
        self.ejections.store(0, Relaxed);
    }

    /// The part of its weight that it has while it starts slowly, in thousandths.
    pub(super) fn ramp(&self, now: u64, slow_start: Duration) -> u32 {
        let joined = self.joined.load(Relaxed);
        let length = slow_start.as_millis() as u64;
        if joined == 0 || length == 0 {
            return 1_000;
        }
        let age = now.saturating_sub(joined);
        if age >= length { 1_000 } else { (age * 1_000 / length).max(20) as u32 }
    }

    /// Looks at how far its slow start is.
    pub(super) fn review_window(&self, now: u64, slow_start: Duration) {
        let ramp = self.ramp(now, slow_start);
        self.window.store(if ramp < 1_000 { ramp.max(1) } else { 0 }, Relaxed);
    }

    /// What is left of a limit for new sessions while it starts slowly: at least one.
    pub(super) fn windowed(&self, limit: u32) -> u32 {
        match self.window.load(Relaxed) {
            0 => limit,
            ramp => (u64::from(limit) * u64::from(ramp) / 1_000).max(1) as u32,
        }
    }

    /// Starts a drain that ends at `until`.
    pub(super) fn drain(&self, now: u64, until: u64) {
        self.drain_since.store(now.max(1), Relaxed);
        self.drain_until.store(until.max(1), Relaxed);
    }

    /// Ends a drain before its time.
    pub(super) fn undrain(&self) {
        self.drain_since.store(0, Relaxed);
        self.drain_until.store(0, Relaxed);
        self.gone.store(false, Relaxed);
    }

    pub(super) fn is_draining(&self) -> bool {
        self.drain_until.load(Relaxed) != 0
    }

    /// When the drain ends at the latest.
    pub(super) fn drain_until(&self) -> u64 {
        self.drain_until.load(Relaxed)
    }

    /// Its sessions are dead.
    pub(super) fn set_gone(&self) {
        self.gone.store(true, Relaxed);
    }

    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Relaxed) || self.is_superseded()
    }

    /// Another instance has its address now, or it is back.
    pub(super) fn set_superseded(&self, superseded: bool) {
        self.superseded.store(superseded, Relaxed);
    }

    pub(super) fn is_superseded(&self) -> bool {
        self.superseded.load(Relaxed)
    }

    /// A word for its health, worst first.
    pub(super) fn health_word(&self, now: u64, needs_link: bool) -> &'static str {
        if needs_link && !self.link_allows(true) {
            "link_down"
        } else if self.is_down() {
            "down"
        } else if self.is_ejected(now) {
            "ejected"
        } else if self.is_congested() {
            "congested"
        } else if self.health.load(Relaxed) == UNKNOWN && self.link.load(Relaxed) != UP {
            "unknown"
        } else {
            "up"
        }
    }
}

/// The hash that identities are compared by, in any letter case (RFC 6733 compares host names so).
pub(super) fn identity_hash(identity: &[u8]) -> u64 {
    let mut hasher = xxhash_rust::xxh3::Xxh3Default::new();
    let mut lower = [0; 64];
    for chunk in identity.chunks(lower.len()) {
        let lower = &mut lower[..chunk.len()];
        lower.copy_from_slice(chunk);
        lower.make_ascii_lowercase();
        hasher.update(lower);
    }
    // Zero means none.
    hasher.digest().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rise_and_fall_are_counted_in_a_row() {
        let live = BackendLive::new(0);
        assert_eq!(live.probed(true, 3, 2), None, "unknown to up is no event");
        assert_eq!(live.probed(false, 3, 2), None);
        assert_eq!(live.probed(true, 3, 2), None, "a good one in between starts anew");
        assert_eq!(live.probed(false, 3, 2), None);
        assert_eq!(live.probed(false, 3, 2), Some(LiveChange::Down));
        assert!(live.is_down());
        assert_eq!(live.probed(true, 3, 2), None);
        assert_eq!(live.probed(true, 3, 2), None);
        assert_eq!(live.probed(true, 3, 2), Some(LiveChange::Up));
        assert!(!live.is_down());
    }

    #[test]
    fn a_full_instance_takes_no_more_than_it_has_until_it_says_that_there_is_room() {
        let live = BackendLive::new(0);
        live.set_load(Some(99), 12);
        assert_eq!(live.limit(), None, "not full");
        live.set_load(Some(100), 12);
        assert_eq!(live.limit(), Some(12));
        live.set_load(Some(100), 3);
        assert_eq!(live.limit(), Some(12), "what ends makes room");
        live.set_load(Some(150), 12);
        assert_eq!(live.limit(), Some(8), "over its limit: less, in proportion");
        live.set_load(Some(95), 8);
        assert_eq!(live.limit(), Some(8), "near it: as it was");
        live.set_load(Some(u32::MAX), 8);
        assert_eq!(live.limit(), Some(1), "never none");
        live.set_reported(5);
        live.set_load(Some(89), 1);
        assert_eq!(live.limit(), Some(5), "the other word stands");
        live.set_load(Some(100), 7);
        live.set_load(None, 7);
        assert_eq!((live.limit(), live.load()), (Some(5), None), "nothing said, nothing meant");
    }

    #[test]
    fn only_its_own_faults_count() {
        let live = BackendLive::new(0);
        assert_eq!(live.judge(Outcome::TimedOut), 1);
        assert_eq!(live.judge(Outcome::Abandoned), 1);
        assert_eq!(live.judge(Outcome::Lost), 2);
        assert_eq!(live.judge(Outcome::Answered { latency: Duration::from_millis(5) }), 0);
        assert_eq!(live.judge(Outcome::Refused), 1);
    }

    #[test]
    fn a_fast_refusal_does_not_look_fast() {
        let live = BackendLive::new(0);
        live.judge(Outcome::Answered { latency: Duration::from_millis(1) });
        let before = live.latency_us();
        live.judge(Outcome::Refused);
        assert!(live.latency_us() > before * 100);
    }

    #[test]
    fn ejections_double() {
        let live = BackendLive::new(0);
        let second = Duration::from_secs(1);
        assert_eq!(live.eject(0, second), 1_000);
        assert!(live.is_ejected(999) && !live.is_ejected(1_000));
        assert!(live.end_ejection(1_000));
        assert!(!live.end_ejection(1_001));
        assert_eq!(live.eject(1_001, second), 3_001);
    }

    #[test]
    fn slow_start_ramps_and_ends() {
        let live = BackendLive::new(1_000);
        let ten = Duration::from_secs(10);
        assert_eq!(live.ramp(1_000, ten), 20);
        assert_eq!(live.ramp(6_000, ten), 500);
        assert_eq!(live.ramp(11_000, ten), 1_000);
        assert_eq!(BackendLive::new(0).ramp(5, ten), 1_000, "not at process start");
    }

    #[test]
    fn a_bucket_keeps_its_rate_and_its_burst() {
        let (live, rate) = (BackendLive::new(0), Rate { per_second: 1_000, burst: 10 });
        let taken =
            |from: u64, to: u64| (from..to).filter(|us| live.pace(us * 1_000, 0, rate)).count();
        // Asked every microsecond: ten at once, then one in each millisecond.
        assert_eq!(taken(1_000_000, 1_000_100), 10);
        assert_eq!(taken(1_001_000, 1_101_000), 100);
        assert!(live.pace(0, 1, rate), "the other bucket is another");
    }

    #[test]
    fn favour_ends_by_itself() {
        let live = BackendLive::new(0);
        live.favour(400, 2_000);
        assert_eq!((live.favoured(1_999), live.favoured(2_000)), (400, 1_000));
    }

    #[test]
    fn identities_compare_in_any_case() {
        assert_eq!(identity_hash(b"PCRF-a.Example.NET"), identity_hash(b"pcrf-A.example.net"));
        assert_ne!(identity_hash(b"a"), identity_hash(b"b"));
    }
}
