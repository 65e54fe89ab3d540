//! One pass over a message: where things are, and nothing copied.
//!
//! All liberties of RFC 3261 7.3 and 25 are taken as they come: any letter case, compact names,
//! space before the colon, folded lines, several values in one header, bytes that are no UTF-8,
//! bare line feeds. What is not needed is not looked at.

use memchr::memchr;

/// Header lines in a message, at most. The largest seen in the field has about 60; each costs a
/// slot here and time at every hop.
pub const HEADERS_MAX: usize = 256;

/// The largest message: what UDP can carry. Also the limit on streams.
pub const MESSAGE_BYTES_MAX: usize = 65_535;

/// A range of the message's bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub start: u32,
    /// One past the last.
    pub end: u32,
}

impl Span {
    fn new(start: usize, end: usize) -> Self {
        Self { start: start as u32, end: end as u32 }
    }

    /// The bytes.
    #[must_use]
    pub fn of(self, message: &[u8]) -> &[u8] {
        message.get(self.start as usize..self.end as usize).unwrap_or_default()
    }

    /// First byte.
    #[must_use]
    pub fn from(self) -> usize {
        self.start as usize
    }

    /// One past the last.
    #[must_use]
    pub fn to(self) -> usize {
        self.end as usize
    }
}

/// Headers that a proxy looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Name {
    Via,
    From,
    To,
    CallId,
    CSeq,
    MaxForwards,
    Route,
    RecordRoute,
    Contact,
    ContentLength,
    ProxyRequire,
    ResourcePriority,
    RetryAfter,
    MaxBreadth,
    Expires,
    SessionExpires,
    UserAgent,
    Supported,
    Authorization,
    ProxyAuthorization,
    WwwAuthenticate,
    ProxyAuthenticate,
    Other,
}

/// A header that a proxy looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which.
    pub name: Name,
    /// The whole of it, from its name to past its line end.
    pub line: Span,
    /// The value, without space at its ends; folds are inside.
    pub value: Span,
}

/// The start line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// A request.
    Request {
        /// The method as written.
        method: Span,
        /// The Request-URI as written.
        uri: Span,
    },
    /// A response.
    Response {
        /// 100 to 699.
        code: u16,
    },
}

/// Why a message cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScanError {
    /// Larger than [`MESSAGE_BYTES_MAX`].
    #[error("message too large")]
    TooLarge,
    /// No SIP start line.
    #[error("malformed start line")]
    StartLine,
    /// Another version than SIP/2.0.
    #[error("SIP version not supported")]
    Version,
    /// A header line without a colon, or a fold before any header.
    #[error("malformed header line")]
    HeaderLine,
    /// More than [`HEADERS_MAX`] lines.
    #[error("too many header lines")]
    TooManyHeaders,
}

/// Where things are. Reused from message to message.
#[derive(Clone, Debug)]
pub struct Scan {
    /// The start line.
    pub start: Start,
    /// Past the start line's end.
    pub headers_at: usize,
    /// The headers that a proxy looks at, in order.
    pub headers: Vec<Header>,
    /// Past the empty line.
    pub body_at: usize,
    /// Whether the start line or a header is broken beyond use though the rest could be read.
    pub broken: Option<ScanError>,
}

impl Default for Scan {
    fn default() -> Self {
        Self {
            start: Start::Response { code: 0 },
            headers_at: 0,
            // Not with a capacity: taking the scan out for a call leaves a default behind.
            headers: Vec::new(),
            body_at: 0,
            broken: None,
        }
    }
}

impl Scan {
    /// Looks through `message`. On an error the headers found so far may still serve to answer.
    ///
    /// # Errors
    /// It cannot be used as a message; [`ScanError`] says why.
    pub fn scan(&mut self, message: &[u8]) -> Result<(), ScanError> {
        self.headers.clear();
        self.broken = None;
        self.headers_at = 0;
        self.body_at = message.len();
        if message.len() > MESSAGE_BYTES_MAX {
            return Err(ScanError::TooLarge);
        }
        let (line, next) = line_at(message, 0).ok_or(ScanError::StartLine)?;
        self.headers_at = next;
        match start_line(message, line) {
            Ok(start) => self.start = start,
            Err(error) => {
                self.start = request_of_other_version(message, line).ok_or(error)?;
                self.broken = Some(error);
            }
        }
        self.scan_headers(message, next)?;
        self.broken.map_or(Ok(()), Err)
    }

