//! Topology hiding: what one side of the edge shall not learn of the other, it carries cloaked
//! ([`strowger_contract::cloak`]), so nothing is remembered and a restart breaks nothing.
//!
//! Where a message leaves for the side that things are hidden from, Vias below ours, Record-Routes behind
//! ours, Service-Routes, Contacts and the Call-ID of a dialog begun on the hidden side become words that begin
//! with `swth-` at an address of ours; where such a word comes back, in whatever header, it is what it
//! was, byte by byte. An engine sees plain messages only.
//!
//! The Call-ID that a request came with is kept in its top Via (`swth`), which comes back in its answer.

use memchr::memmem;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use strowger_contract::cloak::is_cloaked;
use strowger_contract::{TokenKeys, Transport};

use crate::engine::Settings;
use crate::method::Method;
use crate::place::NextHop;
use crate::responses::cseq_method;
use crate::scan::{Header, Name, Scan, Start, lines};
use crate::target::Target;
use crate::uri::{Uri, name_addr, parameter};
use crate::via::{Via, end_of_value};
use crate::write::{copy, values};

/// How a cloaked word begins.
const PREFIX: &[u8] = b"swth-";

/// The parameter of a Via that keeps the Call-ID as the sender has it.
const ALIAS: &[u8] = b"swth";

/// What a word was, the letter behind [`PREFIX`].
const URI: u8 = b'u';
/// A URI that stood there without `<>`.
const BARE_URI: u8 = b'b';
const VIA: u8 = b'v';
const CALL_ID: u8 = b'c';

/// From whom things are hidden.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum HideFrom {
    /// Clients do not see instances and what is behind them.
    #[default]
    Clients,
    /// Instances do not see clients.
    Instances,
    /// Neither sees the other.
    Both,
}

/// Topology hiding of a listener.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TopologyHiding {
    /// `clients` (default), `instances` or `both`: who does not see the other side.
    pub from: HideFrom,
    /// Hide Call-IDs of dialogs that the hidden side begins as well (default: yes).
    pub call_id: bool,
}

impl Default for TopologyHiding {
    fn default() -> Self {
        Self { from: HideFrom::Clients, call_id: true }
    }
}

impl TopologyHiding {
    /// Whether what goes to an instance, or else to a client, hides the other side.
    #[must_use]
    pub fn hides(&self, to_instance: bool) -> bool {
        match self.from {
            HideFrom::Clients => !to_instance,
            HideFrom::Instances => to_instance,
            HideFrom::Both => true,
        }
    }
}

/// How hidden things are written.
#[derive(Clone, Copy, Debug)]
pub struct Mask<'a> {
    /// The keys of the node, or of its cluster.
    pub keys: &'a TokenKeys,
    /// `host:port` of ours that the receiver knows.
    pub host: &'a [u8],
    /// How it reaches that.
    pub transport: Transport,
    /// Hide a request's Call-ID.
    pub call_id: bool,
}

impl Mask<'_> {
    fn word(&self, kind: u8, text: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(PREFIX);
        out.push(kind);
        self.keys.cloak(kind, text, out);
    }

    fn via(&self, value: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(b"SIP/2.0/");
        out.extend_from_slice(crate::local::via_word(self.transport));
        out.push(b' ');
        out.extend_from_slice(self.host);
        out.extend_from_slice(b";branch=z9hG4bK");
        self.word(VIA, value, out);
    }

    fn uri(&self, uri: &[u8], kind: u8, out: &mut Vec<u8>) {
        let parsed = Uri::parse(uri);
        let secure = parsed.is_some_and(|uri| uri.secure);
        if kind == BARE_URI {
            out.push(b'<');
        }
        out.extend_from_slice(if secure { b"sips:" } else { b"sip:" });
        self.word(kind, uri, out);
        out.push(b'@');
        out.extend_from_slice(self.host);
        if self.transport != Transport::Udp && !secure {
            out.extend_from_slice(b";transport=");
            out.extend_from_slice(self.transport.scheme().as_bytes());
        }
        if parsed.is_some_and(|uri| uri.is_loose()) {
            out.extend_from_slice(b";lr");
        }
        if kind == BARE_URI {
            out.push(b'>');
        }
    }
}

/// A message in the making: what is not replaced is copied.
struct Edit<'a> {
    message: &'a [u8],
    copied: usize,
    out: &'a mut Vec<u8>,
}

