//! What a manifest's values must be, and what they mean together.

use strowger_contract::OptionsError;

use super::manifest::{
    App, Check, INSTANCES_MAX, Manifest, PortTransport, Strategy, bytes, cpus, lease_is_fine,
};
use crate::control::config::unknown_word;

/// Checks a manifest; what is wrong is noted by its path.
pub(super) fn check(manifest: &Manifest, errors: &mut Vec<OptionsError>) {
    for (index, edge) in manifest.edges.iter().enumerate() {
        if let Err(message) = edge.reach() {
            wrong(errors, format!("edges[{index}]"), message);
        }
    }
    let names: Vec<&str> = manifest.apps.keys().map(String::as_str).collect();
    for (name, app) in &manifest.apps {
        let path = format!("apps.{name}");
        check_app(app, &path, errors);
        if !app.register.is_empty() && manifest.edges.is_empty() {
            let message = "there are no `edges` to register with".to_owned();
            wrong(errors, format!("{path}.register"), message);
        }
        for (index, service) in app.bind.iter().enumerate() {
            if !manifest.services.contains_key(service) {
                let known = manifest.services.keys().map(String::as_str);
                let message = unknown_word("service", service, known);
                wrong(errors, format!("{path}.bind[{index}]"), message);
            }
        }
        for (kind, list) in [
            ("colocate_with", &app.placement.colocate_with),
            ("anti_affinity", &app.placement.anti_affinity),
        ] {
            for (index, other) in list.iter().enumerate() {
                if !names.contains(&other.as_str()) {
                    let message = unknown_word("application", other, names.iter().copied());
                    wrong(errors, format!("{path}.placement.{kind}[{index}]"), message);
                }
            }
        }
    }
}

fn wrong(errors: &mut Vec<OptionsError>, path: String, message: impl Into<String>) {
    errors.push(OptionsError { path, message: message.into() });
}

fn check_app(app: &App, path: &str, errors: &mut Vec<OptionsError>) {
    let at = |what: &str| format!("{path}.{what}");
    if app.exec.first().is_none_or(String::is_empty) {
        wrong(errors, at("exec"), "must name a program");
    }
    if app.instances > INSTANCES_MAX {
        let message = format!("{} is out of range: 0 to {INSTANCES_MAX}", app.instances);
        wrong(errors, at("instances"), message);
    }
    for (name, port) in &app.ports {
        let here = at(&format!("ports.{name}"));
        let fine = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
        if name.is_empty() || !name.chars().all(fine) {
            wrong(errors, here.clone(), "a port's name has letters, digits and _ only");
        }
        if port.fixed.is_some() && app.instances > 1 {
            let message = "a fixed port is for one instance: two cannot have it".to_owned();
            wrong(errors, format!("{here}.fixed"), message);
        }
        if port.fixed == Some(0) {
            wrong(errors, format!("{here}.fixed"), "ports are 1 to 65535");
        }
        if port.fixed.is_some() && port.transport == PortTransport::Unix {
            wrong(errors, format!("{here}.fixed"), "a unix socket has no port");
        }
        if port.listen && port.transport == PortTransport::Tls {
            wrong(errors, format!("{here}.listen"), "hand over a tcp port; TLS is the program's");
        }
    }
    for (name, value) in &app.env {
        let set = |name: &str| {
            let ours = is_given(app, name) || app.env.contains_key(name);
            std::env::var(name).ok().or_else(|| ours.then(|| "x".to_owned()))
        };
        if let Err(message) = super::expand::expand(&value.to_string(), &set) {
            wrong(errors, at(&format!("env.{name}")), message);
        }
    }
    check_health(app, path, errors);
    check_figures(app, path, errors);
    for (pool, register) in &app.register {
        let here = at(&format!("register.{pool}"));
        for (index, port) in register.ports.iter().enumerate() {
            if !app.ports.contains_key(port) {
                let message = unknown_word("port", port, app.ports.keys().map(String::as_str));
                wrong(errors, format!("{here}.ports[{index}]"), message);
            }
        }
        if super::registration::ports(app, register).is_empty() {
            let message = "no port of the application can be registered: their protocols are none of sip, diameter, tcp, udp".to_owned();
            wrong(errors, here.clone(), message);
        }
        if register.weight > 65_535 {
            wrong(errors, format!("{here}.weight"), "is out of range: 0 to 65535");
        }
        if register.capacity == Some(0) {
            wrong(errors, format!("{here}.capacity"), "must be at least 1");
        }
        if !lease_is_fine(register.lease) {
            wrong(errors, format!("{here}.lease"), "is out of range: 1s to 1h");
        }
    }
    check_rollout(app, path, errors);
}

/// Whether every process of an application finds a variable set by the agent.
fn is_given(app: &App, name: &str) -> bool {
    const ALWAYS: [&str; 9] = [
        "APP_NAME",
        "HOST",
        "INSTANCE_ID",
        "INSTANCE_INDEX",
        "INSTANCE_GENERATION",
        "RELEASE_NUMBER",
        "RELEASE_DIGEST",
        "STATE_DIR",
        "CREDENTIALS_DIRECTORY",
    ];
    let of_port = |name: &str| app.ports.keys().any(|port| port.to_uppercase() == name);
    ALWAYS.contains(&name)
        || name == "PORT" && !app.ports.is_empty()
        || name.strip_prefix("PORT_").or_else(|| name.strip_prefix("SOCKET_")).is_some_and(of_port)
        || app.bind.iter().any(|service| name.to_lowercase().starts_with(&service.to_lowercase()))
}

