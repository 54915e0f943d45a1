//! The store: blobs by digest, images, names, unpacked layers, disks of layers, and who uses them.
//!
//! Any number of processes share it, without a daemon. What is there under its final name is complete and never
//! changes; it was written under another name, put onto the disk, and renamed. `lock` is held, shared, while something
//! is added, and alone while something is taken away, each for as long as it takes to rename: no download and no
//! unpacking happens under it. What a process is still adding is protected by its [`Lease`]. See docs/images.md.

mod blobs;
mod disks;
mod files;
mod gc;
mod images;
mod layers;
mod lease;
mod names;
mod users;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::error::Error;
use super::layers::{Limits, Rights};

pub use blobs::{NewBlob, Partial};
pub use gc::{Pruned, Reclaimed};
pub use images::{Image, Layer, Removed};
pub use lease::Lease;

/// The layout that this program knows; another one is refused.
const VERSION: &str = "1\n";
/// What the store has.
const DIRECTORIES: [&str; 10] = [
    "blobs/sha256",
    "partial",
    "images",
    "repositories",
    "layers",
    "disks",
    "users",
    "leases",
    "locks",
    "trash",
];

/// A store.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
    limits: Limits,
    rights: Rights,
}

/// The lock on the store, until it is dropped.
pub(super) struct Locked {
    _file: File,
}

impl Store {
    /// Opens a store, and makes it where there is none.
    pub fn open(root: &Path) -> Result<Self, Error> {
        use std::os::unix::fs::DirBuilderExt;
        let store = Self { root: root.to_owned(), limits: Limits::default(), rights: Rights::detect() };
        let version = root.join("version");
        match fs::read_to_string(&version) {
            Ok(text) if text == VERSION => return Ok(store),
            Ok(text) => {
                let why = format!("its layout is {:?}; this program knows {:?}", text.trim(), VERSION.trim());
                return Err(Error::invalid(format!("the image store {}", root.display()), why));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::file("read", &version)(error)),
        }
        for directory in DIRECTORIES {
            let path = root.join(directory);
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.map_err(Error::file("make", &path))?;
        }
        // The version comes last: a store that has one is whole.
        let locked = store.exclusive()?;
        files::replace(&version, VERSION.as_bytes())?;
        drop(locked);
        Ok(store)
    }

    /// With other limits for layers.
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// With other rights than this process's, to make what a process with fewer makes.
    pub fn with_rights(mut self, rights: Rights) -> Self {
        self.rights = rights;
        self
    }

    /// Where it lies.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What layers may have at most.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn lock_file(&self) -> Result<(File, PathBuf), Error> {
        let path = self.path("lock");
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        Ok((file.map_err(Error::file("open", &path))?, path))
    }

    /// Together with others that add.
    pub(super) fn shared(&self) -> Result<Locked, Error> {
        let (file, path) = self.lock_file()?;
        file.lock_shared().map_err(Error::file("lock", &path))?;
        Ok(Locked { _file: file })
    }

    /// Alone.
    pub(super) fn exclusive(&self) -> Result<Locked, Error> {
        let (file, path) = self.lock_file()?;
        file.lock().map_err(Error::file("lock", &path))?;
        Ok(Locked { _file: file })
    }
}

#[cfg(test)]
mod tests;
