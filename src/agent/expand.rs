//! `${NAME}` and `${NAME:-default}` in programs, arguments and values. `$$` is a dollar sign.

/// Fills variables in.
///
/// # Errors
/// A variable that is not set and has no default, or braces that do not end.
pub(crate) fn expand(
    text: &str,
    lookup: &dyn Fn(&str) -> Option<String>,
) -> Result<String, String> {
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(more) = after.strip_prefix('$') {
            out.push('$');
            rest = more;
        } else if let Some(inner) = after.strip_prefix('{') {
            let Some(end) = inner.find('}') else {
                return Err(format!("`${{` without `}}` in `{text}`"));
            };
            let (name, default) = match inner[..end].split_once(":-") {
                Some((name, default)) => (name, Some(default)),
                None => (&inner[..end], None),
            };
            let value = lookup(name).filter(|value| default.is_none() || !value.is_empty());
            match value.or_else(|| default.map(str::to_owned)) {
                Some(value) => out.push_str(&value),
                None => {
                    return Err(format!("`{name}` is not set; ${{{name}:-default}} has a default"));
                }
            }
            rest = &inner[end + 1..];
        } else {
            out.push('$');
            rest = after;
        }
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_in() {
        let lookup = |name: &str| match name {
            "PORT" => Some("5060".to_owned()),
            "EMPTY" => Some(String::new()),
            _ => None,
        };
        let fill = |text: &str| expand(text, &lookup);
        assert_eq!(fill("a:${PORT}/$$x$y").as_deref(), Ok("a:5060/$x$y"));
        assert_eq!(fill("${NONE:-d}${EMPTY:-e}${EMPTY}").as_deref(), Ok("de"));
        assert!(fill("${NONE}").is_err_and(|text| text.contains("`NONE` is not set")));
        assert!(fill("${PORT").is_err());
    }
}
