//! Initial vCPU state.
//!
//! Only the first vCPU gets an entry point; the others wait for INIT and SIPI as KVM creates them.

use kvm_bindings::{kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};

use super::error::Error;
use super::layout::{self, IDENTITY_MAP_MAX_GIB, PAGE_TABLES};
use super::params::write;
use super::{Loaded, Protocol};
use crate::memory::Ram;
use crate::platform;

/// Selectors that the 64-bit Linux boot protocol asks for (`__BOOT_CS`, `__BOOT_DS`), and one for the task state.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS bit 1 is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// Page table entry: present and writable.
const PTE_TABLE: u64 = 0x3;
/// Page directory entry: present, writable, 2 MiB.
const PDE_2_MIB: u64 = 0x83;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1 << 0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, memory is write-back where no other register says otherwise.
const MTRR_ENABLE_WRITE_BACK: u64 = (1 << 11) | 6;

/// Offsets of local APIC registers (Intel SDM volume 3, table 11-1).
const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
/// Delivery modes of an LVT entry (§11.5.1).
const DELIVERY_NMI: u32 = 4 << 8;
const DELIVERY_EXT_INT: u32 = 7 << 8;
const DELIVERY_AND_MASK: u32 = (7 << 8) | (1 << 16);

/// Code for [`layout::RESET_VECTOR`]: writes to the ACPI reset register, then halts.
///
/// A Linux kernel that runs on hardware-reduced ACPI and was built for EFI too looks for no other way to reset.
pub(super) const RESET_CODE: [u8; 9] = {
    let [low, high] = platform::RESET.to_le_bytes();
    // mov dx, RESET; mov al, RESET_VALUE; out dx, al; hlt; jmp to the hlt
    [0xba, low, high, 0xb0, platform::RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
};

/// General registers of the first vCPU.
pub fn regs(loaded: &Loaded) -> kvm_regs {
    let mut regs = kvm_regs { rflags: RFLAGS_RESERVED, rip: loaded.entry, ..Default::default() };
    match loaded.protocol {
        Protocol::Linux64 => regs.rsi = layout::ZERO_PAGE,
        Protocol::Pvh => regs.rbx = layout::PVH_START_INFO,
    }
    regs
}

/// System registers of the first vCPU, from those that KVM gave it at reset.
pub fn sregs(loaded: &Loaded, mut sregs: kvm_sregs) -> kvm_sregs {
    let long = loaded.protocol == Protocol::Linux64;
    let flat = |selector, type_| kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    // Code: execute, read, accessed. Data: read, write, accessed. Task state: busy.
    sregs.cs = kvm_segment { l: long.into(), db: (!long).into(), ..flat(CODE, 0xb) };
    let data = kvm_segment { db: 1, ..flat(DATA, 0x3) };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, s: 0, g: 0, ..flat(TASK, 0xb) };
    sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (size_of_val(&gdt(long)) - 1) as u16;
    // No handler for anything: a fault before the kernel has its own table ends in a shutdown.
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    if long {
        sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
        sregs.cr3 = PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
    } else {
        sregs.cr0 = CR0_PE | CR0_ET;
        (sregs.cr3, sregs.cr4, sregs.efer) = (0, 0, 0);
    }
    sregs
}

/// Floating point state of every vCPU: as `FNINIT` and a reset of MXCSR leave it.
pub fn fpu() -> kvm_fpu {
    kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() }
}

/// MSRs of every vCPU that differ from what they are at reset.
pub fn msrs() -> [kvm_msr_entry; 2] {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    [entry(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING), entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK)]
}

/// Wires a local APIC as firmware leaves it: LINT0 takes the 8259, LINT1 is the NMI.
pub fn wire_lapic(lapic: &mut kvm_lapic_state) {
    for (register, mode) in [(APIC_LVT_LINT0, DELIVERY_EXT_INT), (APIC_LVT_LINT1, DELIVERY_NMI)] {
        let Some(bytes) = lapic.regs.get_mut(register..register + 4) else { continue };
        let mut value = [0; 4];
        for (to, from) in value.iter_mut().zip(bytes.iter()) {
            *to = *from as u8;
        }
        let value = u32::from_le_bytes(value) & !DELIVERY_AND_MASK | mode;
        for (to, from) in bytes.iter_mut().zip(value.to_le_bytes()) {
            *to = from as _;
        }
    }
}

/// Segment descriptors in the order of the selectors.
fn gdt(long: bool) -> [u64; 6] {
    // Flat; code is 64-bit or 32-bit. The task state segment at 0, 0x68 bytes, takes two slots in long mode.
    let code = if long { 0x00af_9b00_0000_ffff } else { 0x00cf_9b00_0000_ffff };
    [0, 0, code, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067, 0]
}

