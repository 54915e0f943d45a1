//! Images: looked up, named, removed.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use oci_spec::image::{ImageConfiguration, ImageManifest};
use serde::{Deserialize, Serialize};

use super::{Store, files};
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::manifest::{self, CONFIG_MAX, Document, HealthCheck, MANIFEST_MAX};
use crate::image::reference::Reference;

/// One layer of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Digest of the blob.
    pub digest: Digest,
    /// Bytes of the blob.
    pub size: u64,
    /// Digest of the tar stream in it.
    pub diff_id: Digest,
    /// Name of the layer together with all that is below it.
    pub chain_id: Digest,
}

/// An image in the store.
#[derive(Clone, Debug)]
pub struct Image {
    /// Digest of the configuration.
    pub id: Digest,
    /// Names, in order; those with a digest say what was pulled.
    pub names: Vec<Reference>,
    /// The configuration.
    pub config: ImageConfiguration,
    /// Docker's addition to it.
    pub health: Option<HealthCheck>,
    /// The manifest.
    pub manifest: ImageManifest,
    /// The manifest's digest.
    pub manifest_digest: Digest,
    /// Layers, bottom first.
    pub layers: Vec<Layer>,
}

/// What the store remembers of an image, so that nothing has to be parsed to know what it needs.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) manifest: Digest,
    pub(super) layers: Vec<Layer>,
}

/// What `remove` did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Names that are gone.
    pub untagged: Vec<Reference>,
    /// The image, if it is gone too.
    pub deleted: Option<Digest>,
}

impl Image {
    /// Bytes of manifest, configuration and compressed layers.
    pub fn compressed_size(&self) -> u64 {
        self.layers.iter().map(|layer| layer.size).fold(self.manifest.config().size(), u64::saturating_add)
    }

    /// Names with a tag, as people type them.
    pub fn tags(&self) -> Vec<String> {
        self.names.iter().filter(|name| name.tag().is_some()).map(Reference::familiar).collect()
    }

    /// Names with a digest, as people type them.
    pub fn digests(&self) -> Vec<String> {
        self.names.iter().filter(|name| name.digest().is_some()).map(Reference::familiar).collect()
    }
}

impl Store {
    pub(super) fn record_path(&self, id: &Digest) -> PathBuf {
        self.path("images").join(id.hex())
    }

