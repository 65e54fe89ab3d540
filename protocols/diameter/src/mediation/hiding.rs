//! Topology hiding: hosts behind the edge go by pseudonyms towards clients.
//!
//! A pseudonym is the host's name enciphered under a key, so that nothing need be remembered: any
//! node with the key turns it back, also after a restart. It is the same each time (clients compare
//! names), and one that was not made with the key turns back to nothing: a synthetic initial vector
//! in the manner of RFC 5297, with SipHash-2-4 as the keyed function.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use siphasher::sip::SipHasher24;
use std::hash::Hasher;
use strowger_contract::OptionsError;

use super::edit::{Editor, Step};
use crate::avp::{Header, Summary, code};

/// Bytes of the tag: one in 2^40 names that nobody made is taken for a pseudonym.
const TAG_BYTES: usize = 5;
/// A host name's longest.
const HOST_BYTES_MAX: usize = 255;
/// The longest that is hidden: longer ones would give no host name.
const HIDDEN_BYTES_MAX: usize = 120;
/// Letters of one label (RFC 1035 2.3.4).
const LABEL_MAX: usize = 60;
const MARK: &[u8] = b"h-";
const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// What is hidden from whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Hide {
    /// 32 hex digits, secret, the same at all nodes that stand in for each other.
    pub key: String,
    /// Hosts that are hidden: names, or `*.core.example.net` for all under one.
    pub hosts: Vec<String>,
    /// Clients that they are hidden from, written the same way; empty: all.
    #[serde(default)]
    pub from: Vec<String>,
}

/// Ready for work.
#[derive(Clone)]
pub struct Hiding {
    key: [u8; 16],
    hosts: Vec<String>,
    from: Vec<String>,
    /// What pseudonyms end with: a dot and our realm.
    suffix: String,
}

impl std::fmt::Debug for Hiding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hiding").field("hosts", &self.hosts).finish_non_exhaustive()
    }
}

const HOSTS: [Step; 3] = [
    Step { code: code::ORIGIN_HOST, vendor: 0, mandatory: true },
    Step { code: code::ROUTE_RECORD, vendor: 0, mandatory: true },
    Step { code: code::ERROR_REPORTING_HOST, vendor: 0, mandatory: false },
];
const DESTINATION: Step = Step { code: code::DESTINATION_HOST, vendor: 0, mandatory: true };

impl Hiding {
    /// Makes it ready; what is wrong is appended to `errors`, with paths below `place`.
    pub fn new(
        hide: &Hide,
        realm: &str,
        place: &str,
        errors: &mut Vec<OptionsError>,
    ) -> Option<Self> {
        let mut wrong = |path: &str, message: String| {
            errors.push(OptionsError { path: format!("{place}.{path}"), message });
        };
        let mut key = [0; 16];
        let pair = |at: usize| u8::from_str_radix(hide.key.get(at..at + 2)?, 16).ok();
        let digits: Option<Vec<u8>> = (0..hide.key.len()).step_by(2).map(pair).collect();
        match digits.filter(|digits| digits.len() == key.len()) {
            Some(digits) => key.copy_from_slice(&digits),
            // The key is not repeated: it is secret, right or wrong.
            None => wrong("key", "must be 32 hex digits (`openssl rand -hex 16`)".into()),
        }
        if hide.hosts.is_empty() {
            wrong("hosts", "is empty: name the hosts to hide, such as *.core.example.net".into());
        }
        let lower = |names: &[String]| names.iter().map(|name| name.to_ascii_lowercase()).collect();
        Some(Self {
            key,
            hosts: lower(&hide.hosts),
            from: lower(&hide.from),
            suffix: format!(".{}", realm.to_ascii_lowercase()),
        })
    }

    /// Whether hosts are hidden from this client.
    #[must_use]
    pub fn is_for(&self, client: &[u8]) -> bool {
        self.from.is_empty() || is_one(&self.from, client)
    }

    fn hash(&self, space: u8, counter: u8, bytes: &[u8]) -> u64 {
        let mut hasher = SipHasher24::new_with_key(&self.key);
        hasher.write(&[space, counter]);
        hasher.write(bytes);
        hasher.finish()
    }

    fn tag(&self, host: &[u8]) -> [u8; TAG_BYTES] {
        let hash = self.hash(1, 0, host).to_be_bytes();
        [hash[0], hash[1], hash[2], hash[3], hash[4]]
    }

