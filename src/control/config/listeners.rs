//! Listeners: what is bound, and where messages go.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use serde_json::{Value, json};
use strowger_contract::unix::shown;
use strowger_contract::{Class, ClassId, ClassRule, Links, LocalSocket, PoolId, Scope, Transport};

use super::configure::Configure;
use super::endpoint::{endpoint, overlap};
use super::intake::{accept_proxy, limits, websocket};
use super::pools::{RawPool, TCP_CONNECT};
use super::read::{Fields, Reader, join, unknown};
use super::tls;
use super::tree::{Kind, Node};
use crate::routing::{ListenerSpec, NodeSpec, PoolNames, SendProxy};

/// Rules of one listener's `classify`, at most: each is looked at for each request.
const CLASSIFY_MAX: usize = 64;

/// A listener and where it stands, until all files are read.
pub(super) struct RawListener {
    pub(super) file: String,
    pub(super) node: Node,
    pub(super) path: String,
}

/// What listeners are checked against, and against each other.
pub(super) struct Listeners<'a> {
    pub(super) protocols: &'a [&'a dyn Configure],
    pub(super) ids: &'a PoolNames,
    pub(super) node: &'a NodeSpec,
    pub(super) pools: &'a mut [RawPool],
    /// Effective options and matches, by listener.
    pub(super) effective: &'a mut Vec<(String, Value)>,
    pub(super) classes: &'a [Class],
    /// Classes that some rule names.
    named: HashSet<usize>,
    names: HashMap<String, String>,
    bound: HashMap<(Transport, SocketAddr), String>,
    /// Protocols that use a pool, by the pool's name.
    users: HashMap<String, HashSet<&'static str>>,
}

