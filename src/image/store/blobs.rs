//! Blobs: files that are named by their digest.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::files::{self, Temporary};
use super::{Lease, Store};
use crate::image::digest::{Digest, Hashing};
use crate::image::error::Error;

/// Begins the names of blobs whose digest is not known yet.
pub(super) const NEW: &str = "new-";

/// A blob that is being written.
pub struct NewBlob {
    file: Hashing<File>,
    temporary: Temporary,
}

/// A blob that is being fetched, and stays when the process ends, so that another one goes on.
pub struct Partial {
    file: Hashing<File>,
    path: PathBuf,
    digest: Digest,
}

fn path_of(store: &Store, digest: &Digest) -> PathBuf {
    store.path("blobs/sha256").join(digest.hex())
}

fn what(digest: &Digest) -> String {
    format!("blob {}", digest.short())
}

impl Store {
    /// Whether a blob is there; with another size than expected it is not.
    pub fn has_blob(&self, digest: &Digest, size: Option<u64>) -> bool {
        let stat = fs::metadata(path_of(self, digest));
        stat.is_ok_and(|stat| stat.is_file() && size.is_none_or(|size| stat.len() == size))
    }

    /// Opens a blob. Whoever reads it compares the digest of what was read.
    pub fn open_blob(&self, digest: &Digest) -> Result<File, Error> {
        let path = path_of(self, digest);
        File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::Missing { what: what(digest) },
            _ => Error::file("open", &path)(error),
        })
    }

    /// Reads a small blob, and compares its digest.
    pub fn read_blob(&self, digest: &Digest, most: u64) -> Result<Vec<u8>, Error> {
        let path = path_of(self, digest);
        let mut bytes = vec![];
        let file = self.open_blob(digest)?.take(most.saturating_add(1));
        { file }.read_to_end(&mut bytes).map_err(Error::file("read", &path))?;
        if bytes.len() as u64 > most {
            return Err(Error::invalid(what(digest), format!("it has more than {most} bytes")));
        }
        if Digest::of(&bytes) == *digest { Ok(bytes) } else { Err(self.discard(digest)?) }
    }

    /// Removes a blob that is not what it is called, so that it is fetched anew.
    fn discard(&self, digest: &Digest) -> Result<Error, Error> {
        files::remove(&path_of(self, digest))?;
        Ok(Error::Damaged { what: what(digest) })
    }

    /// Compares a blob's digest, after something that it contains turned out wrong.
    pub(super) fn check_blob(&self, digest: &Digest) -> Result<(), Error> {
        let mut file = Hashing::new(self.open_blob(digest)?);
        io::copy(&mut file, &mut io::sink()).map_err(Error::file("read", &path_of(self, digest)))?;
        if file.finish().1 == *digest { Ok(()) } else { Err(self.discard(digest)?) }
    }

    /// Writes a small blob.
    pub fn put_blob(&self, lease: &Lease, bytes: &[u8]) -> Result<Digest, Error> {
        let mut blob = self.new_blob()?;
        blob.write_all(bytes).map_err(Error::file("write", blob.temporary.path()))?;
        Ok(self.finish_blob(lease, blob)?.0)
    }

    /// A blob to be written to.
    pub fn new_blob(&self) -> Result<NewBlob, Error> {
        let path = self.path("partial").join(format!("{NEW}{}", files::unique()));
        let _locked = self.shared()?;
        let failed = Error::file("make", &path);
        let file = File::options().write(true).create_new(true).open(&path).map_err(&failed)?;
        let temporary = Temporary::new(path.clone());
        file.lock().map_err(&failed)?;
        Ok(NewBlob { file: Hashing::new(file), temporary })
    }

    /// Gives it its name; answers digest and size.
    pub fn finish_blob(&self, lease: &Lease, blob: NewBlob) -> Result<(Digest, u64), Error> {
        let NewBlob { file, temporary } = blob;
        let (file, digest, size) = file.finish();
        self.protect(lease, &[digest])?;
        if !self.has_blob(&digest, Some(size)) {
            file.sync_all().map_err(Error::file("write", temporary.path()))?;
            files::rename(temporary.path(), &path_of(self, &digest))?;
            temporary.keep();
        }
        Ok((digest, size))
    }

    /// The blob `digest` to be fetched, with what is there of it already; `None` while another process has it.
    pub fn try_partial(&self, digest: &Digest) -> Result<Option<Partial>, Error> {
        let path = self.path("partial").join(digest.hex());
        let locked = self.shared()?;
        let failed = |error| Error::file("open", &path)(error);
        let options = || File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = options().map_err(&failed)?;
        if !files::try_lock(&file, &path)? {
            return Ok(None);
        }
        // Whoever had it may have finished it meanwhile: then this is the blob itself.
        let is_same = |file: &File| -> io::Result<bool> {
            let (open, named) = (file.metadata()?, fs::metadata(&path));
            Ok(named.is_ok_and(|named| (named.dev(), named.ino()) == (open.dev(), open.ino())))
        };
        if !is_same(&file).map_err(&failed)? {
            return Ok(None);
        }
        drop(locked);
        file.seek(SeekFrom::Start(0)).map_err(&failed)?;
        let mut hashing = Hashing::new(file);
        io::copy(&mut hashing, &mut io::sink()).map_err(Error::file("read", &path))?;
        Ok(Some(Partial { file: hashing, path, digest: *digest }))
    }

    /// Gives it its name if it is what it should be; if not, what was fetched is of no use and is removed.
    pub fn finish_partial(&self, partial: Partial, size: u64) -> Result<(), Error> {
        let Partial { file, path, digest } = partial;
        let (file, found, length) = file.finish();
        let wrong = if length != size {
            Some(Error::WrongSize { what: what(&digest), expected: size, found: length })
        } else if found != digest {
            Some(Error::WrongDigest { what: what(&digest), expected: digest, found })
        } else {
            None
        };
        if let Some(error) = wrong {
            files::remove(&path)?;
            return Err(error);
        }
        file.sync_all().map_err(Error::file("write", &path))?;
        files::rename(&path, &path_of(self, &digest))
    }
}

impl Write for NewBlob {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.file.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Partial {
    /// Bytes that are there.
    pub fn length(&self) -> u64 {
        self.file.length()
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds bytes.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file.write_all(bytes).map_err(Error::file("write", &self.path))
    }

    /// Removes what was fetched.
    pub fn remove(self) -> Result<(), Error> {
        files::remove(&self.path).map(drop)
    }

    /// Begins anew.
    pub fn clear(&mut self) -> Result<(), Error> {
        let failed = Error::file("write", &self.path);
        let mut file = self.file.get_mut().try_clone().map_err(&failed)?;
        file.set_len(0).map_err(&failed)?;
        file.seek(SeekFrom::Start(0)).map_err(&failed)?;
        self.file = Hashing::new(file);
        Ok(())
    }
}