impl<'a> Edit<'a> {
    fn new(message: &'a [u8], out: &'a mut Vec<u8>) -> Self {
        out.clear();
        Self { message, copied: 0, out }
    }

    /// Where a part of the message begins.
    fn place(&self, part: &[u8]) -> usize {
        part.as_ptr() as usize - self.message.as_ptr() as usize
    }

    fn replace(&mut self, from: usize, to: usize, write: impl FnOnce(&mut Vec<u8>)) {
        copy(self.message, self.copied, from, self.out);
        write(self.out);
        self.copied = to;
    }

    fn part(&mut self, part: &[u8], write: impl FnOnce(&mut Vec<u8>)) {
        let from = self.place(part);
        self.replace(from, from + part.len(), write);
    }

    /// A name-addr's URI, if it is one of SIP.
    fn address(&mut self, value: &[u8], mask: &Mask<'_>) {
        let Some((uri, _)) = name_addr(value).filter(|(uri, _)| Uri::parse(uri).is_some()) else {
            return;
        };
        let bracketed = self.message.get(self.place(uri).wrapping_sub(1)) == Some(&b'<');
        let kind = if bracketed { URI } else { BARE_URI };
        self.part(uri, |out| mask.uri(uri, kind, out));
    }

    /// Whether anything was replaced; the rest is copied.
    fn end(self) -> bool {
        copy(self.message, self.copied, self.message.len(), self.out);
        self.copied > 0
    }
}

fn is_register(message: &[u8], scan: &Scan) -> bool {
    cseq_method(scan, message) == b"REGISTER"
}

/// Writes a request, as it would go out, without what its receiver shall not see. Its first Via is ours,
/// and so is its first Record-Route if `recorded`. Whether anything was hidden; if not, `out` is of no use.
pub fn mask_request(
    message: &[u8],
    scan: &Scan,
    recorded: bool,
    mask: &Mask<'_>,
    out: &mut Vec<u8>,
) -> bool {
    let mut edit = Edit::new(message, out);
    let (mut vias, mut routes) = (0, usize::from(!recorded));
    let register = is_register(message, scan);
    for header in &scan.headers {
        match header.name {
            Name::Via => {
                for value in values(header.value.of(message)) {
                    if vias > 0 {
                        edit.part(value, |out| mask.via(value, out));
                    }
                    vias += 1;
                }
            }
            Name::RecordRoute => {
                for value in values(header.value.of(message)) {
                    if routes > 0 {
                        edit.address(value, mask);
                    }
                    routes += 1;
                }
            }
            Name::Contact if !register => {
                values(header.value.of(message)).for_each(|value| edit.address(value, mask));
            }
            Name::CallId if mask.call_id => {
                let value = header.value.of(message);
                edit.part(value, |out| mask.word(CALL_ID, value, out));
            }
            _ => {}
        }
    }
    edit.end()
}

