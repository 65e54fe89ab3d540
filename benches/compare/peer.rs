//! Proxies as processes: their configurations, their start, their CPU time and memory.

use std::collections::HashMap;
use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

const STROWGER: &str = env!("CARGO_BIN_EXE_strowger");

/// The core that proxies run on, and the one of the load.
pub(crate) const PROXY_CORE: &str = "0";
pub(crate) const LOAD_CORE: &str = "1";

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Strowger(Strowger),
    Floor {
        scheme: &'static str,
    },
    Kamailio {
        mode: &'static str,
        children: u8,
    },
    FreeDiameter,
    Haproxy,
    Nginx,
    /// None: the load's clients talk to its servers.
    Direct,
}

/// Our own, and how it is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Strowger {
    pub(crate) mode: &'static str,
    pub(crate) workers: u8,
    /// `node.rx_usecs`.
    pub(crate) rx_usecs: u32,
    /// SIP listeners beside the one that has the load.
    pub(crate) idle_listeners: u8,
    /// Whether its configuration changes twice a second.
    pub(crate) reloads: bool,
    /// Whether SIP has the main port over TCP too, instead of raw TCP.
    pub(crate) sip_over_tcp: bool,
    /// Whether raw TCP is relayed by splice(2).
    pub(crate) splice: bool,
}

impl Strowger {
    pub(crate) const STATEFUL: Self = Self {
        mode: "stateful",
        workers: 1,
        rx_usecs: 200,
        idle_listeners: 0,
        reloads: false,
        sip_over_tcp: false,
        splice: false,
    };
}

impl Kind {
    pub(crate) fn name(self) -> String {
        match self {
            Self::Strowger(Strowger { reloads: true, .. }) => "strowger, reloading".into(),
            Self::Strowger(Strowger { splice: true, .. }) => "strowger, splice".into(),
            Self::Strowger(Strowger { rx_usecs, .. })
                if rx_usecs != Strowger::STATEFUL.rx_usecs =>
            {
                format!("strowger, rx_usecs {rx_usecs}")
            }
            Self::Strowger(Strowger { idle_listeners: 1.., .. }) => {
                "strowger, 101 listeners".into()
            }
            Self::Strowger(Strowger { workers: 1, .. }) => "strowger".into(),
            Self::Strowger(Strowger { workers, .. }) => format!("strowger, {workers} workers"),
            Self::Floor { .. } => "bare forwarder".into(),
            Self::Kamailio { children: 1, .. } => "kamailio".into(),
            Self::Kamailio { children, .. } => format!("kamailio, {children} children"),
            Self::FreeDiameter => "freeDiameter".into(),
            Self::Haproxy => "haproxy".into(),
            Self::Nginx => "nginx stream".into(),
            Self::Direct => "no proxy".into(),
        }
    }
}

/// Installs what is missing, on Debian as root; else says what to install.
pub(crate) fn install() -> Result<(), String> {
    let wanted = [
        ("kamailio", "kamailio"),
        ("haproxy", "haproxy"),
        ("nginx", "nginx libnginx-mod-stream"),
        ("freeDiameterd", "freediameterd freediameter-extensions"),
        ("openssl", "openssl"),
        ("taskset", "util-linux"),
    ];
    let missing: Vec<&str> =
        wanted.iter().filter(|(program, _)| !has(program)).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let script = format!(
        "apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends {}",
        missing.join(" ")
    );
    println!("installing: {}", missing.join(" "));
    let status = Command::new("sh").args(["-c", &script]).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        _ => Err(format!("please install: {}", missing.join(" "))),
    }
}

fn has(program: &str) -> bool {
    let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output();
    found.is_ok_and(|output| output.status.success())
}

/// Free ports, below the range that outgoing connections take theirs from.
pub(crate) fn ports<const N: usize>() -> [u16; N] {
    let mut next = 12_000 + (std::process::id() as u16 % 1_000) * 16;
    std::array::from_fn(|_| {
        loop {
            next += 1;
            let free = TcpListener::bind(("127.0.0.1", next)).is_ok()
                && UdpSocket::bind(("127.0.0.1", next)).is_ok();
            if free {
                return next;
            }
        }
    })
}

/// A running proxy.
pub(crate) struct Peer {
    child: Child,
    _folder: TempDir,
}

/// Where a proxy listens and what is behind it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ports {
    pub(crate) listen: u16,
    pub(crate) other: u16,
    pub(crate) admin: u16,
    pub(crate) a: u16,
    pub(crate) b: u16,
    pub(crate) c: u16,
    pub(crate) d: u16,
}

