//! The errors that are rarer, provoked and read by tshark: framing, realms, and what a CER may not have.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::TcpListener;
use std::thread;

use strowger_diameter::avp::{FLAG_REQUEST, Summary, code};
use strowger_diameter::build::{Builder, append};

use super::emitted::{Client, answer_to, ccr, measured, read, server};
use super::{CER, Tap, config, dissects, header, until_up};
use crate::harness::{Edge, alone, free_port};

const CCR: u32 = 272;
const CREDIT_CONTROL: u32 = 4;

/// Port-Limit, of RADIUS: tshark knows it, the edge's dictionary does not.
const UNKNOWN_TO_US: u32 = 62;

fn cer(host: Option<&str>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut builder = Builder::new(&mut bytes, FLAG_REQUEST, CER, 0, 1, 1);
    if let Some(host) = host {
        builder = builder.text(code::ORIGIN_HOST, host);
    }
    builder
        .text(code::ORIGIN_REALM, "example.net")
        .address(code::HOST_IP_ADDRESS, "127.0.0.1".parse().expect("an address"))
        .number(code::VENDOR_ID, 0)
        .avp(code::PRODUCT_NAME, 0, b"test")
        .application(CREDIT_CONTROL)
        .finish();
    bytes
}

/// A server that introduces itself over the connection that the edge opened.
fn mistaken(port: u16) {
    let listener = TcpListener::bind(("127.0.0.1", port)).expect("a free port");
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut buffer = Vec::new();
            while let Some(message) = read(&mut stream, &mut buffer) {
                if header(&message).is_request() {
                    let _gone = stream.write_all(&answer_to(&message, "b.example.net"));
                    if header(&message).command == CER {
                        let _gone = stream.write_all(&cer(Some("b.example.net")));
                    }
                }
            }
        }
    });
}

#[test]
fn rare_errors_dissect_as_well() {
    let _alone = alone();
    let (port, one, two) = (free_port(), free_port(), free_port());
    let _mute = server(one, "a.example.net");
    mistaken(two);
    let (first, second, front) = (Tap::to(one), Tap::to(two), Tap::to(port));
    let yaml = config(port, &[("a", first.port), ("b", second.port)], "")
        .replace("application: [acct, gy]", "application: [gy], realm: example.net");
    let edge = Edge::start(&yaml);
    until_up(&edge, &["a", "b"]);
    let client = || {
        let mut client = Client::connect(front.port);
        assert_eq!(client.introduce("client.example.net", CREDIT_CONTROL), Some(2_001));
        client
    };
    let mut steady = client();
    let mut abroad = Vec::new();
    Builder::request(&mut abroad, CCR, CREDIT_CONTROL, 9, 10)
        .text(code::SESSION_ID, "client.example.net;1;7")
        .text(code::ORIGIN_HOST, "client.example.net")
        .text(code::ORIGIN_REALM, "example.net")
        .text(code::DESTINATION_REALM, "elsewhere.test")
        .finish();
    assert_eq!(steady.ask(&abroad), Some(3_003));
    let bare = measured(abroad[..20].to_vec());
    assert_eq!(steady.ask(&bare), Some(5_015));
    let good = ccr("client.example.net;1;1", CREDIT_CONTROL, &[]);
    assert_eq!(steady.ask(&good), Some(2_001), "the connection stays");
    // What follows these could be anything: they are answered, and the connection ends.
    let mut newer = good.clone();
    newer[0] = 2;
    let mut odd = good.clone();
    odd.extend_from_slice(&[0, 0]);
    for (message, result) in [(newer, 5_011), (measured(odd), 5_015)] {
        let mut client = client();
        assert_eq!(client.ask(&message), Some(result));
        assert_eq!(client.next(), None);
    }
    // A CER is for the edge itself: what it must understand there, it must.
    let with = |code: u32, flags: u8| {
        let mut message = cer(Some("client.example.net"));
        append(&mut message, code, flags, &[0, 0, 0, 1]);
        measured(message)
    };
    for (message, result) in [
        (with(code::FIRMWARE_REVISION, 0x08), 3_009),
        (with(UNKNOWN_TO_US, 0x40), 5_001),
        (cer(None), 5_005),
    ] {
        let mut client = Client::connect(front.port);
        assert_eq!(client.ask(&message), Some(result));
        assert_eq!(client.next(), None);
    }
    let mut tolerated = Client::connect(front.port);
    assert_eq!(tolerated.ask(&with(UNKNOWN_TO_US, 0)), Some(2_001), "without M it is passed over");
    assert_eq!(steady.ask(&good), Some(2_001), "others do not notice");
    let results = |messages: &[Vec<u8>]| -> BTreeSet<(u32, u32)> {
        let answers = messages.iter().filter(|message| !header(message).is_request());
        let result =
            |message: &Vec<u8>| Some((header(message).command, Summary::of(message).result_code?));
        answers.filter_map(result).collect()
    };
    edge.until("the answer to the mistaken server", |_| {
        results(&second.forth()).contains(&(CER, 5_012))
    });
    let emitted: Vec<Vec<u8>> = front.back().into_iter().chain(second.forth()).collect();
    let told = results(&emitted);
    for wanted in [
        (CCR, 3_003),
        (CCR, 5_011),
        (CCR, 5_015),
        (CER, 3_009),
        (CER, 5_001),
        (CER, 5_005),
        (CER, 5_012),
    ] {
        assert!(told.contains(&wanted), "no {wanted:?}: {told:?}");
    }
    for message in &emitted {
        if let Some(result) = Summary::of(message).result_code {
            let is_protocol_error = (3_000..4_000).contains(&result);
            assert_eq!(message[4] & 0x20 != 0, is_protocol_error, "E of {result}");
        }
    }
    // The Failed-AVP of 3009 shows the bits that were wrong, as it must.
    let shows_a_fault = |message: &&Vec<u8>| Summary::of(message).result_code == Some(3_009);
    dissects(
        &emitted.iter().filter(|message| !shows_a_fault(message)).cloned().collect::<Vec<_>>(),
    );
}
