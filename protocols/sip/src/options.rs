//! A SIP listener's options and its routes' matches.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use strowger_contract::duration::Span;
use strowger_contract::{OptionsError, Scope};

use crate::access::{Network, any};
pub use crate::hedge::Hedge;
use crate::hide::TopologyHiding;
use crate::limit::Rate;
use crate::overload::OverloadControl;
use crate::rules::HeaderRule;
use crate::scan::{Scan, find};
use crate::uri::{Uri, parse_ip};

/// Whether transactions are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// RFC 3261 16: retransmissions absorbed, fail-over, timers.
    #[default]
    Stateful,
    /// RFC 3261 16.11: each message by itself.
    Stateless,
}

/// Whether REGISTER gets a Path (RFC 3327), so that what is for its user comes back this way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PathMode {
    /// Never.
    Never,
    /// If the client says that it knows `path` or `outbound`, or its Contact has a `reg-id`.
    #[default]
    Supported,
    /// Always. A registrar that does not know Path ignores it.
    Always,
}

/// Over what a request for a `sips:` URI may go on (RFC 3261 26.2.2, RFC 5630).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Sips {
    /// TLS only; where there is none, 480 with warning 380.
    #[default]
    Tls,
    /// Anything: the way to the instances is secured otherwise.
    Any,
}

/// How many instances a request that begins something is sent to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Fork {
    /// One; others only when it fails.
    #[default]
    None,
    /// Several at once: the first that answers well wins.
    Parallel,
    /// One after the other, until one answers well.
    Serial,
}

/// What becomes of a request that is kept out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Refuse {
    /// Nothing: whoever scans learns nothing.
    #[default]
    Drop,
    /// 403.
    Answer,
}

/// Who may use the listener.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Access {
    /// If given, only these networks (and the pools' instances).
    pub allow: Vec<Network>,
    /// Not these.
    pub deny: Vec<Network>,
    /// `drop` (default) or `answer` (403).
    pub refuse: Refuse,
}

/// How much is taken from whom. A rate is `{ per_second, burst }`; what is over it gets 503 with
/// Retry-After. Dialogs' requests, ACK, CANCEL, answers and emergency calls are never limited.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Requests that begin something, by source address; `peers` are exempt.
    pub per_source: Option<Rate>,
    /// By From's URI: one subscriber, wherever the requests come from.
    pub per_caller: Option<Rate>,
    /// By method, over the listener's worker: `INVITE: { per_second: 100, burst: 200 }`.
    pub per_method: std::collections::BTreeMap<String, Rate>,
    /// Messages of any kind by source address; what is over it is dropped unread. `peers` are
    /// exempt.
    pub flood: Option<Rate>,
}

/// What is said when a pool has nobody to take a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Unavailable {
    /// The answer's code, 400 to 699.
    pub code: u16,
    /// Its Retry-After; 0: none.
    pub retry_after: Span,
}

impl Default for Unavailable {
    fn default() -> Self {
        Self { code: 503, retry_after: Span::secs(1) }
    }
}

