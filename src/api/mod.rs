//! The control socket: Firecracker's HTTP interface to a running VM, on a unix socket.
//!
//! `http` speaks the protocol and keeps clients within bounds, `routes` turns requests into [`Command`]s and what comes
//! of them into answers, `bodies` has the JSON on both sides. One thread serves all clients. It shares nothing with the
//! VM but its [`Control`], so a client can at worst be slow to itself.
//!
//! [`Command`]: crate::vm::control::Command

mod bodies;
pub mod client;
mod http;
mod routes;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::sys::signal::SigSet;

use crate::socket::{self, SocketFile};
use crate::vm::control::Control;

/// Enough for runtime and HTTP; pages that are not touched cost nothing.
const STACK_BYTES: usize = 512 << 10;

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket cannot be made.
    #[error("cannot make the control socket")]
    Socket(#[source] socket::Error),
    /// The thread or what it runs on.
    #[error("cannot serve the control socket")]
    Serve(#[source] io::Error),
}

/// A socket that listens, for its owner alone. Its file goes away with the value.
pub struct Socket {
    listener: UnixListener,
    _file: SocketFile,
}

impl Socket {
    /// Makes the socket, in place of one that a dead process left. To be called while there is one thread only.
    pub fn bind(path: &Path) -> Result<Socket, Error> {
        let (listener, file) = socket::listen(path).map_err(Error::Socket)?;
        Ok(Socket { listener, _file: file })
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
