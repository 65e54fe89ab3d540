//! The manifest: what is to run. Its types are what `strowger schema agent` prints.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use strowger_contract::duration::Span;

use crate::control::reach::{Target, Trust};
use crate::control::registry::{LEASE_MAX_MS, LEASE_MIN_MS};
use crate::routing::TlsClientSpec;

/// Instances of an application on one host, at most.
pub(crate) const INSTANCES_MAX: u32 = 256;

/// A manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always 1.
    pub version: u32,
    /// The edges that instances are registered with: `http://127.0.0.1:9080`.
    #[serde(default)]
    pub edges: Vec<EdgeAddress>,
    /// Backing services that applications may bind, by name.
    #[serde(default)]
    pub services: BTreeMap<String, Service>,
    /// The applications, by name.
    #[serde(default)]
    pub apps: BTreeMap<String, App>,
}

/// An edge's admin API.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EdgeAddress {
    /// `http://127.0.0.1:9080`, or `https://edge-1.example.net:9443`.
    pub url: String,
    /// A file with the API's token; read anew for each request, so that it may be rotated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// Over https: the authority that vouches for the edge (PEM). Certificates and keys are read anew
    /// when they change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// Over https: what the edge's certificate must name, if not the URL's host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Over https: our own certificate's chain (PEM), for edges that ask for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<PathBuf>,
    /// Its key (PEM).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
}

impl EdgeAddress {
    /// Where it is, and what TLS to it rests on.
    ///
    /// # Errors
    /// What is wrong with the URL, or missing.
    pub(crate) fn reach(&self) -> Result<(Target, Option<TlsClientSpec>), String> {
        let target = Target::parse(&self.url)?;
        let trust = Trust {
            ca: self.ca.as_deref(),
            name: self.name.as_deref(),
            certificate: self.certificate.as_deref(),
            key: self.key.as_deref(),
        };
        let spec = trust.of(&target)?;
        Ok((target, spec))
    }
}

/// A backing service, attached by name (twelve factors, IV). Each field becomes
/// `NAME_FIELD` in the environment and a file in the bindings' directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Service {
    /// What kind it is: `postgresql`, `hss`.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Plain values: host, port, uri.
    pub values: BTreeMap<String, Scalar>,
    /// Values that stand in files (passwords); they never stand in the environment.
    pub files: BTreeMap<String, PathBuf>,
}

/// Text, or a number or truth value that is meant as text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Scalar {
    /// Text.
    Text(String),
    /// A whole number.
    Number(i64),
    /// True or false.
    Truth(bool),
}

impl std::fmt::Display for Scalar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Number(number) => write!(f, "{number}"),
            Self::Truth(truth) => write!(f, "{truth}"),
        }
    }
}

/// An application: one kind of process, some instances of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct App {
    /// The program and its arguments; `${PORT_SIP}` and other variables are filled in.
    pub exec: Vec<String>,
    /// The directory that is released; without it the program stands on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<ReleaseSource>,
    /// How many run.
    #[serde(default = "one")]
    pub instances: u32,
    /// The address that instances listen on and are registered with.
    #[serde(default = "loopback")]
    pub host: IpAddr,
    /// The ports that each instance gets, by name: `$PORT_NAME`; the first is `$PORT` too.
    #[serde(default)]
    pub ports: BTreeMap<String, Port>,
    /// The environment (III). `${NAME}` takes the agent's own variable, `${NAME:-default}` has a
    /// default; one that is not set is an error.
    #[serde(default)]
    pub env: BTreeMap<String, Scalar>,
    /// Files that the instance finds copies of in `$CREDENTIALS_DIRECTORY`, by name.
    #[serde(default)]
    pub secrets: BTreeMap<String, PathBuf>,
    /// What is done when a secret's or binding's file changes.
    #[serde(default)]
    pub on_secret_change: OnSecretChange,
    /// Backing services that it is bound to.
    #[serde(default)]
    pub bind: Vec<String>,
    /// What each instance may use.
    #[serde(default)]
    pub resources: Resources,
    /// Where on the host.
    #[serde(default)]
    pub placement: Placement,
    /// How its health is known.
    #[serde(default)]
    pub health: Health,
    /// What happens when it ends by itself.
    #[serde(default)]
    pub restart: Restart,
    /// The pools that it is registered in, by name.
    #[serde(default)]
    pub register: BTreeMap<String, Register>,
    /// How it is stopped.
    #[serde(default)]
    pub drain: Drain,
    /// How a new release comes in.
    #[serde(default)]
    pub rollout: RolloutPlan,
    /// How many instances, by load.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscale: Option<Autoscale>,
    /// Where its output goes.
    #[serde(default)]
    pub logs: Logs,
}

