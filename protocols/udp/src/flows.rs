//! The table of flows: by client, by number, and by how long they were silent.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use slab::Slab;
use strowger_contract::{BackendId, ClassId, PoolId, SessionKey, Ticket};

/// No flow.
const NONE: u32 = u32::MAX;

/// Who a flow belongs to: the listener's socket and the client's address.
pub(crate) type Client = (u16, SocketAddr);

/// One flow.
#[derive(Debug)]
pub(crate) struct Flow {
    pub(crate) client: Client,
    pub(crate) session: SessionKey,
    pub(crate) pool: PoolId,
    /// What is promised to it.
    pub(crate) class: ClassId,
    pub(crate) arrived: Instant,
    /// When the backend was first sent something.
    pub(crate) began: Instant,
    /// The one that has it; the router awaits its outcome.
    pub(crate) backend: Option<BackendId>,
    /// It waits for a slot.
    pub(crate) ticket: Option<Ticket>,
    pub(crate) tried: Vec<BackendId>,
    /// How long the first answer took.
    pub(crate) answered: Option<Duration>,
    /// Answers that are yet to come, where their number is known.
    pub(crate) owed: u32,
    /// What was not yet sent, or can be sent to another if ICMP says that nobody was there.
    pub(crate) kept: Vec<Box<[u8]>>,
    /// Told apart from an earlier flow of the same number.
    pub(crate) birth: u64,
    last: Instant,
    previous: u32,
    next: u32,
}

impl Flow {
    /// A flow that nothing was done for.
    pub(crate) fn new(
        now: Instant,
        client: Client,
        session: SessionKey,
        pool: PoolId,
        class: ClassId,
    ) -> Self {
        Self {
            client,
            session,
            pool,
            class,
            arrived: now,
            began: now,
            backend: None,
            ticket: None,
            tried: Vec::new(),
            answered: None,
            owed: 0,
            kept: Vec::new(),
            birth: 0,
            last: now,
            previous: NONE,
            next: NONE,
        }
    }
}

/// Flows in the order of their last datagram, the one that was silent longest first.
#[derive(Clone, Copy, Debug)]
struct Order {
    first: u32,
    last: u32,
}

/// The table.
#[derive(Debug)]
pub(crate) struct Flows {
    slab: Slab<Flow>,
    clients: HashMap<Client, u32>,
    /// Those that no backend has answered, and those that one has.
    orders: [Order; 2],
    births: u64,
}

impl Default for Flows {
    fn default() -> Self {
        let empty = Order { first: NONE, last: NONE };
        Self { slab: Slab::new(), clients: HashMap::new(), orders: [empty; 2], births: 0 }
    }
}

impl Flows {
    pub(crate) fn len(&self) -> usize {
        self.slab.len()
    }

    pub(crate) fn of(&self, client: &Client) -> Option<u32> {
        self.clients.get(client).copied()
    }

    pub(crate) fn get(&mut self, number: u32) -> Option<&mut Flow> {
        self.slab.get_mut(number as usize)
    }

    /// A new flow, spoken of last.
    pub(crate) fn insert(
        &mut self,
        now: Instant,
        client: Client,
        session: SessionKey,
        pool: PoolId,
        class: ClassId,
    ) -> u32 {
        self.births += 1;
        let mut flow = Flow::new(now, client, session, pool, class);
        flow.birth = self.births;
        let number = self.slab.insert(flow) as u32;
        self.clients.insert(client, number);
        self.append(number);
        number
    }

    /// All flows, with their numbers, the one that was silent longest first.
    pub(crate) fn by_silence(&self) -> Vec<(u32, &Flow, Instant)> {
        let mut all: Vec<_> =
            self.slab.iter().map(|(number, flow)| (number as u32, flow, flow.last)).collect();
        all.sort_by_key(|&(number, _, last)| (last, number));
        all
    }

    /// Enters flows under the numbers that they have in another process, in the order of
    /// [`Flows::by_silence`]; the backends that they have. Numbers that are there twice, or clients,
    /// count once.
    pub(crate) fn restore(&mut self, flows: Vec<(u32, Flow, Instant)>) -> Vec<BackendId> {
        let mut order = Vec::with_capacity(flows.len());
        let mut entered: HashMap<usize, Flow> = HashMap::with_capacity(flows.len());
        for (number, mut flow, last) in flows {
            if entered.contains_key(&(number as usize)) || self.clients.contains_key(&flow.client) {
                continue;
            }
            self.births += 1;
            (flow.birth, flow.last) = (self.births, last);
            self.clients.insert(flow.client, number);
            order.push(number);
            entered.insert(number as usize, flow);
        }
        let backends = entered.values().filter_map(|flow| flow.backend).collect();
        self.slab = entered.into_iter().collect();
        order.into_iter().for_each(|number| self.append(number));
        backends
    }

    pub(crate) fn remove(&mut self, number: u32) -> Option<Flow> {
        self.slab.get(number as usize)?;
        self.unlink(number);
        let flow = self.slab.try_remove(number as usize)?;
        self.clients.remove(&flow.client);
        Some(flow)
    }

    /// A datagram passed.
    pub(crate) fn touch(&mut self, now: Instant, number: u32) {
        self.unlink(number);
        self.slab[number as usize].last = now;
        self.append(number);
    }

