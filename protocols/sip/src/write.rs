//! A message as we send it on: every byte as it came, but for those that a proxy must change.

use std::io::Write;
use std::net::SocketAddr;

use strowger_contract::{Router, Token, Transport, WorkerId};

use crate::branch::{Branch, decimal, hex};
use crate::flow::{ClientFlow, Path};
use crate::local::via_word;
use crate::overload::{Told, tell};
use crate::scan::{Header, Name, Scan, Span, Start};
use crate::uri::{name_addr, parameter};
use crate::via::{Via, end_of_value};

/// RFC 3261 8.1.1.6.
const MAX_FORWARDS_DEFAULT: u64 = 70;

/// What changes in a request.
pub(crate) struct Forward<'a> {
    pub(crate) message: &'a [u8],
    pub(crate) scan: &'a Scan,
    /// A new Request-URI.
    pub(crate) uri: Option<&'a [u8]>,
    /// Our Via.
    pub(crate) transport: Transport,
    pub(crate) sent_by: &'a [u8],
    pub(crate) branch: Branch,
    pub(crate) call_id: u64,
    /// Our Record-Route: the next hop's side first, then the side it came from if that differs.
    pub(crate) record_route: Option<Token>,
    /// Our Path.
    pub(crate) path: Option<Path>,
    /// The client's flow, that the dialog's requests go back over.
    pub(crate) flow: Option<ClientFlow>,
    pub(crate) sides: [Option<(Transport, &'a [u8])>; 2],
    /// Our Via asks the next hop of its load (RFC 7339).
    pub(crate) asks_load: bool,
    /// Where it came from, for the sender's Via.
    pub(crate) source: SocketAddr,
    /// Route values to take off the top.
    pub(crate) pop_routes: usize,
    /// The last Route value became the Request-URI.
    pub(crate) drop_last_route: bool,
    /// A Route value to add at the end: the Request-URI that a strict router displaced.
    pub(crate) add_route: Option<&'a [u8]>,
    /// RFC 5393: what this branch may fork on.
    pub(crate) breadth: Option<u32>,
    /// The worker that keeps the call's record: in-dialog requests come to it.
    pub(crate) worker: Option<WorkerId>,
}

impl Forward<'_> {
    /// Appends the request as it goes out.
    pub(crate) fn write(&self, router: &dyn Router, out: &mut Vec<u8>) {
        self.start_line(out);
        out.extend_from_slice(b"Via: SIP/2.0/");
        out.extend_from_slice(via_word(self.transport));
        out.push(b' ');
        out.extend_from_slice(self.sent_by);
        out.extend_from_slice(b";branch=");
        self.branch.write(self.call_id, router, out);
        if self.asks_load {
            out.extend_from_slice(b";oc;oc-algo=\"loss\"");
        }
        out.extend_from_slice(b"\r\n");
        if let Some(token) = self.record_route {
            for (transport, text) in self.sides.iter().flatten() {
                self.record_route_of(&token, *transport, text, out);
            }
        }
        if let (Some(path), Some((transport, text))) = (self.path, self.sides[0]) {
            path.write(transport, text, out);
        }
        if let Some(breadth) = self.breadth {
            out.extend_from_slice(b"Max-Breadth: ");
            decimal(u64::from(breadth), out);
            out.extend_from_slice(b"\r\n");
        }
        self.headers(out);
    }

    fn record_route_of(&self, token: &Token, transport: Transport, text: &[u8], out: &mut Vec<u8>) {
        // RFC 3261 16.6 step 4: what is asked for by sips: is recorded by sips:, where it holds.
        let secure = transport == Transport::Tls
            && matches!(self.scan.start, Start::Request { uri, .. }
                if uri.of(self.message).get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"sips:")));
        out.extend_from_slice(b"Record-Route: <");
        out.extend_from_slice(if secure { b"sips:" } else { b"sip:" });
        out.extend_from_slice(token);
        out.push(b'@');
        out.extend_from_slice(text);
        if transport != Transport::Udp && !secure {
            out.extend_from_slice(b";transport=");
            out.extend_from_slice(transport.scheme().as_bytes());
        }
        if let Some(worker) = self.worker {
            out.extend_from_slice(b";sw=");
            hex(u32::from(worker.0), 2, out);
        }
        if let Some(flow) = self.flow {
            out.extend_from_slice(b";sf=");
            flow.write(out);
        }
        out.extend_from_slice(b";lr>\r\n");
    }

    fn start_line(&self, out: &mut Vec<u8>) {
        match (self.uri, self.scan.start) {
            (Some(uri), Start::Request { method, uri: old }) => {
                out.extend_from_slice(method.of(self.message));
                out.push(b' ');
                out.extend_from_slice(uri);
                copy(self.message, old.to(), self.scan.headers_at, out);
            }
            _ => copy(self.message, 0, self.scan.headers_at, out),
        }
    }

    fn headers(&self, out: &mut Vec<u8>) {
        let mut copied = self.scan.headers_at;
        let (mut via_done, mut forwards_done, mut route) = (false, false, 0);
        let routes = count_values(self.message, self.scan, Name::Route);
        let last = if self.drop_last_route { routes.saturating_sub(1) } else { routes };
        for header in &self.scan.headers {
            match header.name {
                Name::Via if !via_done => {
                    via_done = true;
                    copy(self.message, copied, header.line.from(), out);
                    top_via(self.message, header, self.source, out);
                    copied = header.line.to();
                }
                Name::MaxForwards if !forwards_done => {
                    forwards_done = true;
                    copy(self.message, copied, header.value.from(), out);
                    decimal(
                        max_forwards(header.value.of(self.message))
                            .map_or(MAX_FORWARDS_DEFAULT, |left| left.saturating_sub(1)),
                        out,
                    );
                    copied = header.value.to();
                }
                Name::MaxBreadth if self.breadth.is_some() => {
                    copy(self.message, copied, header.line.from(), out);
                    copied = header.line.to();
                }
                Name::Route => {
                    let count = values(header.value.of(self.message)).count();
                    let touched = route < self.pop_routes || route + count > last;
                    if touched {
                        copy(self.message, copied, header.line.from(), out);
                        self.kept_routes(header, route, last, out);
                        copied = header.line.to();
                    }
                    route += count;
                }
                _ => {}
            }
        }
        // What is added stands before the empty line, if there is one.
        let end = end_of_headers(self.message, self.scan).max(copied);
        copy(self.message, copied, end, out);
        if !forwards_done {
            let _ok = write!(out, "Max-Forwards: {MAX_FORWARDS_DEFAULT}\r\n");
        }
        if let Some(uri) = self.add_route {
            out.extend_from_slice(b"Route: <");
            out.extend_from_slice(uri);
            out.extend_from_slice(b">\r\n");
        }
        copy(self.message, end, self.message.len(), out);
        if end == self.message.len() {
            // A datagram without an empty line; the next hop shall not have to guess.
            out.extend_from_slice(b"\r\n");
        }
    }

    fn kept_routes(&self, header: &Header, first: usize, last: usize, out: &mut Vec<u8>) {
        let mut begun = false;
        for (offset, value) in values(header.value.of(self.message)).enumerate() {
            let place = first + offset;
            if place >= self.pop_routes && place < last {
                out.extend_from_slice(if begun { b", " } else { b"Route: " });
                out.extend_from_slice(value);
                begun = true;
            }
        }
        if begun {
            out.extend_from_slice(b"\r\n");
        }
    }
}

