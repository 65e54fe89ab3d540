//! Configurations as users see them: through the command line.
//!
//! `bad/` holds one kind of mistake a file (or directory); `snapshots/` what `strowger check` says
//! to each. After a wanted change: `INSTA_UPDATE=always cargo test --test config`.

mod bad;
mod manifest;
mod schema;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Where the repository is.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs the command line in a directory.
fn strowger(directory: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_strowger"))
        .args(arguments)
        .current_dir(directory)
        .output()
        .expect("the command runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("text")
}

/// What is in a directory, in order of names.
fn entries(directory: &Path) -> Vec<PathBuf> {
    let list = std::fs::read_dir(directory).expect("a directory");
    let mut paths: Vec<PathBuf> = list.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    paths
}
