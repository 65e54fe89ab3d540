//! Messages as clients and instances send them.

use std::net::SocketAddr;

use strowger_contract::{Command, Endpoint, Outbox};
use strowger_diameter::avp::{FLAG_REQUEST, Header, Summary, code};
use strowger_diameter::build::Builder;

pub const SIP: &str = "version: 1
node: { name: edge, realm: example.net }
listeners:
  - { name: sip, protocol: sip, bind: [udp://192.0.2.1:5060], pool: ims }
pools:
  ims:
    backends:
      - { id: a, address: udp://192.0.2.11:5060 }
      - { id: b, address: udp://192.0.2.12:5060 }
      - { id: c, address: udp://192.0.2.13:5060 }
";

pub const DIAMETER: &str = "version: 1
node: { name: edge, realm: example.net }
listeners:
  - { name: dra, protocol: diameter, bind: [tcp://192.0.2.1:3868], pool: pcrf, options: { origin_host: edge.example.net } }
pools:
  pcrf:
    backends:
      - { id: a, address: tcp://192.0.2.11:3868 }
      - { id: b, address: tcp://192.0.2.12:3868 }
";

pub fn client() -> SocketAddr {
    ([198, 51, 100, 7], 5_062).into()
}

/// A request outside of a dialog, or in one when `to` has a tag; an INVITE of about 1.3 kB.
pub fn sip_request(
    method: &str,
    call: u64,
    branch: &str,
    uri: &str,
    to: &str,
    routes: &str,
) -> Vec<u8> {
    let body = if method == "INVITE" { SDP } else { "" };
    let (client, number) = (client(), if method == "BYE" { 2 } else { 1 });
    format!(
        "{method} {uri} SIP/2.0\r\n\
         Via: SIP/2.0/UDP {client};branch=z9hG4bK{branch}{call};rport\r\n\
         {routes}\
         Max-Forwards: 70\r\n\
         From: \"Alice Liddell\" <sip:alice@example.net>;tag=9fxced76sl{call}\r\n\
         To: {to}\r\n\
         Call-ID: 3848276298220188511@{call}.client.example.net\r\n\
         CSeq: {number} {method}\r\n\
         Contact: <sip:alice@{client};transport=udp>\r\n\
         P-Asserted-Identity: <tel:+15551230001>\r\n\
         P-Access-Network-Info: 3GPP-E-UTRAN-FDD;utran-cell-id-3gpp=2620110010000001\r\n\
         P-Charging-Vector: icid-value=\"AyretyU0dm+6O2IrT5tAFrbHLso={call}\";orig-ioi=home1.example.net\r\n\
         Supported: 100rel, timer, precondition, replaces, gruu\r\n\
         Allow: INVITE, ACK, CANCEL, OPTIONS, BYE, REFER, NOTIFY, MESSAGE, UPDATE, PRACK\r\n\
         Session-Expires: 1800;refresher=uac\r\n\
         User-Agent: Example UA 4.2 (build 1881)\r\n\
         Content-Type: application/sdp\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len(),
    )
    .into_bytes()
}

const SDP: &str = "v=0\r\no=alice 2890844526 2890844526 IN IP4 198.51.100.7\r\ns=-\r\nc=IN IP4 198.51.100.7\r\nt=0 0\r\nm=audio 49170 RTP/AVP 107 9 0 8 101\r\na=rtpmap:107 AMR-WB/16000\r\na=fmtp:107 mode-set=0,1,2;mode-change-capability=2\r\na=rtpmap:101 telephone-event/8000\r\na=fmtp:101 0-15\r\na=ptime:20\r\na=maxptime:240\r\na=sendrecv\r\n";

fn values<'a>(text: &'a str, name: &str) -> impl Iterator<Item = &'a str> {
    text.split("\r\n").take_while(|line| !line.is_empty()).filter(move |line| {
        line.split(':').next().is_some_and(|found| found.eq_ignore_ascii_case(name))
    })
}

/// What an instance answers to a request that it got; `None` if the bytes are no request.
pub fn sip_answer(request: &[u8], code: u16) -> Option<Vec<u8>> {
    let text = String::from_utf8_lossy(request);
    if text.starts_with("SIP/2.0") {
        return None;
    }
    let mut answer = format!("SIP/2.0 {code} Answer\r\n");
    for name in ["Via", "Record-Route", "From", "To", "Call-ID", "CSeq"] {
        for line in values(&text, name) {
            answer += line;
            if name == "To" && !line.contains(";tag=") {
                answer += ";tag=uas1";
            }
            answer += "\r\n";
        }
    }
    answer += "Contact: <sip:bob@192.0.2.11:5060>\r\nContent-Length: 0\r\n\r\n";
    Some(answer.into_bytes())
}

/// The routes of a dialog, from an answer of the callee's.
pub fn sip_routes(answer: &[u8]) -> String {
    let text = String::from_utf8_lossy(answer);
    let routes: Vec<String> = values(&text, "Record-Route")
        .map(|line| line.replacen("Record-Route", "Route", 1) + "\r\n")
        .collect();
    routes.into_iter().rev().collect()
}

/// What was sent: to whom, and the bytes.
pub fn sent(out: &Outbox) -> Vec<(Endpoint, Vec<u8>)> {
    let sent = out.commands().iter().filter_map(|command| match command {
        Command::Send(frame) => Some((frame.to, out.bytes(&frame.bytes).to_vec())),
        _ => None,
    });
    sent.collect()
}

/// Capabilities of a client.
pub fn capabilities(host: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    Builder::new(&mut bytes, FLAG_REQUEST, 257, 0, 1, 1)
        .text(code::ORIGIN_HOST, host)
        .text(code::ORIGIN_REALM, "example.net")
        .number(code::AUTH_APPLICATION_ID, u32::MAX)
        .finish();
    bytes
}

/// A credit-control request of about 500 B.
pub fn diameter_request(number: u32, session: u64, kind: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    Builder::request(&mut bytes, 272, 4, number, number)
        .text(code::SESSION_ID, &format!("client.example.net;1876543210;{session}"))
        .text(code::ORIGIN_HOST, "client.example.net")
        .text(code::ORIGIN_REALM, "example.net")
        .text(code::DESTINATION_REALM, "example.net")
        .number(code::AUTH_APPLICATION_ID, 4)
        .number(code::CC_REQUEST_TYPE, kind)
        .number(415, 0)
        .text(461, "32251@3gpp.org")
        .bytes(443, &[0x5a; 60])
        .bytes(456, &[0x5a; 96])
        .bytes(873, &[0x5a; 136])
        .finish();
    bytes
}

/// What an instance answers.
pub fn diameter_answer(request: &[u8], host: &str) -> Option<Vec<u8>> {
    let header = Header::read(request)?;
    if !header.is_request() {
        return None;
    }
    let mut answer = Vec::new();
    let mut builder = Builder::new(
        &mut answer,
        0x40,
        header.command,
        header.application,
        header.hop_by_hop,
        header.end_to_end,
    );
    if let Some(session) = Summary::of(request).session_id {
        builder = builder.bytes(code::SESSION_ID, session);
    }
    builder
        .number(code::RESULT_CODE, 2_001)
        .text(code::ORIGIN_HOST, host)
        .text(code::ORIGIN_REALM, "example.net")
        .number(code::AUTH_APPLICATION_ID, u32::MAX)
        .finish();
    Some(answer)
}
