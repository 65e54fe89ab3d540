//! Cutting a byte stream into messages.

use std::num::NonZeroUsize;

use thiserror::Error;

/// What a framer found at the front of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// The first so many bytes are one message. Never more than the buffer holds.
    Message(NonZeroUsize),
    /// The first so many bytes are no message and can go (keep-alives). Never more than the buffer
    /// holds.
    Skip(NonZeroUsize),
    /// A keep-alive of so many bytes that wants the given answer written back (RFC 5626 3.5.1).
    Pong(NonZeroUsize, &'static [u8]),
    /// More is needed: at least so many bytes in all from the front of the buffer; more than the
    /// buffer holds, and never more than the protocol's largest message.
    Need(NonZeroUsize),
}

/// Why a stream can no longer be cut; its connection is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The message is, or says it will be, larger than allowed.
    #[error("message of {size} bytes is over the limit of {limit}")]
    TooLarge {
        /// What it would be, in bytes.
        size: usize,
        /// What is allowed, in bytes.
        limit: usize,
    },
    /// The bytes are not this protocol's, or contradict themselves.
    #[error("{0}")]
    Malformed(&'static str),
}

/// Cuts a byte stream into messages. One per connection; it may remember how far it has looked.
pub trait Framer {
    /// Looks at the front of `buffer`, which holds all bytes not yet consumed by an earlier
    /// `Message`, `Skip` or `Pong`. Called again with a longer buffer after `Need`.
    ///
    /// # Errors
    /// The stream is beyond repair.
    fn frame(&mut self, buffer: &[u8]) -> Result<Framing, FrameError>;
}

/// The framer of protocols that have no messages on a stream: all that is there is one message.
#[derive(Debug, Default)]
pub struct DatagramFramer;

impl Framer for DatagramFramer {
    fn frame(&mut self, buffer: &[u8]) -> Result<Framing, FrameError> {
        let whole = NonZeroUsize::new(buffer.len());
        Ok(whole.map_or(Framing::Need(NonZeroUsize::MIN), Framing::Message))
    }
}
