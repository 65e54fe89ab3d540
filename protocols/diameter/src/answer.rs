//! Errors in Diameter's words (RFC 6733 6.2, 7.1).

use crate::avp::{
    AVP_MANDATORY, AVP_VENDOR, Avps, BadLength, FLAG_ERROR, FLAG_PROXIABLE, Header, code,
};
use crate::build::{Builder, append};

/// Result codes that a relay gives (RFC 6733 7.1).
#[allow(missing_docs)]
pub(crate) mod result {
    pub(crate) const SUCCESS: u32 = 2_001;
    pub(crate) const UNABLE_TO_DELIVER: u32 = 3_002;
    pub(crate) const REALM_NOT_SERVED: u32 = 3_003;
    pub(crate) const TOO_BUSY: u32 = 3_004;
    pub(crate) const LOOP_DETECTED: u32 = 3_005;
    pub(crate) const APPLICATION_UNSUPPORTED: u32 = 3_007;
    pub(crate) const INVALID_HDR_BITS: u32 = 3_008;
    pub(crate) const INVALID_AVP_BITS: u32 = 3_009;
    pub(crate) const UNKNOWN_PEER: u32 = 3_010;
    pub(crate) const ELECTION_LOST: u32 = 4_003;
    pub(crate) const AVP_UNSUPPORTED: u32 = 5_001;
    pub(crate) const INVALID_AVP_VALUE: u32 = 5_004;
    pub(crate) const MISSING_AVP: u32 = 5_005;
    pub(crate) const NO_COMMON_APPLICATION: u32 = 5_010;
    pub(crate) const UNSUPPORTED_VERSION: u32 = 5_011;
    pub(crate) const UNABLE_TO_COMPLY: u32 = 5_012;
    pub(crate) const INVALID_AVP_LENGTH: u32 = 5_014;
    pub(crate) const INVALID_MESSAGE_LENGTH: u32 = 5_015;
}

/// Who answers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity<'a> {
    pub(crate) host: &'a str,
    pub(crate) realm: &'a str,
}

/// Appends an error answer to `request`. The E flag goes with protocol errors (3xxx) only.
pub(crate) fn error(
    request: &[u8],
    identity: Identity<'_>,
    result: u32,
    text: &str,
    failed: Option<BadLength>,
    out: &mut Vec<u8>,
) {
    let Some(header) = Header::read(request) else { return };
    let protocol_error = (3_000..4_000).contains(&result);
    let flags = header.flags & FLAG_PROXIABLE | if protocol_error { FLAG_ERROR } else { 0 };
    let mut builder = Builder::new(
        out,
        flags,
        header.command,
        header.application,
        header.hop_by_hop,
        header.end_to_end,
    );
    let readable = || Avps::of(request).map_while(Result::ok);
    if let Some(session) = readable().find(|avp| avp.is(code::SESSION_ID)) {
        builder = builder.raw(session.whole);
    }
    builder = builder
        .text(code::ORIGIN_HOST, identity.host)
        .text(code::ORIGIN_REALM, identity.realm)
        .number(code::RESULT_CODE, result)
        .avp(code::ERROR_MESSAGE, 0, text.as_bytes());
    for proxy in readable().filter(|avp| avp.is(code::PROXY_INFO)) {
        builder = builder.raw(proxy.whole);
    }
    if let Some(bad) = failed {
        builder = builder.bytes(code::FAILED_AVP, &stand_in(bad));
    }
    builder.finish();
}

/// RFC 6733 7.1.5: for an AVP whose length cannot be, its header with no data stands in Failed-AVP.
fn stand_in(bad: BadLength) -> Vec<u8> {
    let mut avp = Vec::with_capacity(12);
    append(&mut avp, bad.code, AVP_MANDATORY, &[]);
    if bad.vendor != 0 {
        avp[4] |= AVP_VENDOR;
        avp[7] = 12;
        avp.extend_from_slice(&bad.vendor.to_be_bytes());
    }
    avp
}
