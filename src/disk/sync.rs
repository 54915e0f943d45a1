//! Tasks carried out by system calls that wait.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;

use super::task::{Call, Next, Task};

/// Carries out the whole of `task` on an image with these descriptors.
pub(super) fn run(fds: &[RawFd], task: &mut Task) -> io::Result<()> {
    loop {
        if let Next::Done(result) = task.finished(call(fds, task.call())) {
            return result;
        }
    }
}

/// Makes one system call; the result is the number of bytes that were transferred.
pub(super) fn call(fds: &[RawFd], call: Call) -> io::Result<usize> {
    let file = if let Call::Read { file, .. } = call { file } else { 0 };
    let fd = *fds.get(file as usize).ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: the pointers and counts describe iovecs of a task that the caller borrows for the length of the call,
    // and the memory that they name stays mapped and unreferenced as `Buffers::push` demands; the other calls take
    // plain numbers or a pointer to a local array.
    let result = unsafe {
        match call {
            Call::Read { iovecs, count, offset, .. } => {
                libc::preadv(fd, iovecs, count as i32, signed(offset)?)
            }
            Call::Write { iovecs, count, offset, durable: false } => {
                libc::pwritev(fd, iovecs, count as i32, signed(offset)?)
            }
            Call::Write { iovecs, count, offset, durable: true } => {
                libc::pwritev2(fd, iovecs, count as i32, signed(offset)?, libc::RWF_DSYNC)
            }
            Call::Sync => libc::fdatasync(fd) as isize,
            Call::Allocate { mode, offset, len } => {
                libc::fallocate(fd, mode, signed(offset)?, signed(len)?) as isize
            }
            Call::DiscardBlocks { offset, len } => {
                let range = [offset, len];
                libc::ioctl(fd, BLKDISCARD, range.as_ptr()) as isize
            }
        }
    };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// `_IO(0x12, 119)` and `_IOR(0x12, 114, size_t)` of `linux/fs.h`.
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;

fn signed(number: u64) -> io::Result<i64> {
    i64::try_from(number).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// The size of a block device.
pub(super) fn block_device_size(fd: RawFd) -> io::Result<u64> {
    let mut bytes = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64 to the pointer that it is given.
    match unsafe { libc::ioctl(fd, BLKGETSIZE64, &raw mut bytes) } {
        0 => Ok(bytes),
        _ => Err(io::Error::last_os_error()),
    }
}
