//! From a directory in overlayfs's form to a tar stream: what `commit` makes of a container's changes.
//!
//! The same directory gives the same bytes: names in order, no access times, no names of users.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use tar::{EntryType, Header};

use super::tree::{self, is_whiteout};
use super::unpack::{OPAQUE, WHITEOUT};
use super::{Error, Rights, Xattrs, attributes, pax};

const BLOCK: u64 = 512;
/// What a header's own fields take; larger numbers and longer names go into an extended header.
const OCTAL_SIZE_MAX: u64 = 0o77_777_777_777;
const OCTAL_ID_MAX: u32 = 0o7_777_777;
const DEPTH_MAX: usize = 200;

/// What a stream has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    /// Entries, whiteouts among them.
    pub entries: u64,
    /// Bytes of files.
    pub bytes: u64,
}

struct Packer<W> {
    to: W,
    rights: Rights,
    /// For files that are no layer: nothing in them is overlayfs's, and they may get another owner.
    copy: Option<CopyOwner>,
    packed: Packed,
    /// First names of files with several.
    names: HashMap<(u64, u64), Vec<u8>>,
}

/// Whose files are in a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyOwner {
    /// As they are.
    Kept,
    /// Root's.
    Root,
}

/// Writes a directory and all below it as `name`, as an archive for [`super::unpack_copy`].
pub fn pack_directory(
    directory: &OwnedFd,
    name: &[u8],
    owner: CopyOwner,
    to: impl Write,
) -> Result<(), Error> {
    let mut packer = Packer::copying(owner, to);
    let path = [name, b"/"].concat();
    let failed = Error::file(&path, "read it");
    let stat = rustix::fs::fstat(directory).map_err(&failed)?;
    let xattrs = packer.xattrs(&path, attributes::list(directory.as_fd()).map_err(&failed)?)?;
    packer.header(&path, &stat, EntryType::Directory, 0, b"", &xattrs)?;
    packer.directory(directory, &path, 0)?;
    packer.end()
}

/// Writes the file `file` of a directory as `name`; a link is written as one.
pub fn pack_file(
    parent: BorrowedFd<'_>,
    file: &[u8],
    name: &[u8],
    owner: CopyOwner,
    to: impl Write,
) -> Result<(), Error> {
    let mut packer = Packer::copying(owner, to);
    let gone = || Error::entry(name, "it is not there any more");
    let stat = tree::stat(parent, file).map_err(Error::file(name, "read it"))?.ok_or_else(gone)?;
    packer.entry(parent, (b"", name), file, &stat, 0)?;
    packer.end()
}

/// Writes the directory as a layer.
pub fn pack(directory: &Path, to: impl Write, rights: Rights) -> Result<Packed, Error> {
    let name = directory.as_os_str().as_encoded_bytes();
    let root = File::open(directory).map_err(Error::io(name, "open it"))?;
    let root = OwnedFd::from(root);
    let stat = rustix::fs::fstat(&root).map_err(Error::file(name, "read it"))?;
    let mut packer = Packer { to, rights, copy: None, packed: Packed::default(), names: HashMap::new() };
    packer.header(b"./", &stat, EntryType::Directory, 0, b"", &[])?;
    packer.directory(&root, b"", 0)?;
    packer.end()?;
    Ok(packer.packed)
}

impl<W: Write> Packer<W> {
    fn copying(owner: CopyOwner, to: W) -> Self {
        let (packed, names) = (Packed::default(), HashMap::new());
        Self { to, rights: Rights::detect(), copy: Some(owner), packed, names }
    }

    fn end(&mut self) -> Result<(), Error> {
        let end = [0; 2 * BLOCK as usize];
        self.to.write_all(&end).and_then(|()| self.to.flush()).map_err(Error::io(b"", "write the archive"))
    }

