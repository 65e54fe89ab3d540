//! What the configuration says about AVPs, checked and made ready.

use std::collections::BTreeMap;
use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use strowger_contract::{Note, OptionsError, Outbox};

use super::edit::{DEPTH_MAX, Editor, Step};
use crate::avp::{Header, code};
use crate::dictionary::{AvpDefinition, Dictionary, Kind};
use crate::naming;
use crate::options::Application;

/// Rules of one listener, at most: each is tried at each message.
pub const RULES_MAX: usize = 256;

/// AVPs at the top that are the relay's own, or that both ends know the session by.
const NOT_FOR_RULES: [u32; 3] = [code::SESSION_ID, code::ROUTE_RECORD, code::PROXY_INFO];

/// What is done to messages. In one rule: first `remove`, then `copy`, `set`, `add`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Rule {
    /// Which messages. All that is given must hold; nothing: all messages.
    pub when: When,
    /// Paths whose AVPs are all taken out.
    pub remove: Vec<String>,
    /// Path: the path whose data it is given, if that is there.
    pub copy: BTreeMap<String, String>,
    /// Path: the value of the first AVP there; it is added if there is none.
    pub set: BTreeMap<String, Value>,
    /// Path: the value of an AVP that is appended.
    pub add: BTreeMap<String, Value>,
}

/// Which messages a rule is for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct When {
    /// Requests or answers only.
    pub message: Option<MessageKind>,
    /// One of these applications.
    pub application: Vec<Application>,
    /// One of these commands: `CCR`, `Credit-Control`, or the code.
    pub command: Vec<Value>,
    /// Path: what some AVP there is; `262*` for texts that start so, `*` for whatever it is.
    pub avp: BTreeMap<String, Value>,
}

/// Requests or answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MessageKind {
    /// Requests.
    Request,
    /// Answers.
    Answer,
}

/// A value as people write it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Value {
    /// A number.
    Number(i64),
    /// A text, a name of an enumerated value, an address, or octets as `0x…`.
    Text(String),
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Text(text) => text.fmt(f),
        }
    }
}

#[derive(Debug)]
enum Wanted {
    Anything,
    Exactly(Vec<u8>),
    Prefix(Vec<u8>),
}

#[derive(Debug)]
enum Action {
    Remove(Vec<Step>),
    Copy { from: Vec<Step>, to: Vec<Step> },
    Set(Vec<Step>, Vec<u8>),
    Add(Vec<Step>, Vec<u8>),
}

#[derive(Debug)]
struct Ready {
    requests: bool,
    answers: bool,
    applications: Vec<u32>,
    commands: Vec<u32>,
    avps: Vec<(Vec<Step>, Wanted)>,
    actions: Vec<Action>,
}

/// A listener's rules, ready for work.
#[derive(Debug, Default)]
pub struct Mediation {
    rules: Vec<Ready>,
}

/// What rules did to one message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// How many rules were for it.
    pub rules: u32,
    /// Some edit was left out: the message would have been too long.
    pub too_long: bool,
}

impl Applied {
    /// What both did.
    pub(crate) fn and(self, other: Self) -> Self {
        Self { rules: self.rules + other.rules, too_long: self.too_long || other.too_long }
    }

    /// Counts it.
    pub(crate) fn note(self, out: &mut Outbox) {
        if self.rules > 0 {
            out.note(Note::Count("diameter_rules_applied"));
        }
        if self.too_long {
            out.note(Note::Count("diameter_rules_too_long"));
        }
    }
}

impl Mediation {
    /// Makes rules ready; what is wrong with them is appended to `errors`, with paths below `place`.
    #[must_use]
    pub fn new(
        rules: &[Rule],
        dictionary: &Dictionary,
        place: &str,
        errors: &mut Vec<OptionsError>,
    ) -> Self {
        if rules.len() > RULES_MAX {
            let message = format!("are {} rules; at most {RULES_MAX} can be", rules.len());
            errors.push(OptionsError { path: place.to_owned(), message });
        }
        let ready = |(index, rule): (usize, &Rule)| {
            let place = format!("{place}[{index}]");
            Maker { dictionary, place, errors }.rule(rule)
        };
        Self { rules: rules.iter().take(RULES_MAX).enumerate().map(ready).collect() }
    }

    /// Whether there is nothing to do, ever.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Applies the rules to the message that starts at `start` and goes to the buffer's end.
    pub fn apply(&self, out: &mut Vec<u8>, start: usize, scratch: &mut Vec<u8>) -> Applied {
        let mut applied = Applied::default();
        let Some(header) = out.get(start..).and_then(Header::read) else { return applied };
        let mut editor = Editor::new(out, start);
        for rule in &self.rules {
            if rule.is_for(&header, &editor) {
                applied.rules += 1;
                for action in &rule.actions {
                    match action {
                        Action::Remove(path) => {
                            editor.remove(path);
                        }
                        Action::Copy { from, to } => editor.copy(from, to, scratch),
                        Action::Set(path, data) => editor.set(path, data),
                        Action::Add(path, data) => editor.add(path, data),
                    }
                }
            }
        }
        applied.too_long = editor.too_long;
        applied
    }
}

