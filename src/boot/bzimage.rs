//! bzImage kernels: the setup header of the Linux boot protocol (the kernel's `Documentation/x86/boot.rst`).

use std::fs::File;
use std::os::unix::fs::FileExt;

use linux_loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::error::{Defect, Fault};
use super::layout;

/// File offset of the setup header.
const HEADER: u64 = 0x1f1;
/// File offset of the magic `HdrS`.
const MAGIC: usize = 0x202;
/// `loadflags`: the protected-mode code is loaded at 1 MiB or above.
const LOADED_HIGH: u8 = 1 << 0;
/// `xloadflags`: there is a 64-bit entry point, 0x200 bytes into the protected-mode code.
const XLF_KERNEL_64: u16 = 1 << 0;
/// Where that entry point is.
pub const ENTRY_OFFSET: u64 = 0x200;

/// A kernel in bzImage form, checked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BzImage {
    /// The header, with zeros where the file's protocol version has no field.
    pub header: setup_header,
    /// Bytes to load.
    pub payload_len: u64,
}

/// Whether the file starts like a bzImage.
pub fn is_bzimage(head: &[u8]) -> bool {
    head.get(MAGIC..).is_some_and(|rest| rest.starts_with(b"HdrS"))
}

/// Reads and checks the setup header of `file`, which is `file_len` bytes long.
pub fn parse(file: &File, file_len: u64) -> Result<BzImage, Fault> {
    let mut bytes = [0; size_of::<setup_header>()];
    let available = file_len.saturating_sub(HEADER).min(bytes.len() as u64) as usize;
    file.read_exact_at(&mut bytes[..available], HEADER)?;
    // The jump at 0x200 leads past the end of the header (its operand is relative to 0x202).
    let end = MAGIC + usize::from(bytes[0x201 - HEADER as usize]) - HEADER as usize;
    if end > available {
        let needs = HEADER + end as u64;
        return Err(Defect::Truncated { part: "the setup header".to_owned(), needs, has: file_len }.into());
    }
    bytes[end.min(size_of::<setup_header>())..].fill(0);
    let mut header = setup_header::default();
    header.as_mut_slice().copy_from_slice(&bytes);

    let version = header.version;
    if version < 0x20c || header.loadflags & LOADED_HIGH == 0 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(Defect::Old { version }.into());
    }
    let setup_sectors = if header.setup_sects == 0 { 4 } else { header.setup_sects };
    let setup_len = (u64::from(setup_sectors) + 1) * 512;
    let needs = setup_len + u64::from(header.syssize) * 16;
    if header.syssize == 0 || file_len < needs {
        return Err(
            Defect::Truncated { part: "the compressed kernel".to_owned(), needs, has: file_len }.into()
        );
    }
    let image = BzImage { header, payload_len: file_len - setup_len };
    let preferred = header.pref_address;
    if preferred < layout::HIGH_MEMORY || preferred > u64::from(u32::MAX) {
        return Err(Defect::Header(format!("preferred address {preferred:#x}")).into());
    }
    Ok(image)
}

impl BzImage {
    /// Where the kernel is loaded. A relocatable kernel could go elsewhere, but decompresses itself to this address
    /// at the lowest, so that nothing is gained.
    pub fn addr(&self) -> u64 {
        self.header.pref_address
    }

    /// First address after the memory that the kernel takes before it looks at the memory map.
    pub fn end(&self) -> u64 {
        self.addr().saturating_add(self.payload_len.max(u64::from(self.header.init_size)))
    }
}
