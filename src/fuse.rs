//! The FUSE protocol as far as shared folders speak it (Linux, `include/uapi/linux/fuse.h`), for both ends: the device
//! that passes messages on, and the file server that answers them.
//!
//! All numbers are little endian, as virtio wants them (virtio 1.2 §5.11.6).

/// The version spoken here: a newer kernel falls back to it.
pub const VERSION_MAJOR: u32 = 7;
/// Minor version; 38 is what the messages below belong to.
pub const VERSION_MINOR: u32 = 38;
/// The oldest minor version with the messages below.
pub const VERSION_MINOR_MIN: u32 = 31;

/// Bytes of a request's header.
pub const IN_HEADER_BYTES: usize = 40;
/// Bytes of a reply's header.
pub const OUT_HEADER_BYTES: usize = 16;
/// Most bytes that one request reads or writes.
pub const DATA_BYTES_MAX: usize = 1 << 20;
/// The same in pages.
pub const DATA_PAGES_MAX: u16 = (DATA_BYTES_MAX / 4096) as u16;
/// Longest request: data, and a page for all that comes before it.
pub const REQUEST_BYTES_MAX: usize = DATA_BYTES_MAX + 4096;
/// Longest reply.
pub const REPLY_BYTES_MAX: usize = DATA_BYTES_MAX + 4096;
/// The share's own directory.
pub const ROOT_NODE: u64 = 1;

/// What a request asks for (`enum fuse_opcode`).
pub mod opcode {
    #![allow(missing_docs)]
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
}

/// Whether nobody waits for an answer to requests of this kind.
pub fn has_no_reply(opcode: u32) -> bool {
    matches!(opcode, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT)
}

/// Flags of `INIT`.
pub mod init {
    #![allow(missing_docs)]
    pub const ASYNC_READ: u32 = 1 << 0;
    pub const ATOMIC_O_TRUNC: u32 = 1 << 3;
    pub const BIG_WRITES: u32 = 1 << 5;
    pub const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub const DO_READDIRPLUS: u32 = 1 << 13;
    pub const READDIRPLUS_AUTO: u32 = 1 << 14;
    pub const ASYNC_DIO: u32 = 1 << 15;
    pub const PARALLEL_DIROPS: u32 = 1 << 18;
    pub const MAX_PAGES: u32 = 1 << 22;
    pub const SUBMOUNTS: u32 = 1 << 27;
    pub const HANDLE_KILLPRIV_V2: u32 = 1 << 28;
}

/// Which attributes `SETATTR` sets.
pub mod setattr {
    #![allow(missing_docs)]
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// `GETATTR` names a handle.
pub const GETATTR_FH: u32 = 1;
/// `OPEN` and `CREATE`: take set-user-id and set-group-id bits away.
pub const OPEN_KILL_SUIDGID: u32 = 1;
/// `WRITE` of pages that the guest has cached.
pub const WRITE_CACHE: u32 = 1;
/// `WRITE`: take set-user-id and set-group-id bits away.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `FSYNC`: data only.
pub const FSYNC_DATA_ONLY: u32 = 1;
/// The answer to `OPEN`: what the guest has cached of the file stays valid.
pub const OPEN_KEEP_CACHE: u32 = 1 << 1;
/// The answer to `OPENDIR`: the guest may cache the directory's entries.
pub const OPEN_CACHE_DIR: u32 = 1 << 3;
/// Attribute flag: another file system is mounted here.
pub const ATTR_SUBMOUNT: u32 = 1;
