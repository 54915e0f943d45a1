//! Manifests, indexes and configurations: JSON that others wrote, read with care.

use oci_spec::image::{Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType, Os};
use serde::Deserialize;
use serde_json::Value;

use super::digest::Digest;
use super::error::Error;
use super::layers::Compression;

/// Bytes of a manifest or index, as registries have it.
pub const MANIFEST_MAX: u64 = 4 << 20;
/// Bytes of a configuration.
pub const CONFIG_MAX: u64 = 8 << 20;
/// Layers at most: Docker stops there, and the options of an overlay mount fit into a page.
pub const LAYERS_MAX: usize = 127;
/// Indexes within indexes.
pub const INDEX_DEPTH_MAX: usize = 3;

/// Docker's manifest, version 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker's index.
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// The specification's manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// The specification's index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// What a name leads to.
#[derive(Debug)]
pub enum Document {
    /// One image.
    Manifest(Box<ImageManifest>),
    /// The same for several platforms.
    Index(Box<ImageIndex>),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Outline {
    schema_version: u32,
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
}

/// Reads a manifest or an index; `media_type` is what came with it.
pub fn parse(bytes: &[u8], media_type: Option<&str>) -> Result<Document, Error> {
    let failed = || Error::json("the manifest");
    let outline: Outline = serde_json::from_slice(bytes).map_err(failed())?;
    if outline.schema_version != 2 {
        let why = format!("it has version {}; only 2 is known", outline.schema_version);
        return Err(Error::invalid("the manifest", why));
    }
    let known = |kind: &&str| [DOCKER_MANIFEST, DOCKER_INDEX, OCI_MANIFEST, OCI_INDEX].contains(kind);
    let kind = outline.media_type.as_deref().or(media_type.filter(known));
    match kind {
        Some(DOCKER_INDEX | OCI_INDEX) => {
            serde_json::from_slice(bytes).map(Document::Index).map_err(failed())
        }
        None if outline.manifests.is_some() => {
            serde_json::from_slice(bytes).map(Document::Index).map_err(failed())
        }
        Some(DOCKER_MANIFEST | OCI_MANIFEST) | None => {
            let manifest: Box<ImageManifest> = serde_json::from_slice(bytes).map_err(failed())?;
            check(&manifest)?;
            Ok(Document::Manifest(manifest))
        }
        Some(other) => Err(Error::invalid("the manifest", format!("its type {other:?} is not known"))),
    }
}

fn check(manifest: &ImageManifest) -> Result<(), Error> {
    let invalid = |why: String| Err(Error::invalid("the manifest", why));
    let kind = manifest.config().media_type().to_string();
    if !matches!(
        kind.as_str(),
        "application/vnd.oci.image.config.v1+json" | "application/vnd.docker.container.image.v1+json"
    ) {
        return invalid(format!("it is of no container image: its configuration's type is {kind:?}"));
    }
    if manifest.layers().len() > LAYERS_MAX {
        return invalid(format!("it has {} layers; {LAYERS_MAX} are possible", manifest.layers().len()));
    }
    digest_of(manifest.config())?;
    manifest.layers().iter().try_for_each(|layer| digest_of(layer).map(drop))
}

/// A descriptor's digest.
pub fn digest_of(descriptor: &Descriptor) -> Result<Digest, Error> {
    let text = descriptor.digest().to_string();
    text.parse().map_err(|error: super::digest::NotADigest| Error::invalid("the manifest", error.to_string()))
}

/// The entry of an index for this platform.
pub fn choose(index: &ImageIndex) -> Result<&Descriptor, Error> {
    let fits = |descriptor: &&Descriptor| {
        descriptor.platform().as_ref().is_some_and(|platform| {
            let variant = platform.variant().as_deref().unwrap_or("v1");
            *platform.os() == Os::Linux && *platform.architecture() == Arch::Amd64 && variant == "v1"
        })
    };
    let is_image = |descriptor: &&Descriptor| {
        let kind = descriptor.media_type();
        matches!(kind, MediaType::ImageManifest | MediaType::ImageIndex)
            || [DOCKER_MANIFEST, DOCKER_INDEX].contains(&kind.to_string().as_str())
    };
    let entries = || index.manifests().iter().filter(is_image);
    if let Some(found) = entries().find(fits) {
        return Ok(found);
    }
    // Archives with one image need not say for what it is; its configuration does.
    let mut unsaid = entries().filter(|descriptor| descriptor.platform().is_none());
    if let (Some(only), None) = (unsaid.next(), unsaid.next()) {
        return Ok(only);
    }
    let there = entries().filter_map(|descriptor| descriptor.platform().as_ref());
    let names: Vec<String> = there.map(|p| format!("{}/{}", p.os(), p.architecture())).take(20).collect();
    Err(Error::invalid("the image", format!("there is none for linux/amd64, only for: {}", names.join(", "))))
}

/// A manifest in the specification's form, from the configuration's digest and size and those of the layers.
pub fn build(config: (Digest, u64), layers: &[(Digest, u64, Compression)]) -> Result<Vec<u8>, Error> {
    let layers: Vec<Value> = layers
        .iter()
        .map(|(digest, size, compression)| {
            let suffix = match compression {
                Compression::None => "",
                Compression::Gzip => "+gzip",
                Compression::Zstd => "+zstd",
            };
            let media_type = format!("application/vnd.oci.image.layer.v1.tar{suffix}");
            serde_json::json!({"mediaType": media_type, "digest": digest, "size": size})
        })
        .collect();
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config.0, "size": config.1},
        "layers": layers,
    });
    serde_json::to_vec(&manifest).map_err(Error::json("the manifest"))
}

