//! What a provider hears, brought into the registry.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use strowger_contract::Level;

use super::message::{Action, Rejected};
use crate::control::registry::{Registry, RegistryError};
use crate::observe::{Event, Events, Metrics};

/// Addresses whose last change is remembered, at most: as many as a pool may have leases, twice. When it
/// is full all are forgotten, and a message that was overtaken may count once more.
const CHANGES_MAX: usize = 40_000;

/// When what was last said of an address was so: (pool, address) and nanoseconds of the source's clock.
type Changes = HashMap<(String, String), i64>;

/// The registry, as one provider has it.
#[derive(Clone)]
pub struct Feed {
    source: String,
    registry: Arc<Registry>,
    metrics: Arc<Metrics>,
    events: Arc<Events>,
    changes: Arc<Mutex<Changes>>,
}

impl Feed {
    /// For a provider of that name.
    #[must_use]
    pub fn new(
        source: &str,
        registry: Arc<Registry>,
        metrics: Arc<Metrics>,
        events: Arc<Events>,
    ) -> Self {
        Self { source: source.to_owned(), registry, metrics, events, changes: Arc::default() }
    }

    /// The registry.
    #[must_use]
    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// Its name.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether it hears its source, or what is wrong.
    pub fn state(&self, state: Result<(), String>) {
        self.registry.provider(&self.source, state);
    }

    /// Takes what was heard.
    pub fn take(&self, actions: Result<Vec<Action>, Rejected>) {
        self.take_changed_at(0, actions);
    }

    /// The same, from a source that says when it was so; 0: it does not. What is older than what is
    /// known of an address was overtaken on its way, and counts no more: neither does an instance come
    /// back that has left, nor does one end who came after it.
    pub fn take_changed_at(&self, changed: i64, actions: Result<Vec<Action>, Rejected>) {
        let actions = match actions {
            Ok(actions) => actions,
            Err((word, why)) => return self.reject(word, &why),
        };
        for action in actions {
            let key = place_of(&action).filter(|_| changed > 0);
            if key.as_ref().is_some_and(|key| self.is_overtaken(changed, key)) {
                self.metrics.registration(&self.source, "out_of_order");
                continue;
            }
            // What had no effect (somebody else's late farewell) says nothing of who is there.
            if self.apply(action)
                && let Some(key) = key
            {
                self.note_change(changed, key);
            }
        }
    }

    /// Something could not be taken.
    pub fn reject(&self, word: &'static str, why: &str) {
        self.metrics.registration(&self.source, word);
        // What is meant for other routers is no event.
        if !matches!(word, "unmapped" | "other_segment") {
            let detail = format!("{}: {word}: {why}", self.source);
            self.events.emit(Event::node(Level::Warn, "registration_refused", detail));
        }
    }

    fn is_overtaken(&self, changed: i64, key: &(String, String)) -> bool {
        let changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        changes.get(key).is_some_and(|known| *known > changed)
    }

    fn note_change(&self, changed: i64, key: (String, String)) {
        let mut changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        if changes.len() >= CHANGES_MAX && !changes.contains_key(&key) {
            changes.clear();
        }
        changes.insert(key, changed);
    }

    /// Whether it had an effect.
    fn apply(&self, action: Action) -> bool {
        match action {
            Action::Put { pool, id, mut registration } => {
                // Without an instance id the address is the name; another app there is another
                // generation, and nothing meant for the one before reaches it.
                if let Some(known) = self.registry.view(&pool, &id) {
                    let known = known.registration;
                    let same = known.release == registration.release;
                    registration.generation = known.generation.saturating_add(u64::from(!same));
                }
                let put = self.registry.put(&pool, &id, registration, &self.source, true);
                let done = put.is_ok();
                if let Err(error) = put {
                    let detail = format!("{}: {pool}/{id}: {error}", self.source);
                    let level = match error {
                        RegistryError::NoPool => Level::Debug,
                        _ => Level::Warn,
                    };
                    self.events.emit(Event::node(level, "registration_refused", detail));
                }
                done
            }
            Action::Remove { pool, address, id } => {
                let holder = self.registry.holder(&self.source, &pool, &address);
                match holder {
                    Some(holder) if id.as_ref().is_none_or(|id| *id == holder) => {
                        // Nobody else deletes what this source brought in.
                        let _gone = self.registry.delete(&pool, &holder, None);
                        self.metrics.registration(&self.source, "removed");
                        true
                    }
                    // Its place is another's by now: a late farewell.
                    Some(_) => {
                        self.metrics.registration(&self.source, "late_farewell");
                        false
                    }
                    // It may have overtaken what it ends.
                    None => {
                        self.metrics.registration(&self.source, "unknown");
                        true
                    }
                }
            }
        }
    }
}

/// The pool and address that an action is about.
fn place_of(action: &Action) -> Option<(String, String)> {
    match action {
        Action::Put { pool, registration, .. } => {
            Some((pool.clone(), registration.endpoints.first()?.address.clone()))
        }
        Action::Remove { pool, address, .. } => Some((pool.clone(), address.clone())),
    }
}