fn one() -> u32 {
    1
}

fn loopback() -> IpAddr {
    IpAddr::from([127, 0, 0, 1])
}

/// What is released.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReleaseSource {
    /// The directory; it is copied into the agent's releases, and the program runs in the copy.
    pub dir: PathBuf,
    /// `sha256:…` that the directory must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// The revision that it was built from (I); shown, and in `$RELEASE_GIT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub git: Option<String>,
}

/// A port of each instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// `sip`, `diameter`, `tcp`, `udp`; `http` and others are never registered.
    pub protocol: String,
    /// `udp`, `tcp`, `tls`, or `unix`: then it is a path, `$SOCKET_NAME`.
    #[serde(default)]
    pub transport: PortTransport,
    /// This port and no other: for one instance only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fixed: Option<u16>,
    /// The agent opens the socket and hands it over (`LISTEN_FDS`, sd_listen_fds(3)): it stays open
    /// while the instance is started again.
    #[serde(default)]
    pub listen: bool,
}

/// What a port is of.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Serialize,
    Deserialize,
    JsonSchema,
    Hash,
    PartialOrd,
    Ord,
)]
#[serde(rename_all = "lowercase")]
pub enum PortTransport {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// TLS over TCP.
    Tls,
    /// A unix socket, for edges on this host.
    Unix,
}

impl PortTransport {
    pub(crate) fn scheme(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Tls => "tls",
            Self::Unix => "unix",
        }
    }
}

/// What is done when a secret changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnSecretChange {
    /// The copies are replaced and the instance gets SIGHUP.
    #[default]
    Reload,
    /// The copies are replaced.
    Nothing,
}

/// What an instance may use. Without rights to cgroups, what can be is held by rlimits, and
/// `status` says what is not.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Resources {
    /// CPUs' worth of time: 0.5 is half of one. Changes apply to what runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<f64>,
    /// Memory: `256Mi`. Changes apply to what runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
    /// Processes and threads. Changes apply to what runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pids: Option<u32>,
    /// Open files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub files: Option<u64>,
    /// CPUs that it runs on: `0`, `0-3`, `0,2`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<String>,
}

/// Where on the host an instance runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Placement {
    /// On the same CPUs as these applications.
    pub colocate_with: Vec<String>,
    /// On other CPUs than these applications; its own name keeps its instances apart.
    pub anti_affinity: Vec<String>,
}

/// How an instance's health is known.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Health {
    /// It has started when this succeeds once; if it does not `within`, it is started anew.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub startup: Option<Check>,
    /// It gets new sessions while this succeeds. Never restarts it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready: Option<Check>,
    /// It is started anew when this fails `fall` times. Never takes it out of a pool before that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub live: Option<Check>,
}

/// One check: exactly one of `exec`, `tcp`, `http`, `sip_options`, `diameter`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Check {
    /// A program that must end with 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<Vec<String>>,
    /// A port's name: it must accept connections.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<String>,
    /// It must answer with 2xx.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpCheck>,
    /// A port's name: it must answer OPTIONS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sip_options: Option<String>,
    /// A port's name: it must answer CER with 2001, and DWR.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diameter: Option<String>,
    /// How often.
    #[serde(default = "every")]
    pub every: Span,
    /// How long an answer may take.
    #[serde(default = "timeout")]
    pub timeout: Span,
    /// Failures in a row until it counts.
    #[serde(default = "three")]
    pub fall: u32,
    /// Successes in a row until it counts.
    #[serde(default = "one")]
    pub rise: u32,
    /// Of `startup`: how long it may take in all.
    #[serde(default = "within")]
    pub within: Span,
}