/// A SIP listener's options.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SipOptions {
    /// `stateful` (default) or `stateless`.
    pub mode: Mode,
    /// Stay on the path of dialogs, so that each request of one reaches the instance that has it.
    pub record_route: bool,
    /// Further host names, or host:port, that mean this edge.
    pub aliases: Vec<String>,
    /// RFC 3261 17: the round-trip estimate; retransmissions and Timers B, F, H follow from it.
    pub t1: Span,
    /// RFC 3261 17: the longest interval between retransmissions.
    pub t2: Span,
    /// RFC 3261 17: how long a message may stay in the network.
    pub t4: Span,
    /// RFC 3261 16.6 step 11: how long an INVITE may ring; over three minutes.
    pub timer_c: Span,
    /// An instance that gives no sign of life for so long loses the request to the next. The time
    /// shrinks with what the instance usually takes, down to `failover_min`.
    pub failover_timeout: Span,
    /// The least that an instance is waited for; equal to `failover_timeout`: the time is fixed.
    pub failover_min: Span,
    /// Final answers, besides silence and lost connections, after which another instance is tried;
    /// each 300 to 699.
    pub failover_codes: Vec<u16>,
    /// An instance that answers 503 with Retry-After gets nothing new for that long, but never
    /// longer than this, and not if all others rest too.
    pub retry_after_max: Span,
    /// Pass an instance's 503 on to clients as it is, instead of as 500 (RFC 3261 16.7 step 6).
    pub forward_503: bool,
    /// What is said when a pool has nobody.
    pub unavailable: Unavailable,
    /// `none` (default), `parallel` or `serial`: forking of requests that begin something.
    pub fork: Fork,
    /// How many instances a request is forked to, 2 to 8.
    pub fork_targets: u8,
    /// Ask where 3xx answers point to (RFC 3261 16.5), instead of passing them on.
    pub recurse: bool,
    /// UDP requests over so many bytes go over TCP if the other side takes it (RFC 3261 18.1.1);
    /// 0: never.
    pub udp_max: u32,
    /// Remember where REGISTER went, and send requests for that user there.
    pub aor_affinity: bool,
    /// `supported` (default), `always` or `never`: Path in REGISTER (RFC 3327), with the client's flow
    /// (RFC 5626).
    pub path: PathMode,
    /// Transactions at a time, per worker; more are refused with 503.
    pub max_transactions: u32,
    /// Note a record of each call for CDRs and the dialog list.
    pub cdr: bool,
    /// Networks whose asserted identities are believed and who see them (RFC 3325). Others'
    /// P-Asserted-Identity is taken out. Not given: nothing is taken out.
    pub trusted: Option<Vec<Network>>,
    /// Networks of neighbours (SBCs, other proxies) that many users stand behind: no limit by source
    /// address holds for them.
    pub peers: Vec<Network>,
    /// Who may use the listener.
    pub access: Access,
    /// Requests whose User-Agent contains one of these words (in any letter case) are dropped without an
    /// answer.
    pub scanners: Vec<String>,
    /// How much is taken from whom.
    pub limits: Limits,
    /// RFC 7339: `oc` towards neighbours and instances.
    pub overload_control: OverloadControl,
    /// What a `sips:` Request-URI needs of an instance: `tls` (default), or `any` where the way to them
    /// is secured otherwise.
    pub sips: Sips,
    /// Who does not see the other side's addresses; not given: nothing is hidden.
    pub topology_hiding: Option<TopologyHiding>,
    /// Requests that a second instance is asked for when the first is slow; not given: none.
    pub hedge: Option<Hedge>,
    /// Headers to add, set or remove, in order.
    pub header_rules: Vec<HeaderRule>,
}

impl Default for SipOptions {
    fn default() -> Self {
        Self {
            mode: Mode::Stateful,
            record_route: true,
            aliases: Vec::new(),
            t1: Span::millis(500),
            t2: Span::secs(4),
            t4: Span::secs(5),
            timer_c: Span::secs(185),
            failover_timeout: Span::secs(2),
            failover_min: Span::millis(200),
            failover_codes: vec![503],
            retry_after_max: Span::secs(30),
            forward_503: false,
            unavailable: Unavailable::default(),
            fork: Fork::None,
            fork_targets: 2,
            recurse: false,
            udp_max: 1_300,
            aor_affinity: false,
            path: PathMode::Supported,
            max_transactions: 200_000,
            cdr: false,
            trusted: None,
            peers: Vec::new(),
            access: Access::default(),
            scanners: [
                "friendly-scanner",
                "sipvicious",
                "sipcli",
                "sip-scan",
                "sundayddr",
                "iWar",
                "VaxSIPUserAgent",
                "pplsip",
            ]
            .map(str::to_owned)
            .to_vec(),
            limits: Limits::default(),
            overload_control: OverloadControl::default(),
            sips: Sips::Tls,
            topology_hiding: None,
            hedge: None,
            header_rules: Vec::new(),
        }
    }
}

/// What a route matches. All that is given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SipMatch {
    /// One of these methods.
    pub method: Vec<String>,
    /// One of these hosts in the Request-URI.
    pub domain: Vec<String>,
    /// The Request-URI's user (or a `tel:` number) begins with one of these.
    pub user_prefix: Vec<String>,
    /// It came over one of these: `udp`, `tcp`, `tls`, `ws`, `wss`.
    pub transport: Vec<String>,
    /// It came from one of these networks.
    pub source: Vec<Network>,
    /// All of these headers are there; one that has text contains it.
    pub header: std::collections::BTreeMap<String, String>,
    /// The Request-URI begins with one of these, in any case: `urn:service:counseling`.
    pub uri_prefix: Vec<String>,
    /// Whether it belongs to a dialog (its To has a tag); if not given, either.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_dialog: Option<bool>,
}

