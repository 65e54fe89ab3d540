//! Effective values and where each comes from, as a configuration that means the same.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::Value;
use strowger_contract::unix::shown;
use strowger_contract::{ClassId, duration};

use super::Loaded;
use super::pools::{BALANCES, DNS_TRANSPORTS, POLICIES, SEND_PROXY};
use super::providers::ISOLATIONS;
use super::tls::{CLIENTS, VERIFIES, VERSIONS};
use super::tree::{self, Node, Step};
use crate::control::providers::{
    CloudFoundrySettings, DnsPoolSettings, ProviderSettings, TcpRoutesSettings,
};
use crate::control::resolve::DnsSettings;
use crate::observe::{CdrSettings, HepSettings};
use crate::routing::{
    BackendSpec, BrownoutSpec, ListenerSpec, PoolSpec, TlsClientSpec, TlsServerSpec,
};

/// Where the notes begin, if the values leave room.
const NOTE_COLUMN: usize = 56;

/// A value as it is printed.
enum Shown {
    Plain(String),
    List(Vec<Self>),
    Map(Vec<(String, Self)>),
}

/// Prints effective values, each with the place that it was read from, or `default`. What comes out
/// is a configuration itself, and means the same.
#[must_use]
pub fn explain(loaded: &Loaded) -> String {
    let mut print = Print { out: String::new(), origins: Origins::new(loaded) };
    for warning in &loaded.warnings {
        // Writing to a string cannot fail.
        let _ok = writeln!(print.out, "# warning: {warning}");
    }
    print.map(&whole(loaded), &mut Vec::new());
    print.out
}

fn whole(loaded: &Loaded) -> Vec<(String, Shown)> {
    let node = &loaded.node;
    let workers = node.workers.map_or_else(|| "auto".to_owned(), |count| count.to_string());
    let of_control = usize::from(ClassId::CONTROL.0) + 1;
    let in_force = |class: &&strowger_contract::Class| !class.is_vacant();
    let classes = loaded.spec.classes.iter().skip(of_control).filter(in_force).map(|class| {
        let values = map([
            ("tier", number(class.tier)),
            ("deadline", class.deadline.map_or_else(null, time)),
            ("retry", number(class.retry)),
            ("share_min", number(class.share_min)),
            ("queue_max", number(class.queue_max)),
            ("on_miss", text(super::classes::word_of(class.on_miss))),
        ]);
        (class.name.to_string(), values)
    });
    let mut watched: Vec<Shown> = Vec::new();
    watched.extend(loaded.watch.iter().map(|path| text(&path.display().to_string())));
    let listeners = loaded.spec.listeners.iter().zip(&loaded.effective);
    let listeners = listeners.map(|(spec, (_, effective))| listener(spec, effective)).collect();
    let pools = loaded.spec.pools.iter().map(|spec| {
        (
            spec.name.clone(),
            pool(spec, loaded.providers.dns.iter().find(|fed| fed.pool == spec.name)),
        )
    });
    let values = [
        ("version", number(1)),
        (
            "node",
            map([
                ("name", text(&loaded.spec.node.name)),
                ("workers", Shown::Plain(workers)),
                ("realm", optional(Some(&loaded.spec.node.realm))),
                ("token_key_file", optional(node.token_key_file.as_ref())),
                ("sessions_max", number(node.sessions_max)),
                ("bindings_max", number(node.bindings_max)),
                ("rx_usecs", number(node.rx_usecs)),
            ]),
        ),
        (
            "admin",
            map([
                ("listen", text(&loaded.admin.listen.to_string())),
                ("token_file", optional(loaded.admin.token_file.as_ref())),
                ("permissions_file", optional(loaded.admin.permissions_file.as_ref())),
                ("tls", loaded.admin.tls.as_ref().map_or_else(null, |tls| server_tls(tls))),
            ]),
        ),
        (
            "registry",
            map([
                ("state_file", optional(loaded.registry.state_file.as_ref())),
                ("lease", time(loaded.registry.lease)),
            ]),
        ),
        ("dns", dns(&loaded.dns)),
        ("providers", providers(&loaded.providers)),
        ("brownout", brownout(&loaded.brownout)),
        ("cdr", loaded.cdr.as_ref().map_or_else(null, cdr)),
        ("hep", loaded.hep.as_ref().map_or_else(null, hep)),
        ("watch", Shown::List(watched)),
        ("classes", Shown::Map(classes.collect())),
        ("listeners", Shown::List(listeners)),
        ("pools", Shown::Map(pools.collect())),
    ];
    values.map(|(key, value)| (key.to_owned(), value)).into()
}

