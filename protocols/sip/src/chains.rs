//! What waits for a connection, found without a search: when one is closed, only what concerns it is looked
//! at, so that who opens and closes many of them makes nobody else's work.

use slab::Slab;
use strowger_contract::{Endpoint, stable_hash};

use crate::transaction::{KeyMap, Transaction};

/// What waits: a transaction's slot, and the number of its leg, or [`CLIENT`].
pub(crate) type Node = (u32, u8);

/// The client's side of a transaction, in place of a leg's number.
pub(crate) const CLIENT: u8 = 0;

/// The neighbours of what waits for the same connection.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Link {
    before: Option<Node>,
    after: Option<Node>,
}

/// The first one that waits, for each connection.
#[derive(Default)]
pub(crate) struct Chains {
    heads: KeyMap<Node>,
}

/// What a connection is known by. Instances have none here: those that wait for one of them are many, and no
/// stranger closes its connection. Nor have addresses.
fn key(peer: Endpoint, (_, side): Node) -> Option<u64> {
    match peer {
        Endpoint::Client(flow) => Some(flow.to_bits()),
        // Dialed again as often as it takes.
        Endpoint::Remote { .. } if side == CLIENT => None,
        Endpoint::Remote { transport, address } => {
            let port = u64::from(address.port()) << 8 | transport as u64;
            let ip = match address.ip() {
                std::net::IpAddr::V4(ip) => stable_hash(&ip.octets()),
                std::net::IpAddr::V6(ip) => stable_hash(&ip.octets()),
            };
            Some(ip ^ port)
        }
        Endpoint::Datagram { .. }
        | Endpoint::Backend(_)
        | Endpoint::Lane(..)
        | Endpoint::Outward(_) => None,
    }
}

/// Where the links are.
pub(crate) trait Links {
    fn link(&mut self, node: Node) -> Option<&mut Link>;
}

impl Links for Slab<Transaction> {
    fn link(&mut self, (slot, side): Node) -> Option<&mut Link> {
        let transaction = self.get_mut(slot as usize)?;
        if side == CLIENT {
            return Some(&mut transaction.link);
        }
        transaction.leg(side).map(|leg| &mut leg.link)
    }
}

impl Chains {
    /// It waits for `peer` from now on.
    pub(crate) fn add(&mut self, links: &mut impl Links, peer: Endpoint, node: Node) {
        let Some(key) = key(peer, node) else { return };
        let after = self.heads.insert(key, node);
        if let Some(next) = after.and_then(|after| links.link(after)) {
            next.before = Some(node);
        }
        if let Some(own) = links.link(node) {
            *own = Link { before: None, after };
        }
    }

    /// It waits no more for `peer`.
    pub(crate) fn take(&mut self, links: &mut impl Links, peer: Endpoint, node: Node) {
        let Some(key) = key(peer, node) else { return };
        let Some(own) = links.link(node).map(std::mem::take) else { return };
        if let Some(next) = own.after.and_then(|after| links.link(after)) {
            next.before = own.before;
        }
        match (own.before, own.after) {
            (Some(before), after) => {
                if let Some(previous) = links.link(before) {
                    previous.after = after;
                }
            }
            (None, Some(after)) => {
                self.heads.insert(key, after);
            }
            // One that was in no chain is nobody's head.
            (None, None) if self.heads.get(&key) == Some(&node) => {
                self.heads.remove(&key);
            }
            (None, None) => {}
        }
    }

    /// All that wait for `peer`, if that is kept of such; the oldest first.
    pub(crate) fn waiting(&self, links: &mut impl Links, peer: Endpoint) -> Option<Vec<Node>> {
        let key = key(peer, (0, 1))?;
        let mut found = Vec::new();
        let mut next = self.heads.get(&key).copied();
        // Each stands in one chain once.
        while let Some(node) = next {
            found.push(node);
            next = links.link(node).and_then(|link| link.after);
        }
        found.reverse();
        Some(found)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;
    use strowger_contract::{FlowId, Transport, WorkerId};

    use super::*;

    impl Links for HashMap<Node, Link> {
        fn link(&mut self, node: Node) -> Option<&mut Link> {
            self.get_mut(&node)
        }
    }

    fn peer(number: u32) -> Endpoint {
        if number < 3 {
            return Endpoint::Client(FlowId::new(WorkerId(0), number, 1));
        }
        let address = ([10, 0, 0, number as u8], 5060).into();
        Endpoint::Remote { transport: Transport::Tcp, address }
    }

    proptest! {
        #[test]
        fn what_waits_is_found_in_its_order_and_nothing_else_is(
            steps in proptest::collection::vec((0u32..5, 0u32..12, 1u8..3), 1..200),
        ) {
            let (mut chains, mut links) = (Chains::default(), HashMap::new());
            let mut model: Vec<(u32, Node)> = Vec::new();
            for (number, slot, side) in steps {
                let node = (slot, side);
                match model.iter().position(|(_, known)| *known == node) {
                    Some(at) => {
                        let (of, _) = model.remove(at);
                        chains.take(&mut links, peer(of), node);
                        links.remove(&node);
                    }
                    None => {
                        // Where it is no one's, nothing is taken.
                        links.insert(node, Link::default());
                        chains.take(&mut links, peer(number), node);
                        chains.add(&mut links, peer(number), node);
                        model.push((number, node));
                    }
                }
                for number in 0..5 {
                    let of = |known: &&(u32, Node)| known.0 == number;
                    let expected: Vec<_> = model.iter().filter(of).map(|it| it.1).collect();
                    prop_assert_eq!(chains.waiting(&mut links, peer(number)), Some(expected));
                }
            }
            let mut used: Vec<_> = model.iter().map(|(number, _)| *number).collect();
            used.sort_unstable();
            used.dedup();
            prop_assert_eq!(chains.heads.len(), used.len(), "nothing is kept of who is owed nothing");
        }
    }
}
