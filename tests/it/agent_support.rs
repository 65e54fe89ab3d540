//! A running agent, and what tests ask of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::harness::{Edge, Process};

/// How long something may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// An agent with a folder of its own. Its instances end with it.
pub(crate) struct Agent {
    pub(crate) process: Process,
    pub(crate) folder: TempDir,
    arguments: Vec<String>,
}

impl Agent {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let folder = TempDir::new().expect("a folder");
        let arguments: Vec<String> = arguments.iter().map(|word| (*word).to_owned()).collect();
        let process = Self::spawn(&folder, &arguments);
        let agent = Self { process, folder, arguments };
        agent.until("the agent's socket", |agent| agent.try_run(&["status"]).is_ok());
        agent
    }

    fn spawn(folder: &TempDir, arguments: &[String]) -> Process {
        let number = fs::read_dir(folder.path()).expect("a folder").count();
        let log = folder.path().join(format!("agent-{number}.log"));
        // With SIGHUP ignored, as an operator's shell may leave it: programs must not inherit that.
        let mut command = Command::new("nohup");
        command.arg(env!("CARGO_BIN_EXE_strowger"));
        command.args(["agent", "serve", "--log", "debug", "--state"]);
        command.arg(folder.path().join("state")).args(arguments);
        Process::spawn(&mut command, &log)
    }

    /// Starts it again, after it was killed.
    pub(crate) fn again(&mut self) {
        self.process = Self::spawn(&self.folder, &self.arguments);
        self.until("the agent's socket", |agent| agent.try_run(&["status"]).is_ok());
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    fn socket(&self) -> PathBuf {
        self.state().join("agent.sock")
    }

    /// `strowger agent …`: what it prints, or what it complains of.
    pub(crate) fn try_run(&self, arguments: &[&str]) -> Result<String, String> {
        let (code, out, err) = self.run_code(arguments);
        if code == Some(0) { Ok(out) } else { Err(err) }
    }

    pub(crate) fn run_code(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_strowger"))
            .arg("agent")
            .args(arguments)
            .env("STROWGER_AGENT_SOCKET", self.socket())
            .output()
            .expect("the program starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> String {
        self.try_run(arguments)
            .unwrap_or_else(|error| panic!("{arguments:?}: {error}\n{}", self.log()))
    }

    /// Writes a manifest and applies it.
    pub(crate) fn apply(&self, yaml: &str) -> String {
        self.try_apply(yaml).unwrap_or_else(|error| panic!("{error}\n{yaml}\n{}", self.log()))
    }

    pub(crate) fn try_apply(&self, yaml: &str) -> Result<String, String> {
        let file = self.folder.path().join("manifest.yaml");
        fs::write(&file, yaml).expect("written");
        self.try_run(&["apply", &file.display().to_string()])
    }

    pub(crate) fn status(&self) -> Value {
        serde_json::from_str(&self.run(&["status", "-o", "json"])).expect("JSON")
    }

    pub(crate) fn app(&self, name: &str) -> Value {
        let status = self.status();
        let found = status["apps"].as_array().into_iter().flatten().find(|app| app["name"] == name);
        found.cloned().unwrap_or(Value::Null)
    }

    pub(crate) fn instances(&self, app: &str) -> Vec<Value> {
        self.app(app)["instances"].as_array().cloned().unwrap_or_default()
    }

    pub(crate) fn instance(&self, id: &str) -> Value {
        let app = id.rsplit_once('-').expect("APP-INDEX").0;
        self.instances(app).into_iter().find(|it| it["id"] == id).unwrap_or(Value::Null)
    }

    /// Those of an application that run and are ready.
    pub(crate) fn ready(&self, app: &str) -> usize {
        let ready = |it: &&Value| it["phase"] == "running" && it["ready"] == true;
        self.instances(app).iter().filter(ready).count()
    }

    pub(crate) fn pids(&self, app: &str) -> Vec<u64> {
        self.instances(app).iter().filter_map(|it| it["pid"].as_u64()).collect()
    }

    pub(crate) fn log(&self) -> String {
        let mut text = String::new();
        for entry in fs::read_dir(self.folder.path()).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "log") {
                text.push_str(&fs::read_to_string(entry.path()).unwrap_or_default());
            }
        }
        text
    }

    pub(crate) fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !holds(self) {
            if Instant::now() > end {
                let status = self.try_run(&["status", "-o", "json"]).unwrap_or_default();
                panic!("waited in vain for {what}; {status}\nthe agent's log:\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.process.kill();
        // Instances live longer than their agent: end each by what its keeper noted.
        for entry in fs::read_dir(self.state().join("instances")).into_iter().flatten().flatten() {
            let Ok(text) = fs::read(entry.path().join("running.json")) else { continue };
            let running: Value = serde_json::from_slice(&text).unwrap_or(Value::Null);
            let (pid, started) = (&running["main"]["pid"], running["main"]["started"].as_u64());
            // By the system call: kill(1) of procps may take `-9 -123` for `-9 -1`.
            if let Some(pid) =
                pid.as_i64().filter(|pid| started.is_some() && start_of(*pid) == started)
                && let Some(group) =
                    i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw)
            {
                let _gone =
                    rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
            }
        }
        // Their keepers note the end in the folder that is about to go.
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// When a process started, in ticks (proc_pid_stat(5), field 22).
pub(crate) fn start_of(pid: i64) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// An edge's configuration: a SIP, a Diameter and a TCP listener, with pools that only leases fill.
pub(crate) fn edge(sip: u16, diameter: u16, tcp: u16) -> String {
    format!(
        "version: 1
node: {{ workers: 1 }}
admin: {{ listen: ADMIN }}
listeners:
  - {{ name: sip, protocol: sip, bind: [udp://127.0.0.1:{sip}], pool: ims }}
  - {{ name: dia, protocol: diameter, bind: [tcp://127.0.0.1:{diameter}], options: {{ origin_host: edge.example.net, origin_realm: example.net }}, pool: pcrf }}
  - {{ name: web, protocol: tcp, bind: [tcp://127.0.0.1:{tcp}], pool: web }}
pools:
  ims: {{ debounce: 0, slow_start: 0 }}
  pcrf: {{ debounce: 0, slow_start: 0 }}
  web: {{ debounce: 0, slow_start: 0, balance: round-robin }}
"
    )
}

/// The state of an instance at an edge; empty if it is not there.
pub(crate) fn state_at(edge: &Edge, pool: &str, id: &str) -> String {
    edge.instance(pool, id)["state"].as_str().unwrap_or_default().to_owned()
}

/// The processes whose command line contains a text.
pub(crate) fn processes(text: &str) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in fs::read_dir(Path::new("/proc")).into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&line).replace('\0', " ").contains(text) {
            found.push(pid);
        }
    }
    found
}
