//! Messages out of streams, packets and hex text.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;

use strowger_contract::{Framer, Framing};
use strowger_diameter::DiameterFramer;
use strowger_diameter::frame::is_sound;

use super::Found;
use super::capture::{Carried, Packet};

/// Segments that came too early and wait, of one direction: more means that some were not captured.
const WAITING_MAX: usize = 1_024;

/// What fits into a segment's window: what lies farther ahead is of another connection.
const AHEAD_MAX: u32 = 1 << 30;

/// Whether a message is SIP: by its first line.
pub(super) fn is_sip(message: &[u8]) -> bool {
    let line = message.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    line.starts_with(b"SIP/2.0 ")
        || line.ends_with(b" SIP/2.0") && line.first().is_some_and(u8::is_ascii_uppercase)
}

/// The Diameter messages that a stream starts with, or one SIP message.
pub(super) fn of_stream(bytes: &[u8]) -> Vec<Vec<u8>> {
    if is_sip(bytes) {
        return vec![bytes.to_vec()];
    }
    let (mut rest, mut found) = (bytes, Vec::new());
    while let Ok(Framing::Message(length)) = DiameterFramer.frame(rest) {
        let (message, others) = rest.split_at(length.get());
        if !is_sound(message) {
            break;
        }
        found.push(message.to_vec());
        rest = others;
    }
    found
}

/// Hex text: digits in pairs, with any of space, comma, colon or `0x` between them; a line may
/// start with an offset of four to eight digits, and end with the bytes as text.
pub(super) fn from_hex(text: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(text).ok()?;
    let mut bytes = Vec::new();
    for line in text.lines() {
        // What hexdump prints at the end of its lines.
        let line = line.split('|').next().unwrap_or_default();
        let mut words: Vec<&str> = line
            .split(|letter: char| letter.is_whitespace() || letter == ',' || letter == ':')
            .map(|word| word.trim_start_matches("0x"))
            .filter(|word| !word.is_empty())
            .collect();
        let pairs = words.iter().skip(1).any(|word| word.len() == 2);
        if words.first().is_some_and(|word| (4..=8).contains(&word.len())) && pairs {
            words.remove(0);
        }
        for word in words {
            if word.len() % 2 != 0 || !word.is_ascii() {
                return None;
            }
            for pair in word.as_bytes().chunks(2) {
                let pair = std::str::from_utf8(pair).ok()?;
                bytes.push(u8::from_str_radix(pair, 16).ok()?);
            }
        }
    }
    Some(bytes)
}

/// One direction of a TCP connection.
#[derive(Default)]
struct Stream<'a> {
    next: Option<u32>,
    buffer: Vec<u8>,
    waiting: BTreeMap<u32, &'a [u8]>,
}

impl<'a> Stream<'a> {
    /// Takes a segment in.
    fn take(&mut self, sequence: u32, fresh: bool, bytes: &'a [u8]) {
        if fresh {
            *self = Self { next: Some(sequence), ..Self::default() };
        }
        if !bytes.is_empty() {
            self.waiting.insert(sequence, bytes);
        }
        let mut next = *self.next.get_or_insert(sequence);
        loop {
            // The first that is not ahead of what is there.
            let due = self.waiting.iter().find(|(at, _)| next.wrapping_sub(**at) < AHEAD_MAX);
            let Some((&at, &segment)) = due else { break };
            self.waiting.remove(&at);
            let known = next.wrapping_sub(at) as usize;
            let fresh = segment.get(known..).unwrap_or_default();
            self.buffer.extend_from_slice(fresh);
            next = next.wrapping_add(fresh.len() as u32);
        }
        self.next = Some(next);
        if self.waiting.len() > WAITING_MAX {
            // Some were not captured: on with what is there, at its start of a message if it is one.
            self.buffer.clear();
            self.next = self.waiting.keys().next().copied();
        }
    }

    fn messages(&mut self) -> Vec<Vec<u8>> {
        let found = of_diameter(&self.buffer);
        if let Err(()) = found {
            // In the midst of a message, or another protocol: the next segment may be a start.
            self.buffer.clear();
            return Vec::new();
        }
        let found = found.unwrap_or_default();
        let used: usize = found.iter().map(Vec::len).sum();
        self.buffer.drain(..used);
        found
    }
}

/// Whole messages at the start of a buffer; an error if it starts with none.
fn of_diameter(buffer: &[u8]) -> Result<Vec<Vec<u8>>, ()> {
    let (mut rest, mut found) = (buffer, Vec::new());
    loop {
        match DiameterFramer.frame(rest) {
            Ok(Framing::Message(length)) if is_sound(&rest[..length.get()]) => {
                let (message, others) = rest.split_at(length.get());
                found.push(message.to_vec());
                rest = others;
            }
            // What could be answered on a live connection is still no message.
            Ok(Framing::Need(_)) if rest.is_empty() || rest[0] == 1 => return Ok(found),
            _ if found.is_empty() => return Err(()),
            _ => return Ok(found),
        }
    }
}

/// The messages of packets, in the order in which they were complete.
pub(super) fn of_packets(packets: &[Packet<'_>]) -> Vec<Found> {
    let (mut streams, mut found) =
        (HashMap::<(SocketAddr, SocketAddr), Stream<'_>>::new(), Vec::new());
    for packet in packets {
        let messages = match packet.carried {
            Carried::Whole(bytes) => of_stream(bytes),
            Carried::Tcp { sequence, fresh, bytes } => {
                let stream = streams.entry((packet.from, packet.to)).or_default();
                stream.take(sequence, fresh, bytes);
                stream.messages()
            }
        };
        for bytes in messages {
            let way = Some(format!("{} > {}", packet.from, packet.to));
            found.push(Found { way, time: Some(packet.time), bytes });
        }
    }
    found
}
