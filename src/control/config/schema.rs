//! The JSON schema of a configuration, for editors. Its protocols' parts are made from their types.

use serde_json::{Map, Value, json};

use super::classes::ON_MISS;
use super::configure::Configure;
use super::pools::{DNS_TRANSPORTS, SEND_PROXY};
use super::providers::ISOLATIONS;
use super::tls::{CLIENTS, VERIFIES, VERSIONS};

/// One of some words.
fn words<T>(words: &[(&str, T)]) -> Value {
    json!({ "enum": words.iter().map(|(word, _)| *word).collect::<Vec<_>>() })
}

/// The schema of an edge's configuration.
#[must_use]
pub fn edge_schema(protocols: &[&dyn Configure]) -> Value {
    let mut generator = schemars::SchemaGenerator::default();
    let listeners: Vec<Value> =
        protocols.iter().map(|protocol| listener(*protocol, &mut generator)).collect();
    let definitions: Map<String, Value> = generator.take_definitions(true).into_iter().collect();
    let duration = json!({ "type": "string", "pattern": "^(0|([0-9]+(ms|s|m|h|d))+)$" });
    let number = |min: u64, max: u64| json!({ "type": "integer", "minimum": min, "maximum": max });
    let map = |properties: Value| json!({ "type": "object", "additionalProperties": false, "properties": properties });
    let backend = json!({
        "type": "object", "additionalProperties": false, "required": ["id", "address"],
        "properties": {
            "id": { "type": "string" },
            "address": { "type": "string", "pattern": "^(udp|tcp|tls|unix|sctp)://" },
            "weight": number(0, 65_535), "priority": number(0, 65_535), "capacity": number(1, 100_000_000),
            "origin_host": { "type": "string" }, "generation": number(0, u64::from(u32::MAX)),
            "state": { "enum": ["ready", "starting", "canary", "suspended", "draining"] }
        }
    });
    let mut bind_keys: Vec<&str> =
        protocols.iter().flat_map(|protocol| protocol.bind_keys()).copied().collect();
    bind_keys.dedup();
    let pool = map(json!({
        "balance": { "enum": ["hash", "least-loaded", "weighted-random", "round-robin", "priority"] },
        "bounded_load": number(101, 1_000),
        "session": map(json!({ "key": { "type": "string" }, "ttl": duration, "share": { "type": "string" } })),
        "health": map(json!({ "probe": { "type": ["string", "null"] }, "interval": duration, "timeout": duration, "rise": number(1, 1_000), "fall": number(1, 1_000) })),
        "outlier": map(json!({ "faults": number(0, 1_000_000), "ejection": duration, "max_percent": number(0, 100) })),
        "qos": map(json!({ "policy": { "enum": ["deadline", "fifo"] }, "adaptive": { "type": "boolean" } })),
        "slow_start": duration, "debounce": duration, "panic_percent": number(0, 100),
        "drain": map(json!({ "deadline": duration })),
        "connections": number(1, u64::from(strowger_contract::LANES_MAX)),
        "bind_keys": { "type": "array", "items": { "enum": bind_keys } },
        "dns": { "type": "object", "additionalProperties": false, "required": ["name", "transport"], "properties": { "name": { "type": "string" }, "port": { "anyOf": [number(1, 65_535), { "type": "null" }] }, "transport": words(&DNS_TRANSPORTS), "grace": duration } },
        "send_proxy": words(&SEND_PROXY),
        "tls": map(json!({
            "ca": { "type": "string" }, "name": { "type": "string" }, "verify": words(&VERIFIES),
            "certificate": { "type": "string" }, "key": { "type": "string" },
            "alpn": { "type": "array", "items": { "type": "string" } }, "min_version": words(&VERSIONS)
        })),
        "backends": { "type": "array", "items": backend }
    }));
    let class = map(json!({
        "tier": number(0, 3), "deadline": duration, "retry": number(0, 3), "share_min": number(0, 100), "queue_max": number(0, 1_000_000),
        "on_miss": words(&ON_MISS)
    }));
    let workers = json!({ "anyOf": [{ "const": "auto" }, number(1, 64)] });
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Strowger edge configuration",
        "type": "object",
        "additionalProperties": false,
        "properties": {
            "version": { "const": 1 },
            "node": map(json!({ "name": { "type": "string" }, "workers": workers, "realm": { "type": "string" }, "token_key_file": { "type": ["string", "null"] }, "sessions_max": number(1_024, 1 << 30), "bindings_max": number(1_024, 1 << 28), "rx_usecs": number(0, super::node::RX_USECS_MAX) })),
            "admin": map(json!({ "listen": { "type": "string" }, "token_file": { "type": ["string", "null"] }, "permissions_file": { "type": ["string", "null"] }, "tls": server_tls(&duration) })),
            "registry": map(json!({ "state_file": { "type": ["string", "null"] }, "lease": duration })),
            "brownout": map(json!({ "enabled": { "type": "boolean" }, "loop_lag": duration, "memory": number(1, 100), "descriptors": number(1, 100), "hysteresis": duration })),
            "dns": map(json!({ "servers": { "type": "array", "maxItems": 8, "items": { "type": "string" } }, "query_timeout": duration, "timeout": duration, "cache": number(16, 1_000_000), "concurrent": number(1, 4_096), "ttl_max": duration, "stale": duration })),
            "providers": map(json!({ "tcp_routes": map(json!({ "router_group": { "type": "string" } })), "cloud_foundry": { "type": "object", "additionalProperties": false, "required": ["servers"], "properties": {
                "servers": { "type": "array", "minItems": 1, "maxItems": 32, "items": { "type": "string", "pattern": "^(nats|tls)://" } },
                "user": { "type": "string" }, "password_file": { "type": "string" },
                "ca": { "type": "string" }, "certificate": { "type": "string" }, "key": { "type": "string" },
                "pools": { "type": "object", "additionalProperties": { "type": "string" } },
                "isolation": words(&ISOLATIONS), "segments": { "type": "array", "items": { "type": "string" } },
                "stale_threshold": duration, "register_interval": duration,
                "hosts": { "type": "array", "items": { "type": "string" } } } } })),
            "cdr": map(json!({ "file": { "type": "string" }, "max_bytes": number(4_096, 1 << 40), "keep": number(0, 1_000) })),
            "hep": map(json!({ "collector": { "type": "string" }, "sample_one_in": number(1, 1_000_000), "capture_id": number(0, u64::from(u32::MAX)), "auth_key_file": { "type": "string" } })),
            "watch": { "type": "array", "items": { "type": "string" } },
            "classes": { "type": "object", "additionalProperties": class },
            "listeners": { "type": "array", "items": { "oneOf": listeners } },
            "pools": { "type": "object", "additionalProperties": pool }
        },
        "$defs": definitions
    })
}