impl Ports {
    pub(crate) fn find() -> Self {
        let [listen, other, admin, a, b, c, d] = ports();
        Self { listen, other, admin, a, b, c, d }
    }
}

impl Strowger {
    fn text(self, run: &Path, ports: Ports) -> String {
        let idle: String = (0..self.idle_listeners)
            .map(|index| {
                format!(
                    "  - {{ name: idle-{index}, protocol: sip, bind: [\"udp://127.0.1.{}:@PORT@\"], pool: ims }}\n",
                    index + 1
                )
            })
            .collect();
        let mut text = include_str!("peers/strowger.yaml").to_owned();
        if self.sip_over_tcp {
            let udp = "bind: [\"udp://127.0.0.1:@PORT@\"";
            text = text
                .replace(udp, &format!("{udp}, \"tcp://127.0.0.1:@PORT@\""))
                .lines()
                .filter(|line| !line.contains("name: db"))
                .map(|line| format!("{line}\n"))
                .collect();
        }
        if self.splice {
            text = text.replace("pool: db }", "pool: db, options: { relay: splice } }");
        }
        let text = text
            .replace("pools:\n", &format!("{idle}pools:\n"))
            .replace("@MODE@", self.mode)
            .replace("@RX_USECS@", &self.rx_usecs.to_string())
            .replace("@WORKERS@", &self.workers.to_string());
        fill(&text, run, ports)
    }
}

impl Peer {
    /// Changes the weights of our own one's instances, by the file that it watches.
    pub(crate) fn reload(&self, turn: u32) {
        let file = self._folder.path().join("edge.yaml");
        let text = fs::read_to_string(&file).expect("our configuration");
        let weight = |turn: u32| format!("id: a, weight: {}, ", turn % 2 + 1);
        let text = text.replace(&weight(turn), "id: a, ").replace("id: a, ", &weight(turn + 1));
        let fresh = self._folder.path().join("fresh");
        fs::write(&fresh, text).expect("written");
        fs::rename(fresh, file).expect("renamed");
    }

    /// Starts a proxy; `diameter` says which of its listeners gets the main port.
    pub(crate) fn start(kind: Kind, ports: Ports, diameter: bool) -> Self {
        let folder = TempDir::new().expect("a folder");
        let run = folder.path();
        let mut command = Command::new("taskset");
        command.args(["-c", PROXY_CORE]);
        match kind {
            Kind::Strowger(ours) => {
                if ours.workers > 1 {
                    command = Command::new("taskset");
                    command.args(["-c", "0-1"]);
                }
                let swapped = Ports { listen: ports.other, other: ports.listen, ..ports };
                let ports = if diameter { swapped } else { ports };
                fs::write(run.join("edge.yaml"), ours.text(run, ports)).expect("written");
                command
                    .args([STROWGER, "run", "--log", "warn", "--config"])
                    .arg(run.join("edge.yaml"));
            }
            Kind::Floor { scheme } => {
                let listen = format!("{scheme}://127.0.0.1:{}", ports.listen);
                let to = format!("{scheme}://127.0.0.1:{}", ports.a);
                command.args([STROWGER, "load", "floor", "--listen", &listen, "--to", &to]);
            }
            Kind::Kamailio { mode, children } => kamailio(&mut command, run, ports, mode, children),
            Kind::FreeDiameter => free_diameter(&mut command, run, ports),
            Kind::Direct => {
                command.args(["sleep", "1000"]);
            }
            Kind::Haproxy => {
                let text = fill(include_str!("peers/haproxy.cfg"), run, ports);
                fs::write(run.join("haproxy.cfg"), text).expect("written");
                command.args(["haproxy", "-db", "-f"]).arg(run.join("haproxy.cfg"));
            }
            Kind::Nginx => {
                let module = "/usr/lib/nginx/modules/ngx_stream_module.so";
                let text =
                    fill(include_str!("peers/nginx.conf"), run, ports).replace("@MODULE@", module);
                fs::write(run.join("nginx.conf"), text).expect("written");
                command.args(["nginx", "-c"]).arg(run.join("nginx.conf"));
            }
        }
        let log = fs::File::create(run.join("log")).expect("a log");
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a handle"))
            .stderr(log)
            .spawn()
            .expect("the proxy starts");
        let mut peer = Self { child, _folder: folder };
        // Kamailio and freeDiameter fork and set up for a while.
        let pause = match kind {
            Kind::Kamailio { .. } | Kind::FreeDiameter => 3_000,
            _ => 500,
        };
        std::thread::sleep(Duration::from_millis(pause));
        if let Ok(Some(status)) = peer.child.try_wait() {
            let log = fs::read_to_string(peer._folder.path().join("log")).unwrap_or_default();
            panic!("{} ended with {status}: {log}", kind.name());
        }
        peer
    }

