//! What happens when a file that is mapped into guest memory loses pages while the VM runs.
//!
//! The kernel and the initial RAM disk are mapped from their files. If somebody truncates such a file, a page that
//! was not touched before is gone: the guest's access makes `KVM_RUN` fail with `EFAULT`, but an access of the monitor
//! itself, say to a virtqueue that a hostile guest has put there, raises SIGBUS. The handler puts a page of zeroes in
//! its place, so that the monitor goes on and can end the VM in good order.
#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{PAGE_SIZE, Ram};

/// Regions of guest memory at most: below and above the MMIO hole.
const MAX_REGIONS: usize = 2;

struct Range {
    start: AtomicUsize,
    end: AtomicUsize,
}

static RANGES: [Range; MAX_REGIONS] =
    [const { Range { start: AtomicUsize::new(0), end: AtomicUsize::new(0) } }; MAX_REGIONS];
static PAGES_LOST: AtomicBool = AtomicBool::new(false);

/// Guards the whole of `ram`, which must stay mapped until the process ends, or another call replaces it.
pub fn install(ram: &Ram) -> io::Result<()> {
    let regions = ram.iter().map(|region| (region.as_ptr() as usize, region.len() as usize));
    for (range, (start, len)) in RANGES.iter().zip(regions.chain(std::iter::repeat((0, 0)))) {
        range.start.store(start, Ordering::Relaxed);
        range.end.store(start + len, Ordering::Release);
    }
    // SAFETY: an all-zero `sigaction` is a valid value; the handler has the type that SA_SIGINFO asks for, and calls
    // only async-signal-safe functions.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether pages of a mapped file were found missing.
pub fn pages_were_lost() -> bool {
    PAGES_LOST.load(Ordering::Acquire)
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid structure, which for SIGBUS holds an address.
    let addr = unsafe { (*info).si_addr() } as usize;
    let guarded = RANGES.iter().any(|range| {
        let end = range.end.load(Ordering::Acquire);
        (range.start.load(Ordering::Relaxed)..end).contains(&addr)
    });
    if guarded && replace_page(addr) {
        PAGES_LOST.store(true, Ordering::Release);
        return;
    }
    crate::terminal::restore();
    // SAFETY: both calls are async-signal-safe; with the default action back, the signal ends the process.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

/// Maps a page of zeroes over the one that holds `addr`, which lies in guarded guest memory.
fn replace_page(addr: usize) -> bool {
    let page = addr & !(PAGE_SIZE as usize - 1);
    // SAFETY: the page belongs to guest memory, to which nothing holds a Rust reference; `mmap` is a plain system
    // call here, safe in a signal handler.
    let mapped = unsafe {
        libc::mmap(
            page as *mut libc::c_void,
            PAGE_SIZE as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    mapped != libc::MAP_FAILED
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn truncated_file_reads_as_zeroes_instead_of_killing_the_process() {
        let ram = super::super::allocate(super::super::MIN_SIZE).unwrap();
        install(&ram).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 8192]).unwrap();
        super::super::map_file_private(&ram, &file, 0, GuestAddress(0x10_0000), 8192).unwrap();
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0x10_0000)).unwrap(), 7);
        file.set_len(4096).unwrap();
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0x10_1000)).unwrap(), 0);
        assert!(pages_were_lost());
        ram.write_obj(9u8, GuestAddress(0x10_1000)).unwrap();
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0x10_1000)).unwrap(), 9);
    }
}