fn listener(protocol: &dyn Configure, generator: &mut schemars::SchemaGenerator) -> Value {
    let (options, matching) = protocol.schemas(generator);
    let mut route = json!({ "match": matching, "pool": { "type": "string" } });
    for key in protocol.route_keys() {
        // Read with the match, but written beside it.
        let name = matching["$ref"].as_str().and_then(|path| path.rsplit('/').next());
        let known = name.and_then(|name| generator.definitions_mut().get_mut(name));
        let own = known
            .and_then(|known| known.get_mut("properties"))
            .and_then(Value::as_object_mut)
            .and_then(|properties| properties.remove(*key));
        if let Some(own) = own {
            route[*key] = own;
        }
    }
    let duration = json!({ "type": "string", "pattern": "^(0|([0-9]+(ms|s|m|h|d))+)$" });
    let bind = json!({ "anyOf": [
        { "type": "string" },
        { "type": "object", "additionalProperties": false, "required": ["address"],
          "properties": { "address": { "type": "string" }, "advertise": { "type": "string" }, "mode": { "type": "string", "pattern": "^0?[0-7]{3}$" } } }
    ] });
    json!({
        "type": "object",
        "additionalProperties": false,
        "required": ["name", "protocol", "bind"],
        "properties": {
            "name": { "type": "string" },
            "protocol": { "const": protocol.name() },
            "bind": { "anyOf": [bind, { "type": "array", "items": bind }] },
            "pool": { "type": "string" },
            "routes": { "type": "array", "items": {
                "type": "object", "additionalProperties": false, "required": ["pool"],
                "properties": route } },
            "classify": { "type": "array", "maxItems": 64, "items": {
                "type": "object", "additionalProperties": false, "required": ["class"],
                "properties": { "match": matching, "class": { "type": "string" }, "even_carried": { "type": "boolean" } } } },
            "options": options,
            "tls": server_tls(&duration),
            "limits": { "type": "object", "additionalProperties": false, "properties": {
                "connections": { "type": "integer", "minimum": 1 },
                "queued_bytes": { "type": "integer", "minimum": 4096 },
                "idle": duration, "connect": duration,
                "per_source": { "type": "integer", "minimum": 0 },
                "keep_alive": duration, "user_timeout": duration } },
            "accept_proxy": { "type": "object", "additionalProperties": false, "required": ["trusted"], "properties": {
                "trusted": { "type": "array", "minItems": 1, "items": { "type": "string" } }, "timeout": duration } },
            "websocket": { "type": "object", "additionalProperties": false, "properties": {
                "origins": { "type": "array", "items": { "type": "string" } },
                "message_bytes": { "type": "integer", "minimum": 1024, "maximum": 16777216 },
                "handshake": duration, "ping": duration } }
        }
    })
}

fn server_tls(duration: &Value) -> Value {
    json!({ "type": "object", "additionalProperties": false, "required": ["certificates"], "properties": {
                "certificates": { "type": "array", "minItems": 1, "items": {
                    "type": "object", "additionalProperties": false, "required": ["certificate", "key"],
                    "properties": { "certificate": { "type": "string" }, "key": { "type": "string" }, "ocsp": { "type": "string" } } } },
                "client": words(&CLIENTS), "client_ca": { "type": "string" },
                "alpn": { "type": "array", "items": { "type": "string" } },
                "min_version": words(&VERSIONS), "handshake": duration } })
}
