//! Releases: immutable directories, each named by its content's digest.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use ring::digest::{Context, SHA256};
use serde_json::json;

use super::launch::private_folder;
use super::manifest::{App, Service};

/// Files of a release, at most.
const FILES_MAX: usize = 100_000;

/// Releases whose directories are kept, for each application.
pub(crate) const KEEP: usize = 10;

/// A file of a release.
struct Entry {
    path: PathBuf,
    relative: String,
    kind: Kind,
}

enum Kind {
    File { executable: bool },
    Folder,
    Link(PathBuf),
}

/// All below a directory, in order. Only files, folders and symbolic links may be there.
fn entries(dir: &Path) -> io::Result<Vec<Entry>> {
    let (mut folders, mut found) = (vec![dir.to_owned()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            let data = fs::symlink_metadata(&path)?;
            let kind = if data.is_dir() {
                folders.push(path.clone());
                Kind::Folder
            } else if data.is_symlink() {
                Kind::Link(fs::read_link(&path)?)
            } else if data.is_file() {
                Kind::File { executable: data.mode() & 0o111 != 0 }
            } else {
                return Err(io::Error::other(format!(
                    "{}: neither a file nor a folder",
                    path.display()
                )));
            };
            let relative = path.strip_prefix(dir).unwrap_or(&path).to_string_lossy().into_owned();
            found.push(Entry { path, relative, kind });
            if found.len() > FILES_MAX {
                return Err(io::Error::other(format!("more than {FILES_MAX} files")));
            }
        }
    }
    found.sort_by(|one, two| one.relative.cmp(&two.relative));
    Ok(found)
}

/// The digest of a directory: of names, contents, links, and whether a file can be run.
///
/// # Errors
/// It cannot be read.
pub(crate) fn digest(dir: &Path) -> io::Result<String> {
    let mut context = Context::new(&SHA256);
    let mut buffer = vec![0; 64 << 10];
    for entry in entries(dir)? {
        let (word, size) = match &entry.kind {
            Kind::Folder => ("folder", 0),
            Kind::Link(_) => ("link", 0),
            Kind::File { executable: false } => ("file", fs::metadata(&entry.path)?.len()),
            Kind::File { executable: true } => ("program", fs::metadata(&entry.path)?.len()),
        };
        context.update(format!("{word}\0{}\0{size}\0", entry.relative).as_bytes());
        match &entry.kind {
            Kind::Folder => {}
            Kind::Link(to) => context.update(format!("{}\0", to.display()).as_bytes()),
            Kind::File { .. } => {
                let mut file = fs::File::open(&entry.path)?;
                loop {
                    let count = file.read(&mut buffer)?;
                    if count == 0 {
                        break;
                    }
                    context.update(&buffer[..count]);
                }
            }
        }
    }
    Ok(hex(context.finish().as_ref()))
}

fn hex(bytes: &[u8]) -> String {
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{digits}")
}

/// The digest of all that a process's start depends on: a change of it is a new release.
pub(crate) fn run_digest(app: &App, services: &BTreeMap<String, Service>, content: &str) -> String {
    let text = json!({
        "content": content, "exec": app.exec, "env": app.env, "secrets": app.secrets, "bind": app.bind,
        "services": services, "ports": app.ports, "host": app.host, "placement": app.placement,
        "files": app.resources.files, "cpus": app.resources.cpus,
        "git": app.release.as_ref().and_then(|it| it.git.as_ref()), "logs": app.logs,
    })
    .to_string();
    let mut context = Context::new(&SHA256);
    context.update(text.as_bytes());
    hex(context.finish().as_ref())
}

