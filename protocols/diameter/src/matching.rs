//! What routes match: base-protocol fields, subscribers, and any AVP.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::avp::{Avp, Avps, Header, Summary};
use crate::dictionary::Dictionary;
use crate::mediation::Rule;
use crate::mediation::rules::{Value, encode, is_text};
use crate::naming;
use crate::options::Application;
use crate::subscriber::Subscriber;

/// Groups within groups that a path may go down.
const DEPTH_MAX: usize = 4;

/// What a route matches. All that is given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DiameterMatch {
    /// One of these applications.
    pub application: Vec<Application>,
    /// The Destination-Realm; `*.example.net` for all under a name.
    pub realm: Option<String>,
    /// The Destination-Host, likewise.
    pub destination_host: Option<String>,
    /// One of these commands: `CCR`, `Credit-Control`, or the code.
    pub command: Vec<Value>,
    /// The Origin-Host, likewise.
    pub origin_host: Option<String>,
    /// The Origin-Realm, likewise.
    pub origin_realm: Option<String>,
    /// The IMSI (Subscription-Id, else User-Name): `00101*` or `001010000000000-001010000999999`.
    pub imsi: Vec<String>,
    /// The MSISDN (Subscription-Id), likewise.
    pub msisdn: Vec<String>,
    /// Any AVPs; all must hold.
    pub avp: Vec<AvpMatch>,
    /// Changes to what takes this route, after the listener's own. A key of the route, not of its
    /// `match`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
}

/// An AVP and what it must be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AvpMatch {
    /// Names or codes from the top down, vendors before a colon:
    /// `Subscription-Id.Subscription-Id-Data`, `443/444`, `10415:1032`.
    pub path: String,
    /// It is one of these, as its type is written: texts, numbers, names of enumerated values.
    pub is: Vec<Value>,
    /// Its text begins so.
    pub prefix: Option<String>,
}

impl DiameterMatch {
    /// What is wrong, by paths under the match.
    pub(crate) fn check(&self, dictionary: &Dictionary) -> Vec<(String, String)> {
        let mut wrong = Vec::new();
        for (index, application) in self.application.iter().enumerate() {
            if let Err(message) = naming::application(dictionary, application) {
                wrong.push((format!("application[{index}]"), message));
            }
        }
        for (index, command) in self.command.iter().enumerate() {
            if let Err(message) = naming::commands(dictionary, command) {
                wrong.push((format!("command[{index}]"), message));
            }
        }
        for (key, list) in [("imsi", &self.imsi), ("msisdn", &self.msisdn)] {
            for (index, text) in list.iter().enumerate() {
                if Digits::read(text).is_none() {
                    let message = format!(
                        "`{text}` is neither digits, nor a prefix such as `00101*`, nor a range of equal lengths such as `00101000-00101999`"
                    );
                    wrong.push((format!("{key}[{index}]"), message));
                }
            }
        }
        for (index, avp) in self.avp.iter().enumerate() {
            if let Err((key, message)) = Wanted::read(avp, dictionary) {
                wrong.push((format!("avp[{index}].{key}"), message));
            }
        }
        wrong
    }
}

/// Digits to compare with.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Digits {
    Exactly(Box<[u8]>),
    Prefix(Box<[u8]>),
    Range(Box<[u8]>, Box<[u8]>),
}

impl Digits {
    fn read(text: &str) -> Option<Self> {
        let digits = |text: &str| {
            let good = !text.is_empty() && text.len() <= 20;
            (good && text.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.as_bytes().into())
        };
        if let Some(prefix) = text.strip_suffix('*') {
            return Some(Self::Prefix(digits(prefix)?));
        }
        let Some((low, high)) = text.split_once('-') else {
            return Some(Self::Exactly(digits(text)?));
        };
        let (low, high): (Box<[u8]>, Box<[u8]>) = (digits(low)?, digits(high)?);
        (low.len() == high.len() && low <= high).then_some(Self::Range(low, high))
    }

    fn matches(&self, found: &[u8]) -> bool {
        match self {
            Self::Exactly(wanted) => **wanted == *found,
            Self::Prefix(wanted) => found.starts_with(wanted),
            // Of one length, digits compare as numbers do.
            Self::Range(low, high) => {
                found.len() == low.len() && (&**low..=&**high).contains(&found)
            }
        }
    }
}

/// What an AVP must be, ready for messages.
#[derive(Clone, Debug)]
struct Wanted {
    path: Vec<(u32, u32)>,
    /// One of these, if any.
    is: Vec<Is>,
    prefix: Option<Vec<u8>>,
}

#[derive(Clone, Debug)]
enum Is {
    Data(Vec<u8>),
    /// Of an AVP that the dictionary does not know: its text, or its number of four bytes.
    Either(Vec<u8>, Option<u32>),
}

