//! Answers of our own (RFC 3261 8.2.6), and the ACK and CANCEL that a proxy makes (17.1.1.3, 9.1).

use std::net::SocketAddr;
use std::time::Duration;

use crate::branch::{decimal, hex};
use crate::overload::{Told, tell};
use crate::scan::{Name, Scan, Start};
use crate::uri::tag;
use crate::write::{copy, copy_span, top_via};

/// What is answered.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Answer<'a> {
    pub(crate) code: u16,
    /// The reason phrase.
    pub(crate) reason: &'a str,
    pub(crate) retry_after: Option<Duration>,
    /// `Unsupported`.
    pub(crate) unsupported: Option<&'a [u8]>,
    /// A Warning's code and text (RFC 3261 20.43).
    pub(crate) warning: Option<(u16, &'static str)>,
}

impl<'a> Answer<'a> {
    pub(crate) fn new(code: u16, reason: &'a str) -> Self {
        Self { code, reason, retry_after: None, unsupported: None, warning: None }
    }
}

/// How tags of our own begin: an ACK that carries one ends with us.
const TAG_PREFIX: &[u8] = b"swg";

/// Appends the answer to a request that came from `source`. `key` makes the To tag: the same for
/// each retransmission.
pub(crate) fn respond(
    message: &[u8],
    scan: &Scan,
    source: SocketAddr,
    key: u64,
    answer: &Answer<'_>,
    told: Option<&Told>,
    out: &mut Vec<u8>,
) {
    let start = out.len();
    out.extend_from_slice(b"SIP/2.0 ");
    decimal(u64::from(answer.code), out);
    out.push(b' ');
    out.extend_from_slice(answer.reason.as_bytes());
    out.extend_from_slice(b"\r\n");
    let mut first = true;
    for header in scan.all(Name::Via) {
        if std::mem::take(&mut first) {
            let at = out.len();
            top_via(message, header, source, out);
            if let Some(told) = told {
                tell(out, at, told);
            }
        } else {
            copy_span(message, header.line, out);
        }
    }
    for name in [Name::From, Name::To, Name::CallId, Name::CSeq] {
        let Some(header) = scan.first(name) else { continue };
        if name == Name::To && answer.code > 100 && tag(header.value.of(message)).is_none() {
            copy(message, header.line.from(), header.value.to(), out);
            out.extend_from_slice(b";tag=");
            our_tag(key, out);
            copy(message, header.value.to(), header.line.to(), out);
        } else {
            copy_span(message, header.line, out);
        }
    }
    if let Some(wait) = answer.retry_after {
        out.extend_from_slice(b"Retry-After: ");
        decimal(whole_seconds(wait, key), out);
        out.extend_from_slice(b"\r\n");
    }
    if let Some(unsupported) = answer.unsupported {
        out.extend_from_slice(b"Unsupported: ");
        out.extend_from_slice(unsupported);
        out.extend_from_slice(b"\r\n");
    }
    if let Some((code, text)) = answer.warning {
        out.extend_from_slice(b"Warning: ");
        decimal(u64::from(code), out);
        out.extend_from_slice(b" strowger \"");
        out.extend_from_slice(text.as_bytes());
        out.extend_from_slice(b"\"\r\n");
    }
    out.extend_from_slice(b"Content-Length: 0\r\n\r\n");
    crate::hide::restore_call_id(out, start);
}

/// Retry-After has whole seconds only (RFC 3261 20.33). Who hears 1.5 s hears one or two, as `key` falls,
/// so that not all who were refused come back at once; it falls alike for each retransmission.
fn whole_seconds(wait: Duration, key: u64) -> u64 {
    let up = u64::from(wait.subsec_millis()) > (key >> 7) % 1_000;
    (wait.as_secs() + u64::from(up)).max(1)
}

fn our_tag(key: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(TAG_PREFIX);
    hex((key >> 32) as u32, 8, out);
    hex(key as u32, 8, out);
}

/// Whether a To value has the tag that [`respond`] gives for `key`.
pub(crate) fn is_our_tag(to: &[u8], key: u64) -> bool {
    let digits =
        tag(to).and_then(|tag| tag.strip_prefix(TAG_PREFIX)).filter(|digits| digits.len() == 16);
    let number = digits.and_then(|digits| std::str::from_utf8(digits).ok());
    number.and_then(|number| u64::from_str_radix(number, 16).ok()) == Some(key)
}

/// Appends the ACK for a non-2xx answer, or the CANCEL, of the request `sent` as we sent it: its
/// Request-URI, our Via, From, Call-ID, Route; `to` is the answer's To (or the request's). `via` is
/// the Via of an earlier try of the request, if it is for that.
pub(crate) fn follow_up(
    method: &str,
    sent: &[u8],
    scan: &Scan,
    to: &[u8],
    via: Option<&[u8]>,
    out: &mut Vec<u8>,
) {
    let Start::Request { uri, .. } = scan.start else { return };
    out.extend_from_slice(method.as_bytes());
    out.push(b' ');
    copy_span(sent, uri, out);
    out.extend_from_slice(b" SIP/2.0\r\n");
    if let Some(via) = via {
        out.extend_from_slice(b"Via: ");
        out.extend_from_slice(via);
        out.extend_from_slice(b"\r\n");
    } else if let Some(via) = scan.first(Name::Via) {
        copy_span(sent, via.line, out);
    }
    out.extend_from_slice(b"Max-Forwards: 70\r\n");
    for route in scan.all(Name::Route) {
        copy_span(sent, route.line, out);
    }
    for name in [Name::From, Name::CallId] {
        if let Some(header) = scan.first(name) {
            copy_span(sent, header.line, out);
        }
    }
    out.extend_from_slice(b"To: ");
    out.extend_from_slice(to);
    out.extend_from_slice(b"\r\nCSeq: ");
    let number = scan.value(sent, Name::CSeq).unwrap_or(b"1");
    let digits = number.iter().take_while(|byte| byte.is_ascii_digit()).count();
    out.extend_from_slice(&number[..digits]);
    out.push(b' ');
    out.extend_from_slice(method.as_bytes());
    out.extend_from_slice(b"\r\nContent-Length: 0\r\n\r\n");
}
