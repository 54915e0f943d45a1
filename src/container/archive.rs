//! Files in and out of containers, as tar archives: `cp`'s two ends, the host and a container of either isolation.
//!
//! A container's file system is hostile: it may change its links and names while they are looked at. The kernel resolves
//! every path with the container's root as its root (openat2(2), `RESOLVE_IN_ROOT`), and what lies below is gone through by
//! descriptors that follow no link.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use super::config::{ContainerConfig, Isolation};
use super::files::Lock;
use super::microvm::Microvm;
use super::records::{self, Record, Records, short};
use super::{backend, native, prepare};
use crate::image::layers::{self, CopyOwner, CopyTo, Rights};

/// Links that are followed at the end of a path, as the kernel has it.
const LINKS_MAX: usize = 40;

/// Why files could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The container.
    #[error(transparent)]
    Backend(#[from] backend::Error),
    /// What it is made of.
    #[error(transparent)]
    Prepare(#[from] prepare::Error),
    /// Its directories.
    #[error(transparent)]
    Records(#[from] records::Error),
    /// The archive.
    #[error("cannot copy {path:?}")]
    Archive {
        /// What is copied, or where to.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: layers::Error,
    },
    /// A file.
    #[error("cannot look at {path:?}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A stopped container's VM is needed.
    #[error("the files of container {id} are on a disk that only its microVM mounts: start it first", id = short(.0))]
    Stopped(String),
    /// It is being started or removed.
    #[error("container {id} is being started or removed", id = short(.0))]
    Busy(String),
    /// Volumes are not mounted while a container is stopped.
    #[error(
        "{path:?} is in a volume or another mount, which a stopped container does not have: start it first"
    )]
    Mounted {
        /// The path.
        path: PathBuf,
    },
    /// A path that the agent cannot be told.
    #[error("{0:?} is not UTF-8")]
    NotText(PathBuf),
    /// Links in a circle.
    #[error("{0:?} lies behind too many symbolic links")]
    Links(PathBuf),
}

/// What a path is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A symbolic link, and what it says.
    Link(PathBuf),
    /// Anything else.
    File,
}

/// Somewhere that files are copied from or to. Paths are absolute.
pub enum Files {
    /// A tree of files on this kernel.
    Tree(Tree),
    /// A container in a microVM, which its agent looks into.
    Guest(Box<Microvm>),
}

/// A tree of files on this kernel.
pub struct Tree {
    root: OwnedFd,
    resolve: ResolveFlags,
    /// Mount points of which the tree has only what lies below the mounts.
    hidden: Vec<PathBuf>,
    /// Who may own what is made here.
    is_host: bool,
    /// Keeps a stopped container from being started. Dropped after the root.
    _life: Option<Lock>,
}

/// How what is copied is owned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// As in the archive.
    Kept,
    /// By root in a container, by the user on the host.
    Receiver,
}

impl Tree {
    /// The host's.
    pub fn host() -> Result<Tree, Error> {
        let path = Path::new("/");
        let root = rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        let root = root.map_err(|errno| Error::file(path, errno))?;
        Ok(Tree { root, resolve: ResolveFlags::empty(), hidden: vec![], is_host: true, _life: None })
    }

    fn of_container(root: OwnedFd, hidden: Vec<PathBuf>, life: Option<Lock>) -> Tree {
        // Links of /proc lead out of every root.
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Tree { root, resolve, hidden, is_host: false, _life: life }
    }

