//! `WWW-Authenticate`: how a registry wants to be convinced (RFC 9110, 11.6.1).

/// A way to authenticate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// User and password with each request.
    Basic,
    /// A token, which another service gives.
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

/// The challenges of one header that are known; a token is preferred.
pub(super) fn parse(header: &str) -> Vec<Challenge> {
    let mut found = vec![];
    let mut rest = header;
    while let Some((scheme, parameters, after)) = next(rest) {
        let get = |name: &str| {
            let fits = |(key, _): &&(String, String)| key.eq_ignore_ascii_case(name);
            parameters.iter().find(fits).map(|(_, value)| value.clone())
        };
        match scheme.to_ascii_lowercase().as_str() {
            "basic" => found.push(Challenge::Basic),
            "bearer" => {
                if let Some(realm) = get("realm") {
                    found
                        .insert(0, Challenge::Bearer { realm, service: get("service"), scope: get("scope") });
                }
            }
            _ => {}
        }
        rest = after;
    }
    found
}

type Parameters = Vec<(String, String)>;

/// The next scheme, its parameters, and what follows them.
fn next(text: &str) -> Option<(&str, Parameters, &str)> {
    let text = text.trim_start_matches([' ', ',', '\t']);
    let (scheme, mut rest) = token(text)?;
    let mut parameters = vec![];
    loop {
        let at = rest.trim_start_matches([' ', ',', '\t']);
        let Some((name, after)) = token(at) else { break };
        // Without an equals sign it is the next scheme.
        let Some(after) = after.trim_start().strip_prefix('=') else { break };
        let (value, after) = value(after.trim_start());
        parameters.push((name.to_owned(), value));
        rest = after;
    }
    Some((scheme, parameters, rest))
}

fn token(text: &str) -> Option<(&str, &str)> {
    let is_token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    let end = text.find(|c| !is_token(c)).unwrap_or(text.len());
    if end == 0 { None } else { Some(text.split_at(end)) }
}

/// A token or a quoted text.
fn value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let (value, rest) = token(text).unwrap_or(("", text));
        return (value.to_owned(), rest.trim_start_matches('='));
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, quoted.get(at + 1..).unwrap_or_default()),
            '\\' => value.extend(characters.next().map(|(_, character)| character)),
            character => value.push(character),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        Challenge::Bearer {
            realm: realm.into(),
            service: service.map(Into::into),
            scope: scope.map(Into::into),
        }
    }

    #[test]
    fn challenges_of_registries_are_read() {
        let docker = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/nginx:pull,push""#;
        let expected = bearer(
            "https://auth.docker.io/token",
            Some("registry.docker.io"),
            Some("repository:library/nginx:pull,push"),
        );
        assert_eq!(parse(docker), [expected]);
        assert_eq!(parse(r#"Basic realm="Registry Realm""#), [Challenge::Basic]);
        assert_eq!(
            parse(r#"basic realm=x, Bearer realm="a\"b", charset=utf-8"#),
            [bearer("a\"b", None, None), Challenge::Basic]
        );
        assert_eq!(parse(r#"Negotiate, Digest nonce="x,y" , BASIC"#), [Challenge::Basic]);
    }

    #[test]
    fn malformed_challenges_end_and_give_nothing_wrong() {
        for text in
            ["", ",,,", "\"", "Bearer", "Bearer realm", "Bearer realm=", "=", "Bearer service=\"x", "é=1"]
        {
            let found = parse(text);
            assert!(
                found.iter().all(
                    |challenge| matches!(challenge, Challenge::Bearer { realm, .. } if realm.is_empty())
                ),
                "{text}: {found:?}"
            );
        }
    }
}
