//! What an instance may use: cgroups of version 1 or 2 where the agent may make them, else rlimits.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::manifest::{Resources, bytes, cpus};

/// Where cgroups are.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Microseconds in which a share of CPU time is measured out (the kernel's default).
const CPU_PERIOD_US: u64 = 100_000;

/// What the process does to itself before it becomes the program.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Limits {
    /// `cgroup.procs` files to enter.
    pub(crate) enter: Vec<PathBuf>,
    /// A file that kills all in the group.
    pub(crate) kill: Option<PathBuf>,
    /// RLIMIT_NOFILE.
    pub(crate) files: Option<u64>,
    /// RLIMIT_AS, where no cgroup holds memory.
    pub(crate) address_space: Option<u64>,
    /// CPUs to run on.
    pub(crate) cpus: Vec<usize>,
    /// What was asked for and cannot be had here.
    pub(crate) missing: Vec<String>,
}

/// The kind of cgroups that the host has.
#[derive(Clone, Debug)]
pub(crate) struct Cgroups {
    root: PathBuf,
    /// The agent's own group.
    name: String,
}

impl Cgroups {
    /// `name` is the agent's: groups of two agents are apart.
    pub(crate) fn new(name: &str) -> Self {
        Self { root: PathBuf::from(CGROUPS), name: format!("strowger-{name}") }
    }

    /// Makes an instance's groups with its limits; or sets them anew, for one that runs.
    pub(crate) fn apply(&self, id: &str, resources: &Resources, pinned: &[usize]) -> Limits {
        let mut limits =
            Limits { files: resources.files, cpus: pinned.to_vec(), ..Limits::default() };
        if limits.cpus.is_empty() {
            limits.cpus =
                resources.cpus.as_deref().and_then(|it| cpus(it).ok()).unwrap_or_default();
        }
        let memory = resources.memory.as_deref().and_then(|it| bytes(it).ok());
        let cpu = resources.cpu.map(|cpu| (cpu * CPU_PERIOD_US as f64) as u64);
        if self.root.join("cgroup.controllers").exists() {
            self.version_2(id, cpu, memory, resources.pids, &mut limits);
        } else {
            self.version_1(id, cpu, memory, resources.pids, &mut limits);
        }
        if memory.is_some() && limits.missing.iter().any(|what| what.starts_with("memory")) {
            limits.address_space = memory;
        }
        limits
    }

    fn version_2(
        &self,
        id: &str,
        cpu: Option<u64>,
        memory: Option<u64>,
        pids: Option<u32>,
        limits: &mut Limits,
    ) {
        let parent = self.root.join(&self.name);
        let own = parent.join(id);
        if let Err(error) = fs::create_dir_all(&own) {
            note_missing(&error, cpu, memory, pids, limits);
            return;
        }
        for folder in [&self.root, &parent] {
            for controller in ["+cpu", "+memory", "+pids"] {
                // What is missing shows when its file is written below.
                let _missing = fs::write(folder.join("cgroup.subtree_control"), controller);
            }
        }
        let none = || "max".to_owned();
        let quota = cpu.map_or_else(none, |us| us.to_string());
        let values = [
            ("cpu", "cpu.max", cpu.is_some(), format!("{quota} {CPU_PERIOD_US}")),
            (
                "memory",
                "memory.max",
                memory.is_some(),
                memory.map_or_else(none, |it| it.to_string()),
            ),
            ("pids", "pids.max", pids.is_some(), pids.map_or_else(none, |it| it.to_string())),
        ];
        for (what, file, asked, value) in values {
            if let Err(error) = fs::write(own.join(file), value)
                && asked
            {
                limits.missing.push(format!("{what}: {error}"));
            }
        }
        limits.enter.push(own.join("cgroup.procs"));
        limits.kill = Some(own.join("cgroup.kill"));
    }

