//! A unix socket that programs on the host connect to, and its name in the file system.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, umask};

use crate::sandbox;

/// Why a socket cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process listens there.
    #[error("the socket {0:?} is in use by another process; stop it, or choose another path")]
    InUse(PathBuf),
    /// Something else has that name.
    #[error("{0:?} is there already and is no socket; choose another path")]
    NoSocket(PathBuf),
    /// The host refuses it.
    #[error("cannot make the socket {path:?}")]
    Bind {
        /// Its path.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// The name of a socket, with the numbers by which it is known to be this one. The file goes away with the value.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    numbers: Option<(u64, u64)>,
}

impl SocketFile {
    /// Where the socket is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Behind the walls the keeper does it. Somebody may have put another there.
        if !sandbox::is_on() && self.numbers.is_some() && numbers(&self.path) == self.numbers {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn numbers(path: &Path) -> Option<(u64, u64)> {
    path.symlink_metadata().ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Listens at `path`, for its owner alone and without blocking, in place of a socket that a dead process left. To be
/// called while there is one thread only.
pub fn listen(path: &Path) -> Result<(UnixListener, SocketFile), Error> {
    clear_the_way(path)?;
    let failed = |source| Error::Bind { path: path.to_owned(), source };
    // With the umask of the moment others could connect before the rights are set.
    let before = umask(Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    umask(before);
    let listener = listener.map_err(failed)?;
    let file = SocketFile { path: path.to_owned(), numbers: numbers(path) };
    listener.set_nonblocking(true).map_err(failed)?;
    Ok((listener, file))
}

/// Removes a socket that nobody listens on.
fn clear_the_way(path: &Path) -> Result<(), Error> {
    let Ok(metadata) = path.symlink_metadata() else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return Err(Error::NoSocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::debug!("replacing the socket {path:?}, which nobody listens on");
            std::fs::remove_file(path).map_err(|source| Error::Bind { path: path.to_owned(), source })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // Even one that we may not connect to is somebody's.
        _ => Err(Error::InUse(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn socket_is_private_replaces_dead_ones_and_goes_away() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let socket = listen(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(listen(&path), Err(Error::InUse(_))));
        drop(socket);
        assert!(!path.exists());
        // Dropping a listener leaves its file, as a killed process does.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let socket = listen(&path).unwrap();
        // Another's socket is not removed.
        std::fs::rename(&path, directory.path().join("moved")).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(socket);
        assert!(path.exists());
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(listen(&path), Err(Error::NoSocket(_))));
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(listen(&link), Err(Error::NoSocket(_))));
        assert!(matches!(listen(&directory.path().join("no/such")), Err(Error::Bind { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}
