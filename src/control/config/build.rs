//! What the values mean: from the tree to a wanted state.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use strowger_contract::{Class, Links, LocalSocket, OnMiss, Scope, Transport};

use super::configure::Configure;
use super::read::{Fields, Reader, join, unknown};
use super::tree::{Entry, Kind, Node};
use super::{ConfigError, Source, is_loopback};
use crate::routing::{
    BackendSpec, Balance, HealthSpec, InstanceState, ListenerLimits, ListenerSpec, PoolNames,
    PoolSpec, SnapshotSpec,
};

/// Backends in one pool, at most: the Maglev table is meant for hundreds of places each.
const BACKENDS_MAX: usize = 20_000;

/// Pools and listeners, at most: each has its metrics.
const POOLS_MAX: usize = 4_096;
const LISTENERS_MAX: usize = 1_024;

/// Classes, at most: they must fit the session table's byte and the metrics' labels.
const CLASSES_MAX: usize = 64;

/// A configuration that is whole and good.
#[derive(Clone, Debug, Default)]
pub struct Loaded {
    /// The wanted state.
    pub spec: SnapshotSpec,
    /// What holds for the process; a reload does not change it.
    pub node: NodeSettings,
    /// The admin HTTP server; a reload does not change it.
    pub admin: AdminSettings,
    /// Further directories to read and watch.
    pub watch: Vec<PathBuf>,
    /// Not wrong, but perhaps not meant.
    pub warnings: Vec<String>,
    /// Effective values of the protocols' options, by listener.
    pub effective: Vec<(String, Value)>,
    /// What it was read from.
    pub sources: Vec<Source>,
}

/// What holds for the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSettings {
    /// Workers; `None`: one per core.
    pub workers: Option<u8>,
    /// Keys of tokens: the first signs, all check.
    pub token_keys: Vec<[u8; 16]>,
    /// Room in the session table.
    pub sessions_max: usize,
}

impl Default for NodeSettings {
    fn default() -> Self {
        Self { workers: None, token_keys: Vec::new(), sessions_max: 1 << 20 }
    }
}

/// The admin HTTP server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminSettings {
    /// Where it listens.
    pub listen: SocketAddr,
    /// What clients must show.
    pub token: Option<String>,
}

impl Default for AdminSettings {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 9080)), token: None }
    }
}

/// Gathers over all files.
pub(super) struct Build<'a> {
    protocols: &'a [&'a dyn Configure],
    names: &'a PoolNames,
    loaded: Loaded,
    pools: Vec<(PoolSpec, Place)>,
    listeners: Vec<RawListener>,
    seen: HashMap<String, Place>,
}

#[derive(Clone, Debug)]
struct Place {
    file: String,
    line: usize,
    column: usize,
}

struct RawListener {
    file: String,
    node: Node,
    path: String,
}

