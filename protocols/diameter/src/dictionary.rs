//! Names: applications, commands and AVPs, from text files in a compact format of our own.
//!
//! ```text
//! # a comment to the end of the line
//! vendor 3gpp 10415
//! application gx 16777238 other-name …
//! command 272 CC Credit-Control
//! vendor-of-avps 3gpp            # for the avp lines after it; `ietf` at the file's start
//! avp 416 CC-Request-Type Enumerated M = 1:INITIAL_REQUEST 2:UPDATE_REQUEST
//! avp 443 Subscription-Id Grouped M { Subscription-Id-Type Subscription-Id-Data }
//! ```
//!
//! The relay needs none of it: what is not in the dictionary passes untouched.

use std::collections::HashMap;
use std::sync::OnceLock;

/// Definitions of one dictionary, at most: 3GPP's have about 3,000.
const DEFINITIONS_MAX: usize = 100_000;

const BUILT_IN: [(&str, &str); 3] = [
    ("base.dict", include_str!("../dictionary/base.dict")),
    ("credit-control.dict", include_str!("../dictionary/credit-control.dict")),
    ("3gpp.dict", include_str!("../dictionary/3gpp.dict")),
];

/// What an AVP's data is (RFC 6733 4.2, 4.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Kind {
    OctetString,
    Utf8String,
    Integer32,
    Integer64,
    Unsigned32,
    Unsigned64,
    Float32,
    Float64,
    Address,
    Time,
    DiameterIdentity,
    DiameterUri,
    Enumerated,
    Grouped,
    IpFilterRule,
    QosFilterRule,
}

const KINDS: [(&str, Kind); 16] = [
    ("OctetString", Kind::OctetString),
    ("UTF8String", Kind::Utf8String),
    ("Integer32", Kind::Integer32),
    ("Integer64", Kind::Integer64),
    ("Unsigned32", Kind::Unsigned32),
    ("Unsigned64", Kind::Unsigned64),
    ("Float32", Kind::Float32),
    ("Float64", Kind::Float64),
    ("Address", Kind::Address),
    ("Time", Kind::Time),
    ("DiameterIdentity", Kind::DiameterIdentity),
    ("DiameterURI", Kind::DiameterUri),
    ("Enumerated", Kind::Enumerated),
    ("Grouped", Kind::Grouped),
    ("IPFilterRule", Kind::IpFilterRule),
    ("QoSFilterRule", Kind::QosFilterRule),
];

impl Kind {
    /// Its name in the RFCs.
    #[must_use]
    pub fn name(self) -> &'static str {
        KINDS.iter().find(|(_, kind)| *kind == self).map_or("", |(name, _)| name)
    }
}

/// An AVP's definition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AvpDefinition {
    /// Its code.
    pub code: u32,
    /// Its vendor, 0 for none.
    pub vendor: u32,
    /// Its name.
    pub name: String,
    /// What its data is.
    pub kind: Kind,
    /// Whether the M flag is set when we make one.
    pub mandatory: bool,
    /// Names of values.
    pub values: Vec<(u32, String)>,
    /// Names of members; empty: any.
    pub members: Vec<String>,
}

impl AvpDefinition {
    /// The name of a value.
    #[must_use]
    pub fn value_name(&self, value: u32) -> Option<&str> {
        self.values.iter().find(|(number, _)| *number == value).map(|(_, name)| name.as_str())
    }

    /// The value of a name, in any case.
    #[must_use]
    pub fn value_of(&self, name: &str) -> Option<u32> {
        let known = self.values.iter().find(|(_, known)| known.eq_ignore_ascii_case(name));
        known.map(|(number, _)| *number)
    }
}

/// A line that says nothing that can be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {message}")]
pub struct DictionaryError {
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// What is wrong, and what was expected.
    pub message: String,
}

/// Applications, commands and AVPs.
#[derive(Clone, Debug, Default)]
pub struct Dictionary {
    vendors: Vec<(String, u32)>,
    /// Several names may mean one number.
    applications: Vec<(String, u32)>,
    /// Code, short name without R or A, long name. Short names repeat: SNR is one of Sh and of Sy.
    commands: Vec<(u32, String, String)>,
    avps: HashMap<(u32, u32), AvpDefinition>,
    names: HashMap<String, (u32, u32)>,
}

