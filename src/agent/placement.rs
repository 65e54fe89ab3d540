//! Which CPUs an instance runs on. Pure.
//!
//! `resources.cpus` decides if it is given. `colocate_with` runs on the CPUs of those it belongs to, so
//! that they share a cache; `anti_affinity` takes the CPUs that the others do not, as far as there are
//! enough.

use std::collections::{BTreeMap, BTreeSet};

use super::manifest::cpus as read_cpus;
use super::supervisor::Machine;

/// How many applications a chain of `colocate_with` may have.
const CHAIN_MAX: usize = 8;

/// The CPUs of an instance; none: any. `all`: those of the host, for `anti_affinity`.
pub(crate) fn cpus(
    apps: &BTreeMap<String, Machine>,
    app: &str,
    id: &str,
    all: &[usize],
) -> Vec<usize> {
    pinned(apps, app, id, all, CHAIN_MAX)
}

fn pinned(
    apps: &BTreeMap<String, Machine>,
    app: &str,
    id: &str,
    all: &[usize],
    depth: usize,
) -> Vec<usize> {
    let Some(machine) = apps.get(app) else { return Vec::new() };
    let Some(instance) = machine.instances.get(id) else { return Vec::new() };
    let own = machine.app_of(instance);
    if let Some(list) = own.resources.cpus.as_deref() {
        return read_cpus(list).unwrap_or_default();
    }
    if depth == 0 {
        return Vec::new();
    }
    for other in &own.placement.colocate_with {
        let place = apps.get(other).and_then(|machine| {
            let same =
                machine.instances.values().find(|it| it.index == instance.index && !it.retire);
            same.or_else(|| machine.instances.values().find(|it| !it.retire))
        });
        if let Some(place) = place {
            let found = pinned(apps, other, &place.id, all, depth - 1);
            if !found.is_empty() {
                return found;
            }
        }
    }
    if own.placement.anti_affinity.is_empty() || all.is_empty() {
        return Vec::new();
    }
    let mut free: BTreeSet<usize> = all.iter().copied().collect();
    let mut apart = 0;
    for other in own.placement.anti_affinity.iter().filter(|other| *other != app) {
        for place in apps.get(other).into_iter().flat_map(|it| it.instances.values()) {
            for cpu in pinned(apps, other, &place.id, &[], depth - 1) {
                free.remove(&cpu);
            }
        }
    }
    if own.placement.anti_affinity.iter().any(|other| other == app) {
        apart = instance.index as usize;
    }
    if free.is_empty() {
        return Vec::new();
    }
    let free: Vec<usize> = free.into_iter().collect();
    if own.placement.anti_affinity.iter().any(|other| other == app) {
        return vec![free[apart % free.len()]];
    }
    free
}
