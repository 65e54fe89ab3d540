//! How an admin API is reached from outside: its URL, and over TLS whom to believe and who one is. The
//! agent and the command line use it.

use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};

use crate::routing::{TlsClientSpec, TlsVersion, Verify};
use crate::tls::Client;

/// Where an admin API is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// `127.0.0.1:9080`, `[::1]:9080`, `edge-1.example.net:9443`.
    pub authority: String,
    /// Whether it speaks TLS.
    pub tls: bool,
}

impl Target {
    /// Reads `http://host:port` or `https://host:port`.
    ///
    /// # Errors
    /// What was expected.
    pub fn parse(url: &str) -> Result<Self, String> {
        let wrong =
            || format!("`{url}` is no edge; write http://127.0.0.1:9080 or https://host:9443");
        let (tls, rest) = match (url.strip_prefix("https://"), url.strip_prefix("http://")) {
            (Some(rest), _) => (true, rest),
            (None, Some(rest)) => (false, rest),
            (None, None) => return Err(wrong()),
        };
        let rest = rest.trim_end_matches('/');
        let (host, port) = rest.rsplit_once(':').ok_or_else(wrong)?;
        let good =
            !host.is_empty() && !rest.contains('/') && port.parse::<u16>().is_ok_and(|it| it > 0);
        if good { Ok(Self { authority: rest.to_owned(), tls }) } else { Err(wrong()) }
    }

    /// Reads the same, or an address alone, which is spoken to in plain text.
    ///
    /// # Errors
    /// What was expected.
    pub fn of_command_line(text: &str) -> Result<Self, String> {
        if text.contains("://") {
            Self::parse(text)
        } else {
            Self::parse(&format!("http://{text}"))
        }
    }

    /// Whether it is on this host, by its address.
    #[must_use]
    pub fn is_local(&self) -> bool {
        self.host() == "localhost"
            || self.authority.parse::<SocketAddr>().is_ok_and(|it| it.ip().is_loopback())
    }

    /// Its host, without port and brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        let host = self.authority.rsplit_once(':').map_or("", |(host, _)| host);
        host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
    }

    /// `https://host:port`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("{}://{}", if self.tls { "https" } else { "http" }, self.authority)
    }
}

/// What TLS to a target rests on.
#[derive(Clone, Copy, Debug)]
pub struct Trust<'a> {
    /// Who vouches for the edge: PEM.
    pub ca: Option<&'a Path>,
    /// What its certificate must name, if not its URL's host.
    pub name: Option<&'a str>,
    /// Our own certificate's chain: PEM.
    pub certificate: Option<&'a Path>,
    /// Its key: PEM.
    pub key: Option<&'a Path>,
}

impl Trust<'_> {
    /// What it means for a target: `None` for one in plain text.
    ///
    /// # Errors
    /// What is missing, or is there for nothing.
    pub fn of(&self, target: &Target) -> Result<Option<TlsClientSpec>, String> {
        if !target.tls {
            let none = self.ca.is_none()
                && self.name.is_none()
                && self.certificate.is_none()
                && self.key.is_none();
            let message = "an authority, a name or a certificate is for https:// only";
            return if none { Ok(None) } else { Err(message.to_owned()) };
        }
        let ca = self.ca.ok_or("https:// needs the authority that vouches for the edge (ca)")?;
        let certificate = match (self.certificate, self.key) {
            (Some(certificate), Some(key)) => Some((certificate.to_owned(), key.to_owned())),
            (None, None) => None,
            _ => return Err("a certificate and its key come together".to_owned()),
        };
        let name = self.name.unwrap_or_else(|| target.host());
        if ServerName::try_from(name).is_err() {
            return Err(format!("`{name}` is neither a DNS name nor an address"));
        }
        Ok(Some(TlsClientSpec {
            ca: Some(PathBuf::from(ca)),
            name: Some(name.to_owned()),
            verify: Verify::Name,
            certificate,
            alpn: Vec::new(),
            min_version: TlsVersion::V1_2,
        }))
    }
}

/// Whom a handshake is with.
///
/// # Errors
/// The name is none; [`Trust::of`] has looked before.
pub fn server_name(spec: &TlsClientSpec) -> Result<ServerName<'static>, String> {
    let name = spec.name.clone().unwrap_or_default();
    ServerName::try_from(name).map_err(|error| error.to_string())
}

/// A connection of the command line.
pub enum Stream {
    /// In plain text.
    Plain(TcpStream),
    /// Over TLS.
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Stream {
    /// Connects, and bounds each wait for the other side.
    ///
    /// # Errors
    /// Nobody listens, or what is wrong with the files.
    pub fn connect(target: &Target, trust: &Trust<'_>, limit: Duration) -> std::io::Result<Self> {
        let wrong =
            |message: String| std::io::Error::new(std::io::ErrorKind::InvalidInput, message);
        let spec = trust.of(target).map_err(wrong)?;
        let mut last = wrong(format!("`{}` has no address", target.host()));
        let mut socket = None;
        for address in target.authority.to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, limit) {
                Ok(stream) => {
                    socket = Some(stream);
                    break;
                }
                Err(error) => last = error,
            }
        }
        let Some(socket) = socket else { return Err(last) };
        socket.set_read_timeout(Some(limit))?;
        socket.set_write_timeout(Some(limit))?;
        let Some(spec) = spec else { return Ok(Self::Plain(socket)) };
        let config = Client::new(&spec).map_err(wrong)?.config();
        let session =
            ClientConnection::new(Arc::clone(&config), server_name(&spec).map_err(wrong)?)
                .map_err(std::io::Error::other)?;
        let mut stream = StreamOwned::new(session, socket);
        // The handshake now: what is wrong with a certificate is no broken answer.
        stream.conn.complete_io(&mut stream.sock)?;
        Ok(Self::Tls(Box::new(stream)))
    }
}

impl std::io::Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }
}

impl std::io::Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        match self {
            Self::Plain(stream) => stream.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read_and_what_is_none_is_told() {
        let good = Target::parse("https://[::1]:9443/").expect("an edge");
        assert_eq!((good.host(), good.tls, good.is_local()), ("::1", true, true));
        assert_eq!(good.url(), "https://[::1]:9443");
        let plain = Target::of_command_line("10.0.0.1:9080").expect("an edge");
        assert_eq!((plain.host(), plain.tls, plain.is_local()), ("10.0.0.1", false, false));
        for wrong in ["", "ftp://h:1", "http://h", "http://:1", "http://h:0", "http://h:1/x"] {
            assert!(Target::parse(wrong).is_err_and(|it| it.contains(wrong)), "{wrong}");
        }
    }

    #[test]
    fn what_tls_rests_on_must_be_whole() {
        let file = Path::new("f.pem");
        let nothing = Trust { ca: None, name: None, certificate: None, key: None };
        let plain = Target::parse("http://h:1").expect("an edge");
        let secure = Target::parse("https://h:1").expect("an edge");
        assert_eq!(nothing.of(&plain), Ok(None));
        assert!(Trust { ca: Some(file), ..nothing }.of(&plain).is_err());
        assert!(nothing.of(&secure).is_err_and(|it| it.contains("(ca)")));
        let half = Trust { ca: Some(file), certificate: Some(file), ..nothing };
        assert!(half.of(&secure).is_err_and(|it| it.contains("come together")));
        assert!(Trust { ca: Some(file), name: Some("a b"), ..nothing }.of(&secure).is_err());
        let spec = Trust { ca: Some(file), ..nothing }.of(&secure).expect("whole").expect("TLS");
        assert_eq!(spec.name.as_deref(), Some("h"));
    }
}
