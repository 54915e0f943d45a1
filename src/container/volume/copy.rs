//! Copies of trees that an image brought: whatever is in them, nothing outside of them is read or written.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, OsStr};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid, XattrFlags,
    chmodat, chownat, lgetxattr, linkat, llistxattr, lsetxattr, mkdirat, mknodat, open, openat, openat2,
    readlinkat, statat, symlinkat, utimensat,
};
use rustix::io::Errno;

use super::{Error, delete, host};

/// Names and values of extended attributes have at most so many bytes (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const ATTRIBUTE_BYTES_MAX: usize = 64 << 10;
/// What belongs to a file system below and not to the file.
const ATTRIBUTES_LEFT_OUT: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];

/// Opens a directory of a container as the container would find it; `None` if there is none.
pub(super) fn open_below(root: &Path, target: &Path) -> Result<Option<OwnedFd>, Error> {
    let failed = |path| host("open", path);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root_directory = open(root, flags, Mode::empty()).map_err(|errno| failed(root)(errno.into()))?;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    match openat2(&root_directory, target, flags, Mode::empty(), resolve) {
        Ok(directory) => Ok(Some(directory)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
        Err(errno) => Err(failed(target)(errno.into())),
    }
}

/// Copies everything in `from`, and its own owner and mode, to the empty directory `to`.
pub(super) fn copy_tree(from: &OwnedFd, to: &Path) -> Result<(), Error> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = open(to, flags, Mode::empty()).map_err(|errno| host("open", to)(errno.into()))?;
    let mut copy = Copy { from, to: directory, links: BTreeMap::new(), directories: vec![] };
    copy.run().map_err(|(path, source)| Error::Host { what: "copy", path: Path::new("/").join(path), source })
}

/// Moves what was copied into a volume, and gives the volume the copy's owner and mode. What the volume has of the same
/// name stays.
pub(super) fn move_into(copied: &Path, data: &Path) -> Result<(), Error> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    for entry in fs::read_dir(copied).map_err(host("read", copied))? {
        let entry = entry.map_err(host("read", copied))?;
        let to = data.join(entry.file_name());
        if to.symlink_metadata().is_err() {
            fs::rename(entry.path(), &to).map_err(host("make", &to))?;
        }
    }
    let directory =
        |path: &Path| open(path, flags, Mode::empty()).map_err(|errno| host("open", path)(errno.into()));
    let (from, to) = (directory(copied)?, directory(data)?);
    let stat = rustix::fs::fstat(&from).map_err(|errno| host("look at", copied)(errno.into()))?;
    copy_attributes(from.as_fd(), OsStr::new("."), to.as_fd(), Path::new("."))
        .and_then(|()| set_metadata(to.as_fd(), Path::new("."), &stat))
        .map_err(host("change", data))?;
    delete(copied)
}

/// An error, and the path at which it came up.
type Failure = (PathBuf, io::Error);

struct Copy<'a> {
    from: &'a OwnedFd,
    to: OwnedFd,
    /// Files with several names, by their numbers: the first name in the copy.
    links: BTreeMap<(u64, u64), PathBuf>,
    /// Directories in the order in which they were made.
    directories: Vec<(PathBuf, Stat)>,
}

