//! Names of images: `nginx`, `docker.io/library/nginx:1.2`, `localhost:5000/a/b@sha256:…`.
//!
//! The grammar and the defaults are Docker's: what has no registry is on `docker.io`, and there in `library` unless it
//! has a folder. [`Reference::familiar`] is the short form, [`Display`](fmt::Display) the whole one.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::digest::Digest;

/// The registry of names that have none.
pub const DEFAULT_REGISTRY: &str = "docker.io";
/// The tag of names that have neither tag nor digest.
pub const DEFAULT_TAG: &str = "latest";
/// Where names without a folder are on the default registry.
const OFFICIAL: &str = "library/";
/// Characters of registry and repository together.
const NAME_MAX: usize = 255;
const TAG_MAX: usize = 128;

/// The name of an image.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// A text that is no image's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not the name of an image: {why}")]
pub struct NotAReference {
    text: String,
    why: &'static str,
}

impl Reference {
    /// From the short or the whole form.
    pub fn parse(text: &str) -> Result<Self, NotAReference> {
        parse(text).map_err(|why| NotAReference { text: text.chars().take(300).collect(), why })
    }

    /// Host and port of the registry.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The name within the registry.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest of manifest or index.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The same with the default tag if it had neither tag nor digest.
    pub fn or_latest(mut self) -> Self {
        if self.tag.is_none() && self.digest.is_none() {
            self.tag = Some(DEFAULT_TAG.to_owned());
        }
        self
    }

    /// The same repository at this digest.
    pub fn at(&self, digest: Digest) -> Self {
        let (registry, repository) = (self.registry.clone(), self.repository.clone());
        Self { registry, repository, tag: None, digest: Some(digest) }
    }

    /// Registry and repository, in the form that people type.
    pub fn familiar_name(&self) -> String {
        if self.registry != DEFAULT_REGISTRY {
            return format!("{}/{}", self.registry, self.repository);
        }
        let short = self.repository.strip_prefix(OFFICIAL).filter(|rest| !rest.contains('/'));
        short.unwrap_or(&self.repository).to_owned()
    }

    /// The form that people type.
    pub fn familiar(&self) -> String {
        self.familiar_name() + &self.suffix()
    }

    fn suffix(&self) -> String {
        let tag = self.tag.as_ref().map_or(String::new(), |tag| format!(":{tag}"));
        let digest = self.digest.map_or(String::new(), |digest| format!("@{digest}"));
        tag + &digest
    }

    /// Whether the registry is on this host, where Docker does without certificates.
    pub fn is_loopback(&self) -> bool {
        let host = host_of(&self.registry);
        host == "localhost"
            || host.parse::<Ipv4Addr>().is_ok_and(|address| address.is_loopback())
            || host.parse::<Ipv6Addr>().is_ok_and(|address| address.is_loopback())
    }
}

/// The host of `host`, `host:port`, `[v6]` or `[v6]:port`.
fn host_of(registry: &str) -> &str {
    if let Some(rest) = registry.strip_prefix('[') {
        return rest.split(']').next().unwrap_or(rest);
    }
    registry.split(':').next().unwrap_or(registry)
}

fn parse(text: &str) -> Result<Reference, &'static str> {
    let (rest, digest) = match text.split_once('@') {
        None => (text, None),
        Some((rest, digest)) => {
            let digest = digest.parse().map_err(|_| "what follows @ has to be sha256: and 64 digits")?;
            (rest, Some(digest))
        }
    };
    // A colon after the last slash begins a tag; one before it, a port.
    let last = rest.rfind('/').map_or(0, |slash| slash + 1);
    let (name, tag) = match rest.get(last..).and_then(|end| end.find(':')) {
        None => (rest, None),
        Some(colon) => {
            let (name, tag) = rest.split_at(last + colon);
            (name, Some(tag.strip_prefix(':').unwrap_or(tag)))
        }
    };
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    if name.is_empty() {
        return Err("it has no name");
    }
    if Digest::from_hex(name).is_some() {
        return Err("64 hexadecimal digits are an image's id, not a name");
    }
    let (registry, repository) = split_registry(name)?;
    check_repository(&repository)?;
    if registry.len() + 1 + repository.len() > NAME_MAX {
        return Err("it is longer than 255 characters");
    }
    Ok(Reference { registry, repository, tag: tag.map(str::to_owned), digest })
}

