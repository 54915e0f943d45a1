//! From a tar stream to a directory.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::attributes::{self, Target};
use super::limits::{Counted, Limited};
use super::stream::{Entry, Kind, TarReader};
use super::tree::{self, Final, Parts, Tree};
use super::{Error, Limits, Rights, compression, links};
use crate::image::digest::{Digest, Hashing};

/// Begins the names that say what of the layers below is deleted.
pub(super) const WHITEOUT: &[u8] = b".wh.";
/// Says that nothing of a directory below is to be seen.
pub(super) const OPAQUE: &[u8] = b".wh..wh..opq";
/// Begins the names of aufs's own files, which nobody needs.
const AUFS: &[u8] = b".wh..wh.";
/// Bytes of the names of directories, which are kept until the end.
const NAMES_MAX: u64 = 256 << 20;

/// How a layer is unpacked.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How large it may be.
    pub limits: Limits,
    /// What of it can be kept.
    pub rights: Rights,
}

/// What came of it.
#[derive(Clone, Copy, Debug)]
pub struct Unpacked {
    /// The digest of the stream as it came, and its length.
    pub blob: (Digest, u64),
    /// The digest of the tar stream in it.
    pub diff_id: Digest,
    /// Bytes of files.
    pub bytes: u64,
    /// Entries.
    pub entries: u64,
    /// Device files that could not be made for want of rights.
    pub skipped_devices: u64,
}

/// The parts of a name, the directory that they lead to, and its parts without links.
type Parent = (Parts, Rc<OwnedFd>, Parts);

/// Where a copy is put, below a root that is there already.
#[derive(Clone, Debug, Default)]
pub struct CopyTo {
    /// The directory, relative to the root. It is there already.
    pub directory: Vec<u8>,
    /// What the first part of each name becomes; `None` takes it away, so that what a directory has is put there.
    pub name: Option<Vec<u8>>,
    /// Whether names are as the archive has them, whatever `name` says.
    pub verbatim: bool,
}

struct Unpacker {
    /// For what is no layer: names are elsewhere, and none means that something is deleted.
    is_copy: bool,
    tree: Tree,
    options: Options,
    unpacked: Unpacked,
    names: u64,
    /// Permissions and times of directories, put on when nothing is made in them any more.
    directories: BTreeMap<Parts, Final>,
    /// The directory of the last entry: most entries lie beside each other.
    parent: Option<Parent>,
}

/// Unpacks a layer into `directory`, which is empty. `below` has the layers under it, the next one first: where an
/// archive leaves directories out, they get the attributes that they have there.
pub fn unpack(
    stream: impl Read,
    directory: &Path,
    below: &[&Path],
    options: Options,
) -> Result<Unpacked, Error> {
    let compressed = Rc::new(Cell::new(0));
    let mut blob = Hashing::new(Counted { inner: stream, count: Rc::clone(&compressed) });
    let tree = Tree::open(directory, below, options.rights)?;
    let mut unpacker = Unpacker::new(tree, false, options);
    unpacker.tree.inherit_root().map_err(Error::file(b"/", "set the root's attributes"))?;
    unpacker.take_implied()?;
    let plain = compression::decompress(&mut blob).map_err(Error::Read)?;
    let limited = Limited { inner: plain, limits: options.limits, unpacked: 0, compressed };
    let mut reader = TarReader::new(Hashing::new(limited));
    while let Some(entry) = reader.next_entry()? {
        unpacker.entry(&entry, &mut reader)?;
    }
    // What is behind the archive's end belongs to the digests.
    let mut plain = reader.into_inner();
    io::copy(&mut plain, &mut io::sink()).map_err(Error::Read)?;
    let (limited, diff_id, _) = plain.finish();
    drop(limited);
    io::copy(&mut blob, &mut io::sink()).map_err(Error::Read)?;
    unpacker.finish()?;
    let (_, digest, bytes) = blob.finish();
    Ok(Unpacked { blob: (digest, bytes), diff_id, ..unpacker.unpacked })
}

