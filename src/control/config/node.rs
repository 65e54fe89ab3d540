//! The node, its admin server and its registry: what holds for the process.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::permissions::{self, Permission};
use super::read::Reader;
use super::tree::{Kind, Node};
use crate::routing::{ClientAuth, NodeSpec, TlsServerSpec};

/// Keys in a token key file, at most: each is tried on every token that no earlier one signed.
const TOKEN_KEYS_MAX: usize = 8;

/// What holds for the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSettings {
    /// Workers; `None`: one per core.
    pub workers: Option<u8>,
    /// Keys of tokens: the first signs, all check.
    pub token_keys: Vec<[u8; 16]>,
    /// Where they were read from.
    pub token_key_file: Option<String>,
    /// Room in the session table.
    pub sessions_max: usize,
    /// Room in the table of subscriber bindings, in sessions.
    pub bindings_max: usize,
    /// Microseconds for which a worker lets messages gather where many come; 0: not at all.
    pub rx_usecs: u32,
}

impl Default for NodeSettings {
    fn default() -> Self {
        Self {
            workers: None,
            token_keys: Vec::new(),
            token_key_file: None,
            sessions_max: 1 << 20,
            bindings_max: 1 << 18,
            rx_usecs: RX_USECS,
        }
    }
}

/// Costs a busy edge a fifth of a millisecond at most on each way, and saves it about a third of its CPU time
/// (docs/performance.md).
const RX_USECS: u32 = 200;

/// Longer pauses would show in deadlines, and in the kernel's queues: 2 ms of 500,000 datagrams a second
/// are 1,000.
pub(super) const RX_USECS_MAX: u64 = 2_000;

/// The admin HTTP server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminSettings {
    /// Where it listens.
    pub listen: SocketAddr,
    /// How clients are spoken to, if not in plain text.
    pub tls: Option<Arc<TlsServerSpec>>,
    /// What clients must show.
    pub token: Option<String>,
    /// Where that was read from.
    pub token_file: Option<String>,
    /// Further tokens, each with its rights; a reload changes them.
    pub permissions: Vec<Permission>,
    /// Where those were read from.
    pub permissions_file: Option<String>,
}

impl Default for AdminSettings {
    fn default() -> Self {
        let listen = SocketAddr::from(([127, 0, 0, 1], 9080));
        Self {
            listen,
            tls: None,
            token: None,
            token_file: None,
            permissions: Vec::new(),
            permissions_file: None,
        }
    }
}

/// Reads `node`.
pub(super) fn node(
    reader: &mut Reader,
    node: &Node,
    spec: &mut NodeSpec,
    settings: &mut NodeSettings,
) {
    const KEYS: [&str; 7] =
        ["name", "workers", "realm", "token_key_file", "sessions_max", "bindings_max", "rx_usecs"];
    let Some(fields) = reader.fields(node, "node", &KEYS) else { return };
    if let Some(name) = fields.text(reader, "name") {
        spec.name = name;
    }
    if let Some(realm) = fields.text(reader, "realm") {
        spec.realm = realm;
    }
    if let Some(workers) = fields.get("workers") {
        settings.workers = self::workers(reader, workers);
    }
    if let Some(count) = fields.number(reader, "sessions_max", 1_024, 1 << 30) {
        settings.sessions_max = count as usize;
    }
    if let Some(count) = fields.number(reader, "bindings_max", 1_024, 1 << 28) {
        settings.bindings_max = count as usize;
    }
    if let Some(micros) = fields.number(reader, "rx_usecs", 0, RX_USECS_MAX) {
        settings.rx_usecs = micros as u32;
    }
    if let Some(file) = fields.text(reader, "token_key_file") {
        match token_keys(&file) {
            Ok(keys) => settings.token_keys = keys,
            Err(message) => {
                let node = fields.node_of("token_key_file");
                reader.wrong(node, "node.token_key_file", message);
            }
        }
        warn_if_open(reader, "node.token_key_file", &file);
        settings.token_key_file = Some(file);
    }
}

fn workers(reader: &mut Reader, node: &Node) -> Option<u8> {
    const MOST: u64 = strowger_contract::ids::WORKERS_MAX as u64;
    match &node.kind {
        Kind::Text(text) if text == "auto" => None,
        Kind::Text(text) => {
            let message = format!("`{text}` is neither `auto` nor a number from 1 to {MOST}");
            reader.wrong(node, "node.workers", message);
            None
        }
        _ => reader.number(node, "node.workers", 1, MOST).map(|count| count as u8),
    }
}