impl<'a> Build<'a> {
    pub(super) fn new(protocols: &'a [&'a dyn Configure], names: &'a PoolNames) -> Self {
        let mut loaded = Loaded::default();
        loaded.spec.classes = Class::built_in();
        loaded.spec.node.name = "strowger".to_owned();
        Self {
            protocols,
            names,
            loaded,
            pools: Vec::new(),
            listeners: Vec::new(),
            seen: HashMap::new(),
        }
    }

    /// Reads one file.
    pub(super) fn read(&mut self, reader: &mut Reader, tree: &Node) {
        const KEYS: [&str; 8] =
            ["version", "node", "admin", "registry", "watch", "classes", "listeners", "pools"];
        let Some(fields) = reader.fields(tree, "", &KEYS) else { return };
        match fields.get("version") {
            Some(version) if version.kind != Kind::Integer(1) => {
                reader.wrong(version, "version", "this release reads version 1");
            }
            _ => {}
        }
        for key in ["node", "admin", "registry"] {
            if let Some(node) = fields.get(key) {
                self.once(reader, key, node);
            }
        }
        if let Some(node) = fields.get("node") {
            self.node(reader, node);
        }
        if let Some(node) = fields.get("admin") {
            self.admin(reader, node);
        }
        if let Some(node) = fields.get("registry") {
            registry(reader, node);
        }
        if let Some(node) = fields.get("watch") {
            for (index, directory) in reader.list(node, "watch").iter().enumerate() {
                let path = format!("watch[{index}]");
                if let Some(text) = reader.text(directory, &path) {
                    let near =
                        PathBuf::from(&reader.file).parent().map(|parent| parent.join(&text));
                    self.loaded.watch.push(near.unwrap_or_else(|| text.into()));
                }
            }
        }
        if let Some(node) = fields.get("classes") {
            self.classes(reader, node);
        }
        if let Some(node) = fields.get("pools") {
            for entry in reader.named(node, "pools") {
                self.pool(reader, entry);
            }
        }
        if let Some(node) = fields.get("listeners") {
            for (index, listener) in reader.list(node, "listeners").iter().enumerate() {
                let path = format!("listeners[{index}]");
                self.listeners.push(RawListener {
                    file: reader.file.clone(),
                    node: listener.clone(),
                    path,
                });
            }
        }
    }

    /// Something that may stand in one file only.
    fn once(&mut self, reader: &mut Reader, what: &str, node: &Node) -> bool {
        let place = Place { file: reader.file.clone(), line: node.line, column: node.column };
        if let Some(first) = self.seen.get(what) {
            let message = format!(
                "`{what}` stands here a second time; the first is at {}:{}",
                first.file, first.line
            );
            reader.wrong(node, what, message);
            return false;
        }
        self.seen.insert(what.to_owned(), place);
        true
    }

    fn node(&mut self, reader: &mut Reader, node: &Node) {
        let Some(fields) = reader.fields(
            node,
            "node",
            &["name", "workers", "realm", "token_key_file", "sessions_max"],
        ) else {
            return;
        };
        if let Some(name) = fields.text(reader, "name") {
            self.loaded.spec.node.name = name;
        }
        if let Some(realm) = fields.text(reader, "realm") {
            self.loaded.spec.node.realm = realm;
        }
        if let Some(workers) = fields.get("workers")
            && workers.kind != Kind::Text("auto".to_owned())
        {
            let count = reader.number(
                workers,
                "node.workers",
                1,
                strowger_contract::ids::WORKERS_MAX as u64,
            );
            self.loaded.node.workers = count.map(|count| count as u8);
        }
        if let Some(count) = fields.number(reader, "sessions_max", 1_024, 1 << 30) {
            self.loaded.node.sessions_max = count as usize;
        }
        if let Some(file) = fields.text(reader, "token_key_file")
            && let Some(node) = fields.get("token_key_file")
        {
            match token_keys(&file) {
                Ok(keys) => self.loaded.node.token_keys = keys,
                Err(message) => reader.wrong(node, "node.token_key_file", message),
            }
        }
    }

    fn admin(&mut self, reader: &mut Reader, node: &Node) {
        let Some(fields) = reader.fields(node, "admin", &["listen", "token_file"]) else { return };
        let mut admin = AdminSettings::default();
        if let Some(listen) = fields.get("listen")
            && let Some(text) = reader.text(listen, "admin.listen")
        {
            match text.parse() {
                Ok(address) => admin.listen = address,
                Err(_) => reader.wrong(
                    listen,
                    "admin.listen",
                    format!("`{text}` is no address; write 127.0.0.1:9080 or [::1]:9080"),
                ),
            }
        }
        if let Some(file) = fields.get("token_file")
            && let Some(name) = reader.text(file, "admin.token_file")
        {
            match std::fs::read_to_string(&name) {
                Ok(token) if !token.trim().is_empty() => {
                    admin.token = Some(token.trim().to_owned())
                }
                Ok(_) => reader.wrong(file, "admin.token_file", format!("`{name}` is empty")),
                Err(error) => reader.wrong(
                    file,
                    "admin.token_file",
                    format!("`{name}` cannot be read: {error}"),
                ),
            }
        }
        if !is_loopback(admin.listen) && admin.token.is_none() {
            reader.wrong(
                node,
                "admin",
                "off loopback the admin API needs a token: name a file with `token_file`",
            );
        }
        self.loaded.admin = admin;
    }

    fn classes(&mut self, reader: &mut Reader, node: &Node) {
        for entry in reader.named(node, "classes") {
            let path = join("classes", &entry.key);
            let Some(fields) =
                reader.fields(&entry.value, &path, &["tier", "deadline", "retry", "on_miss"])
            else {
                continue;
            };
            let classes = &mut self.loaded.spec.classes;
            let known = classes.iter().position(|class| *class.name == *entry.key);
            let index = match known {
                Some(0) => {
                    reader.wrong(
                        &entry.value,
                        &path,
                        "`control` has no deadline and no tier to change",
                    );
                    continue;
                }
                Some(index) => index,
                None if classes.len() >= CLASSES_MAX => {
                    reader.wrong(&entry.value, &path, format!("over {CLASSES_MAX} classes"));
                    continue;
                }
                None => {
                    let template = classes.last().cloned();
                    classes.extend(
                        template.map(|class| Class { name: entry.key.as_str().into(), ..class }),
                    );
                    classes.len() - 1
                }
            };
            let class = &mut classes[index];
            if let Some(tier) = fields.number(reader, "tier", 0, 3) {
                class.tier = tier as u8;
            }
            if let Some(deadline) = fields.duration(reader, "deadline") {
                // RFC 3261: nobody waits longer than 64 x T1.
                if deadline.is_zero() || deadline > Duration::from_secs(32) {
                    reader.wrong(
                        &entry.value,
                        &join(&path, "deadline"),
                        "must be over 0 and at most 32s, the longest that a SIP client waits",
                    );
                } else {
                    class.deadline = Some(deadline);
                }
            }
            if let Some(retry) = fields.number(reader, "retry", 0, 3) {
                class.retry = retry as u8;
            }
            let misses =
                [("answer", OnMiss::Answer), ("drop", OnMiss::Drop), ("reset", OnMiss::Reset)];
            if let Some(miss) = fields.choice(reader, "on_miss", &misses) {
                class.on_miss = miss;
            }
        }
    }

    fn pool(&mut self, reader: &mut Reader, entry: &Entry) {
        const KEYS: [&str; 12] = [
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
        ];
        let path = join("pools", &entry.key);
        let place = Place { file: reader.file.clone(), line: entry.line, column: entry.column };
        let first = self
            .pools
            .iter()
            .find(|(pool, _)| pool.name == entry.key)
            .map(|(_, place)| place.clone());
        if let Some(first) = first {
            reader.wrong(
                &entry.value,
                &path,
                format!(
                    "the pool stands here a second time; the first is at {}:{}",
                    first.file, first.line
                ),
            );
            return;
        }
        if self.pools.len() >= POOLS_MAX {
            return reader.wrong(&entry.value, &path, format!("over {POOLS_MAX} pools"));
        }
        let Some(fields) = reader.fields(&entry.value, &path, &KEYS) else { return };
        for (key, what) in [("bind_keys", "subscriber bindings"), ("qos", "queueing policies")] {
            if let Some(node) = fields.get(key) {
                reader.wrong(
                    node,
                    &fields.path_of(key),
                    format!("{what} are not supported in this version; remove `{key}`"),
                );
            }
        }
        let mut pool = default_pool(&entry.key);
        let balances = [
            ("hash", Balance::Hash),
            ("least-loaded", Balance::LeastLoaded),
            ("weighted-random", Balance::WeightedRandom),
            ("round-robin", Balance::RoundRobin),
            ("priority", Balance::Priority),
        ];
        pool.balance = fields.choice(reader, "balance", &balances).unwrap_or_default();
        if let Some(percent) = fields.number(reader, "bounded_load", 101, 1_000) {
            pool.bounded_load = Some(percent as u16);
            if pool.balance != Balance::Hash {
                reader.wrong(
                    &entry.value,
                    &fields.path_of("bounded_load"),
                    "goes with `balance: hash` only",
                );
            }
        }
        session(reader, &fields, &mut pool);
        health(reader, &fields, &mut pool.health);
        set(&mut pool.slow_start, fields.duration(reader, "slow_start"));
        set(&mut pool.debounce, fields.duration(reader, "debounce"));
        set(
            &mut pool.panic_percent,
            fields.number(reader, "panic_percent", 0, 100).map(|percent| percent as u8),
        );
        if let Some(node) = fields.get("drain") {
            let path = fields.path_of("drain");
            if let Some(drain) = reader.fields(node, &path, &["deadline"]) {
                set(&mut pool.drain_deadline, drain.duration(reader, "deadline"));
            }
        }
        if let Some(node) = fields.get("backends") {
            pool.backends = backends(reader, node, &fields.path_of("backends"));
        }
        self.pools.push((pool, place));
    }

    /// What can only be said when all files are read.
    pub(super) fn finish(mut self, reader: &mut Reader) -> Option<Loaded> {
        let raw = std::mem::take(&mut self.listeners);
        let mut names: HashMap<String, String> = HashMap::new();
        let mut bound: HashMap<(Transport, SocketAddr), String> = HashMap::new();
        let mut used: HashSet<String> = HashSet::new();
        if raw.len() > LISTENERS_MAX
            && let Some(first) = raw.first()
        {
            reader.file.clone_from(&first.file);
            reader.wrong(&first.node, "listeners", format!("over {LISTENERS_MAX} listeners"));
        }
        for listener in raw.iter().take(LISTENERS_MAX) {
            reader.file.clone_from(&listener.file);
            self.listener(reader, listener, &mut names, &mut bound, &mut used);
        }
        for (pool, _) in &self.pools {
            if !used.contains(&pool.name) {
                self.loaded.warnings.push(format!("pool `{}` is used by no listener", pool.name));
            } else if pool.backends.is_empty() {
                self.loaded.warnings.push(format!(
                    "pool `{}` has no backends: all its requests will be refused",
                    pool.name
                ));
            }
        }
        if self.loaded.spec.listeners.is_empty() && reader.errors.is_empty() {
            self.loaded
                .warnings
                .push("there is no listener: the edge will take no traffic".to_owned());
        }
        self.loaded.spec.pools = self.pools.into_iter().map(|(pool, _)| pool).collect();
        Some(self.loaded)
    }

    fn listener(
        &mut self,
        reader: &mut Reader,
        raw: &RawListener,
        names: &mut HashMap<String, String>,
        bound: &mut HashMap<(Transport, SocketAddr), String>,
        used: &mut HashSet<String>,
    ) {
        const KEYS: [&str; 7] = ["name", "protocol", "bind", "pool", "routes", "options", "limits"];
        let path = raw.path.as_str();
        let Some(fields) = reader.fields(&raw.node, path, &KEYS) else { return };
        let name =
            fields.need(reader, "name").and_then(|node| reader.text(node, &fields.path_of("name")));
        let protocol = fields.need(reader, "protocol").and_then(|node| {
            let choices: Vec<(&str, usize)> = self
                .protocols
                .iter()
                .enumerate()
                .map(|(index, known)| (known.name(), index))
                .collect();
            reader.choice(node, &fields.path_of("protocol"), &choices)
        });
        let limits = limits(reader, &fields);
        let pool = fields
            .get("pool")
            .and_then(|node| self.pool_name(reader, node, &fields.path_of("pool")));
        let mut routes = Vec::new();
        let mut pools: Vec<String> = pool.iter().cloned().collect();
        if let Some(node) = fields.get("routes") {
            for (index, route) in reader.list(node, &fields.path_of("routes")).iter().enumerate() {
                let path = format!("{path}.routes[{index}]");
                let Some(route) = reader.fields(route, &path, &["match", "pool"]) else { continue };
                let target = route
                    .need(reader, "pool")
                    .and_then(|node| self.pool_name(reader, node, &route.path_of("pool")));
                let matching = route.get("match").map_or(Value::Null, Node::to_json);
                if let Some(target) = target {
                    routes.push((matching, self.names.id(&target)));
                    pools.push(target);
                }
            }
        }
        let Some((name, protocol)) = name.zip(protocol) else { return };
        let protocol = self.protocols[protocol];
        if let Some(first) = names.insert(name.clone(), path.to_owned()) {
            reader.wrong(
                &raw.node,
                &fields.path_of("name"),
                format!("`{name}` is also the name of {first}"),
            );
        }
        if pools.is_empty() {
            reader.wrong(
                &raw.node,
                path,
                "`pool` is missing, and there are no `routes`: its requests would go nowhere",
            );
        }
        pools.sort();
        pools.dedup();
        used.extend(pools.iter().cloned());
        let sockets = self.sockets(reader, &fields, protocol, &name, bound);
        self.fit_pools(reader, raw, protocol, &pools);
        let scope = Scope {
            listener: name.clone(),
            node: self.loaded.spec.node.name.clone(),
            realm: self.loaded.spec.node.realm.clone(),
            sockets: sockets.clone(),
            routes,
            pool: pool.map(|pool| self.names.id(&pool)),
        };
        let options = fields.get("options").map_or(Value::Null, Node::to_json);
        match protocol.configure(scope, &options) {
            Err(errors) => {
                for error in errors {
                    let place = raw.node.at(&error.path);
                    let whole = join(path, &error.path);
                    reader.wrong(place, whole.trim_end_matches('.'), error.message);
                }
            }
            Ok(configured) => {
                let pools = pools.iter().map(|pool| self.names.id(pool)).collect();
                let told = format!("{} {pools:?} {limits:?}", configured.effective);
                self.loaded.effective.push((name.clone(), configured.effective));
                self.loaded.spec.listeners.push(Arc::new(ListenerSpec {
                    name,
                    protocol: protocol.name(),
                    sockets,
                    pools,
                    limits,
                    setup: configured.setup,
                    fingerprint: strowger_contract::stable_hash(told.as_bytes()),
                }));
            }
        }
    }

    fn pool_name(&self, reader: &mut Reader, node: &Node, path: &str) -> Option<String> {
        let name = reader.text(node, path)?;
        if self.pools.iter().any(|(pool, _)| pool.name == name) {
            return Some(name);
        }
        reader.wrong(
            node,
            path,
            unknown("pool", &name, self.pools.iter().map(|(pool, _)| pool.name.as_str())),
        );
        None
    }

    fn sockets(
        &self,
        reader: &mut Reader,
        fields: &Fields<'_>,
        protocol: &dyn Configure,
        listener: &str,
        bound: &mut HashMap<(Transport, SocketAddr), String>,
    ) -> Vec<LocalSocket> {
        let mut sockets = Vec::new();
        let Some(node) = fields.need(reader, "bind") else { return sockets };
        let list = match &node.kind {
            Kind::List(list) => list.as_slice(),
            _ => std::slice::from_ref(node),
        };
        if list.is_empty() {
            reader.wrong(
                node,
                &fields.path_of("bind"),
                "names no address; write [udp://127.0.0.1:5060]",
            );
        }
        for (index, item) in list.iter().enumerate() {
            let path = format!("{}.bind[{index}]", fields.path);
            let (text, advertise) = if matches!(item.kind, Kind::Map(_)) {
                let Some(bind) = reader.fields(item, &path, &["address", "advertise"]) else {
                    continue;
                };
                let address = bind
                    .need(reader, "address")
                    .and_then(|node| reader.text(node, &bind.path_of("address")));
                (address, bind.text(reader, "advertise"))
            } else {
                (reader.text(item, &path), None)
            };
            let Some((transport, address)) =
                text.and_then(|text| endpoint(reader, item, &path, &text))
            else {
                continue;
            };
            if !protocol.transports().contains(&transport) {
                let known: Vec<&str> =
                    protocol.transports().iter().map(|transport| transport.scheme()).collect();
                reader.wrong(
                    item,
                    &path,
                    format!(
                        "{} does not run over {}; it runs over {}",
                        protocol.name(),
                        transport.scheme(),
                        known.join(", ")
                    ),
                );
                continue;
            }
            if address.port() == 0 {
                reader.wrong(item, &path, "needs a port: peers must know where to send");
                continue;
            }
            let clash = bound
                .iter()
                .find(|((kind, other), _)| *kind == transport && overlap(*other, address));
            if let Some((_, other)) = clash {
                reader.wrong(
                    item,
                    &path,
                    format!(
                        "{}://{address} is bound by listener `{other}` already",
                        transport.scheme()
                    ),
                );
                continue;
            }
            bound.insert((transport, address), listener.to_owned());
            sockets.push(LocalSocket { transport, address, advertise });
        }
        sockets
    }

    /// What a protocol means for the pools that it uses.
    fn fit_pools(
        &mut self,
        reader: &mut Reader,
        raw: &RawListener,
        protocol: &dyn Configure,
        pools: &[String],
    ) {
        for (pool, place) in self.pools.iter_mut().filter(|(pool, _)| pools.contains(&pool.name)) {
            let mut wrong = |path: &str, message: String| {
                let path = format!("pools.{}.{path}", pool.name);
                reader.errors.push(ConfigError {
                    file: place.file.clone(),
                    line: place.line,
                    column: place.column,
                    path,
                    message,
                });
            };
            if protocol.links() == Links::Single {
                pool.needs_link = true;
            }
            let keys = protocol.session_keys();
            if !pool.session_key.is_empty() && !keys.contains(&pool.session_key.as_str()) {
                let message = format!(
                    "{}, for {} (listener at {})",
                    unknown("session key", &pool.session_key, keys.iter().copied()),
                    protocol.name(),
                    raw.path
                );
                wrong("session.key", message);
            }
            if let Some(probe) = &pool.health.probe
                && probe != "tcp-connect"
                && !self.protocols.iter().any(|known| known.probes().contains(&probe.as_str()))
            {
                let known = self
                    .protocols
                    .iter()
                    .flat_map(|known| known.probes())
                    .copied()
                    .chain(["tcp-connect"]);
                wrong("health.probe", unknown("probe", probe, known));
            }
            for (index, backend) in pool.backends.iter().enumerate() {
                if !protocol.transports().contains(&backend.transport) {
                    let message = format!(
                        "{} does not run over {} (listener at {})",
                        protocol.name(),
                        backend.transport.scheme(),
                        raw.path
                    );
                    wrong(&format!("backends[{index}].address"), message);
                }
            }
        }
    }
}

