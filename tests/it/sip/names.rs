//! Next hops that are names: RFC 3263 through the real listener, with a name server that also fails.

use std::net::SocketAddr;
use std::time::Duration;

use super::phone::{Client, Server, headers, status};
use crate::harness::{Edge, free_port};
use crate::nameserver::NameServer;

const LIMIT: Duration = Duration::from_secs(30);

/// An edge whose only instance is a client of this test, which may ask for names.
struct Table {
    edge: Edge,
    names: NameServer,
    instance: Client,
    at: SocketAddr,
}

impl Table {
    fn new(options: &str) -> Self {
        let names = NameServer::start();
        let at = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let instance = Client::udp(at);
        let edge = Edge::start(&format!(
            "version: 1\nnode: {{ name: test, workers: 2 }}\nadmin: {{ listen: ADMIN }}\n\
             dns: {{ servers: [\"{}\"], query_timeout: 300ms, timeout: 1500ms }}\n\
             listeners:\n  - name: sip\n    protocol: sip\n    bind: [udp://{at}, tcp://{at}]\n    \
             pool: ims\n    options: {{ {options} }}\n\
             pools:\n  ims:\n    backends: [{{ id: a, address: udp://{} }}]\n",
            names.address,
            instance.local()
        ));
        Self { edge, names, instance, at }
    }

    /// The instance asks for something; the final answer.
    fn ask(&mut self, method: &str, uri: &str, call: &str) -> String {
        let request = self.instance.request(method, uri, "a", call);
        self.instance.send(request.as_bytes());
        self.instance.receive_answer_to(method, LIMIT).expect("an answer")
    }
}

/// NAPTR, SRV and A; nobody is at the first place, so the second gets it, within the transaction.
#[test]
fn a_name_leads_on_to_the_next_place_when_nobody_is_at_the_first() {
    let mut table = Table::new("");
    let phone = Server::polite();
    let nobody = free_port();
    table.names.naptr("phones.test.", 10, "SIP+D2U", "_sip._udp.phones.test.");
    table.names.srv("_sip._udp.phones.test.", 1, 0, nobody, "host.phones.test.");
    table.names.srv("_sip._udp.phones.test.", 2, 0, phone.address.port(), "host.phones.test.");
    table.names.a("host.phones.test.", "127.0.0.1");
    for number in 0..3 {
        let answer = table.ask("OPTIONS", "sip:bob@phones.test", &format!("srv-{number}"));
        assert_eq!(status(&answer), 200, "{answer}");
    }
    let seen = phone.seen_text();
    assert!(
        seen.iter().all(|text| text.starts_with("OPTIONS sip:bob@phones.test SIP/2.0")),
        "{seen:?}"
    );
    assert!(table.edge.metric("strowger_dns_lookups_total", &["outcome=\"found\""]) >= 1.0);
    assert!(table.edge.metric("strowger_dns_lookups_total", &["outcome=\"known\""]) >= 1.0);
    let naptr = table.names.asked().iter().filter(|name| name.ends_with("NAPTR")).count();
    assert_eq!(naptr, 1, "three requests, one question");
}

#[test]
fn a_name_that_leads_nowhere_is_told_in_words() {
    let mut table = Table::new("");
    let answer = table.ask("OPTIONS", "sip:bob@nowhere.test", "nowhere");
    assert!(answer.starts_with("SIP/2.0 478 Next Hop Does Not Resolve"), "{answer}");
    table.names.mute(true);
    let answer = table.ask("OPTIONS", "sip:bob@silent.test", "silent");
    assert!(answer.starts_with("SIP/2.0 504 Name Server Did Not Answer"), "{answer}");
}

/// A name server that says nothing holds who asked it, and nobody else; a held call can be
/// cancelled.
#[test]
fn a_mute_name_server_harms_no_other_traffic() {
    let mut table = Table::new("");
    table.names.mute(true);
    for number in 0..50 {
        let uri = format!("sip:bob@silent-{number}.test");
        let request = table.instance.request("INVITE", &uri, "a", &format!("held-{number}"));
        table.instance.send(request.as_bytes());
    }
    // The edge has answered each with 100 by now, or will; calls to the instance pass meanwhile.
    let mut caller = Client::udp(table.at);
    for number in 0..20 {
        let call = format!("other-{number}");
        let request = caller.request("OPTIONS", "sip:a@example.net", "c", &call);
        caller.send(request.as_bytes());
        let asked = loop {
            let message = table.instance.receive(LIMIT).expect("it passes");
            if message.starts_with("OPTIONS") {
                break message;
            }
        };
        table.instance.send(super::phone::answer(&asked, 200, "").as_bytes());
        let answer = caller.final_answer(LIMIT).expect("an answer");
        assert_eq!(status(&answer), 200, "{answer}");
    }
    let request = table.instance.request("INVITE", "sip:bob@cancelled.test", "a", "cancelled");
    table.instance.send(request.as_bytes());
    let cancel = request.replace("INVITE", "CANCEL").replace("cancelledCANCEL", "cancelledINVITE");
    table.instance.send(cancel.as_bytes());
    let answer = loop {
        let answer = table.instance.receive_answer_to("INVITE", LIMIT).expect("an answer");
        if headers(&answer, "Call-ID", "i") == ["cancelled"] {
            break answer;
        }
    };
    assert_eq!(status(&answer), 487, "{answer}");
}

/// Without transactions: the request and the response are held, and both go by name.
#[test]
fn a_stateless_listener_holds_requests_and_responses_for_their_names() {
    let mut table = Table::new("mode: stateless");
    let phone = Server::polite();
    table.names.a("phone.test.", "127.0.0.1");
    let uri = format!("sip:bob@phone.test:{}", phone.address.port());
    let answer = table.ask("OPTIONS", &uri, "stateless");
    assert_eq!(status(&answer), 200, "{answer}");
    let answer = table.ask("OPTIONS", "sip:bob@nowhere.test", "stateless-nowhere");
    assert_eq!(status(&answer), 478, "{answer}");
}

/// A name of the edge itself, which the configuration need not know: the pool's business.
#[test]
fn a_name_that_is_ours_is_the_pools() {
    let mut table = Table::new("");
    table.names.a("edge.test.", "127.0.0.1");
    let uri = format!("sip:bob@edge.test:{}", table.at.port());
    let request = table.instance.request("OPTIONS", &uri, "a", "ours");
    table.instance.send(request.as_bytes());
    let asked = table.instance.receive(LIMIT).expect("it comes back to the pool");
    assert!(asked.starts_with(&format!("OPTIONS {uri}")), "{asked}");
    table.instance.send(super::phone::answer(&asked, 200, "").as_bytes());
    let answer = table.instance.final_answer(LIMIT).expect("an answer");
    assert_eq!(status(&answer), 200, "{answer}");
}
