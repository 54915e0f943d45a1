//! A container's changes as a new image.

use std::io::Write;
use std::path::Path;
use std::str::FromStr;
use std::time::SystemTime;

use flate2::write::GzEncoder;
use serde_json::{Map, Value, json};

use super::digest::Hashing;
use super::error::Error;
use super::layers::{self, Compression};
use super::manifest::{self, CONFIG_MAX, LAYERS_MAX};
use super::reference::Reference;
use super::store::{Image, Store};
use super::time;

/// What is said about a new image.
#[derive(Clone, Debug, Default)]
pub struct Commit {
    /// Who made it.
    pub author: Option<String>,
    /// Why.
    pub message: Option<String>,
    /// The command that made the changes.
    pub created_by: Option<String>,
    /// When; `None` for now.
    pub created: Option<SystemTime>,
    /// What its configuration says otherwise than that of the image below.
    pub changes: Vec<Change>,
}

/// A change of the configuration, in the words of a Dockerfile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// `CMD`.
    Cmd(Vec<String>),
    /// `ENTRYPOINT`.
    Entrypoint(Vec<String>),
    /// `ENV NAME=VALUE`.
    Env(String, String),
    /// `LABEL NAME=VALUE`.
    Label(String, String),
    /// `EXPOSE PORT[/PROTOCOL]`.
    Expose(String),
    /// `VOLUME PATH`.
    Volume(String),
    /// `USER`.
    User(String),
    /// `WORKDIR`.
    WorkingDir(String),
    /// `STOPSIGNAL`.
    StopSignal(String),
}

impl FromStr for Change {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (word, rest) =
            text.trim().split_once(char::is_whitespace).ok_or("an instruction and its value")?;
        let rest = rest.trim();
        let list = || match serde_json::from_str::<Vec<String>>(rest) {
            Ok(list) => list,
            Err(_) => vec!["/bin/sh".to_owned(), "-c".to_owned(), rest.to_owned()],
        };
        let pair = || -> Result<(String, String), String> {
            let split = rest.split_once('=').or_else(|| rest.split_once(char::is_whitespace));
            let (name, value) = split.ok_or("NAME=VALUE")?;
            let value = value.trim();
            let inner = value.strip_prefix('"').and_then(|inner| inner.strip_suffix('"'));
            Ok((name.trim().to_owned(), inner.unwrap_or(value).to_owned()))
        };
        Ok(match word.to_ascii_uppercase().as_str() {
            "CMD" => Self::Cmd(list()),
            "ENTRYPOINT" => Self::Entrypoint(list()),
            "ENV" => pair().map(|(name, value)| Self::Env(name, value))?,
            "LABEL" => pair().map(|(name, value)| Self::Label(name, value))?,
            "EXPOSE" if rest.contains('/') => Self::Expose(rest.to_owned()),
            "EXPOSE" => Self::Expose(format!("{rest}/tcp")),
            "VOLUME" => Self::Volume(rest.to_owned()),
            "USER" => Self::User(rest.to_owned()),
            "WORKDIR" => Self::WorkingDir(rest.to_owned()),
            "STOPSIGNAL" => Self::StopSignal(rest.to_owned()),
            _ => {
                return Err(
                    "one of CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME, WORKDIR".into()
                );
            }
        })
    }
}

/// Does something with an object within another one, which is made if it is not there or is something else.
fn within(map: &mut Map<String, Value>, name: &str, change: impl FnOnce(&mut Map<String, Value>)) {
    let mut inner = match map.remove(name) {
        Some(Value::Object(inner)) => inner,
        _ => Map::new(),
    };
    change(&mut inner);
    map.insert(name.to_owned(), Value::Object(inner));
}

fn apply(config: &mut Map<String, Value>, change: &Change) {
    let set = |config: &mut Map<String, Value>, name: &str, value: Value| {
        drop(config.insert(name.to_owned(), value))
    };
    match change {
        Change::Cmd(list) => set(config, "Cmd", json!(list)),
        Change::Entrypoint(list) => set(config, "Entrypoint", json!(list)),
        Change::User(user) => set(config, "User", json!(user)),
        Change::WorkingDir(path) => set(config, "WorkingDir", json!(path)),
        Change::StopSignal(signal) => set(config, "StopSignal", json!(signal)),
        Change::Label(name, value) => within(config, "Labels", |labels| set(labels, name, json!(value))),
        Change::Expose(port) => within(config, "ExposedPorts", |ports| set(ports, port, json!({}))),
        Change::Volume(path) => within(config, "Volumes", |volumes| set(volumes, path, json!({}))),
        Change::Env(name, value) => {
            let all = config.get("Env").and_then(Value::as_array).cloned().unwrap_or_default();
            let start = format!("{name}=");
            let other = |line: &Value| !line.as_str().is_some_and(|line| line.starts_with(&start));
            let mut kept: Vec<Value> = all.into_iter().filter(other).collect();
            kept.push(json!(format!("{name}={value}")));
            set(config, "Env", Value::Array(kept));
        }
    }
}

