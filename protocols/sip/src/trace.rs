//! Which messages belong to a traced call.

use std::collections::HashSet;

use strowger_contract::Tracer;

use crate::scan::{Name, Scan, Start};
use crate::uri::{Uri, name_addr};

/// What a trace may follow.
pub(crate) const KEYS: &[&str] = &["call-id", "from-user", "to-user", "user", "request-user"];

/// Calls that one trace follows by a user's name, at most: one busy user's hour. Each is
/// remembered by its Call-ID, so that its answers and later requests are seen as well.
const CALLS_MAX: usize = 4_096;

/// The longest Call-ID that is remembered.
const CALL_ID_MAX: usize = 256;

/// What is looked for.
enum Wanted {
    /// One call.
    Call(Vec<u8>),
    /// The calls whose first seen request names a user in one of these places.
    User { user: Vec<u8>, from: bool, to: bool, request: bool, calls: HashSet<Vec<u8>> },
}

struct SipTracer {
    wanted: Wanted,
    scan: Scan,
}

/// Makes a tracer.
///
/// # Errors
/// The value is empty, or longer than such a thing can be.
pub(crate) fn tracer(kind: &str, value: &str) -> Result<Box<dyn Tracer>, String> {
    if value.is_empty() || value.len() > CALL_ID_MAX {
        return Err(format!("`{kind}` needs a value of 1 to {CALL_ID_MAX} bytes"));
    }
    let user = |from, to, request| Wanted::User {
        user: value.as_bytes().to_vec(),
        from,
        to,
        request,
        calls: HashSet::new(),
    };
    let wanted = match kind {
        "from-user" => user(true, false, false),
        "to-user" => user(false, true, false),
        "request-user" => user(false, false, true),
        "user" => user(true, true, true),
        _ => Wanted::Call(value.as_bytes().to_vec()),
    };
    Ok(Box::new(SipTracer { wanted, scan: Scan::default() }))
}

impl Tracer for SipTracer {
    fn wants(&mut self, message: &[u8]) -> bool {
        // A message that is broken further down may still say whose it is.
        let _broken = self.scan.scan(message);
        let Some(call_id) = self.scan.value(message, Name::CallId) else { return false };
        match &mut self.wanted {
            Wanted::Call(wanted) => wanted == call_id,
            Wanted::User { user, from, to, request, calls } => {
                if calls.contains(call_id) {
                    return true;
                }
                let names = |name| {
                    let value = self.scan.value(message, name);
                    user_of(value.and_then(name_addr).map(|(uri, _)| uri)) == Some(user)
                };
                let requested = match self.scan.start {
                    Start::Request { uri, .. } => user_of(Some(uri.of(message))) == Some(user),
                    Start::Response { .. } => false,
                };
                let found =
                    *from && names(Name::From) || *to && names(Name::To) || *request && requested;
                if found && calls.len() < CALLS_MAX && call_id.len() <= CALL_ID_MAX {
                    calls.insert(call_id.to_vec());
                }
                found
            }
        }
    }
}

/// The user of a `sip:` URI, or the number of a `tel:` one.
fn user_of(uri: Option<&[u8]>) -> Option<&[u8]> {
    let uri = uri?;
    if let Some(number) = uri.get(..4).filter(|scheme| scheme.eq_ignore_ascii_case(b"tel:")) {
        let rest = &uri[number.len()..];
        return Some(rest.split(|&byte| byte == b';').next().unwrap_or(rest));
    }
    let user = Uri::parse(uri)?.user?;
    // A password, and parameters of a telephone number, are no part of the name.
    user.split(|&byte| byte == b':' || byte == b';').next()
}

/// The Call-ID.
pub(crate) fn conversation(message: &[u8]) -> Option<&[u8]> {
    let mut scan = Scan::default();
    let _broken = scan.scan(message);
    scan.value(message, Name::CallId)
}

/// Method and Request-URI, or status and reason; with the CSeq of an answer.
pub(crate) fn describe(message: &[u8]) -> String {
    const LENGTH_MAX: usize = 120;
    let line = message.split(|&byte| byte == b'\r' || byte == b'\n').next().unwrap_or_default();
    let text = String::from_utf8_lossy(line);
    let told = match text.strip_prefix("SIP/2.0 ") {
        Some(status) => {
            let mut scan = Scan::default();
            let _broken = scan.scan(message);
            let cseq = scan.value(message, Name::CSeq).unwrap_or_default();
            format!("{status} ({})", String::from_utf8_lossy(cseq))
        }
        None => text.trim_end_matches(" SIP/2.0").to_owned(),
    };
    let plain = |letter: char| if letter.is_control() { '\u{fffd}' } else { letter };
    told.chars().take(LENGTH_MAX).map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(start: &str, from: &str, to: &str, call: &str) -> Vec<u8> {
        format!("{start}\r\nf: {from};tag=1\r\nTo: {to}\r\nCSeq: 1 INVITE\r\ni: {call}\r\n\r\n")
            .into()
    }

    #[test]
    fn a_call_is_followed_from_the_first_message_that_names_its_user() {
        let invite = message(
            "INVITE sip:+4930;phone-context=x@b SIP/2.0",
            "\"A, B\" <sip:alice:secret@a>",
            "<tel:+4930;x=y>",
            "1@x",
        );
        let ringing = message("SIP/2.0 180 Ringing", "<sip:x@a>", "<sip:y@b>", "1@x");
        let other = message("SIP/2.0 180 Ringing", "<sip:x@a>", "<sip:y@b>", "2@x");
        for (kind, value) in [
            ("call-id", "1@x"),
            ("from-user", "alice"),
            ("to-user", "+4930"),
            ("request-user", "+4930"),
            ("user", "alice"),
        ] {
            let mut tracer = tracer(kind, value).expect("good");
            assert!(tracer.wants(&invite), "{kind}");
            assert!(tracer.wants(&ringing), "{kind}: the answer");
            assert!(!tracer.wants(&other) && !tracer.wants(b"\r\n\r\n"), "{kind}");
        }
        assert!(!tracer("from-user", "+4930").expect("good").wants(&invite));
        assert!(tracer("from-user", "").is_err());
    }

    #[test]
    fn a_message_is_told_in_a_line() {
        let ringing = message("SIP/2.0 180 Ring\u{7}ing", "<sip:x@a>", "<sip:y@b>", "1@x");
        assert_eq!(describe(&ringing), "180 Ring\u{fffd}ing (1 INVITE)");
        assert_eq!(describe(b"BYE sip:a@b SIP/2.0\r\n"), "BYE sip:a@b");
        assert_eq!(conversation(&ringing), Some(&b"1@x"[..]));
    }
}
