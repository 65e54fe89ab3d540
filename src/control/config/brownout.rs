//! `brownout`: when the node gives things up because it is short of itself.

use super::pools::set;
use super::read::Reader;
use super::tree::Node;
use crate::routing::BrownoutSpec;

/// Reads `brownout`.
pub(super) fn brownout(reader: &mut Reader, node: &Node, spec: &mut BrownoutSpec) {
    const KEYS: [&str; 5] = ["enabled", "loop_lag", "memory", "descriptors", "hysteresis"];
    let Some(fields) = reader.fields(node, "brownout", &KEYS) else { return };
    let switch = [("true", true), ("false", false)];
    set(&mut spec.enabled, fields.choice(reader, "enabled", &switch));
    for (key, place) in [("memory", &mut spec.memory), ("descriptors", &mut spec.descriptors)] {
        set(place, fields.number(reader, key, 1, 100).map(|percent| percent as u8));
    }
    set(&mut spec.loop_lag, fields.duration(reader, "loop_lag"));
    if spec.loop_lag.as_millis() < 10 {
        let message = "must be at least 10ms: a timer alone comes late by one or two";
        reader.wrong(fields.node_of("loop_lag"), "brownout.loop_lag", message);
    }
    set(&mut spec.hysteresis, fields.duration(reader, "hysteresis"));
}