/// The first part is a registry if it could not be a folder: with a dot, a port or a capital, or `localhost`.
fn split_registry(name: &str) -> Result<(String, String), &'static str> {
    let (registry, repository) = match name.split_once('/') {
        Some((first, rest))
            if first.contains(['.', ':'])
                || first == "localhost"
                || first.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            check_registry(first)?;
            (first, rest)
        }
        _ => (DEFAULT_REGISTRY, name),
    };
    let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
    let folder = if registry == DEFAULT_REGISTRY && !repository.contains('/') { OFFICIAL } else { "" };
    Ok((registry.to_owned(), format!("{folder}{repository}")))
}

fn check_registry(registry: &str) -> Result<(), &'static str> {
    const WHY: &str = "what is before the first slash is not a host";
    let (host, port) = match registry.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']').ok_or(WHY)?;
            address.parse::<Ipv6Addr>().map_err(|_| WHY)?;
            (None, port)
        }
        None => match registry.find(':') {
            Some(colon) => {
                let (host, port) = registry.split_at(colon);
                (Some(host), port)
            }
            None => (Some(registry), ""),
        },
    };
    let label = |label: &str| {
        let inner = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        !label.is_empty() && label.bytes().all(inner) && !label.starts_with('-') && !label.ends_with('-')
    };
    if !host.is_none_or(|host| host.split('.').all(label)) {
        return Err(WHY);
    }
    let port = match port {
        "" => return Ok(()),
        port => port.strip_prefix(':').ok_or(WHY)?,
    };
    let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    if digits && port.parse::<u16>().is_ok() { Ok(()) } else { Err("the registry's port is not a number") }
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let first = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let inner = |b: u8| first(b) || b == b'.' || b == b'-';
    match tag.bytes().next() {
        None => Err("the tag is empty"),
        Some(b) if !first(b) => Err("a tag begins with a letter, a digit or _"),
        Some(_) if tag.len() > TAG_MAX => Err("the tag is longer than 128 characters"),
        Some(_) if !tag.bytes().all(inner) => Err("a tag has letters, digits, _, . and - only"),
        Some(_) => Ok(()),
    }
}

fn check_repository(repository: &str) -> Result<(), &'static str> {
    if repository.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err("a repository is in lower case");
    }
    repository.split('/').try_for_each(check_component)
}

/// Letters and digits, with `.`, `_`, `__` or any number of `-` between them.
fn check_component(component: &str) -> Result<(), &'static str> {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    if component.is_empty() {
        return Err("a part of the name is empty");
    }
    if !component.bytes().all(|b| alphanumeric(b) || matches!(b, b'.' | b'_' | b'-')) {
        return Err("a name has lower case letters, digits, ., _, - and / only");
    }
    let mut runs = component.split(|c: char| c.is_ascii_alphanumeric());
    let fits = |run: &str| matches!(run, "" | "." | "_" | "__") || run.bytes().all(|b| b == b'-');
    let ends = [component.bytes().next(), component.bytes().last()];
    if !runs.all(fits) || !ends.into_iter().flatten().all(alphanumeric) {
        return Err("separators stand alone, and between letters or digits");
    }
    Ok(())
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}{}", self.registry, self.repository, self.suffix())
    }
}

impl FromStr for Reference {
    type Err = NotAReference;

    fn from_str(text: &str) -> Result<Self, NotAReference> {
        Self::parse(text)
    }
}

impl TryFrom<String> for Reference {
    type Error = NotAReference;

    fn try_from(text: String) -> Result<Self, NotAReference> {
        Self::parse(&text)
    }
}

