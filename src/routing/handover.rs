//! What goes to another process of the shared state: first what makes numbers mean the same there
//! ([`CoreSeed`]), then, while nothing moves, everything else, in parts.

use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use strowger_contract::handover::{self, Broken, moment};
use strowger_contract::{BackendId, FlowId, Keyer, TokenKeys};

use super::core::{Core, seconds};
use super::live::SavedLive;

/// Bytes of one part, about.
const PART_BYTES: usize = 48 << 10;

/// What a core must be made with, so that sessions, tokens and numbers mean the same in it.
#[derive(Clone, Serialize, Deserialize)]
pub struct CoreSeed {
    /// The zero of its clock.
    #[serde(with = "moment")]
    pub start: Instant,
    /// Makes session keys.
    pub keyer: [u8; 16],
    /// Sign and check tokens.
    pub token_keys: Vec<[u8; 16]>,
    /// How many workers there are.
    pub workers: u8,
    pools: Vec<String>,
    classes: Vec<String>,
    backends: Vec<(String, String, u64, BackendId)>,
    next_backend: u32,
}

impl CoreSeed {
    /// The keyer.
    #[must_use]
    pub fn keyer(&self) -> Keyer {
        Keyer::new(self.keyer)
    }

    /// The tokens' keys; `None` if there are none, which is not a core's.
    #[must_use]
    pub fn token_keys(&self) -> Option<TokenKeys> {
        (!self.token_keys.is_empty()).then(|| TokenKeys::new(self.token_keys.clone()))
    }
}

/// A part of a core's state.
#[derive(Serialize, Deserialize)]
enum Part {
    /// Backends' live state, and how often they lost their sessions.
    Lives(Vec<(BackendId, SavedLive, u8)>),
    Sessions(Vec<u8>),
    Bindings(Vec<u8>),
    Flows(Vec<(u64, FlowId)>),
}

impl Core {
    /// What another process makes its core with.
    #[must_use]
    pub fn seed_of(&self) -> CoreSeed {
        let changes = self.changes();
        let backends = changes.known.iter().map(|((pool, id, generation), known)| {
            (pool.clone(), id.clone(), *generation, known.id)
        });
        CoreSeed {
            start: self.start,
            keyer: self.settings.keyer.to_bytes(),
            token_keys: self.tokens().to_bytes(),
            workers: self.settings.workers,
            pools: self.names.all(),
            classes: self.names.classes(),
            backends: backends.collect(),
            next_backend: changes.next_backend,
        }
    }

    /// Gives pools, classes and backends the numbers that they have in another process. Before anything is
    /// applied.
    pub fn plant(&self, seed: &CoreSeed) {
        for name in &seed.pools {
            self.names.id(name);
        }
        self.names.plant_classes(seed.classes.iter().map(String::as_str));
        let mut changes = self.changes();
        changes.next_backend = seed.next_backend;
        let number = |(pool, id, generation, backend): &(String, String, u64, BackendId)| {
            ((pool.clone(), id.clone(), *generation), *backend)
        };
        changes.planted = seed.backends.iter().map(number).collect();
    }

    /// Gives all of the state out, in parts; nothing may move meanwhile.
    ///
    /// # Errors
    /// That of `give`, at which it stops.
    pub fn save<E>(
        &self,
        now: Instant,
        give: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let second = seconds(self.clock(now));
        let lives: Vec<_> = {
            let changes = self.changes();
            let known = changes.known.values();
            known
                .map(|known| {
                    (known.id, known.live.saved(), self.table.holders().restarts(known.id))
                })
                .collect()
        };
        for lives in lives.chunks(PART_BYTES / 64) {
            give(&handover::write(&Part::Lives(lives.to_vec())))?;
        }
        self.table.save(second, PART_BYTES, &mut |bytes| {
            give(&handover::write(&Part::Sessions(bytes.to_vec())))
        })?;
        if let Some(bindings) = self.bindings() {
            bindings.save(second, PART_BYTES, &mut |bytes| {
                give(&handover::write(&Part::Bindings(bytes.to_vec())))
            })?;
        }
        for flows in self.flows.all().chunks(PART_BYTES / 24) {
            give(&handover::write(&Part::Flows(flows.to_vec())))?;
        }
        Ok(())
    }

    /// Takes a part in that [`Core::save`] gave, after the configuration was applied.
    ///
    /// # Errors
    /// It is something else.
    pub fn take_over(&self, now: Instant, part: &[u8]) -> Result<(), Broken> {
        let second = seconds(self.clock(now));
        match handover::read(part)? {
            Part::Lives(lives) => {
                for (backend, saved, restarts) in lives {
                    self.table.holders().set_restarts(backend, restarts);
                    if let Some(live) = self.live(backend) {
                        live.take_over(&saved);
                    }
                }
            }
            Part::Sessions(bytes) => self.table.take_over(second, &bytes).ok_or(Broken)?,
            Part::Bindings(bytes) => {
                if let Some(bindings) = self.bindings() {
                    bindings.take_over(second, &bytes).ok_or(Broken)?;
                }
            }
            Part::Flows(flows) => {
                for (name, flow) in flows {
                    self.flows.insert(name, flow);
                }
            }
        }
        Ok(())
    }

    /// The core's settings for another process's seed; `None` if it makes no core.
    #[must_use]
    pub fn planted(settings: super::CoreSettings, seed: &CoreSeed) -> Option<Arc<Self>> {
        let settings = super::CoreSettings {
            token_keys: seed.token_keys()?,
            keyer: seed.keyer(),
            workers: seed.workers,
            ..settings
        };
        // `new` sets its zero a little earlier.
        let core = Self::starting(settings, seed.start);
        core.plant(seed);
        Some(core)
    }
}