/// Where the empty line stands, if there is one: what is added to a message's headers stands before it.
pub(crate) fn end_of_headers(message: &[u8], scan: &Scan) -> usize {
    let before = message.get(..scan.body_at).unwrap_or(message);
    [&b"\r\n\r\n"[..], b"\n\n"]
        .iter()
        .find(|end| before.ends_with(end))
        .map_or(before.len(), |end| before.len() - end.len() / 2)
}

/// Appends a request's first Via header with what RFC 3261 18.2.1 and RFC 3581 4 add to its first
/// value: where it really came from.
pub(crate) fn top_via(message: &[u8], header: &Header, source: SocketAddr, out: &mut Vec<u8>) {
    let value = header.value.of(message);
    let Some((via, _)) = Via::first(value) else {
        return copy(message, header.line.from(), header.line.to(), out);
    };
    let end = header.value.from() + end_of_value(value);
    let end = end
        - (value[..end - header.value.from()].len()
            - value[..end - header.value.from()].trim_ascii_end().len());
    let bare_rport = via.wants_rport() && parameter(via.parameters, b"rport") == Some(None);
    let mut at = header.line.from();
    if bare_rport && let Some(place) = end_of_bare_rport(message, via.parameters) {
        copy(message, at, place, out);
        out.push(b'=');
        decimal(u64::from(source.port()), out);
        at = place;
    }
    copy(message, at, end, out);
    let same_host = crate::uri::parse_ip(via.host) == Some(source.ip());
    if (!same_host || via.wants_rport()) && parameter(via.parameters, b"received").is_none() {
        // Writing to a vector cannot fail.
        let _ok = write!(out, ";received={}", source.ip());
    }
    copy(message, end, header.line.to(), out);
}