/// Writes a response, as it would go out, without what its receiver shall not see, if `mask` is given;
/// and with the Call-ID that its receiver knows. `unrecorded`: its request went out without a Record-Route
/// of ours; `is_ours` tells them. Whether anything was changed; if not, `out` is of no use.
pub fn mask_response(
    message: &[u8],
    scan: &Scan,
    mask: Option<&Mask<'_>>,
    unrecorded: bool,
    is_ours: impl Fn(&Uri<'_>) -> bool,
    out: &mut Vec<u8>,
) -> bool {
    let mut edit = Edit::new(message, out);
    let register = is_register(message, scan);
    let alias = scan.first(Name::Via).and_then(|via| alias(message, via));
    let ours = |value: &[u8]| {
        name_addr(value).and_then(|(uri, _)| Uri::parse(uri)).is_some_and(|uri| is_ours(&uri))
    };
    // Those in front of our last one were added behind us.
    let routes = || scan.all(Name::RecordRoute).flat_map(|it| values(it.value.of(message)));
    let last = routes().enumerate().filter(|(_, value)| ours(value)).last();
    let behind = last.map_or(0, |(at, _)| at);
    // A dialog that we are no part of (a redirection out of the pools) goes on without us: its Contact must
    // be one that can be reached.
    let cseq = scan.value(message, Name::CSeq).unwrap_or_default();
    let method = cseq.iter().rposition(u8::is_ascii_whitespace).map_or(cseq, |at| &cseq[at + 1..]);
    let is_alone = unrecorded
        && last.is_none()
        && Method::of(method).is_record_routed()
        && matches!(scan.start, Start::Response { code: 101..300 });
    let contacts = mask.filter(|_| !is_alone && !register);
    let (mut route, mut first_via) = (0, true);
    let service = |name: &[u8]| register && name.eq_ignore_ascii_case(b"Service-Route");
    for (name, line, value) in lines(message, scan) {
        let known = scan.headers.iter().find(|header| header.line.from() == line.from());
        match known.map_or(Name::Other, |header| header.name) {
            Name::Via if std::mem::take(&mut first_via) => {
                if let Some((from, to, _)) = alias {
                    edit.replace(from, to, |_| {});
                }
            }
            Name::CallId => {
                if let Some((.., text)) = alias {
                    edit.part(value, |out| {
                        out.extend_from_slice(PREFIX);
                        out.extend_from_slice(text);
                    });
                }
            }
            Name::RecordRoute => {
                for value in values(value) {
                    if let Some(mask) = mask.filter(|_| route < behind) {
                        edit.address(value, mask);
                    }
                    route += 1;
                }
            }
            Name::Contact => {
                if let Some(mask) = contacts {
                    values(value).for_each(|value| edit.address(value, mask));
                }
            }
            Name::Other if service(name) => {
                if let Some(mask) = mask {
                    values(value).for_each(|value| edit.address(value, mask));
                }
            }
            _ => {}
        }
    }
    edit.end()
}

/// The Call-ID that a request came with, in its top Via: where the parameter stands, from its `;`, and its
/// value.
fn alias<'a>(message: &'a [u8], via: &Header) -> Option<(usize, usize, &'a [u8])> {
    let (first, _) = Via::first(via.value.of(message))?;
    let text = parameter(first.parameters, ALIAS).flatten()?;
    let to = text.as_ptr() as usize - message.as_ptr() as usize + text.len();
    let from = to.checked_sub(text.len() + ALIAS.len() + 2)?;
    let plain = message.get(from) == Some(&b';') && text.iter().all(|byte| is_cloaked(*byte));
    plain.then_some((from, to, text))
}

/// Gives an answer of our own, written from `start` on, the Call-ID that its receiver knows.
pub(crate) fn restore_call_id(out: &mut Vec<u8>, start: usize) {
    let text = &out[start..];
    let mut scan = Scan::default();
    if memmem::find(text, b";swth=").is_none() || scan.scan(text).is_err() {
        return;
    }
    // Answers of our own to hidden calls are rare enough to allocate.
    let mut buffer = Vec::new();
    if mask_response(text, &scan, None, false, |_| false, &mut buffer) {
        out.truncate(start);
        out.extend_from_slice(&buffer);
    }
}

/// What came of reading a message's cloaked words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unmasked {
    /// Words that were read.
    pub read: u32,
    /// Words that no key of ours reads.
    pub unreadable: u32,
}

/// Writes a message with its cloaked words as what they were, where they may come back: what would be
/// echoed to its sender is left alone, so that nobody has a word read that is not meant for him. If none
/// was read, `out` is of no use.
pub fn unmask(message: &[u8], scan: &Scan, keys: &TokenKeys, out: &mut Vec<u8>) -> Unmasked {
    unmask_where(message, scan, keys, kinds_in, out)
}

/// As [`unmask`], in whatever header: what a property test reads back.
#[doc(hidden)]
pub fn unmask_anywhere(
    message: &[u8],
    scan: &Scan,
    keys: &TokenKeys,
    out: &mut Vec<u8>,
) -> Unmasked {
    unmask_where(message, scan, keys, |_, _| &[URI, BARE_URI, VIA, CALL_ID], out)
}

