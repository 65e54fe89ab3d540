//! The state machine of leases. Pure: time is an argument, in milliseconds of any steady clock.
//!
//! # Rules
//! - An instance is (pool, id, generation). A lower generation than the known one is stale.
//! - An address belongs to one instance. While its holder has been heard of within a heartbeat's
//!   time, or another source owns it, a newcomer is told that it is in use; after that the newcomer
//!   supersedes the holder, whose sessions die with it. A registrar that vouches for the address
//!   (it just started the process there) supersedes at once.
//! - A lease that is not renewed in time is *lapsed*: the instance is suspended (it keeps its
//!   sessions, it gets no new ones). After [`GRACE_LEASES`] more lease times it is gone.
//! - If more than half of a pool's leases lapse within one lease time, that is the control plane's
//!   fault and not theirs: they are *held* in their last state. Only what the edge itself finds ill
//!   lapses then. The first renewal of a held lease gives all held ones a fresh term.
//! - While a provider does not hear its source, what it brought in does not lapse, unless the edge
//!   itself finds it ill; when it hears again, all of it gets a fresh term first.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::types::{Heartbeat, LeaseState, Registration};

/// After so many lease times a lapsed instance is gone (a SIP transaction lives 32 s: the default
/// lease of 15 s leaves it time to end).
pub const GRACE_LEASES: u64 = 2;

/// Heartbeats in a lease's time: two may be lost.
pub const HEARTBEATS: u64 = 3;

/// Leases in one pool, at most.
pub(super) const LEASES_MAX: usize = 20_000;

/// Milliseconds of a steady clock.
pub(super) type Millis = u64;

/// Who brought an instance in: `api`, or a provider's name.
pub(super) type SourceName = String;

/// A leased instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// What was registered.
    pub registration: Registration,
    /// Who brought it in.
    pub source: SourceName,
    /// What it last said of its load.
    pub load: Option<u32>,
    /// Whether its sessions are being waited out, by order; a heartbeat does not undo that.
    pub draining: bool,
    /// Until when at most, in milliseconds since 1970: it outlives a restart.
    #[serde(default)]
    pub drain_until: Option<u64>,
    /// When its term began.
    pub(super) renewed: Millis,
    /// When it was last heard of: a term that most got anew is no sign of life.
    pub(super) heard: Millis,
    pub(super) standing: Standing,
}

/// How a lease stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Standing {
    Live,
    /// It ran out together with most others.
    Held(Millis),
    /// It ran out.
    Lapsed(Millis),
}

impl Lease {
    /// The state it is routed by.
    #[must_use]
    pub fn state(&self) -> LeaseState {
        match self.standing {
            Standing::Lapsed(_) => LeaseState::Suspended,
            _ if self.draining => LeaseState::Draining,
            _ => self.registration.state,
        }
    }

    /// Whether it ran out with most others and its last state stays.
    #[must_use]
    pub fn is_held(&self) -> bool {
        matches!(self.standing, Standing::Held(_))
    }

    /// Whether it ran out.
    #[must_use]
    pub fn is_lapsed(&self) -> bool {
        matches!(self.standing, Standing::Lapsed(_))
    }

    fn ttl(&self) -> Millis {
        self.registration.lease_ttl_ms
    }

    fn is_over(&self, now: Millis) -> bool {
        now >= self.renewed.saturating_add(self.ttl())
    }
}

/// What a registration did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// It is new, or of a new generation.
    Created,
    /// It was known; its values are replaced and its term is fresh.
    Updated,
}

/// Why a registration or a renewal was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Another instance has the address, and is alive.
    #[error("{address} is in use by {}/{}", holder.0, holder.1)]
    AddressInUse {
        /// The address.
        address: String,
        /// Its holder.
        holder: (String, String),
        /// When it is worth to ask again.
        retry_ms: Millis,
    },
    /// A newer generation is known.
    #[error("generation {known} is known")]
    Stale {
        /// The known one.
        known: u64,
    },
    /// Nobody of that name is known.
    #[error("it is not known")]
    Unknown,
    /// The source that holds it is another.
    #[error("{0} holds it")]
    OtherSource(SourceName),
    /// A living instance of that id is on another host.
    #[error("an instance of that id is alive on host {0}")]
    OtherHost(String),
    /// The pool is full.
    #[error("the pool is full")]
    Full,
}

/// Something that changed, for events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The pool.
    pub pool: String,
    /// The instance; empty for the pool as a whole.
    pub id: String,
    /// Its generation.
    pub generation: u64,
    /// What.
    pub what: What,
}

