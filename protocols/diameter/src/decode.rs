//! Messages in words: for `strowger decode`, and for people who look at what passes.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};

use serde::Serialize;

use crate::avp::{
    AVP_MANDATORY, AVP_VENDOR, Avp, Avps, FLAG_ERROR, FLAG_PROXIABLE, FLAG_RETRANSMITTED, Header,
    number32,
};
use crate::dictionary::{AvpDefinition, Dictionary, Kind};

/// Groups within groups that are opened; real ones nest to about six.
const DEPTH_MAX: usize = 16;

/// From 1900, where NTP's time starts, to 1970; and one era of it, which ends in 2036.
const NTP_TO_UNIX: i64 = 2_208_988_800;
const NTP_ERA: i64 = 1 << 32;

/// A message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Decoded {
    /// `Credit-Control-Request`, or the number.
    pub name: String,
    /// The command code.
    pub command: u32,
    /// `RPET` and dots.
    pub flags: String,
    /// The application's name, if known.
    pub application: Option<String>,
    /// The application's number.
    pub application_id: u32,
    /// Hop-by-Hop identifier.
    pub hop_by_hop: u32,
    /// End-to-End identifier.
    pub end_to_end: u32,
    /// Length in bytes.
    pub length: usize,
    /// In order.
    pub avps: Vec<DecodedAvp>,
    /// What is wrong with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// An AVP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DecodedAvp {
    /// Its name, or `AVP 123`.
    pub name: String,
    /// Its code.
    pub code: u32,
    /// Its vendor.
    #[serde(skip_serializing_if = "is_zero")]
    pub vendor: u32,
    /// `VMP` and dots.
    pub flags: String,
    /// What it says, if it is not a group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// Its members.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub members: Vec<Self>,
    /// What is wrong with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// Reads a message; `None` if it is shorter than a header.
#[must_use]
pub fn decode(dictionary: &Dictionary, message: &[u8]) -> Option<Decoded> {
    let header = Header::read(message)?;
    let told = number32(message, 0)? & 0x00ff_ffff;
    let mut error = None;
    if message[0] != 1 {
        error = Some(format!("version {}", message[0]));
    } else if told as usize != message.len() {
        error = Some(format!("says {told} bytes and has {}", message.len()));
    }
    let kind = if header.is_request() { "Request" } else { "Answer" };
    let name = match dictionary.command_name(header.command) {
        Some(name) => format!("{name}-{kind}"),
        None => format!("{}-{kind}", header.command),
    };
    let (avps, broken) = list(dictionary, Avps::of(message), 0);
    Some(Decoded {
        name,
        command: header.command,
        flags: letters(
            header.flags,
            &[
                (crate::avp::FLAG_REQUEST, 'R'),
                (FLAG_PROXIABLE, 'P'),
                (FLAG_ERROR, 'E'),
                (FLAG_RETRANSMITTED, 'T'),
            ],
        ),
        application: dictionary.application_name(header.application).map(str::to_owned),
        application_id: header.application,
        hop_by_hop: header.hop_by_hop,
        end_to_end: header.end_to_end,
        length: message.len(),
        avps,
        error: error.or(broken),
    })
}

fn letters(flags: u8, names: &[(u8, char)]) -> String {
    let letter = |(bit, name): &(u8, char)| if flags & bit != 0 { *name } else { '.' };
    let mut text: String = names.iter().map(letter).collect();
    let known = names.iter().fold(0, |all, (bit, _)| all | bit);
    if flags & !known != 0 {
        let _written = write!(text, "+{:#04x}", flags & !known);
    }
    text
}

fn list(
    dictionary: &Dictionary,
    avps: Avps<'_>,
    depth: usize,
) -> (Vec<DecodedAvp>, Option<String>) {
    let (mut list, mut error) = (Vec::new(), None);
    for avp in avps {
        match avp {
            Ok(avp) => list.push(one(dictionary, &avp, depth)),
            Err(bad) => {
                let name = dictionary.avp(bad.vendor, bad.code).map(|known| known.name.clone());
                let name = name.unwrap_or_else(|| format!("AVP {}", bad.code));
                error = Some(format!("{name} has an impossible length; the rest is unreadable"));
            }
        }
    }
    (list, error)
}

