//! What servers tell of their load: DOIC overload reports (RFC 7683, reacting node, loss algorithm)
//! and Load (RFC 8583).

use std::collections::HashMap;
use std::time::{Duration, Instant};

use strowger_contract::{BackendId, PoolId, Router, stable_hash};

use crate::avp::{AVP_MANDATORY, Avp, Avps, HEADER_BYTES, code};
use crate::build::append;
use crate::subscriber::number64;

/// Reports that are kept, at most: hosts and realms by application.
const REPORTS_MAX: usize = 4_096;

/// OC-Report-Type (RFC 7683 7.6).
const HOST_REPORT: u32 = 0;
const REALM_REPORT: u32 = 1;

/// OC-Validity-Duration if none is given, and the longest (RFC 7683 7.5).
const VALIDITY_DEFAULT: u32 = 30;
const VALIDITY_MAX: u32 = 86_400;

/// How long a Load report is heeded: it comes with every answer while there is traffic.
const LOAD_LASTS: Duration = Duration::from_secs(30);

/// Even a server under full load keeps this share, so that it is heard of again.
const LOAD_PERMILLE_MIN: u32 = 20;

/// Load-Type (RFC 8583 7.2): of the node that answered, or of the adjacent peer.
const LOAD_HOST: u32 = 0;
const LOAD_PEER: u32 = 1;

/// Who an overload report is about, with the application.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub(crate) enum About {
    Host(BackendId, u32),
    Realm(u64, PoolId, u32),
}

#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
struct Report {
    sequence: u64,
    reduction: u32,
    #[serde(with = "strowger_contract::handover::moment")]
    until: Instant,
}

/// The overload reports that hold.
#[derive(Debug, Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct Reports {
    held: HashMap<About, Report>,
}

impl Reports {
    /// Percent of requests that must not go.
    pub(crate) fn reduction(&self, now: Instant, about: About) -> u32 {
        if self.held.is_empty() {
            return 0;
        }
        self.held.get(&about).filter(|report| report.until > now).map_or(0, |it| it.reduction)
    }

    /// Whether no more of them can be kept.
    pub(crate) fn is_full(&self) -> bool {
        self.held.len() >= REPORTS_MAX
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Takes an OC-OLR in; whether it is news.
    pub(crate) fn note(&mut self, now: Instant, report: &OverloadReport, about: About) -> bool {
        let known = self.held.get(&about).filter(|known| known.until > now);
        // RFC 7683 5.2.1.2: an old sequence number is ignored.
        if known.is_some_and(|known| report.sequence <= known.sequence) {
            return false;
        }
        if report.validity == 0 || report.reduction == 0 {
            return self.held.remove(&about).is_some();
        }
        if self.held.len() >= REPORTS_MAX {
            self.held.retain(|_, report| report.until > now);
            if self.held.len() >= REPORTS_MAX {
                return false;
            }
        }
        let until = now + Duration::from_secs(u64::from(report.validity));
        let held = Report { sequence: report.sequence, reduction: report.reduction, until };
        self.held.insert(about, held);
        true
    }
}

/// The realm of a report or a request, in any letter case.
pub(crate) fn realm_hash(realm: &[u8]) -> u64 {
    let mut lower = [0; 256];
    let lower = &mut lower[..realm.len().min(256)];
    lower.copy_from_slice(&realm[..lower.len()]);
    lower.make_ascii_lowercase();
    stable_hash(lower)
}

/// An OC-OLR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OverloadReport {
    sequence: u64,
    pub(crate) of_realm: bool,
    pub(crate) reduction: u32,
    validity: u32,
}

