//! Edits of one message at a buffer's end, by path.

use crate::avp::{AVP_MANDATORY, AVP_VENDOR, AVPS_MAX, HEADER_BYTES, number24, number32};
use crate::frame::MESSAGE_BYTES_MAX;

/// Groups within groups that a path may go through.
pub const DEPTH_MAX: usize = 8;

/// One step of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The AVP's code.
    pub code: u32,
    /// Its vendor, 0 for none.
    pub vendor: u32,
    /// Whether M is set when we make one.
    pub mandatory: bool,
}

/// An AVP's place in the buffer.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Of its header.
    at: usize,
    /// Of its data.
    data: usize,
    /// Where its data ends, and where it does with its padding.
    end: usize,
    padded: usize,
}

/// An AVP and the groups around it, outermost first.
#[derive(Clone, Copy, Debug)]
struct Found {
    place: Place,
    groups: [usize; DEPTH_MAX],
    depth: usize,
}

/// The message that starts at `start` and goes to the buffer's end.
#[derive(Debug)]
pub struct Editor<'a> {
    out: &'a mut Vec<u8>,
    start: usize,
    /// Whether some edit was left out because the message would have been too long.
    pub too_long: bool,
}

fn step_at(out: &[u8], at: usize, end: usize) -> Option<(u32, u32, Place)> {
    let header = out.get(at..end)?;
    let (code, flags, length) = (number32(header, 0)?, *header.get(4)?, number24(header, 5)?);
    let (vendor, data) = if flags & AVP_VENDOR != 0 { (number32(header, 8)?, 12) } else { (0, 8) };
    let length = length as usize;
    let padded = length.next_multiple_of(4);
    if length < data || padded > header.len() {
        return None;
    }
    Some((code, vendor, Place { at, data: at + data, end: at + length, padded: at + padded }))
}

/// The first AVP at `path` between two places, at or after `from`.
fn find(out: &[u8], mut at: usize, end: usize, path: &[Step], found: &mut Found) -> bool {
    let Some((step, rest)) = path.split_first() else { return false };
    for _ in 0..AVPS_MAX {
        let Some((code, vendor, place)) = step_at(out, at, end) else { return false };
        at = place.padded;
        if code != step.code || vendor != step.vendor {
            continue;
        }
        if rest.is_empty() {
            found.place = place;
            return true;
        }
        let Some(slot) = found.groups.get_mut(found.depth) else { return false };
        *slot = place.at;
        found.depth += 1;
        if find(out, place.data, place.end, rest, found) {
            return true;
        }
        found.depth -= 1;
    }
    false
}

fn any_at(
    out: &[u8],
    (mut at, end): (usize, usize),
    path: &[Step],
    wanted: &mut impl FnMut(&[u8]) -> bool,
) -> bool {
    let Some((step, rest)) = path.split_first() else { return false };
    for _ in 0..AVPS_MAX {
        let Some((code, vendor, place)) = step_at(out, at, end) else { return false };
        at = place.padded;
        let is_it = code == step.code
            && vendor == step.vendor
            && if rest.is_empty() {
                out.get(place.data..place.end).is_some_and(&mut *wanted)
            } else {
                any_at(out, (place.data, place.end), rest, wanted)
            };
        if is_it {
            return true;
        }
    }
    false
}

impl<'a> Editor<'a> {
    /// Edits the message from `start` to the buffer's end.
    pub fn new(out: &'a mut Vec<u8>, start: usize) -> Self {
        Self { out, start, too_long: false }
    }

    fn find(&self, path: &[Step]) -> Option<Found> {
        let place = Place { at: 0, data: 0, end: 0, padded: 0 };
        let mut found = Found { place, groups: [0; DEPTH_MAX], depth: 0 };
        find(self.out, self.start + HEADER_BYTES, self.out.len(), path, &mut found).then_some(found)
    }

    /// The data of the first AVP at a path.
    #[must_use]
    pub fn get(&self, path: &[Step]) -> Option<&[u8]> {
        let found = self.find(path)?;
        self.out.get(found.place.data..found.place.end)
    }

    /// Whether `wanted` holds for the data of some AVP at a path.
    pub fn any(&self, path: &[Step], mut wanted: impl FnMut(&[u8]) -> bool) -> bool {
        any_at(self.out, (self.start + HEADER_BYTES, self.out.len()), path, &mut wanted)
    }

