//! Who a request is about: the names of its subscriber, as views, and their binding keys.

use strowger_contract::{BINDING_KEYS_MAX, BindingKey, PoolId, Router};

use crate::avp::{Avp, Avps, VENDOR_3GPP, number32};

/// The spaces of binding keys among keyed hashes, one for each kind of name.
const SPACES: u8 = 0x40;

const USER_NAME: u32 = 1;
const FRAMED_IP_ADDRESS: u32 = 8;
const CALLED_STATION_ID: u32 = 30;
const FRAMED_IPV6_PREFIX: u32 = 97;
const SUBSCRIPTION_ID: u32 = 443;
const SUBSCRIPTION_ID_DATA: u32 = 444;
const SUBSCRIPTION_ID_TYPE: u32 = 450;
const IP_DOMAIN_ID: u32 = 537;

/// An APN or IP domain that enters a key, at most; the rest of a longer one does not.
const NAME_BYTES_MAX: usize = 128;

/// The names that a message gives its subscriber.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Subscriber<'a> {
    pub(crate) imsi: Option<&'a [u8]>,
    pub(crate) msisdn: Option<&'a [u8]>,
    apn: &'a [u8],
    ip: Option<&'a [u8]>,
    domain: &'a [u8],
    prefix: Option<[u8; 8]>,
}

impl<'a> Subscriber<'a> {
    /// Walks over a message's top level, and into Subscription-Ids.
    pub(crate) fn of(bytes: &'a [u8]) -> Self {
        let (mut found, mut user_name) = (Self::default(), None);
        for avp in Avps::of(bytes).map_while(Result::ok) {
            match (avp.vendor, avp.code) {
                (0, SUBSCRIPTION_ID) => found.note(&avp),
                (0, USER_NAME) => user_name = digits(avp.data),
                (0, CALLED_STATION_ID) => found.apn = avp.data,
                (0, FRAMED_IP_ADDRESS) if avp.data.len() == 4 => found.ip = Some(avp.data),
                (0, FRAMED_IPV6_PREFIX) => found.prefix = prefix(avp.data),
                (VENDOR_3GPP, IP_DOMAIN_ID) => found.domain = avp.data,
                _ => {}
            }
        }
        found.imsi = found.imsi.or(user_name);
        found
    }

    fn note(&mut self, group: &Avp<'a>) {
        /// END_USER_E164 and END_USER_IMSI (RFC 8506 8.47).
        const E164: u32 = 0;
        const IMSI: u32 = 1;
        let (mut kind, mut data) = (None, &b""[..]);
        for avp in Avps::within(group.data).map_while(Result::ok).filter(|avp| avp.vendor == 0) {
            match avp.code {
                SUBSCRIPTION_ID_TYPE => kind = avp.number(),
                SUBSCRIPTION_ID_DATA => data = avp.data,
                _ => {}
            }
        }
        match kind {
            Some(E164) if !data.is_empty() => {
                self.msisdn = Some(data.strip_prefix(b"+").unwrap_or(data));
            }
            Some(IMSI) if !data.is_empty() => self.imsi = Some(data),
            _ => {}
        }
    }

    /// The key of one kind of name, by its place in `BIND_KEYS`.
    fn key(&self, kind: u8, pool: PoolId, router: &dyn Router) -> Option<BindingKey> {
        let (name, lower, exclusive): (&[u8], &[u8], bool) = match kind {
            0 => (self.imsi?, b"", false),
            1 if !self.apn.is_empty() => (self.imsi?, self.apn, false),
            2 => (self.msisdn?, b"", false),
            3 => (self.ip?, self.domain, true),
            4 => (self.prefix.as_ref()?, b"", true),
            _ => return None,
        };
        // APNs and domains compare in any letter case (RFC 1034); a NUL keeps the parts apart.
        let mut bytes = [0; 4 + NAME_BYTES_MAX + 1 + NAME_BYTES_MAX];
        let (name, lower) =
            (&name[..name.len().min(NAME_BYTES_MAX)], &lower[..lower.len().min(NAME_BYTES_MAX)]);
        bytes[..4].copy_from_slice(&pool.0.to_le_bytes());
        bytes[4..4 + name.len()].copy_from_slice(name);
        let at = 4 + name.len() + 1;
        bytes[at..at + lower.len()].copy_from_slice(lower);
        bytes[at..at + lower.len()].make_ascii_lowercase();
        let bytes = &bytes[..at + lower.len()];
        Some(BindingKey::new(router.keyer(), SPACES + kind, bytes, exclusive))
    }

