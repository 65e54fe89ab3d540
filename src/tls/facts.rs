//! What a verified peer calls itself.

use std::net::IpAddr;

use strowger_contract::Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// Names that are kept of one certificate, at most.
const NAMES_MAX: usize = 256;

/// The names in a certificate (DER); empty ones if it cannot be read.
#[must_use]
pub fn certificate(der: &[u8]) -> Certificate {
    let mut names = Certificate::default();
    let Ok((_, parsed)) = X509Certificate::from_der(der) else { return names };
    let common = parsed.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    names.common_name = common.map(str::to_owned);
    let Ok(Some(alternative)) = parsed.subject_alternative_name() else { return names };
    for name in alternative.value.general_names.iter().take(NAMES_MAX) {
        match name {
            GeneralName::DNSName(name) => names.dns.push((*name).to_owned()),
            GeneralName::URI(uri) => names.uris.push((*uri).to_owned()),
            GeneralName::IPAddress(bytes) => names.addresses.extend(address(bytes)),
            _ => {}
        }
    }
    names
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes)
        .map(IpAddr::from)
        .or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from))
        .ok()
}