/// Unpacks an archive of copied files below `root`, a directory that may have anything in it. Links in it are followed
/// on the way to an entry, as by a process that has it as its root.
pub fn unpack_copy(stream: impl Read, root: &Path, to: &CopyTo, rights: Rights) -> Result<(), Error> {
    let limits = Limits { bytes: u64::MAX, entries: u64::MAX, ratio: u64::MAX };
    let tree = Tree::open(root, &[], rights)?;
    let mut unpacker = Unpacker::new(tree, true, Options { limits, rights });
    let mut reader = TarReader::new(compression::decompress(stream).map_err(Error::Read)?);
    while let Some(mut entry) = reader.next_entry()? {
        if to.rename(&mut entry) {
            unpacker.entry(&entry, &mut reader)?;
        }
    }
    // Whoever writes is not to fail because of what is behind the archive's end.
    io::copy(&mut reader.into_inner(), &mut io::sink()).map_err(Error::Read)?;
    unpacker.finish()
}

impl CopyTo {
    /// Changes an entry's names; false if it is the directory that is there already.
    fn rename(&self, entry: &mut Entry) -> bool {
        let mut nothing = false;
        let mut change = |name: &mut Vec<u8>| {
            let mut parts: Vec<&[u8]> =
                name.split(|b| *b == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
            if !self.verbatim {
                // Of `.` there is no part to be taken away.
                let first = usize::from(!parts.is_empty() && !name.starts_with(b"./"));
                parts.drain(..first);
                if let Some(new) = &self.name {
                    parts.insert(0, new);
                }
            }
            nothing |= parts.is_empty();
            *name = [self.directory.as_slice(), &parts.join(&b'/')].join(&b'/');
        };
        change(&mut entry.name);
        if entry.kind == Kind::HardLink {
            change(&mut entry.link);
        }
        !nothing
    }
}

impl Unpacker {
    fn new(tree: Tree, is_copy: bool, options: Options) -> Self {
        let nothing = Unpacked {
            blob: (Digest::of(b""), 0),
            diff_id: Digest::of(b""),
            bytes: 0,
            entries: 0,
            skipped_devices: 0,
        };
        let directories = BTreeMap::new();
        Self { is_copy, tree, options, unpacked: nothing, names: 0, directories, parent: None }
    }

    fn entry(&mut self, entry: &Entry, reader: &mut TarReader<impl Read>) -> Result<(), Error> {
        self.count_entry()?;
        let mut parents = tree::parts(&entry.name)?;
        let Some(name) = parents.pop() else { return self.root(entry) };
        let (parent, path) = self.parent(&entry.name, &parents)?;
        if self.is_copy {
            return self.place(entry, reader, &parent, &path, &name);
        }
        if name == OPAQUE {
            return self
                .tree
                .make_opaque(parent.as_fd())
                .map_err(Error::file(&entry.name, "hide what is below"));
        }
        if name.starts_with(AUFS) {
            return Ok(());
        }
        if let Some(deleted) = name.strip_prefix(WHITEOUT) {
            return self.whiteout(entry, &parent, deleted);
        }
        self.place(entry, reader, &parent, &path, &name)
    }

    fn count_entry(&mut self) -> Result<(), Error> {
        let Limits { entries, .. } = self.options.limits;
        self.unpacked.entries += 1;
        if self.unpacked.entries > entries {
            Err(Error::Limit { what: "entries", limit: entries })
        } else {
            Ok(())
        }
    }

    /// Directories that were made on the way count like those that the archive names.
    fn take_implied(&mut self) -> Result<(), Error> {
        for (path, last) in self.tree.implied.take() {
            self.count_entry()?;
            self.remember(path, last)?;
        }
        Ok(())
    }

