//! Each instruction in a guest of its own, in long mode at CPL 0. On PVM hosts the monitor carries it out, on others
//! the processor does; both must come to the same.
#![allow(unsafe_code)]

use kvm_bindings::{kvm_enable_cap, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::{Emulator, Error};
use crate::memory::{self, Ram};

const CODE: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const STACK: u64 = 0x30_0000;
const PML4: u64 = 0x1000;
const PT: u64 = 0x4000;
const GDT: u64 = 0x8000;
const IDT: u64 = 0x9000;
const HANDLERS: u64 = 0xb000;
/// Guest memory; the guest's tables map its first 4 MiB, page by page, at the same address.
const MEMORY: u64 = 16 << 20;

/// Assembles guest code and makes its bytes available under a name.
macro_rules! guest {
    ($name:ident, $($line:literal),+ $(,)?) => {
        std::arch::global_asm!(
                ".pushsection .rodata",
                concat!(".global pvm_test_", stringify!($name)),
                concat!("pvm_test_", stringify!($name), ":"),
                concat!(".quad 9f - 8f"),
                "8:",
                $($line,)+
                "hlt",
                "9:",
                ".popsection",
            );
        fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = concat!("pvm_test_", stringify!($name))]
                static BLOB: u64;
            }
            // SAFETY: the assembly above puts the length of the code and then the code itself at the symbol.
            unsafe {
                let len = (&raw const BLOB).read_unaligned() as usize;
                std::slice::from_raw_parts((&raw const BLOB).add(1).cast::<u8>(), len)
            }
        }
    };
}

struct Guest {
    ram: Ram,
    vcpu: VcpuFd,
    _vm: VmFd,
    emulator: Emulator,
}

/// How a guest ended.
#[derive(Debug, PartialEq)]
enum End {
    Halted,
    /// An exception, with its error code (0 for those that have none) and the address that it was taken at.
    Exception {
        vector: u8,
        code: u64,
        rip: u64,
    },
}

