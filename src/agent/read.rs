//! Reads a manifest: YAML in, all errors with their places out.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use strowger_contract::OptionsError;

use super::manifest::{App, EdgeAddress, Manifest};
use crate::control::config::{ConfigErrors, Document, Source, read_map, unknown_word};
use crate::control::registry::check_id;

/// Applications in one manifest, at most.
const APPS_MAX: usize = 256;

/// Reads a manifest. Paths in it are relative to `folder`.
///
/// # Errors
/// All that is wrong with it.
pub fn read(source: &Source, folder: &Path) -> Result<Manifest, ConfigErrors> {
    let document = Document::parse(source)?;
    let value = document.value();
    let mut errors = Vec::new();
    let mut manifest = read_top(&value, &mut errors);
    super::verify::check(&manifest, &mut errors);
    if errors.is_empty() {
        absolute(&mut manifest, folder);
        Ok(manifest)
    } else {
        Err(document.place(errors))
    }
}

fn read_top(value: &Value, errors: &mut Vec<OptionsError>) -> Manifest {
    const KEYS: [&str; 4] = ["version", "edges", "services", "apps"];
    let empty = Manifest {
        version: 1,
        edges: Vec::new(),
        services: BTreeMap::new(),
        apps: BTreeMap::new(),
    };
    let mut wrong = |path: &str, message: String| {
        errors.push(OptionsError { path: path.to_owned(), message });
    };
    let Value::Object(map) = value else {
        wrong("", "a manifest is a map with `version: 1` and `apps`".to_owned());
        return empty;
    };
    for key in map.keys().filter(|key| !KEYS.contains(&key.as_str())) {
        wrong(key, unknown_word("key", key, KEYS.into_iter()));
    }
    match map.get("version") {
        Some(version) if version == 1 => {}
        Some(_) => wrong("version", "this release reads version 1".to_owned()),
        None => wrong("", "`version` is missing; write `version: 1`".to_owned()),
    }
    let mut manifest = empty;
    let edges = map.get("edges").and_then(Value::as_array);
    for (index, edge) in edges.into_iter().flatten().enumerate() {
        let edge = match edge {
            Value::String(url) => serde_json::json!({ "url": url }),
            other => other.clone(),
        };
        manifest.edges.extend(read_map::<EdgeAddress>(&edge, &format!("edges[{index}]"), errors));
    }
    for (name, service) in entries(map.get("services"), "services", errors) {
        if let Some(service) = read_map(&service, &format!("services.{name}"), errors) {
            manifest.services.insert(name, service);
        }
    }
    let apps = entries(map.get("apps"), "apps", errors);
    if apps.len() > APPS_MAX {
        let message = format!("{} applications; at most {APPS_MAX}", apps.len());
        errors.push(OptionsError { path: "apps".to_owned(), message });
    }
    for (name, app) in apps {
        let path = format!("apps.{name}");
        if let Err(message) = check_id(&name) {
            errors.push(OptionsError { path: path.clone(), message });
        }
        if let Some(app) = read_map::<App>(&app, &path, errors) {
            manifest.apps.insert(name, app);
        }
    }
    manifest
}

fn entries(
    value: Option<&Value>,
    path: &str,
    errors: &mut Vec<OptionsError>,
) -> Vec<(String, Value)> {
    match value {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Object(map)) => {
            map.iter().map(|(key, value)| (key.clone(), value.clone())).collect()
        }
        Some(_) => {
            let message = "expected a map of names".to_owned();
            errors.push(OptionsError { path: path.to_owned(), message });
            Vec::new()
        }
    }
}

/// Makes paths absolute: the agent has a working directory of its own.
fn absolute(manifest: &mut Manifest, folder: &Path) {
    let fix = |path: &mut PathBuf| *path = folder.join(&*path);
    for edge in &mut manifest.edges {
        let EdgeAddress { url: _, token_file, ca, name: _, certificate, key } = edge;
        [token_file, ca, certificate, key].into_iter().flatten().for_each(fix);
    }
    for service in manifest.services.values_mut() {
        service.files.values_mut().for_each(fix);
    }
    for app in manifest.apps.values_mut() {
        if let Some(release) = &mut app.release {
            fix(&mut release.dir);
        }
        app.secrets.values_mut().for_each(fix);
        app.logs.files.iter_mut().for_each(fix);
    }
}

/// The JSON schema of a manifest.
#[must_use]
pub fn schema() -> Value {
    let mut value = schemars::schema_for!(Manifest).to_value();
    value["title"] = "Strowger agent manifest".into();
    value["properties"]["version"] = serde_json::json!({ "const": 1 });
    // An edge may be its address alone.
    value["properties"]["edges"]["items"] = serde_json::json!({
        "anyOf": [{ "type": "string" }, { "$ref": "#/$defs/EdgeAddress" }]
    });
    value
}
