//! `tls` of listeners and pools.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::read::{Fields, Reader};
use super::tree::Node;
use crate::routing::{
    ClientAuth, TlsCertificate, TlsClientSpec, TlsServerSpec, TlsVersion, Verify,
};
use crate::tls::{check_client, check_server};

/// Certificates of one listener, at most.
const CERTIFICATES_MAX: usize = 1_000;

/// How `min_version` is written.
pub(super) const VERSIONS: [(&str, TlsVersion); 2] =
    [("1.2", TlsVersion::V1_2), ("1.3", TlsVersion::V1_3)];

/// How `client` is written.
pub(super) const CLIENTS: [(&str, ClientAuth); 3] = [
    ("none", ClientAuth::Off),
    ("optional", ClientAuth::Optional),
    ("required", ClientAuth::Required),
];

/// How `verify` is written.
pub(super) const VERIFIES: [(&str, Verify); 3] =
    [("name", Verify::Name), ("authority", Verify::Authority), ("none", Verify::None)];

const HANDSHAKE: Duration = Duration::from_secs(5);

/// Reads a listener's `tls`.
pub(super) fn server(reader: &mut Reader, fields: &Fields<'_>) -> Option<Arc<TlsServerSpec>> {
    const KEYS: [&str; 6] =
        ["certificates", "client", "client_ca", "alpn", "min_version", "handshake"];
    let node = fields.get("tls")?;
    let path = fields.path_of("tls");
    let before = reader.errors.len();
    let given = reader.fields(node, &path, &KEYS)?;
    let mut certificates = Vec::new();
    if let Some(list) = given.need(reader, "certificates") {
        let at = given.path_of("certificates");
        let items = reader.list(list, &at);
        if items.is_empty() || items.len() > CERTIFICATES_MAX {
            reader.wrong(list, &at, format!("must name 1 to {CERTIFICATES_MAX} certificates"));
        }
        for (index, item) in items.iter().enumerate() {
            let path = format!("{at}[{index}]");
            let Some(files) = reader.fields(item, &path, &["certificate", "key", "ocsp"]) else {
                continue;
            };
            let certificate = files.need_text(reader, "certificate");
            let key = files.need_text(reader, "key");
            let ocsp = files.text(reader, "ocsp").map(PathBuf::from);
            let Some((certificate, key)) = certificate.zip(key) else { continue };
            certificates.push(TlsCertificate {
                certificate: certificate.into(),
                key: key.into(),
                ocsp,
            });
        }
    }
    let client_ca = given.text(reader, "client_ca").map(PathBuf::from);
    let client = given.choice(reader, "client", &CLIENTS);
    let client = client.unwrap_or(match client_ca {
        Some(_) => ClientAuth::Required,
        None => ClientAuth::Off,
    });
    if client != ClientAuth::Off && client_ca.is_none() {
        let message = "needs `client_ca`: the authorities that vouch for clients";
        reader.wrong(given.node_of("client"), &given.path_of("client"), message);
    }
    let handshake = given.duration(reader, "handshake").unwrap_or(HANDSHAKE);
    if handshake.is_zero() || handshake > Duration::from_secs(60) {
        let message = "must be over 0 and at most 60s";
        reader.wrong(given.node_of("handshake"), &given.path_of("handshake"), message);
    }
    let spec = TlsServerSpec {
        certificates,
        client,
        client_ca,
        alpn: alpn(reader, &given),
        min_version: given.choice(reader, "min_version", &VERSIONS).unwrap_or_default(),
        handshake,
    };
    if reader.errors.len() == before {
        tell(reader, node, &path, check_server(&spec));
    }
    Some(Arc::new(spec))
}

/// Reads a pool's `tls`.
pub(super) fn client(reader: &mut Reader, fields: &Fields<'_>) -> Option<Arc<TlsClientSpec>> {
    const KEYS: [&str; 7] = ["ca", "name", "verify", "certificate", "key", "alpn", "min_version"];
    let node = fields.get("tls")?;
    let path = fields.path_of("tls");
    let before = reader.errors.len();
    let given = reader.fields(node, &path, &KEYS)?;
    let ca = given.text(reader, "ca").map(PathBuf::from);
    let verify = given.choice(reader, "verify", &VERIFIES).unwrap_or_default();
    match verify {
        Verify::None => reader.warnings.push(format!(
            "{path}.verify: whoever answers at a backend's address is believed to be it"
        )),
        _ if ca.is_none() => reader.wrong(
            node,
            &path,
            "needs `ca`: the authorities that vouch for the backends (or `verify: none`)",
        ),
        _ => {}
    }
    let certificate = given.text(reader, "certificate");
    let key = given.text(reader, "key");
    if certificate.is_some() != key.is_some() {
        reader.wrong(node, &path, "`certificate` and `key` go together");
    }
    let certificate = certificate.zip(key).map(|(one, two)| (one.into(), two.into()));
    let spec = TlsClientSpec {
        ca,
        name: given.text(reader, "name"),
        verify,
        certificate,
        alpn: alpn(reader, &given),
        min_version: given.choice(reader, "min_version", &VERSIONS).unwrap_or_default(),
    };
    if reader.errors.len() == before {
        tell(reader, node, &path, check_client(&spec));
    }
    Some(Arc::new(spec))
}

fn tell(reader: &mut Reader, node: &Node, path: &str, errors: Vec<(String, String)>) {
    for (at, message) in errors {
        reader.wrong(node.at(&at), &format!("{path}.{at}"), message);
    }
}

fn alpn(reader: &mut Reader, given: &Fields<'_>) -> Vec<String> {
    let Some(node) = given.get("alpn") else { return Vec::new() };
    let path = given.path_of("alpn");
    let mut names = Vec::new();
    for (index, item) in reader.list(node, &path).iter().enumerate() {
        let at = format!("{path}[{index}]");
        match reader.text(item, &at) {
            Some(name) if name.len() > 255 => {
                reader.wrong(item, &at, "is longer than 255 bytes");
            }
            name => names.extend(name),
        }
    }
    names
}
