//! Pages that the guest gives back to the host.
//!
//! Most guest memory is private and anonymous: `MADV_DONTNEED` frees its pages, and zeroes come when the guest touches
//! them again. Where a file is mapped (the kernel, the initial RAM disk) the same call would bring the file's contents
//! back, and a guest that zeroes its pages when it frees them takes them for zero when it uses them again. There the
//! mapping is replaced by an anonymous one. A page that cannot be given back keeps its contents, which is always right.
#![allow(unsafe_code)]

use std::io;
use std::sync::{Mutex, PoisonError};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{PAGE_SIZE, Ram};

/// Pieces into which a guest may cut the mappings of files: the host kernel allows a process some 65,000.
const MAX_PIECES: usize = 4096;

/// Where files are mapped into guest memory: host addresses, sorted and disjoint. An entry may outlive its mapping,
/// which does no harm, since an anonymous page may be replaced as well.
static FILE_MAPPED: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

/// Notes that a file was mapped at `start..start + len`.
pub(super) fn file_mapped(start: usize, len: usize) {
    let mut pieces = FILE_MAPPED.lock().unwrap_or_else(PoisonError::into_inner);
    let end = start.saturating_add(len);
    cut(&mut pieces, start, end);
    let at = pieces.partition_point(|piece| piece.0 < start);
    pieces.insert(at, (start, end));
}

/// Whether a file may be mapped anywhere in `start..end`.
pub(super) fn is_file_mapped(start: usize, end: usize) -> bool {
    let pieces = FILE_MAPPED.lock().unwrap_or_else(PoisonError::into_inner);
    pieces.get(pieces.partition_point(|piece| piece.1 <= start)).is_some_and(|piece| piece.0 < end)
}

/// Takes a range out of all pieces.
fn cut(pieces: &mut Vec<(usize, usize)>, start: usize, end: usize) {
    let first = pieces.partition_point(|piece| piece.1 <= start);
    let last = pieces.partition_point(|piece| piece.0 < end).max(first);
    let before = pieces.get(first).map(|piece| (piece.0, start)).filter(|piece| piece.0 < piece.1);
    let after =
        pieces.get(last.wrapping_sub(1)).map(|piece| (end, piece.1)).filter(|piece| piece.0 < piece.1);
    if first < last {
        pieces.splice(first..last, before.into_iter().chain(after));
    }
}

/// Frees the host's memory behind those pages of guest memory that lie wholly in `len` bytes at `addr`. They read as
/// zeroes afterwards, unless the host could not free them. Returns how many bytes were freed.
pub fn give_back(ram: &Ram, addr: GuestAddress, len: u64) -> io::Result<u64> {
    let mut pieces = FILE_MAPPED.lock().unwrap_or_else(PoisonError::into_inner);
    give_back_from(&mut pieces, ram, addr, len)
}

fn give_back_from(
    pieces: &mut Vec<(usize, usize)>,
    ram: &Ram,
    addr: GuestAddress,
    len: u64,
) -> io::Result<u64> {
    let first = addr.0.checked_next_multiple_of(PAGE_SIZE).unwrap_or(u64::MAX);
    let last = addr.0.saturating_add(len) / PAGE_SIZE * PAGE_SIZE;
    let mut freed = 0;
    for region in ram.iter() {
        let base = region.start_addr().0;
        let (start, end) = (first.max(base), last.min(base.saturating_add(region.len())));
        if start < end {
            let host = region.as_ptr() as usize + (start - base) as usize;
            super::dirty::mark(start, end - start);
            // SAFETY: the range lies in one region of `ram` (cut to it above), which keeps it mapped, and consists of
            // whole pages, since regions start and end at page boundaries. No Rust reference points into it.
            unsafe { free(pieces, host, host + (end - start) as usize) }?;
            freed += end - start;
        }
    }
    Ok(freed)
}

