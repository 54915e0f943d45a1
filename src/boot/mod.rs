//! From a kernel file to a guest that can start: guest memory is filled, vCPU state is computed.
//!
//! Pure data in and out; nothing here talks to KVM. [`load`] is the list of what a guest finds in its memory.

mod acpi;
pub mod bzimage;
pub mod cmdline;
pub mod cpuid;
pub mod elf;
mod error;
pub mod kernel;
pub mod layout;
pub mod mptable;
mod params;
pub mod registers;
pub mod testing;

use std::ops::Range;

pub use cmdline::{Cmdline, CmdlineError};
pub use error::{Defect, Error, Role};
pub use kernel::{Format, Initrd, Kernel, Placement};
use params::{Params, write};
use serde::{Deserialize, Serialize};

use crate::memory::Ram;
use crate::platform::MmioSlot;

/// vCPUs that a guest has at most.
pub const CPUS_MAX: u8 = 32;

/// Which boot protocol to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootProtocol {
    /// PVH where the kernel has an entry for it, else the 64-bit Linux boot protocol.
    #[default]
    Auto,
    /// The 64-bit Linux boot protocol.
    Linux64,
    /// PVH.
    Pvh,
}

/// The boot protocol that is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// 64-bit Linux boot protocol: long mode, one-to-one page tables, RSI holds the zero page's address.
    Linux64,
    /// PVH: 32-bit protected mode without paging, EBX holds the start info's address.
    Pvh,
}

/// How the guest is told of its virtio devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Discovery {
    /// By ACPI where the kernel surely uses it, by the command line if the user turned ACPI off, else by both.
    ///
    /// Both is always safe: whichever the kernel looks at first gets the device, and a second probe of the same
    /// registers ends in a message that the region is busy. A bzImage, whose contents cannot be looked into, is
    /// taken for a distribution kernel, with ACPI.
    #[default]
    Auto,
    /// By the DSDT alone.
    Acpi,
    /// By `virtio_mmio.device=` alone.
    Cmdline,
    /// By both.
    Both,
}

/// What to boot.
#[derive(Debug)]
pub struct Source {
    /// The kernel.
    pub kernel: Kernel,
    /// The initial RAM disk.
    pub initrd: Option<Initrd>,
    /// How to start the kernel.
    pub protocol: BootProtocol,
    /// How both come into guest memory.
    pub placement: Placement,
}

/// The machine that the guest is told of.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Number of vCPUs.
    pub cpus: u8,
    /// Virtio devices, in the order in which the guest should find them.
    pub virtio: Vec<MmioSlot>,
    /// How the guest finds them.
    pub discovery: Discovery,
    /// Whether there is a serial port.
    pub serial: bool,
    /// The VM generation ID that the guest starts with.
    pub generation_id: u128,
}

/// A guest that lies in memory and can start.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// How it starts.
    pub protocol: Protocol,
    /// Address of its first instruction.
    pub entry: u64,
    /// First address after the kernel.
    pub kernel_end: u64,
    /// Where the initrd lies.
    pub initrd: Option<Range<u64>>,
    /// The whole command line.
    pub cmdline: String,
    /// The command line's parts that the monitor added.
    pub added: Vec<String>,
    /// How the guest finds its virtio devices; never [`Discovery::Auto`].
    pub discovery: Discovery,
    /// Guest physical address of the 16 bytes of the VM generation ID.
    pub generation_id_addr: u64,
}

/// Fills `ram`, which must be fresh, with everything that the guest needs to start.
pub fn load(ram: &Ram, source: &Source, machine: &Machine, cmdline: &Cmdline) -> Result<Loaded, Error> {
    if machine.cpus == 0 || machine.cpus > CPUS_MAX {
        return Err(Error::Cpus(machine.cpus));
    }
    let Source { kernel, initrd, protocol, placement } = source;
    let (protocol, entry) = entry_point(kernel, *protocol)?;
    let discovery = choose_discovery(kernel, machine.discovery, cmdline);
    let mut cmdline = cmdline.clone();
    if discovery != Discovery::Acpi && cmdline.user_value("virtio_mmio.device").is_none() {
        machine.virtio.iter().for_each(|slot| cmdline.add_virtio_mmio(*slot));
    }

    let placed = kernel.load(ram, *placement)?;
    let addr_max = kernel::initrd_addr_max(placed.header.as_ref());
    let initrd =
        initrd.as_ref().map(|initrd| initrd.load(ram, *placement, placed.end, addr_max)).transpose()?;
    let line = cmdline.render(placed.header.map_or(usize::MAX, |header| header.cmdline_size as usize))?;
    let memory_map = layout::memory_map(&layout::ram_ranges(ram));
    let params = Params { cmdline: &line, initrd: initrd.as_ref(), memory_map: &memory_map };
    match protocol {
        Protocol::Linux64 => params::write_linux(ram, &params, placed.header)?,
        Protocol::Pvh => params::write_pvh(ram, &params)?,
    }
    let described = if discovery == Discovery::Cmdline { &[][..] } else { &machine.virtio };
    acpi::write_tables(ram, machine, described)?;
    write(ram, "the MP table", layout::EBDA, &mptable::build(layout::EBDA, machine.cpus))?;
    write(ram, "the reset vector", layout::RESET_VECTOR, &registers::RESET_CODE)?;
    registers::write_tables(ram, protocol, placed.end)?;
    Ok(Loaded {
        protocol,
        entry,
        kernel_end: placed.end,
        initrd,
        cmdline: line,
        added: cmdline.added().to_vec(),
        discovery,
        generation_id_addr: layout::GENERATION_ID,
    })
}

fn entry_point(kernel: &Kernel, wanted: BootProtocol) -> Result<(Protocol, u64), Error> {
    let linux = |elf: &elf::Elf| {
        let outside = Defect::Entry { protocol: "64-bit Linux", addr: elf.header_entry };
        elf.entry.map(|entry| (Protocol::Linux64, entry)).ok_or(outside)
    };
    let chosen = match (kernel.format(), wanted) {
        (Format::BzImage(image), BootProtocol::Auto | BootProtocol::Linux64) => {
            Ok((Protocol::Linux64, image.addr() + bzimage::ENTRY_OFFSET))
        }
        (Format::BzImage(_), BootProtocol::Pvh) => Err(Defect::BzImagePvh),
        (Format::Elf(elf), BootProtocol::Linux64) => linux(elf),
        (Format::Elf(elf), wanted) => match elf.pvh_entry {
            Some(entry) => Ok((Protocol::Pvh, entry.into())),
            None if wanted == BootProtocol::Pvh => Err(Defect::NoPvhEntry),
            None => linux(elf),
        },
    };
    chosen.map_err(|defect| kernel.defect(defect))
}

fn choose_discovery(kernel: &Kernel, wanted: Discovery, cmdline: &Cmdline) -> Discovery {
    match (wanted, kernel.format()) {
        (Discovery::Auto, _) if cmdline.user_value("acpi") == Some("off") => Discovery::Cmdline,
        (Discovery::Auto, Format::BzImage(_)) => Discovery::Acpi,
        (Discovery::Auto, Format::Elf(_)) => match kernel.finds_virtio_by_acpi() {
            Some(true) => Discovery::Acpi,
            Some(false) | None => Discovery::Both,
        },
        (wanted, _) => wanted,
    }
}

#[cfg(test)]
mod tests;
