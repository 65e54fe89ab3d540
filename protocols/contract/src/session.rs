//! Session keys.
//!
//! Two hashes of the same bytes: a *stable* one (xxh3 with a published seed) that every node and
//! every restart agrees on, to place by; and a *keyed* one (SipHash-1-3 with a secret key), to look
//! up by, because attackers choose Call-IDs and Session-Ids.

use siphasher::sip::SipHasher13;
use std::hash::Hasher;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// The seed of the placing hash. Published: nodes of one cluster must agree.
pub const PLACEMENT_SEED: u64 = 0x5374_726f_7767_6572;

/// The placing hash of `bytes` alone: the same on every node and after every restart.
#[must_use]
pub fn stable_hash(bytes: &[u8]) -> u64 {
    xxh3_64_with_seed(bytes, PLACEMENT_SEED)
}

/// What identifies a session to the routing core.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct SessionKey {
    /// The hash to place by.
    pub stable: u64,
    /// The hash to look up by.
    pub keyed: u64,
}

/// Makes session keys.
#[derive(Clone)]
pub struct Keyer {
    key: [u8; 16],
}

impl Keyer {
    /// `key` is secret; it is drawn anew at each start.
    #[must_use]
    pub fn new(key: [u8; 16]) -> Self {
        Self { key }
    }

    /// The secret itself, for a process that takes over.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 16] {
        self.key
    }

    /// The key of the session that `bytes` names. `space` keeps kinds of names apart (a Call-ID and
    /// a Session-Id of the same bytes are two sessions); it does not enter the placing hash.
    #[must_use]
    pub fn session(&self, space: u8, bytes: &[u8]) -> SessionKey {
        SessionKey {
            stable: xxh3_64_with_seed(bytes, PLACEMENT_SEED),
            keyed: self.keyed(space, bytes),
        }
    }

    /// As [`Keyer::session`], for names that mean something only among pools that share them
    /// ([`crate::Router::session_scope`]): elsewhere the same name is another session. It is placed
    /// by the name alone.
    #[must_use]
    pub fn session_in(&self, space: u8, scope: u64, bytes: &[u8]) -> SessionKey {
        let mut hasher = SipHasher13::new_with_key(&self.key);
        hasher.write(bytes);
        hasher.write_u8(space);
        hasher.write_u64(scope);
        SessionKey { keyed: hasher.finish(), ..self.session(space, bytes) }
    }

    /// The keyed hash alone.
    #[must_use]
    pub fn keyed(&self, space: u8, bytes: &[u8]) -> u64 {
        let mut hasher = SipHasher13::new_with_key(&self.key);
        hasher.write(bytes);
        hasher.write_u8(space);
        hasher.finish()
    }
}

impl std::fmt::Debug for Keyer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keyer(secret)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_placing_hash_is_published_and_the_other_is_not() {
        let (one, two) = (Keyer::new([1; 16]), Keyer::new([2; 16]));
        let key = one.session(0, b"a84b4c76e66710");
        assert_eq!(key.stable, two.session(0, b"a84b4c76e66710").stable);
        assert_ne!(key.keyed, two.session(0, b"a84b4c76e66710").keyed);
        assert_ne!(key.keyed, one.session(1, b"a84b4c76e66710").keyed);
    }
}
