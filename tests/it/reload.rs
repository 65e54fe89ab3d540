//! The configuration of a running edge: files, signals, the API, and what is wrong.

use std::fs;
use std::net::{TcpListener, UdpSocket};

use crate::harness::{Edge, free_port, http};

fn config(port: u16, backends: usize) -> String {
    let list: Vec<String> = (0..backends)
        .map(|index| {
            format!("      - {{ id: b{index}, address: udp://127.0.0.1:{} }}\n", 20_000 + index)
        })
        .collect();
    format!(
        "version: 1\nnode: {{ workers: 1 }}\nadmin: {{ listen: ADMIN }}\nlisteners:\n  - {{ name: sip, protocol: sip, bind: [udp://127.0.0.1:{port}], pool: ims }}\npools:\n  ims:\n    debounce: 0\n    backends:\n{}",
        list.concat()
    )
}

fn count(edge: &Edge) -> usize {
    edge.json("/api/v1/pools/ims")["backends"].as_array().map_or(0, Vec::len)
}

#[test]
fn files_signals_and_the_api_change_it_and_what_is_wrong_does_not() {
    let port = free_port();
    let edge = Edge::start(&config(port, 1));
    edge.write_config(&config(port, 2));
    edge.until("the renamed file", |edge| count(edge) == 2);
    let text = config(port, 3).replace("ADMIN", &edge.admin.to_string());
    fs::write(edge.config_file(), &text).expect("written");
    edge.until("the file written in place", |edge| count(edge) == 3);
    fs::write(edge.config_file(), text.replace("backends:", "bakends:")).expect("written");
    edge.until("the refusal", |edge| edge.log().contains("did you mean `backends`?"));
    assert_eq!(count(&edge), 3, "a broken file must change nothing");
    assert_eq!(edge.metric("strowger_config_last_reload_successful", &[]), 0.0);
    fs::remove_file(edge.config_file()).expect("removed");
    edge.until("the complaint", |edge| edge.log().contains("cannot be read"));
    assert_eq!(count(&edge), 3, "a removed file must change nothing");
    edge.write_config(&config(port, 4));
    edge.until("the file that came back", |edge| count(edge) == 4);
    edge.process.hang_up();
    edge.until("the signal", |edge| edge.log().contains("SIGHUP"));
    let (code, body) = edge.put_config(&config(port, 5));
    assert_eq!((code, count(&edge)), (200, 5), "{body}");
    let (code, body) = edge.put_config("version: 2\npools: 7\n");
    assert_eq!(code, 422);
    assert!(
        body.contains("this release reads version 1") && body.contains("expected a map of names"),
        "{body}"
    );
    assert_eq!(count(&edge), 5);
}

#[test]
fn a_listener_that_cannot_be_bound_blocks_nothing_else() {
    let (taken, port, later) = (free_port(), free_port(), free_port());
    let _holder = UdpSocket::bind(("127.0.0.1", taken)).expect("a free port");
    let two = |first: u16| {
        config(port, 1).replace("pools:\n", &format!("  - {{ name: other, protocol: sip, bind: [udp://127.0.0.1:{first}], pool: ims }}\npools:\n"))
    };
    let edge = Edge::start(&two(later));
    assert_eq!(edge.put_config(&two(taken)).0, 200);
    let (code, body) = edge.get("/readyz?verbose").expect("an answer");
    assert_eq!(code, 503);
    assert!(body.contains(&format!("127.0.0.1:{taken}")), "{body}");
    let listeners = edge.json("/api/v1/listeners");
    assert!(listeners.to_string().contains(&format!("udp://127.0.0.1:{port}")), "{listeners}");
    assert!(
        listeners.to_string().contains(&format!("udp://127.0.0.1:{later}")),
        "the old one goes on: {listeners}"
    );
    assert_eq!(edge.put_config(&config(port, 1)).0, 200);
    edge.until("the old one to close", |_| UdpSocket::bind(("127.0.0.1", later)).is_ok());
    assert_eq!(edge.get("/readyz").expect("an answer").0, 200);
}

#[test]
fn the_api_says_what_is_wrong() {
    let edge = Edge::start(&config(free_port(), 1));
    for (method, path, code) in [
        ("GET", "/nothing", 404),
        ("DELETE", "/api/v1/pools", 405),
        ("GET", "/api/v1/pools/none", 404),
        ("POST", "/api/v1/pools/ims/instances/none/drain", 404),
        ("GET", "/api/v1/sessions?key=none", 404),
        ("GET", "/healthz", 200),
        ("GET", "/api/v1/sessions", 200),
        ("GET", "/", 200),
    ] {
        let (found, body) = http(edge.admin, method, path, "").expect("an answer");
        assert_eq!(found, code, "{method} {path}: {body}");
        assert!(code == 200 || body.contains("\"title\""), "{body}");
    }
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    drop(taken);
}

#[test]
fn sigterm_ends_it_in_order() {
    let mut edge = Edge::start(&config(free_port(), 1));
    assert_eq!(edge.process.terminate(), Some(0), "{}", edge.log());
    assert!(edge.log().contains("node_draining"));
}
