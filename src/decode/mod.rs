//! `strowger decode`: a message, hex text, or a capture, in words.

mod capture;
mod input;

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use strowger_diameter::decode::decode;
use strowger_diameter::dictionary::Dictionary;

use crate::cli::Output;

/// The largest file that is read: it is kept in memory.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// A message, and where in a capture it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// `127.0.0.1:4000 > 127.0.0.1:3868`, if it was in a capture.
    pub way: Option<String>,
    /// Seconds and nanoseconds since 1970.
    pub time: Option<(u64, u32)>,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Prints the messages of a file, or of standard input if it is `-`.
///
/// # Errors
/// The file or the dictionary cannot be read, or there is no message in it.
pub fn run(file: &Path, dictionary: Option<&Path>, output: Output) -> Result<()> {
    let dictionary = load(dictionary)?;
    let mut bytes = Vec::new();
    let name = file.display();
    let source: Box<dyn Read> = if file == Path::new("-") {
        Box::new(std::io::stdin())
    } else {
        Box::new(std::fs::File::open(file).with_context(|| format!("cannot open {name}"))?)
    };
    source.take(FILE_BYTES_MAX).read_to_end(&mut bytes).with_context(|| format!("{name}"))?;
    let found = messages(&bytes);
    if found.is_empty() {
        bail!("{name}: no Diameter or SIP message, no hex text of one, and no capture with one");
    }
    if output == Output::Json {
        let all: Vec<Value> = found.iter().map(|found| as_json(&dictionary, found)).collect();
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    for found in &found {
        println!("{}", as_text(&dictionary, found));
    }
    Ok(())
}

fn load(file: Option<&Path>) -> Result<Dictionary> {
    let Some(file) = file else { return Ok(Dictionary::built_in().clone()) };
    let name = file.display();
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {name}"))?;
    Dictionary::extended(&text).map_err(|errors| {
        let lines: Vec<String> = errors.iter().map(|error| format!("{name}: {error}")).collect();
        anyhow::anyhow!(lines.join("\n"))
    })
}

/// The messages in whatever these bytes are: a capture, messages one after another, or hex text.
#[must_use]
pub fn messages(bytes: &[u8]) -> Vec<Found> {
    if let Some(packets) = capture::packets(bytes) {
        return input::of_packets(&packets);
    }
    let direct = input::of_stream(bytes);
    if !direct.is_empty() {
        return direct.into_iter().map(|bytes| Found { way: None, time: None, bytes }).collect();
    }
    let bytes = input::from_hex(bytes).unwrap_or_default();
    let found = input::of_stream(&bytes);
    found.into_iter().map(|bytes| Found { way: None, time: None, bytes }).collect()
}

fn as_json(dictionary: &Dictionary, found: &Found) -> Value {
    let mut value = if input::is_sip(&found.bytes) {
        json!({ "protocol": "sip", "text": String::from_utf8_lossy(&found.bytes) })
    } else {
        let decoded = decode(dictionary, &found.bytes);
        let mut value = serde_json::to_value(decoded).unwrap_or_default();
        if let Some(map) = value.as_object_mut() {
            map.insert("protocol".into(), "diameter".into());
        }
        value
    };
    if let (Some(map), Some(way)) = (value.as_object_mut(), &found.way) {
        map.insert("way".into(), way.as_str().into());
    }
    if let (Some(map), Some((seconds, nanos))) = (value.as_object_mut(), found.time) {
        map.insert("time".into(), format!("{seconds}.{nanos:09}").into());
    }
    value
}

fn as_text(dictionary: &Dictionary, found: &Found) -> String {
    let mut text = String::new();
    if let Some(way) = &found.way {
        let (seconds, nanos) = found.time.unwrap_or_default();
        text = format!("{seconds}.{:06} {way}\n", nanos / 1_000);
    }
    if input::is_sip(&found.bytes) {
        // A terminal obeys some bytes; a message must not make it do so.
        let safe = |letter: char| {
            let shown = !letter.is_control() || letter == '\n' || letter == '\t';
            if shown { letter.to_string() } else { letter.escape_default().to_string() }
        };
        let message = String::from_utf8_lossy(&found.bytes).replace("\r\n", "\n");
        text.extend(message.chars().map(safe));
    } else if let Some(decoded) = decode(dictionary, &found.bytes) {
        text.push_str(&decoded.text());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn dwr() -> Vec<u8> {
        let mut bytes = Vec::new();
        strowger_diameter::build::Builder::new(&mut bytes, 0x80, 280, 0, 1, 2)
            .text(264, "a.example.net")
            .finish();
        bytes
    }

    #[test]
    fn bytes_and_hex_are_the_same_messages() {
        let two = [dwr(), dwr()].concat();
        assert_eq!(messages(&two).len(), 2);
        let hex: String = two.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(messages(hex.as_bytes()), messages(&two));
        let spaced: String = two.iter().map(|byte| format!("{byte:02X}:\n")).collect();
        assert_eq!(messages(spaced.as_bytes()), messages(&two));
        let dump: String = two
            .chunks(16)
            .enumerate()
            .map(|(row, part)| {
                let hex: Vec<String> = part.iter().map(|byte| format!("{byte:02x}")).collect();
                format!("{:06x}  {}  |........|\n", row * 16, hex.join(" "))
            })
            .collect();
        assert_eq!(messages(dump.as_bytes()), messages(&two));
        assert!(messages(b"no message").is_empty());
    }

    proptest! {
        #[test]
        fn any_file_is_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), magic in 0usize..4) {
            let mut file: Vec<u8> = match magic {
                0 => vec![0xd4, 0xc3, 0xb2, 0xa1],
                1 => vec![0x0a, 0x0d, 0x0d, 0x0a],
                2 => dwr(),
                _ => Vec::new(),
            };
            file.extend(bytes);
            let dictionary = Dictionary::built_in();
            for found in messages(&file) {
                let _text = as_text(dictionary, &found);
                let _json = as_json(dictionary, &found);
            }
        }
    }
}