impl OverloadReport {
    fn read(avp: &Avp<'_>) -> Option<Self> {
        let (mut sequence, mut kind, mut reduction, mut validity) = (None, None, 0, None);
        for avp in Avps::within(avp.data).map_while(Result::ok).filter(|avp| avp.vendor == 0) {
            match avp.code {
                code::OC_SEQUENCE_NUMBER => sequence = number64(avp.data),
                code::OC_REPORT_TYPE => kind = avp.number(),
                code::OC_REDUCTION_PERCENTAGE => reduction = avp.number()?,
                code::OC_VALIDITY_DURATION => validity = avp.number(),
                _ => {}
            }
        }
        let of_realm = match kind? {
            HOST_REPORT => false,
            REALM_REPORT => true,
            _ => return None,
        };
        // RFC 7683 7.7: over 100 is to be ignored.
        (reduction <= 100).then_some(())?;
        let validity = validity.unwrap_or(VALIDITY_DEFAULT);
        let validity = if validity > VALIDITY_MAX { VALIDITY_DEFAULT } else { validity };
        Some(Self { sequence: sequence?, of_realm, reduction, validity })
    }
}

/// The overload reports of an answer.
pub(crate) fn reports(bytes: &[u8]) -> impl Iterator<Item = OverloadReport> + '_ {
    let found = Avps::of(bytes).map_while(Result::ok).filter(|avp| avp.is(code::OC_OLR));
    found.filter_map(|avp| OverloadReport::read(&avp))
}

/// Heeds a Load report about the backend itself.
pub(crate) fn heed_load(now: Instant, bytes: &[u8], backend: BackendId, router: &mut dyn Router) {
    for avp in Avps::of(bytes).map_while(Result::ok).filter(|avp| avp.is(code::LOAD)) {
        if let (Some(LOAD_HOST | LOAD_PEER), Some(value)) = load(&avp) {
            // RFC 8583 7.3: 0 is idle, 65535 is all that it can.
            let free = 65_535 - value.min(65_535);
            let permille = (free as u32 * 1_000 / 65_535).max(LOAD_PERMILLE_MIN);
            router.favour(now, backend, permille, LOAD_LASTS);
        }
    }
}

fn load(avp: &Avp<'_>) -> (Option<u32>, Option<u64>) {
    let (mut kind, mut value) = (None, None);
    for avp in Avps::within(avp.data).map_while(Result::ok) {
        if avp.is(code::LOAD_TYPE) {
            kind = avp.number();
        } else if avp.is(code::LOAD_VALUE) {
            value = number64(avp.data);
        }
    }
    (kind, value)
}

/// Takes out of the message at `start` what its sender meant for us alone (RFC 8583 6.2).
pub(crate) fn strip_peer_load(out: &mut Vec<u8>, start: usize) {
    let mut ranges = Vec::new();
    let mut at = start + HEADER_BYTES;
    for avp in Avps::of(&out[start..]).map_while(Result::ok) {
        let end = at + avp.whole.len();
        if avp.is(code::LOAD) && load(&avp).0 == Some(LOAD_PEER) {
            ranges.push(at..end);
        }
        at = end;
    }
    for range in ranges.into_iter().rev() {
        out.drain(range);
    }
    let length = (out.len() - start) as u32;
    out[start + 1..start + 4].copy_from_slice(&length.to_be_bytes()[1..]);
}

/// Appends OC-Supported-Features with the loss algorithm (RFC 7683 7.1) to the message at `start`.
pub(crate) fn tell_features(out: &mut Vec<u8>, start: usize) {
    /// OLR_DEFAULT_ALGO.
    const LOSS: u64 = 1;
    let mut group = Vec::with_capacity(16);
    append(&mut group, code::OC_FEATURE_VECTOR, 0, &LOSS.to_be_bytes());
    append(out, code::OC_SUPPORTED_FEATURES, 0, &group);
    let length = (out.len() - start) as u32;
    out[start + 1..start + 4].copy_from_slice(&length.to_be_bytes()[1..]);
}

/// A token bucket of one connection, of two: all that comes, and what is not urgent.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Buckets {
    full_at: [Option<Instant>; 2],
}

impl Buckets {
    /// Takes a place in bucket `which`.
    pub(crate) fn take(&mut self, now: Instant, which: usize, per_second: u32) -> bool {
        if per_second == 0 {
            return false;
        }
        let each = Duration::from_secs(1) / per_second;
        let next = self.full_at[which].unwrap_or(now).max(now) + each;
        // A tenth of a second's worth may come at once.
        let burst = (each * (per_second / 10).max(1)).max(each);
        let fits = next <= now + burst;
        if fits {
            self.full_at[which] = Some(next);
        }
        fits
    }
}