    /// The directory that an entry lies in, and where it really is.
    fn parent(&mut self, name: &[u8], parts: &[Vec<u8>]) -> Result<(Rc<OwnedFd>, Parts), Error> {
        if let Some((last, directory, path)) = &self.parent
            && last == parts
        {
            return Ok((Rc::clone(directory), path.clone()));
        }
        let (directory, path) = self.tree.make_parents(name, parts)?;
        self.take_implied()?;
        let directory = Rc::new(directory);
        self.parent = Some((parts.to_vec(), Rc::clone(&directory), path.clone()));
        Ok((directory, path))
    }

    fn root(&mut self, entry: &Entry) -> Result<(), Error> {
        if entry.kind != Kind::Directory {
            return Err(Error::entry(&entry.name, "the root is no directory"));
        }
        let failed = Error::file(&entry.name, "set the root's attributes");
        let root = self.tree.root().map_err(&failed)?;
        attributes::apply(&Target::File(root), entry, None, self.tree.rights).map_err(&failed)?;
        self.remember(vec![], (entry.mode, entry.mtime))
    }

    fn whiteout(&mut self, entry: &Entry, parent: &OwnedFd, deleted: &[u8]) -> Result<(), Error> {
        if deleted.is_empty() || deleted == b"." || deleted == b".." {
            return Err(Error::entry(&entry.name, "it deletes nothing that can be"));
        }
        let failed = Error::file(&entry.name, "make a whiteout");
        match tree::stat(parent.as_fd(), deleted).map_err(&failed)? {
            None => {
                let (mode, device) = (Mode::empty(), rustix::fs::makedev(0, 0));
                rustix::fs::mknodat(parent, deleted, FileType::CharacterDevice, mode, device).map_err(&failed)
            }
            // What this layer has itself stays; a directory no longer shows what is below it.
            Some(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let directory = rustix::fs::openat(parent, deleted, flags, Mode::empty()).map_err(&failed)?;
                self.tree.make_opaque(directory.as_fd()).map_err(&failed)
            }
            Some(_) => Ok(()),
        }
    }

    fn place(
        &mut self,
        entry: &Entry,
        reader: &mut TarReader<impl Read>,
        parent: &OwnedFd,
        path: &[Vec<u8>],
        name: &[u8],
    ) -> Result<(), Error> {
        let failed = Error::file(&entry.name, "make it");
        let there = tree::stat(parent.as_fd(), name).map_err(&failed)?;
        let is_directory = |mode| FileType::from_raw_mode(mode) == FileType::Directory;
        // A copy is not to remove a whole directory, or put one where somebody wants a file.
        if let Some(stat) = there.filter(|_| self.is_copy)
            && is_directory(stat.st_mode) != (entry.kind == Kind::Directory)
        {
            return Err(Error::entry(
                &entry.name,
                "a directory and something else are not copied over each other",
            ));
        }
        if entry.kind == Kind::Directory {
            let directory = match there {
                Some(stat) if is_directory(stat.st_mode) => {
                    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    rustix::fs::openat(parent, name, flags, Mode::empty()).map_err(&failed)?
                }
                _ => {
                    if there.is_some_and(|stat| !tree::is_whiteout(&stat)) {
                        self.replace(parent, name).map_err(&failed)?;
                    }
                    self.tree.make_directory(parent.as_fd(), name).map_err(&failed)?
                }
            };
            let target = Target::File(directory.as_fd());
            attributes::apply(&target, entry, None, self.tree.rights).map_err(&failed)?;
            return self.remember([path, &[name.to_vec()]].concat(), (entry.mode, entry.mtime));
        }
        if entry.kind == Kind::HardLink {
            // It may be a link to what it replaces, so the other end is looked at first.
            let most = self.options.limits.bytes.saturating_sub(self.unpacked.bytes);
            if there.is_some_and(|stat| is_directory(stat.st_mode)) {
                self.replace(parent, name).map_err(&failed)?;
            }
            self.unpacked.bytes += links::link(&self.tree, entry, parent, name, most)?;
            return self.take_implied();
        }
        if there.is_some() {
            self.replace(parent, name).map_err(&failed)?;
        }
        self.make(entry, reader, parent, name)
    }