/// Where in the message the name of an `rport` without a value ends.
fn end_of_bare_rport(message: &[u8], parameters: &[u8]) -> Option<usize> {
    let base = parameters.as_ptr() as usize - message.as_ptr() as usize;
    let mut at = 0;
    for part in parameters.split(|&byte| byte == b';') {
        if part.trim_ascii().eq_ignore_ascii_case(b"rport") {
            return Some(base + at + part.trim_ascii_end().len());
        }
        at += part.len() + 1;
    }
    None
}

/// Appends a response as it goes back: without its first Via value, which was ours.
pub(crate) fn backward(
    message: &[u8],
    scan: &Scan,
    as_500: bool,
    told: Option<&Told>,
    out: &mut Vec<u8>,
) {
    if as_500 {
        // RFC 3261 16.7 step 6: our own client has other servers than this one; 503 is not for it.
        out.extend_from_slice(b"SIP/2.0 500 Server Internal Error\r\n");
    } else {
        copy(message, 0, scan.headers_at, out);
    }
    let Some(header) = scan.first(Name::Via) else {
        return copy(message, scan.headers_at, message.len(), out);
    };
    copy(message, scan.headers_at, header.line.from(), out);
    let value = header.value.of(message);
    let end = end_of_value(value);
    if end < value.len() {
        let at = out.len();
        out.extend_from_slice(b"Via: ");
        let rest = value[end + 1..].trim_ascii_start();
        out.extend_from_slice(rest);
        copy(message, header.value.to(), header.line.to(), out);
        if let Some(told) = told {
            tell(out, at, told);
        }
    } else if let Some(told) = told
        && let Some(next) = scan.all(Name::Via).nth(1)
    {
        copy(message, header.line.to(), next.line.from(), out);
        let at = out.len();
        copy(message, next.line.from(), next.line.to(), out);
        tell(out, at, told);
        return copy(message, next.line.to(), message.len(), out);
    }
    copy(message, header.line.to(), message.len(), out);
}

/// The values of a header, one by one.
pub(crate) fn values(header: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(header);
    std::iter::from_fn(move || {
        let text = rest?;
        let end = end_of_value(text);
        rest = text.get(end + 1..);
        Some(text[..end].trim_ascii())
    })
    .filter(|value| !value.is_empty())
}

/// All values of all headers of a name.
pub(crate) fn all_values<'a>(
    message: &'a [u8],
    scan: &'a Scan,
    name: Name,
) -> impl Iterator<Item = &'a [u8]> {
    scan.all(name).flat_map(move |header| values(header.value.of(message)))
}

fn count_values(message: &[u8], scan: &Scan, name: Name) -> usize {
    all_values(message, scan, name).count()
}

/// The URI of a Route value.
pub(crate) fn route_uri(value: &[u8]) -> Option<&[u8]> {
    name_addr(value).map(|(uri, _)| uri)
}

/// A Max-Forwards value.
pub(crate) fn max_forwards(value: &[u8]) -> Option<u64> {
    let good = !value.is_empty() && value.len() <= 10 && value.iter().all(u8::is_ascii_digit);
    good.then(|| value.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0')))
}

/// Appends a range of the message.
pub(crate) fn copy(message: &[u8], from: usize, to: usize, out: &mut Vec<u8>) {
    out.extend_from_slice(message.get(from..to).unwrap_or_default());
}

/// The span's bytes, for callers that have only a span.
pub(crate) fn copy_span(message: &[u8], span: Span, out: &mut Vec<u8>) {
    out.extend_from_slice(span.of(message));
}