fn registry(reader: &mut Reader, node: &Node) {
    let Some(fields) = reader.fields(node, "registry", &["state_file", "lease"]) else { return };
    for key in ["state_file", "lease"] {
        if let Some(node) = fields.get(key) {
            reader.wrong(
                node,
                &fields.path_of(key),
                format!("leases are not supported in this version; remove `{key}`"),
            );
        }
    }
}

fn default_pool(name: &str) -> PoolSpec {
    PoolSpec {
        name: name.to_owned(),
        balance: Balance::Hash,
        bounded_load: None,
        session_key: String::new(),
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
        backends: Vec::new(),
    }
}

fn set<T>(place: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *place = value;
    }
}

fn session(reader: &mut Reader, fields: &Fields<'_>, pool: &mut PoolSpec) {
    let Some(node) = fields.get("session") else { return };
    let path = fields.path_of("session");
    let Some(session) = reader.fields(node, &path, &["key", "ttl"]) else { return };
    set(&mut pool.session_key, session.text(reader, "key"));
    if let Some(ttl) = session.duration(reader, "ttl") {
        if (Duration::from_secs(1)..=Duration::from_secs(90 * 86_400)).contains(&ttl) {
            pool.session_ttl = ttl;
        } else {
            reader.wrong(node, &session.path_of("ttl"), "must be from 1s to 90d");
        }
    }
}