    fn cipher(&self, tag: [u8; TAG_BYTES], text: &mut [u8]) {
        for (counter, part) in text.chunks_mut(8).enumerate() {
            let stream = self.hash(2, counter as u8, &tag).to_be_bytes();
            part.iter_mut().zip(stream).for_each(|(byte, key)| *byte ^= key);
        }
    }

    /// Appends a host's pseudonym; `false` if it is none that is hidden.
    pub fn hide(&self, host: &[u8], out: &mut Vec<u8>) -> bool {
        if host.len() > HIDDEN_BYTES_MAX || !is_one(&self.hosts, host) {
            return false;
        }
        let mut bytes = [0; TAG_BYTES + HIDDEN_BYTES_MAX];
        let bytes = &mut bytes[..TAG_BYTES + host.len()];
        let (front, text) = bytes.split_at_mut(TAG_BYTES);
        // Names are the same in any case of letters, and so are their pseudonyms.
        text.copy_from_slice(host);
        text.make_ascii_lowercase();
        let tag = self.tag(text);
        front.copy_from_slice(&tag);
        self.cipher(tag, text);
        let start = out.len();
        out.extend_from_slice(MARK);
        let (mut bits, mut held, mut label) = (0u32, 0, MARK.len());
        let mut letter = |five: u32, out: &mut Vec<u8>| {
            if label == LABEL_MAX {
                out.push(b'.');
                label = 0;
            }
            out.push(LETTERS[(five & 31) as usize]);
            label += 1;
        };
        for byte in bytes {
            bits = bits << 8 | u32::from(*byte);
            held += 8;
            while held >= 5 {
                held -= 5;
                letter(bits >> held, out);
            }
        }
        if held > 0 {
            letter(bits << (5 - held), out);
        }
        out.extend_from_slice(self.suffix.as_bytes());
        if out.len() - start > HOST_BYTES_MAX {
            out.truncate(start);
            return false;
        }
        true
    }

    /// Appends the host of a pseudonym; `false` if it is none of ours.
    pub fn reveal(&self, name: &[u8], out: &mut Vec<u8>) -> bool {
        let body = name.len().checked_sub(self.suffix.len()).and_then(|end| {
            let (body, suffix) = name.split_at(end);
            suffix.eq_ignore_ascii_case(self.suffix.as_bytes()).then_some(body)
        });
        let body = body.and_then(|body| body.split_at_checked(MARK.len()));
        let Some((_, body)) = body.filter(|(mark, _)| mark.eq_ignore_ascii_case(MARK)) else {
            return false;
        };
        let start = out.len();
        let (mut bits, mut held) = (0u32, 0);
        for letter in body.iter().filter(|letter| **letter != b'.') {
            let letter = letter.to_ascii_lowercase();
            let Some(five) = LETTERS.iter().position(|known| *known == letter) else {
                out.truncate(start);
                return false;
            };
            bits = bits << 5 | five as u32;
            held += 5;
            if held >= 8 {
                held -= 8;
                out.push((bits >> held) as u8);
            }
        }
        let made = &mut out[start..];
        if made.len() <= TAG_BYTES || made.len() > TAG_BYTES + HIDDEN_BYTES_MAX {
            out.truncate(start);
            return false;
        }
        let (front, text) = made.split_at_mut(TAG_BYTES);
        let tag = [front[0], front[1], front[2], front[3], front[4]];
        self.cipher(tag, text);
        if self.tag(text) != tag {
            out.truncate(start);
            return false;
        }
        out.copy_within(start + TAG_BYTES.., start);
        out.truncate(out.len() - TAG_BYTES);
        true
    }

    /// Hides the hosts in the message that starts at `start`, on its way to a client.
    pub fn hide_in(&self, out: &mut Vec<u8>, start: usize, scratch: &mut Vec<u8>) {
        let mut editor = Editor::new(out, start);
        for step in HOSTS {
            editor.change_each(step, scratch, |host, new| self.hide(host, new));
        }
    }

