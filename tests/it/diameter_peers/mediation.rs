//! Rules and pseudonyms, from YAML to the wire.

use strowger_diameter::avp::{Avps, Summary, code};

use super::emitted::{Client, ccr, measured, server};
use super::{Tap, config, dissects, header, relayed, text, until_up};
use crate::harness::{Edge, alone, free_port};

const RULES: &str = "
      mediation:
        dictionary: |
          vendor acme 9999
          vendor-of-avps acme
          avp 7 Acme-Note UTF8String -
        rules:
          - when: { message: request, application: [gy], command: [CCR], avp: { CC-Request-Type: INITIAL_REQUEST } }
            set: { Destination-Realm: home.example.net, Subscription-Id.Subscription-Id-Data: '26201' }
            add: { Acme-Note: by the edge }
            copy: { User-Name: Service-Context-Id }
          - when: { message: answer }
            set: { Session-Timeout: 60 }
            remove: [Origin-State-Id]
        hide: { key: 000102030405060708090a0b0c0d0e0f, hosts: ['a.example.net'], from: ['*.example.net'] }";

fn avp(message: &[u8], vendor: u32, code: u32) -> Option<Vec<u8>> {
    let mut avps = Avps::of(message).map(|avp| avp.expect("whole"));
    avps.find(|avp| avp.vendor == vendor && avp.code == code).map(|avp| avp.data.to_vec())
}

#[test]
fn rules_and_pseudonyms_from_yaml_to_the_wire() {
    let _alone = alone();
    let (port, one) = (free_port(), free_port());
    let _mute = server(one, "a.example.net");
    let (back, front) = (Tap::to(one), Tap::to(port));
    let yaml = config(port, &[("a", back.port)], "").replace(
        "    options: { origin_host: edge.example.net, answer_timeout: 20s }",
        &format!(
            "    options:\n      origin_host: edge.example.net\n      answer_timeout: 20s{RULES}"
        ),
    );
    assert!(yaml.contains("mediation"), "{yaml}");
    let edge = Edge::start(&yaml);
    until_up(&edge, &["a"]);
    let mut client = Client::connect(front.port);
    assert_eq!(client.introduce("client.example.net", 4), Some(2_001));
    let sent = ccr("client.example.net;1;1", 4, &[]);
    assert_eq!(client.ask(&sent), Some(2_001));
    let requests = relayed(&back.forth());
    let got = &requests[0];
    assert_eq!(text(Summary::of(got).destination_realm), "home.example.net");
    assert_eq!(avp(got, 9_999, 7).as_deref(), Some(&b"by the edge"[..]));
    assert_eq!(avp(got, 0, code::USER_NAME).as_deref(), Some(&b"test@example.net"[..]));
    assert!(avp(got, 0, 443).is_some_and(|group| group.ends_with(b"26201\0\0\0")));
    // What no rule names is as it came: the AVPs before the first change, byte for byte.
    let same = Avps::of(&sent).flatten().next().expect("an AVP").whole.len() + 20;
    assert_eq!(got[20..same], sent[20..same]);
    assert_eq!(header(got).end_to_end, header(&sent).end_to_end);
    // The client knows the server by a pseudonym, and reaches it by that.
    let answers = front.back();
    let answer = answers.last().expect("an answer");
    let pseudonym = text(Summary::of(answer).origin_host);
    assert!(pseudonym.starts_with("h-") && pseudonym.ends_with(".example.net"), "{pseudonym}");
    assert_eq!(avp(answer, 0, 27).as_deref(), Some(&[0, 0, 0, 60][..]));
    let second = ccr("client.example.net;1;1", 4, &[(code::DESTINATION_HOST, &pseudonym)]);
    assert_eq!(client.ask(&second), Some(2_001));
    let requests = relayed(&back.forth());
    assert_eq!(text(Summary::of(&requests[1]).destination_host), "a.example.net");
    let leaked = front
        .back()
        .iter()
        .skip(1)
        .any(|message| message.windows(13).any(|part| part == b"a.example.net"));
    assert!(!leaked, "the server's name reached the client");
    assert!(edge.metric("strowger_protocol_total", &["diameter_rules_applied"]) >= 3.0);
    // tshark knows no vendor 9999, and says so.
    let known = back.forth().into_iter().filter(|message| avp(message, 9_999, 7).is_none());
    dissects(&front.back().into_iter().chain(known).collect::<Vec<_>>());
}

