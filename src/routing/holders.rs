//! Who holds sessions: backends, each with the number of times that it lost all of them. An array over all backend numbers ever given, in blocks, without a lock.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

use strowger_contract::BackendId;

const BLOCK: usize = 1_024;

/// Backend numbers that are counted: 16 million registrations in a process's life.
const BLOCKS: usize = 16_384;

/// A backend and how often it had lost its sessions, modulo 64: what tables keep in 30 bits. 64
/// restarts within one session's ttl are not expected of anybody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Holder(u32);

impl Holder {
    const BACKEND_BITS: u32 = 24;

    fn new(backend: BackendId, restarts: u8) -> Self {
        Self(
            backend.0 & ((1 << Self::BACKEND_BITS) - 1)
                | u32::from(restarts & 0x3f) << Self::BACKEND_BITS,
        )
    }

    pub(super) fn backend(self) -> BackendId {
        BackendId(self.0 & ((1 << Self::BACKEND_BITS) - 1))
    }

    pub(super) fn to_bits(self) -> u32 {
        self.0
    }

    pub(super) fn from_bits(bits: u32) -> Self {
        Self(bits)
    }
}

/// All of them.
#[derive(Debug)]
pub(super) struct Holders {
    blocks: Vec<OnceLock<Box<[AtomicU8]>>>,
}

impl Default for Holders {
    fn default() -> Self {
        Self { blocks: (0..BLOCKS).map(|_| OnceLock::new()).collect() }
    }
}

impl Holders {
    fn at(&self, backend: BackendId) -> Option<&AtomicU8> {
        let block = self.blocks.get(backend.0 as usize / BLOCK)?;
        let block = block.get_or_init(|| (0..BLOCK).map(|_| AtomicU8::new(0)).collect());
        block.get(backend.0 as usize % BLOCK)
    }

    /// Another process knows how often.
    pub(super) fn set_restarts(&self, backend: BackendId, restarts: u8) {
        if let Some(known) = self.at(backend) {
            known.store(restarts, Relaxed);
        }
    }

    pub(super) fn restarts(&self, backend: BackendId) -> u8 {
        self.at(backend).map_or(0, |restarts| restarts.load(Relaxed))
    }

    /// The backend as it is now.
    pub(super) fn current(&self, backend: BackendId) -> Holder {
        Holder::new(backend, self.restarts(backend))
    }

    /// Whether it has lost nothing since.
    pub(super) fn is_current(&self, holder: Holder) -> bool {
        self.current(holder.backend()) == holder
    }

    /// It lost all its sessions.
    pub(super) fn restart(&self, backend: BackendId) {
        if let Some(restarts) = self.at(backend) {
            restarts.fetch_add(1, Relaxed);
        }
    }
}
