#![no_main]
//! Any bytes as a URI, a name-addr, a host and port.
use libfuzzer_sys::fuzz_target;
use strowger_sip::uri;

fuzz_target!(|bytes: &[u8]| {
    if let Some(uri) = uri::Uri::parse(bytes) {
        let _all = (uri.is_loose(), uri.transport(), uri.address(), uri.parameter(b"lr"));
    }
    let _all = (uri::name_addr(bytes), uri::tag(bytes), uri::split_host_port(bytes));
    let _all = (uri::parse_ip(bytes), uri::parameter(bytes, b"tag"));
});
