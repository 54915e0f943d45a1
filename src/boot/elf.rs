//! ELF kernels: header checks and segments.
//!
//! The file may be hostile. Everything is checked against the file's length and against itself before any of it is
//! loaded; nothing is allocated by a size that the file claims, beyond small limits.

use std::fs::File;
use std::os::unix::fs::FileExt;

use linux_loader::elf::{self, Elf64_Ehdr, Elf64_Phdr};
use vm_memory::ByteValued;

use super::error::{Defect, Fault};
use super::layout;
use crate::platform::MMIO_HOLE_START;

/// Program headers that a kernel may have; Linux has five.
const SEGMENTS_MAX: u16 = 64;
/// Bytes of a note segment that are looked at.
const NOTES_MAX: u64 = 64 << 10;
/// `XEN_ELFNOTE_PHYS32_ENTRY` of Xen's `public/elfnote.h`.
const PHYS32_ENTRY: u32 = 18;
/// Section headers that are looked at.
const SECTIONS_MAX: u16 = 1024;
/// Bytes of section names that are looked at.
const SECTION_NAMES_MAX: u64 = 64 << 10;
/// Bytes of read-only data that are searched.
const RODATA_MAX: u64 = 32 << 20;

/// A `PT_LOAD` program header, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Index of its program header.
    pub index: usize,
    /// Where its bytes lie in the file.
    pub offset: u64,
    /// How many bytes the file holds.
    pub file_len: u64,
    /// Physical address.
    pub addr: u64,
    /// Bytes in memory; those past `file_len` are zero.
    pub mem_len: u64,
}

impl Segment {
    /// First address after the segment.
    pub fn end(&self) -> u64 {
        self.addr + self.mem_len
    }
}

/// A kernel in ELF form, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elf {
    /// Entry point of the 64-bit Linux boot protocol, if it lies in a segment.
    pub entry: Option<u64>,
    /// What the header gives as the entry point.
    pub header_entry: u64,
    /// Entry point of PVH.
    pub pvh_entry: Option<u32>,
    /// Segments by ascending address, without overlap.
    pub segments: Vec<Segment>,
    sections: Sections,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sections {
    offset: u64,
    count: u16,
    names: u16,
}

impl Elf {
    /// First address after the kernel.
    pub fn end(&self) -> u64 {
        self.segments.last().map_or(0, Segment::end)
    }
}

/// Whether the file starts like ELF.
pub fn is_elf(head: &[u8]) -> bool {
    head.starts_with(b"\x7fELF")
}

/// Reads and checks the headers of `file`, which is `file_len` bytes long.
pub fn parse(file: &File, file_len: u64) -> Result<Elf, Fault> {
    // The identification comes first: a short file of another class should be called by its name.
    let mut ident = [0; 20];
    let header_len = size_of::<Elf64_Ehdr>() as u64;
    check_range("the ELF header", 0, ident.len() as u64, file_len)?;
    file.read_exact_at(&mut ident, 0)?;
    check_machine(&ident)?;
    check_range("the ELF header", 0, header_len, file_len)?;
    let mut header = Elf64_Ehdr::default();
    file.read_exact_at(header.as_mut_slice(), 0)?;

    let phentsize = size_of::<Elf64_Phdr>();
    if usize::from(header.e_phentsize) != phentsize {
        return Err(Defect::Header(format!("program headers of {} bytes", header.e_phentsize)).into());
    }
    if header.e_phnum == 0 || header.e_phnum > SEGMENTS_MAX {
        return Err(Defect::Header(format!("{} program headers", header.e_phnum)).into());
    }
    let mut table = vec![0; usize::from(header.e_phnum) * phentsize];
    check_range("the program header table", header.e_phoff, table.len() as u64, file_len)?;
    file.read_exact_at(&mut table, header.e_phoff)?;
    let headers: Vec<Elf64_Phdr> = table
        .chunks_exact(phentsize)
        .map(|bytes| {
            let mut header = Elf64_Phdr::default();
            header.as_mut_slice().copy_from_slice(bytes);
            header
        })
        .collect();

    let segments = check_segments(&headers, file_len)?;
    let pvh_entry = find_pvh_entry(file, &headers, file_len)?;
    let inside = |addr: u64| segments.iter().any(|segment| (segment.addr..segment.end()).contains(&addr));
    if let Some(addr) = pvh_entry.map(u64::from).filter(|addr| !inside(*addr)) {
        return Err(Defect::Entry { protocol: "PVH", addr }.into());
    }
    if header.e_type == elf::ET_DYN && pvh_entry.is_none() {
        return Err(Defect::ElfKind("shared object or position-independent program").into());
    }
    Ok(Elf {
        entry: Some(header.e_entry).filter(|addr| inside(*addr)),
        header_entry: header.e_entry,
        pvh_entry,
        segments,
        sections: Sections { offset: header.e_shoff, count: header.e_shnum, names: header.e_shstrndx },
    })
}