/// Makes an image of another one and a directory with what overlayfs wrote above it.
pub fn commit(
    store: &Store,
    base: &Image,
    upper: &Path,
    commit: &Commit,
    names: &[Reference],
) -> Result<Image, Error> {
    if base.layers.len() >= LAYERS_MAX {
        return Err(Error::invalid("the image", format!("it would have more than {LAYERS_MAX} layers")));
    }
    let lease = store.lease()?;
    let mut kept: Vec<_> = base.layers.iter().map(|layer| layer.digest).collect();
    kept.push(base.id);
    store.protect(&lease, &kept)?;

    let failed = Error::file("write", upper);
    let mut packer = Hashing::new(GzEncoder::new(store.new_blob()?, flate2::Compression::fast()));
    let packed = layers::pack(upper, &mut packer, store.rights());
    packed.map_err(|source| Error::Pack { path: upper.to_owned(), source })?;
    packer.flush().map_err(&failed)?;
    let (encoder, diff_id, _) = packer.finish();
    let blob = store.finish_blob(&lease, encoder.finish().map_err(&failed)?)?;

    let created = time::format(commit.created.unwrap_or_else(SystemTime::now));
    let mut config: Value = serde_json::from_slice(&store.read_blob(&base.id, CONFIG_MAX)?)
        .map_err(Error::json("the image's configuration"))?;
    let Value::Object(map) = &mut config else {
        return Err(Error::invalid("the image's configuration", "it is not an object"));
    };
    map.insert("created".to_owned(), json!(created));
    for name in ["container", "container_config", "author"] {
        map.remove(name);
    }
    if let Some(author) = &commit.author {
        map.insert("author".to_owned(), json!(author));
    }
    let diff_ids = base.layers.iter().map(|layer| layer.diff_id).chain([diff_id]);
    map.insert("rootfs".to_owned(), json!({"type": "layers", "diff_ids": diff_ids.collect::<Vec<_>>()}));
    let mut history = map.get("history").and_then(Value::as_array).cloned().unwrap_or_default();
    let mut step = json!({"created": created});
    for (name, value) in
        [("created_by", &commit.created_by), ("author", &commit.author), ("comment", &commit.message)]
    {
        if let (Some(value), Value::Object(step)) = (value, &mut step) {
            step.insert(name.to_owned(), json!(value));
        }
    }
    history.push(step);
    map.insert("history".to_owned(), Value::Array(history));
    within(map, "config", |inner| commit.changes.iter().for_each(|change| apply(inner, change)));
    let config = serde_json::to_vec(&config).map_err(Error::json("the image's configuration"))?;
    let id = store.put_blob(&lease, &config)?;

    let compression = |media_type: &str| match media_type {
        kind if kind.ends_with("gzip") => Compression::Gzip,
        kind if kind.ends_with("zstd") => Compression::Zstd,
        _ => Compression::None,
    };
    let types = base.manifest.layers().iter().map(|layer| compression(layer.media_type().as_ref()));
    let mut all: Vec<_> = base.layers.iter().zip(types).map(|(l, kind)| (l.digest, l.size, kind)).collect();
    all.push((blob.0, blob.1, Compression::Gzip));
    let manifest = manifest::build((id, config.len() as u64), &all)?;
    let digest = store.put_blob(&lease, &manifest)?;
    store.add_image(&digest, names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_read_as_in_a_dockerfile() {
        let list = |items: &[&str]| items.iter().map(|item| (*item).to_owned()).collect::<Vec<_>>();
        for (text, change) in [
            (r#"CMD ["a", "b"]"#, Change::Cmd(list(&["a", "b"]))),
            ("cmd a b", Change::Cmd(list(&["/bin/sh", "-c", "a b"]))),
            ("ENTRYPOINT []", Change::Entrypoint(vec![])),
            ("ENV A=b=c", Change::Env("A".into(), "b=c".into())),
            ("ENV A \"b c\"", Change::Env("A".into(), "b c".into())),
            ("EXPOSE 80", Change::Expose("80/tcp".into())),
            ("EXPOSE 53/udp", Change::Expose("53/udp".into())),
            ("WORKDIR /a", Change::WorkingDir("/a".into())),
        ] {
            assert_eq!(text.parse(), Ok(change));
        }
        for text in ["", "CMD", "RUN a", "ENV A"] {
            assert!(text.parse::<Change>().is_err(), "{text}");
        }
    }

    #[test]
    fn variables_and_labels_replace_those_of_the_same_name() {
        let mut config = json!({"Env": ["A=1", "AB=2"], "Labels": null}).as_object().cloned().unwrap();
        apply(&mut config, &Change::Env("A".into(), "3".into()));
        apply(&mut config, &Change::Label("l".into(), "v".into()));
        assert_eq!(Value::Object(config), json!({"Env": ["AB=2", "A=3"], "Labels": {"l": "v"}}));
    }
}
