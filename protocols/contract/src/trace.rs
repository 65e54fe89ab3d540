//! Telling a trace's messages from all others: the cold side of a tap.
//!
//! None of it runs on a worker: the runtime copies messages into a bounded queue while somebody
//! traces, and a thread of its own asks these.

/// Says which messages belong to one trace. There is one per trace; it is shown, in the order of
/// the wire, every message of the protocol that comes in or goes out while the trace runs, and may
/// remember what it saw (a Call-ID, a Hop-by-Hop identifier) within a bound of its own.
pub trait Tracer: Send {
    /// Whether the message belongs to the trace. The bytes come from the network: anything may be
    /// in them.
    fn wants(&mut self, message: &[u8]) -> bool;
}

/// What a trace follows: `kind:value`, or a value alone, whose kind is the protocol's first.
///
/// A value may hold colons: what stands before the first one is a kind only if it is one of
/// `kinds`.
#[must_use]
pub fn split_key<'a>(key: &'a str, kinds: &[&'static str]) -> Option<(&'static str, &'a str)> {
    if let Some((kind, value)) = key.split_once(':')
        && let Some(known) = kinds.iter().find(|known| **known == kind)
    {
        return Some((*known, value));
    }
    kinds.first().map(|first| (*first, key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_makes_a_kind_only_where_there_is_one() {
        let kinds = &["call-id", "from-user"];
        assert_eq!(split_key("from-user:alice", kinds), Some(("from-user", "alice")));
        assert_eq!(split_key("a:b@c", kinds), Some(("call-id", "a:b@c")));
        assert_eq!(split_key("call-id:a:b", kinds), Some(("call-id", "a:b")));
        assert_eq!(split_key("x", &[]), None);
    }
}