    fn scan_headers(&mut self, message: &[u8], mut at: usize) -> Result<(), ScanError> {
        for _ in 0..HEADERS_MAX {
            let Some((line, mut next)) = line_at(message, at) else {
                // No empty line: a datagram that ends with its headers.
                self.body_at = message.len();
                return if at == message.len() { Ok(()) } else { Err(ScanError::HeaderLine) };
            };
            if line.from() == line.to() {
                self.body_at = next;
                return Ok(());
            }
            let first = message[line.from()];
            if first == b' ' || first == b'\t' {
                return Err(ScanError::HeaderLine);
            }
            let mut end = line.to();
            while matches!(message.get(next), Some(b' ' | b'\t')) {
                let Some((fold, after)) = line_at(message, next) else { break };
                (end, next) = (fold.to(), after);
            }
            self.header(message, at, end, next)?;
            at = next;
        }
        Err(ScanError::TooManyHeaders)
    }

    fn header(
        &mut self,
        message: &[u8],
        at: usize,
        end: usize,
        next: usize,
    ) -> Result<(), ScanError> {
        let text = &message[at..end];
        let colon = memchr(b':', text).ok_or(ScanError::HeaderLine)?;
        let name = text[..colon].trim_ascii_end();
        if name.is_empty() || !name.iter().all(|&byte| is_token(byte)) {
            return Err(ScanError::HeaderLine);
        }
        let name = name_of(name);
        if name == Name::Other {
            return Ok(());
        }
        let value = text[colon + 1..].trim_ascii();
        let offset = value.as_ptr() as usize - text.as_ptr() as usize;
        let value = Span::new(at + offset, at + offset + value.len());
        self.headers.push(Header { name, line: Span::new(at, next), value });
        Ok(())
    }

    /// The first header of that name.
    #[must_use]
    pub fn first(&self, name: Name) -> Option<&Header> {
        self.headers.iter().find(|header| header.name == name)
    }

    /// The value of the first header of that name.
    #[must_use]
    pub fn value<'a>(&self, message: &'a [u8], name: Name) -> Option<&'a [u8]> {
        self.first(name).map(|header| header.value.of(message))
    }

    /// All headers of that name.
    pub fn all(&self, name: Name) -> impl Iterator<Item = &Header> {
        self.headers.iter().filter(move |header| header.name == name)
    }
}

/// All header lines of a scanned message, those that a proxy does not look at included: the name
/// without space at its end, the whole with its line end, and the value.
pub(crate) fn lines<'a>(
    message: &'a [u8],
    scan: &Scan,
) -> impl Iterator<Item = (&'a [u8], Span, &'a [u8])> {
    let (mut at, end) = (scan.headers_at, scan.body_at);
    std::iter::from_fn(move || {
        let (line, mut next) = line_at(message, at)?;
        if at >= end || line.from() == line.to() {
            return None;
        }
        let mut last = line.to();
        while matches!(message.get(next), Some(b' ' | b'\t')) {
            let Some((fold, after)) = line_at(message, next) else { break };
            (last, next) = (fold.to(), after);
        }
        let whole = Span::new(at, next);
        let text = &message[at..last];
        let colon = memchr(b':', text)?;
        at = next;
        Some((text[..colon].trim_ascii_end(), whole, text[colon + 1..].trim_ascii()))
    })
}

/// The value of the first header of a name given at run time (both its forms must be asked for).
pub(crate) fn find<'a>(message: &'a [u8], scan: &Scan, name: &[u8]) -> Option<&'a [u8]> {
    lines(message, scan).find(|(known, ..)| known.eq_ignore_ascii_case(name)).map(|found| found.2)
}