impl Guest {
    /// `None`, with a word on standard error, where there is no KVM.
    fn new(code: &[u8]) -> Option<Guest> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => {
                eprintln!("skipped: /dev/kvm cannot be opened: {error}");
                return None;
            }
        };
        let vm = kvm.create_vm().unwrap();
        let ram = memory::allocate(MEMORY).unwrap();
        let region = kvm_userspace_memory_region {
            memory_size: MEMORY,
            userspace_addr: ram.get_host_address(GuestAddress(0)).unwrap() as u64,
            ..Default::default()
        };
        // SAFETY: `ram` outlives the VM: both are fields of the value made here, which drops neither early.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        vm.enable_cap(&kvm_enable_cap { cap: 204, args: [1, 0, 0, 0], ..Default::default() }).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap()).unwrap();
        let guest = Guest { ram, vcpu, _vm: vm, emulator: Emulator::new() };
        guest.ram.write_slice(code, GuestAddress(CODE)).unwrap();
        guest.write_tables();
        guest.set_registers();
        Some(guest)
    }

    fn put(&self, address: u64, value: u64) {
        self.ram.write_obj(value, GuestAddress(address)).unwrap();
    }

    fn get(&self, address: u64) -> u64 {
        self.ram.read_obj(GuestAddress(address)).unwrap()
    }

    fn write_tables(&self) {
        self.put(PML4, 0x2000 | 7);
        self.put(0x2000, 0x3000 | 7);
        for table in 0..2 {
            self.put(0x3000 + table * 8, (PT + table * 0x1000) | 7);
            for page in 0..512 {
                let address = (table * 512 + page) << 12;
                self.put(PT + table * 0x1000 + page * 8, address | 3);
            }
        }
        self.put(GDT + 0x10, 0x00af_9b00_0000_ffff);
        self.put(GDT + 0x18, 0x00cf_9300_0000_ffff);
        for vector in 0..32 {
            let handler = HANDLERS + vector * 16;
            let gate = handler & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
            self.put(IDT + vector * 16, gate);
            // mov al, vector; out 0xee, al; hlt
            self.put(handler, 0xf4_eee6_00b0 | vector << 8);
        }
    }

    fn set_registers(&self) {
        let mut sregs = self.vcpu.get_sregs().unwrap();
        let code = kvm_segment {
            limit: u32::MAX,
            selector: 0x10,
            type_: 11,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment { selector: 0x18, type_: 3, l: 0, db: 1, ..code };
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
        (sregs.gdt.base, sregs.gdt.limit) = (GDT, 0x1f);
        (sregs.idt.base, sregs.idt.limit) = (IDT, 0x1ff);
        sregs.cr0 = 0x8005_0033;
        sregs.cr3 = PML4;
        sregs.cr4 = 0x620 | 1 << 18;
        sregs.efer = 0xd00;
        self.vcpu.set_sregs(&sregs).unwrap();
        let regs = kvm_regs { rip: CODE, rsp: STACK, rflags: 2, rdi: DATA, ..Default::default() };
        self.vcpu.set_regs(&regs).unwrap();
        let mut xcrs = self.vcpu.get_xcrs().unwrap();
        xcrs.nr_xcrs = 1;
        xcrs.xcrs[0].xcr = 0;
        xcrs.xcrs[0].value = 7;
        self.vcpu.set_xcrs(&xcrs).unwrap();
    }

    /// Runs to the end, carrying out what KVM does not.
    fn run(&mut self) -> End {
        self.try_run().unwrap()
    }

    fn try_run(&mut self) -> Result<End, Error> {
        let mut exception = None;
        loop {
            let run: *const kvm_bindings::kvm_run = self.vcpu.get_kvm_run();
            match self.vcpu.run().unwrap() {
                VcpuExit::Hlt => return Ok(exception.map_or(End::Halted, |vector| self.exception(vector))),
                VcpuExit::IoOut(0xee, data) => exception = Some(data[0]),
                VcpuExit::InternalError => {
                    // SAFETY: the exit says which member of the union is set; its fields are plain integers.
                    let failure = unsafe { (*run).__bindgen_anon_1.emulation_failure };
                    assert_eq!((failure.suberror, failure.flags & 1), (1, 1));
                    // SAFETY: as above; the flag says that the bytes are there.
                    let bytes = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
                    let bytes = bytes.insn_bytes[..usize::from(bytes.insn_size)].to_vec();
                    self.emulator.carry_out(&mut self.vcpu, &self.ram, &bytes)?;
                }
                other => panic!("unexpected exit {other:?}"),
            }
        }
    }

    fn exception(&self, vector: u8) -> End {
        let rsp = self.regs().rsp;
        let has_code = matches!(vector, 8 | 10..=14 | 17);
        let code = if has_code { self.get(rsp) } else { 0 };
        End::Exception { vector, code, rip: self.get(rsp + if has_code { 8 } else { 0 }) }
    }

    fn regs(&self) -> kvm_regs {
        self.vcpu.get_regs().unwrap()
    }
}

/// Makes a guest or ends the test.
macro_rules! start {
    ($code:expr) => {
        match Guest::new($code) {
            Some(guest) => guest,
            None => return,
        }
    };
}

/// Whether the processor is QEMU's software, which leaves out some checks that processors make; says so.
fn processor_is_lax() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0x4000_0000);
    let signature = [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes);
    let lax = signature.as_flattened() == b"TCGTCGTCGTCG";
    if lax {
        eprintln!("skipped: QEMU's emulated processor does not check this");
    }
    lax
}

const FLAGS: u64 = 0x8d5;

guest!(
    popcnt,
    "mov rax, 0xf0f0",
    "stc",
    "popcnt rbx, rax",
    "mov ecx, 0x80000001",
    "popcnt ecx, ecx",
    "pushfq",
    "pop rdx",
    "mov qword ptr [rdi], -1",
    "mov r8, -1",
    "popcnt r8d, [rdi]",
    "xor eax, eax",
    "popcnt r9w, ax",
    "pushfq",
    "pop r10"
);

#[test]
fn popcnt_counts_and_sets_zero_flag_only() {
    let mut guest = start!(popcnt());
    assert_eq!(guest.run(), End::Halted);
    let regs = guest.regs();
    assert_eq!((regs.rbx, regs.rcx, regs.r8, regs.r9), (8, 2, 32, 0));
    assert_eq!((regs.rdx & FLAGS, regs.r10 & FLAGS), (0, 0x40));
}

