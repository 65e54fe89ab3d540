//! Pools and their backends.

use std::collections::HashMap;
use std::time::Duration;

use strowger_contract::{LANES_MAX, Transport};

use super::endpoint::endpoint;
use super::read::{Fields, Reader};
use super::tls;
use super::tree::{Entry, Kind, Node};
use crate::control::providers::DnsPoolSettings;
use crate::routing::{
    BackendSpec, Balance, HealthSpec, InstanceState, Policy, PoolSpec, QosSpec, SendProxy,
};

/// Backends in one pool, at most: the Maglev table is meant for hundreds of places each.
const BACKENDS_MAX: usize = 20_000;

/// `session.ttl`, at most: longer than any call or credit session lives.
const SESSION_TTL_MAX: Duration = Duration::from_secs(90 * 86_400);

/// The generic health check: the backend takes a connection.
pub(super) const TCP_CONNECT: &str = "tcp-connect";

/// How long an instance that DNS no longer names keeps its sessions: a SIP transaction's 32 s.
const DNS_GRACE: Duration = Duration::from_secs(60);

/// How `balance` is written.
pub(super) const BALANCES: [(&str, Balance); 5] = [
    ("hash", Balance::Hash),
    ("least-loaded", Balance::LeastLoaded),
    ("weighted-random", Balance::WeightedRandom),
    ("round-robin", Balance::RoundRobin),
    ("priority", Balance::Priority),
];

/// How `qos.policy` is written.
pub(super) const POLICIES: [(&str, Policy); 2] =
    [("deadline", Policy::Deadline), ("fifo", Policy::Fifo)];

/// How `send_proxy` is written.
pub(super) const SEND_PROXY: [(&str, SendProxy); 3] =
    [("none", SendProxy::Off), ("v1", SendProxy::V1), ("v2", SendProxy::V2)];

/// How `state` is written. `gone` is not: one leaves it out instead.
const STATES: [(&str, InstanceState); 5] = [
    ("ready", InstanceState::Ready),
    ("starting", InstanceState::Starting),
    ("canary", InstanceState::Canary),
    ("suspended", InstanceState::Suspended),
    ("draining", InstanceState::Draining),
];

/// A pool and where it stands, until all files are read.
pub(super) struct RawPool {
    pub(super) spec: PoolSpec,
    pub(super) file: String,
    pub(super) node: Node,
}

impl RawPool {
    /// The value at `path` under the pool, for messages.
    pub(super) fn at(&self, path: &str) -> &Node {
        self.node.at(path)
    }
}

/// Reads one pool.
pub(super) fn pool(reader: &mut Reader, entry: &Entry, path: &str) -> Option<PoolSpec> {
    const KEYS: [&str; 16] = [
        "balance",
        "bounded_load",
        "session",
        "health",
        "outlier",
        "slow_start",
        "drain",
        "debounce",
        "panic_percent",
        "backends",
        "qos",
        "bind_keys",
        "connections",
        "tls",
        "send_proxy",
        "dns",
    ];
    let fields = reader.fields(&entry.value, path, &KEYS)?;
    let mut pool = default_pool(&entry.key);
    qos(reader, &fields, &mut pool.qos);
    pool.balance = fields.choice(reader, "balance", &BALANCES).unwrap_or_default();
    pool.tls = tls::client(reader, &fields);
    pool.send_proxy = fields.choice(reader, "send_proxy", &SEND_PROXY).unwrap_or_default();
    bounded_load(reader, &fields, &mut pool);
    session(reader, &fields, &mut pool);
    health(reader, &fields, &mut pool.health);
    outlier(reader, &fields, &mut pool.health);
    set(&mut pool.slow_start, fields.duration(reader, "slow_start"));
    set(&mut pool.debounce, fields.duration(reader, "debounce"));
    let connections = fields.number(reader, "connections", 1, u64::from(LANES_MAX));
    set(&mut pool.connections, connections.map(|count| count as u8));
    let percent = fields.number(reader, "panic_percent", 0, 100);
    set(&mut pool.panic_percent, percent.map(|percent| percent as u8));
    if let Some(node) = fields.get("drain") {
        let path = fields.path_of("drain");
        if let Some(drain) = reader.fields(node, &path, &["deadline"]) {
            set(&mut pool.drain_deadline, drain.duration(reader, "deadline"));
        }
    }
    if let Some(node) = fields.get("bind_keys") {
        pool.bind_keys = bind_keys(reader, node, &fields.path_of("bind_keys"));
    }
    if let Some(node) = fields.get("backends") {
        pool.backends = backends(reader, node, &fields.path_of("backends"));
    }
    Some(pool)
}

/// How `dns.transport` is written.
pub(super) const DNS_TRANSPORTS: [(&str, Transport); 3] =
    [("udp", Transport::Udp), ("tcp", Transport::Tcp), ("tls", Transport::Tls)];