fn every() -> Span {
    Span::secs(2)
}

fn timeout() -> Span {
    Span::secs(1)
}

fn three() -> u32 {
    3
}

fn within() -> Span {
    Span::secs(30)
}

/// An HTTP request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HttpCheck {
    /// A port's name.
    pub port: String,
    /// The path.
    #[serde(default = "slash")]
    pub path: String,
}

fn slash() -> String {
    "/".to_owned()
}

/// What happens when a process ends by itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Restart {
    /// The first pause; it doubles with each further failure.
    pub backoff: Span,
    /// The longest pause.
    pub backoff_max: Span,
    /// Percent that a pause is longer or shorter by chance, so that not all come back at once.
    pub jitter_percent: u32,
    /// So many failures …
    pub crash_loop: u32,
    /// … in so long are a crash loop.
    pub crash_window: Span,
    /// After how long in a crash loop it is tried again; 0: not before the next `apply`.
    pub crash_retry: Span,
}

impl Default for Restart {
    fn default() -> Self {
        Self {
            backoff: Span::millis(500),
            backoff_max: Span::secs(30),
            jitter_percent: 20,
            crash_loop: 5,
            crash_window: Span::secs(60),
            crash_retry: Span::secs(300),
        }
    }
}

/// How an instance is registered in a pool.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Register {
    /// The ports; all that a pool can use, if none are named.
    pub ports: Vec<String>,
    /// Its share.
    pub weight: u32,
    /// Lower is preferred.
    pub priority: u16,
    /// Its slots.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capacity: Option<u32>,
    /// The lease's time.
    pub lease: Span,
    /// What it calls itself in a capabilities exchange; `${INSTANCE_ID}` is filled in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diameter_origin_host: Option<String>,
    /// The zone that edges are told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
}

impl Default for Register {
    fn default() -> Self {
        Self {
            ports: Vec::new(),
            weight: 100,
            priority: 1,
            capacity: None,
            lease: Span::secs(15),
            diameter_origin_host: None,
            zone: None,
        }
    }
}

/// How an instance is stopped: no new sessions at any edge, wait until all report none, hook, SIGTERM,
/// SIGKILL.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Drain {
    /// How long sessions may last at most.
    pub deadline: Span,
    /// A program that runs before SIGTERM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pre_stop: Option<Vec<String>>,
    /// How long that may take.
    pub pre_stop_timeout: Span,
    /// From SIGTERM to SIGKILL.
    pub kill_after: Span,
    /// An edge that has not answered for so long is not waited for; 0: each is, until the deadline.
    pub lost_edge: Span,
}

impl Default for Drain {
    fn default() -> Self {
        Self {
            deadline: Span::secs(3_600),
            pre_stop: None,
            pre_stop_timeout: Span::secs(30),
            kill_after: Span::secs(10),
            lost_edge: Span::secs(0),
        }
    }
}

/// How a new release comes in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RolloutPlan {
    /// One by one, all at once beside the old ones, or a share of new sessions first.
    pub strategy: Strategy,
    /// Of `rolling`: so many new ones at a time.
    pub max_in_flight: u32,
    /// Of `canary`: percent of new sessions, by a hash of the session's key.
    pub steps: Vec<u32>,
    /// How long a new instance must be ready before it counts.
    pub min_healthy_time: Span,
    /// How long a new instance may take to become ready.
    pub healthy_deadline: Span,
    /// Of `canary` and `blue-green`: how long each step is watched.
    pub hold: Span,
    /// How long a step may take in all, until its samples are enough; then the rollout pauses.
    pub progress_deadline: Span,
    /// What the edges' figures must be.
    pub gate: Gate,
    /// Whether a failure goes back to the old release by itself.
    pub auto_rollback: bool,
}

