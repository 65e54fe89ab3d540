//! The rules.

/// What is wrong in a line.
#[derive(Debug)]
pub(crate) struct Complaint {
    pub(crate) line: usize,
    pub(crate) what: String,
}

/// A file has at most so many lines, unless it says `// Long because:` in its first ten.
const LINES_MAX: usize = 700;

/// Files that are too long as yet, and why that is borne.
pub(crate) const LONG: [(&str, &str); 1] =
    [("src/observe/metrics.rs", "one declaration for each metric; to be split by subject")];

/// What a pure part must not name, and what it does instead.
const IMPURE: [(&str, &str); 11] = [
    ("Instant::now(", "time is an argument"),
    ("SystemTime", "time is an argument"),
    ("tokio::", "the runtime is not of the core"),
    ("rand::", "seeds are arguments"),
    ("TcpStream", "sockets are the runtime's"),
    ("TcpListener", "sockets are the runtime's"),
    ("UdpSocket", "sockets are the runtime's"),
    ("std::thread", "threads are the runtime's"),
    ("std::env", "settings are arguments"),
    ("println!", "events go into the outbox"),
    ("std::fs", "files are the control side's"),
];

fn complain(line: usize, what: impl Into<String>) -> Complaint {
    Complaint { line: line + 1, what: what.into() }
}

fn is_rust(name: &str) -> bool {
    name.ends_with(".rs")
}

/// This rule book names all that it forbids.
fn is_this(name: &str) -> bool {
    name.starts_with("tests/tidy/")
}

/// The lines of code: without comments, and without tests, which stand at a file's end.
fn code(name: &str, text: &str) -> Vec<(usize, String)> {
    if name.ends_with("/tests.rs") || name.contains("/tests/") {
        return Vec::new();
    }
    let lines = text.lines().enumerate().take_while(|(_, line)| *line != "#[cfg(test)]");
    let bare = lines.map(|(number, line)| {
        let end = if line.trim_start().starts_with("//") { 0 } else { line.len() };
        (number, line[..end].split(" // ").next().unwrap_or_default().to_owned())
    });
    bare.collect()
}

fn is_pure(name: &str) -> bool {
    is_rust(name)
        && (name.starts_with("src/routing/")
            || name.starts_with("protocols/") && name.contains("/src/"))
}

/// No clock, chance, socket, thread, environment or output in the pure parts.
pub(crate) fn purity(name: &str, text: &str) -> Vec<Complaint> {
    if !is_pure(name) {
        return Vec::new();
    }
    let mut found = Vec::new();
    for (number, line) in code(name, text) {
        for (word, instead) in IMPURE {
            if line.contains(word) {
                found.push(complain(number, format!("`{word}` in a pure part: {instead}")));
            }
        }
    }
    found
}

/// `routing` uses nothing of the others, `runtime` nothing of `control` and `agent`.
pub(crate) fn modules(name: &str, text: &str) -> Vec<Complaint> {
    let forbidden: &[&str] = if name.starts_with("src/routing/") {
        &["runtime", "control", "agent", "observe", "edge", "demo", "cli", "protocols"]
    } else if name.starts_with("src/runtime/") {
        &["control", "agent", "edge", "demo", "cli"]
    } else if name.starts_with("src/observe/") {
        &["control", "agent", "edge", "demo", "cli", "runtime"]
    } else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for (number, line) in code(name, text) {
        for module in forbidden {
            let named = [format!("crate::{module}::"), format!("crate::{module};")];
            let listed = line.contains("crate::{")
                && line
                    .split(|letter: char| !letter.is_alphanumeric() && letter != '_')
                    .any(|word| word == *module);
            if listed || named.iter().any(|path| line.contains(path)) {
                found.push(complain(number, format!("{name} must not use `{module}`")));
            }
        }
    }
    found
}

