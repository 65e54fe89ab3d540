//! QoS classes: what is promised to a message, and what may happen to it.

use std::time::Duration;

use crate::Refusal;

/// What becomes of a message whose deadline cannot be met: one that is refused as
/// [`Refusal::Overloaded`] or [`Refusal::TooLate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnMiss {
    /// Refuse it in the protocol's words.
    Answer,
    /// Forget it silently: its client finds out by its own timer.
    Drop,
    /// Reset the connection it came on, with all else on it; a datagram is forgotten.
    Reset,
}

/// A class of messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Class {
    /// As configurations and metrics write it.
    pub name: Box<str>,
    /// 0 (first) to 3 (last).
    pub tier: u8,
    /// From the first byte read to the last byte of the answer relayed. `None`: no promise, never
    /// queued, never shed.
    pub deadline: Option<Duration>,
    /// Percent of slots that lower tiers cannot be starved of, 0 to 100.
    pub share_min: u8,
    /// How many may wait.
    pub queue_max: u32,
    /// How often one message may be tried again.
    pub retry: u8,
    /// What becomes of it when its deadline cannot be met.
    pub on_miss: OnMiss,
}

impl Class {
    /// What becomes of a message of the class that is refused so.
    #[must_use]
    pub fn on_refusal(&self, refusal: Refusal) -> OnMiss {
        match refusal {
            Refusal::Overloaded { .. } | Refusal::TooLate => self.on_miss,
            _ => OnMiss::Answer,
        }
    }

    /// A class that is no more, at its number: what still has it is treated as the last, bulk.
    #[must_use]
    pub fn vacant() -> Self {
        let bulk = Self::built_in().swap_remove(usize::from(crate::ClassId::BULK.0));
        Self { name: "".into(), ..bulk }
    }

    /// Whether it is only the place of one that is no more.
    #[must_use]
    pub fn is_vacant(&self) -> bool {
        self.name.is_empty()
    }

    /// The built-in classes, in the order of their [`crate::ClassId`]s.
    #[must_use]
    pub fn built_in() -> Vec<Self> {
        let class = |name: &str, tier, deadline_ms: u64, queue_max, retry| Self {
            name: name.into(),
            tier,
            deadline: (deadline_ms > 0).then(|| Duration::from_millis(deadline_ms)),
            share_min: 0,
            queue_max,
            retry,
            on_miss: OnMiss::Answer,
        };
        vec![
            class("control", 0, 0, 0, 0),
            class("emergency", 0, 100, 1_000, 3),
            class("in-session", 0, 200, 4_000, 1),
            class("setup", 1, 500, 4_000, 2),
            class("mobility", 2, 2_000, 4_000, 2),
            class("bulk", 3, 5_000, 4_000, 1),
        ]
    }
}
