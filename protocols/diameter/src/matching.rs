//! What routes match: base-protocol fields, subscribers, and any AVP.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::avp::{Avp, Avps, Header, Summary};
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
    /// One of these command codes.
    pub command: Vec<u32>,
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
}

/// An AVP and what it must be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AvpMatch {
    /// Codes from the top down, vendors before a colon: `443/444`, `10415:1032`.
    pub path: String,
    /// Its text is one of these, or its number in decimal.
    pub is: Vec<String>,
    /// Its text begins so.
    pub prefix: Option<String>,
}

impl DiameterMatch {
    /// What is wrong, by paths under the match.
    pub(crate) fn check(&self) -> Vec<(String, String)> {
        let mut wrong = Vec::new();
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
            if path(&avp.path).is_none() {
                let message = format!(
                    "`{}` is no path of at most {DEPTH_MAX} codes such as `443/444` or `10415:1032`",
                    avp.path
                );
                wrong.push((format!("avp[{index}].path"), message));
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

fn path(text: &str) -> Option<Vec<(u32, u32)>> {
    let step = |step: &str| match step.split_once(':') {
        Some((vendor, code)) => Some((vendor.parse().ok()?, code.parse().ok()?)),
        None => Some((0, step.parse().ok()?)),
    };
    let steps: Option<Vec<(u32, u32)>> = text.split('/').map(step).collect();
    steps.filter(|steps| steps.len() <= DEPTH_MAX)
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
    avps: Vec<(Vec<(u32, u32)>, AvpMatch)>,
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
    pub(crate) fn new(wanted: &DiameterMatch) -> Self {
        let name = |text: &Option<String>| text.as_deref().map(Name::new);
        let digits = |list: &[String]| list.iter().filter_map(|text| Digits::read(text)).collect();
        Self {
            applications: wanted.application.iter().filter_map(Application::number).collect(),
            commands: wanted.command.clone(),
            realm: name(&wanted.realm),
            host: name(&wanted.destination_host),
            origin_host: name(&wanted.origin_host),
            origin_realm: name(&wanted.origin_realm),
            imsi: digits(&wanted.imsi),
            msisdn: digits(&wanted.msisdn),
            avps: wanted
                .avp
                .iter()
                .filter_map(|avp| Some((path(&avp.path)?, avp.clone())))
                .collect(),
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
            && self.avps.iter().all(|(path, wanted)| wanted.is_in(Avps::of(bytes), path))
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

impl AvpMatch {
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
        let is = |wanted: &String| {
            wanted.as_bytes() == avp.data
                || avp.number().is_some_and(|number| wanted.parse() == Ok(number))
        };
        let begins =
            self.prefix.as_ref().is_none_or(|prefix| avp.data.starts_with(prefix.as_bytes()));
        begins && (self.is.is_empty() || self.is.iter().any(is))
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
        Matcher::new(wanted).matches(&header, &Summary::of(bytes), bytes)
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
            assert!(imsi(text).check().is_empty());
        }
        for bad in ["", "*", "12a", "5-4", "1-22", "123456789012345678901"] {
            assert_eq!(imsi(bad).check().len(), 1, "{bad}");
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
                is: is.iter().map(|text| (*text).to_owned()).collect(),
                prefix: prefix.map(str::to_owned),
            }],
            ..DiameterMatch::default()
        };
        assert!(matches(&avp("443/444", &["001019"], None), &bytes));
        assert!(matches(&avp("443/444", &[], Some("0010")), &bytes));
        assert!(matches(&avp("443/450", &["1"], None), &bytes));
        assert!(matches(&avp("416", &["2", "1"], None), &bytes));
        assert!(!matches(&avp("10415:416", &[], None), &bytes));
        assert!(!matches(&avp("1032", &[], None), &bytes));
        assert_eq!(avp("a/b", &[], None).check().len(), 1);
        assert_eq!(avp("1/2/3/4/5", &[], None).check().len(), 1);
    }
}