impl Wanted {
    /// Reads what the configuration says; on errors the key that is wrong, and why.
    fn read(avp: &AvpMatch, dictionary: &Dictionary) -> Result<Self, (String, String)> {
        let (steps, known) = naming::path(dictionary, &avp.path, DEPTH_MAX)
            .map_err(|message| ("path".to_owned(), message))?;
        let mut is = Vec::new();
        for (index, value) in avp.is.iter().enumerate() {
            is.push(match known {
                Some(known) => Is::Data(
                    encode(known, value).map_err(|message| (format!("is[{index}]"), message))?,
                ),
                None => {
                    let text = value.to_string();
                    let number = text.parse().ok();
                    Is::Either(text.into_bytes(), number)
                }
            });
        }
        let prefix = avp.prefix.as_ref().map(|prefix| prefix.as_bytes().to_vec());
        if let Some(known) = known.filter(|known| prefix.is_some() && !is_text(known.kind)) {
            let message = format!("{} is a {}, which has no prefix", known.name, known.kind.name());
            return Err(("prefix".to_owned(), message));
        }
        let path = steps.iter().map(|step| (step.vendor, step.code)).collect();
        Ok(Self { path, is, prefix })
    }

    fn is_in(&self, avps: Avps<'_>, path: &[(u32, u32)]) -> bool {
        let Some((&(vendor, code), rest)) = path.split_first() else { return false };
        let mut named =
            avps.map_while(Result::ok).filter(|avp| avp.code == code && avp.vendor == vendor);
        if rest.is_empty() {
            return named.any(|avp| self.holds(&avp));
        }
        named.any(|avp| self.is_in(Avps::within(avp.data), rest))
    }

    fn holds(&self, avp: &Avp<'_>) -> bool {
        let is = |wanted: &Is| match wanted {
            Is::Data(wanted) => wanted == avp.data,
            Is::Either(text, number) => {
                text == avp.data || number.is_some_and(|number| avp.number() == Some(number))
            }
        };
        let begins = self.prefix.as_ref().is_none_or(|prefix| avp.data.starts_with(prefix));
        begins && (self.is.is_empty() || self.is.iter().any(is))
    }
}

/// A match, ready for messages.
#[derive(Clone, Debug, Default)]
pub(crate) struct Matcher {
    applications: Vec<u32>,
    commands: Vec<u32>,
    realm: Option<Name>,
    host: Option<Name>,
    origin_host: Option<Name>,
    origin_realm: Option<Name>,
    imsi: Vec<Digits>,
    msisdn: Vec<Digits>,
    avps: Vec<Wanted>,
}

/// A host or realm, or all under it.
#[derive(Clone, Debug)]
pub(crate) struct Name {
    text: Box<[u8]>,
    all_under: bool,
}

impl Name {
    pub(crate) fn new(text: &str) -> Self {
        match text.strip_prefix("*.") {
            Some(rest) => Self { text: rest.as_bytes().into(), all_under: true },
            None => Self { text: text.as_bytes().into(), all_under: false },
        }
    }

    pub(crate) fn matches(&self, found: &[u8]) -> bool {
        if !self.all_under {
            return found.eq_ignore_ascii_case(&self.text);
        }
        let Some(dot) = found.len().checked_sub(self.text.len() + 1) else { return false };
        found[dot] == b'.' && found[dot + 1..].eq_ignore_ascii_case(&self.text)
    }
}

impl Matcher {
    pub(crate) fn new(wanted: &DiameterMatch, dictionary: &Dictionary) -> Self {
        let name = |text: &Option<String>| text.as_deref().map(Name::new);
        let digits = |list: &[String]| list.iter().filter_map(|text| Digits::read(text)).collect();
        Self {
            applications: naming::applications(dictionary, &wanted.application),
            commands: wanted
                .command
                .iter()
                .filter_map(|command| naming::commands(dictionary, command).ok())
                .flatten()
                .collect(),
            realm: name(&wanted.realm),
            host: name(&wanted.destination_host),
            origin_host: name(&wanted.origin_host),
            origin_realm: name(&wanted.origin_realm),
            imsi: digits(&wanted.imsi),
            msisdn: digits(&wanted.msisdn),
            avps: wanted.avp.iter().filter_map(|avp| Wanted::read(avp, dictionary).ok()).collect(),
        }
    }

    pub(crate) fn matches(&self, header: &Header, summary: &Summary<'_>, bytes: &[u8]) -> bool {
        let is = |wanted: &Option<Name>, found: Option<&[u8]>| {
            wanted.as_ref().is_none_or(|wanted| found.is_some_and(|found| wanted.matches(found)))
        };
        (self.applications.is_empty() || self.applications.contains(&header.application))
            && (self.commands.is_empty() || self.commands.contains(&header.command))
            && is(&self.realm, summary.destination_realm)
            && is(&self.host, summary.destination_host)
            && is(&self.origin_host, summary.origin_host)
            && is(&self.origin_realm, summary.origin_realm)
            && self.matches_subscriber(bytes)
            && self.avps.iter().all(|wanted| wanted.is_in(Avps::of(bytes), &wanted.path))
    }

