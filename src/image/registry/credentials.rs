//! Credentials, kept where Docker keeps them: in `~/.docker/config.json`, or by the helpers that it names.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

use super::Error;
use crate::image::reference::DEFAULT_REGISTRY;

/// How Docker calls its own registry there.
const DOCKER_KEY: &str = "https://index.docker.io/v1/";
/// The user name with which helpers say that the secret is a token for getting tokens.
const TOKEN_USER: &str = "<token>";
/// Bytes of the file and of what helpers say.
const MAX: u64 = 4 << 20;

/// What proves who asks.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// User and password.
    Basic {
        /// The user.
        user: String,
        /// The password.
        password: String,
    },
    /// A token with which other tokens are fetched.
    Identity(String),
    /// A token that is shown to the registry itself.
    Token(String),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Basic { user, .. } => write!(f, "Basic {{ user: {user:?} }}"),
            Self::Identity(_) => f.write_str("Identity"),
            Self::Token(_) => f.write_str("Token"),
        }
    }
}

/// The file with credentials.
#[derive(Clone, Debug)]
pub struct AuthFile {
    path: PathBuf,
}

impl Default for AuthFile {
    /// `$DOCKER_CONFIG/config.json`, or `~/.docker/config.json`.
    fn default() -> Self {
        let directory = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from);
        let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/".into())).join(".docker");
        Self { path: directory.unwrap_or_else(home).join("config.json") }
    }
}

/// The registry that a key of the file is about.
fn registry_of(key: &str) -> &str {
    let host = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    match host.split('/').next().unwrap_or(host) {
        "index.docker.io" | "registry-1.docker.io" | "docker.io" => DEFAULT_REGISTRY,
        host => host,
    }
}

/// The key under which a registry is kept.
fn key_of(registry: &str) -> &str {
    if registry == DEFAULT_REGISTRY { DOCKER_KEY } else { registry }
}

impl AuthFile {
    /// This file.
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn wrong(&self, why: impl fmt::Display) -> Error {
        Error::Credentials { what: self.path.display().to_string(), why: why.to_string() }
    }

