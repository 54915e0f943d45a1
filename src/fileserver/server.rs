//! The file server proper: FUSE requests in, replies out, and between them system calls on a folder.
//!
//! It knows neither sockets nor sandboxes, and it trusts the guest with nothing: names are single components, files are
//! reached by descriptors only, and nothing but regular files and directories is ever opened.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, ResolveFlags, Statx};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::message::{Fields, Header, Outcome, Put};
use super::nodes::{Found, Handles, Nodes};
use super::{Cache, Options};
use crate::fuse::{self, init, opcode};

/// What is offered to guests that know it.
const INIT_FLAGS: u32 = init::ASYNC_READ
    | init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::MAX_PAGES
    | init::SUBMOUNTS
    | init::HANDLE_KILLPRIV_V2;
/// Requests that the guest's kernel sends ahead, and where it begins to hold back.
const BACKGROUND_MAX: u16 = 64;
const CONGESTION: u16 = 48;
/// Bits of a mode beside the type.
const MODE_BITS: u32 = 0o7777;
/// The one device that every user may make: overlayfs marks deleted files with it.
const WHITEOUT: (u32, u32) = (0, 0);

/// A folder, and what a guest knows of it.
pub struct FileServer {
    pub(super) options: Options,
    pub(super) nodes: Nodes,
    pub(super) handles: Handles,
    /// `/proc/self/fd`, by which a file that is only held is opened.
    proc: OwnedFd,
    /// Whether other users than our own can own files.
    many_owners: bool,
    pub(super) submounts: bool,
}

