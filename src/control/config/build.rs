//! What the values mean together: from the trees of all files to a wanted state.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;
use strowger_contract::Class;

use super::configure::Configure;
use super::listeners::{Listeners, RawListener};
use super::node::{AdminSettings, NodeSettings, RegistrySettings, admin, node, registry};
use super::pools::{RawPool, dns as dns_of, pool};
use super::read::{Reader, join};
use super::tree::{Kind, Node};
use super::{Source, brownout, classes, dns, exports, providers};
use crate::control::providers::ProviderSettings;
use crate::control::resolve::DnsSettings;
use crate::observe::{CdrSettings, HepSettings};
use crate::routing::{BrownoutSpec, PoolNames, SnapshotSpec};

/// Pools and listeners, at most: each has its metrics.
const POOLS_MAX: usize = 4_096;
const LISTENERS_MAX: usize = 1_024;

/// A configuration that is whole and good.
#[derive(Clone, Debug, Default)]
pub struct Loaded {
    /// The wanted state.
    pub spec: SnapshotSpec,
    /// What holds for the process; a reload does not change it.
    pub node: NodeSettings,
    /// The admin HTTP server; a reload does not change it.
    pub admin: AdminSettings,
    /// Where records of calls go.
    pub cdr: Option<CdrSettings>,
    /// Where copies of SIP messages go.
    pub hep: Option<HepSettings>,
    /// The registry of leased instances.
    pub registry: RegistrySettings,
    /// Who tells of instances besides.
    pub providers: ProviderSettings,
    /// When the node gives things up because it is short of itself.
    pub brownout: BrownoutSpec,
    /// How names are looked up.
    pub dns: DnsSettings,
    /// Further directories to read and watch.
    pub watch: Vec<PathBuf>,
    /// Not wrong, but perhaps not meant.
    pub warnings: Vec<String>,
    /// Effective values of the protocols' parts (`options`, `routes`, `pool`), by listener.
    pub effective: Vec<(String, Value)>,
    /// What it was read from.
    pub sources: Vec<Source>,
}

/// Gathers over all files.
pub(super) struct Build<'a> {
    protocols: &'a [&'a dyn Configure],
    names: &'a PoolNames,
    loaded: Loaded,
    pools: Vec<RawPool>,
    listeners: Vec<RawListener>,
    /// What may stand once, and where it does.
    seen: HashMap<String, String>,
}