fn health(reader: &mut Reader, fields: &Fields<'_>, health: &mut HealthSpec) {
    if let Some(node) = fields.get("health") {
        let path = fields.path_of("health");
        if let Some(checks) =
            reader.fields(node, &path, &["probe", "interval", "timeout", "rise", "fall"])
        {
            health.probe = checks.text(reader, "probe");
            set(&mut health.interval, checks.duration(reader, "interval"));
            set(&mut health.timeout, checks.duration(reader, "timeout"));
            set(
                &mut health.rise,
                checks.number(reader, "rise", 1, 1_000).map(|count| count as u32),
            );
            set(
                &mut health.fall,
                checks.number(reader, "fall", 1, 1_000).map(|count| count as u32),
            );
            if health.interval < Duration::from_millis(10) {
                reader.wrong(node, &checks.path_of("interval"), "must be at least 10ms");
            }
            if health.timeout.is_zero() || health.timeout > health.interval {
                reader.wrong(
                    node,
                    &checks.path_of("timeout"),
                    "must be over 0 and at most the interval",
                );
            }
        }
    }
    if let Some(node) = fields.get("outlier") {
        let path = fields.path_of("outlier");
        if let Some(outlier) = reader.fields(node, &path, &["faults", "ejection", "max_percent"]) {
            set(
                &mut health.outlier_faults,
                outlier.number(reader, "faults", 0, 1_000_000).map(|count| count as u32),
            );
            set(&mut health.outlier_ejection, outlier.duration(reader, "ejection"));
            set(
                &mut health.outlier_max_percent,
                outlier.number(reader, "max_percent", 0, 100).map(|count| count as u8),
            );
        }
    }
}

