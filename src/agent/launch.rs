//! What a process is started with: its environment, its files, its orders to the keeper.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::expand::expand;
use super::manifest::{App, Logs, PortTransport, Service};
use super::supervisor::{Instance, Release};

/// A secret's size, at most.
const SECRET_BYTES_MAX: u64 = 1 << 20;

/// Variables of the agent's own environment that processes get: what finds programs and says where
/// and in what language they run. All else stands in the manifest.
const PASSED: [&str; 7] = ["PATH", "HOME", "USER", "TZ", "LANG", "LC_ALL", "TMPDIR"];

/// The keeper's orders, in `launch.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Launch {
    pub(crate) app: String,
    pub(crate) id: String,
    pub(crate) generation: u64,
    pub(crate) exec: Vec<String>,
    pub(crate) folder: PathBuf,
    pub(crate) env: BTreeMap<String, String>,
    /// How many sockets are handed over.
    pub(crate) listen: Vec<String>,
    pub(crate) limits: super::limits::Limits,
    pub(crate) logs: Logs,
}

/// Where an instance's files are.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// The folder of the instance's place.
    pub(crate) root: PathBuf,
}

impl Places {
    pub(crate) fn new(state: &Path, id: &str) -> Self {
        Self { root: state.join("instances").join(id) }
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// What stays over releases (`$STATE_DIR`).
    pub(crate) fn data(&self) -> PathBuf {
        self.root.join("data")
    }

    pub(crate) fn socket(&self, port: &str) -> PathBuf {
        self.root.join(format!("{}.sock", port.to_lowercase()))
    }
}

/// Makes a folder that only its owner may look into.
pub(crate) fn private_folder(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Writes a file that only its owner may read, whole or not at all.
pub(crate) fn private_file(path: &Path, text: &[u8]) -> io::Result<()> {
    use std::io::Write as _;
    let new = path.with_extension("new");
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(text)?;
    file.sync_all()?;
    fs::rename(&new, path)
}

/// Makes the orders of an instance's next process, and the files that it finds.
///
/// # Errors
/// A variable is not set, a secret cannot be read, or the disk says no.
pub(crate) fn prepare(
    state: &Path,
    app_name: &str,
    instance: &Instance,
    release: &Release,
    limits: super::limits::Limits,
) -> Result<Launch, String> {
    let places = Places::new(state, &instance.id);
    let disk = |error: io::Error| format!("{}: {error}", places.root.display());
    private_folder(&places.data()).map_err(disk)?;
    credentials(&places, &release.app, &release.services)?;
    let mut env = environment(&places, app_name, instance, release);
    for (name, value) in &release.app.env {
        let value = expand(&value.to_string(), &|name| {
            env.get(name).cloned().or_else(|| std::env::var(name).ok())
        });
        env.insert(name.clone(), value.map_err(|error| format!("env.{name}: {error}"))?);
    }
    let exec: Result<Vec<String>, String> =
        release.app.exec.iter().map(|word| expand(word, &|name| env.get(name).cloned())).collect();
    let listen = release.app.ports.iter().filter(|(_, port)| port.listen);
    Ok(Launch {
        app: app_name.to_owned(),
        id: instance.id.clone(),
        generation: instance.generation,
        exec: exec.map_err(|error| format!("exec: {error}"))?,
        folder: release.dir.clone().unwrap_or_else(|| places.data()),
        env,
        listen: listen.map(|(name, _)| name.clone()).collect(),
        limits,
        logs: release.app.logs.clone(),
    })
}

/// What every process finds in its environment.
pub(crate) fn environment(
    places: &Places,
    app_name: &str,
    instance: &Instance,
    release: &Release,
) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    for name in PASSED {
        if let Ok(value) = std::env::var(name) {
            env.insert(name.to_owned(), value);
        }
    }
    let app = &release.app;
    let mut set = |name: &str, value: String| {
        env.insert(name.to_owned(), value);
    };
    set("APP_NAME", app_name.to_owned());
    set("HOST", app.host.to_string());
    set("INSTANCE_ID", instance.id.clone());
    set("INSTANCE_INDEX", instance.index.to_string());
    set("INSTANCE_GENERATION", instance.generation.to_string());
    set("RELEASE_NUMBER", release.number.to_string());
    set("RELEASE_DIGEST", release.digest.clone());
    if let Some(git) = app.release.as_ref().and_then(|source| source.git.clone()) {
        set("RELEASE_GIT", git);
    }
    set("STATE_DIR", places.data().display().to_string());
    set("CREDENTIALS_DIRECTORY", places.file("credentials").display().to_string());
    // Names that programs made for Cloud Foundry know.
    set("CF_INSTANCE_GUID", format!("{}-{}", instance.id, instance.generation));
    set("CF_INSTANCE_INDEX", instance.index.to_string());
    set("CF_INSTANCE_IP", app.host.to_string());
    for (name, spec) in &app.ports {
        let upper = name.to_uppercase();
        if spec.transport == PortTransport::Unix {
            set(&format!("SOCKET_{upper}"), places.socket(name).display().to_string());
        }
    }
    for (name, port) in &instance.ports {
        set(&format!("PORT_{}", name.to_uppercase()), port.to_string());
    }
    if let Some(port) = instance.ports.values().next() {
        set("PORT", port.to_string());
        set("CF_INSTANCE_PORT", port.to_string());
        set("CF_INSTANCE_ADDR", std::net::SocketAddr::new(app.host, *port).to_string());
    }
    bindings(places, &release.services, &mut env);
    env
}

/// Variables of bound services. What stands in files stays there.
fn bindings(
    places: &Places,
    services: &BTreeMap<String, Service>,
    env: &mut BTreeMap<String, String>,
) {
    if services.is_empty() {
        return;
    }
    let mut listed = serde_json::Map::new();
    for (name, service) in services {
        let upper: String = name
            .chars()
            .map(|it| if it.is_ascii_alphanumeric() { it.to_ascii_uppercase() } else { '_' })
            .collect();
        let mut credentials = serde_json::Map::new();
        for (key, value) in &service.values {
            env.insert(format!("{upper}_{}", key.to_uppercase()), value.to_string());
            credentials.insert(key.clone(), Value::String(value.to_string()));
        }
        let kind = service.kind.clone().unwrap_or_else(|| "user-provided".to_owned());
        let entry = json!({ "name": name, "label": kind, "credentials": credentials });
        if let Value::Array(list) = listed.entry(kind).or_insert_with(|| Value::Array(Vec::new())) {
            list.push(entry);
        }
    }
    env.insert("VCAP_SERVICES".to_owned(), Value::Object(listed).to_string());
    let root = places.file("bindings").display().to_string();
    env.insert("SERVICE_BINDING_ROOT".to_owned(), root);
}

/// Copies secrets, and writes bindings as files (servicebinding.io). Whether anything changed.
pub(crate) fn credentials(
    places: &Places,
    app: &App,
    services: &BTreeMap<String, Service>,
) -> Result<bool, String> {
    let folder = places.file("credentials");
    let mut wanted: BTreeMap<PathBuf, Vec<u8>> = BTreeMap::new();
    for (name, path) in &app.secrets {
        wanted.insert(folder.join(name), read_secret(&format!("secrets.{name}"), path)?);
    }
    let root = places.file("bindings");
    for (service, it) in services {
        let own = root.join(service);
        let kind = it.kind.clone().unwrap_or_else(|| "user-provided".to_owned());
        wanted.insert(own.join("type"), kind.into_bytes());
        for (key, value) in &it.values {
            wanted.insert(own.join(key), value.to_string().into_bytes());
        }
        for (key, path) in &it.files {
            let what = format!("services.{service}.files.{key}");
            wanted.insert(own.join(key), read_secret(&what, path)?);
        }
    }
    let disk = |error: io::Error| format!("{}: {error}", places.root.display());
    private_folder(&folder).map_err(disk)?;
    let mut changed = false;
    for (path, text) in wanted {
        if fs::read(&path).is_ok_and(|known| known == text) {
            continue;
        }
        if let Some(parent) = path.parent() {
            private_folder(parent).map_err(disk)?;
        }
        private_file(&path, &text).map_err(disk)?;
        changed = true;
    }
    Ok(changed)
}

/// Takes secrets and bindings off the disk: nobody runs there who reads them, and the next start writes them
/// anew.
pub(crate) fn forget_credentials(places: &Places) {
    for name in ["credentials", "bindings"] {
        let _none = fs::remove_dir_all(places.file(name));
    }
}

fn read_secret(what: &str, path: &Path) -> Result<Vec<u8>, String> {
    let wrong = |error: String| format!("{what}: {} {error}", path.display());
    let size = fs::metadata(path).map_err(|error| wrong(error.to_string()))?.len();
    if size > SECRET_BYTES_MAX {
        return Err(wrong(format!("is {size} bytes long; at most {SECRET_BYTES_MAX} are read")));
    }
    fs::read(path).map_err(|error| wrong(error.to_string()))
}