    /// The backend's first answer came.
    pub(crate) fn answered(&mut self, now: Instant, number: u32, took: Duration) {
        self.unlink(number);
        let flow = &mut self.slab[number as usize];
        (flow.answered, flow.last) = (Some(took), now);
        self.append(number);
    }

    /// It has another backend, which has answered nothing yet.
    pub(crate) fn moved(&mut self, number: u32) {
        self.unlink(number);
        self.slab[number as usize].answered = None;
        self.append(number);
    }

    /// The flow that makes room: of those that nobody has answered the one that was silent longest,
    /// else of all. So a flood of made-up sources pushes out itself first.
    pub(crate) fn weakest(&self) -> Option<u32> {
        self.orders.iter().map(|order| order.first).find(|&number| number != NONE)
    }

    /// A flow that was silent for `idle`.
    pub(crate) fn expired(&self, now: Instant, idle: Duration) -> Option<u32> {
        let mut heads = self.orders.iter().map(|order| order.first).filter(|&head| head != NONE);
        heads.find(|&head| now >= self.slab[head as usize].last + idle)
    }

    /// When the next one will have been.
    pub(crate) fn next_expiry(&self, idle: Duration) -> Option<Instant> {
        let heads = self.orders.iter().map(|order| order.first).filter(|&head| head != NONE);
        heads.map(|head| self.slab[head as usize].last + idle).min()
    }

    fn order_of(&self, number: u32) -> usize {
        usize::from(self.slab[number as usize].answered.is_some())
    }

    fn append(&mut self, number: u32) {
        let which = self.order_of(number);
        let last = std::mem::replace(&mut self.orders[which].last, number);
        let flow = &mut self.slab[number as usize];
        (flow.previous, flow.next) = (last, NONE);
        match last {
            NONE => self.orders[which].first = number,
            last => self.slab[last as usize].next = number,
        }
    }

    fn unlink(&mut self, number: u32) {
        let which = self.order_of(number);
        let Flow { previous, next, .. } = self.slab[number as usize];
        match previous {
            NONE => self.orders[which].first = next,
            previous => self.slab[previous as usize].next = next,
        }
        match next {
            NONE => self.orders[which].last = previous,
            next => self.slab[next as usize].previous = previous,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_process_has_the_same_flows_in_the_same_order() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let key = SessionKey { stable: 1, keyed: 2 };
        let mut flows = Flows::default();
        for port in 0..5 {
            let client = (0, SocketAddr::from(([192, 0, 2, 1], port)));
            flows.insert(start, client, key, PoolId(0), ClassId::SETUP);
        }
        flows.touch(start + second * 2, 1);
        flows.answered(start + second, 3, second);
        flows.remove(2);
        let saved = flows.by_silence().into_iter().map(|(number, flow, last)| {
            let mut copy = Flow::new(start, flow.client, key, flow.pool, flow.class);
            copy.answered = flow.answered;
            (number, copy, last)
        });
        let twice: Vec<_> = {
            let saved: Vec<_> = saved.collect();
            let again = Flow::new(start, saved[0].1.client, key, PoolId(0), ClassId::SETUP);
            saved.into_iter().chain([(77, again, start)]).collect()
        };
        let mut restored = Flows::default();
        restored.restore(twice);
        assert_eq!(
            (restored.len(), restored.of(&(0, SocketAddr::from(([192, 0, 2, 1], 3))))),
            (4, Some(3))
        );
        loop {
            let (one, other) = (flows.weakest(), restored.weakest());
            assert_eq!(one, other);
            assert_eq!(flows.next_expiry(second), restored.next_expiry(second));
            let Some(number) = one else { break };
            assert!(flows.remove(number).is_some() && restored.remove(number).is_some());
        }
        // Numbers that are free are given anew.
        let client = (0, SocketAddr::from(([192, 0, 2, 9], 9)));
        restored.insert(start, client, key, PoolId(0), ClassId::SETUP);
        assert_eq!(restored.len(), 1);
    }

    #[test]
    fn the_silent_go_first_and_the_answered_last() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut flows = Flows::default();
        let key = SessionKey { stable: 1, keyed: 2 };
        let numbers: Vec<u32> = (0..4)
            .map(|port| {
                let client = (0, SocketAddr::from(([192, 0, 2, 1], port)));
                flows.insert(
                    start + second * u32::from(port),
                    client,
                    key,
                    PoolId(0),
                    ClassId::SETUP,
                )
            })
            .collect();
        flows.answered(start + second * 4, numbers[0], second);
        flows.touch(start + second * 5, numbers[1]);
        assert_eq!(flows.weakest(), Some(numbers[2]));
        assert_eq!(flows.next_expiry(second * 10), Some(start + second * 12));
        assert_eq!(flows.expired(start + second * 11, second * 10), None);
        assert_eq!(flows.expired(start + second * 12, second * 10), Some(numbers[2]));
        for number in [2, 3, 1, 0] {
            assert_eq!(flows.weakest(), Some(numbers[number]));
            let flow = flows.remove(numbers[number]).expect("there");
            assert_eq!(flows.of(&flow.client), None);
        }
        assert_eq!((flows.len(), flows.weakest(), flows.next_expiry(second)), (0, None, None));
        assert!(flows.remove(numbers[0]).is_none());
    }
}