/// Reads a pool's `dns`, if it has one.
pub(super) fn dns(reader: &mut Reader, entry: &Entry, path: &str) -> Option<DnsPoolSettings> {
    let Kind::Map(values) = &entry.value.kind else { return None };
    let node = &values.iter().find(|value| value.key == "dns")?.value;
    if node.kind == Kind::Null {
        return None;
    }
    let path = format!("{path}.dns");
    let fields = reader.fields(node, &path, &["name", "port", "transport", "grace"])?;
    let name = fields.need_text(reader, "name");
    let port = fields.number(reader, "port", 1, 65_535).map(|port| port as u16);
    let given = fields.need(reader, "transport").is_some();
    let transport = fields.choice(reader, "transport", &DNS_TRANSPORTS);
    let grace = fields.duration(reader, "grace").unwrap_or(DNS_GRACE);
    if grace < Duration::from_secs(1) || grace > Duration::from_secs(86_400) {
        reader.wrong(fields.node_of("grace"), &fields.path_of("grace"), "must be from 1s to 1d");
    }
    let name = name?;
    let is_service = name.starts_with('_');
    if is_service && port.is_some() {
        let message = "SRV records say the port themselves; leave it out";
        reader.wrong(fields.node_of("port"), &fields.path_of("port"), message);
    } else if !is_service && port.is_none() {
        let message = format!(
            "`{name}` is a host, which needs `port`; SRV records stand under _service._transport names"
        );
        reader.wrong(fields.node_of("name"), &fields.path_of("name"), message);
    }
    let transport = transport.filter(|_| given)?;
    let (pool, protocols) = (entry.key.clone(), Vec::new());
    Some(DnsPoolSettings { pool, name, port, transport, grace, protocols })
}

fn default_pool(name: &str) -> PoolSpec {
    PoolSpec {
        name: name.to_owned(),
        balance: Balance::Hash,
        bounded_load: None,
        session_key: String::new(),
        session_share: None,
        session_ttl: Duration::from_secs(7_200),
        health: HealthSpec {
            probe: None,
            interval: Duration::from_secs(2),
            timeout: Duration::from_millis(500),
            rise: 2,
            fall: 2,
            outlier_faults: 5,
            outlier_ejection: Duration::from_secs(10),
            outlier_max_percent: 50,
        },
        slow_start: Duration::ZERO,
        drain_deadline: Duration::from_secs(3_600),
        debounce: Duration::from_secs(1),
        panic_percent: 10,
        needs_link: false,
        connections: 1,
        send_proxy: SendProxy::Off,
        tls: None,
        bind_keys: Vec::new(),
        bind_places: Vec::new(),
        qos: QosSpec::default(),
        backends: Vec::new(),
    }
}

/// Keeps the default if nothing was given.
pub(super) fn set<T>(place: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *place = value;
    }
}

fn bounded_load(reader: &mut Reader, fields: &Fields<'_>, pool: &mut PoolSpec) {
    let Some(percent) = fields.number(reader, "bounded_load", 101, 1_000) else { return };
    pool.bounded_load = Some(percent as u16);
    if pool.balance != Balance::Hash {
        let path = fields.path_of("bounded_load");
        reader.wrong(fields.node_of("bounded_load"), &path, "goes with `balance: hash` only");
    }
}

fn qos(reader: &mut Reader, fields: &Fields<'_>, qos: &mut QosSpec) {
    let Some(node) = fields.get("qos") else { return };
    let path = fields.path_of("qos");
    let Some(inner) = reader.fields(node, &path, &["policy", "adaptive"]) else { return };
    set(&mut qos.policy, inner.choice(reader, "policy", &POLICIES));
    let switch = [("true", true), ("false", false)];
    set(&mut qos.adaptive, inner.choice(reader, "adaptive", &switch));
}

fn session(reader: &mut Reader, fields: &Fields<'_>, pool: &mut PoolSpec) {
    let Some(node) = fields.get("session") else { return };
    let path = fields.path_of("session");
    let Some(session) = reader.fields(node, &path, &["key", "ttl", "share"]) else { return };
    set(&mut pool.session_key, session.text(reader, "key"));
    pool.session_share = session.text(reader, "share").filter(|word| !word.is_empty());
    if let Some(ttl) = session.duration(reader, "ttl") {
        if !(Duration::from_secs(1)..=SESSION_TTL_MAX).contains(&ttl) {
            reader.wrong(session.node_of("ttl"), &session.path_of("ttl"), "must be from 1s to 90d");
        }
        pool.session_ttl = ttl;
    }
}

fn health(reader: &mut Reader, fields: &Fields<'_>, health: &mut HealthSpec) {
    const KEYS: [&str; 5] = ["probe", "interval", "timeout", "rise", "fall"];
    let Some(node) = fields.get("health") else { return };
    let path = fields.path_of("health");
    let Some(checks) = reader.fields(node, &path, &KEYS) else { return };
    health.probe = checks.text(reader, "probe");
    set(&mut health.interval, checks.duration(reader, "interval"));
    set(&mut health.timeout, checks.duration(reader, "timeout"));
    let rise = checks.number(reader, "rise", 1, 1_000);
    let fall = checks.number(reader, "fall", 1, 1_000);
    set(&mut health.rise, rise.map(|count| count as u32));
    set(&mut health.fall, fall.map(|count| count as u32));
    if health.interval < Duration::from_millis(10) {
        let path = checks.path_of("interval");
        reader.wrong(checks.node_of("interval"), &path, "must be at least 10ms");
    } else if health.timeout.is_zero() || health.timeout > health.interval {
        let interval = strowger_contract::duration::format(health.interval);
        let message = format!("must be over 0 and at most the interval, which is {interval}");
        reader.wrong(checks.node_of("timeout"), &checks.path_of("timeout"), message);
    }
    if health.probe.is_none()
        && ["interval", "timeout", "rise", "fall"].iter().any(|key| checks.get(key).is_some())
    {
        reader.warnings.push(format!("{path} checks nothing: it names no `probe`"));
    }
}

