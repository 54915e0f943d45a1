//! Tiny guests for tests and benchmarks: a few instructions in an ELF kernel or a bzImage, assembled here.
//!
//! The instructions mean the same in 64-bit and in 32-bit mode, so that one guest serves both boot protocols.

use crate::platform;

/// Where the guest's code lies and starts.
pub const CODE_ADDR: u64 = 0x10_0000;

/// Where the guest's code is loaded if it is a bzImage; the program starts 0x200 bytes after.
pub const BZIMAGE_ADDR: u64 = 0x20_0000;

/// `SLEEP_CONTROL` value that powers off: sleep type S5 and the enable bit.
const POWER_OFF: u8 = platform::SLEEP_TYPE_S5 << 2 | 1 << 5;
/// Keyboard controller command that pulls the reset line.
const I8042_RESET: u8 = 0xfe;
/// pvpanic's event bit for a guest panic.
const PANICKED: u8 = 1;

/// A guest program under construction.
#[derive(Clone, Debug, Default)]
pub struct Program {
    code: Vec<u8>,
    pvh: bool,
}

impl Program {
    /// An empty program.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives the kernel a PVH entry.
    pub fn with_pvh(mut self) -> Self {
        self.pvh = true;
        self
    }

    /// Adds instructions as they are.
    pub fn raw(mut self, code: &[u8]) -> Self {
        self.code.extend_from_slice(code);
        self
    }

    /// Writes `value` to an I/O port.
    pub fn out(self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        // mov dx, port; mov al, value; out dx, al
        self.raw(&[0x66, 0xba, low, high, 0xb0, value, 0xee])
    }

    /// Reads the I/O port `from` and writes what it gave to the port `to`.
    pub fn copy(self, from: u16, to: u16) -> Self {
        let ([from_low, from_high], [to_low, to_high]) = (from.to_le_bytes(), to.to_le_bytes());
        // mov dx, from; in al, dx; mov dx, to; out dx, al
        self.raw(&[0x66, 0xba, from_low, from_high, 0xec, 0x66, 0xba, to_low, to_high, 0xee])
    }

    /// Writes `text` to the serial port.
    pub fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |program, byte| program.out(platform::COM1.start, byte))
    }

    /// Writes `mark` to the guest-event port's boot mark.
    pub fn mark(self, mark: u8) -> Self {
        self.out(platform::GUEST_EVENT.start, mark)
    }

    /// Reports an exit status at the guest-event port.
    pub fn exit_status(self, status: u8) -> Self {
        self.out(platform::GUEST_EVENT.start + 1, status)
    }

    /// Powers off by the ACPI sleep register.
    pub fn power_off(self) -> Self {
        self.out(platform::SLEEP_CONTROL, POWER_OFF).halt()
    }

    /// Resets by the keyboard controller.
    pub fn reset(self) -> Self {
        self.out(platform::I8042.start + 4, I8042_RESET).halt()
    }

    /// Resets by the ACPI reset register.
    pub fn acpi_reset(self) -> Self {
        self.out(platform::RESET, platform::RESET_VALUE).halt()
    }

    /// Reports a panic by pvpanic, then halts.
    pub fn panic(self) -> Self {
        self.out(platform::PVPANIC.start, PANICKED).halt()
    }

    /// Causes a fault that no handler takes: a triple fault.
    pub fn triple_fault(self) -> Self {
        // ud2
        self.raw(&[0x0f, 0x0b])
    }

    /// Halts for good.
    pub fn halt(self) -> Self {
        // hlt; jmp to the hlt
        self.raw(&[0xf4, 0xeb, 0xfd])
    }

    /// Spins for good.
    pub fn spin(self) -> Self {
        self.raw(&[0xeb, 0xfe])
    }

    /// The program as a bzImage, whose load address is [`BZIMAGE_ADDR`].
    pub fn bzimage(&self) -> Vec<u8> {
        const SETUP_LEN: usize = 2 * 512;
        const ENTRY: usize = 0x200;
        let mut file = vec![0; SETUP_LEN + ENTRY];
        file.extend_from_slice(&self.code);
        file.resize(file.len().next_multiple_of(16), 0);
        let paragraphs = ((file.len() - SETUP_LEN) / 16) as u32;
        let mut put = |at: usize, bytes: &[u8]| file[at..][..bytes.len()].copy_from_slice(bytes);
        // Fields by their offsets in the Linux boot protocol.
        put(0x1f1, &[1]); // setup_sects
        put(0x1f4, &paragraphs.to_le_bytes()); // syssize
        put(0x1fe, &[0x55, 0xaa]); // boot_flag
        put(0x200, &[0xeb, 0x6a]); // jump, past the end of the header
        put(0x202, b"HdrS"); // header
        put(0x206, &[0x0f, 0x02]); // version
        put(0x211, &[1]); // loadflags: LOADED_HIGH
        put(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
        put(0x230, &0x20_0000_u32.to_le_bytes()); // kernel_alignment
        put(0x234, &[1, 21]); // relocatable_kernel, min_alignment
        put(0x236, &[1, 0]); // xloadflags: XLF_KERNEL_64
        put(0x238, &2047_u32.to_le_bytes()); // cmdline_size
        put(0x258, &BZIMAGE_ADDR.to_le_bytes()); // pref_address
        put(0x260, &0x20_0000_u32.to_le_bytes()); // init_size
        file
    }

    /// The program as an ELF kernel.
    pub fn elf(&self) -> Vec<u8> {
        let mut image = ElfImage::new(CODE_ADDR);
        image.segment(CODE_ADDR, &self.code, self.code.len() as u64);
        if self.pvh {
            image.pvh_note(CODE_ADDR as u32);
        }
        image.build()
    }
}

