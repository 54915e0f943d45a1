//! Why a guest cannot be booted.

use std::fmt;
use std::path::PathBuf;

use super::cmdline::CmdlineError;
use crate::memory;

/// Which file an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The kernel.
    Kernel,
    /// The initial RAM disk.
    Initrd,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Kernel => "kernel",
            Role::Initrd => "initrd",
        })
    }
}

/// Why a guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened.
    #[error("cannot open {role} {}", path.display())]
    Open {
        /// Which file.
        role: Role,
        /// Its path.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// The path leads to something other than a file.
    #[error("{role} {} is {found}, not a file", path.display())]
    NotAFile {
        /// Which file.
        role: Role,
        /// Its path.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// The file has no bytes.
    #[error("{role} {} is empty", path.display())]
    Empty {
        /// Which file.
        role: Role,
        /// Its path.
        path: PathBuf,
    },
    /// Reading failed.
    #[error("cannot read {role} {}", path.display())]
    Read {
        /// Which file.
        role: Role,
        /// Its path.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// The kernel file is no kernel that can be booted.
    #[error("cannot boot kernel {}", path.display())]
    Kernel {
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Defect,
    },
    /// The guest has less memory than the file needs.
    #[error(
        "{role} {} needs {} MiB of guest memory, the guest has {} MiB",
        path.display(), needs_bytes.div_ceil(1 << 20), memory_bytes >> 20
    )]
    TooLittleMemory {
        /// Which file.
        role: Role,
        /// Its path.
        path: PathBuf,
        /// Guest memory with which it would fit.
        needs_bytes: u64,
        /// Guest memory that there is.
        memory_bytes: u64,
    },
    /// The command line is refused.
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    /// A number of vCPUs that the tables cannot describe.
    #[error("{0} vCPUs; a guest has 1 to {max}", max = super::CPUS_MAX)]
    Cpus(u8),
    /// Guest memory does not hold the address.
    #[error("cannot write {what} to guest memory")]
    Write {
        /// What was being written.
        what: &'static str,
        /// What vm-memory said.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// A file could not be mapped into guest memory.
    #[error("cannot map {role} {} into guest memory", path.display())]
    Map {
        /// Which file.
        role: Role,
        /// Its path.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: memory::Error,
    },
    /// The file was read into guest memory by a loader that failed.
    #[error("cannot load kernel {}", path.display())]
    Load {
        /// Its path.
        path: PathBuf,
        /// What the loader said.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// The ACPI tables outgrew their area.
    #[error("ACPI tables of {len} bytes do not fit into {max}")]
    AcpiSize {
        /// What they need.
        len: u64,
        /// What there is.
        max: u64,
    },
}

/// What is wrong with a kernel file.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Defect {
    /// Neither ELF nor bzImage.
    #[error("not a kernel: it looks like {0}; an ELF vmlinux or a bzImage is needed")]
    NotAKernel(&'static str),
    /// A kernel for another machine.
    #[error("it is for {0}; an x86-64 kernel is needed")]
    Architecture(String),
    /// An ELF file of a kind that has no fixed place in memory.
    #[error("it is an ELF {0}, not an executable")]
    ElfKind(&'static str),
    /// The file ends before its contents do.
    #[error("the file is truncated: {part} ends at byte {needs}, the file has {has}")]
    Truncated {
        /// What lies past the end.
        part: String,
        /// Bytes that the file would need.
        needs: u64,
        /// Bytes that it has.
        has: u64,
    },
    /// A header that contradicts itself.
    #[error("broken header: {0}")]
    Header(String),
    /// Low memory is where boot data lies.
    #[error("segment {segment} is to be loaded at {addr:#x}; below 1 MiB lie boot data and firmware tables")]
    LowMemory {
        /// Index of the program header.
        segment: usize,
        /// Where it wants to be.
        addr: u64,
    },
    /// The kernel wants to be where no RAM can be.
    #[error(
        "segment {segment} is to be loaded at {addr:#x}..{end:#x}; RAM below the device addresses ends at {limit:#x}"
    )]
    NoRamThere {
        /// Index of the program header.
        segment: usize,
        /// First address.
        addr: u64,
        /// End address.
        end: u64,
        /// Where RAM ends at the latest.
        limit: u64,
    },
    /// Two segments claim the same memory.
    #[error("segments {0} and {1} overlap in memory")]
    Overlap(usize, usize),
    /// The entry point is in no segment.
    #[error("{protocol} entry point {addr:#x} lies outside the loaded segments")]
    Entry {
        /// Boot protocol.
        protocol: &'static str,
        /// The entry point.
        addr: u64,
    },
    /// PVH was asked for and the kernel has no entry for it.
    #[error(
        "it has no PVH entry (the XEN_ELFNOTE_PHYS32_ENTRY note); build it with CONFIG_PVH or use the linux64 protocol"
    )]
    NoPvhEntry,
    /// PVH was asked for and the file is a bzImage.
    #[error("a bzImage has no PVH entry; use the linux64 protocol or the ELF vmlinux")]
    BzImagePvh,
    /// A bzImage without a 64-bit entry point.
    #[error("the bzImage has no 64-bit entry point (boot protocol {}.{:02}); a 64-bit kernel, Linux 3.8 or later, is needed", version >> 8, version & 0xff)]
    Old {
        /// Boot protocol version of the file.
        version: u16,
    },
}

/// What goes wrong while a kernel file is being read, before its name is added.
#[derive(Debug)]
pub enum Fault {
    /// The host could not read it.
    Io(std::io::Error),
    /// Its contents are no good.
    Defect(Defect),
}

impl From<std::io::Error> for Fault {
    fn from(error: std::io::Error) -> Self {
        Fault::Io(error)
    }
}

impl From<Defect> for Fault {
    fn from(defect: Defect) -> Self {
        Fault::Defect(defect)
    }
}