/// Protocols depend on the contract only, the contract on nothing of ours; none on a runtime.
pub(crate) fn crates(name: &str, text: &str) -> Vec<Complaint> {
    if !name.starts_with("protocols/") || !name.ends_with("/Cargo.toml") {
        return Vec::new();
    }
    let allowed: &[&str] =
        if name == "protocols/contract/Cargo.toml" { &[] } else { &["strowger-contract"] };
    let (mut section, mut found) = (String::new(), Vec::new());
    for (number, line) in text.lines().enumerate() {
        if line.starts_with('[') {
            section = line.trim_matches(['[', ']']).to_owned();
        }
        if !section.ends_with("dependencies") || line.starts_with('[') {
            continue;
        }
        let dependency = line.split(['.', ' ', '=']).next().unwrap_or_default();
        let ours = dependency == "strowger" || dependency.starts_with("strowger-");
        let impure = ["tokio", "rand", "mio", "socket2", "libc", "rustix"].contains(&dependency);
        if (ours && !allowed.contains(&dependency)) || (impure && section == "dependencies") {
            found.push(complain(number, format!("a protocol must not depend on `{dependency}`")));
        }
    }
    found
}

/// `unsafe` below `src/runtime/sys` only (and where an allocator is replaced to count), and each with
/// its SAFETY comment.
pub(crate) fn unsafe_code(name: &str, text: &str) -> Vec<Complaint> {
    if !is_rust(name) || is_this(name) {
        return Vec::new();
    }
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (number, line) in lines.iter().enumerate() {
        let bare = line.trim_start();
        let begins = ["{", "fn", "impl", "extern", "trait"];
        let word = begins.iter().any(|next| bare.contains(&format!("unsafe {next}")));
        if bare.starts_with("//") || !word {
            continue;
        }
        let near = &lines[number.saturating_sub(10)..=number];
        if !name.starts_with("src/runtime/sys/") && !name.starts_with("tests/alloc/") {
            found.push(complain(number, "unsafe code stands in src/runtime/sys only"));
        } else if !near.iter().any(|line| line.contains("SAFETY") || line.contains("# Safety")) {
            found.push(complain(number, "no SAFETY comment in the ten lines before"));
        }
    }
    found
}

/// No test that is ignored without a reason, no marks of what is not finished.
pub(crate) fn leftovers(name: &str, text: &str) -> Vec<Complaint> {
    if !is_rust(name) || is_this(name) {
        return Vec::new();
    }
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        for word in ["todo!(", "unimplemented!(", "FIXME", "XXX", "TODO"] {
            if line.contains(word) {
                found.push(complain(number, format!("`{word}` is left over")));
            }
        }
        if line.trim() == "#[ignore]" {
            found.push(complain(number, "an ignored test says why: #[ignore = \"...\"]"));
        }
    }
    found
}

pub(crate) fn is_long(text: &str) -> bool {
    let excused = text.lines().take(10).any(|line| line.starts_with("// Long because:"));
    !excused && text.lines().count() > LINES_MAX
}

/// No file is long without a reason.
pub(crate) fn length(name: &str, text: &str) -> Vec<Complaint> {
    let listed = LONG.iter().any(|(long, _)| *long == name);
    if !is_rust(name) || listed || !is_long(text) {
        return Vec::new();
    }
    let what = format!(
        "{} lines, over {LINES_MAX}: split it, or say `// Long because: ...` at its top",
        text.lines().count()
    );
    vec![complain(0, what)]
}

/// Reads captures and opens no socket: the ports in it are those of the captures.
const NO_SOCKETS: &str = "tests/it/decode.rs";

/// Tests that open sockets take ports that are free.
pub(crate) fn ports(name: &str, text: &str) -> Vec<Complaint> {
    if !is_rust(name)
        || name == NO_SOCKETS
        || !(name.starts_with("tests/it/") || name.starts_with("tests/toy/"))
    {
        return Vec::new();
    }
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        for host in ["127.0.0.1:", "[::1]:", "localhost:", "\"127.0.0.1\", "] {
            let ports = line.match_indices(host).map(|(at, _)| &line[at + host.len()..]);
            for port in ports {
                let digits = port.bytes().take_while(u8::is_ascii_digit).count();
                if digits > 0 && !port.starts_with('0') && !line.trim_start().starts_with("//") {
                    found.push(complain(number, "a fixed port: take harness::free_port()"));
                }
            }
        }
    }
    found
}

/// What is committed works on any machine.
pub(crate) fn machine_paths(name: &str, text: &str) -> Vec<Complaint> {
    if is_this(name) {
        return Vec::new();
    }
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        for path in ["/tmp/", "/work/", "/home/", "/root/"] {
            let begins = line.match_indices(path).any(|(at, _)| {
                let before = line[..at].chars().next_back();
                before.is_none_or(|letter| !letter.is_alphanumeric() && !"./_-}".contains(letter))
            });
            if begins {
                found.push(complain(number, format!("`{path}` is a path of one machine")));
            }
        }
    }
    found
}

