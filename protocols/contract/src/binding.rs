//! Subscriber bindings: which instance has a subscriber, by names that other interfaces know it by.
//!
//! A session that creates a binding (Diameter: a Gx CCR-I) notes all names of its subscriber; others
//! (an Rx AAR that bears only an IP address) are led to the same instance by one of them.

use crate::{BackendId, Keyer};

/// One name of a subscriber, hashed with the node's secret key.
///
/// The lowest bit tells whether the name is *exclusive*: an IP address belongs to whoever got it
/// last, and so the newest session takes it over. Others (an IMSI) are shared by all sessions of the
/// subscriber, live as long as one of them, and lead a new one to the same instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BindingKey(u64);

/// How many names one session may bind: IMSI, IMSI with APN, MSISDN, IPv4 address, IPv6 prefix.
pub const BINDING_KEYS_MAX: usize = 5;

impl BindingKey {
    /// The key of the name `bytes` in `space`, which keeps pools and kinds of names apart.
    #[must_use]
    pub fn new(keyer: &Keyer, space: u8, bytes: &[u8], exclusive: bool) -> Self {
        // Zero stands for "none" in tables.
        let hash = keyer.keyed(space, bytes) & !1 | u64::from(exclusive);
        Self(if hash < 2 { hash | 2 } else { hash })
    }

    /// Whether the newest session takes it over.
    #[must_use]
    pub fn is_exclusive(self) -> bool {
        self.0 & 1 != 0
    }

    /// The whole number; never 0.
    #[must_use]
    pub fn to_bits(self) -> u64 {
        self.0
    }

    /// The reverse of [`BindingKey::to_bits`].
    #[must_use]
    pub fn from_bits(bits: u64) -> Option<Self> {
        (bits != 0).then_some(Self(bits))
    }
}

/// A rate that a token bucket keeps: so many in a second, and so many at once after a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// In a second; over 0.
    pub per_second: u32,
    /// At once.
    pub burst: u32,
}

/// What a protocol tells of a peer for the operators' table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerReport {
    /// What it calls itself.
    pub identity: String,
    /// Its realm.
    pub realm: String,
    /// Its address.
    pub address: String,
    /// A static word for the state it is in.
    pub state: &'static str,
    /// What it can do (Diameter: its applications).
    pub capabilities: Vec<u32>,
    /// Diameter: its Origin-State-Id, if it told one.
    pub state_id: Option<u32>,
    /// The backend whose link the connection is, though that backend opened it.
    pub serves: Option<BackendId>,
}
