//! No bound bites in silence: the first time that one does on a listener, it is an event that tells
//! its name. (Those of the routing core are told by the core itself.)

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

/// What engines and the runtime count when a bound bites, and the bound's name as an operator knows
/// it: an option's path, or the constant's.
const BOUNDS: [(&str, &str); 19] = [
    ("sip_transactions_limit", "options.max_transactions"),
    ("sip_over_source_limit", "options.limits (of one source)"),
    ("sip_over_method_limit", "options.limits (of a method)"),
    ("sip_over_caller_limit", "options.limits (of one caller)"),
    ("sip_retry_budget_empty", "the listener's retry budget"),
    ("sip_calls_not_followed", "calls followed at once (RECORDS_MAX)"),
    ("sip_looks_left_out", "unreachable addresses that are looked for (LOOKS)"),
    ("too_many_wait_for_names", "requests that wait for names (HELD_MAX)"),
    ("diameter_pending_limit", "options.peer_pending"),
    ("diameter_reports_full", "overload reports that are kept (REPORTS_MAX)"),
    ("diameter_duplicates_full", "answers kept for duplicates (ANSWERS_MAX, BYTES_MAX)"),
    ("diameter_redirects_full", "redirections that are kept (KEPT_MAX)"),
    ("diameter_ingress_limit", "options.ingress"),
    ("diameter_rules_too_long", "a message's length after rules"),
    ("waiting_flow_full", "datagrams kept for a waiting flow (KEPT_DATAGRAMS_MAX, KEPT_BYTES_MAX)"),
    ("backpressure", "capacity (backpressure)"),
    ("over_per_source", "limits.per_source"),
    ("overflow", "limits.queued_bytes"),
    ("kernel", "the socket's send buffer"),
];

/// The bound that a counted word tells of, if it tells of one.
fn named(word: &str) -> Option<&'static str> {
    BOUNDS.iter().find(|(counted, _)| *counted == word).map(|(_, name)| *name)
}

/// Bounds that have bitten.
#[derive(Debug, Default)]
pub(super) struct Bites {
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    ever: HashSet<(String, &'static str)>,
    news: Vec<(String, &'static str)>,
}

impl Bites {
    /// A word was counted for the first time on some worker.
    pub(super) fn counted(&self, listener: &str, word: &str) {
        if let Some(bound) = named(word) {
            self.bite(listener, bound);
        }
    }

    /// A bound bit.
    pub(super) fn bite(&self, listener: &str, bound: &'static str) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (listener.to_owned(), bound);
        if known.ever.insert(key.clone()) {
            known.news.push(key);
        }
    }

    /// Those that bit for the first time since this was last asked: (listener, bound).
    pub(super) fn take(&self) -> Vec<(String, &'static str)> {
        std::mem::take(&mut self.known.lock().unwrap_or_else(PoisonError::into_inner).news)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_told_once_by_listener() {
        let bites = Bites::default();
        for _ in 0..3 {
            bites.counted("edge", "diameter_pending_limit");
            bites.counted("edge", "malformed");
            bites.bite("edge", "limits.connections");
            bites.counted("other", "diameter_pending_limit");
        }
        let told = bites.take();
        assert_eq!(told.len(), 3, "{told:?}");
        assert!(told.contains(&("other".to_owned(), "options.peer_pending")));
        assert!(bites.take().is_empty());
    }

    /// Words that end as bounds' do are bounds, or it is said here why they are none.
    #[test]
    fn no_word_of_a_bound_is_forgotten() {
        const NONE: [&str; 1] = ["udp_max"];
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/");
        let mut folders: Vec<std::path::PathBuf> = [
            "protocols/sip/src",
            "protocols/diameter/src",
            "protocols/tcp/src",
            "protocols/udp/src",
            "src/runtime",
        ]
        .map(|folder| format!("{root}{folder}").into())
        .into();
        let mut seen = 0;
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
                if entry.path().is_dir() {
                    folders.push(entry.path());
                    continue;
                }
                let text = std::fs::read_to_string(entry.path()).expect("a source");
                let noted = ["Note::Count(\"", "drop_message(\"", ".count(\""];
                for word in noted.into_iter().flat_map(|call| text.split(call).skip(1)) {
                    let word = word.split('"').next().unwrap_or_default();
                    let bound = ["_limit", "_max", "_full", "_empty", "too_long", "too_many"];
                    if bound.iter().any(|part| word.contains(part)) && !NONE.contains(&word) {
                        assert!(named(word).is_some(), "`{word}` is a bound without a name");
                        seen += 1;
                    }
                }
            }
        }
        assert!(seen >= 5, "{seen}");
    }
}
