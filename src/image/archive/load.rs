//! Loading: whatever of the known forms it is.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use super::contents::Contents;
use super::{docker, oci};
use crate::image::error::Error;
use crate::image::store::{Image, Store};

/// Loads the images of a stream; `name` says for people where it comes from.
pub fn load(store: &Store, stream: impl Read, name: &str) -> Result<Vec<Image>, Error> {
    let lease = store.lease()?;
    let contents = Contents::of_archive(store, &lease, stream, name)?;
    let images = load_contents(store, &lease, &contents)?;
    drop(contents);
    drop(lease);
    // The archive's own small files are of no more use.
    store.gc()?;
    Ok(images)
}

/// Loads the images of an archive or a folder.
pub fn load_path(store: &Store, path: &Path) -> Result<Vec<Image>, Error> {
    let failed = Error::file("open", path);
    if !fs::metadata(path).map_err(&failed)?.is_dir() {
        return load(store, File::open(path).map_err(&failed)?, &path.display().to_string());
    }
    let lease = store.lease()?;
    let contents = Contents::of_folder(store, &lease, path)?;
    let images = load_contents(store, &lease, &contents)?;
    drop(contents);
    drop(lease);
    store.gc()?;
    Ok(images)
}

fn load_contents(
    store: &Store,
    lease: &crate::image::store::Lease,
    contents: &Contents<'_>,
) -> Result<Vec<Image>, Error> {
    // Where both are there, the specification's form says more: it has the manifest as it was pulled.
    if let Some(index) = contents.small("index.json")? {
        return oci::load(store, contents, &index);
    }
    if let Some(manifest) = contents.small("manifest.json")? {
        return docker::load(store, lease, contents, &manifest);
    }
    let why = "it is no archive of images: neither index.json (OCI) nor manifest.json (docker save) is in it";
    Err(Error::invalid(contents.name(), why))
}
