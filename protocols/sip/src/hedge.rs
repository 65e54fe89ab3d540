//! Hedging: a request that its instance is slow with goes to a second one as well, and the first answer
//! wins.
//!
//! Only methods that the configuration names (it thereby says that doing them twice does no harm) and never
//! INVITE, only outside of dialogs, once, before the promised time is over, within the retry budgets, and
//! only if the second instance has a slot at once. What loses keeps its slot until its instance answers or
//! the transaction ends, since the instance works on it; its answer is dropped and counted.

use std::time::Instant;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use strowger_contract::duration::Span;
use strowger_contract::{Note, Outbox, Router, Verdict};

use crate::answers::At;
use crate::engine::SipEngine;
use crate::method::Method;
use crate::place::NextHop;
use crate::target::Hop;
use crate::transaction::State;

/// Which requests are sent twice, and when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Hedge {
    /// Methods that do no harm when two instances do them, such as OPTIONS. Never INVITE, ACK, CANCEL, BYE
    /// and PRACK.
    pub methods: Vec<String>,
    /// An instance that has not answered for so long is not waited for alone: 1 ms to 10 s.
    pub after: Span,
}

impl Hedge {
    /// What types cannot tell: the path below `hedge`, and what is wrong there.
    pub(crate) fn check(&self) -> Option<(String, String)> {
        if self.methods.is_empty() {
            return Some((".methods".into(), "names no method: nothing would be hedged".into()));
        }
        if self.after < Span::millis(1) || self.after > Span::secs(10) {
            return Some((".after".into(), "must be from 1ms to 10s".into()));
        }
        self.methods.iter().enumerate().find_map(|(index, name)| {
            let harms = match Method::of(name.as_bytes()) {
                Method::Invite => "would let two telephones ring",
                Method::Ack | Method::Cancel | Method::Bye | Method::Prack => {
                    "belongs to one instance's dialog"
                }
                Method::Other => "is no method that is known here",
                _ => return None,
            };
            Some((format!(".methods[{index}]"), format!("`{name}` {harms}")))
        })
    }
}

impl SipEngine {
    /// Notes when a request that was just sent is hedged, if it ever is.
    pub(crate) fn will_hedge(&mut self, now: Instant, slot: u32, hop: &Hop) {
        let Some(hedge) = &self.settings.options.hedge else { return };
        let Some(transaction) = self.transactions.get(slot) else { return };
        let word = transaction.method.word();
        if transaction.legs.len() == 1
            && matches!(hop, Hop::Backend { pin: None, in_session: false, .. })
            && hedge.methods.iter().any(|method| method == word)
        {
            transaction.hedge_at =
                Some(now + hedge.after.0).filter(|at| *at < transaction.deadline);
        }
    }

    /// The instance is slow: another one is asked as well.
    pub(crate) fn hedge(
        &mut self,
        now: Instant,
        slot: u32,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some(transaction) = self.transactions.get(slot) else { return };
        transaction.hedge_at = None;
        let wanted = transaction.state == State::Open
            && !transaction.cancelled
            && transaction.ticket.is_none()
            && transaction.legs.len() == 1
            && transaction.is_pending()
            && now < transaction.deadline
            && transaction.retries < router.class(transaction.class).retry;
        if !wanted {
            return;
        }
        if !self.pace.take_retry() {
            return out.note(Note::Count("sip_retry_budget_empty"));
        }
        let sent = self.with_request(slot, |engine, request, scan| {
            let wanted = engine.target_again(slot, request, scan, router)?;
            match engine.choose(now, slot, request, scan, &wanted, router, out) {
                Verdict::Go(route) => {
                    let hop = NextHop::of(&route);
                    engine.send_leg(now, slot, request, scan, &wanted, hop, false, router, out).ok()
                }
                // What is slow is not helped by what waits.
                Verdict::Wait(ticket) => {
                    router.withdraw(now, ticket);
                    None
                }
                Verdict::Refuse(_) => None,
            }
        });
        let Some(transaction) = self.transactions.get(slot) else { return };
        if sent.flatten().is_none() {
            return;
        }
        transaction.hedged = true;
        transaction.retries += 1;
        // It is replaced already; from now on the second one is watched.
        if let Some(first) = transaction.legs.first_mut() {
            first.failover_at = None;
        }
        out.note(Note::Count("sip_hedges"));
        out.note(Note::Retry("hedged"));
    }

    /// A final answer of one of two copies. A refusal leaves the race to the other, any other answer ends
    /// it. Whether the race goes on without this one.
    pub(crate) fn is_race_on(&mut self, at: At, refuses: bool) -> bool {
        let Some(transaction) = self.transactions.get(at.0).filter(|known| known.hedged) else {
            return false;
        };
        if refuses {
            let others = transaction.is_pending();
            if let Some(leg) = transaction.leg(at.1).filter(|_| others) {
                leg.abandoned = true;
            }
            return others;
        }
        for (index, leg) in transaction.legs.iter_mut().enumerate() {
            if index + 1 != usize::from(at.1) {
                leg.abandoned = true;
                leg.rest();
            }
        }
        false
    }
}
