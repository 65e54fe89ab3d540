//! The generator's own messages, and what it reads out of others'.

use std::io::Write;
use std::net::SocketAddr;

use strowger_sip::scan::{Name, Scan};

/// What every message of a party says of it.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    /// `UDP` or `TCP`.
    pub(crate) transport: &'static str,
    /// Its address, as Via and Contact have it.
    pub(crate) local: SocketAddr,
    /// Whom requests are addressed to, `host:port`.
    pub(crate) domain: String,
    /// Tells runs apart.
    pub(crate) run: u32,
    /// Further bytes in each request, to make it as large as it is in the field.
    pub(crate) padding: usize,
}

/// A dialog's name on the wire: the run, its place and its use of the place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CallName {
    pub(crate) run: u32,
    pub(crate) slot: u32,
    pub(crate) generation: u32,
}

impl CallName {
    fn write(self, out: &mut Vec<u8>) {
        hex(out, self.run);
        out.push(b'-');
        hex(out, self.slot);
        out.push(b'-');
        hex(out, self.generation);
    }

    /// Reads a Call-ID back.
    pub(crate) fn read(call_id: &[u8]) -> Option<Self> {
        let text = call_id.get(..26)?;
        Some(Self {
            run: unhex(&text[..8])?,
            slot: unhex(&text[9..17])?,
            generation: unhex(&text[18..26])?,
        })
    }
}

fn hex(out: &mut Vec<u8>, number: u32) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for shift in (0..8).rev() {
        out.push(DIGITS[(number >> (4 * shift) & 15) as usize]);
    }
}

fn unhex(text: &[u8]) -> Option<u32> {
    text.iter().try_fold(0, |number: u32, byte| Some(number << 4 | (*byte as char).to_digit(16)?))
}

/// Session descriptions have about this size.
const SDP: &[u8] =
    b"v=0\r\no=load 53655765 2353687637 IN IP4 127.0.0.1\r\ns=-\r\nc=IN IP4 127.0.0.1\r\n\
t=0 0\r\nm=audio 6000 RTP/AVP 0 8 101\r\na=rtpmap:0 PCMU/8000\r\na=rtpmap:8 PCMA/8000\r\n\
a=rtpmap:101 telephone-event/8000\r\n";

/// A request outside of a dialog.
pub(crate) fn request(out: &mut Vec<u8>, me: &Identity, name: CallName, method: &str) {
    // Writing to a vector cannot fail.
    let _infallible = write!(out, "{method} sip:service@{} SIP/2.0\r\n", me.domain);
    via(out, me, name, 1);
    let _infallible = write!(out, "Max-Forwards: 70\r\nFrom: <sip:caller@{}>;tag=", me.local);
    name.write(out);
    let user = if method == "REGISTER" { "caller" } else { "service" };
    let _infallible = write!(out, "\r\nTo: <sip:{user}@{}>\r\nCall-ID: ", me.domain);
    name.write(out);
    let _infallible = write!(out, "@load\r\nCSeq: 1 {method}\r\n");
    contact(out, me, "caller");
    if method == "REGISTER" {
        out.extend_from_slice(b"Expires: 3600\r\n");
    }
    end(out, me, if method == "INVITE" { SDP } else { b"" });
}

/// A request inside of a dialog: an ACK for a 2xx, or a BYE.
pub(crate) fn in_dialog(
    out: &mut Vec<u8>,
    me: &Identity,
    name: CallName,
    (method, number): (&str, u32),
    dialog: &Dialog,
) {
    out.extend_from_slice(method.as_bytes());
    out.push(b' ');
    out.extend_from_slice(&dialog.target);
    out.extend_from_slice(b" SIP/2.0\r\n");
    via(out, me, name, number + if method == "ACK" { 100 } else { 0 });
    out.extend_from_slice(&dialog.routes);
    let _infallible = write!(out, "Max-Forwards: 70\r\nFrom: <sip:caller@{}>;tag=", me.local);
    name.write(out);
    out.extend_from_slice(b"\r\nTo: ");
    out.extend_from_slice(&dialog.to);
    out.extend_from_slice(b"\r\nCall-ID: ");
    name.write(out);
    let _infallible = write!(out, "@load\r\nCSeq: {number} {method}\r\n");
    end(out, me, b"");
}

/// An ACK for a final answer that is no 2xx (RFC 3261 17.1.1.3).
pub(crate) fn ack_of_refusal(out: &mut Vec<u8>, me: &Identity, name: CallName, to: &[u8]) {
    let _infallible = write!(out, "ACK sip:service@{} SIP/2.0\r\n", me.domain);
    via(out, me, name, 1);
    let _infallible = write!(out, "Max-Forwards: 70\r\nFrom: <sip:caller@{}>;tag=", me.local);
    name.write(out);
    out.extend_from_slice(b"\r\nTo: ");
    out.extend_from_slice(to);
    out.extend_from_slice(b"\r\nCall-ID: ");
    name.write(out);
    out.extend_from_slice(b"@load\r\nCSeq: 1 ACK\r\nContent-Length: 0\r\n\r\n");
}

fn via(out: &mut Vec<u8>, me: &Identity, name: CallName, number: u32) {
    let _infallible =
        write!(out, "Via: SIP/2.0/{} {};rport;branch=z9hG4bK", me.transport, me.local);
    name.write(out);
    let _infallible = write!(out, "-{number}\r\n");
}

