//! Guest memory by linear address: first every page is checked, then bytes move.
#![allow(unsafe_code)]

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::Event;
use super::walk::{Access, Miss, Paging};
use crate::memory::{PAGE_SIZE, Ram, dirty};

/// Most pages that one access may touch: a save area of 4096 bytes that is not page aligned touches two.
const MAX_PAGES: usize = 3;

/// Why an access cannot be made.
#[derive(Debug)]
pub enum Failure {
    /// The guest gets an exception.
    Event(Event),
    /// A table or the page lies where the guest has no memory.
    NotMemory(u64),
    /// Page tables of a kind that is not supported.
    UnsupportedMode,
}

/// A checked range of linear addresses.
pub struct Range {
    pages: [u64; MAX_PAGES],
    offset_in_page: usize,
    len: usize,
}

impl Range {
    /// Physical address and length of the part of `at..at + len` that starts at `at` and lies in one page.
    fn part(&self, at: usize, len: usize) -> Option<(GuestAddress, usize)> {
        if at.checked_add(len)? > self.len {
            return None;
        }
        let position = self.offset_in_page + at;
        let page = *self.pages.get(position / PAGE_SIZE as usize)?;
        let in_page = position % PAGE_SIZE as usize;
        Some((GuestAddress(page + in_page as u64), len.min(PAGE_SIZE as usize - in_page)))
    }

    /// Copies bytes from offset `at` of the range.
    pub fn read(&self, ram: &Ram, at: usize, data: &mut [u8]) -> Result<(), Failure> {
        let mut done = 0;
        while done < data.len() {
            let (address, len) = self.part(at + done, data.len() - done).ok_or(Failure::NotMemory(0))?;
            let part = data.get_mut(done..done + len).ok_or(Failure::NotMemory(0))?;
            ram.read_slice(part, address).map_err(|_| Failure::NotMemory(address.0))?;
            done += len;
        }
        Ok(())
    }

    /// Copies bytes to offset `at` of the range.
    pub fn write(&self, ram: &Ram, at: usize, data: &[u8]) -> Result<(), Failure> {
        let mut done = 0;
        while done < data.len() {
            let (address, len) = self.part(at + done, data.len() - done).ok_or(Failure::NotMemory(0))?;
            let part = data.get(done..done + len).ok_or(Failure::NotMemory(0))?;
            dirty::mark(address.0, len as u64);
            ram.write_slice(part, address).map_err(|_| Failure::NotMemory(address.0))?;
            done += len;
        }
        Ok(())
    }

    /// Replaces the 16 bytes of the range by `new` if they are `expected`, atomically; gives what they were.
    /// `None` if this processor has no instruction for it.
    pub fn compare_exchange_16(&self, ram: &Ram, expected: u128, new: u128) -> Result<Option<u128>, Failure> {
        let (address, len) = self.part(0, 16).ok_or(Failure::NotMemory(0))?;
        dirty::mark(address.0, 16);
        let slice = ram.get_slice(address, len).map_err(|_| Failure::NotMemory(address.0))?;
        let guard = slice.ptr_guard_mut();
        let host = guard.as_ptr();
        if len != 16 || !host.addr().is_multiple_of(16) {
            return Err(Failure::NotMemory(address.0));
        }
        if !std::arch::is_x86_feature_detected!("cmpxchg16b") {
            return Ok(None);
        }
        let (mut low, mut high) = (expected as u64, (expected >> 64) as u64);
        // SAFETY: `host` points to 16 bytes of one mapping that `ram` keeps, aligned to 16, and is only used as a
        // raw pointer, so no Rust reference to guest memory exists; the feature was detected above; RBX, which the
        // compiler keeps for itself, is put back.
        unsafe {
            std::arch::asm!(
                "xchg rbx, {new_low}",
                "lock cmpxchg16b [{host}]",
                "mov rbx, {new_low}",
                host = in(reg) host,
                new_low = inout(reg) new as u64 => _,
                in("rcx") (new >> 64) as u64,
                inout("rax") low,
                inout("rdx") high,
                options(nostack),
            );
        }
        Ok(Some(u128::from(high) << 64 | u128::from(low)))
    }
}

/// Checks an access of `len` bytes at a linear address. `stack` says that the operand is on the stack segment.
pub fn check(
    paging: &Paging,
    ram: &Ram,
    address: u64,
    len: usize,
    access: Access,
    stack: bool,
) -> Result<Range, Failure> {
    let not_canonical = || Failure::Event(Event::with_code(if stack { 12 } else { 13 }, 0));
    let last = address.checked_add((len.max(1) - 1) as u64).ok_or_else(not_canonical)?;
    if !paging.is_canonical(address) || !paging.is_canonical(last) {
        return Err(not_canonical());
    }
    let mut range = Range { pages: [0; MAX_PAGES], offset_in_page: (address % PAGE_SIZE) as usize, len };
    let first_page = address & !(PAGE_SIZE - 1);
    let count = (last / PAGE_SIZE - address / PAGE_SIZE) as usize + 1;
    if count > MAX_PAGES {
        return Err(Failure::UnsupportedMode);
    }
    for (page, index) in range.pages.iter_mut().take(count).zip(0_u64..) {
        // The faulting address is the first byte that is touched on the page.
        let touched = if index == 0 { address } else { first_page + index * PAGE_SIZE };
        let physical = paging.translate(ram, touched, access).map_err(|miss| match miss {
            Miss::Fault(code) => Failure::Event(Event::page_fault(code, touched)),
            Miss::NotMemory(physical) => Failure::NotMemory(physical),
            Miss::UnsupportedMode => Failure::UnsupportedMode,
        })?;
        *page = physical & !(PAGE_SIZE - 1);
        if !ram.address_in_range(GuestAddress(*page)) {
            return Err(Failure::NotMemory(physical));
        }
    }
    Ok(range)
}
