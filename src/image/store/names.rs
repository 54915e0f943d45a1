//! Names: one small file each, so that one can be taken away on a full disk.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Store, files};
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::reference::Reference;

/// What a name's file has.
#[derive(Serialize, Deserialize)]
struct Named {
    name: Reference,
    image: Digest,
}

impl Store {
    /// Names may be longer than files' names, so these are named by digest.
    fn name_path(&self, name: &Reference) -> PathBuf {
        self.path("repositories").join(Digest::of(name.to_string().as_bytes()).hex())
    }

    /// The image that has this name. Under the store's lock.
    pub(super) fn named(&self, name: &Reference) -> Result<Option<Digest>, Error> {
        Ok(self.read_name(&self.name_path(name))?.map(|named| named.image))
    }

    fn read_name(&self, path: &std::path::Path) -> Result<Option<Named>, Error> {
        match fs::read(path) {
            Ok(bytes) => {
                let named = serde_json::from_slice(&bytes);
                named.map(Some).map_err(Error::json(path.display().to_string()))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::file("read", path)(error)),
        }
    }

    /// All names, by image. Under the store's lock.
    pub(super) fn all_names(&self) -> Result<BTreeMap<Digest, Vec<Reference>>, Error> {
        let directory = self.path("repositories");
        let mut all: BTreeMap<Digest, Vec<Reference>> = BTreeMap::new();
        for name in files::names(&directory)? {
            if name.starts_with(files::UNFINISHED) {
                continue;
            }
            if let Some(named) = self.read_name(&directory.join(name))? {
                all.entry(named.image).or_default().push(named.name);
            }
        }
        all.values_mut().for_each(|names| names.sort());
        Ok(all)
    }

    /// Gives an image a name, which another one may have had. Under the store's lock.
    pub(super) fn set_name(&self, name: &Reference, image: &Digest) -> Result<(), Error> {
        let named = Named { name: name.clone(), image: *image };
        let bytes = serde_json::to_vec(&named).map_err(Error::json("a name"))?;
        files::replace(&self.name_path(name), &bytes)
    }

    /// Takes a name away; false if there was none. Under the store's lock.
    pub(super) fn remove_name(&self, name: &Reference) -> Result<bool, Error> {
        let removed = files::remove(&self.name_path(name))?;
        files::sync_directory(&self.path("repositories"))?;
        Ok(removed)
    }
}