    /// CPU time of all its threads and children so far.
    pub(crate) fn cpu(&self) -> Duration {
        let nanoseconds = self
            .family()
            .into_iter()
            .filter_map(|pid| fs::read_dir(format!("/proc/{pid}/task")).ok())
            .flat_map(|tasks| tasks.flatten())
            .filter_map(|task| fs::read_to_string(task.path().join("schedstat")).ok())
            .filter_map(|text| text.split(' ').next()?.parse::<u64>().ok())
            .sum();
        Duration::from_nanos(nanoseconds)
    }

    /// Memory that is its own, in KiB.
    pub(crate) fn memory_kib(&self) -> u64 {
        let own = |pid: u32| {
            let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
            let line = text.lines().find(|line| line.starts_with("Pss:"))?.to_owned();
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        };
        self.family().into_iter().filter_map(own).sum()
    }

    fn family(&self) -> Vec<u32> {
        let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
        for entry in fs::read_dir("/proc").expect("proc").flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
            let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
            let parent =
                stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1)?.parse().ok());
            children.entry(parent.unwrap_or(0)).or_default().push(pid);
        }
        let mut family = vec![self.child.id()];
        let mut at = 0;
        while let Some(pid) = family.get(at).copied() {
            family.extend(children.get(&pid).into_iter().flatten());
            at += 1;
        }
        family
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        for pid in self.family() {
            let _ended = Command::new("kill").arg(pid.to_string()).stderr(Stdio::null()).status();
        }
        // Ours would let its transactions end, which nobody waits for here.
        let limit = Instant::now() + Duration::from_secs(1);
        while Instant::now() < limit && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(20));
        }
        for pid in self.family() {
            let _ended =
                Command::new("kill").args(["-9", &pid.to_string()]).stderr(Stdio::null()).status();
        }
        let _reaped = self.child.wait();
    }
}

fn fill(text: &str, run: &Path, ports: Ports) -> String {
    text.replace("@RUN@", &run.display().to_string())
        .replace("@PORT@", &ports.listen.to_string())
        .replace("@PORT_2@", &ports.other.to_string())
        .replace("@ADMIN@", &ports.admin.to_string())
        .replace("@SERVER_A@", &ports.a.to_string())
        .replace("@SERVER_B@", &ports.b.to_string())
        .replace("@SERVER_C@", &ports.c.to_string())
        .replace("@SERVER_D@", &ports.d.to_string())
}

fn kamailio(command: &mut Command, run: &Path, ports: Ports, mode: &str, children: u8) {
    let template = match mode {
        "stateful" => include_str!("peers/kamailio-stateful.cfg"),
        _ => include_str!("peers/kamailio-stateless.cfg"),
    };
    let text = template
        .replace("@CHILDREN@", &children.to_string())
        .replace("@LB_IP@", "127.0.0.1")
        .replace("@LB_PORT@", &ports.listen.to_string())
        .replace("@ALG@", "0")
        .replace("@PING_S@", "0")
        .replace("@RUN@", &run.display().to_string());
    fs::write(run.join("kamailio.cfg"), text).expect("written");
    let list = format!("1 sip:127.0.0.1:{} 0 0\n1 sip:127.0.0.1:{} 0 0\n", ports.a, ports.b);
    fs::write(run.join("dispatcher.list"), list).expect("written");
    command
        .args(["kamailio", "-DD", "-E", "-m", "2048", "-M", "16", "-b", "4194304"])
        .arg("-f")
        .arg(run.join("kamailio.cfg"))
        .arg("-Y")
        .arg(run)
        .arg("-P")
        .arg(run.join("pid"));
}

fn free_diameter(command: &mut Command, run: &Path, ports: Ports) {
    let openssl = |arguments: &[&str]| {
        let done = Command::new("openssl").args(arguments).current_dir(run).output();
        assert!(done.is_ok_and(|output| output.status.success()), "openssl {arguments:?}");
    };
    openssl(&[
        "genpkey",
        "-genparam",
        "-algorithm",
        "DH",
        "-pkeyopt",
        "group:modp_2048",
        "-out",
        "dh.pem",
    ]);
    openssl(&[
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=relay.example.net",
        "-keyout",
        "relay.key",
        "-out",
        "relay.pem",
    ]);
    fs::write(run.join("acl.conf"), "ALLOW_IPSEC *.example.net\n").expect("written");
    let text = fill(include_str!("peers/freediameter.conf"), run, ports);
    fs::write(run.join("fd.conf"), text).expect("written");
    command.args(["freeDiameterd", "-q", "-c"]).arg(run.join("fd.conf"));
}
