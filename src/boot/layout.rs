//! Where boot data lies in guest memory, and the memory map that the guest is told.
//!
//! Everything that only the first instructions of a kernel read is packed into few pages, since each page that is
//! touched is private memory of the monitor.

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::Ram;

/// Global descriptor table; the first 64 bytes of its page.
pub const GDT: u64 = 0x1000;
/// PVH start of day structure.
pub const PVH_START_INFO: u64 = 0x1040;
/// PVH module list, one entry.
pub const PVH_MODULES: u64 = 0x1080;
/// PVH memory map, at most [`MEMORY_MAP_MAX`] entries of 24 bytes.
pub const PVH_MEMORY_MAP: u64 = 0x10c0;
/// Command line, in the upper half of the page that starts with the GDT.
pub const CMDLINE: u64 = 0x1800;
/// Bytes for the command line, its final zero included; x86's `COMMAND_LINE_SIZE`.
pub const CMDLINE_SIZE: u64 = 2048;
/// `boot_params` of the Linux boot protocol.
pub const ZERO_PAGE: u64 = 0x2000;
/// Top level page table; the page directory pointer table and the page directories follow it page by page.
pub const PAGE_TABLES: u64 = 0x3000;
/// The page tables map at most this many GiB one to one.
pub const IDENTITY_MAP_MAX_GIB: u64 = 4;

/// End of conventional memory. The MP table lies in the 1 KiB from here, where kernels look for it first.
pub const EBDA: u64 = 0x9_fc00;
/// ACPI tables, the RSDP first; also where a kernel looks for an RSDP that it was not told of.
pub const ACPI: u64 = 0xe_0000;
/// The VM generation ID, 16 bytes, in the first page of the ACPI area. Firmware memory that no table describes as
/// usable, as the specification of the device asks.
pub const GENERATION_ID: u64 = ACPI + 0x40;
/// First of the tables that the RSDP leads to.
pub const ACPI_TABLES: u64 = ACPI + 0x80;
/// End of the ACPI area.
pub const ACPI_END: u64 = 0xf_0000;
/// Where a processor starts, and where a kernel jumps that wants the firmware to reset the machine.
pub const RESET_VECTOR: u64 = 0xf_fff0;

/// First address that a kernel or an initrd may take.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// Entries that [`memory_map`] gives at most.
pub const MEMORY_MAP_MAX: usize = 4;

/// What the guest may do with a range of addresses; the numbers of the e820 interface, which PVH shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// RAM.
    Usable = 1,
    /// Firmware data.
    Reserved = 2,
}

/// One line of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// First address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u64,
    /// What lies there.
    pub kind: MemoryKind,
}

/// The memory map of a guest whose memory consists of `ram`, in ascending order.
pub fn memory_map(ram: &[(GuestAddress, usize)]) -> Vec<MemoryRange> {
    use MemoryKind::{Reserved, Usable};
    let mut map = vec![
        MemoryRange { addr: 0, len: EBDA, kind: Usable },
        MemoryRange { addr: EBDA, len: HIGH_MEMORY - EBDA, kind: Reserved },
    ];
    for &(start, len) in ram {
        let end = start.0.saturating_add(len as u64);
        let addr = start.0.max(HIGH_MEMORY);
        if end > addr {
            map.push(MemoryRange { addr, len: end - addr, kind: Usable });
        }
    }
    map
}

/// The guest physical ranges of `ram`, in ascending order.
pub fn ram_ranges(ram: &Ram) -> Vec<(GuestAddress, usize)> {
    ram.iter().map(|region| (region.start_addr(), region.len() as usize)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use crate::platform::{MMIO_HOLE_END, MMIO_HOLE_START};

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn usable_above_1_mib(size: u64) -> Vec<(u64, u64)> {
        let map = memory_map(&memory::ranges(size));
        assert!(map.len() <= MEMORY_MAP_MAX);
        assert_eq!(map[0], MemoryRange { addr: 0, len: EBDA, kind: MemoryKind::Usable });
        assert_eq!(map[1].kind, MemoryKind::Reserved);
        assert_eq!((map[1].addr, map[1].addr + map[1].len), (EBDA, HIGH_MEMORY));
        for pair in map.windows(2) {
            assert!(pair[0].addr + pair[0].len <= pair[1].addr, "{map:x?}");
        }
        let high: Vec<_> = map[2..].iter().map(|range| (range.addr, range.len)).collect();
        assert!(map[2..].iter().all(|range| range.kind == MemoryKind::Usable));
        assert_eq!(high.iter().map(|range| range.1).sum::<u64>() + MIB, size);
        high
    }

    #[test]
    fn map_covers_memory_around_the_hole() {
        assert_eq!(usable_above_1_mib(16 * MIB), [(MIB, 15 * MIB)]);
        assert_eq!(usable_above_1_mib(128 * MIB), [(MIB, 127 * MIB)]);
        let low = (MIB, MMIO_HOLE_START - MIB);
        assert_eq!(usable_above_1_mib(3 * GIB), [low]);
        assert_eq!(usable_above_1_mib(3 * GIB + 4096), [low, (MMIO_HOLE_END, 4096)]);
        assert_eq!(usable_above_1_mib(5 * GIB), [low, (MMIO_HOLE_END, 2 * GIB)]);
        assert_eq!(usable_above_1_mib(64 * GIB), [low, (MMIO_HOLE_END, 61 * GIB)]);
    }

    #[test]
    fn boot_data_does_not_overlap() {
        let areas = [
            (GDT, 0x40),
            (PVH_START_INFO, 56),
            (PVH_MODULES, 32),
            (PVH_MEMORY_MAP, 24 * MEMORY_MAP_MAX as u64),
            (CMDLINE, CMDLINE_SIZE),
            (ZERO_PAGE, 4096),
            (PAGE_TABLES, 4096 * (2 + IDENTITY_MAP_MAX_GIB)),
            (EBDA, 1024),
            (ACPI, 36),
            (GENERATION_ID, 16),
            (ACPI_TABLES, ACPI_END - ACPI_TABLES),
            (RESET_VECTOR, 16),
            (HIGH_MEMORY, 0),
        ];
        for pair in areas.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
    }
}
