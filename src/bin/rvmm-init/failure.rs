//! Errors of system calls as the host gets them.

use std::io;

use rustix::io::Errno;
use rvmm::guest::protocol::Failure;

/// The number of an error.
pub trait Number {
    /// As errno has it.
    fn number(&self) -> i32;
}

impl Number for Errno {
    fn number(&self) -> i32 {
        self.raw_os_error()
    }
}

impl Number for io::Error {
    fn number(&self) -> i32 {
        self.raw_os_error().unwrap_or(libc::EIO)
    }
}

impl Number for nix::errno::Errno {
    fn number(&self) -> i32 {
        *self as i32
    }
}

/// Adds what was tried, on what, to an error.
pub trait Doing<T> {
    /// `what` completes "cannot …".
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: Number> Doing<T> for Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| Failure::System { doing: what(), errno: error.number() })
    }
}
