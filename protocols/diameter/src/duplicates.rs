//! Requests that come again (RFC 6733 5.5.4): answers of the last while, by Origin-Host and
//! End-to-End identifier. Looked at only for requests that bear T.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::time::{Duration, Instant};

use strowger_contract::{ClassId, Note, Outbox, RequestOutcome, stable_hash};

use crate::avp::Summary;
use crate::engine::DiameterEngine;
use crate::pending::{Pending, Pendings};
use crate::relay::{Asked, note};
use crate::rewrite;

/// Answers that are kept on one worker, at most, and their bytes.
const ANSWERS_MAX: usize = 65_536;
const BYTES_MAX: usize = 64 << 20;

/// The answers of the last while.
#[derive(Debug, Default)]
pub(crate) struct Duplicates {
    /// Requests under way, by what they are known by. Some of them have ended since.
    under_way: HashMap<u64, u32>,
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

impl Duplicates {
    /// A request is under way. One that is known as that already stays: this is a further copy.
    fn begins(&mut self, key: u64, identifier: u32, pending: &mut Pendings) {
        /// Those that ended are looked for once they may be most of them.
        const SPARE: usize = 1_024;
        if self.under_way.len() >= 2 * pending.len() + SPARE {
            self.under_way.retain(|_, known| pending.get(*known).is_some());
        }
        let known = self.under_way.entry(key).or_insert(identifier);
        if pending.get(*known).is_none() {
            *known = identifier;
        }
    }
}

impl DiameterEngine {
    /// Lets a request be found that may come again.
    pub(crate) fn note_under_way(&mut self, identifier: u32) {
        if self.settings.options.duplicates.0.is_zero() {
            return;
        }
        let Some(pending) = self.pending.get(identifier) else { return };
        let host = Summary::of(&pending.request).origin_host.unwrap_or_default();
        let key = key(host, pending.end_to_end);
        self.duplicates.begins(key, identifier, &mut self.pending);
    }

    /// A request with T that was answered already gets the same answer; one that is under way gets
    /// its answer once, on the connection that it came over last (RFC 6733 5.5.4).
    pub(crate) fn came_before(
        &mut self,
        now: Instant,
        asked: &Asked<'_>,
        out: &mut Outbox,
    ) -> bool {
        if self.settings.options.duplicates.0.is_zero() {
            return false;
        }
        let host = asked.summary.origin_host.unwrap_or_default();
        let (message, end_to_end) = (asked.message, asked.header.end_to_end);
        let key = key(host, end_to_end);
        if let Some(answer) = self.duplicates.find(key) {
            out.note(Note::Count("diameter_duplicates_answered"));
            let client = self.identity_of(message.from).unwrap_or_default();
            let rules = self.settings.rules_for(message.bytes);
            let changes = &mut self.changes;
            out.send(message.from, ClassId::CONTROL, |bytes| {
                let start = bytes.len();
                rewrite::answer(&answer, asked.header.hop_by_hop, bytes);
                changes.for_client(bytes, start, &client, rules.as_deref());
            });
            let outcome = RequestOutcome::Met;
            note(now, message.arrived, asked.class, outcome, None, Duration::ZERO, out);
            return true;
        }
        let same = |pending: &Pending| {
            pending.end_to_end == end_to_end
                && !pending.lost
                && Summary::of(&pending.request).origin_host == Some(host)
        };
        let known = self.duplicates.under_way.get(&key).copied();
        let found = known.and_then(|known| {
            let pending = self.pending.get(known).filter(|pending| same(pending))?;
            Some([Some(known), pending.twin])
        });
        let found = match (known, found) {
            // What was never sent on, or was too long ago: no need to look at all that are under way.
            (None, _) => Vec::new(),
            (_, Some(copies)) => copies.into_iter().flatten().collect(),
            // That copy of it is gone; another may not be.
            (Some(_), None) => self.pending.find(same),
        };
        let mut arrived = None;
        for identifier in found {
            let Some(pending) = self.pending.get(identifier).filter(|it| !it.lost) else {
                continue;
            };
            pending.origin = message.from;
            pending.hop_by_hop = asked.header.hop_by_hop;
            arrived = Some(pending.arrived);
        }
        let Some(arrived) = arrived else { return false };
        out.note(Note::Count("diameter_duplicates_joined"));
        let outcome = RequestOutcome::Failed;
        note(now, arrived, asked.class, outcome, None, Duration::ZERO, out);
        true
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