impl<'a> Listeners<'a> {
    pub(super) fn new(
        protocols: &'a [&'a dyn Configure],
        ids: &'a PoolNames,
        node: &'a NodeSpec,
        pools: &'a mut [RawPool],
        effective: &'a mut Vec<(String, Value)>,
        classes: &'a [Class],
    ) -> Self {
        let (names, bound, users) = (HashMap::new(), HashMap::new(), HashMap::new());
        let named = HashSet::new();
        Self { protocols, ids, node, pools, effective, classes, named, names, bound, users }
    }

    /// Reads one listener.
    pub(super) fn listener(
        &mut self,
        reader: &mut Reader,
        raw: &RawListener,
    ) -> Option<ListenerSpec> {
        const KEYS: [&str; 11] = [
            "name",
            "protocol",
            "bind",
            "pool",
            "routes",
            "classify",
            "options",
            "limits",
            "tls",
            "accept_proxy",
            "websocket",
        ];
        let path = raw.path.as_str();
        let fields = reader.fields(&raw.node, path, &KEYS)?;
        let name = fields.need_text(reader, "name");
        let protocol = self.protocol(reader, &fields);
        let limits = limits(reader, &fields);
        let tls = tls::server(reader, &fields);
        let proxy = accept_proxy(reader, &fields);
        let websocket = websocket(reader, &fields);
        let pool = fields.text(reader, "pool");
        let pool = pool.filter(|name| {
            self.is_pool(reader, fields.node_of("pool"), &fields.path_of("pool"), name)
        });
        let routes = self.routes(reader, &fields, protocol);
        let rules = self.rules(reader, &fields);
        if fields.get("pool").is_none() && fields.get("routes").is_none() {
            let message = "has neither `pool` nor `routes`: its messages would go nowhere";
            reader.wrong(&raw.node, path, message);
        }
        let (name, protocol) = name.zip(protocol)?;
        if let Some(first) =
            self.names.insert(name.clone(), format!("{}:{}", raw.file, raw.node.line))
        {
            let message = format!("`{name}` is also the name of the listener at {first}");
            reader.wrong(fields.node_of("name"), &fields.path_of("name"), message);
        }
        let sockets = self.sockets(reader, &fields, protocol, &name);
        let over_tls =
            |socket: &LocalSocket| matches!(socket.transport, Transport::Tls | Transport::Wss);
        if let Some(socket) = sockets.iter().find(|socket| over_tls(socket))
            && fields.get("tls").is_none()
        {
            let scheme = socket.transport.scheme();
            let message = format!("{scheme}:// needs the listener's `tls`: its certificates");
            reader.wrong(fields.node_of("bind"), &fields.path_of("bind"), message);
        }
        if proxy.is_some() && protocol.transports().iter().all(|known| !known.is_stream()) {
            let message = "goes with connections only: a datagram carries no PROXY header";
            reader.wrong(fields.node_of("accept_proxy"), &fields.path_of("accept_proxy"), message);
        }
        if fields.get("limits").is_some()
            && protocol.transports().iter().all(|known| !known.is_stream())
        {
            let message = "goes with connections only; flows of datagrams have their bounds in `options`: flows, idle_timeout";
            reader.wrong(fields.node_of("limits"), &fields.path_of("limits"), message);
        }
        let mut pools: Vec<&String> =
            pool.iter().chain(routes.iter().map(|(_, pool)| pool)).collect();
        pools.sort();
        pools.dedup();
        for pool in &pools {
            self.fit(reader, raw, protocol, pool);
        }
        let id = |name: &String| {
            let known = self.pools.iter().any(|pool| pool.spec.name == *name);
            // Names are never forgotten: one that is a mistake must not get a number.
            if known { self.ids.id(name) } else { PoolId(u32::MAX) }
        };
        let ids: Vec<PoolId> = pools.iter().map(|name| id(name)).collect();
        let scope = Scope {
            listener: name.clone(),
            node: self.node.name.clone(),
            realm: self.node.realm.clone(),
            sockets: sockets.clone(),
            routes: routes.iter().map(|(matching, pool)| (matching.clone(), id(pool))).collect(),
            pool: pool.as_ref().map(id),
            classify: rules.clone(),
        };
        let mut options = fields.get("options").map_or(Value::Null, Node::to_json);
        for (file, text) in protocol.file_options() {
            if let Err(message) = with_text_of(&mut options, file, text) {
                let (line, column) = raw.node.place(&join("options", file), false);
                reader.wrong_at(line, column, &join(path, &join("options", file)), message);
            }
        }
        let configured = protocol.configure(scope, &options).map_err(|errors| {
            for error in errors {
                let whole = join(path, &error.path);
                let whole = whole.trim_end_matches('.');
                let (line, column) =
                    raw.node.place(&error.path, error.message.starts_with("unknown key"));
                reader.wrong_at(line, column, whole, error.message);
            }
        });
        let configured = configured.ok()?;
        let routes: Vec<Value> = configured
            .matches
            .iter()
            .zip(&routes)
            .map(|(matching, (_, pool))| shown_route(matching, protocol.route_keys(), pool))
            .collect();
        let classify: Vec<Value> = configured
            .class_matches
            .iter()
            .zip(&rules)
            .map(|(matching, rule)| {
                let class = &self.classes[usize::from(rule.class.0)].name;
                json!({ "match": matching, "class": class, "even_carried": rule.even_carried })
            })
            .collect();
        let effective = json!({
            "options": configured.options, "routes": routes, "pool": pool, "classify": classify
        });
        // Pools are in it by name: their numbers differ from process to process.
        let told = format!(
            "{} {} {effective} {limits:?} {tls:?} {proxy:?} {websocket:?}",
            self.node.name, self.node.realm
        );
        self.effective.push((name.clone(), effective));
        Some(ListenerSpec {
            name,
            protocol: protocol.name(),
            sockets,
            pools: ids,
            proxy,
            tls,
            websocket: Arc::new(websocket),
            limits,
            setup: configured.setup,
            fingerprint: strowger_contract::stable_hash(told.as_bytes()),
        })
    }

    fn protocol(&self, reader: &mut Reader, fields: &Fields<'_>) -> Option<&'a dyn Configure> {
        let name = fields.need_text(reader, "protocol")?;
        let found = self.protocols.iter().find(|known| known.name() == name).copied();
        if found.is_none() {
            let message =
                unknown("protocol", &name, self.protocols.iter().map(|known| known.name()));
            reader.wrong(fields.node_of("protocol"), &fields.path_of("protocol"), message);
        }
        found
    }

    fn is_pool(&self, reader: &mut Reader, node: &Node, path: &str, name: &str) -> bool {
        let names = || self.pools.iter().map(|pool| pool.spec.name.as_str());
        let known = names().any(|pool| pool == name);
        if !known {
            reader.wrong(node, path, unknown("pool", name, names()));
        }
        known
    }

    fn routes(
        &self,
        reader: &mut Reader,
        fields: &Fields<'_>,
        protocol: Option<&dyn Configure>,
    ) -> Vec<(Value, String)> {
        let own = protocol.map_or(&[][..], Configure::route_keys);
        let keys = [&["match", "pool"], own].concat();
        let mut routes = Vec::new();
        let Some(node) = fields.get("routes") else { return routes };
        let list = fields.path_of("routes");
        for (index, route) in reader.list(node, &list).iter().enumerate() {
            let path = format!("{list}[{index}]");
            let Some(route) = reader.fields(route, &path, &keys) else { continue };
            let mut matching = route.get("match").map_or(Value::Null, Node::to_json);
            for key in own {
                if matching.get(key).is_some() {
                    let path = join(&route.path_of("match"), key);
                    let message = format!("`{key}` is a key of the route, beside its `match`");
                    reader.wrong(route.node_of("match"), &path, message);
                }
                let Some(value) = route.get(key) else { continue };
                if matching.is_null() {
                    matching = json!({});
                }
                if let Value::Object(matching) = &mut matching {
                    matching.insert((*key).to_owned(), value.to_json());
                }
            }
            let Some(pool) = route.need_text(reader, "pool") else { continue };
            // Kept even if there is no such pool, so that numbers in paths stay right.
            self.is_pool(reader, route.node_of("pool"), &route.path_of("pool"), &pool);
            routes.push((matching, pool));
        }
        routes
    }

    /// The rules of `classify`; a match that is not given matches everything.
    fn rules(&mut self, reader: &mut Reader, fields: &Fields<'_>) -> Vec<ClassRule<Value>> {
        let mut rules = Vec::new();
        let switch = [("true", true), ("false", false)];
        let Some(node) = fields.get("classify") else { return rules };
        let list = fields.path_of("classify");
        let items = reader.list(node, &list);
        if items.len() > CLASSIFY_MAX {
            reader.wrong(node, &list, format!("over {CLASSIFY_MAX} rules"));
        }
        for (index, rule) in items.iter().take(CLASSIFY_MAX).enumerate() {
            let path = format!("{list}[{index}]");
            let keys = ["match", "class", "even_carried"];
            let fields = reader.fields(rule, &path, &keys);
            let matching = fields.as_ref().and_then(|fields| fields.get("match"));
            let matching = matching.map_or(Value::Null, Node::to_json);
            let class = fields.as_ref().and_then(|fields| self.class(reader, fields));
            let carried =
                fields.as_ref().and_then(|fields| fields.choice(reader, "even_carried", &switch));
            // Kept even if it is wrong, so that numbers in paths stay right.
            rules.push(ClassRule {
                matching,
                class: class.unwrap_or(ClassId::BULK),
                even_carried: carried.unwrap_or(false),
            });
        }
        rules
    }

    fn class(&mut self, reader: &mut Reader, fields: &Fields<'_>) -> Option<ClassId> {
        let name = fields.need_text(reader, "class")?;
        let named = |class: &Class| !class.is_vacant() && *class.name == *name;
        let found = self.classes.iter().position(named);
        let (node, path) = (fields.node_of("class"), fields.path_of("class"));
        match found {
            None => {
                let known = self.classes.iter().skip(1).filter(|class| !class.is_vacant());
                let known = known.map(|class| &*class.name);
                reader.wrong(node, &path, unknown("class", &name, known));
                None
            }
            Some(index) if index == usize::from(ClassId::CONTROL.0) => {
                let message = "`control` is never queued or shed: a rule cannot put requests there";
                reader.wrong(node, &path, message);
                None
            }
            Some(index) => {
                self.named.insert(index);
                Some(ClassId(index as u8))
            }
        }
    }

    fn sockets(
        &mut self,
        reader: &mut Reader,
        fields: &Fields<'_>,
        protocol: &dyn Configure,
        listener: &str,
    ) -> Vec<LocalSocket> {
        let mut sockets = Vec::new();
        let Some(node) = fields.need(reader, "bind") else { return sockets };
        let list = match &node.kind {
            Kind::List(list) => list.as_slice(),
            _ => std::slice::from_ref(node),
        };
        let path = fields.path_of("bind");
        if list.is_empty() {
            let scheme = protocol.transports().first().map_or("tcp", |first| first.scheme());
            let message = format!("names no address; write [{scheme}://127.0.0.1:5060]");
            reader.wrong(node, &path, message);
        }
        for (index, item) in list.iter().enumerate() {
            let path = format!("{path}[{index}]");
            let Some((text, advertise, mode)) = bind(reader, item, &path) else { continue };
            let found = endpoint(&text).and_then(|(transport, address)| {
                self.claim(protocol, listener, transport, address)
            });
            match found {
                Ok((transport, address)) => {
                    sockets.push(LocalSocket { transport, address, advertise, mode });
                }
                Err(message) => reader.wrong(item, &path, message),
            }
        }
        sockets
    }

    /// Notes an address as bound, if it can be.
    fn claim(
        &mut self,
        protocol: &dyn Configure,
        listener: &str,
        transport: Transport,
        address: SocketAddr,
    ) -> Result<(Transport, SocketAddr), String> {
        runs_over(protocol, transport)?;
        let taken = self.bound.iter().find(|((kind, other), _)| {
            (*kind == Transport::Udp) == (transport == Transport::Udp) && overlap(*other, address)
        });
        if let Some(((kind, other), owner)) = taken {
            return Err(format!(
                "{} is taken: listener `{owner}` binds {}",
                shown(transport, address),
                shown(*kind, *other)
            ));
        }
        self.bound.insert((transport, address), listener.to_owned());
        Ok((transport, address))
    }

    /// What a protocol means for a pool that it uses.
    fn fit(
        &mut self,
        reader: &mut Reader,
        raw: &RawListener,
        protocol: &'a dyn Configure,
        name: &str,
    ) {
        let Some(pool) = self.pools.iter_mut().find(|pool| pool.spec.name == name) else { return };
        if !self.users.entry(name.to_owned()).or_default().insert(protocol.name()) {
            return;
        }
        pool.spec.needs_link |= protocol.links() == Links::Single;
        let mut wrong = |path: &str, message: String| {
            let message =
                format!("{message} ({} at {}:{} uses it)", raw.path, raw.file, raw.node.line);
            reader.wrong_in(&pool.file, pool.at(path), &format!("pools.{name}.{path}"), message);
        };
        let keys = protocol.session_keys();
        let key = pool.spec.session_key.as_str();
        // One that ends in a colon takes a name behind it.
        let is_key = |known: &&str| {
            *known == key
                || known.ends_with(':') && key.starts_with(*known) && key.len() > known.len()
        };
        if !key.is_empty() && !keys.iter().any(is_key) {
            let what = format!("{} session key", protocol.name());
            wrong("session.key", unknown(&what, &pool.spec.session_key, keys.iter().copied()));
        }
        let known = protocol.bind_keys();
        let mut places = Vec::new();
        for (index, key) in pool.spec.bind_keys.iter().enumerate() {
            match known.iter().position(|known| known == key) {
                Some(place) => places.push(place as u8),
                None if known.is_empty() => {
                    let message = format!("{} knows no subscribers to bind", protocol.name());
                    wrong("bind_keys", message);
                    break;
                }
                None => {
                    let what = format!("{} binding key", protocol.name());
                    let message = unknown(&what, key, known.iter().copied());
                    wrong(&format!("bind_keys[{index}]"), message);
                }
            }
        }
        if pool.spec.connections > 1 && protocol.links() != Links::Single {
            wrong("connections", format!("{} keeps no links: leave it out", protocol.name()));
        }
        if pool.spec.send_proxy != SendProxy::Off && protocol.links() != Links::None {
            let name = protocol.name();
            wrong(
                "send_proxy",
                format!("{name} has links of its own; only raw flows have one client"),
            );
        } else if pool.spec.send_proxy != SendProxy::Off
            && protocol.transports().iter().all(|known| !known.is_stream())
        {
            let name = protocol.name();
            wrong("send_proxy", format!("{name} sends datagrams, which carry no PROXY header"));
        }
        for (index, backend) in pool.spec.backends.iter().enumerate() {
            let no_tls = backend.transport == Transport::Tls && pool.spec.tls.is_none();
            if no_tls {
                let message = "tls:// needs the pool's `tls`: whom to trust".to_owned();
                wrong(&format!("backends[{index}].address"), message);
            }
            if matches!(backend.transport, Transport::Ws | Transport::Wss) {
                let scheme = backend.transport.scheme();
                let message =
                    format!("{scheme}:// is for clients; backends are not dialed over it");
                wrong(&format!("backends[{index}].address"), message);
                continue;
            }
            if let Err(message) = runs_over(protocol, backend.transport) {
                wrong(&format!("backends[{index}].address"), message);
            }
        }
        pool.spec.bind_places = places;
    }

    /// What can only be said of the pools when all listeners are read.
    pub(super) fn finish(self, reader: &mut Reader) {
        let built_in = Class::built_in().len();
        for (index, class) in self.classes.iter().enumerate().skip(built_in) {
            if !self.named.contains(&index) && !class.is_vacant() {
                let name = &class.name;
                reader.warnings.push(format!(
                    "classes.{name}: nothing falls into this class: no built-in one is called `{name}`, and no listener's `classify` names it"
                ));
            }
        }
        for pool in self.pools.iter() {
            let name = &pool.spec.name;
            let users = self.users.get(name);
            probe(reader, pool, self.protocols, users);
            if users.is_none() {
                reader.warnings.push(format!("pool `{name}` is used by no listener"));
            } else if pool.spec.backends.is_empty() {
                let warning =
                    format!("pool `{name}` has no backends: all its requests will be refused");
                reader.warnings.push(warning);
            }
        }
    }
}