/// Writes the descriptor table and, for long mode, page tables that map memory one to one up to `mapped_end`.
pub(super) fn write_tables(ram: &Ram, protocol: Protocol, mapped_end: u64) -> Result<(), Error> {
    let long = protocol == Protocol::Linux64;
    write(ram, "the descriptor table", layout::GDT, &bytes_of(gdt(long)))?;
    if !long {
        return Ok(());
    }
    let gib = mapped_end.div_ceil(1 << 30).clamp(1, IDENTITY_MAP_MAX_GIB);
    let page = |index: u64| PAGE_TABLES + index * 4096;
    write(ram, "the page tables", page(0), &bytes_of([page(1) | PTE_TABLE]))?;
    write(ram, "the page tables", page(1), &bytes_of((0..gib).map(|index| page(2 + index) | PTE_TABLE)))?;
    for index in 0..gib {
        let entries = (index * 512..(index + 1) * 512).map(|large_page| (large_page << 21) | PDE_2_MIB);
        write(ram, "the page tables", page(2 + index), &bytes_of(entries))?;
    }
    Ok(())
}

fn bytes_of(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::Discovery;

    fn loaded(protocol: Protocol) -> Loaded {
        Loaded {
            protocol,
            entry: 0x100_0200,
            kernel_end: 0x200_0000,
            initrd: None,
            cmdline: String::new(),
            added: Vec::new(),
            discovery: Discovery::Acpi,
            generation_id_addr: layout::GENERATION_ID,
        }
    }

    /// The fields of a segment that its descriptor gives (Intel SDM volume 3, figure 3-8).
    fn descriptor(segment: kvm_segment) -> u64 {
        let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
        let access = u64::from(segment.type_)
            | u64::from(segment.s) << 4
            | u64::from(segment.dpl) << 5
            | u64::from(segment.present) << 7;
        let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
        limit & 0xffff | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52
    }

    #[test]
    fn segments_agree_with_the_descriptor_table() {
        for protocol in [Protocol::Linux64, Protocol::Pvh] {
            let sregs = sregs(&loaded(protocol), kvm_sregs::default());
            let table = gdt(protocol == Protocol::Linux64);
            for segment in [sregs.cs, sregs.ds, sregs.ss, sregs.tr] {
                assert_eq!(table[usize::from(segment.selector) / 8], descriptor(segment), "{segment:x?}");
            }
            assert_eq!(usize::from(sregs.gdt.limit) + 1, size_of_val(&table));
        }
    }

    #[test]
    fn each_protocol_gets_the_mode_it_asks_for() {
        let reset = kvm_sregs { apic_base: 0xfee0_0900, cr0: 0x6000_0010, ..Default::default() };
        let linux = sregs(&loaded(Protocol::Linux64), reset);
        assert_eq!((linux.cr0, linux.cr4, linux.efer), (0x8000_0011, 0x20, 0x500));
        assert_eq!((linux.cs.l, linux.cs.db, linux.cr3), (1, 0, PAGE_TABLES));
        let pvh = sregs(&loaded(Protocol::Pvh), reset);
        assert_eq!((pvh.cr0, pvh.cr4, pvh.efer), (0x11, 0, 0));
        assert_eq!((pvh.cs.l, pvh.cs.db), (0, 1));
        assert_eq!([linux.apic_base, pvh.apic_base], [0xfee0_0900; 2]);
        assert_eq!(regs(&loaded(Protocol::Linux64)).rsi, layout::ZERO_PAGE);
        assert_eq!(regs(&loaded(Protocol::Pvh)).rbx, layout::PVH_START_INFO);
        assert_eq!(regs(&loaded(Protocol::Pvh)).rip, 0x100_0200);
    }

    #[test]
    fn lapic_lines_are_wired_and_unmasked() {
        let mut lapic = kvm_lapic_state::default();
        let set = |lapic: &mut kvm_lapic_state, at: usize, value: u32| {
            for (to, from) in lapic.regs[at..].iter_mut().zip(value.to_le_bytes()) {
                *to = from as _;
            }
        };
        set(&mut lapic, APIC_LVT_LINT0, 0x0001_0000);
        set(&mut lapic, APIC_LVT_LINT1, 0x0001_0755);
        let before = lapic;
        wire_lapic(&mut lapic);
        let get = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| lapic.regs[at + byte] as u8));
        assert_eq!((get(APIC_LVT_LINT0), get(APIC_LVT_LINT1)), (0x700, 0x455));
        let changed = lapic.regs.iter().zip(&before.regs).filter(|(a, b)| a != b).count();
        assert_eq!(changed, 4);
    }
}
