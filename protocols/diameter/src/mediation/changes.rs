//! What a listener's configuration has done to the messages that pass: the relay's one way in.

use std::borrow::Cow;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use strowger_contract::OptionsError;

use super::hiding::{Hide, Hiding};
use super::rules::{Applied, Mediation, Rule};
use crate::dictionary::Dictionary;

/// A listener's `mediation`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MediationOptions {
    /// A file with definitions; its text comes before that of `dictionary`.
    pub dictionary_file: Option<String>,
    /// Definitions besides the built-in dictionary, in its own format (docs/diameter-rules.md).
    pub dictionary: String,
    /// Rules, in the order in which they are applied.
    pub rules: Vec<Rule>,
    /// Hosts that clients know by pseudonyms only.
    pub hide: Option<Hide>,
}

impl MediationOptions {
    /// The dictionary that names in the options are meant by; what is wrong with the operator's part
    /// of it is appended to `errors`, and then it is left out.
    pub(crate) fn dictionary(&self, errors: &mut Vec<OptionsError>) -> Cow<'static, Dictionary> {
        if self.dictionary.is_empty() {
            return Cow::Borrowed(Dictionary::built_in());
        }
        match Dictionary::extended(&self.dictionary) {
            Ok(extended) => Cow::Owned(extended),
            Err(wrong) => {
                let key =
                    if self.dictionary_file.is_some() { "dictionary_file" } else { "dictionary" };
                errors.extend(wrong.iter().map(|error| OptionsError {
                    path: format!("mediation.{key}"),
                    message: error.to_string(),
                }));
                Cow::Borrowed(Dictionary::built_in())
            }
        }
    }
}

/// Ready for work.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    mediation: Mediation,
    hiding: Option<Hiding>,
    scratch: Vec<u8>,
    /// Where a request is restored.
    spare: Vec<u8>,
}

impl Changes {
    /// Makes it ready; what is wrong with the options is appended to `errors`.
    pub(crate) fn new(
        options: &MediationOptions,
        realm: &str,
        dictionary: &Dictionary,
        errors: &mut Vec<OptionsError>,
    ) -> Self {
        let mediation = Mediation::new(&options.rules, dictionary, "mediation.rules", errors);
        let hide = options.hide.as_ref();
        let hiding = hide.and_then(|hide| Hiding::new(hide, realm, "mediation.hide", errors));
        Self { mediation, hiding, ..Self::default() }
    }

    /// Changes the message at a buffer's end, from `start` on: it is about to go to a backend.
    /// The rules of its route come after the listener's.
    pub(crate) fn for_backend(
        &mut self,
        out: &mut Vec<u8>,
        start: usize,
        route: Option<&Mediation>,
    ) -> Applied {
        let mut applied = Applied::default();
        for rules in std::iter::once(&self.mediation).chain(route) {
            if !rules.is_empty() {
                applied = applied.and(rules.apply(out, start, &mut self.scratch));
            }
        }
        applied
    }

    /// The same for one that goes to a client, whose identity this is.
    pub(crate) fn for_client(
        &mut self,
        out: &mut Vec<u8>,
        start: usize,
        client: &[u8],
        route: Option<&Mediation>,
    ) -> Applied {
        let applied = self.for_backend(out, start, route);
        if let Some(hiding) = self.hiding.as_ref().filter(|hiding| hiding.is_for(client)) {
            hiding.hide_in(out, start, &mut self.scratch);
        }
        applied
    }

    /// A client's request with the host that it means, if it named a pseudonym. To be given back
    /// by [`Self::recycle`].
    pub(crate) fn revealed(&mut self, request: &[u8]) -> Option<Vec<u8>> {
        let hiding = self.hiding.as_ref()?;
        self.spare.clear();
        let found = hiding.reveal_in(request, &mut self.spare, &mut self.scratch);
        found.then(|| std::mem::take(&mut self.spare))
    }

    pub(crate) fn recycle(&mut self, spare: Vec<u8>) {
        self.spare = spare;
    }
}
