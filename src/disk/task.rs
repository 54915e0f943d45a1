//! One operation on an image as a sequence of system calls, apart from how they are made.
//!
//! Both engines ask a [`Task`] for its next [`Call`] and tell it what came of it, so that short transfers,
//! interruptions and fallbacks are written once.
#![allow(unsafe_code)]

use std::io;
use std::sync::Arc;

use super::composed::{Layout, Piece};

/// What to do with an image. Offsets and lengths are bytes inside the image.
#[derive(Debug)]
pub enum Operation {
    /// Fills the buffers from the image.
    Read {
        /// First byte.
        offset: u64,
        /// Where the bytes go.
        buffers: Buffers,
    },
    /// Writes the buffers to the image.
    Write {
        /// First byte.
        offset: u64,
        /// Where the bytes come from.
        buffers: Buffers,
    },
    /// Makes every write that has completed durable.
    Flush,
    /// Gives a range back to the host; it reads as anything afterwards.
    Discard {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Makes a range read as zeroes.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// The range may be given back to the host.
        unmap: bool,
    },
}

/// Host memory ranges that the host kernel reads or writes, in order.
#[derive(Debug, Default)]
pub struct Buffers {
    iovecs: Vec<libc::iovec>,
    /// The first range that is not done yet.
    start: usize,
    len: u64,
}

// SAFETY: the pointers are only ever passed to the host kernel, which takes them from any thread of the process.
unsafe impl Send for Buffers {}

impl Buffers {
    /// Adds `len` bytes at `base`.
    ///
    /// # Safety
    ///
    /// The range must stay mapped, and no Rust reference may point into it, until the operation that these buffers
    /// are given to has completed or its engine is dropped.
    pub unsafe fn push(&mut self, base: *mut u8, len: usize) {
        if len > 0 {
            self.iovecs.push(libc::iovec { iov_base: base.cast(), iov_len: len });
            self.len += len as u64;
        }
    }

    /// Bytes that are not done yet.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether all bytes are done.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What one system call may be given.
    fn window(&self) -> &[libc::iovec] {
        let rest = self.iovecs.get(self.start..).unwrap_or_default();
        &rest[..rest.len().min(libc::UIO_MAXIOV as usize)]
    }

    /// The first `limit` bytes of [`Self::window`], or as many as it has.
    fn first(&self, limit: u64) -> Vec<libc::iovec> {
        let mut rest = usize::try_from(limit).unwrap_or(usize::MAX);
        let mut first = Vec::new();
        for iovec in self.window() {
            if rest == 0 {
                break;
            }
            let part = libc::iovec { iov_len: iovec.iov_len.min(rest), ..*iovec };
            rest -= part.iov_len;
            first.push(part);
        }
        first
    }

    /// Takes `done` bytes off the front.
    fn advance(&mut self, mut done: usize) {
        self.len = self.len.saturating_sub(done as u64);
        while let Some(first) = self.iovecs.get_mut(self.start) {
            if done < first.iov_len {
                first.iov_base = first.iov_base.cast::<u8>().wrapping_add(done).cast();
                first.iov_len -= done;
                return;
            }
            done -= first.iov_len;
            self.start += 1;
        }
    }
}

/// A system call on the image's descriptor, or, for reads, on one of its descriptors. Pointers stay valid until the task is told the result or dropped.
#[derive(Clone, Copy, Debug)]
pub(super) enum Call {
    /// preadv
    Read { file: u32, iovecs: *const libc::iovec, count: u32, offset: u64 },
    /// pwritev2, with `RWF_DSYNC` if `durable`
    Write { iovecs: *const libc::iovec, count: u32, offset: u64, durable: bool },
    /// fdatasync
    Sync,
    /// fallocate
    Allocate { mode: i32, offset: u64, len: u64 },
    /// ioctl `BLKDISCARD`
    DiscardBlocks { offset: u64, len: u64 },
}

/// What a completed system call means for the task.
#[derive(Debug)]
pub(super) enum Next {
    /// Make the call that [`Task::call`] now gives.
    Continue,
    /// The operation is over.
    Done(io::Result<()>),
}

#[derive(Debug)]
enum Phase {
    Main,
    /// The host cannot zero a range, so zeroes are written.
    ZeroFill(Buffers),
    /// The range is changed and must be made durable.
    Sync,
}

/// An operation that is being carried out.
#[derive(Debug)]
pub(super) struct Task {
    operation: Operation,
    phase: Phase,
    /// A change is durable before the operation is over.
    durable: bool,
    target: Target,
    again: u8,
    /// The piece that is read from next, and what it fills of the buffers if that is not all of them.
    piece: Piece,
    part: Vec<libc::iovec>,
}

/// What is behind an image.
#[derive(Clone, Debug)]
pub(super) enum Target {
    /// A raw file.
    File,
    /// A block device.
    BlockDevice,
    /// Several files, which are only read.
    Composed(Arc<Layout>),
}

// SAFETY: as for `Buffers`, whose copies the iovecs in `part` are.
unsafe impl Send for Task {}

