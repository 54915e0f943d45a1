//! The guest's page tables, walked as the processor walks them (Intel SDM volume 3, chapter 5).
//!
//! Protection keys are not looked at: an access that only a key forbids is allowed.

use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileMemory};

use crate::memory::{PAGE_SIZE, Ram, dirty};

const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMAP: u64 = 1 << 21;
const EFER_NXE: u64 = 1 << 11;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_AC: u64 = 1 << 18;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// Bits 51:12 of an entry: the address of the next table or of the page.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Bits of a page fault's error code (SDM volume 3, §5.7).
const CODE_PROTECTION: u32 = 1 << 0;
const CODE_WRITE: u32 = 1 << 1;
const CODE_USER: u32 = 1 << 2;
const CODE_RESERVED: u32 = 1 << 3;

/// How often a walk starts anew because another vCPU changed an entry meanwhile.
const MAX_RESTARTS: u32 = 64;

/// What an access is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading data.
    Read,
    /// Writing data.
    Write,
}

/// Why an address has no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Miss {
    /// The guest's tables forbid the access: a page fault with this error code.
    Fault(u32),
    /// A table or the page lies where the guest has no memory.
    NotMemory(u64),
    /// Tables of a kind that 64-bit guests do not use.
    UnsupportedMode,
}

/// The registers that decide how a vCPU translates addresses.
#[derive(Clone, Copy, Debug)]
pub struct Paging {
    /// Physical address of the root table, and the number of levels; `None` when paging is off.
    root: Option<(u64, u32)>,
    write_protect: bool,
    no_execute: bool,
    /// Supervisor accesses to user pages are forbidden.
    smap: bool,
    user: bool,
    long_mode: bool,
    /// Bits 51:MAXPHYADDR, which must be clear in every entry.
    reserved: u64,
    address_bits: u32,
}

impl Paging {
    /// Takes the state of a vCPU; `physical_bits` is MAXPHYADDR, `user` says that the access is made at CPL 3.
    pub fn new(regs: &kvm_regs, sregs: &kvm_sregs, user: bool, physical_bits: u32) -> Paging {
        let la57 = sregs.cr4 & CR4_LA57 != 0;
        let levels = if la57 { 5 } else { 4 };
        Paging {
            root: (sregs.cr0 & CR0_PG != 0).then_some((sregs.cr3 & ADDRESS, levels)),
            write_protect: sregs.cr0 & CR0_WP != 0,
            no_execute: sregs.efer & EFER_NXE != 0,
            smap: !user && sregs.cr4 & CR4_SMAP != 0 && regs.rflags & RFLAGS_AC == 0,
            user,
            long_mode: sregs.efer & EFER_LMA != 0,
            reserved: ADDRESS & !((1_u64 << physical_bits.clamp(32, 52)) - 1),
            address_bits: if la57 { 57 } else { 48 },
        }
    }

    /// Whether `address` is canonical, that is, a sign-extended number of as many bits as the tables translate.
    pub fn is_canonical(&self, address: u64) -> bool {
        let shift = 64 - self.address_bits;
        ((address << shift) as i64 >> shift) as u64 == address
    }

    /// Translates a linear address; sets the accessed and dirty bits that the processor would set.
    pub fn translate(&self, ram: &Ram, address: u64, access: Access) -> Result<u64, Miss> {
        let Some((root, levels)) = self.root else { return Ok(address) };
        if !self.long_mode {
            return Err(Miss::UnsupportedMode);
        }
        for _ in 0..MAX_RESTARTS {
            if let Some(physical) = self.walk(ram, address, access, root, levels)? {
                return Ok(physical);
            }
        }
        // The tables never held still; to fault as "not present" lets the guest look at them itself.
        Err(Miss::Fault(self.code(access, 0)))
    }

    fn code(&self, access: Access, cause: u32) -> u32 {
        let write = if access == Access::Write { CODE_WRITE } else { 0 };
        let user = if self.user { CODE_USER } else { 0 };
        cause | write | user
    }

    /// One walk; `None` when an entry changed before its bits were set.
    fn walk(
        &self,
        ram: &Ram,
        address: u64,
        access: Access,
        root: u64,
        levels: u32,
    ) -> Result<Option<u64>, Miss> {
        let write = access == Access::Write;
        let mut table = root;
        let mut rights = WRITABLE | USER;
        let mut path = [(0_u64, 0_u64); 5];
        let mut depth = 0;
        for level in (1..=levels).rev() {
            let shift = 12 + 9 * (level - 1);
            let entry_address = table + (address >> shift & 0x1ff) * 8;
            let entry = load(ram, entry_address)?;
            if entry & PRESENT == 0 {
                return Err(Miss::Fault(self.code(access, 0)));
            }
            let is_leaf = level == 1 || entry & LARGE != 0;
            let page_size = 1_u64 << shift;
            if self.has_reserved_bits(entry, level, is_leaf, page_size) {
                return Err(Miss::Fault(self.code(access, CODE_PROTECTION | CODE_RESERVED)));
            }
            rights &= entry;
            if let Some(step) = path.get_mut(depth) {
                *step = (entry_address, entry);
            }
            depth += 1;
            if !is_leaf {
                table = entry & ADDRESS;
                continue;
            }
            if !self.is_allowed(rights, write) {
                return Err(Miss::Fault(self.code(access, CODE_PROTECTION)));
            }
            let leaf_bits = if write { ACCESSED | DIRTY } else { ACCESSED };
            for (index, (entry_address, entry)) in path.iter().take(depth).enumerate() {
                let wanted = entry | if index + 1 == depth { leaf_bits } else { ACCESSED };
                if wanted != *entry && !replace(ram, *entry_address, *entry, wanted)? {
                    return Ok(None);
                }
            }
            return Ok(Some(entry & ADDRESS & !(page_size - 1) | address & (page_size - 1)));
        }
        Ok(None)
    }

    fn has_reserved_bits(&self, entry: u64, level: u32, is_leaf: bool, page_size: u64) -> bool {
        let mut reserved = self.reserved;
        if !self.no_execute {
            reserved |= NO_EXECUTE;
        }
        if level >= 4 {
            reserved |= LARGE;
        } else if is_leaf && level > 1 {
            // Between the page's address and the PAT bit.
            reserved |= (page_size - 1) & ADDRESS & !PAGE_SIZE;
        }
        entry & reserved != 0
    }

    fn is_allowed(&self, rights: u64, write: bool) -> bool {
        let user_page = rights & USER != 0;
        let writable = rights & WRITABLE != 0;
        if self.user {
            user_page && (!write || writable)
        } else {
            let read_only = !writable && self.write_protect;
            !(user_page && self.smap || write && read_only)
        }
    }
}

fn load(ram: &Ram, address: u64) -> Result<u64, Miss> {
    entry(ram, address, |entry| entry.load(Ordering::Acquire))
}

/// Changes an entry of a page table if it still is what the walk saw.
fn replace(ram: &Ram, address: u64, seen: u64, wanted: u64) -> Result<bool, Miss> {
    dirty::mark(address, 8);
    entry(ram, address, |entry| {
        entry.compare_exchange(seen, wanted, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    })
}

fn entry<T>(ram: &Ram, address: u64, f: impl FnOnce(&AtomicU64) -> T) -> Result<T, Miss> {
    let slice = ram.get_slice(GuestAddress(address), 8).map_err(|_| Miss::NotMemory(address))?;
    let atomic = slice.get_atomic_ref::<AtomicU64>(0).map_err(|_| Miss::NotMemory(address))?;
    Ok(f(atomic))
}

#[cfg(test)]
#[path = "walk_tests.rs"]
mod tests;
