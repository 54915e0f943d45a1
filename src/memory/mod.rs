//! Guest memory: allocation around the MMIO hole, and private file mappings inside it.
//!
//! Nothing in rvmm holds a Rust reference to guest memory: bytes are copied in and out through `vm-memory`, or the
//! host kernel is given raw iovecs.
#![allow(unsafe_code)]

pub mod changes;
pub mod dirty;
pub mod file;
pub mod guard;
pub mod own;

mod release;

pub use release::give_back;

use std::fs::File;
use std::os::fd::AsRawFd;

use vm_memory::mmap::{FromRangesError, MmapRegionError};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use crate::platform::{MMIO_HOLE_END, MMIO_HOLE_START};

/// Guest memory as every module sees it; cloning shares the mapping.
pub type Ram = vm_memory::GuestMemoryMmap<()>;

/// Page size of guest and host, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Size of the host's huge pages, in bytes.
pub const HUGE_PAGE_SIZE: usize = 2 << 20;

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
///
/// Guest physical and host virtual addresses agree modulo [`HUGE_PAGE_SIZE`], so that KVM can map huge pages.
pub fn allocate(size_bytes: u64) -> Result<Ram, Error> {
    let fail = |source| Error::Map { size_bytes, source };
    let regions = ranges(size_bytes).into_iter().map(|(addr, len)| {
        let mapping = map_aligned(len).map_err(|source| fail(FromRangesError::MmapRegion(source)))?;
        GuestRegionMmap::new(mapping, addr).ok_or(fail(FromRangesError::InvalidGuestRegion))
    });
    Ram::from_regions(regions.collect::<Result<_, _>>()?)
        .map_err(|source| fail(FromRangesError::Collection(source)))
}

/// Maps anonymous memory that starts at a multiple of [`HUGE_PAGE_SIZE`]. Linux mostly does that by itself since 6.7.
///
/// Where it does not, it puts mappings one below the other as long as they fit, so one of the right length in between
/// shifts the next one into place. Another thread's mapping or a gap may come between: all that did not fit stays
/// mapped until one does. Where no try helps the memory works all the same, with small pages.
fn map_aligned(len: usize) -> Result<MmapRegion, MmapRegionError> {
    const TRIES: usize = 64;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let mut mapping = MmapRegion::new(len)?;
    let mut in_the_way = vec![];
    for _ in 0..TRIES {
        let at = mapping.as_ptr() as usize;
        if len < HUGE_PAGE_SIZE || at.is_multiple_of(HUGE_PAGE_SIZE) {
            break;
        }
        in_the_way.push(mapping);
        let excess = at.wrapping_sub(len) % HUGE_PAGE_SIZE;
        if excess != 0 {
            let between = len.next_multiple_of(HUGE_PAGE_SIZE) + excess;
            in_the_way.push(MmapRegion::build(None, between, libc::PROT_NONE, flags)?);
        }
        mapping = MmapRegion::new(len)?;
    }
    Ok(mapping)
}

/// Asks the host for huge pages: KVM then maps 2 MiB at a time, and a guest's boot takes hundreds of page faults instead
/// of thousands.
pub fn prefer_huge_pages(ram: &Ram) {
    for region in ram.iter() {
        // SAFETY: the range is a mapping that `ram` owns; the advice changes no contents, and a host without huge
        // pages refuses it, which changes nothing either.
        unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, libc::MADV_HUGEPAGE) };
    }
}

/// Replaces `len` bytes of guest memory at `addr` by a private mapping of `source` from `offset` on, so that pages are
/// read when the guest touches them and writes stay in the guest.
///
/// All three numbers must be multiples of the page size, and the range must lie in one region. The file may be
/// shorter than `offset + len` later on: access to a page past its end then raises SIGBUS here and `EFAULT` in
/// `KVM_RUN`.
pub fn map_file_private(
    ram: &Ram,
    source: &File,
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
    // points into, so replacing its pages by another mapping of the same size cannot invalidate anything; `source` is
    // an open descriptor, and the mapping stays valid after it is closed.
    let mapped = unsafe {
        libc::mmap(
            host.cast(),
            len as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            source.as_raw_fd(),
            offset,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(Error::MapFile(std::io::Error::last_os_error()));
    }
    file::forget(host as usize, len as usize);
    release::file_mapped(host as usize, len as usize);
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn huge_pages_fit_guest_memory() {
        // Several at once, so that wherever the host puts them, each must be aligned by itself.
        let kept: Vec<Ram> =
            [16 << 20, (64 << 20) + 4096, 5 << 30, 128 << 20].map(|size| allocate(size).unwrap()).into();
        for region in kept.iter().flat_map(|ram| ram.iter()) {
            let (guest, host) = (region.start_addr().0 as usize, region.as_ptr() as usize);
            assert_eq!(guest % HUGE_PAGE_SIZE, host % HUGE_PAGE_SIZE, "{guest:#x} at {host:#x}");
        }
        // Gaps of many sizes, some of which are too small for what is put between.
        let gaps: Vec<_> =
            (1..40_usize).map(|i| MmapRegion::<()>::new((4 << 20) + i * 4096 * 37).unwrap()).collect();
        let mut pieces: Vec<_> = gaps.into_iter().step_by(2).collect();
        for size in [(4 << 20) + 4096, 4 << 20, (2 << 20) + 8192, 5 << 20] {
            let mapping = map_aligned(size).unwrap();
            assert_eq!(mapping.as_ptr() as usize % HUGE_PAGE_SIZE, 0, "{size:#x}");
            pieces.push(mapping);
        }
        let small = kept.first().unwrap();
        prefer_huge_pages(small);
        small.write_slice(&[7], GuestAddress(16 << 19)).unwrap();
        assert_eq!(small.read_obj::<u8>(GuestAddress(16 << 19)).unwrap(), 7);
    }
}
