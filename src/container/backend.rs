//! What the supervisor drives: one container, natively or in a microVM.
//!
//! A backend has one container and is used from one thread. The order is `create`, `start`, then whatever comes until
//! `exit_status` says how the process ended, and `delete`, which may come at any time and clears away whatever there is.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;

use oci_spec::runtime::{Process, Spec};
use serde::{Deserialize, Serialize};

use super::config::ContainerConfig;

/// Why a backend could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program is not in the container.
    #[error("there is no {program:?} in the container")]
    NotFound {
        /// What was to be run.
        program: String,
    },
    /// The program is there and cannot be run.
    #[error("cannot run {program:?} in the container: {reason}")]
    NotExecutable {
        /// What was to be run.
        program: String,
        /// What the kernel said.
        reason: String,
    },
    /// The host or the isolation has no means for it.
    #[error("{what}")]
    Unsupported {
        /// What was asked for, and what is missing.
        what: String,
    },
    /// The container is not in the state for it.
    #[error("the container is not running")]
    NotRunning,
    /// Anything else.
    #[error("{what}")]
    Failed {
        /// What was being done.
        what: String,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Error {
    /// What was being done, and why it failed.
    pub fn failed(
        what: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Error {
        Error::Failed { what: what.into(), source: source.into() }
    }

    /// The exit code of `run` and `exec`, as Docker has it.
    pub fn docker_code(&self) -> u8 {
        match self {
            Error::NotFound { .. } => 127,
            Error::NotExecutable { .. } => 126,
            _ => 125,
        }
    }
}

/// What a container is made from.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// A directory for what is needed while the container exists: sockets, mount points. It is there already.
    pub dir: PathBuf,
    /// The container, as runtimes understand it.
    pub spec: Spec,
    /// Where the root file system is seen on the host, if it is: a directory in `dir`.
    pub rootfs: PathBuf,
    /// Unpacked layers, the bottom one first. Without any, `rootfs` already is the root file system.
    pub layers: Vec<PathBuf>,
    /// Directory of what the container writes; has `upper` and `work`, which are made if they are not there.
    pub writable: PathBuf,
    /// What was asked for.
    pub config: ContainerConfig,
}

/// The host's ends of a process's standard streams.
#[derive(Debug)]
pub struct Streams {
    /// Written to; closing it (or shutting down a socket's writing half) ends the input. `None`: there is no input.
    pub stdin: Option<OwnedFd>,
    /// Read from; with a terminal also written to, and then the only one.
    pub stdout: OwnedFd,
    /// Read from; `None` with a terminal.
    pub stderr: Option<OwnedFd>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExitStatus {
    /// By itself, with this code.
    Code(u8),
    /// By this signal.
    Signal(u8),
}

impl ExitStatus {
    /// The code, or 128 and the signal's number.
    pub fn docker_code(self) -> u8 {
        match self {
            ExitStatus::Code(code) => code,
            ExitStatus::Signal(signal) => signal.saturating_add(128),
        }
    }
}

/// Size of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Characters of a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

/// What a container uses; `None` where the host does not count it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Processor time in nanoseconds.
    pub cpu_ns: Option<u64>,
    /// The part of it that was spent in the kernel.
    pub cpu_system_ns: Option<u64>,
    /// How often the container was held back by its quota.
    pub throttled_periods: Option<u64>,
    /// How long.
    pub throttled_ns: Option<u64>,
    /// Bytes of memory, without what the kernel can drop at once (inactive page cache).
    pub memory_bytes: Option<u64>,
    /// Bytes of memory that it may have; `None` for no limit.
    pub memory_limit_bytes: Option<u64>,
    /// Bytes of page cache in its memory.
    pub cache_bytes: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u64>,
    /// How many it may have; `None` for no limit.
    pub pids_limit: Option<u64>,
    /// Bytes read from block devices.
    pub block_read_bytes: Option<u64>,
    /// Bytes written to them.
    pub block_write_bytes: Option<u64>,
    /// Network interfaces but the loopback.
    pub interfaces: Vec<InterfaceStats>,
}

/// Counters of a network interface, as the container sees them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceStats {
    /// Its name.
    pub name: String,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Packets that were received and dropped.
    pub rx_dropped: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Packets that were to be sent and dropped.
    pub tx_dropped: u64,
}

/// One process of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// Its number: on the host natively, in the guest in a microVM.
    pub pid: u32,
    /// Its parent's.
    pub parent: u32,
    /// Its user's number, counted as its number is.
    pub uid: u32,
    /// Processor time in milliseconds.
    pub cpu_ms: u64,
    /// Start, in seconds since 1970.
    pub started_s: u64,
    /// One letter, as `ps` has it.
    pub state: char,
    /// Its arguments, or its name in brackets.
    pub command: String,
}

/// One container, and the processes in it.
pub trait Backend {
    /// Everything up to the process's exec, which waits.
    fn create(&mut self, bundle: &Bundle) -> Result<(), Error>;
    /// Lets the process go on. When its program runs, the host's ends of its standard streams come back; else why not.
    fn start(&mut self) -> Result<Streams, Error>;
    /// The process on this host that the container's is, or is in: the first process, or the monitor.
    fn pid(&self) -> Option<u32>;
    /// Becomes readable when the process has ended.
    fn exit_event(&self) -> Result<BorrowedFd<'_>, Error>;
    /// How the process ended; `None` while it runs.
    fn exit_status(&mut self) -> Result<Option<ExitStatus>, Error>;
    /// Whether the kernel has killed a process of the container because its memory was used up.
    fn oom_killed(&mut self) -> Result<bool, Error>;
    /// A signal for the process, or for all of the container's.
    fn signal(&mut self, signal: i32, all: bool) -> Result<(), Error>;
    /// A new size of the terminal; before `start`, its first one.
    fn resize(&mut self, size: WindowSize) -> Result<(), Error>;
    /// Stops all processes, as they are.
    fn pause(&mut self) -> Result<(), Error>;
    /// Lets them go on.
    fn resume(&mut self) -> Result<(), Error>;
    /// What the container uses.
    fn stats(&mut self) -> Result<Stats, Error>;
    /// The container's processes.
    fn processes(&mut self) -> Result<Vec<ProcessInfo>, Error>;
    /// A further process. It runs when this returns.
    fn exec(&mut self, process: &Process) -> Result<(Box<dyn Execution>, Streams), Error>;
    /// Kills what runs and takes everything away that `create` has made, also what another process made for the same
    /// container and left. What is not there is no error.
    fn delete(&mut self) -> Result<(), Error>;
}

/// A further process in a container. Dropping the value does not end it.
pub trait Execution {
    /// Becomes readable when it has ended.
    fn exit_event(&self) -> BorrowedFd<'_>;
    /// How it ended; `None` while it runs.
    fn exit_status(&mut self) -> Result<Option<ExitStatus>, Error>;
    /// A signal for it.
    fn signal(&mut self, signal: i32) -> Result<(), Error>;
    /// A new size of its terminal.
    fn resize(&mut self, size: WindowSize) -> Result<(), Error>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_docker() {
        assert_eq!(ExitStatus::Code(3).docker_code(), 3);
        assert_eq!(ExitStatus::Signal(9).docker_code(), 137);
        assert_eq!(ExitStatus::Signal(200).docker_code(), 255);
        assert_eq!(Error::NotFound { program: "x".into() }.docker_code(), 127);
        assert_eq!(Error::NotExecutable { program: "x".into(), reason: String::new() }.docker_code(), 126);
        assert_eq!(Error::NotRunning.docker_code(), 125);
    }
}
