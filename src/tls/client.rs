//! Backends: who they must be, and who we are for them.

use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};

use super::load;
use crate::routing::{TlsClientSpec, Verify};

/// A pool's configuration, as it is now.
#[derive(Debug)]
pub struct Client {
    config: ArcSwap<ClientConfig>,
    name: Option<String>,
}

impl Client {
    /// Makes one.
    ///
    /// # Errors
    /// What is wrong with the files.
    pub fn new(spec: &TlsClientSpec) -> Result<Self, String> {
        let config = ArcSwap::from_pointee(build(spec).map_err(|(_, message)| message)?);
        Ok(Self { config, name: spec.name.clone() })
    }

    /// For the next handshake.
    #[must_use]
    pub fn config(&self) -> Arc<ClientConfig> {
        self.config.load_full()
    }

    /// Reads the files again.
    ///
    /// # Errors
    /// What is wrong with the files; the old configuration stays.
    pub fn reload(&self, spec: &TlsClientSpec) -> Result<(), String> {
        self.config.store(Arc::new(build(spec).map_err(|(_, message)| message)?));
        Ok(())
    }

    /// Whom a backend must be: the configured name, else what it must call itself (Diameter's
    /// Origin-Host, RFC 6733 13.1), else its address.
    #[must_use]
    pub fn server_name(&self, identity: Option<&str>, address: IpAddr) -> ServerName<'static> {
        let name = self.name.as_deref().or(identity);
        name.and_then(|name| ServerName::try_from(name.to_owned()).ok())
            .unwrap_or_else(|| ServerName::from(address))
    }
}

/// All that is wrong with a pool's files, each with its path under `tls`.
#[must_use]
pub fn check(spec: &TlsClientSpec) -> Vec<(String, String)> {
    let mut errors = Vec::new();
    if let Some(name) =
        spec.name.as_ref().filter(|name| ServerName::try_from(name.as_str()).is_err())
    {
        errors.push(("name".to_owned(), format!("`{name}` is neither a DNS name nor an address")));
    }
    errors.extend(build(spec).err());
    errors
}

fn build(spec: &TlsClientSpec) -> Result<ClientConfig, (String, String)> {
    let roots = match &spec.ca {
        Some(file) => load::authorities(file).map_err(|message| ("ca".to_owned(), message))?,
        None => Arc::new(RootCertStore::empty()),
    };
    let algorithms = super::provider().signature_verification_algorithms;
    let verifier = Arc::new(Verifier { roots, verify: spec.verify, algorithms });
    let builder = ClientConfig::builder_with_provider(super::provider())
        .with_protocol_versions(super::versions(spec.min_version))
        .map_err(|error| ("min_version".to_owned(), error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match &spec.certificate {
        Some((certificate, key)) => {
            let at = |message: String| ("certificate".to_owned(), message);
            load::certified(certificate, key, None).map_err(at)?;
            let (chain, key) =
                (load::certificates(certificate).map_err(at)?, load::key(key).map_err(at)?);
            builder.with_client_auth_cert(chain, key).map_err(|error| at(error.to_string()))?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = spec.alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    Ok(config)
}

/// Checks the chain, then the name: as DNS name or address (RFC 6125), as SIP domain by a URI
/// (RFC 5922), or as Diameter identity by a URI (RFC 6733).
#[derive(Debug)]
struct Verifier {
    roots: Arc<RootCertStore>,
    verify: Verify,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if self.verify == Verify::None {
            return Ok(ServerCertVerified::assertion());
        }
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )?;
        if self.verify == Verify::Name
            && let Err(error) = verify_server_name(&parsed, server_name)
        {
            let names = super::certificate(end_entity);
            let by_uri = match server_name {
                ServerName::DnsName(name) => {
                    let name = name.as_ref();
                    names.is_for_sip_domain(name) || names.is_for_diameter(name)
                }
                _ => false,
            };
            let wrong_name = matches!(
                error,
                Error::InvalidCertificate(
                    CertificateError::NotValidForName
                        | CertificateError::NotValidForNameContext { .. }
                )
            );
            if !(by_uri && wrong_name) {
                return Err(error);
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
