//! A kernel file of any contents is refused or loaded, and what is loaded stays in the guest's memory.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use rvmm::boot::testing::Program;
use rvmm::boot::{BootProtocol, Cmdline, Discovery, Initrd, Kernel, Machine, Placement, Source, cpuid, load, registers};
use rvmm::memory;
use rvmm::platform::mmio_slot;

/// A file without a name, and the path that opens it again.
fn file(bytes: &[u8]) -> (File, PathBuf) {
    // SAFETY: the name is a C string, and the descriptor that comes back is nobody else's.
    let mut file = unsafe {
        let fd = libc::memfd_create(c"kernel".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0, "memfd_create");
        File::from_raw_fd(fd)
    };
    file.write_all(bytes).expect("a memfd takes what it is given");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    (file, path)
}

fuzz_target!(|input: &[u8]| {
    let Some((&[choice, length], bytes)) = input.split_first_chunk::<2>() else { return };
    // Half of the inputs are changes to a good file, so that they get past the first checks.
    let mut contents = match choice >> 6 {
        0 => bytes.to_vec(),
        1 => Program::new().print("hi").halt().elf(),
        2 => Program::new().with_pvh().halt().elf(),
        _ => Program::new().halt().bzimage(),
    };
    if choice >> 6 != 0 {
        for change in bytes.chunks_exact(4) {
            let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % contents.len();
            contents[at] = change[2];
            let next = (at + 1) % contents.len();
            contents[next] ^= change[3];
        }
    }
    let (_kernel_file, kernel) = file(&contents);
    let Ok(kernel) = Kernel::open(&kernel) else { return };
    let initrd = vec![0x5a; usize::from(length) * 97];
    let (_initrd_file, initrd) = file(&initrd);
    let source = Source {
        kernel,
        initrd: Initrd::open(&initrd).ok(),
        protocol: [BootProtocol::Auto, BootProtocol::Linux64, BootProtocol::Pvh][usize::from(choice) % 3],
        placement: if choice & 16 == 0 { Placement::Copy } else { Placement::Map },
    };
    let size = if choice & 8 == 0 { memory::MIN_SIZE } else { 64 << 20 };
    let ram = memory::allocate(size).expect("memory");
    let machine = Machine {
        cpus: 1 + (choice >> 2 & 1),
        virtio: mmio_slot(0).into_iter().collect(),
        discovery: Discovery::Auto,
        serial: true,
        generation_id: 1,
    };
    let Ok(loaded) = load(&ram, &source, &machine, &Cmdline::default()) else { return };
    assert!(loaded.entry >= 1 << 20 && loaded.entry < loaded.kernel_end && loaded.kernel_end <= size);
    if let Some(initrd) = &loaded.initrd {
        assert!(initrd.start >= loaded.kernel_end && initrd.end <= size);
    }
    let sregs = registers::sregs(&loaded, Default::default());
    assert_eq!(registers::regs(&loaded).rip, loaded.entry);
    assert!(sregs.cr0 & 1 == 1);
    let vcpu = cpuid::Vcpu { index: 0, count: machine.cpus, tsc_deadline: true, tsc_khz: None };
    assert!(!cpuid::build(&[], vcpu, &[]).is_empty());
});
