//! Header and AVPs (RFC 6733 3, 4): views over the received bytes, every length checked.

/// 3GPP among vendors (RFC 3588 and IANA's list of enterprise numbers).
pub const VENDOR_3GPP: u32 = 10_415;

/// A header's length in bytes.
pub const HEADER_BYTES: usize = 20;

/// AVPs of one message that are looked at, at most: a 64 KiB message of empty AVPs has 8,192.
pub const AVPS_MAX: usize = 8_192;

/// Command flags (RFC 6733 3).
pub const FLAG_REQUEST: u8 = 0x80;
/// May be relayed.
pub const FLAG_PROXIABLE: u8 = 0x40;
/// A protocol error.
pub const FLAG_ERROR: u8 = 0x20;
/// May have been sent before.
pub const FLAG_RETRANSMITTED: u8 = 0x10;

/// AVP flags (RFC 6733 4.1).
pub const AVP_VENDOR: u8 = 0x80;
/// Must be understood.
pub const AVP_MANDATORY: u8 = 0x40;

/// AVP codes of the base protocol and of credit control.
#[allow(missing_docs)]
pub mod code {
    pub const USER_NAME: u32 = 1;
    pub const REDIRECT_HOST: u32 = 292;
    pub const REDIRECT_HOST_USAGE: u32 = 261;
    pub const REDIRECT_MAX_CACHE_TIME: u32 = 262;
    pub const AUTH_SESSION_STATE: u32 = 277;
    pub const EXPERIMENTAL_RESULT_CODE: u32 = 298;
    pub const OC_SUPPORTED_FEATURES: u32 = 621;
    pub const OC_FEATURE_VECTOR: u32 = 622;
    pub const OC_OLR: u32 = 623;
    pub const OC_SEQUENCE_NUMBER: u32 = 624;
    pub const OC_VALIDITY_DURATION: u32 = 625;
    pub const OC_REPORT_TYPE: u32 = 626;
    pub const OC_REDUCTION_PERCENTAGE: u32 = 627;
    pub const SOURCE_ID: u32 = 649;
    pub const LOAD: u32 = 650;
    pub const LOAD_TYPE: u32 = 651;
    pub const LOAD_VALUE: u32 = 652;
    /// Of vendor 10415 (TS 29.212).
    pub const ORIGINATION_TIME_STAMP: u32 = 1_536;
    /// Of vendor 10415 (TS 29.212).
    pub const MAXIMUM_WAIT_TIME: u32 = 1_537;
    pub const HOST_IP_ADDRESS: u32 = 257;
    pub const AUTH_APPLICATION_ID: u32 = 258;
    pub const ACCT_APPLICATION_ID: u32 = 259;
    pub const VENDOR_SPECIFIC_APPLICATION_ID: u32 = 260;
    pub const SESSION_ID: u32 = 263;
    pub const ORIGIN_HOST: u32 = 264;
    pub const SUPPORTED_VENDOR_ID: u32 = 265;
    pub const VENDOR_ID: u32 = 266;
    pub const FIRMWARE_REVISION: u32 = 267;
    pub const RESULT_CODE: u32 = 268;
    pub const PRODUCT_NAME: u32 = 269;
    pub const DISCONNECT_CAUSE: u32 = 273;
    pub const ORIGIN_STATE_ID: u32 = 278;
    pub const FAILED_AVP: u32 = 279;
    pub const ERROR_MESSAGE: u32 = 281;
    pub const ROUTE_RECORD: u32 = 282;
    pub const DESTINATION_REALM: u32 = 283;
    pub const PROXY_INFO: u32 = 284;
    pub const DESTINATION_HOST: u32 = 293;
    pub const ERROR_REPORTING_HOST: u32 = 294;
    pub const ORIGIN_REALM: u32 = 296;
    pub const EXPERIMENTAL_RESULT: u32 = 297;
    pub const DRMP: u32 = 301;
    pub const CC_REQUEST_TYPE: u32 = 416;
}

/// A message's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Flags.
    pub flags: u8,
    /// Command code, 24 bits.
    pub command: u32,
    /// Application.
    pub application: u32,
    /// Hop-by-Hop identifier.
    pub hop_by_hop: u32,
    /// End-to-End identifier.
    pub end_to_end: u32,
}

