//! Overload control between neighbours (RFC 7339) and `sips:` (RFC 5630), through the real binary.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::phone::{Client, Server, answer, headers, status};
use crate::harness::{Edge, free_port};

const LONG: Duration = Duration::from_secs(30);

fn edge(port: u16, instance: SocketAddr, capacity: &str, options: &str) -> Edge {
    Edge::start(&format!(
        "version: 1\nnode: {{ name: test, workers: 2 }}\nadmin: {{ listen: ADMIN }}\nlisteners:\n  - {{ name: sip, protocol: sip, bind: [udp://127.0.0.1:{port}], pool: ims, options: {{ {options} }} }}\npools:\n  ims: {{ backends: [{{ id: a, address: udp://{instance}{capacity} }}] }}\n"
    ))
}

fn told(message: &str) -> Option<u32> {
    let via = *headers(message, "Via", "v").first()?;
    let value = via.split(';').find_map(|part| part.strip_prefix("oc="))?;
    value.parse().ok()
}

/// One slot, held by a call that rings: what else comes is refused, and whoever asks hears of it.
#[test]
fn a_neighbour_that_asks_hears_of_the_load() {
    let port = free_port();
    let phone = Server::new("127.0.0.1:0", |request: &str| match request {
        _ if request.starts_with("INVITE ") => vec![answer(request, 180, "")],
        _ => vec![],
    });
    let edge = edge(port, phone.address, ", capacity: 1", "");
    let at: SocketAddr = ([127, 0, 0, 1], port).into();
    let mut neighbour = Client::udp(at);
    let (end, mut number, mut highest) = (Instant::now() + LONG * 2, 0, 0);
    while highest == 0 {
        assert!(Instant::now() < end, "nothing was told of the load");
        for _ in 0..20 {
            number += 1;
            let call = format!("oc-{number}");
            let invite = neighbour.request("INVITE", "sip:bob@example.net", "alice", &call);
            neighbour.send(invite.replace(";rport", ";rport;oc;oc-algo=\"loss\"").as_bytes());
        }
        while let Some(said) = neighbour.receive(Duration::from_millis(100)) {
            let percent = told(&said).unwrap_or_else(|| panic!("{said}"));
            assert!(
                percent <= 100 && said.contains(";oc-seq=") && said.contains(";oc-validity=500")
            );
            highest = highest.max(percent);
        }
    }
    drop(edge);
}

/// An instance that asks for half gets half; and whoever is left out hears 503.
#[test]
fn an_instance_that_asks_for_half_gets_half() {
    let port = free_port();
    let phone = Server::new("127.0.0.1:0", |request: &str| {
        let told = ";oc=50;oc-algo=\"loss\";oc-validity=30000;oc-seq=1.1";
        vec![answer(request, 200, "").replacen(";oc;oc-algo=\"loss\"", told, 1)]
    });
    let edge = edge(port, phone.address, "", "overload_control: { client: true }");
    let mut client = Client::udp(([127, 0, 0, 1], port).into());
    let mut codes = Vec::new();
    for number in 0..41 {
        let call = format!("half-{number}");
        client.send(client.request("MESSAGE", "sip:bob@example.net", "alice", &call).as_bytes());
        codes.push(status(&client.final_answer(LONG).expect("an answer")));
    }
    let of = |code: u16| codes.iter().filter(|known| **known == code).count();
    assert_eq!((of(200), of(503)), (21, 20), "{codes:?}");
    assert!(edge.metric("strowger_protocol_total", &["sip_oc_left_out"]) >= 20.0);
    drop(edge);
}

#[test]
fn a_sips_request_is_refused_where_no_instance_has_tls() {
    let (port, phone) = (free_port(), Server::polite());
    let edge = edge(port, phone.address, "", "");
    let mut client = Client::udp(([127, 0, 0, 1], port).into());
    client.send(client.request("OPTIONS", "sips:bob@example.net", "alice", "s1").as_bytes());
    let said = client.final_answer(LONG).expect("an answer");
    assert_eq!(status(&said), 480, "{said}");
    assert!(headers(&said, "Warning", "")[0].starts_with("380 "), "{said}");
    assert!(phone.seen().is_empty());
    drop(edge);
}
