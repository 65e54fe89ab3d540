//! The connections of one worker, by number.

use std::rc::Rc;

use strowger_contract::{FlowId, WorkerId};

use crate::runtime::stream::Connection;

/// The flows of one worker, by slot.
#[derive(Default)]
pub(super) struct Flows {
    slots: Vec<(u32, Option<Rc<Connection>>)>,
    free: Vec<u32>,
}

impl Flows {
    pub(super) fn reserve(&mut self, worker: WorkerId) -> FlowId {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push((0, None));
            (self.slots.len() - 1) as u32
        });
        let entry = &mut self.slots[slot as usize];
        entry.0 = entry.0.wrapping_add(1);
        FlowId::new(worker, entry.0, slot)
    }

    pub(super) fn set(&mut self, flow: FlowId, connection: Rc<Connection>) {
        self.slots[flow.slot() as usize].1 = Some(connection);
    }

    pub(super) fn get(&self, flow: FlowId) -> Option<&Rc<Connection>> {
        let (generation, connection) = self.slots.get(flow.slot() as usize)?;
        (generation & 0x00ff_ffff == flow.generation()).then_some(connection.as_ref()).flatten()
    }

    pub(super) fn remove(&mut self, flow: FlowId) -> bool {
        if self.get(flow).is_none() {
            return false;
        }
        self.slots[flow.slot() as usize].1 = None;
        self.free.push(flow.slot());
        true
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Rc<Connection>> {
        self.slots.iter().filter_map(|(_, connection)| connection.as_ref())
    }
}
