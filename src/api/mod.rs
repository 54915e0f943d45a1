//! The control socket: Firecracker's HTTP interface to a running VM, on a unix socket.
//!
//! `http` speaks the protocol and keeps clients within bounds, `routes` turns requests into [`Command`]s and what comes
//! of them into answers, `bodies` has the JSON on both sides. One thread serves all clients. It shares nothing with the
//! VM but its [`Control`], so a client can at worst be slow to itself.
//!
//! [`Command`]: crate::vm::control::Command

mod bodies;
mod http;
mod routes;

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::signal::SigSet;
use nix::sys::stat::{Mode, umask};

use crate::vm::control::Control;

/// Enough for runtime and HTTP; pages that are not touched cost nothing.
const STACK_BYTES: usize = 512 << 10;

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process listens there.
    #[error("the control socket {0:?} is in use by another process; stop it, or choose another path")]
    InUse(PathBuf),
    /// Something else has that name.
    #[error("{0:?} is there already and is no socket; choose another path for the control socket")]
    NoSocket(PathBuf),
    /// The socket cannot be made.
    #[error("cannot make the control socket {path:?}")]
    Bind {
        /// Its path.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The thread or what it runs on.
    #[error("cannot serve the control socket")]
    Serve(#[source] io::Error),
}

/// A socket that listens, for its owner alone. Its file goes away with the value.
pub struct Socket {
    listener: UnixListener,
    _file: SocketFile,
}

/// The name of a socket, with the numbers by which it is known to be this one.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    numbers: Option<(u64, u64)>,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Somebody may have put another there.
        if self.numbers.is_some() && numbers(&self.path) == self.numbers {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn numbers(path: &Path) -> Option<(u64, u64)> {
    path.symlink_metadata().ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

impl Socket {
    /// Makes the socket, in place of one that a dead process left. To be called while there is one thread only.
    pub fn bind(path: &Path) -> Result<Socket, Error> {
        clear_the_way(path)?;
        let failed = |source| Error::Bind { path: path.to_owned(), source };
        // With the umask of the moment others could connect before the rights are set.
        let before = umask(Mode::from_bits_truncate(0o177));
        let listener = UnixListener::bind(path);
        umask(before);
        let listener = listener.map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let file = SocketFile { path: path.to_owned(), numbers: numbers(path) };
        Ok(Socket { listener, _file: file })
    }
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

/// A control socket that is served. When the value is dropped its file goes away; the thread ends with the process.
#[derive(Debug)]
pub struct Server {
    _file: SocketFile,
}

/// Serves `socket` on a thread of its own.
pub fn serve(socket: Socket, control: Control) -> Result<Server, Error> {
    let Socket { listener, _file } = socket;
    // Signals are for the main thread, which blocks its own later than this.
    let before = SigSet::thread_get_mask().map_err(|error| Error::Serve(error.into()))?;
    SigSet::all().thread_block().map_err(|error| Error::Serve(error.into()))?;
    let thread = std::thread::Builder::new().name("api".into()).stack_size(STACK_BYTES).spawn(move || {
        if let Err(error) = http::run(listener, control) {
            tracing::error!("the control socket is served no more: {error}");
        }
    });
    before.thread_set_mask().map_err(|error| Error::Serve(error.into()))?;
    thread.map_err(Error::Serve)?;
    Ok(Server { _file })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn socket_is_private_replaces_dead_ones_and_goes_away() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let socket = Socket::bind(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(Socket::bind(&path), Err(Error::InUse(_))));
        drop(socket);
        assert!(!path.exists());
        // Dropping a listener leaves its file, as a killed process does.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let socket = Socket::bind(&path).unwrap();
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
        assert!(matches!(Socket::bind(&path), Err(Error::NoSocket(_))));
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(Socket::bind(&link), Err(Error::NoSocket(_))));
        assert!(matches!(Socket::bind(&directory.path().join("no/such")), Err(Error::Bind { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}