fn backends(reader: &mut Reader, node: &Node, path: &str) -> Vec<BackendSpec> {
    const KEYS: [&str; 8] =
        ["id", "address", "weight", "priority", "capacity", "origin_host", "generation", "state"];
    let list = reader.list(node, path);
    if list.len() > BACKENDS_MAX {
        reader.wrong(
            node,
            path,
            format!("{} backends; at most {BACKENDS_MAX} are possible", list.len()),
        );
        return Vec::new();
    }
    let mut backends: Vec<BackendSpec> = Vec::with_capacity(list.len());
    let (mut ids, mut addresses) = (HashMap::new(), HashMap::new());
    for (index, item) in list.iter().enumerate() {
        let path = format!("{path}[{index}]");
        let Some(fields) = reader.fields(item, &path, &KEYS) else { continue };
        let id =
            fields.need(reader, "id").and_then(|node| reader.text(node, &fields.path_of("id")));
        let address = fields.need(reader, "address").and_then(|node| {
            let path = fields.path_of("address");
            let text = reader.text(node, &path)?;
            endpoint(reader, node, &path, &text)
        });
        let states = [
            ("ready", InstanceState::Ready),
            ("starting", InstanceState::Starting),
            ("canary", InstanceState::Canary),
            ("suspended", InstanceState::Suspended),
            ("draining", InstanceState::Draining),
        ];
        let state = fields.choice(reader, "state", &states).unwrap_or_default();
        let (weight, priority) = (
            fields.number(reader, "weight", 0, 65_535),
            fields.number(reader, "priority", 0, 65_535),
        );
        let capacity = fields.number(reader, "capacity", 1, 100_000_000);
        let generation = fields.number(reader, "generation", 0, u64::from(u32::MAX));
        let identity = fields.text(reader, "origin_host");
        let Some((id, (transport, address))) = id.zip(address) else { continue };
        if let Some(first) = ids.insert(id.clone(), index) {
            reader.wrong(
                item,
                &fields.path_of("id"),
                format!("`{id}` is also the id of backends[{first}]"),
            );
        }
        if let Some(first) = addresses.insert((transport, address), index) {
            reader.wrong(
                item,
                &fields.path_of("address"),
                format!("{address} is also the address of backends[{first}]"),
            );
        }
        if address.port() == 0 || address.ip().is_unspecified() {
            reader.wrong(
                item,
                &fields.path_of("address"),
                "must be one that can be reached: an address and a port",
            );
        }
        backends.push(BackendSpec {
            id,
            generation: generation.unwrap_or(0),
            transport,
            address,
            weight: weight.unwrap_or(100) as u32,
            priority: priority.unwrap_or(1) as u16,
            capacity: capacity.map(|capacity| capacity as u32),
            identity,
            state,
        });
    }
    backends
}