guest!(int3, "int3", "nop");

#[test]
fn int3_is_taken_behind_the_instruction() {
    let mut guest = start!(int3());
    assert_eq!(guest.run(), End::Exception { vector: 3, code: 0, rip: CODE + 1 });
}

guest!(ac, "stac", "pushfq", "pop rax", "clac", "pushfq", "pop rbx");

#[test]
fn stac_and_clac_change_the_flag() {
    let mut guest = start!(ac());
    // Hardware wants CR4.SMAP nowhere for these two.
    assert_eq!(guest.run(), End::Halted);
    let regs = guest.regs();
    assert_eq!((regs.rax >> 18 & 1, regs.rbx >> 18 & 1), (1, 0));
}

guest!(
    crc,
    "mov eax, 0xffffffff",
    "mov ecx, 0x34333231",
    "crc32 eax, ecx",
    "mov rbx, 0x12345678",
    "mov rdx, 0x1122334455667788",
    "crc32 rbx, rdx",
    "crc32 ecx, dl"
);

#[test]
fn crc32_is_castagnoli() {
    let mut guest = start!(crc());
    assert_eq!(guest.run(), End::Halted);
    // The CRC-32C of "1234", before the final inversion.
    assert_eq!(guest.regs().rax, 0xf63a_f4ee ^ 0xffff_ffff);
}

guest!(
    swap16,
    "mov rax, 1",
    "mov rdx, 2",
    "mov rbx, 3",
    "mov rcx, 4",
    "lock cmpxchg16b [rdi]",
    "pushfq",
    "pop r8",
    "lock cmpxchg16b [rdi]",
    "pushfq",
    "pop r9"
);

#[test]
fn cmpxchg16b_exchanges_or_loads() {
    let mut guest = start!(swap16());
    guest.put(DATA, 1);
    guest.put(DATA + 8, 2);
    assert_eq!(guest.run(), End::Halted);
    let regs = guest.regs();
    assert_eq!((guest.get(DATA), guest.get(DATA + 8)), (3, 4));
    assert_eq!((regs.rax, regs.rdx, regs.r8 & 0x40, regs.r9 & 0x40), (3, 4, 0x40, 0));
}

guest!(swap16_unaligned, "lock cmpxchg16b [rdi + 8]");

#[test]
fn cmpxchg16b_off_alignment_faults() {
    let mut guest = start!(swap16_unaligned());
    assert_eq!(guest.run(), End::Exception { vector: 13, code: 0, rip: CODE });
}

guest!(
    mxcsr,
    "mov dword ptr [rdi], 0x1fa0",
    "ldmxcsr [rdi]",
    "stmxcsr [rdi + 4]",
    "mov eax, [rdi + 4]",
    "mov dword ptr [rdi], 0xffff0000",
    "ldmxcsr [rdi]"
);

#[test]
fn mxcsr_is_loaded_stored_and_checked() {
    let mut guest = start!(mxcsr());
    let end = guest.run();
    assert_eq!(guest.get(DATA + 4) as u32, 0x1fa0);
    if !processor_is_lax() {
        assert!(matches!(end, End::Exception { vector: 13, code: 0, .. }), "{end:?}");
    }
}

guest!(xgetbv, "xor ecx, ecx", "xgetbv", "mov rbx, rax", "fwait", "vzeroupper");

#[test]
fn xgetbv_fwait_and_vzeroupper_pass() {
    let mut guest = start!(xgetbv());
    assert_eq!(guest.run(), End::Halted);
    assert_eq!(guest.regs().rbx, 7);
}

// Area 1 holds a pattern; restoring it and saving it again to area 2 must give it back.
guest!(
    xsave_round,
    "mov eax, 7",
    "xor edx, edx",
    "xrstor64 [rdi]",
    "xsave64 [rdi + 0x1000]",
    "xsavec64 [rdi + 0x2000]",
    "xsaveopt64 [rdi + 0x3000]",
    "xrstor64 [rdi + 0x2000]",
    "xsave64 [rdi + 0x4000]"
);

