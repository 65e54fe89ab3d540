//! A Diameter listener's options and its routes' matches.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use strowger_contract::duration::Span;
use strowger_contract::{OptionsError, Scope};

pub use crate::hedge::Hedge;
use crate::mediation::Mediation;
pub use crate::mediation::rules::Value;
use crate::naming;

pub use crate::matching::{AvpMatch, DiameterMatch};

/// An application, by name or number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Application {
    /// Its number.
    Number(u32),
    /// Its name.
    Name(String),
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
    /// Changes to the messages that pass.
    pub mediation: crate::mediation::MediationOptions,
    /// Applications to advertise before any backend has told its own.
    pub applications: Vec<Application>,
    /// Advertise the relay application as well (RFC 6733 2.4).
    pub advertise_relay: bool,
    /// Tw: a peer that says nothing for so long is asked (RFC 3539).
    pub watchdog: Span,
    /// A backend that owes answers and has said nothing for so long is suspected at once, without
    /// waiting for Tw; 0: only the watchdog finds it out.
    pub stalled: Span,
    /// Identities of clients that may connect, `*.example.net` for all under a name; empty: all.
    pub peers: Vec<String>,
    /// Connections that one client identity may have.
    pub peer_connections: u32,
    /// A backend that connects itself, by its Origin-Host, is held against our own connection to it:
    /// one of the two stays and serves both ways (RFC 6733 5.6.4). Off: its connection is a client's,
    /// beside ours.
    pub election: bool,
    /// No client is let in before so many backends are open.
    pub wait_for_backends: u32,
    /// How long an answer is waited for before the client is told that there is none.
    pub answer_timeout: Span,
    /// Other times for some; the first that matches.
    pub answer_timeouts: Vec<AnswerTimeout>,
    /// Result codes of backends' answers after which another backend is asked.
    pub reroute_on: Vec<Reroute>,
    /// Servers that stand in for a Destination-Host that cannot be reached.
    pub alternates: BTreeMap<String, Vec<String>>,
    /// Requests of a session whose server is unreachable go to another server.
    pub session_failover: bool,
    /// Applications that keep no session: nothing is remembered of theirs.
    pub stateless: Vec<Application>,
    /// Requests under way, per worker.
    pub max_pending: u32,
    /// Requests under way at one backend, over all workers; 0: no bound but its `capacity`.
    pub peer_pending: u32,
    /// What one client connection may send in a second.
    pub ingress: Option<Rates>,
    /// What one backend is sent in a second.
    pub egress: Option<Rates>,
    /// Whether and how subscribers are followed; the names are the pool's `bind_keys`.
    pub bindings: Bindings,
    /// What backends tell of their load is heeded.
    pub overload: Overload,
    /// How long answers are kept for requests that come again with T; 0: they are not.
    pub duplicates: Span,
    /// Follow redirect indications (RFC 6733 6.1.8), so many in a row; 0: hand them to the client.
    pub redirects: u8,
    /// Requests that a second server is asked for when the first is slow; not given: none.
    pub hedge: Option<Hedge>,
}

/// A time to wait for an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AnswerTimeout {
    /// Of one of these applications; empty: of all.
    #[serde(default)]
    pub application: Vec<Application>,
    /// Of one of these commands, by name or code; empty: of all.
    #[serde(default)]
    pub command: Vec<Value>,
    /// Of this DRMP priority (RFC 7944) or a more urgent one, 0 to 15.
    #[serde(default)]
    pub priority: Option<u8>,
    /// How long.
    pub timeout: Span,
}

/// A result code after which another backend is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Reroute {
    /// Of any application.
    Code(u32),
    /// Of one application.
    Of {
        /// Which.
        application: Application,
        /// The code, also one of Experimental-Result.
        code: u32,
    },
}

/// Messages in a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rates {
    /// Never more.
    pub max: u32,
    /// Of these, kept for tiers 0 and 1: others get `max - reserved`.
    #[serde(default)]
    pub reserved: u32,
}

/// How subscribers are followed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Bindings {
    /// Applications whose sessions create bindings, by CCR-I.
    pub create: Vec<Application>,
    /// Applications whose new sessions follow them.
    pub follow: Vec<Application>,
    /// The result code of a follower that no binding is found for; 0: it is balanced.
    pub missing: u32,
    /// Result codes that say that a server does not know the session or subscriber.
    pub unbind_on: Vec<u32>,
}

impl Default for Bindings {
    fn default() -> Self {
        let names = |names: &[&str]| {
            names.iter().map(|name| Application::Name((*name).to_owned())).collect()
        };
        Self {
            create: names(&["gx", "gxx", "s9"]),
            follow: names(&["rx", "sy", "gy"]),
            missing: 0,
            unbind_on: vec![5_002, 5_065],
        }
    }
}

/// What backends tell of their load.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Overload {
    /// React to DOIC reports (RFC 7683): OC-Supported-Features goes into requests.
    pub doic: bool,
    /// Load reports (RFC 8583) scale weights; those meant for us alone are taken out of answers.
    pub load: bool,
    /// After a 3004 of a backend's own, its share of new sessions is halved for so long.
    pub busy: Span,
}

impl Default for Overload {
    fn default() -> Self {
        Self { doic: false, load: false, busy: Span::secs(1) }
    }
}

