//! Owner, permissions, attributes and times.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::fs::{AtFlags, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::{Entry, Rights, Xattrs};

/// Bytes of an attribute, and of all names of attributes: what Linux takes.
const XATTR_MAX: usize = 64 << 10;

/// What is put onto a file.
pub(super) enum Target<'a> {
    /// An open file or directory.
    File(BorrowedFd<'a>),
    /// A link or a special file, by its directory and name: opening it would do something else.
    Name(BorrowedFd<'a>, &'a [u8]),
}

/// Whether an attribute is one of overlayfs's own, with which a layer could show what it does not have.
pub(super) fn is_overlays(name: &[u8]) -> bool {
    name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.")
}

/// Gives a file its owner and attributes; permissions too unless it is a link. In this order, as a new owner takes
/// set-user-id bits and capabilities away.
pub(super) fn apply(
    target: &Target<'_>,
    entry: &Entry,
    mode: Option<u32>,
    rights: Rights,
) -> Result<(), Errno> {
    if rights.owners {
        let (uid, gid) = (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)));
        match target {
            Target::File(file) => rustix::fs::fchown(file, uid, gid)?,
            Target::Name(parent, name) => {
                rustix::fs::chownat(*parent, *name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?
            }
        }
    }
    if let Some(mode) = mode {
        let mode = Mode::from_raw_mode(mode);
        match target {
            Target::File(file) => rustix::fs::fchmod(file, mode)?,
            Target::Name(parent, name) => rustix::fs::chmodat(*parent, *name, mode, AtFlags::empty())?,
        }
    }
    entry.xattrs.iter().filter(|(name, _)| !is_overlays(name)).try_for_each(|(name, value)| {
        let set = match target {
            Target::File(file) => rustix::fs::fsetxattr(file, name.as_slice(), value, XattrFlags::empty()),
            Target::Name(parent, file) => {
                let path = [format!("/proc/self/fd/{}/", parent.as_raw_fd()).as_bytes(), file].concat();
                rustix::fs::lsetxattr(path, name.as_slice(), value, XattrFlags::empty())
            }
        };
        excuse(set, rights)
    })
}

/// An attribute that the file system does not know, or that only root may set, does not keep a layer from being used.
fn excuse(result: Result<(), Errno>, rights: Rights) -> Result<(), Errno> {
    match result {
        Err(Errno::OPNOTSUPP) => Ok(()),
        Err(Errno::PERM | Errno::ACCESS) if !rights.trusted => Ok(()),
        result => result,
    }
}

/// Sets the time of the last change.
pub(super) fn set_time(target: &Target<'_>, (seconds, nanoseconds): (i64, u32)) -> Result<(), Errno> {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
    let times = Timestamps { last_access: time, last_modification: time };
    match target {
        Target::File(file) => rustix::fs::futimens(file, &times),
        Target::Name(parent, name) => {
            rustix::fs::utimensat(*parent, *name, &times, AtFlags::SYMLINK_NOFOLLOW)
        }
    }
}

/// The attributes of a file or directory.
pub(super) fn list(file: BorrowedFd<'_>) -> Result<Xattrs, Errno> {
    read(|names| rustix::fs::flistxattr(file, names), |name, value| rustix::fs::fgetxattr(file, name, value))
}

/// The attributes of a link or special file.
pub(super) fn list_at(parent: BorrowedFd<'_>, file: &[u8]) -> Result<Xattrs, Errno> {
    let path = [format!("/proc/self/fd/{}/", parent.as_raw_fd()).as_bytes(), file].concat();
    let path = path.as_slice();
    read(|names| rustix::fs::llistxattr(path, names), |name, value| rustix::fs::lgetxattr(path, name, value))
}

fn read(
    list: impl Fn(&mut [u8]) -> Result<usize, Errno>,
    get: impl Fn(&CStr, &mut [u8]) -> Result<usize, Errno>,
) -> Result<Xattrs, Errno> {
    let mut names = vec![0; XATTR_MAX];
    let count = match list(&mut names) {
        Err(Errno::OPNOTSUPP) => 0,
        result => result?,
    };
    names.truncate(count);
    let mut found = vec![];
    let mut value = vec![0; XATTR_MAX];
    for name in names.split_inclusive(|b| *b == 0) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else { continue };
        let length = match get(name, &mut value) {
            Err(Errno::NODATA | Errno::OPNOTSUPP) => continue,
            result => result?,
        };
        found.push((name.to_bytes().to_vec(), value.get(..length).unwrap_or_default().to_vec()));
    }
    found.sort();
    Ok(found)
}

/// Gives a file of this layer what one of a layer below has.
pub(super) fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>, rights: Rights) -> Result<(), Errno> {
    let stat = rustix::fs::fstat(from)?;
    if rights.owners {
        rustix::fs::fchown(to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    }
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    for (name, value) in list(from)?.iter().filter(|(name, _)| !is_overlays(name)) {
        excuse(rustix::fs::fsetxattr(to, name.as_slice(), value, XattrFlags::empty()), rights)?;
    }
    let nanoseconds = u32::try_from(stat.st_mtime_nsec).unwrap_or(0);
    set_time(&Target::File(to.as_fd()), (stat.st_mtime, nanoseconds))
}