/// How an image's maker says that health is found out: in Docker's configurations, not in the specification's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct HealthCheck {
    /// `["CMD", …]`, `["CMD-SHELL", LINE]`, or `["NONE"]`.
    pub test: Vec<String>,
    /// Nanoseconds between checks; 0 for the default, as in the others.
    pub interval: u64,
    /// Nanoseconds for one check.
    pub timeout: u64,
    /// Nanoseconds in which failures do not count.
    pub start_period: u64,
    /// Failures in a row that make it unhealthy.
    pub retries: u32,
}

/// A configuration.
#[derive(Clone, Debug)]
pub struct Configuration {
    /// What the specification knows.
    pub config: ImageConfiguration,
    /// What Docker adds.
    pub health: Option<HealthCheck>,
    /// Digests of the unpacked layers, bottom first.
    pub diff_ids: Vec<Digest>,
}

/// Reads a configuration, which has to be one for this platform.
pub fn parse_config(bytes: &[u8]) -> Result<Configuration, Error> {
    let mut value: Value = serde_json::from_slice(bytes).map_err(Error::json("the image's configuration"))?;
    without_nulls(&mut value);
    let health = value.get("config").and_then(|config| config.get("Healthcheck")).cloned();
    let health =
        health.map(serde_json::from_value).transpose().map_err(Error::json("the image's health check"))?;
    let config: ImageConfiguration =
        serde_json::from_value(value).map_err(Error::json("the image's configuration"))?;
    if *config.os() != Os::Linux || *config.architecture() != Arch::Amd64 {
        let why = format!("it is for {}/{}, not for linux/amd64", config.os(), config.architecture());
        return Err(Error::invalid("the image", why));
    }
    let diff_ids = config.rootfs().diff_ids().iter().map(|text| text.parse());
    let diff_ids = diff_ids.collect::<Result<Vec<Digest>, _>>();
    let diff_ids =
        diff_ids.map_err(|error| Error::invalid("the image's configuration", error.to_string()))?;
    Ok(Configuration { config, health, diff_ids })
}

/// Docker writes `null` for what is not set; the types want it left out.
fn without_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(without_nulls);
        }
        Value::Array(values) => values.iter_mut().for_each(without_nulls),
        _ => {}
    }
}

