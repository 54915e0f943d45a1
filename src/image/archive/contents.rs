//! The files of an archive or a folder, taken into the store by their digest.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::layers::{self, Compression, Kind, TarReader};
use crate::image::store::{Lease, Store};

/// Files of an archive. Each layer has up to three of them.
const FILES_MAX: u64 = 10_000;
/// Links from one name to another.
const LINKS_MAX: usize = 8;
/// Bytes of a file that is parsed.
const SMALL_MAX: u64 = 8 << 20;

/// A file that is in the store now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) digest: Digest,
    pub(super) size: u64,
}

enum Files {
    /// A stream can be read only once, so all of its files are stored already.
    Archive {
        stored: BTreeMap<String, Stored>,
        links: BTreeMap<String, String>,
    },
    Folder {
        directory: OwnedFd,
    },
}

/// The files of an archive or folder.
pub(super) struct Contents<'a> {
    store: &'a Store,
    lease: &'a Lease,
    files: Files,
    name: String,
}

/// A name with no needless parts; links may lead upwards within the archive.
fn normal(name: &str) -> String {
    let mut parts: Vec<&str> = vec![];
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

impl<'a> Contents<'a> {
    /// Reads a tar stream, compressed or not.
    pub(super) fn of_archive(
        store: &'a Store,
        lease: &'a Lease,
        stream: impl Read,
        name: &str,
    ) -> Result<Self, Error> {
        let failed = |source| Error::Archive { name: name.to_owned(), source };
        let plain = layers::decompress(stream).map_err(|error| failed(layers::Error::Read(error)))?;
        let mut reader = TarReader::new(plain);
        let (mut stored, mut links) = (BTreeMap::new(), BTreeMap::new());
        let (mut count, mut bytes) = (0u64, 0u64);
        let most = store.limits().bytes;
        while let Some(entry) = reader.next_entry().map_err(failed)? {
            count += 1;
            bytes = bytes.saturating_add(entry.size);
            for (value, limit, what) in [(count, FILES_MAX, "entries"), (bytes, most, "bytes")] {
                if value > limit {
                    return Err(failed(layers::Error::Limit { what, limit }));
                }
            }
            let path = normal(&String::from_utf8_lossy(&entry.name));
            let link = String::from_utf8_lossy(&entry.link);
            match entry.kind {
                Kind::File => {
                    let mut blob = store.new_blob()?;
                    io::copy(&mut reader, &mut blob).map_err(|error| failed(layers::Error::Read(error)))?;
                    let (digest, size) = store.finish_blob(lease, blob)?;
                    stored.insert(path, Stored { digest, size });
                }
                Kind::HardLink => drop(links.insert(path, normal(&link))),
                // Docker saves a layer that comes twice as a link from the one's directory to the other's.
                Kind::Symlink => {
                    let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
                    let target = normal(&format!("{parent}/{link}"));
                    links.insert(path, target);
                }
                _ => {}
            }
        }
        Ok(Self { store, lease, files: Files::Archive { stored, links }, name: name.to_owned() })
    }

    /// Takes files from a folder as they are asked for.
    pub(super) fn of_folder(store: &'a Store, lease: &'a Lease, path: &Path) -> Result<Self, Error> {
        let directory = File::open(path).map_err(Error::file("open", path))?.into();
        Ok(Self { store, lease, files: Files::Folder { directory }, name: path.display().to_string() })
    }

    /// What it is called, for messages.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// A file, in the store; `None` if there is none.
    pub(super) fn find(&self, path: &str) -> Result<Option<Stored>, Error> {
        match &self.files {
            Files::Archive { stored, links } => {
                let mut path = normal(path);
                for _ in 0..LINKS_MAX {
                    match links.get(&path) {
                        Some(target) if !stored.contains_key(&path) => path = target.clone(),
                        _ => break,
                    }
                }
                Ok(stored.get(&path).copied())
            }
            Files::Folder { directory } => self.take(directory, &normal(path)),
        }
    }

    fn take(&self, directory: &OwnedFd, path: &str) -> Result<Option<Stored>, Error> {
        let failed = Error::file("read", Path::new(path));
        // A folder may be somebody else's: no link in it leads out.
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = match rustix::fs::openat2(directory.as_fd(), path, flags, Mode::empty(), resolve) {
            Err(Errno::NOENT) => return Ok(None),
            result => result.map_err(|errno| failed(errno.into()))?,
        };
        let stat = rustix::fs::fstat(&file).map_err(|errno| failed(errno.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Error::invalid(path, "it is not a file"));
        }
        let mut blob = self.store.new_blob()?;
        let most = self.store.limits().bytes;
        let mut file = File::from(file).take(most);
        io::copy(&mut file, &mut blob).map_err(failed)?;
        let (digest, size) = self.store.finish_blob(self.lease, blob)?;
        Ok(Some(Stored { digest, size }))
    }

    /// A file that has to be there.
    pub(super) fn get(&self, path: &str) -> Result<Stored, Error> {
        self.find(path)?.ok_or_else(|| Error::invalid(self.name.clone(), format!("it has no {path:?}")))
    }

    /// A file that is parsed.
    pub(super) fn small(&self, path: &str) -> Result<Option<Vec<u8>>, Error> {
        let stored = self.find(path)?;
        stored.map(|stored| self.store.read_blob(&stored.digest, SMALL_MAX)).transpose()
    }

    /// How a stored file is compressed.
    pub(super) fn compression(&self, stored: &Stored) -> Result<Compression, Error> {
        let mut start = [0; 8];
        let mut filled = 0;
        let mut file = self.store.open_blob(&stored.digest)?;
        let failed = |error| Error::Archive { name: self.name.clone(), source: layers::Error::Read(error) };
        while let Some(rest) = start.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match file.read(rest).map_err(failed)? {
                0 => break,
                count => filled += count,
            }
        }
        layers::detect(start.get(..filled).unwrap_or_default()).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::normal;

    #[test]
    fn names_never_lead_out() {
        for (name, expected) in [
            ("./a//b/", "a/b"),
            ("a/../../b", "b"),
            ("../../etc/passwd", "etc/passwd"),
            ("/a", "a"),
            ("", ""),
        ] {
            assert_eq!(normal(name), expected);
        }
    }
}