    /// A client's request with its Destination-Host restored, if that is a pseudonym of ours.
    pub fn reveal_in(&self, request: &[u8], out: &mut Vec<u8>, scratch: &mut Vec<u8>) -> bool {
        let Some(host) = Summary::of(request).destination_host else { return false };
        scratch.clear();
        if Header::read(request).is_none() || !self.reveal(host, scratch) {
            return false;
        }
        let start = out.len();
        out.extend_from_slice(request);
        Editor::new(out, start)
            .change_each(DESTINATION, scratch, |host, new| self.reveal(host, new));
        true
    }
}

/// Whether a host is one of these names, or below one that starts with `*.`.
fn is_one(names: &[String], host: &[u8]) -> bool {
    names.iter().any(|name| match name.strip_prefix('*') {
        Some(end) => host
            .len()
            .checked_sub(end.len())
            .is_some_and(|at| at > 0 && host[at..].eq_ignore_ascii_case(end.as_bytes())),
        None => host.eq_ignore_ascii_case(name.as_bytes()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::Builder;
    use proptest::prelude::*;

    fn hiding(key: &str) -> Hiding {
        let hide = Hide { key: key.into(), hosts: vec!["*.core.example".into()], from: Vec::new() };
        let mut errors = Vec::new();
        let made = Hiding::new(&hide, "example.net", "hide", &mut errors).expect("made");
        assert_eq!(errors, []);
        made
    }

    const KEY: &str = "000102030405060708090a0b0c0d0e0f";

    #[test]
    fn a_message_is_hidden_and_its_successor_finds_back() {
        let hiding = hiding(KEY);
        let (mut answer, mut scratch) = (vec![1, 2, 3], Vec::new());
        Builder::new(&mut answer, 0x40, 272, 4, 1, 2)
            .text(263, "a;1;2")
            .text(264, "PCRF-1.core.example")
            .text(282, "relay.core.example")
            .text(282, "other.example")
            .text(296, "example")
            .finish();
        hiding.hide_in(&mut answer, 3, &mut scratch);
        let told = Summary::of(&answer[3..]);
        assert_eq!(told.broken, None);
        assert!(!answer.windows(4).any(|part| part == b"core"));
        assert!(answer.windows(13).any(|part| part == b"other.example"));
        let host = String::from_utf8(told.origin_host.expect("a host").to_vec()).expect("text");
        assert!(host.starts_with("h-") && host.ends_with(".example.net"), "{host}");
        let (mut request, mut restored) = (Vec::new(), Vec::new());
        Builder::request(&mut request, 272, 4, 1, 2).text(263, "a;1;2").text(293, &host).finish();
        assert!(hiding.reveal_in(&request, &mut restored, &mut scratch));
        let told = Summary::of(&restored);
        assert_eq!(told.destination_host, Some(b"pcrf-1.core.example".as_slice()));
        assert_eq!(restored.len(), crate::avp::number24(&restored, 1).expect("a length") as usize);
    }

    #[test]
    fn keys_and_names_are_checked() {
        let hide = Hide { key: "xyz".into(), hosts: Vec::new(), from: Vec::new() };
        let mut errors = Vec::new();
        let _made = Hiding::new(&hide, "example.net", "hide", &mut errors);
        let paths: Vec<&str> = errors.iter().map(|error| error.path.as_str()).collect();
        assert_eq!(paths, ["hide.key", "hide.hosts"]);
    }

    proptest! {
        #[test]
        fn pseudonyms_turn_back(host in "[a-z0-9-]{1,100}", other in "[ -~]{0,80}") {
            let (hiding, stranger) = (hiding(KEY), hiding("ff0102030405060708090a0b0c0d0e0f"));
            let name = format!("{host}.core.example");
            let (mut hidden, mut back) = (Vec::new(), Vec::new());
            if hiding.hide(name.as_bytes(), &mut hidden) {
                prop_assert!(hidden.len() <= HOST_BYTES_MAX);
                prop_assert!(hidden.split(|byte| *byte == b'.').all(|label| label.len() <= 63));
                prop_assert!(hiding.reveal(&hidden.to_ascii_uppercase(), &mut back));
                back.clear();
                prop_assert!(hiding.reveal(&hidden, &mut back));
                prop_assert_eq!(&back, name.as_bytes());
                prop_assert!(!stranger.reveal(&hidden, &mut back));
            } else {
                prop_assert!(name.len() > HIDDEN_BYTES_MAX || hidden.is_empty());
            }
            let invented = format!("h-{other}.example.net");
            prop_assert!(!hiding.reveal(invented.as_bytes(), &mut back));
        }
    }
}