/// Appends an OC-OLR; for tests.
#[cfg(test)]
pub(crate) fn olr(out: &mut Vec<u8>, sequence: u64, kind: u32, reduction: u32, validity: u32) {
    let mut group = Vec::new();
    append(&mut group, code::OC_SEQUENCE_NUMBER, AVP_MANDATORY, &sequence.to_be_bytes());
    append(&mut group, code::OC_REPORT_TYPE, AVP_MANDATORY, &kind.to_be_bytes());
    append(&mut group, code::OC_REDUCTION_PERCENTAGE, 0, &reduction.to_be_bytes());
    append(&mut group, code::OC_VALIDITY_DURATION, 0, &validity.to_be_bytes());
    append(out, code::OC_OLR, 0, &group);
}

#[cfg(not(test))]
const _: u8 = AVP_MANDATORY;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::Builder;

    fn answer(avps: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        Builder::new(&mut bytes, 0x40, 272, 4, 1, 1).raw(avps).finish();
        bytes
    }

    #[test]
    fn reports_hold_for_their_time_and_by_their_sequence() {
        let now = Instant::now();
        let (mut held, about) = (Reports::default(), About::Host(BackendId(1), 4));
        let note = |held: &mut Reports, now, sequence, reduction, validity| {
            let mut avps = Vec::new();
            olr(&mut avps, sequence, HOST_REPORT, reduction, validity);
            let bytes = answer(&avps);
            let report = reports(&bytes).next().expect("a report");
            held.note(now, &report, about)
        };
        assert!(note(&mut held, now, 5, 40, 10));
        assert_eq!(held.reduction(now, about), 40);
        assert!(!note(&mut held, now, 5, 90, 10), "the same one again");
        assert!(!note(&mut held, now, 4, 90, 10), "an old one");
        assert_eq!(held.reduction(now + Duration::from_secs(9), about), 40);
        assert_eq!(held.reduction(now + Duration::from_secs(10), about), 0);
        assert!(note(&mut held, now, 6, 80, 10));
        assert!(note(&mut held, now, 7, 80, 0), "validity 0 ends it");
        assert_eq!(held.reduction(now, about), 0);
        assert_eq!(held.reduction(now, About::Host(BackendId(1), 5)), 0);
        assert!(!note(&mut held, now, 8, 0, 10), "nothing was held");
    }

    #[test]
    fn what_cannot_be_is_ignored() {
        for (kind, reduction) in [(2, 10), (HOST_REPORT, 101)] {
            let mut avps = Vec::new();
            olr(&mut avps, 1, kind, reduction, 10);
            assert_eq!(reports(&answer(&avps)).count(), 0);
        }
    }

    #[test]
    fn peer_load_stays_here_and_host_load_goes_on() {
        let avp = |kind: u32| {
            let (mut group, mut avp) = (Vec::new(), Vec::new());
            append(&mut group, code::LOAD_TYPE, 0, &kind.to_be_bytes());
            append(&mut group, code::LOAD_VALUE, 0, &32_768u64.to_be_bytes());
            append(&mut group, code::SOURCE_ID, 0, b"a.example.net");
            append(&mut avp, code::LOAD, 0, &group);
            avp
        };
        let host = answer(&avp(LOAD_HOST));
        let mut both = vec![7; 5];
        both.extend(answer(&[avp(LOAD_PEER), avp(LOAD_HOST)].concat()));
        strip_peer_load(&mut both, 5);
        assert_eq!(&both[5..], host);
    }

    #[test]
    fn a_bucket_keeps_its_rate() {
        let (mut buckets, now) = (Buckets::default(), Instant::now());
        let passed = (0..1_000u32)
            .filter(|&ms| buckets.take(now + Duration::from_millis(ms.into()), 0, 100))
            .count();
        assert!((99..=111).contains(&passed), "{passed}");
    }
}
