//! Requests that come again (RFC 6733 5.5.4): answers of the last while, by Origin-Host and
//! End-to-End identifier. Looked at only for requests that bear T.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::time::{Duration, Instant};

use strowger_contract::stable_hash;

/// Answers that are kept on one worker, at most, and their bytes.
const ANSWERS_MAX: usize = 65_536;
const BYTES_MAX: usize = 64 << 20;

/// The answers of the last while.
#[derive(Debug, Default)]
pub(crate) struct Duplicates {
    answers: HashMap<u64, Rc<[u8]>>,
    order: VecDeque<(u64, Instant)>,
    /// One was let go before its time.
    cut_short: bool,
    bytes: usize,
}

/// What a request is known by.
pub(crate) fn key(origin_host: &[u8], end_to_end: u32) -> u64 {
    let mut bytes = [0; 260];
    let host = &origin_host[..origin_host.len().min(256)];
    bytes[..host.len()].copy_from_slice(host);
    bytes[..host.len()].make_ascii_lowercase();
    bytes[host.len()..host.len() + 4].copy_from_slice(&end_to_end.to_be_bytes());
    stable_hash(&bytes[..host.len() + 4])
}

impl Duplicates {
    /// Whether an answer was let go before its time since this was last asked.
    pub(crate) fn was_cut_short(&mut self) -> bool {
        std::mem::take(&mut self.cut_short)
    }

    /// Keeps an answer for `lasting`.
    pub(crate) fn keep(&mut self, now: Instant, key: u64, answer: &[u8], lasting: Duration) {
        while let Some(&(oldest, until)) = self.order.front() {
            let full = self.order.len() >= ANSWERS_MAX || self.bytes + answer.len() > BYTES_MAX;
            if until > now && !full {
                break;
            }
            self.order.pop_front();
            self.cut_short |= until > now;
            if let Some(gone) = self.answers.remove(&oldest) {
                self.bytes -= gone.len();
            }
        }
        if let Some(old) = self.answers.insert(key, answer.into()) {
            self.bytes -= old.len();
        } else {
            self.order.push_back((key, now + lasting));
        }
        self.bytes += answer.len();
    }

    /// The answer that was given before.
    pub(crate) fn find(&self, key: u64) -> Option<Rc<[u8]>> {
        self.answers.get(&key).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_kept_for_their_time_and_within_bounds() {
        let (now, mut kept) = (Instant::now(), Duplicates::default());
        let lasting = Duration::from_secs(1);
        kept.keep(now, key(b"A.example", 7), b"one", lasting);
        assert_eq!(kept.find(key(b"a.EXAMPLE", 7)).as_deref(), Some(&b"one"[..]));
        assert_eq!(kept.find(key(b"a.example", 8)), None);
        kept.keep(now + lasting, key(b"a.example", 9), b"two", lasting);
        assert_eq!(kept.find(key(b"a.example", 7)), None);
        for number in 0..100_000 {
            kept.keep(now, key(b"b.example", number), &[0; 2_000], lasting);
        }
        assert!(kept.bytes <= BYTES_MAX && kept.order.len() <= ANSWERS_MAX);
        assert_eq!(kept.answers.len(), kept.order.len());
    }
}
