//! What a listener's configuration has done to the messages that pass: the relay's one way in.

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
    /// Definitions besides the built-in dictionary, in its own format (docs/diameter-rules.md).
    pub dictionary: String,
    /// Rules, in the order in which they are applied.
    pub rules: Vec<Rule>,
    /// Hosts that clients know by pseudonyms only.
    pub hide: Option<Hide>,
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
        errors: &mut Vec<OptionsError>,
    ) -> Self {
        let extended = if options.dictionary.is_empty() {
            None
        } else {
            Dictionary::extended(&options.dictionary)
                .map_err(|wrong| {
                    errors.extend(wrong.iter().map(|error| OptionsError {
                        path: "mediation.dictionary".into(),
                        message: error.to_string(),
                    }));
                })
                .ok()
        };
        let dictionary = extended.as_ref().unwrap_or_else(|| Dictionary::built_in());
        let mediation = Mediation::new(&options.rules, dictionary, "mediation.rules", errors);
        let hide = options.hide.as_ref();
        let hiding = hide.and_then(|hide| Hiding::new(hide, realm, "mediation.hide", errors));
        Self { mediation, hiding, ..Self::default() }
    }

    /// Changes the message at a buffer's end, from `start` on: it is about to go to a backend.
    pub(crate) fn for_backend(&mut self, out: &mut Vec<u8>, start: usize) -> Applied {
        if self.mediation.is_empty() {
            return Applied::default();
        }
        self.mediation.apply(out, start, &mut self.scratch)
    }

    /// The same for one that goes to a client, whose identity this is.
    pub(crate) fn for_client(&mut self, out: &mut Vec<u8>, start: usize, client: &[u8]) -> Applied {
        let applied = self.for_backend(out, start);
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
