//! Cutting a stream into messages (RFC 6733 3).

use std::num::NonZeroUsize;

use strowger_contract::{FrameError, Framer, Framing};

use crate::avp::{HEADER_BYTES, number24};

/// The largest message: the most that is heard of in the field is 60 KiB.
pub const MESSAGE_BYTES_MAX: usize = 65_536;

/// Cuts one connection's stream. What has no possible length ends the connection: the next message's
/// begin could only be guessed. A message of another version, or whose length is no multiple of four,
/// is given to the engine whole, which answers it (RFC 6733 7.1.5: 5011, 5015) and then closes.
#[derive(Debug, Default)]
pub struct DiameterFramer;

impl Framer for DiameterFramer {
    fn frame(&mut self, buffer: &[u8]) -> Result<Framing, FrameError> {
        let need =
            |count: usize| Framing::Need(NonZeroUsize::new(count).unwrap_or(NonZeroUsize::MIN));
        let Some(length) = number24(buffer, 1) else { return Ok(need(4)) };
        let length = length as usize;
        if length < HEADER_BYTES {
            return Err(FrameError::Malformed("the length is less than a header's"));
        }
        if length > MESSAGE_BYTES_MAX {
            return Err(FrameError::TooLarge { size: length, limit: MESSAGE_BYTES_MAX });
        }
        Ok(match NonZeroUsize::new(length) {
            Some(length) if length.get() <= buffer.len() => Framing::Message(length),
            _ => need(length),
        })
    }
}

/// Whether a message that was cut out of a stream has a version and a length that can be.
#[must_use]
pub fn is_sound(message: &[u8]) -> bool {
    message.first() == Some(&1) && message.len().is_multiple_of(4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_header_ends_the_stream() {
        let frame = |bytes: &[u8]| DiameterFramer.frame(bytes);
        assert_eq!(frame(&[]), Ok(Framing::Need(NonZeroUsize::new(4).expect("not 0"))));
        assert_eq!(frame(&[1, 0]), Ok(Framing::Need(NonZeroUsize::new(4).expect("not 0"))));
        assert_eq!(frame(&[1, 0, 0, 20]), Ok(Framing::Need(NonZeroUsize::new(20).expect("not 0"))));
        let mut whole = vec![1, 0, 0, 20];
        whole.resize(25, 0);
        assert_eq!(frame(&whole), Ok(Framing::Message(NonZeroUsize::new(20).expect("not 0"))));
        for bad in [
            [1, 0, 0, 0],
            [1, 0, 0, 2],
            [1, 0, 0, 19],
            [1, 2, 0, 0],
            *b"GET ",
            *b"\x16\x03\x01\x02",
        ] {
            assert!(frame(&bad).is_err(), "{bad:?}");
        }
        for odd in [[2, 0, 0, 20], [1, 0, 0, 22]] {
            let mut whole = odd.to_vec();
            whole.resize(30, 0);
            let framed = frame(&whole).expect("it can be answered");
            assert!(matches!(framed, Framing::Message(_)) && !is_sound(&whole[..22]));
        }
    }
}