impl Ready {
    fn is_for(&self, header: &Header, editor: &Editor<'_>) -> bool {
        let is = |wanted: &Wanted, data: &[u8]| match wanted {
            Wanted::Anything => true,
            Wanted::Exactly(value) => data == value,
            Wanted::Prefix(prefix) => data.starts_with(prefix),
        };
        (if header.is_request() { self.requests } else { self.answers })
            && (self.applications.is_empty() || self.applications.contains(&header.application))
            && (self.commands.is_empty() || self.commands.contains(&header.command))
            && self.avps.iter().all(|(path, wanted)| editor.any(path, |data| is(wanted, data)))
    }
}

struct Maker<'a> {
    dictionary: &'a Dictionary,
    place: String,
    errors: &'a mut Vec<OptionsError>,
}

impl<'a> Maker<'a> {
    fn wrong(&mut self, path: &str, message: String) {
        self.errors.push(OptionsError { path: format!("{}.{path}", self.place), message });
    }

    fn rule(mut self, rule: &Rule) -> Ready {
        let when = &rule.when;
        let mut ready = Ready {
            requests: when.message != Some(MessageKind::Answer),
            answers: when.message != Some(MessageKind::Request),
            applications: Vec::new(),
            commands: Vec::new(),
            avps: Vec::new(),
            actions: Vec::new(),
        };
        for (index, application) in when.application.iter().enumerate() {
            match naming::application(self.dictionary, application) {
                Ok(number) => ready.applications.push(number),
                Err(message) => self.wrong(&format!("when.application[{index}]"), message),
            }
        }
        for (index, command) in when.command.iter().enumerate() {
            match naming::commands(self.dictionary, command) {
                Ok(codes) => ready.commands.extend(codes),
                Err(message) => self.wrong(&format!("when.command[{index}]"), message),
            }
        }
        for (path, value) in &when.avp {
            let place = format!("when.avp.{path}");
            if let Some((steps, avp)) = self.path(path, &place)
                && let Some(wanted) = self.wanted(avp, value, &place)
            {
                ready.avps.push((steps, wanted));
            }
        }
        self.actions(rule, &mut ready);
        let acts = !rule.remove.is_empty()
            || !rule.copy.is_empty()
            || !rule.set.is_empty()
            || !rule.add.is_empty();
        if !acts {
            let place = self.place.clone();
            let message = "does nothing: give it one of remove, copy, set, add".to_owned();
            self.errors.push(OptionsError { path: place, message });
        }
        ready
    }

    fn actions(&mut self, rule: &Rule, ready: &mut Ready) {
        for (index, path) in rule.remove.iter().enumerate() {
            let place = format!("remove[{index}]");
            if let Some((steps, _)) = self.target(path, &place) {
                ready.actions.push(Action::Remove(steps));
            }
        }
        for (to, from) in &rule.copy {
            let place = format!("copy.{to}");
            let (target, source) = (self.target(to, &place), self.path(from, &place));
            let (Some((to, target)), Some((from, source))) = (target, source) else { continue };
            if target.kind == source.kind || !is_fixed(target.kind) && !is_fixed(source.kind) {
                ready.actions.push(Action::Copy { from, to });
            } else {
                let (source, target) = (source.kind.name(), target.kind.name());
                self.wrong(&place, format!("a {target} cannot be given the data of a {source}"));
            }
        }
        for (values, what) in [(&rule.set, "set"), (&rule.add, "add")] {
            for (path, value) in values {
                let place = format!("{what}.{path}");
                let Some((steps, avp)) = self.target(path, &place) else { continue };
                match encode(avp, value) {
                    Ok(data) if what == "set" => ready.actions.push(Action::Set(steps, data)),
                    Ok(data) => ready.actions.push(Action::Add(steps, data)),
                    Err(message) => self.wrong(&place, message),
                }
            }
        }
    }

    /// A path that a rule may change.
    fn target(&mut self, path: &str, place: &str) -> Option<(Vec<Step>, &'a AvpDefinition)> {
        let dictionary = self.dictionary;
        let first = path.split(['.', '/']).next().and_then(|name| dictionary.avp_named(name));
        if let Some(avp) = first.filter(|avp| avp.vendor == 0 && NOT_FOR_RULES.contains(&avp.code))
        {
            let message = format!("{} is not for rules: the relay needs it as it is", avp.name);
            self.wrong(place, message);
            return None;
        }
        self.path(path, place)
    }