fn brownout(spec: &BrownoutSpec) -> Shown {
    map([
        ("enabled", Shown::Plain(spec.enabled.to_string())),
        ("loop_lag", time(spec.loop_lag)),
        ("memory", number(spec.memory)),
        ("descriptors", number(spec.descriptors)),
        ("hysteresis", time(spec.hysteresis)),
    ])
}

fn dns(dns: &DnsSettings) -> Shown {
    let servers = dns.servers.iter().map(|server| text(&server.to_string())).collect();
    map([
        ("servers", Shown::List(servers)),
        ("query_timeout", time(dns.query_timeout)),
        ("timeout", time(dns.timeout)),
        ("cache", number(dns.cache)),
        ("concurrent", number(dns.concurrent)),
        ("ttl_max", time(dns.ttl_max)),
        ("stale", time(dns.stale)),
    ])
}

fn fed(fed: &DnsPoolSettings) -> Shown {
    let transport = DNS_TRANSPORTS.iter().find(|(_, known)| *known == fed.transport);
    map([
        ("name", text(&fed.name)),
        ("port", fed.port.map_or_else(null, number)),
        ("transport", text(transport.map_or("udp", |(word, _)| word))),
        ("grace", time(fed.grace)),
    ])
}

fn providers(providers: &ProviderSettings) -> Shown {
    let routes =
        |settings: &TcpRoutesSettings| map([("router_group", text(&settings.router_group))]);
    map([
        ("cloud_foundry", providers.cloud_foundry.as_ref().map_or_else(null, cloud_foundry)),
        ("tcp_routes", providers.tcp_routes.as_ref().map_or_else(null, routes)),
    ])
}

fn cloud_foundry(settings: &CloudFoundrySettings) -> Shown {
    let texts = |list: &[String]| Shown::List(list.iter().map(|item| text(item)).collect());
    let path = |path: &Option<std::path::PathBuf>| {
        path.as_ref().map_or_else(null, |path| text(&path.display().to_string()))
    };
    let mapping = &settings.mapping;
    let pools = mapping.pools.iter().map(|(uri, pool)| (uri.clone(), text(pool))).collect();
    let isolation = ISOLATIONS.iter().find(|(_, known)| *known == mapping.isolation);
    map([
        ("servers", texts(&settings.servers)),
        ("user", optional(settings.user.as_ref())),
        ("password_file", optional(settings.password_file.as_ref())),
        ("ca", path(&settings.ca)),
        ("certificate", path(&settings.certificate)),
        ("key", path(&settings.key)),
        ("pools", Shown::Map(pools)),
        ("isolation", text(isolation.map_or("all", |(word, _)| word))),
        ("segments", texts(&mapping.segments)),
        ("stale_threshold", time(mapping.stale_threshold)),
        ("register_interval", time(settings.register_interval)),
        ("hosts", Shown::List(settings.hosts.iter().map(|host| text(&host.to_string())).collect())),
    ])
}

fn cdr(cdr: &CdrSettings) -> Shown {
    map([
        ("file", text(&cdr.file.display().to_string())),
        ("max_bytes", number(cdr.max_bytes)),
        ("keep", number(cdr.keep)),
    ])
}

fn hep(hep: &HepSettings) -> Shown {
    map([
        ("collector", text(&hep.collector)),
        ("sample_one_in", number(hep.sample_one_in)),
        ("capture_id", number(hep.capture_id)),
        ("auth_key_file", optional(hep.auth_key_file.as_ref())),
    ])
}

