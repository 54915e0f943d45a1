//! `fork`, for processes that have one thread.
#![allow(unsafe_code)]

use nix::unistd::{ForkResult, Pid};

/// Which of the two processes this is.
pub(super) enum Fork {
    Parent(Pid),
    Child,
}

/// Makes a second process of this one. Fails if there is more than one thread.
pub(super) fn fork() -> nix::Result<Fork> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads != 1 {
        return Err(nix::Error::EAGAIN);
    }
    // SAFETY: with one thread, which the check above makes sure of, the child may do what the parent may.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Fork::Parent(child)),
        ForkResult::Child => Ok(Fork::Child),
    }
}
