//! Diameter stacks that are not ours on both sides of the edge: freeDiameter, Erlang's diameter, and
//! a client on plain sockets in Python; and tshark's opinion of all that the edge emits.

mod emitted;
mod errors;
mod freediameter;
mod mediation;
mod secure;
mod several;
mod stacks;
mod states;
mod tap;
mod trace;

use std::collections::{HashMap, HashSet};

use strowger_diameter::avp::{Avps, FLAG_REQUEST, FLAG_RETRANSMITTED, Header, Summary, code};

use crate::harness::Edge;

pub(crate) use tap::{Tap, dissects};

const CER: u32 = 257;
const ACR: u32 = 271;
const DWR: u32 = 280;
const DPR: u32 = 282;

/// What stands before the listeners: time enough for peers that are slow to start, and two resends.
const HEAD: &str = "version: 1
node: { workers: 2, realm: example.net }
admin: { listen: ADMIN }
classes:
  setup: { deadline: 20s, retry: 2 }
  in-session: { deadline: 20s, retry: 2 }
  bulk: { deadline: 20s, retry: 2 }
";

/// An edge in front of these servers.
fn config(port: u16, servers: &[(&str, u16)], options: &str) -> String {
    let server = |(id, port): &(&str, u16)| {
        format!(
            "      - {{ id: {id}, address: tcp://127.0.0.1:{port}, origin_host: {id}.example.net }}\n"
        )
    };
    let servers: String = servers.iter().map(server).collect();
    format!(
        "{HEAD}listeners:
  - name: dra
    protocol: diameter
    bind: [tcp://127.0.0.1:{port}]
    options: {{ origin_host: edge.example.net, answer_timeout: 20s{options} }}
    routes: [ {{ match: {{ application: [acct, gy] }}, pool: servers }} ]
pools:
  servers:
    backends:
{servers}"
    )
}

fn until_up(edge: &Edge, ids: &[&str]) {
    edge.until("the servers to be up", |edge| {
        ids.iter().all(|id| edge.instance("servers", id)["health"] == "up")
    });
}

fn text(bytes: Option<&[u8]>) -> String {
    String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned()
}

fn header(message: &[u8]) -> Header {
    Header::read(message).expect("framed")
}

/// Requests of the applications among these messages.
fn relayed(messages: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let is_one = |message: &&Vec<u8>| {
        let header = header(message);
        header.is_request() && ![CER, DWR, DPR].contains(&header.command)
    };
    messages.iter().filter(is_one).cloned().collect()
}

/// What RFC 6733 5.5.4 knows a request by.
fn key(message: &[u8]) -> (String, u32) {
    (text(Summary::of(message).origin_host), header(message).end_to_end)
}

/// Each request that came to the edge got exactly one answer.
fn one_answer_each(clients: &Tap) {
    let mut answers: HashMap<u32, usize> = HashMap::new();
    let back = clients.back();
    for message in back.iter().filter(|message| !header(message).is_request()) {
        *answers.entry(header(message).end_to_end).or_default() += 1;
    }
    for request in relayed(&clients.forth()) {
        let count = answers.get(&header(&request).end_to_end).copied().unwrap_or(0);
        assert_eq!(count, 1, "answers to {:?}", key(&request));
    }
}

/// A request that a dead server had got came to another one with T, and no other did.
fn resends_bear_t(dead: &Tap, others: &[&Tap]) {
    let lost: HashSet<_> = relayed(&dead.forth()).iter().map(|message| key(message)).collect();
    let rest: Vec<_> = others.iter().flat_map(|tap| relayed(&tap.forth())).collect();
    let (again, fresh): (Vec<_>, Vec<_>) =
        rest.iter().partition(|message| lost.contains(&key(message)));
    assert!(!again.is_empty(), "nothing was pending at the server that died");
    let bears_t = |message: &&Vec<u8>| message[4] & FLAG_RETRANSMITTED != 0;
    assert!(again.iter().all(bears_t), "sent again without T");
    let recorded = |message: &Vec<u8>| {
        Avps::of(message).flatten().filter(|avp| avp.is(code::ROUTE_RECORD)).count()
    };
    assert!(rest.iter().all(|message| recorded(message) == 1), "one Route-Record each");
    assert!(!fresh.iter().any(|message| message[4] & FLAG_REQUEST == 0));
}