/// Frees host memory.
///
/// # Safety
///
/// `start..end` are whole pages of mapped guest memory, to which there are no Rust references.
unsafe fn free(pieces: &mut Vec<(usize, usize)>, start: usize, end: usize) -> io::Result<()> {
    let mut at = start;
    while at < end {
        let next = pieces.get(pieces.partition_point(|piece| piece.1 <= at)).copied();
        let (stop, of_file) = match next {
            Some((from, to)) if from <= at => (to.min(end), true),
            Some((from, _)) => (from.min(end), false),
            None => (end, false),
        };
        if of_file {
            if pieces.len() >= MAX_PIECES {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            // SAFETY: part of the caller's range.
            unsafe { replace(at, stop) }?;
            cut(pieces, at, stop);
        } else {
            // SAFETY: part of the caller's range, and private anonymous memory: its pages may go at any time.
            let result = unsafe { libc::madvise(at as *mut libc::c_void, stop - at, libc::MADV_DONTNEED) };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        at = stop;
    }
    Ok(())
}

/// Puts anonymous memory in place of what is mapped there.
///
/// # Safety
///
/// As for [`free`].
unsafe fn replace(start: usize, end: usize) -> io::Result<()> {
    // SAFETY: the caller's promise; the new mapping has the size and the rights of the old one.
    let mapped = unsafe {
        libc::mmap(
            start as *mut libc::c_void,
            end - start,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::Bytes;

    use super::*;
    use crate::memory::{allocate, map_file_private};

    const PAGE: u64 = PAGE_SIZE;

    fn byte(ram: &Ram, page: u64) -> u8 {
        ram.read_obj(GuestAddress(page * PAGE)).unwrap()
    }

    #[test]
    fn ranges_are_cut() {
        let cases = [
            (0, 5, vec![(10, 20), (30, 40)]),
            (0, 15, vec![(15, 20), (30, 40)]),
            (12, 14, vec![(10, 12), (14, 20), (30, 40)]),
            (10, 20, vec![(30, 40)]),
            (15, 35, vec![(10, 15), (35, 40)]),
            (20, 30, vec![(10, 20), (30, 40)]),
            (0, 50, vec![]),
        ];
        for (start, end, left) in cases {
            let mut pieces = vec![(10, 20), (30, 40)];
            cut(&mut pieces, start, end);
            assert_eq!(pieces, left, "{start}..{end}");
        }
    }

    #[test]
    fn only_whole_pages_in_the_range_are_freed() {
        let ram = allocate(16 << 20).unwrap();
        for page in 0..8 {
            ram.write_slice(&[7; 4096], GuestAddress(page * PAGE)).unwrap();
        }
        assert_eq!(give_back(&ram, GuestAddress(PAGE - 1), 3 * PAGE).unwrap(), 2 * PAGE);
        assert_eq!([0, 1, 2, 3].map(|page| byte(&ram, page)), [7, 0, 0, 7]);
        assert_eq!(give_back(&ram, GuestAddress(5 * PAGE + 1), PAGE).unwrap(), 0);
        assert_eq!(give_back(&ram, GuestAddress(6 * PAGE), PAGE - 1).unwrap(), 0);
        assert_eq!([5, 6, 7].map(|page| byte(&ram, page)), [7, 7, 7]);
        // Outside, across the end, and with numbers that overflow.
        assert_eq!(give_back(&ram, GuestAddress(1 << 40), PAGE).unwrap(), 0);
        assert_eq!(give_back(&ram, GuestAddress((16 << 20) - PAGE), u64::MAX).unwrap(), PAGE);
        assert_eq!(give_back(&ram, GuestAddress(u64::MAX - 1), u64::MAX).unwrap(), 0);
    }

    #[test]
    fn pages_of_a_file_come_back_as_zeroes_and_their_neighbours_stay() {
        let ram = allocate(16 << 20).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[9; 8 * 4096]).unwrap();
        map_file_private(&ram, &file, 0, GuestAddress(4 * PAGE), 8 * PAGE).unwrap();
        ram.write_slice(&[5; 4096], GuestAddress(3 * PAGE)).unwrap();
        ram.write_slice(&[6; 4096], GuestAddress(7 * PAGE)).unwrap();
        assert_eq!(give_back(&ram, GuestAddress(3 * PAGE), 2 * PAGE).unwrap(), 2 * PAGE);
        assert_eq!(give_back(&ram, GuestAddress(6 * PAGE), PAGE).unwrap(), PAGE);
        assert_eq!([3, 4, 5, 6, 7, 8].map(|page| byte(&ram, page)), [0, 0, 9, 0, 6, 9]);
        // What was of a file is so no more, and can be given back again.
        ram.write_slice(&[8; 4096], GuestAddress(4 * PAGE)).unwrap();
        assert_eq!(give_back(&ram, GuestAddress(0), 16 << 20).unwrap(), 16 << 20);
        assert!((0..4096).all(|page| byte(&ram, page) == 0));
    }

    #[test]
    fn guest_cannot_use_up_the_mappings_of_the_process() {
        let ram = allocate(64 << 20).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(48 << 20).unwrap();
        map_file_private(&ram, &file, 0, GuestAddress(0), 48 << 20).unwrap();
        ram.write_slice(&[7; 4096], GuestAddress((47 << 20) + PAGE)).unwrap();
        // A list of this test's own, since others run beside it.
        let host = ram.get_host_address(GuestAddress(0)).unwrap() as usize;
        let mut pieces = vec![(host, host + (48 << 20))];
        let mut give = |page: u64| give_back_from(&mut pieces, &ram, GuestAddress(page * PAGE), PAGE);
        let refused = (0..12288 / 2).filter(|n| give(n * 2).is_err()).count();
        assert!(refused > 0, "no limit");
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
        assert!(maps < 3 * MAX_PIECES, "{maps} mappings");
        assert_eq!(byte(&ram, (47 << 8) + 1), 7);
    }
}