/// What kinds of words may come back in a header; of the start line if there is no name.
fn kinds_in(request: bool, name: Option<&[u8]>) -> &'static [u8] {
    let Some(name) = name else { return if request { &[URI, BARE_URI] } else { &[] } };
    let is = |known: &str| name.eq_ignore_ascii_case(known.as_bytes());
    let one_of = |names: &[&str]| names.iter().any(|known| is(known));
    if one_of(&["Call-ID", "i"]) {
        &[CALL_ID]
    } else if request && one_of(&["Route", "Referred-By", "b"]) {
        &[URI, BARE_URI]
    } else if request && one_of(&["Refer-To", "r"]) {
        &[URI, BARE_URI, CALL_ID]
    } else if request && one_of(&["Replaces", "Join", "Target-Dialog", "In-Reply-To"]) {
        &[CALL_ID]
    } else if !request && one_of(&["Via", "v"]) {
        &[VIA]
    } else if !request && one_of(&["Record-Route", "Contact", "m"]) {
        &[URI, BARE_URI]
    } else {
        &[]
    }
}

fn unmask_where(
    message: &[u8],
    scan: &Scan,
    keys: &TokenKeys,
    allowed: impl Fn(bool, Option<&[u8]>) -> &'static [u8],
    out: &mut Vec<u8>,
) -> Unmasked {
    let mut done = Unmasked::default();
    let head = &message[..scan.body_at.min(message.len())];
    if memmem::find(head, PREFIX).is_none() {
        return done;
    }
    let request = matches!(scan.start, Start::Request { .. });
    let mut edit = Edit::new(message, out);
    let kinds = allowed(request, None);
    unmask_line(head, (0, scan.headers_at), kinds, scan, keys, &mut edit, &mut done);
    for (name, line, _) in lines(message, scan) {
        let kinds = allowed(request, Some(name));
        unmask_line(head, (line.from(), line.to()), kinds, scan, keys, &mut edit, &mut done);
    }
    edit.end();
    done
}

fn unmask_line(
    head: &[u8],
    (mut at, line_end): (usize, usize),
    kinds: &[u8],
    scan: &Scan,
    keys: &TokenKeys,
    edit: &mut Edit<'_>,
    done: &mut Unmasked,
) {
    let head = &head[..line_end.min(head.len())];
    while let Some(found) = head.get(at..).and_then(|rest| memmem::find(rest, PREFIX)) {
        let from = at + found;
        let word = from + PREFIX.len();
        let end = head[word..].iter().position(|byte| !is_cloaked(*byte));
        let end = end.map_or(head.len(), |length| word + length);
        at = end;
        let Some((kind, letters)) = head[word..end].split_first() else { continue };
        if !kinds.contains(kind) {
            continue;
        }
        let place = around(head, scan, *kind, from, end).filter(|(start, _)| *start >= edit.copied);
        let Some((start, stop)) = place else {
            done.unreadable += 1;
            continue;
        };
        edit.replace(start, start, |_| {});
        let written = edit.out.len();
        if !keys.uncloak(*kind, letters, edit.out) {
            done.unreadable += 1;
            continue;
        }
        done.read += 1;
        edit.copied = stop;
        at = at.max(stop);
        if *kind == CALL_ID && from > 0 && head[from - 1] == b'=' {
            // Within a URI, as `Replaces` in a Refer-To. Rare, so it may allocate.
            let plain = edit.out.split_off(written);
            escape(&plain, edit.out);
        }
    }
}

/// Whether the second Via of a response is hidden: the request came from the hidden side.
pub(crate) fn goes_back_inside(message: &[u8], scan: &Scan) -> bool {
    let mut vias = scan.all(Name::Via).flat_map(|via| values(via.value.of(message)));
    let second = vias.nth(1).and_then(Via::first).and_then(|(via, _)| via.branch());
    let word = second.and_then(|branch| branch.strip_prefix(b"z9hG4bK"));
    word.is_some_and(|word| word.starts_with(PREFIX))
}

/// The range that a word of that kind stands for: all that was written around it.
fn around(head: &[u8], scan: &Scan, kind: u8, from: usize, end: usize) -> Option<(usize, usize)> {
    let before = &head[..from];
    match kind {
        VIA => {
            let rest = before.strip_suffix(b";branch=z9hG4bK")?;
            let start = memmem::rfind(rest, b"SIP/2.0/")?;
            let between = &rest[start..];
            (memchr::memchr3(b',', b';', b'\n', between).is_none()).then_some((start, end))
        }
        URI | BARE_URI => {
            let scheme =
                [&b"sips:"[..], b"sip:"].into_iter().find(|scheme| before.ends_with(scheme))?;
            let start = from - scheme.len();
            if head.get(end) != Some(&b'@') {
                return None;
            }
            let rest = &head[end..];
            let length = |stops: &[u8]| rest.iter().position(|byte| stops.contains(byte));
            let bracketed = start > 0 && head[start - 1] == b'<';
            if start < scan.headers_at {
                // The Request-URI.
                return Some((start, end + length(b" \r\n")?));
            }
            if !bracketed {
                return Some((start, end + length(b";?, \t\r\n>").unwrap_or(rest.len())));
            }
            let stop = end + length(b">?\r\n")?;
            // Brackets that were put around it go with it.
            if kind == BARE_URI && head[stop] == b'>' {
                Some((start - 1, stop + 1))
            } else {
                Some((start, stop))
            }
        }
        CALL_ID => Some((from, end)),
        _ => None,
    }
}