/// What changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// It is new.
    Registered,
    /// Its values changed.
    Changed,
    /// Its lease ran out.
    Lapsed,
    /// It was heard of again.
    Resumed,
    /// It left by its own word.
    Left,
    /// Its grace is over.
    Gone,
    /// Another instance took its address.
    Superseded,
    /// Another generation took its place.
    Replaced,
    /// Its sessions are waited out.
    Draining,
    /// Most leases of the pool ran out at once: the last state stays.
    Held,
    /// Leases of the pool are renewed again.
    Released,
}

impl What {
    /// Stable word for events and metrics.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Registered => "instance_registered",
            Self::Changed => "instance_changed",
            Self::Lapsed => "lease_lapsed",
            Self::Resumed => "lease_resumed",
            Self::Left => "instance_left",
            Self::Gone => "instance_gone",
            Self::Superseded => "instance_superseded",
            Self::Replaced => "instance_replaced",
            Self::Draining => "instance_draining",
            Self::Held => "leases_held",
            Self::Released => "leases_released",
        }
    }
}

/// All leases of the edge.
#[derive(Clone, Debug, Default)]
pub struct Model {
    pools: BTreeMap<String, BTreeMap<String, Lease>>,
    /// Sources that are not heard: what they brought in does not lapse.
    lost: BTreeSet<SourceName>,
    changes: Vec<Change>,
}

impl Model {
    /// Takes leases over from a file: each gets a fresh term, since nobody could renew meanwhile.
    pub fn restore(&mut self, now: Millis, leases: Vec<(String, String, Lease)>) {
        for (pool, id, mut lease) in leases {
            lease.renewed = now;
            lease.heard = now;
            lease.standing = Standing::Live;
            self.pools.entry(pool).or_default().insert(id, lease);
        }
    }

    /// All leases, by pool and id.
    pub fn leases(&self) -> impl Iterator<Item = (&str, &str, &Lease)> {
        self.pools.iter().flat_map(|(pool, leases)| {
            leases.iter().map(|(id, lease)| (pool.as_str(), id.as_str(), lease))
        })
    }

    /// A pool's leases.
    pub fn pool(&self, pool: &str) -> impl Iterator<Item = (&str, &Lease)> {
        self.pools.get(pool).into_iter().flatten().map(|(id, lease)| (id.as_str(), lease))
    }

    /// One lease.
    #[must_use]
    pub fn get(&self, pool: &str, id: &str) -> Option<&Lease> {
        self.pools.get(pool)?.get(id)
    }

    /// A source is not heard any more. What it brought in stays as it is, unless the edge itself
    /// finds it ill.
    pub fn source_lost(&mut self, source: &str) {
        self.lost.insert(source.to_owned());
    }

    /// A source is heard again, and could not renew meanwhile: what it brought in gets a fresh term
    /// before anything of it can lapse.
    pub fn source_back(&mut self, now: Millis, source: &str) {
        if !self.lost.remove(source) {
            return;
        }
        let leases = self.pools.values_mut().flat_map(BTreeMap::values_mut);
        for lease in leases.filter(|lease| lease.source == source && !lease.is_lapsed()) {
            lease.renewed = now;
            lease.standing = Standing::Live;
        }
    }

    /// Whether all others that have one of the registration's addresses came from `source`.
    #[must_use]
    pub fn holders_are_of(&self, source: &str, id: &str, registration: &Registration) -> bool {
        self.leases().all(|(_, other, lease)| {
            other == id
                || lease.source == source
                || !registration.endpoints.iter().any(|endpoint| {
                    lease.registration.endpoints.iter().any(|has| has.address == endpoint.address)
                })
        })
    }

    /// An address of the registration that an instance of another pool has, where `may` does not
    /// allow to take it.
    #[must_use]
    pub fn holder_elsewhere(
        &self,
        pool: &str,
        id: &str,
        registration: &Registration,
        may: &dyn Fn(&str) -> bool,
    ) -> Option<(String, (String, String))> {
        let others = self.leases().filter(|(other_pool, other, _)| {
            *other_pool != pool && *other != id && !may(other_pool)
        });
        others.into_iter().find_map(|(other_pool, other, lease)| {
            let taken = registration.endpoints.iter().find(|endpoint| {
                lease.registration.endpoints.iter().any(|has| has.address == endpoint.address)
            })?;
            Some((taken.address.clone(), (other_pool.to_owned(), other.to_owned())))
        })
    }

    /// What changed since the last call.
    pub fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    fn tell(&mut self, pool: &str, id: &str, generation: u64, what: What) {
        let (pool, id) = (pool.to_owned(), id.to_owned());
        self.changes.push(Change { pool, id, generation, what });
    }