fn write_area(guest: &Guest, at: u64) -> Vec<u8> {
    let mut area = vec![0_u8; 832];
    area[0..2].copy_from_slice(&0x27f_u16.to_le_bytes());
    area[24..28].copy_from_slice(&0x1fc0_u32.to_le_bytes());
    for (index, byte) in area.iter_mut().enumerate().skip(160).take(256) {
        *byte = index as u8 ^ 0x5a;
    }
    for (index, byte) in area.iter_mut().enumerate().skip(576) {
        *byte = index as u8 ^ 0xa5;
    }
    area[512] = 7;
    guest.ram.write_slice(&area, GuestAddress(at)).unwrap();
    area
}

fn read(guest: &Guest, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    guest.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

#[test]
fn restored_state_is_saved_again_in_every_form() {
    if !std::is_x86_feature_detected!("xsavec") || !std::is_x86_feature_detected!("avx") {
        eprintln!("skipped: this processor has no XSAVEC or no AVX");
        return;
    }
    let mut guest = start!(xsave_round());
    let area = write_area(&guest, DATA);
    assert_eq!(guest.run(), End::Halted);
    for at in [0x1000, 0x2000, 0x4000] {
        let saved = read(&guest, DATA + at, 832);
        assert_eq!(saved[160..416], area[160..416], "xmm at {at:#x}");
        assert_eq!(saved[576..832], area[576..832], "ymm at {at:#x}");
        assert_eq!((&saved[0..2], &saved[24..28]), (&area[0..2], &area[24..28]), "control words at {at:#x}");
        assert_eq!(saved[512] & 6, 6);
    }
    assert_eq!(guest.get(DATA + 0x1000 + 520), 0);
    assert_eq!(guest.get(DATA + 0x2000 + 520), 7 | 1 << 63);
}

guest!(xrstor_bad, "mov eax, 7", "xor edx, edx", "xrstor64 [rdi]");

fn bad_area(change: impl Fn(&mut Vec<u8>), expected: End) {
    let mut guest = start!(xrstor_bad());
    let mut area = write_area(&guest, DATA);
    change(&mut area);
    guest.ram.write_slice(&area, GuestAddress(DATA)).unwrap();
    assert_eq!(guest.run(), expected);
}

#[test]
fn bad_areas_are_refused() {
    if processor_is_lax() {
        return;
    }
    let refused = || End::Exception { vector: 13, code: 0, rip: CODE + 7 };
    bad_area(|area| area[513] = 0x80, refused());
    bad_area(|area| area[520] = 1, refused());
    bad_area(|area| area[528] = 1, refused());
    bad_area(|area| area[27] = 0xff, refused());
    bad_area(|area| (area[527], area[520], area[512]) = (0x80, 1, 7), refused());
    bad_area(|area| (area[527], area[521]) = (0x80, 0x80), refused());
}

guest!(xsave_unaligned, "mov eax, 7", "xor edx, edx", "xsave64 [rdi + 8]");

#[test]
fn xsave_off_alignment_faults() {
    let mut guest = start!(xsave_unaligned());
    assert_eq!(guest.run(), End::Exception { vector: 13, code: 0, rip: CODE + 7 });
}

#[test]
fn xsave_without_osxsave_is_undefined() {
    let mut guest = start!(xrstor_bad());
    let mut sregs = guest.vcpu.get_sregs().unwrap();
    sregs.cr4 &= !(1 << 18);
    guest.vcpu.set_sregs(&sregs).unwrap();
    assert_eq!(guest.run(), End::Exception { vector: 6, code: 0, rip: CODE + 7 });
}

#[test]
fn xrstor_with_task_switched_set_is_no_device() {
    if processor_is_lax() {
        return;
    }
    let mut guest = start!(xrstor_bad());
    let mut sregs = guest.vcpu.get_sregs().unwrap();
    sregs.cr0 |= 1 << 3;
    guest.vcpu.set_sregs(&sregs).unwrap();
    assert_eq!(guest.run(), End::Exception { vector: 7, code: 0, rip: CODE + 7 });
}

guest!(xsave_across, "mov eax, 7", "xor edx, edx", "xsave64 [rdi - 512]");

#[test]
fn xsave_to_a_missing_or_read_only_page_faults_before_it_writes() {
    for (entry, code) in [(0, 2), (DATA | 1, 3)] {
        let mut guest = start!(xsave_across());
        guest.put(PT + 0x1000, entry);
        guest.put(DATA - 512, 0x1122_3344);
        assert_eq!(guest.run(), End::Exception { vector: 14, code, rip: CODE + 7 });
        // Which byte of the page is touched first, and what was written before, is the processor's business.
        assert_eq!(guest.vcpu.get_sregs().unwrap().cr2 & !0xfff, DATA);
        if guest.emulator.carried_out() > 0 {
            assert_eq!(guest.get(DATA - 512), 0x1122_3344);
        }
    }
}

guest!(not_canonical, "mov rbx, 0x800000000000", "mov eax, 7", "xor edx, edx", "xsave64 [rbx]");

#[test]
fn address_that_is_not_canonical_faults() {
    let mut guest = start!(not_canonical());
    let end = guest.run();
    assert!(matches!(end, End::Exception { vector: 13, code: 0, .. }), "{end:?}");
}

guest!(
    lsl,
    "mov ecx, 0x10",
    "lsl eax, ecx",
    "pushfq",
    "pop rbx",
    "mov ecx, 0x20",
    "lsl edx, ecx",
    "pushfq",
    "pop rsi",
    "mov ecx, 0x10",
    "lar r8d, ecx",
    "mov word ptr [rdi], 0x18",
    "verw [rdi]",
    "pushfq",
    "pop r9"
);

#[test]
fn descriptors_are_looked_up() {
    let mut guest = start!(lsl());
    assert_eq!(guest.run(), End::Halted);
    let regs = guest.regs();
    assert_eq!((regs.rax, regs.rbx & 0x40, regs.rsi & 0x40), (0xffff_ffff, 0x40, 0));
    // Bits 19:16 of what LAR gives are undefined.
    assert_eq!((regs.r8 & !0xf_0000, regs.r9 & 0x40), (0xa0_9b00, 0x40));
}

guest!(
    rdtscp,
    "rdtscp",
    "shl rdx, 32",
    "or rax, rdx",
    "mov rbx, rax",
    "mov rsi, rcx",
    "rdtscp",
    "shl rdx, 32",
    "or rax, rdx"
);

#[test]
fn rdtscp_goes_forward() {
    let mut guest = start!(rdtscp());
    assert_eq!(guest.run(), End::Halted);
    assert!(guest.regs().rax > guest.regs().rbx);
}

guest!(unknown, "aesenc xmm0, xmm1");

#[test]
fn unknown_instruction_is_named_in_the_error() {
    let mut guest = start!(unknown());
    match guest.try_run() {
        // Hardware and nested hosts execute it.
        Ok(end) => assert_eq!(end, End::Halted),
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains("0x100000") && text.contains("66 0f 38 dc c1"), "{text}");
        }
    }
}

