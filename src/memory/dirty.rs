//! Which pages of guest memory the monitor has written to, where somebody wants to know.
//!
//! KVM tells what the guest writes. What devices and rvmm's own emulation write, it does not see, so they say it here. One
//! machine of a process is followed; without one, a mark costs a look at a pointer.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{PAGE_SIZE, Ram};

static LOG: OnceLock<Log> = OnceLock::new();

/// A bit for each page of each region.
struct Log {
    regions: Vec<Region>,
}

struct Region {
    start: u64,
    words: Vec<AtomicU64>,
}

impl Log {
    fn new(ram: &Ram) -> Log {
        let region = |region: &vm_memory::GuestRegionMmap| {
            let pages = region.len().div_ceil(PAGE_SIZE);
            let words = (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
            Region { start: region.start_addr().0, words }
        };
        Log { regions: ram.iter().map(region).collect() }
    }

    fn mark(&self, addr: u64, len: u64) {
        let Some(last) = len.checked_sub(1).and_then(|more| addr.checked_add(more)) else { return };
        for page in addr / PAGE_SIZE..=last / PAGE_SIZE {
            // Regions are sorted: the last one that begins before the page.
            let at = self.regions.partition_point(|region| region.start / PAGE_SIZE <= page);
            let Some(region) = at.checked_sub(1).and_then(|at| self.regions.get(at)) else { return };
            let page = page - region.start / PAGE_SIZE;
            let word = usize::try_from(page / 64).ok().and_then(|word| region.words.get(word));
            let Some(word) = word else { return };
            word.fetch_or(1 << (page % 64), Ordering::Relaxed);
        }
    }

    fn take(&self) -> Vec<Vec<u64>> {
        let words =
            |region: &Region| region.words.iter().map(|word| word.swap(0, Ordering::Relaxed)).collect();
        self.regions.iter().map(words).collect()
    }
}

/// Follows the memory of a machine from here on. The first one that is named in a process is meant.
pub fn start(ram: &Ram) {
    let _ = LOG.set(Log::new(ram));
}

/// Notes that `len` bytes of guest memory at `addr` are written, or about to be.
pub fn mark(addr: u64, len: u64) {
    if let Some(log) = LOG.get() {
        log.mark(addr, len);
    }
}

/// The pages that were marked since the last call, a bit each, by region; nothing if no machine is followed.
pub fn take() -> Vec<Vec<u64>> {
    LOG.get().map(Log::take).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::allocate;

    #[test]
    fn pages_are_marked_once_and_taken_once() {
        let log = Log::new(&allocate((3 << 30) + (2 << 20)).unwrap());
        log.mark(0xfff, 2);
        log.mark(5 * PAGE_SIZE, 0);
        log.mark(64 * PAGE_SIZE, 1);
        log.mark((4 << 30) + PAGE_SIZE, PAGE_SIZE);
        // Where there is no memory.
        log.mark(u64::MAX, 7);
        log.mark(u64::MAX - 5, 3);
        log.mark((3 << 30) + (1 << 20), 9);
        let [low, high] = log.take().try_into().unwrap();
        assert_eq!((low[0], low[1], low.iter().filter(|word| **word != 0).count()), (0b11, 1, 2));
        assert_eq!((high[0], high.iter().filter(|word| **word != 0).count()), (0b10, 1));
        assert!(log.take().concat().iter().all(|word| *word == 0));
    }
}
