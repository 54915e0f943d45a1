//! Kernel and initrd files: opening, recognising, loading into guest memory.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use linux_loader::bootparam::setup_header;
use linux_loader::loader::KernelLoader;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::bzimage::{self, BzImage};
use super::elf::{self, Elf};
use super::error::{Defect, Error, Fault, Role};
use super::layout;
use crate::memory::{self, PAGE_SIZE, Ram};

/// The part of a file that tells what it is.
const HEAD_LEN: usize = 2048;

/// How a file comes into guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// It is read. The guest's memory can have huge pages, so that it takes few page faults to reach.
    Copy,
    /// Its pages are mapped, privately, and cost nothing until the guest touches them; then each costs a page fault, and
    /// another when the guest writes to it.
    Map,
}

/// A file that was opened and found to be a file with contents.
#[derive(Debug)]
struct Image {
    role: Role,
    path: PathBuf,
    file: File,
    len: u64,
}

impl Image {
    fn open(role: Role, path: &Path) -> Result<Self, Error> {
        let open_error = |source| Error::Open { role, path: path.to_owned(), source };
        // Not blocking, or a named pipe without a writer would hang here.
        let mut options = File::options();
        let file = options.read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(open_error)?;
        let metadata = file.metadata().map_err(open_error)?;
        let kind = metadata.file_type();
        let path = path.to_owned();
        if !kind.is_file() {
            let found = match () {
                () if kind.is_dir() => "a directory",
                () if kind.is_fifo() => "a pipe",
                () if kind.is_block_device() || kind.is_char_device() => "a device",
                () => "something else",
            };
            return Err(Error::NotAFile { role, path, found });
        }
        match metadata.len() {
            0 => Err(Error::Empty { role, path }),
            len => Ok(Self { role, path, file, len }),
        }
    }

    fn too_little_memory(&self, needs_bytes: u64, ram: &Ram) -> Error {
        let memory_bytes = ram.iter().map(|region| region.len()).sum();
        Error::TooLittleMemory { role: self.role, path: self.path.clone(), needs_bytes, memory_bytes }
    }

    /// Brings `len` bytes from file offset `offset` to guest address `addr`.
    ///
    /// [`Placement::Map`] is for whole pages that lie alike in file and memory. The rest is copied, and never through
    /// the mapping, where a file that shrinks would raise SIGBUS.
    fn place(&self, ram: &Ram, placement: Placement, offset: u64, addr: u64, len: u64) -> Result<(), Error> {
        let end = addr + len;
        let (first, last) = (addr.next_multiple_of(PAGE_SIZE), end - end % PAGE_SIZE);
        let alike = offset % PAGE_SIZE == addr % PAGE_SIZE && first < last;
        if placement == Placement::Copy || !alike {
            return self.copy(ram, offset, addr, len);
        }
        self.copy(ram, offset, addr, first - addr)?;
        memory::map_file_private(ram, &self.file, offset + (first - addr), GuestAddress(first), last - first)
            .map_err(|source| Error::Map { role: self.role, path: self.path.clone(), source })?;
        self.copy(ram, offset + (last - addr), last, end - last)
    }

    fn copy(&self, ram: &Ram, offset: u64, addr: u64, len: u64) -> Result<(), Error> {
        if len == 0 {
            return Ok(());
        }
        let mut file = &self.file;
        file.seek(SeekFrom::Start(offset)).map_err(|source| self.read_error(source))?;
        ram.read_exact_volatile_from(GuestAddress(addr), &mut file, len as usize)
            .map_err(|source| self.read_error(std::io::Error::other(source)))
    }

    fn read_error(&self, source: std::io::Error) -> Error {
        Error::Read { role: self.role, path: self.path.clone(), source }
    }
}

/// What a kernel file was recognised as.
#[derive(Clone, Debug, PartialEq)]
pub enum Format {
    /// ELF, usually called `vmlinux`.
    Elf(Elf),
    /// bzImage, usually called `vmlinuz`.
    BzImage(BzImage),
}

/// A kernel file that was opened and checked, and can be loaded.
#[derive(Debug)]
pub struct Kernel {
    image: Image,
    format: Format,
}

/// A kernel that lies in guest memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placed {
    /// First address after it.
    pub end: u64,
    /// The setup header of a bzImage.
    pub header: Option<setup_header>,
}

impl Kernel {
    /// Opens `path` and checks that a kernel for this machine is in it.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let image = Image::open(Role::Kernel, path)?;
        match recognise(&image.file, image.len) {
            Ok(format) => Ok(Self { image, format }),
            Err(Fault::Io(source)) => Err(image.read_error(source)),
            Err(Fault::Defect(source)) => Err(Error::Kernel { path: image.path, source }),
        }
    }

    /// What the file is.
    pub fn format(&self) -> &Format {
        &self.format
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.image.path
    }

    /// Whether the kernel finds virtio-mmio devices by ACPI, as far as the file says.
    pub(super) fn finds_virtio_by_acpi(&self) -> Option<bool> {
        match &self.format {
            Format::Elf(elf) => elf::finds_virtio_by_acpi(&self.image.file, self.image.len, elf),
            Format::BzImage(_) => None,
        }
    }

    pub(super) fn defect(&self, source: Defect) -> Error {
        Error::Kernel { path: self.image.path.clone(), source }
    }

    /// Loads the kernel; `ram` must not have been written to.
    pub(super) fn load(&self, ram: &Ram, placement: Placement) -> Result<Placed, Error> {
        match &self.format {
            Format::Elf(elf) => {
                if low_end(ram) < elf.end() {
                    return Err(self.image.too_little_memory(elf.end(), ram));
                }
                for segment in &elf.segments {
                    self.image.place(ram, placement, segment.offset, segment.addr, segment.file_len)?;
                }
                Ok(Placed { end: elf.end(), header: None })
            }
            Format::BzImage(image) => {
                if low_end(ram) < image.end() {
                    return Err(self.image.too_little_memory(image.end(), ram));
                }
                let mut file = &self.image.file;
                linux_loader::loader::BzImage::load(ram, Some(GuestAddress(image.addr())), &mut file, None)
                    .map_err(|source| Error::Load { path: self.image.path.clone(), source })?;
                Ok(Placed { end: image.end(), header: Some(image.header) })
            }
        }
    }
}

