//! A request and what is found in it before anything else: its transaction's name (RFC 3261 17.2.3)
//! and whether it can be used at all (16.3).

use std::time::Duration;

use strowger_contract::{Message, PoolId, Router, SessionKey, stable_hash};

use crate::SPACE;
use crate::method::Method;
use crate::respond::Answer;
use crate::scan::{Name, Scan, ScanError, Start, find};
use crate::uri::{Uri, name_addr, tag};
use crate::via::Via;
use crate::write::max_forwards;

/// A request and what was found in it.
pub(crate) struct Incoming<'a> {
    pub(crate) message: Message<'a>,
    pub(crate) scan: &'a Scan,
    pub(crate) method: Method,
    pub(crate) name: &'a [u8],
    pub(crate) uri: &'a [u8],
    pub(crate) via: Via<'a>,
    /// Names the transaction, by the branch and the sender (17.2.3).
    pub(crate) key: u64,
    pub(crate) call_id: u64,
}

impl<'a> Incoming<'a> {
    /// `bytes` without what follows the body (18.3).
    pub(crate) fn read(message: &Message<'a>, scan: &'a Scan, router: &dyn Router) -> Option<Self> {
        let Start::Request { method, uri } = scan.start else { return None };
        let (name, uri) = (method.of(message.bytes), uri.of(message.bytes));
        let (via, _) = Via::first(scan.value(message.bytes, Name::Via)?)?;
        let call_id = scan.value(message.bytes, Name::CallId).filter(|value| !value.is_empty())?;
        let key = transaction_key(&via, scan, message.bytes, call_id, name, router);
        Some(Self {
            message: *message,
            scan,
            method: Method::of(name),
            name,
            uri,
            via,
            key,
            call_id: stable_hash(call_id),
        })
    }
}

/// RFC 3261 17.2.3. An ACK and a CANCEL have their INVITE's key. Without the magic cookie (RFC 2543)
/// the request's own fields make it.
fn transaction_key(
    via: &Via<'_>,
    scan: &Scan,
    bytes: &[u8],
    call_id: &[u8],
    method: &[u8],
    router: &dyn Router,
) -> u64 {
    let keyer = router.keyer();
    let invite = matches!(method, b"INVITE" | b"ACK" | b"CANCEL");
    let kind = u8::from(invite) | 0x40;
    let branch = via.branch().filter(|branch| {
        branch.get(..7).is_some_and(|cookie| cookie.eq_ignore_ascii_case(b"z9hG4bK"))
    });
    let mut key = keyer.keyed(kind, branch.unwrap_or(call_id))
        ^ keyer.keyed(kind, via.sent_by).rotate_left(13);
    if branch.is_none() {
        let from = scan.value(bytes, Name::From).and_then(tag).unwrap_or_default();
        let number = scan.value(bytes, Name::CSeq).unwrap_or_default();
        let digits = number.iter().take_while(|byte| byte.is_ascii_digit()).count();
        key ^= keyer.keyed(kind, from).rotate_left(29)
            ^ keyer.keyed(kind, &number[..digits]).rotate_left(43);
    }
    if invite { key } else { key ^ keyer.keyed(kind, method).rotate_left(53) }
}