fn limits(reader: &mut Reader, fields: &Fields<'_>) -> ListenerLimits {
    let mut limits = ListenerLimits::default();
    let Some(node) = fields.get("limits") else { return limits };
    let path = fields.path_of("limits");
    let Some(given) =
        reader.fields(node, &path, &["connections", "queued_bytes", "idle", "connect"])
    else {
        return limits;
    };
    set(
        &mut limits.connections,
        given.number(reader, "connections", 1, 10_000_000).map(|count| count as u32),
    );
    set(
        &mut limits.queued_bytes,
        given.number(reader, "queued_bytes", 4_096, 1 << 30).map(|count| count as usize),
    );
    set(&mut limits.idle, given.duration(reader, "idle"));
    set(&mut limits.connect, given.duration(reader, "connect"));
    if limits.connect.is_zero() {
        reader.wrong(node, &given.path_of("connect"), "must be over 0");
    }
    limits
}

/// `udp://127.0.0.1:5060`.
fn endpoint(
    reader: &mut Reader,
    node: &Node,
    path: &str,
    text: &str,
) -> Option<(Transport, SocketAddr)> {
    const SCHEMES: [(&str, Transport); 6] = [
        ("udp", Transport::Udp),
        ("tcp", Transport::Tcp),
        ("tls", Transport::Tls),
        ("ws", Transport::Ws),
        ("wss", Transport::Wss),
        ("unix", Transport::Unix),
    ];
    let Some((scheme, rest)) = text.split_once("://") else {
        reader.wrong(
            node,
            path,
            format!("`{text}` has no transport; write udp://{text} or tcp://{text}"),
        );
        return None;
    };
    let Some((_, transport)) = SCHEMES.iter().find(|(name, _)| *name == scheme) else {
        reader.wrong(
            node,
            path,
            unknown("transport", scheme, SCHEMES.iter().map(|(name, _)| *name)),
        );
        return None;
    };
    if !matches!(transport, Transport::Udp | Transport::Tcp) {
        reader.wrong(
            node,
            path,
            format!("{scheme}:// is not supported in this version; udp:// and tcp:// are"),
        );
        return None;
    }
    match rest.parse() {
        Ok(address) => Some((*transport, address)),
        Err(_) => {
            let host = rest.rsplit_once(':').map_or(rest, |(host, _)| host);
            let message = if rest.parse::<std::net::IpAddr>().is_ok() {
                format!("`{rest}` has no port")
            } else if host.chars().any(|letter| letter.is_ascii_alphabetic()) && !host.contains(':')
            {
                format!(
                    "`{host}` is a name; this version needs an address, such as 127.0.0.1:5060 or [::1]:5060"
                )
            } else {
                format!("`{rest}` is no address; write 127.0.0.1:5060 or [::1]:5060")
            };
            reader.wrong(node, path, message);
            None
        }
    }
}