/// Checks `e_ident`, `e_type` and `e_machine`.
fn check_machine(ident: &[u8; 20]) -> Result<(), Defect> {
    let (class, data) = (ident[4], ident[5]);
    let number = |at: usize| {
        let bytes = [ident[at], ident[at + 1]];
        if data == 2 { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) }
    };
    let (kind, machine) = (number(16), number(18));
    let name = match machine {
        elf::EM_X86_64 if class == 1 => "x86-64 in 32-bit ELF form (x32)".to_owned(),
        elf::EM_X86_64 => String::new(),
        3 => "32-bit x86".to_owned(),
        8 => "MIPS".to_owned(),
        20 => "32-bit PowerPC".to_owned(),
        21 => "64-bit PowerPC".to_owned(),
        22 => "s390".to_owned(),
        40 => "32-bit Arm".to_owned(),
        183 => "64-bit Arm (aarch64)".to_owned(),
        243 => "RISC-V".to_owned(),
        258 => "LoongArch".to_owned(),
        other => format!("another architecture (ELF machine {other})"),
    };
    if !name.is_empty() {
        return Err(Defect::Architecture(name));
    }
    if class != 2 || data != 1 {
        return Err(Defect::Header(format!("ELF class {class}, data encoding {data}")));
    }
    match kind {
        2 | 3 => Ok(()),
        1 => Err(Defect::ElfKind("object file (a module or unlinked code)")),
        4 => Err(Defect::ElfKind("core dump")),
        _ => Err(Defect::ElfKind("file of an unknown type")),
    }
}

fn check_segments(headers: &[Elf64_Phdr], file_len: u64) -> Result<Vec<Segment>, Defect> {
    let mut segments = Vec::with_capacity(headers.len());
    for (index, header) in headers.iter().enumerate() {
        if header.p_type != elf::PT_LOAD || header.p_memsz == 0 {
            continue;
        }
        let segment = Segment {
            index,
            offset: header.p_offset,
            file_len: header.p_filesz,
            addr: header.p_paddr,
            mem_len: header.p_memsz,
        };
        if segment.file_len > segment.mem_len {
            return Err(Defect::Header(format!("segment {index} is longer in the file than in memory")));
        }
        let end = segment.addr.checked_add(segment.mem_len);
        let end =
            end.ok_or_else(|| Defect::Header(format!("segment {index} wraps around the address space")))?;
        if segment.file_len > 0 {
            check_range(&format!("segment {index}"), segment.offset, segment.file_len, file_len)?;
        }
        if segment.addr < layout::HIGH_MEMORY {
            return Err(Defect::LowMemory { segment: index, addr: segment.addr });
        }
        if end > MMIO_HOLE_START {
            return Err(Defect::NoRamThere {
                segment: index,
                addr: segment.addr,
                end,
                limit: MMIO_HOLE_START,
            });
        }
        segments.push(segment);
    }
    if segments.iter().all(|segment| segment.file_len == 0) {
        return Err(Defect::Header("no loadable segment".to_owned()));
    }
    segments.sort_by_key(|segment| segment.addr);
    for pair in segments.windows(2) {
        if let [low, high] = pair
            && low.end() > high.addr
        {
            return Err(Defect::Overlap(low.index.min(high.index), low.index.max(high.index)));
        }
    }
    Ok(segments)
}

fn check_range(part: &str, offset: u64, len: u64, file_len: u64) -> Result<(), Defect> {
    match offset.checked_add(len) {
        None => Err(Defect::Header(format!("{part} lies at file offset {offset:#x}"))),
        Some(end) if end > file_len => {
            Err(Defect::Truncated { part: part.to_owned(), needs: end, has: file_len })
        }
        Some(_) => Ok(()),
    }
}

