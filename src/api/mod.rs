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
mod setup;
mod templates;

pub use setup::{Logger, Setup};

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Runtime;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::oneshot;

use crate::mmds::Store;
use crate::socket::{self, SocketFile};
use crate::vm::control::{Control, Load};

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

/// A control socket whose clients put a VM together.
pub struct Waiting {
    runtime: Runtime,
    shared: Arc<http::Shared>,
    starts: UnboundedReceiver<http::Start>,
    file: SocketFile,
}

/// A VM that is to start, and a client that waits for it.
pub struct Start {
    /// What it is made of.
    pub setup: Setup,
    /// The snapshot that it is made of instead. Log and metrics are those of the description.
    pub load: Option<Box<Load>>,
    answer: oneshot::Sender<Result<(), String>>,
}

impl Start {
    /// Tells the client why it does not.
    pub fn refuse(self, why: String) {
        let _ = self.answer.send(Err(why));
    }

    /// Takes the description out.
    pub fn take_setup(&mut self) -> Setup {
        std::mem::take(&mut self.setup)
    }
}

/// The signals that end a process, which are read from a descriptor as long as this value is there.
struct BlockedSignals {
    fd: SignalFd,
    before: SigSet,
}

impl BlockedSignals {
    fn new() -> io::Result<BlockedSignals> {
        let before = SigSet::thread_get_mask()?;
        let set: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
        set.thread_block()?;
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(BlockedSignals { fd, before })
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // One that came is taken, or it would end the process without a word.
        while let Ok(Some(_)) = self.fd.read_signal() {}
        let _ = self.before.thread_set_mask();
    }
}

impl Socket {
    /// Lets clients put a VM together, from `setup` on. They are served while [`Waiting::wait`] waits.
    pub fn wait(self, id: String, setup: Setup) -> Result<Waiting, Error> {
        let (sender, starts) = tokio::sync::mpsc::unbounded_channel();
        let metadata = Arc::clone(&setup.metadata);
        let phase = Mutex::new(http::Phase::Setup(Box::new(setup), sender));
        let (runtime, shared, file) = self.listen(http::Shared { id, phase, metadata })?;
        Ok(Waiting { runtime, shared, starts, file })
    }

    fn listen(self, shared: http::Shared) -> Result<(Runtime, Arc<http::Shared>, SocketFile), Error> {
        let Socket { listener, _file: file } = self;
        let runtime = http::runtime().map_err(Error::Serve)?;
        let shared = Arc::new(shared);
        http::listen(&runtime, listener, Arc::clone(&shared)).map_err(Error::Serve)?;
        Ok((runtime, shared, file))
    }
}

impl Waiting {
    /// Serves clients until one starts the VM, or a signal asks for the end: `None`. Those that come later wait until
    /// [`Self::serve`].
    pub fn wait(&mut self) -> Result<Option<Start>, Error> {
        let signals = BlockedSignals::new().map_err(Error::Serve)?;
        let Waiting { runtime, starts, .. } = self;
        let next = runtime.block_on(async {
            // What it warns of is a descriptor that is closed too early; this one is borrowed.
            #[allow(deprecated)]
            let signals = AsyncFd::with_interest(signals.fd.as_fd(), Interest::READABLE)?;
            std::future::poll_fn(|context| {
                if let Poll::Ready(start) = starts.poll_recv(context) {
                    return Poll::Ready(start.map(Some).ok_or_else(|| io::ErrorKind::BrokenPipe.into()));
                }
                signals.poll_read_ready(context).map(|ready| ready.map(|_| None))
            })
            .await
        });
        let start: Option<http::Start> = next.map_err(Error::Serve)?;
        Ok(start.map(|http::Start { setup, load, answer }| Start { setup, load, answer }))
    }

    /// Tells the client that the VM has started, and serves it and all others on a thread of its own.
    pub fn serve(self, start: Start, control: Control) -> Result<Server, Error> {
        *self.shared.phase.lock().unwrap_or_else(PoisonError::into_inner) = http::Phase::Running(control);
        let _ = start.answer.send(Ok(()));
        spawn(self.runtime, self.file)
    }
}

/// Serves `socket` on a thread of its own.
pub fn serve(socket: Socket, id: String, control: Control, metadata: Arc<Store>) -> Result<Server, Error> {
    let phase = Mutex::new(http::Phase::Running(control));
    let (runtime, _, file) = socket.listen(http::Shared { id, phase, metadata })?;
    spawn(runtime, file)
}

fn spawn(runtime: Runtime, file: SocketFile) -> Result<Server, Error> {
    // Signals are for the main thread, which blocks its own later than this.
    let before = SigSet::thread_get_mask().map_err(|error| Error::Serve(error.into()))?;
    let mut blocked = SigSet::all();
    // What the walls raise must be heard.
    blocked.remove(Signal::SIGSYS);
    blocked.thread_block().map_err(|error| Error::Serve(error.into()))?;
    let thread = std::thread::Builder::new().name("api".into()).stack_size(STACK_BYTES).spawn(move || {
        if let Err(error) = http::run(&runtime) {
            tracing::error!("the control socket is served no more: {error}");
        }
    });
    before.thread_set_mask().map_err(|error| Error::Serve(error.into()))?;
    thread.map_err(Error::Serve)?;
    Ok(Server { _file: file })
}
