//! Who is alive (RFC 3539 3.4), who owes answers, and goodbyes.

use std::time::{Duration, Instant};

use strowger_contract::{
    ClassId, CloseCause, Closing, Endpoint, Lanes, Level, Link, Outbox, Router,
};

use crate::avp::{FLAG_REQUEST, code};
use crate::build::Builder;
use crate::engine::DiameterEngine;
use crate::peer::{CAPABILITIES_TIMEOUT, DEVICE_WATCHDOG, DISCONNECT_TIMEOUT, REBOOTING, State};

/// How many times `stalled` a backend is out of use that owed answers, unless one of them comes; Tw
/// if that is longer.
const STALLED_PAUSE: u32 = 4;

impl DiameterEngine {
    /// Watchdogs, time-outs, goodbyes.
    pub(crate) fn look_after_peers(
        &mut self,
        now: Instant,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let clients: Vec<Endpoint> =
            self.clients.keys().map(|&flow| Endpoint::Client(flow)).collect();
        let links: Vec<Endpoint> =
            self.backends.keys().map(|&(backend, lane)| Endpoint::link(backend, lane)).collect();
        for endpoint in clients.into_iter().chain(links) {
            self.look_after(now, endpoint, router, out);
        }
    }

    fn look_after(
        &mut self,
        now: Instant,
        endpoint: Endpoint,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        if self.is_unwanted(endpoint, router) {
            return self.retire(now, endpoint, router, out);
        }
        let leave = self.draining && self.is_idle(endpoint, router);
        let stalled = self.is_stalled(now, endpoint, router);
        let Some(peer) = self.peer(endpoint) else { return };
        let (age, silent, watchdog) = (
            now.saturating_duration_since(peer.since),
            now.saturating_duration_since(peer.heard),
            peer.watchdog,
        );
        match peer.state {
            State::Introducing if age > CAPABILITIES_TIMEOUT => out.close(endpoint, Closing::Reset),
            State::Open if stalled => {
                self.suspect(now, endpoint, "diameter_stalled", router, out);
            }
            State::Leaving if age > DISCONNECT_TIMEOUT => out.close(endpoint, Closing::Flushed),
            State::Introducing | State::Leaving => {}
            State::Open if leave => self.disconnect(now, endpoint, REBOOTING, out),
            State::Open => match peer.asked {
                None if silent >= watchdog => self.ask(now, endpoint, out),
                Some(asked) if now.saturating_duration_since(asked) >= watchdog => {
                    self.suspect(now, endpoint, "diameter_watchdog_unanswered", router, out);
                }
                _ => {}
            },
            // RFC 3539 3.4.1: two more watchdogs' time, and it is down.
            State::Suspect if silent >= watchdog * 4 => self.drop_dead(endpoint, router, out),
            State::Suspect if peer.stalled_until.is_some_and(|until| until <= now) => {
                // It is alive by its watchdogs: another trial.
                if silent < watchdog {
                    peer.answered = now;
                    self.open(now, endpoint, router);
                }
            }
            State::Suspect if silent >= watchdog && peer.asked.is_none() => {
                self.ask(now, endpoint, out);
            }
            State::Suspect => {}
            State::Reopening(_) => match peer.asked {
                Some(asked) if now.saturating_duration_since(asked) >= watchdog * 2 => {
                    self.drop_dead(endpoint, router, out);
                }
                None if silent >= watchdog => self.ask(now, endpoint, out),
                _ => {}
            },
        }
    }

    /// Whether the connection serves as the link of a backend that is to have none, or several. Those
    /// that this node opened are the runtime's to retire.
    fn is_unwanted(&mut self, endpoint: Endpoint, router: &dyn Router) -> bool {
        let Endpoint::Client(flow) = endpoint else { return false };
        let Some(peer) = self.clients.get(&flow) else { return false };
        let Some(backend) = peer.serves.filter(|_| peer.state != State::Leaving) else {
            return false;
        };
        router.backend(backend).is_none_or(|view| !view.is_wanted || view.connections > 1)
    }

    /// Whether nothing of a client's, or nothing at a backend, is under way.
    pub(crate) fn is_idle(&self, peer: Endpoint, router: &dyn Router) -> bool {
        if let Some((backend, _)) = self.link_of(peer) {
            // Clients go first: as long as one is here, it may still ask.
            let clients = self.clients.values().any(|peer| peer.serves.is_none());
            let owes = router.backend(backend).is_some_and(|view| view.in_flight > 0);
            if clients || owes {
                return false;
            }
        }
        !matches!(peer, Endpoint::Client(_))
            || self.pending.find(|pending| pending.origin == peer).is_empty()
                && self.waiting.values().all(|pending| pending.origin != peer)
    }

