//! Disk images: opened, locked, and read and written by an [`Engine`] that knows nothing of virtio.
//!
//! An [`Image`] is a raw file or a block device. It is opened and locked once, while the machine is built; an engine
//! is made from it when the guest's driver starts, since a ring costs time and memory that an unused disk should not.
//! An image can also be composed of several files that are only read: see [`Part`] and [`open_parts`].

mod composed;
mod engine;
mod gpt;
mod lock;
mod sync;
mod task;
mod uring;

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde::{Deserialize, Serialize};

use task::Target;

pub(crate) use composed::check as check_parts;
pub use composed::{MAX_PARTS, Part, PartError, PartList, open_parts};
pub use engine::{Durability, Engine};
pub use task::{Buffers, Operation};

/// The unit in which images are sized and addressed, in bytes.
pub const SECTOR_BYTES: u64 = 512;

/// How an image is opened and used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The guest may only read.
    pub read_only: bool,
    /// What a flush by the guest means.
    pub cache: Cache,
    /// How the host is asked to do the work.
    pub io: Io,
    /// The image may be empty: a disk that gets its contents later.
    pub may_be_empty: bool,
}

/// What a flush by the guest means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// Writes go through the host's page cache, and a flush is an `fdatasync`.
    #[default]
    Writeback,
    /// A flush does nothing: a host that loses power loses what the guest was promised.
    Unsafe,
}

/// How the host is asked to read and write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Io {
    /// io_uring where the host allows it, else system calls that wait.
    #[default]
    Auto,
    /// io_uring, or the device fails.
    Uring,
    /// System calls that wait, on the device's own thread.
    Sync,
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing has that name.
    #[error("disk image {path} does not exist; check the path, or create it with `truncate -s SIZE {path}`")]
    Missing {
        /// The image.
        path: PathBuf,
    },
    /// It is neither a regular file nor a block device.
    #[error("disk image {path} is a {kind}; give a raw image file or a block device")]
    WrongKind {
        /// The image.
        path: PathBuf,
        /// What it is instead.
        kind: &'static str,
    },
    /// It holds no bytes.
    #[error("disk image {path} is empty; give it a size with `truncate -s SIZE {path}`")]
    Empty {
        /// The image.
        path: PathBuf,
    },
    /// Its size is not whole sectors.
    #[error(
        "disk image {path} has {size_bytes} bytes, which is not a multiple of {SECTOR_BYTES}; is it a raw image? \
         `truncate -s %{SECTOR_BYTES} {path}` pads one"
    )]
    PartialSector {
        /// The image.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
    },
    /// This user may not open it at all.
    #[error("disk image {path} may not be opened by this user; change its permissions or owner")]
    Permission {
        /// The image.
        path: PathBuf,
    },
    /// It can be read, and writing was asked for.
    #[error("disk image {path} cannot be written; open it read-only, or change its permissions")]
    NotWritable {
        /// The image.
        path: PathBuf,
    },
    /// Another process holds it.
    #[error(
        "disk image {path} is in use{}; stop that process, or share the image read-only in both",
        holder_text(*.holder)
    )]
    Locked {
        /// The image.
        path: PathBuf,
        /// Process that holds the lock, where the host tells.
        holder: Option<u32>,
    },
    /// A composed disk cannot be made of its parts.
    #[error(transparent)]
    Parts(#[from] PartError),
    /// The host failed otherwise.
    #[error("cannot {what} disk image {path}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// The image.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

fn holder_text(holder: Option<u32>) -> String {
    holder.map_or_else(|| " by another process".into(), |pid| format!(" by process {pid}"))
}

/// An opened and locked image. The lock is held until the last user of the image is gone.
#[derive(Debug)]
pub struct Image {
    /// One, or those of a composed image.
    files: Vec<File>,
    target: Target,
    size_bytes: AtomicU64,
    options: Options,
}

impl Image {
    /// Size of the image, a multiple of [`SECTOR_BYTES`].
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    /// Whether `path` names the file that this image is in. A composed image is in no single file.
    pub fn is_at(&self, path: &Path) -> bool {
        let numbers = |metadata: Metadata| (metadata.dev(), metadata.ino());
        match (self.single().map(File::metadata), path.metadata()) {
            (Some(Ok(here)), Ok(there)) => numbers(here) == numbers(there),
            _ => false,
        }
    }

    /// Device and inode of the image's file; a composed image is in no single one.
    pub fn numbers(&self) -> Option<(u64, u64)> {
        let metadata = self.single()?.metadata().ok()?;
        Some((metadata.dev(), metadata.ino()))
    }

    /// Takes the size of the image, which is at `path`, anew. That of a composed image stays.
    pub fn measure_again(&self, path: &Path) -> Result<(), Error> {
        if let Some(file) = self.single() {
            let block_device = matches!(self.target, Target::BlockDevice);
            let size_bytes = measure(file, block_device, self.options.may_be_empty, path)?;
            self.size_bytes.store(whole_sectors(size_bytes, path)?, Ordering::Release);
        }
        Ok(())
    }

    fn single(&self) -> Option<&File> {
        if matches!(self.target, Target::Composed(_)) { None } else { self.files.first() }
    }

    fn descriptors(&self) -> Vec<RawFd> {
        self.files.iter().map(AsRawFd::as_raw_fd).collect()
    }

    fn target(&self) -> Target {
        self.target.clone()
    }

    /// How the image was opened.
    pub fn options(&self) -> Options {
        self.options
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // An io_uring that was closed lets go of the file some time later; the lock need not wait for that.
        self.files.iter().for_each(lock::release);
    }
}

/// Opens and locks the image at `path`: for this process alone, or together with other readers if it is read-only.
pub fn open(path: &Path, options: &Options) -> Result<Image, Error> {
    let opened = open_locked(path, options.read_only, options.may_be_empty)?;
    let size_bytes = whole_sectors(opened.size_bytes, path)?.into();
    let target = if opened.block_device { Target::BlockDevice } else { Target::File };
    Ok(Image { files: vec![opened.file], target, size_bytes, options: *options })
}

/// Opens and locks the file of an image for another process, which takes it with [`adopt`]. Who drops the file without
/// handing it over gives the lock up.
pub fn open_for_another(path: &Path, read_only: bool) -> Result<File, Error> {
    Ok(open_locked(path, read_only, false)?.file)
}

/// Takes over the file of the image at `path`, which another process has opened and locked.
pub fn adopt(file: File, path: &Path, options: &Options) -> Result<Image, Error> {
    let host = |source| Error::Host { what: "look at", path: path.to_path_buf(), source };
    let block_device = file.metadata().map_err(host)?.file_type().is_block_device();
    let size_bytes = whole_sectors(measure(&file, block_device, options.may_be_empty, path)?, path)?.into();
    let target = if block_device { Target::BlockDevice } else { Target::File };
    Ok(Image { files: vec![file], target, size_bytes, options: *options })
}

/// A file that is not empty, opened and locked.
struct Opened {
    file: File,
    size_bytes: u64,
    block_device: bool,
}

fn open_locked(path: &Path, read_only: bool, may_be_empty: bool) -> Result<Opened, Error> {
    let owned = || path.to_path_buf();
    let host = |what| move |source| Error::Host { what, path: path.to_path_buf(), source };

    let file = open_file(path, read_only)?;
    let metadata = file.metadata().map_err(host("look at"))?;
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Error::WrongKind { path: owned(), kind: kind_name(kind) });
    }
    // Opened without waiting so that a FIFO cannot hold us up; io_uring would take the flag as "fail rather than wait".
    fcntl(&file, FcntlArg::F_SETFL(OFlag::empty())).map_err(|errno| host("set up")(errno.into()))?;

    let numbers = (metadata.dev(), metadata.ino());
    lock::acquire(&file, read_only, numbers)
        .map_err(host("lock"))?
        .map_err(|lock::Held(holder)| Error::Locked { path: owned(), holder })?;
    let block_device = kind.is_block_device();
    let size_bytes = measure(&file, block_device, may_be_empty, path)?;
    Ok(Opened { file, size_bytes, block_device })
}

