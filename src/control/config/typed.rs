//! Other documents than the edge's own: YAML that serde reads, with the same errors and places.

use serde::de::DeserializeOwned;
use serde_json::Value;
use strowger_contract::OptionsError;

use super::configure::{known_keys, read};
use super::read::unknown;
use super::tree::{Node, parse};
use super::{ConfigError, ConfigErrors, Source};

/// A YAML document and the places of its values.
#[derive(Debug)]
pub struct Document {
    name: String,
    tree: Node,
}

impl Document {
    /// Reads YAML.
    ///
    /// # Errors
    /// It is no YAML, or more than one document.
    pub fn parse(source: &Source) -> Result<Self, ConfigErrors> {
        let mut errors = Vec::new();
        match parse(source, &mut errors) {
            Some(tree) if errors.is_empty() => Ok(Self { name: source.name.clone(), tree }),
            _ => Err(ConfigErrors(errors)),
        }
    }

    /// Its values.
    #[must_use]
    pub fn value(&self) -> Value {
        self.tree.to_json()
    }

    /// Errors with their places.
    #[must_use]
    pub fn place(&self, errors: Vec<OptionsError>) -> ConfigErrors {
        let mut placed: Vec<ConfigError> = errors
            .into_iter()
            .map(|OptionsError { path, message }| {
                let (line, column) = self.tree.place(&path, message.starts_with("unknown key"));
                ConfigError { file: self.name.clone(), line, column, path, message }
            })
            .collect();
        placed.sort_by_key(|error| (error.line, error.column));
        placed.dedup();
        ConfigErrors(placed)
    }
}

/// Reads a map key by key, so that each wrong one is named by its path.
pub fn read_map<T: DeserializeOwned + schemars::JsonSchema>(
    value: &Value,
    path: &str,
    errors: &mut Vec<OptionsError>,
) -> Option<T> {
    read(value, path, &known_keys::<T>(), errors)
}

/// "unknown …: did you mean …?"
#[must_use]
pub fn unknown_word<'a>(what: &str, found: &str, known: impl Iterator<Item = &'a str>) -> String {
    unknown(what, found, known)
}
