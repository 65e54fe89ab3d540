//! A Diameter listener's options and its routes' matches.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use strowger_contract::duration::Span;
use strowger_contract::{OptionsError, Scope};

/// Applications by the names that operators use (RFC 6733, 4006, 3GPP TS 29.230).
const APPLICATIONS: [(&str, u32); 26] = [
    ("base", 0),
    ("nasreq", 1),
    ("acct", 3),
    ("rf", 3),
    ("gy", 4),
    ("ro", 4),
    ("credit-control", 4),
    ("eap", 5),
    ("sip", 6),
    ("cx", 16_777_216),
    ("sh", 16_777_217),
    ("re", 16_777_218),
    ("wx", 16_777_219),
    ("gq", 16_777_222),
    ("rx", 16_777_236),
    ("gx", 16_777_238),
    ("sta", 16_777_250),
    ("s6a", 16_777_251),
    ("s13", 16_777_252),
    ("slg", 16_777_255),
    ("swx", 16_777_265),
    ("s9", 16_777_267),
    ("gxx", 16_777_266),
    ("s6b", 16_777_272),
    ("slh", 16_777_291),
    ("sy", 16_777_302),
];

/// An application, by name or number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Application {
    /// Its number.
    Number(u32),
    /// Its name.
    Name(String),
}

impl Application {
    /// Its number, if the name is known.
    #[must_use]
    pub fn number(&self) -> Option<u32> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Name(name) => {
                let known = APPLICATIONS.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
                known.map(|(_, number)| *number)
            }
        }
    }
}

/// A Diameter listener's options.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DiameterOptions {
    /// What the edge calls itself, a fully qualified name.
    pub origin_host: String,
    /// Its realm; the node's if empty.
    pub origin_realm: String,
    /// RFC 6733 5.3.7.
    pub product_name: String,
    /// Applications to advertise before any backend has told its own.
    pub applications: Vec<Application>,
    /// Advertise the relay application as well (RFC 6733 2.4).
    pub advertise_relay: bool,
    /// Tw: a peer that says nothing for so long is asked (RFC 3539).
    pub watchdog: Span,
    /// Identities of clients that may connect; empty: all.
    pub peers: Vec<String>,
    /// How long an answer is waited for before the client is told that there is none.
    pub answer_timeout: Span,
    /// Result codes of backends' errors after which another backend is asked.
    pub reroute_on: Vec<u32>,
    /// Requests of a session whose server is unreachable go to another server.
    pub session_failover: bool,
    /// Requests under way, per worker.
    pub max_pending: u32,
}

impl Default for DiameterOptions {
    fn default() -> Self {
        Self {
            origin_host: String::new(),
            origin_realm: String::new(),
            product_name: "Strowger".to_owned(),
            applications: Vec::new(),
            advertise_relay: true,
            watchdog: Span::secs(30),
            peers: Vec::new(),
            answer_timeout: Span::secs(10),
            reroute_on: vec![3_002, 3_004],
            session_failover: true,
            max_pending: 100_000,
        }
    }
}

/// What a route matches. All that is given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DiameterMatch {
    /// One of these applications.
    pub application: Vec<Application>,
    /// The Destination-Realm.
    pub realm: Option<String>,
    /// The Destination-Host.
    pub destination_host: Option<String>,
    /// One of these command codes.
    pub command: Vec<u32>,
}

pub(crate) fn check(scope: &Scope<DiameterMatch>, options: &DiameterOptions) -> Vec<OptionsError> {
    let mut errors = Vec::new();
    let mut wrong = |path: String, message: String| errors.push(OptionsError { path, message });
    let identity = |text: &str| {
        !text.is_empty()
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
    };
    if options.origin_host.is_empty() {
        wrong(
            "origin_host".into(),
            "is missing: peers must be told who they talk to, such as edge-1.example.net".into(),
        );
    } else if !identity(&options.origin_host) {
        wrong("origin_host".into(), format!("`{}` is no host name", options.origin_host));
    }
    if options.origin_realm.is_empty() && scope.realm.is_empty() {
        wrong("origin_realm".into(), "is missing, and `node.realm` is not set either".into());
    }
    if options.watchdog < Span::millis(100) || options.watchdog > Span::secs(3_600) {
        wrong("watchdog".into(), "must be from 100ms to 1h (RFC 3539 says 30s)".into());
    }
    if options.answer_timeout.0.is_zero() || options.answer_timeout > Span::secs(300) {
        wrong("answer_timeout".into(), "must be over 0 and at most 5m".into());
    }
    if options.max_pending == 0 || options.max_pending > crate::pending::SLOTS_MAX {
        wrong("max_pending".into(), format!("must be from 1 to {}", crate::pending::SLOTS_MAX));
    }
    let mut names = |path: String, list: &[Application]| {
        for (index, application) in
            list.iter().enumerate().filter(|(_, application)| application.number().is_none())
        {
            let known: Vec<&str> = APPLICATIONS.iter().map(|(name, _)| *name).collect();
            let Application::Name(name) = application else { continue };
            wrong(
                format!("{path}[{index}]"),
                format!(
                    "unknown application `{name}`; write a number or one of {}",
                    known.join(", ")
                ),
            );
        }
    };
    names("applications".into(), &options.applications);
    for (index, (route, _)) in scope.routes.iter().enumerate() {
        names(format!("routes[{index}].match.application"), &route.application);
    }
    errors
}