impl Default for RolloutPlan {
    fn default() -> Self {
        Self {
            strategy: Strategy::Rolling,
            max_in_flight: 1,
            steps: vec![5, 25],
            min_healthy_time: Span::secs(2),
            healthy_deadline: Span::secs(60),
            hold: Span::secs(60),
            progress_deadline: Span::secs(600),
            gate: Gate::default(),
            auto_rollback: true,
        }
    }
}

/// How a release comes in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Some at a time.
    #[default]
    Rolling,
    /// All beside the old ones, then a switch; the old ones stay for `hold`.
    BlueGreen,
    /// A growing share of new sessions.
    Canary,
}

/// What a new release's figures must be, over the edges' last minute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Gate {
    /// Percent of requests that may miss their deadline.
    pub max_miss_percent: f64,
    /// How many times the old release's share of misses; 0: not compared.
    pub max_vs_baseline: f64,
    /// Requests that a judgement needs.
    pub min_samples: u64,
}

impl Default for Gate {
    fn default() -> Self {
        Self { max_miss_percent: 1.0, max_vs_baseline: 2.0, min_samples: 100 }
    }
}

/// How many instances, by load.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Autoscale {
    /// At least.
    #[serde(default = "one")]
    pub min: u32,
    /// At most.
    pub max: u32,
    /// Sessions that one instance should hold.
    pub sessions_per_instance: u64,
    /// Percent of requests that miss their deadline, from which another one is started.
    #[serde(default = "default_miss")]
    pub miss_percent: f64,
    /// At least so long between two that are started.
    #[serde(default = "out_cooldown")]
    pub out_cooldown: Span,
    /// So long there must have been one too many.
    #[serde(default = "in_cooldown")]
    pub in_cooldown: Span,
}

fn default_miss() -> f64 {
    1.0
}

fn out_cooldown() -> Span {
    Span::secs(15)
}

fn in_cooldown() -> Span {
    Span::secs(300)
}

/// Where an instance's output goes: one JSON object a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Logs {
    /// Bytes of the newest output that are kept for `strowger agent logs`: `4Mi`.
    pub ring: String,
    /// A directory for files besides, `APP/INSTANCE.log`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub files: Option<PathBuf>,
    /// A file's size, until it is rotated.
    pub file_bytes: String,
    /// How many rotated files are kept.
    pub keep: u32,
    /// A syslog server (RFC 5424 over UDP): `127.0.0.1:514`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub syslog: Option<std::net::SocketAddr>,
}

impl Default for Logs {
    fn default() -> Self {
        Self {
            ring: "4Mi".to_owned(),
            files: None,
            file_bytes: "16Mi".to_owned(),
            keep: 4,
            syslog: None,
        }
    }
}

/// Bytes: `4096`, `256Ki`, `64Mi`, `2Gi`.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is no size; write bytes, or 256Ki, 64Mi, 2Gi");
    let digits = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    let shift = match &text[digits..] {
        "" => 0,
        "Ki" => 10,
        "Mi" => 20,
        "Gi" => 30,
        _ => return Err(wrong()),
    };
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

/// A cpuset: `0`, `0-3`, `0,2`.
pub(crate) fn cpus(text: &str) -> Result<Vec<usize>, String> {
    let wrong = || format!("`{text}` is no list of CPUs; write 0, 0-3 or 0,2");
    let mut found = Vec::new();
    for part in text.split(',') {
        let (low, high) = part.split_once('-').unwrap_or((part, part));
        let (low, high): (usize, usize) =
            (low.trim().parse().map_err(|_| wrong())?, high.trim().parse().map_err(|_| wrong())?);
        if low > high || high >= 1_024 {
            return Err(wrong());
        }
        found.extend(low..=high);
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// Whether a lease's time is one that edges take.
pub(crate) fn lease_is_fine(lease: Span) -> bool {
    let millis = lease.0.as_millis();
    (u128::from(LEASE_MIN_MS)..=u128::from(LEASE_MAX_MS)).contains(&millis)
}
