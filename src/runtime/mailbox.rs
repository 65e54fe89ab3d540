//! Hand-over between the workers of one listener.
//!
//! A mailbox holds bytes in one vector and what they mean in another. The sender appends a batch
//! under one lock; the owner swaps both vectors against empty ones and works through them outside
//! of the lock. Nothing is allocated once the vectors have grown to their usual size.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Mutex;
use std::time::Instant;

use strowger_contract::{Closing, Endpoint, LookupId, PeerChange, Transport, WorkerId};
use tokio::sync::Notify;

use super::resolve::Answer;

/// Bytes that wait for one worker, at most. A worker that stalls (a panic's restart, a long stop)
/// must not let the others grow without bound; 8 MiB are some 8,000 messages.
pub(crate) const MAILBOX_BYTES_MAX: usize = 8 << 20;

/// Items that wait for one worker, at most: what has no bytes must be bounded too.
pub(crate) const MAILBOX_ITEMS_MAX: usize = 65_536;

/// One thing for another worker.
#[derive(Clone, Debug)]
pub(crate) enum Mail {
    /// A message to treat as if it had arrived here.
    Message {
        from: Endpoint,
        transport: Transport,
        remote: SocketAddr,
        local: SocketAddr,
        arrived: Instant,
        bytes: Range<usize>,
    },
    /// Bytes for a connection that this worker owns. If it is not there, `sender` hears so.
    Send { to: Endpoint, sender: WorkerId, bytes: Range<usize> },
    /// Something happened to a backend's link.
    Peer(Endpoint, PeerChange),
    /// Close a connection that this worker owns.
    Close(Endpoint, Closing),
    /// What became of a name that this worker's engine asked for.
    Resolved(LookupId, Answer),
}

/// What waits, as the owner takes it.
#[derive(Debug, Default)]
pub(crate) struct Letters {
    pub(crate) bytes: Vec<u8>,
    pub(crate) mail: Vec<Mail>,
}

/// What waits for one worker.
#[derive(Debug, Default)]
pub(crate) struct Mailbox {
    letters: Mutex<Letters>,
    arrived: Notify,
}

impl Mailbox {
    /// Puts one item in, with `bytes` for those that have any; `false` if it is full.
    pub(crate) fn put(&self, bytes: &[u8], mail: impl FnOnce(Range<usize>) -> Mail) -> bool {
        let mut letters = self.letters.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if letters.bytes.len() + bytes.len() > MAILBOX_BYTES_MAX
            || letters.mail.len() >= MAILBOX_ITEMS_MAX
        {
            return false;
        }
        let start = letters.bytes.len();
        letters.bytes.extend_from_slice(bytes);
        let range = start..letters.bytes.len();
        letters.mail.push(mail(range));
        let first = letters.mail.len() == 1;
        drop(letters);
        // Only the first item wakes: until the owner takes them all, it is awake already.
        if first {
            self.arrived.notify_one();
        }
        true
    }

    /// Waits until there is something, then swaps it into `letters` (which must be empty).
    pub(crate) async fn take(&self, letters: &mut Letters) {
        loop {
            self.swap(letters);
            if !letters.mail.is_empty() {
                return;
            }
            self.arrived.notified().await;
        }
    }

    /// Copies what waits; it stays.
    pub(crate) fn look(&self, letters: &mut Letters) {
        let waiting = self.letters.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        letters.bytes.clone_from(&waiting.bytes);
        letters.mail.clone_from(&waiting.mail);
    }

    fn swap(&self, letters: &mut Letters) {
        letters.bytes.clear();
        letters.mail.clear();
        let mut waiting = self.letters.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        std::mem::swap(&mut *waiting, letters);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_mailbox_says_so_and_an_emptied_one_takes_more() {
        let mailbox = Mailbox::default();
        let flow = Endpoint::Client(strowger_contract::FlowId::from_bits(1));
        let put = |bytes: &[u8]| {
            mailbox.put(bytes, |bytes| Mail::Send { to: flow, sender: WorkerId(0), bytes })
        };
        let megabyte = vec![1; 1 << 20];
        for _ in 0..8 {
            assert!(put(&megabyte));
        }
        assert!(!put(b"x"), "full");
        let mut letters = Letters::default();
        mailbox.swap(&mut letters);
        assert_eq!(letters.mail.len(), 8);
        assert!(put(b"x"));
        for _ in 1..MAILBOX_ITEMS_MAX {
            assert!(put(b""));
        }
        assert!(!put(b""), "items are bounded as well");
    }
}