fn outlier(reader: &mut Reader, fields: &Fields<'_>, health: &mut HealthSpec) {
    let Some(node) = fields.get("outlier") else { return };
    let path = fields.path_of("outlier");
    let Some(outlier) = reader.fields(node, &path, &["faults", "ejection", "max_percent"]) else {
        return;
    };
    let faults = outlier.number(reader, "faults", 0, 1_000_000);
    let percent = outlier.number(reader, "max_percent", 0, 100);
    set(&mut health.outlier_faults, faults.map(|count| count as u32));
    set(&mut health.outlier_ejection, outlier.duration(reader, "ejection"));
    set(&mut health.outlier_max_percent, percent.map(|count| count as u8));
}

/// Whether the names are known is the pool's protocol's word; see `listeners`.
fn bind_keys(reader: &mut Reader, node: &Node, path: &str) -> Vec<String> {
    let mut keys: Vec<String> = Vec::new();
    for (index, item) in reader.list(node, path).iter().enumerate() {
        let path = format!("{path}[{index}]");
        let Some(key) = reader.text(item, &path) else { continue };
        if keys.contains(&key) {
            reader.wrong(item, &path, format!("`{key}` stands here a second time"));
        }
        keys.push(key);
    }
    keys
}

fn backends(reader: &mut Reader, node: &Node, path: &str) -> Vec<BackendSpec> {
    let list = reader.list(node, path);
    if list.len() > BACKENDS_MAX {
        let message = format!("{} backends; at most {BACKENDS_MAX} are possible", list.len());
        reader.wrong(node, path, message);
        return Vec::new();
    }
    let mut backends: Vec<BackendSpec> = Vec::with_capacity(list.len());
    let mut ids: HashMap<String, usize> = HashMap::new();
    let mut addresses = HashMap::new();
    for (index, item) in list.iter().enumerate() {
        let path = format!("{path}[{index}]");
        let Some((backend, fields)) = backend(reader, item, &path) else { continue };
        if let Some(first) = ids.insert(backend.id.clone(), index) {
            let message = format!("`{}` is also the id of backends[{first}]", backend.id);
            reader.wrong(fields.node_of("id"), &fields.path_of("id"), message);
        }
        if let Some(first) = addresses.insert((backend.transport, backend.address), index) {
            let message = format!(
                "{}://{} is also the address of backends[{first}]",
                backend.transport.scheme(),
                backend.address
            );
            reader.wrong(fields.node_of("address"), &fields.path_of("address"), message);
        }
        backends.push(backend);
    }
    backends
}

fn backend<'a>(
    reader: &mut Reader,
    item: &'a Node,
    path: &'a str,
) -> Option<(BackendSpec, Fields<'a>)> {
    const KEYS: [&str; 8] =
        ["id", "address", "weight", "priority", "capacity", "origin_host", "generation", "state"];
    let fields = reader.fields(item, path, &KEYS)?;
    let id = fields.need_text(reader, "id");
    let address =
        fields.need_text(reader, "address").and_then(|text| reachable(reader, &fields, &text));
    let state = fields.choice(reader, "state", &STATES).unwrap_or_default();
    let weight = fields.number(reader, "weight", 0, 65_535);
    let priority = fields.number(reader, "priority", 0, 65_535);
    let capacity = fields.number(reader, "capacity", 1, 100_000_000);
    let generation = fields.number(reader, "generation", 0, u64::from(u32::MAX));
    let identity = fields.text(reader, "origin_host");
    let (id, (transport, address)) = id.zip(address)?;
    let backend = BackendSpec {
        id,
        generation: generation.unwrap_or(0),
        transport,
        address,
        weight: weight.unwrap_or(100) as u32,
        priority: priority.unwrap_or(1) as u16,
        capacity: capacity.map(|capacity| capacity as u32),
        identity,
        state,
    };
    Some((backend, fields))
}

fn reachable(
    reader: &mut Reader,
    fields: &Fields<'_>,
    text: &str,
) -> Option<(Transport, std::net::SocketAddr)> {
    let found = endpoint(text).and_then(|(transport, address)| {
        if address.ip().is_unspecified() || address.ip().is_multicast() {
            return Err(format!("{} is no address of one backend", address.ip()));
        }
        Ok((transport, address))
    });
    found
        .map_err(|message| {
            reader.wrong(fields.node_of("address"), &fields.path_of("address"), message)
        })
        .ok()
}