fn listener(spec: &ListenerSpec, effective: &Value) -> Shown {
    let bind = spec.sockets.iter().map(|socket| {
        let address = text(&shown(socket.transport, socket.address));
        let mode = socket.mode.map(|mode| ("mode", Shown::Plain(format!("\"{mode:04o}\""))));
        let advertise = socket.advertise.as_ref().map(|name| ("advertise", text(name)));
        if mode.is_none() && advertise.is_none() {
            return address;
        }
        let values = [("address", address)].into_iter().chain(advertise).chain(mode);
        Shown::Map(values.map(|(key, value)| (key.to_owned(), value)).collect())
    });
    let limits = &spec.limits;
    let mut values = vec![
        ("name", text(&spec.name)),
        ("protocol", text(spec.protocol)),
        ("bind", Shown::List(bind.collect())),
    ];
    values.extend(effective["pool"].as_str().map(|pool| ("pool", text(pool))));
    let routes: Vec<Shown> =
        effective["routes"].as_array().into_iter().flatten().map(json).collect();
    if !routes.is_empty() {
        values.push(("routes", Shown::List(routes)));
    }
    let rules: Vec<Shown> =
        effective["classify"].as_array().into_iter().flatten().map(json).collect();
    if !rules.is_empty() {
        values.push(("classify", Shown::List(rules)));
    }
    values.push(("options", json(&effective["options"])));
    values.extend(spec.tls.as_ref().map(|tls| ("tls", server_tls(tls))));
    values.extend(spec.proxy.as_ref().map(|proxy| {
        let network =
            |(address, length): &(std::net::IpAddr, u8)| text(&format!("{address}/{length}"));
        let trusted = Shown::List(proxy.trusted.iter().map(network).collect());
        ("accept_proxy", map([("trusted", trusted), ("timeout", time(proxy.timeout))]))
    }));
    values.push((
        "limits",
        map([
            ("connections", number(limits.connections)),
            ("queued_bytes", number(limits.queued_bytes)),
            ("idle", time(limits.idle)),
            ("connect", time(limits.connect)),
            ("per_source", number(limits.per_source)),
            ("keep_alive", time(limits.keep_alive)),
            ("user_timeout", time(limits.user_timeout)),
        ]),
    ));
    Shown::Map(values.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
}

fn pool(spec: &PoolSpec, fed: Option<&DnsPoolSettings>) -> Shown {
    let balance = BALANCES.iter().find(|(_, balance)| *balance == spec.balance);
    let policy = POLICIES.iter().find(|(_, policy)| *policy == spec.qos.policy);
    let health = &spec.health;
    map([
        ("balance", text(balance.map_or("hash", |(name, _)| name))),
        ("bounded_load", spec.bounded_load.map_or_else(null, number)),
        (
            "session",
            map([
                ("key", optional(Some(&spec.session_key))),
                ("ttl", time(spec.session_ttl)),
                ("share", optional(spec.session_share.as_ref())),
            ]),
        ),
        (
            "health",
            map([
                ("probe", optional(health.probe.as_ref())),
                ("interval", time(health.interval)),
                ("timeout", time(health.timeout)),
                ("rise", number(health.rise)),
                ("fall", number(health.fall)),
            ]),
        ),
        (
            "outlier",
            map([
                ("faults", number(health.outlier_faults)),
                ("ejection", time(health.outlier_ejection)),
                ("max_percent", number(health.outlier_max_percent)),
            ]),
        ),
        (
            "qos",
            map([
                ("policy", text(policy.map_or("deadline", |(name, _)| name))),
                ("adaptive", Shown::Plain(spec.qos.adaptive.to_string())),
            ]),
        ),
        ("dns", fed.map_or_else(null, self::fed)),
        ("slow_start", time(spec.slow_start)),
        ("drain", map([("deadline", time(spec.drain_deadline))])),
        ("debounce", time(spec.debounce)),
        ("panic_percent", number(spec.panic_percent)),
        ("connections", number(spec.connections)),
        ("bind_keys", Shown::List(spec.bind_keys.iter().map(|key| text(key)).collect())),
        ("send_proxy", text(word(&SEND_PROXY, spec.send_proxy))),
        ("tls", spec.tls.as_ref().map_or_else(null, |tls| client_tls(tls))),
        ("backends", Shown::List(spec.backends.iter().map(backend).collect())),
    ])
}

fn server_tls(tls: &TlsServerSpec) -> Shown {
    let certificates = tls.certificates.iter().map(|files| {
        map([
            ("certificate", path(&files.certificate)),
            ("key", path(&files.key)),
            ("ocsp", files.ocsp.as_ref().map_or_else(null, |file| path(file))),
        ])
    });
    map([
        ("certificates", Shown::List(certificates.collect())),
        ("client", text(word(&CLIENTS, tls.client))),
        ("client_ca", tls.client_ca.as_ref().map_or_else(null, |file| path(file))),
        ("alpn", Shown::List(tls.alpn.iter().map(|name| text(name)).collect())),
        ("min_version", text(word(&VERSIONS, tls.min_version))),
        ("handshake", time(tls.handshake)),
    ])
}

fn client_tls(tls: &TlsClientSpec) -> Shown {
    let own = tls.certificate.as_ref();
    map([
        ("ca", tls.ca.as_ref().map_or_else(null, |file| path(file))),
        ("name", optional(tls.name.as_ref())),
        ("verify", text(word(&VERIFIES, tls.verify))),
        ("certificate", own.map_or_else(null, |(file, _)| path(file))),
        ("key", own.map_or_else(null, |(_, file)| path(file))),
        ("alpn", Shown::List(tls.alpn.iter().map(|name| text(name)).collect())),
        ("min_version", text(word(&VERSIONS, tls.min_version))),
    ])
}

fn path(file: &Path) -> Shown {
    text(&file.display().to_string())
}

fn word<T: PartialEq>(words: &[(&'static str, T)], value: T) -> &'static str {
    words.iter().find(|(_, known)| *known == value).map_or("", |(word, _)| word)
}

fn backend(spec: &BackendSpec) -> Shown {
    map([
        ("id", text(&spec.id)),
        ("address", text(&shown(spec.transport, spec.address))),
        ("weight", number(spec.weight)),
        ("priority", number(spec.priority)),
        ("capacity", spec.capacity.map_or_else(null, number)),
        ("origin_host", optional(spec.identity.as_ref())),
        ("generation", number(spec.generation)),
        ("state", text(spec.state.word())),
    ])
}

fn map<const N: usize>(values: [(&str, Shown); N]) -> Shown {
    Shown::Map(values.map(|(key, value)| (key.to_owned(), value)).into())
}

fn null() -> Shown {
    Shown::Plain("null".to_owned())
}

fn number(value: impl std::fmt::Display) -> Shown {
    Shown::Plain(value.to_string())
}

fn time(value: std::time::Duration) -> Shown {
    Shown::Plain(duration::format(value))
}

fn text(value: &str) -> Shown {
    Shown::Plain(quoted(value))
}

fn optional(value: Option<&String>) -> Shown {
    value.filter(|value| !value.is_empty()).map_or_else(null, |value| text(value))
}

fn json(value: &Value) -> Shown {
    match value {
        Value::String(value) => text(value),
        Value::Array(list) => Shown::List(list.iter().map(json).collect()),
        Value::Object(values) => {
            Shown::Map(values.iter().map(|(key, value)| (key.clone(), json(value))).collect())
        }
        other => Shown::Plain(other.to_string()),
    }
}

/// As YAML reads it back: quoted if it could be taken for something else. A JSON string is a YAML
/// string.
fn quoted(value: &str) -> String {
    let letters = |first: char| first.is_ascii_alphanumeric() || first == '/';
    let rest = |letter: char| letter.is_ascii_alphanumeric() || "-_./:@[]".contains(letter);
    let word = ["true", "false", "null"].contains(&value.to_ascii_lowercase().as_str());
    let number = value.parse::<f64>().is_ok() || value.starts_with("0x") || value.starts_with("0o");
    let plain = value.starts_with(letters) && value.chars().all(rest) && !value.ends_with(':');
    if plain && !word && !number { value.to_owned() } else { Value::from(value).to_string() }
}

/// Where values were read from.
struct Origins<'a> {
    files: Vec<(&'a str, Node)>,
    /// The file of each listener, and its place there.
    listeners: Vec<(usize, usize)>,
}

impl<'a> Origins<'a> {
    fn new(loaded: &'a Loaded) -> Self {
        let mut files = Vec::new();
        let mut listeners = Vec::new();
        for source in &loaded.sources {
            // They have been read before, so nothing is wrong with them.
            let Some(node) = tree::parse(source, &mut Vec::new()) else { continue };
            let count = node.find(&[Step::Key("listeners")]).map_or(0, Node::len);
            listeners.extend((0..count).map(|index| (files.len(), index)));
            files.push((source.name.as_str(), node));
        }
        Self { files, listeners }
    }

    fn of(&self, path: &[Step<'_>]) -> Option<String> {
        if let [Step::Key("listeners"), Step::Index(index), rest @ ..] = path {
            let (file, index) = self.listeners.get(*index)?;
            let mut path = vec![Step::Key("listeners"), Step::Index(*index)];
            path.extend_from_slice(rest);
            return place(self.files.get(*file)?, &path);
        }
        self.files.iter().find_map(|file| place(file, path))
    }
}

fn place((file, tree): &(&str, Node), path: &[Step<'_>]) -> Option<String> {
    let found = tree.find(path).or_else(|| match path {
        // A single address may stand without a list.
        [rest @ .., Step::Index(0)] => tree.find(rest).filter(|node| node.is_scalar()),
        _ => None,
    });
    found.map(|node| format!("{file}:{}", node.line))
}

struct Print<'a> {
    out: String,
    origins: Origins<'a>,
}

impl Print<'_> {
    fn map<'k>(&mut self, values: &'k [(String, Shown)], path: &mut Vec<Step<'k>>) {
        for (index, (key, value)) in values.iter().enumerate() {
            // The first key of a list's entry stands behind its dash.
            let behind = index == 0 && matches!(path.last(), Some(Step::Index(_)));
            let indent = if behind { String::new() } else { "  ".repeat(path.len()) };
            path.push(Step::Key(key));
            self.value(&format!("{indent}{}:", quoted(key)), value, path);
            path.pop();
        }
    }

    fn value<'k>(&mut self, start: &str, value: &'k Shown, path: &mut Vec<Step<'k>>) {
        match value {
            Shown::Plain(text) => self.line(&format!("{start} {text}"), path),
            Shown::List(list) => match inline(list) {
                Some(text) => self.line(&format!("{start} [{text}]"), path),
                None => {
                    self.bare(start);
                    for (index, item) in list.iter().enumerate() {
                        path.push(Step::Index(index));
                        self.item(item, path);
                        path.pop();
                    }
                }
            },
            Shown::Map(values) if values.is_empty() => self.line(&format!("{start} {{}}"), path),
            Shown::Map(values) => {
                self.bare(start);
                self.map(values, path);
            }
        }
    }

    fn item<'k>(&mut self, item: &'k Shown, path: &mut Vec<Step<'k>>) {
        let indent = "  ".repeat(path.len() - 1);
        match item {
            Shown::Map(values) if !values.is_empty() => {
                self.out.push_str(&indent);
                self.out.push_str("- ");
                self.map(values, path);
            }
            other => self.value(&format!("{indent}-"), other, path),
        }
    }

    fn bare(&mut self, start: &str) {
        self.out.push_str(start);
        self.out.push('\n');
    }

    fn line(&mut self, text: &str, path: &[Step<'_>]) {
        let origin = self.origins.of(path).unwrap_or_else(|| "default".to_owned());
        let begun = self.out.len() - self.out.rfind('\n').map_or(0, |end| end + 1);
        let width = NOTE_COLUMN.saturating_sub(begun);
        let _ok = writeln!(self.out, "{text:<width$}  # {origin}");
    }
}

/// A short list of plain values in one line.
fn inline(list: &[Shown]) -> Option<String> {
    let mut parts = Vec::new();
    for item in list {
        let Shown::Plain(text) = item else { return None };
        // In a flow list these would end a plain value.
        let bare = !text.contains(['[', ']', ',', '{', '}']) || text.starts_with('"');
        parts.push(if bare { text.clone() } else { Value::from(text.as_str()).to_string() });
    }
    Some(parts.join(", "))
}