mod can_fail {
    use super::*;

    fn told(rule: fn(&str, &str) -> Vec<Complaint>, name: &str, text: &str) -> Vec<usize> {
        rule(name, text).into_iter().map(|complaint| complaint.line).collect()
    }

    #[test]
    fn purity_is_checked_outside_of_tests_and_comments() {
        let text = "// Instant::now() is not for us\nlet now = Instant::now();\nuse tokio::time;\n#[cfg(test)]\nmod tests { Instant::now() }\n";
        assert_eq!(told(purity, "src/routing/core.rs", text), [2, 3]);
        assert_eq!(told(purity, "protocols/sip/src/scan.rs", text), [2, 3]);
        assert_eq!(told(purity, "src/runtime/worker.rs", text), []);
        for (word, _) in IMPURE {
            assert_eq!(told(purity, "src/routing/a.rs", &format!("x {word}")), [1], "{word}");
        }
    }

    #[test]
    fn modules_are_checked() {
        assert_eq!(told(modules, "src/routing/a.rs", "use crate::runtime::Fleet;"), [1]);
        assert_eq!(told(modules, "src/routing/a.rs", "use crate::{control, x};"), [1]);
        assert_eq!(told(modules, "src/runtime/a.rs", "\nuse crate::control::config;"), [2]);
        assert_eq!(told(modules, "src/runtime/a.rs", "use crate::routing::Core;"), []);
    }

    #[test]
    fn crates_are_checked() {
        let text = "[dependencies]\nstrowger-contract.workspace = true\nstrowger-sip = { path = \"..\" }\ntokio = \"1\"\n[dev-dependencies]\nstrowger = \"1\"\n";
        assert_eq!(told(crates, "protocols/tcp/Cargo.toml", text), [3, 4, 6]);
        assert_eq!(told(crates, "protocols/contract/Cargo.toml", text), [2, 3, 4, 6]);
        assert_eq!(told(crates, "Cargo.toml", text), []);
    }

    #[test]
    fn unsafe_code_is_found() {
        assert_eq!(told(unsafe_code, "src/edge.rs", "x\nunsafe { y }"), [2]);
        assert_eq!(told(unsafe_code, "tests/it/a.rs", "unsafe impl Send for A {}"), [1]);
        assert_eq!(told(unsafe_code, "src/runtime/sys/a.rs", "unsafe { y }"), [1]);
        assert_eq!(told(unsafe_code, "src/runtime/sys/a.rs", "// SAFETY: z\nunsafe { y }"), []);
    }

    #[test]
    fn leftovers_are_found() {
        let text = "#[ignore]\n#[ignore = \"slow\"]\ntodo!()\n// FIXME\n// XXX\nunimplemented!()";
        assert_eq!(told(leftovers, "src/a.rs", text), [1, 3, 4, 5, 6]);
    }

    #[test]
    fn long_files_are_found() {
        let long = "x\n".repeat(LINES_MAX + 1);
        assert_eq!(told(length, "src/a.rs", &long), [1]);
        assert_eq!(told(length, "src/a.rs", &format!("// Long because: a table\n{long}")), []);
        assert_eq!(told(length, "docs/a.md", &long), []);
        assert_eq!(told(length, "src/a.rs", &"x\n".repeat(LINES_MAX)), []);
    }

    #[test]
    fn fixed_ports_are_found() {
        let text = "bind(\"127.0.0.1:5060\")\nbind(\"127.0.0.1:0\")\nbind((\"127.0.0.1\", 5060))\nformat!(\"127.0.0.1:{port}\")\n// 127.0.0.1:1";
        assert_eq!(told(ports, "tests/it/a.rs", text), [1, 3]);
        assert_eq!(told(ports, "tests/sim/a.rs", text), []);
    }

    #[test]
    fn machine_paths_are_found() {
        let text = "cd /work/main\n\"/tmp/a\"\nhttps://example.net/work/a\n~/tmp/a\ntarget/tmp/a";
        assert_eq!(told(machine_paths, "docs/a.md", text), [1, 2, 4]);
    }
}