/// The size of an image's file.
fn measure(file: &File, block_device: bool, may_be_empty: bool, path: &Path) -> Result<u64, Error> {
    let host = |what| move |source| Error::Host { what, path: path.to_path_buf(), source };
    let size_bytes = if block_device {
        sync::block_device_size(file.as_raw_fd()).map_err(host("find the size of"))?
    } else {
        file.metadata().map_err(host("look at"))?.len()
    };
    match size_bytes {
        0 if !may_be_empty => Err(Error::Empty { path: path.to_path_buf() }),
        size_bytes => Ok(size_bytes),
    }
}

fn whole_sectors(size_bytes: u64, path: &Path) -> Result<u64, Error> {
    if size_bytes.is_multiple_of(SECTOR_BYTES) {
        Ok(size_bytes)
    } else {
        Err(Error::PartialSector { path: path.to_path_buf(), size_bytes })
    }
}

fn open_file(path: &Path, read_only: bool) -> Result<File, Error> {
    let open = |write| {
        OpenOptions::new().read(true).write(write).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
    };
    let source = match open(!read_only) {
        Ok(file) => return Ok(file),
        Err(source) => source,
    };
    let owned = path.to_path_buf();
    Err(match source.kind() {
        io::ErrorKind::NotFound => Error::Missing { path: owned },
        io::ErrorKind::IsADirectory => Error::WrongKind { path: owned, kind: "directory" },
        io::ErrorKind::ReadOnlyFilesystem => Error::NotWritable { path: owned },
        io::ErrorKind::PermissionDenied if !read_only && open(false).is_ok() => {
            Error::NotWritable { path: owned }
        }
        io::ErrorKind::PermissionDenied => Error::Permission { path: owned },
        _ => Error::Host { what: "open", path: owned, source },
    })
}

fn kind_name(kind: std::fs::FileType) -> &'static str {
    match () {
        () if kind.is_dir() => "directory",
        () if kind.is_char_device() => "character device",
        () if kind.is_fifo() => "pipe",
        () if kind.is_socket() => "socket",
        () => "special file",
    }
}

#[cfg(test)]
mod tests;
