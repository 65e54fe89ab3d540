//! What the command line does besides running an edge: it talks to the admin API and prints.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::control::config::ConfigError;
use crate::control::reach::{Stream, Target, Trust};

/// Which edge to talk to.
#[derive(clap::Args, Clone, Debug)]
pub struct Admin {
    /// The edge's admin address: HOST:PORT, or https://HOST:PORT.
    #[arg(long, default_value = "127.0.0.1:9080", env = "STROWGER_ADMIN", value_name = "ADDRESS", value_parser = Target::of_command_line)]
    pub admin: Target,
    /// A file with the admin token.
    #[arg(long, env = "STROWGER_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Over https: the authority that vouches for the edge (PEM).
    #[arg(long, env = "STROWGER_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// Over https: what the edge's certificate must name, if not HOST.
    #[arg(long, env = "STROWGER_TLS_NAME", value_name = "NAME")]
    pub tls_name: Option<String>,
    /// Over https: our own certificate (PEM), for an edge that asks for one.
    #[arg(long, env = "STROWGER_TLS_CERTIFICATE", value_name = "FILE")]
    pub tls_certificate: Option<PathBuf>,
    /// Its key (PEM).
    #[arg(long, env = "STROWGER_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// How to print.
    #[arg(short, long, default_value = "table", value_name = "FORMAT")]
    pub output: Output,
}

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// Prints pools and instances.
///
/// # Errors
/// The edge does not answer, or says no.
pub fn status(admin: &Admin) -> Result<()> {
    let status = call(admin, "GET", "/api/v1/status", None)?;
    if admin.output == Output::Json {
        return print_json(&status);
    }
    let node = &status["node"];
    println!(
        "{}  epoch {}  up {}  {} workers",
        text(&node["name"]),
        node["epoch"],
        text(&node["uptime"]),
        node["workers"]
    );
    let mut rows = vec![
        [
            "pool",
            "instance",
            "address",
            "state",
            "health",
            "weight",
            "under way",
            "sessions",
            "requests",
            "latency ms",
        ]
        .map(String::from)
        .to_vec(),
    ];
    for pool in status["pools"].as_array().into_iter().flatten() {
        for backend in pool["backends"].as_array().into_iter().flatten() {
            let mut row = vec![text(&pool["name"])];
            for field in [
                "id",
                "address",
                "state",
                "health",
                "effective_weight",
                "in_flight",
                "sessions",
                "requests",
            ] {
                row.push(text(&backend[field]));
            }
            row.push(format!("{:.2}", backend["latency_ms"].as_f64().unwrap_or(0.0)));
            rows.push(row);
        }
    }
    print_table(&rows);
    Ok(())
}

/// Prints sessions, or where one lives.
///
/// # Errors
/// The edge does not answer, or knows no such session.
pub fn sessions(admin: &Admin, key: Option<&str>) -> Result<()> {
    let path = key.map_or_else(
        || "/api/v1/sessions".to_owned(),
        |key| format!("/api/v1/sessions?key={}", percent(key)),
    );
    let sessions = call(admin, "GET", &path, None)?;
    if admin.output == Output::Json || key.is_some() {
        return print_json(&sessions);
    }
    let mut rows = vec![["pool", "instance", "sessions"].map(String::from).to_vec()];
    for instance in sessions["instances"].as_array().into_iter().flatten() {
        rows.push(["pool", "instance", "sessions"].map(|field| text(&instance[field])).to_vec());
    }
    print_table(&rows);
    Ok(())
}

/// Starts a drain.
///
/// # Errors
/// The edge does not answer, or there is no such instance.
pub fn drain(admin: &Admin, instance: &str, deadline: Option<Duration>) -> Result<()> {
    let body = json!({ "deadline_s": deadline.map(|deadline| deadline.as_secs()) });
    let answer = call(admin, "POST", &instance_path(instance, "drain")?, Some(&body))?;
    println!("{instance} takes no new sessions; it holds {}", answer["sessions"]);
    Ok(())
}

