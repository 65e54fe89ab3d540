//! What is known of a peer before its first message: its certificate, its credentials, what a proxy
//! in front said of it.

use std::net::{IpAddr, SocketAddr};

use crate::Transport;

/// A connection that opened, with all that is known of the other side.
#[derive(Clone, Copy, Debug)]
pub struct Opened<'a> {
    /// The other side's address; behind a trusted proxy, the one that the proxy told.
    pub remote: SocketAddr,
    /// Our address of it; behind a trusted proxy, the one that the client had called.
    pub local: SocketAddr,
    /// What it runs over.
    pub transport: Transport,
    /// What else is known.
    pub facts: &'a PeerFacts,
}

/// What is known of a peer. All of it was verified by the runtime, except where it says otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PeerFacts {
    /// The certificate that it showed, if its chain leads to a configured authority.
    pub certificate: Option<Certificate>,
    /// The name that it asked for in its ClientHello (SNI), in lower case. Its own word.
    pub server_name: Option<String>,
    /// The application protocol: agreed on, where TLS ends here; else the first that it offered.
    pub alpn: Option<Vec<u8>>,
    /// Who is behind a unix socket, by the kernel's word (SO_PEERCRED).
    pub credentials: Option<Credentials>,
    /// What a trusted proxy told by the PROXY protocol.
    pub proxied: Option<Proxied>,
    /// The first bytes, where the listener looks at them before it routes ([`Intake::peek`]); they
    /// are still to be relayed.
    pub first_bytes: Vec<u8>,
}

impl PeerFacts {
    /// Nothing is known.
    pub const NONE: Self = Self {
        certificate: None,
        server_name: None,
        alpn: None,
        credentials: None,
        proxied: None,
        first_bytes: Vec::new(),
    };
}

/// A verified certificate's names.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Certificate {
    /// The subject's common name; for logs and rules, never for identity checks (RFC 6125 6.4.4).
    pub common_name: Option<String>,
    /// DNS names (subjectAltName), as written.
    pub dns: Vec<String>,
    /// URIs (subjectAltName), as written: `sip:example.net`, `aaa://host.example.net`.
    pub uris: Vec<String>,
    /// Addresses (subjectAltName).
    pub addresses: Vec<IpAddr>,
}

impl Certificate {
    /// Whether it stands for exactly this DNS name, without regard to letter case and without
    /// wildcards, which neither SIP (RFC 5922 7.2) nor Diameter identities (RFC 6733 13.1) know.
    #[must_use]
    pub fn is_for(&self, name: &str) -> bool {
        self.dns.iter().any(|dns| dns.eq_ignore_ascii_case(name))
    }

    /// Whether it stands for this SIP domain: a URI `sip:domain` without a user, or, only where
    /// there is no SIP URI at all, a DNS name (RFC 5922 7.1).
    #[must_use]
    pub fn is_for_sip_domain(&self, domain: &str) -> bool {
        let mut sip = self
            .uris
            .iter()
            .filter_map(|uri| {
                let (scheme, rest) = uri.split_once(':')?;
                scheme.eq_ignore_ascii_case("sip").then_some(rest)
            })
            .peekable();
        if sip.peek().is_none() {
            return self.is_for(domain);
        }
        sip.any(|rest| rest.eq_ignore_ascii_case(domain))
    }

    /// Whether it stands for this Diameter identity: a DNS name, or a URI `aaa://` or `aaas://` of
    /// that host (RFC 6733 4.3.1).
    #[must_use]
    pub fn is_for_diameter(&self, origin_host: &str) -> bool {
        let of_uri = |uri: &String| {
            let (scheme, rest) = uri.split_once("://").unwrap_or_default();
            let host = rest.split([':', ';', '/']).next().unwrap_or_default();
            (scheme.eq_ignore_ascii_case("aaa") || scheme.eq_ignore_ascii_case("aaas"))
                && host.eq_ignore_ascii_case(origin_host)
        };
        self.is_for(origin_host) || self.uris.iter().any(of_uri)
    }
}

/// Who is behind a unix socket (unix(7), SO_PEERCRED).
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Credentials {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Process, if the kernel told.
    pub pid: Option<i32>,
}

/// What a trusted proxy told (the PROXY protocol, versions 1 and 2).
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Proxied {
    /// The proxy itself.
    pub via: SocketAddr,
    /// Type and value of what version 2 carried besides; to be passed on.
    pub tlvs: Vec<(u8, Vec<u8>)>,
}

/// What the runtime does with a connection before the engine hears of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Intake {
    /// Look at the first bytes: at most so many, for at most so long. What came by then is told.
    pub peek: Option<Peek>,
}

/// How first bytes are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peek {
    /// Wait for a whole ClientHello, if the bytes begin like one, and tell its SNI and ALPN.
    pub client_hello: bool,
    /// Wait for so many bytes of what is not a ClientHello.
    pub bytes: usize,
    /// Wait so long at most; protocols in which the server speaks first send nothing.
    pub timeout: std::time::Duration,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_compared_as_their_rfcs_say() {
        let text = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect();
        let certificate = |dns: &[&str], uris: &[&str]| Certificate {
            dns: text(dns),
            uris: text(uris),
            ..Certificate::default()
        };
        let plain = certificate(&["Peer.example.net", "*.example.org"], &[]);
        assert!(plain.is_for("peer.EXAMPLE.net") && plain.is_for_sip_domain("peer.example.net"));
        assert!(!plain.is_for("a.example.org"), "wildcards name nobody");
        let sip = certificate(&["example.net"], &["sip:example.org", "SIP:atlanta.example"]);
        assert!(sip.is_for_sip_domain("example.org") && sip.is_for_sip_domain("atlanta.example"));
        assert!(!sip.is_for_sip_domain("example.net"), "a SIP URI puts DNS names aside");
        assert!(!certificate(&[], &["sip:bob@example.org"]).is_for_sip_domain("example.org"));
        let diameter = certificate(&[], &["aaas://hss.example.net:5658;transport=tcp"]);
        assert!(diameter.is_for_diameter("hss.example.net"));
        assert!(!diameter.is_for_diameter("pcrf.example.net"));
    }
}
