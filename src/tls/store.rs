//! Configurations in use, and their reload when files change.

use std::collections::HashMap;
use std::hash::Hash;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Client, Server, load};
use crate::routing::{TlsClientSpec, TlsServerSpec};

/// What a file holds: xxh3 of its bytes; `None` if it cannot be read.
type Content = Vec<Option<u64>>;

struct Entry<T> {
    live: Arc<T>,
    content: Content,
}

/// All configurations in use, by what was asked for.
#[derive(Default)]
pub struct Store {
    servers: Mutex<HashMap<Arc<TlsServerSpec>, Entry<Server>>>,
    clients: Mutex<HashMap<Arc<TlsClientSpec>, Entry<Client>>>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Store")
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// A listener's.
    ///
    /// # Errors
    /// What is wrong with its files.
    pub fn server(&self, spec: &Arc<TlsServerSpec>) -> Result<Arc<Server>, String> {
        obtain(&mut lock(&self.servers), spec, &spec.files(), || Server::new(spec))
    }

    /// A pool's.
    ///
    /// # Errors
    /// What is wrong with its files.
    pub fn client(&self, spec: &Arc<TlsClientSpec>) -> Result<Arc<Client>, String> {
        obtain(&mut lock(&self.clients), spec, &spec.files(), || Client::new(spec))
    }

    /// Reads again what has changed; for each, the files and what is wrong with them. What is wrong
    /// changes nothing; what is used no more is forgotten.
    #[must_use]
    pub fn refresh(&self) -> Vec<(String, Result<(), String>)> {
        let mut told = Vec::new();
        refresh(
            &mut lock(&self.servers),
            &mut told,
            |spec| spec.files(),
            |live, spec| live.reload(spec),
        );
        refresh(
            &mut lock(&self.clients),
            &mut told,
            |spec| spec.files(),
            |live, spec| live.reload(spec),
        );
        told
    }
}

fn obtain<S: Hash + Eq, T>(
    map: &mut HashMap<Arc<S>, Entry<T>>,
    spec: &Arc<S>,
    files: &[&Path],
    make: impl FnOnce() -> Result<T, String>,
) -> Result<Arc<T>, String> {
    if let Some(entry) = map.get(spec) {
        return Ok(Arc::clone(&entry.live));
    }
    // What is read before is at most older than what is used: the next refresh makes it good.
    let content = content(files);
    let live = Arc::new(make()?);
    map.insert(Arc::clone(spec), Entry { live: Arc::clone(&live), content });
    Ok(live)
}

fn refresh<S: Hash + Eq, T>(
    map: &mut HashMap<Arc<S>, Entry<T>>,
    told: &mut Vec<(String, Result<(), String>)>,
    files: impl for<'a> Fn(&'a S) -> Vec<&'a Path>,
    reload: impl Fn(&T, &S) -> Result<(), String>,
) {
    map.retain(|spec, entry| Arc::strong_count(&entry.live) > 1 || Arc::strong_count(spec) > 1);
    for (spec, entry) in map {
        let files = files(spec);
        let content = content(&files);
        if content == entry.content {
            continue;
        }
        let result = reload(&entry.live, spec);
        entry.content = content;
        let names: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
        told.push((names.join(", "), result));
    }
}

fn content(files: &[&Path]) -> Content {
    let hash =
        |file: &&Path| load::read(file).ok().map(|bytes| strowger_contract::stable_hash(&bytes));
    files.iter().map(hash).collect()
}

impl TlsServerSpec {
    fn files(&self) -> Vec<&Path> {
        let certificates = self.certificates.iter().flat_map(|files| {
            [Some(&files.certificate), Some(&files.key), files.ocsp.as_ref()].into_iter().flatten()
        });
        certificates.chain(&self.client_ca).map(PathBuf::as_path).collect()
    }
}

impl TlsClientSpec {
    fn files(&self) -> Vec<&Path> {
        let own = self.certificate.iter().flat_map(|(certificate, key)| [certificate, key]);
        self.ca.iter().chain(own).map(PathBuf::as_path).collect()
    }
}
