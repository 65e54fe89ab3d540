//! Header rules: what an operator adds to, sets in or takes out of messages, by condition.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::access::{Network, any};
use crate::branch::decimal;
use crate::scan::{Scan, Start, find, is_token, lines};
use crate::write::copy;

/// Rules of one listener, at most: each is looked at for each message.
pub const RULES_MAX: usize = 64;

/// Which messages a rule is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum On {
    /// Requests.
    #[default]
    Request,
    /// Answers.
    Response,
}

/// Whom a message goes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Towards {
    /// The instances of a pool.
    Instances,
    /// Everybody else.
    Clients,
    /// Both.
    #[default]
    Any,
}

/// A condition on a header.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HeaderIs {
    /// Its name.
    pub name: String,
    /// Its first value contains this.
    #[serde(default)]
    pub contains: Option<String>,
    /// It is not there.
    #[serde(default)]
    pub absent: bool,
}

/// A rule: if all conditions hold, headers are removed, set and added, in that order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HeaderRule {
    /// `request` (default) or `response`.
    pub on: On,
    /// `instances`, `clients` or `any` (default).
    pub towards: Towards,
    /// Only these methods (for answers: of the request).
    pub method: Vec<String>,
    /// Only what came from these networks.
    pub source: Vec<Network>,
    /// Only if all of these hold.
    pub header: Vec<HeaderIs>,
    /// Headers taken out, in any form of their names.
    pub remove: Vec<String>,
    /// Headers that then stand there once with this value. `${source_ip}`, `${source_port}` and
    /// `${transport}` are replaced.
    pub set: BTreeMap<String, String>,
    /// Headers added to those that are there.
    pub add: BTreeMap<String, String>,
}

/// What the proxy itself lives by; a rule must not touch it.
const OURS: [&str; 12] = [
    "Via",
    "From",
    "To",
    "Call-ID",
    "CSeq",
    "Max-Forwards",
    "Route",
    "Record-Route",
    "Contact",
    "Path",
    "Content-Length",
    "Max-Breadth",
];

/// Short forms (RFC 3261 7.3.3 and the IANA registry), for names that a rule may touch or ours.
const SHORT: [(&str, u8); 19] = [
    ("Via", b'v'),
    ("From", b'f'),
    ("To", b't'),
    ("Call-ID", b'i'),
    ("Contact", b'm'),
    ("Content-Length", b'l'),
    ("Content-Type", b'c'),
    ("Content-Encoding", b'e'),
    ("Subject", b's'),
    ("Supported", b'k'),
    ("Session-Expires", b'x'),
    ("Refer-To", b'r'),
    ("Referred-By", b'b'),
    ("Allow-Events", b'u'),
    ("Event", b'o'),
    ("Accept-Contact", b'a'),
    ("Reject-Contact", b'j'),
    ("Request-Disposition", b'd'),
    ("Identity", b'y'),
];

/// Headers that only trusted sides may assert (RFC 3325 5, RFC 6050, RFC 7315).
pub(crate) const ASSERTED: [&str; 5] = [
    "P-Asserted-Identity",
    "P-Asserted-Service",
    "P-Charging-Vector",
    "P-Charging-Function-Addresses",
    "P-Profile-Key",
];

/// Whether a header's name as written is `name`, in any form.
fn is_named(written: &[u8], name: &str) -> bool {
    written.eq_ignore_ascii_case(name.as_bytes())
        || written.len() == 1
            && SHORT.iter().any(|(long, short)| {
                written[0].eq_ignore_ascii_case(short) && long.eq_ignore_ascii_case(name)
            })
}

