//! Numbers that name things. All are plain and cheap to copy; none is ever reused for another
//! thing while a process lives, so a stale one finds nothing instead of the wrong thing.

/// The largest number of workers: it must fit the six bits it has in a Diameter Hop-by-Hop
/// identifier.
pub const WORKERS_MAX: usize = 64;

/// A worker: one thread with its own sockets and engines. `0..WORKERS_MAX`.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct WorkerId(pub u8);

/// A connection that a client opened to a listener.
///
/// The worker that owns it is part of the number, so any worker can address any flow.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct FlowId(u64);

impl FlowId {
    /// Names connection `slot` of `worker`; `generation` tells apart the uses of one slot.
    #[must_use]
    pub fn new(worker: WorkerId, generation: u32, slot: u32) -> Self {
        let generation = u64::from(generation & 0x00ff_ffff);
        Self(u64::from(worker.0) << 56 | generation << 32 | u64::from(slot))
    }

    /// The worker that owns the connection.
    #[must_use]
    pub fn worker(self) -> WorkerId {
        WorkerId((self.0 >> 56) as u8)
    }

    /// The slot within its worker.
    #[must_use]
    pub fn slot(self) -> u32 {
        self.0 as u32
    }

    /// The use of the slot, 24 bits.
    #[must_use]
    pub fn generation(self) -> u32 {
        (self.0 >> 32) as u32 & 0x00ff_ffff
    }

    /// The whole number, for tokens and logs.
    #[must_use]
    pub fn to_bits(self) -> u64 {
        self.0
    }

    /// The reverse of [`FlowId::to_bits`].
    #[must_use]
    pub fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

impl std::fmt::Debug for FlowId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "flow:{}.{}.{}", self.worker().0, self.slot(), self.generation())
    }
}

/// A pool of backends, by name; kept through reloads.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct PoolId(pub u32);

/// One (pool, instance id, generation); kept through reloads, never reused.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct BackendId(pub u32);

/// A QoS class; an index into the snapshot's class table.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct ClassId(pub u8);

impl ClassId {
    /// Peer upkeep, answers, ACK, CANCEL: never queued, never shed.
    pub const CONTROL: Self = Self(0);
    /// Emergency sessions (`urn:service:sos`, Resource-Priority, DRMP 0-1).
    pub const EMERGENCY: Self = Self(1);
    /// Messages of a session that exists.
    pub const IN_SESSION: Self = Self(2);
    /// Messages that create a session.
    pub const SETUP: Self = Self(3);
    /// Registrations, subscriptions, location.
    pub const MOBILITY: Self = Self(4);
    /// All that can wait.
    pub const BULK: Self = Self(5);
    /// How many classes are built in; configured ones follow.
    pub const BUILT_IN: u8 = 6;
}

/// A request that waits for a slot.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct Ticket(pub u64);

/// The stable name of one (pool, instance id, generation): the same on every node of a cluster and
/// after every restart, and so what tokens and the session table's entries mean.
///
/// 40 bits are used; zero is never a pin.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct Pin(pub u64);

impl Pin {
    /// How many bits a pin has.
    pub const BITS: u32 = 40;
    const MASK: u64 = (1 << Self::BITS) - 1;

    /// Derives the pin of an instance by a published hash (xxh3 of `pool NUL id NUL generation`,
    /// the generation as eight little-endian bytes).
    #[must_use]
    pub fn of(pool: &str, instance: &str, generation: u64) -> Self {
        let mut hasher = xxhash_rust::xxh3::Xxh3::new();
        hasher.update(pool.as_bytes());
        hasher.update(&[0]);
        hasher.update(instance.as_bytes());
        hasher.update(&[0]);
        hasher.update(&generation.to_le_bytes());
        let bits = hasher.digest() & Self::MASK;
        Self(if bits == 0 { 1 } else { bits })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_gives_back_what_it_was_made_of() {
        let flow = FlowId::new(WorkerId(63), 0x00ab_cdef, u32::MAX);
        assert_eq!(
            (flow.worker(), flow.generation(), flow.slot()),
            (WorkerId(63), 0xabcdef, u32::MAX)
        );
        assert_eq!(FlowId::from_bits(flow.to_bits()), flow);
    }

    #[test]
    fn a_pin_names_one_generation_of_one_instance() {
        let pin = Pin::of("ims", "a", 1);
        assert_eq!(pin, Pin::of("ims", "a", 1));
        for other in [Pin::of("ims", "a", 2), Pin::of("ims", "b", 1), Pin::of("im", "sa", 1)] {
            assert_ne!(pin, other);
        }
        // Published: other nodes and releases must agree, so this value may never change.
        assert_eq!(pin, Pin(PUBLISHED_PIN));
    }

    const PUBLISHED_PIN: u64 = 421_903_839_053;
}