impl<'a> Build<'a> {
    pub(super) fn new(protocols: &'a [&'a dyn Configure], names: &'a PoolNames) -> Self {
        let mut loaded = Loaded::default();
        loaded.spec.classes = Class::built_in();
        loaded.spec.node.name = "strowger".to_owned();
        let (pools, listeners, seen) = (Vec::new(), Vec::new(), HashMap::new());
        Self { protocols, names, loaded, pools, listeners, seen }
    }

    /// Reads one file.
    pub(super) fn read(&mut self, reader: &mut Reader, tree: &Node) {
        const KEYS: [&str; 13] = [
            "version",
            "node",
            "admin",
            "registry",
            "watch",
            "classes",
            "listeners",
            "pools",
            "cdr",
            "hep",
            "dns",
            "providers",
            "brownout",
        ];
        let Some(fields) = reader.fields(tree, "", &KEYS) else { return };
        if let Some(version) = fields.get("version")
            && version.kind != Kind::Integer(1)
        {
            reader.wrong(version, "version", "this release reads version 1");
        }
        for key in ["node", "admin", "registry", "cdr", "hep", "dns", "providers", "brownout"] {
            if let Some(node) = fields.get(key) {
                self.once(reader, key, node);
            }
        }
        if let Some(tree) = fields.get("node") {
            node(reader, tree, &mut self.loaded.spec.node, &mut self.loaded.node);
        }
        if let Some(tree) = fields.get("admin") {
            admin(reader, tree, &mut self.loaded.admin);
        }
        if let Some(tree) = fields.get("registry") {
            registry(reader, tree, &mut self.loaded.registry);
        }
        if let Some(tree) = fields.get("cdr").filter(|tree| tree.kind != Kind::Null) {
            self.loaded.cdr = exports::cdr(reader, tree);
        }
        if let Some(tree) = fields.get("hep").filter(|tree| tree.kind != Kind::Null) {
            self.loaded.hep = exports::hep(reader, tree);
        }
        if let Some(tree) = fields.get("providers") {
            let read = providers::providers(reader, tree);
            self.loaded.providers.cloud_foundry = read.cloud_foundry;
            self.loaded.providers.tcp_routes = read.tcp_routes;
        }
        if let Some(tree) = fields.get("brownout") {
            brownout::brownout(reader, tree, &mut self.loaded.brownout);
        }
        if let Some(tree) = fields.get("dns") {
            dns::dns(reader, tree, &mut self.loaded.dns);
        }
        if let Some(tree) = fields.get("watch") {
            self.watch(reader, tree);
        }
        if let Some(tree) = fields.get("classes") {
            for entry in reader.named(tree, "classes") {
                self.once(reader, &join("classes", &entry.key), &entry.value);
            }
            classes::classes(reader, tree, self.names, &mut self.loaded.spec.classes);
        }
        if let Some(tree) = fields.get("pools") {
            self.read_pools(reader, tree);
        }
        if let Some(tree) = fields.get("listeners") {
            for (index, listener) in reader.list(tree, "listeners").iter().enumerate() {
                let (file, node) = (reader.file.clone(), listener.clone());
                self.listeners.push(RawListener {
                    file,
                    node,
                    path: format!("listeners[{index}]"),
                });
            }
        }
    }

    /// Something that may stand only once in all files; whether it does.
    fn once(&mut self, reader: &mut Reader, what: &str, node: &Node) -> bool {
        let place = format!("{}:{}", reader.file, node.line);
        if let Some(first) = self.seen.get(what) {
            let message = format!("stands here a second time; the first is at {first}");
            reader.wrong(node, what, message);
            return false;
        }
        self.seen.insert(what.to_owned(), place);
        true
    }

    /// Directories, relative to the file that names them.
    fn watch(&mut self, reader: &mut Reader, node: &Node) {
        for (index, directory) in reader.list(node, "watch").iter().enumerate() {
            let path = format!("watch[{index}]");
            let Some(text) = reader.text(directory, &path) else { continue };
            let near = PathBuf::from(&reader.file).parent().map(|parent| parent.join(&text));
            let whole = near.unwrap_or_else(|| text.into());
            if whole.is_file() {
                let message =
                    format!("`{}` is a file; name the directory it is in", whole.display());
                reader.wrong(directory, &path, message);
            } else if !whole.exists() {
                let warning = format!("{path}: `{}` does not exist yet", whole.display());
                reader.warnings.push(warning);
            }
            self.loaded.watch.push(whole);
        }
    }

    fn read_pools(&mut self, reader: &mut Reader, node: &Node) {
        for entry in reader.named(node, "pools") {
            let path = join("pools", &entry.key);
            if !self.once(reader, &path, &entry.value) {
                continue;
            }
            if self.pools.len() >= POOLS_MAX {
                return reader.wrong(&entry.value, &path, format!("over {POOLS_MAX} pools"));
            }
            self.loaded.providers.dns.extend(dns_of(reader, entry, &path));
            if let Some(spec) = pool(reader, entry, &path) {
                let (file, node) = (reader.file.clone(), entry.value.clone());
                self.pools.push(RawPool { spec, file, node });
            }
        }
    }

    /// What can only be said when all files are read.
    pub(super) fn finish(mut self, reader: &mut Reader) -> Loaded {
        let raw = std::mem::take(&mut self.listeners);
        if raw.len() > LISTENERS_MAX
            && let Some(first) = raw.first()
        {
            reader.file.clone_from(&first.file);
            reader.wrong(&first.node, "listeners", format!("over {LISTENERS_MAX} listeners"));
        }
        let loaded = &mut self.loaded;
        let mut listeners = Listeners::new(
            self.protocols,
            self.names,
            &loaded.spec.node,
            &mut self.pools,
            &mut loaded.effective,
            &loaded.spec.classes,
        );
        let mut built = Vec::new();
        for listener in raw.iter().take(LISTENERS_MAX) {
            reader.file.clone_from(&listener.file);
            built.extend(listeners.listener(reader, listener).map(Arc::new));
        }
        listeners.finish(reader);
        for fed in &mut loaded.providers.dns {
            let id = self.names.id(&fed.pool);
            let users = built.iter().filter(|listener| listener.pools.contains(&id));
            let mut protocols: Vec<String> =
                users.map(|listener| listener.protocol.to_owned()).collect();
            protocols.sort();
            protocols.dedup();
            if protocols.is_empty() {
                protocols.push("tcp".to_owned());
            }
            fed.protocols = protocols;
        }
        loaded.providers.resolver = loaded.dns.clone();
        loaded.spec.listeners = built;
        loaded.spec.pools = self.pools.into_iter().map(|pool| pool.spec).collect();
        if raw.is_empty() {
            let warning = "there is no listener: the edge will take no traffic";
            reader.warnings.push(warning.to_owned());
        }
        loaded.warnings = std::mem::take(&mut reader.warnings);
        self.loaded
    }
}