impl Dictionary {
    /// RFC 6733, 8506 and the 3GPP applications.
    #[must_use]
    pub fn built_in() -> &'static Self {
        static BUILT: OnceLock<Dictionary> = OnceLock::new();
        BUILT.get_or_init(|| {
            let mut dictionary = Self::default();
            for (_, text) in BUILT_IN {
                // Tested: there are no errors in these.
                let _none = dictionary.read(text);
            }
            dictionary
        })
    }

    /// The built-in one with a file's definitions added; they replace those of the same code.
    ///
    /// # Errors
    /// All lines that cannot be understood.
    pub fn extended(text: &str) -> Result<Self, Vec<DictionaryError>> {
        let mut dictionary = Self::built_in().clone();
        dictionary.read(text)?;
        Ok(dictionary)
    }

    fn read(&mut self, text: &str) -> Result<(), Vec<DictionaryError>> {
        let (mut errors, mut vendor, mut groups) = (Vec::new(), 0, Vec::new());
        for (index, line) in text.lines().enumerate() {
            let words = Words::of(index + 1, line);
            if words.list.is_empty() {
                continue;
            }
            if let Err(error) = self.read_line(&words, &mut vendor, &mut groups) {
                errors.push(error);
            }
        }
        // A group may come before its members.
        for (place, name) in groups {
            if !self.names.contains_key(&name.to_ascii_lowercase()) {
                errors.push(DictionaryError {
                    message: format!("there is no AVP `{name}`"),
                    ..place
                });
            }
        }
        errors.sort_by_key(|error| (error.line, error.column));
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    fn read_line(
        &mut self,
        words: &Words<'_>,
        vendor: &mut u32,
        groups: &mut Vec<(DictionaryError, String)>,
    ) -> Result<(), DictionaryError> {
        if self.avps.len() + self.commands.len() + self.applications.len() > DEFINITIONS_MAX {
            return Err(words.error(0, format!("more than {DEFINITIONS_MAX} definitions")));
        }
        match words.text(0)? {
            "vendor" => {
                let number = words.number(2)?;
                self.vendors.push((words.text(1)?.to_owned(), number));
            }
            "vendor-of-avps" => {
                let name = words.text(1)?;
                let known = self.vendors.iter().find(|(known, _)| known == name);
                *vendor = known.map(|(_, number)| *number).ok_or_else(|| {
                    words.error(1, format!("no `vendor {name} NUMBER` before it"))
                })?;
            }
            "application" => {
                let number = words.number(2)?;
                let others = words.list.iter().skip(3).map(|(_, name)| *name);
                for name in std::iter::once(words.text(1)?).chain(others) {
                    self.applications.push((name.to_owned(), number));
                }
            }
            "command" => {
                let code = words.number(1)?;
                if code > 0x00ff_ffff {
                    return Err(words.error(1, "command codes have 24 bits".into()));
                }
                let (short, long) = (words.text(2)?.to_owned(), words.text(3)?.to_owned());
                self.commands.push((code, short, long));
            }
            "avp" => {
                let avp = words.avp(*vendor, groups)?;
                let key = (avp.vendor, avp.code);
                if let Some(old) = self.avps.insert(key, avp.clone()) {
                    self.names.remove(&old.name.to_ascii_lowercase());
                }
                self.names.insert(avp.name.to_ascii_lowercase(), key);
            }
            other => {
                return Err(words.error(
                    0,
                    format!(
                        "`{other}` is none of vendor, vendor-of-avps, application, command, avp"
                    ),
                ));
            }
        }
        Ok(())
    }

    /// An AVP by its number.
    #[must_use]
    pub fn avp(&self, vendor: u32, code: u32) -> Option<&AvpDefinition> {
        self.avps.get(&(vendor, code))
    }

    /// An AVP by its name in any case, or by `CODE` or `VENDOR:CODE`.
    #[must_use]
    pub fn avp_named(&self, name: &str) -> Option<&AvpDefinition> {
        if let Some(key) = self.names.get(&name.to_ascii_lowercase()) {
            return self.avps.get(key);
        }
        let (vendor, code) = name.split_once(':').unwrap_or(("0", name));
        self.avp(vendor.parse().ok()?, code.parse().ok()?)
    }

    /// All AVPs, in no order.
    pub fn avps(&self) -> impl Iterator<Item = &AvpDefinition> {
        self.avps.values()
    }

    /// The AVP's name nearest to a wrong one, for "did you mean".
    #[must_use]
    pub fn near(&self, name: &str) -> Option<&str> {
        nearest(name, self.avps.values().map(|avp| avp.name.as_str()))
    }

    /// The application's name nearest to a wrong one.
    #[must_use]
    pub fn near_application(&self, name: &str) -> Option<&str> {
        nearest(name, self.application_names())
    }

    /// The command's name nearest to a wrong one, long or short.
    #[must_use]
    pub fn near_command(&self, name: &str) -> Option<String> {
        let long = nearest(name, self.commands.iter().map(|(.., long)| long.as_str()));
        let short: Vec<String> =
            self.commands.iter().map(|(_, short, _)| format!("{short}R")).collect();
        let short = || nearest(name, short.iter().map(String::as_str));
        long.or_else(short).map(str::to_owned)
    }

    /// An application's number.
    #[must_use]
    pub fn application(&self, name: &str) -> Option<u32> {
        let known = self.applications.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        known.map(|(_, number)| *number)
    }

    /// An application's first name.
    #[must_use]
    pub fn application_name(&self, number: u32) -> Option<&str> {
        let known = self.applications.iter().find(|(_, known)| *known == number);
        known.map(|(name, _)| name.as_str())
    }

    /// The names of all applications, in the order of their files.
    pub fn application_names(&self) -> impl Iterator<Item = &str> {
        self.applications.iter().map(|(name, _)| name.as_str())
    }

    /// The command codes of a name: `CCR`, `CCA`, `CC` or `Credit-Control`, in any case. More than
    /// one where applications share a name (SNR).
    #[must_use]
    pub fn commands(&self, name: &str) -> Vec<u32> {
        let is = |short: &str, long: &str| {
            let bare = name.get(..name.len().saturating_sub(1)).unwrap_or_default();
            let ends = name.ends_with(['r', 'R', 'a', 'A']);
            long.eq_ignore_ascii_case(name)
                || short.eq_ignore_ascii_case(name)
                || (ends && short.eq_ignore_ascii_case(bare))
        };
        let found = self.commands.iter().filter(|(_, short, long)| is(short, long));
        found.map(|(code, ..)| *code).collect()
    }

    /// A command's name without its -Request or -Answer.
    #[must_use]
    pub fn command_name(&self, code: u32) -> Option<&str> {
        let known = self.commands.iter().find(|(known, ..)| *known == code);
        known.map(|(.., long)| long.as_str())
    }

    /// A command's short name: `CCR` or `CCA`.
    #[must_use]
    pub fn command_short(&self, code: u32, request: bool) -> Option<String> {
        let known = self.commands.iter().find(|(known, ..)| *known == code)?;
        Some(format!("{}{}", known.1, if request { 'R' } else { 'A' }))
    }

    /// A vendor's name.
    #[must_use]
    pub fn vendor_name(&self, number: u32) -> Option<&str> {
        let known = self.vendors.iter().find(|(_, known)| *known == number);
        known.map(|(name, _)| name.as_str())
    }
}

