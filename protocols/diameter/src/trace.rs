//! Which messages belong to a trace.
//!
//! A tracer is shown bytes, not connections. What a peer is told apart by elsewhere, its own
//! Hop-by-Hop identifiers, is therefore joined here by the Session-Id: an answer belongs to a
//! request with its identifiers and command, unless it names another session.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

use strowger_contract::Tracer;

use crate::avp::{Header, Summary};
use crate::dictionary::Dictionary;
use crate::subscriber::Subscriber;

/// What a trace may follow.
pub(crate) const KEYS: &[&str] = &["session-id", "imsi", "msisdn", "origin-host"];

/// Requests whose answers one trace waits for, and sessions that it follows, at most; the oldest
/// are forgotten. What one subscriber has under way is a handful; a whole peer's is some thousand.
const REMEMBERED_MAX: usize = 4_096;

/// The longest value and Session-Id that is remembered. With [`REMEMBERED_MAX`] of both kinds a
/// trace holds about 4 MiB at most.
const VALUE_MAX: usize = 512;

/// The digits of an IMSI or E.164 number (ITU-T E.212: 15, E.164: 15), with some to spare.
const DIGITS_MAX: usize = 20;

/// What is looked for.
#[derive(Debug)]
enum Wanted {
    Session(Box<[u8]>),
    Imsi(Box<[u8]>),
    Msisdn(Box<[u8]>),
    OriginHost(Box<[u8]>),
}

/// Command, Hop-by-Hop and End-to-End identifier: what an answer repeats of its request.
type Identifiers = (u32, u32, u32);

struct DiameterTracer {
    wanted: Wanted,
    /// Sessions of the subscriber: later messages need not name it.
    sessions: Remembered<Box<[u8]>, ()>,
    /// Requests without their answers, with their Session-Ids.
    requests: Remembered<Identifiers, Box<[u8]>>,
}

/// Makes a tracer.
///
/// # Errors
/// The value cannot be one of that kind.
pub(crate) fn tracer(kind: &str, value: &str) -> Result<Box<dyn Tracer>, String> {
    if value.is_empty() || value.len() > VALUE_MAX {
        return Err(format!("`{kind}` needs a value of 1 to {VALUE_MAX} bytes"));
    }
    let number = |value: &str| {
        let good = value.len() <= DIGITS_MAX && value.bytes().all(|byte| byte.is_ascii_digit());
        let wrong = || format!("`{kind}` needs 1 to {DIGITS_MAX} digits, not `{value}`");
        (good && !value.is_empty()).then(|| value.as_bytes().into()).ok_or_else(wrong)
    };
    let wanted = match kind {
        "imsi" => Wanted::Imsi(number(value)?),
        "msisdn" => Wanted::Msisdn(number(value.strip_prefix('+').unwrap_or(value))?),
        "origin-host" => Wanted::OriginHost(value.as_bytes().into()),
        _ => Wanted::Session(value.as_bytes().into()),
    };
    let (sessions, requests) = (Remembered::default(), Remembered::default());
    Ok(Box::new(DiameterTracer { wanted, sessions, requests }))
}

impl Tracer for DiameterTracer {
    fn wants(&mut self, message: &[u8]) -> bool {
        let Some(header) = Header::read(message) else { return false };
        // A message that is broken further down may still say whose it is.
        let summary = Summary::of(message);
        let session = summary.session_id.unwrap_or_default();
        let identifiers = (header.command, header.hop_by_hop, header.end_to_end);
        let named = self.names(message, &summary);
        if header.is_request() {
            if named && session.len() <= VALUE_MAX {
                self.requests.put(identifiers, session.into());
            }
            return named;
        }
        let ours = |asked: &[u8]| session.is_empty() || asked.is_empty() || asked == session;
        let answers = self.requests.get(&identifiers).is_some_and(|asked| ours(asked));
        if answers {
            self.requests.take(&identifiers);
        }
        named || answers
    }
}

impl DiameterTracer {
    /// Whether the message itself says that it belongs to the trace.
    fn names(&mut self, message: &[u8], summary: &Summary<'_>) -> bool {
        let session = summary.session_id.unwrap_or_default();
        let subscriber = match &self.wanted {
            Wanted::Session(wanted) => return **wanted == *session,
            Wanted::OriginHost(wanted) => {
                return summary.origin_host.is_some_and(|host| host.eq_ignore_ascii_case(wanted));
            }
            Wanted::Imsi(wanted) => Subscriber::of(message).imsi == Some(wanted),
            Wanted::Msisdn(wanted) => Subscriber::of(message).msisdn == Some(wanted),
        };
        if subscriber && !session.is_empty() && session.len() <= VALUE_MAX {
            self.sessions.put(session.into(), ());
        }
        subscriber || self.sessions.get(session).is_some()
    }
}

/// A map of at most [`REMEMBERED_MAX`] entries that forgets the oldest.
struct Remembered<K, V> {
    entries: HashMap<K, V>,
    /// Keys in the order in which they came; some may be gone from the map already.
    order: VecDeque<K>,
}

impl<K, V> Default for Remembered<K, V> {
    fn default() -> Self {
        Self { entries: HashMap::new(), order: VecDeque::new() }
    }
}

impl<K: Hash + Eq + Clone, V> Remembered<K, V> {
    fn put(&mut self, key: K, value: V) {
        if self.entries.insert(key.clone(), value).is_none() {
            self.order.push_back(key);
        }
        while self.order.len() > REMEMBERED_MAX {
            if let Some(oldest) = self.order.pop_front() {
                self.entries.remove(&oldest);
            }
        }
    }