    fn read(&self) -> Result<Map<String, Value>, Error> {
        let file = match File::open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Map::new()),
            result => result.map_err(|error| self.wrong(error))?,
        };
        let mut bytes = vec![];
        file.take(MAX).read_to_end(&mut bytes).map_err(|error| self.wrong(error))?;
        if bytes.iter().all(u8::is_ascii_whitespace) {
            return Ok(Map::new());
        }
        match serde_json::from_slice(&bytes).map_err(|error| self.wrong(error))? {
            Value::Object(map) => Ok(map),
            _ => Err(self.wrong("it is not a JSON object")),
        }
    }

    fn write(&self, map: Map<String, Value>) -> Result<(), Error> {
        let mut text =
            serde_json::to_string_pretty(&Value::Object(map)).map_err(|error| self.wrong(error))?;
        text.push('\n');
        // A link stays one: people keep this file elsewhere.
        let path = fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        let directory = path.parent().unwrap_or(Path::new("."));
        let written = fs::create_dir_all(directory).and_then(|()| {
            let new = directory.join(format!(".config.json-{}", std::process::id()));
            let _ = fs::remove_file(&new);
            let mut file = File::options().write(true).create_new(true).mode(0o600).open(&new)?;
            let result = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
            result.and_then(|()| fs::rename(&new, &path)).inspect_err(|_| {
                let _ = fs::remove_file(&new);
            })
        });
        written.map_err(|error| self.wrong(error))
    }

    /// The credentials for a registry, if there are any.
    pub fn find(&self, registry: &str) -> Result<Option<Credentials>, Error> {
        let map = self.read()?;
        if let Some(helper) = helper(&map, registry) {
            return get(&helper, key_of(registry));
        }
        let Some(Value::Object(auths)) = map.get("auths") else { return Ok(None) };
        let entry = auths
            .get(key_of(registry))
            .or_else(|| auths.iter().find(|(key, _)| registry_of(key) == registry).map(|(_, value)| value));
        entry.map_or(Ok(None), |entry| self.read_entry(registry, entry))
    }

    fn read_entry(&self, registry: &str, entry: &Value) -> Result<Option<Credentials>, Error> {
        let text = |name: &str| {
            entry.get(name).and_then(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned)
        };
        if let Some(token) = text("registrytoken") {
            return Ok(Some(Credentials::Token(token)));
        }
        if let Some(token) = text("identitytoken") {
            return Ok(Some(Credentials::Identity(token)));
        }
        if let Some(auth) = text("auth") {
            let bytes = STANDARD.decode(auth.trim()).ok();
            let pair = bytes.and_then(|bytes| String::from_utf8(bytes).ok());
            let pair = pair.as_ref().and_then(|pair| pair.split_once(':'));
            let (user, password) =
                pair.ok_or_else(|| self.wrong(format!("the entry of {registry} is malformed")))?;
            let password = password.trim_end_matches('\0').to_owned();
            return Ok(Some(Credentials::Basic { user: user.to_owned(), password }));
        }
        Ok(match (text("username"), text("password")) {
            (Some(user), Some(password)) => Some(Credentials::Basic { user, password }),
            _ => None,
        })
    }

    /// Keeps user and password for a registry; answers by whom they are kept.
    pub fn store(&self, registry: &str, user: &str, password: &str) -> Result<String, Error> {
        let mut map = self.read()?;
        if let Some(helper) = helper(&map, registry) {
            let message =
                serde_json::json!({"ServerURL": key_of(registry), "Username": user, "Secret": password});
            run(&helper, "store", &message.to_string())?;
            return Ok(program(&helper));
        }
        let auth = STANDARD.encode(format!("{user}:{password}"));
        let auths = map.entry("auths").or_insert_with(|| Value::Object(Map::new()));
        let Value::Object(auths) = auths else { return Err(self.wrong("its auths are not an object")) };
        auths.retain(|key, _| registry_of(key) != registry);
        auths.insert(key_of(registry).to_owned(), serde_json::json!({"auth": auth}));
        self.write(map)?;
        Ok(self.path.display().to_string())
    }

    /// Forgets the credentials for a registry; false if there were none.
    pub fn forget(&self, registry: &str) -> Result<bool, Error> {
        let mut map = self.read()?;
        let mut forgotten = false;
        if let Some(helper) = helper(&map, registry) {
            forgotten = get(&helper, key_of(registry))?.is_some();
            if forgotten {
                run(&helper, "erase", key_of(registry))?;
            }
        }
        if let Some(Value::Object(auths)) = map.get_mut("auths") {
            let before = auths.len();
            auths.retain(|key, _| registry_of(key) != registry);
            if auths.len() != before {
                self.write(map)?;
                forgotten = true;
            }
        }
        Ok(forgotten)
    }
}

/// The helper that keeps a registry's credentials.
fn helper(map: &Map<String, Value>, registry: &str) -> Option<String> {
    let of_registry = map.get("credHelpers").and_then(Value::as_object).and_then(|helpers| {
        let own = |(key, _): &(&String, &Value)| registry_of(key) == registry;
        helpers.iter().find(own).and_then(|(_, value)| value.as_str())
    });
    let name = of_registry.or_else(|| map.get("credsStore").and_then(Value::as_str));
    name.filter(|name| !name.is_empty()).map(str::to_owned)
}

fn program(helper: &str) -> String {
    format!("docker-credential-{helper}")
}

fn get(helper: &str, key: &str) -> Result<Option<Credentials>, Error> {
    let wrong = |why: &str| Error::Credentials { what: program(helper), why: why.to_owned() };
    let Some(answer) = run(helper, "get", key)? else { return Ok(None) };
    let answer: Value = serde_json::from_str(&answer).map_err(|_| wrong("its answer is not JSON"))?;
    let text = |name: &str| answer.get(name).and_then(Value::as_str).map(str::to_owned);
    match (text("Username"), text("Secret")) {
        (Some(user), Some(token)) if user == TOKEN_USER => Ok(Some(Credentials::Identity(token))),
        (Some(user), Some(password)) => Ok(Some(Credentials::Basic { user, password })),
        _ => Err(wrong("its answer has no user and secret")),
    }
}