    /// What is remembered of an image. Under the store's lock.
    pub(super) fn record(&self, id: &Digest) -> Result<Option<Record>, Error> {
        let path = self.record_path(id);
        match fs::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map(Some).map_err(Error::json(path.display().to_string()))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::file("read", &path)(error)),
        }
    }

    /// Ids of all images. Under the store's lock.
    pub(super) fn ids(&self) -> Result<Vec<Digest>, Error> {
        Ok(files::names(&self.path("images"))?.iter().filter_map(|name| Digest::from_hex(name)).collect())
    }

    /// Makes an image of blobs that are there, and gives it names. They stay protected by a lease until this returns.
    pub fn add_image(&self, manifest: &Digest, names: &[Reference]) -> Result<Image, Error> {
        let parsed = self.parse_manifest(manifest)?;
        let id = manifest::digest_of(parsed.config())?;
        let config = manifest::parse_config(&self.read_blob(&id, CONFIG_MAX)?)?;
        let layers = layers(&parsed, &config.diff_ids)?;
        for layer in &layers {
            if !self.has_blob(&layer.digest, Some(layer.size)) {
                return Err(Error::Missing { what: format!("layer {}", layer.digest.short()) });
            }
        }
        let record = Record { manifest: *manifest, layers };
        let bytes = serde_json::to_vec(&record).map_err(Error::json("an image's record"))?;
        let _locked = self.shared()?;
        // The same image with layers that are compressed otherwise: what is there already serves as well.
        if self.record(&id)?.is_none() {
            files::replace(&self.record_path(&id), &bytes)?;
        }
        names.iter().try_for_each(|name| self.set_name(name, &id))?;
        let names = self.all_names()?.remove(&id).unwrap_or_default();
        self.load_image(&id, names)
    }

    fn parse_manifest(&self, digest: &Digest) -> Result<ImageManifest, Error> {
        match manifest::parse(&self.read_blob(digest, MANIFEST_MAX)?, None)? {
            Document::Manifest(manifest) => Ok(*manifest),
            Document::Index(_) => Err(Error::invalid("the manifest", "it is an index")),
        }
    }

    /// Under the store's lock.
    fn load_image(&self, id: &Digest, names: Vec<Reference>) -> Result<Image, Error> {
        let record = self.record(id)?.ok_or_else(|| Error::NotFound(id.to_string()))?;
        let manifest = self.parse_manifest(&record.manifest)?;
        let config = manifest::parse_config(&self.read_blob(id, CONFIG_MAX)?)?;
        Ok(Image {
            id: *id,
            names,
            config: config.config,
            health: config.health,
            manifest,
            manifest_digest: record.manifest,
            layers: record.layers,
        })
    }

    /// All images, in the order of their ids. One that is damaged does not hide the others: it is left out, with a
    /// warning.
    pub fn images(&self) -> Result<Vec<Image>, Error> {
        let _locked = self.shared()?;
        let mut names = self.all_names()?;
        let mut images = vec![];
        for id in self.ids()? {
            match self.load_image(&id, names.remove(&id).unwrap_or_default()) {
                Ok(image) => images.push(image),
                Err(error) => tracing::warn!("image {}: {}", id.short(), crate::error_chain(&error)),
            }
        }
        Ok(images)
    }

    /// The image with this name, or this id, or an id that begins so.
    pub fn resolve(&self, name: &str) -> Result<Image, Error> {
        let _locked = self.shared()?;
        let id = self.find(name)?.0;
        let names = self.all_names()?.remove(&id).unwrap_or_default();
        self.load_image(&id, names)
    }

    /// The image with this id.
    pub fn image(&self, id: &Digest) -> Result<Image, Error> {
        self.resolve(&id.to_string())
    }

    /// The configuration as its maker wrote it.
    pub fn raw_config(&self, image: &Image) -> Result<Vec<u8>, Error> {
        self.read_blob(&image.id, CONFIG_MAX)
    }

    /// The manifest as its maker wrote it.
    pub fn raw_manifest(&self, image: &Image) -> Result<Vec<u8>, Error> {
        self.read_blob(&image.manifest_digest, MANIFEST_MAX)
    }

    /// An image's id, and the name if it was one. Under the store's lock.
    fn find(&self, text: &str) -> Result<(Digest, Option<Reference>), Error> {
        let not_found = || Error::NotFound(text.to_owned());
        // A whole id is never a name, whatever somebody has named an image.
        if let Ok(id) = text.parse::<Digest>() {
            return if self.record_path(&id).exists() { Ok((id, None)) } else { Err(not_found()) };
        }
        let reference = Reference::parse(text);
        if let Ok(reference) = &reference {
            let name = reference.clone().or_latest();
            if let Some(id) = self.named(&name)? {
                return Ok((id, Some(name)));
            }
            // With both, the digest says which one, whatever the tag has become.
            if let (Some(_), Some(digest)) = (name.tag(), name.digest()) {
                let name = name.at(digest);
                return self.named(&name)?.map(|id| (id, Some(name))).ok_or_else(not_found);
            }
        }
        let prefix = text.strip_prefix("sha256:").unwrap_or(text);
        let is_prefix = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        if prefix.is_empty() || prefix.len() > 64 || !prefix.bytes().all(is_prefix) {
            reference?;
            return Err(not_found());
        }
        let found: Vec<Digest> = self.ids()?.into_iter().filter(|id| id.hex().starts_with(prefix)).collect();
        match found.as_slice() {
            [] => Err(not_found()),
            [id] => Ok((*id, None)),
            several => Err(Error::Ambiguous { prefix: prefix.to_owned(), count: several.len() }),
        }
    }

    /// Gives an image another name.
    pub fn tag(&self, image: &str, name: &Reference) -> Result<(), Error> {
        if name.digest().is_some() {
            return Err(Error::invalid(name.familiar(), "a new name has a tag and no digest"));
        }
        let _locked = self.shared()?;
        let (id, _) = self.find(image)?;
        self.set_name(&name.clone().or_latest(), &id)
    }

    /// Takes a name away, and the image with its last one; or the image, by id. The garbage collection takes the rest.
    ///
    /// What containers use stays unless `force`; then it goes when the last of them does.
    pub fn remove(&self, image: &str, force: bool) -> Result<Removed, Error> {
        let _locked = self.exclusive()?;
        let (id, name) = self.find(image)?;
        let names = self.all_names()?.remove(&id).unwrap_or_default();
        let tags: Vec<&Reference> = names.iter().filter(|name| name.tag().is_some()).collect();
        let mut removed = Removed::default();
        if let Some(name) = &name {
            let others = tags.iter().any(|other| *other != name);
            if others && name.tag().is_some() {
                // The digest that was pulled belongs to the repository as long as it has a tag.
                let repository = name.familiar_name();
                let stays = tags.iter().any(|other| *other != name && other.familiar_name() == repository);
                let goes = |other: &&Reference| {
                    *other == name || (!stays && other.tag().is_none() && other.familiar_name() == repository)
                };
                for name in names.iter().filter(goes) {
                    self.remove_name(name)?;
                    removed.untagged.push(name.clone());
                }
                return Ok(removed);
            }
            if others {
                self.remove_name(name)?;
                removed.untagged.push(name.clone());
                return Ok(removed);
            }
        } else {
            let repositories: BTreeSet<String> = tags.iter().map(|name| name.familiar_name()).collect();
            if repositories.len() > 1 && !force {
                let names = tags.iter().map(|name| name.familiar()).collect();
                return Err(Error::SeveralNames { image: id.short(), names });
            }
        }
        let containers = self.users(&id)?;
        if !containers.is_empty() && !force {
            return Err(Error::InUse { image: image.to_owned(), containers });
        }
        for name in names {
            self.remove_name(&name)?;
            removed.untagged.push(name);
        }
        if containers.is_empty() {
            self.remove_record(&id)?;
            removed.deleted = Some(id);
        }
        Ok(removed)
    }

    /// Forgets an image, before anything of it is removed. Under the store's lock, alone.
    pub(super) fn remove_record(&self, id: &Digest) -> Result<(), Error> {
        files::remove(&self.record_path(id))?;
        files::sync_directory(&self.path("images"))
    }
}

fn layers(manifest: &ImageManifest, diff_ids: &[Digest]) -> Result<Vec<Layer>, Error> {
    if manifest.layers().len() != diff_ids.len() {
        let (blobs, names) = (manifest.layers().len(), diff_ids.len());
        let why = format!("the manifest has {blobs} layers and the configuration {names}");
        return Err(Error::invalid("the image", why));
    }
    let chains = manifest::chain_ids(diff_ids);
    let all = manifest.layers().iter().zip(diff_ids).zip(chains);
    all.map(|((blob, diff_id), chain_id)| {
        Ok(Layer { digest: manifest::digest_of(blob)?, size: blob.size(), diff_id: *diff_id, chain_id })
    })
    .collect()
}