impl HeaderRule {
    /// What makes no sense: where in the rule, and why.
    pub(crate) fn check(&self) -> Vec<(String, String)> {
        let mut wrong = Vec::new();
        let mut name = |path: String, name: &str, writes: bool| {
            if name.is_empty() || !name.bytes().all(is_token) {
                wrong.push((path, format!("`{name}` is no header name")));
            } else if writes && OURS.iter().any(|ours| is_named(name.as_bytes(), ours)) {
                let message =
                    format!("`{name}` is what the proxy routes by; a rule cannot touch it");
                wrong.push((path, message));
            }
        };
        for (index, header) in self.header.iter().enumerate() {
            name(format!(".header[{index}].name"), &header.name, false);
        }
        for (index, header) in self.remove.iter().enumerate() {
            name(format!(".remove[{index}]"), header, true);
        }
        for (key, list) in [("set", &self.set), ("add", &self.add)] {
            for header in list.keys() {
                name(format!(".{key}.{header}"), header, true);
            }
        }
        for (key, list) in [("set", &self.set), ("add", &self.add)] {
            for (header, value) in list {
                if value.bytes().any(|byte| byte < b' ' && byte != b'\t' || byte == 0x7f) {
                    wrong.push((format!(".{key}.{header}"), "has control characters".into()));
                }
            }
        }
        for (index, header) in self.header.iter().enumerate() {
            if header.absent && header.contains.is_some() {
                let message = "`absent` and `contains` cannot both hold".to_owned();
                wrong.push((format!(".header[{index}]"), message));
            }
        }
        if self.remove.is_empty() && self.set.is_empty() && self.add.is_empty() {
            wrong.push((String::new(), "does nothing: give it `remove`, `set` or `add`".into()));
        }
        wrong
    }

    fn holds(&self, facts: &Facts<'_>, message: &[u8], scan: &Scan) -> bool {
        let on = match scan.start {
            Start::Request { .. } => On::Request,
            Start::Response { .. } => On::Response,
        };
        self.on == on
            && match self.towards {
                Towards::Any => true,
                Towards::Instances => facts.to_instance,
                Towards::Clients => !facts.to_instance,
            }
            && (self.method.is_empty()
                || self.method.iter().any(|method| method.as_bytes() == facts.method))
            && (self.source.is_empty() || any(&self.source, facts.source.ip()))
            && self.header.iter().all(|wanted| {
                let found = find(message, scan, wanted.name.as_bytes());
                match (&wanted.contains, found) {
                    (Some(text), Some(value)) => {
                        memchr::memmem::find(value, text.as_bytes()).is_some()
                    }
                    (Some(_), None) => false,
                    (None, found) => found.is_none() == wanted.absent,
                }
            })
    }
}

/// What rules may ask of a message besides its bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts<'a> {
    pub(crate) method: &'a [u8],
    pub(crate) source: SocketAddr,
    pub(crate) transport: &'a str,
    pub(crate) to_instance: bool,
}

/// Applies the rules, and takes out `asserted` identities if told so. Whether `out` now has an
/// edited copy; if not, the message stands as it is.
pub(crate) fn edit(
    rules: &[HeaderRule],
    drop_asserted: bool,
    facts: &Facts<'_>,
    message: &[u8],
    scan: &Scan,
    out: &mut Vec<u8>,
) -> bool {
    let mut holding = 0u64;
    for (index, rule) in rules.iter().take(RULES_MAX).enumerate() {
        if rule.holds(facts, message, scan) {
            holding |= 1 << index;
        }
    }
    if holding == 0 && !drop_asserted {
        return false;
    }
    let chosen = || {
        rules
            .iter()
            .take(RULES_MAX)
            .enumerate()
            .filter_map(move |(index, rule)| (holding & 1 << index != 0).then_some(rule))
    };
    let goes = |name: &[u8]| {
        drop_asserted && ASSERTED.iter().any(|known| is_named(name, known))
            || chosen().any(|rule| {
                rule.remove.iter().any(|known| is_named(name, known))
                    || rule.set.keys().any(|known| is_named(name, known))
            })
    };
    out.clear();
    copy(message, 0, scan.headers_at, out);
    let mut end = scan.headers_at;
    for (name, line, _) in lines(message, scan) {
        if !goes(name) {
            copy(message, line.from(), line.to(), out);
        }
        end = line.to();
    }
    for rule in chosen() {
        for (name, value) in rule.set.iter().chain(&rule.add) {
            out.extend_from_slice(name.as_bytes());
            out.extend_from_slice(b": ");
            expand(value, facts, out);
            out.extend_from_slice(b"\r\n");
        }
    }
    copy(message, end, message.len(), out);
    true
}

