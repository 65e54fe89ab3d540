//! What a provider hears, brought into the registry.

use std::sync::Arc;

use strowger_contract::Level;

use super::message::{Action, Rejected};
use crate::control::registry::{Registry, RegistryError};
use crate::observe::{Event, Events, Metrics};

/// The registry, as one provider has it.
#[derive(Clone)]
pub struct Feed {
    source: String,
    registry: Arc<Registry>,
    metrics: Arc<Metrics>,
    events: Arc<Events>,
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
        Self { source: source.to_owned(), registry, metrics, events }
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
        match actions {
            Ok(actions) => actions.into_iter().for_each(|action| self.apply(action)),
            Err((word, why)) => self.reject(word, &why),
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

    fn apply(&self, action: Action) {
        match action {
            Action::Put { pool, id, mut registration } => {
                // Without an instance id the address is the name; another app there is another
                // generation, and nothing meant for the one before reaches it.
                if let Some(known) = self.registry.view(&pool, &id) {
                    let known = known.registration;
                    let same = known.release == registration.release;
                    registration.generation = known.generation + u64::from(!same);
                }
                let put = self.registry.put(&pool, &id, registration, &self.source, true);
                if let Err(error) = put {
                    let detail = format!("{}: {pool}/{id}: {error}", self.source);
                    let level = match error {
                        RegistryError::NoPool => Level::Debug,
                        _ => Level::Warn,
                    };
                    self.events.emit(Event::node(level, "registration_refused", detail));
                }
            }
            Action::Remove { pool, address, id } => {
                let holder = self.registry.holder(&self.source, &pool, &address);
                match holder {
                    Some(holder) if id.as_ref().is_none_or(|id| *id == holder) => {
                        // Nobody else deletes what this source brought in.
                        let _gone = self.registry.delete(&pool, &holder, None);
                        self.metrics.registration(&self.source, "removed");
                    }
                    // Its place is another's by now: a late farewell.
                    Some(_) => self.metrics.registration(&self.source, "late_farewell"),
                    None => self.metrics.registration(&self.source, "unknown"),
                }
            }
        }
    }
}
