//! TLS: from files to rustls's configurations, once for all protocols.
//!
//! | module | what it does |
//! |---|---|
//! | `load` | certificates, keys and authorities out of files |
//! | `server` | listeners: a certificate by SNI, client certificates |
//! | `client` | backends: who they must be |
//! | `store` | configurations in use, and their reload when files change |
//! | `facts` | what a verified peer calls itself |
//! | `failure` | why a handshake failed, in words for logs and metrics |

mod client;
mod facts;
mod failure;
mod load;
mod server;
mod store;

use std::sync::Arc;

use rustls::crypto::CryptoProvider;

pub use client::{Client, check as check_client};
pub use facts::certificate;
pub use failure::{Failure, failure};
pub use server::{Server, check as check_server};
pub use store::Store;

use crate::routing::TlsVersion;

fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: std::sync::OnceLock<Arc<CryptoProvider>> = std::sync::OnceLock::new();
    Arc::clone(PROVIDER.get_or_init(|| Arc::new(rustls::crypto::ring::default_provider())))
}

fn versions(min: TlsVersion) -> &'static [&'static rustls::SupportedProtocolVersion] {
    static BOTH: [&rustls::SupportedProtocolVersion; 2] =
        [&rustls::version::TLS13, &rustls::version::TLS12];
    match min {
        TlsVersion::V1_2 => &BOTH,
        TlsVersion::V1_3 => &BOTH[..1],
    }
}