impl Header {
    /// Reads it; `None` if the message is shorter than a header.
    #[must_use]
    pub fn read(message: &[u8]) -> Option<Self> {
        message.get(..HEADER_BYTES)?;
        Some(Self {
            flags: message[4],
            command: number24(message, 5)?,
            application: number32(message, 8)?,
            hop_by_hop: number32(message, 12)?,
            end_to_end: number32(message, 16)?,
        })
    }

    /// Whether it is a request.
    #[must_use]
    pub fn is_request(&self) -> bool {
        self.flags & FLAG_REQUEST != 0
    }
}

/// Big-endian, 32 bits.
#[must_use]
pub fn number32(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes([four[0], four[1], four[2], four[3]]))
}

/// Big-endian, 24 bits.
#[must_use]
pub fn number24(bytes: &[u8], at: usize) -> Option<u32> {
    let three = bytes.get(at..at.checked_add(3)?)?;
    Some(u32::from_be_bytes([0, three[0], three[1], three[2]]))
}

/// One AVP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avp<'a> {
    /// Its code.
    pub code: u32,
    /// Its flags.
    pub flags: u8,
    /// Its vendor; 0 for none.
    pub vendor: u32,
    /// Its data.
    pub data: &'a [u8],
    /// All of it, with padding.
    pub whole: &'a [u8],
}

impl Avp<'_> {
    /// Its data as Unsigned32 or Enumerated.
    #[must_use]
    pub fn number(&self) -> Option<u32> {
        (self.data.len() == 4).then(|| number32(self.data, 0)).flatten()
    }

    /// Whether it is this AVP of the base protocol.
    #[must_use]
    pub fn is(&self, code: u32) -> bool {
        self.code == code && self.vendor == 0
    }
}

/// An AVP whose length is impossible; all after it cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("AVP {code} has an impossible length")]
pub struct BadLength {
    /// Its code, 0 if not even that could be read.
    pub code: u32,
    /// Its vendor, 0 if none or unreadable.
    pub vendor: u32,
}

/// Walks AVPs.
#[derive(Clone, Debug)]
pub struct Avps<'a> {
    rest: &'a [u8],
    count: usize,
}

impl<'a> Avps<'a> {
    /// Those of a whole message.
    #[must_use]
    pub fn of(message: &'a [u8]) -> Self {
        Self::within(message.get(HEADER_BYTES..).unwrap_or_default())
    }

    /// Those within a Grouped AVP's data.
    #[must_use]
    pub fn within(data: &'a [u8]) -> Self {
        Self { rest: data, count: 0 }
    }

    fn cut(&mut self) -> Result<Avp<'a>, BadLength> {
        let rest = self.rest;
        let code = number32(rest, 0).unwrap_or(0);
        let bad = BadLength { code, vendor: 0 };
        let (Some(&flags), Some(length)) = (rest.get(4), number24(rest, 5)) else {
            return Err(bad);
        };
        let vendor = if flags & AVP_VENDOR != 0 { number32(rest, 8).ok_or(bad)? } else { 0 };
        let bad = BadLength { code, vendor };
        let header = if flags & AVP_VENDOR != 0 { 12 } else { 8 };
        let length = length as usize;
        let data = rest.get(header..length).ok_or(bad)?;
        let padded = length.next_multiple_of(4);
        let whole = rest.get(..padded).ok_or(bad)?;
        self.rest = &rest[padded..];
        Ok(Avp { code, flags, vendor, data, whole })
    }
}

impl<'a> Iterator for Avps<'a> {
    type Item = Result<Avp<'a>, BadLength>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        self.count += 1;
        let avp =
            if self.count > AVPS_MAX { Err(BadLength { code: 0, vendor: 0 }) } else { self.cut() };
        if avp.is_err() {
            self.rest = &[];
        }
        Some(avp)
    }
}

/// What a relay looks at in a message, from one walk over its top level.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct Summary<'a> {
    pub session_id: Option<&'a [u8]>,
    pub origin_host: Option<&'a [u8]>,
    pub origin_realm: Option<&'a [u8]>,
    pub destination_host: Option<&'a [u8]>,
    pub destination_realm: Option<&'a [u8]>,
    pub result_code: Option<u32>,
    pub cc_request_type: Option<u32>,
    pub drmp: Option<u32>,
    /// The code within Experimental-Result.
    pub experimental_code: Option<u32>,
    pub auth_session_state: Option<u32>,
    /// Milliseconds since 1900.
    pub origination_stamp: Option<u64>,
    /// Milliseconds.
    pub maximum_wait: Option<u32>,
    /// An OC-OLR or a Load is there.
    pub tells_load: bool,
    /// An OC-Supported-Features is there.
    pub tells_features: bool,
    /// Some Route-Record is there.
    pub route_recorded: bool,
    /// The first AVP that is broken.
    pub broken: Option<BadLength>,
}