impl FileServer {
    /// Serves the directory `root`, of which `O_PATH` is enough, with about `fds_max` descriptors.
    pub fn new(root: OwnedFd, options: Options, many_owners: bool, fds_max: usize) -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc = rustix::fs::open(c"/proc/self/fd", flags, Mode::empty())?;
        Self::with_proc(root, proc, options, many_owners, fds_max)
    }

    /// The same where `/proc` is out of reach.
    pub(super) fn with_proc(
        root: OwnedFd,
        proc: OwnedFd,
        options: Options,
        many_owners: bool,
        fds_max: usize,
    ) -> Result<Self, Errno> {
        // Handles need some, too.
        let nodes = Nodes::new(root, fds_max / 2)?;
        Ok(Self { options, nodes, handles: Handles::default(), proc, many_owners, submounts: false })
    }

    /// Answers a request; false if nobody waits for the answer.
    pub fn answer(&mut self, request: &[u8], reply: &mut Vec<u8>) -> bool {
        reply.clear();
        reply.extend([0; fuse::OUT_HEADER_BYTES]);
        let (outcome, unique) = match Header::parse(request) {
            Ok((header, body)) if fuse::has_no_reply(header.opcode) => {
                self.forget(header, body);
                return false;
            }
            Ok((header, body)) => (self.dispatch(header, body, reply), header.unique),
            Err(error) => (Err(error), 0),
        };
        let error = outcome.err().map_or(0, Errno::raw_os_error);
        if error != 0 {
            reply.truncate(fuse::OUT_HEADER_BYTES);
        }
        let mut header = Vec::with_capacity(fuse::OUT_HEADER_BYTES);
        header.u32(reply.len() as u32);
        header.u32((-error) as u32);
        header.u64(unique);
        if let Some(front) = reply.first_chunk_mut::<{ fuse::OUT_HEADER_BYTES }>() {
            front.copy_from_slice(&header);
        }
        true
    }

    fn dispatch(&mut self, header: Header, body: Fields<'_>, reply: &mut Vec<u8>) -> Outcome {
        if self.options.readonly && changes_something(header.opcode) {
            return Err(Errno::ROFS);
        }
        match header.opcode {
            opcode::INIT => self.init(body, reply),
            opcode::DESTROY => {
                self.start_over();
                Ok(())
            }
            opcode::LOOKUP => self.look_up(header, body, reply),
            opcode::GETATTR => self.getattr(header, body, reply),
            opcode::SETATTR => self.setattr(header, body, reply),
            opcode::READLINK => self.readlink(header, reply),
            opcode::SYMLINK => self.symlink(header, body, reply),
            opcode::MKNOD => self.mknod(header, body, reply),
            opcode::MKDIR => self.mkdir(header, body, reply),
            opcode::UNLINK => self.unlink(header, body, AtFlags::empty()),
            opcode::RMDIR => self.unlink(header, body, AtFlags::REMOVEDIR),
            opcode::RENAME => self.rename(header, body, false),
            opcode::RENAME2 => self.rename(header, body, true),
            opcode::LINK => self.link(header, body, reply),
            opcode::CREATE => self.create(header, body, reply),
            opcode::OPEN => self.open(header, body, reply),
            opcode::READ => self.read(header, body, reply),
            opcode::WRITE => self.write(header, body, reply),
            opcode::STATFS => self.statfs(header, reply),
            opcode::RELEASE | opcode::RELEASEDIR => self.release(header, body),
            opcode::FSYNC | opcode::FSYNCDIR => self.fsync(header, body),
            opcode::FLUSH => Ok(()),
            opcode::SETXATTR => self.setxattr(header, body),
            opcode::GETXATTR => self.getxattr(header, body, reply),
            opcode::LISTXATTR => self.listxattr(header, body, reply),
            opcode::REMOVEXATTR => self.removexattr(header, body),
            opcode::OPENDIR => self.opendir(header, reply),
            opcode::READDIR => self.readdir(header, body, reply, false),
            opcode::READDIRPLUS => self.readdir(header, body, reply, true),
            opcode::FALLOCATE => self.fallocate(header, body),
            opcode::LSEEK => self.lseek(header, body, reply),
            opcode::COPY_FILE_RANGE => self.copy_file_range(header, body, reply),
            opcode::SYNCFS => self.syncfs(header),
            _ => Err(Errno::NOSYS),
        }
    }

    /// A guest begins, perhaps after one that did not end in good order.
    fn init(&mut self, mut body: Fields<'_>, reply: &mut Vec<u8>) -> Outcome {
        let (major, minor) = (body.u32()?, body.u32()?);
        if major < fuse::VERSION_MAJOR || major == fuse::VERSION_MAJOR && minor < fuse::VERSION_MINOR_MIN {
            return Err(Errno::PROTO);
        }
        let (max_readahead, flags) = (body.u32()?, body.u32()?);
        let flags = flags & INIT_FLAGS;
        self.start_over();
        self.submounts = flags & init::SUBMOUNTS != 0;
        reply.u32(fuse::VERSION_MAJOR);
        reply.u32(fuse::VERSION_MINOR);
        reply.u32(max_readahead);
        reply.u32(flags);
        reply.u16(BACKGROUND_MAX);
        reply.u16(CONGESTION);
        reply.u32(fuse::DATA_BYTES_MAX as u32);
        reply.u32(1); // granularity of times, in nanoseconds
        reply.u16(fuse::DATA_PAGES_MAX);
        reply.u16(0); // alignment of mappings, of which there are none
        reply.u32(0); // further flags
        reply.extend([0; 28]);
        Ok(())
    }

    fn start_over(&mut self) {
        self.handles.clear();
        self.nodes.clear();
    }

    fn forget(&mut self, header: Header, mut body: Fields<'_>) {
        match header.opcode {
            opcode::FORGET => {
                if let Ok(count) = body.u64() {
                    self.nodes.forget(header.node, count);
                }
            }
            opcode::BATCH_FORGET => {
                let _counts = body.skip(8);
                while let (Ok(node), Ok(count)) = (body.u64(), body.u64()) {
                    self.nodes.forget(node, count);
                }
            }
            _ => {}
        }
    }

    fn look_up(&mut self, header: Header, mut body: Fields<'_>, reply: &mut Vec<u8>) -> Outcome {
        let found = self.nodes.look_up(header.node, body.name()?)?;
        self.put_entry(reply, &found);
        Ok(())
    }

    /// `struct fuse_entry_out`.
    pub(super) fn put_entry(&self, reply: &mut Vec<u8>, found: &Found) {
        let seconds = self.valid_seconds();
        for number in [found.node, 0, seconds, seconds, 0] {
            reply.u64(number);
        }
        let flags = if self.submounts && found.is_submount { fuse::ATTR_SUBMOUNT } else { 0 };
        put_attributes(reply, &found.stat, flags);
    }

    /// How long a guest may rely on names and attributes.
    pub(super) fn valid_seconds(&self) -> u64 {
        match self.options.cache {
            Cache::Auto => 1,
            Cache::Always => 24 * 60 * 60,
        }
    }

    /// Opens what is held by `node`: a regular file or a directory, and nothing else.
    pub(super) fn reopen(&mut self, node: u64, flags: OFlags) -> Result<OwnedFd, Errno> {
        match self.nodes.file_type(node)? {
            libc::S_IFREG | libc::S_IFDIR => {}
            _ => return Err(Errno::OPNOTSUPP),
        }
        let fd = self.nodes.fd(node)?;
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        rustix::fs::openat(&self.proc, DecInt::from_fd(&*fd), flags, Mode::empty())
    }

    /// A name by which system calls reach what is held by `node`: below [`Self::proc`].
    pub(super) fn by_proc(&mut self, node: u64) -> Result<(Rc<OwnedFd>, &OwnedFd, DecInt), Errno> {
        let fd = self.nodes.fd(node)?;
        let name = DecInt::from_fd(&*fd);
        Ok((fd, &self.proc, name))
    }

    /// Makes something as the guest's user.
    fn make<T>(
        &mut self,
        header: Header,
        what: impl FnOnce(&OwnedFd) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let directory = self.nodes.fd(header.node)?;
        let other = self.many_owners && (header.uid, header.gid) != (0, 0);
        let _user = other.then(|| FileUser::become_one(header.uid, header.gid)).transpose()?;
        what(&directory)
    }

    /// The answer to a request that has made `name`.
    fn made(&mut self, header: Header, name: &CStr, reply: &mut Vec<u8>) -> Outcome {
        let found = self.nodes.look_up(header.node, name)?;
        self.put_entry(reply, &found);
        Ok(())
    }

    fn symlink(&mut self, header: Header, mut body: Fields<'_>, reply: &mut Vec<u8>) -> Outcome {
        let (name, target) = (body.name()?, body.string()?);
        self.make(header, |directory| rustix::fs::symlinkat(target, directory, name))?;
        self.made(header, name, reply)
    }

    fn mknod(&mut self, header: Header, mut body: Fields<'_>, reply: &mut Vec<u8>) -> Outcome {
        let (mode, device) = (body.u32()?, body.u32()?);
        body.skip(8)?;
        let name = body.name()?;
        let (major, minor) = ((device >> 8) & 0xfff, (device & 0xff) | (device >> 12) & 0xfff00);
        let file_type = match FileType::from_raw_mode(mode) {
            FileType::CharacterDevice if (major, minor) == WHITEOUT => FileType::CharacterDevice,
            FileType::CharacterDevice | FileType::BlockDevice if !self.options.devices => {
                return Err(Errno::PERM);
            }
            FileType::Unknown if mode & libc::S_IFMT == 0 => FileType::RegularFile,
            FileType::Unknown | FileType::Directory | FileType::Symlink => return Err(Errno::INVAL),
            file_type => file_type,
        };
        let device = rustix::fs::makedev(major, minor);
        let mode = Mode::from_raw_mode(mode & MODE_BITS);
        self.make(header, |directory| rustix::fs::mknodat(directory, name, file_type, mode, device))?;
        self.made(header, name, reply)
    }

    fn mkdir(&mut self, header: Header, mut body: Fields<'_>, reply: &mut Vec<u8>) -> Outcome {
        let mode = Mode::from_raw_mode(body.u32()? & MODE_BITS);
        body.skip(4)?;
        let name = body.name()?;
        self.make(header, |directory| rustix::fs::mkdirat(directory, name, mode))?;
        self.made(header, name, reply)
    }

    fn unlink(&mut self, header: Header, mut body: Fields<'_>, flags: AtFlags) -> Outcome {
        let name = body.name()?;
        rustix::fs::unlinkat(&*self.nodes.fd(header.node)?, name, flags)
    }

    fn rename(&mut self, header: Header, mut body: Fields<'_>, with_flags: bool) -> Outcome {
        let new_parent = body.u64()?;
        let mut flags = 0;
        if with_flags {
            flags = body.u32()?;
            body.skip(4)?;
        }
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
        let flags = RenameFlags::from_bits_retain(flags);
        if !known.contains(flags) {
            return Err(Errno::INVAL);
        }
        let (from, to) = (body.name()?, body.name()?);
        let (old, new) = (self.nodes.fd(header.node)?, self.nodes.fd(new_parent)?);
        rustix::fs::renameat_with(&*old, from, &*new, to, flags)
    }

    fn link(&mut self, header: Header, mut body: Fields<'_>, reply: &mut Vec<u8>) -> Outcome {
        let (node, name) = (body.u64()?, body.name()?);
        let directory = self.nodes.fd(header.node)?;
        // Naming the file by its descriptor alone would take CAP_DAC_READ_SEARCH, which opens any file by its number.
        let (_fd, proc, file) = self.by_proc(node)?;
        rustix::fs::linkat(proc, file, &*directory, name, AtFlags::SYMLINK_FOLLOW)?;
        self.made(header, name, reply)
    }

    fn create(&mut self, header: Header, mut body: Fields<'_>, reply: &mut Vec<u8>) -> Outcome {
        let (flags, mode) = (body.u32()?, body.u32()?);
        body.skip(4)?;
        let open_flags = body.u32()?;
        let name = body.name()?;
        let wanted = self.open_flags(flags)?;
        let exclusive = flags & libc::O_EXCL as u32 != 0;
        let mode = Mode::from_raw_mode(mode & MODE_BITS);
        let new = wanted | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let created =
            match self.make(header, |directory| rustix::fs::openat2(directory, name, new, mode, resolve)) {
                Ok(file) => Some(file),
                Err(Errno::EXIST) if !exclusive => None,
                Err(error) => return Err(error),
            };
        let found = self.nodes.look_up(header.node, name)?;
        let opened = match created {
            Some(file) => self.same_file(file, &found.stat),
            None => self.open_node(found.node, wanted, open_flags & fuse::OPEN_KILL_SUIDGID != 0),
        };
        let handle = opened.and_then(|file| self.handles.add(&mut self.nodes, found.node, file));
        let handle = handle.inspect_err(|_| self.nodes.forget(found.node, 1))?;
        self.put_entry(reply, &found);
        self.put_open(reply, handle, 0);
        Ok(())
    }

    /// What was made under a name may be something else by the time that it is looked up.
    fn same_file(&self, file: OwnedFd, stat: &Statx) -> Result<OwnedFd, Errno> {
        let made = super::nodes::stat(file.as_fd())?;
        let same = (made.stx_ino, made.stx_dev_major, made.stx_dev_minor)
            == (stat.stx_ino, stat.stx_dev_major, stat.stx_dev_minor);
        if same { Ok(file) } else { Err(Errno::STALE) }
    }
}

