//! Durations as configurations write them: `500ms`, `2s`, `15m`, `2h`, `1d`, `1h30m`.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The longest that may be written: longer ones are mistakes, and would overflow timers.
const LONGEST: Duration = Duration::from_secs(366 * 86_400);

const UNITS: [(&str, u64); 5] =
    [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// A duration in an option. Reads `500ms`, `2s`, `15m`, `2h`, `1d` and sums of them; `0` alone is
/// zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span(pub Duration);

impl Span {
    /// So many milliseconds.
    #[must_use]
    pub const fn millis(count: u64) -> Self {
        Self(Duration::from_millis(count))
    }

    /// So many seconds.
    #[must_use]
    pub const fn secs(count: u64) -> Self {
        Self(Duration::from_secs(count))
    }
}

/// Reads a duration.
///
/// # Errors
/// What is wrong, and what was expected.
pub fn parse(text: &str) -> Result<Duration, String> {
    let wrong =
        || format!("`{text}` is not a duration; write a number and a unit: 500ms, 2s, 15m, 2h, 1d");
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let (mut rest, mut total) = (text, 0u64);
    while !rest.is_empty() {
        let digits = rest.find(|letter: char| !letter.is_ascii_digit()).ok_or_else(wrong)?;
        let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        let unit_end = rest[digits..]
            .find(|letter: char| letter.is_ascii_digit())
            .map_or(rest.len(), |end| digits + end);
        let (_, scale) =
            UNITS.iter().find(|(unit, _)| *unit == &rest[digits..unit_end]).ok_or_else(wrong)?;
        total = number
            .checked_mul(*scale)
            .and_then(|part| total.checked_add(part))
            .ok_or_else(wrong)?;
        rest = &rest[unit_end..];
    }
    let duration = Duration::from_millis(total);
    if text.is_empty() {
        return Err(wrong());
    }
    if duration > LONGEST {
        return Err(format!("`{text}` is longer than a year"));
    }
    Ok(duration)
}

/// Writes a duration so that [`parse`] reads it back, to the millisecond.
#[must_use]
pub fn format(duration: Duration) -> String {
    let mut rest = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    if rest == 0 {
        return "0".to_owned();
    }
    let mut text = String::new();
    for (unit, scale) in UNITS {
        if rest >= scale {
            // Writing to a string cannot fail.
            let _ok = write!(text, "{}{unit}", rest / scale);
            rest %= scale;
        }
    }
    text
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'_, str>::deserialize(deserializer)?;
        parse(&text).map(Self).map_err(serde::de::Error::custom)
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format(self.0))
    }
}

impl JsonSchema for Span {
    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^(0|([0-9]+(ms|s|m|h|d))+)$",
            "description": "A number and a unit: 500ms, 2s, 15m, 2h, 1d"
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn reads_what_it_writes(millis in 0u64..366 * 86_400_000) {
            let duration = Duration::from_millis(millis);
            prop_assert_eq!(parse(&format(duration)), Ok(duration));
        }

        #[test]
        fn never_panics(text in ".{0,12}") {
            let _any = parse(&text);
        }
    }

    #[test]
    fn says_what_it_expected() {
        for bad in ["", "5", "ms", "5 s", "5x", "-5s", "1.5s", "99999999999999999999s", "s5"] {
            assert!(parse(bad).is_err_and(|text| text.contains("500ms, 2s")), "{bad}");
        }
        assert!(parse("9999d").is_err());
        assert_eq!(parse("1h30m"), Ok(Duration::from_secs(5_400)));
    }
}
