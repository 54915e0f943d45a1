//! How large a layer may be, so that a small file cannot fill the disk or the memory.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

/// What a layer may have at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the unpacked stream, and bytes of its files, holes included.
    pub bytes: u64,
    /// Entries.
    pub entries: u64,
    /// Unpacked bytes for each compressed one, once there are more than [`Limits::RATIO_FROM`].
    pub ratio: u64,
}

impl Limits {
    /// Small layers may be compressed as well as they can be.
    pub const RATIO_FROM: u64 = 1 << 30;
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 64 << 30, entries: 4_000_000, ratio: 500 }
    }
}

/// Counts what is read, for others to look at.
pub(super) struct Counted<R> {
    pub(super) inner: R,
    pub(super) count: Rc<Cell<u64>>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.count.set(self.count.get().saturating_add(count as u64));
        Ok(count)
    }
}

/// Stops a stream that unpacks to too much.
pub(super) struct Limited<R> {
    pub(super) inner: R,
    pub(super) limits: Limits,
    pub(super) unpacked: u64,
    pub(super) compressed: Rc<Cell<u64>>,
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.unpacked = self.unpacked.saturating_add(count as u64);
        let Limits { bytes, ratio, .. } = self.limits;
        if self.unpacked > bytes {
            return Err(io::Error::other(format!("it unpacks to more than {bytes} bytes")));
        }
        let fair = self.compressed.get().saturating_mul(ratio).max(Limits::RATIO_FROM);
        if self.unpacked > fair {
            return Err(io::Error::other(format!("it unpacks to more than {ratio} times its size")));
        }
        Ok(count)
    }
}
