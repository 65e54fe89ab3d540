//! Listeners: a certificate by SNI, client certificates, tickets.

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{ServerConfig, server::ProducesTickets};

use super::load;
use crate::routing::{ClientAuth, TlsServerSpec};

/// A listener's configuration, as it is now.
#[derive(Debug)]
pub struct Server {
    config: ArcSwap<ServerConfig>,
    tickets: Arc<dyn ProducesTickets>,
}

impl Server {
    /// Makes one.
    ///
    /// # Errors
    /// What is wrong with the files.
    pub fn new(spec: &TlsServerSpec) -> Result<Self, String> {
        let tickets = rustls::crypto::ring::Ticketer::new()
            .map_err(|error| format!("no key for session tickets: {error}"))?;
        let config = build(spec, &tickets).map_err(|(_, message)| message)?;
        Ok(Self { config: ArcSwap::from_pointee(config), tickets })
    }

    /// For the next handshake.
    #[must_use]
    pub fn config(&self) -> Arc<ServerConfig> {
        self.config.load_full()
    }

    /// Reads the files again. Tickets stay good, unless clients are verified: a ticket would pass by
    /// an authority that is no longer trusted.
    ///
    /// # Errors
    /// What is wrong with the files; the old configuration stays.
    pub fn reload(&self, spec: &TlsServerSpec) -> Result<(), String> {
        let fresh = || rustls::crypto::ring::Ticketer::new().map_err(|error| error.to_string());
        let tickets = if spec.client_ca.is_some() { fresh()? } else { Arc::clone(&self.tickets) };
        let config = build(spec, &tickets).map_err(|(_, message)| message)?;
        self.config.store(Arc::new(config));
        Ok(())
    }
}

/// All that is wrong with a listener's files, each with its path under `tls`.
#[must_use]
pub fn check(spec: &TlsServerSpec) -> Vec<(String, String)> {
    let mut errors = Vec::new();
    for (index, files) in spec.certificates.iter().enumerate() {
        let loaded = load::certified(&files.certificate, &files.key, files.ocsp.as_deref());
        errors.extend(loaded.err().map(|message| (format!("certificates[{index}]"), message)));
    }
    if let Some(file) = &spec.client_ca {
        let loaded = load::authorities(file);
        errors.extend(loaded.err().map(|message| ("client_ca".to_owned(), message)));
    }
    errors
}

fn build(
    spec: &TlsServerSpec,
    tickets: &Arc<dyn ProducesTickets>,
) -> Result<ServerConfig, (String, String)> {
    let mut certificates = BySni::default();
    for (index, files) in spec.certificates.iter().enumerate() {
        let certified = load::certified(&files.certificate, &files.key, files.ocsp.as_deref())
            .map_err(|message| (format!("certificates[{index}]"), message))?;
        certificates.add(certified);
    }
    let at_ca = |message: String| ("client_ca".to_owned(), message);
    let builder = ServerConfig::builder_with_provider(super::provider())
        .with_protocol_versions(super::versions(spec.min_version))
        .map_err(|error| ("min_version".to_owned(), error.to_string()))?;
    let builder = match (&spec.client_ca, spec.client) {
        (Some(file), mode) if mode != ClientAuth::Off => {
            let roots = load::authorities(file).map_err(at_ca)?;
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, super::provider());
            let verifier = match mode {
                ClientAuth::Optional => verifier.allow_unauthenticated(),
                _ => verifier,
            };
            let verifier = verifier.build().map_err(|error| at_ca(error.to_string()))?;
            builder.with_client_cert_verifier(verifier)
        }
        _ => builder.with_no_client_auth(),
    };
    let mut config = builder.with_cert_resolver(Arc::new(certificates));
    config.alpn_protocols = spec.alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    config.ticketer = Arc::clone(tickets);
    Ok(config)
}

/// Certificates by the name that the client asks for; the first one is for those who ask for none,
/// or for a name that no certificate has.
#[derive(Debug, Default)]
struct BySni {
    first: Option<Arc<CertifiedKey>>,
    /// Lower case; `*.example.net` stands as `.example.net`.
    names: HashMap<String, Arc<CertifiedKey>>,
}

impl BySni {
    fn add(&mut self, certified: CertifiedKey) {
        let certified = Arc::new(certified);
        let names = certified.cert.first().map(|der| super::certificate(der)).unwrap_or_default();
        // Old certificates have their only name in the subject.
        let common = names.common_name.filter(|_| names.dns.is_empty());
        for name in names.dns.into_iter().chain(common) {
            let name = name.to_ascii_lowercase();
            let name = name.strip_prefix('*').map_or_else(|| name.clone(), str::to_owned);
            self.names.entry(name).or_insert_with(|| Arc::clone(&certified));
        }
        self.first.get_or_insert(certified);
    }
}

impl ResolvesServerCert for BySni {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let exact = hello.server_name().and_then(|name| {
            let name = name.to_ascii_lowercase();
            let parent = || name.find('.').and_then(|dot| self.names.get(&name[dot..]));
            self.names.get(&name).or_else(parent)
        });
        exact.or(self.first.as_ref()).cloned()
    }
}
