//! Unix sockets among socket addresses.
//!
//! Everything that speaks of a peer speaks of a [`SocketAddr`]. A unix socket's path stands for
//! itself there as an address of the discard prefix `100::/64` (RFC 6666), which no packet can come
//! from: the lower half is the path's published hash, so that it is the same in every process. The
//! path of an address is found in a table that only grows, by what configurations name.

use std::collections::HashMap;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::{Transport, stable_hash};

/// Paths that are remembered, at most: one per backend and bind of a large configuration.
const PATHS_MAX: usize = 65_536;

/// A unix path, at most: `sun_path` less its end (unix(7)).
pub const PATH_BYTES_MAX: usize = 107;

/// The port that a named socket has; those of clients, which have no name, have 2.
const NAMED: u16 = 1;
const UNNAMED: u16 = 2;

fn paths() -> std::sync::MutexGuard<'static, HashMap<SocketAddr, Arc<str>>> {
    static PATHS: OnceLock<Mutex<HashMap<SocketAddr, Arc<str>>>> = OnceLock::new();
    PATHS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

fn address(bits: u64, port: u16) -> SocketAddr {
    let ip = Ipv6Addr::from(0x0100_u128 << 112 | u128::from(bits));
    SocketAddr::V6(SocketAddrV6::new(ip, port, 0, 0))
}

/// The address that stands for a path.
///
/// # Errors
/// The path is longer than the kernel takes, is not absolute, or the table is full.
pub fn name(path: &str) -> Result<SocketAddr, String> {
    if !path.starts_with('/') {
        return Err(format!("`{path}` is no absolute path; write unix:///run/app.sock"));
    }
    if path.len() > PATH_BYTES_MAX {
        let length = path.len();
        return Err(format!(
            "the path is {length} bytes long; at most {PATH_BYTES_MAX} are possible"
        ));
    }
    let address = address(stable_hash(path.as_bytes()), NAMED);
    let mut paths = paths();
    match paths.get(&address) {
        Some(known) if &**known == path => {}
        Some(known) => return Err(format!("`{path}` cannot be told from `{known}`; rename one")),
        None if paths.len() >= PATHS_MAX => return Err(format!("over {PATHS_MAX} unix sockets")),
        None => {
            paths.insert(address, path.into());
        }
    }
    Ok(address)
}

/// The path that an address stands for.
#[must_use]
pub fn path(address: SocketAddr) -> Option<Arc<str>> {
    paths().get(&address).cloned()
}

/// The address of a client of a unix socket, which has no name of its own: any number that differs
/// from its neighbours'.
#[must_use]
pub fn client(number: u64) -> SocketAddr {
    address(number, UNNAMED)
}

/// Whether an address stands for a unix socket, named or not.
#[must_use]
pub fn is_unix(address: SocketAddr) -> bool {
    matches!(address, SocketAddr::V6(v6) if v6.ip().octets().starts_with(&[1, 0, 0, 0, 0, 0, 0, 0]))
}

/// Transport and address as configurations write them.
#[must_use]
pub fn shown(transport: Transport, address: SocketAddr) -> String {
    match path(address).filter(|_| transport == Transport::Unix) {
        Some(path) => format!("unix://{path}"),
        None => format!("{}://{address}", transport.scheme()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_has_one_address_and_comes_back() {
        let one = name("/run/one.sock").expect("a path");
        assert_eq!(name("/run/one.sock"), Ok(one));
        assert_eq!(path(one).as_deref(), Some("/run/one.sock"));
        assert_eq!(shown(Transport::Unix, one), "unix:///run/one.sock");
        assert_ne!(name("/run/two.sock"), Ok(one));
        assert!(name("one.sock").is_err() && name(&format!("/{}", "x".repeat(107))).is_err());
        assert_eq!(path(client(7)), None);
        let plain: SocketAddr = "127.0.0.1:5060".parse().expect("an address");
        assert_eq!(shown(Transport::Udp, plain), "udp://127.0.0.1:5060");
    }
}
