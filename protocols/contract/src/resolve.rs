//! Names of next hops: what an engine asks, and what it hears.
//!
//! An engine never waits. It wants a [`crate::Command::Resolve`], goes on with other messages, and
//! hears [`crate::Engine::on_resolved`] with its own number. An answer may be lost (a full mailbox, a
//! worker that started again): who holds something for it holds it for a bounded time.

use std::net::SocketAddr;

use crate::Transport;

/// An engine's own number for a question; it comes back with the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LookupId(pub u64);

/// Letters of a name, at most (RFC 1035 2.3.4).
pub const HOST_NAME_MAX: usize = 253;

/// Places in an answer, at most: some domains have hundreds of records, and nobody tries more.
pub const PLACES_MAX: usize = 16;

/// How a name is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NameScheme {
    /// RFC 3263 for a `sip:` URI.
    Sip,
    /// RFC 3263 for a `sips:` URI: only what is secure.
    Sips,
    /// RFC 3263 section 5: where a response goes whose Via names a host. No NAPTR; SRV by the
    /// transport where there is no port.
    SipResponse,
}

/// A set of transports: what the asking listener can send over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Transports(u8);

impl Transports {
    /// None.
    pub const NONE: Self = Self(0);

    /// With one more.
    #[must_use]
    pub const fn with(self, transport: Transport) -> Self {
        Self(self.0 | 1 << transport as u8)
    }

    /// Whether it is among them.
    #[must_use]
    pub const fn has(self, transport: Transport) -> bool {
        self.0 & 1 << transport as u8 != 0
    }
}

impl FromIterator<Transport> for Transports {
    fn from_iter<I: IntoIterator<Item = Transport>>(transports: I) -> Self {
        transports.into_iter().fold(Self::NONE, Self::with)
    }
}

/// What is asked of a name. The name itself stands in the outbox's arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lookup {
    /// How.
    pub scheme: NameScheme,
    /// The transport, where the URI or the Via says it.
    pub transport: Option<Transport>,
    /// The port, where the URI or the Via says it.
    pub port: Option<u16>,
    /// What may be chosen from.
    pub transports: Transports,
    /// Whether addresses of IPv4 can be reached.
    pub ipv4: bool,
    /// Whether addresses of IPv6 can be reached.
    pub ipv6: bool,
    /// Draws the order among equals (RFC 2782): the same seed, the same order while the records are
    /// the same, so that what is sent on without memory stays together (RFC 3263 4.1).
    pub seed: u64,
}

/// A place that a name leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// What it is reached by.
    pub transport: Transport,
    /// Where.
    pub address: SocketAddr,
}

/// Why a name leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unresolved {
    /// There is no such name, or nothing under it that can be used: asking again helps nobody.
    NoSuchName,
    /// No name server answered, or not in time: later it may be known.
    NoAnswer,
    /// Too many questions are under way.
    Busy,
    /// It is no name at all.
    Malformed,
}

impl Unresolved {
    /// Stable word for metrics and logs.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::NoSuchName => "no_such_name",
            Self::NoAnswer => "no_answer",
            Self::Busy => "busy",
            Self::Malformed => "malformed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_has_what_was_put_in() {
        let all = [
            Transport::Udp,
            Transport::Tcp,
            Transport::Tls,
            Transport::Ws,
            Transport::Wss,
            Transport::Unix,
            Transport::Sctp,
        ];
        for (index, transport) in all.iter().enumerate() {
            let set: Transports = all[..index].iter().copied().collect();
            assert!(!set.has(*transport));
            assert!(set.with(*transport).has(*transport));
        }
    }
}