/// Copies a directory into the releases, unless it is there; its digest and its place.
///
/// # Errors
/// It cannot be read or written, or is not what the manifest says.
pub(crate) fn take(
    state: &Path,
    app_name: &str,
    app: &App,
) -> Result<(String, Option<PathBuf>), String> {
    let Some(source) = &app.release else { return Ok((String::new(), None)) };
    let wrong = |error: io::Error| format!("release.dir: {}: {error}", source.dir.display());
    let content = digest(&source.dir).map_err(wrong)?;
    if let Some(wanted) = source.digest.as_ref().filter(|wanted| **wanted != content) {
        return Err(format!("release.digest: the directory's is {content}, not {wanted}"));
    }
    let short: String = content.trim_start_matches("sha256:").chars().take(16).collect();
    let parent = state.join("releases").join(app_name);
    let place = parent.join(&short);
    if place.exists() {
        if digest(&place).is_ok_and(|there| there == content) {
            return Ok((content, Some(place)));
        }
        // Somebody changed it; the source is at hand, so it is made anew.
        remove(&place).map_err(wrong)?;
    }
    private_folder(&parent).map_err(wrong)?;
    let new = parent.join(format!("{short}.new"));
    if new.exists() {
        remove(&new).map_err(wrong)?;
    }
    copy(&source.dir, &new).map_err(wrong)?;
    let copied = digest(&new).map_err(wrong)?;
    if copied != content {
        return Err(format!("release.dir: {} changed while it was copied", source.dir.display()));
    }
    fs::rename(&new, &place).map_err(wrong)?;
    Ok((content, Some(place)))
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    let mut folders = vec![to.to_owned()];
    for entry in entries(from)? {
        let target = to.join(&entry.relative);
        match &entry.kind {
            Kind::Folder => {
                fs::create_dir(&target)?;
                folders.push(target);
            }
            Kind::Link(link) => std::os::unix::fs::symlink(link, &target)?,
            Kind::File { executable } => {
                fs::copy(&entry.path, &target)?;
                let mode = if *executable { 0o555 } else { 0o444 };
                fs::set_permissions(&target, fs::Permissions::from_mode(mode))?;
            }
        }
    }
    // Nothing is added to a release, either. The top one must stay writable to be renamed.
    for folder in folders.iter().skip(1).rev() {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o555))?;
    }
    Ok(())
}

/// Removes a release.
pub(crate) fn remove(place: &Path) -> io::Result<()> {
    for entry in entries(place)?.iter().filter(|entry| matches!(entry.kind, Kind::Folder)) {
        fs::set_permissions(&entry.path, fs::Permissions::from_mode(0o755))?;
    }
    fs::remove_dir_all(place)
}

/// Whether a release is still what it was.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn verify(place: &Path, content: &str) -> Result<(), String> {
    let now = digest(place).map_err(|error| format!("{}: {error}", place.display()))?;
    if now == content {
        return Ok(());
    }
    Err(format!(
        "{} was changed: its digest is {now}, not {content}; it is not started",
        place.display()
    ))
}

/// Whether a program can be started: it is there, may be run, and so is its interpreter.
///
/// # Errors
/// What is missing.
pub(crate) fn preflight(program: &str, dir: Option<&Path>) -> Result<(), String> {
    let found = if program.contains('/') {
        let path = dir.map_or_else(|| PathBuf::from(program), |dir| dir.join(program));
        path.exists().then_some(path)
    } else {
        let paths = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&paths).map(|folder| folder.join(program)).find(|path| path.exists())
    };
    let Some(path) = found else { return Err(format!("exec: `{program}` is not there")) };
    let mode = fs::metadata(&path).map_or(0, |data| data.mode());
    if mode & 0o111 == 0 {
        return Err(format!("exec: {} may not be run", path.display()));
    }
    let mut start = [0; 256];
    let count = fs::File::open(&path).and_then(|mut file| file.read(&mut start)).unwrap_or(0);
    if let Some(line) = start[..count].strip_prefix(b"#!") {
        let line = String::from_utf8_lossy(line.split(|byte| *byte == b'\n').next().unwrap_or(&[]))
            .into_owned();
        let interpreter = line.split_ascii_whitespace().next().unwrap_or_default();
        if !Path::new(interpreter).exists() {
            return Err(format!(
                "exec: {} wants {interpreter}, which is not there",
                path.display()
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_what_it_was_or_is_refused() {
        let folder = tempfile::TempDir::new().expect("a folder");
        let (source, state) = (folder.path().join("source"), folder.path().join("state"));
        fs::create_dir_all(source.join("lib")).expect("made");
        fs::write(source.join("lib/a"), "one").expect("written");
        let text = serde_json::json!({ "exec": ["./x"], "release": { "dir": source } });
        let app: App = serde_json::from_value(text).expect("an app");
        let (content, place) = take(&state, "a", &app).expect("taken");
        let place = place.expect("a place");
        assert_eq!(take(&state, "a", &app), Ok((content.clone(), Some(place.clone()))));
        assert!(verify(&place, &content).is_ok());
        fs::set_permissions(place.join("lib/a"), fs::Permissions::from_mode(0o644)).expect("set");
        fs::write(place.join("lib/a"), "two").expect("written");
        assert!(verify(&place, &content).is_err_and(|text| text.contains("was changed")));
        fs::write(source.join("lib/a"), "three").expect("written");
        let (other, _) = take(&state, "a", &app).expect("taken");
        assert_ne!(content, other);
        assert_eq!(
            preflight("no-such-program", None),
            Err("exec: `no-such-program` is not there".to_owned())
        );
        assert_eq!(preflight("sh", None), Ok(()));
    }
}