/// Ends a drain.
///
/// # Errors
/// The edge does not answer, or there is no such instance.
pub fn undrain(admin: &Admin, instance: &str) -> Result<()> {
    call(admin, "POST", &instance_path(instance, "undrain")?, None)?;
    println!("{instance} takes new sessions");
    Ok(())
}

/// Prints live calls.
///
/// # Errors
/// The edge does not answer.
pub fn calls(admin: &Admin, pool: Option<&str>, instance: Option<&str>) -> Result<()> {
    let mut path = "/api/v1/calls?limit=1000".to_owned();
    for (name, value) in [("pool", pool), ("instance", instance)] {
        if let Some(value) = value {
            path.push_str(&format!("&{name}={}", percent(value)));
        }
    }
    let answer = call(admin, "GET", &path, None)?;
    if admin.output == Output::Json {
        return print_json(&answer);
    }
    const FIELDS: [&str; 7] = ["start", "phase", "caller", "callee", "pool", "instance", "call_id"];
    let mut rows = vec![FIELDS.map(String::from).to_vec()];
    for call in answer["calls"].as_array().into_iter().flatten() {
        rows.push(FIELDS.map(|field| text(&call[field])).to_vec());
    }
    print_table(&rows);
    Ok(())
}

/// What to trace.
#[derive(clap::Args, Clone, Debug)]
pub struct TraceOptions {
    /// KIND:VALUE, such as call-id:a84b4c76e66710 or from-user:alice; a bare value is a Call-ID.
    pub key: String,
    /// In which protocol.
    #[arg(long, default_value = "sip", value_name = "NAME")]
    pub protocol: String,
    /// How long.
    #[arg(long = "for", default_value = "60s", value_name = "TIME", value_parser = strowger_contract::duration::parse)]
    pub duration: Duration,
    /// Write a pcap there at the end.
    #[arg(short, long, value_name = "FILE")]
    pub write: Option<PathBuf>,
}

/// Traces: prints each message as it comes, and writes a pcap at the end.
///
/// # Errors
/// The edge does not answer or says no, or the file cannot be written.
pub fn trace(admin: &Admin, wanted: &TraceOptions) -> Result<()> {
    const EVERY: Duration = Duration::from_millis(500);
    let body = json!({ "protocol": wanted.protocol, "key": wanted.key, "for_s": wanted.duration.as_secs().max(1) });
    let path =
        format!("/api/v1/traces/{}", call(admin, "POST", "/api/v1/traces", Some(&body))?["id"]);
    let mut seen = 0;
    loop {
        let trace = call(admin, "GET", &format!("{path}?after={seen}"), None)?;
        let list = trace["ladder"].as_array().map(Vec::as_slice).unwrap_or_default();
        for message in list {
            print_message(admin.output, message);
        }
        seen += list.len();
        if trace["running"] != true && list.is_empty() {
            let missed = trace["missed"].as_u64().unwrap_or(0);
            if missed > 0 {
                eprintln!("{missed} more messages did not fit into the trace");
            }
            break;
        }
        std::thread::sleep(EVERY);
    }
    if let Some(file) = &wanted.write {
        let bytes = fetch(admin, "GET", &format!("{path}.pcap"), None)?;
        std::fs::write(file, bytes)
            .with_context(|| format!("{} cannot be written", file.display()))?;
        eprintln!("{seen} messages in {}", file.display());
    }
    Ok(())
}

fn print_message(output: Output, message: &Value) {
    if output == Output::Json {
        return println!("{message}");
    }
    let micros = message["time_us"].as_u64().unwrap_or(0);
    let of_day = micros / 1_000_000 % 86_400;
    println!(
        "{:02}:{:02}:{:02}.{:06}  {:>3}  {} {} -> {}  {}",
        of_day / 3_600,
        of_day / 60 % 60,
        of_day % 60,
        micros % 1_000_000,
        text(&message["direction"]),
        text(&message["transport"]),
        text(&message["from"]),
        text(&message["to"]),
        text(&message["what"]),
    );
}

