//! For the fuzz targets: parsers that nobody outside calls, each with what must hold of it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use strowger_contract::BackendId;

use crate::flow::ClientFlow;
use crate::overload::{Algorithm, Overload, Told, tell};
use crate::uri::{Uri, parameter};
use crate::via::Via;

/// The `sf` of a URI: what is read is written again as what reads the same.
///
/// # Panics
/// If it is not.
pub fn flow(uri: &[u8]) {
    let Some(flow) = Uri::parse(uri).and_then(|uri| ClientFlow::read(&uri)) else { return };
    let mut again = b"sip:a@b;sf=".to_vec();
    flow.write(&mut again);
    let again = Uri::parse(&again).and_then(|uri| ClientFlow::read(&uri));
    assert_eq!(again, Some(flow), "it reads back otherwise");
}

/// A datagram that is no SIP: an answer is a STUN binding success for the request that came.
///
/// # Panics
/// If it is not.
pub fn stun(bytes: &[u8], source: SocketAddr) {
    if !crate::stun::is_no_sip(bytes) {
        return;
    }
    let mut said = Vec::new();
    match crate::stun::answer(bytes, source, &mut said) {
        None => assert!(said.is_empty(), "it says something and calls it nothing"),
        Some(()) => {
            assert!(said.len() <= 44 && said[..2] == [1, 1], "no binding success");
            assert_eq!(said[8..20], bytes[8..20], "another's transaction");
        }
    }
}

/// The `oc` parameters of a Via (RFC 7339): what an instance says of itself, and where a neighbour is told.
///
/// # Panics
/// If more is left out than there is, or a Via that asks for nothing is changed.
pub fn oc(via: &[u8], now: Instant) {
    let backend = BackendId(1);
    if let Some((via, _)) = Via::first(via) {
        let mut overload = Overload::default();
        overload.heard(now, backend, &via);
        let class = strowger_contract::ClassId::SETUP;
        let out = (0..100).filter(|_| overload.is_left_out(now, backend, class, false)).count();
        assert!(out <= 100, "more than all");
        let later = now + Duration::from_secs(86_400);
        assert!(!overload.is_left_out(later, backend, class, false), "it is believed for ever");
    }
    let told = Told {
        loss: 20,
        rate: Some(150),
        prefer: Algorithm::Loss,
        validity_ms: 500,
        sequence: (7, 42),
    };
    let mut out = b"Via: ".to_vec();
    out.extend_from_slice(via);
    let before = out.clone();
    tell(&mut out, 0, &told);
    if Via::first(via).is_none_or(|(via, _)| parameter(via.parameters, b"oc").is_none()) {
        assert_eq!(out, before, "who does not ask is told nothing");
    }
}
