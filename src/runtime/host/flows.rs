//! The connections of one worker, by number.

use std::rc::Rc;

use strowger_contract::{FlowId, WorkerId};

use crate::runtime::stream::Connection;

/// The part of a slot's uses that a flow's number tells.
const GENERATION: u32 = 0x00ff_ffff;

/// What has a slot.
#[derive(Default)]
enum Slot {
    #[default]
    Free,
    Open(Rc<Connection>),
    /// It is idle, and known by that number elsewhere.
    Parked(u32),
}

/// The flows of one worker, by slot.
#[derive(Default)]
pub(super) struct Flows {
    slots: Vec<(u32, Slot)>,
    free: Vec<u32>,
}

impl Flows {
    pub(super) fn reserve(&mut self, worker: WorkerId) -> FlowId {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push((0, Slot::Free));
            (self.slots.len() - 1) as u32
        });
        let entry = &mut self.slots[slot as usize];
        entry.0 = entry.0.wrapping_add(1);
        FlowId::new(worker, entry.0, slot)
    }

    pub(super) fn set(&mut self, flow: FlowId, connection: Rc<Connection>) {
        self.slots[flow.slot() as usize].1 = Slot::Open(connection);
    }

    /// Its connection is elsewhere from now on.
    pub(super) fn park(&mut self, flow: FlowId, place: u32) {
        if self.get(flow).is_some() || self.parked(flow).is_some() {
            self.slots[flow.slot() as usize].1 = Slot::Parked(place);
        }
    }

    /// Where it is, if it is elsewhere.
    pub(super) fn parked(&self, flow: FlowId) -> Option<u32> {
        let (generation, slot) = self.slots.get(flow.slot() as usize)?;
        match slot {
            Slot::Parked(place) if generation & GENERATION == flow.generation() => Some(*place),
            _ => None,
        }
    }

    /// Enters a flow under the number that it has in another process; whether there is such a number
    /// and nobody has it.
    pub(super) fn put(&mut self, flow: FlowId, connection: Rc<Connection>) -> bool {
        let Some(slot) = self.slots.get_mut(flow.slot() as usize) else { return false };
        if !matches!(slot.1, Slot::Free) {
            return false;
        }
        *slot = (slot.0 & !GENERATION | flow.generation(), Slot::Open(connection));
        true
    }

    /// How often each slot was used.
    pub(super) fn generations(&self) -> Vec<u32> {
        self.slots.iter().map(|(generation, _)| *generation).collect()
    }

    /// Goes on counting where another process had come to: a number that was given once names nobody
    /// else.
    pub(super) fn number(&mut self, generations: &[u32]) {
        self.slots = generations.iter().map(|&generation| (generation, Slot::Free)).collect();
    }

    /// After the last [`Flows::put`]: what is free.
    pub(super) fn settle(&mut self) {
        let slots = self.slots.iter().zip(0u32..);
        let free = slots.filter(|((_, flow), _)| matches!(flow, Slot::Free));
        self.free = free.map(|(_, slot)| slot).collect();
    }

    pub(super) fn get(&self, flow: FlowId) -> Option<&Rc<Connection>> {
        match self.slots.get(flow.slot() as usize)? {
            (generation, Slot::Open(connection))
                if generation & GENERATION == flow.generation() =>
            {
                Some(connection)
            }
            _ => None,
        }
    }

    pub(super) fn remove(&mut self, flow: FlowId) -> bool {
        if self.get(flow).is_none() && self.parked(flow).is_none() {
            return false;
        }
        self.slots[flow.slot() as usize].1 = Slot::Free;
        self.free.push(flow.slot());
        true
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Rc<Connection>> {
        self.slots.iter().filter_map(|(_, slot)| match slot {
            Slot::Open(connection) => Some(connection),
            Slot::Free | Slot::Parked(_) => None,
        })
    }
}