/// `EAGAIN` comes from old kernels that cannot start buffered I/O without waiting; asking again helps, or nothing does.
const MAX_AGAIN: u8 = 16;

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
/// Ranges of [`ZEROES`] per write: 1 MiB.
const ZERO_RANGES: usize = 16;

impl Task {
    pub(super) fn new(operation: Operation, durable: bool, target: Target) -> Self {
        let (phase, piece) = (Phase::Main, Piece::default());
        let mut task = Self { operation, phase, durable, target, again: 0, piece, part: Vec::new() };
        task.find_piece();
        task
    }

    /// Finds out which file of a composed image the next read goes to. A range outside of the image finds an empty
    /// piece, so that the host reads nothing and the operation fails.
    fn find_piece(&mut self) {
        let Operation::Read { offset, buffers } = &self.operation else { return };
        match &self.target {
            Target::Composed(layout) => {
                self.piece = layout.piece(*offset);
                let whole = self.piece.len >= buffers.len();
                self.part = if whole { Vec::new() } else { buffers.first(self.piece.len) };
            }
            Target::File | Target::BlockDevice => {
                self.piece = Piece { file: 0, offset: *offset, len: u64::MAX }
            }
        }
    }

    /// The system call to make next.
    pub(super) fn call(&self) -> Call {
        match (&self.phase, &self.operation) {
            (Phase::Sync, _) | (Phase::Main, Operation::Flush) => Call::Sync,
            (Phase::ZeroFill(buffers), Operation::WriteZeroes { offset, .. }) => {
                write_call(*offset, buffers, self.durable)
            }
            (_, Operation::Read { buffers, .. }) => {
                let Piece { file, offset, len } = self.piece;
                let window = if len >= buffers.len() { buffers.window() } else { self.part.as_slice() };
                Call::Read { file, iovecs: window.as_ptr(), count: window.len() as u32, offset }
            }
            (_, Operation::Write { offset, buffers }) => write_call(*offset, buffers, self.durable),
            (_, Operation::Discard { offset, len }) if matches!(self.target, Target::BlockDevice) => {
                Call::DiscardBlocks { offset: *offset, len: *len }
            }
            (_, Operation::Discard { offset, len }) => {
                Call::Allocate { mode: PUNCH, offset: *offset, len: *len }
            }
            (_, Operation::WriteZeroes { offset, len, unmap }) => {
                Call::Allocate { mode: if *unmap { PUNCH } else { ZERO }, offset: *offset, len: *len }
            }
            (_, Operation::Flush) => Call::Sync,
        }
    }

    /// Takes the result of the call that [`Self::call`] gave: bytes, or the error.
    pub(super) fn finished(&mut self, result: io::Result<usize>) -> Next {
        let done = match result {
            Ok(done) => done,
            Err(error) => return self.failed(error),
        };
        match (&mut self.phase, &mut self.operation) {
            (Phase::Sync, _) | (Phase::Main, Operation::Flush) => Next::Done(Ok(())),
            (Phase::ZeroFill(buffers), Operation::WriteZeroes { offset, len, .. }) => {
                *offset = offset.saturating_add(done as u64);
                *len = len.saturating_sub(done as u64);
                if done == 0 {
                    return Next::Done(Err(io::ErrorKind::WriteZero.into()));
                }
                if *len == 0 {
                    return Next::Done(Ok(()));
                }
                *buffers = zeroes(*len);
                Next::Continue
            }
            (_, Operation::Read { offset, buffers }) => {
                *offset = offset.saturating_add(done as u64);
                // The image became shorter than it was when it was opened.
                let next = transferred(buffers, done, io::ErrorKind::UnexpectedEof);
                if matches!(next, Next::Continue) {
                    self.find_piece();
                }
                next
            }
            (_, Operation::Write { offset, buffers }) => {
                *offset = offset.saturating_add(done as u64);
                transferred(buffers, done, io::ErrorKind::WriteZero)
            }
            _ if self.durable => {
                self.phase = Phase::Sync;
                Next::Continue
            }
            _ => Next::Done(Ok(())),
        }
    }

    fn failed(&mut self, error: io::Error) -> Next {
        match (error.raw_os_error(), &self.phase, &self.operation) {
            (Some(libc::EINTR), ..) => Next::Continue,
            (Some(libc::EAGAIN), ..) if self.again < MAX_AGAIN => {
                self.again += 1;
                Next::Continue
            }
            (Some(libc::EOPNOTSUPP | libc::ENOSYS), Phase::Main, Operation::WriteZeroes { len, .. }) => {
                self.phase = Phase::ZeroFill(zeroes(*len));
                Next::Continue
            }
            (
                Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY),
                Phase::Main,
                Operation::Discard { .. },
            ) => Next::Done(Err(io::ErrorKind::Unsupported.into())),
            _ => Next::Done(Err(error)),
        }
    }
}

fn write_call(offset: u64, buffers: &Buffers, durable: bool) -> Call {
    let window = buffers.window();
    Call::Write { iovecs: window.as_ptr(), count: window.len() as u32, offset, durable }
}

