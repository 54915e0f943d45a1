//! Tests of loading as a whole: files in, guest memory out.

use std::fs;
use std::path::PathBuf;

use linux_loader::bootparam::boot_params;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::testing::{BZIMAGE_ADDR, CODE_ADDR, ElfImage, Program};
use super::*;
use crate::memory;
use crate::platform::mmio_slot;

const MIB: u64 = 1 << 20;

struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn add(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn source(&self, kernel: &[u8]) -> Source {
        let kernel = Kernel::open(&self.add("kernel", kernel)).unwrap();
        Source { kernel, initrd: None, protocol: BootProtocol::Auto, placement: Placement::Map }
    }
}

fn machine() -> Machine {
    Machine {
        cpus: 2,
        virtio: vec![mmio_slot(0).unwrap(), mmio_slot(1).unwrap()],
        discovery: Discovery::Auto,
        serial: true,
        generation_id: 0x0123,
    }
}

fn read(ram: &Ram, addr: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
    bytes
}

/// Bytes that tell their place.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251) as u8 | 1).collect()
}

#[test]
fn segments_arrive_and_the_rest_stays_zero() {
    // Congruent with partial pages at both ends, whole pages, not congruent, sharing a page with a neighbour.
    let contents = pattern(40_000);
    let mut image = ElfImage::new(MIB);
    image.segment(MIB + 0x123, &contents[..30_001], 50_000);
    image.segment(2 * MIB, &contents[..8192], 8192);
    image.segment_at(200_000, 3 * MIB, &contents, 45_000);
    image.segment(4 * MIB, &contents[..5000], 5000);
    image.segment(4 * MIB + 5000, &contents[..5000], 5000);
    image.segment(5 * MIB, &contents[..10], 10);
    let mut image = image.clone();
    image.segment(MIB, &[0xf4; 0x100], 0x100);
    let files = Files::new();
    let source = files.source(&image.build());
    let ram = memory::allocate(16 * MIB).unwrap();
    let loaded = load(&ram, &source, &machine(), &Cmdline::default()).unwrap();
    assert_eq!((loaded.protocol, loaded.entry, loaded.kernel_end), (Protocol::Linux64, MIB, 5 * MIB + 10));

    let mut expected = vec![0; 5 * MIB as usize];
    let mut put = |addr: u64, bytes: &[u8]| {
        expected[(addr - MIB) as usize..][..bytes.len()].copy_from_slice(bytes);
    };
    put(MIB, &[0xf4; 0x100]);
    put(MIB + 0x123, &contents[..30_001]);
    put(2 * MIB, &contents[..8192]);
    put(3 * MIB, &contents);
    put(4 * MIB, &contents[..5000]);
    put(4 * MIB + 5000, &contents[..5000]);
    put(5 * MIB, &contents[..10]);
    assert!(read(&ram, MIB, expected.len()) == expected);
}

