//! The state file: whole or not at all, whatever happens while it is written.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Lease;

/// What is kept.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    pub(super) version: u32,
    pub(super) epoch: u64,
    pub(super) instances: Vec<(String, String, Lease)>,
}

/// Reads the file; nothing if there is none yet.
pub(super) fn read(path: &Path) -> Result<Option<State>, String> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("cannot be read: {error}")),
    };
    let state: State = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    if state.version != 1 {
        return Err(format!("is of version {}; this release reads 1", state.version));
    }
    Ok(Some(state))
}

/// Writes a new file beside the old one, has it on the disk, and puts it in the old one's place.
pub(super) fn write(path: &Path, state: &State) -> io::Result<()> {
    let text = serde_json::to_vec(state)?;
    replace(path, &text)
}

/// Replaces a file's content, crash-safe.
pub(crate) fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(text)?;
    file.sync_all()?;
    drop(file);
    fs::rename(&new, path)?;
    // The rename itself is only safe once the directory is.
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or_else(|| Path::new(".")))?.sync_all()
}