    fn version_1(
        &self,
        id: &str,
        cpu: Option<u64>,
        memory: Option<u64>,
        pids: Option<u32>,
        limits: &mut Limits,
    ) {
        let mut set = |controller: &str, file: &str, asked: bool, value: String| {
            let own = self.root.join(controller).join(&self.name).join(id);
            if !asked && !own.exists() {
                return;
            }
            let done = fs::create_dir_all(&own).and_then(|()| fs::write(own.join(file), value));
            match done {
                Ok(()) => limits.enter.push(own.join("cgroup.procs")),
                Err(error) if asked => limits.missing.push(format!("{controller}: {error}")),
                Err(_) => {}
            }
        };
        let none = || "-1".to_owned();
        set("cpu", "cpu.cfs_quota_us", cpu.is_some(), cpu.map_or_else(none, |it| it.to_string()));
        let text = memory.map_or_else(none, |it| it.to_string());
        set("memory", "memory.limit_in_bytes", memory.is_some(), text);
        let text = pids.map_or_else(|| "max".to_owned(), |it| it.to_string());
        set("pids", "pids.max", pids.is_some(), text);
        // A hybrid host has an empty version 2 beside it, which can kill a whole group.
        let unified = self.root.join("unified").join(&self.name).join(id);
        if self.root.join("unified/cgroup.procs").exists() && fs::create_dir_all(&unified).is_ok() {
            limits.enter.push(unified.join("cgroup.procs"));
            limits.kill = Some(unified.join("cgroup.kill"));
        }
    }

    /// An instance is gone: so are its groups. One that is not empty stays, and is tried again.
    pub(crate) fn remove(&self, id: &str) {
        for controller in ["", "cpu", "memory", "pids", "unified"] {
            let own = self.root.join(controller).join(&self.name);
            let _busy = fs::remove_dir(own.join(id));
            let _others = fs::remove_dir(own);
        }
    }
}

fn note_missing(
    error: &io::Error,
    cpu: Option<u64>,
    memory: Option<u64>,
    pids: Option<u32>,
    limits: &mut Limits,
) {
    let asked = [("cpu", cpu.is_some()), ("memory", memory.is_some()), ("pids", pids.is_some())];
    for (what, _) in asked.into_iter().filter(|(_, asked)| *asked) {
        limits.missing.push(format!("{what}: {error}"));
    }
}

/// Kills all that is in a group.
pub(crate) fn kill_group(limits: &Limits) {
    if let Some(file) = &limits.kill {
        // Kernels before 5.14 have no such file: the process group was killed all the same.
        let _old = fs::write(file, "1");
    }
}

/// The calling process enters its groups and takes its limits on.
///
/// # Errors
/// What the kernel refuses.
pub(crate) fn enter(limits: &Limits) -> Result<(), String> {
    use rustix::process::{Resource, Rlimit, setrlimit};
    for file in &limits.enter {
        fs::write(file, "0").map_err(|error| format!("{}: {error}", file.display()))?;
    }
    let both = |value: u64| Rlimit { current: Some(value), maximum: Some(value) };
    if let Some(files) = limits.files {
        setrlimit(Resource::Nofile, both(files)).map_err(|error| format!("files: {error}"))?;
    }
    if let Some(bytes) = limits.address_space {
        setrlimit(Resource::As, both(bytes)).map_err(|error| format!("memory: {error}"))?;
    }
    if !limits.cpus.is_empty() {
        let mut set = rustix::thread::CpuSet::new();
        limits.cpus.iter().for_each(|cpu| set.set(*cpu));
        rustix::thread::sched_setaffinity(None, &set).map_err(|error| format!("cpus: {error}"))?;
    }
    Ok(())
}

/// The CPUs that this process may run on.
pub(crate) fn own_cpus() -> Vec<usize> {
    let text = fs::read_to_string(Path::new("/proc/self/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    line.and_then(|list| cpus(list.trim()).ok()).unwrap_or_default()
}