    /// Registers an instance, or renews and changes it. `vouched`: the registrar knows that the
    /// address is this instance's now.
    ///
    /// # Errors
    /// See [`Refused`].
    pub fn put(
        &mut self,
        now: Millis,
        pool: &str,
        id: &str,
        registration: Registration,
        source: &str,
        vouched: bool,
    ) -> Result<Put, Refused> {
        let known = self.get(pool, id);
        if let Some(known) = known {
            let generation = known.registration.generation;
            if generation > registration.generation {
                return Err(Refused::Stale { known: generation });
            }
            if known.source != source && !known.is_lapsed() {
                return Err(Refused::OtherSource(known.source.clone()));
            }
            // Two hosts that give an app the same name would take each other's place for ever.
            let (there, here) = (&known.registration.locality.host, &registration.locality.host);
            if !there.is_empty() && !here.is_empty() && there != here && !known.is_lapsed() {
                return Err(Refused::OtherHost(there.clone()));
            }
        } else if self.pools.get(pool).is_some_and(|leases| leases.len() >= LEASES_MAX) {
            return Err(Refused::Full);
        }
        let losers = self.holders(now, pool, id, &registration, vouched)?;
        for (other_pool, other) in losers {
            if let Some(lost) = self.remove(&other_pool, &other) {
                self.tell(&other_pool, &other, lost.registration.generation, What::Superseded);
            }
        }
        let generation = registration.generation;
        let leases = self.pools.entry(pool.to_owned()).or_default();
        let before = leases.get(id).cloned();
        let same = before.as_ref().is_some_and(|it| it.registration.generation == generation);
        let draining = before.as_ref().is_some_and(|it| same && it.draining);
        let drain_until = before.as_ref().filter(|_| same).and_then(|it| it.drain_until);
        let load = before.as_ref().filter(|_| same).and_then(|it| it.load);
        let lease = Lease {
            registration,
            source: source.to_owned(),
            load,
            draining,
            drain_until,
            renewed: now,
            heard: now,
            standing: Standing::Live,
        };
        let differs = before.as_ref().is_none_or(|it| it.registration != lease.registration);
        leases.insert(id.to_owned(), lease);
        match before {
            None => self.tell(pool, id, generation, What::Registered),
            Some(_) if !same => self.tell(pool, id, generation, What::Replaced),
            Some(before) => {
                self.back(now, pool, id, generation, before.standing);
                if differs {
                    self.tell(pool, id, generation, What::Changed);
                }
            }
        }
        Ok(if same { Put::Updated } else { Put::Created })
    }

    /// Those who have one of the addresses and lose it; an error if one of them is alive.
    fn holders(
        &self,
        now: Millis,
        pool: &str,
        id: &str,
        registration: &Registration,
        vouched: bool,
    ) -> Result<Vec<(String, String)>, Refused> {
        let mut losers = Vec::new();
        for (other_pool, other, lease) in self.leases() {
            // The same instance in another pool, and its own earlier generation, are no others.
            if other == id
                && (other_pool == pool || lease.registration.generation == registration.generation)
            {
                continue;
            }
            let taken = registration.endpoints.iter().find(|endpoint| {
                lease.registration.endpoints.iter().any(|has| has.address == endpoint.address)
            });
            let Some(taken) = taken else { continue };
            let fresh_until = lease.heard.saturating_add(lease.ttl() / HEARTBEATS);
            let alive = lease.standing == Standing::Live && now < fresh_until;
            if alive && !vouched {
                return Err(Refused::AddressInUse {
                    address: taken.address.clone(),
                    holder: (other_pool.to_owned(), other.to_owned()),
                    retry_ms: fresh_until - now,
                });
            }
            losers.push((other_pool.to_owned(), other.to_owned()));
        }
        Ok(losers)
    }

    fn remove(&mut self, pool: &str, id: &str) -> Option<Lease> {
        let leases = self.pools.get_mut(pool)?;
        let lease = leases.remove(id);
        if leases.is_empty() {
            self.pools.remove(pool);
        }
        lease
    }

    /// A heartbeat. `generation`, if given, must be the known one.
    ///
    /// # Errors
    /// Nobody of that name is known, or another generation is.
    pub fn renew(
        &mut self,
        now: Millis,
        pool: &str,
        id: &str,
        generation: Option<u64>,
        beat: &Heartbeat,
    ) -> Result<(), Refused> {
        let lease = self
            .pools
            .get_mut(pool)
            .and_then(|leases| leases.get_mut(id))
            .ok_or(Refused::Unknown)?;
        let known = lease.registration.generation;
        if generation.is_some_and(|generation| generation != known) {
            return Err(Refused::Stale { known });
        }
        let (before, standing) = (lease.state(), lease.standing);
        lease.renewed = now;
        lease.heard = now;
        lease.standing = Standing::Live;
        if beat.load.is_some() {
            lease.load = beat.load;
        }
        if let Some(state) = beat.state {
            lease.registration.state = state;
        }
        let after = lease.state();
        self.back(now, pool, id, known, standing);
        if before != after && !matches!(standing, Standing::Lapsed(_)) {
            self.tell(pool, id, known, What::Changed);
        }
        Ok(())
    }

