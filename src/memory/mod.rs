//! Guest memory: allocation around the MMIO hole, and private file mappings inside it.
//!
//! Nothing in rvmm holds a Rust reference to guest memory: bytes are copied in and out through `vm-memory`, or the
//! host kernel is given raw iovecs.
#![allow(unsafe_code)]

pub mod guard;
pub mod heap;
mod release;

pub use release::give_back;

use std::fs::File;
use std::os::fd::AsRawFd;

use vm_memory::mmap::{FromRangesError, MmapRegionError};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::platform::{MMIO_HOLE_END, MMIO_HOLE_START};

/// Guest memory as every module sees it; cloning shares the mapping.
pub type Ram = vm_memory::GuestMemoryMmap<()>;

/// Page size of guest and host, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Smallest guest memory that rvmm accepts, in bytes.
pub const MIN_SIZE: u64 = 16 << 20;

/// Why guest memory could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused the mapping.
    #[error("cannot map {size_bytes} bytes of guest memory")]
    Map {
        /// Size asked for.
        size_bytes: u64,
        /// What the host said.
        #[source]
        source: FromRangesError,
    },
    /// The range is not page aligned or lies outside a single memory region.
    #[error("guest range {addr:#x}+{len:#x} cannot hold a file mapping")]
    BadRange {
        /// Guest physical address.
        addr: u64,
        /// Length in bytes.
        len: u64,
    },
    /// `mmap` of a file into guest memory failed.
    #[error("cannot map a file into guest memory")]
    MapFile(#[source] std::io::Error),
    /// A region could not be built.
    #[error("cannot build a memory region")]
    Region(#[source] MmapRegionError),
}

/// The guest physical ranges that `size_bytes` of memory occupy: below the MMIO hole, then above it.
pub fn ranges(size_bytes: u64) -> Vec<(GuestAddress, usize)> {
    let low = size_bytes.min(MMIO_HOLE_START);
    let high = size_bytes - low;
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if high > 0 {
        ranges.push((GuestAddress(MMIO_HOLE_END), high as usize));
    }
    ranges
}

/// Maps anonymous, private, not reserved memory of `size_bytes` (a multiple of the page size) for a guest.
pub fn allocate(size_bytes: u64) -> Result<Ram, Error> {
    Ram::from_ranges(&ranges(size_bytes)).map_err(|source| Error::Map { size_bytes, source })
}

/// Replaces `len` bytes of guest memory at `addr` by a private mapping of `file` from `offset` on, so that pages are
/// read when the guest touches them and writes stay in the guest.
///
/// All three numbers must be multiples of the page size, and the range must lie in one region. The file may be
/// shorter than `offset + len` later on: access to a page past its end then raises SIGBUS here and `EFAULT` in
/// `KVM_RUN`.
pub fn map_file_private(
    ram: &Ram,
    file: &File,
    offset: u64,
    addr: GuestAddress,
    len: u64,
) -> Result<(), Error> {
    let bad = || Error::BadRange { addr: addr.0, len };
    if len == 0 || [offset, addr.0, len].iter().any(|n| n % PAGE_SIZE != 0) {
        return Err(bad());
    }
    let region = ram.find_region(addr).ok_or_else(bad)?;
    let in_region = addr.0 - region.start_addr().0;
    if in_region.checked_add(len).is_none_or(|end| end > region.len()) {
        return Err(bad());
    }
    let host = ram.get_host_address(addr).map_err(|_| bad())?;
    let offset = libc::off_t::try_from(offset).map_err(|_| bad())?;
    // SAFETY: `host..host + len` lies inside one mapping that `ram` owns (checked above) and that no Rust reference
    // points into, so replacing its pages by another mapping of the same size cannot invalidate anything; `file` is
    // an open descriptor, and the mapping stays valid after it is closed.
    let mapped = unsafe {
        libc::mmap(
            host.cast(),
            len as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            offset,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(Error::MapFile(std::io::Error::last_os_error()));
    }
    release::file_mapped(host as usize, len as usize);
    Ok(())
}