/// Looks through every note segment for the PVH entry point.
fn find_pvh_entry(file: &File, headers: &[Elf64_Phdr], file_len: u64) -> Result<Option<u32>, Fault> {
    for (index, header) in headers.iter().enumerate() {
        if header.p_type != elf::PT_NOTE || header.p_filesz == 0 {
            continue;
        }
        check_range(&format!("note segment {index}"), header.p_offset, header.p_filesz, file_len)?;
        let mut notes = vec![0; header.p_filesz.min(NOTES_MAX) as usize];
        file.read_exact_at(&mut notes, header.p_offset)?;
        if let Some(entry) = pvh_entry_in(&notes) {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

/// Walks ELF notes, whose names and descriptors are padded to four bytes, up to the first that does not fit.
fn pvh_entry_in(mut notes: &[u8]) -> Option<u32> {
    loop {
        let (head, rest) = notes.split_first_chunk::<12>()?;
        let [name_len, desc_len, kind] =
            [0, 4, 8].map(|at| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]));
        let (name_len, desc_len) = (usize::try_from(name_len).ok()?, usize::try_from(desc_len).ok()?);
        let name = rest.get(..name_len)?;
        let rest = rest.get(name_len.checked_next_multiple_of(4)?..)?;
        let desc = rest.get(..desc_len)?;
        if kind == PHYS32_ENTRY && name == b"Xen\0" {
            // Four or eight bytes; the upper half of eight is zero.
            let (low, high) = desc.split_first_chunk::<4>()?;
            return high.iter().all(|byte| *byte == 0).then(|| u32::from_le_bytes(*low));
        }
        notes = rest.get(desc_len.checked_next_multiple_of(4)?..)?;
    }
}

/// Whether the kernel's built-in virtio-mmio driver finds devices by ACPI: whether its read-only data has the
/// driver's table of ACPI names. `None` where the file does not say, because its section headers were stripped or
/// are broken.
pub fn finds_virtio_by_acpi(file: &File, file_len: u64, kernel: &Elf) -> Option<bool> {
    let (offset, len) = find_section(file, kernel.sections, b".rodata")?;
    if len > RODATA_MAX || check_range("", offset, len, file_len).is_err() {
        return None;
    }
    // `struct acpi_device_id` holds the name in place and is aligned to eight bytes, as the section itself is.
    let wanted = u64::from_ne_bytes(*b"LNRO0005");
    let mut chunk = vec![0; 32 << 10];
    let mut at = 0;
    while at < len {
        let take = chunk.len().min((len - at) as usize);
        let bytes = chunk.get_mut(..take)?;
        file.read_exact_at(bytes, offset + at).ok()?;
        // Counting instead of stopping lets the compiler compare many words at once.
        let (words, _) = bytes.as_chunks::<8>();
        if words.iter().filter(|word| u64::from_ne_bytes(**word) == wanted).count() > 0 {
            return Some(true);
        }
        at += take as u64;
    }
    Some(false)
}

/// File offset and length of the section called `name`.
fn find_section(file: &File, sections: Sections, name: &[u8]) -> Option<(u64, u64)> {
    let entry_len = size_of::<elf::Elf64_Shdr>();
    if sections.count == 0 || sections.count > SECTIONS_MAX {
        return None;
    }
    let mut table = vec![0; usize::from(sections.count) * entry_len];
    file.read_exact_at(&mut table, sections.offset).ok()?;
    // Elf64_Shdr: sh_name at 0, sh_offset at 24, sh_size at 32.
    let header = |index: usize| {
        let bytes = table.chunks_exact(entry_len).nth(index)?;
        let number = |at: usize| bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
        Some((number(0)? as u32, number(24)?, number(32)?))
    };
    let (_, names_offset, names_len) = header(usize::from(sections.names))?;
    let mut names = vec![0; names_len.min(SECTION_NAMES_MAX) as usize];
    file.read_exact_at(&mut names, names_offset).ok()?;
    (0..usize::from(sections.count)).filter_map(header).find_map(|(name_at, offset, len)| {
        let rest = names.get(name_at as usize..)?;
        let found = rest.split(|byte| *byte == 0).next()?;
        (found == name).then_some((offset, len))
    })
}
