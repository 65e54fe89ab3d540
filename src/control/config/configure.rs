//! A protocol's own part of a listener: typed by the protocol, read here without knowing it.

use std::any::Any;
use std::marker::PhantomData;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use strowger_contract::{
    ClassRule, Links, OptionsError, PoolId, Probe, Protocol, Scope, Tracer, Transport,
};

use super::read::{join, unknown};
use crate::observe::TraceProtocol;
use crate::routing::Setup;

/// What the control side needs of a protocol.
pub trait Configure: Send + Sync {
    /// Its name.
    fn name(&self) -> &'static str;
    /// What its listeners may be bound to.
    fn transports(&self) -> &'static [Transport];
    /// How its links are held.
    fn links(&self) -> Links;
    /// Its health checks.
    fn probes(&self) -> &'static [&'static str];
    /// Its session keys, the default first.
    fn session_keys(&self) -> &'static [&'static str];
    /// The spaces of its session names.
    fn session_spaces(&self) -> &'static [u8];
    /// The names that it knows subscribers by.
    fn bind_keys(&self) -> &'static [&'static str];
    /// Makes a listener's setup.
    ///
    /// # Errors
    /// All that is wrong, by paths under the listener (`options.t1`, `routes[0].match.method`).
    fn configure(
        &self,
        scope: Scope<Value>,
        options: &Value,
    ) -> Result<Configured, Vec<OptionsError>>;
    /// Keys of a route that are its own.
    fn route_keys(&self) -> &'static [&'static str];
    /// Options that name a file, and those that its text goes to.
    fn file_options(&self) -> &'static [(&'static str, &'static str)];
    /// The schemas of its options and of its routes' matches.
    fn schemas(&self, generator: &mut schemars::SchemaGenerator) -> (Value, Value);
    /// A health check by its name.
    fn probe(&self, name: &str) -> Option<Box<dyn Probe>>;
    /// What a trace may follow, the default first; empty if it cannot be traced.
    fn trace_keys(&self) -> &'static [&'static str];
    /// What finds a trace's messages.
    ///
    /// # Errors
    /// The value cannot be one of that kind; why.
    fn tracer(&self, kind: &str, value: &str) -> Result<Box<dyn Tracer>, String>;
    /// What the tap's thread asks of messages.
    fn trace_protocol(&self) -> TraceProtocol;
}

/// A listener's setup.
pub struct Configured {
    /// `Setup<P>`.
    pub setup: Arc<dyn Any + Send + Sync>,
    /// Its options, defaults filled in.
    pub options: Value,
    /// Its routes' matches, likewise.
    pub matches: Vec<Value>,
    /// The matches of `classify`, likewise.
    pub class_matches: Vec<Value>,
}

/// The configurer of a protocol.
#[must_use]
pub fn configurer<P: Protocol>() -> Box<dyn Configure> {
    Box::new(Configurer::<P>(PhantomData))
}

struct Configurer<P>(PhantomData<fn() -> P>);

impl<P: Protocol> Configure for Configurer<P> {
    fn name(&self) -> &'static str {
        P::NAME
    }

    fn transports(&self) -> &'static [Transport] {
        P::TRANSPORTS
    }

    fn links(&self) -> Links {
        P::LINKS
    }

    fn probes(&self) -> &'static [&'static str] {
        P::PROBES
    }

    fn session_keys(&self) -> &'static [&'static str] {
        P::SESSION_KEYS
    }

    fn session_spaces(&self) -> &'static [u8] {
        P::SESSION_SPACES
    }

    fn bind_keys(&self) -> &'static [&'static str] {
        P::BIND_KEYS
    }

    fn route_keys(&self) -> &'static [&'static str] {
        P::ROUTE_KEYS
    }

    fn file_options(&self) -> &'static [(&'static str, &'static str)] {
        P::FILE_OPTIONS
    }

    fn configure(
        &self,
        scope: Scope<Value>,
        options: &Value,
    ) -> Result<Configured, Vec<OptionsError>> {
        let mut errors = Vec::new();
        let options =
            read::<P::Options>(options, "options", &known_keys::<P::Options>(), &mut errors);
        let mut routes: Vec<(P::Match, PoolId)> = Vec::new();
        let match_keys = known_keys::<P::Match>();
        for (index, (value, pool)) in scope.routes.iter().enumerate() {
            let path = format!("routes[{index}].match");
            let before = errors.len();
            if let Some(matching) = read::<P::Match>(value, &path, &match_keys, &mut errors) {
                routes.push((matching, *pool));
            }
            // What is the route's own stands beside its `match`.
            for error in &mut errors[before..] {
                let below = error.path.strip_prefix(&format!("{path}."));
                let own = below.filter(|below| {
                    P::ROUTE_KEYS.iter().any(|key| below.split(['.', '[']).next() == Some(key))
                });
                if let Some(own) = own {
                    error.path = format!("routes[{index}].{own}");
                }
            }
        }
        let mut rules = Vec::new();
        for (index, rule) in scope.classify.iter().enumerate() {
            let path = format!("classify[{index}].match");
            for key in P::ROUTE_KEYS.iter().filter(|key| rule.matching.get(key).is_some()) {
                let message = "goes with routes only: a class does nothing to messages".into();
                errors.push(OptionsError { path: format!("{path}.{key}"), message });
            }
            let (class, even_carried) = (rule.class, rule.even_carried);
            if let Some(matching) =
                read::<P::Match>(&rule.matching, &path, &match_keys, &mut errors)
            {
                rules.push(ClassRule { matching, class, even_carried });
            }
        }
        let Some(options) = options.filter(|_| errors.is_empty()) else { return Err(errors) };
        let Scope { listener, node, realm, sockets, pool, .. } = scope;
        // What is wrong with a match is wrong with it wherever it stands: rules are checked as if
        // they were routes.
        let as_routes = rules.iter().map(|rule| (rule.matching.clone(), PoolId(u32::MAX)));
        let mut scope = Scope {
            listener,
            node,
            realm,
            sockets,
            routes: as_routes.collect(),
            pool,
            classify: Vec::new(),
        };
        let of_rules = P::check(&scope, &options).into_iter().filter_map(|error| {
            let path = format!("classify[{}", error.path.strip_prefix("routes[")?);
            Some(OptionsError { path, ..error })
        });
        errors.extend(of_rules);
        (scope.routes, scope.classify) = (routes, rules);
        let wrong = P::check(&scope, &options).into_iter().map(|error| {
            let of_options = !error.path.is_empty() && !error.path.starts_with("routes[");
            OptionsError {
                path: if of_options { format!("options.{}", error.path) } else { error.path },
                ..error
            }
        });
        errors.extend(wrong);
        if !errors.is_empty() {
            return Err(errors);
        }
        let matches = scope.routes.iter().map(|(matching, _)| json(matching)).collect();
        let class_matches = scope.classify.iter().map(|rule| json(&rule.matching)).collect();
        let told = json(&options);
        let setup = Arc::new(Setup::<P> { scope, options });
        Ok(Configured { setup, options: told, matches, class_matches })
    }

    fn schemas(&self, generator: &mut schemars::SchemaGenerator) -> (Value, Value) {
        let options = generator.subschema_for::<P::Options>();
        let matching = generator.subschema_for::<P::Match>();
        (json(&options), json(&matching))
    }

    fn probe(&self, name: &str) -> Option<Box<dyn Probe>> {
        P::probe(name)
    }

    fn trace_keys(&self) -> &'static [&'static str] {
        P::TRACE_KEYS
    }

    fn tracer(&self, kind: &str, value: &str) -> Result<Box<dyn Tracer>, String> {
        P::tracer(kind, value)
    }

    fn trace_protocol(&self) -> TraceProtocol {
        TraceProtocol { name: P::NAME, conversation: P::conversation, describe: P::describe }
    }
}