    /// The peer is given up; if it comes back, it must prove itself.
    fn drop_dead(&mut self, endpoint: Endpoint, router: &mut dyn Router, out: &mut Outbox) {
        if let Some((backend, lane)) = self.link_of(endpoint) {
            router.give_up(backend, Lanes::bit(lane), true);
        }
        out.close(endpoint, Closing::Reset);
    }

    /// Whether a backend has owed answers for too long, on any worker, and given none.
    fn is_stalled(&mut self, now: Instant, endpoint: Endpoint, router: &dyn Router) -> bool {
        let limit = self.settings.options.stalled.0;
        let Some((backend, _)) = self.link_of(endpoint) else { return false };
        if limit.is_zero() {
            return false;
        }
        let view = router.backend(backend);
        let owes = view.is_some_and(|view| view.in_flight > 0);
        // Of several links one may have nothing to answer: any answer shows that the backend works.
        let elsewhere = view.filter(|view| view.connections > 1).and_then(|view| view.answered);
        let Some(peer) = self.peer(endpoint) else { return false };
        if !owes {
            peer.owes = None;
            return false;
        }
        let since = (*peer.owes.get_or_insert(now)).max(peer.answered);
        let since = elsewhere.map_or(since, |answered| since.max(answered));
        now.saturating_duration_since(since) >= limit
    }

    pub(crate) fn ask(&mut self, now: Instant, endpoint: Endpoint, out: &mut Outbox) {
        let end_to_end = self.next_end_to_end();
        if let Some(peer) = self.peer(endpoint) {
            peer.asked = Some(now);
        }
        let (identity, started) = (self.settings.identity(), self.settings.started);
        out.send(endpoint, ClassId::CONTROL, |bytes| {
            Builder::new(bytes, FLAG_REQUEST, DEVICE_WATCHDOG, 0, end_to_end, end_to_end)
                .text(code::ORIGIN_HOST, identity.host)
                .text(code::ORIGIN_REALM, identity.realm)
                .number(code::ORIGIN_STATE_ID, started)
                .finish();
        });
    }

    /// RFC 3539 3.4.1: what waits for it goes elsewhere.
    fn suspect(
        &mut self,
        now: Instant,
        endpoint: Endpoint,
        why: &'static str,
        router: &mut dyn Router,
        out: &mut Outbox,
    ) {
        let Some((backend, lane)) = self.link_of(endpoint) else {
            return out.close(endpoint, Closing::Reset);
        };
        let options = &self.settings.options;
        let again = now + options.watchdog.0.max(options.stalled.0 * STALLED_PAUSE);
        if let Some(peer) = self.peer(endpoint) {
            peer.state = State::Suspect;
            peer.stalled_until = (why == "diameter_stalled").then_some(again);
        }
        // Not only `Suspect`: other workers see by it that what they sent there is lost.
        self.set_link(now, (backend, lane), Link::Down(CloseCause::Idle), router);
        self.report(endpoint, router);
        out.event(Level::Warn, why, || {
            router.backend(backend).map(|view| view.name.to_owned()).unwrap_or_default()
        });
        self.fail_over_from(now, endpoint, true, router, out);
    }
}

/// How far a peer's clock is from ours: the smallest difference seen stands for no delay.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Skew {
    /// A moment of ours and the other's stamp then, in milliseconds, of the youngest message so far.
    base: Option<(Instant, u64)>,
}

impl Skew {
    /// How old a message is that arrived now with that stamp.
    pub(crate) fn age(&mut self, arrived: Instant, stamp: u64) -> Duration {
        let Some((then, stamped)) = self.base else {
            self.base = Some((arrived, stamp));
            return Duration::ZERO;
        };
        let passed = arrived.saturating_duration_since(then).as_millis();
        let ours = i128::try_from(passed).unwrap_or(i128::MAX) + i128::from(stamped);
        let age = ours - i128::from(stamp);
        if age <= 0 {
            self.base = Some((arrived, stamp));
        }
        Duration::from_millis(u64::try_from(age).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_told_without_equal_clocks() {
        let (mut skew, now) = (Skew::default(), Instant::now());
        let ms = Duration::from_millis;
        // The peer's clock is far ahead; its first message took 30 ms, which nobody can know.
        assert_eq!(skew.age(now, 1_000_000), ms(0));
        assert_eq!(skew.age(now + ms(100), 1_000_060), ms(40));
        // A faster one shows it.
        assert_eq!(skew.age(now + ms(200), 1_000_230), ms(0));
        assert_eq!(skew.age(now + ms(300), 1_000_260), ms(70));
    }
}
