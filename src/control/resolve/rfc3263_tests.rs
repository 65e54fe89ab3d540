//! The walk, against a table of records.

use std::collections::HashMap;
use std::str::FromStr as _;
use std::sync::Mutex;

use hickory_resolver::proto::rr::rdata::{A, AAAA, NAPTR, SRV};
use strowger_contract::Transports;

use super::*;

#[derive(Default)]
struct Zone {
    records: HashMap<(String, RecordType), Vec<RData>>,
    silent: Vec<(String, RecordType)>,
    asked: Mutex<Vec<String>>,
}

impl Dns for Zone {
    async fn records(&self, name: &Name, kind: RecordType) -> Result<Records, Miss> {
        let key = (name.to_ascii(), kind);
        self.asked.lock().expect("no panic").push(format!("{} {kind}", key.0));
        let until = Instant::now() + Duration::from_secs(60);
        if self.silent.contains(&key) {
            return Err(Miss::Silent { until });
        }
        let data = self.records.get(&key).cloned();
        data.map(|data| Records { data, until }).ok_or(Miss::Absent { until })
    }
}

impl Zone {
    fn with(mut self, name: &str, data: RData) -> Self {
        self.records.entry((name.to_owned(), data.record_type())).or_default().push(data);
        self
    }

    fn a(self, name: &str, address: &str) -> Self {
        let ip = address.parse().expect("an address");
        let data = match ip {
            IpAddr::V4(ip) => RData::A(A(ip)),
            IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
        };
        self.with(name, data)
    }

    fn srv(self, name: &str, priority: u16, weight: u16, port: u16, target: &str) -> Self {
        let target = Name::from_str(target).expect("a name");
        self.with(name, RData::SRV(SRV::new(priority, weight, port, target)))
    }

    fn naptr(self, name: &str, order: u16, flags: &str, service: &str, to: &str) -> Self {
        let bytes = |text: &str| text.as_bytes().into();
        let to = Name::from_str(to).expect("a name");
        let record = NAPTR::new(order, 10, bytes(flags), bytes(service), bytes(""), to);
        self.with(name, RData::NAPTR(record))
    }

    /// What it answers, as text.
    fn find(&self, lookup: &Lookup) -> Vec<String> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let host = name_of(b"example.net").expect("a name");
        match runtime.block_on(find(self, &host, lookup)) {
            Ok(found) => found
                .places(1)
                .iter()
                .map(|place| format!("{}://{}", place.transport.scheme(), place.address))
                .collect(),
            Err(Miss::Absent { .. }) => vec!["absent".to_owned()],
            Err(Miss::Silent { .. }) => vec!["silent".to_owned()],
        }
    }
}

fn lookup(scheme: NameScheme, transport: Option<Transport>, port: Option<u16>) -> Lookup {
    let transports =
        [Transport::Udp, Transport::Tcp, Transport::Tls].into_iter().collect::<Transports>();
    Lookup { scheme, transport, port, transports, ipv4: true, ipv6: true, seed: 0 }
}

fn whole_zone() -> Zone {
    Zone::default()
        .naptr("example.net.", 90, "s", "SIP+D2T", "_sip._tcp.example.net.")
        .naptr("example.net.", 100, "s", "SIP+D2U", "_sip._udp.example.net.")
        .naptr("example.net.", 50, "S", "sips+d2t", "_sips._tcp.example.net.")
        .naptr("example.net.", 1, "u", "E2U+sip", ".")
        .srv("_sip._tcp.example.net.", 1, 0, 5070, "a.example.net.")
        .srv("_sip._udp.example.net.", 2, 0, 5080, "b.example.net.")
        .srv("_sip._udp.example.net.", 1, 0, 5081, "a.example.net.")
        .srv("_sips._tcp.example.net.", 1, 0, 5071, "a.example.net.")
        .a("a.example.net.", "192.0.2.1")
        .a("a.example.net.", "2001:db8::1")
        .a("b.example.net.", "192.0.2.2")
        .a("example.net.", "192.0.2.9")
}

/// RFC 3263 4.1: the most preferred service that both sides have.
#[test]
fn naptr_chooses_the_transport() {
    let zone = whole_zone();
    let all = zone.find(&lookup(NameScheme::Sip, None, None));
    let kinds: Vec<&str> = all.iter().map(|place| &place[..3]).collect();
    assert_eq!(kinds, ["tls", "tls", "tcp", "tcp", "udp", "udp", "udp"], "{all:?}");
    assert_eq!(all[6], "udp://192.0.2.2:5080", "the higher number of SRV last");
    let datagrams = Lookup {
        transports: Transports::NONE.with(Transport::Udp),
        ..lookup(NameScheme::Sip, None, None)
    };
    assert!(zone.find(&datagrams).iter().all(|place| place.starts_with("udp://")));
    let secure = zone.find(&lookup(NameScheme::Sips, None, None));
    assert!(secure.iter().all(|place| place.starts_with("tls://")), "{secure:?}");
    assert_eq!(secure.len(), 2);
}

