//! The walls around a running monitor: what is left to a guest that has broken out of KVM into this process.
//!
//! - `calls` lists the system calls of each kind of thread, `filter` makes kernel filters of the lists, and `violation`
//!   ends the VM when a thread makes another call.
//! - `privileges` gives up capabilities, and every way to new ones.
//! - `launcher` starts threads in place of threads that may not.
//! - `keeper` is a process that was there before the walls: it opens images and removes sockets.
//! - `jail` takes the host's files, processes and user away.
//!
//! `docs/security.md` says what each wall is for.

pub mod calls;
#[cfg(debug_assertions)]
pub mod escape;
mod filter;
mod fork;
pub mod jail;
pub mod keeper;
mod launcher;
mod names;
pub mod privileges;
mod violation;

pub use launcher::spawn_thread;
pub use names::name;
pub use violation::EXIT_VIOLATION;

use std::io;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::thread::CapabilitySet;

/// A kind of thread, or of process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The event loop.
    Main,
    /// Runs a vCPU.
    Vcpu,
    /// Starts device threads.
    Launcher,
    /// Writes the console.
    Console,
    /// Serves the control socket.
    Api,
    /// The keeper's process.
    Keeper,
    /// A virtio console.
    ConsoleDevice,
    /// The source of random numbers.
    Rng,
    /// The balloon.
    Balloon,
    /// A disk with io_uring.
    BlockUring,
    /// A disk with plain system calls.
    BlockSync,
    /// A network device.
    Net,
    /// Sockets between guest and host.
    Vsock,
    /// A shared folder.
    Fs,
}

impl Kind {
    /// All of them, in the order of the documentation.
    pub const ALL: [Kind; 14] = [
        Kind::Main,
        Kind::Vcpu,
        Kind::Launcher,
        Kind::Console,
        Kind::Api,
        Kind::Keeper,
        Kind::ConsoleDevice,
        Kind::Rng,
        Kind::Balloon,
        Kind::BlockUring,
        Kind::BlockSync,
        Kind::Net,
        Kind::Vsock,
        Kind::Fs,
    ];

    /// As messages and documentation call it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Main => "main",
            Kind::Vcpu => "vCPU",
            Kind::Launcher => "launcher",
            Kind::Console => "console",
            Kind::Api => "api",
            Kind::Keeper => "keeper",
            Kind::ConsoleDevice => "virtio-console",
            Kind::Rng => "virtio-rng",
            Kind::Balloon => "virtio-balloon",
            Kind::BlockUring => "virtio-block (io_uring)",
            Kind::BlockSync => "virtio-block (sync)",
            Kind::Net => "virtio-net",
            Kind::Vsock => "virtio-vsock",
            Kind::Fs => "virtio-fs",
        }
    }
}

/// Why there are no walls.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A filter could not be made.
    #[error("cannot make a filter for system calls")]
    Compile(#[source] seccompiler::BackendError),
    /// The kernel refuses a filter.
    #[error("cannot filter system calls; --no-sandbox runs the VM without")]
    Filter(#[source] seccompiler::Error),
    /// A step failed.
    #[error("cannot {what}")]
    Step {
        /// What was to be done.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

pub(crate) trait Step<T> {
    fn step(self, what: &'static str) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, what: &'static str) -> Result<T, Error> {
        self.map_err(|source| Error::Step { what, source: source.into() })
    }
}

static JAILED: AtomicBool = AtomicBool::new(false);

/// Whether this process is in a jail, where the directory of the sockets is the working directory.
pub fn is_jailed() -> bool {
    JAILED.load(Ordering::Acquire)
}

static ON: AtomicBool = AtomicBool::new(false);

/// Whether threads are to put up their walls.
pub fn is_on() -> bool {
    ON.load(Ordering::Acquire)
}

/// Puts up the walls of the process, which all threads inherit: to be called when all is open, while there is one thread.
/// The threads that are started from here on put up their own with [`enter`].
pub fn turn_on(jail: Option<(&jail::Jail, Option<&Path>)>) -> Result<(), Error> {
    violation::install().step("catch system calls that are not allowed")?;
    if let Some((jail, beside)) = jail {
        jail.close_files(beside)?;
        JAILED.store(true, Ordering::Release);
    }
    privileges::bound_if_possible(CapabilitySet::empty())?;
    if let Some((jail, _)) = jail {
        jail.change_user()?;
    }
    privileges::keep(CapabilitySet::empty())?;
    ON.store(true, Ordering::Release);
    launcher::start().step("start the launcher thread")
}

/// The filter of vCPUs, which many threads use.
static VCPU_FILTER: OnceLock<seccompiler::BpfProgram> = OnceLock::new();

/// Leaves this thread the system calls of its kind, if the sandbox is on.
pub fn enter(kind: Kind) -> Result<(), Error> {
    if !is_on() {
        return Ok(());
    }
    violation::name_thread(kind);
    filter_calls(kind)?;
    #[cfg(debug_assertions)]
    escape::try_all(kind);
    Ok(())
}

fn filter_calls(kind: Kind) -> Result<(), Error> {
    // Device threads inherit the launcher's.
    if matches!(kind, Kind::Launcher | Kind::Vcpu | Kind::Console) {
        let unknown = filter::refusing(kind).map_err(Error::Compile)?;
        seccompiler::apply_filter(&unknown).map_err(Error::Filter)?;
    }
    if kind != Kind::Vcpu {
        let program = filter::compile(kind).map_err(Error::Compile)?;
        return seccompiler::apply_filter(&program).map_err(Error::Filter);
    }
    let program = match VCPU_FILTER.get() {
        Some(program) => program,
        None => {
            let program = filter::compile(kind).map_err(Error::Compile)?;
            VCPU_FILTER.get_or_init(|| program)
        }
    };
    seccompiler::apply_filter(program).map_err(Error::Filter)
}

#[cfg(test)]
mod tests;