fn one(dictionary: &Dictionary, avp: &Avp<'_>, depth: usize) -> DecodedAvp {
    let known = dictionary.avp(avp.vendor, avp.code);
    let mut decoded = DecodedAvp {
        name: known.map_or_else(|| format!("AVP {}", avp.code), |known| known.name.clone()),
        code: avp.code,
        vendor: avp.vendor,
        flags: letters(avp.flags, &[(AVP_VENDOR, 'V'), (AVP_MANDATORY, 'M'), (0x20, 'P')]),
        value: None,
        members: Vec::new(),
        error: None,
    };
    if known.is_some_and(|known| known.kind == Kind::Grouped) && depth < DEPTH_MAX {
        (decoded.members, decoded.error) = list(dictionary, Avps::within(avp.data), depth + 1);
        return decoded;
    }
    match known.map_or_else(|| Some(octets(avp.data)), |known| value(known, avp.data)) {
        Some(value) => decoded.value = Some(value),
        None => {
            decoded.error = known.map(|known| format!("is no {}", known.kind.name()));
            decoded.value = Some(octets(avp.data));
        }
    }
    decoded
}

fn value(known: &AvpDefinition, data: &[u8]) -> Option<String> {
    let four = || data.try_into().ok().map(u32::from_be_bytes);
    let eight = || data.try_into().ok().map(u64::from_be_bytes);
    Some(match known.kind {
        Kind::Unsigned32 | Kind::Enumerated | Kind::Integer32 => {
            let number = four()?;
            let shown = if known.kind == Kind::Unsigned32 {
                number.to_string()
            } else {
                number.cast_signed().to_string()
            };
            match known.value_name(number) {
                Some(name) => format!("{name} ({shown})"),
                None => shown,
            }
        }
        Kind::Unsigned64 => eight()?.to_string(),
        Kind::Integer64 => eight()?.cast_signed().to_string(),
        Kind::Float32 => f32::from_bits(four()?).to_string(),
        Kind::Float64 => f64::from_bits(eight()?).to_string(),
        Kind::Address => address(data)?,
        Kind::Time => time(four()?),
        Kind::OctetString => {
            let special = (known.vendor == 0).then(|| special(known.code, data)).flatten();
            special.unwrap_or_else(|| octets(data))
        }
        Kind::Grouped => octets(data),
        Kind::Utf8String
        | Kind::DiameterIdentity
        | Kind::DiameterUri
        | Kind::IpFilterRule
        | Kind::QosFilterRule => quoted(std::str::from_utf8(data).ok()?),
    })
}

/// Without what a terminal would obey.
fn quoted(text: &str) -> String {
    let safe = |letter: char| {
        if letter.is_control() { letter.escape_default().to_string() } else { letter.to_string() }
    };
    text.chars().map(safe).collect()
}

fn octets(data: &[u8]) -> String {
    let printable = data.iter().all(|byte| (0x20..0x7f).contains(byte));
    if printable && data.len() > 1 {
        return format!("\"{}\"", String::from_utf8_lossy(data));
    }
    let mut text = String::with_capacity(2 + data.len() * 2);
    text.push_str("0x");
    for byte in data {
        let _written = write!(text, "{byte:02x}");
    }
    text
}

/// RFC 6733 4.3.1: two bytes of family, from IANA's list.
fn address(data: &[u8]) -> Option<String> {
    let (family, rest) = data.split_at_checked(2)?;
    match (u16::from_be_bytes([family[0], family[1]]), rest.len()) {
        (1, 4) => <[u8; 4]>::try_from(rest).ok().map(|four| Ipv4Addr::from(four).to_string()),
        (2, 16) => <[u8; 16]>::try_from(rest).ok().map(|all| Ipv6Addr::from(all).to_string()),
        (1 | 2, _) => None,
        // E.164.
        (8, _) => std::str::from_utf8(rest).ok().map(quoted),
        (family, _) => Some(format!("family {family} {}", octets(rest))),
    }
}

/// Octet strings that are addresses (RFC 7155 4.4.10.5).
fn special(code: u32, data: &[u8]) -> Option<String> {
    match (code, data.len()) {
        (4 | 8 | 9, 4) => {
            <[u8; 4]>::try_from(data).ok().map(|four| Ipv4Addr::from(four).to_string())
        }
        (97 | 123, 2..=18) => {
            let mut all = [0; 16];
            all[..data.len() - 2].copy_from_slice(&data[2..]);
            Some(format!("{}/{}", Ipv6Addr::from(all), data[1]))
        }
        _ => None,
    }
}

/// NTP's seconds as a date (RFC 6733 4.3.1); numbers below 2^31 are of the era from 2036 on.
fn time(seconds: u32) -> String {
    let era = if seconds < 1 << 31 { NTP_ERA } else { 0 };
    // 2^31 is in January 1968, so the first two years are before 1970.
    let unix = i64::from(seconds) + era - NTP_TO_UNIX;
    let (days, of_day) = (unix.div_euclid(86_400), unix.rem_euclid(86_400));
    // Civil from days, counted from 0000-03-01, in years that start in March.
    let shifted = days + 719_468;
    let (cycle, of_cycle) = (shifted / 146_097, shifted % 146_097);
    let year = (of_cycle - of_cycle / 1_460 + of_cycle / 36_524 - of_cycle / 146_096) / 365;
    let of_year = of_cycle - (365 * year + year / 4 - year / 100);
    let march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * march + 2) / 5 + 1;
    let month = if march < 10 { march + 3 } else { march - 9 };
    let year = year + cycle * 400 + i64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        of_day / 3_600,
        of_day / 60 % 60,
        of_day % 60
    )
}