/// What a request is refused for before anything else is looked at (16.3).
pub(crate) fn refused_as_is<'a>(
    incoming: &Incoming<'a>,
    error: Option<ScanError>,
) -> Option<Answer<'a>> {
    let (bytes, scan) = (incoming.message.bytes, incoming.scan);
    match error {
        Some(ScanError::Version) => return Some(Answer::new(505, "Version Not Supported")),
        Some(ScanError::StartLine) => return Some(Answer::new(400, "Malformed Request Line")),
        Some(ScanError::TooManyHeaders) => return Some(Answer::new(400, "Too Many Header Fields")),
        Some(_) => return Some(Answer::new(400, "Malformed Header Field")),
        None => {}
    }
    let missing =
        [(Name::From, "Missing From"), (Name::To, "Missing To"), (Name::CSeq, "Missing CSeq")];
    if let Some((_, reason)) =
        missing.iter().find(|(name, _)| scan.value(bytes, *name).is_none_or(<[u8]>::is_empty))
    {
        return Some(Answer::new(400, reason));
    }
    for (name, reason) in [
        (Name::CallId, "More Than One Call-ID"),
        (Name::CSeq, "More Than One CSeq"),
        (Name::From, "More Than One From"),
        (Name::To, "More Than One To"),
        (Name::MaxForwards, "More Than One Max-Forwards"),
    ] {
        if scan.all(name).count() > 1 {
            return Some(Answer::new(400, reason));
        }
    }
    let cseq = scan.value(bytes, Name::CSeq).unwrap_or_default();
    if !is_cseq(cseq, incoming.name) {
        return Some(Answer::new(400, "Malformed CSeq"));
    }
    if incoming.uri.iter().any(|byte| byte.is_ascii_control() || b"<>\"".contains(byte)) {
        return Some(Answer::new(400, "Malformed Request-URI"));
    }
    let scheme = memchr::memchr(b':', incoming.uri).map(|colon| &incoming.uri[..colon]);
    match scheme {
        None => return Some(Answer::new(400, "Malformed Request-URI")),
        Some(scheme)
            if scheme.eq_ignore_ascii_case(b"sip") || scheme.eq_ignore_ascii_case(b"sips") =>
        {
            if Uri::parse(incoming.uri).is_none() {
                return Some(Answer::new(400, "Malformed Request-URI"));
            }
        }
        // tel:, urn: and what is yet to come are the pool's business.
        Some(_) => {}
    }
    // RFC 4475 3.3.9: which of two lengths holds, nobody can say.
    let mut lengths = scan.all(Name::ContentLength).map(|header| header.value.of(bytes));
    if let Some(first) = lengths.next()
        && lengths.any(|other| other != first)
    {
        return Some(Answer::new(400, "Two Different Content-Length"));
    }
    if let Some(length) = scan.value(bytes, Name::ContentLength)
        && content_length(length).is_none_or(|length| length > bytes.len() - scan.body_at)
    {
        return Some(Answer::new(400, "Content-Length Does Not Fit"));
    }
    match scan.value(bytes, Name::MaxForwards).map(max_forwards) {
        Some(None) => return Some(Answer::new(400, "Malformed Max-Forwards")),
        Some(Some(0)) => return Some(Answer::new(483, "Too Many Hops")),
        Some(Some(_)) | None => {}
    }
    let required = scan.value(bytes, Name::ProxyRequire).filter(|value| !value.is_empty());
    required
        .filter(|_| !matches!(incoming.method, Method::Ack | Method::Cancel))
        .map(|required| Answer { unsupported: Some(required), ..Answer::new(420, "Bad Extension") })
}

fn content_length(digits: &[u8]) -> Option<usize> {
    let good = !digits.is_empty() && digits.len() <= 9 && digits.iter().all(u8::is_ascii_digit);
    good.then(|| digits.iter().fold(0, |length, digit| length * 10 + usize::from(digit - b'0')))
}

/// `number method`, the number below 2^31 (8.1.1.5).
fn is_cseq(value: &[u8], method: &[u8]) -> bool {
    let digits = value.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let number = value[..digits].iter().try_fold(0u64, |number, digit| {
        number
            .checked_mul(10)?
            .checked_add(u64::from(digit - b'0'))
            .filter(|&number| number < 1 << 31)
    });
    let rest = &value[digits..];
    digits > 0
        && number.is_some()
        && rest.first().is_some_and(u8::is_ascii_whitespace)
        && rest.trim_ascii() == method
}

/// RFC 3261 18.3: bytes of a datagram beyond the body are no part of the message.
pub(crate) fn trimmed<'a>(incoming: &Incoming<'a>) -> &'a [u8] {
    let bytes = incoming.message.bytes;
    let length = incoming.scan.value(bytes, Name::ContentLength).and_then(content_length);
    length.and_then(|length| bytes.get(..incoming.scan.body_at + length)).unwrap_or(bytes)
}

/// The loop part of our branch (RFC 3261 16.6 step 8, RFC 5393 4.2): all that routing goes by. The same for
/// an INVITE, its CANCEL and its ACK.
pub(crate) fn loop_hash(message: &[u8], scan: &Scan, uri: &[u8], call_id: u64) -> u32 {
    let mut hash = call_id ^ stable_hash(uri);
    for header in scan.all(Name::Route) {
        hash = hash.rotate_left(7) ^ stable_hash(header.value.of(message));
    }
    let from = scan.value(message, Name::From).and_then(tag).unwrap_or_default();
    let number = scan.value(message, Name::CSeq).unwrap_or_default();
    let digits = number.iter().take_while(|byte| byte.is_ascii_digit()).count();
    hash =
        hash.rotate_left(11) ^ stable_hash(from) ^ stable_hash(&number[..digits]).rotate_left(32);
    (hash ^ hash >> 32) as u32
}