fn instance_path(instance: &str, what: &str) -> Result<String> {
    let Some((pool, id)) = instance.split_once('/') else {
        bail!("write POOL/INSTANCE, such as ims/ims-a")
    };
    Ok(format!("/api/v1/pools/{}/instances/{}/{what}", percent(pool), percent(id)))
}

fn percent(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// One HTTP request, as plain as can be.
fn call(admin: &Admin, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
    let bytes = fetch(admin, method, path, body)?;
    Ok(serde_json::from_slice(&bytes).unwrap_or(Value::Null))
}

/// The same, for answers that are no JSON.
fn fetch(admin: &Admin, method: &str, path: &str, body: Option<&Value>) -> Result<Vec<u8>> {
    const TIMEOUT: Duration = Duration::from_secs(10);
    let whom = format!("the edge at {}", admin.admin.authority);
    let trust = Trust {
        ca: admin.tls_ca.as_deref(),
        name: admin.tls_name.as_deref(),
        certificate: admin.tls_certificate.as_deref(),
        key: admin.tls_key.as_deref(),
    };
    let mut stream = Stream::connect(&admin.admin, &trust, TIMEOUT).with_context(|| {
        format!("{whom} does not answer (is it running? --admin names another)")
    })?;
    let body = body.map(Value::to_string).unwrap_or_default();
    let token = match &admin.token_file {
        Some(file) => {
            let token = std::fs::read_to_string(file)
                .with_context(|| format!("{} cannot be read", file.display()))?;
            format!("Authorization: Bearer {}\r\n", token.trim())
        }
        None => String::new(),
    };
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: {}\r\n{token}Connection: close\r\nContent-Length: {}\r\n\r\n{body}",
        admin.admin.authority,
        body.len()
    )?;
    let (head, body) = read_answer(&mut stream, &whom)?;
    let code = head.split(' ').nth(1).unwrap_or_default();
    if !code.starts_with('2') {
        let value: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
        let detail = value["detail"].as_str().map(|detail| format!(": {detail}"));
        bail!("{whom} says {code}: {}{}", text(&value["title"]), detail.unwrap_or_default());
    }
    Ok(body)
}

/// Reads an HTTP answer whose sender closes after it: its head and its body.
///
/// # Errors
/// `whom` broke off, or sent something else.
pub(crate) fn read_answer(stream: &mut impl Read, whom: &str) -> Result<(String, Vec<u8>)> {
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    // Without TLS's own farewell the end may have been cut off: then the length must be right.
    let cut = read.as_ref().is_err_and(|it| it.kind() == std::io::ErrorKind::UnexpectedEof);
    if !cut || answer.is_empty() {
        read.with_context(|| format!("{whom} broke off"))?;
    }
    let head = memchr::memmem::find(&answer, b"\r\n\r\n");
    let head = head.with_context(|| format!("{whom} does not speak HTTP"))?;
    let body = answer.split_off(head + 4);
    let head = String::from_utf8_lossy(&answer).into_owned();
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    });
    if cut && length != Some(body.len()) {
        bail!("{whom} broke off in its answer");
    }
    Ok((head, body))
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn print_json(value: &Value) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

pub(crate) fn print_table(rows: &[Vec<String>]) {
    let columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> = (0..columns)
        .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        println!("{}", cells.join("  ").trim_end());
    }
}

/// An error with the line that it is about.
#[must_use]
pub fn with_snippet(error: &ConfigError) -> String {
    let line = std::fs::read_to_string(&error.file)
        .ok()
        .and_then(|text| text.lines().nth(error.line.wrapping_sub(1)).map(str::to_owned));
    match line {
        Some(line) => {
            let number = error.line.to_string();
            let indent = " ".repeat(number.len());
            let caret = " ".repeat(error.column.saturating_sub(1));
            format!("{error}\n {number} | {line}\n {indent} | {caret}^")
        }
        None => error.to_string(),
    }
}