/// Routes by names, of which one is only in the operator's dictionary file; each route with rules of
/// its own, for its requests and their answers.
#[test]
fn routes_have_names_and_rules_of_their_own() {
    let _alone = alone();
    let (port, one) = (free_port(), free_port());
    let _mute = server(one, "a.example.net");
    let (back, front) = (Tap::to(one), Tap::to(port));
    let folder = tempfile::TempDir::new().expect("a folder");
    let file = folder.path().join("acme.dict");
    let definitions = "vendor acme 9999\nvendor-of-avps acme\navp 7 Acme-Note UTF8String -\n";
    std::fs::write(&file, definitions).expect("written");
    let route = |note: &str, realm: &str, timeout: u32| {
        format!(
            "      - match: {{ application: [Gy], command: [CCR], avp: [ {{ path: Acme-Note, is: [{note}] }}, {{ path: CC-Request-Type, is: [INITIAL_REQUEST] }} ] }}
        pool: servers
        rules:
          - {{ when: {{ message: request }}, set: {{ Destination-Realm: {realm} }}, remove: [Acme-Note] }}
          - {{ when: {{ message: answer }}, set: {{ Session-Timeout: {timeout} }} }}\n"
        )
    };
    let yaml = config(port, &[("a", back.port)], &format!(
        ", mediation: {{ dictionary_file: {}, rules: [ {{ when: {{ message: answer }}, set: {{ Session-Timeout: 7 }} }} ] }}",
        file.display()
    ))
    .replace(
        "    routes: [ { match: { application: [acct, gy] }, pool: servers } ]\n",
        &format!(
            "    routes:\n{}{}      - {{ match: {{ application: [gy] }}, pool: servers }}\n",
            route("gold", "gold.example.net", 90),
            route("tin", "tin.example.net", 91)
        ),
    );
    assert!(yaml.contains("gold"), "{yaml}");
    let edge = Edge::start(&yaml);
    until_up(&edge, &["a"]);
    let mut client = Client::connect(front.port);
    assert_eq!(client.introduce("client.example.net", 4), Some(2_001));
    let noted = |note: &[u8]| {
        let mut message = ccr("client.example.net;1;1", 4, &[]);
        message.extend_from_slice(&7u32.to_be_bytes());
        message.extend_from_slice(&[0x80, 0, 0, 12 + note.len() as u8]);
        message.extend_from_slice(&9_999u32.to_be_bytes());
        message.extend_from_slice(note);
        message.resize(message.len().next_multiple_of(4), 0);
        measured(message)
    };
    for (note, realm, timeout) in [
        (&b"gold"[..], "gold.example.net", 90),
        (&b"tin"[..], "tin.example.net", 91),
        (&b"lead"[..], "example.net", 7),
    ] {
        assert_eq!(client.ask(&noted(note)), Some(2_001));
        let requests = relayed(&back.forth());
        let got = requests.last().expect("it came");
        assert_eq!(text(Summary::of(got).destination_realm), realm);
        assert_eq!(avp(got, 9_999, 7).is_none(), timeout != 7);
        let answers = front.back();
        let answer = answers.last().expect("an answer");
        assert_eq!(avp(answer, 0, 27).as_deref(), Some(&[0, 0, 0, timeout][..]));
    }
    // The file is read anew when the configuration is, and a bad one changes nothing.
    std::fs::write(&file, "avp x").expect("written");
    let (code, body) = edge.put_config(&yaml);
    assert!(code == 422 || code == 400, "{code} {body}");
    assert!(body.contains("dictionary_file") && body.contains("no number"), "{body}");
    assert_eq!(client.ask(&noted(b"gold")), Some(2_001));
}