impl From<Reference> for String {
    fn from(reference: Reference) -> Self {
        reference.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn whole_and_short_forms_are_dockers() {
        let digest = format!("@sha256:{HEX}");
        let with_digest = format!("localhost:5000/a/b{digest}");
        let with_both = format!("a/b:c{digest}");
        let whole_both = format!("docker.io/a/b:c{digest}");
        for (text, whole, short) in [
            ("nginx", "docker.io/library/nginx", "nginx"),
            ("nginx:1.2", "docker.io/library/nginx:1.2", "nginx:1.2"),
            ("docker.io/nginx", "docker.io/library/nginx", "nginx"),
            ("index.docker.io/library/nginx:a", "docker.io/library/nginx:a", "nginx:a"),
            ("docker.io/library/nginx:1.2", "docker.io/library/nginx:1.2", "nginx:1.2"),
            ("me/app", "docker.io/me/app", "me/app"),
            ("library/a/b", "docker.io/library/a/b", "library/a/b"),
            ("localhost/app", "localhost/app", "localhost/app"),
            ("localhost:5000/app:1", "localhost:5000/app:1", "localhost:5000/app:1"),
            ("Host/app", "Host/app", "Host/app"),
            ("[::1]:5000/app", "[::1]:5000/app", "[::1]:5000/app"),
            ("quay.io/a/b__c/d--e.f", "quay.io/a/b__c/d--e.f", "quay.io/a/b__c/d--e.f"),
            (&with_digest, &with_digest, &with_digest),
            (&with_both, &whole_both, &with_both),
        ] {
            let reference = Reference::parse(text).unwrap();
            assert_eq!((reference.to_string().as_str(), reference.familiar().as_str()), (whole, short));
            assert_eq!(Reference::parse(whole).as_ref(), Ok(&reference));
            assert_eq!(Reference::parse(short).as_ref(), Ok(&reference));
        }
    }

    #[test]
    fn texts_that_are_no_names_are_refused() {
        let long_tag = format!("a:{}", "t".repeat(129));
        let long_name = format!("q.io/{}", "n".repeat(251));
        for text in [
            "",
            ":a",
            "a:",
            "a:-b",
            "a:b c",
            "A",
            "a/B",
            "a//b",
            "/a",
            "a/",
            "a/./b",
            "a/../b",
            "..",
            "a..b",
            "-a",
            "a-",
            "_a",
            "a___b",
            "a._b",
            "a b",
            "a@",
            "a@sha256:12",
            "a@b@c",
            "a:b:c",
            "q.io:x/a",
            "q.io:70000/a",
            "q..io/a",
            "-q.io/a",
            "[::1/a",
            "[zz]:1/a",
            "é",
            "a:é",
            "http://q.io/a",
            HEX,
            &long_tag,
            &long_name,
        ] {
            assert!(Reference::parse(text).is_err(), "{text}");
        }
        assert!(Reference::parse(&format!("a:{}", "t".repeat(128))).is_ok());
        assert!(Reference::parse(&format!("q.io/{}", "n".repeat(250))).is_ok());
    }

    #[test]
    fn default_tag_is_only_for_names_without_tag_and_digest() {
        let whole = |text: &str| Reference::parse(text).unwrap().or_latest().familiar();
        assert_eq!(whole("a"), "a:latest");
        assert_eq!(whole("a:b"), "a:b");
        assert_eq!(whole(&format!("a@sha256:{HEX}")), format!("a@sha256:{HEX}"));
    }

    #[test]
    fn loopback_registries_are_recognised() {
        let loopback = |registry: &str| Reference::parse(&format!("{registry}/a")).unwrap().is_loopback();
        for registry in ["localhost", "localhost:1", "127.0.0.1:5000", "127.8.9.1", "[::1]:5000", "[::1]"] {
            assert!(loopback(registry), "{registry}");
        }
        for registry in ["q.io", "10.0.0.1:5000", "127.0.0.1.evil.org", "localhost.org", "[::2]:5000"] {
            assert!(!loopback(registry), "{registry}");
        }
    }
}