    /// Whether it would take the application if it were for another realm.
    pub(crate) fn is_for_other_realm(&self, header: &Header, summary: &Summary<'_>) -> bool {
        let found = summary.destination_realm.unwrap_or_default();
        (self.applications.is_empty() || self.applications.contains(&header.application))
            && self.realm.as_ref().is_some_and(|wanted| !wanted.matches(found))
    }

    fn matches_subscriber(&self, bytes: &[u8]) -> bool {
        if self.imsi.is_empty() && self.msisdn.is_empty() {
            return true;
        }
        let subscriber = Subscriber::of(bytes);
        let is = |wanted: &[Digits], found: Option<&[u8]>| {
            wanted.is_empty()
                || found.is_some_and(|found| wanted.iter().any(|wanted| wanted.matches(found)))
        };
        is(&self.imsi, subscriber.imsi) && is(&self.msisdn, subscriber.msisdn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::avp::code;
    use crate::build::{Builder, append};

    fn message(imsi: &str, realm: &str) -> Vec<u8> {
        let mut group = Vec::new();
        append(&mut group, 450, 0x40, &1u32.to_be_bytes());
        append(&mut group, 444, 0x40, imsi.as_bytes());
        let mut bytes = Vec::new();
        Builder::request(&mut bytes, 272, 16_777_238, 1, 1)
            .text(code::ORIGIN_HOST, "gw.a.example.net")
            .text(code::DESTINATION_REALM, realm)
            .bytes(443, &group)
            .number(416, 1)
            .finish();
        bytes
    }

    fn matches(wanted: &DiameterMatch, bytes: &[u8]) -> bool {
        let header = Header::read(bytes).expect("a header");
        Matcher::new(wanted, Dictionary::built_in()).matches(&header, &Summary::of(bytes), bytes)
    }

    #[test]
    fn subscribers_match_by_prefix_and_range() {
        let bytes = message("001010000000123", "example.net");
        let imsi =
            |text: &str| DiameterMatch { imsi: vec![text.into()], ..DiameterMatch::default() };
        for (text, wanted) in [
            ("00101*", true),
            ("00102*", false),
            ("001010000000000-001010000000999", true),
            ("001010000000124-001010000000999", false),
            ("00101-00102", false),
            ("001010000000123", true),
        ] {
            assert_eq!(matches(&imsi(text), &bytes), wanted, "{text}");
            assert!(imsi(text).check(Dictionary::built_in()).is_empty());
        }
        for bad in ["", "*", "12a", "5-4", "1-22", "123456789012345678901"] {
            assert_eq!(imsi(bad).check(Dictionary::built_in()).len(), 1, "{bad}");
        }
    }

    #[test]
    fn names_match_in_any_case_and_under_a_star() {
        let bytes = message("1", "IMS.Example.net");
        let realm =
            |text: &str| DiameterMatch { realm: Some(text.into()), ..DiameterMatch::default() };
        assert!(matches(&realm("ims.example.NET"), &bytes));
        assert!(matches(&realm("*.example.net"), &bytes));
        assert!(!matches(&realm("*.ims.example.net"), &bytes));
        assert!(!matches(&realm("example.net"), &bytes));
        let origin = DiameterMatch {
            origin_host: Some("*.a.example.net".into()),
            ..DiameterMatch::default()
        };
        assert!(matches(&origin, &bytes));
    }

    #[test]
    fn any_avp_matches_by_its_path() {
        let bytes = message("001019", "example.net");
        let avp = |path: &str, is: &[&str], prefix: Option<&str>| DiameterMatch {
            avp: vec![AvpMatch {
                path: path.into(),
                is: is.iter().map(|text| Value::Text((*text).to_owned())).collect(),
                prefix: prefix.map(str::to_owned),
            }],
            ..DiameterMatch::default()
        };
        assert!(matches(&avp("443/444", &["001019"], None), &bytes));
        assert!(matches(&avp("443/444", &[], Some("0010")), &bytes));
        assert!(matches(&avp("443/450", &["1"], None), &bytes));
        assert!(matches(&avp("416", &["2", "1"], None), &bytes));
        let imsi = "Subscription-Id.Subscription-Id-Data";
        assert!(matches(&avp(imsi, &[], Some("0010")), &bytes));
        assert!(matches(&avp("Subscription-Id/450", &["END_USER_IMSI"], None), &bytes));
        assert!(matches(&avp("CC-Request-Type", &["INITIAL_REQUEST"], None), &bytes));
        assert!(!matches(&avp("cc-request-type", &["UPDATE_REQUEST"], None), &bytes));
        assert_eq!(avp("CC-Request-Type", &["FIRST"], None).check(Dictionary::built_in()).len(), 1);
        assert_eq!(avp("CC-Request-Type", &[], Some("x")).check(Dictionary::built_in()).len(), 1);
        assert!(!matches(&avp("10415:416", &[], None), &bytes));
        assert!(!matches(&avp("1032", &[], None), &bytes));
        assert_eq!(avp("a/b", &[], None).check(Dictionary::built_in()).len(), 1);
        assert_eq!(avp("1/2/3/4/5", &[], None).check(Dictionary::built_in()).len(), 1);
    }
}