/// An ELF64 file under construction.
#[derive(Clone, Debug)]
pub struct ElfImage {
    entry: u64,
    headers: Vec<[u64; 6]>,
    contents: Vec<(u64, Vec<u8>)>,
    end: u64,
}

impl ElfImage {
    /// An executable for x86-64 that starts at `entry`.
    pub fn new(entry: u64) -> Self {
        Self { entry, headers: Vec::new(), contents: Vec::new(), end: 0x1000 }
    }

    /// Adds a loadable segment that lies in the file as it lies in memory, page-congruent.
    pub fn segment(&mut self, addr: u64, bytes: &[u8], mem_len: u64) -> &mut Self {
        let offset = self.end.next_multiple_of(0x1000) + addr % 0x1000;
        self.segment_at(offset, addr, bytes, mem_len)
    }

    /// Adds a loadable segment at a file offset of the caller's choice.
    pub fn segment_at(&mut self, offset: u64, addr: u64, bytes: &[u8], mem_len: u64) -> &mut Self {
        // p_type and p_flags (read, write, execute), p_offset, p_paddr, p_filesz, p_memsz, p_align
        self.headers.push([7 << 32 | 1, offset, addr, bytes.len() as u64, mem_len, 0x1000]);
        self.contents.push((offset, bytes.to_vec()));
        self.end = self.end.max(offset + bytes.len() as u64);
        self
    }

    /// Adds a note segment with a PVH entry.
    pub fn pvh_note(&mut self, entry: u32) -> &mut Self {
        let mut note = Vec::new();
        for number in [4_u32, 4, 18] {
            note.extend_from_slice(&number.to_le_bytes());
        }
        note.extend_from_slice(b"Xen\0");
        note.extend_from_slice(&entry.to_le_bytes());
        let offset = self.end.next_multiple_of(4);
        self.headers.push([4 << 32 | 4, offset, 0, note.len() as u64, note.len() as u64, 4]);
        self.end = offset + note.len() as u64;
        self.contents.push((offset, note));
        self
    }

    /// The file's bytes.
    pub fn build(&self) -> Vec<u8> {
        let mut file = vec![0; self.end as usize];
        let mut header = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
        for number in [self.entry, 64, 0] {
            header.extend_from_slice(&number.to_le_bytes());
        }
        // e_flags, e_ehsize, e_phentsize, e_phnum, and no sections
        for number in [0_u16, 0, 64, 56, self.headers.len() as u16, 64, 0, 0] {
            header.extend_from_slice(&number.to_le_bytes());
        }
        for [kind, offset, addr, file_len, mem_len, align] in &self.headers {
            for number in [kind, offset, addr, addr, file_len, mem_len, align] {
                header.extend_from_slice(&number.to_le_bytes());
            }
        }
        for (offset, bytes) in [(0, header)].iter().chain(&self.contents) {
            file[*offset as usize..][..bytes.len()].copy_from_slice(bytes);
        }
        file
    }
}
