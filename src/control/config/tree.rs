//! YAML with the place of every value.

use saphyr_parser::{Event, Parser, ScalarStyle, Span};

use super::{ConfigError, Source};

/// Values in values, at most: deeper than any option, and no burden for the stack.
const DEPTH_MAX: usize = 32;

/// Values in a file, at most; some 20 a backend.
const NODES_MAX: usize = 2_000_000;

/// A value and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    pub(super) line: usize,
    pub(super) column: usize,
    pub(super) kind: Kind,
}

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Kind {
    Null,
    Bool(bool),
    Integer(i64),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// A key and its value.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) line: usize,
    pub(super) column: usize,
    pub(super) value: Node,
}

impl Node {
    /// What it is, for messages.
    pub(super) fn what(&self) -> &'static str {
        match self.kind {
            Kind::Null => "nothing",
            Kind::Bool(_) => "true or false",
            Kind::Integer(_) | Kind::Float(_) => "a number",
            Kind::Text(_) => "text",
            Kind::List(_) => "a list",
            Kind::Map(_) => "a map",
        }
    }

    /// As JSON, for options that serde reads.
    pub(super) fn to_json(&self) -> serde_json::Value {
        use serde_json::Value;
        match &self.kind {
            Kind::Null => Value::Null,
            Kind::Bool(value) => Value::Bool(*value),
            Kind::Integer(value) => Value::from(*value),
            Kind::Float(value) => Value::from(*value),
            Kind::Text(text) => Value::String(text.clone()),
            Kind::List(list) => Value::Array(list.iter().map(Self::to_json).collect()),
            Kind::Map(entries) => Value::Object(
                entries.iter().map(|entry| (entry.key.clone(), entry.value.to_json())).collect(),
            ),
        }
    }

    /// The value at a path such as `a.b[2]`, as far as it goes.
    pub(super) fn at(&self, path: &str) -> &Self {
        self.walk(path).0
    }

    /// Line and column of the value at a path, as far as it goes, or of its key.
    pub(super) fn place(&self, path: &str, of_key: bool) -> (usize, usize) {
        let (node, key) = self.walk(path);
        key.filter(|_| of_key).unwrap_or((node.line, node.column))
    }

    /// Whether it holds no other values.
    pub(super) fn is_scalar(&self) -> bool {
        !matches!(self.kind, Kind::List(_) | Kind::Map(_))
    }

    /// How many values it holds.
    pub(super) fn len(&self) -> usize {
        match &self.kind {
            Kind::List(list) => list.len(),
            Kind::Map(entries) => entries.len(),
            _ => 0,
        }
    }

    /// The value at exactly this path.
    pub(super) fn find(&self, path: &[Step<'_>]) -> Option<&Self> {
        path.iter().try_fold(self, |node, step| match (step, &node.kind) {
            (Step::Key(key), Kind::Map(entries)) => {
                entries.iter().find(|entry| entry.key == *key).map(|entry| &entry.value)
            }
            (Step::Index(index), Kind::List(list)) => list.get(*index),
            _ => None,
        })
    }

    fn walk(&self, path: &str) -> (&Self, Option<(usize, usize)>) {
        let (mut node, mut key) = (self, None);
        for step in path
            .split(['.', '['])
            .map(|step| step.trim_end_matches(']'))
            .filter(|step| !step.is_empty())
        {
            let next = match &node.kind {
                Kind::Map(entries) => entries.iter().find(|entry| entry.key == step).map(|entry| {
                    key = Some((entry.line, entry.column));
                    &entry.value
                }),
                Kind::List(list) => step.parse::<usize>().ok().and_then(|index| list.get(index)),
                _ => None,
            };
            let Some(next) = next else { break };
            node = next;
        }
        (node, key)
    }
}

/// One step of a path.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step<'a> {
    Key(&'a str),
    Index(usize),
}

/// Reads a file's YAML; what is wrong goes to `errors`.
pub(super) fn parse(source: &Source, errors: &mut Vec<ConfigError>) -> Option<Node> {
    let mut parse = Parse {
        source,
        errors,
        parser: Parser::new_from_str(&source.text),
        nodes: 0,
        failed: false,
    };
    parse.document()
}

struct Parse<'a> {
    source: &'a Source,
    errors: &'a mut Vec<ConfigError>,
    parser: Parser<'a, saphyr_parser::StrInput<'a>>,
    nodes: usize,
    failed: bool,
}

