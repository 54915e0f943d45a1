//! Hard links, which may lead to files of layers below: overlayfs would copy such a file up, so that is done here.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags};

use super::tree::{self, Tree};
use super::{Entry, Error, attributes};

/// Makes `entry` a link in `parent`. Answers how many bytes of a layer below were copied, at most `most`.
pub(super) fn link(
    tree: &Tree,
    entry: &Entry,
    parent: &OwnedFd,
    name: &[u8],
    most: u64,
) -> Result<u64, Error> {
    let parts = tree::parts(&entry.link)?;
    let (path, below) = tree.find(&entry.name, &parts)?;
    let failed = Error::file(&entry.name, "make a hard link");
    let (last, parents) =
        path.split_last().ok_or_else(|| Error::entry(&entry.name, "it is a link to the root"))?;
    let copied = match below {
        None => 0,
        Some(below) => copy_up(tree, entry, below, parents, last, most)?,
    };
    let directory = tree.directory(parents).ok_or_else(|| failed(rustix::io::Errno::NOENT))?;
    // The entry may be the very name that it leads to, which then stays.
    let (from, to) = (tree::stat(directory.as_fd(), last), tree::stat(parent.as_fd(), name));
    if let (Some(from), Some(to)) = (from.map_err(&failed)?, to.map_err(&failed)?) {
        if (from.st_dev, from.st_ino) == (to.st_dev, to.st_ino) {
            return Ok(copied);
        }
        tree::remove(parent.as_fd(), name).map_err(&failed)?;
    }
    rustix::fs::linkat(&directory, last.as_slice(), parent, name, AtFlags::empty()).map_err(&failed)?;
    Ok(copied)
}

fn copy_up(
    tree: &Tree,
    entry: &Entry,
    below: OwnedFd,
    parents: &[Vec<u8>],
    last: &[u8],
    most: u64,
) -> Result<u64, Error> {
    let failed = Error::file(&entry.name, "copy what it is a link to");
    let (directory, _) = tree.make_parents(&entry.name, parents)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let copy = rustix::fs::openat(&directory, last, flags, Mode::RUSR | Mode::WUSR).map_err(&failed)?;
    let (below, mut copy) = (File::from(below), File::from(copy));
    let io_failed = Error::io(&entry.name, "copy what it is a link to");
    let copied = io::copy(&mut (&below).take(most.saturating_add(1)), &mut copy).map_err(io_failed)?;
    if copied > most {
        return Err(Error::Limit { what: "bytes in files", limit: most });
    }
    attributes::copy(below.as_fd(), copy.as_fd(), tree.rights).map_err(&failed)?;
    Ok(copied)
}