    /// A path to an AVP that the dictionary knows.
    fn path(&mut self, path: &str, place: &str) -> Option<(Vec<Step>, &'a AvpDefinition)> {
        match naming::path(self.dictionary, path, DEPTH_MAX) {
            Ok((steps, Some(avp))) => return Some((steps, avp)),
            Ok(_) => self.wrong(place, format!("the dictionary does not say what `{path}` is")),
            Err(message) => self.wrong(place, message),
        }
        None
    }

    fn wanted(&mut self, avp: &AvpDefinition, value: &Value, place: &str) -> Option<Wanted> {
        if let Value::Text(text) = value {
            match text.strip_suffix('*') {
                Some("") => return Some(Wanted::Anything),
                Some(prefix) if is_text(avp.kind) => {
                    return Some(Wanted::Prefix(prefix.as_bytes().to_vec()));
                }
                _ => {}
            }
        }
        match encode(avp, value) {
            Ok(data) => Some(Wanted::Exactly(data)),
            Err(message) => {
                self.wrong(place, message);
                None
            }
        }
    }
}

pub(crate) fn is_text(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Utf8String
            | Kind::OctetString
            | Kind::DiameterIdentity
            | Kind::DiameterUri
            | Kind::IpFilterRule
            | Kind::QosFilterRule
    )
}

fn is_fixed(kind: Kind) -> bool {
    !is_text(kind)
}

/// A value as an AVP's data (RFC 6733 4.2, 4.3).
///
/// # Errors
/// It cannot be one; what it should be.
pub(crate) fn encode(avp: &AvpDefinition, value: &Value) -> Result<Vec<u8>, String> {
    let wrong = || format!("`{value}` is no {}, which {} is", avp.kind.name(), avp.name);
    let number = || match value {
        Value::Number(number) => Some(*number),
        Value::Text(text) => text.parse().ok(),
    };
    let data = match avp.kind {
        Kind::Unsigned32 | Kind::Time => {
            let named = |text: &str| avp.value_of(text);
            let value = match value {
                Value::Text(text) => named(text).or_else(|| text.parse().ok()),
                Value::Number(number) => u32::try_from(*number).ok(),
            };
            value.map(|number| number.to_be_bytes().to_vec())
        }
        Kind::Enumerated => {
            let named = if let Value::Text(text) = value { avp.value_of(text) } else { None };
            let number = number().and_then(|number| i32::try_from(number).ok());
            let data = named.or_else(|| number.map(i32::cast_unsigned));
            let names = || {
                let names: Vec<&str> = avp.values.iter().map(|(_, name)| name.as_str()).collect();
                format!("`{value}` is no number and none of {}", names.join(", "))
            };
            return data.map(|number| number.to_be_bytes().to_vec()).ok_or_else(names);
        }
        Kind::Integer32 => number()
            .and_then(|number| i32::try_from(number).ok())
            .map(|number| number.to_be_bytes().to_vec()),
        Kind::Integer64 => number().map(|number| number.to_be_bytes().to_vec()),
        Kind::Unsigned64 => match value {
            Value::Text(text) => text.parse::<u64>().ok(),
            Value::Number(number) => u64::try_from(*number).ok(),
        }
        .map(|number| number.to_be_bytes().to_vec()),
        Kind::Address => value.to_string().parse().ok().map(|address: IpAddr| match address {
            IpAddr::V4(address) => [&[0, 1][..], &address.octets()].concat(),
            IpAddr::V6(address) => [&[0, 2][..], &address.octets()].concat(),
        }),
        Kind::DiameterIdentity => {
            let text = value.to_string();
            let is_name = !text.is_empty()
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
            is_name.then(|| text.into_bytes())
        }
        Kind::OctetString => {
            let text = value.to_string();
            match text.strip_prefix("0x") {
                Some(hex) => octets(hex),
                None => Some(text.into_bytes()),
            }
        }
        Kind::Grouped => {
            return Err(format!("{} is a group: name one of its members", avp.name));
        }
        Kind::Float32 | Kind::Float64 => {
            return Err(format!("{} is a {}, which rules cannot write", avp.name, avp.kind.name()));
        }
        Kind::Utf8String | Kind::DiameterUri | Kind::IpFilterRule | Kind::QosFilterRule => {
            Some(value.to_string().into_bytes())
        }
    };
    data.ok_or_else(wrong)
}