fn probe(
    reader: &mut Reader,
    pool: &RawPool,
    protocols: &[&dyn Configure],
    users: Option<&HashSet<&'static str>>,
) {
    let Some(probe) = pool.spec.health.probe.as_deref() else { return };
    let path = format!("pools.{}.health.probe", pool.spec.name);
    let wrong = |reader: &mut Reader, message: String| {
        reader.wrong_in(&pool.file, pool.at("health.probe"), &path, message);
    };
    if probe == TCP_CONNECT {
        let datagrams =
            pool.spec.backends.iter().find(|backend| backend.transport == Transport::Udp);
        if let Some(backend) = datagrams {
            let message = format!(
                "`{TCP_CONNECT}` says nothing about backend `{}`, which is reached over udp",
                backend.id
            );
            wrong(reader, message);
        }
        return;
    }
    let Some(owner) = protocols.iter().find(|known| known.probes().contains(&probe)) else {
        let known = protocols.iter().flat_map(|known| known.probes()).copied();
        return wrong(reader, unknown("probe", probe, known.chain([TCP_CONNECT])));
    };
    let unasked = pool
        .spec
        .backends
        .iter()
        .find(|backend| !matches!(backend.transport, Transport::Udp | Transport::Tcp));
    if let Some(backend) = unasked {
        let message = format!(
            "`{probe}` asks over udp and tcp only, and backend `{}` is reached over {}; use `{TCP_CONNECT}`",
            backend.id,
            backend.transport.scheme()
        );
        wrong(reader, message);
    }
    if users.is_some_and(|users| !users.contains(owner.name())) {
        // Not an error: a TCP listener may well stand before SIP servers.
        let warning = format!(
            "{path}: `{probe}` asks in {}, but no {} listener uses the pool",
            owner.name(),
            owner.name()
        );
        reader.warnings.push(warning);
    }
}

