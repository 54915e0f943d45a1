//! The form of `docker save`: `manifest.json` names configurations and layers by their files.

use serde::Deserialize;

use super::contents::Contents;
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::layers::Compression;
use crate::image::manifest::{self, CONFIG_MAX, LAYERS_MAX};
use crate::image::reference::Reference;
use crate::image::store::{Image, Lease, Store};

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Option<Vec<String>>,
}

pub(super) fn load(
    store: &Store,
    lease: &Lease,
    contents: &Contents<'_>,
    manifest: &[u8],
) -> Result<Vec<Image>, Error> {
    let entries: Vec<Entry> = serde_json::from_slice(manifest).map_err(Error::json("manifest.json"))?;
    entries.into_iter().map(|entry| load_image(store, lease, contents, entry)).collect()
}

fn load_image(store: &Store, lease: &Lease, contents: &Contents<'_>, entry: Entry) -> Result<Image, Error> {
    let config = contents.get(&entry.config)?;
    // The file is named by its digest, in the old form and in the new one.
    let stem = entry.config.rsplit('/').next().unwrap_or_default();
    let named = Digest::from_hex(stem.strip_suffix(".json").unwrap_or(stem));
    if let Some(expected) = named.filter(|digest| *digest != config.digest) {
        return Err(Error::WrongDigest { what: entry.config, expected, found: config.digest });
    }
    let parsed = manifest::parse_config(&store.read_blob(&config.digest, CONFIG_MAX)?)?;
    let files = entry.layers.unwrap_or_default();
    if files.len() != parsed.diff_ids.len() || files.len() > LAYERS_MAX {
        let (files, names) = (files.len(), parsed.diff_ids.len());
        return Err(Error::invalid("the image", format!("it has {files} layers, its configuration {names}")));
    }
    let mut layers = vec![];
    for (file, diff_id) in files.iter().zip(&parsed.diff_ids) {
        let stored = contents.get(file)?;
        let compression = contents.compression(&stored)?;
        // A compressed one is compared when it is unpacked.
        if compression == Compression::None && stored.digest != *diff_id {
            return Err(Error::WrongDigest { what: file.clone(), expected: *diff_id, found: stored.digest });
        }
        layers.push((stored.digest, stored.size, compression));
    }
    let manifest = manifest::build((config.digest, config.size), &layers)?;
    let digest = store.put_blob(lease, &manifest)?;
    let names = entry.repo_tags.unwrap_or_default();
    let names = names.iter().map(|name| Ok(Reference::parse(name)?.or_latest()));
    store.add_image(&digest, &names.collect::<Result<Vec<_>, Error>>()?)
}