/// What a route is matched against.
pub(crate) struct Matched<'a> {
    pub(crate) message: &'a [u8],
    pub(crate) scan: &'a Scan,
    pub(crate) method: &'a [u8],
    pub(crate) uri: &'a [u8],
    pub(crate) transport: &'a str,
    pub(crate) source: std::net::IpAddr,
}

impl SipMatch {
    /// Whether a request matches.
    #[must_use]
    pub(crate) fn matches(&self, request: &Matched<'_>) -> bool {
        let uri = Uri::parse(request.uri);
        let user = || match uri {
            Some(uri) => uri.user,
            None => request.uri.strip_prefix(b"tel:"),
        };
        let one_of = |list: &[String], holds: &dyn Fn(&str) -> bool| {
            list.is_empty() || list.iter().any(|text| holds(text))
        };
        one_of(&self.method, &|text| text.as_bytes() == request.method)
            && one_of(&self.domain, &|text| {
                uri.is_some_and(|uri| uri.host.eq_ignore_ascii_case(text.as_bytes()))
            })
            && one_of(&self.user_prefix, &|text| {
                user().is_some_and(|user| user.starts_with(text.as_bytes()))
            })
            && one_of(&self.uri_prefix, &|text| {
                request
                    .uri
                    .get(..text.len())
                    .is_some_and(|start| start.eq_ignore_ascii_case(text.as_bytes()))
            })
            && self.in_dialog.is_none_or(|wanted| {
                let to = request.scan.value(request.message, crate::scan::Name::To);
                wanted == to.and_then(crate::uri::tag).is_some()
            })
            && one_of(&self.transport, &|text| text == request.transport)
            && (self.source.is_empty() || any(&self.source, request.source))
            && self.header.iter().all(|(name, text)| {
                find(request.message, request.scan, name.as_bytes()).is_some_and(|value| {
                    text.is_empty() || memchr::memmem::find(value, text.as_bytes()).is_some()
                })
            })
    }
}

/// Finds what types cannot.
pub(crate) fn check(scope: &Scope<SipMatch>, options: &SipOptions) -> Vec<OptionsError> {
    let mut errors = Vec::new();
    times(options, &mut errors);
    let mut wrong =
        |path: &str, message: String| errors.push(OptionsError { path: path.to_owned(), message });
    if options.max_transactions == 0 {
        wrong("max_transactions", "must be at least 1".into());
    }
    if !(2..=8).contains(&options.fork_targets) {
        wrong("fork_targets", "must be 2 to 8".into());
    }
    for (index, code) in options.failover_codes.iter().enumerate() {
        if !(300..700).contains(code) {
            wrong(
                &format!("failover_codes[{index}]"),
                format!("{code} is no final answer that refuses; write 300 to 699"),
            );
        } else if matches!(code, 401 | 407) {
            wrong(
                &format!("failover_codes[{index}]"),
                format!("{code} asks for credentials; another instance would ask again"),
            );
        }
    }
    if !(400..700).contains(&options.unavailable.code) {
        wrong("unavailable.code", "must be 400 to 699".into());
    }
    if options.udp_max != 0 && !(500..=65_000).contains(&options.udp_max) {
        wrong("udp_max", "must be 0 (never) or 500 to 65000; RFC 3261 18.1.1 says 1300".into());
    }
    if options.topology_hiding.is_some() && !options.record_route {
        let why = "needs `record_route: true`: what is hidden is read here when it comes back";
        wrong("topology_hiding", why.into());
    }
    if options.mode == Mode::Stateless {
        stateless(options, &mut wrong);
    }
    for (index, word) in options.scanners.iter().enumerate() {
        if word.is_empty() {
            wrong(&format!("scanners[{index}]"), "is empty and would match everybody".into());
        }
    }
    rates(&options.limits, &mut wrong);
    if let Some(message) = options.overload_control.check() {
        wrong("overload_control.validity", message);
    }
    if let Some((path, message)) = options.hedge.as_ref().and_then(Hedge::check) {
        wrong(&format!("hedge{path}"), message);
    }
    if options.header_rules.len() > crate::rules::RULES_MAX {
        wrong("header_rules", format!("over {} rules", crate::rules::RULES_MAX));
    }
    for (index, rule) in options.header_rules.iter().enumerate() {
        for (path, message) in rule.check() {
            wrong(&format!("header_rules[{index}]{path}"), message);
        }
    }
    for (index, (route, _)) in scope.routes.iter().enumerate() {
        for (place, transport) in route.transport.iter().enumerate() {
            let known = ["udp", "tcp", "tls", "ws", "wss"];
            let path = format!("routes[{index}].match.transport[{place}]");
            if !known.contains(&transport.as_str()) {
                wrong(
                    &path,
                    format!("`{transport}` is no transport of SIP; write udp, tcp, tls, ws or wss"),
                );
            } else if !scope.sockets.iter().any(|socket| socket.transport.scheme() == transport) {
                wrong(
                    &path,
                    format!("the listener binds no {transport} address: this matches nothing"),
                );
            }
        }
        for name in route.header.keys() {
            if name.is_empty() || !name.bytes().all(crate::scan::is_token) {
                wrong(
                    &format!("routes[{index}].match.header"),
                    format!("`{name}` is no header name"),
                );
            }
        }
    }
    for (index, alias) in options.aliases.iter().enumerate() {
        if crate::uri::split_host_port(alias.as_bytes()).is_none() {
            wrong(
                &format!("aliases[{index}]"),
                format!("`{alias}` is neither a host nor host:port"),
            );
        }
    }
    for socket in &scope.sockets {
        let wildcard = socket.address.ip().is_unspecified() && socket.advertise.is_none();
        if wildcard {
            wrong(
                "",
                format!(
                    "{} is bound to every address: say with `advertise` which one peers should answer to",
                    socket.address
                ),
            );
        }
        if let Some(advertise) = &socket.advertise
            && crate::uri::split_host_port(advertise.as_bytes()).is_none()
            && parse_ip(advertise.as_bytes()).is_none()
        {
            wrong("", format!("advertise `{advertise}` is neither a host nor host:port"));
        }
    }
    errors
}