    /// Replaces `out[from..to]`, and patches the lengths of the groups around it and the message's.
    fn splice(&mut self, from: usize, to: usize, new: &[&[u8]], groups: &[usize]) -> bool {
        let added: usize = new.iter().map(|part| part.len()).sum();
        let (old_length, removed) = (self.out.len() - self.start, to - from);
        let length = old_length - removed + added;
        if length > MESSAGE_BYTES_MAX {
            self.too_long = true;
            return false;
        }
        let tail = self.out.len() - to;
        if added > removed {
            self.out.resize(self.out.len() + (added - removed), 0);
        }
        self.out.copy_within(to..to + tail, from + added);
        self.out.truncate(from + added + tail);
        let mut at = from;
        for part in new {
            self.out[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        for group in groups {
            let old = number24(self.out, group + 5).unwrap_or(0) as usize;
            write24(self.out, group + 5, old - removed + added);
        }
        write24(self.out, self.start + 1, length);
        true
    }

    /// Gives the first AVP at a path this data; its flags stay. Where there is none, it is added.
    pub fn set(&mut self, path: &[Step], data: &[u8]) {
        let Some(found) = self.find(path) else { return self.add(path, data) };
        let place = found.place;
        let length = place.data - place.at + data.len();
        let padding = &[0; 3][..length.next_multiple_of(4) - length];
        let groups = &found.groups[..found.depth];
        if self.splice(place.data, place.padded, &[data, padding], groups) {
            write24(self.out, place.at + 5, length);
        }
    }

    /// Appends an AVP at a path; the groups that are missing are made.
    pub fn add(&mut self, path: &[Step], data: &[u8]) {
        let Some((_, within)) = path.split_last() else { return };
        // The longest way of groups that are there.
        for there in (0..=within.len()).rev() {
            let (end, groups, depth) = if there == 0 {
                (self.out.len(), [0; DEPTH_MAX], 0)
            } else {
                let Some(mut found) = self.find(&path[..there]) else { continue };
                let Some(slot) = found.groups.get_mut(found.depth) else { return };
                *slot = found.place.at;
                (found.place.end, found.groups, found.depth + 1)
            };
            return self.append(end, &groups[..depth], &path[there..], data);
        }
    }

    fn append(&mut self, at: usize, groups: &[usize], steps: &[Step], data: &[u8]) {
        // The headers, outermost first, each with the length of what it holds.
        let mut headers = [0; DEPTH_MAX * 12];
        let (mut used, mut rest) = (0, steps.iter().map(|step| header_bytes(*step)).sum::<usize>());
        let padded = data.len().next_multiple_of(4);
        for (index, step) in steps.iter().enumerate() {
            let own = header_bytes(*step);
            let is_last = index + 1 == steps.len();
            let length = rest + if is_last { data.len() } else { padded };
            rest -= own;
            let Some(place) = headers.get_mut(used..used + own) else { return };
            let flags = if step.mandatory { AVP_MANDATORY } else { 0 };
            place[..4].copy_from_slice(&step.code.to_be_bytes());
            place[4] = flags | if step.vendor != 0 { AVP_VENDOR } else { 0 };
            place[5..8].copy_from_slice(&(length as u32).to_be_bytes()[1..]);
            if step.vendor != 0 {
                place[8..12].copy_from_slice(&step.vendor.to_be_bytes());
            }
            used += own;
        }
        let padding = &[0; 3][..padded - data.len()];
        self.splice(at, at, &[&headers[..used], data, padding], groups);
    }

    /// Takes out all AVPs at a path; how many there were. One pass, however many there are.
    pub fn remove(&mut self, path: &[Step]) -> usize {
        let end = self.out.len();
        let (removed, count) = self.remove_between(self.start + HEADER_BYTES, end, path);
        if count > 0 {
            self.out.truncate(end - removed);
            let length = self.out.len() - self.start;
            write24(self.out, self.start + 1, length);
        }
        count
    }

    /// Moves what stays between two places to the front; how many bytes are free at the end.
    fn remove_between(&mut self, start: usize, end: usize, path: &[Step]) -> (usize, usize) {
        let Some((step, rest)) = path.split_first() else { return (0, 0) };
        let (mut read, mut write, mut count) = (start, start, 0);
        while let Some((code, vendor, place)) = step_at(self.out, read, end) {
            read = place.padded;
            let is_it = code == step.code && vendor == step.vendor;
            if is_it && rest.is_empty() {
                count += 1;
                continue;
            }
            let mut kept = place.at..place.end;
            if is_it {
                let (removed, inner) = self.remove_between(place.data, place.end, rest);
                kept.end -= removed;
                count += inner;
                if inner > 0 {
                    write24(self.out, place.at + 5, kept.len());
                }
            }
            for part in [kept, place.end..place.padded] {
                let length = part.len();
                if part.start != write {
                    self.out.copy_within(part, write);
                }
                write += length;
            }
        }
        // What cannot be read stays.
        if read != write {
            self.out.copy_within(read..end, write);
        }
        (read - write, count)
    }

    /// Gives the first AVP at `to` the data of the first one at `from`, if there is one.
    pub fn copy(&mut self, from: &[Step], to: &[Step], scratch: &mut Vec<u8>) {
        scratch.clear();
        let Some(data) = self.get(from) else { return };
        scratch.extend_from_slice(data);
        self.set(to, scratch);
    }

    /// Gives each AVP at this top-level step the data that `change` makes of its own.
    pub fn change_each(
        &mut self,
        step: Step,
        scratch: &mut Vec<u8>,
        mut change: impl FnMut(&[u8], &mut Vec<u8>) -> bool,
    ) {
        let mut at = self.start + HEADER_BYTES;
        for _ in 0..AVPS_MAX {
            let Some((code, vendor, place)) = step_at(self.out, at, self.out.len()) else { return };
            at = place.padded;
            if code != step.code || vendor != step.vendor {
                continue;
            }
            scratch.clear();
            let Some(old) = self.out.get(place.data..place.end) else { return };
            if !change(old, scratch) {
                continue;
            }
            let length = place.data - place.at + scratch.len();
            let padding = &[0; 3][..length.next_multiple_of(4) - length];
            if self.splice(place.data, place.padded, &[scratch, padding], &[]) {
                write24(self.out, place.at + 5, length);
                at = place.at + length.next_multiple_of(4);
            }
        }
    }
}

fn header_bytes(step: Step) -> usize {
    if step.vendor != 0 { 12 } else { 8 }
}

fn write24(out: &mut [u8], at: usize, number: usize) {
    if let Some(place) = out.get_mut(at..at + 3) {
        place.copy_from_slice(&(number as u32).to_be_bytes()[1..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::avp::{Avps, Summary};
    use crate::build::{Builder, append};
    use proptest::prelude::*;

    const fn step(code: u32, vendor: u32) -> Step {
        Step { code, vendor, mandatory: true }
    }

    const SUBSCRIPTION: [Step; 2] = [step(443, 0), step(444, 0)];

    fn subscription(kind: u32, data: &[u8]) -> Vec<u8> {
        let mut group = Vec::new();
        append(&mut group, 450, 0x40, &kind.to_be_bytes());
        append(&mut group, 444, 0x40, data);
        group
    }

    fn message() -> Vec<u8> {
        let mut out = vec![0xee; 5];
        Builder::request(&mut out, 272, 4, 1, 2)
            .text(263, "a;1;2")
            .avp(0xdead, 0x15, b"odd")
            .bytes(443, &subscription(0, b"4915"))
            .bytes(443, &subscription(1, b"00101"))
            .text(296, "old.example")
            .finish();
        out
    }

    /// All of it can be walked, and the lengths are what they are.
    fn is_whole(message: &[u8]) {
        assert_eq!(number24(message, 1), Some(message.len() as u32));
        assert_eq!(message.len() % 4, 0);
        let mut total = HEADER_BYTES;
        for avp in Avps::of(message) {
            let avp = avp.expect("whole");
            total += avp.whole.len();
            if avp.code == 443 || avp.code == 873 {
                assert!(Avps::within(avp.data).all(|inner| inner.is_ok()));
            }
        }
        assert_eq!(total, message.len());
    }

    fn edited(edit: impl FnOnce(&mut Editor<'_>)) -> Vec<u8> {
        let mut out = message();
        edit(&mut Editor::new(&mut out, 5));
        assert_eq!(out[..5], [0xee; 5], "what is before it stays");
        is_whole(&out[5..]);
        out[5..].to_vec()
    }

    #[test]
    fn a_member_is_set_and_its_group_grows() {
        let longer = edited(|editor| editor.set(&SUBSCRIPTION, b"491700000000"));
        let group = Avps::of(&longer).flatten().find(|avp| avp.is(443)).expect("there");
        let inner = Avps::within(group.data).flatten().last().expect("there");
        assert_eq!(inner.data, b"491700000000");
        assert_eq!(longer.len(), message().len() - 5 + 8);
        // Only the first; and what no rule names is as it was.
        assert!(longer.windows(5).any(|part| part == b"00101"));
        let odd = |message: &[u8]| {
            Avps::of(message).flatten().find(|avp| avp.code == 0xdead).map(|avp| avp.whole.to_vec())
        };
        assert_eq!(odd(&longer), odd(&message()[5..]));
        let shorter = edited(|editor| editor.set(&SUBSCRIPTION, b""));
        assert_eq!(shorter.len(), message().len() - 5 - 4);
    }

    #[test]
    fn what_is_missing_is_made_with_its_groups() {
        let path = [step(873, 10_415), step(874, 10_415), step(30, 0)];
        let made = edited(|editor| {
            editor.set(&path, b"internet");
            editor.add(&path, b"ims");
        });
        let outer: Vec<_> = Avps::of(&made).flatten().filter(|avp| avp.code == 873).collect();
        assert_eq!(outer.len(), 1);
        let inner: Vec<_> = Avps::within(outer[0].data).flatten().collect();
        let names: Vec<_> = Avps::within(inner[0].data).flatten().map(|avp| avp.data).collect();
        assert_eq!(names, [b"internet".as_slice(), b"ims"]);
    }

    #[test]
    fn all_at_a_path_are_taken_out() {
        let mut count = 0;
        let without = edited(|editor| count = editor.remove(&SUBSCRIPTION));
        assert_eq!(count, 2);
        assert_eq!(Avps::of(&without).flatten().filter(|avp| avp.is(443)).count(), 2);
        let without = edited(|editor| count = editor.remove(&SUBSCRIPTION[..1]));
        assert_eq!((count, Avps::of(&without).flatten().filter(|avp| avp.is(443)).count()), (2, 0));
    }

    #[test]
    fn data_is_copied() {
        let mut scratch = Vec::new();
        let copied = edited(|editor| editor.copy(&SUBSCRIPTION, &[step(296, 0)], &mut scratch));
        assert_eq!(Summary::of(&copied).origin_realm, Some(b"4915".as_slice()));
        let nothing = edited(|editor| editor.copy(&[step(9, 9)], &[step(296, 0)], &mut scratch));
        assert_eq!(nothing, message()[5..]);
    }

    #[test]
    fn what_would_be_too_long_is_left_out() {
        let mut out = message();
        let mut editor = Editor::new(&mut out, 5);
        editor.add(&[step(263, 0)], &vec![0; MESSAGE_BYTES_MAX]);
        assert!(editor.too_long);
        assert_eq!(out, message());
    }

    proptest! {
        /// Whatever is edited: whole messages stay whole, and broken ones do not panic.
        #[test]
        fn edits_keep_messages_whole(
            edits in prop::collection::vec((0u8..4, 0usize..4, prop::collection::vec(any::<u8>(), 0..40)), 0..12),
            noise in prop::collection::vec((20usize..140, any::<u8>()), 0..4),
        ) {
            let paths: [&[Step]; 4] = [&SUBSCRIPTION, &SUBSCRIPTION[..1], &[step(296, 0)], &[step(873, 10_415), step(8, 0)]];
            let mut out = message();
            for (at, byte) in &noise {
                let place = 5 + at % (out.len() - 5);
                out[place] = *byte;
            }
            let mut scratch = Vec::new();
            let mut editor = Editor::new(&mut out, 5);
            for (kind, path, data) in &edits {
                // A group's data is whole AVPs; a rule cannot say otherwise.
                let path = if *path == 1 && *kind < 2 { paths[0] } else { paths[*path] };
                match kind {
                    0 => editor.set(path, data),
                    1 => editor.add(path, data),
                    2 => { editor.remove(path); }
                    _ => editor.copy(path, paths[2], &mut scratch),
                }
            }
            if noise.is_empty() {
                is_whole(&out[5..]);
            }
        }
    }
}