fn octets(hex: &str) -> Option<Vec<u8>> {
    if !hex.is_ascii() || !hex.len().is_multiple_of(2) {
        return None;
    }
    let pair = |at: usize| u8::from_str_radix(hex.get(at..at + 2)?, 16).ok();
    (0..hex.len()).step_by(2).map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::avp::{Avps, Summary};
    use crate::build::Builder;

    fn rules(json: &str) -> (Mediation, Vec<String>) {
        let rules: Vec<Rule> = serde_json::from_str(json).expect("rules");
        let mut errors = Vec::new();
        let mediation = Mediation::new(&rules, Dictionary::built_in(), "rules", &mut errors);
        (mediation, errors.iter().map(ToString::to_string).collect())
    }

    fn ccr(realm: &str) -> Vec<u8> {
        let mut group = Vec::new();
        crate::build::append(&mut group, 450, 0x40, &1u32.to_be_bytes());
        crate::build::append(&mut group, 444, 0x40, b"262010000000001");
        let mut out = Vec::new();
        Builder::request(&mut out, 272, 16_777_238, 1, 2)
            .text(code::SESSION_ID, "a;1;2")
            .text(code::DESTINATION_REALM, realm)
            .bytes(443, &group)
            .finish();
        out
    }

    #[test]
    fn rules_change_what_they_are_for() {
        let (mediation, errors) = rules(
            r#"[
            { "when": { "message": "request", "application": ["gx"], "command": ["CCR"],
                        "avp": { "Subscription-Id.Subscription-Id-Data": "26201*", "Subscription-Id.Subscription-Id-Type": "END_USER_IMSI" } },
              "set": { "Destination-Realm": "home.example", "3GPP-SGSN-MCC-MNC": 26201 },
              "add": { "Framed-IP-Address": "0x0a000001" },
              "copy": { "User-Name": "Subscription-Id.Subscription-Id-Data" } },
            { "when": { "command": ["Credit-Control"], "avp": { "User-Name": "*" } }, "remove": ["Subscription-Id"] },
            { "when": { "message": "answer" }, "set": { "Result-Code": "DIAMETER_TOO_BUSY" } }
            ]"#,
        );
        assert_eq!(errors, [""; 0]);
        let (mut out, mut scratch) = (ccr("old"), Vec::new());
        let applied = mediation.apply(&mut out, 0, &mut scratch);
        assert_eq!(applied, Applied { rules: 2, too_long: false });
        assert_eq!(Summary::of(&out).destination_realm, Some(b"home.example".as_slice()));
        let codes: Vec<u32> = Avps::of(&out).map(|avp| avp.expect("whole").code).collect();
        assert_eq!(codes, [263, 283, 1, 18, 8]);
        let mut other = ccr("old");
        other[8..12].copy_from_slice(&4u32.to_be_bytes());
        let before = other.clone();
        assert_eq!(mediation.apply(&mut other, 0, &mut scratch).rules, 0);
        assert_eq!(other, before);
    }

    #[test]
    fn mistakes_are_told_all_at_once() {
        let (_, errors) = rules(
            r#"[
            { "set": { "Orgin-Realm": "x" } },
            { "set": { "Result-Code": "nothing", "Session-Id": "x", "Subscription-Id": "x" } },
            { "add": { "Origin-Realm.Session-Id": "x" } },
            { "when": { "application": ["gxy"], "command": ["XXR"] }, "remove": ["Origin-Realm"] },
            { "set": { "CC-Request-Type": "FIRST" } },
            { "copy": { "Result-Code": "Origin-Host" } },
            { "set": { "Host-IP-Address": "10.0.0" } },
            { "remove": ["Route-Record"] }
            ]"#,
        );
        assert_eq!(
            errors,
            [
                "rules[0].set.Orgin-Realm: there is no AVP `Orgin-Realm` in the dictionary; did you mean `Origin-Realm`?",
                "rules[1].set.Result-Code: `nothing` is no Unsigned32, which Result-Code is",
                "rules[1].set.Session-Id: Session-Id is not for rules: the relay needs it as it is",
                "rules[1].set.Subscription-Id: Subscription-Id is a group: name one of its members",
                "rules[2].add.Origin-Realm.Session-Id: Origin-Realm is a DiameterIdentity and has no members",
                "rules[3].when.application[0]: there is no application `gxy` in the dictionary (its number would do); did you mean `gx`?",
                "rules[3].when.command[0]: there is no command `XXR` in the dictionary",
                "rules[4].set.CC-Request-Type: `FIRST` is no number and none of INITIAL_REQUEST, UPDATE_REQUEST, TERMINATION_REQUEST, EVENT_REQUEST",
                "rules[5].copy.Result-Code: a Unsigned32 cannot be given the data of a DiameterIdentity",
                "rules[6].set.Host-IP-Address: `10.0.0` is no Address, which Host-IP-Address is",
                "rules[7].remove[0]: Route-Record is not for rules: the relay needs it as it is",
            ]
        );
        let (_, errors) = rules(r#"[ { "when": { "message": "request" } } ]"#);
        assert_eq!(errors, ["rules[0]: does nothing: give it one of remove, copy, set, add"]);
    }
}
