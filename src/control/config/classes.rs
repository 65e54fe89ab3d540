//! QoS classes: overrides of the built-in ones, and further ones.

use std::time::Duration;

use strowger_contract::{Class, ClassId, OnMiss};

use super::read::{Reader, join};
use super::tree::Node;
use crate::routing::PoolNames;

/// Classes, at most: they must fit the session table's byte and the metrics' labels.
const CLASSES_MAX: usize = 64;

/// RFC 3261: nobody waits longer than 64 x T1.
const DEADLINE_MAX: Duration = Duration::from_secs(32);

/// `queue_max`, at most: what waits costs memory, and what waits behind a million is late.
const QUEUE_MAX: u64 = 1_000_000;

/// The values of `on_miss`.
pub(super) const ON_MISS: [(&str, OnMiss); 3] =
    [("answer", OnMiss::Answer), ("drop", OnMiss::Drop), ("reset", OnMiss::Reset)];

/// As configurations write it.
pub(super) fn word_of(on_miss: OnMiss) -> &'static str {
    ON_MISS.iter().find(|(_, known)| *known == on_miss).map_or("answer", |(word, _)| word)
}

/// Reads `classes`.
pub(super) fn classes(
    reader: &mut Reader,
    node: &Node,
    names: &PoolNames,
    classes: &mut Vec<Class>,
) {
    const KEYS: [&str; 6] = ["tier", "deadline", "retry", "share_min", "queue_max", "on_miss"];
    // Those that have numbers first: none of the others may get one of these.
    let mut entries: Vec<_> = reader.named(node, "classes").iter().collect();
    entries.sort_by_key(|entry| !names.has_class(&entry.key));
    for entry in entries {
        let path = join("classes", &entry.key);
        let Some(fields) = reader.fields(&entry.value, &path, &KEYS) else { continue };
        let Some(index) = place_of(reader, names, classes, &entry.key, &entry.value, &path) else {
            continue;
        };
        let class = &mut classes[index];
        if let Some(tier) = fields.number(reader, "tier", 0, 3) {
            class.tier = tier as u8;
        }
        if let Some(share) = fields.number(reader, "share_min", 0, 100) {
            class.share_min = share as u8;
        }
        if let Some(most) = fields.number(reader, "queue_max", 0, QUEUE_MAX) {
            class.queue_max = most as u32;
        }
        if let Some(deadline) = fields.duration(reader, "deadline") {
            if deadline.is_zero() || deadline > DEADLINE_MAX {
                reader.wrong(
                    fields.node_of("deadline"),
                    &fields.path_of("deadline"),
                    "must be over 0 and at most 32s, the longest that a SIP client waits",
                );
            }
            class.deadline = Some(deadline);
        }
        if let Some(on_miss) = fields.choice(reader, "on_miss", &ON_MISS) {
            class.on_miss = on_miss;
        }
        if let Some(retry) = fields.number(reader, "retry", 0, 3) {
            class.retry = retry as u8;
        }
    }
    let kept: u32 = classes.iter().map(|class| u32::from(class.share_min)).sum();
    if kept > 100 {
        let message = format!("the classes' share_min sum up to {kept}; there are 100 percent");
        reader.wrong(node, "classes", message);
    }
}

/// The class of that name, made if there is none, with the number that it had before.
fn place_of(
    reader: &mut Reader,
    names: &PoolNames,
    classes: &mut Vec<Class>,
    name: &str,
    node: &Node,
    path: &str,
) -> Option<usize> {
    match classes.iter().position(|class| !class.is_vacant() && *class.name == *name) {
        Some(index) if index == usize::from(ClassId::CONTROL.0) => {
            let message = "`control` is never queued or shed: it has nothing to change";
            reader.wrong(node, path, message);
            None
        }
        Some(index) => Some(index),
        None => {
            let Some(ClassId(number)) = names.class(name, classes, CLASSES_MAX) else {
                reader.wrong(node, path, format!("over {CLASSES_MAX} classes"));
                return None;
            };
            let index = usize::from(number);
            let template = classes.get(usize::from(ClassId::BULK.0))?.clone();
            if classes.len() <= index {
                classes.resize_with(index + 1, Class::vacant);
            }
            classes[index] = Class { name: name.into(), ..template };
            Some(index)
        }
    }
}