impl<'a> Summary<'a> {
    /// Walks over a message.
    #[must_use]
    pub fn of(message: &'a [u8]) -> Self {
        let mut summary = Self::default();
        for avp in Avps::of(message) {
            match avp {
                Ok(avp) if avp.vendor == 0 => summary.note(&avp),
                Ok(avp) if avp.vendor == VENDOR_3GPP => summary.note_3gpp(&avp),
                Ok(_) => {}
                Err(bad) => summary.broken = Some(bad),
            }
        }
        summary
    }

    /// The result, whichever way it is told.
    #[must_use]
    pub fn result(&self) -> Option<u32> {
        self.result_code.or(self.experimental_code)
    }

    fn note_3gpp(&mut self, avp: &Avp<'a>) {
        match avp.code {
            code::ORIGINATION_TIME_STAMP => {
                self.origination_stamp = crate::subscriber::number64(avp.data);
            }
            code::MAXIMUM_WAIT_TIME => self.maximum_wait = avp.number(),
            _ => {}
        }
    }

    fn note(&mut self, avp: &Avp<'a>) {
        let place = match avp.code {
            code::SESSION_ID => &mut self.session_id,
            code::ORIGIN_HOST => &mut self.origin_host,
            code::ORIGIN_REALM => &mut self.origin_realm,
            code::DESTINATION_HOST => &mut self.destination_host,
            code::DESTINATION_REALM => &mut self.destination_realm,
            code::ROUTE_RECORD => return self.route_recorded = true,
            code::RESULT_CODE => return self.result_code = avp.number(),
            code::CC_REQUEST_TYPE => return self.cc_request_type = avp.number(),
            code::DRMP => return self.drmp = avp.number(),
            code::AUTH_SESSION_STATE => return self.auth_session_state = avp.number(),
            code::OC_OLR | code::LOAD => return self.tells_load = true,
            code::OC_SUPPORTED_FEATURES => return self.tells_features = true,
            code::EXPERIMENTAL_RESULT => {
                let mut inner = Avps::within(avp.data).map_while(Result::ok);
                let code = inner.find(|avp| avp.is(code::EXPERIMENTAL_RESULT_CODE));
                return self.experimental_code = code.and_then(|avp| avp.number());
            }
            _ => return,
        };
        // The first one counts.
        place.get_or_insert(avp.data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::Builder;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_walked_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _summary = Summary::of(&bytes);
            let total: usize = Avps::of(&bytes).flatten().map(|avp| avp.whole.len()).sum();
            prop_assert!(total <= bytes.len());
        }

        #[test]
        fn what_was_built_is_read(session in "[a-z;0-9]{0,40}", host in "[a-z.]{1,30}", number: u32) {
            let mut message = Vec::new();
            Builder::request(&mut message, 272, 4, 1, 2)
                .text(code::SESSION_ID, &session)
                .text(code::ORIGIN_HOST, &host)
                .number(code::RESULT_CODE, number)
                .finish();
            prop_assert_eq!(message.len() % 4, 0);
            let summary = Summary::of(&message);
            prop_assert_eq!(summary.session_id, Some(session.as_bytes()));
            prop_assert_eq!(summary.origin_host, Some(host.as_bytes()));
            prop_assert_eq!(summary.result_code, Some(number));
            prop_assert_eq!(summary.broken, None);
        }
    }

    #[test]
    fn impossible_lengths_are_named() {
        let avp = |flags: u8, length: u8, rest: usize| {
            let mut message = vec![0; HEADER_BYTES];
            message.extend([0, 0, 1, 8, flags, 0, 0, length]);
            message.resize(message.len() + rest, 0);
            Summary::of(&message).broken.map(|bad| bad.code)
        };
        for (flags, length, rest) in [
            (0, 0, 0),
            (0, 7, 4),
            (AVP_VENDOR, 8, 4),
            (AVP_VENDOR, 11, 4),
            (0, 33, 8),
            (AVP_VENDOR, 12, 0),
            (0, 9, 0),
        ] {
            assert_eq!(avp(flags, length, rest), Some(264), "{flags:x} {length} {rest}");
        }
        assert_eq!(avp(0, 8, 0), None);
        assert_eq!(avp(AVP_VENDOR, 12, 4), None);
    }
}