fn transferred(buffers: &mut Buffers, done: usize, nothing: io::ErrorKind) -> Next {
    if done == 0 && !buffers.is_empty() {
        return Next::Done(Err(nothing.into()));
    }
    buffers.advance(done);
    if buffers.is_empty() { Next::Done(Ok(())) } else { Next::Continue }
}

/// Buffers for the next write of at most `len` zeroes.
fn zeroes(len: u64) -> Buffers {
    let mut buffers = Buffers::default();
    let mut rest = len;
    for _ in 0..ZERO_RANGES {
        let part = rest.min(ZEROES.len() as u64);
        // SAFETY: `ZEROES` lives for ever and these buffers are only ever written from, never read into.
        unsafe { buffers.push(ZEROES.as_ptr().cast_mut(), part as usize) };
        rest -= part;
    }
    buffers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffers(lens: &[usize]) -> Buffers {
        let mut buffers = Buffers::default();
        for len in lens {
            // SAFETY: the buffers are never given to the kernel.
            unsafe { buffers.push(std::ptr::without_provenance_mut(0x1000), *len) };
        }
        buffers
    }

    fn error(errno: i32) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(errno))
    }

    #[test]
    fn short_read_continues_where_it_stopped() {
        let mut task =
            Task::new(Operation::Read { offset: 512, buffers: buffers(&[100, 0, 300]) }, false, Target::File);
        assert!(matches!(task.finished(Ok(150)), Next::Continue));
        let Call::Read { file: 0, iovecs, count: 1, offset: 662 } = task.call() else {
            panic!("{:?}", task.call())
        };
        // SAFETY: the pointer leads to the task's own iovec.
        let iovec = unsafe { *iovecs };
        assert_eq!((iovec.iov_base as usize, iovec.iov_len), (0x1032, 250));
        assert!(matches!(task.finished(error(libc::EINTR)), Next::Continue));
        assert!(matches!(task.finished(Ok(250)), Next::Done(Ok(()))));
    }

    #[test]
    fn end_of_file_is_an_error() {
        let mut task =
            Task::new(Operation::Read { offset: 0, buffers: buffers(&[100]) }, false, Target::File);
        assert!(matches!(task.finished(Ok(0)), Next::Done(Err(_))));
        let mut task =
            Task::new(Operation::Write { offset: 0, buffers: buffers(&[100]) }, false, Target::File);
        assert!(matches!(task.finished(error(libc::ENOSPC)), Next::Done(Err(_))));
    }

    #[test]
    fn many_ranges_are_split_at_the_hosts_limit() {
        let limit = libc::UIO_MAXIOV as usize;
        let mut task = Task::new(
            Operation::Write { offset: 0, buffers: buffers(&vec![1; limit + 3]) },
            false,
            Target::File,
        );
        assert!(matches!(task.call(), Call::Write { count, .. } if count as usize == limit));
        assert!(matches!(task.finished(Ok(limit)), Next::Continue));
        assert!(matches!(task.call(), Call::Write { count: 3, .. }));
        assert!(matches!(task.finished(Ok(3)), Next::Done(Ok(()))));
    }

    #[test]
    fn zeroes_are_written_where_the_host_cannot_zero() {
        let len = (3 << 20) + 512;
        let mut task =
            Task::new(Operation::WriteZeroes { offset: 512, len, unmap: true }, false, Target::File);
        assert!(matches!(task.call(), Call::Allocate { mode: PUNCH, offset: 512, .. }));
        assert!(matches!(task.finished(error(libc::EOPNOTSUPP)), Next::Continue));
        let (mut at, end) = (512, 512 + len as usize);
        loop {
            let Call::Write { offset, .. } = task.call() else { panic!("{:?}", task.call()) };
            assert_eq!(offset as usize, at);
            let done = (end - at).min(1 << 20);
            at += done;
            match task.finished(Ok(done)) {
                Next::Continue => assert!(at < end),
                Next::Done(result) => break result.unwrap(),
            }
        }
        assert_eq!(at, end);
    }

    #[test]
    fn durable_discard_ends_with_a_sync() {
        let mut task = Task::new(Operation::Discard { offset: 0, len: 512 }, true, Target::File);
        assert!(matches!(task.finished(Ok(0)), Next::Continue));
        assert!(matches!(task.call(), Call::Sync));
        assert!(matches!(task.finished(Ok(0)), Next::Done(Ok(()))));
    }

    #[test]
    fn again_is_asked_a_limited_number_of_times() {
        let mut task = Task::new(Operation::Flush, false, Target::File);
        let tries =
            (0..1000).take_while(|_| matches!(task.finished(error(libc::EAGAIN)), Next::Continue)).count();
        assert_eq!(tries, usize::from(MAX_AGAIN));
    }

    #[test]
    fn discard_that_the_host_lacks_is_unsupported() {
        let mut task = Task::new(Operation::Discard { offset: 0, len: 512 }, true, Target::File);
        let Next::Done(Err(error)) = task.finished(error(libc::EOPNOTSUPP)) else { panic!() };
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    }
}
