//! Cutting a stream into messages (RFC 6733 3).

use std::num::NonZeroUsize;

use strowger_contract::{FrameError, Framer, Framing};

use crate::avp::{HEADER_BYTES, number24};

/// The largest message: the most that is heard of in the field is 60 KiB.
pub const MESSAGE_BYTES_MAX: usize = 65_536;

/// Cuts one connection's stream. What is not a possible header ends the connection: the next
/// message's begin could only be guessed.
#[derive(Debug, Default)]
pub struct DiameterFramer;

impl Framer for DiameterFramer {
    fn frame(&mut self, buffer: &[u8]) -> Result<Framing, FrameError> {
        let need =
            |count: usize| Framing::Need(NonZeroUsize::new(count).unwrap_or(NonZeroUsize::MIN));
        match buffer.first() {
            None => return Ok(need(4)),
            Some(1) => {}
            Some(_) => return Err(FrameError::Malformed("the version is not 1")),
        }
        let Some(length) = number24(buffer, 1) else { return Ok(need(4)) };
        let length = length as usize;
        if length < HEADER_BYTES {
            return Err(FrameError::Malformed("the length is less than a header's"));
        }
        if !length.is_multiple_of(4) {
            return Err(FrameError::Malformed("the length is no multiple of four"));
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
        for bad in
            [[2, 0, 0, 20], [1, 0, 0, 0], [1, 0, 0, 2], [1, 0, 0, 19], [1, 0, 0, 22], [1, 2, 0, 0]]
        {
            assert!(frame(&bad).is_err(), "{bad:?}");
        }
    }
}