fn times(options: &SipOptions, errors: &mut Vec<OptionsError>) {
    let mut wrong =
        |path: &str, message: String| errors.push(OptionsError { path: path.to_owned(), message });
    if options.t1.0.is_zero() || options.t1 > Span::secs(10) {
        wrong("t1", "must be over 0 and at most 10s (RFC 3261 says 500ms)".into());
    }
    if options.t2 < options.t1 {
        wrong("t2", "must be at least t1".into());
    }
    if options.timer_c <= Span::secs(180) {
        wrong("timer_c", "must be over 180s (RFC 3261 16.6 step 11)".into());
    }
    if options.failover_timeout < options.t1 || options.failover_timeout.0 > options.t1.0 * 64 {
        wrong("failover_timeout", "must be between t1 and 64 x t1".into());
    }
    if options.failover_min < Span::millis(10) || options.failover_min > options.failover_timeout {
        wrong("failover_min", "must be between 10ms and failover_timeout".into());
    }
    if options.retry_after_max > Span::secs(3_600) {
        wrong("retry_after_max", "must be at most 1h".into());
    }
    if options.unavailable.retry_after > Span::secs(86_400) {
        wrong("unavailable.retry_after", "must be at most 1d".into());
    }
}

/// What needs a transaction does not go with a listener that keeps none.
fn stateless(options: &SipOptions, wrong: &mut dyn FnMut(&str, String)) {
    let needs = [
        ("fork", options.fork != Fork::None),
        ("recurse", options.recurse),
        ("cdr", options.cdr),
        ("aor_affinity", options.aor_affinity),
        ("hedge", options.hedge.is_some()),
    ];
    for (path, given) in needs {
        if given {
            wrong(path, "needs `mode: stateful`".into());
        }
    }
}

fn rates(limits: &Limits, wrong: &mut dyn FnMut(&str, String)) {
    let one = [
        ("per_source", &limits.per_source),
        ("per_caller", &limits.per_caller),
        ("flood", &limits.flood),
    ];
    for (name, rate) in one {
        if let Some(message) = rate.as_ref().and_then(Rate::check) {
            wrong(&format!("limits.{name}"), message);
        }
    }
    for (method, rate) in &limits.per_method {
        let path = format!("limits.per_method.{method}");
        if let Some(message) = rate.check() {
            wrong(&path, message);
        }
        if matches!(method.as_str(), "ACK" | "CANCEL") {
            wrong(&path, format!("{method} is never limited: it ends what is under way"));
        } else if method.is_empty() || !method.bytes().all(crate::scan::is_token) {
            wrong(&path, format!("`{method}` is no method"));
        }
    }
}
