//! The monitor's side: starts the file server's process, and ends it.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{Cache, Options, SUBCOMMAND};

/// What the child says first when it is ready; anything else is the reason why it is not.
pub(super) const READY: u8 = b'\n';
/// Longest reason.
const REASON_BYTES_MAX: u64 = 4096;
/// How long the child may take to become ready: a hang and not a time that is met.
const READY_PATIENCE: Duration = Duration::from_secs(30);
/// How long the child may take to end by itself.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// Why a folder cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder cannot be opened.
    #[error("cannot open the shared folder {path:?}")]
    Open {
        /// The folder.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The process cannot be started.
    #[error("cannot start a file server for {path:?}")]
    Start {
        /// The folder.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The process has ended before it was ready.
    #[error("the file server for {path:?} has failed: {reason}")]
    Failed {
        /// The folder.
        path: PathBuf,
        /// What it said.
        reason: String,
    },
}

/// A running file server. It ends when this value is dropped.
#[derive(Debug)]
pub struct Process {
    path: PathBuf,
    child: Child,
    /// The socket that the device talks through, too.
    stream: UnixStream,
    ready: bool,
}

/// Starts a file server for the folder at `path`; the socket is for FUSE messages once the server is ready.
pub fn start(path: &Path, options: &Options) -> Result<(Process, UnixStream), Error> {
    let open =
        || std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(path);
    let folder = open().map_err(|source| Error::Open { path: path.into(), source })?;
    let start = || -> io::Result<(Process, UnixStream)> {
        let (ours, its) = UnixStream::pair()?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("rvmm").arg(SUBCOMMAND).args(arguments(options)).env_clear();
        // Two descriptors to hand over, and two standard ones that the child has no other use for.
        command.stdin(Stdio::from(OwnedFd::from(its))).stdout(Stdio::from(OwnedFd::from(folder)));
        // A terminal's Ctrl-C is for the monitor, which lets the guest shut down.
        command.stderr(Stdio::inherit()).process_group(0);
        let child = command.spawn()?;
        let stream = ours.try_clone()?;
        Ok((Process { path: path.into(), child, stream, ready: false }, ours))
    };
    start().map_err(|source| Error::Start { path: path.into(), source })
}

fn arguments(options: &Options) -> Vec<&'static str> {
    let mut arguments = vec![];
    arguments.extend(options.readonly.then_some("--readonly"));
    arguments.extend(options.devices.then_some("--devices"));
    arguments.extend((options.cache == Cache::Always).then_some("--cache=always"));
    arguments
}

impl Process {
    /// Waits until the server has shut itself in and answers. Before that, nothing must be read from the socket.
    pub fn wait_ready(&mut self) -> Result<(), Error> {
        if self.ready {
            return Ok(());
        }
        let failed = |reason: String| Error::Failed { path: self.path.clone(), reason };
        let mut first = [0];
        let read = self
            .stream
            .set_read_timeout(Some(READY_PATIENCE))
            .and_then(|()| self.stream.read(&mut first))
            .and_then(|len| self.stream.set_read_timeout(None).map(|()| len));
        match read {
            Ok(1) if first == [READY] => {
                self.ready = true;
                Ok(())
            }
            Ok(1) => {
                let mut reason = first.to_vec();
                let _ = (&self.stream).take(REASON_BYTES_MAX).read_to_end(&mut reason);
                Err(failed(String::from_utf8_lossy(&reason).into_owned()))
            }
            Ok(_) => Err(failed("it has ended".into())),
            Err(error) => Err(failed(error.to_string())),
        }
    }

    /// The process's number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
        let deadline = Instant::now() + END_PATIENCE;
        while let Ok(None) = self.child.try_wait() {
            if Instant::now() > deadline {
                // One that is stuck in the host's kernel is left to it.
                let _ = self.child.kill();
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