fn json(value: &impl serde::Serialize) -> Value {
    // Options are maps of plain values; they always have a JSON form.
    serde_json::to_value(value).unwrap_or(Value::Null)
}

/// The keys that a type's schema knows.
pub(super) fn known_keys<T: schemars::JsonSchema>() -> Vec<String> {
    let schema = schemars::schema_for!(T).to_value();
    let properties = schema.get("properties").and_then(Value::as_object);
    properties.map(|properties| properties.keys().cloned().collect()).unwrap_or_default()
}

/// Reads a map key by key, so that each wrong one is named.
pub(super) fn read<T: DeserializeOwned>(
    value: &Value,
    path: &str,
    known: &[String],
    errors: &mut Vec<OptionsError>,
) -> Option<T> {
    let empty = Map::new();
    let map = match value {
        Value::Object(map) => map,
        Value::Null => &empty,
        _ => {
            errors
                .push(OptionsError { path: path.to_owned(), message: "expected a map".to_owned() });
            return None;
        }
    };
    let before = errors.len();
    for (key, value) in map {
        let path = join(path, key);
        if !known.contains(key) {
            let message = unknown("key", key, known.iter().map(String::as_str));
            errors.push(OptionsError { path, message });
            continue;
        }
        let alone = Map::from_iter([(key.clone(), value.clone())]);
        if let Err(error) = serde_json::from_value::<T>(Value::Object(alone)) {
            let message = error.to_string();
            if !message.starts_with("missing field") {
                errors.push(OptionsError { path, message: plain(&message) });
            }
        }
    }
    if errors.len() > before {
        return None;
    }
    match serde_json::from_value(Value::Object(map.clone())) {
        Ok(read) => Some(read),
        Err(error) => {
            let message = plain(&error.to_string());
            errors.push(OptionsError { path: path.to_owned(), message });
            None
        }
    }
}

/// A message of serde, in the words that all other errors have.
fn plain(message: &str) -> String {
    for (prefix, what) in [("unknown variant `", "value"), ("unknown field `", "key")] {
        if let Some((found, expected)) =
            message.strip_prefix(prefix).and_then(|rest| rest.split_once("`, expected "))
        {
            return unknown(what, found, expected.split('`').skip(1).step_by(2));
        }
    }
    let wrong = ["invalid type: ", "invalid value: "];
    let parts = wrong.iter().find_map(|prefix| message.strip_prefix(prefix));
    if let Some((found, expected)) = parts.and_then(|rest| rest.split_once(", expected ")) {
        return format!("expected {}, found {}", in_words(expected), in_words(found));
    }
    if message.starts_with("data did not match any variant") {
        return "is of a type that does not fit here".to_owned();
    }
    message.to_owned()
}

/// Types of serde and of Rust, as people call them.
fn in_words(what: &str) -> String {
    let word = match what {
        "a boolean" => "true or false",
        "a sequence" => "a list",
        "sequence" => "a list",
        "map" => "a map",
        "null" => "nothing",
        "a string" | "a borrowed string" => "text",
        "u8" => "a whole number from 0 to 255",
        "u16" => "a whole number from 0 to 65535",
        "u32" => "a whole number from 0 to 4294967295",
        "u64" | "usize" => "a whole number",
        _ if what.starts_with("struct ") => "a map",
        _ => {
            let kinds = ["string ", "integer ", "floating point ", "boolean "];
            let value = kinds.iter().find_map(|kind| what.strip_prefix(kind));
            return value.unwrap_or(what).replace('"', "`");
        }
    };
    word.to_owned()
}