fn overlap(one: SocketAddr, two: SocketAddr) -> bool {
    let same = one.ip() == two.ip() || one.ip().is_unspecified() || two.ip().is_unspecified();
    one.port() == two.port() && one.is_ipv4() == two.is_ipv4() && same
}

/// Reads a key file: 32 hex digits a line, the first signs, the others still check.
fn token_keys(file: &str) -> Result<Vec<[u8; 16]>, String> {
    const KEYS_MAX: usize = 8;
    let text = std::fs::read_to_string(file)
        .map_err(|error| format!("`{file}` cannot be read: {error}"))?;
    let mut keys = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut key = [0; 16];
        let digits = line.len() == 32 && line.bytes().all(|byte| byte.is_ascii_hexdigit());
        for (place, pair) in key.iter_mut().zip(line.as_bytes().chunks(2)) {
            let byte =
                std::str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok());
            *place = byte.unwrap_or(0);
        }
        if !digits {
            return Err(format!("`{file}`, line {}: expected 32 hex digits", index + 1));
        }
        keys.push(key);
    }
    match keys.len() {
        0 => Err(format!(
            "`{file}` has no key; make one with: head -c16 /dev/urandom | od -An -tx1 | tr -d ' \\n'"
        )),
        count if count > KEYS_MAX => {
            Err(format!("`{file}` has {count} keys; at most {KEYS_MAX} are checked"))
        }
        _ => Ok(keys),
    }
}
