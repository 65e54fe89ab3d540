//! What a listener does with connections before their protocol sees them, and how much it bears.

use std::time::Duration;

use super::pools::set;
use super::read::{Fields, Reader};
use crate::routing::{AcceptProxy, ListenerLimits, WebSocketSpec};

/// Whose PROXY headers are believed.
pub(super) fn accept_proxy(reader: &mut Reader, fields: &Fields<'_>) -> Option<AcceptProxy> {
    let node = fields.get("accept_proxy")?;
    let path = fields.path_of("accept_proxy");
    let given = reader.fields(node, &path, &["trusted", "timeout"])?;
    let mut trusted = Vec::new();
    if let Some(list) = given.need(reader, "trusted") {
        let at = given.path_of("trusted");
        for (index, item) in reader.list(list, &at).iter().enumerate() {
            let at = format!("{at}[{index}]");
            let Some(text) = reader.text(item, &at) else { continue };
            match strowger_contract::network::network(&text) {
                Some(network) => trusted.push(network),
                None => {
                    let message = format!("`{text}` is no network; write 10.0.0.0/8 or an address");
                    reader.wrong(item, &at, message);
                }
            }
        }
        if trusted.is_empty() {
            reader.wrong(list, &at, "must name who may speak for others; everybody is 0.0.0.0/0");
        }
    }
    let timeout = given.duration(reader, "timeout").unwrap_or(Duration::from_secs(3));
    if timeout.is_zero() || timeout > Duration::from_secs(60) {
        let message = "must be over 0 and at most 60s";
        reader.wrong(given.node_of("timeout"), &given.path_of("timeout"), message);
    }
    Some(AcceptProxy { trusted, timeout })
}

/// How WebSocket clients are spoken to.
pub(super) fn websocket(reader: &mut Reader, fields: &Fields<'_>) -> WebSocketSpec {
    let mut spec = WebSocketSpec::default();
    let Some(node) = fields.get("websocket") else { return spec };
    let path = fields.path_of("websocket");
    const KEYS: [&str; 4] = ["origins", "message_bytes", "handshake", "ping"];
    let Some(given) = reader.fields(node, &path, &KEYS) else { return spec };
    if let Some(list) = given.get("origins") {
        let at = given.path_of("origins");
        for (index, item) in reader.list(list, &at).iter().enumerate() {
            let at = format!("{at}[{index}]");
            let Some(text) = reader.text(item, &at) else { continue };
            let host = text.split_once("://").map(|(_, host)| host);
            if host.is_none_or(|host| host.is_empty() || host.contains('/')) {
                let message = format!(
                    "`{text}` is no origin; write https://phone.example.net, without a path"
                );
                reader.wrong(item, &at, message);
            }
            spec.origins.push(text);
        }
    }
    let bytes = given.number(reader, "message_bytes", 1_024, 16 << 20);
    set(&mut spec.message_bytes, bytes.map(|count| count as usize));
    set(&mut spec.handshake, given.duration(reader, "handshake"));
    set(&mut spec.ping, given.duration(reader, "ping"));
    if spec.handshake.is_zero() || spec.handshake > Duration::from_secs(60) {
        let message = "must be over 0 and at most 60s";
        reader.wrong(given.node_of("handshake"), &given.path_of("handshake"), message);
    }
    spec
}

/// What a listener bears.
pub(super) fn limits(reader: &mut Reader, fields: &Fields<'_>) -> ListenerLimits {
    const KEYS: [&str; 7] = [
        "connections",
        "queued_bytes",
        "idle",
        "connect",
        "per_source",
        "keep_alive",
        "user_timeout",
    ];
    let mut limits = ListenerLimits::default();
    let Some(node) = fields.get("limits") else { return limits };
    let path = fields.path_of("limits");
    let Some(given) = reader.fields(node, &path, &KEYS) else { return limits };
    let connections = given.number(reader, "connections", 1, 10_000_000);
    let queued = given.number(reader, "queued_bytes", 4_096, 1 << 30);
    set(&mut limits.connections, connections.map(|count| count as u32));
    set(&mut limits.queued_bytes, queued.map(|count| count as usize));
    set(&mut limits.idle, given.duration(reader, "idle"));
    set(&mut limits.connect, given.duration(reader, "connect"));
    let per_source = given.number(reader, "per_source", 0, 10_000_000);
    set(&mut limits.per_source, per_source.map(|count| count as u32));
    for (key, place) in
        [("keep_alive", &mut limits.keep_alive), ("user_timeout", &mut limits.user_timeout)]
    {
        let Some(time) = given.duration(reader, key) else { continue };
        if !time.is_zero()
            && !(Duration::from_secs(1)..=Duration::from_secs(32_767)).contains(&time)
        {
            reader.wrong(
                given.node_of(key),
                &given.path_of(key),
                "must be 0, or from 1s to 32767s",
            );
        }
        *place = time;
    }
    if limits.connect.is_zero() {
        reader.wrong(given.node_of("connect"), &given.path_of("connect"), "must be over 0");
    }
    limits
}