#[test]
fn zero_page_says_what_was_loaded() {
    let files = Files::new();
    let initrd = pattern(10_001);
    let mut source = files.source(&Program::new().halt().elf());
    source.initrd = Some(Initrd::open(&files.add("initrd", &initrd)).unwrap());
    for (size, low_end) in [(16 * MIB, 16 * MIB), (128 * MIB, 128 * MIB), (4096 * MIB, 2048 * MIB)] {
        let ram = memory::allocate(size).unwrap();
        let mut cmdline = Cmdline::new("console=ttyS0").unwrap();
        cmdline.add("reboot=t").unwrap();
        let loaded = load(&ram, &source, &machine(), &cmdline).unwrap();
        assert_eq!((loaded.protocol, loaded.entry), (Protocol::Linux64, CODE_ADDR));

        let page: boot_params = ram.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap();
        let text = String::from_utf8(read(&ram, page.hdr.cmd_line_ptr.into(), loaded.cmdline.len())).unwrap();
        assert_eq!(text, loaded.cmdline);
        let devices = "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6";
        assert_eq!(text, format!("reboot=t {devices} console=ttyS0"));
        assert_eq!(loaded.added.len(), 3);

        let start = low_end - 3 * 4096;
        assert_eq!(loaded.initrd, Some(start..start + 10_001));
        assert_eq!(({ page.hdr.ramdisk_image }, { page.hdr.ramdisk_size }), (start as u32, 10_001));
        assert_eq!(read(&ram, start, 10_001), initrd);
        assert_eq!(read(&ram, start + 10_001, 12_288 - 10_001), [0; 12_288 - 10_001]);

        let map = layout::memory_map(&memory::ranges(size));
        assert_eq!(usize::from(page.e820_entries), map.len());
        for (entry, range) in { page.e820_table }.iter().zip(&map) {
            assert_eq!(
                ({ entry.addr }, { entry.size }, { entry.r#type }),
                (range.addr, range.len, range.kind as u32)
            );
        }
        assert_eq!((page.sentinel, { page.hdr.boot_flag }), (0, 0xaa55));
    }
}

#[test]
fn pvh_start_info_says_what_was_loaded() {
    let files = Files::new();
    let mut source = files.source(&Program::new().with_pvh().halt().elf());
    source.initrd = Some(Initrd::open(&files.add("initrd", b"tiny")).unwrap());
    let ram = memory::allocate(128 * MIB).unwrap();
    let loaded = load(&ram, &source, &machine(), &Cmdline::new("quiet").unwrap()).unwrap();
    assert_eq!((loaded.protocol, loaded.entry), (Protocol::Pvh, CODE_ADDR));
    assert_eq!(registers::regs(&loaded).rbx, layout::PVH_START_INFO);

    let info: hvm_start_info = ram.read_obj(GuestAddress(layout::PVH_START_INFO)).unwrap();
    assert_eq!((info.magic, info.version, info.nr_modules), (0x336e_c578, 1, 1));
    assert!(String::from_utf8(read(&ram, info.cmdline_paddr, 2048)).unwrap().starts_with(&loaded.cmdline));
    let module: hvm_modlist_entry = ram.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    assert_eq!((module.paddr, module.size), (128 * MIB - 4096, 4));
    assert_eq!(read(&ram, module.paddr, 5), b"tiny\0");
    for (index, range) in layout::memory_map(&memory::ranges(128 * MIB)).iter().enumerate() {
        let addr = info.memmap_paddr + 24 * index as u64;
        let entry: hvm_memmap_table_entry = ram.read_obj(GuestAddress(addr)).unwrap();
        assert_eq!((entry.addr, entry.size, entry.type_), (range.addr, range.len, range.kind as u32));
    }
    assert_eq!(info.memmap_entries, 3);

    source.protocol = BootProtocol::Linux64;
    let ram = memory::allocate(128 * MIB).unwrap();
    let loaded = load(&ram, &source, &machine(), &Cmdline::default()).unwrap();
    assert_eq!(loaded.protocol, Protocol::Linux64);
    assert_eq!(registers::regs(&loaded).rsi, layout::ZERO_PAGE);
}

#[test]
fn page_tables_map_one_to_one() {
    let files = Files::new();
    let mut image = ElfImage::new(1200 * MIB);
    image.segment(1200 * MIB, &[0xf4], 1);
    let source = files.source(&image.build());
    let ram = memory::allocate(2048 * MIB).unwrap();
    let loaded = load(&ram, &source, &machine(), &Cmdline::default()).unwrap();
    let sregs = registers::sregs(&loaded, Default::default());
    let entry = |table: u64, index: u64| ram.read_obj::<u64>(GuestAddress(table + index * 8)).unwrap();
    let translate = |addr: u64| {
        let pdpt = entry(sregs.cr3, addr >> 39 & 511);
        let pd = entry(pdpt & !0xfff, addr >> 30 & 511);
        assert!(pdpt & 1 == 1 && pd & 1 == 1, "{addr:#x}");
        let page = entry(pd & !0xfff, addr >> 21 & 511);
        assert_eq!(page & 0x81, 0x81);
        page & !0x1f_ffff | addr & 0x1f_ffff
    };
    for addr in [0, 0x1234, layout::ZERO_PAGE, 1023 * MIB, 1024 * MIB, loaded.entry, 2047 * MIB] {
        assert_eq!(translate(addr), addr);
    }
}

#[test]
fn what_does_not_fit_says_how_much_memory_it_needs() {
    let files = Files::new();
    let mut image = ElfImage::new(MIB);
    image.segment(MIB, &[0xf4], 30 * MIB);
    let mut source = files.source(&image.build());
    let load = |source: &Source, size| {
        load(&memory::allocate(size).unwrap(), source, &machine(), &Cmdline::default())
    };
    let error = load(&source, 16 * MIB).unwrap_err();
    assert!(error.to_string().ends_with("needs 31 MiB of guest memory, the guest has 16 MiB"), "{error}");
    load(&source, 31 * MIB).unwrap();

    source.initrd = Some(Initrd::open(&files.add("initrd", &vec![1; 2 * MIB as usize])).unwrap());
    let error = load(&source, 32 * MIB).unwrap_err();
    assert!(error.to_string().contains("initrd"), "{error}");
    assert!(error.to_string().ends_with("needs 33 MiB of guest memory, the guest has 32 MiB"), "{error}");
    load(&source, 33 * MIB).unwrap();
}

#[test]
fn files_that_are_no_kernels_are_called_by_their_name() {
    let files = Files::new();
    let open = |bytes: &[u8]| {
        let error = Kernel::open(&files.add("kernel", bytes)).unwrap_err();
        let source = std::error::Error::source(&error).map(ToString::to_string);
        format!("{error}: {}", source.unwrap_or_default())
    };
    let elf = Program::new().halt().elf();
    let with = |at: usize, bytes: &[u8]| {
        let mut elf = elf.clone();
        elf[at..][..bytes.len()].copy_from_slice(bytes);
        elf
    };
    let mut arm64 = vec![0; 4096];
    arm64[0x38..0x3c].copy_from_slice(b"ARM\x64");
    let mut ext4 = vec![0; 4096];
    ext4[0x438..0x43a].copy_from_slice(b"\x53\xef");
    for (bytes, wanted) in [
        (vec![], "is empty"),
        (b"\x1f\x8b\x08\0".to_vec(), "gzip"),
        (b"\x28\xb5\x2f\xfd\0".to_vec(), "zstd"),
        (b"\xfd7zXZ\0\0".to_vec(), "xz"),
        (b"#!/bin/sh\n".to_vec(), "a script"),
        (b"hello\n".to_vec(), "text"),
        (arm64, "64-bit Arm"),
        (ext4, "ext4"),
        (b"\x7fELF".to_vec(), "truncated: the ELF header ends at byte 20, the file has 4"),
        (elf[..63].to_vec(), "truncated: the ELF header ends at byte 64, the file has 63"),
        (elf[..100].to_vec(), "truncated: the program header table ends at byte 120, the file has 100"),
        (elf[..elf.len() - 1].to_vec(), "truncated: segment 0 ends at byte 4099, the file has 4098"),
        (with(18, &[183, 0]), "64-bit Arm (aarch64)"),
        (with(4, &[1, 1]), "x32"),
        (with(18, &[3, 0]), "32-bit x86"),
        (with(5, &[2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 22]), "s390"),
        (with(16, &[1, 0]), "object file"),
        (with(16, &[3, 0]), "shared object"),
        (with(56, &[0, 0]), "0 program headers"),
        (with(56, &[0xff, 0xff]), "65535 program headers"),
        (with(54, &[55, 0]), "program headers of 55 bytes"),
        (with(32, &[0xff; 8]), "program header table lies at file offset"),
        (with(64 + 24, &[0; 8]), "below 1 MiB"),
        (with(64 + 24, &[0xff; 8]), "wraps around"),
        (with(64 + 31, &[1]), "is to be loaded at 0x100000000100000"),
        (with(64 + 32, &[0xff; 8]), "longer in the file than in memory"),
        (with(64, &[0]), "no loadable segment"),
    ] {
        let error = open(&bytes);
        assert!(error.contains(wanted), "{error:?} lacks {wanted:?}");
    }
}

#[test]
fn paths_that_are_no_files_are_called_by_their_name() {
    let files = Files::new();
    let directory = files.0.path();
    let text = |error: Error| error.to_string();
    assert!(text(Kernel::open(directory).unwrap_err()).ends_with("is a directory, not a file"));
    assert!(text(Kernel::open("/dev/null".as_ref()).unwrap_err()).ends_with("is a device, not a file"));
    let missing = Kernel::open(&directory.join("none")).unwrap_err();
    assert!(
        matches!(missing, Error::Open { role: Role::Kernel, ref source, .. } if source.kind() == std::io::ErrorKind::NotFound)
    );
    let pipe = directory.join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
    assert!(text(Initrd::open(&pipe).unwrap_err()).ends_with("is a pipe, not a file"));
}

#[test]
fn bzimage_is_loaded_where_it_wants_to_be() {
    let files = Files::new();
    let program = Program::new().print("x").power_off();
    let file = program.bzimage();
    let mut source = files.source(&file);
    source.initrd = Some(Initrd::open(&files.add("initrd", b"tiny")).unwrap());
    let ram = memory::allocate(16 * MIB).unwrap();
    let loaded = load(&ram, &source, &machine(), &Cmdline::new("quiet").unwrap()).unwrap();
    assert_eq!((loaded.protocol, loaded.entry), (Protocol::Linux64, BZIMAGE_ADDR + 0x200));
    assert_eq!((loaded.kernel_end, loaded.discovery), (BZIMAGE_ADDR + 2 * MIB, Discovery::Acpi));
    assert_eq!((loaded.cmdline.as_str(), loaded.added.len()), ("quiet", 0));
    assert_eq!(read(&ram, BZIMAGE_ADDR, file.len() - 1024), file[1024..]);
    let page: boot_params = ram.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap();
    assert_eq!(
        ({ page.hdr.version }, page.hdr.type_of_loader, { page.hdr.init_size }),
        (0x20f, 0xff, 2 << 20)
    );
    assert_eq!(({ page.hdr.cmd_line_ptr }, { page.hdr.ramdisk_size }), (layout::CMDLINE as u32, 4));
    // What follows the header in the file is the program's, not the kernel's.
    assert_eq!({ page._pad7 }, [0; 36]);

    source.protocol = BootProtocol::Pvh;
    let error = load(&ram, &source, &machine(), &Cmdline::default()).unwrap_err();
    assert!(matches!(error, Error::Kernel { source: Defect::BzImagePvh, .. }), "{error}");
}

#[test]
fn broken_bzimages_are_refused() {
    let files = Files::new();
    let good = Program::new().halt().bzimage();
    let open = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut file = good.clone();
        change(&mut file);
        match Kernel::open(&files.add("kernel", &file)) {
            Err(Error::Kernel { source, .. }) => source.to_string(),
            other => panic!("{other:?}"),
        }
    };
    for (wanted, change) in [
        ("boot protocol 2.11", (&|file: &mut Vec<u8>| file[0x206] = 0x0b) as &dyn Fn(&mut Vec<u8>)),
        ("no 64-bit entry point", &|file| file[0x236] = 0),
        ("no 64-bit entry point", &|file| file[0x211] = 0),
        ("the compressed kernel ends at byte 1552, the file has 1551", &|file| file.truncate(1551)),
        ("the compressed kernel ends at byte 1552, the file has 700", &|file| file.truncate(700)),
        ("the setup header ends at byte 620, the file has 600", &|file| file.truncate(600)),
        ("the compressed kernel", &|file| file[0x1f7] = 0xff),
        ("the compressed kernel", &|file| file[0x1f4..0x1f8].fill(0)),
        ("preferred address 0x0", &|file| file[0x258..0x260].fill(0)),
        ("preferred address 0xffffffffffffffff", &|file| file[0x258..0x260].fill(0xff)),
    ] {
        let error = open(change);
        assert!(error.contains(wanted), "{error:?} lacks {wanted:?}");
    }
}

#[test]
fn a_kernel_that_knows_acpi_gets_its_devices_by_acpi() {
    let files = Files::new();
    // A file with a `.rodata` section that has `contents` in it.
    let kernel = |contents: &[u8]| {
        let mut file = Program::new().halt().elf();
        file.resize(file.len().next_multiple_of(8), 0);
        let rodata = file.len() as u64;
        file.extend_from_slice(contents);
        let names = file.len() as u64;
        file.extend_from_slice(b"\0.rodata\0.shstrtab\0");
        file.resize(file.len().next_multiple_of(8), 0);
        let table = file.len() as u64;
        for (name, offset, len) in [(0_u32, 0, 0), (1, rodata, contents.len() as u64), (9, names, 19)] {
            let mut header = [0_u8; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[24..32].copy_from_slice(&u64::to_le_bytes(offset));
            header[32..40].copy_from_slice(&len.to_le_bytes());
            file.extend_from_slice(&header);
        }
        file[40..48].copy_from_slice(&table.to_le_bytes());
        file[60..64].copy_from_slice(&[3, 0, 2, 0]);
        file
    };
    let mut with_acpi = vec![0x55; 300_000];
    with_acpi[262_144..262_152].copy_from_slice(b"LNRO0005");
    for (contents, user, wanted) in [
        (&with_acpi[..], "", Discovery::Acpi),
        (&with_acpi, "acpi=off", Discovery::Cmdline),
        (&with_acpi[..262_144], "", Discovery::Both),
        (&[], "", Discovery::Both),
    ] {
        let source = files.source(&kernel(contents));
        let ram = memory::allocate(16 * MIB).unwrap();
        let loaded = load(&ram, &source, &machine(), &Cmdline::new(user).unwrap()).unwrap();
        assert_eq!(loaded.discovery, wanted);
        assert_eq!(loaded.added.len(), if wanted == Discovery::Acpi { 0 } else { 2 });
    }
    let mut asked = machine();
    asked.discovery = Discovery::Cmdline;
    let source = files.source(&kernel(&with_acpi));
    let ram = memory::allocate(16 * MIB).unwrap();
    let line = Cmdline::new("virtio_mmio.device=4K@0xd0000000:5").unwrap();
    let loaded = load(&ram, &source, &asked, &line).unwrap();
    assert_eq!((loaded.discovery, loaded.added), (Discovery::Cmdline, vec![]));
}

#[test]
fn a_kernel_file_that_shrinks_after_the_check_is_an_error() {
    let files = Files::new();
    let contents = pattern(20_000);
    let mut image = ElfImage::new(MIB);
    image.segment_at(0x1001, MIB, &contents, 20_000);
    let source = files.source(&image.build());
    let file = fs::File::options().write(true).open(source.kernel.path()).unwrap();
    file.set_len(0x2000).unwrap();
    let ram = memory::allocate(16 * MIB).unwrap();
    let error = load(&ram, &source, &machine(), &Cmdline::default()).unwrap_err();
    assert!(matches!(error, Error::Read { role: Role::Kernel, .. }), "{error}");

    let source = files.source(&Program::new().halt().bzimage());
    let file = fs::File::options().write(true).open(source.kernel.path()).unwrap();
    file.set_len(0x300).unwrap();
    let error = load(&ram, &source, &machine(), &Cmdline::default()).unwrap_err();
    assert!(matches!(error, Error::Load { .. }), "{error}");
}

/// Opens and loads whatever is in the file; a kernel that is accepted must keep to its guest's memory.
fn try_kernel(bytes: &[u8]) {
    let files = Files::new();
    let Ok(kernel) = Kernel::open(&files.add("kernel", bytes)) else { return };
    let source = Source { kernel, initrd: None, protocol: BootProtocol::Auto, placement: Placement::Map };
    let ram = memory::allocate(16 * MIB).unwrap();
    if let Ok(loaded) = load(&ram, &source, &machine(), &Cmdline::default()) {
        assert!(loaded.kernel_end <= 16 * MIB && loaded.entry < loaded.kernel_end, "{loaded:x?}");
        assert!(loaded.entry >= MIB, "{loaded:x?}");
    }
}

/// Numbers that are likely to be handled wrongly.
fn edge() -> impl Strategy<Value = u64> {
    let powers = (0..64_u32, -2..=2_i64).prop_map(|(bit, delta)| (1_u64 << bit).wrapping_add_signed(delta));
    prop_oneof![any::<u64>(), powers, 0..0x4000_u64, Just(CODE_ADDR), Just(u64::MAX)]
}

proptest! {
    #[test]
    fn hostile_elf_headers_do_no_harm(
        fields in prop::collection::vec((0..200_usize, edge(), 1..=8_usize), 1..6),
        cut in prop::option::of(0..0x1100_usize),
        pvh: bool,
    ) {
        let program = Program::new().print("hi").halt();
        let mut file = if pvh { program.with_pvh() } else { program }.elf();
        for (at, value, len) in fields {
            // Past the identification, which would otherwise end most cases at once.
            file[20 + at..][..len].copy_from_slice(&value.to_le_bytes()[..len]);
        }
        file.truncate(cut.unwrap_or(usize::MAX));
        try_kernel(&file);
    }

    #[test]
    fn hostile_segments_do_no_harm(
        segments in prop::collection::vec([edge(), edge(), edge(), edge()], 1..6),
        entry in edge(),
    ) {
        let mut file = ElfImage::new(entry).build();
        file.truncate(64);
        for [offset, addr, file_len, mem_len] in &segments {
            for number in [7 << 32 | 1, *offset, *addr, *addr, *file_len, *mem_len, 0x1000] {
                file.extend_from_slice(&number.to_le_bytes());
            }
        }
        file[56] = segments.len() as u8;
        file.resize(0x8000, 0x90);
        try_kernel(&file);
    }

    #[test]
    fn hostile_setup_headers_do_no_harm(
        fields in prop::collection::vec((0x1f1..0x270_usize, edge(), 1..=8_usize), 1..6),
        cut in prop::option::of(0..1600_usize),
    ) {
        let mut file = Program::new().print("hi").halt().bzimage();
        for (at, value, len) in fields {
            file[at..][..len].copy_from_slice(&value.to_le_bytes()[..len]);
        }
        file.truncate(cut.unwrap_or(usize::MAX));
        try_kernel(&file);
    }

    #[test]
    fn arbitrary_notes_do_no_harm(notes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut image = ElfImage::new(CODE_ADDR);
        image.segment(CODE_ADDR, &[0xf4], 1).pvh_note(CODE_ADDR as u32);
        let mut file = image.build();
        let at = file.len() - 20;
        file.truncate(at);
        file.extend_from_slice(&notes);
        let len = (notes.len() as u64).to_le_bytes();
        file[64 + 56 + 32..][..8].copy_from_slice(&len);
        try_kernel(&file);
    }
}