/// Whether a request of this kind has no place in a read-only share. `OPEN` has its own check.
fn changes_something(opcode: u32) -> bool {
    matches!(
        opcode,
        opcode::SETATTR
            | opcode::SYMLINK
            | opcode::MKNOD
            | opcode::MKDIR
            | opcode::UNLINK
            | opcode::RMDIR
            | opcode::RENAME
            | opcode::RENAME2
            | opcode::LINK
            | opcode::WRITE
            | opcode::SETXATTR
            | opcode::REMOVEXATTR
            | opcode::CREATE
            | opcode::FALLOCATE
            | opcode::COPY_FILE_RANGE
    )
}

/// `struct fuse_attr`.
pub(super) fn put_attributes(reply: &mut Vec<u8>, stat: &Statx, flags: u32) {
    reply.u64(stat.stx_ino);
    reply.u64(stat.stx_size);
    reply.u64(stat.stx_blocks);
    for time in [&stat.stx_atime, &stat.stx_mtime, &stat.stx_ctime] {
        reply.u64(time.tv_sec as u64);
    }
    for time in [&stat.stx_atime, &stat.stx_mtime, &stat.stx_ctime] {
        reply.u32(time.tv_nsec);
    }
    reply.u32(stat.stx_mode.into());
    reply.u32(stat.stx_nlink);
    reply.u32(stat.stx_uid);
    reply.u32(stat.stx_gid);
    let (major, minor) = (stat.stx_rdev_major, stat.stx_rdev_minor);
    reply.u32((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12));
    reply.u32(stat.stx_blksize);
    reply.u32(flags);
}

/// This thread makes files as another user, as long as this lives. What it may do does not change: the guest's kernel
/// has checked its users' rights, and knows of all their groups.
struct FileUser {
    before: (Uid, Gid),
}

impl FileUser {
    fn become_one(uid: u32, gid: u32) -> Result<Self, Errno> {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        let user = Self { before: (setfsuid(uid), setfsgid(gid)) };
        // These calls do not fail, they tell what was before.
        let (now_uid, now_gid) = (setfsuid(Uid::from_raw(u32::MAX)), setfsgid(Gid::from_raw(u32::MAX)));
        if (now_uid, now_gid) == (uid, gid) { Ok(user) } else { Err(Errno::PERM) }
    }
}

impl Drop for FileUser {
    fn drop(&mut self) {
        setfsgid(self.before.1);
        setfsuid(self.before.0);
    }
}
