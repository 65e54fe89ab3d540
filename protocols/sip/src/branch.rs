//! Our Via branch: which worker, transaction and try a response belongs to, and a signature.
//!
//! `z9hG4bKsw` + worker (2 hex digits) + slot (8) + generation (8) + try (2) + loop (8) + kind +
//! token (20). The loop part is a hash of all that the request is routed by (RFC 5393).
//! The token is signed for the Call-ID and the numbers, so nobody can make the edge forward a
//! response that it did not ask for, and a response is still forwarded after a restart.

use strowger_contract::token::TOKEN_BYTES;
use strowger_contract::{Pin, Router, WorkerId};

const PREFIX: &[u8] = b"z9hG4bKsw";
const DIGITS: usize = 28;

/// How long a branch of ours is, in bytes.
pub const BRANCH_BYTES: usize = PREFIX.len() + DIGITS + 1 + TOKEN_BYTES;

/// What a branch says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Branch {
    /// The worker that has the transaction.
    pub worker: WorkerId,
    /// Its slot there.
    pub slot: u32,
    /// Which use of the slot.
    pub generation: u32,
    /// Which try.
    pub attempt: u8,
    /// What the request was routed by.
    pub loop_hash: u32,
    /// No transaction is kept.
    pub stateless: bool,
    /// The instance that the request went to; `None` if it went to no backend.
    pub pin: Option<Pin>,
}

impl Branch {
    /// Appends the branch, signed.
    pub fn write(&self, call_id: u64, router: &dyn Router, out: &mut Vec<u8>) {
        out.extend_from_slice(PREFIX);
        hex(u32::from(self.worker.0), 2, out);
        hex(self.slot, 8, out);
        hex(self.generation, 8, out);
        hex(u32::from(self.attempt), 2, out);
        hex(self.loop_hash, 8, out);
        out.push(if self.stateless { b'l' } else { b't' });
        let token = router.seal(
            self.pin.unwrap_or(Pin(0)),
            u8::from(self.stateless),
            self.binding(call_id),
        );
        out.extend_from_slice(&token);
    }

    /// Reads a branch: `None` if it is not one of ours. The signature is checked by
    /// [`Branch::verify`].
    #[must_use]
    pub fn read(text: &[u8]) -> Option<(Self, &[u8])> {
        let rest = text.strip_prefix(PREFIX).filter(|_| text.len() == BRANCH_BYTES)?;
        let number = |start: usize, end: usize| {
            let digits = std::str::from_utf8(rest.get(start..end)?).ok()?;
            u32::from_str_radix(digits, 16).ok()
        };
        let stateless = match rest.get(DIGITS)? {
            b'l' => true,
            b't' => false,
            _ => return None,
        };
        let branch = Self {
            worker: WorkerId(number(0, 2)? as u8),
            slot: number(2, 10)?,
            generation: number(10, 18)?,
            attempt: number(18, 20)? as u8,
            loop_hash: number(20, 28)?,
            stateless,
            pin: None,
        };
        Some((branch, rest.get(DIGITS + 1..)?))
    }

    /// Checks the token that [`Branch::read`] found; the branch with its pin if it is genuine.
    #[must_use]
    pub fn verify(mut self, token: &[u8], call_id: u64, router: &dyn Router) -> Option<Self> {
        let (pin, mark) = router.unseal(token, self.binding(call_id))?;
        self.pin = (pin.0 != 0).then_some(pin);
        (mark == u8::from(self.stateless)).then_some(self)
    }

    fn binding(&self, call_id: u64) -> u64 {
        let numbers = u64::from(self.slot) << 32 | u64::from(self.generation);
        let small = u64::from(self.worker.0) << 8 | u64::from(self.attempt);
        let mixed = (numbers ^ small.wrapping_mul(0x9e37_79b9_7f4a_7c15))
            .wrapping_mul(0xbf58_476d_1ce4_e5b9);
        call_id ^ mixed ^ mixed >> 32
    }
}

/// Appends a number as so many hex digits.
pub(crate) fn hex(number: u32, digits: u32, out: &mut Vec<u8>) {
    for place in (0..digits).rev() {
        let digit = number >> (4 * place) & 0xf;
        out.push(b"0123456789abcdef"[digit as usize]);
    }
}

/// Appends a number in decimal.
pub(crate) fn decimal(number: u64, out: &mut Vec<u8>) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    let mut rest = number;
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}
