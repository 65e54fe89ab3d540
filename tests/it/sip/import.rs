//! A dispatcher list as operators keep them, imported, checked and run.

use std::fs;
use std::process::{Command, Output};

use super::phone::{Client, Server};
use crate::harness::{Edge, free_port};

fn strowger(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_strowger")).args(arguments).output().expect("it runs")
}

const LIST: &str = r#"# setid(int) destination(sip uri) flags(int,opt) priority(int,opt) attrs(str,opt)

# --- media servers, production
1 sip:10.20.0.11:5060 8 10 duid=fs-11;weight=50;maxload=400;socket=udp:10.20.0.1:5060
1 sip:10.20.0.12:5060 8 10 duid=fs-12;weight=30;maxload=400;ping_from=sip:ping@edge.example.net
1 sip:10.20.0.13:5060;transport=tcp 12 5 duid=fs-13;weight=20;maxload=0
1 sip:10.20.0.12:5060 8 10 duid=fs-12-again
# --- carriers
2 sip:[2001:db8::20]:5080 0 0 weight=1
2 sips:sbc.carrier.example.net 0 0
2 sip:sbc2.carrier.example.net:5060 32 0 rweight=10;pstn=yes
-3 sip:voicemail@192.0.2.9
"#;

#[test]
fn a_list_becomes_a_configuration() {
    let folder = tempfile::TempDir::new().expect("a folder");
    let (list, yaml) = (folder.path().join("dispatcher.list"), folder.path().join("edge.yaml"));
    fs::write(&list, LIST).expect("written");
    let path = list.to_str().expect("a path");
    let output = strowger(&["import", "kamailio", path, "--algorithm", "9", "--set", "-3=0"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("text");
    for line in [
        "      - { id: \"fs-11\", address: \"udp://10.20.0.11:5060\", weight: 50, capacity: 400 }",
        "      - { id: \"fs-13\", address: \"tcp://10.20.0.13:5060\", weight: 20, state: suspended }",
        "    #! priorities only order the list with algorithm 9: left out",
        "      #! line 7: algorithm 9 gives it only what is left of 100",
        "      #! line 4: socket=udp:10.20.0.1:5060: the edge sends from",
        "      #! line 5: ping_from=sip:ping@edge.example.net: probes carry",
        "      #! line 6: maxload=0: 0 means no limit",
        "      #! line 7: sip:10.20.0.12:5060 is left out: line 5 has its address",
        "    health: { probe: sip-options }",
        "address: \"udp://[2001:db8::20]:5080\", weight: 1 }",
        "      #! line 11: sip:sbc2.carrier.example.net:5060 is left out: `sbc2.carrier.example.net` is a name",
        "      #! line 11: pstn=yes: is your script's own",
        "  set-minus-3:    # algorithm 0",
        "    balance: weighted-random",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    fs::write(&yaml, &text).expect("written");
    let checked = strowger(&["check", yaml.to_str().expect("a path")]);
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
}

#[test]
fn what_is_no_list_is_refused_line_by_line() {
    let folder = tempfile::TempDir::new().expect("a folder");
    let list = folder.path().join("dispatcher.list");
    fs::write(&list, "1 sip:10.0.0.1\none sip:10.0.0.2\n2 10.0.0.3\n").expect("written");
    let output = strowger(&["import", "kamailio", list.to_str().expect("a path")]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(
        told.contains("line 2: `one` is no set") && told.contains("line 3: `10.0.0.3`"),
        "{told}"
    );
}

#[test]
fn what_was_imported_carries_calls() {
    let servers = [Server::polite(), Server::polite()];
    let list: String =
        servers.iter().map(|server| format!("1 sip:{} 0 0\n", server.address)).collect();
    let folder = tempfile::TempDir::new().expect("a folder");
    let file = folder.path().join("dispatcher.list");
    fs::write(&file, list).expect("written");
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let path = file.to_str().expect("a path");
    let output = strowger(&["import", "kamailio", path, "--algorithm", "4", "--listen", &listen]);
    let yaml = String::from_utf8(output.stdout).expect("text");
    let _edge = Edge::start(&format!("{yaml}admin: {{ listen: ADMIN }}\n"));
    let mut client = Client::udp(([127, 0, 0, 1], port).into());
    for number in 0..20 {
        let message =
            client.request("MESSAGE", "sip:x@example.net", "alice", &format!("i{number}"));
        client.send(message.as_bytes());
        client.final_answer(std::time::Duration::from_secs(15)).expect("answered");
    }
    assert!(servers.iter().all(|server| server.seen().len() >= 5), "both get their share");
}

/// What only orders a list with one algorithm makes groups with another.
#[test]
fn priorities_and_weights_mean_what_the_algorithm_makes_of_them() {
    let folder = tempfile::TempDir::new().expect("a folder");
    let list = folder.path().join("dispatcher.list");
    let text = "1 sip:10.0.0.1 0 5 weight=60;rweight=3\n1 sip:10.0.0.2 0 9 weight=20\n1 sip:10.0.0.3 0 5\n";
    fs::write(&list, text).expect("written");
    let backends = |algorithm: &str| -> Vec<String> {
        let path = list.to_str().expect("a path");
        let output = strowger(&["import", "kamailio", path, "--algorithm", algorithm]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).expect("text");
        let lines = text.lines().filter(|line| line.starts_with("      - {"));
        let lines = lines.filter_map(|line| line.split_once(":5060\""));
        lines.map(|(_, rest)| rest.to_owned()).collect()
    };
    assert_eq!(backends("4"), [" }", " }", " }"]);
    assert_eq!(backends("8"), [", priority: 2 }", " }", ", priority: 3 }"]);
    assert_eq!(backends("14"), [", priority: 2 }", " }", ", priority: 2 }"]);
    assert_eq!(backends("9"), [", weight: 60 }", ", weight: 20 }", ", weight: 20 }"]);
    assert_eq!(backends("11"), [", weight: 3 }", ", weight: 0 }", ", weight: 0 }"]);
    assert_eq!(
        backends("15"),
        [", weight: 60, priority: 2 }", ", weight: 20 }", ", priority: 2 }"]
    );
}

/// Each parameter, function and command in Kamailio's own description stands in ours.
#[test]
fn the_guide_names_all_that_the_dispatcher_has() {
    let readme = "/usr/share/doc/kamailio/modules/README.dispatcher.gz";
    if !std::path::Path::new(readme).exists() {
        println!("skipped: {readme} is not there");
        return;
    }
    let output = Command::new("zcat").arg(readme).output().expect("zcat runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let guide = include_str!("../../../docs/from-kamailio.md");
    let mut named = 0;
    for line in text.lines().map(str::trim) {
        let (section, rest) = line.split_once(". ").unwrap_or_default();
        let inside = ["3.", "4.", "5."].iter().any(|chapter| section.starts_with(chapter));
        let name: String = rest
            .trim_start()
            .chars()
            .take_while(|letter| letter.is_ascii_alphanumeric() || "_.".contains(*letter))
            .collect();
        if inside && section.len() <= 4 && (name.contains('_') || name.contains("dispatcher.")) {
            named += 1;
            assert!(guide.contains(&name), "docs/from-kamailio.md does not name {name}");
        }
    }
    assert!(named >= 60, "only {named} names were found in {readme}");
}