impl Default for DiameterOptions {
    fn default() -> Self {
        let stateless = ["s6a", "s13", "cx", "sh", "slg", "slh"];
        Self {
            origin_host: String::new(),
            origin_realm: String::new(),
            product_name: "Strowger".to_owned(),
            mediation: crate::mediation::MediationOptions::default(),
            applications: Vec::new(),
            advertise_relay: true,
            watchdog: Span::secs(30),
            stalled: Span::millis(0),
            peers: Vec::new(),
            peer_connections: 64,
            election: true,
            wait_for_backends: 0,
            answer_timeout: Span::secs(10),
            answer_timeouts: Vec::new(),
            reroute_on: vec![Reroute::Code(3_002), Reroute::Code(3_004)],
            alternates: BTreeMap::new(),
            session_failover: true,
            stateless: stateless.map(|name| Application::Name(name.to_owned())).into(),
            max_pending: 100_000,
            peer_pending: 0,
            ingress: None,
            egress: None,
            bindings: Bindings::default(),
            overload: Overload::default(),
            duplicates: Span::millis(0),
            redirects: 2,
            hedge: None,
        }
    }
}

/// Credit-Control (RFC 8506).
const CREDIT_CONTROL: u32 = 272;

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
    if !options.stalled.0.is_zero() && options.stalled < Span::millis(50) {
        wrong("stalled".into(), "must be 0 or at least 50ms".into());
    }
    for (index, peer) in options.peers.iter().enumerate() {
        let name = peer.strip_prefix("*.").unwrap_or(peer);
        if !identity(name) {
            wrong(format!("peers[{index}]"), format!("`{peer}` is no host name and no `*.name`"));
        }
    }
    if options.peer_connections == 0 {
        wrong("peer_connections".into(), "must be at least 1".into());
    }
    for (index, entry) in options.answer_timeouts.iter().enumerate() {
        if entry.timeout.0.is_zero() || entry.timeout > Span::secs(300) {
            let path = format!("answer_timeouts[{index}].timeout");
            wrong(path, "must be over 0 and at most 5m".into());
        }
        if entry.priority.is_some_and(|priority| priority > 15) {
            let path = format!("answer_timeouts[{index}].priority");
            wrong(path, "must be from 0 to 15 (RFC 7944 9.1)".into());
        }
    }
    for (path, rates) in [("ingress", options.ingress), ("egress", options.egress)] {
        let Some(rates) = rates else { continue };
        if rates.max == 0 || rates.reserved > rates.max {
            wrong(path.into(), "`max` must be over 0 and `reserved` at most `max`".into());
        }
    }
    if options.bindings.missing != 0 && !(3_000..6_000).contains(&options.bindings.missing) {
        let message = "must be 0 or a result code from 3000 to 5999".into();
        wrong("bindings.missing".into(), message);
    }
    if options.duplicates > Span::secs(600) {
        wrong("duplicates".into(), "must be at most 10m (RFC 6733 3 says 4 minutes)".into());
    }
    let realm = if options.origin_realm.is_empty() { &scope.realm } else { &options.origin_realm };
    let mut unfit = Vec::new();
    let dictionary = options.mediation.dictionary(&mut unfit);
    let dictionary = &*dictionary;
    let _checked =
        crate::mediation::Changes::new(&options.mediation, realm, dictionary, &mut unfit);
    for (index, (route, _)) in scope.routes.iter().enumerate() {
        for (path, message) in route.check(dictionary) {
            wrong(format!("routes[{index}].match.{path}"), message);
        }
        let place = format!("routes[{index}].rules");
        let _checked = Mediation::new(&route.rules, dictionary, &place, &mut unfit);
    }
    for error in unfit {
        wrong(error.path, error.message);
    }
    let mut names = |path: String, list: &[Application]| {
        for (index, application) in list.iter().enumerate() {
            if let Err(message) = naming::application(dictionary, application) {
                wrong(format!("{path}[{index}]"), message);
            }
        }
    };
    names("applications".into(), &options.applications);
    names("stateless".into(), &options.stateless);
    names("bindings.create".into(), &options.bindings.create);
    names("bindings.follow".into(), &options.bindings.follow);
    for (index, entry) in options.answer_timeouts.iter().enumerate() {
        names(format!("answer_timeouts[{index}].application"), &entry.application);
    }
    for (index, entry) in options.reroute_on.iter().enumerate() {
        if let Reroute::Of { application, .. } = entry {
            let path = format!("reroute_on[{index}].application");
            names(path, std::slice::from_ref(application));
        }
    }
    for (index, entry) in options.answer_timeouts.iter().enumerate() {
        for (at, command) in entry.command.iter().enumerate() {
            if let Err(message) = naming::commands(dictionary, command) {
                wrong(format!("answer_timeouts[{index}].command[{at}]"), message);
            }
        }
    }
    if let Some(hedge) = &options.hedge {
        if hedge.commands.is_empty() {
            wrong("hedge.commands".into(), "names no command: nothing would be hedged".into());
        }
        if hedge.after < Span::millis(1) || hedge.after > Span::secs(10) {
            wrong("hedge.after".into(), "must be from 1ms to 10s".into());
        }
        for (at, command) in hedge.commands.iter().enumerate() {
            let path = format!("hedge.commands[{at}]");
            match naming::commands(dictionary, command) {
                Ok(codes) if codes.contains(&CREDIT_CONTROL) => wrong(
                    path,
                    "credit control is never done twice: two servers would both charge".into(),
                ),
                Ok(_) => {}
                Err(message) => wrong(path, message),
            }
        }
    }
    errors
}
