//! Leases: what a process is still adding, and the garbage collection leaves alone.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;

use super::{Store, files};
use crate::image::digest::Digest;
use crate::image::error::Error;

/// Protects blobs and unpacked layers until it is dropped, or its process ends.
///
/// It is a file with the digests, locked as long as it counts.
pub struct Lease {
    file: RefCell<File>,
    path: PathBuf,
}

impl Store {
    /// A lease on nothing yet.
    pub fn lease(&self) -> Result<Lease, Error> {
        let path = self.path("leases").join(files::unique());
        // Under the lock, so that nobody finds the file before it is locked itself.
        let _locked = self.shared()?;
        let failed = |error| Error::file("make", &path)(error);
        let file = File::options().append(true).create_new(true).open(&path).map_err(&failed)?;
        file.lock().map_err(&failed)?;
        Ok(Lease { file: RefCell::new(file), path })
    }

    /// Protects blobs, by digest, and unpacked layers, by chain id, whether they are there or not.
    pub fn protect(&self, lease: &Lease, digests: &[Digest]) -> Result<(), Error> {
        let lines: String = digests.iter().map(|digest| format!("{}\n", digest.hex())).collect();
        let _locked = self.shared()?;
        lease.file.borrow_mut().write_all(lines.as_bytes()).map_err(Error::file("write", &lease.path))
    }

    /// What leases protect. Those of processes that are gone are removed. Under the store's lock, alone.
    pub(super) fn leased(&self) -> Result<Vec<Digest>, Error> {
        let mut digests = vec![];
        for name in files::names(&self.path("leases"))? {
            let path = self.path("leases").join(name);
            if files::is_abandoned(&path)? {
                files::remove(&path)?;
                continue;
            }
            let text = fs::read_to_string(&path).unwrap_or_default();
            digests.extend(text.lines().filter_map(Digest::from_hex));
        }
        Ok(digests)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}