    /// The keys of all names that the pool binds by, in its order.
    pub(crate) fn keys(&self, pool: PoolId, router: &dyn Router) -> Keys {
        let mut keys = Keys::default();
        for &kind in router.bind_keys(pool) {
            if let Some(key) = self.key(kind, pool, router)
                && let Some(place) = keys.list.get_mut(keys.count)
            {
                *place = key.to_bits();
                keys.count += 1;
            }
        }
        keys
    }
}

/// The binding keys of one message.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Keys {
    list: [u64; BINDING_KEYS_MAX],
    count: usize,
}

impl Keys {
    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = BindingKey> + '_ {
        self.list[..self.count].iter().filter_map(|&bits| BindingKey::from_bits(bits))
    }

    /// All of them in an array's first places, with how many.
    pub(crate) fn with<R>(&self, work: impl FnOnce(&[BindingKey]) -> R) -> Option<R> {
        let first = self.iter().next()?;
        let mut all = [first; BINDING_KEYS_MAX];
        for (place, key) in all.iter_mut().zip(self.iter()) {
            *place = key;
        }
        Some(work(&all[..self.count]))
    }
}

/// The IMSI of a User-Name: digits, perhaps before a realm (TS 23.003 14.3).
fn digits(name: &[u8]) -> Option<&[u8]> {
    let end = memchr::memchr(b'@', name).unwrap_or(name.len());
    let name = &name[..end];
    let good = (6..=16).contains(&name.len()) && name.iter().all(u8::is_ascii_digit);
    good.then_some(name)
}

/// The upper 64 bits: a gateway delegates a /64, and an application names an address in it as /128.
fn prefix(data: &[u8]) -> Option<[u8; 8]> {
    let bits = usize::from(*data.get(1)?);
    if !(1..=128).contains(&bits) {
        return None;
    }
    let mut upper = [0; 8];
    let given = &data[2..];
    let count = given.len().min(8);
    upper[..count].copy_from_slice(&given[..count]);
    if bits < 64 {
        let kept = u64::from_be_bytes(upper) & (u64::MAX << (64 - bits));
        upper = kept.to_be_bytes();
    }
    Some(upper)
}

/// A 64-bit number of an AVP.
pub(crate) fn number64(data: &[u8]) -> Option<u64> {
    (data.len() == 8).then_some(())?;
    Some(u64::from(number32(data, 0)?) << 32 | u64::from(number32(data, 4)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::{Builder, append};

    #[test]
    fn names_are_found_and_brought_to_one_form() {
        let subscription = |kind: u32, data: &str| {
            let mut group = Vec::new();
            append(&mut group, SUBSCRIPTION_ID_TYPE, 0x40, &kind.to_be_bytes());
            append(&mut group, SUBSCRIPTION_ID_DATA, 0x40, data.as_bytes());
            group
        };
        let mut bytes = Vec::new();
        Builder::request(&mut bytes, 272, 16_777_238, 1, 1)
            .bytes(SUBSCRIPTION_ID, &subscription(0, "+4912345"))
            .bytes(SUBSCRIPTION_ID, &subscription(1, "001010000000001"))
            .bytes(SUBSCRIPTION_ID, &subscription(2, "sip:a@b"))
            .bytes(FRAMED_IP_ADDRESS, &[10, 0, 0, 1])
            .bytes(FRAMED_IPV6_PREFIX, &[0, 64, 0x20, 1, 0xd, 0xb8, 0, 0, 0, 1])
            .text(CALLED_STATION_ID, "internet")
            .finish();
        let found = Subscriber::of(&bytes);
        assert_eq!(found.imsi, Some(&b"001010000000001"[..]));
        assert_eq!(found.msisdn, Some(&b"4912345"[..]));
        assert_eq!(found.ip, Some(&[10, 0, 0, 1][..]));
        let whole = [&[0, 128, 0x20, 1, 0xd, 0xb8, 0, 0, 0, 1][..], &[9; 8][..]].concat();
        assert_eq!(prefix(&whole), found.prefix);
        assert_eq!(prefix(&[0, 0]), None);
        assert_eq!(prefix(&[0, 129, 1]), None);
        assert_eq!(prefix(&[]), None);
        assert_eq!(digits(b"001010000000001@epc.example"), Some(&b"001010000000001"[..]));
        assert_eq!(digits(b"alice@example"), None);
    }
}