/// RFC 3263 4.1, 4.2: a port or a transport in the URI ends the choice.
#[test]
fn what_the_uri_says_holds() {
    let zone = whole_zone();
    let asked = |scheme, transport, port| zone.find(&lookup(scheme, transport, port));
    assert_eq!(asked(NameScheme::Sip, None, Some(5099)), ["udp://192.0.2.9:5099"]);
    assert_eq!(asked(NameScheme::Sips, None, Some(5099)), ["tls://192.0.2.9:5099"]);
    assert_eq!(asked(NameScheme::Sip, Some(Transport::Tcp), Some(5099)), ["tcp://192.0.2.9:5099"]);
    let tcp = asked(NameScheme::Sip, Some(Transport::Tcp), None);
    assert!(tcp.contains(&"tcp://192.0.2.1:5070".to_owned()) && tcp.len() == 2, "{tcp:?}");
}

#[test]
fn without_records_the_address_is_taken() {
    let plain = Zone::default().a("example.net.", "192.0.2.9");
    assert_eq!(plain.find(&lookup(NameScheme::Sip, None, None)), ["udp://192.0.2.9:5060"]);
    assert_eq!(plain.find(&lookup(NameScheme::Sips, None, None)), ["tls://192.0.2.9:5061"]);
    let asked = plain.asked.lock().expect("no panic").clone();
    assert_eq!(
        asked[..4],
        [
            "example.net. NAPTR",
            "_sip._udp.example.net. SRV",
            "_sip._tcp.example.net. SRV",
            "_sips._tcp.example.net. SRV"
        ]
    );
    let nothing = Zone::default();
    assert_eq!(nothing.find(&lookup(NameScheme::Sip, None, None)), ["absent"]);
}

/// RFC 3263 5: a response asks for SRV records of its transport, and for no NAPTR.
#[test]
fn a_response_asks_by_its_transport() {
    let zone = whole_zone();
    let response = lookup(NameScheme::SipResponse, Some(Transport::Udp), None);
    assert_eq!(zone.find(&response).last().map(String::as_str), Some("udp://192.0.2.2:5080"));
    assert!(zone.asked.lock().expect("no panic").iter().all(|name| !name.ends_with("NAPTR")));
    let with_port = lookup(NameScheme::SipResponse, Some(Transport::Udp), Some(5090));
    assert_eq!(zone.find(&with_port), ["udp://192.0.2.9:5090"]);
}

/// One record that nobody answers for costs that record.
#[test]
fn silence_about_one_record_does_not_end_the_walk() {
    let mut zone = whole_zone();
    zone.silent.push(("example.net.".to_owned(), RecordType::NAPTR));
    zone.silent.push(("a.example.net.".to_owned(), RecordType::AAAA));
    let found = zone.find(&lookup(NameScheme::Sip, None, None));
    assert!(found.contains(&"udp://192.0.2.1:5081".to_owned()), "{found:?}");
    let mut all = Zone::default();
    for kind in [RecordType::A, RecordType::AAAA] {
        all.silent.push(("example.net.".to_owned(), kind));
    }
    assert_eq!(all.find(&lookup(NameScheme::Sip, None, Some(5060))), ["silent"]);
}

#[test]
fn a_service_that_is_decidedly_not_there_is_not_used() {
    let zone = Zone::default()
        .srv("_sip._udp.example.net.", 0, 0, 0, ".")
        .srv("_sip._tcp.example.net.", 0, 0, 5060, "a.example.net.")
        .a("a.example.net.", "192.0.2.1")
        .a("a.example.net.", "0.0.0.0");
    let found = zone.find(&lookup(NameScheme::Sip, None, None));
    assert_eq!(found, ["tcp://192.0.2.1:5060"]);
}

#[test]
fn what_is_no_name_is_told() {
    for bad in [&b""[..], b".", b"a..b", b"\xff.net", &[b'a'; 64], &[b'.'; 300]] {
        assert_eq!(name_of(bad), Err(Unresolved::Malformed), "{bad:?}");
    }
    assert_eq!(name_of(b"Example.NET.").map(|name| name.to_ascii()).as_deref(), Ok("Example.NET."));
}
