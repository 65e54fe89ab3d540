//! A ClientHello is looked at without ending TLS here: its SNI and ALPN, for routes.

use rustls::server::Acceptor;

/// The first byte of a TLS handshake record.
const HANDSHAKE: u8 = 22;

/// What a look at the first bytes finds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// More bytes are needed.
    More,
    /// It is no ClientHello.
    Other,
    /// The name and the first protocol that it offers.
    Hello { server_name: Option<String>, alpn: Option<Vec<u8>> },
}

/// Looks at bytes as they come.
#[derive(Default)]
pub(crate) struct HelloReader {
    acceptor: Acceptor,
    seen: usize,
}

impl HelloReader {
    /// Looks at all bytes so far.
    pub(crate) fn look(&mut self, bytes: &[u8]) -> Look {
        match bytes.first() {
            None => return Look::More,
            Some(&first) if first != HANDSHAKE => return Look::Other,
            Some(_) => {}
        }
        while self.seen < bytes.len() {
            match self.acceptor.read_tls(&mut &bytes[self.seen..]) {
                Ok(0) | Err(_) => return Look::Other,
                Ok(count) => self.seen += count,
            }
            match self.acceptor.accept() {
                Ok(None) => {}
                Ok(Some(accepted)) => {
                    let hello = accepted.client_hello();
                    let alpn = hello.alpn().and_then(|mut names| names.next().map(<[u8]>::to_vec));
                    let server_name = hello.server_name().map(str::to_ascii_lowercase);
                    return Look::Hello { server_name, alpn };
                }
                Err(_) => return Look::Other,
            }
        }
        Look::More
    }
}
