//! Certificates, keys and authorities out of files.

use std::path::Path;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

/// A file's size, at most: system bundles of authorities have about 250 KiB.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Reads a file whole.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, String> {
    let told = |error: &dyn std::fmt::Display| format!("`{}` {error}", path.display());
    let about =
        std::fs::metadata(path).map_err(|error| told(&format!("cannot be read: {error}")))?;
    if about.len() > FILE_BYTES_MAX {
        return Err(told(&format!("is over {FILE_BYTES_MAX} bytes long")));
    }
    std::fs::read(path).map_err(|error| told(&format!("cannot be read: {error}")))
}

/// Certificates out of PEM; at least one.
pub(super) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let bytes = read(path)?;
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let list = read.map_err(|error| format!("`{}` is no PEM: {error}", path.display()))?;
    if list.is_empty() {
        return Err(format!("`{}` has no CERTIFICATE section", path.display()));
    }
    Ok(list)
}

/// A private key out of PEM: PKCS#8, PKCS#1 or SEC1.
pub(super) fn key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|error| {
        format!("`{}` has no usable private key (PKCS#8, PKCS#1, SEC1): {error}", path.display())
    })
}

/// Authorities out of PEM.
pub(super) fn authorities(path: &Path) -> Result<Arc<RootCertStore>, String> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(path)? {
        store
            .add(certificate)
            .map_err(|error| format!("`{}` has an unusable authority: {error}", path.display()))?;
    }
    Ok(Arc::new(store))
}

/// A chain with its key, which must belong together, and its OCSP answer (DER) to staple.
pub(super) fn certified(
    certificate: &Path,
    key_file: &Path,
    ocsp: Option<&Path>,
) -> Result<CertifiedKey, String> {
    let chain = certificates(certificate)?;
    let key = key(key_file)?;
    let signing = super::provider().key_provider.load_private_key(key).map_err(|error| {
        format!("`{}` is of a kind that cannot be used: {error}", key_file.display())
    })?;
    let mut certified = CertifiedKey::new(chain, signing);
    certified.keys_match().map_err(|_| {
        format!("`{}` is not the key of `{}`", key_file.display(), certificate.display())
    })?;
    certified.ocsp = ocsp.map(read).transpose()?;
    Ok(certified)
}
