//! What goes to another process: transactions with their timers, and answered calls' records. Their
//! slots and numbers stay, since branches that are out name them. What was measured of instances,
//! rates and scanners begins anew.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use strowger_contract::handover::{Broken, read, write};
use strowger_contract::{BackendId, Outbox, RequestOutcome, Router};

use crate::calls::Open;
use crate::engine::SipEngine;
use crate::transaction::{LEGS_MAX, Transaction};

/// Slots of one worker, at most: a number from outside must not make a table of its size.
const SLOTS_MAX: u32 = 1 << 20;

#[derive(Serialize)]
struct Saved<'a> {
    /// Connections keep their numbers as well.
    epoch: u32,
    transactions: Vec<(u32, &'a Transaction)>,
    calls: (u64, Vec<(u32, &'a Open)>),
}

#[derive(Deserialize)]
struct Restored {
    epoch: u32,
    transactions: Vec<(u32, Transaction)>,
    calls: (u64, Vec<(u32, Open)>),
}

impl Restored {
    fn is_sound(&self) -> bool {
        self.transactions.iter().all(|(slot, it)| {
            *slot < SLOTS_MAX && usize::from(it.tries) <= LEGS_MAX && it.legs.len() <= LEGS_MAX
        }) && self.calls.1.iter().all(|(slot, _)| *slot < SLOTS_MAX)
    }
}

impl SipEngine {
    pub(crate) fn saved(&self) -> Vec<u8> {
        let epoch = self.settings.epoch;
        write(&Saved { epoch, transactions: self.transactions.all(), calls: self.calls.all() })
    }

    pub(crate) fn take_over(
        &mut self,
        now: Instant,
        saved: &[u8],
        router: &mut dyn Router,
        out: &mut Outbox,
    ) -> Result<(), Broken> {
        let mut saved: Restored = read(saved)?;
        if !saved.is_sound() {
            return Err(Broken);
        }
        self.settings.epoch = saved.epoch;
        let (mut slots, mut waited) = (Vec::new(), Vec::new());
        for (slot, transaction) in &mut saved.transactions {
            transaction.wakes_at = None;
            // Tickets mean nothing here.
            if transaction.ticket.take().is_some() {
                transaction.ends_at = None;
                waited.push(*slot);
            } else if transaction.named.until.take().is_some() {
                // What name servers say is heard by the process that asked.
                waited.push(*slot);
            }
            let owed = transaction.legs.iter().filter(|leg| leg.owed);
            for backend in owed.filter_map(|leg| leg.backend).collect::<Vec<BackendId>>() {
                router.resume(now, backend);
            }
            slots.push(*slot);
        }
        self.transactions.take_over(saved.transactions);
        for (until, key) in self.calls.take_over(saved.calls.0, saved.calls.1) {
            self.wheel_insert(now, until, key);
        }
        for slot in waited {
            self.place_again(now, slot, router, out);
        }
        for slot in slots {
            self.schedule(now, slot);
        }
        Ok(())
    }

    /// A request that waited in the other process's queue is placed as if it had come just now.
    fn place_again(&mut self, now: Instant, slot: u32, router: &mut dyn Router, out: &mut Outbox) {
        let sent = self.with_request(slot, |engine, request, scan| {
            let contact = engine.named_uri(slot);
            let wanted = engine.target_again(slot, request, scan, router)?;
            let wanted = crate::lookup::by_contact(wanted, contact.as_deref());
            Some(engine.place_and_send(now, slot, request, scan, &wanted, router, out))
        });
        if let Some(Err((answer, _))) = sent.flatten() {
            self.end_with(now, slot, &answer, RequestOutcome::Failed, out);
        }
    }
}