    /// A lease that had run out was heard of again.
    fn back(&mut self, now: Millis, pool: &str, id: &str, generation: u64, before: Standing) {
        match before {
            Standing::Live => {}
            Standing::Lapsed(_) => self.tell(pool, id, generation, What::Resumed),
            Standing::Held(_) => {
                // The control plane is back: all that it could not renew get a fresh term.
                for lease in self.pools.get_mut(pool).into_iter().flat_map(BTreeMap::values_mut) {
                    if lease.is_held() {
                        lease.standing = Standing::Live;
                        lease.renewed = now;
                    }
                }
                self.tell(pool, "", 0, What::Released);
            }
        }
    }

    /// Its sessions are to be waited out, `until` then at most: no new ones, whatever it says itself.
    ///
    /// # Errors
    /// Nobody of that name is known.
    pub fn drain(
        &mut self,
        pool: &str,
        id: &str,
        draining: bool,
        until: Option<u64>,
    ) -> Result<(), Refused> {
        let leases = self.pools.get_mut(pool).ok_or(Refused::Unknown)?;
        let lease = leases.get_mut(id).ok_or(Refused::Unknown)?;
        let generation = lease.registration.generation;
        let until = until.filter(|_| draining);
        if lease.draining != draining || lease.drain_until != until {
            (lease.draining, lease.drain_until) = (draining, until);
            let what = if draining { What::Draining } else { What::Changed };
            self.tell(pool, id, generation, what);
        }
        Ok(())
    }

    /// It left. With a generation, only that one leaves: a late farewell of an earlier one is
    /// refused.
    ///
    /// # Errors
    /// Nobody of that name is known, or another generation is.
    pub fn delete(&mut self, pool: &str, id: &str, generation: Option<u64>) -> Result<(), Refused> {
        let known = self.get(pool, id).ok_or(Refused::Unknown)?.registration.generation;
        if generation.is_some_and(|generation| generation != known) {
            return Err(Refused::Stale { known });
        }
        self.remove(pool, id);
        self.tell(pool, id, known, What::Left);
        Ok(())
    }

    /// Time goes on. `is_ill(pool, id)`: the edge's own checks and its traffic speak against it.
    pub fn sweep(&mut self, now: Millis, is_ill: &dyn Fn(&str, &str) -> bool) {
        let pools: Vec<String> = self.pools.keys().cloned().collect();
        for pool in pools {
            self.sweep_pool(now, &pool, is_ill);
        }
    }

    fn sweep_pool(&mut self, now: Millis, pool: &str, is_ill: &dyn Fn(&str, &str) -> bool) {
        let Some(leases) = self.pools.get_mut(pool) else { return };
        let all = leases.len();
        let lost = &self.lost;
        let heard_of = |lease: &Lease| !lost.contains(&lease.source);
        let lapsed_lately = |lease: &Lease| match lease.standing {
            Standing::Lapsed(since) => now.saturating_sub(since) < lease.ttl(),
            Standing::Live => lease.is_over(now) && heard_of(lease),
            Standing::Held(_) => true,
        };
        let out = leases.values().filter(|lease| lapsed_lately(lease)).count();
        let hold = out * 2 > all;
        let mut told = Vec::new();
        let mut holds = false;
        for (id, lease) in leases.iter_mut() {
            let generation = lease.registration.generation;
            let ill = is_ill(pool, id);
            match lease.standing {
                Standing::Live if lease.is_over(now) && (ill || heard_of(lease)) => {
                    if hold && !ill {
                        lease.standing = Standing::Held(now);
                        holds = true;
                    } else {
                        lease.standing = Standing::Lapsed(now);
                        told.push((id.clone(), generation, What::Lapsed));
                    }
                }
                Standing::Held(_) if ill => {
                    lease.standing = Standing::Lapsed(now);
                    told.push((id.clone(), generation, What::Lapsed));
                }
                // It lapsed as the first of most: it was not its fault either.
                Standing::Lapsed(_) if hold && !ill && lapsed_lately(lease) => {
                    lease.standing = Standing::Held(now);
                    holds = true;
                }
                Standing::Lapsed(since) if now >= since + GRACE_LEASES * lease.ttl() => {
                    told.push((id.clone(), generation, What::Gone));
                }
                _ => {}
            }
        }
        leases
            .retain(|id, _| !told.iter().any(|(gone, _, what)| gone == id && *what == What::Gone));
        if leases.is_empty() {
            self.pools.remove(pool);
        }
        if holds {
            self.tell(pool, "", 0, What::Held);
        }
        for (id, generation, what) in told {
            self.tell(pool, &id, generation, what);
        }
    }
}
