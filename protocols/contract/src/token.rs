//! The signed text that carries an instance through a protocol field of ours.
//!
//! A token says which (instance, generation) holds a session, and survives what no table does: a
//! restart, another edge node, a grown pool. It is 20 characters of `a-z2-7` (legal anywhere in
//! SIP): 40 bits of [`Pin`], 4 of free use, 56 of MAC (SipHash-2-4 over pin, use, and a binding
//! that the caller chooses, such as the hash of a Call-ID, so that a token cannot be lifted into
//! another session).

use siphasher::sip::SipHasher24;
use std::hash::Hasher;

use crate::Pin;

/// How long a token's text is, in bytes.
pub const TOKEN_BYTES: usize = 20;

/// The text of a token.
pub type Token = [u8; TOKEN_BYTES];

const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
const MAC_BITS: u32 = 56;

/// The keys that sign and check tokens: one that signs, and any that still check, so that a
/// rotation breaks no session.
#[derive(Clone)]
pub struct TokenKeys {
    keys: Vec<[u8; 16]>,
}

impl TokenKeys {
    /// The first key signs; all of them check.
    ///
    /// # Panics
    /// With no key at all.
    #[must_use]
    pub fn new(keys: Vec<[u8; 16]>) -> Self {
        assert!(!keys.is_empty(), "a token needs a key");
        Self { keys }
    }

    /// The keys themselves, for a process that takes over.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<[u8; 16]> {
        self.keys.clone()
    }

    /// The key that signs.
    pub(crate) fn signing(&self) -> &[u8; 16] {
        &self.keys[0]
    }

    /// All keys that check, the one that signs first.
    pub(crate) fn all(&self) -> &[[u8; 16]] {
        &self.keys
    }

    /// Signs `pin` and the low four bits of `mark` for the place that `binding` names.
    #[must_use]
    pub fn seal(&self, pin: Pin, mark: u8, binding: u64) -> Token {
        let mark = mark & 0x0f;
        let mac = mac(&self.keys[0], pin, mark, binding);
        let mut bits =
            u128::from(pin.0) << (4 + MAC_BITS) | u128::from(mark) << MAC_BITS | u128::from(mac);
        let mut text = [0; TOKEN_BYTES];
        for place in text.iter_mut().rev() {
            *place = ALPHABET[(bits & 31) as usize];
            bits >>= 5;
        }
        text
    }

    /// Reads a token back: the pin and the mark, if it was signed by one of the keys for this
    /// binding. Letters may be in either case.
    #[must_use]
    pub fn unseal(&self, text: &[u8], binding: u64) -> Option<(Pin, u8)> {
        if text.len() != TOKEN_BYTES {
            return None;
        }
        let mut bits = 0u128;
        for byte in text {
            let value = match byte {
                b'a'..=b'z' => byte - b'a',
                b'A'..=b'Z' => byte - b'A',
                b'2'..=b'7' => byte - b'2' + 26,
                _ => return None,
            };
            bits = bits << 5 | u128::from(value);
        }
        let claimed = bits as u64 & ((1 << MAC_BITS) - 1);
        let mark = (bits >> MAC_BITS) as u8 & 0x0f;
        let pin = Pin((bits >> (4 + MAC_BITS)) as u64 & ((1 << Pin::BITS) - 1));
        // `|` and not `||`: the time taken does not tell which key matched.
        let good = self
            .keys
            .iter()
            .fold(false, |good, key| good | (mac(key, pin, mark, binding) == claimed));
        good.then_some((pin, mark))
    }
}

impl std::fmt::Debug for TokenKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TokenKeys({} secret)", self.keys.len())
    }
}

fn mac(key: &[u8; 16], pin: Pin, mark: u8, binding: u64) -> u64 {
    let mut hasher = SipHasher24::new_with_key(key);
    hasher.write_u64(pin.0.to_le());
    hasher.write_u64(binding.to_le());
    hasher.write_u8(mark);
    hasher.finish() >> (64 - MAC_BITS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_token_reads_back_and_nothing_else_does(
            pin in 1u64..1 << Pin::BITS, mark in 0u8..16, binding: u64, flip in 0usize..TOKEN_BYTES, by in 1u8..32,
        ) {
            let keys = TokenKeys::new(vec![[7; 16]]);
            let text = keys.seal(Pin(pin), mark, binding);
            prop_assert_eq!(keys.unseal(&text, binding), Some((Pin(pin), mark)));
            prop_assert_eq!(keys.unseal(&text.to_ascii_uppercase(), binding), Some((Pin(pin), mark)));
            prop_assert_eq!(keys.unseal(&text, binding ^ 1), None);
            let mut forged = text;
            let old = ALPHABET.iter().position(|&letter| letter == forged[flip]).unwrap_or(0);
            forged[flip] = ALPHABET[old ^ by as usize];
            prop_assert_eq!(keys.unseal(&forged, binding), None);
            prop_assert_eq!(keys.unseal(&text[1..], binding), None);
        }
    }

    #[test]
    fn an_old_key_still_checks_after_a_rotation() {
        let old = TokenKeys::new(vec![[1; 16]]);
        let rotated = TokenKeys::new(vec![[2; 16], [1; 16]]);
        let text = old.seal(Pin(99), 3, 5);
        assert_eq!(rotated.unseal(&text, 5), Some((Pin(99), 3)));
        assert_eq!(TokenKeys::new(vec![[2; 16]]).unseal(&text, 5), None);
    }
}
