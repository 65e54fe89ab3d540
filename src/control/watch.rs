//! Watches files and directories of configuration.
//!
//! Directories are watched, not files: a file that is replaced by a rename, or through a swapped
//! `..data` link as Kubernetes does, is another file afterwards. Events only say "look again"; what
//! counts is whether the content differs. A poll each half minute finds what no event told.

use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::{RecursiveMode, Watcher};
use tokio::sync::mpsc::{Receiver, Sender, channel};

/// How long it must be quiet before the files are read: editors and copies write in several steps.
const DEBOUNCE: Duration = Duration::from_millis(200);

/// How long it may stay unquiet before they are read all the same.
const DEBOUNCE_MAX: Duration = Duration::from_secs(2);

/// Where no event comes (network file systems, a directory that did not exist), this does.
const POLL: Duration = Duration::from_secs(30);

/// Tells when it is worth to look again. It never ends by itself.
pub struct Watch {
    events: Receiver<()>,
    /// Kept: dropping it ends the watching.
    _watcher: Option<notify::RecommendedWatcher>,
}

impl Watch {
    /// Watches the directories of `paths`. Those that do not exist are left to the poll.
    #[must_use]
    pub fn new(paths: &[PathBuf]) -> Self {
        let (sender, events) = channel(1);
        Self { events, _watcher: watcher(paths, sender) }
    }

    /// Waits until something may have changed.
    pub async fn changed(&mut self) {
        tokio::select! {
            event = self.events.recv() => {
                if event.is_none() {
                    tokio::time::sleep(POLL).await;
                    return;
                }
            }
            () = tokio::time::sleep(POLL) => return,
        }
        let latest = tokio::time::Instant::now() + DEBOUNCE_MAX;
        while tokio::time::Instant::now() < latest {
            match tokio::time::timeout(DEBOUNCE, self.events.recv()).await {
                Ok(Some(())) => {}
                _ => return,
            }
        }
    }
}

fn watcher(paths: &[PathBuf], sender: Sender<()>) -> Option<notify::RecommendedWatcher> {
    let tell = move |event: notify::Result<notify::Event>| {
        let reads = event.as_ref().is_ok_and(|event| event.kind.is_access());
        if !reads {
            // One that waits already is enough.
            let _full = sender.try_send(());
        }
    };
    let mut watcher = notify::recommended_watcher(tell).ok()?;
    let mut directories: Vec<PathBuf> = paths.iter().map(|path| directory_of(path)).collect();
    directories.sort();
    directories.dedup();
    for directory in directories {
        // What cannot be watched is polled.
        let _polled = watcher.watch(&directory, RecursiveMode::NonRecursive);
    }
    Some(watcher)
}

fn directory_of(path: &Path) -> PathBuf {
    if path.is_dir() {
        return path.to_owned();
    }
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    async fn sees(watch: &mut Watch) -> bool {
        tokio::time::timeout(Duration::from_secs(5), watch.changed()).await.is_ok()
    }

    #[tokio::test]
    async fn every_way_to_change_a_file_is_seen() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("edge.yaml");
        fs::write(&file, "a").expect("written");
        let mut watch = Watch::new(std::slice::from_ref(&file));
        fs::write(&file, "in place").expect("written");
        assert!(sees(&mut watch).await, "in place");
        let other = folder.path().join("new");
        fs::write(&other, "renamed").expect("written");
        assert!(sees(&mut watch).await, "another file");
        fs::rename(&other, &file).expect("renamed");
        assert!(sees(&mut watch).await, "renamed over it");
        fs::remove_file(&file).expect("removed");
        assert!(sees(&mut watch).await, "removed");
        fs::write(&file, "back").expect("written");
        assert!(sees(&mut watch).await, "back again");
    }

    #[tokio::test]
    async fn a_swapped_link_is_seen() {
        let folder = tempfile::tempdir().expect("a folder");
        let version = |name: &str| {
            let path = folder.path().join(name);
            fs::create_dir(&path).expect("made");
            fs::write(path.join("edge.yaml"), name).expect("written");
        };
        version("..v1");
        version("..v2");
        let link = |to: &str, at: &str| {
            std::os::unix::fs::symlink(to, folder.path().join(at)).expect("linked")
        };
        link("..v1", "..data");
        link("..data/edge.yaml", "edge.yaml");
        let mut watch = Watch::new(&[folder.path().to_owned()]);
        link("..v2", "..tmp");
        fs::rename(folder.path().join("..tmp"), folder.path().join("..data")).expect("swapped");
        assert!(sees(&mut watch).await);
        assert_eq!(fs::read_to_string(folder.path().join("edge.yaml")).expect("read"), "..v2");
    }
}
