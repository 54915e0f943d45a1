//! Requests on open files and directories.

use std::ffi::CStr;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, RawDir, RawDirEntry, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

use super::Cache;
use super::message::{Fields, Header, Outcome, Put};
use super::nodes::{Found, stat};
use super::server::FileServer;
use crate::fuse;

/// What a guest's open flags may say here; what else there is (direct I/O, append) is done otherwise or by the guest.
const OPEN_FLAGS: OFlags =
    OFlags::RWMODE.union(OFlags::TRUNC).union(OFlags::SYNC).union(OFlags::DSYNC).union(OFlags::NOATIME);
/// Most bytes of a directory that are read at once.
const DIRECTORY_BYTES: usize = 32 << 10;
/// Most bytes of one `COPY_FILE_RANGE`, so that other requests get their turn.
const COPY_BYTES_MAX: u64 = 64 << 20;
/// Bytes of an entry in a directory's list without its name, and of what `READDIRPLUS` has before it.
const DIRENT_BYTES: usize = 24;
const ENTRY_BYTES: usize = 128;
/// Bytes of the shortest and of the longest entry in the host's lists (`struct linux_dirent64`).
const HOST_DIRENT_MIN: usize = 24;
const HOST_DIRENT_MAX: usize = 280;
/// Set-user-id and set-group-id.
const SUID: u32 = 0o4000;
const SGID_EXECUTABLE: u32 = 0o2010;

impl FileServer {
    /// Translates a guest's open flags.
    pub(super) fn open_flags(&self, flags: u32) -> Result<OFlags, Errno> {
        let flags = OFlags::from_bits_retain(flags) & OPEN_FLAGS;
        let reads = flags & OFlags::RWMODE == OFlags::RDONLY && !flags.contains(OFlags::TRUNC);
        if self.options.readonly && !reads { Err(Errno::ROFS) } else { Ok(flags) }
    }

    /// Opens a regular file.
    pub(super) fn open_node(&mut self, node: u64, flags: OFlags, kill: bool) -> Result<OwnedFd, Errno> {
        if self.nodes.file_type(node)? == libc::S_IFDIR && flags & OFlags::RWMODE != OFlags::RDONLY {
            return Err(Errno::ISDIR);
        }
        let file = self.reopen(node, flags)?;
        if kill && flags.contains(OFlags::TRUNC) {
            kill_privileges(&file)?;
        }
        Ok(file)
    }

    /// `struct fuse_open_out`.
    pub(super) fn put_open(&self, reply: &mut Vec<u8>, handle: u64, flags: u32) {
        let keep = if self.options.cache == Cache::Always { fuse::OPEN_KEEP_CACHE } else { 0 };
        reply.u64(handle);
        reply.u32(flags | keep);
        reply.u32(0);
    }

    pub(super) fn open(&mut self, header: Header, mut body: Fields<'_>, reply: &mut Vec<u8>) -> Outcome {
        let flags = self.open_flags(body.u32()?)?;
        let kill = body.u32()? & fuse::OPEN_KILL_SUIDGID != 0;
        let file = self.open_node(header.node, flags, kill)?;
        let handle = self.handles.add(&mut self.nodes, header.node, file)?;
        self.put_open(reply, handle, 0);
        Ok(())
    }

