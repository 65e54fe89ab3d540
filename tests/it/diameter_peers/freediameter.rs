//! freeDiameter 1.2.1: its configuration, its certificates, and the extension that answers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::{Process, free_port, has, wait_for_tcp};

const EXTENSIONS: &str = "/usr/lib/freeDiameter";

/// Whether freeDiameter, its headers and a compiler are there.
pub(crate) fn is_here() -> bool {
    let headers = Path::new("/usr/include/freeDiameter/extension.h").exists();
    let extensions = Path::new(EXTENSIONS).join("acl_wl.fdx").exists();
    let installed = headers && extensions;
    assert!(
        installed || std::env::var_os("CI").is_none(),
        "freediameter-extensions and libfreediameter-dev must be installed in CI"
    );
    has("freeDiameterd") && has("cc") && has("openssl") && installed
}

/// What all of one test's daemons share: the extension, and parameters for TLS, which
/// freeDiameter wants even where it is not used.
pub(crate) struct Kit {
    folder: PathBuf,
}

impl Kit {
    pub(crate) fn new(folder: &Path) -> Self {
        fs::write(folder.join("fd_answers.c"), include_str!("../peers/fd_answers.c"))
            .expect("written");
        let kit = Self { folder: folder.to_owned() };
        kit.run("cc", &["-shared", "-fPIC", "-o", "fd_answers.fdx", "fd_answers.c"]);
        kit.run(
            "openssl",
            &[
                "genpkey",
                "-genparam",
                "-algorithm",
                "DH",
                "-pkeyopt",
                "group:modp_2048",
                "-out",
                "dh.pem",
            ],
        );
        // A daemon looks at the security of who connects: here there is none.
        fs::write(folder.join("acl.conf"), "ALLOW_IPSEC *.example.net\n").expect("written");
        kit
    }

    fn run(&self, program: &str, arguments: &[&str]) {
        let output =
            Command::new(program).args(arguments).current_dir(&self.folder).output().expect("runs");
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Starts a daemon that lets everybody of the realm in; a `server` answers by itself.
    pub(crate) fn start(&self, name: &str, server: bool, peers: &[(&str, u16)]) -> Daemon {
        self.certify(name);
        self.launch(name, server, peers, false)
    }

    /// The same with TLS before CER towards all that `peers` names and all that show a certificate; who
    /// comes in clear is let in at another port. Its certificate and `ca.pem` are in the folder.
    pub(crate) fn start_over_tls(&self, name: &str, server: bool, peers: &[(&str, u16)]) -> Daemon {
        self.launch(name, server, peers, true)
    }

    /// Makes a certificate of its own.
    fn certify(&self, name: &str) {
        let (certificate, private) = (format!("{name}.pem"), format!("{name}.key"));
        let subject = format!("/CN={name}.example.net");
        self.run(
            "openssl",
            &[
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "2",
                "-subj",
                &subject,
                "-keyout",
                &private,
                "-out",
                &certificate,
            ],
        );
    }

    fn launch(&self, name: &str, server: bool, peers: &[(&str, u16)], tls: bool) -> Daemon {
        let (certificate, private) = (format!("{name}.pem"), format!("{name}.key"));
        let (clear, secure) = (free_port(), if tls { free_port() } else { 0 });
        let port = if tls { secure } else { clear };
        let authority = if tls { "ca.pem" } else { certificate.as_str() };
        let in_clear = if tls { "" } else { "No_TLS; " };
        let own = if server { "LoadExtension = \"./fd_answers.fdx\";\n" } else { "" };
        let connect = |(name, port): &(&str, u16)| {
            format!(
                "ConnectPeer = \"{name}.example.net\" {{ ConnectTo = \"127.0.0.1\"; {in_clear}Port = {port}; }};\n"
            )
        };
        let peers: String = peers.iter().map(connect).collect();
        let file = format!("{name}.conf");
        fs::write(
            self.folder.join(&file),
            format!(
                "Identity = \"{name}.example.net\";
Realm = \"example.net\";
Port = {clear};
SecPort = {secure};
No_SCTP;
No_IPv6;
TcTimer = 6;
TwTimer = 6;
TLS_Cred = \"{certificate}\", \"{private}\";
TLS_CA = \"{authority}\";
TLS_DH_File = \"dh.pem\";
LoadExtension = \"{EXTENSIONS}/acl_wl.fdx\" : \"acl.conf\";
LoadExtension = \"{EXTENSIONS}/dict_nasreq.fdx\";
LoadExtension = \"{EXTENSIONS}/dict_dcca.fdx\";
{own}{peers}"
            ),
        )
        .expect("written");
        let mut command = Command::new("freeDiameterd");
        command.args(["-c", &file]).current_dir(&self.folder);
        let log = self.folder.join(format!("{name}.log"));
        let process = Process::spawn(&mut command, &log);
        wait_for_tcp(port);
        Daemon { process, port, clear, log }
    }
}

/// A running freeDiameter.
pub(crate) struct Daemon {
    pub(crate) process: Process,
    pub(crate) port: u16,
    /// Where it takes who comes without TLS; the same, if it takes none with it.
    pub(crate) clear: u16,
    log: PathBuf,
}

impl Daemon {
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}