    fn open(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Error> {
        if self.hidden.iter().any(|mount| path.starts_with(mount)) {
            return Err(Error::Mounted { path: path.into() });
        }
        let flags = flags | OFlags::CLOEXEC;
        loop {
            match openat2(&self.root, path, flags, Mode::empty(), self.resolve) {
                // Something was renamed meanwhile.
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => return result.map_err(|errno| Error::file(path, errno)),
            }
        }
    }

    fn kind(&self, path: &Path) -> Result<Option<Kind>, Error> {
        let file = match self.open(path, OFlags::PATH | OFlags::NOFOLLOW) {
            Err(Error::File { source, .. }) if source.raw_os_error() == Some(libc::ENOENT) => {
                return Ok(None);
            }
            result => result?,
        };
        let failed = |errno| Error::file(path, errno);
        let stat = rustix::fs::fstat(&file).map_err(failed)?;
        Ok(Some(match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Kind::Directory,
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(&file, c"", vec![]).map_err(failed)?;
                Kind::Link(OsString::from_vec(target.into_bytes()).into())
            }
            _ => Kind::File,
        }))
    }

    /// As [`Files::read`].
    pub fn read(&self, path: &Path, name: &[u8], owner: Owner, to: impl Write) -> Result<(), Error> {
        let failed = |source| Error::Archive { path: path.into(), source };
        let owner = if owner == Owner::Kept { CopyOwner::Kept } else { CopyOwner::Root };
        let directory = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
        if self.kind(path)? == Some(Kind::Directory) {
            let directory = self.open(path, directory)?;
            return layers::pack_directory(&directory, name, owner, to).map_err(failed);
        }
        let (parent, file) = split(path);
        let parent = self.open(&parent, OFlags::RDONLY | OFlags::DIRECTORY)?;
        layers::pack_file(parent.as_fd(), file, name, owner, to).map_err(failed)
    }

    /// As [`Files::write`].
    pub fn write(&self, to: &Target, owner: Owner, from: impl Read) -> Result<(), Error> {
        let directory = self.open(&to.directory, OFlags::PATH | OFlags::DIRECTORY)?;
        let mut rights = Rights::detect();
        // Into a container, the archive says already whose everything is.
        rights.owners &= !self.is_host || owner == Owner::Kept;
        // A container's directory is named from its root, where its links lead to; the host's links are not followed.
        let (root, relative) = match self.is_host {
            true => (&directory, vec![]),
            false => (&self.root, to.directory.as_os_str().as_bytes().to_vec()),
        };
        let root = PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd()));
        let (name, verbatim) = match &to.name {
            Name::New(name) => (Some(name.clone()), false),
            Name::Contents => (None, false),
            Name::Archive => (None, true),
        };
        let copy_to = CopyTo { directory: relative, name, verbatim };
        let unpacked = layers::unpack_copy(from, &root, &copy_to, rights);
        unpacked.map_err(|source| Error::Archive { path: to.directory.clone(), source })
    }
}

/// Where an archive is put.
#[derive(Clone, Debug)]
pub struct Target {
    /// A directory that is there.
    pub directory: PathBuf,
    /// What it is called in it.
    pub name: Name,
}

/// What the top of an archive is called where it is put.
#[derive(Clone, Debug)]
pub enum Name {
    /// This.
    New(Vec<u8>),
    /// Nothing: what is in it is put into the directory.
    Contents,
    /// What the archive says.
    Archive,
}

impl Error {
    fn file(path: &Path, errno: Errno) -> Error {
        Error::File { path: path.into(), source: errno.into() }
    }
}

impl Files {
    /// A container's.
    pub fn of(records: &Records, record: &Record) -> Result<Files, Error> {
        let config = &record.config;
        if config.isolation == Isolation::Microvm {
            if !record.state.status.is_live() {
                return Err(Error::Stopped(config.id.clone()));
            }
            return Ok(Files::Guest(Box::new(prepare::open_microvm(records, config)?)));
        }
        if record.state.status.is_live() {
            let pid = prepare::open(records, record)?.pid().ok_or(backend::Error::NotRunning)?;
            // With its volumes, which the mount that the host sees has not.
            let path = PathBuf::from(format!("/proc/{pid}/root"));
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let root = rustix::fs::openat(CWD, &path, flags, Mode::empty());
            let root = root.map_err(|errno| Error::file(&path, errno))?;
            // The number is still the container's, so the root is too.
            prepare::open(records, record)?;
            return Ok(Files::Tree(Tree::of_container(root, vec![], None)));
        }
        let life = records.take_life(&config.id)?.ok_or_else(|| Error::Busy(config.id.clone()))?;
        let (_, _, layers) = prepare::image_of(records, config)?;
        let roots = records.roots();
        let writable = roots.container(&config.id).join("rw");
        let root = native::open_layers(&layers, &writable, &roots.container_run(&config.id).join("image"))?;
        Ok(Files::Tree(Tree::of_container(root, hidden(config), Some(life))))
    }

    /// What a path is, itself and not what it links to; `None` if there is nothing.
    pub fn kind(&mut self, path: &Path) -> Result<Option<Kind>, Error> {
        match self {
            Files::Tree(tree) => tree.kind(path),
            Files::Guest(guest) => {
                let Some(info) = guest.stat_path(text(path)?, false)? else { return Ok(None) };
                Ok(Some(match (FileType::from_raw_mode(info.mode), info.link) {
                    (FileType::Directory, _) => Kind::Directory,
                    (FileType::Symlink, Some(link)) => Kind::Link(link.into()),
                    _ => Kind::File,
                }))
            }
        }
    }

