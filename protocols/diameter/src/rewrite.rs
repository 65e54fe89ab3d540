//! What a relay changes in a message: four bytes of an answer; of a request those, perhaps a flag,
//! and one AVP at its end (RFC 6733 6.1.9). Everything else stays as it came.

use crate::avp::{AVP_MANDATORY, FLAG_RETRANSMITTED, code};
use crate::build::append;
use crate::frame::MESSAGE_BYTES_MAX;

/// Appends a request as it goes on: our Hop-by-Hop identifier, T if it may have been processed
/// before, and the Route-Record of the peer that it came from. `false` if it would be too long.
pub fn request(
    message: &[u8],
    hop_by_hop: u32,
    resent: bool,
    from: &[u8],
    out: &mut Vec<u8>,
) -> bool {
    let start = out.len();
    out.extend_from_slice(message);
    append(out, code::ROUTE_RECORD, AVP_MANDATORY, from);
    let length = out.len() - start;
    if length > MESSAGE_BYTES_MAX {
        out.truncate(start);
        return false;
    }
    out[start + 1..start + 4].copy_from_slice(&(length as u32).to_be_bytes()[1..]);
    if resent {
        out[start + 4] |= FLAG_RETRANSMITTED;
    }
    out[start + 12..start + 16].copy_from_slice(&hop_by_hop.to_be_bytes());
    true
}

/// Appends an answer as it goes back: with the identifier that the asker gave.
pub fn answer(message: &[u8], hop_by_hop: u32, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(message);
    if let Some(place) = out.get_mut(start + 12..start + 16) {
        place.copy_from_slice(&hop_by_hop.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::avp::{Avps, Summary};
    use crate::build::Builder;
    use proptest::prelude::*;

    proptest! {
        /// Transparent: but for what is ours, all bytes are as they came.
        #[test]
        fn only_what_is_ours_changes(data in prop::collection::vec(any::<u8>(), 0..64), vendor: bool, ours: u32, theirs: u32, resent: bool, host in "[a-z.]{1,40}") {
            let mut message = Vec::new();
            let flags = if vendor { 0x80 } else { 0x15 };
            let mut odd = data.clone();
            odd.extend([0; 4]);
            Builder::new(&mut message, 0xcf, 0x00ab_cdef, 77, theirs, 9).avp(0xdead_beef, flags, &odd).finish();
            let mut out = vec![0xee; 3];
            prop_assert!(request(&message, ours, resent, host.as_bytes(), &mut out));
            let sent = &out[3..];
            prop_assert_eq!(sent.len() % 4, 0);
            prop_assert_eq!(sent[4], message[4] | if resent { 0x10 } else { 0 });
            prop_assert_eq!(&sent[5..12], &message[5..12]);
            prop_assert_eq!(&sent[12..16], &ours.to_be_bytes());
            prop_assert_eq!(&sent[16..message.len()], &message[16..]);
            let last = Avps::of(sent).flatten().last().expect("an AVP");
            prop_assert!(last.is(code::ROUTE_RECORD) && last.data == host.as_bytes());
            prop_assert!(Summary::of(sent).route_recorded);
            let mut back = Vec::new();
            answer(sent, theirs, &mut back);
            prop_assert_eq!(&back[12..16], &theirs.to_be_bytes());
            prop_assert_eq!(&back[..12], &sent[..12]);
            prop_assert_eq!(&back[16..], &sent[16..]);
        }
    }
}
