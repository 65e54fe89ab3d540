//! What the agent keeps over its own end: whole or not at all.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::launch::private_file;
use super::ports::Ports;
use super::supervisor::Machine;

/// All that is kept, in `agent.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) version: u32,
    /// Which life of the host it is of: after another one, no process is left.
    pub(crate) boot: String,
    pub(crate) apps: BTreeMap<String, Machine>,
    pub(crate) ports: Ports,
}

/// The host's life.
pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Reads it; nothing if there is none yet. One that cannot be read is set aside, and said so: processes
/// that run are then found by nobody, so the operator must look.
///
/// # Errors
/// It is there and cannot be read.
pub(crate) fn read(folder: &Path) -> Result<Option<State>, String> {
    let path = folder.join("agent.json");
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("{}: {error}", path.display())),
    };
    let state: State = serde_json::from_slice(&text).map_err(|error| {
        format!("{}: {error}; move it away to start with nothing", path.display())
    })?;
    if state.version != 1 {
        return Err(format!(
            "{} is of version {}; this release reads 1",
            path.display(),
            state.version
        ));
    }
    Ok(Some(state))
}

/// Writes it.
///
/// # Errors
/// The disk says no.
pub(crate) fn write(folder: &Path, text: &[u8]) -> io::Result<()> {
    private_file(&folder.join("agent.json"), text)?;
    // The rename itself is only safe once the directory is.
    fs::File::open(folder)?.sync_all()
}
