//! Requests on what a file is, rather than what is in it.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid, XattrFlags};
use rustix::io::Errno;

use super::files::kill_privileges;
use super::message::{Fields, Header, Outcome, Put};
use super::nodes::stat;
use super::server::{FileServer, put_attributes};
use crate::fuse::{self, setattr};

/// Longest value and longest list of extended attributes (Linux, `include/uapi/linux/limits.h`).
const XATTR_BYTES_MAX: usize = 64 << 10;

impl FileServer {
    /// `struct fuse_attr_out`.
    fn put_attributes_of(&mut self, node: u64, handle: Option<u64>, reply: &mut Vec<u8>) -> Outcome {
        let stat = match handle {
            Some(handle) => stat(self.handles.get(handle, node)?)?,
            None => stat(self.nodes.fd(node)?.as_fd())?,
        };
        reply.u64(self.valid_seconds());
        reply.u64(0);
        put_attributes(reply, &stat, 0);
        Ok(())
    }

    pub(super) fn getattr(&mut self, header: Header, mut body: Fields<'_>, reply: &mut Vec<u8>) -> Outcome {
        let flags = body.u32()?;
        body.skip(4)?;
        let handle = body.u64()?;
        let handle = (flags & fuse::GETATTR_FH != 0).then_some(handle);
        self.put_attributes_of(header.node, handle, reply)
    }