guest!(many, "mov ecx, 20000", "2:", "clac", "dec ecx", "jnz 2b");
guest!(many_swaps, "mov ecx, 20000", "2:", "popcnt rax, rcx", "dec ecx", "jnz 2b");
guest!(
    many_saves,
    "mov eax, 7",
    "xor edx, edx",
    "mov ecx, 20000",
    "2:",
    "xsavec64 [rdi]",
    "dec ecx",
    "jnz 2b"
);
guest!(
    many_restores,
    "mov eax, 7",
    "xor edx, edx",
    "mov ecx, 20000",
    "xsavec64 [rdi]",
    "2:",
    "xrstor64 [rdi]",
    "dec ecx",
    "jnz 2b"
);

/// CPU time of this thread.
fn cpu_time() -> std::time::Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock fills the structure that it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    std::time::Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Not a check: prints what a fix-up costs, the loop around it included.
#[test]
#[ignore = "prints figures"]
fn cost_of_a_fix_up() {
    for (name, code) in
        [("clac", many()), ("popcnt", many_swaps()), ("xsavec", many_saves()), ("xrstor", many_restores())]
    {
        let mut guest = start!(code);
        let start = cpu_time();
        assert_eq!(guest.run(), End::Halted);
        eprintln!(
            "{name}: {:?} each, {} carried out",
            (cpu_time() - start) / 20000,
            guest.emulator.carried_out()
        );
    }
}
