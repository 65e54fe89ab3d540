//! What the targets share: the engines with the real routing core, driven by operations, and framers
//! driven by cuts.
#![allow(missing_docs)]

#[path = "../../tests/support/rig.rs"]
pub mod rig;
#[path = "../../tests/support/traffic.rs"]
pub mod traffic;

pub mod operations;

use strowger_contract::{Framer, Framing};

/// Cuts a stream as it comes in pieces; checks what framers promise, and that the pieces make no
/// difference.
pub fn cut<F: Framer + Default>(stream: &[u8], pieces: &[u8]) {
    let whole = messages::<F>(stream, &[]);
    let cut = messages::<F>(stream, pieces);
    assert_eq!(whole, cut, "the cut of the stream makes a difference");
}

/// The messages, and whether the stream was given up.
fn messages<F: Framer + Default>(stream: &[u8], pieces: &[u8]) -> (Vec<Vec<u8>>, bool) {
    let (mut framer, mut buffer, mut out) = (F::default(), Vec::new(), Vec::new());
    let mut rest = stream;
    let mut pieces = pieces.iter().cycle();
    while !rest.is_empty() {
        let size = pieces.next().map_or(rest.len(), |size| usize::from(*size) + 1);
        let (piece, after) = rest.split_at(size.min(rest.len()));
        rest = after;
        buffer.extend_from_slice(piece);
        while !buffer.is_empty() {
            match framer.frame(&buffer) {
                Ok(Framing::Message(length)) => {
                    assert!(length.get() <= buffer.len(), "a message longer than the buffer");
                    out.push(buffer.drain(..length.get()).collect());
                }
                Ok(Framing::Skip(length) | Framing::Pong(length, _)) => {
                    assert!(length.get() <= buffer.len(), "a skip longer than the buffer");
                    buffer.drain(..length.get());
                }
                Ok(Framing::Need(total)) => {
                    assert!(total.get() > buffer.len(), "it needs what it has");
                    break;
                }
                Err(_) => return (out, true),
            }
        }
    }
    (out, false)
}