impl<'a> Parse<'a> {
    fn wrong(&mut self, line: usize, column: usize, message: impl Into<String>) {
        let (file, message) = (self.source.name.clone(), message.into());
        self.errors.push(ConfigError { file, line, column, path: String::new(), message });
    }

    fn next(&mut self) -> Option<(Event<'a>, Span)> {
        if self.failed {
            return None;
        }
        match self.parser.next_event()? {
            Ok(event) => Some(event),
            Err(error) => {
                self.failed = true;
                let marker = *error.marker();
                self.wrong(
                    marker.line(),
                    marker.col() + 1,
                    format!("this is not YAML: {}", error.info()),
                );
                None
            }
        }
    }

    fn document(&mut self) -> Option<Node> {
        let mut root = None;
        while let Some((event, span)) = self.next() {
            match event {
                Event::StreamStart
                | Event::DocumentStart(_)
                | Event::DocumentEnd
                | Event::Nothing => {}
                Event::StreamEnd => break,
                event => {
                    if root.is_some() {
                        self.wrong(
                            span.start.line(),
                            span.start.col() + 1,
                            "a second document: write one per file",
                        );
                        return None;
                    }
                    root = Some(self.node(event, span, 0)?);
                }
            }
        }
        if self.failed {
            return None;
        }
        Some(root.unwrap_or(Node { line: 1, column: 1, kind: Kind::Map(Vec::new()) }))
    }

    fn node(&mut self, event: Event<'a>, span: Span, depth: usize) -> Option<Node> {
        let (line, column) = (span.start.line(), span.start.col() + 1);
        self.nodes += 1;
        if depth > DEPTH_MAX || self.nodes > NODES_MAX {
            self.failed = true;
            self.wrong(
                line,
                column,
                format!("nested deeper than {DEPTH_MAX}, or over {NODES_MAX} values"),
            );
            return None;
        }
        let kind = match event {
            Event::Scalar(text, style, ..) => scalar(&text, style),
            Event::SequenceStart(..) => self.list(depth)?,
            Event::MappingStart(..) => self.map(depth)?,
            Event::Alias(_) => {
                self.failed = true;
                self.wrong(line, column, "aliases (*name) are not supported: write the value out");
                return None;
            }
            _ => Kind::Null,
        };
        Some(Node { line, column, kind })
    }

    fn list(&mut self, depth: usize) -> Option<Kind> {
        let mut list = Vec::new();
        loop {
            let (event, span) = self.next()?;
            if matches!(event, Event::SequenceEnd) {
                return Some(Kind::List(list));
            }
            list.push(self.node(event, span, depth + 1)?);
        }
    }

    fn map(&mut self, depth: usize) -> Option<Kind> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut seen: std::collections::HashMap<String, usize> = std::collections::HashMap::new();
        loop {
            let (event, span) = self.next()?;
            if matches!(event, Event::MappingEnd) {
                return Some(Kind::Map(entries));
            }
            let (line, column) = (span.start.line(), span.start.col() + 1);
            let Event::Scalar(key, ..) = event else {
                self.failed = true;
                self.wrong(line, column, "a key must be plain text");
                return None;
            };
            let key = key.into_owned();
            let (event, span) = self.next()?;
            let value = self.node(event, span, depth + 1)?;
            if let Some(first) = seen.insert(key.clone(), line) {
                self.wrong(
                    line,
                    column,
                    format!("`{key}` stands here a second time; the first is on line {first}"),
                );
                continue;
            }
            entries.push(Entry { key, line, column, value });
        }
    }
}

/// YAML 1.2's core schema: `no` and `on` are text.
fn scalar(text: &str, style: ScalarStyle) -> Kind {
    if style != ScalarStyle::Plain {
        return Kind::Text(text.to_owned());
    }
    match text {
        "" | "~" | "null" | "Null" | "NULL" => Kind::Null,
        "true" | "True" | "TRUE" => Kind::Bool(true),
        "false" | "False" | "FALSE" => Kind::Bool(false),
        _ => {
            let number = text.starts_with(|first: char| {
                first.is_ascii_digit() || first == '-' || first == '+' || first == '.'
            });
            if let Some(value) = text.parse().ok().filter(|_| number) {
                Kind::Integer(value)
            } else if let Some(value) = text.parse().ok().filter(|_| number) {
                Kind::Float(value)
            } else {
                Kind::Text(text.to_owned())
            }
        }
    }
}