/// An initial RAM disk that was opened and can be loaded.
#[derive(Debug)]
pub struct Initrd(Image);

impl Initrd {
    /// Opens `path`.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Image::open(Role::Initrd, path).map(Self)
    }

    /// Loads the file as high as `addr_max`, the highest address that the kernel accepts in it, and `ram` allow,
    /// above `kernel_end`.
    pub(super) fn load(
        &self,
        ram: &Ram,
        placement: Placement,
        kernel_end: u64,
        addr_max: u64,
    ) -> Result<Range<u64>, Error> {
        let Self(image) = self;
        let top = low_end(ram).min(addr_max.saturating_add(1));
        let start = top.checked_sub(image.len).map(|start| start - start % PAGE_SIZE);
        let Some(start) = start.filter(|start| *start >= kernel_end) else {
            let needs = kernel_end.next_multiple_of(PAGE_SIZE).saturating_add(image.len);
            return Err(image.too_little_memory(needs.next_multiple_of(PAGE_SIZE), ram));
        };
        image.place(ram, placement, 0, start, image.len)?;
        Ok(start..start + image.len)
    }
}

/// Where RAM below the MMIO hole ends.
fn low_end(ram: &Ram) -> u64 {
    ram.find_region(GuestAddress(0)).map_or(0, |region| region.len())
}

fn recognise(file: &File, len: u64) -> Result<Format, Fault> {
    let mut head = [0; HEAD_LEN];
    let head = &mut head[..len.min(HEAD_LEN as u64) as usize];
    file.read_exact_at(head, 0)?;
    if elf::is_elf(head) {
        elf::parse(file, len).map(Format::Elf)
    } else if bzimage::is_bzimage(head) {
        bzimage::parse(file, len).map(Format::BzImage)
    } else if head.get(0x38..).is_some_and(|rest| rest.starts_with(b"ARM\x64")) {
        Err(Defect::Architecture("64-bit Arm (aarch64)".to_owned()).into())
    } else if head.get(0x30..).is_some_and(|rest| rest.starts_with(b"RISCV")) {
        Err(Defect::Architecture("RISC-V".to_owned()).into())
    } else {
        Err(Defect::NotAKernel(looks_like(head)).into())
    }
}

/// Names contents that people take for a kernel.
fn looks_like(head: &[u8]) -> &'static str {
    const MAGICS: [(usize, &[u8], &str); 19] = [
        (0, b"\x1f\x8b", "gzip data (unpack it with gunzip)"),
        (0, b"\x28\xb5\x2f\xfd", "zstd data (unpack it with unzstd)"),
        (0, b"\xfd7zXZ\0", "xz data (unpack it with unxz)"),
        (0, b"BZh", "bzip2 data (unpack it with bunzip2)"),
        (0, b"\x04\x22\x4d\x18", "lz4 data (unpack it with unlz4)"),
        (0, b"\x02\x21\x4c\x18", "lz4 data (unpack it with unlz4)"),
        (0, b"\x89LZO", "lzop data (unpack it with lzop -d)"),
        (0, b"\x5d\0\0", "lzma data (unpack it with unlzma)"),
        (0, b"070701", "an initramfs (cpio archive)"),
        (0, b"070702", "an initramfs (cpio archive)"),
        (0, b"QFI\xfb", "a qcow2 disk image"),
        (0, b"hsqs", "a squashfs file system"),
        (0, b"!<arch>\n", "a package or library (ar archive)"),
        (0, b"#!", "a script"),
        (0, b"\x27\x05\x19\x56", "a U-Boot image"),
        (0, b"MZ", "an EFI program"),
        (0x101, b"ustar", "a tar archive"),
        (0x400, b"\x10\x20\xf5\xf2", "an f2fs file system"),
        (0x438, b"\x53\xef", "an ext2, ext3 or ext4 file system"),
    ];
    let matches = |at: usize, magic: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
    if let Some((.., name)) = MAGICS.iter().find(|(at, magic, _)| matches(*at, magic)) {
        name
    } else if head.iter().all(|byte| *byte == 0) {
        "zeros"
    } else if head.iter().all(|byte| matches!(byte, b' '..=b'~' | b'\n' | b'\r' | b'\t')) {
        "text"
    } else if head.get(0x1fe..).is_some_and(|rest| rest.starts_with(b"\x55\xaa")) {
        "a disk image"
    } else {
        "unknown data"
    }
}

/// The highest address that an initrd may reach, by the header or, for ELF, as kernels have always said.
pub(super) fn initrd_addr_max(header: Option<&setup_header>) -> u64 {
    header.map_or(0x7fff_ffff, |header| u64::from(header.initrd_addr_max)).max(layout::HIGH_MEMORY)
}