/// One entry of `bind`: its text, what is advertised in its stead, a unix socket's permissions.
fn bind(
    reader: &mut Reader,
    item: &Node,
    path: &str,
) -> Option<(String, Option<String>, Option<u32>)> {
    if !matches!(item.kind, Kind::Map(_)) {
        return Some((reader.text(item, path)?, None, None));
    }
    let bind = reader.fields(item, path, &["address", "advertise", "mode"])?;
    let address = bind.need_text(reader, "address")?;
    let mode = bind.text(reader, "mode").and_then(|text| {
        let mode = u32::from_str_radix(&text, 8).ok().filter(|mode| *mode <= 0o777);
        if mode.is_none() || !address.starts_with("unix://") {
            let message = "goes with unix:// only, and is octal in quotes, such as \"0660\"";
            reader.wrong(bind.node_of("mode"), &bind.path_of("mode"), message);
        }
        mode
    });
    Some((address, bind.text(reader, "advertise"), mode))
}

fn runs_over(protocol: &dyn Configure, transport: Transport) -> Result<(), String> {
    let known = protocol.transports();
    if known.contains(&transport) {
        return Ok(());
    }
    let known: Vec<&str> = known.iter().map(|transport| transport.scheme()).collect();
    Err(format!(
        "{} does not run over {}; it runs over {}",
        protocol.name(),
        transport.scheme(),
        known.join(", ")
    ))
}

