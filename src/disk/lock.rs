//! The lock on an image: one writer, or any number of readers.
//!
//! `flock` rather than OFD locks, since `/proc/locks` names the process that took it.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// How long the host may take to close the files of a process that is gone. An io_uring that such a process leaves
/// behind keeps the image open for some time.
const LEFT_BEHIND: Duration = Duration::from_secs(10);

/// Somebody else has the image; the process, where the host tells.
#[derive(Debug)]
pub(super) struct Held(pub(super) Option<u32>);

/// Locks `file`, which has these numbers. Waits only for a holder that is dead already.
pub(super) fn acquire(
    file: &File,
    shared: bool,
    (device, inode): (u64, u64),
) -> io::Result<Result<(), Held>> {
    let end = Instant::now() + LEFT_BEHIND;
    loop {
        if try_acquire(file, shared)? {
            return Ok(Ok(()));
        }
        let holder = holder(device, inode);
        // Without a holder, the lock was given up between the two looks at it, or the host does not tell.
        let dead = holder.is_some_and(|pid| !is_alive(pid));
        if !dead || Instant::now() > end {
            let gone = holder.is_none() && try_acquire(file, shared)?;
            return Ok(if gone { Ok(()) } else { Err(Held(holder)) });
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Gives the lock up, even if the host still has references to the open file.
pub(super) fn release(file: &File) {
    // SAFETY: `file` is an open descriptor, and flock takes no pointers.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_UN) };
}

/// Whether a process runs; one that only waits for its parent to look does not.
fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

/// Locks `file` without waiting; false if another open file has it.
fn try_acquire(file: &File, shared: bool) -> io::Result<bool> {
    let operation = libc::LOCK_NB | if shared { libc::LOCK_SH } else { libc::LOCK_EX };
    loop {
        // SAFETY: `file` is an open descriptor, and flock takes no pointers.
        if unsafe { libc::flock(file.as_raw_fd(), operation) } == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => return Ok(false),
            _ => return Err(error),
        }
    }
}

/// The process that locked the file with these numbers, where the host tells.
fn holder(device: u64, inode: u64) -> Option<u32> {
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let file = format!("{:02x}:{:02x}:{inode}", libc::major(device), libc::minor(device));
    locks.lines().find_map(|line| parse(line, &file))
}

/// `1: FLOCK  ADVISORY  WRITE 4242 fe:00:131 0 EOF`; lines of waiters have a `->` in front of the kind.
fn parse(line: &str, file: &str) -> Option<u32> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    match fields.as_slice() {
        [_, "FLOCK", _, _, pid, at, ..] if *at == file => pid.parse().ok().filter(|pid| *pid > 0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn holder_is_read_from_flock_lines_only() {
        assert_eq!(parse("1: FLOCK  ADVISORY  WRITE 4242 fe:00:131 0 EOF", "fe:00:131"), Some(4242));
        assert_eq!(parse("1: FLOCK  ADVISORY  WRITE 4242 fe:00:131 0 EOF", "fe:00:13"), None);
        assert_eq!(parse("2: OFDLCK ADVISORY  WRITE -1 fe:00:131 0 EOF", "fe:00:131"), None);
        assert_eq!(parse("2: -> FLOCK ADVISORY  WRITE 7 fe:00:131 0 EOF", "fe:00:131"), None);
        assert_eq!(parse("3: FLOCK  ADVISORY  WRITE 0 fe:00:131 0 EOF", "fe:00:131"), None);
        assert_eq!(parse("", "fe:00:131"), None);
    }
}
