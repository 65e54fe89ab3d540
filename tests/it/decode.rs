//! `strowger decode` beside tshark's decodes of real messages.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn strowger(arguments: &[&str], file: &Path) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_strowger"))
        .arg("decode")
        .args(arguments)
        .arg(file)
        .output()
        .expect("it runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The messages of the folder of real ones, with their decodes.
fn messages() -> Vec<PathBuf> {
    let Some(folder) = std::env::var_os("STROWGER_TESTDATA") else { return Vec::new() };
    let mut found = Vec::new();
    let groups = std::fs::read_dir(Path::new(&folder).join("diameter"));
    for group in groups.into_iter().flatten().flatten() {
        let files = std::fs::read_dir(group.path()).into_iter().flatten().flatten();
        found.extend(
            files
                .map(|file| file.path())
                .filter(|file| file.extension().is_some_and(|extension| extension == "bin")),
        );
    }
    found.sort();
    found
}

/// Our AVPs beside theirs: the same codes in the same order, the same names and texts.
fn compare(ours: &Value, theirs: &Value, file: &Path) {
    let (ours, theirs) = (ours.as_array(), theirs.as_array().expect("a list"));
    let ours = ours.map_or(&[][..], Vec::as_slice);
    assert_eq!(ours.len(), theirs.len(), "{}", file.display());
    for (our, their) in ours.iter().zip(theirs) {
        let place = format!("{}: {their}", file.display());
        assert_eq!(our["code"], their["code"], "{place}");
        assert_eq!(our["vendor"].as_u64().unwrap_or(0), their["vendor_id"].as_u64().unwrap_or(0));
        assert!(our["error"].is_null(), "{our}");
        assert!(!our["name"].as_str().expect("a name").starts_with("AVP "), "no name: {place}");
        let value = our["value"].as_str().unwrap_or_default();
        if let Value::String(text) = &their["value"] {
            let bare = value.rsplit('(').next().unwrap_or_default().trim_end_matches(')');
            // Octets that they do not open, and a few that they do and we do not.
            let octets = text.replace(':', "") == their["data_hex"] || value.starts_with("0x");
            let group = our["value"].is_null();
            let address = text.parse::<std::net::IpAddr>().is_ok() && value.contains(text);
            let same = value.trim_matches('"') == text || bare == text;
            assert!(same || octets || group || address || value.ends_with('Z'), "{our} {place}");
        }
        if their["avps"].is_array() {
            compare(&our["members"], &their["avps"], file);
        }
    }
}

#[test]
fn real_messages_are_read_as_tshark_reads_them() {
    let messages = messages();
    assert!(
        !messages.is_empty() || std::env::var_os("CI").is_none(),
        "STROWGER_TESTDATA must name the real messages in CI"
    );
    for file in &messages {
        let theirs = std::fs::read(file.with_extension("json")).expect("its decode");
        let theirs: Value = serde_json::from_slice(&theirs).expect("JSON");
        let ours: Value = serde_json::from_str(&strowger(&["-o", "json"], file)).expect("JSON");
        assert_eq!(ours.as_array().map(Vec::len), Some(1));
        for (our, their) in [
            ("command", "command_code"),
            ("application_id", "application_id"),
            ("hop_by_hop", "hop_by_hop"),
            ("end_to_end", "end_to_end"),
            ("length", "length"),
        ] {
            assert_eq!(ours[0][our], theirs[their], "{} {our}", file.display());
        }
        assert!(ours[0]["application"].is_string(), "{}", file.display());
        compare(&ours[0]["avps"], &theirs["avps"], file);
    }
}

/// The same messages in captures: split over segments, out of order, sent twice.
#[test]
fn captures_are_put_together() {
    let messages = messages();
    let Some(file) = messages.first() else { return println!("skipped: no STROWGER_TESTDATA") };
    let message = std::fs::read(file).expect("a message");
    let two = [message.clone(), message].concat();
    let segment = |sequence: u32, syn: bool, bytes: &[u8]| {
        let mut packet = vec![0x45, 0];
        packet.extend((40 + bytes.len() as u16).to_be_bytes());
        packet.extend([0, 0, 0, 0, 64, 6, 0, 0, 127, 0, 0, 1, 127, 0, 0, 2]);
        packet.extend([0x9c, 0x40, 0x0f, 0x1c]);
        packet.extend(sequence.to_be_bytes());
        packet.extend([0, 0, 0, 0, 0x50, u8::from(syn) << 1, 0xff, 0xff, 0, 0, 0, 0]);
        packet.extend(bytes);
        packet
    };
    // The sequence numbers wrap in the midst of it.
    let start = u32::MAX - 30;
    let cut = |from: usize, to: usize| {
        segment(start.wrapping_add(1 + from as u32), false, &two[from..to])
    };
    let packets = [
        segment(start, true, b""),
        cut(0, 10),
        cut(40, two.len()),
        cut(5, 25),
        cut(0, 10),
        cut(20, 40),
    ];
    let folder = tempfile::TempDir::new().expect("a folder");
    let pcap = folder.path().join("a.pcap");
    let mut bytes = Vec::new();
    for number in [0xa1b2_c3d4u32, 0x0004_0002, 0, 0, 262_144, 101] {
        bytes.extend(number.to_le_bytes());
    }
    for packet in &packets {
        for number in [1, 500_000, packet.len() as u32, packet.len() as u32] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(packet);
    }
    std::fs::write(&pcap, bytes).expect("written");
    let first: Value = serde_json::from_str(&strowger(&["-o", "json"], &pcap)).expect("JSON");
    assert_eq!(first.as_array().map(Vec::len), Some(2), "{first}");
    assert_eq!(first[0]["way"], "127.0.0.1:40000 > 127.0.0.2:3868");
    assert_eq!(first[0]["time"], "1.500000000");
    // As pcapng, written by Wireshark's own tool.
    if crate::harness::has("editcap") {
        let next = folder.path().join("a.pcapng");
        let made = Command::new("editcap").args(["-F", "pcapng"]).arg(&pcap).arg(&next).output();
        assert!(made.expect("it runs").status.success());
        let second: Value = serde_json::from_str(&strowger(&["-o", "json"], &next)).expect("JSON");
        assert_eq!(first, second);
    }
    let text = strowger(&[], &pcap);
    assert!(text.contains("1.500000 127.0.0.1:40000 > 127.0.0.2:3868"), "{text}");
}

#[test]
fn what_is_no_message_is_said_so() {
    let folder = tempfile::TempDir::new().expect("a folder");
    let (file, dictionary) = (folder.path().join("x"), folder.path().join("d"));
    std::fs::write(&file, "hello").expect("written");
    std::fs::write(&dictionary, "avp 1 Name\n").expect("written");
    let run = |arguments: &[&Path]| {
        let output = Command::new(env!("CARGO_BIN_EXE_strowger"))
            .arg("decode")
            .args(arguments)
            .output()
            .expect("it runs");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(run(&[&file]).contains("no Diameter or SIP message"));
    let said = run(&[Path::new("--dictionary"), &dictionary, &file]);
    assert!(said.contains("line 1, column 11: something is missing here"), "{said}");
}