    fn get<Q: ?Sized + Hash + Eq>(&self, key: &Q) -> Option<&V>
    where
        K: std::borrow::Borrow<Q>,
    {
        self.entries.get(key)
    }

    /// Takes an entry out. Its place in the order stays until the bound is met: a key that came
    /// again since may go early then, never late.
    fn take(&mut self, key: &K) {
        self.entries.remove(key);
        if self.entries.is_empty() {
            self.order.clear();
        }
    }
}

/// The Session-Id.
pub(crate) fn conversation(message: &[u8]) -> Option<&[u8]> {
    Summary::of(message).session_id
}

/// Command and application with the session of a request (`CCR gx gw;1;2`), or with the result of
/// an answer (`CCA gx 2001`).
pub(crate) fn describe(message: &[u8]) -> String {
    const LENGTH_MAX: usize = 120;
    let Some(header) = Header::read(message) else {
        return format!("{} bytes that are no message", message.len());
    };
    let dictionary = Dictionary::built_in();
    let summary = Summary::of(message);
    let request = header.is_request();
    let kind = if request { "request" } else { "answer" };
    let command = dictionary
        .command_short(header.command, request)
        .unwrap_or_else(|| format!("{kind} {}", header.command));
    let application = match dictionary.application_name(header.application) {
        _ if header.application == 0 => String::new(),
        Some(name) => format!(" {name}"),
        None => format!(" {}", header.application),
    };
    let rest = if request {
        let named = summary.session_id.or(summary.origin_host);
        named.map(|name| String::from_utf8_lossy(name).into_owned())
    } else {
        summary.result().map(|result| result.to_string())
    };
    let rest = rest.map(|rest| format!(" {rest}")).unwrap_or_default();
    let plain = |letter: char| if letter.is_control() { '\u{fffd}' } else { letter };
    format!("{command}{application}{rest}").chars().take(LENGTH_MAX).map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::avp::code;
    use crate::build::{Builder, append};

    const GX: u32 = 16_777_238;

    fn request(ids: (u32, u32), session: &str, imsi: Option<&str>) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut builder = Builder::request(&mut bytes, 272, GX, ids.0, ids.1)
            .text(code::SESSION_ID, session)
            .text(code::ORIGIN_HOST, "gw.example.net");
        if let Some(imsi) = imsi {
            for (kind, data) in [(1u32, imsi), (0, "4930123")] {
                let mut group = Vec::new();
                append(&mut group, 450, 0x40, &kind.to_be_bytes());
                append(&mut group, 444, 0x40, data.as_bytes());
                builder = builder.bytes(443, &group);
            }
        }
        builder.finish();
        bytes
    }

    fn answer(ids: (u32, u32), session: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut builder = Builder::new(&mut bytes, 0, 272, GX, ids.0, ids.1);
        if !session.is_empty() {
            builder = builder.text(code::SESSION_ID, session);
        }
        builder.number(code::RESULT_CODE, 2_001).text(code::ORIGIN_HOST, "pcrf").finish();
        bytes
    }

    #[test]
    fn a_subscriber_is_followed_through_sessions_and_answers() {
        for (kind, value) in [
            ("session-id", "gw;1"),
            ("imsi", "00101"),
            ("msisdn", "+4930123"),
            ("msisdn", "4930123"),
            ("origin-host", "GW.example.net"),
        ] {
            let mut tracer = tracer(kind, value).expect("good");
            assert!(tracer.wants(&request((1, 2), "gw;1", Some("00101"))), "{kind}");
            assert!(tracer.wants(&request((7, 2), "gw;1", Some("00101"))), "{kind}: sent on");
            assert!(tracer.wants(&answer((7, 2), "")), "{kind}: its answer, without a session");
            assert!(!tracer.wants(&answer((7, 2), "")), "{kind}: one answer");
            assert!(!tracer.wants(&answer((1, 2), "gw;2")), "{kind}: another peer's identifiers");
            assert!(tracer.wants(&answer((1, 2), "gw;1")), "{kind}");
            assert!(tracer.wants(&request((3, 4), "gw;1", None)), "{kind}: later in the session");
            let another = request((5, 6), "gw;2", None);
            assert_eq!(tracer.wants(&another), kind == "origin-host", "{kind}: another session");
            assert!(!tracer.wants(b"") && !tracer.wants(&[1; 19]), "{kind}");
        }
    }

    #[test]
    fn what_cannot_be_one_is_refused() {
        for (kind, value) in
            [("imsi", ""), ("imsi", "12a"), ("msisdn", "+"), ("imsi", "123456789012345678901")]
        {
            assert!(tracer(kind, value).is_err(), "{kind} {value}");
        }
        assert!(tracer("session-id", &"x".repeat(513)).is_err());
    }

    #[test]
    fn memory_is_bounded_and_the_oldest_go_first() {
        let mut remembered = Remembered::default();
        for number in 0..3 * REMEMBERED_MAX {
            remembered.put(number, ());
            if number % 2 == 0 {
                remembered.take(&number);
            }
        }
        assert!(remembered.order.len() <= REMEMBERED_MAX);
        assert!(remembered.entries.len() <= remembered.order.len());
        assert!(
            remembered.get(&1).is_none() && remembered.get(&(3 * REMEMBERED_MAX - 1)).is_some()
        );
    }

    #[test]
    fn a_message_is_told_in_a_line() {
        assert_eq!(describe(&request((1, 2), "gw;\u{7}1", None)), "CCR gx gw;\u{fffd}1");
        assert_eq!(describe(&answer((1, 2), "gw;1")), "CCA gx 2001");
        assert_eq!(conversation(&answer((1, 2), "gw;1")), Some(&b"gw;1"[..]));
        assert_eq!(describe(b"x"), "1 bytes that are no message");
    }
}