/// The one of `known` that is most like a wrong name: all but a few letters are the same from the
/// front and from the back.
fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let wanted = name.to_ascii_lowercase();
    let distance = |known: &str| {
        let known = known.to_ascii_lowercase();
        let longest = wanted.len().max(known.len());
        let pairs = wanted.bytes().zip(known.bytes()).take_while(|(one, other)| one == other);
        let behind = wanted.bytes().rev().zip(known.bytes().rev());
        let same = pairs.count() + behind.take_while(|(one, other)| one == other).count();
        (longest.saturating_sub(same), longest)
    };
    let best = known.map(|known| (distance(known), known)).min()?;
    // Of a short name one letter may be wrong, of a long one three.
    let ((wrong, longest), name) = best;
    (wrong <= 3.min(longest / 3)).then_some(name)
}

/// A line's words with their columns.
struct Words<'a> {
    line: usize,
    list: Vec<(usize, &'a str)>,
    end: usize,
}

impl<'a> Words<'a> {
    fn of(line: usize, text: &'a str) -> Self {
        let text = text.split('#').next().unwrap_or_default();
        let place = |word: &'a str| {
            let offset = word.as_ptr().addr() - text.as_ptr().addr();
            text[..offset].chars().count() + 1
        };
        let list = text.split_whitespace().map(|word| (place(word), word)).collect();
        Self { line, list, end: text.chars().count() + 1 }
    }

    fn error(&self, index: usize, message: String) -> DictionaryError {
        let column = self.list.get(index).map_or(self.end, |(column, _)| *column);
        DictionaryError { line: self.line, column, message }
    }

    fn text(&self, index: usize) -> Result<&'a str, DictionaryError> {
        let word = self.list.get(index).map(|(_, word)| *word);
        word.ok_or_else(|| self.error(index, "something is missing here".into()))
    }

    fn number(&self, index: usize) -> Result<u32, DictionaryError> {
        let text = self.text(index)?;
        text.parse().map_err(|_| self.error(index, format!("`{text}` is no number of 32 bits")))
    }

    fn avp(
        &self,
        vendor: u32,
        groups: &mut Vec<(DictionaryError, String)>,
    ) -> Result<AvpDefinition, DictionaryError> {
        let (code, name, kind) = (self.number(1)?, self.text(2)?, self.text(3)?);
        let known = KINDS.iter().find(|(known, _)| *known == kind);
        let kind = known.map(|(_, kind)| *kind).ok_or_else(|| {
            let names: Vec<&str> = KINDS.iter().map(|(name, _)| *name).collect();
            self.error(3, format!("`{kind}` is none of {}", names.join(", ")))
        })?;
        let mandatory = match self.text(4)? {
            "M" => true,
            "-" => false,
            other => return Err(self.error(4, format!("`{other}` is neither `M` nor `-`"))),
        };
        let mut avp = AvpDefinition {
            code,
            vendor,
            name: name.to_owned(),
            kind,
            mandatory,
            values: Vec::new(),
            members: Vec::new(),
        };
        match self.list.get(5).map(|(_, word)| *word) {
            None => {}
            Some("=") => {
                for index in 6..self.list.len() {
                    let word = self.text(index)?;
                    let value = word
                        .split_once(':')
                        .and_then(|(number, name)| Some((number.parse().ok()?, name.to_owned())));
                    let wrong = || self.error(index, format!("`{word}` is no NUMBER:NAME"));
                    avp.values.push(value.ok_or_else(wrong)?);
                }
            }
            Some("{") if kind == Kind::Grouped => {
                let last = self.list.len() - 1;
                if self.text(last)? != "}" {
                    return Err(self.error(last + 1, "`}` is missing".into()));
                }
                for index in 6..last {
                    let name = self.text(index)?;
                    groups.push((self.error(index, String::new()), name.to_owned()));
                    avp.members.push(name.to_owned());
                }
            }
            Some(other) => {
                let what = format!(
                    "`{other}`: expected `=` and values, or `{{` members `}}` of a Grouped AVP"
                );
                return Err(self.error(5, what));
            }
        }
        Ok(avp)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_built_in_files_are_right() {
        let mut dictionary = Dictionary::default();
        for (name, text) in BUILT_IN {
            assert_eq!(dictionary.read(text), Ok(()), "{name}");
        }
        // No name is taken twice: each AVP is found by its own.
        for avp in dictionary.avps() {
            assert_eq!(dictionary.avp_named(&avp.name), Some(avp), "{}", avp.name);
        }
    }

    #[test]
    fn names_are_found() {
        let dictionary = Dictionary::built_in();
        assert_eq!(dictionary.application("GX"), Some(16_777_238));
        assert_eq!(dictionary.application("s6d"), Some(16_777_251));
        assert_eq!(dictionary.commands("ccr"), [272]);
        assert_eq!(dictionary.commands("Credit-Control"), [272]);
        assert_eq!(dictionary.commands("SNR"), [308, 8_388_636]);
        assert_eq!(dictionary.command_short(316, true).as_deref(), Some("ULR"));
        let kind = dictionary.avp_named("cc-request-type").expect("there");
        assert_eq!((kind.code, kind.value_of("initial_request")), (416, Some(1)));
        assert_eq!(dictionary.avp_named("10415:1").map(|avp| avp.name.as_str()), Some("3GPP-IMSI"));
        assert_eq!(dictionary.near("Subscripton-Id"), Some("Subscription-Id"));
    }

    #[test]
    fn a_file_adds_and_is_told_its_errors() {
        let text = "vendor acme 9999\nvendor-of-avps acme\navp 7 Acme-Thing Grouped - { Acme-Part }\navp 8 Acme-Part UTF8String M\napplication acme-x 99\n";
        let dictionary = Dictionary::extended(text).expect("right");
        assert_eq!(dictionary.avp_named("Acme-Part").map(|avp| avp.vendor), Some(9_999));
        assert!(dictionary.avp_named("Session-Id").is_some());
        let wrong = "avp x Name UTF8String M\navp 1 Name Text M\nthing\navp 9 G Grouped M { Nobody }\navp 3 N Enumerated M = one\nvendor-of-avps nobody\n";
        let errors = Dictionary::extended(wrong).expect_err("wrong");
        let told: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(told[0], "line 1, column 5: `x` is no number of 32 bits");
        assert!(told[1].starts_with("line 2, column 12: `Text` is none of OctetString"));
        assert!(told[2].starts_with("line 3, column 1: `thing` is none of"));
        assert_eq!(told[3], "line 4, column 21: there is no AVP `Nobody`");
        assert_eq!(told[4], "line 5, column 24: `one` is no NUMBER:NAME");
        assert!(told[5].starts_with("line 6, column 16: no `vendor nobody NUMBER` before it"));
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in "[ -~\\n{}=:éß]{0,300}") {
            let _result = Dictionary::extended(&text);
        }
    }
}