/// What the table knows the request's session by, and what it is placed by (the pool's
/// `session.key`).
pub(crate) fn session_key(
    message: &Message<'_>,
    scan: &Scan,
    uri: &[u8],
    pool: Option<PoolId>,
    router: &dyn Router,
) -> SessionKey {
    let keyer = router.keyer();
    let call_id = scan.value(message.bytes, Name::CallId).unwrap_or_default();
    let by_call = keyer.session(SPACE, call_id);
    let Some(name) = pool.map(|pool| router.session_key_name(pool)) else { return by_call };
    if matches!(name, "" | "call-id") {
        return by_call;
    }
    let text = placing_text(name, message, scan, uri);
    let ip;
    let text = match (name, text) {
        ("source", _) => {
            ip = match message.remote.ip().to_canonical() {
                std::net::IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                std::net::IpAddr::V6(ip) => ip.octets(),
            };
            Some(&ip[..])
        }
        (_, text) => text,
    };
    // A request without the key is placed by its Call-ID.
    match text.filter(|text| !text.is_empty()) {
        Some(text) => SessionKey { stable: stable_hash(text), keyed: by_call.keyed },
        None => by_call,
    }
}

fn placing_text<'a>(
    key: &str,
    message: &Message<'a>,
    scan: &Scan,
    uri: &'a [u8],
) -> Option<&'a [u8]> {
    let bytes = message.bytes;
    let address = |name| scan.value(bytes, name).and_then(name_addr).map(|(uri, _)| uri);
    match key {
        "from" => address(Name::From),
        "to" => address(Name::To),
        "ruri-user" | "request-user" => {
            Uri::parse(uri).map_or(Some(uri), |uri| uri.user.or(Some(uri.host)))
        }
        "auth-user" => scan
            .value(bytes, Name::ProxyAuthorization)
            .or_else(|| scan.value(bytes, Name::Authorization))
            .and_then(username)
            .or_else(|| address(Name::From)),
        _ => {
            if let Some(header) = key.strip_prefix("header:") {
                find(bytes, scan, header.as_bytes())
            } else {
                let name = key.strip_prefix("uri-param:")?;
                Uri::parse(uri)?.parameter(name.as_bytes()).flatten()
            }
        }
    }
}

/// The `username` of digest credentials.
fn username(credentials: &[u8]) -> Option<&[u8]> {
    let lower = |at: usize| {
        credentials.get(at..at + 9).is_some_and(|text| text.eq_ignore_ascii_case(b"username="))
    };
    let at = (0..credentials.len()).find(|&at| lower(at))? + 9;
    let rest = &credentials[at..];
    match rest.strip_prefix(b"\"") {
        Some(quoted) => quoted.split(|&byte| byte == b'"').next(),
        None => rest.split(|&byte| matches!(byte, b',' | b' ')).next(),
    }
}

/// An address of record as the table knows it: `user@host`, without scheme, port and parameters, the
/// host in lower case (RFC 3261 10.3 step 5).
pub(crate) fn record_key(uri: &[u8], router: &dyn Router) -> Option<SessionKey> {
    let uri = Uri::parse(uri)?;
    let mut text = [0u8; 160];
    let user = uri.user?;
    let len = user.len() + 1 + uri.host.len();
    let place = text.get_mut(..len)?;
    place[..user.len()].copy_from_slice(user);
    place[user.len()] = b'@';
    place[user.len() + 1..].copy_from_slice(uri.host);
    place[user.len() + 1..].make_ascii_lowercase();
    Some(router.keyer().session(SPACE + 1, place))
}

/// How long a header of seconds says (`Expires`, `Session-Expires`, `Retry-After`), up to a day.
pub(crate) fn seconds(value: &[u8]) -> Option<Duration> {
    let digits = value.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let number = std::str::from_utf8(&value[..digits]).ok()?.parse::<u64>().ok()?;
    Some(Duration::from_secs(number.min(86_400)))
}
