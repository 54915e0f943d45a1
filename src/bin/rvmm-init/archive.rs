//! Files in and out of a container as tar archives, by a child that has entered its file system.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};
use rvmm::guest::protocol::Failure;
use rvmm::image::layers;

use crate::failure::{Doing, Number};
use crate::system;

/// Bytes of a failure that are told at most: what a pipe takes at once.
const FAILURE_BYTES_MAX: u64 = 4096;

/// Which way an archive goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Out of the container.
    Read,
    /// Into it.
    Write,
    /// What was written over its layers, out of it.
    Changes,
}

/// The file system of a container.
pub enum View {
    /// A process that is in it.
    Process(OwnedFd),
    /// Where its root is mounted, if there is none.
    Root(PathBuf),
    /// The directory of what was written over the layers.
    Upper(OwnedFd),
}

/// An archive under way.
pub struct Job {
    failure: File,
}

impl Job {
    /// Starts one: `stream` is the host's connection. The child's number comes back with it.
    pub fn start(
        direction: Direction,
        view: &View,
        path: &str,
        stream: OwnedFd,
    ) -> Result<(i32, Self), Failure> {
        let doing = || "start a process for an archive".to_owned();
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).doing(doing)?;
        let Some(pid) = system::fork().doing(doing)? else {
            if let Err(failure) = work(direction, view, Path::new(path), stream) {
                let bytes = postcard::to_stdvec(&failure).unwrap_or_default();
                let _ = File::from(writer).write_all(&bytes);
                system::exit(1);
            }
            system::exit(0);
        };
        Ok((pid, Self { failure: reader.into() }))
    }

    /// What became of it, when the child has ended.
    pub fn finish(self, succeeded: bool) -> Result<(), Failure> {
        if succeeded {
            return Ok(());
        }
        let mut bytes = Vec::new();
        let read = self.failure.take(FAILURE_BYTES_MAX).read_to_end(&mut bytes);
        let failure = read.ok().and_then(|_| postcard::from_bytes(&bytes).ok());
        Err(failure.unwrap_or(Failure::System { doing: "finish the archive".into(), errno: libc::EIO }))
    }
}

fn work(direction: Direction, view: &View, path: &Path, stream: OwnedFd) -> Result<(), Failure> {
    let doing = || "enter the container's file system".to_owned();
    match view {
        View::Process(process) => {
            move_into_thread_name_spaces(process.as_fd(), ThreadNameSpaceType::MOUNT).doing(doing)?;
        }
        View::Root(root) => rustix::process::chroot(root).doing(doing)?,
        View::Upper(_) => {}
    }
    match view {
        View::Upper(upper) => rustix::process::fchdir(upper).doing(doing)?,
        _ => rustix::process::chdir("/").doing(doing)?,
    }
    rustix::io::ioctl_fionbio(&stream, false).doing(doing)?;
    let stream = File::from(stream);
    match direction {
        Direction::Read => pack(path, stream),
        Direction::Write => unpack(path, stream),
        Direction::Changes => pack_changes(stream),
    }
}

/// What happened to a path.
fn at(path: &Path, error: &io::Error) -> Failure {
    let doing = match error.get_ref() {
        // What the archive's reader says has no number.
        Some(inner) => format!("copy {}: {inner}", path.display()),
        None => format!("copy {}", path.display()),
    };
    Failure::System { doing: doing.chars().take(1000).collect(), errno: error.number() }
}

fn pack(path: &Path, stream: File) -> Result<(), Failure> {
    let failed = |error: io::Error| at(path, &error);
    let name = match path.components().next_back() {
        Some(Component::Normal(name)) => Path::new(name),
        _ => Path::new("."),
    };
    let kind = path.symlink_metadata().map_err(failed)?.file_type();
    let mut archive = tar::Builder::new(io::BufWriter::with_capacity(64 << 10, stream));
    archive.follow_symlinks(false);
    // `DIR/.` and `LINK/` mean what is there and not the link.
    if kind.is_dir() || kind.is_symlink() && path.as_os_str().as_bytes().ends_with(b"/") {
        archive.append_dir_all(name, path)
    } else {
        archive.append_path_with_name(path, name)
    }
    .map_err(failed)?;
    archive.into_inner().and_then(|mut inner| inner.flush()).map_err(failed)
}

/// Packs the working directory, which is an overlay's upper one, as a layer.
fn pack_changes(stream: File) -> Result<(), Failure> {
    let failed =
        |text: String| Failure::System { doing: text.chars().take(1000).collect(), errno: libc::EIO };
    let mut to = io::BufWriter::with_capacity(64 << 10, stream);
    layers::pack(Path::new("."), &mut to, layers::Rights::ALL)
        .map_err(|error| failed(format!("pack what was written: {}", rvmm::error_chain(&error))))?;
    to.flush().map_err(|error| failed(format!("send what was written: {error}")))
}

fn unpack(path: &Path, stream: File) -> Result<(), Failure> {
    let failed = |error: io::Error| at(path, &error);
    if !path.metadata().map_err(failed)?.is_dir() {
        return Err(failed(io::Error::from_raw_os_error(libc::ENOTDIR)));
    }
    let mut archive = tar::Archive::new(io::BufReader::with_capacity(64 << 10, stream));
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(true);
    archive.set_preserve_mtime(true);
    archive.set_unpack_xattrs(true);
    archive.set_overwrite(true);
    archive.unpack(path).map_err(failed)?;
    // The host may have more than the archive's end to say.
    io::copy(&mut archive.into_inner(), &mut io::sink()).map(drop).map_err(failed)
}