/// As the value of a header in a URI (RFC 3261 25.1 `hvalue`).
fn escape(text: &[u8], out: &mut Vec<u8>) {
    for byte in text {
        if byte.is_ascii_alphanumeric() || b"-_.!~*'()[]/?:+$".contains(byte) {
            out.push(*byte);
        } else {
            out.push(b'%');
            out.extend([byte >> 4, byte & 15].map(|digit| b"0123456789ABCDEF"[usize::from(digit)]));
        }
    }
}

/// The word in a request's Call-ID: it is to be kept in the top Via.
pub(crate) fn call_id_word<'a>(message: &'a [u8], scan: &Scan) -> Option<&'a [u8]> {
    let Start::Request { .. } = scan.start else { return None };
    let word = scan.value(message, Name::CallId)?.strip_prefix(PREFIX)?;
    (word.first() == Some(&CALL_ID) && word.iter().all(|byte| is_cloaked(*byte))).then_some(word)
}

/// Keeps the Call-ID that a request came with in its top Via.
pub(crate) fn keep_call_id(message: &mut Vec<u8>, scan: &Scan, word: &[u8]) {
    let Some(via) = scan.first(Name::Via) else { return };
    let value = via.value.of(message);
    let end = via.value.from() + value[..end_of_value(value)].trim_ascii_end().len();
    let text = b";".iter().chain(ALIAS).chain(b"=").chain(word);
    message.splice(end..end, text.copied());
}

impl Settings {
    /// Hides in a request, written for `hop`, what its receiver shall not see.
    pub(crate) fn hide_request(
        &self,
        sent: &mut Vec<u8>,
        target: &Target<'_>,
        hop: &NextHop,
        method: Method,
        keys: &TokenKeys,
        (scan, buffer): (&mut Scan, &mut Vec<u8>),
    ) {
        let to_instance = hop.backend.is_some();
        let Some(hiding) = &self.options.topology_hiding else { return };
        // What comes from the same side hides nothing from it.
        if !hiding.hides(to_instance)
            || target.from_backend == to_instance
            || scan.scan(sent).is_err()
        {
            return;
        }
        let facing = self.local.facing(hop.transport, hop.address.is_ipv6());
        let mask = Mask {
            keys,
            host: self.local.text(facing),
            transport: self.local.transport(facing),
            call_id: hiding.call_id && target.begun_by_backend != to_instance,
        };
        let recorded = self.options.record_route && method.is_record_routed() && hop.pin.is_some();
        if mask_request(sent, scan, recorded, &mask, buffer) {
            std::mem::swap(sent, buffer);
        }
    }

    /// Hides in a response what its receiver shall not see, and gives it the Call-ID that it knows.
    pub(crate) fn hide_response(
        &self,
        sent: &mut Vec<u8>,
        (to_instance, unrecorded): (bool, bool),
        (transport, socket): (Transport, u16),
        keys: &TokenKeys,
        (scan, buffer): (&mut Scan, &mut Vec<u8>),
    ) {
        if self.hid == [false; 2] || scan.scan(sent).is_err() {
            return;
        }
        let hiding = self.options.topology_hiding.as_ref();
        let mask = Mask { keys, host: self.local.text(socket), transport, call_id: false };
        let mask = Some(&mask).filter(|_| hiding.is_some_and(|hiding| hiding.hides(to_instance)));
        let ours = |uri: &Uri<'_>| self.local.is_ours(uri.host, Some(uri.port_or_default()));
        if mask_response(sent, scan, mask, unrecorded, ours, buffer) {
            std::mem::swap(sent, buffer);
        }
    }
}
