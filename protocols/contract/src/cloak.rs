//! Text that only the holders of the token keys can read: what is hidden from one side of the edge, and
//! carried by it, so that nobody has to remember it.
//!
//! The text is encrypted with a stream of SipHash-2-4 blocks, whose nonce is the text's own keyed hash: the
//! same text always looks the same, as repetitions of a message must, and the hash vouches for it when it
//! comes back (a synthetic nonce, as in RFC 5297). It is written in the 64 letters of RFC 4648 5, which
//! are legal in a SIP user, token and Call-ID.

use std::hash::Hasher;

use siphasher::sip::SipHasher24;

use crate::TokenKeys;

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
const NONCE_BYTES: usize = 8;

/// How long a cloaked text is for one of so many bytes.
#[must_use]
pub fn cloaked_len(bytes: usize) -> usize {
    ((bytes + NONCE_BYTES) * 8).div_ceil(6)
}

/// Whether a byte may stand in a cloaked text.
#[must_use]
pub fn is_cloaked(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')
}

/// One key for the nonce and one for the stream, so that neither tells of the other or of tokens.
struct Pair {
    nonce: [u8; 16],
    stream: [u8; 16],
}

impl Pair {
    fn of(key: &[u8; 16]) -> Self {
        let half = |label: u8| {
            let mut hasher = SipHasher24::new_with_key(key);
            hasher.write(b"cloak");
            hasher.write_u8(label);
            hasher.finish()
        };
        let whole = |label: u8| {
            let (low, high) = (half(label), half(label + 1));
            (u128::from(high) << 64 | u128::from(low)).to_le_bytes()
        };
        Self { nonce: whole(0), stream: whole(2) }
    }

    fn nonce(&self, kind: u8, text: &[u8]) -> u64 {
        let mut hasher = SipHasher24::new_with_key(&self.nonce);
        hasher.write_u8(kind);
        hasher.write(text);
        hasher.finish()
    }

    fn block(&self, nonce: u64, number: u64) -> [u8; 8] {
        let mut hasher = SipHasher24::new_with_key(&self.stream);
        hasher.write_u64(nonce.to_le());
        hasher.write_u64(number.to_le());
        hasher.finish().to_le_bytes()
    }

    fn apply(&self, nonce: u64, text: &mut [u8]) {
        for (number, part) in text.chunks_mut(8).enumerate() {
            let block = self.block(nonce, number as u64);
            part.iter_mut().zip(block).for_each(|(byte, mask)| *byte ^= mask);
        }
    }
}

/// Bytes on their way into letters of six bits.
#[derive(Default)]
struct Letters {
    bits: u32,
    held: u32,
}

impl Letters {
    fn put(&mut self, byte: u8, out: &mut Vec<u8>) {
        self.bits = self.bits << 8 | u32::from(byte);
        self.held += 8;
        while self.held >= 6 {
            self.held -= 6;
            out.push(ALPHABET[(self.bits >> self.held & 63) as usize]);
        }
        self.bits &= (1 << self.held) - 1;
    }

    fn end(self, out: &mut Vec<u8>) {
        if self.held > 0 {
            out.push(ALPHABET[(self.bits << (6 - self.held) & 63) as usize]);
        }
    }
}

impl TokenKeys {
    /// Appends `text` as only [`TokenKeys::uncloak`] with the same `kind` reads it.
    pub fn cloak(&self, kind: u8, text: &[u8], out: &mut Vec<u8>) {
        let pair = Pair::of(self.signing());
        let nonce = pair.nonce(kind, text);
        let mut letters = Letters::default();
        for byte in nonce.to_be_bytes() {
            letters.put(byte, out);
        }
        for (number, part) in text.chunks(8).enumerate() {
            let block = pair.block(nonce, number as u64);
            for (byte, mask) in part.iter().zip(block) {
                letters.put(byte ^ mask, out);
            }
        }
        letters.end(out);
    }

