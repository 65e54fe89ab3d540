//! What the `rsip` crate reads in a message must be what our scan reads, wherever rsip accepts it.
//!
//! rsip refuses much that is legal and rewrites what it takes, so it never sees untrusted bytes in the
//! product; here it is a second opinion, by other people, on the same bytes.

use rsip::message::{HasHeaders as _, HeadersExt as _};
use rsip::prelude::{ToTypedHeader as _, UntypedHeader as _};
use strowger_sip::scan::{Name, Scan, Start};
use strowger_sip::uri::{Uri, name_addr, tag};
use strowger_sip::via::Via;

/// Where rsip is wrong by the RFC: the file, what it misreads, and why.
const RSIP_IS_WRONG: &[(&str, &str, &str)] = &[
    ("dblreq.dat", "From URI", "takes a user with a dot in it for a part of the host"),
    ("regaut01.dat", "From URI", "takes a user with a dot in it for a part of the host"),
    ("regescrt.dat", "how many Contact", "does not see the only Contact"),
];

/// rsip's opinion of a message, if it has one. Hostile input may make it panic: that is none.
fn opinion(message: &[u8]) -> Option<rsip::SipMessage> {
    let parse = || rsip::SipMessage::try_from(message).ok();
    std::panic::catch_unwind(parse).ok().flatten()
}

/// Differences between the two; what was compared is counted.
fn compare(message: &[u8], compared: &mut usize) -> Vec<String> {
    let Some(theirs) = opinion(message) else { return Vec::new() };
    let mut wrong = Vec::new();
    let mut ours = Scan::default();
    if let Err(error) = ours.scan(message) {
        return vec![format!("rsip takes it, we say {error:?}")];
    }
    let mut same = |what: &str, mine: &str, other: &str| {
        *compared += 1;
        if mine != other {
            wrong.push(format!("{what}: `{mine}` is `{other}` to rsip"));
        }
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let value = |name| ours.value(message, name).map(text).unwrap_or_default();
    match (&theirs, ours.start) {
        (rsip::SipMessage::Response(response), Start::Response { code }) => {
            same("status", &code.to_string(), &u16::from(response.status_code.clone()).to_string());
        }
        (rsip::SipMessage::Request(request), Start::Request { .. }) => {
            let mut words = message.split(|&byte| byte == b' ');
            let (method, uri) = (words.next().unwrap_or(b""), words.next().unwrap_or(b""));
            same("method", &text(method), &request.method.to_string());
            compare_uri("Request-URI", uri, &request.uri, &mut same);
        }
        _ => same("kind", "one kind", "another"),
    }
    for (name, other) in [
        (Name::CallId, theirs.call_id_header().map(|header| header.value().to_owned())),
        (Name::CSeq, theirs.cseq_header().map(|header| header.value().to_owned())),
        (Name::From, theirs.from_header().map(|header| header.value().to_owned())),
        (Name::To, theirs.to_header().map(|header| header.value().to_owned())),
        (Name::Via, theirs.via_header().map(|header| header.value().to_owned())),
        (Name::MaxForwards, theirs.max_forwards_header().map(|header| header.value().to_owned())),
    ] {
        if let Ok(other) = other {
            same(&format!("{name:?}"), &value(name), other.trim());
        }
    }
    if let Ok(from) = theirs.from_header()
        && let Ok(from) = from.typed()
    {
        let mine = value(Name::From);
        let my_tag = tag(mine.as_bytes()).map(text).unwrap_or_default();
        same(
            "From tag",
            &my_tag,
            &from.tag().map(|tag| tag.value().to_owned()).unwrap_or_default(),
        );
        if let Some((uri, _)) = name_addr(mine.as_bytes()) {
            compare_uri("From URI", uri, &from.uri, &mut same);
        }
    }
    if let Ok(via) = theirs.via_header()
        && let Ok(via) = via.typed()
        && let Some((mine, _)) = ours.value(message, Name::Via).and_then(Via::first)
    {
        same("Via transport", &text(mine.transport), &via.transport.to_string());
        same("Via host", &text(mine.host), &via.uri.host().to_string());
        let port = |port: Option<u16>| port.map_or(String::new(), |port| port.to_string());
        same("Via port", &port(mine.port), &port(via.uri.port().map(|port| *port.value())));
        let branch = via.branch().map(|branch| branch.value().to_owned()).unwrap_or_default();
        same("branch", &mine.branch().map(text).unwrap_or_default(), &branch);
    }
    let count = |wanted: Name| ours.headers.iter().filter(|found| found.name == wanted).count();
    let others = |wanted: fn(&rsip::Header) -> bool| {
        theirs.headers().iter().filter(|header| wanted(header)).count()
    };
    for (name, other) in [
        (Name::Via, others(|header| matches!(header, rsip::Header::Via(_)))),
        (Name::Route, others(|header| matches!(header, rsip::Header::Route(_)))),
        (Name::RecordRoute, others(|header| matches!(header, rsip::Header::RecordRoute(_)))),
        (Name::Contact, others(|header| matches!(header, rsip::Header::Contact(_)))),
    ] {
        same(&format!("how many {name:?}"), &count(name).to_string(), &other.to_string());
    }
    same("body", &text(&message[ours.body_at..]), &text(theirs.body()));
    wrong
}

fn compare_uri(
    what: &str,
    mine: &[u8],
    theirs: &rsip::Uri,
    same: &mut impl FnMut(&str, &str, &str),
) {
    let Some(mine) = Uri::parse(mine) else { return };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    // rsip keeps a password apart.
    let user = mine.user.map(text).unwrap_or_default();
    let user = user.split(':').next().unwrap_or_default().to_owned();
    same(&format!("{what} user"), &user, theirs.user().unwrap_or_default());
    same(&format!("{what} host"), &text(mine.host), &theirs.host().to_string());
    let port = |port: Option<u16>| port.map_or(String::new(), |port| port.to_string());
    same(&format!("{what} port"), &port(mine.port), &port(theirs.port().map(|port| *port.value())));
}

#[test]
fn rsip_reads_the_same_in_other_peoples_messages() {
    let (mut accepted, mut compared, mut wrong) = (0, 0, Vec::new());
    for row in super::rows("sip/index.tsv") {
        if row["expected"] != "valid" {
            continue;
        }
        let message = super::bytes(&row);
        accepted += usize::from(opinion(&message).is_some());
        for difference in compare(&message, &mut compared) {
            let is_known = |(file, what, _): &&(&str, &str, &str)| {
                row["path"].ends_with(file) && difference.starts_with(what)
            };
            if let Some((.., why)) = RSIP_IS_WRONG.iter().find(is_known) {
                println!("{}: rsip {why}", row["path"]);
                continue;
            }
            wrong.push(format!("{}: {difference}", row["path"]));
        }
    }
    println!("rsip took {accepted} messages; {compared} things were compared");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(super::folder().is_none() || accepted >= 20, "rsip took {accepted} only");
}

/// xorshift, so that a failing message can be made again.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit
    }

    fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.below(of.len())]
    }

    fn word(&mut self) -> String {
        let length = 1 + self.below(12);
        (0..length).map(|_| self.one(&["a", "Z", "7", "-", "_", ".", "x"])).collect()
    }
}

