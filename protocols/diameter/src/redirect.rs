//! Redirect indications (RFC 6733 6.1.8, 6.12 to 6.14): followed, and kept as long as they say.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use strowger_contract::{BackendId, stable_hash};

use crate::avp::{Avps, Header, Summary, code};

/// Redirections that are kept, at most; further ones are followed and not kept.
const KEPT_MAX: usize = 10_000;

/// Redirect-Max-Cache-Time, at most.
const CACHE_SECONDS_MAX: u32 = 86_400;

/// Redirect-Host-Usage (RFC 6733 6.13).
const ALL_SESSION: u32 = 1;
const ALL_REALM: u32 = 2;
const REALM_AND_APPLICATION: u32 = 3;
const ALL_APPLICATION: u32 = 4;
const ALL_HOST: u32 = 5;
const ALL_USER: u32 = 6;

/// What a redirect indication says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Indication {
    pub(crate) usage: u32,
    pub(crate) lasting: Duration,
}

impl Indication {
    pub(crate) fn read(bytes: &[u8]) -> Self {
        let (mut usage, mut seconds) = (0, 0);
        for avp in Avps::of(bytes).map_while(Result::ok) {
            if avp.is(code::REDIRECT_HOST_USAGE) {
                usage = avp.number().unwrap_or(0);
            } else if avp.is(code::REDIRECT_MAX_CACHE_TIME) {
                seconds = avp.number().unwrap_or(0).min(CACHE_SECONDS_MAX);
            }
        }
        Self { usage, lasting: Duration::from_secs(u64::from(seconds)) }
    }
}

/// The hosts that an answer names, of `aaa://host:port;transport=tcp` each.
pub(crate) fn hosts(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let found = Avps::of(bytes).map_while(Result::ok).filter(|avp| avp.is(code::REDIRECT_HOST));
    found.filter_map(|avp| host(avp.data))
}

fn host(uri: &[u8]) -> Option<&[u8]> {
    let rest = uri.strip_prefix(b"aaa://").or_else(|| uri.strip_prefix(b"aaas://"))?;
    let end = rest.iter().position(|byte| b":;".contains(byte)).unwrap_or(rest.len());
    (end > 0).then_some(&rest[..end])
}

/// What became of a redirection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    /// It holds for further requests.
    Yes,
    /// It is for the one request.
    No,
    /// There is no room for it ([`KEPT_MAX`]).
    Full,
}

/// The redirections that hold.
#[derive(Debug, Default)]
pub(crate) struct Redirects {
    kept: HashMap<u64, (BackendId, Instant)>,
}

impl Redirects {
    /// Keeps one, if it may be kept.
    pub(crate) fn keep(
        &mut self,
        now: Instant,
        indication: Indication,
        (header, summary, user): (&Header, &Summary<'_>, &[u8]),
        backend: BackendId,
    ) -> Kept {
        let Some(key) = key(indication.usage, header, summary, user) else { return Kept::No };
        if indication.lasting.is_zero() {
            return Kept::No;
        }
        if self.kept.len() >= KEPT_MAX {
            self.kept.retain(|_, (_, until)| *until > now);
            if self.kept.len() >= KEPT_MAX {
                return Kept::Full;
            }
        }
        self.kept.insert(key, (backend, now + indication.lasting));
        Kept::Yes
    }

    /// Where a request is to go by what was said before; RFC 6733 6.13 orders the usages so.
    pub(crate) fn find(
        &self,
        now: Instant,
        header: &Header,
        summary: &Summary<'_>,
        user: &[u8],
    ) -> Option<BackendId> {
        if self.kept.is_empty() {
            return None;
        }
        [ALL_SESSION, ALL_USER, REALM_AND_APPLICATION, ALL_REALM, ALL_APPLICATION, ALL_HOST]
            .into_iter()
            .filter_map(|usage| self.kept.get(&key(usage, header, summary, user)?))
            .find(|(_, until)| *until > now)
            .map(|(backend, _)| *backend)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }
}

fn key(usage: u32, header: &Header, summary: &Summary<'_>, user: &[u8]) -> Option<u64> {
    let application = header.application.to_be_bytes();
    let (text, number): (&[u8], [u8; 4]) = match usage {
        ALL_SESSION => (summary.session_id?, [0; 4]),
        ALL_REALM => (summary.destination_realm?, [0; 4]),
        REALM_AND_APPLICATION => (summary.destination_realm?, application),
        ALL_APPLICATION => (b"", application),
        ALL_HOST => (summary.destination_host?, [0; 4]),
        ALL_USER if !user.is_empty() => (user, [0; 4]),
        _ => return None,
    };
    let mut bytes = [0; 264];
    let text = &text[..text.len().min(256)];
    bytes[0] = usage as u8;
    bytes[1..5].copy_from_slice(&number);
    bytes[5..5 + text.len()].copy_from_slice(text);
    if usage != ALL_SESSION {
        bytes[5..5 + text.len()].make_ascii_lowercase();
    }
    Some(stable_hash(&bytes[..5 + text.len()]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::Builder;

    #[test]
    fn hosts_are_read_out_of_uris() {
        assert_eq!(host(b"aaa://a.example.net:3868;transport=tcp"), Some(&b"a.example.net"[..]));
        assert_eq!(host(b"aaas://a.example.net"), Some(&b"a.example.net"[..]));
        for bad in ["", "aaa://", "sip:a", "a.example.net"] {
            assert_eq!(host(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn redirections_are_kept_by_their_usage_and_time() {
        let (now, mut kept) = (Instant::now(), Redirects::default());
        let request = |realm: &str, application: u32| {
            let mut bytes = Vec::new();
            Builder::request(&mut bytes, 316, application, 1, 1)
                .text(code::DESTINATION_REALM, realm)
                .finish();
            bytes
        };
        let find = |kept: &Redirects, now, bytes: &[u8]| {
            kept.find(now, &Header::read(bytes).expect("a header"), &Summary::of(bytes), b"")
        };
        let asked = request("a.example", 7);
        let (header, summary) = (Header::read(&asked).expect("a header"), Summary::of(&asked));
        let indication =
            Indication { usage: REALM_AND_APPLICATION, lasting: Duration::from_secs(9) };
        let keep = |kept: &mut Redirects, now, indication| {
            kept.keep(now, indication, (&header, &summary, b""), BackendId(3))
        };
        assert_eq!(keep(&mut kept, now, indication), Kept::Yes);
        assert_eq!(find(&kept, now, &request("A.example", 7)), Some(BackendId(3)));
        assert_eq!(find(&kept, now, &request("A.example", 8)), None);
        assert_eq!(find(&kept, now, &request("b.example", 7)), None);
        assert_eq!(find(&kept, now + Duration::from_secs(9), &asked), None);
        let never = Indication { usage: 0, lasting: Duration::from_secs(9) };
        assert_eq!(keep(&mut kept, now, never), Kept::No);
        // One that is over makes room, and only then.
        kept.kept.extend(
            (0..KEPT_MAX as u64).map(|key| (key, (BackendId(1), now + indication.lasting))),
        );
        assert_eq!(keep(&mut kept, now, indication), Kept::Full);
        assert_eq!(keep(&mut kept, now + indication.lasting, indication), Kept::Yes);
    }
}
