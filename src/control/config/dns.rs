//! Name servers.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::read::Reader;
use super::tree::Node;
use crate::control::resolve::DnsSettings;

/// Name servers, at most: with each that is silent a name takes longer.
const SERVERS_MAX: usize = 8;

/// Reads `dns`.
pub(super) fn dns(reader: &mut Reader, node: &Node, dns: &mut DnsSettings) {
    const KEYS: [&str; 7] =
        ["servers", "query_timeout", "timeout", "cache", "concurrent", "ttl_max", "stale"];
    let Some(fields) = reader.fields(node, "dns", &KEYS) else { return };
    if let Some(list) = fields.get("servers") {
        dns.servers = servers(reader, list);
    }
    let (second, minute) = (Duration::from_secs(1), Duration::from_secs(60));
    let (short, week) = (Duration::from_millis(10), Duration::from_secs(7 * 86_400));
    for (key, place, least, most) in [
        ("query_timeout", &mut dns.query_timeout, short, minute),
        ("timeout", &mut dns.timeout, short, minute),
        ("ttl_max", &mut dns.ttl_max, second, week),
        ("stale", &mut dns.stale, Duration::ZERO, week),
    ] {
        let Some(value) = fields.duration(reader, key) else { continue };
        if value < least || value > most {
            let show = strowger_contract::duration::format;
            let message = format!("must be from {} to {}", show(least), show(most));
            reader.wrong(fields.node_of(key), &fields.path_of(key), message);
        }
        *place = value;
    }
    if let Some(names) = fields.number(reader, "cache", 16, 1_000_000) {
        dns.cache = names as usize;
    }
    if let Some(names) = fields.number(reader, "concurrent", 1, 4_096) {
        dns.concurrent = names as usize;
    }
}

fn servers(reader: &mut Reader, node: &Node) -> Vec<SocketAddr> {
    let mut servers = Vec::new();
    let list = reader.list(node, "dns.servers");
    if list.len() > SERVERS_MAX {
        reader.wrong(node, "dns.servers", format!("at most {SERVERS_MAX} are asked"));
    }
    for (index, item) in list.iter().enumerate() {
        let path = format!("dns.servers[{index}]");
        let Some(text) = reader.text(item, &path) else { continue };
        let address = text.parse::<SocketAddr>();
        match address.or_else(|_| text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 53))) {
            Ok(address) => servers.push(address),
            Err(_) => {
                let message = format!(
                    "`{text}` is no address; write 192.0.2.53, 192.0.2.53:5353 or [2001:db8::53]:53"
                );
                reader.wrong(item, &path, message);
            }
        }
    }
    servers
}