    /// Appends what was cloaked as `letters`, if one of the keys did it, for this `kind`. Nothing is
    /// appended otherwise.
    #[must_use]
    pub fn uncloak(&self, kind: u8, letters: &[u8], out: &mut Vec<u8>) -> bool {
        let start = out.len();
        let good = self.read_cloaked(kind, letters, start, out).is_some();
        if !good {
            out.truncate(start);
        }
        good
    }

    fn read_cloaked(
        &self,
        kind: u8,
        letters: &[u8],
        start: usize,
        out: &mut Vec<u8>,
    ) -> Option<()> {
        let (mut bits, mut held, mut nonce) = (0u32, 0, [0; NONCE_BYTES]);
        let mut count = 0;
        for letter in letters {
            let value = match letter {
                b'A'..=b'Z' => letter - b'A',
                b'a'..=b'z' => letter - b'a' + 26,
                b'0'..=b'9' => letter - b'0' + 52,
                b'-' => 62,
                b'_' => 63,
                _ => return None,
            };
            bits = bits << 6 | u32::from(value);
            held += 6;
            if held >= 8 {
                held -= 8;
                let byte = (bits >> held) as u8;
                match nonce.get_mut(count) {
                    Some(place) => *place = byte,
                    None => out.push(byte),
                }
                count += 1;
                bits &= (1 << held) - 1;
            }
        }
        // One way of writing it only: no letter too many, and no bits in the last one.
        if count < NONCE_BYTES || bits != 0 || held >= 6 {
            return None;
        }
        let nonce = u64::from_be_bytes(nonce);
        for key in self.all() {
            let pair = Pair::of(key);
            pair.apply(nonce, &mut out[start..]);
            if pair.nonce(kind, &out[start..]) == nonce {
                return Some(());
            }
            pair.apply(nonce, &mut out[start..]);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_text_reads_back_and_nothing_else_does(
            text in proptest::collection::vec(any::<u8>(), 0..200), kind: u8, flip: prop::sample::Index, by in 1usize..64,
        ) {
            let keys = TokenKeys::new(vec![[7; 16]]);
            let mut letters = Vec::new();
            keys.cloak(kind, &text, &mut letters);
            prop_assert_eq!(letters.len(), cloaked_len(text.len()));
            prop_assert!(letters.iter().all(|letter| is_cloaked(*letter)));
            let mut back = b"before".to_vec();
            prop_assert!(keys.uncloak(kind, &letters, &mut back));
            prop_assert_eq!(&back[6..], &text[..]);
            back.truncate(6);
            prop_assert!(!keys.uncloak(kind ^ 1, &letters, &mut back));
            prop_assert!(!keys.uncloak(kind, &letters[1..], &mut back));
            prop_assert!(!TokenKeys::new(vec![[8; 16]]).uncloak(kind, &letters, &mut back));
            let at = flip.index(letters.len());
            let old = ALPHABET.iter().position(|letter| *letter == letters[at]).unwrap_or(0);
            letters[at] = ALPHABET[old ^ by];
            prop_assert!(!keys.uncloak(kind, &letters, &mut back));
            prop_assert_eq!(&back[..], &b"before"[..]);
        }

        #[test]
        fn odd_letters_are_refused(letters in proptest::collection::vec(any::<u8>(), 0..80)) {
            prop_assert!(!TokenKeys::new(vec![[7; 16]]).uncloak(0, &letters, &mut Vec::new()));
        }
    }

    #[test]
    fn an_old_key_still_reads_and_a_text_always_looks_the_same() {
        let (old, mut letters, mut again) = (TokenKeys::new(vec![[1; 16]]), Vec::new(), Vec::new());
        old.cloak(2, b"SIP/2.0/UDP 10.0.0.1", &mut letters);
        old.cloak(2, b"SIP/2.0/UDP 10.0.0.1", &mut again);
        assert_eq!(letters, again);
        let (rotated, mut text) = (TokenKeys::new(vec![[2; 16], [1; 16]]), Vec::new());
        assert!(rotated.uncloak(2, &letters, &mut text));
        assert_eq!(text, b"SIP/2.0/UDP 10.0.0.1");
    }
}
