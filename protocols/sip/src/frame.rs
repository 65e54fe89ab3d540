//! Cutting a stream into messages (RFC 3261 18.3, RFC 5626 3.5.1).

use std::num::NonZeroUsize;

use memchr::memmem;
use strowger_contract::{FrameError, Framer, Framing};

use crate::scan::MESSAGE_BYTES_MAX;

/// Header bytes of one message, at most: a stream that sends more without an empty line is no SIP.
const HEADER_BYTES_MAX: usize = 32 << 10;

/// Cuts one connection's stream.
#[derive(Debug, Default)]
pub struct SipFramer {
    /// So far no end of headers was found; the search goes on here.
    looked: usize,
}

impl Framer for SipFramer {
    fn frame(&mut self, buffer: &[u8]) -> Result<Framing, FrameError> {
        if let Some(framing) = keep_alive(buffer) {
            return Ok(framing);
        }
        let from = self.looked.saturating_sub(4).min(buffer.len());
        let Some(end) = memmem::find(&buffer[from..], b"\r\n\r\n") else {
            if buffer.len() > HEADER_BYTES_MAX {
                return Err(FrameError::TooLarge { size: buffer.len(), limit: HEADER_BYTES_MAX });
            }
            self.looked = buffer.len();
            return Ok(need(buffer.len() + 1));
        };
        let body = from + end + 4;
        let total = body + content_length(&buffer[..body])?;
        if total > MESSAGE_BYTES_MAX {
            return Err(FrameError::TooLarge { size: total, limit: MESSAGE_BYTES_MAX });
        }
        if total > buffer.len() {
            // The headers are looked for again from their end: they are found at once.
            self.looked = body;
            return Ok(need(total));
        }
        self.looked = 0;
        NonZeroUsize::new(total).map(Framing::Message).ok_or(FrameError::Malformed("empty message"))
    }
}

fn need(total: usize) -> Framing {
    Framing::Need(NonZeroUsize::new(total).unwrap_or(NonZeroUsize::MIN))
}

/// A double CRLF between messages is a ping, a single one its answer or just space.
fn keep_alive(buffer: &[u8]) -> Option<Framing> {
    const TWO: NonZeroUsize = NonZeroUsize::new(2).unwrap();
    const FOUR: NonZeroUsize = NonZeroUsize::new(4).unwrap();
    match buffer {
        [] => Some(need(1)),
        [b'\r', b'\n', b'\r', b'\n', ..] => Some(Framing::Pong(FOUR, b"\r\n")),
        // It may yet become a ping.
        [b'\r'] | [b'\r', b'\n'] | [b'\r', b'\n', b'\r'] => Some(need(buffer.len() + 1)),
        [b'\r', b'\n', ..] => Some(Framing::Skip(TWO)),
        _ => None,
    }
}

/// The body's length. On a stream it must be told (18.3), once, and in plain digits: two that differ
/// would let a message hide in another.
fn content_length(headers: &[u8]) -> Result<usize, FrameError> {
    let mut found = None;
    for line in headers.split(|&byte| byte == b'\n') {
        let Some(colon) = memchr::memchr(b':', line) else { continue };
        let name = line[..colon].trim_ascii_end();
        if !name.eq_ignore_ascii_case(b"Content-Length") && !name.eq_ignore_ascii_case(b"l") {
            continue;
        }
        let digits = line[colon + 1..].trim_ascii();
        if digits.is_empty() || digits.len() > 9 || !digits.iter().all(u8::is_ascii_digit) {
            return Err(FrameError::Malformed("Content-Length is not a number"));
        }
        let length =
            digits.iter().fold(0usize, |length, digit| length * 10 + usize::from(digit - b'0'));
        if found.is_some_and(|known| known != length) {
            return Err(FrameError::Malformed("two different Content-Length"));
        }
        found = Some(length);
    }
    found.ok_or(FrameError::Malformed("no Content-Length on a stream"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(body: usize) -> Vec<u8> {
        let mut text = format!("OPTIONS sip:a SIP/2.0\r\nl : {body}\r\nX: y\r\n\r\n").into_bytes();
        text.resize(text.len() + body, b'b');
        text
    }

    proptest! {
        /// However the stream is cut into reads, the same messages come out.
        #[test]
        fn any_cut_gives_the_same_messages(bodies in prop::collection::vec(0usize..40, 1..6), cuts in prop::collection::vec(1usize..30, 1..60)) {
            let mut stream = Vec::new();
            for &body in &bodies {
                stream.extend_from_slice(b"\r\n\r\n\r\n");
                stream.extend(message(body));
            }
            let (mut framer, mut buffer, mut out, mut pongs) = (SipFramer::default(), Vec::new(), Vec::new(), 0);
            let mut rest = &stream[..];
            let mut cuts = cuts.iter().cycle();
            while !rest.is_empty() {
                let (part, after) = rest.split_at((*cuts.next().expect("endless")).min(rest.len()));
                rest = after;
                buffer.extend_from_slice(part);
                loop {
                    match framer.frame(&buffer).expect("well-formed") {
                        Framing::Message(length) => { out.push(buffer.drain(..length.get()).collect::<Vec<_>>()); }
                        Framing::Skip(length) => { buffer.drain(..length.get()); }
                        Framing::Pong(length, _) => { pongs += 1; buffer.drain(..length.get()); }
                        Framing::Need(total) => { prop_assert!(total.get() > buffer.len()); break; }
                    }
                }
            }
            prop_assert_eq!(out, bodies.iter().map(|&body| message(body)).collect::<Vec<_>>());
            prop_assert_eq!(pongs, bodies.len());
        }
    }

    #[test]
    fn attacks_on_the_length_are_refused() {
        for (headers, word) in [
            ("l: 5\r\nContent-Length: 6", "two different"),
            ("Content-Length: -1", "not a number"),
            ("Content-Length: 0x10", "not a number"),
            ("Content-Length: 99999999999", "not a number"),
            ("Content-Length: 70000", "over the limit"),
            ("X: y", "no Content-Length"),
        ] {
            let text = format!("BYE sip:a SIP/2.0\r\n{headers}\r\n\r\n");
            let error = SipFramer::default().frame(text.as_bytes()).expect_err(headers).to_string();
            assert!(error.contains(word), "{error}");
        }
        let endless = vec![b'x'; HEADER_BYTES_MAX + 1];
        assert!(SipFramer::default().frame(&endless).is_err());
    }
}