    /// The path with links at its end followed; it need not be there.
    pub fn follow(&mut self, path: &Path) -> Result<PathBuf, Error> {
        let mut current = path.to_owned();
        for _ in 0..LINKS_MAX {
            match self.kind(&current)? {
                Some(Kind::Link(target)) => current = split(&current).0.join(target),
                _ => return Ok(current),
            }
        }
        Err(Error::Links(path.into()))
    }

    /// Writes a path to `to` as an archive whose top is called `name`, or, from a microVM, as the path's last part.
    pub fn read(&mut self, path: &Path, name: &[u8], owner: Owner, to: impl Write) -> Result<(), Error> {
        match self {
            Files::Tree(tree) => tree.read(path, name, owner, to),
            Files::Guest(guest) => Ok(guest.read_archive(text(path)?, to)?),
        }
    }

    /// Unpacks an archive. Into a microVM, its top must be called already what it is to be called.
    pub fn write(&mut self, to: &Target, owner: Owner, from: impl Read) -> Result<(), Error> {
        match self {
            Files::Tree(tree) => tree.write(to, owner, from),
            Files::Guest(guest) => Ok(guest.write_archive(text(&to.directory)?, from)?),
        }
    }
}

fn text(path: &Path) -> Result<&str, Error> {
    path.to_str().ok_or_else(|| Error::NotText(path.into()))
}

/// A path's directory and last part; of the root both are the root.
fn split(path: &Path) -> (PathBuf, &[u8]) {
    let name = path.file_name().map_or(&b"."[..], OsStrExt::as_bytes);
    (path.parent().unwrap_or(Path::new("/")).to_owned(), name)
}

/// Where a container that runs has something else than its root file system.
fn hidden(config: &ContainerConfig) -> Vec<PathBuf> {
    config.mounts.iter().map(|mount| mount.target.clone()).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn tree(path: &Path) -> Files {
        Files::Tree(Tree::of_container(fs::File::open(path).unwrap().into(), vec![], None))
    }

    #[test]
    fn links_lead_nowhere_but_into_the_container() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(directory.path().join("secret"), "host").unwrap();
        fs::write(root.join("etc/passwd"), "container").unwrap();
        symlink("../../secret", root.join("up")).unwrap();
        symlink("/etc", root.join("absolute")).unwrap();
        symlink("/proc/self/root/etc", root.join("magic")).unwrap();
        let mut files = tree(&root);
        assert_eq!(files.kind(Path::new("/up")).unwrap(), Some(Kind::Link("../../secret".into())));
        let followed = files.follow(Path::new("/up")).unwrap();
        assert_eq!(files.kind(&followed).unwrap(), None);
        let mut archive = vec![];
        files.read(Path::new("/absolute/passwd"), b"x", Owner::Kept, &mut archive).unwrap();
        assert!(archive.windows(9).any(|window| window == b"container"));
        assert!(files.read(Path::new("/magic/passwd"), b"x", Owner::Kept, &mut vec![]).is_err());
        // Into `absolute` is into the container's `etc`.
        let to = Target { directory: "/absolute".into(), name: Name::New(b"new".to_vec()) };
        files.write(&to, Owner::Receiver, &archive[..]).unwrap();
        assert_eq!(fs::read_to_string(root.join("etc/new")).unwrap(), "container");
    }

    #[test]
    fn links_in_a_circle_are_an_error() {
        let directory = tempfile::tempdir().unwrap();
        symlink("b", directory.path().join("a")).unwrap();
        symlink("a", directory.path().join("b")).unwrap();
        assert!(matches!(tree(directory.path()).follow(Path::new("/a")), Err(Error::Links(_))));
    }

    #[test]
    fn copy_removes_no_directory() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("a/full")).unwrap();
        fs::write(directory.path().join("file"), "x").unwrap();
        let mut files = tree(directory.path());
        let mut archive = vec![];
        files.read(Path::new("/file"), b"file", Owner::Kept, &mut archive).unwrap();
        let to = Target { directory: "/".into(), name: Name::New(b"a".to_vec()) };
        assert!(files.write(&to, Owner::Kept, &archive[..]).is_err());
        assert!(directory.path().join("a/full").is_dir());
    }
}