/// The name of a layer with all that is below it, from the names of the layers: bottom first in, bottom first out.
pub fn chain_ids(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut chains: Vec<Digest> = vec![];
    for diff_id in diff_ids {
        let chain = match chains.last() {
            None => *diff_id,
            Some(below) => Digest::of(format!("{below} {diff_id}").as_bytes()),
        };
        chains.push(chain);
    }
    chains
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn manifest(change: impl FnOnce(&mut Value)) -> Result<Document, Error> {
        let mut value = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": HEX, "size": 2},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": HEX, "size": 5}],
        });
        change(&mut value);
        parse(value.to_string().as_bytes(), None)
    }

    fn error(result: Result<impl std::fmt::Debug, Error>) -> String {
        crate::error_chain(&result.unwrap_err())
    }

    #[test]
    fn manifests_of_both_kinds_are_read() {
        assert!(matches!(manifest(|_| {}), Ok(Document::Manifest(_))));
        let docker = manifest(|value| {
            value["mediaType"] = DOCKER_MANIFEST.into();
            value["config"]["mediaType"] = "application/vnd.docker.container.image.v1+json".into();
            value["layers"][0]["mediaType"] = "application/vnd.docker.image.rootfs.diff.tar.gzip".into();
        });
        assert!(matches!(docker, Ok(Document::Manifest(_))));
        let index = r#"{"schemaVersion":2,"manifests":[]}"#;
        assert!(matches!(parse(index.as_bytes(), None), Ok(Document::Index(_))));
    }

    #[test]
    fn manifests_that_cannot_be_used_are_refused() {
        assert!(error(manifest(|value| value["schemaVersion"] = 1.into())).contains("version 1"));
        assert!(error(manifest(|value| value["mediaType"] = "a/b".into())).contains("a/b"));
        assert!(error(manifest(|value| value["config"]["mediaType"] = "a/helm".into())).contains("helm"));
        assert!(error(manifest(|value| value["layers"][0]["size"] = (-1).into())).contains("not valid"));
        let digest = manifest(|value| value["layers"][0]["digest"] = "sha256:../../x".into());
        assert!(digest.is_err());
        let algorithm = format!("sha512:{}", "0".repeat(128));
        assert!(
            error(manifest(|value| value["config"]["digest"] = algorithm.into())).contains("not a digest")
        );
        let many = manifest(|value| value["layers"] = vec![value["layers"][0].clone(); 128].into());
        assert!(error(many).contains("128 layers"));
        assert!(parse(b"[]", None).is_err() && parse(b"", None).is_err());
    }

    #[test]
    fn platform_is_chosen_from_an_index() {
        let entry = |os: &str, architecture: &str, variant: Option<&str>, size: u64| {
            serde_json::json!({
                "mediaType": OCI_MANIFEST, "digest": HEX, "size": size,
                "platform": {"os": os, "architecture": architecture, "variant": variant},
            })
        };
        let index = |entries: Vec<Value>| {
            let value =
                serde_json::json!({"schemaVersion": 2, "mediaType": DOCKER_INDEX, "manifests": entries});
            match parse(value.to_string().as_bytes(), None) {
                Ok(Document::Index(index)) => index,
                other => panic!("{other:?}"),
            }
        };
        let all = index(vec![
            entry("linux", "arm64", Some("v8"), 1),
            entry("windows", "amd64", None, 2),
            entry("linux", "amd64", Some("v3"), 3),
            entry("linux", "amd64", None, 4),
            entry("unknown", "unknown", None, 5),
        ]);
        assert_eq!(choose(&all).unwrap().size(), 4);
        assert!(
            error(choose(&index(vec![entry("linux", "arm64", None, 1)])).cloned()).contains("linux/arm64")
        );
        let unsaid = serde_json::json!({"mediaType": OCI_MANIFEST, "digest": HEX, "size": 7});
        assert_eq!(choose(&index(vec![unsaid.clone(), entry("linux", "arm64", None, 1)])).unwrap().size(), 7);
        assert!(choose(&index(vec![unsaid.clone(), unsaid])).is_err());
    }

    #[test]
    fn configurations_with_dockers_nulls_and_health_checks_are_read() {
        let text = format!(
            r#"{{"architecture":"amd64","os":"linux","container_config":{{"Cmd":null}},"history":null,
            "config":{{"User":"","Env":null,"Cmd":["sh"],"Volumes":{{"/data":{{}}}},"ExposedPorts":{{"80/tcp":{{}}}},
            "Entrypoint":null,"Labels":null,"OnBuild":null,"ArgsEscaped":true,"StopSignal":"SIGQUIT",
            "Healthcheck":{{"Test":["CMD-SHELL","true"],"Interval":30000000000,"Retries":3}}}},
            "rootfs":{{"type":"layers","diff_ids":["{HEX}"]}}}}"#
        );
        let parsed = parse_config(text.as_bytes()).unwrap();
        let config = parsed.config.config().clone().unwrap();
        assert_eq!(config.cmd().as_deref(), Some(&["sh".to_owned()][..]));
        assert_eq!(config.volumes().as_deref(), Some(&["/data".to_owned()][..]));
        let health = parsed.health.unwrap();
        assert_eq!(
            (health.test, health.interval, health.retries),
            (vec!["CMD-SHELL".into(), "true".into()], 30_000_000_000, 3)
        );
        assert_eq!(parsed.diff_ids, [HEX.parse().unwrap()]);
        assert!(error(parse_config(text.replace("amd64", "arm64").as_bytes())).contains("arm64"));
        assert!(parse_config(text.replace(HEX, "sha256:1").as_bytes()).is_err());
    }

    #[test]
    fn chains_begin_with_the_bottom_layer_itself() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        assert_eq!(chain_ids(&[a, b]), [a, Digest::of(format!("{a} {b}").as_bytes())]);
        assert!(chain_ids(&[]).is_empty());
    }
}