/// Runs a helper. `None`: it knows nothing of that registry.
fn run(helper: &str, verb: &str, input: &str) -> Result<Option<String>, Error> {
    let what = program(helper);
    let wrong = |why: String| Error::Credentials { what: what.clone(), why };
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if !helper.bytes().all(plain) {
        return Err(wrong("that is not the name of a helper".to_owned()));
    }
    let mut child = Command::new(&what)
        .arg(verb)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(|error| wrong(error.to_string()))?;
    // A helper that does not read gets no answer either; its status says more than this error would.
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(input.as_bytes());
    }
    let mut output = vec![];
    if let Some(stdout) = child.stdout.take() {
        stdout.take(MAX).read_to_end(&mut output).map_err(|error| wrong(error.to_string()))?;
    }
    let status = child.wait().map_err(|error| wrong(error.to_string()))?;
    let output = String::from_utf8_lossy(&output).trim().to_owned();
    if status.success() {
        return Ok(Some(output));
    }
    if output.contains("credentials not found") {
        return Ok(None);
    }
    Err(wrong(if output.is_empty() { status.to_string() } else { output }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> (tempfile::TempDir, AuthFile) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        fs::write(&path, text).unwrap();
        (directory, AuthFile::at(&path))
    }

    fn basic(user: &str, password: &str) -> Option<Credentials> {
        Some(Credentials::Basic { user: user.into(), password: password.into() })
    }

    #[test]
    fn entries_are_found_under_all_their_keys() {
        let (_directory, file) = file(
            r#"{"auths": {
                "https://index.docker.io/v1/": {"auth": "dTpwOnE="},
                "quay.io": {"username": "a", "password": "b"},
                "https://ghcr.io/v2/": {"auth": "dTpwOnE="},
                "id.io": {"auth": "dTpwOnE=", "identitytoken": "t"},
                "bad.io": {"auth": "%%%"},
                "empty.io": {}
            }}"#,
        );
        assert_eq!(file.find("docker.io").unwrap(), basic("u", "p:q"));
        assert_eq!(file.find("quay.io").unwrap(), basic("a", "b"));
        assert_eq!(file.find("ghcr.io").unwrap(), basic("u", "p:q"));
        assert_eq!(file.find("id.io").unwrap(), Some(Credentials::Identity("t".into())));
        assert_eq!(file.find("empty.io").unwrap(), None);
        assert_eq!(file.find("evil-quay.io").unwrap(), None);
        assert!(file.find("bad.io").unwrap_err().to_string().contains("bad.io"));
    }

    #[test]
    fn what_is_stored_is_found_and_forgotten_and_the_rest_stays() {
        let (directory, file) = file(r#"{"detachKeys": "ctrl-x", "auths": {"a.io": {"auth": "dTpwOnE="}}}"#);
        file.store("docker.io", "me", "secret").unwrap();
        file.store("docker.io", "me", "other:secret").unwrap();
        assert_eq!(file.find("docker.io").unwrap(), basic("me", "other:secret"));
        let text = fs::read_to_string(file.path()).unwrap();
        assert!(text.contains("ctrl-x") && text.contains("a.io") && text.contains(DOCKER_KEY), "{text}");
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(fs::metadata(file.path()).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(file.forget("docker.io").unwrap() && !file.forget("docker.io").unwrap());
        assert_eq!(file.find("docker.io").unwrap(), None);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn missing_and_malformed_files_are_told_apart() {
        assert_eq!(AuthFile::at(Path::new("/no/such/file")).find("a.io").unwrap(), None);
        assert_eq!(file("").1.find("a.io").unwrap(), None);
        assert!(file("{").1.find("a.io").is_err() && file("[]").1.find("a.io").is_err());
    }

    #[test]
    fn helpers_cannot_be_paths() {
        let (_directory, file) = file(r#"{"credsStore": "../../tmp/x"}"#);
        assert!(file.find("a.io").unwrap_err().to_string().contains("not the name of a helper"));
    }

    #[test]
    fn secrets_are_not_shown() {
        let shown = format!("{:?}", [basic("u", "hush"), Some(Credentials::Token("hush".into()))]);
        assert!(!shown.contains("hush"), "{shown}");
    }
}
