//! Values out of the tree. What is wrong is noted with its place, and reading goes on, so that all
//! errors of a file come at once.

use std::time::Duration;

use strowger_contract::duration;

use super::ConfigError;
use super::tree::{Entry, Kind, Node};

/// Collects what is wrong.
#[derive(Default)]
pub(super) struct Reader {
    pub(super) file: String,
    pub(super) errors: Vec<ConfigError>,
    /// Not wrong, but perhaps not meant.
    pub(super) warnings: Vec<String>,
}

/// A map whose keys are known.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    pub(super) node: &'a Node,
    entries: &'a [Entry],
    pub(super) path: &'a str,
}

impl Reader {
    /// Notes an error at a node.
    pub(super) fn wrong(&mut self, node: &Node, path: &str, message: impl Into<String>) {
        self.wrong_at(node.line, node.column, path, message);
    }

    /// Notes an error at a place in the file.
    pub(super) fn wrong_at(
        &mut self,
        line: usize,
        column: usize,
        path: &str,
        message: impl Into<String>,
    ) {
        let (file, path, message) = (self.file.clone(), path.to_owned(), message.into());
        self.errors.push(ConfigError { file, line, column, path, message });
    }

    /// Notes an error at a node of another file.
    pub(super) fn wrong_in(&mut self, file: &str, node: &Node, path: &str, message: String) {
        let (file, path) = (file.to_owned(), path.to_owned());
        self.errors.push(ConfigError { file, line: node.line, column: node.column, path, message });
    }

    /// A map with these keys and no others.
    pub(super) fn fields<'a>(
        &mut self,
        node: &'a Node,
        path: &'a str,
        known: &[&str],
    ) -> Option<Fields<'a>> {
        let entries = match &node.kind {
            Kind::Map(entries) => entries.as_slice(),
            Kind::Null => &[],
            _ => {
                self.wrong(node, path, format!("expected a map, found {}", node.what()));
                return None;
            }
        };
        for entry in entries.iter().filter(|entry| !known.contains(&entry.key.as_str())) {
            let message = unknown("key", &entry.key, known.iter().copied());
            self.wrong_at(entry.line, entry.column, &join(path, &entry.key), message);
        }
        Some(Fields { node, entries, path })
    }

    /// A map from names to values.
    pub(super) fn named<'a>(&mut self, node: &'a Node, path: &str) -> &'a [Entry] {
        match &node.kind {
            Kind::Map(entries) => entries,
            Kind::Null => &[],
            _ => {
                self.wrong(node, path, format!("expected a map of names, found {}", node.what()));
                &[]
            }
        }
    }

    /// A list.
    pub(super) fn list<'a>(&mut self, node: &'a Node, path: &str) -> &'a [Node] {
        match &node.kind {
            Kind::List(list) => list,
            Kind::Null => &[],
            _ => {
                self.wrong(node, path, format!("expected a list, found {}", node.what()));
                &[]
            }
        }
    }

    pub(super) fn text(&mut self, node: &Node, path: &str) -> Option<String> {
        match &node.kind {
            Kind::Text(text) if !text.is_empty() => Some(text.clone()),
            // A name that looks like a number is still a name.
            Kind::Integer(value) => Some(value.to_string()),
            Kind::Bool(value) => Some(value.to_string()),
            Kind::Text(_) => {
                self.wrong(node, path, "must not be empty");
                None
            }
            _ => {
                self.wrong(node, path, format!("expected text, found {}", node.what()));
                None
            }
        }
    }

    pub(super) fn number(&mut self, node: &Node, path: &str, min: u64, max: u64) -> Option<u64> {
        let Kind::Integer(value) = node.kind else {
            self.wrong(
                node,
                path,
                format!("expected a whole number from {min} to {max}, found {}", node.what()),
            );
            return None;
        };
        match u64::try_from(value) {
            Ok(value) if (min..=max).contains(&value) => Some(value),
            _ => {
                self.wrong(node, path, format!("{value} is out of range: {min} to {max}"));
                None
            }
        }
    }

    pub(super) fn duration(&mut self, node: &Node, path: &str) -> Option<Duration> {
        let text = match &node.kind {
            Kind::Text(text) => text.clone(),
            Kind::Integer(value) => value.to_string(),
            _ => {
                self.wrong(
                    node,
                    path,
                    format!("expected a duration such as 500ms, 2s or 1h, found {}", node.what()),
                );
                return None;
            }
        };
        duration::parse(&text).map_err(|message| self.wrong(node, path, message)).ok()
    }

    pub(super) fn choice<T: Copy>(
        &mut self,
        node: &Node,
        path: &str,
        choices: &[(&str, T)],
    ) -> Option<T> {
        let text = self.text(node, path)?;
        let found = choices.iter().find(|(name, _)| *name == text).map(|(_, value)| *value);
        if found.is_none() {
            let message = unknown("value", &text, choices.iter().map(|(name, _)| *name));
            self.wrong(node, path, message);
        }
        found
    }
}