/// A message out of what both sides ought to understand.
fn message(random: &mut Random) -> String {
    let method = random.one(&["INVITE", "ACK", "BYE", "CANCEL", "OPTIONS", "REGISTER", "MESSAGE"]);
    let host = |random: &mut Random| match random.below(3) {
        0 => format!("10.{}.0.{}", random.below(256), random.below(256)),
        1 => "example.net".to_owned(),
        _ => format!("h{}.example.org:{}", random.below(99), 1_024 + random.below(60_000)),
    };
    let uri = |random: &mut Random| {
        let user =
            if random.below(4) == 0 { String::new() } else { format!("u{}@", random.below(999)) };
        let more = random.one(&["", ";transport=tcp", ";lr", ";user=phone"]);
        format!("{}:{user}{}{more}", random.one(&["sip", "sips"]), host(random))
    };
    let mut lines = vec![if random.below(3) == 0 {
        let code = random.one(&["100 Trying", "180 Ringing", "200 OK", "404 Not Found", "503 No"]);
        format!("SIP/2.0 {code}")
    } else {
        format!("{method} {} SIP/2.0", uri(random))
    }];
    for _ in 0..1 + random.below(3) {
        let transport = random.one(&["UDP", "TCP", "TLS"]);
        lines.push(format!(
            "Via: SIP/2.0/{transport} {};branch=z9hG4bK{}{}",
            host(random),
            random.word(),
            random.one(&["", ";rport", ";received=192.0.2.1"])
        ));
    }
    let name = |random: &mut Random| random.one(&["", "Alice ", "\"A. B\" "]).to_owned();
    lines.push(format!("From: {}<{}>;tag={}", name(random), uri(random), random.word()));
    lines.push(format!("To: {}<{}>", name(random), uri(random)));
    lines.push(format!("Call-ID: {}@{}", random.word(), random.word()));
    lines.push(format!("CSeq: {} {method}", random.below(100_000)));
    for header in ["Route", "Record-Route", "Contact"] {
        if random.below(2) == 0 {
            lines.push(format!("{header}: <{}>", uri(random)));
        }
    }
    lines.push(format!("Max-Forwards: {}", random.below(71)));
    lines.push(format!("X-Other: {}", random.word()));
    let body = if random.below(2) == 0 {
        String::new()
    } else {
        format!("v=0\r\ns={}\r\n", random.word())
    };
    lines.push(format!("Content-Length: {}", body.len()));
    format!("{}\r\n\r\n{body}", lines.join("\r\n"))
}

#[test]
fn rsip_reads_the_same_in_made_up_messages() {
    let mut random = Random(0x5eed_5eed_5eed_0001);
    let (mut accepted, mut compared) = (0, 0);
    for number in 0..5_000 {
        let text = message(&mut random);
        accepted += usize::from(opinion(text.as_bytes()).is_some());
        let wrong = compare(text.as_bytes(), &mut compared);
        assert!(wrong.is_empty(), "message {number}: {}\n{text}", wrong.join("\n"));
    }
    println!("rsip took {accepted} of 5,000; {compared} things were compared");
    assert!(accepted >= 2_500, "rsip took {accepted} of 5,000 only");
}
