//! State that goes to another process (live upgrade), as bytes.
//!
//! An [`Instant`] means nothing elsewhere, so moments go as nanoseconds of the machine's monotonic
//! clock, which all processes share. The engine knows no clock: the runtime tells, for the time of
//! one call, what one instant is on it ([`by_clock`]).

use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Changes whenever anything that is handed over changes its form. Processes of two formats do not
/// hand over to each other: the old one goes on.
pub const FORMAT: u32 = 7;

/// A fixed word. By this name, since serde takes `&'static str` for something that is borrowed from
/// what it reads, whatever `with` says.
pub type Word = &'static str;

/// It cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("what was handed over cannot be read")]
pub struct Broken;

/// One moment, as this process and as the machine knows it.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// The moment.
    pub instant: Instant,
    /// The same, in nanoseconds of CLOCK_MONOTONIC.
    pub nanos: i64,
}

thread_local! {
    static CLOCK: Cell<Option<Clock>> = const { Cell::new(None) };
}

/// Runs `work`; moments that it writes or reads go by `clock`.
pub fn by_clock<R>(clock: Clock, work: impl FnOnce() -> R) -> R {
    struct Back(Option<Clock>);
    impl Drop for Back {
        fn drop(&mut self) {
            CLOCK.set(self.0);
        }
    }
    let _back = Back(CLOCK.replace(Some(clock)));
    work()
}

fn to_nanos(instant: Instant) -> Option<i64> {
    let clock = CLOCK.get()?;
    let away = |duration: Duration| i64::try_from(duration.as_nanos()).ok();
    match instant.checked_duration_since(clock.instant) {
        Some(after) => clock.nanos.checked_add(away(after)?),
        None => clock.nanos.checked_sub(away(clock.instant.duration_since(instant))?),
    }
}

fn to_instant(nanos: i64) -> Option<Instant> {
    let clock = CLOCK.get()?;
    let away = Duration::from_nanos(nanos.checked_sub(clock.nanos)?.unsigned_abs());
    if nanos >= clock.nanos {
        clock.instant.checked_add(away)
    } else {
        clock.instant.checked_sub(away)
    }
}

/// As bytes.
#[must_use]
pub fn write(value: &impl Serialize) -> Vec<u8> {
    // Fails only for moments outside of `by_clock`, which a test would see.
    postcard::to_allocvec(value).unwrap_or_default()
}

/// Back from bytes; all of them.
///
/// # Errors
/// They are something else.
pub fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Broken> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        _ => Err(Broken),
    }
}

/// For `#[serde(with)]`: an [`Instant`].
pub mod moment {
    use super::{Instant, to_instant, to_nanos};
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};

    #[allow(missing_docs)]
    pub fn serialize<S: Serializer>(instant: &Instant, to: S) -> Result<S::Ok, S::Error> {
        to_nanos(*instant).ok_or_else(|| ser::Error::custom("no clock"))?.serialize(to)
    }

    #[allow(missing_docs)]
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Instant, D::Error> {
        to_instant(i64::deserialize(from)?).ok_or_else(|| de::Error::custom("no such moment"))
    }
}

/// For `#[serde(with)]`: an [`Instant`], or none.
pub mod moment_or_none {
    use super::{Instant, to_instant, to_nanos};
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};

    #[allow(missing_docs)]
    pub fn serialize<S: Serializer>(instant: &Option<Instant>, to: S) -> Result<S::Ok, S::Error> {
        let nanos = instant
            .map(|instant| to_nanos(instant).ok_or_else(|| ser::Error::custom("no clock")))
            .transpose()?;
        nanos.serialize(to)
    }

    #[allow(missing_docs)]
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Instant>, D::Error> {
        let nanos = Option::<i64>::deserialize(from)?;
        let moment = |nanos| to_instant(nanos).ok_or_else(|| de::Error::custom("no such moment"));
        nanos.map(moment).transpose()
    }
}

/// For `#[serde(with)]`: one of a few fixed words. What is read is kept for ever, and so there is a
/// bound: words past it become empty.
pub mod word {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[allow(missing_docs)]
    pub fn serialize<S: Serializer>(word: &&'static str, to: S) -> Result<S::Ok, S::Error> {
        word.serialize(to)
    }

    #[allow(missing_docs)]
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<&'static str, D::Error> {
        Ok(super::kept(&String::deserialize(from)?))
    }
}

/// Words that are kept, at most, and the longest.
const WORDS_MAX: usize = 512;
const WORD_BYTES_MAX: usize = 128;

fn kept(word: &str) -> &'static str {
    static WORDS: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut words = WORDS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(known) = words.get(word) {
        return known;
    }
    if words.len() >= WORDS_MAX || word.len() > WORD_BYTES_MAX {
        return "";
    }
    let word: &'static str = Box::leak(word.to_owned().into_boxed_str());
    words.insert(word);
    word
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Some_ {
        #[serde(with = "moment")]
        at: Instant,
        #[serde(with = "moment_or_none")]
        perhaps: Option<Instant>,
        #[serde(with = "word")]
        word: Word,
    }

    #[test]
    fn moments_mean_the_same_by_two_clocks() {
        let start = Instant::now() + Duration::from_secs(1_000);
        let old = Clock { instant: start, nanos: 5_000_000_000 };
        // The new process looks at the machine's clock 3 s later.
        let new = Clock { instant: start + Duration::from_secs(3), nanos: 8_000_000_000 };
        for (at, perhaps) in [
            (start, None),
            (start - Duration::from_secs(9), Some(start)),
            (start + Duration::from_secs(77), None),
        ] {
            let it = Some_ { at, perhaps, word: "bye" };
            let bytes = by_clock(old, || write(&it));
            assert_eq!(by_clock(new, || read::<Some_>(&bytes)), Ok(it));
            assert!(read::<Some_>(&bytes).is_err(), "no clock");
        }
    }

    #[test]
    fn words_are_bounded() {
        for number in 0..2 * WORDS_MAX {
            let word = format!("word-{number}");
            assert!([word.as_str(), ""].contains(&kept(&word)));
        }
        assert_eq!(kept(&"x".repeat(1_000)), "");
    }
}
