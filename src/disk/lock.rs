//! The lock on an image: one writer, or any number of readers.
//!
//! `flock` rather than OFD locks, since `/proc/locks` names the process that took it.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;

/// Locks `file` without waiting; false if another open file has it.
pub(super) fn acquire(file: &File, shared: bool) -> io::Result<bool> {
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
pub(super) fn holder(device: u64, inode: u64) -> Option<u32> {
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
