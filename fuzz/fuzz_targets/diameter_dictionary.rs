#![no_main]
//! Any text as a dictionary: an error names a place in it, and what was read is found by its name.
use libfuzzer_sys::fuzz_target;
use strowger_diameter::dictionary::Dictionary;

fuzz_target!(|text: &str| {
    match Dictionary::extended(text) {
        Ok(dictionary) => {
            for avp in dictionary.avps() {
                let _found = (dictionary.avp_named(&avp.name), dictionary.avp(avp.vendor, avp.code));
            }
            let word = text.split_whitespace().next().unwrap_or_default();
            let _found = (dictionary.application(word), dictionary.commands(word));
            let _near = dictionary.near(word);
        }
        Err(errors) => {
            assert!(!errors.is_empty());
            for error in errors {
                let line = text.lines().nth(error.line - 1).expect("a line of the text");
                assert!((1..=line.chars().count() + 1).contains(&error.column), "{error}");
            }
        }
    }
});
