//! Tokens of the admin API and what each may do: a YAML file of its own, so that it can be kept
//! from other eyes.
//!
//! ```yaml
//! tokens:
//!   - { name: agent-h1, token: 7f3c…, pools: [ims, "pcrf-*"], rights: [register, drain] }
//! ```

use strowger_contract::Certificate;

use super::Source;
use super::read::Reader;
use super::tree;

/// Letters of a token, at least: guessing must be hopeless.
const TOKEN_MIN: usize = 16;

/// What a token may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Right {
    /// Look at everything.
    Read,
    /// Register instances of its pools, renew them, take them back.
    Register,
    /// Drain instances of its pools.
    Drain,
    /// Replace the configuration.
    Config,
}

const RIGHTS: [(&str, Right); 4] = [
    ("read", Right::Read),
    ("register", Right::Register),
    ("drain", Right::Drain),
    ("config", Right::Config),
];

/// A token and its rights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permission {
    /// Whose it is, for logs.
    pub name: String,
    /// What is shown; empty if a certificate is.
    pub token: String,
    /// The name in a client's certificate (subjectAltName, else its common name) that stands for it.
    pub certificate: Option<String>,
    /// Pools that it is for; `*` at the end stands for any rest.
    pub pools: Vec<String>,
    /// What it may do.
    pub rights: Vec<Right>,
}

impl Permission {
    /// Whether a verified certificate stands for it. The common name counts only where there is no
    /// other (RFC 6125 6.4.4).
    #[must_use]
    pub fn is_of(&self, certificate: &Certificate) -> bool {
        let Some(wanted) = &self.certificate else { return false };
        let bare = certificate.dns.is_empty() && certificate.uris.is_empty();
        certificate.is_for(wanted)
            || certificate.uris.iter().any(|uri| uri == wanted)
            || bare && certificate.common_name.as_ref() == Some(wanted)
    }

    /// Whether it may, on a pool if it is about one.
    #[must_use]
    pub fn allows(&self, right: Right, pool: Option<&str>) -> bool {
        let fits = |pattern: &String, pool: &str| match pattern.strip_suffix('*') {
            Some(start) => pool.starts_with(start),
            None => pattern == pool,
        };
        self.rights.contains(&right)
            && pool.is_none_or(|pool| self.pools.iter().any(|pattern| fits(pattern, pool)))
    }
}

/// Reads the file.
pub(super) fn read(file: &str) -> Result<Vec<Permission>, String> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| format!("`{file}` cannot be read: {error}"))?;
    let mut reader = Reader { file: file.to_owned(), ..Reader::default() };
    let mut permissions = Vec::new();
    let source = Source { name: file.to_owned(), text };
    if let Some(root) = tree::parse(&source, &mut reader.errors)
        && let Some(fields) = reader.fields(&root, "", &["tokens"])
        && let Some(list) = fields.need(&mut reader, "tokens")
    {
        for (index, node) in reader.list(list, "tokens").iter().enumerate() {
            let path = format!("tokens[{index}]");
            let known = ["name", "token", "certificate", "pools", "rights"];
            let Some(fields) = reader.fields(node, &path, &known) else { continue };
            let name = fields.need_text(&mut reader, "name");
            let certificate = fields.text(&mut reader, "certificate");
            // Who shows a certificate needs no word besides.
            let token = match &certificate {
                Some(_) => fields.text(&mut reader, "token").or_else(|| Some(String::new())),
                None => fields.need_text(&mut reader, "token"),
            };
            let short = |token: &String| token.len() < TOKEN_MIN && !token.is_empty();
            if token.as_ref().is_some_and(short) {
                let message = format!("is too short: at least {TOKEN_MIN} letters");
                reader.wrong(fields.node_of("token"), &fields.path_of("token"), message);
            }
            let mut pools = Vec::new();
            if let Some(node) = fields.get("pools") {
                let path = fields.path_of("pools");
                for (index, pool) in reader.list(node, &path).iter().enumerate() {
                    pools.extend(reader.text(pool, &format!("{path}[{index}]")));
                }
            }
            let mut rights = Vec::new();
            if let Some(node) = fields.need(&mut reader, "rights") {
                let path = fields.path_of("rights");
                for (index, right) in reader.list(node, &path).iter().enumerate() {
                    rights.extend(reader.choice(right, &format!("{path}[{index}]"), &RIGHTS));
                }
            }
            if let Some((name, token)) = name.zip(token) {
                permissions.push(Permission { name, token, certificate, pools, rights });
            }
        }
    }
    match reader.errors.first() {
        None => Ok(permissions),
        Some(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_are_by_pool() {
        let permission = Permission {
            name: "x".to_owned(),
            token: String::new(),
            certificate: None,
            pools: vec!["ims".to_owned(), "pcrf-*".to_owned()],
            rights: vec![Right::Register],
        };
        let may = |pool| permission.allows(Right::Register, Some(pool));
        assert!(may("ims") && may("pcrf-1") && !may("ims2") && !may("pcrf"));
        assert!(!permission.allows(Right::Drain, Some("ims")));
        assert!(!permission.allows(Right::Read, None));
    }
}