    pub(super) fn setattr(&mut self, header: Header, mut body: Fields<'_>, reply: &mut Vec<u8>) -> Outcome {
        let valid = body.u32()?;
        body.skip(4)?;
        let (handle, size, _owner) = (body.u64()?, body.u64()?, body.u64()?);
        let (atime, mtime, _ctime) = (body.u64()?, body.u64()?, body.u64()?);
        let (atime_nsec, mtime_nsec, _ctime_nsec) = (body.u32()?, body.u32()?, body.u32()?);
        let mode = body.u32()?;
        body.skip(4)?;
        let (uid, gid) = (body.u32()?, body.u32()?);
        let node = header.node;
        let handle = (valid & setattr::FH != 0).then_some(handle);

        if valid & setattr::MODE != 0 {
            let mode = Mode::from_raw_mode(mode & 0o7777);
            // A link has no mode of its own, and its target is not meant.
            if self.nodes.file_type(node)? == libc::S_IFLNK {
                return Err(Errno::OPNOTSUPP);
            }
            let (_fd, proc, name) = self.by_proc(node)?;
            rustix::fs::chmodat(proc, name, mode, AtFlags::empty())?;
        }
        if valid & (setattr::UID | setattr::GID) != 0 {
            let wanted = |flag, id| if valid & flag == 0 { Ok(None) } else { owner(id).map(Some) };
            let uid = wanted(setattr::UID, uid)?.map(Uid::from_raw);
            let gid = wanted(setattr::GID, gid)?.map(Gid::from_raw);
            rustix::fs::chownat(&*self.nodes.fd(node)?, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if valid & setattr::SIZE != 0 {
            self.truncate(node, handle, size, valid & setattr::KILL_SUIDGID != 0)?;
        }
        if valid & (setattr::ATIME | setattr::MTIME) != 0 {
            let time = |set: u32, now: u32, seconds: u64, nanoseconds: u32| match () {
                () if valid & set == 0 => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
                () if valid & now != 0 => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
                () => Timespec { tv_sec: seconds as i64, tv_nsec: nanoseconds.into() },
            };
            let times = Timestamps {
                last_access: time(setattr::ATIME, setattr::ATIME_NOW, atime, atime_nsec),
                last_modification: time(setattr::MTIME, setattr::MTIME_NOW, mtime, mtime_nsec),
            };
            let (_fd, proc, name) = self.by_proc(node)?;
            rustix::fs::utimensat(proc, name, &times, AtFlags::empty())?;
        }
        self.put_attributes_of(node, handle, reply)
    }

    fn truncate(&mut self, node: u64, handle: Option<u64>, size: u64, kill: bool) -> Outcome {
        let opened;
        let file = match handle {
            Some(handle) => self.handles.get(handle, node)?,
            None => {
                opened = self.reopen(node, OFlags::WRONLY)?;
                opened.as_fd()
            }
        };
        if kill {
            kill_privileges(file)?;
        }
        rustix::fs::ftruncate(file, size)
    }

    pub(super) fn readlink(&mut self, header: Header, reply: &mut Vec<u8>) -> Outcome {
        let target = rustix::fs::readlinkat(&*self.nodes.fd(header.node)?, c"", Vec::new())?;
        reply.extend_from_slice(target.to_bytes());
        Ok(())
    }

    /// `struct fuse_kstatfs`.
    pub(super) fn statfs(&mut self, header: Header, reply: &mut Vec<u8>) -> Outcome {
        let stat = rustix::fs::fstatvfs(&*self.nodes.fd(header.node)?)?;
        for number in [stat.f_blocks, stat.f_bfree, stat.f_bavail, stat.f_files, stat.f_ffree] {
            reply.u64(number);
        }
        for number in [stat.f_bsize, stat.f_namemax, stat.f_frsize, 0] {
            reply.u32(u32::try_from(number).unwrap_or(u32::MAX));
        }
        reply.extend([0; 24]);
        Ok(())
    }

    /// A descriptor that takes extended attributes, which an `O_PATH` one does not. Of other things than files and
    /// directories only the host's own attributes are left out by that.
    fn open_for_xattrs(&mut self, node: u64) -> Result<OwnedFd, Errno> {
        self.reopen(node, OFlags::RDONLY | OFlags::NOATIME).or_else(|error| match error {
            Errno::PERM => self.reopen(node, OFlags::RDONLY),
            error => Err(error),
        })
    }

    pub(super) fn setxattr(&mut self, header: Header, mut body: Fields<'_>) -> Outcome {
        let (size, flags) = (body.u32()? as usize, body.u32()?);
        let (name, value) = (body.string()?, body.take(size)?);
        let file = self.open_for_xattrs(header.node)?;
        rustix::fs::fsetxattr(&file, name, value, XattrFlags::from_bits_retain(flags))
    }

    pub(super) fn getxattr(&mut self, header: Header, mut body: Fields<'_>, reply: &mut Vec<u8>) -> Outcome {
        let size = body.u32()? as usize;
        body.skip(4)?;
        let name = body.string()?;
        let file = match self.open_for_xattrs(header.node) {
            Err(Errno::OPNOTSUPP) => return Err(Errno::NODATA),
            result => result?,
        };
        let get = |file: &OwnedFd, name: &CStr, room: &mut [u8]| rustix::fs::fgetxattr(file, name, room);
        if size == 0 {
            return put_size(reply, rustix::fs::fgetxattr_query(&file, name)?);
        }
        put_value(reply, size, |room| get(&file, name, room))
    }

    pub(super) fn listxattr(&mut self, header: Header, mut body: Fields<'_>, reply: &mut Vec<u8>) -> Outcome {
        let size = body.u32()? as usize;
        body.skip(4)?;
        let file = match self.open_for_xattrs(header.node) {
            Err(Errno::OPNOTSUPP) if size == 0 => return put_size(reply, 0),
            Err(Errno::OPNOTSUPP) => return Ok(()),
            result => result?,
        };
        if size == 0 {
            return put_size(reply, rustix::fs::flistxattr_query(&file)?);
        }
        put_value(reply, size, |room| rustix::fs::flistxattr(&file, room))
    }

    pub(super) fn removexattr(&mut self, header: Header, mut body: Fields<'_>) -> Outcome {
        let name = body.string()?;
        let file = self.open_for_xattrs(header.node)?;
        rustix::fs::fremovexattr(&file, name)
    }
}

/// User and group -1 mean "leave it" to the host.
fn owner(id: u32) -> Result<u32, Errno> {
    if id == u32::MAX { Err(Errno::INVAL) } else { Ok(id) }
}

/// `struct fuse_getxattr_out`.
fn put_size(reply: &mut Vec<u8>, size: usize) -> Outcome {
    reply.u32(size as u32);
    reply.u32(0);
    Ok(())
}

fn put_value(
    reply: &mut Vec<u8>,
    size: usize,
    get: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
) -> Outcome {
    let start = reply.len();
    reply.resize(start + size.min(XATTR_BYTES_MAX), 0);
    let len = get(reply.get_mut(start..).unwrap_or_default())?;
    reply.truncate(start + len);
    Ok(())
}
