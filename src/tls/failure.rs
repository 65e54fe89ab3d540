//! Why a handshake failed, in words for logs and metrics.

use std::io;

use rustls::{AlertDescription, CertificateError, Error, PeerIncompatible};

/// Why a handshake failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// A stable word, for metrics.
    pub word: &'static str,
    /// What happened, for the log.
    pub detail: String,
}

impl Failure {
    /// One of the runtime's own.
    #[must_use]
    pub fn of(word: &'static str, detail: impl Into<String>) -> Self {
        Self { word, detail: detail.into() }
    }
}

/// Tells an error apart. rustls's own errors come wrapped into [`io::Error`].
#[must_use]
pub fn failure(error: &io::Error) -> Failure {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    let word = match (inner, error.kind()) {
        (Some(error), _) => word(error),
        (None, io::ErrorKind::UnexpectedEof) => "closed",
        (None, io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe) => "reset",
        (None, io::ErrorKind::TimedOut) => "timeout",
        (None, _) => "io",
    };
    Failure { word, detail: error.to_string() }
}

fn word(error: &Error) -> &'static str {
    match error {
        Error::InvalidMessage(_) => "not_tls",
        Error::PeerIncompatible(why) => match why {
            PeerIncompatible::NoCipherSuitesInCommon => "no_common_cipher",
            PeerIncompatible::NoKxGroupsInCommon => "no_common_group",
            PeerIncompatible::NoSignatureSchemesInCommon => "no_common_signature",
            // Who names no signature algorithms speaks at most TLS 1.1.
            PeerIncompatible::SignatureAlgorithmsExtensionRequired
            | PeerIncompatible::SupportedVersionsExtensionRequired
            | PeerIncompatible::Tls12NotOffered
            | PeerIncompatible::Tls12NotOfferedOrEnabled
            | PeerIncompatible::Tls13RequiredForQuic
            | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig => "version",
            _ => "incompatible",
        },
        Error::NoApplicationProtocol => "no_common_alpn",
        Error::NoCertificatesPresented => "no_certificate",
        Error::InvalidCertificate(why) => certificate_word(why),
        Error::AlertReceived(alert) => alert_word(*alert),
        Error::PeerMisbehaved(_)
        | Error::InappropriateMessage { .. }
        | Error::InappropriateHandshakeMessage { .. } => "misbehaved",
        Error::DecryptError => "decrypt",
        Error::PeerSentOversizedRecord => "oversized_record",
        // What rustls says when no certificate could be chosen for the client's SNI.
        Error::General(text) if text.contains("no server certificate chain resolved") => "no_sni",
        _ => "other",
    }
}

fn certificate_word(why: &CertificateError) -> &'static str {
    match why {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "expired",
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "not_valid_yet"
        }
        CertificateError::Revoked => "revoked",
        CertificateError::UnknownIssuer => "unknown_authority",
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "wrong_name"
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "wrong_purpose"
        }
        CertificateError::BadSignature => "bad_signature",
        _ => "bad_certificate",
    }
}

/// What the other side did not like of us.
fn alert_word(alert: AlertDescription) -> &'static str {
    match alert {
        AlertDescription::UnknownCA => "peer_unknown_authority",
        AlertDescription::CertificateExpired => "peer_expired",
        AlertDescription::CertificateRequired | AlertDescription::NoCertificate => {
            "peer_wants_certificate"
        }
        AlertDescription::BadCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::CertificateRevoked => "peer_bad_certificate",
        AlertDescription::ProtocolVersion => "peer_version",
        AlertDescription::HandshakeFailure | AlertDescription::InsufficientSecurity => {
            "peer_no_common_cipher"
        }
        AlertDescription::UnrecognisedName => "peer_unknown_name",
        AlertDescription::NoApplicationProtocol => "peer_no_common_alpn",
        AlertDescription::AccessDenied => "peer_denied",
        AlertDescription::CloseNotify | AlertDescription::UserCanceled => "closed",
        _ => "peer_alert",
    }
}
