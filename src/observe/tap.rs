//! The tap: copies of messages in and out, for traces and exports.
//!
//! A worker pays one relaxed load per message while nobody looks. While somebody does, messages of
//! the wanted protocols are copied into a bounded queue; what finds it full is lost and counted,
//! and nothing waits. A thread of its own takes them out: it asks each trace whether it wants the
//! message, and hands what is sampled to the exporter.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use prometheus::IntCounter;
use strowger_contract::Transport;

/// Copies that wait for the tap's thread, at most: a burst of some hundred calls.
const QUEUE_MESSAGES_MAX: usize = 8_192;

/// Their bytes, at most.
const QUEUE_BYTES_MAX: usize = 16 << 20;

/// Which way a message went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the edge.
    In,
    /// From the edge.
    Out,
}

/// A copy of a message.
#[derive(Clone, Debug)]
pub struct Capture {
    /// When it was read or given to the kernel.
    pub at: Instant,
    /// Which protocol, as [`Tap::bit`] numbers them.
    pub protocol: u32,
    /// The listener.
    pub listener: Arc<str>,
    /// Which way.
    pub direction: Direction,
    /// Over what.
    pub transport: Transport,
    /// The sender. Unspecified while the connection that it waits for is being opened.
    pub from: SocketAddr,
    /// The receiver.
    pub to: SocketAddr,
    /// The bytes.
    pub bytes: Box<[u8]>,
}

/// The workers' side.
#[derive(Debug)]
pub struct Tap {
    /// One bit per protocol that somebody looks at.
    wanted: AtomicU32,
    queued: AtomicUsize,
    sender: SyncSender<Capture>,
    receiver: Mutex<Option<Receiver<Capture>>>,
    taken: IntCounter,
    lost: IntCounter,
    protocols: Mutex<Vec<&'static str>>,
}

impl Tap {
    /// `taken` and `lost` count copies.
    #[must_use]
    pub fn new(taken: IntCounter, lost: IntCounter) -> Arc<Self> {
        let (sender, receiver) = sync_channel(QUEUE_MESSAGES_MAX);
        Arc::new(Self {
            wanted: AtomicU32::new(0),
            queued: AtomicUsize::new(0),
            sender,
            receiver: Mutex::new(Some(receiver)),
            taken,
            lost,
            protocols: Mutex::default(),
        })
    }

    /// A protocol's bit; 0 if there are more protocols than bits.
    #[must_use]
    pub fn bit(&self, protocol: &'static str) -> u32 {
        let mut known = self.protocols.lock().unwrap_or_else(PoisonError::into_inner);
        let place = known.iter().position(|name| *name == protocol).unwrap_or_else(|| {
            known.push(protocol);
            known.len() - 1
        });
        1u32.checked_shl(place as u32).unwrap_or(0)
    }

    /// Which protocols are wanted from now on.
    pub fn want(&self, bits: u32) {
        self.wanted.store(bits, Ordering::Relaxed);
    }

    /// Whether a protocol is wanted.
    #[inline]
    #[must_use]
    pub fn is_on(&self, bit: u32) -> bool {
        self.wanted.load(Ordering::Relaxed) & bit != 0
    }

    /// Whether a copy was ever lost because too many waited.
    #[must_use]
    pub fn has_lost(&self) -> bool {
        self.lost.get() > 0
    }

    /// Takes a copy, unless the queue is full.
    pub fn put(&self, capture: Capture) {
        let size = capture.bytes.len();
        if self.queued.fetch_add(size, Ordering::Relaxed) + size > QUEUE_BYTES_MAX
            || self.sender.try_send(capture).is_err()
        {
            self.queued.fetch_sub(size, Ordering::Relaxed);
            return self.lost.inc();
        }
        self.taken.inc();
    }

    /// The queue's other end, once.
    pub(super) fn take_receiver(&self) -> Option<Receiver<Capture>> {
        self.receiver.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// A copy was taken out.
    pub(super) fn took(&self, bytes: usize) {
        self.queued.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// One listener's part of the tap, on one worker.
#[derive(Clone, Debug)]
pub struct TapPort {
    tap: Arc<Tap>,
    bit: u32,
    listener: Arc<str>,
}

impl TapPort {
    /// The part of a listener.
    #[must_use]
    pub fn new(tap: &Arc<Tap>, protocol: &'static str, listener: &str) -> Self {
        Self { bit: tap.bit(protocol), tap: Arc::clone(tap), listener: listener.into() }
    }

    /// Copies a message, if somebody looks.
    #[inline]
    pub fn see(
        &self,
        at: Instant,
        direction: Direction,
        transport: Transport,
        from: SocketAddr,
        to: SocketAddr,
        bytes: &[u8],
    ) {
        if self.tap.is_on(self.bit) {
            self.copy(at, direction, transport, from, to, bytes);
        }
    }

    #[cold]
    fn copy(
        &self,
        at: Instant,
        direction: Direction,
        transport: Transport,
        from: SocketAddr,
        to: SocketAddr,
        bytes: &[u8],
    ) {
        let listener = Arc::clone(&self.listener);
        let (protocol, bytes) = (self.bit, bytes.into());
        self.tap.put(Capture { at, protocol, listener, direction, transport, from, to, bytes });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_loses_and_counts_and_never_waits() {
        let counter = |name| IntCounter::new(name, "x").expect("a name");
        let (taken, lost) = (counter("a"), counter("b"));
        let tap = Tap::new(taken.clone(), lost.clone());
        let port = TapPort::new(&tap, "sip", "edge");
        let address = SocketAddr::from(([127, 0, 0, 1], 5060));
        let see = |size: usize| {
            port.see(
                Instant::now(),
                Direction::In,
                Transport::Udp,
                address,
                address,
                &vec![0; size],
            );
        };
        see(10);
        assert_eq!(taken.get(), 0, "off");
        tap.want(tap.bit("diameter"));
        see(10);
        assert_eq!(taken.get(), 0, "another protocol");
        tap.want(tap.bit("sip"));
        for _ in 0..QUEUE_MESSAGES_MAX + 5 {
            see(1);
        }
        assert_eq!((taken.get(), lost.get()), (QUEUE_MESSAGES_MAX as u64, 5));
        let receiver = tap.take_receiver().expect("once");
        assert!(tap.take_receiver().is_none());
        for capture in receiver.try_iter() {
            tap.took(capture.bytes.len());
        }
        see(QUEUE_BYTES_MAX);
        see(1);
        assert_eq!(lost.get(), 6, "by bytes");
    }
}