/// A route as it is shown: what is its own stands beside its `match`.
fn shown_route(matching: &Value, own: &[&str], pool: &str) -> Value {
    let mut matching = matching.clone();
    let mut route = serde_json::Map::new();
    for key in own {
        let value = matching.as_object_mut().and_then(|matching| matching.remove(*key));
        route.extend(value.map(|value| ((*key).to_owned(), value)));
    }
    route.insert("match".to_owned(), matching);
    route.insert("pool".to_owned(), pool.into());
    Value::Object(route)
}

/// Puts the text of the file that the option at `file` names in front of what the option at `text`
/// says; nothing if it names none.
fn with_text_of(options: &mut Value, file: &str, text: &str) -> Result<(), String> {
    /// A dictionary of all of 3GPP has a few hundred kilobytes.
    const FILE_BYTES_MAX: u64 = 4 << 20;
    let pointer = |path: &str| format!("/{}", path.replace('.', "/"));
    let Some(name) = options.pointer(&pointer(file)).and_then(Value::as_str) else { return Ok(()) };
    let told = |error: std::io::Error| format!("{name}: {error}");
    let size = std::fs::metadata(name).map_err(told)?.len();
    if size > FILE_BYTES_MAX {
        return Err(format!("{name} has {size} bytes; at most {FILE_BYTES_MAX} are read"));
    }
    let mut whole = std::fs::read_to_string(name).map_err(told)?;
    let (above, key) = text.rsplit_once('.').unwrap_or(("", text));
    let place = if above.is_empty() { Some(options) } else { options.pointer_mut(&pointer(above)) };
    if let Some(Value::Object(place)) = place {
        if let Some(more) = place.get(key).and_then(Value::as_str) {
            whole.push('\n');
            whole.push_str(more);
        }
        place.insert(key.to_owned(), whole.into());
    }
    Ok(())
}
