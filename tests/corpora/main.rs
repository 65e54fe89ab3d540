//! Other people's messages (RFC 4475, RFC 5118, the RFCs' call flows, captures) through the parsers:
//! the verdict that their index gives, and every byte accounted for. Reads the folder that
//! `STROWGER_TESTDATA` names; without one, only the project's own tests of each rule remain.
#![allow(missing_docs)]

mod rsip_oracle;

use std::collections::BTreeMap;
use std::path::PathBuf;

use strowger_contract::{Framer, Framing};
use strowger_diameter::DiameterFramer;
use strowger_diameter::avp::{Avps, Header};
use strowger_sip::scan::{Name, Scan, Start};
use strowger_sip::{SipFramer, via::Via};

/// The rows of an index, by the names of its columns.
fn rows(index: &str) -> Vec<BTreeMap<String, String>> {
    let Some(folder) = folder() else { return Vec::new() };
    let text = std::fs::read_to_string(folder.join(index)).expect("the index");
    let mut lines = text.lines();
    let names: Vec<&str> = lines.next().expect("a head").split('\t').collect();
    let row = |line: &str| {
        names.iter().map(ToString::to_string).zip(line.split('\t').map(String::from)).collect()
    };
    lines.map(row).collect()
}

fn folder() -> Option<PathBuf> {
    let folder = std::env::var_os("STROWGER_TESTDATA").map(PathBuf::from);
    if folder.is_none() {
        println!("skipped: STROWGER_TESTDATA names no folder of messages");
    }
    folder
}

fn bytes(row: &BTreeMap<String, String>) -> Vec<u8> {
    let path = folder().expect("a folder").join(&row["path"]);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn sip_messages_get_the_verdict_of_their_index() {
    let mut wrong = Vec::new();
    for row in rows("sip/index.tsv") {
        let message = bytes(&row);
        let mut scan = Scan::default();
        let result = scan.scan(&message);
        let via = scan.value(&message, Name::Via).and_then(Via::first);
        let answerable = result.is_ok() && via.is_some();
        let request = matches!(scan.start, Start::Request { .. });
        match row["expected"].as_str() {
            "valid" if !answerable => wrong.push(format!("{}: {result:?}", row["path"])),
            "valid" if request != (row["kind"] == "request") => {
                wrong.push(format!("{}: {:?}", row["path"], scan.start));
            }
            // What no start line can be made of must not pass as a message.
            "invalid" if row["fatal_flags"] == "start-line" && result.is_ok() => {
                wrong.push(format!("{}: passed", row["path"]));
            }
            _ => {}
        }
        // Each header that was found lies inside of the message, and its value inside of its line.
        for header in &scan.headers {
            let (line, value) = (header.line, header.value);
            let fits = line.to() <= message.len() && line.from() <= value.from();
            assert!(fits && value.to() <= line.to(), "{}: {header:?}", row["path"]);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// However a stream is cut, the same message comes out of it.
#[test]
fn sip_streams_give_the_message_back() {
    for row in rows("sip/index.tsv").iter().filter(|row| row["expected"] == "valid") {
        let message = bytes(row);
        let mut scan = Scan::default();
        let has_length = scan.scan(&message).is_ok() && scan.first(Name::ContentLength).is_some();
        if !has_length {
            continue;
        }
        for step in [1, 7, message.len()] {
            let mut framer = SipFramer::default();
            let mut found = None;
            for end in (step..=message.len()).step_by(step).chain([message.len()]) {
                match framer.frame(&message[..end]) {
                    Ok(Framing::Message(length)) => {
                        found = Some(length.get());
                        break;
                    }
                    Ok(_) => {}
                    Err(error) => panic!("{}: {error}", row["path"]),
                }
            }
            let length = found.unwrap_or_else(|| panic!("{}: no message", row["path"]));
            assert!(length <= message.len(), "{}", row["path"]);
        }
    }
}

#[test]
fn diameter_messages_are_walked_to_their_end() {
    for row in rows("diameter/index.tsv") {
        let message = bytes(&row);
        let whole = DiameterFramer.frame(&message);
        assert!(
            matches!(whole, Ok(Framing::Message(length)) if length.get() == message.len()),
            "{}: {whole:?}",
            row["path"]
        );
        let header = Header::read(&message).expect("a header");
        assert_eq!(header.command.to_string(), row["cmd"], "{}", row["path"]);
        assert_eq!(header.application.to_string(), row["app_id"], "{}", row["path"]);
        assert_eq!(header.is_request(), row["flags"].contains('R'), "{}", row["path"]);
        let mut at = 20;
        let mut count = 0;
        for avp in Avps::of(&message) {
            let avp = avp.unwrap_or_else(|bad| panic!("{}: {bad:?}", row["path"]));
            let start = avp.whole.as_ptr() as usize - message.as_ptr() as usize;
            assert_eq!(start, at, "{}: a gap before AVP {}", row["path"], avp.code);
            at = start + avp.whole.len();
            count += 1;
        }
        assert_eq!(at, message.len(), "{}", row["path"]);
        assert_eq!(count.to_string(), row["top_avps"], "{}", row["path"]);
    }
}
