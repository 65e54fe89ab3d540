//! Providers of instances.

use std::path::PathBuf;
use std::time::Duration;

use super::read::{Fields, Reader, join};
use super::tree::Node;
use crate::control::providers::{
    CloudFoundrySettings, Isolation, Mapping, ProviderSettings, TcpRoutesSettings,
};

/// Servers, and URIs that are mapped, at most.
const SERVERS_MAX: usize = 32;
const URIS_MAX: usize = 10_000;

/// How `isolation` is written.
pub(super) const ISOLATIONS: [(&str, Isolation); 3] = [
    ("all", Isolation::All),
    ("shared-and-segments", Isolation::SharedAndSegments),
    ("segments", Isolation::Segments),
];

/// Reads `providers`.
pub(super) fn providers(reader: &mut Reader, node: &Node) -> ProviderSettings {
    let mut settings = ProviderSettings::default();
    let known = ["cloud_foundry", "tcp_routes"];
    let Some(fields) = reader.fields(node, "providers", &known) else { return settings };
    if let Some(node) = fields.get("tcp_routes") {
        let path = "providers.tcp_routes";
        if let Some(fields) = reader.fields(node, path, &["router_group"]) {
            let group = fields.text(reader, "router_group");
            let router_group = group.unwrap_or_else(|| "default-tcp".to_owned());
            settings.tcp_routes = Some(TcpRoutesSettings { router_group });
        }
    }
    if let Some(node) = fields.get("cloud_foundry") {
        settings.cloud_foundry = cloud_foundry(reader, node);
    }
    settings
}

fn cloud_foundry(reader: &mut Reader, node: &Node) -> Option<CloudFoundrySettings> {
    const KEYS: [&str; 12] = [
        "servers",
        "user",
        "password_file",
        "ca",
        "certificate",
        "key",
        "pools",
        "isolation",
        "segments",
        "stale_threshold",
        "register_interval",
        "hosts",
    ];
    let path = "providers.cloud_foundry";
    let fields = reader.fields(node, path, &KEYS)?;
    let servers = servers(reader, &fields);
    let password_file = fields.text(reader, "password_file");
    let password = password_file.as_ref().and_then(|file| match std::fs::read_to_string(file) {
        Ok(text) => Some(text.trim().to_owned()),
        Err(error) => {
            let message = format!("`{file}` cannot be read: {error}");
            reader.wrong(
                fields.node_of("password_file"),
                &fields.path_of("password_file"),
                message,
            );
            None
        }
    });
    let user = fields.text(reader, "user");
    if user.is_none() && password_file.is_some() {
        reader.wrong(fields.node, path, "`password_file` needs `user`");
    }
    let [ca, certificate, key] =
        ["ca", "certificate", "key"].map(|name| file(reader, &fields, name));
    if certificate.is_some() != key.is_some() {
        reader.wrong(fields.node, path, "`certificate` and `key` go together");
    }
    let mut pools = Vec::new();
    if let Some(node) = fields.get("pools") {
        let path = fields.path_of("pools");
        let entries = reader.named(node, &path);
        if entries.len() > URIS_MAX {
            reader.wrong(node, &path, format!("at most {URIS_MAX} URIs can be mapped"));
        }
        for entry in entries {
            if let Some(pool) = reader.text(&entry.value, &join(&path, &entry.key)) {
                pools.push((entry.key.clone(), pool));
            }
        }
    }
    let isolation = fields.choice(reader, "isolation", &ISOLATIONS).unwrap_or_default();
    let segments = texts(reader, &fields, "segments");
    if isolation == Isolation::Segments && segments.is_empty() {
        reader.wrong(fields.node_of("isolation"), path, "`isolation: segments` needs `segments`");
    }
    let hosts = texts(reader, &fields, "hosts").into_iter().filter_map(|text| {
        let parsed = text.parse();
        if parsed.is_err() {
            let (node, path) = (fields.node_of("hosts"), fields.path_of("hosts"));
            reader.wrong(node, &path, format!("`{text}` is no IP address"));
        }
        parsed.ok()
    });
    let hosts = hosts.collect();
    let stale_threshold = seconds(reader, &fields, "stale_threshold", 120);
    let register_interval = seconds(reader, &fields, "register_interval", 20);
    if register_interval >= stale_threshold {
        let message = format!(
            "must be shorter than stale_threshold ({})",
            strowger_contract::duration::format(stale_threshold)
        );
        let node = fields.node_of("register_interval");
        reader.wrong(node, &fields.path_of("register_interval"), message);
    }
    let mapping = Mapping { pools, isolation, segments, stale_threshold };
    Some(CloudFoundrySettings {
        servers,
        user,
        password,
        password_file,
        ca,
        certificate,
        key,
        mapping,
        register_interval,
        hosts,
    })
}

fn servers(reader: &mut Reader, fields: &Fields<'_>) -> Vec<String> {
    let servers = texts(reader, fields, "servers");
    let (node, path) = (fields.node_of("servers"), fields.path_of("servers"));
    if servers.is_empty() || servers.len() > SERVERS_MAX {
        reader.wrong(node, &path, format!("name 1 to {SERVERS_MAX} NATS servers"));
    }
    for server in &servers {
        let good = ["nats://", "tls://"].iter().any(|scheme| {
            server.strip_prefix(scheme).is_some_and(|rest| !rest.is_empty() && !rest.contains('@'))
        });
        if !good {
            let message = format!(
                "`{server}` is no NATS server; write nats://192.0.2.1:4222 or tls://nats.example.net:4222"
            );
            reader.wrong(node, &path, message);
        }
    }
    servers
}

fn texts(reader: &mut Reader, fields: &Fields<'_>, key: &str) -> Vec<String> {
    let Some(node) = fields.get(key) else { return Vec::new() };
    let path = fields.path_of(key);
    let list = reader.list(node, &path).iter().enumerate();
    list.filter_map(|(index, item)| reader.text(item, &format!("{path}[{index}]"))).collect()
}

fn file(reader: &mut Reader, fields: &Fields<'_>, key: &str) -> Option<PathBuf> {
    let path = PathBuf::from(fields.text(reader, key)?);
    if !path.is_file() {
        let message = format!("`{}` is no file", path.display());
        reader.wrong(fields.node_of(key), &fields.path_of(key), message);
    }
    Some(path)
}

fn seconds(reader: &mut Reader, fields: &Fields<'_>, key: &str, default: u64) -> Duration {
    let (least, most) = (Duration::from_secs(1), Duration::from_secs(3_600));
    let Some(value) = fields.duration(reader, key) else { return Duration::from_secs(default) };
    if value < least || value > most || value.subsec_nanos() != 0 {
        let message = "must be whole seconds, from 1s to 1h";
        reader.wrong(fields.node_of(key), &fields.path_of(key), message);
    }
    value.max(least)
}