/// Reads `admin`.
pub(super) fn admin(reader: &mut Reader, node: &Node, admin: &mut AdminSettings) {
    let Some(fields) =
        reader.fields(node, "admin", &["listen", "token_file", "permissions_file", "tls"])
    else {
        return;
    };
    admin.tls = super::tls::server(reader, &fields);
    if let Some(text) = fields.text(reader, "listen") {
        match text.parse() {
            Ok(address) => admin.listen = address,
            Err(_) => reader.wrong(
                fields.node_of("listen"),
                "admin.listen",
                format!("`{text}` is no address; write 127.0.0.1:9080 or [::1]:9080"),
            ),
        }
    }
    if let Some(file) = fields.text(reader, "token_file") {
        match token(&file) {
            Ok(token) => admin.token = Some(token),
            Err(message) => {
                reader.wrong(fields.node_of("token_file"), "admin.token_file", message);
            }
        }
        warn_if_open(reader, "admin.token_file", &file);
        admin.token_file = Some(file);
    }
    if let Some(file) = fields.text(reader, "permissions_file") {
        match permissions::read(&file) {
            Ok(permissions) => admin.permissions = permissions,
            Err(message) => {
                let node = fields.node_of("permissions_file");
                reader.wrong(node, "admin.permissions_file", message);
            }
        }
        warn_if_open(reader, "admin.permissions_file", &file);
        admin.permissions_file = Some(file);
    }
    let has_token = admin.token_file.is_some() || admin.permissions_file.is_some();
    let mutual = admin.tls.as_ref().is_some_and(|tls| tls.client == ClientAuth::Required);
    if !admin.listen.ip().is_loopback() && !has_token && !mutual {
        reader.wrong(
            fields.node_of("listen"),
            "admin.listen",
            format!(
                "{} is not on loopback, where the admin API needs a token or mutual TLS: name a file with `token_file`, or `tls` with `client_ca`",
                admin.listen
            ),
        );
    }
}

/// The registry of leased instances.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistrySettings {
    /// Where leases are kept over a restart; a reload does not change it.
    pub state_file: Option<String>,
    /// A lease's time, if its registration names none.
    pub lease: Duration,
}

impl Default for RegistrySettings {
    fn default() -> Self {
        Self { state_file: None, lease: Duration::from_secs(15) }
    }
}

/// Reads `registry`.
pub(super) fn registry(reader: &mut Reader, node: &Node, registry: &mut RegistrySettings) {
    const LONGEST: Duration = Duration::from_secs(3_600);
    let Some(fields) = reader.fields(node, "registry", &["state_file", "lease"]) else { return };
    if let Some(file) = fields.text(reader, "state_file") {
        let path = Path::new(&file);
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        if path.is_dir() {
            let message = format!("`{file}` is a directory; name a file in it");
            reader.wrong(fields.node_of("state_file"), "registry.state_file", message);
        } else if parent.is_some_and(|parent| !parent.is_dir()) {
            let message = format!("the directory of `{file}` does not exist");
            reader.wrong(fields.node_of("state_file"), "registry.state_file", message);
        }
        registry.state_file = Some(file);
    }
    if let Some(lease) = fields.duration(reader, "lease") {
        if lease < Duration::from_secs(1) || lease > LONGEST {
            reader.wrong(fields.node_of("lease"), "registry.lease", "must be from 1s to 1h");
        }
        registry.lease = lease;
    }
}

/// Reads a key file: 32 hex digits a line, the first signs, the others still check.
fn token_keys(file: &str) -> Result<Vec<[u8; 16]>, String> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| format!("`{file}` cannot be read: {error}"))?;
    let mut keys = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let key = token_key(line).ok_or_else(|| {
            format!("`{file}`, line {}: expected a key of 32 hex digits", index + 1)
        })?;
        keys.push(key);
    }
    match keys.len() {
        0 => Err(format!(
            "`{file}` has no key; make one with: od -An -N16 -tx1 /dev/urandom | tr -d ' '"
        )),
        count if count > TOKEN_KEYS_MAX => {
            Err(format!("`{file}` has {count} keys; at most {TOKEN_KEYS_MAX} are tried"))
        }
        _ => Ok(keys),
    }
}

fn token_key(line: &str) -> Option<[u8; 16]> {
    if line.len() != 32 || !line.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(line, 16).ok().map(u128::to_be_bytes)
}

fn token(file: &str) -> Result<String, String> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| format!("`{file}` cannot be read: {error}"))?;
    match text.trim() {
        "" => Err(format!("`{file}` is empty")),
        token if token.contains(|letter: char| !letter.is_ascii_graphic()) => {
            Err(format!("`{file}` must hold one line of plain characters"))
        }
        token => Ok(token.to_owned()),
    }
}

/// A secret that everybody on the host can read is none.
fn warn_if_open(reader: &mut Reader, path: &str, file: &str) {
    const OTHERS: u32 = 0o007;
    let Ok(about) = std::fs::metadata(Path::new(file)) else { return };
    if about.permissions().mode() & OTHERS != 0 {
        let warning =
            format!("{path}: every user of this host may read `{file}`; chmod 600 {file}");
        reader.warnings.push(warning);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_32_digits() {
        let key = token_key("000102030405060708090a0b0c0d0e0f").expect("a key");
        assert_eq!(key, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        for bad in
            ["", "00", "+00102030405060708090a0b0c0d0e0f", "g00102030405060708090a0b0c0d0e0f"]
        {
            assert_eq!(token_key(bad), None, "{bad}");
        }
    }
}