    /// Removes what an earlier entry has put there. Directories that were there may be gone then, so none is remembered.
    fn replace(&mut self, parent: &OwnedFd, name: &[u8]) -> Result<(), Errno> {
        self.parent = None;
        tree::remove(parent.as_fd(), name)
    }

    fn make(
        &mut self,
        entry: &Entry,
        reader: &mut TarReader<impl Read>,
        parent: &OwnedFd,
        name: &[u8],
    ) -> Result<(), Error> {
        let failed = Error::file(&entry.name, "make it");
        let rights = self.tree.rights;
        let target = Target::Name(parent.as_fd(), name);
        let mut mode = Some(entry.mode);
        match entry.kind {
            Kind::File => {
                let Limits { bytes, .. } = self.options.limits;
                self.unpacked.bytes = self.unpacked.bytes.saturating_add(entry.size);
                if self.unpacked.bytes > bytes {
                    return Err(Error::Limit { what: "bytes in files", limit: bytes });
                }
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file =
                    rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR).map_err(&failed)?;
                let mut file = File::from(file);
                reader.write_file(entry, &mut file).map_err(Error::io(&entry.name, "write it"))?;
                let target = Target::File(file.as_fd());
                attributes::apply(&target, entry, mode, rights).map_err(&failed)?;
                return attributes::set_time(&target, entry.mtime).map_err(&failed);
            }
            Kind::Symlink => {
                if entry.link.is_empty() {
                    return Err(Error::entry(&entry.name, "it is a link to nothing"));
                }
                rustix::fs::symlinkat(entry.link.as_slice(), parent, name).map_err(&failed)?;
                mode = None;
            }
            Kind::Fifo => {
                let mode = Mode::RUSR | Mode::WUSR;
                rustix::fs::mknodat(parent, name, FileType::Fifo, mode, 0).map_err(&failed)?;
            }
            Kind::CharDevice | Kind::BlockDevice => {
                let (major, minor) = entry.device;
                let kind = match entry.kind {
                    Kind::CharDevice if (major, minor) == (0, 0) => {
                        return Err(Error::entry(
                            &entry.name,
                            "device 0:0 would be overlayfs's sign for a deleted file",
                        ));
                    }
                    Kind::CharDevice => FileType::CharacterDevice,
                    _ => FileType::BlockDevice,
                };
                if !rights.devices {
                    self.unpacked.skipped_devices += 1;
                    return Ok(());
                }
                let device = rustix::fs::makedev(major, minor);
                rustix::fs::mknodat(parent, name, kind, Mode::RUSR | Mode::WUSR, device).map_err(&failed)?;
            }
            Kind::Directory | Kind::HardLink => {
                return Err(Error::entry(&entry.name, "it was to be made elsewhere"));
            }
        }
        attributes::apply(&target, entry, mode, rights).map_err(&failed)?;
        attributes::set_time(&target, entry.mtime).map_err(&failed)
    }

    fn remember(&mut self, path: Parts, last: Final) -> Result<(), Error> {
        self.names += path.iter().map(|part| part.len() as u64 + 32).sum::<u64>();
        if self.names > NAMES_MAX {
            return Err(Error::Limit { what: "bytes in names of directories", limit: NAMES_MAX });
        }
        self.directories.insert(path, last);
        Ok(())
    }

    /// From the innermost directory outwards, since without rights one that is not writable cannot be gone through.
    fn finish(&mut self) -> Result<(), Error> {
        for (path, (mode, time)) in self.directories.iter().rev() {
            // An entry may have been replaced by a later one.
            let Some(directory) = self.tree.directory(path) else { continue };
            let name = path.join(&b'/');
            let failed = Error::file(&name, "set a directory's attributes");
            rustix::fs::fchmod(&directory, Mode::from_raw_mode(*mode)).map_err(&failed)?;
            attributes::set_time(&Target::File(directory.as_fd()), *time).map_err(&failed)?;
        }
        Ok(())
    }
}