impl Decoded {
    /// As indented text, a line per AVP.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        let application = self.application.as_deref().unwrap_or("unknown");
        let _written = writeln!(
            text,
            "{} ({}) {}  application {application} ({})  hop-by-hop {:#010x}  end-to-end {:#010x}  {} bytes",
            self.name,
            self.command,
            self.flags,
            self.application_id,
            self.hop_by_hop,
            self.end_to_end,
            self.length
        );
        lines(&self.avps, 1, &mut text);
        if let Some(error) = &self.error {
            let _written = writeln!(text, "  !! {error}");
        }
        text
    }
}

fn lines(avps: &[DecodedAvp], depth: usize, text: &mut String) {
    for avp in avps {
        let indent = "  ".repeat(depth);
        let vendor = if avp.vendor == 0 { String::new() } else { format!(" v={}", avp.vendor) };
        let _written = write!(text, "{indent}{} ({}{vendor}) {}", avp.name, avp.code, avp.flags);
        if let Some(value) = &avp.value {
            let _written = write!(text, "  {value}");
        }
        text.push('\n');
        lines(&avp.members, depth + 1, text);
        if let Some(error) = &avp.error {
            let _written = writeln!(text, "{indent}  !! {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::avp::code;
    use crate::build::{Builder, append};
    use proptest::prelude::*;

    #[test]
    fn a_message_in_words() {
        let mut group = Vec::new();
        append(&mut group, 450, 0x40, &1u32.to_be_bytes());
        append(&mut group, 444, 0x40, b"001010000000001");
        let mut bytes = Vec::new();
        Builder::request(&mut bytes, 272, 16_777_238, 1, 2)
            .text(code::SESSION_ID, "a;1\x1b;2")
            .number(code::CC_REQUEST_TYPE, 1)
            .bytes(443, &group)
            .bytes(8, &[10, 0, 0, 1])
            .bytes(97, &[0, 64, 0x20, 1, 0xd, 0xb8, 0, 0, 0, 1])
            .bytes(55, &3_913_056_000u32.to_be_bytes())
            .bytes(268, &[1])
            .bytes(9_999, b"abc")
            .finish();
        let decoded = decode(Dictionary::built_in(), &bytes).expect("a header");
        assert_eq!(decoded.error, None);
        assert_eq!(
            decoded.text(),
            "Credit-Control-Request (272) RP..  application gx (16777238)  hop-by-hop 0x00000001  end-to-end 0x00000002  160 bytes
  Session-Id (263) .M.  a;1\\u{1b};2
  CC-Request-Type (416) .M.  INITIAL_REQUEST (1)
  Subscription-Id (443) .M.
    Subscription-Id-Type (450) .M.  END_USER_IMSI (1)
    Subscription-Id-Data (444) .M.  001010000000001
  Framed-IP-Address (8) .M.  10.0.0.1
  Framed-IPv6-Prefix (97) .M.  2001:db8:0:1::/64
  Event-Timestamp (55) .M.  2024-01-01T00:00:00Z
  Result-Code (268) .M.  0x01
    !! is no Unsigned32
  AVP 9999 (9999) .M.  \"abc\"
"
        );
    }

    #[test]
    fn times_of_either_era() {
        for (seconds, said) in [
            (1 << 31, "1968-01-20T03:14:08Z"),
            (2_208_988_799, "1969-12-31T23:59:59Z"),
            (2_208_988_800, "1970-01-01T00:00:00Z"),
            (u32::MAX, "2036-02-07T06:28:15Z"),
            (0, "2036-02-07T06:28:16Z"),
            ((1 << 31) - 1, "2104-02-26T09:42:23Z"),
        ] {
            assert_eq!(time(seconds), said, "{seconds}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_put_in_words_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), code in 0u32..700) {
            let mut message = Vec::new();
            Builder::request(&mut message, 272, 4, 1, 2).bytes(code, &bytes).raw(&bytes).finish();
            for bytes in [&bytes, &message] {
                if let Some(decoded) = decode(Dictionary::built_in(), bytes) {
                    prop_assert!(!decoded.text().contains('\x1b'));
                }
            }
        }
    }
}
