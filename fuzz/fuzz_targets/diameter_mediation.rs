#![no_main]
//! Rules on any message: what was well-formed stays so, and what stands before it is not touched.
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use strowger_diameter::avp::{Avps, HEADER_BYTES, number24};
use strowger_diameter::dictionary::Dictionary;
use strowger_diameter::mediation::rules::Value;
use strowger_diameter::mediation::{Mediation, Rule};

const BEFORE: &[u8] = b"another message";

fn rules() -> &'static Mediation {
    static RULES: OnceLock<Mediation> = OnceLock::new();
    RULES.get_or_init(|| {
        let text = |text: &str| Value::Text(text.to_owned());
        let mut conditional = Rule::default();
        conditional.when.avp.insert("Subscription-Id.Subscription-Id-Data".into(), text("0*"));
        conditional.remove = vec!["Subscription-Id.Subscription-Id-Type".into()];
        conditional.set.insert("Destination-Realm".into(), text("example.net"));
        let always = Rule {
            remove: vec!["User-Name".into(), "Failed-AVP.Session-Id".into()],
            copy: [("Service-Information.PS-Information.Called-Station-Id", "Called-Station-Id")]
                .map(|(to, from)| (to.to_owned(), from.to_owned()))
                .into(),
            set: [("Subscription-Id.Subscription-Id-Data".to_owned(), text("1"))].into(),
            add: [("Session-Timeout".to_owned(), Value::Number(60))].into(),
            ..Rule::default()
        };
        let mut errors = Vec::new();
        let dictionary = Dictionary::built_in();
        let rules = Mediation::new(&[conditional, always], dictionary, "rules", &mut errors);
        assert!(errors.is_empty(), "{errors:?}");
        rules
    })
}

fn well_formed(message: &[u8]) -> bool {
    message.len() >= HEADER_BYTES
        && number24(message, 1).is_some_and(|length| length as usize == message.len())
        && Avps::of(message).all(|avp| avp.is_ok())
}

fuzz_target!(|bytes: &[u8]| {
    let mut message = bytes.to_vec();
    if message.len() >= HEADER_BYTES && message[0] & 1 == 0 {
        // Without its right length, little would be tried.
        let length = (message.len() as u32).to_be_bytes();
        message[1..4].copy_from_slice(&length[1..]);
    }
    let good = well_formed(&message);
    let mut out = [BEFORE, &message].concat();
    let applied = rules().apply(&mut out, BEFORE.len(), &mut Vec::new());
    assert_eq!(&out[..BEFORE.len()], BEFORE);
    let after = &out[BEFORE.len()..];
    if good {
        assert!(well_formed(after), "{applied:?} {message:x?} {after:x?}");
        assert!(applied.rules >= 1);
        assert_eq!(after[4..HEADER_BYTES], message[4..HEADER_BYTES]);
    }
});
