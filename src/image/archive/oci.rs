//! The form of the specification: `index.json`, and blobs by digest.

use oci_spec::image::{Descriptor, ImageIndex};

use super::contents::Contents;
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::manifest::{self, Document, INDEX_DEPTH_MAX, MANIFEST_MAX};
use crate::image::reference::Reference;
use crate::image::store::{Image, Store};

/// The whole name, as containerd and Docker write it.
pub(super) const FULL_NAME: &str = "io.containerd.image.name";
/// A tag, or a whole name with other tools.
pub(super) const REF_NAME: &str = "org.opencontainers.image.ref.name";

pub(super) fn load(store: &Store, contents: &Contents<'_>, index: &[u8]) -> Result<Vec<Image>, Error> {
    let index: ImageIndex = serde_json::from_slice(index).map_err(Error::json("index.json"))?;
    let names = |entry: &Descriptor| names(entry);
    let some_named = index.manifests().iter().any(|entry| entry.annotations().is_some());
    if index.manifests().len() > 1 && !some_named {
        // One image for several platforms, without an index of its own.
        let entry = manifest::choose(&index)?;
        return Ok(vec![load_image(store, contents, entry, &[])?]);
    }
    let mut images: Vec<Image> = vec![];
    for entry in index.manifests() {
        let image = load_image(store, contents, entry, &names(entry))?;
        // Several names of one image are several entries.
        images.retain(|other| other.id != image.id);
        images.push(image);
    }
    if images.is_empty() {
        return Err(Error::invalid(contents.name(), "there is no image in it"));
    }
    Ok(images)
}

/// The names that an entry says, if they are whole ones: a tag alone names nothing.
fn names(entry: &Descriptor) -> Vec<Reference> {
    let Some(annotations) = entry.annotations() else { return vec![] };
    let whole = annotations.get(FULL_NAME);
    let short = annotations.get(REF_NAME).filter(|name| name.contains(['/', ':']));
    let name = whole.or(short).and_then(|name| Reference::parse(name).ok());
    name.map(Reference::or_latest).into_iter().collect()
}

/// A blob of the layout, which has to be what it is called.
fn blob(contents: &Contents<'_>, descriptor: &Descriptor) -> Result<Digest, Error> {
    let expected = manifest::digest_of(descriptor)?;
    let stored = contents.get(&format!("blobs/sha256/{}", expected.hex()))?;
    let what = format!("blob {}", expected.short());
    if stored.digest != expected {
        return Err(Error::WrongDigest { what, expected, found: stored.digest });
    }
    if stored.size != descriptor.size() {
        return Err(Error::WrongSize { what, expected: descriptor.size(), found: stored.size });
    }
    Ok(expected)
}

fn load_image(
    store: &Store,
    contents: &Contents<'_>,
    entry: &Descriptor,
    names: &[Reference],
) -> Result<Image, Error> {
    let mut entry = entry.clone();
    for _ in 0..=INDEX_DEPTH_MAX {
        let digest = blob(contents, &entry)?;
        let media_type = entry.media_type().to_string();
        match manifest::parse(&store.read_blob(&digest, MANIFEST_MAX)?, Some(&media_type))? {
            Document::Manifest(manifest) => {
                blob(contents, manifest.config())?;
                manifest.layers().iter().try_for_each(|layer| blob(contents, layer).map(drop))?;
                return store.add_image(&digest, names);
            }
            Document::Index(index) => entry = manifest::choose(&index)?.clone(),
        }
    }
    Err(Error::invalid(contents.name(), "it has indexes within indexes"))
}