/// The line at `at` without its end, and where the next begins.
fn line_at(message: &[u8], at: usize) -> Option<(Span, usize)> {
    let feed = at + memchr(b'\n', message.get(at..)?)?;
    let end = if feed > at && message[feed - 1] == b'\r' { feed - 1 } else { feed };
    Some((Span::new(at, end), feed + 1))
}

fn start_line(message: &[u8], line: Span) -> Result<Start, ScanError> {
    let text = line.of(message);
    if let Some(rest) = strip_version(text) {
        let code =
            rest.strip_prefix(b" ").and_then(|rest| rest.get(..3)).ok_or(ScanError::StartLine)?;
        if rest.get(4).is_some_and(|&byte| byte != b' ') || !code.iter().all(u8::is_ascii_digit) {
            return Err(ScanError::StartLine);
        }
        let code = code.iter().fold(0, |code, digit| code * 10 + u16::from(digit - b'0'));
        return if (100..700).contains(&code) {
            Ok(Start::Response { code })
        } else {
            Err(ScanError::StartLine)
        };
    }
    let method = memchr(b' ', text).ok_or(ScanError::StartLine)?;
    let uri = memchr(b' ', &text[method + 1..]).ok_or(ScanError::StartLine)? + method + 1;
    let version = &text[uri + 1..];
    if strip_version(version) != Some(b"") {
        let other = version.len() >= 4 && version[..4].eq_ignore_ascii_case(b"SIP/");
        return Err(if other && memchr(b' ', version).is_none() {
            ScanError::Version
        } else {
            ScanError::StartLine
        });
    }
    request(line, method, uri, text).ok_or(ScanError::StartLine)
}

fn request(line: Span, method: usize, uri: usize, text: &[u8]) -> Option<Start> {
    let good = method > 0 && uri > method + 1 && text[..method].iter().all(|&byte| is_token(byte));
    let at = line.from();
    good.then(|| Start::Request {
        method: Span::new(at, at + method),
        uri: Span::new(at + method + 1, at + uri),
    })
}

/// A request whose start line is no good can still be answered when its parts can be told apart.
fn request_of_other_version(message: &[u8], line: Span) -> Option<Start> {
    let text = line.of(message);
    let method = memchr(b' ', text)?;
    let uri = memchr::memrchr(b' ', text).filter(|&uri| uri > method)?;
    let sip = text[uri + 1..].get(..4).is_some_and(|version| version.eq_ignore_ascii_case(b"SIP/"));
    request(line, method, uri, text).filter(|_| sip)
}

fn strip_version(text: &[u8]) -> Option<&[u8]> {
    let (version, rest) = text.split_at_checked(7)?;
    version.eq_ignore_ascii_case(b"SIP/2.0").then_some(rest)
}