impl Copy<'_> {
    fn run(&mut self) -> Result<(), Failure> {
        let root = PathBuf::from(".");
        let stat = rustix::fs::fstat(self.from).map_err(|errno| (root.clone(), errno.into()))?;
        self.directories.push((root.clone(), stat));
        let mut waiting = vec![root];
        while let Some(path) = waiting.pop() {
            self.copy_directory(&path, &mut waiting).map_err(|(name, error)| (path.join(name), error))?;
        }
        // Only now, since what was made in a directory changed its times, and its mode may forbid to make anything.
        for (path, stat) in self.directories.iter().rev() {
            set_metadata(self.to.as_fd(), path, stat).map_err(|error| (path.clone(), error))?;
        }
        Ok(())
    }

    /// Copies what is in one directory; the directories among it are left for later.
    fn copy_directory(&mut self, path: &Path, waiting: &mut Vec<PathBuf>) -> Result<(), Failure> {
        let here = |error: Errno| (PathBuf::new(), error.into());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let directory = match openat2(self.from, path, flags, Mode::empty(), resolve) {
            Ok(directory) => directory,
            // Something else is mounted there, which is not the image's.
            Err(Errno::XDEV) => return Ok(()),
            Err(errno) => return Err(here(errno)),
        };
        copy_attributes(directory.as_fd(), OsStr::new("."), self.to.as_fd(), path)
            .map_err(|error| (PathBuf::new(), error))?;
        for entry in Dir::read_from(&directory).map_err(here)? {
            let entry = entry.map_err(here)?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let to = path.join(OsStr::from_bytes(name.to_bytes()));
            let failed = |error| (PathBuf::from(OsStr::from_bytes(name.to_bytes())), error);
            if self.copy_entry(directory.as_fd(), name, &to).map_err(failed)? {
                waiting.push(to);
            }
        }
        Ok(())
    }

    /// Copies a file of any kind; tells whether it is a directory.
    fn copy_entry(&mut self, directory: BorrowedFd<'_>, name: &CStr, to: &Path) -> io::Result<bool> {
        let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Directory {
            mkdirat(&self.to, to, Mode::RWXU)?;
            self.directories.push((to.to_path_buf(), stat));
            return Ok(true);
        }
        if stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&(stat.st_dev, stat.st_ino)) {
                linkat(&self.to, first, &self.to, to, AtFlags::empty())?;
                return Ok(false);
            }
            self.links.insert((stat.st_dev, stat.st_ino), to.to_path_buf());
        }
        match kind {
            FileType::RegularFile => self.copy_contents(directory, name, to)?,
            FileType::Symlink => symlinkat(readlinkat(directory, name, vec![])?, &self.to, to)?,
            _ => match mknodat(&self.to, to, kind, Mode::RUSR | Mode::WUSR, stat.st_rdev) {
                // Users may not make devices, and a container of theirs could not use one.
                Err(Errno::PERM) if !is_root() => return Ok(false),
                other => other?,
            },
        }
        let (source, target) = (OsStr::from_bytes(name.to_bytes()), self.to.as_fd());
        // The owner first: changing it takes capabilities away.
        set_owner(target, to, &stat)?;
        copy_attributes(directory, source, target, to)?;
        set_metadata(target, to, &stat)?;
        Ok(false)
    }

    fn copy_contents(&self, directory: BorrowedFd<'_>, name: &CStr, to: &Path) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let mut from = File::from(openat(directory, name, flags, Mode::empty())?);
        if !from.metadata()?.is_file() {
            return Err(io::Error::other("it changed while it was copied"));
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut to = File::from(openat(&self.to, to, flags, Mode::RUSR | Mode::WUSR)?);
        io::copy(&mut from, &mut to).map(drop)
    }
}

/// Whether this is the host's root, from whom nothing is withheld.
fn is_root() -> bool {
    rustix::process::geteuid().is_root() && !crate::container::native::is_user_namespace()
}

fn set_owner(to: BorrowedFd<'_>, path: &Path, stat: &Stat) -> io::Result<()> {
    let (owner, group) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    match chownat(to, path, Some(owner), Some(group), AtFlags::SYMLINK_NOFOLLOW) {
        // Users own what they copy.
        Err(Errno::PERM | Errno::INVAL) if !is_root() => Ok(()),
        other => Ok(other?),
    }
}

/// Sets owner, mode and times.
fn set_metadata(to: BorrowedFd<'_>, path: &Path, stat: &Stat) -> io::Result<()> {
    let kind = FileType::from_raw_mode(stat.st_mode);
    if kind == FileType::Directory {
        set_owner(to, path, stat)?;
    }
    if kind != FileType::Symlink {
        chmodat(to, path, Mode::from_raw_mode(stat.st_mode), AtFlags::empty())?;
    }
    let time = |seconds, nanoseconds: u64| Timespec {
        tv_sec: seconds,
        tv_nsec: i64::try_from(nanoseconds).unwrap_or_default(),
    };
    let times = Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    };
    Ok(utimensat(to, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Copies extended attributes, access lists and capabilities among them.
fn copy_attributes(
    directory: BorrowedFd<'_>,
    name: &OsStr,
    to: BorrowedFd<'_>,
    path: &Path,
) -> io::Result<()> {
    // There are no calls with a directory and a name; these paths name the same.
    let beside = |fd: BorrowedFd<'_>, path: &Path| {
        Path::new("/proc/self/fd").join(fd.as_raw_fd().to_string()).join(path)
    };
    let (from, to) = (beside(directory, Path::new(name)), beside(to, path));
    let mut names = vec![0u8; ATTRIBUTE_BYTES_MAX];
    let len = match llistxattr(&from, &mut names) {
        Ok(len) => len,
        Err(Errno::NOTSUP) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    };
    let mut value = vec![];
    for name in names.get(..len).unwrap_or_default().split(|byte| *byte == 0).filter(|name| !name.is_empty())
    {
        if ATTRIBUTES_LEFT_OUT.iter().any(|prefix| name.starts_with(prefix)) {
            continue;
        }
        let Ok(name) = CString::new(name) else { continue };
        value.resize(ATTRIBUTE_BYTES_MAX, 0);
        let len = lgetxattr(&from, &name, &mut value)?;
        match lsetxattr(&to, &name, value.get(..len).unwrap_or_default(), XattrFlags::empty()) {
            Err(Errno::NOTSUP) => {}
            Err(Errno::PERM) if !is_root() => {}
            other => other?,
        }
    }
    Ok(())
}
