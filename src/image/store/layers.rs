//! Layers, unpacked once each.

use std::fs::{self, File};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::files::{self, Temporary};
use super::{Image, Layer, Store};
use crate::image::error::Error;
use crate::image::layers::{self, Options, Rights};

/// What is remembered of an unpacked layer.
#[derive(Serialize, Deserialize)]
struct Record {
    /// Bytes of its files.
    bytes: u64,
    /// Entries of the archive.
    entries: u64,
    /// Device files that could not be made.
    skipped_devices: u64,
}

/// The file with it, beside the directory.
const RECORD: &str = "layer.json";
/// The directory.
const FILES: &str = "fs";

impl Store {
    fn layer_path(&self, layer: &Layer) -> PathBuf {
        self.path("layers").join(layer.chain_id.hex())
    }

    /// One process at a time makes a layer or its disk; others wait. There are 256 of these locks and they stay, since a
    /// lock that is removed can be held twice.
    pub(super) fn making(&self, layer: &Layer) -> Result<File, Error> {
        let name: String = layer.chain_id.hex().chars().take(2).collect();
        let path = self.path("locks").join(name);
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(Error::file("open", &path))?;
        file.lock().map_err(Error::file("lock", &path))?;
        Ok(file)
    }

    /// The unpacked layers, bottom first; those that are not unpacked yet are. Hold the image before.
    pub fn layer_dirs(&self, image: &Image) -> Result<Vec<PathBuf>, Error> {
        self.layer_dirs_with(image, |_, _| {})
    }

    /// The same; `progress` is told of each layer when it is there, and whether it had to be unpacked.
    pub fn layer_dirs_with(
        &self,
        image: &Image,
        mut progress: impl FnMut(&Layer, bool),
    ) -> Result<Vec<PathBuf>, Error> {
        let lease = self.lease()?;
        let needed: Vec<_> = image.layers.iter().flat_map(|layer| [layer.digest, layer.chain_id]).collect();
        self.protect(&lease, &needed)?;
        let mut below: Vec<PathBuf> = vec![];
        for layer in &image.layers {
            let path = self.layer_path(layer);
            let missing = !path.exists();
            if missing {
                self.unpack(layer, &below)?;
            }
            progress(layer, missing);
            below.push(path.join(FILES));
        }
        Ok(below)
    }

    fn unpack(&self, layer: &Layer, below: &[PathBuf]) -> Result<(), Error> {
        let _making = self.making(layer)?;
        let path = self.layer_path(layer);
        if path.exists() {
            return Ok(());
        }
        let new = self.path("layers").join(files::unfinished(&layer.chain_id.hex()));
        let failed = Error::file("make", &new);
        let files = new.join(FILES);
        // Under the lock, so that nobody finds the directory before it is locked itself.
        let locked = self.shared()?;
        fs::create_dir(&new).map_err(&failed)?;
        let temporary = Temporary::new(new.clone());
        let directory = File::open(&new).map_err(&failed)?;
        directory.lock().map_err(&failed)?;
        drop(locked);
        fs::create_dir(&files).map_err(&failed)?;

        let below: Vec<_> = below.iter().rev().map(PathBuf::as_path).collect();
        let options = Options { limits: self.limits, rights: self.rights };
        let blob = self.open_blob(&layer.digest)?;
        let unpacked = match layers::unpack(blob, &files, &below, options) {
            Ok(unpacked) => unpacked,
            Err(source) => {
                // Whether the layer was made so, or became so here.
                self.check_blob(&layer.digest)?;
                return Err(Error::Unpack { layer: layer.digest, source });
            }
        };
        if unpacked.blob.0 != layer.digest {
            self.check_blob(&layer.digest)?;
        }
        let what = format!("layer {}", layer.digest.short());
        for (expected, found) in [(layer.digest, unpacked.blob.0), (layer.diff_id, unpacked.diff_id)] {
            if expected != found {
                return Err(Error::WrongDigest { what, expected, found });
            }
        }
        let layers::Unpacked { bytes, entries, skipped_devices, .. } = unpacked;
        let record = Record { bytes, entries, skipped_devices };
        let record = serde_json::to_vec(&record).map_err(Error::json("a layer's record"))?;
        files::replace(&new.join(RECORD), &record)?;
        // All files at once; one by one would take a hundred times as long.
        rustix::fs::syncfs(&directory).map_err(|errno| Error::file("write", &new)(errno.into()))?;
        files::rename(temporary.path(), &path)?;
        temporary.keep();
        Ok(())
    }

    /// Bytes of an image's files, once all of its layers are unpacked.
    pub fn unpacked_size(&self, image: &Image) -> Option<u64> {
        let size = |layer: &Layer| {
            let bytes = fs::read(self.layer_path(layer).join(RECORD)).ok()?;
            Some(serde_json::from_slice::<Record>(&bytes).ok()?.bytes)
        };
        image.layers.iter().try_fold(0u64, |sum, layer| Some(sum.saturating_add(size(layer)?)))
    }

    /// What of layers this process can keep: owners, devices, attributes of root.
    pub fn rights(&self) -> Rights {
        self.rights
    }
}
