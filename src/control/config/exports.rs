//! What leaves the node besides traffic: records of calls, copies of messages.

use super::read::Reader;
use super::tree::Node;
use crate::observe::{CdrSettings, HepSettings};

/// A record takes about 500 bytes: some 200,000 calls.
const CDR_BYTES: u64 = 100 << 20;
const CDR_KEEP: u64 = 10;

/// Reads `cdr`.
pub(super) fn cdr(reader: &mut Reader, node: &Node) -> Option<CdrSettings> {
    let fields = reader.fields(node, "cdr", &["file", "max_bytes", "keep"])?;
    let file = fields.need_text(reader, "file")?;
    let max_bytes = fields.number(reader, "max_bytes", 4_096, 1 << 40).unwrap_or(CDR_BYTES);
    let keep = fields.number(reader, "keep", 0, 1_000).unwrap_or(CDR_KEEP) as u32;
    let folder = std::path::Path::new(&file).parent().filter(|path| !path.as_os_str().is_empty());
    if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
        let message = format!("there is no directory `{}`", folder.display());
        reader.wrong(fields.node_of("file"), "cdr.file", message);
    }
    Some(CdrSettings { file: file.into(), max_bytes, keep })
}

/// Reads `hep`.
pub(super) fn hep(reader: &mut Reader, node: &Node) -> Option<HepSettings> {
    const KEYS: [&str; 4] = ["collector", "sample_one_in", "capture_id", "auth_key_file"];
    let fields = reader.fields(node, "hep", &KEYS)?;
    let collector = fields.need_text(reader, "collector")?;
    let address = collector.strip_prefix("udp://").unwrap_or(&collector);
    let host_port = address.rsplit_once(':').filter(|(host, port)| {
        !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    if host_port.is_none() {
        let message = format!(
            "`{collector}` is no collector; write host:port, such as homer.example.net:9060"
        );
        reader.wrong(fields.node_of("collector"), "hep.collector", message);
    }
    let one_in = fields.number(reader, "sample_one_in", 1, 1_000_000).unwrap_or(1);
    let capture_id = fields.number(reader, "capture_id", 0, u64::from(u32::MAX)).unwrap_or(2_001);
    let auth_key_file = fields.text(reader, "auth_key_file");
    let key = auth_key_file.as_ref().and_then(|file| {
        let text = std::fs::read_to_string(file);
        let text = text.map_err(|error| format!("`{file}` cannot be read: {error}"));
        let key = text.and_then(|text| match text.trim() {
            "" => Err(format!("`{file}` is empty")),
            key => Ok(key.to_owned()),
        });
        let node = fields.node_of("auth_key_file");
        key.map_err(|message| reader.wrong(node, "hep.auth_key_file", message)).ok()
    });
    Some(HepSettings {
        collector: address.to_owned(),
        sample_one_in: one_in as u32,
        capture_id: capture_id as u32,
        auth_key: key,
        auth_key_file,
    })
}
