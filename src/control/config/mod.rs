//! Configuration: YAML in, a wanted state out, or all errors at once.
//!
//! | module | what it does |
//! |---|---|
//! | `tree` | YAML with the place of every value |
//! | `read` | values out of the tree; collects what is wrong |
//! | `build` | what the values mean together |
//! | `permissions` | tokens of the admin API and what each may do |
//! | `node`, `classes`, `pools`, `listeners`, `endpoint` | its parts |
//! | `dns` | name servers |
//! | `brownout` | when the node gives things up |
//! | `exports` | call records and HEP |
//! | `providers` | who tells of instances besides |
//! | `tls` | certificates, keys, authorities |
//! | `configure` | a protocol's own options |
//! | `typed` | other YAML documents, with the same errors |
//! | `schema` | the JSON schema |
//! | `explain` | effective values and where they come from |

mod brownout;
mod build;
mod classes;
mod configure;
mod dns;
mod endpoint;
mod explain;
mod exports;
mod intake;
mod listeners;
mod node;
mod permissions;
mod pools;
mod providers;
mod read;
mod schema;
mod tls;
mod tree;
mod typed;

use std::fmt;
use std::path::{Path, PathBuf};

pub use build::Loaded;
pub use configure::{Configure, Configured, configurer};
pub use endpoint::endpoint as parse_endpoint;
pub use explain::explain;
pub use node::{AdminSettings, NodeSettings, RegistrySettings};
pub use permissions::{Permission, Right};
pub use schema::edge_schema;
pub use typed::{Document, read_map, unknown_word};

use crate::routing::PoolNames;
use read::Reader;

/// A file's size, at most. 10,000 backends take about 1 MiB.
const FILE_BYTES_MAX: u64 = 8 << 20;

/// Something that is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The file.
    pub file: String,
    /// The line, from 1; 0 if it is the file as a whole.
    pub line: usize,
    /// The column, from 1.
    pub column: usize,
    /// `pools.ims.backends[1].weight`.
    pub path: String,
    /// What is wrong, what was expected, and what may have been meant.
    pub message: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file)?;
        if self.line > 0 {
            write!(f, ":{}:{}", self.line, self.column)?;
        }
        if self.path.is_empty() {
            write!(f, ": {}", self.message)
        } else {
            write!(f, ": {}: {}", self.path, self.message)
        }
    }
}

/// All that is wrong with a configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// A configuration's text and where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// For messages.
    pub name: String,
    /// The YAML.
    pub text: String,
}

/// Reads files and directories (their `*.yaml` and `*.yml`, in order of names).
///
/// # Errors
/// What cannot be read.
pub fn read_sources(paths: &[PathBuf]) -> Result<Vec<Source>, ConfigErrors> {
    let (mut sources, mut errors) = (Vec::new(), Vec::new());
    for path in paths {
        match files_of(path) {
            Err(error) => errors.push(file_error(path, &format!("cannot be read: {error}"))),
            Ok(files) => {
                for file in files {
                    match read_file(&file) {
                        Ok(text) => sources.push(Source { name: file.display().to_string(), text }),
                        Err(error) => errors.push(file_error(&file, &error)),
                    }
                }
            }
        }
    }
    if errors.is_empty() { Ok(sources) } else { Err(ConfigErrors(errors)) }
}

fn files_of(path: &Path) -> std::io::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path)? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        let yaml =
            path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
        if yaml && !hidden {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn read_file(path: &Path) -> Result<String, String> {
    let size = std::fs::metadata(path).map_err(|error| format!("cannot be read: {error}"))?.len();
    if size > FILE_BYTES_MAX {
        return Err(format!("is {size} bytes long; at most {FILE_BYTES_MAX} are read"));
    }
    std::fs::read_to_string(path).map_err(|error| format!("cannot be read: {error}"))
}

fn file_error(path: &Path, message: &str) -> ConfigError {
    ConfigError {
        file: path.display().to_string(),
        line: 0,
        column: 0,
        path: String::new(),
        message: message.to_owned(),
    }
}

/// Turns sources into a wanted state, together with the files of the folders that they say to
/// watch. What `run` takes and what `check` judges is read by this.
///
/// # Errors
/// All that is wrong, over all sources.
pub fn load_watching(
    sources: Vec<Source>,
    protocols: &[&dyn Configure],
    names: &PoolNames,
) -> Result<Loaded, ConfigErrors> {
    let loaded = load(&sources, protocols, names)?;
    if loaded.watch.is_empty() {
        return Ok(loaded);
    }
    let mut all = sources;
    all.extend(read_sources(&existing(&loaded.watch))?);
    load(&all, protocols, names)
}

/// Those that are there: a folder to watch may come later.
#[must_use]
pub fn existing(paths: &[PathBuf]) -> Vec<PathBuf> {
    paths.iter().filter(|path| path.exists()).cloned().collect()
}

/// Turns sources into a wanted state.
///
/// # Errors
/// All that is wrong, over all sources.
pub fn load(
    sources: &[Source],
    protocols: &[&dyn Configure],
    names: &PoolNames,
) -> Result<Loaded, ConfigErrors> {
    let mut reader = Reader::default();
    let mut build = build::Build::new(protocols, names);
    for source in sources {
        if let Some(tree) = tree::parse(source, &mut reader.errors) {
            reader.file = source.name.clone();
            build.read(&mut reader, &tree);
        }
    }
    if sources.is_empty() {
        reader.errors.push(ConfigError {
            file: "configuration".to_owned(),
            line: 0,
            column: 0,
            path: String::new(),
            message:
                "there is no file to read: name one with --config, or put *.yaml into the directory"
                    .to_owned(),
        });
    }
    let mut loaded = build.finish(&mut reader);
    let mut errors = reader.errors;
    if errors.is_empty() {
        loaded.sources = sources.to_vec();
        return Ok(loaded);
    }
    errors.sort_by(|one, two| {
        (&one.file, one.line, one.column).cmp(&(&two.file, two.line, two.column))
    });
    errors.dedup();
    Err(ConfigErrors(errors))
}
