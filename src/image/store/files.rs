//! Files that are whole or not there.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::image::error::Error;

/// Begins the names of what is not yet whole.
pub(super) const UNFINISHED: &str = ".new-";

/// A name that nobody else has: process, count, and time, for numbers of processes come back.
pub(super) fn unique() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let time =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_nanos();
    format!("{}-{count}-{time:x}", std::process::id())
}

/// A name for what will be `name`.
pub(super) fn unfinished(name: &str) -> String {
    format!("{UNFINISHED}{name}-{}", unique())
}

/// Puts a directory's names onto the disk.
pub(super) fn sync_directory(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(Error::file("write", path))
}

/// Gives a file its final name, for good.
pub(super) fn rename(from: &Path, to: &Path) -> Result<(), Error> {
    fs::rename(from, to).map_err(Error::file("make", to))?;
    to.parent().map_or(Ok(()), sync_directory)
}

/// Writes a small file in one step. Leftovers of a crash are taken away by the garbage collection.
pub(super) fn replace(path: &Path, contents: &[u8]) -> Result<(), Error> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("file");
    let new = path.with_file_name(unfinished(name));
    let written = File::options().write(true).create_new(true).open(&new).and_then(|mut file| {
        file.write_all(contents)?;
        file.sync_all()
    });
    let result = written.map_err(Error::file("write", &new)).and_then(|()| rename(&new, path));
    if result.is_err() {
        let _ = fs::remove_file(&new);
    }
    result
}

/// Removes a file; false if there is none.
pub(super) fn remove(path: &Path) -> Result<bool, Error> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::file("remove", path)(error)),
    }
}

/// Names in a directory, in order; none if it is not there.
pub(super) fn names(path: &Path) -> Result<Vec<String>, Error> {
    let failed = Error::file("read", path);
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        result => result.map_err(&failed)?,
    };
    let mut names = vec![];
    for entry in entries {
        if let Ok(name) = entry.map_err(&failed)?.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Takes the lock of a file or directory without waiting; false if somebody has it.
pub(super) fn try_lock(file: &File, path: &Path) -> Result<bool, Error> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(fs::TryLockError::WouldBlock) => Ok(false),
        Err(fs::TryLockError::Error(error)) => Err(Error::file("lock", path)(error)),
    }
}

/// Whether nobody has the lock of what lies at `path`, so that it is left over. What is gone is nobody's business.
pub(super) fn is_abandoned(path: &Path) -> Result<bool, Error> {
    match File::open(path) {
        Ok(file) => try_lock(&file, path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::file("open", path)(error)),
    }
}

/// A file or directory that is removed unless it is kept.
pub(super) struct Temporary {
    path: PathBuf,
    keep: bool,
}

impl Temporary {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, keep: false }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn keep(mut self) {
        self.keep = true;
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.keep {
            let _ = crate::image::layers::remove_tree(&self.path);
        }
    }
}