fn contact(out: &mut Vec<u8>, me: &Identity, user: &str) {
    let _infallible = write!(out, "Contact: <sip:{user}@{}", me.local);
    if me.transport != "UDP" {
        out.extend_from_slice(b";transport=tcp");
    }
    out.extend_from_slice(b">\r\n");
}

fn end(out: &mut Vec<u8>, me: &Identity, body: &[u8]) {
    if me.padding > 0 {
        out.extend_from_slice(b"X-Padding: ");
        out.extend(std::iter::repeat_n(b'x', me.padding));
        out.extend_from_slice(b"\r\n");
    }
    if !body.is_empty() {
        out.extend_from_slice(b"Content-Type: application/sdp\r\n");
    }
    let _infallible = write!(out, "Content-Length: {}\r\n\r\n", body.len());
    out.extend_from_slice(body);
}

/// What a caller keeps of a dialog (RFC 3261 12.1.2).
#[derive(Debug, Default)]
pub(crate) struct Dialog {
    /// The remote target, from the answer's Contact.
    pub(crate) target: Vec<u8>,
    /// Route header lines, whole.
    pub(crate) routes: Vec<u8>,
    /// The To header's value, with the tag.
    pub(crate) to: Vec<u8>,
    /// Which instance answered.
    pub(crate) instance: Option<usize>,
}

impl Dialog {
    pub(crate) fn clear(&mut self) {
        self.target.clear();
        self.routes.clear();
        self.to.clear();
        self.instance = None;
    }

    /// Takes a dialog from a 2xx answer.
    pub(crate) fn read(&mut self, bytes: &[u8], scan: &Scan) {
        self.clear();
        if let Some(to) = scan.value(bytes, Name::To) {
            self.to.extend_from_slice(to);
        }
        if let Some(contact) = scan.value(bytes, Name::Contact) {
            self.target.extend_from_slice(uri_of(contact));
            self.instance = instance_of(contact);
        }
        // The caller's route set is the Record-Route in reverse.
        for header in scan.headers.iter().rev().filter(|header| header.name == Name::RecordRoute) {
            for value in header.value.of(bytes).split(|&byte| byte == b',').rev() {
                self.routes.extend_from_slice(b"Route: ");
                self.routes.extend_from_slice(value.trim_ascii());
                self.routes.extend_from_slice(b"\r\n");
            }
        }
    }

    /// Where the next request goes: the first route, else the target.
    pub(crate) fn next_hop(&self) -> Option<SocketAddr> {
        let line = self.routes.split(|&byte| byte == b'\n').next().filter(|line| !line.is_empty());
        let uri = line.map_or(self.target.as_slice(), uri_of);
        strowger_sip::uri::Uri::parse(uri)?.address()
    }
}

fn uri_of(value: &[u8]) -> &[u8] {
    let start = value.iter().position(|&byte| byte == b'<').map_or(0, |at| at + 1);
    let rest = &value[start..];
    &rest[..rest.iter().position(|&byte| byte == b'>').unwrap_or(rest.len())]
}

/// The instance that a Contact of ours names: `<sip:i3@...>`.
pub(crate) fn instance_of(contact: &[u8]) -> Option<usize> {
    let digits = uri_of(contact).strip_prefix(b"sip:i")?;
    let end = digits.iter().position(|byte| !byte.is_ascii_digit())?;
    std::str::from_utf8(&digits[..end]).ok()?.parse().ok()
}

/// An answer of instance `instance` to `request`.
pub(crate) fn answer(
    out: &mut Vec<u8>,
    me: &Identity,
    instance: usize,
    (code, reason): (u16, &str),
    request: &[u8],
    scan: &Scan,
) {
    let _infallible = write!(out, "SIP/2.0 {code} {reason}\r\n");
    for header in &scan.headers {
        let line = header.line.of(request);
        match header.name {
            Name::Via | Name::From | Name::CallId | Name::CSeq => out.extend_from_slice(line),
            Name::RecordRoute if code < 300 => out.extend_from_slice(line),
            Name::To => {
                let value = header.value.of(request);
                out.extend_from_slice(b"To: ");
                out.extend_from_slice(value);
                if strowger_sip::uri::tag(value).is_none() {
                    let _infallible = write!(out, ";tag=i{instance}");
                }
                out.extend_from_slice(b"\r\n");
            }
            _ => {}
        }
    }
    contact(out, me, &format!("i{instance}"));
    let body: &[u8] = if code == 200 && method_of(request) == b"INVITE" { SDP } else { b"" };
    if !body.is_empty() {
        out.extend_from_slice(b"Content-Type: application/sdp\r\n");
    }
    let _infallible = write!(out, "Content-Length: {}\r\n\r\n", body.len());
    out.extend_from_slice(body);
}

/// A request's method.
pub(crate) fn method_of(request: &[u8]) -> &[u8] {
    &request[..request.iter().position(|&byte| byte == b' ').unwrap_or(0)]
}

/// The instance that a To tag of ours names, `None` without a tag.
pub(crate) fn tagged_instance(to: &[u8]) -> Option<usize> {
    let digits = strowger_sip::uri::tag(to)?.strip_prefix(b"i")?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}