/// RFC 3261 25.1 `token`.
pub(crate) fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-.!%*_+`'~".contains(&byte)
}

fn name_of(name: &[u8]) -> Name {
    let is = |long: &[u8]| name.eq_ignore_ascii_case(long);
    match (name.len(), name[0] | 0x20) {
        (1, b'v') => Name::Via,
        (1, b'f') => Name::From,
        (1, b't') => Name::To,
        (1, b'i') => Name::CallId,
        (1, b'm') => Name::Contact,
        (1, b'l') => Name::ContentLength,
        (1, b'x') => Name::SessionExpires,
        (1, b'k') => Name::Supported,
        (2, b't') if is(b"To") => Name::To,
        (3, b'v') if is(b"Via") => Name::Via,
        (4, b'f') if is(b"From") => Name::From,
        (4, b'c') if is(b"CSeq") => Name::CSeq,
        (5, b'r') if is(b"Route") => Name::Route,
        (7, b'c') if is(b"Call-ID") => Name::CallId,
        (7, b'c') if is(b"Contact") => Name::Contact,
        (7, b'e') if is(b"Expires") => Name::Expires,
        (9, b's') if is(b"Supported") => Name::Supported,
        (10, b'u') if is(b"User-Agent") => Name::UserAgent,
        (11, b'm') if is(b"Max-Breadth") => Name::MaxBreadth,
        (11, b'r') if is(b"Retry-After") => Name::RetryAfter,
        (12, b'm') if is(b"Max-Forwards") => Name::MaxForwards,
        (12, b'r') if is(b"Record-Route") => Name::RecordRoute,
        (13, b'p') if is(b"Proxy-Require") => Name::ProxyRequire,
        (13, b'a') if is(b"Authorization") => Name::Authorization,
        (14, b'c') if is(b"Content-Length") => Name::ContentLength,
        (15, b's') if is(b"Session-Expires") => Name::SessionExpires,
        (16, b'w') if is(b"WWW-Authenticate") => Name::WwwAuthenticate,
        (17, b'r') if is(b"Resource-Priority") => Name::ResourcePriority,
        (18, b'p') if is(b"Proxy-Authenticate") => Name::ProxyAuthenticate,
        (19, b'p') if is(b"Proxy-Authorization") => Name::ProxyAuthorization,
        _ => Name::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(text: &str) -> (Scan, Result<(), ScanError>) {
        let mut scan = Scan::default();
        let result = scan.scan(text.as_bytes());
        (scan, result)
    }

    #[test]
    fn takes_the_liberties_of_the_rfc() {
        let text = "INVITE sip:a@b SIP/2.0\r\nv :  SIP/2.0/UDP a\r\n ;branch=x\r\nvIA: SIP/2.0/UDP b, SIP/2.0/UDP c\nX-Odd: \u{e9}\r\nf\t: <sip:x@y>\r\ni: 1\r\n\r\nbody";
        let (scan, result) = scan(text);
        assert_eq!(result, Ok(()));
        let vias: Vec<_> = scan.all(Name::Via).map(|via| via.value.of(text.as_bytes())).collect();
        assert_eq!(vias, [&b"SIP/2.0/UDP a\r\n ;branch=x"[..], b"SIP/2.0/UDP b, SIP/2.0/UDP c"]);
        assert_eq!(scan.value(text.as_bytes(), Name::From), Some(&b"<sip:x@y>"[..]));
        assert_eq!(&text[scan.body_at..], "body");
    }

    #[test]
    fn names_what_is_wrong() {
        for (text, error) in [
            ("", ScanError::StartLine),
            ("INVITE sip:a@b\r\n\r\n", ScanError::StartLine),
            ("INVITE  sip:a@b SIP/2.0\r\n\r\n", ScanError::StartLine),
            ("INVITE sip:a@b SIP/7.0\r\nVia: x\r\n\r\n", ScanError::Version),
            ("SIP/2.0 99 x\r\n\r\n", ScanError::StartLine),
            ("SIP/2.0 4294967301 x\r\n\r\n", ScanError::StartLine),
            ("BYE sip:a SIP/2.0\r\nno colon\r\n\r\n", ScanError::HeaderLine),
            ("BYE sip:a SIP/2.0\r\n fold first: x\r\n\r\n", ScanError::HeaderLine),
            ("BYE sip:a SIP/2.0\r\nVia: cut", ScanError::HeaderLine),
        ] {
            assert_eq!(scan(text).1, Err(error), "{text:?}");
        }
        let many = format!("BYE sip:a SIP/2.0\r\n{}\r\n", "X: y\r\n".repeat(HEADERS_MAX + 1));
        assert_eq!(scan(&many).1, Err(ScanError::TooManyHeaders));
    }

    #[test]
    fn a_response_needs_no_reason() {
        for text in [
            "SIP/2.0 200 OK\r\n\r\n",
            "SIP/2.0 200 \r\n\r\n",
            "SIP/2.0 200\r\n\r\n",
            "sip/2.0 200 \u{fc}\r\n\r\n",
        ] {
            assert_eq!(scan(text).0.start, Start::Response { code: 200 }, "{text:?}");
        }
    }
}