fn check_health(app: &App, path: &str, errors: &mut Vec<OptionsError>) {
    let health = &app.health;
    for (name, check) in
        [("startup", &health.startup), ("ready", &health.ready), ("live", &health.live)]
    {
        let Some(check) = check else { continue };
        let here = format!("{path}.health.{name}");
        let kinds = kinds(check);
        if kinds.len() != 1 {
            let message = "must have exactly one of exec, tcp, http, sip_options, diameter";
            wrong(errors, here.clone(), message);
        }
        for (kind, port) in kinds {
            let Some(port) = port else { continue };
            if !app.ports.contains_key(port) {
                let message = unknown_word("port", port, app.ports.keys().map(String::as_str));
                wrong(errors, format!("{here}.{kind}"), message);
            }
        }
        if check.exec.as_ref().is_some_and(Vec::is_empty) {
            wrong(errors, format!("{here}.exec"), "must name a program");
        }
        if check.every.0.is_zero() || check.timeout.0.is_zero() {
            wrong(errors, here.clone(), "`every` and `timeout` must be more than 0");
        }
        if check.rise == 0 || check.fall == 0 {
            wrong(errors, here, "`rise` and `fall` must be at least 1");
        }
    }
}

/// The kinds that a check has, each with the port that it asks.
fn kinds(check: &Check) -> Vec<(&'static str, Option<&String>)> {
    let mut found = Vec::new();
    if check.exec.is_some() {
        found.push(("exec", None));
    }
    let ports = [
        ("tcp", check.tcp.as_ref()),
        ("http", check.http.as_ref().map(|http| &http.port)),
        ("sip_options", check.sip_options.as_ref()),
        ("diameter", check.diameter.as_ref()),
    ];
    found.extend(ports.into_iter().filter(|(_, port)| port.is_some()));
    found
}

fn check_figures(app: &App, path: &str, errors: &mut Vec<OptionsError>) {
    let at = |what: &str| format!("{path}.{what}");
    let resources = &app.resources;
    if resources.cpu.is_some_and(|cpu| !(0.01..=1_024.0).contains(&cpu)) {
        wrong(errors, at("resources.cpu"), "is out of range: 0.01 to 1024");
    }
    if resources.pids == Some(0) {
        wrong(errors, at("resources.pids"), "must be at least 1");
    }
    if let Some(Err(message)) = resources.cpus.as_deref().map(cpus) {
        wrong(errors, at("resources.cpus"), message);
    }
    let sizes = [
        ("resources.memory", resources.memory.as_deref(), 1 << 20),
        ("logs.ring", Some(app.logs.ring.as_str()), 4_096),
        ("logs.file_bytes", Some(app.logs.file_bytes.as_str()), 4_096),
    ];
    for (what, size, least) in sizes {
        match size.map(bytes) {
            Some(Err(message)) => wrong(errors, at(what), message),
            Some(Ok(size)) if size < least => {
                wrong(errors, at(what), format!("must be at least {least} bytes"));
            }
            _ => {}
        }
    }
    let restart = &app.restart;
    if restart.crash_loop == 0 {
        wrong(errors, at("restart.crash_loop"), "must be at least 1");
    }
    if restart.jitter_percent > 100 {
        wrong(errors, at("restart.jitter_percent"), "is out of range: 0 to 100");
    }
    if let Some(scale) = &app.autoscale {
        if scale.min > scale.max || scale.max > INSTANCES_MAX || scale.min == 0 {
            let message = format!("`min` and `max` must be 1 to {INSTANCES_MAX}, in order");
            wrong(errors, at("autoscale"), message);
        }
        if scale.sessions_per_instance == 0 {
            wrong(errors, at("autoscale.sessions_per_instance"), "must be at least 1");
        }
        if app.register.is_empty() {
            wrong(errors, at("autoscale"), "needs `register`: the edges report the sessions");
        }
    }
}

fn check_rollout(app: &App, path: &str, errors: &mut Vec<OptionsError>) {
    let plan = &app.rollout;
    if plan.max_in_flight == 0 {
        wrong(errors, format!("{path}.rollout.max_in_flight"), "must be at least 1");
    }
    let rising = plan.steps.windows(2).all(|pair| pair[0] < pair[1]);
    if plan.steps.is_empty() || !rising || plan.steps.iter().any(|step| !(1..=100).contains(step)) {
        let message = "must be rising percentages from 1 to 100";
        wrong(errors, format!("{path}.rollout.steps"), message);
    }
    if plan.strategy == Strategy::Canary && app.register.is_empty() {
        let message = "a canary needs `register`: the edges share sessions out and judge it";
        wrong(errors, format!("{path}.rollout.strategy"), message);
    }
}