    pub(super) fn opendir(&mut self, header: Header, reply: &mut Vec<u8>) -> Outcome {
        let file = self.reopen(header.node, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let handle = self.handles.add(&mut self.nodes, header.node, file)?;
        let cache = if self.options.cache == Cache::Always { fuse::OPEN_CACHE_DIR } else { 0 };
        self.put_open(reply, handle, cache);
        Ok(())
    }

    pub(super) fn release(&mut self, header: Header, mut body: Fields<'_>) -> Outcome {
        self.handles.remove(&mut self.nodes, body.u64()?, header.node)
    }

    pub(super) fn read(&mut self, header: Header, mut body: Fields<'_>, reply: &mut Vec<u8>) -> Outcome {
        let (handle, offset, size) = (body.u64()?, body.u64()?, body.u32()? as usize);
        let file = self.handles.get(handle, header.node)?;
        let start = reply.len();
        reply.resize(start + size.min(fuse::DATA_BYTES_MAX), 0);
        let room = reply.get_mut(start..).unwrap_or_default();
        let len = rustix::io::pread(file, room, offset)?;
        reply.truncate(start + len);
        Ok(())
    }

    pub(super) fn write(&mut self, header: Header, mut body: Fields<'_>, reply: &mut Vec<u8>) -> Outcome {
        let (handle, offset, size) = (body.u64()?, body.u64()?, body.u32()? as usize);
        let (write_flags, _owner, open_flags) = (body.u32()?, body.u64()?, body.u32()?);
        body.skip(4)?;
        let data = body.take(size)?;
        // To the system call, -1 is wherever the file is at.
        offset.checked_add(size as u64).filter(|end| i64::try_from(*end).is_ok()).ok_or(Errno::INVAL)?;
        let file = self.handles.get(handle, header.node)?;
        if write_flags & fuse::WRITE_KILL_SUIDGID != 0 {
            kill_privileges(file)?;
        }
        // From the guest's page cache come pages, whoever has them open; what a program appends belongs at the end
        // even if the host has appended, too.
        let appends = open_flags & libc::O_APPEND as u32 != 0 && write_flags & fuse::WRITE_CACHE == 0;
        let flags = if appends { ReadWriteFlags::APPEND } else { ReadWriteFlags::empty() };
        let mut written = 0;
        while let Some(rest) = data.get(written..).filter(|rest| !rest.is_empty()) {
            let at = offset.checked_add(written as u64).ok_or(Errno::INVAL)?;
            match rustix::io::pwritev2(file, &[IoSlice::new(rest)], at, flags) {
                Ok(0) => break,
                Ok(len) => written += len,
                Err(Errno::INTR) => {}
                Err(_) if written > 0 => break,
                Err(error) => return Err(error),
            }
        }
        reply.u32(written as u32);
        reply.u32(0);
        Ok(())
    }

    pub(super) fn fsync(&mut self, header: Header, mut body: Fields<'_>) -> Outcome {
        let (handle, flags) = (body.u64()?, body.u32()?);
        let file = self.handles.get(handle, header.node)?;
        if flags & fuse::FSYNC_DATA_ONLY != 0 { rustix::fs::fdatasync(file) } else { rustix::fs::fsync(file) }
    }

    pub(super) fn syncfs(&mut self, header: Header) -> Outcome {
        rustix::fs::syncfs(&self.reopen(header.node, OFlags::RDONLY)?)
    }

    pub(super) fn fallocate(&mut self, header: Header, mut body: Fields<'_>) -> Outcome {
        let (handle, offset, len, mode) = (body.u64()?, body.u64()?, body.u64()?, body.u32()?);
        let file = self.handles.get(handle, header.node)?;
        rustix::fs::fallocate(file, FallocateFlags::from_bits_retain(mode), offset, len)
    }

    pub(super) fn lseek(&mut self, header: Header, mut body: Fields<'_>, reply: &mut Vec<u8>) -> Outcome {
        let (handle, offset, whence) = (body.u64()?, body.u64()?, body.u32()?);
        let to = match whence as i32 {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        reply.u64(rustix::fs::seek(self.handles.get(handle, header.node)?, to)?);
        Ok(())
    }

    pub(super) fn copy_file_range(
        &mut self,
        header: Header,
        mut body: Fields<'_>,
        reply: &mut Vec<u8>,
    ) -> Outcome {
        let (from, mut from_offset) = (body.u64()?, body.u64()?);
        let (to_node, to, mut to_offset) = (body.u64()?, body.u64()?, body.u64()?);
        let len = body.u64()?.min(COPY_BYTES_MAX) as usize;
        let (from, to) = (self.handles.get(from, header.node)?, self.handles.get(to, to_node)?);
        let copied =
            rustix::fs::copy_file_range(from, Some(&mut from_offset), to, Some(&mut to_offset), len)?;
        reply.u32(copied as u32);
        reply.u32(0);
        Ok(())
    }

    pub(super) fn readdir(
        &mut self,
        header: Header,
        mut body: Fields<'_>,
        reply: &mut Vec<u8>,
        plus: bool,
    ) -> Outcome {
        let (handle, offset, size) = (body.u64()?, body.u64()?, body.u32()? as usize);
        let end = reply.len() + size.min(DIRECTORY_BYTES);
        let directory = self.handles.get(handle, header.node)?.try_clone_to_owned().map_err(errno)?;
        rustix::fs::seek(&directory, SeekFrom::Start(offset))?;
        let start = reply.len();
        let mut buffer = [MaybeUninit::uninit(); DIRECTORY_BYTES];
        let extra = if plus { ENTRY_BYTES } else { 0 };
        let mut whole = false;
        loop {
            // No more is read than there is room for: some file systems (tmpfs before Linux 6.6) count positions
            // in a directory, so going back to one skips entries when others were deleted meanwhile.
            let fits = (end - reply.len()) * HOST_DIRENT_MIN / (HOST_DIRENT_MIN + 8 + extra);
            if fits < HOST_DIRENT_MAX && reply.len() > start {
                return Ok(());
            }
            let bytes = if whole { DIRECTORY_BYTES } else { fits.max(HOST_DIRENT_MAX) };
            let mut list = RawDir::new(&directory, &mut buffer[..bytes]);
            loop {
                match list.next() {
                    None => return Ok(()),
                    // Names that are longer than those of Linux's own file systems.
                    Some(Err(Errno::INVAL)) if !whole => whole = true,
                    Some(Err(error)) if reply.len() == start => return Err(error),
                    Some(Err(_)) => return Ok(()),
                    Some(Ok(entry)) => {
                        if !self.put_directory_entry(header.node, &entry, reply, end, plus) {
                            return Ok(());
                        }
                    }
                }
                if list.is_buffer_empty() {
                    break;
                }
            }
        }
    }

    /// Appends one entry of a directory's list; `false` when it does not fit.
    fn put_directory_entry(
        &mut self,
        parent: u64,
        entry: &RawDirEntry<'_>,
        reply: &mut Vec<u8>,
        end: usize,
        plus: bool,
    ) -> bool {
        let name = entry.file_name();
        let len = (DIRENT_BYTES + name.count_bytes()).next_multiple_of(8);
        if reply.len() + len + if plus { ENTRY_BYTES } else { 0 } > end {
            return false;
        }
        let mut ino = entry.ino();
        if plus {
            match self.put_known(parent, name, reply) {
                Ok(Some(found)) => ino = found.stat.stx_ino,
                Ok(None) => {}
                // It is gone already, or may not be looked at: the guest gets its name only.
                Err(_) => reply.extend([0; ENTRY_BYTES]),
            }
        }
        let aligned = reply.len() + len;
        reply.u64(ino);
        reply.u64(entry.next_entry_cookie());
        reply.u32(name.count_bytes() as u32);
        reply.u32(type_number(entry.file_type()));
        reply.extend_from_slice(name.to_bytes());
        reply.resize(aligned, 0);
        true
    }

    /// Tells the guest of a directory's entry. Of the directory itself and of its parent it is not told.
    fn put_known(&mut self, parent: u64, name: &CStr, reply: &mut Vec<u8>) -> Result<Option<Found>, Errno> {
        if matches!(name.to_bytes(), b"." | b"..") {
            reply.extend([0; ENTRY_BYTES]);
            return Ok(None);
        }
        let found = self.nodes.look_up(parent, name)?;
        self.put_entry(reply, &found);
        Ok(Some(found))
    }
}

/// Takes away set-user-id, and set-group-id where it means that, as the host does when a user writes to a file.
pub(super) fn kill_privileges(file: impl AsFd) -> Outcome {
    let mode = u32::from(stat(file.as_fd())?.stx_mode);
    let mut kept = mode & !SUID;
    if kept & SGID_EXECUTABLE == SGID_EXECUTABLE {
        kept &= !0o2000;
    }
    if kept == mode || mode & libc::S_IFMT != libc::S_IFREG {
        return Ok(());
    }
    rustix::fs::fchmod(file, Mode::from_raw_mode(kept & 0o7777))
}

/// The number of a file type in a directory's list: the type's bits of a mode.
fn type_number(file_type: FileType) -> u32 {
    (file_type.as_raw_mode() & libc::S_IFMT) >> 12
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}
