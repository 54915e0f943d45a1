//! What a kernel is handed: `boot_params` of the Linux boot protocol, or the PVH start info.

use std::ops::Range;

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::error::Error;
use super::layout::{self, MemoryRange};
use crate::memory::Ram;

/// `boot_flag` of the setup header.
const BOOT_FLAG: u16 = 0xaa55;
/// `header` of the setup header, "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// `type_of_loader`: a boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// `loadflags`: the protected-mode code is loaded at 1 MiB or above.
const LOADED_HIGH: u8 = 1 << 0;
/// The protocol version that a header made here follows: the one that brought `acpi_rsdp_addr`.
const PROTOCOL_VERSION: u16 = 0x20e;
/// `XEN_HVM_START_MAGIC_VALUE`.
const PVH_MAGIC: u32 = 0x336e_c578;

/// What both protocols tell the kernel.
pub(super) struct Params<'a> {
    pub cmdline: &'a str,
    pub initrd: Option<&'a Range<u64>>,
    pub memory_map: &'a [MemoryRange],
}

impl Params<'_> {
    fn write_cmdline(&self, ram: &Ram) -> Result<(), Error> {
        // The final zero is there: guest memory is zero where nothing was written.
        write(ram, "the command line", layout::CMDLINE, self.cmdline.as_bytes())
    }
}

/// Writes the zero page of the Linux boot protocol; `header` is that of a bzImage.
pub(super) fn write_linux(ram: &Ram, params: &Params, header: Option<setup_header>) -> Result<(), Error> {
    let hdr = header.unwrap_or(setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: PROTOCOL_VERSION,
        kernel_alignment: 0x20_0000,
        cmdline_size: layout::CMDLINE_SIZE as u32 - 1,
        ..Default::default()
    });
    let mut page = boot_params { hdr, acpi_rsdp_addr: layout::ACPI, ..Default::default() };
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.loadflags |= LOADED_HIGH;
    page.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    if let Some(initrd) = params.initrd {
        // Below the MMIO hole, so 32 bits are enough.
        page.hdr.ramdisk_image = initrd.start as u32;
        page.hdr.ramdisk_size = (initrd.end - initrd.start) as u32;
    }
    page.e820_entries = params.memory_map.len().min(layout::MEMORY_MAP_MAX) as u8;
    let mut table = page.e820_table;
    for (entry, range) in table.iter_mut().zip(params.memory_map) {
        *entry = boot_e820_entry { addr: range.addr, size: range.len, r#type: range.kind as u32 };
    }
    page.e820_table = table;
    params.write_cmdline(ram)?;
    write(ram, "the zero page", layout::ZERO_PAGE, page.as_slice())
}

/// Writes the PVH start info and what it points to.
pub(super) fn write_pvh(ram: &Ram, params: &Params) -> Result<(), Error> {
    let info = hvm_start_info {
        magic: PVH_MAGIC,
        version: 1,
        flags: 0,
        nr_modules: params.initrd.is_some().into(),
        modlist_paddr: if params.initrd.is_some() { layout::PVH_MODULES } else { 0 },
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: layout::ACPI,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: params.memory_map.len().min(layout::MEMORY_MAP_MAX) as u32,
        reserved: 0,
    };
    if let Some(initrd) = params.initrd {
        let module =
            hvm_modlist_entry { paddr: initrd.start, size: initrd.end - initrd.start, ..Default::default() };
        write(ram, "the PVH module list", layout::PVH_MODULES, module.as_slice())?;
    }
    for (index, range) in params.memory_map.iter().take(layout::MEMORY_MAP_MAX).enumerate() {
        let entry = hvm_memmap_table_entry {
            addr: range.addr,
            size: range.len,
            type_: range.kind as u32,
            reserved: 0,
        };
        let addr = layout::PVH_MEMORY_MAP + (index * size_of::<hvm_memmap_table_entry>()) as u64;
        write(ram, "the PVH memory map", addr, entry.as_slice())?;
    }
    params.write_cmdline(ram)?;
    write(ram, "the PVH start info", layout::PVH_START_INFO, info.as_slice())
}

/// Writes `bytes`, which are called `what`, to guest memory.
pub(super) fn write(ram: &Ram, what: &'static str, addr: u64, bytes: &[u8]) -> Result<(), Error> {
    ram.write_slice(bytes, GuestAddress(addr)).map_err(|source| Error::Write { what, source })
}
