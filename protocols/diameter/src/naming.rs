//! Names that configurations use, and the numbers that they mean by a dictionary.

use crate::dictionary::{AvpDefinition, Dictionary, Kind};
use crate::mediation::edit::Step;
use crate::mediation::rules::Value;
use crate::options::Application;

fn hint(near: Option<impl std::fmt::Display>) -> String {
    near.map(|near| format!("; did you mean `{near}`?")).unwrap_or_default()
}

/// An application's number.
///
/// # Errors
/// The dictionary does not have the name.
pub(crate) fn application(dictionary: &Dictionary, wanted: &Application) -> Result<u32, String> {
    match wanted {
        Application::Number(number) => Ok(*number),
        Application::Name(name) => dictionary.application(name).ok_or_else(|| {
            let hint = hint(dictionary.near_application(name));
            format!(
                "there is no application `{name}` in the dictionary (its number would do){hint}"
            )
        }),
    }
}

/// The numbers of those applications that are known.
pub(crate) fn applications(dictionary: &Dictionary, wanted: &[Application]) -> Vec<u32> {
    wanted.iter().filter_map(|wanted| application(dictionary, wanted).ok()).collect()
}

/// The codes of a command: `CCR`, `Credit-Control`, or the code. Applications share some names
/// (SNR): then it is all of them.
///
/// # Errors
/// The dictionary does not have the name, or the number is no command code.
pub(crate) fn commands(dictionary: &Dictionary, wanted: &Value) -> Result<Vec<u32>, String> {
    const CODE_MAX: u32 = 0x00ff_ffff;
    let (codes, name) = match wanted {
        Value::Number(number) => (u32::try_from(*number).ok().into_iter().collect(), ""),
        Value::Text(name) => match name.parse() {
            Ok(code) => (vec![code], ""),
            Err(_) => (dictionary.commands(name), name.as_str()),
        },
    };
    if codes.is_empty() && !name.is_empty() {
        let hint = hint(dictionary.near_command(name));
        return Err(format!("there is no command `{wanted}` in the dictionary{hint}"));
    }
    if codes.is_empty() || codes.iter().any(|code| *code > CODE_MAX) {
        return Err(format!("`{wanted}` is no command code, which has 24 bits"));
    }
    Ok(codes)
}

/// A path of at most `depth` names with dots or slashes between them, all but the last of groups.
/// Numbers (`443`, `10415:1032`) need not be in the dictionary: then nothing is known of the last.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn path<'a>(
    dictionary: &'a Dictionary,
    text: &str,
    depth: usize,
) -> Result<(Vec<Step>, Option<&'a AvpDefinition>), String> {
    let names: Vec<&str> = text.split(['.', '/']).collect();
    if names.len() > depth {
        return Err(format!("has more than {depth} steps"));
    }
    let (mut steps, mut last) = (Vec::new(), None);
    for (index, name) in names.iter().enumerate() {
        let avp = dictionary.avp_named(name);
        let step = match avp {
            Some(avp) => {
                Some(Step { code: avp.code, vendor: avp.vendor, mandatory: avp.mandatory })
            }
            None => numbered(name),
        };
        let Some(step) = step else {
            let hint = hint(dictionary.near(name));
            return Err(format!("there is no AVP `{name}` in the dictionary{hint}"));
        };
        if let Some(avp) = avp
            && index + 1 < names.len()
            && avp.kind != Kind::Grouped
        {
            return Err(format!("{} is a {} and has no members", name, avp.kind.name()));
        }
        steps.push(step);
        last = avp;
    }
    Ok((steps, last))
}

/// `CODE` or `VENDOR:CODE`.
fn numbered(name: &str) -> Option<Step> {
    let (vendor, code) = name.split_once(':').unwrap_or(("0", name));
    Some(Step { vendor: vendor.parse().ok()?, code: code.parse().ok()?, mandatory: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_mean_the_same() {
        let known = Dictionary::built_in();
        let name = |name: &str| Application::Name(name.into());
        assert_eq!(application(known, &name("Gx")), Ok(16_777_238));
        assert_eq!(application(known, &Application::Number(77)), Ok(77));
        let wrong = application(known, &name("s6x")).expect_err("there is none");
        assert!(wrong.contains("did you mean `s6"), "{wrong}");
        for (text, codes) in [("CCR", vec![272]), ("272", vec![272]), ("SNR", vec![308, 8_388_636])]
        {
            assert_eq!(commands(known, &Value::Text(text.into())), Ok(codes));
        }
        assert_eq!(commands(known, &Value::Number(316)), Ok(vec![316]));
        let wrong = commands(known, &Value::Text("Credit-Contol".into())).expect_err("none");
        assert!(wrong.contains("did you mean `Credit-Control`"), "{wrong}");
        assert!(commands(known, &Value::Number(-1)).is_err());
        assert!(commands(known, &Value::Number(1 << 24)).is_err());
        let steps = |text: &str| path(known, text, 4).map(|(steps, _)| steps);
        let by_name = steps("Subscription-Id.Subscription-Id-Data").expect("a path");
        assert_eq!(steps("443/444"), Ok(by_name));
        assert_eq!(steps("99999:7").map(|steps| steps[0].vendor), Ok(99_999));
        for (bad, why) in [
            ("Subscripton-Id", "did you mean `Subscription-Id`"),
            ("Origin-Host.Session-Id", "has no members"),
            ("443/443/443/443/444", "more than 4"),
            ("", "no AVP"),
        ] {
            let told = steps(bad).expect_err("wrong");
            assert!(told.contains(why), "{bad}: {told}");
        }
    }
}