impl<'a> Fields<'a> {
    /// The value of a key; none if it is absent or null.
    pub(super) fn get(&self, key: &str) -> Option<&'a Node> {
        let entry = self.entries.iter().find(|entry| entry.key == key)?;
        (entry.value.kind != Kind::Null).then_some(&entry.value)
    }

    /// The value of a key, or an error that it is missing.
    pub(super) fn need(&self, reader: &mut Reader, key: &str) -> Option<&'a Node> {
        let found = self.get(key);
        if found.is_none() {
            reader.wrong(self.node, self.path, format!("`{key}` is missing"));
        }
        found
    }

    /// The value of a key, for messages: the map itself if it is absent.
    pub(super) fn node_of(&self, key: &str) -> &'a Node {
        self.get(key).unwrap_or(self.node)
    }

    /// Text that must be there.
    pub(super) fn need_text(&self, reader: &mut Reader, key: &str) -> Option<String> {
        let node = self.need(reader, key)?;
        reader.text(node, &self.path_of(key))
    }

    pub(super) fn path_of(&self, key: &str) -> String {
        join(self.path, key)
    }

    pub(super) fn text(&self, reader: &mut Reader, key: &str) -> Option<String> {
        reader.text(self.get(key)?, &self.path_of(key))
    }

    pub(super) fn number(&self, reader: &mut Reader, key: &str, min: u64, max: u64) -> Option<u64> {
        reader.number(self.get(key)?, &self.path_of(key), min, max)
    }

    pub(super) fn duration(&self, reader: &mut Reader, key: &str) -> Option<Duration> {
        reader.duration(self.get(key)?, &self.path_of(key))
    }

    pub(super) fn choice<T: Copy>(
        &self,
        reader: &mut Reader,
        key: &str,
        choices: &[(&str, T)],
    ) -> Option<T> {
        reader.choice(self.get(key)?, &self.path_of(key), choices)
    }
}

/// `path.key`.
pub(super) fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// "unknown …", with what may have been meant and what there is.
pub(super) fn unknown<'a>(what: &str, found: &str, known: impl Iterator<Item = &'a str>) -> String {
    const LISTED_MAX: usize = 24;
    let mut known: Vec<&str> = known.collect();
    let near = known.iter().map(|name| (distance(found, name), *name)).min();
    let meant = near
        .filter(|(distance, name)| *distance <= name.len().max(3) / 3 + 1)
        .map(|(_, name)| name);
    if let Some(meant) = meant {
        return format!("unknown {what} `{found}`: did you mean `{meant}`?");
    }
    known.truncate(LISTED_MAX);
    if known.is_empty() {
        format!("unknown {what} `{found}`")
    } else {
        format!("unknown {what} `{found}`; known are {}", known.join(", "))
    }
}

/// Letters to change, add, drop or swap (Damerau, adjacent).
fn distance(one: &str, two: &str) -> usize {
    let (one, two): (Vec<char>, Vec<char>) =
        (one.chars().take(64).collect(), two.chars().take(64).collect());
    let width = two.len() + 1;
    let mut table = vec![0; (one.len() + 1) * width];
    for row in 0..=one.len() {
        for column in 0..=two.len() {
            let at = |row: usize, column: usize| table[row * width + column];
            table[row * width + column] = match (row, column) {
                (0, _) => column,
                (_, 0) => row,
                _ => {
                    let change = usize::from(one[row - 1] != two[column - 1]);
                    let mut best = (at(row - 1, column) + 1)
                        .min(at(row, column - 1) + 1)
                        .min(at(row - 1, column - 1) + change);
                    if row > 1
                        && column > 1
                        && one[row - 1] == two[column - 2]
                        && one[row - 2] == two[column - 1]
                    {
                        best = best.min(at(row - 2, column - 2) + 1);
                    }
                    best
                }
            };
        }
    }
    table[one.len() * width + two.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_meant() {
        let meant =
            |found: &str| unknown("key", found, ["weight", "address", "priority"].into_iter());
        assert_eq!(meant("wieght"), "unknown key `wieght`: did you mean `weight`?");
        assert_eq!(meant("adress"), "unknown key `adress`: did you mean `address`?");
        assert_eq!(meant("zzzzzz"), "unknown key `zzzzzz`; known are weight, address, priority");
        assert_eq!(
            (distance("ab", "ba"), distance("", "abc"), distance("kitten", "sitting")),
            (1, 3, 3)
        );
    }
}