fn expand(value: &str, facts: &Facts<'_>, out: &mut Vec<u8>) {
    let mut rest = value;
    while let Some(at) = rest.find("${") {
        out.extend_from_slice(&rest.as_bytes()[..at]);
        let tail = &rest[at..];
        if let Some(after) = tail.strip_prefix("${source_ip}") {
            out.extend_from_slice(facts.source.ip().to_string().as_bytes());
            rest = after;
        } else if let Some(after) = tail.strip_prefix("${source_port}") {
            decimal(u64::from(facts.source.port()), out);
            rest = after;
        } else if let Some(after) = tail.strip_prefix("${transport}") {
            out.extend_from_slice(facts.transport.as_bytes());
            rest = after;
        } else {
            out.extend_from_slice(b"${");
            rest = &tail[2..];
        }
    }
    out.extend_from_slice(rest.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts<'static> {
        Facts {
            method: b"INVITE",
            source: "192.0.2.7:5070".parse().expect("an address"),
            transport: "udp",
            to_instance: true,
        }
    }

    fn edited(rules: &[HeaderRule], drop_asserted: bool, message: &str) -> Option<String> {
        let (mut scan, mut out) = (Scan::default(), Vec::new());
        scan.scan(message.as_bytes()).expect("well-formed");
        edit(rules, drop_asserted, &facts(), message.as_bytes(), &scan, &mut out)
            .then(|| String::from_utf8(out).expect("text"))
    }

    fn rule(yaml: serde_json::Value) -> HeaderRule {
        serde_json::from_value(yaml).expect("a rule")
    }

    const MESSAGE: &str = "INVITE sip:a@b SIP/2.0\r\nVia: SIP/2.0/UDP x\r\ns: Hi\r\n there\r\nX-A: 1\r\nx-a : 2\r\nIdentity: eyJ\r\nP-Asserted-Identity: <sip:boss@b>\r\n\r\nbody";

    #[test]
    fn removes_sets_and_adds_in_any_form() {
        let rules = [rule(serde_json::json!({
            "remove": ["Subject"], "set": {"X-A": "${source_ip}:${source_port}/${transport} ${x}"}, "add": {"X-B": "3"}
        }))];
        assert_eq!(
            edited(&rules, false, MESSAGE).expect("edited"),
            "INVITE sip:a@b SIP/2.0\r\nVia: SIP/2.0/UDP x\r\nIdentity: eyJ\r\nP-Asserted-Identity: <sip:boss@b>\r\nX-A: 192.0.2.7:5070/udp ${x}\r\nX-B: 3\r\n\r\nbody"
        );
    }

    #[test]
    fn asserted_identities_go_and_signed_ones_stay() {
        let text = edited(&[], true, MESSAGE).expect("edited");
        assert!(!text.contains("P-Asserted") && text.contains("Identity: eyJ\r\n"));
    }

    #[test]
    fn conditions_must_all_hold() {
        for (condition, holds) in [
            (serde_json::json!({"method": ["INVITE"], "remove": ["X-A"]}), true),
            (serde_json::json!({"method": ["BYE"], "remove": ["X-A"]}), false),
            (serde_json::json!({"on": "response", "remove": ["X-A"]}), false),
            (serde_json::json!({"towards": "clients", "remove": ["X-A"]}), false),
            (serde_json::json!({"towards": "instances", "remove": ["X-A"]}), true),
            (serde_json::json!({"source": ["192.0.2.0/24"], "remove": ["X-A"]}), true),
            (serde_json::json!({"source": ["10.0.0.0/8"], "remove": ["X-A"]}), false),
            (
                serde_json::json!({"header": [{"name": "x-a", "contains": "1"}], "remove": ["X-A"]}),
                true,
            ),
            (
                serde_json::json!({"header": [{"name": "x-a", "contains": "2"}], "remove": ["X-A"]}),
                false,
            ),
            (
                serde_json::json!({"header": [{"name": "X-Q", "absent": true}], "remove": ["X-A"]}),
                true,
            ),
            (
                serde_json::json!({"header": [{"name": "X-A", "absent": true}], "remove": ["X-A"]}),
                false,
            ),
        ] {
            assert_eq!(
                edited(&[rule(condition.clone())], false, MESSAGE).is_some(),
                holds,
                "{condition}"
            );
        }
    }

    #[test]
    fn what_the_proxy_routes_by_is_off_limits() {
        for name in ["Via", "v", "record-route", "Call-ID", "i", "Contact", "m", "l"] {
            let found = rule(serde_json::json!({ "remove": [name] })).check();
            assert!(found.iter().any(|(_, message)| message.contains("routes by")), "{name}");
        }
        assert!(!rule(serde_json::json!({})).check().is_empty());
        assert!(!rule(serde_json::json!({"add": {"X": "a\r\nVia: b"}})).check().is_empty());
        assert!(rule(serde_json::json!({"add": {"X": "a"}})).check().is_empty());
    }
}
