//! Our dictionary beside Wireshark's, where that is installed: codes, types and names agree.
#![allow(missing_docs)]

use std::collections::HashMap;
use std::path::Path;

use strowger_diameter::dictionary::{Dictionary, Kind};

const FOLDER: &str = "/usr/share/wireshark/diameter";
const FILES: [&str; 8] = [
    "dictionary.xml",
    "chargecontrol.xml",
    "TGPP.xml",
    "nasreq.xml",
    "mobileipv4.xml",
    "mobileipv6.xml",
    "etsie2e4.xml",
    "eap.xml",
];

/// Codes where Wireshark's type is not the RFC's or 3GPP's: EAP-Key-Name (RFC 4072 4.1.4) and
/// Codec-Data (TS 29.214 5.3.7) are OctetString, Authorization-Lifetime (RFC 6733 8.9) Unsigned32.
const OTHER_TYPES: [(u32, u32); 3] = [(0, 102), (10_415, 524), (0, 291)];

/// RFC 6733 9.8.5 calls it so.
const OTHER_NAMES: [(u32, u32); 1] = [(0, 50)];

fn attribute<'a>(tag: &'a str, name: &str) -> Option<&'a str> {
    let start = tag.find(&format!(" {name}=\""))? + name.len() + 3;
    tag[start..].split('"').next()
}

/// Theirs by (vendor, code): names and types.
fn wireshark() -> HashMap<(u32, u32), Vec<(String, String)>> {
    let mut found: HashMap<_, Vec<_>> = HashMap::new();
    for file in FILES {
        let Ok(bytes) = std::fs::read(Path::new(FOLDER).join(file)) else { continue };
        let mut text = String::from_utf8_lossy(&bytes).into_owned();
        while let Some(start) = text.find("<!--") {
            let end = text[start..].find("-->").map_or(text.len(), |end| start + end + 3);
            text.replace_range(start..end, "");
        }
        for part in text.split("<avp ").skip(1) {
            let body = part.split("</avp>").next().unwrap_or_default();
            let tag = format!(" {}", body.split('>').next().unwrap_or_default());
            let vendor = match attribute(&tag, "vendor-id") {
                None | Some("None") => 0,
                Some("TGPP") => 10_415,
                Some("ETSI") => 13_019,
                _ => continue,
            };
            let code = attribute(&tag, "code").and_then(|code| code.parse().ok());
            let (Some(name), Some(code)) = (attribute(&tag, "name"), code) else { continue };
            let kind = body.find("<type").and_then(|at| attribute(&body[at..], "type-name"));
            let kind = if body.contains("<grouped") { "Grouped" } else { kind.unwrap_or("?") };
            found.entry((vendor, code)).or_default().push((name.to_owned(), kind.to_owned()));
        }
    }
    found
}

/// Whether two names of types mean the same bytes.
fn agree(ours: Kind, theirs: &str) -> bool {
    ours.name() == theirs
        || match theirs {
            "AppId" | "VendorId" => ours == Kind::Unsigned32,
            "Enumerated" => matches!(ours, Kind::Unsigned32 | Kind::Integer32),
            "IPAddress" => matches!(ours, Kind::Address | Kind::OctetString),
            "OctetStringOrUTF8" => matches!(ours, Kind::OctetString | Kind::Utf8String),
            _ => false,
        }
}

#[test]
fn ours_agrees_with_wiresharks() {
    let theirs = wireshark();
    if theirs.is_empty() {
        assert!(std::env::var_os("CI").is_none(), "tshark must be installed in CI");
        return println!("skipped: {FOLDER} is not there");
    }
    let bare = |name: &str| {
        let name = name.to_ascii_lowercase();
        let prefix = ["3gpp-", "cx-", "sh-"].into_iter().find(|prefix| name.starts_with(prefix));
        name[prefix.map_or(0, str::len)..].to_owned()
    };
    let (mut compared, mut wrong) = (0, Vec::new());
    for avp in Dictionary::built_in().avps() {
        let key = (avp.vendor, avp.code);
        let Some(known) = theirs.get(&key) else { continue };
        compared += 1;
        let named = OTHER_NAMES.contains(&key)
            || known.iter().any(|(name, _)| bare(name) == bare(&avp.name));
        let typed =
            OTHER_TYPES.contains(&key) || known.iter().any(|(_, kind)| agree(avp.kind, kind));
        if !named || !typed {
            wrong.push(format!("{key:?} {} {}: {known:?}", avp.name, avp.kind.name()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(compared > 350, "only {compared} AVPs are in both");
}