    fn directory(&mut self, directory: &OwnedFd, path: &[u8], depth: usize) -> Result<(), Error> {
        let failed = Error::file(path, "read it");
        if depth > DEPTH_MAX {
            return Err(Error::entry(path, "it lies too deep"));
        }
        let mut names = vec![];
        for entry in Dir::read_from(directory).map_err(&failed)? {
            let name = entry.map_err(&failed)?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(name);
            }
        }
        names.sort();
        for name in names {
            // Gone since the names were read: the container is still running.
            let Some(stat) = tree::stat(directory.as_fd(), &name).map_err(&failed)? else { continue };
            self.entry(directory.as_fd(), (path, &name), &name, &stat, depth)?;
        }
        Ok(())
    }

    fn entry(
        &mut self,
        parent: BorrowedFd<'_>,
        (directory, as_name): (&[u8], &[u8]),
        name: &[u8],
        stat: &Stat,
        depth: usize,
    ) -> Result<(), Error> {
        let path = [directory, as_name].concat();
        let failed = Error::file(&path, "read it");
        if self.copy.is_none() && name.starts_with(WHITEOUT) {
            return Err(Error::entry(&path, "a name that begins with .wh. would delete something"));
        }
        if self.copy.is_none() && is_whiteout(stat) {
            return self.whiteout(&[directory, WHITEOUT, name].concat());
        }
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind != FileType::Directory && stat.st_nlink > 1 {
            if let Some(first) = self.names.get(&(stat.st_dev, stat.st_ino)).cloned() {
                return self.header(&path, stat, EntryType::Link, 0, &first, &[]);
            }
            self.names.insert((stat.st_dev, stat.st_ino), path.clone());
        }
        let open = |flags| {
            let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            rustix::fs::openat(parent, name, flags, Mode::empty())
        };
        match kind {
            FileType::RegularFile => {
                let file = open(OFlags::RDONLY).map_err(&failed)?;
                let xattrs = self.xattrs(&path, attributes::list(file.as_fd()).map_err(&failed)?)?;
                // The size that it has now: a running container may have written since.
                let stat = rustix::fs::fstat(&file).map_err(&failed)?;
                let size = u64::try_from(stat.st_size).unwrap_or(0);
                self.header(&path, &stat, EntryType::Regular, size, b"", &xattrs)?;
                self.packed.bytes += size;
                self.data(&path, File::from(file), size)
            }
            FileType::Directory => {
                let inner = open(OFlags::RDONLY | OFlags::DIRECTORY).map_err(&failed)?;
                let all = attributes::list(inner.as_fd()).map_err(&failed)?;
                let is_opaque =
                    all.iter().any(|(name, value)| name == self.rights.opaque().as_bytes() && value == b"y");
                let xattrs = self.xattrs(&path, all)?;
                let path = [path.as_slice(), b"/"].concat();
                self.header(&path, stat, EntryType::Directory, 0, b"", &xattrs)?;
                if is_opaque && self.copy.is_none() {
                    self.whiteout(&[path.as_slice(), OPAQUE].concat())?;
                }
                self.directory(&inner, &path, depth + 1)
            }
            // Whoever listened there is gone with the container.
            FileType::Socket => Ok(()),
            kind => {
                let xattrs = self.xattrs(&path, attributes::list_at(parent, name).map_err(&failed)?)?;
                let mut link = vec![];
                let kind = match kind {
                    FileType::Symlink => {
                        link = rustix::fs::readlinkat(parent, name, vec![]).map_err(&failed)?.into_bytes();
                        EntryType::Symlink
                    }
                    FileType::CharacterDevice => EntryType::Char,
                    FileType::BlockDevice => EntryType::Block,
                    FileType::Fifo => EntryType::Fifo,
                    _ => return Err(Error::entry(&path, "nobody knows what this type of file is")),
                };
                self.header(&path, stat, kind, 0, &link, &xattrs)
            }
        }
    }

    /// What of a file's attributes belongs into the layer.
    fn xattrs(&self, path: &[u8], all: Xattrs) -> Result<Xattrs, Error> {
        let mut kept = vec![];
        for (name, value) in all {
            let overlay =
                name.strip_prefix(b"trusted.overlay.").or_else(|| name.strip_prefix(b"user.overlay."));
            match overlay {
                Some(b"redirect" | b"metacopy") if self.copy.is_none() => {
                    return Err(Error::entry(
                        path,
                        "overlayfs keeps a part of it elsewhere (redirect_dir or metacopy)",
                    ));
                }
                Some(_) => {}
                None => kept.push((name, value)),
            }
        }
        Ok(kept)
    }

    fn whiteout(&mut self, path: &[u8]) -> Result<(), Error> {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(0);
        self.write(path, header, b"", vec![])
    }

    fn header(
        &mut self,
        path: &[u8],
        stat: &Stat,
        kind: EntryType,
        size: u64,
        link: &[u8],
        xattrs: &[(Vec<u8>, Vec<u8>)],
    ) -> Result<(), Error> {
        let mut header = Header::new_ustar();
        let mut extended = vec![];
        header.set_entry_type(kind);
        header.set_mode(stat.st_mode & 0o7777);
        let mut number = |key: &[u8], value: u64, max: u64| {
            if value > max {
                extended.extend(pax::encode(key, value.to_string().as_bytes()));
            }
            value.min(max)
        };
        header.set_size(number(b"size", size, OCTAL_SIZE_MAX));
        let (uid, gid) = match self.copy {
            Some(CopyOwner::Root) => (0, 0),
            _ => (stat.st_uid, stat.st_gid),
        };
        header.set_uid(number(b"uid", uid.into(), OCTAL_ID_MAX.into()));
        header.set_gid(number(b"gid", gid.into(), OCTAL_ID_MAX.into()));
        let seconds = u64::try_from(stat.st_mtime).unwrap_or(0).min(OCTAL_SIZE_MAX);
        header.set_mtime(seconds);
        if stat.st_mtime < 0 || stat.st_mtime_nsec != 0 {
            extended.extend(pax::encode(b"mtime", time(stat).as_bytes()));
        }
        if matches!(kind, EntryType::Char | EntryType::Block) {
            let failed = |_| Error::entry(path, "its device numbers do not fit");
            header.set_device_major(rustix::fs::major(stat.st_rdev)).map_err(failed)?;
            header.set_device_minor(rustix::fs::minor(stat.st_rdev)).map_err(failed)?;
        }
        for (name, value) in xattrs {
            extended.extend(pax::encode(&[b"SCHILY.xattr.", name.as_slice()].concat(), value));
        }
        self.write(path, header, link, extended)
    }

    fn write(
        &mut self,
        path: &[u8],
        mut header: Header,
        link: &[u8],
        mut extended: Vec<u8>,
    ) -> Result<(), Error> {
        self.packed.entries += 1;
        let failed = Error::io(path, "write it to the archive");
        // A field that is full has no zero at its end, which not everybody reads; so names go there only when shorter.
        if let Some(ustar) = header.as_ustar_mut() {
            for (field, text, key) in
                [(&mut ustar.name, path, &b"path"[..]), (&mut ustar.linkname, link, b"linkpath")]
            {
                match field.get_mut(..text.len()) {
                    Some(start) if text.len() < 100 && text.is_ascii() => start.copy_from_slice(text),
                    _ => extended.extend(pax::encode(key, text)),
                }
            }
        }
        if !extended.is_empty() {
            let mut before = Header::new_ustar();
            before.set_entry_type(EntryType::XHeader);
            before.set_path("PaxHeaders/0").map_err(&failed)?;
            before.set_mode(0o644);
            before.set_uid(0);
            before.set_gid(0);
            before.set_mtime(0);
            before.set_size(extended.len() as u64);
            before.set_cksum();
            let filling = vec![0; filling(extended.len() as u64)];
            for bytes in [before.as_bytes().as_slice(), &extended, &filling] {
                self.to.write_all(bytes).map_err(&failed)?;
            }
        }
        header.set_cksum();
        self.to.write_all(header.as_bytes()).map_err(&failed)
    }

    fn data(&mut self, path: &[u8], file: File, size: u64) -> Result<(), Error> {
        let failed = Error::io(path, "write it to the archive");
        let copied = io::copy(&mut file.take(size), &mut self.to).map_err(&failed)?;
        if copied != size {
            return Err(Error::File {
                name: super::shown(path),
                doing: "read it while it becomes shorter",
                source: Errno::AGAIN.into(),
            });
        }
        self.to.write_all(&vec![0; filling(size)]).map_err(&failed)
    }
}

fn filling(size: u64) -> usize {
    usize::try_from((BLOCK - size % BLOCK) % BLOCK).unwrap_or(0)
}

/// As a record has it: the fraction counts away from the second that is nearer to zero.
fn time(stat: &Stat) -> String {
    let nanoseconds = u32::try_from(stat.st_mtime_nsec).unwrap_or(0);
    if stat.st_mtime >= 0 || nanoseconds == 0 {
        return format!("{}.{nanoseconds:09}", stat.st_mtime);
    }
    let whole = stat.st_mtime.saturating_add(1).unsigned_abs();
    format!("-{whole}.{:09}", 1_000_000_000 - nanoseconds)
}
